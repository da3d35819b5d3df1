//! Ready, and Reconciling or Stalled as the reason demands, for the kinds whose status is made here. Those of a placement
//! come from berth-core.

use berth_api::conditions::{self, ConditionStatus, READY, RECONCILING, STALLED};
use berth_api::{Condition, Reason, ReasonKind};
use jiff::Timestamp;

/// Says `reason`, in all conditions that follow from it.
pub(crate) fn say(list: &mut Vec<Condition>, reason: Reason, message: &str, generation: Option<i64>, now: Timestamp) {
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

/// The reason of Ready, as it was said last.
pub(crate) fn reason(list: &[Condition]) -> Option<&str> {
    conditions::find(list, READY).map(|c| c.reason.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_person_must_mend_is_stalled_and_what_mends_itself_is_not() {
        let mut list = Vec::new();
        let types = |list: &[Condition]| {
            list.iter()
                .map(|c| format!("{}={}", c.type_, c.status))
                .collect::<Vec<_>>()
        };
        say(&mut list, Reason::NotTrusted, "m", Some(1), Timestamp::UNIX_EPOCH);
        assert_eq!(types(&list), ["Ready=False", "Stalled=True"]);
        say(&mut list, Reason::Unreachable, "m", Some(1), Timestamp::UNIX_EPOCH);
        assert_eq!(types(&list), ["Ready=False", "Reconciling=True"]);
        say(&mut list, Reason::Connected, "m", Some(1), Timestamp::UNIX_EPOCH);
        assert_eq!(types(&list), ["Ready=True"]);
        assert_eq!(reason(&list), Some("Connected"));
    }
}
