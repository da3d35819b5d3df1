//! Moves of real instances between real servers, as a user sees them: edit one field, look at the instance.

use berth_tests::{NewInstance, Placement, SOON, Server, Test, condition, reason};
use serde_json::{Value, json};

berth_tests::suite! {
    needs: [Kube, Lab],
    together: [
        a_running_container_moves_between_incus_servers_on_dir,
        a_running_container_with_snapshots_moves_between_incus_servers_on_dir,
        a_running_container_moves_between_incus_servers_on_btrfs,
        a_running_container_with_snapshots_moves_between_incus_servers_on_btrfs,
        a_running_container_with_snapshots_moves_between_lxd_servers_on_dir,
        a_running_container_with_snapshots_moves_between_lxd_servers_on_btrfs,
        a_running_container_with_snapshots_moves_from_lxd_to_incus,
        a_running_container_is_pushed,
        a_stopped_instance_moves_and_stays_stopped,
        a_stopped_instance_that_shall_run_is_started_where_it_arrives,
        a_running_instance_that_shall_be_stopped_is_stopped_where_it_is,
        an_instance_moves_to_a_member_and_to_a_group_of_a_cluster,
        an_instance_moves_into_a_cluster_onto_the_named_member,
        an_instance_is_renamed_and_moved_to_another_pool_on_its_way,
        what_berth_changes_on_the_way_is_as_before_when_the_move_is_over,
        overrides_travel_with_the_move,
        an_instance_whose_root_disk_comes_from_its_profile_moves_there_and_back,
    ],
    alone: [],
}

/// What must survive a move.
struct Before {
    uuid: Value,
    checksum: Option<String>,
    counter: u64,
    snapshots: Vec<(Value, i64)>,
    cloud_init: Value,
}

async fn before(server: &Server, name: &str) -> Before {
    let instance = server.instance(name).await.unwrap_or_else(|| panic!("{name} exists"));
    Before {
        uuid: instance["config"]["volatile.uuid"].clone(),
        checksum: server.checksum(name, "/root/data").await,
        counter: server.counter(name).await,
        snapshots: snapshots(server, name).await,
        cloud_init: instance["config"]["volatile.cloud-init.instance-id"].clone(),
    }
}

async fn snapshots(server: &Server, name: &str) -> Vec<(Value, i64)> {
    let path = format!("/1.0/instances/{name}/snapshots?recursion=1");
    let list = server.get(&path).await.unwrap_or_else(|e| panic!("{e}"));
    let seconds = |s: &Value| {
        let time: Result<jiff::Timestamp, _> = s["created_at"].as_str().unwrap_or_default().parse();
        time.map(jiff::Timestamp::as_second).unwrap_or_default()
    };
    list.as_array()
        .into_iter()
        .flatten()
        .map(|s| (s["name"].clone(), seconds(s)))
        .collect()
}

/// The instance is the same one, one boot further, and nothing of Berth is left on it.
async fn same_instance(server: &Server, name: &str, before: &Before, boots: usize) {
    let instance = server.instance(name).await.unwrap_or_else(|| panic!("{name} arrived"));
    assert_eq!(instance["config"]["volatile.uuid"], before.uuid, "the same identity");
    assert_eq!(
        server.checksum(name, "/root/data").await,
        before.checksum,
        "the same data"
    );
    assert_eq!(snapshots(server, name).await, before.snapshots, "the same snapshots");
    assert_eq!(
        instance["config"]["volatile.cloud-init.instance-id"], before.cloud_init,
        "cloud-init does not run again"
    );
    assert_eq!(server.boots(name).await, boots, "it was started once");
    assert!(server.counter(name).await >= before.counter, "its counter went on");
    nothing_left(&instance);
}

fn nothing_left(instance: &Value) {
    let config = instance["config"].as_object().cloned().unwrap_or_default();
    let left: Vec<&String> = config.keys().filter(|k| k.contains("berth")).collect();
    assert!(left.is_empty(), "marks are left: {left:?}");
    assert!(instance["devices"].get("berth-guard").is_none(), "the guard is left");
    assert_eq!(config.get("boot.autostart"), None, "boot.autostart is as before");
    assert_eq!(config.get("security.protection.delete"), None);
}

/// Moves a running instance from one server to another and looks at everything that a user would look at.
async fn moves(test: &Test, from: &str, to: &str, new: &NewInstance, spec: Value) {
    let (source, target) = (test.lab().server(from), test.lab().server(to));
    let name = test.unique("web");
    source.create(&name, new).await;
    let before = before(source, &name).await;
    test.add_servers(&[from, to]).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&name, from).with(spec)).await;
    test.wait_in_place(&name, from, SOON).await;
    test.retarget(&name, json!({"server": to})).await;
    let placement = test.wait_in_place(&name, to, SOON).await;
    target.wait_counting(&name).await;
    same_instance(target, &name, &before, 2).await;
    assert_eq!(
        test.lab().whereabouts(&name).await,
        [(to.to_owned(), "Running".to_owned())],
        "the source is gone"
    );
    let moves = test.moves(&name).await;
    assert_eq!(moves.len(), 1, "{moves:#?}");
    assert_eq!(moves[0]["status"]["outcome"], "Succeeded");
    assert_eq!(reason(&moves[0]), "True/Succeeded", "{}", moves[0]["status"]);
    assert_eq!(condition(&moves[0], "Reconciling"), None, "it is over");
    assert_eq!(
        moves[0]["status"]["observedGeneration"],
        moves[0]["metadata"]["generation"]
    );
    assert!(moves[0]["status"]["downtime"].is_string(), "the downtime was measured");
    assert_eq!(moves[0]["metadata"].get("finalizers"), None, "nothing holds the record");
    assert_eq!(
        placement["metadata"].get("finalizers"),
        None,
        "nothing holds the placement"
    );
    assert_eq!(placement["status"]["moves"][0]["outcome"], "Succeeded");
}

fn sized(pool: &str, snapshots: usize) -> NewInstance {
    NewInstance {
        megabytes: 4,
        snapshots,
        ..NewInstance::on_pool(pool)
    }
}

async fn a_running_container_moves_between_incus_servers_on_dir(test: Test) {
    moves(&test, "i1", "i2", &sized("default", 0), json!({})).await;
}

async fn a_running_container_with_snapshots_moves_between_incus_servers_on_dir(test: Test) {
    moves(&test, "i1", "i2", &sized("default", 2), json!({})).await;
}

async fn a_running_container_moves_between_incus_servers_on_btrfs(test: Test) {
    moves(&test, "i1", "i2", &sized("btr", 0), json!({})).await;
}

async fn a_running_container_with_snapshots_moves_between_incus_servers_on_btrfs(test: Test) {
    moves(&test, "i2", "i1", &sized("btr", 2), json!({})).await;
}

async fn a_running_container_with_snapshots_moves_between_lxd_servers_on_dir(test: Test) {
    moves(&test, "l1", "l2", &sized("default", 2), json!({})).await;
}

async fn a_running_container_with_snapshots_moves_between_lxd_servers_on_btrfs(test: Test) {
    moves(&test, "l2", "l1", &sized("btr", 2), json!({})).await;
}

async fn a_running_container_with_snapshots_moves_from_lxd_to_incus(test: Test) {
    moves(&test, "l1", "i1", &sized("btr", 2), json!({})).await;
}

async fn a_running_container_is_pushed(test: Test) {
    moves(&test, "i1", "i2", &sized("default", 1), json!({"transfer": "Push"})).await;
}

async fn a_stopped_instance_moves_and_stays_stopped(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("i2"));
    let name = test.unique("web");
    source
        .create(
            &name,
            &NewInstance {
                start: false,
                ..sized("default", 1)
            },
        )
        .await;
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&name, "i2")).await;
    test.wait_in_place(&name, "i2", SOON).await;
    assert_eq!(target.status(&name).await, "Stopped");
    assert_eq!(source.status(&name).await, "absent");
}

async fn a_stopped_instance_that_shall_run_is_started_where_it_arrives(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("i2"));
    let name = test.unique("web");
    source
        .create(
            &name,
            &NewInstance {
                start: false,
                ..sized("default", 0)
            },
        )
        .await;
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&name, "i2").with(json!({"powerState": "Running"})))
        .await;
    test.wait_in_place(&name, "i2", SOON).await;
    assert_eq!(target.status(&name).await, "Running");
}

async fn a_running_instance_that_shall_be_stopped_is_stopped_where_it_is(test: Test) {
    let server = test.lab().server("i1");
    let name = test.unique("web");
    server.create(&name, &NewInstance::default()).await;
    test.add_servers(&["i1"]).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&name, "i1").with(json!({"powerState": "Stopped"})))
        .await;
    test.wait_in_place(&name, "i1", SOON).await;
    assert_eq!(server.status(&name).await, "Stopped");
    assert!(test.moves(&name).await.is_empty(), "that is no move");
}

async fn an_instance_moves_to_a_member_and_to_a_group_of_a_cluster(test: Test) {
    let cluster = test.lab().server("m1");
    let name = test.unique("web");
    let group = test.unique("ssd");
    cluster
        .create(
            &name,
            &NewInstance {
                member: Some("m1".into()),
                ..sized("default", 0)
            },
        )
        .await;
    let before = before(cluster, &name).await;
    let made = cluster
        .call("POST", "/1.0/cluster/groups", json!({"name": group, "members": ["m3"]}))
        .await;
    made.unwrap_or_else(|e| panic!("{e}"));
    test.add_servers(&["m1"]).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&name, "m1").with(json!({"target": {"member": "m2"}})))
        .await;
    let placed = test.wait_in_place(&name, "m1", SOON).await;
    assert_eq!(placed["status"]["location"]["member"], "m2");
    test.retarget(&name, json!({"member": null, "group": group})).await;
    let placed = test.wait_in_place(&name, "m1", SOON).await;
    assert_eq!(placed["status"]["location"]["member"], "m3");
    cluster.wait_counting(&name).await;
    same_instance(cluster, &name, &before, 3).await;
    test.delete("InstancePlacement", &name).await;
    cluster.delete(&name).await.unwrap_or_else(|e| panic!("{e}"));
    let path = format!("/1.0/cluster/groups/{group}");
    for (path, body) in [(path.as_str(), json!({"members": []}))] {
        cluster.call("PUT", path, body).await.unwrap_or_else(|e| panic!("{e}"));
        cluster
            .call("DELETE", path, Value::Null)
            .await
            .unwrap_or_else(|e| panic!("{e}"));
    }
}

async fn an_instance_moves_into_a_cluster_onto_the_named_member(test: Test) {
    let (source, cluster) = (test.lab().server("i1"), test.lab().server("m1"));
    let name = test.unique("web");
    // its NIC comes from the profile, and the cluster's profile has none
    source.create(&name, &sized("default", 1)).await;
    let before = before(source, &name).await;
    test.add_servers(&["i1", "m1"]).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&name, "m1").with(json!({"target": {"member": "m3"}})))
        .await;
    let placed = test.wait_in_place(&name, "m1", SOON).await;
    assert_eq!(placed["status"]["location"]["member"], "m3");
    same_instance(cluster, &name, &before, 2).await;
}

async fn an_instance_is_renamed_and_moved_to_another_pool_on_its_way(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("i2"));
    let (name, new_name) = (test.unique("web"), test.unique("shop"));
    source.create(&name, &sized("default", 1)).await;
    let before = before(source, &name).await;
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    let to = json!({"target": {"name": new_name, "pool": "btr"}});
    test.place(&Placement::new(&name, "i2").with(to)).await;
    let placed = test.wait_in_place(&name, "i2", SOON).await;
    assert_eq!(placed["status"]["location"]["pool"], "btr");
    assert_eq!(placed["status"]["location"]["name"], json!(new_name));
    same_instance(target, &new_name, &before, 2).await;
}

async fn what_berth_changes_on_the_way_is_as_before_when_the_move_is_over(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("i2"));
    let name = test.unique("web");
    let config = [("boot.autostart", "true"), ("security.protection.delete", "true")];
    let config = config.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec();
    source
        .create(
            &name,
            &NewInstance {
                config,
                ..sized("default", 0)
            },
        )
        .await;
    source.patch(&name, json!({"ephemeral": true})).await;
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&name, "i2")).await;
    test.wait_in_place(&name, "i2", SOON).await;
    let instance = target.instance(&name).await.unwrap_or_else(|| panic!("{name} arrived"));
    assert_eq!(instance["config"]["boot.autostart"], "true");
    assert_eq!(instance["config"]["security.protection.delete"], "true");
    assert_eq!(instance["ephemeral"], true);
    assert_eq!(
        source.status(&name).await,
        "absent",
        "protection does not keep the former source"
    );
    target
        .patch(&name, json!({"config": {"security.protection.delete": ""}}))
        .await;
}

async fn overrides_travel_with_the_move(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("i2"));
    let name = test.unique("web");
    source.create(&name, &sized("default", 0)).await;
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    let spec = json!({"overrides": {"config": {"user.team": "blue"}, "devices": {"eth0": {"type": "none"}}}});
    test.place(&Placement::new(&name, "i2").with(spec)).await;
    let placed = test.wait_in_place(&name, "i2", SOON).await;
    assert_eq!(reason(&placed), "True/InPlace");
    let instance = target.instance(&name).await.unwrap_or_else(|| panic!("{name} arrived"));
    assert_eq!(instance["config"]["user.team"], "blue");
    assert_eq!(instance["devices"]["eth0"], json!({"type": "none"}));
}

async fn an_instance_whose_root_disk_comes_from_its_profile_moves_there_and_back(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("i2"));
    let name = test.unique("web");
    let made = test.lab().incus(&["launch", "i1:bb", &format!("i1:{name}")]).await;
    made.unwrap_or_else(|e| panic!("{e}"));
    source.wait_counting(&name).await;
    let before = before(source, &name).await;
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&name, "i2")).await;
    test.wait_in_place(&name, "i2", SOON).await;
    same_instance(target, &name, &before, 2).await;
    test.retarget(&name, json!({"server": "i1"})).await;
    test.wait_in_place(&name, "i1", SOON).await;
    same_instance(source, &name, &before, 3).await;
}
