//! What keeps a guest from being moved live is said before anything is touched, with a fix that can be pasted.

use std::time::Duration;

use berth_tests::{NewVm, Placement, Test, wait_for};
use serde_json::{Value, json};

use super::LONG;

/// The rejected live method of that reason.
async fn rejected(test: &Test, vm: &str, reason: &str) -> Value {
    wait_for(&format!("the plan to name {reason}"), LONG, || async {
        let placement = test.get("InstancePlacement", vm).await.unwrap_or_default();
        let list = placement["status"]["plan"]["rejected"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let found = list
            .into_iter()
            .find(|r| r["method"] == "Live" && r["reason"] == reason);
        found.ok_or_else(|| format!("{:#}", placement["status"]))
    })
    .await
}

/// Nothing is moved while fixes are pasted: some stop the guest for a moment, and a stopped one would be moved cold.
async fn suspend(test: &Test, vm: &str, suspend: bool) {
    test.patch("InstancePlacement", vm, json!({"spec": {"suspend": suspend}}))
        .await;
}

/// Pastes a fix.
async fn paste(test: &Test, fix: &Value) {
    test.lab().paste(fix["fix"].as_str().unwrap_or_default()).await;
}

pub async fn live_alone_never_stops_a_guest(test: Test) {
    let (lab, vm) = (test.lab(), test.unique("vm"));
    let new = NewVm {
        stateful: false,
        ..NewVm::default()
    };
    lab.create_vm(lab.server("i1"), &vm, &new).await;
    let boot = lab.wait_ticking(&vm).await;
    test.add_servers(&["i1", "i2"]).await;
    test.controller().await;
    test.place(&Placement::new(&vm, "i2").with(json!({"methods": ["Live"]})))
        .await;
    test.wait_ready("InstancePlacement", &vm, "False/MethodImpossible", LONG)
        .await;
    rejected(&test, &vm, "MigrationStatefulOff").await;
    assert_eq!(lab.wait_ticking(&vm).await, boot);
    assert!(test.moves(&vm).await.is_empty());
}

pub async fn each_condition_of_a_live_move_is_named_with_a_fix_that_works(test: Test) {
    let (lab, vm) = (test.lab(), test.unique("vm"));
    let new = NewVm {
        stateful: false,
        ..NewVm::default()
    };
    let source = lab.server("i1");
    lab.create_vm(source, &vm, &new).await;
    // a folder of the host, which a guest that is to be moved live cannot have
    let share = json!({"type": "disk", "source": "/usr/share", "path": "/mnt"});
    source.set_state(&vm, "stop").await;
    source.patch(&vm, json!({"devices": {"share": share}})).await;
    source.set_state(&vm, "start").await;
    lab.wait_ticking(&vm).await;
    test.add_servers(&["i1", "i2"]).await;
    test.patch(
        "InstanceServer",
        "i2",
        json!({"spec": {"live": {"betweenServers": false}}}),
    )
    .await;
    test.controller().await;
    test.place(&Placement::new(&vm, "i2").with(json!({"methods": ["Live"]})))
        .await;
    let off = rejected(&test, &vm, "MigrationStatefulOff").await;
    let share = rejected(&test, &vm, "SharedFilesystem").await;
    let forbidden = rejected(&test, &vm, "MethodImpossible").await;
    assert!(
        forbidden["message"].to_string().contains("betweenServers"),
        "{forbidden:#}"
    );
    suspend(&test, &vm, true).await;
    paste(&test, &share).await;
    // a guest that still boots does not hear the next stop
    lab.wait_ticking(&vm).await;
    paste(&test, &off).await;
    test.patch(
        "InstanceServer",
        "i2",
        json!({"spec": {"live": {"betweenServers": true}}}),
    )
    .await;
    suspend(&test, &vm, false).await;
    test.wait_in_place(&vm, "i2", LONG + Duration::from_secs(60)).await;
    moved_live(&test, &vm).await;
    // LXD also wants room for the memory
    let small = test.unique("small");
    let new = NewVm {
        stateful: false,
        root: json!({"size.state": "64MiB"}),
        ..NewVm::default()
    };
    lab.create_vm(lab.server("l1"), &small, &new).await;
    test.add_servers(&["l1", "l2"]).await;
    test.place(&Placement::new(&small, "l2").with(json!({"methods": ["Live"]})))
        .await;
    let room = rejected(&test, &small, "StateSizeTooSmall").await;
    let off = rejected(&test, &small, "MigrationStatefulOff").await;
    suspend(&test, &small, true).await;
    paste(&test, &room).await;
    lab.wait_ticking(&small).await;
    paste(&test, &off).await;
    suspend(&test, &small, false).await;
    test.wait_in_place(&small, "l2", LONG + Duration::from_secs(60)).await;
    moved_live(&test, &small).await;
}

/// Before Berth hears that the guest runs again, it may begin to move a stopped one; that is undone without a stop.
async fn moved_live(test: &Test, vm: &str) {
    let mut moves = test.moves(vm).await;
    let last = moves.pop().unwrap_or_default();
    assert_eq!(last["spec"]["method"], "Live");
    for other in moves {
        assert_eq!(other["status"]["outcome"], "Undone", "{other:#}");
        assert!(
            other["status"]["stopRequestedAt"].is_null(),
            "it was never stopped: {other:#}"
        );
    }
}
