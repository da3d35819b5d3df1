//! What stands against a move is said before anything is touched, everything at once; the fix of each is pasted, and then
//! the instance moves.

use berth_tests::{NewInstance, SOON, Server, Test, wait_for};
use serde_json::{Value, json};

use road::{Subject, intact, known, subject, with_data};

mod road;

berth_tests::suite! {
    needs: [Kube, Lab],
    side_by_side: 6,
    together: [
        devices_of_the_host_are_refused_and_the_fix_takes_them_off,
        a_bridge_that_only_the_source_has_is_refused_and_the_fix_takes_the_interface_off_on_incus,
        a_bridge_that_only_the_source_has_is_refused_and_the_fix_takes_the_interface_off_on_lxd,
        a_project_with_limits_is_refused_and_the_fix_lifts_them,
        a_project_with_limits_on_the_same_server_is_refused_and_the_fix_lifts_them,
        a_profile_of_one_name_that_differs_is_a_note_in_the_plan,
        everything_that_stands_against_a_move_is_said_at_once,
        a_pool_with_too_little_room_is_refused_before_the_stop_and_the_fix_takes_another,
    ],
    alone: [
        a_device_of_the_host_does_not_go_to_another_member_of_the_cluster,
    ],
}

/// The placement once it is refused, and its blockers; nothing was touched.
async fn refused(test: &Test, web: &Subject, home: &str, why: &str) -> (Value, Vec<Value>) {
    let ready = format!("False/{why}");
    let object = test.wait_ready("InstancePlacement", &web.name, &ready, SOON).await;
    let blockers = object["status"]["plan"]["blockers"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    for blocker in &blockers {
        assert!(blocker["message"].as_str().is_some_and(|m| !m.is_empty()), "{blocker}");
    }
    assert!(test.moves(&web.name).await.is_empty());
    let now = known(test.lab().server(home), &web.name).await;
    assert_eq!(now.uuid, web.uuid);
    assert_eq!(test.lab().server(home).boots(&web.name).await, 1);
    (object, blockers)
}

/// Types in the `kubectl patch …` that a fix begins with.
async fn paste(test: &Test, fix: &Value) {
    let fix = fix.as_str().unwrap_or_default();
    let quoted: Vec<&str> = fix.split('\'').collect();
    assert!(quoted.len() >= 2 && fix.starts_with("kubectl "), "{fix}");
    let mut args: Vec<&str> = quoted[0].split_whitespace().skip(1).collect();
    args.push(quoted[1]);
    let done = test.kube().kubectl(&args).await;
    done.unwrap_or_else(|error| panic!("{fix}: {error}"));
}

/// Types in the commands of a fix that begins with `on SERVER:`.
async fn paste_on(server: &Server, test: &Test, fix: &Value) {
    let fix = fix.as_str().unwrap_or_default();
    let (place, commands) = fix.split_once(": ").unwrap_or_default();
    assert_eq!(place, format!("on {}", server.name), "{fix}");
    let commands = commands.split_once(", or ").map_or(commands, |(commands, _)| commands);
    for command in commands.split("; ") {
        let mut args: Vec<String> = command.split_whitespace().skip(1).map(str::to_owned).collect();
        // the test's client knows the servers by remotes
        args[2] = format!("{}:{}", server.name, args[2]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let done = match server.product {
            berth_tests::Product::Incus => test.lab().incus(&args).await,
            berth_tests::Product::Lxd => test.lab().lxc(&args).await,
        };
        done.unwrap_or_else(|error| panic!("{command}: {error}"));
    }
}

async fn devices_of_the_host_are_refused_and_the_fix_takes_them_off(test: Test) {
    test.add_servers(&["i1", "i2"]).await;
    let new = NewInstance {
        devices: json!({
            "data": {"type": "disk", "source": "/tmp", "path": "/mnt/data"},
            "serial": {"type": "unix-char", "source": "/dev/ptmx", "path": "/dev/serial0"},
            "zero": {"type": "unix-char", "source": "/dev/zero", "path": "/dev/zero2"},
        }),
        ..with_data("default")
    };
    let web = subject(&test, "i1", "web", &new).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    test.retarget(&web.name, json!({"server": "i2"})).await;
    let (_, blockers) = refused(&test, &web, "i1", "HostDevice").await;
    assert_eq!(blockers.len(), 1, "all devices in one patch: {blockers:?}");
    let message = blockers[0]["message"].as_str().unwrap_or_default();
    assert!(
        message.contains("data (path /tmp)") && message.contains("serial") && !message.contains("zero"),
        "{message}"
    );
    paste(&test, &blockers[0]["fix"]).await;
    intact(&test, &web, "i2", 2..=2).await;
    let devices = test.lab().server("i2").instance(&web.name).await.unwrap_or_default()["devices"].clone();
    assert!(
        devices.get("data").is_none() && devices.get("zero").is_some(),
        "{devices}"
    );
}

/// An interface of the host, as somebody with a bridge of his own has it.
async fn own_bridge(test: &Test, from: &str, to: &str) {
    let (source, bridge) = (test.lab().server(from), test.unique("b").replace('-', ""));
    let made = source
        .call(
            "POST",
            "/1.0/networks",
            json!({"name": bridge, "type": "bridge", "config": {"ipv4.address": "none", "ipv6.address": "none"}}),
        )
        .await;
    made.unwrap_or_else(|error| panic!("{bridge}: {error}"));
    test.add_servers(&[from, to]).await;
    let new = NewInstance {
        devices: json!({"eth1": {"type": "nic", "nictype": "bridged", "parent": bridge, "name": "eth1"}}),
        ..with_data("default")
    };
    let web = subject(test, from, "web", &new).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, from, SOON).await;
    test.retarget(&web.name, json!({"server": to})).await;
    let (_, blockers) = refused(test, &web, from, "HostDevice").await;
    assert!(blockers[0]["message"].to_string().contains(&bridge), "{blockers:?}");
    paste(test, &blockers[0]["fix"]).await;
    intact(test, &web, to, 2..=2).await;
    // the only network of the target has an interface of the instance already
    let instance = test.lab().server(to).instance(&web.name).await.unwrap_or_default();
    assert!(instance["devices"].get("eth1").is_none(), "{}", instance["devices"]);
    // Incus stumbles over an interface that vanishes as it looks for those of the bridge
    let path = format!("/1.0/networks/{bridge}");
    wait_for("the bridge to be deleted", SOON, || async {
        let gone = source.call("DELETE", &path, Value::Null).await;
        gone.map(drop).map_err(|error| error.to_string())
    })
    .await;
}

async fn a_bridge_that_only_the_source_has_is_refused_and_the_fix_takes_the_interface_off_on_incus(test: Test) {
    own_bridge(&test, "i1", "i2").await;
}

async fn a_bridge_that_only_the_source_has_is_refused_and_the_fix_takes_the_interface_off_on_lxd(test: Test) {
    own_bridge(&test, "l1", "l2").await;
}

/// A project of this test alone with such limits.
async fn limited(test: &Test, server: &Server, limits: Value) -> String {
    let (name, mut config) = (test.unique("shop"), limits);
    for feature in ["features.profiles", "features.images"] {
        config[feature] = json!("false");
    }
    let made = server
        .call("POST", "/1.0/projects", json!({"name": name, "config": config}))
        .await;
    made.unwrap_or_else(|error| panic!("{error}"));
    name
}

/// In the project, running, the same one; then it and the project are taken away.
async fn arrived(test: &Test, web: &Subject, server: &Server, project: &str) {
    test.wait_in_place(&web.name, &server.name, SOON).await;
    let there = server.instance_in(&web.name, project).await.unwrap_or_default();
    assert_eq!(
        (&there["config"]["volatile.uuid"], &there["status"]),
        (&web.uuid, &json!("Running"))
    );
    test.delete("InstancePlacement", &web.name).await;
    server.delete_with_project(&web.name, project).await;
}

async fn with_limits(test: &Test, from: &str, to: &str) {
    let both = [from, to];
    test.add_servers(if from == to { &both[..1] } else { &both }).await;
    let target = test.lab().server(to);
    let shop = limited(test, target, json!({"limits.instances": "9", "limits.memory": "1GiB"})).await;
    let web = subject(test, from, "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, from, SOON).await;
    test.retarget(&web.name, json!({"server": to, "project": shop})).await;
    let (_, blockers) = refused(test, &web, from, "ProjectRestricted").await;
    assert_eq!(blockers.len(), 1, "{blockers:?}");
    paste_on(target, test, &blockers[0]["fix"]).await;
    arrived(test, &web, target, &shop).await;
}

async fn a_project_with_limits_is_refused_and_the_fix_lifts_them(test: Test) {
    with_limits(&test, "l2", "l1").await;
}

async fn a_project_with_limits_on_the_same_server_is_refused_and_the_fix_lifts_them(test: Test) {
    with_limits(&test, "i1", "i1").await;
}

async fn a_profile_of_one_name_that_differs_is_a_note_in_the_plan(test: Test) {
    test.add_servers(&["i1", "i2"]).await;
    let (one, other, gold) = (test.lab().server("i1"), test.lab().server("i2"), test.unique("gold"));
    for (server, tier) in [(one, "gold"), (other, "silver")] {
        let profile = json!({"name": gold, "config": {"user.tier": tier}});
        let made = server.call("POST", "/1.0/profiles", profile).await;
        made.unwrap_or_else(|error| panic!("{error}"));
    }
    let new = NewInstance {
        profiles: vec!["default".into(), gold.clone()],
        ..with_data("default")
    };
    let web = subject(&test, "i1", "web", &new).await;
    let _controller = test.controller().await;
    let spec = json!({"spec": {"approval": "Manual", "target": {"server": "i2"}}});
    test.patch("InstancePlacement", &web.name, spec).await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/WaitingForApproval", SOON)
        .await;
    let notes = object["status"]["plan"]["notes"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let differs = |n: &&Value| n["reason"] == "ProfileDiffers" && n["message"].to_string().contains(&gold);
    let note = notes.iter().find(differs).unwrap_or_else(|| panic!("{notes:?}"));
    assert!(note["message"].to_string().contains("user.tier"), "{note}");
    test.patch("InstancePlacement", &web.name, json!({"spec": {"approval": "Auto"}}))
        .await;
    intact(&test, &web, "i2", 2..=2).await;
    test.delete("InstancePlacement", &web.name).await;
    other.delete(&web.name).await.unwrap_or_else(|error| panic!("{error}"));
    for server in [one, other] {
        let gone = server
            .call("DELETE", &format!("/1.0/profiles/{gold}"), Value::Null)
            .await;
        gone.unwrap_or_else(|error| panic!("{error}"));
    }
}

async fn everything_that_stands_against_a_move_is_said_at_once(test: Test) {
    test.add_servers(&["l1", "l2"]).await;
    let new = NewInstance {
        devices: json!({"data": {"type": "disk", "source": "/tmp", "path": "/mnt/data"}}),
        ..with_data("default")
    };
    let web = subject(&test, "l1", "web", &new).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "l1", SOON).await;
    test.patch("InstanceServer", "l2", json!({"spec": {"cordoned": true}}))
        .await;
    let spec = json!({
        "target": {"server": "l2", "pool": "nowhere", "member": "m9"},
        "overrides": {"profiles": ["nothing"], "config": {"security.privileged": "true"}, "devices": {"tape": {"path": "/x"}}},
    });
    test.patch("InstancePlacement", &web.name, json!({"spec": spec})).await;
    let (_, blockers) = refused(&test, &web, "l1", "TargetCordoned").await;
    let mut reasons: Vec<String> = blockers
        .iter()
        .map(|b| b["reason"].as_str().unwrap_or_default().to_owned())
        .collect();
    reasons.sort();
    let expected = [
        "HostDevice",
        "InvalidSpec",
        "InvalidSpec",
        "MemberNotFound",
        "PoolNotFound",
        "ProfileNotFound",
        "TargetCordoned",
    ];
    assert_eq!(reasons, expected, "{blockers:#?}");
    assert!(blockers.iter().all(|b| b["fix"].is_string()), "{blockers:#?}");
}

async fn a_device_of_the_host_does_not_go_to_another_member_of_the_cluster(test: Test) {
    test.add_servers(&["m1"]).await;
    let (cluster, name) = (test.lab().server("m1"), test.unique("web"));
    let new = NewInstance {
        member: Some("m1".into()),
        devices: json!({"data": {"type": "disk", "source": "/tmp", "path": "/mnt/data"}}),
        ..with_data("default")
    };
    cluster.create(&name, &new).await;
    let web = known(cluster, &name).await;
    let _controller = test.controller().await;
    let placement = berth_tests::Placement::new(&name, "m1").with(json!({"target": {"member": "m2"}}));
    test.place(&placement).await;
    let (_, blockers) = refused(&test, &web, "m1", "HostDevice").await;
    paste(&test, &blockers[0]["fix"]).await;
    intact(&test, &web, "m1", 2..=2).await;
    let instance = cluster.instance(&name).await.unwrap_or_default();
    assert_eq!(instance["location"], "m2");
    assert!(instance["devices"].get("data").is_none(), "{}", instance["devices"]);
}

async fn a_pool_with_too_little_room_is_refused_before_the_stop_and_the_fix_takes_another(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("i2"));
    let pool = test.unique("small");
    let body = json!({"name": pool, "driver": "btrfs", "config": {"size": "128MiB"}});
    let made = target.call("POST", "/1.0/storage-pools", body).await;
    made.unwrap_or_else(|error| panic!("{error}"));
    test.add_servers(&["i1", "i2"]).await;
    let new = NewInstance {
        megabytes: 140,
        ..NewInstance::on_pool("btr")
    };
    let web = subject(&test, "i1", "web", &new).await;
    // with a quota the server says how large it is, as soon as btrfs has counted
    let root = json!({"type": "disk", "path": "/", "pool": "btr", "size": "1GiB"});
    source.patch(&web.name, json!({"devices": {"root": root}})).await;
    let path = format!("/1.0/instances/{}/state", web.name);
    wait_for("its size to be known", SOON, || async {
        let state = source.get(&path).await.map_err(|error| error.to_string())?;
        let usage = state["disk"]["root"]["usage"].as_i64().unwrap_or_default();
        (usage > 128 << 20).then_some(()).ok_or(format!("{usage} bytes"))
    })
    .await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    test.retarget(&web.name, json!({"server": "i2", "pool": pool})).await;
    let (_, blockers) = refused(&test, &web, "i1", "InsufficientSpace").await;
    let message = blockers[0]["message"].as_str().unwrap_or_default();
    assert!(message.contains(&pool) && message.contains("MiB free"), "{message}");
    paste(&test, &blockers[0]["fix"]).await;
    intact(&test, &web, "i2", 2..=2).await;
    let gone = target
        .call("DELETE", &format!("/1.0/storage-pools/{pool}"), Value::Null)
        .await;
    gone.unwrap_or_else(|error| panic!("{error}"));
}
