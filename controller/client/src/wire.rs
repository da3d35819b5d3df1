//! The servers' objects as JSON gives them, and their way into the model. Absent, `null` and empty are one and the same
//! for lists and maps; fields that are not used are not read.

use std::collections::BTreeMap;

use berth_core::model::{
    Config, Devices, Instance, InstanceKind, InstanceRef, Member, MemberStatus, Network, Pool, Power, Processor,
    Profile, Project, Snapshot,
};
use jiff::Timestamp;
use serde::{Deserialize, Deserializer};

/// `null` as the default.
pub(crate) fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(d: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(d).map(Option::unwrap_or_default)
}

#[derive(Deserialize)]
#[serde(default)]
pub(crate) struct InstanceWire {
    name: String,
    project: Option<String>,
    #[serde(rename = "type")]
    kind: Option<KindWire>,
    #[serde(deserialize_with = "nullable")]
    architecture: String,
    status_code: i64,
    location: Option<String>,
    #[serde(deserialize_with = "nullable")]
    config: Config,
    #[serde(deserialize_with = "nullable")]
    devices: Devices,
    #[serde(deserialize_with = "nullable")]
    expanded_config: Config,
    #[serde(deserialize_with = "nullable")]
    expanded_devices: Devices,
    #[serde(deserialize_with = "nullable")]
    profiles: Vec<String>,
    ephemeral: bool,
    stateful: bool,
    #[serde(deserialize_with = "nullable")]
    description: String,
    #[serde(deserialize_with = "nullable")]
    created_at: String,
    #[serde(deserialize_with = "nullable")]
    last_used_at: String,
}

/// What a container is while its daemon freezes it.
const STATUS_FREEZING: i64 = 109;

impl InstanceWire {
    /// Whether it is neither frozen nor running.
    pub(crate) fn is_freezing(&self) -> bool {
        self.status_code == STATUS_FREEZING
    }
}

impl Default for InstanceWire {
    fn default() -> Self {
        Self {
            name: String::new(),
            project: None,
            kind: None,
            architecture: String::new(),
            status_code: STATUS_ERROR,
            location: None,
            config: Config::new(),
            devices: Devices::new(),
            expanded_config: Config::new(),
            expanded_devices: Devices::new(),
            profiles: Vec::new(),
            ephemeral: false,
            stateful: false,
            description: String::new(),
            created_at: String::new(),
            last_used_at: String::new(),
        }
    }
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum KindWire {
    Container,
    VirtualMachine,
}

const STATUS_ERROR: i64 = 112;

impl InstanceWire {
    /// `project` is the one asked for; a list of all projects names it in each entry.
    pub(crate) fn into_model(self, project: &str) -> Instance {
        let project = self
            .project
            .filter(|p| !p.is_empty())
            .unwrap_or_else(|| project.to_owned());
        // every instance has at least its `volatile` keys; what a cluster says of an unreachable member's has none
        let known = !(self.status_code == STATUS_ERROR && self.config.is_empty());
        Instance {
            at: InstanceRef {
                project,
                name: self.name,
            },
            kind: match self.kind {
                Some(KindWire::VirtualMachine) => InstanceKind::VirtualMachine,
                Some(KindWire::Container) | None => InstanceKind::Container,
            },
            architecture: self.architecture,
            power: Power::from_code(self.status_code),
            member: self.location.filter(|l| !l.is_empty() && l != "none"),
            config: self.config,
            devices: self.devices,
            expanded_config: self.expanded_config,
            expanded_devices: self.expanded_devices,
            profiles: self.profiles,
            ephemeral: self.ephemeral,
            stateful: self.stateful,
            description: self.description,
            created_at: self.created_at,
            last_used_at: self.last_used_at,
            known,
        }
    }
}

#[derive(Deserialize)]
pub(crate) struct SnapshotWire {
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    created_at: String,
    #[serde(default, deserialize_with = "nullable")]
    expires_at: String,
    #[serde(default, deserialize_with = "nullable")]
    config: Config,
}

impl SnapshotWire {
    /// The model, oldest first.
    pub(crate) fn into_models(list: Vec<Self>) -> Vec<Snapshot> {
        let mut snapshots: Vec<Snapshot> = list.into_iter().map(Self::into_model).collect();
        // stable: a transfer cuts dates to the second, and what is equal then keeps the server's order
        snapshots.sort_by_cached_key(|s| s.created_at.parse::<Timestamp>().ok());
        snapshots
    }

    fn into_model(self) -> Snapshot {
        Snapshot {
            name: self.name.rsplit('/').next().unwrap_or_default().to_owned(),
            created_at: self.created_at,
            // the servers write "never" as the year 1
            expires_at: Some(self.expires_at).filter(|e| !e.is_empty() && !e.starts_with("0001-")),
            config: self.config,
        }
    }
}

/// What is read of an instance's state: how large its disk is.
#[derive(Deserialize)]
pub(crate) struct StateWire {
    #[serde(default, deserialize_with = "nullable")]
    disk: BTreeMap<String, DiskWire>,
}

#[derive(Deserialize)]
struct DiskWire {
    #[serde(default, deserialize_with = "nullable")]
    usage: i64,
}

impl StateWire {
    /// Bytes of the largest disk, which is the root; pools that do not know say nothing, or zero.
    pub(crate) fn size(&self) -> Option<i64> {
        self.disk.values().map(|d| d.usage).max().filter(|b| *b > 0)
    }
}

/// What a pool says of itself.
#[derive(Deserialize)]
pub(crate) struct RoomWire {
    #[serde(default, deserialize_with = "nullable")]
    space: SpaceWire,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct SpaceWire {
    used: u64,
    total: u64,
}

impl RoomWire {
    /// Bytes that are free; a pool that does not know its size says nothing, or zero.
    pub(crate) fn free(&self) -> Option<i64> {
        let total = Some(self.space.total).filter(|t| *t > 0)?;
        i64::try_from(total.saturating_sub(self.space.used)).ok()
    }
}

#[derive(Deserialize)]
pub(crate) struct ServerWire {
    pub(crate) auth: String,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) api_extensions: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    pub(crate) environment: EnvironmentWire,
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub(crate) struct EnvironmentWire {
    pub(crate) server: String,
    pub(crate) server_version: String,
    pub(crate) server_name: String,
    pub(crate) server_clustered: bool,
    pub(crate) server_pid: i64,
    #[serde(deserialize_with = "nullable")]
    pub(crate) addresses: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    pub(crate) architectures: Vec<String>,
    pub(crate) certificate: String,
    pub(crate) certificate_fingerprint: String,
    /// `lxc`, `qemu` or `lxc | qemu`.
    pub(crate) driver: String,
    /// The same with versions: `6.0.4 | 10.0.2`.
    pub(crate) driver_version: String,
}

impl EnvironmentWire {
    /// Version of QEMU, if it is among the drivers.
    pub(crate) fn qemu(&self) -> Option<String> {
        let drivers = self.driver.split('|').map(str::trim);
        let versions = self.driver_version.split('|').map(str::trim);
        let (_, version) = drivers.zip(versions).find(|(driver, _)| *driver == "qemu")?;
        Some(version.to_owned())
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
pub(crate) struct ResourcesWire {
    cpu: CpuWire,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct CpuWire {
    #[serde(deserialize_with = "nullable")]
    sockets: Vec<SocketWire>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct SocketWire {
    name: String,
    #[serde(deserialize_with = "nullable")]
    cores: Vec<CoreWire>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct CoreWire {
    #[serde(deserialize_with = "nullable")]
    flags: Vec<String>,
}

impl ResourcesWire {
    /// The first processor: they are all alike.
    pub(crate) fn processor(self) -> Option<Processor> {
        let socket = self.cpu.sockets.into_iter().next()?;
        let flags = socket.cores.into_iter().next().map(|c| c.flags.into_iter().collect());
        Some(Processor {
            name: socket.name,
            flags: flags.unwrap_or_default(),
        })
    }
}

#[derive(Deserialize)]
pub(crate) struct ProjectWire {
    name: String,
    #[serde(default, deserialize_with = "nullable")]
    config: Config,
}

impl From<ProjectWire> for Project {
    fn from(p: ProjectWire) -> Self {
        Self {
            name: p.name,
            config: p.config,
        }
    }
}

#[derive(Deserialize)]
pub(crate) struct PoolWire {
    name: String,
    driver: String,
}

impl From<PoolWire> for Pool {
    fn from(p: PoolWire) -> Self {
        Self {
            name: p.name,
            driver: p.driver,
        }
    }
}

#[derive(Deserialize)]
pub(crate) struct ProfileWire {
    name: String,
    project: Option<String>,
    #[serde(default, deserialize_with = "nullable")]
    config: Config,
    #[serde(default, deserialize_with = "nullable")]
    devices: Devices,
}

impl ProfileWire {
    pub(crate) fn into_model(self, project: &str) -> Profile {
        let project = self
            .project
            .filter(|p| !p.is_empty())
            .unwrap_or_else(|| project.to_owned());
        Profile {
            project,
            name: self.name,
            config: self.config,
            devices: self.devices,
        }
    }
}

#[derive(Deserialize)]
pub(crate) struct NetworkWire {
    name: String,
    project: Option<String>,
    #[serde(default)]
    managed: bool,
}

impl NetworkWire {
    pub(crate) fn into_model(self, project: &str) -> Network {
        let project = self
            .project
            .filter(|p| !p.is_empty())
            .unwrap_or_else(|| project.to_owned());
        Network {
            project,
            name: self.name,
            managed: self.managed,
        }
    }
}

#[derive(Deserialize)]
pub(crate) struct MemberWire {
    server_name: String,
    #[serde(default, deserialize_with = "nullable")]
    status: String,
    #[serde(default, deserialize_with = "nullable")]
    architecture: String,
    #[serde(default, deserialize_with = "nullable")]
    groups: Vec<String>,
}

impl From<MemberWire> for Member {
    fn from(m: MemberWire) -> Self {
        let status = MemberStatus::parse(&m.status);
        Self {
            name: m.server_name,
            status,
            architecture: m.architecture,
            groups: m.groups,
        }
    }
}

#[derive(Deserialize)]
pub(crate) struct GroupWire {
    pub(crate) name: String,
}
