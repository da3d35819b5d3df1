//! Moves inside one server or cluster: Accepted → Marked → (Stopped) → Committed → Started → Cleaned. The server does
//! the work in one request (or one for each change where it cannot combine them); COMMIT is written before the first.

use std::time::Duration;

use berth_api::{MicroTime, Outcome as MoveOutcome, Power as AfterPower, Reason, Step};

use super::cold::{self, stop_source};
use super::effect::{EffectKind, End, Request};
use super::finish::{put_back_cloud_init, start_failed, started_now, unmark};
use super::pass::{Pass, Transition};
use super::view::{Copy, EndView};
use crate::model::{Capability, Instance, InstanceRef, Power, ServerFacts};
use crate::server::Relocation;

const POLL: Duration = Duration::from_secs(1);
/// Refusals of the server after which the move is given up.
const ATTEMPTS: i32 = 3;

pub(super) fn step(p: &mut Pass<'_>, step: Step) -> Transition {
    match step {
        Step::Accepted => cold::accepted(p),
        Step::Marked => marked(p),
        Step::Stopped | Step::Committed => committed(p),
        Step::Started => started(p),
        Step::Precopied
        | Step::Transferred
        | Step::Verified
        | Step::Retired
        | Step::Cleaned
        | Step::Restoring
        | Step::Undoing => p.rest(),
    }
}

pub(super) fn marked(p: &mut Pass<'_>) -> Transition {
    let view = p.view;
    if let Some(t) = p.wait_for_end(&view.source) {
        return t;
    }
    let Some(source) = p.source() else {
        return cold::source_vanished(p);
    };
    if let Some(t) = p.undo_if_wished() {
        return t;
    }
    if source.fresh.instance.power != Power::Stopped {
        return stop_source(p, source);
    }
    if p.record.status.stopped_at.is_none() {
        p.record.status.stopped_at = Some(MicroTime(p.now));
        p.advance(Step::Stopped);
    }
    p.record.status.committed_at = Some(MicroTime(p.now));
    p.advance(Step::Committed);
    committed(p)
}

fn committed(p: &mut Pass<'_>) -> Transition {
    let EndView::Reachable { facts, operations, .. } = &p.view.source else {
        return p.wait(POLL);
    };
    let Some(here) = found(p) else { return lost(p) };
    let i = &here.fresh.instance;
    if operations.iter().any(|o| o.instances.contains(&i.at)) {
        return p.wait(POLL);
    }
    if let Some(to) = remaining(p, facts, i) {
        if let Some(e) = p.failed(EffectKind::Relocate) {
            let message = e.to_string();
            let retry = p.retry_after_failure(EffectKind::Relocate);
            if p.attempts() >= ATTEMPTS {
                // the server refused every time and nothing moved: it goes back to what it was
                p.record.status.committed_at = None;
                return p.undo(Reason::TargetRefused, message, None);
            }
            if let Some(t) = retry {
                return t;
            }
        }
        return p.ask(EffectKind::Relocate, End::Source, &i.at, Request::Relocate(to));
    }
    if let Some(t) = put_back_cloud_init(p, here, End::Source) {
        return t;
    }
    if p.record.spec.power_after == AfterPower::Running && i.power == Power::Stopped {
        if let Some(t) = start_failed(p) {
            return t;
        }
        return p.ask(
            EffectKind::Start,
            End::Source,
            &i.at,
            Request::Start { stateful: false },
        );
    }
    started_now(p);
    started(p)
}

fn started(p: &mut Pass<'_>) -> Transition {
    let view = p.view;
    if let Some(t) = p.wait_for_end(&view.source) {
        return t;
    }
    if let Some(here) = found(p) {
        if let Some(t) = unmark(p, here, End::Source) {
            return t;
        }
        if p.kept_true(crate::marks::EPHEMERAL) && !here.fresh.instance.ephemeral {
            let change = crate::model::Change {
                ephemeral: Some(true),
                ..Default::default()
            };
            let etag = here.fresh.etag.clone();
            if let Some(t) = p.retry_after_failure(EffectKind::Unmark) {
                return t;
            }
            return p.ask(
                EffectKind::Unmark,
                End::Source,
                &here.fresh.instance.at,
                Request::Patch { change, etag },
            );
        }
    }
    p.advance(Step::Cleaned);
    p.finish(MoveOutcome::Succeeded)
}

/// The instance, under its old or its new project and name.
fn found<'a>(p: &Pass<'a>) -> Option<&'a Copy> {
    let (from, to) = (&p.record.spec.from, &p.record.spec.to);
    [
        InstanceRef::new(&to.project, &to.name),
        InstanceRef::new(&from.project, &from.name),
    ]
    .iter()
    .find_map(|at| {
        p.view
            .source
            .copy(at)
            .filter(|c| c.fresh.instance.uuid() == from.uuid.as_deref())
    })
    .or_else(|| p.source())
}

/// What is still to be changed; all at once where the server can combine, else one thing after the other.
fn remaining(p: &Pass<'_>, facts: &ServerFacts, i: &Instance) -> Option<Relocation> {
    let to = &p.record.spec.to;
    let wanted = |want: Option<&String>, have: Option<&str>| want.filter(|w| have != Some(w.as_str())).cloned();
    let whole = Relocation {
        member: wanted(to.member.as_ref(), i.member.as_deref()),
        pool: wanted(to.pool.as_ref(), i.root_pool()),
        project: (to.project != i.at.project).then(|| to.project.clone()),
        name: (to.name != i.at.name).then(|| to.name.clone()),
        live: false,
        instance_only: false,
    };
    if whole == Relocation::default() {
        return None;
    }
    if facts.can(Capability::MoveConfig) {
        return Some(whole);
    }
    let Relocation {
        member,
        pool,
        project,
        name,
        ..
    } = whole;
    Some(match (pool, project, member, name) {
        (Some(pool), ..) => Relocation {
            pool: Some(pool),
            ..Default::default()
        },
        (None, Some(project), ..) => Relocation {
            project: Some(project),
            ..Default::default()
        },
        (None, None, Some(member), _) => Relocation {
            member: Some(member),
            ..Default::default()
        },
        (None, None, None, name) => Relocation {
            name,
            ..Default::default()
        },
    })
}

/// A daemon that died between deleting and renaming leaves the instance under `move-of-…` (fact sheet 3.2).
fn lost(p: &mut Pass<'_>) -> Transition {
    let from = &p.record.spec.from;
    let message = format!(
        "{} with uuid {} is not to be found on {} right now",
        from.name,
        from.uuid.as_deref().unwrap_or("?"),
        from.server
    );
    p.note(Reason::NeedsAttention, message, None);
    p.wait(POLL * 5)
}
