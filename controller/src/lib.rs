//! The binary's own part: the command line, and the wiring of the engine with Kubernetes. What a move is and when it is
//! made is decided in berth-core and carried out in berth-engine; nothing here knows the protocol.
//!
//! | module | what it does |
//! |---|---|
//! | [`cli`] | the command line |
//! | `definitions` | `berth crds` |
//! | `controller` | `berth controller` from start to end: terms of leadership, signals |
//! | `wiring` | watches, the work queue, and who is looked at when something changes |
//! | `placements`, `servers`, `copies` | one pass over one object of that kind |
//! | `report`, `server_status`, `conditions`, `events` | what is said about them |
//! | `records`, `abandon` | the durable records of moves, as InstanceMoves, and giving one up |
//! | `credentials` | client certificates from Secrets, trust tokens |
//! | `store`, `cache`, `queue` | objects read and written, kept in memory, and waiting to be looked at |
//! | `lease`, `cluster` | which of several controllers acts; the way to the API server |
//! | `admin`, `metrics`, `telemetry` | what is shown of all this |

pub mod cli;

mod abandon;
mod admin;
mod cache;
mod cluster;
mod controller;
mod copies;
mod credentials;
mod definitions;
mod events;
mod lease;
mod metrics;
mod placements;
mod queue;
mod records;
mod report;
mod scratch;
mod server_status;
mod servers;
mod store;
mod telemetry;
mod wiring;
