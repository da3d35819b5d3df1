//! In-memory Incus and LXD servers for tests: they behave as the real ones were seen to behave, on a virtual clock, with
//! faults at every write. Implements both ports of berth-core and checks the invariants of the move protocol after every
//! change. Not a model of the protocol: nothing here knows what a move is, but for reading records in the invariants.

mod backups;
mod config;
mod criu;
mod evacuate;
mod faults;
mod guests;
mod invariants;
mod migrate;
mod operations;
mod options;
mod people;
mod power;
mod records;
mod relocate;
mod server;
mod sockets;
mod state;
mod view;
mod world;
mod writes;

pub use faults::{Caller, Entry, Fault, Hook, LateRequest, WriteInfo};
pub use invariants::Breach;
pub use options::{Guest, InstanceOptions, Options, Timing};
pub use records::MemoryRecords;
pub use server::SimServer;
pub use state::CERTIFICATE;
pub use world::World;
pub use writes::Write;
