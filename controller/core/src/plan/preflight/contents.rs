//! What an instance consists of, against what the target has: overrides that reach into the host, the pool of the root
//! disk, profiles, networks.

use std::collections::BTreeSet;

use berth_api::{Overrides, Reason};

use super::Check;
use crate::model::{Device, Instance};
use crate::plan::world::Desired;

impl Check<'_> {
    /// Overrides that would make a namespace's user root on the host.
    pub(super) fn overrides(&mut self) {
        if self.view.allow_unsafe_overrides {
            return;
        }
        let reaching = reaching_into_host(&self.desired.spec.overrides);
        if reaching.is_empty() {
            return;
        }
        let (server, namespace) = (self.server_name().to_owned(), &self.desired.namespace);
        let message = format!(
            "spec.overrides reaches into the host of {server}: {}",
            reaching.join(", ")
        );
        let fix = format!(
            "kubectl patch isrv -n {namespace} {server} --type merge -p '{{\"spec\":{{\"allowUnsafeOverrides\":true}}}}'"
        );
        self.refuse(Reason::InvalidSpec, message, fix);
    }

    /// A device that the instance does not have needs a type.
    pub(super) fn device_types(&mut self) {
        let there = &self.located.instance.expanded_devices;
        let devices = &self.desired.spec.overrides.devices;
        let untyped: Vec<&str> = devices
            .iter()
            .filter(|(name, device)| !there.contains_key(*name) && !device.contains_key("type"))
            .map(|(name, _)| name.as_str())
            .collect();
        if untyped.is_empty() {
            return;
        }
        let message = format!(
            "{} has no device {} to merge over, and spec.overrides.devices names no type for it",
            self.located.at(),
            untyped.join(", ")
        );
        let fix = format!("add type to spec.overrides.devices.{}", untyped[0]);
        self.refuse(Reason::InvalidSpec, message, fix);
    }

    /// The pool of the root disk: the declared one, else one of the same name, else what the target's profiles say.
    pub(super) fn pool(&mut self, project: &str) -> Option<String> {
        let declared = self.desired.target_pool(&self.located.instance);
        if let Some(pool) = declared {
            if self.facts.pool(pool).is_none() {
                self.no_pool(pool);
            }
            return Some(pool.to_owned());
        }
        let current = self.located.instance.root_pool().map(str::to_owned);
        if self.internal || current.as_deref().is_some_and(|p| self.facts.pool(p).is_some()) {
            return current;
        }
        let profiles = self.profiles_there();
        let from_profile = profiles
            .iter()
            .rev()
            .filter_map(|p| self.facts.profile(project, p))
            .find_map(|p| {
                let root = p.devices.values().find(|d| d.get("path").is_some_and(|p| p == "/"));
                root.and_then(|d| d.get("pool")).cloned()
            });
        if from_profile.is_none() {
            self.no_pool(current.as_deref().unwrap_or("default"));
        }
        from_profile
    }

    pub(super) fn no_pool(&mut self, pool: &str) {
        let names: Vec<String> = self
            .facts
            .pools
            .iter()
            .map(|p| format!("{} ({})", p.name, p.driver))
            .collect();
        let message = format!("{} has no storage pool {pool}", self.server_name());
        self.refuse(
            Reason::PoolNotFound,
            message,
            format!("set spec.target.pool to one of {}", names.join(", ")),
        );
    }

    pub(super) fn profiles_there(&self) -> Vec<String> {
        let o = &self.desired.spec.overrides;
        match (o.no_profiles, o.profiles.is_empty()) {
            (true, _) => Vec::new(),
            (false, false) => o.profiles.clone(),
            (false, true) => self.located.instance.profiles.clone(),
        }
    }

    pub(super) fn profiles(&mut self, project: &str) {
        if self.facts.project(project).is_none() {
            return;
        }
        for profile in self.profiles_there() {
            if self.facts.profile(project, &profile).is_none() {
                let message = format!("{} has no profile {profile} in project {project}", self.server_name());
                let fix = format!(
                    "{}, or set spec.overrides.profiles",
                    self.cli(&format!("profile create {profile} --project {project}"))
                );
                self.refuse(Reason::ProfileNotFound, message, fix);
            }
        }
    }

    /// The networks that the instance's own devices name; those of its profiles are the target's own affair.
    pub(super) fn networks(&mut self, project: &str) {
        for network in networks(&self.located.instance, self.desired) {
            if !self.facts.networks.iter().any(|n| n.name == network) {
                let message = format!("{} has no network {network}", self.server_name());
                let fix = format!(
                    "{}, or set spec.overrides.devices",
                    self.cli(&format!("network create {network} --project {project}"))
                );
                self.refuse(Reason::NetworkNotFound, message, fix);
            }
        }
    }
}

/// Which overrides reach into the host (design "rules", Overrides).
fn reaching_into_host(overrides: &Overrides) -> Vec<String> {
    let key = |k: &&String| k.starts_with("raw.") || ["security.privileged", "security.nesting"].contains(&k.as_str());
    let device = |d: &Device| {
        let value = |k: &str| d.get(k).map_or("", String::as_str);
        match value("type") {
            "disk" => value("source").starts_with('/'),
            "nic" => matches!(value("nictype"), "physical" | "sriov"),
            "gpu" | "usb" | "pci" | "infiniband" | "proxy" => true,
            other => other.starts_with("unix-"),
        }
    };
    let keys = overrides.config.keys().filter(key).cloned();
    let devices = overrides
        .devices
        .iter()
        .filter(|(_, d)| device(d))
        .map(|(name, _)| format!("device {name}"));
    keys.chain(devices).collect()
}

fn networks(i: &Instance, desired: &Desired) -> BTreeSet<String> {
    let o = &desired.spec.overrides;
    let stays = i
        .devices
        .iter()
        .filter(|(name, _)| !o.devices.contains_key(*name) && !o.remove_devices.contains(name));
    stays
        .chain(&o.devices)
        .filter_map(|(_, d)| d.get("network").cloned())
        .collect()
}
