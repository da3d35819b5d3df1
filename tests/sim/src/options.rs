//! What a test says about servers and instances when it makes them. The defaults are those of the lab's servers
//! (Incus 6.0.4, LXD 5.0.2): one `default` project, profile and pool, durations as measured.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use berth_core::model::{Config, Device, Devices, InstanceKind, Network, Product, Profile};

/// How long things take on a server.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Until a request arrives and is carried out.
    pub request: Duration,
    /// A start.
    pub start: Duration,
    /// The daemon's own part of any stop.
    pub stop: Duration,
    /// Rename, delete, snapshot.
    pub small: Duration,
    /// The data of a transfer.
    pub transfer: Duration,
    /// What the target still does after the source's operation has ended.
    pub tail: Duration,
    /// One phase of a move inside the server.
    pub relocate: Duration,
    /// How long one end of a migration waits for the other.
    pub peer: Duration,
    /// After which a cut link breaks a transfer.
    pub link: Duration,
}

impl Timing {
    /// As measured in the lab.
    pub fn of(product: Product) -> Self {
        Self {
            request: Duration::from_millis(2),
            start: Duration::from_millis(170),
            stop: Duration::from_millis(650),
            small: Duration::from_millis(30),
            transfer: Duration::from_millis(300),
            tail: Duration::from_millis(20),
            relocate: Duration::from_millis(60),
            peer: Duration::from_secs(if product == Product::Incus { 30 } else { 10 }),
            link: Duration::from_secs(120),
        }
    }
}

/// What a new server has.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Its version; empty means that of the lab.
    pub version: String,
    /// Members and their groups: a cluster when not empty.
    pub members: Vec<(String, Vec<String>)>,
    /// Pools and their drivers besides `default` (btrfs).
    pub pools: Vec<(String, String)>,
    /// Projects besides `default`, with their configuration. Each gets a profile `default` where it has its own.
    pub projects: Vec<(String, Config)>,
    /// Profiles besides `default` (root on pool `default`, `eth0` on the product's bridge).
    pub profiles: Vec<Profile>,
    /// Networks besides the product's bridge.
    pub networks: Vec<Network>,
    /// Extensions that it has besides the usual ones of its product.
    pub with: BTreeSet<String>,
    /// Extensions that it lacks.
    pub without: BTreeSet<String>,
    /// Whether CRIU is installed.
    pub criu: bool,
    /// Durations, if not those of the lab.
    pub timing: Option<Timing>,
}

impl Options {
    /// A cluster of those members, all in group `default`.
    pub fn cluster(members: &[&str]) -> Self {
        let members = members
            .iter()
            .map(|m| ((*m).to_owned(), vec!["default".to_owned()]))
            .collect();
        Self {
            members,
            ..Self::default()
        }
    }

    /// The same with another pool.
    pub fn pool(mut self, name: &str, driver: &str) -> Self {
        self.pools.push((name.to_owned(), driver.to_owned()));
        self
    }

    /// The same with another project.
    pub fn project(mut self, name: &str, config: &[(&str, &str)]) -> Self {
        self.projects.push((name.to_owned(), pairs(config)));
        self
    }

    /// The same with a project that is restricted and otherwise uses the profiles of `default`.
    pub fn restricted_project(self, name: &str) -> Self {
        self.project(name, &[("restricted", "true"), ("features.profiles", "false")])
    }

    /// The same with another extension.
    pub fn extension(mut self, name: &str) -> Self {
        self.with.insert(name.to_owned());
        self
    }

    /// The same with other durations.
    pub fn timing(mut self, timing: Timing) -> Self {
        self.timing = Some(timing);
        self
    }

    pub(crate) fn extensions(&self, product: Product) -> BTreeSet<String> {
        let both = [
            "container_incremental_copy",
            "instance_project_move",
            "instance_pool_move",
            "clustering_groups",
            "container_push",
            "container_push_target",
            "projects_restrictions",
        ];
        let incus = [
            "migration_vm_live",
            "instance_move_config",
            "operations_get_query_all_projects",
            "explicit_trust_token",
            "direct_backup",
            "instance_ready_state",
            "custom_volume_refresh_exclude_older_snapshots",
        ];
        let own: &[&str] = if product == Product::Incus { &incus } else { &[] };
        let usual = both.iter().chain(own).map(|e| (*e).to_owned());
        usual
            .chain(self.with.iter().cloned())
            .filter(|e| !self.without.contains(e))
            .collect()
    }
}

/// How a guest behaves when it is asked to shut down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Guest {
    /// It goes down at once.
    #[default]
    Obeys,
    /// It goes down that long after it was asked.
    StopsAfter(Duration),
    /// It never does.
    Ignores,
}

/// What a new instance is. The defaults are a running container with the profile `default`.
#[derive(Clone, Debug)]
pub struct InstanceOptions {
    /// Container or virtual machine.
    pub kind: InstanceKind,
    /// Whether it runs.
    pub running: bool,
    /// Own configuration besides the volatile keys that every instance has.
    pub config: Config,
    /// Own devices.
    pub devices: Devices,
    /// Profiles.
    pub profiles: Vec<String>,
    /// Names of its snapshots.
    pub snapshots: Vec<String>,
    /// Whether a stop deletes it.
    pub ephemeral: bool,
    /// Cluster member; the first one if `None`.
    pub member: Option<String>,
    /// What it does when it is asked to shut down.
    pub guest: Guest,
    /// Whether CRIU restores it with files that belong to nobody.
    pub breaks: bool,
}

impl Default for InstanceOptions {
    fn default() -> Self {
        Self {
            kind: InstanceKind::Container,
            running: true,
            config: Config::new(),
            devices: Devices::new(),
            profiles: vec!["default".to_owned()],
            snapshots: Vec::new(),
            ephemeral: false,
            member: None,
            guest: Guest::Obeys,
            breaks: false,
        }
    }
}

impl InstanceOptions {
    /// The defaults, but stopped.
    pub fn stopped() -> Self {
        Self {
            running: false,
            ..Self::default()
        }
    }

    /// The defaults, but a virtual machine.
    pub fn vm() -> Self {
        Self {
            kind: InstanceKind::VirtualMachine,
            ..Self::default()
        }
    }

    /// The same with a configuration key.
    pub fn key(mut self, key: &str, value: &str) -> Self {
        self.config.insert(key.to_owned(), value.to_owned());
        self
    }

    /// The same with a device.
    pub fn device(mut self, name: &str, device: &[(&str, &str)]) -> Self {
        self.devices.insert(name.to_owned(), pairs(device));
        self
    }

    /// The same with a snapshot.
    pub fn snapshot(mut self, name: &str) -> Self {
        self.snapshots.push(name.to_owned());
        self
    }

    /// The same with another behaviour of the guest.
    pub fn guest(mut self, guest: Guest) -> Self {
        self.guest = guest;
        self
    }
}

pub(crate) fn pairs(list: &[(&str, &str)]) -> Device {
    list.iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect::<BTreeMap<_, _>>()
}
