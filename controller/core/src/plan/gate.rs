//! What holds a move back although it is possible: claims, somebody else's operation, policy, history, windows, slots.

use berth_api::placement::{Approval, Mode, PowerState};
use berth_api::{Method, Outcome, Reason};
use jiff::{SignedDuration, Timestamp};

use super::identify::holder;
use super::world::{Desired, Located, World};
use super::{Blocker, Decision, Verdict, wait, with_fix};
use crate::marks;
use crate::model::MemberStatus;
use crate::moves::is_restart;
use crate::records::Record;

type Gate = Result<(), Decision>;

fn blocked(reason: Reason, message: String, fix: Option<String>) -> Gate {
    Err(Decision::Blocked(vec![Blocker::new(reason, message, fix)]))
}

/// Another placement holds the instance.
pub(super) fn claimed(desired: &Desired, located: &Located, world: &World) -> Gate {
    let Some(claim) = holder(desired, located, &world.claims) else {
        return Ok(());
    };
    let who = format!("{}/{}", claim.namespace, claim.name);
    if claim.deleting {
        return Err(wait(
            Reason::Pending,
            format!("placement {who}, which holds {}, is being deleted", located.at()),
            None,
        ));
    }
    let fix = format!(
        "kubectl delete iplace -n {} {}, or this one",
        claim.namespace, claim.name
    );
    blocked(
        Reason::ClaimedByAnother,
        format!("{} is placed by {who}", located.at()),
        Some(fix),
    )
}

/// Somebody or something else is moving the instance, or it belongs to an evacuated member.
pub(super) fn foreign(located: &Located, world: &World) -> Gate {
    let (i, here) = (&located.instance, &world.servers[&located.server]);
    if !i.known {
        let message = format!(
            "member {} of {} does not answer",
            i.member.as_deref().unwrap_or("?"),
            located.server
        );
        return Err(wait(Reason::ServerUnreachable, message, None));
    }
    if let Some(origin) = i.config.get("volatile.evacuate.origin").filter(|o| !o.is_empty()) {
        let message = format!(
            "{} was evacuated from member {origin} of {}; Berth acts again once that member is restored",
            i.at, located.server
        );
        return Err(wait(Reason::ForeignOperation, message, None));
    }
    let member = here
        .facts
        .as_deref()
        .zip(i.member.as_deref())
        .and_then(|(f, m)| f.member(m));
    let Some(member) = member else { return Ok(()) };
    match &member.status {
        MemberStatus::Evacuated | MemberStatus::Evacuating | MemberStatus::Restoring => {
            let message = format!(
                "member {} of {} is {}; Berth acts again once it is restored",
                member.name,
                located.server,
                member.status.as_str()
            );
            Err(wait(Reason::ForeignOperation, message, None))
        }
        MemberStatus::Online | MemberStatus::Offline | MemberStatus::Other(_) => Ok(()),
    }
}

/// The marks of a move that this placement knows nothing of are respected: somebody else may be moving the instance.
pub(super) fn marked_by_another(desired: &Desired, located: &Located, world: &World) -> Gate {
    let i = &located.instance;
    let Some(id) = marks::move_id(i) else { return Ok(()) };
    let own = world.records.iter().any(|r| r.name == id) || desired.status.moves.iter().any(|m| m.name == id);
    if own {
        return Ok(());
    }
    if world.open_moves.iter().any(|o| o == id) {
        return Err(wait(Reason::Pending, format!("{} is part of move {id}", i.at), None));
    }
    let cli = here_cli(located, world);
    let keys = [marks::MOVE, marks::ROLE, marks::GENERATION];
    let unset: Vec<String> = keys
        .iter()
        .map(|k| format!("{cli} config unset --project {} {} {k}", i.at.project, i.at.name))
        .collect();
    let message = format!(
        "{} carries the mark of move {id}, which this controller does not know; if nobody moves it, on {}: {}",
        i.at,
        located.server,
        unset.join("; ")
    );
    Err(wait(Reason::ForeignOperation, message, None))
}

fn here_cli(located: &Located, world: &World) -> &'static str {
    let facts = world.servers.get(&located.server).and_then(|v| v.facts.as_deref());
    facts.map_or("incus", |f| f.product.cli())
}

/// A move that a person is to look at left its marks on the instance: they have the next word.
pub(super) fn left_to_a_person(desired: &Desired, located: &Located, world: &World) -> Gate {
    let id = marks::move_id(&located.instance);
    let marked = world.records.iter().find(|r| Some(r.name.as_str()) == id);
    match marked.filter(|r| r.status.outcome() == Some(Outcome::NeedsAttention)) {
        Some(record) if remembered(desired, record) => needs_attention(record),
        Some(_) | None => Ok(()),
    }
}

fn needs_attention(record: &Record) -> Gate {
    let error = record.status.last_error.as_ref();
    let (message, fix) = error.map_or((String::new(), None), |e| (e.message.clone(), e.fix.clone()));
    blocked(Reason::NeedsAttention, format!("move {}: {message}", record.name), fix)
}

/// Whether a finished move still counts: a new generation or a new request forgets what happened.
pub(super) fn remembered(desired: &Desired, record: &Record) -> bool {
    let summary = desired.status.moves.iter().find(|m| m.name == record.name);
    summary.and_then(|s| s.generation) == Some(desired.generation)
}

/// Whether the instance carries marks or a guard of a move that is over: a snapshot taken meanwhile was restored.
pub(super) fn stale(located: &Located, world: &World) -> bool {
    let i = &located.instance;
    let id = marks::move_id(i);
    let open = id.is_some_and(|id| world.records.iter().any(|r| r.name == id && !r.finished()));
    !open && (id.is_some() || marks::guarded(i, berth_api::GuardKind::Device))
}

/// What the placement itself does not want now.
pub(super) fn policy(desired: &Desired, verdict: &Verdict) -> Gate {
    if desired.deleting {
        return Err(wait(Reason::Pending, "the placement is being deleted", None));
    }
    let what: Vec<&str> = verdict.drift.iter().map(|d| d.as_str()).collect();
    if desired.spec.suspend {
        return Err(wait(
            Reason::Suspended,
            format!("suspended; {} would be mended", what.join(", ")),
            None,
        ));
    }
    match desired.spec.mode {
        Mode::Enforce => Ok(()),
        Mode::Observe => Err(wait(
            Reason::DriftObserved,
            format!("{}; mode is Observe", what.join(", ")),
            None,
        )),
    }
}

/// How the last move ended.
pub(super) fn history(desired: &Desired, world: &World, now: Timestamp) -> Gate {
    let Some(last) = world.last_attempt() else {
        return forgotten(desired);
    };
    match last.status.outcome() {
        Some(Outcome::Cancelled) if remembered(desired, last) => cancelled(desired, &last.name),
        Some(Outcome::NeedsAttention) if remembered(desired, last) => needs_attention(last),
        Some(Outcome::Undone | Outcome::NeedsAttention | Outcome::Cancelled | Outcome::Succeeded) | None => {
            let Some(at) = desired.status.retry_at.as_ref().filter(|t| t.0 > now) else {
                return Ok(());
            };
            // what went wrong while it was undone is not why
            let undo = last.status.undo.as_ref().filter(|u| !u.message.is_empty());
            let undo = undo.map(|u| with_fix(&u.message, u.fix.as_deref()));
            let error = || {
                last.status
                    .last_error
                    .as_ref()
                    .map(|e| with_fix(&e.message, e.fix.as_deref()))
            };
            let why = undo.or_else(error).unwrap_or_default();
            let text = format!(
                "move {} was undone: {why}; tried again at {}",
                last.name,
                at.0.round(jiff::Unit::Second).unwrap_or(at.0)
            );
            Err(wait(Reason::MoveFailed, text, Some(at.0)))
        }
    }
}

/// An instance is not stopped again and again for a change that its server refuses.
pub(super) fn refused(desired: &Desired, world: &World) -> Gate {
    let last = world.last_attempt();
    let Some(last) = last.filter(|r| is_restart(r) && r.status.outcome() == Some(Outcome::Undone)) else {
        return Ok(());
    };
    let undo = last.status.undo.as_ref();
    match undo.filter(|u| remembered(desired, last) && u.reason == Reason::TargetRefused.as_str()) {
        None => Ok(()),
        Some(undo) => {
            let fix = format!(
                "correct spec.overrides: kubectl edit iplace -n {} {}",
                desired.namespace, desired.name
            );
            blocked(Reason::TargetRefused, undo.message.clone(), Some(fix))
        }
    }
}

/// How the last move ended whose record is gone, because somebody deleted it.
fn forgotten(desired: &Desired) -> Gate {
    let last = desired.status.moves.first();
    match last.filter(|m| m.generation == Some(desired.generation)) {
        Some(last) if last.outcome == Outcome::Cancelled.as_str() => cancelled(desired, &last.name),
        Some(_) | None => Ok(()),
    }
}

fn cancelled(desired: &Desired, record: &str) -> Gate {
    let message = format!("move {record} was cancelled; change the spec or request a reconcile to move again");
    blocked(Reason::MoveCancelled, message, Some(desired.request_command()))
}

/// A plan that waits for its digest.
pub(super) fn approval(desired: &Desired, verdict: &Verdict) -> Gate {
    match desired.spec.approval {
        Approval::Auto => Ok(()),
        Approval::Manual => {
            let digest = verdict
                .plan
                .as_ref()
                .and_then(|p| p.digest.as_deref())
                .unwrap_or_default();
            if desired.approve.as_deref() == Some(digest) {
                return Ok(());
            }
            let message = format!(
                "waits for approval: kubectl annotate --overwrite iplace -n {} {} berth.dev/approve={digest}",
                desired.namespace, desired.name
            );
            Err(wait(Reason::WaitingForApproval, message, None))
        }
    }
}

/// Outside its windows nothing is stopped, and nothing begins that is expected to take longer than what is left of one.
pub(super) fn windows(desired: &Desired, method: Method, verdict: &Verdict, now: Timestamp) -> Gate {
    let estimate = verdict.plan.as_ref().and_then(|p| p.estimate.as_ref());
    let takes = estimate.and_then(|e| e.duration).map_or(0, |d| d.as_millis());
    let takes = SignedDuration::from_millis(takes);
    crate::windows::check(&desired.spec.windows, method, takes, now).map_err(|closed| closed.decision())
}

/// A refresh of a copy comes to its end first: one that is broken off as it ends can leave a copy that does not start.
pub(super) fn refreshed(located: &Located, world: &World) -> Gate {
    let uuid = located.instance.uuid();
    if !world.refreshed.iter().any(|r| Some(r.as_str()) == uuid) {
        return Ok(());
    }
    let message = format!("waits until the copy of {} is refreshed, which has begun", located.at());
    Err(wait(Reason::Pending, message, None))
}

/// A slot on both servers; a member, group, pool or name change inside one server needs none.
pub(super) fn slots(located: &Located, desired: &Desired, world: &World) -> Gate {
    let (from, to) = (
        &world.servers[&located.server],
        &world.servers[&desired.spec.target.server],
    );
    if from.fingerprint() == to.fingerprint() {
        return Ok(());
    }
    let full = if to.free_incoming <= 0 {
        Some((&desired.spec.target.server, "incoming"))
    } else if from.free_outgoing <= 0 {
        Some((&located.server, "outgoing"))
    } else {
        None
    };
    match full {
        None => Ok(()),
        Some((server, which)) => Err(wait(
            Reason::Pending,
            format!("waits for a slot: {server} has as many {which} moves as its limits allow"),
            None,
        )),
    }
}

/// What only one host has, or what nobody may change, is refused before anything is touched.
pub(super) fn cloud_init_would_rerun(located: &Located) -> bool {
    let keys = [
        "cloud-init.user-data",
        "cloud-init.vendor-data",
        "user.user-data",
        "user.vendor-data",
    ];
    located.instance.config.contains_key(marks::CLOUD_INIT_ID)
        && keys.iter().any(|k| located.instance.expanded_config.contains_key(*k))
}

/// Whether the instance is to run when the move is over.
pub(super) fn power_after(desired: &Desired, located: &Located) -> berth_api::Power {
    match desired.spec.power_state {
        PowerState::Running => berth_api::Power::Running,
        PowerState::Stopped => berth_api::Power::Stopped,
        PowerState::Preserve if located.instance.may_run() => berth_api::Power::Running,
        PowerState::Preserve => berth_api::Power::Stopped,
    }
}
