//! Writes the status of one placement while and after it is looked at. The latest status counts; one that only shows
//! progress is written at most once a second, one with another reason at once. Writing never delays what is being done.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use berth_api::{InstancePlacement, InstancePlacementStatus, conditions};
use berth_engine::{Happening, Key, Report, of_status};
use jiff::Timestamp;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::events::{BREATH, Tell};
use crate::store::{Store, StoreError};

/// Shortest time between two writes that say the same reason.
const PAUSE: Duration = Duration::from_secs(1);

/// What is remembered of the statuses that were written, and of those that were not.
#[derive(Default)]
pub(crate) struct Writes {
    last: Mutex<HashMap<Key, Last>>,
}

#[derive(Default)]
struct Last {
    written_at: Option<Instant>,
    /// How a pass left the placement of that uid where its status could not be written, or had to wait: it is the
    /// placement's memory, and the next pass goes on from there.
    unsaid: Option<Box<Unsaid>>,
}

#[derive(Clone)]
struct Unsaid {
    uid: Option<String>,
    status: InstancePlacementStatus,
}

impl Writes {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Last>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How much longer a write that says the same reason has to wait.
    fn pause(&self, key: &Key) -> Duration {
        let since = self.lock().get(key).and_then(|l| l.written_at).map(|t| t.elapsed());
        since.map_or(Duration::ZERO, |s| PAUSE.saturating_sub(s))
    }

    fn note(&self, key: &Key) {
        self.lock().entry(key.clone()).or_default().written_at = Some(Instant::now());
    }

    /// The status from which a pass goes on.
    pub fn status(&self, key: &Key, object: &InstancePlacement) -> InstancePlacementStatus {
        let stored = object.status.clone().unwrap_or_default();
        match self.lock().get(key).and_then(|l| l.unsaid.clone()) {
            Some(unsaid) if unsaid.uid == object.metadata.uid => InstancePlacementStatus {
                observed_generation: stored.observed_generation,
                conditions: stored.conditions,
                ..unsaid.status
            },
            _ => stored,
        }
    }

    /// The placement is gone.
    pub fn forget(&self, key: &Key) {
        self.lock().remove(key);
    }

    /// Somebody else may have written since.
    pub fn forget_all(&self) {
        self.lock().clear();
    }
}

/// The status of one placement during one pass.
pub(crate) struct Reporter<'a> {
    store: &'a Store,
    writes: &'a Writes,
    key: &'a Key,
    object: Arc<InstancePlacement>,
    next: Mutex<Option<InstancePlacementStatus>>,
    wake: Notify,
    over: Notify,
    tell: Tell,
}

impl Report for Reporter<'_> {
    fn status(&self, status: &InstancePlacementStatus) {
        *self.lock() = Some(status.clone());
        self.wake.notify_one();
    }

    fn happened(&self, happening: Happening) {
        self.tell.tell(happening);
    }
}

impl<'a> Reporter<'a> {
    pub fn new(store: &'a Store, writes: &'a Writes, key: &'a Key, object: Arc<InstancePlacement>, tell: Tell) -> Self {
        Self {
            tell,
            store,
            writes,
            key,
            object,
            next: Mutex::default(),
            wake: Notify::new(),
            over: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<InstancePlacementStatus>> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing comes after this.
    pub fn end(&self) {
        self.over.notify_one();
    }

    /// Writes what comes in the middle of a pass, until its end. What has to wait gives way to what comes later.
    pub async fn write_until_end(&self) {
        loop {
            let woken = async {
                self.wake.notified().await;
                sleep(BREATH).await;
            };
            tokio::select! {
                () = woken => {}
                () = self.over.notified() => return,
            }
            let Some(status) = self.lock().take() else { continue };
            match self.write(&status).await {
                Ok(_) | Err(StoreError::NotLeading(_) | StoreError::Conflict(_)) => {}
                // the pass goes on without it, and its end is written in any case
                Err(error) => tracing::debug!(placement = %self.key, %error, "a status was not written"),
            }
        }
    }

    /// Writes how the pass left the placement. `Some`: it has to be written later.
    pub async fn write_last(&self, status: InstancePlacementStatus) -> Result<Option<Duration>, StoreError> {
        let written = self.write(&status).await;
        let unsaid = match &written {
            Ok(None) | Err(StoreError::NotFound(_)) => None,
            Ok(Some(_)) | Err(_) => Some(Box::new(Unsaid {
                uid: self.object.metadata.uid.clone(),
                status,
            })),
        };
        let mut last = self.writes.lock();
        if unsaid.is_some() {
            last.entry(self.key.clone()).or_default().unsaid = unsaid;
        } else if let Some(last) = last.get_mut(self.key) {
            last.unsaid = None;
        }
        drop(last);
        written
    }

    /// Writes a status if it says something new. `Some`: it has to wait that long.
    async fn write(&self, status: &InstancePlacementStatus) -> Result<Option<Duration>, StoreError> {
        let current = self.current();
        if current.metadata.generation != status.observed_generation {
            // what was decided from the former spec is not said of this one
            return Err(StoreError::Conflict(format!("write the status of {}", self.key)));
        }
        let old = current.status.clone().unwrap_or_default();
        let mut status = status.clone();
        conditions::keep_times(&mut status.conditions, &old.conditions, Timestamp::now());
        if !differs(&old, &status) {
            return Ok(None);
        }
        let same_reason = conditions::reason(&old.conditions) == conditions::reason(&status.conditions);
        let pause = self.writes.pause(self.key);
        if same_reason && !pause.is_zero() && old.observed_generation == status.observed_generation {
            return Ok(Some(pause));
        }
        let written = self.store.apply_status(current.as_ref(), &status).await?;
        self.writes.note(self.key);
        self.store.placements.wrote(written);
        if let Some(happening) = of_status(&old, &status) {
            self.tell.tell(happening);
        }
        Ok(None)
    }

    /// The object as it is known now; another one of the same name is not ours.
    fn current(&self) -> Arc<InstancePlacement> {
        let known = self.store.placements.get(self.key);
        let same = known.filter(|o| o.metadata.uid == self.object.metadata.uid);
        same.unwrap_or_else(|| self.object.clone())
    }
}

/// Whether the API server would store something else. Compared as written, where times have the precision of the text.
fn differs(old: &InstancePlacementStatus, new: &InstancePlacementStatus) -> bool {
    old != new && serde_json::to_value(old).ok() != serde_json::to_value(new).ok()
}

#[cfg(test)]
mod tests {
    use berth_api::conditions::{ConditionStatus, READY};

    use super::*;

    #[test]
    fn a_status_that_differs_only_in_what_is_not_written_is_not_written() {
        let mut a = InstancePlacementStatus::default();
        let at: Timestamp = "2026-01-01T00:00:00.123456789Z".parse().unwrap();
        conditions::set(
            &mut a.conditions,
            (READY, ConditionStatus::True),
            ("InPlace", "m"),
            Some(1),
            at,
        );
        let stored = serde_json::from_value(serde_json::to_value(&a).unwrap()).unwrap();
        assert!(!differs(&stored, &a));
        a.target = Some("b".into());
        assert!(differs(&stored, &a));
    }
}
