//! Brings placements where they should be: finds the open move or makes a plan, creates the record, drives it, and says
//! what to report. Everything that is decided about an instance comes from berth-core; here are memory, order and limits.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_api::{InstanceMoveSpec, InstanceMoveStatus, InstancePlacementStatus, Reason};
use berth_core::model::Contents;
use berth_core::moves::Wish;
use berth_core::plan::{self, Decision, Desired, Located, ServerView, Verdict, World};
use berth_core::records::{Record, RecordError, Records};
use berth_core::status;
use futures::FutureExt;
use jiff::Timestamp;
use tokio::sync::broadcast;

use crate::adapt::Adaptations;
use crate::book::{Book, Route};
use crate::copies::Copies;
use crate::drive::{Driven, Driver, Orders, Told, WishOf};
use crate::happenings::{self, Happening};
use crate::insides::Insides;
use crate::placements::Placements;
use crate::power::{self, PowerChanges};
use crate::registry::{Registry, Usage};
use crate::sizes::Sizes;
use crate::{Change, Changes, Env, Key, lock};

/// When to look again at a move that waits only for a server that does not answer.
const LEFTOVER: Duration = Duration::from_secs(30);

/// The engine. One per process; its background work ends with it.
pub struct Engine {
    env: Env,
    records: Arc<dyn Records>,
    registry: Arc<Registry>,
    changes: Changes,
    driver: Driver,
    book: Book,
    placements: Placements,
    power: PowerChanges,
    copies: Copies,
    sizes: Sizes,
    pub(crate) insides: Insides,
    adaptations: Adaptations,
    /// Held while slots are looked at and taken.
    starting: Mutex<()>,
}

/// What came of looking at a placement.
#[derive(Clone, Debug)]
pub struct Pass {
    /// Its status as it should be written, if it differs from what was last said.
    pub status: InstancePlacementStatus,
    /// Whether a move came to its end.
    pub ended: bool,
    /// When to look again at the latest; `None`: when something changes.
    pub look_again: Option<Duration>,
}

/// The open moves of a placement after they were carried on.
#[derive(Default)]
struct Open {
    /// The one that is in the way of another plan.
    in_hand: Option<Record>,
    /// One that waits only for the server of its former source.
    leftover: Option<Record>,
    ended: bool,
    look_again: Option<Duration>,
}

/// Told of what changes while a pass goes on.
pub trait Report: Send + Sync {
    /// A status in the middle of a pass. It need not be written before the pass goes on.
    fn status(&self, status: &InstancePlacementStatus);
    /// Something worth telling people, in the moment in which it happens.
    fn happened(&self, happening: Happening);
}

impl Engine {
    /// An engine without servers.
    pub fn new(env: Env, records: Arc<dyn Records>) -> Self {
        let changes: Changes = broadcast::channel(4096).0;
        let registry = Arc::new(Registry::new(env.clone(), changes.clone()));
        let driver = Driver::new(env.clone(), registry.clone(), records.clone(), changes.clone());
        Self {
            env,
            records,
            registry,
            driver,
            book: Book::default(),
            placements: Placements::default(),
            power: PowerChanges::default(),
            copies: Copies::new(changes.clone()),
            changes,
            sizes: Sizes::default(),
            insides: Insides::default(),
            adaptations: Adaptations::default(),
            starting: Mutex::default(),
        }
    }

    pub(crate) fn env(&self) -> &Env {
        &self.env
    }

    pub(crate) fn book(&self) -> &Book {
        &self.book
    }

    pub(crate) fn driver(&self) -> &Driver {
        &self.driver
    }

    pub(crate) fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    pub(crate) fn power(&self) -> &PowerChanges {
        &self.power
    }

    pub(crate) fn copies(&self) -> &Copies {
        &self.copies
    }

    pub(crate) fn placements(&self) -> &Placements {
        &self.placements
    }

    pub(crate) fn starting(&self) -> &Mutex<()> {
        &self.starting
    }

    pub(crate) fn adaptations(&self) -> &Adaptations {
        &self.adaptations
    }

    pub(crate) fn records(&self) -> &dyn Records {
        self.records.as_ref()
    }

    /// The servers: add, change and remove them there.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Hints from now on; [`Engine::concerned`] says whom each concerns. Who lags behind looks at everything again.
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    /// Everything known of one server, for its status.
    pub fn server(&self, key: &Key) -> Option<ServerView> {
        self.registry.view(key, &self.book.usage(self.env.now()))
    }

    /// A move that is not over, as it is this very moment: its record is written less often than its transfer goes on.
    pub fn open_move(&self, key: &Key) -> Option<Record> {
        let mut record = self.book.get(key)?;
        if let Some(told) = self.driver.tasks().progress(key) {
            let known = record.status.progress.unwrap_or_default();
            record.status.progress = Some(berth_core::moves::measured(known, told));
        }
        Some(record)
    }

    /// The placements that have to be looked at after a change.
    pub fn concerned(&self, change: &Change) -> Vec<Key> {
        match change {
            Change::Placement { key } => vec![key.clone()],
            Change::Server { key, fingerprint } => {
                let mut servers = fingerprint
                    .as_ref()
                    .map(|f| self.registry.keys_of(f))
                    .unwrap_or_default();
                if !servers.contains(key) {
                    servers.push(key.clone());
                }
                servers.iter().flat_map(|s| self.placements.of_server(s)).collect()
            }
            Change::Instance { at, uuid, .. } => self.placements.of_instance(at, uuid.as_deref()),
            Change::Move { record } => {
                let placement = |r: Record| Key::new(r.namespace, r.spec.placement);
                let of_power = power::placement_of(record);
                of_power
                    .or_else(|| self.book.get(record).map(placement))
                    .into_iter()
                    .collect()
            }
        }
    }

    /// A placement exists, is new or has changed: its claim counts from now on, and its move is interrupted if something
    /// else is asked for. Look at it afterwards. All placements have to be told of before the first is looked at.
    pub fn placement_seen(&self, desired: &Desired) {
        if self.placements.seen(desired) {
            let rivals = self.placements.rivals(&Key::new(&desired.namespace, &desired.name));
            self.say_placements(rivals);
        }
    }

    /// A placement is gone.
    pub fn placement_gone(&self, key: &Key) {
        self.power.forget(key);
        self.adaptations.forget(key);
        let others = self.placements.forget(key);
        self.say_placements(others);
        self.say_admissible();
    }

    /// A record was changed, perhaps by somebody else: a cancellation or an end interrupts the move. Look at the placement
    /// then.
    pub fn record_seen(&self, record: &Record) {
        let key = Key::new(&record.namespace, &record.name);
        let Some(known) = self.book.get(&key) else { return };
        let given_up = record.finished();
        if known.spec.cancel != record.spec.cancel || known.deleting != record.deleting || given_up {
            self.book.put(record.clone());
            let placement = Key::new(&record.namespace, &record.spec.placement);
            self.placements.interrupt(&placement).notify_one();
            self.say_placements([placement]);
        }
    }

    /// A record is gone. What it kept is known until its placement is gone, too, or nothing is found of it.
    pub fn record_gone(&self, key: &Key) {
        self.book.remove(key);
        self.driver.forget(key);
    }

    /// Forgets what is known of the records: somebody else may have acted since.
    pub fn forget_records(&self) {
        self.book.clear();
        self.driver.forget_all();
        self.copies.forget_all();
    }

    fn say_placements(&self, keys: impl IntoIterator<Item = Key>) {
        for key in keys {
            // nobody listening is no failure
            let _ = self.changes.send(Change::Placement { key });
        }
    }

    /// Slots may have become free: those that wait for them look again.
    pub(crate) fn say_admissible(&self) {
        let usage = self.book.usage(self.env.now());
        self.say_placements(self.placements.admissible(usage, &self.registry));
    }

    /// Reads the records of these namespaces, so that slots and marks of all moves are known before the first placement
    /// is looked at.
    pub async fn load(&self, namespaces: impl IntoIterator<Item = &str>) -> Result<(), RecordError> {
        for namespace in namespaces {
            self.load_book(namespace).await?;
        }
        Ok(())
    }

    pub(crate) async fn load_book(&self, namespace: &str) -> Result<(), RecordError> {
        if !self.book.is_loaded(namespace) {
            self.book.load(namespace, self.records.list(namespace).await?);
        }
        Ok(())
    }

    /// Looks at a placement and does what is to be done.
    pub async fn reconcile(&self, mut desired: Desired, report: &dyn Report) -> Result<Pass, RecordError> {
        let key = Key::new(&desired.namespace, &desired.name);
        self.placement_seen(&desired);
        if self.placements.is_current(&desired) {
            let _ = self.placements.interrupt(&key).notified().now_or_never();
        }
        self.load_book(&desired.namespace).await?;
        if desired.handle_request() {
            self.adaptations.forget(&key);
            self.book.forget_criu();
        }
        let (mut look_again, mut ended, mut asked) = (None, false, false);
        loop {
            let open = Box::pin(self.drive_open(&key, &mut desired, report)).await?;
            look_again = sooner(look_again, open.look_again);
            ended |= open.ended;
            if open.in_hand.is_none() {
                look_again = sooner(look_again, Box::pin(self.end_kept(&key, &desired, report)).await?);
            }
            self.show_kept(&mut desired, report);
            if let Some(record) = open.in_hand {
                return Ok(Pass {
                    status: status::moving(&desired, &record, None, self.env.now()),
                    ended,
                    look_again,
                });
            }
            let verdict = Box::pin(self.plan_with_contents(&key, &desired)).await;
            if !std::mem::replace(&mut asked, true) && self.learn_record(&desired, &verdict).await? {
                continue;
            }
            if let Decision::Move(spec) = &verdict.decision {
                if let Some(record) = self.create(&desired, spec).await? {
                    // told as soon as its first step is written
                    let located = verdict.located.as_ref();
                    desired.status = status::moving(&desired, &record, located, self.env.now());
                    continue;
                }
                look_again = Some(Duration::from_secs(1));
            }
            let (verdict, after) = Box::pin(self.mend_in_place(&key, &desired, verdict, report)).await;
            look_again = sooner(look_again, after);
            return Ok(Pass {
                status: status::resting(&desired, &verdict, open.leftover.as_ref(), self.env.now()),
                ended,
                look_again,
            });
        }
    }

    /// Carries on the open moves of a placement, and remembers those that ended.
    async fn drive_open(&self, key: &Key, desired: &mut Desired, report: &dyn Report) -> Result<Open, RecordError> {
        let mut open = Open::default();
        for record in self.book.open_of(&desired.uid) {
            let driven = self.drive_for(key, desired, record, report).await?;
            open.look_again = sooner(open.look_again, driven.look_again);
            if driven.record.finished() {
                open.ended = true;
                status::remember(&mut desired.status, &driven.record, desired.generation);
            } else if status::is_leftover(&driven.record, self.env.now()) {
                open.look_again = sooner(open.look_again, Some(LEFTOVER));
                open.leftover = Some(driven.record);
            } else {
                open.in_hand = Some(driven.record);
            }
        }
        if let Some(last) = self.book.last_of(&desired.uid) {
            status::remember(&mut desired.status, &last, desired.generation);
        }
        Ok(open)
    }

    /// Carries on a move of a placement.
    async fn drive_for(
        &self,
        key: &Key,
        desired: &Desired,
        record: Record,
        report: &dyn Report,
    ) -> Result<Driven, RecordError> {
        let newest = self.book.open_of(&desired.uid).last().map(|r| r.name.clone());
        let superseded = newest.as_deref() != Some(record.name.as_str());
        let wish = move |record: &Record, now: Timestamp| match plan::wish(record, Some(desired), now) {
            Wish::Continue(_) if superseded => Wish::Undo {
                reason: Reason::Pending,
                message: "a newer attempt took its place".to_owned(),
            },
            wish => wish,
        };
        let stepped = |new: &Record| {
            if !new.finished() {
                report.status(&status::moving(desired, new, None, self.env.now()));
            }
        };
        self.drive(key, record, &wish, report, &stepped).await
    }

    async fn drive(
        &self,
        placement: &Key,
        record: Record,
        wish: WishOf<'_>,
        report: &dyn Report,
        stepped: Told<'_>,
    ) -> Result<Driven, RecordError> {
        let known = Mutex::new(record.clone());
        let written = |new: &Record| {
            self.book.put(new.clone());
            let old = std::mem::replace(&mut *lock(&known), new.clone());
            if let Some(happening) = happenings::of_record(&old, new) {
                report.happened(happening);
            }
            if old.status.step != new.status.step {
                stepped(new);
            }
        };
        let interrupt = self.placements.interrupt(placement);
        let orders = Orders {
            wish,
            open_moves: self.book.open_names(),
            interrupt: &interrupt,
            written: &written,
        };
        let record_key = Key::new(&record.namespace, &record.name);
        let driven = match self.driver.drive(record, &orders).await {
            Ok(driven) => driven,
            Err(error) => {
                if matches!(error, RecordError::NotFound(_)) {
                    self.record_gone(&record_key);
                }
                return Err(error);
            }
        };
        self.book.put(driven.record.clone());
        if driven.record.finished() {
            self.registry.learn(&driven.record);
            self.sizes.forget(&driven.record.spec.from);
            // slots are free again, and the instance can be claimed where it is now
            self.say_admissible();
            self.say_placements(self.placements.rivals(placement));
        }
        Ok(driven)
    }

    /// Carries on the moves of a namespace whose placements are gone: they are undone, or completed past the commit.
    /// Says when to look again.
    pub async fn drive_orphans(&self, namespace: &str, report: &dyn Report) -> Result<Option<Duration>, RecordError> {
        self.load_book(namespace).await?;
        let orphans = self.book.open_in(namespace).into_iter().filter(|r| {
            let placement = Key::new(namespace, &r.spec.placement);
            !self.placements.lives(&placement, &r.spec.placement_uid)
        });
        let driven = orphans.map(|record| async move {
            let placement = Key::new(namespace, &record.spec.placement);
            let wish = |record: &Record, now: Timestamp| plan::wish(record, None, now);
            self.drive(&placement, record, &wish, report, &|_| {}).await
        });
        let all = futures::future::join_all(driven).await;
        let mut look_again = None;
        for driven in all {
            look_again = sooner(look_again, driven?.look_again);
        }
        Ok(look_again)
    }

    /// What to do about a placement without a move in the way. If that is a move, its slots are taken.
    pub(crate) fn plan(&self, key: &Key, desired: &Desired, contents: Option<Contents>) -> Verdict {
        let now = self.env.now();
        // what an earlier look took and nobody used
        self.book.unreserve(&desired.uid);
        let (mut world, _) = self.world(desired, &self.book.usage(now), contents);
        let mut verdict = plan::plan(desired, &world, now);
        let mut waits_for = None;
        let decided = &verdict.decision;
        if matches!(
            decided,
            Decision::Move(_)
                | Decision::Wait {
                    reason: Reason::Pending,
                    ..
                }
        ) {
            let _starting = lock(&self.starting);
            let mut usage = self.book.usage(now);
            self.placements.keep_for_older(key, &mut usage, &self.registry);
            world.servers = self.registry.views(&desired.namespace, &usage);
            verdict = plan::plan(desired, &world, now);
            match &verdict.decision {
                Decision::Move(spec) => self.book.reserve(&desired.uid, route_of(spec)),
                Decision::Wait {
                    reason: Reason::Pending,
                    ..
                } => {
                    let target = world.servers.get(&desired.spec.target.server);
                    let to = target.and_then(|v| v.fingerprint().map(str::to_owned));
                    let from = verdict.located.as_ref().map(|l| l.fingerprint.clone());
                    waits_for = from.zip(to).map(|(from, to)| Route { from, to });
                }
                _ => {}
            }
        }
        self.placements.wait(key, waits_for, now);
        verdict
    }

    /// Everything that is known for a plan, and where the instance is.
    pub(crate) fn world(
        &self,
        desired: &Desired,
        usage: &Usage,
        contents: Option<Contents>,
    ) -> (World, Option<Located>) {
        let mut world = World {
            servers: self.registry.views(&desired.namespace, usage),
            claims: Vec::new(),
            records: self.book.records_of(&desired.uid),
            kept: self.book.kept_of(&desired.uid),
            open_moves: self.book.open_names(),
            refreshed: self.book.refreshed(),
            scratch: self.env.scratch.is_some(),
            contents,
            lessons: self.book.lessons(),
            size: None,
            inside: None,
            tried: self.adaptations.of(&Key::new(&desired.namespace, &desired.name)),
        };
        let located = plan::locate(desired, &world);
        if let Some(located) = &located {
            world.size = self.sizes.of(located);
            world.inside = self.insides.of(located);
            self.placements.located(desired, located);
            let uuid = located.instance.uuid();
            world.claims = uuid
                .map(|u| self.placements.claims(u, &self.book, &self.registry))
                .unwrap_or_default();
        }
        (world, located)
    }

    /// Creates the record of a move, its slots being taken. `None`: somebody else was faster.
    async fn create(&self, desired: &Desired, spec: &InstanceMoveSpec) -> Result<Option<Record>, RecordError> {
        let created = self.create_next(desired, spec).await;
        if let Ok(Some(record)) = &created {
            self.book.put(record.clone());
        }
        self.book.unreserve(&desired.uid);
        created
    }

    async fn create_next(&self, desired: &Desired, spec: &InstanceMoveSpec) -> Result<Option<Record>, RecordError> {
        if !self.env.may_act() {
            return Ok(None);
        }
        let stored = self.records.list(&desired.namespace).await?;
        let mine = || stored.iter().filter(|r| r.spec.placement_uid == desired.uid);
        if mine().any(|r| !r.finished()) {
            self.book.load(&desired.namespace, stored);
            return Ok(None);
        }
        let attempt = 1 + mine().map(|r| r.spec.attempt).max().unwrap_or(0);
        let record = Record {
            namespace: desired.namespace.clone(),
            name: record_name(&desired.name, &desired.uid, attempt),
            version: String::new(),
            deleting: false,
            spec: InstanceMoveSpec {
                attempt,
                ..spec.clone()
            },
            status: InstanceMoveStatus::default(),
        };
        match self.records.create(&record).await {
            Ok(record) => Ok(Some(record)),
            Err(RecordError::Conflict(_)) => Ok(None),
            Err(error @ (RecordError::NotFound(_) | RecordError::Unavailable(_))) => Err(error),
        }
    }
}

fn sooner(a: Option<Duration>, b: Option<Duration>) -> Option<Duration> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn route_of(spec: &InstanceMoveSpec) -> Route {
    Route {
        from: spec.from.fingerprint.clone(),
        to: spec.to.fingerprint.clone(),
    }
}

/// Name of a record: two processes that make the same attempt collide.
pub(crate) fn record_name(placement: &str, uid: &str, attempt: i64) -> String {
    const CHARACTERS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    // FNV-1a, finished by a multiplication that spreads the last bytes over all bits
    let hash = format!("{uid}/{attempt}")
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
            (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
        });
    let mut rest = (hash ^ (hash >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 16;
    let mut suffix = String::new();
    for _ in 0..5 {
        let index = usize::try_from(rest % 36).unwrap_or(0);
        suffix.push(char::from(CHARACTERS[index]));
        rest /= 36;
    }
    let stem: String = placement.chars().take(57).collect();
    format!("{}-{suffix}", stem.trim_end_matches(['-', '.']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_of_a_placement_have_names_of_their_own_that_every_process_derives_alike() {
        let uid = "0b5c7f3e-7a55-4d5e-9a3d-0d7a8f1f2a11";
        let first = record_name("web-1", uid, 1);
        assert_eq!(first, record_name("web-1", uid, 1));
        assert_ne!(first, record_name("web-1", uid, 2));
        assert!(first.starts_with("web-1-") && first.len() == 11, "{first}");
        let long = record_name(&format!("{}.b", "a".repeat(56)), uid, 1);
        assert!(long.len() <= 63 && !long.contains(".-"), "{long}");
    }
}
