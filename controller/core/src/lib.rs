//! What Berth decides: facts in, plan, next step and status out. Pure functions of data: no I/O, no clock, no randomness.
//! The two ports ([`server::Server`], [`records::Records`]) are the only asynchronous things here, and only declared.
#![deny(missing_docs)]

pub mod copies;
mod leftover;
pub mod marks;
pub mod model;
pub mod moves;
pub mod overrides;
pub mod plan;
pub mod records;
pub mod server;
pub mod status;
pub mod travel;
pub mod windows;
