//! Moves of real virtual machines between real servers, cold and live. The processors are emulated; everything that Incus
//! and LXD do with a guest is real, and the guest's own ticks are the judge.

use std::time::{Duration, Instant};

use berth_tests::{NewVm, Placement, Server, Test, seconds, wait_until};
use serde_json::{Value, json};

#[path = "contract/mod.rs"]
#[allow(
    dead_code,
    unused_macros,
    reason = "the suite contract has the checks; here are their steps"
)]
mod contract;
#[path = "vms/copies.rs"]
mod copies;
#[path = "vms/failures.rs"]
mod failures;
#[path = "contract/guests.rs"]
mod guests;
#[path = "vms/preflight.rs"]
mod preflight;
#[path = "vms/promises.rs"]
mod promises;
#[path = "contract/servers.rs"]
mod servers;
mod standby;
#[path = "vms/warm.rs"]
mod warm;

use copies::{
    a_guest_that_runs_is_copied_and_refreshed_by_push_and_runs_on,
    a_guest_that_stands_is_copied_and_refreshed_with_its_disk,
};
use failures::{
    a_cancelled_live_move_leaves_the_guest_where_it_was,
    a_guest_that_the_target_cannot_take_over_runs_on_and_moves_once_it_can,
    a_live_move_ends_well_whichever_daemon_is_killed, a_live_move_over_a_slow_link_is_given_up_in_time,
    a_live_move_whose_link_is_cut_ends_with_one_guest, two_guests_that_ran_for_too_long_are_told_to_a_person,
};
use preflight::{each_condition_of_a_live_move_is_named_with_a_fix_that_works, live_alone_never_stops_a_guest};
use promises::{
    incus_servers_do_with_guests_what_is_taken_for_granted, lxd_servers_do_with_guests_what_is_taken_for_granted,
};
use warm::a_running_guest_whose_state_cannot_be_saved_moves_warm_with_all_that_it_wrote;

berth_tests::suite! {
    needs: [Kube, Vms],
    timeout: Duration::from_secs(600),
    // emulated processors of overloaded machines have lost a press of the power button, and a saved state
    side_by_side: 2,
    together: [
        a_running_guest_moves_cold_between_incus_servers,
        a_running_guest_moves_cold_between_lxd_servers,
        a_guest_moves_cold_inside_a_cluster,
        a_saved_state_is_not_left_behind,
        a_running_guest_whose_state_cannot_be_saved_moves_warm_with_all_that_it_wrote,
        a_guest_moves_live_four_times_inside_a_cluster,
        a_guest_moves_live_four_times_between_independent_servers,
        the_running_state_of_an_lxd_guest_moves_by_way_of_the_disk,
        live_alone_never_stops_a_guest,
        each_condition_of_a_live_move_is_named_with_a_fix_that_works,
        a_guest_that_the_target_cannot_take_over_runs_on_and_moves_once_it_can,
        two_guests_that_ran_for_too_long_are_told_to_a_person,
        a_guest_that_stands_is_copied_and_refreshed_with_its_disk,
        a_guest_that_runs_is_copied_and_refreshed_by_push_and_runs_on,
        incus_servers_do_with_guests_what_is_taken_for_granted,
        lxd_servers_do_with_guests_what_is_taken_for_granted,
    ],
    alone: [
        a_cancelled_live_move_leaves_the_guest_where_it_was,
        a_live_move_whose_link_is_cut_ends_with_one_guest,
        a_live_move_over_a_slow_link_is_given_up_in_time,
        a_live_move_ends_well_whichever_daemon_is_killed,
    ],
}

/// Emulated processors on a busy machine are slow.
const LONG: Duration = Duration::from_secs(300);

/// What a move may not change.
async fn identity(server: &Server, vm: &str) -> Value {
    let i = server
        .instance(vm)
        .await
        .unwrap_or_else(|| panic!("{vm} is on {}", server.name));
    json!({
        "uuid": i["config"]["volatile.uuid"], "mac": i["config"]["volatile.eth0.hwaddr"],
        "cloud-init": i["config"]["volatile.cloud-init.instance-id"], "root": i["devices"]["root"],
        "memory": i["config"]["limits.memory"], "autostart": i["config"]["boot.autostart"],
    })
}

/// The placement's last move.
async fn last_move(test: &Test, vm: &str) -> Value {
    let moves = test.moves(vm).await;
    moves.last().unwrap_or_else(|| panic!("{vm} was moved")).clone()
}

async fn moves_cold(test: &Test, from: &str, to: &str) {
    let lab = test.lab();
    let (source, target, vm) = (lab.server(from), lab.server(to), test.unique("vm"));
    let new = NewVm {
        snapshots: 1,
        ..NewVm::default()
    };
    lab.create_vm(source, &vm, &new).await;
    let (before, boot) = (identity(source, &vm).await, lab.wait_ticking(&vm).await);
    test.add_servers(&[from, to]).await;
    test.controller().await;
    // from a `dir` pool a guest would stand still for the whole of a copy: the plan chooses Cold, and says why
    let spec = json!({"methods": ["Warm", "Cold"], "stop": {"timeout": "120s"}, "mode": "Observe"});
    test.place(&Placement::new(&vm, to).with(spec)).await;
    let planned = test
        .wait_ready("InstancePlacement", &vm, "False/DriftObserved", LONG)
        .await;
    let plan = &planned["status"]["plan"];
    assert_eq!(plan["method"], "Cold", "{plan:#}");
    assert_eq!(plan["rejected"][0]["reason"], "GuestFrozen", "{plan:#}");
    assert!(
        plan["rejected"][0]["message"].to_string().contains("stands still"),
        "{plan:#}"
    );
    test.patch("InstancePlacement", &vm, json!({"spec": {"mode": "Enforce"}}))
        .await;
    test.wait_in_place(&vm, to, LONG).await;
    assert_ne!(lab.wait_ticking(&vm).await, boot, "it was stopped");
    assert_eq!(identity(target, &vm).await, before);
    assert_eq!(before["root"]["size.state"], "256MiB");
    assert_eq!(source.status(&vm).await, "absent");
    let snapshots = target.get(&format!("/1.0/instances/{vm}/snapshots")).await;
    assert_eq!(snapshots.map(|s| s.as_array().map(Vec::len)).ok(), Some(Some(1)));
    let now = target.instance(&vm).await.unwrap_or_default();
    assert_eq!(now["devices"]["berth-guard"], Value::Null);
    let left = now["config"].to_string();
    assert!(!left.contains("user.berth") && !left.contains("berth-guard"), "{left}");
}

async fn a_running_guest_moves_cold_between_incus_servers(test: Test) {
    moves_cold(&test, "i1", "i2").await;
}

async fn a_running_guest_moves_cold_between_lxd_servers(test: Test) {
    moves_cold(&test, "l1", "l2").await;
}

async fn a_guest_moves_cold_inside_a_cluster(test: Test) {
    let lab = test.lab();
    let (cluster, vm) = (lab.server("m1"), test.unique("vm"));
    let new = NewVm {
        start: false,
        stateful: false,
        member: Some("m1".to_owned()),
        ..NewVm::default()
    };
    lab.create_vm(cluster, &vm, &new).await;
    let (before, disk) = (
        identity(cluster, &vm).await,
        cluster.disk_checksum(&vm, "default").await,
    );
    test.add_servers(&["m1"]).await;
    test.controller().await;
    test.place(&Placement::new(&vm, "m1").with(json!({"target": {"member": "m2"}})))
        .await;
    test.wait_in_place(&vm, "m1", LONG).await;
    assert_eq!(identity(cluster, &vm).await, before);
    assert_eq!(lab.server("m2").disk_checksum(&vm, "default").await, disk);
}

async fn a_saved_state_is_not_left_behind(test: Test) {
    let lab = test.lab();
    let (source, vm) = (lab.server("i1"), test.unique("vm"));
    lab.create_vm(source, &vm, &NewVm::default()).await;
    let stop = json!({"action": "stop", "stateful": true, "timeout": -1, "force": false});
    let stopped = source.call("PUT", &format!("/1.0/instances/{vm}/state"), stop).await;
    stopped.unwrap_or_else(|error| panic!("a stateful stop: {error}"));
    test.add_servers(&["i1", "i2"]).await;
    test.controller().await;
    test.place(&Placement::new(&vm, "i2")).await;
    let blocked = test
        .wait_ready("InstancePlacement", &vm, "False/MethodImpossible", LONG)
        .await;
    assert!(blocked.to_string().contains("saved running state"), "{blocked:#}");
    assert!(source.instance(&vm).await.is_some_and(|i| i["stateful"] == true));
}

/// One live move; nothing of what the guest does may be lost, and two guests run for a moment at most.
async fn moves_live(test: &Test, vm: &str, target: Value, overlapping: bool) {
    let lab = test.lab();
    let server = target["server"].as_str().unwrap_or_default().to_owned();
    let known = test.moves(vm).await.len();
    lab.wait_ticking(vm).await;
    let since = Instant::now();
    test.retarget(vm, target.clone()).await;
    wait_until("another move to be over", LONG, || async {
        let moves = test.moves(vm).await;
        moves.len() > known && moves.last().is_some_and(|m| m["status"]["outcome"].is_string())
    })
    .await;
    let done = last_move(test, vm).await;
    assert_eq!(done["status"]["outcome"], "Succeeded", "{done:#}");
    assert_eq!(done["spec"]["method"], "Live", "{done:#}");
    test.wait_in_place(vm, &server, LONG).await;
    lab.wait_ticking(vm).await;
    let heard = lab.heard(vm, since);
    eprintln!(
        "live to {target}: silent for {:?}, said: {}, {} ticks twice, overlap {}",
        heard.silence,
        done["status"]["downtime"],
        heard.repeated.len(),
        done["status"]["overlap"]
    );
    let (silent, said) = (heard.silence.as_secs_f64(), seconds(&done["status"]["downtime"]));
    assert!(said < 2.0 * silent + 5.0, "silent for {silent} s, {done:#}");
    assert_eq!((heard.boots.len(), heard.addresses.len()), (1, 1), "{heard:?}");
    assert!(heard.missing.is_empty(), "{heard:?}");
    if overlapping {
        // ten ticks a second: what the source still said until it was stopped
        assert!(heard.repeated.len() <= 100, "{heard:?}");
        assert!(done["status"]["overlap"].is_string(), "{done:#}");
    } else {
        assert!(heard.repeated.is_empty(), "{heard:?}");
    }
}

async fn a_guest_moves_live_four_times_inside_a_cluster(test: Test) {
    let lab = test.lab();
    let (cluster, vm) = (lab.server("m1"), test.unique("vm"));
    let new = NewVm {
        member: Some("m1".to_owned()),
        ..NewVm::default()
    };
    lab.create_vm(cluster, &vm, &new).await;
    let before = identity(cluster, &vm).await;
    test.add_servers(&["m1"]).await;
    test.controller().await;
    let here = json!({"target": {"member": "m1"}, "methods": ["Live"]});
    test.place(&Placement::new(&vm, "m1").with(here)).await;
    test.wait_in_place(&vm, "m1", LONG).await;
    for member in ["m2", "m1", "m2", "m1"] {
        moves_live(&test, &vm, json!({"server": "m1", "member": member}), false).await;
        let now = cluster.instance(&vm).await.unwrap_or_default();
        assert_eq!(now["location"], member);
    }
    assert_eq!(identity(cluster, &vm).await, before);
}

async fn a_guest_moves_live_four_times_between_independent_servers(test: Test) {
    let lab = test.lab();
    let vm = test.unique("vm");
    lab.create_vm(lab.server("i1"), &vm, &NewVm::default()).await;
    let before = identity(lab.server("i1"), &vm).await;
    test.add_servers(&["i1", "i2"]).await;
    test.controller().await;
    test.place(&Placement::new(&vm, "i1").with(json!({"methods": ["Live"]})))
        .await;
    test.wait_in_place(&vm, "i1", LONG).await;
    for (to, transfer) in [("i2", "Pull"), ("i1", "Push"), ("i2", "Relay"), ("i1", "Pull")] {
        let spec = json!({"spec": {"transfer": transfer}});
        test.patch("InstancePlacement", &vm, spec).await;
        moves_live(&test, &vm, json!({"server": to}), true).await;
        assert_eq!(last_move(&test, &vm).await["spec"]["transfer"], transfer);
        assert_eq!(identity(lab.server(to), &vm).await, before);
        let from = if to == "i1" { "i2" } else { "i1" };
        assert_eq!(lab.server(from).status(&vm).await, "absent");
    }
}

async fn the_running_state_of_an_lxd_guest_moves_by_way_of_the_disk(test: Test) {
    let lab = test.lab();
    let vm = test.unique("vm");
    lab.create_vm(lab.server("l1"), &vm, &NewVm::default()).await;
    let before = identity(lab.server("l1"), &vm).await;
    test.add_servers(&["l1", "l2"]).await;
    test.controller().await;
    test.place(&Placement::new(&vm, "l1").with(json!({"methods": ["Live"]})))
        .await;
    test.wait_in_place(&vm, "l1", LONG).await;
    moves_live(&test, &vm, json!({"server": "l2"}), false).await;
    assert_eq!(identity(lab.server("l2"), &vm).await, before);
    assert_eq!(lab.server("l1").status(&vm).await, "absent");
}
