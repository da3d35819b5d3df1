//! One pass over an InstanceCopy: the object is the record. Its status is written by resourceVersion before anything that
//! it announces is asked of a server, and its finalizer keeps it while something is to be done.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use berth_api::{InstanceCopy, InstancePlacement, keys, present};
use berth_core::copies::{CopyRecord, CopyRecords, Told};
use berth_core::records::RecordError;
use berth_engine::{CopyPass, Engine, Happening, Key};
use futures::future::join;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::PostParams;
use kube::{Resource, ResourceExt};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::cache::{Changed, key_of};
use crate::events::{self, Tell};
use crate::store::{Store, StoreError};

/// When a pass that failed is made again.
const RETRY: Duration = Duration::from_secs(1);

/// All copies.
pub(crate) struct Copies {
    pub store: Arc<Store>,
    pub engine: Arc<Engine>,
    pub identity: String,
}

/// The record that an object is.
pub(crate) fn record_of(object: &InstanceCopy) -> CopyRecord {
    CopyRecord {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        uid: object.uid().unwrap_or_default(),
        version: object.resource_version().unwrap_or_default(),
        generation: object.metadata.generation.unwrap_or_default(),
        deleting: object.metadata.deletion_timestamp.is_some(),
        held: object.finalizers().iter().any(|f| f == keys::COPY_FINALIZER),
        requested_at: object.annotations().get(keys::REQUESTED_AT).cloned(),
        spec: object.spec.clone(),
        status: object.status.clone().unwrap_or_default(),
    }
}

fn happening_of(told: Told) -> Happening {
    Happening {
        record: None,
        warning: told.warning,
        reason: told.reason.as_str().to_owned(),
        message: told.message,
    }
}

impl Copies {
    /// Looks at one and does what is to be done; says when to look again.
    pub async fn pass(self: Arc<Self>, key: Key) -> Option<Duration> {
        let object = self.store.copies.get(&key)?;
        if !self.store.gate.may_act() {
            return Some(RETRY);
        }
        let (tell, told) = Tell::channel();
        let work = async {
            let say = move |told: Told| tell.tell(happening_of(told));
            let record = record_of(&object);
            self.engine.reconcile_copy(self.as_ref(), record, &say).await
        };
        let (pass, ()) = join(work, self.publish(object.object_ref(&()), told)).await;
        match pass {
            Ok(CopyPass { look_again, .. }) => look_again,
            Err(RecordError::NotFound(_)) => None,
            Err(error) => {
                tracing::warn!(copy = %key, %error, "looked at again");
                Some(RETRY)
            }
        }
    }

    async fn publish(&self, about: ObjectReference, mut told: UnboundedReceiver<events::Told>) {
        let about = [about];
        while let Some(told) = told.recv().await {
            events::publish(&self.store, &self.identity, &about, told).await;
        }
    }

    /// The copies that follow a placement which came, went, or begins or ends a move.
    pub fn of_placement(&self, changed: &Changed<InstancePlacement>) -> Vec<Key> {
        let seen = |o: &Arc<InstancePlacement>| {
            let status = o.status.as_ref();
            let uuid = status.and_then(|s| s.instance.as_ref()).and_then(|i| i.uuid.clone());
            (uuid, status.is_some_and(|s| s.current_move.is_some()))
        };
        if changed.old.as_ref().map(seen) == changed.new.as_ref().map(seen) {
            return Vec::new();
        }
        let follows = |c: &InstanceCopy| {
            c.metadata.namespace.as_deref() == Some(changed.key.namespace.as_str())
                && present(&c.spec.source.placement) == Some(changed.key.name.as_str())
        };
        let copies = self.store.copies.list(follows);
        copies.iter().map(|c| key_of(c.as_ref())).collect()
    }

    async fn set_finalizer(&self, record: &CopyRecord, wanted: bool) -> Result<CopyRecord, RecordError> {
        let key = Key::new(&record.namespace, &record.name);
        if wanted {
            self.store.hold_copy(&key).await?;
        } else {
            self.store.release_copy(&key).await?;
        }
        match self.load(&record.namespace, &record.name).await {
            // the last finalizer of an object that was deleted is its end
            Err(RecordError::NotFound(_)) if !wanted => Ok(CopyRecord {
                held: false,
                ..record.clone()
            }),
            Ok(stored) => Ok(stored),
            Err(error) => Err(error),
        }
    }
}

#[async_trait]
impl CopyRecords for Copies {
    async fn load(&self, namespace: &str, name: &str) -> Result<CopyRecord, RecordError> {
        let api = self.store.api::<InstanceCopy>(namespace);
        let what = format!("read InstanceCopy {namespace}/{name}");
        let object = self.store.read(&what, api.get(name)).await?;
        let record = record_of(&object);
        self.store.copies.wrote(object);
        Ok(record)
    }

    async fn swap(&self, record: &CopyRecord) -> Result<CopyRecord, RecordError> {
        let (namespace, name) = (&record.namespace, &record.name);
        let mut object = InstanceCopy::new(name, record.spec.clone());
        object.metadata.namespace = Some(namespace.clone());
        object.metadata.uid = Some(record.uid.clone());
        object.metadata.resource_version = Some(record.version.clone());
        object.status = Some(record.status.clone());
        let api = self.store.api::<InstanceCopy>(namespace);
        let what = format!("write the status of InstanceCopy {namespace}/{name}");
        let params = PostParams::default();
        let written = self
            .store
            .write(&what, api.replace_status(name, &params, &object))
            .await;
        let written = written.map_err(|error: StoreError| RecordError::from(error))?;
        let stored = record_of(&written);
        self.store.copies.wrote(written);
        Ok(stored)
    }

    async fn hold(&self, record: &CopyRecord) -> Result<CopyRecord, RecordError> {
        self.set_finalizer(record, true).await
    }

    async fn release(&self, record: &CopyRecord) -> Result<CopyRecord, RecordError> {
        self.set_finalizer(record, false).await
    }
}
