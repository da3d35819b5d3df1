//! How a Warm move copies, and when it has copied enough: rules over measured rounds, no effects. The numbers come from
//! the lab (facts about containers, section 10).

use std::time::Duration;

use berth_api::moves::Round;
use berth_api::placement::Warm;

use crate::model::{Pool, ServerFacts};

/// What a stop takes in the daemon, whatever the guest does.
pub const STOP: Duration = Duration::from_millis(700);
/// What guard, verification and start take.
pub const START: Duration = Duration::from_millis(500);
/// Bytes per second at which a pool without copy-on-write makes a snapshot, the guest standing still.
pub const SNAPSHOT_RATE: u64 = 280_000_000;
/// The shortest a round can be.
const SHORTEST: Duration = Duration::from_millis(300);
/// Rounds with less are too small to tell whether they were incremental.
const TELLING: i64 = 32 << 20;
/// A guest that stood still for less than that was not frozen by the copying.
const STOOD_STILL: Duration = Duration::from_secs(2);

/// How a running instance is copied from one pool to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Both pools send differences between snapshots: a fresh snapshot before every round, the last included.
    Snapshots,
    /// The source's pool reads a running instance from a snapshot of its own; files are compared, so no snapshot of ours
    /// is needed.
    Compare,
    /// The guest stands still while its pool is read: one copy from a snapshot, and nothing more until it is stopped.
    FromSnapshot,
}

/// The way between two pools.
pub fn way(from: &Pool, to: &Pool) -> Way {
    match (from.copy_on_write(), from.driver == to.driver) {
        (true, true) => Way::Snapshots,
        (true, false) => Way::Compare,
        (false, _) => Way::FromSnapshot,
    }
}

/// The same by the names of the pools; `None` if one of them is not known.
pub fn way_between(source: &ServerFacts, from: Option<&str>, target: &ServerFacts, to: Option<&str>) -> Option<Way> {
    Some(way(source.pool(from?)?, target.pool(to?)?))
}

/// What comes after the rounds so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another round while the instance runs.
    Round,
    /// The stop.
    Stop,
    /// The rounds send everything again: this method is no good here.
    NotIncremental,
    /// The guest stood still while it was copied: likewise.
    Frozen,
}

/// What comes after `rounds`, during which the guest stood still for `frozen`.
pub fn next(rounds: &[Round], frozen: Duration, way: Way, rules: Warm) -> Next {
    let Some(last) = rounds.last() else { return Next::Round };
    if way == Way::FromSnapshot {
        return Next::Stop;
    }
    let all: Duration = rounds.iter().map(|r| r.duration.as_std()).sum();
    // snapshots of ours are all that stops a guest whose pools send differences: a slow one says nothing of the next
    if way == Way::Compare && frozen > STOOD_STILL && frozen > all / 2 {
        return Next::Frozen;
    }
    if incremental(rounds) == Some(false) {
        return Next::NotIncremental;
    }
    let enough = rounds.len() >= usize::try_from(rules.max_rounds).unwrap_or(1);
    let shrinks_no_more = match rounds {
        [_, .., before, _] => last.duration.as_std() * 10 >= before.duration.as_std() * 9,
        _ => false,
    };
    if enough || shrinks_no_more || last_round(rounds) <= rules.downtime_goal.as_std() {
        return Next::Stop;
    }
    Next::Round
}

/// Whether the second round sent less than the first; `None` if they were too few or too small to tell. Only bytes count:
/// how long a round took says more about the servers than about the pools.
pub fn incremental(rounds: &[Round]) -> Option<bool> {
    let [first, second, ..] = rounds else { return None };
    let all = first.bytes.filter(|b| *b >= TELLING)?;
    // what was too quick to be counted was small
    Some(second.bytes.unwrap_or(0) < all / 10 * 8)
}

/// What the round after the stop is expected to take: rounds shrink as they did.
pub fn last_round(rounds: &[Round]) -> Duration {
    let expected = match rounds {
        [] => return Duration::ZERO,
        [only] => only.duration.as_std(),
        [.., before, last] => {
            let (before, last) = (before.duration.as_std(), last.duration.as_std());
            let shrunk = if before.is_zero() {
                1.0
            } else {
                (last.as_secs_f64() / before.as_secs_f64()).min(1.0)
            };
            last.mul_f64(shrunk)
        }
    };
    expected.max(SHORTEST)
}

#[cfg(test)]
mod tests {
    use berth_api::GoDuration;

    use super::*;

    fn round(megabytes: i64, millis: i64) -> Round {
        Round {
            bytes: Some(megabytes << 20),
            duration: GoDuration::from_millis(millis),
        }
    }

    fn after(rounds: &[Round]) -> Next {
        next(rounds, Duration::ZERO, Way::Snapshots, Warm::default())
    }

    #[test]
    fn a_small_instance_is_stopped_after_one_round() {
        assert_eq!(after(&[]), Next::Round);
        assert_eq!(after(&[round(2, 400)]), Next::Stop);
    }

    #[test]
    fn rounds_go_on_until_the_last_one_is_expected_within_the_goal() {
        assert_eq!(after(&[round(8000, 60_000)]), Next::Round);
        assert_eq!(
            after(&[round(8000, 60_000), round(900, 9_000)]),
            Next::Stop,
            "9 s shrink to 1.4 s"
        );
        assert_eq!(after(&[round(8000, 60_000), round(3000, 22_000)]), Next::Round);
    }

    #[test]
    fn rounds_end_when_they_shrink_no_more_or_are_as_many_as_allowed() {
        let steady = [round(8000, 60_000), round(2000, 20_000), round(2000, 19_000)];
        assert_eq!(after(&steady), Next::Stop);
        let few = Warm {
            max_rounds: 1,
            ..Warm::default()
        };
        let one = [round(8000, 60_000)];
        assert_eq!(next(&one, Duration::ZERO, Way::Snapshots, few), Next::Stop);
    }

    #[test]
    fn a_second_round_that_sends_everything_again_is_not_incremental() {
        assert_eq!(after(&[round(800, 6_000), round(856, 7_500)]), Next::NotIncremental);
        assert_eq!(
            after(&[round(4, 2_100), round(4, 2_100)]),
            Next::Round,
            "too small to tell"
        );
        let quick = Round {
            bytes: None,
            duration: GoDuration::from_millis(12_000),
        };
        assert_eq!(incremental(&[quick, quick]), None, "slow servers prove nothing");
    }

    #[test]
    fn a_guest_that_stands_still_while_it_is_copied_makes_the_method_no_good() {
        let frozen = Duration::from_secs(17);
        let rounds = [round(500, 17_800)];
        assert_eq!(next(&rounds, frozen, Way::Compare, Warm::default()), Next::Frozen);
        assert_eq!(next(&rounds, frozen, Way::FromSnapshot, Warm::default()), Next::Stop);
    }

    #[test]
    fn a_snapshot_that_a_busy_disk_holds_up_says_nothing_against_the_method() {
        let frozen = Duration::from_secs(4);
        assert_eq!(
            next(&[round(40, 900)], frozen, Way::Snapshots, Warm::default()),
            Next::Stop
        );
    }
}
