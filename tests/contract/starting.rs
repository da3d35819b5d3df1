//! Power, and the guard that keeps a copy from running.

use std::time::Duration;

use berth_core::marks::{GUARD, guard_device};
use berth_core::model::{Change, Definition, Instance, InstanceKind, Power};
use berth_core::server::{OperationState, PowerAction, Server};

use super::{New, RUNNING, STOPPED, World, at, ended, fresh, instance, kind, refused, start, stop};

const START: PowerAction = PowerAction::Start { stateful: false };
const GRACEFUL: PowerAction = PowerAction::Stop {
    timeout: Duration::from_secs(30),
};

fn guard() -> Change {
    let device = guard_device(InstanceKind::Container, "contract");
    Change {
        devices: [(GUARD.to_owned(), device)].into(),
        ..Change::default()
    }
}

async fn set_guard(server: &dyn Server, name: &str) {
    let etag = fresh(server, name).await.etag;
    server
        .patch(&at(name), &guard(), &etag)
        .await
        .expect("a stopped instance takes the guard");
}

pub async fn a_guarded_instance_starts_for_nobody_until_the_guard_is_lifted(world: &dyn World) {
    let name = world.name("guard");
    world.make(&name, STOPPED).await;
    let server = world.source();
    let before = instance(server, &name).await;
    set_guard(server, &name).await;
    let why = refused(server, server.set_power(&at(&name), START).await).await;
    assert!(why.contains(GUARD), "the reason names the guard: {why}");
    let guarded = fresh(server, &name).await;
    assert_eq!(guarded.instance.power, Power::Stopped);
    assert_eq!(
        guarded.instance.last_used_at, before.last_used_at,
        "a refused start is no start"
    );
    let mut definition = Definition::from(&guarded.instance);
    definition.devices.remove(GUARD);
    server
        .put(&at(&name), &definition, &guarded.etag)
        .await
        .expect("a conditional PUT lifts it");
    let lifted = instance(server, &name).await;
    assert!(!lifted.devices.contains_key(GUARD) && !lifted.expanded_devices.contains_key(GUARD));
    // the first start that is tried settles the id map, whether it succeeds or not
    let settled = |i: &Instance| {
        let by_start = |key: &str| key.starts_with("volatile.idmap") || key == "volatile.last_state.idmap";
        i.config
            .clone()
            .into_iter()
            .filter(|(key, _)| !by_start(key))
            .collect::<Vec<_>>()
    };
    assert_eq!(settled(&lifted), settled(&before), "nothing is left of it");
    start(server, &name).await;
    assert_eq!(instance(server, &name).await.power, Power::Running);
}

pub async fn a_guard_on_a_running_instance_is_refused_and_rolled_back(world: &dyn World) {
    let name = world.name("hot");
    world.make(&name, RUNNING).await;
    let server = world.source();
    let before = fresh(server, &name).await;
    kind(server.patch(&at(&name), &guard(), &before.etag).await);
    let after = instance(server, &name).await;
    assert_eq!(after.power, Power::Running);
    assert!(!after.devices.contains_key(GUARD));
}

pub async fn only_a_start_changes_last_used_at(world: &dyn World) {
    let name = world.name("used");
    world.make(&name, STOPPED).await;
    let server = world.source();
    let used = async || instance(server, &name).await.last_used_at;
    let never = used().await;
    start(server, &name).await;
    let first = used().await;
    assert_ne!(first, never);
    super::done(server, server.snapshot(&at(&name), "s0", None).await).await;
    assert_eq!(used().await, first, "a snapshot is no start");
    stop(server, &name).await;
    assert_eq!(used().await, first, "a stop is no start");
    set_guard(server, &name).await;
    refused(server, server.set_power(&at(&name), START).await).await;
    assert_eq!(used().await, first, "a refused start is no start");
    let guarded = fresh(server, &name).await;
    let mut definition = Definition::from(&guarded.instance);
    definition.devices.remove(GUARD);
    server
        .put(&at(&name), &definition, &guarded.etag)
        .await
        .expect("the guard is lifted");
    start(server, &name).await;
    assert_ne!(used().await, first);
}

pub async fn what_runs_is_not_started_again_and_what_stands_is_not_stopped(world: &dyn World) {
    let name = world.name("state");
    world.make(&name, STOPPED).await;
    let server = world.source();
    refused(server, server.set_power(&at(&name), GRACEFUL).await).await;
    start(server, &name).await;
    refused(server, server.set_power(&at(&name), START).await).await;
    assert_eq!(
        ended(server, server.set_power(&at(&name), GRACEFUL).await).await,
        OperationState::Succeeded
    );
    assert_eq!(instance(server, &name).await.power, Power::Stopped);
}

pub async fn a_guest_that_ignores_the_stop_still_runs_after_the_time_out(world: &dyn World) {
    let name = world.name("stubborn");
    world
        .make(
            &name,
            New {
                ignores_stop: true,
                ..RUNNING
            },
        )
        .await;
    let server = world.source();
    let short = PowerAction::Stop {
        timeout: Duration::from_secs(2),
    };
    refused(server, server.set_power(&at(&name), short).await).await;
    assert!(instance(server, &name).await.may_run());
    stop(server, &name).await;
    assert_eq!(instance(server, &name).await.power, Power::Stopped);
}

pub async fn a_running_instance_is_neither_deleted_nor_renamed(world: &dyn World) {
    let name = world.name("busy");
    world.make(&name, RUNNING).await;
    let server = world.source();
    refused(server, server.remove(&at(&name)).await).await;
    refused(server, server.rename(&at(&name), &world.name("other")).await).await;
    assert_eq!(instance(server, &name).await.power, Power::Running);
}
