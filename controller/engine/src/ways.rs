//! What is known of the ways between servers: which worked last, and on which one did not reach the other. It counts only
//! as long as versions and addresses of both are as they were then.

use std::collections::BTreeMap;
use std::sync::Mutex;

use berth_api::server::TransferMemory;
use berth_api::{Outcome, Reason, Transfer};
use berth_core::plan::Way;
use berth_core::records::Record;

use crate::{Key, lock};

/// The ways to each server, by the InstanceServer that data came from.
#[derive(Default)]
pub(crate) struct Ways {
    known: Mutex<BTreeMap<Key, BTreeMap<String, Known>>>,
}

struct Known {
    /// What it depends on.
    under: String,
    way: Way,
}

impl Ways {
    /// Takes over what an earlier process wrote down; what this one knows counts more.
    pub fn seed(&self, to: &Key, memories: &[TransferMemory]) {
        let mut all = lock(&self.known);
        let ways = all.entry(to.clone()).or_default();
        for memory in memories {
            let known = || Known {
                under: memory.under.clone(),
                way: Way {
                    worked: Some(memory.mode),
                    ..Way::default()
                },
            };
            ways.entry(memory.from.clone()).or_insert_with(known);
        }
    }

    /// Takes note of how a move ended; whether that is news for a status.
    pub fn learn(&self, to: &Key, record: &Record, under: &str) -> bool {
        let way = record.spec.transfer;
        if way == Transfer::Internal {
            return false;
        }
        let unreachable = record
            .status
            .undo
            .as_ref()
            .is_some_and(|u| u.reason == Reason::PeerUnreachable.as_str());
        let succeeded = record.status.outcome() == Some(Outcome::Succeeded);
        if !unreachable && !succeeded {
            return false;
        }
        let mut all = lock(&self.known);
        let known = all
            .entry(to.clone())
            .or_default()
            .entry(record.spec.from.server.clone())
            .or_insert_with(|| Known {
                under: under.to_owned(),
                way: Way::default(),
            });
        if known.under != under {
            (known.under, known.way) = (under.to_owned(), Way::default());
        }
        let before = known.way.worked;
        if succeeded {
            known.way.worked = Some(way);
            known.way.failed.remove(&way);
        } else {
            known.way.failed.insert(way);
            known.way.worked = before.filter(|w| *w != way);
        }
        known.way.worked != before
    }

    /// What still counts. `under` says what a way from that server depends on now.
    pub fn known(&self, to: &Key, under: impl Fn(&str) -> Option<String>) -> BTreeMap<String, Way> {
        let all = lock(&self.known);
        let ways = all.get(to).into_iter().flatten();
        // one that does not count any more says that it is found out anew
        ways.map(|(from, known)| match under(from) {
            Some(now) if now == known.under => (from.clone(), known.way.clone()),
            Some(_) | None => (from.clone(), Way::default()),
        })
        .collect()
    }

    /// What worked last from each source; nothing where it does not work any more.
    pub fn worked(&self, to: &Key) -> Vec<(String, Option<TransferMemory>)> {
        let all = lock(&self.known);
        let ways = all.get(to).into_iter().flatten();
        let memory = |(from, known): (&String, &Known)| {
            let worked = known.way.worked.map(|mode| TransferMemory {
                from: from.clone(),
                mode,
                under: known.under.clone(),
            });
            (from.clone(), worked)
        };
        ways.map(memory).collect()
    }
}
