//! Passes over one open move: read what the step needs, let berth-core decide, write the record, then carry out the
//! effect, until there is nothing to do at once. A whole short move runs in one call. What to do is not decided here.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_api::Step;
use berth_api::moves::MoveEnd;
use berth_core::marks;
use berth_core::model::{Fresh, InstanceRef, Inventory, Snapshot};
use berth_core::moves::{self, Copy, Effect, End, EndView, Look, Outcome, Read, Request, Task, View, Wish};
use berth_core::records::{Record, RecordError, Records};
use berth_core::server::{FailureKind, Operation, Server, ServerError};
use futures::future::{join, try_join, try_join_all};
use jiff::Timestamp;
use rand::Rng;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use crate::registry::{Reached, Registry, Silent};
use crate::tasks::{Pair, Tasks};
use crate::{Changes, Env, Key, lock};

/// How long a pass waits for an effect before it returns and lets others act.
const ATTEND: Duration = Duration::from_secs(3);
/// When to look again after something outside (lease, records) stood in the way.
const RETRY: Duration = Duration::from_secs(1);

/// Carries moves on. One value for all of them.
pub struct Driver {
    env: Env,
    registry: Arc<Registry>,
    records: Arc<dyn Records>,
    tasks: Tasks,
    /// Since when an end of a move has not answered.
    silent: Mutex<HashMap<(Key, End), Timestamp>>,
    /// Records that this process holds.
    held: Mutex<HashSet<Key>>,
}

/// What the placement wants of the record now.
pub type WishOf<'a> = &'a (dyn Fn(&Record, Timestamp) -> Wish + Send + Sync);
/// Told of every record as it is written.
pub type Told<'a> = &'a (dyn Fn(&Record) + Send + Sync);

/// What one call needs besides the record.
pub struct Orders<'a> {
    /// What the placement wants.
    pub wish: WishOf<'a>,
    /// Names of all moves that are not finished.
    pub open_moves: Vec<String>,
    /// Interrupts the call between two requests: the placement or the record changed.
    pub interrupt: &'a Notify,
    /// Told of every record as it is written.
    pub written: Told<'a>,
}

/// Where a call left a move.
#[derive(Clone, Debug)]
pub struct Driven {
    /// The record as it is stored.
    pub record: Record,
    /// When to look again, at the latest; `None`: it is over.
    pub look_again: Option<Duration>,
}

impl Driver {
    /// Moves of these servers, with these records.
    pub fn new(env: Env, registry: Arc<Registry>, records: Arc<dyn Records>, changes: Changes) -> Self {
        Self {
            registry,
            records,
            tasks: Tasks::new(changes, env.scratch.clone()),
            silent: Mutex::default(),
            held: Mutex::default(),
            env,
        }
    }

    /// Carries a move on until it waits for something, is over, or is interrupted.
    pub async fn drive(&self, record: Record, orders: &Orders<'_>) -> Result<Driven, RecordError> {
        let key = Key::new(&record.namespace, &record.name);
        if record.finished() {
            return Ok(self.over(&key, record));
        }
        if !self.env.may_act() {
            return Ok(driven(record, RETRY));
        }
        // boxed, as all that follows: a pass within passes is more than a thread's stack takes
        if lock(&self.held).contains(&key) {
            return Box::pin(self.carry_on(&key, (record, None), orders, Record::finished)).await;
        }
        let outcome = self.tasks.outcome(&key);
        let idle = self.tasks.task(&key) == Task::Idle;
        let looking = self.look(&key, &record, outcome.as_ref(), idle);
        let (held, seen) = Box::pin(join(self.records.hold(&record), looking)).await;
        let held = held?;
        lock(&self.held).insert(key.clone());
        // what was written by others meanwhile may name other places
        let ahead = (idle && held.version == record.version).then_some(seen);
        Box::pin(self.carry_on(&key, (held, ahead), orders, Record::finished)).await
    }

    /// Deletes the source that a finished move kept, and forgets it; whether its time is over is for the caller to know.
    pub async fn end_kept(&self, record: Record, orders: &Orders<'_>) -> Result<Driven, RecordError> {
        let key = Key::new(&record.namespace, &record.name);
        if !self.env.may_act() {
            return Ok(driven(record, RETRY));
        }
        Box::pin(self.carry_on(&key, (record, None), orders, |r| !moves::has_kept(r))).await
    }

    /// Passes until nothing is to be done at once. The look of the first may have been made already.
    async fn carry_on(
        &self,
        key: &Key,
        (mut record, mut ahead): (Record, Option<(EndView, EndView)>),
        orders: &Orders<'_>,
        is_over: fn(&Record) -> bool,
    ) -> Result<Driven, RecordError> {
        loop {
            let (look, began) = match Box::pin(self.pass(key, &mut record, &mut ahead, orders)).await {
                Ok(done) => done,
                // somebody else wrote: what they wrote counts
                Err(RecordError::Conflict(_)) => {
                    record = self.records.load(&key.namespace, &key.name).await?;
                    (Look::Now, false)
                }
                Err(error @ (RecordError::NotFound(_) | RecordError::Unavailable(_))) => {
                    // it may have been written all the same: it is read again before anything else is done
                    lock(&self.held).remove(key);
                    return Err(error);
                }
            };
            if is_over(&record) {
                return Ok(self.over(key, record));
            }
            let busy = matches!(self.tasks.task(key), Task::Busy { .. });
            let after = match look {
                Look::Done => {
                    return Ok(Driven {
                        record,
                        look_again: None,
                    });
                }
                // only the record changed, perhaps to an undo that cancels what is under way
                Look::Now if !began => continue,
                Look::Now => Duration::ZERO,
                Look::After(after) => after,
            };
            if busy {
                tokio::select! {
                    // what ends just after the wait is told to others
                    ended = self.attend(key) => match ended {
                        true => continue,
                        false => return Ok(driven(record, after.max(RETRY))),
                    },
                    () = orders.interrupt.notified() => return Ok(driven(record, Duration::ZERO)),
                }
            }
            if !after.is_zero() {
                return Ok(driven(record, after));
            }
        }
    }

    /// One look, one step, one write, one effect. Says when to look again, and whether an effect was begun. If the next
    /// pass follows at once, its look is made `ahead`, while the record is written.
    async fn pass(
        &self,
        key: &Key,
        record: &mut Record,
        ahead: &mut Option<(EndView, EndView)>,
        orders: &Orders<'_>,
    ) -> Result<(Look, bool), RecordError> {
        self.tasks.drop_foreign(key, record.status.names.as_ref());
        let task = self.tasks.task(key);
        let idle = task == Task::Idle;
        let outcome = self.tasks.outcome(key).filter(|_| idle);
        let (source, target) = match ahead.take() {
            Some(seen) => seen,
            None => self.look(key, record, outcome.as_ref(), idle).await,
        };
        let answered = [&source, &target]
            .iter()
            .all(|e| matches!(e, EndView::Reachable { .. }));
        let now = self.env.now();
        let view = View {
            source,
            target,
            task,
            outcome,
            wish: (orders.wish)(record, now),
            open_moves: orders
                .open_moves
                .iter()
                .filter(|n| **n != record.name)
                .cloned()
                .collect(),
            random: random(),
            lease_is_safe: self.env.lease_is_safe(),
        };
        let transition = moves::step(record, &view, now);
        let changed = transition.record != *record;
        let (mut effect, mut begun) = (transition.effect, None);
        if changed {
            if !self.env.may_act() {
                return Ok((Look::After(RETRY), false));
            }
            let next = &transition.record;
            if let Some(effect) = effect.take_if(|_| transition.beside) {
                self.tasks.seen(key);
                begun = Some(self.begin(key, next, effect));
            }
            let write = async {
                let stored = self.records.swap(next).await?;
                (orders.written)(&stored);
                Ok(stored)
            };
            let at_once = effect.is_none() && begun.is_none() && transition.look == Look::Now;
            *record = if at_once && idle && !next.finished() {
                let (stored, seen) = join(write, self.look(key, next, None, idle)).await;
                let stored = stored?;
                *ahead = Some(seen);
                stored
            } else {
                write.await?
            };
        }
        // an outcome that the step could not use, because it waits for an end, is shown again
        if begun.is_none() && view.outcome.is_some() && (changed || effect.is_some() || answered) {
            self.tasks.seen(key);
        }
        Ok(match begun.or_else(|| Some(self.begin(key, record, effect?))) {
            None => (transition.look, false),
            Some(true) => (transition.look, true),
            Some(false) => (Look::After(RETRY), false),
        })
    }

    /// Starts an effect, if this process still may.
    fn begin(&self, key: &Key, record: &Record, effect: Effect) -> bool {
        let unconditional = matches!(
            effect.request,
            Request::Stop { .. } | Request::ForceStop | Request::Rename { .. }
        ) || (matches!(effect.request, Request::Remove) && !marks::is_unique_name(&effect.at.name));
        if !self.env.may_act() || (unconditional && !self.env.lease_is_safe()) {
            return false;
        }
        if matches!(effect.request, Request::Cancel) {
            self.tasks.cancel(key);
            return true;
        }
        let reach = |end| self.registry.end(&record.namespace, place_of(record, end)).ok();
        let Some(reached) = reach(effect.end) else { return false };
        let pair = match &effect.request {
            Request::Transfer(_) | Request::Backup(_) | Request::RemoveAnd { .. } => {
                match (reach(End::Source), reach(End::Target)) {
                    (Some(source), Some(target)) => Some(Pair {
                        source: source.side(),
                        target: target.side(),
                    }),
                    (None, _) | (_, None) => return false,
                }
            }
            _ => None,
        };
        let names = record.status.names.clone();
        self.tasks.spawn(key, names, effect, reached.follower.server(), pair);
        true
    }

    /// A move that is over. What both servers hold is known from its last pass.
    fn over(&self, key: &Key, record: Record) -> Driven {
        self.forget(key);
        Driven {
            record,
            look_again: None,
        }
    }

    pub(crate) fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// Waits a moment for a task; whether it ended.
    pub(crate) async fn attend(&self, key: &Key) -> bool {
        timeout(ATTEND, self.tasks.ended(key)).await.is_ok() || self.tasks.task(key) == Task::Idle
    }

    /// Forgets everything about records, effects under way included.
    pub(crate) fn forget_all(&self) {
        self.tasks.clear();
        lock(&self.held).clear();
        lock(&self.silent).clear();
    }

    /// Forgets what was kept in memory for a record.
    pub fn forget(&self, key: &Key) {
        lock(&self.held).remove(key);
        lock(&self.silent).retain(|(k, _), _| k != key);
        self.tasks.seen(key);
    }

    async fn look(&self, key: &Key, record: &Record, outcome: Option<&Outcome>, idle: bool) -> (EndView, EndView) {
        if !idle {
            // nothing is decided from the servers while an effect is under way
            let unseen = EndView::Unreachable {
                since: self.env.now(),
                message: String::new(),
            };
            return (unseen.clone(), unseen);
        }
        let reads = moves::reads(record, outcome);
        if moves::is_internal(record) {
            let both = self.look_at(key, record, End::Source, &reads).await;
            return (both.clone(), both);
        }
        join(
            self.look_at(key, record, End::Source, &reads),
            self.look_at(key, record, End::Target, &reads),
        )
        .await
    }

    async fn look_at(&self, key: &Key, record: &Record, end: End, reads: &[Read]) -> EndView {
        let reached = match self.registry.end(&record.namespace, place_of(record, end)) {
            Ok(reached) => reached,
            Err(Silent { since, message }) => return self.unreachable(key, end, since, message),
        };
        let server = reached.follower.server();
        let suspected = match end {
            End::Source => Vec::new(),
            End::Target => strays(record, &reached.instances),
        };
        let mut reads = reads.to_vec();
        reads.extend(leftovers(record, &reached.instances, &reads));
        let reads = reads.as_slice();
        let (began, read) = (Instant::now(), read_all(server.as_ref(), end, reads));
        match try_join(read, confirmed(server.as_ref(), record, suspected)).await {
            Ok(((copies, operations), strays)) => {
                lock(&self.silent).remove(&(key.clone(), end));
                learn(&reached, end, reads, &copies, began);
                EndView::Reachable {
                    facts: reached.facts,
                    copies,
                    operations,
                    strays,
                }
            }
            Err(error) => {
                self.report(&reached, &error);
                self.unreachable(key, end, None, error.to_string())
            }
        }
    }

    fn report(&self, reached: &Reached, error: &ServerError) {
        let lost = matches!(
            error.kind,
            FailureKind::Unreachable | FailureKind::Unknown | FailureKind::CertificateMismatch
        );
        if lost {
            reached.follower.suspect(error);
        }
    }

    fn unreachable(&self, key: &Key, end: End, since: Option<Timestamp>, message: String) -> EndView {
        let mut silent = lock(&self.silent);
        let first = silent.entry((key.clone(), end)).or_insert_with(|| self.env.now());
        *first = since.map_or(*first, |s| s.min(*first));
        EndView::Unreachable { since: *first, message }
    }
}

fn place_of(record: &Record, end: End) -> &MoveEnd {
    match end {
        End::Source => &record.spec.from,
        End::Target => &record.spec.to,
    }
}

fn driven(record: Record, after: Duration) -> Driven {
    Driven {
        record,
        look_again: Some(after),
    }
}

/// What was read for a move since `began` is known to everybody else, too.
pub(crate) fn learn(reached: &Reached, end: End, reads: &[Read], copies: &[Copy], began: Instant) {
    for read in reads {
        match read {
            Read::Instance { end: e, at, .. } if *e == end => {
                let fresh = copies
                    .iter()
                    .find(|c| c.fresh.instance.at == *at)
                    .map(|c| c.fresh.clone());
                reached.follower.learn(at, fresh, began);
            }
            Read::Instance { .. } | Read::Operations(_) => {}
        }
    }
}

/// All reads of one end at the same time.
pub(crate) async fn read_all(
    server: &dyn Server,
    end: End,
    reads: &[Read],
) -> Result<(Vec<Copy>, Vec<Operation>), ServerError> {
    let instances = reads.iter().filter_map(|read| match read {
        Read::Instance { end: e, at, snapshots } if *e == end => Some(read_copy(server, at, *snapshots)),
        Read::Instance { .. } | Read::Operations(_) => None,
    });
    let wants_operations = reads.contains(&Read::Operations(end));
    let operations = async {
        if wants_operations {
            server.operations().await
        } else {
            Ok(Vec::new())
        }
    };
    let (copies, operations) = try_join(try_join_all(instances), operations).await?;
    Ok((copies.into_iter().flatten().collect(), operations))
}

async fn read_copy(server: &dyn Server, at: &InstanceRef, snapshots: bool) -> Result<Option<Copy>, ServerError> {
    let list = async {
        if snapshots {
            server.snapshots(at).await.map(Some)
        } else {
            Ok(None)
        }
    };
    let (fresh, list): (Result<Option<Fresh>, _>, Result<Option<Vec<Snapshot>>, _>) =
        join(server.instance(at), list).await;
    let Some(fresh) = fresh? else { return Ok(None) };
    Ok(Some(Copy {
        fresh,
        snapshots: list?,
    }))
}

/// Where else the instance is on a server that moves it itself: under a name of the server's own, if it was interrupted.
fn leftovers(record: &Record, instances: &Inventory, known: &[Read]) -> Vec<Read> {
    let uuid = record.spec.from.uuid.as_deref().filter(|_| moves::is_internal(record));
    let asked = |at: &InstanceRef| {
        known
            .iter()
            .any(|r| matches!(r, Read::Instance { at: k, .. } if k == at))
    };
    let others = uuid.into_iter().flat_map(|uuid| instances.by_uuid(uuid));
    let read = others.filter(|i| !asked(&i.at)).map(|i| Read::Instance {
        end: End::Source,
        at: i.at.clone(),
        snapshots: false,
    });
    read.collect()
}

/// Copies that late requests made under names that the record no longer uses. Only looked for where they are removed.
fn strays(record: &Record, instances: &Inventory) -> Vec<InstanceRef> {
    let removed_here = match record.status.step() {
        Some(Step::Retired | Step::Undoing) => true,
        // one of them may be what keeps the instance from starting
        Some(Step::Committed) => record.status.last_error.is_some(),
        _ => false,
    };
    if !removed_here {
        return Vec::new();
    }
    let names = record.status.names.as_ref();
    let current =
        |name: &str| names.is_some_and(|n| n.incoming.as_deref() == Some(name) || n.retired.as_deref() == Some(name));
    instances
        .iter()
        .filter(|i| marks::move_id(i) == Some(record.name.as_str()))
        .filter(|i| marks::is_unique_name(&i.at.name) && !current(&i.at.name))
        .map(|i| i.at.clone())
        .collect()
}

/// Those that still exist and carry the record's mark, read afresh.
async fn confirmed(
    server: &dyn Server,
    record: &Record,
    suspected: Vec<InstanceRef>,
) -> Result<Vec<InstanceRef>, ServerError> {
    let fresh = try_join_all(suspected.iter().map(|at| server.instance(at))).await?;
    let ours = fresh
        .into_iter()
        .flatten()
        .map(|f| f.instance)
        .filter(|i| marks::move_id(i) == Some(record.name.as_str()) && !i.may_run());
    Ok(ours.map(|i| i.at).collect())
}

/// Eight characters for a name that was never used before.
pub(crate) fn random() -> String {
    const CHARACTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let mut rng = rand::rng();
    (0..8)
        .map(|_| char::from(CHARACTERS[rng.random_range(0..CHARACTERS.len())]))
        .collect()
}
