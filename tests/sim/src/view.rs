//! The world as clients see it: instances, snapshots and facts in the types of the port.

use berth_core::model::{Instance, InstanceRef, MemberStatus, Power, Product, ServerFacts, Snapshot};

use crate::config;
use crate::state::{Host, Inst};

pub(crate) fn instance(host: &Host, at: &InstanceRef, i: &Inst) -> Instance {
    let (expanded_config, expanded_devices) = config::expand(host, &at.project, i);
    let member = i
        .member
        .as_ref()
        .and_then(|m| host.members.iter().find(|x| &x.name == m));
    let lingers = host.product == Product::Incus && i.busy.as_ref().is_some_and(|b| b.action == "stop");
    let known = member.is_none_or(|m| m.status != MemberStatus::Offline);
    let mut seen = Instance {
        at: at.clone(),
        kind: i.kind,
        architecture: i.architecture.clone(),
        power: if lingers { Power::Running } else { i.power },
        member: i.member.clone(),
        config: i.config.clone(),
        devices: i.devices.clone(),
        expanded_config,
        expanded_devices,
        profiles: i.profiles.clone(),
        ephemeral: i.ephemeral,
        stateful: i.stateful,
        description: i.description.clone(),
        created_at: i.created_at.to_string(),
        last_used_at: i.last_used_at.to_string(),
        known,
    };
    if !known {
        // the stub that a cluster lists for a member that does not answer
        seen.power = Power::Error;
        seen.config.clear();
        seen.expanded_config.clear();
        seen.devices.clear();
        seen.expanded_devices.clear();
        seen.profiles.clear();
    }
    seen
}

pub(crate) fn snapshots(i: &Inst) -> Vec<Snapshot> {
    let seen = |s: &crate::state::Snap| Snapshot {
        name: s.name.clone(),
        created_at: s.created_at.to_string(),
        expires_at: None,
        config: s.config.clone(),
    };
    i.snapshots.iter().map(seen).collect()
}

pub(crate) fn facts(host: &Host) -> ServerFacts {
    let groups = host
        .members
        .iter()
        .flat_map(|m| m.groups.iter().cloned())
        .collect::<std::collections::BTreeSet<_>>();
    ServerFacts {
        product: host.product,
        version: host.version.clone(),
        fingerprint: host.fingerprint.clone(),
        certificate: host.certificate.clone(),
        name: host.members.first().map_or(&host.name, |m| &m.name).clone(),
        pid: host.pid,
        clustered: host.clustered(),
        addresses: vec![host.address.clone()],
        architectures: vec!["x86_64".to_owned(), "i686".to_owned()],
        containers: true,
        virtual_machines: true,
        qemu: Some("10.0.2".to_owned()),
        processor: None,
        extensions: host.extensions.clone(),
        members: host.members.clone(),
        groups: groups.into_iter().collect(),
        pools: host.pools.clone(),
        projects: host.projects.clone(),
        profiles: host.profiles.clone(),
        networks: host.networks.clone(),
    }
}
