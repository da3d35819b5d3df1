//! What keeps a container from being moved live is said before anything is touched, as far as it can be known; a server
//! that lacks CRIU says so when a move is tried, and that is remembered for all.

use berth_tests::{NewInstance, Placement, SOON, Test, summary, wait_for};
use serde_json::{Value, json};

use super::{CONSOLE, ended, goes_on, last_move, live, ticking};

/// The rejections of the live method in the plan, once there are any of those reasons.
async fn rejected(test: &Test, name: &str, reasons: &[&str]) -> Vec<Value> {
    wait_for(&format!("the plan of {name} to name {reasons:?}"), SOON, || async {
        let placement = test.get("InstancePlacement", name).await.unwrap_or_default();
        let list = placement["status"]["plan"]["rejected"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let found: Vec<&str> = list.iter().filter_map(|r| r["reason"].as_str()).collect();
        if found == reasons {
            Ok(list)
        } else {
            Err(summary(&placement))
        }
    })
    .await
}

fn words(list: &[Value]) -> String {
    let message = |r: &Value| r["message"].as_str().unwrap_or_default().to_owned();
    list.iter().map(message).collect::<Vec<_>>().join("\n")
}

pub async fn each_condition_of_a_live_move_of_a_container_is_named_with_a_fix_that_works(test: Test) {
    let (lab, name) = (test.lab(), test.unique("web"));
    let source = lab.server("i1");
    let new = NewInstance {
        devices: json!({"eth0": {"type": "none"}, "null": {"type": "unix-char", "source": "/dev/null", "path": "/dev/null2"}}),
        ..NewInstance::default()
    };
    ticking(source, &name, &new).await;
    // as if systemd had started everything
    let made = source.exec(&name, &["mkdir", "-p", "/run/systemd/system"]).await;
    assert!(made.is_ok(), "{made:?}");
    test.add_servers(&["i1", "i2"]).await;
    test.controller().await;
    test.place(&Placement::new(&name, "i2").with(json!({"methods": ["Live"]})))
        .await;
    let list = rejected(&test, &name, &["MethodImpossible"]).await;
    assert!(words(&list).contains("spec.criu"), "{list:#?}");
    test.patch("InstancePlacement", &name, json!({"spec": {"criu": true}}))
        .await;
    let all = [
        "MigrationStatefulOff",
        "MethodImpossible",
        "MethodImpossible",
        "MethodImpossible",
        "LocalDevice",
    ];
    let list = rejected(&test, &name, &all).await;
    for said in ["migration.stateful", "console", "idmapped", "systemd", "null"] {
        assert!(words(&list).contains(said), "{said}: {list:#?}");
    }
    assert!(
        list.iter().all(|r| r["fix"].as_str().is_some_and(|f| !f.is_empty())),
        "{list:#?}"
    );
    assert!(test.moves(&name).await.is_empty());
    // nothing is moved meanwhile: some fixes stop it for a moment
    test.patch("InstancePlacement", &name, json!({"spec": {"suspend": true}}))
        .await;
    for said in ["migration.stateful", "console", "null"] {
        let one = list.iter().find(|r| r["message"].to_string().contains(said));
        lab.paste(one.unwrap_or(&Value::Null)["fix"].as_str().unwrap_or_default())
            .await;
    }
    let i = source.instance(&name).await.unwrap_or_default();
    let raw = i["config"]["raw.lxc"].as_str().unwrap_or_default();
    assert!(raw.contains(CONSOLE), "{i:#}");
    // what the lab's kernel needs besides, and the two whose fix is no command
    let rest = json!({"config": {"raw.lxc": NewInstance::RAW_LXC, "security.privileged": "true"}});
    source.patch(&name, rest).await;
    let anew = "rm -rf /run/systemd /var/log/init.log /var/log/ticks";
    let cleared = source.exec(&name, &["sh", "-c", anew]).await;
    assert!(cleared.is_ok(), "{cleared:?}");
    source.set_state(&name, "restart").await;
    test.patch("InstancePlacement", &name, json!({"spec": {"suspend": false}}))
        .await;
    test.wait_in_place(&name, "i2", SOON).await;
    assert_eq!(last_move(&test, &name).await["spec"]["method"], "Live");
    goes_on(lab.server("i2"), &name).await;
}

pub async fn a_server_without_criu_is_remembered_until_somebody_asks_again(test: Test) {
    let lab = test.lab();
    let (source, target) = (lab.server("i1"), lab.server("i2"));
    let names = ["first", "second"].map(|n| test.unique(n));
    for name in &names {
        ticking(source, name, &NewInstance::movable(true, false)).await;
    }
    let criu = target.criu();
    let away = criu.with_extension("away");
    std::fs::rename(&criu, &away).unwrap_or_else(|error| panic!("{}: {error}", criu.display()));
    test.add_servers(&["i1", "i2"]).await;
    test.controller().await;
    test.place(&Placement::new(&names[0], "i2").with(live())).await;
    let tried = ended(&test, &names[0], 0).await;
    assert_eq!(tried["status"]["undo"]["reason"], "CriuMissing", "{tried:#}");
    assert!(
        tried["status"]["undo"]["message"]
            .to_string()
            .contains("i2 has no CRIU"),
        "{tried:#}"
    );
    goes_on(source, &names[0]).await;
    // the other one learns it without a try
    test.place(&Placement::new(&names[1], "i2").with(live())).await;
    let list = rejected(&test, &names[1], &["CriuMissing"]).await;
    assert!(list[0]["fix"].to_string().contains("apt install criu"), "{list:#?}");
    assert!(test.moves(&names[1]).await.is_empty());
    std::fs::rename(&away, &criu).unwrap_or_else(|error| panic!("{}: {error}", criu.display()));
    for name in &names {
        test.ask_again("InstancePlacement", name, "now").await;
        test.wait_in_place(name, "i2", SOON).await;
        goes_on(target, name).await;
    }
}
