//! Writes the status of one placement while and after it is looked at. The latest status counts; one that only shows
//! progress is written at most once a second, one with another reason at once. Writing never delays what is being done.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use berth_api::{InstancePlacement, InstancePlacementStatus};
use berth_engine::{Key, Report};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::conditions;
use crate::store::{Store, StoreError};

/// Shortest time between two writes that say the same reason.
const PAUSE: Duration = Duration::from_secs(1);

/// When each placement was written last.
#[derive(Default)]
pub(crate) struct Writes {
    last: Mutex<HashMap<Key, Instant>>,
}

impl Writes {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Instant>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How much longer a write that says the same reason has to wait.
    fn pause(&self, key: &Key) -> Duration {
        let since = self.lock().get(key).map(Instant::elapsed);
        since.map_or(Duration::ZERO, |s| PAUSE.saturating_sub(s))
    }

    fn note(&self, key: &Key) {
        self.lock().insert(key.clone(), Instant::now());
    }

    /// The placement is gone.
    pub fn forget(&self, key: &Key) {
        self.lock().remove(key);
    }
}

/// The status of one placement during one pass.
pub(crate) struct Reporter<'a> {
    store: &'a Store,
    writes: &'a Writes,
    key: &'a Key,
    object: Arc<InstancePlacement>,
    slot: Mutex<Slot>,
    wake: Notify,
}

#[derive(Default)]
struct Slot {
    next: Option<InstancePlacementStatus>,
    ended: bool,
}

impl Report for Reporter<'_> {
    fn status(&self, status: &InstancePlacementStatus) {
        self.lock().next = Some(status.clone());
        self.wake.notify_one();
    }
}

impl<'a> Reporter<'a> {
    pub fn new(store: &'a Store, writes: &'a Writes, key: &'a Key, object: Arc<InstancePlacement>) -> Self {
        Self {
            store,
            writes,
            key,
            object,
            slot: Mutex::default(),
            wake: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing comes after this.
    pub fn end(&self) {
        self.lock().ended = true;
        self.wake.notify_one();
    }

    /// Writes what comes in the middle of a pass, until its end. What has to wait gives way to what comes later.
    pub async fn write_until_end(&self) {
        loop {
            let (next, ended) = {
                let mut slot = self.lock();
                (slot.next.take(), slot.ended)
            };
            if ended {
                return;
            }
            if let Some(status) = next {
                match self.write(&status).await {
                    Ok(_) | Err(StoreError::NotLeading(_)) => {}
                    // the pass goes on without it, and its end is written in any case
                    Err(error) => tracing::debug!(placement = %self.key, %error, "a status was not written"),
                }
                continue;
            }
            self.wake.notified().await;
        }
    }

    /// Writes a status if it says something new. `Some`: it has to wait that long.
    pub async fn write(&self, status: &InstancePlacementStatus) -> Result<Option<Duration>, StoreError> {
        let current = self.current();
        let old = current.status.as_ref();
        if !differs(old, status) {
            return Ok(None);
        }
        let same_reason = old.and_then(|s| conditions::reason(&s.conditions)) == conditions::reason(&status.conditions);
        let pause = self.writes.pause(self.key);
        if same_reason && !pause.is_zero() && same_generation(old, status) {
            return Ok(Some(pause));
        }
        let written = self.store.apply_status(current.as_ref(), status).await?;
        self.writes.note(self.key);
        self.store.placements.wrote(written);
        Ok(None)
    }

    /// The object as it is known now; another one of the same name is not ours.
    fn current(&self) -> Arc<InstancePlacement> {
        let known = self.store.placements.get(self.key);
        let same = known.filter(|o| o.metadata.uid == self.object.metadata.uid);
        same.unwrap_or_else(|| self.object.clone())
    }
}

fn same_generation(old: Option<&InstancePlacementStatus>, new: &InstancePlacementStatus) -> bool {
    old.and_then(|s| s.observed_generation) == new.observed_generation
}

/// Whether the API server would store something else. Compared as written, where times have the precision of the text.
fn differs(old: Option<&InstancePlacementStatus>, new: &InstancePlacementStatus) -> bool {
    match old {
        Some(old) if old == new => false,
        Some(old) => serde_json::to_value(old).ok() != serde_json::to_value(new).ok(),
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use berth_api::Reason;
    use jiff::Timestamp;

    use super::*;

    #[test]
    fn a_status_that_differs_only_in_what_is_not_written_is_not_written() {
        let mut a = InstancePlacementStatus::default();
        let at: Timestamp = "2026-01-01T00:00:00.123456789Z".parse().unwrap();
        conditions::say(&mut a.conditions, Reason::InPlace, "m", Some(1), at);
        let stored = serde_json::from_value(serde_json::to_value(&a).unwrap()).unwrap();
        assert!(!differs(Some(&stored), &a));
        a.target = Some("b".into());
        assert!(differs(Some(&stored), &a));
        assert!(differs(None, &a));
    }
}
