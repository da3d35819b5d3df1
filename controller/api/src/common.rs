//! Types that several kinds share: places, methods, overrides, guards.
//!
//! Data only, apart from small readers such as [`present`]; what the values mean for a move is decided in berth-core.

use std::collections::BTreeMap;

pub use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::GoDuration;
use crate::schema::{self, set};

/// The value of an optional text: an empty one means absent.
pub fn present(value: &Option<String>) -> Option<&str> {
    value.as_deref().filter(|text| !text.is_empty())
}

/// For `skip_serializing_if`: whether a flag is off.
pub(crate) fn is_false(value: &bool) -> bool {
    !value
}

/// Name of another object in the same namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Name {
    /// Name of the object, in the same namespace.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Where an instance is, or is to be, with everything resolved.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Location {
    /// Name of the InstanceServer.
    #[schemars(length(max = 253))]
    pub server: String,
    /// Cluster member; absent on a server that is no cluster, or where the cluster chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub member: Option<String>,
    /// Project.
    #[schemars(length(max = 253))]
    pub project: String,
    /// Storage pool of the root disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub pool: Option<String>,
    /// Name of the instance.
    #[schemars(length(max = 253))]
    pub name: String,
}

/// Where an instance should be. Only the server is required; what is not set stays as it is and is never drift.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(format!("!({} && {})", set("self.member"), set("self.group")))
        .message("set either member (this one) or group (any member of it), not both"),
    validation = Rule::new(schema::instance_name_rule("name"))
        .message("name must be one that Incus accepts: 1 to 63 letters, digits and dashes, no dash at either end, not only digits"),
)]
pub struct Target {
    /// Name of the InstanceServer, in the same namespace.
    #[schemars(length(min = 1, max = 253))]
    pub server: String,
    /// Cluster member. Excludes `group`; only for clusters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub member: Option<String>,
    /// Cluster group: any member of it will do. Excludes `member`; only for clusters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub group: Option<String>,
    /// Project. Default: the one where the instance is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub project: Option<String>,
    /// Storage pool of the root disk. Default: the pool of the same name, else the one that the target's profiles name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub pool: Option<String>,
    /// New name of the instance. Default: the name it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub name: Option<String>,
}

/// How an instance moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Method {
    /// The running state moves too.
    Live,
    /// Copied while it runs, stopped only for the last difference.
    Warm,
    /// Stopped, moved, started.
    #[default]
    Cold,
}

impl Method {
    /// The name as written in objects.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Live => "Live",
            Self::Warm => "Warm",
            Self::Cold => "Cold",
        }
    }
}

/// The way that the user allows for the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum TransferMode {
    /// Pull, push, relay, backup: the first that the two servers allow.
    #[default]
    Auto,
    /// The target fetches from the source.
    Pull,
    /// The source sends to the target.
    Push,
    /// Through the controller.
    Relay,
    /// Exported and imported.
    Backup,
}

/// The way that was decided for the data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Transfer {
    /// The target fetches from the source.
    #[default]
    Pull,
    /// The source sends to the target.
    Push,
    /// Through the controller.
    Relay,
    /// Exported and imported.
    Backup,
    /// The server or cluster moves it itself.
    Internal,
}

impl Transfer {
    /// The name as written in objects.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pull => "Pull",
            Self::Push => "Push",
            Self::Relay => "Relay",
            Self::Backup => "Backup",
            Self::Internal => "Internal",
        }
    }
}

/// Whether snapshots travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Snapshots {
    /// They travel with the instance.
    #[default]
    Include,
    /// They are left out, and deleted with the source.
    Exclude,
}

/// Power of an instance after a move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Power {
    /// It runs.
    Running,
    /// It is stopped.
    #[default]
    Stopped,
}

/// Kind of an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum InstanceType {
    /// A container.
    #[default]
    Container,
    /// A virtual machine.
    VirtualMachine,
}

/// What keeps the copy that may not run from being started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum GuardKind {
    /// A device that cannot start.
    Device,
    /// The server's `security.protection.start`.
    ProtectionKey,
    /// A name that nobody knows.
    Name,
    /// Nothing: the server itself sees to it.
    #[default]
    None,
}

/// The guards of a move, one for each side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GuardPair {
    /// Guard of the source, from its stop until it is deleted: Device, ProtectionKey, Name or None.
    pub source: GuardKind,
    /// Guard of the copy on the target, from its creation until it takes over: Device, ProtectionKey, Name or None.
    pub target: GuardKind,
}

/// How an instance is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("duration(self.timeout) >= duration('1s')")
        .message("stop.timeout must be at least 1s, since none at all would kill the guest; to allow that after the time-out set stop.force: true"),
)]
pub struct Stop {
    /// How long the guest may take to shut down, at least 1s. After that the move is undone, or the guest killed with `force`.
    #[serde(default = "Stop::default_timeout")]
    #[schemars(extend("default" = "60s"))]
    pub timeout: GoDuration,
    /// Kill the guest if it has not shut down in time.
    #[serde(default)]
    pub force: bool,
}

impl Stop {
    fn default_timeout() -> GoDuration {
        GoDuration::from_secs(60)
    }
}

impl Default for Stop {
    fn default() -> Self {
        Self {
            timeout: Self::default_timeout(),
            force: false,
        }
    }
}

/// Changes to the configuration on the way. The declared keys are kept so afterwards; dropping one later reverts nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!(has(self.noProfiles) && self.noProfiles && has(self.profiles) && size(self.profiles) > 0)")
        .message("set either profiles or noProfiles: true, not both"),
    validation = Rule::new("!has(self.config) || self.config.all(k, !k.startsWith('volatile.') && !k.startsWith('user.berth.'))")
        .message("config must not hold volatile.* (the server's own) or user.berth.* (Berth's own): remove these keys"),
    validation = Rule::new("!has(self.removeConfig) || self.removeConfig.all(k, !k.startsWith('volatile.') && !k.startsWith('user.berth.'))")
        .message("removeConfig must not hold volatile.* (the server's own) or user.berth.* (Berth's own): remove these keys"),
    validation = Rule::new("!has(self.devices) || !('berth-guard' in self.devices)")
        .message("devices must not hold berth-guard, which is Berth's own: give the device another name"),
    validation = Rule::new("!has(self.removeDevices) || !self.removeDevices.exists(d, d == 'berth-guard' || d == 'root')")
        .message("removeDevices must not hold berth-guard, which is Berth's own, or root, the instance's disk"),
    validation = Rule::new("!has(self.config) || !has(self.removeConfig) || !self.removeConfig.exists(k, k in self.config)")
        .message("a key is both in config and in removeConfig: keep it in one of them"),
    validation = Rule::new("!has(self.devices) || !has(self.removeDevices) || !self.removeDevices.exists(d, d in self.devices)")
        .message("a device is both in devices and in removeDevices: keep it in one of them"),
)]
pub struct Overrides {
    /// Configuration keys and their values, all of them texts: `limits.cpu: "4"`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "schema::config")]
    pub config: BTreeMap<String, String>,
    /// Devices by name. Keys are merged over the instance's device of that name; a different `type` replaces it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "schema::devices")]
    pub devices: BTreeMap<String, BTreeMap<String, String>>,
    /// Configuration keys of the instance's own to remove.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::name_set")]
    pub remove_config: Vec<String>,
    /// Devices of the instance's own to remove.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::name_set")]
    pub remove_devices: Vec<String>,
    /// Profiles, in order, instead of those that the instance has. Excludes `noProfiles`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "schema::names")]
    pub profiles: Vec<String>,
    /// No profiles at all. Excludes `profiles`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub no_profiles: bool,
}

impl Overrides {
    /// Whether nothing is overridden.
    pub fn is_empty(&self) -> bool {
        let Self {
            config,
            devices,
            remove_config,
            remove_devices,
            profiles,
            no_profiles,
        } = self;
        config.is_empty()
            && devices.is_empty()
            && remove_config.is_empty()
            && remove_devices.is_empty()
            && profiles.is_empty()
            && !no_profiles
    }
}

/// What a move is expected to take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Estimate {
    /// Bytes to send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub bytes: Option<i64>,
    /// From the start to the end of the move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duration: Option<GoDuration>,
    /// Stopped or frozen time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<GoDuration>,
}

/// An operation on a server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OperationRef {
    /// Name of the InstanceServer on which it runs.
    #[schemars(length(max = 253))]
    pub server: String,
    /// Id of the operation, as `incus operation list` shows it.
    #[schemars(length(max = 253))]
    pub id: String,
}
