//! What is worth telling people once: the beginning and end of moves, the points between that change what they can do,
//! and a placement's new reason. Derived from two states, so that nothing is told twice.

use berth_api::conditions::{self, READY};
use berth_api::{InstancePlacementStatus, Outcome, Reason, ReasonKind, Step};
use berth_core::records::Record;

/// One thing to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Happening {
    /// The record that it is about; `None`: the placement.
    pub record: Option<String>,
    /// Whether somebody should look.
    pub warning: bool,
    /// In one word.
    pub reason: String,
    /// In a sentence.
    pub message: String,
}

/// What the change of a record is worth telling.
pub(crate) fn of_record(old: &Record, new: &Record) -> Option<Happening> {
    let (spec, status) = (&new.spec, &new.status);
    let tell = |warning, reason: &str, message: String| {
        Some(Happening {
            record: Some(new.name.clone()),
            warning,
            reason: reason.to_owned(),
            message,
        })
    };
    let error = || {
        status
            .last_error
            .as_ref()
            .map(|e| e.message.clone())
            .unwrap_or_default()
    };
    let undone = || status.undo.as_ref().map_or_else(error, |u| u.message.clone());
    if old.status.outcome != status.outcome {
        let outcome = status.outcome()?;
        return match outcome {
            Outcome::Succeeded => {
                let downtime = status
                    .downtime
                    .map(|d| format!(", {d} not running"))
                    .unwrap_or_default();
                let to = &spec.to;
                tell(
                    false,
                    outcome.as_str(),
                    format!("{} is on {}{downtime}", to.name, to.server),
                )
            }
            Outcome::Undone | Outcome::Cancelled => {
                let warning = outcome == Outcome::Undone;
                let from = &spec.from;
                let message = format!("{} is on {} as before: {}", from.name, from.server, undone());
                tell(warning, outcome.as_str(), message)
            }
            Outcome::NeedsAttention => tell(true, outcome.as_str(), error()),
        };
    }
    if old.status.step == status.step {
        return None;
    }
    let name = &spec.from.name;
    match status.step()? {
        step @ Step::Stopped => tell(
            false,
            step.as_str(),
            format!("{name} is stopped on {}", spec.from.server),
        ),
        step @ Step::Committed => tell(
            false,
            step.as_str(),
            format!(
                "{name} belongs to {} from now on; the move only goes forward",
                spec.to.server
            ),
        ),
        step @ Step::Started => tell(
            false,
            step.as_str(),
            format!("{} runs on {}", spec.to.name, spec.to.server),
        ),
        step @ Step::Undoing => tell(true, step.as_str(), undone()),
        Step::Accepted
        | Step::Marked
        | Step::Precopied
        | Step::Restoring
        | Step::Transferred
        | Step::Verified
        | Step::Retired
        | Step::Cleaned => None,
    }
}

/// A new move.
pub(crate) fn begun(record: &Record) -> Happening {
    let (method, from, to) = (record.spec.method.as_str(), &record.spec.from, &record.spec.to);
    Happening {
        record: Some(record.name.clone()),
        warning: false,
        reason: Reason::Moving.as_str().to_owned(),
        message: format!(
            "{method} move of {} from {} to {} begins",
            from.name, from.server, to.server
        ),
    }
}

/// A new reason of a placement.
pub(crate) fn of_status(old: &InstancePlacementStatus, new: &InstancePlacementStatus) -> Option<Happening> {
    let before = conditions::find(&old.conditions, READY).map(|c| c.reason.as_str());
    let now = conditions::find(&new.conditions, READY)?;
    let reason = Reason::parse(&now.reason)?;
    // moves tell of themselves, and a first look is nothing new
    if before == Some(now.reason.as_str()) || matches!(reason, Reason::Moving | Reason::Progressing) {
        return None;
    }
    Some(Happening {
        record: None,
        warning: reason.kind() == ReasonKind::Stalled,
        reason: now.reason.clone(),
        message: now.message.clone(),
    })
}
