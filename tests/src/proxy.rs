//! A proxy in front of a real server that counts requests, holds some back, or loses them.
//!
//! It shows the server's own certificate (the lab knows its key), so neither the controller nor another server can tell
//! the difference: use its URL in `addresses` and the server's fingerprint.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, UPGRADE};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::{ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{Lab, Server, wait_for};

type Failure = Box<dyn std::error::Error + Send + Sync>;
type Rule = Arc<dyn Fn(&Seen) -> Fate + Send + Sync>;

/// A request that came to the proxy.
#[derive(Clone, Debug)]
pub struct Seen {
    /// e.g. `POST`.
    pub method: String,
    /// Path without the query.
    pub path: String,
    /// The query, empty if there is none.
    pub query: String,
    /// The body as text; empty for uploads and websockets.
    pub body: String,
    /// When it came.
    pub at: Instant,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Goes to the server at once.
    Pass,
    /// Waits for [`Proxy::release`], then goes to the server even if its sender has given up or died.
    Hold,
    /// Never reaches the server; the sender's connection breaks.
    Lose,
    /// Reaches the server; the answer is lost and the sender's connection breaks.
    LoseAnswer,
    /// Never reaches the server; the sender is told that the server will not do it.
    Refuse,
}

/// A running proxy; it ends when it is dropped.
pub struct Proxy {
    url: String,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

struct Shared {
    upstream: String,
    connector: TlsConnector,
    state: Mutex<State>,
    /// Counts releases: whoever is held waits for the next.
    released: watch::Sender<u64>,
}

struct State {
    rule: Rule,
    seen: Vec<Seen>,
    held: usize,
}

impl Proxy {
    /// Puts a proxy in front of `server`. Other servers of the lab can reach it too.
    pub async fn start(lab: &Lab, server: &Server) -> Proxy {
        let upstream = server.url.trim_start_matches("https://").to_owned();
        let (acceptor, connector) =
            tls(lab, server).unwrap_or_else(|error| panic!("proxy for {}: {error}", server.name));
        let listener = TcpListener::bind((lab.address(), 0)).await;
        let listener = listener.unwrap_or_else(|error| panic!("proxy for {}: {error}", server.name));
        let address = listener
            .local_addr()
            .unwrap_or_else(|error| panic!("proxy for {}: {error}", server.name));
        let state = State {
            rule: Arc::new(|_| Fate::Pass),
            seen: Vec::new(),
            held: 0,
        };
        let shared = Arc::new(Shared {
            upstream,
            connector,
            state: Mutex::new(state),
            released: watch::Sender::new(0),
        });
        let task = tokio::spawn(accept(listener, acceptor, Arc::clone(&shared)));
        Proxy {
            url: format!("https://{address}"),
            shared,
            task,
        }
    }

    /// For `addresses` of an InstanceServer.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.state().seen.clone()
    }

    /// How many requests so far were such.
    pub fn count(&self, such: impl Fn(&Seen) -> bool) -> usize {
        self.shared.state().seen.iter().filter(|seen| such(seen)).count()
    }

    /// Decides the fate of requests from now on.
    pub fn rule(&self, rule: impl Fn(&Seen) -> Fate + Send + Sync + 'static) {
        self.shared.state().rule = Arc::new(rule);
    }

    /// How many requests are held.
    pub fn held(&self) -> usize {
        self.shared.state().held
    }

    /// Waits until at least one request is held.
    pub async fn wait_held(&self, within: Duration) {
        wait_for("the proxy to hold a request", within, || async {
            if self.held() > 0 {
                Ok(())
            } else {
                Err(format!("passed so far: {}", self.seen().len()))
            }
        })
        .await;
    }

    /// Sends the held requests on their way, and passes all from now on. Returns when the server has answered them.
    pub async fn release(&self) {
        self.rule(|_| Fate::Pass);
        self.shared.released.send_modify(|count| *count += 1);
        wait_for("the held requests to be answered", Duration::from_secs(60), || async {
            let held = self.held();
            if held == 0 {
                Ok(())
            } else {
                Err(format!("{held} are not"))
            }
        })
        .await;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, shared: Arc<Shared>) {
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        // without this a small answer waits 40 ms for an acknowledgement
        let _ = stream.set_nodelay(true);
        let (acceptor, shared) = (acceptor.clone(), Arc::clone(&shared));
        connections.spawn(async move {
            // a client that does not like the certificate or goes away is the client's business
            let Ok(stream) = acceptor.accept(stream).await else {
                return;
            };
            let service = service_fn(|request| answer(Arc::clone(&shared), request));
            let server = hyper::server::conn::http1::Builder::new();
            let _ = server
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades()
                .await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Failure> {
    if request.headers().contains_key(UPGRADE) {
        note(&shared, &request, String::new());
        return upgrade(shared, request).await;
    }
    let (parts, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let request = Request::from_parts(parts, Full::new(body.clone()));
    let text = if body.len() < 1 << 20 {
        String::from_utf8_lossy(&body).into_owned()
    } else {
        String::new()
    };
    let fate = note(&shared, &request, text);
    if fate == Fate::Lose {
        return Err("lost on purpose".into());
    }
    if fate == Fate::Refuse {
        let body = r#"{"type":"error","status":"","status_code":0,"error_code":400,"error":"refused on purpose"}"#;
        let mut answer = Response::new(Full::new(Bytes::from(body)));
        *answer.status_mut() = StatusCode::BAD_REQUEST;
        return Ok(answer);
    }
    // a task of its own: what is held goes on even if the sender leaves and this future is dropped
    let answer = tokio::spawn(async move {
        if fate == Fate::Hold {
            hold(&shared, request).await
        } else {
            forward(&shared, request).await
        }
    });
    match (answer.await?, fate) {
        (_, Fate::LoseAnswer) => Err("lost on purpose".into()),
        (answer, Fate::Pass | Fate::Hold | Fate::Lose | Fate::Refuse) => answer,
    }
}

fn note<B>(shared: &Shared, request: &Request<B>, body: String) -> Fate {
    let seen = Seen {
        method: request.method().to_string(),
        path: request.uri().path().to_owned(),
        query: request.uri().query().unwrap_or_default().to_owned(),
        body,
        at: Instant::now(),
    };
    let rule = Arc::clone(&shared.state().rule);
    let fate = rule(&seen);
    let mut state = shared.state();
    state.seen.push(seen);
    state.held += usize::from(fate == Fate::Hold);
    fate
}

async fn hold(shared: &Shared, request: Request<Full<Bytes>>) -> Result<Response<Full<Bytes>>, Failure> {
    let mut released = shared.released.subscribe();
    let waited = released.changed().await;
    let answer = forward(shared, request).await;
    shared.state().held -= 1;
    waited?;
    answer
}

type Sender<B> = hyper::client::conn::http1::SendRequest<B>;

async fn connect<B>(shared: &Shared) -> Result<Sender<B>, Failure>
where
    B: hyper::body::Body<Data = Bytes, Error: Into<Failure>> + Send + 'static,
{
    let stream = TcpStream::connect(&shared.upstream).await?;
    stream.set_nodelay(true)?;
    let host = shared.upstream.split(':').next().unwrap_or_default().to_owned();
    let stream = shared.connector.connect(ServerName::try_from(host)?, stream).await?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    Ok(sender)
}

async fn forward(shared: &Shared, request: Request<Full<Bytes>>) -> Result<Response<Full<Bytes>>, Failure> {
    let response = connect(shared).await?.send_request(request).await?;
    let (mut parts, body) = response.into_parts();
    let body = body.collect().await?.to_bytes();
    // the whole body is here: it has a length now and is not chunked any more
    parts.headers.remove(hyper::header::TRANSFER_ENCODING);
    parts.headers.remove(CONNECTION);
    Ok(Response::from_parts(parts, Full::new(body)))
}

/// Websockets: after the handshake the bytes are copied both ways.
async fn upgrade(shared: Arc<Shared>, mut request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Failure> {
    let client = hyper::upgrade::on(&mut request);
    let (parts, _) = request.into_parts();
    let request = Request::from_parts(parts, Full::new(Bytes::new()));
    let mut response = connect(&shared).await?.send_request(request).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let (parts, body) = response.into_parts();
        return Ok(Response::from_parts(parts, Full::new(body.collect().await?.to_bytes())));
    }
    let server = hyper::upgrade::on(&mut response);
    tokio::spawn(async move {
        if let (Ok(client), Ok(server)) = (client.await, server.await) {
            // either side's end ends the other
            let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(server)).await;
        }
    });
    let (parts, _) = response.into_parts();
    Ok(Response::from_parts(parts, Full::new(Bytes::new())))
}

//-------------------------------------------------------------------- TLS

fn tls(lab: &Lab, server: &Server) -> Result<(TlsAcceptor, TlsConnector), Failure> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let (cert, key) = server.key_pair();
    let certs = chain(&cert)?;
    let pinned = certs.first().ok_or("the server has no certificate")?.clone();
    let accept = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(certs, PrivateKeyDer::from_pem_file(&key)?)?;
    let client_key = PrivateKeyDer::from_pem_slice(lab.client_key().as_bytes())?;
    let client_cert = CertificateDer::from_pem_slice(lab.client_cert().as_bytes())?;
    let connect = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned {
            certificate: pinned,
            provider,
        }))
        .with_client_auth_cert(vec![client_cert], client_key)?;
    Ok((
        TlsAcceptor::from(Arc::new(accept)),
        TlsConnector::from(Arc::new(connect)),
    ))
}

fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    Ok(CertificateDer::pem_file_iter(path)?.collect::<Result<_, _>>()?)
}

/// Trusts one certificate and looks at no name, as clients of Incus and LXD do.
#[derive(Debug)]
struct Pinned {
    certificate: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if *shown == self.certificate {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(rustls::Error::General(
                "the server shows another certificate".to_owned(),
            ))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
