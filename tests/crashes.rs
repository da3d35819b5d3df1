//! Whatever dies, the move ends well: controllers, the API server and daemons are killed or paused on real servers, at
//! every request of a cold move, delivered or not.

use std::process::ExitCode;
use std::time::Duration;

use berth_tests::{ControllerOptions, Needs, NewInstance, Placement, SOON, Server, Suite, Test, wait_for, wait_until};
use serde_json::json;

use road::{Call, Road, Subject, Watch, intact, known, subject, with_data};

mod road;

fn main() -> ExitCode {
    let mut suite = Suite::new(env!("CARGO_CRATE_NAME"), &[Needs::Kube, Needs::Lab]).timeout(Duration::from_secs(300));
    for call in Call::WRITES {
        for (product, one, other) in [("incus", "i1", "i2"), ("lxd", "l1", "l2")] {
            let name = format!(
                "a controller that is killed at {} is followed by one that ends the move, {product}",
                call.words()
            );
            suite = suite.together(&name, move |test| killed(test, call, one, other));
        }
    }
    suite
        .together(
            "a controller that is paused at every step finds its moves done by another incus",
            |test| paused(test, "i1", "i2"),
        )
        .together(
            "a controller that is paused at every step finds its moves done by another lxd",
            |test| paused(test, "l1", "l2"),
        )
        .together(
            stringify!(two_controllers_that_both_act_do_no_harm),
            two_controllers_that_both_act_do_no_harm,
        )
        .alone(
            stringify!(the_api_server_is_killed_in_mid_move),
            the_api_server_is_killed_in_mid_move,
        )
        .alone("the daemon of the target is killed in mid-transfer incus", |test| {
            daemon_killed(test, "i1", "i2", "btr", false)
        })
        .alone("the daemon of the source is killed in mid-transfer incus", |test| {
            daemon_killed(test, "i2", "i1", "default", true)
        })
        .alone("the daemon of the target is killed in mid-transfer lxd", |test| {
            daemon_killed(test, "l1", "l2", "default", false)
        })
        .alone("the daemon of the source is killed in mid-transfer lxd", |test| {
            daemon_killed(test, "l2", "l1", "btr", true)
        })
        .main()
}

/// There with the request never delivered, and back with the request delivered after its sender's death.
async fn killed(test: Test, call: Call, one: &'static str, other: &'static str) {
    let road = Road::between(&test, one, other).await;
    let web = subject(&test, one, "web", &asking_for(call)).await;
    let watch = Watch::begin(&road, std::slice::from_ref(&web));
    for (from, to, delivered, boots) in [(one, other, false, 2), (other, one, true, 3)] {
        let first = test.controller().await;
        test.wait_in_place(&web.name, from, SOON).await;
        let transfers = road.count(Call::Create, &web.name);
        road.catch(&[(call, &web.name)]);
        test.retarget(&web.name, json!({"server": to})).await;
        road.caught().await;
        first.kill().await;
        if delivered {
            road.release_at(if call.is_for_target() { to } else { from }).await;
        } else {
            road.pass();
        }
        let second = test.controller().await;
        intact(&test, &web, to, boots..=boots).await;
        let transfers = road.count(Call::Create, &web.name) - transfers;
        assert!(transfers <= 2, "{transfers} transfers for one move");
        assert_eq!(
            test.moves(&web.name).await.len(),
            boots - 1,
            "one move, not another attempt"
        );
        second.kill().await;
    }
    watch.end();
}

/// One instance for each request, all held at once; the leader is paused, the other takes over; then the first goes on
/// and all that it had sent arrives.
async fn paused(test: Test, from: &'static str, to: &'static str) {
    let road = Road::between(&test, from, to).await;
    let subjects = subjects(&test, from).await;
    let watch = Watch::begin(&road, &subjects);
    let elected = ControllerOptions {
        leader_election: true,
        ..ControllerOptions::default()
    };
    let first = test.controller_with(elected.clone()).await;
    for subject in &subjects {
        test.wait_in_place(&subject.name, from, SOON).await;
    }
    let second = test
        .controller_with(ControllerOptions {
            no_wait: true,
            ..elected
        })
        .await;
    road.hold_each(&test, &Call::WRITES, &subjects, to).await;
    first.stop().await;
    for subject in &subjects {
        test.wait_in_place(&subject.name, to, SOON).await;
    }
    first.cont().await;
    road.release().await;
    for subject in &subjects {
        // an attempt whose request was held for too long is undone and made again
        intact(&test, subject, to, 2..=4).await;
    }
    // whoever leads now still does its work
    test.retarget(&subjects[0].name, json!({"server": from})).await;
    intact(&test, &subjects[0], from, 3..=5).await;
    watch.end();
    first.kill().await;
    second.kill().await;
}

/// One instance per writing request.
async fn subjects(test: &Test, on: &str) -> Vec<Subject> {
    let mut subjects = Vec::new();
    for (number, call) in Call::WRITES.into_iter().enumerate() {
        subjects.push(subject(test, on, &format!("n{number:02}"), &asking_for(call)).await);
    }
    subjects
}

/// An instance whose move makes that request.
fn asking_for(call: Call) -> NewInstance {
    let mut new = with_data("default");
    if call == Call::Retire {
        new.config.push(("security.protection.delete".into(), "true".into()));
    }
    new
}

/// Without an election both act; what one does the other finds done, or undoes. Nothing is lost meanwhile, and as soon as
/// one of them is gone all is in order.
async fn two_controllers_that_both_act_do_no_harm(test: Test) {
    let road = Road::between(&test, "i1", "i2").await;
    let mut subjects = Vec::new();
    for name in ["a", "b", "c"] {
        subjects.push(subject(&test, "i1", name, &with_data("default")).await);
    }
    let watch = Watch::begin(&road, &subjects);
    test.recorder().excuse();
    let first = test.controller().await;
    let second = test.controller().await;
    for subject in &subjects {
        test.wait_in_place(&subject.name, "i1", SOON).await;
        test.retarget(&subject.name, json!({"server": "i2"})).await;
    }
    for subject in &subjects {
        test.wait_step(
            &subject.name,
            &["Committed", "Started", "Retired", "Cleaned", "Undoing"],
            SOON,
        )
        .await;
    }
    first.kill().await;
    for subject in &subjects {
        // an undone attempt boots once more
        intact(&test, subject, "i2", 2..=6).await;
    }
    watch.end();
    second.kill().await;
}

async fn the_api_server_is_killed_in_mid_move(test: Test) {
    let road = Road::between(&test, "i1", "i2").await;
    let calls = [Call::Stop, Call::Create, Call::Own, Call::Delete];
    let mut subjects = Vec::new();
    for number in 0..calls.len() {
        subjects.push(subject(&test, "i1", &format!("n{number}"), &with_data("default")).await);
    }
    let watch = Watch::begin(&road, &subjects);
    let controller = test.controller().await;
    for subject in &subjects {
        test.wait_in_place(&subject.name, "i1", SOON).await;
    }
    let wanted: Vec<(Call, &str)> = calls
        .into_iter()
        .zip(subjects.iter().map(|s| s.name.as_str()))
        .collect();
    road.catch(&wanted);
    for subject in &subjects {
        test.retarget(&subject.name, json!({"server": "i2"})).await;
    }
    road.caught().await;
    test.kube().kill_apiserver().await;
    road.release().await;
    test.kube().start_apiserver().await;
    for subject in &subjects {
        intact(&test, subject, "i2", 2..=3).await;
    }
    watch.end();
    controller.kill().await;
}

/// The link is slow, so that the transfer takes a while; then a daemon dies and comes back.
async fn daemon_killed(test: Test, from: &'static str, to: &'static str, pool: &'static str, source: bool) {
    let (sender, receiver) = (test.lab().server(from), test.lab().server(to));
    let name = test.unique("web");
    let new = berth_tests::NewInstance {
        megabytes: 12,
        ..with_data(pool)
    };
    sender.create(&name, &new).await;
    let web = known(sender, &name).await;
    test.add_servers(&[from, to]).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&name, from).with(json!({"methods": ["Cold"]})))
        .await;
    test.wait_in_place(&name, from, SOON).await;
    sender.throttle("24mbit").await;
    test.retarget(&name, json!({"server": to})).await;
    half_made(receiver, &name).await;
    let victim = if source { sender } else { receiver };
    victim.kill_daemon().await;
    sender.throttle("off").await;
    victim.start_daemon().await;
    wait_until("the daemon to answer", SOON, || async {
        victim.instances().await.is_ok()
    })
    .await;
    // once created; perhaps once more, undone; once arrived
    intact(&test, &web, to, 2..=4).await;
}

/// Waits until the target has a copy whose transfer goes on.
async fn half_made(receiver: &Server, name: &str) {
    wait_for("a transfer to be under way", Duration::from_secs(60), || async {
        let instances = receiver.instances().await.map_err(|error| error.to_string())?;
        let ours = |i: &&serde_json::Value| i["name"].as_str().is_some_and(|n| n.contains(name));
        instances
            .iter()
            .find(ours)
            .map(drop)
            .ok_or_else(|| "no copy yet".to_owned())
    })
    .await;
}
