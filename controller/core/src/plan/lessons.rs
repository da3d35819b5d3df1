//! What moves taught about a pair of pools and about an instance: how fast data go, what the last round took, whether
//! rounds are incremental. Derived from the records alone, so every process learns the same.

use std::collections::BTreeMap;
use std::time::Duration;

use berth_api::moves::MoveEnd;
use berth_api::{InstanceType, Method, Outcome, Reason};
use jiff::{SignedDuration, Timestamp};

use crate::moves::{End, without_criu};
use crate::records::Record;

/// For so long a pair counts as not incremental.
pub(super) const REMEMBERED: SignedDuration = SignedDuration::from_hours(24);
/// Less tells nothing about the rate.
const TELLING: i64 = 8 << 20;

/// Everything that was learnt.
#[derive(Clone, Debug, Default)]
pub struct Lessons {
    pairs: BTreeMap<Pair, Lesson>,
    /// Bytes that a whole copy of an instance took, by its uuid.
    sizes: BTreeMap<String, i64>,
    /// What servers said last of CRIU, by fingerprint: when, and in which words that it is missing.
    criu: BTreeMap<String, (Timestamp, Option<String>)>,
}

/// Two pools: fingerprint and name of each.
type Pair = [(String, String); 2];

/// What is known of a pair of pools.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lesson {
    /// Bytes per second.
    pub rate: Option<i64>,
    /// What the round after the stop took last.
    pub last_round: Option<Duration>,
    /// When a Warm move was given up because rounds send everything again, and its words.
    pub not_incremental: Option<(Timestamp, String)>,
}

fn pair(from: (&str, Option<&str>), to: (&str, Option<&str>)) -> Pair {
    [from, to].map(|(server, pool)| (server.to_owned(), pool.unwrap_or_default().to_owned()))
}

fn end(end: &MoveEnd) -> (&str, Option<&str>) {
    (&end.fingerprint, end.pool.as_deref())
}

impl Lessons {
    /// Learns from a move that is over.
    pub fn learn(&mut self, record: &Record) {
        let (spec, status) = (&record.spec, &record.status);
        let lesson = self.pairs.entry(pair(end(&spec.from), end(&spec.to))).or_default();
        let rounds = status.precopy.as_ref().map(|p| p.rounds.as_slice()).unwrap_or_default();
        let whole = match (rounds.first(), status.progress) {
            (Some(first), _) => first.bytes.map(|b| (b, rate(b, first.duration.as_std()))),
            (None, Some(p)) if status.outcome() == Some(Outcome::Succeeded) => p.bytes.map(|b| (b, p.bytes_per_second)),
            (None, _) => None,
        };
        if let Some((bytes, per_second)) = whole {
            lesson.rate = per_second.filter(|r| *r > 0 && bytes >= TELLING).or(lesson.rate);
            if let Some(uuid) = &spec.from.uuid {
                self.sizes.insert(uuid.clone(), bytes);
            }
        }
        let last = rounds
            .last()
            .filter(|_| rounds.len() > 1 && status.outcome() == Some(Outcome::Succeeded));
        lesson.last_round = last.map(|r| r.duration.as_std()).or(lesson.last_round);
        let undo = status
            .undo
            .as_ref()
            .filter(|u| u.reason == Reason::NotIncremental.as_str());
        if let (Some(undo), Some(at)) = (undo, &status.finished_at) {
            lesson.not_incremental = Some((at.0, undo.message.clone()));
        } else if last.is_some() {
            lesson.not_incremental = None;
        }
        self.learn_criu(record);
    }

    fn learn_criu(&mut self, record: &Record) {
        let (spec, status) = (&record.spec, &record.status);
        let Some(at) = status.finished_at.as_ref().map(|t| t.0) else {
            return;
        };
        let mut note = |end: &MoveEnd, words: Option<&str>| {
            let said = self.criu.entry(end.fingerprint.clone()).or_insert((at, None));
            // records are read in any order
            if said.0 <= at {
                *said = (at, words.map(str::to_owned));
            }
        };
        let missing = status
            .undo
            .as_ref()
            .filter(|u| u.reason == Reason::CriuMissing.as_str());
        if let Some(undo) = missing {
            match without_criu(&undo.message) {
                Some(End::Source) => note(&spec.from, Some(&undo.message)),
                Some(End::Target) => note(&spec.to, Some(&undo.message)),
                None => {}
            }
        }
        let with_criu = spec.method == Method::Live && spec.instance_type == InstanceType::Container;
        if with_criu && status.outcome() == Some(Outcome::Succeeded) {
            note(&spec.from, None);
            note(&spec.to, None);
        }
    }

    /// When that server said last that it has no CRIU, and its words.
    pub fn without_criu(&self, fingerprint: &str) -> Option<(Timestamp, &str)> {
        let (at, words) = self.criu.get(fingerprint)?;
        Some((*at, words.as_deref()?))
    }

    /// Somebody says that it is worth another try.
    pub fn forget_criu(&mut self) {
        self.criu.clear();
    }

    /// What is known of the pools of two servers, by their fingerprints.
    pub fn of(&self, from: (&str, Option<&str>), to: (&str, Option<&str>)) -> Lesson {
        self.pairs.get(&pair(from, to)).cloned().unwrap_or_default()
    }

    /// Bytes that a whole copy of that instance took.
    pub fn size(&self, uuid: &str) -> Option<i64> {
        self.sizes.get(uuid).copied()
    }
}

fn rate(bytes: i64, time: Duration) -> Option<i64> {
    let millis = i64::try_from(time.as_millis()).ok().filter(|m| *m > 0)?;
    Some(bytes.saturating_mul(1000) / millis)
}
