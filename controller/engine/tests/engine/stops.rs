//! Stops that do not go as they should.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use berth_api::Method;
use berth_core::model::{Power, Product};
use berth_core::server::FailureKind;
use berth_sim::{Fault, InstanceOptions};

use crate::run;
use crate::town::{Town, at};

/// *Seen* on Incus 6.0.4 when a stop is asked for twice: a guest is shown as stopped, then as running, and is not sent.
#[test]
fn what_a_stop_leaves_is_waited_for_and_the_instance_is_not_started_where_it_was() {
    for (product, verb, nth) in [
        (Product::Incus, "patch", 1),
        (Product::Incus, "offer", 0),
        (Product::Lxd, "offer", 0),
    ] {
        run(async {
            let town = Town::new(product, &["a", "b"]);
            town.add("a", "web-1");
            let (asked, offers) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
            let counted = offers.clone();
            town.world.set_hook(move |world, w| {
                let this = w.write.verb();
                counted.fetch_add(usize::from(this == "offer"), Ordering::SeqCst);
                if this == verb && asked.fetch_add(1, Ordering::SeqCst) == nth {
                    world.clear_away("a", &at("web-1"), Duration::from_secs(3));
                }
                None
            });
            town.place("web-1", "b", |s| s.methods = vec![Method::Cold]);
            town.until_placed("web-1", "b").await;
            let outcomes: Vec<_> = town.status("web-1").moves.into_iter().map(|m| m.outcome).collect();
            assert_eq!(outcomes, ["Succeeded"], "{product:?} {verb}");
            assert!(offers.load(Ordering::SeqCst) <= 5, "{product:?} {verb}: once a second");
        });
    }
}

/// LXD 5.0.2 on a busy machine: "shutting down the container failed" within a tenth of a second, and the guest stops.
#[test]
fn a_server_that_gives_up_a_stop_at_once_is_asked_again_and_the_guest_is_not_forced() {
    for carried_out in [true, false] {
        run(async {
            let town = Town::new(Product::Lxd, &["a", "b"]);
            town.add("a", "web-1");
            let (stops, forced) = (AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
            let counted = forced.clone();
            town.world.set_hook(move |_, w| {
                counted.fetch_add(usize::from(w.write.verb() == "force-stop"), Ordering::SeqCst);
                let first = w.write.verb() == "stop" && stops.fetch_add(1, Ordering::SeqCst) == 0;
                let kind = FailureKind::Refused;
                first.then_some(Fault::Fail { kind, carried_out })
            });
            town.place("web-1", "b", |s| {
                s.methods = vec![Method::Cold];
                s.stop.force = true;
            });
            town.until_placed("web-1", "b").await;
            let outcomes: Vec<_> = town.status("web-1").moves.into_iter().map(|m| m.outcome).collect();
            assert_eq!(outcomes, ["Succeeded"], "carried out: {carried_out}");
            assert_eq!(forced.load(Ordering::SeqCst), 0, "carried out: {carried_out}");
        });
    }
}

/// Incus says that a member is back before it starts what it brings back there (v6.0.4 api_cluster_evacuation.go).
#[test]
fn what_somebody_starts_after_a_move_was_planned_runs_in_the_end() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.world.add_instance("a", &at("web-1"), InstanceOptions::stopped());
        let marks = AtomicUsize::new(0);
        town.world.set_hook(move |world, w| {
            if w.write.verb() == "patch" && marks.fetch_add(1, Ordering::SeqCst) == 0 {
                world.start("a", &at("web-1")).unwrap();
            }
            None
        });
        town.place("web-1", "b", |s| s.methods = vec![Method::Cold]);
        town.until_placed("web-1", "b").await;
        let outcomes: Vec<_> = town.status("web-1").moves.into_iter().map(|m| m.outcome).collect();
        assert_eq!(outcomes, ["Succeeded", "Undone"]);
        let moved = town.world.instance("b", &at("web-1")).unwrap();
        assert_eq!(moved.power, Power::Running);
    });
}
