//! The harness proves itself: the control plane, the servers, their faults.

use std::time::Duration;

use berth_tests::{Fate, NewInstance, Proxy, Test, wait_until};
use serde_json::json;

berth_tests::suite! {
    needs: [Kube, Lab],
    together: [
        every_test_has_a_namespace_and_the_project_has_its_kinds,
        writes_are_counted_by_the_audit_log,
        an_instance_counts_and_runs_commands_on_every_kind_of_server,
        an_instance_keeps_its_data_when_it_is_moved_by_hand,
        a_proxy_counts_requests_and_carries_websockets,
        a_request_that_a_proxy_holds_reaches_the_server_after_its_sender_died,
    ],
    alone: [
        a_daemon_that_is_killed_leaves_its_containers_running,
        a_daemon_that_crashes_is_started_again_and_told,
        a_host_that_is_killed_boots_again_with_its_data,
        the_api_server_is_killed_and_comes_back,
    ],
    incus7: [an_instance_moves_from_incus_6_to_incus_7_by_hand],
}

async fn every_test_has_a_namespace_and_the_project_has_its_kinds(test: Test) {
    let namespaces = test
        .kube()
        .kubectl(&["get", "namespaces", "-o", "name"])
        .await
        .expect("kubectl works");
    assert!(namespaces.contains(&test.namespace()), "{namespaces}");
    let refused = test
        .try_apply("{apiVersion: berth.dev/v1alpha1, kind: Nonsense, metadata: {name: x}}")
        .await;
    assert!(refused.is_err());
}

async fn writes_are_counted_by_the_audit_log(test: Test) {
    test.apply("{apiVersion: v1, kind: ConfigMap, metadata: {name: seen}}")
        .await;
    wait_until("the write to be logged", Duration::from_secs(5), || async {
        let mine = |event: &berth_tests::AuditEvent| event.object_ref.namespace == test.namespace();
        test.kube()
            .writes()
            .iter()
            .filter(|event| mine(event))
            .any(|event| event.object_ref.name == "seen")
    })
    .await;
}

async fn an_instance_counts_and_runs_commands_on_every_kind_of_server(test: Test) {
    for (server, new) in [
        (
            "i1",
            NewInstance {
                megabytes: 2,
                snapshots: 2,
                ..NewInstance::on_pool("btr")
            },
        ),
        (
            "l1",
            NewInstance {
                megabytes: 2,
                snapshots: 2,
                ..NewInstance::default()
            },
        ),
        (
            "m1",
            NewInstance {
                member: Some("m2".to_owned()),
                ..NewInstance::default()
            },
        ),
    ] {
        let server = test.lab().server(server);
        let name = test.unique("web");
        server.create(&name, &new).await;
        assert_eq!(server.status(&name).await, "Running");
        assert_eq!(server.boots(&name).await, 1);
        assert_eq!(
            server.exec(&name, &["hostname"]).await.expect("exec works").trim(),
            name
        );
        assert_eq!(server.checksum(&name, "/root/data").await.is_some(), new.megabytes > 0);
        let snapshots = server
            .get(&format!("/1.0/instances/{name}/snapshots"))
            .await
            .expect("a list");
        assert_eq!(snapshots.as_array().map(Vec::len), Some(new.snapshots));
    }
}

async fn an_instance_moves_from_incus_6_to_incus_7_by_hand(test: Test) {
    let (old, new) = (test.lab().server("i1"), test.lab().server("t1"));
    assert!(new.version.starts_with("7."), "{}", new.version);
    let name = test.unique("web");
    let stopped = NewInstance {
        megabytes: 2,
        start: false,
        ..NewInstance::on_pool("btr")
    };
    old.create(&name, &stopped).await;
    let (from, to) = (format!("i1:{name}"), format!("t1:{name}"));
    let moved = test.lab().incus(&["move", &from, &to]).await;
    moved.unwrap_or_else(|error| panic!("{error}"));
    new.set_state(&name, "start").await;
    new.wait_counting(&name).await;
    assert!(new.checksum(&name, "/root/data").await.is_some(), "its data are there");
}

async fn an_instance_keeps_its_data_when_it_is_moved_by_hand(test: Test) {
    let lab = test.lab();
    let (i1, i2) = (lab.server("i1"), lab.server("i2"));
    let name = test.unique("web");
    i1.create(
        &name,
        &NewInstance {
            megabytes: 1,
            ..NewInstance::default()
        },
    )
    .await;
    let sum = i1.checksum(&name, "/root/data").await;
    i1.set_state(&name, "stop").await;
    let counter = i1.counter(&name).await;
    lab.incus(&["move", &format!("i1:{name}"), &format!("i2:{name}")])
        .await
        .expect("incus moves it");
    assert_eq!(lab.whereabouts(&name).await, [("i2".to_owned(), "Stopped".to_owned())]);
    assert_eq!(i2.checksum(&name, "/root/data").await, sum);
    i2.set_state(&name, "start").await;
    i2.wait_counting(&name).await;
    assert!(i2.counter(&name).await > counter);
}

/// `curl` as the lab's client, which also does not look at names.
fn curl(test: &Test, url: &str, args: &[&str]) -> tokio::process::Command {
    let (cert, key) = (test.dir().join("client.crt"), test.dir().join("client.key"));
    std::fs::write(&cert, test.lab().client_cert()).expect("the test's folder can be written");
    std::fs::write(&key, test.lab().client_key()).expect("the test's folder can be written");
    let mut command = tokio::process::Command::new("curl");
    command
        .args(["-sk", "--cert"])
        .arg(cert)
        .arg("--key")
        .arg(key)
        .args(args)
        .arg(url)
        .kill_on_drop(true);
    command
}

async fn a_proxy_counts_requests_and_carries_websockets(test: Test) {
    let server = test.lab().server("i1");
    let proxy = Proxy::start(test.lab(), server).await;
    let answer = curl(&test, &format!("{}/1.0", proxy.url()), &[])
        .output()
        .await
        .expect("curl runs");
    let answer = String::from_utf8_lossy(&answer.stdout).into_owned();
    assert!(
        answer.contains(r#""auth":"trusted""#) && answer.contains(&server.fingerprint),
        "{answer}"
    );

    let handshake = [
        "-N",
        "--http1.1",
        "-H",
        "Connection: Upgrade",
        "-H",
        "Upgrade: websocket",
    ];
    let key = [
        "-H",
        "Sec-WebSocket-Version: 13",
        "-H",
        "Sec-WebSocket-Key: c2l4dGVlbiBieXRlcyEhIQ==",
    ];
    let url = format!("{}/1.0/events?type=lifecycle", proxy.url());
    let events = test.dir().join("events");
    let file = std::fs::File::create(&events).expect("the test's folder can be written");
    let mut listener = curl(&test, &url, &[&handshake[..], &key].concat())
        .stdout(file)
        .spawn()
        .expect("curl runs");
    wait_until("the listener to be connected", Duration::from_secs(10), || async {
        proxy.count(|seen| seen.path == "/1.0/events") == 1
    })
    .await;
    let name = test.unique("web");
    server
        .create(
            &name,
            &NewInstance {
                start: false,
                ..NewInstance::default()
            },
        )
        .await;
    wait_until(
        "an event to come through the proxy",
        Duration::from_secs(10),
        || async {
            let text = std::fs::read(&events).unwrap_or_default();
            String::from_utf8_lossy(&text).contains(&name) || {
                server.patch(&name, json!({"description": test.sentence()})).await;
                false
            }
        },
    )
    .await;
    listener.kill().await.expect("curl ends");
    assert_eq!(proxy.seen().len(), 2);
}

async fn a_request_that_a_proxy_holds_reaches_the_server_after_its_sender_died(test: Test) {
    let server = test.lab().server("l1");
    let name = test.unique("web");
    server
        .create(
            &name,
            &NewInstance {
                start: false,
                ..NewInstance::default()
            },
        )
        .await;
    let proxy = Proxy::start(test.lab(), server).await;
    proxy.rule(|seen| {
        if seen.method == "DELETE" {
            Fate::Hold
        } else {
            Fate::Pass
        }
    });
    let url = format!("{}/1.0/instances/{name}", proxy.url());
    let mut sender = curl(&test, &url, &["-X", "DELETE"]).spawn().expect("curl runs");
    proxy.wait_held(Duration::from_secs(10)).await;
    sender.kill().await.expect("curl ends");
    assert_eq!(server.status(&name).await, "Stopped");
    proxy.release().await;
    wait_until("the instance to be gone", Duration::from_secs(10), || async {
        server.status(&name).await == "absent"
    })
    .await;
}

async fn a_daemon_that_is_killed_leaves_its_containers_running(test: Test) {
    let server = test.lab().server("i1");
    let name = test.unique("web");
    server.create(&name, &NewInstance::default()).await;
    let before = server.daemon_pid().await;
    server.kill_daemon().await;
    assert!(server.instances().await.is_err());
    server.start_daemon().await;
    assert_ne!(server.daemon_pid().await, before);
    server.wait_counting(&name).await;
    assert_eq!(server.boots(&name).await, 1);
}

async fn a_daemon_that_crashes_is_started_again_and_told(test: Test) {
    let server = test.lab().server("l1");
    let before = server.daemon_pid().await;
    // not by the lab, which would know of it
    server.paste_on_host(&format!("kill -ABRT {before}")).await;
    wait_until("another daemon to answer", Duration::from_secs(60), || async {
        server.get("/1.0").await.is_ok() && server.daemon_pid().await != before
    })
    .await;
    let told = test.lab().take_ends();
    assert!(
        told.contains("the daemon of l1 ended by itself") && told.contains("SIGABRT"),
        "{told}"
    );
}

async fn a_host_that_is_killed_boots_again_with_its_data(test: Test) {
    let server = test.lab().server("l2");
    let name = test.unique("web");
    server.create(&name, &NewInstance::default()).await;
    server.kill_host().await;
    server.start_host().await;
    // what ran is started again with the host
    server.wait_counting(&name).await;
    assert_eq!(server.boots(&name).await, 2);
}

async fn the_api_server_is_killed_and_comes_back(test: Test) {
    test.kube().kill_apiserver().await;
    assert!(test.kube().client().apiserver_version().await.is_err());
    test.kube().start_apiserver().await;
    test.apply("{apiVersion: v1, kind: ConfigMap, metadata: {name: after}}")
        .await;
}
