//! The ways that the data of a move can take, on real servers: through the controller where the servers do not reach each
//! other. That they do not is arranged by a `peerAddress` at which nobody listens.

use std::path::PathBuf;

use berth_tests::{ControllerOptions, NewInstance, Placement, SOON, Server, Test, condition, reason, wait_for};
use serde_json::{Value, json};
use tokio::process::Command;

use road::known;

mod road;

berth_tests::suite! {
    needs: [Kube, Lab],
    together: [
        a_running_container_is_relayed_between_incus_servers_on_dir,
        a_running_container_is_relayed_between_incus_servers_on_btrfs,
        a_running_container_is_relayed_between_lxd_servers_on_dir,
        a_running_container_is_relayed_between_lxd_servers_on_btrfs,
        a_running_container_is_relayed_from_lxd_to_incus,
        a_running_container_is_brought_by_backup_between_incus_servers,
        a_running_container_is_brought_by_backup_between_lxd_servers,
        a_running_container_is_brought_by_backup_from_lxd_to_incus,
        a_backup_that_lxd_could_not_read_is_refused_before_the_stop,
        a_scratch_folder_that_is_too_small_leaves_the_instance_running_and_the_folder_empty,
        servers_that_do_not_reach_each_other_are_served_by_the_next_way_and_that_is_remembered,
    ],
    alone: [
        a_full_scratch_disk_leaves_the_instance_running_and_the_disk_empty,
        a_controller_that_is_killed_while_a_backup_is_made_leaves_none,
        a_controller_that_is_killed_in_mid_relay_is_followed_by_one_that_ends_the_move,
    ],
}

/// Where nobody listens.
const NOWHERE: &str = "https://127.0.0.1:1";

/// These servers, which do not reach each other: whoever follows `peerAddress` finds nobody.
async fn add_separated(test: &Test, names: &[&str]) {
    test.add_client_secret("berth-client").await;
    for name in names {
        let limits = json!({"incoming": 20, "outgoing": 20});
        let spec = json!({"peerAddress": NOWHERE, "limits": limits});
        test.add_server(name, test.lab().server(name), spec).await;
    }
}

/// Names and dates of the snapshots.
async fn snapshots(server: &Server, name: &str) -> Vec<(Value, i64)> {
    let path = format!("/1.0/instances/{name}/snapshots?recursion=1");
    let list = server.get(&path).await.unwrap_or_else(|e| panic!("{e}"));
    let seconds = |s: &Value| {
        let time: Result<jiff::Timestamp, _> = s["created_at"].as_str().unwrap_or_default().parse();
        time.map(jiff::Timestamp::as_second).unwrap_or_default()
    };
    let list = list.as_array().into_iter().flatten();
    list.map(|s| (s["name"].clone(), seconds(s))).collect()
}

fn sized(pool: &str, snapshots: usize) -> NewInstance {
    NewInstance {
        megabytes: 4,
        snapshots,
        ..NewInstance::on_pool(pool)
    }
}

/// Two instances, one without snapshots and one with two, go from one server to the other in that way.
async fn go(test: &Test, from: &str, to: &str, pool: &str, transfer: &str) {
    let (source, target) = (test.lab().server(from), test.lab().server(to));
    let (bare, full) = (test.unique("bare"), test.unique("full"));
    source.create(&bare, &sized(pool, 0)).await;
    source.create(&full, &sized(pool, 2)).await;
    let before = [known(source, &bare).await, known(source, &full).await];
    let kept = snapshots(source, &full).await;
    let _controller = test.controller_with(with_scratch(test, "64Mi")).await;
    for name in [&bare, &full] {
        test.place(&Placement::new(name, to).with(json!({"transfer": transfer})))
            .await;
    }
    for subject in &before {
        road::intact(test, subject, to, 2..=2).await;
        let moves = test.moves(&subject.name).await;
        assert_eq!(moves.len(), 1, "the first attempt succeeds");
        assert_eq!(moves[0]["spec"]["transfer"], transfer);
    }
    assert_eq!(snapshots(target, &full).await, kept, "snapshots by name and date");
    assert_eq!(kept.len(), 2);
    assert_eq!(scratch_files(test), 0, "nothing is left in the scratch folder");
}

fn scratch(test: &Test) -> PathBuf {
    test.dir().join("scratch")
}

/// Files in the scratch folder.
fn scratch_files(test: &Test) -> usize {
    std::fs::read_dir(scratch(test)).map_or(0, Iterator::count)
}

/// A controller with a scratch folder of that size.
fn with_scratch(test: &Test, size: &str) -> ControllerOptions {
    let dir = format!("--scratch-dir={}", scratch(test).display());
    ControllerOptions {
        args: vec![dir, format!("--scratch-limit={size}")],
        ..ControllerOptions::default()
    }
}

/// The backups of an instance.
async fn backups(server: &Server, name: &str) -> Vec<Value> {
    let list = server.get(&format!("/1.0/instances/{name}/backups")).await;
    let list = list.unwrap_or_else(|e| panic!("{e}"));
    list.as_array().cloned().unwrap_or_default()
}

async fn a_running_container_is_relayed_between_incus_servers_on_dir(test: Test) {
    add_separated(&test, &["i1", "i2"]).await;
    go(&test, "i1", "i2", "default", "Relay").await;
}

async fn a_running_container_is_relayed_between_incus_servers_on_btrfs(test: Test) {
    add_separated(&test, &["i1", "i2"]).await;
    go(&test, "i2", "i1", "btr", "Relay").await;
}

async fn a_running_container_is_relayed_between_lxd_servers_on_dir(test: Test) {
    add_separated(&test, &["l1", "l2"]).await;
    go(&test, "l1", "l2", "default", "Relay").await;
}

async fn a_running_container_is_relayed_between_lxd_servers_on_btrfs(test: Test) {
    add_separated(&test, &["l1", "l2"]).await;
    go(&test, "l2", "l1", "btr", "Relay").await;
}

async fn a_running_container_is_relayed_from_lxd_to_incus(test: Test) {
    add_separated(&test, &["l1", "i1"]).await;
    go(&test, "l1", "i1", "btr", "Relay").await;
}

async fn a_running_container_is_brought_by_backup_between_incus_servers(test: Test) {
    add_separated(&test, &["i1", "i2"]).await;
    go(&test, "i1", "i2", "default", "Backup").await;
}

async fn a_running_container_is_brought_by_backup_between_lxd_servers(test: Test) {
    add_separated(&test, &["l1", "l2"]).await;
    go(&test, "l1", "l2", "btr", "Backup").await;
}

async fn a_running_container_is_brought_by_backup_from_lxd_to_incus(test: Test) {
    add_separated(&test, &["l1", "i1"]).await;
    go(&test, "l1", "i1", "default", "Backup").await;
}

async fn a_backup_that_lxd_could_not_read_is_refused_before_the_stop(test: Test) {
    let name = test.unique("web");
    let source = test.lab().server("i1");
    source.create(&name, &sized("default", 0)).await;
    add_separated(&test, &["i1", "l1"]).await;
    let _controller = test.controller_with(with_scratch(&test, "64Mi")).await;
    let placement = Placement::new(&name, "l1").with(json!({"transfer": "Backup"}));
    test.place(&placement).await;
    let refused = test
        .wait_ready("InstancePlacement", &name, "False/BackupNotReadable", SOON)
        .await;
    let said = condition(&refused, "Stalled").map(|c| c["message"].to_string());
    assert!(said.is_some_and(|s| s.contains("spec.transfer: Auto")), "{refused:#}");
    assert_eq!(source.boots(&name).await, 1);
    assert!(test.moves(&name).await.is_empty());
}

/// The move is undone for want of space, and nothing is left of it.
async fn undone_for_want_of_space(test: &Test, name: &str, before: &road::Subject) {
    let source = test.lab().server("i1");
    let undone = test
        .wait_object("InstancePlacement", name, "undone", SOON, |object| {
            reason(object) == "False/MoveFailed"
        })
        .await;
    let said = condition(&undone, "Ready")
        .map(|c| c["message"].to_string())
        .unwrap_or_default();
    assert!(
        said.contains("scratch folder") && said.contains("--scratch-limit"),
        "{said}"
    );
    let moves = test.moves(name).await;
    assert_eq!(moves[0]["status"]["undo"]["reason"], "InsufficientSpace");
    assert_eq!(source.status(name).await, "Running");
    assert_eq!(backups(source, name).await, Vec::<Value>::new(), "the backup is gone");
    assert_eq!(source.checksum(name, "/root/data").await, before.checksum());
    test.delete("InstancePlacement", name).await;
}

async fn a_scratch_folder_that_is_too_small_leaves_the_instance_running_and_the_folder_empty(test: Test) {
    let name = test.unique("web");
    let source = test.lab().server("i1");
    source.create(&name, &sized("default", 0)).await;
    let before = known(source, &name).await;
    add_separated(&test, &["i1", "i2"]).await;
    let _controller = test.controller_with(with_scratch(&test, "1Mi")).await;
    let placement = Placement::new(&name, "i2").with(json!({"transfer": "Backup"}));
    test.place(&placement).await;
    undone_for_want_of_space(&test, &name, &before).await;
    assert_eq!(scratch_files(&test), 0);
}

/// A small disk of its own, gone with the value.
struct Disk(PathBuf);

impl Disk {
    async fn mount(at: PathBuf, size: &str) -> Disk {
        std::fs::create_dir_all(&at).unwrap_or_else(|e| panic!("{}: {e}", at.display()));
        let mut mount = Command::new("mount");
        let done = mount
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(&at)
            .status()
            .await;
        assert!(done.is_ok_and(|s| s.success()), "a tmpfs can be mounted");
        Disk(at)
    }

    /// Bytes in use, named or not.
    async fn used(&self) -> u64 {
        let mut df = Command::new("df");
        let out = df.args(["--output=used", "-B1"]).arg(&self.0).output().await;
        let text = out
            .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
            .unwrap_or_default();
        text.lines()
            .nth(1)
            .and_then(|l| l.trim().parse().ok())
            .unwrap_or(u64::MAX)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

async fn a_full_scratch_disk_leaves_the_instance_running_and_the_disk_empty(test: Test) {
    let name = test.unique("web");
    let source = test.lab().server("i1");
    source.create(&name, &sized("default", 0)).await;
    let before = known(source, &name).await;
    add_separated(&test, &["i1", "i2"]).await;
    let disk = Disk::mount(scratch(&test), "3m").await;
    let controller = test.controller_with(with_scratch(&test, "10Gi")).await;
    let placement = Placement::new(&name, "i2").with(json!({"transfer": "Backup"}));
    test.place(&placement).await;
    undone_for_want_of_space(&test, &name, &before).await;
    assert_eq!(disk.used().await, 0, "the disk is empty again");
    controller.kill().await;
}

async fn a_controller_that_is_killed_while_a_backup_is_made_leaves_none(test: Test) {
    let source = test.lab().server("l1");
    let name = test.unique("web");
    let new = NewInstance {
        megabytes: 24,
        ..NewInstance::on_pool("default")
    };
    source.create(&name, &new).await;
    let before = known(source, &name).await;
    add_separated(&test, &["l1", "l2"]).await;
    let first = test.controller_with(with_scratch(&test, "64Mi")).await;
    source.throttle("80mbit").await;
    let placement = Placement::new(&name, "l2").with(json!({"transfer": "Backup"}));
    test.place(&placement).await;
    wait_for("a backup to exist", SOON, || async {
        match backups(source, &name).await.is_empty() {
            true => Err("none".to_owned()),
            false => Ok(()),
        }
    })
    .await;
    first.kill().await;
    source.throttle("off").await;
    assert_eq!(scratch_files(&test), 0, "what it kept went with it");
    // whoever comes next is not to go on with it
    test.patch("InstancePlacement", &name, json!({"spec": {"suspend": true}}))
        .await;
    let second = test.controller_with(with_scratch(&test, "64Mi")).await;
    test.wait_ready("InstancePlacement", &name, "False/Suspended", SOON)
        .await;
    assert_eq!(source.status(&name).await, "Running");
    assert_eq!(backups(source, &name).await, Vec::<Value>::new(), "the backup is gone");
    test.patch("InstancePlacement", &name, json!({"spec": {"suspend": false}}))
        .await;
    road::intact(&test, &before, "l2", 2..=3).await;
    second.kill().await;
}

async fn servers_that_do_not_reach_each_other_are_served_by_the_next_way_and_that_is_remembered(test: Test) {
    let source = test.lab().server("i1");
    let (one, two) = (test.unique("one"), test.unique("two"));
    for name in [&one, &two] {
        source.create(name, &sized("btr", 0)).await;
    }
    let before = [known(source, &one).await, known(source, &two).await];
    add_separated(&test, &["i1", "i2"]).await;
    let first = test.controller().await;
    test.place(&Placement::new(&one, "i2")).await;
    road::intact(&test, &before[0], "i2", 2..=4).await;
    let ways: Vec<Value> = test
        .moves(&one)
        .await
        .iter()
        .map(|m| m["spec"]["transfer"].clone())
        .collect();
    assert_eq!(ways, ["Pull", "Push", "Relay"]);
    let summary = test.get("InstancePlacement", &one).await.unwrap_or_default();
    let moves = summary["status"]["moves"].as_array().cloned().unwrap_or_default();
    let told: Vec<_> = moves
        .iter()
        .map(|m| (m["transfer"].clone(), m["outcome"].clone()))
        .collect();
    assert_eq!(told.len(), 3, "{told:?}");
    assert_eq!(told[2], (json!("Pull"), json!("Undone")));
    let remembered = test
        .wait_object("InstanceServer", "i2", "the way that worked", SOON, |object| {
            object["status"]["transfers"][0]["mode"] == "Relay"
        })
        .await;
    assert_eq!(remembered["status"]["transfers"][0]["from"], "i1");
    // another process reads it there
    first.kill().await;
    let second = test.controller().await;
    test.place(&Placement::new(&two, "i2")).await;
    road::intact(&test, &before[1], "i2", 2..=2).await;
    let ways: Vec<Value> = test
        .moves(&two)
        .await
        .iter()
        .map(|m| m["spec"]["transfer"].clone())
        .collect();
    assert_eq!(ways, ["Relay"]);
    // where each is reached is another matter now, so it is found out anew
    for name in ["i1", "i2"] {
        let url = &test.lab().server(name).url;
        test.patch("InstanceServer", name, json!({"spec": {"peerAddress": url}}))
            .await;
        let known = |object: &Value| object["status"]["observedGeneration"] == object["metadata"]["generation"];
        test.wait_object("InstanceServer", name, "seen", SOON, known).await;
    }
    for to in ["i1", "i2"] {
        test.retarget(&two, json!({"server": to})).await;
        test.wait_in_place(&two, to, SOON).await;
    }
    let moves = test.moves(&two).await;
    assert_eq!(moves.last().map(|m| &m["spec"]["transfer"]), Some(&json!("Pull")));
    second.kill().await;
}

async fn a_controller_that_is_killed_in_mid_relay_is_followed_by_one_that_ends_the_move(test: Test) {
    let source = test.lab().server("i1");
    let name = test.unique("web");
    let new = NewInstance {
        megabytes: 24,
        ..NewInstance::on_pool("btr")
    };
    source.create(&name, &new).await;
    let before = known(source, &name).await;
    add_separated(&test, &["i1", "i2"]).await;
    let first = test.controller().await;
    source.throttle("40mbit").await;
    test.place(&Placement::new(&name, "i2").with(json!({"transfer": "Relay"})))
        .await;
    wait_for("data to flow", SOON, || async {
        let list = source
            .get("/1.0/operations?recursion=1")
            .await
            .map_err(|e| e.to_string())?;
        let running = list["running"].as_array().cloned().unwrap_or_default();
        let ours = |o: &&Value| o["resources"].to_string().contains(&name);
        let shown: Vec<&Value> = running.iter().filter(ours).map(|o| &o["metadata"]).collect();
        match shown.iter().any(|m| m.get("fs_progress").is_some()) {
            true => Ok(()),
            false => Err(format!("{shown:?}")),
        }
    })
    .await;
    first.kill().await;
    source.throttle("off").await;
    let _second = test.controller().await;
    road::intact(&test, &before, "i2", 2..=2).await;
    assert_eq!(test.moves(&name).await.len(), 1, "one move, not another attempt");
}
