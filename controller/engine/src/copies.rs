//! Carries InstanceCopies on: looks at both ends, has berth-core decide, writes the status, then carries out the effect,
//! as `drive` does for moves. Copies and moves share the limits of the servers.

use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;
use std::time::Duration;

use berth_api::moves::{MoveEnd, MoveNames};
use berth_api::present;
use berth_core::copies::{
    self, CopyRecord, CopyRecords, CopyView, Look, Sought, Told, Transition, reads, sought, told,
};
use berth_core::moves::{Effect, End, EndView, Read, Request, Task};
use berth_core::plan::World;
use berth_core::records::RecordError;
use futures::future::join;
use jiff::Timestamp;
use tokio::time::{Instant, timeout};

use crate::book::{Copying, Route};
use crate::drive::{learn, random, read_all};
use crate::engine::Engine;
use crate::registry::Silent;
use crate::tasks::{Pair, Tasks};
use crate::{Change, Changes, Key, lock};

/// How long a pass waits for an effect before it returns.
const ATTEND: Duration = Duration::from_secs(3);
/// When to look again after something outside stood in the way.
const RETRY: Duration = Duration::from_secs(1);
/// Changes by others that one pass puts up with.
const CONFLICTS: usize = 10;

/// What is remembered of the copies.
pub(crate) struct Copies {
    tasks: Tasks,
    known: Mutex<HashMap<Key, Known>>,
    /// Since when an end has not answered.
    silent: Mutex<HashMap<(Key, End), Timestamp>>,
}

struct Known {
    /// Of the copy and of its source.
    uuids: [Option<String>; 2],
    /// InstanceServers of source and target; `None`: the source may be anywhere.
    servers: [Option<String>; 2],
    incoming: Option<String>,
    /// Under which name it rests, or will.
    name: Option<String>,
}

/// Told of what is worth telling people, in the moment in which it happens.
pub type Tell<'a> = &'a (dyn Fn(Told) + Send + Sync);

/// Where a pass left a copy.
#[derive(Clone, Debug)]
pub struct CopyPass {
    /// The record as it is stored.
    pub record: CopyRecord,
    /// When to look again at the latest; `None`: when something changes.
    pub look_again: Option<Duration>,
}

/// What one step saw, apart from both ends.
struct Scene {
    world: World,
    sought: Sought,
}

impl Copies {
    pub fn new(changes: Changes) -> Self {
        Self {
            // copies do not come by backup
            tasks: Tasks::new(changes, None),
            known: Mutex::default(),
            silent: Mutex::default(),
        }
    }

    /// Forgets everything, effects under way included.
    pub fn forget_all(&self) {
        self.tasks.clear();
        lock(&self.silent).clear();
    }

    /// Whether that unique name belongs to a copy that is being made or refreshed.
    pub fn is_in_hand(&self, name: &str) -> bool {
        lock(&self.known).values().any(|k| k.incoming.as_deref() == Some(name))
    }

    fn since(&self, key: &Key, end: End, now: Timestamp, since: Option<Timestamp>) -> Timestamp {
        let mut silent = lock(&self.silent);
        let first = silent.entry((key.clone(), end)).or_insert(now);
        *first = since.map_or(*first, |s| s.min(*first));
        *first
    }
}

fn key_of(record: &CopyRecord) -> Key {
    Key::new(&record.namespace, &record.name)
}

/// Under which key the tasks know the work on a copy.
fn task_key(copy: &Key) -> Key {
    Key::new(&copy.namespace, format!("copy/{}", copy.name))
}

impl Engine {
    /// A copy exists, is new or has changed: its slots count from now on.
    pub fn copy_seen(&self, record: &CopyRecord) {
        let (spec, status) = (&record.spec, &record.status);
        let known = Known {
            uuids: [status.uuid.clone(), status.source_uuid.clone()],
            servers: [
                present(&spec.source.server).map(str::to_owned),
                Some(spec.target.server.clone()),
            ],
            incoming: status.incoming.clone(),
            name: present(&status.name).or(present(&spec.target.name)).map(str::to_owned),
        };
        lock(&self.copies().known).insert(key_of(record), known);
        self.count(record);
    }

    /// Takes or frees the slots of a copy.
    fn count(&self, record: &CopyRecord) {
        let copying = record.status.current.as_ref().map(|work| Copying {
            route: Route {
                from: work.from.fingerprint.clone(),
                to: work.to.fingerprint.clone(),
            },
            source: work.from.uuid.clone().unwrap_or_default(),
            refreshes: record.refreshes(),
        });
        if self.book().copying(&key_of(record), copying) {
            self.say_admissible();
        }
    }

    /// A copy's object is gone.
    pub fn copy_gone(&self, key: &Key) {
        lock(&self.copies().known).remove(key);
        lock(&self.copies().silent).retain(|(k, _), _| k != key);
        self.copies().tasks.seen(&task_key(key));
        if self.book().copying(key, None) {
            self.say_admissible();
        }
    }

    /// The copies that have to be looked at after a change.
    pub fn concerned_copies(&self, change: &Change) -> Vec<Key> {
        let known = lock(&self.copies().known);
        let keys = |fits: &dyn Fn(&Key, &Known) -> bool| {
            let fitting = known.iter().filter(|(key, k)| fits(key, k));
            fitting.map(|(key, _)| key.clone()).collect::<Vec<_>>()
        };
        match change {
            Change::Instance { uuid, at, .. } => keys(&|_, k| {
                let same = k.uuids.iter().flatten().any(|u| Some(u) == uuid.as_ref());
                same || k.name.as_ref() == Some(&at.name)
            }),
            Change::Server { key, fingerprint } => {
                let same = fingerprint
                    .as_ref()
                    .map(|f| self.registry().keys_of(f))
                    .unwrap_or_default();
                let servers: BTreeSet<Key> = same.into_iter().chain([key.clone()]).collect();
                keys(&|copy, k| {
                    servers.iter().any(|s| {
                        let of = |name: &Option<String>| name.as_ref().is_none_or(|n| *n == s.name);
                        s.namespace == copy.namespace && k.servers.iter().any(of)
                    })
                })
            }
            Change::Move { record } => {
                let name = record.name.strip_prefix("copy/");
                name.map(|n| Key::new(&record.namespace, n)).into_iter().collect()
            }
            Change::Placement { .. } => Vec::new(),
        }
    }

    /// Looks at a copy and does what is to be done.
    pub async fn reconcile_copy(
        &self,
        records: &dyn CopyRecords,
        mut record: CopyRecord,
        tell: Tell<'_>,
    ) -> Result<CopyPass, RecordError> {
        let key = key_of(&record);
        self.copy_seen(&record);
        self.load_book(&record.namespace).await?;
        let mut conflicts = 0;
        loop {
            if !self.env().may_act() {
                return Ok(passed(record, Some(RETRY)));
            }
            let (look, began) = match self.copy_pass(records, &key, &mut record, tell).await {
                Ok(done) => done,
                Err(RecordError::Conflict(_)) if conflicts < CONFLICTS => {
                    conflicts += 1;
                    record = records.load(&key.namespace, &key.name).await?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let busy = matches!(self.copies().tasks.task(&task_key(&key)), Task::Busy { .. });
            let after = match look {
                Look::Done => return Ok(passed(record, None)),
                Look::Now if !began => continue,
                Look::Now => Duration::ZERO,
                Look::After(after) => after,
            };
            if busy {
                let ended = timeout(ATTEND, self.copies().tasks.ended(&task_key(&key))).await;
                if ended.is_err() && matches!(self.copies().tasks.task(&task_key(&key)), Task::Busy { .. }) {
                    return Ok(passed(record, Some(after.max(RETRY))));
                }
                continue;
            }
            if !after.is_zero() {
                return Ok(passed(record, Some(after)));
            }
        }
    }

    /// One look, one step, one write, one effect.
    async fn copy_pass(
        &self,
        records: &dyn CopyRecords,
        key: &Key,
        record: &mut CopyRecord,
        tell: Tell<'_>,
    ) -> Result<(Look, bool), RecordError> {
        let (task_key, tasks) = (task_key(key), &self.copies().tasks);
        tasks.drop_foreign(&task_key, names(record).as_ref());
        let task = tasks.task(&task_key);
        let idle = task == Task::Idle;
        let outcome = tasks.outcome(&task_key).filter(|_| idle);
        let scene = self.scene(record);
        let (source, target) = self.look_at_copy(key, record, &scene, idle).await;
        let answered = [&source, &target]
            .iter()
            .all(|e| matches!(e, EndView::Reachable { .. }));
        let now = self.env().now();
        let mut view = CopyView {
            world: scene.world,
            sought: scene.sought,
            source,
            target,
            task,
            outcome,
            progress: tasks.progress(&task_key),
            random: random(),
            lease_is_safe: self.env().lease_is_safe(),
            has_slots: false,
        };
        let transition = self.decide_copy(key, record, &mut view, now);
        let changed = self.store_copy(records, record, &transition, tell).await?;
        if view.outcome.is_some() && (changed || transition.effect.is_some() || answered) {
            tasks.seen(&task_key);
        }
        Ok(match transition.effect {
            None => (transition.look, false),
            Some(effect) => match self.begin_for_copy(key, record, effect) {
                true => (transition.look, true),
                false => (Look::After(RETRY), false),
            },
        })
    }

    /// The step, while nobody else takes slots.
    fn decide_copy(&self, key: &Key, record: &CopyRecord, view: &mut CopyView, now: Timestamp) -> Transition {
        let _starting = lock(self.starting());
        view.has_slots = self.has_slots(key, record, view, now);
        let transition = copies::step(record, view, now);
        if transition.record.status.current.is_some() {
            self.count(&transition.record);
        }
        transition
    }

    fn has_slots(&self, key: &Key, record: &CopyRecord, view: &CopyView, now: Timestamp) -> bool {
        let Sought::Found(located) = &view.sought else {
            return false;
        };
        let target = view.world.servers.get(&record.spec.target.server);
        let Some(to) = target.and_then(|t| t.fingerprint()) else {
            return false;
        };
        let route = Route {
            from: located.fingerprint.clone(),
            to: to.to_owned(),
        };
        let source = located.instance.uuid().unwrap_or_default();
        let mut usage = self.book().usage(now);
        !self.book().is_copied(source, key) && route.try_take(&mut usage, &self.registry().limits())
    }

    /// Writes what changed, holds or lets go of the object, and takes note of what is worth telling.
    async fn store_copy(
        &self,
        records: &dyn CopyRecords,
        record: &mut CopyRecord,
        transition: &Transition,
        tell: Tell<'_>,
    ) -> Result<bool, RecordError> {
        let mut wanted = transition.record.clone();
        if transition.hold && !record.held {
            let held = records.hold(record).await?;
            if held.generation != record.generation {
                return Err(RecordError::Conflict(format!("hold InstanceCopy {}", record.name)));
            }
            (wanted.version, wanted.held) = (held.version, true);
        }
        let changed = wanted.status != record.status;
        if changed {
            let old = std::mem::replace(record, records.swap(&wanted).await?);
            if let Some(told) = told(&old.status, &wanted.status) {
                tell(told);
            }
            if wanted.status.current.is_some() && record.status.current.is_none() {
                // nothing may be begun that is not written down
                let what =
                    "the installed definition of InstanceCopy drops status.current: it is older than this program";
                return Err(RecordError::Unavailable(what.to_owned()));
            }
        } else {
            *record = wanted;
        }
        self.copy_seen(record);
        if !transition.hold && record.held {
            *record = records.release(record).await?;
        }
        Ok(changed)
    }

    /// Everything that is known without asking.
    fn scene(&self, record: &CopyRecord) -> Scene {
        let now = self.env().now();
        let world = World {
            servers: self.registry().views(&record.namespace, &self.book().usage(now)),
            open_moves: self.book().open_names(),
            ..World::default()
        };
        let placement = present(&record.spec.source.placement);
        let placement = placement.map(|name| self.placements().source(&Key::new(&record.namespace, name)));
        let sought = sought(record, &world, placement.as_ref(), &self.book().moving(now));
        Scene { world, sought }
    }

    async fn look_at_copy(&self, key: &Key, record: &CopyRecord, scene: &Scene, idle: bool) -> (EndView, EndView) {
        let unseen = || EndView::Unreachable {
            since: self.env().now(),
            message: String::new(),
        };
        let Some(work) = record.status.current.as_ref().filter(|_| idle) else {
            return (unseen(), unseen());
        };
        let reads = reads(record, &scene.world, &scene.sought);
        let from = match &scene.sought {
            Sought::Found(located) => Some(MoveEnd {
                server: located.server.clone(),
                fingerprint: located.fingerprint.clone(),
                ..MoveEnd::default()
            }),
            Sought::Missing(_) | Sought::Later { .. } => None,
        };
        let source = async {
            match &from {
                Some(from) => {
                    self.look_at_end(key, &record.namespace, (End::Source, from), &reads)
                        .await
                }
                None => unseen(),
            }
        };
        join(
            source,
            self.look_at_end(key, &record.namespace, (End::Target, &work.to), &reads),
        )
        .await
    }

    async fn look_at_end(&self, key: &Key, namespace: &str, (end, place): (End, &MoveEnd), reads: &[Read]) -> EndView {
        let now = self.env().now();
        let unreachable = |since, message| EndView::Unreachable {
            since: self.copies().since(key, end, now, since),
            message,
        };
        let reached = match self.registry().end(namespace, place) {
            Ok(reached) => reached,
            Err(Silent { since, message }) => return unreachable(since, message),
        };
        let began = Instant::now();
        match read_all(reached.follower.server().as_ref(), end, reads).await {
            Ok((copies, operations)) => {
                lock(&self.copies().silent).remove(&(key.clone(), end));
                learn(&reached, end, reads, &copies, began);
                EndView::Reachable {
                    facts: reached.facts,
                    copies,
                    operations,
                    strays: Vec::new(),
                }
            }
            Err(error) => {
                if error.is_transient() {
                    reached.follower.suspect(&error);
                }
                unreachable(None, error.to_string())
            }
        }
    }

    /// Starts an effect, if this process still may.
    fn begin_for_copy(&self, key: &Key, record: &CopyRecord, effect: Effect) -> bool {
        let unconditional = matches!(effect.request, Request::Rename { .. });
        if !self.env().may_act() || (unconditional && !self.env().lease_is_safe()) {
            return false;
        }
        let (tasks, task_key) = (&self.copies().tasks, task_key(key));
        if matches!(effect.request, Request::Cancel) {
            tasks.cancel(&task_key);
            return true;
        }
        let Some(work) = &record.status.current else {
            return false;
        };
        let place = |end| match end {
            End::Source => &work.from,
            End::Target => &work.to,
        };
        let reach = |end| self.registry().end(&record.namespace, place(end)).ok();
        let Some(reached) = reach(effect.end) else { return false };
        let pair = match &effect.request {
            Request::Transfer(_) => match (reach(End::Source), reach(End::Target)) {
                (Some(source), Some(target)) => Some(Pair {
                    source: source.side(),
                    target: target.side(),
                }),
                (None, _) | (_, None) => return false,
            },
            _ => None,
        };
        tasks.spawn(&task_key, names(record), effect, reached.follower.server(), pair);
        true
    }
}

/// What tells the effects of one attempt from those of another.
fn names(record: &CopyRecord) -> Option<MoveNames> {
    let incoming = record.status.incoming.clone()?;
    Some(MoveNames {
        incoming: Some(incoming),
        retired: None,
        leaving: None,
        backup: None,
    })
}

fn passed(record: CopyRecord, look_again: Option<Duration>) -> CopyPass {
    CopyPass { record, look_again }
}
