//! Undoing: the source becomes what it was (first), then the copy goes. Once this step is written, no one commits.

use std::time::Duration;

use berth_api::{Method, MicroTime, Outcome as MoveOutcome, Reason};

use super::backup;
use super::cold::{cancel_lost_operation, leftover_fix};
use super::criu;
use super::effect::{EffectKind, End, Request};
use super::finish::{put_back_cloud_init, remove_strays, restore_keys, unmark};
use super::kept;
use super::live;
use super::pass::{Pass, Transition};
use super::view::{Copy, EndView, target_places};
use super::warm::remove_temporary;
use crate::marks;
use crate::model::{Definition, InstanceKind, InstanceRef, Power, Product};
use crate::server::FailureKind;

const POLL: Duration = Duration::from_secs(1);
/// LXD lets go of an instance at once after a stop that timed out; for so long its guest may still go down.
const LATE_STOP: Duration = Duration::from_secs(600);
/// How often a running source is to be unmarked at the least before a person has to look.
const STUCK_ATTEMPTS: i32 = 5;
/// How often and for how long the deletion of a copy is tried at the least before a person has to look: events make tries
/// come sooner than the pauses between them.
const REMOVE_ATTEMPTS: i32 = 5;
const REMOVE_PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn undoing(p: &mut Pass<'_>) -> Transition {
    let view = p.view;
    if let Some(t) = p.wait_for_end(&view.source) {
        return t;
    }
    if let Some(t) = live::stop_copy(p) {
        return t;
    }
    let sends = p.record.status.stopped_at.is_some() || sends_to_the_copy(p);
    if sends
        && !super::is_internal(&p.record)
        && !live::between_servers(&p.record)
        && let Some(t) = cancel_lost_operation(p)
    {
        return t;
    }
    if let Some(source) = p.source()
        && let Some(t) = restore_source(p, source)
    {
        return t;
    }
    if super::is_internal(&p.record) {
        return end(p);
    }
    if let Some(source) = p.source()
        && let Some(t) = remove_temporary(p, source, End::Source)
    {
        return t;
    }
    if p.source().is_none() && p.target().is_some() {
        return last_copy(p);
    }
    if let Some(t) = backup::drop(p) {
        return t;
    }
    // nothing was ever sent to the target: it need not answer
    if p.incoming().is_none() && p.record.status.adopted != Some(true) {
        return end(p);
    }
    if let Some(t) = p.wait_for_end(&view.target) {
        return t;
    }
    if let Some(t) = kept::hand_back(p).or_else(|| remove_copy(p)) {
        return t;
    }
    end(p)
}

/// Whether the copy is being written right now, from a source that still runs.
fn sends_to_the_copy(p: &Pass<'_>) -> bool {
    let at = p.incoming().map(|n| InstanceRef::new(&p.record.spec.to.project, n));
    at.is_some_and(|at| p.view.target.operation_on(&at).is_some())
}

/// Guard and marks off, everything put back, running again if it ran.
fn restore_source(p: &mut Pass<'_>, source: &Copy) -> Option<Transition> {
    let i = &source.fresh.instance;
    if p.carries_mark(i) && i.power == Power::Stopped {
        return restore_stopped(p, source);
    }
    if let Some(t) = unfreeze(p, source) {
        return Some(t);
    }
    if p.carries_mark(i) {
        // it runs: the marks come off; a stop that timed out may still happen, so it is watched until the server lets go
        let failed = p.failed(EffectKind::Unmark).filter(|e| e.is_transient());
        if let Some(kind) = failed.map(|e| e.kind)
            && let Some(retry) = p.retry_after_failure(EffectKind::Unmark)
        {
            return Some(not_let_go(p, retry, kind));
        }
        return restore_running(p, source);
    }
    if let Some(t) = put_back_cloud_init(p, source, End::Source) {
        return Some(t);
    }
    let ran = p.record.status.ran_before == Some(true);
    if ran && i.power == Power::Stopped {
        // a stop that timed out has happened now, so it need not be waited for any longer
        p.record.status.stopped_at.get_or_insert(MicroTime(p.now));
        if let Some(t) = p.retry_after_failure(EffectKind::Start) {
            return Some(t);
        }
        return Some(p.ask(
            EffectKind::Start,
            End::Source,
            &i.at,
            Request::Start { stateful: i.stateful },
        ));
    }
    if ran && i.power == Power::Running && p.record.status.stopped_at.is_none() && late_stop_is_possible(p) {
        return Some(p.wait(POLL * 10));
    }
    None
}

fn restore_stopped(p: &mut Pass<'_>, source: &Copy) -> Option<Transition> {
    let i = &source.fresh.instance;
    if p.record.status.stopped_at.is_none() && p.record.status.stop_requested_at.is_some() {
        // the stop that timed out has happened after all
        p.record.status.stopped_at = Some(MicroTime(p.now));
    }
    if i.at.name != p.record.spec.from.name {
        if let Some(t) = p.retry_after_failure(EffectKind::Hide) {
            return Some(t);
        }
        let name = p.record.spec.from.name.clone();
        return Some(p.ask(EffectKind::Hide, End::Source, &i.at, Request::Rename { name }));
    }
    if let Some(t) = p.retry_after_failure(EffectKind::Restore) {
        return Some(t);
    }
    let mut definition = Definition::from(i);
    marks::strip(&mut definition, p.record.spec.guard.source);
    restore_keys(p, &mut definition, End::Source);
    criu::put_back(&p.record, &mut definition.config);
    // an ephemeral instance that is stopped would be deleted by its next stop only, so it is safe to say so again
    let etag = source.fresh.etag.clone();
    Some(p.ask(
        EffectKind::Restore,
        End::Source,
        &i.at,
        Request::Put { definition, etag },
    ))
}

/// A daemon that dies while it has frozen a container, to read its files or its memory, leaves it so (*seen* on Incus 6.0.4
/// and LXD 5.0.2). A virtual machine that stands still may have gone on elsewhere.
pub(super) fn unfreeze(p: &mut Pass<'_>, source: &Copy) -> Option<Transition> {
    let i = &source.fresh.instance;
    let moved_running = matches!(p.record.spec.method, Method::Live | Method::Warm);
    let was_frozen = p.record.status.frozen_before == Some(true) || p.record.status.ran_before != Some(true);
    if i.power != Power::Frozen || i.kind != InstanceKind::Container || !moved_running || was_frozen {
        return None;
    }
    if p.view.source.operation_on(&i.at).is_some() {
        return None;
    }
    if let Some(t) = p.retry_after_failure(EffectKind::Unfreeze) {
        return Some(t);
    }
    Some(p.ask(EffectKind::Unfreeze, End::Source, &i.at, Request::Unfreeze))
}

/// The instance runs: what was changed before the stop goes back by a merge, which a running instance accepts.
fn restore_running(p: &mut Pass<'_>, source: &Copy) -> Option<Transition> {
    let i = &source.fresh.instance;
    let guarded = i.devices.contains_key(marks::GUARD)
        || p.kept(marks::AUTOSTART).flatten() != i.config.get(marks::AUTOSTART).map(String::as_str);
    if guarded {
        let mut definition = Definition::from(i);
        marks::strip(&mut definition, p.record.spec.guard.source);
        restore_keys(p, &mut definition, End::Source);
        criu::put_back(&p.record, &mut definition.config);
        if let Some(t) = p.retry_after_failure(EffectKind::Restore) {
            return Some(t);
        }
        let etag = source.fresh.etag.clone();
        return Some(p.ask(
            EffectKind::Restore,
            End::Source,
            &i.at,
            Request::Put { definition, etag },
        ));
    }
    let mut t = unmark(p, source, End::Source)?;
    if let Some(Request::Patch { change, .. }) = t.effect.as_mut().map(|e| &mut e.request) {
        change.ephemeral = p.kept_true(marks::EPHEMERAL).then_some(true);
        criu::merge_back(&p.record, change);
    }
    Some(t)
}

/// The server takes no change of the source, which runs: a stop that timed out is still to come, or it never ended a
/// migration that was cancelled (*seen* on Incus 6.0.4 with CRIU).
fn not_let_go(p: &mut Pass<'_>, mut retry: Transition, kind: FailureKind) -> Transition {
    let (name, server) = (&p.record.spec.from.name, &p.record.spec.from.server);
    let (reason, message, fix) = if p.record.status.stop_requested_at.is_some() {
        let message = format!(
            "{name} did not stop in time and its server refuses every change until it has stopped; it is then started again"
        );
        (Reason::StopPending, message, None)
    } else if kind == FailureKind::Busy && p.attempts() >= STUCK_ATTEMPTS && live::is_hung(p) {
        let message = format!(
            "{name} runs on, but {server} is still busy with its migration, which was given up, and refuses every change of it"
        );
        let fix = restart(server, &p.view.source);
        (Reason::NeedsAttention, message, Some(fix))
    } else {
        return retry;
    };
    if let Some(e) = p.record.status.last_error.as_mut() {
        (e.reason, e.message, e.fix) = (reason.as_str().to_owned(), message, fix);
    }
    retry.record = p.record.clone();
    retry
}

/// The command that frees an instance from an operation that its server never ends.
fn restart(server: &str, end: &EndView) -> String {
    let command = match end.product() {
        Product::Lxd => "systemctl reload snap.lxd.daemon (without the snap: systemctl restart lxd)",
        Product::Incus => "systemctl restart incus",
    };
    format!("on the host of {server}, whose instances run on: {command}")
}

/// Whether a graceful stop that timed out on LXD may still happen.
fn late_stop_is_possible(p: &Pass<'_>) -> bool {
    let EndView::Reachable { facts, .. } = &p.view.source else {
        return false;
    };
    let timed_out = p
        .record
        .status
        .undo
        .as_ref()
        .is_some_and(|u| u.reason == Reason::StopPending.as_str());
    let Some(asked) = p.record.status.stop_requested_at.as_ref() else {
        return false;
    };
    let since = p.now.as_millisecond() - asked.0.as_millisecond();
    facts.product == Product::Lxd && timed_out && u128::try_from(since).unwrap_or(0) < LATE_STOP.as_millis()
}

/// The copy goes: a complete one under a unique name of its own, a half-made one under the name it was made with.
fn remove_copy(p: &mut Pass<'_>) -> Option<Transition> {
    let view = p.view;
    let busy = target_places(&p.record)
        .iter()
        .any(|at| view.target.operation_on(at).is_some());
    let told = p.record.status.last_error.as_ref();
    let told = told.is_some_and(|e| e.reason == Reason::NeedsAttention.as_str());
    if busy {
        // *seen* on Incus 6.0.4: a virtual machine, cancelled as its running state began to be sent
        if !told && live::between_servers(&p.record) && live::is_hung(p) {
            let server = &p.record.spec.to.server;
            let message =
                format!("{server} never ends the transfer that was given up, so the copy there cannot be deleted");
            let fix = restart(server, &view.target);
            p.note(Reason::NeedsAttention, message, Some(fix));
        }
        return Some(p.wait(POLL));
    }
    if told {
        // the server has let go: what was tried too often before is tried again
        p.record.status.last_error = None;
        return Some(p.go_on());
    }
    let Some(target) = p.target() else {
        return remove_strays(p);
    };
    let i = &target.fresh.instance;
    if i.may_run() {
        let message = format!(
            "the copy {} on {} runs, so it was left alone",
            i.at, p.record.spec.to.server
        );
        p.note(Reason::NeedsAttention, message, None);
        return Some(p.finish(MoveOutcome::NeedsAttention));
    }
    if Some(i.at.name.as_str()) != p.incoming() {
        // it had its real name already, so it is complete: away from that name first, then it is looked at once more
        if let Some(t) = p.retry_after_failure(EffectKind::Rename) {
            return Some(t);
        }
        let begun = p
            .incoming()
            .filter(|n| Some(*n) != p.record.status.transferred.as_deref())
            .map(str::to_owned);
        let name = begun.unwrap_or_else(|| marks::unique_name(&p.view.random, &p.record.spec.to.name));
        p.set_incoming(&name);
        return Some(p.ask(EffectKind::Rename, End::Target, &i.at, Request::Rename { name }));
    }
    if let Some(t) = p.retry_after_failure(EffectKind::Remove) {
        if p.attempts() >= REMOVE_ATTEMPTS && p.in_step() >= REMOVE_PATIENCE {
            return Some(leftover(p, &i.at));
        }
        return Some(t);
    }
    Some(p.ask(EffectKind::Remove, End::Target, &i.at, Request::Remove))
}

/// Somebody deleted the source meanwhile: the copy is the last one and may be complete, so nothing is done to it.
fn last_copy(p: &mut Pass<'_>) -> Transition {
    let (from, to) = (&p.record.spec.from, &p.record.spec.to);
    let name = p
        .target()
        .map_or_else(|| to.name.clone(), |t| t.fresh.instance.at.name.clone());
    let message = format!(
        "{} is gone from {}, so the copy {name} on {}, which may be complete, was kept, guarded by device {}",
        from.name,
        from.server,
        to.server,
        marks::GUARD
    );
    p.note(Reason::NeedsAttention, message, None);
    p.finish(MoveOutcome::NeedsAttention)
}

fn leftover(p: &mut Pass<'_>, at: &InstanceRef) -> Transition {
    let message = format!(
        "the half-made copy {at} on {} cannot be deleted",
        p.record.spec.to.server
    );
    let fix = leftover_fix(p, at);
    p.note(Reason::LeftoverVolume, message, Some(fix));
    p.finish(MoveOutcome::NeedsAttention)
}

fn end(p: &mut Pass<'_>) -> Transition {
    if let Some(t) = live::must_not_be_stopped(p) {
        return t;
    }
    let cancelled = p.record.status.undo.as_ref().is_some_and(|u| u.cancelled);
    p.finish(if cancelled {
        MoveOutcome::Cancelled
    } else {
        MoveOutcome::Undone
    })
}
