//! What of an instance does not travel: keys that the target does not know, snapshots that are left out, backups. It is
//! said beforehand, and what cannot be left out without asking is refused.

use std::collections::BTreeSet;

use berth_api::{Outcome, Reason, Snapshots, Transfer};

use super::Blocker;
use super::methods::Case;
use super::world::{Located, World};
use crate::marks;
use crate::model::{Contents, ServerFacts, Snapshot};
use crate::travel;

/// As many as a status can show.
const SHOWN: usize = 256;

/// What stays behind.
#[derive(Default)]
pub(super) struct Dropped {
    /// Configuration keys, for the record.
    pub keys: Vec<String>,
    /// Everything, for people.
    pub shown: Vec<String>,
}

/// What stays behind in a move, and what stands against it.
pub(super) fn dropped(case: &Case<'_>, world: &World, blockers: &mut Vec<Blocker>) -> Dropped {
    let nothing = Contents::default();
    let contents = world.contents.as_ref().unwrap_or(&nothing);
    let mut dropped = Dropped::default();
    let leaves_snapshots = case.desired.spec.snapshots == Snapshots::Exclude;
    if case.transfer == Transfer::Internal {
        let changes_volume = case.located.instance.root_pool() != case.to.pool.as_deref()
            || case.located.at().project != case.to.project;
        let changes_member = case.located.instance.member != case.to.member;
        if leaves_snapshots && changes_volume && !changes_member {
            dropped.shown.extend(contents.snapshots.iter().map(shown));
        }
        if changes_volume || changes_member {
            backups_in_the_way(case, contents, blockers);
        }
        return dropped;
    }
    dropped.keys = unknown_keys(case, world, blockers);
    dropped.shown.clone_from(&dropped.keys);
    if leaves_snapshots {
        dropped.shown.extend(contents.snapshots.iter().map(shown));
    } else {
        snapshots_can_travel(case, &contents.snapshots, blockers);
    }
    dropped
        .shown
        .extend(contents.backups.iter().map(|name| format!("backup {name}")));
    dropped.shown.truncate(SHOWN);
    if world.contents.is_some() {
        volumes_are_there(case, contents, blockers);
    }
    dropped
}

fn shown(snapshot: &Snapshot) -> String {
    format!("snapshot {}", snapshot.name)
}

fn server<'a>(case: &'a Case<'_>) -> &'a str {
    &case.desired.spec.target.server
}

/// The keys that the target does not know: by the table, and by what it refused in the attempt before.
fn unknown_keys(case: &Case<'_>, world: &World, blockers: &mut Vec<Blocker>) -> Vec<String> {
    let unknown = |key: &String| is_unknown(key, case.located, case.target, &learned(case.target, world));
    let overrides = &case.desired.spec.overrides;
    if let Some(key) = overrides.config.keys().find(|k| unknown(k)) {
        let message = format!(
            "{} runs {} {}, which does not know the key {key} of spec.overrides.config",
            server(case),
            case.target.product.as_str(),
            case.target.version
        );
        let fix = format!(
            "kubectl patch iplace -n {} {} --type merge -p '{{\"spec\":{{\"overrides\":{{\"config\":{{\"{key}\":null}}}}}}}}'",
            case.desired.namespace, case.desired.name
        );
        blockers.push(Blocker::new(Reason::InvalidSpec, message, Some(fix)));
    }
    let stays = |key: &&String| !overrides.remove_config.contains(*key);
    let keys = unknown_there(case.located, case.target, world);
    keys.into_iter().filter(|k| stays(&k)).collect()
}

fn is_unknown(key: &str, located: &Located, target: &ServerFacts, learned: &BTreeSet<String>) -> bool {
    learned.contains(key) || !travel::knows(target, located.instance.kind, key)
}

/// The keys of the instance that the target does not know, whatever becomes of them.
pub(super) fn unknown_there(located: &Located, target: &ServerFacts, world: &World) -> Vec<String> {
    let learned = learned(target, world);
    let keys = located.instance.config.keys();
    let ours = |key: &&String| marks::KEYS.contains(&key.as_str());
    keys.filter(|k| !ours(k) && is_unknown(k, located, target, &learned))
        .cloned()
        .collect()
}

/// What the last attempt at the same target found out about it.
fn learned(target: &ServerFacts, world: &World) -> BTreeSet<String> {
    let last = world.last_attempt();
    let same =
        last.filter(|r| r.status.outcome() == Some(Outcome::Undone) && r.spec.to.fingerprint == target.fingerprint);
    let keys = same.map(|r| r.spec.dropped.iter().chain(&r.status.refused_key).cloned());
    keys.into_iter().flatten().collect()
}

/// A snapshot's configuration travels inside the stream, where nothing can be left out.
fn snapshots_can_travel(case: &Case<'_>, snapshots: &[Snapshot], blockers: &mut Vec<Blocker>) {
    let kind = case.located.instance.kind;
    let stuck: Vec<(&Snapshot, &String)> = snapshots
        .iter()
        .filter_map(|s| Some((s, travel::unknown_keys(&s.config, kind, case.target).next()?)))
        .collect();
    let Some((_, key)) = stuck.first() else { return };
    let names: Vec<&str> = stuck.iter().map(|(s, _)| s.name.as_str()).take(8).collect();
    let message = format!(
        "{} of {} ({}{}) cannot be brought to {}: {} {} does not know their key {key}",
        if stuck.len() == 1 { "a snapshot" } else { "snapshots" },
        case.located.at(),
        names.join(", "),
        if stuck.len() > names.len() { ", …" } else { "" },
        server(case),
        case.target.product.as_str(),
        case.target.version,
    );
    let fix = format!(
        "kubectl patch iplace -n {} {} --type merge -p '{{\"spec\":{{\"snapshots\":\"Exclude\"}}}}' (they are deleted with the source)",
        case.desired.namespace, case.desired.name
    );
    blockers.push(Blocker::new(Reason::SnapshotsCannotTravel, message, Some(fix)));
}

/// Custom volumes do not travel with an instance: each must be there already, under the same name.
fn volumes_are_there(case: &Case<'_>, contents: &Contents, blockers: &mut Vec<Blocker>) {
    let i = &case.located.instance;
    let overrides = &case.desired.spec.overrides;
    for (device, pool, volume) in i.attached_volumes() {
        let replaced = overrides.devices.contains_key(device) || overrides.remove_devices.iter().any(|d| d == device);
        if replaced || contents.volumes.contains(&(pool.to_owned(), volume.to_owned())) {
            continue;
        }
        let message = format!(
            "device {device} of {} attaches volume {volume} of pool {pool}, which {} does not have: custom volumes do not travel with an instance",
            i.at,
            server(case)
        );
        let fix = format!(
            "copy it there under the same name ({} storage volume copy SOURCE:{pool}/{volume} TARGET:{pool}/{volume}, the instance being stopped), or set spec.overrides.devices.{device} or spec.overrides.removeDevices: [{device}]",
            case.target.product.cli()
        );
        blockers.push(Blocker::new(Reason::VolumeNotFound, message, Some(fix)));
    }
}

/// Both products refuse to move an instance that has backups to another member, pool or project.
fn backups_in_the_way(case: &Case<'_>, contents: &Contents, blockers: &mut Vec<Blocker>) {
    let Some(first) = contents.backups.first() else { return };
    let at = case.located.at();
    let cli = case.target.product.cli();
    let message = format!(
        "{at} has {} on {} (the first is {first}), and a server moves no instance that has",
        if contents.backups.len() == 1 {
            "a backup"
        } else {
            "backups"
        },
        case.located.server
    );
    let fix = format!(
        "on {}, unless it is still needed: {cli} query -X DELETE --wait '/1.0/instances/{}/backups/{first}?project={}'",
        case.located.server, at.name, at.project
    );
    blockers.push(Blocker::new(Reason::BackupsInTheWay, message, Some(fix)));
}
