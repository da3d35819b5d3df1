//! The definition of the copy that a transfer makes: the source's own configuration and devices (never the expanded
//! ones), guarded, marked as incoming, with the placement's overrides and a root disk on the verified pool.

use berth_api::{InstanceMoveSpec, Method};

use crate::marks::{self, Role};
use crate::model::{Change, Config, Definition, Device, Instance, ServerFacts};
use crate::overrides::{self, is_root};

/// Whether a key belongs to the server that holds the instance and must not travel (fact sheet 4).
fn stays_behind(key: &str) -> bool {
    const KEYS: [&str; 8] = [
        "volatile.last_state.power",
        "volatile.last_state.ready",
        "volatile.last_state.agent",
        "volatile.last_state.agent.once",
        "volatile.evacuate.origin",
        "volatile.cluster.group",
        "volatile.rebalance.last_move",
        "volatile.cpu.nodes",
    ];
    let of_device = key.starts_with("volatile.") && (key.ends_with(".host_name") || key.contains(".last_state."));
    KEYS.contains(&key)
        || key.starts_with("volatile.berth-guard.")
        || (of_device && !key.starts_with("volatile.last_state."))
}

/// The definition of the incoming copy of `source` on a server of which `target` is known.
pub fn incoming_definition(
    spec: &InstanceMoveSpec,
    record: &str,
    source: &Instance,
    target: &ServerFacts,
) -> Definition {
    let mut definition = Definition::from(source);
    definition
        .config
        .retain(|k, _| !stays_behind(k) && k != marks::PROTECTION_START && !spec.dropped.contains(k));
    definition.devices.remove(marks::GUARD);
    definition.ephemeral = false;
    overrides::apply(&mut definition, &spec.overrides, source);
    add_root(&mut definition, spec, source, target);
    definition
        .config
        .extend(marks::marks(record, Role::Incoming, spec.attempt));
    definition
        .config
        .insert(marks::AUTOSTART.to_owned(), "false".to_owned());
    // it could not be unset again while the instance runs on every server, so a live copy gets it only where it must
    let protected = definition
        .config
        .get(marks::PROTECTION_DELETE)
        .is_some_and(|v| v == "true");
    if spec.method != Method::Live || protected {
        definition
            .config
            .insert(marks::PROTECTION_DELETE.to_owned(), "false".to_owned());
    }
    let mut guard = Change::default();
    marks::add_guard(&mut guard, spec.guard.target, source.kind, record);
    definition.config.extend(guard.config);
    definition.devices.extend(guard.devices);
    definition
}

/// Servers silently replace a pool that they do not have (fact sheet 4), so the root disk always names the verified one,
/// unless the profiles on the target give just that.
fn add_root(definition: &mut Definition, spec: &InstanceMoveSpec, source: &Instance, target: &ServerFacts) {
    let Some(pool) = spec.to.pool.as_deref() else { return };
    if let Some(root) = definition.devices.values_mut().find(|d| is_root(d)) {
        root.insert("pool".to_owned(), pool.to_owned());
        return;
    }
    let inherited = definition
        .profiles
        .iter()
        .rev()
        .filter_map(|p| target.profile(&spec.to.project, p))
        .find_map(|p| p.devices.values().find(|d| is_root(d)));
    let (name, wanted) = match source.root_device() {
        Some((name, device)) => (name.to_owned(), device.clone()),
        None => ("root".to_owned(), Device::new()),
    };
    let mut wanted = wanted;
    wanted.extend([("type", "disk"), ("path", "/"), ("pool", pool)].map(|(k, v)| (k.to_owned(), v.to_owned())));
    if inherited != Some(&wanted) {
        definition.devices.insert(name, wanted);
    }
}

/// The part of a configuration that a person sees: no `volatile.*`, no marks.
pub fn plain_config(config: &Config) -> Config {
    let plain = |k: &str| !k.starts_with("volatile.") && !marks::KEYS.contains(&k);
    config
        .iter()
        .filter(|(k, _)| plain(k))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect()
}
