//! What is said about a placement: its status from what was decided, as data. Conditions follow kstatus; messages hold
//! absolute times, so that a status that says the same is the same.

use berth_api::conditions::{self, ConditionStatus, LEFTOVER_PENDING};
use berth_api::placement::{BoundInstance, CurrentMove, FailedMethod, MoveSummary};
use berth_api::{InstancePlacementStatus, InstanceType, Location, Method, Outcome, Reason, Step, Time};
use jiff::{SignedDuration, Timestamp, Unit};

use crate::model::InstanceKind;
use crate::moves::{is_restart, trouble};
use crate::plan::{Decision, Desired, Located, Verdict, location, with_fix};
use crate::records::Record;

/// How long the source's server may be silent after the start before the placement counts as placed without it.
const PATIENCE: SignedDuration = SignedDuration::from_secs(60);
/// Finished moves that a placement remembers.
const MOVES: usize = 5;
/// First and longest wait after a failed move, in seconds.
const BACKOFF: (i64, i64) = (10, 600);

/// The status of a placement whose move `record` runs.
pub fn moving(
    desired: &Desired,
    record: &Record,
    located: Option<&Located>,
    now: Timestamp,
) -> InstancePlacementStatus {
    let mut status = base(desired, located);
    status.current_move = Some(CurrentMove {
        name: record.name.clone(),
        percent: record.status.progress.as_ref().and_then(|p| p.percent),
        method: record.spec.method,
    });
    let (reason, message) = story(record);
    ready(&mut status, reason, &message, desired.generation, now);
    status
}

/// The status of a placement without a move in the way; `leftover` is a committed move whose source is out of reach.
pub fn resting(
    desired: &Desired,
    verdict: &Verdict,
    leftover: Option<&Record>,
    now: Timestamp,
) -> InstancePlacementStatus {
    if is_no_news(desired, verdict) {
        return desired.status.clone();
    }
    let mut status = base(desired, verdict.located.as_ref());
    status.drift = verdict.drift.iter().map(|d| d.as_str().to_owned()).collect();
    status.plan.clone_from(&verdict.plan);
    status.current_move = None;
    if verdict.changed {
        status.committed_moves = Some(status.committed_moves.unwrap_or(0) + 1);
    }
    let (reason, message) = match &verdict.decision {
        Decision::InSync => (Reason::InPlace, in_place(verdict.located.as_ref())),
        Decision::Wait { reason, message, .. } => (*reason, message.clone()),
        Decision::Blocked(blockers) => blockers.first().map_or((Reason::NeedsAttention, String::new()), |b| {
            (b.reason, with_fix(&b.message, b.fix.as_deref()))
        }),
        Decision::Repair { at, .. } => (
            Reason::StaleMarks,
            format!("{at} carries the marks of a move that is over; they are taken off"),
        ),
        Decision::Adapt { at, change, .. } => (
            Reason::Updating,
            format!("{} of {at} are being changed", change.names()),
        ),
        Decision::Power { at, .. } => (Reason::Updating, format!("power state of {at} is being changed")),
        Decision::Move(spec) => (
            Reason::Moving,
            format!("{} move to {} begins", spec.method.as_str(), place(&spec.to.location())),
        ),
    };
    ready(&mut status, reason, &message, desired.generation, now);
    match leftover {
        None => conditions::remove(&mut status.conditions, LEFTOVER_PENDING),
        Some(record) => {
            let from = &record.spec.from;
            let name = record
                .status
                .names
                .as_ref()
                .and_then(|n| n.retired.as_deref())
                .unwrap_or(&from.name);
            let message = format!("{name} on {} is deleted as soon as that server answers", from.server);
            let what = (LEFTOVER_PENDING, ConditionStatus::True);
            conditions::set(
                &mut status.conditions,
                what,
                ("ServerUnreachable", &message),
                Some(desired.generation),
                now,
            );
        }
    }
    status
}

/// That a process has just started, and has not heard of a server yet, takes back nothing of what was said of this very spec.
fn is_no_news(desired: &Desired, verdict: &Verdict) -> bool {
    let waits_to_hear = matches!(
        verdict.decision,
        Decision::Wait {
            reason: Reason::Progressing,
            ..
        }
    );
    let said = conditions::is_said_of(&desired.status.conditions, desired.generation);
    waits_to_hear && said
}

/// Whether a committed move waits only for the server of its former source, and has for a minute.
pub fn is_leftover(record: &Record, now: Timestamp) -> bool {
    let waits = matches!(record.status.step(), Some(Step::Started | Step::Retired)) && !record.finished();
    let silent = record
        .status
        .last_error
        .as_ref()
        .is_some_and(|e| e.reason == Reason::ServerUnreachable.as_str());
    let since = record
        .status
        .running_at
        .as_ref()
        .or(record.status.committed_at.as_ref());
    waits && silent && since.is_some_and(|t| now.duration_since(t.0) >= PATIENCE)
}

/// Takes a finished move into the placement's memory, once: history, failures, and when it is tried again.
pub fn remember(status: &mut InstancePlacementStatus, record: &Record, generation: i64) {
    let Some(outcome) = record.status.outcome() else { return };
    if status.moves.iter().any(|m| m.name == record.name) {
        return;
    }
    let at = record
        .status
        .finished_at
        .as_ref()
        .map(|t| t.0.round(Unit::Second).unwrap_or(t.0));
    let (reason, message) = trouble(&record.status).unzip();
    let summary = MoveSummary {
        name: record.name.clone(),
        method: record.spec.method,
        transfer: Some(record.spec.transfer),
        from: place(&record.spec.from.location()),
        to: place(&record.spec.to.location()),
        outcome: outcome.as_str().to_owned(),
        reason: reason.map(str::to_owned),
        message: message.filter(|m| !m.is_empty()).map(str::to_owned),
        finished_at: at.map(Time),
        downtime: record.status.downtime,
        generation: Some(record.spec.generation.unwrap_or(generation)),
    };
    status.moves.insert(0, summary);
    status.moves.truncate(MOVES);
    match outcome {
        Outcome::Succeeded => {
            status.committed_moves = Some(status.committed_moves.unwrap_or(0) + 1);
            (status.failures, status.retry_at) = (None, None);
        }
        Outcome::Undone if failed_method(record) => {
            let undo = record.status.undo.clone().unwrap_or_default();
            let method = record.spec.method;
            status.failed_methods.retain(|f| f.method != method);
            status.failed_methods.push(FailedMethod {
                method,
                reason: undo.reason,
                message: undo.message,
                inputs: record.spec.inputs.clone().unwrap_or_default(),
                at: Time(at.unwrap_or_default()),
            });
            // the next method is tried at once
            status.retry_at = None;
        }
        Outcome::Undone if failed(record) => {
            let failures = status.failures.unwrap_or(0) + 1;
            let wait = (BACKOFF.0 << (failures - 1).clamp(0, 6)).min(BACKOFF.1);
            status.failures = Some(failures);
            status.retry_at = at
                .and_then(|t| t.checked_add(SignedDuration::from_secs(wait)).ok())
                .map(Time);
        }
        Outcome::Undone | Outcome::Cancelled | Outcome::NeedsAttention => {}
    }
}

/// Whether it was the method that failed, and not a daemon or a link. Cold has nothing below it to fall back to.
fn failed_method(record: &Record) -> bool {
    let of_method = [
        Reason::NotIncremental,
        Reason::GuestFrozen,
        Reason::DowntimeTooLong,
        Reason::CriuMissing,
        Reason::MethodImpossible,
        Reason::TargetRefused,
    ];
    let cause = record.status.undo.as_ref().map(|u| u.reason.as_str());
    record.spec.method != Method::Cold && of_method.iter().any(|r| Some(r.as_str()) == cause)
}

/// Whether a move was undone because something failed, not because somebody wanted it.
fn failed(record: &Record) -> bool {
    let wanted = [
        Reason::Suspended,
        Reason::DriftObserved,
        Reason::Progressing,
        Reason::WaitingForWindow,
        Reason::Pending,
    ];
    let cause = record.status.undo.as_ref().map(|u| u.reason.as_str());
    let cause = cause.or(record.status.last_error.as_ref().map(|e| e.reason.as_str()));
    !wanted.iter().any(|w| Some(w.as_str()) == cause)
}

fn base(desired: &Desired, located: Option<&Located>) -> InstancePlacementStatus {
    let mut status = desired.status.clone();
    status.observed_generation = Some(desired.generation);
    let target = &desired.spec.target;
    let member = target
        .member
        .as_deref()
        .or(target.group.as_deref())
        .filter(|m| !m.is_empty());
    status.target = Some(member.map_or_else(|| target.server.clone(), |m| format!("{}/{m}", target.server)));
    if let Some(located) = located {
        status.location = Some(location(located));
        status.instance = Some(BoundInstance {
            uuid: located.instance.uuid().map(str::to_owned),
            type_: Some(match located.instance.kind {
                InstanceKind::Container => InstanceType::Container,
                InstanceKind::VirtualMachine => InstanceType::VirtualMachine,
            }),
            architecture: Some(located.instance.architecture.clone()),
            power: Some(located.instance.power.as_str().to_owned()),
        });
    }
    status
}

/// What a running move does, in a sentence that changes only when the move changes.
fn story(record: &Record) -> (Reason, String) {
    let restart = is_restart(record);
    let what = if restart {
        format!("restart of {} for its configuration", record.spec.from.name)
    } else {
        format!(
            "{} move to {}",
            record.spec.method.as_str(),
            place(&record.spec.to.location())
        )
    };
    let reason = if restart { Reason::Updating } else { Reason::Moving };
    if let Some(undo) = &record.status.undo {
        let told = record.status.last_error.as_ref();
        let pending = told.and_then(|e| Some((Reason::parse(&e.reason)?, e)));
        return match pending {
            Some((reason @ (Reason::StopPending | Reason::NeedsAttention), e)) => {
                (reason, with_fix(&e.message, e.fix.as_deref()))
            }
            Some(_) | None => (reason, format!("{what} is being undone: {}", undo.message)),
        };
    }
    let trouble = record
        .status
        .last_error
        .as_ref()
        .map(|e| format!(": {}", e.message))
        .unwrap_or_default();
    let since = record
        .status
        .started_at
        .as_ref()
        .map(|t| t.0.round(Unit::Second).unwrap_or(t.0));
    let since = since.map(|t| format!(" since {t}")).unwrap_or_default();
    (reason, format!("{what}{since}{trouble}"))
}

fn in_place(located: Option<&Located>) -> String {
    located.map_or_else(String::new, |l| format!("{} is on {}", l.at(), place(&location(l))))
}

/// A place for people: server, and member where there is one.
fn place(location: &Location) -> String {
    match location.member.as_deref().filter(|m| !m.is_empty()) {
        Some(member) => format!("{}/{member}", location.server),
        None => location.server.clone(),
    }
}

fn ready(status: &mut InstancePlacementStatus, reason: Reason, message: &str, generation: i64, now: Timestamp) {
    let list = &mut status.conditions;
    let kind = conditions::kind_now(list, reason, now);
    conditions::say(list, kind, (reason.as_str(), message), Some(generation), now);
}
