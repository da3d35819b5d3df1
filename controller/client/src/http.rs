//! Requests to one server: addresses in turn, bounded bodies, deadlines, the observer. A request is sent once; only a
//! read whose connection was cut is sent a second time, and a request of which no byte was sent goes to the next address.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use berth_core::server::{FailureKind, Result, ServerError};
use reqwest::header::{ETAG, HeaderMap, HeaderValue, IF_MATCH};
use reqwest::{Client, Method, Response, Url};
use rustls::ClientConfig;

use crate::failure::Cut;
use crate::observe::{Observer, RequestClass, RequestRecord};
use crate::tls::{ConnectError, Identity, Seen, ServerTrust, client_config};

/// Time for TCP and TLS.
pub(crate) const CONNECT: Duration = Duration::from_secs(5);
/// Time for an ordinary request.
pub(crate) const ORDINARY: Duration = Duration::from_secs(30);
/// Time for the list of all instances: a cluster asks its members for up to 30 s before it answers.
pub(crate) const INVENTORY: Duration = Duration::from_secs(120);
/// Time for writes without a precondition (power, rename, move, delete): below the ten seconds that a lease must still have.
pub(crate) const UNCONDITIONAL: Duration = Duration::from_secs(8);

const BODY: usize = 8 << 20;
const INVENTORY_BODY: usize = 256 << 20;

/// Where one server (or cluster) is, who we are to it and how it is recognised.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// `https://host:port`, all of the same server or cluster; the first that answers is used.
    pub addresses: Vec<String>,
    /// `https://host:port` under which other servers reach it; `None`: as we do.
    pub peer_address: Option<String>,
    /// Our certificate and key.
    pub identity: Identity,
    /// How it is recognised.
    pub trust: ServerTrust,
}

/// A server behind its REST API; see [`berth_core::server::Server`].
pub struct HttpServer {
    client: Client,
    tls: Arc<ClientConfig>,
    addresses: Vec<Url>,
    current: AtomicUsize,
    peer_address: Option<String>,
    seen: Seen,
    authenticated: bool,
    observer: Option<Observer>,
}

impl fmt::Debug for HttpServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpServer")
            .field("address", &self.address_in_use())
            .finish_non_exhaustive()
    }
}

/// Prepares to talk to a server; nothing is sent yet.
pub fn connect(endpoint: &Endpoint) -> std::result::Result<HttpServer, ConnectError> {
    HttpServer::new(endpoint, true)
}

impl HttpServer {
    /// `authenticated` false leaves out the header that turns "not trusted" into a refusal.
    pub(crate) fn new(endpoint: &Endpoint, authenticated: bool) -> std::result::Result<Self, ConnectError> {
        let addresses = endpoint
            .addresses
            .iter()
            .map(|a| parse_address(a))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        if addresses.is_empty() {
            return Err(ConnectError::Address {
                address: String::new(),
                reason: "there is none".to_owned(),
            });
        }
        let peer_address = endpoint
            .peer_address
            .as_deref()
            .map(parse_address)
            .transpose()?
            .map(|u| origin(&u));
        let (tls, seen) = client_config(&endpoint.identity, &endpoint.trust)?;
        let client = Client::builder()
            .tls_backend_preconfigured(tls.clone())
            .connect_timeout(CONNECT)
            .https_only(true)
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(USER_AGENT)
            .pool_max_idle_per_host(4)
            .build()
            .map_err(|e| ConnectError::Setup(e.to_string()))?;
        let (current, tls) = (AtomicUsize::new(0), Arc::new(tls));
        Ok(Self {
            client,
            tls,
            addresses,
            current,
            peer_address,
            seen,
            authenticated,
            observer: None,
        })
    }

    /// Has `observer` called once per request.
    #[must_use]
    pub fn with_observer(mut self, observer: Observer) -> Self {
        self.observer = Some(observer);
        self
    }

    /// `https://host:port` of the address that answered last.
    pub fn address_in_use(&self) -> String {
        origin(self.current())
    }

    /// `https://host:port` under which other servers reach this one.
    pub fn peer_address(&self) -> String {
        self.peer_address.clone().unwrap_or_else(|| self.address_in_use())
    }

    /// SHA-256 of the certificate that the server presented last; `None` before the first connection.
    pub fn fingerprint(&self) -> Option<String> {
        self.seen.lock().ok().and_then(|seen| seen.clone())
    }

    pub(crate) fn tls(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.tls)
    }

    pub(crate) fn observer(&self) -> Option<&Observer> {
        self.observer.as_ref()
    }

    fn current(&self) -> &Url {
        &self.addresses[self.current.load(Ordering::Relaxed) % self.addresses.len()]
    }

    /// All addresses, the one in use first, each with its index for [`HttpServer::use_address`].
    pub(crate) fn in_turn(&self) -> impl Iterator<Item = (usize, &Url)> {
        let (first, count) = (self.current.load(Ordering::Relaxed), self.addresses.len());
        (0..count)
            .map(move |i| (first + i) % count)
            .map(|i| (i, &self.addresses[i]))
    }

    pub(crate) fn use_address(&self, index: usize) {
        self.current.store(index, Ordering::Relaxed);
    }

    pub(crate) fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if self.authenticated {
            for name in ["x-incus-authenticated", "x-lxd-authenticated"] {
                headers.insert(name, HeaderValue::from_static("true"));
            }
        }
        headers
    }

    /// A GET that goes its own way, without deadline and log: its address may hold a secret.
    pub(crate) fn plain_get(&self, url: Url) -> reqwest::RequestBuilder {
        self.client.get(url).headers(self.headers())
    }

    /// A request to the address in use, without deadline.
    pub(crate) fn request_in_use(&self, call: &Call) -> std::result::Result<reqwest::RequestBuilder, Cut> {
        let url = self
            .current()
            .join(&call.path)
            .map_err(|e| Cut::unsent(&e.to_string()))?;
        let request = self.client.request(call.method.clone(), url).headers(self.headers());
        Ok(match &call.body {
            Some(body) => request.json(body),
            None => request,
        })
    }

    pub(crate) fn error(&self, call: &Call, kind: FailureKind, message: impl Into<String>) -> ServerError {
        ServerError::new(kind, format!("{} on {}", call.attempted, host(self.current())), message)
    }

    /// Sends the request and reads the whole answer, whatever it says.
    pub(crate) async fn send(&self, call: &Call) -> Result<Raw> {
        let deadline = Instant::now() + call.timeout;
        let first = self.send_once(call, deadline).await;
        match first {
            // a pooled connection that the server has just closed: a read may go out again
            Err(cut) if call.method == Method::GET && cut.kind == FailureKind::Unknown && !cut.timed_out => {
                self.send_once(call, deadline).await
            }
            other => other,
        }
        .map_err(|cut| self.error(call, cut.kind, cut.message))
    }

    async fn send_once(&self, call: &Call, deadline: Instant) -> std::result::Result<Raw, Cut> {
        let mut worst: Option<Cut> = None;
        for (index, address) in self.in_turn() {
            let cut = match self.send_to(address, call, deadline).await {
                Ok(raw) => {
                    self.use_address(index);
                    return Ok(raw);
                }
                Err(cut) if !cut.unsent => {
                    self.use_address(index);
                    return Err(cut);
                }
                Err(cut) => cut,
            };
            // a wrong certificate is worth more attention than an address that does not answer
            if worst.as_ref().is_none_or(|w| w.kind == FailureKind::Unreachable) {
                worst = Some(cut);
            }
        }
        Err(worst.unwrap_or_else(|| Cut::unsent("no address")))
    }

    async fn send_to(&self, address: &Url, call: &Call, deadline: Instant) -> std::result::Result<Raw, Cut> {
        let url = address.join(&call.path).map_err(|e| Cut::unsent(&e.to_string()))?;
        let started = Instant::now();
        let mut request = self
            .client
            .request(call.method.clone(), url)
            .headers(self.headers())
            .timeout(deadline.saturating_duration_since(started));
        if let Some(etag) = &call.etag {
            request = request.header(IF_MATCH, etag);
        }
        if let Some(body) = &call.body {
            request = request.json(body);
        }
        let answer = match request.send().await {
            Ok(response) => Raw::read(response, call.class.limit()).await,
            Err(e) => Err(Cut::of_http(e)),
        };
        let (status, bytes) = answer
            .as_ref()
            .map_or((None, 0), |raw| (Some(raw.status), raw.body.len() as u64));
        let duration = started.elapsed();
        // names and ids, but no bodies: secrets are only there
        tracing::debug!(
            server = %host(address), method = %call.method, path = call.path, status, bytes,
            milliseconds = duration.as_millis(), failure = answer.as_ref().err().map(|cut| cut.message.as_str()), "request"
        );
        if let Some(observer) = &self.observer {
            observer(RequestRecord {
                method: method_name(&call.method),
                class: call.class,
                status,
                duration,
                bytes,
            });
        }
        answer
    }
}

/// One request.
pub(crate) struct Call {
    pub(crate) method: Method,
    pub(crate) class: RequestClass,
    /// Path and query, encoded.
    pub(crate) path: String,
    pub(crate) body: Option<serde_json::Value>,
    /// For `If-Match`.
    pub(crate) etag: Option<String>,
    pub(crate) timeout: Duration,
    /// What is attempted on what, for errors.
    pub(crate) attempted: String,
}

impl Call {
    pub(crate) fn new(method: Method, class: RequestClass, path: String, attempted: impl Into<String>) -> Self {
        Self {
            method,
            class,
            path,
            body: None,
            etag: None,
            timeout: ORDINARY,
            attempted: attempted.into(),
        }
    }

    pub(crate) fn get(class: RequestClass, path: impl Into<String>, attempted: impl Into<String>) -> Self {
        Self::new(Method::GET, class, path.into(), attempted)
    }

    pub(crate) fn body(mut self, body: serde_json::Value) -> Self {
        self.body = Some(body);
        self
    }

    pub(crate) fn etag(mut self, etag: &str) -> Self {
        self.etag = Some(etag.to_owned());
        self
    }

    pub(crate) fn within(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

/// An answer as it came.
pub(crate) struct Raw {
    pub(crate) status: u16,
    pub(crate) etag: Option<String>,
    /// Of a file: who owns it.
    pub(crate) owner: Option<u32>,
    pub(crate) body: Vec<u8>,
}

impl Raw {
    pub(crate) async fn read(mut response: Response, limit: usize) -> std::result::Result<Self, Cut> {
        let status = response.status().as_u16();
        let etag = response
            .headers()
            .get(ETAG)
            .and_then(|v| v.to_str().ok())
            .map(str::to_owned);
        let owner = ["x-incus-uid", "x-lxd-uid"]
            .iter()
            .find_map(|name| response.headers().get(*name)?.to_str().ok()?.parse().ok());
        let announced = response
            .content_length()
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(0);
        let mut body = Vec::with_capacity(announced.min(limit));
        if announced > limit {
            return Err(Cut::oversized(limit));
        }
        while let Some(chunk) = response.chunk().await.map_err(Cut::of_http)? {
            if body.len() + chunk.len() > limit {
                return Err(Cut::oversized(limit));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Self {
            status,
            etag,
            owner,
            body,
        })
    }
}

impl RequestClass {
    fn limit(self) -> usize {
        match self {
            RequestClass::Inventory => INVENTORY_BODY,
            _ => BODY,
        }
    }
}

impl Cut {
    fn unsent(message: &str) -> Self {
        Self {
            kind: FailureKind::Unreachable,
            message: message.to_owned(),
            unsent: true,
            timed_out: false,
        }
    }

    fn oversized(limit: usize) -> Self {
        let message = format!("the answer is larger than {} MiB", limit >> 20);
        Self {
            kind: FailureKind::Protocol,
            message,
            unsent: false,
            timed_out: false,
        }
    }
}

pub(crate) const USER_AGENT: &str = concat!("berth/", env!("CARGO_PKG_VERSION"));

fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        _ => "OTHER",
    }
}

/// Reads `https://host[:port]`; the servers' own default port is 8443.
fn parse_address(text: &str) -> std::result::Result<Url, ConnectError> {
    let wrong = |reason: &str| ConnectError::Address {
        address: text.to_owned(),
        reason: reason.to_owned(),
    };
    let mut url = Url::parse(text).map_err(|e| wrong(&e.to_string()))?;
    if url.scheme() != "https" {
        return Err(wrong("it must begin with https://"));
    }
    if url.path() != "/" || url.query().is_some() || url.fragment().is_some() || !url.username().is_empty() {
        return Err(wrong("it must be https://host:port and nothing more"));
    }
    // URL parsers drop an explicit :443
    if url.port().is_none() && !text.trim_end_matches('/').ends_with(":443") && url.set_port(Some(8443)).is_err() {
        return Err(wrong("it has no host"));
    }
    Ok(url)
}

/// `host:port`.
pub(crate) fn host(url: &Url) -> String {
    format!(
        "{}:{}",
        url.host_str().unwrap_or_default(),
        url.port_or_known_default().unwrap_or(443)
    )
}

fn origin(url: &Url) -> String {
    format!("https://{}", host(url))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_https_with_host_and_port_and_nothing_else() {
        let address = |text| parse_address(text).map(|url| origin(&url));
        assert_eq!(address("https://rack-a:8443"), Ok("https://rack-a:8443".to_owned()));
        assert_eq!(address("https://rack-a/"), Ok("https://rack-a:8443".to_owned()));
        assert_eq!(
            address("https://lb.example:443"),
            Ok("https://lb.example:443".to_owned())
        );
        assert_eq!(
            address("https://[fd00::1]:9000"),
            Ok("https://[fd00::1]:9000".to_owned())
        );
        for wrong in [
            "http://rack-a:8443",
            "rack-a:8443",
            "https://rack-a/1.0",
            "https://me@rack-a",
            "",
        ] {
            assert!(address(wrong).is_err(), "{wrong}");
        }
    }
}
