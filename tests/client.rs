//! The client against recorded answers of real servers and against misbehaviour, over real TLS in this process.

#[path = "client/fake.rs"]
mod fake;
#[path = "client/tls.rs"]
mod tls;
#[path = "client/waiting.rs"]
mod waiting;
#[path = "client/wire.rs"]
mod wire;

use std::path::Path;

use berth_client::{Endpoint, HttpServer, Identity, ServerTrust, connect, trust};
use serde_json::Value;

use fake::Fake;

/// A client of `fake` that pins its certificate.
fn client(fake: &Fake) -> HttpServer {
    client_of(&[&fake.address], ServerTrust::Pem(fake.certificate.clone()))
}

fn client_of(addresses: &[&str], trust: ServerTrust) -> HttpServer {
    connect(&endpoint(addresses, trust)).expect("the certificates can be read")
}

fn endpoint(addresses: &[&str], trust: ServerTrust) -> Endpoint {
    let addresses = addresses.iter().map(|a| (*a).to_owned()).collect();
    Endpoint {
        addresses,
        peer_address: None,
        identity: identity(),
        trust,
    }
}

fn identity() -> Identity {
    trust::new_identity("berth-test").expect("a certificate can be made")
}

/// The recorded exchanges of one scenario.
struct Capture(Value);

impl Capture {
    fn open(name: &str) -> Capture {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fixtures/captures")
            .join(format!("{name}.json"));
        let text = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Capture(serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    fn exchanges(&self) -> &[Value] {
        self.0["exchanges"].as_array().expect("a capture has exchanges")
    }

    /// Status and body of the first answer to that request.
    fn answer(&self, method: &str, path: &str) -> (u16, Value) {
        let asked = |e: &&Value| e["request"]["method"] == method && e["request"]["path"] == path;
        let found = self
            .exchanges()
            .iter()
            .find(asked)
            .unwrap_or_else(|| panic!("{method} {path} was recorded"));
        self.nth_of(found)
    }

    /// Status and body of the answer in exchange `index`.
    fn nth(&self, index: usize) -> (u16, Value) {
        self.nth_of(&self.exchanges()[index])
    }

    fn nth_of(&self, exchange: &Value) -> (u16, Value) {
        let status = exchange["response"]["status"]
            .as_u64()
            .and_then(|s| u16::try_from(s).ok());
        (
            status.expect("an answer has a status"),
            exchange["response"]["body"].clone(),
        )
    }

    /// Body of the answer to a GET.
    fn get(&self, path: &str) -> Value {
        self.answer("GET", path).1
    }
}
