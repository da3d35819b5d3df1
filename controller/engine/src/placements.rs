//! What this process remembers of the placements: which instance each holds (the claims, over all namespaces), who waits
//! for a slot since when, and whom a change concerns. Only memory, made anew from the objects by every process.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use berth_core::copies::SourcePlacement;
use berth_core::model::InstanceRef;
use berth_core::plan::{Claim, Desired, Located};
use jiff::Timestamp;
use tokio::sync::Notify;

use crate::book::{Book, Route};
use crate::registry::{Registry, Usage};
use crate::{Key, lock};

/// The placements in memory.
#[derive(Default)]
pub(crate) struct Placements {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    known: HashMap<Key, Known>,
    by_uuid: HashMap<String, BTreeSet<Key>>,
    by_name: HashMap<String, BTreeSet<Key>>,
}

struct Known {
    uid: String,
    created_at: Timestamp,
    deleting: bool,
    /// What was asked for when it was last seen: a change of it interrupts a move in hand.
    asked: Asked,
    uuid: Option<String>,
    /// InstanceServer and fingerprint of the server that has the instance, as far as known.
    server: Option<String>,
    fingerprint: Option<String>,
    target: String,
    names: [String; 2],
    waiting: Option<Waiting>,
    interrupt: Arc<Notify>,
}

#[derive(PartialEq)]
struct Asked {
    generation: i64,
    deleting: bool,
    approve: Option<String>,
    requested_at: Option<String>,
}

/// A placement that waits for slots.
#[derive(Clone, Debug)]
struct Waiting {
    since: Timestamp,
    route: Route,
}

fn key_of(desired: &Desired) -> Key {
    Key::new(&desired.namespace, &desired.name)
}

fn asked(desired: &Desired) -> Asked {
    Asked {
        generation: desired.generation,
        deleting: desired.deleting,
        approve: desired.approve.clone(),
        requested_at: desired.requested_at.clone(),
    }
}

impl Placements {
    /// Takes over a placement as it is now. Interrupts its move if something else is asked for. `true`: others that want
    /// the same instance have to look again.
    pub fn seen(&self, desired: &Desired) -> bool {
        let key = key_of(desired);
        let mut table = lock(&self.table);
        let asked = asked(desired);
        let newer = |k: &Known| k.uid == desired.uid && k.asked.generation > desired.generation;
        if table.known.get(&key).is_some_and(newer) {
            return false;
        }
        let old = table.take(&key).filter(|k| k.uid == desired.uid);
        let interrupt = old.as_ref().map(|k| k.interrupt.clone()).unwrap_or_default();
        if old.as_ref().is_some_and(|k| k.asked != asked) {
            interrupt.notify_one();
        }
        let uuid = desired.bound_uuid().map(str::to_owned);
        let location = desired.status.location.as_ref().map(|l| l.server.clone());
        let same = old
            .as_ref()
            .is_some_and(|k| k.uuid == uuid && k.deleting == desired.deleting);
        let known = Known {
            uid: desired.uid.clone(),
            created_at: desired.created_at,
            deleting: desired.deleting,
            asked,
            uuid,
            server: old.as_ref().and_then(|k| k.server.clone()).or(location),
            fingerprint: old.as_ref().and_then(|k| k.fingerprint.clone()),
            target: desired.spec.target.server.clone(),
            names: [desired.instance_name().to_owned(), desired.target_name().to_owned()],
            waiting: old.and_then(|k| k.waiting),
            interrupt,
        };
        table.put(key, known);
        !same
    }

    /// Whether nothing newer is known of a placement: what interrupted it before is then no news.
    pub fn is_current(&self, desired: &Desired) -> bool {
        let table = lock(&self.table);
        let known = table.known.get(&key_of(desired));
        known.is_some_and(|k| k.asked == asked(desired))
    }

    /// Takes over where its instance is.
    pub fn located(&self, desired: &Desired, located: &Located) {
        let key = key_of(desired);
        let mut table = lock(&self.table);
        let Some(mut known) = table.take(&key) else { return };
        known.uuid = located.instance.uuid().map(str::to_owned).or(known.uuid);
        known.server = Some(located.server.clone());
        known.fingerprint = Some(located.fingerprint.clone());
        table.put(key, known);
    }

    /// Forgets one; returns those that want the same instance.
    pub fn forget(&self, key: &Key) -> Vec<Key> {
        let mut table = lock(&self.table);
        let Some(known) = table.take(key) else {
            return Vec::new();
        };
        known.interrupt.notify_one();
        known.uuid.map(|uuid| table.with_uuid(&uuid)).unwrap_or_default()
    }

    /// Those that want the same instance as this one.
    pub fn rivals(&self, key: &Key) -> Vec<Key> {
        let table = lock(&self.table);
        let uuid = table.known.get(key).and_then(|k| k.uuid.clone());
        let mut rivals = uuid.map(|u| table.with_uuid(&u)).unwrap_or_default();
        rivals.retain(|k| k != key);
        rivals
    }

    /// Whether a placement of that uid exists.
    pub fn lives(&self, key: &Key, uid: &str) -> bool {
        lock(&self.table).known.get(key).is_some_and(|k| k.uid == uid)
    }

    /// A placement as the source of a copy.
    pub fn source(&self, key: &Key) -> SourcePlacement {
        let table = lock(&self.table);
        let known = table.known.get(key);
        SourcePlacement {
            exists: known.is_some(),
            uuid: known.and_then(|k| k.uuid.clone()),
        }
    }

    /// What interrupts the move of a placement.
    pub fn interrupt(&self, key: &Key) -> Arc<Notify> {
        lock(&self.table)
            .known
            .get(key)
            .map(|k| k.interrupt.clone())
            .unwrap_or_default()
    }

    /// Who claims the instance of that uuid. A placement that moves it claims it on both servers.
    pub fn claims(&self, uuid: &str, book: &Book, registry: &Registry) -> Vec<Claim> {
        let table = lock(&self.table);
        let mut claims = Vec::new();
        for key in table.by_uuid.get(uuid).into_iter().flatten() {
            let Some(known) = table.known.get(key) else { continue };
            let claim = |fingerprint: String, moving: bool| Claim {
                namespace: key.namespace.clone(),
                name: key.name.clone(),
                created_at: known.created_at,
                fingerprint,
                uuid: uuid.to_owned(),
                moving,
                deleting: known.deleting,
            };
            if let Some(Route { from, to }) = book.route_of(&known.uid) {
                claims.extend([claim(from, true), claim(to, true)]);
                continue;
            }
            let by_name = || {
                let server = Key::new(&key.namespace, known.server.as_ref()?);
                registry.fingerprint(&server)
            };
            claims.extend(known.fingerprint.clone().or_else(by_name).map(|f| claim(f, false)));
        }
        claims
    }

    /// Takes note that a placement waits for slots, or no longer does.
    pub fn wait(&self, key: &Key, route: Option<Route>, now: Timestamp) {
        if let Some(known) = lock(&self.table).known.get_mut(key) {
            let since = known.waiting.as_ref().map_or(now, |w| w.since);
            known.waiting = route.map(|route| Waiting { since, route });
        }
    }

    /// Slots that are kept for those that wait longer than `key`, of slots that are free now.
    pub fn keep_for_older(&self, key: &Key, usage: &mut Usage, registry: &Registry) {
        let table = lock(&self.table);
        let own = table.known.get(key).and_then(|k| k.waiting.as_ref()).map(|w| w.since);
        let limits = registry.limits();
        for (waiting, other) in table.waiting() {
            if other != key && own.is_none_or(|own| (waiting.since, other) < (own, key)) {
                waiting.route.try_take(usage, &limits);
            }
        }
    }

    /// Those that wait for a slot and for whom there is one now, longest first. The others need not be woken: with
    /// thousands that wait, looking at each whenever one move ends would be all that is ever done.
    pub fn admissible(&self, mut usage: Usage, registry: &Registry) -> Vec<Key> {
        let (table, limits) = (lock(&self.table), registry.limits());
        let waiting = table.waiting().into_iter();
        waiting
            .filter(|(w, _)| w.route.try_take(&mut usage, &limits))
            .map(|(_, key)| key.clone())
            .collect()
    }

    /// Whom a change of an instance concerns.
    pub fn of_instance(&self, at: &InstanceRef, uuid: Option<&str>) -> Vec<Key> {
        let table = lock(&self.table);
        let mut keys: BTreeSet<Key> = uuid
            .map(|u| table.with_uuid(u))
            .unwrap_or_default()
            .into_iter()
            .collect();
        // one that is bound to another instance still has to know when its target's name is taken or free
        keys.extend(table.by_name.get(&at.name).into_iter().flatten().cloned());
        keys.into_iter().collect()
    }

    /// Whom a change of a server concerns: those on it or bound for it, and those whose instance was not found.
    pub fn of_server(&self, server: &Key) -> Vec<Key> {
        let table = lock(&self.table);
        let concerned = |k: &Known| {
            k.target == server.name || k.server.as_ref().is_none_or(|s| *s == server.name) || k.fingerprint.is_none()
        };
        let here = table
            .known
            .iter()
            .filter(|(key, known)| key.namespace == server.namespace && concerned(known));
        here.map(|(key, _)| key.clone()).collect()
    }
}

impl Table {
    fn with_uuid(&self, uuid: &str) -> Vec<Key> {
        self.by_uuid.get(uuid).into_iter().flatten().cloned().collect()
    }

    /// Those that wait for a slot, longest first.
    fn waiting(&self) -> Vec<(&Waiting, &Key)> {
        let waiting = self
            .known
            .iter()
            .filter_map(|(key, known)| Some((known.waiting.as_ref()?, key)));
        let mut all: Vec<(&Waiting, &Key)> = waiting.collect();
        all.sort_by_key(|(w, key)| (w.since, *key));
        all
    }

    fn put(&mut self, key: Key, known: Known) {
        if let Some(uuid) = &known.uuid {
            self.by_uuid.entry(uuid.clone()).or_default().insert(key.clone());
        }
        for name in &known.names {
            self.by_name.entry(name.clone()).or_default().insert(key.clone());
        }
        self.known.insert(key, known);
    }

    fn take(&mut self, key: &Key) -> Option<Known> {
        let known = self.known.remove(key)?;
        if let Some(uuid) = &known.uuid {
            drop_from(&mut self.by_uuid, uuid, key);
        }
        for name in &known.names {
            drop_from(&mut self.by_name, name, key);
        }
        Some(known)
    }
}

fn drop_from(index: &mut HashMap<String, BTreeSet<Key>>, at: &str, key: &Key) {
    if let Some(keys) = index.get_mut(at) {
        keys.remove(key);
        if keys.is_empty() {
            index.remove(at);
        }
    }
}
