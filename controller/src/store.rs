//! Reading and writing objects: the caches, and a gate that every write passes, so that nothing is written by a process
//! that does not lead or that is about to end. Every call is bounded in time.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use berth_api::{InstanceCopy, InstanceMove, InstancePlacement, InstanceServer};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde::Serialize;
use tokio::sync::{Mutex, RwLock};
use tokio::time::timeout;

use crate::cache::{Cache, Kind};
use crate::lease::Leadership;
use crate::metrics::Metrics;

/// Field manager of everything that is applied.
pub(crate) const MANAGER: &str = "berth";
/// Longest single request.
const CALL: Duration = Duration::from_secs(10);

/// Why an object could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("{0}: this process does not lead")]
    NotLeading(String),
    #[error("{0}: somebody else changed it meanwhile")]
    Conflict(String),
    #[error("{0}: it does not exist")]
    NotFound(String),
    #[error("{0}: forbidden: {1}")]
    Forbidden(String, String),
    #[error("{0}: {1}")]
    Failed(String, String),
}

impl StoreError {
    fn of(attempted: &str, error: kube::Error) -> Self {
        let attempted = attempted.to_owned();
        match error {
            kube::Error::Api(status) if status.is_conflict() || status.is_already_exists() => Self::Conflict(attempted),
            kube::Error::Api(status) if status.is_not_found() => Self::NotFound(attempted),
            kube::Error::Api(status) if status.is_forbidden() => Self::Forbidden(attempted, status.message.clone()),
            other => Self::Failed(attempted, sentence(&other)),
        }
    }
}

/// What the API server said, or why it was not reached, without the details that repeat it.
pub(crate) fn sentence(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => other.to_string(),
    }
}

/// Whether this process may write now.
#[derive(Clone)]
pub(crate) struct Gate {
    pub leadership: Leadership,
    closed: Arc<AtomicBool>,
    writes: Arc<RwLock<()>>,
}

impl Gate {
    /// Open while this process leads.
    pub fn new(leadership: Leadership) -> Self {
        Self {
            leadership,
            closed: Arc::default(),
            writes: Arc::default(),
        }
    }

    /// Whether this process may write and ask servers for changes.
    pub fn may_act(&self) -> bool {
        !self.closed.load(Ordering::SeqCst) && self.leadership.may_act()
    }

    /// Whether that holds long enough for requests without a precondition.
    pub fn is_safe(&self) -> bool {
        !self.closed.load(Ordering::SeqCst) && self.leadership.is_safe()
    }

    /// Lets nothing in any more and waits for what is inside, for a while.
    pub async fn close(&self, patience: Duration) {
        self.closed.store(true, Ordering::SeqCst);
        if timeout(patience, self.writes.write()).await.is_err() {
            tracing::warn!("a write to the API server does not end; it is left to itself");
        }
    }
}

/// Everything known of our objects, and the way to change them.
pub(crate) struct Store {
    pub client: Client,
    pub gate: Gate,
    pub metrics: Arc<Metrics>,
    pub servers: Arc<Cache<InstanceServer>>,
    pub placements: Arc<Cache<InstancePlacement>>,
    pub moves: Arc<Cache<InstanceMove>>,
    pub copies: Arc<Cache<InstanceCopy>>,
    /// Held while finalizers are set or removed: whether one is needed must not change meanwhile.
    pub finalizers: Mutex<()>,
}

impl Store {
    /// Nothing known yet; `scopes` namespaces will be listed.
    pub fn new(client: Client, gate: Gate, metrics: Arc<Metrics>, scopes: usize) -> Arc<Self> {
        Arc::new(Self {
            client,
            gate,
            metrics,
            servers: Cache::new(scopes),
            placements: Cache::new(scopes),
            moves: Cache::new(scopes),
            copies: Cache::new(scopes),
            finalizers: Mutex::default(),
        })
    }

    /// Waits until all kinds were listed once.
    pub async fn synced(&self) {
        self.servers.synced().await;
        self.placements.synced().await;
        self.moves.synced().await;
        self.copies.synced().await;
    }

    /// The objects of one kind in one namespace.
    pub fn api<K: Kind>(&self, namespace: &str) -> Api<K> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// One request that changes nothing.
    pub async fn read<T>(
        &self,
        attempted: &str,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, StoreError> {
        match timeout(CALL, request).await {
            Ok(answer) => answer.map_err(|e| StoreError::of(attempted, e)),
            Err(_) => {
                let silent = "the API server does not answer".to_owned();
                Err(StoreError::Failed(attempted.to_owned(), silent))
            }
        }
    }

    /// One request that changes something, if this process may.
    pub async fn write<T>(
        &self,
        attempted: &str,
        request: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, StoreError> {
        let _inside = self.gate.writes.read().await;
        if !self.gate.may_act() {
            return Err(StoreError::NotLeading(attempted.to_owned()));
        }
        self.read(attempted, request).await
    }

    /// Applies a status, server-side, if `object` still is what the API server has: what was decided from an older spec
    /// is not said of a newer one.
    pub async fn apply_status<K: Kind + Serialize>(
        &self,
        object: &K,
        status: &impl Serialize,
    ) -> Result<K, StoreError> {
        let (kind, meta) = (K::kind(&()), object.meta());
        let (name, namespace) = (
            meta.name.clone().unwrap_or_default(),
            meta.namespace.clone().unwrap_or_default(),
        );
        let body = serde_json::json!({
            "apiVersion": K::api_version(&()),
            "kind": kind,
            "metadata": {"name": name, "namespace": namespace, "uid": meta.uid, "resourceVersion": meta.resource_version},
            "status": status,
        });
        let attempted = format!("write the status of {kind} {namespace}/{name}");
        let params = PatchParams::apply(MANAGER).force();
        let api = self.api::<K>(&namespace);
        self.write(&attempted, api.patch_status(&name, &params, &Patch::Apply(&body)))
            .await
    }
}
