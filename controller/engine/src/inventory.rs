//! Follows one server: subscribes to its events, then reads facts and one bulk list, and from then on reads only the
//! instances that events name. At rest the only request is the list at every `interval`. Nothing is decided here.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use berth_api::Reason;
use berth_core::model::{Fresh, Instance, InstanceRef, Inventory, ServerFacts};
use berth_core::plan::Reach;
use berth_core::server::{FailureKind, Operation, OperationState, Server, ServerError, ServerEvent};
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{BoxStream, FuturesUnordered, StreamExt};
use jiff::Timestamp;
use tokio::sync::{Notify, broadcast, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::dirty::Dirty;
use crate::primaries::Primaries;
use crate::{Change, Changes, Clock, Key, lock};

/// First pause before a server that does not answer is tried again.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A connection that held for so long counts as good: the next pause is short again.
const HELD: Duration = Duration::from_secs(30);
/// How long changes of facts are gathered before everything is read anew.
const GATHER: Duration = Duration::from_millis(250);
/// More changed instances than this are cheaper to list than to read.
const READ_MAX: usize = 64;
/// Reads of single instances at a time.
const READS: usize = 8;
/// More differences than this between two lists are one hint for the whole server.
const HINTS_MAX: usize = 128;

/// Lifecycle actions that change what is known of an instance. All others (exec, console, snapshots, backups, logs) are
/// noise.
const ACTIONS: [&str; 13] = [
    "instance-created",
    "instance-deleted",
    "instance-renamed",
    "instance-started",
    "instance-stopped",
    "instance-shutdown",
    "instance-restarted",
    "instance-paused",
    "instance-resumed",
    "instance-ready",
    "instance-updated",
    "instance-migrated",
    "instance-restored",
];

/// What is known of a server now. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Whether it answers.
    pub reach: Reach,
    /// What it is; kept while it does not answer.
    pub facts: Option<Arc<ServerFacts>>,
    /// Its instances, once they were listed; kept while it does not answer.
    pub instances: Option<Inventory>,
}

/// A stop that somebody asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stop {
    /// Fingerprint of the certificate.
    pub requestor: String,
    /// When it was told.
    pub at: Timestamp,
}

/// An operation's progress or end, as the event stream told it.
pub type OperationEvent = (Operation, OperationState);

/// Keeps the knowledge of one server current, in a task of its own that ends with this value.
pub struct Follower {
    inner: Arc<Inner>,
    task: tokio::task::AbortHandle,
}

pub(crate) struct Inner {
    key: Key,
    clock: Clock,
    changes: Changes,
    primaries: Arc<Primaries>,
    interval: AtomicU64,
    server: Mutex<(Arc<dyn Server>, Option<String>)>,
    seen: Mutex<Seen>,
    /// The follower of the same server that this one leaves the work to.
    follows: Mutex<Weak<Inner>>,
    stops: Mutex<HashMap<InstanceRef, Stop>>,
    dirty: Dirty,
    /// Ends a session or a pause: everything is looked at again.
    restart: Notify,
    operations: broadcast::Sender<OperationEvent>,
}

/// What a follower is started with.
pub(crate) struct Start {
    pub key: Key,
    pub server: Arc<dyn Server>,
    pub identity: Option<String>,
    pub interval: Duration,
    pub clock: Clock,
    pub changes: Changes,
    pub primaries: Arc<Primaries>,
}

impl Follower {
    pub(crate) fn start(start: Start) -> Self {
        let inner = Arc::new(Inner {
            key: start.key,
            clock: start.clock,
            changes: start.changes,
            primaries: start.primaries,
            interval: AtomicU64::new(millis(start.interval)),
            server: Mutex::new((start.server, start.identity)),
            seen: Mutex::new(Seen {
                reach: Reach::Connecting,
                facts: None,
                instances: None,
            }),
            follows: Mutex::new(Weak::new()),
            stops: Mutex::default(),
            dirty: Dirty::default(),
            restart: Notify::new(),
            operations: broadcast::channel(256).0,
        });
        let task = tokio::spawn(run(inner.clone())).abort_handle();
        Self { inner, task }
    }

    /// What is known now.
    pub fn seen(&self) -> Seen {
        self.inner.seen()
    }

    /// The server itself, for requests.
    pub fn server(&self) -> Arc<dyn Server> {
        lock(&self.inner.server).0.clone()
    }

    /// Goes on with another connection to the same server (other credentials or addresses); what is known is kept.
    pub(crate) fn replace(&self, server: Arc<dyn Server>, identity: Option<String>) {
        *lock(&self.inner.server) = (server, identity);
        self.inner.restart.notify_one();
    }

    pub(crate) fn set_interval(&self, interval: Duration) {
        self.inner.interval.store(millis(interval), Ordering::Relaxed);
    }

    /// A request failed for want of an answer: the connection is made anew and everything is looked at again.
    pub fn suspect(&self, error: &ServerError) {
        if matches!(self.inner.own_reach(), Reach::Ready) {
            self.inner.down(error);
            self.inner.restart.notify_one();
        }
    }

    /// Somebody waits for this server: if it is down, it is tried again now and not after the pause.
    pub fn retry_now(&self) {
        if matches!(self.inner.own_reach(), Reach::Down { .. }) {
            self.inner.restart.notify_one();
        }
    }

    /// Progress and ends of operations from now on.
    pub fn operations(&self) -> broadcast::Receiver<OperationEvent> {
        self.inner.working().operations.subscribe()
    }

    /// Reads an instance for whoever acts on it; what is found is known to everybody.
    pub(crate) async fn read(&self, at: &InstanceRef) -> Result<Option<Fresh>, ServerError> {
        let began = Instant::now();
        let fresh = self.server().instance(at).await?;
        self.learn(at, fresh.clone(), began);
        Ok(fresh)
    }

    /// Takes over what somebody else has read of the server since `began`: events from before that need no other read.
    pub(crate) fn learn(&self, at: &InstanceRef, fresh: Option<Fresh>, began: Instant) {
        let inner = self.inner.working();
        inner.dirty.read(at, began);
        inner.read(at, fresh);
    }

    /// Who asked for the last stop of an instance that is still stopped, if the server told.
    pub(crate) fn stopped_by(&self, at: &InstanceRef) -> Option<Stop> {
        lock(&self.inner.working().stops).get(at).cloned()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
        self.inner.primaries.release(&self.inner);
    }
}

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

/// `interval`, give or take a tenth, so that servers are not all listed at once.
fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(0.9 + 0.2 * rand::random::<f64>())
}

impl Inner {
    /// The follower that does the work for this server: itself, or the one it leaves it to.
    fn working(self: &Arc<Self>) -> Arc<Self> {
        lock(&self.follows).upgrade().unwrap_or_else(|| self.clone())
    }

    fn seen(self: &Arc<Self>) -> Seen {
        lock(&self.working().seen).clone()
    }

    fn own_reach(&self) -> Reach {
        lock(&self.seen).reach.clone()
    }

    fn fingerprint(&self) -> Option<String> {
        lock(&self.seen).facts.as_ref().map(|f| f.fingerprint.clone())
    }

    fn say_server_changed(&self) {
        let fingerprint = self.fingerprint();
        // nobody listening is no failure
        let _ = self.changes.send(Change::Server {
            key: self.key.clone(),
            fingerprint,
        });
    }

    fn say_instance_changed(&self, at: &InstanceRef, uuid: Option<&str>) {
        if let Some(fingerprint) = self.fingerprint() {
            let _ = self.changes.send(Change::Instance {
                fingerprint,
                at: at.clone(),
                uuid: uuid.map(str::to_owned),
            });
        }
    }

    fn down(&self, error: &ServerError) {
        let reach = Reach::Down {
            reason: reason(error.kind),
            message: error.to_string(),
            since: (self.clock)(),
        };
        let changed = {
            let mut seen = lock(&self.seen);
            match (&mut seen.reach, reach) {
                (
                    Reach::Down { reason, message, .. },
                    Reach::Down {
                        reason: r, message: m, ..
                    },
                ) => {
                    let changed = *reason != r;
                    (*reason, *message) = (r, m);
                    changed
                }
                (old, new) => {
                    *old = new;
                    true
                }
            }
        };
        if changed {
            tracing::info!(server = %self.key, error = %error, "server does not answer");
            self.say_server_changed();
        }
    }

    /// Takes over a whole look at the server; says what differs from the last one.
    fn looked(&self, facts: ServerFacts, list: Vec<Instance>) {
        let list: Inventory = list.into_iter().collect();
        let (server_changed, differences) = {
            let mut seen = lock(&self.seen);
            let same_facts = seen.facts.as_deref() == Some(&facts);
            let differences = seen.instances.as_ref().map(|old| differences(old, &list));
            let server_changed = seen.reach != Reach::Ready || !same_facts || differences.is_none();
            seen.reach = Reach::Ready;
            if !same_facts {
                seen.facts = Some(Arc::new(facts));
            }
            if differences.as_ref().is_none_or(|d| !d.is_empty()) {
                seen.instances = Some(list);
            }
            (server_changed, differences.unwrap_or_default())
        };
        if server_changed || differences.len() > HINTS_MAX {
            self.say_server_changed();
        }
        if differences.len() <= HINTS_MAX {
            for (at, uuid) in differences {
                self.say_instance_changed(&at, uuid.as_deref());
            }
        }
    }

    fn read(&self, at: &InstanceRef, fresh: Option<Fresh>) {
        let uuid = {
            let mut seen = lock(&self.seen);
            let Some(instances) = seen.instances.as_mut() else {
                return;
            };
            let old = instances.get(at).cloned();
            let new = fresh.map(|f| f.instance);
            if old.as_deref() == new.as_ref() {
                return;
            }
            let uuid = new
                .as_ref()
                .or(old.as_deref())
                .and_then(Instance::uuid)
                .map(str::to_owned);
            match new {
                Some(instance) => instances.insert(instance),
                None => instances.remove(at),
            }
            uuid
        };
        self.say_instance_changed(at, uuid.as_deref());
    }

    fn note_stop(&self, at: &InstanceRef, action: &str, requestor: Option<String>) {
        let mut stops = lock(&self.stops);
        match (action, requestor) {
            ("instance-stopped" | "instance-shutdown", Some(who)) => {
                let (requestor, told) = (who, (self.clock)());
                stops.insert(at.clone(), Stop { requestor, at: told });
            }
            ("instance-stopped" | "instance-shutdown" | "instance-started" | "instance-deleted", _) => {
                stops.remove(at);
            }
            _ => {}
        }
    }
}

/// The reason of the server's Ready condition.
pub(crate) fn reason(kind: FailureKind) -> Reason {
    match kind {
        FailureKind::CertificateMismatch => Reason::CertificateMismatch,
        FailureKind::NotTrusted => Reason::NotTrusted,
        FailureKind::Protocol | FailureKind::PeerUnreachable | FailureKind::ScratchFull => Reason::UnsupportedServer,
        FailureKind::Unreachable
        | FailureKind::Unknown
        | FailureKind::Busy
        | FailureKind::Changed
        | FailureKind::NotFound
        | FailureKind::AlreadyExists
        | FailureKind::Refused
        | FailureKind::Running => Reason::Unreachable,
    }
}

fn differences(old: &Inventory, new: &Inventory) -> Vec<(InstanceRef, Option<String>)> {
    let gone = old.iter().filter(|i| new.get(&i.at).is_none());
    let changed = new.iter().filter(|i| old.get(&i.at) != Some(*i));
    gone.chain(changed)
        .map(|i| (i.at.clone(), i.uuid().map(str::to_owned)))
        .collect()
}

/// Why a session with a server ended.
enum End {
    Failed(ServerError),
    StreamEnded,
    Restart,
    Leave(Arc<Inner>),
}

async fn run(inner: Arc<Inner>) {
    let mut primaries = inner.primaries.subscribe();
    let mut pause = PAUSE;
    loop {
        let _ = inner.restart.notified().now_or_never();
        primaries.mark_unchanged();
        let began = Instant::now();
        let end = Session::run(&inner).await;
        if began.elapsed() >= HELD {
            pause = PAUSE;
        }
        match end {
            End::Restart => continue,
            End::Leave(primary) => {
                follow(&inner, primary, &mut primaries).await;
                continue;
            }
            End::Failed(error) => inner.down(&error),
            // most often a restart of the daemon: what is known holds until the next attempt fails
            End::StreamEnded if pause == PAUSE => {}
            End::StreamEnded => inner.down(&ServerError::new(
                FailureKind::Unreachable,
                format!("follow the events of {}", inner.key.name),
                "the server ends the event stream again and again",
            )),
        }
        tokio::select! {
            () = sleep(jittered(pause)) => pause = (pause * 2).min(PAUSE_MAX),
            () = inner.restart.notified() => {}
        }
    }
}

/// Leaves the work to the other follower of the same server until that one ends.
async fn follow(inner: &Arc<Inner>, primary: Arc<Inner>, primaries: &mut watch::Receiver<u64>) {
    *lock(&inner.follows) = Arc::downgrade(&primary);
    inner.say_server_changed();
    drop(primary);
    tokio::select! {
        // an error means that the registry is gone, and this task with it
        _ = primaries.changed() => {}
        () = inner.restart.notified() => {}
    }
    *lock(&inner.follows) = Weak::new();
}

type Read = (InstanceRef, Result<Option<Fresh>, ServerError>);
type Look = Result<(ServerFacts, Vec<Instance>), ServerError>;

/// One connection to a server, from the subscription to its end.
struct Session<'a> {
    inner: &'a Arc<Inner>,
    server: Arc<dyn Server>,
    identity: Option<String>,
    /// Instances being read; `true`: changed again meanwhile.
    reading: BTreeMap<InstanceRef, bool>,
    reads: FuturesUnordered<BoxFuture<'static, Read>>,
    /// The look at everything that is under way, and what changed since it began.
    look: Option<BoxFuture<'static, Look>>,
    since_look: BTreeSet<InstanceRef>,
    next_look: Instant,
}

impl Session<'_> {
    async fn run(inner: &Arc<Inner>) -> End {
        let (server, identity) = lock(&inner.server).clone();
        let events = tokio::select! {
            events = server.events() => events,
            () = inner.restart.notified() => return End::Restart,
        };
        let events = match events {
            Ok(events) => events,
            Err(error) => return End::Failed(error),
        };
        inner.dirty.clear();
        let session = Session {
            inner,
            server,
            identity,
            reading: BTreeMap::new(),
            reads: FuturesUnordered::new(),
            look: None,
            since_look: BTreeSet::new(),
            next_look: Instant::now(),
        };
        session.follow(events).await
    }

    async fn follow(mut self, mut events: BoxStream<'static, ServerEvent>) -> End {
        loop {
            self.begin();
            let (looking, due) = (self.look.is_some(), self.due());
            tokio::select! {
                biased;
                () = self.inner.restart.notified() => return End::Restart,
                event = events.next() => match event {
                    Some(event) => self.take(event),
                    None => return End::StreamEnded,
                },
                Some(read) = self.reads.next(), if !self.reads.is_empty() => {
                    if let Err(error) = self.took_read(read) {
                        return End::Failed(error);
                    }
                }
                look = poll_option(&mut self.look), if looking => {
                    self.look = None;
                    match look {
                        Ok((facts, list)) => if let Some(primary) = self.took_look(facts, list) {
                            return End::Leave(primary);
                        },
                        Err(error) => return End::Failed(error),
                    }
                }
                () = sleep_until(due), if !looking => {}
            }
        }
    }

    /// When something is due that no event begins.
    fn due(&self) -> Instant {
        let read = self.inner.dirty.due().filter(|_| self.reads.len() < READS);
        read.map_or(self.next_look, |read| read.min(self.next_look))
    }

    /// Starts what is due: a look at everything, or reads of single instances.
    fn begin(&mut self) {
        let now = Instant::now();
        let dirty = &self.inner.dirty;
        if self.look.is_none() && (now >= self.next_look || dirty.count() > READ_MAX) {
            self.since_look.clear();
            dirty.clear();
            let server = self.server.clone();
            self.look = Some(
                async move {
                    let (facts, list) = futures::future::join(server.facts(), server.inventory()).await;
                    Ok((facts?, list?))
                }
                .boxed(),
            );
        }
        if self.look.is_some() {
            return;
        }
        while self.reads.len() < READS {
            let Some(at) = dirty.take(now) else { return };
            let server = self.server.clone();
            self.reading.insert(at.clone(), false);
            self.reads.push(
                async move {
                    let fresh = server.instance(&at).await;
                    (at, fresh)
                }
                .boxed(),
            );
        }
    }

    fn take(&mut self, event: ServerEvent) {
        match event {
            ServerEvent::Instance { at, action, requestor } => {
                if !ACTIONS.contains(&action.as_str()) {
                    return;
                }
                self.inner.note_stop(&at, &action, requestor);
                self.since_look.insert(at.clone());
                match self.reading.get_mut(&at) {
                    Some(again) => *again = true,
                    None => self.inner.dirty.name(at, Instant::now()),
                }
            }
            // whether anybody listens does not matter
            ServerEvent::Operation(operation, state) => drop(self.inner.operations.send((operation, state))),
            ServerEvent::Facts => self.next_look = self.next_look.min(Instant::now() + GATHER),
        }
    }

    fn took_read(&mut self, (at, fresh): Read) -> Result<(), ServerError> {
        if self.reading.remove(&at) == Some(true) {
            self.inner.dirty.name(at.clone(), Instant::now());
        }
        match fresh {
            Ok(fresh) => self.inner.read(&at, fresh),
            Err(error) if matches!(error.kind, FailureKind::Unreachable | FailureKind::Unknown) => return Err(error),
            // it will be in the next list
            Err(error) => {
                tracing::debug!(server = %self.inner.key, error = %error, "instance cannot be read");
                self.next_look = self.next_look.min(Instant::now() + Duration::from_secs(5));
            }
        }
        Ok(())
    }

    /// Takes over a whole look; tells of another follower that already does this work.
    fn took_look(&mut self, facts: ServerFacts, list: Vec<Instance>) -> Option<Arc<Inner>> {
        let server = (facts.fingerprint.clone(), self.identity.clone());
        self.inner.looked(facts, list);
        if let Some(primary) = self.inner.primaries.claim(server, self.inner) {
            return Some(primary);
        }
        // the list may be older than what events told while it was under way
        for at in std::mem::take(&mut self.since_look) {
            self.inner.dirty.name(at, Instant::now());
        }
        let interval = Duration::from_millis(self.inner.interval.load(Ordering::Relaxed));
        self.next_look = Instant::now() + jittered(interval);
        None
    }
}

/// Polls the future in `look` in place, so that other branches may win without losing it.
async fn poll_option(look: &mut Option<BoxFuture<'static, Look>>) -> Look {
    match look {
        Some(future) => future.await,
        None => futures::future::pending().await,
    }
}
