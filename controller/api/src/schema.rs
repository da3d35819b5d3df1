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

/// Configuration of an instance: keys with text values (cloud-init documents included).
pub(crate) fn config(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 128,
        "additionalProperties": {"type": "string", "maxLength": 65536},
    })
}

/// Devices of an instance by name, each with its keys.
pub(crate) fn devices(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 64,
        "additionalProperties": {
            "type": "object",
            "maxProperties": 64,
            "additionalProperties": {"type": "string", "maxLength": 4096},
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
