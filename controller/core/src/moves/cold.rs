//! Accepted → Marked → Stopped → Transferred between two servers: the source is marked, stopped, guarded, and sent
//! under a name that only this intent uses. Everything here can still be undone.

use std::time::Duration;

use berth_api::moves::Progress;
use berth_api::{GuardKind, InstanceMoveSpec, Method, MicroTime, Reason, Step, Transfer as Mode};

use super::body::incoming_definition;
use super::effect::{EffectKind, End, Request, Transfer, Wiring};
use super::pass::{Pass, Transition};
use super::view::{Copy, EndView, Wish, source_places};
use super::{backup, criu, kept, verify};
use crate::marks::{self, Role};
use crate::model::{Change, Definition, Instance, InstanceRef, Power};
use crate::records::Record;
use crate::server::{AcceptRequest, FailureKind, OfferRequest, ServerError};

/// A target that does not answer for that long while the instance is stopped is given up.
const TARGET_PATIENCE: Duration = Duration::from_secs(10);
/// How often an operation of somebody else on our copy is looked at.
const POLL: Duration = Duration::from_secs(1);
/// A source that is stopped and still locked for that long is given up.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn accepted(p: &mut Pass<'_>) -> Transition {
    let view = p.view;
    if let Some(t) = p.wait_for_end(&view.source) {
        return t;
    }
    let Some(source) = p.source() else {
        return source_vanished(p);
    };
    let instance = &source.fresh.instance;
    if marks::move_id(instance).is_some_and(|id| view.open_moves.iter().any(|o| o == id)) {
        p.note(
            Reason::Pending,
            format!("{} is part of another move", instance.at),
            None,
        );
        return p.finish(berth_api::Outcome::Undone);
    }
    if let Some(t) = p.undo_if_wished() {
        return t;
    }
    // also where the marks are there already: they are sent while this is written
    if p.record.status.ran_before.is_none() {
        p.record.status.ran_before = Some(instance.may_run());
        p.record.status.frozen_before = (instance.power == Power::Frozen).then_some(true);
        p.record.status.started_at.get_or_insert(MicroTime(p.now));
        p.keep(marks::EPHEMERAL, Some(&instance.ephemeral.to_string()));
        for key in [
            marks::AUTOSTART,
            marks::PROTECTION_DELETE,
            marks::PROTECTION_START,
            marks::CLOUD_INIT_ID,
        ] {
            p.keep(key, instance.config.get(key));
        }
        p.advance(Step::Accepted);
    }
    if p.carries_mark(instance) && !instance.ephemeral {
        p.advance(Step::Marked);
        return match (super::is_internal(&p.record), super::is_warm(&p.record)) {
            (true, _) => super::internal::marked(p),
            // the target was not read yet
            (false, true) => p.go_on(),
            (false, false) if kept::makes_room(&p.record) => p.go_on(),
            (false, false) => marked(p),
        };
    }
    if let Some(t) = retry_or_undo(p, EffectKind::Mark) {
        return t;
    }
    let mut change = Change {
        config: marks::marks(&p.record.name, Role::Source, p.record.spec.attempt),
        devices: Default::default(),
        ephemeral: instance.ephemeral.then_some(false),
    };
    criu::set_rounds(p, &instance.config, &mut change);
    let etag = source.fresh.etag.clone();
    // what is changed besides can only be put back from the record
    let only_marks = change.ephemeral.is_none() && change.config.keys().all(|k| marks::KEYS.contains(&k.as_str()));
    let ask = if only_marks { Pass::ask_beside } else { Pass::ask };
    ask(
        p,
        EffectKind::Mark,
        End::Source,
        &instance.at,
        Request::Patch { change, etag },
    )
}

/// The source of a move that is to go on, still marked, or what is done instead.
pub(super) fn marked_source<'a>(p: &mut Pass<'a>) -> Result<&'a Copy, Box<Transition>> {
    let view = p.view;
    if let Some(t) = p.wait_for_end(&view.source) {
        return Err(Box::new(t));
    }
    let Some(source) = p.source() else {
        return Err(Box::new(source_vanished(p)));
    };
    if let Some(t) = p.undo_if_wished() {
        return Err(Box::new(t));
    }
    let instance = &source.fresh.instance;
    if p.carries_mark(instance) {
        return Ok(source);
    }
    let message = format!("somebody took Berth's marks off {}", instance.at);
    Err(Box::new(p.undo(Reason::ForeignOperation, message, None)))
}

pub(super) fn marked(p: &mut Pass<'_>) -> Transition {
    let source = match marked_source(p) {
        Ok(source) => source,
        Err(t) => return *t,
    };
    let instance = &source.fresh.instance;
    if super::live::between_servers(&p.record) {
        return super::live::begin(p, source);
    }
    match instance.power {
        Power::Stopped => guard_source(p, source),
        Power::Error => p.wait(POLL),
        Power::Running | Power::Frozen | Power::Starting | Power::Stopping => stop_source(p, source),
    }
}

/// Asks the guest to stop; by force only where that is allowed.
pub(super) fn stop_source(p: &mut Pass<'_>, source: &Copy) -> Transition {
    let at = &source.fresh.instance.at;
    let Wish::Continue(rules) = &p.view.wish else {
        return p.undo(Reason::MoveFailed, "", None);
    };
    if let Some(t) = stop_lingers(p, source) {
        return t;
    }
    if p.record.status.stopped_at.is_some() {
        return p.undo(
            Reason::ForeignOperation,
            format!("somebody started {at} after it had been stopped for the move"),
            None,
        );
    }
    let stays_down = p.record.spec.power_after == berth_api::Power::Stopped;
    if p.record.status.stop_requested_at.is_none() && rules.preserves_power && stays_down {
        // as Incus does after `cluster restore`, some time after it says that the member is back: what runs is to run on
        let message = format!("{at} was started after this move had been planned");
        return p.undo(Reason::ForeignOperation, message, None);
    }
    let early = p.view.outcome.as_ref().is_some_and(|o| o.ended_early(rules.timeout));
    let request = match p.failed(EffectKind::Stop) {
        Some(e) if e.kind == FailureKind::Unreachable => return p.wait(POLL),
        // neither no answer nor a server that gives up at once is a guest that does not stop
        Some(e) if (e.kind == FailureKind::Unknown || early) && p.attempts() < 5 => {
            p.note(Reason::MoveFailed, e.to_string(), None);
            return p.wait(POLL);
        }
        Some(_) if rules.force => Request::ForceStop,
        Some(e) => {
            let message = match early {
                true => format!("{at} cannot be stopped: {}", e.message),
                false => format!("{at} did not stop within {} s: {}", rules.timeout.as_secs(), e.message),
            };
            return p.undo(
                Reason::StopPending,
                message,
                Some("set spec.stop.force: true, or a longer spec.stop.timeout".into()),
            );
        }
        None => Request::Stop { timeout: rules.timeout },
    };
    if p.record.status.stop_requested_at.is_none() {
        p.record.status.stop_requested_at = Some(MicroTime(p.now));
    }
    p.ask(EffectKind::Stop, End::Source, at, request)
}

/// From here on nobody can start the source: guard and `boot.autostart=false` in one conditional request.
pub(super) fn guard_source(p: &mut Pass<'_>, source: &Copy) -> Transition {
    let instance = &source.fresh.instance;
    if let Some(t) = stop_lingers(p, source) {
        return t;
    }
    let all_read = p.record.status.stopped_at.is_some();
    if !all_read {
        p.record.status.stopped_at = Some(MicroTime(p.now));
    }
    p.record.status.last_used_at = Some(instance.last_used_at.clone());
    let guard = p.record.spec.guard.source;
    let asleep = instance.config.get(marks::AUTOSTART).is_some_and(|v| v == "false");
    if !marks::guarded(instance, guard) || !asleep {
        if let Some(t) = retry_or_undo(p, EffectKind::Guard) {
            return t;
        }
        let mut change = Change::default();
        change.config.insert(marks::AUTOSTART.to_owned(), "false".to_owned());
        marks::add_guard(&mut change, guard, instance.kind, &p.record.name);
        let etag = source.fresh.etag.clone();
        return p.ask_beside(
            EffectKind::Guard,
            End::Source,
            &instance.at,
            Request::Patch { change, etag },
        );
    }
    if guard == GuardKind::Name && instance.at.name == p.record.spec.from.name {
        if let Some(t) = retry_or_undo(p, EffectKind::Hide) {
            return t;
        }
        let name = p.retired_name(&instance.at.name);
        return p.ask(EffectKind::Hide, End::Source, &instance.at, Request::Rename { name });
    }
    p.advance(Step::Stopped);
    match all_read {
        true => super::stopped(p),
        false => p.go_on(),
    }
}

pub(super) fn stopped(p: &mut Pass<'_>) -> Transition {
    let view = p.view;
    if let Some(t) = p.undo_if_wished() {
        return t;
    }
    if let Some(t) = p.wait_for_end(&view.source) {
        return t;
    }
    let Some(source) = p.source() else {
        return source_vanished(p);
    };
    if let Some(t) = undo_if_disturbed(p, source) {
        return t;
    }
    let EndView::Reachable { facts, .. } = &view.target else {
        return target_silent(p);
    };
    if let Some(t) = kept::adopt(p) {
        return t;
    }
    if p.succeeded(EffectKind::Transfer) {
        p.record.status.transferred = p.incoming().map(str::to_owned);
        p.sent_all();
        p.advance(Step::Transferred);
        return verify::transferred(p);
    }
    if let Some(t) = still_locked(p).or_else(|| p.pause(POLL)) {
        return t;
    }
    if let Some(e) = p.failed(EffectKind::Transfer) {
        return transfer_failed(p, e);
    }
    if let Some(name) = p.incoming().map(str::to_owned) {
        let at = InstanceRef::new(&p.record.spec.to.project, &name);
        if let Some(t) = clear_lost_transfer(p, &at) {
            return t;
        }
    }
    if p.record.spec.transfer == Mode::Backup {
        return backup::transfer(p, source);
    }
    let definition = incoming_definition(&p.record.spec, &p.record.name, &source.fresh.instance, facts);
    transfer(p, source, definition, Sending::whole(&p.record.spec))
}

/// What a transfer sends.
pub(super) struct Sending {
    /// No snapshots.
    pub instance_only: bool,
    /// The disk as it was in that snapshot.
    pub snapshot: Option<String>,
    /// Onto the copy that there is.
    pub refresh: bool,
}

impl Sending {
    /// Everything that travels, onto a new copy.
    pub fn whole(spec: &InstanceMoveSpec) -> Self {
        Self {
            instance_only: spec.snapshots == berth_api::Snapshots::Exclude,
            snapshot: None,
            refresh: false,
        }
    }
}

/// The outcome of a transfer was lost: whether the copy is complete cannot be seen, so it is deleted, never touched.
pub(super) fn clear_lost_transfer(p: &mut Pass<'_>, at: &InstanceRef) -> Option<Transition> {
    let view = p.view;
    if let Some(t) = cancel_lost_operation(p) {
        return Some(t);
    }
    if view.target.operation_on(at).is_some() {
        return Some(p.wait(POLL));
    }
    if let Some(t) = backup::drop(p) {
        return Some(t);
    }
    view.target.copy(at)?;
    if p.failed(EffectKind::Remove).is_some() {
        let message = format!(
            "the half-made copy {at} on {} cannot be deleted",
            p.record.spec.to.server
        );
        return Some(p.undo(Reason::LeftoverVolume, message, Some(leftover_fix(p, at))));
    }
    // a record of its own, so that a commit which another controller had ready comes too late
    let message = format!("the outcome of the transfer to {at} was lost, so it is made again");
    p.note(Reason::Progressing, message, None);
    Some(p.ask(EffectKind::Remove, End::Target, at, Request::Remove))
}

/// An operation on the source that a controller before this one began: its outcome cannot be learnt any more.
pub(super) fn cancel_lost_operation(p: &Pass<'_>) -> Option<Transition> {
    let (at, id) = source_places(&p.record)
        .into_iter()
        .find_map(|at| p.view.source.migration_of(&at).map(|o| o.id.clone()).map(|id| (at, id)))?;
    if p.view.outcome.as_ref().is_some_and(|o| o.effect == EffectKind::Cancel) {
        return Some(p.wait(POLL));
    }
    Some(p.ask(EffectKind::Cancel, End::Source, &at, Request::CancelOperation(id)))
}

/// The command that removes what a half-made copy left.
pub(super) fn leftover_fix(p: &Pass<'_>, at: &InstanceRef) -> String {
    let error = p.failed(EffectKind::Remove).map_or("", |e| e.message.as_str());
    crate::leftover::removal(&p.record.spec.to.server, &p.view.target, at, error)
}

/// Asks for a transfer. A new copy gets a name that was never used before, recorded first.
pub(super) fn transfer(p: &mut Pass<'_>, source: &Copy, definition: Definition, what: Sending) -> Transition {
    let current = p.incoming().filter(|_| what.refresh).map(str::to_owned);
    if current.is_none() && p.record.spec.onto.is_some() {
        p.record.status.adopted = Some(false);
    }
    let name = current.unwrap_or_else(|| marks::unique_name(&p.view.random, &p.record.spec.to.name));
    p.set_incoming(&name);
    p.record.status.transferred = None;
    let total = p.record.spec.estimate.and_then(|e| e.bytes);
    p.record.status.progress = Some(Progress {
        total_bytes: total.filter(|_| !what.refresh),
        ..Default::default()
    });
    send(p, source, &name, definition, what, false)
}

/// Asks for the transfer to the copy of that name; with `live` the running state goes along.
pub(super) fn send(
    p: &Pass<'_>,
    source: &Copy,
    name: &str,
    definition: Definition,
    what: Sending,
    live: bool,
) -> Transition {
    let instance = &source.fresh.instance;
    let to = &p.record.spec.to;
    let at = InstanceRef::new(&to.project, name);
    let request = Transfer {
        mode: wiring(&p.record),
        from: instance.at.clone(),
        // that the guest pauses at the end is what a live move is
        running: !live && instance.may_run(),
        offer: OfferRequest {
            live,
            instance_only: what.instance_only,
            snapshot: what.snapshot,
            push_to: None,
        },
        accept: AcceptRequest {
            at: at.clone(),
            kind: instance.kind,
            definition,
            member: to.member.clone(),
            live,
            instance_only: what.instance_only,
            refresh: what.refresh,
            exclude_older: false,
            pull_from: None,
        },
    };
    p.ask(
        EffectKind::Transfer,
        End::Target,
        &at,
        Request::Transfer(Box::new(request)),
    )
}

/// Who connects to whom.
fn wiring(record: &Record) -> Wiring {
    match record.spec.transfer {
        Mode::Push => Wiring::Push,
        Mode::Relay => Wiring::Relay,
        Mode::Pull | Mode::Backup | Mode::Internal => Wiring::Pull,
    }
}

/// Whether a server's message has any of these words, in capitals or not.
pub(super) fn says(message: &str, words: &[&str]) -> bool {
    let message = message.to_ascii_lowercase();
    words.iter().any(|w| message.contains(w))
}

/// The words of the kernel for a full file system and a full quota, which rsync and btrfs repeat.
fn is_full(message: &str) -> bool {
    says(message, &["no space left on device", "disk quota exceeded"])
}

/// Both products' words for a connection that broke.
pub(super) fn is_link(message: &str) -> bool {
    const WORDS: [&str; 7] = [
        "websocket",
        "eof",
        "connect",
        "timed out",
        "timeout",
        "broken pipe",
        "shutting down",
    ];
    says(message, &WORDS)
}

/// A daemon shows a guest as stopped before it lets go of it: what is asked for meanwhile fails before anything is sent,
/// says nothing against the way it was to be sent, and is asked for again.
fn still_locked(p: &mut Pass<'_>) -> Option<Transition> {
    let e = p.failed(EffectKind::Transfer)?;
    if e.kind != FailureKind::Busy || p.in_step() >= LOCK_PATIENCE {
        return None;
    }
    p.note(Reason::Progressing, e.to_string(), None);
    Some(p.wait(POLL))
}

pub(super) fn transfer_failed(p: &mut Pass<'_>, e: &ServerError) -> Transition {
    if e.kind == FailureKind::ScratchFull {
        let fix = "give the controller more room (--scratch-dir, --scratch-limit; in the chart scratch.size), or set another spec.transfer";
        return p.undo(Reason::InsufficientSpace, e.to_string(), Some(fix.to_owned()));
    }
    if is_full(&e.message) {
        let (from, to) = (&p.record.spec.from, &p.record.spec.to);
        let pool = to.pool.as_deref().unwrap_or("default");
        let message = format!("pool {pool} of {} has too little space for {}", to.server, from.name);
        let fix = format!(
            "free or add space in pool {pool} of {}, or set another spec.target.pool",
            to.server
        );
        return p.undo(Reason::InsufficientSpace, message, Some(fix));
    }
    p.record.status.refused_key = crate::travel::refused_key(&e.message).map(str::to_owned);
    // neither end says more than that the other one was gone
    let broke = p.record.spec.method == Method::Cold && e.message.split("; ").all(is_link);
    let reason = match e.kind {
        FailureKind::Refused if broke => Reason::ServerUnreachable,
        FailureKind::AlreadyExists => Reason::NameTaken,
        FailureKind::Unreachable | FailureKind::Unknown => Reason::ServerUnreachable,
        FailureKind::PeerUnreachable => return peer_unreachable(p, e),
        FailureKind::NotFound
        | FailureKind::Refused
        | FailureKind::Running
        | FailureKind::Changed
        | FailureKind::Busy
        | FailureKind::NotTrusted
        | FailureKind::CertificateMismatch
        | FailureKind::ScratchFull
        | FailureKind::Protocol => Reason::TargetRefused,
    };
    p.undo(reason, e.to_string(), None)
}

/// The servers do not reach each other in the direction that this way of transfer needs.
fn peer_unreachable(p: &mut Pass<'_>, e: &ServerError) -> Transition {
    kept::nothing_was_sent(p);
    let (from, to) = (&p.record.spec.from.server, &p.record.spec.to.server);
    let (dials, listens) = match p.record.spec.transfer {
        Mode::Push => (from, to),
        Mode::Pull | Mode::Relay | Mode::Backup | Mode::Internal => (to, from),
    };
    let message = format!("{dials} does not reach {listens}: {e}");
    let fix = format!(
        "set spec.peerAddress of InstanceServer {listens} to where {dials} reaches it, or leave spec.transfer at Auto"
    );
    p.undo(Reason::PeerUnreachable, message, Some(fix))
}

/// A controller that has just started may not know the target yet, and a daemon may restart: neither is a reason to undo.
pub(super) fn target_silent(p: &mut Pass<'_>) -> Transition {
    if p.silent_for(&p.view.target) < TARGET_PATIENCE {
        return p.wait(POLL);
    }
    let message = format!(
        "{} does not answer, so {} is started again where it was",
        p.record.spec.to.server, p.record.spec.from.name
    );
    p.undo(Reason::ServerUnreachable, message, None)
}

/// Undoes the move if the stopped source is no longer what it was when it was stopped.
pub(super) fn undo_if_disturbed(p: &mut Pass<'_>, source: &Copy) -> Option<Transition> {
    if let Some(t) = stop_lingers(p, source) {
        return Some(t);
    }
    let why = disturbed(p, source)?;
    Some(p.undo(Reason::ForeignOperation, why, None))
}

fn disturbed(p: &Pass<'_>, source: &Copy) -> Option<String> {
    let i = &source.fresh.instance;
    if i.power != Power::Stopped {
        return Some(format!("somebody started {} while it was being moved", i.at));
    }
    if !p.carries_mark(i) || !marks::guarded(i, p.record.spec.guard.source) {
        return Some(format!("somebody took Berth's guard or marks off {}", i.at));
    }
    let started = was_started(p, i);
    started.then(|| format!("{} was started and stopped again while it was being moved", i.at))
}

/// Whether it was started since it was stopped for the move.
fn was_started(p: &Pass<'_>, i: &Instance) -> bool {
    p.record
        .status
        .last_used_at
        .as_ref()
        .is_some_and(|t| *t != i.last_used_at)
}

/// Nothing is asked for while a stop goes on that an earlier request asked for: a second one takes the lock off the first
/// (v6.0.4 driver_lxc.go, `Shutdown`), and the daemon shows as stopped, then as running, what it still clears away.
fn stop_lingers(p: &Pass<'_>, source: &Copy) -> Option<Transition> {
    let i = &source.fresh.instance;
    let under_way = p.view.source.operation_on(&i.at);
    let asked = p.view.outcome.is_none() && under_way.is_some_and(|o| o.description.starts_with("Stopping"));
    let stopped = p.record.status.stopped_at.as_ref();
    let soon = stopped.is_some_and(|t| p.since(t).is_none_or(|d| d < LOCK_PATIENCE));
    let shown = soon && i.may_run() && !was_started(p, i);
    (asked || shown).then(|| p.wait(POLL))
}

/// A conditional write that failed: a lost race is simply made again, a daemon that does not answer is waited for,
/// a refusal is undone.
pub(super) fn retry_or_undo(p: &mut Pass<'_>, kind: EffectKind) -> Option<Transition> {
    let e = p.failed(kind)?;
    if e.kind == FailureKind::Changed {
        return None;
    }
    if e.is_transient() && p.attempts() < 5 {
        return p.retry_after_failure(kind);
    }
    Some(p.undo(Reason::MoveFailed, e.to_string(), None))
}

pub(super) fn source_vanished(p: &mut Pass<'_>) -> Transition {
    let from = &p.record.spec.from;
    let message = format!(
        "{} with uuid {} is no longer on {}",
        from.name,
        from.uuid.as_deref().unwrap_or("?"),
        from.server
    );
    if p.incoming().is_some() {
        p.note(Reason::NeedsAttention, message, None);
        return p.finish(berth_api::Outcome::NeedsAttention);
    }
    p.note(Reason::InstanceNotFound, message, None);
    p.finish(berth_api::Outcome::Undone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_that_breaks_is_told_from_a_refusal() {
        for broken in [
            "i2: websocket: close 1006 (abnormal closure): unexpected EOF",
            "rsync: connection unexpectedly closed (181 bytes received so far) [sender]",
            "Timed out waiting for connections",
        ] {
            assert!(is_link(broken), "{broken}");
        }
        for refused in [
            "Failed creating instance record: Unknown configuration key",
            "Failed getting root disk: No root device could be found",
        ] {
            assert!(!is_link(refused), "{refused}");
        }
        assert!(says("Operation Cancelled", &["cancelled", "canceled"]));
    }
}
