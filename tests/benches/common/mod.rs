//! What the benches share: the release build as the program under test, times, and a container's own signs of life.
#![allow(dead_code, reason = "each bench uses its part")]

use std::future::Future;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use berth_tests::{Needs, Product, SOON, Server, Suite, Test, reason, wait_for};
use kube::api::DynamicObject;
use kube::runtime::wait::await_condition;
use serde_json::{Value, json};

pub mod live;
pub mod steps;

/// Parts of docs/benchmarks.md in their order; each bench writes its own.
const PARTS: [&str; 6] = ["moves", "ways", "warm", "live", "criu", "gitops"];
/// What a bench of containers needs.
pub const CONTAINERS: &[Needs] = &[Needs::Kube, Needs::Lab];
pub const LONG: Duration = Duration::from_secs(1800);

/// Runs one bench. `cargo bench` says `--bench`, which a runner of tests takes for "run none"; and what is measured is the
/// release build.
pub fn main<F>(name: &'static str, sentence: &str, needs: &[Needs], measure: fn(Test) -> F) -> ExitCode
where
    F: Future<Output = ()> + Send + 'static,
{
    if std::env::var_os("BERTH_BIN").is_some() && !std::env::args().any(|arg| arg == "--bench") {
        return Suite::new(name, needs)
            .timeout(Duration::from_secs(7200))
            .together(sentence, measure)
            .main();
    }
    match again_with_release_build() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn again_with_release_build() -> std::io::Result<bool> {
    let me = std::env::current_exe()?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let build = ["build", "--quiet", "--release", "--package", "berth", "--bin", "berth"];
    if !Command::new(cargo).args(build).current_dir(root()).status()?.success() {
        return Ok(false);
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let release = target.join("release/berth");
    let args = std::env::args_os().skip(1).filter(|arg| arg != "--bench");
    Ok(Command::new(&me)
        .args(args)
        .env("BERTH_BIN", release)
        // room for what btrfs has not cleared away yet
        .env("LAB_POOL_SIZE", "24GiB")
        .status()?
        .success())
}

/// The workspace.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// The numbers in an environment variable, or the usual ones.
pub fn numbers(variable: &str, usual: &str) -> Vec<usize> {
    let text = std::env::var(variable).unwrap_or_else(|_| usual.to_owned());
    let number = |n: &str| n.trim().parse().unwrap_or_else(|e| panic!("{variable}={text}: {e}"));
    text.split(',').map(number).collect()
}

/// How many moves of each kind are made (`BERTH_BENCH_RUNS`).
pub fn runs(usual: usize) -> usize {
    numbers("BERTH_BENCH_RUNS", &usual.to_string())[0]
}

/// Whose turn it is, Berth's or a hand's: either goes first in turn, so that both go in both directions.
pub fn turns(runs: usize) -> impl Iterator<Item = bool> {
    (0..runs).flat_map(|run| [run % 2 == 0, run % 2 != 0])
}

/// Waits until all that was written is on the disk, which the two servers share.
pub async fn on_disk() {
    let done = tokio::process::Command::new("sync").status().await;
    assert!(done.is_ok_and(|status| status.success()), "sync failed");
}

/// Seconds, one per run.
#[derive(Default)]
pub struct Times(Vec<f64>);

impl Times {
    /// One more.
    pub fn add(&mut self, seconds: f64) {
        self.0.push(seconds);
        self.0.sort_by(f64::total_cmp);
    }

    /// The middle one.
    pub fn median(&self) -> f64 {
        let n = self.0.len();
        if n == 0 {
            return f64::NAN;
        }
        (self.0[(n - 1) / 2] + self.0[n / 2]) / 2.0
    }

    /// `1.234 [1.200-1.300]`
    pub fn shown(&self) -> String {
        format!("{:.3} [{:.3}-{:.3}]", self.median(), self.smallest(), self.largest())
    }

    /// The smallest.
    pub fn smallest(&self) -> f64 {
        self.0.first().copied().unwrap_or(f64::NAN)
    }

    /// The largest.
    pub fn largest(&self) -> f64 {
        self.0.last().copied().unwrap_or(f64::NAN)
    }
}

/// Stops, moves and starts it with the product's own client.
pub async fn move_by_hand(test: &Test, name: &str, from: &Server, to: &Server) {
    let (source, target) = (format!("{}:{name}", from.name), format!("{}:{name}", to.name));
    for args in [
        &["stop", &source][..],
        &["move", &source, &target, "-q"],
        &["start", &target],
    ] {
        let done = match from.product {
            Product::Incus => test.lab().incus(args).await,
            Product::Lxd => test.lab().lxc(args).await,
        };
        done.unwrap_or_else(|error| panic!("{args:?}: {error}"));
    }
}

/// From the edit of the target until the placement is Ready there; watched, as pauses between looks would count.
pub async fn move_by_berth(test: &Test, name: &str, target: Value) {
    let api = test.kube().api("InstancePlacement", &test.namespace());
    test.retarget(name, target.clone()).await;
    let there = move |location: &Value| {
        ["server", "member"]
            .iter()
            .all(|k| target[k].is_null() || location[k] == target[k])
    };
    let placed = move |object: Option<&DynamicObject>| {
        let object = json!(object);
        reason(&object) == "True/InPlace"
            && there(&object["status"]["location"])
            && object["status"]["observedGeneration"] == object["metadata"]["generation"]
    };
    let placed = tokio::time::timeout(LONG, await_condition(api, name, placed)).await;
    let placed = placed.unwrap_or_else(|_| panic!("{name} did not arrive"));
    placed.unwrap_or_else(|error| panic!("watching {name}: {error}"));
}

/// The record of the last move.
pub async fn newest_move(test: &Test, name: &str) -> Value {
    let started = |record: &Value| record["status"]["startedAt"].as_str().unwrap_or_default().to_owned();
    let newest = test.moves(name).await.into_iter().max_by_key(started);
    newest.unwrap_or_else(|| panic!("{name} was moved"))
}

/// Times at which the container ran.
pub async fn ticking(server: &Server, name: &str, at_least: usize) -> Vec<f64> {
    wait_for(&format!("{name} to tick"), SOON, || async {
        let ticks = ticks(server, name).await;
        if ticks.len() >= at_least {
            Ok(ticks)
        } else {
            Err(format!("{} ticks", ticks.len()))
        }
    })
    .await
}

/// As [`ticking`], once some of them are from after the move.
pub async fn ticks_of_both(server: &Server, name: &str) -> Vec<f64> {
    let before = ticks(server, name).await.len();
    ticking(server, name, before + 5).await
}

/// The same as far as there are any.
pub async fn ticks(server: &Server, name: &str) -> Vec<f64> {
    let log = server.read_file(name, "/var/log/ticks").await.unwrap_or_default();
    let log = String::from_utf8_lossy(&log).into_owned();
    log.lines()
        .filter_map(|line| line.split(' ').next()?.parse().ok())
        .collect()
}

/// The longest time without a sign of life.
pub fn largest_gap(ticks: &[f64]) -> f64 {
    ticks.windows(2).map(|two| two[1] - two[0]).fold(0.0, f64::max)
}

/// All time without a sign of life: frozen and stopped. Shorter gaps are a busy machine.
pub fn silence(ticks: &[f64]) -> f64 {
    ticks
        .windows(2)
        .map(|two| two[1] - two[0])
        .filter(|gap| *gap > 0.2)
        .sum()
}

/// Puts this in the place of one of the parts of docs/benchmarks.md; the others stay.
pub fn write_part(part: &str, text: &str) {
    let path = root().join("docs/benchmarks.md");
    let old = std::fs::read_to_string(&path).unwrap_or_default();
    let mut page = "# Measured\n\nWritten by `make bench`, on an idle machine with two cores.\n".to_owned();
    for name in PARTS {
        let (begin, end) = (format!("<!-- part: {name} -->\n"), format!("<!-- end: {name} -->\n"));
        let stored = old.split_once(&begin).and_then(|(_, rest)| rest.split_once(&end));
        let stored = stored.map_or("", |(stored, _)| stored);
        let body = if name == part { text } else { stored };
        page.push_str(&format!("\n{begin}{body}{end}"));
    }
    std::fs::write(&path, page).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
