//! Moves inside one server or cluster: Accepted → Marked → (Stopped) → Committed → Started → Cleaned. The server does
//! the work in one request (or one for each change where it cannot combine them); COMMIT is written before the first.
//! Overrides are written before it. A move from a place to itself is a restart for overrides that need one.

use std::time::Duration;

use berth_api::{Method, MicroTime, Outcome as MoveOutcome, Power as AfterPower, Reason, Snapshots, Step};

use super::cold::{self, stop_source};
use super::effect::{EffectKind, End, Request};
use super::finish::{put_back_cloud_init, start_failed, started_now, unmark};
use super::pass::{Pass, Transition};
use super::view::{EndView, source_places};
use crate::model::{Capability, Definition, Instance, InstanceRef, Power, ServerFacts};
use crate::overrides::Adaptation;
use crate::server::{FailureKind, Relocation, ServerError};

const POLL: Duration = Duration::from_secs(1);
/// Refusals of the server after which the move is given up.
const ATTEMPTS: i32 = 3;

pub(super) fn step(p: &mut Pass<'_>, step: Step) -> Transition {
    match step {
        Step::Accepted => cold::accepted(p),
        Step::Marked => marked(p),
        Step::Stopped => stopped(p),
        Step::Committed => committed(p),
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
        if p.record.spec.method != Method::Live {
            return stop_source(p, source);
        }
        // it moves as it runs, and takes no change of its configuration on the way
        p.record.status.committed_at = Some(MicroTime(p.now));
        p.advance(Step::Committed);
        return committed(p);
    }
    if p.record.status.stopped_at.is_none() {
        p.record.status.stopped_at = Some(MicroTime(p.now));
        p.advance(Step::Stopped);
    }
    stopped(p)
}

/// What the placement declares of the configuration is written while everything can still be undone. Then COMMIT.
fn stopped(p: &mut Pass<'_>) -> Transition {
    let view = p.view;
    let EndView::Reachable { facts, .. } = &view.source else {
        return p.wait(POLL);
    };
    let Some(source) = p.source() else {
        return cold::source_vanished(p);
    };
    if let Some(t) = p.undo_if_wished() {
        return t;
    }
    let i = &source.fresh.instance;
    if i.power != Power::Stopped {
        return stop_source(p, source);
    }
    let change = adaptation(p, i, facts);
    // a server that stores another spelling took it all the same
    if !change.is_empty() && !p.succeeded(EffectKind::Adapt) {
        if let Some(t) = not_adapted(p) {
            return t;
        }
        let mut definition = Definition::from(i);
        change.apply(&mut definition);
        let etag = source.fresh.etag.clone();
        return p.ask(EffectKind::Adapt, End::Source, &i.at, Request::Put { definition, etag });
    }
    p.record.status.committed_at = Some(MicroTime(p.now));
    p.advance(Step::Committed);
    committed(p)
}

/// What is still to be changed. Profiles of another project can only be set there: that is left to the placement.
fn adaptation(p: &Pass<'_>, i: &Instance, facts: &ServerFacts) -> Adaptation {
    let mut overrides = p.record.spec.overrides.clone();
    if p.record.spec.to.project != p.record.spec.from.project {
        overrides.profiles.clear();
        overrides.no_profiles = false;
    }
    Adaptation::of(&overrides, i, facts)
}

/// A refused change is undone, and not made again before the placement changes.
fn not_adapted(p: &mut Pass<'_>) -> Option<Transition> {
    let e = p.failed(EffectKind::Adapt)?;
    if e.kind == FailureKind::Changed || e.is_transient() {
        return cold::retry_or_undo(p, EffectKind::Adapt);
    }
    let fix = "correct spec.overrides".to_owned();
    Some(p.undo(Reason::TargetRefused, e.to_string(), Some(fix)))
}

fn committed(p: &mut Pass<'_>) -> Transition {
    let EndView::Reachable { facts, operations, .. } = &p.view.source else {
        return p.wait(POLL);
    };
    let places: Vec<InstanceRef> = p.everywhere().map(|c| c.fresh.instance.at.clone()).collect();
    let about_it = |at: &InstanceRef| places.contains(at) || source_places(&p.record).contains(at);
    if operations.iter().any(|o| o.instances.iter().any(about_it)) {
        return p.wait(POLL);
    }
    if let [one, other, ..] = places.as_slice() {
        return twice(p, one, other);
    }
    let Some(here) = p.source() else { return lost(p) };
    let i = &here.fresh.instance;
    if p.record.spec.method == Method::Live && p.succeeded(EffectKind::Relocate) {
        super::live::stood_still(p);
    }
    if let Some(to) = remaining(p, facts, i) {
        if let Some(e) = p.failed(EffectKind::Relocate) {
            if p.record.spec.method == Method::Live
                && let Some(t) = live_failed(p, e)
            {
                return t;
            }
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
            Request::Start { stateful: i.stateful },
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
    if let Some(here) = p.source() {
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

/// What is still to be changed; all at once where the server can combine, else in as few requests as it allows.
fn remaining(p: &Pass<'_>, facts: &ServerFacts, i: &Instance) -> Option<Relocation> {
    let to = &p.record.spec.to;
    let wanted = |want: Option<&String>, have: Option<&str>| want.filter(|w| have != Some(w.as_str())).cloned();
    let mut next = Relocation {
        member: wanted(to.member.as_ref(), i.member.as_deref()),
        pool: wanted(to.pool.as_ref(), i.root_pool()),
        project: (to.project != i.at.project).then(|| to.project.clone()),
        name: (to.name != i.at.name).then(|| to.name.clone()),
        live: false,
        instance_only: false,
    };
    if next == Relocation::default() {
        return None;
    }
    if !facts.can(Capability::MoveConfig) {
        // LXD 5.0 looks at the first of these only, and ignores the others; a new name goes with either of the first two
        if next.pool.is_some() {
            (next.project, next.member) = (None, None);
        } else if next.project.is_some() {
            next.member = None;
        } else if next.member.is_some() {
            next.name = None;
        }
    }
    // only a change of the volume can leave snapshots behind: a member alone takes them along whatever it is told
    let new_volume = next.pool.is_some() || next.project.is_some();
    next.instance_only = new_volume && p.record.spec.snapshots == Snapshots::Exclude;
    next.live = p.record.spec.method == Method::Live && i.may_run();
    Some(next)
}

/// The running state could not be moved: the instance goes on where it is. A daemon that does not answer says nothing;
/// then the instance's place will.
fn live_failed(p: &mut Pass<'_>, e: &ServerError) -> Option<Transition> {
    if e.is_transient() {
        return None;
    }
    let (to, name) = (&p.record.spec.to, &p.record.spec.from.name);
    let leftover = e.message.contains("already exists on migration target storage")
        || e.message.contains("exists in database but not on storage");
    if leftover {
        let member = to.member.as_deref().unwrap_or("the target");
        let fix = format!(
            "on {member}: delete what is left of {name} in pool {}, then: incus admin sql global \"DELETE FROM storage_volumes WHERE name='{name}' AND node_id=(SELECT id FROM nodes WHERE name='{member}')\"",
            to.pool.as_deref().unwrap_or("default")
        );
        let message = format!("an earlier move left a volume of {name} on {member}: {}", e.message);
        return Some(p.undo(Reason::LeftoverVolume, message, Some(fix)));
    }
    Some(super::live::failed(p, e))
}

/// A daemon that died between the copy and the end of the deletion leaves both. Which one is whole cannot be seen.
fn twice(p: &mut Pass<'_>, one: &InstanceRef, other: &InstanceRef) -> Transition {
    let cli = p.view.source.product().cli();
    let server = &p.record.spec.from.server;
    let message =
        format!("{server} was interrupted while it moved the instance, which is there as {one} and as {other} now");
    let fix = format!(
        "look which of both is whole, delete the other one ({cli} delete --project PROJECT NAME), and give the one that stays its name ({cli} rename)"
    );
    p.note(Reason::NeedsAttention, message, Some(fix));
    p.finish(MoveOutcome::NeedsAttention)
}

/// Nowhere on the server, under no name: it may have been asked too early after its start.
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
