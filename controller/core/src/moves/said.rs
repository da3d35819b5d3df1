//! The conditions of a record, which follow from its step and outcome (kstatus): for people and tools, never read here.

use berth_api::moves::MoveError;
use berth_api::{InstanceMoveStatus, MicroTime, Outcome, Reason, ReasonKind, Step, conditions};
use jiff::{SignedDuration, Timestamp, Unit};

use crate::records::Record;

/// Longest message of a server that is kept, in characters, and how many of them are its end.
const MESSAGE_MAX: usize = 500;
const MESSAGE_END: usize = 300;
const SAME_ATTEMPT: SignedDuration = SignedDuration::from_secs(1);

/// A server's words as one line: what rsync says has several, and both ends repeat it. Of one that is too long the middle is
/// left out, for it begins with what failed, and ends with why.
pub(crate) fn one_line(message: &str) -> String {
    let line = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let length = line.chars().count();
    if length <= MESSAGE_MAX {
        return line;
    }
    let begin = line.chars().take(MESSAGE_MAX - MESSAGE_END);
    begin
        .chain([' ', '…', ' '])
        .chain(line.chars().skip(length - MESSAGE_END))
        .collect()
}

/// Why something did not work, to be remembered in the place of `last`. Events wake a move as often as they come: what
/// fails again within a second of a failure is no other attempt, so that patience is measured in time.
pub(crate) fn noted(
    reason: Reason,
    message: &str,
    fix: Option<String>,
    last: Option<&MoveError>,
    now: Timestamp,
) -> MoveError {
    let (attempts, before) = last.map_or((0, None), |e| (e.attempts, e.at.clone()));
    let again = before.filter(|t| now.duration_since(t.0).abs() < SAME_ATTEMPT && attempts > 0);
    MoveError {
        reason: reason.as_str().to_owned(),
        message: one_line(message),
        fix,
        attempts: attempts + i32::from(again.is_none()),
        at: again.or(Some(MicroTime(now))),
    }
}

/// Makes the conditions say what the record says.
pub(super) fn say(record: &mut Record, now: Timestamp) {
    let status = &mut record.status;
    // the spec never changes but for cancel, which is one-way; a deletion that is held counts as a change, too
    let generation = Some(1 + i64::from(record.spec.cancel) + i64::from(record.deleting));
    status.observed_generation = generation;
    let message = message(status);
    let outcome = status.outcome();
    let kind = match outcome {
        None => ReasonKind::InProgress,
        Some(Outcome::Succeeded) => ReasonKind::Ready,
        Some(Outcome::NeedsAttention) => ReasonKind::Stalled,
        // it ended as it should: whether the instance is where it belongs is said by its placement
        Some(Outcome::Undone | Outcome::Cancelled) => ReasonKind::Waiting,
    };
    let reason = match outcome {
        Some(outcome) => outcome.as_str().to_owned(),
        None => status
            .step
            .clone()
            .unwrap_or_else(|| Step::Accepted.as_str().to_owned()),
    };
    conditions::say(&mut status.conditions, kind, (&reason, &message), generation, now);
}

/// Ends a record as it is, without asking any server for anything.
pub fn close(record: &mut Record, outcome: Outcome, now: Timestamp) {
    record.status.outcome = Some(outcome.as_str().to_owned());
    record.status.finished_at = Some(MicroTime(now));
    say(record, now);
}

/// Reason and sentence of what went wrong, as people should be told. `None`: nothing did, or it does not matter any more.
pub fn trouble(status: &InstanceMoveStatus) -> Option<(&str, &str)> {
    let undone = status.undo.as_ref().map(|u| (u.reason.as_str(), u.message.as_str()));
    let failed = status.last_error.as_ref();
    let failed = failed.map(|e| (e.reason.as_str(), e.message.as_str()));
    match status.outcome() {
        Some(Outcome::Succeeded) => None,
        // what a person must see to came after the undo
        Some(Outcome::NeedsAttention) => failed.or(undone),
        Some(Outcome::Undone | Outcome::Cancelled) | None => undone.or(failed),
    }
}

/// `round 2, 42 %`, what went wrong, or since when; with absolute times, so that what stays the same is not written anew.
fn message(status: &InstanceMoveStatus) -> String {
    if status.outcome() == Some(Outcome::Succeeded) {
        return "the instance is where it was to go".to_owned();
    }
    if let Some((_, why)) = trouble(status).filter(|(_, why)| !why.is_empty()) {
        return why.to_owned();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_long_words_the_begin_and_the_end_are_kept() {
        let words = format!("Failed to run:\n{} ü: exit status 1 (no such file)", "x".repeat(1000));
        let said = one_line(&words);
        assert_eq!(said.chars().count(), MESSAGE_MAX + 3);
        assert!(said.starts_with("Failed to run: x"), "{said}");
        assert!(said.ends_with("x ü: exit status 1 (no such file)"), "{said}");
        assert_eq!(one_line(" rsync:  no\n space "), "rsync: no space");
    }
}
