//! What keeps a guest from being moved live, and what the plan of a live move is.

use crate::common::{desired, instance, now, server, world};
use berth_api::placement::PlanMethod;
use berth_api::{GuardKind, Method};
use berth_core::model::{Device, Instance, InstanceKind, Processor, Product};
use berth_core::plan::{Decision, Verdict, World, plan};

fn device(pairs: &[(&str, &str)]) -> Device {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// A running guest that can be moved live.
fn guest() -> Instance {
    let mut i = instance("web-1");
    i.kind = InstanceKind::VirtualMachine;
    i.config.insert("migration.stateful".into(), "true".into());
    i.expanded_config = i.config.clone();
    i
}

/// Servers a and b that hold virtual machines.
fn two(guest: Instance) -> World {
    let mut w = world([("a", server("fp-a", [guest])), ("b", server("fp-b", []))]);
    for name in ["a", "b"] {
        facts(&mut w, name, |f| {
            f.virtual_machines = true;
            f.qemu = Some("10.0.2".into());
        });
    }
    w
}

fn facts(w: &mut World, name: &str, change: impl FnOnce(&mut berth_core::model::ServerFacts)) {
    let view = w.servers.get_mut(name).expect("the server");
    let mut facts = view.facts.as_deref().expect("its facts").clone();
    change(&mut facts);
    view.facts = Some(std::sync::Arc::new(facts));
}

fn verdict(w: &World) -> Verdict {
    let mut d = desired("web-1", "b");
    d.spec.methods = vec![Method::Live];
    plan(&d, w, now())
}

fn reasons(w: &World) -> Vec<String> {
    let plan = verdict(w).plan.expect("a plan");
    plan.rejected.iter().map(|r| r.reason.clone()).collect()
}

#[test]
fn a_guest_that_can_moves_live_and_arrives_without_a_guard() {
    let v = verdict(&two(guest()));
    assert_eq!(v.plan.expect("a plan").method, Some(PlanMethod::Live));
    let Decision::Move(spec) = v.decision else {
        panic!("{:?}", v.decision)
    };
    assert_eq!(
        (spec.guard.source, spec.guard.target),
        (GuardKind::Device, GuardKind::None)
    );
    assert!(spec.live.is_some());
}

#[test]
fn every_unmet_condition_is_named_at_once_each_with_a_way_to_meet_it() {
    let mut i = guest();
    i.expanded_config.remove("migration.stateful");
    for (name, keys) in [
        ("gpu", vec![("type", "gpu")]),
        ("share", vec![("type", "disk"), ("source", "/srv"), ("path", "/mnt")]),
        ("data", vec![("type", "disk"), ("source", "vol"), ("pool", "default")]),
        ("eth9", vec![("type", "nic"), ("nictype", "bridged"), ("parent", "br9")]),
    ] {
        i.expanded_devices.insert(name.into(), device(&keys));
    }
    let mut w = two(i);
    facts(&mut w, "b", |f| {
        f.version = "6.0.1".into();
        f.qemu = Some("7.2.22".into());
        f.processor = Some(Processor {
            name: "old".into(),
            flags: ["sse".to_owned()].into(),
        });
        f.networks = vec![berth_core::model::Network {
            project: "default".into(),
            name: "br0".into(),
            managed: false,
        }];
    });
    facts(&mut w, "a", |f| {
        f.version = "6.2".into();
        f.processor = Some(Processor {
            name: "new".into(),
            flags: ["sse".to_owned(), "avx2".to_owned()].into(),
        });
    });
    w.servers.get_mut("b").expect("b").live_between_servers = false;
    let expected = [
        "MigrationStatefulOff",
        "PoolNotShared",
        "NetworkNotFound",
        "LocalDevice",
        "SharedFilesystem",
        "MethodImpossible",
        "VersionMismatch",
        "QemuMismatch",
        "CpuMismatch",
    ];
    assert_eq!(reasons(&w), expected);
    let plan = verdict(&w).plan.expect("a plan");
    assert!(plan.rejected.iter().all(|r| r.fix.is_some()), "{:#?}", plan.rejected);
}

#[test]
fn lxd_needs_room_for_the_memory_unless_all_members_share_the_pool() {
    let mut w = two(guest());
    for name in ["a", "b"] {
        facts(&mut w, name, |f| f.product = Product::Lxd);
    }
    // 500 MiB unless said otherwise, for 1 GiB of memory
    assert_eq!(reasons(&w), ["StateSizeTooSmall"]);
    facts(&mut w, "a", |f| f.pools[0].driver = "ceph".into());
    assert!(reasons(&w).is_empty());
}

#[test]
fn the_two_products_do_not_read_each_others_running_state() {
    let mut w = two(guest());
    facts(&mut w, "b", |f| f.product = Product::Lxd);
    assert_eq!(reasons(&w), ["VersionMismatch"]);
}
