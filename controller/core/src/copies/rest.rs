//! Between refreshes: what is said of the copy, whether it is still what it was, and whether the next refresh is due.
//! Everything is decided from what is known anyway; no server is asked.

use std::time::Duration;

use berth_api::conditions;
use berth_api::copy::{CopyWork, DeletionPolicy};
use berth_api::moves::MoveEnd;
use berth_api::placement::InstanceRef as Meant;
use berth_api::{
    InstanceMoveSpec, InstancePlacementSpec, Method, MicroTime, Reason, Time, Transfer, TransferMode, present,
};
use jiff::Timestamp;

use super::due::{self, Due};
use super::pass::Pass;
use super::record::CopyRecord;
use super::source::{Sought, no_server};
use super::{Step, Transition, send, settle};
use crate::marks;
use crate::model::{Capability, Instance, Power, ServerFacts};
use crate::moves::Look;
use crate::plan::{self, Blocker, Desired, Located, Reach, ServerView};

/// When to look again at what waits for something without a time of its own.
const WAITING: Duration = Duration::from_secs(30);
/// When to look again at a server that is being contacted.
const SOON: Duration = Duration::from_secs(2);
/// When to look again at what only a person can mend.
const BLOCKED: Duration = Duration::from_secs(300);
/// When to look again at what may just not be there yet.
const YOUNG: Duration = Duration::from_millis(10_100);

pub(super) fn rest(p: &mut Pass<'_>) -> Transition {
    if p.record.deleting {
        return deletion(p);
    }
    p.record.status.source = source_words(p);
    decide(p)
}

fn decide(p: &mut Pass<'_>) -> Transition {
    requested(p);
    let server = p.record.spec.target.server.clone();
    let view = p.view;
    let Some(target) = view.world.servers.get(&server) else {
        let Sought::Missing(blocker) = no_server(&p.record, &server) else {
            return p.leave();
        };
        return blocked(p, &blocker);
    };
    if p.record.status.uuid.is_some() {
        match kept(p, target) {
            // what cannot be seen is taken for what it was until something is due
            Kept::There | Kept::Unknown => {}
            Kept::Used(message) => return used(p, message),
            Kept::Astray => return bring_back(p, target),
            Kept::Gone if p.record.spec.refresh.is_none() => {
                let message = format!("the copy is no longer on {server}, and it was to be made once");
                let fix = "set spec.refresh, or create another InstanceCopy".to_owned();
                return blocked(p, &Blocker::new(Reason::InstanceNotFound, message, Some(fix)));
            }
            Kept::Gone => {
                let status = &mut p.record.status;
                (status.uuid, status.last_used_at, status.snapshot) = (None, None, None);
                (status.last_refresh, status.next_refresh) = (None, None);
            }
        }
    }
    if p.record.spec.suspend {
        p.say(Reason::Suspended, &format!("suspended; {}", age(p)));
        return p.leave();
    }
    match due(p) {
        Err(t) => *t,
        Ok(()) => begin(p, target),
    }
}

/// A new `requestedAt`: what failed is tried again now, and a copy that is due later is refreshed now.
fn requested(p: &mut Pass<'_>) {
    let Some(requested) = p.record.requested_at.clone().filter(|r| !r.is_empty()) else {
        return;
    };
    let status = &mut p.record.status;
    if status.last_handled_reconcile_at.as_ref() == Some(&requested) {
        return;
    }
    status.last_handled_reconcile_at = Some(requested);
    status.retry_at = None;
    if let Some(error) = status.last_error.as_mut() {
        error.attempts = 0;
    }
    if p.record.spec.refresh.is_some() {
        status.next_refresh = Some(Time(p.now));
    }
}

fn source_words(p: &Pass<'_>) -> Option<String> {
    let known = || p.record.status.source.clone();
    match &p.view.sought {
        Sought::Found(located) => Some(format!("{}/{}", located.server, located.at())),
        Sought::Missing(_) | Sought::Later { .. } => known(),
    }
}

/// The age of the copy, as an absolute time.
fn age(p: &Pass<'_>) -> String {
    let last = p.record.status.last_refresh.as_ref().and_then(|r| r.started_at.clone());
    last.map_or_else(
        || "there is no copy yet".to_owned(),
        |at| format!("the copy is of {}", at.0.round(jiff::Unit::Second).unwrap_or(at.0)),
    )
}

enum Kept {
    There,
    Used(String),
    /// Under one of its unique names: a late request took it there.
    Astray,
    Gone,
    Unknown,
}

fn kept(p: &Pass<'_>, target: &ServerView) -> Kept {
    let uuid = p.record.status.uuid.as_deref().unwrap_or_default();
    let all = target.instances.as_ref();
    let name = p.record.status.name.as_deref();
    // what a cluster lists for a member that does not answer has no uuid
    let stub = |i: &std::sync::Arc<Instance>| !i.known && name == Some(i.at.name.as_str());
    let of_us = |i: &&std::sync::Arc<Instance>| name == Some(i.at.name.as_str()) || marks::is_unique_name(&i.at.name);
    let Some(copy) = all.and_then(|all| all.by_uuid(uuid).find(of_us)) else {
        let hidden = !target.is_listed() || all.is_none_or(|all| all.iter().any(stub));
        return if hidden { Kept::Unknown } else { Kept::Gone };
    };
    let server = &p.record.spec.target.server;
    let last = p.record.status.last_used_at.as_deref();
    if copy.power != Power::Stopped || last.is_some_and(|l| l != copy.last_used_at) || !marks::is_copy(copy) {
        return Kept::Used(format!(
            "{} on {server} was started, or taken over, since the last refresh",
            copy.at
        ));
    }
    if settle::is_held(copy) && target.is_listed() {
        return Kept::Astray;
    }
    Kept::There
}

fn used(p: &mut Pass<'_>, message: String) -> Transition {
    let fix = "keep it by deleting this InstanceCopy (the copy stays), or delete the copy to have a new one made";
    let last = age(p);
    p.say(
        Reason::CopyWasUsed,
        &format!("{message}; it is not overwritten any more ({last}); to mend it: {fix}"),
    );
    p.leave()
}

fn unreachable(p: &mut Pass<'_>, server: &str, view: &ServerView) -> Transition {
    let (reason, message) = match &view.reach {
        Reach::Down { message, .. } => (
            Reason::ServerUnreachable,
            format!("{server} cannot be asked: {message}; {}", age(p)),
        ),
        Reach::Ready | Reach::Connecting => (Reason::Progressing, format!("{server} has not been listed yet")),
    };
    later(p, reason, &message)
}

/// Waits for what may change by itself. That a process has just started and knows nothing yet takes back nothing of what
/// was said of this very spec.
fn later(p: &mut Pass<'_>, reason: Reason, message: &str) -> Transition {
    let said = conditions::is_said_of(&p.record.status.conditions, p.record.generation);
    if !said || reason != Reason::Progressing {
        p.say(reason, message);
    }
    p.wait(if reason == Reason::Progressing { SOON } else { WAITING })
}

fn blocked(p: &mut Pass<'_>, blocker: &Blocker) -> Transition {
    let fix = blocker
        .fix
        .as_ref()
        .map(|f| format!("; to mend it: {f}"))
        .unwrap_or_default();
    let last = match p.record.status.last_refresh {
        Some(_) => format!(" ({})", age(p)),
        None => String::new(),
    };
    let message = format!("{}{last}{fix}", blocker.message);
    // in a first sync what is missing may come a moment later
    let kind = conditions::kind_now(&p.record.status.conditions, blocker.reason, p.now);
    p.say_as(kind, blocker.reason, &message);
    p.wait(if kind == blocker.reason.kind() { BLOCKED } else { YOUNG })
}

/// Whether the copy is due now; if not, what is said until then.
fn due(p: &mut Pass<'_>) -> Result<(), Box<Transition>> {
    if let Some(at) = p.record.status.retry_at.clone().filter(|at| at.0 > p.now) {
        p.say_failed();
        return Err(Box::new(p.wait(until(at.0, p.now))));
    }
    let Some(last) = p.record.status.last_refresh.clone() else {
        return Ok(());
    };
    if p.record.status.retry_at.is_some() {
        return Ok(());
    }
    let started = last.started_at.map_or(p.now, |t| t.0);
    let next = match due::next(&p.record, started) {
        Ok(next) => next,
        Err(message) => {
            let fix = "correct spec.refresh.schedule: five fields, minute first, in UTC".to_owned();
            let blocker = Blocker::new(Reason::InvalidSpec, message, Some(fix));
            return Err(Box::new(blocked(p, &blocker)));
        }
    };
    let asked = p.record.status.next_refresh.as_ref().is_some_and(|at| at.0 <= p.now);
    let at = match next {
        Due::At(at) if at <= p.now || asked => return Ok(()),
        Due::At(at) => Some(at),
        Due::Never => None,
    };
    p.record.status.next_refresh = at.map(Time);
    let finished = last.finished_at.map_or(started, |t| t.0);
    let finished = finished.round(jiff::Unit::Second).unwrap_or(finished);
    let verb = if p.record.spec.refresh.is_some() {
        "refreshed"
    } else {
        "copied"
    };
    p.say(Reason::UpToDate, &format!("{verb} at {finished}"));
    Err(Box::new(match at {
        Some(at) => p.wait(until(at, p.now)),
        None => p.leave(),
    }))
}

fn until(at: Timestamp, now: Timestamp) -> Duration {
    let left = Duration::try_from(at.duration_since(now)).unwrap_or(Duration::ZERO);
    left.max(Duration::from_millis(100))
}

/// It is due: everything that stands against it is found out before anything is touched.
fn begin(p: &mut Pass<'_>, target: &ServerView) -> Transition {
    let located = match p.view.sought.clone() {
        Sought::Found(located) => located,
        Sought::Missing(blocker) => return blocked(p, &blocker),
        Sought::Later { reason, message } => {
            let message = format!("{message}; {}", age(p));
            return later(p, reason, &message);
        }
    };
    let server = p.record.spec.target.server.clone();
    if target.duplicate_of.is_some() || !target.is_listed() {
        return match &target.duplicate_of {
            Some(first) => {
                let message = format!("{server} names the same server as {first}");
                let fix = format!("create an InstanceCopy with spec.target.server: {first}");
                blocked(p, &Blocker::new(Reason::ServerNotFound, message, Some(fix)))
            }
            None => unreachable(p, &server, target),
        };
    }
    let plan = match plan_of(p, &located, target) {
        Ok(plan) => plan,
        Err(blocker) => return blocked(p, &blocker),
    };
    if !p.view.has_slots {
        let message = format!("waits for a slot on {} and {server}; {}", located.server, age(p));
        p.say(Reason::Pending, &message);
        return p.wait(WAITING);
    }
    start(p, &located, plan, target)
}

fn start(p: &mut Pass<'_>, located: &Located, plan: InstanceMoveSpec, target: &ServerView) -> Transition {
    let refresh = p.record.status.uuid.is_some();
    let guard = target
        .facts
        .as_deref()
        .map_or_else(Default::default, |f| send::guard(f, &plan.to.project));
    p.record.status.incoming = refresh.then(|| marks::unique_name(&p.view.random, &plan.to.name));
    p.record.status.target = Some(format!("{}/{}", plan.to.server, plan.to.name));
    p.record.status.current = Some(CopyWork {
        step: Step::Accepted.as_str().to_owned(),
        started_at: Some(MicroTime(p.now)),
        from: end_of(located),
        to: plan.to,
        transfer: plan.transfer,
        guard,
        dropped: plan.dropped,
        refresh,
        snapshot: Some(marks::temporary_snapshot(p.now, &p.view.random)),
        from_snapshot: false,
        sent: false,
        bytes: None,
    });
    p.record.status.retry_at = None;
    let verb = if refresh { "refreshed" } else { "copied" };
    let since = p.now.round(jiff::Unit::Second).unwrap_or(p.now);
    p.say(Reason::Copying, &format!("{verb} since {since}"));
    p.go_on()
}

/// The source as an end of a transfer.
pub(super) fn end_of(located: &Located) -> MoveEnd {
    MoveEnd {
        uuid: located.instance.uuid().map(str::to_owned),
        ..MoveEnd::new(&plan::location(located), &located.fingerprint)
    }
}

/// Where exactly the copy goes and how, as a move would: what both do alike is decided in one place.
fn plan_of(p: &Pass<'_>, located: &Located, target: &ServerView) -> Result<InstanceMoveSpec, Blocker> {
    let record = &p.record;
    let mut to = record.spec.target.clone();
    let name = record
        .status
        .name
        .as_deref()
        .unwrap_or_else(|| record.target_name(&located.at().name));
    to.name = Some(name.to_owned());
    to.project = Some(present(&to.project).unwrap_or("default").to_owned());
    let desired = Desired {
        namespace: record.namespace.clone(),
        name: record.name.clone(),
        uid: record.uid.clone(),
        generation: record.generation,
        created_at: Timestamp::UNIX_EPOCH,
        deleting: false,
        approve: None,
        requested_at: None,
        spec: InstancePlacementSpec {
            instance: Meant {
                name: Some(located.at().name.clone()),
                project: Some(located.at().project.clone()),
                ..Default::default()
            },
            target: to,
            methods: vec![Method::Cold],
            transfer: record.spec.transfer,
            snapshots: record.spec.snapshots,
            overrides: record.spec.overrides.clone(),
            ..Default::default()
        },
        status: Default::default(),
    };
    let facts = target.facts.as_deref();
    let Some((mut spec, blockers)) = facts.map(|f| plan::transfer_of(&desired, located, &p.view.world, f)) else {
        return Err(Blocker::new(Reason::Progressing, "the target was not listed yet", None));
    };
    if spec.transfer == Transfer::Backup && record.spec.transfer == TransferMode::Auto {
        // what worked for moves does not for copies
        spec.transfer = Transfer::Relay;
    }
    if let Some(blocker) = exclude_older(record, facts).or_else(|| not_a_way(&spec)) {
        return Err(blocker);
    }
    let refresh = record.status.uuid.is_some();
    // the copy is there already, and it need not be the same instance
    let counts = |b: &Blocker| match b.reason {
        Reason::NameTaken | Reason::TargetCordoned => !refresh,
        Reason::ProjectRestricted | Reason::CloudInitWouldRerun => false,
        _ => true,
    };
    if let Some(blocker) = blockers.into_iter().find(counts) {
        return Err(blocker);
    }
    if refresh {
        // a cluster may have moved it
        spec.to.member = None;
    }
    Ok(spec)
}

/// What is declared and cannot be done is refused rather than ignored.
fn exclude_older(record: &CopyRecord, facts: Option<&ServerFacts>) -> Option<Blocker> {
    let wished = record.spec.refresh.as_ref().is_some_and(|r| r.exclude_older);
    let can = facts.is_some_and(|f| f.can(Capability::ExcludeOlder));
    (wished && !can).then(|| {
        let message = format!("{} cannot leave out older snapshots", record.spec.target.server);
        let fix = "remove spec.refresh.excludeOlder".to_owned();
        Blocker::new(Reason::InvalidSpec, message, Some(fix))
    })
}

/// A backup cannot bring an existing copy up to date, and it carries the identity of its source.
fn not_a_way(plan: &InstanceMoveSpec) -> Option<Blocker> {
    (plan.transfer == Transfer::Backup).then(|| {
        let message = "a copy is not made by Backup, which could not be refreshed".to_owned();
        let fix = "set spec.transfer to Auto or Relay".to_owned();
        Blocker::new(Reason::MethodImpossible, message, Some(fix))
    })
}

/// A late request took the copy to another name, or left a guard on it.
fn bring_back(p: &mut Pass<'_>, target: &ServerView) -> Transition {
    let Some(to) = end_of_copy(p, target) else {
        return p.wait(WAITING);
    };
    let guard = target
        .facts
        .as_deref()
        .map_or_else(Default::default, |f| send::guard(f, &to.project));
    p.record.status.current = Some(CopyWork {
        step: Step::Transferred.as_str().to_owned(),
        started_at: Some(MicroTime(p.now)),
        to,
        guard,
        refresh: true,
        ..Default::default()
    });
    p.note(
        Reason::RefreshFailed,
        "the copy was found under a name or a guard of Berth's",
        None,
    );
    p.say(Reason::Copying, "the copy gets its name back");
    p.go_on()
}

fn end_of_copy(p: &Pass<'_>, target: &ServerView) -> Option<MoveEnd> {
    let uuid = p.record.status.uuid.as_deref()?;
    let copy = target.instances.as_ref()?.by_uuid(uuid).next()?;
    Some(MoveEnd {
        server: p.record.spec.target.server.clone(),
        fingerprint: target.fingerprint()?.to_owned(),
        project: copy.at.project.clone(),
        pool: copy.root_pool().map(str::to_owned),
        name: p.record.status.name.clone()?,
        ..MoveEnd::default()
    })
}

/// The object was deleted. With `Delete` the copy goes first, if it still is what Berth made and nobody has used it.
fn deletion(p: &mut Pass<'_>) -> Transition {
    let gone = |p: &Pass<'_>| {
        let mut t = p.leave();
        (t.hold, t.look) = (false, Look::Done);
        t
    };
    if p.record.spec.deletion_policy == DeletionPolicy::Orphan || p.record.status.uuid.is_none() {
        return gone(p);
    }
    let server = p.record.spec.target.server.clone();
    let view = p.view;
    let Some(target) = view.world.servers.get(&server) else {
        return gone(p);
    };
    match kept(p, target) {
        Kept::Unknown => {
            let mut t = unreachable(p, &server, target);
            t.hold = true;
            return t;
        }
        Kept::Used(_) | Kept::Gone => return gone(p),
        Kept::There | Kept::Astray => {}
    }
    let Some(to) = end_of_copy(p, target) else {
        return gone(p);
    };
    p.record.status.incoming = Some(marks::unique_name(&p.view.random, &to.name));
    let from = match &p.view.sought {
        Sought::Found(located) => end_of(located),
        Sought::Missing(_) | Sought::Later { .. } => MoveEnd::default(),
    };
    p.record.status.current = Some(CopyWork {
        step: Step::Removing.as_str().to_owned(),
        started_at: Some(MicroTime(p.now)),
        from,
        to,
        refresh: true,
        ..Default::default()
    });
    p.say(Reason::Copying, "the copy is deleted, as spec.deletionPolicy says");
    p.go_on()
}
