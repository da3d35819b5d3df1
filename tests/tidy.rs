//! Order in the repository, checked without any server: dependencies, pure packages, sizes of files, things that must not
//! be committed, and generated files. `UPDATE=1 cargo test --workspace --test tidy` writes the generated ones anew.

#[path = "tidy/argocd.rs"]
mod argocd;
#[path = "tidy/image.rs"]
mod image;
#[path = "tidy/reference.rs"]
mod reference;
#[path = "tidy/supply.rs"]
mod supply;

use std::path::Path;
use std::process::Command;

use berth_api::Reason;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ has a parent")
}

fn read(path: &str) -> Result<String> {
    let text = std::fs::read_to_string(root().join(path));
    text.map_err(|error| format!("{path}: {error}").into())
}

/// Paths of all files that are, or would be, committed.
fn files() -> Result<Vec<String>> {
    let mut git = Command::new("git");
    git.current_dir(root())
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let output = git.output()?;
    if !output.status.success() {
        return Err(format!("git ls-files: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let mut files: Vec<String> = String::from_utf8(output.stdout)?
        .split('\0')
        // a file that was deleted and not yet committed is still listed
        .filter(|path| !path.is_empty() && root().join(path).is_file())
        .map(str::to_owned)
        .collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// Text files only, each with its text.
fn texts() -> Result<Vec<(String, String)>> {
    let read = |path: String| Some((path.clone(), std::fs::read_to_string(root().join(path)).ok()?));
    Ok(files()?.into_iter().filter_map(read).collect())
}

fn is_generated(path: &str) -> bool {
    let folders = [
        "crds/",
        "charts/berth/files/crds/",
        "docs/reference/",
        "tests/fixtures/",
    ];
    let names = ["Cargo.lock", "LICENSE", "go.mod", "go.sum"];
    folders.iter().any(|folder| path.starts_with(folder)) || names.iter().any(|name| path.ends_with(name))
}

#[test]
fn no_file_is_longer_than_600_lines() -> Result {
    let long = |(path, text): &(String, String)| !is_generated(path) && text.lines().count() > 600;
    let long: Vec<_> = texts()?
        .into_iter()
        .filter(long)
        .map(|(path, text)| (path, text.lines().count()))
        .collect();
    assert!(long.is_empty(), "to be divided: {long:?}");
    Ok(())
}

#[test]
fn no_file_names_a_place_on_somebodys_machine() -> Result {
    let checkout = root().display().to_string();
    // written in parts, or this file would name them
    let places = [
        checkout.as_str(),
        concat!("/ho", "me/"),
        concat!("/Us", "ers/"),
        concat!("/wo", "rk/"),
    ];
    let settings = [
        concat!("GOPROXY", "="),
        concat!("replace-", "with"),
        concat!("index-", "url"),
        concat!("registry-", "mirrors"),
    ];
    for (path, text) in texts()? {
        assert!(
            !path.starts_with(".cargo/"),
            "{path}: cargo's settings belong to a machine, not to the project"
        );
        for (number, line) in text.lines().enumerate() {
            if let Some(word) = places.iter().chain(&settings).find(|word| line.contains(**word)) {
                panic!("{path}:{}: {word}: {line}", number + 1);
            }
        }
    }
    Ok(())
}

#[test]
fn the_core_has_no_clock_no_chance_and_no_surroundings() -> Result {
    let forbidden = [
        "Timestamp::now",
        "Zoned::now",
        "SystemTime",
        "Instant::now",
        "std::env",
        "std::fs",
        "std::net",
        "std::process",
        "std::thread",
        "rand::",
        "tokio",
        "reqwest",
        "kube::Client",
        "kube::Api",
    ];
    let mut seen = 0;
    for (path, text) in texts()?
        .into_iter()
        .filter(|(path, _)| path.starts_with("controller/core/src/"))
    {
        seen += 1;
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if let Some(word) = forbidden.iter().find(|word| code.contains(**word)) {
                panic!("{path}:{}: {word}: facts and the time are handed in", number + 1);
            }
        }
    }
    assert!(seen > 5, "the core has been moved: change this test");
    Ok(())
}

/// Compares a generated file, or with `UPDATE=1` writes it.
fn generated(path: &str, text: &str) -> Result {
    let file = root().join(path);
    if std::env::var_os("UPDATE").is_some_and(|update| update == "1") {
        std::fs::create_dir_all(file.parent().unwrap_or(root()))?;
        std::fs::write(&file, text)?;
    }
    let stored = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        stored == text,
        "{path} is not up to date: UPDATE=1 cargo test --workspace --test tidy"
    );
    Ok(())
}

/// The folder holds the given files and no others.
fn only(folder: &str, mut expected: Vec<String>) -> Result {
    let present = std::fs::read_dir(root().join(folder))?;
    let mut present: Vec<String> = present
        .flatten()
        .map(|file| file.file_name().to_string_lossy().into_owned())
        .collect();
    present.sort();
    expected.sort();
    assert_eq!(present, expected, "{folder}");
    Ok(())
}

#[test]
fn the_definitions_in_the_chart_are_those_of_the_types() -> Result {
    let mut names = Vec::new();
    for crd in berth_api::crds() {
        let name = format!("{}.yaml", crd.spec.names.plural);
        let text = serde_yaml::to_string(&crd)?;
        // the chart puts labels and the annotation that keeps them in at this place
        assert_eq!(
            text.matches("\nmetadata:\n  annotations:\n").count(),
            1,
            "{name}: templates/crds.yaml looks for this"
        );
        generated(&format!("charts/berth/files/crds/{name}"), &text)?;
        names.push(name);
    }
    only("charts/berth/files/crds", names)
}

#[test]
fn the_reference_is_made_from_the_types() -> Result {
    let mut names = Vec::new();
    for crd in berth_api::crds() {
        let name = format!(
            "{}.md",
            crd.spec.names.singular.as_deref().unwrap_or(&crd.spec.names.plural)
        );
        generated(
            &format!("docs/reference/{name}"),
            &reference::page(&crd).ok_or("a definition without a schema")?,
        )?;
        names.push(name);
    }
    only("docs/reference", names)
}

#[test]
fn every_reason_is_explained_with_its_cause_and_its_cure() -> Result {
    let text = read("docs/troubleshooting.md")?;
    let chapters = text.split("\n## ");
    let sections: Vec<(&str, &str)> = chapters
        .flat_map(|chapter| chapter.split("\n### ").skip(1))
        .filter_map(|section| section.split_once('\n'))
        .collect();
    let sources: Vec<String> = texts()?
        .into_iter()
        .filter(|(path, _)| path.starts_with("controller/") && !path.ends_with("api/src/reasons.rs"))
        .map(|(_, text)| text)
        .collect();
    for reason in Reason::ALL {
        let found: Vec<_> = sections.iter().filter(|(name, _)| *name == reason.as_str()).collect();
        assert_eq!(
            found.len(),
            1,
            "docs/troubleshooting.md needs one section \"### {reason}\""
        );
        let body = found[0].1;
        let first = body.lines().find(|line| !line.is_empty()).unwrap_or_default();
        assert_eq!(
            first,
            reason.describe(),
            "docs/troubleshooting.md, {reason}: the first line is what the code says"
        );
        for part in ["- Cause: ", "- Cure: "] {
            let line = body
                .lines()
                .find_map(|line| line.strip_prefix(part))
                .unwrap_or_default();
            assert!(
                !line.is_empty(),
                "docs/troubleshooting.md, {reason}: \"{part}\" is missing"
            );
        }
        let used = sources.iter().any(|text| uses(text, &format!("Reason::{reason}")));
        let said = !body.contains("*Not used by this version.*");
        assert_eq!(
            used, said,
            "docs/troubleshooting.md, {reason}: used by the code: {used}; said to be: {said}"
        );
    }
    for (name, _) in sections {
        assert!(
            Reason::parse(name).is_some(),
            "docs/troubleshooting.md explains {name}, which is no reason"
        );
    }
    Ok(())
}

/// Whether `text` has `word`, and not only as the beginning of a longer one.
fn uses(text: &str, word: &str) -> bool {
    text.split(word)
        .skip(1)
        .any(|rest| !rest.starts_with(|c: char| c.is_alphanumeric()))
}

#[test]
fn links_inside_the_documents_lead_somewhere() -> Result {
    for (path, text) in texts()?.into_iter().filter(|(path, _)| path.ends_with(".md")) {
        let folder = Path::new(&path).parent().unwrap_or(Path::new(""));
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            assert!(
                root().join(folder).join(target).exists(),
                "{path} links to {link}, which does not exist"
            );
        }
    }
    Ok(())
}

#[test]
fn the_how_tos_show_the_manifests_that_the_suites_apply() -> Result {
    for (document, examples) in [
        (
            "docs/flux.md",
            &[
                "flux/shop/servers.yaml",
                "flux/shop/placements.yaml",
                "flux/shop/kustomization.yaml",
                "flux/sync.yaml",
            ][..],
        ),
        (
            "docs/argocd.md",
            &[
                "argocd/shop/servers.yaml",
                "argocd/shop/placements.yaml",
                "argocd/application.yaml",
            ],
        ),
        ("docs/operations.md", &["tenancy.yaml"]),
    ] {
        let shown = read(document)?;
        for example in examples {
            let text = read(&format!("examples/{example}"))?;
            let head: usize = text
                .lines()
                .take_while(|line| line.starts_with('#'))
                .map(|line| line.len() + 1)
                .sum();
            assert!(
                shown.contains(&text[head..]),
                "{document} does not show examples/{example} as it is"
            );
        }
    }
    let text = read("examples/flux/sync-waiting.yaml")?;
    let (_, expressions) = text.split_once("  healthCheckExprs:").ok_or("no expressions")?;
    assert!(
        read("docs/flux.md")?.contains(expressions),
        "docs/flux.md shows other expressions"
    );
    Ok(())
}
