//! The port to the durable records of copies: the InstanceCopies themselves, their status written by compare-and-swap.

use async_trait::async_trait;
use berth_api::{InstanceCopySpec, InstanceCopyStatus, Reason, conditions, present};

use super::Step;
use crate::records::RecordError;

/// One InstanceCopy: what is wanted, and how far it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CopyRecord {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Version for compare-and-swap, opaque.
    pub version: String,
    /// Its generation.
    pub generation: i64,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// Whether it is kept from vanishing.
    pub held: bool,
    /// The annotation `reconcile.fluxcd.io/requestedAt`.
    pub requested_at: Option<String>,
    /// What is wanted.
    pub spec: InstanceCopySpec,
    /// How far it is.
    pub status: InstanceCopyStatus,
}

impl CopyRecord {
    /// Name of the copy: the declared one, else that of the source.
    pub fn target_name<'a>(&'a self, source: &'a str) -> &'a str {
        present(&self.spec.target.name).unwrap_or(source)
    }

    /// Whether data are on their way onto the copy that there is. One that broke off and is tried again later does not
    /// count: nobody knows when its servers are back.
    pub fn refreshes(&self) -> bool {
        let work = self.status.current.as_ref();
        let sends = work.is_some_and(|w| w.refresh && w.sent && w.step == Step::Snapshotted.as_str());
        sends && conditions::reason(&self.status.conditions) == Some(Reason::Copying.as_str())
    }

    /// Whatever is written next was decided from the spec as it is.
    pub(super) fn observe(&mut self) {
        self.status.observed_generation = Some(self.generation);
        for condition in &mut self.status.conditions {
            condition.observed_generation = Some(self.generation);
        }
    }
}

/// Durable records of copies.
#[async_trait]
pub trait CopyRecords: Send + Sync {
    /// One record, uncached.
    async fn load(&self, namespace: &str, name: &str) -> Result<CopyRecord, RecordError>;
    /// Writes the status if the stored version still is `record.version`; returns the record with its new version.
    async fn swap(&self, record: &CopyRecord) -> Result<CopyRecord, RecordError>;
    /// Keeps the object from vanishing while something is to be done; returns it with its new version. Idempotent.
    async fn hold(&self, record: &CopyRecord) -> Result<CopyRecord, RecordError>;
    /// Undoes `hold`. Idempotent.
    async fn release(&self, record: &CopyRecord) -> Result<CopyRecord, RecordError>;
}

#[cfg(test)]
mod tests {
    use berth_api::ReasonKind;
    use berth_api::copy::CopyWork;
    use jiff::Timestamp;

    use super::*;

    #[test]
    fn a_refresh_that_broke_off_is_not_under_way() {
        let mut record = CopyRecord {
            status: InstanceCopyStatus {
                current: Some(CopyWork {
                    step: Step::Snapshotted.as_str().to_owned(),
                    refresh: true,
                    sent: true,
                    ..CopyWork::default()
                }),
                ..InstanceCopyStatus::default()
            },
            ..CopyRecord::default()
        };
        let mut says = |reason: Reason, kind: ReasonKind| {
            let list = &mut record.status.conditions;
            conditions::say(list, kind, (reason.as_str(), ""), Some(1), Timestamp::UNIX_EPOCH);
            record.refreshes()
        };
        assert!(says(Reason::Copying, ReasonKind::InProgress));
        assert!(!says(Reason::ServerUnreachable, ReasonKind::Unknown));
    }
}
