//! What this process itself carries out for each move, one effect at a time. Each runs in a task of its own and keeps its
//! outcome until a step has seen it; all of them end with this value, as they would if the process died.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_api::moves::MoveNames;
use berth_core::model::{InstanceRef, Power};
use berth_core::moves::{Effect, EffectKind, Outcome, Request, Spent, Task};
use berth_core::server::{FailureKind, OperationId, PowerAction, Progress, Result, Server, ServerError};
use futures::future::join;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use crate::backup::{self, Scratch};
use crate::freeze;
use crate::transfer::{self, Side};
use crate::{Change, Changes, Key, lock};

/// A server gets that much longer for a stop than the guest.
const GRACE: Duration = Duration::from_secs(5);
/// How often an instance is looked at that another stop brings down.
const LOOK: Duration = Duration::from_millis(500);
/// Progress is shown at most that often.
const PROGRESS: Duration = Duration::from_secs(5);

/// The effects under way, by record.
pub(crate) struct Tasks {
    changes: Changes,
    scratch: Option<Arc<dyn Scratch>>,
    slots: Mutex<HashMap<Key, Slot>>,
}

struct Slot {
    shared: Arc<Shared>,
    abort: AbortHandle,
}

struct Shared {
    effect: EffectKind,
    /// The names in the record when it began: with others it belongs to the past.
    names: Option<MoveNames>,
    state: Mutex<State>,
    ended: watch::Sender<bool>,
    cancel: watch::Sender<u32>,
}

#[derive(Default)]
struct State {
    result: Option<(Result<()>, Spent)>,
    /// When the first of a transfer's two operations ended.
    first_end: Option<Instant>,
    progress: Option<Progress>,
    shown: Option<(Instant, Progress)>,
    /// Whether a pass waits for the end: then nobody else has to be told.
    awaited: bool,
}

impl State {
    /// What one end told: the two are not equally far, and only one of them may tell at all.
    fn further(&mut self, told: Progress) {
        let known = self.progress.unwrap_or_default();
        self.progress = Some(Progress {
            bytes: told.bytes.max(known.bytes),
            bytes_per_second: told.bytes_per_second,
            percent: told.percent,
        });
    }
}

/// The two ends of a transfer.
pub(crate) struct Pair {
    pub source: Side,
    pub target: Side,
}

impl Tasks {
    pub fn new(changes: Changes, scratch: Option<Arc<dyn Scratch>>) -> Self {
        Self {
            changes,
            scratch,
            slots: Mutex::default(),
        }
    }

    /// What is being done for the move, as a step sees it.
    pub fn task(&self, record: &Key) -> Task {
        let slots = lock(&self.slots);
        let Some(slot) = slots.get(record) else {
            return Task::Idle;
        };
        let mut state = lock(&slot.shared.state);
        if state.result.is_some() {
            return Task::Idle;
        }
        let due = state.shown.is_none_or(|(at, _)| at.elapsed() >= PROGRESS);
        if let (true, Some(p)) = (due, state.progress) {
            state.shown = Some((Instant::now(), p));
        }
        Task::Busy {
            effect: slot.shared.effect,
            progress: state.shown.map(|(_, p)| p),
        }
    }

    /// How far the last effect got.
    pub fn progress(&self, record: &Key) -> Option<Progress> {
        let slots = lock(&self.slots);
        let state = lock(&slots.get(record)?.shared.state);
        state.progress
    }

    /// How the last effect ended, if no step has used that yet.
    pub fn outcome(&self, record: &Key) -> Option<Outcome> {
        let slots = lock(&self.slots);
        let shared = &slots.get(record)?.shared;
        let state = lock(&shared.state);
        let (result, spent) = state.result.clone()?;
        Some(Outcome {
            effect: shared.effect,
            result,
            spent,
            first_end_ago: state.first_end.map(|at| at.elapsed()).unwrap_or_default(),
        })
    }

    /// A step has used the outcome, and what follows from it is written.
    pub fn seen(&self, record: &Key) {
        let mut slots = lock(&self.slots);
        if slots
            .get(record)
            .is_some_and(|s| lock(&s.shared.state).result.is_some())
        {
            slots.remove(record);
        }
    }

    /// Waits until nothing is being done for the move.
    pub async fn ended(&self, record: &Key) {
        let shared = lock(&self.slots).get(record).map(|s| s.shared.clone());
        let Some(shared) = shared else { return };
        lock(&shared.state).awaited = true;
        let awaited = Awaited(&shared);
        // the sender lives in `shared`
        let _ = shared.ended.subscribe().wait_for(|ended| *ended).await;
        drop(awaited);
    }

    /// Cancels the transfer that runs for the move.
    pub fn cancel(&self, record: &Key) {
        if let Some(slot) = lock(&self.slots).get(record) {
            slot.shared.cancel.send_modify(|n| *n += 1);
        }
    }

    /// Drops what was begun for other names than those the record has now: another process went on with the move.
    pub fn drop_foreign(&self, record: &Key, names: Option<&MoveNames>) {
        let mut slots = lock(&self.slots);
        let foreign = slots.get(record).is_some_and(|s| s.shared.names.as_ref() != names);
        let dropped = foreign.then(|| slots.remove(record)).flatten();
        dropped.into_iter().for_each(|slot| slot.abort.abort());
    }

    /// Drops everything.
    pub fn clear(&self) {
        let slots = std::mem::take(&mut *lock(&self.slots));
        slots.values().for_each(|s| s.abort.abort());
    }

    /// Carries out an effect on `server`; a transfer on `pair`. `names` are those in the record.
    pub fn spawn(
        &self,
        record: &Key,
        names: Option<MoveNames>,
        effect: Effect,
        server: Arc<dyn Server>,
        pair: Option<Pair>,
    ) {
        let shared = Arc::new(Shared {
            effect: effect.kind,
            names,
            state: Mutex::default(),
            ended: watch::Sender::new(false),
            cancel: watch::Sender::new(0),
        });
        let (running, changes, key) = (shared.clone(), self.changes.clone(), record.clone());
        let scratch = self.scratch.clone();
        let task = tokio::spawn(async move {
            let began = Instant::now();
            let watched = freeze::watched(&effect, &server, pair.as_ref());
            let work = perform(effect, server.as_ref(), (pair, scratch), &running);
            let (result, frozen) = freeze::during(work, watched).await;
            let time = began.elapsed();
            let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
            match &result {
                Ok(()) => tracing::info!(record = %key, effect = ?running.effect, milliseconds, "done"),
                Err(e) => tracing::warn!(record = %key, effect = ?running.effect, milliseconds, error = %e, "failed"),
            }
            let awaited = {
                let mut state = lock(&running.state);
                let bytes = state.progress.map(|p| p.bytes);
                state.result = Some((result, Spent { time, bytes, frozen }));
                state.awaited
            };
            running.ended.send_replace(true);
            if !awaited {
                // nobody listening is no failure
                let _ = changes.send(Change::Move { record: key });
            }
        });
        let abort = task.abort_handle();
        let old = lock(&self.slots).insert(record.clone(), Slot { shared, abort });
        if let Some(old) = old {
            old.abort.abort();
        }
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Takes note that the pass no longer waits, also when it was interrupted.
struct Awaited<'a>(&'a Shared);

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).awaited = false;
    }
}

/// What a transfer needs besides the effect.
type Means = (Option<Pair>, Option<Arc<dyn Scratch>>);

async fn perform(effect: Effect, server: &dyn Server, (pair, scratch): Means, shared: &Shared) -> Result<()> {
    let attempted = format!("{} {}", effect.kind.as_str(), effect.at);
    let at = &effect.at;
    let operation = match effect.request {
        Request::Patch { change, etag } => return server.patch(at, &change, &etag).await,
        Request::Put { definition, etag } => return server.put(at, &definition, &etag).await,
        Request::Transfer(transfer) => {
            let (Pair { source, target }, cancel) = (both(pair, attempted)?, shared.cancel.subscribe());
            let told = |news| {
                let mut state = lock(&shared.state);
                match news {
                    transfer::News::Progress(p) => state.further(p),
                    transfer::News::Ended => state.first_end = state.first_end.or(Some(Instant::now())),
                }
            };
            return transfer::run(*transfer, source, target, cancel, &told).await;
        }
        Request::Backup(way) => {
            let (Pair { source, target }, cancel) = (both(pair, attempted)?, shared.cancel.subscribe());
            let progress = |p| lock(&shared.state).further(p);
            return backup::run(*way, &source, &target, scratch, cancel, &progress).await;
        }
        // only a transfer can be cancelled, and then it is still in hand: see `Tasks::cancel`
        Request::Cancel => return Ok(()),
        Request::CancelOperation(id) => return server.cancel(&id).await,
        Request::Inspect => {
            let wrong = server.inside(at).await?.wrong();
            return wrong.map_or(Ok(()), |why| {
                Err(ServerError::new(FailureKind::Refused, attempted, why))
            });
        }
        Request::Stop { timeout } => {
            let deadline = Instant::now() + timeout + GRACE;
            let stop = server.set_power(at, PowerAction::Stop { timeout }).await;
            let stopped = match stop {
                Ok(operation) => transfer::finished(server, &attempted, &operation, Some(timeout + GRACE)).await,
                Err(error) => Err(error),
            };
            return match stopped {
                Err(error) if error.kind == FailureKind::Busy => stopped_by(server, at, error, deadline).await,
                stopped => stopped,
            };
        }
        Request::ForceStop => server.set_power(at, PowerAction::ForceStop).await?,
        Request::Unfreeze => server.set_power(at, PowerAction::Unfreeze).await?,
        Request::Start { stateful } => server.set_power(at, PowerAction::Start { stateful }).await?,
        Request::Snapshot { name, expires_at } => server.snapshot(at, &name, expires_at).await?,
        Request::RemoveSnapshot { name } => server.remove_snapshot(at, &name).await?,
        Request::DropBackup { name } => server.drop_backup(at, &name).await?,
        Request::Rename { name } => server.rename(at, &name).await?,
        Request::Remove => server.remove(at).await?,
        Request::RemoveAnd { target, change, etag } => {
            let other = both(pair, attempted.clone())?.target.server;
            let (removal, merged) = join(server.remove(at), other.patch(&target, &change, &etag)).await;
            if let Err(error) = merged {
                tracing::debug!(%error, "left for the next look");
            }
            removal?
        }
        Request::Relocate(to) => {
            let operation = server.relocate(at, &to).await?;
            let cancel = shared.cancel.subscribe();
            return relocated(server, &attempted, at, &operation, cancel).await;
        }
    };
    transfer::finished(server, &attempted, &operation, None).await
}

fn both(pair: Option<Pair>, attempted: String) -> Result<Pair> {
    pair.ok_or_else(|| ServerError::new(FailureKind::Unreachable, attempted, "an end does not answer"))
}

/// Waits for the end of a move inside the server. The operation itself cannot be cancelled, but those that it consists of can.
async fn relocated(
    server: &dyn Server,
    attempted: &str,
    at: &InstanceRef,
    operation: &OperationId,
    mut cancel: watch::Receiver<u32>,
) -> Result<()> {
    let ended = transfer::finished(server, attempted, operation, None);
    tokio::pin!(ended);
    loop {
        tokio::select! {
            ended = &mut ended => return ended,
            Ok(()) = cancel.changed() => {
                // one that cannot be cancelled goes on to its end
                let all = server.operations().await.unwrap_or_default();
                for part in all.iter().filter(|o| o.id != *operation && o.instances.contains(at)) {
                    if let Err(error) = server.cancel(&part.id).await {
                        tracing::debug!(%error, "a part of the move cannot be cancelled");
                    }
                }
            }
        }
    }
}

/// The server is busy with the instance already, most likely with a stop that a process before this one asked for: it
/// is not asked again, but looked at until the guest is down or its time is over.
async fn stopped_by(server: &dyn Server, at: &InstanceRef, busy: ServerError, deadline: Instant) -> Result<()> {
    while Instant::now() < deadline {
        sleep(LOOK).await;
        match server.instance(at).await? {
            Some(fresh) if fresh.instance.power == Power::Stopped => return Ok(()),
            Some(_) => {}
            None => return Err(busy),
        }
    }
    Err(busy)
}
