//! InstanceCopies on real servers, as a user sees them: a second copy is there, follows its source, and can be used.

use berth_tests::{NewInstance, Placement, SOON, Server, Test, condition, reason, wait_until};
use serde_json::json;

use standby::{ask, copy, refresh, rests, snapshots, up_to_date};

mod standby;

berth_tests::suite! {
    needs: [Kube, Lab],
    side_by_side: 3,
    together: [
        a_running_container_is_copied_and_refreshed_on_incus_dir,
        a_running_container_is_copied_and_refreshed_on_incus_btrfs,
        a_running_container_is_copied_and_refreshed_on_lxd_dir,
        a_running_container_is_copied_and_refreshed_on_lxd_btrfs,
        a_copy_follows_its_placement_to_another_server,
        a_copy_does_not_take_the_name_of_another_instance,
        a_copy_goes_with_its_object_if_that_is_asked_for_and_it_was_not_used,
        a_copy_becomes_the_instance_when_its_object_is_gone_and_a_placement_names_it,
        a_copy_made_once_stays_as_it_is_and_one_by_schedule_says_when_it_is_next,
        another_instance_of_the_same_name_is_not_copied_onto_the_copy,
        a_copy_that_its_server_cannot_refresh_is_mended_by_the_command_that_is_said_on_incus,
        a_copy_that_its_server_cannot_refresh_is_mended_by_the_command_that_is_said_on_lxd,
    ],
    alone: [
        a_second_refresh_sends_at_most_a_tenth_of_the_first,
        a_copy_is_completed_by_the_next_controller_after_one_died_in_the_middle,
        a_move_waits_for_the_refresh_that_has_begun,
        a_copy_whose_servers_are_away_is_refreshed_when_they_are_back,
    ],
    incus7: [a_running_container_is_copied_to_incus_7_and_refreshed_by_push],
}

const DATA: &str = "/root/data";
const NEWS: &str = "/root/news";

fn new(pool: &str, megabytes: usize, snapshots: usize) -> NewInstance {
    NewInstance {
        megabytes,
        snapshots,
        ..NewInstance::on_pool(pool)
    }
}

async fn text(server: &Server, name: &str, path: &str) -> String {
    let bytes = server.read_file(name, path).await.unwrap_or_default();
    String::from_utf8_lossy(&bytes).trim().to_owned()
}

/// What must hold of a copy at rest.
async fn is_copy(source: &Server, from: &str, target: &Server, name: &str) {
    rests(source, from, target, name).await;
    assert_eq!(target.checksum(name, DATA).await, source.checksum(from, DATA).await);
}

async fn copied_and_refreshed(test: Test, from: &str, to: &str, pool: &str) {
    let (source, target) = (test.lab().server(from), test.lab().server(to));
    let (db, standby) = (test.unique("db"), test.unique("standby"));
    source.create(&db, &new(pool, 2, 2)).await;
    test.add_servers(&[from, to]).await;
    let _controller = test.controller().await;
    let what = json!({"server": from, "instance": db});
    copy(
        &test,
        &standby,
        what,
        json!({"server": to}),
        json!({"refresh": {"interval": "1h"}}),
    )
    .await;
    // the target's name is the source's, unless another one is given
    let object = up_to_date(&test, &standby).await;
    is_copy(source, &db, target, &db).await;
    assert_eq!(object["status"]["target"], format!("{to}/{db}"));
    assert_eq!(object["metadata"].get("finalizers"), None, "nothing holds it at rest");
    assert_eq!(snapshots(target, &db).await.0, ["s0", "s1"]);
    assert_eq!(source.status(&db).await, "Running");
    source.write_file(&db, NEWS, "one").await;
    let gone = source
        .call("DELETE", &format!("/1.0/instances/{db}/snapshots/s0"), json!({}))
        .await;
    gone.unwrap_or_else(|error| panic!("{error}"));
    source.patch(&db, json!({"config": {"user.colour": "blue"}})).await;
    let object = refresh(&test, &standby, "one").await;
    is_copy(source, &db, target, &db).await;
    assert_eq!(text(target, &db, NEWS).await, "one");
    assert_eq!(snapshots(target, &db).await.0, ["s1"], "what the source no longer has");
    assert!(snapshots(source, &db).await.1 <= 1, "one snapshot of Berth's at most");
    let colour = target.instance(&db).await.map(|i| i["config"]["user.colour"].clone());
    assert_eq!(colour, Some(json!("blue")), "configuration follows, too");
    assert!(object["status"]["nextRefresh"].is_string() && object["status"]["lastRefresh"]["duration"].is_string());
    // somebody fails over to it
    target.set_state(&db, "start").await;
    target.wait_counting(&db).await;
    target.write_file(&db, NEWS, "mine").await;
    target.set_state(&db, "stop").await;
    ask(&test, &standby, "two").await;
    test.wait_ready("InstanceCopy", &standby, "False/CopyWasUsed", SOON)
        .await;
    assert_eq!(text(target, &db, NEWS).await, "mine", "it is not overwritten");
}

async fn a_running_container_is_copied_and_refreshed_on_incus_dir(test: Test) {
    copied_and_refreshed(test, "i1", "i2", "default").await;
}

async fn a_running_container_is_copied_and_refreshed_on_incus_btrfs(test: Test) {
    copied_and_refreshed(test, "i2", "i1", "btr").await;
}

async fn a_running_container_is_copied_and_refreshed_on_lxd_dir(test: Test) {
    copied_and_refreshed(test, "l1", "l2", "default").await;
}

async fn a_running_container_is_copied_and_refreshed_on_lxd_btrfs(test: Test) {
    copied_and_refreshed(test, "l2", "l1", "btr").await;
}

async fn a_running_container_is_copied_to_incus_7_and_refreshed_by_push(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("t1"));
    let (db, standby) = (test.unique("db"), test.unique("standby"));
    source.create(&db, &new("default", 1, 1)).await;
    test.add_servers(&["i1", "t1"]).await;
    let _controller = test.controller().await;
    let spec = json!({"refresh": {"interval": "1h"}, "transfer": "Push"});
    copy(
        &test,
        &standby,
        json!({"server": "i1", "instance": db}),
        json!({"server": "t1", "name": standby}),
        spec,
    )
    .await;
    up_to_date(&test, &standby).await;
    is_copy(source, &db, target, &standby).await;
    source.write_file(&db, NEWS, "pushed").await;
    refresh(&test, &standby, "one").await;
    is_copy(source, &db, target, &standby).await;
    assert_eq!(text(target, &standby, NEWS).await, "pushed");
    assert_eq!(snapshots(target, &standby).await.0, ["s0"]);
    assert_eq!(source.status(&db).await, "Running");
}

async fn a_copy_follows_its_placement_to_another_server(test: Test) {
    let (one, other) = (test.lab().server("i1"), test.lab().server("i2"));
    let (db, standby) = (test.unique("db"), test.unique("standby"));
    one.create(&db, &new("default", 1, 0)).await;
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&db, "i1")).await;
    test.wait_in_place(&db, "i1", SOON).await;
    let target = json!({"server": "i1", "name": standby});
    copy(
        &test,
        &standby,
        json!({"placement": db}),
        target,
        json!({"refresh": {"interval": "1h"}}),
    )
    .await;
    up_to_date(&test, &standby).await;
    is_copy(one, &db, one, &standby).await;
    test.retarget(&db, json!({"server": "i2"})).await;
    test.wait_in_place(&db, "i2", SOON).await;
    other.wait_counting(&db).await;
    other.write_file(&db, NEWS, "moved").await;
    let object = refresh(&test, &standby, "one").await;
    assert_eq!(object["status"]["source"], format!("i2/{db}"));
    assert_eq!(text(one, &standby, NEWS).await, "moved");
}

async fn a_copy_does_not_take_the_name_of_another_instance(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("i2"));
    let (db, standby) = (test.unique("db"), test.unique("standby"));
    source.create(&db, &new("default", 1, 0)).await;
    let other = NewInstance {
        start: false,
        ..NewInstance::default()
    };
    target.create(&standby, &other).await;
    let before = target.instance(&standby).await;
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    let (what, to) = (
        json!({"server": "i1", "instance": db}),
        json!({"server": "i2", "name": standby}),
    );
    copy(&test, &standby, what, to, json!({})).await;
    let object = test.wait_ready("InstanceCopy", &standby, "False/NameTaken", SOON).await;
    assert!(condition(&object, "Stalled").is_some(), "{object:#}");
    assert_eq!(target.instance(&standby).await, before, "it is left alone");
    target.delete(&standby).await.unwrap_or_else(|error| panic!("{error}"));
    up_to_date(&test, &standby).await;
    is_copy(source, &db, target, &standby).await;
}

async fn a_copy_goes_with_its_object_if_that_is_asked_for_and_it_was_not_used(test: Test) {
    let (source, target) = (test.lab().server("l1"), test.lab().server("l2"));
    let db = test.unique("db");
    source.create(&db, &new("btr", 1, 0)).await;
    test.add_servers(&["l1", "l2"]).await;
    let _controller = test.controller().await;
    let names = ["goes", "stays", "used"].map(|n| test.unique(n));
    for (name, policy) in names.iter().zip(["Delete", "Orphan", "Delete"]) {
        let (what, to) = (
            json!({"server": "l1", "instance": db}),
            json!({"server": "l2", "name": name}),
        );
        let spec = json!({"deletionPolicy": policy, "refresh": {"interval": "1h"}});
        copy(&test, name, what, to, spec).await;
    }
    for name in &names {
        up_to_date(&test, name).await;
    }
    target.set_state(&names[2], "start").await;
    for name in &names {
        test.delete("InstanceCopy", name).await;
    }
    for name in &names {
        wait_until("the object to be gone", SOON, || async {
            test.get("InstanceCopy", name).await.is_none()
        })
        .await;
    }
    let left = [target.status(&names[0]).await, target.status(&names[1]).await];
    assert_eq!(left, ["absent", "Stopped"]);
    assert_eq!(target.status(&names[2]).await, "Running", "it is somebody's by now");
}

async fn a_copy_becomes_the_instance_when_its_object_is_gone_and_a_placement_names_it(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("i2"));
    let (db, standby) = (test.unique("db"), test.unique("standby"));
    source.create(&db, &new("default", 1, 0)).await;
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    let (what, to) = (
        json!({"server": "i1", "instance": db}),
        json!({"server": "i2", "name": standby}),
    );
    copy(&test, &standby, what, to, json!({"refresh": {"interval": "1h"}})).await;
    let uuid = up_to_date(&test, &standby).await["status"]["uuid"].clone();
    // by its name alone a copy is never meant
    test.place(&Placement::new(&standby, "i2")).await;
    test.wait_ready("InstancePlacement", &standby, "False/InstanceNotFound", SOON)
        .await;
    test.delete("InstanceCopy", &standby).await;
    let named = Placement::new(&standby, "i2").with(json!({"instance": {"uuid": uuid}, "powerState": "Running"}));
    test.place(&named).await;
    test.wait_in_place(&standby, "i2", SOON).await;
    target.wait_counting(&standby).await;
    assert_eq!(source.status(&db).await, "Running", "the original is not touched");
}

async fn a_copy_made_once_stays_as_it_is_and_one_by_schedule_says_when_it_is_next(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("i2"));
    let db = test.unique("db");
    source.create(&db, &new("btr", 1, 1)).await;
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    let (once, yearly) = (test.unique("once"), test.unique("yearly"));
    let what = || json!({"server": "i1", "instance": db});
    copy(
        &test,
        &once,
        what(),
        json!({"server": "i2", "name": once}),
        json!({"snapshots": "Exclude"}),
    )
    .await;
    let schedule = json!({"refresh": {"schedule": "0 0 1 1 *"}});
    copy(
        &test,
        &yearly,
        what(),
        json!({"server": "i2", "name": yearly}),
        schedule,
    )
    .await;
    let object = up_to_date(&test, &once).await;
    assert_eq!(object["status"].get("nextRefresh"), None);
    assert_eq!(snapshots(target, &once).await, (Vec::new(), 0), "they are left out");
    let object = up_to_date(&test, &yearly).await;
    let next = object["status"]["nextRefresh"].as_str().unwrap_or_default().to_owned();
    assert!(next.contains("-01-01T00:00:00"), "{next}");
    assert_eq!(snapshots(target, &yearly).await.0, ["s0"]);
    let version = object["metadata"]["resourceVersion"].clone();
    source.set_state(&db, "stop").await;
    let again = up_to_date(&test, &yearly).await;
    assert_eq!(
        again["metadata"]["resourceVersion"], version,
        "nothing is written at rest"
    );
}

async fn another_instance_of_the_same_name_is_not_copied_onto_the_copy(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("i2"));
    let db = test.unique("db");
    source.create(&db, &new("default", 1, 0)).await;
    let sum = source.checksum(&db, DATA).await;
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    let what = json!({"server": "i1", "instance": db});
    copy(
        &test,
        &db,
        what,
        json!({"server": "i2"}),
        json!({"refresh": {"interval": "1h"}}),
    )
    .await;
    up_to_date(&test, &db).await;
    source.set_state(&db, "stop").await;
    source.delete(&db).await.unwrap_or_else(|error| panic!("{error}"));
    source.create(&db, &new("default", 1, 0)).await;
    ask(&test, &db, "one").await;
    test.wait_ready("InstanceCopy", &db, "False/SourceNotFound", SOON).await;
    assert_eq!(target.checksum(&db, DATA).await, sum, "the copy is what is left of it");
}

async fn a_second_refresh_sends_at_most_a_tenth_of_the_first(test: Test) {
    let _controller = {
        test.add_servers(&["i1", "i2", "l1", "l2"]).await;
        test.controller().await
    };
    for (from, to, pool) in [
        ("i1", "i2", "default"),
        ("i1", "i2", "btr"),
        ("l1", "l2", "default"),
        ("l1", "l2", "btr"),
    ] {
        let source = test.lab().server(from);
        let db = test.unique(&format!("db-{from}-{pool}"));
        source.create(&db, &new(pool, 24, 0)).await;
        let start = source.sent();
        let what = json!({"server": from, "instance": db});
        copy(
            &test,
            &db,
            what,
            json!({"server": to}),
            json!({"refresh": {"interval": "1h"}}),
        )
        .await;
        up_to_date(&test, &db).await;
        let first = source.sent() - start;
        // of two sizes: rsync takes files of one size and one second for the same
        for word in ["one", "three"] {
            source.write_file(&db, NEWS, word).await;
            let start = source.sent();
            refresh(&test, &db, word).await;
            let sent = source.sent() - start;
            eprintln!("{from} to {to}, {pool}: first {first} bytes, refresh {word} {sent} bytes");
            assert!(
                sent * 10 <= first,
                "{from} {pool}: refresh {word} sent {sent} bytes, the first copy {first}"
            );
            assert_eq!(text(test.lab().server(to), &db, NEWS).await, word);
        }
        source.set_state(&db, "stop").await;
    }
}

/// As a refresh leaves it that breaks off at its very end: a snapshot has a volume, but no instance snapshot.
async fn a_half_snapshot_is_mended(test: Test, from: &str, to: &str, sql: &str) {
    let (source, target) = (test.lab().server(from), test.lab().server(to));
    let (db, standby) = (test.unique("db"), test.unique("standby"));
    source.create(&db, &new("btr", 1, 0)).await;
    test.add_servers(&[from, to]).await;
    let _controller = test.controller().await;
    let (what, on) = (
        json!({"server": from, "instance": db}),
        json!({"server": to, "name": standby}),
    );
    copy(&test, &standby, what, on, json!({"refresh": {"interval": "1h"}})).await;
    up_to_date(&test, &standby).await;
    let loses = format!(
        "{sql} global \"DELETE FROM instances_snapshots WHERE instance_id = (SELECT id FROM instances WHERE name = '{standby}')\""
    );
    target.paste_on_host(&loses).await;
    source.write_file(&db, NEWS, "one").await;
    ask(&test, &standby, "one").await;
    let object = test
        .wait_ready("InstanceCopy", &standby, "False/LeftoverVolume", SOON)
        .await;
    let said = object["status"]["lastError"]["fix"].as_str().unwrap_or_default();
    let command = said.strip_prefix(&format!("on the host of {to}: ")).unwrap_or_default();
    target.paste_on_host(command).await;
    refresh(&test, &standby, "two").await;
    is_copy(source, &db, target, &standby).await;
    assert_eq!(text(target, &standby, NEWS).await, "one");
    target.set_state(&standby, "start").await;
    target.wait_counting(&standby).await;
}

async fn a_copy_that_its_server_cannot_refresh_is_mended_by_the_command_that_is_said_on_incus(test: Test) {
    a_half_snapshot_is_mended(test, "i1", "i2", "incus admin sql").await;
}

async fn a_copy_that_its_server_cannot_refresh_is_mended_by_the_command_that_is_said_on_lxd(test: Test) {
    a_half_snapshot_is_mended(test, "l1", "l2", "lxd sql").await;
}

/// Writes 12 MiB that no refresh has sent yet.
async fn much_news(server: &Server, name: &str) {
    let write = ["dd", "if=/dev/urandom", &format!("of={NEWS}"), "bs=1M", "count=12"];
    let written = server.exec(name, &write).await;
    written.unwrap_or_else(|error| panic!("{error}"));
}

/// Waits until an operation works on the copy.
async fn under_way(server: &Server) {
    wait_until("a transfer to be under way", SOON, || async {
        let running = server.get("/1.0/operations?recursion=1").await.unwrap_or_default();
        let list = running["running"].as_array().cloned().unwrap_or_default();
        list.iter()
            .any(|o| o["description"] == "Creating instance" || o["description"] == "Creating container")
    })
    .await;
}

async fn a_copy_is_completed_by_the_next_controller_after_one_died_in_the_middle(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("i2"));
    let (db, standby) = (test.unique("db"), test.unique("standby"));
    source.create(&db, &new("btr", 12, 0)).await;
    test.add_servers(&["i1", "i2"]).await;
    source.throttle("24mbit").await;
    let first = test.controller().await;
    let (what, to) = (
        json!({"server": "i1", "instance": db}),
        json!({"server": "i2", "name": standby}),
    );
    copy(&test, &standby, what, to, json!({"refresh": {"interval": "1h"}})).await;
    under_way(target).await;
    first.kill().await;
    let second = test.controller().await;
    up_to_date(&test, &standby).await;
    is_copy(source, &db, target, &standby).await;
    much_news(source, &db).await;
    ask(&test, &standby, "one").await;
    under_way(target).await;
    second.kill().await;
    source.throttle("off").await;
    let _third = test.controller().await;
    refresh(&test, &standby, "one").await;
    is_copy(source, &db, target, &standby).await;
    assert_eq!(target.checksum(&standby, NEWS).await, source.checksum(&db, NEWS).await);
}

async fn a_move_waits_for_the_refresh_that_has_begun(test: Test) {
    let (source, target) = (test.lab().server("i1"), test.lab().server("i2"));
    let (db, standby) = (test.unique("db"), test.unique("standby"));
    source.create(&db, &new("btr", 1, 0)).await;
    test.add_servers(&["i1", "i2"]).await;
    let _controller = test.controller().await;
    test.place(&Placement::new(&db, "i1")).await;
    test.wait_in_place(&db, "i1", SOON).await;
    let (what, to) = (json!({"placement": db}), json!({"server": "i2", "name": standby}));
    copy(&test, &standby, what, to, json!({"refresh": {"interval": "1h"}})).await;
    up_to_date(&test, &standby).await;
    much_news(source, &db).await;
    source.throttle("8mbit").await;
    ask(&test, &standby, "one").await;
    under_way(target).await;
    test.retarget(&db, json!({"server": "i2"})).await;
    test.wait_object("InstancePlacement", &db, "waiting for the refresh", SOON, |object| {
        let waits = condition(object, "Ready").is_some_and(|c| c["message"].to_string().contains("is refreshed"));
        reason(object).ends_with("/Pending") && waits
    })
    .await;
    source.throttle("off").await;
    test.wait_in_place(&db, "i2", SOON).await;
    let object = up_to_date(&test, &standby).await;
    assert_eq!(object["status"]["lastHandledReconcileAt"], "one");
    assert!(
        object["status"]["lastError"].is_null(),
        "the refresh was not broken off"
    );
    rests(target, &db, target, &standby).await;
}

async fn a_copy_whose_servers_are_away_is_refreshed_when_they_are_back(test: Test) {
    let (source, target) = (test.lab().server("l1"), test.lab().server("l2"));
    let (db, standby) = (test.unique("db"), test.unique("standby"));
    source.create(&db, &new("default", 1, 0)).await;
    test.add_servers(&["l1", "l2"]).await;
    let _controller = test.controller().await;
    let (what, to) = (
        json!({"server": "l1", "instance": db}),
        json!({"server": "l2", "name": standby}),
    );
    copy(&test, &standby, what, to, json!({"refresh": {"interval": "1h"}})).await;
    up_to_date(&test, &standby).await;
    for (server, word) in [(source, "one"), (target, "two")] {
        source.write_file(&db, NEWS, word).await;
        server.unplug().await;
        wait_until("the server to be missed", SOON, || async {
            let object = test.get("InstanceServer", &server.name).await.unwrap_or_default();
            reason(&object) == "False/Unreachable"
        })
        .await;
        ask(&test, &standby, word).await;
        let object = test
            .wait_ready("InstanceCopy", &standby, "Unknown/ServerUnreachable", SOON)
            .await;
        let message = condition(&object, "Ready").map(|c| c["message"].to_string());
        assert!(
            message.is_some_and(|m| m.contains("the copy is of 20")),
            "its age is said"
        );
        server.plug().await;
        refresh(&test, &standby, word).await;
        assert_eq!(text(target, &standby, NEWS).await, word);
    }
}
