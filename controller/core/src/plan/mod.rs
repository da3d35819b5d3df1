//! What to do about one placement, as a pure function of it and of what is known of the servers. Waiting is a decision,
//! not an error; every refusal has a reason, a sentence, and the way to mend it.

mod build;
mod drift;
mod dropped;
mod estimate;
mod gate;
mod identify;
mod in_place;
mod kept;
mod lessons;
mod live;
mod methods;
mod preflight;
mod warm;
mod ways;
mod wish;
mod world;

use berth_api::placement::{Drift, Plan};
use berth_api::{GuardKind, InstanceMoveSpec, Reason};
use jiff::Timestamp;

pub use build::{digest, from_location as location};
pub use identify::holder;
pub use in_place::{Tried, TriedResult};
pub use kept::{kept, kept_until};
pub use lessons::{Lesson, Lessons};
pub use wish::wish;
pub use world::{Claim, Desired, Located, Reach, ServerView, Way, World};

use crate::marks;
use crate::model::{Definition, Instance, InstanceRef, ServerFacts};
use crate::overrides::Adaptation;
use crate::server::PowerAction;

/// What was found out about a placement, and what follows.
#[derive(Clone, Debug)]
pub struct Verdict {
    /// Where the instance is, if it was found.
    pub located: Option<Located>,
    /// What differs.
    pub drift: Vec<Drift>,
    /// What would be done about it, for people.
    pub plan: Option<Plan>,
    /// What follows.
    pub decision: Decision,
    /// Whether a change was just made where the instance is: an approval for it is spent.
    pub changed: bool,
}

/// What follows.
#[derive(Clone, Debug)]
pub enum Decision {
    /// Nothing: the instance is as declared.
    InSync,
    /// Nothing now.
    Wait {
        /// Why.
        reason: Reason,
        /// The same in a sentence, with absolute times.
        message: String,
        /// When that changes by itself, if it does.
        until: Option<Timestamp>,
    },
    /// Nothing until a person does something; the first blocker is shown first.
    Blocked(Vec<Blocker>),
    /// The instance is to be started or stopped where it is.
    Power {
        /// Name of the InstanceServer.
        server: String,
        /// The instance.
        at: InstanceRef,
        /// What to do.
        action: PowerAction,
        /// Whether it may be stopped by force if the guest does not.
        force: bool,
    },
    /// The configuration of the instance is to be changed where it is.
    Adapt {
        /// Name of the InstanceServer.
        server: String,
        /// The instance.
        at: InstanceRef,
        /// What is to be changed now.
        change: Box<Adaptation>,
    },
    /// Marks or a guard of a move that is over are to be taken off ([`repaired`]).
    Repair {
        /// Name of the InstanceServer.
        server: String,
        /// The instance.
        at: InstanceRef,
    },
    /// The instance is to be moved; whoever makes the record fills in `attempt`.
    Move(Box<InstanceMoveSpec>),
}

/// Why nothing can be done, and how to change that.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocker {
    /// The reason.
    pub reason: Reason,
    /// The same in a sentence.
    pub message: String,
    /// What a person can do, as a command where there is one.
    pub fix: Option<String>,
}

impl Blocker {
    /// A blocker.
    pub fn new(reason: Reason, message: impl Into<String>, fix: Option<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            fix,
        }
    }
}

/// The instance that a placement is about, if there is exactly one.
pub fn locate(desired: &Desired, world: &World) -> Option<Located> {
    identify::identify(desired, world).ok()
}

/// The definition of an instance without the marks and the guard of a move that is over.
pub fn repaired(instance: &Instance) -> Definition {
    let mut definition = Definition::from(instance);
    marks::strip(&mut definition, GuardKind::Device);
    definition
}

/// What is wrong and what mends it, in one sentence.
pub(crate) fn with_fix(message: &str, fix: Option<&str>) -> String {
    fix.map_or_else(|| message.to_owned(), |fix| format!("{message}; {fix}"))
}

fn wait(reason: Reason, message: impl Into<String>, until: Option<Timestamp>) -> Decision {
    Decision::Wait {
        reason,
        message: message.into(),
        until,
    }
}

/// How the instance would be transferred, and what stands against that: for who copies it rather than move it.
pub fn transfer_of(
    desired: &Desired,
    located: &Located,
    world: &World,
    target: &ServerFacts,
) -> (InstanceMoveSpec, Vec<Blocker>) {
    // which method failed when is of no interest to who sends a copy
    let built = build::build(desired, located, world, target, Timestamp::UNIX_EPOCH);
    (built.spec, built.blockers)
}

/// What to do about a placement without an open move.
pub fn plan(desired: &Desired, world: &World, now: Timestamp) -> Verdict {
    let mut verdict = Verdict {
        located: None,
        drift: Vec::new(),
        plan: None,
        decision: Decision::InSync,
        changed: false,
    };
    match decide(desired, world, now, &mut verdict) {
        Ok(decision) | Err(decision) => verdict.decision = decision,
    }
    verdict
}

fn decide(desired: &Desired, world: &World, now: Timestamp, verdict: &mut Verdict) -> Result<Decision, Decision> {
    let target_exists = identify::target_exists(desired, world);
    let located = match identify::identify(desired, world) {
        Ok(located) => located,
        Err(decision) => return target_exists.and(Err(decision)),
    };
    verdict.located = Some(located.clone());
    target_exists?;
    gate::claimed(desired, &located, world)?;
    let target = &world.servers[&desired.spec.target.server];
    if let Some(first) = &target.duplicate_of {
        let message = format!("{} names the same server as {first}", desired.spec.target.server);
        return Err(Decision::Blocked(vec![Blocker::new(
            Reason::ServerNotFound,
            message,
            Some(format!("set spec.target.server: {first}")),
        )]));
    }
    let here = &world.servers[&located.server];
    if !here.is_listed() {
        return Err(identify::unreachable(&located.server, here));
    }
    gate::foreign(&located, world)?;
    gate::marked_by_another(desired, &located, world)?;
    verdict.drift = drift::drift(desired, &located, world);
    gate::left_to_a_person(desired, &located, world)?;
    if gate::stale(&located, world) {
        gate::policy(desired, verdict)?;
        return Ok(Decision::Repair {
            server: located.server.clone(),
            at: located.at().clone(),
        });
    }
    if verdict.drift.is_empty() {
        return Ok(Decision::InSync);
    }
    let Some(facts) = target.facts.as_deref().filter(|_| target.is_listed()) else {
        return Err(identify::unreachable(&desired.spec.target.server, target));
    };
    if in_place::suffices(&verdict.drift) {
        return in_place::decide(desired, &located, world, facts, verdict, now);
    }
    let built = build::build(desired, &located, world, facts, now);
    verdict.plan = Some(built.plan);
    if let (Some(until), [blocker]) = (built.until, built.blockers.as_slice()) {
        let why = with_fix(&blocker.message, blocker.fix.as_deref());
        return Err(wait(blocker.reason, why, Some(until)));
    }
    if !built.blockers.is_empty() {
        return Err(Decision::Blocked(built.blockers));
    }
    gate::policy(desired, verdict)?;
    gate::history(desired, world, now)?;
    if let Some(blocker) = preflight::filled(desired, world, &built.spec.to, facts) {
        return Err(build::refuse(verdict, blocker));
    }
    gate::approval(desired, verdict)?;
    gate::windows(desired, built.spec.method, verdict, now)?;
    built.leaves?;
    gate::refreshed(&located, world)?;
    gate::slots(&located, desired, world)?;
    Ok(Decision::Move(Box::new(built.spec)))
}
