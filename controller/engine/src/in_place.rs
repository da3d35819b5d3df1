//! What is done about a placement without a move: power state, and marks of moves that are over. Everything is looked at
//! afresh right before.

use std::time::Duration;

use berth_api::{Reason, conditions};
use berth_core::marks;
use berth_core::model::Instance;
use berth_core::plan::{self, Decision, Desired, Located, Verdict};
use berth_core::records::RecordError;
use berth_core::server::{FailureKind, PowerAction, ServerError};
use berth_core::status;
use jiff::Timestamp;

use crate::Key;
use crate::engine::{Engine, Report, record_name};
use crate::happenings;
use crate::power::{self, Standing, Wanted};

/// When to look again at what waits for something outside without a time of its own.
const WAITING: Duration = Duration::from_secs(30);
/// When to look again at what only a person can mend.
const BLOCKED: Duration = Duration::from_secs(300);
/// When to look again after a change was made or refused.
const SOON: Duration = Duration::from_secs(1);

impl Engine {
    /// Changes the instance where it is, if that is what is to be done; says when to look again.
    pub(crate) async fn mend_in_place(
        &self,
        key: &Key,
        desired: &Desired,
        mut verdict: Verdict,
        report: &dyn Report,
    ) -> (Verdict, Option<Duration>) {
        let late = |l: &Located| {
            let last = self.book().last_of(&desired.uid);
            power::stopped_by_late_request(desired, l, last.as_ref(), self.registry())
        };
        match (&verdict.decision, verdict.located.clone()) {
            (Decision::Power { action, force, .. }, Some(located)) => {
                let (action, force) = (*action, *force);
                self.change_power(
                    key,
                    desired,
                    verdict,
                    report,
                    &Wanted {
                        located: &located,
                        action,
                        force,
                    },
                )
                .await
            }
            (Decision::InSync, Some(located)) if late(&located) => {
                let action = PowerAction::Start {
                    stateful: located.instance.stateful,
                };
                verdict.decision = Decision::Power {
                    server: located.server.clone(),
                    at: located.at().clone(),
                    action,
                    force: false,
                };
                let wanted = Wanted {
                    located: &located,
                    action,
                    force: false,
                };
                self.change_power(key, desired, verdict, report, &wanted).await
            }
            (Decision::Adapt { .. }, Some(located)) => self.adapt(key, desired, verdict, &located, report).await,
            (Decision::Repair { .. }, Some(located)) => self.repair(key, desired, verdict, &located).await,
            (decision, _) => {
                self.power().forget(key);
                if matches!(decision, Decision::InSync) {
                    self.adaptations().forget(key);
                }
                let after = look_again_for(decision, self.env().now());
                (verdict, after)
            }
        }
    }

    async fn change_power(
        &self,
        key: &Key,
        desired: &Desired,
        mut verdict: Verdict,
        report: &dyn Report,
        wanted: &Wanted<'_>,
    ) -> (Verdict, Option<Duration>) {
        let server = Key::new(&desired.namespace, &wanted.located.server);
        let Some(follower) = self.registry().follower(&server) else {
            return (verdict, Some(WAITING));
        };
        report.status(&status::resting(desired, &verdict, None, self.env().now()));
        let standing = self
            .power()
            .act(self.env(), self.driver(), key, &follower, wanted)
            .await;
        match standing {
            Standing::Busy(after) => (verdict, Some(after)),
            Standing::Done { changed } => {
                if changed {
                    report.happened(happenings::powered(wanted.located, wanted.action));
                }
                verdict = self.plan(key, desired, None);
                let settled = matches!(verdict.decision, Decision::InSync);
                (verdict, (!settled).then_some(SOON))
            }
            Standing::Failed { message, again } => {
                let time = again.round(jiff::Unit::Second).unwrap_or(again);
                verdict.decision = Decision::Wait {
                    reason: Reason::Updating,
                    message: format!("{message}; tried again at {time}"),
                    until: Some(again),
                };
                let after = look_again_for(&verdict.decision, self.env().now());
                (verdict, after)
            }
        }
    }

    /// Takes off what a move that is over left, or what came back with a snapshot.
    async fn repair(
        &self,
        key: &Key,
        desired: &Desired,
        mut verdict: Verdict,
        located: &Located,
    ) -> (Verdict, Option<Duration>) {
        let message = match self.try_repair(desired, located).await {
            Ok(true) => {
                verdict = self.plan(key, desired, None);
                let settled = matches!(verdict.decision, Decision::InSync);
                return (verdict, (!settled).then_some(SOON));
            }
            Ok(false) => format!(
                "{} carries the mark of move {}, which is not known here; if no other Berth moves it, unset the keys {} on {}",
                located.at(),
                marks::move_id(&located.instance).unwrap_or("?"),
                marks::KEYS.join(", "),
                located.server
            ),
            Err(error) => error.to_string(),
        };
        verdict.decision = Decision::Wait {
            reason: Reason::StaleMarks,
            message,
            until: None,
        };
        (verdict, Some(WAITING))
    }

    async fn try_repair(&self, desired: &Desired, located: &Located) -> Result<bool, ServerError> {
        let at = located.at();
        let attempted = format!("take stale marks off {at} on {}", located.server);
        let server = Key::new(&desired.namespace, &located.server);
        let gone = || ServerError::new(FailureKind::Unreachable, &attempted, "its InstanceServer is gone");
        let follower = self.registry().follower(&server).ok_or_else(gone)?;
        let fresh = follower.read(at).await?;
        let Some(fresh) = fresh.filter(|f| f.instance.uuid() == located.instance.uuid()) else {
            return Ok(true);
        };
        let over = self.is_over(desired, &fresh.instance, &located.fingerprint).await;
        let unknown = |e: RecordError| ServerError::new(FailureKind::Unknown, &attempted, e.to_string());
        if !over.map_err(unknown)? || !self.env().may_act() {
            return Ok(false);
        }
        follower
            .server()
            .put(at, &plan::repaired(&fresh.instance), &fresh.etag)
            .await?;
        follower.read(at).await?;
        Ok(true)
    }

    /// Whether the move whose mark the instance carries is over: it was one of this very placement, which has none open,
    /// or its record says so. The mark of another installation's move is not ours to judge.
    async fn is_over(&self, desired: &Desired, i: &Instance, fingerprint: &str) -> Result<bool, RecordError> {
        let Some(id) = marks::move_id(i) else { return Ok(true) };
        let attempt = i.config.get(marks::GENERATION).and_then(|g| g.parse::<i64>().ok());
        let own = attempt.is_some_and(|a| record_name(&desired.name, &desired.uid, a) == id);
        if own && self.book().open_of(&desired.uid).is_empty() {
            return Ok(true);
        }
        let mut over = false;
        for key in self.registry().keys_of(fingerprint) {
            match self.records().load(&key.namespace, id).await {
                Ok(record) if record.finished() => over = true,
                Ok(_) => return Ok(false),
                Err(RecordError::NotFound(_)) => {}
                Err(error @ (RecordError::Conflict(_) | RecordError::Unavailable(_))) => return Err(error),
            }
        }
        Ok(over)
    }
}

fn look_again_for(decision: &Decision, now: Timestamp) -> Option<Duration> {
    match decision {
        Decision::InSync => None,
        Decision::Wait { until: Some(until), .. } => Some(
            Duration::try_from(until.duration_since(now))
                .unwrap_or(Duration::ZERO)
                .max(Duration::from_millis(100)),
        ),
        Decision::Wait { until: None, .. } => Some(WAITING),
        // what is missing may come in the first seconds; after that it is a person's turn
        Decision::Blocked(blockers) if blockers.first().is_some_and(|b| b.reason.is_not_found()) => {
            Some(Duration::try_from(conditions::GRACE).unwrap_or(WAITING) + Duration::from_millis(100))
        }
        Decision::Blocked(_) => Some(BLOCKED),
        Decision::Power { .. } | Decision::Adapt { .. } | Decision::Repair { .. } | Decision::Move(_) => Some(SOON),
    }
}
