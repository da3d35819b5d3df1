//! What does not travel is said in the plan, or refused with the way to mend it.

mod common;

use std::sync::Arc;

use berth_api::moves::InstanceMoveStatus;
use berth_api::{Outcome, Reason, Snapshots};
use berth_core::model::{Contents, Instance, Product, Snapshot};
use berth_core::plan::{Blocker, Decision, Desired, World, plan};
use berth_core::records::Record;
use common::{desired, instance, now, server, world};

fn keys(keys: &[&str]) -> Instance {
    let mut i = instance("web-1");
    i.config.extend(keys.iter().map(|k| ((*k).to_owned(), "x".to_owned())));
    i
}

/// From an Incus that knows everything to an LXD 5.0.
fn to_lxd(i: Instance, contents: Contents) -> World {
    let mut to = server("b", []);
    let mut facts = common::facts("b");
    (facts.product, facts.version) = (Product::Lxd, "5.0.2".to_owned());
    to.facts = Some(Arc::new(facts));
    World {
        contents: Some(contents),
        ..world([("rack-a", server("a", [i])), ("rack-b", to)])
    }
}

fn snapshot(name: &str, key: &str) -> Snapshot {
    Snapshot {
        name: name.to_owned(),
        created_at: "2026-11-01T00:00:00Z".to_owned(),
        expires_at: None,
        config: [(key.to_owned(), "x".to_owned())].into(),
    }
}

fn blockers(desired: &Desired, world: &World) -> Vec<Blocker> {
    match plan(desired, world, now()).decision {
        Decision::Blocked(blockers) => blockers,
        other => panic!("not blocked: {other:?}"),
    }
}

fn moves(desired: &Desired, world: &World) -> (berth_api::InstanceMoveSpec, Vec<String>) {
    let verdict = plan(desired, world, now());
    match verdict.decision {
        Decision::Move(spec) => (*spec, verdict.plan.unwrap_or_default().dropped),
        other => panic!("no move: {other:?}"),
    }
}

#[test]
fn keys_that_the_target_does_not_know_are_left_out_and_listed() {
    let i = keys(&[
        "volatile.uuid.generation",
        "security.guestapi",
        "limits.cpu",
        "user.role",
    ]);
    let (spec, dropped) = moves(&desired("web-1", "rack-b"), &to_lxd(i, Contents::default()));
    assert_eq!(spec.dropped, ["security.guestapi", "volatile.uuid.generation"]);
    assert_eq!(dropped, spec.dropped);
}

#[test]
fn an_override_that_the_target_does_not_know_is_refused() {
    let mut wanted = desired("web-1", "rack-b");
    wanted.spec.overrides.config.insert("oci.uid".into(), "1".into());
    let found = blockers(&wanted, &to_lxd(instance("web-1"), Contents::default()));
    assert_eq!(found[0].reason, Reason::InvalidSpec);
    assert!(
        found[0].fix.as_ref().is_some_and(|f| f.contains("\"oci.uid\":null")),
        "{found:?}"
    );
}

#[test]
fn a_key_that_the_last_attempt_was_refused_for_is_left_out_of_the_next_one_only_there() {
    let wanted = desired("web-1", "rack-b");
    let mut world = to_lxd(keys(&["strange.key"]), Contents::default());
    let (mut spec, dropped) = moves(&wanted, &world);
    assert!(dropped.is_empty());
    spec.attempt = 1;
    let status = InstanceMoveStatus {
        outcome: Some(Outcome::Undone.as_str().to_owned()),
        refused_key: Some("strange.key".to_owned()),
        ..Default::default()
    };
    world.records = vec![Record {
        namespace: "shop".into(),
        name: "web-1-1".into(),
        version: "1".into(),
        deleting: false,
        spec,
        status,
    }];
    let (spec, dropped) = moves(&wanted, &world);
    assert_eq!(
        (spec.dropped.as_slice(), dropped.as_slice()),
        (&["strange.key".to_owned()][..], &["strange.key".to_owned()][..])
    );
    world.records[0].spec.to.fingerprint = "c".to_owned();
    assert!(moves(&wanted, &world).0.dropped.is_empty(), "another server was asked");
}

#[test]
fn snapshots_with_unknown_keys_are_refused_and_excluding_them_is_the_way_out() {
    let contents = Contents {
        snapshots: vec![snapshot("s0", "volatile.last_state.ready"), snapshot("s1", "user.role")],
        backups: vec!["b0".to_owned()],
        ..Contents::default()
    };
    let mut wanted = desired("web-1", "rack-b");
    let world = to_lxd(instance("web-1"), contents);
    let found = blockers(&wanted, &world);
    assert_eq!(found[0].reason, Reason::SnapshotsCannotTravel);
    assert!(found[0].message.contains("(s0)"), "{found:?}");
    assert!(
        found[0]
            .fix
            .as_ref()
            .is_some_and(|f| f.contains(r#""snapshots":"Exclude""#)),
        "{found:?}"
    );
    wanted.spec.snapshots = Snapshots::Exclude;
    let (_, dropped) = moves(&wanted, &world);
    assert_eq!(dropped, ["snapshot s0", "snapshot s1", "backup b0"]);
}

#[test]
fn a_volume_that_the_target_lacks_is_refused_unless_the_disk_is_left_out() {
    let mut i = instance("web-1");
    let disk = [
        ("type", "disk"),
        ("pool", "default"),
        ("source", "data/www"),
        ("path", "/srv"),
    ];
    let disk = disk.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    i.devices.insert("data".into(), disk);
    let mut wanted = desired("web-1", "rack-b");
    let mut world = to_lxd(i, Contents::default());
    let found = blockers(&wanted, &world);
    assert_eq!(found[0].reason, Reason::VolumeNotFound);
    assert!(found[0].message.contains("volume data of pool default"), "{found:?}");
    wanted.spec.overrides.remove_devices = ["data".to_owned()].into();
    moves(&wanted, &world);
    wanted.spec.overrides.remove_devices.clear();
    world.contents = Some(Contents {
        volumes: [("default".to_owned(), "data".to_owned())].into(),
        ..Contents::default()
    });
    moves(&wanted, &world);
}

#[test]
fn an_instance_with_backups_is_not_moved_inside_its_server_but_renamed() {
    let contents = Contents {
        backups: vec!["b0".to_owned()],
        snapshots: vec![snapshot("s0", "user.role")],
        ..Contents::default()
    };
    let world = World {
        contents: Some(contents),
        ..world([(
            "rack-a",
            common::cluster(
                "a",
                [Instance {
                    member: Some("m1".into()),
                    ..instance("web-1")
                }],
            ),
        )])
    };
    let mut wanted = desired("web-1", "rack-a");
    wanted.spec.target.member = Some("m2".into());
    assert_eq!(blockers(&wanted, &world)[0].reason, Reason::BackupsInTheWay);
    wanted.spec.target.member = None;
    wanted.spec.target.name = Some("shop-1".into());
    wanted.spec.snapshots = Snapshots::Exclude;
    assert!(moves(&wanted, &world).1.is_empty(), "a rename leaves nothing behind");
}
