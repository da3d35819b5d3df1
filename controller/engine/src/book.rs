//! What this process remembers of the records: all open ones, and of each placement the last that ended. Also counts the
//! moves per server. Only memory: what is stored counts, and every write goes by its version.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};

use berth_api::server::Limits;
use berth_core::moves::{has_kept, is_internal};
use berth_core::plan::Lessons;
use berth_core::records::Record;
use berth_core::status;
use jiff::Timestamp;

use crate::registry::Usage;
use crate::{Key, lock};

/// The records in memory.
#[derive(Default)]
pub(crate) struct Book {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Namespaces whose records were listed.
    loaded: BTreeSet<String>,
    open: BTreeMap<Key, Record>,
    /// Those that ended, as long as they are there.
    ended: BTreeSet<Key>,
    /// The last attempt that ended, by uid of the placement.
    last: HashMap<String, Record>,
    /// Those that ended and whose source is kept.
    kept: BTreeMap<Key, Record>,
    /// Moves that are about to be created, by uid of the placement.
    reserved: HashMap<String, Route>,
    /// Copies that are being made.
    copies: HashMap<Key, Copying>,
    /// What those that ended taught.
    lessons: Arc<Lessons>,
}

/// A copy that is being made.
pub(crate) struct Copying {
    pub route: Route,
    /// The uuid of what is copied.
    pub source: String,
    /// Whether data are on their way onto an existing copy.
    pub refreshes: bool,
}

/// Between which servers a move goes, by fingerprint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub from: String,
    pub to: String,
}

impl Route {
    /// Takes a slot on both servers if the limits of both leave one.
    pub fn try_take(&self, usage: &mut Usage, limits: &HashMap<String, Limits>) -> bool {
        let used = |f: &String| usage.get(f).copied().unwrap_or_default();
        let (Some(from), Some(to)) = (limits.get(&self.from), limits.get(&self.to)) else {
            return false;
        };
        let free =
            i64::from(from.outgoing) > used(&self.from).outgoing && i64::from(to.incoming) > used(&self.to).incoming;
        if free {
            self.take(usage);
        }
        free
    }

    /// Takes a slot on both servers.
    fn take(&self, usage: &mut Usage) {
        usage.entry(self.from.clone()).or_default().outgoing += 1;
        usage.entry(self.to.clone()).or_default().incoming += 1;
    }
}

impl Book {
    pub fn is_loaded(&self, namespace: &str) -> bool {
        lock(&self.inner).loaded.contains(namespace)
    }

    /// Forgets everything: another process may have written meanwhile.
    pub fn clear(&self) {
        *lock(&self.inner) = Inner::default();
    }

    /// Takes over all records of a namespace.
    pub fn load(&self, namespace: &str, records: Vec<Record>) {
        let mut inner = lock(&self.inner);
        inner.open.retain(|key, _| key.namespace != namespace);
        inner.ended.retain(|key| key.namespace != namespace);
        inner.kept.retain(|key, _| key.namespace != namespace);
        inner.loaded.insert(namespace.to_owned());
        for record in records {
            inner.put(record);
        }
    }

    /// Takes over one record.
    pub fn put(&self, record: Record) {
        lock(&self.inner).put(record);
    }

    /// The record is gone.
    pub fn remove(&self, key: &Key) {
        let mut inner = lock(&self.inner);
        inner.open.remove(key);
        inner.ended.remove(key);
        inner
            .last
            .retain(|_, r| r.namespace != key.namespace || r.name != key.name);
    }

    pub fn get(&self, key: &Key) -> Option<Record> {
        lock(&self.inner).open.get(key).cloned()
    }

    /// The open records of a placement, oldest attempt first.
    pub fn open_of(&self, uid: &str) -> Vec<Record> {
        let inner = lock(&self.inner);
        let mut open: Vec<_> = inner
            .open
            .values()
            .filter(|r| r.spec.placement_uid == uid)
            .cloned()
            .collect();
        open.sort_by_key(|r| r.spec.attempt);
        open
    }

    /// Nothing is known of what these records kept any more.
    pub fn forget_kept(&self, of: impl Fn(&Record) -> bool) {
        lock(&self.inner).kept.retain(|_, record| !of(record));
    }

    /// The finished records of a placement whose source is kept, oldest attempt first.
    pub fn kept_of(&self, uid: &str) -> Vec<Record> {
        let inner = lock(&self.inner);
        let kept = inner.kept.values().filter(|r| r.spec.placement_uid == uid);
        let mut kept: Vec<_> = kept.cloned().collect();
        kept.sort_by_key(|r| r.spec.attempt);
        kept
    }

    /// All open records of a namespace.
    pub fn open_in(&self, namespace: &str) -> Vec<Record> {
        let inner = lock(&self.inner);
        inner
            .open
            .values()
            .filter(|r| r.namespace == namespace)
            .cloned()
            .collect()
    }

    /// The records of a placement: an open one, which may only wait for a server that does not answer, and the last that
    /// ended.
    pub fn records_of(&self, uid: &str) -> Vec<Record> {
        self.open_of(uid).into_iter().chain(self.last_of(uid)).collect()
    }

    /// The last attempt of a placement that ended.
    pub fn last_of(&self, uid: &str) -> Option<Record> {
        lock(&self.inner).last.get(uid).cloned()
    }

    /// What the moves that ended taught.
    pub fn lessons(&self) -> Arc<Lessons> {
        lock(&self.inner).lessons.clone()
    }

    /// Somebody asks for another look: which servers lack CRIU is found out anew.
    pub fn forget_criu(&self) {
        Arc::make_mut(&mut lock(&self.inner).lessons).forget_criu();
    }

    /// Names of all records that are not finished.
    pub fn open_names(&self) -> Vec<String> {
        lock(&self.inner).open.keys().map(|k| k.name.clone()).collect()
    }

    /// Between which servers the placement's instance is on its way.
    pub fn route_of(&self, uid: &str) -> Option<Route> {
        let inner = lock(&self.inner);
        inner.open.values().find(|r| r.spec.placement_uid == uid).map(route)
    }

    /// The moves under way. One that waits only for a server that does not answer takes no slot, nor does one inside a
    /// server.
    pub fn usage(&self, now: Timestamp) -> Usage {
        let inner = lock(&self.inner);
        let mut usage = Usage::new();
        let open = inner
            .open
            .values()
            .filter(|r| !is_internal(r) && !status::is_leftover(r, now));
        open.for_each(|r| route(r).take(&mut usage));
        inner.reserved.values().for_each(|r| r.take(&mut usage));
        inner.copies.values().for_each(|c| c.route.take(&mut usage));
        usage
    }

    /// Keeps slots for a move that is about to be created.
    pub fn reserve(&self, uid: &str, route: Route) {
        lock(&self.inner).reserved.insert(uid.to_owned(), route);
    }

    /// A copy is being made, or no longer is; whether that frees slots.
    pub fn copying(&self, copy: &Key, what: Option<Copying>) -> bool {
        let mut inner = lock(&self.inner);
        match what {
            Some(what) => {
                inner.copies.insert(copy.clone(), what);
                false
            }
            None => inner.copies.remove(copy).is_some(),
        }
    }

    /// Whether another copy of that source is being made.
    pub fn is_copied(&self, source: &str, but: &Key) -> bool {
        let inner = lock(&self.inner);
        inner.copies.iter().any(|(key, c)| key != but && c.source == source)
    }

    /// The uuids of the instances from which a copy is being refreshed.
    pub fn refreshed(&self) -> Vec<String> {
        let inner = lock(&self.inner);
        let refreshes = inner.copies.values().filter(|c| c.refreshes);
        refreshes.map(|c| c.source.clone()).collect()
    }

    /// The uuids of all instances with a move under way. One that waits only for the server of its former source is
    /// over for everybody else.
    pub fn moving(&self, now: Timestamp) -> Vec<String> {
        let inner = lock(&self.inner);
        let open = inner.open.values().filter(|r| !status::is_leftover(r, now));
        open.filter_map(|r| r.spec.from.uuid.clone()).collect()
    }

    /// The move was created, or was not.
    pub fn unreserve(&self, uid: &str) {
        lock(&self.inner).reserved.remove(uid);
    }
}

pub(crate) fn route(record: &Record) -> Route {
    Route {
        from: record.spec.from.fingerprint.clone(),
        to: record.spec.to.fingerprint.clone(),
    }
}

impl Inner {
    /// An end, a cancellation and a deletion are never taken back: a pass that was interrupted by one of them gives back
    /// the record it had.
    fn put(&mut self, mut record: Record) {
        let key = Key::new(&record.namespace, &record.name);
        if !record.finished() {
            if self.ended.contains(&key) {
                return;
            }
            if let Some(known) = self.open.get(&key) {
                record.spec.cancel |= known.spec.cancel;
                record.deleting |= known.deleting;
            }
            self.open.insert(key, record);
            return;
        }
        self.open.remove(&key);
        self.ended.insert(key.clone());
        let known = match has_kept(&record) {
            true => self.kept.insert(key, record.clone()),
            false => self.kept.remove(&key),
        };
        // what is done about a kept source teaches nothing
        if known.is_none() {
            Arc::make_mut(&mut self.lessons).learn(&record);
        }
        let last = self.last.get(&record.spec.placement_uid);
        if last.is_some_and(|l| l.spec.attempt > record.spec.attempt) {
            return;
        }
        // only its end matters from here on
        record.status.steps = Vec::new();
        record.status.put_back = Vec::new();
        record.status.conditions = Vec::new();
        self.last.insert(record.spec.placement_uid.clone(), record);
    }
}
