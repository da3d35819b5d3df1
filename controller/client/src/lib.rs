//! REST and websocket client of Incus and LXD: the port [`berth_core::server::Server`] over HTTPS.
//! It says what the servers say and does what it is told, once: it decides nothing and never repeats a write.
#![deny(missing_docs)]

mod answer;
mod backups;
mod bodies;
mod events;
mod facts;
mod failure;
mod http;
mod inside;
mod observe;
mod operations;
mod path;
mod server;
mod sockets;
mod tls;
pub mod trust;
mod wire;

pub use http::{Endpoint, HttpServer, connect};
pub use observe::{Observer, RequestClass, RequestRecord};
pub use tls::{ConnectError, Identity, ServerTrust, certificate_fingerprint};
