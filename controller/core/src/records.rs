//! The port to the durable records of moves: one `InstanceMove` each. Kubernetes, a folder, or memory.

use async_trait::async_trait;
use berth_api::{InstanceMoveSpec, InstanceMoveStatus};

/// One move: its plan, which never changes, and how far it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Namespace of the placement and its servers.
    pub namespace: String,
    /// Name of the record; also the move id in the marks.
    pub name: String,
    /// Version for compare-and-swap, opaque.
    pub version: String,
    /// Whether somebody asked for the record itself to be deleted.
    pub deleting: bool,
    /// The plan that was decided.
    pub spec: InstanceMoveSpec,
    /// How far it is.
    pub status: InstanceMoveStatus,
}

impl Record {
    /// Whether the move is over.
    pub fn finished(&self) -> bool {
        self.status.outcome.is_some()
    }
}

/// Why a record could not be read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Somebody else wrote meanwhile, or the name exists: look again.
    #[error("{0} was changed by another controller")]
    Conflict(String),
    /// The record is gone.
    #[error("{0} does not exist")]
    NotFound(String),
    /// The store does not answer or refuses.
    #[error("{0}")]
    Unavailable(String),
}

/// Durable records of moves.
#[async_trait]
pub trait Records: Send + Sync {
    /// All records of one namespace, uncached.
    async fn list(&self, namespace: &str) -> Result<Vec<Record>, RecordError>;
    /// One record, uncached.
    async fn load(&self, namespace: &str, name: &str) -> Result<Record, RecordError>;
    /// Creates a record; fails with `Conflict` if the name exists.
    async fn create(&self, record: &Record) -> Result<Record, RecordError>;
    /// Writes the status if the stored version still is `record.version`; returns the record with its new version.
    async fn swap(&self, record: &Record) -> Result<Record, RecordError>;
    /// Keeps everything the move needs (record, placement, both servers) from vanishing until it is over; returns the record
    /// with its new version. Idempotent.
    async fn hold(&self, record: &Record) -> Result<Record, RecordError>;
}
