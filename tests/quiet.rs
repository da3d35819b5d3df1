//! At rest nothing is called: no Kubernetes write but the Lease's, no request about an instance.

use std::time::Duration;

use berth_tests::{AuditEvent, ControllerOptions, NewInstance, SOON, Seen, Test, wait_for, wait_until};
use futures::future::join_all;

use road::Road;

mod road;

/// How long nothing may happen.
const REST: Duration = Duration::from_secs(60);
/// How many placements there are.
const PLACEMENTS: usize = 30;

berth_tests::suite! {
    needs: [Kube, Lab],
    together: [
        thirty_placements_in_place_cost_no_write_and_no_request_per_instance,
    ],
    alone: [],
}

async fn thirty_placements_in_place_cost_no_write_and_no_request_per_instance(test: Test) {
    let road = Road::between(&test, "i1", "i2").await;
    let names: Vec<String> = (0..PLACEMENTS)
        .map(|number| test.unique(&format!("n{number:02}")))
        .collect();
    // each third runs
    let make = |(number, name): (usize, &String)| {
        let new = NewInstance {
            start: number % 3 == 0,
            ..NewInstance::default()
        };
        let server = ["i1", "i2"][number % 2];
        let (test, name) = (test.clone(), name.clone());
        async move {
            test.lab().server(server).create(&name, &new).await;
            test.place(&berth_tests::Placement::new(&name, server)).await;
        }
    };
    for part in names.iter().enumerate().collect::<Vec<_>>().chunks(6) {
        join_all(part.iter().copied().map(make)).await;
    }
    let elected = ControllerOptions {
        leader_election: true,
        ..ControllerOptions::default()
    };
    let _controller = test.controller_with(elected).await;
    for (number, name) in names.iter().enumerate() {
        test.wait_in_place(name, ["i1", "i2"][number % 2], SOON).await;
    }
    // events are written after the status
    let mut events = 0;
    for name in names.iter().map(String::as_str).chain(["i1", "i2"]) {
        events += wait_for("the event of each object", SOON, || async {
            let told = test.events(name).await.len();
            if told > 0 {
                Ok(told)
            } else {
                Err(format!("none of {name}"))
            }
        })
        .await;
    }
    // what is written can be read before the audit log has it
    let logged = || {
        writes(&test)
            .iter()
            .filter(|w| w.object_ref.resource == "events")
            .count()
    };
    wait_until("the events' writes to be logged", SOON, || async { logged() >= events }).await;
    let (writes, requests) = (
        writes(&test).len(),
        road.proxies().map(|p| p.seen().len()).collect::<Vec<_>>(),
    );
    // not waiting for something: that nothing happens is what is measured
    tokio::time::sleep(REST).await;
    let written: Vec<String> = self::writes(&test).split_off(writes).iter().map(shown).collect();
    assert!(written.is_empty(), "written at rest: {written:#?}");
    for (proxy, before) in road.proxies().zip(requests) {
        let seen = proxy.seen().split_off(before);
        let about: Vec<&Seen> = seen
            .iter()
            .filter(|s| names.iter().any(|n| s.path.contains(n.as_str())))
            .collect();
        assert!(about.is_empty(), "asked at rest about single instances: {about:#?}");
        assert!(seen.len() < 10, "asked at rest: {seen:#?}");
    }
}

/// Writes in this test's namespace but those of the Lease.
fn writes(test: &Test) -> Vec<AuditEvent> {
    let namespace = test.namespace();
    let mut writes = test.kube().writes();
    writes.retain(|w| w.object_ref.namespace == namespace && w.object_ref.resource != "leases");
    writes
}

fn shown(write: &AuditEvent) -> String {
    format!("{} {} by {}", write.verb, write.request_uri, write.user_agent)
}
