//! Live moves of containers by CRIU beside those by hand, in turns, with the same processes, whose own ticks are the judge.
//! Writes its own part of docs/benchmarks.md.
//!
//! `BERTH_BENCH_RUNS` (default 10) makes it shorter.

use std::process::ExitCode;
use std::time::Instant;

use berth_tests::{Needs, NewInstance, Placement, SOON, Server, Test, wait_for};
use serde_json::json;

mod common;

use common::largest_gap;
use common::live::{Measured, report};

fn main() -> ExitCode {
    common::main(
        "bench-criu",
        "live moves of containers are measured beside those by hand",
        &[Needs::Kube, Needs::Criu],
        measure,
    )
}

async fn measure(test: Test) {
    let runs = common::runs(10);
    test.add_servers(&["i1", "i2"]).await;
    let controller = test.controller().await;
    let mut all = Vec::new();
    for pool in ["default", "btr"] {
        all.push(side_by_side(&test, pool, runs).await);
    }
    controller.kill().await;
    let intro = format!(
        "## Live moves of containers\n\n\
         A privileged busybox container that writes down the time fifty times a second, moved by CRIU between two servers on one\n\
         machine, {runs} times by Berth and {runs} times by hand in turns. By hand means `incus move` of the running\n\
         container. *Silent* is the largest gap between two signs of life of its processes. "
    );
    report("criu", &intro, &all);
}

async fn side_by_side(test: &Test, pool: &str, runs: usize) -> Measured {
    let (mut here, mut there) = (test.lab().server("i1"), test.lab().server("i2"));
    let name = test.unique(&format!("criu-{pool}"));
    let new = NewInstance {
        pool: pool.to_owned(),
        ..NewInstance::movable(true, true)
    };
    here.create(&name, &new).await;
    here.write_file(&name, "/etc/tick", "0.02").await;
    let driver = if pool == "btr" { "btrfs" } else { "dir" };
    let mut measured = Measured::of(format!("Incus {}, {driver}", here.version));
    for by_berth in common::turns(runs) {
        if by_berth {
            let live = json!({"criu": true, "methods": ["Live"], "target": {"pool": pool}});
            test.place(&Placement::new(&name, &here.name).with(live)).await;
            test.wait_in_place(&name, &here.name, SOON).await;
        }
        let before = ticking(here, &name, 5).await.len();
        let begun = Instant::now();
        if by_berth {
            let target = json!({"server": there.name, "pool": pool});
            common::move_by_berth(test, &name, target).await;
        } else {
            let (from, to) = (format!("{}:{name}", here.name), format!("{}:{name}", there.name));
            let done = test.lab().incus(&["move", &from, &to, "-q"]).await;
            done.unwrap_or_else(|error| panic!("{from} to {}: {error}", there.name));
        }
        let total = begun.elapsed().as_secs_f64();
        std::mem::swap(&mut here, &mut there);
        let arrived = ticking(here, &name, before).await.len();
        let ticks = ticking(here, &name, arrived + 5).await;
        let silent = largest_gap(&ticks[before - 1..]);
        let record = match by_berth {
            true => Some(common::newest_move(test, &name).await),
            false => None,
        };
        measured.add(silent, total, record.as_ref());
        if by_berth {
            test.delete("InstancePlacement", &name).await;
        }
    }
    let boots = here
        .exec(&name, &["cat", "/var/log/init.log"])
        .await
        .unwrap_or_default();
    assert_eq!(boots.matches("boot").count(), 1, "it was started anew: {boots}");
    here.delete(&name).await.unwrap_or_else(|error| panic!("{error}"));
    measured.show();
    measured
}

/// Times at which its processes ran, once there are so many. Of a restored container only a program inside it can read files.
async fn ticking(server: &Server, name: &str, at_least: usize) -> Vec<f64> {
    wait_for(&format!("{name} to tick"), SOON, || async {
        let log = server.exec(name, &["cat", "/var/log/ticks"]).await?;
        let ticks = log.lines().filter_map(|line| line.split(' ').next()?.parse().ok());
        let ticks: Vec<f64> = ticks.collect();
        if ticks.len() >= at_least {
            Ok(ticks)
        } else {
            Err(format!("{} ticks", ticks.len()))
        }
    })
    .await
}
