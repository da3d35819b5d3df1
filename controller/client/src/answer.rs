//! The servers' envelope: `sync`, `async` or `error`, told by the body's `type` alone, because `/wait` answers errors with
//! HTTP 200. What is unknown is ignored; what is not understood is a `Protocol` failure.

use berth_core::server::{FailureKind, OperationId, Result, ServerError};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use crate::failure::kind_of_answer;
use crate::http::{Call, HttpServer, Raw};
use crate::observe::RequestClass;
use crate::{operations, path};

#[derive(Deserialize)]
struct Envelope<T> {
    #[serde(rename = "type")]
    kind: Option<EnvelopeKind>,
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    error_code: Option<u16>,
    #[serde(default)]
    operation: Option<String>,
    #[serde(default = "none")]
    metadata: Option<T>,
}

fn none<T>() -> Option<T> {
    None
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum EnvelopeKind {
    Sync,
    Async,
    Error,
}

/// What a server answered, taken out of its envelope.
pub(crate) enum Answer<T> {
    /// Done; `metadata` as the server gave it.
    Sync { metadata: Option<T>, etag: Option<String> },
    /// Goes on in the background.
    Async {
        operation: OperationId,
        metadata: Option<T>,
    },
    /// Refused. `status` is the HTTP status, `code` the body's own code.
    Error { status: u16, code: u16, text: String },
}

impl HttpServer {
    /// Sends and takes the answer out of its envelope; an error answer is an `Ok(Answer::Error)`.
    pub(crate) async fn ask<T: DeserializeOwned>(&self, call: &Call) -> Result<Answer<T>> {
        let raw = self.send(call).await?;
        open(&raw).map_err(|reason| self.error(call, FailureKind::Protocol, reason))
    }

    /// Reads something: a `sync` answer with metadata.
    pub(crate) async fn read<T: DeserializeOwned>(&self, call: &Call) -> Result<(T, Option<String>)> {
        match self.ask(call).await? {
            Answer::Sync {
                metadata: Some(metadata),
                etag,
            } => Ok((metadata, etag)),
            Answer::Sync { metadata: None, .. } => {
                Err(self.error(call, FailureKind::Protocol, "an answer without content"))
            }
            Answer::Async { .. } => {
                Err(self.error(call, FailureKind::Protocol, "an operation where data were expected"))
            }
            Answer::Error { code, text, .. } => Err(self.refusal(call, code, text).await),
        }
    }

    /// Like [`HttpServer::read`] for lists, which some servers write as `null` when empty.
    pub(crate) async fn list<T: DeserializeOwned + Default>(&self, call: &Call) -> Result<T> {
        match self.ask(call).await? {
            Answer::Sync { metadata, .. } => Ok(metadata.unwrap_or_default()),
            Answer::Async { .. } => {
                Err(self.error(call, FailureKind::Protocol, "an operation where data were expected"))
            }
            Answer::Error { code, text, .. } => Err(self.refusal(call, code, text).await),
        }
    }

    /// Begins an operation.
    pub(crate) async fn begin(&self, call: &Call) -> Result<(OperationId, Option<operations::OperationWire>)> {
        match self.ask::<operations::OperationWire>(call).await? {
            Answer::Async { operation, metadata } => Ok((operation, metadata)),
            Answer::Sync { .. } => Err(self.error(call, FailureKind::Protocol, "no operation in the answer")),
            Answer::Error { code, text, .. } => Err(self.refusal(call, code, text).await),
        }
    }

    /// The error of a refused request. A 403 may mean that our certificate was removed: `/1.0` tells.
    pub(crate) async fn refusal(&self, call: &Call, code: u16, text: String) -> ServerError {
        let mut kind = kind_of_answer(code, &text);
        if code == 403 && !self.is_trusted().await {
            kind = FailureKind::NotTrusted;
        }
        self.error(call, kind, text)
    }

    /// False only if the server says that it does not trust us.
    async fn is_trusted(&self) -> bool {
        let call = Call::get(RequestClass::Facts, "/1.0", "read the server");
        !matches!(
            self.ask::<IgnoredAny>(&call).await,
            Ok(Answer::Error { code: 401 | 403, .. })
        )
    }
}

pub(crate) fn open<T: DeserializeOwned>(raw: &Raw) -> std::result::Result<Answer<T>, String> {
    let envelope: Envelope<T> = match serde_json::from_slice(&raw.body) {
        Ok(envelope) => envelope,
        Err(reason) => match serde_json::from_slice::<Envelope<IgnoredAny>>(&raw.body) {
            // whatever hangs on an error, its text counts
            Ok(Envelope {
                kind: Some(EnvelopeKind::Error),
                error,
                error_code,
                ..
            }) => {
                return Ok(error_answer(raw, error, error_code));
            }
            // a proxy on the way, or a daemon that is not up: what became of the request is what its status says
            _ if matches!(raw.status, 502..=504) => {
                let text = "no answer from the server behind this address".to_owned();
                return Ok(error_answer(raw, Some(text), None));
            }
            _ => {
                return Err(format!(
                    "HTTP {} with a body that is not understood: {reason}",
                    raw.status
                ));
            }
        },
    };
    match envelope.kind {
        Some(EnvelopeKind::Sync) => Ok(Answer::Sync {
            metadata: envelope.metadata,
            etag: raw.etag.clone(),
        }),
        Some(EnvelopeKind::Async) => match operation_id(envelope.operation.as_deref()) {
            Some(operation) => Ok(Answer::Async {
                operation,
                metadata: envelope.metadata,
            }),
            None => Err("an asynchronous answer without operation".to_owned()),
        },
        Some(EnvelopeKind::Error) => Ok(error_answer(raw, envelope.error, envelope.error_code)),
        None => Err(format!("HTTP {} with a body without type", raw.status)),
    }
}

fn error_answer<T>(raw: &Raw, error: Option<String>, code: Option<u16>) -> Answer<T> {
    let code = code.filter(|c| *c != 0).unwrap_or(raw.status);
    Answer::Error {
        status: raw.status,
        code,
        text: error.unwrap_or_default(),
    }
}

/// The id in `/1.0/operations/ID[?project=P]`.
fn operation_id(url: Option<&str>) -> Option<OperationId> {
    let id = path::last_segment(url?)?;
    id.bytes()
        .all(|b| b.is_ascii_alphanumeric() || b == b'-')
        .then_some(OperationId(id))
}
