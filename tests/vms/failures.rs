//! Live moves that fail: the guest runs exactly once afterwards, where it was or where it was going, without a new boot.

use std::time::{Duration, Instant};

use berth_tests::{Fate, NewVm, Placement, Proxy, Test, condition, summary, wait_for};
use serde_json::{Value, json};

use super::LONG;

/// A guest on i1 that is about to be moved live to i2.
async fn begun(test: &Test, live: Value) -> (String, String) {
    let (lab, vm) = (test.lab(), test.unique("vm"));
    lab.create_vm(lab.server("i1"), &vm, &NewVm::default()).await;
    test.add_servers(&["i1", "i2"]).await;
    test.controller().await;
    let boot = lab.wait_ticking(&vm).await;
    let spec = json!({"methods": ["Live"], "live": live});
    test.place(&Placement::new(&vm, "i2").with(spec)).await;
    test.wait_step(&vm, &["Restoring"], LONG).await;
    (vm, boot)
}

/// Waits for the end of the first move; its outcome.
async fn ended(test: &Test, vm: &str) -> Value {
    wait_for("the move to be over", LONG, || async {
        let first = test.moves(vm).await.into_iter().next().unwrap_or_default();
        match first["status"]["outcome"].as_str() {
            Some(_) => Ok(first),
            None => Err(summary(&first)),
        }
    })
    .await
}

/// The guest ticks, with the same boot id, on one server alone.
async fn runs_once(test: &Test, vm: &str, boot: &str) {
    let lab = test.lab();
    wait_for("one copy to run", LONG, || async {
        let places = lab.whereabouts(vm).await;
        let running = places.iter().filter(|(_, status)| status != "Stopped").count();
        if running == 1 {
            Ok(())
        } else {
            Err(format!("{places:?}"))
        }
    })
    .await;
    assert_eq!(lab.wait_ticking(vm).await, boot, "the guest was never stopped");
    let since = Instant::now();
    lab.wait_ticking(vm).await;
    assert!(lab.heard(vm, since).repeated.is_empty(), "one guest runs");
}

/// However the first move ends, one guest runs, and no further attempt is made meanwhile.
async fn ends_with_one_guest(test: &Test, vm: &str, boot: &str, what: &str) {
    let first = ended(test, vm).await;
    eprintln!(
        "{what}: {} {}",
        first["status"]["outcome"], first["status"]["lastError"]
    );
    test.patch("InstancePlacement", vm, json!({"spec": {"suspend": true}}))
        .await;
    runs_once(test, vm, boot).await;
}

pub async fn a_cancelled_live_move_leaves_the_guest_where_it_was(test: Test) {
    let (vm, boot) = begun(&test, json!({})).await;
    let first = test.moves(&vm).await.into_iter().next().unwrap_or_default();
    let name = first["metadata"]["name"].as_str().unwrap_or_default();
    test.patch("InstanceMove", name, json!({"spec": {"cancel": true}}))
        .await;
    // seen as the running state began to be sent: the target's operation stays
    let restarted = test.restart_what_never_ends(name, LONG).await;
    assert!(restarted.is_none_or(|server| server == "i2"), "the source let go");
    let first = ended(&test, &vm).await;
    // it may have been over before the wish was read
    let outcome = first["status"]["outcome"].as_str().unwrap_or_default();
    assert!(["Cancelled", "Succeeded"].contains(&outcome), "{first:#}");
    runs_once(&test, &vm, &boot).await;
}

pub async fn a_guest_that_the_target_cannot_take_over_runs_on_and_moves_once_it_can(test: Test) {
    let (lab, vm) = (test.lab(), test.unique("vm"));
    let (source, target) = (lab.server("i1"), lab.server("i2"));
    let file = format!("/var/lib/incus/{vm}.file");
    source.write_on_host(&file).await;
    let qemu = format!("-fw_cfg name=opt/lab,file={file}");
    let new = NewVm {
        qemu,
        ..NewVm::default()
    };
    lab.create_vm(source, &vm, &new).await;
    test.add_servers(&["i1", "i2"]).await;
    test.controller().await;
    let boot = lab.wait_ticking(&vm).await;
    test.place(&Placement::new(&vm, "i2").with(json!({"methods": ["Live"]})))
        .await;
    let first = ended(&test, &vm).await;
    assert_eq!(first["status"]["outcome"], "Undone", "{first:#}");
    assert_eq!(first["status"]["undo"]["reason"], "TargetRefused", "{first:#}");
    let why = first["status"]["undo"]["message"].as_str().unwrap_or_default();
    assert!(why.contains(&file), "it says what is missing there: {why}");
    runs_once(&test, &vm, &boot).await;
    assert_eq!(lab.whereabouts(&vm).await, [("i1".to_owned(), "Running".to_owned())]);
    target.write_on_host(&file).await;
    test.ask_again("InstancePlacement", &vm, "now").await;
    test.wait_in_place(&vm, "i2", LONG).await;
    runs_once(&test, &vm, &boot).await;
}

pub async fn a_live_move_over_a_slow_link_is_given_up_in_time(test: Test) {
    let lab = test.lab();
    lab.server("i1").throttle("2mbit").await;
    let (vm, boot) = begun(&test, json!({"timeout": "10s"})).await;
    let first = ended(&test, &vm).await;
    lab.server("i1").throttle("off").await;
    assert_eq!(first["status"]["outcome"], "Undone", "{first:#}");
    assert!(
        first["status"]["undo"]["message"].to_string().contains("live.timeout"),
        "{first:#}"
    );
    assert_eq!(lab.server("i1").status(&vm).await, "Running");
    // the next attempt, over a link that is as it should be, gets it there
    test.patch("InstancePlacement", &vm, json!({"spec": {"live": {"timeout": "1h"}}}))
        .await;
    test.wait_in_place(&vm, "i2", LONG).await;
    runs_once(&test, &vm, &boot).await;
}

pub async fn a_live_move_ends_well_whichever_daemon_is_killed(test: Test) {
    let lab = test.lab();
    for victim in ["i2", "i1"] {
        let id = test.unique("vm");
        let vm = format!("{victim}-{id}");
        lab.create_vm(lab.server("i1"), &vm, &NewVm::default()).await;
        if victim == "i2" {
            test.add_servers(&["i1", "i2"]).await;
            test.controller().await;
        }
        let boot = lab.wait_ticking(&vm).await;
        // slow enough to be hit in the middle
        lab.server("i1").throttle("20mbit").await;
        test.place(&Placement::new(&vm, "i2").with(json!({"methods": ["Live"]})))
            .await;
        test.wait_step(&vm, &["Restoring"], LONG).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let server = lab.server(victim);
        server.kill_daemon().await;
        lab.server("i1").throttle("off").await;
        server.start_daemon().await;
        ends_with_one_guest(&test, &vm, &boot, &format!("{victim} killed")).await;
    }
}

pub async fn a_live_move_whose_link_is_cut_ends_with_one_guest(test: Test) {
    let target = test.lab().server("i2");
    test.lab().server("i1").throttle("20mbit").await;
    let (vm, boot) = begun(&test, json!({})).await;
    target.unplug().await;
    test.lab().server("i1").throttle("off").await;
    wait_for("the controller to notice", LONG, || async {
        let server = test.get("InstanceServer", "i2").await.unwrap_or_default();
        match condition(&server, "Ready").map(|c| c["status"] == "False") {
            Some(true) => Ok(()),
            _ => Err(summary(&server)),
        }
    })
    .await;
    target.plug().await;
    ends_with_one_guest(&test, &vm, &boot, "link cut").await;
}

pub async fn two_guests_that_ran_for_too_long_are_told_to_a_person(test: Test) {
    let (lab, vm) = (test.lab(), test.unique("vm"));
    let source = lab.server("i1");
    lab.create_vm(source, &vm, &NewVm::default()).await;
    let proxy = Proxy::start(lab, source).await;
    test.add_client_secret("berth-client").await;
    let spec = json!({"addresses": [proxy.url()], "peerAddress": source.url});
    test.add_server("i1", source, spec).await;
    test.add_server("i2", lab.server("i2"), json!({})).await;
    test.controller().await;
    let boot = lab.wait_ticking(&vm).await;
    proxy.rule(|seen| match seen.path.ends_with("/state") && seen.method == "PUT" {
        true => Fate::Hold,
        false => Fate::Pass,
    });
    let live = json!({"methods": ["Live"], "live": {"maxOverlap": "1s"}});
    test.place(&Placement::new(&vm, "i2").with(live)).await;
    proxy.wait_held(LONG).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    proxy.release().await;
    let first = ended(&test, &vm).await;
    assert_eq!(first["status"]["outcome"], "NeedsAttention", "{first:#}");
    assert!(first.to_string().contains("maxOverlap"), "{first:#}");
    runs_once(&test, &vm, &boot).await;
    assert_eq!(lab.server("i2").status(&vm).await, "Running");
    let places = lab.whereabouts(&vm).await;
    assert!(
        places
            .iter()
            .any(|(server, status)| server == "i1" && status == "Stopped"),
        "{places:?}"
    );
}
