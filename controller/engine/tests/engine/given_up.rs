//! What is left to a person stays as it is: the copy whose source vanished, and everything of a move that was given up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use berth_api::moves::MoveError;
use berth_api::{Method, Outcome, Reason};
use berth_core::marks::{self, GUARD, Role};
use berth_core::model::{Instance, Product};
use berth_core::moves;
use berth_core::records::{Record, Records};
use berth_core::server::FailureKind;
use berth_sim::Fault;
use tokio::time::sleep;

use crate::run;
use crate::town::{CONTROLLER, Town, at};

/// Long enough for everything that happens by the clock.
const LONG: Duration = Duration::from_secs(400);

/// What is on the target.
fn copies(town: &Town) -> Vec<Instance> {
    town.world.instances("b")
}

/// As the annotation berth.dev/abandon does it; the record as it is then.
async fn give_up(town: &Town) -> Record {
    let mut record = town.records().remove(0);
    record.status.last_error = Some(MoveError {
        reason: Reason::NeedsAttention.as_str().to_owned(),
        message: "given up".to_owned(),
        fix: None,
        at: None,
        attempts: 1,
    });
    moves::close(&mut record, Outcome::NeedsAttention, town.now());
    town.world.records("person").swap(&record).await.unwrap()
}

#[test]
fn the_copy_of_a_source_that_vanished_is_never_swept() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.add("a", "web-1");
        town.world.set_hook(|world, w| {
            let complete = w.controller == CONTROLLER && w.write.verb() == "rename";
            let (kind, carried_out) = (FailureKind::Unreachable, false);
            (complete && world.delete("a", &at("web-1")).is_ok()).then_some(Fault::Fail { kind, carried_out })
        });
        town.place("web-1", "b", |s| s.methods = vec![Method::Cold]);
        town.until("a person is asked", |t| {
            let last = t.records().pop();
            last.is_some_and(|r| r.status.outcome() == Some(Outcome::NeedsAttention))
        })
        .await;
        let kept = copies(&town);
        assert!(kept.len() == 1 && marks::is_unique_name(&kept[0].at.name), "{kept:?}");
        sleep(LONG).await;
        assert!(town.engine.sweep().await.unwrap().is_empty());
        assert_eq!(copies(&town), kept, "it is the last one");
    });
}

#[test]
fn a_move_that_was_given_up_leaves_everything_as_it_is_until_a_person_says_more() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.add("a", "web-1");
        town.world.set_hook(|_, w| {
            let complete = w.controller == CONTROLLER && w.write.verb() == "rename";
            complete.then_some(Fault::CrashBefore)
        });
        town.place("web-1", "b", |s| s.methods = vec![Method::Cold]);
        town.until("the copy is complete", |t| t.world.is_dead(CONTROLLER))
            .await;
        give_up(&town).await;
        let before = (
            town.world.effects(),
            town.world.instance("a", &at("web-1")),
            copies(&town),
        );
        let town = town.reborn("c2");
        town.until("it says so", |t| t.reason("web-1") == "NeedsAttention")
            .await;
        sleep(LONG).await;
        assert!(town.engine.sweep().await.unwrap().is_empty());
        let after = (
            town.world.effects(),
            town.world.instance("a", &at("web-1")),
            copies(&town),
        );
        assert_eq!(after, before);
        let source = before.1.unwrap();
        assert_eq!(marks::role(&source), Some(Role::Source));
        assert!(source.devices.contains_key(GUARD));
        town.place("web-1", "b", |s| s.methods = vec![Method::Cold]);
        town.until_placed("web-1", "b").await;
        let left: Vec<_> = copies(&town).into_iter().filter(|i| i.at != at("web-1")).collect();
        assert_eq!(left, before.2, "what was given up is left to the person");
    });
}

#[test]
fn a_move_that_is_given_up_in_the_middle_of_a_transfer_is_over_at_once() {
    for later in [1500, 3500, 4500].map(Duration::from_millis) {
        run(async {
            let town = Town::in_the_middle_of_a_transfer(later).await;
            town.engine.record_seen(&give_up(&town).await);
            sleep(Duration::from_millis(200)).await;
            assert_eq!(town.reason("web-1"), "NeedsAttention", "{later:?} after the stop");
            let before = town.world.effects();
            sleep(LONG).await;
            assert_eq!(town.world.effects(), before, "nothing is touched any more");
            assert_eq!(town.reason("web-1"), "NeedsAttention");
        });
    }
}

/// *Seen* on Incus 6.0.4: a live move with CRIU that is cancelled between its file system and its memory.
#[test]
fn a_server_that_never_ends_a_cancelled_migration_is_restarted_by_a_person() {
    run(async {
        let town = Town::slow();
        town.place("web-1", "b", |s| s.methods = vec![Method::Warm]);
        town.until("it is copied", |t| t.log().iter().any(|l| l.contains("accept")))
            .await;
        let stuck = Arc::new(AtomicBool::new(true));
        let busy = stuck.clone();
        town.world.set_hook(move |_, w| {
            let kind = FailureKind::Busy;
            let refused = w.write.verb() == "patch" && busy.load(Ordering::Relaxed);
            refused.then_some(Fault::Fail {
                kind,
                carried_out: false,
            })
        });
        town.cancel();
        town.until("a person is told", |t| t.reason("web-1") == "NeedsAttention")
            .await;
        let said = town.status("web-1").conditions.remove(0).message;
        assert!(said.contains("systemctl restart incus"), "{said}");
        stuck.store(false, Ordering::Relaxed);
        town.until("it is cancelled", |t| t.reason("web-1") == "MoveCancelled")
            .await;
    });
}

#[test]
fn marks_come_off_a_source_that_changed_as_they_were_taken_off() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.add("a", "web-1");
        let patches = AtomicUsize::new(0);
        town.world.set_hook(move |_, w| {
            let fail = |kind| {
                let carried_out = false;
                Some(Fault::Fail { kind, carried_out })
            };
            match w.write.verb() {
                "stop" if w.controller == CONTROLLER => fail(FailureKind::Refused),
                // the first one sets the marks
                "patch" if patches.fetch_add(1, Ordering::SeqCst) == 1 => fail(FailureKind::Changed),
                _ => None,
            }
        });
        town.place("web-1", "b", |s| s.methods = vec![Method::Cold]);
        town.until("it is undone", |t| {
            let last = t.records().pop();
            last.is_some_and(|r| r.status.outcome() == Some(Outcome::Undone))
        })
        .await;
        let left = town.world.instances("a");
        assert_eq!(left.iter().filter(|i| marks::role(i).is_some()).count(), 0, "{left:?}");
    });
}
