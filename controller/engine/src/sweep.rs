//! Looks for copies under Berth's own names that no open move owns: what a late request made after its move had ended.
//! Such a copy is deleted if its record says that it is over; one without any record is only reported, and one that a
//! person was asked to look at is theirs.

use std::collections::BTreeSet;
use std::sync::Arc;

use berth_api::{Outcome, Reason, Transfer};
use berth_core::marks::{self, Role};
use berth_core::model::{Instance, InstanceRef};
use berth_core::records::{Record, RecordError};
use berth_core::server::ServerError;

use crate::engine::Engine;
use crate::inventory::Follower;
use crate::{Key, transfer};

/// A copy under one of Berth's names that belongs to no record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// The InstanceServers behind which it is.
    pub servers: Vec<Key>,
    /// The copy.
    pub at: InstanceRef,
    /// The move that it names, if it names one.
    pub record: Option<String>,
}

impl Engine {
    /// Deletes incoming copies whose move is over; returns those that belong to nobody. Costs no request to a server
    /// unless there is something to delete.
    pub async fn sweep(&self) -> Result<Vec<Leftover>, RecordError> {
        let open: BTreeSet<String> = self.book().open_names().into_iter().collect();
        let mut leftovers = Vec::new();
        for (fingerprint, follower, namespaces) in self.registry().all() {
            let Some(instances) = follower.seen().instances else {
                continue;
            };
            let candidates = instances.iter().filter(|i| {
                marks::is_unique_name(&i.at.name)
                    && !self.copies().is_in_hand(&i.at.name)
                    && may_be_incoming(i)
                    && marks::move_id(i).is_none_or(|id| !open.contains(id))
            });
            for instance in candidates {
                match self.record_of(instance, &namespaces).await? {
                    Some(record) if is_over(&record, instance, &fingerprint) => {
                        if let Err(error) = self.remove_swept(&follower, instance, &record).await {
                            tracing::warn!(at = %instance.at, error = %error, "a copy of a finished move stays for now");
                        }
                    }
                    // another leader's, or one that was opened meanwhile
                    Some(_) => {}
                    // a source that was renamed out of the way
                    None if marks::role(instance) != Some(Role::Incoming) => {}
                    None => leftovers.push(Leftover {
                        servers: self.registry().keys_of(&fingerprint),
                        at: instance.at.clone(),
                        record: marks::move_id(instance).map(str::to_owned),
                    }),
                }
            }
        }
        Ok(leftovers)
    }

    async fn record_of(
        &self,
        instance: &Instance,
        namespaces: &BTreeSet<String>,
    ) -> Result<Option<Record>, RecordError> {
        let Some(id) = marks::move_id(instance) else {
            return Ok(None);
        };
        for namespace in namespaces {
            match self.records().load(namespace, id).await {
                Ok(record) => return Ok(Some(record)),
                Err(RecordError::NotFound(_)) => {}
                Err(error @ (RecordError::Conflict(_) | RecordError::Unavailable(_))) => return Err(error),
            }
        }
        Ok(None)
    }

    async fn remove_swept(
        &self,
        follower: &Arc<Follower>,
        seen: &Instance,
        record: &Record,
    ) -> Result<(), ServerError> {
        let server = follower.server();
        let fresh = follower.read(&seen.at).await?;
        let still = fresh.is_some_and(|f| {
            let i = &f.instance;
            marks::move_id(i) == Some(record.name.as_str())
                && may_be_incoming(i)
                && i.uuid() == seen.uuid()
                && !i.may_run()
        });
        if !still || !self.env().may_act() {
            return Ok(());
        }
        let attempted = format!("delete {}, a copy of the finished move {}", seen.at, record.name);
        tracing::info!(at = %seen.at, record = %record.name, "deletes a copy of a finished move");
        let operation = server.remove(&seen.at).await?;
        transfer::finished(server.as_ref(), &attempted, &operation, None).await
    }
}

/// Whether it may be a copy on its way in: one that came with a backup says that it is the source.
fn may_be_incoming(i: &Instance) -> bool {
    matches!(marks::role(i), Some(Role::Incoming | Role::Source))
}

/// Whether the record is finished and the copy is one that it made on that server, and nothing else: one that was kept for
/// a person, because the source vanished or the move was given up, may have the newest data.
fn is_over(record: &Record, copy: &Instance, fingerprint: &str) -> bool {
    let said = record.status.last_error.as_ref().map(|e| e.reason.as_str());
    let kept =
        record.status.outcome() == Some(Outcome::NeedsAttention) && said != Some(Reason::LeftoverVolume.as_str());
    let came_so = marks::role(copy) == Some(Role::Incoming) || record.spec.transfer == Transfer::Backup;
    let there = record.spec.to.fingerprint == fingerprint && record.spec.from.fingerprint != fingerprint;
    record.finished() && !kept && came_so && there && copy.uuid() == record.spec.from.uuid.as_deref()
}
