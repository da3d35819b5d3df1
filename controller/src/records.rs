//! The durable records of moves as InstanceMoves. What a write does not say stays as it is: the spec is written once, the
//! status by resourceVersion, the finalizers by patches that test what they found.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use berth_api::moves::MoveEnd;
use berth_api::{GROUP, InstanceMove, InstanceMoveStatus, VERSION, keys};
use berth_core::records::{Record, RecordError, Records};
use berth_core::status::is_leftover;
use berth_engine::Key;
use futures::future::{join, try_join, try_join_all, try_join3};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt;
use kube::api::{ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::core::DeserializeGuard;
use serde_json::json;

use crate::cache::{Cache, Kind};
use crate::store::{Store, StoreError};

/// How often a change of finalizers is tried again when somebody else changed them.
const ATTEMPTS: usize = 5;

/// The records in Kubernetes.
pub(crate) struct KubeRecords {
    store: Arc<Store>,
}

impl KubeRecords {
    pub fn new(store: Arc<Store>) -> Self {
        Self { store }
    }

    /// Holds the placement and the servers of a record, for whoever has the order of finalizers.
    async fn hold_others(&self, record: &Record) -> Result<(), StoreError> {
        let servers = servers_of(record);
        let servers = servers
            .iter()
            .map(|s| self.store.hold(&self.store.servers, &s.namespace, &s.name));
        let placement = self
            .store
            .hold(&self.store.placements, &record.namespace, &record.spec.placement);
        try_join(placement, try_join_all(servers)).await?;
        Ok(())
    }

    /// Takes off what [`Records::hold`] has set, when nothing of the move is left. Idempotent.
    pub async fn release(&self, record: &Record) -> Result<(), StoreError> {
        let _order = self.store.finalizers.lock().await;
        let key = |name: &str| Key::new(&record.namespace, name);
        let (name, placement, servers) = (key(&record.name), key(&record.spec.placement), servers_of(record));
        let servers = servers.iter().map(|s| self.store.let_go_of_server(s));
        try_join3(
            self.store.let_go(&self.store.moves, &name),
            self.store.let_go_of_placement(&placement),
            try_join_all(servers),
        )
        .await?;
        Ok(())
    }
}

impl From<StoreError> for RecordError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict(what) => Self::Conflict(what),
            StoreError::NotFound(what) => Self::NotFound(what),
            StoreError::NotLeading(_) | StoreError::Forbidden(..) | StoreError::Failed(..) => {
                Self::Unavailable(error.to_string())
            }
        }
    }
}

/// The record of an object.
pub(crate) fn record_of(object: &InstanceMove) -> Record {
    Record {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        version: object.resource_version().unwrap_or_default(),
        deleting: object.metadata.deletion_timestamp.is_some(),
        spec: object.spec.clone(),
        status: object.status.clone().unwrap_or_default(),
    }
}

fn object_of(record: &Record) -> InstanceMove {
    let owner = OwnerReference {
        api_version: format!("{GROUP}/{VERSION}"),
        kind: "InstancePlacement".to_owned(),
        name: record.spec.placement.clone(),
        uid: record.spec.placement_uid.clone(),
        controller: Some(true),
        block_owner_deletion: Some(false),
    };
    InstanceMove {
        metadata: ObjectMeta {
            name: Some(record.name.clone()),
            namespace: Some(record.namespace.clone()),
            resource_version: Some(record.version.clone()).filter(|v| !v.is_empty()),
            labels: Some(BTreeMap::from([(
                keys::PLACEMENT.to_owned(),
                record.spec.placement.clone(),
            )])),
            owner_references: Some(vec![owner]),
            finalizers: Some(vec![keys::FINALIZER.to_owned()]),
            ..ObjectMeta::default()
        },
        spec: record.spec.clone(),
        status: Some(record.status.clone()),
    }
}

fn attempted(what: &str, record: &Record) -> String {
    format!("{what} InstanceMove {}/{}", record.namespace, record.name)
}

#[async_trait]
impl Records for KubeRecords {
    async fn list(&self, namespace: &str) -> Result<Vec<Record>, RecordError> {
        let api = self.store.api::<DeserializeGuard<InstanceMove>>(namespace);
        let what = format!("list the InstanceMoves of {namespace}");
        let list = self.store.read(&what, api.list(&ListParams::default())).await?;
        // one that cannot be read is a newer program's and stays as it is
        Ok(list
            .items
            .iter()
            .filter_map(|o| o.0.as_ref().ok())
            .map(record_of)
            .collect())
    }

    async fn load(&self, namespace: &str, name: &str) -> Result<Record, RecordError> {
        let api = self.store.api::<InstanceMove>(namespace);
        let what = format!("read InstanceMove {namespace}/{name}");
        Ok(record_of(&self.store.read(&what, api.get(name)).await?))
    }

    async fn create(&self, record: &Record) -> Result<Record, RecordError> {
        let api = self.store.api::<InstanceMove>(&record.namespace);
        let what = attempted("create", record);
        let (params, object) = (PostParams::default(), object_of(record));
        let created = {
            // what it needs is held at the same time: who finds that no move needs it lets go of it
            let _order = self.store.finalizers.lock().await;
            let create = self.store.write(&what, api.create(&params, &object));
            let (created, held) = join(create, self.hold_others(record)).await;
            let created = created?;
            self.store.moves.wrote(created.clone());
            held?;
            record_of(&created)
        };
        if record.status == InstanceMoveStatus::default() {
            return Ok(created);
        }
        // a status is not taken over by a create
        self.swap(&Record {
            version: created.version,
            ..record.clone()
        })
        .await
    }

    async fn swap(&self, record: &Record) -> Result<Record, RecordError> {
        let api = self.store.api::<InstanceMove>(&record.namespace);
        let what = attempted("write the status of", record);
        let (params, object) = (PostParams::default(), object_of(record));
        let key = Key::new(&record.namespace, &record.name);
        let was_open = self.store.moves.get(&key).is_none_or(|m| is_open(&m));
        let write = self
            .store
            .write(&what, api.replace_status(&record.name, &params, &object));
        let written = write.await?;
        let written_record = record_of(&written);
        self.store.moves.wrote(written);
        // what becomes of a kept source is written later
        if was_open && written_record.finished() {
            self.store.metrics.move_finished(&written_record);
        }
        Ok(written_record)
    }

    async fn hold(&self, record: &Record) -> Result<Record, RecordError> {
        {
            let _order = self.store.finalizers.lock().await;
            let itself = self.store.hold(&self.store.moves, &record.namespace, &record.name);
            try_join(itself, self.hold_others(record)).await?;
        }
        let namespace = &record.namespace;
        // a new record was held as it was created
        let known = self.store.moves.get(&Key::new(namespace, &record.name));
        match known.filter(|m| m.metadata.resource_version.as_ref() == Some(&record.version)) {
            Some(_) => Ok(record.clone()),
            None => self.load(namespace, &record.name).await,
        }
    }
}

/// The InstanceServers of a move: one, if it stays inside.
fn servers_of(record: &Record) -> BTreeSet<Key> {
    let spec = &record.spec;
    [&spec.from, &spec.to]
        .map(|end| Key::new(&record.namespace, &end.server))
        .into()
}

/// Whether an open move needs the InstanceServer of that name.
fn needs_server(object: &InstanceMove, name: &str) -> bool {
    let at = |end: &MoveEnd| end.server == name;
    is_open(object) && (at(&object.spec.from) || at(&object.spec.to))
}

/// Whether a move is not over.
pub(crate) fn is_open(object: &InstanceMove) -> bool {
    object.status.as_ref().is_none_or(|s| s.outcome.is_none())
}

/// The finalizers with one more, if it is not there. Nobody can hold what is gone, or what is going and was not held
/// before.
fn with_finalizer(meta: &ObjectMeta, finalizer: &str) -> Option<Vec<String>> {
    let mut finalizers = meta.finalizers.clone().unwrap_or_default();
    if meta.deletion_timestamp.is_some() || finalizers.iter().any(|f| f == finalizer) {
        return None;
    }
    finalizers.push(finalizer.to_owned());
    Some(finalizers)
}

fn without_finalizer(meta: &ObjectMeta, finalizer: &str) -> Option<Vec<String>> {
    let finalizers = meta.finalizers.as_ref()?;
    let rest: Vec<String> = finalizers.iter().filter(|f| *f != finalizer).cloned().collect();
    (rest.len() < finalizers.len()).then_some(rest)
}

impl Store {
    /// Takes our finalizer off a placement that no open move needs. One that only waits for its former source's server
    /// goes on without the placement.
    pub async fn release_placement(&self, key: &Key) -> Result<(), StoreError> {
        let _order = self.finalizers.lock().await;
        self.let_go_of_placement(key).await
    }

    /// The same, for whoever has the order of finalizers.
    async fn let_go_of_placement(&self, key: &Key) -> Result<(), StoreError> {
        let now = Timestamp::now();
        let needed = self.moves.list(|m| {
            is_open(m)
                && m.spec.placement == key.name
                && m.metadata.namespace.as_deref() == Some(key.namespace.as_str())
                && !is_leftover(&record_of(m), now)
        });
        match needed.is_empty() {
            true => self.let_go(&self.placements, key).await,
            false => Ok(()),
        }
    }

    /// Takes our finalizer off an InstanceServer that no open move needs.
    pub async fn release_server(&self, key: &Key) -> Result<(), StoreError> {
        let _order = self.finalizers.lock().await;
        self.let_go_of_server(key).await
    }

    /// The same, for whoever has the order of finalizers.
    async fn let_go_of_server(&self, key: &Key) -> Result<(), StoreError> {
        match self.moves_of_server(key).is_empty() {
            true => self.let_go(&self.servers, key).await,
            false => Ok(()),
        }
    }

    /// The open moves that need an InstanceServer.
    pub fn moves_of_server(&self, key: &Key) -> Vec<Arc<InstanceMove>> {
        self.moves
            .list(|m| m.metadata.namespace.as_deref() == Some(key.namespace.as_str()) && needs_server(m, &key.name))
    }

    /// Keeps an InstanceCopy while something is to be done for it.
    pub async fn hold_copy(&self, key: &Key) -> Result<(), StoreError> {
        let _order = self.finalizers.lock().await;
        let add = |meta: &ObjectMeta| with_finalizer(meta, keys::COPY_FINALIZER);
        self.change_finalizers(&self.copies, key, add).await
    }

    /// Lets go of an InstanceCopy.
    pub async fn release_copy(&self, key: &Key) -> Result<(), StoreError> {
        let _order = self.finalizers.lock().await;
        let take = |meta: &ObjectMeta| without_finalizer(meta, keys::COPY_FINALIZER);
        self.change_finalizers(&self.copies, key, take).await
    }

    async fn hold<K: Kind>(&self, cache: &Cache<K>, namespace: &str, name: &str) -> Result<(), StoreError> {
        let add = |meta: &ObjectMeta| with_finalizer(meta, keys::FINALIZER);
        self.change_finalizers(cache, &Key::new(namespace, name), add).await
    }

    async fn let_go<K: Kind>(&self, cache: &Cache<K>, key: &Key) -> Result<(), StoreError> {
        let take = |meta: &ObjectMeta| without_finalizer(meta, keys::FINALIZER);
        self.change_finalizers(cache, key, take).await
    }

    /// Begins with what is known, which our own writes keep current; if that was not so, the object is read.
    async fn change_finalizers<K: Kind>(
        &self,
        cache: &Cache<K>,
        key: &Key,
        change: impl Fn(&ObjectMeta) -> Option<Vec<String>>,
    ) -> Result<(), StoreError> {
        let what = format!("change the finalizers of {} {key}", K::kind(&()));
        let api = self.api::<K>(&key.namespace);
        let mut known = cache.get(key).map(|o| o.meta().clone());
        let mut conflict = StoreError::Conflict(what.clone());
        for _ in 0..ATTEMPTS {
            let meta = match known.take() {
                Some(meta) => meta,
                None => match self.read(&what, api.get_metadata_opt(&key.name)).await? {
                    Some(found) => found.metadata,
                    None => return Ok(()),
                },
            };
            let Some(finalizers) = change(&meta) else {
                return Ok(());
            };
            let patch = json!([
                {"op": "test", "path": "/metadata/uid", "value": meta.uid},
                {"op": "test", "path": "/metadata/finalizers", "value": meta.finalizers},
                {"op": "add", "path": "/metadata/finalizers", "value": finalizers},
            ]);
            let patch = serde_json::from_value(patch).map_err(|e| StoreError::Failed(what.clone(), e.to_string()))?;
            let (params, patch) = (PatchParams::default(), Patch::Json::<()>(patch));
            match self.write(&what, api.patch(&key.name, &params, &patch)).await {
                Ok(patched) => {
                    cache.wrote(patched);
                    return Ok(());
                }
                Err(StoreError::NotFound(_)) => return Ok(()),
                // a test that fails is "invalid" to the API server: the next look shows whether it was that
                Err(error @ (StoreError::Conflict(_) | StoreError::Failed(..))) => conflict = error,
                Err(error) => return Err(error),
            }
        }
        Err(conflict)
    }
}

#[cfg(test)]
mod tests {
    use berth_api::InstanceMoveSpec;

    use super::*;

    fn record() -> Record {
        let spec: InstanceMoveSpec = serde_json::from_value(json!({
            "placement": "web-1", "placementUID": "u", "attempt": 1, "planDigest": "", "method": "Cold",
            "transfer": "Pull", "instanceType": "Container", "powerAfter": "Running",
            "from": {"server": "a", "fingerprint": "", "project": "default", "name": "web-1"},
            "to": {"server": "b", "fingerprint": "", "project": "default", "name": "web-1"},
        }))
        .unwrap();
        Record {
            namespace: "shop".into(),
            name: "web-1-x7k2p".into(),
            version: "7".into(),
            deleting: false,
            spec,
            status: InstanceMoveStatus::default(),
        }
    }

    #[test]
    fn a_record_is_the_same_after_the_way_through_an_object() {
        assert_eq!(record_of(&object_of(&record())), record());
    }

    #[test]
    fn a_new_record_is_owned_by_its_placement_without_blocking_its_deletion() {
        let object = object_of(&record());
        let owner = &object.owner_references()[0];
        assert_eq!(
            (owner.controller, owner.block_owner_deletion),
            (Some(true), Some(false))
        );
        assert_eq!(object.finalizers(), [keys::FINALIZER]);
        assert_eq!(object.labels()[keys::PLACEMENT], "web-1");
    }

    #[test]
    fn a_server_is_needed_by_the_open_moves_from_and_to_it_only() {
        let mut object = object_of(&record());
        assert!(needs_server(&object, "a") && needs_server(&object, "b") && !needs_server(&object, "c"));
        object.status.get_or_insert_default().outcome = Some("Succeeded".into());
        assert!(!needs_server(&object, "a"));
    }
}
