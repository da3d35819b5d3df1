//! The conditions of a record, which follow from its step and outcome (kstatus): for people and tools, never read here.

use berth_api::conditions::{self, ConditionStatus, READY, RECONCILING, STALLED};
use berth_api::{InstanceMoveStatus, Outcome, Step};
use jiff::{Timestamp, Unit};

use crate::records::Record;

/// Makes the conditions say what the record says.
pub(super) fn say(record: &mut Record, now: Timestamp) {
    let status = &mut record.status;
    // the spec never changes but for cancel, which is one-way
    let generation = Some(1 + i64::from(record.spec.cancel));
    status.observed_generation = generation;
    let message = message(status);
    let outcome = status.outcome();
    let (ready, also) = match outcome {
        None => (ConditionStatus::False, Some(RECONCILING)),
        Some(Outcome::Succeeded) => (ConditionStatus::True, None),
        Some(Outcome::NeedsAttention) => (ConditionStatus::False, Some(STALLED)),
        // it ended as it should: whether the instance is where it belongs is said by its placement
        Some(Outcome::Undone | Outcome::Cancelled) => (ConditionStatus::False, None),
    };
    let reason = match outcome {
        Some(outcome) => outcome.as_str().to_owned(),
        None => status
            .step
            .clone()
            .unwrap_or_else(|| Step::Accepted.as_str().to_owned()),
    };
    let said = (reason.as_str(), message.as_str());
    let list = &mut status.conditions;
    conditions::set(list, (READY, ready), said, generation, now);
    for kind in [RECONCILING, STALLED] {
        match also == Some(kind) {
            true => conditions::set(list, (kind, ConditionStatus::True), said, generation, now),
            false => conditions::remove(list, kind),
        }
    }
}

/// `round 2, 42 %`, what went wrong, or since when; with absolute times, so that what stays the same is not written anew.
fn message(status: &InstanceMoveStatus) -> String {
    let undone = status.undo.as_ref().map(|u| u.message.clone());
    let failed = status.last_error.as_ref().map(|e| e.message.clone());
    if status.outcome() == Some(Outcome::Succeeded) {
        return "the instance is where it was to go".to_owned();
    }
    if let Some(why) = undone.or(failed).filter(|why| !why.is_empty()) {
        return why;
    }
    let progress = status.progress.as_ref();
    let round = progress.and_then(|p| p.round).map(|n| format!("round {n}"));
    let percent = progress.and_then(|p| p.percent).map(|n| format!("{n} %"));
    let parts: Vec<String> = round.into_iter().chain(percent).collect();
    if !parts.is_empty() {
        return parts.join(", ");
    }
    let since = status
        .started_at
        .as_ref()
        .map(|t| t.0.round(Unit::Second).unwrap_or(t.0));
    since.map_or_else(|| "it begins".to_owned(), |t| format!("since {t}"))
}
