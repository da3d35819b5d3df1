//! What a placement wants of a move that runs: go on, or be undone if it is not committed yet (design "rules", Before
//! and after COMMIT).

use berth_api::placement::{Mode, PowerState};
use berth_api::{Reason, Step, Transfer, TransferMode, present};
use jiff::{SignedDuration, Timestamp};

use super::world::Desired;
use crate::moves::{StopRules, Wish, is_internal};
use crate::records::Record;

fn undo(reason: Reason, message: impl Into<String>) -> Wish {
    Wish::Undo {
        reason,
        message: message.into(),
    }
}

/// What the placement (`None`: it is gone) wants of `record` now.
pub fn wish(record: &Record, desired: Option<&Desired>, now: Timestamp) -> Wish {
    if record.spec.cancel || record.deleting {
        return undo(Reason::MoveCancelled, "the move was cancelled");
    }
    let Some(desired) = desired.filter(|d| d.uid == record.spec.placement_uid && !d.deleting) else {
        return undo(Reason::MoveCancelled, "the placement was deleted");
    };
    if desired.spec.suspend {
        return undo(Reason::Suspended, "the placement was suspended");
    }
    if desired.spec.mode == Mode::Observe {
        return undo(Reason::DriftObserved, "the placement's mode is Observe");
    }
    if let Some(what) = contrary(record, desired) {
        return undo(Reason::Progressing, format!("the placement's {what} changed"));
    }
    if overdue(record, now) {
        return undo(Reason::MoveFailed, "it was not committed within spec.timeout");
    }
    if before_stop(record)
        && let Err(closed) = crate::windows::check(&desired.spec.windows, record.spec.method, SignedDuration::ZERO, now)
    {
        return undo(Reason::WaitingForWindow, closed.to_string());
    }
    let stop = &desired.spec.stop;
    Wish::Continue(StopRules {
        timeout: stop.timeout.as_std(),
        force: stop.force,
        max_downtime: desired.spec.max_downtime.map(|d| d.as_std()),
        preserves_power: desired.spec.power_state == PowerState::Preserve,
    })
}

/// Which part of the spec no longer agrees with the move.
fn contrary(record: &Record, desired: &Desired) -> Option<&'static str> {
    let (to, target) = (&record.spec.to, &desired.spec.target);
    let declared = |want: &Option<String>, have: Option<&str>| present(want).is_some_and(|w| have != Some(w));
    if target.server != to.server
        || declared(&target.member, to.member.as_deref())
        || declared(&target.group, to.group.as_deref())
        || declared(&target.project, Some(&to.project))
        || declared(&target.pool, to.pool.as_deref())
        || desired.target_name() != to.name
    {
        return Some("target");
    }
    if desired.spec.overrides != record.spec.overrides {
        return Some("overrides");
    }
    if desired.spec.snapshots != record.spec.snapshots {
        return Some("snapshots");
    }
    let needs_stop = record.status.ran_before != Some(false);
    if needs_stop && !desired.spec.methods.contains(&record.spec.method) {
        return Some("list of methods");
    }
    let transfer = match desired.spec.transfer {
        TransferMode::Auto => record.spec.transfer,
        TransferMode::Pull => Transfer::Pull,
        TransferMode::Push => Transfer::Push,
        TransferMode::Relay => Transfer::Relay,
        TransferMode::Backup => Transfer::Backup,
    };
    (transfer != record.spec.transfer && !is_internal(record)).then_some("transfer")
}

fn overdue(record: &Record, now: Timestamp) -> bool {
    let (Some(timeout), Some(since)) = (record.spec.timeout, record.status.started_at.as_ref()) else {
        return false;
    };
    !timeout.is_zero() && now.as_millisecond() - since.0.as_millisecond() > timeout.as_millis()
}

fn before_stop(record: &Record) -> bool {
    let early = matches!(
        record.status.step(),
        Some(Step::Accepted | Step::Marked | Step::Precopied)
    );
    early && record.status.stop_requested_at.is_none() && record.status.ran_before != Some(false)
}
