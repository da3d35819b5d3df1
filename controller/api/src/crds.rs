//! The CustomResourceDefinitions, made from the types. What the derive cannot express is done here, once, for all kinds.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps, JSONSchemaPropsOrArray,
};
use kube::CustomResourceExt;

use crate::{InstanceCopy, InstanceMove, InstancePlacement, InstanceServer, SCHEMA, keys};

/// The four definitions, ready to be applied.
pub fn crds() -> Vec<CustomResourceDefinition> {
    [
        InstanceServer::crd(),
        InstancePlacement::crd(),
        InstanceMove::crd(),
        InstanceCopy::crd(),
    ]
    .map(finish)
    .into()
}

fn finish(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    crd.metadata
        .annotations
        .get_or_insert_default()
        .insert(keys::SCHEMA.to_owned(), SCHEMA.to_string());
    for version in &mut crd.spec.versions {
        if let Some(root) = version
            .schema
            .as_mut()
            .and_then(|schema| schema.open_api_v3_schema.as_mut())
        {
            tidy(root);
            unseen(root);
        }
    }
    crd
}

/// Until it was looked at for the first time, an object says that no generation was observed. Without any status kstatus, and so Flux,
/// would take it for current.
fn unseen(root: &mut JSONSchemaProps) {
    let status = root
        .properties
        .as_mut()
        .and_then(|properties| properties.get_mut("status"));
    if let Some(status) = status {
        status.default = Some(JSON(serde_json::json!({"observedGeneration": -1})));
    }
}

/// Takes `nullable` off every field: an explicit null then means absent, as everywhere in Kubernetes, and `has()` in a
/// rule means what it says. A default of null would be invalid. The values of maps keep it: there a rule refuses nulls.
fn tidy(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    if schema.default.as_ref().is_some_and(|default| default.0.is_null()) {
        schema.default = None;
    }
    for property in schema
        .properties
        .iter_mut()
        .flat_map(|properties| properties.values_mut())
    {
        tidy(property);
    }
    match &mut schema.items {
        Some(JSONSchemaPropsOrArray::Schema(item)) => tidy(item),
        Some(JSONSchemaPropsOrArray::Schemas(items)) => items.iter_mut().for_each(tidy),
        None => {}
    }
}
