//! The world: one lock around all servers and records, the virtual clock, the timers, and what a test can see and do
//! besides being a person (that is in `people`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use berth_core::model::{Instance, InstanceRef, Snapshot};
use berth_core::records::Record;
use berth_core::server::OperationState;
use jiff::Timestamp;
use tokio::sync::watch;

use crate::faults::{Entry, Fault, Hook};
use crate::invariants::Breach;
use crate::operations::Due;
use crate::records::MemoryRecords;
use crate::server::SimServer;
use crate::state::{Content, State};
use crate::view;

/// All servers, the records and the clock of one test. Cheap to clone; needs a tokio runtime, best one with paused time.
#[derive(Clone)]
pub struct World {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    hook: Mutex<Option<Hook>>,
    changed: watch::Sender<u64>,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// A world without servers.
    pub fn new() -> Self {
        let shared = Shared {
            state: Mutex::new(State::new()),
            hook: Mutex::new(None),
            changed: watch::Sender::new(0),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn look<T>(&self, f: impl FnOnce(&State) -> T) -> T {
        f(&self.state())
    }

    /// Changes the world, checks the invariants, sets the timers and wakes who waits.
    pub(crate) fn change<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let (result, due) = {
            let mut state = self.state();
            let result = f(&mut state);
            state.invariants();
            (result, std::mem::take(&mut state.due))
        };
        due.into_iter().for_each(|(after, due)| self.set_timer(after, due));
        self.shared.changed.send_modify(|n| *n += 1);
        result
    }

    fn set_timer(&self, after: Duration, due: Due) {
        let world = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            world.change(|s| s.fire(due));
        });
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    pub(crate) fn hook(&self) -> Option<Hook> {
        self.shared.hook.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A request is on its way for a moment; that of a dead controller never arrives.
    pub(crate) async fn on_the_way(&self, controller: &str, server: &str) {
        self.alive(controller).await;
        let request = self.look(|s| s.servers.get(server).map_or(s.record_request, |h| h.timing.request));
        tokio::time::sleep(request).await;
        self.alive(controller).await;
    }

    /// From now on requests to the store of records take that long to get there.
    pub fn slow_records(&self, request: Duration) {
        self.change(|s| s.record_request = request);
    }

    /// Never returns if the controller is dead.
    pub(crate) async fn alive(&self, controller: &str) {
        if self.is_dead(controller) {
            std::future::pending::<()>().await;
        }
    }

    pub(crate) fn count(&self, controller: &str, server: &str, what: &'static str) {
        let mut state = self.state();
        let reads = &mut state.controllers.entry(controller.to_owned()).or_default().reads;
        *reads.entry((server.to_owned(), what)).or_default() += 1;
    }

    /// That server as `controller` sees it. Several controllers may be connected; each has its own life.
    pub fn connect(&self, controller: &str, server: &str) -> SimServer {
        SimServer::new(self.clone(), controller, server)
    }

    /// The records as `controller` sees them.
    pub fn records(&self, controller: &str) -> MemoryRecords {
        MemoryRecords::new(self.clone(), controller)
    }

    /// Ends a controller: no call of it returns any more.
    pub fn kill(&self, controller: &str) {
        self.change(|s| {
            s.controllers.entry(controller.to_owned()).or_default().dead = true;
            s.note(controller, "-", "dies");
        });
    }

    /// Whether a controller is dead.
    pub fn is_dead(&self, controller: &str) -> bool {
        self.look(|s| s.controllers.get(controller).is_some_and(|c| c.dead))
    }

    /// Returns when the controller is dead.
    pub async fn died(&self, controller: &str) {
        let mut changes = self.changes();
        while !self.is_dead(controller) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Returns when `done` holds; looked at after every change of the world.
    pub async fn until(&self, done: impl Fn(&World) -> bool) {
        let mut changes = self.changes();
        while !done(self) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Returns when no server has a running operation.
    pub async fn settled(&self) {
        let idle = |s: &State| {
            let mut operations = s.servers.values().flat_map(|h| h.operations.values());
            !operations.any(|op| op.state == OperationState::Running)
        };
        self.until(|w| w.look(idle)).await;
    }

    /// What is asked before every write. It may change the world; what it returns happens to the write.
    pub fn set_hook(&self, hook: impl Fn(&World, &crate::faults::WriteInfo) -> Option<Fault> + Send + Sync + 'static) {
        *self.shared.hook.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(hook));
    }

    /// Nothing goes wrong any more.
    pub fn clear_hook(&self) {
        *self.shared.hook.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// `fault` at the `nth` write (from 0) of `controller`; replaces any other hook.
    pub fn fault_at(&self, controller: &str, nth: u64, fault: Fault) {
        let controller = controller.to_owned();
        self.set_hook(move |_, w| (w.controller == controller && w.nth == nth).then_some(fault));
    }

    /// The virtual wall clock.
    pub fn now(&self) -> Timestamp {
        self.look(State::now)
    }

    /// The first breach of an invariant since the world began, if there was one.
    pub fn check(&self) -> Result<(), Breach> {
        self.look(|s| s.breach.clone().map_or(Ok(()), Err))
    }

    /// Whether, by that record, every copy of the instance is one that nobody can start now.
    pub fn check_record(&self, record: &Record) -> Result<(), Breach> {
        let found = self.look(|s| s.startable_between_stop_and_commit(record));
        found.map_or(Ok(()), |(invariant, message)| {
            Err(Breach {
                invariant,
                message,
                log: Vec::new(),
            })
        })
    }

    /// Everything that happened.
    pub fn log(&self) -> Vec<Entry> {
        self.look(|s| s.log.clone())
    }

    /// The verbs of all writes to servers that had an effect (accepted, and their operation did not fail), in order, each
    /// with its server.
    pub fn effects(&self) -> Vec<(String, &'static str)> {
        let effect = |e: &Entry| {
            let (verb, done) = e.write?;
            (done && e.server != crate::records::STORE).then(|| (e.server.clone(), verb))
        };
        self.look(|s| s.log.iter().filter_map(effect).collect())
    }

    /// How many writes a controller has sent.
    pub fn writes(&self, controller: &str) -> u64 {
        self.look(|s| s.controllers.get(controller).map_or(0, |c| c.writes))
    }

    /// How often a controller read what from which server.
    pub fn reads(&self, controller: &str) -> BTreeMap<(String, &'static str), u64> {
        self.look(|s| {
            s.controllers
                .get(controller)
                .map(|c| c.reads.clone())
                .unwrap_or_default()
        })
    }

    /// The fingerprint of a server's certificate.
    pub fn fingerprint(&self, server: &str) -> String {
        self.look(|s| s.servers.get(server).map(|h| h.fingerprint.clone()).unwrap_or_default())
    }

    /// An instance as its server lists it.
    pub fn instance(&self, server: &str, at: &InstanceRef) -> Option<Instance> {
        self.look(|s| {
            let host = s.servers.get(server)?;
            host.instances.get(at).map(|i| view::instance(host, at, i))
        })
    }

    /// All instances of a server.
    pub fn instances(&self, server: &str) -> Vec<Instance> {
        self.look(|s| {
            let host = s.servers.get(server);
            host.map(|h| h.instances.iter().map(|(at, i)| view::instance(h, at, i)).collect())
                .unwrap_or_default()
        })
    }

    /// The snapshots of an instance, oldest first.
    pub fn snapshots(&self, server: &str, at: &InstanceRef) -> Vec<Snapshot> {
        let of = |s: &State| Some(view::snapshots(s.servers.get(server)?.instances.get(at)?));
        self.look(of).unwrap_or_default()
    }

    /// The version of an instance's data, if they are complete.
    pub fn data(&self, server: &str, at: &InstanceRef) -> Option<u64> {
        self.look(|s| {
            let i = s.servers.get(server)?.instances.get(at)?;
            (i.content == Content::Complete).then_some(i.data)
        })
    }

    /// The version of an instance's data, if they are those of one instant: enough to start a copy from.
    pub fn copied_data(&self, server: &str, at: &InstanceRef) -> Option<u64> {
        self.look(|s| {
            let i = s.servers.get(server)?.instances.get(at)?;
            matches!(i.content, Content::Complete | Content::OfAnInstant).then_some(i.data)
        })
    }

    /// The newest version of the data of that identity.
    pub fn newest(&self, uuid: &str) -> Option<u64> {
        self.look(|s| s.newest.get(uuid).copied())
    }

    /// A record as it is stored.
    pub fn record(&self, namespace: &str, name: &str) -> Option<Record> {
        self.look(|s| s.records.get(&(namespace.to_owned(), name.to_owned())).cloned())
    }

    /// All records.
    pub fn all_records(&self) -> Vec<Record> {
        self.look(|s| s.records.values().cloned().collect())
    }
}
