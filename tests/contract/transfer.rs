//! Copies between two servers.

use std::collections::BTreeMap;
use std::time::Duration;

use berth_core::model::{Capability, Definition, Power, Product};
use berth_core::server::{
    Data, Export, FailureKind, ImportRequest, OfferRequest, OperationState, Peer, PowerAction, ServerError,
};
use futures::{FutureExt, StreamExt};

use super::{
    New, RUNNING, STOPPED, World, accept, at, done, instance, pull, pull_as, pull_refused, refused, set, snapshots,
    start, stop, wait_end,
};

const OFFER: OfferRequest = OfferRequest {
    live: false,
    instance_only: false,
    snapshot: None,
    push_to: None,
};

/// What a copy of `name` on the target must look like.
async fn assert_copy(world: &dyn World, name: &str, copy: &str) {
    let (a, b) = (
        instance(world.source(), name).await,
        instance(world.target(), copy).await,
    );
    assert_eq!(
        (b.power, b.kind, &b.architecture),
        (Power::Stopped, a.kind, &a.architecture)
    );
    assert_eq!(
        (&b.devices, &b.profiles, b.ephemeral),
        (&a.devices, &a.profiles, a.ephemeral)
    );
    assert_eq!(b.uuid(), a.uuid(), "the uuid travels");
    assert_eq!(
        b.config.get("user.berth.role").map(String::as_str),
        Some("incoming"),
        "as it was sent"
    );
    let user = |i: &berth_core::model::Instance| i.config.get("user.kept").cloned();
    assert_eq!(user(&b), user(&a));
    assert_eq!(b.root_pool(), Some("default"));
    assert!(
        b.last_used_at.starts_with("1970-") || b.last_used_at.starts_with("0001-"),
        "{}",
        b.last_used_at
    );
    assert_eq!(
        snapshots(world.target(), copy).await,
        snapshots(world.source(), name).await,
        "names and dates"
    );
}

async fn source_with_marks(world: &dyn World, base: &str, new: New) -> String {
    let name = world.name(base);
    world.make(&name, new).await;
    set(
        world.source(),
        &name,
        &[("user.kept", "yes"), ("user.berth.role", "source")],
    )
    .await;
    name
}

pub async fn a_pulled_copy_is_what_was_sent(world: &dyn World) {
    let name = source_with_marks(
        world,
        "pull",
        New {
            snapshots: 2,
            ..STOPPED
        },
    )
    .await;
    let copy = world.name("pulled");
    let mut request = accept(&copy, &instance(world.source(), &name).await);
    request
        .definition
        .config
        .insert("user.berth.role".to_owned(), "incoming".to_owned());
    pull(world, &name, request).await;
    assert_copy(world, &name, &copy).await;
    start(world.target(), &copy).await;
    assert_eq!(instance(world.target(), &copy).await.power, Power::Running);
    assert_eq!(instance(world.source(), &name).await.power, Power::Stopped);
}

pub async fn a_pushed_copy_is_what_was_sent(world: &dyn World) {
    let name = source_with_marks(
        world,
        "push",
        New {
            snapshots: 1,
            ..STOPPED
        },
    )
    .await;
    let copy = world.name("pushed");
    let mut request = accept(&copy, &instance(world.source(), &name).await);
    request
        .definition
        .config
        .insert("user.berth.role".to_owned(), "incoming".to_owned());
    let certificate = world.target().facts().await.expect("the target answers").certificate;
    let channel = world.target().accept(&request).await.expect("the target accepts");
    let waiting = channel.operation.clone();
    let push_to = Some(Peer {
        address: world.target_address(),
        certificate,
        channel,
    });
    let sending = world
        .source()
        .offer(&at(&name), &OfferRequest { push_to, ..OFFER })
        .await
        .expect("the source sends");
    assert!(sending.secrets.is_empty(), "the end that dials waits for nobody");
    done(world.source(), Ok(sending.operation)).await;
    done(world.target(), Ok(waiting)).await;
    assert_copy(world, &name, &copy).await;
}

pub async fn a_relayed_copy_is_what_was_sent(world: &dyn World) {
    let name = source_with_marks(
        world,
        "relay",
        New {
            snapshots: 2,
            ..STOPPED
        },
    )
    .await;
    let copy = world.name("relayed");
    let mut request = accept(&copy, &instance(world.source(), &name).await);
    request
        .definition
        .config
        .insert("user.berth.role".to_owned(), "incoming".to_owned());
    let (source, target) = (world.source(), world.target());
    let from = source.offer(&at(&name), &OFFER).await.expect("the source offers");
    let to = target.accept(&request).await.expect("the target accepts");
    let names: Vec<&String> = to.secrets.keys().collect();
    assert_eq!(names, ["control", "fs"]);
    let socket = |server: &'static str, end: ServerError| panic!("{server}: {end}");
    let mut ways = Vec::new();
    for channel in names {
        // LXD 5.0 dies of two that arrive at an end in the same moment
        tokio::time::sleep(Duration::from_millis(50)).await;
        let a = source
            .connect(&from, channel)
            .await
            .unwrap_or_else(|e| socket("source", e));
        let b = target
            .connect(&to, channel)
            .await
            .unwrap_or_else(|e| socket("target", e));
        ways.push(a.incoming.forward(b.outgoing).boxed());
        ways.push(b.incoming.forward(a.outgoing).boxed());
    }
    // LXD 5.0 dies of a second connection, so nobody must ever make one
    if world.product() == Product::Incus {
        let taken = source.connect(&from, "control").await.err().map(|e| e.kind);
        assert_eq!(taken, Some(FailureKind::AlreadyExists), "each secret serves once");
    }
    // how the connections end is the servers' affair
    let passed = futures::future::join_all(ways);
    let ended = async {
        done(source, Ok(from.operation.clone())).await;
        done(target, Ok(to.operation.clone())).await;
    };
    tokio::pin!(passed, ended);
    tokio::select! {
        () = &mut ended => {}
        _ = &mut passed => ended.await,
    }
    assert_copy(world, &name, &copy).await;
}

pub async fn a_backup_becomes_a_copy_with_everything_that_was_on_the_instance(world: &dyn World) {
    let name = source_with_marks(
        world,
        "backup",
        New {
            snapshots: 1,
            ..STOPPED
        },
    )
    .await;
    let (source, target, copy) = (world.source(), world.target(), world.name("restored"));
    let (day, backup) = (Duration::from_secs(86400), "only-mine");
    done(source, source.back_up(&at(&name), backup, false, day).await).await;
    let taken = source.back_up(&at(&name), backup, false, day).await;
    assert!(taken.is_err() || wait_end(source, &taken.expect("an operation")).await != OperationState::Succeeded);
    let data = source.export(&at(&name), &Export::Kept(backup.to_owned())).await;
    let request = ImportRequest {
        at: at(&copy),
        pool: Some("default".to_owned()),
        member: None,
    };
    done(target, target.import(&request, data.expect("it can be fetched")).await).await;
    let (a, b) = (instance(source, &name).await, instance(target, &copy).await);
    assert_eq!(
        (b.power, b.uuid(), b.root_pool()),
        (Power::Stopped, a.uuid(), Some("default"))
    );
    for key in ["user.kept", "user.berth.role", "volatile.cloud-init.instance-id"] {
        assert_eq!(b.config.get(key), a.config.get(key), "{key} is in the backup");
    }
    let names = |s: BTreeMap<String, i64>| s.into_keys().collect::<Vec<_>>();
    assert_eq!(
        names(snapshots(target, &copy).await),
        names(snapshots(source, &name).await)
    );
    start(target, &copy).await;
    stop(target, &copy).await;
    done(source, source.drop_backup(&at(&name), backup).await).await;
    let gone = source.drop_backup(&at(&name), backup).await.err().map(|e| e.kind);
    assert_eq!(gone, Some(FailureKind::NotFound));
    let none = source.export(&at(&name), &Export::Kept(backup.to_owned())).await;
    assert_eq!(none.err().map(|e| e.kind), Some(FailureKind::NotFound));
    let cut = Data {
        size: None,
        bytes: futures::stream::iter([
            Ok(b"not a".to_vec()),
            Err(ServerError::new(FailureKind::Unknown, "read", "cut off")),
        ])
        .boxed(),
    };
    let request = ImportRequest {
        at: at(&world.name("cut")),
        ..request
    };
    target.import(&request, cut).await.expect_err("half a backup is none");
    assert_eq!(target.instance(&request.at).await.expect("the target answers"), None);
}

pub async fn a_taken_name_refuses_the_copy(world: &dyn World) {
    let name = source_with_marks(world, "twice", STOPPED).await;
    let source = instance(world.source(), &name).await;
    pull(world, &name, accept(&name, &source)).await;
    let before = instance(world.target(), &name).await;
    let mut request = accept(&name, &source);
    request
        .definition
        .config
        .insert("user.kept".to_owned(), "no".to_owned());
    assert_eq!(pull_refused(world, &name, request).await, FailureKind::AlreadyExists);
    assert_eq!(instance(world.target(), &name).await, before);
}

pub async fn an_unknown_profile_refuses_the_copy(world: &dyn World) {
    let name = source_with_marks(world, "profile", STOPPED).await;
    let mut request = accept(&name, &instance(world.source(), &name).await);
    request.definition.profiles = vec!["no-such-profile".to_owned()];
    pull_refused(world, &name, request).await;
    assert_eq!(
        world.target().instance(&at(&name)).await.expect("the target answers"),
        None
    );
}

pub async fn an_unknown_pool_is_silently_replaced(world: &dyn World) {
    let name = source_with_marks(world, "pool", STOPPED).await;
    let mut request = accept(&name, &instance(world.source(), &name).await);
    for device in request
        .definition
        .devices
        .values_mut()
        .filter(|d| d.contains_key("pool"))
    {
        device.insert("pool".to_owned(), "no-such-pool".to_owned());
    }
    pull(world, &name, request).await;
    assert_eq!(
        instance(world.target(), &name).await.root_pool(),
        Some("default"),
        "so it must be looked at"
    );
}

pub async fn a_copy_that_nobody_sends_reads_stopped_and_vanishes_with_its_operation(world: &dyn World) {
    let name = source_with_marks(world, "half", STOPPED).await;
    let target = world.target();
    let request = accept(&name, &instance(world.source(), &name).await);
    let channel = target.accept(&request).await.expect("the target accepts");
    assert!(
        channel.secrets.contains_key("control") && channel.secrets.contains_key("fs"),
        "{:?}",
        channel.secrets.keys()
    );
    let half = instance(target, &name).await;
    assert_eq!(half.power, Power::Stopped, "nothing tells that it is not whole");
    assert_eq!(half.config.get("user.kept").map(String::as_str), Some("yes"));
    let running = target.operations().await.expect("the target answers");
    assert!(
        running
            .iter()
            .any(|o| o.id == channel.operation && o.instances.contains(&at(&name))),
        "{running:?}"
    );
    refused(
        target,
        target
            .set_power(&at(&name), PowerAction::Start { stateful: false })
            .await,
    )
    .await;
    assert!(matches!(
        wait_end(target, &channel.operation).await,
        OperationState::Failed(_)
    ));
    assert_eq!(target.instance(&at(&name)).await.expect("the target answers"), None);
}

pub async fn an_offer_that_is_cancelled_leaves_the_source_alone(world: &dyn World) {
    let name = source_with_marks(world, "offer", STOPPED).await;
    let source = world.source();
    let before = instance(source, &name).await;
    let channel = source.offer(&at(&name), &OFFER).await.expect("the source offers");
    assert!(
        channel.secrets.contains_key("control") && channel.secrets.contains_key("fs"),
        "{:?}",
        channel.secrets.keys()
    );
    assert!(!channel.secrets.contains_key("criu"), "it does not run");
    let running = source.operations().await.expect("the source answers");
    assert!(
        running
            .iter()
            .any(|o| o.id == channel.operation && o.instances.contains(&at(&name))),
        "{running:?}"
    );
    source
        .cancel(&channel.operation)
        .await
        .expect("an offer can be withdrawn");
    assert_ne!(wait_end(source, &channel.operation).await, OperationState::Succeeded);
    assert_eq!(instance(source, &name).await, before);
    start(source, &name).await;
}

pub async fn a_refresh_brings_data_and_snapshots_but_no_configuration(world: &dyn World) {
    let name = source_with_marks(
        world,
        "fresh",
        New {
            snapshots: 1,
            ..STOPPED
        },
    )
    .await;
    let (source, target) = (world.source(), world.target());
    pull(world, &name, accept(&name, &instance(source, &name).await)).await;
    done(target, target.snapshot(&at(&name), "only-here", None).await).await;
    done(source, source.snapshot(&at(&name), "later", None).await).await;
    let before = instance(target, &name).await;
    let mut request = accept(&name, &instance(source, &name).await);
    request.refresh = true;
    request
        .definition
        .config
        .insert("user.kept".to_owned(), "no".to_owned());
    pull(world, &name, request).await;
    let after = instance(target, &name).await;
    assert_eq!(
        Definition::from(&after),
        Definition::from(&before),
        "configuration and devices of the body are ignored"
    );
    assert_eq!(
        snapshots(target, &name).await,
        snapshots(source, &name).await,
        "and the target's own snapshots are gone"
    );
}

pub async fn a_refresh_onto_a_running_instance_is_refused(world: &dyn World) {
    let name = source_with_marks(world, "onto", STOPPED).await;
    pull(world, &name, accept(&name, &instance(world.source(), &name).await)).await;
    start(world.target(), &name).await;
    let mut request = accept(&name, &instance(world.source(), &name).await);
    request.refresh = true;
    pull_refused(world, &name, request).await;
    assert_eq!(instance(world.target(), &name).await.power, Power::Running);
    stop(world.target(), &name).await;
}

pub async fn a_running_source_is_copied_without_being_asked(world: &dyn World) {
    let name = source_with_marks(world, "warm", RUNNING).await;
    pull(world, &name, accept(&name, &instance(world.source(), &name).await)).await;
    assert_eq!(instance(world.source(), &name).await.power, Power::Running);
    assert_eq!(instance(world.target(), &name).await.power, Power::Stopped);
}

pub async fn a_copy_from_a_snapshot_has_none_and_leaves_a_running_source_alone(world: &dyn World) {
    let new = New {
        snapshots: 1,
        ..RUNNING
    };
    let name = source_with_marks(world, "still", new).await;
    let before = instance(world.source(), &name).await;
    let offer = OfferRequest {
        snapshot: Some("s0".to_owned()),
        ..OFFER
    };
    pull_as(world, &name, offer, accept(&name, &before)).await;
    let after = instance(world.source(), &name).await;
    assert_eq!(
        (after.power, &after.last_used_at),
        (Power::Running, &before.last_used_at)
    );
    let copy = instance(world.target(), &name).await;
    assert_eq!(copy.power, Power::Stopped);
    assert_eq!(copy.config.get("user.kept").map(String::as_str), Some("yes"));
    assert!(
        snapshots(world.target(), &name).await.is_empty(),
        "only the disk as it was then"
    );
    let offer = OfferRequest {
        snapshot: Some("no-such-snapshot".to_owned()),
        ..OFFER
    };
    let refused = world.source().offer(&at(&name), &offer).await;
    assert!(refused.is_err(), "{refused:?}");
}

pub async fn a_refresh_deletes_what_the_source_no_longer_has_and_keeps_what_both_have(world: &dyn World) {
    let new = New {
        snapshots: 2,
        ..STOPPED
    };
    let name = source_with_marks(world, "steps", new).await;
    let (source, target) = (world.source(), world.target());
    pull(world, &name, accept(&name, &instance(source, &name).await)).await;
    let copied = snapshots(target, &name).await;
    done(source, source.remove_snapshot(&at(&name), "s1").await).await;
    done(source, source.snapshot(&at(&name), "s2", None).await).await;
    let mut request = accept(&name, &instance(source, &name).await);
    request.refresh = true;
    pull(world, &name, request).await;
    let refreshed = snapshots(target, &name).await;
    assert_eq!(refreshed, snapshots(source, &name).await);
    assert_eq!(
        (refreshed.get("s0"), refreshed.get("s1")),
        (copied.get("s0"), None),
        "{refreshed:?}"
    );
}

pub async fn a_refresh_leaves_out_older_snapshots_where_the_server_can(world: &dyn World) {
    let name = source_with_marks(world, "older", STOPPED).await;
    let (source, target) = (world.source(), world.target());
    done(source, source.snapshot(&at(&name), "old", None).await).await;
    world.second().await;
    done(source, source.snapshot(&at(&name), "common", None).await).await;
    pull(world, &name, accept(&name, &instance(source, &name).await)).await;
    done(target, target.remove_snapshot(&at(&name), "old").await).await;
    world.second().await;
    done(source, source.snapshot(&at(&name), "new", None).await).await;
    let mut request = accept(&name, &instance(source, &name).await);
    (request.refresh, request.exclude_older) = (true, true);
    pull(world, &name, request).await;
    let names: Vec<String> = snapshots(target, &name).await.into_keys().collect();
    let can = target
        .facts()
        .await
        .expect("the target answers")
        .can(Capability::ExcludeOlder);
    match can {
        true => assert_eq!(names, ["common", "new"]),
        false => assert_eq!(names, ["common", "new", "old"]),
    }
}
