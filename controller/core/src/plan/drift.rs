//! What differs between a placement and its instance. What the placement does not declare is never drift.

use berth_api::placement::{Drift, PowerState};
use berth_api::present;

use super::world::{Desired, Located, World};
use crate::model::{Power, ServerFacts};
use crate::overrides::Adaptation;

/// Everything that differs, in the order of the reasons.
pub(super) fn drift(desired: &Desired, located: &Located, world: &World) -> Vec<Drift> {
    let target = &desired.spec.target;
    let i = &located.instance;
    let view = &world.servers[&target.server];
    let elsewhere = view.fingerprint() != Some(located.fingerprint.as_str());
    let mut drift = Vec::new();
    let mut add = |is: bool, what: Drift| {
        if is {
            drift.push(what);
        }
    };
    add(elsewhere, Drift::WrongServer);
    if !elsewhere {
        let facts = view.facts.as_deref();
        add(
            present(&target.member).is_some_and(|m| i.member.as_deref() != Some(m)),
            Drift::WrongMember,
        );
        add(
            present(&target.group).is_some_and(|g| !in_group(facts, i.member.as_deref(), g)),
            Drift::WrongGroup,
        );
    }
    add(
        present(&target.project).is_some_and(|p| p != i.at.project),
        Drift::WrongProject,
    );
    add(
        desired.target_pool(i).is_some_and(|p| i.root_pool() != Some(p)),
        Drift::WrongPool,
    );
    add(desired.target_name() != i.at.name, Drift::WrongName);
    let wrong_power = match desired.spec.power_state {
        PowerState::Preserve => false,
        PowerState::Running => i.power == Power::Stopped,
        PowerState::Stopped => matches!(i.power, Power::Running | Power::Frozen),
    };
    add(wrong_power, Drift::WrongPower);
    let here = world.servers.get(&located.server).and_then(|v| v.facts.as_deref());
    if let Some(facts) = here {
        let change = Adaptation::of(&desired.spec.overrides, i, facts);
        add(!change.config.is_empty(), Drift::WrongConfig);
        add(!change.devices.is_empty(), Drift::WrongDevices);
        add(change.profiles.is_some(), Drift::WrongProfiles);
    }
    drift
}

/// Whether the member belongs to the group.
pub(super) fn in_group(facts: Option<&ServerFacts>, member: Option<&str>, group: &str) -> bool {
    let member = facts.zip(member).and_then(|(f, m)| f.member(m));
    member.is_some_and(|m| m.groups.iter().any(|g| g == group))
}
