//! Runs the move protocol: knows the servers, asks berth-core what to do, does it, and keeps the limits. It knows neither
//! Kubernetes nor files (the records are a port) and decides nothing that is not about resources of its own.
//!
//! | module | what it does |
//! |---|---|
//! | [`Engine`] | one placement after the other: open move or plan, record, drive, status |
//! | `in_place`, `power`, `adapt` | what is done without a move: stale marks, power state, configuration |
//! | `copies` | one InstanceCopy after the other: look, step, record, effect |
//! | `sweep` | copies that late requests left behind |
//! | `insides` | what containers that are about to be moved live show of themselves |
//! | `sizes` | how large instances are that are about to be moved |
//! | `book`, `placements` | what is remembered of records and placements: slots, claims, whom a change concerns |
//! | [`registry`] | the servers by namespace and name; those of one fingerprint share inventory and limits |
//! | [`inventory`], `primaries` | follows one server: events first, then facts and one list, then only what changed |
//! | [`drive`] | passes over one open move: read, step, write the record, effect |
//! | `freeze` | how long a guest stands still while its server works on it |
//! | `backup` | brings a backup from one end to the other, by way of a [`Scratch`] |
//! | `relay` | passes on what both ends of a transfer say |
//! | `tasks`, `transfer` | carries out effects in the background and keeps each outcome until a step has seen it |
//! | `ways` | which way of the data worked between which servers |
//! | `happenings` | what is worth telling people once |
//!
//! Whoever wires it up: gives the servers to [`Engine::registry`] (the same `Arc` as long as the connection is the same),
//! tells of every placement ([`Engine::placement_seen`]) and loads all records ([`Engine::load`]) before the first
//! [`Engine::reconcile`], follows [`Engine::changes`] and looks again at whom [`Engine::concerned`] names, tells of records
//! that others changed, calls [`Engine::drive_orphans`] for namespaces with moves whose placement is gone, and
//! [`Engine::sweep`] now and then. One pass per placement at a time.
#![deny(missing_docs)]

mod adapt;
mod backup;
mod book;
mod contents;
mod copies;
mod dirty;
pub mod drive;
mod engine;
mod freeze;
mod happenings;
mod in_place;
pub mod insides;
mod inventory;
mod kept;
mod placements;
mod power;
mod primaries;
pub mod registry;
mod relay;
mod sizes;
mod strangers;
mod sweep;
mod tasks;
mod transfer;
mod ways;

pub use backup::Scratch;
pub use copies::{CopyPass, Tell};
pub use engine::{Engine, Pass, Report};
pub use happenings::{Happening, of_status};
pub use sweep::Leftover;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use berth_core::model::InstanceRef;
use jiff::Timestamp;

/// The clock: the system's, or a virtual one in tests (all sleeping is tokio's).
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;
/// A yes or no of the world outside, asked whenever it matters.
pub type Question = Arc<dyn Fn() -> bool + Send + Sync>;

/// What the engine needs to know of the process that it runs in.
#[derive(Clone)]
pub struct Env {
    /// The time.
    pub clock: Clock,
    /// Whether this process may write records and ask servers for changes at all.
    pub may_act: Question,
    /// Whether the lease holds long enough for requests without a precondition.
    pub lease_is_safe: Question,
    /// Where backups are kept on their way, if anywhere.
    pub scratch: Option<Arc<dyn Scratch>>,
}

impl Env {
    /// The time now.
    pub fn now(&self) -> Timestamp {
        (self.clock)()
    }

    fn may_act(&self) -> bool {
        (self.may_act)()
    }

    fn lease_is_safe(&self) -> bool {
        (self.lease_is_safe)()
    }
}

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl Key {
    /// Namespace and name as one key.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A hint that something is not as it was. Never a fact: look again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Reachability, facts or many instances of a server.
    Server {
        /// The InstanceServer.
        key: Key,
        /// The server behind it, if it ever answered.
        fingerprint: Option<String>,
    },
    /// One instance.
    Instance {
        /// The server that has, or had, it.
        fingerprint: String,
        /// Where.
        at: InstanceRef,
        /// Its `volatile.uuid`, if it was or is known.
        uuid: Option<String>,
    },
    /// An effect of a move ended.
    Move {
        /// The record.
        record: Key,
    },
    /// Something that a placement waits for: a slot, or another placement's claim.
    Placement {
        /// The placement.
        key: Key,
    },
}

/// Where hints are sent to and taken from. A receiver that lags behind looks at everything again.
pub type Changes = tokio::sync::broadcast::Sender<Change>;

/// A poisoned lock only means that another thread panicked; the data are plain values.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
