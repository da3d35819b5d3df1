//! What a user gets from the API server itself: the definitions apply, every example is accepted, every manifest that must
//! be refused is refused with its sentence, and `kubectl explain` and `kubectl get` have something to say.

use std::fs;
use std::path::Path;

use berth_tests::Test;
use futures::future::join_all;
use serde_json::{Value, json};

berth_tests::suite! {
    needs: [Kube],
    together: [
        the_definitions_apply_and_applying_them_again_changes_nothing,
        every_example_applies_and_applying_it_again_changes_nothing,
        objects_with_every_field_are_stored_as_they_were_written,
        what_must_be_refused_is_refused_with_its_sentence,
        kubectl_explains_every_field,
        kubectl_get_shows_the_columns_of_the_contract,
    ],
    alone: [],
}

/// The YAML files of a folder of the checkout, by name.
fn files(folder: &str) -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<(String, String)> = entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            (
                path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                text,
            )
        })
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} has files", folder.display());
    files
}

/// The examples' namespace becomes the test's own.
fn in_own_namespace(test: &Test, text: &str) -> String {
    let own = test.namespace();
    text.replace("namespace: shop", &format!("namespace: {own}"))
        .replace("name: shop", &format!("name: {own}"))
}

/// Applies it as users are told to; what `kubectl` says.
async fn apply(test: &Test, text: &str) -> Result<String, String> {
    let args = ["apply", "--server-side", "-f", "-"];
    test.kube().kubectl_with_input(&args, text).await
}

/// Every object of a manifest as it is stored, one a line; with `versions`, the resourceVersion of each.
async fn stored(test: &Test, text: &str, versions: bool) -> String {
    let args = ["get", "--show-managed-fields", "-o", "json", "-f", "-"];
    let found = test.kube().kubectl_with_input(&args, text).await;
    let found = found.unwrap_or_else(|error| panic!("{error}\n{text}"));
    let found: Value = serde_json::from_str(&found).unwrap_or_else(|error| panic!("{error}"));
    let one = std::slice::from_ref(&found);
    let objects = found["items"].as_array().map_or(one, Vec::as_slice);
    let shown = objects.iter().map(|object| {
        let mut object = object.clone();
        let metadata = object["metadata"].as_object_mut();
        let version = metadata.and_then(|m| m.remove("resourceVersion"));
        if versions {
            json!(version).to_string()
        } else {
            object.to_string()
        }
    });
    shown.collect::<Vec<_>>().join("\n")
}

/// Applying it again changes nothing of any object. That a new one's default status is stored, which the API server shows
/// from the first moment on, counts as a version; after that there is no other.
async fn applies_again(test: &Test, name: &str, text: &str) {
    let again = async |time: &str| {
        let applied = apply(test, text).await;
        applied.unwrap_or_else(|error| panic!("{name}, applied for the {time} time: {error}"));
    };
    again("first").await;
    let before = stored(test, text, false).await;
    again("second").await;
    assert_eq!(stored(test, text, false).await, before, "{name}: nothing changed");
    let before = stored(test, text, true).await;
    again("third").await;
    assert_eq!(stored(test, text, true).await, before, "{name}: no other version");
}

async fn the_definitions_apply_and_applying_them_again_changes_nothing(test: Test) {
    let all = files("crds");
    assert_eq!(all.len(), 4, "four kinds");
    for (name, text) in all {
        applies_again(&test, &name, &text).await;
    }
}

async fn every_example_applies_and_applying_it_again_changes_nothing(test: Test) {
    for (name, text) in files("examples") {
        let text = in_own_namespace(&test, &text);
        applies_again(&test, &name, &text).await;
        if name != "namespace.yaml" {
            // examples use the same names again
            let done = test.kube().kubectl_with_input(&["delete", "-f", "-"], &text).await;
            done.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}

async fn objects_with_every_field_are_stored_as_they_were_written(test: Test) {
    for (name, text) in files("tests/fixtures/full") {
        let text = in_own_namespace(&test, &text);
        // strict: a field that is not in the schema is an error, not a warning
        let args = ["apply", "--server-side", "--validate=strict", "-f", "-"];
        let done = test.kube().kubectl_with_input(&args, &text).await;
        done.unwrap_or_else(|error| panic!("{name}: {error}"));
        let args = ["get", "-o", "json", "-f", "-"];
        let stored = test.kube().kubectl_with_input(&args, &text).await;
        let stored: Value = serde_json::from_str(&stored.unwrap_or_else(|error| panic!("{name}: {error}")))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let written: Value = serde_yaml::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        // objects named by a file come as a list
        assert_eq!(stored["items"][0]["spec"], written["spec"], "{name}");
    }
}

async fn what_must_be_refused_is_refused_with_its_sentence(test: Test) {
    let mut wrong = Vec::new();
    for (name, text) in files("tests/fixtures/refused") {
        let expected = text.lines().next().and_then(|line| line.strip_prefix("# refused: "));
        let expected = expected.unwrap_or_else(|| panic!("{name}: the first line is to be `# refused: <sentence>`"));
        let text = text.replace("namespace: default", &format!("namespace: {}", test.namespace()));
        let documents: Vec<&str> = text.split("\n---\n").collect();
        let Some((refused, accepted)) = documents.split_last() else {
            panic!("{name}: no document");
        };
        for document in accepted {
            let done = apply(&test, document).await;
            done.unwrap_or_else(|error| panic!("{name}: all but the last are accepted: {error}"));
        }
        match apply(&test, refused).await {
            Err(said) if said.contains(expected) => {}
            Err(said) => wrong.push(format!("{name}: expected {expected:?}, got {said}")),
            Ok(_) => wrong.push(format!("{name}: accepted; expected {expected:?}")),
        }
        for document in accepted {
            let done = test.kube().kubectl_with_input(&["delete", "-f", "-"], document).await;
            done.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

async fn explained(test: &Test, path: &str) -> String {
    let text = test.kube().kubectl(&["explain", path]).await;
    text.unwrap_or_else(|error| panic!("explain {path}: {error}"))
}

/// Every object in a schema with the names of its fields, by the path that `kubectl explain` takes.
fn explainable(path: &str, schema: &Value, found: &mut Vec<(String, Vec<String>)>) {
    let schema = schema.get("items").unwrap_or(schema);
    let Some(fields) = schema["properties"].as_object() else {
        return;
    };
    found.push((path.to_owned(), fields.keys().cloned().collect()));
    for (name, field) in fields {
        explainable(&format!("{path}.{name}"), field, found);
    }
}

async fn kubectl_explains_every_field(test: Test) {
    let mut paths = Vec::new();
    for (_, text) in files("crds") {
        let crd: Value = serde_yaml::from_str(&text).unwrap_or_else(|error| panic!("{error}"));
        let (names, schema) = (
            &crd["spec"]["names"],
            &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"],
        );
        for part in ["spec", "status"] {
            let path = format!("{}.{part}", names["shortNames"][0].as_str().unwrap_or_default());
            explainable(&path, &schema["properties"][part], &mut paths);
        }
    }
    assert!(paths.len() > 40, "the definitions were read: {paths:?}");
    for part in paths.chunks(4) {
        let explaining = part.iter().map(|(path, fields)| is_explained(&test, path, fields));
        join_all(explaining).await;
    }
}

async fn is_explained(test: &Test, path: &str, fields: &[String]) {
    let text = explained(test, path).await;
    let (about, listed) = text
        .split_once("FIELDS:")
        .unwrap_or_else(|| panic!("{path} has fields: {text}"));
    let about = about.split("DESCRIPTION:").nth(1).unwrap_or_default().trim();
    assert!(about.len() > 10 && about != "<empty>", "{path} is described: {text}");
    assert!(!listed.contains("<no description>"), "{path}: {text}");
    for field in fields {
        let is_listed = |line: &str| line.split_whitespace().next() == Some(field);
        assert!(listed.lines().any(is_listed), "{path} has {field}: {text}");
    }
}

/// The heading of `kubectl get`, word by word.
async fn heading(test: &Test, args: &[&str]) -> Vec<String> {
    let namespace = test.namespace();
    let args = [&["get", "-n", &namespace], args].concat();
    let text = test.kube().kubectl(&args).await;
    let text = text.unwrap_or_else(|error| panic!("{args:?}: {error}"));
    let first = text.lines().next().unwrap_or_default();
    first.split_whitespace().map(str::to_owned).collect()
}

async fn kubectl_get_shows_the_columns_of_the_contract(test: Test) {
    for (name, text) in files("tests/fixtures/full") {
        apply(&test, &in_own_namespace(&test, &text))
            .await
            .unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    let columns = [
        (
            "isrv",
            "NAME PRODUCT VERSION INSTANCES MEMBERS READY REASON CORDONED AGE",
        ),
        ("iplace", "NAME INSTANCE SERVER TARGET POWER READY REASON MOVE% AGE"),
        ("imove", "NAME METHOD FROM TO STEP PROGRESS DOWNTIME OUTCOME AGE"),
        ("icopy", "NAME SOURCE TARGET LAST-REFRESH DURATION READY REASON AGE"),
    ];
    for (kind, expected) in columns {
        assert_eq!(heading(&test, &[kind]).await.join(" "), expected, "kubectl get {kind}");
    }
    let wide = heading(&test, &["iplace", "-o", "wide"]).await;
    for column in ["MEMBER", "POOL", "METHOD", "MESSAGE"] {
        assert!(wide.iter().any(|c| c == column), "wide has {column}: {wide:?}");
    }
    let namespace = test.namespace();
    let all = test
        .kube()
        .kubectl(&["get", "berth", "-n", &namespace, "-o", "name"])
        .await;
    let all = all.unwrap_or_else(|error| panic!("get berth: {error}"));
    assert_eq!(all.lines().count(), 4, "the category shows all four kinds: {all}");
}
