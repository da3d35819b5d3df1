//! Pages of the documentation that are made from the types: one per kind, fields, columns and rules.

use std::fmt::Write;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};

/// The page of a kind.
pub(crate) fn page(crd: &CustomResourceDefinition) -> Option<String> {
    let version = crd.spec.versions.first()?;
    let root = version.schema.as_ref()?.open_api_v3_schema.as_ref()?;
    let names = &crd.spec.names;
    let short = names.short_names.iter().flatten().map(|name| format!("`{name}`"));
    let columns = version.additional_printer_columns.iter().flatten();
    let column = |wide: bool| {
        let of = columns
            .clone()
            .filter(|c| (c.priority.unwrap_or_default() > 0) == wide)
            .map(|c| c.name.to_uppercase());
        of.collect::<Vec<_>>().join(", ")
    };
    let mut page = String::new();
    let out = &mut page;
    let _ = writeln!(
        out,
        "<!-- Made from the types by `UPDATE=1 cargo test --workspace --test tidy`. Do not edit. -->"
    );
    let _ = writeln!(out, "# {}\n\n{}\n", names.kind, text(root));
    let _ = writeln!(
        out,
        "- `apiVersion: {}/{}`, `kind: {}`",
        crd.spec.group, version.name, names.kind
    );
    let _ = writeln!(
        out,
        "- `kubectl get {}` (short {})",
        names.plural,
        short.collect::<Vec<_>>().join(", ")
    );
    let _ = writeln!(out, "- columns: NAME, {}", column(false));
    if !column(true).is_empty() {
        let _ = writeln!(out, "- with `-o wide` also: {}", column(true));
    }
    for part in ["spec", "status"] {
        let Some(schema) = root.properties.as_ref().and_then(|properties| properties.get(part)) else {
            continue;
        };
        let _ = writeln!(out, "\n## {part}\n\n{}\n", text(schema));
        let _ = writeln!(out, "| field | type | default | meaning |\n|---|---|---|---|");
        rows(out, "", schema);
    }
    let mut found = Vec::new();
    rules("", root, &mut found);
    if !found.is_empty() {
        let _ = writeln!(out, "\n## Refused by the API server\n");
        for (path, message) in found {
            let _ = if path.is_empty() {
                writeln!(out, "- {message}")
            } else {
                writeln!(out, "- `{path}`: {message}")
            };
        }
    }
    Some(page)
}

fn text(schema: &JSONSchemaProps) -> String {
    let text = schema.description.clone().unwrap_or_default();
    text.replace('\n', " ").replace('|', "\\|")
}

/// One row per field, depth first, `target.member`; lists as `windows[].schedule`, maps as `devices.*`.
fn rows(out: &mut String, path: &str, schema: &JSONSchemaProps) {
    let required = schema.required.clone().unwrap_or_default();
    for (name, field) in schema.properties.iter().flatten() {
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        let default = match &field.default {
            Some(default) if default.0 == serde_json::json!({}) => String::new(),
            Some(default) => format!("`{}`", default.0).replace('|', "\\|"),
            None if required.contains(name) => "required".to_owned(),
            None => String::new(),
        };
        let _ = writeln!(out, "| `{path}` | {} | {default} | {} |", type_of(field), text(field));
        below(&path, field, &mut |path, child| rows(out, path, child));
    }
}

/// Calls `visit` for the objects inside a list or a map, or for the object itself.
fn below(path: &str, schema: &JSONSchemaProps, visit: &mut dyn FnMut(&str, &JSONSchemaProps)) {
    visit(path, schema);
    if let Some(JSONSchemaPropsOrArray::Schema(item)) = &schema.items {
        below(&format!("{path}[]"), item, visit);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(value)) = &schema.additional_properties {
        below(&format!("{path}.*"), value, visit);
    }
}

fn type_of(schema: &JSONSchemaProps) -> String {
    if let Some(JSONSchemaPropsOrArray::Schema(item)) = &schema.items {
        return format!("list of {}", type_of(item));
    }
    if let Some(JSONSchemaPropsOrBool::Schema(value)) = &schema.additional_properties {
        return format!("map of {}", type_of(value));
    }
    if let Some(values) = &schema.enum_ {
        let values: Vec<_> = values
            .iter()
            .filter_map(|value| value.0.as_str())
            .map(|v| format!("`{v}`"))
            .collect();
        return values.join(", ");
    }
    let name = schema.type_.as_deref().unwrap_or("any");
    // all durations have one pattern
    if schema
        .pattern
        .as_deref()
        .is_some_and(|pattern| pattern.contains("ns|us|ms"))
    {
        return "duration".to_owned();
    }
    match (schema.format.as_deref(), schema.minimum, schema.maximum) {
        (Some("date-time"), ..) => "time".to_owned(),
        (_, Some(least), Some(most)) => format!("{name}, {least} to {most}"),
        _ => name.to_owned(),
    }
}

fn rules(path: &str, schema: &JSONSchemaProps, found: &mut Vec<(String, String)>) {
    for rule in schema.x_kubernetes_validations.iter().flatten() {
        let message = rule.message.clone().unwrap_or_else(|| format!("`{}`", rule.rule));
        let line = (path.to_owned(), message);
        if !found.contains(&line) {
            found.push(line);
        }
    }
    for (name, field) in schema.properties.iter().flatten() {
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        rules(&path, field, found);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(item)) = &schema.items {
        rules(&format!("{path}[]"), item, found);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(value)) = &schema.additional_properties {
        rules(&format!("{path}.*"), value, found);
    }
}
