//! What people do by hand to an instance that has a placement, and what Berth makes of it: it comes back, it is left alone,
//! or it is only reported, as the placement says.

use std::time::Duration;

use berth_tests::{NewInstance, Placement, Product, SOON, Server, Test, condition, reason};
use serde_json::{Value, json};

use road::{Subject, intact, known, subject, with_data};

mod road;

berth_tests::suite! {
    needs: [Kube, Lab],
    together: [
        an_instance_that_is_moved_away_by_hand_comes_back_on_incus,
        an_instance_that_is_moved_away_by_hand_comes_back_on_lxd,
        an_instance_that_was_moved_away_while_no_controller_ran_comes_back,
        an_instance_that_is_renamed_by_hand_gets_its_name_back_on_incus,
        an_instance_that_is_renamed_by_hand_gets_its_name_back_on_lxd,
        a_running_instance_that_was_renamed_while_no_controller_ran_gets_its_name_back,
        an_instance_that_shall_run_is_started_after_a_stop_by_hand_on_incus,
        an_instance_that_shall_run_is_started_after_a_stop_by_hand_on_lxd,
        an_instance_that_shall_be_stopped_is_stopped_after_a_start_by_hand,
        an_instance_whose_power_state_is_preserved_may_be_stopped_and_started_by_hand,
        an_instance_that_is_deleted_by_hand_is_reported_and_nothing_is_made_up_for_it,
        with_mode_observe_drift_is_only_reported,
        a_suspended_placement_moves_nothing_until_it_goes_on,
    ],
    alone: [
        an_evacuated_instance_is_left_alone_until_its_member_is_restored,
    ],
}

/// `incus move` or `lxc move`, as a person types it.
async fn move_by_hand(test: &Test, name: &str, from: &Server, to: &Server) {
    from.set_state(name, "stop").await;
    let (from, to) = (format!("{}:{name}", from.name), format!("{}:{name}", to.name));
    let done = match test.lab().server(from.split(':').next().unwrap_or_default()).product {
        Product::Incus => test.lab().incus(&["move", &from, &to]).await,
        Product::Lxd => test.lab().lxc(&["move", &from, &to]).await,
    };
    done.unwrap_or_else(|error| panic!("{error}"));
}

async fn moved_away(test: &Test, home: &str, away: &str) {
    test.add_servers(&[home, away]).await;
    let web = subject(test, home, "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, home, SOON).await;
    let (home, away) = (test.lab().server(home), test.lab().server(away));
    move_by_hand(test, &web.name, home, away).await;
    comes_back_stopped(test, &web, home, away).await;
    home.set_state(&web.name, "start").await;
    intact(test, &web, &home.name, 2..=2).await;
    assert_eq!(
        outcomes(test, &web.name).await,
        ["Succeeded"],
        "one move brought it back"
    );
}

/// Whoever moved it had to stop it, and it comes back as it was found: stopped.
async fn comes_back_stopped(test: &Test, web: &Subject, home: &Server, away: &Server) {
    let what = format!("{} back on {}", web.name, home.name);
    test.wait_object("InstancePlacement", &web.name, &what, SOON, |object| {
        reason(object) == "True/InPlace" && object["status"]["moves"][0]["outcome"] == "Succeeded"
    })
    .await;
    assert_eq!(home.status(&web.name).await, "Stopped", "back, as it was found");
    assert_eq!(away.status(&web.name).await, "absent");
}

async fn outcomes(test: &Test, placement: &str) -> Vec<String> {
    let moves = test.moves(placement).await;
    let outcome = |m: &Value| m["status"]["outcome"].as_str().unwrap_or("open").to_owned();
    moves.iter().map(outcome).collect()
}

async fn an_instance_that_is_moved_away_by_hand_comes_back_on_incus(test: Test) {
    moved_away(&test, "i1", "i2").await;
}

async fn an_instance_that_is_moved_away_by_hand_comes_back_on_lxd(test: Test) {
    moved_away(&test, "l1", "l2").await;
}

async fn an_instance_that_was_moved_away_while_no_controller_ran_comes_back(test: Test) {
    test.add_servers(&["i1", "i2"]).await;
    let web = subject(&test, "i2", "web", &with_data("btr")).await;
    let first = test.controller().await;
    test.wait_in_place(&web.name, "i2", SOON).await;
    first.kill().await;
    let (home, away) = (test.lab().server("i2"), test.lab().server("i1"));
    move_by_hand(&test, &web.name, home, away).await;
    away.set_state(&web.name, "start").await;
    away.wait_counting(&web.name).await;
    let _second = test.controller().await;
    // it ran where it was, so it runs where it belongs
    intact(&test, &web, "i2", 3..=3).await;
}

async fn renamed(test: &Test, server: &str, other: &str) {
    test.add_servers(&[server, other]).await;
    let web = subject(test, server, "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, server, SOON).await;
    let server = test.lab().server(server);
    let wrong = test.unique("wrong");
    server.set_state(&web.name, "stop").await;
    server.rename(&web.name, &wrong).await;
    test.wait_object("InstancePlacement", &web.name, "named as before", SOON, |object| {
        reason(object) == "True/InPlace" && object["status"]["moves"][0]["outcome"] == "Succeeded"
    })
    .await;
    assert_eq!(server.status(&wrong).await, "absent");
    assert_eq!(server.status(&web.name).await, "Stopped", "as it was found");
    let moves = test.moves(&web.name).await;
    assert_eq!(
        moves[0]["spec"]["transfer"], "Internal",
        "no data were moved for a name"
    );
    server.set_state(&web.name, "start").await;
    same_but_for_cloud_init(test, &web, server, 2).await;
}

/// Every rename by hand gives the instance a new cloud-init id; which one it had before nobody knows.
async fn same_but_for_cloud_init(test: &Test, web: &Subject, server: &Server, boots: usize) {
    server.wait_counting(&web.name).await;
    let now = known(server, &web.name).await;
    assert_eq!(now.uuid, web.uuid);
    intact(test, &now, &server.name, boots..=boots).await;
}

async fn an_instance_that_is_renamed_by_hand_gets_its_name_back_on_incus(test: Test) {
    renamed(&test, "i1", "i2").await;
}

async fn an_instance_that_is_renamed_by_hand_gets_its_name_back_on_lxd(test: Test) {
    renamed(&test, "l2", "l1").await;
}

async fn a_running_instance_that_was_renamed_while_no_controller_ran_gets_its_name_back(test: Test) {
    test.add_servers(&["i1"]).await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let first = test.controller().await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    first.kill().await;
    let (server, wrong) = (test.lab().server("i1"), test.unique("wrong"));
    server.set_state(&web.name, "stop").await;
    server.rename(&web.name, &wrong).await;
    server.set_state(&wrong, "start").await;
    server.wait_counting(&wrong).await;
    let _second = test.controller().await;
    test.wait_object("InstancePlacement", &web.name, "named as before", SOON, |object| {
        reason(object) == "True/InPlace" && object["status"]["moves"][0]["outcome"] == "Succeeded"
    })
    .await;
    same_but_for_cloud_init(&test, &web, server, 3).await;
}

async fn started_again(test: &Test, server: &str) {
    test.add_servers(&[server]).await;
    let web = subject(test, server, "web", &with_data("default")).await;
    test.patch(
        "InstancePlacement",
        &web.name,
        json!({"spec": {"powerState": "Running"}}),
    )
    .await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, server, SOON).await;
    test.lab().server(server).set_state(&web.name, "stop").await;
    intact(test, &web, server, 2..=2).await;
    assert!(test.moves(&web.name).await.is_empty(), "that is no move");
}

async fn an_instance_that_shall_run_is_started_after_a_stop_by_hand_on_incus(test: Test) {
    started_again(&test, "i2").await;
}

async fn an_instance_that_shall_run_is_started_after_a_stop_by_hand_on_lxd(test: Test) {
    started_again(&test, "l2").await;
}

async fn an_instance_that_shall_be_stopped_is_stopped_after_a_start_by_hand(test: Test) {
    test.add_servers(&["i1"]).await;
    let (server, name) = (test.lab().server("i1"), test.unique("web"));
    server
        .create(
            &name,
            &NewInstance {
                start: false,
                ..NewInstance::default()
            },
        )
        .await;
    test.place(&Placement::new(&name, "i1").with(json!({"powerState": "Stopped"})))
        .await;
    let _controller = test.controller().await;
    test.wait_in_place(&name, "i1", SOON).await;
    server.set_state(&name, "start").await;
    berth_tests::wait_until("it to be stopped again", SOON, || async {
        server.status(&name).await == "Stopped"
    })
    .await;
    test.wait_in_place(&name, "i1", SOON).await;
    assert!(test.moves(&name).await.is_empty(), "that is no move");
}

async fn an_instance_whose_power_state_is_preserved_may_be_stopped_and_started_by_hand(test: Test) {
    test.add_servers(&["i1"]).await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    let server = test.lab().server("i1");
    for (action, state, boots) in [("stop", "Stopped", 1), ("start", "Running", 2)] {
        server.set_state(&web.name, action).await;
        let what = format!("{state} and in place");
        test.wait_object("InstancePlacement", &web.name, &what, SOON, |object| {
            reason(object) == "True/InPlace" && object["status"]["instance"]["power"] == state
        })
        .await;
        assert_eq!(
            server.status(&web.name).await,
            state,
            "it was left as the person put it"
        );
        if state == "Running" {
            server.wait_counting(&web.name).await;
        }
        assert_eq!(server.boots(&web.name).await, boots, "nobody else started it");
    }
    assert!(test.moves(&web.name).await.is_empty());
}

async fn an_instance_that_is_deleted_by_hand_is_reported_and_nothing_is_made_up_for_it(test: Test) {
    test.add_servers(&["i1", "i2"]).await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    let server = test.lab().server("i1");
    server.delete(&web.name).await.unwrap_or_else(|error| panic!("{error}"));
    // another one of the same name is not the same instance
    server
        .create(
            &web.name,
            &NewInstance {
                start: false,
                ..NewInstance::default()
            },
        )
        .await;
    test.retarget(&web.name, json!({"server": "i2"})).await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/InstanceNotFound", SOON)
        .await;
    let uuid = web.uuid.as_str().unwrap_or_default();
    let message = condition(&object, "Ready")
        .map(|c| c["message"].to_string())
        .unwrap_or_default();
    assert!(message.contains(uuid), "it says which one is missing: {message}");
    assert_eq!(
        server.status(&web.name).await,
        "Stopped",
        "the other one was left alone"
    );
    assert!(test.moves(&web.name).await.is_empty());
}

async fn with_mode_observe_drift_is_only_reported(test: Test) {
    test.add_servers(&["i1", "i2"]).await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let observe = json!({"spec": {"mode": "Observe", "target": {"server": "i2"}}});
    test.patch("InstancePlacement", &web.name, observe).await;
    let _controller = test.controller().await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/DriftObserved", SOON)
        .await;
    assert_eq!(object["status"]["drift"], json!(["WrongServer"]));
    assert_eq!(object["status"]["plan"]["method"], "Cold", "what it would do");
    assert_eq!(object["status"]["plan"]["to"]["server"], "i2");
    assert!(condition(&object, "Stalled").is_none() && condition(&object, "Reconciling").is_none());
    let server = test.lab().server("i1");
    server.set_state(&web.name, "stop").await;
    test.wait_object(
        "InstancePlacement",
        &web.name,
        "stopped, still observed",
        SOON,
        |object| reason(object) == "False/DriftObserved" && object["status"]["instance"]["power"] == "Stopped",
    )
    .await;
    let shall_run = json!({"spec": {"powerState": "Running"}});
    test.patch("InstancePlacement", &web.name, shall_run).await;
    test.wait_object("InstancePlacement", &web.name, "power observed, too", SOON, |object| {
        reason(object) == "False/DriftObserved" && object["status"]["drift"] == json!(["WrongServer", "WrongPower"])
    })
    .await;
    assert_eq!(server.status(&web.name).await, "Stopped", "nothing was done about it");
    assert!(test.moves(&web.name).await.is_empty());
    test.patch("InstancePlacement", &web.name, json!({"spec": {"mode": "Enforce"}}))
        .await;
    intact(&test, &web, "i2", 2..=2).await;
}

async fn a_suspended_placement_moves_nothing_until_it_goes_on(test: Test) {
    test.add_servers(&["l1", "l2"]).await;
    let web = subject(&test, "l1", "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "l1", SOON).await;
    let suspend = json!({"spec": {"suspend": true, "target": {"server": "l2"}}});
    test.patch("InstancePlacement", &web.name, suspend).await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/Suspended", SOON)
        .await;
    assert_eq!(object["status"]["drift"], json!(["WrongServer"]));
    assert!(condition(&object, "Stalled").is_none(), "that is nobody's fault");
    assert!(test.moves(&web.name).await.is_empty());
    test.patch("InstancePlacement", &web.name, json!({"spec": {"suspend": false}}))
        .await;
    intact(&test, &web, "l2", 2..=2).await;
}

async fn member_state(cluster: &Server, member: &str, action: &str) {
    let path = format!("/1.0/cluster/members/{member}/state");
    let done = cluster.call("POST", &path, json!({"action": action})).await;
    done.unwrap_or_else(|error| panic!("{action} {member}: {error}"));
}

async fn an_evacuated_instance_is_left_alone_until_its_member_is_restored(test: Test) {
    let (cluster, name) = (test.lab().server("m1"), test.unique("web"));
    let on_second = NewInstance {
        member: Some("m2".into()),
        ..with_data("default")
    };
    cluster.create(&name, &on_second).await;
    let before = known(cluster, &name).await;
    test.add_servers(&["m1"]).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&name, "m1").with(json!({"target": {"member": "m2"}})))
        .await;
    test.wait_in_place(&name, "m1", Duration::from_secs(30)).await;
    member_state(cluster, "m2", "evacuate").await;
    let left_alone = async |what: &str| {
        test.wait_ready("InstancePlacement", &name, "False/ForeignOperation", SOON)
            .await;
        assert!(test.moves(&name).await.is_empty(), "{what}: nothing was begun");
    };
    left_alone("evacuated").await;
    let member = |instance: Option<Value>| instance.map(|i| i["location"].clone()).unwrap_or_default();
    let away = member(cluster.instance(&name).await);
    assert!(away != "m2" && !away.is_null(), "it was evacuated to {away}");
    // what is asked for meanwhile waits, too
    let other = if away == "m1" { "m3" } else { "m1" };
    test.retarget(&name, json!({"member": other})).await;
    left_alone("retargeted while evacuated").await;
    assert_eq!(
        member(cluster.instance(&name).await),
        away,
        "it was left where the operator put it"
    );
    member_state(cluster, "m2", "restore").await;
    test.wait_object(
        "InstancePlacement",
        &name,
        "in place after the restore",
        SOON,
        |object| reason(object) == "True/InPlace" && object["status"]["location"]["member"] == other,
    )
    .await;
    // Incus says that a member is back before it has started what it brings back there (v6.0.4
    // api_cluster_evacuation.go): a move that was planned in between is given up, since it is to run on
    let outcomes = outcomes(&test, &name).await;
    let (last, before_it) = outcomes.split_last().unwrap_or_else(|| panic!("it was moved"));
    assert_eq!(last, "Succeeded");
    assert!(before_it.iter().all(|o| o == "Undone"), "{outcomes:?}");
    // evacuation, restore and the move: four boots
    intact(&test, &before, "m1", 4..=4).await;
}
