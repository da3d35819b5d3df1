//! What a placement declares of an instance's configuration, compared with what the instance has: the change that makes it
//! so, and which part of that change takes effect while the instance runs. What is not declared is never touched.

use std::collections::BTreeMap;

use berth_api::Overrides;
use serde::Serialize;

use crate::model::{Config, Definition, Device, Devices, Instance, InstanceKind, ServerFacts};

/// What is to be changed about an instance's own definition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Adaptation {
    /// Keys to set; `None`: to remove.
    pub config: BTreeMap<String, Option<String>>,
    /// Devices as they are to be, whole; `None`: to remove.
    pub devices: BTreeMap<String, Option<Device>>,
    /// Profiles, in order.
    pub profiles: Option<Vec<String>>,
}

impl Adaptation {
    /// What `overrides` want changed about an instance of a server of which `facts` are known. A value counts as it is in
    /// effect: what a profile gives already need not be written.
    pub fn of(overrides: &Overrides, instance: &Instance, facts: &ServerFacts) -> Self {
        let profiles = profiles(overrides, instance);
        let mut after = Definition::from(instance);
        let (config, devices) = match &profiles {
            None => (instance.expanded_config.clone(), instance.expanded_devices.clone()),
            Some(profiles) => {
                after.profiles.clone_from(profiles);
                expand(&after, facts, &instance.at.project)
            }
        };
        let mut change = Self {
            config: config_change(overrides, instance, &config),
            devices: device_change(overrides, instance, &devices),
            profiles,
        };
        if change.profiles.is_some() {
            change.keep_root(instance, &devices);
        }
        change
    }

    /// Whether nothing is to be changed.
    pub fn is_empty(&self) -> bool {
        self.config.is_empty() && self.devices.is_empty() && self.profiles.is_none()
    }

    /// What is changed, for people: names only, since values may be secret.
    pub fn names(&self) -> String {
        let config = self.config.keys().cloned();
        let devices = self.devices.keys().map(|name| format!("device {name}"));
        let profiles = self.profiles.iter().map(|_| "profiles".to_owned());
        config.chain(devices).chain(profiles).collect::<Vec<_>>().join(", ")
    }

    /// Makes the change.
    pub fn apply(&self, definition: &mut Definition) {
        for (key, value) in &self.config {
            match value {
                Some(value) => definition.config.insert(key.clone(), value.clone()),
                None => definition.config.remove(key),
            };
        }
        for (name, device) in &self.devices {
            match device {
                Some(device) => definition.devices.insert(name.clone(), device.clone()),
                None => definition.devices.remove(name),
            };
        }
        if let Some(profiles) = &self.profiles {
            definition.profiles.clone_from(profiles);
        }
    }

    /// The part that takes effect while the instance runs, and the part that needs a stop.
    pub fn split(self, instance: &Instance, facts: &ServerFacts) -> (Self, Self) {
        let kind = instance.kind;
        let (live, stopped) = self
            .config
            .into_iter()
            .partition(|(key, _)| is_live_key(kind, facts, key));
        let (live_devices, stopped_devices) = self.devices.into_iter().partition(|(name, device)| {
            let types = [device.as_ref(), instance.expanded_devices.get(name)];
            types.into_iter().flatten().all(|d| is_live_device(kind, d))
        });
        let at_once = self
            .profiles
            .as_ref()
            .is_none_or(|profiles| profiles_take_effect(profiles, instance, facts));
        let (live_profiles, stopped_profiles) = if at_once {
            (self.profiles, None)
        } else {
            (None, self.profiles)
        };
        let part = |config, devices, profiles| Self {
            config,
            devices,
            profiles,
        };
        (
            part(live, live_devices, live_profiles),
            part(stopped, stopped_devices, stopped_profiles),
        )
    }

    /// Both changes as one; what `other` says counts.
    pub fn and(mut self, other: Self) -> Self {
        self.config.extend(other.config);
        self.devices.extend(other.devices);
        self.profiles = other.profiles.or(self.profiles);
        self
    }

    /// A disk stays where it is whatever the new profiles say of it, and an instance without one cannot be stored.
    fn keep_root(&mut self, instance: &Instance, after: &Devices) {
        let Some((name, root)) = instance.root_device() else {
            return;
        };
        if self.devices.contains_key(name) || instance.devices.contains_key(name) {
            return;
        }
        let stays = after.get(name).is_some_and(|d| d.get("pool") == root.get("pool"));
        if !stays {
            self.devices.insert(name.to_owned(), Some(root.clone()));
        }
    }
}

/// The profiles that are to be, if they are others than those that are.
fn profiles(overrides: &Overrides, instance: &Instance) -> Option<Vec<String>> {
    let wanted = match (overrides.no_profiles, overrides.profiles.as_slice()) {
        (true, _) => Vec::new(),
        (false, []) => return None,
        (false, profiles) => profiles.to_vec(),
    };
    (wanted != instance.profiles).then_some(wanted)
}

fn config_change(overrides: &Overrides, instance: &Instance, effective: &Config) -> BTreeMap<String, Option<String>> {
    let in_effect = |key: &String| effective.get(key).map_or("", String::as_str);
    let set = overrides
        .config
        .iter()
        .filter(|(key, value)| in_effect(key) != value.as_str())
        // an empty value is no value
        .map(|(key, value)| (key.clone(), Some(value.clone()).filter(|v| !v.is_empty())));
    let removed = overrides
        .remove_config
        .iter()
        .filter(|key| instance.config.contains_key(*key))
        .map(|key| (key.clone(), None));
    set.chain(removed).collect()
}

fn device_change(overrides: &Overrides, instance: &Instance, effective: &Devices) -> BTreeMap<String, Option<Device>> {
    let mut change = BTreeMap::new();
    for (name, wanted) in &overrides.devices {
        let wanted = without_pool(wanted, effective.get(name));
        if !is_as_wanted(effective.get(name), &wanted) {
            let base = instance.expanded_devices.get(name).or(effective.get(name));
            change.insert(name.clone(), Some(merged_device(base, &wanted)));
        }
    }
    let removed = overrides
        .remove_devices
        .iter()
        .filter(|name| instance.devices.contains_key(*name));
    change.extend(removed.map(|name| (name.clone(), None)));
    change
}

/// Another pool of the root disk is a move and no change of the configuration.
fn without_pool(wanted: &Device, effective: Option<&Device>) -> Device {
    let mut wanted = wanted.clone();
    if effective.is_some_and(is_root) {
        wanted.remove("pool");
    }
    wanted
}

/// Whether a device is the root disk.
pub fn is_root(device: &Device) -> bool {
    device.get("type").is_some_and(|t| t == "disk") && device.get("path").is_some_and(|p| p == "/")
}

fn is_as_wanted(effective: Option<&Device>, wanted: &Device) -> bool {
    // a device of type `none` takes away what a profile gives; not every server shows it
    let masked = wanted.get("type").is_some_and(|t| t == "none");
    let Some(effective) = effective else { return masked };
    wanted
        .iter()
        .all(|(key, value)| effective.get(key).map_or("", String::as_str) == value)
}

/// Declared keys over the device that is there; a device of another type is replaced. An empty value removes a key.
pub fn merged_device(existing: Option<&Device>, wanted: &Device) -> Device {
    let same_type = |e: &&Device| wanted.get("type").is_none_or(|t| e.get("type") == Some(t));
    let mut device = existing.filter(same_type).cloned().unwrap_or_default();
    device.extend(wanted.iter().map(|(k, v)| (k.clone(), v.clone())));
    device.retain(|_, v| !v.is_empty());
    device
}

/// Configuration and devices with the profiles applied, as the server would see them.
fn expand(definition: &Definition, facts: &ServerFacts, project: &str) -> (Config, Devices) {
    let (mut config, mut devices) = (Config::new(), Devices::new());
    for profile in definition.profiles.iter().filter_map(|p| facts.profile(project, p)) {
        config.extend(profile.config.clone());
        devices.extend(profile.devices.clone());
    }
    config.extend(definition.config.clone());
    devices.extend(definition.devices.clone());
    devices.retain(|_, d| d.get("type").is_none_or(|t| t != "none"));
    (config, devices)
}

/// Whether other profiles bring only what a running instance takes.
fn profiles_take_effect(profiles: &[String], instance: &Instance, facts: &ServerFacts) -> bool {
    let mut definition = Definition::from(instance);
    definition.profiles = profiles.to_vec();
    let (config, devices) = expand(&definition, facts, &instance.at.project);
    let (old_config, old_devices) = (&instance.expanded_config, &instance.expanded_devices);
    let keys = config.keys().chain(old_config.keys());
    let names = devices.keys().chain(old_devices.keys());
    keys.filter(|k| config.get(*k) != old_config.get(*k))
        .all(|k| is_live_key(instance.kind, facts, k))
        && names
            .filter(|n| devices.get(*n) != old_devices.get(*n))
            .flat_map(|n| [devices.get(n), old_devices.get(n)])
            .flatten()
            .all(|d| is_root(d) || is_live_device(instance.kind, d))
}

/// Whether a key takes effect on a running instance. Containers take almost everything, and store the rest for the next
/// start without a word; virtual machines refuse what they do not take (fact sheets: incus-lxd-api 6.1, lab-vms).
fn is_live_key(kind: InstanceKind, facts: &ServerFacts, key: &str) -> bool {
    const NEXT_START: [&str; 12] = [
        "environment.",
        "limits.kernel.",
        "linux.sysctl.",
        "nvidia.",
        "oci.",
        "raw.idmap",
        "raw.lxc",
        "raw.seccomp",
        "security.idmap.",
        "security.nesting",
        "security.privileged",
        "security.syscalls.",
    ];
    const MACHINES_TAKE: [&str; 13] = [
        "backups.",
        "boot.",
        "cloud-init.",
        "cluster.",
        "environment.",
        "image.",
        "limits.memory",
        "security.agent.metrics",
        "security.devlxd",
        "security.guestapi",
        "security.protection.",
        "snapshots.",
        "user.",
    ];
    let among = |list: &[&str]| {
        list.iter().any(|entry| match entry.strip_suffix('.') {
            Some(_) => key.starts_with(entry),
            None => key == *entry || key.strip_prefix(entry).is_some_and(|rest| rest.starts_with('.')),
        })
    };
    match kind {
        InstanceKind::Container => !among(&NEXT_START),
        InstanceKind::VirtualMachine if key == "limits.cpu" => facts.extensions.contains("cpu_hotplug"),
        InstanceKind::VirtualMachine if key == "limits.memory.hugepages" => false,
        InstanceKind::VirtualMachine => among(&MACHINES_TAKE),
    }
}

/// Whether a device can be changed on a running instance; a server that cannot do it with this one says so.
fn is_live_device(kind: InstanceKind, device: &Device) -> bool {
    match kind {
        InstanceKind::Container => true,
        InstanceKind::VirtualMachine => device
            .get("type")
            .is_none_or(|t| matches!(t.as_str(), "disk" | "nic" | "usb" | "none")),
    }
}

/// Makes a definition that was taken from `source` as `overrides` want it.
pub fn apply(definition: &mut Definition, overrides: &Overrides, source: &Instance) {
    let Overrides {
        config,
        devices,
        remove_config,
        remove_devices,
        profiles,
        no_profiles,
    } = overrides;
    definition
        .config
        .extend(config.iter().map(|(k, v)| (k.clone(), v.clone())));
    // an empty value is no value, on either product
    definition
        .config
        .retain(|k, v| !(remove_config.contains(k) || v.is_empty() && config.contains_key(k)));
    if *no_profiles {
        definition.profiles.clear();
    } else if !profiles.is_empty() {
        definition.profiles.clone_from(profiles);
    }
    for (name, wanted) in devices {
        definition
            .devices
            .insert(name.clone(), merged_device(source.expanded_devices.get(name), wanted));
    }
    definition.devices.retain(|k, _| !remove_devices.contains(k));
}
