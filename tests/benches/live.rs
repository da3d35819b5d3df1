//! Live moves of virtual machines beside those by hand: inside a cluster and between independent servers, in turns, with the
//! same guest. The guest is heard from outside, ten times a second. Writes its own part of docs/benchmarks.md.
//!
//! `BERTH_BENCH_RUNS` (default 10) makes it shorter.

use std::process::ExitCode;
use std::time::Instant;

use berth_tests::{Needs, NewVm, Placement, SOON, Test};
use serde_json::{Value, json};

mod common;

use common::live::{Measured, report};

fn main() -> ExitCode {
    common::main(
        "bench-live",
        "live moves of virtual machines are measured beside those by hand",
        &[Needs::Kube, Needs::Vms],
        measure,
    )
}

async fn measure(test: Test) {
    let runs = common::runs(10);
    test.add_servers(&["m1", "i1", "i2"]).await;
    let controller = test.controller().await;
    let all = [
        side_by_side(&test, "in a cluster", ["m1", "m2"], true, runs).await,
        side_by_side(&test, "between servers", ["i1", "i2"], false, runs).await,
    ];
    controller.kill().await;
    let intro = format!(
        "## Live moves of virtual machines\n\n\
         A guest of 128 MiB with an emulated processor, 8 MiB of disk and ten signs of life a second, moved between two servers\n\
         on one machine, {runs} times by Berth and {runs} times by hand in turns. By hand means `incus move --target` inside the\n\
         cluster, and `incus move` between servers, which ends the guest at the source by force. *Silent* is the longest time\n\
         in which nothing new was heard of the guest; Incus asks QEMU once a second how far it is, so by chance it is about 0.6 s\n\
         or about 1.5 s. "
    );
    report("live", &intro, &all);
}

/// In a cluster both names are members of the one server that is known by the first.
async fn side_by_side(test: &Test, what: &str, names: [&'static str; 2], cluster: bool, runs: usize) -> Measured {
    let (lab, [mut here, mut there]) = (test.lab(), names);
    let entrance = |name: &'static str| if cluster { names[0] } else { name };
    let target = |name: &'static str| -> Value {
        if cluster {
            json!({"server": entrance(name), "member": name})
        } else {
            json!({"server": name})
        }
    };
    let (first, vm) = (lab.server(here), test.unique(&format!("vm-{here}")));
    let new = NewVm {
        member: cluster.then(|| here.to_owned()),
        ..NewVm::default()
    };
    lab.create_vm(first, &vm, &new).await;
    let mut measured = Measured::of(format!("Incus {}, {what}, dir", first.version));
    for by_berth in common::turns(runs) {
        if by_berth {
            let live = json!({"methods": ["Live"], "target": target(here)});
            test.place(&Placement::new(&vm, entrance(here)).with(live)).await;
            test.wait_in_place(&vm, entrance(here), SOON).await;
        }
        lab.wait_ticking(&vm).await;
        let begun = Instant::now();
        if by_berth {
            common::move_by_berth(test, &vm, target(there)).await;
        } else {
            let (from, to) = (format!("{}:{vm}", entrance(here)), format!("{there}:{vm}"));
            let ways = [["move", &from, "--target", there], ["move", &from, &to, "--quiet"]];
            let done = lab.incus(&ways[usize::from(!cluster)]).await;
            done.unwrap_or_else(|error| panic!("{from} to {there}: {error}"));
        }
        let total = begun.elapsed().as_secs_f64();
        std::mem::swap(&mut here, &mut there);
        lab.wait_ticking(&vm).await;
        let heard = lab.heard(&vm, begun);
        assert_eq!(heard.boots.len(), 1, "it was not moved live: {heard:?}");
        let record = match by_berth {
            true => Some(common::newest_move(test, &vm).await),
            false => None,
        };
        measured.add(heard.silence.as_secs_f64(), total, record.as_ref());
        if by_berth {
            test.delete("InstancePlacement", &vm).await;
        }
    }
    measured.show();
    measured
}
