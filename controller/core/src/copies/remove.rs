//! What is there of a first copy that is given up, and a whole copy whose object was deleted: only what carries our mark
//! is deleted, under a name that only this intent used, and never what somebody has started.

use berth_api::Reason;

use super::pass::Pass;
use super::{Transition, send};
use crate::model::InstanceRef;
use crate::moves::{EffectKind, End, Request};
use crate::{leftover, marks};

/// Undoing: the half-made copy goes first, under the name that it was made with, then the snapshot.
pub(super) fn undoing(p: &mut Pass<'_>) -> Transition {
    if let Some(t) = p.wait_for(End::Target) {
        return t;
    }
    if p.work().sent
        && let Some(t) = remove_incoming(p)
    {
        return t;
    }
    if let Some(t) = remove_snapshot(p) {
        return t;
    }
    p.give_up()
}

fn remove_incoming(p: &mut Pass<'_>) -> Option<Transition> {
    let (project, name) = (p.work().to.project.clone(), p.record.status.incoming.clone()?);
    let at = InstanceRef::new(project, name);
    if p.view.target.operation_on(&at).is_some() {
        return Some(send::cancel_lost(p).unwrap_or_else(|| p.retry()));
    }
    let copy = p.view.target.copy(&at)?;
    if !marks::is_copy(&copy.fresh.instance) || copy.fresh.instance.may_run() {
        return None;
    }
    if let Some(error) = p.failed(EffectKind::Remove) {
        let server = p.work().to.server.clone();
        let fix = leftover::removal(&server, &p.view.target, &at, &error.message);
        let message = format!(
            "the half-made copy {at} on {server} cannot be deleted: {}",
            error.message
        );
        p.say(Reason::LeftoverVolume, &format!("{message}; to mend it: {fix}"));
        return Some(p.wait(std::time::Duration::from_secs(30)));
    }
    Some(p.ask(EffectKind::Remove, End::Target, &at, Request::Remove))
}

/// The snapshot that was taken for this attempt, if the source can be asked; else it ends by itself.
fn remove_snapshot(p: &mut Pass<'_>) -> Option<Transition> {
    let name = p.work().snapshot.clone()?;
    let source = p.source()?;
    let there = source.snapshots.iter().flatten().any(|s| s.name == name);
    if !there || p.failed(EffectKind::RemoveSnapshot).is_some() {
        return None;
    }
    let at = &source.fresh.instance.at;
    Some(p.ask(
        EffectKind::RemoveSnapshot,
        End::Source,
        at,
        Request::RemoveSnapshot { name },
    ))
}

/// Removing: the copy under a name that only this deletion uses, looked at once more, deleted.
pub(super) fn removing(p: &mut Pass<'_>) -> Transition {
    if let Some(t) = p.wait_for(End::Target) {
        return t;
    }
    let Some(copy) = p.copy().filter(|c| !p.was_used(c)) else {
        return removed(p);
    };
    let at = &copy.fresh.instance.at;
    let Some(name) = p.record.status.incoming.clone() else {
        return removed(p);
    };
    if at.name != name {
        if let Some(t) = p.retry_after(EffectKind::Rename) {
            return t;
        }
        return p.ask(EffectKind::Rename, End::Target, at, Request::Rename { name });
    }
    if let Some(t) = p.retry_after(EffectKind::Remove) {
        return t;
    }
    p.ask(EffectKind::Remove, End::Target, at, Request::Remove)
}

fn removed(p: &mut Pass<'_>) -> Transition {
    let base = p.record.status.snapshot.clone();
    p.work().snapshot = base;
    if let Some(t) = remove_snapshot(p) {
        return t;
    }
    let status = &mut p.record.status;
    (status.current, status.incoming, status.uuid, status.snapshot) = (None, None, None, None);
    p.go_on()
}
