//! Conditions of the kinds: the types used, and small functions to read and set them.

use jiff::{SignedDuration, Timestamp};

use crate::{Condition, Reason, ReasonKind, Time};

/// Always present: whether all is as the spec says.
pub const READY: &str = "Ready";
/// Present while true: work goes on.
pub const RECONCILING: &str = "Reconciling";
/// Present while true: a person is needed.
pub const STALLED: &str = "Stalled";
/// Present while true: a retired copy waits on a server that does not answer.
pub const LEFTOVER_PENDING: &str = "LeftoverPending";

/// Something that is not found counts as on its way for that long: in a first sync a server may come after what names it.
pub const GRACE: SignedDuration = SignedDuration::from_secs(10);

/// Value of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not hold.
    False,
    /// Nobody knows.
    Unknown,
}

impl ConditionStatus {
    /// The text as written in objects.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// The condition of a type, if present.
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

/// Sets a condition. The transition time changes only if the status does; everything else is replaced.
pub fn set(
    conditions: &mut Vec<Condition>,
    (type_, status): (&str, ConditionStatus),
    (reason, message): (&str, &str),
    generation: Option<i64>,
    now: Timestamp,
) {
    let wanted = Condition {
        type_: type_.to_owned(),
        status: status.as_str().to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        observed_generation: generation,
        last_transition_time: Time(now),
    };
    match conditions.iter_mut().find(|condition| condition.type_ == type_) {
        Some(present) if present.status == wanted.status => {
            let since = present.last_transition_time.clone();
            *present = Condition {
                last_transition_time: since,
                ..wanted
            };
        }
        Some(present) => *present = wanted,
        None => conditions.push(wanted),
    }
}

/// Removes a condition.
pub fn remove(conditions: &mut Vec<Condition>, type_: &str) {
    conditions.retain(|condition| condition.type_ != type_);
}

/// Says one thing: Ready, and Reconciling or Stalled if `kind` demands it.
pub fn say(
    conditions: &mut Vec<Condition>,
    kind: ReasonKind,
    said: (&str, &str),
    generation: Option<i64>,
    now: Timestamp,
) {
    let (ready, also) = match kind {
        ReasonKind::Ready => (ConditionStatus::True, None),
        ReasonKind::InProgress => (ConditionStatus::False, Some(RECONCILING)),
        ReasonKind::Waiting => (ConditionStatus::False, None),
        ReasonKind::Stalled => (ConditionStatus::False, Some(STALLED)),
        ReasonKind::Unknown => (ConditionStatus::Unknown, Some(RECONCILING)),
    };
    set(conditions, (READY, ready), said, generation, now);
    for type_ in [RECONCILING, STALLED] {
        if also == Some(type_) {
            set(conditions, (type_, ConditionStatus::True), said, generation, now);
        } else {
            remove(conditions, type_);
        }
    }
}

/// What a reason means now: what is not found may still come in the first seconds.
pub fn kind_now(conditions: &[Condition], reason: Reason, now: Timestamp) -> ReasonKind {
    let since = find(conditions, RECONCILING).map(|c| c.last_transition_time.0);
    let young = find(conditions, STALLED).is_none() && since.is_none_or(|t| now.duration_since(t) < GRACE);
    if reason.is_not_found() && young {
        ReasonKind::InProgress
    } else {
        reason.kind()
    }
}

/// Gives each condition the time since which it has its status, as `stored` knows it. What is to be written was perhaps
/// made from an older status than the stored one.
pub fn keep_times(conditions: &mut [Condition], stored: &[Condition], now: Timestamp) {
    for condition in conditions {
        let same = find(stored, &condition.type_).filter(|s| s.status == condition.status);
        condition.last_transition_time = same.map_or(Time(now), |s| s.last_transition_time.clone());
    }
}

/// Whether Ready was said of this generation of the spec.
pub fn is_said_of(conditions: &[Condition], generation: i64) -> bool {
    find(conditions, READY).is_some_and(|condition| condition.observed_generation == Some(generation))
}

/// The reason of Ready, as it was said last.
pub fn reason(conditions: &[Condition]) -> Option<&str> {
    find(conditions, READY).map(|c| c.reason.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn types(list: &[Condition]) -> Vec<String> {
        list.iter().map(|c| format!("{}={}", c.type_, c.status)).collect()
    }

    #[test]
    fn what_a_person_must_mend_is_stalled_and_what_mends_itself_is_not() {
        let mut list = Vec::new();
        let mut said = |reason: Reason| {
            say(&mut list, reason.kind(), (reason.as_str(), "m"), Some(1), at(0));
            (types(&list), self::reason(&list).map(str::to_owned))
        };
        assert_eq!(said(Reason::NotTrusted).0, ["Ready=False", "Stalled=True"]);
        assert_eq!(said(Reason::Unreachable).0, ["Ready=False", "Reconciling=True"]);
        assert_eq!(said(Reason::Progressing).0, ["Ready=Unknown", "Reconciling=True"]);
        assert_eq!(said(Reason::Suspended).0, ["Ready=False"]);
        assert_eq!(
            said(Reason::Connected),
            (vec!["Ready=True".to_owned()], Some("Connected".to_owned()))
        );
    }

    #[test]
    fn what_is_not_found_is_in_progress_for_ten_seconds_and_then_stalled() {
        let mut list = Vec::new();
        let mut said = |second| {
            let kind = kind_now(&list, Reason::ServerNotFound, at(second));
            say(&mut list, kind, ("ServerNotFound", "m"), Some(1), at(second));
            kind
        };
        assert_eq!(said(0), ReasonKind::InProgress);
        assert_eq!(said(9), ReasonKind::InProgress);
        assert_eq!(said(10), ReasonKind::Stalled);
        assert_eq!(said(11), ReasonKind::Stalled, "it is not young again");
    }

    #[test]
    fn a_condition_has_the_time_since_which_it_is_stored_with_its_status() {
        let said = |status, second| {
            let mut list = Vec::new();
            set(&mut list, (READY, status), ("R", "m"), Some(1), at(second));
            list
        };
        let mut new = said(ConditionStatus::True, 1);
        keep_times(&mut new, &said(ConditionStatus::False, 5), at(7));
        assert_eq!(new[0].last_transition_time.0, at(7), "it became true only now");
        keep_times(&mut new, &said(ConditionStatus::True, 5), at(8));
        assert_eq!(new[0].last_transition_time.0, at(5));
    }
}
