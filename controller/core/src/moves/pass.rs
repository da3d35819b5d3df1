//! One pass over a record: the copy of the record that is being changed, what is seen, and the small vocabulary in
//! which the steps are written (advance, ask for an effect, wait, undo). No decisions of the protocol are made here.

use std::time::Duration;

use berth_api::moves::{Progress as MoveProgress, PutBack, StepRecord, UndoCause};
use berth_api::{GoDuration, Method, MicroTime, Outcome as MoveOutcome, Reason, Step};
use jiff::Timestamp;

use super::effect::{Effect, EffectKind, End, Request};
use super::said::{noted, one_line};
use super::view::{Copy, EndView, Spent, Task, View, Wish, source_places, target_places};
use crate::marks;
use crate::model::{Instance, InstanceRef};
use crate::records::Record;
use crate::server::{FailureKind, Progress, ServerError};

/// What to do with the record, and then.
#[derive(Clone, Debug)]
pub struct Transition {
    /// The record as it is to be; write it before anything else if it differs.
    pub record: Record,
    /// What to ask the servers for afterwards.
    pub effect: Option<Effect>,
    /// Whether that may begin while the record is being written.
    pub beside: bool,
    /// When to look again.
    pub look: Look,
}

/// When to look again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// At once.
    Now,
    /// After that time, or when something changes.
    After(Duration),
    /// Nothing more is to be done for this move.
    Done,
}

/// How long to wait for an end that does not answer before looking again.
const RETRY: Duration = Duration::from_secs(1);
/// Longest wait between two looks.
const RETRY_MAX: Duration = Duration::from_secs(30);

pub(super) struct Pass<'a> {
    pub record: Record,
    pub view: &'a View,
    pub now: Timestamp,
}

impl<'a> Pass<'a> {
    pub fn new(record: &Record, view: &'a View, now: Timestamp) -> Self {
        Self {
            record: record.clone(),
            view,
            now,
        }
    }

    pub fn step(&self) -> Option<Step> {
        self.record.status.step()
    }

    /// Nothing to do.
    pub fn rest(&self) -> Transition {
        Transition {
            record: self.record.clone(),
            effect: None,
            beside: false,
            look: Look::Done,
        }
    }

    /// Look again after `after` or when something changes.
    pub fn wait(&self, after: Duration) -> Transition {
        Transition {
            record: self.record.clone(),
            effect: None,
            beside: false,
            look: Look::After(after),
        }
    }

    /// Write the record and look again at once.
    pub fn go_on(&self) -> Transition {
        Transition {
            record: self.record.clone(),
            effect: None,
            beside: false,
            look: Look::Now,
        }
    }

    /// Write the record, then ask for `request`.
    pub fn ask(&self, kind: EffectKind, end: End, at: &InstanceRef, request: Request) -> Transition {
        let needs_lease = matches!(
            request,
            Request::Stop { .. } | Request::ForceStop | Request::Rename { .. }
        ) || (matches!(request, Request::Remove) && !marks::is_unique_name(&at.name));
        if needs_lease && !self.view.lease_is_safe {
            return self.wait(RETRY);
        }
        let effect = Some(Effect {
            kind,
            end,
            at: at.clone(),
            request,
        });
        Transition { effect, ..self.go_on() }
    }

    /// Ask for `request` while the record is being written. Only for what servers refuse to whoever comes late, because of an
    /// entity tag or a name that was recorded before, and after which whoever finds it done goes on as if it was recorded.
    pub fn ask_beside(&self, kind: EffectKind, end: End, at: &InstanceRef, request: Request) -> Transition {
        Transition {
            beside: true,
            ..self.ask(kind, end, at, request)
        }
    }

    /// While this controller itself carries out an effect there is nothing to decide, but to cancel a transfer that is
    /// no longer wanted.
    pub fn wait_for_task(&mut self, step: Step) -> Option<Transition> {
        let Task::Busy { effect, progress } = &self.view.task else {
            return None;
        };
        if let (EffectKind::Transfer, Some(told)) = (effect, progress) {
            let known = self.record.status.progress.unwrap_or_default();
            self.record.status.progress = Some(measured(known, *told));
        }
        let live =
            self.record.spec.method == Method::Live && matches!(effect, EffectKind::Transfer | EffectKind::Relocate);
        if live
            && step != Step::Undoing
            && let Some(t) = super::live::overdue(self)
        {
            return Some(t);
        }
        let cancellable = *effect == EffectKind::Transfer || live;
        if cancellable && (step == Step::Undoing || self.undo_wished().is_some()) {
            if step != Step::Undoing {
                return Some(self.undo_as_wished());
            }
            let at = InstanceRef::new(&self.record.spec.from.project, &self.record.spec.from.name);
            let mut cancel = self.ask(EffectKind::Cancel, End::Source, &at, Request::Cancel);
            cancel.look = Look::After(RETRY);
            return Some(cancel);
        }
        Some(self.wait(self.until_overdue(Duration::from_secs(5))))
    }

    /// That time, or the shorter one until a live move is given up.
    fn until_overdue(&self, at_most: Duration) -> Duration {
        let left = super::live::deadline(&self.record).map(|d| d.duration_since(self.now));
        left.map_or(at_most, |l| Duration::try_from(l).unwrap_or_default().min(at_most))
    }

    /// For how long the move has been in its step.
    pub fn in_step(&self) -> Duration {
        let entered = self.record.status.steps.last();
        entered.and_then(|s| self.since(&s.at)).unwrap_or_default()
    }

    /// The time since then; `None`: a clock went back.
    pub fn since(&self, then: &MicroTime) -> Option<Duration> {
        self.now.duration_since(then.0).try_into().ok()
    }

    /// Enters `step`.
    pub fn advance(&mut self, step: Step) {
        self.record.status.step = Some(step.as_str().to_owned());
        let at = MicroTime(self.now);
        self.record.status.steps.push(StepRecord {
            step: step.as_str().to_owned(),
            at,
        });
        self.record.status.last_error = None;
    }

    /// Ends the move.
    pub fn finish(&mut self, outcome: MoveOutcome) -> Transition {
        self.record.status.outcome = Some(outcome.as_str().to_owned());
        self.record.status.finished_at = Some(MicroTime(self.now));
        if outcome != MoveOutcome::Succeeded {
            self.record.status.progress = None;
        }
        self.go_on()
    }

    fn undo_wished(&self) -> Option<(Reason, &str)> {
        match &self.view.wish {
            Wish::Continue(_) => None,
            Wish::Undo { reason, message } => Some((*reason, message)),
        }
    }

    /// If the placement wants it undone: the transition into the undo.
    pub fn undo_if_wished(&mut self) -> Option<Transition> {
        self.undo_wished().is_some().then(|| self.undo_as_wished())
    }

    fn undo_as_wished(&mut self) -> Transition {
        let (reason, message) = match &self.view.wish {
            Wish::Undo { reason, message } => (*reason, message.clone()),
            Wish::Continue(_) => (Reason::MoveFailed, String::new()),
        };
        self.undo(reason, message, None)
    }

    /// Begins the undo: once written, no one commits.
    pub fn undo(&mut self, reason: Reason, message: impl Into<String>, fix: Option<String>) -> Transition {
        let message = one_line(&message.into());
        self.advance(Step::Undoing);
        if super::is_internal(&self.record) {
            // written before the server moved the instance live, and it did not
            self.record.status.committed_at = None;
        }
        // it was measured of a move that did not come to be
        self.record.status.downtime = None;
        let cancelled = reason == Reason::MoveCancelled;
        self.record.status.undo = Some(UndoCause {
            reason: reason.as_str().to_owned(),
            message: message.clone(),
            fix: fix.clone(),
            cancelled,
        });
        self.note(reason, message, fix);
        self.go_on()
    }

    /// Remembers why something did not work.
    pub fn note(&mut self, reason: Reason, message: impl Into<String>, fix: Option<String>) {
        let last = &mut self.record.status.last_error;
        *last = Some(noted(reason, &message.into(), fix, last.as_ref(), self.now));
    }

    /// The failure of the effect `kind`, if that is what this step is told.
    pub fn failed(&self, kind: EffectKind) -> Option<&'a ServerError> {
        let outcome = self.view.outcome.as_ref().filter(|o| o.effect == kind)?;
        outcome.result.as_ref().err()
    }

    /// Whether the effect `kind` is what this step is told to have succeeded.
    pub fn succeeded(&self, kind: EffectKind) -> bool {
        self.view
            .outcome
            .as_ref()
            .is_some_and(|o| o.effect == kind && o.result.is_ok())
    }

    /// A transfer has ended well: what it was in all stays in the record.
    pub fn sent_all(&mut self) {
        let spent = self.spent();
        let millis = i64::try_from(spent.time.as_millis()).unwrap_or(i64::MAX).max(1);
        let known = self.record.status.progress.unwrap_or_default();
        self.record.status.progress = Some(MoveProgress {
            percent: Some(100),
            bytes: spent.bytes,
            total_bytes: spent.bytes,
            bytes_per_second: spent.bytes.map(|b| b.saturating_mul(1000) / millis),
            eta: None,
            ..known
        });
    }

    /// What the effect that this step is told of took.
    pub fn spent(&self) -> Spent {
        self.view.outcome.as_ref().map(|o| o.spent).unwrap_or_default()
    }

    /// A failed effect that is simply made again: remembers the failure, and waits longer each time.
    pub fn retry_after_failure(&mut self, kind: EffectKind) -> Option<Transition> {
        let error = self.failed(kind)?;
        if error.kind == FailureKind::Changed {
            return None;
        }
        self.note(Reason::MoveFailed, error.to_string(), None);
        let seconds = RETRY.as_secs() << self.attempts().clamp(1, 6);
        Some(self.wait(Duration::from_secs(seconds).min(RETRY_MAX)))
    }

    /// After a failure nothing is asked for anew before that time has passed, whatever wakes the move meanwhile.
    pub fn pause(&self, after: Duration) -> Option<Transition> {
        let since = self.since(self.record.status.last_error.as_ref()?.at.as_ref()?)?;
        let waits = self.view.outcome.is_none() && since < after;
        waits.then(|| self.wait(after.saturating_sub(since)))
    }

    /// How often the last effect failed in a row.
    pub fn attempts(&self) -> i32 {
        self.record.status.last_error.as_ref().map_or(0, |e| e.attempts)
    }

    /// Under which name the copy was made, if one was.
    pub fn incoming(&self) -> Option<&str> {
        self.record.status.names.as_ref().and_then(|n| n.incoming.as_deref())
    }

    /// Under which name the source goes, if it was renamed.
    pub fn retired(&self) -> Option<&str> {
        self.record.status.names.as_ref().and_then(|n| n.retired.as_deref())
    }

    /// Records a name before it is used.
    pub fn set_incoming(&mut self, name: &str) {
        self.record.status.names.get_or_insert_default().incoming = Some(name.to_owned());
    }

    /// The name under which the source goes: recorded before it is used, and the same for every request with this
    /// intent, so that one that arrives late does nothing else.
    pub fn retired_name(&mut self, name: &str) -> String {
        let unique = marks::unique_name(&self.view.random, name);
        let names = self.record.status.names.get_or_insert_default();
        names.retired.get_or_insert(unique).clone()
    }

    /// The instance on the source's side, wherever it is now.
    pub fn source(&self) -> Option<&'a Copy> {
        source_places(&self.record)
            .iter()
            .find_map(|at| self.ours(&self.view.source, at))
            .or_else(|| self.everywhere().next())
    }

    /// Every instance with the uuid on a server that moves it itself: a daemon that dies while it does can leave it under
    /// a name of its own (`move-of-…`), beside the former one or alone.
    pub fn everywhere(&self) -> impl Iterator<Item = &'a Copy> {
        let copies = match &self.view.source {
            EndView::Reachable { copies, .. } if super::is_internal(&self.record) => copies.as_slice(),
            EndView::Reachable { .. } | EndView::Unreachable { .. } => &[],
        };
        let uuid = self.record.spec.from.uuid.clone().unwrap_or_default();
        copies
            .iter()
            .filter(move |c| c.fresh.instance.uuid() == Some(uuid.as_str()))
    }

    /// The copy on the target's side, wherever it is now.
    pub fn target(&self) -> Option<&'a Copy> {
        target_places(&self.record).iter().find_map(|at| {
            self.ours(&self.view.target, at)
                .filter(|c| self.carries_mark(&c.fresh.instance))
        })
    }

    fn ours(&self, end: &'a EndView, at: &InstanceRef) -> Option<&'a Copy> {
        end.copy(at)
            .filter(|c| c.fresh.instance.uuid() == Some(self.record.spec.from.uuid.as_deref().unwrap_or_default()))
    }

    /// Whether the instance carries this move's id.
    pub fn carries_mark(&self, i: &Instance) -> bool {
        marks::move_id(i) == Some(self.record.name.as_str())
    }

    /// Waits for the end that does not answer.
    pub fn wait_for_end(&mut self, end: &EndView) -> Option<Transition> {
        match end {
            EndView::Reachable { .. } => None,
            EndView::Unreachable { .. } => Some(self.wait(RETRY)),
        }
    }

    /// How long that end has not answered.
    pub fn silent_for(&self, end: &EndView) -> Duration {
        match end {
            EndView::Reachable { .. } => Duration::ZERO,
            EndView::Unreachable { since, .. } => {
                Duration::from_millis(u64::try_from(self.now.as_millisecond() - since.as_millisecond()).unwrap_or(0))
            }
        }
    }

    /// Remembers the old value of a key, once.
    pub fn keep(&mut self, key: &str, value: Option<&String>) {
        if !self.record.status.put_back.iter().any(|p| p.key == key) {
            self.record.status.put_back.push(PutBack {
                key: key.to_owned(),
                value: value.cloned(),
            });
        }
    }

    /// The old value of a key, if it was remembered: `Some(None)` means it was unset.
    pub fn kept(&self, key: &str) -> Option<Option<&str>> {
        self.record
            .status
            .put_back
            .iter()
            .find(|p| p.key == key)
            .map(|p| p.value.as_deref())
    }

    /// Whether a remembered boolean was true.
    pub fn kept_true(&self, key: &str) -> bool {
        self.kept(key).flatten() == Some("true")
    }
}

/// How far a transfer is, from what the servers told and what was known of it before.
pub fn measured(known: MoveProgress, told: Progress) -> MoveProgress {
    let total = known.total_bytes.filter(|t| *t > 0);
    // more than was expected is no more than nearly all
    let of_total = total
        .map(|t| told.bytes.saturating_mul(100) / t)
        .map(|p| p.clamp(0, 99));
    let left = total.map(|t| t.saturating_sub(told.bytes).max(0));
    let seconds = left
        .filter(|_| told.bytes_per_second > 0)
        .map(|l| l / told.bytes_per_second);
    MoveProgress {
        percent: told.percent.or(of_total.and_then(|p| i32::try_from(p).ok())),
        bytes: Some(told.bytes),
        bytes_per_second: Some(told.bytes_per_second),
        eta: seconds.map(|s| GoDuration::from_millis(s.saturating_mul(1000))),
        ..known
    }
}
