//! Changes the configuration of an instance where it is, as berth-core decided, and remembers what came to nothing, so
//! that no server is asked the same again and again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_core::model::Definition;
use berth_core::overrides::Adaptation;
use berth_core::plan::{Decision, Desired, Located, Tried, TriedResult, Verdict};
use berth_core::server::{FailureKind, ServerError};
use jiff::{SignedDuration, Timestamp};

use crate::engine::{Engine, Report};
use crate::happenings;
use crate::inventory::Follower;
use crate::{Key, lock};

/// First and longest wait after a failure.
const PAUSE: (i64, i64) = (5, 600);
/// How long it is remembered that a change needs a stop, or was stored in another spelling.
const MEMORY: i64 = 24 * 3600;

/// What was tried for each placement.
#[derive(Default)]
pub(crate) struct Adaptations {
    tried: Mutex<HashMap<Key, (Tried, u32)>>,
}

impl Adaptations {
    /// Nothing is to be changed any more, or everything is to be tried anew.
    pub fn forget(&self, placement: &Key) {
        lock(&self.tried).remove(placement);
    }

    /// What came of the last change.
    pub fn of(&self, placement: &Key) -> Option<Tried> {
        lock(&self.tried).get(placement).map(|(tried, _)| tried.clone())
    }

    fn note(&self, placement: &Key, change: &Adaptation, result: TriedResult, now: Timestamp) {
        let mut tried = lock(&self.tried);
        let failures = tried
            .get(placement)
            .filter(|(t, _)| t.change == *change)
            .map_or(0, |(_, failures)| *failures);
        let seconds = match result {
            TriedResult::NeedsStop | TriedResult::NotKept => MEMORY,
            TriedResult::Refused(_) | TriedResult::Failed(_) => (PAUSE.0 << failures.min(7)).min(PAUSE.1),
        };
        let until = now.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(now);
        let entry = Tried {
            change: change.clone(),
            result,
            until,
        };
        tried.insert(placement.clone(), (entry, failures + 1));
    }
}

impl Engine {
    /// Makes the change, if it still is the one to make; says how things are afterwards.
    pub(crate) async fn adapt(
        &self,
        key: &Key,
        desired: &Desired,
        verdict: Verdict,
        located: &Located,
        report: &dyn Report,
    ) -> (Verdict, Option<Duration>) {
        let server = Key::new(&desired.namespace, &located.server);
        let Some(follower) = self.registry().follower(&server) else {
            return (verdict, Some(Duration::from_secs(30)));
        };
        let Decision::Adapt { change, .. } = &verdict.decision else {
            return (verdict, None);
        };
        match self.try_adapt(key, desired, &follower, located).await {
            // somebody else changed it meanwhile, or we may not act: the next look decides
            Ok(None) => return (verdict, Some(Duration::from_secs(1))),
            Ok(Some(done)) => {
                let mut verdict = self.plan(key, desired, None);
                verdict.changed = true;
                report.happened(happenings::adapted(located, &done));
                let again = matches!(&verdict.decision, Decision::Adapt { change, .. } if **change == done);
                if !again {
                    let settled = matches!(verdict.decision, Decision::InSync);
                    let after = (!settled).then_some(Duration::from_millis(100));
                    return (verdict, after);
                }
                self.adaptations()
                    .note(key, &done, TriedResult::NotKept, self.env().now());
            }
            Err(error) => {
                let result = match error.kind {
                    FailureKind::Changed => return (verdict, Some(Duration::from_secs(1))),
                    FailureKind::Running => TriedResult::NeedsStop,
                    FailureKind::Unreachable | FailureKind::Unknown | FailureKind::Busy => {
                        TriedResult::Failed(error.to_string())
                    }
                    FailureKind::NotFound
                    | FailureKind::AlreadyExists
                    | FailureKind::Refused
                    | FailureKind::PeerUnreachable
                    | FailureKind::ScratchFull
                    | FailureKind::NotTrusted
                    | FailureKind::CertificateMismatch
                    | FailureKind::Protocol => TriedResult::Refused(error.message.clone()),
                };
                tracing::info!(placement = %key, error = %error, "the configuration was not changed");
                self.adaptations().note(key, change, result, self.env().now());
            }
        }
        let verdict = self.plan(key, desired, None);
        let after = match (&verdict.decision, self.adaptations().of(key)) {
            (Decision::Blocked(_) | Decision::Wait { .. }, Some(tried)) => {
                Duration::try_from(tried.until.duration_since(self.env().now())).unwrap_or_default()
            }
            _ => Duration::from_millis(100),
        };
        (verdict, Some(after.min(Duration::from_secs(600))))
    }

    /// Looks afresh, plans from that, and writes. `None`: something else is to be done by now.
    async fn try_adapt(
        &self,
        key: &Key,
        desired: &Desired,
        follower: &Arc<Follower>,
        located: &Located,
    ) -> Result<Option<Adaptation>, ServerError> {
        let at = located.at();
        let server = follower.server();
        let fresh = follower.read(at).await?;
        let Some(fresh) = fresh.filter(|f| f.instance.uuid() == located.instance.uuid()) else {
            return Ok(None);
        };
        let Decision::Adapt { change, .. } = self.plan(key, desired, None).decision else {
            return Ok(None);
        };
        if !self.env().may_act() {
            return Ok(None);
        }
        let mut definition = Definition::from(&fresh.instance);
        change.apply(&mut definition);
        server.put(at, &definition, &fresh.etag).await?;
        follower.read(at).await?;
        Ok(Some(*change))
    }
}
