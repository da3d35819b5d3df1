//! Which method a move uses, what it is expected to take, and what happens after one failed.

use std::sync::Arc;

use berth_api::moves::{MoveError, Precopy, Round, UndoCause};
use berth_api::placement::{PlanMethod, Rejected};
use berth_api::{GoDuration, InstanceMoveStatus, Method, MicroTime, Outcome, Reason, Snapshots, Step, Transfer};
use berth_core::model::{Contents, InstanceKind, Pool, ServerFacts};
use berth_core::plan::{Decision, Desired, Verdict, World, plan};
use berth_core::records::Record;
use berth_core::status;
use common::{at, desired, instance, now, server, world};

mod common;

fn facts(w: &mut World, server: &str, change: impl FnOnce(&mut ServerFacts)) {
    let view = w.servers.get_mut(server).unwrap_or_else(|| panic!("{server}"));
    change(Arc::make_mut(view.facts.as_mut().unwrap_or_else(|| panic!("{server}"))));
}

/// Two servers that can bring copies up to date, with pools of that driver.
fn ready(driver: &str) -> (Desired, World) {
    let mut w = world([("rack-a", server("a", [instance("web")])), ("rack-b", server("b", []))]);
    for name in ["rack-a", "rack-b"] {
        facts(&mut w, name, |f| {
            f.extensions.insert("container_incremental_copy".to_owned());
            f.pools = vec![Pool {
                name: "default".to_owned(),
                driver: driver.to_owned(),
            }];
        });
    }
    let mut d = desired("web", "rack-b");
    d.spec.methods = vec![Method::Warm, Method::Cold];
    (d, w)
}

fn method(verdict: &Verdict) -> Option<PlanMethod> {
    verdict.plan.as_ref().and_then(|p| p.method)
}

fn rejected(verdict: &Verdict) -> Vec<Rejected> {
    verdict.plan.as_ref().map(|p| p.rejected.clone()).unwrap_or_default()
}

#[test]
fn a_running_instance_is_moved_warm_where_that_is_possible() {
    for driver in ["btrfs", "dir"] {
        let (d, w) = ready(driver);
        let verdict = plan(&d, &w, now());
        assert_eq!(method(&verdict), Some(PlanMethod::Warm), "{driver}: {verdict:?}");
        let Decision::Move(spec) = verdict.decision else {
            panic!()
        };
        assert!(
            spec.warm.is_some() && spec.inputs.is_some(),
            "the record can go on by itself"
        );
    }
}

#[test]
fn what_keeps_a_move_from_being_warm_is_said_with_its_cure() {
    type Change = fn(&mut Desired, &mut World);
    let rows: [(Reason, Change); 6] = [
        (Reason::MethodImpossible, |_, w| {
            facts(w, "rack-b", |f| {
                f.extensions.remove("container_incremental_copy");
            });
        }),
        (Reason::MethodImpossible, |d, _| d.spec.snapshots = Snapshots::Exclude),
        (Reason::SnapshotsCannotTravel, |_, w| {
            facts(w, "rack-b", |f| f.product = berth_core::model::Product::Lxd);
        }),
        (Reason::RestrictedSnapshots, |_, w| {
            facts(w, "rack-a", |f| {
                f.projects[0].config.insert("restricted".into(), "true".into());
            });
        }),
        (Reason::GuestFrozen, |_, w| {
            for name in ["rack-a", "rack-b"] {
                facts(w, name, |f| {
                    f.virtual_machines = true;
                    f.pools[0].driver = "dir".into();
                });
            }
            let mut vm = instance("web");
            vm.kind = InstanceKind::VirtualMachine;
            w.servers.get_mut("rack-a").unwrap_or_else(|| panic!()).instances = Some([vm].into_iter().collect());
        }),
        (Reason::DowntimeTooLong, |d, w| {
            d.spec.max_downtime = Some(GoDuration::from_millis(100));
            w.size = Some(1 << 30);
        }),
    ];
    for (reason, change) in rows {
        let (mut d, mut w) = ready("btrfs");
        change(&mut d, &mut w);
        let why = rejected(&plan(&d, &w, now()));
        assert_eq!(why[0].reason, reason.as_str(), "{why:?}");
        assert_eq!(why[0].method, Method::Warm);
        assert!(!why[0].message.is_empty() && why[0].fix.is_some(), "{why:?}");
    }
}

#[test]
fn a_virtual_machine_moves_warm_between_copy_on_write_pools_without_being_stateful_and_elsewhere_the_plan_says_why_not()
{
    let moved = |from: &str, to: &str| {
        let (mut d, mut w) = ready(from);
        for (name, driver) in [("rack-a", from), ("rack-b", to)] {
            facts(&mut w, name, |f| {
                f.virtual_machines = true;
                f.pools[0].driver = driver.to_owned();
            });
        }
        let mut vm = instance("web");
        vm.kind = InstanceKind::VirtualMachine;
        w.servers.get_mut("rack-a").unwrap_or_else(|| panic!()).instances = Some([vm].into_iter().collect());
        d.spec.methods = vec![Method::Live, Method::Warm, Method::Cold];
        plan(&d, &w, now())
    };
    let verdict = moved("btrfs", "btrfs");
    assert_eq!(method(&verdict), Some(PlanMethod::Warm), "{verdict:?}");
    let live = rejected(&verdict);
    assert_eq!(live[0].reason, Reason::MigrationStatefulOff.as_str(), "{live:?}");
    for (from, to, cure) in [
        ("dir", "dir", "from a copy-on-write pool"),
        ("btrfs", "dir", "set spec.target.pool"),
    ] {
        let verdict = moved(from, to);
        assert_eq!(method(&verdict), Some(PlanMethod::Cold), "{verdict:?}");
        let why = rejected(&verdict);
        let warm = why
            .iter()
            .find(|r| r.method == Method::Warm)
            .unwrap_or_else(|| panic!("{why:?}"));
        assert_eq!(warm.reason, Reason::GuestFrozen.as_str());
        assert!(warm.message.contains("stands still"), "{warm:?}");
        assert!(warm.fix.as_ref().is_some_and(|f| f.contains(cure)), "{warm:?}");
    }
}

#[test]
fn a_move_inside_a_server_is_never_warm() {
    let (mut d, w) = ready("btrfs");
    d.spec.target.server = "rack-a".to_owned();
    d.spec.target.name = Some("web-2".to_owned());
    let verdict = plan(&d, &w, now());
    assert_eq!(method(&verdict), Some(PlanMethod::Cold));
    assert_eq!(rejected(&verdict)[0].method, Method::Warm);
}

#[test]
fn the_estimate_of_a_warm_move_does_not_grow_with_the_instance_and_that_of_a_cold_one_does() {
    let estimate = |methods: &[Method], size| {
        let (mut d, mut w) = ready("btrfs");
        d.spec.methods = methods.to_vec();
        w.size = Some(size);
        let plan = plan(&d, &w, now()).plan.unwrap_or_default();
        plan.estimate.and_then(|e| e.downtime).map(|d| d.as_millis())
    };
    let (small, large) = (200 << 20, 8 << 30);
    assert_eq!(estimate(&[Method::Warm], small), estimate(&[Method::Warm], large));
    assert!(estimate(&[Method::Cold], large) > estimate(&[Method::Cold], small));
    assert!(estimate(&[Method::Warm], large) < estimate(&[Method::Cold], large));
}

#[test]
fn an_instance_that_would_not_run_for_too_long_waits_with_that_reason() {
    let (mut d, mut w) = ready("btrfs");
    d.spec.max_downtime = Some(GoDuration::from_secs(3));
    w.size = Some(8 << 30);
    assert!(
        matches!(plan(&d, &w, now()).decision, Decision::Move(_)),
        "Warm is short enough"
    );
    d.spec.methods = vec![Method::Cold];
    let Decision::Blocked(blockers) = plan(&d, &w, now()).decision else {
        panic!()
    };
    assert_eq!(blockers[0].reason, Reason::DowntimeTooLong);
}

/// A move of the plan that was undone for that reason.
fn undone(d: &Desired, w: &World, reason: Reason) -> Record {
    let Decision::Move(spec) = plan(d, w, now()).decision else {
        panic!()
    };
    let status = InstanceMoveStatus {
        outcome: Some(Outcome::Undone.as_str().to_owned()),
        finished_at: Some(MicroTime(now())),
        undo: Some(UndoCause {
            reason: reason.as_str().to_owned(),
            message: "it did not work".to_owned(),
            fix: Some("mend it".to_owned()),
            cancelled: false,
        }),
        ..Default::default()
    };
    Record {
        namespace: "shop".to_owned(),
        name: "web-x7k2p".to_owned(),
        version: String::new(),
        deleting: false,
        spec: *spec,
        status,
    }
}

#[test]
fn a_method_that_failed_gives_way_to_the_next_until_something_changes_or_a_day_has_passed() {
    let (mut d, mut w) = ready("btrfs");
    let record = undone(&d, &w, Reason::GuestFrozen);
    status::remember(&mut d.status, &record, d.generation);
    assert_eq!(d.status.retry_at, None, "the next one is tried at once");
    let verdict = plan(&d, &w, now());
    assert_eq!(method(&verdict), Some(PlanMethod::Cold), "{verdict:?}");
    assert!(rejected(&verdict)[0].message.contains("it did not work"));

    let tomorrow = at("2026-11-23T10:00:01Z");
    assert_eq!(
        method(&plan(&d, &w, tomorrow)),
        Some(PlanMethod::Warm),
        "a day has passed"
    );
    facts(&mut w, "rack-b", |f| f.version = "7.0.2".to_owned());
    assert_eq!(method(&plan(&d, &w, now())), Some(PlanMethod::Warm), "another version");

    let (_, w) = ready("btrfs");
    d.spec.methods = vec![Method::Warm];
    let Decision::Wait { reason, until, .. } = plan(&d, &w, now()).decision else {
        panic!()
    };
    assert_eq!(reason, Reason::MethodImpossible, "alone it stops nothing");
    assert_eq!(until, Some(at("2026-11-23T10:00:00Z")));
    d.requested_at = Some("1".to_owned());
    d.handle_request();
    assert_eq!(
        method(&plan(&d, &w, now())),
        Some(PlanMethod::Warm),
        "a person asked for it"
    );
}

#[test]
fn a_failure_of_a_link_or_a_wish_is_none_of_the_method() {
    for reason in [Reason::ServerUnreachable, Reason::MoveFailed, Reason::WaitingForWindow] {
        let (mut d, w) = ready("btrfs");
        let record = undone(&d, &w, reason);
        status::remember(&mut d.status, &record, d.generation);
        assert!(d.status.failed_methods.is_empty(), "{reason}");
    }
}

#[test]
fn why_a_move_was_undone_stays_said_whatever_else_goes_wrong_meanwhile() {
    let (mut d, mut w) = ready("dir");
    let mut record = undone(&d, &w, Reason::ServerUnreachable);
    record.status.last_error = Some(MoveError {
        reason: Reason::MoveFailed.as_str().to_owned(),
        message: "Instance is busy running a \"migrate\" operation".to_owned(),
        fix: None,
        at: Some(MicroTime(now())),
        attempts: 1,
    });
    status::remember(&mut d.status, &record, d.generation);
    w.records = vec![record];
    let Decision::Wait { reason, message, .. } = plan(&d, &w, now()).decision else {
        panic!()
    };
    assert_eq!(reason, Reason::MoveFailed);
    assert!(
        message.contains("was undone: it did not work; mend it; tried again at"),
        "{message}"
    );
}

#[test]
fn an_instance_is_not_stopped_again_for_a_pool_that_its_last_move_filled_until_there_is_more_room() {
    const MIB: i64 = 1 << 20;
    let free = |w: &mut World, free: Option<i64>| {
        w.contents = Some(Contents {
            free,
            ..Contents::default()
        });
    };
    let (mut d, mut w) = ready("dir");
    free(&mut w, Some(100 * MIB));
    let record = undone(&d, &w, Reason::InsufficientSpace);
    assert_eq!(record.spec.target_free, Some(100 * MIB));
    status::remember(&mut d.status, &record, d.generation);
    w.records = vec![record];
    d.status.retry_at = None;

    free(&mut w, Some(105 * MIB));
    let verdict = plan(&d, &w, now());
    let shown = verdict.plan.as_ref().map_or(0, |p| p.blockers.len());
    assert_eq!(shown, 1, "{:?}", verdict.plan);
    let Decision::Blocked(blockers) = verdict.decision else {
        panic!()
    };
    assert_eq!(blockers[0].reason, Reason::InsufficientSpace);
    assert_eq!(
        blockers[0].message,
        "it did not work: 100 MiB were free, and 105 MiB are now"
    );
    let fix = blockers[0].fix.clone().unwrap_or_default();
    assert!(
        fix.contains("on rack-b: incus storage info default") && fix.contains("requestedAt"),
        "{fix}"
    );

    let moves = |d: &Desired, w: &World| matches!(plan(d, w, now()).decision, Decision::Move(_));
    for room in [Some(106 * MIB), None] {
        free(&mut w, room);
        assert!(moves(&d, &w), "more room, or none that is known: {room:?}");
    }
    free(&mut w, Some(100 * MIB));
    let mut changed = d.clone();
    changed.generation += 1;
    assert!(moves(&changed, &w), "somebody changed the placement");
    let mut backup = w.clone();
    backup.records[0].spec.transfer = Transfer::Backup;
    assert!(moves(&d, &backup), "the backup was too much for the scratch folder");
    let mut elsewhere = w.clone();
    elsewhere.records[0].spec.to.pool = Some("other".to_owned());
    assert!(moves(&d, &elsewhere), "another pool was filled");
    d.requested_at = Some("1".to_owned());
    d.handle_request();
    assert!(moves(&d, &w), "somebody asked for another try");
}

#[test]
fn a_pair_of_pools_that_is_not_incremental_is_remembered_for_every_instance_and_rates_are_learnt() {
    let (d, mut w) = ready("btrfs");
    let mut record = undone(&d, &w, Reason::NotIncremental);
    let round = Round {
        bytes: Some(800 << 20),
        duration: GoDuration::from_secs(8),
    };
    record.status.precopy = Some(Precopy {
        rounds: vec![round, round],
        ..Default::default()
    });
    record.status.step = Some(Step::Undoing.as_str().to_owned());
    Arc::make_mut(&mut w.lessons).learn(&record);
    let verdict = plan(&d, &w, now());
    assert_eq!(method(&verdict), Some(PlanMethod::Cold));
    assert_eq!(rejected(&verdict)[0].reason, Reason::NotIncremental.as_str());
    let estimate = verdict.plan.and_then(|p| p.estimate).unwrap_or_default();
    assert_eq!(estimate.bytes, Some(800 << 20), "its size was learnt, too");
    assert!(estimate.downtime >= Some(GoDuration::from_secs(8)), "{estimate:?}");
    let (_, untaught) = ready("btrfs");
    w.servers = untaught.servers;
    assert_eq!(
        method(&plan(&d, &w, at("2026-11-24T10:00:00Z"))),
        Some(PlanMethod::Warm)
    );
}
