//! A plain HTTP client for a server's unix socket, independent of the product's own client.

use std::path::Path;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

const LIMIT: Duration = Duration::from_secs(90);

/// How long nobody may listen.
const AWAY: Duration = Duration::from_secs(5);

/// A refusal or a failed operation, in the server's words.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// HTTP status, or the error code in the body; 0 if there was no answer.
    pub code: u16,
    /// The server's sentence.
    pub message: String,
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.message, self.code)
    }
}

fn no_answer(what: &str, error: impl std::fmt::Display) -> ApiError {
    ApiError {
        code: 0,
        message: format!("{what}: {error}"),
    }
}

/// Connects; waits for a daemon that ended by itself, which its host starts again.
async fn connect(socket: &Path) -> Result<UnixStream, ApiError> {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(socket).await {
            Err(_) if begun.elapsed() < AWAY => tokio::time::sleep(Duration::from_millis(100)).await,
            other => return other.map_err(|error| no_answer(&format!("connect to {}", socket.display()), error)),
        }
    }
}

/// Sends one request and returns status and body as they are.
pub(crate) async fn raw(
    socket: &Path,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: Vec<u8>,
) -> Result<(u16, Bytes), ApiError> {
    exchange(connect(socket).await?, method, path, headers, body).await
}

async fn exchange(
    stream: UnixStream,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: Vec<u8>,
) -> Result<(u16, Bytes), ApiError> {
    let what = format!("{method} {path}");
    let exchange = async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| no_answer(&what, error))?;
        tokio::spawn(connection);
        let mut request = Request::builder().method(&method).uri(path).header("host", "node");
        for (key, value) in headers {
            request = request.header(*key, *value);
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| no_answer(&what, error))?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| no_answer(&what, error))?;
        let status = response.status().as_u16();
        let body = response
            .into_body()
            .collect()
            .await
            .map_err(|error| no_answer(&what, error))?;
        Ok((status, body.to_bytes()))
    };
    tokio::time::timeout(LIMIT, exchange)
        .await
        .unwrap_or_else(|_| Err(no_answer(&what, "no answer in time")))
}

/// A read; made again if its connection broke, as happens on a busy machine.
async fn read(socket: &Path, path: &str) -> Result<(u16, Bytes), ApiError> {
    for _ in 0..3 {
        // where nobody listens, `connect` has waited already
        let stream = connect(socket).await?;
        match exchange(stream, Method::GET, path, &[], Vec::new()).await {
            Err(error) if error.code == 0 => tokio::time::sleep(Duration::from_millis(200)).await,
            other => return other,
        }
    }
    raw(socket, Method::GET, path, &[], Vec::new()).await
}

/// Sends one request; for an operation waits for its end. Returns `metadata`.
pub(crate) async fn call(socket: &Path, method: Method, path: &str, body: Option<&Value>) -> Result<Value, ApiError> {
    let text = body.map(Value::to_string).unwrap_or_default();
    let headers = [("content-type", "application/json")];
    let (status, bytes) = if method == Method::GET {
        read(socket, path).await?
    } else {
        raw(socket, method, path, &headers, text.into_bytes()).await?
    };
    let answer = envelope(path, status, &bytes)?;
    if answer["type"] != "async" {
        return Ok(answer["metadata"].clone());
    }
    // LXD adds a query to this address in a cluster
    let operation = answer["operation"].as_str().unwrap_or_default();
    let wait = format!("{}/wait", operation.split('?').next().unwrap_or_default());
    let (status, bytes) = read(socket, &wait).await?;
    let ended = match envelope(&wait, status, &bytes) {
        // it ended more than five seconds ago, on a busy machine: whoever asked for it looks at what it made
        Err(gone) if gone.code == 404 => return Ok(answer["metadata"].clone()),
        other => other?,
    };
    let metadata = &ended["metadata"];
    if metadata["status_code"].as_u64() == Some(200) {
        return Ok(metadata.clone());
    }
    let message = metadata["err"].as_str().unwrap_or("the operation failed").to_owned();
    Err(ApiError {
        code: metadata["status_code"]
            .as_u64()
            .and_then(|code| code.try_into().ok())
            .unwrap_or(0),
        message,
    })
}

fn envelope(path: &str, status: u16, bytes: &[u8]) -> Result<Value, ApiError> {
    let answer: Value = serde_json::from_slice(bytes).map_err(|error| no_answer(path, error))?;
    if answer["type"] == "error" || status >= 400 {
        let code = answer["error_code"]
            .as_u64()
            .and_then(|code| code.try_into().ok())
            .unwrap_or(status);
        return Err(ApiError {
            code,
            message: answer["error"].as_str().unwrap_or_default().to_owned(),
        });
    }
    Ok(answer)
}
