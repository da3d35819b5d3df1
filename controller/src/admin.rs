//! What the process shows of itself over HTTP: `/livez`, `/readyz`, `/metrics`, and under `/moves/NAMESPACE/NAME` a move
//! that runs, as it is this very moment. Nothing can be changed here.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use berth_core::records::Record;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::time::sleep;

use crate::metrics::Metrics;

/// How often an address that is in use is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// What is shown.
pub(crate) struct Shown {
    /// Whether everything was listed once. A follower is ready, too.
    pub ready: AtomicBool,
    metrics: Arc<Metrics>,
    refresh: Mutex<Option<Refresh>>,
    moves: Mutex<Option<Moves>>,
}

/// Brings up to date what is counted only when somebody asks.
pub(crate) type Refresh = Box<dyn Fn(&Metrics) + Send>;
/// Finds a move that runs by namespace and name.
pub(crate) type Moves = Box<dyn Fn(&str, &str) -> Option<Record> + Send>;

impl Shown {
    /// Nothing is ready yet.
    pub fn new(metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            ready: AtomicBool::new(false),
            metrics,
            refresh: Mutex::default(),
            moves: Mutex::default(),
        })
    }

    pub fn metrics(&self) -> Arc<Metrics> {
        self.metrics.clone()
    }

    /// Who is asked before numbers are shown.
    pub fn refresh_with(&self, refresh: Option<Refresh>) {
        *self.lock() = refresh;
    }

    /// Who is asked for moves. Only the controller that leads knows of any.
    pub fn moves_from(&self, moves: Option<Moves>) {
        *self.moves.lock().unwrap_or_else(PoisonError::into_inner) = moves;
    }

    fn find(&self, namespace: &str, name: &str) -> Option<Record> {
        let moves = self.moves.lock().unwrap_or_else(PoisonError::into_inner);
        moves.as_ref().and_then(|find| find(namespace, name))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Refresh>> {
        self.refresh.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves until dropped. An address in use neither ends the process nor keeps it from leading.
pub(crate) async fn serve(address: SocketAddr, shown: Arc<Shown>) {
    let app = router(shown);
    let mut said = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                said = false;
                tracing::info!(%address, "serves /livez, /readyz, /metrics and /moves");
                if let Err(error) = axum::serve(listener, app.clone()).await {
                    tracing::warn!(%address, %error, "the listener ended; opened again");
                }
            }
            Err(error) if !said => {
                tracing::warn!(%address, %error, "cannot listen; tried again every 5 s");
                said = true;
            }
            Err(_) => {}
        }
        sleep(RETRY).await;
    }
}

fn router(shown: Arc<Shown>) -> Router {
    let (ready, metrics, moves) = (shown.clone(), shown.clone(), shown);
    Router::new()
        .route("/livez", get(|| async { "ok" }))
        .route(
            "/readyz",
            get(move || async move {
                match ready.ready.load(Ordering::SeqCst) {
                    true => (StatusCode::OK, "ok"),
                    false => (StatusCode::SERVICE_UNAVAILABLE, "not everything has been listed yet"),
                }
            }),
        )
        .route("/metrics", get(move || async move { exposition(&metrics) }))
        .route(
            "/moves/{namespace}/{name}",
            get(move |Path((namespace, name)): Path<(String, String)>| async move {
                match moves.find(&namespace, &name) {
                    Some(record) => Json(shown_move(&record)).into_response(),
                    None => (StatusCode::NOT_FOUND, "no such move runs here").into_response(),
                }
            }),
        )
}

/// What a person who watches a move wants to see.
fn shown_move(record: &Record) -> Value {
    let (spec, status) = (&record.spec, &record.status);
    json!({
        "namespace": record.namespace,
        "name": record.name,
        "placement": spec.placement,
        "method": spec.method,
        "transfer": spec.transfer,
        "from": spec.from.location(),
        "to": spec.to.location(),
        "step": status.step().map(berth_api::Step::as_str),
        "outcome": status.outcome,
        "startedAt": status.started_at,
        "stopRequestedAt": status.stop_requested_at,
        "progress": status.progress,
        "rounds": status.precopy.as_ref().map(|p| &p.rounds),
        "frozen": status.precopy.as_ref().map(|p| p.frozen),
        "estimate": spec.estimate,
        "downtime": status.downtime,
        "lastError": status.last_error,
    })
}

fn exposition(shown: &Shown) -> Response {
    if let Some(refresh) = shown.lock().as_ref() {
        refresh(&shown.metrics);
    }
    let content = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match shown.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, content)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
