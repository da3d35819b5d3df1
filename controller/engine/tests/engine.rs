//! The engine as a whole on simulated servers, with the smallest wiring around it: moves, slots, claims, power, drift, and
//! that nothing is asked of anybody where nothing needs doing.

#[path = "engine/given_up.rs"]
mod given_up;
#[path = "engine/kept.rs"]
mod kept;
#[path = "engine/stops.rs"]
mod stops;
#[path = "engine/town.rs"]
mod town;

use std::time::Duration;

use berth_api::Method;
use berth_api::placement::PowerState;
use berth_api::server::Limits;
use berth_core::model::{Power, Product};
use berth_core::server::FailureKind;
use berth_sim::{Caller, Fault, InstanceOptions, Options};
use tokio::time::sleep;
use town::{CONTROLLER, NAMESPACE, Town, at, running};

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    runtime.unwrap().block_on(test);
}

#[test]
fn an_instance_moves_because_its_placement_says_so_and_then_nothing_is_asked_any_more() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.add("a", "web-1");
        town.place("web-1", "b", |_| {});
        town.until_placed("web-1", "b").await;
        assert!(town.world.instance("a", &at("web-1")).is_none());
        assert_eq!(town.world.instance("b", &at("web-1")).unwrap().power, Power::Running);
        assert_eq!(town.events().first().map(String::as_str), Some("Moving"));
        assert!(town.events().contains(&"Succeeded".to_owned()), "{:?}", town.events());
        assert!(town.reported().contains(&"Moving".to_owned()));
        let status = town.status("web-1");
        assert_eq!(status.location.unwrap().server, "b");
        assert_eq!(status.committed_moves, Some(1));
        assert!(status.current_move.is_none());
        sleep(Duration::from_secs(30)).await;
        let (reads, writes, passes) = (
            town.world.reads(CONTROLLER),
            town.world.writes(CONTROLLER),
            town.passes(),
        );
        sleep(Duration::from_secs(60)).await;
        assert_eq!(town.world.reads(CONTROLLER), reads);
        assert_eq!(town.world.writes(CONTROLLER), writes);
        assert_eq!(town.passes(), passes);
    });
}

#[test]
fn somebody_moves_it_away_and_it_comes_back() {
    run(async {
        let town = Town::new(Product::Lxd, &["a", "b"]);
        town.add("a", "web-1");
        town.place("web-1", "a", |_| {});
        town.until_placed("web-1", "a").await;
        // another namespace's placement, or a person, does what a person would do
        town.place("web-1", "b", |_| {});
        town.until_placed("web-1", "b").await;
        town.place("web-1", "a", |_| {});
        town.until_placed("web-1", "a").await;
        assert_eq!(town.records().len(), 2);
        town.until("both moves are remembered", |t| t.status("web-1").moves.len() == 2)
            .await;
    });
}

#[test]
fn no_more_moves_run_than_the_limits_allow_and_all_of_them_end() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b", "c"]);
        let limits = Limits {
            incoming: 1,
            outgoing: 1,
        };
        ["a", "b", "c"].iter().for_each(|s| town.connect(s, s, limits));
        let names: Vec<String> = (0..6).map(|n| format!("web-{n}")).collect();
        for (n, name) in names.iter().enumerate() {
            town.add(if n % 2 == 0 { "a" } else { "c" }, name);
            town.place(name, "b", |_| {});
        }
        let watched = town.clone();
        let most = tokio::spawn(async move {
            let mut most = 0;
            loop {
                most = most.max(watched.open());
                if watched.records().len() == 6 && watched.open() == 0 {
                    return most;
                }
                sleep(Duration::from_millis(1)).await;
            }
        });
        for name in &names {
            town.until_placed(name, "b").await;
        }
        assert_eq!(most.await.unwrap(), 1);
    });
}

#[test]
fn power_is_changed_where_the_instance_is() {
    run(async {
        let town = Town::new(Product::Incus, &["a"]);
        town.add("a", "web-1");
        town.place("web-1", "a", |s| s.power_state = PowerState::Stopped);
        town.until_placed("web-1", "a").await;
        let power = |t: &Town| t.world.instance("a", &at("web-1")).unwrap().power;
        assert_eq!(power(&town), Power::Stopped);
        town.place("web-1", "a", running);
        town.until("it runs", |t| power(t) == Power::Running).await;
        town.until_placed("web-1", "a").await;
        town.world.stop("a", &at("web-1")).unwrap();
        town.until("it runs again", |t| power(t) == Power::Running).await;
        town.until_placed("web-1", "a").await;
        let effects: Vec<_> = town.world.effects().into_iter().map(|(_, verb)| verb).collect();
        assert_eq!(effects, ["stop", "start", "start"]);
        assert!(town.records().is_empty());
    });
}

#[test]
fn another_target_in_mid_move_undoes_the_move_and_begins_another() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b", "c"]);
        town.add("a", "web-1");
        town.place("web-1", "b", |_| {});
        town.until("it is stopped", |t| {
            t.records().iter().any(|r| r.status.step.as_deref() == Some("Stopped"))
        })
        .await;
        town.place("web-1", "c", |_| {});
        town.until_placed("web-1", "c").await;
        let outcomes: Vec<_> = town.records().into_iter().filter_map(|r| r.status.outcome).collect();
        assert_eq!(outcomes.len(), 2);
        assert!(
            outcomes.contains(&"Undone".to_owned()) && outcomes.contains(&"Succeeded".to_owned()),
            "{outcomes:?}"
        );
        assert!(town.world.instances("b").is_empty() && town.world.instances("a").is_empty());
        assert_eq!(town.status("web-1").failures, None);
    });
}

#[test]
fn a_cancelled_move_is_undone_and_none_follows() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.add("a", "web-1");
        town.place("web-1", "b", |_| {});
        town.until("it is marked", |t| {
            t.records().iter().any(|r| r.status.step.as_deref() == Some("Stopped"))
        })
        .await;
        town.cancel();
        town.until("it is cancelled", |t| t.reason("web-1") == "MoveCancelled")
            .await;
        assert_eq!(town.world.instance("a", &at("web-1")).unwrap().power, Power::Running);
        sleep(Duration::from_secs(600)).await;
        assert_eq!(town.records().len(), 1);
        town.place("web-1", "b", |s| s.stop.force = true);
        town.until_placed("web-1", "b").await;
    });
}

#[test]
fn a_cancel_in_the_middle_of_a_transfer_is_heard_at_once() {
    for later in [100, 1500, 2950, 3500, 3950, 4500, 9000].map(Duration::from_millis) {
        run(async {
            let town = Town::in_the_middle_of_a_transfer(later).await;
            town.cancel();
            sleep(Duration::from_millis(200)).await;
            let step = town.records()[0].status.step.clone();
            assert_eq!(step.as_deref(), Some("Undoing"), "{later:?} after the stop");
        });
    }
}

#[test]
fn the_move_of_a_deleted_placement_is_undone() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.add("a", "web-1");
        town.place("web-1", "b", |_| {});
        town.until("it is stopped", |t| {
            t.records().iter().any(|r| r.status.step.as_deref() == Some("Stopped"))
        })
        .await;
        town.forget("web-1");
        let mut again = Some(Duration::ZERO);
        while let Some(after) = again {
            sleep(after).await;
            again = town.engine.drive_orphans(NAMESPACE, town.report()).await.unwrap();
        }
        assert_eq!(town.open(), 0);
        assert_eq!(town.world.instance("a", &at("web-1")).unwrap().power, Power::Running);
        assert!(town.world.instances("b").is_empty());
    });
}

#[test]
fn of_two_placements_for_one_instance_the_older_one_has_it() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.add("a", "web-1");
        town.place("web-1", "a", |_| {});
        town.until_placed("web-1", "a").await;
        sleep(Duration::from_secs(5)).await;
        town.place("other", "b", |s| s.instance.name = Some("web-1".to_owned()));
        town.until("it is refused", |t| t.reason("other") == "ClaimedByAnother")
            .await;
        assert!(town.records().is_empty());
        town.forget("web-1");
        town.until_placed_as("other", "b", "web-1").await;
    });
}

#[test]
fn a_target_that_is_away_is_waited_for_and_the_instance_runs_meanwhile() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.add("a", "web-1");
        town.place("web-1", "a", |_| {});
        town.until_placed("web-1", "a").await;
        town.world.daemon_stop("b");
        town.until("b is known to be away", |t| {
            t.engine
                .server(&berth_engine::Key::new(NAMESPACE, "b"))
                .is_some_and(|v| !v.is_listed())
        })
        .await;
        town.place("web-1", "b", |_| {});
        town.until("it waits", |t| t.reason("web-1") == "ServerUnreachable")
            .await;
        assert_eq!(town.world.instance("a", &at("web-1")).unwrap().power, Power::Running);
        town.world.daemon_start("b");
        town.until_placed("web-1", "b").await;
    });
}

#[test]
fn two_names_of_one_server_share_what_is_known_and_the_younger_is_a_duplicate() {
    run(async {
        let town = Town::new(Product::Incus, &["a"]);
        town.add("a", "web-1");
        sleep(Duration::from_secs(5)).await;
        town.connect("again", "a", Limits::default());
        let view = |name: &str| town.engine.server(&berth_engine::Key::new(NAMESPACE, name)).unwrap();
        town.until("it is known", |_| view("again").is_listed()).await;
        assert_eq!(view("again").duplicate_of.as_deref(), Some("a"));
        assert_eq!(view("a").duplicate_of, None);
        sleep(Duration::from_secs(5)).await;
        let lists = |t: &Town| t.world.reads(CONTROLLER)[&("a".to_owned(), "inventory")];
        let before = lists(&town);
        sleep(Duration::from_secs(335)).await;
        assert_eq!(lists(&town), before + 1, "one list for both");
        town.engine.registry().remove(&berth_engine::Key::new(NAMESPACE, "a"));
        town.until("the other goes on", |_| {
            view("again").duplicate_of.is_none() && view("again").is_listed()
        })
        .await;
        town.world.stop("a", &at("web-1")).unwrap();
        town.until("it hears of changes itself", |_| {
            view("again")
                .instances
                .unwrap()
                .get(&at("web-1"))
                .is_some_and(|i| i.power == Power::Stopped)
        })
        .await;
    });
}

#[test]
fn lost_events_are_made_up_for_and_a_closed_stream_is_opened_again() {
    run(async {
        let town = Town::new(Product::Incus, &["a"]);
        town.add("a", "web-1");
        town.place("web-1", "a", running);
        town.until_placed("web-1", "a").await;
        town.world.lose_events("a", true);
        town.world.stop("a", &at("web-1")).unwrap();
        let runs = |t: &Town| t.world.instance("a", &at("web-1")).unwrap().power == Power::Running;
        town.until("the next list tells", runs).await;
        town.world.lose_events("a", false);
        town.world.close_events("a");
        sleep(Duration::from_secs(2)).await;
        town.world.stop("a", &at("web-1")).unwrap();
        let began = town.now();
        town.until("the new stream tells", runs).await;
        assert!(town.now().duration_since(began).as_secs() < 5);
    });
}

#[test]
fn inside_a_cluster_the_cluster_moves_it() {
    run(async {
        let town = Town::with(Product::Incus, &["a"], || Options::cluster(&["m1", "m2", "m3"]));
        town.add("a", "web-1");
        town.place("web-1", "a", |s| s.target.member = Some("m2".to_owned()));
        town.until("it is there", |t| {
            t.world
                .instance("a", &at("web-1"))
                .is_some_and(|i| i.member.as_deref() == Some("m2"))
        })
        .await;
        town.until_placed("web-1", "a").await;
        town.world.evacuate("a", "m2");
        town.until("it is left alone", |t| t.reason("web-1") == "ForeignOperation")
            .await;
        sleep(Duration::from_secs(600)).await;
        assert_eq!(town.records().len(), 1);
        town.world.restore_member("a", "m2");
        town.until_placed("web-1", "a").await;
    });
}

#[test]
fn marks_that_come_back_with_a_snapshot_are_taken_off() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.world.add_instance("a", &at("web-1"), InstanceOptions::default());
        town.place("web-1", "b", |_| {});
        town.until("it carries marks", |t| {
            t.records().iter().any(|r| r.status.step.as_deref() == Some("Stopped"))
        })
        .await;
        town.world.take_snapshot("a", &at("web-1"), "meanwhile").unwrap();
        town.until_placed("web-1", "b").await;
        if town
            .world
            .snapshots("b", &at("web-1"))
            .iter()
            .any(|s| s.name == "meanwhile")
        {
            town.world.restore_snapshot("b", &at("web-1"), "meanwhile").unwrap();
            town.until("marks and guard are off", |t| {
                let i = t.world.instance("b", &at("web-1")).unwrap();
                !i.config.contains_key("user.berth.move") && !i.devices.contains_key("berth-guard")
            })
            .await;
            town.until_placed("web-1", "b").await;
        }
    });
}

#[test]
fn a_controller_without_the_lease_does_nothing() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.add("a", "web-1");
        town.leads.store(false, std::sync::atomic::Ordering::Relaxed);
        town.place("web-1", "b", |_| {});
        sleep(Duration::from_secs(120)).await;
        assert_eq!(town.world.writes(CONTROLLER), 0);
        town.leads.store(true, std::sync::atomic::Ordering::Relaxed);
        town.until_placed("web-1", "b").await;
    });
}

#[test]
fn whenever_the_controller_dies_the_next_one_brings_the_instance_to_its_place() {
    for fault in [Fault::CrashBefore, Fault::CrashAfter] {
        let mut nth = 0;
        while dies_at(nth, fault) {
            nth += 1;
        }
        assert!(nth > 15, "only {nth} writes");
    }
}

/// Whether the controller came to its `nth` write at all; the instance is placed in any case.
fn dies_at(nth: u64, fault: Fault) -> bool {
    let mut died = false;
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.add("a", "web-1");
        town.world.fault_at(CONTROLLER, nth, fault);
        town.place("web-1", "b", |_| {});
        town.until("it is placed, or the controller is dead", |t| {
            t.world.is_dead(CONTROLLER) || (t.reason("web-1") == "InPlace" && t.open() == 0)
        })
        .await;
        died = town.world.is_dead(CONTROLLER);
        let town = town.reborn("c2");
        town.until_placed("web-1", "b").await;
        if std::env::var_os("SHOW").is_some() {
            town.log().iter().for_each(|l| eprintln!("{l}"));
            town.records()
                .iter()
                .for_each(|r| eprintln!("{:?} {:?}", r.status.undo, r.status.last_error));
        }
        assert_eq!(town.world.instances("a").len() + town.world.instances("b").len(), 1);
        let committed = town
            .records()
            .iter()
            .filter(|r| r.status.committed_at.is_some())
            .count();
        assert_eq!((committed, town.records().len()), (1, 1), "{fault:?} at write {nth}");
        let power = town.world.instance("b", &at("web-1")).unwrap().power;
        assert_eq!(power, Power::Running, "{fault:?} at write {nth}");
    });
    died
}

#[test]
fn an_instance_that_a_late_request_of_a_finished_move_stops_is_started_again() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.add("a", "web-1");
        let told_unknown = Fault::Late(Caller::IsToldUnknown);
        town.world
            .set_hook(move |_, w| (w.nth == 5 && format!("{:?}", w.write).contains("Stop")).then_some(told_unknown));
        town.place("web-1", "b", |s| s.methods = vec![Method::Cold]);
        town.until_placed("web-1", "b").await;
        let late = town.world.late();
        assert_eq!(late.len(), 1, "the stop is still under way");
        town.place("web-1", "a", |s| s.methods = vec![Method::Cold]);
        town.until_placed("web-1", "a").await;
        let _ = town.world.deliver_late(late[0].id);
        let power = |t: &Town| t.world.instance("a", &at("web-1")).unwrap().power;
        town.until("the stop arrives", |t| power(t) == Power::Stopped).await;
        town.until("it is started again", |t| power(t) == Power::Running).await;
        town.until_placed("web-1", "a").await;
        town.world.stop("a", &at("web-1")).unwrap();
        sleep(Duration::from_secs(60)).await;
        assert_eq!(power(&town), Power::Stopped, "what a person stops stays stopped");
    });
}

#[test]
fn a_copy_that_a_late_request_makes_after_its_move_is_deleted_and_a_foreign_one_is_only_reported() {
    run(async {
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.add("a", "web-1");
        let dies = Fault::Late(Caller::Dies);
        town.world.set_hook(move |_, w| {
            (w.controller == CONTROLLER && format!("{:?}", w.write).starts_with("Accept")).then_some(dies)
        });
        town.place("web-1", "b", |_| {});
        town.until("the request is under way", |t| t.world.is_dead(CONTROLLER))
            .await;
        let town = town.reborn("c2");
        town.until_placed("web-1", "b").await;
        for late in town.world.late() {
            // the source's end has long been given up: the daemon may refuse, or make a copy that stays empty
            let _ = town.world.deliver_late(late.id);
        }
        let foreign = InstanceOptions::stopped()
            .key("user.berth.move", "other-abcde")
            .key("user.berth.role", "incoming");
        town.world.add_instance("b", &at("berth-abcdefgh-other"), foreign);
        sleep(Duration::from_secs(400)).await;
        let leftovers = town.engine.sweep().await.unwrap();
        assert_eq!(leftovers.len(), 1);
        assert_eq!(leftovers[0].at, at("berth-abcdefgh-other"));
        let names: Vec<_> = town.world.instances("b").into_iter().map(|i| i.at.name).collect();
        assert_eq!(names, ["berth-abcdefgh-other", "web-1"]);
    });
}

#[test]
fn a_store_that_does_not_answer_for_a_while_delays_a_move_and_changes_nothing_else() {
    for nth in 0..28 {
        run(async {
            let town = Town::new(Product::Incus, &["a", "b"]);
            town.add("a", "web-1");
            town.world.set_hook(move |_, w| {
                let away = w.server == "records" && (nth..nth + 3).contains(&w.nth);
                let (kind, carried_out) = (FailureKind::Unknown, w.nth % 2 == 0);
                away.then_some(Fault::Fail { kind, carried_out })
            });
            town.place("web-1", "b", |_| {});
            town.until_placed("web-1", "b").await;
            let records = town.records();
            assert!(
                records.iter().all(|r| r.status.outcome.as_deref() == Some("Succeeded")),
                "{nth}: {records:?}"
            );
            assert_eq!(
                town.world.instances("a").len() + town.world.instances("b").len(),
                1,
                "{nth}"
            );
        });
    }
}

#[test]
fn servers_that_do_not_reach_each_other_are_served_by_the_next_way_and_that_is_remembered() {
    run(async {
        use berth_api::Transfer::{Pull, Push, Relay};
        let town = Town::new(Product::Incus, &["a", "b"]);
        town.world.separate("a", "b");
        town.add("a", "web-1");
        town.place("web-1", "b", |_| {});
        town.until_placed("web-1", "b").await;
        let moves = town.status("web-1").moves;
        let ways: Vec<_> = moves.iter().rev().map(|m| (m.transfer, m.outcome.as_str())).collect();
        assert_eq!(
            ways,
            [
                (Some(Pull), "Undone"),
                (Some(Push), "Undone"),
                (Some(Relay), "Succeeded")
            ]
        );
        let undone = &town.records()[0].status.undo;
        assert_eq!(undone.as_ref().map(|u| u.reason.as_str()), Some("PeerUnreachable"));
        town.add("a", "web-2");
        town.place("web-2", "b", |_| {});
        town.until_placed("web-2", "b").await;
        let moves = town.status("web-2").moves;
        assert_eq!(moves.len(), 1, "others need not find it out again");
        assert_eq!(moves[0].transfer, Some(Relay));
    });
}
