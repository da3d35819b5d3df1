//! Marked → Restoring → COMMIT between two independent servers: the running state moves with the instance, and the source
//! is never stopped before the commit. On success both guests run until the former source is stopped, by force, in the
//! same pass: that overlap is measured and bounded. Inside one cluster the server does all of it: see `internal`.

use std::time::Duration;

use berth_api::{GoDuration, GuardKind, Method, MicroTime, Outcome as MoveOutcome, Reason, Step};
use jiff::Timestamp;

use super::body::incoming_definition;
use super::cold::{self, cancel_lost_operation};
use super::criu;
use super::effect::{EffectKind, End, Request};
use super::finish::{self, unmark};
use super::kept;
use super::pass::{Pass, Transition};
use super::verify;
use super::view::{Copy, EndView};
use crate::marks::{self, Role};
use crate::model::{Change, InstanceRef, Power, Product, ServerFacts};
use crate::records::Record;
use crate::server::{FailureKind, ServerError};

const POLL: Duration = Duration::from_secs(1);
/// How long an operation that nobody waits for may hold up an undo.
const HUNG: Duration = Duration::from_secs(60);
/// How often something is tried on a guest that should not run before a person has to look.
const ATTEMPTS: i32 = 5;

/// Whether the running state moves between two independent servers.
pub fn between_servers(record: &Record) -> bool {
    record.spec.method == Method::Live && !super::is_internal(record)
}

/// When a live move is given up, if it is under way.
pub(super) fn deadline(record: &Record) -> Option<Timestamp> {
    let limit = record.spec.live.unwrap_or_default().timeout;
    let began = |step: Step| {
        let at = record.status.steps.iter().rev().find(|s| s.step == step.as_str());
        at.map(|s| s.at.0)
    };
    let since = match record.status.step()? {
        Step::Restoring => began(Step::Restoring),
        Step::Committed if super::is_internal(record) && record.spec.method == Method::Live => began(Step::Committed),
        _ => None,
    }?;
    since
        .checked_add(jiff::SignedDuration::from_millis(limit.as_millis()))
        .ok()
}

/// The undo of a move whose time is over.
pub(super) fn overdue(p: &mut Pass<'_>) -> Option<Transition> {
    let over = deadline(&p.record).is_some_and(|d| d <= p.now);
    over.then(|| {
        let limit = p.record.spec.live.unwrap_or_default().timeout;
        let message = format!("the running state did not arrive within spec.live.timeout ({limit})");
        let fix = "set a longer spec.live.timeout, or let the guest write less while it moves".to_owned();
        p.undo(Reason::MoveFailed, message, Some(fix))
    })
}

/// From Marked: the copy takes its real name from the start, since a running instance cannot be renamed.
pub(super) fn begin(p: &mut Pass<'_>, source: &Copy) -> Transition {
    let i = &source.fresh.instance;
    if kept::makes_room(&p.record) {
        let view = p.view;
        if let Some(t) = p.wait_for_end(&view.target).or_else(|| kept::adopt(p)) {
            return t;
        }
    }
    match i.power {
        Power::Running => {
            let name = p.record.spec.to.name.clone();
            p.set_incoming(&name);
            p.advance(Step::Restoring);
            // the target was not read yet
            p.go_on()
        }
        Power::Starting | Power::Stopping | Power::Error => p.wait(POLL),
        Power::Stopped | Power::Frozen => {
            let message = format!("{} is {} and has no running state to move", i.at, i.power.as_str());
            p.undo(Reason::Progressing, message, None)
        }
    }
}

pub(super) fn restoring(p: &mut Pass<'_>) -> Transition {
    if p.succeeded(EffectKind::Transfer) {
        p.record.status.transferred = p.incoming().map(str::to_owned);
        p.record.status.progress = None;
        stood_still(p);
        // from when on both guests run
        let ago = p.view.outcome.as_ref().map_or(Duration::ZERO, |o| o.first_end_ago);
        let since = p.now.checked_sub(ago).unwrap_or(p.now);
        p.record.status.running_at = Some(MicroTime(since));
    }
    if let Some(e) = p.failed(EffectKind::Transfer) {
        return failed(p, e);
    }
    if !criu::is_restored(&p.record)
        && let Some(t) = p.undo_if_wished().or_else(|| overdue(p))
    {
        return t;
    }
    let view = p.view;
    if let EndView::Unreachable { message, .. } = &view.target {
        criu::target_silent(p, message);
        return p.wait(POLL);
    }
    if p.record.status.transferred.is_some() {
        return commit(p);
    }
    if let Some(t) = p.wait_for_end(&view.source) {
        return t;
    }
    let Some(source) = p.source() else {
        return cold::source_vanished(p);
    };
    found(p, source)
}

/// No outcome is known: nothing was sent yet, or the process that waited for it died. Who runs says what happened.
fn found(p: &mut Pass<'_>, source: &Copy) -> Transition {
    let view = p.view;
    let real = InstanceRef::new(&p.record.spec.to.project, &p.record.spec.to.name);
    let at = &source.fresh.instance.at;
    if view.target.operation_on(&real).is_some() || view.source.migration_of(at).is_some() {
        // it may still succeed; if not, its time ends
        return p.wait(POLL);
    }
    if let Some(target) = p.target() {
        if matches!(target.fresh.instance.power, Power::Running) {
            p.record.status.transferred = Some(real.name);
            p.record.status.running_at = Some(MicroTime(p.now));
            return commit(p);
        }
        let message = format!(
            "the outcome of the live transfer to {} was lost",
            p.record.spec.to.server
        );
        return p.undo(Reason::ServerUnreachable, message, None);
    }
    if view.target.copy(&real).is_some() {
        let message = format!("{real} exists on {} already", p.record.spec.to.server);
        return p.undo(Reason::NameTaken, message, None);
    }
    if source.fresh.instance.power != Power::Running {
        let message = format!("{at} stopped while its running state was to be moved");
        return p.undo(Reason::Progressing, message, None);
    }
    let EndView::Reachable { facts, .. } = &view.target else {
        return p.wait(POLL);
    };
    transfer(p, source, facts)
}

/// What was seen of the guest's standstill while its running state went over. Nothing seen is not said to be nothing.
pub(super) fn stood_still(p: &mut Pass<'_>) {
    let stood = p.spent().frozen;
    if !stood.is_zero() && !criu::in_rounds(&p.record) {
        p.record.status.downtime = Some(GoDuration::whole_millis(stood));
    }
}

fn transfer(p: &Pass<'_>, source: &Copy, facts: &ServerFacts) -> Transition {
    let mut definition = incoming_definition(&p.record.spec, &p.record.name, &source.fresh.instance, facts);
    criu::put_back(&p.record, &mut definition.config);
    let what = cold::Sending::whole(&p.record.spec);
    cold::send(p, source, &p.record.spec.to.name, definition, what, true)
}

/// The servers could not move the running state.
pub(super) fn failed(p: &mut Pass<'_>, e: &ServerError) -> Transition {
    if let Some(end) = criu::without_criu(&e.message) {
        return criu::missing(p, end, e);
    }
    if e.kind == FailureKind::Busy {
        // what a failed restore left is being stopped for a minute or two, under the real name
        return p.undo(Reason::MoveFailed, e.to_string(), None);
    }
    if criu::is_container(&p.record) {
        let message = criu::essence(&e.message);
        return cold::transfer_failed(p, &ServerError { message, ..e.clone() });
    }
    cold::transfer_failed(p, e)
}

/// Both operations succeeded, or the copy was found running: one compare-and-swap makes it the instance.
fn commit(p: &mut Pass<'_>) -> Transition {
    let view = p.view;
    let EndView::Reachable { facts, .. } = &view.target else {
        return p.wait(POLL);
    };
    let Some(target) = p.target() else {
        let message = format!("the copy on {} is gone", p.record.spec.to.server);
        return p.undo(Reason::MoveFailed, message, None);
    };
    // a source that does not answer now cannot be compared with, and must not hold up its own stop
    if let Some(source) = p.source()
        && let Some(why) = verify::difference(p, source, target, facts)
    {
        return p.undo(Reason::MoveFailed, why, None);
    }
    if let Some(t) = criu::look_inside(p, target) {
        return t;
    }
    p.record.status.committed_at = Some(MicroTime(p.now));
    p.advance(Step::Committed);
    finish::committed(p)
}

/// After the commit: the former source is stopped by force (a shutdown would run the guest's hooks a second time),
/// guarded, and the overlap is taken down. `None`: that is done, or its server does not answer.
pub(super) fn settle_source(p: &mut Pass<'_>) -> Option<Transition> {
    if !between_servers(&p.record) {
        return None;
    }
    let source = p.source()?;
    let i = &source.fresh.instance;
    // anything else is looked at when it is retired
    if !p.carries_mark(i) || marks::role(i) != Some(Role::Source) {
        return None;
    }
    if let Some(t) = criu::is_ending(p, source) {
        return Some(t);
    }
    if i.may_run() {
        if let Some(t) = p.retry_after_failure(EffectKind::Stop) {
            return Some(t);
        }
        p.record.status.stop_requested_at.get_or_insert(MicroTime(p.now));
        return Some(p.ask(EffectKind::Stop, End::Source, &i.at, Request::ForceStop));
    }
    if p.record.status.stopped_at.is_none() {
        p.record.status.stopped_at = Some(MicroTime(p.now));
        p.record.status.last_used_at = Some(i.last_used_at.clone());
        let since = p.record.status.running_at.as_ref().map_or(p.now, |t| t.0);
        // a source that its server stopped by itself never ran beside the copy
        let both = p.record.status.stop_requested_at.is_some();
        let millis = if both {
            p.now.as_millisecond() - since.as_millisecond()
        } else {
            0
        };
        p.record.status.overlap = Some(GoDuration::from_millis(millis.max(0)));
    }
    guard(p, source)
}

fn guard(p: &mut Pass<'_>, source: &Copy) -> Option<Transition> {
    let i = &source.fresh.instance;
    let guard = p.record.spec.guard.source;
    let asleep = i.config.get(marks::AUTOSTART).is_some_and(|v| v == "false");
    if marks::guarded(i, guard) && asleep {
        if guard != GuardKind::Name || i.at.name != p.record.spec.from.name {
            return None;
        }
        if let Some(t) = p.retry_after_failure(EffectKind::Hide) {
            return Some(t);
        }
        let name = p.retired_name(&i.at.name);
        return Some(p.ask(EffectKind::Hide, End::Source, &i.at, Request::Rename { name }));
    }
    if let Some(t) = p.retry_after_failure(EffectKind::Guard) {
        return Some(t);
    }
    let mut change = Change::default();
    change.config.insert(marks::AUTOSTART.to_owned(), "false".to_owned());
    marks::add_guard(&mut change, guard, i.kind, &p.record.name);
    criu::merge_back(&p.record, &mut change);
    let etag = source.fresh.etag.clone();
    Some(p.ask(EffectKind::Guard, End::Source, &i.at, Request::Patch { change, etag }))
}

/// The running copy becomes the owner by a merge, which a running instance accepts.
pub(super) fn own(p: &mut Pass<'_>, target: &Copy) -> Transition {
    let i = &target.fresh.instance;
    let mut change = Change {
        config: marks::marks(&p.record.name, Role::Owner, p.record.spec.attempt),
        ephemeral: p.kept_true(marks::EPHEMERAL).then_some(true),
        ..Default::default()
    };
    for key in [marks::AUTOSTART, marks::PROTECTION_DELETE, marks::PROTECTION_START] {
        let wanted = p.kept(key).flatten().unwrap_or_default();
        if i.config.get(key).map_or("", String::as_str) != wanted {
            change.config.insert(key.to_owned(), wanted.to_owned());
        }
    }
    if let Some(value) = p.record.spec.overrides.config.get(marks::AUTOSTART) {
        change.config.insert(marks::AUTOSTART.to_owned(), value.clone());
    }
    let etag = target.fresh.etag.clone();
    p.ask(EffectKind::Own, End::Target, &i.at, Request::Patch { change, etag })
}

/// Both guests ran for longer than the placement allows: the stopped source stays, guarded, for a person to look at.
pub(super) fn kept_for_a_person(p: &mut Pass<'_>, source: &Copy) -> Option<Transition> {
    let (overlap, limit) = overlapped(&p.record)?;
    let view = p.view;
    if let Some(t) = p.wait_for_end(&view.target) {
        return Some(t);
    }
    if let Some(target) = p.target()
        && let Some(t) = unmark(p, target, End::Target)
    {
        return Some(t);
    }
    let (from, at) = (&p.record.spec.from, &source.fresh.instance.at);
    let cli = view.source.product().cli();
    let message = format!(
        "{} runs on {}, but both guests ran for {overlap} (spec.live.maxOverlap is {limit}): what the one on {} wrote in that time is in {at} there only, which is stopped and guarded",
        p.record.spec.to.name, p.record.spec.to.server, from.server
    );
    let fix = format!(
        "if nothing of it is needed, on {}: {cli} delete --project {} {}",
        from.server, at.project, at.name
    );
    p.note(Reason::NeedsAttention, message, Some(fix));
    Some(p.finish(MoveOutcome::NeedsAttention))
}

/// For how long both guests ran and for how long they may, if that was longer.
pub(super) fn overlapped(record: &Record) -> Option<(GoDuration, GoDuration)> {
    let limit = record.spec.live.unwrap_or_default().max_overlap;
    let overlap = record.status.overlap.filter(|o| *o > limit)?;
    between_servers(record).then_some((overlap, limit))
}

/// Undoing: a copy that runs is stopped before anything else, since the source goes on or is about to.
pub(super) fn stop_copy(p: &mut Pass<'_>) -> Option<Transition> {
    if !between_servers(&p.record) || p.incoming().is_none() {
        return None;
    }
    let source = p.source()?;
    if let Some(t) = criu::too_late(p) {
        return Some(t);
    }
    if !is_hung(p)
        && let Some(t) = cancel_lost_operation(p).or_else(|| cancel_on_target(p))
    {
        return Some(t);
    }
    if let EndView::Unreachable { message, .. } = &p.view.target {
        if let Some(t) = criu::is_ending(p, source) {
            return Some(t);
        }
        // the source goes on; only if it was stopped with its state (LXD 5.0) a copy may be running instead
        if source.fresh.instance.may_run() || p.record.status.ran_before != Some(true) {
            return None;
        }
        let message = format!(
            "{} does not answer, and the copy there may be running, so {} is not started yet: {message}",
            p.record.spec.to.server, source.fresh.instance.at
        );
        p.note(Reason::ServerUnreachable, message, None);
        return Some(p.wait(POLL * 2));
    }
    let copy = p.target().map(|c| &c.fresh.instance).filter(|i| i.may_run());
    let Some(copy) = copy.filter(|_| p.attempts() <= ATTEMPTS) else {
        return criu::is_ending(p, source);
    };
    if let Some(t) = p.retry_after_failure(EffectKind::Stop) {
        return Some(t);
    }
    Some(p.ask(EffectKind::Stop, End::Target, &copy.at, Request::ForceStop))
}

/// Whether the servers had time enough to end what was given up.
pub(super) fn is_hung(p: &Pass<'_>) -> bool {
    p.in_step() > HUNG
}

/// Of a pushed transfer only the target's end can be cancelled.
fn cancel_on_target(p: &Pass<'_>) -> Option<Transition> {
    let at = InstanceRef::new(&p.record.spec.to.project, &p.record.spec.to.name);
    let id = p.view.target.operation_on(&at)?.id.clone();
    if p.view.outcome.as_ref().is_some_and(|o| o.effect == EffectKind::Cancel) {
        return Some(p.wait(POLL));
    }
    Some(p.ask(EffectKind::Cancel, End::Target, &at, Request::CancelOperation(id)))
}

/// Incus from 6.23 to 7.3 leaves the disk overlay of a failed live migration attached, and what the guest writes from then
/// on is lost when it stops (fact sheet 7.6). No extension says so; it is known by version alone.
pub(super) fn loses_writes_after_a_failure(facts: &ServerFacts) -> bool {
    let mut numbers = facts.version.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    facts.product == Product::Incus && ((6, 23)..=(7, 3)).contains(&version)
}

/// The end of an undo after which nothing may be stopped without a person.
pub(super) fn must_not_be_stopped(p: &mut Pass<'_>) -> Option<Transition> {
    let EndView::Reachable { facts, .. } = &p.view.source else {
        return None;
    };
    let began = p.incoming().is_some() || super::is_internal(&p.record);
    let runs = p.source().is_some_and(|s| s.fresh.instance.may_run());
    let vm = p.record.spec.instance_type == berth_api::InstanceType::VirtualMachine;
    if p.record.spec.method != Method::Live || !began || !runs || !vm || !loses_writes_after_a_failure(facts) {
        return None;
    }
    let (from, why) = (
        &p.record.spec.from,
        p.record.status.undo.as_ref().map_or("", |u| &u.message),
    );
    let message = format!(
        "the live move failed ({why}); {} goes on running on {}, but Incus {} loses what it writes from now on when it is stopped",
        from.name, from.server, facts.version
    );
    let fix = format!(
        "save what matters from inside the guest before it is stopped: it runs on {} as {}",
        from.server, from.name
    );
    p.note(Reason::NeedsAttention, message, Some(fix));
    Some(p.finish(MoveOutcome::NeedsAttention))
}
