//! One pass over a copy: the record that is being changed, what is seen, and the vocabulary of its steps.

use std::time::Duration;

use berth_api::copy::{CopyWork, DeletionPolicy};
use berth_api::{Reason, ReasonKind, Time, conditions};
use jiff::Timestamp;

use super::record::CopyRecord;
use super::source::Sought;
use super::{Step, Transition, due};
use crate::model::{InstanceRef, Power};
use crate::moves::{Copy, Effect, EffectKind, End, EndView, Look, Outcome, Request, Task, noted, one_line};
use crate::plan::World;
use crate::server::{FailureKind, Progress, ServerError};
use crate::{leftover, marks};

/// When to look again at an end that does not answer, or an effect that failed.
const RETRY: Duration = Duration::from_secs(2);
/// How long an end is waited for before that is said.
const PATIENCE: i64 = 10_000;

/// Everything that a step is decided from.
#[derive(Clone, Debug)]
pub struct CopyView {
    /// The servers of the copy's namespace.
    pub world: World,
    /// Where the source is.
    pub sought: Sought,
    /// The source, read afresh.
    pub source: EndView,
    /// The copy, read afresh.
    pub target: EndView,
    /// What this controller is doing for the copy.
    pub task: Task,
    /// How the last effect ended; shown to one step only.
    pub outcome: Option<Outcome>,
    /// How far the last transfer got.
    pub progress: Option<Progress>,
    /// Eight random characters that were never used before.
    pub random: String,
    /// Whether requests without a precondition may be sent.
    pub lease_is_safe: bool,
    /// Whether the limits of both servers leave room, and nobody else copies the same source.
    pub has_slots: bool,
}

pub(super) struct Pass<'a> {
    pub record: CopyRecord,
    pub view: &'a CopyView,
    pub now: Timestamp,
}

impl<'a> Pass<'a> {
    pub fn new(record: &CopyRecord, view: &'a CopyView, now: Timestamp) -> Self {
        Self {
            record: record.clone(),
            view,
            now,
        }
    }

    fn transition(&self, effect: Option<Effect>, look: Look) -> Transition {
        Transition {
            record: self.record.clone(),
            effect,
            look,
            hold: self.needs_hold(),
        }
    }

    /// Whether something is to be done before the object may vanish.
    fn needs_hold(&self) -> bool {
        let (spec, status) = (&self.record.spec, &self.record.status);
        let deletes = spec.deletion_policy == DeletionPolicy::Delete;
        status.current.is_some() || (deletes && (!self.record.deleting || status.uuid.is_some()))
    }

    /// Nothing is to be done, now or later.
    pub fn leave(&self) -> Transition {
        self.transition(None, Look::Done)
    }

    pub fn wait(&self, after: Duration) -> Transition {
        self.transition(None, Look::After(after))
    }

    pub fn retry(&self) -> Transition {
        self.wait(RETRY)
    }

    pub fn go_on(&self) -> Transition {
        self.transition(None, Look::Now)
    }

    pub fn ask(&self, kind: EffectKind, end: End, at: &InstanceRef, request: Request) -> Transition {
        if matches!(request, Request::Rename { .. }) && !self.view.lease_is_safe {
            return self.wait(RETRY);
        }
        let effect = Effect {
            kind,
            end,
            at: at.clone(),
            request,
        };
        self.transition(Some(effect), Look::Now)
    }

    /// The work in hand; every step but `rest` has one.
    pub fn work(&mut self) -> &mut CopyWork {
        self.record.status.current.get_or_insert_default()
    }

    pub fn advance(&mut self, step: Step) {
        self.work().step = step.as_str().to_owned();
    }

    /// Says what a person reads.
    pub fn say(&mut self, reason: Reason, message: &str) {
        self.say_as(reason.kind(), reason, message);
    }

    /// Says what may mean less than its reason does elsewhere.
    pub fn say_as(&mut self, kind: ReasonKind, reason: Reason, message: &str) {
        let (generation, list) = (Some(self.record.generation), &mut self.record.status.conditions);
        conditions::say(list, kind, (reason.as_str(), message), generation, self.now);
    }

    /// Remembers why something did not work.
    pub fn note(&mut self, reason: Reason, message: impl Into<String>, fix: Option<String>) {
        let last = &mut self.record.status.last_error;
        *last = Some(noted(reason, &message.into(), fix, last.as_ref(), self.now));
    }

    /// The attempt is over without success: the last note says why, and it is made again later.
    pub fn give_up(&mut self) -> Transition {
        self.record.status.current = None;
        self.record.status.incoming = None;
        self.later();
        self.go_on()
    }

    /// As [`Pass::give_up`], and why.
    pub fn fail(&mut self, reason: Reason, message: impl Into<String>, fix: Option<String>) -> Transition {
        self.note(reason, message, fix);
        self.give_up()
    }

    /// What was noted is tried again later; says so.
    pub fn later(&mut self) -> Timestamp {
        let failures = self.record.status.last_error.as_ref().map_or(1, |e| e.attempts);
        let at = due::retry_at(failures, self.now);
        self.record.status.retry_at = Some(Time(at));
        self.say_failed();
        at
    }

    /// Says what the last note says, and when it is tried again.
    pub fn say_failed(&mut self) {
        let (Some(error), Some(at)) = (
            self.record.status.last_error.clone(),
            self.record.status.retry_at.clone(),
        ) else {
            return;
        };
        let reason = Reason::parse(&error.reason).unwrap_or(Reason::RefreshFailed);
        let fix = error.fix.map(|f| format!("; to mend it: {f}")).unwrap_or_default();
        self.say(reason, &format!("{}{fix}; tried again at {}", error.message, at.0));
    }

    /// The copy, wherever it is now. A first one, whose uuid is not known yet, is known by its unique name.
    pub fn copy(&self) -> Option<&'a Copy> {
        let EndView::Reachable { copies, .. } = &self.view.target else {
            return None;
        };
        let (uuid, incoming) = (
            self.record.status.uuid.as_deref(),
            self.record.status.incoming.as_deref(),
        );
        copies.iter().find(|c| {
            let i = &c.fresh.instance;
            marks::is_copy(i)
                && match uuid {
                    Some(uuid) => i.uuid() == Some(uuid),
                    None => incoming == Some(i.at.name.as_str()),
                }
        })
    }

    /// The source, read afresh.
    pub fn source(&self) -> Option<&'a Copy> {
        let EndView::Reachable { copies, .. } = &self.view.source else {
            return None;
        };
        let uuid = self.record.status.current.as_ref().and_then(|w| w.from.uuid.clone());
        copies.iter().find(|c| c.fresh.instance.uuid() == uuid.as_deref())
    }

    /// Whether somebody started the copy since the last refresh.
    pub fn was_used(&self, copy: &Copy) -> bool {
        let i = &copy.fresh.instance;
        let last = self.record.status.last_used_at.as_deref();
        i.power != Power::Stopped || last.is_some_and(|last| last != i.last_used_at)
    }

    pub fn failed(&self, kind: EffectKind) -> Option<&'a ServerError> {
        let outcome = self.view.outcome.as_ref().filter(|o| o.effect == kind)?;
        outcome.result.as_ref().err()
    }

    pub fn succeeded(&self, kind: EffectKind) -> bool {
        let outcome = self.view.outcome.as_ref();
        outcome.is_some_and(|o| o.effect == kind && o.result.is_ok())
    }

    /// A conditional or repeatable request that failed: made again after a while. A lost race is made again at once.
    pub fn retry_after(&mut self, kind: EffectKind) -> Option<Transition> {
        let error = self.failed(kind)?;
        if error.kind == FailureKind::Changed {
            return None;
        }
        self.note_failure(Reason::RefreshFailed, error, error.to_string());
        Some(self.retry())
    }

    /// Notes what a server said, and the command of its host where that alone helps.
    pub fn note_failure(&mut self, reason: Reason, error: &ServerError, message: String) {
        let name = self.copy().map(|c| c.fresh.instance.at.clone());
        match name.filter(|_| leftover::is_half_a_snapshot(&error.message)) {
            Some(at) => {
                let server = self.work().to.server.clone();
                let fix = leftover::completion(&server, &self.view.target, &at);
                self.note(Reason::LeftoverVolume, message, Some(fix));
            }
            None => self.note(reason, message, None),
        }
    }

    /// Waits for an end that does not answer, and says so after a while.
    pub fn wait_for(&mut self, end: End) -> Option<Transition> {
        let view = match end {
            End::Source => &self.view.source,
            End::Target => &self.view.target,
        };
        let EndView::Unreachable { since, message } = view else {
            return None;
        };
        if self.now.as_millisecond() - since.as_millisecond() >= PATIENCE {
            let server = match end {
                End::Source => self.work().from.server.clone(),
                End::Target => self.work().to.server.clone(),
            };
            let sentence = format!("{server} cannot be asked: {}{}", one_line(message), self.held_words());
            self.say(Reason::ServerUnreachable, &sentence);
        }
        Some(self.retry())
    }

    /// Where the copy is meanwhile, for a person who needs it now.
    pub fn held_words(&self) -> String {
        let status = &self.record.status;
        match (&status.incoming, &status.current) {
            (Some(name), Some(work)) if work.refresh => format!(
                "; meanwhile the copy is {name} on {}, guarded{}",
                work.to.server,
                if work.sent {
                    " and perhaps a mixture of old and new"
                } else {
                    ""
                }
            ),
            _ => String::new(),
        }
    }

    /// Whether the work in hand is a refresh that has begun to change the copy: it is only ever completed.
    pub fn has_begun(&mut self) -> bool {
        let work = self.work();
        work.refresh && work.sent
    }

    /// Why the work in hand is not wanted any more, if it is not.
    pub fn unwanted(&mut self) -> Option<(Reason, String)> {
        let begun = self.has_begun();
        if !begun && self.record.deleting {
            return Some((Reason::Suspended, "the InstanceCopy was deleted".to_owned()));
        }
        if !begun && self.record.spec.suspend {
            return Some((Reason::Suspended, "the InstanceCopy was suspended".to_owned()));
        }
        match &self.view.sought {
            Sought::Found(located) => {
                let from = self.work().from.clone();
                let same = located.fingerprint == from.fingerprint
                    && (located.at().project.as_str(), located.at().name.as_str())
                        == (from.project.as_str(), from.name.as_str());
                let message = format!("the source is {} on {} now", located.at(), located.server);
                (!same).then_some((Reason::Pending, message))
            }
            Sought::Missing(blocker) => Some((blocker.reason, blocker.message.clone())),
            // a process that has just started and has not heard of the source yet: whoever needs it waits for it
            Sought::Later {
                reason: Reason::Progressing,
                ..
            } if matches!(self.view.source, EndView::Unreachable { .. }) => None,
            Sought::Later { reason, message } => Some((*reason, message.clone())),
        }
    }

    /// While this controller carries out an effect nothing is decided, but to cancel a transfer that is not wanted: that
    /// of a refresh only for a move, since one that is cancelled as it ends can leave a copy that does not start.
    pub fn wait_for_task(&mut self) -> Option<Transition> {
        let Task::Busy { effect, progress } = &self.view.task else {
            return None;
        };
        if let (EffectKind::Transfer, Some(p)) = (effect, progress) {
            self.work().bytes = Some(p.bytes);
        }
        let begun = self.has_begun();
        let gone = self.unwanted().is_some_and(|(reason, _)| match reason {
            Reason::Pending => true,
            Reason::ServerUnreachable | Reason::Progressing => false,
            _ => !begun,
        });
        if *effect == EffectKind::Transfer && gone {
            let from = self.work().from.clone();
            let at = InstanceRef::new(from.project, from.name);
            let mut cancel = self.ask(EffectKind::Cancel, End::Source, &at, Request::Cancel);
            cancel.look = Look::After(RETRY);
            return Some(cancel);
        }
        Some(self.wait(Duration::from_secs(5)))
    }
}
