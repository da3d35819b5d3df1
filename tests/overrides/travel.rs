//! Overrides that travel with a move, each alone and all together.

use berth_tests::{NewInstance, Placement, SOON, Server, Test};
use serde_json::{Value, json};

use super::road::{known, subject, with_data};
use super::{profile, show};

/// One override and what the instance must look like on the target, its `expanded_*` included.
struct Case {
    what: &'static str,
    target: Value,
    overrides: Value,
    fits: Box<dyn Fn(&Value) -> bool + Send + Sync>,
}

fn case(
    what: &'static str,
    target: Value,
    overrides: Value,
    fits: impl Fn(&Value) -> bool + Send + Sync + 'static,
) -> Case {
    Case {
        what,
        target,
        overrides,
        fits: Box::new(fits),
    }
}

fn cases(gold: &str, shop: &str) -> Vec<Case> {
    let (profiles, shop) = (json!(["default", gold]), shop.to_owned());
    let expected = profiles.clone();
    vec![
        case(
            "config",
            json!({}),
            json!({"config": {"limits.memory": "64MiB"}}),
            |i| i["config"]["limits.memory"] == "64MiB",
        ),
        case(
            "devices",
            json!({}),
            json!({"devices": {"eth0": {"boot.priority": "5"}}}),
            |i| i["devices"]["eth0"]["boot.priority"] == "5" && i["devices"]["eth0"]["type"] == "nic",
        ),
        case(
            "rootsize",
            json!({}),
            json!({"devices": {"root": {"size": "2GiB"}}}),
            |i| i["expanded_devices"]["root"]["size"] == "2GiB" && i["expanded_devices"]["root"]["path"] == "/",
        ),
        case("profiles", json!({}), json!({"profiles": profiles}), move |i| {
            i["profiles"] == expected
        }),
        case("noprofiles", json!({}), json!({"noProfiles": true}), |i| {
            i["profiles"] == json!([]) && i["expanded_devices"]["root"]["path"] == "/"
        }),
        case("removedevices", json!({}), json!({"removeDevices": ["usb9"]}), |i| {
            i["devices"].get("usb9").is_none()
        }),
        case("removeconfig", json!({}), json!({"removeConfig": ["user.old"]}), |i| {
            i["config"].get("user.old").is_none()
        }),
        case("pool", json!({"pool": "btr"}), json!({}), |i| {
            i["expanded_devices"]["root"]["pool"] == "btr"
        }),
        case(
            "devicepool",
            json!({}),
            json!({"devices": {"root": {"pool": "btr"}}}),
            |i| i["expanded_devices"]["root"]["pool"] == "btr",
        ),
        case("project", json!({"project": shop.clone()}), json!({}), move |i| {
            i["project"] == json!(shop)
        }),
    ]
}

/// A project of this test alone on a server, with the profiles and networks of `default`.
async fn project(test: &Test, server: &Server) -> String {
    let name = test.unique("shop");
    let features = ["features.profiles", "features.images", "features.networks"];
    let config: serde_json::Map<_, _> = features.iter().map(|f| ((*f).to_owned(), json!("false"))).collect();
    let made = server
        .call("POST", "/1.0/projects", json!({"name": name, "config": config}))
        .await;
    made.unwrap_or_else(|error| panic!("{error}"));
    name
}

async fn each(test: &Test, from: &str, to: &str, which: std::ops::Range<usize>) {
    test.add_client_secret("berth-client").await;
    for name in [from, to] {
        let limits = json!({"limits": {"incoming": 9, "outgoing": 9}});
        test.add_server(name, test.lab().server(name), limits).await;
    }
    let (source, target) = (test.lab().server(from), test.lab().server(to));
    let gold = profile(test, target, "gold", json!({"config": {"user.tier": "gold"}})).await;
    let shop = project(test, target).await;
    let mut moving = Vec::new();
    for case in cases(&gold, &shop).into_iter().skip(which.start).take(which.len()) {
        let name = test.unique(case.what);
        let new = NewInstance {
            config: vec![("user.old".into(), "old".into()), ("user.mine".into(), "mine".into())],
            devices: json!({"usb9": {"type": "none"}}),
            ..NewInstance::default()
        };
        source.create(&name, &new).await;
        let spec = json!({"target": case.target, "overrides": case.overrides});
        test.place(&Placement::new(&name, to).with(spec)).await;
        moving.push((name, case));
    }
    let _controller = test.controller().await;
    for (name, case) in &moving {
        test.wait_in_place(name, to, SOON * 2).await;
        let project = case.target["project"].as_str().unwrap_or("default");
        let instance = target
            .instance_in(name, project)
            .await
            .unwrap_or_else(|| panic!("{name} arrived"));
        assert!((case.fits)(&instance), "{}: {instance:#}", case.what);
        assert_eq!(
            instance["config"]["user.mine"], "mine",
            "{}: what is not declared stays",
            case.what
        );
        assert_eq!(instance["status"], "Running", "{}", case.what);
        let moves = test.moves(name).await;
        assert_eq!(moves.len(), 1, "{}: {moves:#?}", case.what);
    }
    for (name, _) in &moving {
        test.delete("InstancePlacement", name).await;
    }
    clean(target, &gold, &shop).await;
}

async fn clean(target: &Server, gold: &str, shop: &str) {
    for instance in target.instances().await.unwrap_or_default() {
        let (name, project) = (instance["name"].as_str().unwrap_or_default(), &instance["project"]);
        let uses = instance["profiles"]
            .as_array()
            .is_some_and(|p| p.contains(&json!(gold)));
        if uses || *project == json!(shop) {
            let _ = target.delete_in(name, project.as_str().unwrap_or("default")).await;
        }
    }
    for path in [format!("/1.0/profiles/{gold}"), format!("/1.0/projects/{shop}")] {
        let gone = target.call("DELETE", &path, Value::Null).await;
        gone.unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

pub async fn keys_devices_and_profiles_each_travel_with_a_move_on_incus(test: Test) {
    each(&test, "i1", "i2", 0..5).await;
}

pub async fn keys_devices_and_profiles_each_travel_with_a_move_on_lxd(test: Test) {
    each(&test, "l1", "l2", 0..5).await;
}

pub async fn removals_pool_and_project_each_travel_with_a_move_on_incus(test: Test) {
    each(&test, "i2", "i1", 5..10).await;
}

pub async fn removals_pool_and_project_each_travel_with_a_move_on_lxd(test: Test) {
    each(&test, "l2", "l1", 5..10).await;
}

async fn all_together(test: &Test, from: &str, to: &str) {
    test.add_servers(&[from, to]).await;
    let target = test.lab().server(to);
    let gold = profile(test, target, "gold", json!({"config": {"user.tier": "gold"}})).await;
    let shop = project(test, target).await;
    let new = NewInstance {
        config: vec![("user.old".into(), "old".into()), ("user.mine".into(), "mine".into())],
        devices: json!({"usb9": {"type": "none"}}),
        snapshots: 1,
        ..with_data("default")
    };
    let web = subject(test, from, "web", &new).await;
    let renamed = test.unique("shop-web");
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, from, SOON).await;
    let spec = json!({
        "target": {"server": to, "pool": "btr", "project": shop, "name": renamed},
        "transfer": "Push", "snapshots": "Exclude",
        "overrides": {
            "config": {"limits.memory": "64MiB", "boot.autostart": "false", "user.mine": ""},
            "devices": {
                "eth0": {"type": "none"}, "root": {"size": "2GiB"},
            },
            "removeDevices": ["usb9"], "removeConfig": ["user.old"], "profiles": ["default", gold],
        },
    });
    test.patch("InstancePlacement", &web.name, json!({"spec": spec})).await;
    test.wait_in_place(&web.name, to, SOON).await;
    let i = target
        .instance_in(&renamed, &shop)
        .await
        .unwrap_or_else(|| panic!("{renamed} arrived"));
    let (config, devices) = (&i["config"], &i["devices"]);
    assert_eq!(config["volatile.uuid"], web.uuid);
    assert_eq!(
        (&config["limits.memory"], &config["boot.autostart"]),
        (&json!("64MiB"), &json!("false"))
    );
    assert!(
        config.get("user.old").is_none() && config.get("user.mine").is_none(),
        "{config}"
    );
    assert_eq!(devices["eth0"], json!({"type": "none"}));
    assert!(devices.get("usb9").is_none(), "{devices}");
    assert_eq!(
        (&devices["root"]["pool"], &devices["root"]["size"]),
        (&json!("btr"), &json!("2GiB"))
    );
    assert_eq!(i["profiles"], json!(["default", gold]));
    assert_eq!(i["status"], "Running");
    assert_eq!(test.moves(&web.name).await.len(), 1, "one move did it all");
    test.delete("InstancePlacement", &web.name).await;
    clean(target, &gold, &shop).await;
}

pub async fn all_overrides_together_travel_with_a_move_on_incus(test: Test) {
    all_together(&test, "i2", "i1").await;
}

pub async fn all_overrides_together_travel_with_a_move_on_lxd(test: Test) {
    all_together(&test, "l2", "l1").await;
}

pub async fn overrides_come_with_a_move_inside_a_cluster(test: Test) {
    test.add_servers(&["m1"]).await;
    let (cluster, name) = (test.lab().server("m1"), test.unique("web"));
    let on_first = NewInstance {
        member: Some("m1".into()),
        ..with_data("default")
    };
    cluster.create(&name, &on_first).await;
    let web = known(cluster, &name).await;
    let _controller = test.controller().await;
    let spec = json!({
        "target": {"member": "m2"},
        "overrides": {"config": {"environment.TEAM": "blue"}, "devices": {"root": {"size": "2GiB"}}},
    });
    test.place(&Placement::new(&name, "m1").with(spec)).await;
    test.wait_in_place(&name, "m1", SOON).await;
    let instance = show(cluster, &name).await;
    assert_eq!(instance["location"], "m2");
    assert_eq!(instance["config"]["environment.TEAM"], "blue");
    assert_eq!(instance["devices"]["root"]["size"], "2GiB");
    assert_eq!(instance["config"]["volatile.uuid"], web.uuid);
    cluster.wait_counting(&name).await;
    assert_eq!(cluster.boots(&name).await, 2, "one stop for both");
    assert_eq!(test.moves(&name).await.len(), 1);
}
