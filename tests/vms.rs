//! Moves of real virtual machines between real servers, cold and live. The processors are emulated; everything that Incus
//! and LXD do with a guest is real, and the guest's own ticks are the judge.

use std::time::{Duration, Instant};

use berth_tests::{NewVm, Test};
use serde_json::json;

berth_tests::suite! {
    needs: [Kube, Vms],
    timeout: Duration::from_secs(300),
    side_by_side: 3,
    together: [
        a_guest_of_every_kind_of_server_ticks_and_heeds_a_stop,
    ],
    alone: [],
}

async fn a_guest_of_every_kind_of_server_ticks_and_heeds_a_stop(test: Test) {
    let lab = test.lab();
    for name in ["i1", "l1", "m1"] {
        let (server, vm) = (lab.server(name), test.unique(name));
        let since = Instant::now();
        lab.create_vm(server, &vm, &NewVm::default()).await;
        let stop = json!({"action": "stop", "timeout": 60, "force": false});
        let stopped = server.call("PUT", &format!("/1.0/instances/{vm}/state"), stop).await;
        stopped.unwrap_or_else(|error| panic!("{name}: {error}"));
        let heard = lab.heard(&vm, since);
        assert_eq!((heard.boots.len(), heard.repeated.len()), (1, 0), "{heard:?}");
        assert_eq!(server.disk_checksum(&vm, "default").await.len(), 64);
    }
}
