//! The smallest wiring there can be around the engine: placements in memory, one task each, woken by what the engine says.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_api::conditions::{self, READY};
use berth_api::placement::PowerState;
use berth_api::server::Limits;
use berth_api::{InstancePlacementSpec, InstancePlacementStatus, Method, Step, Target};
use berth_core::model::{InstanceRef, Product};
use berth_core::plan::Desired;
use berth_core::records::Record;
use berth_engine::registry::ServerConfig;
use berth_engine::{Engine, Env, Happening, Key, Report};
use berth_sim::{CERTIFICATE, InstanceOptions, Options, Timing, World};
use jiff::Timestamp;
use tokio::sync::Notify;

pub const NAMESPACE: &str = "shop";
/// The controller of a test that has only one.
pub const CONTROLLER: &str = "c1";

/// A world with an engine and its placements.
#[derive(Clone)]
pub struct Town {
    pub world: World,
    pub engine: Arc<Engine>,
    pub leads: Arc<AtomicBool>,
    controller: String,
    servers: Vec<String>,
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    placements: Mutex<BTreeMap<Key, Desired>>,
    wakes: Mutex<BTreeMap<Key, Arc<Notify>>>,
    tasks: Mutex<Vec<tokio::task::AbortHandle>>,
    events: Mutex<Vec<Happening>>,
    seen: Mutex<Vec<String>>,
    passes: Mutex<BTreeMap<Key, u64>>,
}

impl Report for Inner {
    fn status(&self, status: &InstancePlacementStatus) {
        self.seen.lock().unwrap().push(reason(status));
    }

    fn happened(&self, happening: Happening) {
        self.events.lock().unwrap().push(happening);
    }
}

pub fn reason(status: &InstancePlacementStatus) -> String {
    conditions::find(&status.conditions, READY)
        .map(|c| c.reason.clone())
        .unwrap_or_default()
}

impl Town {
    /// Servers of that product, each under its own name.
    pub fn new(product: Product, servers: &[&str]) -> Self {
        Self::with(product, servers, Options::default)
    }

    pub fn with(product: Product, servers: &[&str], options: impl Fn() -> Options) -> Self {
        let world = World::new();
        servers.iter().for_each(|s| world.add_server(s, product, options()));
        Self::begin(world, CONTROLLER, servers.iter().map(|s| (*s).to_owned()).collect())
    }

    /// Two servers, and `web-1` on a; its data takes 50 s.
    pub fn slow() -> Self {
        let slow = || Options {
            timing: Some(Timing {
                transfer: Duration::from_secs(50),
                ..Timing::of(Product::Incus)
            }),
            ..Options::default()
        };
        let town = Self::with(Product::Incus, &["a", "b"], slow);
        town.add("a", "web-1");
        town
    }

    /// `web-1` is on its way from a to b, and has been stopped for that long.
    pub async fn in_the_middle_of_a_transfer(stopped_for: Duration) -> Self {
        let town = Self::slow();
        town.place("web-1", "b", |s| s.methods = vec![Method::Cold]);
        let stopped = |t: &Town| t.records().iter().any(|r| r.status.step() == Some(Step::Stopped));
        town.until("it is stopped", stopped).await;
        tokio::time::sleep(stopped_for).await;
        town
    }

    /// Cancels the only move, and the engine hears of it.
    pub fn cancel(&self) {
        let name = self.records()[0].name.clone();
        self.world.cancel_move(NAMESPACE, &name);
        self.engine.record_seen(&self.world.record(NAMESPACE, &name).unwrap());
    }

    fn begin(world: World, controller: &str, servers: Vec<String>) -> Self {
        let leads = Arc::new(AtomicBool::new(true));
        let (clock, may_act) = (world.clone(), leads.clone());
        let env = Env {
            clock: Arc::new(move || clock.now()),
            may_act: Arc::new(move || may_act.load(Ordering::Relaxed)),
            lease_is_safe: Arc::new(|| true),
            scratch: None,
        };
        let engine = Arc::new(Engine::new(env, Arc::new(world.records(controller))));
        let town = Self {
            world,
            engine,
            leads,
            controller: controller.to_owned(),
            servers: servers.clone(),
            inner: Arc::default(),
        };
        servers.iter().for_each(|s| town.connect(s, s, Limits::default()));
        let (dispatcher, mut changes) = (town.clone(), town.engine.changes());
        town.keep(tokio::spawn(async move {
            loop {
                match changes.recv().await {
                    Ok(change) => dispatcher
                        .engine
                        .concerned(&change)
                        .iter()
                        .for_each(|k| dispatcher.wake(k)),
                    Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => dispatcher.wake_all(),
                    Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
                }
            }
        }));
        town
    }

    /// The same world and the same placements in another process, after the first one has ended.
    pub fn reborn(&self, controller: &str) -> Self {
        self.end();
        let town = Self::begin(self.world.clone(), controller, self.servers.clone());
        let placements = self.inner.placements.lock().unwrap().clone();
        for desired in placements.values() {
            town.engine.placement_seen(desired);
        }
        for (key, desired) in placements {
            town.inner.placements.lock().unwrap().insert(key.clone(), desired);
            town.begin_caring(key);
        }
        town
    }

    fn begin_caring(&self, key: Key) {
        let mut wakes = self.inner.wakes.lock().unwrap();
        wakes.insert(key.clone(), Arc::new(Notify::new()));
        let town = self.clone();
        self.keep(tokio::spawn(async move { town.care_for(key).await }));
    }

    /// An InstanceServer `name` for the server `host`.
    pub fn connect(&self, name: &str, host: &str, limits: Limits) {
        let config = ServerConfig {
            created_at: self.world.now(),
            cordoned: false,
            limits,
            interval: Duration::from_secs(300),
            address: format!("https://{host}"),
            peer_address: None,
            allow_unsafe_overrides: false,
            live_between_servers: true,
        };
        let connection = Arc::new(self.world.connect(&self.controller, host));
        self.engine.registry().upsert(
            &Key::new(NAMESPACE, name),
            config,
            connection,
            Some(CERTIFICATE.to_owned()),
        );
    }

    fn keep(&self, task: tokio::task::JoinHandle<()>) {
        self.inner.tasks.lock().unwrap().push(task.abort_handle());
    }

    pub fn wake(&self, key: &Key) {
        if let Some(wake) = self.inner.wakes.lock().unwrap().get(key) {
            wake.notify_one();
        }
    }

    fn wake_all(&self) {
        self.inner.wakes.lock().unwrap().values().for_each(|w| w.notify_one());
    }

    /// Makes or changes a placement.
    pub fn place(&self, name: &str, server: &str, change: impl FnOnce(&mut InstancePlacementSpec)) {
        let key = Key::new(NAMESPACE, name);
        let mut spec = InstancePlacementSpec {
            target: Target {
                server: server.to_owned(),
                ..Target::default()
            },
            ..InstancePlacementSpec::default()
        };
        change(&mut spec);
        let (desired, new) = {
            let mut placements = self.inner.placements.lock().unwrap();
            let old = placements.get(&key);
            let desired = Desired {
                namespace: NAMESPACE.to_owned(),
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                generation: old.map_or(1, |d| d.generation + 1),
                created_at: old.map_or_else(|| self.world.now(), |d| d.created_at),
                deleting: false,
                approve: None,
                requested_at: None,
                spec,
                status: old.map(|d| d.status.clone()).unwrap_or_default(),
            };
            let new = old.is_none();
            placements.insert(key.clone(), desired.clone());
            (desired, new)
        };
        self.engine.placement_seen(&desired);
        if new {
            self.begin_caring(key.clone());
        }
        self.wake(&key);
    }

    /// Deletes a placement.
    pub fn forget(&self, name: &str) {
        let key = Key::new(NAMESPACE, name);
        self.inner.placements.lock().unwrap().remove(&key);
        self.engine.placement_gone(&key);
        self.wake(&key);
    }

    pub fn report(&self) -> &dyn Report {
        self.inner.as_ref()
    }

    async fn care_for(&self, key: Key) {
        let wake = self.inner.wakes.lock().unwrap()[&key].clone();
        loop {
            let Some(desired) = self.inner.placements.lock().unwrap().get(&key).cloned() else {
                return;
            };
            *self.inner.passes.lock().unwrap().entry(key.clone()).or_default() += 1;
            let again = match self.engine.reconcile(desired, self.inner.as_ref()).await {
                Ok(pass) => {
                    if let Some(d) = self.inner.placements.lock().unwrap().get_mut(&key) {
                        d.status = pass.status;
                    }
                    pass.look_again
                }
                Err(_) => Some(Duration::from_secs(1)),
            };
            tokio::select! {
                () = tokio::time::sleep(again.unwrap_or(Duration::from_secs(365 * 86400))) => {}
                () = wake.notified() => {}
            }
        }
    }

    pub fn status(&self, name: &str) -> InstancePlacementStatus {
        let placements = self.inner.placements.lock().unwrap();
        placements
            .get(&Key::new(NAMESPACE, name))
            .map(|d| d.status.clone())
            .unwrap_or_default()
    }

    pub fn reason(&self, name: &str) -> String {
        reason(&self.status(name))
    }

    pub fn passes(&self) -> u64 {
        self.inner.passes.lock().unwrap().values().sum()
    }

    pub fn events(&self) -> Vec<String> {
        self.inner
            .events
            .lock()
            .unwrap()
            .iter()
            .map(|e| e.reason.clone())
            .collect()
    }

    pub fn reported(&self) -> Vec<String> {
        self.inner.seen.lock().unwrap().clone()
    }

    pub fn records(&self) -> Vec<Record> {
        self.world.all_records()
    }

    pub fn open(&self) -> usize {
        self.records().iter().filter(|r| !r.finished()).count()
    }

    /// Waits, in virtual time, until something holds.
    pub async fn until(&self, what: &str, done: impl Fn(&Town) -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(7200);
        while !done(self) {
            if tokio::time::Instant::now() > deadline {
                self.log().iter().for_each(|l| eprintln!("{l}"));
                let placements = self.inner.placements.lock().unwrap();
                let said: Vec<_> = placements
                    .values()
                    .map(|d| (&d.name, conditions::find(&d.status.conditions, READY)))
                    .collect();
                panic!("not within two hours: {what}; {said:#?}");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        if let Err(breach) = self.world.check() {
            self.log().iter().for_each(|l| eprintln!("{l}"));
            panic!("{breach:?}");
        }
    }

    pub async fn until_placed(&self, name: &str, server: &str) {
        self.until_placed_as(name, server, name).await;
    }

    pub async fn until_placed_as(&self, name: &str, server: &str, instance: &str) {
        let at = at(instance);
        self.until(&format!("{name} is placed on {server}"), |t| {
            // the status of a pass comes after its move has ended
            let said = t.status(name).location.is_some_and(|l| l.server == server);
            said && t.reason(name) == "InPlace" && t.world.instance(server, &at).is_some() && t.open() == 0
        })
        .await;
    }

    pub fn log(&self) -> Vec<String> {
        self.world.log().iter().map(ToString::to_string).collect()
    }

    pub fn add(&self, server: &str, name: &str) -> String {
        self.world.add_instance(server, &at(name), InstanceOptions::default())
    }

    pub fn now(&self) -> Timestamp {
        self.world.now()
    }

    /// Ends the engine's process.
    pub fn end(&self) {
        self.inner
            .tasks
            .lock()
            .unwrap()
            .iter()
            .for_each(tokio::task::AbortHandle::abort);
    }
}

pub fn at(name: &str) -> InstanceRef {
    InstanceRef::new("default", name)
}

pub fn running(spec: &mut InstancePlacementSpec) {
    spec.power_state = PowerState::Running;
}
