//! What Berth writes on servers: the marks, the guard, and names that only one intent ever used
//! (design "the move protocol"). Nothing else is ever written, and all of it is put back when a move ends.

use std::collections::BTreeMap;

use berth_api::GuardKind;
pub use berth_api::keys::{COPY_OF, GENERATION, GUARD_DEVICE as GUARD, MOVE, ROLE};
use jiff::Timestamp;

use crate::model::{Change, Definition, Device, Instance, InstanceKind, Snapshot};

/// The configuration keys that only Berth writes.
pub const KEYS: [&str; 4] = [MOVE, ROLE, GENERATION, COPY_OF];
/// The key that does the same on servers that have it.
pub const PROTECTION_START: &str = "security.protection.start";
/// The instance's name for cloud-init; changed by every rename.
pub const CLOUD_INIT_ID: &str = "volatile.cloud-init.instance-id";
/// Whether the host starts the instance when it boots.
pub const AUTOSTART: &str = "boot.autostart";
/// Whether the instance can be deleted.
pub const PROTECTION_DELETE: &str = "security.protection.delete";
/// Not a configuration key on the servers, but put back like one.
pub const EPHEMERAL: &str = "ephemeral";
/// Longest name that both products accept.
const NAME_MAX: usize = 63;

/// What an instance is in a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The instance that is to be moved.
    Source,
    /// The copy on its way in; never the one that may run.
    Incoming,
    /// The copy that became the instance.
    Owner,
    /// The former source, on its way out.
    Retired,
}

impl Role {
    /// The value of the mark.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Source => "source",
            Role::Incoming => "incoming",
            Role::Owner => "owner",
            Role::Retired => "retired",
        }
    }

    fn parse(s: &str) -> Option<Self> {
        [Role::Source, Role::Incoming, Role::Owner, Role::Retired]
            .into_iter()
            .find(|r| r.as_str() == s)
    }
}

/// The id of the move that an instance carries, if any.
pub fn move_id(i: &Instance) -> Option<&str> {
    i.config.get(MOVE).map(String::as_str).filter(|s| !s.is_empty())
}

/// The role that an instance carries, if any.
pub fn role(i: &Instance) -> Option<Role> {
    i.config.get(ROLE).and_then(|s| Role::parse(s))
}

/// Whether the servers refuse to delete the instance, in any of the words that they take for yes.
pub fn is_protected(i: &Instance) -> bool {
    let value = i.expanded_config.get(PROTECTION_DELETE);
    value.is_some_and(|v| ["true", "1", "yes", "on"].iter().any(|yes| v.eq_ignore_ascii_case(yes)))
}

/// Whether the instance is a copy that `InstanceCopy` keeps.
pub fn is_copy(i: &Instance) -> bool {
    i.config.get(COPY_OF).is_some_and(|s| !s.is_empty())
}

/// Whether the name belongs to copies on their way in or out.
pub fn is_unique_name(name: &str) -> bool {
    name.strip_prefix("berth-")
        .and_then(|r| r.split_once('-'))
        .is_some_and(|(random, _)| random.len() == 8)
}

/// A name that only one intent ever used: `berth-<random>-<name>`, cut to what servers accept.
pub fn unique_name(random: &str, name: &str) -> String {
    let mut s = format!("berth-{random}-{name}");
    s.truncate(NAME_MAX);
    s.trim_end_matches('-').to_owned()
}

/// A name for a temporary snapshot that only one intent ever used. It sorts after those that were taken before: Incus's btrfs
/// looks for the snapshot that differences are counted from among those whose names come before, and else sends everything
/// (*seen*).
pub fn temporary_snapshot(now: Timestamp, random: &str) -> String {
    format!("berth-{}-{random}", now.strftime("%Y%m%d%H%M%S%3f"))
}

/// Whether `name` is one that both products accept for an instance (fact sheet 12).
pub fn valid_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_MAX
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
        && !name.bytes().all(|b| b.is_ascii_digit())
        && name.as_bytes()[0].is_ascii_alphabetic()
}

/// The guard device of a kind of instance: it cannot start, and its error says why (lab facts 10 and 11).
pub fn guard_device(kind: InstanceKind, record: &str) -> Device {
    let why = format!("held-by-berth: not the copy that may run, see move {record}");
    let pairs: Vec<(&str, String)> = match kind {
        InstanceKind::Container => {
            let path = format!("/dev/{}", why.replace([' ', ':', ','], "-").replace("--", "-"));
            vec![("type", "unix-char".into()), ("source", path.clone()), ("path", path)]
        }
        InstanceKind::VirtualMachine => vec![
            ("type", "nic".into()),
            ("nictype", "bridged".into()),
            ("name", "berth0".into()),
            ("parent", why),
        ],
    };
    pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

/// Whether the instance carries the guard of that kind (a name guard is no mark: the caller compares names).
pub fn guarded(i: &Instance, guard: GuardKind) -> bool {
    match guard {
        GuardKind::Device => i.devices.contains_key(GUARD),
        GuardKind::ProtectionKey => i.config.get(PROTECTION_START).is_some_and(|v| v == "true"),
        GuardKind::Name | GuardKind::None => true,
    }
}

/// Adds to `change` what guards an instance of that kind.
pub fn add_guard(change: &mut Change, guard: GuardKind, kind: InstanceKind, record: &str) {
    match guard {
        GuardKind::Device => {
            change.devices.insert(GUARD.to_owned(), guard_device(kind, record));
        }
        GuardKind::ProtectionKey => {
            change.config.insert(PROTECTION_START.to_owned(), "true".to_owned());
        }
        GuardKind::Name | GuardKind::None => {}
    }
}

/// The three marks of a move.
pub fn marks(record: &str, role: Role, attempt: i64) -> BTreeMap<String, String> {
    BTreeMap::from([
        (MOVE.to_owned(), record.to_owned()),
        (ROLE.to_owned(), role.as_str().to_owned()),
        (GENERATION.to_owned(), attempt.to_string()),
    ])
}

/// Removes guard and marks from a definition. A protection key set by a person is put back by the caller.
pub fn strip(definition: &mut Definition, guard: GuardKind) {
    definition.devices.remove(GUARD);
    definition.config.retain(|k, _| !k.starts_with("volatile.berth-guard."));
    for key in [MOVE, ROLE, GENERATION] {
        definition.config.remove(key);
    }
    if guard == GuardKind::ProtectionKey {
        definition.config.remove(PROTECTION_START);
    }
}

/// Whether two lists of snapshots hold the same ones, by name and date (whole seconds: migrations carry no more).
/// Snapshots in `actual` that `expected` does not have are tolerated; an expired one may be missing.
pub fn missing_snapshot<'a>(
    expected: &'a [Snapshot],
    actual: &[Snapshot],
    now: jiff::Timestamp,
) -> Option<&'a Snapshot> {
    let seconds = |s: &str| s.parse::<jiff::Timestamp>().map(jiff::Timestamp::as_second).ok();
    expected.iter().find(|e| {
        let expired = e
            .expires_at
            .as_deref()
            .and_then(seconds)
            .is_some_and(|t| t > 0 && t <= now.as_second());
        let there = actual
            .iter()
            .any(|a| a.name == e.name && seconds(&a.created_at) == seconds(&e.created_at));
        !there && !expired
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unique_name_is_cut_to_what_servers_accept_and_never_ends_in_a_dash() {
        let long = format!("{}-{}", "a".repeat(47), "b".repeat(10));
        let name = unique_name("x7k2p9q3", &long);
        assert!(name.len() <= 63 && !name.ends_with('-') && valid_name(&name), "{name}");
        assert!(is_unique_name(&name));
        assert!(!is_unique_name("berth-web"));
    }

    #[test]
    fn the_guard_of_a_container_names_the_move_in_its_error() {
        let d = guard_device(InstanceKind::Container, "web-1-x7k2p");
        assert_eq!(
            d["source"],
            "/dev/held-by-berth-not-the-copy-that-may-run-see-move-web-1-x7k2p"
        );
    }
}
