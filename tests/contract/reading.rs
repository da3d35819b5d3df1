//! What can be read, and what a missing thing reads as.

use std::time::Duration;

use berth_core::model::{InstanceRef, Power};
use berth_core::server::{FailureKind, OperationId, OperationState, ServerEvent};
use futures::StreamExt;

use super::{LONG, New, RUNNING, STOPPED, World, at, done, instance, kind, refused, start, wait_end};

pub async fn a_server_says_what_it_is_and_has(world: &dyn World) {
    let facts = world.source().facts().await.expect("the server answers");
    assert_eq!(facts.product, world.product());
    assert_eq!(facts.fingerprint.len(), 64, "{}", facts.fingerprint);
    assert!(facts.certificate.contains("BEGIN CERTIFICATE"));
    assert!(facts.containers);
    assert!(facts.pid > 0);
    assert!(facts.pool("default").is_some(), "{:?}", facts.pools);
    assert!(facts.project("default").is_some(), "{:?}", facts.projects);
    assert!(facts.profile("default", "default").is_some(), "{:?}", facts.profiles);
    assert!(facts.extensions.contains("container_incremental_copy"));
    let other = world.target().facts().await.expect("the other server answers");
    assert_ne!(
        facts.fingerprint, other.fingerprint,
        "the fingerprint is the identity of a server"
    );
}

pub async fn an_instance_that_does_not_exist_is_nothing_and_not_an_error(world: &dyn World) {
    let nobody = at(&world.name("nobody"));
    let server = world.source();
    assert_eq!(server.instance(&nobody).await.expect("the server answers"), None);
    assert_eq!(
        kind(server.patch(&nobody, &Default::default(), "\"x\"").await),
        FailureKind::NotFound
    );
    assert_eq!(kind(server.rename(&nobody, "other").await), FailureKind::NotFound);
    assert_eq!(kind(server.remove(&nobody).await), FailureKind::NotFound);
    assert_eq!(kind(server.snapshots(&nobody).await), FailureKind::NotFound);
    let nowhere = InstanceRef::new("no-such-project", "nobody");
    assert_eq!(server.instance(&nowhere).await.expect("the server answers"), None);
}

pub async fn a_name_with_odd_characters_reaches_nothing_else(world: &dyn World) {
    let name = world.name("odd");
    world.make(&name, STOPPED).await;
    let server = world.source();
    for odd in [
        format!("{name}?project=other"),
        format!("{name}/state"),
        format!("../instances/{name}"),
        "..".to_owned(),
    ] {
        // some versions say that there is none, some that there cannot be one
        let found = server.instance(&at(&odd)).await;
        assert!(!matches!(found, Ok(Some(_))), "{odd}: {found:?}");
        assert!(server.remove(&at(&odd)).await.is_err(), "{odd}");
    }
    let odd_project = InstanceRef::new("default&x=y", &name);
    assert!(!matches!(server.instance(&odd_project).await, Ok(Some(_))));
    assert!(server.instance(&at(&name)).await.expect("the server answers").is_some());
}

pub async fn the_inventory_shows_the_same_as_the_instance_itself(world: &dyn World) {
    let name = world.name("same");
    world.make(&name, RUNNING).await;
    let list = world.source().inventory().await.expect("the server answers");
    let listed = list.iter().find(|i| i.at == at(&name)).expect("the inventory has it");
    let alone = instance(world.source(), &name).await;
    assert_eq!(listed, &alone);
    assert!(alone.known);
    assert_eq!(alone.power, Power::Running);
    assert_eq!(alone.member, None, "there is no cluster here");
    assert_eq!(alone.root_pool(), Some("default"));
    assert!(alone.uuid().is_some());
}

pub async fn snapshots_come_oldest_first_and_a_taken_name_is_refused(world: &dyn World) {
    let name = world.name("snaps");
    world
        .make(
            &name,
            New {
                snapshots: 2,
                ..STOPPED
            },
        )
        .await;
    let server = world.source();
    done(server, server.snapshot(&at(&name), "a-third", None).await).await;
    let names = |list: Vec<berth_core::model::Snapshot>| list.into_iter().map(|s| s.name).collect::<Vec<_>>();
    let list = server.snapshots(&at(&name)).await.expect("the server answers");
    assert_eq!(names(list), ["s0", "s1", "a-third"]);
    refused(server, server.snapshot(&at(&name), "s0", None).await).await;
}

pub async fn an_operation_is_known_for_a_while_and_then_gone(world: &dyn World) {
    let name = world.name("gone");
    world.make(&name, STOPPED).await;
    let server = world.source();
    let begun = server.snapshot(&at(&name), "s0", None).await.expect("it begins");
    assert_eq!(wait_end(server, &begun).await, OperationState::Succeeded);
    assert_eq!(
        server.wait(&begun, LONG).await.expect("the server answers"),
        OperationState::Succeeded
    );
    let running = server.operations().await.expect("the server answers");
    assert!(running.iter().all(|o| o.id != begun), "what ended does not run");
    let mut last = OperationState::Succeeded;
    for _ in 0..400 {
        last = server
            .wait(&begun, Duration::from_secs(1))
            .await
            .expect("the server answers");
        if last == OperationState::Gone {
            break;
        }
        world.pause().await;
    }
    assert_eq!(last, OperationState::Gone, "five seconds after its end");
    let never = OperationId("00000000-0000-4000-8000-000000000000".to_owned());
    assert_eq!(
        server.wait(&never, LONG).await.expect("the server answers"),
        OperationState::Gone
    );
    assert_eq!(kind(server.cancel(&never).await), FailureKind::NotFound);
}

pub async fn a_start_is_in_the_event_stream(world: &dyn World) {
    let name = world.name("event");
    world.make(&name, STOPPED).await;
    let server = world.source();
    let mut events = server.events().await.expect("the server lets us listen");
    start(server, &name).await;
    let (mut started, mut ended) = (false, false);
    while !(started && ended) {
        let next = tokio::time::timeout(LONG, events.next()).await.expect("an event comes");
        match next.expect("the stream goes on") {
            ServerEvent::Instance { at: who, action, .. } if who == at(&name) => {
                started |= action == "instance-started";
            }
            ServerEvent::Operation(operation, OperationState::Succeeded) => {
                ended |= operation.instances.contains(&at(&name));
            }
            _ => {}
        }
    }
}
