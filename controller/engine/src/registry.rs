//! The servers by namespace and name of their InstanceServer. Those of one fingerprint are one server: they share
//! inventory and limits, and one that is cordoned cordons all.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_api::Reason;
use berth_api::moves::MoveEnd;
use berth_api::server::{Limits, TransferMemory};
use berth_core::model::{InstanceRef, Inventory, ServerFacts};
use berth_core::plan::{Reach, ServerView};
use berth_core::records::Record;
use berth_core::server::Server;
use jiff::Timestamp;

use crate::inventory::{Follower, Seen, Start};
use crate::primaries::Primaries;
use crate::transfer::Side;
use crate::ways::Ways;
use crate::{Change, Changes, Env, Key, lock};

/// What an InstanceServer says about how its server may be used.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerConfig {
    /// When the InstanceServer was made: the first one of a server counts, later ones are duplicates.
    pub created_at: Timestamp,
    /// No instance may be moved here.
    pub cordoned: bool,
    /// Moves at the same time.
    pub limits: Limits,
    /// How often everything is listed anew.
    pub interval: Duration,
    /// `https://host:port` under which this process reaches it.
    pub address: String,
    /// `https://host:port` under which other servers reach it, where that differs.
    pub peer_address: Option<String>,
    /// Overrides may reach into the host.
    pub allow_unsafe_overrides: bool,
    /// Live moves to and from other independent servers are allowed.
    pub live_between_servers: bool,
}

/// Moves under way, by fingerprint.
pub type Usage = HashMap<String, InUse>;

/// Moves under way on one server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InUse {
    /// To it.
    pub incoming: i64,
    /// Away from it.
    pub outgoing: i64,
}

/// All servers that this process knows.
pub struct Registry {
    env: Env,
    changes: Changes,
    primaries: Arc<Primaries>,
    entries: Mutex<BTreeMap<Key, Entry>>,
    ways: Ways,
}

struct Entry {
    config: ServerConfig,
    /// Kept when the credentials are gone: a move in hand is finished with the last ones.
    follower: Option<Arc<Follower>>,
    /// Our own certificate's fingerprint on that server.
    identity: Option<String>,
    /// Why the server may not be used, if the wiring says so.
    down: Option<Reach>,
}

/// What is the same for all InstanceServers of one fingerprint.
#[derive(Clone)]
struct Joint {
    cordoned: bool,
    /// Namespaces and names of the InstanceServers that cordon it.
    cordoned_by: Vec<(String, String)>,
    limits: Limits,
}

/// One end of a move that answers.
pub(crate) struct Reached {
    pub name: String,
    pub facts: Arc<ServerFacts>,
    pub instances: Inventory,
    pub follower: Arc<Follower>,
    address: String,
}

/// One end of a move that does not.
pub(crate) struct Silent {
    pub since: Option<Timestamp>,
    pub message: String,
}

impl Reached {
    /// The end as one side of a transfer.
    pub fn side(&self) -> Side {
        Side {
            name: self.name.clone(),
            server: self.follower.server(),
            address: self.address.clone(),
            certificate: self.facts.certificate.clone(),
            events: self.follower.operations(),
        }
    }
}

impl Registry {
    /// No servers yet.
    pub fn new(env: Env, changes: Changes) -> Self {
        Self {
            env,
            changes,
            primaries: Primaries::new(),
            entries: Mutex::default(),
            ways: Ways::default(),
        }
    }

    /// Takes over what was known before this process began of the ways to a server.
    pub fn seed_ways(&self, key: &Key, known: &[TransferMemory]) {
        self.ways.seed(key, known);
    }

    /// Which way worked last to that server, by source, for its status.
    pub fn ways_to(&self, key: &Key) -> Vec<(String, Option<TransferMemory>)> {
        self.ways.worked(key)
    }

    /// Remembers what became of a move's way.
    pub(crate) fn learn(&self, record: &Record) {
        let (from, to) = (
            &record.spec.from.server,
            Key::new(&record.namespace, &record.spec.to.server),
        );
        let under = under(&lock(&self.entries), &Key::new(&record.namespace, from), &to);
        if under.is_some_and(|under| self.ways.learn(&to, record, &under)) {
            self.say_changed(&to);
        }
    }

    /// Adds a server or takes over what changed. Another `server` value means another connection (credentials,
    /// addresses): what is known is kept, and looked at again. `identity` is the fingerprint of our own certificate.
    pub fn upsert(&self, key: &Key, config: ServerConfig, server: Arc<dyn Server>, identity: Option<String>) {
        let mut entries = lock(&self.entries);
        let follower = match entries.remove(key) {
            Some(Entry {
                follower: Some(follower),
                identity: old_identity,
                ..
            }) => {
                follower.set_interval(config.interval);
                if !Arc::ptr_eq(&follower.server(), &server) || old_identity != identity {
                    follower.replace(server, identity.clone());
                }
                follower
            }
            Some(_) | None => Arc::new(Follower::start(Start {
                key: key.clone(),
                server,
                identity: identity.clone(),
                interval: config.interval,
                clock: self.env.clock.clone(),
                changes: self.changes.clone(),
                primaries: self.primaries.clone(),
            })),
        };
        entries.insert(
            key.clone(),
            Entry {
                config,
                follower: Some(follower),
                identity,
                down: None,
            },
        );
        drop(entries);
        self.say_changed(key);
    }

    /// The server cannot be used for now, and why (for example: its Secret is missing).
    pub fn set_down(&self, key: &Key, config: ServerConfig, reason: Reason, message: impl Into<String>) {
        let message = message.into();
        let mut entries = lock(&self.entries);
        let entry = entries.entry(key.clone()).or_insert_with(|| Entry {
            config: config.clone(),
            follower: None,
            identity: None,
            down: None,
        });
        let since = match &entry.down {
            Some(Reach::Down { since, .. }) => *since,
            Some(Reach::Ready | Reach::Connecting) | None => self.env.now(),
        };
        entry.config = config;
        entry.down = Some(Reach::Down { reason, message, since });
        drop(entries);
        self.say_changed(key);
    }

    /// Forgets a server.
    pub fn remove(&self, key: &Key) {
        let removed = lock(&self.entries).remove(key);
        if removed.is_some() {
            self.say_changed(key);
        }
    }

    fn say_changed(&self, key: &Key) {
        let fingerprint = lock(&self.entries).get(key).and_then(Entry::fingerprint);
        // nobody listening is no failure
        let _ = self.changes.send(Change::Server {
            key: key.clone(),
            fingerprint,
        });
    }

    /// The InstanceServers behind which the server of that fingerprint is.
    pub fn keys_of(&self, fingerprint: &str) -> Vec<Key> {
        let entries = lock(&self.entries);
        let same = entries
            .iter()
            .filter(|(_, e)| e.fingerprint().as_deref() == Some(fingerprint));
        same.map(|(k, _)| k.clone()).collect()
    }

    /// Everything known of one server.
    pub fn view(&self, key: &Key, usage: &Usage) -> Option<ServerView> {
        self.views(&key.namespace, usage).remove(&key.name)
    }

    /// Whether that InstanceServer has been heard of.
    pub fn knows(&self, key: &Key) -> bool {
        lock(&self.entries).contains_key(key)
    }

    /// Everything known of the servers of a namespace.
    pub fn views(&self, namespace: &str, usage: &Usage) -> BTreeMap<String, ServerView> {
        let entries = lock(&self.entries);
        let joint = joint(&entries);
        let mut firsts: HashMap<String, (Timestamp, &str)> = HashMap::new();
        let here = || entries.iter().filter(|(k, _)| k.namespace == namespace);
        for (key, entry) in here() {
            if let Some(fingerprint) = entry.fingerprint() {
                let mine = (entry.config.created_at, key.name.as_str());
                let first = firsts.entry(fingerprint).or_insert(mine);
                *first = mine.min(*first);
            }
        }
        here()
            .map(|(key, entry)| {
                let fingerprint = entry.fingerprint();
                let first = fingerprint.as_ref().and_then(|f| firsts.get(f)).map(|(_, name)| *name);
                let duplicate_of = first.filter(|name| *name != key.name).map(str::to_owned);
                let shared = fingerprint.as_ref().and_then(|f| joint.get(f)).cloned();
                let used = fingerprint.and_then(|f| usage.get(&f)).copied().unwrap_or_default();
                let mut view = entry.view(duplicate_of, shared, used);
                view.ways = self
                    .ways
                    .known(key, |from| under(&entries, &Key::new(namespace, from), key));
                (key.name.clone(), view)
            })
            .collect()
    }

    /// The end of a move, if it answers and is the server that the record names.
    pub(crate) fn end(&self, namespace: &str, end: &MoveEnd) -> Result<Reached, Silent> {
        let silent = |since, message: String| Err(Silent { since, message });
        let entries = lock(&self.entries);
        let Some(entry) = entries.get(&Key::new(namespace, &end.server)) else {
            return silent(None, format!("there is no InstanceServer {}", end.server));
        };
        let Some(follower) = entry.follower.clone() else {
            let why = match &entry.down {
                Some(Reach::Down { message, .. }) => message.clone(),
                Some(Reach::Ready | Reach::Connecting) | None => "it was not asked yet".to_owned(),
            };
            return silent(None, why);
        };
        let Seen {
            reach,
            facts,
            instances,
        } = follower.seen();
        if let Reach::Down { message, since, .. } = reach {
            follower.retry_now();
            return silent(Some(since), message);
        }
        let (Some(facts), Some(instances)) = (facts, instances) else {
            return silent(None, format!("{} has not been listed yet", end.server));
        };
        if facts.fingerprint != end.fingerprint {
            let message = format!(
                "{} is another server now: its fingerprint is {}, the move began with {}",
                end.server, facts.fingerprint, end.fingerprint
            );
            return silent(None, message);
        }
        Ok(Reached {
            name: end.server.clone(),
            address: entry.peer_address(),
            facts,
            instances,
            follower,
        })
    }

    /// The fingerprint of the server behind an InstanceServer, if it ever answered.
    pub fn fingerprint(&self, key: &Key) -> Option<String> {
        lock(&self.entries).get(key)?.fingerprint()
    }

    /// The limits of all servers, by fingerprint.
    pub(crate) fn limits(&self) -> HashMap<String, Limits> {
        let joint = joint(&lock(&self.entries));
        joint.into_iter().map(|(f, j)| (f, j.limits)).collect()
    }

    /// The server of that name for a request outside a move.
    pub(crate) fn follower(&self, key: &Key) -> Option<Arc<Follower>> {
        lock(&self.entries).get(key)?.follower.clone()
    }

    /// All servers, each once, with the namespaces of the InstanceServers behind which they are.
    pub(crate) fn all(&self) -> Vec<(String, Arc<Follower>, BTreeSet<String>)> {
        let entries = lock(&self.entries);
        let mut all: BTreeMap<String, (Arc<Follower>, BTreeSet<String>)> = BTreeMap::new();
        for (key, entry) in entries.iter() {
            let (Some(fingerprint), Some(follower)) = (entry.fingerprint(), &entry.follower) else {
                continue;
            };
            let known = all
                .entry(fingerprint)
                .or_insert_with(|| (follower.clone(), BTreeSet::new()));
            known.1.insert(key.namespace.clone());
        }
        all.into_iter()
            .map(|(f, (follower, namespaces))| (f, follower, namespaces))
            .collect()
    }

    /// When an instance that is still stopped was stopped with our own certificate, if it was.
    pub fn stopped_by_us(&self, key: &Key, at: &InstanceRef) -> Option<Timestamp> {
        let entries = lock(&self.entries);
        let entry = entries.get(key)?;
        let stop = entry.follower.as_ref()?.stopped_by(at)?;
        (Some(&stop.requestor) == entry.identity.as_ref()).then_some(stop.at)
    }
}

/// What a way between two servers depends on: both versions, and how each is reached by the other.
fn under(entries: &BTreeMap<Key, Entry>, from: &Key, to: &Key) -> Option<String> {
    let of = |key: &Key| {
        let entry = entries.get(key)?;
        let facts = entry.seen().facts?;
        Some(format!(
            "{} {} at {}",
            facts.product.as_str(),
            facts.version,
            entry.peer_address()
        ))
    };
    Some(format!("{}, {}", of(from)?, of(to)?))
}

fn joint(entries: &BTreeMap<Key, Entry>) -> HashMap<String, Joint> {
    let mut joint: HashMap<String, Joint> = HashMap::new();
    for (key, entry) in entries {
        let Some(fingerprint) = entry.fingerprint() else {
            continue;
        };
        let own = entry.alone();
        let all = joint.entry(fingerprint).or_insert_with(|| own.clone());
        if own.cordoned {
            all.cordoned = true;
            all.cordoned_by.push((key.namespace.clone(), key.name.clone()));
        }
        all.limits.incoming = all.limits.incoming.min(own.limits.incoming);
        all.limits.outgoing = all.limits.outgoing.min(own.limits.outgoing);
    }
    joint
}

impl Entry {
    fn seen(&self) -> Seen {
        let mut seen = match &self.follower {
            Some(follower) => follower.seen(),
            None => Seen {
                reach: Reach::Connecting,
                facts: None,
                instances: None,
            },
        };
        if let Some(down) = &self.down {
            seen.reach = down.clone();
        }
        seen
    }

    fn fingerprint(&self) -> Option<String> {
        let facts = self.follower.as_ref()?.seen().facts;
        facts.map(|f| f.fingerprint.clone())
    }

    /// What counts for this InstanceServer by itself.
    fn alone(&self) -> Joint {
        Joint {
            cordoned: self.config.cordoned,
            cordoned_by: Vec::new(),
            limits: self.config.limits,
        }
    }

    fn peer_address(&self) -> String {
        let peer = self.config.peer_address.as_ref().filter(|a| !a.is_empty());
        peer.unwrap_or(&self.config.address).trim_end_matches('/').to_owned()
    }

    fn view(&self, duplicate_of: Option<String>, joint: Option<Joint>, used: InUse) -> ServerView {
        let Seen {
            reach,
            facts,
            instances,
        } = self.seen();
        let joint = joint.unwrap_or_else(|| self.alone());
        ServerView {
            facts,
            reach,
            instances,
            cordoned: joint.cordoned,
            cordoned_by: joint.cordoned_by,
            duplicate_of,
            free_incoming: i64::from(joint.limits.incoming) - used.incoming,
            free_outgoing: i64::from(joint.limits.outgoing) - used.outgoing,
            allow_unsafe_overrides: self.config.allow_unsafe_overrides,
            ways: BTreeMap::new(),
            live_between_servers: self.config.live_between_servers,
        }
    }
}
