//! That each rule sees what breaks it, and nothing else.

use serde_json::{Value, json};

use super::{Entry, violations};

/// A placement as the controller would leave it; `second` is when its status was written and when Ready became so.
fn version(generation: i64, (status, reason): (&str, &str), second: i64) -> Value {
    let time = format!("2026-01-01T00:00:{second:02}Z");
    let condition = |kind: &str, status: &str| {
        json!({"type": kind, "status": status, "reason": reason, "message": "m", "observedGeneration": generation,
            "lastTransitionTime": time})
    };
    let mut conditions = vec![condition("Ready", status)];
    match reason {
        "Moving" | "Progressing" | "Pending" => conditions.push(condition("Reconciling", "True")),
        "NameTaken" => conditions.push(condition("Stalled", "True")),
        _ => {}
    }
    json!({
        "kind": "InstancePlacement",
        "metadata": {"name": "web", "generation": generation, "resourceVersion": second.to_string(), "managedFields": [
            {"manager": "berth", "subresource": "status", "time": time},
        ]},
        "spec": {"target": {"server": "a"}},
        "status": {"observedGeneration": generation, "conditions": conditions, "location": {"server": "a"}},
    })
}

fn ready(second: i64) -> Value {
    version(1, ("True", "InPlace"), second)
}

fn of(kind: &str, mut object: Value) -> Value {
    object["kind"] = kind.into();
    object
}

fn with(mut object: Value, path: &str, value: Value) -> Value {
    let (parent, field) = path.rsplit_once('/').unwrap();
    object.pointer_mut(parent).unwrap()[field] = value;
    object
}

fn unsaid() -> Value {
    with(ready(0), "/status", json!({"observedGeneration": -1}))
}

fn check(versions: &[Value]) -> Vec<String> {
    violations(&versions.iter().cloned().map(Entry::Version).collect::<Vec<_>>())
}

fn is_fine(versions: &[Value]) {
    assert_eq!(check(versions), Vec::<String>::new());
}

fn is_wrong(versions: &[Value], how: &str) {
    let found = check(versions);
    assert!(found.len() == 1 && found[0].contains(how), "{how}: {found:#?}");
}

#[test]
fn a_move_from_one_server_to_another_breaks_no_rule() {
    let edited = with(ready(1), "/metadata/generation", json!(2));
    let moving = |second| {
        let moving = version(2, ("False", "Moving"), second);
        with(moving, "/status/currentMove", json!({"name": "web-1"}))
    };
    let percent = with(moving(2), "/status/currentMove/percent", json!(40));
    is_fine(&[
        unsaid(),
        ready(1),
        edited,
        moving(2),
        percent,
        version(2, ("True", "InPlace"), 5),
    ]);
}

#[test]
fn ready_is_always_there_once_and_with_a_reason() {
    let conditions = ready(1)["status"]["conditions"].clone();
    let twice = [
        conditions.as_array().unwrap().clone(),
        conditions.as_array().unwrap().clone(),
    ]
    .concat();
    let vanished = with(ready(1), "/status/conditions", json!([]));
    assert!(check(&[ready(1), vanished])[0].contains("Ready is not there once"));
    is_wrong(
        &[with(ready(1), "/status/conditions", json!(twice))],
        "Ready is not there once",
    );
    is_wrong(&[with(ready(1), "/status/conditions/0/reason", json!(""))], "no reason");
}

#[test]
fn reconciling_and_stalled_are_there_only_while_true_and_never_beside_ready() {
    let moving = version(1, ("False", "Moving"), 1);
    let not_so = with(moving.clone(), "/status/conditions/1/status", json!("False"));
    is_wrong(&[not_so], "there and not True");
    let mut both = moving.clone();
    let stalled = with(both["status"]["conditions"][1].clone(), "/type", json!("Stalled"));
    both["status"]["conditions"].as_array_mut().unwrap().push(stalled);
    is_wrong(&[both], "reconciling and stalled");
    is_wrong(
        &[with(moving, "/status/conditions/0/status", json!("True"))],
        "ready, and reconciling",
    );
    is_wrong(&[version(1, ("Unknown", "InPlace"), 1)], "nobody knows");
}

#[test]
fn the_first_write_after_an_edit_is_about_that_edit() {
    let edited = with(ready(1), "/metadata/generation", json!(2));
    let late = with(version(1, ("False", "Suspended"), 2), "/metadata/generation", json!(2));
    let found = check(&[ready(1), edited, late]);
    assert!(found[0].contains("written at generation 2, observed 1"), "{found:#?}");
    let half = with(
        version(2, ("False", "Suspended"), 2),
        "/status/conditions/0/observedGeneration",
        json!(1),
    );
    is_wrong(&[ready(1), half], "Ready is of generation 1");
    let ahead = with(ready(1), "/status/observedGeneration", json!(7));
    assert!(check(&[ahead])[0].contains("never was"));
}

#[test]
fn a_transition_time_changes_with_the_status_and_only_then() {
    let message = |second| with(ready(second), "/status/conditions/0/message", json!(second));
    is_wrong(&[ready(1), message(5)], "its status did not");
    let taken = version(1, ("False", "NameTaken"), 20);
    let back = with(
        ready(30),
        "/status/conditions/0/lastTransitionTime",
        json!("2026-01-01T00:00:01Z"),
    );
    is_wrong(&[ready(1), taken, back], "but not at");
    let ahead = with(
        ready(30),
        "/status/conditions/0/lastTransitionTime",
        json!("2026-01-01T00:00:50Z"),
    );
    is_wrong(&[version(1, ("False", "Suspended"), 20), ahead], "but not at");
}

#[test]
fn nothing_is_said_taken_back_and_said_again_without_a_cause() {
    let lost = version(1, ("Unknown", "Progressing"), 2);
    is_wrong(
        &[ready(1), lost.clone(), ready(3)],
        "InPlace, Progressing, InPlace without a cause",
    );
    let taken = version(1, ("False", "NameTaken"), 2);
    is_fine(&[ready(1), taken, ready(3)]);
    let entries = [
        Entry::Version(ready(1)),
        Entry::Version(lost.clone()),
        Entry::Cause,
        Entry::Version(ready(3)),
    ];
    assert_eq!(violations(&entries), Vec::<String>::new(), "somebody did something");
    let entries = [
        Entry::Version(ready(1)),
        Entry::Gap,
        Entry::Version(lost),
        Entry::Gap,
        Entry::Version(ready(3)),
    ];
    assert_eq!(
        violations(&entries),
        Vec::<String>::new(),
        "nobody saw what was between"
    );
    let step = |reason: &str| {
        let moving = version(1, ("False", "Moving"), 1);
        of(
            "InstanceMove",
            with(moving, "/status/conditions/0/reason", json!(reason)),
        )
    };
    is_wrong(&[step("Marked"), step("Stopped"), step("Marked")], "without a cause");
}

#[test]
fn who_waits_is_not_told_too_early() {
    let elsewhere = with(ready(1), "/status/location/server", json!("b"));
    is_wrong(&[elsewhere], "target.server");
    is_wrong(
        &[with(ready(1), "/status/drift", json!(["WrongPower"]))],
        "something differs",
    );
    let silent = with(ready(0), "/status", json!({"version": "6"}));
    is_wrong(&[of("InstanceServer", silent)], "nothing was said");
    is_wrong(&[of("InstanceMove", ready(1))], "has not succeeded");
    is_wrong(&[of("InstanceCopy", ready(1))], "nothing was copied");
    is_wrong(&[of("InstanceServer", ready(1))], "nothing is known");
}

#[test]
fn writes_are_few_and_each_changes_something() {
    let touched = with(ready(1), "/metadata/resourceVersion", json!("9"));
    is_wrong(&[ready(1), touched], "changed nothing");
    let percent = |second: i64, percent: i64| {
        let moving = version(1, ("False", "Moving"), 1);
        let moving = with(
            moving,
            "/status/currentMove",
            json!({"name": "web-1", "percent": percent}),
        );
        with(
            moving,
            "/metadata/managedFields/0/time",
            json!(format!("2026-01-01T00:00:{second:02}Z")),
        )
    };
    is_fine(&(1..9).map(|n| percent(n, n)).collect::<Vec<_>>());
    is_wrong(&(1..6).map(|n| percent(1, n)).collect::<Vec<_>>(), "that say the same");
    let progress = |n| {
        of(
            "InstanceMove",
            with(percent(n, 0), "/status/progress", json!({"percent": n})),
        )
    };
    is_wrong(&(1..6).map(progress).collect::<Vec<_>>(), "that say the same");
    let step = |n: i64| of("InstanceMove", with(percent(1, 0), "/status/steps", json!([n])));
    is_fine(&(1..9).map(step).collect::<Vec<_>>());
}
