//! Accepted → Held → Snapshotted → Transferred: an existing copy is taken out of everybody's reach, the source gets the
//! snapshot that makes the transfer small or spares it a freeze, and the data are sent.

use std::time::Duration;

use berth_api::{GuardKind, Reason, Snapshots};
use jiff::{SignedDuration, Timestamp};

use super::pass::Pass;
use super::{Step, Transition, body};
use crate::marks;
use crate::model::{Capability, InstanceRef, Power, ServerFacts};
use crate::moves::{Copy, EffectKind, End, EndView, Request, Transfer, Wiring};
use crate::server::{AcceptRequest, FailureKind, OfferRequest, ServerError};

/// How often an operation of a controller before this one is looked at.
const POLL: Duration = Duration::from_secs(1);
/// A snapshot of Berth's that nobody deletes (its InstanceCopy is gone) ends by itself after this, or three intervals.
const SNAPSHOT_LIFE: SignedDuration = SignedDuration::from_hours(24 * 30);

/// Accepted, an existing copy: guard first, so that "nobody has started it" stays true; then the unique name.
pub(super) fn hold(p: &mut Pass<'_>) -> Transition {
    if let Some(t) = p.wait_for(End::Target) {
        return t;
    }
    let Some(copy) = p.copy() else {
        return p.fail(Reason::RefreshFailed, "the copy is gone", None);
    };
    let i = &copy.fresh.instance;
    if p.was_used(copy) {
        return used(p, copy);
    }
    if let Some((reason, message)) = p.unwanted() {
        return put_down(p, reason, message);
    }
    let work = p.work().clone();
    if marks::role(i).is_none() || !marks::guarded(i, work.guard) {
        if let Some(t) = p.retry_after(EffectKind::Guard) {
            return t;
        }
        let change = body::held(&p.record, &work, i.kind);
        let etag = copy.fresh.etag.clone();
        return p.ask(EffectKind::Guard, End::Target, &i.at, Request::Patch { change, etag });
    }
    let Some(name) = p.record.status.incoming.clone() else {
        return p.leave();
    };
    if i.at.name != name {
        if let Some(t) = p.retry_after(EffectKind::Hide) {
            return t;
        }
        return p.ask(EffectKind::Hide, End::Target, &i.at, Request::Rename { name });
    }
    p.advance(Step::Held);
    p.go_on()
}

/// Somebody failed over to the copy: it is theirs from now on.
pub(super) fn used(p: &mut Pass<'_>, copy: &Copy) -> Transition {
    let i = &copy.fresh.instance;
    let server = p.work().to.server.clone();
    // what guards it is taken off by `named`, unless it runs
    if i.power == Power::Stopped && (marks::role(i).is_some() || marks::is_unique_name(&i.at.name)) {
        p.note(Reason::CopyWasUsed, format!("{} on {server} was started", i.at), None);
        p.advance(Step::Transferred);
        p.work().sent = false;
        return p.go_on();
    }
    p.record.status.current = None;
    p.record.status.incoming = None;
    p.go_on()
}

/// Nothing was sent: the copy goes back to what it was.
fn put_down(p: &mut Pass<'_>, reason: Reason, message: String) -> Transition {
    p.note(reason, message, None);
    p.advance(Step::Transferred);
    p.go_on()
}

/// Held, or Accepted for a first copy: the snapshot of the source.
pub(super) fn snapshot(p: &mut Pass<'_>) -> Transition {
    if let Some((reason, message)) = p.unwanted() {
        return stop(p, reason, message);
    }
    if let Some(t) = p.wait_for(End::Source).or_else(|| p.wait_for(End::Target)) {
        return t;
    }
    let (Some(source), Some((from, to))) = (p.source(), facts(p)) else {
        return stop(p, Reason::SourceNotFound, "the source is gone".to_owned());
    };
    if !p.work().refresh
        && let Some(t) = name_taken(p)
    {
        return t;
    }
    let Some(name) = p.work().snapshot.clone() else {
        p.advance(Step::Snapshotted);
        return p.go_on();
    };
    let there = source.snapshots.iter().flatten().any(|s| s.name == name);
    let wanted = wanted(p, source, from, to);
    if there || wanted == Wanted::Nothing {
        p.work().snapshot = (wanted != Wanted::Nothing).then_some(name);
        p.work().from_snapshot = wanted == Wanted::Still;
        p.advance(Step::Snapshotted);
        return p.go_on();
    }
    if let Some(error) = p.failed(EffectKind::Snapshot) {
        if error.is_transient() {
            return p.retry_after(EffectKind::Snapshot).unwrap_or_else(|| p.retry());
        }
        // a project that forbids them, a pool that has no room: it goes without, and takes longer
        p.work().snapshot = None;
        p.advance(Step::Snapshotted);
        return p.go_on();
    }
    let expires_at = expiry(p);
    let at = &source.fresh.instance.at;
    p.ask(
        EffectKind::Snapshot,
        End::Source,
        at,
        Request::Snapshot { name, expires_at },
    )
}

fn expiry(p: &Pass<'_>) -> Option<Timestamp> {
    let refresh = p.record.spec.refresh.as_ref();
    let interval = refresh.and_then(|r| r.interval).map(|i| i.as_millis());
    let life = SignedDuration::from_millis(interval.unwrap_or(0).saturating_mul(3)).max(SNAPSHOT_LIFE);
    let at = p.now.checked_add(life).ok()?;
    Some(at.round(jiff::Unit::Second).unwrap_or(at))
}

/// What a snapshot of the source would be good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// It travels, and the next refresh sends only what changed since (lab facts 10).
    Chain,
    /// The copy is made from it: without copy-on-write a source that runs is frozen while it is read (lab facts 10).
    Still,
    /// Nothing.
    Nothing,
}

fn wanted(p: &mut Pass<'_>, source: &Copy, from: &ServerFacts, to: &ServerFacts) -> Wanted {
    let i = &source.fresh.instance;
    let driver = |facts: &ServerFacts, pool: Option<&str>| {
        let pool = pool.and_then(|p| facts.pool(p));
        pool.map(|p| (p.driver.clone(), p.copy_on_write()))
    };
    let (here, there) = (
        driver(from, i.root_pool()),
        driver(to, p.work().to.pool.clone().as_deref()),
    );
    let copy_on_write = here.as_ref().is_some_and(|(_, cow)| *cow);
    let includes = p.record.spec.snapshots == Snapshots::Include;
    if copy_on_write && here == there && includes && p.record.spec.refresh.is_some() {
        return Wanted::Chain;
    }
    let none_travel = !includes || source.snapshots.as_ref().is_none_or(Vec::is_empty) || {
        let own = p.work().snapshot.clone();
        source.snapshots.iter().flatten().all(|s| Some(&s.name) == own.as_ref())
    };
    if !copy_on_write && i.power != Power::Stopped && none_travel && !p.work().refresh {
        return Wanted::Still;
    }
    Wanted::Nothing
}

fn facts<'a>(p: &Pass<'a>) -> Option<(&'a ServerFacts, &'a ServerFacts)> {
    match (&p.view.source, &p.view.target) {
        (EndView::Reachable { facts: from, .. }, EndView::Reachable { facts: to, .. }) => Some((from, to)),
        _ => None,
    }
}

/// Somebody else has the name that a first copy is to have.
fn name_taken(p: &mut Pass<'_>) -> Option<Transition> {
    let to = p.work().to.clone();
    let real = InstanceRef::new(&to.project, &to.name);
    let other = p.view.target.copy(&real)?;
    let mine = p
        .record
        .status
        .uuid
        .as_deref()
        .is_some_and(|u| other.fresh.instance.uuid() == Some(u));
    if mine {
        return None;
    }
    let message = format!("{} has another instance {real}", to.server);
    let fix = "rename or delete it, or create another InstanceCopy with another spec.target.name".to_owned();
    Some(stop(p, Reason::NameTaken, message).with_fix(p, fix))
}

impl Transition {
    fn with_fix(mut self, p: &Pass<'_>, fix: String) -> Self {
        self.record = p.record.clone();
        if let Some(error) = self.record.status.last_error.as_mut() {
            error.fix = Some(fix);
        }
        self
    }
}

/// Gives the attempt up before it is complete.
pub(super) fn stop(p: &mut Pass<'_>, reason: Reason, message: String) -> Transition {
    if p.work().refresh && !p.work().sent {
        return put_down(p, reason, message);
    }
    if p.work().refresh {
        return halted(p, reason, message);
    }
    p.note(reason, message, None);
    p.advance(Step::Undoing);
    p.go_on()
}

/// A refresh that has begun to change the copy is only ever completed: until then it stays out of reach.
fn halted(p: &mut Pass<'_>, reason: Reason, message: String) -> Transition {
    let sentence = format!("{message}{}", p.held_words());
    p.say(reason, &sentence);
    p.retry()
}

/// Snapshotted: both ends, and what came of it.
pub(super) fn transfer(p: &mut Pass<'_>) -> Transition {
    if p.succeeded(EffectKind::Transfer) {
        let bytes = p.view.progress.map(|progress| progress.bytes).filter(|b| *b > 0);
        let work = p.work();
        work.bytes = bytes.or(work.bytes);
        p.advance(Step::Transferred);
        return p.go_on();
    }
    if let Some(error) = p.failed(EffectKind::Transfer) {
        return transfer_failed(p, error);
    }
    if let Some(t) = p.wait_for(End::Target) {
        return t;
    }
    if p.work().sent
        && let Some(t) = clear_lost(p)
    {
        return t;
    }
    if let Some((reason, message)) = p.unwanted() {
        let elsewhere = matches!(p.view.sought, super::Sought::Found(_));
        if p.has_begun() && elsewhere {
            return follow(p);
        }
        return stop(p, reason, message);
    }
    let again = p.record.status.retry_at.clone().filter(|t| t.0 > p.now);
    if let Some(at) = again.filter(|_| p.work().sent) {
        let left = at.0.duration_since(p.now);
        return p.wait(Duration::try_from(left).unwrap_or(POLL));
    }
    if let Some(t) = p.wait_for(End::Source) {
        return t;
    }
    let (Some(source), Some((_, to))) = (p.source(), facts(p)) else {
        return stop(p, Reason::SourceNotFound, "the source is gone".to_owned());
    };
    if p.work().refresh {
        let Some(copy) = p.copy() else {
            return p.fail(Reason::RefreshFailed, "the copy is gone", None);
        };
        if p.was_used(copy) {
            return used(p, copy);
        }
    }
    send(p, source, to)
}

/// The source of a refresh that was interrupted has moved: the rest comes from where it is now.
fn follow(p: &mut Pass<'_>) -> Transition {
    let super::Sought::Found(located) = &p.view.sought else {
        return p.retry();
    };
    let from = super::rest::end_of(located);
    p.work().from = from;
    p.advance(Step::Held);
    p.go_on()
}

/// A transfer was begun, and nobody knows how it ended. A first copy is deleted, never touched; a refresh is made again.
/// Nothing is done as long as an operation works on the copy: that of a refresh comes to its end, since what arrives need
/// not be sent again, and one that is cancelled at its very end leaves a volume behind.
fn clear_lost(p: &mut Pass<'_>) -> Option<Transition> {
    let (project, name) = (p.work().to.project.clone(), p.record.status.incoming.clone()?);
    let at = InstanceRef::new(project, name);
    let refresh = p.work().refresh;
    if p.view.target.operation_on(&at).is_some() {
        let cancel = if refresh { None } else { cancel_lost(p) };
        return Some(cancel.unwrap_or_else(|| p.wait(POLL)));
    }
    if refresh {
        return None;
    }
    p.view.target.copy(&at)?;
    if p.failed(EffectKind::Remove).is_some() {
        p.note(Reason::Progressing, "the outcome of the transfer was lost", None);
        p.advance(Step::Undoing);
        return Some(p.go_on());
    }
    Some(p.ask(EffectKind::Remove, End::Target, &at, Request::Remove))
}

/// The source's end of a transfer that a controller before this one began. Only one copy of a source is made at a time,
/// and this one is still arriving.
pub(super) fn cancel_lost(p: &mut Pass<'_>) -> Option<Transition> {
    let from = p.work().from.clone();
    let at = InstanceRef::new(from.project, from.name);
    let operation = p.view.source.operation_on(&at)?;
    let tried = p.view.outcome.as_ref().is_some_and(|o| o.effect == EffectKind::Cancel);
    if tried || !operation.description.starts_with("Migrating") {
        return None;
    }
    let id = operation.id.clone();
    Some(p.ask(EffectKind::Cancel, End::Source, &at, Request::CancelOperation(id)))
}

fn send(p: &mut Pass<'_>, source: &Copy, to: &ServerFacts) -> Transition {
    if !p.work().refresh || p.record.status.incoming.is_none() {
        let name = marks::unique_name(&p.view.random, &p.work().to.name.clone());
        p.record.status.incoming = Some(name);
    }
    p.work().sent = true;
    let (work, name) = (p.work().clone(), p.record.status.incoming.clone().unwrap_or_default());
    let at = InstanceRef::new(&work.to.project, name);
    let excludes = p.record.spec.snapshots == Snapshots::Exclude;
    let older = p.record.spec.refresh.as_ref().is_some_and(|r| r.exclude_older);
    let request = Transfer {
        mode: match work.transfer {
            berth_api::Transfer::Push => Wiring::Push,
            berth_api::Transfer::Relay => Wiring::Relay,
            // a backup was refused; a copy on the same server is pulled from itself
            berth_api::Transfer::Pull | berth_api::Transfer::Internal | berth_api::Transfer::Backup => Wiring::Pull,
        },
        from: source.fresh.instance.at.clone(),
        // nobody asks how long it stands still for a copy
        running: false,
        offer: OfferRequest {
            live: false,
            instance_only: excludes,
            snapshot: work.snapshot.clone().filter(|_| work.from_snapshot),
            push_to: None,
        },
        accept: AcceptRequest {
            at: at.clone(),
            kind: source.fresh.instance.kind,
            definition: body::arriving(&p.record, &work, &source.fresh.instance, to),
            member: if work.refresh { None } else { work.to.member.clone() },
            live: false,
            instance_only: excludes || work.from_snapshot,
            refresh: work.refresh,
            exclude_older: work.refresh && older && to.can(Capability::ExcludeOlder),
            pull_from: None,
        },
    };
    p.record.status.retry_at = None;
    let started = work.started_at.as_ref().map_or(p.now, |t| t.0);
    let started = started.round(jiff::Unit::Second).unwrap_or(started);
    let message = format!("{} since {started}", if work.refresh { "refreshed" } else { "copied" });
    p.say(Reason::Copying, &message);
    p.ask(
        EffectKind::Transfer,
        End::Target,
        &at,
        Request::Transfer(Box::new(request)),
    )
}

fn transfer_failed(p: &mut Pass<'_>, e: &ServerError) -> Transition {
    let reason = match e.kind {
        FailureKind::AlreadyExists => Reason::NameTaken,
        FailureKind::Unreachable | FailureKind::Unknown => Reason::ServerUnreachable,
        _ => Reason::RefreshFailed,
    };
    let message = format!("{e}{}", p.held_words());
    if !p.work().refresh {
        p.note(reason, message, None);
        p.advance(Step::Undoing);
        return p.go_on();
    }
    p.note_failure(reason, e, message);
    p.later();
    p.go_on()
}

/// Which guard a server allows in a project.
pub(super) fn guard(facts: &ServerFacts, project: &str) -> GuardKind {
    let restricted = facts.project(project).is_some_and(crate::model::Project::restricted);
    match (restricted, facts.can(Capability::ProtectionStart)) {
        (false, _) => GuardKind::Device,
        (true, true) => GuardKind::ProtectionKey,
        (true, false) => GuardKind::Name,
    }
}
