//! Room on the target's pool. Too little is refused while the instance still runs; what is not known refuses nothing.

use berth_api::moves::Onto;
use berth_api::{Reason, Snapshots, Transfer};

use crate::plan::Blocker;
use crate::plan::methods::Case;

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
    if free < size {
        let message = format!(
            "pool {pool} of {server} has {} free, and {at} takes {}",
            mebibytes(free),
            mebibytes(size)
        );
        return (
            Some(Blocker::new(Reason::InsufficientSpace, message, Some(fix(case, pool)))),
            None,
        );
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
        Blocker::new(Reason::InsufficientSpace, message, Some(fix(case, pool)))
    });
    (None, note)
}

fn fix(case: &Case<'_>, pool: &str) -> String {
    let server = &case.to.server;
    let other = case.target.pools.iter().find(|p| p.name != pool);
    let other = other.map(|p| {
        format!(
            "kubectl patch iplace -n {} {} --type merge -p '{{\"spec\":{{\"target\":{{\"pool\":\"{}\"}}}}}}', or ",
            case.desired.namespace, case.desired.name, p.name
        )
    });
    format!(
        "{}free or add room, on {server}: {} storage info {pool}",
        other.unwrap_or_default(),
        case.target.product.cli()
    )
}

/// Rounded up, so that what is too little never reads as enough.
fn mebibytes(bytes: i64) -> String {
    let whole = bytes.saturating_add((1 << 20) - 1) >> 20;
    format!("{whole} MiB")
}
