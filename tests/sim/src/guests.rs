//! What is different about virtual machines: when their running state can be moved or saved, and when it goes by way of
//! the disk.

use berth_core::model::{InstanceKind, Product};
use berth_core::server::{AcceptRequest, Peer};

use crate::config;
use crate::migrate::Transfer;
use crate::state::State;

impl State {
    /// Why the running state of a virtual machine can neither be handed over nor (asked with `saved`) be saved.
    pub fn stays(&self, server: &str, born: u64, saved: bool) -> Option<String> {
        let host = self.servers.get(server)?;
        let at = host.born(born)?;
        let i = host.instances.get(&at)?;
        let (config, _) = config::expand(host, &at.project, i);
        let stateful = config.get("migration.stateful").is_some_and(|v| v == "true");
        let what = match host.product {
            Product::Incus if !saved => "Live migration",
            Product::Incus | Product::Lxd => "Stateful stop",
        };
        let stays = i.kind == InstanceKind::VirtualMachine && !stateful;
        stays.then(|| format!("{what} requires migration.stateful to be set to true"))
    }

    /// Why the target cannot take the running state over, though it has all the data.
    pub fn cannot_go_on(&self, t: &Transfer) -> Option<String> {
        let host = self.servers.get(&t.target.server).filter(|_| t.live && t.ran)?;
        let at = host.born(t.target.born)?;
        config::unstartable_devices(host, &at.project, host.instances.get(&at)?)
    }

    /// Whether the running state goes by way of the disk: a virtual machine, and a server that cannot hand it over.
    pub fn saves_state(&self, t: &Transfer) -> bool {
        let ends = [&t.source, &t.target];
        let able = ends
            .iter()
            .all(|e| self.servers.get(&e.server).is_some_and(|h| h.has("migration_vm_live")));
        let source = self.servers.get(&t.source.server).and_then(|h| {
            let at = h.born(t.source.born)?;
            h.instances.get(&at)
        });
        let vm = source.is_some_and(|i| i.kind == InstanceKind::VirtualMachine);
        t.live && t.ran && vm && !able
    }

    /// Why the source's end of a transfer fails: what both were asked for (`live`: source, target) does not fit the guest.
    pub fn guest_stays(&self, ends: [(&str, u64); 2], live: [bool; 2], of_snapshot: bool) -> Option<String> {
        let [source, target] = ends;
        match live {
            [true, true] => self.stays(source.0, source.1, false),
            [false, true] => Some("there is no running state".to_owned()),
            [_, false] => (!of_snapshot && self.needs_rest(source, target))
                .then(|| "Rsync based migration doesn't support running virtual machines".to_owned()),
        }
    }

    /// What Incus says at once to a target that is to receive a running state which its source has not.
    pub fn misses_state(&self, server: &str, request: &AcceptRequest) -> Option<&'static str> {
        let incus = self.servers.get(server)?.product == Product::Incus;
        let stateless = |peer: &Peer| !peer.channel.secrets.contains_key("criu");
        let misses = incus && request.live && request.pull_from.as_ref().is_some_and(stateless);
        misses.then_some("Expected \"criu\" connection secret missing from migration sink target request")
    }

    /// Whether LXD 5.0 sends that disk only while nothing runs on it: a virtual machine's, unless both pools can send what
    /// they have as it is.
    fn needs_rest(&self, source: (&str, u64), target: (&str, u64)) -> bool {
        let end = |(server, born): (&str, u64)| {
            let host = self.servers.get(server)?;
            let i = host.instances.get(&host.born(born)?)?;
            let lxd_vm = host.product == Product::Lxd && i.kind == InstanceKind::VirtualMachine;
            Some((lxd_vm && i.runs(), host.driver(&i.pool).to_owned()))
        };
        let (Some((running, here)), Some((_, there))) = (end(source), end(target)) else {
            return false;
        };
        running && (here == "dir" || here != there)
    }
}
