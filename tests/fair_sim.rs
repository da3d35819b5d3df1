//! Many placements wait for few slots, on simulated servers: whoever has waited longest goes first.

use std::sync::Arc;
use std::time::Duration;

use berth_api::conditions::{self, READY};
use berth_api::server::Limits;
use berth_api::{InstancePlacementSpec, InstancePlacementStatus};
use berth_core::model::{InstanceRef, Product};
use berth_core::plan::Desired;
use berth_engine::registry::ServerConfig;
use berth_engine::{Engine, Env, Happening, Key, Report};
use berth_sim::{InstanceOptions, Options, World};
use jiff::Timestamp;

const NAMESPACE: &str = "shop";

struct Quiet;

impl Report for Quiet {
    fn status(&self, _: &InstancePlacementStatus) {}
    fn happened(&self, _: Happening) {}
}

fn desired(name: &str) -> Desired {
    let mut spec = InstancePlacementSpec::default();
    spec.target.server = "b".into();
    Desired {
        namespace: NAMESPACE.into(),
        name: name.into(),
        uid: format!("uid-{name}"),
        generation: 1,
        created_at: Timestamp::UNIX_EPOCH,
        deleting: false,
        approve: None,
        requested_at: None,
        spec,
        status: InstancePlacementStatus::default(),
    }
}

/// An engine that knows two servers; one instance may leave `a` at a time.
fn engine(world: &World) -> Arc<Engine> {
    let clock = world.clone();
    let env = Env {
        clock: Arc::new(move || clock.now()),
        may_act: Arc::new(|| true),
        lease_is_safe: Arc::new(|| true),
        scratch: None,
    };
    let engine = Arc::new(Engine::new(env, Arc::new(world.records("c1"))));
    for server in ["a", "b"] {
        let config = ServerConfig {
            created_at: Timestamp::UNIX_EPOCH,
            cordoned: false,
            limits: Limits {
                incoming: 2,
                outgoing: 1,
            },
            interval: Duration::from_secs(300),
            address: format!("https://{server}"),
            peer_address: None,
            allow_unsafe_overrides: false,
            live_between_servers: true,
        };
        let connection = Arc::new(world.connect("c1", server));
        let identity = Some(berth_sim::CERTIFICATE.to_owned());
        engine
            .registry()
            .upsert(&Key::new(NAMESPACE, server), config, connection, identity);
    }
    engine
}

/// Looks at one placement again and again until it is in place.
async fn follow(engine: Arc<Engine>, name: String) {
    let mut desired = desired(&name);
    let mut changes = engine.changes();
    let key = Key::new(NAMESPACE, &name);
    loop {
        let pass = engine
            .reconcile(desired.clone(), &Quiet)
            .await
            .expect("the store answers");
        let ready = conditions::find(&pass.status.conditions, READY).map(|c| c.reason.clone());
        desired.status = pass.status;
        if ready.as_deref() == Some("InPlace") {
            return;
        }
        let pause = tokio::time::sleep(pass.look_again.unwrap_or(Duration::from_secs(60)));
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = &mut pause => break,
                change = changes.recv() => {
                    // who lags behind looks at everything again
                    let mine = change.map_or(true, |c| engine.concerned(&c).contains(&key));
                    if mine {
                        break;
                    }
                }
            }
        }
    }
}

#[test]
fn who_has_waited_longest_goes_first() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let world = World::new();
        for server in ["a", "b"] {
            world.add_server(server, Product::Incus, Options::cluster(&[]));
        }
        let order = ["e", "b", "d", "a", "c"].map(|n| format!("web-{n}"));
        for name in &order {
            world.add_instance("a", &InstanceRef::new("default", name), InstanceOptions::default());
        }
        let engine = engine(&world);
        let mut running = tokio::task::JoinSet::new();
        for name in &order {
            running.spawn(follow(engine.clone(), name.clone()));
            // the servers have been listed, and each begins to wait a little after the one before
            tokio::time::sleep(Duration::from_millis(if running.len() == 1 { 400 } else { 20 })).await;
        }
        running.join_all().await;
        let mut records = world.all_records();
        records.sort_by_key(|r| r.status.started_at.as_ref().map(|t| t.0));
        let begun: Vec<&str> = records.iter().map(|r| r.spec.placement.as_str()).collect();
        assert_eq!(begun, order, "in the order in which they came");
        let breach = world.check().err().map(|b| format!("{}: {}", b.invariant, b.message));
        assert_eq!(breach, None);
        for pair in records.windows(2) {
            let (ended, began) = (&pair[0].status.finished_at, &pair[1].status.started_at);
            let ended = ended.as_ref().map(|t| t.0);
            let began = began.as_ref().map(|t| t.0);
            assert!(
                ended.is_some() && ended <= began,
                "one after the other: {ended:?}, {began:?}"
            );
        }
    });
}
