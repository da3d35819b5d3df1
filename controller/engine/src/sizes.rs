//! Sizes of instances that are about to be moved: asked for only then, and kept for a while. Everything else about an
//! instance is followed by events; this costs its server a look at the disk.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_api::moves::MoveEnd;
use berth_api::placement::PlanMethod;
use berth_core::plan::{Located, Verdict};
use berth_core::server::Server;
use tokio::time::Instant;

use crate::lock;

/// For so long a size is good enough.
const KEPT: Duration = Duration::from_secs(300);

/// The sizes in memory, by fingerprint and uuid.
#[derive(Default)]
pub(crate) struct Sizes {
    known: Mutex<HashMap<Which, Known>>,
}

/// Fingerprint and uuid.
type Which = (String, String);
/// When it was asked for, and the answer.
type Known = (Instant, Option<i64>);

fn key(located: &Located) -> Option<Which> {
    Some((located.fingerprint.clone(), located.instance.uuid()?.to_owned()))
}

impl Sizes {
    /// What is known of an instance.
    pub fn of(&self, located: &Located) -> Option<i64> {
        let key = key(located)?;
        lock(&self.known).get(&key).and_then(|(_, size)| *size)
    }

    /// The instance that has to be asked for before this verdict is the last word.
    pub fn missing(&self, verdict: &Verdict) -> Option<Located> {
        let method = verdict.plan.as_ref()?.method?;
        let located = verdict.located.as_ref().filter(|l| l.instance.may_run())?;
        let known = lock(&self.known);
        let fresh = known.get(&key(located)?).is_some_and(|(at, _)| at.elapsed() < KEPT);
        (method != PlanMethod::InPlace && !fresh).then(|| located.clone())
    }

    /// A move of the instance is over: the next one asks anew. A pool that counts late (btrfs, after a write) would else make
    /// the same mistake again.
    pub fn forget(&self, from: &MoveEnd) {
        let uuid = from.uuid.clone().unwrap_or_default();
        lock(&self.known).remove(&(from.fingerprint.clone(), uuid));
    }

    /// Asks for a size. A server that does not say is not asked again for a while.
    pub async fn ask(&self, located: &Located, server: Option<Arc<dyn Server>>) {
        let Some(key) = key(located) else { return };
        let size = match server {
            None => None,
            Some(server) => server.size(located.at()).await.unwrap_or_else(|error| {
                tracing::debug!(at = %located.at(), %error, "its size is not known");
                None
            }),
        };
        let mut known = lock(&self.known);
        known.retain(|_, (at, _)| at.elapsed() < KEPT);
        known.insert(key, (Instant::now(), size));
    }
}
