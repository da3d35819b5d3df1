//! What keeps a container from being moved live, and what is remembered of servers without CRIU.

use std::sync::Arc;

use berth_api::moves::UndoCause;
use berth_api::placement::Rejected;
use berth_api::{InstanceMoveStatus, Method, MicroTime, Outcome, Reason};
use berth_core::model::{Device, Inside, Instance};
use berth_core::plan::{Decision, Desired, Lessons, Verdict, World, plan};
use berth_core::records::Record;
use berth_core::status;

use crate::common::{at, desired, instance, now, server, world};

const SOUND: Inside = Inside {
    answers: true,
    owns_root: Some(true),
    systemd: false,
};

fn device(pairs: &[(&str, &str)]) -> Device {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

/// A running container that CRIU can move.
fn guest() -> Instance {
    let mut i = instance("web-1");
    for (key, value) in [
        ("migration.stateful", "true"),
        ("raw.lxc", "lxc.apparmor.profile =\nlxc.console.path = none"),
        ("volatile.idmap.current", "[]"),
        ("volatile.last_state.idmap", "[]"),
    ] {
        i.config.insert(key.into(), value.into());
    }
    i.expanded_config = i.config.clone();
    i
}

fn two(guest: Instance) -> World {
    let mut w = world([("a", server("fp-a", [guest])), ("b", server("fp-b", []))]);
    for name in ["a", "b"] {
        let facts = w.servers.get_mut(name).and_then(|v| v.facts.as_mut()).expect("facts");
        let extensions = &mut Arc::make_mut(facts).extensions;
        extensions.insert("container_migration_stateful".into());
    }
    w.inside = Some(SOUND);
    w
}

fn wanted() -> Desired {
    let mut d = desired("web-1", "b");
    d.spec.methods = vec![Method::Live];
    d.spec.criu = true;
    d
}

fn rejected(verdict: &Verdict) -> Vec<Rejected> {
    verdict.plan.as_ref().map(|p| p.rejected.clone()).unwrap_or_default()
}

#[test]
fn a_container_that_can_moves_live_where_its_placement_says_so() {
    let Decision::Move(spec) = plan(&wanted(), &two(guest()), now()).decision else {
        panic!()
    };
    assert_eq!(spec.method, Method::Live);
    let mut d = wanted();
    d.spec.criu = false;
    let why = rejected(&plan(&d, &two(guest()), now()));
    assert_eq!(why.len(), 1, "{why:#?}");
    assert!(
        why[0].fix.as_ref().is_some_and(|f| f.contains("\"criu\":true")),
        "{why:#?}"
    );
}

#[test]
fn every_unmet_condition_of_a_container_is_named_at_once_with_a_way_to_meet_it() {
    let mut i = guest();
    i.expanded_config.remove("migration.stateful");
    i.expanded_config.insert(
        "raw.lxc".into(),
        "lxc.console.path = none\nlxc.console.path = /dev/x".into(),
    );
    i.config
        .insert("volatile.idmap.current".into(), "[{\"Hostid\":1000000}]".into());
    for (name, keys) in [
        ("card", vec![("type", "nic"), ("nictype", "ipvlan")]),
        (
            "data",
            vec![
                ("type", "disk"),
                ("source", "vol"),
                ("pool", "default"),
                ("path", "/data"),
            ],
        ),
        ("eth0", vec![("type", "nic"), ("nictype", "bridged")]),
    ] {
        i.expanded_devices.insert(name.into(), device(&keys));
    }
    let mut w = two(i);
    w.inside = Some(Inside {
        owns_root: None,
        systemd: true,
        ..SOUND
    });
    let why = rejected(&plan(&wanted(), &w, now()));
    let reasons: Vec<&str> = why.iter().map(|r| r.reason.as_str()).collect();
    let impossible = "MethodImpossible";
    assert_eq!(
        reasons,
        [
            "MigrationStatefulOff",
            impossible,
            impossible,
            impossible,
            impossible,
            "LocalDevice",
            "PoolNotShared"
        ],
        "{why:#?}"
    );
    for said in [
        "migration.stateful",
        "console",
        "idmapped",
        "tell",
        "systemd",
        "ipvlan",
        "vol",
    ] {
        assert!(why.iter().any(|r| r.message.contains(said)), "{said}: {why:#?}");
    }
    assert!(why.iter().all(|r| r.fix.is_some()), "{why:#?}");
}

/// A move that was undone, or was not.
fn ended(criu: Option<&str>, at: &str) -> Record {
    let Decision::Move(spec) = plan(&wanted(), &two(guest()), now()).decision else {
        panic!()
    };
    let outcome = if criu.is_some() {
        Outcome::Undone
    } else {
        Outcome::Succeeded
    };
    let undo = criu.map(|message| UndoCause {
        reason: Reason::CriuMissing.as_str().to_owned(),
        message: message.to_owned(),
        fix: None,
        cancelled: false,
    });
    Record {
        namespace: "shop".into(),
        name: "web-1-x".into(),
        version: String::new(),
        deleting: false,
        spec: *spec,
        status: InstanceMoveStatus {
            outcome: Some(outcome.as_str().to_owned()),
            finished_at: Some(MicroTime(crate::common::at(at))),
            undo,
            ..Default::default()
        },
    }
}

#[test]
fn a_server_without_criu_is_remembered_for_a_day_or_until_somebody_asks_or_it_is_there() {
    let missing = ended(
        Some("b has no CRIU (Unable to perform live container migration. CRIU isn't installed on the target server)"),
        "2026-11-22T09:00:00Z",
    );
    let with = |records: &[&Record], now| {
        let mut lessons = Lessons::default();
        records.iter().for_each(|r| lessons.learn(r));
        let mut w = two(guest());
        w.lessons = Arc::new(lessons);
        rejected(&plan(&wanted(), &w, now))
    };
    let why = with(&[&missing], now());
    assert_eq!(
        why.iter().map(|r| r.reason.as_str()).collect::<Vec<_>>(),
        ["CriuMissing"]
    );
    assert!(
        why[0]
            .fix
            .as_ref()
            .is_some_and(|f| f.contains("host of b: apt install criu")),
        "{why:#?}"
    );
    assert!(with(&[&missing], at("2026-11-23T10:00:00Z")).is_empty(), "a day later");
    // read in any order
    let later = ended(None, "2026-11-22T09:30:00Z");
    assert!(with(&[&missing, &later], now()).is_empty());
    assert!(with(&[&later, &missing], now()).is_empty());
    let mut lessons = Lessons::default();
    lessons.learn(&missing);
    lessons.forget_criu();
    assert_eq!(lessons.without_criu("fp-b"), None);
}

#[test]
fn a_container_falls_from_live_to_warm_to_cold_and_each_failure_is_kept_with_its_reason() {
    let mut w = two(guest());
    for name in ["a", "b"] {
        let facts = w.servers.get_mut(name).and_then(|v| v.facts.as_mut()).expect("facts");
        let extensions = &mut Arc::make_mut(facts).extensions;
        extensions.insert("container_incremental_copy".into());
    }
    let mut d = wanted();
    d.spec.methods = vec![Method::Live, Method::Warm, Method::Cold];
    let ladder = [
        (Method::Live, Reason::TargetRefused, "CRIU cannot dump it"),
        (Method::Warm, Reason::GuestFrozen, "it stood still"),
    ];
    for (method, reason, message) in ladder {
        let Decision::Move(spec) = plan(&d, &w, now()).decision else {
            panic!("{method:?}")
        };
        assert_eq!(spec.method, method);
        let mut record = ended(Some(message), "2026-11-22T09:59:00Z");
        record.name = format!("web-1-{}", method.as_str().to_lowercase());
        record.spec = *spec;
        let undo = record.status.undo.as_mut().expect("it was undone");
        undo.reason = reason.as_str().to_owned();
        status::remember(&mut d.status, &record, d.generation);
    }
    let verdict = plan(&d, &w, now());
    let why = rejected(&verdict);
    let Decision::Move(spec) = verdict.decision else {
        panic!()
    };
    assert_eq!(spec.method, Method::Cold);
    let kept: Vec<_> = d
        .status
        .moves
        .iter()
        .rev()
        .map(|m| (m.method, m.reason.as_deref(), m.message.as_deref()))
        .collect();
    for (nth, (method, reason, message)) in ladder.into_iter().enumerate() {
        assert_eq!(
            (why[nth].method, why[nth].reason.as_str()),
            (method, reason.as_str()),
            "{why:#?}"
        );
        assert!(why[nth].message.contains(message), "{why:#?}");
        assert_eq!(kept[nth], (method, Some(reason.as_str()), Some(message)));
    }
}
