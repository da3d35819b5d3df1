//! How long a guest stands still while its server works on its disk: some pools freeze it for the whole of a snapshot or
//! a copy, and nothing tells of it but its status, so that is looked at again and again.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use berth_core::model::{InstanceRef, Power};
use berth_core::moves::{Effect, Request};
use berth_core::server::Server;
use tokio::time::{Instant, sleep};

use crate::tasks::Pair;

/// How often a guest is looked at while a snapshot is taken.
const OFTEN: Duration = Duration::from_millis(50);
/// The same while it is copied, which may take hours.
const NOW_AND_THEN: Duration = Duration::from_millis(500);

/// A guest that is to be looked at.
pub(crate) struct Watched {
    server: Arc<dyn Server>,
    at: InstanceRef,
    every: Duration,
}

/// Whose guest may stand still during an effect.
pub(crate) fn watched(effect: &Effect, server: &Arc<dyn Server>, pair: Option<&Pair>) -> Option<Watched> {
    match (&effect.request, pair) {
        (Request::Snapshot { .. }, _) => Some(Watched {
            server: server.clone(),
            at: effect.at.clone(),
            every: OFTEN,
        }),
        // a snapshot that is sent touches nobody
        (Request::Transfer(t), Some(pair)) if t.running && t.offer.snapshot.is_none() => Some(Watched {
            server: pair.source.server.clone(),
            at: t.from.clone(),
            every: NOW_AND_THEN,
        }),
        _ => None,
    }
}

/// Does `work`, and says how long the guest stood still meanwhile.
pub(crate) async fn during<T>(work: impl Future<Output = T>, watched: Option<Watched>) -> (T, Duration) {
    let Some(watched) = watched else {
        return (work.await, Duration::ZERO);
    };
    let mut frozen = Duration::ZERO;
    let result = {
        let looks = look(&watched, &mut frozen);
        tokio::pin!(looks);
        tokio::select! {
            result = work => result,
            never = &mut looks => match never {},
        }
    };
    (result, frozen)
}

/// Adds up the time between looks that found the guest frozen.
async fn look(watched: &Watched, frozen: &mut Duration) -> std::convert::Infallible {
    let mut since = Instant::now();
    loop {
        sleep(watched.every).await;
        let seen = watched.server.instance(&watched.at).await;
        let now = Instant::now();
        if matches!(seen, Ok(Some(fresh)) if fresh.instance.power == Power::Frozen) {
            *frozen += now - since;
        }
        since = now;
    }
}
