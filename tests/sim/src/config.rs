//! Rules of configuration and devices: entity tags, what profiles add, what a server refuses to write and what keeps an
//! instance from starting.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use berth_core::marks;
use berth_core::model::{Config, Device, Devices, InstanceKind, InstanceRef, Product};

use crate::state::{Content, Host, Inst};

/// The entity tag: architecture, ephemeral, profiles, own devices and own configuration with all volatile keys; not the
/// description, not the power state as such.
pub(crate) fn etag(i: &Inst) -> String {
    let mut hasher = DefaultHasher::new();
    (&i.architecture, i.ephemeral, &i.profiles, &i.devices, &i.config).hash(&mut hasher);
    format!("\"{:016x}\"", hasher.finish())
}

/// Configuration and devices with the profiles applied.
pub(crate) fn expand(host: &Host, project: &str, i: &Inst) -> (Config, Devices) {
    let (mut config, mut devices) = (Config::new(), Devices::new());
    for profile in i.profiles.iter().filter_map(|p| host.profile(project, p)) {
        config.extend(profile.config.clone());
        devices.extend(profile.devices.clone());
    }
    config.extend(i.config.clone());
    devices.extend(i.devices.clone());
    devices.retain(|_, d| kind(d) != "none");
    (config, devices)
}

fn kind(device: &Device) -> &str {
    device.get("type").map_or("", String::as_str)
}

fn get<'a>(device: &'a Device, key: &str) -> Option<&'a str> {
    device.get(key).map(String::as_str).filter(|v| !v.is_empty())
}

pub(crate) fn is_root(device: &Device) -> bool {
    kind(device) == "disk" && get(device, "path") == Some("/")
}

/// Names of the network interfaces among the expanded devices.
pub(crate) fn nics(host: &Host, project: &str, i: &Inst) -> BTreeSet<String> {
    let (_, devices) = expand(host, project, i);
    devices
        .into_iter()
        .filter(|(_, d)| kind(d) == "nic")
        .map(|(n, _)| n)
        .collect()
}

/// Whether a change gives the instance a new `volatile.cloud-init.instance-id`.
pub(crate) fn renews_cloud_init(host: &Host, project: &str, before: &Inst, after: &Inst) -> bool {
    let inputs = |i: &Inst| -> Config {
        let (config, _) = expand(host, project, i);
        let input = |k: &str| {
            k.starts_with("cloud-init.") || matches!(k, "user.user-data" | "user.vendor-data" | "user.network-config")
        };
        config.into_iter().filter(|(k, _)| input(k)).collect()
    };
    nics(host, project, before) != nics(host, project, after) || inputs(before) != inputs(after)
}

/// Why the server refuses to store `after` (where `before` is what it has now).
pub(crate) fn refusal(host: &Host, project: &str, before: Option<&Inst>, after: &Inst) -> Option<String> {
    if let Some(p) = after.profiles.iter().find(|p| host.profile(project, p).is_none()) {
        return Some(format!("Requested profile \"{p}\" doesn't exist"));
    }
    if let Some(key) = after.config.keys().find(|k| !known_key(host, k)) {
        return Some(format!("Unknown configuration key: {key}"));
    }
    if let Some(before) = before {
        let idmap = |k: &&String| k.starts_with("volatile.idmap.") || *k == "volatile.last_state.idmap";
        if before
            .config
            .keys()
            .filter(idmap)
            .any(|k| !after.config.contains_key(k))
        {
            return Some("Volatile idmap keys can't be deleted by the user".to_owned());
        }
    }
    let (_, devices) = expand(host, project, after);
    let nic_names: Vec<&str> = devices
        .iter()
        .filter(|(_, d)| kind(d) == "nic")
        .map(|(n, d)| get(d, "name").unwrap_or(n))
        .collect();
    if nic_names.iter().collect::<BTreeSet<_>>().len() != nic_names.len() {
        return Some("Failed validating devices: Duplicate NIC name".to_owned());
    }
    let wrong = devices
        .iter()
        .find_map(|(name, d)| invalid_device(host, after.kind, name, d));
    wrong.or_else(|| restriction(host, project, before, after))
}

/// Why a change has to wait until the instance has stopped.
pub(crate) fn needs_stop(before: &Inst, after: &Inst) -> Option<String> {
    if !before.runs() || before.kind == InstanceKind::Container {
        return None;
    }
    let fixed = |key: &&String| key.starts_with("migration.") || key.starts_with("raw.");
    let mut keys = before.config.keys().chain(after.config.keys()).filter(fixed);
    let key = keys.find(|key| before.config.get(*key) != after.config.get(*key))?;
    Some(format!("Key \"{key}\" cannot be updated when VM is running"))
}

/// What LXD 5.0 answers to a change of `user.*` that it has made, where no agent in the guest can be told.
pub(crate) fn nobody_listens(host: &Host, before: &Inst, after: &Inst) -> Option<String> {
    let told = host.product == Product::Lxd && before.runs() && before.kind == InstanceKind::VirtualMachine;
    let mut keys = before.config.keys().chain(after.config.keys());
    let changed = keys.any(|key| key.starts_with("user.") && before.config.get(key) != after.config.get(key));
    (told && changed).then(|| "LXD VM agent isn't currently running".to_owned())
}

fn known_key(host: &Host, key: &str) -> bool {
    const PREFIXES: [&str; 14] = [
        "boot.",
        "limits.",
        "security.",
        "user.",
        "volatile.",
        "image.",
        "raw.",
        "migration.",
        "cloud-init.",
        "cluster.",
        "snapshots.",
        "environment.",
        "linux.",
        "agent.",
    ];
    if key == marks::PROTECTION_START {
        return host.has("instance_protection_start");
    }
    let foreign = host.product == Product::Lxd && key == "volatile.last_state.ready";
    !foreign && PREFIXES.iter().any(|p| key.starts_with(p))
}

fn invalid_device(host: &Host, instance: InstanceKind, name: &str, d: &Device) -> Option<String> {
    match kind(d) {
        "unix-char" | "unix-block" if instance == InstanceKind::VirtualMachine => {
            Some(format!("Invalid devices: Device validation failed for \"{name}\": Unsupported device type"))
        }
        "nic" => get(d, "network").filter(|n| !host.networks.iter().any(|have| have.name == *n)).map(|n| {
            format!("Failed initializing device \"{name}\": Failed to load network \"{n}\" for project \"default\": Network not found")
        }),
        "disk" if !is_root(d) => get(d, "source")
            .filter(|s| s.contains("missing"))
            .map(|s| format!("Failed to add device \"{name}\": Missing source path \"{s}\" for disk \"{name}\"")),
        "" => Some(format!("Missing device type in device \"{name}\"")),
        _ => None,
    }
}

/// What a restricted project does not allow.
fn restriction(host: &Host, project: &str, before: Option<&Inst>, after: &Inst) -> Option<String> {
    let project = host.project(project).filter(|p| p.restricted())?;
    let allowed = |key: &str| project.config.get(key).is_some_and(|v| v == "allow");
    for (name, d) in &after.devices {
        let forbidden = match kind(d) {
            "unix-char" => !allowed("restricted.devices.unix-char"),
            "nic" => get(d, "network").is_none() && !allowed("restricted.devices.nic"),
            _ => false,
        };
        if forbidden {
            return Some(format!(
                "Device \"{name}\" of type \"{}\" is forbidden in project \"{}\"",
                kind(d),
                project.name
            ));
        }
    }
    let id = |i: &Inst| i.config.get(marks::CLOUD_INIT_ID).cloned();
    if before.is_some_and(|b| id(b) != id(after)) {
        return Some(format!(
            "Use of \"{}\" is forbidden in project \"{}\"",
            marks::CLOUD_INIT_ID,
            project.name
        ));
    }
    None
}

/// Why a device cannot start on this host.
pub(crate) fn unstartable_device(host: &Host, name: &str, d: &Device) -> Option<String> {
    let failed = |why: String| Some(format!("Failed to start device \"{name}\": {why}"));
    match kind(d) {
        "unix-char" | "unix-block" => {
            const THERE: [&str; 5] = ["/dev/null", "/dev/zero", "/dev/fuse", "/dev/net/tun", "/dev/kvm"];
            let source = get(d, "source").or_else(|| get(d, "path")).unwrap_or("");
            let optional = get(d, "required") == Some("false");
            if optional || THERE.contains(&source) {
                None
            } else {
                failed(format!("Required device path \"{source}\" doesn't exist"))
            }
        }
        "nic" => {
            let parent = get(d, "parent").filter(|_| get(d, "network").is_none())?;
            let there = host.networks.iter().any(|n| n.name == parent) || parent == "eth0";
            if there {
                None
            } else {
                failed(format!("Parent device \"{parent}\" doesn't exist"))
            }
        }
        _ => None,
    }
}

/// Why some device of an instance cannot start on this host.
pub(crate) fn unstartable_devices(host: &Host, project: &str, i: &Inst) -> Option<String> {
    let (_, devices) = expand(host, project, i);
    devices.iter().find_map(|(n, d)| unstartable_device(host, n, d))
}

/// Why an instance cannot be started, whoever asks.
pub(crate) fn unstartable(host: &Host, project: &str, name: &str, i: &Inst) -> Option<String> {
    if i.runs() {
        return Some("The instance is already running".to_owned());
    }
    if let Some(busy) = &i.busy {
        let only_migrating = busy.action == "migrate" && host.product == Product::Lxd;
        if !only_migrating {
            return Some(format!("Instance is busy running a \"{}\" operation", busy.action));
        }
    }
    if i.content == Content::HalfMade {
        return Some(format!(
            "Failed to handle idmapped storage: lstat containers/{name}: no such file or directory"
        ));
    }
    let member = i
        .member
        .as_ref()
        .and_then(|m| host.members.iter().find(|x| &x.name == m));
    if member.is_some_and(|m| m.status != berth_core::model::MemberStatus::Online) {
        return Some("Cluster member is evacuated".to_owned());
    }
    let (config, _) = expand(host, project, i);
    if host.has("instance_protection_start") && config.get(marks::PROTECTION_START).is_some_and(|v| v == "true") {
        return Some("Instance is protected from being started".to_owned());
    }
    let taken = nics(host, project, i).into_iter().find_map(|nic| {
        let mac = i.config.get(&format!("volatile.{nic}.hwaddr"))?;
        let twin = |(at, other): (&InstanceRef, &Inst)| {
            at.project == project && at.name != name && other.config.values().any(|v| v == mac)
        };
        host.instances.iter().any(twin).then(|| {
            format!(
                "Failed start validation for device \"{nic}\": MAC address \"{mac}\" already defined on another NIC"
            )
        })
    });
    taken.or_else(|| unstartable_devices(host, project, i))
}

/// The MAC addresses that new network interfaces get.
pub(crate) fn add_hwaddrs(host: &Host, project: &str, i: &mut Inst, mut next: impl FnMut() -> u64) {
    for nic in nics(host, project, i) {
        let key = format!("volatile.{nic}.hwaddr");
        let (_, devices) = expand(host, project, i);
        if !i.config.contains_key(&key) && !devices.get(&nic).is_some_and(|d| d.contains_key("hwaddr")) {
            let n = next();
            i.config.insert(
                key,
                format!("10:66:6a:{:02x}:{:02x}:{:02x}", n >> 16 & 255, n >> 8 & 255, n & 255),
            );
        }
    }
}

/// The pool of the root disk: one that does not exist is silently replaced by that of the profiles.
pub(crate) fn pool_for(host: &Host, project: &str, i: &mut Inst) -> Result<String, String> {
    let there = |pool: &str| host.pools.iter().any(|p| p.name == pool);
    let wanted = i
        .devices
        .values()
        .find(|d| is_root(d))
        .and_then(|d| d.get("pool"))
        .cloned();
    if let Some(pool) = wanted.filter(|p| there(p)) {
        return Ok(pool);
    }
    let profiles = i.profiles.iter().rev().filter_map(|p| host.profile(project, p));
    let of_profile = profiles
        .flat_map(|p| p.devices.values())
        .find(|d| is_root(d))
        .and_then(|d| d.get("pool"));
    let only = match host.pools.as_slice() {
        [one] => Some(&one.name),
        _ => None,
    };
    let pool = of_profile.filter(|p| there(p)).or(only).cloned();
    let pool = pool.ok_or_else(|| "Can't find a storage pool for the instance to use".to_owned())?;
    if let Some(root) = i.devices.values_mut().find(|d| is_root(d)) {
        root.insert("pool".to_owned(), pool.clone());
    }
    Ok(pool)
}
