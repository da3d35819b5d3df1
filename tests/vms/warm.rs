//! A running guest moves warm: its disk is copied while it writes to it, and it is stopped for the last difference only.

use std::collections::BTreeSet;
use std::time::Instant;

use berth_tests::{NewVm, Placement, Server, Test};
use serde_json::{Value, json};

use super::{LONG, identity, last_move};

async fn snapshots(server: &Server, vm: &str) -> Vec<Value> {
    let list = server.get(&format!("/1.0/instances/{vm}/snapshots?recursion=1")).await;
    let list = list.unwrap_or_else(|error| panic!("{vm}: {error}"));
    list.as_array()
        .into_iter()
        .flatten()
        .map(|s| s["name"].clone())
        .collect()
}

pub async fn a_running_guest_whose_state_cannot_be_saved_moves_warm_with_all_that_it_wrote(test: Test) {
    let (lab, vm) = (test.lab(), test.unique("vm"));
    let (source, target) = (lab.server("i1"), lab.server("i2"));
    let new = NewVm {
        pool: "btr".to_owned(),
        root: json!({"io.bus": "virtio-blk"}),
        stateful: false,
        snapshots: 1,
        ..NewVm::default()
    };
    lab.create_vm(source, &vm, &new).await;
    let (before, user) = (identity(source, &vm).await, snapshots(source, &vm).await);
    let (boot, since) = (lab.wait_ticking(&vm).await, Instant::now());
    test.add_servers(&["i1", "i2"]).await;
    test.controller().await;
    let spec = json!({"target": {"pool": "btr"}, "stop": {"timeout": "120s"}, "warm": {"maxRounds": 3, "downtimeGoal": "100ms"}});
    test.place(&Placement::new(&vm, "i2").with(spec)).await;
    test.wait_in_place(&vm, "i2", LONG).await;
    let booted = lab.wait_ticking(&vm).await;

    let done = last_move(&test, &vm).await;
    assert_eq!(test.moves(&vm).await.len(), 1, "{done:#}");
    assert_eq!(done["spec"]["method"], "Warm", "{done:#}");
    assert_eq!(done["status"]["outcome"], "Succeeded", "{done:#}");
    let rounds = done["status"]["precopy"]["rounds"].as_array().map_or(0, Vec::len);
    assert!(rounds >= 2, "one before the stop and one after it: {done:#}");
    let heard = lab.heard(&vm, since);
    assert_eq!(
        heard.boots,
        BTreeSet::from([boot.clone(), booted]),
        "stopped and started once"
    );
    let acknowledged = lab.numbers(&vm, &boot);
    assert!(!acknowledged.is_empty(), "it wrote before it was stopped");
    let kept = target.numbers_on_disk(&vm, "btr", &boot).await;
    let lost: Vec<_> = acknowledged.difference(&kept).collect();
    assert!(lost.is_empty(), "heard, and not on the disk: {lost:?}");
    assert_eq!(identity(target, &vm).await, before);
    assert_eq!(snapshots(target, &vm).await, user, "the user's snapshot, and no other");
    assert_eq!(lab.whereabouts(&vm).await, [("i2".to_owned(), "Running".to_owned())]);
    eprintln!(
        "warm, {rounds} rounds: {} ticks before the stop, silent for {:?}, measured {}",
        acknowledged.len(),
        heard.silence,
        done["status"]["downtime"]
    );
}
