//! The plan of a move: from, to, method, transfer, guards, and its digest. What makes it impossible comes from
//! `preflight`.

use berth_api::moves::MoveEnd;
use berth_api::placement::{Plan, PlanMethod};
use berth_api::{GuardKind, GuardPair, InstanceMoveSpec, InstanceType, Location, Method, Reason, Transfer, present};
use jiff::Timestamp;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::methods::{self, Case, Choice};
use super::ways::{self, Road};
use super::world::{Desired, Located, World};
use super::{Blocker, Decision, Verdict, dropped, gate, kept, preflight};
use crate::model::{Capability, InstanceKind, ServerFacts};
use crate::overrides::Adaptation;

pub(super) struct Built {
    pub spec: InstanceMoveSpec,
    pub plan: Plan,
    pub blockers: Vec<Blocker>,
    /// If no method is possible: when one may be tried again.
    pub until: Option<Timestamp>,
    /// Whether a kept source is just being deleted where the move goes.
    pub leaves: Result<(), Decision>,
}

/// The plan of the move that would mend the drift, and what stands against it.
pub(super) fn build(desired: &Desired, located: &Located, world: &World, facts: &ServerFacts, now: Timestamp) -> Built {
    let target = &world.servers[&desired.spec.target.server];
    let source = &world.servers[&located.server];
    let internal = source.fingerprint() == target.fingerprint();
    let mut blockers = Vec::new();
    let from = from_location(located);
    let to = preflight::destination(desired, located, (target, world), internal, &mut blockers);
    let transfer = if internal {
        Transfer::Internal
    } else {
        let road = Road {
            desired,
            located,
            source,
            target,
            facts,
            to: &to,
            world,
        };
        ways::choose(&road, &mut blockers)
    };
    let case = Case {
        desired,
        located,
        source,
        target: facts,
        target_view: target,
        to: &to,
        transfer,
        world,
        now,
    };
    let Choice {
        method,
        estimate,
        rejected,
        until,
    } = methods::choose(&case, &mut blockers);
    let inputs = case.inputs(method);
    let leaves = kept::leaves(&case);
    let dropped = dropped::dropped(&case, world, &mut blockers);
    let mut guard = guards(desired, located, world, &to, internal, &mut blockers);
    if method == Method::Live {
        // it arrives running
        guard.target = GuardKind::None;
    }
    let onto = kept::onto(&case, method, guard.target);
    let (too_little, little) = preflight::space(&case, onto.as_ref());
    blockers.extend(too_little);
    let end = |location: &Location, fingerprint: &str| MoveEnd::new(location, fingerprint);
    let mut spec = InstanceMoveSpec {
        guard,
        from: MoveEnd {
            uuid: located.instance.uuid().map(str::to_owned),
            ..end(&from, &located.fingerprint)
        },
        dropped: dropped.keys,
        estimate,
        target_free: world.contents.as_ref().and_then(|c| c.free),
        onto,
        inputs: (method != Method::Cold).then_some(inputs),
        warm: (method == Method::Warm).then_some(desired.spec.warm),
        live: (method == Method::Live).then_some(desired.spec.live),
        ..spec(
            desired,
            located,
            (method, transfer),
            MoveEnd {
                group: present(&desired.spec.target.group).map(str::to_owned),
                ..end(&to, &facts.fingerprint)
            },
        )
    };
    spec.plan_digest = digest(&spec, desired);
    let mut notes = match source.facts.as_deref().filter(|_| !internal) {
        Some(source) => preflight::notes(desired, located, source, facts, &to),
        None => Vec::new(),
    };
    notes.extend(little);
    let plan = Plan {
        digest: Some(spec.plan_digest.clone()),
        method: Some(PlanMethod::from(method)),
        transfer: Some(transfer),
        guard: Some(guard),
        from: Some(from),
        to: Some(to),
        estimate,
        rejected,
        dropped: dropped.shown,
        blockers: blockers.iter().map(shown).collect(),
        notes: notes.iter().map(shown).collect(),
    };
    Built {
        spec,
        plan,
        blockers,
        until,
        leaves,
    }
}

/// What a record takes over from its placement; its source is for the caller to fill in.
fn spec(desired: &Desired, located: &Located, (method, transfer): (Method, Transfer), to: MoveEnd) -> InstanceMoveSpec {
    InstanceMoveSpec {
        placement: desired.name.clone(),
        placement_uid: desired.uid.clone(),
        generation: Some(desired.generation),
        method,
        transfer,
        instance_type: match located.instance.kind {
            InstanceKind::Container => InstanceType::Container,
            InstanceKind::VirtualMachine => InstanceType::VirtualMachine,
        },
        from: to.clone(),
        to,
        power_after: gate::power_after(desired, located),
        snapshots: desired.spec.snapshots,
        stop: desired.spec.stop,
        timeout: Some(desired.spec.timeout),
        overrides: desired.spec.overrides.clone(),
        keep_source: desired.spec.keep_source,
        ..InstanceMoveSpec::default()
    }
}

/// The plan of a change where the instance is.
pub(super) fn in_place(
    desired: &Desired,
    located: &Located,
    change: &Adaptation,
    restarts: bool,
    blockers: &[Blocker],
) -> Plan {
    let from = from_location(located);
    let what = (
        &from,
        desired.bound_uuid(),
        desired.spec.power_state,
        desired.status.committed_moves,
        (change, restarts),
    );
    Plan {
        digest: Some(hash(&what)),
        method: Some(PlanMethod::InPlace),
        from: Some(from.clone()),
        to: Some(from),
        blockers: blockers.iter().map(shown).collect(),
        ..Default::default()
    }
}

/// Adds to a plan what stands against it; that is what follows.
pub(super) fn refuse(verdict: &mut Verdict, blocker: Blocker) -> Decision {
    if let Some(plan) = verdict.plan.as_mut() {
        plan.blockers.push(shown(&blocker));
    }
    Decision::Blocked(vec![blocker])
}

/// The record of a stop, a change of the configuration and a start where the instance is.
pub(super) fn restart(desired: &Desired, located: &Located, digest: String) -> InstanceMoveSpec {
    let here = from_location(located);
    let end = MoveEnd::new(&here, &located.fingerprint);
    InstanceMoveSpec {
        from: MoveEnd {
            uuid: located.instance.uuid().map(str::to_owned),
            ..end.clone()
        },
        plan_digest: digest,
        ..spec(desired, located, (Method::Cold, Transfer::Internal), end)
    }
}

fn shown(b: &Blocker) -> berth_api::placement::Blocker {
    berth_api::placement::Blocker {
        reason: b.reason.as_str().to_owned(),
        message: b.message.clone(),
        fix: b.fix.clone(),
    }
}

/// Where an instance is, as the status says it.
pub fn from_location(located: &Located) -> Location {
    Location {
        server: located.server.clone(),
        member: located.instance.member.clone(),
        project: located.at().project.clone(),
        pool: located.instance.root_pool().map(str::to_owned),
        name: located.at().name.clone(),
    }
}

/// Which guard keeps each side from running: a device, the server's own key, or (restricted projects) the name.
fn guards(
    desired: &Desired,
    located: &Located,
    world: &World,
    to: &Location,
    internal: bool,
    blockers: &mut Vec<Blocker>,
) -> GuardPair {
    if internal {
        return GuardPair {
            source: GuardKind::None,
            target: GuardKind::None,
        };
    }
    let side = |server: &str, project: &str| {
        let facts = world.servers.get(server).and_then(|v| v.facts.as_deref());
        let restricted = facts
            .and_then(|f| f.project(project))
            .is_some_and(crate::model::Project::restricted);
        match (restricted, facts.is_some_and(|f| f.can(Capability::ProtectionStart))) {
            (false, _) => GuardKind::Device,
            (true, true) => GuardKind::ProtectionKey,
            (true, false) => GuardKind::Name,
        }
    };
    let pair = GuardPair {
        source: side(&located.server, &located.at().project),
        target: side(&desired.spec.target.server, &to.project),
    };
    if pair.target == GuardKind::Name && gate::cloud_init_would_rerun(located) {
        let message = format!(
            "project {} of {} is restricted: the rename gives {} a new cloud-init id, which may not be written back, so cloud-init would run again",
            to.project,
            to.server,
            located.at()
        );
        let fix = "remove the cloud-init keys, or move it into a project that is not restricted".to_owned();
        blockers.push(Blocker::new(Reason::CloudInitWouldRerun, message, Some(fix)));
    }
    pair
}

#[derive(Serialize)]
struct Digested<'a> {
    uuid: Option<&'a str>,
    committed: i64,
    methods: &'a [Method],
    method: Method,
    transfer: Transfer,
    from: Location,
    to: Location,
    snapshots: berth_api::Snapshots,
    overrides: &'a berth_api::Overrides,
    dropped: &'a [String],
    power_after: berth_api::Power,
}

/// The digest of what would be done, for an approval: not of estimates or times.
pub fn digest(spec: &InstanceMoveSpec, desired: &Desired) -> String {
    hash(&Digested {
        uuid: spec.from.uuid.as_deref(),
        committed: desired.status.committed_moves.unwrap_or(0),
        methods: &desired.spec.methods,
        method: spec.method,
        transfer: spec.transfer,
        from: spec.from.location(),
        to: spec.to.location(),
        snapshots: spec.snapshots,
        overrides: &spec.overrides,
        dropped: &spec.dropped,
        power_after: spec.power_after,
    })
}

pub(super) fn hash(what: &impl Serialize) -> String {
    // maps with text keys and plain values: this cannot fail, and an empty text would only ask for a new approval
    let text = serde_json::to_string(what).unwrap_or_default();
    let sum = Sha256::digest(text.as_bytes());
    let hex: String = sum.iter().take(16).map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}
