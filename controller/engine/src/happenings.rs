//! What is worth telling people once: the beginning and end of moves, the points between that change what they can do,
//! and a placement's new reason. Derived from two states, so that nothing is told twice.

use berth_api::conditions::{self, READY};
use berth_api::placement::KeptSource;
use berth_api::{InstancePlacementStatus, Outcome, Reason, ReasonKind, Step};
use berth_core::moves::{has_kept, is_restart, kept_place};
use berth_core::overrides::Adaptation;
use berth_core::plan::Located;
use berth_core::records::Record;
use berth_core::server::PowerAction;
use jiff::Unit;

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
    if old.status.outcome != new.status.outcome {
        return of_outcome(new);
    }
    if old.status.step == new.status.step {
        return None;
    }
    let (from, to) = (&new.spec.from, &new.spec.to);
    let step = new.status.step()?;
    let message = match step {
        Step::Accepted | Step::Marked if old.status.step.is_none() => return Some(begun(new)),
        Step::Stopped => format!("{} is stopped on {}", from.name, from.server),
        Step::Committed if is_restart(new) => format!("the configuration of {} is as declared", from.name),
        Step::Committed => format!(
            "{} belongs to {} from now on; the move only goes forward",
            from.name, to.server
        ),
        Step::Started => format!("{} runs on {}", to.name, to.server),
        Step::Undoing => undone(new),
        Step::Accepted
        | Step::Marked
        | Step::Precopied
        | Step::Restoring
        | Step::Transferred
        | Step::Verified
        | Step::Retired
        | Step::Cleaned => return None,
    };
    Some(tell(new, step == Step::Undoing, step.as_str(), message))
}

/// How a move ended.
fn of_outcome(record: &Record) -> Option<Happening> {
    let (from, to) = (&record.spec.from, &record.spec.to);
    let outcome = record.status.outcome()?;
    let (warning, message) = match outcome {
        Outcome::Succeeded => {
            let downtime = record.status.downtime;
            let downtime = downtime.map(|d| format!(", {d} not running")).unwrap_or_default();
            let kept = record.status.kept_until.as_ref();
            let kept = kept.map(|t| t.0.round(Unit::Second).unwrap_or(t.0));
            let kept = kept.map(|t| format!("; its source on {} is kept until {t}", from.server));
            let kept = kept.unwrap_or_default();
            (false, format!("{} is on {}{downtime}{kept}", to.name, to.server))
        }
        Outcome::Undone | Outcome::Cancelled => {
            let message = format!("{} is on {} as before: {}", from.name, from.server, undone(record));
            (outcome == Outcome::Undone, message)
        }
        Outcome::NeedsAttention => (true, error(record)),
    };
    Some(tell(record, warning, outcome.as_str(), message))
}

fn tell(record: &Record, warning: bool, reason: &str, message: String) -> Happening {
    Happening {
        record: Some(record.name.clone()),
        warning,
        reason: reason.to_owned(),
        message,
    }
}

fn error(record: &Record) -> String {
    let error = record.status.last_error.as_ref();
    error.map(|e| e.message.clone()).unwrap_or_default()
}

/// Why a move is undone.
fn undone(record: &Record) -> String {
    let cause = record.status.undo.as_ref();
    cause.map_or_else(|| error(record), |u| u.message.clone())
}

/// A new move.
fn begun(record: &Record) -> Happening {
    let (method, from, to) = (record.spec.method.as_str(), &record.spec.from, &record.spec.to);
    let (reason, message) = if is_restart(record) {
        let message = format!(
            "{} on {} is stopped and started for its configuration",
            from.name, from.server
        );
        (Reason::Updating, message)
    } else {
        let message = format!(
            "{method} move of {} from {} to {} begins",
            from.name, from.server, to.server
        );
        (Reason::Moving, message)
    };
    Happening {
        record: Some(record.name.clone()),
        warning: false,
        reason: reason.as_str().to_owned(),
        message,
    }
}

/// A change of the configuration where the instance is. Names only, since values may be secret.
pub(crate) fn adapted(located: &Located, change: &Adaptation) -> Happening {
    let (names, at, server) = (change.names(), located.at(), &located.server);
    updated(format!("{names} of {at} on {server} changed as declared"))
}

/// A change of the power state where the instance is.
pub(crate) fn powered(located: &Located, action: PowerAction) -> Happening {
    let done = match action {
        PowerAction::Start { .. } => "started",
        PowerAction::Stop { .. } | PowerAction::ForceStop => "stopped",
        PowerAction::Unfreeze => "unfrozen",
    };
    updated(format!("{} on {} was {done}", located.at(), located.server))
}

fn updated(message: String) -> Happening {
    Happening {
        record: None,
        warning: false,
        reason: Reason::Updating.as_str().to_owned(),
        message,
    }
}

/// A new reason of a placement, once its status is written.
pub fn of_status(old: &InstancePlacementStatus, new: &InstancePlacementStatus) -> Option<Happening> {
    let before = conditions::reason(&old.conditions);
    let now = conditions::find(&new.conditions, READY)?;
    let reason = Reason::parse(&now.reason)?;
    if before == Some(now.reason.as_str()) {
        return None;
    }
    let last = |status: &InstancePlacementStatus| status.moves.first().map(|m| m.name.clone());
    let told = match reason {
        // a first look is nothing new
        Reason::Progressing => true,
        // moves and changes tell of themselves: that they begin, and how they end
        Reason::Moving => true,
        Reason::Updating => new.current_move.is_some(),
        Reason::InPlace => {
            let changes = [Reason::Moving, Reason::Updating];
            last(old) != last(new) || changes.iter().any(|r| before == Some(r.as_str()))
        }
        _ => false,
    };
    (!told).then(|| Happening {
        record: None,
        warning: reason.kind() == ReasonKind::Stalled,
        reason: now.reason.clone(),
        message: now.message.clone(),
    })
}

/// What became of the source that a finished move kept.
pub(crate) fn of_kept(old: &Record, new: &Record) -> Option<Happening> {
    if !has_kept(old) || has_kept(new) {
        return None;
    }
    let (from, error) = (&new.spec.from, new.status.last_error.as_ref());
    if let Some(left) = error.filter(|e| e.reason == Reason::Leftover.as_str()) {
        return Some(tell(new, true, &left.reason, left.message.clone()));
    }
    let deleted = new.status.names.as_ref().is_some_and(|n| n.leaving.is_some());
    let message = format!(
        "the kept source {} on {} is deleted: its time is over",
        from.name, from.server
    );
    deleted.then(|| tell(new, false, Step::Cleaned.as_str(), message))
}

/// Kept sources that stay for now because their placement is suspended or only observes.
pub(crate) fn held_back(old: &[KeptSource], new: &[KeptSource]) -> Vec<Happening> {
    let had_an_end = |k: &&KeptSource| old.iter().any(|o| o.record == k.record && o.until.is_some());
    let held = new.iter().filter(|k| k.until.is_none()).filter(had_an_end);
    let happening = |kept: &KeptSource| Happening {
        record: Some(kept.record.clone()),
        warning: false,
        reason: Step::Retired.as_str().to_owned(),
        message: format!(
            "the kept source {} stays on {} as long as the placement is suspended or only observes",
            kept.name, kept.server
        ),
    };
    held.map(happening).collect()
}

/// The placement is gone: a kept source stays where it is.
pub(crate) fn outlives(record: &Record, cli: &str) -> Happening {
    let (server, at) = (&record.spec.from.server, kept_place(record));
    let message = format!(
        "the kept source {at} stays on {server}, stopped and guarded; if it is not needed, on {server}: {cli} delete --project {} {}",
        at.project, at.name
    );
    tell(record, false, Step::Retired.as_str(), message)
}
