//! Warm moves of real containers under write loads of 5 to 100 MiB/s: copied while they run, stopped for the last difference
//! only. What the guest had acknowledged before its stop is there afterwards, the user's snapshots stay, those of the move go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use berth_tests::{Fate, NewInstance, Placement, SOON, Server, Test, reason, seconds, wait_for};
use road::{Call, Road, Watch, intact, with_data};
use serde_json::{Value, json};

mod road;

berth_tests::suite! {
    needs: [Kube, Lab],
    // guests that write all the time
    side_by_side: 2,
    together: [
        // takes longest
        a_controller_that_is_killed_in_the_middle_of_a_warm_move_is_followed_by_one_that_ends_it,
        every_acknowledged_write_arrives_between_btrfs_pools_of_incus_under_every_load,
        every_acknowledged_write_arrives_between_btrfs_pools_of_lxd,
        every_acknowledged_write_arrives_between_dir_pools_of_incus,
        every_acknowledged_write_arrives_between_dir_pools_of_lxd,
        every_acknowledged_write_arrives_from_btrfs_to_dir,
        every_acknowledged_write_arrives_from_dir_to_btrfs,
        a_warm_move_that_fails_is_followed_by_a_cold_one_and_not_tried_again,
        an_instance_that_may_not_stand_still_for_so_long_waits_and_says_so,
        a_warm_move_says_how_far_it_is,
    ],
    alone: [],
}

/// Ten times a second: some blocks of a file are written over with others than before, as far as the machine can, and what
/// was written so far goes to a log with the machine's uptime in hundredths of seconds.
const LOAD: &str = r#"blocks=$1 parts=$2 n=0
now() { read -r t _ </proc/uptime; t=${t%.*}${t#*.}; }
now; due=$t; echo "$t 0" >/root/load
while :; do
  dd if=/root/data of=/root/dirt bs=65536 count=$blocks skip=$((n % 16)) seek=$((n % parts * blocks)) conv=notrunc
  n=$((n + 1)); now; echo "$t $((n * blocks))" >>/root/load
  due=$((due + 10)); left=$((due - t))
  if [ $left -gt 0 ]; then sleep 0.$(printf %02d $left); elif [ $left -lt -100 ]; then due=$t; fi
done
"#;

/// A guest that writes all the time, and what it acknowledged.
struct Writer {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Vec<u64>>,
}

impl Writer {
    /// Writes a number and has it acknowledged, again and again; beside that a file of a few MiB is written over all the
    /// time, so many MiB in a second.
    async fn begin(server: &'static Server, name: &str, rate: usize) -> Writer {
        server.write_file(name, "/root/load.sh", LOAD).await;
        let (blocks, parts) = (rate * 16 / 10, (40 / rate).max(1));
        let begin = format!("setsid sh /root/load.sh {blocks} {parts} >/dev/null 2>&1 </dev/null &");
        let begun = server.exec(name, &["sh", "-c", &begin]).await;
        begun.unwrap_or_else(|error| panic!("{name}: {error}"));
        let stop = Arc::new(AtomicBool::new(false));
        let (name, over) = (name.to_owned(), Arc::clone(&stop));
        // it has written before anything else happens
        let first = write(server, &name, 0).await;
        let mut acknowledged = first.unwrap_or_else(|| panic!("{name} cannot write"));
        let task = tokio::spawn(async move {
            for n in 1.. {
                // from its stop on the guest acknowledges nothing more here
                match write(server, &name, n).await {
                    Some(numbers) if !over.load(Ordering::SeqCst) => acknowledged.extend(numbers),
                    Some(_) | None => break,
                }
            }
            acknowledged
        });
        Writer { stop, task }
    }

    /// What was acknowledged until the guest stopped.
    async fn end(self) -> Vec<u64> {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await.unwrap_or_default()
    }
}

/// Has the guest write twenty numbers; those, once they are on its disk.
async fn write(server: &Server, name: &str, n: u64) -> Option<Vec<u64>> {
    let (first, last) = (n * 20, n * 20 + 19);
    let write = format!("for i in $(seq {first} {last}); do echo $i >>/root/written; done; sync");
    let done = server.exec(name, &["sh", "-c", &write]).await;
    done.is_ok().then(|| (first..=last).collect())
}

async fn snapshots(server: &Server, name: &str) -> Vec<String> {
    let path = format!("/1.0/instances/{name}/snapshots?recursion=1");
    let list = server.get(&path).await.unwrap_or_else(|e| panic!("{e}"));
    let names = list.as_array().into_iter().flatten();
    let mut names: Vec<String> = names
        .map(|s| {
            s["name"]
                .as_str()
                .unwrap_or_default()
                .rsplit('/')
                .next()
                .unwrap_or_default()
                .to_owned()
        })
        .collect();
    names.sort();
    names
}

/// Longest time without a tick, in seconds: what nobody inside can argue about.
async fn longest_silence(server: &Server, name: &str) -> f64 {
    let ticks = server.read_file(name, "/var/log/ticks").await.unwrap_or_default();
    let times: Vec<f64> = String::from_utf8_lossy(&ticks)
        .lines()
        .filter_map(|line| line.split(' ').next()?.parse().ok())
        .collect();
    times.windows(2).map(|w| w[1] - w[0]).fold(0.0, f64::max)
}

/// MiB per second that the load wrote until the guest was stopped.
async fn measured_load(server: &Server, name: &str) -> f64 {
    let log = server.read_file(name, "/root/load").await.unwrap_or_default();
    let log: Vec<(f64, f64)> = String::from_utf8_lossy(&log)
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(at, blocks)| Some((at.parse().ok()?, blocks.parse().ok()?)))
        .collect();
    let [first, .., last] = log.as_slice() else {
        panic!("{name}: the load did not begin")
    };
    (last.1 - first.1) / 16.0 / ((last.0 - first.0) / 100.0)
}

/// A server and one of its pools.
type Place = (&'static str, &'static str);

/// Moves a container for each load, side by side, with so many snapshots of the user's own.
async fn moves(test: &Test, from: Place, to: Place, own: usize, loads: &[usize]) {
    test.add_client_secret("berth-client").await;
    for name in [from.0, to.0] {
        let limits = json!({"limits": {"incoming": loads.len(), "outgoing": loads.len()}});
        test.add_server(name, test.lab().server(name), limits).await;
    }
    let controller = test.controller().await;
    let each = loads.iter().map(|load| moves_under(test, from, to, own, *load));
    futures::future::join_all(each).await;
    drop(controller);
}

/// Moves a busy container, and looks at everything that a user would look at.
async fn moves_under(test: &Test, (from, from_pool): Place, (to, to_pool): Place, own: usize, load: usize) {
    let (source, target) = (test.lab().server(from), test.lab().server(to));
    let name = test.unique(&format!("web{load}"));
    let new = NewInstance {
        megabytes: 12,
        snapshots: own,
        ..NewInstance::on_pool(from_pool)
    };
    source.create(&name, &new).await;
    source.write_file(&name, "/etc/tick", "0.05").await;
    let data = source.checksum(&name, "/root/data").await;
    let user = snapshots(source, &name).await;
    // so that rounds go on where they can
    let warm = json!({"maxRounds": 3, "downtimeGoal": "100ms"});
    let spec = json!({"methods": ["Warm"], "target": {"pool": from_pool}, "warm": warm});
    test.place(&Placement::new(&name, from).with(spec)).await;
    test.wait_in_place(&name, from, SOON).await;
    let writer = Writer::begin(source, &name, load).await;
    test.retarget(&name, json!({"server": to, "pool": to_pool})).await;
    test.wait_in_place(&name, to, SOON).await;
    let acknowledged = writer.end().await;
    target.wait_counting(&name).await;

    let written = target.read_file(&name, "/root/written").await.unwrap_or_default();
    let written: Vec<u64> = String::from_utf8_lossy(&written)
        .lines()
        .filter_map(|l| l.parse().ok())
        .collect();
    assert!(!acknowledged.is_empty(), "the guest wrote before it was stopped");
    let lost: Vec<_> = acknowledged.iter().filter(|n| !written.contains(n)).collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    assert_eq!(target.checksum(&name, "/root/data").await, data, "the same data");
    assert_eq!(
        snapshots(target, &name).await,
        user,
        "the user's snapshots, and no others"
    );
    assert_eq!(target.boots(&name).await, 2, "stopped and started once");
    assert_eq!(
        test.lab().whereabouts(&name).await,
        [(to.to_owned(), "Running".to_owned())],
        "the source is gone"
    );
    let moves = test.moves(&name).await;
    assert_eq!(moves.len(), 1, "{moves:#?}");
    let status = &moves[0]["status"];
    assert_eq!(moves[0]["spec"]["method"], "Warm");
    assert_eq!(status["outcome"], "Succeeded");
    let rounds = status["precopy"]["rounds"].as_array().map_or(0, Vec::len);
    assert!(
        rounds >= 2,
        "at least one round before the stop and one after it: {status:#}"
    );
    // the guest cannot have been silent for longer than was measured, but for its own boot
    let (silent, measured) = (longest_silence(target, &name).await, seconds(&status["downtime"]));
    assert!(silent < measured + 3.0, "silent for {silent} s, measured {measured} s");
    eprintln!(
        "{from}/{from_pool} to {to}/{to_pool}: wrote {:.1} of {load} MiB/s, {rounds} rounds, silent {silent:.2} s, measured {measured:.2} s, {} writes",
        measured_load(target, &name).await,
        acknowledged.len()
    );
}

async fn every_acknowledged_write_arrives_between_btrfs_pools_of_incus_under_every_load(test: Test) {
    moves(&test, ("i1", "btr"), ("i2", "btr"), 2, &[5, 20, 100]).await;
}

async fn every_acknowledged_write_arrives_between_btrfs_pools_of_lxd(test: Test) {
    moves(&test, ("l1", "btr"), ("l2", "btr"), 2, &[20]).await;
}

async fn every_acknowledged_write_arrives_between_dir_pools_of_incus(test: Test) {
    moves(&test, ("i1", "default"), ("i2", "default"), 0, &[5]).await;
}

async fn every_acknowledged_write_arrives_between_dir_pools_of_lxd(test: Test) {
    moves(&test, ("l2", "default"), ("l1", "default"), 2, &[5]).await;
}

async fn every_acknowledged_write_arrives_from_btrfs_to_dir(test: Test) {
    moves(&test, ("i2", "btr"), ("i1", "default"), 1, &[20]).await;
}

async fn every_acknowledged_write_arrives_from_dir_to_btrfs(test: Test) {
    moves(&test, ("i2", "default"), ("i1", "btr"), 1, &[5]).await;
}

/// One instance for each request that only a warm move makes, all held at once.
async fn a_controller_that_is_killed_in_the_middle_of_a_warm_move_is_followed_by_one_that_ends_it(test: Test) {
    let road = Road::between(&test, "i1", "i2").await;
    let mut subjects = Vec::new();
    for number in 0..Call::WARM.len() {
        let subject = road::subject(&test, "i1", &format!("n{number}"), &with_data("btr")).await;
        let spec = json!({"spec": {"methods": ["Warm"], "target": {"pool": "btr"}}});
        test.patch("InstancePlacement", &subject.name, spec).await;
        subjects.push(subject);
    }
    let watch = Watch::begin(&road, &subjects);
    let first = test.controller().await;
    for subject in &subjects {
        test.wait_in_place(&subject.name, "i1", SOON).await;
    }
    road.hold_each(&test, &Call::WARM, &subjects, "i2").await;
    first.kill().await;
    road.pass();
    let second = test.controller().await;
    for subject in &subjects {
        // one whose request was held for too long is undone and moved again
        intact(&test, subject, "i2", 2..=3).await;
        let left = snapshots(test.lab().server("i2"), &subject.name).await;
        assert_eq!(left, [""; 0], "{}: temporary snapshots are left", subject.name);
    }
    watch.end();
    second.kill().await;
}

async fn a_warm_move_that_fails_is_followed_by_a_cold_one_and_not_tried_again(test: Test) {
    let road = Road::between(&test, "i1", "i2").await;
    let web = road::subject(&test, "i1", "web", &with_data("btr")).await;
    let spec = json!({"spec": {"methods": ["Warm"], "target": {"pool": "btr"}}});
    test.patch("InstancePlacement", &web.name, spec).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    for proxy in road.proxies() {
        proxy.rule(|seen| match Call::of(seen) {
            Some(Call::Snapshot) => Fate::Refuse,
            _ => Fate::Pass,
        });
    }
    // alone it is given up, and the instance runs on
    test.retarget(&web.name, json!({"server": "i2"})).await;
    let object = test
        .wait_ready("InstancePlacement", &web.name, "False/MethodImpossible", SOON)
        .await;
    let rejected = &object["status"]["plan"]["rejected"][0];
    assert_eq!(rejected["method"], "Warm", "{object:#}");
    assert!(
        rejected["message"]
            .as_str()
            .unwrap_or_default()
            .contains("refused on purpose"),
        "{rejected}"
    );
    assert_eq!(test.lab().server("i1").status(&web.name).await, "Running");
    assert_eq!(
        test.lab().server("i1").boots(&web.name).await,
        1,
        "it was never stopped"
    );
    // with Cold below it the move is made
    test.patch(
        "InstancePlacement",
        &web.name,
        json!({"spec": {"methods": ["Warm", "Cold"]}}),
    )
    .await;
    intact(&test, &web, "i2", 2..=2).await;
    let moves = test.moves(&web.name).await;
    let methods: Vec<_> = moves
        .iter()
        .map(|m| (m["spec"]["method"].clone(), m["status"]["outcome"].clone()))
        .collect();
    assert_eq!(
        methods,
        [(json!("Warm"), json!("Undone")), (json!("Cold"), json!("Succeeded"))],
        "Warm was tried once"
    );
    let object = test.get("InstancePlacement", &web.name).await.unwrap_or_default();
    assert_eq!(object["status"]["failedMethods"][0]["method"], "Warm", "{object:#}");
}

async fn an_instance_that_may_not_stand_still_for_so_long_waits_and_says_so(test: Test) {
    let source = test.lab().server("i1");
    let name = test.unique("web");
    source.create(&name, &with_data("btr")).await;
    // with a quota the server says how large it is
    let root = json!({"type": "disk", "path": "/", "pool": "btr", "size": "1GiB"});
    source.patch(&name, json!({"devices": {"root": root}})).await;
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    let spec = json!({"maxDowntime": "10ms", "target": {"pool": "btr"}});
    test.place(&Placement::new(&name, "i1").with(spec)).await;
    test.wait_in_place(&name, "i1", SOON).await;
    test.retarget(&name, json!({"server": "i2"})).await;
    let object = test
        .wait_ready("InstancePlacement", &name, "False/DowntimeTooLong", SOON)
        .await;
    assert_eq!(
        source.boots(&name).await,
        1,
        "{}: it was never stopped",
        reason(&object)
    );
    test.patch("InstancePlacement", &name, json!({"spec": {"maxDowntime": "5m"}}))
        .await;
    let object = test.wait_in_place(&name, "i2", SOON).await;
    assert_eq!(object["status"]["moves"][0]["method"], "Warm", "{object:#}");
    assert!(test.moves(&name).await[0]["spec"]["estimate"]["downtime"].is_string());
}

async fn a_warm_move_says_how_far_it_is(test: Test) {
    let source = test.lab().server("l1");
    let name = test.unique("web");
    let new = NewInstance {
        megabytes: 48,
        ..NewInstance::on_pool("btr")
    };
    source.create(&name, &new).await;
    test.add_servers(&["l1", "l2"]).await;
    let controller = test.controller().await;
    let spec = json!({"methods": ["Warm"], "target": {"pool": "btr"}});
    test.place(&Placement::new(&name, "l1").with(spec)).await;
    test.wait_in_place(&name, "l1", SOON).await;
    source.throttle("80mbit").await;
    test.retarget(&name, json!({"server": "l2"})).await;
    let record = test.wait_step(&name, &["Marked", "Precopied"], SOON).await;
    let path = format!(
        "/moves/{}/{}",
        test.namespace(),
        record["metadata"]["name"].as_str().unwrap_or_default()
    );
    let seen = wait_for("the listener to say how far it is", SOON, || async {
        let answer = controller.http_get(&path).await.map_err(|e| e.to_string())?;
        let body = answer
            .split_once("\r\n\r\n")
            .map(|(_, b)| b.to_owned())
            .unwrap_or_default();
        let moved: Value = serde_json::from_str(&body).map_err(|e| format!("{e}: {answer}"))?;
        let bytes = moved["progress"]["bytes"].as_i64().unwrap_or_default();
        if bytes > 0 {
            Ok(moved)
        } else {
            Err(format!("{moved:#}"))
        }
    })
    .await;
    source.throttle("off").await;
    assert_eq!(seen["method"], "Warm", "{seen:#}");
    assert_eq!(seen["progress"]["round"], 1, "{seen:#}");
    assert!(
        seen["progress"]["bytesPerSecond"].as_i64().unwrap_or_default() > 0,
        "{seen:#}"
    );
    test.wait_in_place(&name, "l2", SOON).await;
}
