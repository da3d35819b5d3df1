//! Bodies of the writing requests (fact sheet 2, 3 and 9). Every flag is always written: what an absent one means differs
//! between the products and their versions (`live`, `timeout` and `profiles` above all).

use std::collections::BTreeMap;
use std::time::Duration;

use berth_core::model::{Change, Definition};
use berth_core::server::{AcceptRequest, OfferRequest, Peer, PowerAction, Relocation};
use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value, json};

/// `PATCH`: only what changes.
pub(crate) fn change(change: &Change) -> Value {
    let mut body = Map::new();
    if !change.config.is_empty() {
        body.insert("config".to_owned(), json!(change.config));
    }
    if !change.devices.is_empty() {
        body.insert("devices".to_owned(), json!(change.devices));
    }
    if let Some(ephemeral) = change.ephemeral {
        body.insert("ephemeral".to_owned(), json!(ephemeral));
    }
    Value::Object(body)
}

/// `PUT`: everything that can be written.
pub(crate) fn definition(d: &Definition) -> Value {
    json!({
        "architecture": d.architecture,
        "config": d.config,
        "devices": d.devices,
        "profiles": d.profiles,
        "ephemeral": d.ephemeral,
        "description": d.description,
    })
}

/// A power state. A time-out of zero would kill, so a graceful stop waits at least one second.
pub(crate) fn power(action: PowerAction) -> Value {
    let (action, timeout, force, stateful) = match action {
        PowerAction::Start { stateful } => ("start", -1, false, stateful),
        PowerAction::Stop { timeout } => ("stop", seconds(timeout).max(1), false, false),
        PowerAction::ForceStop => ("stop", -1, true, false),
        PowerAction::Unfreeze => ("unfreeze", -1, false, false),
    };
    json!({ "action": action, "timeout": timeout, "force": force, "stateful": stateful })
}

/// A container that is to be frozen.
pub(crate) fn freeze() -> Value {
    json!({ "action": "freeze", "timeout": -1, "force": false, "stateful": false })
}

fn seconds(d: Duration) -> i64 {
    i64::try_from(d.as_secs()).unwrap_or(i64::MAX)
}

/// The source's end of a migration.
pub(crate) fn offer(request: &OfferRequest) -> Value {
    let mut body = match &request.snapshot {
        // LXD 5 insists on a name and does nothing with it
        Some(name) => json!({ "name": name, "migration": true, "live": false }),
        None => json!({
            "migration": true,
            "live": request.live,
            "instance_only": request.instance_only,
            "allow_inconsistent": false,
        }),
    };
    if let Some(peer) = &request.push_to {
        body["target"] = json!({
            "operation": operation_url(peer),
            "certificate": peer.certificate,
            "secrets": exposed(&peer.channel.secrets),
        });
    }
    body
}

/// The target's end of a migration: the whole definition and where the data come from.
pub(crate) fn accept(request: &AcceptRequest) -> Value {
    let mut source = json!({
        "type": "migration",
        "mode": if request.pull_from.is_some() { "pull" } else { "push" },
        "live": request.live,
        "instance_only": request.instance_only,
        "refresh": request.refresh,
        "allow_inconsistent": false,
        "base-image": request.definition.config.get("volatile.base_image").map_or("", String::as_str),
    });
    // only where it is wished: not every server knows the key
    if request.exclude_older {
        source["refresh_exclude_older"] = json!(true);
    }
    if let Some(peer) = &request.pull_from {
        source["operation"] = json!(operation_url(peer));
        source["certificate"] = json!(peer.certificate);
        source["secrets"] = json!(exposed(&peer.channel.secrets));
    }
    let mut body = definition(&request.definition);
    body["name"] = json!(request.at.name);
    body["type"] = json!(request.kind.wire());
    body["source"] = source;
    body
}

/// A move inside the server. `name` repeats the present name where it stays: that is what the servers' clients send.
/// A new name alone is a rename: as a migration it would wait for a partner until it times out.
pub(crate) fn relocation(name: &str, to: &Relocation) -> Value {
    if let (Some(new), None, None, None) = (&to.name, &to.member, &to.pool, &to.project) {
        return rename(new);
    }
    let mut body = json!({
        "name": to.name.as_deref().unwrap_or(name),
        "migration": true,
        "live": to.live,
        "instance_only": to.instance_only,
    });
    // absent, not empty: an empty one would be taken for a wish
    if let Some(pool) = &to.pool {
        body["pool"] = json!(pool);
    }
    if let Some(project) = &to.project {
        body["project"] = json!(project);
    }
    body
}

/// A new name and nothing else.
pub(crate) fn rename(name: &str) -> Value {
    json!({ "name": name, "migration": false, "live": false, "instance_only": false })
}

/// A snapshot of the disk.
pub(crate) fn snapshot(name: &str, expires_at: Option<Timestamp>) -> Value {
    let mut body = json!({ "name": name, "stateful": false });
    if let Some(at) = expires_at {
        body["expires_at"] = json!(at);
    }
    body
}

fn operation_url(peer: &Peer) -> String {
    format!(
        "{}/1.0/operations/{}",
        peer.address.trim_end_matches('/'),
        peer.channel.operation
    )
}

fn exposed(secrets: &BTreeMap<String, SecretString>) -> BTreeMap<&str, &str> {
    secrets
        .iter()
        .map(|(name, secret)| (name.as_str(), secret.expose_secret()))
        .collect()
}
