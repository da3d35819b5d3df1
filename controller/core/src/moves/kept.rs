//! Kept sources (`spec.keepSource`). After the move the stopped source stays where it was, retired and guarded, until its
//! time is over. A move back to its server makes it the copy, so that only what changed since is sent: it is marked as
//! incoming (a conditional write, so that nobody else can use it meanwhile), takes a name of this move alone, and is
//! brought up to date like the copy of a Warm move. If nothing was sent to it, an undo hands it back.

use std::time::Duration;

use berth_api::moves::Onto;
use berth_api::{MicroTime, Reason};
use jiff::{SignedDuration, Timestamp};

use super::cold::{leftover_fix, retry_or_undo};
use super::effect::{EffectKind, End, Request};
use super::pass::{Pass, Transition};
use super::view::{Copy, EndView, Task, source_places};
use crate::marks::{self, Role};
use crate::model::{Change, Instance, InstanceRef, Power};
use crate::records::Record;

const POLL: Duration = Duration::from_secs(1);
/// When to look again at a kept source whose server does not answer.
const AWAY: Duration = Duration::from_secs(30);
/// Whether the source of this move is to be kept.
pub(super) fn keeps(record: &Record) -> bool {
    !record.spec.keep_source.is_zero() && !super::is_internal(record)
}

/// Whether the move is over and its source is still there, as far as is known.
pub fn has_kept(record: &Record) -> bool {
    record.finished() && record.status.kept_until.is_some()
}

/// Where the kept source of a move is.
pub fn kept_place(record: &Record) -> InstanceRef {
    let from = &record.spec.from;
    let hidden = record.status.names.as_ref().and_then(|n| n.retired.as_deref());
    InstanceRef::new(&from.project, hidden.unwrap_or(&from.name))
}

/// Whether `i` is the kept source of that move, and nobody has started or changed it.
pub fn is_kept(record: &Record, i: &Instance) -> bool {
    let marked = marks::move_id(i) == Some(record.name.as_str()) && marks::role(i) == Some(Role::Retired);
    let same = i.uuid().is_some() && i.uuid() == record.spec.from.uuid.as_deref();
    let unused = record.status.last_used_at.as_ref() == Some(&i.last_used_at);
    marked && same && unused && i.power == Power::Stopped && marks::guarded(i, record.spec.guard.source)
}

/// Whether the kept source is what this move brings up to date.
pub(super) fn refreshes(record: &Record) -> bool {
    record.spec.onto.as_ref().is_some_and(|o| o.refresh) && record.status.adopted != Some(false)
}

/// Whether a kept source has to go before the copy can be made under its real name, as a Live move makes it.
pub(super) fn makes_room(record: &Record) -> bool {
    record.spec.onto.is_some() && super::live::between_servers(record)
}

/// The source is retired: from now on it is kept.
pub(super) fn keep(p: &mut Pass<'_>, source: &Instance) {
    let kept = SignedDuration::from_millis(p.record.spec.keep_source.as_millis());
    let until = p.now.checked_add(kept).unwrap_or(Timestamp::MAX);
    p.record.status.kept_until = Some(MicroTime(until));
    p.record
        .status
        .last_used_at
        .get_or_insert_with(|| source.last_used_at.clone());
}

/// Makes the kept source the copy of this move, or gives that up. `None`: that is settled. The target answers.
pub(super) fn adopt(p: &mut Pass<'_>) -> Option<Transition> {
    let onto = p
        .record
        .spec
        .onto
        .clone()
        .filter(|_| p.record.status.adopted != Some(false))?;
    let place = InstanceRef::new(&p.record.spec.to.project, &onto.name);
    match p.incoming().map(str::to_owned) {
        None => Some(claim(p, &onto, &place)),
        Some(name) => take(p, &onto, &place, &name),
    }
}

/// Marks it as this move's, then asks for the name of its own.
fn claim(p: &mut Pass<'_>, onto: &Onto, place: &InstanceRef) -> Transition {
    let Some(copy) = p.view.target.copy(place) else {
        return decline(p, place);
    };
    let i = &copy.fresh.instance;
    if is_claimed(p, i) {
        let name = marks::unique_name(&p.view.random, &p.record.spec.to.name);
        p.set_incoming(&name);
        // it is complete, of an earlier time
        p.record.status.transferred = onto.refresh.then(|| name.clone());
        return p.ask(EffectKind::Rename, End::Target, place, Request::Rename { name });
    }
    if !fits(p, onto, i) {
        return decline(p, place);
    }
    if let Some(t) = retry_or_undo(p, EffectKind::Adopt) {
        return t;
    }
    p.record.status.adopted = Some(true);
    let change = Change {
        config: marks::marks(&p.record.name, Role::Incoming, p.record.spec.attempt),
        ..Default::default()
    };
    let etag = copy.fresh.etag.clone();
    p.ask(EffectKind::Adopt, End::Target, place, Request::Patch { change, etag })
}

/// It has this move's mark: the name is made sure of, and what only makes room goes.
fn take(p: &mut Pass<'_>, onto: &Onto, place: &InstanceRef, name: &str) -> Option<Transition> {
    let claimed =
        |p: &Pass<'_>, at: &InstanceRef| p.view.target.copy(at).is_some_and(|c| is_claimed(p, &c.fresh.instance));
    if claimed(p, place) {
        if let Some(t) = retry_or_undo(p, EffectKind::Rename) {
            return Some(t);
        }
        let name = name.to_owned();
        return Some(p.ask(EffectKind::Rename, End::Target, place, Request::Rename { name }));
    }
    if onto.refresh {
        return None;
    }
    let at = InstanceRef::new(&place.project, name);
    if claimed(p, &at) {
        if let Some(e) = p.failed(EffectKind::Remove).filter(|e| !e.is_transient()) {
            let message = format!("the kept source {place} cannot be deleted: {e}");
            let fix = leftover_fix(p, &at);
            return Some(p.undo(Reason::LeftoverVolume, message, Some(fix)));
        }
        if let Some(t) = p.retry_after_failure(EffectKind::Remove) {
            return Some(t);
        }
        return Some(p.ask(EffectKind::Remove, End::Target, &at, Request::Remove));
    }
    Some(decline(p, place))
}

/// There is none any more, or somebody uses it: everything is sent, unless it is in the way.
fn decline(p: &mut Pass<'_>, place: &InstanceRef) -> Transition {
    p.record.status.adopted = Some(false);
    if let Some(names) = p.record.status.names.as_mut() {
        names.incoming = None;
    }
    if place.name == p.record.spec.to.name && p.view.target.copy(place).is_some() {
        let server = &p.record.spec.to.server;
        let message =
            format!("somebody started or changed the kept source {place} on {server}, so it is not Berth's to use");
        return p.undo(Reason::NameTaken, message, None);
    }
    p.go_on()
}

/// Whether it carries this move's mark already.
fn is_claimed(p: &Pass<'_>, i: &Instance) -> bool {
    let same = i.uuid().is_some() && i.uuid() == p.record.spec.from.uuid.as_deref();
    same && p.carries_mark(i) && marks::role(i) == Some(Role::Incoming)
}

/// Whether it is still as it was when the move was decided.
fn fits(p: &Pass<'_>, onto: &Onto, i: &Instance) -> bool {
    let marked = marks::move_id(i) == Some(onto.record.as_str()) && marks::role(i) == Some(Role::Retired);
    let same = i.uuid().is_some() && i.uuid() == p.record.spec.from.uuid.as_deref();
    let unused = onto.last_used_at.as_ref() == Some(&i.last_used_at);
    marked && same && unused && i.power == Power::Stopped && marks::guarded(i, p.record.spec.guard.target)
}

/// The transfer did not reach it, so it is as whole as before.
pub(super) fn nothing_was_sent(p: &mut Pass<'_>) {
    let fresh = p.record.status.precopy.as_ref().is_none_or(|w| w.rounds.is_empty());
    if p.record.status.adopted == Some(true) && fresh {
        p.record.status.transferred = p.incoming().map(str::to_owned);
    }
}

/// Undoing: a kept source to which nothing was sent goes back to the move that kept it. `None`: there is none.
pub(super) fn hand_back(p: &mut Pass<'_>) -> Option<Transition> {
    let onto = p
        .record
        .spec
        .onto
        .clone()
        .filter(|_| p.record.status.adopted == Some(true))?;
    let rounds = p.record.status.precopy.as_ref().is_some_and(|w| !w.rounds.is_empty());
    let whole = p.record.status.transferred.as_deref() == p.incoming() && !rounds;
    let copy = p.target().filter(|_| whole || !onto.refresh)?;
    let i = &copy.fresh.instance;
    let place = InstanceRef::new(&p.record.spec.to.project, &onto.name);
    if i.power != Power::Stopped || !marks::guarded(i, p.record.spec.guard.target) {
        return None;
    }
    if i.at != place {
        // a name that somebody took meanwhile is theirs
        if p.view.target.copy(&place).is_some() {
            return None;
        }
        if let Some(t) = p.retry_after_failure(EffectKind::Rename) {
            return Some(t);
        }
        return Some(p.ask(
            EffectKind::Rename,
            End::Target,
            &i.at,
            Request::Rename { name: onto.name },
        ));
    }
    if let Some(t) = p.retry_after_failure(EffectKind::Adopt) {
        return Some(t);
    }
    let change = Change {
        config: marks::marks(&onto.record, Role::Retired, onto.attempt),
        ..Default::default()
    };
    let etag = copy.fresh.etag.clone();
    Some(p.ask(EffectKind::Adopt, End::Target, &place, Request::Patch { change, etag }))
}

/// The time of a kept source is over, or it is gone: it takes a name of its own, is looked at once more, and is deleted.
/// One that somebody started or changed is left alone.
pub(super) fn end(p: &mut Pass<'_>) -> Transition {
    if matches!(p.view.task, Task::Busy { .. }) {
        return p.wait(POLL * 5);
    }
    if let EndView::Unreachable { .. } = p.view.source {
        return p.wait(AWAY);
    }
    let view = p.view;
    let mine = |c: &&Copy| {
        let i = &c.fresh.instance;
        p.carries_mark(i) && i.uuid() == p.record.spec.from.uuid.as_deref()
    };
    let places = source_places(&p.record);
    let found = places.iter().find_map(|at| view.source.copy(at).filter(mine));
    let Some(copy) = found else {
        return gone(p, &places);
    };
    let i = &copy.fresh.instance;
    if !is_kept(&p.record, i) {
        return left_alone(p, &i.at);
    }
    let leaving = p.record.status.names.as_ref().and_then(|n| n.leaving.clone());
    if leaving.as_deref() == Some(i.at.name.as_str()) {
        return p
            .retry_after_failure(EffectKind::Remove)
            .unwrap_or_else(|| p.ask(EffectKind::Remove, End::Source, &i.at, Request::Remove));
    }
    if let Some(t) = p.retry_after_failure(EffectKind::Rename) {
        return t;
    }
    let name = leaving.unwrap_or_else(|| marks::unique_name(&p.view.random, &p.record.spec.from.name));
    p.record.status.names.get_or_insert_default().leaving = Some(name.clone());
    p.ask(EffectKind::Rename, End::Source, &i.at, Request::Rename { name })
}

/// It is gone.
fn gone(p: &mut Pass<'_>, places: &[InstanceRef]) -> Transition {
    let of_open = |at: &InstanceRef| {
        let copy = p.view.source.copy(at);
        let id = copy.and_then(|c| marks::move_id(&c.fresh.instance));
        id.is_some_and(|id| p.view.open_moves.iter().any(|o| o == id))
    };
    // a move that runs has taken it, and may hand it back
    if places.iter().any(of_open) {
        return p.wait(AWAY);
    }
    forget(p)
}

fn left_alone(p: &mut Pass<'_>, at: &InstanceRef) -> Transition {
    let server = &p.record.spec.from.server;
    let message = format!("somebody started or changed the kept source {at} on {server}, so it was left alone");
    let cli = p.view.source.product().cli();
    let fix = format!(
        "if it is not needed, on {server}: {cli} delete --project {} {}",
        at.project, at.name
    );
    p.note(Reason::Leftover, message, Some(fix));
    forget(p)
}

fn forget(p: &mut Pass<'_>) -> Transition {
    p.record.status.kept_until = None;
    p.go_on()
}
