//! `InstanceMove`: one attempt to move an instance. Its spec is the plan that was decided, its status the durable record
//! from which any controller can finish or undo the move, alone and without the placement.
//!
//! Times are kept to the microsecond, since downtime is measured with them across a restart of the controller.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::is_false;
use crate::placement::{Live, Warm};
use crate::{
    Condition, Estimate, GoDuration, GuardPair, InstanceType, Location, Method, MicroTime, OperationRef, Outcome,
    Overrides, Power, Snapshots, Step, Stop, Transfer, schema,
};

/// The plan that was decided. Nothing of it changes later, but `cancel`.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "InstanceMove",
    plural = "instancemoves",
    shortname = "imove",
    category = "berth",
    namespaced,
    derive = "PartialEq",
    status = "InstanceMoveStatus",
    doc = "One attempt to move an instance, made by the controller: the plan, and the record of how far it is.",
    printcolumn(name = "Method", type_ = "string", json_path = ".spec.method"),
    printcolumn(name = "From", type_ = "string", json_path = ".spec.from.server"),
    printcolumn(name = "To", type_ = "string", json_path = ".spec.to.server"),
    printcolumn(name = "Step", type_ = "string", json_path = ".status.step"),
    printcolumn(name = "Progress", type_ = "integer", json_path = ".status.progress.percent"),
    printcolumn(name = "Downtime", type_ = "string", json_path = ".status.downtime"),
    printcolumn(name = "Outcome", type_ = "string", json_path = ".status.outcome"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(schema::same(&["placement", "placementUID", "attempt", "planDigest", "method", "guard", "transfer", "instanceType", "powerAfter", "snapshots", "stop", "keepSource"]))
        .message("the spec of an InstanceMove is the plan that was decided and cannot be changed, but for cancel: change the InstancePlacement"),
    validation = Rule::new(schema::same_optional(&["generation", "warm", "live", "timeout", "dropped", "estimate", "inputs", "targetFree", "onto"]))
        .message("the spec of an InstanceMove is the plan that was decided and cannot be changed, but for cancel: change the InstancePlacement"),
    validation = Rule::new(schema::same(&["from", "to"]))
        .message("from and to of an InstanceMove cannot be changed: change spec.target of the InstancePlacement"),
    validation = Rule::new(schema::same_optional(&["overrides"]))
        .message("overrides of an InstanceMove cannot be changed: change those of the InstancePlacement"),
    validation = Rule::new("!(has(oldSelf.cancel) && oldSelf.cancel) || (has(self.cancel) && self.cancel)")
        .message("cancel cannot be taken back: to move after all change the InstancePlacement or set its annotation reconcile.fluxcd.io/requestedAt"),
)]
pub struct InstanceMoveSpec {
    /// Name of the InstancePlacement.
    #[schemars(length(min = 1, max = 253))]
    pub placement: String,
    /// Uid of the InstancePlacement. A record whose placement of that uid is gone is closed or finished by itself.
    #[serde(rename = "placementUID")]
    #[schemars(length(min = 1, max = 64))]
    pub placement_uid: String,
    /// Number of this attempt; only the highest of a placement acts.
    #[schemars(range(min = 1))]
    pub attempt: i64,
    /// The metadata.generation of the placement that it was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
    /// Digest of the plan.
    #[schemars(length(max = 80))]
    pub plan_digest: String,
    /// Live, Warm or Cold.
    pub method: Method,
    /// What keeps the copy that may not run from being started, on each side.
    #[serde(default)]
    pub guard: GuardPair,
    /// Way of the data: Pull, Push, Relay, Backup, or Internal where the server or cluster moves it itself.
    pub transfer: Transfer,
    /// Container or VirtualMachine. The controller always sets it.
    #[serde(default)]
    pub instance_type: InstanceType,
    /// Where the instance is.
    pub from: MoveEnd,
    /// Where it goes.
    pub to: MoveEnd,
    /// Whether it runs afterwards: Running or Stopped.
    pub power_after: Power,
    /// Whether snapshots travel: Include or Exclude.
    #[serde(default)]
    pub snapshots: Snapshots,
    /// How the instance is stopped.
    #[serde(default)]
    #[schemars(extend("default" = {"timeout": "60s", "force": false}))]
    pub stop: Stop,
    /// Limits of a Warm move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<Warm>,
    /// Limits of a Live move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<Live>,
    /// Undone if not committed within this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<GoDuration>,
    /// What it was expected to take when it was decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Estimate>,
    /// Stands for what the method depends on: if it fails it is not tried again until this changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 80))]
    pub inputs: Option<String>,
    /// Bytes that were free on the target's pool when it was decided: if the data fill it, they are not sent again before
    /// more are free. Absent: the server does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub target_free: Option<i64>,
    /// Changes to the configuration, resolved.
    #[serde(default, skip_serializing_if = "Overrides::is_empty")]
    pub overrides: Overrides,
    /// Configuration keys that the target does not know: they are left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::texts")]
    pub dropped: Vec<String>,
    /// How long the stopped source is kept.
    #[serde(default, skip_serializing_if = "GoDuration::is_zero")]
    #[schemars(extend("default" = "0s"))]
    pub keep_source: GoDuration,
    /// The kept source of an earlier move that is on the target: it becomes the copy, so that only the difference is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub onto: Option<Onto>,
    /// Set it to true to have the move undone, if it is not yet committed. It cannot be taken back.
    #[serde(default, skip_serializing_if = "is_false")]
    pub cancel: bool,
}

/// A kept source, as it was seen when the move was decided.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Onto {
    /// Name of the InstanceMove that kept it.
    #[serde(rename = "move")]
    #[schemars(length(min = 1, max = 253))]
    pub record: String,
    /// Number of that attempt.
    #[schemars(range(min = 1))]
    pub attempt: i64,
    /// Its name on the target.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Its `last_used_at`. Another value: somebody started it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub last_used_at: Option<String>,
    /// Whether it is brought up to date. If not, it only makes room: another pool or another way of the data is asked for.
    #[serde(default)]
    pub refresh: bool,
}

/// One end of a move: a location on one particular server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MoveEnd {
    /// Name of the InstanceServer.
    #[schemars(length(min = 1, max = 253))]
    pub server: String,
    /// Fingerprint of that server. One that has another counts as unreachable for this move, and so does any if this is empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 64))]
    pub fingerprint: String,
    /// Cluster member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub member: Option<String>,
    /// Cluster group within which the cluster chooses the member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub group: Option<String>,
    /// Project.
    #[schemars(length(min = 1, max = 253))]
    pub project: String,
    /// Storage pool of the root disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub pool: Option<String>,
    /// Name of the instance.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// The instance's `volatile.uuid` (source only; it keeps it on the way).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub uuid: Option<String>,
}

impl MoveEnd {
    /// The place alone, without what identifies the server and the instance.
    pub fn location(&self) -> Location {
        Location {
            server: self.server.clone(),
            member: self.member.clone(),
            project: self.project.clone(),
            pool: self.pool.clone(),
            name: self.name.clone(),
        }
    }

    /// An end at a place on the server of that fingerprint.
    pub fn new(location: &Location, fingerprint: &str) -> Self {
        let Location {
            server,
            member,
            project,
            pool,
            name,
        } = location.clone();
        Self {
            server,
            fingerprint: fingerprint.to_owned(),
            member,
            group: None,
            project,
            pool,
            name,
            uuid: None,
        }
    }
}

/// The record of a move: what was done, what must be put back, how far it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceMoveStatus {
    /// The metadata.generation that this status was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Accepted, Marked, Precopied, Stopped, Transferred, Verified, Committed, Started, Retired, Cleaned; Restoring (live), Undoing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub step: Option<String>,
    /// How it ended: Succeeded, Undone, Cancelled or NeedsAttention. Absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub outcome: Option<String>,
    /// Ready is True once the move has ended well; its reason is the step or the outcome.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
    /// When it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<MicroTime>,
    /// When the guest was asked to shut down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_requested_at: Option<MicroTime>,
    /// When the source was found stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_at: Option<MicroTime>,
    /// When the target took over: from here on the move only goes forward.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub committed_at: Option<MicroTime>,
    /// When the instance was found running again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running_at: Option<MicroTime>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<MicroTime>,
    /// Until when the stopped source is kept. Absent: there is none, or not any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_until: Option<MicroTime>,
    /// Whether the kept source of an earlier move (`spec.onto`) became the copy. Absent: that is not decided yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopted: Option<bool>,
    /// The steps so far, each with its time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "atomic"))]
    pub steps: Vec<StepRecord>,
    /// How far the data are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Stopped plus frozen time, measured. Of a live move: how long neither server said that the guest runs, of a container
    /// from when CRIU began. That is rather too much than too little. Absent where nothing was seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<GoDuration>,
    /// How long both guests ran (live moves between independent servers), measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlap: Option<GoDuration>,
    /// Operations that run on the servers for this move.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub operations: Vec<OperationRef>,
    /// Names that only this move uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub names: Option<MoveNames>,
    /// What was changed for the move and is put back at its end.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["key"]))]
    pub put_back: Vec<PutBack>,
    /// Whether the instance ran when the move began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ran_before: Option<bool>,
    /// True if it was frozen when the move began, so that it stays so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_before: Option<bool>,
    /// The source's `last_used_at` after the stop, exactly as the server wrote it. Another value later: somebody started it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub last_used_at: Option<String>,
    /// Name of the copy whose transfer succeeded on both sides. Only such a copy is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub transferred: Option<String>,
    /// What was copied while the instance ran (Warm).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precopy: Option<Precopy>,
    /// Why it is being, or was, undone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<UndoCause>,
    /// A configuration key that the target turned out not to know; the next attempt leaves it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub refused_key: Option<String>,
    /// The last error, with the way to mend it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<MoveError>,
}

impl InstanceMoveStatus {
    /// The step; none recorded means Accepted, and `None` is a step that this program does not know.
    pub fn step(&self) -> Option<Step> {
        crate::present(&self.step).map_or(Some(Step::Accepted), Step::parse)
    }

    /// The outcome, if it has ended with one that this program knows.
    pub fn outcome(&self) -> Option<Outcome> {
        crate::present(&self.outcome).and_then(Outcome::parse)
    }
}

/// A step and when it was reached.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StepRecord {
    /// The step.
    #[schemars(length(max = 64))]
    pub step: String,
    /// When it was reached.
    pub at: MicroTime,
}

/// How far the data are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// Of the whole transfer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub percent: Option<i32>,
    /// Bytes sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub bytes: Option<i64>,
    /// Bytes to send, as far as known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub total_bytes: Option<i64>,
    /// Bytes per second at present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub bytes_per_second: Option<i64>,
    /// Time that the rest is expected to take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta: Option<GoDuration>,
    /// Round of a Warm move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub round: Option<i32>,
}

/// What a Warm move copied so far, and what it must clean up.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Precopy {
    /// The rounds that ended well, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128), extend("x-kubernetes-list-type" = "atomic"))]
    pub rounds: Vec<Round>,
    /// Names of the temporary snapshots, each recorded before it was asked for; deleted on both sides at the end.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::texts")]
    pub snapshots: Vec<String>,
    /// How long the guest was frozen for it, measured. Part of the downtime.
    #[serde(default, skip_serializing_if = "GoDuration::is_zero")]
    #[schemars(extend("default" = "0s"))]
    pub frozen: GoDuration,
    /// Whether the last round, made after the stop, has ended well.
    #[serde(default, skip_serializing_if = "is_false")]
    pub complete: bool,
}

/// One round of copying.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Round {
    /// Bytes sent, as far as the servers told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub bytes: Option<i64>,
    /// How long it took.
    pub duration: GoDuration,
}

/// Names that only one move uses, recorded before the first use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MoveNames {
    /// Name of the copy on the target until it takes its real one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub incoming: Option<String>,
    /// Name of the backup on the source, while there may be one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub backup: Option<String>,
    /// Name of the source right before its deletion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub retired: Option<String>,
    /// Name of the kept source right before its deletion, when its time is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub leaving: Option<String>,
}

/// A key that was changed and its former value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PutBack {
    /// The key.
    #[schemars(length(max = 253))]
    pub key: String,
    /// Its former value; absent if it was unset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub value: Option<String>,
}

/// Why a move is undone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct UndoCause {
    /// Why, in one word.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// Why, in a sentence.
    #[schemars(length(max = 4096))]
    pub message: String,
    /// What a person can do, as a command where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub fix: Option<String>,
    /// Whether a person asked for it (`cancel`): the outcome is then Cancelled.
    #[serde(default, skip_serializing_if = "is_false")]
    pub cancelled: bool,
}

/// An error on the way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MoveError {
    /// What went wrong, in one word.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// What went wrong, in a sentence.
    #[schemars(length(max = 4096))]
    pub message: String,
    /// What mends it, usually a command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub fix: Option<String>,
    /// When it happened last, to the second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<MicroTime>,
    /// How often it happened in a row; again within a second is the same time.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub attempts: i32,
}
