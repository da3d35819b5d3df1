//! Pieces of OpenAPI schema that the derive cannot write: bounded lists and maps of texts, conditions.
//!
//! Every list, map and text is bounded, since the API server refuses rules whose cost it cannot estimate.

use schemars::{Schema, SchemaGenerator, json_schema};

/// Names of instances, members, projects, pools, profiles and devices.
pub(crate) const NAME: u32 = 253;

/// A list of names, replaced as a whole.
pub(crate) fn names(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 64,
        "items": {"type": "string", "minLength": 1, "maxLength": NAME},
        "x-kubernetes-list-type": "atomic",
    })
}

/// A list of names in which each occurs once.
pub(crate) fn name_set(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 64,
        "items": {"type": "string", "minLength": 1, "maxLength": NAME},
        "x-kubernetes-list-type": "set",
    })
}

/// A list of short texts, replaced as a whole.
pub(crate) fn texts(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 256,
        "items": {"type": "string", "maxLength": 1024},
        "x-kubernetes-list-type": "atomic",
    })
}

/// Addresses of one server.
pub(crate) fn addresses(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "minItems": 1,
        "maxItems": 16,
        "items": {"type": "string", "minLength": 1, "maxLength": 512},
        "x-kubernetes-list-type": "atomic",
    })
}

/// Rule: no value of the map is null. Without it the API server would silently drop such a value, and the user's wish with it.
/// It holds only together with `nullable: true` on the values, and `dyn` lets a value that is typed be compared with null.
fn no_nulls(message: &str) -> serde_json::Value {
    serde_json::json!([{"rule": "self.all(k, dyn(self[k]) != null)", "message": message}])
}

/// Configuration of an instance: keys with text values (cloud-init documents included).
pub(crate) fn config(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 128,
        "additionalProperties": {"type": "string", "maxLength": 65536, "nullable": true},
        "x-kubernetes-validations": no_nulls("a value in config is null: to remove a key of the instance's own list it in removeConfig"),
    })
}

/// Devices of an instance by name, each with its keys.
pub(crate) fn devices(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 64,
        "x-kubernetes-validations": no_nulls("a device is null: to remove a device of the instance's own list it in removeDevices"),
        "additionalProperties": {
            "type": "object",
            "nullable": true,
            "maxProperties": 64,
            "additionalProperties": {"type": "string", "maxLength": 4096, "nullable": true},
            "x-kubernetes-validations": no_nulls("a key of a device is null: leave it out, or set it to an empty text"),
        },
    })
}

/// The conditions of every kind, merged by type, with the limits that Kubernetes itself sets.
pub(crate) fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 16,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "reason", "message", "lastTransitionTime"],
            "properties": {
                "type": {
                    "description": "What is stated, for example Ready. Reconciling, Stalled and LeftoverPending are present only while true.",
                    "type": "string", "minLength": 1, "maxLength": 316,
                },
                "status": {"description": "True, False or Unknown.", "type": "string", "enum": ["True", "False", "Unknown"]},
                "reason": {
                    "description": "Why, in one word. The words and what to do about each are in the troubleshooting guide.",
                    "type": "string", "minLength": 1, "maxLength": 1024,
                },
                "message": {"description": "Why, in a sentence.", "type": "string", "maxLength": 32768},
                "observedGeneration": {
                    "description": "The metadata.generation that this was decided for.",
                    "type": "integer", "format": "int64", "minimum": 0,
                },
                "lastTransitionTime": {"description": "When status last changed.", "type": "string", "format": "date-time"},
            },
        },
    })
}

/// Rule: an optional text is there and not empty, and so is everything it is in. (Not CEL's `.?`: interpreters outside of
/// the API server do not know it.)
pub(crate) fn set(path: &str) -> String {
    let steps: Vec<&str> = path.split('.').collect();
    let there = (2..=steps.len())
        .map(|length| format!("has({})", steps[..length].join(".")))
        .collect::<Vec<_>>();
    format!("({} && {path} != '')", there.join(" && "))
}

/// Rule: an optional field, unless absent or empty, is a name that both products accept for an instance.
pub(crate) fn instance_name_rule(field: &str) -> String {
    let field = format!("self.{field}");
    format!(
        "!{} || ({field}.matches('^[a-zA-Z0-9]([a-zA-Z0-9-]{{0,61}}[a-zA-Z0-9])?$') && !{field}.matches('^[0-9]+$'))",
        set(&field)
    )
}

/// Rule: the pool of the root disk is not set by the target and by an override, too.
pub(crate) fn one_pool() -> String {
    let devices = "has(self.overrides) && has(self.overrides.devices)";
    let root = "'root' in self.overrides.devices && 'pool' in self.overrides.devices['root']";
    format!("!({} && {devices} && {root})", set("self.target.pool"))
}

/// Rule: required fields (or those with a default) are as they were.
pub(crate) fn same(fields: &[&str]) -> String {
    fields
        .iter()
        .map(|field| format!("self.{field} == oldSelf.{field}"))
        .collect::<Vec<_>>()
        .join(" && ")
}

/// Rule: optional fields are as they were. Not `self.?field == oldSelf.?field`: of that the API server cannot tell the cost.
pub(crate) fn same_optional(fields: &[&str]) -> String {
    let rule = |field: &&str| {
        format!("has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})")
    };
    fields.iter().map(rule).collect::<Vec<_>>().join(" && ")
}

/// Rule: the texts within an object, each with its default, are as they were; an empty one means absent.
pub(crate) fn same_texts(object: &str, fields: &[(&str, &str)]) -> String {
    let text = |side: &str, field: &str, default: &str| {
        let path = format!("{side}.{object}.{field}");
        format!("({} ? {path} : '{default}')", set(&path))
    };
    let rule = |(field, default): &(&str, &str)| {
        format!(
            "{} == {}",
            text("self", field, default),
            text("oldSelf", field, default)
        )
    };
    fields.iter().map(rule).collect::<Vec<_>>().join(" && ")
}
