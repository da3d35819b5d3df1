//! The moves that the crash table is made of: two simulated servers (or a cluster), one instance, and the record of a move.

use std::time::Duration;

use berth_api::moves::{InstanceMoveSpec, InstanceMoveStatus, MoveEnd};
use berth_api::placement::{Live, Warm};
use berth_api::{GoDuration, GuardKind, GuardPair, InstanceType, Method, Overrides, Power, Snapshots, Stop, Transfer};
use berth_core::model::{InstanceRef, Product};
use berth_core::records::{Record, Records};
use berth_sim::{Guest, InstanceOptions, Options, Timing, World};

pub const NAMESPACE: &str = "shop";
pub const MOVE: &str = "web-1-x7k2p";
/// The move before it, where its source was kept.
pub const FIRST: &str = "web-1-first";

/// The place that is asked for on the same server.
#[derive(Clone, Copy)]
pub struct Inside {
    pub member: &'static str,
    pub pool: &'static str,
    pub project: &'static str,
    pub name: &'static str,
}

impl Inside {
    /// Where every instance of a cluster begins here.
    const HERE: Inside = Inside {
        member: "m1",
        pool: "default",
        project: "default",
        name: "web-1",
    };
}

/// One kind of move.
#[derive(Clone)]
pub struct Scenario {
    pub name: String,
    pub product: Product,
    pub instance: InstanceOptions,
    pub guard: GuardPair,
    pub method: Method,
    pub transfer: Transfer,
    pub power_after: Power,
    /// The project, which is restricted unless it is `default`.
    pub project: String,
    /// Inside a cluster: what is asked for.
    pub inside: Option<Inside>,
    /// Before which write of the first controller the move is cancelled.
    pub cancel_before: Option<u64>,
    pub stop: Stop,
    pub overrides: Overrides,
    /// Servers that take seconds for what others do in milliseconds.
    pub slow: bool,
    /// A record is written later than a request that is sent with it arrives.
    pub slow_records: bool,
    /// The pools of the source and of the target.
    pub pools: (&'static str, &'static str),
    /// Limits of a Warm move.
    pub warm: Warm,
    /// Servers that do not reach each other.
    pub apart: bool,
    /// Servers that can stream a backup.
    pub streams: bool,
    /// Servers that have CRIU.
    pub criu: bool,
    /// Limits of a Live move.
    pub live: Option<Live>,
    /// Whether the source is kept for an hour, and then deleted.
    pub keeps: bool,
    /// The instance came from the target, where its source was kept.
    pub back: Option<Back>,
}

/// What is done with the kept source on the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Back {
    /// It is brought up to date.
    Refreshed,
    /// It makes room.
    MakesRoom,
}

impl Scenario {
    /// A running container is pulled from `a` to `b`.
    pub fn pull(product: Product) -> Self {
        Self {
            name: format!("{} pull, running", product.as_str()),
            product,
            instance: InstanceOptions::default().snapshot("s0").key("user.role", "shop"),
            guard: pair(GuardKind::Device),
            method: Method::Cold,
            transfer: Transfer::Pull,
            power_after: Power::Running,
            project: "default".to_owned(),
            inside: None,
            cancel_before: None,
            stop: Stop {
                timeout: GoDuration::from_secs(20),
                force: false,
            },
            overrides: Overrides::default(),
            slow: false,
            slow_records: false,
            pools: ("default", "nvme"),
            warm: Warm::default(),
            apart: false,
            streams: false,
            criu: false,
            live: None,
            keeps: false,
            back: None,
        }
    }

    /// All that are looked at undisturbed, and then disturbed.
    pub fn all() -> Vec<Self> {
        let mut all = Self::plain();
        all.extend(Self::restricted());
        all.extend(Self::inside());
        all.extend(Self::warm());
        all.extend(Self::live());
        all.extend(Self::criu());
        all.extend(Self::kept());
        let slow_records = |s: &Self| Self {
            name: format!("{}, slow records", s.name),
            slow_records: true,
            ..s.clone()
        };
        let with_slow_records: Vec<Self> = all.iter().map(slow_records).collect();
        all.extend(with_slow_records);
        if let Ok(words) = std::env::var("BERTH_SCENARIO") {
            all.retain(|s| s.name.contains(&words));
        }
        all
    }

    fn plain() -> Vec<Self> {
        let (incus, lxd) = (Self::pull(Product::Incus), Self::pull(Product::Lxd));
        let slow = |s: &Self| s.with("pull, slow servers", |s| s.slow = true);
        let push = |s: &Self| s.with("push, running", |s| s.transfer = Transfer::Push);
        let backup = |s: &Self| {
            s.with("backup, running", |s| {
                s.transfer = Transfer::Backup;
                s.apart = true;
            })
        };
        let relay = |s: &Self| {
            s.with("relay, running", |s| {
                s.transfer = Transfer::Relay;
                s.apart = true;
            })
        };
        vec![
            incus.clone(),
            lxd.clone(),
            slow(&incus),
            slow(&lxd),
            push(&incus),
            push(&lxd),
            relay(&incus),
            relay(&lxd),
            backup(&incus),
            backup(&lxd),
            backup(&incus).with("backup, streamed", |s| s.streams = true),
            incus.with("pull, virtual machine", |s| {
                s.instance = InstanceOptions::vm().snapshot("s0");
            }),
            incus.with("pull, stopped", Self::stopped),
            incus.with("pull, stopped, to be started", |s| s.instance.running = false),
            incus.with("pull, running, to be stopped", |s| s.power_after = Power::Stopped),
            incus.with("pull, killed", |s| {
                s.instance.guest = Guest::StopsAfter(Duration::from_secs(600));
                s.stop.force = true;
            }),
            incus.with("pull, ephemeral, protected, autostart", |s| s.instance = protected()),
        ]
    }

    /// The guest goes down a minute after it was asked, when nobody waits for it any more.
    pub fn stubborn() -> Vec<Self> {
        let stubborn = |s: &mut Self| s.instance.guest = Guest::StopsAfter(Duration::from_secs(60));
        [Product::Incus, Product::Lxd]
            .map(|p| Self::pull(p).with("pull, stubborn guest", stubborn))
            .into()
    }

    /// A move that forgot the guard.
    pub fn unguarded() -> Self {
        Self::pull(Product::Incus).with("pull, no guard", |s| s.guard = pair(GuardKind::None))
    }

    /// The servers refuse the guard device there.
    fn restricted() -> Vec<Self> {
        let lock = |s: &mut Self| {
            s.project = "locked".to_owned();
            s.guard = pair(GuardKind::Name);
        };
        vec![
            Self::pull(Product::Incus).with("pull, restricted project", lock),
            Self::pull(Product::Lxd).with("pull, restricted project, stopped", |s| {
                lock(s);
                s.stopped();
            }),
        ]
    }

    fn inside() -> Vec<Self> {
        let (incus, lxd) = (Self::pull(Product::Incus), Self::pull(Product::Lxd));
        let inside = |s: &mut Self, place| {
            s.inside = Some(place);
            s.transfer = Transfer::Internal;
            s.guard = pair(GuardKind::None);
        };
        let member = Inside {
            member: "m2",
            ..Inside::HERE
        };
        let pool = Inside {
            pool: "nvme",
            ..Inside::HERE
        };
        let all = Inside {
            member: "m2",
            pool: "nvme",
            project: "shop",
            name: "shop-1",
        };
        vec![
            incus.with("inside, member", |s| inside(s, member)),
            lxd.with("inside, member", |s| inside(s, member)),
            incus.with("inside, pool", |s| inside(s, pool)),
            lxd.with("inside, pool", |s| inside(s, pool)),
            incus.with("inside, all at once", |s| inside(s, all)),
            lxd.with("inside, one after the other", |s| inside(s, all)),
            lxd.with("inside, member, stopped", |s| {
                inside(s, member);
                s.stopped();
            }),
            incus.with("inside, member, overrides", |s| {
                inside(s, member);
                s.overrides = overrides();
            }),
            // the record of a restart for a configuration that needs one
            incus.with("restart for overrides", |s| {
                inside(s, Inside::HERE);
                s.overrides = overrides();
            }),
            lxd.with("restart for overrides", |s| {
                inside(s, Inside::HERE);
                s.overrides = overrides();
            }),
        ]
    }

    /// Copied while they run: between pools that send differences, between others, and from a pool that freezes guests.
    fn warm() -> Vec<Self> {
        let (incus, lxd) = (Self::pull(Product::Incus), Self::pull(Product::Lxd));
        let warm = |s: &mut Self, from, to| {
            s.method = Method::Warm;
            s.pools = (from, to);
            if from != "default" {
                s.instance = s
                    .instance
                    .clone()
                    .device("root", &[("type", "disk"), ("path", "/"), ("pool", from)]);
            }
        };
        let rounds = |s: &mut Self| {
            warm(s, "default", "default");
            s.warm = Warm {
                max_rounds: 3,
                downtime_goal: GoDuration::ZERO,
            };
        };
        vec![
            incus.with("warm, running", |s| warm(s, "default", "default")),
            incus.with("warm, three rounds", rounds),
            lxd.with("warm, three rounds", rounds),
            incus.with("warm, other driver", |s| warm(s, "default", "nvme")),
            incus.with("warm, from a snapshot of the user's", |s| warm(s, "plain", "plain")),
            lxd.with("warm, from a snapshot of ours", |s| {
                s.instance.snapshots.clear();
                warm(s, "plain", "default");
            }),
            incus.with("warm, push, virtual machine, slow servers", |s| {
                s.instance = InstanceOptions::vm().snapshot("s0");
                s.transfer = Transfer::Push;
                s.slow = true;
                warm(s, "default", "default");
            }),
        ]
    }

    /// The running state moves, too. LXD 5 saves it to the disk and resumes it on the target.
    fn live() -> Vec<Self> {
        let (incus, lxd) = (Self::pull(Product::Incus), Self::pull(Product::Lxd));
        let live = |s: &mut Self| {
            s.method = Method::Live;
            s.instance = InstanceOptions::vm().snapshot("s0").key("migration.stateful", "true");
            s.guard.target = GuardKind::None;
        };
        vec![
            incus.with("live pull", live),
            incus.with("live push", |s| {
                live(s);
                s.transfer = Transfer::Push;
            }),
            incus.with("live pull, slow servers", |s| {
                live(s);
                s.slow = true;
            }),
            incus.with("live inside, member", |s| {
                live(s);
                s.inside = Some(Inside {
                    member: "m2",
                    ..Inside::HERE
                });
                s.transfer = Transfer::Internal;
                s.guard = pair(GuardKind::None);
            }),
            lxd.with("saved state, pull", live),
        ]
    }

    /// The processes of a container move.
    fn criu() -> Vec<Self> {
        let incus = Self::pull(Product::Incus);
        let criu = |s: &mut Self| {
            s.method = Method::Live;
            s.criu = true;
            s.guard.target = GuardKind::None;
        };
        vec![
            incus.with("criu pull", criu),
            incus.with("criu push, memory in rounds", |s| {
                criu(s);
                s.transfer = Transfer::Push;
                s.instance = s.instance.clone().key("migration.incremental.memory.goal", "50");
                s.live = Some(Live {
                    incremental_memory: true,
                    ..Live::default()
                });
            }),
            incus.with("criu pull, slow servers", |s| {
                criu(s);
                s.slow = true;
            }),
        ]
    }

    /// The container is restored with files that belong to nobody.
    pub fn broken() -> Vec<Self> {
        let mut all = Self::criu();
        for s in &mut all {
            s.name.push_str(", files of nobody");
            s.instance.breaks = true;
        }
        all
    }

    pub(super) fn stopped(&mut self) {
        self.instance.running = false;
        self.power_after = Power::Stopped;
    }

    pub(super) fn with(&self, what: &str, change: impl FnOnce(&mut Self)) -> Self {
        let mut other = self.clone();
        other.name = format!("{} {what}", self.product.as_str());
        change(&mut other);
        other
    }

    pub fn at(&self) -> InstanceRef {
        InstanceRef::new(&self.project, "web-1")
    }

    /// The same, cancelled before that write of the first controller.
    pub fn cancelled_before(&self, nth: u64) -> Self {
        let name = format!("{}, cancelled before write {nth}", self.name);
        Self {
            name,
            cancel_before: Some(nth),
            ..self.clone()
        }
    }

    /// The server where the instance goes.
    pub fn target(&self) -> &'static str {
        if self.inside.is_some() { "a" } else { "b" }
    }

    /// A world in which the move has been accepted and nothing has been done.
    pub async fn begin(&self) -> (World, Record) {
        let world = World::new();
        if self.slow_records {
            world.slow_records(Duration::from_millis(8));
        }
        let options = || {
            let members: &[&str] = if self.inside.is_some() { &["m1", "m2"] } else { &[] };
            let mut options = Options::cluster(members)
                .pool("nvme", "zfs")
                .pool("plain", "dir")
                .project("shop", &[]);
            options
                .without
                .extend((!self.streams).then(|| "direct_backup".to_owned()));
            options.criu = self.criu;
            if self.slow {
                options = options.timing(slow());
            }
            if self.project == "default" {
                options
            } else {
                options.restricted_project(&self.project)
            }
        };
        world.add_server("a", self.product, options());
        world.add_server("b", self.product, options());
        if self.apart {
            world.separate("a", "b");
        }
        if self.back.is_some() {
            self.came_from_the_target(&world).await;
        } else {
            world.add_instance("a", &self.at(), self.instance.clone());
        }
        let made = world.records("setup").create(&self.record(&world)).await;
        (world, made.expect("a new record"))
    }

    fn record(&self, world: &World) -> Record {
        let mut record = self.record_between(world, ("a", "b"));
        record.spec.onto = self.onto(world);
        if self.back.is_some() {
            record.spec.attempt = 2;
        }
        record
    }

    pub(super) fn record_between(&self, world: &World, (from_server, to_server): (&str, &str)) -> Record {
        let i = world.instance(from_server, &self.at()).expect("the instance was made");
        let end = |server: &str, member: Option<&str>, pool: &str| MoveEnd {
            server: server.to_owned(),
            fingerprint: world.fingerprint(server),
            member: member.map(str::to_owned),
            group: None,
            project: self.project.clone(),
            pool: Some(pool.to_owned()),
            name: "web-1".to_owned(),
            uuid: None,
        };
        let from = MoveEnd {
            uuid: i.uuid().map(str::to_owned),
            ..end(from_server, i.member.as_deref(), self.pools.0)
        };
        let to = match self.inside {
            Some(inside) => MoveEnd {
                project: inside.project.to_owned(),
                name: inside.name.to_owned(),
                ..end("a", Some(inside.member), inside.pool)
            },
            None => end(to_server, None, self.pools.1),
        };
        Record {
            namespace: NAMESPACE.to_owned(),
            name: MOVE.to_owned(),
            version: String::new(),
            deleting: false,
            spec: InstanceMoveSpec {
                placement: "web-1".to_owned(),
                placement_uid: "uid-1".to_owned(),
                attempt: 1,
                generation: Some(1),
                plan_digest: "sha256:0".to_owned(),
                method: self.method,
                guard: self.guard,
                transfer: self.transfer,
                instance_type: match i.kind {
                    berth_core::model::InstanceKind::Container => InstanceType::Container,
                    berth_core::model::InstanceKind::VirtualMachine => InstanceType::VirtualMachine,
                },
                from,
                to,
                power_after: self.power_after,
                snapshots: Snapshots::Include,
                stop: self.stop,
                estimate: None,
                target_free: None,
                inputs: None,
                warm: Some(self.warm),
                live: self.live,
                timeout: None,
                overrides: self.overrides.clone(),
                dropped: Vec::new(),
                keep_source: GoDuration::from_secs(if self.keeps { 3600 } else { 0 }),
                onto: None,
                cancel: false,
            },
            status: InstanceMoveStatus::default(),
        }
    }
}

pub(super) fn pair(guard: GuardKind) -> GuardPair {
    GuardPair {
        source: guard,
        target: guard,
    }
}

fn protected() -> InstanceOptions {
    let options = InstanceOptions {
        ephemeral: true,
        ..InstanceOptions::default()
    };
    options
        .key("security.protection.delete", "true")
        .key("boot.autostart", "true")
}

fn overrides() -> Overrides {
    Overrides {
        config: [("security.nesting".to_owned(), "true".to_owned())].into(),
        remove_config: vec!["user.role".to_owned()],
        ..Overrides::default()
    }
}

fn slow() -> Timing {
    let seconds = Duration::from_secs;
    Timing {
        request: Duration::from_millis(400),
        start: seconds(3),
        stop: seconds(4),
        small: seconds(3),
        transfer: seconds(8),
        tail: seconds(2),
        ..Timing::of(Product::Incus)
    }
}
