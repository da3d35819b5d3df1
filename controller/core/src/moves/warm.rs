//! Warm: rounds of copying while the instance runs, then the stop, and one more round for the last difference. The copy
//! is guarded and has a name that only this move uses from its creation on; until the stop nothing else changes, so a host
//! that reboots starts the source as ever.

use std::time::Duration;

use berth_api::moves::{Precopy, Progress, Round};
use berth_api::{GoDuration, Reason, Snapshots, Step};
use jiff::{SignedDuration, Timestamp};

use super::body::incoming_definition;
use super::cold::{
    Sending, clear_lost_transfer, guard_source, is_link, marked_source, retry_or_undo, says, source_vanished,
    stop_source, target_silent, transfer, transfer_failed, undo_if_disturbed,
};
use super::effect::{EffectKind, End, Request};
use super::kept;
use super::pass::{Pass, Transition};
use super::rounds::{self, Next, Way};
use super::undo::unfreeze;
use super::verify;
use super::view::{Copy, EndView, Wish};
use crate::marks;
use crate::model::{Definition, Instance, InstanceRef, Power, ServerFacts, Snapshot};
use crate::server::{FailureKind, ServerError};

const POLL: Duration = Duration::from_secs(1);
/// A snapshot that is older is no good to copy from: making one costs less than what changed since.
const RECENT: SignedDuration = SignedDuration::from_hours(24);
/// How often a snapshot or a copy that could not be begun is asked for again.
const ATTEMPTS: i32 = 5;
/// More the record cannot hold.
const MOST_SNAPSHOTS: usize = 250;
/// A whole copy that took longer is not made again while the instance is stopped.
const TOO_LONG_STOPPED: Duration = Duration::from_secs(30);

/// Marked and Precopied: the instance runs.
pub(super) fn running(p: &mut Pass<'_>) -> Transition {
    let view = p.view;
    if let Some(t) = note_round(p) {
        return t;
    }
    let source = match marked_source(p) {
        Ok(source) => source,
        Err(t) => return *t,
    };
    let instance = &source.fresh.instance;
    match instance.power {
        // the guest went down by itself: what it wrote until then is in the last round
        Power::Stopped => return guard_source(p, source),
        Power::Error => return p.wait(POLL),
        Power::Running | Power::Frozen | Power::Starting | Power::Stopping => {}
    }
    if let Some(t) = unfreeze(p, source).or_else(|| p.pause(POLL)) {
        return t;
    }
    if p.record.status.stop_requested_at.is_some() {
        return stop_source(p, source);
    }
    let (EndView::Reachable { facts: here, .. }, EndView::Reachable { facts: there, .. }) =
        (&view.source, &view.target)
    else {
        // the instance runs: there is time
        return p.wait(POLL);
    };
    if let Some(t) = kept::adopt(p).or_else(|| clear_lost_round(p)) {
        return t;
    }
    let Some(way) = way(p, here, there) else {
        return p.undo(Reason::PoolNotFound, "a pool of the move is gone", None);
    };
    if let Some(t) = remove_outdated(p, source) {
        return t;
    }
    let known = precopy(p);
    let rules = p.record.spec.warm.unwrap_or_default();
    match rounds::next(&known.rounds, known.frozen.as_std(), way, rules) {
        Next::Round => round(p, source, there, way),
        Next::Stop => before_stop(p, source, way),
        Next::NotIncremental => not_incremental(p, &known),
        Next::Frozen => {
            let message = format!("{} stood still for {} while it was copied", instance.at, known.frozen);
            p.undo(Reason::GuestFrozen, message, None)
        }
    }
}

/// What was copied so far.
fn precopy(p: &Pass<'_>) -> Precopy {
    p.record.status.precopy.clone().unwrap_or_default()
}

fn way(p: &Pass<'_>, here: &ServerFacts, there: &ServerFacts) -> Option<Way> {
    let (from, to) = (&p.record.spec.from, &p.record.spec.to);
    rounds::way_between(here, from.pool.as_deref(), there, to.pool.as_deref())
}

/// Takes note of how a round ended and of what it took.
fn note_round(p: &mut Pass<'_>) -> Option<Transition> {
    if let Some(e) = p.failed(EffectKind::Transfer) {
        return Some(round_failed(p, e));
    }
    if !p.succeeded(EffectKind::Transfer) {
        return None;
    }
    keep_round(p);
    p.record.status.transferred = p.incoming().map(str::to_owned);
    if p.step() == Some(Step::Marked) {
        p.advance(Step::Precopied);
    }
    Some(p.go_on())
}

fn keep_round(p: &mut Pass<'_>) {
    let spent = p.spent();
    let done = p.record.status.precopy.get_or_insert_default();
    done.rounds.push(Round {
        bytes: spent.bytes,
        duration: GoDuration::whole_millis(spent.time),
    });
    done.frozen = GoDuration::whole_millis(done.frozen.as_std() + spent.frozen);
    let sent = done.rounds.iter().filter_map(|r| r.bytes).reduce(i64::saturating_add);
    p.sent_all();
    if let Some(progress) = p.record.status.progress.as_mut() {
        (progress.bytes, progress.total_bytes) = (sent, sent);
    }
}

/// A round that failed while the instance runs. What could not even begin is begun again.
fn round_failed(p: &mut Pass<'_>, e: &ServerError) -> Transition {
    if let Some(t) = p.undo_if_wished() {
        return t;
    }
    let waits = matches!(e.kind, FailureKind::Busy | FailureKind::Unreachable);
    if !waits || p.attempts() >= ATTEMPTS {
        return refused(p, e);
    }
    // nothing was carried out, so a copy that was complete still is
    if !precopy(p).rounds.is_empty() {
        p.record.status.transferred = p.incoming().map(str::to_owned);
    }
    p.note(Reason::Progressing, e.to_string(), None);
    p.wait(POLL)
}

/// A round that was cut off, by the link or by somebody, or that a daemon was too busy for, says nothing against the method.
fn refused(p: &mut Pass<'_>, e: &ServerError) -> Transition {
    let cut_off = is_link(&e.message) || says(&e.message, &["cancelled", "canceled"]);
    if e.kind == FailureKind::Busy || (e.kind == FailureKind::Refused && cut_off) {
        return p.undo(Reason::MoveFailed, e.to_string(), None);
    }
    transfer_failed(p, e)
}

/// The outcome of a round was lost: whether the copy is complete cannot be seen, so it is deleted and begun anew under
/// another name. A person's own copying from the source is left alone.
fn clear_lost_round(p: &mut Pass<'_>) -> Option<Transition> {
    let name = p.incoming()?.to_owned();
    if p.record.status.transferred.as_deref() == Some(name.as_str()) {
        return None;
    }
    let at = InstanceRef::new(&p.record.spec.to.project, &name);
    let ours = p.view.target.operation_on(&at).is_some() || p.view.target.copy(&at).is_some();
    if ours && let Some(t) = clear_lost_transfer(p, &at) {
        return Some(t);
    }
    if let Some(done) = p.record.status.precopy.as_mut() {
        done.rounds.clear();
    }
    None
}

/// One round while the instance runs: a fresh snapshot where the pools need one, then what changed since the last.
fn round(p: &mut Pass<'_>, source: &Copy, there: &ServerFacts, way: Way) -> Transition {
    let refresh = p.record.status.transferred.is_some();
    let base = newest_snapshot(p, source).filter(|s| is_recent(p, s));
    let fresh = way == Way::Snapshots || (way == Way::FromSnapshot && base.is_none());
    if fresh && !p.succeeded(EffectKind::Snapshot) {
        return take_snapshot(p, source);
    }
    let frozen = p.spent().frozen;
    let done = p.record.status.precopy.get_or_insert_default();
    if fresh {
        done.frozen = GoDuration::whole_millis(done.frozen.as_std() + frozen);
    }
    let ours = done.snapshots.last().cloned().filter(|_| fresh);
    let snapshot = match way {
        Way::FromSnapshot => ours.or_else(|| base.map(|s| s.name.clone())),
        Way::Snapshots | Way::Compare => None,
    };
    let sending = Sending {
        instance_only: way != Way::Snapshots && !carries_snapshots(p, source),
        snapshot,
        refresh,
    };
    send(p, source, there, sending)
}

fn send(p: &mut Pass<'_>, source: &Copy, there: &ServerFacts, sending: Sending) -> Transition {
    let round = precopy(p).rounds.len() + 1;
    let definition = incoming_definition(&p.record.spec, &p.record.name, &source.fresh.instance, there);
    let mut t = transfer(p, source, definition, sending);
    let progress = t.record.status.progress.get_or_insert_with(Progress::default);
    progress.round = i32::try_from(round).ok();
    t
}

/// A snapshot of ours, under a name that was never used before, recorded first.
fn take_snapshot(p: &mut Pass<'_>, source: &Copy) -> Transition {
    let at = &source.fresh.instance.at;
    if let Some(e) = p.failed(EffectKind::Snapshot) {
        if e.is_transient() && p.attempts() < ATTEMPTS {
            p.note(Reason::Progressing, e.to_string(), None);
            return p.wait(POLL);
        }
        let reason = match e.is_transient() {
            true => Reason::MoveFailed,
            false => Reason::TargetRefused,
        };
        return p.undo(reason, e.to_string(), None);
    }
    if precopy(p).snapshots.len() >= MOST_SNAPSHOTS {
        return p.undo(Reason::MoveFailed, "it was begun anew too often", None);
    }
    let name = marks::temporary_snapshot(p.now, &p.view.random);
    p.record
        .status
        .precopy
        .get_or_insert_default()
        .snapshots
        .push(name.clone());
    let request = Request::Snapshot { name, expires_at: None };
    p.ask(EffectKind::Snapshot, End::Source, at, request)
}

/// The newest snapshot of the user's own, if the instance has one.
fn newest_snapshot<'a>(p: &Pass<'_>, source: &'a Copy) -> Option<&'a Snapshot> {
    let ours = p.record.status.precopy.as_ref().map(|w| w.snapshots.as_slice());
    let list = source.snapshots.as_deref().unwrap_or_default();
    let own = |s: &&Snapshot| !ours.is_some_and(|o| o.contains(&s.name));
    list.iter().rev().find(own)
}

/// Whether little has changed since a snapshot.
fn is_recent(p: &Pass<'_>, snapshot: &Snapshot) -> bool {
    let made = snapshot.created_at.parse::<Timestamp>();
    made.is_ok_and(|at| p.now.duration_since(at) < RECENT)
}

/// Whether snapshots of the user's own travel.
fn carries_snapshots(p: &Pass<'_>, source: &Copy) -> bool {
    p.record.spec.snapshots == Snapshots::Include && newest_snapshot(p, source).is_some()
}

fn not_incremental(p: &mut Pass<'_>, known: &Precopy) -> Transition {
    let (from, to) = (&p.record.spec.from, &p.record.spec.to);
    let told = |r: &Round| match r.bytes {
        Some(bytes) => format!("{} MiB", bytes >> 20),
        None => r.duration.to_string(),
    };
    let sizes: Vec<String> = known.rounds.iter().map(told).collect();
    let message = format!(
        "between pool {} of {} and pool {} of {} every round sends everything again ({})",
        from.pool.as_deref().unwrap_or("?"),
        from.server,
        to.pool.as_deref().unwrap_or("?"),
        to.server,
        sizes.join(", then ")
    );
    p.undo(Reason::NotIncremental, message, None)
}

/// Everything is copied but the last difference: the stop, if it may be that long.
fn before_stop(p: &mut Pass<'_>, source: &Copy, way: Way) -> Transition {
    // a snapshot that everything was copied from is not needed any more, and would travel with the last round
    if way == Way::FromSnapshot
        && p.failed(EffectKind::RemoveSnapshot).is_none()
        && let Some(t) = remove_temporary(p, source, End::Source)
    {
        return t;
    }
    let Wish::Continue(rules) = &p.view.wish else {
        return p.undo(Reason::MoveFailed, "", None);
    };
    let known = precopy(p);
    let last = match way {
        Way::FromSnapshot => Duration::from_secs(1),
        Way::Snapshots | Way::Compare => rounds::last_round(&known.rounds),
    };
    let expected = GoDuration::whole_millis(known.frozen.as_std() + rounds::STOP + last + rounds::START);
    if let Some(most) = rules.max_downtime.filter(|most| expected.as_std() > *most) {
        let message = format!(
            "{} would not run for about {expected}, which is more than spec.maxDowntime ({})",
            source.fresh.instance.at,
            GoDuration::from(most)
        );
        let fix = "raise spec.maxDowntime, or move it when it writes less".to_owned();
        return p.undo(Reason::DowntimeTooLong, message, Some(fix));
    }
    stop_source(p, source)
}

/// Stopped: the last round, then the copy gets the configuration that the source had at the stop.
pub(super) fn stopped(p: &mut Pass<'_>) -> Transition {
    let view = p.view;
    if let Some(t) = p.undo_if_wished() {
        return t;
    }
    if p.succeeded(EffectKind::Transfer) {
        keep_round(p);
        p.record.status.transferred = p.incoming().map(str::to_owned);
        p.record.status.precopy.get_or_insert_default().complete = true;
    }
    if let Some(t) = p.wait_for_end(&view.source) {
        return t;
    }
    let Some(source) = p.source() else {
        return source_vanished(p);
    };
    if let Some(t) = undo_if_disturbed(p, source) {
        return t;
    }
    let (EndView::Reachable { facts: here, .. }, EndView::Reachable { facts: there, .. }) =
        (&view.source, &view.target)
    else {
        return target_silent(p);
    };
    if let Some(e) = p.failed(EffectKind::Transfer) {
        return refused(p, e);
    }
    if let Some(t) = p.pause(POLL).or_else(|| kept::adopt(p)) {
        return t;
    }
    let known = precopy(p);
    let whole = p.record.status.transferred.is_some() && p.record.status.transferred.as_deref() == p.incoming();
    if whole && known.complete {
        if let Some(t) = align(p, source, there) {
            return t;
        }
        p.advance(Step::Transferred);
        return verify::transferred(p);
    }
    if !whole {
        return copy_again(p, source, there, &known);
    }
    let Some(way) = way(p, here, there) else {
        return p.undo(Reason::PoolNotFound, "a pool of the move is gone", None);
    };
    if way == Way::Snapshots && !p.succeeded(EffectKind::Snapshot) {
        return take_snapshot(p, source);
    }
    let sending = Sending {
        instance_only: way != Way::Snapshots && !carries_snapshots(p, source),
        snapshot: None,
        refresh: true,
    };
    send(p, source, there, sending)
}

/// There is no complete copy (any more), and the instance is stopped: everything is copied, unless that took long.
fn copy_again(p: &mut Pass<'_>, source: &Copy, there: &ServerFacts, known: &Precopy) -> Transition {
    let whole = known.rounds.first().map(|r| r.duration.as_std());
    if let Some(long) = whole.filter(|d| *d > TOO_LONG_STOPPED) {
        let message = format!(
            "the outcome of the last round was lost; all of it took {} s, so {} is started again where it was",
            long.as_secs(),
            source.fresh.instance.at
        );
        return p.undo(Reason::MoveFailed, message, None);
    }
    if let Some(name) = p.incoming().map(str::to_owned) {
        let at = InstanceRef::new(&p.record.spec.to.project, &name);
        if let Some(t) = clear_lost_transfer(p, &at) {
            return t;
        }
    }
    let sending = Sending::whole(&p.record.spec);
    send(p, source, there, sending)
}

/// A refresh carries no configuration, so one conditional PUT does, if anything differs.
fn align(p: &mut Pass<'_>, source: &Copy, there: &ServerFacts) -> Option<Transition> {
    let Some(target) = p.target() else {
        let message = format!("the copy on {} is gone", p.record.spec.to.server);
        return Some(p.undo(Reason::MoveFailed, message, None));
    };
    let t = &target.fresh.instance;
    let wanted = incoming_definition(&p.record.spec, &p.record.name, &source.fresh.instance, there);
    let definition = aligned(wanted, t);
    if definition == Definition::from(t) {
        return None;
    }
    if let Some(t) = retry_or_undo(p, EffectKind::Align) {
        return Some(t);
    }
    let etag = target.fresh.etag.clone();
    Some(p.ask(EffectKind::Align, End::Target, &t.at, Request::Put { definition, etag }))
}

/// What is wanted, with what the copy's server keeps of its own: volatile keys, and a root disk it added to a profile's.
fn aligned(mut wanted: Definition, copy: &Instance) -> Definition {
    let of_server = |key: &str| key.starts_with("volatile.") && !key.ends_with(".hwaddr");
    wanted.config.retain(|k, _| !of_server(k));
    let own = copy.config.iter().filter(|(k, _)| k.starts_with("volatile."));
    for (key, value) in own {
        wanted.config.entry(key.clone()).or_insert_with(|| value.clone());
    }
    if let Some((name, _)) = copy.root_device()
        && let Some(root) = copy.devices.get(name)
    {
        wanted.devices.entry(name.to_owned()).or_insert_with(|| root.clone());
    }
    wanted.architecture.clone_from(&copy.architecture);
    wanted
}

/// Deletes what is older than the newest temporary snapshot that both ends have: the next round builds on that one. A
/// pool can take seconds for the first of them, in which whoever runs on it may stand still. So it is done while the
/// instance does not run there yet. What cannot be deleted now is deleted at the end.
fn remove_outdated(p: &mut Pass<'_>, source: &Copy) -> Option<Transition> {
    if p.succeeded(EffectKind::Snapshot) || p.failed(EffectKind::RemoveSnapshot).is_some() {
        return None;
    }
    let target = p.target()?;
    let ours = &p.record.status.precopy.as_ref()?.snapshots;
    let newest = ours.iter().rposition(|n| has(source, n) && has(target, n))?;
    // at the source first: a round would send again what only the target lacks
    [(source, End::Source), (target, End::Target)]
        .into_iter()
        .find_map(|(copy, end)| remove_first(p, copy, end, &ours[..newest]))
}

/// Deletes a temporary snapshot of this move that is still there.
pub(super) fn remove_temporary(p: &mut Pass<'_>, copy: &Copy, end: End) -> Option<Transition> {
    let ours = &p.record.status.precopy.as_ref()?.snapshots;
    let removal = remove_first(p, copy, end, ours)?;
    Some(p.retry_after_failure(EffectKind::RemoveSnapshot).unwrap_or(removal))
}

/// Deletes the first of these snapshots that a copy has.
fn remove_first(p: &Pass<'_>, copy: &Copy, end: End, names: &[String]) -> Option<Transition> {
    let name = names.iter().find(|n| has(copy, n))?.clone();
    let at = &copy.fresh.instance.at;
    Some(p.ask(EffectKind::RemoveSnapshot, end, at, Request::RemoveSnapshot { name }))
}

fn has(copy: &Copy, snapshot: &str) -> bool {
    let list = copy.snapshots.as_deref().unwrap_or_default();
    list.iter().any(|s| s.name == snapshot)
}
