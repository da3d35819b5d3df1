//! How long a guest stands still while its server works on it: some pools freeze it for the whole of a snapshot or a copy,
//! and a guest that moves as it runs is where it was or where it goes, and for a moment nowhere. Only its status tells, so
//! that is looked at again and again; what is said is from the last look that found it running to the next that did, so
//! rather too much than too little.

use std::convert::Infallible;
use std::future::{Future, pending};
use std::sync::Arc;
use std::time::Duration;

use berth_core::model::{InstanceKind, InstanceRef, Power};
use berth_core::moves::{Effect, Request};
use berth_core::server::{OperationId, OperationState, Server};
use futures::future::join_all;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep};

use crate::inventory::OperationEvent;
use crate::tasks::Pair;

/// How often a guest is looked at while a snapshot is taken, and while it stands still.
const OFTEN: Duration = Duration::from_millis(50);
/// While it moves as it runs.
const STEADILY: Duration = Duration::from_millis(250);
/// While it is copied, which may take hours.
const NOW_AND_THEN: Duration = Duration::from_millis(500);

/// A guest that is to be looked at.
pub(crate) struct Watched {
    /// Where it is and, if it moves as it runs, where it will be.
    places: Vec<(Arc<dyn Server>, InstanceRef)>,
    /// Whether it moves as it runs: then it stands still where nobody runs it. Else only where its server froze it.
    live: bool,
    every: Duration,
    /// What the source's server tells, if its processes are moved by CRIU.
    criu: Option<Receiver<OperationEvent>>,
}

/// Whose guest may stand still during an effect.
pub(crate) fn watched(effect: &Effect, server: &Arc<dyn Server>, pair: Option<&Pair>) -> Option<Watched> {
    let here = |every, live| Watched {
        places: vec![(server.clone(), effect.at.clone())],
        live,
        every,
        criu: None,
    };
    match (&effect.request, pair) {
        (Request::Snapshot { .. }, _) => Some(here(OFTEN, false)),
        (Request::Relocate(to), _) if to.live => Some(here(STEADILY, true)),
        (Request::Transfer(t), Some(pair)) if t.offer.live => Some(Watched {
            places: vec![
                (pair.source.server.clone(), t.from.clone()),
                (pair.target.server.clone(), t.accept.at.clone()),
            ],
            live: true,
            every: STEADILY,
            criu: (t.accept.kind == InstanceKind::Container).then(|| pair.source.events.resubscribe()),
        }),
        // a snapshot that is sent touches nobody
        (Request::Transfer(t), Some(pair)) if t.running && t.offer.snapshot.is_none() => Some(Watched {
            places: vec![(pair.source.server.clone(), t.from.clone())],
            live: false,
            every: NOW_AND_THEN,
            criu: None,
        }),
        _ => None,
    }
}

/// Does `work`, and says how long the guest stood still meanwhile.
pub(crate) async fn during<T>(work: impl Future<Output = T>, watched: Option<Watched>) -> (T, Duration) {
    let Some(watched) = watched else {
        return (work.await, Duration::ZERO);
    };
    let mut seen = Standstill::new(Instant::now());
    let result = {
        let looks = look(watched, &mut seen);
        tokio::pin!(looks);
        tokio::select! {
            result = work => result,
            never = &mut looks => match never {},
        }
    };
    (result, seen.ended(Instant::now()))
}

async fn look(mut watched: Watched, seen: &mut Standstill) -> Infallible {
    while !seen.over {
        let told = tokio::select! {
            () = sleep(seen.until_next(watched.every, Instant::now())) => None,
            told = watched.told() => Some(told),
        };
        let ended = match told {
            Some((id, true)) => {
                seen.dump_begins(id, Instant::now());
                continue;
            }
            Some((id, false)) => Some(id),
            None => None,
        };
        let runs = watched.runs(seen.is_dumped()).await;
        if let Some(runs) = runs {
            seen.looked(Instant::now(), runs);
        }
        if let Some(id) = ended {
            seen.dump_ends(&id, Instant::now());
        }
    }
    pending().await
}

impl Watched {
    /// Whether the guest runs; `None`: who should know does not answer. A server does not notice that CRIU has stopped the
    /// processes, and says Running until they have ended: from then on only the target counts.
    async fn runs(&self, dumped: bool) -> Option<bool> {
        let places = self.places.get(usize::from(dumped)..).unwrap_or_default();
        let seen = join_all(places.iter().map(|(server, at)| server.instance(at))).await;
        let power = |fresh: Option<berth_core::model::Fresh>| fresh.map(|f| f.instance.power);
        let mut known = true;
        for one in seen {
            match one.map(power) {
                Ok(Some(Power::Running)) => return Some(true),
                Ok(power) if !self.live && power != Some(Power::Frozen) => return Some(true),
                Ok(_) => {}
                Err(_) => known = false,
            }
        }
        known.then_some(false)
    }

    /// The next that is told of CRIU: that it begins (true) or has ended. It may be at work for another instance.
    async fn told(&mut self) -> (OperationId, bool) {
        while let Some(events) = &mut self.criu {
            match events.recv().await {
                Ok((o, state)) if o.is_dump() => return (o.id, state == OperationState::Running),
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => self.criu = None,
            }
        }
        pending().await
    }
}

/// What was seen so far.
struct Standstill {
    /// All of it that is over.
    stood: Duration,
    /// Since when it stands still now.
    since: Option<Instant>,
    /// When it was last seen to run.
    ran: Instant,
    /// CRIU at work on the source's server, and since when.
    dumps: Vec<(OperationId, Instant)>,
    /// The processes run on the target: nothing that follows matters.
    over: bool,
}

impl Standstill {
    fn new(now: Instant) -> Self {
        Self {
            stood: Duration::ZERO,
            since: None,
            ran: now,
            dumps: Vec::new(),
            over: false,
        }
    }

    fn is_dumped(&self) -> bool {
        !self.dumps.is_empty()
    }

    /// How long to wait for the next look: the longer it stands still the less one look more matters.
    fn until_next(&self, every: Duration, now: Instant) -> Duration {
        self.since
            .map_or(every, |since| ((now - since) / 20).clamp(OFTEN, NOW_AND_THEN))
    }

    fn looked(&mut self, now: Instant, runs: bool) {
        if !runs {
            self.since.get_or_insert(self.ran);
            return;
        }
        if let Some(since) = self.since.take() {
            self.stood += now - since;
        }
        self.ran = now;
        self.over |= self.is_dumped();
    }

    fn dump_begins(&mut self, id: OperationId, now: Instant) {
        if self.dumps.iter().all(|(known, _)| *known != id) {
            self.dumps.push((id, now));
        }
        self.since.get_or_insert(now);
    }

    /// If the guest does not run on the target by then, that was the dump of another one, or it failed.
    fn dump_ends(&mut self, id: &OperationId, now: Instant) {
        let before = self.dumps.len();
        self.dumps.retain(|(known, _)| known != id);
        if !self.over && self.dumps.len() < before {
            self.since = self.dumps.first().map(|(_, since)| *since);
            self.ran = now;
        }
    }

    fn ended(self, now: Instant) -> Duration {
        self.stood + self.since.map_or(Duration::ZERO, |since| now - since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: fn(u64) -> Duration = Duration::from_millis;

    fn id(name: &str) -> OperationId {
        OperationId(name.to_owned())
    }

    #[test]
    fn a_standstill_is_from_the_last_look_before_it_to_the_first_after_it() {
        let began = Instant::now();
        let mut seen = Standstill::new(began);
        for (at, runs) in [(100, true), (200, false), (300, false), (400, true), (500, true)] {
            seen.looked(began + AT(at), runs);
        }
        assert_eq!(seen.ended(began + AT(600)), AT(300));
    }

    #[test]
    fn processes_stand_still_from_the_dump_until_they_run_on_the_target() {
        let began = Instant::now();
        let mut seen = Standstill::new(began);
        // the pool had it frozen while it was copied
        seen.looked(began + AT(100), false);
        seen.looked(began + AT(200), true);
        seen.dump_begins(id("ours"), began + AT(1000));
        seen.dump_begins(id("ours"), began + AT(1001));
        seen.looked(began + AT(1300), false);
        seen.looked(began + AT(1400), true);
        assert!(seen.over);
        seen.dump_ends(&id("ours"), began + AT(1500));
        assert_eq!(seen.ended(began + AT(6000)), AT(200 + 400));
    }

    #[test]
    fn the_dump_of_another_container_does_not_count() {
        let began = Instant::now();
        let mut seen = Standstill::new(began);
        seen.dump_begins(id("other"), began + AT(100));
        seen.looked(began + AT(200), false);
        seen.dump_begins(id("ours"), began + AT(300));
        seen.dump_ends(&id("other"), began + AT(400));
        assert!(seen.is_dumped());
        seen.looked(began + AT(700), true);
        assert_eq!(seen.ended(began + AT(9000)), AT(400));
        let mut none = Standstill::new(began);
        none.dump_begins(id("other"), began + AT(100));
        none.dump_ends(&id("other"), began + AT(400));
        assert_eq!(none.ended(began + AT(9000)), Duration::ZERO);
    }

    #[test]
    fn what_has_not_ended_with_the_work_ends_with_it() {
        let began = Instant::now();
        let mut seen = Standstill::new(began);
        seen.dump_begins(id("ours"), began + AT(100));
        assert_eq!(seen.until_next(STEADILY, began + AT(200)), OFTEN);
        assert_eq!(seen.until_next(STEADILY, began + AT(3100)), AT(150));
        assert_eq!(seen.ended(began + AT(400)), AT(300));
    }
}
