//! The state behind the world's lock: servers, instances, operations, records, the log. Plain data and look-ups; what
//! happens to it is in the other modules.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use berth_core::copies::CopyRecord;
use berth_core::model::{
    Config, Devices, InstanceKind, InstanceRef, Member, Network, Pool, Power, Product, Profile, Project,
};
use berth_core::records::Record;
use berth_core::server::{FailureKind, OperationId, ServerError, ServerEvent};
use futures::channel::mpsc::UnboundedSender;
use jiff::Timestamp;
use tokio::time::Instant;

use crate::faults::{Entry, LateRequest};
use crate::invariants::Breach;
use crate::migrate::Transfer;
use crate::operations::{Due, Op};
use crate::options::{Guest, Timing};

/// Fingerprint of the certificate that all controllers use.
pub const CERTIFICATE: &str = "c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00";
/// 2026-01-05 00:00:00 UTC, a Monday.
const EPOCH: i64 = 1_767_571_200;

/// Result of anything that a server is asked.
pub(crate) type Answered<T> = Result<T, ServerError>;

pub(crate) struct State {
    pub started: Instant,
    pub servers: BTreeMap<String, Host>,
    pub records: BTreeMap<(String, String), Record>,
    /// What a request to the store of records takes to get there.
    pub record_request: Duration,
    pub copies: BTreeMap<(String, String), CopyRecord>,
    /// The newest version of the data of every identity that somebody has used.
    pub newest: BTreeMap<String, u64>,
    /// Names that anyone but a controller has used.
    pub foreign: BTreeSet<(String, InstanceRef)>,
    /// Servers that do not reach each other.
    pub apart: BTreeSet<(String, String)>,
    pub controllers: BTreeMap<String, Controller>,
    pub transfers: BTreeMap<u64, Transfer>,
    /// Backups that are being unpacked, by the instance that is made.
    pub imports: BTreeMap<u64, u64>,
    /// What backups hold, by number.
    pub backups: BTreeMap<u64, (Product, Inst)>,
    pub late: BTreeMap<u64, LateRequest>,
    /// While a late request is carried out: when it had been sent.
    pub late_since: Option<u64>,
    pub log: Vec<Entry>,
    pub breach: Option<Breach>,
    /// What is to happen later; the world turns it into timers.
    pub due: Vec<(Duration, Due)>,
    pub sequence: u64,
}

/// What is known of one controller.
#[derive(Default)]
pub(crate) struct Controller {
    pub dead: bool,
    pub writes: u64,
    pub reads: BTreeMap<(String, &'static str), u64>,
}

/// One server or cluster.
pub(crate) struct Host {
    pub name: String,
    pub product: Product,
    pub version: String,
    pub fingerprint: String,
    pub certificate: String,
    pub address: String,
    pub pid: i64,
    pub extensions: BTreeSet<String>,
    pub members: Vec<Member>,
    pub pools: Vec<Pool>,
    pub projects: Vec<Project>,
    pub profiles: Vec<Profile>,
    pub networks: Vec<Network>,
    pub criu: bool,
    pub timing: Timing,
    /// Whether the daemon runs.
    pub up: bool,
    /// Whether nobody reaches it.
    pub cut: bool,
    pub instances: BTreeMap<InstanceRef, Inst>,
    pub operations: BTreeMap<OperationId, Op>,
    pub listeners: Vec<UnboundedSender<ServerEvent>>,
    pub loses_events: bool,
}

/// One instance.
#[derive(Clone, Debug)]
pub(crate) struct Inst {
    /// Which creation this is: no two instances ever share it.
    pub born: u64,
    pub kind: InstanceKind,
    pub architecture: String,
    pub power: Power,
    pub config: Config,
    pub devices: Devices,
    pub profiles: Vec<String>,
    pub ephemeral: bool,
    pub stateful: bool,
    pub description: String,
    pub created_at: Timestamp,
    pub last_used_at: Timestamp,
    pub member: Option<String>,
    /// Where the root disk really is.
    pub pool: String,
    pub snapshots: Vec<Snap>,
    /// Backups that are kept, by name.
    pub backups: BTreeMap<String, u64>,
    /// Version of the data.
    pub data: u64,
    pub content: Content,
    /// Cannot be deleted any more (a half-made btrfs copy that was touched).
    pub undeletable: bool,
    /// What the daemon is doing with it.
    pub busy: Option<Busy>,
    pub guest: Guest,
    /// Resumed by a live migration whose source goes on, too.
    pub twin: bool,
    /// Its processes have ended with the restore of another copy, and the daemon has yet to notice.
    pub ending: bool,
    /// A live migration restores it with files that belong to nobody.
    pub breaks: bool,
    /// It was, so that it can neither write nor be worked with.
    pub nobodys: bool,
}

/// What the volume holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// All data of one instant.
    Complete,
    /// All data of one instant of a guest that ran: what a snapshot of it holds, too. A person may start from it; a move
    /// may not count on it.
    OfAnInstant,
    /// A mixture: copied from a source that was started meanwhile, or a refresh that broke off. It starts all the same.
    Mixed,
    /// A first copy that is not finished; it does not start.
    HalfMade,
}

/// What a daemon is doing with an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Busy {
    /// `start`, `stop`, `migrate`, `create`, `delete`.
    pub action: &'static str,
    /// `None`: a stop that timed out and whose lock stays until the guest is down.
    pub operation: Option<OperationId>,
}

/// One snapshot.
#[derive(Clone, Debug)]
pub(crate) struct Snap {
    pub name: String,
    pub created_at: Timestamp,
    pub config: Config,
    pub devices: Devices,
    /// Version of the data.
    pub data: u64,
}

impl Inst {
    /// A stopped instance without anything.
    pub fn new(born: u64, kind: InstanceKind, architecture: &str, created_at: Timestamp) -> Self {
        Self {
            born,
            kind,
            architecture: architecture.to_owned(),
            power: Power::Stopped,
            config: Config::new(),
            devices: Devices::new(),
            profiles: Vec::new(),
            ephemeral: false,
            stateful: false,
            description: String::new(),
            created_at,
            last_used_at: Timestamp::UNIX_EPOCH,
            member: None,
            pool: String::new(),
            snapshots: Vec::new(),
            backups: BTreeMap::new(),
            data: 0,
            content: Content::HalfMade,
            undeletable: false,
            busy: None,
            guest: Guest::Obeys,
            twin: false,
            ending: false,
            breaks: false,
            nobodys: false,
        }
    }

    pub fn uuid(&self) -> &str {
        self.config.get("volatile.uuid").map_or("", String::as_str)
    }

    pub fn runs(&self) -> bool {
        self.power != Power::Stopped
    }

    pub fn marked(&self) -> bool {
        [berth_core::marks::MOVE, berth_core::marks::COPY_OF]
            .iter()
            .any(|k| self.config.get(*k).is_some_and(|v| !v.is_empty()))
    }
}

impl Host {
    pub fn clustered(&self) -> bool {
        !self.members.is_empty()
    }

    pub fn project(&self, name: &str) -> Option<&Project> {
        self.projects.iter().find(|p| p.name == name)
    }

    pub fn driver(&self, pool: &str) -> &str {
        self.pools.iter().find(|p| p.name == pool).map_or("dir", |p| &p.driver)
    }

    pub fn born(&self, born: u64) -> Option<InstanceRef> {
        self.instances
            .iter()
            .find(|(_, i)| i.born == born)
            .map(|(at, _)| at.clone())
    }

    pub fn by_born(&mut self, born: u64) -> Option<&mut Inst> {
        self.instances.values_mut().find(|i| i.born == born)
    }

    pub fn reachable(&self) -> bool {
        self.up && !self.cut
    }

    pub fn has(&self, extension: &str) -> bool {
        self.extensions.contains(extension)
    }

    /// The profiles as `project` sees them.
    pub fn profile(&self, project: &str, name: &str) -> Option<&Profile> {
        let own = self.project(project).is_some_and(|p| p.feature("features.profiles"));
        let owner = if own { project } else { "default" };
        self.profiles.iter().find(|p| p.project == owner && p.name == name)
    }

    pub fn emit(&mut self, event: &ServerEvent) {
        if !self.loses_events {
            self.listeners.retain(|l| l.unbounded_send(event.clone()).is_ok());
        }
    }

    pub fn lifecycle(&mut self, at: &InstanceRef, action: &str, by: Option<&str>) {
        let event = ServerEvent::Instance {
            at: at.clone(),
            action: action.to_owned(),
            requestor: by.map(str::to_owned),
        };
        self.emit(&event);
    }
}

impl State {
    pub fn new() -> Self {
        Self {
            started: Instant::now(),
            servers: BTreeMap::new(),
            records: BTreeMap::new(),
            record_request: Duration::from_millis(1),
            copies: BTreeMap::new(),
            newest: BTreeMap::new(),
            foreign: BTreeSet::new(),
            apart: BTreeSet::new(),
            controllers: BTreeMap::new(),
            transfers: BTreeMap::new(),
            imports: BTreeMap::new(),
            backups: BTreeMap::new(),
            late: BTreeMap::new(),
            late_since: None,
            log: Vec::new(),
            breach: None,
            due: Vec::new(),
            sequence: 0,
        }
    }

    /// The virtual wall clock.
    pub fn now(&self) -> Timestamp {
        let elapsed = self.started.elapsed();
        let epoch = Timestamp::from_second(EPOCH).unwrap_or(Timestamp::UNIX_EPOCH);
        epoch
            .checked_add(jiff::SignedDuration::try_from(elapsed).unwrap_or_default())
            .unwrap_or(epoch)
    }

    /// The same, but never the same twice: real clocks have nanoseconds, a paused one stands still.
    pub fn moment(&mut self) -> Timestamp {
        let n = i64::try_from(self.next() % 1_000_000).unwrap_or(0);
        let now = self.now();
        now.checked_add(jiff::SignedDuration::from_nanos(n)).unwrap_or(now)
    }

    pub fn next(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// A text in the form of a uuid that was never used before.
    pub fn fresh_uuid(&mut self) -> String {
        format!("5a1d0000-0000-4000-8000-{:012x}", self.next())
    }

    pub fn host(&mut self, server: &str, attempted: &str) -> Answered<&mut Host> {
        let unknown = || ServerError::new(FailureKind::Unreachable, attempted, "no such server");
        self.servers.get_mut(server).ok_or_else(unknown)
    }

    pub fn inst(&mut self, server: &str, at: &InstanceRef, attempted: &str) -> Answered<&mut Inst> {
        let gone = || ServerError::new(FailureKind::NotFound, attempted, "Instance not found");
        self.host(server, attempted)?.instances.get_mut(at).ok_or_else(gone)
    }

    pub fn inst_by_born(&mut self, server: &str, born: u64) -> Option<&mut Inst> {
        self.servers.get_mut(server)?.by_born(born)
    }

    pub fn later(&mut self, after: Duration, due: Due) {
        self.due.push((after, due));
    }

    pub fn note(&mut self, who: &str, server: &str, what: impl Into<String>) {
        let at = self.now();
        self.log.push(Entry {
            at,
            who: who.to_owned(),
            server: server.to_owned(),
            what: what.into(),
            write: None,
            result: String::new(),
        });
    }
}
