//! Every pair of products and versions, every way of the data, every pair of pools, with and without snapshots: each cell
//! moves with its data, or is refused with its reason before anything is touched. The table is docs/compatibility.md.
//!
//! By default a part of the cells runs in which every two of the four properties meet; `BERTH_MATRIX=full` runs all, and
//! with `UPDATE=1` writes the table.

use std::time::Duration;

use berth_tests::{
    ControllerOptions, NewInstance, Placement, SOON, Server, Test, condition, reason, summary, wait_for,
};
use futures::StreamExt;
use futures::stream;
use serde_json::{Value, json};

#[path = "matrix/table.rs"]
mod table;

use table::Row;

berth_tests::suite! {
    needs: [Kube, Lab],
    timeout: Duration::from_secs(900),
    together: [incus_6_to_incus_6, lxd_to_lxd, lxd_to_incus_6, incus_6_to_lxd],
    alone: [],
    incus7: [incus_6_to_incus_7, incus_7_to_incus_6, incus_7_to_incus_7, lxd_to_incus_7],
}

/// The pairs, in the order of the table.
pub const PAIRS: [(&str, &str, &str); 8] = [
    ("Incus 6 → Incus 6", "i1", "i2"),
    ("Incus 6 → Incus 7", "i1", "t1"),
    ("Incus 7 → Incus 6", "t1", "i1"),
    ("Incus 7 → Incus 7", "t1", "t2"),
    ("LXD 5 → LXD 5", "l1", "l2"),
    ("LXD 5 → Incus 6", "l1", "i1"),
    ("LXD 5 → Incus 7", "l1", "t1"),
    ("Incus 6 → LXD 5", "i1", "l1"),
];
/// Pool names of the lab and the words of the table.
const POOLS: [(&str, &str, &str); 4] = [
    ("default", "default", "dir → dir"),
    ("default", "btr", "dir → btrfs"),
    ("btr", "btr", "btrfs → btrfs"),
    ("btr", "default", "btrfs → dir"),
];
const MODES: [&str; 4] = ["Pull", "Push", "Relay", "Backup"];
const SNAPSHOTS: [&str; 3] = ["none", "two", "two, Exclude"];
/// How many cells of a pair are under way at a time.
const AT_A_TIME: usize = 6;

async fn incus_6_to_incus_6(test: Test) {
    pair(test, 0).await;
}

async fn incus_6_to_incus_7(test: Test) {
    pair(test, 1).await;
}

async fn incus_7_to_incus_6(test: Test) {
    pair(test, 2).await;
}

async fn incus_7_to_incus_7(test: Test) {
    pair(test, 3).await;
}

async fn lxd_to_lxd(test: Test) {
    pair(test, 4).await;
}

async fn lxd_to_incus_6(test: Test) {
    pair(test, 5).await;
}

async fn lxd_to_incus_7(test: Test) {
    pair(test, 6).await;
}

async fn incus_6_to_lxd(test: Test) {
    pair(test, 7).await;
}

/// One cell: indices into the constants.
#[derive(Clone, Copy)]
struct Cell {
    mode: usize,
    pools: usize,
    snapshots: usize,
}

/// All cells, or by default one pair of pools for each way and kind of snapshots, another one for each neighbour.
fn cells(pair: usize) -> Vec<Cell> {
    let full = table::full();
    let mut cells = Vec::new();
    for mode in 0..MODES.len() {
        for snapshots in 0..SNAPSHOTS.len() {
            for pools in 0..POOLS.len() {
                if full || pools == (pair + mode + snapshots) % POOLS.len() {
                    cells.push(Cell { mode, pools, snapshots });
                }
            }
        }
    }
    cells
}

async fn pair(test: Test, number: usize) {
    let (title, from, to) = PAIRS[number];
    let (source, target) = (test.lab().server(from), test.lab().server(to));
    test.add_client_secret("berth-client").await;
    for server in [source, target] {
        let limits = json!({"limits": {"incoming": AT_A_TIME, "outgoing": AT_A_TIME}});
        test.add_server(&server.name, server, limits).await;
    }
    let scratch = format!("--scratch-dir={}", test.dir().join("scratch").display());
    let options = ControllerOptions {
        args: vec![scratch],
        ..ControllerOptions::default()
    };
    let _controller = test.controller_with(options).await;
    let results: Vec<(Cell, String)> = stream::iter(cells(number))
        .map(|cell| {
            let test = &test;
            async move { (cell, moved(test, source, target, cell).await) }
        })
        .buffer_unordered(AT_A_TIME)
        .collect()
        .await;
    let rows: Vec<Row> = results
        .into_iter()
        .map(|(cell, result)| Row {
            pools: POOLS[cell.pools].2,
            snapshots: SNAPSHOTS[cell.snapshots],
            mode: MODES[cell.mode],
            result,
        })
        .collect();
    table::compare(title, &rows);
}

/// What must arrive.
struct Before {
    uuid: Value,
    checksum: Option<String>,
    runs: bool,
}

/// Moves one instance, or has it refused; what the table says of it.
async fn moved(test: &Test, source: &Server, target: &Server, cell: Cell) -> String {
    let Cell { mode, pools, snapshots } = cell;
    let (from_pool, to_pool, _) = POOLS[pools];
    let name = test.unique(&format!("c{mode}{pools}{snapshots}"));
    // most do not run, since a stop alone takes longer than all the rest
    let runs = pools == 0;
    let new = NewInstance {
        megabytes: 1,
        snapshots: if snapshots == 0 { 0 } else { 2 },
        start: runs,
        ..NewInstance::on_pool(from_pool)
    };
    source.create(&name, &new).await;
    let instance = source.instance(&name).await.unwrap_or_default();
    let before = Before {
        uuid: instance["config"]["volatile.uuid"].clone(),
        checksum: source.checksum(&name, "/root/data").await,
        runs,
    };
    let kind = if snapshots == 2 { "Exclude" } else { "Include" };
    let spec = json!({"target": {"pool": to_pool}, "transfer": MODES[mode], "snapshots": kind});
    test.place(
        &Placement::new(&name, &target.name)
            .with(json!({"methods": ["Cold"]}))
            .with(spec),
    )
    .await;
    let result = ended(test, &name, &target.name).await;
    if result == "ok" {
        arrived(test, (source, target), &name, &before, cell).await;
    } else {
        untouched(test, source, &name, &before, &result).await;
    }
    test.delete("InstancePlacement", &name).await;
    let at = if result == "ok" { target } else { source };
    at.delete(&name).await.unwrap_or_else(|error| panic!("{name}: {error}"));
    result
}

/// Waits until the placement is in place or refused.
async fn ended(test: &Test, name: &str, to: &str) -> String {
    wait_for(&format!("{name} to move or to be refused"), SOON, || async {
        let placement = test.get("InstancePlacement", name).await.unwrap_or_default();
        if placement["status"]["observedGeneration"] != placement["metadata"]["generation"] {
            return Err("not looked at yet".to_owned());
        }
        if reason(&placement) == "True/InPlace" && placement["status"]["location"]["server"] == to {
            return Ok("ok".to_owned());
        }
        if let Some(stalled) = condition(&placement, "Stalled") {
            return Ok(stalled["reason"].as_str().unwrap_or_default().to_owned());
        }
        Err(summary(&placement))
    })
    .await
}

async fn arrived(test: &Test, (source, target): (&Server, &Server), name: &str, before: &Before, cell: Cell) {
    let instance = target.instance(name).await.unwrap_or_else(|| panic!("{name} arrived"));
    let config = &instance["config"];
    assert_eq!(config["volatile.uuid"], before.uuid, "{name}: the same identity");
    assert_eq!(
        target.checksum(name, "/root/data").await,
        before.checksum,
        "{name}: the same data"
    );
    let root = &instance["expanded_devices"]["root"]["pool"];
    assert_eq!(root, POOLS[cell.pools].1, "{name}: the pool that was asked for");
    let path = format!("/1.0/instances/{name}/snapshots");
    let list = target
        .get(&path)
        .await
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let expected = if cell.snapshots == 1 { 2 } else { 0 };
    assert_eq!(list.as_array().map(Vec::len), Some(expected), "{name}: its snapshots");
    let power = if before.runs { "Running" } else { "Stopped" };
    assert_eq!(instance["status"], power, "{name}: its power state");
    let marks = config
        .as_object()
        .is_some_and(|c| c.keys().any(|k| k.contains("berth")));
    assert!(
        !marks && instance["devices"].get("berth-guard").is_none(),
        "{name}: something is left: {instance:#}"
    );
    assert_eq!(source.status(name).await, "absent", "{name}: the source is gone");
    let moves = test.moves(name).await;
    // a connection that breaks, or comes too late, on a busy machine is no refusal: that attempt is undone and made again
    let link = ["ServerUnreachable", "PeerUnreachable"];
    let lost = |m: &&Value| {
        !m["status"]["undo"]["reason"]
            .as_str()
            .is_some_and(|r| link.contains(&r))
    };
    let undone: Vec<&Value> = moves.iter().map(|m| &m["status"]["undo"]).collect();
    assert_eq!(moves.iter().filter(lost).count(), 1, "{name}: {undone:?}");
    assert_eq!(
        moves[0]["spec"]["transfer"], MODES[cell.mode],
        "{name}: the way that was asked for"
    );
}

/// Refused before the source was stopped or marked, with a sentence and a way out.
async fn untouched(test: &Test, source: &Server, name: &str, before: &Before, why: &str) {
    assert!(test.moves(name).await.is_empty(), "{name}: {why}: no move was begun");
    let placement = test.get("InstancePlacement", name).await.unwrap_or_default();
    let blocker = &placement["status"]["plan"]["blockers"][0];
    assert_eq!(blocker["reason"], why, "{name}: {placement:#}");
    assert!(blocker["fix"].is_string(), "{name}: {why} has a fix: {blocker}");
    let instance = source.instance(name).await.unwrap_or_else(|| panic!("{name} is there"));
    let power = if before.runs { "Running" } else { "Stopped" };
    assert_eq!(instance["status"], power, "{name}: {why}: it was not stopped");
    assert_eq!(source.checksum(name, "/root/data").await, before.checksum);
    if before.runs {
        assert_eq!(
            source.boots(name).await,
            1,
            "{name}: {why}: it was not stopped in between"
        );
    }
}
