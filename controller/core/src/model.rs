//! Plain facts about servers and instances, as both products tell them. Nothing here decides or does anything;
//! source: the servers' answers, fact sheet sections 1.4, 9, 11 and 12.

mod inside;
mod inventory;
mod machine;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

pub use inside::Inside;
pub use inventory::Inventory;
pub use machine::{MIGRATION_INCREMENTAL, MIGRATION_STATEFUL, Processor, bytes, version_of};

/// One device of an instance: its keys and values (`type`, `pool`, `network`, …).
pub type Device = BTreeMap<String, String>;
/// The devices of an instance or profile by name.
pub type Devices = BTreeMap<String, Device>;
/// The configuration of an instance, profile or project.
pub type Config = BTreeMap<String, String>;

/// Which of the two products a server runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Product {
    /// Incus.
    Incus,
    /// Canonical LXD.
    Lxd,
}

impl Product {
    /// The name as it stands in `InstanceServer.status.product`.
    pub fn as_str(self) -> &'static str {
        match self {
            Product::Incus => "Incus",
            Product::Lxd => "LXD",
        }
    }

    /// The name of the product's command line client, for fixes that a person can paste.
    pub fn cli(self) -> &'static str {
        match self {
            Product::Incus => "incus",
            Product::Lxd => "lxc",
        }
    }
}

/// Something a server can do, decided from its `api_extensions` alone (never from its version).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Capability {
    /// `migration_vm_live`: the running state of a virtual machine can move.
    LiveMigration,
    /// `container_incremental_copy`: `refresh` sends only differences.
    IncrementalCopy,
    /// `instance_project_move`: moves into another project on the same server.
    TargetProject,
    /// `instance_pool_move`: moves onto another pool on the same server.
    TargetPool,
    /// `clustering_groups`: instances can be sent to a group of members.
    ClusterGroups,
    /// `instance_move_config`: overrides travel with a move inside the server, groups can be its target.
    MoveConfig,
    /// `instance_protection_start` (LXD): `security.protection.start` keeps an instance from being started.
    ProtectionStart,
    /// `operations_get_query_all_projects`: operations of all projects in one list.
    AllProjectsOperations,
    /// `explicit_trust_token` or Incus: the join token goes into the field `trust_token`.
    TrustTokenField,
    /// `container_push_target`: this server can push.
    Push,
    /// `direct_backup`: an export can be streamed.
    DirectBackup,
    /// `custom_volume_refresh_exclude_older_snapshots`: a refresh can leave out old snapshots.
    ExcludeOlder,
    /// `backup_override_config`: configuration can be overridden while a backup is imported.
    BackupOverrideConfig,
    /// `storage_live_migration`: a running virtual machine can move to another pool with its member.
    LivePool,
}

impl Capability {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Capability; 14] = [
        Capability::LiveMigration,
        Capability::IncrementalCopy,
        Capability::TargetProject,
        Capability::TargetPool,
        Capability::ClusterGroups,
        Capability::MoveConfig,
        Capability::ProtectionStart,
        Capability::AllProjectsOperations,
        Capability::TrustTokenField,
        Capability::Push,
        Capability::DirectBackup,
        Capability::ExcludeOlder,
        Capability::BackupOverrideConfig,
        Capability::LivePool,
    ];

    /// The API extension that announces it.
    pub fn extension(self) -> &'static str {
        match self {
            Capability::LiveMigration => "migration_vm_live",
            Capability::IncrementalCopy => "container_incremental_copy",
            Capability::TargetProject => "instance_project_move",
            Capability::TargetPool => "instance_pool_move",
            Capability::ClusterGroups => "clustering_groups",
            Capability::MoveConfig => "instance_move_config",
            Capability::ProtectionStart => "instance_protection_start",
            Capability::AllProjectsOperations => "operations_get_query_all_projects",
            Capability::TrustTokenField => "explicit_trust_token",
            Capability::Push => "container_push_target",
            Capability::DirectBackup => "direct_backup",
            Capability::ExcludeOlder => "custom_volume_refresh_exclude_older_snapshots",
            Capability::BackupOverrideConfig => "backup_override_config",
            Capability::LivePool => "storage_live_migration",
        }
    }
}

/// What one server (or cluster) is and has: everything that placing an instance there depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerFacts {
    /// The product.
    pub product: Product,
    /// Its version, for people; decisions use [`ServerFacts::can`].
    pub version: String,
    /// SHA-256 of the server's (or cluster's) certificate in lower-case hex: the identity of the server.
    pub fingerprint: String,
    /// The certificate itself, PEM, as other servers need it to trust this one.
    pub certificate: String,
    /// The server's own name (the member's name in a cluster).
    pub name: String,
    /// Process id of the daemon that answered: a change means that all operations are lost.
    pub pid: i64,
    /// Whether it is a cluster.
    pub clustered: bool,
    /// The addresses (`host:port`) that the server says it listens on.
    pub addresses: Vec<String>,
    /// Architectures that it can run (`x86_64`, …).
    pub architectures: Vec<String>,
    /// Whether it can hold containers.
    pub containers: bool,
    /// Whether it can hold virtual machines.
    pub virtual_machines: bool,
    /// Version of QEMU, where it can.
    pub qemu: Option<String>,
    /// Its processors, as far as it tells (no cluster does: its members may differ).
    pub processor: Option<Processor>,
    /// The announced API extensions.
    pub extensions: BTreeSet<String>,
    /// Cluster members; empty when not clustered.
    pub members: Vec<Member>,
    /// Names of the cluster groups; empty when not clustered.
    pub groups: Vec<String>,
    /// Storage pools.
    pub pools: Vec<Pool>,
    /// Projects that this client may see.
    pub projects: Vec<Project>,
    /// Profiles of all those projects.
    pub profiles: Vec<Profile>,
    /// Networks of all those projects.
    pub networks: Vec<Network>,
}

impl ServerFacts {
    /// Whether the server announces `capability`.
    pub fn can(&self, capability: Capability) -> bool {
        self.extensions.contains(capability.extension())
            || (capability == Capability::TrustTokenField && self.product == Product::Incus)
    }

    /// The project of that name, if this client may see it.
    pub fn project(&self, name: &str) -> Option<&Project> {
        self.projects.iter().find(|p| p.name == name)
    }

    /// The pool of that name.
    pub fn pool(&self, name: &str) -> Option<&Pool> {
        self.pools.iter().find(|p| p.name == name)
    }

    /// The member of that name.
    pub fn member(&self, name: &str) -> Option<&Member> {
        self.members.iter().find(|m| m.name == name)
    }

    /// The profile `name` as instances of `project` see it (projects without their own profiles use `default`'s).
    pub fn profile(&self, project: &str, name: &str) -> Option<&Profile> {
        let owner = match self.project(project) {
            Some(p) if !p.feature("features.profiles") => "default",
            _ => project,
        };
        self.profiles.iter().find(|p| p.project == owner && p.name == name)
    }
}

/// One member of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Its state.
    pub status: MemberStatus,
    /// Its architecture.
    pub architecture: String,
    /// The cluster groups it belongs to.
    pub groups: Vec<String>,
}

/// State of a cluster member (fact sheet 13.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemberStatus {
    /// Works.
    Online,
    /// Sends no heartbeat.
    Offline,
    /// An operator emptied it.
    Evacuated,
    /// An operator is emptying it.
    Evacuating,
    /// An operator is bringing it back.
    Restoring,
    /// Anything else, in the server's own word.
    Other(String),
}

impl MemberStatus {
    /// The server's word for it.
    pub fn as_str(&self) -> &str {
        match self {
            MemberStatus::Online => "Online",
            MemberStatus::Offline => "Offline",
            MemberStatus::Evacuated => "Evacuated",
            MemberStatus::Evacuating => "Evacuating",
            MemberStatus::Restoring => "Restoring",
            MemberStatus::Other(s) => s,
        }
    }

    /// Reads the server's word.
    pub fn parse(s: &str) -> Self {
        match s.to_ascii_lowercase().as_str() {
            "online" => MemberStatus::Online,
            "offline" => MemberStatus::Offline,
            "evacuated" => MemberStatus::Evacuated,
            "evacuating" => MemberStatus::Evacuating,
            "restoring" => MemberStatus::Restoring,
            _ => MemberStatus::Other(s.to_owned()),
        }
    }
}

/// One storage pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// Its driver (`dir`, `btrfs`, `zfs`, …).
    pub driver: String,
}

impl Pool {
    /// Whether all members of a cluster see the same volumes.
    pub fn shared(&self) -> bool {
        matches!(
            self.driver.as_str(),
            "ceph" | "linstor" | "lvmcluster" | "powerflex" | "pure" | "alletra"
        )
    }

    /// Whether snapshots and differences are cheap on this driver.
    pub fn copy_on_write(&self) -> bool {
        matches!(
            self.driver.as_str(),
            "btrfs" | "zfs" | "ceph" | "lvm" | "linstor" | "powerflex" | "pure"
        )
    }
}

/// One project.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Project {
    /// Its name.
    pub name: String,
    /// Its configuration (`restricted`, `features.*`, `limits.*`); empty where the client may not see it.
    pub config: Config,
}

impl Project {
    /// Whether a `features.*` key is on (`default` has all of them).
    pub fn feature(&self, key: &str) -> bool {
        self.name == "default" || self.config.get(key).is_some_and(|v| v == "true")
    }

    /// The limits that the project sets (`limits.*`).
    pub fn limits(&self) -> impl Iterator<Item = &str> {
        let set = self
            .config
            .iter()
            .filter(|(k, v)| k.starts_with("limits.") && !v.is_empty());
        set.map(|(k, _)| k.as_str())
    }

    /// Whether the project is restricted: such projects refuse guard devices, snapshots and backups by default.
    pub fn restricted(&self) -> bool {
        self.config.get("restricted").is_some_and(|v| v == "true")
    }
}

/// One profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    /// The project it belongs to.
    pub project: String,
    /// Its name.
    pub name: String,
    /// Its configuration.
    pub config: Config,
    /// Its devices.
    pub devices: Devices,
}

/// One network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// The project it belongs to.
    pub project: String,
    /// Its name.
    pub name: String,
    /// Whether the server manages it.
    pub managed: bool,
}

/// The place of an instance on one server: its project and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceRef {
    /// The project.
    pub project: String,
    /// The name.
    pub name: String,
}

impl InstanceRef {
    /// `project` and `name` as one reference.
    pub fn new(project: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            project: project.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for InstanceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.project == "default" {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.project, self.name)
        }
    }
}

/// Container or virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstanceKind {
    /// A system container.
    Container,
    /// A virtual machine.
    VirtualMachine,
}

impl InstanceKind {
    /// The word in the servers' API.
    pub fn wire(self) -> &'static str {
        match self {
            InstanceKind::Container => "container",
            InstanceKind::VirtualMachine => "virtual-machine",
        }
    }

    /// The word in our status.
    pub fn as_str(self) -> &'static str {
        match self {
            InstanceKind::Container => "Container",
            InstanceKind::VirtualMachine => "VirtualMachine",
        }
    }
}

/// Power state, from the servers' status codes (fact sheet 9; `Ready` is a running instance).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Runs (codes 103 and 113).
    Running,
    /// Does not run.
    Stopped,
    /// Paused by the server.
    Frozen,
    /// On its way up (101, 106).
    Starting,
    /// On its way down (107, 108).
    Stopping,
    /// The server says Error, or its member does not answer.
    Error,
}

impl Power {
    /// The word for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Power::Running => "Running",
            Power::Stopped => "Stopped",
            Power::Frozen => "Frozen",
            Power::Starting => "Starting",
            Power::Stopping => "Stopping",
            Power::Error => "Error",
        }
    }

    /// From a status code of either product.
    pub fn from_code(code: i64) -> Self {
        match code {
            103 | 113 | 111 => Power::Running,
            102 => Power::Stopped,
            109 | 110 => Power::Frozen,
            101 | 106 => Power::Starting,
            107 | 108 => Power::Stopping,
            _ => Power::Error,
        }
    }
}

/// One instance as a server lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Project and name.
    pub at: InstanceRef,
    /// Container or virtual machine.
    pub kind: InstanceKind,
    /// Architecture.
    pub architecture: String,
    /// Power state.
    pub power: Power,
    /// Cluster member that holds it; `None` on a standalone server.
    pub member: Option<String>,
    /// The instance's own configuration, `volatile.*` included.
    pub config: Config,
    /// The instance's own devices.
    pub devices: Devices,
    /// Configuration with the profiles applied.
    pub expanded_config: Config,
    /// Devices with the profiles applied.
    pub expanded_devices: Devices,
    /// Profiles in order.
    pub profiles: Vec<String>,
    /// Whether a stop deletes it.
    pub ephemeral: bool,
    /// Whether it holds a saved running state.
    pub stateful: bool,
    /// Free text.
    pub description: String,
    /// When it was made, as the server writes it.
    pub created_at: String,
    /// When it was last started, as the server writes it: changes on every start and on nothing else.
    pub last_used_at: String,
    /// False for the stub that a cluster lists for a member that does not answer: nothing is known of it then.
    pub known: bool,
}

impl Instance {
    /// `volatile.uuid`, the identity that survives moves.
    pub fn uuid(&self) -> Option<&str> {
        self.config.get("volatile.uuid").map(String::as_str)
    }

    /// The pool of the root disk.
    pub fn root_pool(&self) -> Option<&str> {
        self.root_device().and_then(|(_, d)| d.get("pool")).map(String::as_str)
    }

    /// Name and keys of the root disk, profiles applied.
    pub fn root_device(&self) -> Option<(&str, &Device)> {
        self.expanded_devices
            .iter()
            .find(|(_, d)| d.get("type").is_some_and(|t| t == "disk") && d.get("path").is_some_and(|p| p == "/"))
            .map(|(n, d)| (n.as_str(), d))
    }

    /// The custom volumes that its own devices attach: name of the device, pool, name of the volume.
    pub fn attached_volumes(&self) -> impl Iterator<Item = (&str, &str, &str)> {
        self.devices.iter().filter_map(|(name, d)| {
            let value = |key: &str| d.get(key).map_or("", String::as_str);
            let (pool, source) = (value("pool"), value("source"));
            let attached = value("type") == "disk" && !pool.is_empty() && !source.is_empty();
            // a path below the volume may follow its name
            attached.then(|| (name.as_str(), pool, source.split('/').next().unwrap_or(source)))
        })
    }

    /// Whether any part of the guest may be executing.
    pub fn may_run(&self) -> bool {
        self.power != Power::Stopped
    }
}

/// One instance read by itself, with the server's entity tag for a conditional write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fresh {
    /// The instance.
    pub instance: Instance,
    /// Value for `If-Match`.
    pub etag: String,
}

/// One snapshot of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Name without the instance's.
    pub name: String,
    /// When it was made, as the server writes it.
    pub created_at: String,
    /// When the server will delete it, if it will.
    pub expires_at: Option<String>,
    /// Its own configuration: it travels inside the stream, and the target must know every key.
    pub config: Config,
}

/// What belongs to an instance and no list shows: read only while a move of it is planned.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Its snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// Names of its backups on the server.
    pub backups: Vec<String>,
    /// The custom volumes of the target, as pool and name, for the pools that its disks name.
    pub volumes: BTreeSet<(String, String)>,
    /// Bytes that are free on the target's pool, if it says.
    pub free: Option<i64>,
}

/// What can be written to an instance, whole: the body of a `PUT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Definition {
    /// Architecture.
    pub architecture: String,
    /// Own configuration.
    pub config: Config,
    /// Own devices.
    pub devices: Devices,
    /// Profiles; an empty list means none (not "the default").
    pub profiles: Vec<String>,
    /// Whether a stop deletes it.
    pub ephemeral: bool,
    /// Free text.
    pub description: String,
}

impl From<&Instance> for Definition {
    fn from(i: &Instance) -> Self {
        Self {
            architecture: i.architecture.clone(),
            config: i.config.clone(),
            devices: i.devices.clone(),
            profiles: i.profiles.clone(),
            ephemeral: i.ephemeral,
            description: i.description.clone(),
        }
    }
}

/// A partial, merging change of an instance: the body of a `PATCH`. A value of `""` unsets a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Configuration keys to set.
    pub config: Config,
    /// Devices to add or replace.
    pub devices: Devices,
    /// New value of `ephemeral`, if it is to change.
    pub ephemeral: Option<bool>,
}
