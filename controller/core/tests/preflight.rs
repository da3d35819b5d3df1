//! What is refused before anything is touched: each with its reason, a sentence and something to paste.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use berth_api::Reason;
use berth_core::model::{Contents, Device, Instance, Network, Pool, Project, ServerFacts, Snapshot};
use berth_core::plan::{Blocker, Decision, Desired, Verdict, World, plan};
use common::{cluster, desired, instance, now, server, world};

fn device(pairs: &[(&str, &str)]) -> Device {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// An instance with such a device of its own.
fn with(name: &str, pairs: &[(&str, &str)]) -> Instance {
    let mut web = instance("web");
    web.devices.insert(name.into(), device(pairs));
    web.expanded_devices.insert(name.into(), device(pairs));
    web
}

fn from_a_to_b(web: Instance) -> (Desired, World) {
    let w = world([("rack-a", server("a", [web])), ("rack-b", server("b", []))]);
    (desired("web", "rack-b"), w)
}

fn target(w: &mut World) -> &mut ServerFacts {
    let facts = w.servers.get_mut("rack-b").and_then(|v| v.facts.as_mut());
    facts.map(Arc::make_mut).unwrap_or_else(|| panic!("rack-b is known"))
}

fn blockers(d: &Desired, w: &World) -> Vec<Blocker> {
    match plan(d, w, now()).decision {
        Decision::Blocked(blockers) => blockers,
        Decision::Move(_) => Vec::new(),
        other => panic!("{other:?}"),
    }
}

fn reasons(d: &Desired, w: &World) -> Vec<Reason> {
    blockers(d, w).iter().map(|b| b.reason).collect()
}

fn fix(d: &Desired, w: &World) -> String {
    blockers(d, w).first().and_then(|b| b.fix.clone()).unwrap_or_default()
}

#[test]
fn devices_of_the_host_are_refused_and_the_fix_takes_them_off() {
    let table: [(&str, &[(&str, &str)]); 9] = [
        ("data", &[("type", "disk"), ("source", "/srv/data"), ("path", "/data")]),
        ("gpu0", &[("type", "gpu")]),
        ("stick", &[("type", "usb"), ("vendorid", "abcd")]),
        ("modem", &[("type", "unix-char"), ("source", "/dev/ttyS0")]),
        ("disk0", &[("type", "unix-block"), ("path", "/dev/sdb")]),
        ("key", &[("type", "unix-hotplug")]),
        ("nvme0", &[("type", "pci"), ("address", "0000:01:00.0")]),
        (
            "ib0",
            &[("type", "infiniband"), ("nictype", "sriov"), ("parent", "ib0")],
        ),
        (
            "eth5",
            &[("type", "nic"), ("nictype", "physical"), ("parent", "enp5s0")],
        ),
    ];
    for (name, keys) in table {
        let (mut d, w) = from_a_to_b(with(name, keys));
        assert_eq!(reasons(&d, &w), [Reason::HostDevice], "{name}");
        let fix = fix(&d, &w);
        assert!(
            fix.contains("kubectl patch iplace -n shop web")
                && fix.contains(&format!("\"removeDevices\":[\"{name}\"]")),
            "{fix}"
        );
        d.spec.overrides.remove_devices = vec![name.into()];
        assert_eq!(reasons(&d, &w), [], "{name}: taken off");
    }
}

#[test]
fn all_devices_of_the_host_are_in_one_patch_with_those_that_were_taken_off_before() {
    let mut web = with("gpu0", &[("type", "gpu")]);
    for i in [&mut web.devices, &mut web.expanded_devices] {
        i.insert("usb0".into(), device(&[("type", "usb")]));
    }
    let (mut d, w) = from_a_to_b(web);
    d.spec.overrides.remove_devices = vec!["old".into()];
    assert!(
        fix(&d, &w).contains(r#""removeDevices":["old","gpu0","usb0"]"#),
        "{}",
        fix(&d, &w)
    );
}

#[test]
fn what_every_host_has_and_what_is_declared_may_travel() {
    let table: [(&str, &[(&str, &str)]); 6] = [
        ("tun", &[("type", "unix-char"), ("path", "/dev/net/tun")]),
        (
            "fuse",
            &[("type", "unix-char"), ("source", "/dev/fuse"), ("path", "/dev/fuse")],
        ),
        (
            "web",
            &[
                ("type", "proxy"),
                ("listen", "tcp:0.0.0.0:80"),
                ("connect", "tcp:127.0.0.1:80"),
            ],
        ),
        ("tpm", &[("type", "tpm")]),
        (
            "ceph",
            &[("type", "disk"), ("source", "ceph:pool/volume"), ("path", "/srv")],
        ),
        ("none", &[("type", "none")]),
    ];
    for (name, keys) in table {
        let (d, w) = from_a_to_b(with(name, keys));
        assert_eq!(reasons(&d, &w), [], "{name}");
    }
    let (mut d, mut w) = from_a_to_b(with("gpu0", &[("type", "gpu")]));
    d.spec.overrides.devices = BTreeMap::from([("gpu0".into(), device(&[("type", "gpu"), ("id", "1")]))]);
    if let Some(view) = w.servers.get_mut("rack-b") {
        view.allow_unsafe_overrides = true;
    }
    assert_eq!(reasons(&d, &w), [], "who declares a device knows that it is there");
}

#[test]
fn a_bridge_that_only_the_source_has_is_named_with_a_network_of_the_target() {
    let nic: &[(&str, &str)] = &[("type", "nic"), ("nictype", "bridged"), ("parent", "br-lab")];
    let (mut d, mut w) = from_a_to_b(with("eth0", nic));
    assert_eq!(reasons(&d, &w), [Reason::HostDevice]);
    assert!(fix(&d, &w).contains(r#""network":"br0""#), "{}", fix(&d, &w));
    let mut two = w.clone();
    let eth1 = device(&[("type", "nic"), ("network", "br0")]);
    target(&mut two).profiles[0].devices.insert("eth1".into(), eth1);
    let fix = fix(&d, &two);
    assert!(
        fix.contains(r#""removeDevices":["eth0"]"#),
        "no server starts two on one network: {fix}"
    );
    d.spec.overrides.devices = BTreeMap::from([(
        "eth0".into(),
        device(&[("type", "nic"), ("network", "br0"), ("nictype", ""), ("parent", "")]),
    )]);
    assert_eq!(reasons(&d, &w), []);
    d.spec.overrides.devices.clear();
    target(&mut w).networks.push(Network {
        project: "default".into(),
        name: "br-lab".into(),
        managed: false,
    });
    assert_eq!(reasons(&d, &w), [], "the target has it, too");
}

#[test]
fn another_member_of_the_cluster_is_another_host() {
    let mut web = with("gpu0", &[("type", "gpu")]);
    web.member = Some("m1".into());
    let w = world([("rack", cluster("c", [web]))]);
    let mut d = desired("web", "rack");
    d.spec.target.member = Some("m2".into());
    assert_eq!(reasons(&d, &w), [Reason::HostDevice]);
    d.spec.target.member = None;
    d.spec.target.name = Some("shop".into());
    assert_eq!(reasons(&d, &w), [], "it stays on its host");
}

#[test]
fn nothing_goes_into_a_project_with_limits_because_it_would_lose_its_identity() {
    let (d, mut w) = from_a_to_b(instance("web"));
    for key in ["limits.memory", "limits.instances"] {
        target(&mut w).projects[0].config.insert(key.into(), "100".into());
    }
    assert_eq!(reasons(&d, &w), [Reason::ProjectRestricted]);
    let fix = fix(&d, &w);
    for key in ["limits.memory", "limits.instances"] {
        assert!(fix.contains(&format!("incus project unset default {key}")), "{fix}");
    }
}

#[test]
fn the_same_holds_for_a_project_of_the_same_server_and_not_for_the_project_where_it_is() {
    let mut w = world([("rack-b", server("b", [instance("web")]))]);
    let limits = BTreeMap::from([("limits.instances".to_owned(), "9".to_owned())]);
    target(&mut w).projects[0].config.clone_from(&limits);
    target(&mut w).projects.push(Project {
        name: "shop".into(),
        config: limits,
    });
    let mut d = desired("web", "rack-b");
    d.spec.target.name = Some("shop".into());
    assert_eq!(reasons(&d, &w), [], "a new name where it is");
    d.spec.target.project = Some("shop".into());
    assert_eq!(reasons(&d, &w), [Reason::ProjectRestricted]);
}

#[test]
fn a_profile_of_one_name_that_says_something_else_is_a_note_and_no_blocker() {
    let (d, mut w) = from_a_to_b(instance("web"));
    target(&mut w).profiles[0]
        .config
        .insert("limits.cpu".into(), "2".into());
    let Verdict { plan: Some(p), .. } = plan(&d, &w, now()) else {
        panic!()
    };
    assert!(p.blockers.is_empty());
    assert_eq!(p.notes[0].reason, "ProfileDiffers");
    assert!(p.notes[0].message.contains("limits.cpu"), "{}", p.notes[0].message);
}

#[test]
fn everything_that_stands_against_a_move_is_said_at_once() {
    let mut web = with("gpu0", &[("type", "gpu")]);
    web.architecture = "aarch64".into();
    web.profiles = vec!["gold".into()];
    let (mut d, mut w) = from_a_to_b(web);
    d.spec.target.pool = Some("nvme".into());
    d.spec.target.project = Some("shop".into());
    if let Some(view) = w.servers.get_mut("rack-b") {
        view.cordoned = true;
    }
    let mut found = reasons(&d, &w);
    found.sort();
    assert_eq!(
        found,
        [
            Reason::PoolNotFound,
            Reason::ProjectNotFound,
            Reason::ArchitectureMismatch,
            Reason::TargetCordoned,
            Reason::HostDevice,
        ]
    );
    d.spec.target.project = None;
    assert!(reasons(&d, &w).contains(&Reason::ProfileNotFound));
    assert!(blockers(&d, &w).iter().all(|b| !b.message.is_empty()));
}

#[test]
fn too_little_room_is_refused_with_another_pool_and_what_is_not_known_refuses_nothing() {
    let room = |size: Option<i64>, free: Option<i64>, snapshots: usize| {
        let (d, mut w) = from_a_to_b(instance("web"));
        target(&mut w).pools.push(Pool {
            name: "nvme".into(),
            driver: "btrfs".into(),
        });
        w.size = size;
        let snapshot = |n| Snapshot {
            name: format!("s{n}"),
            created_at: "2026-11-01T00:00:00Z".into(),
            expires_at: None,
            config: BTreeMap::new(),
        };
        w.contents = Some(Contents {
            free,
            snapshots: (0..snapshots).map(snapshot).collect(),
            ..Contents::default()
        });
        (blockers(&d, &w), plan(&d, &w, now()).plan.unwrap_or_default().notes)
    };
    let (gib, mib) = (1 << 30, 1 << 20);
    let (refused, _) = room(Some(2 * gib), Some(96 * mib), 0);
    assert_eq!(refused[0].reason, Reason::InsufficientSpace);
    assert_eq!(
        refused[0].message,
        "pool default of rack-b has 96 MiB free, and web takes 2048 MiB"
    );
    let fix = refused[0].fix.clone().unwrap_or_default();
    assert!(
        fix.starts_with("kubectl patch iplace -n shop web") && fix.contains(r#"{"target":{"pool":"nvme"}}"#),
        "{fix}"
    );
    for (size, free) in [(None, Some(1)), (Some(gib), None), (Some(gib), Some(gib))] {
        assert_eq!(room(size, free, 0), (vec![], vec![]), "{size:?} {free:?}");
    }
    // on dir every snapshot is a whole copy
    let (none, notes) = room(Some(gib), Some(2 * gib), 3);
    assert!(none.is_empty());
    assert_eq!(notes[0].reason, "InsufficientSpace");
    assert!(notes[0].message.contains("up to 4096 MiB"), "{notes:?}");
}
