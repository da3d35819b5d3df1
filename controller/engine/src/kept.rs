//! The sources that finished moves kept: each is deleted when its time is over, and forgotten when it is gone. What is to
//! be done is decided by berth-core; here is only when to look. Costs no request until then.

use std::sync::Mutex;
use std::time::Duration;

use berth_core::moves::{StopRules, Wish, kept_place};
use berth_core::plan::{self, Desired};
use berth_core::records::{Record, RecordError};
use berth_core::{marks, moves};
use jiff::Timestamp;

use crate::drive::Orders;
use crate::engine::{Engine, Report};
use crate::happenings::{self, Happening};
use crate::{Key, lock};

impl Engine {
    /// What is to be told of the kept sources of a placement that is gone, each with its record's name.
    pub fn outlived(&self, namespace: &str, uid: &str) -> Vec<Happening> {
        let cli = |server: &str| {
            let view = self.server(&Key::new(namespace, server));
            view.and_then(|v| v.facts).map_or("incus", |f| f.product.cli())
        };
        let kept = self.book().kept_of(uid);
        // the records go with the placement: whichever is heard of first
        self.book().forget_kept(|r| r.spec.placement_uid == uid);
        let told = kept.iter().map(|r| happenings::outlives(r, cli(&r.spec.from.server)));
        told.collect()
    }

    /// Takes what is kept into the status, and tells of what stays for now.
    pub(crate) fn show_kept(&self, desired: &mut Desired, report: &dyn Report) {
        let kept = plan::kept(&self.book().kept_of(&desired.uid), desired);
        let before = std::mem::replace(&mut desired.status.kept, kept);
        for happening in happenings::held_back(&before, &desired.status.kept) {
            report.happened(happening);
        }
    }

    /// Ends what is over; says when to look again. Not while a move is in hand, which may have taken one.
    pub(crate) async fn end_kept(
        &self,
        key: &Key,
        desired: &Desired,
        report: &dyn Report,
    ) -> Result<Option<Duration>, RecordError> {
        let mut look_again = None;
        for record in self.book().kept_of(&desired.uid) {
            let after = match self.left_of(&record, desired) {
                None => continue,
                Some(left) if !left.is_zero() => Some(left),
                Some(_) => self.end_one(key, record, report).await?,
            };
            look_again = look_again.into_iter().chain(after).min();
        }
        Ok(look_again)
    }

    /// How long a kept source stays; zero: it is to go, or is not there any more. `None`: nothing is to be done.
    fn left_of(&self, record: &Record, desired: &Desired) -> Option<Duration> {
        let begun = record.status.names.as_ref().is_some_and(|n| n.leaving.is_some());
        if begun || self.is_gone(record) {
            return Some(Duration::ZERO);
        }
        let until = plan::kept_until(record, desired)?;
        let left = until.duration_since(self.env().now());
        Some(Duration::try_from(left).unwrap_or_default())
    }

    /// Whether its server answers and does not have it, as far as the list of its instances says.
    fn is_gone(&self, record: &Record) -> bool {
        let Ok(reached) = self.registry().end(&record.namespace, &record.spec.from) else {
            return false;
        };
        let there = reached.instances.get(&kept_place(record));
        there.is_none_or(|i| marks::move_id(i) != Some(record.name.as_str()))
    }

    async fn end_one(&self, key: &Key, record: Record, report: &dyn Report) -> Result<Option<Duration>, RecordError> {
        let interrupt = self.placements().interrupt(key);
        let known = Mutex::new(record.clone());
        let written = |new: &Record| {
            self.book().put(new.clone());
            let old = std::mem::replace(&mut *lock(&known), new.clone());
            if let Some(happening) = happenings::of_kept(&old, new) {
                report.happened(happening);
            }
        };
        // once begun it is completed
        let wish = |_: &Record, _: Timestamp| {
            Wish::Continue(StopRules {
                timeout: Duration::ZERO,
                force: false,
                max_downtime: None,
                preserves_power: false,
            })
        };
        let orders = Orders {
            wish: &wish,
            open_moves: self.book().open_names(),
            interrupt: &interrupt,
            written: &written,
        };
        let name = Key::new(&record.namespace, &record.name);
        let driven = self.driver().end_kept(record, &orders).await;
        match driven {
            Ok(driven) => {
                self.book().put(driven.record.clone());
                Ok(driven.look_again.filter(|_| moves::has_kept(&driven.record)))
            }
            Err(RecordError::NotFound(_)) => {
                self.book().forget_kept(|r| Key::new(&r.namespace, &r.name) == name);
                self.record_gone(&name);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
