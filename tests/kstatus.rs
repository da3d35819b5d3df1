//! What the objects say from their first version to their last, whatever becomes of a move, and what a person sees of it
//! with kubectl: Events in their order, `wait` that is not too early, tables that fit.
//!
//! The rules for every version are those of `berth_tests::history`; the harness holds all suites to them, so that here it
//! is only seen to that every outcome occurs, and that nothing is written afterwards.

use std::time::Duration;

use berth_tests::{Fate, Placement, SOON, Test, condition, reason, wait_for};
use serde_json::{Value, json};

use road::{Call, Road, Subject, intact, subject, with_data};

mod road;

berth_tests::suite! {
    needs: [Kube, Lab],
    side_by_side: 6,
    together: [
        a_move_tells_its_story_in_order_on_the_placement_and_on_the_move,
        a_refusal_and_every_wait_are_told_once_and_in_order,
        a_move_that_is_cancelled_says_so_and_the_next_one_begins_on_request,
        a_move_that_fails_is_undone_and_tried_again,
        a_move_that_is_overtaken_by_the_spec_is_undone,
        a_placement_that_is_deleted_in_mid_move_has_its_move_undone,
        a_move_that_is_given_up_touches_no_server_and_says_how_to_clean_up,
        an_instance_that_was_taken_away_comes_back,
        a_copy_is_made_refreshed_and_suspended,
        kubectl_wait_is_not_over_before_the_instance_is_there,
        the_tables_fit_into_120_columns_and_tell_what_is_where_what_moves_and_why_not,
    ],
    alone: [],
}

/// How long nothing may be written.
const REST: Duration = Duration::from_secs(8);

/// A placed instance with some data between two servers on which requests can be caught.
async fn stage(test: &Test, from: &str, to: &str) -> (Road, Subject) {
    let road = Road::between(test, from, to).await;
    let web = subject(test, from, "web", &with_data("default")).await;
    test.controller().await;
    test.wait_in_place(&web.name, from, SOON).await;
    (road, web)
}

async fn patch_spec(test: &Test, name: &str, spec: Value) {
    test.patch("InstancePlacement", name, json!({"spec": spec})).await;
}

async fn wait_reason(test: &Test, name: &str, ready: &str) -> Value {
    test.wait_ready("InstancePlacement", name, ready, SOON).await
}

/// The reasons that the versions of an object gave, each once in a row.
fn reasons(test: &Test, kind: &str, name: &str) -> Vec<String> {
    let versions = test.recorder().versions(kind, name);
    let reasons = versions.iter().filter_map(|v| condition(v, "Ready"));
    let mut reasons: Vec<String> = reasons
        .map(|c| c["reason"].as_str().unwrap_or_default().to_owned())
        .collect();
    reasons.dedup();
    reasons
}

/// What `kubectl describe` lists as Events, `Type Reason` each, from the top.
async fn described(test: &Test, kind: &str, name: &str) -> Vec<String> {
    let text = test
        .kube()
        .kubectl(&["describe", kind, name, "-n", &test.namespace()])
        .await;
    let text = text.unwrap_or_else(|error| panic!("{error}"));
    let events = text.split("\nEvents:").nth(1).unwrap_or_default();
    let lines = events.lines().filter(|l| l.contains("berth.dev/controller"));
    lines
        .map(|l| l.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
        .collect()
}

/// Waits until the Events of an object are these: they are written beside the rest, and may come a moment later.
async fn tells(test: &Test, kind: &str, name: &str, story: &[&str]) {
    wait_for(&format!("the story of {kind} {name}"), SOON, || async {
        let told = described(test, kind, name).await;
        if told == story {
            Ok(())
        } else {
            Err(format!("{told:#?}"))
        }
    })
    .await;
}

/// Nothing is written any more. What was written before may still be on its way to the recorder.
async fn is_at_rest(test: &Test) {
    wait_for("the servers to say how data came to them", SOON, || async {
        let moves = test.list("InstanceMove").await;
        for arrived in moves.iter().filter(|m| m["status"]["outcome"] == "Succeeded") {
            let [from, to] = ["from", "to"].map(|end| arrived["spec"][end]["server"].as_str().unwrap_or_default());
            let server = test.get("InstanceServer", to).await.unwrap_or_default();
            let ways = server["status"]["transfers"].as_array().cloned().unwrap_or_default();
            if from != to && !ways.iter().any(|w| w["from"] == from) {
                return Err(format!("{to}: {ways:?}"));
            }
        }
        Ok(())
    })
    .await;
    let before = test.recorder().dump();
    let mut there = Vec::new();
    for kind in ["InstancePlacement", "InstanceMove", "InstanceServer", "InstanceCopy"] {
        there.extend(test.list(kind).await);
    }
    let versions = there
        .iter()
        .map(|o| o["metadata"]["resourceVersion"].as_str().unwrap_or_default());
    let written: Vec<String> = versions.map(|v| format!("\"resourceVersion\":\"{v}\"")).collect();
    // not waiting for something: that nothing happens is what is measured
    tokio::time::sleep(REST).await;
    let after = test.recorder().dump();
    let new: Vec<&str> = after
        .lines()
        .filter(|line| !before.lines().any(|b| b == *line))
        .filter(|line| !written.iter().any(|w| line.contains(w)))
        .collect();
    assert!(new.is_empty(), "something was written at rest: {new:#?}");
}

/// Applies the same again, as GitOps tools do every few minutes: no object gets another version.
async fn applied_again(test: &Test, objects: &[(&str, &str)]) {
    for (kind, name) in objects {
        let object = test.get(kind, name).await.unwrap_or_else(|| panic!("{name} exists"));
        let manifest = json!({
            "apiVersion": object["apiVersion"], "kind": kind, "metadata": {"name": name}, "spec": object["spec"],
        });
        // the first takes the fields over from whoever wrote them before
        test.apply(&manifest.to_string()).await;
        let version = async || {
            test.get(kind, name)
                .await
                .map(|o| o["metadata"]["resourceVersion"].clone())
        };
        let before = version().await;
        test.apply(&manifest.to_string()).await;
        assert_eq!(version().await, before, "the same {kind} {name} was applied again");
    }
}

fn name_of(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

async fn a_move_tells_its_story_in_order_on_the_placement_and_on_the_move(test: Test) {
    let (_road, web) = stage(&test, "i1", "i2").await;
    test.retarget(&web.name, json!({"server": "i2"})).await;
    intact(&test, &web, "i2", 2..=2).await;
    let moves = test.moves(&web.name).await;
    let of_move = [
        "Normal Moving",
        "Normal Stopped",
        "Normal Committed",
        "Normal Started",
        "Normal Succeeded",
    ];
    tells(&test, "imove", &name_of(&moves[0]), &of_move).await;
    tells(
        &test,
        "iplace",
        &web.name,
        &[&["Normal InPlace"], &of_move[..]].concat(),
    )
    .await;
    let said = reasons(&test, "InstancePlacement", &web.name);
    assert!(
        said.ends_with(&["InPlace", "Moving", "InPlace"].map(str::to_owned)),
        "{said:?}"
    );
    let steps = reasons(&test, "InstanceMove", &name_of(&moves[0]));
    let all = ["Stopped", "Transferred", "Committed", "Started", "Retired", "Succeeded"].map(str::to_owned);
    assert!(steps.ends_with(&all), "{steps:?}");
    applied_again(&test, &[("InstanceServer", "i1"), ("InstancePlacement", &web.name)]).await;
    is_at_rest(&test).await;
}

async fn a_refusal_and_every_wait_are_told_once_and_in_order(test: Test) {
    let (_road, web) = stage(&test, "i2", "i1").await;
    patch_spec(&test, &web.name, json!({"target": {"server": "i1", "pool": "none"}})).await;
    wait_reason(&test, &web.name, "False/PoolNotFound").await;
    test.wait_object("InstancePlacement", &web.name, "stalled", SOON, |o| {
        condition(o, "Stalled").is_some()
    })
    .await;
    let month = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).month();
    let windows = json!([{"schedule": format!("0 2 1 {} *", (month + 5) % 12 + 1), "duration": "1h"}]);
    let waits = [
        (
            json!({"target": {"pool": null}, "windows": windows}),
            "False/WaitingForWindow",
        ),
        (
            json!({"windows": null, "approval": "Manual"}),
            "False/WaitingForApproval",
        ),
        (json!({"suspend": true}), "False/Suspended"),
        (json!({"suspend": false, "mode": "Observe"}), "False/DriftObserved"),
    ];
    for (spec, ready) in waits {
        patch_spec(&test, &web.name, spec).await;
        let object = wait_reason(&test, &web.name, ready).await;
        let also = object["status"]["conditions"].as_array().map(Vec::len);
        assert_eq!(also, Some(1), "{ready}: it neither works nor is it stuck");
    }
    patch_spec(&test, &web.name, json!({"mode": "Enforce", "approval": "Auto"})).await;
    intact(&test, &web, "i1", 2..=2).await;
    let story = [
        "Normal InPlace",
        "Warning PoolNotFound",
        "Normal WaitingForWindow",
        "Normal WaitingForApproval",
        "Normal Suspended",
        "Normal DriftObserved",
        "Normal Moving",
        "Normal Stopped",
        "Normal Committed",
        "Normal Started",
        "Normal Succeeded",
    ];
    tells(&test, "iplace", &web.name, &story).await;
    is_at_rest(&test).await;
}

async fn a_move_that_is_cancelled_says_so_and_the_next_one_begins_on_request(test: Test) {
    let (road, web) = stage(&test, "l1", "l2").await;
    road.catch(&[(Call::Offer, &web.name)]);
    test.retarget(&web.name, json!({"server": "l2"})).await;
    road.caught().await;
    let name = name_of(&test.moves(&web.name).await[0]);
    // each thing is told when it happens, not when the pass over the placement ends
    tells(&test, "imove", &name, &["Normal Moving", "Normal Stopped"]).await;
    test.patch("InstanceMove", &name, json!({"spec": {"cancel": true}}))
        .await;
    test.wait_object("InstanceMove", &name, "undone", SOON, |o| {
        o["status"]["step"] == "Undoing"
    })
    .await;
    road.pass();
    road.release().await;
    let stalled = wait_reason(&test, &web.name, "False/MoveCancelled").await;
    assert!(condition(&stalled, "Stalled").is_some());
    let story = ["Normal Moving", "Normal Stopped", "Warning Undoing", "Normal Cancelled"];
    tells(&test, "imove", &name, &story).await;
    let whole = [&["Normal InPlace"], &story[..], &["Warning MoveCancelled"]].concat();
    tells(&test, "iplace", &web.name, &whole).await;
    is_at_rest(&test).await;
    test.ask_again("InstancePlacement", &web.name, "now").await;
    intact(&test, &web, "l2", 2..=4).await;
}

async fn a_move_that_fails_is_undone_and_tried_again(test: Test) {
    let (road, web) = stage(&test, "i1", "i2").await;
    for proxy in road.proxies() {
        proxy.rule(|seen| match Call::of(seen) {
            Some(Call::Create) => Fate::Refuse,
            _ => Fate::Pass,
        });
    }
    test.retarget(&web.name, json!({"server": "i2"})).await;
    let waits = |o: &Value| reason(o) == "False/MoveFailed" || condition(o, "Stalled").is_some();
    test.wait_object("InstancePlacement", &web.name, "failed", SOON, waits)
        .await;
    let name = name_of(&test.moves(&web.name).await[0]);
    let story = ["Normal Moving", "Normal Stopped", "Warning Undoing", "Warning Undone"];
    tells(&test, "imove", &name, &story).await;
    road.pass();
    test.ask_again("InstancePlacement", &web.name, "now").await;
    intact(&test, &web, "i2", 2..=5).await;
    is_at_rest(&test).await;
}

async fn a_move_that_is_overtaken_by_the_spec_is_undone(test: Test) {
    let (road, web) = stage(&test, "i2", "i1").await;
    road.catch(&[(Call::Mark, &web.name)]);
    test.retarget(&web.name, json!({"server": "i1"})).await;
    road.caught().await;
    patch_spec(&test, &web.name, json!({"suspend": true})).await;
    road.pass();
    road.release().await;
    wait_reason(&test, &web.name, "False/Suspended").await;
    patch_spec(&test, &web.name, json!({"suspend": false, "target": {"server": "i2"}})).await;
    intact(&test, &web, "i2", 1..=2).await;
    is_at_rest(&test).await;
}

async fn a_placement_that_is_deleted_in_mid_move_has_its_move_undone(test: Test) {
    let (road, web) = stage(&test, "l2", "l1").await;
    road.catch(&[(Call::Mark, &web.name)]);
    test.retarget(&web.name, json!({"server": "l1"})).await;
    road.caught().await;
    let name = name_of(&test.moves(&web.name).await[0]);
    test.delete("InstancePlacement", &web.name).await;
    road.pass();
    road.release().await;
    wait_for("the placement to be gone", SOON, || async {
        match test.get("InstancePlacement", &web.name).await {
            None => Ok(()),
            Some(object) => Err(object["status"].to_string()),
        }
    })
    .await;
    // the move is gone with its owner, what was told of it is not
    let told: Vec<String> = test.events(&name).await;
    let story: Vec<&str> = told.iter().filter_map(|l| l.split(':').next()).collect();
    assert_eq!(story, ["Moving", "Undoing", "Cancelled"], "{told:#?}");
    assert_eq!(test.lab().server("l2").status(&web.name).await, "Running");
    is_at_rest(&test).await;
}

/// The copy is complete and yet to be renamed when the controller dies; the next one finds the annotation.
async fn a_move_that_is_given_up_touches_no_server_and_says_how_to_clean_up(test: Test) {
    let road = Road::between(&test, "i1", "i2").await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let first = test.controller().await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    road.catch(&[(Call::Name, &web.name)]);
    test.retarget(&web.name, json!({"server": "i2"})).await;
    road.caught().await;
    first.kill().await;
    road.pass();
    let writes = || -> usize { road.proxies().map(|p| p.count(|seen| seen.method != "GET")).sum() };
    let (before, copies) = (writes(), road.copies(&web.uuid).await);
    assert_eq!(copies.len(), 2, "{copies:?}");
    let open = test.moves(&web.name).await.pop().unwrap_or_default();
    let name = open["metadata"]["name"].as_str().unwrap_or_default();
    let annotation = json!({"metadata": {"annotations": {"berth.dev/abandon": name}}});
    test.patch("InstanceMove", name, annotation).await;
    test.controller().await;
    wait_reason(&test, &web.name, "False/NeedsAttention").await;
    for (kind, name) in [
        ("InstanceMove", name),
        ("InstancePlacement", &web.name),
        ("InstanceServer", "i1"),
        ("InstanceServer", "i2"),
    ] {
        test.wait_object(kind, name, "let go", SOON, |o| {
            o["metadata"].get("finalizers").is_none()
        })
        .await;
    }
    tokio::time::sleep(REST).await;
    assert_eq!(writes(), before, "no server is asked for anything");
    assert_eq!(road.copies(&web.uuid).await.len(), copies.len(), "{copies:?}");
    let given_up = test.get("InstanceMove", name).await.unwrap_or_default();
    assert_eq!(given_up["status"]["outcome"], "NeedsAttention");
    let fix = given_up["status"]["lastError"]["fix"].as_str().unwrap_or_default();
    for object in [name, &web.name] {
        let told = test.events(object).await;
        assert!(
            told.iter().any(|e| e.contains(&format!("To clean up: {fix}"))),
            "{told:?}"
        );
    }
    test.lab().paste(fix).await;
    test.retarget(&web.name, json!({"server": "i1"})).await;
    intact(&test, &web, "i1", 2..=2).await;
}

async fn an_instance_that_was_taken_away_comes_back(test: Test) {
    let (_road, web) = stage(&test, "i1", "i2").await;
    test.lab().server("i1").set_state(&web.name, "stop").await;
    test.recorder().cause();
    let (from, to) = (format!("i1:{}", web.name), format!("i2:{}", web.name));
    let moved = test.lab().incus(&["move", &from, &to]).await;
    moved.unwrap_or_else(|error| panic!("{error}"));
    test.wait_object("InstancePlacement", &web.name, "back", SOON, |o| {
        reason(o) == "True/InPlace" && o["status"]["moves"][0]["outcome"] == "Succeeded"
    })
    .await;
    assert_eq!(
        test.lab().server("i1").status(&web.name).await,
        "Stopped",
        "as it was found"
    );
    is_at_rest(&test).await;
}

async fn a_copy_is_made_refreshed_and_suspended(test: Test) {
    let (_road, web) = stage(&test, "i1", "i2").await;
    let name = test.unique("standby");
    let object = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "InstanceCopy", "metadata": {"name": name},
        "spec": {"source": {"placement": web.name}, "target": {"server": "i2", "name": name}, "refresh": {"interval": "1h"}},
    });
    test.apply(&object.to_string()).await;
    test.wait_ready("InstanceCopy", &name, "True/UpToDate", SOON).await;
    test.ask_again("InstanceCopy", &name, "now").await;
    test.wait_object("InstanceCopy", &name, "refreshed", SOON, |o| {
        o["status"]["lastHandledReconcileAt"] == "now" && reason(o) == "True/UpToDate"
    })
    .await;
    applied_again(&test, &[("InstanceCopy", &name)]).await;
    test.patch("InstanceCopy", &name, json!({"spec": {"suspend": true}}))
        .await;
    test.wait_ready("InstanceCopy", &name, "False/Suspended", SOON).await;
    tells(
        &test,
        "icopy",
        &name,
        &["Normal UpToDate", "Normal UpToDate", "Normal Suspended"],
    )
    .await;
    is_at_rest(&test).await;
}

async fn kubectl_wait_is_not_over_before_the_instance_is_there(test: Test) {
    let (_road, web) = stage(&test, "i1", "i2").await;
    let (kube, namespace) = (test.kube(), test.namespace());
    let placement = format!("iplace/{}", web.name);
    for home in ["i2", "i1", "i2"] {
        let patch = json!({"spec": {"target": {"server": home}}}).to_string();
        // the old Ready=True is still there when the wait begins: it is of the former generation
        let edit = ["patch", &placement, "-n", &namespace, "--type=merge", "-p", &patch];
        let wait = [
            "wait",
            "--for=condition=Ready",
            "--timeout=90s",
            &placement,
            "-n",
            &namespace,
        ];
        for args in [&edit[..], &wait[..]] {
            kube.kubectl(args).await.unwrap_or_else(|error| panic!("{error}"));
        }
        let found = test.lab().whereabouts(&web.name).await;
        assert_eq!(
            found,
            [(home.to_owned(), "Running".to_owned())],
            "kubectl wait was over"
        );
    }
    // one that cannot come true is not waited for in vain: its reason is Stalled
    patch_spec(&test, &web.name, json!({"target": {"pool": "none"}})).await;
    let wait = [
        "wait",
        "--for=condition=Stalled",
        "--timeout=60s",
        &placement,
        "-n",
        &namespace,
    ];
    kube.kubectl(&wait).await.unwrap_or_else(|error| panic!("{error}"));
    let never = [
        "wait",
        "--for=condition=Ready",
        "--timeout=1s",
        &placement,
        "-n",
        &namespace,
    ];
    assert!(kube.kubectl(&never).await.is_err(), "it is not ready");
}

async fn the_tables_fit_into_120_columns_and_tell_what_is_where_what_moves_and_why_not(test: Test) {
    test.add_client_secret("berth-client").await;
    for (name, server) in [("rack-a", "i1"), ("rack-b", "i2")] {
        test.add_server(name, test.lab().server(server), json!({})).await;
    }
    let (web, db) = (test.unique("web"), test.unique("db"));
    for name in [&web, &db] {
        test.lab().server("i1").create(name, &with_data("default")).await;
        test.place(&Placement::new(name, "rack-a").with(json!({"methods": ["Cold"]})))
            .await;
    }
    let copy = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "InstanceCopy", "metadata": {"name": "standby"},
        "spec": {"source": {"placement": db}, "target": {"server": "rack-b", "name": test.unique("c")}},
    });
    test.apply(&copy.to_string()).await;
    test.controller().await;
    test.wait_ready("InstanceCopy", "standby", "True/UpToDate", SOON).await;
    test.wait_in_place(&web, "rack-a", SOON).await;
    patch_spec(
        &test,
        &web,
        json!({"approval": "Manual", "target": {"server": "rack-b"}}),
    )
    .await;
    patch_spec(&test, &db, json!({"target": {"server": "rack-b", "pool": "none"}})).await;
    let waiting = wait_reason(&test, &web, "False/WaitingForApproval").await;
    wait_reason(&test, &db, "False/PoolNotFound").await;
    let rows = tables(&test).await;
    row(
        &rows,
        &format!("/{web} "),
        &["rack-a", "rack-b", "Running", "False", "WaitingForApproval"],
    );
    row(
        &rows,
        &format!("/{db} "),
        &["rack-a", "rack-b", "False", "PoolNotFound"],
    );
    row(&rows, "/rack-a ", &["Incus", "True", "Connected", "false"]);
    let (from, to) = (format!("rack-a/{db}"), format!("rack-b/{}", test.unique("c")));
    row(&rows, "/standby ", &[&from, &to, "True", "UpToDate"]);
    let approve = json!({"metadata": {"annotations": {"berth.dev/approve": waiting["status"]["plan"]["digest"]}}});
    test.patch("InstancePlacement", &web, approve).await;
    test.wait_step(&web, &["Stopped", "Transferred"], SOON).await;
    let moving = tables(&test).await;
    row(
        &moving,
        &format!("instancemove.berth.dev/{web}-"),
        &["Cold", "rack-a", "rack-b"],
    );
    test.wait_in_place(&web, "rack-b", SOON).await;
    let rows = tables(&test).await;
    row(&rows, &format!("/{web} "), &["rack-b", "Running", "True", "InPlace"]);
    row(
        &rows,
        &format!("instancemove.berth.dev/{web}-"),
        &["rack-a", "rack-b", "Cleaned", "Succeeded"],
    );
}

/// What `kubectl get` prints of everything, no line wider than a terminal.
async fn tables(test: &Test) -> Vec<String> {
    let args = ["get", "isrv,iplace,imove,icopy", "-n", &test.namespace()];
    let text = test.kube().kubectl(&args).await;
    let text = text.unwrap_or_else(|error| panic!("{error}"));
    for line in text.lines() {
        assert!(line.trim_end().len() <= 120, "wider than 120 columns:\n{text}");
    }
    text.lines().map(str::to_owned).collect()
}

/// The row with this name shows these words.
fn row(rows: &[String], name: &str, words: &[&str]) {
    let row = rows.iter().find(|r| r.contains(name));
    let row = row.unwrap_or_else(|| panic!("no row with {name}: {rows:#?}"));
    let cells: Vec<&str> = row.split_whitespace().collect();
    for word in words {
        assert!(cells.contains(word), "{word} is not shown: {row}");
    }
}
