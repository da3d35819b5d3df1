//! What every request tells its observer: enough for metrics, limits and "requests per instance" counts.
//! No paths, names or bodies: those are for the trace, and secrets are for nobody.

use std::sync::Arc;
use std::time::Duration;

/// Called once per request sent to a server, after its end.
pub type Observer = Arc<dyn Fn(RequestRecord) + Send + Sync>;

/// One request that was sent, or that could not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestRecord {
    /// The HTTP method.
    pub method: &'static str,
    /// What kind of request it was.
    pub class: RequestClass,
    /// The HTTP status; `None` where no answer came.
    pub status: Option<u16>,
    /// From the first byte sent to the last byte received.
    pub duration: Duration,
    /// Bytes of the answer's body.
    pub bytes: u64,
}

/// The kinds of requests, as labels for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RequestClass {
    /// The server itself, projects, pools, profiles, networks, members.
    Facts,
    /// The list of all instances.
    Inventory,
    /// One instance.
    Instance,
    /// The snapshots of one instance.
    Snapshots,
    /// State of one instance.
    State,
    /// A look inside a running container: a program that is run, a file that is read.
    Inside,
    /// The list of operations.
    Operations,
    /// A merging change of an instance.
    Patch,
    /// A replacing change of an instance.
    Put,
    /// Start, stop.
    Power,
    /// A new snapshot.
    Snapshot,
    /// The end of a snapshot.
    RemoveSnapshot,
    /// The source's end of a migration.
    Offer,
    /// The target's end of a migration.
    Accept,
    /// A channel of a transfer that goes through this process.
    Channel,
    /// Making or deleting a backup.
    Backup,
    /// Fetching a backup.
    Export,
    /// Making an instance from a backup.
    Import,
    /// A move inside the server.
    Relocate,
    /// A new name.
    Rename,
    /// A deletion.
    Remove,
    /// Waiting for an operation, or a look at it.
    Wait,
    /// Cancelling an operation.
    Cancel,
    /// The event stream.
    Events,
    /// Joining the trust store.
    Trust,
}

impl RequestClass {
    /// The label.
    pub fn as_str(self) -> &'static str {
        match self {
            RequestClass::Facts => "facts",
            RequestClass::Inventory => "inventory",
            RequestClass::Instance => "instance",
            RequestClass::Snapshots => "snapshots",
            RequestClass::State => "state",
            RequestClass::Inside => "inside",
            RequestClass::Operations => "operations",
            RequestClass::Patch => "patch",
            RequestClass::Put => "put",
            RequestClass::Power => "power",
            RequestClass::Snapshot => "snapshot",
            RequestClass::RemoveSnapshot => "remove-snapshot",
            RequestClass::Offer => "offer",
            RequestClass::Accept => "accept",
            RequestClass::Channel => "channel",
            RequestClass::Backup => "backup",
            RequestClass::Export => "export",
            RequestClass::Import => "import",
            RequestClass::Relocate => "relocate",
            RequestClass::Rename => "rename",
            RequestClass::Remove => "remove",
            RequestClass::Wait => "wait",
            RequestClass::Cancel => "cancel",
            RequestClass::Events => "events",
            RequestClass::Trust => "trust",
        }
    }
}
