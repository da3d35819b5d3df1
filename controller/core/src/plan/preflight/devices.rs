//! Devices that belong to the host where the instance is: they would be missing, or something else, on another host.

use berth_api::{Reason, present};
use serde_json::json;

use super::Check;
use crate::model::{Device, Network};

/// Character devices that every host has.
const EVERYWHERE: [&str; 10] = [
    "/dev/fuse",
    "/dev/full",
    "/dev/kvm",
    "/dev/net/tun",
    "/dev/null",
    "/dev/random",
    "/dev/urandom",
    "/dev/vhost-net",
    "/dev/vhost-vsock",
    "/dev/zero",
];

impl Check<'_> {
    /// The instance's own devices as they would be on the target, without those that its placement declares: whoever
    /// declares a device knows that the target has it.
    fn travelling(&self) -> impl Iterator<Item = (&String, &Device)> {
        let overrides = &self.desired.spec.overrides;
        let own = self.located.instance.devices.iter();
        own.filter(|(name, _)| !overrides.devices.contains_key(*name) && !overrides.remove_devices.contains(name))
    }

    /// Devices of the host are refused; one patch takes all of them off.
    pub(super) fn host_devices(&mut self) {
        let found: Vec<(String, String)> = self
            .travelling()
            .filter_map(|(name, d)| Some((name.clone(), of_the_host(d)?)))
            .collect();
        if found.is_empty() {
            return;
        }
        let what: Vec<String> = found.iter().map(|(name, why)| format!("{name} ({why})")).collect();
        let message = format!(
            "{} has devices that belong to the host of {}: {}",
            self.located.at(),
            self.located.server,
            what.join(", ")
        );
        let mut removed = self.desired.spec.overrides.remove_devices.clone();
        removed.extend(found.into_iter().map(|(name, _)| name));
        let fix = self.patch(&json!({"removeDevices": removed}));
        let fix = format!("{fix}, or declare those that the target has in spec.overrides.devices");
        self.refuse(Reason::HostDevice, message, fix);
    }

    /// A bridge or an interface of the host, named by a network interface, must exist on the target, too. What the hosts
    /// of a cluster have besides its networks is not known.
    pub(super) fn parents(&mut self) {
        if self.facts.clustered {
            return;
        }
        let there = |parent: &str| self.facts.networks.iter().any(|n| n.name == parent);
        let missing: Vec<(String, String)> = self
            .travelling()
            .filter_map(|(name, d)| Some((name.clone(), parent(d)?.to_owned())))
            .filter(|(_, parent)| !there(parent))
            .collect();
        for (name, parent) in missing {
            let message = format!(
                "device {name} of {} uses {parent} of its host, which {} does not have",
                self.located.at(),
                self.server_name()
            );
            let fix = match self.free_network() {
                Some(network) => {
                    let device = json!({"type": "nic", "network": network, "nictype": "", "parent": ""});
                    self.patch(&json!({"devices": {name: device}}))
                }
                None => {
                    let mut removed = self.desired.spec.overrides.remove_devices.clone();
                    removed.push(name);
                    let fix = self.patch(&json!({"removeDevices": removed}));
                    format!(
                        "{fix}, or declare it in spec.overrides.devices on what {} has",
                        self.server_name()
                    )
                }
            };
            self.refuse(Reason::HostDevice, message, fix);
        }
    }

    /// A network of the target that no other interface of the instance is on: a server starts none with two on one.
    fn free_network(&self) -> Option<String> {
        let profiles = self.profiles_there();
        let project = self.desired.target_project(&self.located.instance);
        let inherited = profiles.iter().filter_map(|p| self.facts.profile(project, p));
        let inherited = inherited.flat_map(|p| p.devices.values());
        let declared = self.desired.spec.overrides.devices.values();
        let devices = inherited.chain(declared).chain(self.travelling().map(|(_, d)| d));
        let used: Vec<&str> = devices.map(|d| value(d, "network")).collect();
        let free = |n: &&Network| n.managed && !used.contains(&n.name.as_str());
        self.facts.networks.iter().find(free).map(|n| n.name.clone())
    }

    /// The command that merges into the overrides of the placement.
    fn patch(&self, overrides: &serde_json::Value) -> String {
        let patch = json!({"spec": {"overrides": overrides}});
        format!(
            "kubectl patch iplace -n {} {} --type merge -p '{patch}'",
            self.desired.namespace, self.desired.name
        )
    }
}

fn value<'a>(device: &'a Device, key: &str) -> &'a str {
    device.get(key).map_or("", String::as_str)
}

/// What of its host a device is, if it is.
fn of_the_host(device: &Device) -> Option<String> {
    match value(device, "type") {
        "disk" => {
            let source = value(device, "source");
            let of_host = source.starts_with('/') && value(device, "pool").is_empty();
            of_host.then(|| format!("path {source}"))
        }
        kind @ ("gpu" | "usb" | "pci" | "infiniband" | "unix-hotplug") => Some(kind.to_owned()),
        kind @ ("unix-char" | "unix-block") => {
            let declared = present(&device.get("source").cloned()).map(str::to_owned);
            let source = declared.unwrap_or_else(|| value(device, "path").to_owned());
            (!EVERYWHERE.contains(&source.as_str())).then(|| format!("{kind} {source}"))
        }
        "nic" if matches!(value(device, "nictype"), "physical" | "sriov") => {
            Some(format!("interface {}", value(device, "parent")))
        }
        _ => None,
    }
}

/// The bridge or interface of the host that a network interface hangs on.
fn parent(device: &Device) -> Option<&str> {
    let hangs = value(device, "type") == "nic"
        && value(device, "network").is_empty()
        && matches!(value(device, "nictype"), "bridged" | "macvlan" | "ipvlan" | "routed");
    Some(value(device, "parent")).filter(|p| hangs && !p.is_empty())
}
