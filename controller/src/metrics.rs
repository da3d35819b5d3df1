//! What is counted and measured, for Prometheus. Labels are names of objects or words of a fixed list, never texts.

use std::sync::Arc;

use berth_api::conditions::{self, READY, RECONCILING, STALLED, find};
use berth_api::{Condition, InstancePlacementStatus, Method, Outcome, Reason};
use berth_client::{Observer, RequestRecord};
use berth_core::records::Record;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByReason {
    reason: String,
    /// `Ready`, `InProgress`, `Waiting` or `Stalled`, as the conditions say.
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByDrift {
    drift: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByResult {
    result: &'static str,
    method: &'static str,
    /// Why it did not succeed, else `None`.
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByMethod {
    method: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByServer {
    namespace: String,
    server: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByRequest {
    class: &'static str,
    method: &'static str,
    /// `2xx`, `4xx`, …, or `none` where no answer came.
    code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByQueue {
    queue: &'static str,
}

fn seconds(bounds: &'static [f64]) -> Family<ByMethod, Histogram, fn() -> Histogram> {
    let make: fn() -> Histogram = match bounds.first() {
        Some(first) if *first < 1.0 => || Histogram::new(DOWNTIME),
        Some(_) | None => || Histogram::new(DURATION),
    };
    Family::new_with_constructor(make)
}

const DOWNTIME: [f64; 12] = [0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0];
const DURATION: [f64; 12] = [
    1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0,
];
const REQUEST: [f64; 10] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

/// All of it.
pub(crate) struct Metrics {
    registry: Registry,
    placements: Family<ByReason, Gauge>,
    drifted: Family<ByDrift, Gauge>,
    moves: Family<ByResult, Counter>,
    durations: Family<ByMethod, Histogram, fn() -> Histogram>,
    downtimes: Family<ByMethod, Histogram, fn() -> Histogram>,
    bytes: Family<ByMethod, Counter>,
    in_flight: Gauge,
    servers: Family<ByServer, Gauge>,
    requests: Family<ByRequest, Histogram, fn() -> Histogram>,
    leader: Gauge,
    depths: Family<ByQueue, Gauge>,
}

impl Metrics {
    /// Nothing happened yet.
    pub fn new() -> Arc<Self> {
        let mut registry = Registry::with_prefix("berth");
        let request: fn() -> Histogram = || Histogram::new(REQUEST);
        let mut metrics = Self {
            registry: Registry::default(),
            placements: Family::default(),
            drifted: Family::default(),
            moves: Family::default(),
            durations: seconds(&DURATION),
            downtimes: seconds(&DOWNTIME),
            bytes: Family::default(),
            in_flight: Gauge::default(),
            servers: Family::default(),
            requests: Family::new_with_constructor(request),
            leader: Gauge::default(),
            depths: Family::default(),
        };
        let m = &metrics;
        registry.register(
            "placements",
            "InstancePlacements by the reason of Ready",
            m.placements.clone(),
        );
        registry.register(
            "placements_drifted",
            "InstancePlacements whose instance differs from the spec, by what differs",
            m.drifted.clone(),
        );
        registry.register(
            "moves",
            "Moves that ended, by result, method and the reason of those that did not succeed",
            m.moves.clone(),
        );
        registry.register_with_unit(
            "move_transferred",
            "What moves that ended have sent, as far as the servers told",
            Unit::Bytes,
            m.bytes.clone(),
        );
        registry.register_with_unit(
            "move_duration",
            "From the beginning of a move to its end",
            Unit::Seconds,
            m.durations.clone(),
        );
        registry.register_with_unit(
            "move_downtime",
            "How long an instance did not run because it was moved",
            Unit::Seconds,
            m.downtimes.clone(),
        );
        registry.register("moves_in_flight", "Moves that have not ended", m.in_flight.clone());
        registry.register("server_up", "Whether a server answers and trusts us", m.servers.clone());
        registry.register_with_unit(
            "server_request_duration",
            "Requests to Incus and LXD servers",
            Unit::Seconds,
            m.requests.clone(),
        );
        registry.register("leader", "Whether this process leads", m.leader.clone());
        registry.register("queue_depth", "Objects that wait to be looked at", m.depths.clone());
        // a counter that begins with the first event hides that event from every rate
        for method in [Method::Live, Method::Warm, Method::Cold] {
            let _ = metrics.bytes.get_or_create(&ByMethod {
                method: method.as_str(),
            });
        }
        metrics.registry = registry;
        Arc::new(metrics)
    }

    /// A move has ended.
    pub fn move_finished(&self, record: &Record) {
        let (method, status) = (record.spec.method.as_str(), &record.status);
        let (result, reason) = (status.outcome().map_or("Unknown", |o| o.as_str()), why(record));
        self.moves.get_or_create(&ByResult { result, method, reason }).inc();
        let sent = status.progress.as_ref().and_then(|p| p.bytes);
        if let Some(bytes) = sent.and_then(|b| u64::try_from(b).ok()) {
            self.bytes.get_or_create(&ByMethod { method }).inc_by(bytes);
        }
        if let (Some(start), Some(end)) = (&status.started_at, &status.finished_at) {
            let took = end.0.duration_since(start.0).as_secs_f64();
            self.durations.get_or_create(&ByMethod { method }).observe(took);
        }
        if let Some(downtime) = status.downtime {
            let took = downtime.as_std().as_secs_f64();
            self.downtimes.get_or_create(&ByMethod { method }).observe(took);
        }
    }

    /// What every request to a server is told to.
    pub fn observer(self: &Arc<Self>) -> Observer {
        let metrics = self.clone();
        Arc::new(move |request: RequestRecord| {
            let labels = ByRequest {
                class: request.class.as_str(),
                method: request.method,
                code: code(request.status),
            };
            let took = request.duration.as_secs_f64();
            metrics.requests.get_or_create(&labels).observe(took);
        })
    }

    /// Placements as they are now: their states with the reason of Ready, and what differs.
    pub fn set_placements<'a>(&self, statuses: impl Iterator<Item = &'a InstancePlacementStatus>) {
        self.placements.clear();
        self.drifted.clear();
        for status in statuses {
            let reason = conditions::reason(&status.conditions).unwrap_or(Reason::Progressing.as_str());
            let (reason, state) = (reason.to_owned(), state(&status.conditions));
            self.placements.get_or_create(&ByReason { reason, state }).inc();
            for drift in status.drift.iter().cloned() {
                self.drifted.get_or_create(&ByDrift { drift }).inc();
            }
        }
    }

    /// Moves that have not ended, as they are now.
    pub fn set_in_flight(&self, count: usize) {
        self.in_flight.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Servers, as they are now.
    pub fn set_servers(&self, servers: impl Iterator<Item = (String, String, bool)>) {
        self.servers.clear();
        for (namespace, server, up) in servers {
            let labels = ByServer { namespace, server };
            self.servers.get_or_create(&labels).set(i64::from(up));
        }
    }

    /// Whether this process leads.
    pub fn set_leader(&self, leads: bool) {
        self.leader.set(i64::from(leads));
    }

    /// How many objects wait.
    pub fn set_depth(&self, queue: &'static str, depth: usize) {
        let depth = i64::try_from(depth).unwrap_or(i64::MAX);
        self.depths.get_or_create(&ByQueue { queue }).set(depth);
    }

    /// Everything in the form that Prometheus reads.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Why a move did not succeed: a word of the fixed list, or none.
fn why(record: &Record) -> &'static str {
    let status = &record.status;
    if status.outcome() == Some(Outcome::Succeeded) {
        return "None";
    }
    let undone = status.undo.as_ref().map(|u| u.reason.as_str());
    let said = undone.or(status.last_error.as_ref().map(|e| e.reason.as_str()));
    said.and_then(Reason::parse).map_or("None", Reason::as_str)
}

fn state(all: &[Condition]) -> &'static str {
    let is = |kind| find(all, kind).is_some_and(|c| c.status == "True");
    match (is(READY), is(STALLED), is(RECONCILING)) {
        (true, _, _) => "Ready",
        (false, true, _) => "Stalled",
        (false, false, true) => "InProgress",
        (false, false, false) => "Waiting",
    }
}

fn code(status: Option<u16>) -> &'static str {
    match status.map(|s| s / 100) {
        Some(1) => "1xx",
        Some(2) => "2xx",
        Some(3) => "3xx",
        Some(4) => "4xx",
        Some(_) => "5xx",
        None => "none",
    }
}
