//! Room on the target's pool. Too little is refused while the instance still runs; what is not known refuses nothing.

use berth_api::moves::{MoveEnd, Onto};
use berth_api::{Outcome, Reason, Snapshots, Transfer};

use crate::model::ServerFacts;
use crate::plan::methods::Case;
use crate::plan::{Blocker, Desired, World, gate};

/// A pool that was filled has more room once this part of what was free has been added; less comes and goes by itself.
const MORE: i64 = 20;

/// What the pool has too little room for, if that is known; and what a person should know of room, although nothing stands
/// against the move.
pub(in crate::plan) fn space(case: &Case<'_>, onto: Option<&Onto>) -> (Option<Blocker>, Option<Blocker>) {
    let stays = case.transfer == Transfer::Internal && case.located.instance.root_pool() == case.to.pool.as_deref();
    // what is there already is brought up to date, or makes room
    if stays || onto.is_some() {
        return (None, None);
    }
    let contents = case.world.contents.as_ref();
    let (Some(size), Some(free), Some(pool)) = (case.world.size, contents.and_then(|c| c.free), &case.to.pool) else {
        return (None, None);
    };
    let (server, at) = (&case.to.server, case.located.at());
    let refused = |message| {
        let fix = fix(case.desired, (server, pool), case.target);
        Blocker::new(Reason::InsufficientSpace, message, Some(fix))
    };
    if free < size {
        let message = format!(
            "pool {pool} of {server} has {} free, and {at} takes {}",
            mebibytes(free),
            mebibytes(size)
        );
        return (Some(refused(message)), None);
    }
    let travel = case.desired.spec.snapshots == Snapshots::Include;
    let snapshots = contents.filter(|_| travel).map_or(0, |c| c.snapshots.len());
    let whole = case.target.pool(pool).is_some_and(|p| !p.copy_on_write());
    let all = i64::try_from(snapshots)
        .unwrap_or(i64::MAX)
        .saturating_add(1)
        .saturating_mul(size);
    let note = (whole && snapshots > 0 && free < all).then(|| {
        let message = format!(
            "pool {pool} of {server} ({}) keeps each of the {snapshots} snapshots of {at} as a whole copy: that may take up to {}, and {} are free",
            case.target.pool(pool).map_or("", |p| p.driver.as_str()),
            mebibytes(all),
            mebibytes(free)
        );
        refused(message)
    });
    (None, note)
}

/// The last move filled the target's pool, and there is hardly more room now than there was: whoever stops the instance
/// again only makes it stand still again. A new generation or a new request asks for another try all the same.
pub(in crate::plan) fn filled(desired: &Desired, world: &World, to: &MoveEnd, target: &ServerFacts) -> Option<Blocker> {
    let last = world.last_attempt()?;
    let undo = last.status.undo.as_ref()?;
    let there = &last.spec.to;
    let same = (&there.fingerprint, &there.member, &there.pool) == (&to.fingerprint, &to.member, &to.pool);
    // a backup may have been too much for the controller's own folder
    let full = undo.reason == Reason::InsufficientSpace.as_str() && last.spec.transfer != Transfer::Backup;
    let undone = last.status.outcome() == Some(Outcome::Undone) && gate::remembered(desired, last);
    let (then, now) = (last.spec.target_free?, world.contents.as_ref()?.free?);
    if !(same && full && undone) || now > then.saturating_add(then / MORE) {
        return None;
    }
    let (then, now) = (mebibytes(then), mebibytes(now));
    let message = format!("{}: {then} were free, and {now} are now", undo.message);
    let place = (to.server.as_str(), to.pool.as_deref().unwrap_or_default());
    let fix = format!(
        "{}, or try it as it is: {}",
        fix(desired, place, target),
        desired.request_command()
    );
    Some(Blocker::new(Reason::InsufficientSpace, message, Some(fix)))
}

fn fix(desired: &Desired, (server, pool): (&str, &str), target: &ServerFacts) -> String {
    let other = target.pools.iter().find(|p| p.name != pool);
    let other = other.map(|p| {
        format!(
            "kubectl patch iplace -n {} {} --type merge -p '{{\"spec\":{{\"target\":{{\"pool\":\"{}\"}}}}}}', or ",
            desired.namespace, desired.name, p.name
        )
    });
    format!(
        "{}free or add room, on {server}: {} storage info {pool}",
        other.unwrap_or_default(),
        target.product.cli()
    )
}

/// Rounded up, so that what is too little never reads as enough.
fn mebibytes(bytes: i64) -> String {
    let whole = bytes.saturating_add((1 << 20) - 1) >> 20;
    format!("{whole} MiB")
}
