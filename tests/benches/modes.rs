//! Each way of the data beside the same way by hand: `incus move --mode`, or `incus export` and `incus import`, with the same
//! servers, container and pool, in turns. Also how much memory the controller takes for a relay.
//!
//! Environment: `BERTH_BENCH_MIB` (sizes, `200,2048`), `BERTH_BENCH_RUNS` (3; three times as often where it takes seconds).

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use berth_tests::{Controller, ControllerOptions, NewInstance, Placement, Server, Test};
use serde_json::json;

mod common;

use common::{LONG, Times, numbers};

/// What Berth may take of the time by hand, and of memory for a relay, in MiB.
const TIME: f64 = 1.05;
const MEMORY: u64 = 64;
/// Up to so many MiB a move takes seconds: chance counts for more, and more runs cost little.
const SMALL: usize = 200;

fn main() -> ExitCode {
    common::main(
        "modes",
        "every way of the data is measured beside the same way by hand",
        common::CONTAINERS,
        measure,
    )
}

/// One row of the table.
struct Row {
    what: String,
    mode: &'static str,
    cli: Times,
    berth: Times,
    /// Most memory that the controller took more than before, in MiB.
    memory: u64,
}

async fn measure(test: Test) {
    let sizes = numbers("BERTH_BENCH_MIB", "200,2048");
    let runs = common::runs(3);
    test.add_servers(&["i1", "i2"]).await;
    let scratch = test.dir().join("scratch");
    let options = ControllerOptions {
        args: vec![format!("--scratch-dir={}", scratch.display())],
        ..ControllerOptions::default()
    };
    let controller = test.controller_with(options).await;
    let mut rows = Vec::new();
    for size in sizes {
        let runs = if size <= SMALL { 3 * runs } else { runs };
        for (pool, driver) in [("default", "dir"), ("btr", "btrfs")] {
            rows.extend(of_size(&test, &controller, (size, pool, driver), runs).await);
        }
    }
    controller.kill().await;
    let text = report(&rows, runs);
    common::write_part("ways", &text);
    let _ = writeln!(std::io::stdout(), "\n{text}");
    let missed: Vec<String> = rows.iter().filter_map(missed).collect();
    assert!(missed.is_empty(), "missed: {missed:#?}");
}

async fn of_size(
    test: &Test,
    controller: &Controller,
    (size, pool, driver): (usize, &str, &str),
    runs: usize,
) -> Vec<Row> {
    let (mut here, mut there) = (test.lab().server("i1"), test.lab().server("i2"));
    let name = test.unique(&format!("web-{size}-{driver}"));
    here.create(&name, &NewInstance::on_pool(pool)).await;
    let fill = format!("dd if=/dev/urandom of=/root/data bs=1M count={size} && sync");
    let filled = test
        .lab()
        .incus(&["exec", &format!("i1:{name}"), "--", "sh", "-c", &fill])
        .await;
    filled.unwrap_or_else(|error| panic!("{error}"));
    let mut rows = Vec::new();
    for mode in ["Pull", "Push", "Relay", "Backup"] {
        let mut row = Row {
            what: format!("{size} MiB, {driver}"),
            mode,
            cli: Times::default(),
            berth: Times::default(),
            memory: 0,
        };
        for by_berth in common::turns(runs) {
            let seconds = if by_berth {
                let (seconds, memory) = by_berth_itself(test, controller, &name, (&here.name, &there.name), mode).await;
                row.memory = row.memory.max(memory);
                seconds
            } else {
                by_hand(test, &name, here, there, mode).await
            };
            std::mem::swap(&mut here, &mut there);
            let times = if by_berth { &mut row.berth } else { &mut row.cli };
            times.add(seconds);
        }
        let _ = writeln!(std::io::stdout(), "{}", line(&row));
        rows.push(row);
    }
    here.delete(&name).await.unwrap_or_else(|error| panic!("{error}"));
    rows
}

/// From the edit until the placement is Ready, in seconds, and the memory that it took, in MiB.
async fn by_berth_itself(
    test: &Test,
    controller: &Controller,
    name: &str,
    (from, to): (&str, &str),
    mode: &str,
) -> (f64, u64) {
    test.place(&Placement::new(name, from).with(json!({"transfer": mode, "methods": ["Cold"]})))
        .await;
    test.wait_in_place(name, from, LONG).await;
    let peak = Arc::new(AtomicU64::new(0));
    let before = resident(controller.pid());
    let (seen, pid) = (peak.clone(), controller.pid());
    let watch = tokio::spawn(async move {
        let mut looks = tokio::time::interval(Duration::from_millis(100));
        loop {
            looks.tick().await;
            seen.fetch_max(resident(pid), Ordering::Relaxed);
        }
    });
    common::on_disk().await;
    let begun = Instant::now();
    common::move_by_berth(test, name, json!({"server": to})).await;
    let seconds = begun.elapsed().as_secs_f64();
    watch.abort();
    test.delete("InstancePlacement", name).await;
    (seconds, peak.load(Ordering::Relaxed).saturating_sub(before) / 1024)
}

/// Resident memory of a process in KiB.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let number = line.and_then(|l| l.trim().split(' ').next()?.parse().ok());
    number.unwrap_or(0)
}

/// The same with the command line, in seconds.
async fn by_hand(test: &Test, name: &str, from: &Server, to: &Server, mode: &str) -> f64 {
    let (source, target) = (format!("{}:{name}", from.name), format!("{}:{name}", to.name));
    let (remote, file) = (
        format!("{}:", to.name),
        test.dir().join("backup.tar.gz").display().to_string(),
    );
    let flag = format!("--mode={}", mode.to_lowercase());
    let way: Vec<Vec<&str>> = match mode {
        "Backup" => vec![
            vec!["export", &source, &file, "-q"],
            vec!["import", &remote, &file, "-q"],
            vec!["delete", &source],
        ],
        _ => vec![vec!["move", &source, &target, &flag, "-q"]],
    };
    common::on_disk().await;
    let begun = Instant::now();
    let all = [vec![vec!["stop", &source]], way, vec![vec!["start", &target]]].concat();
    for args in all {
        let done = test.lab().incus(&args).await;
        done.unwrap_or_else(|error| panic!("{args:?}: {error}"));
    }
    let seconds = begun.elapsed().as_secs_f64();
    let _ = std::fs::remove_file(&file);
    seconds
}

fn line(row: &Row) -> String {
    format!(
        "| {} | {} | {} | {} | {:.2} | {} |",
        row.what,
        row.mode,
        row.cli.shown(),
        row.berth.shown(),
        row.berth.median() / row.cli.median(),
        row.memory
    )
}

fn report(rows: &[Row], runs: usize) -> String {
    let mut text = format!(
        "## Ways of the data\n\n\
         A container with that much random data, moved between two Incus servers on one machine, {runs} times by Berth and {runs} times by\n\
         hand in turns, three times as often up to {SMALL} MiB: `incus stop; incus move --mode=MODE; incus start`, and for Backup\n\
         `incus stop; incus export; incus import; incus delete; incus start`. Median [smallest-largest] of the whole, in seconds.\n\
         Memory is the most that the controller took more than before, in MiB. The clock starts when all is on the disk.\n\n\
         | data, pool | transfer | by hand | by Berth | ratio | memory |\n\
         |---|---|---|---|---|---|\n"
    );
    for row in rows {
        let _ = writeln!(text, "{}", line(row));
    }
    let _ = writeln!(
        text,
        "\nTargets: ratio at most {TIME}, memory of a relay at most {MEMORY} MiB. What Berth does and a hand does not (marks, the\n\
         guard, the look at what arrived, durable records) takes some 0.1 s, whatever the size; of a move that takes 1.6 s in\n\
         all that is a twentieth, and chance decides on which side of the target such a row falls."
    );
    text
}

fn missed(row: &Row) -> Option<String> {
    let ratio = row.berth.median() / row.cli.median();
    let slow = ratio > TIME && row.berth.median() - row.cli.median() > 0.5;
    let large = row.mode == "Relay" && row.memory > MEMORY;
    (slow || large).then(|| format!("{} {}: ratio {ratio:.2}, {} MiB", row.what, row.mode, row.memory))
}
