//! Kept sources (`spec.keepSource`): the way back sends only what changed, nothing that was written since is lost, nobody
//! starts a kept source by chance, and one that somebody used is left alone.

use berth_tests::{NewInstance, Placement, SOON, Server, Test, condition, wait_for};
use serde_json::{Value, json};

berth_tests::suite! {
    needs: [Kube, Lab],
    together: [
        a_kept_source_that_somebody_changed_is_left_alone_and_the_fix_makes_room,
        a_kept_source_outlives_its_placement_and_stays_while_it_is_suspended,
        a_kept_source_on_another_pool_makes_room,
        a_warm_way_back_brings_the_kept_source_up_to_date_while_the_instance_runs,
    ],
    alone: [
        the_way_back_sends_only_the_difference_between_servers_of_incus,
        the_way_back_sends_only_the_difference_between_servers_of_lxd,
        the_way_back_sends_only_the_difference_between_pools_of_different_drivers,
    ],
}

const DATA: &str = "/root/data";
const NEWS: &str = "/root/news";

fn new(pool: &str, megabytes: usize) -> NewInstance {
    NewInstance {
        megabytes,
        snapshots: 1,
        ..NewInstance::on_pool(pool)
    }
}

/// An instance on `server`, placed there by Cold moves whose source is kept.
async fn placed(test: &Test, server: &str, pool: &str, megabytes: usize, spec: Value) -> String {
    let name = test.unique("web");
    test.lab().server(server).create(&name, &new(pool, megabytes)).await;
    let mut all = json!({"methods": ["Cold"], "keepSource": "10h"});
    if let (Some(all), Some(spec)) = (all.as_object_mut(), spec.as_object()) {
        all.extend(spec.clone());
    }
    test.place(&Placement::new(&name, server).with(all)).await;
    test.wait_in_place(&name, server, SOON).await;
    name
}

async fn patch_spec(test: &Test, name: &str, spec: Value) {
    test.patch("InstancePlacement", name, json!({"spec": spec})).await;
}

/// Moves it, and looks at what was kept.
async fn moves(test: &Test, name: &str, from: &str, to: &str) -> Value {
    test.retarget(name, json!({"server": to})).await;
    let object = test.wait_in_place(name, to, SOON).await;
    is_kept(test, name, from).await;
    test.lab().server(to).wait_counting(name).await;
    object
}

/// Stopped, marked, and nobody can start it.
async fn is_kept(test: &Test, name: &str, server: &str) {
    let here = test.lab().server(server);
    let kept = here
        .instance(name)
        .await
        .unwrap_or_else(|| panic!("{name} is kept on {server}"));
    assert_eq!(kept["status"], "Stopped", "{kept:#}");
    assert_eq!(kept["config"]["user.berth.role"], "retired", "{kept:#}");
    assert_eq!(kept["config"]["boot.autostart"], "false", "{kept:#}");
    let refused = here.try_state(name, "start").await;
    let refused = format!(
        "{:?}",
        refused.err().unwrap_or_else(|| panic!("{name} could be started"))
    );
    assert!(refused.contains("berth"), "it says who holds it: {refused}");
    let object = test.get("InstancePlacement", name).await.unwrap_or_default();
    let shown = object["status"]["kept"].as_array().cloned().unwrap_or_default();
    let shown = shown.iter().find(|k| k["server"] == server);
    let shown = shown.unwrap_or_else(|| panic!("it is shown: {object:#}"));
    assert_eq!(shown["name"], name, "{shown}");
    assert!(shown["until"].is_string(), "{shown}");
}

async fn snapshots(server: &Server, name: &str) -> Vec<String> {
    let path = format!("/1.0/instances/{name}/snapshots?recursion=1");
    let list = server.get(&path).await.unwrap_or_else(|e| panic!("{e}"));
    let names = list.as_array().into_iter().flatten();
    let last = |s: &Value| {
        let name = s["name"].as_str().unwrap_or_default();
        name.rsplit('/').next().unwrap_or_default().to_owned()
    };
    names.map(last).collect()
}

async fn text(server: &Server, name: &str, path: &str) -> String {
    let bytes = server.read_file(name, path).await.unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// Only on that server, running, with the user's snapshot and none of Berth's.
async fn is_alone(test: &Test, name: &str, server: &str) {
    let here = test.lab().server(server);
    let gone = |o: &Value| o["status"]["kept"].as_array().is_none_or(Vec::is_empty);
    test.wait_object("InstancePlacement", name, "nothing kept any more", SOON, gone)
        .await;
    wait_for(&format!("{name} on {server} only"), SOON, || async {
        let (places, left) = (test.lab().whereabouts(name).await, snapshots(here, name).await);
        let one = places == [(server.to_owned(), "Running".to_owned())];
        (one && left == ["s0"])
            .then_some(())
            .ok_or(format!("{places:?} {left:?}"))
    })
    .await;
}

/// To and fro: each time what was left behind is what is brought up to date.
async fn to_and_fro(test: Test, (from, to): (&str, &str)) {
    let pool = "default";
    test.add_servers(&[from, to]).await;
    let _controller = test.controller().await;
    let here = test.lab().server(from);
    let name = placed(&test, from, pool, 24, json!({})).await;
    let data = here.checksum(&name, DATA).await;
    let start = here.sent();
    moves(&test, &name, from, to).await;
    let first = here.sent() - start;
    for (way, (at, home)) in [(to, from), (from, to), (to, from)].into_iter().enumerate() {
        let (at_server, home_server) = (test.lab().server(at), test.lab().server(home));
        let news = format!("written after move {}", way + 1);
        at_server.write_file(&name, NEWS, &news).await;
        let start = at_server.sent();
        moves(&test, &name, at, home).await;
        let sent = at_server.sent() - start;
        let newest = test.moves(&name).await.pop().unwrap_or_default();
        eprintln!(
            "{from} and {to}, {pool}: first {first} bytes, back {sent} bytes, adopted {}",
            newest["status"]["adopted"]
        );
        assert_eq!(newest["status"]["adopted"], true, "{newest:#}");
        assert!(
            sent * 10 <= first,
            "{from} and {to}: {sent} bytes of {first} were sent back"
        );
        assert_eq!(text(home_server, &name, NEWS).await, news, "nothing is lost");
        assert_eq!(home_server.checksum(&name, DATA).await, data, "the same data");
    }
    // a shorter time counts at once
    patch_spec(&test, &name, json!({"keepSource": null})).await;
    is_alone(&test, &name, from).await;
}

async fn the_way_back_sends_only_the_difference_between_servers_of_incus(test: Test) {
    to_and_fro(test, ("i1", "i2")).await;
}

async fn the_way_back_sends_only_the_difference_between_servers_of_lxd(test: Test) {
    to_and_fro(test, ("l1", "l2")).await;
}

/// Between pools of different drivers files are compared, too.
async fn the_way_back_sends_only_the_difference_between_pools_of_different_drivers(test: Test) {
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    let (here, there) = (test.lab().server("i1"), test.lab().server("i2"));
    let name = placed(&test, "i1", "btr", 24, json!({})).await;
    let data = here.checksum(&name, DATA).await;
    let start = here.sent();
    test.retarget(&name, json!({"server": "i2", "pool": "default"})).await;
    test.wait_in_place(&name, "i2", SOON).await;
    let first = here.sent() - start;
    there.write_file(&name, NEWS, "news").await;
    let start = there.sent();
    test.retarget(&name, json!({"server": "i1", "pool": "btr"})).await;
    test.wait_in_place(&name, "i1", SOON).await;
    let sent = there.sent() - start;
    eprintln!("btrfs to dir {first} bytes, back {sent} bytes");
    assert!(sent * 10 <= first, "{sent} bytes of {first} were sent back");
    here.wait_counting(&name).await;
    assert_eq!(text(here, &name, NEWS).await, "news");
    assert_eq!(here.checksum(&name, DATA).await, data);
    patch_spec(&test, &name, json!({"keepSource": null})).await;
    is_alone(&test, &name, "i1").await;
}

async fn a_kept_source_that_somebody_changed_is_left_alone_and_the_fix_makes_room(test: Test) {
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    let name = placed(&test, "i1", "default", 1, json!({})).await;
    moves(&test, &name, "i1", "i2").await;
    let here = test.lab().server("i1");
    // a person takes the guard off, to look into it one day
    let kept = here.instance(&name).await.unwrap_or_default();
    let mut devices = kept["devices"].clone();
    if let Some(devices) = devices.as_object_mut() {
        devices.remove("berth-guard");
    }
    let body = json!({
        "architecture": kept["architecture"], "config": kept["config"], "devices": devices,
        "profiles": kept["profiles"], "ephemeral": false, "description": "mine",
    });
    let put = here.call("PUT", &format!("/1.0/instances/{name}"), body).await;
    put.unwrap_or_else(|error| panic!("{error}"));
    test.retarget(&name, json!({"server": "i1"})).await;
    let object = test
        .wait_ready("InstancePlacement", &name, "False/NameTaken", SOON)
        .await;
    let message = condition(&object, "Ready")
        .map(|c| c["message"].to_string())
        .unwrap_or_default();
    assert!(message.contains("incus delete"), "{message}");
    // a change that is seen only in the middle of the move has it undone
    let boots = test.lab().server("i2").boots(&name).await;
    assert!((2..=3).contains(&boots), "it runs where it was: {boots} boots");
    // its time is over, but it is not Berth's any more
    patch_spec(&test, &name, json!({"keepSource": "0s"})).await;
    wait_for("an Event that it was left alone", SOON, || async {
        let events = test.events(&name).await;
        let told = events
            .iter()
            .any(|e| e.starts_with("Leftover") && e.contains("left alone"));
        told.then_some(()).ok_or(format!("{events:#?}"))
    })
    .await;
    assert_eq!(here.status(&name).await, "Stopped", "it is still there");
    here.delete(&name).await.unwrap_or_else(|error| panic!("{error}"));
    test.wait_in_place(&name, "i1", SOON).await;
    is_alone(&test, &name, "i1").await;
}

async fn a_kept_source_outlives_its_placement_and_stays_while_it_is_suspended(test: Test) {
    test.add_servers(&["l1", "l2"]).await;
    let _controller = test.controller().await;
    let name = placed(&test, "l1", "default", 1, json!({})).await;
    moves(&test, &name, "l1", "l2").await;
    patch_spec(&test, &name, json!({"suspend": true, "keepSource": "0s"})).await;
    let stays = |o: &Value| o["status"]["kept"][0]["server"] == "l1" && o["status"]["kept"][0]["until"].is_null();
    test.wait_object("InstancePlacement", &name, "kept without an end", SOON, stays)
        .await;
    let here = test.lab().server("l1");
    assert_eq!(here.status(&name).await, "Stopped");
    test.delete("InstancePlacement", &name).await;
    wait_for("Events that it stays", SOON, || async {
        let events = test.events(&name).await;
        let told = |what: &str| events.iter().any(|e| e.contains(what));
        let both = told("as long as the placement is suspended") && told("lxc delete");
        both.then_some(()).ok_or(format!("{events:#?}"))
    })
    .await;
    assert_eq!(here.status(&name).await, "Stopped");
    assert!(here.try_state(&name, "start").await.is_err(), "it is guarded for good");
    here.delete(&name).await.unwrap_or_else(|error| panic!("{error}"));
}

async fn a_kept_source_on_another_pool_makes_room(test: Test) {
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    let name = placed(&test, "i1", "btr", 1, json!({})).await;
    moves(&test, &name, "i1", "i2").await;
    // between btrfs pools the kept source cannot be brought up to date: everything is sent
    moves(&test, &name, "i2", "i1").await;
    moves(&test, &name, "i1", "i2").await;
    let data = test.lab().server("i2").checksum(&name, DATA).await;
    test.retarget(&name, json!({"server": "i1", "pool": "default"})).await;
    test.wait_in_place(&name, "i1", SOON).await;
    is_kept(&test, &name, "i2").await;
    let here = test.lab().server("i1");
    assert_eq!(here.checksum(&name, DATA).await, data);
    let places = test.lab().whereabouts(&name).await;
    assert_eq!(places.len(), 2, "the one on the other pool is gone: {places:?}");
    patch_spec(&test, &name, json!({"keepSource": "0s"})).await;
    is_alone(&test, &name, "i1").await;
}

async fn a_warm_way_back_brings_the_kept_source_up_to_date_while_the_instance_runs(test: Test) {
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    let name = placed(&test, "i1", "default", 8, json!({"methods": ["Warm"]})).await;
    moves(&test, &name, "i1", "i2").await;
    let there = test.lab().server("i2");
    there.write_file(&name, NEWS, "warm").await;
    moves(&test, &name, "i2", "i1").await;
    assert_eq!(text(test.lab().server("i1"), &name, NEWS).await, "warm");
    let moves = test.moves(&name).await;
    assert_eq!(moves[1]["spec"]["method"], "Warm");
    let bytes = |n: usize| {
        moves[n]["status"]["precopy"]["rounds"][0]["bytes"]
            .as_i64()
            .unwrap_or(0)
    };
    eprintln!(
        "Warm: first round {} bytes, first round back {} bytes",
        bytes(0),
        bytes(1)
    );
    assert_eq!(moves[1]["status"]["adopted"], true, "{:#}", moves[1]);
    patch_spec(&test, &name, json!({"keepSource": "0s"})).await;
    is_alone(&test, &name, "i1").await;
}
