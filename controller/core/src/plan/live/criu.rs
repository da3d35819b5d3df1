//! What CRIU asks of a container and of both servers. Facts: what Incus 6.0 and 7.0 with CRIU 4.1 were seen to do, and
//! what liblxc knows how to restore.

use berth_api::Reason;

use super::{Check, ServerFacts};
use crate::model::{Device, Inside, MIGRATION_STATEFUL, Product};
use crate::moves::how_to_install;
use crate::plan::lessons::REMEMBERED;

/// The extension of servers whose containers know the key [`MIGRATION_STATEFUL`].
const STATEFUL_CONTAINERS: &str = "container_migration_stateful";
const CONSOLE: (&str, &str) = ("lxc.console.path", "none");

impl Check<'_> {
    pub(super) fn container(&mut self) {
        let spec = &self.case.desired.spec;
        if !spec.criu {
            let (namespace, name) = (&self.case.desired.namespace, &self.case.desired.name);
            let why = "containers are moved live only with spec.criu: true".to_owned();
            let fix =
                format!("kubectl patch iplace -n {namespace} {name} --type merge -p '{{\"spec\":{{\"criu\":true}}}}'");
            return self.refuse(Reason::MethodImpossible, why, fix);
        }
        if self.internal() {
            let why =
                "a container is not moved live inside a server: one that arrives broken could not be undone".to_owned();
            return self.refuse(Reason::MethodImpossible, why, "add Cold to spec.methods".to_owned());
        }
        self.power();
        self.installed();
        self.container_stateful();
        self.console();
        self.owned();
        self.looked_into();
        self.devices();
        self.allowed();
        self.adapted();
        self.versions();
        self.processors();
    }

    /// No server says whether it has CRIU until a move is tried.
    fn installed(&mut self) {
        let (lessons, now) = (&self.case.world.lessons, self.case.now);
        let ends = [
            (&self.case.located.server, self.source),
            (&self.case.to.server, self.case.target),
        ];
        for (server, facts) in ends {
            let Some((at, words)) = lessons.without_criu(&facts.fingerprint) else {
                continue;
            };
            let until = at.checked_add(REMEMBERED).unwrap_or(at);
            if until <= now {
                continue;
            }
            let fix = format!(
                "{}; then, before {until}: {}",
                how_to_install(server, facts.product),
                self.case.desired.request_command()
            );
            let message = format!("as a move at {at} was told: {words}");
            self.refuse(Reason::CriuMissing, message, fix);
        }
    }

    /// Incus does not insist on it for a live move, but it is how an owner says that the running state may be saved.
    fn container_stateful(&mut self) {
        let i = &self.case.located.instance;
        let knows = self.source.product == Product::Incus && self.source.extensions.contains(STATEFUL_CONTAINERS);
        if !knows || i.expanded_config.get(MIGRATION_STATEFUL).is_some_and(|v| v == "true") {
            return;
        }
        let message = format!("{MIGRATION_STATEFUL} is not true on {}", i.at);
        let fix = format!(
            "{} config set {} {MIGRATION_STATEFUL}=true",
            self.source.product.cli(),
            self.name()
        );
        self.refuse(Reason::MigrationStatefulOff, message, fix);
    }

    /// The console that a container has by default is restored by nobody.
    fn console(&mut self) {
        let i = &self.case.located.instance;
        let raw = i.expanded_config.get("raw.lxc").map_or("", String::as_str);
        let set = raw.lines().filter_map(|l| l.split_once('='));
        let mut set = set.map(|(k, v)| (k.trim(), v.trim())).filter(|(k, _)| *k == CONSOLE.0);
        if set.next_back() == Some(CONSOLE) {
            return;
        }
        let (cli, name) = (self.source.product.cli(), self.name());
        let line = format!("{} = {}", CONSOLE.0, CONSOLE.1);
        let message = format!("{} has a console, which CRIU does not restore", i.at);
        let fix = format!(
            "{cli} stop {name} && printf '%s\\n%s\\n' \"$({cli} config get {name} raw.lxc)\" '{line}' | {cli} config set {name} raw.lxc - && {cli} start {name}"
        );
        self.refuse(Reason::MethodImpossible, message, fix);
    }

    /// The file system of an unprivileged container is mounted with shifted owners, and CRIU restores it without.
    fn owned(&mut self) {
        let i = &self.case.located.instance;
        let map = |key: &str| i.config.get(key).map(|v| v.trim());
        let unprivileged = map("volatile.idmap.current").is_some_and(|m| !m.is_empty() && m != "[]");
        // on the disk the owners are those from inside: the difference is in the mount
        let mounted = map("volatile.last_state.idmap") == Some("[]");
        if !unprivileged || !mounted {
            return;
        }
        let (cli, name, server) = (self.source.product.cli(), self.name(), &self.case.located.server);
        let (service, variable) = match self.source.product {
            Product::Incus => ("incus", "INCUS_IDMAPPED_MOUNTS_DISABLE"),
            Product::Lxd => ("lxd", "LXD_IDMAPPED_MOUNTS_DISABLE"),
        };
        let message = format!(
            "{} is unprivileged and its files have their owners by an idmapped mount, which CRIU loses: all of them would belong to nobody",
            i.at
        );
        let fix = format!(
            "on the host of {server}: mkdir -p /etc/systemd/system/{service}.service.d && printf '[Service]\\nEnvironment={variable}=1\\n' >/etc/systemd/system/{service}.service.d/idmap.conf && systemctl daemon-reload && systemctl restart {service}; then {cli} restart {name}"
        );
        self.refuse(Reason::MethodImpossible, message, fix);
    }

    /// What the container showed of itself: after a restore it must show as much.
    fn looked_into(&mut self) {
        let Some(inside) = self.case.world.inside else { return };
        let at = &self.case.located.instance.at;
        if let Some(why) = inside.wrong() {
            let message = format!("{at} {why}, so that nobody could tell whether it arrived as it was");
            self.refuse(
                Reason::MethodImpossible,
                message,
                "add Warm or Cold to spec.methods".to_owned(),
            );
        }
        let Inside { systemd, .. } = inside;
        if systemd {
            let message = format!("{at} is run by systemd, which CRIU does not move");
            self.refuse(
                Reason::MethodImpossible,
                message,
                "add Warm or Cold to spec.methods".to_owned(),
            );
        }
    }

    /// liblxc restores pairs of virtual cards and macvlan, and nothing else.
    pub(super) fn card(&self, device: &Device) -> Option<(Reason, String)> {
        let kind = device.get("nictype").map_or("bridged", String::as_str);
        let restored = matches!(kind, "bridged" | "p2p" | "macvlan");
        (!restored).then(|| (Reason::LocalDevice, format!("CRIU restores no {kind} card")))
    }

    /// A volume of a container arrives as it was only if both ends see the same one.
    pub(super) fn volume(facts: &ServerFacts, device: &Device) -> Option<(Reason, String)> {
        let value = |k: &str| device.get(k).map_or("", String::as_str);
        let pool = facts.pool(value("pool"))?;
        (!pool.shared()).then(|| {
            let (source, pool, driver) = (value("source"), &pool.name, &pool.driver);
            let why = format!("the volume {source} is on pool {pool} ({driver}), which only its host has");
            (Reason::PoolNotShared, why)
        })
    }
}
