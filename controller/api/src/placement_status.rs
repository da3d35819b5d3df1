//! Status of an `InstancePlacement`: what was found, what differs, the plan, the last moves.
//!
//! Written by the controller alone; part of module `placement` for everybody else.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Condition, Estimate, GoDuration, GuardPair, InstanceType, Location, Method, Time, Transfer, schema};

/// What the controller found and does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstancePlacementStatus {
    /// The metadata.generation that this status was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready always; Reconciling, Stalled and LeftoverPending only while true.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::conditions")]
    pub conditions: Vec<Condition>,
    /// Where the instance is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<Location>,
    /// The instance that this placement is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<BoundInstance>,
    /// What differs: WrongServer, WrongMember, WrongGroup, WrongProject, WrongPool, WrongName, WrongPower, WrongConfig, WrongDevices, WrongProfiles.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::names")]
    pub drift: Vec<String>,
    /// What will be done about it. Present while something differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Plan>,
    /// The move in hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current_move: Option<CurrentMove>,
    /// Where it should be, in short: rack-b/node-3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub target: Option<String>,
    /// The last five moves, newest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 5), extend("x-kubernetes-list-type" = "atomic"))]
    pub moves: Vec<MoveSummary>,
    /// Stopped sources of earlier moves that are kept (`spec.keepSource`), oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "atomic"))]
    pub kept: Vec<KeptSource>,
    /// How many moves of this placement have been committed, and changes made where the instance is: an approval is for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub committed_moves: Option<i64>,
    /// Moves that failed in a row, since the last that succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub failures: Option<i64>,
    /// When the next move may start after a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Time>,
    /// Methods that are not tried again for the time being.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 3), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["method"]))]
    pub failed_methods: Vec<FailedMethod>,
    /// The last value of the annotation reconcile.fluxcd.io/requestedAt that was acted upon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub last_handled_reconcile_at: Option<String>,
}

/// The instance that a placement is bound to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BoundInstance {
    /// Its `volatile.uuid`, the same on every server it ever lives on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub uuid: Option<String>,
    /// Container or VirtualMachine.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub type_: Option<InstanceType>,
    /// Architecture, for example x86_64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub architecture: Option<String>,
    /// State as the server reports it: Running, Stopped, Frozen, Error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub power: Option<String>,
}

/// Something that differs from the spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Drift {
    /// On another server.
    WrongServer,
    /// On another cluster member.
    WrongMember,
    /// On a member outside the group.
    WrongGroup,
    /// In another project.
    WrongProject,
    /// In another storage pool.
    WrongPool,
    /// Under another name.
    WrongName,
    /// In another power state.
    WrongPower,
    /// A declared configuration key differs.
    WrongConfig,
    /// A declared device differs.
    WrongDevices,
    /// The declared profiles differ.
    WrongProfiles,
}

impl Drift {
    /// Everything that can differ.
    pub const ALL: [Self; 10] = [
        Self::WrongServer,
        Self::WrongMember,
        Self::WrongGroup,
        Self::WrongProject,
        Self::WrongPool,
        Self::WrongName,
        Self::WrongPower,
        Self::WrongConfig,
        Self::WrongDevices,
        Self::WrongProfiles,
    ];

    /// The name as written in objects.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::WrongServer => "WrongServer",
            Self::WrongMember => "WrongMember",
            Self::WrongGroup => "WrongGroup",
            Self::WrongProject => "WrongProject",
            Self::WrongPool => "WrongPool",
            Self::WrongName => "WrongName",
            Self::WrongPower => "WrongPower",
            Self::WrongConfig => "WrongConfig",
            Self::WrongDevices => "WrongDevices",
            Self::WrongProfiles => "WrongProfiles",
        }
    }

    /// The value of that name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|value| value.as_str() == text)
    }
}

/// What will be done about the difference.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// Stands for the whole plan. With `approval: Manual` write it into the annotation berth.dev/approve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 80))]
    pub digest: Option<String>,
    /// Live, Warm, Cold, or InPlace for what needs no move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<PlanMethod>,
    /// Way of the data: Pull, Push, Relay, Backup, or Internal where the server or cluster moves it itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// What keeps the copy that may not run from being started, on each side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<GuardPair>,
    /// Where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Location>,
    /// Where it will be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Location>,
    /// What it is expected to take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate: Option<Estimate>,
    /// Better methods that are not possible, each with the way to make it so.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "atomic"))]
    pub rejected: Vec<Rejected>,
    /// Keys and snapshots that will not travel.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::texts")]
    pub dropped: Vec<String>,
    /// Why nothing can be done at all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub blockers: Vec<Blocker>,
    /// What is worth knowing although nothing stands against it, for example a profile of one name that differs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub notes: Vec<Blocker>,
}

/// How a difference is mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PlanMethod {
    /// The running state moves too.
    Live,
    /// Copied while it runs, stopped only for the last difference.
    Warm,
    /// Stopped, moved, started.
    Cold,
    /// Changed where it is; no move.
    InPlace,
}

impl From<Method> for PlanMethod {
    fn from(method: Method) -> Self {
        match method {
            Method::Live => Self::Live,
            Method::Warm => Self::Warm,
            Method::Cold => Self::Cold,
        }
    }
}

/// A method that is not possible.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rejected {
    /// The method.
    pub method: Method,
    /// Why, in one word.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// Why, in a sentence.
    #[schemars(length(max = 4096))]
    pub message: String,
    /// What makes it possible, usually a command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub fix: Option<String>,
}

/// Something that keeps an instance from moving at all, or that is worth knowing about its move.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Blocker {
    /// Why, in one word.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// Why, in a sentence.
    #[schemars(length(max = 4096))]
    pub message: String,
    /// What removes it, usually a command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub fix: Option<String>,
}

/// The move in hand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CurrentMove {
    /// Name of the InstanceMove.
    #[schemars(length(max = 253))]
    pub name: String,
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub percent: Option<i32>,
    /// Live, Warm or Cold.
    pub method: Method,
}

/// A move that has ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MoveSummary {
    /// Name of the InstanceMove.
    #[schemars(length(max = 253))]
    pub name: String,
    /// Live, Warm or Cold.
    pub method: Method,
    /// Way of the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// Where it came from, in short: rack-a/node-1.
    #[schemars(length(max = 512))]
    pub from: String,
    /// Where it went, in short: rack-b/node-3.
    #[schemars(length(max = 512))]
    pub to: String,
    /// Succeeded, Undone, Cancelled or NeedsAttention.
    #[schemars(length(max = 64))]
    pub outcome: String,
    /// Why it did not succeed, in one word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub reason: Option<String>,
    /// Why, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 4096))]
    pub message: Option<String>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
    /// Stopped plus frozen time, measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<GoDuration>,
    /// The metadata.generation of the placement that it was made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
}

/// The stopped, guarded source of an earlier move. A move back to its server sends only what changed since.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KeptSource {
    /// Name of the InstanceMove that kept it.
    #[serde(rename = "move")]
    #[schemars(length(max = 253))]
    pub record: String,
    /// InstanceServer that has it.
    #[schemars(length(max = 253))]
    pub server: String,
    /// Its project.
    #[schemars(length(max = 253))]
    pub project: String,
    /// Its name there.
    #[schemars(length(max = 253))]
    pub name: String,
    /// When it is deleted. Absent: not as long as the placement is suspended or only observes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Time>,
}

/// A method that failed and is not tried again until its inputs change or a day has passed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailedMethod {
    /// The method.
    pub method: Method,
    /// Why, in one word.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// Why, in a sentence.
    #[schemars(length(max = 4096))]
    pub message: String,
    /// Stands for what the method depended on: versions and configuration.
    #[schemars(length(max = 80))]
    pub inputs: String,
    /// When it failed.
    pub at: Time,
}
