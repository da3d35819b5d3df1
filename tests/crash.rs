//! The crash table: the real engine on simulated servers, where the controller dies before and after every single write,
//! where its requests arrive minutes late, and where people, hosts and daemons interfere at every step. Whatever happens,
//! the invariants hold at every instant and the move ends.
//!
//! `BERTH_TABLE=full` disturbs one scenario of each kind in every way; otherwise only a few of them. `BERTH_SCENARIO=live` keeps
//! to those whose name has that word.

#[path = "crash/kept.rs"]
mod kept;
#[path = "crash/life.rs"]
mod life;
#[path = "crash/scenario.rs"]
mod scenario;
#[path = "crash/table.rs"]
mod table;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_api::Method;
use berth_core::marks;
use berth_core::server::{FailureKind, PowerAction};
use berth_sim::{Caller, Fault, World, Write};
use jiff::SignedDuration;
use scenario::Scenario;
use table::{Case, Report, Table};

#[test]
fn an_undisturbed_move_ends_with_one_instance_at_its_target_and_nothing_left() {
    for scenario in Scenario::all() {
        let report = Case::undisturbed(&scenario).run();
        let name = &scenario.name;
        assert_eq!(report.breach, None, "{name}\n{}", report.log.join("\n"));
        assert_eq!(report.outcome, "Succeeded", "{name}\n{}", report.log.join("\n"));
        assert_eq!(report.instances.len(), 1, "{name}: {:?}", report.instances);
        if scenario.method == Method::Live && scenario.back.is_none() {
            let asked = |verb: &str| report.effects.keys().any(|(_, done)| *done == verb);
            assert!(!asked("stop") && !asked("start"), "{name}: {:?}", report.effects);
            // where the end of the rounds cannot be known nothing is said, and simulated QEMUs do not pause
            let told = name.contains("criu pull") || name.contains("saved state");
            assert_eq!(report.measured, told, "{name}");
        }
        assert!(
            report.instances[0].starts_with(&destination(&scenario)),
            "{name}: {:?}",
            report.instances
        );
        assert!(
            report.instances[0].contains("newest data"),
            "{name}: {:?}",
            report.instances
        );
    }
}

/// How the line of the instance begins after such a move.
fn destination(scenario: &Scenario) -> String {
    let (project, name) = match scenario.inside {
        Some(inside) => (inside.project, inside.name),
        None => (scenario.project.as_str(), "web-1"),
    };
    format!("{} {project}/{name} {:?}", scenario.target(), scenario.power_after)
}

#[test]
fn a_move_that_forgot_the_guard_is_noticed() {
    // it need not be carried on from the transfer
    let case = Case::disturbed(&Scenario::unguarded(), |_, w| {
        matches!(w.write, Write::Offer(..)).then_some(Fault::CrashBefore)
    });
    let report = case.run();
    let breach = report.breach.unwrap_or_default();
    assert!(
        breach.starts_with("I2") && breach.contains("could be started"),
        "{breach}"
    );
}

#[test]
fn a_guest_that_stops_too_late_runs_where_it_was_in_the_end_whenever_a_controller_dies() {
    undone_whenever_a_controller_dies("stubborn guests", Scenario::stubborn());
}

#[test]
fn a_container_that_is_restored_with_files_of_nobody_runs_where_it_was_whenever_a_controller_dies() {
    undone_whenever_a_controller_dies("broken restores", Scenario::broken());
}

/// Such a move is undone and its instance runs where it was, whenever a controller dies.
fn undone_whenever_a_controller_dies(name: &'static str, scenarios: Vec<Scenario>) {
    let mut table = Table::new(name);
    for scenario in scenarios {
        let undisturbed = Case::undisturbed(&scenario).run();
        let mut judge = |what: &str, report: &Report| {
            let runs = report.instances.len() == 1 && report.instances[0].starts_with("a default/web-1 Running");
            let right = report.outcome == "Undone" && runs && report.is_settled() && !report.measured;
            table.case(
                &format!("{}, {what}", scenario.name),
                report,
                right,
                "Undone, and it runs",
            );
        };
        judge("undisturbed", &undisturbed);
        for nth in 0..undisturbed.writes.0 {
            for fault in [Fault::CrashBefore, Fault::CrashAfter] {
                let case = Case::disturbed(&scenario, move |_, w| {
                    (w.controller == "c1" && w.nth == nth).then_some(fault)
                });
                judge(&format!("{fault:?} {nth}"), &case.run());
            }
        }
    }
    table.finish();
}

#[test]
fn an_instance_is_stopped_when_all_but_the_newest_temporary_snapshot_are_deleted_at_both_ends() {
    let rounds: Vec<Scenario> = Scenario::all()
        .into_iter()
        .filter(|s| s.name.ends_with("warm, three rounds"))
        .collect();
    assert_eq!(rounds.len(), 2);
    for scenario in rounds {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = seen.clone();
        let case = Case::disturbed(&scenario, move |world, w| {
            if matches!(w.write, Write::Power(_, PowerAction::Stop { .. })) {
                told.lock()
                    .unwrap()
                    .extend(["a", "b"].map(|server| temporary_snapshots(world, server)));
            }
            None
        });
        case.run();
        assert_eq!(*seen.lock().unwrap(), [1, 1], "{}", scenario.name);
    }
}

/// How many temporary snapshots there are on a server.
fn temporary_snapshots(world: &World, server: &str) -> usize {
    let instances = world.instances(server);
    let all = instances.iter().flat_map(|i| world.snapshots(server, &i.at));
    all.filter(|s| s.name.starts_with("berth-")).count()
}

/// Whether the whole table is wanted.
fn full() -> bool {
    std::env::var_os("BERTH_TABLE").is_some_and(|v| v == "full")
}

/// The scenarios that are disturbed in every way, the most important first.
fn some() -> Vec<Scenario> {
    const KINDS: [&str; 21] = [
        "Incus pull, running",
        "Incus kept, running",
        "Incus kept, way back",
        "Incus live pull",
        "Incus criu pull",
        "LXD saved state, pull",
        "Incus pull, restricted project",
        "Incus warm, running",
        "Incus inside, pool",
        "Incus restart for overrides",
        "Incus relay, running",
        "Incus backup, running",
        "Incus backup, streamed",
        "LXD pull, running",
        "LXD warm, from a snapshot of ours",
        "Incus pull, slow servers",
        "Incus pull, virtual machine",
        "LXD kept, way back, kept again",
        "Incus kept, way back, warm",
        "Incus kept, restricted project",
        "LXD kept, way back, makes room",
    ];
    let all = Scenario::all();
    let kinds = KINDS.iter().take(if full() { KINDS.len() } else { 10 });
    kinds
        .filter_map(|k| all.iter().find(|s| s.name == *k))
        .cloned()
        .collect()
}

/// Moves inside a server.
fn inside() -> Vec<Scenario> {
    Scenario::all().into_iter().filter(|s| s.inside.is_some()).collect()
}

#[test]
fn a_daemon_that_dies_at_any_moment_of_a_move_inside_it_leaves_one_instance_or_both_and_says_so() {
    let mut table = Table::new("interrupted daemons");
    for scenario in inside() {
        let writes = Case::undisturbed(&scenario).run().writes.0;
        for nth in 0..writes {
            // a change of all things takes some five phases
            for pause in (0..=1200).step_by(if full() { 20 } else { 60 }) {
                let case = Case::disturbed(&scenario, move |world, w| {
                    if w.controller == "c1" && w.nth == nth {
                        world.after(Duration::from_millis(pause), |w| w.daemon_restart("a"));
                    }
                    None
                });
                let report = case.run();
                let what = format!("{}, restart {pause} ms after write {nth}", scenario.name);
                let both = report.outcome == "NeedsAttention" && report.instances.len() == 2;
                let right = report.is_settled() && (report.outcome == "Succeeded" || both);
                table.case(
                    &what,
                    &report,
                    right,
                    "one instance at its target, or both and a person is told",
                );
            }
        }
    }
    table.finish();
}

#[test]
fn a_guest_that_its_daemon_had_frozen_when_it_died_runs_in_the_end() {
    let mut table = Table::new("frozen guests");
    let frozen = ["Incus criu pull", "LXD warm, from a snapshot of ours"];
    for scenario in Scenario::all().iter().filter(|s| frozen.contains(&s.name.as_str())) {
        let writes = Case::undisturbed(scenario).run().writes.0;
        for nth in 0..writes {
            for pause in [10, 60, 200, 600] {
                let case = Case::disturbed(scenario, move |world, w| {
                    if w.controller == "c1" && w.nth == nth {
                        world.after(Duration::from_millis(pause), |w| w.daemon_restart("a"));
                    }
                    None
                });
                let report = case.run();
                let what = format!("{}, restart {pause} ms after write {nth}", scenario.name);
                table.case(&what, &report, report.is_settled(), "settled, and not frozen");
            }
        }
    }
    table.finish();
}

/// A scenario cancelled before every write that the undisturbed move makes.
fn cancellations(scenario: &Scenario) -> Vec<Scenario> {
    let writes = Case::undisturbed(scenario).run().writes.0;
    (1..writes).map(|nth| scenario.cancelled_before(nth)).collect()
}

#[test]
fn a_cancelled_move_ends_where_it_began_or_where_it_was_going_and_leaves_nothing() {
    let mut table = Table::new("cancelled");
    let scenarios = if full() { Scenario::all() } else { some() };
    for scenario in scenarios.iter().flat_map(cancellations) {
        let report = Case::undisturbed(&scenario).run();
        let start = if scenario.instance.running {
            "Running"
        } else {
            "Stopped"
        };
        let place = match report.outcome.as_str() {
            "Cancelled" => format!("a {}/web-1 {start}", scenario.project),
            _ => destination(&scenario),
        };
        let instances = match scenario.back {
            Some(_) => report.but_for_the_kept(),
            None => report.instances.iter().collect(),
        };
        let one = instances.len() == 1 && instances[0].starts_with(&place);
        // of two guests that ran side by side for too long a person has to look at the one that keeps its guard
        let both = scenario.name.contains("live pull, slow servers")
            && report.outcome == "NeedsAttention"
            && instances.len() == 2
            && instances.iter().any(|i| i.starts_with(&place))
            && instances
                .iter()
                .all(|i| !i.replace("\"berth-guard\"", "").contains("\"berth-"));
        let right = report.is_settled() && (both || (one && report.is_tidy())) && report.outcome != "Undone";
        table.case(
            &scenario.name,
            &report,
            right,
            "one instance at either end, nothing left",
        );
    }
    table.finish();
}

#[test]
fn a_server_that_lets_go_of_a_cancelled_migration_within_a_minute_is_nobodys_business() {
    let all = Scenario::all();
    let live = all.iter().find(|s| s.name == "Incus live pull");
    let cancelled = live.map(cancellations).unwrap_or_default();
    let last = cancelled
        .iter()
        .rfind(|s| Case::undisturbed(s).run().outcome == "Cancelled");
    let scenario = last.unwrap_or_else(|| panic!("none of {} is cancelled", cancelled.len()));
    for (seconds, told) in [(50, false), (200, true)] {
        let (since, seen) = (Mutex::new(None), Arc::new(Mutex::new(false)));
        let attention = seen.clone();
        let case = Case::disturbed(scenario, move |world, w| match &w.write {
            Write::Patch(_, change, _) if change.config.get(marks::MOVE).is_some_and(String::is_empty) => {
                let began = *since.lock().unwrap().get_or_insert(world.now());
                let busy = world.now().duration_since(began) < SignedDuration::from_secs(seconds);
                busy.then_some(Fault::Fail {
                    kind: FailureKind::Busy,
                    carried_out: false,
                })
            }
            Write::Swap(record) => {
                let error = record.status.last_error.as_ref();
                *attention.lock().unwrap() |= error.is_some_and(|e| e.reason == "NeedsAttention");
                None
            }
            _ => None,
        });
        let report = case.run();
        assert!(report.is_settled(), "busy for {seconds} s: {}", report.log.join("\n"));
        assert_eq!(*seen.lock().unwrap(), told, "busy for {seconds} s");
    }
}

#[test]
fn a_controller_that_dies_before_or_after_any_write_changes_nothing_but_one_repeated_transfer() {
    let mut table = Table::new("crashes");
    let cancelled = some()
        .into_iter()
        .take(if full() { 8 } else { 1 })
        .flat_map(|s| cancellations(&s));
    for scenario in Scenario::all().into_iter().chain(cancelled) {
        let undisturbed = Case::undisturbed(&scenario).run();
        // a cancellation that the first controller does not live to see is another case
        let first = scenario.cancel_before.map_or(0, |n| n + 1);
        for nth in first..undisturbed.writes.0 {
            for fault in [Fault::CrashBefore, Fault::CrashAfter] {
                for vacancy in [0, 15].into_iter().take(if first == 0 && full() { 2 } else { 1 }) {
                    let mut case = Case::disturbed(&scenario, move |_, w| {
                        (w.controller == "c1" && w.nth == nth).then_some(fault)
                    });
                    case.vacancy = Duration::from_secs(vacancy);
                    let report = case.run();
                    let what = format!("{}, {fault:?} {nth}, vacancy {vacancy} s", scenario.name);
                    // while nobody was there the processes may have gone over: then a cancellation comes too late
                    let late = scenario.criu && scenario.cancel_before.is_some() && report.outcome == "Succeeded";
                    let difference = undisturbed.difference(&report, scenario.method == Method::Live);
                    // both guests ran meanwhile, for longer than they may
                    let both = scenario.method == Method::Live && vacancy > 0 && report.outcome == "NeedsAttention";
                    let difference = difference.filter(|_| !(late || both) || !report.is_settled());
                    table.case(
                        &what,
                        &report,
                        difference.is_none(),
                        difference.as_deref().unwrap_or_default(),
                    );
                }
            }
        }
    }
    table.finish();
}

#[test]
fn a_request_that_arrives_late_at_any_later_moment_breaks_no_invariant() {
    let mut table = Table::new("late requests");
    let all = some();
    let cancelled = [6, 9, 12].map(|nth| all[0].cancelled_before(nth));
    for scenario in all.iter().chain(cancelled.iter().filter(|_| full())) {
        for nth in 0..Case::undisturbed(scenario).run().writes.0 {
            // first without any delivery, to count the later writes
            let mut moments = vec![None];
            let mut next = 0;
            while let Some(moment) = moments.get(next).copied() {
                let report = late(scenario, nth, moment);
                if next == 0 {
                    moments.extend((0..=report.writes.1).map(Some));
                }
                let what = format!("{}, request {nth} arrives before write {moment:?}", scenario.name);
                table.case(&what, &report, report.is_settled(), "settled without a breach");
                next += 1;
            }
        }
    }
    table.finish();
}

/// The first controller dies while its `nth` write is under way, which arrives before that write of the second one, or
/// in the end, or never.
fn late(scenario: &Scenario, nth: u64, moment: Option<u64>) -> Report {
    // a rename is sent only as long as nobody else can lead before it arrives; here it would free the name that the copy took
    let frees_a_name = scenario.name.contains("makes room");
    let mut case = Case::disturbed(scenario, move |world, w| {
        if w.controller == "c1" && w.nth == nth {
            let in_time = frees_a_name && matches!(w.write, Write::Rename(..));
            return Some(if in_time {
                Fault::CrashAfter
            } else {
                Fault::Late(Caller::Dies)
            });
        }
        if w.controller == "c2" && Some(w.nth) == moment {
            for request in world.late() {
                // a refusal is what is hoped for
                let _ = world.deliver_late(request.id);
            }
        }
        None
    });
    case.deliver_at_end = moment.is_some();
    case.run()
}

/// Something that a person, a host or a daemon does.
type Act = (&'static str, Arc<dyn Fn(&World, &Scenario) + Send + Sync>);

fn acts() -> Vec<Act> {
    let mut acts: Vec<Act> = Vec::new();
    let mut add = |name, act: fn(&World, &Scenario)| acts.push((name, Arc::new(act)));
    // whether people succeed is up to the servers
    add("a person starts the source", |w, s| drop(w.start("a", &s.at())));
    add("a person stops the source", |w, s| drop(w.stop("a", &s.at())));
    add("a person stops and starts the source", |w, s| {
        drop(w.stop("a", &s.at()).and_then(|()| w.start("a", &s.at())));
    });
    add("a person starts and stops the source", |w, s| {
        drop(w.start("a", &s.at()).and_then(|()| w.stop("a", &s.at())));
    });
    add("a person starts the target", |w, s| drop(w.start(s.target(), &s.at())));
    add("a person stops the target", |w, s| drop(w.stop(s.target(), &s.at())));
    add("a person deletes the source", |w, s| drop(w.delete("a", &s.at())));
    add("the guest writes", |w, s| {
        w.write_data("a", &s.at());
        w.write_data(s.target(), &s.at());
    });
    add("the source's host reboots", |w, _| w.reboot("a"));
    add("the target's host reboots", |w, s| w.reboot(s.target()));
    add("the source's daemon restarts", |w, _| w.daemon_restart("a"));
    add("the target's daemon restarts", |w, s| w.daemon_restart(s.target()));
    add("the source is cut off for a minute", |w, _| {
        w.cut_off_for("a", Duration::from_secs(60));
    });
    add("the target is cut off for a minute", |w, s| {
        w.cut_off_for(s.target(), Duration::from_secs(60));
    });
    add("the target is cut off for five minutes", |w, s| {
        w.cut_off_for(s.target(), Duration::from_secs(300));
    });
    acts
}

#[test]
fn whatever_people_hosts_and_daemons_do_at_any_step_breaks_no_invariant_and_the_move_ends() {
    let mut table = Table::new("interference");
    let all = some();
    let cancelled = [6, 9, 12, 14].map(|nth| all[0].cancelled_before(nth));
    for scenario in all.iter().chain(cancelled.iter().filter(|_| full())) {
        let writes = Case::undisturbed(scenario).run().writes.0;
        for (name, act) in acts() {
            if scenario.inside.is_some() && name.contains("deletes") {
                continue; // then there is nothing left to wait for, and the move waits for it
            }
            for nth in 0..writes {
                // a moment later, the write is being carried out
                for pause in [0, 100].into_iter().take(if full() { 2 } else { 1 }) {
                    let (act, s) = (act.clone(), scenario.clone());
                    let case = Case::disturbed(scenario, move |world, w| {
                        // who deletes the source while we delete the copy wants no instance at all
                        let both = name.contains("deletes") && w.write.verb() == "remove";
                        if w.controller == "c1" && w.nth == nth && !both {
                            let (act, world, s) = (act.clone(), world.clone(), s.clone());
                            if pause == 0 {
                                act(&world, &s);
                            } else {
                                world.after(Duration::from_millis(pause), move |w| act(w, &s));
                            }
                        }
                        None
                    });
                    let report = case.run();
                    let what = format!("{}, {name} at write {nth} + {pause} ms", scenario.name);
                    let gone = name.contains("deletes") && report.has_ended() && report.breach.is_none();
                    table.case(&what, &report, gone || report.is_settled(), "settled without a breach");
                }
            }
        }
    }
    table.finish();
}

#[test]
fn a_write_that_fails_or_whose_answer_is_lost_breaks_no_invariant_and_the_move_ends() {
    let mut table = Table::new("failures");
    for scenario in some() {
        let undisturbed = Case::undisturbed(&scenario).run();
        for nth in 0..undisturbed.writes.0 {
            let failures = [
                (FailureKind::Unknown, true),
                (FailureKind::Unknown, false),
                (FailureKind::Unreachable, false),
                (FailureKind::Busy, false),
                (FailureKind::Changed, false),
                (FailureKind::Refused, false),
            ];
            for (kind, carried_out) in failures {
                let fault = Fault::Fail { kind, carried_out };
                let case = Case::disturbed(&scenario, move |_, w| (w.nth == nth).then_some(fault));
                let report = case.run();
                let what = format!(
                    "{}, write {nth} fails: {kind:?}, carried out: {carried_out}",
                    scenario.name
                );
                table.case(&what, &report, report.is_settled(), "settled without a breach");
            }
        }
    }
    table.finish();
}
