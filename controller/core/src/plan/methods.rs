//! Which method a move uses: the first allowed one that is possible. What keeps each better one from being possible is
//! found out by a module of its own (`live`, …) and shown in the plan.

use berth_api::placement::Rejected;
use berth_api::{Location, Method, Reason, Transfer};

use super::world::{Desired, Located, ServerView};
use super::{Blocker, live};
use crate::model::ServerFacts;

/// Everything that the choice of a method depends on.
#[expect(dead_code, reason = "read by the conditions of Live and Warm")]
pub(super) struct Case<'a> {
    /// The placement.
    pub desired: &'a Desired,
    /// The instance where it is.
    pub located: &'a Located,
    /// The server that has it.
    pub source: &'a ServerView,
    /// The server where it goes: the same one for a move inside it.
    pub target: &'a ServerFacts,
    /// Where exactly it goes.
    pub to: &'a Location,
    /// Way of the data.
    pub transfer: Transfer,
}

/// The method of a move, and what kept the better ones from being used.
pub(super) struct Choice {
    /// The method. If none is possible the blockers say so.
    pub method: Method,
    /// Better ones that are not possible.
    pub rejected: Vec<Rejected>,
}

/// The first allowed method that is possible.
pub(super) fn choose(case: &Case<'_>, blockers: &mut Vec<Blocker>) -> Choice {
    let mut rejected = Vec::new();
    // an instance that does not run needs no stop: there is nothing to be better at
    if !case.located.instance.may_run() {
        return Choice {
            method: Method::Cold,
            rejected,
        };
    }
    for method in &case.desired.spec.methods {
        let unmet = match method {
            Method::Live => live::unmet(case),
            Method::Warm => warm(),
            Method::Cold => Vec::new(),
        };
        if unmet.is_empty() {
            return Choice {
                method: *method,
                rejected,
            };
        }
        rejected.extend(unmet);
    }
    blockers.push(impossible(case.desired, &rejected));
    Choice {
        method: Method::Cold,
        rejected,
    }
}

fn warm() -> Vec<Rejected> {
    vec![Rejected {
        method: Method::Warm,
        reason: Reason::MethodImpossible.as_str().to_owned(),
        message: "warm moves are not part of this version of Berth".to_owned(),
        fix: Some("add Cold to spec.methods to allow a stop".to_owned()),
    }]
}

/// None of the allowed methods is possible.
fn impossible(desired: &Desired, rejected: &[Rejected]) -> Blocker {
    let why: Vec<String> = rejected
        .iter()
        .map(|r| format!("{}: {}", r.method.as_str(), r.message))
        .collect();
    let fix = format!(
        "kubectl patch iplace -n {} {} --type merge -p '{{\"spec\":{{\"methods\":[\"Cold\"]}}}}'",
        desired.namespace, desired.name
    );
    let message = format!("no allowed method is possible ({})", why.join("; "));
    Blocker::new(Reason::MethodImpossible, message, Some(fix))
}
