//! The contract as users meet it: the CRDs in `crds/`, the examples, and manifests that must be refused with a sentence
//! that helps. Offline: the structural schema by `jsonschema`, the rules by `kube-cel`. What only an API server can tell
//! (the cost of rules) is shown by the suites that have one, with the same files.
//!
//! `UPDATE=1 cargo test --workspace --test api` writes `crds/` anew.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use berth_api::{InstanceCopy, InstanceMove, InstancePlacement, InstanceServer, Outcome, Reason, ReasonKind, Step};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube_cel::{Validator, apply_defaults};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// All YAML files of a folder, sorted, with their text.
fn files(folder: &str) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root().join(folder))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            found.push((name, std::fs::read_to_string(&path)?));
        }
    }
    found.sort();
    assert!(!found.is_empty(), "{folder} holds no YAML file");
    Ok(found)
}

fn documents(text: &str) -> Result<Vec<Value>> {
    Ok(serde_yaml::Deserializer::from_str(text)
        .map(Value::deserialize)
        .collect::<std::result::Result<_, _>>()?)
}

static CRDS: LazyLock<Vec<CustomResourceDefinition>> = LazyLock::new(berth_api::crds);

/// The CRD for a document, or none if it is of another API.
fn crd_of(document: &Value) -> Option<&'static CustomResourceDefinition> {
    if document["apiVersion"] != "berth.dev/v1alpha1" {
        return None;
    }
    let crd = CRDS.iter().find(|crd| document["kind"] == crd.spec.names.kind);
    Some(crd.unwrap_or_else(|| panic!("no such kind: {}", document["kind"])))
}

fn schema_of(crd: &CustomResourceDefinition) -> Result<Value> {
    let schema = crd.spec.versions[0]
        .schema
        .as_ref()
        .and_then(|schema| schema.open_api_v3_schema.as_ref());
    Ok(serde_json::to_value(schema.ok_or("a CRD without schema")?)?)
}

/// The schema with every object closed, so that an unknown field is an error; objects with free keys stay open.
fn closed(mut schema: Value) -> Value {
    fn close(schema: &mut Map<String, Value>) {
        for (key, child) in schema.iter_mut() {
            match (key.as_str(), child) {
                ("properties", Value::Object(properties)) => {
                    properties.values_mut().filter_map(Value::as_object_mut).for_each(close);
                }
                ("items" | "additionalProperties", Value::Object(child)) => close(child),
                _ => {}
            }
        }
        if schema.contains_key("properties") {
            schema.insert("additionalProperties".into(), json!(false));
        }
    }
    for known in ["apiVersion", "kind"] {
        schema["properties"][known] = json!({"type": "string"});
    }
    schema["properties"]["metadata"] = json!({"type": "object"});
    schema.as_object_mut().into_iter().for_each(close);
    schema
}

/// The schema without the rules against nulls: kube-cel has no `dyn`, and offline the structure refuses nulls already.
fn without_dyn(mut schema: Value) -> Value {
    fn strip(schema: &mut Value) {
        if let Some(rules) = schema.get_mut("x-kubernetes-validations").and_then(Value::as_array_mut) {
            rules.retain(|rule| !rule["rule"].as_str().unwrap_or_default().contains("dyn("));
        }
        for (_, child) in schema
            .as_object_mut()
            .into_iter()
            .flatten()
            .filter(|(_, child)| child.is_object())
        {
            strip(child);
        }
    }
    strip(&mut schema);
    schema
}

/// `/spec/methods/0` as the API server writes it: `spec.methods[0]`.
fn dotted(pointer: &str) -> String {
    let mut path = String::new();
    for part in pointer.split('/').skip(1) {
        match part.parse::<usize>() {
            Ok(index) => path.push_str(&format!("[{index}]")),
            Err(_) if path.is_empty() => path.push_str(part),
            Err(_) => path.push_str(&format!(".{part}")),
        }
    }
    path
}

/// What is wrong with a document; as in the API server the rules are asked only if the structure is right.
fn complaints(document: &Value, old: Option<&Value>) -> Result<Vec<String>> {
    let crd = crd_of(document).ok_or("not one of our kinds")?;
    let schema = schema_of(crd)?;
    let document = apply_defaults(&schema, document);
    let old = old.map(|old| apply_defaults(&schema, old));
    let structure: Vec<String> = jsonschema::validator_for(&closed(schema.clone()))?
        .iter_errors(&document)
        .map(|error| match error.kind() {
            jsonschema::error::ValidationErrorKind::Required { property } => {
                format!(
                    "{}.{}: required",
                    dotted(error.instance_path().as_str()),
                    property.as_str().unwrap_or_default()
                )
            }
            _ => format!("{}: {error}", dotted(error.instance_path().as_str())),
        })
        .collect();
    if !structure.is_empty() {
        return Ok(structure);
    }
    match Validator::new().validate(&without_dyn(schema), &document, old.as_ref()) {
        Ok(()) => Ok(Vec::new()),
        Err(errors) => Ok(errors
            .into_vec()
            .into_iter()
            .map(|e| format!("{}: {}", e.field_path, e.message))
            .collect()),
    }
}

/// Reads a document with the Rust type of its kind and writes it again.
fn through_rust(document: &Value) -> Result<Value> {
    fn through<T: DeserializeOwned + Serialize>(document: &Value) -> Result<Value> {
        Ok(serde_json::to_value(serde_json::from_value::<T>(document.clone())?)?)
    }
    match document["kind"].as_str() {
        Some("InstanceServer") => through::<InstanceServer>(document),
        Some("InstancePlacement") => through::<InstancePlacement>(document),
        Some("InstanceMove") => through::<InstanceMove>(document),
        Some("InstanceCopy") => through::<InstanceCopy>(document),
        kind => Err(format!("no type for {kind:?}").into()),
    }
}

#[test]
fn the_crds_in_the_repository_are_those_of_the_types() -> Result {
    let mut expected = BTreeSet::new();
    for crd in CRDS.iter() {
        let file = format!("{}.yaml", crd.spec.names.plural);
        let (path, text) = (root().join("crds").join(&file), serde_yaml::to_string(crd)?);
        if std::env::var_os("UPDATE").is_some_and(|update| update == "1") {
            std::fs::write(&path, &text)?;
        }
        let stored = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            stored == text,
            "crds/{file} is not up to date: UPDATE=1 cargo test --workspace --test api"
        );
        expected.insert(file);
    }
    let present: BTreeSet<String> = files("crds")?.into_iter().map(|(name, _)| name).collect();
    assert_eq!(present, expected, "crds/ holds one file per kind and nothing else");
    Ok(())
}

#[test]
fn crds_can_be_templates_of_a_chart() -> Result {
    for (name, text) in files("crds")? {
        assert!(
            !text.contains("{{") && !text.contains("}}"),
            "{name}: Helm would read this as a template"
        );
        assert!(
            text.contains(&format!("berth.dev/schema: '{}'", berth_api::SCHEMA)),
            "{name} carries the number of its schema"
        );
    }
    Ok(())
}

#[test]
fn every_example_is_accepted_and_understood() -> Result {
    let mut kinds = BTreeSet::new();
    let folders = ["examples", "examples/flux/shop", "examples/argocd/shop"].map(files);
    for (name, text) in folders.into_iter().collect::<Result<Vec<_>>>()?.into_iter().flatten() {
        for document in documents(&text)? {
            if crd_of(&document).is_none() {
                continue;
            }
            assert_eq!(complaints(&document, None)?, Vec::<String>::new(), "{name}");
            let read = through_rust(&document).map_err(|e| format!("{name}: {e}"))?;
            assert_eq!(
                complaints(&read, Some(&document))?,
                Vec::<String>::new(),
                "{name}, as the controller writes it"
            );
            kinds.insert(document["kind"].as_str().unwrap_or_default().to_owned());
        }
    }
    assert_eq!(
        kinds.into_iter().collect::<Vec<_>>(),
        ["InstanceCopy", "InstancePlacement", "InstanceServer"]
    );
    Ok(())
}

#[test]
fn an_object_with_every_field_goes_through_the_types_unchanged() -> Result {
    for (name, text) in files("tests/fixtures/full")? {
        for document in documents(&text)? {
            assert_eq!(complaints(&document, None)?, Vec::<String>::new(), "{name}");
            let mut again = through_rust(&document)?;
            // the field is written only when set, and false is what it is without
            if document["kind"] == "InstancePlacement" {
                assert_eq!(again["spec"]["overrides"].get("noProfiles"), None);
            }
            again["metadata"] = document["metadata"].clone();
            assert_eq!(again, document, "{name}");
        }
    }
    Ok(())
}

/// Every property under a schema, with its path and whether the document has it.
fn unset(schema: &Value, document: &Value, path: &str, missing: &mut Vec<String>) {
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let here = format!("{path}.{name}");
        match document.get(name) {
            None => missing.push(here),
            Some(Value::Array(items)) => {
                let first = items.first().unwrap_or(&Value::Null);
                unset(&property["items"], first, &format!("{here}[]"), missing);
            }
            Some(value) => unset(property, value, &here, missing),
        }
    }
}

#[test]
fn the_objects_with_every_field_leave_none_out() -> Result {
    // either excluded by another field, or part of a type that is filled in elsewhere in the same object
    let excused = [
        "spec.credentials.trustTokenRef",
        "spec.serverCertificate.pem",
        "spec.serverCertificate.systemRoots",
        "spec.target.group",
        "spec.target.member",
        "spec.overrides.",
        "spec.source.placement",
        "spec.refresh.schedule",
        "spec.from.group",
        "spec.to.member",
        "spec.to.uuid",
        "status.conditions[].observedGeneration",
        "status.current.from.group",
        "status.current.to.",
    ];
    for (name, text) in files("tests/fixtures/full")? {
        for document in documents(&text)? {
            let schema = schema_of(crd_of(&document).ok_or("not one of our kinds")?)?;
            let mut missing = Vec::new();
            for part in ["spec", "status"] {
                unset(&schema["properties"][part], &document[part], part, &mut missing);
            }
            missing.retain(|path| !excused.iter().any(|excuse| path.starts_with(excuse)));
            assert_eq!(missing, Vec::<String>::new(), "{name} is to hold every field");
        }
    }
    Ok(())
}

#[test]
fn what_must_be_refused_is_refused_with_its_sentence() -> Result {
    for (name, text) in files("tests/fixtures/refused")? {
        let first = text.lines().next().and_then(|line| line.strip_prefix("# refused: "));
        let expected = first.ok_or_else(|| format!("{name}: the first line is to be `# refused: <sentence>`"))?;
        let all = documents(&text)?;
        let (refused, accepted) = all.split_last().ok_or("no document")?;
        for document in accepted {
            assert_eq!(
                complaints(document, None)?,
                Vec::<String>::new(),
                "{name}: all but the last are accepted"
            );
        }
        let found = complaints(refused, accepted.last())?;
        assert!(
            found.iter().any(|sentence| sentence.contains(expected)),
            "{name}: expected {expected:?}, got {found:#?}"
        );
    }
    Ok(())
}

#[test]
fn every_rule_is_tried_by_a_manifest_that_breaks_it() -> Result {
    fn rules(schema: &Value, found: &mut BTreeSet<String>) {
        for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
            found.insert(rule["message"].as_str().unwrap_or_default().to_owned());
        }
        let children = schema["properties"].as_object().into_iter().flat_map(Map::values);
        for child in children
            .chain(schema.get("items"))
            .chain(schema.get("additionalProperties"))
        {
            rules(child, found);
        }
    }
    let mut untried = BTreeSet::new();
    for crd in CRDS.iter() {
        rules(&schema_of(crd)?, &mut untried);
    }
    assert!(
        untried.iter().all(|message| !message.is_empty()),
        "every rule has a message"
    );
    for (_, text) in files("tests/fixtures/refused")? {
        let expected = text
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("# refused: "))
            .unwrap_or_default();
        untried.retain(|message| !message.starts_with(expected));
    }
    // nulls are refused offline by the structure already; the API server uses the rule
    untried.retain(|message| !message.contains(" is null: "));
    assert_eq!(untried, BTreeSet::new());
    Ok(())
}

#[test]
fn changes_that_mean_the_same_or_are_meant_to_be_possible_are_accepted() -> Result {
    let placement = |spec: &str| -> Result<Value> {
        let head = "{apiVersion: berth.dev/v1alpha1, kind: InstancePlacement, metadata: {name: web-1, namespace: shop}";
        Ok(serde_yaml::from_str(&format!("{head}, spec: {{{spec}}}}}"))?)
    };
    let rows = [
        (
            "target: {server: a}",
            "target: {server: b}",
            "the target is there to be changed",
        ),
        (
            "target: {server: a}",
            "target: {server: a}, instance: {name: web-1, project: default}",
            "the defaults, said",
        ),
        (
            "target: {server: a}, instance: {name: web-1}",
            "target: {server: a}, instance: {name: ''}",
            "empty means absent",
        ),
        (
            "target: {server: a}",
            "target: {server: a}, instance: {uuid: 6ba7b810-9dad-11d1-80b4-00c04fd430c8}",
            "the uuid may be added",
        ),
        (
            "target: {server: a, member: n1}",
            "target: {server: a, member: '', group: ssd}",
            "an empty member is none",
        ),
    ];
    for (old, new, why) in rows {
        assert_eq!(
            complaints(&placement(new)?, Some(&placement(old)?))?,
            Vec::<String>::new(),
            "{why}"
        );
    }
    Ok(())
}

#[test]
fn every_field_is_described_and_bounded() -> Result {
    fn check(schema: &Value, path: &str, faults: &mut Vec<String>) {
        let bound = match schema["type"].as_str() {
            Some("string") => {
                schema["maxLength"].is_u64() || schema["enum"].is_array() || schema["format"] == "date-time"
            }
            Some("array") => schema["maxItems"].is_u64(),
            Some("object") => schema["maxProperties"].is_u64() || schema["additionalProperties"].is_null(),
            _ => true,
        };
        if !bound {
            faults.push(format!("{path} has no bound"));
        }
        if schema["type"] == "array" && schema["x-kubernetes-list-type"].is_null() {
            faults.push(format!("{path} does not say how lists are merged"));
        }
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let here = format!("{path}.{name}");
            if property["description"].as_str().is_none_or(|text| text.len() < 8) {
                faults.push(format!("{here} is not described"));
            }
            check(property, &here, faults);
        }
        for (child, name) in [("items", "[]"), ("additionalProperties", "{}")] {
            if schema[child].is_object() {
                check(&schema[child], &format!("{path}{name}"), faults);
            }
        }
    }
    let mut faults = Vec::new();
    for crd in CRDS.iter() {
        let schema = schema_of(crd)?;
        for part in ["spec", "status"] {
            check(
                &schema["properties"][part],
                &format!("{}.{part}", crd.spec.names.kind),
                &mut faults,
            );
        }
    }
    assert_eq!(faults, Vec::<String>::new());
    Ok(())
}

#[test]
fn no_kind_is_taken_for_current_before_it_was_looked_at() {
    for crd in CRDS.iter() {
        let crd = serde_json::to_value(crd).unwrap();
        let status = "/spec/versions/0/schema/openAPIV3Schema/properties/status/default";
        let unseen = serde_json::json!({"observedGeneration": -1});
        assert_eq!(crd.pointer(status), Some(&unseen), "{}", crd["spec"]["names"]["kind"]);
    }
}

#[test]
fn kubectl_get_shows_the_promised_columns() {
    let rows = [
        (
            "isrv",
            "PRODUCT VERSION INSTANCES MEMBERS READY REASON CORDONED AGE",
            "",
        ),
        (
            "iplace",
            "INSTANCE SERVER TARGET POWER READY REASON MOVE% AGE",
            "MEMBER POOL METHOD MESSAGE",
        ),
        ("imove", "METHOD FROM TO STEP PROGRESS DOWNTIME OUTCOME AGE", ""),
        ("icopy", "SOURCE TARGET LAST-REFRESH DURATION READY REASON AGE", ""),
    ];
    assert_eq!(CRDS.len(), rows.len());
    for (crd, (short, narrow, wide)) in CRDS.iter().zip(rows) {
        let names = &crd.spec.names;
        assert_eq!(names.short_names.as_deref(), Some(&[short.to_owned()][..]));
        assert_eq!(names.categories.as_deref(), Some(&["berth".to_owned()][..]));
        assert_eq!(crd.spec.scope, "Namespaced");
        let columns = crd.spec.versions[0]
            .additional_printer_columns
            .as_deref()
            .unwrap_or_default();
        let shown = |priority: i32| -> Vec<String> {
            let chosen = columns.iter().filter(|column| column.priority.unwrap_or(0) == priority);
            chosen.map(|column| column.name.to_uppercase()).collect()
        };
        assert_eq!(shown(0).join(" "), narrow, "{short}");
        assert_eq!(shown(1).join(" "), wide, "{short} -o wide");
    }
}

#[test]
fn a_step_reason_or_outcome_of_a_later_version_does_not_keep_a_record_from_being_read() -> Result {
    let status: berth_api::InstanceMoveStatus =
        serde_json::from_value(json!({"step": "Teleported", "outcome": "Vanished", "later": {"field": 1}}))?;
    assert_eq!((status.step(), status.outcome()), (None, None));
    assert_eq!(
        status.step.as_deref(),
        Some("Teleported"),
        "and the record keeps what it said"
    );
    assert_eq!(
        berth_api::InstanceMoveStatus::default().step(),
        Some(Step::Accepted),
        "no step means Accepted"
    );
    Ok(())
}

#[test]
fn names_of_reasons_steps_and_outcomes_are_unique_and_read_back() {
    let names: BTreeSet<&str> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
    assert_eq!(names.len(), Reason::ALL.len());
    for reason in Reason::ALL {
        assert_eq!(Reason::parse(reason.as_str()), Some(*reason));
        assert!(reason.describe().ends_with('.'), "{reason} is described in a sentence");
    }
    for step in Step::ALL {
        assert_eq!(Step::parse(step.as_str()), Some(step));
    }
    for outcome in Outcome::ALL {
        assert_eq!(Outcome::parse(outcome.as_str()), Some(outcome));
    }
}

#[test]
fn reasons_mean_for_the_tools_what_the_contract_says() {
    let rows = [
        (ReasonKind::Ready, "Connected InPlace UpToDate"),
        (
            ReasonKind::InProgress,
            "Moving Updating Pending MoveFailed ForeignOperation StopPending",
        ),
        (ReasonKind::Unknown, "ServerUnreachable Progressing"),
        (
            ReasonKind::Waiting,
            "WaitingForWindow WaitingForApproval Suspended DriftObserved",
        ),
        (
            ReasonKind::Stalled,
            "InstanceNotFound AmbiguousInstance ClaimedByAnother ServerNotFound MemberNotFound PoolNotFound ProjectNotFound \
             ProfileNotFound ArchitectureMismatch MethodImpossible NameTaken TargetCordoned NeedsAttention GroupNotFound \
             NetworkNotFound SnapshotsCannotTravel InsufficientSpace HostDevice MemberOffline ProjectRestricted RestrictedPull \
             RestrictedSnapshots RestrictedBackups CloudInitWouldRerun BackupNotReadable LeftoverVolume Leftover InvalidSpec \
             DowntimeTooLong MoveCancelled CertificateMismatch NotTrusted CredentialsMissing CredentialsInvalid TokenUsed \
             UnsupportedServer DuplicateServer CopyWasUsed SourceNotFound",
        ),
    ];
    for (kind, reasons) in rows {
        for name in reasons.split_whitespace() {
            assert_eq!(Reason::parse(name).map(Reason::kind), Some(kind), "{name}");
        }
    }
}
