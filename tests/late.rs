//! Requests that a network delays for a long time, and whose sender is long dead, find nothing to harm: not after the end
//! of their move, not after the next move, not in the middle of it.

use berth_tests::{SOON, Test, wait_until};
use serde_json::json;

use road::{Call, Road, Subject, Watch, intact, subject, with_data};

mod road;

berth_tests::suite! {
    needs: [Kube, Lab],
    side_by_side: 3,
    together: [
        requests_that_arrive_after_their_move_ended_change_nothing_on_incus,
        requests_that_arrive_after_their_move_ended_change_nothing_on_lxd,
        requests_that_arrive_after_the_next_move_change_nothing_on_incus,
        requests_that_arrive_after_the_next_move_change_nothing_on_lxd,
        requests_that_arrive_in_the_middle_of_the_next_move_find_the_guard_on_incus,
        requests_that_arrive_in_the_middle_of_the_next_move_find_the_guard_on_lxd,
    ],
    alone: [],
}

async fn requests_that_arrive_after_their_move_ended_change_nothing_on_incus(test: Test) {
    after_their_move(test, "i1", "i2").await;
}

async fn requests_that_arrive_after_their_move_ended_change_nothing_on_lxd(test: Test) {
    after_their_move(test, "l1", "l2").await;
}

async fn requests_that_arrive_after_the_next_move_change_nothing_on_incus(test: Test) {
    after_the_next_move(test, "i1", "i2").await;
}

async fn requests_that_arrive_after_the_next_move_change_nothing_on_lxd(test: Test) {
    after_the_next_move(test, "l1", "l2").await;
}

async fn requests_that_arrive_in_the_middle_of_the_next_move_find_the_guard_on_incus(test: Test) {
    in_the_middle_of_the_next_move(test, "i1", "i2").await;
}

async fn requests_that_arrive_in_the_middle_of_the_next_move_find_the_guard_on_lxd(test: Test) {
    in_the_middle_of_the_next_move(test, "l1", "l2").await;
}

/// What has no precondition: nothing but names, the guard and a second look stand between these and harm.
const UNCONDITIONAL: [Call; 7] = [
    Call::Stop,
    Call::Offer,
    Call::Create,
    Call::Name,
    Call::Start,
    Call::Rename,
    Call::Delete,
];

/// An attempt whose request was held for too long is undone and made again: one boot more each.
const BOOTS: usize = 2;

/// One instance per request, each held at its own; their sender is dead and another one has ended all moves.
async fn overtaken(test: &Test, road: &Road, calls: &[Call], from: &str, to: &str) -> Vec<Subject> {
    let mut subjects = Vec::new();
    for number in 0..calls.len() {
        subjects.push(subject(test, from, &format!("n{number:02}"), &with_data("default")).await);
    }
    let first = test.controller().await;
    for subject in &subjects {
        test.wait_in_place(&subject.name, from, SOON).await;
    }
    road.hold_each(test, calls, &subjects, to).await;
    first.kill().await;
    test.controller().await;
    for subject in &subjects {
        intact(test, subject, to, 2..=2 + BOOTS).await;
    }
    subjects
}

async fn after_their_move(test: Test, from: &str, to: &str) {
    let road = Road::between(&test, from, to).await;
    let subjects = overtaken(&test, &road, &UNCONDITIONAL, from, to).await;
    let watch = Watch::begin(&road, &subjects);
    road.release().await;
    for subject in &subjects {
        intact(&test, subject, to, 2..=2 + BOOTS).await;
    }
    watch.end();
}

async fn after_the_next_move(test: Test, from: &str, to: &str) {
    let road = Road::between(&test, from, to).await;
    let subjects = overtaken(&test, &road, &UNCONDITIONAL, from, to).await;
    for subject in &subjects {
        test.retarget(&subject.name, json!({"server": from})).await;
    }
    for subject in &subjects {
        intact(&test, subject, from, 3..=3 + BOOTS).await;
    }
    let watch = Watch::begin(&road, &subjects);
    road.release().await;
    for subject in &subjects {
        // a stop has no precondition that would catch it; what it stopped is started again
        intact(&test, subject, from, 3..=4 + BOOTS).await;
    }
    watch.end();
}

/// What was meant for the target arrives there while the instance, now its source, is stopped for the next move.
async fn in_the_middle_of_the_next_move(test: Test, from: &str, to: &str) {
    let calls: Vec<Call> = UNCONDITIONAL.into_iter().filter(|call| call.is_for_target()).collect();
    let road = Road::between(&test, from, to).await;
    let subjects = overtaken(&test, &road, &calls, from, to).await;
    let watch = Watch::begin(&road, &subjects);
    let wanted: Vec<(Call, &str)> = subjects.iter().map(|s| (Call::Create, s.name.as_str())).collect();
    road.catch(&wanted);
    for subject in &subjects {
        test.retarget(&subject.name, json!({"server": from})).await;
    }
    road.caught().await;
    road.release_at(to).await;
    let server = test.lab().server(to);
    for subject in &subjects {
        assert_eq!(server.status(&subject.name).await, "Stopped", "the guard holds");
    }
    road.release().await;
    wait_until("all held requests to be answered", SOON, || async {
        road.proxies().all(|proxy| proxy.held() == 0)
    })
    .await;
    for subject in &subjects {
        intact(&test, subject, from, 3..=3 + BOOTS).await;
    }
    watch.end();
}
