//! Operations: `/wait` as each version answers it, and what the lists and events say.

use std::time::Duration;

use berth_core::model::InstanceRef;
use berth_core::server::{FailureKind, OperationId, OperationState, Progress, Server, ServerEvent};
use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::fake::{self, Fake, Reply, begun, error, sync};
use crate::{Capture, client, client_of};

const TEN: Duration = Duration::from_secs(10);
const TEXT: &str = r#"Failed shutting down instance, status is "Running": context deadline exceeded"#;

fn operation() -> OperationId {
    OperationId("op-1".to_owned())
}

fn at_state(code: u16, err: &str) -> Value {
    sync(
        json!({"id": "op-1", "class": "task", "description": "Stopping instance", "status_code": code, "metadata": null,
        "resources": {"instances": ["/1.0/instances/web-1"]}, "err": err}),
    )
}

/// What `wait` makes of an answer to `/wait` and an answer to the look that may follow.
async fn waited(wait: (u16, Value), look: (u16, Value)) -> berth_core::server::Result<OperationState> {
    let fake = Fake::start(move |asked| {
        let (status, body) = if asked.path.contains("/wait?timeout=10") {
            &wait
        } else {
            &look
        };
        Reply::Json(*status, body.clone())
    })
    .await;
    client(&fake).wait(&operation(), TEN).await
}

fn unused() -> (u16, Value) {
    (500, error(500, "this is not asked for"))
}

#[tokio::test]
async fn a_recorded_failure_is_a_failure_in_every_version() {
    for (capture, look) in [
        ("30-err-incus-stop-timeout", (200, at_state(400, TEXT))),
        ("30-err-incus7-stop-timeout", unused()),
        ("30-err-lxd-stop-timeout", unused()),
    ] {
        let state = waited(Capture::open(capture).nth(1), look).await.unwrap();
        let OperationState::Failed(text) = state else {
            panic!("{capture}: {state:?}")
        };
        assert!(text.contains("Failed shutting down instance"), "{capture}: {text}");
    }
}

#[tokio::test]
async fn an_error_with_http_200_is_looked_into() {
    let failed = (200, error(500, TEXT));
    assert_eq!(
        waited(failed.clone(), (200, at_state(400, TEXT))).await,
        Ok(OperationState::Failed(TEXT.to_owned()))
    );
    assert_eq!(
        waited(failed, (404, error(404, "Operation not found"))).await,
        Ok(OperationState::Failed(TEXT.to_owned())),
        "it has been forgotten meanwhile, but its words were heard"
    );
    let not_found = (200, error(404, "Instance not found"));
    let said = OperationState::Failed("Instance not found".to_owned());
    assert_eq!(
        waited(not_found, (200, at_state(400, "Instance not found"))).await,
        Ok(said)
    );
}

#[tokio::test]
async fn the_end_of_the_time_asked_for_is_not_the_end_of_the_operation() {
    let running = (200, at_state(103, ""));
    assert_eq!(waited(running.clone(), unused()).await, Ok(OperationState::Running));
    for status in [200, 500] {
        let late = (status, error(500, "context deadline exceeded"));
        assert_eq!(waited(late.clone(), running.clone()).await, Ok(OperationState::Running));
        assert_eq!(
            waited(late.clone(), (200, at_state(200, ""))).await,
            Ok(OperationState::Succeeded)
        );
        assert_eq!(
            waited(late, (404, error(404, "not found"))).await,
            Ok(OperationState::Gone)
        );
    }
}

#[tokio::test]
async fn an_operation_that_the_server_does_not_know_is_gone() {
    assert_eq!(
        waited((404, error(404, "Operation not found")), unused()).await,
        Ok(OperationState::Gone)
    );
    let shutting_down = waited((503, error(503, "Daemon is shutting down")), unused()).await;
    assert_eq!(shutting_down.unwrap_err().kind, FailureKind::Unreachable);
    let proxy = Fake::start(|_| Reply::Text(502, "<html>Bad Gateway</html>")).await;
    let unknown = client(&proxy).wait(&operation(), TEN).await.unwrap_err();
    assert_eq!(unknown.kind, FailureKind::Unknown);
    let garbage = Fake::start(|_| Reply::Text(200, "<html>It works!</html>")).await;
    let misunderstood = client(&garbage).wait(&operation(), TEN).await.unwrap_err();
    assert_eq!(misunderstood.kind, FailureKind::Protocol);
}

#[tokio::test]
async fn no_time_at_all_is_a_look() {
    let fake = Fake::start(|_| Reply::Json(200, at_state(103, ""))).await;
    assert_eq!(
        client(&fake).wait(&operation(), Duration::ZERO).await,
        Ok(OperationState::Running)
    );
    assert_eq!(
        client(&fake).wait(&operation(), Duration::from_millis(1500)).await,
        Ok(OperationState::Running)
    );
    assert_eq!(
        fake.paths(),
        ["/1.0/operations/op-1", "/1.0/operations/op-1/wait?timeout=2"]
    );
}

#[tokio::test]
async fn an_operation_url_with_a_project_gives_the_bare_id() {
    let fake = Fake::start(|_| Reply::Json(202, begun("0de96c89-6179?project=default", Value::Null))).await;
    let begun = client(&fake)
        .remove(&InstanceRef::new("default", "web-1"))
        .await
        .unwrap();
    assert_eq!(begun, OperationId("0de96c89-6179".to_owned()));
    let odd = Fake::start(|_| Reply::Json(202, begun_at("/1.0/operations/a%2Fb"))).await;
    let failure = client(&odd)
        .remove(&InstanceRef::new("default", "web-1"))
        .await
        .unwrap_err();
    assert_eq!(failure.kind, FailureKind::Protocol);
}

fn begun_at(url: &str) -> Value {
    json!({"type": "async", "operation": url, "metadata": null})
}

#[tokio::test]
async fn only_what_runs_is_listed_for_each_project_where_there_is_no_list_of_all() {
    let recorded = Capture::open("60-fail-incus-pull-cancel-default");
    let (mut sending, ended) = (
        recorded.nth(2).1["metadata"].clone(),
        recorded.nth(0).1["metadata"].clone(),
    );
    let mut done = ended.clone();
    done["status_code"] = json!(200);
    sending["id"] = json!("sending");
    sending["metadata"] = recorded.nth(3).1["metadata"]["metadata"].clone();
    let token = json!({"id": "token", "class": "token", "status_code": 103, "resources": null, "metadata": null});
    let fake = Fake::reading(vec![
        ("/1.0", Capture::open("01-get-1.0-lxd-5.0.2").get("/1.0")),
        (
            "/1.0/projects?recursion=1",
            sync(json!([{"name": "default", "config": null}, {"name": "shop", "config": {}}])),
        ),
        (
            "/1.0/operations?recursion=1&project=default",
            sync(json!({"running": [sending], "success": [done]})),
        ),
        (
            "/1.0/operations?recursion=1&project=shop",
            sync(json!({"running": [token], "failure": null})),
        ),
    ])
    .await;
    let running = client(&fake).operations().await.unwrap();
    assert_eq!(running.len(), 1, "{running:?}");
    assert_eq!(running[0].instances, [InstanceRef::new("default", "big1")]);
    let progress = running[0].progress.unwrap();
    assert!(
        progress.bytes > 1_000_000 && progress.bytes_per_second > 1_000_000,
        "{progress:?}"
    );
}

#[tokio::test]
async fn operations_of_all_projects_are_one_request_where_the_server_can() {
    let fake = Fake::reading(vec![
        ("/1.0", Capture::open("01-get-1.0-incus-6.0.4").get("/1.0")),
        ("/1.0/operations?recursion=1&all-projects=true", sync(Value::Null)),
    ])
    .await;
    assert_eq!(client(&fake).operations().await, Ok(vec![]));
}

/// Events of a stream that sends `messages` and ends.
async fn streamed(messages: Vec<String>) -> Vec<ServerEvent> {
    let (address, certificate) = fake::raw(move |stream| {
        let messages = messages.clone();
        async move {
            let mut socket = tokio_tungstenite::accept_async(stream)
                .await
                .expect("it is a websocket");
            socket
                .send(Message::Ping(b"still there?".as_slice().into()))
                .await
                .expect("the client reads");
            for message in messages {
                socket.send(Message::text(message)).await.expect("the client reads");
            }
            let pong = socket.next().await.expect("the client answers").expect("well");
            assert!(
                matches!(pong, Message::Pong(_)),
                "nothing but pongs may be sent: {pong}"
            );
            socket.close(None).await.expect("the client lets go");
        }
    })
    .await;
    let server = client_of(&[&address], berth_client::ServerTrust::Pem(certificate));
    server.events().await.unwrap().collect().await
}

#[tokio::test]
async fn recorded_events_are_understood_and_the_end_of_the_connection_ends_the_stream() {
    for (capture, migrated) in [
        ("10-lxd-pull-stopped-events", false),
        ("10-incus7-pull-stopped-events", true),
    ] {
        let recorded = Capture::open(capture);
        let events = streamed(recorded.exchanges().iter().map(|e| e["event"].to_string()).collect()).await;
        let at = InstanceRef::new("default", "mv1");
        let actions: Vec<&str> = events
            .iter()
            .filter_map(|e| match e {
                ServerEvent::Instance { at: who, action, .. } if *who == at => Some(action.as_str()),
                _ => None,
            })
            .collect();
        let mut expected = vec!["instance-created", "instance-deleted", "instance-started"];
        if migrated {
            expected.insert(1, "instance-migrated");
        }
        assert_eq!(actions, expected, "{capture}");
        let unpacking = events.iter().any(|e| match e {
            ServerEvent::Operation(o, OperationState::Running) => {
                o.instances == [at.clone()] && o.progress.is_some_and(|p: Progress| p.percent.is_some())
            }
            _ => false,
        });
        assert!(unpacking, "{capture}: {events:#?}");
    }
}

#[tokio::test]
async fn a_refused_event_stream_says_why() {
    let fake = Fake::start(|asked| match asked.path.as_str() {
        "/1.0" => Reply::Json(200, sync(json!({"auth": "trusted"}))),
        _ => Reply::Json(403, error(403, "restricted")),
    })
    .await;
    let failure = client(&fake).events().await.err().expect("it was refused");
    assert_eq!(
        (failure.kind, failure.message.as_str()),
        (FailureKind::Refused, "restricted")
    );
}
