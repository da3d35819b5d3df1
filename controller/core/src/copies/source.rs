//! Where the source of a copy is now: under the name that the spec gives, or wherever its placement's instance lives.
//! Once copied it is bound by uuid, so that another instance of the same name is never copied onto the copy.

use std::sync::Arc;

use berth_api::{Reason, present};

use super::Step;
use super::record::CopyRecord;
use crate::marks::{self, Role};
use crate::model::{Instance, InstanceRef};
use crate::moves::{End, Read};
use crate::plan::{Blocker, Located, Reach, ServerView, World};

/// The placement that a copy follows, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourcePlacement {
    /// Whether there is one of that name.
    pub exists: bool,
    /// The instance that it is bound to.
    pub uuid: Option<String>,
}

/// Where the source is.
#[derive(Clone, Debug)]
pub enum Sought {
    /// There.
    Found(Box<Located>),
    /// Nowhere, or it is not the right one; a person has to act.
    Missing(Blocker),
    /// It cannot be told now, or it may not be read now.
    Later {
        /// The reason.
        reason: Reason,
        /// The same in a sentence.
        message: String,
    },
}

fn missing(reason: Reason, message: String, fix: &str) -> Sought {
    Sought::Missing(Blocker::new(reason, message, Some(fix.to_owned())))
}

fn later(reason: Reason, message: impl Into<String>) -> Sought {
    Sought::Later {
        reason,
        message: message.into(),
    }
}

/// Looks for the source. `moving` are the uuids of instances with an open move.
pub fn sought(record: &CopyRecord, world: &World, placement: Option<&SourcePlacement>, moving: &[String]) -> Sought {
    let found = match present(&record.spec.source.placement) {
        Some(name) => of_placement(record, name, world, (placement, moving)),
        None => by_name(record, world),
    };
    let Sought::Found(located) = &found else { return found };
    let uuid = located.instance.uuid().unwrap_or_default();
    if record.status.source_uuid.as_deref().is_some_and(|bound| bound != uuid) {
        let message = format!(
            "{} on {} is another instance now (uuid {uuid}, the copy is of {}), so it is not copied onto the copy",
            located.at(),
            located.server,
            record.status.source_uuid.as_deref().unwrap_or("?")
        );
        let fix = "delete this InstanceCopy (the copy stays) and create another one with another spec.target.name";
        return missing(Reason::SourceNotFound, message, fix);
    }
    let role = marks::role(&located.instance);
    if moving.iter().any(|m| m == uuid) || matches!(role, Some(Role::Incoming | Role::Retired)) {
        return later(Reason::Pending, format!("waits for the move of {}", located.at()));
    }
    found
}

fn unreachable(name: &str, view: &ServerView) -> Sought {
    match &view.reach {
        Reach::Ready | Reach::Connecting => later(Reason::Progressing, format!("{name} has not been listed yet")),
        Reach::Down { message, .. } => later(Reason::ServerUnreachable, format!("{name} cannot be asked: {message}")),
    }
}

fn located(server: &str, view: &ServerView, instance: &Arc<Instance>) -> Sought {
    match &view.facts {
        Some(facts) if view.is_listed() => Sought::Found(Box::new(Located {
            server: server.to_owned(),
            fingerprint: facts.fingerprint.clone(),
            instance: instance.clone(),
        })),
        _ => unreachable(server, view),
    }
}

fn by_name(record: &CopyRecord, world: &World) -> Sought {
    let source = &record.spec.source;
    let name = present(&source.server).unwrap_or_default();
    let Some(view) = world.servers.get(name) else {
        return no_server(record, name);
    };
    let at = InstanceRef::new(
        present(&source.project).unwrap_or("default"),
        present(&source.instance).unwrap_or_default(),
    );
    match view.instances.as_ref().and_then(|all| all.get(&at)) {
        Some(instance) => located(name, view, instance),
        None if !view.is_listed() => unreachable(name, view),
        None => missing(
            Reason::SourceNotFound,
            format!("there is no instance {at} on {name}"),
            "create the instance, or follow a placement with spec.source.placement if it moves",
        ),
    }
}

pub(super) fn no_server(record: &CopyRecord, name: &str) -> Sought {
    let message = format!("there is no InstanceServer {name} in namespace {}", record.namespace);
    let fix = format!(
        "kubectl get isrv -n {} shows those that there are; create it",
        record.namespace
    );
    missing(Reason::ServerNotFound, message, &fix)
}

fn of_placement(
    record: &CopyRecord,
    name: &str,
    world: &World,
    (placement, moving): (Option<&SourcePlacement>, &[String]),
) -> Sought {
    let Some(placement) = placement.filter(|p| p.exists) else {
        let message = format!("there is no InstancePlacement {name} in namespace {}", record.namespace);
        return missing(Reason::SourceNotFound, message, "create the placement");
    };
    let Some(uuid) = &placement.uuid else {
        return later(
            Reason::Progressing,
            format!("placement {name} has not found its instance yet"),
        );
    };
    if moving.contains(uuid) {
        // for a moment it is on both servers
        return later(Reason::Pending, format!("waits for the move of placement {name}"));
    }
    let counts =
        |i: &&Arc<Instance>| !marks::is_copy(i) && !matches!(marks::role(i), Some(Role::Incoming | Role::Retired));
    let mut candidates: Vec<(&str, &ServerView, &Arc<Instance>)> = Vec::new();
    for (server, view) in world.servers.iter().filter(|(_, v)| v.duplicate_of.is_none()) {
        let here = view.instances.iter().flat_map(|all| all.by_uuid(uuid)).filter(counts);
        candidates.extend(here.map(|i| (server.as_str(), view, i)));
    }
    // a server that does not answer may show what was there before a move
    if candidates.iter().any(|(_, view, _)| view.is_listed()) {
        candidates.retain(|(_, view, _)| view.is_listed());
    }
    match candidates.as_slice() {
        [(server, view, instance)] => located(server, view, instance),
        [] => match world.servers.iter().find(|(_, v)| !v.is_listed()) {
            Some((server, view)) => unreachable(server, view),
            None => missing(
                Reason::SourceNotFound,
                format!("no server has the instance of placement {name} (uuid {uuid})"),
                "see what the placement says",
            ),
        },
        [(a, ..), (b, ..), ..] => missing(
            Reason::AmbiguousInstance,
            format!("{a} and {b} both have an instance of uuid {uuid}"),
            "delete the one that is not wanted",
        ),
    }
}

/// Where the copy is looked for: its real name, its unique one, and wherever an instance of its uuid was seen.
fn target_places(record: &CopyRecord, world: &World) -> Vec<InstanceRef> {
    let Some(to) = record.status.current.as_ref().map(|w| &w.to) else {
        return Vec::new();
    };
    let mut places = vec![InstanceRef::new(&to.project, &to.name)];
    let incoming = record.status.incoming.as_ref();
    places.extend(incoming.map(|name| InstanceRef::new(&to.project, name)));
    let seen = world.servers.get(&to.server).and_then(|v| v.instances.as_ref());
    if let (Some(all), Some(uuid)) = (seen, &record.status.uuid) {
        places.extend(all.by_uuid(uuid).map(|i| i.at.clone()));
    }
    places.sort();
    places.dedup();
    places
}

/// The reads that the next step of the work in hand needs; none between refreshes.
pub fn reads(record: &CopyRecord, world: &World, sought: &Sought) -> Vec<Read> {
    let Some(work) = &record.status.current else {
        return Vec::new();
    };
    let step = Step::parse(&work.step);
    let verifying = matches!(step, Some(Step::Transferred | Step::Named));
    let mut reads: Vec<Read> = target_places(record, world)
        .into_iter()
        .map(|at| Read::Instance {
            end: End::Target,
            at,
            snapshots: verifying,
        })
        .collect();
    if let Sought::Found(located) = sought {
        reads.push(Read::Instance {
            end: End::Source,
            at: located.at().clone(),
            snapshots: true,
        });
    }
    if work.sent && matches!(step, Some(Step::Snapshotted | Step::Undoing)) {
        reads.extend([Read::Operations(End::Target), Read::Operations(End::Source)]);
    }
    reads
}
