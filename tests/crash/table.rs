//! One case of the table: a move on a world of its own with its own virtual clock, disturbed in one way, and what is left
//! of it in the end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use berth_api::Method;
use berth_core::marks;
use berth_core::model::{Config, Instance};
use berth_sim::{Fault, World, WriteInfo};
use tokio::sync::Notify;

use crate::life::{End, live};
use crate::scenario::{FIRST, MOVE, NAMESPACE, Scenario};

/// What happens before a write: the test may change the world, and say what becomes of the write.
pub type Disturbance = Arc<dyn Fn(&World, &WriteInfo) -> Option<Fault> + Send + Sync>;

/// What is left when everything is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub outcome: String,
    /// Every instance, in one line each, without what differs from run to run.
    pub instances: Vec<String>,
    /// Requests to servers that had an effect, and how often.
    pub effects: BTreeMap<(String, &'static str), usize>,
    /// Writes of the first and of the second controller.
    pub writes: (u64, u64),
    pub breach: Option<String>,
    /// Whether the record says how long the guest stood still.
    pub measured: bool,
    pub log: Vec<String>,
    /// How often a crash may have transfers made again: a Warm move begins its rounds anew.
    pub repeats: usize,
}

impl Report {
    /// It ended as some move may end, no invariant was broken, and one complete copy is where people look for it.
    pub fn is_settled(&self) -> bool {
        let found = self
            .instances
            .iter()
            .any(|i| (i.contains("/web-1 ") || i.contains("/shop-1 ")) && i.contains("newest data"));
        let frozen = self.instances.iter().any(|i| i.contains(" Frozen "));
        self.has_ended() && found && !frozen && self.breach.is_none()
    }

    /// No temporary snapshot is left.
    pub fn is_tidy(&self) -> bool {
        !self.but_for_the_kept().iter().any(|i| i.contains("\"berth-"))
    }

    /// The instances but the kept source of a move before, which is whole.
    pub fn but_for_the_kept(&self) -> Vec<&String> {
        // as new as the other only if nobody wrote since
        let old = |i: &str| i.contains("old data") || i.contains(FIRST);
        let kept = |i: &&String| i.contains("retired") && i.contains(" Stopped ") && old(i);
        self.instances.iter().filter(|i| !kept(i)).collect()
    }

    /// It ended as some move may end, and nothing holds it any more.
    pub fn has_ended(&self) -> bool {
        matches!(
            self.outcome.as_str(),
            "Succeeded" | "Undone" | "Cancelled" | "NeedsAttention"
        )
    }

    /// How `other` differs from this undisturbed one in a way that a crash must not make. One more transfer is allowed; a live
    /// move whose outcome was lost may also stop or restore a guest once more.
    pub fn difference(&self, other: &Report, live: bool) -> Option<String> {
        if let Some(breach) = &other.breach {
            return Some(breach.clone());
        }
        if self.outcome != other.outcome {
            return Some(format!("{} instead of {}", other.outcome, self.outcome));
        }
        if self.instances != other.instances {
            return Some(format!("{:#?}\ninstead of {:#?}", other.instances, self.instances));
        }
        let verbs: BTreeSet<_> = self.effects.keys().chain(other.effects.keys()).collect();
        for effect in verbs {
            let of = |r: &Report| r.effects.get(effect).copied().unwrap_or_default();
            let more = match effect.1 {
                // a relay has two channels, a warm move several rounds
                "connect" => 2 * self.repeats,
                "offer" | "accept" | "remove" | "cancel" | "snapshot" | "remove-snapshot" => self.repeats,
                "back-up" | "drop-backup" | "import" => 1,
                "force-stop" | "patch" | "put" | "start" if live => 1,
                _ => 0,
            };
            if of(other) > of(self) + more {
                return Some(format!("{effect:?} {} times instead of {}", of(other), of(self)));
            }
        }
        None
    }
}

/// The cases of one test: counts them and keeps those that went wrong.
pub struct Table {
    name: &'static str,
    cases: usize,
    outcomes: BTreeMap<String, usize>,
    wrong: Vec<(String, String)>,
}

impl Table {
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            cases: 0,
            outcomes: BTreeMap::new(),
            wrong: Vec::new(),
        }
    }

    pub fn case(&mut self, what: &str, report: &Report, right: bool, expected: &str) {
        self.cases += 1;
        *self
            .outcomes
            .entry(report.outcome.chars().take(40).collect())
            .or_default() += 1;
        if !right {
            let Report {
                outcome,
                instances,
                breach,
                log,
                ..
            } = report;
            let (instances, log) = (instances.join("\n      "), log.join("\n      "));
            let details = format!("{outcome} {breach:?}\n      {instances}\n      {log}");
            self.wrong
                .push((format!("{what}: expected {expected}, got {outcome}"), details));
        }
    }

    /// Says how large the table is; fails if anything was wrong.
    pub fn finish(self) {
        let Self {
            name,
            cases,
            outcomes,
            wrong,
        } = self;
        eprintln!("{name}: {cases} cases {outcomes:?}, {} wrong", wrong.len());
        let all: Vec<&str> = wrong.iter().map(|(what, _)| what.as_str()).take(100).collect();
        let first: Vec<String> = wrong
            .iter()
            .take(3)
            .map(|(what, details)| format!("{what}\n    {details}"))
            .collect();
        assert!(wrong.is_empty(), "{}\n\n{}", all.join("\n"), first.join("\n\n"));
    }
}

/// How one case is run.
#[derive(Clone)]
pub struct Case {
    pub scenario: Scenario,
    pub disturbance: Option<Disturbance>,
    /// How long nobody leads after the first controller died.
    pub vacancy: Duration,
    /// Late requests that are still under way in the end are delivered then.
    pub deliver_at_end: bool,
}

impl Case {
    pub fn undisturbed(scenario: &Scenario) -> Self {
        Self {
            scenario: scenario.clone(),
            disturbance: None,
            vacancy: Duration::ZERO,
            deliver_at_end: false,
        }
    }

    pub fn disturbed(
        scenario: &Scenario,
        disturbance: impl Fn(&World, &WriteInfo) -> Option<Fault> + Send + Sync + 'static,
    ) -> Self {
        Self {
            disturbance: Some(Arc::new(disturbance)),
            ..Self::undisturbed(scenario)
        }
    }

    /// Runs the move to its end, on a clock that does not wait.
    pub fn run(&self) -> Report {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build();
        let runtime = runtime.expect("a runtime");
        runtime.block_on(self.play())
    }

    async fn play(&self) -> Report {
        let (world, _) = self.scenario.begin().await;
        let before = world.instance("a", &self.scenario.at()).expect("the instance was made");
        let interrupt = Arc::new(Notify::new());
        self.set_hook(&world, interrupt.clone());
        let mut end = live(&world, "c1", &interrupt).await;
        if matches!(end, End::Died) {
            tokio::time::sleep(self.vacancy).await;
            end = live(&world, "c2", &interrupt).await;
        }
        world.clear_hook();
        world.settled().await;
        if self.deliver_at_end {
            for late in world.late() {
                // a refusal is what is hoped for
                let _ = world.deliver_late(late.id);
            }
            world.settled().await;
            // somebody looks once more, as after every change
            end = live(&world, "c3", &interrupt).await;
        }
        tokio::time::sleep(Duration::from_secs(60)).await;
        let record = world.record(NAMESPACE, MOVE);
        let measured = record.is_some_and(|r| r.status.downtime.is_some());
        let outcome = match end {
            End::Stuck(why) => format!("stuck: {why}"),
            End::Died => "the second controller died".to_owned(),
            End::Finished => {
                let record = world.record(NAMESPACE, MOVE).expect("the record is there");
                record.status.outcome.unwrap_or_default()
            }
        };
        Report {
            outcome,
            instances: ["a", "b"].iter().flat_map(|s| lines(&world, s, &before)).collect(),
            effects: effects(&world),
            writes: (world.writes("c1"), world.writes("c2")),
            measured,
            breach: world.check().err().map(|b| format!("{}: {}", b.invariant, b.message)),
            log: world.log().iter().map(ToString::to_string).collect(),
            repeats: if self.scenario.method == Method::Warm { 4 } else { 1 },
        }
    }

    fn set_hook(&self, world: &World, interrupt: Arc<Notify>) {
        let (cancel, disturbance) = (self.scenario.cancel_before, self.disturbance.clone());
        // a guest that is copied while it runs writes all the time
        let busy = (self.scenario.method == Method::Warm).then(|| self.scenario.at());
        world.set_hook(move |world, write| {
            if let Some(at) = &busy {
                world.write_data("a", at);
            }
            if cancel == Some(write.nth) && write.controller == "c1" {
                world.cancel_move(NAMESPACE, MOVE);
                interrupt.notify_one();
            }
            disturbance.as_ref().and_then(|d| d(world, write))
        });
    }
}

fn effects(world: &World) -> BTreeMap<(String, &'static str), usize> {
    let mut counted = BTreeMap::new();
    for effect in world.effects() {
        *counted.entry(effect).or_default() += 1;
    }
    counted
}

fn lines(world: &World, server: &str, before: &Instance) -> Vec<String> {
    let line = |i: Instance| {
        let newest = i.uuid().and_then(|u| world.newest(u));
        let data = match world.data(server, &i.at) {
            Some(data) if Some(data) == newest => "newest data",
            Some(_) => "old data",
            None => "incomplete",
        };
        let name = if marks::is_unique_name(&i.at.name) {
            "berth-*"
        } else {
            &i.at.name
        };
        let id = |i: &Instance| i.config.get(marks::CLOUD_INIT_ID).cloned();
        let cloud_init = if id(&i) == id(before) { "same id" } else { "new id" };
        let addresses = |c: &Config| {
            c.iter()
                .filter(|(k, _)| k.ends_with(".hwaddr"))
                .map(|(_, v)| v.clone())
                .collect::<Vec<_>>()
        };
        let same_address = addresses(&i.config) == addresses(&before.config);
        let plain: Config = i
            .config
            .into_iter()
            .filter(|(k, _)| !k.starts_with("volatile."))
            .collect();
        let snapshots: Vec<String> = world.snapshots(server, &i.at).into_iter().map(|s| s.name).collect();
        format!(
            "{server} {}/{name} {:?} {:?} pool={:?} {data} {cloud_init} same-address={same_address} ephemeral={} {plain:?} {:?} {:?} {snapshots:?}",
            i.at.project,
            i.power,
            i.member,
            i.expanded_devices.get("root").and_then(|d| d.get("pool")),
            i.ephemeral,
            i.devices,
            i.profiles,
        )
    };
    world.instances(server).into_iter().map(line).collect()
}
