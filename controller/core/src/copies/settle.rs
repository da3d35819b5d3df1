//! Transferred → Named → rest: the copy is compared with the source, takes its real name (still guarded), and one
//! conditional request gives it its configuration and lifts the guard.

use berth_api::copy::RefreshRecord;
use berth_api::{GoDuration, GuardKind, Reason, Snapshots, Time};

use super::pass::Pass;
use super::{Step, Transition, body, due, send};
use crate::marks::{self, Role};
use crate::model::{Definition, InstanceRef};
use crate::moves::{Copy, EffectKind, End, EndView, Request};

pub(super) fn transferred(p: &mut Pass<'_>) -> Transition {
    if let Some(t) = p.wait_for(End::Target) {
        return t;
    }
    let sent = p.work().sent;
    let Some(copy) = p.copy() else {
        p.note(Reason::RefreshFailed, "the copy is gone", None);
        return abandon(p);
    };
    let i = &copy.fresh.instance;
    if sent {
        if p.was_used(copy) {
            return send::used(p, copy);
        }
        if let Some(why) = difference(p, copy) {
            return not_complete(p, why);
        }
        if p.record.status.uuid.is_none() {
            p.record.status.uuid = i.uuid().map(str::to_owned);
            p.record.status.last_used_at = Some(i.last_used_at.clone());
        }
        let source = p.work().from.uuid.clone();
        p.record.status.source_uuid = source;
    }
    let to = p.work().to.clone();
    let real = InstanceRef::new(&to.project, &to.name);
    if i.at == real {
        p.record.status.name = Some(to.name);
        p.advance(Step::Named);
        return p.go_on();
    }
    if p.view.target.copy(&real).is_some() {
        return taken(p, &real);
    }
    if let Some(t) = p.retry_after(EffectKind::Name) {
        return t;
    }
    p.ask(
        EffectKind::Name,
        End::Target,
        &i.at,
        Request::Rename { name: real.name },
    )
}

/// What is not as it should be about the copy, in a sentence.
fn difference(p: &mut Pass<'_>, copy: &Copy) -> Option<String> {
    let t = &copy.fresh.instance;
    let work = p.work().clone();
    if marks::role(t) != Some(Role::Incoming) || !marks::guarded(t, work.guard) {
        return Some("the copy does not carry the guard and the marks that it was made with".to_owned());
    }
    if work.to.pool.is_some() && t.root_pool() != work.to.pool.as_deref() {
        return Some(format!(
            "the copy's root disk is on pool {}",
            t.root_pool().unwrap_or("?")
        ));
    }
    // one that does not answer now was seen to have sent everything
    let source = p.source()?;
    let s = &source.fresh.instance;
    if (t.kind, &t.architecture) != (s.kind, &s.architecture) {
        return Some(format!("the copy is a {} for {}", t.kind.as_str(), t.architecture));
    }
    let own = work.snapshot.as_ref().filter(|_| !work.from_snapshot)?;
    let arrived = copy.snapshots.iter().flatten().any(|a| a.name == *own);
    (p.record.spec.snapshots == Snapshots::Include && !arrived).then(|| format!("snapshot {own} did not arrive"))
}

fn not_complete(p: &mut Pass<'_>, why: String) -> Transition {
    p.note(Reason::RefreshFailed, why, None);
    if !p.work().refresh {
        p.advance(Step::Undoing);
        return p.go_on();
    }
    p.later();
    p.advance(Step::Snapshotted);
    p.go_on()
}

/// The name that the copy is to have is somebody else's by now.
fn taken(p: &mut Pass<'_>, real: &InstanceRef) -> Transition {
    let server = p.work().to.server.clone();
    let message = format!("{server} has another instance {real}{}", p.held_words());
    let fix = "rename or delete it, or create another InstanceCopy with another spec.target.name".to_owned();
    if p.work().refresh || p.record.status.last_refresh.is_some() {
        p.say(Reason::NameTaken, &format!("{message}; to mend it: {fix}"));
        return p.retry();
    }
    p.record.status.uuid = None;
    p.record.status.last_used_at = None;
    p.note(Reason::NameTaken, message, Some(fix));
    p.advance(Step::Undoing);
    p.go_on()
}

/// There is no copy to go on with.
fn abandon(p: &mut Pass<'_>) -> Transition {
    if p.work().refresh {
        return p.give_up();
    }
    p.advance(Step::Undoing);
    p.go_on()
}

pub(super) fn named(p: &mut Pass<'_>) -> Transition {
    if let Some(t) = p.wait_for(End::Target) {
        return t;
    }
    let Some(copy) = p.copy() else {
        p.note(Reason::RefreshFailed, "the copy is gone", None);
        return p.give_up();
    };
    let i = &copy.fresh.instance;
    if i.power == crate::model::Power::Stopped {
        let definition = definition(p, copy);
        let same = same(&definition, &Definition::from(i));
        if !same {
            if let Some(t) = p.retry_after(EffectKind::Own) {
                return t;
            }
            let etag = copy.fresh.etag.clone();
            return p.ask(EffectKind::Own, End::Target, &i.at, Request::Put { definition, etag });
        }
    }
    if let Some(t) = tidy(p, copy) {
        return t;
    }
    finish(p)
}

/// Whether nothing would be changed; what servers add by themselves is in both.
fn same(a: &Definition, b: &Definition) -> bool {
    (&a.config, &a.devices, &a.profiles) == (&b.config, &b.devices, &b.profiles) && a.ephemeral == b.ephemeral
}

fn definition(p: &mut Pass<'_>, copy: &Copy) -> Definition {
    let work = p.work().clone();
    let wanted = match (&p.view.target, p.source()) {
        (EndView::Reachable { facts, .. }, Some(source)) if work.sent => {
            Some(body::resting(&p.record, &work, &source.fresh.instance, facts))
        }
        _ => None,
    };
    body::settled(&copy.fresh.instance, wanted, &work)
}

/// Snapshots of ours that nothing needs any more, on both ends, one at a time. What cannot be deleted now ends by itself.
fn tidy(p: &mut Pass<'_>, copy: &Copy) -> Option<Transition> {
    let work = p.work().clone();
    if !work.sent || p.failed(EffectKind::RemoveSnapshot).is_some() {
        return None;
    }
    let kept = work.snapshot.clone().filter(|_| !work.from_snapshot);
    let over: Vec<String> = [p.record.status.snapshot.clone(), work.snapshot.clone()]
        .into_iter()
        .flatten()
        .filter(|name| Some(name) != kept.as_ref())
        .collect();
    let ends = [(End::Source, p.source()), (End::Target, Some(copy))];
    let (end, at, name) = ends.into_iter().find_map(|(end, copy)| {
        let has = |name: &&String| copy.is_some_and(|c| c.snapshots.iter().flatten().any(|s| s.name == **name));
        let name = over.iter().find(has)?.clone();
        Some((end, copy?.fresh.instance.at.clone(), name))
    })?;
    Some(p.ask(EffectKind::RemoveSnapshot, end, &at, Request::RemoveSnapshot { name }))
}

fn finish(p: &mut Pass<'_>) -> Transition {
    let work = p.work().clone();
    if !work.sent {
        // it went back to what it was
        if p.record
            .status
            .last_error
            .as_ref()
            .is_some_and(|e| e.reason == Reason::CopyWasUsed.as_str())
        {
            p.record.status.current = None;
            p.record.status.incoming = None;
            p.record.status.last_error = None;
            return p.go_on();
        }
        return p.give_up();
    }
    let started = work.started_at.as_ref().map_or(p.now, |t| t.0);
    let millis = p.now.as_millisecond() - started.as_millisecond();
    let next = due::next(&p.record, started);
    let status = &mut p.record.status;
    status.last_refresh = Some(RefreshRecord {
        started_at: Some(Time(started)),
        finished_at: Some(Time(p.now)),
        bytes: work.bytes,
        duration: Some(GoDuration::from_millis(millis)),
    });
    status.snapshot = work.snapshot.filter(|_| !work.from_snapshot);
    status.current = None;
    status.incoming = None;
    status.last_error = None;
    status.retry_at = None;
    status.next_refresh = match next {
        Ok(due::Due::At(at)) => Some(Time(at)),
        Ok(due::Due::Never) | Err(_) => None,
    };
    p.go_on()
}

/// What a copy that rests still carries of a refresh, where it was put down half way.
pub(super) fn is_held(copy: &crate::model::Instance) -> bool {
    marks::role(copy).is_some() || marks::guarded(copy, GuardKind::Device) || marks::is_unique_name(&copy.at.name)
}
