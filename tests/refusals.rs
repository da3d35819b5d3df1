//! Bad input and refusing servers: each has its reason and one sentence with the way to mend it in status, nothing changes
//! on any server, and what is mended goes on by itself.

use std::time::Duration;

use berth_tests::{
    ControllerOptions, NewInstance, Placement, Product, SOON, Test, condition, reason, wait_for, wait_until,
};
use jiff::Timestamp;
use serde_json::{Value, json};

use road::{Subject, intact, known, subject, with_data};

mod road;
#[path = "refusals/servers.rs"]
mod servers;

berth_tests::suite! {
    needs: [Kube, Lab],
    side_by_side: 8,
    together: [
        servers::a_missing_secret_is_named_and_found_once_it_exists,
        servers::a_certificate_that_is_no_pem_is_refused,
        servers::a_wrong_fingerprint_is_refused_and_the_right_one_is_named,
        servers::a_certificate_that_the_server_does_not_trust_is_refused,
        servers::a_server_that_does_not_answer_is_reported_and_holds_its_placements_back,
        a_target_that_lacks_something_is_refused_before_the_stop_on_incus,
        a_target_that_lacks_something_is_refused_before_the_stop_on_lxd,
        a_network_or_profile_of_the_instance_that_the_target_lacks_is_refused,
        an_unknown_member_or_group_of_a_cluster_is_refused,
        an_instance_of_a_foreign_architecture_is_not_sent,
        an_instance_that_does_not_exist_is_not_found_until_it_is_created,
        two_instances_of_one_name_are_not_guessed_at_and_a_taken_name_is_not_overwritten,
        two_placements_of_one_instance_do_not_fight,
        two_placements_of_one_instance_in_two_namespaces_do_not_fight,
        a_volume_that_the_target_lacks_is_named_before_anything_is_touched,
        a_graceful_stop_that_times_out_is_undone_on_incus,
        a_graceful_stop_that_times_out_is_undone_on_lxd,
        a_guest_that_ignores_the_stop_is_stopped_by_force_where_that_is_allowed,
        a_target_whose_disk_is_full_leaves_the_instance_running_where_it_was,
    ],
    alone: [],
}

//---------------------------------------------------------------- what a refusal looks like

/// Everything that this test has on any server.
async fn inventory(test: &Test) -> Vec<Value> {
    let (mut all, id) = (Vec::new(), test.unique(""));
    for server in test.lab().entrances() {
        let instances = server.instances().await;
        let instances = instances.unwrap_or_else(|error| panic!("{}: {error}", server.name));
        let mine = |i: &Value| i["name"].as_str().is_some_and(|name| name.contains(&id));
        all.extend(
            instances
                .into_iter()
                .filter(mine)
                .map(|i| json!({"server": server.name, "is": i})),
        );
    }
    all
}

fn message(object: &Value) -> String {
    let ready = condition(object, "Ready").unwrap_or(&Value::Null);
    ready["message"].as_str().unwrap_or_default().to_owned()
}

/// One line that holds these words.
fn says(object: &Value, words: &[&str]) {
    let said = message(object);
    for word in words {
        assert!(said.contains(word), "{} does not say {word:?}: {said}", reason(object));
    }
    assert!(!said.contains('\n') && said.len() < 600, "one sentence: {said}");
}

/// Waits until an object is Stalled for this reason, and says so in the words given.
async fn stalled(test: &Test, kind: &str, name: &str, why: &str, words: &[&str]) -> Value {
    let what = format!("stalled, {why}");
    let object = test
        .wait_object(kind, name, &what, SOON, |object| {
            let current = condition(object, "Stalled")
                .is_some_and(|c| c["observedGeneration"] == object["metadata"]["generation"] && c["reason"] == why);
            current && reason(object) == format!("False/{why}")
        })
        .await;
    says(&object, words);
    assert!(
        condition(&object, "Reconciling").is_none(),
        "stalled is not in progress"
    );
    object
}

/// A placement that is refused: nothing was begun, nothing is held, nothing changed.
async fn refused(test: &Test, name: &str, why: &str, words: &[&str], before: &[Value]) -> Value {
    let object = stalled(test, "InstancePlacement", name, why, words).await;
    assert!(test.moves(name).await.is_empty(), "{why}: no move was begun");
    assert_eq!(
        object["metadata"].get("finalizers"),
        None,
        "{why}: nothing holds the placement"
    );
    assert_eq!(inventory(test).await, before, "{why}: nothing changed on any server");
    object
}

async fn patch_spec(test: &Test, name: &str, spec: Value) {
    test.patch("InstancePlacement", name, json!({"spec": spec})).await;
}

//---------------------------------------------------------------- targets

/// One wrong thing after the other; when the last is mended, the instance moves.
async fn lacks(test: Test, from: &str, to: &str, cli: &str) {
    test.add_servers(&[from, to]).await;
    let web = subject(&test, from, "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, from, SOON).await;
    let before = inventory(&test).await;
    let nic = json!({"eth0": {"type": "nic", "network": "br77"}});
    let (project, profile, network) = (
        format!("{cli} project create prod"),
        format!("{cli} profile create gold"),
        format!("{cli} network create br77"),
    );
    // each takes back what the one before it did
    let steps: [(Value, &str, Vec<&str>); 7] = [
        (
            json!({"target": {"server": "rack"}}),
            "ServerNotFound",
            vec!["rack", "kubectl get isrv"],
        ),
        (
            json!({"target": {"server": to, "pool": "nvme"}}),
            "PoolNotFound",
            vec!["nvme", "spec.target.pool", "btr"],
        ),
        (
            json!({"target": {"pool": null, "project": "prod"}}),
            "ProjectNotFound",
            vec!["prod", &project],
        ),
        (
            json!({"target": {"project": null, "member": "m2"}}),
            "MemberNotFound",
            vec!["no cluster", "m2", "remove"],
        ),
        (
            json!({"target": {"member": null}, "overrides": {"profiles": ["gold"]}}),
            "ProfileNotFound",
            vec!["gold", &profile, "spec.overrides.profiles"],
        ),
        (
            json!({"overrides": {"profiles": null, "devices": nic}}),
            "NetworkNotFound",
            vec!["br77", &network, "spec.overrides.devices"],
        ),
        (
            json!({"overrides": null, "methods": ["Live"]}),
            "MethodImpossible",
            vec!["Live", "spec.criu", "Cold", "kubectl patch iplace"],
        ),
    ];
    for (change, why, words) in steps {
        patch_spec(&test, &web.name, change).await;
        let object = refused(&test, &web.name, why, &words, &before).await;
        let blockers = &object["status"]["plan"]["blockers"];
        if why != "ServerNotFound" {
            assert_eq!(blockers[0]["reason"], why, "{blockers}");
            assert!(blockers[0]["fix"].is_string(), "{why} has a fix: {blockers}");
        }
    }
    test.patch("InstanceServer", to, json!({"spec": {"cordoned": true}}))
        .await;
    let words = [to, "cordoned", "kubectl patch isrv"];
    refused(&test, &web.name, "TargetCordoned", &words, &before).await;
    patch_spec(&test, &web.name, json!({"methods": ["Cold"]})).await;
    refused(&test, &web.name, "TargetCordoned", &words, &before).await;
    test.patch("InstanceServer", to, json!({"spec": {"cordoned": false}}))
        .await;
    intact(&test, &web, to, 2..=2).await;
}

async fn a_target_that_lacks_something_is_refused_before_the_stop_on_incus(test: Test) {
    lacks(test, "i1", "i2", "incus").await;
}

async fn a_target_that_lacks_something_is_refused_before_the_stop_on_lxd(test: Test) {
    lacks(test, "l1", "l2", "lxc").await;
}

async fn a_network_or_profile_of_the_instance_that_the_target_lacks_is_refused(test: Test) {
    let (lab, profile) = (test.lab(), test.unique("gold"));
    let source = lab.server("l1");
    let made = source.call("POST", "/1.0/profiles", json!({"name": profile})).await;
    made.unwrap_or_else(|error| panic!("{error}"));
    test.add_servers(&["l1", "i1"]).await;
    let new = NewInstance {
        profiles: vec!["default".into(), profile.clone()],
        devices: json!({"eth0": {"type": "nic", "name": "eth0", "network": "lxdbr0"}}),
        ..with_data("default")
    };
    let web = subject(&test, "l1", "web", &new).await;
    let before = inventory(&test).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "l1", SOON).await;
    test.retarget(&web.name, json!({"server": "i1"})).await;
    let words = [profile.as_str(), "incus profile create", "spec.overrides.profiles"];
    let object = refused(&test, &web.name, "ProfileNotFound", &words, &before).await;
    let blockers = object["status"]["plan"]["blockers"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let reasons: Vec<&Value> = blockers.iter().map(|b| &b["reason"]).collect();
    assert_eq!(
        reasons,
        ["ProfileNotFound", "NetworkNotFound"],
        "all that is missing, at once"
    );
    patch_spec(&test, &web.name, json!({"overrides": {"profiles": ["default"]}})).await;
    let words = ["lxdbr0", "incus network create", "spec.overrides.devices"];
    refused(&test, &web.name, "NetworkNotFound", &words, &before).await;
    let nic = json!({"eth0": {"network": "incusbr0"}});
    patch_spec(&test, &web.name, json!({"overrides": {"devices": nic}})).await;
    intact(&test, &web, "i1", 2..=2).await;
    let gone = source
        .call("DELETE", &format!("/1.0/profiles/{profile}"), Value::Null)
        .await;
    gone.unwrap_or_else(|error| panic!("{error}"));
}

async fn an_unknown_member_or_group_of_a_cluster_is_refused(test: Test) {
    test.add_servers(&["i1", "m1"]).await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let before = inventory(&test).await;
    let _controller = test.controller().await;
    let steps = [
        (
            json!({"server": "m1", "member": "m9"}),
            "MemberNotFound",
            ["m9", "m1, m2, m3"],
        ),
        (
            json!({"member": null, "group": "gpu"}),
            "GroupNotFound",
            ["gpu", "default"],
        ),
    ];
    for (target, why, words) in steps {
        test.retarget(&web.name, target).await;
        refused(&test, &web.name, why, &words, &before).await;
    }
    test.retarget(&web.name, json!({"group": "default"})).await;
    intact(&test, &web, "m1", 2..=2).await;
}

async fn an_instance_of_a_foreign_architecture_is_not_sent(test: Test) {
    let (source, name) = (test.lab().server("i1"), test.unique("web"));
    let foreign = match source.get("/1.0").await {
        Ok(about) if about["environment"]["architectures"][0] == "aarch64" => "x86_64",
        _ => "aarch64",
    };
    let stopped = NewInstance {
        start: false,
        ..NewInstance::default()
    };
    source.create(&name, &stopped).await;
    // what is not started may say that it is of any architecture
    let whole = source.instance(&name).await.unwrap_or_default();
    let keys = ["config", "devices", "profiles", "ephemeral", "description"];
    let mut body: serde_json::Map<_, _> = keys
        .map(|key| (key.to_owned(), whole[key].clone()))
        .into_iter()
        .collect();
    body.insert("architecture".to_owned(), json!(foreign));
    let done = source
        .call("PUT", &format!("/1.0/instances/{name}"), Value::Object(body))
        .await;
    done.unwrap_or_else(|error| panic!("{error}"));
    test.add_servers(&["i1", "i2", "m1"]).await;
    let before = inventory(&test).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&name, "i2")).await;
    refused(&test, &name, "ArchitectureMismatch", &[foreign, "i2"], &before).await;
    test.retarget(&name, json!({"server": "m1", "member": "m2"})).await;
    refused(&test, &name, "ArchitectureMismatch", &[foreign, "m1"], &before).await;
}

//---------------------------------------------------------------- which instance

async fn an_instance_that_does_not_exist_is_not_found_until_it_is_created(test: Test) {
    test.add_servers(&["i1", "l1"]).await;
    let name = test.unique("web");
    let _controller = test.controller().await;
    test.place(&Placement::new(&name, "i1")).await;
    let words = [name.as_str(), "i1", "l1", "spec.instance"];
    refused(&test, &name, "InstanceNotFound", &words, &[]).await;
    test.lab().server("i1").create(&name, &with_data("default")).await;
    test.wait_in_place(&name, "i1", SOON).await;
}

async fn two_instances_of_one_name_are_not_guessed_at_and_a_taken_name_is_not_overwritten(test: Test) {
    let (one, other) = (test.lab().server("i1"), test.lab().server("i2"));
    let name = test.unique("web");
    one.create(&name, &with_data("default")).await;
    other.create(&name, &with_data("default")).await;
    let (web, bystander) = (known(one, &name).await, known(other, &name).await);
    test.add_servers(&["i1", "i2"]).await;
    let before = inventory(&test).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&name, "i2")).await;
    let uuid = web.uuid.as_str().unwrap_or_default();
    let words = [name.as_str(), "i1", "i2", "uuid", "kubectl patch iplace"];
    refused(&test, &name, "AmbiguousInstance", &words, &before).await;
    patch_spec(&test, &name, json!({"instance": {"uuid": uuid}})).await;
    let words = [name.as_str(), "i2", "spec.target.name", "incus rename"];
    refused(&test, &name, "NameTaken", &words, &before).await;
    let free = test.unique("shop");
    test.retarget(&name, json!({"name": free})).await;
    test.wait_in_place(&name, "i2", SOON).await;
    other.wait_counting(&free).await;
    let (moved, stayed) = (known(other, &free).await, known(other, &name).await);
    assert_eq!(moved.uuid, web.uuid);
    assert_eq!(stayed.uuid, bystander.uuid, "the other one is still there");
    assert_eq!(other.boots(&name).await, 1, "and was left alone");
    assert_eq!(one.status(&name).await, "absent");
}

async fn two_placements_of_one_instance_do_not_fight(test: Test) {
    test.add_servers(&["i1", "i2"]).await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    let before = inventory(&test).await;
    // a later second by name, so that it is the younger one in any case
    let second = test.unique("zzz");
    let claim = json!({"instance": {"name": web.name}, "target": {"name": web.name}});
    test.place(&Placement::new(&second, "i2").with(claim)).await;
    let holder = format!("{}/{}", test.namespace(), web.name);
    let words = [holder.as_str(), "kubectl delete iplace"];
    refused(&test, &second, "ClaimedByAnother", &words, &before).await;
    let first = test.get("InstancePlacement", &web.name).await.unwrap_or_default();
    assert_eq!(reason(&first), "True/InPlace", "the holder minds nothing");
    test.delete("InstancePlacement", &web.name).await;
    test.wait_in_place(&second, "i2", SOON).await;
    assert_eq!(test.lab().server("i2").status(&web.name).await, "Running");
    assert_eq!(test.lab().server("i1").status(&web.name).await, "absent");
}

async fn two_placements_of_one_instance_in_two_namespaces_do_not_fight(test: Test) {
    test.add_servers(&["l1", "l2"]).await;
    let web = subject(&test, "l1", "web", &with_data("default")).await;
    let (kube, lab, other) = (test.kube(), test.lab(), format!("{}-b", test.namespace()));
    let run = async |args: &[&str], input: &str| {
        let done = kube.kubectl_with_input(args, input).await;
        done.unwrap_or_else(|error| panic!("{args:?}: {error}"))
    };
    run(&["create", "namespace", &other], "").await;
    let both = ControllerOptions {
        args: vec!["--namespace".into(), other.clone()],
        ..ControllerOptions::default()
    };
    let _controller = test.controller_with(both).await;
    test.wait_in_place(&web.name, "l1", SOON).await;
    let before = inventory(&test).await;
    let server = |name: &str| {
        json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": "InstanceServer", "metadata": {"name": name},
            "spec": {
                "addresses": [lab.server(name).url], "credentials": {"secretRef": {"name": "berth-client"}},
                "serverCertificate": {"fingerprint": lab.server(name).fingerprint},
            },
        })
    };
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "berth-client"}, "type": "kubernetes.io/tls",
            "stringData": {"tls.crt": lab.client_cert(), "tls.key": lab.client_key()},
        },
        server("l1"), server("l2"),
        {
            "apiVersion": "berth.dev/v1alpha1", "kind": "InstancePlacement", "metadata": {"name": web.name},
            "spec": {"target": {"server": "l2"}},
        },
    ]});
    run(
        &["apply", "--server-side", "-n", &other, "-f", "-"],
        &objects.to_string(),
    )
    .await;
    let api = kube.api("InstancePlacement", &other);
    wait_for("the younger one to be refused", SOON, || async {
        let object = api.get(&web.name).await.map_err(|error| error.to_string())?;
        let object = json!(object);
        if reason(&object) == "False/ClaimedByAnother" {
            says(&object, &[&test.namespace(), "kubectl delete iplace"]);
            Ok(())
        } else {
            Err(reason(&object))
        }
    })
    .await;
    assert_eq!(inventory(&test).await, before, "nothing changed on any server");
    run(&["delete", "namespace", &other], "").await;
    intact(&test, &web, "l1", 1..=1).await;
}

//---------------------------------------------------------------- refusals on the way

/// A move that was undone because something failed: the instance runs where it was, the target is empty.
async fn undone(test: &Test, web: &Subject, from: &str, to: &str, why: &[&str], words: &[&str]) {
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/MoveFailed", SOON)
        .await;
    says(&object, words);
    assert!(condition(&object, "Reconciling").is_some(), "it is tried again");
    assert_eq!(object["metadata"].get("finalizers"), None);
    let moves = test.moves(&web.name).await;
    let error = &moves[0]["status"]["lastError"];
    assert_eq!(moves[0]["status"]["outcome"], "Undone", "{error}");
    assert!(why.iter().any(|why| error["reason"] == *why), "{error}");
    let source = test.lab().server(from);
    source.wait_counting(&web.name).await;
    let found = test.lab().whereabouts(&web.name).await;
    assert_eq!(found, [(from.to_owned(), "Running".to_owned())]);
    let left = inventory(test).await;
    assert_eq!(left.len(), 1, "nothing is left on {to}: {left:#?}");
    let again = known(source, &web.name).await;
    assert_eq!(again.uuid, web.uuid);
    let config = left[0]["is"]["config"].to_string();
    assert!(
        !config.contains("berth") && !config.contains("boot.autostart"),
        "{config}"
    );
    assert_eq!(left[0]["is"]["devices"].get("berth-guard"), None);
}

async fn a_volume_that_the_target_lacks_is_named_before_anything_is_touched(test: Test) {
    let (source, volume) = (test.lab().server("i1"), test.unique("data"));
    let path = "/1.0/storage-pools/default/volumes/custom";
    let made = source.call("POST", path, json!({"name": volume})).await;
    made.unwrap_or_else(|error| panic!("{error}"));
    test.add_servers(&["i1", "i2"]).await;
    // the volume is on the source only
    let disk = json!({"type": "disk", "pool": "default", "source": volume, "path": "/srv"});
    let new = NewInstance {
        devices: json!({"data": disk}),
        ..with_data("default")
    };
    let web = subject(&test, "i1", "web", &new).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    test.retarget(&web.name, json!({"server": "i2"})).await;
    test.wait_ready("InstancePlacement", &web.name, "False/VolumeNotFound", SOON)
        .await;
    assert!(test.moves(&web.name).await.is_empty(), "nothing was touched");
    assert_eq!(source.status(&web.name).await, "Running");
    let without = json!({"overrides": {"removeDevices": ["data"]}});
    patch_spec(&test, &web.name, without).await;
    intact(&test, &web, "i2", 2..=2).await;
    let gone = source.call("DELETE", &format!("{path}/{volume}"), Value::Null).await;
    gone.unwrap_or_else(|error| panic!("{error}"));
}

fn deaf() -> NewInstance {
    NewInstance {
        ignore_stop: true,
        ..with_data("default")
    }
}

async fn stop_times_out(test: Test, from: &str, to: &str) {
    test.add_servers(&[from, to]).await;
    let web = subject(&test, from, "web", &deaf()).await;
    patch_spec(&test, &web.name, json!({"stop": {"timeout": "3s"}})).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, from, SOON).await;
    test.retarget(&web.name, json!({"server": to})).await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/StopPending", SOON)
        .await;
    says(&object, &[&web.name, "stop"]);
    let moves = test.moves(&web.name).await;
    assert_eq!(moves[0]["status"]["step"], "Undoing");
    assert_eq!(moves[0]["status"]["lastError"]["reason"], "StopPending");
    let source = test.lab().server(from);
    source.wait_counting(&web.name).await;
    assert_eq!(source.boots(&web.name).await, 1, "it runs on");
    assert_eq!(inventory(&test).await.len(), 1, "nothing was made on {to}");
    if source.product == Product::Lxd {
        // LXD lets go at once
        wait_until("the marks to be taken off", SOON, || async {
            let instance = source.instance(&web.name).await.unwrap_or_default();
            !instance["config"].to_string().contains("berth")
        })
        .await;
        assert_eq!(source.boots(&web.name).await, 1, "it runs on");
    }
    // that it goes down at last is because Berth asked for it, so Berth starts it again; and nothing more is tried meanwhile
    test.retarget(&web.name, json!({"server": from})).await;
    source.set_state(&web.name, "stop").await;
    let down = Timestamp::now();
    test.wait_object("InstancePlacement", &web.name, "undone", SOON, |object| {
        object["status"]["moves"][0]["outcome"] == "Undone"
    })
    .await;
    let ended = test.moves(&web.name).await[0]["status"]["finishedAt"].clone();
    let ended: Option<Timestamp> = ended.as_str().and_then(|at| at.parse().ok());
    let is_down = source.status(&web.name).await == "Stopped";
    if is_down && ended.is_some_and(|at| at < down) {
        // the server let go before it was down: then it was our stop, and stays
        source.set_state(&web.name, "start").await;
    }
    source.wait_counting(&web.name).await;
    patch_spec(&test, &web.name, json!({"stop": {"force": true}})).await;
    test.retarget(&web.name, json!({"server": to})).await;
    intact(&test, &web, to, 3..=3).await;
}

async fn a_graceful_stop_that_times_out_is_undone_on_incus(test: Test) {
    stop_times_out(test, "i1", "i2").await;
}

async fn a_graceful_stop_that_times_out_is_undone_on_lxd(test: Test) {
    stop_times_out(test, "l1", "l2").await;
}

async fn a_guest_that_ignores_the_stop_is_stopped_by_force_where_that_is_allowed(test: Test) {
    test.add_servers(&["i2", "l2"]).await;
    let web = subject(&test, "l2", "web", &deaf()).await;
    let stop = json!({"stop": {"timeout": "3s", "force": true}, "target": {"server": "i2"}});
    patch_spec(&test, &web.name, stop).await;
    let _controller = test.controller().await;
    intact(&test, &web, "i2", 2..=2).await;
    let moves = test.moves(&web.name).await;
    assert_eq!(moves.len(), 1);
    assert_eq!(moves[0]["status"]["outcome"], "Succeeded");
}

async fn a_target_whose_disk_is_full_leaves_the_instance_running_where_it_was(test: Test) {
    let (target, pool) = (test.lab().server("i2"), test.unique("small"));
    let body = json!({"name": pool, "driver": "btrfs", "config": {"size": "128MiB"}});
    let made = target.call("POST", "/1.0/storage-pools", body).await;
    made.unwrap_or_else(|error| panic!("{error}"));
    test.add_servers(&["i1", "i2"]).await;
    let new = NewInstance {
        megabytes: 140,
        ..NewInstance::default()
    };
    let web = subject(&test, "i1", "web", &new).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "i1", Duration::from_secs(30)).await;
    test.retarget(&web.name, json!({"server": "i2", "pool": pool})).await;
    undone(
        &test,
        &web,
        "i1",
        "i2",
        // if the sender's rsync is the first to say something, nobody hears of the full disk
        &["InsufficientSpace", "ServerUnreachable"],
        &[&web.name, "i2"],
    )
    .await;
    // from there on it looks at the room alone, and says so
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/InsufficientSpace", SOON)
        .await;
    says(&object, &[&pool, "were free", "are now"]);
    assert!(condition(&object, "Stalled").is_some(), "{object:#}");
    let tried = test.moves(&web.name).await.len();
    test.ask_again("InstancePlacement", &web.name, &test.unique("now"))
        .await;
    wait_for("another try, since somebody asked", SOON, || async {
        let moves = test.moves(&web.name).await;
        let ended = moves.iter().filter(|m| m["status"]["outcome"] == "Undone").count();
        (ended > tried).then_some(()).ok_or(format!("{moves:#?}"))
    })
    .await;
    // once for each try, and before and after them
    let boots = test.moves(&web.name).await.len() + 2;
    test.retarget(&web.name, json!({"pool": "default"})).await;
    intact(&test, &web, "i2", boots..=boots).await;
    let path = format!("/1.0/storage-pools/{pool}");
    let gone = target.call("DELETE", &path, Value::Null).await;
    gone.unwrap_or_else(|error| panic!("{error}"));
}
