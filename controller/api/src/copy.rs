//! `InstanceCopy`: a second copy of an instance, kept elsewhere and refreshed. It is never started by this resource.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::is_false;
use crate::moves::{MoveEnd, MoveError};
use crate::schema::set;
use crate::{
    Condition, GoDuration, GuardKind, MicroTime, Overrides, Snapshots, Target, Time, Transfer, TransferMode, schema,
};

const SOURCE_TEXTS: &[(&str, &str)] = &[
    ("server", ""),
    ("instance", ""),
    ("project", "default"),
    ("placement", ""),
];
const TARGET_TEXTS: &[(&str, &str)] = &[
    ("server", ""),
    ("member", ""),
    ("group", ""),
    ("project", ""),
    ("pool", ""),
    ("name", ""),
];

/// What is copied, where to and how often.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "InstanceCopy",
    plural = "instancecopies",
    shortname = "icopy",
    category = "berth",
    namespaced,
    derive = "PartialEq",
    status = "InstanceCopyStatus",
    validation = Rule::new("size(self.metadata.name) <= 63")
        .message("metadata.name must not be longer than 63 characters: choose a shorter one"),
    doc = "A second, stopped copy of an instance, kept on another server and refreshed.",
    printcolumn(name = "Source", type_ = "string", json_path = ".status.source"),
    printcolumn(name = "Target", type_ = "string", json_path = ".status.target"),
    printcolumn(name = "Last-Refresh", type_ = "date", json_path = ".status.lastRefresh.finishedAt"),
    printcolumn(name = "Duration", type_ = "string", json_path = ".status.lastRefresh.duration"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(schema::same_texts("source", SOURCE_TEXTS))
        .message("source cannot be changed: for another source create another InstanceCopy"),
    validation = Rule::new(schema::same_texts("target", TARGET_TEXTS))
        .message("target cannot be changed: for another target create another InstanceCopy"),
    validation = Rule::new(schema::one_pool())
        .message("the pool of the root disk is set twice: remove overrides.devices.root.pool and keep target.pool"),
)]
pub struct InstanceCopySpec {
    /// What is copied: either `server` and `instance`, or `placement`. Cannot be changed later.
    pub source: CopySource,
    /// Where the copy is kept. `name` defaults to that of the source. Cannot be changed later.
    pub target: Target,
    /// How often the copy is refreshed. Absent: copied once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refresh: Option<Refresh>,
    /// Include: snapshots are copied, too. Exclude: they are left out.
    #[serde(default)]
    pub snapshots: Snapshots,
    /// Changes to the copy's configuration.
    #[serde(default, skip_serializing_if = "Overrides::is_empty")]
    pub overrides: Overrides,
    /// Way of the data between servers: Pull, Push, Relay or Backup. Auto tries them in this order.
    #[serde(default)]
    pub transfer: TransferMode,
    /// Do not refresh.
    #[serde(default)]
    pub suspend: bool,
    /// What becomes of the copy when this object is deleted: Orphan leaves it, Delete deletes it.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}

/// Rule: either a placement and nothing else, or a server and an instance.
fn one_source() -> String {
    let [server, instance, project, placement] =
        ["server", "instance", "project", "placement"].map(|f| set(&format!("self.{f}")));
    format!("{placement} ? !({server} || {instance} || {project}) : ({server} && {instance})")
}

/// What is copied: either `server` and `instance`, or `placement`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(one_source())
        .message("source needs either server and instance (and project), or placement, not both"),
)]
pub struct CopySource {
    /// Name of the InstanceServer that the source is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub server: Option<String>,
    /// Name of the source instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub instance: Option<String>,
    /// Project of the source instance. Default: the project named default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub project: Option<String>,
    /// Name of an InstancePlacement: its instance, wherever that lives now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub placement: Option<String>,
}

/// How often a copy is refreshed: either `interval` or `schedule`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(format!("has(self.interval) != {}", set("self.schedule")))
        .message("refresh needs exactly one of interval and schedule"),
    validation = Rule::new("!has(self.interval) || duration(self.interval) >= duration('1s')")
        .message("refresh.interval must be at least 1s"),
    validation = Rule::new(format!("!{} || self.schedule.matches('^[^ ]+( [^ ]+){{4}}$')", set("self.schedule")))
        .message("schedule must be five fields with one space between: minute, hour, day of month, month, day of week, for example 0 2 * * *"),
)]
pub struct Refresh {
    /// Time between the starts of two refreshes. Excludes `schedule`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<GoDuration>,
    /// When to refresh, in cron's five fields and UTC: minute, hour, day of month, month, day of week. Excludes `interval`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub schedule: Option<String>,
    /// Leave out snapshots that are older than the newest one of the copy.
    #[serde(default, skip_serializing_if = "is_false")]
    pub exclude_older: bool,
}

/// What becomes of a copy when its object is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DeletionPolicy {
    /// It stays.
    #[default]
    Orphan,
    /// It is deleted.
    Delete,
}

/// What became of the copy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceCopyStatus {
    /// The metadata.generation that this status was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready always; Reconciling and Stalled only while true.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
    /// `volatile.uuid` of the copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub uuid: Option<String>,
    /// What is copied, in short: rack-a/db.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub source: Option<String>,
    /// Where the copy is kept, in short: rack-b/db-standby.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub target: Option<String>,
    /// Name of the copy between refreshes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub name: Option<String>,
    /// The last refresh that was completed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_refresh: Option<RefreshRecord>,
    /// When the next refresh is due.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_refresh: Option<Time>,
    /// `volatile.uuid` of the source. An instance of another one is never copied onto this copy.
    #[serde(default, rename = "sourceUUID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub source_uuid: Option<String>,
    /// The copy's `last_used_at` after the last refresh. Another value later: somebody started it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub last_used_at: Option<String>,
    /// Name of the copy while it is being made or refreshed; nobody else ever uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub incoming: Option<String>,
    /// The snapshot of Berth's own that source and copy have in common: the next refresh sends what changed since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub snapshot: Option<String>,
    /// What is being done for the copy; absent between refreshes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<CopyWork>,
    /// Why the last attempt did not work; absent after one that did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<MoveError>,
    /// When it is tried again after a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Time>,
    /// The last value of the annotation reconcile.fluxcd.io/requestedAt that was acted upon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub last_handled_reconcile_at: Option<String>,
}

/// A copy that is being made, refreshed or removed: everything that is needed to end it well after a crash.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CopyWork {
    /// How far it is: Accepted, Held, Snapshotted, Transferred, Named, Undoing or Removing.
    #[schemars(length(max = 32))]
    pub step: String,
    /// When it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<MicroTime>,
    /// What is copied, where it was found.
    pub from: MoveEnd,
    /// Where the copy is kept.
    pub to: MoveEnd,
    /// Way of the data.
    pub transfer: Transfer,
    /// What keeps the copy from being started meanwhile.
    #[serde(default)]
    pub guard: GuardKind,
    /// Keys of the source that the target does not know, and that are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::texts")]
    pub dropped: Vec<String>,
    /// Whether an existing copy is brought up to date.
    #[serde(default, skip_serializing_if = "is_false")]
    pub refresh: bool,
    /// The snapshot of the source that is taken for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub snapshot: Option<String>,
    /// Whether the copy is made from that snapshot alone: the source, which runs, is not held up meanwhile.
    #[serde(default, skip_serializing_if = "is_false")]
    pub from_snapshot: bool,
    /// Whether a transfer was begun: until one is complete the copy may be a mixture of old and new.
    #[serde(default, skip_serializing_if = "is_false")]
    pub sent: bool,
    /// Bytes sent, as far as the servers tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub bytes: Option<i64>,
}

/// A refresh that was completed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RefreshRecord {
    /// When it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// Bytes sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub bytes: Option<i64>,
    /// How long it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<GoDuration>,
}
