//! What keeps an instance from being moved live: every unmet condition at once, each with the way to meet it. The servers
//! check some of it themselves, but only after the copy was begun, one thing at a time, and nothing of what differs
//! between two independent servers.

mod criu;

use berth_api::placement::Rejected;
use berth_api::{Method, Reason, Transfer};

use super::methods::Case;
use super::world::ServerView;
use crate::model::{
    Capability, Device, InstanceKind, MIGRATION_STATEFUL, Pool, Power, Product, ServerFacts, bytes, version_of,
};

/// The unmet conditions of a live move; none: it is possible.
pub(super) fn unmet(case: &Case<'_>) -> Vec<Rejected> {
    let Some(source) = case.source.facts.as_deref() else {
        return Vec::new();
    };
    let mut check = Check {
        case,
        source,
        rejected: Vec::new(),
    };
    match case.located.instance.kind {
        InstanceKind::Container => check.container(),
        InstanceKind::VirtualMachine => check.virtual_machine(),
    }
    check.rejected
}

struct Check<'a> {
    case: &'a Case<'a>,
    source: &'a ServerFacts,
    rejected: Vec<Rejected>,
}

impl Check<'_> {
    fn refuse(&mut self, reason: Reason, message: String, fix: impl Into<Option<String>>) {
        self.rejected.push(Rejected {
            method: Method::Live,
            reason: reason.as_str().to_owned(),
            message,
            fix: fix.into(),
        });
    }

    fn is_container(&self) -> bool {
        self.case.located.instance.kind == InstanceKind::Container
    }

    fn internal(&self) -> bool {
        self.case.transfer == Transfer::Internal
    }

    /// The instance as the source's command line names it.
    fn name(&self) -> String {
        let (server, at) = (&self.case.located.server, self.case.located.at());
        if at.project == "default" {
            format!("{server}:{}", at.name)
        } else {
            format!("{server}:{} --project {}", at.name, at.project)
        }
    }

    /// A change that the server takes only while the instance does not run.
    fn stopped(&self, change: &str) -> String {
        let (cli, name) = (self.source.product.cli(), self.name());
        format!("{cli} stop {name} && {cli} {change} && {cli} start {name}")
    }

    fn virtual_machine(&mut self) {
        self.power();
        self.stateful();
        self.state_size();
        self.devices();
        if self.internal() {
            self.inside();
        } else {
            self.allowed();
            self.adapted();
            self.versions();
            self.qemu();
            self.processors();
        }
    }

    fn power(&mut self) {
        let i = &self.case.located.instance;
        if i.power != Power::Running {
            let message = format!("{} is {}: only a running guest moves live", i.at, i.power.as_str());
            let fix = format!("{} start {}", self.source.product.cli(), self.name());
            self.refuse(Reason::MethodImpossible, message, fix);
        }
        if self.case.desired.spec.power_state == berth_api::placement::PowerState::Stopped {
            let message = format!("spec.powerState is Stopped, so {} need not arrive running", i.at);
            self.refuse(
                Reason::MethodImpossible,
                message,
                "set spec.powerState: Preserve".to_owned(),
            );
        }
    }

    fn stateful(&mut self) {
        let i = &self.case.located.instance;
        if i.expanded_config.get(MIGRATION_STATEFUL).is_none_or(|v| v != "true") {
            let message = format!("{MIGRATION_STATEFUL} is not true on {}", i.at);
            let (server, project) = (&self.case.located.server, &i.at.project);
            let name = &i.at.name;
            let fix = self.stopped(&format!(
                "config set {server}:{name} {MIGRATION_STATEFUL}=true --project {project}"
            ));
            self.refuse(Reason::MigrationStatefulOff, message, fix);
        } else if started_without(&i.config) {
            let message = format!(
                "{MIGRATION_STATEFUL} is true on {}, but the guest was started before: it holds from the next start on",
                i.at
            );
            let fix = format!("{} restart {}", self.source.product.cli(), self.name());
            self.refuse(Reason::MigrationStatefulPending, message, fix);
        }
    }

    /// LXD writes the memory to the root disk's state volume, or may have to.
    fn state_size(&mut self) {
        let i = &self.case.located.instance;
        let shared = i
            .root_pool()
            .and_then(|p| self.source.pool(p))
            .is_some_and(Pool::shared);
        if self.source.product != Product::Lxd || shared {
            return;
        }
        let Some((root, device)) = i.root_device() else { return };
        let memory = i.expanded_config.get("limits.memory").map_or("1GiB", String::as_str);
        let state = device.get("size.state").map_or("500MiB", String::as_str);
        // a share of the host's memory cannot be told from here
        let (Some(needs), Some(has)) = (bytes(memory), bytes(state)) else {
            return;
        };
        if has < needs {
            let message = format!(
                "size.state of the root disk of {} is {state}, its limits.memory is {memory}",
                i.at
            );
            let (server, name, project) = (&self.case.located.server, &i.at.name, &i.at.project);
            let verb = if i.devices.contains_key(root) {
                "set"
            } else {
                "override"
            };
            let fix = self.stopped(&format!(
                "config device {verb} {server}:{name} {root} size.state={memory} --project {project}"
            ));
            self.refuse(Reason::StateSizeTooSmall, message, fix);
        }
    }

    fn devices(&mut self) {
        let i = self.case.located.instance.clone();
        for (name, device) in &i.expanded_devices {
            let Some((reason, why)) = self.device(device) else {
                continue;
            };
            let message = format!("device {name} of {}: {why}", i.at);
            let fix = match reason {
                Reason::NetworkNotFound => {
                    let parent = device.get("parent").map_or("", String::as_str);
                    format!(
                        "make {parent} on the host of {}, or set spec.overrides.devices",
                        self.case.to.server
                    )
                }
                _ => self.without(name),
            };
            self.refuse(reason, message, fix);
        }
    }

    /// How a device is taken away: from the instance, or from the profile that brings it.
    fn without(&self, device: &str) -> String {
        let (server, i) = (&self.case.located.server, &self.case.located.instance);
        let at = &i.at;
        if i.devices.contains_key(device) {
            return self.stopped(&format!(
                "config device remove {server}:{} {device} --project {}",
                at.name, at.project
            ));
        }
        self.stopped(&format!(
            "config device add {server}:{} {device} none --project {}",
            at.name, at.project
        ))
    }

    fn device(&self, device: &Device) -> Option<(Reason, String)> {
        let value = |k: &str| device.get(k).map_or("", String::as_str);
        match value("type") {
            "disk" => self.disk(device),
            "nic" if matches!(value("nictype"), "physical" | "sriov") => {
                Some((Reason::LocalDevice, "it is a network card of the host".to_owned()))
            }
            "nic" if !value("parent").is_empty() && !self.target_has(value("parent")) => {
                let (server, parent) = (&self.case.to.server, value("parent"));
                Some((Reason::NetworkNotFound, format!("{server} has no network {parent}")))
            }
            "nic" if self.is_container() => self.card(device),
            kind @ ("gpu" | "usb" | "pci" | "infiniband") => {
                Some((Reason::LocalDevice, format!("a {kind} device stays on its host")))
            }
            kind if kind.starts_with("unix-") => {
                Some((Reason::LocalDevice, format!("a {kind} device stays on its host")))
            }
            _ => None,
        }
    }

    /// A cluster lists the networks of one member only, and its members agree by definition.
    fn target_has(&self, network: &str) -> bool {
        let facts = self.case.target;
        facts.clustered || facts.networks.is_empty() || facts.networks.iter().any(|n| n.name == network)
    }

    fn disk(&self, device: &Device) -> Option<(Reason, String)> {
        let value = |k: &str| device.get(k).map_or("", String::as_str);
        let (source, path) = (value("source"), value("path"));
        if value("io.bus") == "nvme" {
            return Some((
                Reason::LocalDevice,
                "a disk on io.bus=nvme cannot be moved live".to_owned(),
            ));
        }
        // an optional one need not be there
        if path == "/" || value("required") == "false" {
            return None;
        }
        if source.starts_with('/') {
            return Some(if path.is_empty() {
                (Reason::LocalDevice, format!("{source} is a disk of the host"))
            } else {
                (
                    Reason::SharedFilesystem,
                    format!("the folder {source} of the host is shared with the guest"),
                )
            });
        }
        if self.is_container() {
            return Self::volume(self.source, device);
        }
        let pool = self.source.pool(value("pool"))?;
        if !path.is_empty() {
            return Some((
                Reason::SharedFilesystem,
                format!("the volume {source} is shared with the guest as a file system"),
            ));
        }
        let travels = pool.shared() || value("dependent") == "true";
        (!travels).then(|| {
            let (pool, driver) = (&pool.name, &pool.driver);
            (
                Reason::PoolNotShared,
                format!("the volume {source} is on pool {pool} ({driver}), which only its host has"),
            )
        })
    }

    /// What a cluster can change of a running instance is its member alone.
    fn inside(&mut self) {
        let (here, to) = (self.case.located, self.case.to);
        let mut what = Vec::new();
        if to.name != here.at().name {
            what.push("renamed");
        }
        if to.project != here.at().project {
            what.push("moved to another project");
        }
        let pool = to.pool.as_deref() != here.instance.root_pool();
        if pool && !(self.source.can(Capability::LivePool) && to.member != here.instance.member) {
            what.push("moved to another pool");
        }
        if !what.is_empty() {
            let message = format!("{} cannot be {} while it runs", here.at(), what.join(" and "));
            let fix = "add Cold to spec.methods, or leave that change for later".to_owned();
            self.refuse(Reason::MethodImpossible, message, fix);
        }
    }

    /// Both guests run for a moment at the end: an operator can forbid that.
    fn allowed(&mut self) {
        let (from, to) = (&self.case.located.server, &self.case.desired.spec.target.server);
        let forbids = |view: &ServerView| !view.live_between_servers;
        let ends = [(from, self.case.source), (to, self.case.target_view)];
        for (server, _) in ends.into_iter().filter(|(_, view)| forbids(view)) {
            let namespace = &self.case.desired.namespace;
            let message = format!(
                "InstanceServer {server} forbids live moves between independent servers (spec.live.betweenServers)"
            );
            let fix = format!(
                "kubectl patch isrv -n {namespace} {server} --type merge -p '{{\"spec\":{{\"live\":{{\"betweenServers\":true}}}}}}'"
            );
            self.refuse(Reason::MethodImpossible, message, fix);
        }
        if self.case.transfer == Transfer::Backup {
            let message = "a backup holds no running state".to_owned();
            self.refuse(Reason::MethodImpossible, message, "set spec.transfer: Auto".to_owned());
        }
    }

    /// A running guest keeps what it was started with.
    fn adapted(&mut self) {
        let (o, i) = (&self.case.desired.spec.overrides, &self.case.located.instance);
        let free = |k: &str| ["user.", "boot.", "snapshots."].iter().any(|p| k.starts_with(p));
        let config = o
            .config
            .iter()
            .filter(|(k, v)| !free(k) && i.expanded_config.get(*k) != Some(v));
        let mut what: Vec<String> = config.map(|(k, _)| k.clone()).collect();
        what.extend(
            o.remove_config
                .iter()
                .filter(|k| !free(k) && i.config.contains_key(*k))
                .cloned(),
        );
        let same = |name: &str, wanted: &Device| {
            i.expanded_devices
                .get(name)
                .is_some_and(|have| wanted.iter().all(|(k, v)| have.get(k) == Some(v)))
        };
        what.extend(
            o.devices
                .iter()
                .filter(|(n, d)| !same(n, d))
                .map(|(n, _)| format!("device {n}")),
        );
        what.extend(
            o.remove_devices
                .iter()
                .filter(|d| i.devices.contains_key(*d))
                .map(|n| format!("device {n}")),
        );
        if (o.no_profiles && !i.profiles.is_empty()) || (!o.profiles.is_empty() && o.profiles != i.profiles) {
            what.push("profiles".to_owned());
        }
        if !what.is_empty() {
            let message = format!("spec.overrides changes {} of a running guest", what.join(", "));
            let fix = "add Cold to spec.methods, or remove these overrides".to_owned();
            self.refuse(Reason::MethodImpossible, message, fix);
        }
    }

    fn versions(&mut self) {
        let (from, to) = (self.source, self.case.target);
        let (there, here) = (&self.case.to.server, &self.case.located.server);
        let stay = "add Warm or Cold to spec.methods".to_owned();
        if from.product != to.product {
            let message = format!(
                "{here} is {} and {there} is {}: neither reads the other's running state",
                from.product.as_str(),
                to.product.as_str()
            );
            return self.refuse(Reason::VersionMismatch, message, stay);
        }
        if version_of(&from.version) > version_of(&to.version) {
            let message = format!(
                "{here} runs {} {} and {there} only {}: an older server refuses a newer running state",
                from.product.as_str(),
                from.version,
                to.version
            );
            self.refuse(
                Reason::VersionMismatch,
                message,
                format!("upgrade {there} to {}", from.version),
            );
        }
    }

    fn qemu(&mut self) {
        let (from, to) = (self.source, self.case.target);
        let (there, here) = (&self.case.to.server, &self.case.located.server);
        // the product is said to differ already
        let same_product = from.product == to.product;
        let (Some(ours), Some(theirs)) = (&from.qemu, &to.qemu) else {
            return;
        };
        if same_product && version_of(ours) != version_of(theirs) {
            let message = format!("{here} runs QEMU {ours} and {there} QEMU {theirs}");
            self.refuse(Reason::QemuMismatch, message, format!("install QEMU {ours} on {there}"));
        }
    }

    /// Independent servers start guests with all that their own processor has.
    fn processors(&mut self) {
        let (from, to) = (self.source, self.case.target);
        let (Some(ours), Some(theirs)) = (&from.processor, &to.processor) else {
            return;
        };
        if from.clustered || to.clustered {
            return;
        }
        let missing: Vec<&str> = ours.flags.difference(&theirs.flags).map(String::as_str).collect();
        let known = !ours.flags.is_empty() && !theirs.flags.is_empty();
        if known && missing.is_empty() || !known && ours.name == theirs.name {
            return;
        }
        let (here, there) = (&self.case.located.server, &self.case.to.server);
        let mut message = format!("{here} has {}, {there} has {}", ours.name, theirs.name);
        if known {
            let some: Vec<&str> = missing.iter().take(8).copied().collect();
            message.push_str(&format!(", which lacks {}", some.join(" ")));
        }
        let fix = "add Warm or Cold to spec.methods, or choose a server with such processors".to_owned();
        self.refuse(Reason::CpuMismatch, message, fix);
    }
}

/// Newer Incus writes down what it started a machine with; one that was started for good has no machine type in it.
fn started_without(config: &crate::model::Config) -> bool {
    config
        .get("volatile.vm.boot_state")
        .is_some_and(|state| !state.contains("machine_type"))
}
