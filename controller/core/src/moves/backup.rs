//! The transfer by backup: made on the source, kept there under a name that only this intent used and that is recorded
//! first, fetched, imported under the copy's unique name. What arrives carries the source's marks and guard; a conditional
//! write makes it the copy that a migration would have made. The backup on the source is dropped however the move ends.

use std::time::Duration;

use berth_api::{Reason, Snapshots, Transfer as Mode};

use super::body::incoming_definition;
use super::effect::{Backup, EffectKind, End, Request};
use super::pass::{Pass, Transition};
use super::view::{Copy, EndView, source_places};
use crate::marks::{self, Role};
use crate::model::{Capability, Instance, InstanceRef, ServerFacts};
use crate::server::{Export, FailureKind, ImportRequest};

const POLL: Duration = Duration::from_secs(1);
/// How often the deletion of a backup is tried before the server is left to delete it itself.
const ATTEMPTS: i32 = 5;

/// Asks for the whole way of the data.
pub(super) fn transfer(p: &mut Pass<'_>, source: &Copy) -> Transition {
    let name = marks::unique_name(&p.view.random, &p.record.spec.to.name);
    p.set_incoming(&name);
    p.record.status.transferred = None;
    let instance_only = p.record.spec.snapshots == Snapshots::Exclude;
    let export = if streams(&p.view.source) {
        Export::Direct { instance_only }
    } else {
        p.record.status.names.get_or_insert_default().backup = Some(name.clone());
        Export::Kept(name.clone())
    };
    let to = &p.record.spec.to;
    let at = InstanceRef::new(&to.project, &name);
    let request = Backup {
        from: source.fresh.instance.at.clone(),
        export,
        instance_only,
        import: ImportRequest {
            at: at.clone(),
            pool: to.pool.clone(),
            member: to.member.clone(),
        },
    };
    p.ask(
        EffectKind::Transfer,
        End::Target,
        &at,
        Request::Backup(Box::new(request)),
    )
}

/// Whether that end can send a backup without keeping it.
fn streams(source: &EndView) -> bool {
    match source {
        EndView::Reachable { facts, .. } => facts.can(Capability::DirectBackup),
        EndView::Unreachable { .. } => false,
    }
}

/// Deletes the backup on the source, if there may be one. It is forgotten when it is gone, or when the source is.
pub(super) fn drop(p: &mut Pass<'_>) -> Option<Transition> {
    let name = p.record.status.names.as_ref()?.backup.clone()?;
    let gone = p
        .failed(EffectKind::DropBackup)
        .is_some_and(|e| e.kind == FailureKind::NotFound);
    let Some(at) = p.source().map(|s| s.fresh.instance.at.clone()) else {
        return forget(p);
    };
    if gone || p.succeeded(EffectKind::DropBackup) {
        return forget(p);
    }
    let busy = source_places(&p.record).iter().any(|at| {
        p.view
            .source
            .operation_on(at)
            .is_some_and(|o| o.description.starts_with("Backing up"))
    });
    if busy {
        return Some(p.wait(POLL));
    }
    if let Some(retry) = p.retry_after_failure(EffectKind::DropBackup) {
        if p.attempts() < ATTEMPTS {
            return Some(retry);
        }
        // it expires by itself
        return forget(p);
    }
    Some(p.ask(EffectKind::DropBackup, End::Source, &at, Request::DropBackup { name }))
}

fn forget(p: &mut Pass<'_>) -> Option<Transition> {
    if let Some(names) = p.record.status.names.as_mut() {
        names.backup = None;
    }
    Some(p.go_on())
}

/// Whether the copy is as the backup brought it: it still says that it is the source.
pub(super) fn is_untouched(p: &Pass<'_>, copy: &Instance) -> bool {
    p.record.spec.transfer == Mode::Backup && marks::role(copy) != Some(Role::Incoming)
}

/// Makes what came with the backup the copy that a migration would have made.
pub(super) fn adapt(p: &mut Pass<'_>, source: &Copy, copy: &Copy, facts: &ServerFacts) -> Option<Transition> {
    let i = &copy.fresh.instance;
    if !is_untouched(p, i) {
        return None;
    }
    if let Some(e) = p.failed(EffectKind::Align).filter(|e| e.kind != FailureKind::Changed) {
        if e.is_transient() && p.attempts() < ATTEMPTS {
            return p.retry_after_failure(EffectKind::Align);
        }
        return Some(p.undo(Reason::TargetRefused, e.to_string(), None));
    }
    let mut definition = incoming_definition(&p.record.spec, &p.record.name, &source.fresh.instance, facts);
    // the server's own keys are those that it gave the copy
    let own = |key: &str| key.starts_with("volatile.") && !key.starts_with("volatile.berth-guard.");
    definition.config.retain(|key, _| !own(key));
    let kept = i.config.iter().filter(|(key, _)| own(key));
    definition.config.extend(kept.map(|(k, v)| (k.clone(), v.clone())));
    let etag = copy.fresh.etag.clone();
    Some(p.ask(EffectKind::Align, End::Target, &i.at, Request::Put { definition, etag }))
}
