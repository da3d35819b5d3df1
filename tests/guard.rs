//! Between the stop and the commit nobody can start either copy, whoever asks and at whatever step: the servers refuse.

use std::time::Duration;

use berth_tests::{NewInstance, Placement, Product, SOON, Server, Test, wait_for};
use serde_json::{Value, json};

use road::{Call, Road, Watch, intact, known, subject, with_data};

mod road;

berth_tests::suite! {
    needs: [Kube, Lab],
    together: [
        nobody_starts_either_copy_at_any_step_on_incus_with_dir,
        nobody_starts_either_copy_at_any_step_on_incus_with_btrfs,
        nobody_starts_either_copy_at_any_step_on_lxd_with_dir,
        nobody_starts_either_copy_at_any_step_on_lxd_with_btrfs,
        a_person_who_starts_the_new_owner_first_does_no_harm,
        in_a_restricted_project_the_name_is_not_found_on_incus,
        in_a_restricted_project_the_name_is_not_found_on_lxd,
    ],
    alone: [
        nobody_starts_either_copy_while_data_flow_on_incus,
        nobody_starts_either_copy_while_data_flow_on_lxd,
        a_source_whose_host_reboots_in_mid_move_stays_down_on_incus,
        a_source_whose_host_reboots_in_mid_move_stays_down_on_lxd,
    ],
}

/// What the move does next, from the first instant at which both copies are guarded until the source is gone.
const GUARDED: [Call; 7] = [
    Call::Offer,
    Call::Create,
    Call::Name,
    Call::Own,
    Call::Start,
    Call::Rename,
    Call::Delete,
];

/// From here on the target's copy is the instance, and may be started.
fn target_is_owner(next: Call) -> bool {
    next > Call::Own
}

async fn nobody_starts_either_copy_at_any_step_on_incus_with_dir(test: Test) {
    nobody_starts_either_copy(test, "i1", "i2", "default").await;
}

async fn nobody_starts_either_copy_at_any_step_on_incus_with_btrfs(test: Test) {
    nobody_starts_either_copy(test, "i2", "i1", "btr").await;
}

async fn nobody_starts_either_copy_at_any_step_on_lxd_with_dir(test: Test) {
    nobody_starts_either_copy(test, "l1", "l2", "default").await;
}

async fn nobody_starts_either_copy_at_any_step_on_lxd_with_btrfs(test: Test) {
    nobody_starts_either_copy(test, "l2", "l1", "btr").await;
}

/// There and back, each time held at another step; somebody tries every copy that exists.
async fn nobody_starts_either_copy(test: Test, one: &str, other: &str, pool: &str) {
    let road = Road::between(&test, one, other).await;
    let web = subject(&test, one, "web", &with_data(pool)).await;
    let watch = Watch::begin(&road, std::slice::from_ref(&web));
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, one, SOON).await;
    let (mut from, mut to) = (one, other);
    for (number, next) in GUARDED.into_iter().enumerate() {
        road.catch(&[(next, &web.name)]);
        test.retarget(&web.name, json!({"server": to})).await;
        road.caught().await;
        let copies = road.copies(&web.uuid).await;
        let expected = if next < Call::Name { 1 } else { 2 };
        assert_eq!(copies.len(), expected, "copies before {}: {copies:?}", next.words());
        for (server, name, _) in copies {
            if server.name == from || !target_is_owner(next) {
                refused(server, &name, next.words()).await;
            }
        }
        road.release().await;
        intact(&test, &web, to, number + 2..=number + 2).await;
        std::mem::swap(&mut from, &mut to);
    }
    watch.end();
}

/// By the API and by the command line; the refusal says why.
async fn refused(server: &Server, name: &str, before: &str) {
    let error = match server.try_state(name, "start").await {
        Ok(_) => panic!("before {before}: {name} was started on {}", server.name),
        Err(error) => error.message,
    };
    assert!(
        error.contains("berth-guard"),
        "before {before}: {name} on {}: {error}",
        server.name
    );
}

/// The same by the command line.
async fn refused_to_the_command_line(test: &Test, server: &Server, name: &str) {
    let instance = format!("{}:{name}", server.name);
    let done = match server.product {
        Product::Incus => test.lab().incus(&["start", &instance]).await,
        Product::Lxd => test.lab().lxc(&["start", &instance]).await,
    };
    let error = done.expect_err("the server refuses");
    assert!(error.contains("berth-guard"), "{error}");
}

async fn a_person_who_starts_the_new_owner_first_does_no_harm(test: Test) {
    let road = Road::between(&test, "i1", "i2").await;
    let web = subject(&test, "i1", "web", &with_data("default")).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, "i1", SOON).await;
    road.catch(&[(Call::Start, &web.name)]);
    test.retarget(&web.name, json!({"server": "i2"})).await;
    road.caught().await;
    refused(test.lab().server("i1"), &web.name, "the start").await;
    test.lab().server("i2").set_state(&web.name, "start").await;
    road.release().await;
    intact(&test, &web, "i2", 2..=2).await;
}

//---------------------------------------------------------------- while data flow

async fn nobody_starts_either_copy_while_data_flow_on_incus(test: Test) {
    while_data_flow(test, "i1", "i2").await;
}

async fn nobody_starts_either_copy_while_data_flow_on_lxd(test: Test) {
    while_data_flow(test, "l1", "l2").await;
}

async fn while_data_flow(test: Test, from: &str, to: &str) {
    let (source, target) = (test.lab().server(from), test.lab().server(to));
    let road = Road::between(&test, from, to).await;
    let new = NewInstance {
        megabytes: 12,
        ..with_data("default")
    };
    let web = subject(&test, from, "web", &new).await;
    let watch = Watch::begin(&road, std::slice::from_ref(&web));
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, from, SOON).await;
    source.throttle("24mbit").await;
    test.retarget(&web.name, json!({"server": to})).await;
    let incoming = wait_for("the copy to be on its way", SOON, || async {
        let copies = road.copies(&web.uuid).await;
        let incoming = copies.into_iter().find(|(server, ..)| server.name == to);
        incoming
            .map(|(_, name, _)| name)
            .ok_or_else(|| "no copy yet".to_owned())
    })
    .await;
    // whatever the server notices first: that the instance is busy, that it has no data yet, or the guard
    for (server, name) in [(source, &web.name), (target, &incoming)] {
        let refused = server.try_state(name, "start").await;
        assert!(refused.is_err(), "{name} was started on {}", server.name);
    }
    source.throttle("off").await;
    // a start that is refused while the transfer begins makes the daemon break the transfer off: then it is made again
    intact(&test, &web, to, 2..=3).await;
    watch.end();
}

//---------------------------------------------------------------- restricted projects

async fn in_a_restricted_project_the_name_is_not_found_on_incus(test: Test) {
    in_a_restricted_project(test, "i1", "i2").await;
}

async fn in_a_restricted_project_the_name_is_not_found_on_lxd(test: Test) {
    in_a_restricted_project(test, "l1", "l2").await;
}

/// Restricted projects take no guard device. So the source is away from its name as long as it may not run, while the
/// target, in an ordinary project, is guarded as ever.
async fn in_a_restricted_project(test: Test, from: &str, to: &str) {
    let road = Road::between(&test, from, to).await;
    let (source, target) = (test.lab().server(from), test.lab().server(to));
    let project = test.unique("project");
    let body = json!({"name": project, "config": {"restricted": "true", "features.images": "false"}});
    done(source.call("POST", "/1.0/projects", body).await);
    let new = NewInstance {
        project: project.clone(),
        ..NewInstance::default()
    };
    let calls = [Call::Create, Call::Own];
    let names = ["a", "b"].map(|name| test.unique(name));
    let _controller = test.controller().await;
    for name in &names {
        source.create(name, &new).await;
        let spec = json!({"instance": {"project": project}, "target": {"project": project}, "methods": ["Cold"]});
        test.place(&Placement::new(name, from).with(spec)).await;
        test.wait_in_place(name, from, SOON).await;
    }
    road.catch(&[(calls[0], &names[0]), (calls[1], &names[1])]);
    for name in &names {
        test.retarget(name, json!({"server": to, "project": "default"})).await;
    }
    road.caught().await;
    for (next, name) in calls.into_iter().zip(&names) {
        let path = format!("/1.0/instances/{name}/state?project={project}");
        let start = source.call("PUT", &path, json!({"action": "start"})).await;
        let error = start.expect_err("there is nothing of that name");
        assert_eq!(error.code, 404, "before {}: {error}", next.words());
    }
    refused(target, &names[1], calls[1].words()).await;
    road.release().await;
    for name in &names {
        test.wait_in_place(name, to, SOON).await;
        target.wait_counting(name).await;
        let instance = target.instance(name).await.unwrap_or_else(|| panic!("{name} arrived"));
        let config = &instance["config"];
        assert!(!config.to_string().contains("berth"), "marks are left: {config}");
        assert_eq!(config.get("boot.autostart"), None);
    }
    assert_eq!(names_in(source, &project).await, Vec::<Value>::new(), "nothing is left");
    done(
        source
            .call("DELETE", &format!("/1.0/projects/{project}"), Value::Null)
            .await,
    );
}

fn done(answer: Result<Value, berth_tests::ApiError>) {
    answer.unwrap_or_else(|error| panic!("{error}"));
}

async fn names_in(server: &Server, project: &str) -> Vec<Value> {
    let list = server
        .get(&format!("/1.0/instances?recursion=1&project={project}"))
        .await;
    let list = list.unwrap_or_else(|error| panic!("{error}"));
    list.as_array()
        .into_iter()
        .flatten()
        .map(|i| i["name"].clone())
        .collect()
}

//---------------------------------------------------------------- reboot

async fn a_source_whose_host_reboots_in_mid_move_stays_down_on_incus(test: Test) {
    reboot(test, "i1", "i2").await;
}

async fn a_source_whose_host_reboots_in_mid_move_stays_down_on_lxd(test: Test) {
    reboot(test, "l1", "l2").await;
}

/// Both are to be started whenever their host boots; only the one that does not move is.
async fn reboot(test: Test, from: &str, to: &str) {
    let (source, target) = (test.lab().server(from), test.lab().server(to));
    let road = Road::between(&test, from, to).await;
    let new = NewInstance {
        config: vec![("boot.autostart".to_owned(), "true".to_owned())],
        ..with_data("default")
    };
    let web = subject(&test, from, "web", &new).await;
    let other = test.unique("other");
    source.create(&other, &new).await;
    let other = known(source, &other).await;
    let _controller = test.controller().await;
    test.wait_in_place(&web.name, from, SOON).await;
    road.catch(&[(Call::Name, &web.name)]);
    test.retarget(&web.name, json!({"server": to})).await;
    road.caught().await;
    refused_to_the_command_line(&test, source, &web.name).await;
    source.kill_host().await;
    source.start_host().await;
    source.wait_counting(&other.name).await;
    assert_eq!(
        source.status(&web.name).await,
        "Stopped",
        "the guarded source was not started with its host"
    );
    refused_to_the_command_line(&test, source, &web.name).await;
    road.release().await;
    test.wait_in_place(&web.name, to, Duration::from_secs(120)).await;
    target.wait_counting(&web.name).await;
    let instance = target.instance(&web.name).await.unwrap_or_else(|| panic!("it arrived"));
    assert_eq!(instance["config"]["boot.autostart"], "true");
    target.patch(&web.name, json!({"config": {"boot.autostart": ""}})).await;
    intact(&test, &web, to, 2..=4).await;
}
