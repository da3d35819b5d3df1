//! Which configuration keys a server knows. Both products refuse an instance, and a snapshot, with a key that they do not
//! know; what an unknown key meant cannot be had there anyway. What is not in this table is taken to be known everywhere:
//! the server's own refusal teaches the rest ([`refused_key`]).

use crate::model::{Config, InstanceKind, Product, ServerFacts};

/// What a server must have to know the keys of a family.
enum Needs {
    /// The API extension that came with them.
    Extension(&'static str),
    /// The product; no extension announces them.
    Product(Product),
}

use InstanceKind::Container;
use Needs::{Extension, Product as Only};
use Product::{Incus, Lxd};

/// Key families: a key, a beginning (`oci.*`) or an ending (`volatile.*.io.bus`), and the kind of instance that it is new
/// for (`None`: both). Sources: the lists of both products' documentation, and each key asked of Incus 6.0.4, Incus 7.0.2 and
/// LXD 5.0.2 (`create` of an empty container with it).
const FAMILIES: [(&str, Option<InstanceKind>, Needs); 35] = [
    ("boot.autorestart", None, Extension("instance_auto_restart")),
    ("boot.debug_edk2", None, Only(Lxd)),
    (
        "boot.host_shutdown_action",
        None,
        Extension("boot_host_shutdown_action"),
    ),
    ("boot.mode", None, Only(Lxd)),
    ("initial.nvram*", None, Extension("instance_nvram_config")),
    ("initial.secureboot.*", None, Extension("instance_nvram_config")),
    ("limits.cpu.nodes", None, Extension("numa_cpu_placement")),
    ("limits.max_bus_ports", None, Only(Lxd)),
    ("limits.memory.hotplug", None, Extension("limits_memory_hotplug")),
    ("limits.memory.oom_priority", None, Extension("instance_limits_oom")),
    (
        "migration.stateful",
        Some(Container),
        Extension("container_migration_stateful"),
    ),
    ("oci.*", None, Extension("instance_oci")),
    ("placement.group", None, Extension("instance_placement_groups")),
    ("raw.qemu.qmp.*", None, Extension("qemu_raw_qmp")),
    ("raw.qemu.scriptlet", None, Extension("qemu_scriptlet")),
    ("security.bpffs.*", None, Extension("bpf_token_delegation")),
    ("security.csm", None, Extension("security_csm")),
    ("security.delegate_bpf*", None, Only(Lxd)),
    ("security.devlxd*", None, Only(Lxd)),
    ("security.guestapi*", None, Only(Incus)),
    ("security.iommu", None, Extension("security_iommu")),
    (
        "security.protection.start",
        None,
        Extension("instance_protection_start"),
    ),
    ("security.selinux.*", None, Extension("instance_selinux")),
    ("security.sev*", None, Extension("amd_sev")),
    (
        "security.syscalls.intercept.sysinfo",
        None,
        Extension("container_syscall_intercept_sysinfo"),
    ),
    ("security.tags", None, Extension("instance_security_tags")),
    ("smbios11.*", None, Extension("instance_smbios11")),
    ("snapshots.expiry.manual", None, Extension("snapshot_manual_expiry")),
    ("systemd.credential*", None, Extension("instance_systemd_credentials")),
    ("ubuntu_pro.guest_attach", None, Only(Lxd)),
    ("volatile.*.io.bus", None, Extension("network_io_bus")),
    ("volatile.container.oci", None, Extension("instance_oci")),
    ("volatile.last_state.ready", None, Extension("instance_ready_state")),
    ("volatile.uuid.generation", None, Extension("instance_generation_id")),
    ("volatile.vm.*", None, Only(Incus)),
];

fn is_of(key: &str, family: &str) -> bool {
    match family.split_once('*') {
        None => key == family,
        Some((begin, end)) => key.len() >= begin.len() + end.len() && key.starts_with(begin) && key.ends_with(end),
    }
}

/// Whether the server knows the key for that kind of instance.
pub fn knows(facts: &ServerFacts, kind: InstanceKind, key: &str) -> bool {
    FAMILIES
        .iter()
        .filter(|(family, of, _)| of.is_none_or(|k| k == kind) && is_of(key, family))
        .all(|(_, _, needs)| match needs {
            Extension(name) => facts.extensions.contains(*name),
            Only(product) => facts.product == *product,
        })
}

/// The keys that the server does not know.
pub fn unknown_keys<'a>(
    config: &'a Config,
    kind: InstanceKind,
    facts: &'a ServerFacts,
) -> impl Iterator<Item = &'a String> {
    config.keys().filter(move |key| !knows(facts, kind, key))
}

/// The key in a server's refusal of an unknown one, of itself or of a snapshot's. The words are alike on all versions of
/// both products.
pub fn refused_key(message: &str) -> Option<&str> {
    const WORDS: &str = "nknown configuration key: ";
    let (_, rest) = message.split_once(WORDS)?;
    let end = rest
        .find(|c: char| c.is_whitespace() || [';', ',', '"', ')'].contains(&c))
        .unwrap_or(rest.len());
    Some(rest[..end].trim_end_matches(['.', ':'])).filter(|key| !key.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_a_key_a_beginning_or_an_ending() {
        assert!(is_of("oci.uid", "oci.*") && !is_of("oci", "oci.*"));
        assert!(is_of("volatile.eth0.io.bus", "volatile.*.io.bus") && !is_of("volatile.io.bus", "volatile.*.io.bus"));
        assert!(!is_of("security.csm.more", "security.csm"));
    }

    #[test]
    fn the_key_is_found_in_what_servers_say() {
        let said = [
            "Failed creating instance record: Unknown configuration key: volatile.uuid.generation",
            "t: Failed creating instance snapshot record \"c/s0\": Unknown configuration key: volatile.uuid.generation; s: websocket: close",
        ];
        for message in said {
            assert_eq!(refused_key(message), Some("volatile.uuid.generation"));
        }
        assert_eq!(refused_key("Instance is busy"), None);
        assert_eq!(refused_key("Unknown configuration key: "), None);
    }
}
