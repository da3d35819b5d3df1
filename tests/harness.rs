//! The harness proves itself: the control plane, the servers, their faults.

use std::time::Duration;

use berth_tests::{NewInstance, Test, wait_until};

berth_tests::suite! {
    needs: [Kube, Lab],
    together: [
        every_test_has_a_namespace_and_the_project_has_its_kinds,
        writes_are_counted_by_the_audit_log,
        an_instance_counts_and_runs_commands_on_every_kind_of_server,
        an_instance_keeps_its_data_when_it_is_moved_by_hand,
    ],
    alone: [
        a_daemon_that_is_killed_leaves_its_containers_running,
        a_host_that_is_killed_boots_again_with_its_data,
        the_api_server_is_killed_and_comes_back,
    ],
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
