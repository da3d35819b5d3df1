//! What is done about an instance that is where it should be and not as it is declared.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use berth_api::placement::{Approval, Drift, Mode, PlanMethod, PowerState, Window};
use berth_api::{Method, Reason, Transfer};
use berth_core::model::{Device, Instance, InstanceKind, Power, Profile};
use berth_core::overrides::Adaptation;
use berth_core::plan::{Decision, Desired, Tried, TriedResult, World, plan};
use berth_core::server::PowerAction;
use common::{at, desired, instance, now, server, world};

fn device(pairs: &[(&str, &str)]) -> Device {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn declared(keys: &[(&str, &str)]) -> Desired {
    let mut d = desired("web", "rack-a");
    d.spec.overrides.config = device(keys);
    d
}

fn on_a(i: Instance) -> World {
    world([("rack-a", server("a", [i]))])
}

/// The change that is made at once.
fn change(d: &Desired, w: &World) -> Adaptation {
    match plan(d, w, now()).decision {
        Decision::Adapt { change, .. } => *change,
        other => panic!("{other:?}"),
    }
}

fn waits(d: &Desired, w: &World) -> (Reason, String) {
    match plan(d, w, now()).decision {
        Decision::Wait { reason, message, .. } => (reason, message),
        Decision::Blocked(b) => (
            b[0].reason,
            format!("{}; {}", b[0].message, b[0].fix.clone().unwrap_or_default()),
        ),
        other => panic!("{other:?}"),
    }
}

fn stopped() -> Instance {
    let mut web = instance("web");
    web.power = Power::Stopped;
    web
}

#[test]
fn only_what_is_declared_and_differs_is_changed() {
    let mut web = instance("web");
    for (k, v) in [("limits.cpu", "2"), ("limits.memory", "1GiB"), ("user.mine", "x")] {
        web.config.insert(k.into(), v.into());
        web.expanded_config.insert(k.into(), v.into());
    }
    let mut d = declared(&[("limits.cpu", "4"), ("limits.memory", "1GiB")]);
    d.spec.overrides.remove_config = vec!["user.other".into()];
    let w = on_a(web);
    let verdict = plan(&d, &w, now());
    assert_eq!(verdict.drift, [Drift::WrongConfig]);
    let p = verdict.plan.clone().unwrap_or_default();
    assert_eq!((p.method, p.transfer), (Some(PlanMethod::InPlace), None));
    assert_eq!(
        change(&d, &w).config,
        BTreeMap::from([("limits.cpu".into(), Some("4".into()))])
    );
    d.spec.overrides.config.insert("limits.cpu".into(), "2".into());
    assert!(matches!(plan(&d, &w, now()).decision, Decision::InSync));
    d.spec.overrides.remove_config = vec!["user.mine".into()];
    assert_eq!(change(&d, &w).config, BTreeMap::from([("user.mine".into(), None)]));
}

#[test]
fn a_value_that_a_profile_gives_need_not_be_written() {
    let mut web = instance("web");
    web.expanded_config.insert("limits.cpu".into(), "4".into());
    let w = on_a(web);
    assert!(matches!(
        plan(&declared(&[("limits.cpu", "4")]), &w, now()).decision,
        Decision::InSync
    ));
    assert!(
        matches!(
            plan(&declared(&[("limits.cpu.allowance", "")]), &w, now()).decision,
            Decision::InSync
        ),
        "an empty value is no value"
    );
}

#[test]
fn device_keys_are_merged_over_the_device_in_effect_and_another_type_replaces_it() {
    let mut web = instance("web");
    let nic = device(&[("type", "nic"), ("network", "br0"), ("name", "eth0")]);
    web.expanded_devices.insert("eth0".into(), nic);
    let mut d = desired("web", "rack-a");
    d.spec.overrides.devices = BTreeMap::from([
        ("root".into(), device(&[("size", "20GiB")])),
        ("eth0".into(), device(&[("limits.max", "10Mbit")])),
    ]);
    let w = on_a(web);
    assert_eq!(plan(&d, &w, now()).drift, [Drift::WrongDevices]);
    let devices = change(&d, &w).devices;
    let root = device(&[("type", "disk"), ("path", "/"), ("pool", "default"), ("size", "20GiB")]);
    assert_eq!(devices["root"], Some(root));
    let eth0 = devices["eth0"].clone().unwrap_or_default();
    assert_eq!(
        (eth0["network"].as_str(), eth0["limits.max"].as_str()),
        ("br0", "10Mbit")
    );
    d.spec.overrides.devices = BTreeMap::from([("eth0".into(), device(&[("type", "none")]))]);
    assert_eq!(change(&d, &w).devices["eth0"], Some(device(&[("type", "none")])));
}

#[test]
fn a_pool_among_the_overrides_is_a_move_and_no_change_in_place() {
    let mut w = on_a(instance("web"));
    if let Some(facts) = w.servers.get_mut("rack-a").and_then(|v| v.facts.as_mut()) {
        Arc::make_mut(facts).pools.push(berth_core::model::Pool {
            name: "nvme".into(),
            driver: "zfs".into(),
        });
    }
    let mut d = desired("web", "rack-a");
    d.spec.overrides.devices = BTreeMap::from([("root".into(), device(&[("pool", "nvme")]))]);
    let verdict = plan(&d, &w, now());
    assert_eq!(verdict.drift, [Drift::WrongPool]);
    let Decision::Move(spec) = verdict.decision else {
        panic!("{:?}", verdict.decision)
    };
    assert_eq!(
        (spec.transfer, spec.to.pool.as_deref()),
        (Transfer::Internal, Some("nvme"))
    );
}

#[test]
fn without_profiles_the_root_disk_becomes_the_instances_own() {
    let mut d = desired("web", "rack-a");
    d.spec.overrides.no_profiles = true;
    let w = on_a(instance("web"));
    assert_eq!(plan(&d, &w, now()).drift, [Drift::WrongDevices, Drift::WrongProfiles]);
    let change = change(&d, &w);
    assert_eq!(change.profiles, Some(vec![]));
    assert_eq!(
        change.devices["root"],
        Some(device(&[("type", "disk"), ("path", "/"), ("pool", "default")]))
    );
}

#[test]
fn a_profile_that_does_not_exist_is_refused_before_anything_is_asked() {
    let mut d = desired("web", "rack-a");
    d.spec.overrides.profiles = vec!["default".into(), "gold".into()];
    assert_eq!(waits(&d, &on_a(instance("web"))).0, Reason::ProfileNotFound);
}

#[test]
fn profiles_that_bring_a_key_for_the_next_start_wait_for_a_stop() {
    let mut w = on_a(instance("web"));
    let profile = |name: &str, key: &str| Profile {
        project: "default".into(),
        name: name.into(),
        config: BTreeMap::from([(key.to_owned(), "true".to_owned())]),
        devices: BTreeMap::new(),
    };
    if let Some(facts) = w.servers.get_mut("rack-a").and_then(|v| v.facts.as_mut()) {
        let facts = Arc::make_mut(facts);
        facts.profiles.extend([
            profile("nested", "environment.TEAM"),
            profile("kept", "security.protection.delete"),
        ]);
    }
    let mut d = desired("web", "rack-a");
    d.spec.overrides.profiles = vec!["default".into(), "kept".into()];
    assert!(change(&d, &w).profiles.is_some());
    d.spec.overrides.profiles = vec!["default".into(), "nested".into()];
    assert!(matches!(plan(&d, &w, now()).decision, Decision::Move(_)));
}

#[test]
fn what_takes_effect_at_the_next_start_is_a_restart_unless_the_instance_is_stopped() {
    let d = declared(&[("environment.TEAM", "blue"), ("limits.cpu", "1")]);
    let mut d = d;
    let w = on_a(instance("web"));
    let at_once = change(&d, &w);
    assert_eq!(at_once.names(), "limits.cpu", "the rest waits");
    d.spec.overrides.config.remove("limits.cpu");
    let Decision::Move(spec) = plan(&d, &w, now()).decision else {
        panic!()
    };
    assert_eq!((spec.transfer, spec.method), (Transfer::Internal, Method::Cold));
    assert_eq!(spec.from.location(), spec.to.location());
    assert_eq!(spec.power_after, berth_api::Power::Running);
    assert_eq!(change(&d, &on_a(stopped())).names(), "environment.TEAM");
}

#[test]
fn a_virtual_machine_takes_less_while_it_runs() {
    let mut vm = instance("web");
    vm.kind = InstanceKind::VirtualMachine;
    let w = on_a(vm);
    assert_eq!(
        change(&declared(&[("limits.memory", "1GiB")]), &w).names(),
        "limits.memory"
    );
    for key in [
        "limits.cpu",
        "migration.stateful",
        "security.secureboot",
        "limits.memory.hugepages",
    ] {
        let decision = plan(&declared(&[(key, "1")]), &w, now()).decision;
        assert!(matches!(decision, Decision::Move(_)), "{key}: {decision:?}");
    }
}

#[test]
fn what_the_server_refuses_while_the_instance_runs_waits_for_a_stop() {
    let d = declared(&[("limits.memory", "1GiB")]);
    let mut w = on_a(instance("web"));
    w.tried = Some(Tried {
        change: change(&d, &w),
        result: TriedResult::NeedsStop,
        until: now(),
    });
    assert!(matches!(plan(&d, &w, now()).decision, Decision::Move(_)));
    let mut s = on_a(stopped());
    s.tried = w.tried;
    assert_eq!(change(&d, &s).names(), "limits.memory");
}

#[test]
fn never_stopped_means_reported_and_what_needs_no_stop_is_done_all_the_same() {
    let mut d = declared(&[("environment.TEAM", "blue"), ("limits.cpu", "1")]);
    d.spec.methods = vec![Method::Live, Method::Warm];
    let w = on_a(instance("web"));
    assert_eq!(change(&d, &w).names(), "limits.cpu");
    d.spec.overrides.config.remove("limits.cpu");
    let (reason, message) = waits(&d, &w);
    assert_eq!(reason, Reason::MethodImpossible);
    assert!(
        message.contains("environment.TEAM") && message.contains("incus stop"),
        "{message}"
    );
    let blockers = plan(&d, &w, now()).plan.unwrap_or_default().blockers;
    assert_eq!(blockers[0].reason, "MethodImpossible");
}

#[test]
fn only_a_change_that_needs_a_stop_waits_for_the_window() {
    let mut d = declared(&[("environment.TEAM", "blue")]);
    d.spec.windows = vec![Window {
        schedule: "0 2 * * 6".into(),
        duration: "3h".parse().unwrap_or_default(),
        time_zone: None,
        methods: vec![],
    }];
    let w = on_a(instance("web"));
    let (reason, message) = waits(&d, &w);
    assert_eq!(reason, Reason::WaitingForWindow);
    assert!(
        message.contains("environment.TEAM") && message.contains("2026-11-28T02:00:00Z"),
        "{message}"
    );
    let saturday = at("2026-11-28T02:00:00Z");
    assert!(matches!(plan(&d, &w, saturday).decision, Decision::Move(_)));
    assert_eq!(
        change(&d, &on_a(stopped())).names(),
        "environment.TEAM",
        "it is stopped already"
    );
    d.spec.overrides.config = device(&[("limits.cpu", "1")]);
    assert_eq!(change(&d, &w).names(), "limits.cpu");
}

#[test]
fn suspend_mode_and_approval_apply_to_changes_in_place() {
    let w = on_a(instance("web"));
    let mut d = declared(&[("limits.cpu", "4")]);
    d.spec.suspend = true;
    assert_eq!(waits(&d, &w).0, Reason::Suspended);
    d.spec.suspend = false;
    d.spec.mode = Mode::Observe;
    assert_eq!(waits(&d, &w).0, Reason::DriftObserved);
    d.spec.mode = Mode::Enforce;
    d.spec.approval = Approval::Manual;
    assert_eq!(waits(&d, &w).0, Reason::WaitingForApproval);
    d.approve = plan(&d, &w, now()).plan.and_then(|p| p.digest);
    assert_eq!(change(&d, &w).names(), "limits.cpu");
    d.spec.overrides.config.insert("limits.cpu".into(), "5".into());
    assert_eq!(
        waits(&d, &w).0,
        Reason::WaitingForApproval,
        "another change needs another approval"
    );
    d.spec.overrides.config.insert("environment.TEAM".into(), "blue".into());
    d.approve = plan(&d, &on_a(stopped()), now()).plan.and_then(|p| p.digest);
    assert_eq!(
        waits(&d, &w).0,
        Reason::WaitingForApproval,
        "whether it is restarted matters"
    );
    d.approve = plan(&d, &w, now()).plan.and_then(|p| p.digest);
    let decision = plan(&d, &w, now()).decision;
    assert!(
        matches!(decision, Decision::Move(_)),
        "approved as one, done as one: {decision:?}"
    );
}

#[test]
fn a_refused_change_is_reported_with_the_servers_words_and_does_not_hold_up_the_power_state() {
    let mut d = declared(&[("limits.cpu", "many")]);
    let mut w = on_a(stopped());
    w.tried = Some(Tried {
        change: change(&d, &w),
        result: TriedResult::Refused("Invalid value for limits.cpu".into()),
        until: at("2026-11-22T10:00:30Z"),
    });
    let (reason, message) = waits(&d, &w);
    assert_eq!(reason, Reason::TargetRefused);
    assert!(
        message.contains("Invalid value") && message.contains("10:00:30") && message.contains("kubectl edit"),
        "{message}"
    );
    assert!(
        matches!(
            plan(&d, &w, at("2026-11-22T10:01:00Z")).decision,
            Decision::Adapt { .. }
        ),
        "tried again"
    );
    d.spec.power_state = PowerState::Running;
    let Decision::Power { action, .. } = plan(&d, &w, now()).decision else {
        panic!()
    };
    assert_eq!(action, PowerAction::Start { stateful: false });
}

#[test]
fn a_value_that_the_server_spells_otherwise_is_reported_and_not_written_again() {
    let mut web = instance("web");
    web.expanded_config.insert("limits.memory".into(), "1024MiB".into());
    let d = declared(&[("limits.memory", "1GiB")]);
    let mut w = on_a(web);
    w.tried = Some(Tried {
        change: change(&d, &w),
        result: TriedResult::NotKept,
        until: at("2026-11-22T11:00:00Z"),
    });
    let (reason, message) = waits(&d, &w);
    assert_eq!(reason, Reason::InvalidSpec);
    assert!(message.contains("1024MiB"), "{message}");
}

#[test]
fn overrides_that_reach_into_the_host_need_consent_in_place_too() {
    let mut w = on_a(instance("web"));
    let mut d = declared(&[("security.privileged", "true")]);
    assert_eq!(waits(&d, &w).0, Reason::InvalidSpec);
    d.spec.overrides.config.clear();
    let gpu = BTreeMap::from([("gpu".to_owned(), device(&[("type", "gpu")]))]);
    d.spec.overrides.devices = gpu;
    assert_eq!(waits(&d, &w).0, Reason::InvalidSpec);
    if let Some(view) = w.servers.get_mut("rack-a") {
        view.allow_unsafe_overrides = true;
    }
    assert_eq!(change(&d, &w).names(), "device gpu");
}

#[test]
fn a_new_device_needs_a_type() {
    let mut d = desired("web", "rack-a");
    d.spec.overrides.devices = BTreeMap::from([("data".into(), device(&[("path", "/srv")]))]);
    let (reason, message) = waits(&d, &on_a(instance("web")));
    assert_eq!(reason, Reason::InvalidSpec);
    assert!(message.contains("data") && message.contains("type"), "{message}");
}
