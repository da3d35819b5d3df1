//! When a move may stop an instance: windows of a cron schedule, a duration and a time zone. The clock is a parameter.

use std::fmt;
use std::str::FromStr;

use berth_api::placement::Window;
use berth_api::{GoDuration, Method, Reason, present};
use croner::Cron;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::plan::{Blocker, Decision};

/// No window is open now.
#[derive(Clone, Debug, PartialEq)]
pub enum Closed {
    /// The next one that is long enough opens then; `None`: never again.
    Until(Option<Timestamp>),
    /// None of them is as long as what is to be done.
    TooShort(SignedDuration),
    /// One of them cannot be understood.
    Invalid(String),
}

impl Closed {
    /// The same as a decision.
    pub fn decision(&self) -> Decision {
        let wait = |until| Decision::Wait {
            reason: Reason::WaitingForWindow,
            message: self.to_string(),
            until,
        };
        match self {
            Closed::Until(until) => wait(*until),
            Closed::TooShort(_) => wait(None),
            Closed::Invalid(_) => {
                let fix = "correct spec.windows: a cron schedule of five fields and an IANA time zone".to_owned();
                Decision::Blocked(vec![Blocker::new(Reason::InvalidSpec, self.to_string(), Some(fix))])
            }
        }
    }
}

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Closed::Until(Some(at)) => write!(f, "waits for the window that opens at {at}"),
            Closed::Until(None) => f.write_str("none of the windows ever opens again"),
            Closed::TooShort(needs) => {
                let needs = GoDuration::whole_millis(needs.unsigned_abs());
                write!(
                    f,
                    "none of the windows is as long as the {needs} that it is expected to take"
                )
            }
            Closed::Invalid(why) => f.write_str(why),
        }
    }
}

/// Whether something that takes as long as `needs` and stops the instance by `method` may begin at `now`. Without a window
/// for the method it always may.
pub fn check(windows: &[Window], method: Method, needs: SignedDuration, now: Timestamp) -> Result<(), Closed> {
    let mut next: Option<Timestamp> = None;
    let (mut applies, mut fits) = (false, false);
    for window in windows
        .iter()
        .filter(|w| w.methods.is_empty() || w.methods.contains(&method))
    {
        applies = true;
        let length = SignedDuration::from_millis(window.duration.as_millis());
        let long_enough = needs <= length;
        fits |= long_enough;
        let (open, opens) = state(window, length, needs, now)?;
        if open {
            return Ok(());
        }
        next = [next, opens.filter(|_| long_enough)].into_iter().flatten().min();
    }
    match (applies, fits) {
        (false, _) => Ok(()),
        (true, true) => Err(Closed::Until(next)),
        (true, false) => Err(Closed::TooShort(needs)),
    }
}

/// Whether the window is open for as long as it needs, and when it opens next.
fn state(
    window: &Window,
    length: SignedDuration,
    needs: SignedDuration,
    now: Timestamp,
) -> Result<(bool, Option<Timestamp>), Closed> {
    let cron = Cron::from_str(&window.schedule)
        .map_err(|e| Closed::Invalid(format!("the schedule {:?} is no cron schedule: {e}", window.schedule)))?;
    let name = present(&window.time_zone).unwrap_or("UTC");
    let zone = TimeZone::get(name).map_err(|_| Closed::Invalid(format!("there is no time zone {name:?}")))?;
    // an opening within the last `length` is still open, one within less than that for long enough
    let left = length.checked_sub(needs).unwrap_or(SignedDuration::ZERO);
    let since = now.checked_sub(left).unwrap_or(now).to_zoned(zone.clone());
    // an opening at `since` is over, unless all of the window is needed
    let whole = left.is_zero();
    let last = cron.find_next_occurrence(&since, whole).ok().map(|z| z.timestamp());
    let open = needs <= length && last.is_some_and(|at| at <= now);
    let next = cron
        .find_next_occurrence(&now.to_zoned(zone), false)
        .ok()
        .map(|z| z.timestamp());
    Ok((open, next))
}
