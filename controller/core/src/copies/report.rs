//! What people are told of a copy: its conditions, and what is worth an Event.

use berth_api::conditions::{self, ConditionStatus, READY, RECONCILING, STALLED};
use berth_api::{Condition, InstanceCopyStatus, Reason, ReasonKind};
use jiff::{SignedDuration, Timestamp};

/// Says `reason`, in all conditions that follow from it. What was said already keeps its time.
pub(super) fn say(list: &mut Vec<Condition>, reason: Reason, message: &str, generation: Option<i64>, now: Timestamp) {
    let (ready, also) = match reason.kind() {
        ReasonKind::Ready => (ConditionStatus::True, None),
        ReasonKind::InProgress => (ConditionStatus::False, Some(RECONCILING)),
        ReasonKind::Waiting => (ConditionStatus::False, None),
        ReasonKind::Stalled => (ConditionStatus::False, Some(STALLED)),
        ReasonKind::Unknown => (ConditionStatus::Unknown, Some(RECONCILING)),
    };
    let said = (reason.as_str(), message);
    conditions::set(list, (READY, ready), said, generation, now);
    for type_ in [RECONCILING, STALLED] {
        if also == Some(type_) {
            conditions::set(list, (type_, ConditionStatus::True), said, generation, now);
        } else {
            conditions::remove(list, type_);
        }
    }
}

/// How long what is missing may still come.
const GRACE: SignedDuration = SignedDuration::from_secs(10);

/// Whether nothing was said for long yet.
pub(super) fn is_young(list: &[Condition], now: Timestamp) -> bool {
    if conditions::find(list, STALLED).is_some() {
        return false;
    }
    let since = conditions::find(list, RECONCILING).map(|c| c.last_transition_time.0);
    since.is_none_or(|since| now.duration_since(since) < GRACE)
}

/// Says what is missing and may still come: in progress, not stalled.
pub(super) fn say_young(
    list: &mut Vec<Condition>,
    (reason, message): (Reason, &str),
    generation: Option<i64>,
    now: Timestamp,
) {
    let said = (reason.as_str(), message);
    conditions::set(list, (READY, ConditionStatus::False), said, generation, now);
    conditions::set(list, (RECONCILING, ConditionStatus::True), said, generation, now);
}

/// One thing worth telling: whether somebody should look, in one word, in a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Whether somebody should look.
    pub warning: bool,
    /// The reason.
    pub reason: Reason,
    /// The sentence.
    pub message: String,
}

/// What the change of a status is worth telling: a new reason. That work begins is told by its end.
pub fn told(old: &InstanceCopyStatus, new: &InstanceCopyStatus) -> Option<Told> {
    let before = conditions::find(&old.conditions, READY).map(|c| c.reason.as_str());
    let now = conditions::find(&new.conditions, READY)?;
    let reason = Reason::parse(&now.reason)?;
    if before == Some(now.reason.as_str()) || matches!(reason, Reason::Copying | Reason::Progressing) {
        return None;
    }
    Some(Told {
        warning: matches!(reason, Reason::RefreshFailed) || reason.kind() == ReasonKind::Stalled,
        reason,
        message: now.message.clone(),
    })
}
