//! One pass over an InstancePlacement: what the object wants goes into the engine, what the engine says goes into status
//! and Events. Also what is to be done about records whose placement is gone, and tidying up after moves.

use std::sync::Arc;
use std::time::Duration;

use berth_api::{InstanceMove, InstancePlacement, InstancePlacementStatus, InstanceServer, keys};
use berth_core::model::Product;
use berth_core::moves::has_kept;
use berth_core::plan::Desired;
use berth_core::records::{RecordError, Records};
use berth_engine::{Engine, Happening, Key, Pass, Report};
use futures::future::join;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::api::DeleteParams;
use kube::{Resource, ResourceExt};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::abandon;
use crate::events::{self, Tell, Told};
use crate::records::{KubeRecords, is_open, record_of};
use crate::report::{Reporter, Writes};
use crate::store::{Store, StoreError};

/// Finished moves of a placement that are kept.
const KEPT: usize = 5;
/// When a pass that failed is made again.
const RETRY: Duration = Duration::from_secs(1);

/// All placements.
pub(crate) struct Placements {
    pub store: Arc<Store>,
    pub engine: Arc<Engine>,
    pub records: Arc<KubeRecords>,
    pub identity: String,
    pub writes: Writes,
}

/// What a placement wants, as the engine reads it.
pub(crate) fn desired_of(object: &InstancePlacement) -> Desired {
    let annotation = |key: &str| object.annotations().get(key).filter(|v| !v.is_empty()).cloned();
    let created = object.metadata.creation_timestamp.as_ref();
    Desired {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        uid: object.uid().unwrap_or_default(),
        generation: object.metadata.generation.unwrap_or_default(),
        created_at: created.map_or(Timestamp::UNIX_EPOCH, |t| t.0),
        deleting: object.metadata.deletion_timestamp.is_some(),
        approve: annotation(keys::APPROVE),
        requested_at: annotation(keys::REQUESTED_AT),
        spec: object.spec.clone(),
        status: object.status.clone().unwrap_or_default(),
    }
}

impl Placements {
    /// Looks at one and does what is to be done; says when to look again.
    pub async fn pass(self: Arc<Self>, key: Key) -> Option<Duration> {
        let object = self.store.placements.get(&key)?;
        if !self.store.gate.may_act() {
            return Some(RETRY);
        }
        if !self.abandon(&object).await {
            return Some(RETRY);
        }
        let (tell, told) = Tell::channel();
        let placement = object.object_ref(&());
        let publishing = self.publish_all(Some(&placement), &key.namespace, told);
        let (again, ()) = join(self.reconcile(&key, &object, tell), publishing).await;
        again
    }

    async fn reconcile(&self, key: &Key, object: &Arc<InstancePlacement>, tell: Tell) -> Option<Duration> {
        let reporter = Reporter::new(&self.store, &self.writes, key, object.clone(), tell);
        let mut desired = desired_of(object);
        desired.status = self.writes.status(key, object);
        if desired.bound_uuid().is_none() && self.has_new_servers(&key.namespace) {
            return Some(RETRY);
        }
        let reconciling = async {
            let pass = self.engine.reconcile(desired, &reporter).await;
            reporter.end();
            pass
        };
        let (pass, ()) = join(reconciling, reporter.write_until_end()).await;
        let Pass {
            status,
            ended,
            look_again,
        } = match pass {
            Ok(pass) => pass,
            Err(error) => {
                say_failed(key, &error);
                return Some(RETRY);
            }
        };
        // first: who waits for Ready finds that nothing holds any object
        let released = self.release(key, object).await;
        let waits = match reporter.write_last(status).await {
            Ok(waits) => waits,
            Err(StoreError::NotFound(_)) => None,
            // somebody else changed it: the watch tells of that, most often sooner
            Err(StoreError::Conflict(_)) => Some(RETRY),
            Err(error) => {
                tracing::warn!(placement = %key, %error, "tried again");
                Some(RETRY)
            }
        };
        if ended && let Err(error) = self.prune(object).await {
            tracing::debug!(placement = %key, %error, "old records stay until the next move ends");
        }
        [waits, look_again, released].into_iter().flatten().min()
    }

    /// Whether the engine has yet to hear of an InstanceServer: a name is looked up on all of them.
    fn has_new_servers(&self, namespace: &str) -> bool {
        let here = self
            .store
            .servers
            .list(|s| s.metadata.namespace.as_deref() == Some(namespace));
        let is_new = |s: &Arc<InstanceServer>| !self.engine.registry().knows(&crate::cache::key_of(s.as_ref()));
        here.iter().any(is_new)
    }

    /// Carries on the moves of a namespace whose placements are gone; says when to look again.
    pub async fn orphans(self: Arc<Self>, namespace: String) -> Option<Duration> {
        if !self.store.gate.may_act() {
            return Some(RETRY);
        }
        for orphan in self.orphaned(&namespace, true) {
            if !self.abandon_move(&orphan, None).await {
                return Some(RETRY);
            }
        }
        let (tell, told) = Tell::channel();
        let work = async {
            let orphans = Orphans(tell);
            self.engine.drive_orphans(&namespace, &orphans).await
        };
        let (driven, ()) = join(work, self.publish_all(None, &namespace, told)).await;
        let again = match driven {
            Ok(again) => again,
            Err(error) => {
                say_failed(&Key::new(&namespace, "orphans"), &error);
                Some(RETRY)
            }
        };
        for over in self.orphaned(&namespace, false) {
            if let Err(error) = self.records.release(&record_of(&over)).await {
                tracing::debug!(record = %over.name_any(), %error, "tried again");
                return Some(RETRY);
            }
        }
        again
    }

    /// Records of a namespace that no placement owns and that still hold something.
    fn orphaned(&self, namespace: &str, open: bool) -> Vec<Arc<InstanceMove>> {
        let mine =
            |m: &InstanceMove| m.metadata.namespace.as_deref() == Some(namespace) && is_open(m) == open && is_held(m);
        let mut all = self.store.moves.list(mine);
        all.retain(|m| !self.has_placement(m));
        all
    }

    /// Whether the placement that a record was made for still exists.
    pub fn has_placement(&self, object: &InstanceMove) -> bool {
        self.placement_of(object).is_some()
    }

    fn placement_of(&self, object: &InstanceMove) -> Option<Arc<InstancePlacement>> {
        let key = Key::new(object.namespace().unwrap_or_default(), &object.spec.placement);
        let placement = self.store.placements.get(&key);
        placement.filter(|p| p.metadata.uid.as_deref() == Some(object.spec.placement_uid.as_str()))
    }

    /// Writes Events about a placement, if it still exists, and its moves, as long as there is something to tell.
    async fn publish_all(
        &self,
        placement: Option<&ObjectReference>,
        namespace: &str,
        mut told: UnboundedReceiver<Told>,
    ) {
        while let Some(told) = told.recv().await {
            // what it tells of goes on, and that comes first
            tokio::time::sleep(events::BREATH.saturating_sub(told.age())).await;
            let record = told
                .record()
                .and_then(|name| self.store.moves.get(&Key::new(namespace, name)));
            let record = record.map(|m| m.object_ref(&()));
            let about: Vec<ObjectReference> = placement.cloned().into_iter().chain(record).collect();
            events::publish(&self.store, &self.identity, &about, told).await;
        }
    }

    /// A placement is gone: what it kept stays where it is, and people are told.
    pub fn outlived(self: Arc<Self>, object: &InstancePlacement) {
        let (namespace, uid) = (object.namespace().unwrap_or_default(), object.uid().unwrap_or_default());
        let told = self.engine.outlived(&namespace, &uid);
        if told.is_empty() || !self.store.gate.may_act() {
            return;
        }
        let about = object.object_ref(&());
        tokio::spawn(async move {
            for happening in told {
                events::publish(&self.store, &self.identity, std::slice::from_ref(&about), happening).await;
            }
        });
    }

    /// Takes finalizers off what no move needs any more.
    async fn release(&self, key: &Key, object: &InstancePlacement) -> Option<Duration> {
        let uid = object.uid().unwrap_or_default();
        let over = |m: &InstanceMove| m.spec.placement_uid == uid && !is_open(m) && is_held(m);
        let done = async {
            for over in self.store.moves.list(over) {
                self.records.release(&record_of(&over)).await?;
            }
            // as it is after the pass: that has set and removed finalizers
            match self.store.placements.get(key) {
                Some(held) if is_held(held.as_ref()) => self.store.release_placement(key).await,
                _ => Ok(()),
            }
        };
        let error = done.await.err()?;
        tracing::debug!(placement = %key, %error, "tried again");
        Some(RETRY)
    }

    /// Deletes the oldest records of moves that are over.
    async fn prune(&self, object: &InstancePlacement) -> Result<(), StoreError> {
        let uid = object.uid().unwrap_or_default();
        let mut moves = self.store.moves.list(|m| m.spec.placement_uid == uid && !is_open(m));
        moves.sort_by_key(|m| std::cmp::Reverse(m.spec.attempt));
        for old in moves
            .iter()
            .skip(KEPT)
            // one whose source is kept is what that is deleted by
            .filter(|m| m.metadata.deletion_timestamp.is_none() && !has_kept(&record_of(m)))
        {
            self.delete_move(old).await?;
        }
        Ok(())
    }

    async fn delete_move(&self, object: &InstanceMove) -> Result<(), StoreError> {
        let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
        let api = self.store.api::<InstanceMove>(&namespace);
        let what = format!("delete InstanceMove {namespace}/{name}");
        match self
            .store
            .write(&what, api.delete(&name, &DeleteParams::background()))
            .await
        {
            Ok(_) | Err(StoreError::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Lets go of moves that a person gave up by annotation. False: one could not be written now, and nothing more is asked
    /// of a server for it.
    async fn abandon(&self, placement: &InstancePlacement) -> bool {
        let uid = placement.uid().unwrap_or_default();
        let named = placement.annotations().get(keys::ABANDON).map(String::as_str);
        let any = named.is_some() || placement.finalizers().iter().any(|f| f == keys::FINALIZER);
        if !any {
            return true;
        }
        for open in self.store.moves.list(|m| m.spec.placement_uid == uid && is_open(m)) {
            if !self.abandon_move(&open, named).await {
                return false;
            }
        }
        true
    }

    async fn abandon_move(&self, object: &InstanceMove, named: Option<&str>) -> bool {
        let name = object.name_any();
        let own = object.annotations().get(keys::ABANDON).map(String::as_str);
        if named != Some(name.as_str()) && own != Some(name.as_str()) {
            return true;
        }
        // what was written of a server is known even if it does not answer this process
        let product = |server: &str| {
            let key = Key::new(object.namespace().unwrap_or_default(), server);
            let server = self.store.servers.get(&key)?;
            let written = server.status.as_ref()?.product.clone()?;
            [Product::Incus, Product::Lxd]
                .into_iter()
                .find(|p| p.as_str() == written)
        };
        let (record, happening) = abandon::given_up(record_of(object), product, Timestamp::now());
        match self.records.swap(&record).await {
            Ok(closed) => {
                self.engine.record_seen(&closed);
                let placement = self.placement_of(object).map(|p| p.object_ref(&()));
                let about: Vec<_> = placement.into_iter().chain([object.object_ref(&())]).collect();
                events::publish(&self.store, &self.identity, &about, happening).await;
                true
            }
            Err(error) => {
                tracing::warn!(record = %name, %error, "cannot be given up now");
                false
            }
        }
    }
}

/// Moves whose placements are gone: there is nobody whose status could be written.
struct Orphans(Tell);

impl Report for Orphans {
    fn status(&self, _: &InstancePlacementStatus) {}

    fn happened(&self, happening: Happening) {
        self.0.tell(happening);
    }
}

/// Whether an object carries our finalizer.
pub(crate) fn is_held(object: &impl ResourceExt) -> bool {
    object.finalizers().iter().any(|f| f == keys::FINALIZER)
}

fn say_failed(key: &Key, error: &RecordError) {
    match error {
        RecordError::Conflict(_) => tracing::debug!(placement = %key, %error, "looked at again"),
        RecordError::NotFound(_) | RecordError::Unavailable(_) => {
            tracing::warn!(placement = %key, %error, "looked at again");
        }
    }
}
