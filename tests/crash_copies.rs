//! The crash table of copies: the real engine on simulated servers makes a copy and refreshes it, while the controller
//! dies before and after every single write, its requests arrive late or fail, and people and daemons interfere. Whatever
//! happens, no copy that somebody used is overwritten, none that is not complete can be started, nothing that is not ours
//! is deleted, and in the end the copy is whole, under its name, unguarded, and nothing else is left.

use std::sync::Arc;
use std::time::Duration;

use berth_api::conditions;
use berth_api::copy::{CopySource, DeletionPolicy, Refresh};
use berth_api::server::Limits;
use berth_api::{InstanceCopySpec, Target};
use berth_core::copies::CopyRecord;
use berth_core::marks;
use berth_core::model::{InstanceRef, Product};
use berth_core::server::FailureKind;
use berth_engine::registry::ServerConfig;
use berth_engine::{Engine, Env, Key};
use berth_sim::{Caller, Fault, InstanceOptions, Options, Timing, World, WriteInfo};
use jiff::Timestamp;

const NAMESPACE: &str = "shop";
const COPY: &str = "db-standby";
/// No copy of the table takes longer, whatever happens to it.
const LONGEST: Duration = Duration::from_secs(2 * 3600);

/// What is copied.
#[derive(Clone)]
struct Scenario {
    name: &'static str,
    product: Product,
    pool: &'static str,
    instance: InstanceOptions,
    deletes: bool,
}

fn scenarios() -> Vec<Scenario> {
    let scenario = |name, product, pool, instance| Scenario {
        name,
        product,
        pool,
        instance,
        deletes: false,
    };
    let running = InstanceOptions::default;
    vec![
        scenario(
            "Incus, copy on write, running",
            Product::Incus,
            "nvme",
            running().snapshot("s0"),
        ),
        scenario(
            "Incus, dir, a running virtual machine",
            Product::Incus,
            "plain",
            InstanceOptions::vm(),
        ),
        scenario(
            "LXD, dir, running, snapshots",
            Product::Lxd,
            "plain",
            running().snapshot("s0"),
        ),
        Scenario {
            deletes: true,
            ..scenario(
                "LXD, copy on write, stopped, deleted",
                Product::Lxd,
                "nvme",
                InstanceOptions::stopped(),
            )
        },
    ]
}

fn source() -> InstanceRef {
    InstanceRef::new("default", "db")
}

fn copy() -> InstanceRef {
    InstanceRef::new("default", COPY)
}

impl Scenario {
    fn begin(&self) -> World {
        let world = World::new();
        // so long that the next controller finds it under way
        let timing = Timing {
            transfer: Duration::from_secs(8),
            ..Timing::of(self.product)
        };
        for server in ["a", "b"] {
            let options = Options::default().pool("nvme", "zfs").pool("plain", "dir");
            world.add_server(server, self.product, options.timing(timing));
        }
        let root = [("type", "disk"), ("path", "/"), ("pool", self.pool)];
        world.add_instance("a", &source(), self.instance.clone().device("root", &root));
        world.apply_copy(self.record());
        world
    }

    fn record(&self) -> CopyRecord {
        CopyRecord {
            namespace: NAMESPACE.to_owned(),
            name: COPY.to_owned(),
            uid: "uid-1".to_owned(),
            version: String::new(),
            generation: 1,
            deleting: false,
            held: false,
            requested_at: None,
            spec: InstanceCopySpec {
                source: CopySource {
                    server: Some("a".to_owned()),
                    instance: Some("db".to_owned()),
                    ..CopySource::default()
                },
                target: Target {
                    server: "b".to_owned(),
                    name: Some(COPY.to_owned()),
                    ..Target::default()
                },
                refresh: Some(Refresh {
                    interval: Some(berth_api::GoDuration::from_secs(3600)),
                    ..Refresh::default()
                }),
                deletion_policy: if self.deletes {
                    DeletionPolicy::Delete
                } else {
                    DeletionPolicy::Orphan
                },
                ..InstanceCopySpec::default()
            },
            status: Default::default(),
        }
    }
}

/// What happens before a write.
type Disturbance = Arc<dyn Fn(&World, &WriteInfo) -> Option<Fault> + Send + Sync>;

struct Report {
    ended: String,
    state: Vec<String>,
    writes: u64,
    breach: Option<String>,
    log: Vec<String>,
}

/// How far the story is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chapter {
    First,
    Refresh,
    Deleted,
}

fn play(scenario: &Scenario, disturbance: Option<Disturbance>) -> Report {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    runtime.expect("a runtime").block_on(story(scenario, disturbance))
}

async fn story(scenario: &Scenario, disturbance: Option<Disturbance>) -> Report {
    let world = scenario.begin();
    if let Some(disturbance) = disturbance {
        world.set_hook(move |world, write| disturbance(world, write));
    }
    let mut ended = "settled".to_owned();
    let mut number = 0;
    let mut chapters = vec![Chapter::First, Chapter::Refresh];
    chapters.extend(scenario.deletes.then_some(Chapter::Deleted));
    for chapter in chapters {
        turn(&world, chapter);
        loop {
            number += 1;
            let id = format!("c{number}");
            tokio::select! {
                biased;
                () = world.died(&id) => continue,
                () = live(&world, &id, chapter) => world.kill(&id),
                () = tokio::time::sleep(LONGEST) => {
                    let status = world.copy(NAMESPACE, COPY).map(|r| r.status);
                    ended = format!("stuck at {chapter:?}: {status:?}");
                    world.kill(&id);
                }
            }
            break;
        }
        world.settled().await;
    }
    world.clear_hook();
    for late in world.late() {
        // a refusal is what is hoped for
        let _ = world.deliver_late(late.id);
    }
    world.settled().await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    // somebody looks once more, as after every change
    let _ = tokio::time::timeout(LONGEST, live(&world, "last", Chapter::Refresh)).await;
    Report {
        ended,
        state: state(&world),
        writes: world
            .log()
            .iter()
            .filter(|e| e.write.is_some())
            .count()
            .try_into()
            .unwrap_or(0),
        breach: world.check().err().map(|b| format!("{}: {}", b.invariant, b.message)),
        log: world.log().iter().map(ToString::to_string).collect(),
    }
}

/// What a person does between the chapters.
fn turn(world: &World, chapter: Chapter) {
    match chapter {
        Chapter::First => {}
        Chapter::Refresh => {
            world.write_data("a", &source());
            // a snapshot that the copy has is gone at the source
            let _ = world.delete_snapshot("a", &source(), "s0");
            let Some(mut record) = world.copy(NAMESPACE, COPY) else {
                return;
            };
            record.requested_at = Some("now".to_owned());
            world.apply_copy(record);
        }
        Chapter::Deleted => world.delete_copy(NAMESPACE, COPY),
    }
}

/// One controller, until there is nothing to do any more in this chapter.
async fn live(world: &World, id: &str, chapter: Chapter) {
    let (clock, alive, name) = (world.clone(), world.clone(), id.to_owned());
    let env = Env {
        clock: Arc::new(move || clock.now()),
        may_act: Arc::new(move || !alive.is_dead(&name)),
        lease_is_safe: Arc::new(|| true),
        scratch: None,
    };
    let records = world.records(id);
    let engine = Engine::new(env, Arc::new(records.clone()));
    for server in ["b", "a"] {
        let config = ServerConfig {
            created_at: Timestamp::UNIX_EPOCH,
            cordoned: false,
            limits: Limits::default(),
            interval: Duration::from_secs(300),
            address: format!("https://{server}"),
            peer_address: None,
            allow_unsafe_overrides: false,
            live_between_servers: true,
        };
        let connection = Arc::new(world.connect(id, server));
        let key = Key::new(NAMESPACE, server);
        engine
            .registry()
            .upsert(&key, config, connection, Some(berth_sim::CERTIFICATE.to_owned()));
        if server == "b" {
            // long enough to be listed, which the source is not at the first look
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }
    loop {
        let Some(record) = world.copy(NAMESPACE, COPY) else {
            return;
        };
        let said = ready(&record).to_owned();
        let pause = match engine.reconcile_copy(&records, record, &|_| {}).await {
            Ok(pass) if !said.is_empty() && said != "Progressing" && ready(&pass.record) == "Progressing" => {
                panic!("a controller that has just started took {said} back")
            }
            Ok(pass) if is_settled(&pass.record, chapter, world.now()) => return,
            Ok(pass) => pass
                .look_again
                .unwrap_or(Duration::from_secs(10))
                .min(Duration::from_secs(10)),
            Err(_) => Duration::from_secs(1),
        };
        tokio::time::sleep(pause).await;
    }
}

fn ready(record: &CopyRecord) -> &str {
    conditions::find(&record.status.conditions, conditions::READY).map_or("", |c| &c.reason)
}

fn is_settled(record: &CopyRecord, chapter: Chapter, now: Timestamp) -> bool {
    let answered = chapter == Chapter::First || record.status.last_handled_reconcile_at.as_deref() == Some("now");
    let rests = record.status.current.is_none() && !record.deleting && answered;
    let fresh = record.status.next_refresh.as_ref().is_some_and(|at| at.0 > now);
    rests
        && match ready(record) {
            "UpToDate" => fresh,
            "CopyWasUsed" => true,
            _ => false,
        }
}

/// Everything that is left, in one line each, without what differs from run to run.
fn state(world: &World) -> Vec<String> {
    let mut lines = Vec::new();
    for server in ["a", "b"] {
        for i in world.instances(server) {
            let of = i.config.contains_key(marks::COPY_OF);
            let data = world.copied_data(server, &i.at);
            let ours = |name: &String| name.starts_with("berth-");
            let snapshots: Vec<String> = world.snapshots(server, &i.at).into_iter().map(|s| s.name).collect();
            let own = snapshots.iter().filter(|n| ours(n)).count();
            let theirs: Vec<&String> = snapshots.iter().filter(|n| !ours(n)).collect();
            let unique = marks::is_unique_name(&i.at.name);
            let name = if unique { "berth-*" } else { i.at.name.as_str() };
            let guarded = i.devices.contains_key(marks::GUARD)
                || i.config.keys().any(|key| key.contains(marks::GUARD))
                || marks::role(&i).is_some();
            let autostart = i.config.get(marks::AUTOSTART);
            lines.push(format!(
                "{server} {name} {:?} copy={of} data={data:?} guarded={guarded} autostart={autostart:?} {theirs:?} own={own}",
                i.power
            ));
        }
    }
    if let Some(record) = world.copy(NAMESPACE, COPY) {
        lines.push(format!("record {} held={}", ready(&record), record.held));
    }
    lines
}

/// Counts cases and keeps those that went wrong.
#[derive(Default)]
struct Table {
    cases: usize,
    wrong: Vec<String>,
}

impl Table {
    fn case(&mut self, what: &str, report: &Report, wrong: Option<String>) {
        self.cases += 1;
        if let Some(why) = wrong {
            let details = [report.state.join("\n      "), report.log.join("\n      ")].join("\n      --\n      ");
            self.wrong.push(format!(
                "{what}: {why} ({}, {:?})\n      {details}",
                report.ended, report.breach
            ));
        }
    }

    fn finish(self, name: &str) {
        eprintln!("{name}: {} cases, {} wrong", self.cases, self.wrong.len());
        let titles: Vec<&str> = self.wrong.iter().filter_map(|w| w.lines().next()).take(60).collect();
        let first: Vec<&String> = self.wrong.iter().take(2).collect();
        assert!(self.wrong.is_empty(), "{}\n\n{first:#?}", titles.join("\n"));
    }
}

/// How a report differs from an undisturbed one in a way that no crash may make.
fn difference(undisturbed: &Report, report: &Report) -> Option<String> {
    if let Some(breach) = &report.breach {
        return Some(breach.clone());
    }
    if report.ended != "settled" {
        return Some(report.ended.clone());
    }
    // the snapshot of an attempt that was given up while the source was away ends by itself
    let plain = |lines: &[String]| -> Vec<String> {
        let cut = |l: &String| l.split(" own=").next().unwrap_or_default().to_owned();
        lines.iter().map(cut).collect()
    };
    (plain(&report.state) != plain(&undisturbed.state))
        .then(|| format!("{:#?} instead of {:#?}", report.state, undisturbed.state))
}

#[test]
fn an_undisturbed_copy_is_made_refreshed_and_leaves_nothing_but_itself() {
    for scenario in scenarios() {
        let report = play(&scenario, None);
        let text = format!("{}: {:#?}\n{}", scenario.name, report.state, report.log.join("\n"));
        assert_eq!((report.ended.as_str(), &report.breach), ("settled", &None), "{text}");
        let copies: Vec<&String> = report.state.iter().filter(|l| l.starts_with("b ")).collect();
        if scenario.deletes {
            assert!(copies.is_empty(), "{text}");
            continue;
        }
        let expected = format!("b {COPY} Stopped copy=true data=Some(3) guarded=false autostart=Some(\"false\") []");
        assert!(copies.len() == 1 && copies[0].starts_with(&expected), "{text}");
        let kept = usize::from(scenario.pool == "nvme");
        let source = report.state.iter().find(|l| l.starts_with("a ")).expect("the source");
        assert!(source.ends_with(&format!("own={kept}")), "{text}");
        assert!(
            report.state.contains(&"record UpToDate held=false".to_owned()),
            "{text}"
        );
    }
}

/// The scenarios that are disturbed in every way: all of them with `BERTH_TABLE=full`.
fn some() -> Vec<Scenario> {
    let full = std::env::var_os("BERTH_TABLE").is_some_and(|v| v == "full");
    scenarios().into_iter().take(if full { 3 } else { 1 }).collect()
}

/// The number of a write over all controllers.
fn nth(number: u64, fault: Fault) -> Disturbance {
    Arc::new(move |_, w| (w.number == number).then_some(fault))
}

#[test]
fn a_controller_that_dies_before_or_after_any_write_is_followed_by_one_that_ends_it_well() {
    let mut table = Table::default();
    for scenario in scenarios() {
        let undisturbed = play(&scenario, None);
        for number in 0..undisturbed.writes {
            for fault in [Fault::CrashBefore, Fault::CrashAfter] {
                let report = play(&scenario, Some(nth(number, fault)));
                let what = format!("{}, {fault:?} {number}", scenario.name);
                table.case(&what, &report, difference(&undisturbed, &report));
            }
        }
    }
    table.finish("copies, crashes");
}

#[test]
fn a_write_that_fails_or_arrives_late_harms_nothing() {
    let mut table = Table::default();
    for scenario in some() {
        let undisturbed = play(&scenario, None);
        let fail = |kind, carried_out| Fault::Fail { kind, carried_out };
        let faults = [
            fail(FailureKind::Unknown, true),
            fail(FailureKind::Unknown, false),
            fail(FailureKind::Unreachable, false),
            fail(FailureKind::Busy, false),
            fail(FailureKind::Changed, false),
            fail(FailureKind::Refused, false),
            Fault::Late(Caller::Dies),
            Fault::Late(Caller::IsToldUnknown),
        ];
        for number in 0..undisturbed.writes {
            for fault in faults {
                let report = play(&scenario, Some(nth(number, fault)));
                let what = format!("{}, {fault:?} {number}", scenario.name);
                table.case(&what, &report, difference(&undisturbed, &report));
            }
        }
    }
    table.finish("copies, failures");
}

/// Something that a person, a host or a daemon does, and whether the copy is a person's afterwards.
type Act = (&'static str, fn(&World), bool);

const ACTS: [Act; 8] = [
    ("a person starts the copy", |w| drop(w.start("b", &copy())), true),
    (
        "a person starts and stops the copy",
        |w| drop(w.start("b", &copy()).and_then(|()| w.stop("b", &copy()))),
        true,
    ),
    ("a person stops the source", |w| drop(w.stop("a", &source())), false),
    ("a person deletes the copy", |w| drop(w.delete("b", &copy())), false),
    ("the source's daemon restarts", |w| w.daemon_restart("a"), false),
    ("the target's daemon restarts", |w| w.daemon_restart("b"), false),
    (
        "the source is cut off for a minute",
        |w| w.cut_off_for("a", Duration::from_secs(60)),
        false,
    ),
    (
        "the target is cut off for a minute",
        |w| w.cut_off_for("b", Duration::from_secs(60)),
        false,
    ),
];

#[test]
fn whatever_people_hosts_and_daemons_do_at_any_write_no_copy_that_was_used_is_overwritten() {
    let mut table = Table::default();
    for scenario in some() {
        let undisturbed = play(&scenario, None);
        for (name, act, takes) in ACTS {
            for number in 0..undisturbed.writes {
                let disturbance = move |world: &World, w: &WriteInfo| {
                    if w.number == number {
                        act(world);
                    }
                    None
                };
                let report = play(&scenario, Some(Arc::new(disturbance)));
                let what = format!("{}, {name} at {number}", scenario.name);
                let whole = report.state.iter().any(|l| {
                    l.starts_with(&format!("b {COPY} ")) && l.contains("data=Some") && l.contains("guarded=false")
                });
                let used = takes && report.state.iter().any(|l| l.contains("CopyWasUsed"));
                let wrong = report.breach.clone().or_else(|| {
                    let right = report.ended == "settled" && (whole || used);
                    (!right).then(|| format!("{:#?}", report.state))
                });
                table.case(&what, &report, wrong);
            }
        }
    }
    table.finish("copies, interference");
}
