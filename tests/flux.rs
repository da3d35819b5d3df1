//! From a Git commit to a moved instance with real Flux: source-controller and kustomize-controller, and the manifests of examples/flux.

use std::time::{Duration, Instant};

use berth_tests::{NewInstance, SOON, Test, condition, reason, wait_for};
use serde_json::{Value, json};

use shop::flux::{applied, follow, is_applied, kustomization};
use shop::{Shop, Way};

mod shop;

berth_tests::suite! {
    needs: [Kube, Lab, Flux],
    timeout: Duration::from_secs(300),
    side_by_side: 6,
    together: [
        a_commit_moves_an_instance_and_the_kustomization_is_ready_only_when_it_is_there,
        a_stalled_placement_fails_the_kustomization_at_once,
        placements_that_wait_as_they_were_told_count_as_current_with_the_expressions_of_the_documents,
        a_request_to_reconcile_is_answered_and_flux_leaves_it_alone,
        a_commit_that_comes_while_the_instance_moves_takes_the_move_back,
        two_placements_in_one_commit_swap_two_instances,
    ],
    alone: [],
}

fn placement(name: &str, server: &str, more: &str) -> String {
    Way::Flux.placement(name, server, more)
}

async fn flux(test: &Test, placements: &str) -> Shop {
    Shop::new(test, test.flux().await, Way::Flux, placements).await
}

/// Waits until the Kustomization is Ready with this commit and sees to it that it was not while the instance was elsewhere.
async fn applied_and_there(test: &Test, commit: &str, name: &str, server: &str, at: &str) {
    wait_for(&format!("Ready with {commit}"), SOON, || async {
        let object = kustomization(test)
            .get("shop")
            .await
            .map_err(|error| error.to_string())?;
        if !is_applied(&json!(object), commit) {
            return Err(format!("{:#}", json!(object)["status"]["conditions"]));
        }
        Ok(())
    })
    .await;
    // read after Ready was seen: whatever is there now was there then
    let placement = test.get("InstancePlacement", name).await.unwrap_or_default();
    assert_eq!(
        reason(&placement),
        "True/InPlace",
        "Ready came too early: {:#}",
        placement["status"]
    );
    assert_eq!(placement["status"]["location"]["server"], server);
    assert_eq!(test.lab().server(at).status(name).await, "Running", "{name} on {at}");
}

async fn a_commit_moves_an_instance_and_the_kustomization_is_ready_only_when_it_is_there(test: Test) {
    let name = test.unique("web");
    let (here, there) = (test.lab().server("i1"), test.lab().server("i2"));
    here.create(&name, &NewInstance::default()).await;
    let identity = |instance: Option<Value>| instance.unwrap_or_default()["config"]["volatile.uuid"].clone();
    let uuid = identity(here.instance(&name).await);
    let _controller = test.controller().await;
    let shop = flux(&test, &placement(&name, "rack-a", "")).await;
    follow(&test, &shop, "sync.yaml", "2h", "1s").await;
    applied_and_there(&test, &shop.head().await, &name, "rack-a", "i1").await;
    assert!(test.moves(&name).await.is_empty(), "it was where it should be");

    let commit = shop.commit("web to rack-b", &placement(&name, "rack-b", "")).await;
    applied_and_there(&test, &commit, &name, "rack-b", "i2").await;
    assert_eq!(identity(there.instance(&name).await), uuid);
    assert_eq!(test.lab().whereabouts(&name).await.len(), 1, "the source is gone");

    let commit = shop.revert().await;
    applied_and_there(&test, &commit, &name, "rack-a", "i1").await;
    let outcomes = test.moves(&name).await;
    assert!(
        outcomes.iter().all(|m| m["status"]["outcome"] == "Succeeded"),
        "{outcomes:#?}"
    );

    let boots = here.boots(&name).await;
    let commit = shop
        .commit(
            "web is not looked after any more",
            &placement("other", "rack-a", "  suspend: true\n"),
        )
        .await;
    wait_for("the placement to be pruned", SOON, || async {
        match test.get("InstancePlacement", &name).await {
            None => Ok(()),
            Some(object) => Err(format!("{:#}", object["metadata"])),
        }
    })
    .await;
    assert!(!commit.is_empty());
    let instance = here.instance(&name).await;
    assert_eq!(instance.as_ref().map(|i| &i["status"]), Some(&json!("Running")));
    assert_eq!(identity(instance), uuid, "the instance is left alone");
    assert_eq!(here.boots(&name).await, boots);
}

async fn a_stalled_placement_fails_the_kustomization_at_once(test: Test) {
    let name = test.unique("web");
    test.lab().server("i1").create(&name, &stopped()).await;
    let _controller = test.controller().await;
    let shop = flux(&test, &placement(&name, "rack-a", "")).await;
    follow(&test, &shop, "sync.yaml", "2h", "1s").await;
    applied(&test, &shop.head().await).await;

    let wrong = placement(&name, "rack-b", "").replace("rack-b}", "rack-b, pool: nowhere}");
    let begun = Instant::now();
    let commit = shop.commit("to a pool that is not there", &wrong).await;
    let failed = test
        .wait_in(&kustomization(&test), "shop", "failed", SOON, |object| {
            let attempted = object["status"]["lastAttemptedRevision"].as_str().unwrap_or_default();
            reason(object) == "False/HealthCheckFailed" && attempted.ends_with(&commit)
        })
        .await;
    let message = condition(&failed, "Ready").unwrap_or(&Value::Null)["message"].to_string();
    let about = format!("InstancePlacement/{}/{name} status: 'Failed'", test.namespace());
    assert!(message.contains(&about), "Flux names the placement: {message}");
    assert!(message.contains("failed early due to stalled resources"), "{message}");
    assert!(
        begun.elapsed() < SOON,
        "and does not wait for its time-out of two hours"
    );
    let placement = test.get("InstancePlacement", &name).await.unwrap_or_default();
    assert_eq!(reason(&placement), "False/PoolNotFound");
    let said = condition(&placement, "Stalled").unwrap_or(&Value::Null)["message"].to_string();
    assert!(said.contains("nowhere"), "the placement says what is wrong: {said}");
    let told = test.events(&name).await;
    assert!(
        told.iter().any(|e| e.starts_with("PoolNotFound: ")),
        "and so does an Event: {told:?}"
    );

    let commit = shop.revert().await;
    applied(&test, &commit).await;
    assert!(test.moves(&name).await.is_empty(), "nothing was moved");
}

fn stopped() -> NewInstance {
    NewInstance {
        start: false,
        ..NewInstance::default()
    }
}

async fn placements_that_wait_as_they_were_told_count_as_current_with_the_expressions_of_the_documents(test: Test) {
    // 29 February 2028, three in the morning
    let closed = "  windows:\n  - {schedule: \"0 3 29 2 *\", duration: 1h}\n";
    let waits = [
        ("WaitingForWindow", closed),
        ("WaitingForApproval", "  approval: Manual\n"),
        ("Suspended", "  suspend: true\n"),
        ("DriftObserved", "  mode: Observe\n"),
    ];
    let names: Vec<String> = waits.iter().map(|(why, _)| test.unique(&why.to_lowercase())).collect();
    let mut files = String::new();
    for (name, (_, spec)) in names.iter().zip(waits) {
        test.lab().server("i1").create(name, &stopped()).await;
        files += &placement(name, "rack-b", spec);
    }
    let _controller = test.controller().await;
    let shop = flux(&test, &files).await;
    // without the expressions such a placement is in progress until the time-out
    follow(&test, &shop, "sync.yaml", "6s", "1s").await;
    let failed = test
        .wait_in(&kustomization(&test), "shop", "failed", SOON, |object| {
            reason(object) == "False/HealthCheckFailed"
        })
        .await;
    let message = condition(&failed, "Ready").unwrap_or(&Value::Null)["message"].to_string();
    assert!(message.contains("timeout waiting for"), "{message}");
    for (name, (why, _)) in names.iter().zip(waits) {
        assert!(message.contains(name.as_str()), "{name} in {message}");
        test.wait_ready("InstancePlacement", name, &format!("False/{why}"), SOON)
            .await;
    }

    follow(&test, &shop, "sync-waiting.yaml", "2h", "1s").await;
    applied(&test, &shop.head().await).await;
    assert!(test.list("InstanceMove").await.is_empty(), "nothing was moved");

    // what stalls fails the Kustomization with the expressions, too
    let wrong = files
        .replacen("rack-b}", "rack-b, pool: nowhere}", 1)
        .replace(closed, "");
    shop.commit("to a pool that is not there", &wrong).await;
    let failed = test
        .wait_in(&kustomization(&test), "shop", "failed", SOON, |object| {
            let message = condition(object, "Ready").unwrap_or(&Value::Null)["message"].to_string();
            message.contains("failed early due to stalled resources")
        })
        .await;
    let message = condition(&failed, "Ready").unwrap_or(&Value::Null)["message"].to_string();
    assert!(message.contains(&names[0]) && !message.contains(&names[1]), "{message}");
}

async fn a_request_to_reconcile_is_answered_and_flux_leaves_it_alone(test: Test) {
    let name = test.unique("web");
    test.lab().server("i1").create(&name, &stopped()).await;
    let _controller = test.controller().await;
    let shop = flux(&test, &placement(&name, "rack-a", "")).await;
    follow(&test, &shop, "sync.yaml", "2h", "1s").await;
    applied(&test, &shop.head().await).await;

    test.ask_again("InstancePlacement", &name, "2026-11-26T06:00:00Z").await;
    let handled = |object: &Value| object["status"]["lastHandledReconcileAt"] == "2026-11-26T06:00:00Z";
    test.wait_object("InstancePlacement", &name, "handled", SOON, handled)
        .await;

    // suspended by a commit; the target changes in the same one, and nothing moves
    let commit = shop
        .commit("stop that", &placement(&name, "rack-b", "  suspend: true\n"))
        .await;
    let attempted = |object: &Value| {
        let revision = object["status"]["lastAttemptedRevision"].as_str().unwrap_or_default();
        revision.ends_with(&commit)
    };
    test.wait_in(&kustomization(&test), "shop", "attempted", SOON, attempted)
        .await;
    let suspended = test
        .wait_ready("InstancePlacement", &name, "False/Suspended", SOON)
        .await;
    let kept = &suspended["metadata"]["annotations"]["reconcile.fluxcd.io/requestedAt"];
    assert_eq!(
        *kept, "2026-11-26T06:00:00Z",
        "Flux applies what is in Git and leaves the rest alone"
    );
    assert!(test.moves(&name).await.is_empty());

    let commit = shop.commit("go on", &placement(&name, "rack-b", "")).await;
    applied(&test, &commit).await;
    assert_eq!(
        test.lab().server("i2").status(&name).await,
        "Stopped",
        "it arrived as it was"
    );
}

async fn a_commit_that_comes_while_the_instance_moves_takes_the_move_back(test: Test) {
    let name = test.unique("web");
    let here = test.lab().server("i1");
    here.create(&name, &NewInstance::default()).await;
    let _controller = test.controller().await;
    let shop = flux(&test, &placement(&name, "rack-a", "")).await;
    follow(&test, &shop, "sync.yaml", "2h", "1s").await;
    applied(&test, &shop.head().await).await;
    shop.hold();
    shop.commit("web to rack-b", &placement(&name, "rack-b", "")).await;
    shop.held().await;
    let object = kustomization(&test)
        .get("shop")
        .await
        .map(|object| reason(&json!(object)));
    assert_eq!(
        object.unwrap_or_default(),
        "Unknown/Progressing",
        "not Ready while it moves"
    );
    // Flux has waited for the move: a new commit ends that (CancelHealthCheckOnNewRevision, docs/flux.md)
    let commit = shop.revert().await;
    let back = |object: &Value| object["spec"]["target"]["server"] == "rack-a";
    test.wait_object("InstancePlacement", &name, "taken back", SOON, back)
        .await;
    shop.release().await;
    applied_and_there(&test, &commit, &name, "rack-a", "i1").await;
    let moves = test.moves(&name).await;
    assert!(moves.iter().all(|m| m["status"]["outcome"] == "Undone"), "{moves:#?}");
    assert_eq!(test.lab().whereabouts(&name).await.len(), 1);
}

async fn two_placements_in_one_commit_swap_two_instances(test: Test) {
    let (one, two) = (test.unique("one"), test.unique("two"));
    let (a, b) = (test.lab().server("i1"), test.lab().server("i2"));
    a.create(&one, &NewInstance::default()).await;
    b.create(&two, &NewInstance::default()).await;
    let _controller = test.controller().await;
    let both = |at: [&str; 2]| placement(&one, at[0], "") + &placement(&two, at[1], "");
    let shop = flux(&test, &both(["rack-a", "rack-b"])).await;
    follow(&test, &shop, "sync.yaml", "2h", "1s").await;
    applied(&test, &shop.head().await).await;
    let commit = shop.commit("swap", &both(["rack-b", "rack-a"])).await;
    applied(&test, &commit).await;
    assert_eq!(b.status(&one).await, "Running");
    assert_eq!(a.status(&two).await, "Running");
    for name in [&one, &two] {
        assert_eq!(test.lab().whereabouts(name).await.len(), 1, "{name}");
        assert_eq!(test.moves(name).await.len(), 1, "one move each");
    }
}
