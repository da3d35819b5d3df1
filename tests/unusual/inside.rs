//! Moves inside one server or cluster: several changes together, what stands against them, and what an interrupted server leaves.

use berth_tests::{Fate, NewInstance, Placement, Proxy, SOON, Seen, Server, Test};
use serde_json::{Value, json};

use crate::{back_up, instance, must, placed, refused, with};

/// A project that has what the default one has.
async fn project(test: &Test, server: &Server) -> String {
    let name = test.unique("shop");
    let config = json!({"features.images": "false", "features.profiles": "false"});
    must(server, "POST", "/1.0/projects", json!({"name": name, "config": config})).await;
    name
}

/// The only instance with that uuid, wherever it is: project, name, pool, member, status.
async fn whereabouts(server: &Server, uuid: &Value) -> Vec<[String; 5]> {
    let all = server.instances().await.unwrap_or_else(|error| panic!("{error}"));
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let place = |i: &Value| {
        let pool = &i["expanded_devices"]["root"]["pool"];
        [
            text(&i["project"]),
            text(&i["name"]),
            text(pool),
            text(&i["location"]),
            text(&i["status"]),
        ]
    };
    all.iter()
        .filter(|i| i["config"]["volatile.uuid"] == *uuid)
        .map(place)
        .collect()
}

/// Changes everything that the server has at once in the spec; returns how many requests made it.
async fn several_changes(test: &Test, on: &str, target: Value) -> (usize, Vec<[String; 5]>) {
    let server = test.lab().server(on);
    let name = test.unique("web");
    let new = NewInstance {
        snapshots: 1,
        member: server.cluster.is_some().then(|| on.to_owned()),
        ..with(&[])
    };
    server.create(&name, &new).await;
    let before = instance(server, &name).await;
    let checksum = server.checksum(&name, "/root/data").await;
    test.add_client_secret("berth-client").await;
    let proxy = Proxy::start(test.lab(), server).await;
    test.add_server(on, server, json!({"addresses": [proxy.url()]})).await;
    test.controller().await;
    test.place(&Placement::new(&name, on).with(json!({"target": target})))
        .await;
    let placement = test.wait_in_place(&name, on, SOON).await;
    let uuid = &before["config"]["volatile.uuid"];
    let places = whereabouts(server, uuid).await;
    assert_eq!(places.len(), 1, "{places:?}");
    let [project, new_name, ..] = &places[0];
    assert_eq!(placement["status"]["location"]["name"], *new_name);
    let path = format!("/1.0/instances/{new_name}?project={project}");
    let after = server.get(&path).await.unwrap_or_else(|error| panic!("{error}"));
    let keys = ["volatile.cloud-init.instance-id", "volatile.eth0.hwaddr"];
    for key in keys {
        assert_eq!(after["config"][key], before["config"][key], "{key}");
    }
    let marks = after["config"]
        .as_object()
        .is_some_and(|c| c.keys().any(|k| k.contains("berth")));
    assert!(!marks, "{after:#}");
    let path = format!("/1.0/instances/{new_name}/snapshots?project={project}");
    let snapshots = server.get(&path).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(snapshots.as_array().map(Vec::len), Some(1), "its snapshot came along");
    if project == "default" {
        assert_eq!(server.checksum(new_name, "/root/data").await, checksum, "the same data");
    }
    assert_eq!(test.moves(&name).await.len(), 1);
    let relocates = |seen: &Seen| seen.method == "POST" && seen.body.contains("\"migration\":true");
    let relocations = proxy.count(relocates);
    // the instance goes before its project can
    test.delete("InstancePlacement", &name).await;
    (relocations, places)
}

async fn gone(server: &Server, place: &[String; 5]) {
    let [project, name, ..] = place;
    server.delete_with_project(name, project).await;
}

async fn pool_project_and_name(test: Test, on: &str, requests: usize) {
    let server = test.lab().server(on);
    let (project, name) = (project(&test, server).await, test.unique("shop"));
    let target = json!({"pool": "btr", "project": project, "name": name});
    let (relocations, places) = several_changes(&test, on, target).await;
    assert_eq!(
        places[0],
        [&project, &name, "btr", "none", "Running"].map(str::to_owned)
    );
    assert_eq!(relocations, requests, "as few requests as it allows");
    gone(server, &places[0]).await;
}

pub async fn several_changes_at_once_on_incus(test: Test) {
    pool_project_and_name(test, "i1", 1).await;
}

pub async fn several_changes_at_once_on_incus_7(test: Test) {
    pool_project_and_name(test, "t1", 1).await;
}

pub async fn several_changes_one_after_the_other_on_lxd(test: Test) {
    pool_project_and_name(test, "l1", 2).await;
}

pub async fn a_member_project_and_name_at_once_in_a_cluster(test: Test) {
    let server = test.lab().server("m1");
    let (project, name) = (project(&test, server).await, test.unique("shop"));
    let target = json!({"member": "m2", "project": project, "name": name});
    let (relocations, places) = several_changes(&test, "m1", target).await;
    assert_eq!(
        places[0],
        [&project, &name, "default", "m2", "Running"].map(str::to_owned)
    );
    assert_eq!(relocations, 1, "one request for all");
    gone(server, &places[0]).await;
}

pub async fn snapshots_that_are_excluded_are_gone_after_a_change_of_the_pool(test: Test) {
    let new = NewInstance {
        snapshots: 2,
        ..with(&[])
    };
    let (name, server) = placed(&test, &["l2"], &new).await;
    let spec = json!({"spec": {"snapshots": "Exclude", "mode": "Observe", "target": {"pool": "btr"}}});
    test.patch("InstancePlacement", &name, spec).await;
    let object = test
        .wait_ready("InstancePlacement", &name, "False/DriftObserved", SOON)
        .await;
    assert_eq!(
        object["status"]["plan"]["dropped"],
        json!(["snapshot s0", "snapshot s1"])
    );
    test.patch("InstancePlacement", &name, json!({"spec": {"mode": "Enforce"}}))
        .await;
    test.wait_in_place(&name, "l2", SOON).await;
    let path = format!("/1.0/instances/{name}/snapshots");
    assert_eq!(server.get(&path).await.unwrap_or_default(), json!([]));
}

async fn backups_in_the_way(test: Test, on: &str) {
    let (name, server) = placed(&test, &[on], &with(&[])).await;
    back_up(server, &name).await;
    test.retarget(&name, json!({"pool": "btr"})).await;
    let blocker = refused(&test, &name, "BackupsInTheWay").await;
    assert!(
        blocker["message"].as_str().is_some_and(|m| m.contains("b0")),
        "{blocker}"
    );
    assert_eq!(server.boots(&name).await, 1, "it was not stopped");
    let new_name = test.unique("shop");
    test.retarget(&name, json!({"pool": null, "name": new_name})).await;
    test.wait_in_place(&name, on, SOON).await;
    let backups = server.get(&format!("/1.0/instances/{new_name}/backups")).await;
    assert_eq!(
        backups.unwrap_or_default().as_array().map(Vec::len),
        Some(1),
        "a rename keeps them"
    );
    must(
        server,
        "DELETE",
        &format!("/1.0/instances/{new_name}/backups/b0"),
        Value::Null,
    )
    .await;
    test.retarget(&name, json!({"pool": "btr"})).await;
    test.wait_in_place(&name, on, SOON).await;
    let moved = instance(server, &new_name).await;
    assert_eq!(moved["expanded_devices"]["root"]["pool"], "btr");
}

pub async fn an_instance_with_backups_is_not_moved_inside_but_renamed_on_incus(test: Test) {
    backups_in_the_way(test, "i2").await;
}

pub async fn an_instance_with_backups_is_not_moved_inside_but_renamed_on_lxd(test: Test) {
    backups_in_the_way(test, "l2").await;
}

/// A server that is killed between the deletion of the former volume and the last rename leaves `move-of-…`.
pub async fn what_an_interrupted_server_left_under_a_name_of_its_own_gets_its_name(test: Test) {
    let server = test.lab().server("i1");
    let name = test.unique("web");
    server.create(&name, &with(&[])).await;
    let before = instance(server, &name).await;
    let checksum = server.checksum(&name, "/root/data").await;
    test.add_client_secret("berth-client").await;
    let proxy = Proxy::start(test.lab(), server).await;
    test.add_server("i1", server, json!({"addresses": [proxy.url()]})).await;
    test.controller().await;
    let relocates = |seen: &Seen| seen.method == "POST" && seen.body.contains("\"pool\"");
    let it = name.clone();
    proxy.rule(move |seen| match seen.path.contains(&it) && relocates(seen) {
        true => Fate::Hold,
        false => Fate::Pass,
    });
    test.place(&Placement::new(&name, "i1").with(json!({"target": {"pool": "btr"}})))
        .await;
    proxy.wait_held(SOON).await;
    // what the request would have made, as far as an interrupted server gets
    let path = format!("/1.0/instances/{name}");
    must(
        server,
        "POST",
        &path,
        json!({"name": name, "migration": true, "live": false, "pool": "btr"}),
    )
    .await;
    server.rename(&name, &test.unique("move-of-4711")).await;
    proxy.release().await;
    test.wait_in_place(&name, "i1", SOON).await;
    let uuid = &before["config"]["volatile.uuid"];
    let places = whereabouts(server, uuid).await;
    assert_eq!(
        places,
        [["default", name.as_str(), "btr", "none", "Running"].map(str::to_owned)]
    );
    assert_eq!(server.checksum(&name, "/root/data").await, checksum, "the same data");
    let moves = test.moves(&name).await;
    assert_eq!(moves.len(), 1, "{moves:#?}");
    assert_eq!(moves[0]["status"]["outcome"], "Succeeded");
}
