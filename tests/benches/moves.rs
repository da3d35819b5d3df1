//! Moves by Berth beside moves by hand: the same servers, container and pool, alternating in one run.
//!
//! Prints tables and writes docs/benchmarks.md. Downtime is measured inside the container, which notes the time
//! every few milliseconds: the largest gap is the time in which it did not run.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Instant;

use berth_tests::{NewInstance, Placement, Product, SOON, Test, wait_for};
use serde_json::json;

mod common;
#[path = "../road/mod.rs"]
mod road;

use common::steps::{self, Steps};
use common::{Times, largest_gap, move_by_hand, ticking, ticks_of_both};
use road::Road;

/// Moves of each kind per pair and pool.
const RUNS: usize = 10;
/// Edits whose first request is timed.
const EDITS: usize = 20;
/// What Berth may add to the whole, to the downtime, and take before its first request, in seconds.
const TARGETS: [f64; 3] = [0.5, 0.25, 0.1];

fn main() -> ExitCode {
    common::main(
        "bench",
        "moves by berth are measured beside moves by hand",
        common::CONTAINERS,
        measure,
    )
}

/// What was measured for one pair of servers and one pool.
#[derive(Default)]
struct Measured {
    what: String,
    cli: [Times; 2],
    berth: [Times; 2],
    steps: Steps,
}

async fn measure(test: Test) {
    let first = first_request(&test).await;
    // from here on without proxies
    test.add_servers(&["i1", "i2", "l1", "l2"]).await;
    let controller = test.controller().await;
    let mut all = Vec::new();
    for (one, other) in [("i1", "i2"), ("l1", "l2")] {
        for pool in ["default", "btr"] {
            all.push(side_by_side(&test, one, other, pool).await);
        }
    }
    controller.kill().await;
    let text = report(&all, &first);
    common::write_part("moves", &text);
    let _ = writeln!(std::io::stdout(), "\n{text}");
    let missed = missed(&all, &first);
    assert!(missed.is_empty(), "missed: {missed:#?}");
}

//---------------------------------------------------------------- an edit and the first request

/// From the answer to the edit to the first request about the instance at either server.
async fn first_request(test: &Test) -> Times {
    let road = Road::between(test, "i1", "i2").await;
    let name = test.unique("edit");
    let new = NewInstance {
        start: false,
        ..NewInstance::default()
    };
    test.lab().server("i1").create(&name, &new).await;
    test.place(&Placement::new(&name, "i1")).await;
    let controller = test.controller().await;
    test.wait_in_place(&name, "i1", SOON).await;
    let mut times = Times::default();
    for edit in 0..EDITS {
        let to = ["i2", "i1"][edit % 2];
        let begun = Instant::now();
        test.retarget(&name, json!({"server": to})).await;
        let answered = Instant::now();
        let first = wait_for("the first request", SOON, || async {
            let about = |seen: &berth_tests::Seen| seen.at >= begun && seen.path.contains(&name);
            let seen = road.proxies().flat_map(berth_tests::Proxy::seen);
            seen.filter(about)
                .map(|seen| seen.at)
                .min()
                .ok_or_else(|| "none".to_owned())
        })
        .await;
        times.add(first.saturating_duration_since(answered).as_secs_f64());
        test.wait_in_place(&name, to, SOON).await;
    }
    test.delete("InstancePlacement", &name).await;
    controller.kill().await;
    times
}

//---------------------------------------------------------------- moves side by side

async fn side_by_side(test: &Test, one: &str, other: &str, pool: &str) -> Measured {
    let (mut here, mut there) = (test.lab().server(one), test.lab().server(other));
    let name = test.unique(&format!("web-{one}-{pool}"));
    let new = NewInstance {
        megabytes: 4,
        ..NewInstance::on_pool(pool)
    };
    here.create(&name, &new).await;
    here.write_file(&name, "/etc/tick", "0.01").await;
    let driver = if pool == "btr" { "btrfs" } else { "dir" };
    let product = match here.product {
        Product::Incus => "Incus",
        Product::Lxd => "LXD",
    };
    let mut measured = Measured {
        what: format!("{product} {}, {driver}", here.version),
        ..Measured::default()
    };
    for by_berth in common::turns(RUNS) {
        if by_berth {
            let cold = json!({"methods": ["Cold"]});
            test.place(&Placement::new(&name, &here.name).with(cold)).await;
            test.wait_in_place(&name, &here.name, SOON).await;
        }
        here.write_file(&name, "/var/log/ticks", "").await;
        ticking(here, &name, 5).await;
        let begun = Instant::now();
        if by_berth {
            common::move_by_berth(test, &name, json!({"server": there.name})).await;
        } else {
            move_by_hand(test, &name, here, there).await;
        }
        let total = begun.elapsed().as_secs_f64();
        std::mem::swap(&mut here, &mut there);
        let downtime = largest_gap(&ticks_of_both(here, &name).await);
        let times = if by_berth {
            &mut measured.berth
        } else {
            &mut measured.cli
        };
        times[0].add(total);
        times[1].add(downtime);
        if by_berth {
            measured.steps.add(&common::newest_move(test, &name).await);
            test.delete("InstancePlacement", &name).await;
        }
    }
    let _ = writeln!(std::io::stdout(), "{}", row(&measured));
    here.delete(&name).await.unwrap_or_else(|error| panic!("{error}"));
    measured
}

//---------------------------------------------------------------- the report

fn row(m: &Measured) -> String {
    let added = |index: usize| m.berth[index].median() - m.cli[index].median();
    format!(
        "| {} | {} | {} | {:+.3} | {} | {} | {:+.3} |",
        m.what,
        m.cli[0].shown(),
        m.berth[0].shown(),
        added(0),
        m.cli[1].shown(),
        m.berth[1].shown(),
        added(1)
    )
}

fn report(all: &[Measured], first: &Times) -> String {
    let mut text = format!(
        "## Cold moves\n\n\
         A busybox container with 4 MB of data, moved between two servers on one machine; {RUNS} moves by\n\
         Berth and {RUNS} by hand in turns, on the same servers, container and pool. By hand means `incus stop; incus move; incus\n\
         start`, or the same with `lxc`. Median [smallest-largest], in seconds.\n\n\
         - *Total* is by hand the time of the three commands; for Berth it is from the edit of `spec.target.server` until the\n  placement is Ready, which includes the end of the former source.\n\
         - *Downtime* is the largest gap between two signs of life of the container itself.\n\n\
         | servers, pool | total by hand | total by Berth | added | downtime by hand | downtime by Berth | added |\n\
         |---|---|---|---|---|---|---|\n"
    );
    for measured in all {
        let _ = writeln!(text, "{}", row(measured));
    }
    let _ = write!(
        text,
        "\nTargets: added total at most {:.1} s, added downtime at most {:.2} s.\n\n### From the edit to the first request\n\n\
         From the API server's answer to an edit of `spec.target.server` until the first request about the instance reaches a server,\n\
         {EDITS} times: {} s (target: median at most {:.1} s).\n\n### Where the time goes\n\n\
         Medians of the times between the steps of the moves' records, in milliseconds. Downtime lies between *asked to stop* and Started.\n\n",
        TARGETS[0],
        TARGETS[1],
        first.shown(),
        TARGETS[2]
    );
    let all: Vec<(&str, &Steps)> = all.iter().map(|m| (m.what.as_str(), &m.steps)).collect();
    text.push_str(&steps::table(&all));
    text
}

fn missed(all: &[Measured], first: &Times) -> Vec<String> {
    let mut missed = Vec::new();
    for m in all {
        for (index, what) in ["total", "downtime"].into_iter().enumerate() {
            let added = m.berth[index].median() - m.cli[index].median();
            if added > TARGETS[index] {
                missed.push(format!("{}: {what} {added:+.3} s", m.what));
            }
        }
    }
    if first.median() > TARGETS[2] {
        missed.push(format!("first request after {:.3} s", first.median()));
    }
    missed
}
