//! When a move may stop an instance: windows over time zones, over both changes of the clocks, and against estimates.

use berth_api::Method;
use berth_api::placement::Window;
use berth_core::windows::{Closed, check};
use jiff::{SignedDuration, Timestamp};

fn at(s: &str) -> Timestamp {
    s.parse().unwrap_or_else(|e| panic!("{s}: {e}"))
}

fn window(schedule: &str, duration: &str, zone: &str) -> Window {
    Window {
        schedule: schedule.to_owned(),
        duration: duration.parse().unwrap_or_default(),
        time_zone: Some(zone.to_owned()),
        methods: vec![],
    }
}

fn saturday_night() -> Window {
    window("0 2 * * 6", "3h", "Europe/Berlin")
}

/// Whether it is open then.
fn open(w: &Window, when: &str) -> bool {
    check(std::slice::from_ref(w), Method::Cold, SignedDuration::ZERO, at(when)).is_ok()
}

/// When it opens next, seen from a time at which it is closed.
fn next(w: &Window, when: &str) -> String {
    match check(std::slice::from_ref(w), Method::Cold, SignedDuration::ZERO, at(when)) {
        Err(Closed::Until(Some(t))) => t.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_window_is_open_from_its_start_for_its_duration_in_its_own_time_zone() {
    let w = saturday_night();
    assert!(open(&w, "2026-11-21T01:00:00Z"), "02:00 in Berlin");
    assert!(open(&w, "2026-11-21T03:59:59Z"));
    assert!(!open(&w, "2026-11-21T00:59:59Z") && !open(&w, "2026-11-21T04:00:00Z"));
    assert_eq!(next(&w, "2026-11-21T04:00:01Z"), "2026-11-28T01:00:00Z");
    let utc = Window { time_zone: None, ..w };
    assert!(open(&utc, "2026-11-21T02:00:00Z") && !open(&utc, "2026-11-21T01:00:00Z"));
}

#[test]
fn a_window_over_midnight_belongs_to_the_day_on_which_it_opens() {
    let w = window("0 22 * * 5", "4h", "Europe/Berlin");
    assert!(open(&w, "2026-11-21T00:30:00Z"), "01:30 on Saturday");
    assert!(!open(&w, "2026-11-20T00:30:00Z"), "01:30 on Friday");
}

#[test]
fn in_summer_it_opens_an_hour_earlier_by_the_clock_of_the_world() {
    let w = window("0 2 * * *", "1h", "Europe/Berlin");
    assert!(open(&w, "2026-07-01T00:30:00Z") && !open(&w, "2026-07-01T01:30:00Z"));
    assert!(open(&w, "2026-12-01T01:30:00Z") && !open(&w, "2026-12-01T00:30:00Z"));
}

#[test]
fn on_the_day_without_the_hour_it_opens_when_that_hour_would_have_ended() {
    // on 2026-03-29 clocks in Berlin go from 02:00 to 03:00, which is 01:00 UTC
    let w = window("0 2 * * *", "1h", "Europe/Berlin");
    assert_eq!(next(&w, "2026-03-28T12:00:00Z"), "2026-03-29T01:00:00Z");
    assert!(open(&w, "2026-03-29T01:00:00Z") && open(&w, "2026-03-29T01:59:59Z"));
    assert!(!open(&w, "2026-03-29T00:59:59Z") && !open(&w, "2026-03-29T02:00:00Z"));
    assert_eq!(
        next(&w, "2026-03-29T02:00:00Z"),
        "2026-03-30T00:00:00Z",
        "02:00 in summer"
    );
}

#[test]
fn a_window_in_the_middle_of_the_missing_hour_is_not_left_out() {
    let w = window("30 2 * * *", "1h", "Europe/Berlin");
    let opens = next(&w, "2026-03-28T12:00:00Z");
    assert!(opens.starts_with("2026-03-29T01:"), "{opens}");
    assert!(open(&w, &opens));
}

#[test]
fn a_window_that_is_open_when_the_clocks_go_forward_stays_open_for_its_duration() {
    let w = window("0 1 * * *", "2h", "Europe/Berlin");
    assert!(open(&w, "2026-03-29T00:00:00Z"), "01:00");
    assert!(open(&w, "2026-03-29T01:59:00Z"), "03:59, two hours later");
    assert!(!open(&w, "2026-03-29T02:00:00Z"));
}

#[test]
fn on_the_day_with_the_hour_twice_it_opens_once_and_stays_open_for_its_duration() {
    // on 2026-10-25 clocks in Berlin go from 03:00 back to 02:00, which is 01:00 UTC
    let w = window("30 2 * * *", "20m", "Europe/Berlin");
    assert_eq!(
        next(&w, "2026-10-24T12:00:00Z"),
        "2026-10-25T00:30:00Z",
        "02:30 in summer"
    );
    assert!(open(&w, "2026-10-25T00:30:00Z") && open(&w, "2026-10-25T00:49:59Z"));
    assert!(!open(&w, "2026-10-25T00:50:00Z"));
    assert!(!open(&w, "2026-10-25T01:35:00Z"), "02:35 for the second time");
    assert_eq!(next(&w, "2026-10-25T00:50:00Z"), "2026-10-26T01:30:00Z");
}

#[test]
fn a_zone_whose_clocks_never_change_never_changes() {
    let w = window("0 2 * * *", "1h", "Asia/Tokyo");
    for day in ["2026-03-28T17:00:00Z", "2026-10-24T17:00:00Z", "2026-12-31T17:00:00Z"] {
        assert!(open(&w, day), "{day}");
    }
}

#[test]
fn what_takes_longer_than_is_left_of_a_window_waits_for_the_next_one() {
    let w = [saturday_night()];
    let needs = |minutes: i64, when: &str| check(&w, Method::Cold, SignedDuration::from_mins(minutes), at(when));
    assert_eq!(needs(60, "2026-11-21T02:59:59Z"), Ok(()));
    let later = Err(Closed::Until(Some(at("2026-11-28T01:00:00Z"))));
    assert_eq!(needs(60, "2026-11-21T03:00:01Z"), later, "less than an hour is left");
    assert_eq!(needs(180, "2026-11-21T01:00:00Z"), Ok(()), "all of it");
    assert_eq!(needs(180, "2026-11-21T01:00:01Z"), later);
    let never = needs(181, "2026-11-21T01:00:00Z");
    assert_eq!(never, Err(Closed::TooShort(SignedDuration::from_mins(181))));
    assert!(never.err().is_some_and(|c| c.to_string().contains("3h1m")));
}

#[test]
fn of_several_windows_the_first_that_is_long_enough_counts() {
    let w = [window("0 2 * * *", "30m", "UTC"), saturday_night()];
    let needs = |minutes: i64| {
        check(
            &w,
            Method::Cold,
            SignedDuration::from_mins(minutes),
            at("2026-11-23T12:00:00Z"),
        )
    };
    assert_eq!(needs(10), Err(Closed::Until(Some(at("2026-11-24T02:00:00Z")))));
    assert_eq!(needs(60), Err(Closed::Until(Some(at("2026-11-28T01:00:00Z")))));
}

#[test]
fn a_window_binds_only_the_methods_that_it_names() {
    let w = [Window {
        methods: vec![Method::Cold],
        ..saturday_night()
    }];
    let sunday = at("2026-11-22T12:00:00Z");
    assert_eq!(check(&w, Method::Live, SignedDuration::ZERO, sunday), Ok(()));
    assert!(check(&w, Method::Cold, SignedDuration::ZERO, sunday).is_err());
}

#[test]
fn a_schedule_or_a_zone_that_is_none_is_said_in_a_sentence() {
    for w in [
        window("every day", "1h", "UTC"),
        window("0 2 * * *", "1h", "Europe/Atlantis"),
    ] {
        let closed = check(&[w], Method::Cold, SignedDuration::ZERO, at("2026-11-22T12:00:00Z"));
        assert!(matches!(closed, Err(Closed::Invalid(_))), "{closed:?}");
    }
}

#[test]
fn a_date_that_never_comes_is_waited_for_without_an_end() {
    let w = [window("0 2 31 2 *", "1h", "UTC")];
    let closed = check(&w, Method::Cold, SignedDuration::ZERO, at("2026-11-22T12:00:00Z"));
    assert_eq!(closed, Err(Closed::Until(None)));
}
