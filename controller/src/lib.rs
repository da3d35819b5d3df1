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
//! | `records` | the durable records of moves, as InstanceMoves |
//! | `credentials` | client certificates from Secrets, trust tokens |
//! | `lease` | which of several controllers acts |
//! | `admin`, `metrics`, `telemetry` | what is shown of all this |

pub mod cli;

mod admin;
mod cache;
mod cluster;
mod controller;
mod definitions;
mod lease;
mod metrics;
mod queue;
mod records;
mod store;
mod telemetry;
