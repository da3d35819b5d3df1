//! Starts and stops an instance where it is, as `powerState` says, or because a late request of our own stopped it after
//! a move. Whether that is wanted is decided in berth-core; here it is looked at afresh and done.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_api::placement::PowerState;
use berth_api::{Outcome, Power as AfterPower};
use berth_core::model::{InstanceRef, Power};
use berth_core::moves::{Effect, EffectKind, End, Request, Task};
use berth_core::plan::{Desired, Located};
use berth_core::records::Record;
use berth_core::server::{FailureKind, PowerAction, ServerError};
use jiff::{SignedDuration, Timestamp};

use crate::drive::Driver;
use crate::inventory::Follower;
use crate::registry::Registry;
use crate::{Env, Key, lock};

/// First and longest wait after a failure.
const PAUSE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));
/// So often a guest is asked again that its server did not give its time.
const ASKED: u32 = 5;
/// A stop of ours that is told later than that after a move was no late request of the move.
const LATE: SignedDuration = SignedDuration::from_mins(15);

/// What was tried for each placement.
#[derive(Default)]
pub(crate) struct PowerChanges {
    tried: Mutex<HashMap<Key, Tried>>,
}

#[derive(Clone, Default)]
struct Tried {
    failures: u32,
    not_before: Option<Timestamp>,
    last_error: Option<String>,
    /// The guest did not stop in time and may be stopped by force.
    by_force: bool,
}

/// What is to be done.
pub(crate) struct Wanted<'a> {
    pub located: &'a Located,
    pub action: PowerAction,
    pub force: bool,
}

/// How it stands.
#[derive(Debug, PartialEq)]
pub(crate) enum Standing {
    /// Under way; look again after that time.
    Busy(Duration),
    /// The instance is in that state; whether that was our doing.
    Done { changed: bool },
    /// It failed, and is tried again then.
    Failed { message: String, again: Timestamp },
}

/// Under which key the tasks know a power change.
pub(crate) fn task_key(placement: &Key) -> Key {
    Key::new(&placement.namespace, format!("placement/{}", placement.name))
}

/// The placement whose power change that task is, if it is one.
pub(crate) fn placement_of(task: &Key) -> Option<Key> {
    let name = task.name.strip_prefix("placement/")?;
    Some(Key::new(&task.namespace, name))
}

impl PowerChanges {
    /// Nothing is to be done any more.
    pub fn forget(&self, placement: &Key) {
        lock(&self.tried).remove(placement);
    }

    /// Goes on with a change until it takes longer.
    pub async fn act(
        &self,
        env: &Env,
        driver: &Driver,
        placement: &Key,
        follower: &Arc<Follower>,
        wanted: &Wanted<'_>,
    ) -> Standing {
        let key = task_key(placement);
        let mut changed = false;
        loop {
            if let Task::Busy { .. } = driver.tasks().task(&key) {
                if !driver.attend(&key).await {
                    return Standing::Busy(Duration::from_secs(5));
                }
                continue;
            }
            if let Some(outcome) = driver.tasks().outcome(&key) {
                driver.tasks().seen(&key);
                changed |= outcome.result.is_ok();
                let early = matches!(wanted.action, PowerAction::Stop { timeout } if outcome.ended_early(timeout));
                self.note(env, placement, wanted, outcome.result.err(), early);
            }
            let tried = lock(&self.tried).get(placement).cloned().unwrap_or_default();
            if let (Some(again), Some(message)) = (tried.not_before.filter(|t| env.now() < *t), tried.last_error) {
                return Standing::Failed { message, again };
            }
            match self.begin(env, driver, &key, follower, wanted, tried.by_force).await {
                Ok(None) => {}
                Ok(Some(Standing::Done { .. })) => return Standing::Done { changed },
                Ok(Some(standing)) => return standing,
                Err(error) => self.note(env, placement, wanted, Some(error), true),
            }
        }
    }

    /// Looks afresh and asks for the state, if it still is another one.
    async fn begin(
        &self,
        env: &Env,
        driver: &Driver,
        key: &Key,
        follower: &Arc<Follower>,
        wanted: &Wanted<'_>,
        by_force: bool,
    ) -> Result<Option<Standing>, ServerError> {
        let at = wanted.located.at();
        let server = follower.server();
        let fresh = follower.read(at).await?;
        let Some(instance) = fresh.map(|f| f.instance) else {
            return Ok(Some(Standing::Done { changed: false }));
        };
        let stopped = instance.power == Power::Stopped;
        let starts = matches!(wanted.action, PowerAction::Start { .. });
        if instance.uuid() != wanted.located.instance.uuid() || stopped != starts {
            return Ok(Some(Standing::Done { changed: false }));
        }
        if !env.may_act() || (!starts && !env.lease_is_safe()) {
            return Ok(Some(Standing::Busy(Duration::from_secs(1))));
        }
        let (kind, request) = match wanted.action {
            PowerAction::Start { stateful } => (EffectKind::Start, Request::Start { stateful }),
            PowerAction::Stop { .. } if by_force => (EffectKind::Stop, Request::ForceStop),
            PowerAction::Stop { timeout } => (EffectKind::Stop, Request::Stop { timeout }),
            PowerAction::ForceStop => (EffectKind::Stop, Request::ForceStop),
            PowerAction::Unfreeze => (EffectKind::Unfreeze, Request::Unfreeze),
        };
        let effect = Effect {
            kind,
            end: End::Source,
            at: at.clone(),
            request,
        };
        driver.tasks().spawn(key, None, effect, server, None);
        Ok(None)
    }

    /// `early`: before the guest had its time.
    fn note(&self, env: &Env, placement: &Key, wanted: &Wanted<'_>, error: Option<ServerError>, early: bool) {
        let mut tried = lock(&self.tried);
        let Some(error) = error else {
            tried.remove(placement);
            return;
        };
        let entry = tried.entry(placement.clone()).or_default();
        let graceful = matches!(wanted.action, PowerAction::Stop { .. });
        let had_its_time = graceful && (!early || entry.failures >= ASKED);
        if had_its_time && wanted.force && !entry.by_force && error.kind != FailureKind::Unreachable {
            entry.by_force = true;
            return;
        }
        let pause = PAUSE.0.saturating_mul(1 << entry.failures.min(6)).min(PAUSE.1);
        entry.failures += 1;
        entry.last_error = Some(error.to_string());
        entry.not_before = SignedDuration::try_from(pause)
            .ok()
            .and_then(|p| env.now().checked_add(p).ok());
    }
}

/// Whether a move left the instance running and a late request of our own stopped it afterwards.
pub(crate) fn stopped_by_late_request(
    desired: &Desired,
    located: &Located,
    last: Option<&Record>,
    registry: &Registry,
) -> bool {
    let Some(last) = last.filter(|_| located.instance.power == Power::Stopped) else {
        return false;
    };
    let left_running = match last.status.outcome() {
        Some(Outcome::Succeeded) => last.spec.power_after == AfterPower::Running,
        Some(Outcome::Undone | Outcome::Cancelled) => last.status.ran_before == Some(true),
        Some(Outcome::NeedsAttention) | None => false,
    };
    let server = Key::new(&desired.namespace, &located.server);
    let at: &InstanceRef = located.at();
    let (Some(stopped), Some(finished)) = (registry.stopped_by_us(&server, at), &last.status.finished_at) else {
        return false;
    };
    let after = stopped.duration_since(finished.0);
    desired.spec.power_state == PowerState::Preserve
        && !desired.spec.suspend
        && !desired.deleting
        && left_running
        && after >= SignedDuration::ZERO
        && after <= LATE
}
