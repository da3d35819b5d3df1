//! What the suites stand on: a real Kubernetes control plane, real Incus and LXD servers, the controller as a process.
//!
//! A suite is a test target with `harness = false` whose main is made by [`suite!`]; each test is an `async fn(Test)` and
//! reaches everything through its [`Test`]. Nothing here uses the product's own packages: the judge does not ask the judged.

mod controller;
mod gitops;
mod helm;
pub mod history;
mod instance;
mod kube;
mod lab;
mod machine;
mod objects;
mod proxy;
mod recorder;
mod rest;
mod runner;
mod shared;
mod vm;
mod wait;

pub use controller::{Controller, ControllerOptions};
pub use gitops::{GitOps, Repository, argo_lua, example};
pub use helm::{helm_program, objects_of, one_of_kind};
pub use instance::NewInstance;
pub use kube::{AuditEvent, Kube, Kubectl};
pub use lab::{Lab, Product, Server};
pub use objects::{Placement, condition, reason, seconds, summary};
pub use proxy::{Fate, Proxy, Seen};

pub use recorder::Recorder;
pub use rest::ApiError;
pub use runner::{Needs, Suite, Test};
pub use vm::{Heard, NewVm};
pub use wait::{SOON, wait_for, wait_until};
