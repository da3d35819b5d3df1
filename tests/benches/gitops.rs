//! From a Git commit to the first request about the instance at a server, with real Flux and real Argo CD, and the part of
//! it that is Berth's. Prints a table and writes its part of docs/benchmarks.md.
//!
//! `BERTH_BENCH_RUNS` (default 5): commits of each kind.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use berth_tests::{Needs, NewInstance, Test};

mod common;
#[path = "../shop/mod.rs"]
mod shop;

use common::Times;
use shop::argo::App;
use shop::flux::{applied, follow};
use shop::{Measured, Shop, Way};

/// What Berth may take of it, in seconds.
const TARGET: f64 = 1.0;

fn main() -> ExitCode {
    let needs = &[Needs::Kube, Needs::Lab, Needs::Flux, Needs::Argo];
    common::main("bench-gitops", "a commit becomes a request at a server", needs, measure)
}

/// One row of the table.
struct Row {
    how: &'static str,
    /// From the push, and from the moment in which the API server was sent the placement.
    times: [Times; 2],
}

impl Row {
    fn new(how: &'static str) -> Row {
        Row {
            how,
            times: <[Times; 2]>::default(),
        }
    }

    fn add(&mut self, measured: Measured) {
        self.times[0].add(measured.total.as_secs_f64());
        self.times[1].add(measured.berth.as_secs_f64());
    }
}

async fn measure(test: Test) {
    let runs = common::runs(5);
    let controller = test.controller().await;
    let mut rows = vec![with_flux(&test, runs).await];
    rows.extend(with_argo(&test, runs).await);
    controller.kill().await;
    let text = report(&rows, runs);
    common::write_part("gitops", &text);
    let _ = writeln!(std::io::stdout(), "\n{text}");
    let slow = rows.iter().filter(|row| row.times[1].median() > TARGET);
    let slow: Vec<&str> = slow.map(|row| row.how).collect();
    assert!(slow.is_empty(), "more than {TARGET} s of Berth's: {slow:?}");
}

async fn stopped(test: &Test, name: &str) -> String {
    let name = test.unique(name);
    let new = NewInstance {
        start: false,
        ..NewInstance::default()
    };
    test.lab().server("i1").create(&name, &new).await;
    name
}

async fn with_flux(test: &Test, runs: usize) -> Row {
    let name = stopped(test, "web-flux").await;
    let placement = Way::Flux.placement(&name, "rack-a", "");
    let shop = Shop::new(test, test.flux().await, Way::Flux, &placement).await;
    follow(test, &shop, "sync.yaml", "2h", "10s").await;
    applied(test, &shop.head().await).await;
    let mut row = Row::new("Flux, interval 10 s");
    for rack in ["rack-b", "rack-a"].into_iter().cycle().take(runs) {
        row.add(shop.measure(test, &name, rack, || async {}).await);
        applied(test, &shop.head().await).await;
    }
    shop::flux::kustomization(test)
        .delete("shop", &kube::api::DeleteParams::default())
        .await
        .unwrap_or_else(|error| panic!("delete the Kustomization: {error}"));
    row
}

async fn with_argo(test: &Test, runs: usize) -> [Row; 2] {
    let name = stopped(test, "web-argo").await;
    let app = App::follow(test, &Way::Argo.placement(&name, "rack-a", "")).await;
    app.wait(&app.shop.head().await, "Synced/Healthy").await;
    let mut looks = Row::new("Argo CD that looks every 10 s");
    let mut told = Row::new("Argo CD that is told of the commit");
    for _ in 0..runs {
        looks.add(app.shop.measure(test, &name, "rack-b", || async {}).await);
        app.wait(&app.shop.head().await, "Synced/Healthy").await;
        told.add(app.shop.measure(test, &name, "rack-a", || app.refresh("normal")).await);
        app.wait(&app.shop.head().await, "Synced/Healthy").await;
    }
    [looks, told]
}

fn report(rows: &[Row], runs: usize) -> String {
    let mut text = format!(
        "## From a Git commit\n\n\
         From the push of a commit that changes `spec.target.server` until the first request about the instance reaches a server,\n\
         {runs} times each. Berth's part begins when the API server is sent the placement. Median [smallest-largest], in seconds.\n\n\
         | how | from the push | of which Berth |\n\
         |---|---|---|\n"
    );
    for row in rows {
        let [total, berth] = &row.times;
        let _ = writeln!(text, "| {} | {} | {} |", row.how, total.shown(), berth.shown());
    }
    let _ = writeln!(text, "\nTarget: Berth's part at most {TARGET} s.");
    text
}
