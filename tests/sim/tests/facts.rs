//! The simulator against what the real servers were seen to do (Incus 6.0.4, Incus 7.0.2, LXD 5.0.2).

use std::time::Duration;

use berth_core::marks;
use berth_core::model::{Change, Definition, InstanceKind, InstanceRef, Product};
use berth_core::server::{
    AcceptRequest, Channel, FailureKind, OfferRequest, OperationState, Peer, PowerAction, Relocation, Server,
};
use berth_sim::{Caller, Fault, Guest, InstanceOptions, Options, SimServer, World};

const TIMEOUT: Duration = Duration::from_secs(60);

fn web() -> InstanceRef {
    InstanceRef::new("default", "web")
}

fn copy() -> InstanceRef {
    InstanceRef::new("default", "berth-abcdefgh-web")
}

/// Two servers, one instance on the first.
fn pair(product: Product, instance: InstanceOptions) -> (World, SimServer, SimServer) {
    let world = World::new();
    world.add_server("a", product, Options::default());
    world.add_server("b", product, Options::default());
    world.add_instance("a", &web(), instance);
    (world.clone(), world.connect("c1", "a"), world.connect("c1", "b"))
}

async fn etag(server: &SimServer, at: &InstanceRef) -> String {
    server.instance(at).await.unwrap().unwrap().etag
}

async fn done(server: &SimServer, id: berth_core::server::OperationId) -> OperationState {
    server.wait(&id, TIMEOUT).await.unwrap()
}

async fn power(server: &SimServer, at: &InstanceRef, action: PowerAction) -> OperationState {
    let id = server.set_power(at, action).await.unwrap();
    done(server, id).await
}

const START: PowerAction = PowerAction::Start { stateful: false };
const STOP: PowerAction = PowerAction::Stop {
    timeout: Duration::from_secs(10),
};

fn guard(kind: InstanceKind) -> Change {
    let mut change = Change {
        config: marks::marks("m", marks::Role::Source, 1),
        ..Change::default()
    };
    change
        .devices
        .insert(marks::GUARD.to_owned(), marks::guard_device(kind, "m"));
    change
}

fn accept(source: &Definition, at: &InstanceRef, pull_from: Option<Peer>, refresh: bool) -> AcceptRequest {
    let mut definition = source.clone();
    definition.config.extend(marks::marks("m", marks::Role::Incoming, 1));
    AcceptRequest {
        at: at.clone(),
        kind: InstanceKind::Container,
        definition,
        member: None,
        live: false,
        instance_only: false,
        refresh,
        exclude_older: false,
        pull_from,
    }
}

async fn begin_pull(a: &SimServer, b: &SimServer, at: &InstanceRef, refresh: bool) -> (Channel, Channel) {
    let facts = a.facts().await.unwrap();
    let offer = OfferRequest {
        live: false,
        instance_only: false,
        snapshot: None,
        push_to: None,
    };
    let source = Definition::from(&a.instance(&web()).await.unwrap().unwrap().instance);
    let waiting = a.offer(&web(), &offer).await.unwrap();
    let peer = Peer {
        address: format!("https://{}", facts.addresses[0]),
        certificate: facts.certificate,
        channel: waiting.clone(),
    };
    let target = b.accept(&accept(&source, at, Some(peer), refresh)).await.unwrap();
    (waiting, target)
}

async fn pull(a: &SimServer, b: &SimServer, refresh: bool) -> (OperationState, OperationState) {
    let (source, target) = begin_pull(a, b, &copy(), refresh).await;
    let source = done(a, source.operation).await;
    (source, done(b, target.operation).await)
}

#[tokio::test(start_paused = true)]
async fn stopped_started_stopped_gives_the_same_entity_tag_but_another_last_use() {
    let (world, a, _) = pair(Product::Incus, InstanceOptions::stopped());
    power(&a, &web(), START).await;
    power(&a, &web(), STOP).await;
    let first = a.instance(&web()).await.unwrap().unwrap();
    power(&a, &web(), START).await;
    assert_ne!(etag(&a, &web()).await, first.etag);
    power(&a, &web(), STOP).await;
    let second = a.instance(&web()).await.unwrap().unwrap();
    assert_eq!(first.etag, second.etag);
    assert_ne!(first.instance.last_used_at, second.instance.last_used_at);
    world.check().unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_guard_makes_every_start_fail_and_is_refused_on_a_running_instance() {
    for kind in [InstanceKind::Container, InstanceKind::VirtualMachine] {
        let (world, a, _) = pair(
            Product::Incus,
            InstanceOptions {
                kind,
                ..InstanceOptions::default()
            },
        );
        let tag = etag(&a, &web()).await;
        let refused = a.patch(&web(), &guard(kind), &tag).await.unwrap_err();
        assert_eq!(refused.kind, FailureKind::Refused);
        let left = world
            .instance("a", &web())
            .unwrap()
            .config
            .contains_key("volatile.berth-guard.hwaddr");
        assert_eq!(
            left,
            kind == InstanceKind::VirtualMachine,
            "only a network interface leaves its address"
        );
        power(&a, &web(), STOP).await;
        let tag = etag(&a, &web()).await;
        a.patch(&web(), &guard(kind), &tag).await.unwrap();
        let OperationState::Failed(why) = power(&a, &web(), START).await else {
            panic!("it started")
        };
        assert!(why.contains("berth-guard") || why.contains("held-by-berth"), "{why}");
        assert!(world.start("a", &web()).is_err());
        world.reboot("a");
        assert!(!world.instance("a", &web()).unwrap().may_run());
        world.check().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_patch_with_an_old_entity_tag_is_refused_and_an_empty_value_unsets_a_key() {
    let (_, a, _) = pair(Product::Incus, InstanceOptions::default().key("user.x", "1"));
    let old = etag(&a, &web()).await;
    let mut change = Change::default();
    change.config.insert("user.x".to_owned(), String::new());
    a.patch(&web(), &change, &old).await.unwrap();
    assert!(
        !a.instance(&web())
            .await
            .unwrap()
            .unwrap()
            .instance
            .config
            .contains_key("user.x")
    );
    assert_eq!(
        a.patch(&web(), &change, &old).await.unwrap_err().kind,
        FailureKind::Changed
    );
}

#[tokio::test(start_paused = true)]
async fn renaming_and_network_interfaces_give_a_new_cloud_init_id_which_a_patch_of_its_own_puts_back() {
    let (world, a, _) = pair(Product::Incus, InstanceOptions::stopped());
    let id = |at: &InstanceRef| world.instance("a", at).unwrap().config[marks::CLOUD_INIT_ID].clone();
    let first = id(&web());
    let tag = etag(&a, &web()).await;
    a.patch(&web(), &guard(InstanceKind::Container), &tag).await.unwrap();
    assert_eq!(id(&web()), first, "a unix-char device changes nothing");
    let tag = etag(&a, &web()).await;
    a.patch(&web(), &guard(InstanceKind::VirtualMachine), &tag)
        .await
        .unwrap();
    assert_ne!(id(&web()), first, "a network interface does");
    let operation = a.rename(&web(), "other").await.unwrap();
    assert_eq!(done(&a, operation).await, OperationState::Succeeded);
    let other = InstanceRef::new("default", "other");
    let mut change = Change::default();
    change.config.insert(marks::CLOUD_INIT_ID.to_owned(), first.clone());
    let tag = etag(&a, &other).await;
    a.patch(&other, &change, &tag).await.unwrap();
    assert_eq!(id(&other), first);
}

#[tokio::test(start_paused = true)]
async fn a_copy_in_the_making_reads_stopped_with_all_snapshots_and_does_not_start() {
    let (world, a, b) = pair(Product::Incus, InstanceOptions::stopped().snapshot("s0"));
    let (source, target) = begin_pull(&a, &b, &copy(), false).await;
    let half = b.instance(&copy()).await.unwrap().unwrap().instance;
    assert!(!half.may_run());
    assert_eq!(b.snapshots(&copy()).await.unwrap().len(), 1);
    assert!(world.data("b", &copy()).is_none());
    assert!(matches!(power(&b, &copy(), START).await, OperationState::Failed(_)));
    assert_eq!(done(&a, source.operation).await, OperationState::Succeeded);
    assert!(
        world.data("b", &copy()).is_none(),
        "the source's operation ends before the target is done"
    );
    assert_eq!(done(&b, target.operation.clone()).await, OperationState::Succeeded);
    assert_eq!(world.data("b", &copy()), Some(1));
    assert_eq!(half.last_used_at, "1970-01-01T00:00:00Z");
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(done(&b, target.operation).await, OperationState::Gone);
    world.check().unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_source_can_be_started_during_a_cold_transfer_on_lxd_only_and_the_copy_is_then_worth_nothing() {
    for product in [Product::Incus, Product::Lxd] {
        let (world, a, b) = pair(product, InstanceOptions::stopped());
        let (_, target) = begin_pull(&a, &b, &copy(), false).await;
        let started = power(&a, &web(), START).await == OperationState::Succeeded;
        assert_eq!(started, product == Product::Lxd);
        assert_eq!(done(&b, target.operation).await, OperationState::Succeeded);
        assert_eq!(world.data("b", &copy()).is_some(), product == Product::Incus);
        world.check().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn an_end_that_nobody_connects_to_gives_up_after_30_or_10_seconds_and_its_name_is_free_again() {
    for (product, seconds) in [(Product::Incus, 30), (Product::Lxd, 10)] {
        let (world, a, b) = pair(product, InstanceOptions::stopped());
        let source = Definition::from(&a.instance(&web()).await.unwrap().unwrap().instance);
        let waiting = b.accept(&accept(&source, &copy(), None, false)).await.unwrap();
        assert!(world.instance("b", &copy()).is_some());
        let almost = b
            .wait(&waiting.operation, Duration::from_secs(seconds - 1))
            .await
            .unwrap();
        assert_eq!(almost, OperationState::Running);
        assert!(matches!(done(&b, waiting.operation).await, OperationState::Failed(_)));
        assert!(world.instance("b", &copy()).is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_target_daemon_leaves_a_half_made_copy_and_a_dead_source_daemon_leaves_none() {
    for (dies, left) in [("b", true), ("a", false)] {
        let (world, a, b) = pair(Product::Incus, InstanceOptions::stopped());
        begin_pull(&a, &b, &copy(), false).await;
        world.daemon_restart(dies);
        assert_eq!(world.instance("b", &copy()).is_some(), left);
        assert!(a.operations().await.unwrap().is_empty() && b.operations().await.unwrap().is_empty());
        assert!(world.start("a", &web()).is_ok());
        world.check().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_made_copy_on_btrfs_that_was_touched_cannot_be_deleted_any_more() {
    for touched in [false, true] {
        let (world, a, b) = pair(Product::Incus, InstanceOptions::stopped());
        begin_pull(&a, &b, &copy(), false).await;
        world.daemon_restart("b");
        if touched {
            assert!(world.start("b", &copy()).is_err());
        }
        let second = world.connect("c2", "b");
        let id = second.remove(&copy()).await.unwrap();
        assert_eq!(matches!(done(&b, id).await, OperationState::Failed(_)), touched);
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_refresh_onto_a_stopped_owner_destroys_its_newest_data_and_is_noticed() {
    let (world, a, b) = pair(Product::Incus, InstanceOptions::stopped());
    assert_eq!(
        pull(&a, &b, false).await,
        (OperationState::Succeeded, OperationState::Succeeded)
    );
    world.start("b", &copy()).unwrap();
    world.stop("b", &copy()).unwrap();
    world.check().unwrap();
    pull(&a, &b, true).await;
    assert_eq!(world.check().unwrap_err().invariant, "I1");
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_times_out_leaves_incus_busy_until_the_guest_is_down_while_lxd_lets_go() {
    for product in [Product::Incus, Product::Lxd] {
        let stubborn = InstanceOptions::default().guest(Guest::StopsAfter(Duration::from_secs(120)));
        let (world, a, _) = pair(product, stubborn);
        assert!(matches!(power(&a, &web(), STOP).await, OperationState::Failed(_)));
        let change = Change {
            config: marks::marks("m", marks::Role::Source, 1),
            ..Change::default()
        };
        let tag = etag(&a, &web()).await;
        let patched = a.patch(&web(), &change, &tag).await.map_err(|e| e.kind);
        assert_eq!(
            patched,
            if product == Product::Incus {
                Err(FailureKind::Busy)
            } else {
                Ok(())
            }
        );
        tokio::time::sleep(Duration::from_secs(121)).await;
        assert!(!world.instance("a", &web()).unwrap().may_run());
        let tag = etag(&a, &web()).await;
        a.patch(&web(), &change, &tag).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_deletes_an_ephemeral_instance_which_is_a_breach_of_the_first_promise() {
    let (world, a, _) = pair(
        Product::Incus,
        InstanceOptions {
            ephemeral: true,
            ..InstanceOptions::default()
        },
    );
    power(&a, &web(), STOP).await;
    assert!(world.instance("a", &web()).is_none());
    assert_eq!(world.check().unwrap_err().invariant, "I1");
}

#[tokio::test(start_paused = true)]
async fn a_controller_that_deletes_what_carries_no_mark_is_noticed() {
    let (world, a, _) = pair(Product::Incus, InstanceOptions::stopped());
    a.remove(&web()).await.unwrap();
    assert_eq!(world.check().unwrap_err().invariant, "I8");
}

#[tokio::test(start_paused = true)]
async fn a_missing_pool_is_silently_replaced_and_a_missing_profile_or_network_or_a_taken_name_refused() {
    let (world, a, b) = pair(Product::Incus, InstanceOptions::stopped());
    let good = Definition::from(&a.instance(&web()).await.unwrap().unwrap().instance);
    let device = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let mut pool = good.clone();
    pool.devices.insert(
        "root".to_owned(),
        device(&[("type", "disk"), ("path", "/"), ("pool", "nowhere")]),
    );
    b.accept(&accept(&pool, &copy(), None, false)).await.unwrap();
    assert_eq!(world.instance("b", &copy()).unwrap().root_pool(), Some("default"));
    let taken = b.accept(&accept(&good, &copy(), None, false)).await.unwrap_err();
    assert_eq!(taken.kind, FailureKind::AlreadyExists);
    let mut profile = good.clone();
    profile.profiles.push("nope".to_owned());
    let mut network = good;
    network
        .devices
        .insert("eth1".to_owned(), device(&[("type", "nic"), ("network", "nope")]));
    for wrong in [profile, network] {
        let refused = b
            .accept(&accept(&wrong, &InstanceRef::new("default", "x"), None, false))
            .await
            .unwrap_err();
        assert_eq!(refused.kind, FailureKind::Refused);
    }
}

#[tokio::test(start_paused = true)]
async fn a_restricted_project_refuses_the_guard_snapshots_and_the_cloud_init_id() {
    let world = World::new();
    world.add_server("a", Product::Incus, Options::default().restricted_project("shop"));
    let at = InstanceRef::new("shop", "web");
    world.add_instance("a", &at, InstanceOptions::stopped());
    let a = world.connect("c1", "a");
    let mut id = Change::default();
    id.config.insert(marks::CLOUD_INIT_ID.to_owned(), "other".to_owned());
    for change in [guard(InstanceKind::Container), guard(InstanceKind::VirtualMachine), id] {
        let tag = etag(&a, &at).await;
        assert_eq!(
            a.patch(&at, &change, &tag).await.unwrap_err().kind,
            FailureKind::Refused
        );
    }
    assert_eq!(a.snapshot(&at, "s", None).await.unwrap_err().kind, FailureKind::Refused);
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_dies_in_a_pool_move_leaves_the_instance_under_a_temporary_name() {
    let world = World::new();
    world.add_server("a", Product::Incus, Options::default().pool("nvme", "zfs"));
    world.add_instance("a", &web(), InstanceOptions::stopped());
    let a = world.connect("c1", "a");
    let to = Relocation {
        pool: Some("nvme".to_owned()),
        ..Relocation::default()
    };
    a.relocate(&web(), &to).await.unwrap();
    world.until(|w| w.instance("a", &web()).is_none()).await;
    world.daemon_restart("a");
    let names: Vec<_> = world.instances("a").into_iter().map(|i| i.at.name).collect();
    assert!(names.len() == 1 && names[0].starts_with("move-of-"), "{names:?}");
    world.check().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_member_move_needs_a_stop_on_incus_and_stops_by_itself_on_lxd() {
    for product in [Product::Incus, Product::Lxd] {
        let world = World::new();
        world.add_server("a", product, Options::cluster(&["m1", "m2"]));
        world.add_instance("a", &web(), InstanceOptions::default());
        let a = world.connect("c1", "a");
        let to = Relocation {
            member: Some("m2".to_owned()),
            ..Relocation::default()
        };
        let moved = a.relocate(&web(), &to).await;
        assert_eq!(moved.is_ok(), product == Product::Lxd);
        if let Ok(id) = moved {
            assert_eq!(done(&a, id).await, OperationState::Succeeded);
            let i = world.instance("a", &web()).unwrap();
            assert!(i.may_run() && i.member.as_deref() == Some("m2"));
        }
        world.check().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_controller_never_gets_an_answer_and_its_late_request_is_carried_out_when_the_test_says_so() {
    let (world, a, _) = pair(Product::Incus, InstanceOptions::stopped());
    world.fault_at("c1", 0, Fault::Late(Caller::Dies));
    let call = tokio::spawn(async move { a.rename(&web(), "late").await });
    world.died("c1").await;
    assert!(!call.is_finished() && world.instance("a", &web()).is_some());
    let id = world.late()[0].id;
    world.deliver_late(id).unwrap();
    world.settled().await;
    assert!(world.instance("a", &InstanceRef::new("default", "late")).is_some());
    call.abort();
}

#[tokio::test(start_paused = true)]
async fn a_power_loss_starts_again_what_ran_unless_autostart_is_false() {
    let (world, ..) = pair(Product::Incus, InstanceOptions::default());
    let quiet = InstanceRef::new("default", "quiet");
    world.add_instance("a", &quiet, InstanceOptions::default().key("boot.autostart", "false"));
    world.reboot("a");
    assert!(world.instance("a", &web()).unwrap().may_run());
    assert!(!world.instance("a", &quiet).unwrap().may_run());
}
