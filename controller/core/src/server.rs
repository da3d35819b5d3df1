//! The port to one Incus or LXD server (or cluster): what the decisions need, and no more. One implementor speaks HTTP,
//! one is simulated. Every call returns quickly but [`Server::wait`]; long work is an operation.

use std::collections::BTreeMap;
use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use futures::Sink;
use futures::stream::BoxStream;
use jiff::Timestamp;
use secrecy::SecretString;

use crate::model::{Change, Definition, Fresh, Inside, Instance, InstanceKind, InstanceRef, ServerFacts, Snapshot};

/// Result of a call to a server.
pub type Result<T> = std::result::Result<T, ServerError>;

/// What kind of failure a call to a server had: what the decisions branch on (never on the message).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FailureKind {
    /// The thing does not exist.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// `If-Match` did not match: somebody else changed it meanwhile.
    Changed,
    /// The server is doing something else with the instance.
    Busy,
    /// The server understood and will not do it.
    Refused,
    /// The server would do it only if the instance did not run.
    Running,
    /// The server does not trust our certificate, or it may not do this.
    NotTrusted,
    /// The server's certificate is not the pinned one.
    CertificateMismatch,
    /// No connection: the request was not carried out.
    Unreachable,
    /// The connection was lost or a deadline passed: it may or may not have been carried out.
    Unknown,
    /// The answer was not understood.
    Protocol,
    /// One server does not reach the other, where it says that it is.
    PeerUnreachable,
    /// The controller's own folder for backups on their way has no room.
    ScratchFull,
}

/// A failed call: what was attempted on what, and what the server said.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{attempted}: {message}")]
pub struct ServerError {
    /// The kind.
    pub kind: FailureKind,
    /// What was attempted on what, for example `stop shop/web-1 on rack-a`.
    pub attempted: String,
    /// The server's own words, or ours where it had none. Never a secret.
    pub message: String,
}

impl ServerError {
    /// A failure of `kind` while `attempted`, with the server's `message`.
    pub fn new(kind: FailureKind, attempted: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            kind,
            attempted: attempted.into(),
            message: message.into(),
        }
    }

    /// Whether the daemon or the link failed, rather than the request being refused.
    pub fn is_transient(&self) -> bool {
        matches!(
            self.kind,
            FailureKind::Unreachable | FailureKind::Unknown | FailureKind::Busy | FailureKind::Changed
        )
    }
}

/// Id of a background operation on one server.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OperationId(pub String);

impl fmt::Display for OperationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a background operation stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OperationState {
    /// It runs.
    Running,
    /// It ended well.
    Succeeded,
    /// It ended badly, with the server's words.
    Failed(String),
    /// The server does not know it (any more): ended over five seconds ago, or lost with a restart.
    Gone,
}

/// One running operation in a server's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Its id.
    pub id: OperationId,
    /// The server's description (`Creating instance`, …).
    pub description: String,
    /// The instances it names.
    pub instances: Vec<InstanceRef>,
    /// Progress, as far as the server tells: bytes done so far and bytes per second.
    pub progress: Option<Progress>,
}

impl Operation {
    /// Whether CRIU is at work on the processes of a container that moves: both products have an operation for as long as
    /// it is, which does not say for which.
    pub fn is_dump(&self) -> bool {
        self.description.starts_with("Live-migrating")
    }
}

/// Progress of a transfer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes moved so far.
    pub bytes: i64,
    /// Bytes per second.
    pub bytes_per_second: i64,
    /// Percent, where the server tells it.
    pub percent: Option<i32>,
}

/// One end of a migration that waits for the other end: operation and secrets.
#[derive(Clone, Debug)]
pub struct Channel {
    /// The operation on the server that waits.
    pub operation: OperationId,
    /// The secrets by name (`control`, `fs`, `criu`). Credentials: never shown, never stored.
    pub secrets: BTreeMap<String, SecretString>,
}

/// One websocket of an end that waits. What one end says goes unchanged, whatever it is, to the socket of the same name
/// of the other end: pieces know nothing of frames or messages.
pub struct Socket {
    /// What that end says. Ends with its connection; an error is a connection that broke.
    pub incoming: BoxStream<'static, Result<Vec<u8>>>,
    /// What that end is told. Closing it tells that nothing follows.
    pub outgoing: Pin<Box<dyn Sink<Vec<u8>, Error = ServerError> + Send>>,
}

/// How one server reaches the end that waits on the other one.
#[derive(Clone, Debug)]
pub struct Peer {
    /// `https://host:port` under which the other server is reached.
    pub address: String,
    /// Its certificate, PEM.
    pub certificate: String,
    /// The waiting end.
    pub channel: Channel,
}

/// A backup on its way: bytes in order, any number at a time.
pub struct Data {
    /// How many bytes there are, if that is known.
    pub size: Option<u64>,
    /// The bytes. An error means that the rest does not come.
    pub bytes: BoxStream<'static, Result<Vec<u8>>>,
}

/// Which backup is fetched from a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Export {
    /// One that was made and is kept there, by its name.
    Kept(String),
    /// One that is made while it is fetched, and kept nowhere.
    Direct {
        /// Without snapshots.
        instance_only: bool,
    },
}

/// What is made from a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportRequest {
    /// Project and name of the copy.
    pub at: InstanceRef,
    /// Pool of its root disk.
    pub pool: Option<String>,
    /// Cluster member, or `@group`; `None` leaves it to the server.
    pub member: Option<String>,
}

/// What the source's end of a migration is to do.
#[derive(Clone, Debug)]
pub struct OfferRequest {
    /// Move the running state, too.
    pub live: bool,
    /// Leave the snapshots behind.
    pub instance_only: bool,
    /// Send the disk as it was in that snapshot, and no snapshots: the instance is not touched meanwhile.
    pub snapshot: Option<String>,
    /// `Some`: push to that peer. `None`: wait for a peer (pull, relay).
    pub push_to: Option<Peer>,
}

/// What the target's end of a migration is to do.
#[derive(Clone, Debug)]
pub struct AcceptRequest {
    /// Project and name of the copy.
    pub at: InstanceRef,
    /// Container or virtual machine.
    pub kind: InstanceKind,
    /// The whole definition of the copy.
    pub definition: Definition,
    /// Cluster member, or `@group`; `None` leaves it to the server.
    pub member: Option<String>,
    /// Receive the running state, too.
    pub live: bool,
    /// Without snapshots.
    pub instance_only: bool,
    /// Bring an existing copy up to date instead of making one.
    pub refresh: bool,
    /// With `refresh`: leave out snapshots that are older than the newest one of the copy
    /// ([`Capability::ExcludeOlder`](crate::model::Capability::ExcludeOlder)).
    pub exclude_older: bool,
    /// `Some`: pull from that peer. `None`: wait for a peer (push, relay).
    pub pull_from: Option<Peer>,
}

/// A move inside one server or cluster. Everything that is `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Relocation {
    /// Cluster member, or `@group`.
    pub member: Option<String>,
    /// Storage pool of the root disk.
    pub pool: Option<String>,
    /// Project.
    pub project: Option<String>,
    /// New name.
    pub name: Option<String>,
    /// Move the running state, too.
    pub live: bool,
    /// Leave the snapshots behind.
    pub instance_only: bool,
}

/// A change of power state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerAction {
    /// Start; with `stateful` from its saved state.
    Start {
        /// Resume the saved running state.
        stateful: bool,
    },
    /// Ask the guest to stop and wait that long (never zero: zero kills).
    Stop {
        /// How long the guest has.
        timeout: Duration,
    },
    /// Stop without asking the guest.
    ForceStop,
    /// Let a frozen guest go on.
    Unfreeze,
}

/// A hint from a server's event stream: something changed, look again. Never a fact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerEvent {
    /// Something about that instance changed.
    Instance {
        /// Which.
        at: InstanceRef,
        /// What, in the server's word (`instance-started`, …).
        action: String,
        /// Fingerprint of the certificate that asked for it, where the server tells.
        requestor: Option<String>,
    },
    /// An operation changed (progress, end).
    Operation(Operation, OperationState),
    /// Members, pools, projects, profiles or networks changed.
    Facts,
}

/// One server, or one cluster behind one address.
///
/// Writes are never retried here: the protocol decides what to do after a failure.
#[async_trait]
pub trait Server: Send + Sync {
    /// Everything the server is and has.
    async fn facts(&self) -> Result<ServerFacts>;
    /// All instances of all projects in one list.
    async fn inventory(&self) -> Result<Vec<Instance>>;
    /// One instance, read afresh; `None` if the server says that it does not exist.
    async fn instance(&self, at: &InstanceRef) -> Result<Option<Fresh>>;
    /// The snapshots of one instance, oldest first.
    async fn snapshots(&self, at: &InstanceRef) -> Result<Vec<Snapshot>>;
    /// Names of the backups of one instance that the server keeps.
    async fn backups(&self, at: &InstanceRef) -> Result<Vec<String>>;
    /// Names of the custom volumes of a pool that a project sees.
    async fn volumes(&self, pool: &str, project: &str) -> Result<Vec<String>>;
    /// Bytes that the instance's disk takes; `None` where its pool does not say.
    async fn size(&self, at: &InstanceRef) -> Result<Option<i64>>;
    /// What a running container shows of itself from inside.
    async fn inside(&self, at: &InstanceRef) -> Result<Inside>;
    /// Bytes that are free on a pool, of that cluster member; `None` where the server does not say.
    async fn free_space(&self, pool: &str, member: Option<&str>) -> Result<Option<i64>>;
    /// The operations that run now.
    async fn operations(&self) -> Result<Vec<Operation>>;
    /// Merges `change` into the instance if its entity tag still is `etag`.
    async fn patch(&self, at: &InstanceRef, change: &Change, etag: &str) -> Result<()>;
    /// Replaces the instance's definition if its entity tag still is `etag`; returns when it is done.
    async fn put(&self, at: &InstanceRef, definition: &Definition, etag: &str) -> Result<()>;
    /// Asks for a power state.
    async fn set_power(&self, at: &InstanceRef, action: PowerAction) -> Result<OperationId>;
    /// Takes a snapshot of the disk; with `expires_at` the server deletes it then.
    async fn snapshot(&self, at: &InstanceRef, name: &str, expires_at: Option<Timestamp>) -> Result<OperationId>;
    /// Deletes a snapshot.
    async fn remove_snapshot(&self, at: &InstanceRef, name: &str) -> Result<OperationId>;
    /// Opens the source's end of a migration.
    async fn offer(&self, at: &InstanceRef, request: &OfferRequest) -> Result<Channel>;
    /// Opens the target's end of a migration.
    async fn accept(&self, request: &AcceptRequest) -> Result<Channel>;
    /// Connects to the end that waits with that operation, by one of its secrets (the channel `name`).
    async fn connect(&self, waiting: &Channel, name: &str) -> Result<Socket>;
    /// Makes a backup of that name of a stopped instance; the server deletes it by itself after `keep`.
    async fn back_up(&self, at: &InstanceRef, name: &str, instance_only: bool, keep: Duration) -> Result<OperationId>;
    /// Fetches a backup.
    async fn export(&self, at: &InstanceRef, what: &Export) -> Result<Data>;
    /// Deletes a backup that is kept on the server.
    async fn drop_backup(&self, at: &InstanceRef, name: &str) -> Result<OperationId>;
    /// Makes an instance from a backup.
    async fn import(&self, request: &ImportRequest, data: Data) -> Result<OperationId>;
    /// Moves an instance inside the server or cluster.
    async fn relocate(&self, at: &InstanceRef, to: &Relocation) -> Result<OperationId>;
    /// Renames a stopped instance.
    async fn rename(&self, at: &InstanceRef, name: &str) -> Result<OperationId>;
    /// Deletes a stopped instance.
    async fn remove(&self, at: &InstanceRef) -> Result<OperationId>;
    /// Waits at most `timeout` for the end of an operation.
    async fn wait(&self, operation: &OperationId, timeout: Duration) -> Result<OperationState>;
    /// Cancels an operation.
    async fn cancel(&self, operation: &OperationId) -> Result<()>;
    /// The event stream; ends when the connection does.
    async fn events(&self) -> Result<BoxStream<'static, ServerEvent>>;
}
