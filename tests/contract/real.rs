//! What only real servers can show: trust, clusters, moves inside one server, both products together, silence.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use berth_client::{certificate_fingerprint, trust};
use berth_core::model::{InstanceRef, MemberStatus, Power};
use berth_core::server::{AcceptRequest, FailureKind, OfferRequest, Peer, Relocation, Server, ServerEvent};
use berth_tests::{NewInstance, Test, wait_for};
use futures::StreamExt;
use secrecy::SecretString;
use serde_json::{Value, json};

use super::contract::{LONG, accept, at, done, instance, kind, refused, start};
use super::servers::client;

fn stopped() -> NewInstance {
    NewInstance {
        start: false,
        ..NewInstance::default()
    }
}

pub async fn a_token_makes_incus_trust_a_new_certificate(test: Test) {
    joins(&test, "i1").await;
}

pub async fn a_token_makes_lxd_trust_a_new_certificate(test: Test) {
    joins(&test, "l1").await;
}

/// A one-time token, as an administrator would make it.
async fn token(test: &Test, server: &str, name: &str, mut body: Value) -> SecretString {
    let server = test.lab().server(server);
    body["name"] = json!(name);
    body["type"] = json!("client");
    body["token"] = json!(true);
    // a token is an operation that runs until it is used: whoever waits for its end waits for us
    let made = server.call("POST", "/1.0/certificates", body);
    let shown = wait_for("the token", LONG, || async {
        let list = server
            .get("/1.0/operations?recursion=1")
            .await
            .map_err(|e| e.to_string())?;
        let running = list["running"].as_array().cloned().unwrap_or_default();
        let ours = running.into_iter().find(|o| o["metadata"]["request"]["name"] == name);
        ours.ok_or_else(|| list.to_string())
    });
    let operation = tokio::select! {
        ended = made => panic!("a token waits to be used: {ended:?}"),
        operation = shown => operation,
    };
    let said = &operation["metadata"];
    let token = json!({"client_name": name, "fingerprint": said["fingerprint"], "addresses": said["addresses"],
        "secret": said["secret"], "expires_at": "0001-01-01T00:00:00Z"});
    STANDARD.encode(token.to_string()).into()
}

async fn joins(test: &Test, server: &str) {
    let name = &test.unique("newcomer");
    let token = token(test, server, name, json!({})).await;
    let identity = trust::new_identity(name).expect("a certificate can be made");
    let stranger = client(test, &[server], Some(identity.clone()));
    assert_eq!(kind(stranger.facts().await), FailureKind::NotTrusted);
    for attempt in ["first", "again"] {
        let joined = trust::join(&[], &token, name, &identity).await;
        assert_eq!(joined.as_ref(), Ok(&test.lab().server(server).fingerprint), "{attempt}");
    }
    let friend = client(test, &[server], Some(identity.clone()));
    friend.facts().await.expect("it is trusted now");
    let fingerprint = certificate_fingerprint(&identity.certificate).expect("it is a certificate");
    let path = format!("/1.0/certificates/{fingerprint}");
    let removed = test.lab().server(server).call("DELETE", &path, Value::Null).await;
    removed.expect("trust can be removed");
    assert_eq!(kind(friend.inventory().await), FailureKind::NotTrusted);
    assert_eq!(kind(friend.remove(&at("nobody")).await), FailureKind::NotTrusted);
    assert_eq!(kind(friend.events().await.map(|_| ())), FailureKind::NotTrusted);
    let other = trust::new_identity(name).expect("a certificate can be made");
    trust::join(&[], &token, name, &other)
        .await
        .expect_err("a token serves once");
}

pub async fn a_cluster_is_one_server_with_members(test: Test) {
    let name = test.unique("member");
    let new = NewInstance {
        member: Some("m1".to_owned()),
        ..stopped()
    };
    test.lab().server("m1").create(&name, &new).await;
    let server = client(&test, &["m1", "m2"], None);
    let facts = server.facts().await.expect("the cluster answers");
    assert!(facts.clustered);
    assert_eq!(facts.groups, ["default"]);
    let members: Vec<_> = facts
        .members
        .iter()
        .map(|m| (m.name.as_str(), &m.status, m.architecture.as_str()))
        .collect();
    assert_eq!(
        members,
        ["m1", "m2", "m3"].map(|m| (m, &MemberStatus::Online, "x86_64"))
    );
    assert!(facts.members.iter().all(|m| m.groups == ["default"]));
    let other = client(&test, &["m3"], None)
        .facts()
        .await
        .expect("so does another member");
    assert_eq!(other.fingerprint, facts.fingerprint, "one identity");
    assert_eq!(instance(&server, &name).await.member.as_deref(), Some("m1"));
    let to = |member: &str| Relocation {
        member: Some(member.to_owned()),
        ..Relocation::default()
    };
    done(&server, server.relocate(&at(&name), &to("m2")).await).await;
    let moved = instance(&server, &name).await;
    assert_eq!((moved.member.as_deref(), moved.power), (Some("m2"), Power::Stopped));
    assert_eq!(
        kind(server.relocate(&at(&name), &to("nowhere")).await),
        FailureKind::NotFound
    );
    start(&server, &name).await;
    refused(&server, server.relocate(&at(&name), &to("m3")).await).await;
    assert_eq!(instance(&server, &name).await.member.as_deref(), Some("m2"));
    let operations = server.operations().await.expect("the cluster answers");
    assert!(
        operations.iter().all(|o| !o.instances.contains(&at(&name))),
        "{operations:?}"
    );
}

pub async fn a_cluster_is_reached_by_its_other_members(test: Test) {
    let m1 = test.lab().server("m1");
    let server = client(&test, &["m1", "m2"], None);
    server.facts().await.expect("the cluster answers");
    assert_eq!(server.address_in_use(), m1.url);
    m1.kill_daemon().await;
    let found = server.instance(&at("nobody")).await;
    m1.start_daemon().await;
    assert_eq!(found.expect("another member answers"), None);
    assert_eq!(server.address_in_use(), test.lab().server("m2").url);
}

pub async fn a_move_to_another_pool_keeps_the_instance_and_forgets_when_it_ran(test: Test) {
    for name in ["i1", "l1"] {
        let (server, web) = (client(&test, &[name], None), test.unique("pool"));
        test.lab()
            .server(name)
            .create(
                &web,
                &NewInstance {
                    start: true,
                    ..stopped()
                },
            )
            .await;
        super::contract::stop(&server, &web).await;
        let before = instance(&server, &web).await;
        let to = Relocation {
            pool: Some("btr".to_owned()),
            ..Relocation::default()
        };
        done(&server, server.relocate(&at(&web), &to).await).await;
        let after = instance(&server, &web).await;
        assert_eq!(
            (after.root_pool(), after.uuid()),
            (Some("btr"), before.uuid()),
            "{name}"
        );
        assert_eq!((after.power, &after.profiles), (Power::Stopped, &before.profiles));
        assert!(
            after.last_used_at.starts_with("1970-"),
            "{name}: {}",
            after.last_used_at
        );
    }
}

pub async fn a_move_to_another_project_keeps_the_instance(test: Test) {
    for name in ["i1", "l1"] {
        let (server, web, project) = (client(&test, &[name], None), test.unique("web"), test.unique("project"));
        let lab = test.lab().server(name);
        lab.create(&web, &stopped()).await;
        let config = json!({"features.profiles": "false", "features.images": "false"});
        let made = lab
            .call("POST", "/1.0/projects", json!({"name": project, "config": config}))
            .await;
        made.expect("a project can be made");
        let before = instance(&server, &web).await;
        let to = Relocation {
            project: Some(project.clone()),
            name: Some(format!("{web}-2")),
            ..Relocation::default()
        };
        done(&server, server.relocate(&at(&web), &to).await).await;
        let there = InstanceRef::new(&project, format!("{web}-2"));
        let after = server
            .instance(&there)
            .await
            .expect("the server answers")
            .expect("it is there");
        assert_eq!(after.instance.uuid(), before.uuid(), "{name}");
        let list = server.inventory().await.expect("the server answers");
        assert_eq!(list.iter().filter(|i| i.uuid() == before.uuid()).count(), 1, "{name}");
        assert!(list.iter().any(|i| i.at == there), "the inventory is of all projects");
        let facts = server.facts().await.expect("the server answers");
        assert!(
            facts.profile(&project, "default").is_some(),
            "it sees the profiles of default"
        );
        done(&server, server.remove(&there).await).await;
        let path = format!("/1.0/projects/{project}");
        lab.call("DELETE", &path, Value::Null).await.expect("it is empty");
    }
}

pub async fn an_instance_is_copied_from_lxd_to_incus(test: Test) {
    crosses(&test, "l1", "i1").await;
}

pub async fn an_instance_is_copied_from_incus_to_lxd(test: Test) {
    crosses(&test, "i1", "l1").await;
}

async fn crosses(test: &Test, from: &str, to: &str) {
    let name = test.unique("cross");
    test.lab().server(from).create(&name, &stopped()).await;
    let (source, target) = (client(test, &[from], None), client(test, &[to], None));
    let original = instance(&source, &name).await;
    let offer = OfferRequest {
        live: false,
        instance_only: false,
        snapshot: None,
        push_to: None,
    };
    let channel = source.offer(&at(&name), &offer).await.expect("the source offers");
    let waiting = channel.operation.clone();
    let peer = Peer {
        address: source.peer_address(),
        certificate: test.lab().server(from).certificate(),
        channel,
    };
    let mut request = AcceptRequest {
        pull_from: Some(peer),
        ..accept(&name, &original)
    };
    // keys that the other product does not know are for the decisions to drop
    request.definition.config.remove("volatile.uuid.generation");
    let receiving = target.accept(&request).await.expect("the target accepts");
    done(&target, Ok(receiving.operation)).await;
    done(&source, Ok(waiting)).await;
    assert_eq!(instance(&target, &name).await.uuid(), original.uuid());
    start(&target, &name).await;
}

pub async fn a_restricted_certificate_sees_its_projects_and_nothing_else(test: Test) {
    for server in ["i1", "l1"] {
        let (project, name) = (test.unique("own"), test.unique("restricted"));
        let lab = test.lab().server(server);
        let config = json!({"features.images": "false", "features.profiles": "true"});
        let made = lab
            .call("POST", "/1.0/projects", json!({"name": project, "config": config}))
            .await;
        made.expect("a project can be made");
        let hidden = test.unique("hidden");
        lab.create(&hidden, &stopped()).await;
        let own = NewInstance {
            project: project.clone(),
            ..stopped()
        };
        lab.create(&test.unique("seen"), &own).await;
        let restriction = json!({"restricted": true, "projects": [project]});
        let token = token(&test, server, &name, restriction).await;
        let identity = trust::new_identity(&name).expect("a certificate can be made");
        let joined = trust::join(&[], &token, &name, &identity).await;
        joined.expect("the token is taken");
        let client = client(&test, &[server], Some(identity));
        let facts = client.facts().await.expect("it may look");
        let projects: Vec<_> = facts.projects.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(projects, [project.as_str()], "{server}");
        assert!(facts.pool("default").is_some() && facts.profile(&project, "default").is_some());
        let list = client.inventory().await.expect("it may look");
        assert!(
            list.iter().all(|i| i.at.project == project) && list.len() == 1,
            "{server}: {list:?}"
        );
        assert_eq!(client.operations().await, Ok(vec![]));
        client.events().await.map(|_| ()).expect("it may listen");
        assert!(!matches!(client.instance(&at(&hidden)).await, Ok(Some(_))), "{server}");
        assert!(client.remove(&at(&hidden)).await.is_err());
    }
}

pub async fn an_event_stream_survives_a_minute_of_silence(test: Test) {
    futures::join!(stays_open(&test, "i2"), stays_open(&test, "l2"));
}

async fn stays_open(test: &Test, name: &str) {
    let server = client(test, &[name], None);
    let web = test.unique(&format!("heard-{name}"));
    let mut events = server.events().await.expect("the server lets us listen");
    let quiet = async { while events.next().await.is_some() {} };
    let quiet = tokio::time::timeout(Duration::from_secs(50), quiet).await;
    quiet.expect_err("the stream does not end");
    test.lab().server(name).create(&web, &stopped()).await;
    let heard = async {
        while let Some(event) = events.next().await {
            if matches!(&event, ServerEvent::Instance { at: who, .. } if *who == at(&web)) {
                return;
            }
        }
        panic!("the stream ended");
    };
    tokio::time::timeout(LONG, heard).await.expect("it is heard of");
}
