//! What a copy is: the source's own configuration with the overrides, an identity of its own, and the one mark that says
//! what it is a copy of. It is never started by the host that it is on.

use berth_api::{GuardPair, InstanceMoveSpec};

use super::record::CopyRecord;
use crate::marks::{self, Role};
use crate::model::{Change, Config, Definition, Devices, Instance, ServerFacts};
use crate::moves::incoming_definition;
use berth_api::copy::CopyWork;

/// What a copy keeps of the source's volatile keys; all others are the identity of another instance, or its host's
/// (fact sheet 4).
const KEPT: [&str; 2] = ["volatile.base_image", "volatile.apply_nvram"];

/// The plan of the transfer, in the terms of a move: what both do alike is decided in one place.
fn spec_of(record: &CopyRecord, work: &CopyWork) -> InstanceMoveSpec {
    InstanceMoveSpec {
        guard: GuardPair {
            source: Default::default(),
            target: work.guard,
        },
        transfer: work.transfer,
        from: work.from.clone(),
        to: work.to.clone(),
        snapshots: record.spec.snapshots,
        overrides: record.spec.overrides.clone(),
        dropped: work.dropped.clone(),
        ..InstanceMoveSpec::default()
    }
}

/// The copy at rest, as the body of a request and as it is checked.
pub(super) fn resting(record: &CopyRecord, work: &CopyWork, source: &Instance, target: &ServerFacts) -> Definition {
    let mut spec = spec_of(record, work);
    spec.guard.target = Default::default();
    let mut definition = incoming_definition(&spec, &record.name, source, target);
    definition
        .config
        .retain(|k, _| KEPT.contains(&k.as_str()) || !k.starts_with("volatile."));
    for key in marks::KEYS.into_iter().chain([marks::PROTECTION_DELETE]) {
        definition.config.remove(key);
    }
    let of = source.uuid().unwrap_or("unknown").to_owned();
    definition.config.insert(marks::COPY_OF.to_owned(), of);
    definition
}

/// The same while data arrive: guarded, and marked as not usable.
pub(super) fn arriving(record: &CopyRecord, work: &CopyWork, source: &Instance, target: &ServerFacts) -> Definition {
    let mut definition = resting(record, work, source, target);
    let change = held(record, work, source.kind);
    definition.config.extend(change.config);
    definition.devices.extend(change.devices);
    definition
}

/// What holds an existing copy: the same as a change.
pub(super) fn held(record: &CopyRecord, work: &CopyWork, kind: crate::model::InstanceKind) -> Change {
    let mut change = Change::default();
    change
        .config
        .insert(marks::ROLE.to_owned(), Role::Incoming.as_str().to_owned());
    marks::add_guard(&mut change, work.guard, kind, &format!("of-copy-{}", record.name));
    change
}

/// The definition that ends a refresh: the source's configuration, with what makes the copy itself kept.
pub(super) fn settled(copy: &Instance, wanted: Option<Definition>, work: &CopyWork) -> Definition {
    let mut definition = Definition::from(copy);
    marks::strip(&mut definition, work.guard);
    let Some(wanted) = wanted else { return definition };
    let own: Config = definition
        .config
        .into_iter()
        .filter(|(k, _)| k.starts_with("volatile.") && !KEPT.contains(&k.as_str()))
        .collect();
    let devices = with_root(copy, wanted.devices.clone());
    let mut config = wanted.config.clone();
    config.extend(own);
    Definition {
        config,
        devices,
        ..wanted
    }
}

/// Servers add the root disk to the copy's own devices where it comes from a profile: it stays where it is.
fn with_root(copy: &Instance, mut devices: Devices) -> Devices {
    let is_root = |d: &crate::model::Device| d.get("path").is_some_and(|p| p == "/");
    let own = copy.devices.iter().find(|(_, d)| is_root(d));
    if let Some((name, device)) = own.filter(|_| !devices.values().any(is_root)) {
        devices.insert(name.clone(), device.clone());
    }
    devices
}
