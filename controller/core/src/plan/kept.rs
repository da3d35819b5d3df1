//! Kept sources in plans: which of them becomes the copy of a move back to its server, and how long each stays.

use std::sync::Arc;

use berth_api::moves::Onto;
use berth_api::placement::{KeptSource, Mode};
use berth_api::{GuardKind, Method, Reason, Time, Transfer};
use jiff::{SignedDuration, Timestamp, Unit};

use super::methods::Case;
use super::world::Desired;
use super::{Decision, wait, warm};
use crate::model::Instance;
use crate::moves::rounds::Way;
use crate::moves::{has_kept, is_kept, kept_place};
use crate::records::Record;

/// Until when the source of a finished move is kept: a shorter `spec.keepSource` counts at once, a longer one for the next
/// move. `None`: its end is not looked for, since the placement is suspended, only observes, or is going.
pub fn kept_until(record: &Record, desired: &Desired) -> Option<Timestamp> {
    let until = record.status.kept_until.as_ref().filter(|_| has_kept(record))?.0;
    let spec = &desired.spec;
    if spec.suspend || spec.mode == Mode::Observe || desired.deleting {
        return None;
    }
    let shorter = record.spec.keep_source.as_millis() - spec.keep_source.as_millis();
    until.checked_sub(SignedDuration::from_millis(shorter.max(0))).ok()
}

/// The kept sources of a placement, as its status shows them.
pub fn kept(records: &[Record], desired: &Desired) -> Vec<KeptSource> {
    let shown = records.iter().filter(|r| has_kept(r)).map(|record| {
        let place = kept_place(record);
        let until = kept_until(record, desired).map(|t| Time(t.round(Unit::Second).unwrap_or(t)));
        KeptSource {
            record: record.name.clone(),
            server: record.spec.from.server.clone(),
            project: place.project,
            name: place.name,
            until,
        }
    });
    shown.collect()
}

/// The kept source of the instance that is where the move goes, if nobody has used it: the one in its way, else the newest.
fn there<'a>(case: &'a Case<'_>) -> Option<(&'a Record, &'a Arc<Instance>)> {
    let instances = case.target_view.instances.as_ref()?;
    let fits = |r: &&Record| {
        let from = &r.spec.from;
        from.fingerprint == case.target.fingerprint
            && from.project == case.to.project
            && from.uuid.as_deref() == case.located.instance.uuid()
    };
    let candidates = case.world.kept.iter().filter(fits);
    candidates
        .filter_map(|r| Some((r, instances.get(&kept_place(r))?)))
        .filter(|(r, i)| is_kept(r, i))
        .max_by_key(|(r, i)| (i.at.name == case.to.name, r.spec.attempt))
}

/// Whether only the difference would have to be sent.
pub(super) fn spares_bytes(case: &Case<'_>) -> bool {
    there(case).is_some_and(|(_, kept)| can_be_refreshed(case, kept))
}

fn can_be_refreshed(case: &Case<'_>, kept: &Instance) -> bool {
    let member = case.to.member.as_ref().is_none_or(|m| kept.member.as_ref() == Some(m));
    // differences between snapshots are counted one way only: with the dates and the origin of its own snapshots a target
    // takes none for the same (seen on Incus 6.0.4 and LXD 5.0.2)
    if case.way() == Some(Way::Snapshots) {
        return false;
    }
    // what a round of a Warm move needs, this needs, too
    member && kept.root_pool() == case.to.pool.as_deref() && warm::unmet(case).is_empty()
}

/// The kept source that a move is to use, or that has to make room for the copy.
pub(super) fn onto(case: &Case<'_>, method: Method, guard: GuardKind) -> Option<Onto> {
    let (record, kept) = there(case).filter(|_| case.transfer != Transfer::Internal)?;
    let refresh = method != Method::Live && guard == record.spec.guard.source && can_be_refreshed(case, kept);
    if !refresh && kept.at.name != case.to.name {
        return None;
    }
    Some(Onto {
        record: record.name.clone(),
        attempt: record.spec.attempt,
        name: kept.at.name.clone(),
        last_used_at: record.status.last_used_at.clone(),
        refresh,
    })
}

/// A kept source whose time is over is just being deleted where the move goes.
pub(super) fn leaves(case: &Case<'_>) -> Result<(), Decision> {
    let leaving = |r: &&Record| {
        let begun = r.status.names.as_ref().is_some_and(|n| n.leaving.is_some());
        begun && has_kept(r) && r.spec.from.fingerprint == case.target.fingerprint
    };
    match case.world.kept.iter().find(leaving) {
        None => Ok(()),
        Some(record) => {
            let message = format!(
                "the kept source of move {} on {} is being deleted",
                record.name, case.to.server
            );
            Err(wait(Reason::Progressing, message, None))
        }
    }
}
