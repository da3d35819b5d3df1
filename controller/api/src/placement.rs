//! `InstancePlacement`: where one instance should live.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use crate::placement_status::{
    Blocker, BoundInstance, CurrentMove, Drift, FailedMethod, InstancePlacementStatus, KeptSource, MoveSummary, Plan,
    PlanMethod, Rejected,
};
use crate::schema::{self, set};
use crate::{GoDuration, Method, Overrides, Snapshots, Stop, Target, TransferMode, present};

/// The name that counts: the one set, else that of the object.
fn name(object: &str) -> String {
    let name = format!("{object}.spec.instance.name");
    format!("({} ? {name} : {object}.metadata.name)", set(&name))
}

/// The project that counts: the one set, else `default`.
fn project(object: &str) -> String {
    let project = format!("{object}.spec.instance.project");
    format!("({} ? {project} : 'default')", set(&project))
}

/// Where one instance should live, and how it may be brought there.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "InstancePlacement",
    plural = "instanceplacements",
    shortname = "iplace",
    category = "berth",
    namespaced,
    derive = "PartialEq",
    status = "InstancePlacementStatus",
    doc = "Where one Incus or LXD instance should live. Deleting it never touches the instance.",
    validation = Rule::new("size(self.metadata.name) <= 63")
        .message("metadata.name must not be longer than 63 characters: choose a shorter one and set spec.instance.name"),
    validation = Rule::new(format!("{} || (!self.metadata.name.contains('.') && !self.metadata.name.matches('^[0-9]+$'))", set("self.spec.instance.name")))
        .message("metadata.name is no valid instance name (letters, digits and dashes, not only digits): set spec.instance.name"),
    validation = Rule::new(format!("{} == {}", name("self"), name("oldSelf")))
        .message("spec.instance.name cannot be changed: to rename the instance set spec.target.name, for another instance create another placement"),
    validation = Rule::new(format!("{} == {}", project("self"), project("oldSelf")))
        .message("spec.instance.project cannot be changed: to move the instance set spec.target.project, for another instance create another placement"),
    validation = Rule::new(format!("!{} || ({} && self.spec.instance.uuid == oldSelf.spec.instance.uuid)", set("oldSelf.spec.instance.uuid"), set("self.spec.instance.uuid")))
        .message("spec.instance.uuid can be added, but not changed or removed: for another instance create another placement"),
    printcolumn(name = "Instance", type_ = "string", json_path = ".status.location.name"),
    printcolumn(name = "Server", type_ = "string", json_path = ".status.location.server"),
    printcolumn(name = "Target", type_ = "string", json_path = ".status.target"),
    printcolumn(name = "Power", type_ = "string", json_path = ".status.instance.power"),
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
    printcolumn(name = "Move%", type_ = "integer", json_path = ".status.currentMove.percent"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Member",
        type_ = "string",
        json_path = ".status.location.member",
        priority = 1
    ),
    printcolumn(name = "Pool", type_ = "string", json_path = ".status.location.pool", priority = 1),
    printcolumn(
        name = "Method",
        type_ = "string",
        json_path = ".status.currentMove.method",
        priority = 1
    ),
    printcolumn(
        name = "Message",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].message",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(schema::one_pool())
        .message("the pool of the root disk is set twice: remove overrides.devices.root.pool and keep target.pool"),
    validation = Rule::new("self.methods.all(m, self.methods.exists_one(other, other == m))")
        .message("methods names a method twice: keep each once, in order of preference"),
)]
pub struct InstancePlacementSpec {
    /// Which instance is meant. Its name and project cannot be changed later.
    #[serde(default, skip_serializing_if = "InstanceRef::is_empty")]
    pub instance: InstanceRef,
    /// Where the instance should be. Only the server is required.
    pub target: Target,
    /// Preserve leaves the instance as it is, Running starts it, Stopped stops it.
    #[serde(default)]
    pub power_state: PowerState,
    /// Allowed methods (Live, Warm, Cold), in order of preference. The first that is possible is used; `[Live]` means: never stop it.
    #[serde(default = "default_methods")]
    #[schemars(length(min = 1, max = 3), extend("x-kubernetes-list-type" = "atomic"))]
    pub methods: Vec<Method>,
    /// Try Live for containers, too. Few real containers survive CRIU.
    #[serde(default)]
    pub criu: bool,
    /// Way of the data between servers: Pull, Push, Relay or Backup. Auto tries them in this order.
    #[serde(default)]
    pub transfer: TransferMode,
    /// Include: snapshots travel with the instance. Exclude: they are left out, and deleted with the source.
    #[serde(default)]
    pub snapshots: Snapshots,
    /// How the instance is stopped where that is needed.
    #[serde(default)]
    #[schemars(extend("default" = {"timeout": "60s", "force": false}))]
    pub stop: Stop,
    /// Limits of a Warm move.
    #[serde(default)]
    pub warm: Warm,
    /// Limits of a Live move.
    #[serde(default)]
    pub live: Live,
    /// A Warm or Cold move that is expected to stop the instance for longer than this waits and says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_downtime: Option<GoDuration>,
    /// A move that is not committed by then is undone.
    #[serde(default = "default_timeout")]
    #[schemars(extend("default" = "6h"))]
    pub timeout: GoDuration,
    /// Changes to the instance's configuration. What is declared here is kept so.
    #[serde(default, skip_serializing_if = "Overrides::is_empty")]
    pub overrides: Overrides,
    /// Times in which moves may stop the instance. None: at any time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "atomic"))]
    pub windows: Vec<Window>,
    /// Manual: every plan waits until its digest is in the annotation berth.dev/approve.
    #[serde(default)]
    pub approval: Approval,
    /// Observe: report drift and the plan, change nothing.
    #[serde(default)]
    pub mode: Mode,
    /// Start nothing new. A move in hand is undone, or completed if it is past the point of no return.
    #[serde(default)]
    pub suspend: bool,
    /// How long the stopped source is kept after a move; the way back then sends only the difference.
    #[serde(default)]
    #[schemars(extend("default" = "0s"))]
    pub keep_source: GoDuration,
}

fn default_methods() -> Vec<Method> {
    vec![Method::Live, Method::Warm, Method::Cold]
}

fn default_timeout() -> GoDuration {
    GoDuration::from_secs(6 * 3600)
}

impl Default for InstancePlacementSpec {
    fn default() -> Self {
        Self {
            instance: InstanceRef::default(),
            target: Target::default(),
            power_state: PowerState::default(),
            methods: default_methods(),
            criu: false,
            transfer: TransferMode::default(),
            snapshots: Snapshots::default(),
            stop: Stop::default(),
            warm: Warm::default(),
            live: Live::default(),
            max_downtime: None,
            timeout: default_timeout(),
            overrides: Overrides::default(),
            windows: Vec::new(),
            approval: Approval::default(),
            mode: Mode::default(),
            suspend: false,
            keep_source: GoDuration::ZERO,
        }
    }
}

impl InstancePlacement {
    /// Name of the instance that is meant: `spec.instance.name`, else the name of the placement.
    pub fn instance_name(&self) -> &str {
        present(&self.spec.instance.name)
            .or(self.metadata.name.as_deref())
            .unwrap_or_default()
    }

    /// Project in which the instance is looked for: `spec.instance.project`, else `default`.
    pub fn instance_project(&self) -> &str {
        present(&self.spec.instance.project).unwrap_or("default")
    }

    /// Name that the instance should have: `spec.target.name`, else the one it is looked for under.
    pub fn target_name(&self) -> &str {
        present(&self.spec.target.name).unwrap_or_else(|| self.instance_name())
    }
}

/// Which instance is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(schema::instance_name_rule("name"))
        .message("name must be one that Incus accepts: 1 to 63 letters, digits and dashes, no dash at either end, not only digits"),
    validation = Rule::new(format!("!{} || self.uuid.matches('^[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}$')", set("self.uuid")))
        .message("uuid must be the instance's volatile.uuid, in lower case: `incus config get NAME volatile.uuid`"),
)]
pub struct InstanceRef {
    /// Name of the instance. Default: the name of this object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub name: Option<String>,
    /// Project in which it is looked for. Default: the project named default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub project: Option<String>,
    /// The instance's `volatile.uuid`: with it no other instance of the same name is ever taken. May be added once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub uuid: Option<String>,
    /// Name of the InstanceServer whose instance is meant, where several have one of this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub server: Option<String>,
}

impl InstanceRef {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Wanted power state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PowerState {
    /// As it is.
    #[default]
    Preserve,
    /// It runs.
    Running,
    /// It is stopped.
    Stopped,
}

/// Whether plans wait for a person.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Approval {
    /// They do not.
    #[default]
    Auto,
    /// Until their digest is in the annotation `berth.dev/approve`.
    Manual,
}

/// Whether anything is changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// What differs is mended.
    #[default]
    Enforce,
    /// What differs is reported.
    Observe,
}

/// Limits of a Warm move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Warm {
    /// Rounds of copying at most, before the instance is stopped.
    #[schemars(range(min = 1, max = 100))]
    pub max_rounds: i32,
    /// The instance is stopped as soon as the last difference is expected to take no longer than this.
    #[schemars(extend("default" = "2s"))]
    pub downtime_goal: GoDuration,
}

impl Default for Warm {
    fn default() -> Self {
        Self {
            max_rounds: 5,
            downtime_goal: GoDuration::from_secs(2),
        }
    }
}

/// Limits of a Live move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Live {
    /// The move is undone if it takes longer.
    #[schemars(extend("default" = "1h"))]
    pub timeout: GoDuration,
    /// How long both guests may run at the end of a live move between independent servers.
    #[schemars(extend("default" = "10s"))]
    pub max_overlap: GoDuration,
    /// Containers (CRIU): copy memory in rounds before the freeze.
    pub incremental_memory: bool,
    /// Containers (CRIU): percentage of memory that is to be in sync before the freeze.
    #[schemars(range(min = 1, max = 99))]
    pub goal: i32,
    /// Containers (CRIU): rounds of copying memory at most.
    #[schemars(range(min = 1, max = 999))]
    pub iterations: i32,
}

impl Default for Live {
    fn default() -> Self {
        Self {
            timeout: GoDuration::from_secs(3600),
            max_overlap: GoDuration::from_secs(10),
            incremental_memory: false,
            goal: 70,
            iterations: 10,
        }
    }
}

/// A time, coming round again and again, in which moves may stop the instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.schedule.matches('^[^ ]+( [^ ]+){4}$')")
        .message("schedule must be five fields with one space between: minute, hour, day of month, month, day of week, for example 0 2 * * 6"),
    validation = Rule::new("duration(self.duration) >= duration('1m')").message("duration must be at least 1m"),
)]
pub struct Window {
    /// When it opens, in cron's five fields: minute, hour, day of month, month, day of week. `0 2 * * 6`: Saturdays at two.
    #[schemars(length(min = 9, max = 128))]
    pub schedule: String,
    /// How long it stays open.
    pub duration: GoDuration,
    /// Time zone of the schedule, for example Europe/Berlin. Default: UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub time_zone: Option<String>,
    /// Methods that need this window. Default: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 3), extend("x-kubernetes-list-type" = "atomic"))]
    pub methods: Vec<Method>,
}
