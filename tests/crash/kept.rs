//! The moves of the crash table whose source is kept, and those back onto one that was.

use berth_api::moves::Onto;
use berth_api::{GoDuration, GuardKind, Method};
use berth_core::model::Product;
use berth_core::records::Records;
use berth_sim::{InstanceOptions, World};

use crate::scenario::{Back, FIRST, NAMESPACE, Scenario, pair};

impl Scenario {
    /// The source is kept, or there is one that was.
    pub fn kept() -> Vec<Self> {
        let (incus, lxd) = (Self::pull(Product::Incus), Self::pull(Product::Lxd));
        let keeps = |s: &mut Self| {
            s.keeps = true;
            s.pools = ("default", "default");
        };
        // differences between snapshots are counted one way only
        let back = |s: &mut Self| {
            s.back = Some(Back::Refreshed);
            s.pools = ("plain", "plain");
            let root = [("type", "disk"), ("path", "/"), ("pool", "plain")];
            s.instance = s.instance.clone().device("root", &root);
        };
        let lock = |s: &mut Self| {
            s.project = "locked".to_owned();
            s.guard = pair(GuardKind::Name);
        };
        let live = |s: &mut Self| {
            s.method = Method::Live;
            s.instance = InstanceOptions::vm().snapshot("s0").key("migration.stateful", "true");
            s.guard.target = GuardKind::None;
        };
        vec![
            incus.with("kept, running", keeps),
            incus.with("kept, way back", back),
            lxd.with("kept, way back, kept again", |s| {
                back(s);
                s.keeps = true;
            }),
            lxd.with("kept, other driver", |s| s.keeps = true),
            incus.with("kept, warm", |s| {
                keeps(s);
                s.method = Method::Warm;
            }),
            incus.with("kept, restricted project", |s| {
                lock(s);
                s.keeps = true;
            }),
            incus.with("kept, live", |s| {
                live(s);
                s.keeps = true;
            }),
            incus.with("kept, way back, warm", |s| {
                back(s);
                s.method = Method::Warm;
            }),
            incus.with("kept, way back, stopped", |s| {
                back(s);
                s.stopped();
            }),
            incus.with("kept, way back, restricted project", |s| {
                back(s);
                lock(s);
            }),
            lxd.with("kept, way back, makes room", |s| s.back = Some(Back::MakesRoom)),
            incus.with("kept, way back, live", |s| {
                live(s);
                s.back = Some(Back::MakesRoom);
            }),
        ]
    }

    /// A move from `b` has ended whose source was kept, and the guest has written since.
    pub async fn came_from_the_target(&self, world: &World) {
        world.add_instance("b", &self.at(), self.instance.clone());
        let mut first = Self {
            method: Method::Cold,
            guard: pair(self.guard.source),
            ..self.clone()
        }
        .record_between(world, ("b", "a"));
        first.name = FIRST.to_owned();
        // it is not over before the table is
        first.spec.keep_source = GoDuration::from_secs(100 * 3600);
        first.spec.to.pool = Some(self.pools.0.to_owned());
        let records = world.records("setup");
        records.create(&first).await.expect("a new record");
        crate::life::first(world).await;
        world.write_data("a", &self.at());
    }

    /// The kept source of the move before, as a plan finds it.
    pub fn onto(&self, world: &World) -> Option<Onto> {
        let first = world.record(NAMESPACE, FIRST).filter(|_| self.back.is_some())?;
        let place = berth_core::moves::kept_place(&first);
        let kept = world.instance("b", &place).expect("the kept source is there");
        assert!(berth_core::moves::is_kept(&first, &kept), "{kept:?}");
        Some(Onto {
            record: FIRST.to_owned(),
            attempt: first.spec.attempt,
            name: place.name,
            last_used_at: first.status.last_used_at,
            refresh: self.back == Some(Back::Refreshed),
        })
    }
}
