//! What is looked at when something changes: the watches of our kinds, the engine's hints and timers go into one queue
//! per kind. Until this process leads only the servers are looked at, without writing, so that all is known by then.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use berth_api::{InstanceCopy, InstanceMove, InstancePlacementStatus, Reason};
use berth_engine::{Change, Engine, Happening, Key, Leftover};
use kube::{Resource, ResourceExt};
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::cache::{Changed, key_of};
use crate::copies::Copies;
use crate::metrics::Metrics;
use crate::placements::{Placements, desired_of};
use crate::queue::Queue;
use crate::records::record_of;
use crate::servers::Servers;
use crate::store::Store;
use crate::{copies, events};

/// Placements that are looked at at the same time: a pass lasts as long as something is being done for it.
const PLACEMENTS: usize = 64;
const SERVERS: usize = 16;
const ORPHANS: usize = 4;
const COPIES: usize = 16;
/// How often copies that belong to no open move are looked for.
const SWEEP: Duration = Duration::from_secs(60);
/// When records that could not be read are read again.
const RETRY: Duration = Duration::from_secs(1);

/// Everything that runs while this process takes part.
#[derive(Clone)]
pub(crate) struct Wiring {
    pub store: Arc<Store>,
    pub engine: Arc<Engine>,
    pub servers: Arc<Servers>,
    pub placements: Arc<Placements>,
    pub copies: Arc<Copies>,
    server_queue: Arc<Queue<Key>>,
    placement_queue: Arc<Queue<Key>>,
    orphan_queue: Arc<Queue<String>>,
    copy_queue: Arc<Queue<Key>>,
}

impl Wiring {
    pub fn new(store: Arc<Store>, engine: Arc<Engine>, servers: Arc<Servers>, placements: Arc<Placements>) -> Self {
        let copies = Arc::new(Copies {
            store: store.clone(),
            engine: engine.clone(),
            identity: servers.identity.clone(),
        });
        Self {
            copies,
            store,
            engine,
            servers,
            placements,
            server_queue: Queue::new(),
            placement_queue: Queue::new(),
            orphan_queue: Queue::new(),
            copy_queue: Queue::new(),
        }
    }

    /// Runs until dropped.
    pub async fn run(self, namespaces: Vec<Option<String>>) {
        let mut tasks = JoinSet::new();
        for namespace in namespaces {
            self.follow(&mut tasks, namespace);
        }
        tasks.spawn(self.clone().take_hints());
        let wiring = self.clone();
        tasks.spawn(
            self.server_queue
                .clone()
                .run(SERVERS, move |key| wiring.clone().look_at_server(key)),
        );
        tasks.spawn(self.clone().act());
        while let Some(ended) = tasks.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "a part of the wiring broke off");
                return;
            }
        }
    }

    fn follow(&self, tasks: &mut JoinSet<()>, namespace: Option<String>) {
        let (store, client) = (&self.store, || self.store.client.clone());
        let wiring = self.clone();
        let tell = move |changed| wiring.placement_changed(&changed);
        tasks.spawn(store.placements.clone().follow(client(), namespace.clone(), tell));
        let wiring = self.clone();
        let tell = move |changed| wiring.move_changed(&changed);
        tasks.spawn(store.moves.clone().follow(client(), namespace.clone(), tell));
        let queue = self.server_queue.clone();
        let tell = move |changed: Changed<_>| {
            queue.add(changed.key);
        };
        tasks.spawn(store.servers.clone().follow(client(), namespace.clone(), tell));
        let wiring = self.clone();
        let tell = move |changed| wiring.copy_changed(changed);
        tasks.spawn(store.copies.clone().follow(client(), namespace, tell));
    }

    fn placement_changed(&self, changed: &Changed<berth_api::InstancePlacement>) {
        let (key, uid) = (&changed.key, |o: &Arc<berth_api::InstancePlacement>| o.uid());
        match &changed.new {
            Some(new) => self.engine.placement_seen(&desired_of(new)),
            None => {
                if let Some(old) = &changed.old {
                    self.placements.clone().outlived(old);
                }
                self.engine.placement_gone(key);
                self.placements.writes.forget(key);
            }
        }
        if changed.old.is_some() && changed.old.as_ref().and_then(uid) != changed.new.as_ref().and_then(uid) {
            self.orphan_queue.add(key.namespace.clone());
        }
        if changed.new.is_some() {
            self.placement_queue.add(key.clone());
        }
        for copy in self.copies.of_placement(changed) {
            self.copy_queue.add(copy);
        }
    }

    fn copy_changed(&self, changed: Changed<InstanceCopy>) {
        match &changed.new {
            Some(new) => self.engine.copy_seen(&copies::record_of(new)),
            None => self.engine.copy_gone(&changed.key),
        }
        self.copy_queue.add(changed.key);
    }

    fn move_changed(&self, changed: &Changed<InstanceMove>) {
        match &changed.new {
            Some(new) => {
                self.engine.record_seen(&record_of(new));
                self.look_at_move(new);
            }
            None => self.engine.record_gone(&changed.key),
        }
    }

    /// Has whoever is responsible for a record look at it.
    fn look_at_move(&self, object: &InstanceMove) {
        let namespace = object.namespace().unwrap_or_default();
        if self.placements.has_placement(object) {
            self.placement_queue.add(Key::new(namespace, &object.spec.placement));
        } else {
            self.orphan_queue.add(namespace);
        }
    }

    async fn take_hints(self) {
        let mut hints = self.engine.changes();
        loop {
            match hints.recv().await {
                Ok(hint) => self.take_hint(&hint),
                Err(RecvError::Lagged(_)) => self.look_at_everything(),
                Err(RecvError::Closed) => return,
            }
        }
    }

    fn take_hint(&self, hint: &Change) {
        for key in self.engine.concerned(hint) {
            self.placement_queue.add(key);
        }
        for key in self.engine.concerned_copies(hint) {
            self.copy_queue.add(key);
        }
        match hint {
            Change::Server { key, fingerprint } => {
                let same = fingerprint.as_ref().map(|f| self.engine.registry().keys_of(f));
                same.into_iter().flatten().chain([key.clone()]).for_each(|k| {
                    self.server_queue.add(k);
                });
            }
            Change::Move { record } => {
                if let Some(object) = self.store.moves.get(record)
                    && !self.placements.has_placement(&object)
                {
                    self.orphan_queue.add(record.namespace.clone());
                }
            }
            Change::Instance { .. } | Change::Placement { .. } => {}
        }
    }

    fn look_at_everything(&self) {
        for object in self.store.servers.list(|_| true) {
            self.server_queue.add(key_of(object.as_ref()));
        }
        for object in self.store.placements.list(|_| true) {
            self.placement_queue.add(key_of(object.as_ref()));
        }
        for object in self.store.copies.list(|_| true) {
            self.copy_queue.add(key_of(object.as_ref()));
        }
        for namespace in self.namespaces_with_moves() {
            self.orphan_queue.add(namespace);
        }
    }

    fn namespaces_with_moves(&self) -> BTreeSet<String> {
        let moves = self.store.moves.list(|_| true);
        moves.iter().map(|m| m.namespace().unwrap_or_default()).collect()
    }

    /// Slots and marks of all open moves must be known before the first placement is looked at.
    async fn load_records(&self) {
        let namespaces = self.namespaces_with_moves();
        while let Err(error) = self.engine.load(namespaces.iter().map(String::as_str)).await {
            tracing::warn!(%error, "the records of moves cannot be read now");
            sleep(RETRY).await;
        }
    }

    /// Waits until this process leads, and then looks at everything and does what is to be done.
    async fn act(self) {
        self.store.synced().await;
        self.store.gate.leadership.won().await;
        self.engine.forget_records();
        self.placements.writes.forget_all();
        self.load_records().await;
        self.look_at_everything();
        let mut tasks = JoinSet::new();
        let wiring = self.clone();
        tasks.spawn(
            self.placement_queue
                .clone()
                .run(PLACEMENTS, move |key| wiring.clone().look_at_placement(key)),
        );
        let placements = self.placements.clone();
        tasks.spawn(
            self.orphan_queue
                .clone()
                .run(ORPHANS, move |namespace| placements.clone().orphans(namespace)),
        );
        let copies = self.copies.clone();
        tasks.spawn(self.copy_queue.clone().run(COPIES, move |key| copies.clone().pass(key)));
        tasks.spawn(self.clone().sweep());
        while tasks.join_next().await.is_some() {}
    }

    async fn look_at_server(self, key: Key) -> Option<Duration> {
        let again = self.servers.clone().pass(key.clone()).await;
        if self.store.servers.get(&key).is_none() {
            // where each instance is has to be found out without it
            let namespace = Some(key.namespace.as_str());
            for object in self
                .store
                .placements
                .list(|p| p.metadata.namespace.as_deref() == namespace)
            {
                self.placement_queue.add(key_of(object.as_ref()));
            }
        }
        again
    }

    async fn look_at_placement(self, key: Key) -> Option<Duration> {
        let again = self.placements.clone().pass(key.clone()).await;
        if self.store.placements.get(&key).is_none() {
            // its moves may have outlived it
            self.orphan_queue.add(key.namespace);
        }
        again
    }

    /// Looks for copies that late requests left behind.
    async fn sweep(self) {
        let mut told: BTreeSet<(Key, String)> = BTreeSet::new();
        loop {
            sleep(SWEEP).await;
            if !self.store.gate.may_act() {
                continue;
            }
            match self.engine.sweep().await {
                Ok(leftovers) => {
                    for leftover in &leftovers {
                        self.tell_leftover(&mut told, leftover).await;
                    }
                }
                Err(error) => tracing::warn!(%error, "leftovers cannot be looked for now"),
            }
        }
    }

    /// One event for each copy that belongs to nobody.
    async fn tell_leftover(&self, told: &mut BTreeSet<(Key, String)>, leftover: &Leftover) {
        let Some(server) = leftover.servers.first() else { return };
        let at = leftover.at.to_string();
        let Some(object) = self.store.servers.get(server) else {
            return;
        };
        if !told.insert((server.clone(), at.clone())) {
            return;
        }
        let of = leftover
            .record
            .as_ref()
            .map(|r| format!(" (move {r})"))
            .unwrap_or_default();
        let happening = Happening {
            record: leftover.record.clone(),
            warning: true,
            reason: Reason::Leftover.as_str().to_owned(),
            message: format!(
                "{at} on {} is a copy under one of Berth's names that belongs to no record{of}; delete it if nobody needs it",
                server.name
            ),
        };
        let (store, identity) = (&self.store, &self.servers.identity);
        events::publish(store, identity, &[object.object_ref(&())], happening).await;
    }

    /// A move that runs, as it is right now.
    pub fn open_move(&self, namespace: &str, name: &str) -> Option<berth_core::records::Record> {
        self.engine.open_move(&Key::new(namespace, name))
    }

    /// Brings up to date what is counted only when somebody asks.
    pub fn refresh(&self, metrics: &Metrics) {
        let placements = self.store.placements.list(|_| true);
        let unseen = InstancePlacementStatus::default();
        metrics.set_placements(placements.iter().map(|p| p.status.as_ref().unwrap_or(&unseen)));
        metrics.set_in_flight(self.store.moves.list(crate::records::is_open).len());
        metrics.set_servers(self.servers.up().into_iter());
        metrics.set_leader(self.store.gate.may_act());
        metrics.set_depth("placements", self.placement_queue.depth());
        metrics.set_depth("servers", self.server_queue.depth());
    }
}
