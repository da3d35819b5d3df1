//! Warm moves beside moves by hand: how long a running container serves nobody, by its own ticks, for several sizes, 1 % of
//! its data being written over every minute. Prints a table and writes its part of docs/benchmarks.md.
//!
//! `BERTH_BENCH_SIZES` (MiB, default 200,2048,8192, on dir pools up to 2048) and `BERTH_BENCH_RUNS` (default 10) make it shorter.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Instant;

use berth_tests::{NewInstance, Placement, Product, Server, Test, seconds};
use serde_json::json;

mod common;

use common::steps::{self, Steps};
use common::{LONG, Times, move_by_hand, numbers, silence, ticking, ticks_of_both};

fn main() -> ExitCode {
    common::main(
        "bench-warm",
        "warm moves are measured beside moves by hand",
        common::CONTAINERS,
        measure,
    )
}

/// What was measured for one pair of servers, one pool and one size.
struct Measured {
    what: String,
    /// Unserved time and the whole move.
    hand: [Times; 2],
    berth: [Times; 2],
    /// What the record of the move says of the unserved time, and two parts of it: frozen, and the round after the stop.
    claimed: [Times; 3],
    steps: Steps,
}

async fn measure(test: Test) {
    test.add_servers(&["i1", "i2", "l1", "l2"]).await;
    let controller = test.controller().await;
    let sizes = numbers("BERTH_BENCH_SIZES", "200,2048,8192");
    let runs = common::runs(10);
    let mut all = Vec::new();
    for size in sizes {
        for (one, other) in [("i1", "i2"), ("l1", "l2")] {
            // a move by hand of more takes minutes on dir pools, and tells nothing new
            for pool in if size > 2048 { &["btr"][..] } else { &["btr", "default"] } {
                let takes_long = size > if pool == &"btr" { 4096 } else { 1024 };
                let runs = if takes_long { runs.div_ceil(2) } else { runs };
                all.push(side_by_side(&test, (one, other), pool, size, runs).await);
            }
        }
    }
    controller.kill().await;
    let text = report(&all, runs);
    common::write_part("warm", &text);
    let _ = writeln!(std::io::stdout(), "\n{text}");
}

async fn side_by_side(test: &Test, (one, other): (&str, &str), pool: &str, size: usize, runs: usize) -> Measured {
    let (mut here, mut there) = (test.lab().server(one), test.lab().server(other));
    let name = test.unique(&format!("warm-{one}-{pool}-{size}"));
    here.create(&name, &NewInstance::on_pool(pool)).await;
    let one = "head -c 1048576 /dev/urandom >/root/d/$i";
    let fill = format!("mkdir /root/d; for i in $(seq {size}); do {one}; done; sync");
    inside(here, &name, &fill).await;
    here.write_file(&name, "/etc/tick", "0.02").await;
    let driver = if pool == "btr" { "btrfs" } else { "dir" };
    let product = match here.product {
        Product::Incus => "Incus",
        Product::Lxd => "LXD",
    };
    let mut measured = Measured {
        what: format!("{product} {}, {driver}, {size} MiB", here.version),
        hand: Default::default(),
        berth: Default::default(),
        claimed: Default::default(),
        steps: Steps::default(),
    };
    for by_berth in common::turns(runs) {
        common::on_disk().await;
        dirty(here, &name, size).await;
        if by_berth {
            let warm = json!({"methods": ["Warm"], "target": {"pool": pool}});
            test.place(&Placement::new(&name, &here.name).with(warm)).await;
            test.wait_in_place(&name, &here.name, LONG).await;
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
        let unserved = silence(&ticks_of_both(here, &name).await);
        let times = if by_berth {
            &mut measured.berth
        } else {
            &mut measured.hand
        };
        times[0].add(unserved);
        times[1].add(total);
        if by_berth {
            let newest = common::newest_move(test, &name).await;
            measured.steps.add(&newest);
            let status = &newest["status"];
            let rounds = status["precopy"]["rounds"].as_array();
            let last = rounds.and_then(|r| r.last()).map(|r| &r["duration"]);
            let said = [Some(&status["downtime"]), Some(&status["precopy"]["frozen"]), last];
            for (times, said) in measured.claimed.iter_mut().zip(said) {
                times.add(said.map_or(0.0, seconds));
            }
            test.delete("InstancePlacement", &name).await;
        }
    }
    let _ = writeln!(std::io::stdout(), "{}", row(&measured));
    here.delete(&name).await.unwrap_or_else(|error| panic!("{error}"));
    measured
}

async fn inside(server: &Server, name: &str, script: &str) {
    let done = server.exec(name, &["sh", "-c", script]).await;
    done.unwrap_or_else(|error| panic!("{name}: {script}: {error}"));
}

/// From now on the guest writes over 1 % of its files per minute; it ends with the guest's next stop.
async fn dirty(server: &Server, name: &str, megabytes: usize) {
    let every = 6000 / megabytes.max(1) + 1;
    let file = format!("/root/d/$((n * 7919 % {megabytes} + 1))");
    let write = format!("n=$((n + 1)); head -c 1048576 /dev/urandom >{file}; sleep {every}");
    let script = format!("(n=0; while :; do {write}; done) >/dev/null 2>&1 </dev/null &");
    inside(server, name, &script).await;
}

fn row(m: &Measured) -> String {
    format!(
        "| {} | {} | {} | {} | {} | {} | {} | {} |",
        m.what,
        m.hand[0].shown(),
        m.berth[0].shown(),
        m.claimed[0].shown(),
        m.claimed[1].shown(),
        m.claimed[2].shown(),
        m.hand[1].shown(),
        m.berth[1].shown()
    )
}

fn report(all: &[Measured], runs: usize) -> String {
    let mut text = format!(
        "## Warm moves\n\n\
         A running busybox container with random files of 1 MiB, 1 % of them written over every minute, moved\n\
         between two servers on one machine: {runs} times warm by Berth and {runs} times by hand in turns, in one run; half as often\n\
         where it takes minutes (8 GiB, and 2 GiB on dir). By hand means `incus stop; incus move; incus start`, or the same with\n\
         `lxc`. Each begins when what the one before wrote is on the disk. Median [smallest-largest], in seconds.\n\n\
         - *Unserved* is all time without a sign of life from inside the container: stopped or frozen.\n\
         - *Said* is `status.downtime` of the move; *frozen* and *last round* are parts of it, from `status.precopy`.\n\
         - *Total* is for Berth from the edit until the placement is Ready, which includes the end of the former source.\n\n\
         | servers, pool, data | unserved by hand | unserved by Berth | said | frozen | last round | total by hand | total by Berth |\n\
         |---|---|---|---|---|---|---|---|\n"
    );
    for measured in all {
        let _ = writeln!(text, "{}", row(measured));
    }
    text.push_str(
        "\n### Where the time of a warm move goes\n\n\
         Medians of the times between the steps of the moves' records, in milliseconds. Rounds while the instance runs come before\n\
         *asked to stop*; it is stopped from somewhere before Stopped until Started.\n\n",
    );
    let all: Vec<(&str, &Steps)> = all.iter().map(|m| (m.what.as_str(), &m.steps)).collect();
    text.push_str(&steps::table(&all));
    text
}
