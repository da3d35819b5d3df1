//! Live moves of containers that fail: afterwards it runs once, where it was or where it was going, and nothing is left.

use std::time::Duration;

use berth_tests::{Fate, NewInstance, Placement, SOON, Server, Test, wait_for};
use serde_json::{Value, json};

use super::road::{self, Call, Road, Watch};
use super::{boots, ended, ended_of_unprivileged, goes_on, live, ticking};

/// It runs on that server, and no other has a copy of it.
async fn is_only_on(test: &Test, name: &str, server: &str) {
    wait_for(&format!("{name} to be on {server} alone"), SOON, || async {
        let places = test.lab().whereabouts(name).await;
        if places == [(server.to_owned(), "Running".to_owned())] {
            Ok(())
        } else {
            Err(format!("{places:?}"))
        }
    })
    .await;
}

async fn suspend(test: &Test, name: &str) {
    test.patch("InstancePlacement", name, json!({"spec": {"suspend": true}}))
        .await;
}

/// A process that CRIU cannot save: one that has this device open.
async fn holds_a_device(source: &Server, name: &str) {
    let open = "setsid sh -c 'exec sleep 100000 3<>/dev/fuse' </dev/null >/dev/null 2>&1 &";
    let opened = source.exec(name, &["sh", "-c", open]).await;
    assert!(opened.is_ok(), "{opened:?}");
}

pub async fn what_criu_cannot_move_stays_as_it_is_or_moves_by_the_next_method(test: Test) {
    let (source, name) = (test.lab().server("t1"), test.unique("held"));
    ticking(source, &name, &NewInstance::movable(true, false)).await;
    holds_a_device(source, &name).await;
    test.add_servers(&["t1", "t2"]).await;
    test.controller().await;
    test.place(&Placement::new(&name, "t2").with(live())).await;
    let first = ended(&test, &name, 0).await;
    assert_eq!(first["status"]["undo"]["reason"], "TargetRefused", "{first:#}");
    is_only_on(&test, &name, "t1").await;
    goes_on(source, &name).await;
    test.wait_ready("InstancePlacement", &name, "False/MethodImpossible", SOON)
        .await;
    let next = json!({"spec": {"methods": ["Live", "Warm"]}});
    test.patch("InstancePlacement", &name, next).await;
    let placed = test.wait_in_place(&name, "t2", SOON).await;
    let told = told(&placed);
    assert_eq!(told[0][..2], ["Warm", "Succeeded"], "{told:?}");
    assert_eq!(
        told.last(),
        Some(&["Live", "Undone", "TargetRefused"].map(str::to_owned)),
        "{told:?}"
    );
}

/// Method, outcome and reason of the moves that a placement remembers, newest first.
fn told(placement: &Value) -> Vec<[String; 3]> {
    let moves = placement["status"]["moves"].as_array().into_iter().flatten();
    let text = |m: &Value, key: &str| m[key].as_str().unwrap_or_default().to_owned();
    moves
        .map(|m| ["method", "outcome", "reason"].map(|key| text(m, key)))
        .collect()
}

pub async fn a_container_falls_from_live_to_warm_to_cold_in_one_placement(test: Test) {
    let (source, name) = (test.lab().server("i1"), test.unique("web"));
    let road = Road::between(&test, "i1", "i2").await;
    ticking(source, &name, &NewInstance::movable(true, false)).await;
    holds_a_device(source, &name).await;
    // the snapshot that a warm move begins with is refused on its way
    for proxy in road.proxies() {
        proxy.rule(|seen| match Call::of(seen) {
            Some(Call::Snapshot) => Fate::Refuse,
            _ => Fate::Pass,
        });
    }
    let watch = Watch::begin(&road, &[road::known(source, &name).await]);
    test.controller().await;
    let spec = json!({"criu": true, "methods": ["Live", "Warm", "Cold"]});
    test.place(&Placement::new(&name, "i2").with(spec)).await;
    let placed = test.wait_in_place(&name, "i2", SOON).await;
    watch.end();
    let ladder = [
        ["Cold", "Succeeded", ""],
        ["Warm", "Undone", "TargetRefused"],
        ["Live", "Undone", "TargetRefused"],
    ];
    assert_eq!(
        told(&placed),
        ladder.map(|m| m.map(str::to_owned)),
        "{:#}",
        placed["status"]
    );
    let why = |nth: usize| placed["status"]["moves"][nth]["message"].to_string();
    assert!(why(1).contains("refused on purpose"), "{}", why(1));
    eprintln!("live: {}", why(2));
    is_only_on(&test, &name, "i2").await;
    assert_eq!(
        boots(test.lab().server("i2"), &name).await,
        2,
        "stopped once, by the last of them"
    );
}

pub async fn files_that_belong_to_nobody_are_found_and_the_container_runs_where_it_was(test: Test) {
    let (lab, name) = (test.lab(), test.unique("web"));
    let source = lab.server("t1");
    ticking(source, &name, &NewInstance::movable(false, false)).await;
    test.add_servers(&["t1", "t2"]).await;
    test.controller().await;
    test.place(&Placement::new(&name, "t2").with(live())).await;
    // the plan knows, and nothing is touched
    let refused = test
        .wait_ready("InstancePlacement", &name, "False/MethodImpossible", SOON)
        .await;
    assert!(
        refused["status"]["plan"]["rejected"].to_string().contains("idmapped"),
        "{refused:#}"
    );
    assert!(test.moves(&name).await.is_empty());
    // where nothing is written of it, a look inside what was restored finds it
    source
        .patch(&name, json!({"config": {"volatile.last_state.idmap": ""}}))
        .await;
    let first = ended_of_unprivileged(&test, &name, source, lab.server("t2")).await;
    suspend(&test, &name).await;
    assert_eq!(first["status"]["outcome"], "Undone", "{first:#}");
    let why = first["status"]["undo"]["message"].as_str().unwrap_or_default();
    assert!(
        why.contains("belong to nobody") && why.contains("boots again on t1"),
        "{first:#}"
    );
    is_only_on(&test, &name, "t1").await;
    source.wait_counting(&name).await;
    assert_eq!(
        boots(source, &name).await,
        2,
        "its processes had ended with the restore"
    );
    let written = source.exec(&name, &["touch", "/root/written"]).await;
    assert!(written.is_ok(), "{written:?}");
    let i = source.instance(&name).await.unwrap_or_default();
    assert!(!i["config"].to_string().contains("user.berth"), "{i:#}");
}

pub async fn a_live_move_of_a_container_that_is_cancelled_leaves_it_as_it_was(test: Test) {
    let (lab, name) = (test.lab(), test.unique("web"));
    ticking(lab.server("i1"), &name, &NewInstance::movable(true, false)).await;
    test.add_servers(&["i1", "i2"]).await;
    test.controller().await;
    let rounds = json!({"live": {"incrementalMemory": true}});
    test.place(&Placement::new(&name, "i2").with(live()).with(rounds)).await;
    let begun = test.wait_step(&name, &["Restoring"], SOON).await;
    let record = begun["metadata"]["name"].as_str().unwrap_or_default();
    test.patch("InstanceMove", record, json!({"spec": {"cancel": true}}))
        .await;
    // seen between the file system and the memory: the source refuses every change
    test.restart_what_never_ends(record, SOON).await;
    let first = ended(&test, &name, 0).await;
    // it may have been over before the wish was read
    let at = if first["status"]["outcome"] == "Cancelled" {
        "i1"
    } else {
        "i2"
    };
    is_only_on(&test, &name, at).await;
    goes_on(lab.server(at), &name).await;
    let i = lab.server(at).instance(&name).await.unwrap_or_default();
    assert_eq!(i["config"]["migration.incremental.memory"], Value::Null, "{i:#}");
}

pub async fn a_live_move_of_a_container_ends_well_whichever_daemon_is_killed(test: Test) {
    let lab = test.lab();
    test.add_servers(&["i1", "i2"]).await;
    test.controller().await;
    for victim in ["i2", "i1"] {
        let name = format!("{victim}-{}", test.unique("web"));
        ticking(lab.server("i1"), &name, &NewInstance::movable(true, false)).await;
        test.place(&Placement::new(&name, "i2").with(live())).await;
        test.wait_step(&name, &["Restoring"], SOON).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let server = lab.server(victim);
        server.kill_daemon().await;
        server.start_daemon().await;
        let first = ended(&test, &name, 0).await;
        suspend(&test, &name).await;
        eprintln!(
            "{victim} killed: {} {}",
            first["status"]["outcome"], first["status"]["undo"]["message"]
        );
        let at = if first["status"]["outcome"] == "Succeeded" {
            "i2"
        } else {
            "i1"
        };
        is_only_on(&test, &name, at).await;
        goes_on(lab.server(at), &name).await;
    }
}
