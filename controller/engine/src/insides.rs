//! What containers show of themselves from inside that are to be moved live: looked at only then, and known until they are
//! started anew. Nothing else ever runs a program in an instance.

use std::collections::HashMap;
use std::sync::Mutex;

use berth_api::{Method, Transfer};
use berth_core::model::{Inside, InstanceKind, Power};
use berth_core::plan::{Desired, Located, Verdict};
use berth_core::server::{FailureKind, Result, Server};

use crate::lock;

/// What is kept in memory at most; what is forgotten is looked at again.
const KEPT: usize = 1000;

/// What was seen, by fingerprint, uuid and last start.
#[derive(Default)]
pub(crate) struct Insides {
    known: Mutex<HashMap<[String; 3], Inside>>,
}

fn key(located: &Located) -> Option<[String; 3]> {
    let i = &located.instance;
    Some([
        located.fingerprint.clone(),
        i.uuid()?.to_owned(),
        i.last_used_at.clone(),
    ])
}

impl Insides {
    /// What is known of an instance.
    pub fn of(&self, located: &Located) -> Option<Inside> {
        lock(&self.known).get(&key(located)?).copied()
    }

    /// The container that has to be looked into before this verdict is the last word.
    pub fn missing(&self, desired: &Desired, verdict: &Verdict) -> Option<Located> {
        let spec = &desired.spec;
        let located = verdict.located.as_ref()?;
        let i = &located.instance;
        let live = spec.criu && spec.methods.contains(&Method::Live);
        let runs = i.kind == InstanceKind::Container && i.power == Power::Running;
        let away = verdict.plan.as_ref()?.transfer.is_some_and(|t| t != Transfer::Internal);
        (live && runs && away && self.of(located).is_none()).then(|| located.clone())
    }

    /// Looks into a container. One that cannot be looked into is known as that.
    pub async fn look(&self, located: &Located, server: &dyn Server) -> Result<()> {
        let inside = match server.inside(located.at()).await {
            Ok(inside) => inside,
            Err(error) if error.is_transient() || error.kind == FailureKind::NotFound => return Err(error),
            Err(error) => {
                tracing::debug!(at = %located.at(), %error, "cannot be looked into");
                Inside::default()
            }
        };
        let Some(key) = key(located) else { return Ok(()) };
        let mut known = lock(&self.known);
        if known.len() >= KEPT {
            known.clear();
        }
        known.insert(key, inside);
        Ok(())
    }
}
