//! Small worlds for the tests of decisions.
#![allow(dead_code, reason = "each file of tests uses its part")]

use std::collections::BTreeMap;
use std::sync::Arc;

use berth_api::{InstancePlacementSpec, InstancePlacementStatus};
use berth_core::model::{
    Device, Instance, InstanceKind, InstanceRef, Member, MemberStatus, Network, Pool, Power, Product, Profile, Project,
    ServerFacts,
};
use berth_core::plan::{Claim, Desired, Reach, ServerView, World};
use jiff::Timestamp;

pub fn now() -> Timestamp {
    at("2026-11-22T10:00:00Z")
}

pub fn at(text: &str) -> Timestamp {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn device(pairs: &[(&str, &str)]) -> Device {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

pub fn instance(name: &str) -> Instance {
    let config = BTreeMap::from([("volatile.uuid".to_owned(), format!("uuid-{name}"))]);
    let root = device(&[("type", "disk"), ("path", "/"), ("pool", "default")]);
    Instance {
        at: InstanceRef::new("default", name),
        kind: InstanceKind::Container,
        architecture: "x86_64".into(),
        power: Power::Running,
        member: None,
        expanded_config: config.clone(),
        config,
        devices: BTreeMap::new(),
        expanded_devices: BTreeMap::from([("root".to_owned(), root)]),
        profiles: vec!["default".into()],
        ephemeral: false,
        stateful: false,
        description: String::new(),
        created_at: "2026-11-01T00:00:00Z".into(),
        last_used_at: "2026-11-01T00:00:00Z".into(),
        known: true,
    }
}

pub fn facts(fingerprint: &str) -> ServerFacts {
    let root = device(&[("type", "disk"), ("path", "/"), ("pool", "default")]);
    ServerFacts {
        product: Product::Incus,
        version: "6.0.4".into(),
        fingerprint: fingerprint.into(),
        certificate: String::new(),
        name: fingerprint.into(),
        pid: 1,
        clustered: false,
        addresses: vec![],
        architectures: vec!["x86_64".into()],
        containers: true,
        virtual_machines: false,
        qemu: None,
        processor: None,
        extensions: ["container_push_target", "instance_move_config", "clustering_groups"]
            .map(String::from)
            .into(),
        members: vec![],
        groups: vec![],
        pools: vec![Pool {
            name: "default".into(),
            driver: "dir".into(),
        }],
        projects: vec![Project {
            name: "default".into(),
            config: BTreeMap::new(),
        }],
        profiles: vec![Profile {
            project: "default".into(),
            name: "default".into(),
            config: BTreeMap::new(),
            devices: BTreeMap::from([("root".to_owned(), root)]),
        }],
        networks: vec![Network {
            project: "default".into(),
            name: "br0".into(),
            managed: true,
        }],
    }
}

pub fn server<const N: usize>(fingerprint: &str, instances: [Instance; N]) -> ServerView {
    ServerView {
        facts: Some(Arc::new(facts(fingerprint))),
        reach: Reach::Ready,
        instances: Some(instances.into_iter().collect()),
        cordoned: false,
        cordoned_by: vec![],
        duplicate_of: None,
        free_incoming: 2,
        free_outgoing: 2,
        ways: Default::default(),
        allow_unsafe_overrides: false,
        live_between_servers: true,
    }
}

/// A cluster of m1, m2 and m3; m3 alone is in the group `ssd`.
pub fn cluster<const N: usize>(fingerprint: &str, instances: [Instance; N]) -> ServerView {
    let member = |name: &str, groups: &[&str]| Member {
        name: name.into(),
        status: MemberStatus::Online,
        architecture: "x86_64".into(),
        groups: groups.iter().map(|g| (*g).to_owned()).collect(),
    };
    let mut view = server(fingerprint, instances);
    let mut facts = facts(fingerprint);
    facts.clustered = true;
    facts.groups = vec!["default".into(), "ssd".into()];
    facts.members = vec![
        member("m1", &["default"]),
        member("m2", &["default"]),
        member("m3", &["default", "ssd"]),
    ];
    view.facts = Some(Arc::new(facts));
    view
}

pub fn world<const N: usize>(servers: [(&str, ServerView); N]) -> World {
    World {
        servers: servers.into_iter().map(|(n, v)| (n.to_owned(), v)).collect(),
        ..World::default()
    }
}

pub fn desired(name: &str, server: &str) -> Desired {
    let mut spec = InstancePlacementSpec::default();
    spec.target.server = server.into();
    Desired {
        namespace: "shop".into(),
        name: name.into(),
        uid: "uid".into(),
        generation: 1,
        created_at: at("2026-11-20T00:00:00Z"),
        deleting: false,
        approve: None,
        requested_at: None,
        spec,
        status: InstancePlacementStatus::default(),
    }
}

pub fn claim(name: &str, fingerprint: &str, uuid: &str, created: &str) -> Claim {
    Claim {
        namespace: "shop".into(),
        name: name.into(),
        created_at: at(created),
        fingerprint: fingerprint.into(),
        uuid: uuid.into(),
        moving: false,
        deleting: false,
    }
}
