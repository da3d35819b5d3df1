//! What the project depends on: which package of ours may use which, and what `deny.toml` says of the others.
//!
//! The same file serves `cargo deny`; this reading of it needs nothing but cargo. Advisories are left to `cargo deny`,
//! since they need the network.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use cargo_metadata::{DependencyKind, MetadataCommand};
use serde::Deserialize;

use crate::{Result, read, root};

/// Who may use whom: `api <- core <- {client, engine} <- berth`.
const ARROWS: [(&str, &[&str]); 5] = [
    ("berth-api", &[]),
    ("berth-core", &["berth-api"]),
    ("berth-client", &["berth-api", "berth-core"]),
    ("berth-engine", &["berth-api", "berth-core"]),
    ("berth", &["berth-api", "berth-core", "berth-client", "berth-engine"]),
];

#[test]
fn packages_depend_on_each_other_in_one_direction_only() -> Result {
    let metadata = MetadataCommand::new().current_dir(root()).no_deps().exec()?;
    let ours: BTreeSet<&str> = metadata.packages.iter().map(|package| package.name.as_str()).collect();
    for (name, allowed) in ARROWS {
        let package = metadata.packages.iter().find(|package| package.name.as_str() == name);
        let package = package.ok_or_else(|| format!("there is no package {name}"))?;
        for dependency in &package.dependencies {
            let (other, kind) = (dependency.name.as_str(), dependency.kind);
            // a package's own tests may use the simulated servers; what is built never does
            let in_tests = other == "berth-sim" && kind == DependencyKind::Development;
            let fine = !ours.contains(other) || allowed.contains(&other) || in_tests;
            assert!(fine, "{name} must not use {other} ({kind:?})");
        }
    }
    let sim = metadata
        .packages
        .iter()
        .find(|package| package.name.as_str() == "berth-sim")
        .ok_or("berth-sim")?;
    let used = sim
        .dependencies
        .iter()
        .filter(|d| d.kind == DependencyKind::Normal && ours.contains(d.name.as_str()));
    for dependency in used {
        let name = dependency.name.as_str();
        assert!(
            ["berth-api", "berth-core"].contains(&name),
            "berth-sim must not use {name}"
        );
    }
    Ok(())
}

#[test]
fn the_deciding_packages_can_reach_neither_a_network_nor_a_clock() -> Result {
    let forbidden = [
        (
            "berth-api",
            &["tokio", "reqwest", "hyper", "kube-client", "kube-runtime", "rand"][..],
        ),
        (
            "berth-core",
            &[
                "tokio",
                "reqwest",
                "hyper",
                "kube-client",
                "kube-runtime",
                "rand",
                "rustls",
            ],
        ),
        ("berth-client", &["kube-client", "kube-runtime", "berth-engine"]),
        (
            "berth-engine",
            &[
                "kube-client",
                "kube-runtime",
                "reqwest",
                "hyper",
                "berth-client",
                "berth-sim",
            ],
        ),
        ("berth", &["berth-sim", "berth-tests", "chrono", "kube-cel"]),
    ];
    for (package, forbidden) in forbidden {
        let graph = Graph::read(&["--package", package, "--edges", "normal,build"])?;
        for name in forbidden {
            assert!(
                !graph.packages.contains_key(*name),
                "{package} must not reach {name}: {}",
                graph.way_to(name)
            );
        }
    }
    Ok(())
}

/// The part of `deny.toml` that can be checked offline; a key that this does not know fails the test.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Deny {
    graph: Targets,
    bans: Bans,
    licenses: Licences,
    sources: Sources,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Targets {
    targets: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Bans {
    multiple_versions: String,
    deny: Vec<Ban>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Ban {
    #[serde(rename = "crate")]
    name: String,
    #[serde(default)]
    deny_multiple_versions: bool,
    #[serde(default)]
    wrappers: Vec<String>,
    reason: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Licences {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Sources {
    unknown_registry: String,
    unknown_git: String,
    allow_registry: Vec<String>,
}

fn deny() -> Result<Deny> {
    Ok(toml::from_str(&read("deny.toml")?)?)
}

/// One version of a package and the names of those that use it.
struct Package {
    licence: String,
    used_by: BTreeSet<String>,
}

/// What cargo would build: `cargo tree` knows, other than `cargo metadata`, which optional dependencies are off.
struct Graph {
    packages: BTreeMap<String, BTreeMap<String, Package>>,
}

impl Graph {
    fn read(selection: &[&str]) -> Result<Graph> {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command
            .current_dir(root())
            .args(["tree", "--offline", "--prefix", "depth", "--format", "\t{p}\t{l}"]);
        let output = command.args(selection).output()?;
        if !output.status.success() {
            return Err(format!("cargo tree {selection:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        let mut packages: BTreeMap<String, BTreeMap<String, Package>> = BTreeMap::new();
        let mut above: Vec<String> = Vec::new();
        for line in String::from_utf8(output.stdout)?
            .lines()
            .filter(|line| !line.is_empty())
        {
            let mut columns = line.split('\t');
            let depth: usize = columns.next().unwrap_or_default().parse()?;
            let mut words = columns.next().unwrap_or_default().split(' ');
            let (name, version) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            // a package that was printed before is marked so at the end of the line
            let licence = columns.next().unwrap_or_default().trim_end_matches("(*)").trim();
            above.truncate(depth);
            let versions = packages.entry(name.to_owned()).or_default();
            let package = versions.entry(version.to_owned()).or_insert_with(|| Package {
                licence: licence.to_owned(),
                used_by: BTreeSet::new(),
            });
            package.used_by.extend(above.last().cloned());
            above.push(name.to_owned());
        }
        Ok(Graph { packages })
    }

    fn everything() -> Result<Graph> {
        Graph::read(&["--workspace", "--edges", "normal,build,dev"])
    }

    fn users(&self, name: &str) -> BTreeSet<&str> {
        let versions = self.packages.get(name).into_iter().flat_map(BTreeMap::values);
        versions
            .flat_map(|package| &package.used_by)
            .map(String::as_str)
            .collect()
    }

    /// One chain of users up to a package that nobody uses, for the message.
    fn way_to(&self, name: &str) -> String {
        let mut way = vec![name];
        while let Some(user) = self
            .users(way[way.len() - 1])
            .into_iter()
            .find(|user| !way.contains(user))
        {
            way.push(user);
        }
        way.join(" <- ")
    }
}

#[test]
fn nothing_is_built_that_deny_toml_bans() -> Result {
    let (deny, graph) = (deny()?, Graph::everything()?);
    assert_eq!(
        deny.bans.multiple_versions, "allow",
        "small packages in two versions are nobody's harm"
    );
    assert!(!deny.graph.targets.is_empty());
    for ban in deny.bans.deny {
        let name = ban.name.as_str();
        let Some(versions) = graph.packages.get(name) else {
            assert!(
                !ban.deny_multiple_versions,
                "{name} is not used any more: take it out of deny.toml"
            );
            continue;
        };
        if ban.deny_multiple_versions {
            assert_eq!(
                versions.len(),
                1,
                "{name} in several versions ({}): {:?}",
                ban.reason,
                versions.keys()
            );
            continue;
        }
        let users = graph.users(name);
        let wrapped = !ban.wrappers.is_empty() && users.iter().all(|user| ban.wrappers.iter().any(|w| w == user));
        assert!(wrapped, "{name} is banned ({}): {}", ban.reason, graph.way_to(name));
    }
    Ok(())
}

#[test]
fn every_licence_is_one_that_deny_toml_allows() -> Result {
    let (allowed, graph) = (deny()?.licenses.allow, Graph::everything()?);
    let mut needed = BTreeSet::new();
    for (name, version, package) in graph
        .packages
        .iter()
        .flat_map(|(name, versions)| versions.iter().map(move |(v, p)| (name, v, p)))
    {
        let chosen = satisfy(&package.licence, &allowed)
            .map_err(|error| format!("{name} {version}: licence {:?}: {error}", package.licence))?;
        needed.extend(chosen);
    }
    let idle: Vec<&String> = allowed.difference(&needed).collect();
    assert!(
        idle.is_empty(),
        "allowed in deny.toml, but no package needs it: {idle:?}"
    );
    Ok(())
}

#[test]
fn every_package_comes_from_where_deny_toml_says() -> Result {
    let sources = deny()?.sources;
    assert_eq!(
        (sources.unknown_registry.as_str(), sources.unknown_git.as_str()),
        ("deny", "deny")
    );
    for line in read("Cargo.lock")?.lines() {
        let Some(source) = line.strip_prefix("source = ") else {
            continue;
        };
        let allowed = |registry: &String| source.trim_matches('"') == format!("registry+{registry}");
        assert!(
            sources.allow_registry.iter().any(allowed),
            "Cargo.lock: {source} is not in deny.toml"
        );
    }
    Ok(())
}

/// Which of the allowed licences an SPDX expression is satisfied by, or which part of it is not. `/` is the old way to
/// write OR; AND binds closer than OR, WITH closer than both.
fn satisfy(expression: &str, allowed: &BTreeSet<String>) -> std::result::Result<BTreeSet<String>, String> {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    let found = alternatives(&mut rest, allowed)?;
    if rest.is_empty() {
        Ok(found)
    } else {
        Err(format!("cannot be read from {rest:?} on"))
    }
}

type Chosen = std::result::Result<BTreeSet<String>, String>;

fn alternatives(words: &mut &[&str], allowed: &BTreeSet<String>) -> Chosen {
    let mut best = all_of(words, allowed);
    while let ["OR", rest @ ..] = *words {
        *words = rest;
        let other = all_of(words, allowed);
        best = best.or(other);
    }
    best
}

fn all_of(words: &mut &[&str], allowed: &BTreeSet<String>) -> Chosen {
    let mut found = term(words, allowed);
    while let ["AND", rest @ ..] = *words {
        *words = rest;
        let other = term(words, allowed);
        found = found.and_then(|mut found| {
            found.extend(other?);
            Ok(found)
        });
    }
    found
}

fn term(words: &mut &[&str], allowed: &BTreeSet<String>) -> Chosen {
    let name = match *words {
        ["(", rest @ ..] => {
            *words = rest;
            let inner = alternatives(words, allowed);
            if let [")", rest @ ..] = *words {
                *words = rest;
                return inner;
            }
            return Err("a bracket is not closed".to_owned());
        }
        [name, "WITH", exception, rest @ ..] => {
            *words = rest;
            format!("{name} WITH {exception}")
        }
        [name, rest @ ..] => {
            *words = rest;
            (*name).to_owned()
        }
        [] => return Err("no licence is given".to_owned()),
    };
    if allowed.contains(&name) {
        Ok([name].into())
    } else {
        Err(format!("{name} is not allowed"))
    }
}

#[test]
fn licence_expressions_are_read_as_spdx_means_them() {
    let allowed: BTreeSet<String> = ["MIT", "ISC", "A WITH B"].map(str::to_owned).into();
    let fine = |text: &str| satisfy(text, &allowed).is_ok();
    for text in [
        "MIT",
        "GPL-3.0 OR MIT",
        "GPL-3.0/MIT",
        "(GPL-3.0 OR MIT) AND ISC",
        "GPL-3.0 OR MIT AND ISC",
        "A WITH B",
    ] {
        assert!(fine(text), "{text}");
    }
    for text in [
        "",
        "GPL-3.0",
        "MIT AND GPL-3.0",
        "(MIT",
        "MIT ISC",
        "GPL-3.0 AND MIT OR GPL-2.0",
        "A WITH C",
        "A",
    ] {
        assert!(!fine(text), "{text}");
    }
}
