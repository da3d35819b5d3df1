//! What a placement declares of an instance's configuration: kept so where the instance is, at once or after a stop, and
//! carried along when it moves. What is not declared is left alone.

use berth_tests::{NewInstance, Placement, SOON, Server, Test, condition, reason, wait_for, wait_until};
use serde_json::{Value, json};

use road::{intact, subject, with_data};

mod road;
#[path = "overrides/travel.rs"]
mod travel;

berth_tests::suite! {
    needs: [Kube, Lab],
    side_by_side: 8,
    together: [
        what_is_declared_is_kept_so_without_a_stop_and_the_rest_is_left_alone_on_incus,
        what_is_declared_is_kept_so_without_a_stop_and_the_rest_is_left_alone_on_lxd,
        profiles_are_kept_so_and_no_profiles_leaves_the_root_disk_on_incus,
        profiles_are_kept_so_and_no_profiles_leaves_the_root_disk_on_lxd,
        what_takes_effect_only_after_a_restart_restarts_the_instance_once_on_incus,
        what_takes_effect_only_after_a_restart_restarts_the_instance_once_on_lxd,
        an_instance_that_may_never_be_stopped_is_changed_when_somebody_else_stops_it,
        a_change_that_needs_a_stop_waits_for_the_window_while_the_others_do_not,
        a_value_that_the_server_refuses_is_reported_with_its_words_and_not_asked_for_again_and_again,
        a_value_that_is_refused_after_the_stop_is_undone_once_and_reported,
        a_controller_that_dies_while_it_restarts_an_instance_leaves_it_running_in_the_end,
        a_change_in_place_waits_for_its_approval_and_is_only_reported_in_mode_observe,
        travel::keys_devices_and_profiles_each_travel_with_a_move_on_incus,
        travel::keys_devices_and_profiles_each_travel_with_a_move_on_lxd,
        travel::removals_pool_and_project_each_travel_with_a_move_on_incus,
        travel::removals_pool_and_project_each_travel_with_a_move_on_lxd,
        travel::all_overrides_together_travel_with_a_move_on_incus,
        travel::all_overrides_together_travel_with_a_move_on_lxd,
        travel::overrides_come_with_a_move_inside_a_cluster,
    ],
    alone: [],
}

async fn override_with(test: &Test, name: &str, overrides: Value) {
    test.patch("InstancePlacement", name, json!({"spec": {"overrides": overrides}}))
        .await;
}

async fn show(server: &Server, name: &str) -> Value {
    server.instance(name).await.unwrap_or_else(|| panic!("{name} exists"))
}

/// Waits until the instance looks like that.
async fn looks(server: &Server, name: &str, what: &str, fits: impl Fn(&Value) -> bool) {
    wait_for(&format!("{name}: {what}"), SOON, || async {
        let instance = show(server, name).await;
        if fits(&instance) {
            Ok(())
        } else {
            Err(format!(
                "{} {} {}",
                instance["config"], instance["devices"], instance["profiles"]
            ))
        }
    })
    .await;
}

fn network(server: &Server) -> &'static str {
    match server.product {
        berth_tests::Product::Incus => "incusbr0",
        berth_tests::Product::Lxd => "lxdbr0",
    }
}

/// A profile for this test alone; the instances that use it are gone before it is.
async fn profile(test: &Test, server: &Server, name: &str, body: Value) -> String {
    let name = test.unique(name);
    let mut profile = body;
    profile["name"] = json!(name);
    let made = server.call("POST", "/1.0/profiles", profile).await;
    made.unwrap_or_else(|error| panic!("{error}"));
    name
}

async fn no_profile(server: &Server, name: &str, profile: &str) {
    server.delete(name).await.unwrap_or_else(|error| panic!("{error}"));
    let gone = server
        .call("DELETE", &format!("/1.0/profiles/{profile}"), Value::Null)
        .await;
    gone.unwrap_or_else(|error| panic!("{error}"));
}

//---------------------------------------------------------------- in place, without a stop

async fn kept(test: &Test, on: &str) {
    test.add_servers(&[on]).await;
    let new = NewInstance {
        config: vec![("user.mine".into(), "mine".into()), ("user.old".into(), "old".into())],
        ..with_data("default")
    };
    let web = subject(test, on, "web", &new).await;
    let server = test.lab().server(on);
    override_with(
        test,
        &web.name,
        json!({"config": {"limits.memory": "64MiB"}, "devices": {"eth0": {"boot.priority": "5"}}, "removeConfig": ["user.old"]}),
    )
    .await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, on, SOON).await;
    let as_declared = |i: &Value| {
        i["config"]["limits.memory"] == "64MiB"
            && i["config"].get("user.old").is_none()
            && i["devices"]["eth0"]["boot.priority"] == "5"
            && i["devices"]["eth0"]["network"] == network(server)
            && i["config"]["user.mine"] == "mine"
    };
    looks(server, &web.name, "as declared", as_declared).await;
    let by_hand = json!({"config": {"limits.memory": "32MiB", "user.old": "again", "user.new": "new"}});
    server.patch(&web.name, by_hand).await;
    looks(
        server,
        &web.name,
        "as declared again, and the rest as it was put",
        |i| as_declared(i) && i["config"]["user.new"] == "new",
    )
    .await;
    test.wait_in_place(&web.name, on, SOON).await;
    // what is not declared any more stays as it is; a device goes when that is said
    test.patch(
        "InstancePlacement",
        &web.name,
        json!({"spec": {"overrides": {"config": null, "devices": null, "removeDevices": ["eth0"]}}}),
    )
    .await;
    looks(server, &web.name, "without the device", |i| {
        i["devices"].get("eth0").is_none() && i["config"]["limits.memory"] == "64MiB"
    })
    .await;
    test.wait_in_place(&web.name, on, SOON).await;
    assert_eq!(server.boots(&web.name).await, 1, "it was never stopped");
    assert!(test.moves(&web.name).await.is_empty(), "that is no move");
}

async fn what_is_declared_is_kept_so_without_a_stop_and_the_rest_is_left_alone_on_incus(test: Test) {
    kept(&test, "i1").await;
}

async fn what_is_declared_is_kept_so_without_a_stop_and_the_rest_is_left_alone_on_lxd(test: Test) {
    kept(&test, "l1").await;
}

async fn profiles(test: &Test, on: &str) {
    test.add_servers(&[on]).await;
    let (server, name) = (test.lab().server(on), test.unique("web"));
    let gold = profile(test, server, "gold", json!({"config": {"user.tier": "gold"}})).await;
    let image = format!("{on}:bb");
    let made = match server.product {
        berth_tests::Product::Incus => test.lab().incus(&["launch", &image, &format!("{on}:{name}")]).await,
        berth_tests::Product::Lxd => test.lab().lxc(&["launch", &image, &format!("{on}:{name}")]).await,
    };
    made.unwrap_or_else(|error| panic!("{error}"));
    server.wait_counting(&name).await;
    let spec = json!({"overrides": {"profiles": ["default", gold]}});
    test.place(&Placement::new(&name, on).with(spec)).await;
    let _controller = test.controller().await;
    test.wait_in_place(&name, on, SOON).await;
    let instance = show(server, &name).await;
    assert_eq!(instance["profiles"], json!(["default", gold]));
    assert_eq!(instance["expanded_config"]["user.tier"], "gold");
    server.patch(&name, json!({"profiles": ["default"]})).await;
    looks(server, &name, "its profiles again", |i| {
        i["profiles"] == json!(["default", gold])
    })
    .await;
    test.patch(
        "InstancePlacement",
        &name,
        json!({"spec": {"overrides": {"profiles": null, "noProfiles": true}}}),
    )
    .await;
    looks(server, &name, "no profiles, its own root disk", |i| {
        i["profiles"] == json!([]) && i["devices"]["root"]["path"] == "/"
    })
    .await;
    test.wait_in_place(&name, on, SOON).await;
    assert_eq!(server.boots(&name).await, 1, "it was never stopped");
    assert!(test.moves(&name).await.is_empty(), "that is no move");
    no_profile(server, &name, &gold).await;
}

async fn profiles_are_kept_so_and_no_profiles_leaves_the_root_disk_on_incus(test: Test) {
    profiles(&test, "i1").await;
}

async fn profiles_are_kept_so_and_no_profiles_leaves_the_root_disk_on_lxd(test: Test) {
    profiles(&test, "l1").await;
}

//---------------------------------------------------------------- in place, with a stop

async fn restarted(test: &Test, on: &str) {
    test.add_servers(&[on]).await;
    let web = subject(test, on, "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, on, SOON).await;
    override_with(test, &web.name, json!({"config": {"environment.TEAM": "blue"}})).await;
    let server = test.lab().server(on);
    looks(server, &web.name, "as declared", |i| {
        i["config"]["environment.TEAM"] == "blue"
    })
    .await;
    intact(test, &web, on, 2..=2).await;
    let moves = test.moves(&web.name).await;
    assert_eq!(moves.len(), 1, "one restart: {moves:?}");
    assert_eq!(moves[0]["spec"]["transfer"], "Internal");
    assert_eq!(moves[0]["status"]["outcome"], "Succeeded");
    assert!(moves[0]["status"]["downtime"].is_string());
}

async fn what_takes_effect_only_after_a_restart_restarts_the_instance_once_on_incus(test: Test) {
    restarted(&test, "i1").await;
}

async fn what_takes_effect_only_after_a_restart_restarts_the_instance_once_on_lxd(test: Test) {
    restarted(&test, "l1").await;
}

async fn message(object: &Value) -> String {
    condition(object, "Ready")
        .map(|c| c["message"].as_str().unwrap_or_default().to_owned())
        .unwrap_or_default()
}

async fn an_instance_that_may_never_be_stopped_is_changed_when_somebody_else_stops_it(test: Test) {
    test.add_servers(&["i2"]).await;
    let web = subject(&test, "i2", "web", &with_data("default")).await;
    let spec = json!({"spec": {
        "methods": ["Live"], "overrides": {"config": {"environment.TEAM": "blue", "limits.memory": "64MiB"}},
    }});
    test.patch("InstancePlacement", &web.name, spec).await;
    let _controller = test.controller().await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/MethodImpossible", SOON)
        .await;
    let why = message(&object).await;
    assert!(why.contains("environment.TEAM") && why.contains("Cold"), "{why}");
    assert_eq!(object["status"]["plan"]["method"], "InPlace");
    assert_eq!(object["status"]["plan"]["blockers"][0]["reason"], "MethodImpossible");
    let server = test.lab().server("i2");
    let config = show(server, &web.name).await["config"].clone();
    assert_eq!(config["limits.memory"], "64MiB", "what needs no stop is done");
    assert_eq!(config.get("environment.TEAM"), None);
    assert_eq!(server.boots(&web.name).await, 1);
    server.set_state(&web.name, "stop").await;
    looks(server, &web.name, "changed while it is stopped", |i| {
        i["config"]["environment.TEAM"] == "blue"
    })
    .await;
    test.wait_in_place(&web.name, "i2", SOON).await;
    server.set_state(&web.name, "start").await;
    intact(&test, &web, "i2", 2..=2).await;
    assert!(test.moves(&web.name).await.is_empty());
}

/// A window that is not open for the next months.
fn far_window() -> Value {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    let month = (now.month() + 5) % 12 + 1;
    json!([{"schedule": format!("0 2 1 {month} *"), "duration": "1h"}])
}

async fn a_change_that_needs_a_stop_waits_for_the_window_while_the_others_do_not(test: Test) {
    test.add_servers(&["l2"]).await;
    let web = subject(&test, "l2", "web", &with_data("default")).await;
    let spec = json!({"spec": {
        "windows": far_window(), "overrides": {"config": {"environment.TEAM": "blue", "user.team": "blue"}},
    }});
    test.patch("InstancePlacement", &web.name, spec).await;
    let _controller = test.controller().await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/WaitingForWindow", SOON)
        .await;
    let why = message(&object).await;
    assert!(why.contains("environment.TEAM") && why.contains("opens at"), "{why}");
    assert_eq!(object["status"]["drift"], json!(["WrongConfig"]));
    let server = test.lab().server("l2");
    assert_eq!(show(server, &web.name).await["config"]["user.team"], "blue");
    assert_eq!(server.boots(&web.name).await, 1);
    test.patch("InstancePlacement", &web.name, json!({"spec": {"windows": null}}))
        .await;
    intact(&test, &web, "l2", 2..=2).await;
    assert_eq!(show(server, &web.name).await["config"]["environment.TEAM"], "blue");
}

async fn a_value_that_the_server_refuses_is_reported_with_its_words_and_not_asked_for_again_and_again(test: Test) {
    let lab = test.lab();
    let server = lab.server("i1");
    test.add_client_secret("berth-client").await;
    let proxy = berth_tests::Proxy::start(lab, server).await;
    test.add_server("i1", server, json!({"addresses": [proxy.url()]})).await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    override_with(&test, &web.name, json!({"config": {"limits.memory": "lots"}})).await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/TargetRefused", SOON)
        .await;
    let why = message(&object).await;
    assert!(
        why.contains("limits.memory") && why.contains("lots") && why.contains("tried again at"),
        "{why}"
    );
    // the time in the message is that of the next attempt
    test.wait_object("InstancePlacement", &web.name, "another attempt", SOON, |o| {
        reason(o) == "False/TargetRefused" && condition(o, "Ready") != condition(&object, "Ready")
    })
    .await;
    let asked = proxy.count(|seen| seen.method == "PUT" && seen.path.contains(&web.name));
    assert_eq!(asked, 2, "once, and once more when the time was there");
    override_with(&test, &web.name, json!({"config": {"limits.memory": "64MiB"}})).await;
    intact(&test, &web, "i1", 1..=1).await;
}

async fn a_value_that_is_refused_after_the_stop_is_undone_once_and_reported(test: Test) {
    test.add_servers(&["i1"]).await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    override_with(
        &test,
        &web.name,
        json!({"config": {"security.syscalls.deny_compat": "perhaps"}}),
    )
    .await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/TargetRefused", SOON)
        .await;
    assert!(message(&object).await.contains("perhaps"), "{}", message(&object).await);
    let server = test.lab().server("i1");
    server.wait_counting(&web.name).await;
    assert_eq!(server.boots(&web.name).await, 2, "started again");
    assert_eq!(test.moves(&web.name).await.len(), 1, "and not stopped again");
    override_with(
        &test,
        &web.name,
        json!({"config": {"security.syscalls.deny_compat": "true"}}),
    )
    .await;
    intact(&test, &web, "i1", 3..=3).await;
}

async fn a_controller_that_dies_while_it_restarts_an_instance_leaves_it_running_in_the_end(test: Test) {
    test.add_servers(&["i2"]).await;
    let stubborn = NewInstance {
        ignore_stop: true,
        ..with_data("default")
    };
    let web = subject(&test, "i2", "web", &stubborn).await;
    let first = test.controller().await;
    test.wait_in_place(&web.name, "i2", SOON).await;
    let spec = json!({"spec": {
        "stop": {"timeout": "5s", "force": true}, "overrides": {"config": {"environment.TEAM": "blue"}},
    }});
    test.patch("InstancePlacement", &web.name, spec).await;
    wait_until("the stop to be asked for", SOON, || async {
        let moves = test.moves(&web.name).await;
        moves.iter().any(|m| m["status"]["stopRequestedAt"].is_string())
    })
    .await;
    first.kill().await;
    let server = test.lab().server("i2");
    // the guest is made to go down as if the request had been carried out by a dead controller
    let _ = server.try_state(&web.name, "stop").await;
    let _second = test.controller().await;
    looks(server, &web.name, "as declared", |i| {
        i["config"]["environment.TEAM"] == "blue"
    })
    .await;
    intact(&test, &web, "i2", 2..=2).await;
}

async fn a_change_in_place_waits_for_its_approval_and_is_only_reported_in_mode_observe(test: Test) {
    test.add_servers(&["i1"]).await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let spec = json!({"spec": {"mode": "Observe", "overrides": {"config": {"user.team": "blue"}}}});
    test.patch("InstancePlacement", &web.name, spec).await;
    let _controller = test.controller().await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/DriftObserved", SOON)
        .await;
    assert_eq!(object["status"]["drift"], json!(["WrongConfig"]));
    let server = test.lab().server("i1");
    let spec = json!({"spec": {"mode": "Enforce", "approval": "Manual"}});
    test.patch("InstancePlacement", &web.name, spec).await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/WaitingForApproval", SOON)
        .await;
    assert_eq!(show(server, &web.name).await["config"].get("user.team"), None);
    let digest = object["status"]["plan"]["digest"].clone();
    // another change is another plan: the approval of the first is worth nothing for it
    override_with(&test, &web.name, json!({"config": {"user.team": "red"}})).await;
    test.patch(
        "InstancePlacement",
        &web.name,
        json!({"metadata": {"annotations": {"berth.dev/approve": digest}}}),
    )
    .await;
    let object = test
        .wait_object("InstancePlacement", &web.name, "another digest", SOON, |o| {
            reason(o) == "False/WaitingForApproval" && o["status"]["plan"]["digest"] != digest
        })
        .await;
    let digest = &object["status"]["plan"]["digest"];
    test.patch(
        "InstancePlacement",
        &web.name,
        json!({"metadata": {"annotations": {"berth.dev/approve": digest}}}),
    )
    .await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    assert_eq!(show(server, &web.name).await["config"]["user.team"], "red");
    assert_eq!(server.boots(&web.name).await, 1);
}
