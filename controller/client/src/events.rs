//! The event stream: one websocket per server that is only read. Events are hints; a stream that cannot keep up, or that
//! is silent for too long, ends, and whoever reads it lists afresh.

use std::time::{Duration, Instant};

use berth_core::model::InstanceRef;
use berth_core::server::{FailureKind, Result, ServerEvent};
use futures::StreamExt;
use futures::future::{ready, try_join_all};
use futures::stream::{self, BoxStream};
use reqwest::Url;
use rustls_pki_types::ServerName;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::handshake::client::Request;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use crate::failure::{Cut, Refusal};
use crate::http::{CONNECT, Call, HttpServer, USER_AGENT, host};
use crate::observe::{RequestClass, RequestRecord};
use crate::operations::OperationWire;
use crate::path;

/// The servers send a ping every ten seconds: this long without a frame means that nobody is there.
const IDLE: Duration = Duration::from_secs(40);
/// Events that may wait for the reader before the stream is ended.
const BACKLOG: usize = 4096;
const MESSAGE: usize = 4 << 20;
const PATH: &str = "/1.0/events?type=operation,lifecycle";

type Socket = WebSocketStream<TlsStream<TcpStream>>;

impl HttpServer {
    /// Subscribes; what happens after this returns is in the stream.
    pub(crate) async fn subscribe(&self) -> Result<BoxStream<'static, ServerEvent>> {
        match self.subscribe_to("all-projects", "true").await {
            // as with the list of all instances: LXD 5 wants to be asked for each project that we may see
            Err(e) if e.kind == FailureKind::Refused => {
                let projects = self.project_names().await?;
                let streams = projects.iter().map(|project| self.subscribe_to("project", project));
                Ok(until_one_ends(try_join_all(streams).await?))
            }
            other => other,
        }
    }

    async fn subscribe_to(&self, key: &str, value: &str) -> Result<BoxStream<'static, ServerEvent>> {
        let path = path::with_query(PATH.to_owned(), key, value);
        let call = Call::get(RequestClass::Events, path, "follow the events");
        let mut failure = None;
        for (index, address) in self.in_turn() {
            let started = Instant::now();
            let opened = timeout(2 * CONNECT, self.open_socket(address, &call.path))
                .await
                .unwrap_or_else(|_| Err(Refusal::Cut(Cut::late_connection())));
            self.record(&opened, started);
            match opened {
                Ok(socket) => {
                    self.use_address(index);
                    return Ok(stream_of(socket));
                }
                Err(Refusal::Answer(code, text)) => {
                    self.use_address(index);
                    return Err(self.refusal(&call, code, text).await);
                }
                Err(Refusal::Cut(cut)) => failure = failure.or(Some(cut)),
            }
        }
        let cut = failure.unwrap_or_else(Cut::late_connection);
        Err(self.error(&call, cut.kind, cut.message))
    }

    async fn open_socket(&self, address: &Url, path: &str) -> std::result::Result<Socket, Refusal> {
        let name = address
            .host_str()
            .unwrap_or_default()
            .trim_matches(['[', ']'])
            .to_owned();
        let port = address.port_or_known_default().unwrap_or(443);
        let server_name = ServerName::try_from(name.clone()).map_err(|e| Cut::while_connecting(&e))?;
        let connecting = TcpStream::connect((name.as_str(), port));
        let tcp = timeout(CONNECT, connecting).await.map_err(|_| Cut::late_connection())?;
        let tcp = tcp.map_err(|e| Cut::while_connecting(&e))?;
        let tls = TlsConnector::from(self.tls()).connect(server_name, tcp).await;
        let tls = tls.map_err(|e| Cut::while_connecting(&e))?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE))
            .max_frame_size(Some(MESSAGE));
        match client_async_with_config(self.upgrade(address, path)?, tls, Some(config)).await {
            Ok((socket, _)) => Ok(socket),
            Err(WsError::Http(response)) => {
                let body = response.body().as_deref().unwrap_or_default();
                let text = serde_json::from_slice::<Value>(body)
                    .ok()
                    .and_then(|b| Some(b.get("error")?.as_str()?.to_owned()));
                Err(Refusal::Answer(
                    response.status().as_u16(),
                    text.unwrap_or_else(|| "no reason given".to_owned()),
                ))
            }
            Err(e) => Err(Cut::while_connecting(&e).into()),
        }
    }

    fn upgrade(&self, address: &Url, path: &str) -> std::result::Result<Request, Refusal> {
        let mut request = format!("wss://{}{path}", host(address))
            .into_client_request()
            .map_err(|e| Cut::while_connecting(&e))?;
        request.headers_mut().extend(self.headers());
        request.headers_mut().insert("user-agent", http_value(USER_AGENT));
        Ok(request)
    }

    fn record(&self, opened: &std::result::Result<Socket, Refusal>, started: Instant) {
        let status = match opened {
            Ok(_) => Some(101),
            Err(Refusal::Answer(code, _)) => Some(*code),
            Err(Refusal::Cut(_)) => None,
        };
        let duration = started.elapsed();
        tracing::debug!(path = PATH, status, milliseconds = duration.as_millis(), "event stream");
        if let Some(observer) = self.observer() {
            observer(RequestRecord {
                method: "GET",
                class: RequestClass::Events,
                status,
                duration,
                bytes: 0,
            });
        }
    }
}

fn http_value(text: &'static str) -> reqwest::header::HeaderValue {
    reqwest::header::HeaderValue::from_static(text)
}

/// All events of several streams; with the first of them that ends, all do, so that nobody believes to hear everything.
fn until_one_ends(streams: Vec<BoxStream<'static, ServerEvent>>) -> BoxStream<'static, ServerEvent> {
    let with_end = |s: BoxStream<'static, ServerEvent>| s.map(Some).chain(stream::once(async { None })).boxed();
    let merged = stream::select_all(streams.into_iter().map(with_end));
    merged
        .take_while(|event| ready(event.is_some()))
        .filter_map(ready)
        .boxed()
}

/// Reads the socket in a task of its own, so that pings are answered while the reader is busy.
fn stream_of(socket: Socket) -> BoxStream<'static, ServerEvent> {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    tokio::spawn(forward(socket, sender));
    stream::unfold(receiver, |mut receiver| async move {
        Some((receiver.recv().await?, receiver))
    })
    .boxed()
}

async fn forward(mut socket: Socket, sender: mpsc::Sender<ServerEvent>) {
    loop {
        let message = tokio::select! {
            () = sender.closed() => return,
            message = timeout(IDLE, socket.next()) => message,
        };
        // pings are answered by the library while we read; nothing else is ever sent
        let text = match message {
            Ok(Some(Ok(Message::Text(text)))) => text,
            Ok(Some(Ok(Message::Close(_)) | Err(_)) | None) | Err(_) => return,
            Ok(Some(Ok(_))) => continue,
        };
        for event in events_of(&text) {
            if sender.try_send(event).is_err() {
                tracing::debug!("the event stream is not read fast enough; ending it");
                return;
            }
        }
    }
}

#[derive(Deserialize)]
struct EventWire {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    project: Option<String>,
    metadata: Value,
}

#[derive(Deserialize)]
struct LifecycleWire {
    action: String,
    #[serde(default)]
    source: String,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    project: Option<String>,
    #[serde(default)]
    context: Option<Map<String, Value>>,
    #[serde(default)]
    requestor: Option<RequestorWire>,
}

#[derive(Deserialize)]
struct RequestorWire {
    #[serde(default)]
    username: String,
}

/// What one message says; nothing where it says nothing of interest or is not understood.
fn events_of(text: &str) -> Vec<ServerEvent> {
    let Ok(event) = serde_json::from_str::<EventWire>(text) else {
        return Vec::new();
    };
    let project = event
        .project
        .filter(|p| !p.is_empty())
        .unwrap_or_else(|| "default".to_owned());
    match event.kind.as_str() {
        "operation" => match serde_json::from_value::<OperationWire>(event.metadata) {
            Ok(wire) if wire.is_work() => {
                let state = wire.state();
                vec![ServerEvent::Operation(wire.into_model(&project), state)]
            }
            _ => Vec::new(),
        },
        "lifecycle" => serde_json::from_value(event.metadata).map_or_else(|_| Vec::new(), |l| lifecycle(l, project)),
        _ => Vec::new(),
    }
}

fn lifecycle(event: LifecycleWire, project: String) -> Vec<ServerEvent> {
    if !event.action.starts_with("instance-") {
        return if is_about_facts(&event.action) {
            vec![ServerEvent::Facts]
        } else {
            Vec::new()
        };
    }
    if is_only_a_look(&event.action) {
        return Vec::new();
    }
    let project = event.project.filter(|p| !p.is_empty()).unwrap_or(project);
    // The source names the instance in every version; the field `name` is younger and, for snapshots, the snapshot's.
    let named = event.name.map(|name| InstanceRef::new(project.clone(), name));
    let Some(at) = path::instance_of(&event.source, &project).or(named) else {
        return Vec::new();
    };
    let old_name = event
        .context
        .as_ref()
        .and_then(|c| c.get("old_name"))
        .and_then(Value::as_str);
    let before = old_name
        .filter(|_| event.action == "instance-renamed")
        .map(|n| InstanceRef::new(at.project.clone(), n));
    let requestor = event.requestor.map(|r| r.username).filter(|u| !u.is_empty());
    let event_at = |at| ServerEvent::Instance {
        at,
        action: event.action.clone(),
        requestor: requestor.clone(),
    };
    std::iter::once(at).chain(before).map(event_at).collect()
}

/// What people and monitoring do with an instance without changing it.
fn is_only_a_look(action: &str) -> bool {
    action.ends_with("-retrieved") || action.starts_with("instance-exec") || action.starts_with("instance-console")
}

fn is_about_facts(action: &str) -> bool {
    [
        "cluster-",
        "storage-pool-",
        "project-",
        "profile-",
        "network-",
        "config-",
        "certificate-",
    ]
    .iter()
    .any(|prefix| action.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_without_name_and_project_is_read_by_its_source() {
        let text = r#"{"type":"lifecycle","project":"shop","metadata":
            {"action":"instance-renamed","source":"/1.0/instances/web-2","context":{"old_name":"web-1"}}}"#;
        let renamed = |name| ServerEvent::Instance {
            at: InstanceRef::new("shop", name),
            action: "instance-renamed".to_owned(),
            requestor: None,
        };
        assert_eq!(events_of(text), vec![renamed("web-2"), renamed("web-1")]);
    }

    #[test]
    fn who_asked_for_a_stop_is_told() {
        let text = r#"{"type":"lifecycle","location":"none","project":"default","metadata":{"action":"instance-shutdown",
            "source":"/1.0/instances/web-1","name":"web-1","project":"default","requestor":
            {"username":"c70d4ab4","protocol":"tls","address":"10.0.0.1:4711"}}}"#;
        let expected = ServerEvent::Instance {
            at: InstanceRef::new("default", "web-1"),
            action: "instance-shutdown".to_owned(),
            requestor: Some("c70d4ab4".to_owned()),
        };
        assert_eq!(events_of(text), vec![expected]);
    }

    #[test]
    fn a_changed_member_or_profile_means_new_facts_and_an_image_nothing() {
        let of = |action: &str| events_of(&format!(r#"{{"type":"lifecycle","metadata":{{"action":"{action}"}}}}"#));
        assert_eq!(of("cluster-member-evacuated"), vec![ServerEvent::Facts]);
        assert_eq!(of("profile-updated"), vec![ServerEvent::Facts]);
        assert_eq!(of("image-created"), vec![]);
        assert_eq!(events_of("not json"), vec![]);
    }
}
