//! What goes over the wire: objects in, requests out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_client::{RequestClass, RequestRecord};
use berth_core::model::{Change, Definition, InstanceKind, InstanceRef, Power, Product};
use berth_core::server::{
    AcceptRequest, Channel, FailureKind, OfferRequest, OperationId, Peer, PowerAction, Relocation, Server,
};
use serde_json::{Value, json};

use crate::fake::{Asked, Fake, Reply, begun, error, sync};
use crate::{Capture, client};

fn web() -> InstanceRef {
    InstanceRef::new("shop", "web-1")
}

#[tokio::test]
async fn the_inventory_of_both_products_is_read() {
    for (capture, product) in [("03-inventory-incus-6.0.4", "incus"), ("03-inventory-lxd-5.0.2", "lxd")] {
        let recorded = Capture::open(capture).get("/1.0/instances?recursion=1");
        let fake = Fake::reading(vec![("/1.0/instances?recursion=1&all-projects=true", recorded)]).await;
        let list = client(&fake).inventory().await.unwrap();
        let named = |name: &str| {
            list.iter()
                .find(|i| i.at.name == name)
                .unwrap_or_else(|| panic!("{product}: {name}"))
        };
        assert_eq!(list.len(), 3, "{product}");
        assert_eq!(named("run1").power, Power::Running);
        assert_eq!(named("stp1").power, Power::Stopped);
        let i = named("snap1");
        assert_eq!(
            (i.at.project.as_str(), i.kind, i.known),
            ("default", InstanceKind::Container, true)
        );
        assert_eq!(
            (i.root_pool(), &i.member, i.profiles.as_slice()),
            (Some("btr"), &None, &["default".to_owned()][..])
        );
        assert!(i.uuid().is_some() && !i.created_at.is_empty() && i.expanded_devices.contains_key("eth0"));
    }
}

#[tokio::test]
async fn one_instance_comes_with_its_entity_tag_and_snapshots_without_a_never() {
    for capture in ["03-inventory-incus-6.0.4", "03-inventory-lxd-5.0.2"] {
        let recorded = Capture::open(capture);
        let fake = Fake::reading(vec![
            (
                "/1.0/instances/run1?project=default",
                recorded.get("/1.0/instances/run1"),
            ),
            (
                "/1.0/instances/run1/snapshots?project=default&recursion=1",
                recorded.get("/1.0/instances/snap1/snapshots?recursion=1"),
            ),
        ])
        .await;
        let (server, at) = (client(&fake), InstanceRef::new("default", "run1"));
        let fresh = server.instance(&at).await.unwrap().unwrap();
        assert_eq!((fresh.etag.as_str(), &fresh.instance.at), ("\"tag\"", &at));
        let snapshots = server.snapshots(&at).await.unwrap();
        assert_eq!(
            snapshots.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(),
            ["s0", "s1"]
        );
        assert!(
            snapshots
                .iter()
                .all(|s| s.expires_at.is_none() && s.created_at.starts_with("2026-"))
        );
        assert_eq!(server.instance(&InstanceRef::new("default", "nobody")).await, Ok(None));
    }
}

#[tokio::test]
async fn an_entry_of_a_member_that_does_not_answer_is_known_for_what_it_is() {
    let stub = json!({"name": "far", "project": "shop", "location": "m3", "type": "virtual-machine", "status": "Error",
        "status_code": 112, "config": null, "devices": null, "profiles": null, "expanded_config": null, "news": {"a": 1}});
    let ready = json!({"name": "near", "project": "shop", "location": "m1", "type": "container", "status": "Ready",
        "status_code": 113, "config": {"volatile.uuid": "u"}, "architecture": "x86_64"});
    let fake = Fake::reading(vec![(
        "/1.0/instances?recursion=1&all-projects=true",
        sync(json!([stub, ready])),
    )])
    .await;
    let list = client(&fake).inventory().await.unwrap();
    assert_eq!(
        (list[0].known, list[0].power, list[0].member.as_deref()),
        (false, Power::Error, Some("m3"))
    );
    assert_eq!(list[0].kind, InstanceKind::VirtualMachine);
    assert_eq!((list[1].known, list[1].power), (true, Power::Running));
}

fn facts_answers(server: Value, extra: Vec<(&'static str, Value)>) -> Vec<(&'static str, Value)> {
    let projects = json!([{"name": "default", "config": {"features.profiles": "true"}},
        {"name": "shop", "config": {"features.profiles": "true"}}, {"name": "lent", "config": null}]);
    let mut all = vec![("/1.0", server), ("/1.0/projects?recursion=1", sync(projects))];
    all.extend(extra);
    all
}

#[tokio::test]
async fn the_facts_of_incus_are_read_in_bulk() {
    for (capture, version) in [("01-get-1.0-incus-6.0.4", "6.0.4"), ("01-get-1.0-incus-7.0.2", "7.0.2")] {
        let recorded = Capture::open("03-inventory-incus-6.0.4");
        let profiles = json!([{"name": "default", "project": "shop", "config": {}, "devices": {}}]);
        let fake = Fake::reading(facts_answers(
            Capture::open(capture).get("/1.0"),
            vec![
                (
                    "/1.0/storage-pools?recursion=1",
                    recorded.get("/1.0/storage-pools?recursion=1"),
                ),
                ("/1.0/profiles?recursion=1&all-projects=true", sync(profiles)),
                (
                    "/1.0/networks?recursion=1&all-projects=true",
                    recorded.get("/1.0/networks?recursion=1"),
                ),
            ],
        ))
        .await;
        let facts = client(&fake).facts().await.unwrap();
        assert_eq!((facts.product, facts.version.as_str()), (Product::Incus, version));
        assert_eq!(
            (facts.containers, facts.virtual_machines, facts.clustered),
            (true, false, false)
        );
        assert_eq!(facts.pool("btr").map(|p| p.driver.as_str()), Some("btrfs"));
        assert!(facts.profile("shop", "default").is_some());
        assert!(facts.networks.iter().any(|n| n.managed) && facts.networks.iter().any(|n| !n.managed));
        assert_eq!(fake.asked().len(), 5);
    }
}

#[tokio::test]
async fn the_facts_of_lxd_5_are_read_for_each_project_that_has_its_own() {
    let recorded = Capture::open("03-inventory-lxd-5.0.2");
    let profile = recorded.get("/1.0/profiles/default")["metadata"].clone();
    let fake = Fake::reading(facts_answers(
        Capture::open("01-get-1.0-lxd-5.0.2").get("/1.0"),
        vec![
            (
                "/1.0/storage-pools?recursion=1",
                recorded.get("/1.0/storage-pools?recursion=1"),
            ),
            ("/1.0/profiles?recursion=1&project=default", sync(json!([profile]))),
            ("/1.0/profiles?recursion=1&project=shop", sync(Value::Null)),
            (
                "/1.0/networks?recursion=1&project=default",
                recorded.get("/1.0/networks?recursion=1"),
            ),
        ],
    ))
    .await;
    let facts = client(&fake).facts().await.unwrap();
    assert_eq!((facts.product, facts.version.as_str()), (Product::Lxd, "5.0.2"));
    assert!(
        facts.profile("lent", "default").is_some(),
        "a project without profiles sees those of default"
    );
    assert!(facts.profile("shop", "default").is_none());
    assert!(!facts.fingerprint.is_empty() && facts.pid > 0);
}

#[tokio::test]
async fn a_stale_tag_is_told_and_the_tag_is_sent_as_it_came() {
    let (status, body) = Capture::open("30-err-incus-etag-mismatch").nth(4);
    let fake = Fake::start(move |_| Reply::Json(status, body.clone())).await;
    let failure = client(&fake)
        .patch(&web(), &Change::default(), "\"c8c0\"")
        .await
        .unwrap_err();
    assert_eq!(failure.kind, FailureKind::Changed);
    assert_eq!(fake.asked()[0].if_match.as_deref(), Some("\"c8c0\""));
}

#[tokio::test]
async fn a_taken_name_is_told_in_the_words_of_every_product() {
    for capture in ["30-err-incus-name-conflict", "30-err-lxd-name-conflict"] {
        let (status, body) = Capture::open(capture).nth(2);
        let fake = Fake::start(move |_| Reply::Json(status, body.clone())).await;
        let failure = client(&fake).rename(&web(), "web-2").await.unwrap_err();
        assert_eq!(failure.kind, FailureKind::AlreadyExists, "{capture}: {failure}");
    }
}

#[tokio::test]
async fn names_are_encoded_and_cannot_reach_anything_else() {
    let fake = Fake::start(|_| Reply::Json(404, error(404, "not found"))).await;
    let odd = InstanceRef::new("a&b=c", "x/../y?z#é");
    let server = client(&fake);
    assert_eq!(server.instance(&odd).await, Ok(None));
    let move_it = Relocation {
        member: Some("@g&target=m1".to_owned()),
        ..Relocation::default()
    };
    server.relocate(&odd, &move_it).await.unwrap_err();
    let name = "/1.0/instances/x%2F..%2Fy%3Fz%23%C3%A9?project=a%26b%3Dc";
    assert_eq!(
        fake.paths(),
        [name.to_owned(), format!("{name}&target=%40g%26target%3Dm1")]
    );
}

#[tokio::test]
async fn an_oversized_answer_is_refused() {
    let fake = Fake::start(|_| Reply::Endless).await;
    let failure = client(&fake).instance(&web()).await.unwrap_err();
    assert_eq!(failure.kind, FailureKind::Protocol);
    assert!(failure.message.contains("larger than 8 MiB"), "{failure}");
}

#[tokio::test]
async fn what_is_not_understood_is_told_as_such() {
    for text in [
        "",
        "null",
        "[]",
        "{}",
        r#"{"type":"sync"}"#,
        r#"{"type":"news"}"#,
        r#"{"type":"sync","metadata":{"name":1}}"#,
    ] {
        let fake = Fake::start(move |_| Reply::Text(200, text)).await;
        assert_eq!(
            client(&fake).instance(&web()).await.unwrap_err().kind,
            FailureKind::Protocol,
            "{text}"
        );
    }
}

fn peer(address: &str) -> Peer {
    let secret = |s: &str| s.to_owned().into();
    let secrets = [("control".to_owned(), secret("c")), ("fs".to_owned(), secret("f"))].into();
    let channel = Channel {
        operation: OperationId("op-9".to_owned()),
        secrets,
    };
    Peer {
        address: address.to_owned(),
        certificate: "PEM".to_owned(),
        channel,
    }
}

fn definition() -> Definition {
    Definition {
        architecture: "x86_64".to_owned(),
        config: [("volatile.base_image".to_owned(), "abc".to_owned())].into(),
        devices: [("root".to_owned(), [("type".to_owned(), "disk".to_owned())].into())].into(),
        profiles: Vec::new(),
        ephemeral: false,
        description: String::new(),
    }
}

/// A server that begins an operation whatever it is asked, and what it was asked last.
async fn begins() -> Fake {
    let metadata = json!({"id": "op-1", "class": "websocket", "status_code": 103, "metadata":
        {"control": "c1", "fs": "f1", "entity_url": "/1.0/instances/x", "progress": {"stage": "s"}}});
    Fake::start(move |asked| match asked.method.as_str() {
        "GET" => Reply::Json(200, sync(json!({"id": "op-1", "status_code": 200}))),
        "PATCH" => Reply::Json(200, sync(json!({}))),
        _ => Reply::Json(202, begun("op-1", metadata.clone())),
    })
    .await
}

fn last(fake: &Fake) -> Asked {
    fake.asked().pop().expect("something was asked")
}

#[tokio::test]
async fn both_ends_of_a_pull_say_everything() {
    let fake = begins().await;
    let server = client(&fake);
    let channel = server
        .offer(
            &web(),
            &OfferRequest {
                live: false,
                instance_only: true,
                snapshot: None,
                push_to: None,
            },
        )
        .await
        .unwrap();
    assert_eq!(
        channel.secrets.keys().collect::<Vec<_>>(),
        ["control", "fs"],
        "and nothing else that stands there"
    );
    assert_eq!(
        last(&fake).body,
        json!({"migration": true, "live": false, "instance_only": true, "allow_inconsistent": false})
    );
    let request = AcceptRequest {
        at: web(),
        kind: InstanceKind::VirtualMachine,
        definition: definition(),
        member: Some("m2".to_owned()),
        live: true,
        instance_only: true,
        refresh: false,
        exclude_older: false,
        pull_from: Some(peer("https://10.0.0.1:8443")),
    };
    assert!(server.accept(&request).await.unwrap().secrets.is_empty());
    let asked = last(&fake);
    assert_eq!(
        (asked.method.as_str(), asked.path.as_str()),
        ("POST", "/1.0/instances?project=shop&target=m2")
    );
    assert_eq!(
        asked.body,
        json!({
            "name": "web-1", "type": "virtual-machine", "architecture": "x86_64", "profiles": [], "ephemeral": false,
            "description": "", "config": {"volatile.base_image": "abc"}, "devices": {"root": {"type": "disk"}},
            "source": {
                "type": "migration", "mode": "pull", "live": true, "instance_only": true, "refresh": false,
                "allow_inconsistent": false, "base-image": "abc", "certificate": "PEM",
                "operation": "https://10.0.0.1:8443/1.0/operations/op-9", "secrets": {"control": "c", "fs": "f"},
            },
        })
    );
}

#[tokio::test]
async fn both_ends_of_a_push_say_everything() {
    let fake = begins().await;
    let server = client(&fake);
    let push_to = Some(peer("https://10.0.0.2:8443/"));
    let sending = server
        .offer(
            &web(),
            &OfferRequest {
                live: false,
                instance_only: false,
                snapshot: None,
                push_to,
            },
        )
        .await
        .unwrap();
    assert!(sending.secrets.is_empty());
    assert_eq!(
        last(&fake).body["target"],
        json!({"operation": "https://10.0.0.2:8443/1.0/operations/op-9", "certificate": "PEM",
            "secrets": {"control": "c", "fs": "f"}})
    );
    let request = AcceptRequest {
        at: web(),
        kind: InstanceKind::Container,
        definition: definition(),
        member: None,
        live: false,
        instance_only: false,
        refresh: true,
        exclude_older: false,
        pull_from: None,
    };
    assert_eq!(server.accept(&request).await.unwrap().secrets.len(), 2);
    let source = last(&fake).body["source"].clone();
    assert_eq!(
        source,
        json!({"type": "migration", "mode": "push", "live": false, "instance_only": false, "refresh": true,
            "allow_inconsistent": false, "base-image": "abc"})
    );
}

#[tokio::test]
async fn an_end_that_waits_without_secrets_is_of_no_use() {
    let fake = Fake::start(|_| Reply::Json(202, begun("op-1", json!({"id": "op-1", "metadata": null})))).await;
    let offer = OfferRequest {
        live: false,
        instance_only: false,
        snapshot: None,
        push_to: None,
    };
    assert_eq!(
        client(&fake).offer(&web(), &offer).await.unwrap_err().kind,
        FailureKind::Protocol
    );
}

#[tokio::test]
async fn a_power_state_never_leaves_the_time_to_the_server() {
    let fake = begins().await;
    let server = client(&fake);
    let body = async |action| {
        server.set_power(&web(), action).await.unwrap();
        last(&fake).body
    };
    let expected = |action, timeout, force, stateful| json!({"action": action, "timeout": timeout, "force": force, "stateful": stateful});
    let stop = |seconds| PowerAction::Stop {
        timeout: Duration::from_secs(seconds),
    };
    assert_eq!(body(stop(90)).await, expected("stop", 90, false, false));
    assert_eq!(
        body(stop(0)).await,
        expected("stop", 1, false, false),
        "zero would kill"
    );
    assert_eq!(body(PowerAction::ForceStop).await, expected("stop", -1, true, false));
    assert_eq!(
        body(PowerAction::Unfreeze).await,
        expected("unfreeze", -1, false, false)
    );
    assert_eq!(
        body(PowerAction::Start { stateful: true }).await,
        expected("start", -1, false, true)
    );
    assert_eq!(last(&fake).path, "/1.0/instances/web-1/state?project=shop");
}

#[tokio::test]
async fn a_container_that_was_left_in_the_midst_of_freezing_is_frozen_before_it_goes_on() {
    let fake = Fake::start(
        |asked| match (asked.method.as_str(), asked.path.contains("operations")) {
            ("GET", true) => Reply::Json(200, sync(json!({"id": "op-1", "status_code": 200}))),
            ("GET", false) => Reply::Json(
                200,
                sync(json!({"name": "web-1", "status": "Freezing", "status_code": 109})),
            ),
            _ => Reply::Json(202, begun("op-1", json!({"id": "op-1", "status_code": 103}))),
        },
    )
    .await;
    client(&fake).set_power(&web(), PowerAction::Unfreeze).await.unwrap();
    let asked = fake.asked().into_iter().filter(|a| a.method == "PUT");
    let actions: Vec<Value> = asked.map(|a| a.body["action"].clone()).collect();
    assert_eq!(actions, ["freeze", "unfreeze"]);
}

#[tokio::test]
async fn a_move_inside_the_server_names_only_what_changes() {
    let fake = begins().await;
    let server = client(&fake);
    let plain = Relocation {
        member: Some("m2".to_owned()),
        ..Relocation::default()
    };
    server.relocate(&web(), &plain).await.unwrap();
    assert_eq!(last(&fake).path, "/1.0/instances/web-1?project=shop&target=m2");
    assert_eq!(
        last(&fake).body,
        json!({"name": "web-1", "migration": true, "live": false, "instance_only": false})
    );
    let elsewhere = Relocation {
        pool: Some("fast".to_owned()),
        project: Some("lab".to_owned()),
        name: Some("web-2".to_owned()),
        live: true,
        ..Relocation::default()
    };
    server.relocate(&web(), &elsewhere).await.unwrap();
    assert_eq!(
        last(&fake).body,
        json!({"name": "web-2", "migration": true, "live": true, "instance_only": false, "pool": "fast", "project": "lab"})
    );
    server.rename(&web(), "web-3").await.unwrap();
    assert_eq!(
        last(&fake).body,
        json!({"name": "web-3", "migration": false, "live": false, "instance_only": false})
    );
}

#[tokio::test]
async fn a_patch_sends_only_the_change_and_a_put_everything_and_waits_for_its_end() {
    let fake = begins().await;
    let server = client(&fake);
    let config: BTreeMap<String, String> = [("user.a".to_owned(), String::new())].into();
    let change = Change {
        config,
        ..Change::default()
    };
    server.patch(&web(), &change, "\"t\"").await.unwrap();
    assert_eq!(last(&fake).body, json!({"config": {"user.a": ""}}));
    server.put(&web(), &definition(), "\"t\"").await.unwrap();
    let asked = fake.asked();
    let [put, wait] = &asked[asked.len() - 2..] else {
        panic!("two requests")
    };
    assert_eq!(
        (put.method.as_str(), put.if_match.as_deref(), &put.body["profiles"]),
        ("PUT", Some("\"t\""), &json!([]))
    );
    assert_eq!(wait.path, "/1.0/operations/op-1/wait?timeout=30");
}

#[tokio::test]
async fn every_request_is_reported_to_the_observer() {
    let fake = begins().await;
    let seen: Arc<Mutex<Vec<RequestRecord>>> = Arc::default();
    let sink = Arc::clone(&seen);
    let server = client(&fake).with_observer(Arc::new(move |record| sink.lock().unwrap().push(record)));
    server.remove(&web()).await.unwrap();
    server
        .wait(&OperationId("op-1".to_owned()), Duration::from_secs(1))
        .await
        .unwrap();
    let seen = seen.lock().unwrap();
    let said: Vec<_> = seen.iter().map(|r| (r.method, r.class, r.status)).collect();
    assert_eq!(
        said,
        [
            ("DELETE", RequestClass::Remove, Some(202)),
            ("GET", RequestClass::Wait, Some(200))
        ]
    );
    assert!(seen.iter().all(|r| r.bytes > 0));
}

#[tokio::test]
async fn a_snapshot_is_offered_without_what_only_an_instance_has_and_deleted_by_its_name() {
    let fake = begins().await;
    let server = client(&fake);
    let offer = OfferRequest {
        live: false,
        instance_only: false,
        snapshot: Some("berth-x/../y".to_owned()),
        push_to: None,
    };
    server.offer(&web(), &offer).await.unwrap();
    let asked = last(&fake);
    assert_eq!(
        asked.path,
        "/1.0/instances/web-1/snapshots/berth-x%2F..%2Fy?project=shop"
    );
    assert_eq!(
        asked.body,
        json!({"name": "berth-x/../y", "migration": true, "live": false})
    );
    server.remove_snapshot(&web(), "berth-x").await.unwrap();
    let asked = last(&fake);
    assert_eq!(
        (asked.method.as_str(), asked.path.as_str()),
        ("DELETE", "/1.0/instances/web-1/snapshots/berth-x?project=shop")
    );
    let end: jiff::Timestamp = "2026-11-30T00:00:00Z".parse().unwrap();
    server.snapshot(&web(), "berth-x", Some(end)).await.unwrap();
    assert_eq!(
        last(&fake).body,
        json!({"name": "berth-x", "stateful": false, "expires_at": "2026-11-30T00:00:00Z"})
    );
}

#[tokio::test]
async fn the_room_of_a_pool_is_asked_for_and_one_that_does_not_know_its_size_says_nothing() {
    let fake = Fake::reading(vec![
        (
            "/1.0/storage-pools/nvme/resources?target=node-3",
            sync(json!({"space": {"used": 3, "total": 10}, "inodes": {"used": 1, "total": 2}})),
        ),
        ("/1.0/storage-pools/odd/resources", sync(json!({"space": {"used": 0}}))),
    ])
    .await;
    let server = client(&fake);
    assert_eq!(server.free_space("nvme", Some("node-3")).await.unwrap(), Some(7));
    assert_eq!(server.free_space("odd", None).await.unwrap(), None);
}
