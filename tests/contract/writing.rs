//! Conditional changes, names, deletion.

use berth_core::model::{Change, Definition};
use berth_core::server::{FailureKind, Server};

use super::{New, STOPPED, World, at, done, fresh, instance, kind, refused, set, snapshots, start, stop};

const CLOUD_INIT: &str = "volatile.cloud-init.instance-id";

fn config(key: &str, value: &str) -> Change {
    Change {
        config: [(key.to_owned(), value.to_owned())].into(),
        ..Change::default()
    }
}

async fn key(server: &dyn Server, name: &str, key: &str) -> Option<String> {
    instance(server, name).await.config.get(key).cloned()
}

pub async fn a_stale_etag_changes_nothing(world: &dyn World) {
    let name = world.name("etag");
    world.make(&name, STOPPED).await;
    let server = world.source();
    let old = fresh(server, &name).await;
    set(server, &name, &[("user.one", "1")]).await;
    let current = fresh(server, &name).await;
    assert_ne!(old.etag, current.etag);
    assert_eq!(
        kind(server.patch(&at(&name), &config("user.two", "2"), &old.etag).await),
        FailureKind::Changed
    );
    let definition = Definition::from(&old.instance);
    assert_eq!(
        kind(server.put(&at(&name), &definition, &old.etag).await),
        FailureKind::Changed
    );
    assert_eq!(fresh(server, &name).await, current);
}

pub async fn a_stop_and_a_start_give_back_the_old_etag(world: &dyn World) {
    let name = world.name("power");
    world.make(&name, STOPPED).await;
    let server = world.source();
    start(server, &name).await;
    stop(server, &name).await;
    let before = fresh(server, &name).await;
    start(server, &name).await;
    assert_ne!(fresh(server, &name).await.etag, before.etag, "a start changes it");
    stop(server, &name).await;
    let after = fresh(server, &name).await;
    assert_eq!(after.etag, before.etag, "it proves nothing about power");
    assert_ne!(after.instance.last_used_at, before.instance.last_used_at, "this does");
}

pub async fn a_patch_merges_and_an_empty_value_unsets(world: &dyn World) {
    let name = world.name("merge");
    world.make(&name, STOPPED).await;
    let server = world.source();
    set(server, &name, &[("user.one", "1"), ("user.two", "2")]).await;
    set(server, &name, &[("user.one", ""), ("user.three", "3")]).await;
    let i = instance(server, &name).await;
    let value = |key: &str| i.config.get(key).map(String::as_str).filter(|v| !v.is_empty());
    assert_eq!(
        (value("user.one"), value("user.two"), value("user.three")),
        (None, Some("2"), Some("3"))
    );
    let etag = fresh(server, &name).await.etag;
    let change = Change {
        ephemeral: Some(true),
        ..Change::default()
    };
    server
        .patch(&at(&name), &change, &etag)
        .await
        .expect("the change is accepted");
    let after = instance(server, &name).await;
    assert!(after.ephemeral);
    assert_eq!(
        (after.config, after.devices, after.profiles),
        (i.config, i.devices, i.profiles)
    );
}

pub async fn a_put_removes_what_it_does_not_name(world: &dyn World) {
    let name = world.name("put");
    world.make(&name, STOPPED).await;
    let server = world.source();
    set(server, &name, &[("user.one", "1"), ("user.two", "2")]).await;
    let before = fresh(server, &name).await;
    let mut definition = Definition::from(&before.instance);
    definition.config.remove("user.one");
    definition.description = "put".to_owned();
    server
        .put(&at(&name), &definition, &before.etag)
        .await
        .expect("the definition is accepted");
    let after = instance(server, &name).await;
    assert_eq!(Definition::from(&after), definition);
}

pub async fn a_rename_keeps_everything_but_the_cloud_init_id(world: &dyn World) {
    let (name, other) = (world.name("old"), world.name("new"));
    world
        .make(
            &name,
            New {
                snapshots: 1,
                ..STOPPED
            },
        )
        .await;
    world.make(&world.name("taken"), STOPPED).await;
    let server = world.source();
    set(server, &name, &[("user.berth.move", "m1")]).await;
    let (before, kept) = (instance(server, &name).await, snapshots(server, &name).await);
    let onto_taken = server.rename(&at(&name), &world.name("taken")).await;
    assert_eq!(kind(onto_taken), FailureKind::AlreadyExists);
    done(server, server.rename(&at(&name), &other).await).await;
    assert_eq!(server.instance(&at(&name)).await.expect("the server answers"), None);
    let mut after = instance(server, &other).await;
    assert_eq!(snapshots(server, &other).await, kept);
    assert_eq!(after.last_used_at, before.last_used_at);
    let (old_id, new_id) = (before.config.get(CLOUD_INIT), after.config.remove(CLOUD_INIT));
    assert_ne!(old_id, new_id.as_ref(), "cloud-init would run again");
    let mut expected = before.config.clone();
    expected.remove(CLOUD_INIT);
    // a host name in the guest is a template's business: the servers note that it is due
    for config in [&mut expected, &mut after.config] {
        config.remove("volatile.apply_template");
    }
    assert_eq!(after.config, expected);
}

pub async fn the_cloud_init_id_can_be_put_back_and_survives_the_start(world: &dyn World) {
    let (name, other) = (world.name("cloud"), world.name("cloudy"));
    world.make(&name, STOPPED).await;
    let server = world.source();
    let id = key(server, &name, CLOUD_INIT).await.expect("there is one");
    done(server, server.rename(&at(&name), &other).await).await;
    set(server, &other, &[(CLOUD_INIT, &id)]).await;
    assert_eq!(key(server, &other, CLOUD_INIT).await.as_ref(), Some(&id));
    start(server, &other).await;
    assert_eq!(key(server, &other, CLOUD_INIT).await.as_ref(), Some(&id));
}

pub async fn a_protected_instance_is_not_deleted(world: &dyn World) {
    let name = world.name("kept");
    world.make(&name, STOPPED).await;
    let server = world.source();
    set(server, &name, &[("security.protection.delete", "true")]).await;
    refused(server, server.remove(&at(&name)).await).await;
    set(server, &name, &[("security.protection.delete", "")]).await;
    done(server, server.remove(&at(&name)).await).await;
}

pub async fn a_deleted_instance_is_gone(world: &dyn World) {
    let name = world.name("end");
    world
        .make(
            &name,
            New {
                snapshots: 1,
                ..STOPPED
            },
        )
        .await;
    let server = world.source();
    done(server, server.remove(&at(&name)).await).await;
    assert_eq!(server.instance(&at(&name)).await.expect("the server answers"), None);
    let list = server.inventory().await.expect("the server answers");
    assert!(list.iter().all(|i| i.at != at(&name)));
    assert_eq!(kind(server.remove(&at(&name)).await), FailureKind::NotFound);
}

pub async fn a_snapshot_is_deleted_alone_and_may_have_an_end(world: &dyn World) {
    let name = world.name("snaps");
    world
        .make(
            &name,
            New {
                snapshots: 1,
                ..STOPPED
            },
        )
        .await;
    let server = world.source();
    let before = instance(server, &name).await;
    let end = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(24);
    done(server, server.snapshot(&at(&name), "berth-x", Some(end)).await).await;
    assert_eq!(snapshots(server, &name).await.len(), 2);
    done(server, server.remove_snapshot(&at(&name), "berth-x").await).await;
    let left: Vec<String> = snapshots(server, &name).await.into_keys().collect();
    assert_eq!(left, ["s0"]);
    assert_eq!(
        kind(server.remove_snapshot(&at(&name), "berth-x").await),
        FailureKind::NotFound
    );
    assert_eq!(instance(server, &name).await, before);
}
