//! The contract of the port: what the decisions take for granted about every server, real or simulated. The same checks
//! run against Incus and LXD (`contract.rs`) and against the simulator, so that the simulator cannot be kinder than they are.
//!
//! Each check is one `async fn(&dyn World)`; the name says what is promised.

pub mod reading;
pub mod starting;
pub mod transfer;
pub mod writing;

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use berth_core::model::{Change, Definition, Fresh, Instance, InstanceRef, Product};
use berth_core::server::{
    AcceptRequest, Channel, FailureKind, OfferRequest, OperationId, OperationState, Peer, PowerAction, Result, Server,
};

/// Longer than anything here takes.
pub const LONG: Duration = Duration::from_secs(60);

/// Two servers of one product, and what the port itself cannot do: make an instance from nothing.
#[async_trait]
pub trait World: Sync {
    /// What both are.
    fn product(&self) -> Product;
    /// The server that instances are made on.
    fn source(&self) -> &dyn Server;
    /// Another one.
    fn target(&self) -> &dyn Server;
    /// `https://host:port` of the source, as the target reaches it.
    fn source_address(&self) -> String;
    /// `https://host:port` of the target, as the source reaches it.
    fn target_address(&self) -> String;
    /// A name that nobody else uses.
    fn name(&self, base: &str) -> String;
    /// Makes a container on the source.
    async fn make(&self, name: &str, new: New);
    /// Lets a little time pass.
    async fn pause(&self);
    /// Lets more than a second pass: dates travel in whole seconds.
    async fn second(&self) {
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
}

/// A container to make; its root disk is a device of its own in pool `default`.
#[derive(Clone, Copy, Default)]
pub struct New {
    /// Start it.
    pub running: bool,
    /// How many snapshots, `s0`, `s1`, …
    pub snapshots: usize,
    /// The guest ignores a graceful stop.
    pub ignores_stop: bool,
}

/// A stopped container.
pub const STOPPED: New = New {
    running: false,
    snapshots: 0,
    ignores_stop: false,
};
/// A running container.
pub const RUNNING: New = New {
    running: true,
    snapshots: 0,
    ignores_stop: false,
};

/// All checks with their names.
#[macro_export]
macro_rules! every_check {
    ($with:ident) => {
        $with! {
            reading: [
                a_server_says_what_it_is_and_has,
                an_instance_that_does_not_exist_is_nothing_and_not_an_error,
                a_name_with_odd_characters_reaches_nothing_else,
                the_inventory_shows_the_same_as_the_instance_itself,
                snapshots_come_oldest_first_and_a_taken_name_is_refused,
                an_operation_is_known_for_a_while_and_then_gone,
                a_start_is_in_the_event_stream,
            ],
            starting: [
                a_guarded_instance_starts_for_nobody_until_the_guard_is_lifted,
                a_guard_on_a_running_instance_is_refused_and_rolled_back,
                only_a_start_changes_last_used_at,
                what_runs_is_not_started_again_and_what_stands_is_not_stopped,
                a_guest_that_ignores_the_stop_still_runs_after_the_time_out,
                a_running_instance_is_neither_deleted_nor_renamed,
            ],
            writing: [
                a_stale_etag_changes_nothing,
                a_stop_and_a_start_give_back_the_old_etag,
                a_patch_merges_and_an_empty_value_unsets,
                a_put_removes_what_it_does_not_name,
                a_rename_keeps_everything_but_the_cloud_init_id,
                the_cloud_init_id_can_be_put_back_and_survives_the_start,
                a_protected_instance_is_not_deleted,
                a_deleted_instance_is_gone,
                a_snapshot_is_deleted_alone_and_may_have_an_end,
            ],
            transfer: [
                a_pulled_copy_is_what_was_sent,
                a_pushed_copy_is_what_was_sent,
                a_relayed_copy_is_what_was_sent,
                a_backup_becomes_a_copy_with_everything_that_was_on_the_instance,
                a_taken_name_refuses_the_copy,
                an_unknown_profile_refuses_the_copy,
                an_unknown_pool_is_silently_replaced,
                a_copy_that_nobody_sends_reads_stopped_and_vanishes_with_its_operation,
                an_offer_that_is_cancelled_leaves_the_source_alone,
                a_refresh_brings_data_and_snapshots_but_no_configuration,
                a_refresh_onto_a_running_instance_is_refused,
                a_running_source_is_copied_without_being_asked,
                a_copy_from_a_snapshot_has_none_and_leaves_a_running_source_alone,
                a_refresh_deletes_what_the_source_no_longer_has_and_keeps_what_both_have,
                a_refresh_leaves_out_older_snapshots_where_the_server_can,
            ],
        }
    };
}

// ---------------------------------------------------------------- steps that all checks take

/// `name` in the project `default`.
pub fn at(name: &str) -> InstanceRef {
    InstanceRef::new("default", name)
}

/// The instance, which must be there.
pub async fn fresh(server: &dyn Server, name: &str) -> Fresh {
    let found = server.instance(&at(name)).await.expect("the server answers");
    found.unwrap_or_else(|| panic!("{name} exists"))
}

/// The instance without its tag.
pub async fn instance(server: &dyn Server, name: &str) -> Instance {
    fresh(server, name).await.instance
}

/// Waits for the end of an operation. On a busy machine a cluster may be without a leader for a moment.
pub async fn wait_end(server: &dyn Server, operation: &OperationId) -> OperationState {
    let mut left = 60;
    loop {
        match server.wait(operation, LONG).await {
            Ok(state) => return state,
            Err(error) if error.is_transient() && left > 0 => left -= 1,
            Err(error) => panic!("the server answers: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Waits for the end of an operation that was begun.
pub async fn ended(server: &dyn Server, begun: Result<OperationId>) -> OperationState {
    wait_end(server, &begun.expect("the operation begins")).await
}

/// As [`ended`], and it must be a success.
pub async fn done(server: &dyn Server, begun: Result<OperationId>) {
    assert_eq!(ended(server, begun).await, OperationState::Succeeded);
}

/// Whether an act failed, be it at once or in its operation (the versions differ).
pub async fn refused(server: &dyn Server, begun: Result<OperationId>) -> String {
    match begun {
        Err(e) => e.message,
        Ok(operation) => match server.wait(&operation, LONG).await.expect("the server answers") {
            OperationState::Failed(text) => text,
            other => panic!("it was to fail, but: {other:?}"),
        },
    }
}

/// Starts it.
pub async fn start(server: &dyn Server, name: &str) {
    done(
        server,
        server
            .set_power(&at(name), PowerAction::Start { stateful: false })
            .await,
    )
    .await;
}

/// Stops it without asking.
pub async fn stop(server: &dyn Server, name: &str) {
    done(server, server.set_power(&at(name), PowerAction::ForceStop).await).await;
}

/// Merges configuration, with the tag read just before.
pub async fn set(server: &dyn Server, name: &str, pairs: &[(&str, &str)]) {
    let config = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let change = Change {
        config,
        ..Change::default()
    };
    let etag = fresh(server, name).await.etag;
    server
        .patch(&at(name), &change, &etag)
        .await
        .expect("the change is accepted");
}

/// The kind of a failure that must have happened.
pub fn kind<T>(result: Result<T>) -> FailureKind {
    match result {
        Err(e) => e.kind,
        Ok(_) => panic!("it was to fail"),
    }
}

/// The definition that a copy of `source` is to have.
pub fn copy_of(source: &Instance) -> Definition {
    let mut definition = Definition::from(source);
    definition
        .config
        .retain(|key, _| !key.starts_with("volatile.last_state") && !key.starts_with("volatile.idmap"));
    definition
}

/// A request for a copy named `name`, without where the data come from.
pub fn accept(name: &str, source: &Instance) -> AcceptRequest {
    AcceptRequest {
        at: at(name),
        kind: source.kind,
        definition: copy_of(source),
        member: None,
        live: false,
        instance_only: false,
        refresh: false,
        exclude_older: false,
        pull_from: None,
    }
}

/// Pulls from the source to the target; both operations must succeed.
pub async fn pull(world: &dyn World, from: &str, request: AcceptRequest) {
    let offer = OfferRequest {
        live: false,
        instance_only: request.instance_only,
        snapshot: None,
        push_to: None,
    };
    pull_as(world, from, offer, request).await;
}

/// As [`pull`], with another offer.
pub async fn pull_as(world: &dyn World, from: &str, offer: OfferRequest, mut request: AcceptRequest) {
    let certificate = world.source().facts().await.expect("the source answers").certificate;
    let channel = world
        .source()
        .offer(&at(from), &offer)
        .await
        .expect("the source offers");
    let waiting = channel.operation.clone();
    request.pull_from = Some(Peer {
        address: world.source_address(),
        certificate,
        channel,
    });
    let receiving = world
        .target()
        .accept(&request)
        .await
        .expect("the target accepts")
        .operation;
    done(world.target(), Ok(receiving)).await;
    done(world.source(), Ok(waiting)).await;
}

/// Opens the source for a pull and gives the target's answer to it; the offer is withdrawn.
pub async fn pull_refused(world: &dyn World, from: &str, mut request: AcceptRequest) -> FailureKind {
    let offer = OfferRequest {
        live: false,
        instance_only: request.instance_only,
        snapshot: None,
        push_to: None,
    };
    let certificate = world.source().facts().await.expect("the source answers").certificate;
    let channel = world
        .source()
        .offer(&at(from), &offer)
        .await
        .expect("the source offers");
    let waiting = channel.operation.clone();
    request.pull_from = Some(Peer {
        address: world.source_address(),
        certificate,
        channel,
    });
    let kind = match world.target().accept(&request).await {
        Err(e) => e.kind,
        Ok(Channel { operation, .. }) => match world.target().wait(&operation, LONG).await.expect("the target answers")
        {
            OperationState::Failed(_) => FailureKind::Refused,
            other => panic!("it was to fail, but: {other:?}"),
        },
    };
    world.source().cancel(&waiting).await.expect("the offer is withdrawn");
    kind
}

/// Names and dates of the snapshots, to the second: a transfer cuts the rest off.
pub async fn snapshots(server: &dyn Server, name: &str) -> BTreeMap<String, i64> {
    let list = server.snapshots(&at(name)).await.expect("the server answers");
    let second = |s: &str| s.parse::<jiff::Timestamp>().expect("a date is a time").as_second();
    list.into_iter().map(|s| (s.name, second(&s.created_at))).collect()
}
