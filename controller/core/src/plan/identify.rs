//! Which instance a placement is about (design "rules", Identity and Claims). Once bound by uuid it is never bound anew
//! by name; copies on their way in or out are never candidates.

use std::collections::BTreeSet;

use berth_api::{Reason, present};

use super::world::{Claim, Desired, Located, Reach, ServerView, World};
use super::{Blocker, Decision, wait};
use crate::marks::{self, Role};
use crate::model::{Instance, InstanceRef};
use crate::records::Record;

/// The instance, or why there is none to act on.
pub fn identify(desired: &Desired, world: &World) -> Result<Located, Decision> {
    if let Some(name) = present(&desired.spec.instance.server)
        && !world.servers.contains_key(name)
    {
        return Err(blocked_not_found(desired, name));
    }
    let found = candidates(desired, world);
    match found.as_slice() {
        [one] if desired.bound_uuid().is_some() => Ok(one.clone()),
        [one] => match unheard_of(desired, world) {
            None => Ok(one.clone()),
            Some((name, view)) => Err(may_be_there(desired, one, name, view)),
        },
        [] => Err(nothing_found(desired, world)),
        [first, second, ..] => Err(ambiguous(desired, first, second)),
    }
}

fn candidates(desired: &Desired, world: &World) -> Vec<Located> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for (name, view) in &world.servers {
        let (Some(facts), Some(inventory)) = (&view.facts, &view.instances) else {
            continue;
        };
        if view.duplicate_of.is_some() || !seen.insert(facts.fingerprint.clone()) {
            continue;
        }
        let here = |i: &std::sync::Arc<Instance>| Located {
            server: name.clone(),
            fingerprint: facts.fingerprint.clone(),
            instance: i.clone(),
        };
        match desired.bound_uuid() {
            Some(uuid) => {
                // a copy is promoted by being named: nothing else makes it the instance that is meant
                let named = present(&desired.spec.instance.uuid).is_some();
                let meant = |i: &&std::sync::Arc<Instance>| counts(i, world) && (named || !marks::is_copy(i));
                found.extend(inventory.by_uuid(uuid).filter(meant).map(here));
            }
            None => {
                let places = places_by_name(desired, name);
                found.extend(
                    places
                        .iter()
                        .filter_map(|at| inventory.get(at))
                        .filter(|i| counts(i, world) && !marks::is_copy(i))
                        .map(here),
                );
            }
        }
    }
    let taken_over: BTreeSet<String> = found
        .iter()
        .filter(|l| marks::role(&l.instance) == Some(Role::Owner))
        .filter_map(|l| marks::move_id(&l.instance).map(str::to_owned))
        .collect();
    // the former source of a committed move whose server does not answer still looks as it was seen last
    let left = |l: &Located, r: &Record| {
        let committed = !r.finished() && r.status.committed_at.is_some();
        committed && marks::move_id(&l.instance) == Some(&r.name) && r.spec.from.fingerprint == l.fingerprint
    };
    found.retain(|l| !world.records.iter().any(|r| left(l, r)));
    found.retain(|l| {
        marks::role(&l.instance) != Some(Role::Source)
            || marks::move_id(&l.instance).is_none_or(|id| !taken_over.contains(id))
    });
    found
}

/// Where an unbound placement looks on the server `name`.
fn places_by_name(desired: &Desired, name: &str) -> Vec<InstanceRef> {
    let mut places = Vec::new();
    if present(&desired.spec.instance.server).is_none_or(|s| s == name) {
        places.push(InstanceRef::new(desired.instance_project(), desired.instance_name()));
    }
    if desired.spec.target.server == name {
        let project = present(&desired.spec.target.project).unwrap_or(desired.instance_project());
        let there = InstanceRef::new(project, desired.target_name());
        if !places.contains(&there) {
            places.push(there);
        }
    }
    places
}

/// Whether an instance can be the one that is meant.
fn counts(i: &Instance, world: &World) -> bool {
    let of_open_move = marks::move_id(i).is_some_and(|id| world.open_moves.iter().any(|o| o == id));
    match marks::role(i) {
        Some(Role::Retired) => false,
        Some(Role::Incoming) => false,
        Some(Role::Source | Role::Owner) | None => of_open_move || !marks::is_unique_name(&i.at.name),
    }
}

/// A server that may have the instance and was not listed: one of those that the placement names, else any one.
fn unheard_of<'a>(desired: &Desired, world: &'a World) -> Option<(&'a String, &'a ServerView)> {
    let by_uuid = desired.bound_uuid().is_some();
    let involved = |name: &str| by_uuid || !places_by_name(desired, name).is_empty();
    let unheard = |v: &ServerView| !v.is_listed() && v.duplicate_of.is_none();
    world.servers.iter().find(|(name, v)| involved(name) && unheard(v))
}

/// The one that was found by its name is not the only one that can be meant, as long as a server was not listed.
fn may_be_there(desired: &Desired, found: &Located, name: &str, view: &ServerView) -> Decision {
    let mut decision = unreachable(name, view);
    if let Decision::Wait { reason, message, .. } = &mut decision
        && *reason == Reason::ServerUnreachable
        && present(&desired.spec.instance.server).is_none()
    {
        message.push_str(&format!(
            "; it may have a {}, too, like {}: spec.instance.server says which is meant",
            found.at(),
            found.server
        ));
    }
    decision
}

fn nothing_found(desired: &Desired, world: &World) -> Decision {
    if let Some((name, view)) = unheard_of(desired, world) {
        return unreachable(name, view);
    }
    let what = match desired.bound_uuid() {
        Some(uuid) => format!("no instance with uuid {uuid}"),
        None => format!(
            "no instance {}",
            InstanceRef::new(desired.instance_project(), desired.instance_name())
        ),
    };
    let servers: Vec<&str> = world.servers.keys().map(String::as_str).collect();
    let message = match servers.as_slice() {
        [] => format!("{what}: there is no InstanceServer in namespace {}", desired.namespace),
        names => format!("{what} on {}", names.join(", ")),
    };
    let fix = "create the instance, add the InstanceServer that has it, or correct spec.instance".to_owned();
    Decision::Blocked(vec![Blocker::new(Reason::InstanceNotFound, message, Some(fix))])
}

/// A server that must be asked first.
pub(super) fn unreachable(name: &str, view: &ServerView) -> Decision {
    match &view.reach {
        Reach::Ready | Reach::Connecting => wait(Reason::Progressing, format!("{name} has not been listed yet"), None),
        Reach::Down { message, .. } => wait(
            Reason::ServerUnreachable,
            format!("{name} cannot be asked: {message}"),
            None,
        ),
    }
}

fn blocked_not_found(desired: &Desired, server: &str) -> Decision {
    let message = format!("there is no InstanceServer {server} in namespace {}", desired.namespace);
    let fix = format!(
        "kubectl get isrv -n {} shows those that there are; create it, or correct the name",
        desired.namespace
    );
    Decision::Blocked(vec![Blocker::new(Reason::ServerNotFound, message, Some(fix))])
}

/// The target must be known before anything else is said.
pub(super) fn target_exists(desired: &Desired, world: &World) -> Result<(), Decision> {
    match world.servers.contains_key(&desired.spec.target.server) {
        true => Ok(()),
        false => Err(blocked_not_found(desired, &desired.spec.target.server)),
    }
}

fn ambiguous(desired: &Desired, a: &Located, b: &Located) -> Decision {
    let message = format!(
        "{} on {} and {} on {} can both be meant",
        a.at(),
        a.server,
        b.at(),
        b.server
    );
    let same = a.instance.uuid() == b.instance.uuid();
    let fix = if same {
        format!(
            "both have the uuid {}: delete or rename the one that is not wanted",
            a.instance.uuid().unwrap_or("?")
        )
    } else {
        format!(
            "kubectl patch iplace -n {} {} --type merge -p '{{\"spec\":{{\"instance\":{{\"uuid\":\"{}\"}}}}}}' for the one on {}",
            desired.namespace,
            desired.name,
            a.instance.uuid().unwrap_or("?"),
            a.server
        )
    };
    Decision::Blocked(vec![Blocker::new(Reason::AmbiguousInstance, message, Some(fix))])
}

/// Whether this placement holds the instance, or who does: the one with an open move, else the oldest, else the least
/// namespace and name.
pub fn holder<'a>(desired: &Desired, located: &Located, claims: &'a [Claim]) -> Option<&'a Claim> {
    let uuid = located.instance.uuid()?;
    let mine = |c: &Claim| c.namespace == desired.namespace && c.name == desired.name;
    let rivals = claims
        .iter()
        .filter(|c| c.uuid == uuid && c.fingerprint == located.fingerprint);
    let own_move = claims.iter().any(|c| mine(c) && c.moving);
    let key = |moving: bool, created: jiff::Timestamp, namespace: &str, name: &str| {
        (!moving, created, namespace.to_owned(), name.to_owned())
    };
    let own = key(own_move, desired.created_at, &desired.namespace, &desired.name);
    rivals
        .filter(|c| !mine(c))
        .filter(|c| key(c.moving, c.created_at, &c.namespace, &c.name) < own)
        .min_by_key(|c| key(c.moving, c.created_at, &c.namespace, &c.name))
}
