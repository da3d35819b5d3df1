//! What a move is expected to take: from the size of the instance and from what moves between the same pools taught.
//! Where neither the server nor a move has told the size, nothing is said.

use std::time::Duration;

use berth_api::{Estimate, GoDuration};

use super::lessons::Lesson;
use crate::moves::rounds::{self, Way};

/// Bytes per second between pools that send differences, until a move has taught better.
const BLOCKS: i64 = 150_000_000;
/// The same between pools whose files are compared.
const FILES: i64 = 28_000_000;
/// Bytes per second at which files that are alike are compared.
const COMPARED: i64 = 800_000_000;
/// Requests before the first byte and after the last.
const AROUND: Duration = Duration::from_millis(300);

/// What is known of the data of a move.
pub(super) struct Data<'a> {
    /// Size of the instance.
    pub bytes: i64,
    /// How it is copied while it runs; `None`: its pools are not known.
    pub way: Option<Way>,
    /// What moves between these pools taught.
    pub lesson: &'a Lesson,
    /// Whether a kept source is brought up to date, so that only a difference is sent.
    pub back: bool,
}

impl Data<'_> {
    fn at(&self, rate: i64) -> Duration {
        let rate = rate.max(1);
        Duration::from_millis(u64::try_from(self.bytes.saturating_mul(1000) / rate).unwrap_or(0))
    }

    fn whole(&self) -> Duration {
        let usual = if self.way == Some(Way::Snapshots) {
            BLOCKS
        } else {
            FILES
        };
        self.at(self.lesson.rate.unwrap_or(usual))
    }

    /// What little changed, without knowing how much.
    fn difference(&self) -> Duration {
        match self.way {
            Some(Way::Snapshots) => Duration::from_millis(400),
            Some(Way::Compare | Way::FromSnapshot) | None => Duration::from_secs(1) + self.at(COMPARED),
        }
    }

    /// Of a Cold move of a running instance.
    pub fn cold(&self) -> Estimate {
        let sent = if self.back { self.difference() } else { self.whole() };
        let downtime = rounds::STOP + AROUND + sent + rounds::START;
        self.estimate(downtime + AROUND, downtime)
    }

    /// Of a Warm move.
    pub fn warm(&self) -> Estimate {
        let last = self.lesson.last_round.unwrap_or_else(|| self.difference());
        let frozen = match self.way {
            Some(Way::FromSnapshot) => self.at(i64::try_from(rounds::SNAPSHOT_RATE).unwrap_or(i64::MAX)),
            Some(Way::Snapshots | Way::Compare) | None => Duration::ZERO,
        };
        let downtime = frozen + rounds::STOP + last + rounds::START;
        self.estimate(self.whole() + last + downtime + AROUND, downtime)
    }

    fn estimate(&self, duration: Duration, downtime: Duration) -> Estimate {
        Estimate {
            bytes: Some(self.bytes),
            duration: Some(rounded(duration)),
            downtime: Some(rounded(downtime)),
        }
    }
}

/// Nobody foretells more than tenths of seconds.
fn rounded(d: Duration) -> GoDuration {
    let tenths = (d.as_millis() + 50) / 100;
    GoDuration::from_millis(i64::try_from(tenths * 100).unwrap_or(i64::MAX))
}
