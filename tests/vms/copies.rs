//! InstanceCopies of virtual machines: a second one elsewhere that is never started and follows its source.

use std::time::Instant;

use berth_tests::{NewVm, Server, Test};
use serde_json::{Value, json};

use super::standby::{copy, refresh, rests, snapshots, up_to_date};

/// What must hold of a copy at rest.
async fn is_copy((source, from): (&Server, &str), (target, name): (&Server, &str), pool: &str) {
    rests(source, from, target, name).await;
    let found = target.instance(name).await.unwrap_or_default();
    assert_eq!(found["type"], "virtual-machine");
    assert_eq!(found["devices"]["root"]["size.state"], "256MiB");
    assert!(
        found["last_used_at"].as_str().is_some_and(|at| at < "2000"),
        "it was never started: {}",
        found["last_used_at"]
    );
    assert_eq!(
        target.disk_checksum(name, pool).await,
        source.disk_checksum(from, pool).await
    );
}

/// A guest with a snapshot is copied, changed and copied again.
async fn follows(test: &Test, (from, to): (&str, &str), new: NewVm, spec: Value) -> String {
    let (lab, pool) = (test.lab(), new.pool.clone());
    let (source, target) = (lab.server(from), lab.server(to));
    let (db, standby) = (test.unique("db"), test.unique("standby"));
    lab.create_vm(source, &db, &new).await;
    test.add_servers(&[from, to]).await;
    test.controller().await;
    copy(
        test,
        &standby,
        json!({"server": from, "instance": db}),
        json!({"server": to, "name": standby, "pool": pool}),
        spec,
    )
    .await;
    up_to_date(test, &standby).await;
    is_copy((source, &db), (target, &standby), &pool).await;
    assert_eq!(snapshots(target, &standby).await.0, ["s0"]);
    source.fill_disk(&db, &pool).await;
    let snapshot = json!({"name": "s1"});
    let taken = source
        .call("POST", &format!("/1.0/instances/{db}/snapshots"), snapshot)
        .await;
    taken.unwrap_or_else(|error| panic!("{error}"));
    refresh(test, &standby, "one").await;
    is_copy((source, &db), (target, &standby), &pool).await;
    assert_eq!(snapshots(target, &standby).await.0, ["s0", "s1"]);
    db
}

pub async fn a_guest_that_stands_is_copied_and_refreshed_with_its_disk(test: Test) {
    let new = NewVm {
        start: false,
        snapshots: 1,
        ..NewVm::default()
    };
    let db = follows(&test, ("i1", "i2"), new, json!({"refresh": {"interval": "1h"}})).await;
    assert_eq!(test.lab().server("i1").status(&db).await, "Stopped");
}

pub async fn a_guest_that_runs_is_copied_and_refreshed_by_push_and_runs_on(test: Test) {
    let new = NewVm {
        pool: "btr".to_owned(),
        snapshots: 1,
        ..NewVm::default()
    };
    let spec = json!({"refresh": {"interval": "1h"}, "transfer": "Push"});
    let since = Instant::now();
    let db = follows(&test, ("i2", "i1"), new, spec).await;
    test.lab().wait_ticking(&db).await;
    assert_eq!(test.lab().server("i2").status(&db).await, "Running");
    let heard = test.lab().heard(&db, since);
    assert_eq!(heard.boots.len(), 1, "{heard:?}");
}
