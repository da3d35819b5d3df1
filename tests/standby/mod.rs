//! InstanceCopies as a user makes and refreshes them, and what must hold of a copy of any kind.
#![allow(dead_code, reason = "each suite uses its part")]

use berth_tests::{SOON, Server, Test, reason};
use serde_json::{Value, json};

/// Applies an InstanceCopy.
pub async fn copy(test: &Test, name: &str, source: Value, target: Value, spec: Value) {
    let mut object = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "InstanceCopy", "metadata": {"name": name},
        "spec": {"source": source, "target": target},
    });
    for (key, value) in spec.as_object().into_iter().flatten() {
        object["spec"][key] = value.clone();
    }
    test.apply(&object.to_string()).await;
}

/// Waits until the copy is as it is to be.
pub async fn up_to_date(test: &Test, name: &str) -> Value {
    test.wait_ready("InstanceCopy", name, "True/UpToDate", SOON).await
}

/// Asks for a refresh now and waits for its end.
pub async fn refresh(test: &Test, name: &str, word: &str) -> Value {
    ask(test, name, word).await;
    test.wait_object("InstanceCopy", name, "refreshed", SOON, |object| {
        object["status"]["lastHandledReconcileAt"] == word && reason(object) == "True/UpToDate"
    })
    .await
}

/// Asks for a refresh now.
pub async fn ask(test: &Test, name: &str, word: &str) {
    test.ask_again("InstanceCopy", name, word).await;
}

/// Snapshots that are not Berth's, and how many are.
pub async fn snapshots(server: &Server, name: &str) -> (Vec<String>, usize) {
    let list = server
        .get(&format!("/1.0/instances/{name}/snapshots?recursion=1"))
        .await;
    let list = list.unwrap_or_else(|error| panic!("{error}"));
    let names: Vec<String> = list
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|s| s["name"].as_str())
        .map(|n| n.rsplit('/').next().unwrap_or_default().to_owned())
        .collect();
    let ours = names.iter().filter(|n| n.starts_with("berth-")).count();
    (names.into_iter().filter(|n| !n.starts_with("berth-")).collect(), ours)
}

/// What must hold of a copy at rest, whatever its data are.
pub async fn rests(source: &Server, from: &str, target: &Server, name: &str) {
    let original = source.instance(from).await.unwrap_or_else(|| panic!("{from} exists"));
    let copy = target.instance(name).await.unwrap_or_else(|| panic!("{name} exists"));
    let config = &copy["config"];
    assert_eq!(copy["status"], "Stopped");
    assert_eq!(config["user.berth.copy-of"], original["config"]["volatile.uuid"]);
    assert_ne!(
        config["volatile.uuid"], original["config"]["volatile.uuid"],
        "an instance of its own"
    );
    assert_eq!(config["boot.autostart"], "false");
    assert!(config.get("user.berth.role").is_none_or(|v| v == ""), "{config:#}");
    assert!(copy["devices"].get("berth-guard").is_none(), "a person can start it");
    assert!(!config.to_string().contains("berth-guard"), "{config:#}");
    assert_eq!(original["config"].get("user.berth.copy-of"), None);
    assert!(
        target.instances().await.unwrap_or_default().iter().all(|i| !(i["name"]
            .as_str()
            .unwrap_or_default()
            .starts_with("berth-")
            && i["name"].as_str().unwrap_or_default().contains(name))),
        "nothing else is left"
    );
}
