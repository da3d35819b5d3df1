//! Instances that are not like most: privileged, nested, with raw keys, keys of one product, backups, snapshots that stay,
//! volumes of their own. Each is carried as it is, or refused with a reason before anything is touched.

use berth_tests::{NewInstance, Placement, SOON, Server, Test, condition, reason, wait_for};
use serde_json::{Value, json};

#[path = "unusual/inside.rs"]
mod inside;

berth_tests::suite! {
    needs: [Kube, Lab],
    side_by_side: 6,
    together: [
        what_berth_changes_on_the_way_is_as_before_on_lxd_too,
        privileged_nested_isolated_and_raw_instances_travel_as_they_are_on_incus,
        privileged_nested_isolated_and_raw_instances_travel_as_they_are_on_lxd,
        keys_that_only_incus_knows_are_left_out_on_the_way_to_lxd,
        keys_that_only_lxd_knows_are_left_out_on_the_way_to_incus,
        snapshots_of_incus_cannot_go_to_lxd_and_excluding_them_mends_that,
        an_attached_volume_must_be_at_the_target_on_incus,
        an_attached_volume_must_be_at_the_target_on_lxd,
        backups_stay_behind_between_servers_and_are_listed,
        inside::several_changes_at_once_on_incus,
        inside::several_changes_one_after_the_other_on_lxd,
        inside::a_member_project_and_name_at_once_in_a_cluster,
        inside::snapshots_that_are_excluded_are_gone_after_a_change_of_the_pool,
        inside::an_instance_with_backups_is_not_moved_inside_but_renamed_on_incus,
        inside::an_instance_with_backups_is_not_moved_inside_but_renamed_on_lxd,
        inside::what_an_interrupted_server_left_under_a_name_of_its_own_gets_its_name,
    ],
    alone: [],
    incus7: [
        a_key_of_incus_7_is_left_out_on_the_way_to_incus_6,
        inside::several_changes_at_once_on_incus_7,
    ],
}

/// A container with these keys.
pub fn with(config: &[(&str, &str)]) -> NewInstance {
    NewInstance {
        megabytes: 1,
        config: config.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        ..NewInstance::default()
    }
}

/// Both servers, a controller, and a placement of the new instance where it is.
pub async fn placed(test: &Test, servers: &[&str], new: &NewInstance) -> (String, &'static Server) {
    let source = test.lab().server(servers[0]);
    let name = test.unique("web");
    source.create(&name, new).await;
    test.add_servers(servers).await;
    test.controller().await;
    test.place(&Placement::new(&name, servers[0]).with(json!({"methods": ["Cold"]})))
        .await;
    test.wait_in_place(&name, servers[0], SOON).await;
    (name, source)
}

pub async fn instance(server: &Server, name: &str) -> Value {
    server
        .instance(name)
        .await
        .unwrap_or_else(|| panic!("{name} is on {}", server.name))
}

pub async fn must(server: &Server, method: &str, path: &str, body: Value) -> Value {
    let done = server.call(method, path, body).await;
    done.unwrap_or_else(|error| panic!("{}: {method} {path}: {error}", server.name))
}

/// Waits until the placement is refused for that reason, with a fix; returns its blocker. Nothing was begun.
pub async fn refused(test: &Test, name: &str, why: &str) -> Value {
    let object = test
        .wait_object("InstancePlacement", name, &format!("refused, {why}"), SOON, |object| {
            condition(object, "Stalled").is_some() && reason(object) == format!("False/{why}")
        })
        .await;
    let blocker = object["status"]["plan"]["blockers"][0].clone();
    assert_eq!(blocker["reason"], why);
    assert!(blocker["fix"].is_string(), "{why} has a fix: {blocker}");
    blocker
}

/// What the plan says stays behind, from a placement that only observes.
async fn dropped(test: &Test, name: &str, to: &str) -> Vec<String> {
    let spec = json!({"spec": {"mode": "Observe", "target": {"server": to}}});
    test.patch("InstancePlacement", name, spec).await;
    let object = test
        .wait_ready("InstancePlacement", name, "False/DriftObserved", SOON)
        .await;
    let list = object["status"]["plan"]["dropped"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    list.iter().filter_map(|k| k.as_str().map(str::to_owned)).collect()
}

async fn as_declared(test: &Test, name: &str, to: &str) {
    test.patch("InstancePlacement", name, json!({"spec": {"mode": "Enforce"}}))
        .await;
    test.wait_in_place(name, to, SOON).await;
}

async fn what_berth_changes_on_the_way_is_as_before_on_lxd_too(test: Test) {
    let new = with(&[("boot.autostart", "true"), ("security.protection.delete", "true")]);
    let (name, source) = placed(&test, &["l1", "l2"], &new).await;
    source.patch(&name, json!({"ephemeral": true})).await;
    test.retarget(&name, json!({"server": "l2"})).await;
    test.wait_in_place(&name, "l2", SOON).await;
    let target = test.lab().server("l2");
    let moved = instance(target, &name).await;
    assert_eq!(moved["config"]["boot.autostart"], "true");
    assert_eq!(moved["config"]["security.protection.delete"], "true");
    assert_eq!(moved["ephemeral"], true);
    assert_eq!(
        source.status(&name).await,
        "absent",
        "protection does not keep the former source"
    );
    // or the stop before its deletion deletes it
    target.patch(&name, json!({"ephemeral": false})).await;
}

async fn travel_as_they_are(test: Test, from: &str, to: &str) {
    let (source, target) = (test.lab().server(from), test.lab().server(to));
    let kinds: [(&str, &[(&str, &str)]); 4] = [
        ("privileged", &[("security.privileged", "true")]),
        ("nested", &[("security.nesting", "true")]),
        (
            "isolated",
            &[("security.idmap.isolated", "true"), ("security.idmap.size", "65536")],
        ),
        ("raw", &[("raw.lxc", "lxc.environment = BERTH=1")]),
    ];
    let names: Vec<String> = kinds.iter().map(|(kind, _)| test.unique(kind)).collect();
    let made = names.iter().zip(&kinds).map(|(name, (_, config))| async move {
        source.create(name, &with(config)).await;
        (source.checksum(name, "/root/data").await, instance(source, name).await)
    });
    let before = futures::future::join_all(made).await;
    test.add_servers(&[from, to]).await;
    test.controller().await;
    for name in &names {
        test.place(&Placement::new(name, to).with(json!({"methods": ["Cold"]})))
            .await;
    }
    for ((name, (_, config)), (checksum, instance_before)) in names.iter().zip(&kinds).zip(&before) {
        test.wait_in_place(name, to, SOON).await;
        let moved = instance(target, name).await;
        for (key, value) in *config {
            assert_eq!(moved["config"][key], *value, "{name}: {key}");
        }
        assert_eq!(
            moved["config"]["volatile.uuid"],
            instance_before["config"]["volatile.uuid"]
        );
        target.wait_counting(name).await;
        assert_eq!(
            target.checksum(name, "/root/data").await,
            *checksum,
            "{name}: the same data"
        );
        assert_eq!(
            target.boots(name).await,
            2,
            "{name}: its root user can write where it is now"
        );
    }
}

async fn privileged_nested_isolated_and_raw_instances_travel_as_they_are_on_incus(test: Test) {
    travel_as_they_are(test, "i1", "i2").await;
}

async fn privileged_nested_isolated_and_raw_instances_travel_as_they_are_on_lxd(test: Test) {
    travel_as_they_are(test, "l1", "l2").await;
}

/// Moves an instance with keys that the target does not know.
async fn leaves_out(test: Test, from: &str, to: &str, config: &[(&str, &str)], stays: (&str, &str)) {
    let keys = [config, &[stays]].concat();
    let (name, source) = placed(&test, &[from, to], &with(&keys)).await;
    let checksum = source.checksum(&name, "/root/data").await;
    let listed = dropped(&test, &name, to).await;
    for (key, _) in config {
        assert!(listed.iter().any(|k| k == key), "{key} is not in {listed:?}");
    }
    as_declared(&test, &name, to).await;
    let target = test.lab().server(to);
    let moved = instance(target, &name).await;
    for (key, _) in config {
        assert_eq!(moved["config"].get(*key), None, "{key}");
    }
    assert_eq!(moved["config"][stays.0], stays.1, "what it knows is kept");
    assert_eq!(target.checksum(&name, "/root/data").await, checksum);
    target.wait_counting(&name).await;
    let moves = test.moves(&name).await;
    assert_eq!(moves.len(), 1, "it was known beforehand: {moves:#?}");
}

async fn keys_that_only_incus_knows_are_left_out_on_the_way_to_lxd(test: Test) {
    let keys = [
        ("security.guestapi", "false"),
        ("boot.autorestart", "true"),
        ("migration.stateful", "false"),
    ];
    leaves_out(test, "i1", "l1", &keys, ("limits.memory", "64MiB")).await;
}

async fn keys_that_only_lxd_knows_are_left_out_on_the_way_to_incus(test: Test) {
    leaves_out(
        test,
        "l1",
        "i1",
        &[("security.devlxd", "false")],
        ("limits.memory", "64MiB"),
    )
    .await;
}

async fn a_key_of_incus_7_is_left_out_on_the_way_to_incus_6(test: Test) {
    let keys = [
        ("security.protection.start", "false"),
        ("limits.memory.oom_priority", "0"),
    ];
    leaves_out(test, "t1", "i1", &keys, ("security.guestapi", "false")).await;
}

async fn snapshots_of_incus_cannot_go_to_lxd_and_excluding_them_mends_that(test: Test) {
    let new = NewInstance {
        snapshots: 2,
        ..with(&[])
    };
    let (name, source) = placed(&test, &["i2", "l2"], &new).await;
    test.retarget(&name, json!({"server": "l2"})).await;
    let blocker = refused(&test, &name, "SnapshotsCannotTravel").await;
    assert!(
        blocker["message"].as_str().is_some_and(|m| m.contains("s0, s1")),
        "{blocker}"
    );
    assert_eq!(source.boots(&name).await, 1, "it was not stopped");
    assert!(test.moves(&name).await.is_empty());
    // exactly as the fix says
    let fix = blocker["fix"].as_str().unwrap_or_default();
    let patch = fix.split('\'').nth(1).unwrap_or_default();
    let patch: Value = serde_json::from_str(patch).unwrap_or_else(|error| panic!("{fix}: {error}"));
    test.patch("InstancePlacement", &name, patch).await;
    test.wait_in_place(&name, "l2", SOON).await;
    let target = test.lab().server("l2");
    let path = format!("/1.0/instances/{name}/snapshots");
    assert_eq!(target.get(&path).await.unwrap_or_default(), json!([]));
    target.wait_counting(&name).await;
}

async fn attached_volume(test: Test, from: &str, to: &str) {
    let volume = test.unique("data");
    let (source, target) = (test.lab().server(from), test.lab().server(to));
    let path = "/1.0/storage-pools/default/volumes/custom";
    must(source, "POST", path, json!({"name": volume, "type": "custom"})).await;
    let disk = json!({"data": {"type": "disk", "pool": "default", "source": volume, "path": "/srv"}});
    let new = NewInstance {
        devices: disk,
        ..with(&[])
    };
    let (name, _) = placed(&test, &[from, to], &new).await;
    test.retarget(&name, json!({"server": to})).await;
    let blocker = refused(&test, &name, "VolumeNotFound").await;
    assert!(
        blocker["message"].as_str().is_some_and(|m| m.contains(&volume)),
        "{blocker}"
    );
    assert_eq!(source.boots(&name).await, 1, "it was not stopped");
    must(target, "POST", path, json!({"name": volume, "type": "custom"})).await;
    // nothing tells of a new volume: the next look finds it
    test.ask_again("InstancePlacement", &name, "now").await;
    test.wait_in_place(&name, to, SOON).await;
    let moved = instance(target, &name).await;
    assert_eq!(moved["devices"]["data"]["source"], volume);
    target.wait_counting(&name).await;
    test.delete("InstancePlacement", &name).await;
    target.delete(&name).await.unwrap_or_else(|error| panic!("{error}"));
    for server in [source, target] {
        must(server, "DELETE", &format!("{path}/{volume}"), Value::Null).await;
    }
}

async fn an_attached_volume_must_be_at_the_target_on_incus(test: Test) {
    attached_volume(test, "i1", "i2").await;
}

async fn an_attached_volume_must_be_at_the_target_on_lxd(test: Test) {
    attached_volume(test, "l1", "l2").await;
}

/// Makes a backup that the server keeps.
pub async fn back_up(server: &Server, name: &str) {
    let path = format!("/1.0/instances/{name}/backups");
    must(
        server,
        "POST",
        &path,
        json!({"name": "b0", "compression_algorithm": "none"}),
    )
    .await;
}

async fn backups_stay_behind_between_servers_and_are_listed(test: Test) {
    let (name, source) = placed(&test, &["i1", "i2"], &with(&[])).await;
    back_up(source, &name).await;
    let listed = dropped(&test, &name, "i2").await;
    assert_eq!(listed, ["backup b0"]);
    as_declared(&test, &name, "i2").await;
    wait_for("the source to go", SOON, || async {
        match source.status(&name).await.as_str() {
            "absent" => Ok(()),
            other => Err(other.to_owned()),
        }
    })
    .await;
}
