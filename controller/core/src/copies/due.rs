//! When a copy is to be made or refreshed. The clock is a parameter; schedules are UTC.

use std::str::FromStr;

use croner::Cron;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use super::record::CopyRecord;
use berth_api::present;

/// First and longest wait after a failure, in seconds.
const BACK_OFF: (i64, i64) = (10, 600);

/// When the copy is due next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Then; in the past: now.
    At(Timestamp),
    /// It was made once, and that was all.
    Never,
}

/// When the next refresh after one that began at `last` is due; `Err`: the schedule is none.
pub(super) fn next(record: &CopyRecord, last: Timestamp) -> Result<Due, String> {
    let Some(refresh) = &record.spec.refresh else {
        return Ok(Due::Never);
    };
    if let Some(interval) = refresh.interval {
        let interval = SignedDuration::from_millis(interval.as_millis());
        return Ok(last.checked_add(interval).map_or(Due::Never, Due::At));
    }
    let Some(schedule) = present(&refresh.schedule) else {
        return Ok(Due::Never);
    };
    let cron =
        Cron::from_str(schedule).map_err(|e| format!("spec.refresh.schedule {schedule:?} is no cron schedule: {e}"))?;
    let next = cron.find_next_occurrence(&last.to_zoned(TimeZone::UTC), false);
    Ok(next.map_or(Due::Never, |at| Due::At(at.timestamp())))
}

/// When an attempt that failed for the `failures`th time in a row is made again.
pub(super) fn retry_at(failures: i32, now: Timestamp) -> Timestamp {
    let doublings = u32::try_from(failures.saturating_sub(1)).unwrap_or(0).min(10);
    let seconds = BACK_OFF.0.saturating_mul(1 << doublings).min(BACK_OFF.1);
    let at = now.checked_add(SignedDuration::from_secs(seconds)).unwrap_or(now);
    // a message names it: whole seconds read better
    at.round(jiff::Unit::Second).unwrap_or(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(s: &str) -> Timestamp {
        s.parse().unwrap_or_else(|e| panic!("{s}: {e}"))
    }

    #[test]
    fn failures_are_repeated_after_ten_seconds_and_never_later_than_ten_minutes() {
        let now = at("2026-11-21T10:00:00Z");
        let seconds = |n| retry_at(n, now).as_second() - now.as_second();
        assert_eq!([1, 2, 3, 7, 100].map(seconds), [10, 20, 40, 600, 600]);
    }
}
