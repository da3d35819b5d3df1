//! An HTTPS server that answers as it is told and remembers what it was asked.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{CONTENT_TYPE, ETAG};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, KeyPair};
use rustls::ServerConfig;
use rustls_pki_types::PrivateKeyDer;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// A request as it came over the wire.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    /// Path and query, not decoded.
    pub path: String,
    pub body: Value,
    pub if_match: Option<String>,
    /// Whether a stranger is to be refused.
    pub authenticated: bool,
}

/// What to answer.
pub enum Reply {
    /// Status and body.
    Json(u16, Value),
    /// The same with an entity tag.
    Tagged(String, Value),
    /// A body as it is.
    Text(u16, &'static str),
    /// The connection ends without an answer.
    Cut,
    /// A body that never ends.
    Endless,
}

/// The server; it ends with the test's runtime.
pub struct Fake {
    pub address: String,
    pub certificate: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, Infallible>;

impl Fake {
    /// Starts one; `answer` is asked for each request.
    pub async fn start(answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Fake {
        let (listener, acceptor, certificate) = listen().await;
        let address = url(&listener);
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (answer, seen) = (Arc::new(answer), Arc::clone(&asked));
        tokio::spawn(async move {
            while let Some(stream) = accept(&listener, &acceptor).await {
                let (answer, seen) = (Arc::clone(&answer), Arc::clone(&seen));
                let service = service_fn(move |request| {
                    let (answer, seen) = (Arc::clone(&answer), Arc::clone(&seen));
                    async move {
                        let asked = read(request).await;
                        seen.lock().expect("no test panics here").push(asked.clone());
                        respond(answer(&asked))
                    }
                });
                let connection = hyper::server::conn::http1::Builder::new();
                tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
            }
        });
        Fake {
            address,
            certificate,
            asked,
        }
    }

    /// A server that answers `metadata` to every GET of the paths given, and 404 to all else.
    pub async fn reading(answers: Vec<(&'static str, Value)>) -> Fake {
        Fake::start(
            move |asked| match answers.iter().find(|(path, _)| *path == asked.path) {
                Some((_, body)) => Reply::Tagged("\"tag\"".to_owned(), body.clone()),
                None => Reply::Json(404, error(404, "not found")),
            },
        )
        .await
    }

    /// What it was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("no test panics here").clone()
    }

    /// The paths of that, in order.
    pub fn paths(&self) -> Vec<String> {
        self.asked().into_iter().map(|a| a.path).collect()
    }
}

/// A server whose TLS connections are given to `talk`.
pub async fn raw<F>(talk: impl Fn(TlsStream<TcpStream>) -> F + Send + 'static) -> (String, String)
where
    F: Future<Output = ()> + Send + 'static,
{
    let (listener, acceptor, certificate) = listen().await;
    let address = url(&listener);
    tokio::spawn(async move {
        while let Some(stream) = accept(&listener, &acceptor).await {
            tokio::spawn(talk(stream));
        }
    });
    (address, certificate)
}

/// The envelope of data.
pub fn sync(metadata: Value) -> Value {
    json!({"type": "sync", "status": "Success", "status_code": 200, "metadata": metadata})
}

/// The envelope of an operation.
pub fn begun(id: &str, metadata: Value) -> Value {
    json!({"type": "async", "status_code": 100, "operation": format!("/1.0/operations/{id}"), "metadata": metadata})
}

/// The envelope of an error.
pub fn error(code: u16, text: &str) -> Value {
    json!({"type": "error", "error": text, "error_code": code, "metadata": null})
}

async fn listen() -> (TcpListener, TlsAcceptor, String) {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).expect("a key can be made");
    let params = CertificateParams::new(vec!["somewhere".to_owned()]).expect("the name is one");
    let certificate = params.self_signed(&key).expect("a certificate can be made");
    let private = PrivateKeyDer::try_from(key.serialize_der()).expect("the key is one");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("there are versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)
        .expect("key and certificate go together");
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
        .await
        .expect("a port is free");
    (listener, TlsAcceptor::from(Arc::new(config)), certificate.pem())
}

fn url(listener: &TcpListener) -> String {
    format!("https://{}", listener.local_addr().expect("it is bound"))
}

/// The next client; those that do not like our certificate are not counted.
async fn accept(listener: &TcpListener, acceptor: &TlsAcceptor) -> Option<TlsStream<TcpStream>> {
    loop {
        let (tcp, _) = listener.accept().await.ok()?;
        if let Ok(stream) = acceptor.accept(tcp).await {
            return Some(stream);
        }
    }
}

async fn read(request: Request<Incoming>) -> Asked {
    let header = |name: &str| {
        request
            .headers()
            .get(name)
            .and_then(|v| v.to_str().ok())
            .map(str::to_owned)
    };
    let both = ["x-incus-authenticated", "x-lxd-authenticated"].map(|name| header(name).as_deref() == Some("true"));
    let (method, path) = (request.method().to_string(), request.uri().to_string());
    let (if_match, authenticated) = (header("if-match"), both == [true, true]);
    let body = request
        .into_body()
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes)
        .unwrap_or_default();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    Asked {
        method,
        path,
        body,
        if_match,
        authenticated,
    }
}

fn respond(reply: Reply) -> io::Result<Response<Body>> {
    let full = |text: String| Full::new(Bytes::from(text)).boxed_unsync();
    let response = Response::builder().header(CONTENT_TYPE, "application/json");
    let response = match reply {
        Reply::Json(status, body) => response.status(status).body(full(body.to_string())),
        Reply::Tagged(tag, body) => response.header(ETAG, tag).body(full(body.to_string())),
        Reply::Text(status, text) => response.status(status).body(full(text.to_owned())),
        Reply::Cut => return Err(io::Error::other("told so")),
        Reply::Endless => {
            let chunks = futures::stream::repeat_with(|| Ok(Frame::data(Bytes::from_static(&[b' '; 1 << 16]))));
            response.body(StreamBody::new(chunks).boxed_unsync())
        }
    };
    Ok(response.expect("the reply is well-formed"))
}
