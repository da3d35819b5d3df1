//! What is done about an instance that is where it should be: its configuration and its power state. What takes effect
//! while it runs is changed at once; what does not waits until it may be stopped, and is then a record of its own.

use berth_api::placement::{Approval, Drift, PowerState};
use berth_api::{Method, Reason};
use jiff::Timestamp;

use super::world::{Desired, Located, World};
use super::{Blocker, Decision, Verdict, build, gate, preflight};
use crate::model::ServerFacts;
use crate::overrides::Adaptation;
use crate::server::PowerAction;

/// A change of the configuration that did not lead to what was declared.
#[derive(Clone, Debug, PartialEq)]
pub struct Tried {
    /// The change.
    pub change: Adaptation,
    /// What came of it.
    pub result: TriedResult,
    /// When it is tried again.
    pub until: Timestamp,
}

/// What came of a change of the configuration.
#[derive(Clone, Debug, PartialEq)]
pub enum TriedResult {
    /// The server takes it only while the instance is stopped.
    NeedsStop,
    /// The server refused it, with these words.
    Refused(String),
    /// The server took it and shows something else.
    NotKept,
    /// Nobody knows, or the server was busy: with these words.
    Failed(String),
}

/// Whether nothing differs but what can be changed where the instance is.
pub(super) fn suffices(drift: &[Drift]) -> bool {
    drift.iter().all(|d| match d {
        Drift::WrongPower | Drift::WrongConfig | Drift::WrongDevices | Drift::WrongProfiles => true,
        Drift::WrongServer
        | Drift::WrongMember
        | Drift::WrongGroup
        | Drift::WrongProject
        | Drift::WrongPool
        | Drift::WrongName => false,
    })
}

/// The change of the configuration in its two parts.
struct Parts {
    at_once: Adaptation,
    stopped: Adaptation,
}

impl Parts {
    fn of(change: &Adaptation, located: &Located, world: &World, facts: &ServerFacts) -> Self {
        let i = &located.instance;
        if !i.may_run() {
            return Self {
                at_once: change.clone(),
                stopped: Adaptation::default(),
            };
        }
        let (at_once, stopped) = change.clone().split(i, facts);
        let tried = world.tried.as_ref();
        if tried.is_some_and(|t| t.result == TriedResult::NeedsStop && t.change == at_once) {
            return Self {
                at_once: Adaptation::default(),
                stopped: stopped.and(at_once),
            };
        }
        Self { at_once, stopped }
    }
}

/// What follows for an instance that is where it should be.
pub(super) fn decide(
    desired: &Desired,
    located: &Located,
    world: &World,
    facts: &ServerFacts,
    verdict: &mut Verdict,
    now: Timestamp,
) -> Result<Decision, Decision> {
    let change = Adaptation::of(&desired.spec.overrides, &located.instance, facts);
    let parts = Parts::of(&change, located, world, facts);
    let view = &world.servers[&desired.spec.target.server];
    let blockers = preflight::in_place(desired, located, view, &change);
    let restarts = !parts.stopped.is_empty();
    verdict.plan = Some(build::in_place(desired, located, &change, restarts, &blockers));
    if !blockers.is_empty() {
        return Err(Decision::Blocked(blockers));
    }
    gate::policy(desired, verdict)?;
    gate::approval(desired, verdict)?;
    // what was approved as one is done as one
    let as_one = restarts && desired.spec.approval == Approval::Manual;
    if !parts.at_once.is_empty() && !as_one {
        let decided = at_once(desired, located, world, parts.at_once, now);
        // what the server does not take does not keep the instance from being started or stopped
        if decided.is_ok() || !verdict.drift.contains(&Drift::WrongPower) {
            return decided;
        }
        return power(desired, located, verdict, now);
    }
    let shall_stop = desired.spec.power_state == PowerState::Stopped && located.instance.may_run();
    if restarts && !shall_stop {
        let what = if as_one { &change } else { &parts.stopped };
        return restart(desired, located, world, facts, verdict, what, now);
    }
    power(desired, located, verdict, now)
}

/// A change that is made now, unless the same one has just come to nothing.
fn at_once(
    desired: &Desired,
    located: &Located,
    world: &World,
    change: Adaptation,
    now: Timestamp,
) -> Result<Decision, Decision> {
    let server = &desired.spec.target.server;
    let tried = world.tried.as_ref().filter(|t| t.change == change && now < t.until);
    let again = |t: &Tried| t.until.round(jiff::Unit::Second).unwrap_or(t.until);
    match tried.map(|t| (&t.result, t)) {
        Some((TriedResult::Refused(why), t)) => {
            let message = format!(
                "{server} refuses {} of {}: {why}; tried again at {}",
                change.names(),
                located.at(),
                again(t)
            );
            let fix = format!(
                "correct spec.overrides: kubectl edit iplace -n {} {}",
                desired.namespace, desired.name
            );
            Err(Decision::Blocked(vec![Blocker::new(
                Reason::TargetRefused,
                message,
                Some(fix),
            )]))
        }
        Some((TriedResult::NotKept, _)) => Err(Decision::Blocked(vec![not_kept(desired, located, &change)])),
        Some((TriedResult::Failed(why), t)) => Err(Decision::Wait {
            reason: Reason::Updating,
            message: format!("{why}; tried again at {}", again(t)),
            until: Some(t.until),
        }),
        Some((TriedResult::NeedsStop, _)) | None => Ok(Decision::Adapt {
            server: located.server.clone(),
            at: located.at().clone(),
            change: Box::new(change),
        }),
    }
}

/// The server stores another spelling than the one declared: writing it again would never end.
fn not_kept(desired: &Desired, located: &Located, change: &Adaptation) -> Blocker {
    let i = &located.instance;
    // values that may be secret are not shown
    let shown = |key: &&String| {
        !["user.", "cloud-init.", "environment."]
            .iter()
            .any(|p| key.starts_with(p))
    };
    let config = change.config.keys().filter(shown).map(|key| {
        let value = i.expanded_config.get(key).map_or("", String::as_str);
        format!("{key}: {value:?}")
    });
    let devices = change.devices.keys().map(|name| {
        let device = i.expanded_devices.get(name).cloned().unwrap_or_default();
        let keys: Vec<String> = device.iter().map(|(k, v)| format!("{k}: {v:?}")).collect();
        format!("device {name}: {{{}}}", keys.join(", "))
    });
    let profiles = change.profiles.iter().map(|_| format!("profiles: {:?}", i.profiles));
    let stored: Vec<String> = config.chain(devices).chain(profiles).collect();
    let message = format!(
        "{} took {} of {} and shows something else than what is declared",
        located.server,
        change.names(),
        located.at()
    );
    let fix = format!(
        "write it in spec.overrides as the server does ({}): kubectl edit iplace -n {} {}",
        stored.join(", "),
        desired.namespace,
        desired.name
    );
    Blocker::new(Reason::InvalidSpec, message, Some(fix))
}

/// A change that needs a stop: if the instance may be stopped at all, and now.
fn restart(
    desired: &Desired,
    located: &Located,
    world: &World,
    facts: &ServerFacts,
    verdict: &mut Verdict,
    change: &Adaptation,
    now: Timestamp,
) -> Result<Decision, Decision> {
    let what = format!("{} of {} take effect only after a stop", change.names(), located.at());
    if !desired.spec.methods.contains(&Method::Cold) {
        let cli = facts.product.cli();
        let fix = format!(
            "add Cold to spec.methods, or stop it yourself (it is changed then) and start it again: on {}: {cli} stop --project {} {}",
            located.server,
            located.at().project,
            located.at().name
        );
        let message = format!("{what}, and spec.methods does not allow one");
        let blocker = Blocker::new(Reason::MethodImpossible, message, Some(fix));
        return Err(build::refuse(verdict, blocker));
    }
    gate::refused(desired, world)?;
    gate::history(desired, world, now)?;
    gate::windows(desired, Method::Cold, verdict, now).map_err(|closed| match closed {
        Decision::Wait { reason, message, until } => Decision::Wait {
            reason,
            message: format!("{what}, which {message}"),
            until,
        },
        other => other,
    })?;
    let digest = verdict.plan.as_ref().and_then(|p| p.digest.clone()).unwrap_or_default();
    Ok(Decision::Move(Box::new(build::restart(desired, located, digest))))
}

fn power(desired: &Desired, located: &Located, verdict: &Verdict, now: Timestamp) -> Result<Decision, Decision> {
    let action = match desired.spec.power_state {
        PowerState::Running => PowerAction::Start {
            stateful: located.instance.stateful,
        },
        PowerState::Stopped => PowerAction::Stop {
            timeout: desired.spec.stop.timeout.as_std(),
        },
        PowerState::Preserve => return Ok(Decision::InSync),
    };
    if matches!(action, PowerAction::Stop { .. }) {
        gate::windows(desired, Method::Cold, verdict, now)?;
    }
    Ok(Decision::Power {
        server: located.server.clone(),
        at: located.at().clone(),
        action,
        force: desired.spec.stop.force,
    })
}
