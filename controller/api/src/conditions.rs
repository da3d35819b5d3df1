//! Conditions of the kinds: the types used, and small functions to read and set them.

use jiff::Timestamp;

use crate::{Condition, Time};

/// Always present: whether all is as the spec says.
pub const READY: &str = "Ready";
/// Present while true: work goes on.
pub const RECONCILING: &str = "Reconciling";
/// Present while true: a person is needed.
pub const STALLED: &str = "Stalled";
/// Present while true: a retired copy waits on a server that does not answer.
pub const LEFTOVER_PENDING: &str = "LeftoverPending";

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
