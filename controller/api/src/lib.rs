//! The published contract of Berth: the four resource kinds, their validation rules and the names of reasons and steps.
//!
//! Nothing here talks to a server or to Kubernetes and nothing here decides anything; the controller, the command line
//! and the tests all read the same types. A released field is never renamed.
#![deny(missing_docs)]
// every printer column has its `type_`: clippy takes the second for a repetition of the first
#![allow(clippy::duplicated_attributes)]

pub mod common;
pub mod conditions;
pub mod copy;
mod crds;
pub mod duration;
pub mod moves;
pub mod placement;
mod placement_status;
pub mod reasons;
mod schema;
pub mod server;
pub mod steps;

pub use common::{
    Estimate, GuardKind, GuardPair, InstanceType, Location, Method, MicroTime, Name, OperationRef, Overrides, Power,
    Snapshots, Stop, Target, Time, Transfer, TransferMode, present,
};
pub use copy::{InstanceCopy, InstanceCopySpec, InstanceCopyStatus};
pub use crds::crds;
pub use duration::GoDuration;
pub use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
pub use moves::{InstanceMove, InstanceMoveSpec, InstanceMoveStatus};
pub use placement::{InstancePlacement, InstancePlacementSpec, InstancePlacementStatus};
pub use reasons::{Reason, ReasonKind};
pub use server::{InstanceServer, InstanceServerSpec, InstanceServerStatus};
pub use steps::{Outcome, Step};

/// API group of all kinds.
pub const GROUP: &str = "berth.dev";
/// API version of all kinds.
pub const VERSION: &str = "v1alpha1";
/// Number of this schema. It rises with every change of a CRD; a controller that finds CRDs of a lower number does not lead.
pub const SCHEMA: i64 = 3;

/// Annotations, labels, finalizers and instance keys that Berth reads or writes.
pub mod keys {
    /// On a CRD: the number of its schema ([`crate::SCHEMA`]).
    pub const SCHEMA: &str = "berth.dev/schema";
    /// On a placement: the digest of the plan that a person approves.
    pub const APPROVE: &str = "berth.dev/approve";
    /// On a placement or move: name of the move whose finalizers are released without touching a server.
    pub const ABANDON: &str = "berth.dev/abandon";
    /// Asks for an immediate look; any new value counts. Shared with Flux.
    pub const REQUESTED_AT: &str = "reconcile.fluxcd.io/requestedAt";
    /// Label of an InstanceMove: its placement.
    pub const PLACEMENT: &str = "berth.dev/placement";
    /// Finalizer on everything a move needs while it runs.
    pub const FINALIZER: &str = "berth.dev/move";
    /// Finalizer of an InstanceCopy with `deletionPolicy: Delete`.
    pub const COPY_FINALIZER: &str = "berth.dev/copy";
    /// Label of the Secret made for a trust token: the InstanceServer.
    pub const SERVER: &str = "berth.dev/server";
    /// Instance key: the move an instance takes part in.
    pub const MOVE: &str = "user.berth.move";
    /// Instance key: `source`, `incoming`, `owner` or `retired`.
    pub const ROLE: &str = "user.berth.role";
    /// Instance key: number of the move that wrote the marks.
    pub const GENERATION: &str = "user.berth.generation";
    /// Instance key: uuid of the instance that this is a copy of.
    pub const COPY_OF: &str = "user.berth.copy-of";
    /// Device that keeps a copy from being started.
    pub const GUARD_DEVICE: &str = "berth-guard";
}
