//! Instances that events named and nobody has read since. Whoever acts on an instance reads it after each of its requests,
//! so what an event names waits a moment for that, and is read for its own sake only if nobody did.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use berth_core::model::InstanceRef;
use tokio::time::Instant;

use crate::lock;

/// How long an instance waits for somebody who reads it anyway.
const COURTESY: Duration = Duration::from_millis(20);

/// When events named an instance.
struct Named {
    first: Instant,
    last: Instant,
}

/// The instances to read.
#[derive(Default)]
pub(crate) struct Dirty(Mutex<BTreeMap<InstanceRef, Named>>);

impl Dirty {
    /// An event named it.
    pub fn name(&self, at: InstanceRef, now: Instant) {
        let mut dirty = lock(&self.0);
        dirty.entry(at).or_insert(Named { first: now, last: now }).last = now;
    }

    /// Somebody read it since `began`: what events told before that is known.
    pub fn read(&self, at: &InstanceRef, began: Instant) {
        let mut dirty = lock(&self.0);
        if dirty.get(at).is_some_and(|named| named.last < began) {
            dirty.remove(at);
        }
    }

    /// Takes one that has waited long enough.
    pub fn take(&self, now: Instant) -> Option<InstanceRef> {
        let mut dirty = lock(&self.0);
        let due = dirty.iter().find(|(_, named)| named.first + COURTESY <= now);
        let at = due.map(|(at, _)| at.clone())?;
        dirty.remove(&at);
        Some(at)
    }

    /// When the next of them has waited long enough.
    pub fn due(&self) -> Option<Instant> {
        lock(&self.0).values().map(|named| named.first + COURTESY).min()
    }

    pub fn count(&self) -> usize {
        lock(&self.0).len()
    }

    /// All are about to be read.
    pub fn clear(&self) {
        lock(&self.0).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_read_after_its_last_event_is_not_read_again() {
        let (dirty, at, t0) = (Dirty::default(), InstanceRef::new("default", "web"), Instant::now());
        let after = |millis| t0 + Duration::from_millis(millis);
        dirty.name(at.clone(), after(0));
        dirty.name(at.clone(), after(5));
        dirty.read(&at, after(3));
        assert_eq!(dirty.take(after(19)), None, "it waits");
        assert_eq!(dirty.due(), Some(after(20)), "however many events follow the first");
        assert_eq!(dirty.take(after(20)), Some(at.clone()), "the second event was not read");
        dirty.name(at.clone(), after(30));
        dirty.read(&at, after(31));
        assert_eq!(dirty.due(), None);
    }
}
