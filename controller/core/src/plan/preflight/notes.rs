//! What a person should know of a move that nothing stands against.

use berth_api::{Location, Reason};

use crate::model::{Profile, ServerFacts};
use crate::plan::Blocker;
use crate::plan::world::{Desired, Located};

/// Profiles of one name that say different things on the two servers.
pub(in crate::plan) fn notes(
    desired: &Desired,
    located: &Located,
    source: &ServerFacts,
    target: &ServerFacts,
    to: &Location,
) -> Vec<Blocker> {
    let overrides = &desired.spec.overrides;
    let profiles = match (overrides.no_profiles, overrides.profiles.as_slice()) {
        (true, _) => &[][..],
        (false, []) => located.instance.profiles.as_slice(),
        (false, profiles) => profiles,
    };
    let differing = profiles.iter().filter_map(|name| {
        let here = source.profile(&located.at().project, name)?;
        let there = target.profile(&to.project, name)?;
        let what = differences(here, there);
        if what.is_empty() {
            return None;
        }
        let message = format!(
            "profile {name} of {} is not that of {}: {}",
            to.server,
            located.server,
            what.join(", ")
        );
        let fix = format!(
            "make them equal, or declare in spec.overrides what {} is to have there",
            located.at()
        );
        Some(Blocker::new(Reason::ProfileDiffers, message, Some(fix)))
    });
    differing.collect()
}

/// Names of the keys and devices in which two profiles differ.
fn differences(a: &Profile, b: &Profile) -> Vec<String> {
    let mut keys: Vec<&String> = a.config.keys().chain(b.config.keys()).collect();
    keys.sort();
    keys.dedup();
    let mut devices: Vec<&String> = a.devices.keys().chain(b.devices.keys()).collect();
    devices.sort();
    devices.dedup();
    let keys = keys
        .into_iter()
        .filter(|k| a.config.get(*k) != b.config.get(*k))
        .cloned();
    let devices = devices
        .into_iter()
        .filter(|d| a.devices.get(*d) != b.devices.get(*d))
        .map(|d| format!("device {d}"));
    keys.chain(devices).collect()
}
