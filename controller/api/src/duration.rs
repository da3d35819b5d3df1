//! Durations as people write them in Kubernetes objects: Go syntax such as `90s`, `1h30m` or `1.4s`.
//!
//! Never negative. Written back in the shortest form (`1m30s`, `6h`, `350ms`), so that equal values are equal text.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A duration in Go syntax, for example `90s`, `1h30m` or `1.4s`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GoDuration(Duration);

/// Why a text is no duration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseDurationError {
    text: String,
}

impl fmt::Display for ParseDurationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is no duration: write for example \"90s\", \"1h30m\" or \"1.5s\"",
            self.text
        )
    }
}

impl std::error::Error for ParseDurationError {}

impl GoDuration {
    /// No time at all.
    pub const ZERO: Self = Self(Duration::ZERO);

    /// A duration of whole seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// A duration of whole milliseconds; a negative number counts as none.
    pub const fn from_millis(millis: i64) -> Self {
        Self(Duration::from_millis(if millis < 0 {
            0
        } else {
            millis.unsigned_abs()
        }))
    }

    /// A measured time without what is shorter than a millisecond.
    pub fn whole_millis(measured: Duration) -> Self {
        Self::from_millis(Self(measured).as_millis())
    }

    /// The duration in whole milliseconds, as far as an `i64` reaches.
    pub fn as_millis(&self) -> i64 {
        i64::try_from(self.0.as_millis()).unwrap_or(i64::MAX)
    }

    /// The duration as the standard library's type.
    pub const fn as_std(&self) -> Duration {
        self.0
    }

    /// Whether this is no time at all.
    pub const fn is_zero(&self) -> bool {
        self.0.is_zero()
    }
}

impl From<Duration> for GoDuration {
    fn from(value: Duration) -> Self {
        Self(value)
    }
}

impl From<GoDuration> for Duration {
    fn from(value: GoDuration) -> Self {
        value.0
    }
}

/// The decimal fraction of `nanos` out of `digits` places, without trailing zeros: `.4` for 400 of 3 places.
fn fraction(nanos: u32, digits: usize) -> String {
    if nanos == 0 {
        return String::new();
    }
    let text = format!(".{nanos:0digits$}");
    text.trim_end_matches('0').to_owned()
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanos) = (self.0.as_secs(), self.0.subsec_nanos());
        if seconds == 0 && nanos > 0 {
            return write!(f, "{}{}ms", nanos / 1_000_000, fraction(nanos % 1_000_000, 6));
        }
        let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        if hours > 0 {
            write!(f, "{hours}h")?;
        }
        if minutes > 0 {
            write!(f, "{minutes}m")?;
        }
        if rest > 0 || nanos > 0 || seconds == 0 {
            write!(f, "{rest}{}s", fraction(nanos, 9))?;
        }
        Ok(())
    }
}

/// Nanoseconds in one of the units, or none if there is no such unit.
fn unit(name: &str) -> Option<u64> {
    match name {
        "ns" => Some(1),
        "us" | "µs" | "μs" => Some(1_000),
        "ms" => Some(1_000_000),
        "s" => Some(1_000_000_000),
        "m" => Some(60_000_000_000),
        "h" => Some(3_600_000_000_000),
        _ => None,
    }
}

/// One number such as `1` or `1.5`, times the unit, in nanoseconds.
fn term(number: &str, unit: u64) -> Option<u128> {
    let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && decimals.is_empty()) || whole.len() > 10 {
        return None;
    }
    let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let mut nanos = whole.checked_mul(u128::from(unit))?;
    let mut place = u128::from(unit);
    for digit in decimals.chars() {
        place /= 10;
        nanos += u128::from(digit.to_digit(10)?) * place;
    }
    Some(nanos)
}

fn parse(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let (mut rest, mut total) = (text, 0_u128);
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, after) = rest.split_at(number_end);
        let unit_end = after
            .find(|c: char| c.is_ascii_digit() || c == '.')
            .unwrap_or(after.len());
        let (name, next) = after.split_at(unit_end);
        total = total.checked_add(term(number, unit(name)?)?)?;
        rest = next;
    }
    if text.is_empty() {
        return None;
    }
    let seconds = u64::try_from(total / 1_000_000_000).ok()?;
    let nanos = u32::try_from(total % 1_000_000_000).ok()?;
    Some(Duration::new(seconds, nanos))
}

impl FromStr for GoDuration {
    type Err = ParseDurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text)
            .map(Self)
            .ok_or_else(|| ParseDurationError { text: text.to_owned() })
    }
}

impl Serialize for GoDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for GoDuration {
    fn schema_name() -> Cow<'static, str> {
        "GoDuration".into()
    }

    fn inline_schema() -> bool {
        true
    }

    // No `format: duration`: that would be the ISO 8601 form. Ten digits and nine decimals at most, as the parser has it.
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "maxLength": 32,
            "pattern": r"^(0|([0-9]{1,10}(\.[0-9]{1,9})?(ns|us|ms|s|m|h))+)$",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_in_go_syntax_and_written_in_the_shortest_form() {
        let rows = [
            ("90s", "1m30s"),
            ("1h30m", "1h30m"),
            ("1.5h", "1h30m"),
            ("60s", "1m"),
            ("0s", "0s"),
            ("0", "0s"),
            ("1.4s", "1.4s"),
            ("350ms", "350ms"),
            ("1500us", "1.5ms"),
            ("6h0m0s", "6h"),
            ("25h", "25h"),
            ("1m0.25s", "1m0.25s"),
            ("1ns", "0.000001ms"),
        ];
        for (text, shortest) in rows {
            let value: GoDuration = text.parse().unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(value.to_string(), shortest, "{text}");
            assert_eq!(shortest.parse(), Ok(value), "{shortest} means the same");
        }
    }

    #[test]
    fn what_is_no_duration_is_refused_with_an_example() {
        for text in [
            "",
            "10",
            "1d",
            "-5s",
            "90 minutes",
            "s",
            ".s",
            "1..5s",
            "5 s",
            "99999999999h",
        ] {
            let error = text.parse::<GoDuration>().map_err(|e| e.to_string());
            assert!(error.is_err_and(|e| e.contains("1h30m")), "{text:?}");
        }
    }

    #[test]
    fn milliseconds_go_both_ways() {
        assert_eq!(GoDuration::from_millis(1400).to_string(), "1.4s");
        assert_eq!(GoDuration::from_millis(-1), GoDuration::ZERO);
        assert_eq!(GoDuration::from_secs(2).as_millis(), 2000);
    }
}
