//! What a plan is made from: the placement, and everything that is known of the servers of its namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use berth_api::{InstancePlacementSpec, InstancePlacementStatus, Reason, Transfer, present};
use jiff::Timestamp;

use super::in_place::Tried;
use super::lessons::Lessons;
use crate::model::{Contents, Inside, Instance, InstanceRef, Inventory, ServerFacts};
use crate::records::Record;

/// A placement: what somebody wants, and what was last said about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Desired {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Its generation.
    pub generation: i64,
    /// When it was made.
    pub created_at: Timestamp,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// The digest that was approved, from the annotation `berth.dev/approve`.
    pub approve: Option<String>,
    /// The annotation `reconcile.fluxcd.io/requestedAt`.
    pub requested_at: Option<String>,
    /// What is wanted.
    pub spec: InstancePlacementSpec,
    /// What was last said.
    pub status: InstancePlacementStatus,
}

impl Desired {
    /// Name of the instance that is meant.
    pub fn instance_name(&self) -> &str {
        present(&self.spec.instance.name).unwrap_or(&self.name)
    }

    /// Project of the instance that is meant.
    pub fn instance_project(&self) -> &str {
        present(&self.spec.instance.project).unwrap_or("default")
    }

    /// Name that the instance is to have.
    pub fn target_name(&self) -> &str {
        present(&self.spec.target.name).unwrap_or_else(|| self.instance_name())
    }

    /// Project that `instance` is to be in: the declared one, else its own.
    pub fn target_project<'a>(&'a self, instance: &'a Instance) -> &'a str {
        present(&self.spec.target.project).unwrap_or(&instance.at.project)
    }

    /// Storage pool that the root disk of `instance` is to be in, if one is declared: by the target, or as the pool of the
    /// root disk among the overrides.
    pub fn target_pool(&self, instance: &Instance) -> Option<&str> {
        let root = instance.root_device().map_or("root", |(name, _)| name);
        let overridden = self.spec.overrides.devices.get(root).and_then(|d| d.get("pool"));
        present(&self.spec.target.pool).or(overridden.map(String::as_str).filter(|p| !p.is_empty()))
    }

    /// The uuid that the placement is bound to.
    pub fn bound_uuid(&self) -> Option<&str> {
        let bound = || self.status.instance.as_ref().and_then(|i| present(&i.uuid));
        present(&self.spec.instance.uuid).or_else(bound)
    }

    /// The command that asks for another try.
    pub(super) fn request_command(&self) -> String {
        format!(
            "kubectl annotate --overwrite iplace -n {} {} reconcile.fluxcd.io/requestedAt=\"$(date +%s)\"",
            self.namespace, self.name
        )
    }

    /// Answers a new `requestedAt`: what failed is tried again now, what was given up is looked at afresh. Says whether
    /// there was one.
    pub fn handle_request(&mut self) -> bool {
        let Some(requested) = self.requested_at.clone().filter(|r| !r.is_empty()) else {
            return false;
        };
        if self.status.last_handled_reconcile_at.as_ref() == Some(&requested) {
            return false;
        }
        self.status.last_handled_reconcile_at = Some(requested);
        self.status.retry_at = None;
        self.status.failures = None;
        self.status.failed_methods.clear();
        if let Some(last) = self.status.moves.first_mut() {
            last.generation = None;
        }
        true
    }
}

/// Everything that is known when a placement is planned.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// The servers of the placement's namespace by name.
    pub servers: BTreeMap<String, ServerView>,
    /// Which placement holds which instance, over all namespaces.
    pub claims: Vec<Claim>,
    /// The records of this placement, newest attempt first.
    pub records: Vec<Record>,
    /// The finished moves of this placement whose source is kept, oldest first.
    pub kept: Vec<Record>,
    /// Names of all moves that are not finished.
    pub open_moves: Vec<String>,
    /// The uuids of the instances from which a copy is being refreshed.
    pub refreshed: Vec<String>,
    /// What else belongs to the instance; `None` until it was read for the plan of a move.
    pub contents: Option<Contents>,
    /// What moves taught.
    pub lessons: Arc<Lessons>,
    /// Bytes that the instance takes on its pool, if its server was asked and knows.
    pub size: Option<i64>,
    /// What the running container showed of itself, if it was looked into.
    pub inside: Option<Inside>,
    /// A change of the instance's configuration that came to nothing.
    pub tried: Option<Tried>,
    /// Whether the controller can keep a backup on its way.
    pub scratch: bool,
}

impl World {
    /// The newest attempt of this placement.
    pub(super) fn last_attempt(&self) -> Option<&Record> {
        self.records.iter().max_by_key(|r| r.spec.attempt)
    }
}

/// One server as it is known now.
#[derive(Clone, Debug)]
pub struct ServerView {
    /// What it is; kept from the last time while it does not answer.
    pub facts: Option<Arc<ServerFacts>>,
    /// Whether it answers.
    pub reach: Reach,
    /// Its instances; `None` until they were listed once.
    pub instances: Option<Inventory>,
    /// Whether no instance may be moved here.
    pub cordoned: bool,
    /// Namespaces and names of the InstanceServers that say so: any one of the same server counts.
    pub cordoned_by: Vec<(String, String)>,
    /// The InstanceServer of this namespace that names the same server, if this one came second.
    pub duplicate_of: Option<String>,
    /// How many more instances may be on their way in.
    pub free_incoming: i64,
    /// How many more instances may be on their way out.
    pub free_outgoing: i64,
    /// Whether overrides may reach into the host.
    pub allow_unsafe_overrides: bool,
    /// Which ways the data took to it, by the InstanceServer that they came from.
    pub ways: BTreeMap<String, Way>,
    /// Whether live moves to and from other independent servers are allowed.
    pub live_between_servers: bool,
}

/// What is known of the ways from one server to another, with the versions and addresses that they have now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// The one that worked last.
    pub worked: Option<Transfer>,
    /// Those on which one server did not reach the other.
    pub failed: BTreeSet<Transfer>,
}

impl ServerView {
    /// Its fingerprint, if it ever answered.
    pub fn fingerprint(&self) -> Option<&str> {
        self.facts.as_ref().map(|f| f.fingerprint.as_str())
    }

    /// Whether what is known of it is current.
    pub fn is_listed(&self) -> bool {
        self.reach == Reach::Ready && self.instances.is_some() && self.facts.is_some()
    }
}

/// Whether a server answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Reach {
    /// It does.
    Ready,
    /// It was not asked yet.
    Connecting,
    /// It does not.
    Down {
        /// The reason of its Ready condition.
        reason: Reason,
        /// The same in a sentence.
        message: String,
        /// Since when.
        since: Timestamp,
    },
}

/// One placement's hold on one instance.
#[derive(Clone, Debug, PartialEq)]
pub struct Claim {
    /// Namespace of the placement.
    pub namespace: String,
    /// Name of the placement.
    pub name: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// The server that holds the instance.
    pub fingerprint: String,
    /// The instance.
    pub uuid: String,
    /// Whether it moves the instance right now.
    pub moving: bool,
    /// Whether it is being deleted.
    pub deleting: bool,
}

/// The instance that a placement is about, where it is now.
#[derive(Clone, Debug, PartialEq)]
pub struct Located {
    /// Name of the InstanceServer.
    pub server: String,
    /// Its fingerprint.
    pub fingerprint: String,
    /// The instance.
    pub instance: Arc<Instance>,
}

impl Located {
    /// Its place on the server.
    pub fn at(&self) -> &InstanceRef {
        &self.instance.at
    }
}
