//! Backups of instances: made, fetched, deleted and imported. Their content goes through as it comes; nothing here ever
//! holds more of it than a few pieces.

use std::time::{Duration, Instant};

use berth_core::model::InstanceRef;
use berth_core::server::{Data, Export, FailureKind, ImportRequest, OperationId, Result, ServerError};
use futures::{StreamExt, TryStreamExt};
use jiff::{SignedDuration, Timestamp};
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE};
use reqwest::{Body, Method, RequestBuilder, Response};
use serde_json::{Value, json};

use crate::answer::{Answer, open};
use crate::failure::Cut;
use crate::http::{Call, HttpServer, Raw, UNCONDITIONAL};
use crate::observe::{RequestClass, RequestRecord};
use crate::operations::OperationWire;
use crate::path;

const BYTES: &str = "application/octet-stream";
/// Room for an answer that is no backup.
const ANSWER: usize = 8 << 20;

/// What is asked for. Uncompressed: links are faster than gzip, and a stream is known to be whole by its end.
fn body(name: &str, instance_only: bool) -> Value {
    json!({
        "name": name,
        "instance_only": instance_only,
        "container_only": instance_only,
        "optimized_storage": false,
        "compression_algorithm": "none",
    })
}

impl HttpServer {
    pub(crate) async fn make_backup(
        &self,
        at: &InstanceRef,
        name: &str,
        instance_only: bool,
        keep: Duration,
    ) -> Result<OperationId> {
        let mut body = body(name, instance_only);
        let until = SignedDuration::try_from(keep).ok();
        if let Some(until) = until.and_then(|d| Timestamp::now().checked_add(d).ok()) {
            let until = until.round(jiff::Unit::Second).unwrap_or(until);
            body["expires_at"] = json!(until.to_string());
        }
        let path = path::instance(at, "/backups");
        let call = Call::new(Method::POST, RequestClass::Backup, path, format!("back up {at}")).body(body);
        Ok(self.begin(&call).await?.0)
    }

    pub(crate) async fn delete_backup(&self, at: &InstanceRef, name: &str) -> Result<OperationId> {
        let path = path::instance(at, &format!("/backups/{}", path::encode(name)));
        let what = format!("delete backup {name} of {at}");
        let call = Call::new(Method::DELETE, RequestClass::Backup, path, what).within(UNCONDITIONAL);
        Ok(self.begin(&call).await?.0)
    }

    pub(crate) async fn fetch_backup(&self, at: &InstanceRef, what: &Export) -> Result<Data> {
        let (method, tail, body) = match what {
            Export::Kept(name) => (Method::GET, format!("/backups/{}/export", path::encode(name)), None),
            Export::Direct { instance_only } => (Method::POST, "/backups".to_owned(), Some(body("", *instance_only))),
        };
        let attempted = format!("fetch a backup of {at}");
        let mut call = Call::new(method, RequestClass::Export, path::instance(at, &tail), attempted);
        call.body = body;
        let answer = self.stream(&call, |request| request.header(ACCEPT, BYTES)).await?;
        if answer.status().as_u16() != 200 {
            return match self.answer_of(&call, answer).await? {
                Answer::Error { code, text, .. } => Err(self.refusal(&call, code, text).await),
                Answer::Sync { .. } | Answer::Async { .. } => {
                    Err(self.error(&call, FailureKind::Protocol, "an answer that is no backup"))
                }
            };
        }
        let size = answer.content_length();
        let attempted = self.error(&call, FailureKind::Unknown, "").attempted;
        let broken = move |e| {
            let cut = Cut::of_http(e);
            ServerError::new(FailureKind::Unknown, &attempted, cut.message)
        };
        let bytes = answer.bytes_stream().map_ok(Vec::from).map_err(broken).boxed();
        Ok(Data { size, bytes })
    }

    pub(crate) async fn import_backup(&self, request: &ImportRequest, data: Data) -> Result<OperationId> {
        let mut path = path::with_query("/1.0/instances".to_owned(), "project", &request.at.project);
        if let Some(member) = &request.member {
            path = path::with_query(path, "target", member);
        }
        let call = Call::new(
            Method::POST,
            RequestClass::Import,
            path,
            format!("import {}", request.at),
        );
        let mut body = Some(data.bytes);
        let answer = self
            .stream(&call, |mut http| {
                for product in ["Incus", "LXD"] {
                    http = http.header(format!("X-{product}-name"), &request.at.name);
                    if let Some(pool) = &request.pool {
                        http = http.header(format!("X-{product}-pool"), pool);
                    }
                }
                if let Some(size) = data.size {
                    http = http.header(CONTENT_LENGTH, size);
                }
                let bytes = body.take().unwrap_or_else(|| futures::stream::empty().boxed());
                http.header(CONTENT_TYPE, BYTES).body(Body::wrap_stream(bytes))
            })
            .await?;
        match self.answer_of(&call, answer).await? {
            Answer::Async { operation, .. } => Ok(operation),
            Answer::Sync { .. } => Err(self.error(&call, FailureKind::Protocol, "no operation in the answer")),
            Answer::Error { code, text, .. } => Err(self.refusal(&call, code, text).await),
        }
    }

    /// Sends a request whose body or answer may take any time, to the address in use.
    async fn stream(&self, call: &Call, add: impl FnOnce(RequestBuilder) -> RequestBuilder) -> Result<Response> {
        let cut = |cut: Cut| self.error(call, cut.kind, cut.message);
        let request = self.request_in_use(call).map_err(cut)?;
        let started = Instant::now();
        let answer = add(request).send().await;
        if let Some(observer) = self.observer() {
            observer(RequestRecord {
                method: if call.method == Method::GET { "GET" } else { "POST" },
                class: call.class,
                status: answer.as_ref().ok().map(|a| a.status().as_u16()),
                duration: started.elapsed(),
                bytes: 0,
            });
        }
        answer.map_err(|e| cut(Cut::of_http(e)))
    }

    async fn answer_of(&self, call: &Call, answer: Response) -> Result<Answer<OperationWire>> {
        let raw = Raw::read(answer, ANSWER).await;
        let raw = raw.map_err(|cut| self.error(call, cut.kind, cut.message))?;
        open(&raw).map_err(|reason| self.error(call, FailureKind::Protocol, reason))
    }
}
