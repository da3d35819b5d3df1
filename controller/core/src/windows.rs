//! When a move may stop an instance: windows of a cron schedule, a duration and a time zone. The clock is a parameter.

use std::fmt;
use std::str::FromStr;

use berth_api::placement::Window;
use berth_api::{Method, Reason, present};
use croner::Cron;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use crate::plan::{Blocker, Decision};

/// No window is open now.
#[derive(Clone, Debug, PartialEq)]
pub enum Closed {
    /// The next one opens then; `None`: never again.
    Until(Option<Timestamp>),
    /// One of them cannot be understood.
    Invalid(String),
}

impl Closed {
    /// The same as a decision.
    pub fn decision(&self) -> Decision {
        match self {
            Closed::Until(until) => Decision::Wait {
                reason: Reason::WaitingForWindow,
                message: self.to_string(),
                until: *until,
            },
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
            Closed::Invalid(why) => f.write_str(why),
        }
    }
}

/// Whether a move by `method` may begin at `now`. Without a window for the method it always may.
pub fn check(windows: &[Window], method: Method, now: Timestamp) -> Result<(), Closed> {
    let mut next: Option<Timestamp> = None;
    let mut applies = false;
    for window in windows
        .iter()
        .filter(|w| w.methods.is_empty() || w.methods.contains(&method))
    {
        applies = true;
        let (open, opens) = state(window, now)?;
        if open {
            return Ok(());
        }
        next = [next, opens].into_iter().flatten().min();
    }
    if applies { Err(Closed::Until(next)) } else { Ok(()) }
}

/// Whether the window is open, and when it opens next.
fn state(window: &Window, now: Timestamp) -> Result<(bool, Option<Timestamp>), Closed> {
    let cron = Cron::from_str(&window.schedule)
        .map_err(|e| Closed::Invalid(format!("the schedule {:?} is no cron schedule: {e}", window.schedule)))?;
    let name = present(&window.time_zone).unwrap_or("UTC");
    let zone = TimeZone::get(name).map_err(|_| Closed::Invalid(format!("there is no time zone {name:?}")))?;
    let length = SignedDuration::from_millis(window.duration.as_millis());
    // an opening within the last `length` is still open
    let since = now.checked_sub(length).unwrap_or(now).to_zoned(zone.clone());
    let last = cron.find_next_occurrence(&since, false).ok().map(|z| z.timestamp());
    let open = last.is_some_and(|at| at <= now);
    let next = cron
        .find_next_occurrence(&now.to_zoned(zone), false)
        .ok()
        .map(|z| z.timestamp());
    Ok((open, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(s: &str) -> Timestamp {
        s.parse().unwrap_or_else(|e| panic!("{s}: {e}"))
    }

    fn saturday_night(methods: Vec<Method>) -> Window {
        Window {
            schedule: "0 2 * * 6".to_owned(),
            duration: "3h".parse().unwrap_or_default(),
            time_zone: Some("Europe/Berlin".to_owned()),
            methods,
        }
    }

    #[test]
    fn a_window_is_open_from_its_start_for_its_duration_in_its_own_time_zone() {
        let w = [saturday_night(vec![])];
        assert_eq!(
            check(&w, Method::Cold, at("2026-11-21T01:00:00Z")),
            Ok(()),
            "02:00 in Berlin"
        );
        assert_eq!(check(&w, Method::Cold, at("2026-11-21T03:59:00Z")), Ok(()));
        let next = Closed::Until(Some(at("2026-11-28T01:00:00Z")));
        assert_eq!(check(&w, Method::Cold, at("2026-11-21T04:00:01Z")), Err(next));
    }

    #[test]
    fn a_window_binds_only_the_methods_that_it_names() {
        let w = [saturday_night(vec![Method::Cold])];
        assert_eq!(check(&w, Method::Live, at("2026-11-22T12:00:00Z")), Ok(()));
        assert!(check(&w, Method::Cold, at("2026-11-22T12:00:00Z")).is_err());
    }

    #[test]
    fn a_schedule_that_is_none_is_said_in_a_sentence() {
        let w = [Window {
            schedule: "every day".to_owned(),
            ..saturday_night(vec![])
        }];
        assert!(matches!(
            check(&w, Method::Cold, at("2026-11-22T12:00:00Z")),
            Err(Closed::Invalid(_))
        ));
    }
}
