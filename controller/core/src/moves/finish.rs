//! Committed → Started → Retired → Cleaned: only forward. The copy becomes the instance and is started; then, off the
//! downtime path, the former source is retired, renamed and deleted, and the marks come off.

use std::time::Duration;

use berth_api::{GoDuration, GuardKind, MicroTime, Outcome as MoveOutcome, Power as AfterPower, Reason, Step};

use super::backup;
use super::effect::{EffectKind, End, Request};
use super::kept;
use super::live;
use super::pass::{Pass, Transition};
use super::view::{Copy, EndView};
use super::warm::remove_temporary;
use crate::marks::{self, Role};
use crate::model::{Change, Definition, InstanceRef, Power};

const POLL: Duration = Duration::from_secs(1);

pub(super) fn committed(p: &mut Pass<'_>) -> Transition {
    let view = p.view;
    if let Some(t) = p.wait_for_end(&view.target) {
        return t;
    }
    let Some(target) = p.target() else {
        return target_vanished(p);
    };
    if let Some(t) = live::settle_source(p) {
        return t;
    }
    let i = &target.fresh.instance;
    let guard = p.record.spec.guard.target;
    let owned = marks::role(i) == Some(Role::Owner);
    if live::between_servers(&p.record) {
        if !owned {
            return p
                .retry_after_failure(EffectKind::Own)
                .unwrap_or_else(|| live::own(p, target));
        }
    } else if !owned || (guard != GuardKind::Name && marks::guarded(i, guard)) {
        if let Some(t) = p.retry_after_failure(EffectKind::Own) {
            return t;
        }
        let definition = owner(p, target);
        let etag = target.fresh.etag.clone();
        return p.ask(EffectKind::Own, End::Target, &i.at, Request::Put { definition, etag });
    }
    if let Some(t) = take_real_name(p, target) {
        return t;
    }
    if let Some(t) = put_back_cloud_init(p, target, End::Target) {
        return t;
    }
    if p.record.spec.power_after == AfterPower::Running && !matches!(i.power, Power::Running | Power::Frozen) {
        if let Some(t) = start_failed(p) {
            return t;
        }
        if p.succeeded(EffectKind::Start) {
            // it went down again at once, or its server has yet to notice that it runs: not started twice in one breath
            return p.wait(POLL);
        }
        // a copy that a late request made has the instance's MAC address, and no server starts two of one address
        let try_it = p.attempts() == 0 || p.failed(EffectKind::Remove).is_some();
        if let Some(t) = (!try_it).then(|| remove_strays(p)).flatten() {
            return t;
        }
        let request = Request::Start { stateful: i.stateful };
        return p.ask(EffectKind::Start, End::Target, &i.at, request);
    }
    started_now(p);
    if !kept::keeps(&p.record) {
        // recorded with this step: its rename then needs no other write
        let name = p.record.spec.from.name.clone();
        p.retired_name(&name);
    }
    // the source was not read for this step: it must not keep the instance from starting if its server is away
    p.go_on()
}

/// Enters Started and closes the account of the downtime. That of a live move was seen while the running state went over.
pub(super) fn started_now(p: &mut Pass<'_>) {
    let asked = p
        .record
        .status
        .stop_requested_at
        .as_ref()
        .filter(|_| p.record.spec.power_after == AfterPower::Running && !live::between_servers(&p.record));
    if let Some(asked) = asked {
        let frozen = p.record.status.precopy.as_ref().map_or(0, |w| w.frozen.as_millis());
        let millis = p.now.as_millisecond() - asked.0.as_millisecond();
        p.record.status.downtime = Some(GoDuration::from_millis(millis + frozen));
    }
    p.advance(Step::Started);
    p.record.status.running_at.get_or_insert(MicroTime(p.now));
}

/// A start that fails is made again for as long as it takes: after the commit there is only forward.
pub(super) fn start_failed(p: &mut Pass<'_>) -> Option<Transition> {
    let retry = p.retry_after_failure(EffectKind::Start)?;
    if let Some(e) = p.record.status.last_error.as_mut() {
        e.reason = Reason::NeedsAttention.as_str().to_owned();
    }
    let mut retry = retry;
    retry.record = p.record.clone();
    Some(retry)
}

/// The definition that makes the copy the instance: guard off, everything put back.
fn owner(p: &Pass<'_>, target: &Copy) -> Definition {
    let i = &target.fresh.instance;
    let mut definition = Definition::from(i);
    marks::strip(&mut definition, p.record.spec.guard.target);
    definition
        .config
        .extend(marks::marks(&p.record.name, Role::Owner, p.record.spec.attempt));
    restore_keys(p, &mut definition, End::Target);
    if let Some(value) = p.record.spec.overrides.config.get(marks::AUTOSTART) {
        definition.config.insert(marks::AUTOSTART.to_owned(), value.clone());
    }
    // where this takes off a NIC, the server overwrites it, and it is written again before the start
    if let Some(value) = cloud_init_kept(p, p.record.spec.guard.target) {
        definition
            .config
            .insert(marks::CLOUD_INIT_ID.to_owned(), value.to_owned());
    }
    definition
}

/// Puts back the keys that Berth changes on any instance that it moves.
pub(super) fn restore_keys(p: &Pass<'_>, definition: &mut Definition, at: End) {
    for key in [marks::AUTOSTART, marks::PROTECTION_DELETE, marks::PROTECTION_START] {
        match p.kept(key) {
            Some(Some(_)) if at == End::Target && p.record.spec.dropped.iter().any(|k| k == key) => None,
            Some(Some(value)) => definition.config.insert(key.to_owned(), value.to_owned()),
            Some(None) => definition.config.remove(key),
            None => None,
        };
    }
    definition.ephemeral = p.kept_true(marks::EPHEMERAL);
}

/// Behind a name guard the copy takes its real name only now. If somebody took it meanwhile, the copy runs under its
/// unique name and says so.
fn take_real_name(p: &mut Pass<'_>, target: &Copy) -> Option<Transition> {
    let at = &target.fresh.instance.at;
    let real = InstanceRef::new(&p.record.spec.to.project, &p.record.spec.to.name);
    if *at == real || target.fresh.instance.may_run() {
        return None;
    }
    if p.view.target.copy(&real).is_some() {
        let message = format!(
            "{real} exists on {}: the instance runs as {}",
            p.record.spec.to.server, at.name
        );
        p.note(Reason::NameTaken, message, None);
        return None;
    }
    if let Some(t) = p.retry_after_failure(EffectKind::Name) {
        return Some(t);
    }
    Some(p.ask(EffectKind::Name, End::Target, at, Request::Rename { name: real.name }))
}

/// The cloud-init id from before the move. Restricted projects refuse the key: the plan said so beforehand
/// (CloudInitWouldRerun).
fn cloud_init_kept<'a>(p: &'a Pass<'_>, guard: GuardKind) -> Option<&'a str> {
    p.kept(marks::CLOUD_INIT_ID)
        .flatten()
        .filter(|_| guard != GuardKind::Name)
}

/// Every rename and every NIC guard gave the instance a new cloud-init id; cloud-init must not run again.
pub(super) fn put_back_cloud_init(p: &mut Pass<'_>, copy: &Copy, end: End) -> Option<Transition> {
    let i = &copy.fresh.instance;
    let guard = if end == End::Source {
        p.record.spec.guard.source
    } else {
        p.record.spec.guard.target
    };
    let kept = cloud_init_kept(p, guard)?.to_owned();
    if i.may_run() || i.config.get(marks::CLOUD_INIT_ID) == Some(&kept) {
        return None;
    }
    if let Some(t) = p.retry_after_failure(EffectKind::CloudInit) {
        return Some(t);
    }
    let mut change = Change::default();
    change.config.insert(marks::CLOUD_INIT_ID.to_owned(), kept);
    let etag = copy.fresh.etag.clone();
    Some(p.ask(EffectKind::CloudInit, end, &i.at, Request::Patch { change, etag }))
}

pub(super) fn started(p: &mut Pass<'_>) -> Transition {
    let view = p.view;
    if let EndView::Unreachable { message, .. } = &view.source {
        if p.record.status.last_error.is_none() {
            // said once: after a minute the placement counts as placed without it (LeftoverPending)
            p.note(Reason::ServerUnreachable, message.clone(), None);
        }
        return p.wait(POLL);
    }
    let Some(source) = p.source() else {
        p.advance(Step::Retired);
        // temporary snapshots of the target were not read yet
        return p.go_on();
    };
    if let Some(t) = live::settle_source(p) {
        return t;
    }
    let i = &source.fresh.instance;
    if let Some(t) = not_safe_to_retire(p, source) {
        return t;
    }
    if let Some(t) = backup::drop(p) {
        return t;
    }
    let stays = kept::keeps(&p.record) || live::overlapped(&p.record).is_some();
    if let Some(t) = retire(p, source, stays) {
        return t;
    }
    if let Some(t) = live::kept_for_a_person(p, source) {
        return t;
    }
    if kept::keeps(&p.record) {
        kept::keep(p, i);
        p.advance(Step::Retired);
        // its snapshots were not read yet
        return p.go_on();
    }
    if i.at.name == p.record.spec.from.name {
        if let Some(t) = p.retry_after_failure(EffectKind::Rename) {
            return t;
        }
        let name = p.retired_name(&i.at.name);
        return p.ask(EffectKind::Rename, End::Source, &i.at, Request::Rename { name });
    }
    p.advance(Step::Retired);
    retired(p)
}

/// A former source that stays says that it is one. One that is deleted in a moment says so by its name, which the record
/// has; it only must not be protected.
fn retire(p: &mut Pass<'_>, source: &Copy, stays: bool) -> Option<Transition> {
    let i = &source.fresh.instance;
    if marks::role(i) == Some(Role::Retired) || !(stays || marks::is_protected(i)) {
        return None;
    }
    if let Some(t) = p.retry_after_failure(EffectKind::Retire) {
        return Some(t);
    }
    let mut change = Change {
        config: marks::marks(&p.record.name, Role::Retired, p.record.spec.attempt),
        ..Default::default()
    };
    change
        .config
        .insert(marks::PROTECTION_DELETE.to_owned(), "false".to_owned());
    let etag = source.fresh.etag.clone();
    Some(p.ask(EffectKind::Retire, End::Source, &i.at, Request::Patch { change, etag }))
}

/// A former source that does not look like one is never stopped or deleted: a person must look.
fn not_safe_to_retire(p: &mut Pass<'_>, source: &Copy) -> Option<Transition> {
    let i = &source.fresh.instance;
    let expected_role = matches!(marks::role(i), Some(Role::Source | Role::Retired));
    if p.carries_mark(i) && expected_role && i.power == Power::Stopped {
        return None;
    }
    let server = &p.record.spec.from.server;
    let message = if i.power == Power::Stopped {
        format!(
            "the former source {} on {server} lost its marks; it was left alone",
            i.at
        )
    } else {
        format!(
            "somebody started the former source {} on {server}: two copies run; stop one of them",
            i.at
        )
    };
    p.note(
        Reason::NeedsAttention,
        message,
        Some(format!("stop and delete {} on {server}, if it is not needed", i.at)),
    );
    Some(p.finish(MoveOutcome::NeedsAttention))
}

pub(super) fn retired(p: &mut Pass<'_>) -> Transition {
    let view = p.view;
    for end in [&view.source, &view.target] {
        if let Some(t) = p.wait_for_end(end) {
            return t;
        }
    }
    if let Some(source) = p.source() {
        if let Some(t) = not_safe_to_retire(p, source) {
            return t;
        }
        let at = &source.fresh.instance.at;
        if p.record.status.kept_until.is_some() {
            if let Some(t) = remove_temporary(p, source, End::Source) {
                return t;
            }
        } else if Some(at.name.as_str()) == p.retired() {
            if let Some(t) = retire(p, source, false).or_else(|| p.retry_after_failure(EffectKind::Remove)) {
                return t;
            }
            // by its marks it is found to take its temporary snapshots away
            let precopy = p.record.status.precopy.as_ref();
            let target = p.target().filter(|_| precopy.is_none_or(|w| w.snapshots.is_empty()));
            let request = target.map_or(Request::Remove, |t| Request::RemoveAnd {
                target: t.fresh.instance.at.clone(),
                change: without_marks(),
                etag: t.fresh.etag.clone(),
            });
            return p.ask_beside(EffectKind::Remove, End::Source, at, request);
        }
    }
    if let Some(t) = remove_strays(p) {
        return t;
    }
    if let Some(target) = p.target() {
        if let Some(t) = remove_temporary(p, target, End::Target) {
            return t;
        }
        if let Some(t) = unmark(p, target, End::Target) {
            return t;
        }
    }
    p.advance(Step::Cleaned);
    p.finish(MoveOutcome::Succeeded)
}

/// Copies that late requests made under names that the record no longer uses.
pub(super) fn remove_strays(p: &mut Pass<'_>) -> Option<Transition> {
    let EndView::Reachable { strays, .. } = &p.view.target else {
        return None;
    };
    let stray = strays.iter().find(|s| marks::is_unique_name(&s.name))?.clone();
    if let Some(t) = p.retry_after_failure(EffectKind::Remove) {
        return Some(t);
    }
    Some(p.ask(EffectKind::Remove, End::Target, &stray, Request::Remove))
}

/// Takes the marks off, in one conditional request that also works on a running instance.
pub(super) fn unmark(p: &mut Pass<'_>, copy: &Copy, end: End) -> Option<Transition> {
    let i = &copy.fresh.instance;
    if !p.carries_mark(i) {
        return None;
    }
    if let Some(t) = p.retry_after_failure(EffectKind::Unmark) {
        return Some(t);
    }
    let (change, etag) = (without_marks(), copy.fresh.etag.clone());
    Some(p.ask(EffectKind::Unmark, end, &i.at, Request::Patch { change, etag }))
}

/// Takes off the marks of a move.
fn without_marks() -> Change {
    let none = [marks::MOVE, marks::ROLE, marks::GENERATION].map(|key| (key.to_owned(), String::new()));
    Change {
        config: none.into(),
        ..Change::default()
    }
}

fn target_vanished(p: &mut Pass<'_>) -> Transition {
    let to = &p.record.spec.to;
    let message = format!(
        "{} is gone from {} after the move had been committed; the former source on {} is complete and guarded",
        to.name, to.server, p.record.spec.from.server
    );
    p.note(Reason::NeedsAttention, message, None);
    p.wait(POLL * 10)
}
