//! Which method a move uses: the first allowed one that is possible. What keeps each better one from being possible is
//! found out by a module of its own (`live`, `warm`) and shown in the plan, with what the chosen one is expected to take.

use berth_api::placement::Rejected;
use berth_api::{Estimate, Location, Method, Reason, Transfer};
use jiff::{SignedDuration, Timestamp, Unit};
use serde::Serialize;

use super::build::hash;
use super::estimate::Data;
use super::lessons::Lesson;
use super::world::{Desired, Located, ServerView, World};
use super::{Blocker, live, warm};
use crate::model::{Config, Devices, ServerFacts};
use crate::moves::rounds::{Way, way_between};

/// A method that failed is not tried again for so long, unless something changes.
const REMEMBERED: SignedDuration = SignedDuration::from_hours(24);
/// A better method may be expected to take that much longer than a worse one, in milliseconds.
const TOLERANCE: i64 = 1000;

/// Everything that the choice of a method depends on.
pub(super) struct Case<'a> {
    /// The placement.
    pub desired: &'a Desired,
    /// The instance where it is.
    pub located: &'a Located,
    /// The server that has it.
    pub source: &'a ServerView,
    /// The server where it goes: the same one for a move inside it.
    pub target: &'a ServerFacts,
    /// The same as its InstanceServer has it.
    pub target_view: &'a ServerView,
    /// Where exactly it goes.
    pub to: &'a Location,
    /// Way of the data.
    pub transfer: Transfer,
    /// What moves taught, and the size of the instance.
    pub world: &'a World,
    /// The time.
    pub now: Timestamp,
}

impl Case<'_> {
    /// How the instance is copied while it runs; `None`: its pools are not known.
    pub fn way(&self) -> Option<Way> {
        let source = self.source.facts.as_deref()?;
        way_between(
            source,
            self.located.instance.root_pool(),
            self.target,
            self.to.pool.as_deref(),
        )
    }

    /// What moves between these pools taught.
    pub fn lesson(&self) -> Lesson {
        let from = (self.located.fingerprint.as_str(), self.located.instance.root_pool());
        self.world
            .lessons
            .of(from, (&self.target.fingerprint, self.to.pool.as_deref()))
    }

    /// What a move by `method` is expected to take, as far as that can be said.
    fn estimate(&self, method: Method) -> Option<Estimate> {
        if self.transfer == Transfer::Internal {
            return None;
        }
        let taught = || self.world.lessons.size(self.located.instance.uuid()?);
        let bytes = self.world.size.or_else(taught)?;
        let lesson = self.lesson();
        let data = Data {
            bytes,
            way: self.way(),
            lesson: &lesson,
            back: method == Method::Cold && super::kept::spares_bytes(self),
        };
        match method {
            Method::Cold => Some(data.cold()),
            Method::Warm => Some(data.warm()),
            Method::Live => Some(Estimate {
                bytes: Some(bytes),
                ..Default::default()
            }),
        }
    }

    /// Stands for everything that a failure of `method` may have depended on.
    pub fn inputs(&self, method: Method) -> String {
        #[derive(Serialize)]
        struct Inputs<'a> {
            method: Method,
            uuid: Option<&'a str>,
            from: (&'a str, Option<&'a str>, Option<&'a str>),
            to: (&'a str, &'a str, &'a Location),
            transfer: Transfer,
            spec: (
                bool,
                berth_api::placement::Warm,
                berth_api::placement::Live,
                berth_api::Snapshots,
            ),
            max_downtime: Option<berth_api::GoDuration>,
            config: Config,
            devices: &'a Devices,
        }
        let (i, spec) = (&self.located.instance, &self.desired.spec);
        hash(&Inputs {
            method,
            uuid: i.uuid(),
            from: (
                &self.located.fingerprint,
                self.source.facts.as_ref().map(|f| f.version.as_str()),
                i.root_pool(),
            ),
            to: (&self.target.fingerprint, &self.target.version, self.to),
            transfer: self.transfer,
            spec: (spec.criu, spec.warm, spec.live, spec.snapshots),
            max_downtime: spec.max_downtime,
            config: crate::moves::plain_config(&i.expanded_config),
            devices: &i.expanded_devices,
        })
    }
}

/// The method of a move, and what kept the better ones from being used.
pub(super) struct Choice {
    /// The method. If none is possible the blockers say so.
    pub method: Method,
    /// What it is expected to take.
    pub estimate: Option<Estimate>,
    /// Better ones that are not possible.
    pub rejected: Vec<Rejected>,
    /// If none is possible: when one of them may be tried again.
    pub until: Option<Timestamp>,
}

/// The first allowed method that is possible.
pub(super) fn choose(case: &Case<'_>, blockers: &mut Vec<Blocker>) -> Choice {
    let mut choice = Choice {
        method: Method::Cold,
        estimate: None,
        rejected: Vec::new(),
        until: None,
    };
    // an instance that does not run needs no stop: there is nothing to be better at
    if !case.located.instance.may_run() {
        return choice;
    }
    let methods = &case.desired.spec.methods;
    for (nth, method) in methods.iter().enumerate() {
        let estimate = case.estimate(*method);
        let mut unmet = match method {
            Method::Live => live::unmet(case),
            Method::Warm => warm::unmet(case),
            Method::Cold => Vec::new(),
        };
        if unmet.is_empty() {
            let failed = failed_before(case, *method);
            choice.until = choice.until.into_iter().chain(failed.as_ref().map(|(_, u)| *u)).min();
            unmet.extend(failed.map(|(why, _)| why));
            unmet.extend(too_long(case, *method, estimate));
            unmet.extend(no_better(
                case,
                *method,
                estimate,
                methods.get(nth + 1..).unwrap_or_default(),
            ));
        }
        if unmet.is_empty() {
            (choice.method, choice.estimate, choice.until) = (*method, estimate, None);
            return choice;
        }
        choice.rejected.extend(unmet);
    }
    blockers.push(impossible(case.desired, &choice.rejected));
    choice
}

/// A method that is not possible.
pub(super) fn rejection(method: Method, reason: Reason, message: String, fix: Option<String>) -> Rejected {
    Rejected {
        method,
        reason: reason.as_str().to_owned(),
        message,
        fix,
    }
}

/// A method that failed for this instance on this way, and until when that counts.
fn failed_before(case: &Case<'_>, method: Method) -> Option<(Rejected, Timestamp)> {
    let failed = case.desired.status.failed_methods.iter().find(|f| f.method == method)?;
    let until = failed.at.0.checked_add(REMEMBERED).ok()?;
    if failed.inputs != case.inputs(method) || until <= case.now {
        return None;
    }
    let at = failed.at.0.round(Unit::Second).unwrap_or(failed.at.0);
    let fix = format!("to try it again before {until}: {}", case.desired.request_command());
    let why = Rejected {
        method,
        reason: failed.reason.clone(),
        message: format!("tried at {at}: {}", failed.message),
        fix: Some(fix),
    };
    Some((why, until))
}

/// A stop that is expected to be longer than is allowed.
fn too_long(case: &Case<'_>, method: Method, estimate: Option<Estimate>) -> Option<Rejected> {
    let most = case.desired.spec.max_downtime.filter(|_| method != Method::Live)?;
    let fix = Some(format!(
        "raise spec.maxDowntime ({most}), or make a better method possible"
    ));
    let downtime = estimate.and_then(|e| e.downtime);
    let message = match downtime {
        Some(expected) if expected <= most => return None,
        Some(expected) => format!("it would not run for about {expected}, and spec.maxDowntime is {most}"),
        // a Warm move looks at what it measured before it stops anything
        None if method == Method::Warm => return None,
        None => {
            format!("its size is not known, so whether it would be stopped for longer than {most} cannot be foretold")
        }
    };
    Some(rejection(method, Reason::DowntimeTooLong, message, fix))
}

/// A Warm move that is expected to stop the instance for longer than the Cold one that is allowed, too.
fn no_better(case: &Case<'_>, method: Method, estimate: Option<Estimate>, later: &[Method]) -> Option<Rejected> {
    if method != Method::Warm || !later.contains(&Method::Cold) {
        return None;
    }
    let (warm, cold) = (estimate?.downtime?, case.estimate(Method::Cold)?.downtime?);
    let message = format!("it is expected not to run for {warm} with Warm, for {cold} with Cold");
    let longer = warm.as_millis() > cold.as_millis() + TOLERANCE;
    longer.then(|| rejection(method, Reason::MethodImpossible, message, None))
}

/// None of the allowed methods is possible.
fn impossible(desired: &Desired, rejected: &[Rejected]) -> Blocker {
    let why: Vec<String> = rejected
        .iter()
        .map(|r| format!("{}: {}", r.method.as_str(), r.message))
        .collect();
    let message = format!("no allowed method is possible ({})", why.join("; "));
    let too_long = rejected.iter().find(|r| r.reason == Reason::DowntimeTooLong.as_str());
    if let Some(too_long) = too_long {
        return Blocker::new(Reason::DowntimeTooLong, message, too_long.fix.clone());
    }
    let fix = format!(
        "kubectl patch iplace -n {} {} --type merge -p '{{\"spec\":{{\"methods\":[\"Cold\"]}}}}'",
        desired.namespace, desired.name
    );
    Blocker::new(Reason::MethodImpossible, message, Some(fix))
}
