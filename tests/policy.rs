//! When and whether something is done, as the placement and the servers' objects say: windows, approval, time-outs, cordons,
//! limits. What depends on the calendar is in the unit tests of the windows.

use berth_tests::{SOON, Test, condition, reason, wait_until};
use serde_json::{Value, json};

use road::{Call, Road, intact, subject, with_data};

mod road;

berth_tests::suite! {
    needs: [Kube, Lab],
    side_by_side: 6,
    together: [
        a_move_waits_for_its_window_and_begins_when_one_is_open,
        a_window_that_closes_before_the_stop_sends_the_move_back,
        an_approval_is_for_one_move_and_is_spent_when_it_is_committed,
        a_move_that_is_not_committed_in_time_is_undone,
        a_cordon_on_any_object_of_a_server_counts_for_all_and_the_fix_names_that_object,
        no_more_moves_run_than_the_limits_allow_and_all_get_their_turn,
    ],
    alone: [],
}

/// A window that is not open for the next months.
fn far_window() -> Value {
    let now = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC);
    let month = (now.month() + 5) % 12 + 1;
    json!([{"schedule": format!("0 2 1 {month} *"), "duration": "1h"}])
}

fn message(object: &Value) -> String {
    condition(object, "Ready")
        .map(|c| c["message"].as_str().unwrap_or_default().to_owned())
        .unwrap_or_default()
}

async fn patch_spec(test: &Test, name: &str, spec: Value) {
    test.patch("InstancePlacement", name, json!({"spec": spec})).await;
}

async fn a_move_waits_for_its_window_and_begins_when_one_is_open(test: Test) {
    test.add_servers(&["i1", "i2"]).await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let _controller = test.controller().await;
    patch_spec(
        &test,
        &web.name,
        json!({"windows": far_window(), "target": {"server": "i2"}}),
    )
    .await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/WaitingForWindow", SOON)
        .await;
    assert!(message(&object).contains("opens at"), "{}", message(&object));
    assert!(condition(&object, "Stalled").is_none() && condition(&object, "Reconciling").is_none());
    assert!(test.moves(&web.name).await.is_empty());
    assert_eq!(test.lab().server("i1").boots(&web.name).await, 1);
    // only live moves need that window
    let mut window = far_window();
    window[0]["methods"] = json!(["Live"]);
    patch_spec(&test, &web.name, json!({"windows": window})).await;
    intact(&test, &web, "i2", 2..=2).await;
    let open = json!([{"schedule": "* * * * *", "duration": "1h", "timeZone": "Asia/Tokyo"}]);
    patch_spec(&test, &web.name, json!({"windows": open, "target": {"server": "i1"}})).await;
    intact(&test, &web, "i1", 3..=3).await;
}

async fn a_window_that_closes_before_the_stop_sends_the_move_back(test: Test) {
    let road = Road::between(&test, "l1", "l2").await;
    let web = subject(&test, "l1", "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "l1", SOON).await;
    road.catch(&[(Call::Mark, &web.name)]);
    test.retarget(&web.name, json!({"server": "l2"})).await;
    road.caught().await;
    patch_spec(&test, &web.name, json!({"windows": far_window()})).await;
    test.wait_object("InstancePlacement", &web.name, "the new windows seen", SOON, |o| {
        o["status"]["observedGeneration"] == o["metadata"]["generation"]
    })
    .await;
    road.release().await;
    test.wait_ready("InstancePlacement", &web.name, "False/WaitingForWindow", SOON)
        .await;
    let server = test.lab().server("l1");
    assert_eq!(server.boots(&web.name).await, 1, "it was never stopped");
    let moves = test.moves(&web.name).await;
    assert_eq!(moves[0]["status"]["outcome"], "Undone");
    patch_spec(&test, &web.name, json!({"windows": null})).await;
    intact(&test, &web, "l2", 2..=2).await;
}

async fn an_approval_is_for_one_move_and_is_spent_when_it_is_committed(test: Test) {
    test.add_servers(&["i1", "i2"]).await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let _controller = test.controller().await;
    let mut digests = Vec::new();
    for (home, boots) in [("i2", 2), ("i1", 3), ("i2", 4)] {
        patch_spec(
            &test,
            &web.name,
            json!({"approval": "Manual", "target": {"server": home}}),
        )
        .await;
        let object = test
            .wait_ready("InstancePlacement", &web.name, "False/WaitingForApproval", SOON)
            .await;
        let digest = object["status"]["plan"]["digest"].clone();
        assert!(
            message(&object).contains(digest.as_str().unwrap_or("?")),
            "{}",
            message(&object)
        );
        assert!(!digests.contains(&digest), "the first approval is spent: {digests:?}");
        let approve = json!({"metadata": {"annotations": {"berth.dev/approve": digest}}});
        test.patch("InstancePlacement", &web.name, approve).await;
        intact(&test, &web, home, boots..=boots).await;
        digests.push(digest);
    }
    assert_eq!(test.moves(&web.name).await.len(), 3);
}

async fn a_move_that_is_not_committed_in_time_is_undone(test: Test) {
    let road = Road::between(&test, "i1", "i2").await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    road.catch(&[(Call::Offer, &web.name)]);
    patch_spec(&test, &web.name, json!({"timeout": "15s", "target": {"server": "i2"}})).await;
    road.caught().await;
    wait_until("fifteen seconds to be over", SOON, || async {
        let moves = test.moves(&web.name).await;
        let started = moves[0]["status"]["startedAt"].as_str().unwrap_or_default().to_owned();
        let started: Result<jiff::Timestamp, _> = started.parse();
        started.is_ok_and(|t| jiff::Timestamp::now().duration_since(t).as_secs() > 15)
    })
    .await;
    // the next attempt may take as long as it needs
    road.release().await;
    let object = test
        .wait_object("InstancePlacement", &web.name, "undone", SOON, |o| {
            o["status"]["moves"][0]["outcome"] == "Undone"
        })
        .await;
    assert_eq!(
        object["status"]["moves"].as_array().map(Vec::len),
        Some(1),
        "{object:#}"
    );
    let undo = test.moves(&web.name).await[0]["status"]["undo"].clone();
    assert!(
        undo["message"].as_str().is_some_and(|m| m.contains("spec.timeout")),
        "{undo}"
    );
    patch_spec(&test, &web.name, json!({"timeout": "1h"})).await;
    intact(&test, &web, "i2", 3..=3).await;
}

async fn a_cordon_on_any_object_of_a_server_counts_for_all_and_the_fix_names_that_object(test: Test) {
    test.add_servers(&["l1", "l2"]).await;
    let web = subject(&test, "l1", "web", &with_data("default")).await;
    let (kube, lab, other) = (test.kube(), test.lab(), format!("{}-b", test.namespace()));
    let run = async |args: &[&str], input: &str| {
        let done = kube.kubectl_with_input(args, input).await;
        done.unwrap_or_else(|error| panic!("{args:?}: {error}"))
    };
    run(&["create", "namespace", &other], "").await;
    let both = berth_tests::ControllerOptions {
        args: vec!["--namespace".into(), other.clone()],
        ..berth_tests::ControllerOptions::default()
    };
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "berth-client"}, "type": "kubernetes.io/tls",
            "stringData": {"tls.crt": lab.client_cert(), "tls.key": lab.client_key()},
        },
        {
            "apiVersion": "berth.dev/v1alpha1", "kind": "InstanceServer", "metadata": {"name": "elsewhere"},
            "spec": {
                "addresses": [lab.server("l2").url], "credentials": {"secretRef": {"name": "berth-client"}},
                "serverCertificate": {"fingerprint": lab.server("l2").fingerprint}, "cordoned": true,
            },
        },
    ]});
    run(
        &["apply", "--server-side", "-n", &other, "-f", "-"],
        &objects.to_string(),
    )
    .await;
    let _controller = test.controller_with(both).await;
    berth_tests::wait_for("the other object to be connected", SOON, || async {
        let object = kube.api("InstanceServer", &other).get("elsewhere").await;
        let object = json!(object.map_err(|error| error.to_string())?);
        if reason(&object) == "True/Connected" {
            Ok(())
        } else {
            Err(reason(&object))
        }
    })
    .await;
    test.retarget(&web.name, json!({"server": "l2"})).await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/TargetCordoned", SOON)
        .await;
    let fix = object["status"]["plan"]["blockers"][0]["fix"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    assert!(fix.contains("elsewhere") && fix.contains(&other), "{fix}");
    assert!(test.moves(&web.name).await.is_empty());
    // the fix is pasted
    let quoted: Vec<&str> = fix.split('\'').collect();
    let mut args: Vec<&str> = quoted[0].split_whitespace().skip(1).collect();
    args.push(quoted[1]);
    run(&args, "").await;
    intact(&test, &web, "l2", 2..=2).await;
    run(&["delete", "namespace", &other, "--wait=false"], "").await;
}

async fn no_more_moves_run_than_the_limits_allow_and_all_get_their_turn(test: Test) {
    test.add_client_secret("berth-client").await;
    test.add_server(
        "i2",
        test.lab().server("i2"),
        json!({"limits": {"incoming": 5, "outgoing": 1}}),
    )
    .await;
    test.add_server(
        "i1",
        test.lab().server("i1"),
        json!({"limits": {"incoming": 2, "outgoing": 5}}),
    )
    .await;
    let mut subjects = Vec::new();
    for name in ["one", "two", "three", "four"] {
        subjects.push(subject(&test, "i2", name, &with_data("default")).await);
    }
    let _controller = test.controller().await;
    for web in &subjects {
        test.wait_in_place(&web.name, "i2", SOON).await;
    }
    for web in &subjects {
        test.retarget(&web.name, json!({"server": "i1"})).await;
    }
    wait_until("all of them to have moved", SOON * 2, || async {
        let moves = test.list("InstanceMove").await;
        let open = moves.iter().filter(|m| !m["status"]["outcome"].is_string()).count();
        assert!(open <= 1, "{open} moves run, and one may leave i2");
        moves.iter().filter(|m| m["status"]["outcome"] == "Succeeded").count() == subjects.len()
    })
    .await;
    for web in &subjects {
        intact(&test, web, "i1", 2..=2).await;
        assert_eq!(test.moves(&web.name).await.len(), 1, "{}", web.name);
    }
}
