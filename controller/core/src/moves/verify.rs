//! Transferred → Verified → COMMIT: the copy is compared with the source, takes its real name (still guarded), and one
//! compare-and-swap makes it the instance. Until then every failure undoes.

use std::collections::BTreeMap;

use berth_api::{GuardKind, Reason, Step};

use super::backup;
use super::body::{incoming_definition, plain_config};
use super::cold::{retry_or_undo, source_vanished, target_silent, undo_if_disturbed};
use super::criu;
use super::effect::{EffectKind, End, Request};
use super::finish;
use super::pass::{Pass, Transition};
use super::view::{Copy, EndView};
use crate::marks::{self, Role};
use crate::model::{Definition, Devices, Instance, InstanceRef, Power, ServerFacts, Snapshot};

pub(super) fn transferred(p: &mut Pass<'_>) -> Transition {
    let (source, target, facts) = match both(p) {
        Ok(found) => found,
        Err(t) => return *t,
    };
    if let Some(t) = backup::adapt(p, source, target, facts) {
        return t;
    }
    if let Some(why) = difference(p, source, target, facts) {
        return p.undo(Reason::MoveFailed, why, None);
    }
    let at = &target.fresh.instance.at;
    let real = InstanceRef::new(&p.record.spec.to.project, &p.record.spec.to.name);
    if p.record.spec.guard.target == GuardKind::Name || *at == real {
        p.advance(Step::Verified);
        return verified(p);
    }
    if p.view.target.copy(&real).is_some() {
        let message = format!("{real} exists on {} already", p.record.spec.to.server);
        return p.undo(Reason::NameTaken, message, None);
    }
    if let Some(t) = retry_or_undo(p, EffectKind::Name) {
        return t;
    }
    p.ask(EffectKind::Name, End::Target, at, Request::Rename { name: real.name })
}

pub(super) fn verified(p: &mut Pass<'_>) -> Transition {
    if let Err(t) = both(p) {
        return *t;
    }
    p.record.status.committed_at = Some(p.now.into());
    p.advance(Step::Committed);
    finish::committed(p)
}

type Both<'a> = (&'a Copy, &'a Copy, &'a ServerFacts);

/// Source and copy, if both are still what a commit needs.
fn both<'a>(p: &mut Pass<'a>) -> Result<Both<'a>, Box<Transition>> {
    let view = p.view;
    if let Some(t) = p.undo_if_wished() {
        return Err(Box::new(t));
    }
    if let Some(t) = p.wait_for_end(&view.source) {
        return Err(Box::new(t));
    }
    let Some(source) = p.source() else {
        return Err(Box::new(source_vanished(p)));
    };
    if let Some(t) = undo_if_disturbed(p, source) {
        return Err(Box::new(t));
    }
    let EndView::Reachable { facts, .. } = &view.target else {
        return Err(Box::new(target_silent(p)));
    };
    let Some(target) = p.target() else {
        let message = format!("the copy on {} is gone", p.record.spec.to.server);
        return Err(Box::new(p.undo(Reason::MoveFailed, message, None)));
    };
    let guarded = marks::guarded(&target.fresh.instance, p.record.spec.guard.target)
        || backup::is_untouched(p, &target.fresh.instance);
    if target.fresh.instance.power != Power::Stopped || !guarded {
        let message = format!(
            "somebody started the copy on {} or took its guard off",
            p.record.spec.to.server
        );
        return Err(Box::new(p.undo(Reason::ForeignOperation, message, None)));
    }
    Ok((source, target, facts))
}

/// What is not as it should be about the copy, in a sentence.
pub(super) fn difference(p: &Pass<'_>, source: &Copy, target: &Copy, facts: &ServerFacts) -> Option<String> {
    let (s, t) = (&source.fresh.instance, &target.fresh.instance);
    let mut expected = incoming_definition(&p.record.spec, &p.record.name, s, facts);
    criu::put_back(&p.record, &mut expected.config);
    if (t.kind, &t.architecture) != (s.kind, &s.architecture) {
        return Some(format!("the copy is a {} for {}", t.kind.as_str(), t.architecture));
    }
    if p.record.spec.to.pool.is_some() && t.root_pool() != p.record.spec.to.pool.as_deref() {
        return Some(format!(
            "the copy's root disk is on pool {}",
            t.root_pool().unwrap_or("?")
        ));
    }
    if marks::role(t) != Some(Role::Incoming) {
        return Some("the copy does not carry the mark of an incoming one".to_owned());
    }
    let parts = [
        (
            "configuration",
            differing(&plain_config(&expected.config), &plain_config(&t.config)),
        ),
        ("device", differing(&expected.devices, &own_devices(&expected, t))),
    ];
    if let Some((what, Some(key))) = parts.into_iter().find(|(_, d)| d.is_some()) {
        return Some(format!("the copy's {what} {key} differs from the source's"));
    }
    if expected.profiles != t.profiles {
        return Some(format!("the copy has the profiles {:?}", t.profiles));
    }
    if p.record.spec.snapshots == berth_api::Snapshots::Include {
        let (have, got) = (
            lasting(p, source.snapshots.as_deref()?),
            target.snapshots.as_deref().unwrap_or_default(),
        );
        if let Some(missing) = marks::missing_snapshot(&have, got, p.now) {
            return Some(format!("snapshot {} did not arrive", missing.name));
        }
    }
    None
}

/// Snapshots without those that are deleted at the end.
fn lasting(p: &Pass<'_>, snapshots: &[Snapshot]) -> Vec<Snapshot> {
    let ours = p.record.status.precopy.as_ref().map(|w| w.snapshots.as_slice());
    let temporary = |s: &&Snapshot| ours.is_some_and(|o| o.contains(&s.name));
    snapshots.iter().filter(|s| !temporary(s)).cloned().collect()
}

/// The copy's own devices, without the root disk that servers add where it comes from a profile: its pool was compared.
fn own_devices(expected: &Definition, copy: &Instance) -> Devices {
    let inherited = |name: &String| !expected.devices.contains_key(name);
    let root = copy.root_device().map(|(name, _)| name);
    let keep = |name: &String| !(inherited(name) && root == Some(name.as_str()));
    copy.devices
        .iter()
        .filter(|(name, _)| keep(name))
        .map(|(n, d)| (n.clone(), d.clone()))
        .collect()
}

/// The first key in which two maps differ.
fn differing<V: PartialEq>(a: &BTreeMap<String, V>, b: &BTreeMap<String, V>) -> Option<String> {
    a.keys().chain(b.keys()).find(|k| a.get(*k) != b.get(*k)).cloned()
}
