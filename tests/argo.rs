//! From a Git commit to a moved instance with real Argo CD: application controller and repo server, the manifests of examples/argocd, and the health checks and actions of charts/berth/argocd.

use std::time::Duration;

use berth_api::{Reason, ReasonKind};
use berth_tests::{NewInstance, SOON, Test, argo_lua, reason, wait_for};
use serde_json::{Value, json};

use shop::Way;
use shop::argo::{App, SCRIPTS, Watch, state};

mod shop;

berth_tests::suite! {
    needs: [Kube, Lab, Argo],
    timeout: Duration::from_secs(300),
    side_by_side: 6,
    together: [
        a_commit_moves_an_instance_and_the_application_is_healthy_only_when_it_is_there,
        an_edit_in_the_cluster_is_taken_back_and_so_is_the_move,
        an_application_is_suspended_while_an_instance_waits_and_an_action_approves,
        an_application_is_degraded_when_a_placement_is_stalled_and_says_why,
        actions_suspend_resume_cancel_and_retry,
        every_script_passes_its_tests_in_the_engine_of_argo_cd,
        every_reason_has_its_health,
    ],
    alone: [],
}

fn placement(name: &str, server: &str, more: &str) -> String {
    Way::Argo.placement(name, server, more)
}

fn stopped() -> NewInstance {
    NewInstance {
        start: false,
        ..NewInstance::default()
    }
}

async fn a_commit_moves_an_instance_and_the_application_is_healthy_only_when_it_is_there(test: Test) {
    let name = test.unique("web");
    let (here, there) = (test.lab().server("i1"), test.lab().server("i2"));
    here.create(&name, &NewInstance::default()).await;
    let _controller = test.controller().await;
    let app = App::follow(&test, &placement(&name, "rack-a", "")).await;
    let watch = Watch::begin(&app.api, &app.name());
    app.wait(&app.shop.head().await, "Synced/Healthy").await;
    servers_came_first(&test, &name).await;

    app.shop.hold();
    let commit = app.commit("web to rack-b", &placement(&name, "rack-b", "")).await;
    app.shop.held().await;
    app.wait(&commit, "Synced/Progressing").await;
    wait_for("the message of the move", SOON, || async {
        let (_, message) = app.health("InstancePlacement", &name).await;
        let right = message.starts_with("Moving: ") && message.contains(" move to rack-b");
        if right { Ok(()) } else { Err(message) }
    })
    .await;
    app.shop.release().await;
    app.wait(&commit, "Synced/Healthy").await;
    // read after Healthy was seen: whatever is there now was there then
    let placed = test.get("InstancePlacement", &name).await.unwrap_or_default();
    assert_eq!(
        reason(&placed),
        "True/InPlace",
        "Healthy came too early: {:#}",
        placed["status"]
    );
    assert_eq!(there.status(&name).await, "Running");
    // neither a move nor a refresh makes a difference between Git and the cluster
    for how in ["normal", "hard"] {
        let before = app
            .api
            .get(&app.name())
            .await
            .map(|a| json!(a)["status"]["reconciledAt"].clone());
        let before = before.unwrap_or_default();
        // the time has the precision of a second
        wait_for("a look after the refresh", SOON, || async {
            app.refresh(how).await;
            let app = json!(app.api.get(&app.name()).await.map_err(|error| error.to_string())?);
            if app["status"]["reconciledAt"] == before {
                Err("none".to_owned())
            } else {
                Ok(())
            }
        })
        .await;
        let state = app.api.get(&app.name()).await.map(|a| state(&json!(a)));
        assert_eq!(state.unwrap_or_default(), "Synced/Healthy", "after a {how} refresh");
    }
    watch.end_without_a_difference_of_the_same_commit();
    let history = json!(app.api.get(&app.name()).await.unwrap_or_else(|e| panic!("{e}")))["status"]["history"].clone();
    assert_eq!(
        history.as_array().map(Vec::len),
        Some(2),
        "one sync per commit: {history:#}"
    );

    let boots = there.boots(&name).await;
    let other = placement("nobody", "rack-a", "  suspend: true\n");
    app.commit("web is not looked after any more", &other).await;
    wait_for("the placement to be pruned", SOON, || async {
        let object = test.get("InstancePlacement", &name).await;
        object.map_or(Ok(()), |object| Err(format!("{:#}", object["metadata"])))
    })
    .await;
    assert_eq!(there.status(&name).await, "Running", "the instance is left alone");
    assert_eq!(there.boots(&name).await, boots);
}

/// The second wave was applied when the first was healthy.
async fn servers_came_first(test: &Test, name: &str) {
    let placement = test.get("InstancePlacement", name).await.unwrap_or_default();
    let seconds = |time: &Value| -> i64 {
        let time: Result<jiff::Timestamp, _> = time.as_str().unwrap_or_default().parse();
        time.unwrap_or_else(|error| panic!("{error}")).as_second()
    };
    let applied = seconds(&placement["metadata"]["creationTimestamp"]);
    for server in test.list("InstanceServer").await {
        let ready = berth_tests::condition(&server, "Ready").cloned().unwrap_or_default();
        assert!(
            seconds(&ready["lastTransitionTime"]) <= applied,
            "{:#} before {applied}",
            server["status"]
        );
    }
}

async fn an_edit_in_the_cluster_is_taken_back_and_so_is_the_move(test: Test) {
    let name = test.unique("web");
    let here = test.lab().server("i1");
    here.create(&name, &NewInstance::default()).await;
    let _controller = test.controller().await;
    let app = App::follow(&test, &placement(&name, "rack-a", "")).await;
    app.wait(&app.shop.head().await, "Synced/Healthy").await;
    test.retarget(&name, json!({"server": "rack-b"})).await;
    // the edit, and Argo CD's own
    let healed =
        |p: &Value| p["spec"]["target"]["server"] == "rack-a" && p["metadata"]["generation"].as_i64() >= Some(3);
    test.wait_object("InstancePlacement", &name, "healed", SOON, healed)
        .await;
    test.wait_in_place(&name, "rack-a", SOON).await;
    app.wait(&app.shop.head().await, "Synced/Healthy").await;
    here.wait_counting(&name).await;
    let moves = test.moves(&name).await;
    assert!(moves.iter().all(|m| m["status"]["outcome"] == "Undone"), "{moves:#?}");
    assert_eq!(test.lab().whereabouts(&name).await.len(), 1);
}

async fn an_application_is_suspended_while_an_instance_waits_and_an_action_approves(test: Test) {
    let name = test.unique("web");
    test.lab().server("i1").create(&name, &stopped()).await;
    let _controller = test.controller().await;
    let app = App::follow(&test, &placement(&name, "rack-b", "  approval: Manual\n")).await;
    app.wait(&app.shop.head().await, "Synced/Suspended").await;
    let (_, message) = app.health("InstancePlacement", &name).await;
    assert!(message.starts_with("WaitingForApproval: "), "{message}");
    app.act("InstancePlacement", &name, "approve").await;
    app.wait(&app.shop.head().await, "Synced/Healthy").await;
    assert_eq!(test.lab().server("i2").status(&name).await, "Stopped");

    // 29 February 2028, three in the morning
    let closed = "  windows:\n  - {schedule: \"0 3 29 2 *\", duration: 1h}\n";
    let commit = app
        .commit("back, in its window", &placement(&name, "rack-a", closed))
        .await;
    app.wait(&commit, "Synced/Suspended").await;
    let (_, message) = app.health("InstancePlacement", &name).await;
    assert!(message.starts_with("WaitingForWindow: "), "{message}");
    let commit = app.commit("now", &placement(&name, "rack-a", "")).await;
    app.wait(&commit, "Synced/Healthy").await;
}

async fn an_application_is_degraded_when_a_placement_is_stalled_and_says_why(test: Test) {
    let name = test.unique("web");
    test.lab().server("i1").create(&name, &stopped()).await;
    let _controller = test.controller().await;
    let app = App::follow(&test, &placement(&name, "rack-a", "")).await;
    app.wait(&app.shop.head().await, "Synced/Healthy").await;
    let wrong = placement(&name, "rack-b", "").replace("rack-b}", "rack-b, pool: nowhere}");
    let commit = app.commit("to a pool that is not there", &wrong).await;
    app.wait(&commit, "Synced/Degraded").await;
    let (status, message) = app.health("InstancePlacement", &name).await;
    assert_eq!(status, "Degraded");
    assert!(
        message.starts_with("PoolNotFound: ") && message.contains("nowhere"),
        "{message}"
    );
    let commit = app.shop.revert().await;
    app.refresh("normal").await;
    app.wait(&commit, "Synced/Healthy").await;
    assert!(test.moves(&name).await.is_empty());
}

async fn actions_suspend_resume_cancel_and_retry(test: Test) {
    let name = test.unique("web");
    test.lab().server("i1").create(&name, &stopped()).await;
    let _controller = test.controller().await;
    let app = App::follow(&test, &placement(&name, "rack-a", "")).await;
    app.wait(&app.shop.head().await, "Synced/Healthy").await;
    for action in ["approve", "resume"] {
        let said = app.try_act("InstancePlacement", &name, action).await;
        assert!(said.is_err(), "{action} makes no sense now: {said:?}");
    }
    app.act("InstancePlacement", &name, "suspend").await;
    let commit = app.commit("web to rack-b", &placement(&name, "rack-b", "")).await;
    app.wait(&commit, "Synced/Suspended").await;
    assert!(test.moves(&name).await.is_empty());

    app.shop.hold();
    app.act("InstancePlacement", &name, "resume").await;
    app.shop.held().await;
    let moves = test.moves(&name).await;
    let moved = moves[0]["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    app.act("InstanceMove", &moved, "cancel").await;
    app.shop.release().await;
    app.wait(&commit, "Synced/Degraded").await;
    let (_, message) = app.health("InstancePlacement", &name).await;
    assert!(message.starts_with("MoveCancelled: "), "{message}");
    app.act("InstancePlacement", &name, "retry").await;
    app.wait(&commit, "Synced/Healthy").await;
    assert_eq!(test.lab().server("i2").status(&name).await, "Stopped");
    let said = app.try_act("InstanceMove", &moved, "cancel").await;
    assert!(said.is_err(), "a move that is over cannot be cancelled: {said:?}");

    app.act("InstanceServer", "rack-a", "cordon").await;
    test.wait_object("InstanceServer", "rack-a", "cordoned", SOON, |s| {
        s["spec"]["cordoned"] == true
    })
    .await;
    app.act("InstanceServer", "rack-a", "uncordon").await;
    test.wait_object("InstanceServer", "rack-a", "open", SOON, |s| {
        s["spec"]["cordoned"] != true
    })
    .await;
    app.refresh("hard").await;
    app.wait(&commit, "Synced/Healthy").await;
}

async fn every_script_passes_its_tests_in_the_engine_of_argo_cd(_test: Test) {
    let said = argo_lua(&["test", SCRIPTS], "")
        .await
        .unwrap_or_else(|said| panic!("{said}"));
    for kind in ["InstancePlacement", "InstanceServer", "InstanceMove", "InstanceCopy"] {
        assert!(said.contains(&format!("berth.dev/{kind} health ")), "{kind}: {said}");
        assert!(
            said.contains(&format!("berth.dev/{kind}/actions discovery ")),
            "{kind}: {said}"
        );
    }
}

/// Conditions of an object that has this reason, as the controller writes them.
fn conditions(reason: Reason) -> Value {
    let (ready, also) = match reason.kind() {
        ReasonKind::Ready => ("True", None),
        ReasonKind::InProgress => ("False", Some("Reconciling")),
        ReasonKind::Waiting => ("False", None),
        ReasonKind::Stalled => ("False", Some("Stalled")),
        ReasonKind::Unknown => ("Unknown", Some("Reconciling")),
    };
    let condition =
        |kind: &str, status: &str| json!({"type": kind, "status": status, "reason": reason.as_str(), "message": "why"});
    let all = [
        Some(condition("Ready", ready)),
        also.map(|kind| condition(kind, "True")),
    ];
    json!(all.into_iter().flatten().collect::<Vec<_>>())
}

async fn every_reason_has_its_health(_test: Test) {
    let (mut objects, mut expected) = (Vec::new(), Vec::new());
    for kind in ["InstancePlacement", "InstanceServer", "InstanceCopy"] {
        for reason in Reason::ALL {
            objects.push(json!({
                "apiVersion": "berth.dev/v1alpha1", "kind": kind, "metadata": {"name": "a", "generation": 2}, "spec": {},
                "status": {"observedGeneration": 2, "conditions": conditions(*reason)},
            }));
            let health = match reason.kind() {
                ReasonKind::Ready => "Healthy",
                ReasonKind::InProgress | ReasonKind::Unknown => "Progressing",
                ReasonKind::Waiting => "Suspended",
                ReasonKind::Stalled => "Degraded",
            };
            expected.push(json!({"status": health, "message": format!("{reason}: why")}));
        }
        // ready, but for the spec before
        objects.push(json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": kind, "metadata": {"name": "a", "generation": 3}, "spec": {},
            "status": {"observedGeneration": 2, "conditions": conditions(Reason::InPlace)},
        }));
        expected.push(json!({"status": "Progressing", "message": "Waiting for Berth to look at the new spec"}));
    }
    let said = argo_lua(&["health", SCRIPTS], &json!(objects).to_string()).await;
    let said: Vec<Value> = serde_json::from_str(&said.unwrap_or_else(|said| panic!("{said}"))).unwrap_or_default();
    assert_eq!(said.len(), expected.len());
    for (object, (said, expected)) in objects.iter().zip(said.iter().zip(&expected)) {
        for key in ["status", "message"] {
            assert_eq!(said[key], expected[key], "{object:#}");
        }
    }
}
