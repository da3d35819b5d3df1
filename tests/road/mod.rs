//! A road between two servers with a proxy at each end, on which every request of a cold move can be caught.
//!
//! Also what must hold of an instance after any disturbance. Nothing here knows how the product works inside: requests are
//! told apart by what is on the wire.
#![allow(dead_code, reason = "each suite uses its part")]

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use berth_tests::{Fate, NewInstance, Placement, Proxy, SOON, Seen, Server, Test, wait_for};
use serde_json::{Value, json};

/// The writing requests of a cold move between two servers, in their order, and one read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// Marks on the source.
    Mark,
    /// Graceful stop of the source.
    Stop,
    /// The source's guard.
    Guard,
    /// The source offers its data.
    Offer,
    /// The target makes the copy.
    Create,
    /// The copy takes its real name.
    Name,
    /// The copy becomes the owner and loses its guard.
    Own,
    /// The owner is started.
    Start,
    /// The former source is marked as retired, if it is protected from deletion or stays.
    Retire,
    /// It is renamed.
    Rename,
    /// It is deleted.
    Delete,
    /// The owner's marks are taken off.
    Unmark,
    /// A temporary snapshot is taken (warm moves).
    Snapshot,
    /// The copy is brought up to date (warm moves).
    Refresh,
    /// A temporary snapshot is deleted (warm moves).
    RemoveSnapshot,
}

impl Call {
    /// All that change something.
    pub const WRITES: [Call; 12] = [
        Call::Mark,
        Call::Stop,
        Call::Guard,
        Call::Offer,
        Call::Create,
        Call::Name,
        Call::Own,
        Call::Start,
        Call::Retire,
        Call::Rename,
        Call::Delete,
        Call::Unmark,
    ];

    /// Those that only a warm move makes, and the copy that it begins with.
    pub const WARM: [Call; 4] = [Call::Snapshot, Call::Create, Call::Refresh, Call::RemoveSnapshot];

    /// Which request of a move this is.
    pub fn of(seen: &Seen) -> Option<Call> {
        let body: Value = serde_json::from_str(&seen.body).unwrap_or_default();
        let path = seen.path.strip_prefix("/1.0/instances")?;
        let power = path.ends_with("/state");
        let config = |key: &str| body["config"][key].as_str();
        match (seen.method.as_str(), power) {
            ("PUT", true) if body["action"] == "stop" => Some(Call::Stop),
            ("PUT", true) if body["action"] == "start" => Some(Call::Start),
            ("PUT", false) => Some(Call::Own),
            ("DELETE", _) if path.contains("/snapshots/") => Some(Call::RemoveSnapshot),
            ("DELETE", _) => Some(Call::Delete),
            ("POST", _) if path.ends_with("/snapshots") => Some(Call::Snapshot),
            ("POST", _) if path.is_empty() && body["source"]["refresh"] == true => Some(Call::Refresh),
            ("POST", _) if path.is_empty() => Some(Call::Create),
            ("POST", _) if body["migration"] == true => Some(Call::Offer),
            ("POST", _) if body["name"].as_str().is_some_and(|n| n.starts_with("berth-")) => Some(Call::Rename),
            ("POST", _) => Some(Call::Name),
            ("PATCH", _) if config("user.berth.role") == Some("source") => Some(Call::Mark),
            ("PATCH", _) if config("user.berth.role") == Some("retired") => Some(Call::Retire),
            ("PATCH", _) if config("user.berth.move") == Some("") => Some(Call::Unmark),
            ("PATCH", _) if body["devices"].get("berth-guard").is_some() => Some(Call::Guard),
            _ => None,
        }
    }

    /// Whether it goes to the server where the instance shall be.
    pub fn is_for_target(self) -> bool {
        match self {
            Call::Create | Call::Name | Call::Own | Call::Start | Call::Unmark => true,
            Call::Refresh | Call::RemoveSnapshot => true,
            Call::Snapshot => false,
            Call::Mark | Call::Stop | Call::Guard | Call::Offer | Call::Retire | Call::Rename | Call::Delete => false,
        }
    }

    /// In a sentence: "killed at …".
    pub fn words(self) -> &'static str {
        match self {
            Call::Mark => "the mark",
            Call::Stop => "the stop",
            Call::Guard => "the guard",
            Call::Offer => "the offer",
            Call::Create => "the copy",
            Call::Name => "the name",
            Call::Own => "the change of owner",
            Call::Start => "the start",
            Call::Retire => "the retirement",
            Call::Rename => "the rename",
            Call::Delete => "the deletion",
            Call::Unmark => "the unmarking",
            Call::Snapshot => "the snapshot",
            Call::Refresh => "the refresh",
            Call::RemoveSnapshot => "the end of a snapshot",
        }
    }
}

/// What to catch, and what was caught.
#[derive(Default)]
struct Net {
    wanted: Vec<(Call, String)>,
    caught: Vec<(Call, String)>,
}

impl Net {
    fn fate(&mut self, seen: &Seen) -> Fate {
        let about = |name: &String| seen.path.contains(name.as_str()) || seen.body.contains(name.as_str());
        let Some(at) = self.wanted.iter().position(|(_, name)| about(name)) else {
            return Fate::Pass;
        };
        let (call, name) = self.wanted[at].clone();
        let here = Call::of(seen) == Some(call);
        if !here {
            return Fate::Pass;
        }
        self.wanted.remove(at);
        self.caught.push((call, name));
        Fate::Hold
    }
}

/// Two servers with a proxy each, made known to the controller under their lab names.
pub struct Road {
    ends: [(&'static Server, Proxy); 2],
    net: Arc<Mutex<Net>>,
}

impl Road {
    /// Between these two; data go directly, only what the controller says goes through the proxies.
    pub async fn between(test: &Test, one: &str, other: &str) -> Road {
        let lab = test.lab();
        test.add_client_secret("berth-client").await;
        let net = Arc::new(Mutex::new(Net::default()));
        let mut ends = Vec::new();
        for name in [one, other] {
            let server = lab.server(name);
            let proxy = Proxy::start(lab, server).await;
            let spec = json!({
                "addresses": [proxy.url()], "peerAddress": server.url, "limits": {"incoming": 20, "outgoing": 20},
            });
            test.add_server(name, server, spec).await;
            ends.push((server, proxy));
        }
        let ends = ends.try_into().unwrap_or_else(|_| unreachable!("two ends were made"));
        Road { ends, net }
    }

    fn net(&self) -> MutexGuard<'_, Net> {
        self.net.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the first such request about each of these instances is held; all others pass.
    pub fn catch(&self, wanted: &[(Call, &str)]) {
        *self.net() = Net {
            wanted: wanted.iter().map(|(call, name)| (*call, (*name).to_owned())).collect(),
            ..Net::default()
        };
        for (_, proxy) in &self.ends {
            let net = Arc::clone(&self.net);
            proxy.rule(move |seen| net.lock().unwrap_or_else(PoisonError::into_inner).fate(seen));
        }
    }

    /// Waits until everything that was asked for is held.
    pub async fn caught(&self) {
        wait_for("all requests to be caught", SOON, || async {
            let open = self.net().wanted.clone();
            if open.is_empty() {
                Ok(())
            } else {
                Err(format!("not caught yet: {open:?}"))
            }
        })
        .await;
    }

    /// Sends each of them to `to` and waits until it is held at its own request; those that get farthest go first, so that
    /// none is held for long.
    pub async fn hold_each(&self, test: &Test, calls: &[Call], subjects: &[Subject], to: &str) {
        let names = subjects.iter().map(|s| s.name.as_str());
        let wanted: Vec<(Call, &str)> = calls.iter().copied().zip(names).collect();
        self.catch(&wanted);
        for part in wanted.rchunks(4) {
            for (_, name) in part {
                test.retarget(name, json!({"server": to})).await;
            }
            wait_for("these to be caught", SOON, || async {
                let open: Vec<_> = self
                    .net()
                    .wanted
                    .iter()
                    .filter(|w| part.iter().any(|p| p.1 == w.1))
                    .cloned()
                    .collect();
                if open.is_empty() {
                    Ok(())
                } else {
                    Err(format!("not caught yet: {open:?}"))
                }
            })
            .await;
        }
    }

    /// Catches nothing more; what is held stays held.
    pub fn pass(&self) {
        for (_, proxy) in &self.ends {
            proxy.rule(|_| Fate::Pass);
        }
    }

    /// Delivers what is held at both ends.
    pub async fn release(&self) {
        for (_, proxy) in &self.ends {
            proxy.release().await;
        }
    }

    /// Delivers what is held at this end; all passes there from now on.
    pub async fn release_at(&self, server: &str) {
        for (end, proxy) in &self.ends {
            if end.name == server {
                proxy.release().await;
            }
        }
    }

    /// How many of these requests about an instance there were at either end.
    pub fn count(&self, call: Call, name: &str) -> usize {
        let such = |seen: &Seen| Call::of(seen) == Some(call) && (seen.path.contains(name) || seen.body.contains(name));
        self.ends.iter().map(|(_, proxy)| proxy.count(such)).sum()
    }

    /// The proxies.
    pub fn proxies(&self) -> impl Iterator<Item = &Proxy> {
        self.ends.iter().map(|(_, proxy)| proxy)
    }

    fn servers(&self) -> [&'static Server; 2] {
        [self.ends[0].0, self.ends[1].0]
    }

    /// Copies of an instance on both servers, by its uuid: server, name, status.
    pub async fn copies(&self, uuid: &Value) -> Vec<(&'static Server, String, String)> {
        let mut found = Vec::new();
        for server in self.servers() {
            for instance in server.instances().await.unwrap_or_default() {
                if instance["config"]["volatile.uuid"] == *uuid {
                    let text = |key: &str| instance[key].as_str().unwrap_or_default().to_owned();
                    found.push((server, text("name"), text("status")));
                }
            }
        }
        found
    }
}

/// An instance as it was before it was moved.
#[derive(Clone)]
pub struct Subject {
    /// Its name, and that of its placement.
    pub name: String,
    /// Its `volatile.uuid`.
    pub uuid: Value,
    cloud_init: Value,
    checksum: Option<String>,
    counter: u64,
}

impl Subject {
    /// Checksum of its data.
    pub fn checksum(&self) -> Option<String> {
        self.checksum.clone()
    }
}

/// Makes a running instance with data, and a placement that leaves it where it is.
pub async fn subject(test: &Test, on: &str, name: &str, new: &NewInstance) -> Subject {
    let server = test.lab().server(on);
    let name = test.unique(name);
    server.create(&name, new).await;
    // the requests that these suites catch are those of a cold move
    test.place(&Placement::new(&name, on).with(json!({"methods": ["Cold"]})))
        .await;
    known(server, &name).await
}

/// What is to be remembered of an instance.
pub async fn known(server: &Server, name: &str) -> Subject {
    let instance = server.instance(name).await.unwrap_or_else(|| panic!("{name} exists"));
    Subject {
        name: name.to_owned(),
        uuid: instance["config"]["volatile.uuid"].clone(),
        cloud_init: instance["config"]["volatile.cloud-init.instance-id"].clone(),
        checksum: server.checksum(name, "/root/data").await,
        counter: server.counter(name).await,
    }
}

/// A container with some data.
pub fn with_data(pool: &str) -> NewInstance {
    NewInstance {
        megabytes: 1,
        ..NewInstance::on_pool(pool)
    }
}

/// Placed on `server`, one copy in all, running, nothing changed or left: that is how every move must end.
pub async fn intact(test: &Test, subject: &Subject, server: &str, boots: RangeInclusive<usize>) {
    let Subject { name, .. } = subject;
    test.wait_in_place(name, server, SOON).await;
    let here = test.lab().server(server);
    here.wait_counting(name).await;
    settled(test, name, server).await;
    let instance = here.instance(name).await.unwrap_or_else(|| panic!("{name} arrived"));
    let config = &instance["config"];
    assert_eq!(config["volatile.uuid"], subject.uuid, "{name}: the same identity");
    assert_eq!(
        config["volatile.cloud-init.instance-id"], subject.cloud_init,
        "{name}: cloud-init does not run again"
    );
    assert_eq!(
        here.checksum(name, "/root/data").await,
        subject.checksum,
        "{name}: the same data"
    );
    assert!(
        here.counter(name).await >= subject.counter,
        "{name}: its counter went on"
    );
    let keys = config.as_object().cloned().unwrap_or_default();
    assert!(
        !keys.keys().any(|key| key.contains("berth")),
        "{name}: marks are left: {keys:?}"
    );
    assert_eq!(keys.get("boot.autostart"), None, "{name}: boot.autostart is as before");
    assert!(
        instance["devices"].get("berth-guard").is_none(),
        "{name}: the guard is left"
    );
    let booted = here.boots(name).await;
    assert!(boots.contains(&booted), "{name}: booted {booted} times, not {boots:?}");
}

/// Waits until nothing but the one instance is left, on any server and in Kubernetes.
async fn settled(test: &Test, name: &str, server: &str) {
    wait_for(&format!("nothing to be left of the moves of {name}"), SOON, || async {
        let mut seen = Vec::new();
        for entrance in test.lab().entrances() {
            for instance in entrance.instances().await.map_err(|error| error.to_string())? {
                let text = |key: &str| instance[key].as_str().unwrap_or_default().to_owned();
                if text("name").contains(name) {
                    seen.push((entrance.name.clone(), text("name"), text("status")));
                }
            }
        }
        if seen != [(server.to_owned(), name.to_owned(), "Running".to_owned())] {
            return Err(format!("{seen:?}"));
        }
        let moves = test.moves(name).await;
        let held: Vec<&Value> = moves
            .iter()
            .filter(|m| m["metadata"].get("finalizers").is_some())
            .collect();
        if held.is_empty() {
            Ok(())
        } else {
            Err(format!("finalizers are left: {held:?}"))
        }
    })
    .await;
}

/// Watches, until it is ended, that no two copies of an instance run at the same time.
pub struct Watch {
    task: tokio::task::JoinHandle<()>,
    broken: Arc<Mutex<Option<String>>>,
}

impl Watch {
    /// Begins.
    pub fn begin(road: &Road, subjects: &[Subject]) -> Watch {
        let broken = Arc::new(Mutex::new(None));
        let (servers, kept, subjects) = (road.servers(), Arc::clone(&broken), subjects.to_vec());
        let task = tokio::spawn(async move {
            loop {
                if let Some(twice) = runs_twice(servers, &subjects).await {
                    kept.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(twice);
                }
                // a pause, whatever the look took: several tests watch, and a daemon that only lists instances does nothing else
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        });
        Watch { task, broken }
    }

    /// Ends, and fails if it ever saw two.
    pub fn end(self) {
        self.task.abort();
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner).take();
        assert_eq!(broken, None, "an instance ran twice");
    }
}

async fn runs_twice(servers: [&'static Server; 2], subjects: &[Subject]) -> Option<String> {
    let mut running: Vec<(Value, String)> = Vec::new();
    for server in servers {
        for instance in server.instances().await.unwrap_or_default() {
            let uuid = instance["config"]["volatile.uuid"].clone();
            if instance["status"] == "Running" && subjects.iter().any(|s| s.uuid == uuid) {
                running.push((uuid, format!("{} on {}", instance["name"], server.name)));
            }
        }
    }
    running.sort_by_key(|(uuid, _)| uuid.to_string());
    running
        .windows(2)
        .find(|two| two[0].0 == two[1].0)
        .map(|two| format!("{} and {}", two[0].1, two[1].1))
}
