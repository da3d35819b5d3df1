//! One pass over an InstanceServer: its credentials are read, the connection is made or made anew, the engine is told, and
//! the status is written. Followers do the same but for the writing, so that they know the servers when they take over.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_api::{InstanceServer, Outcome, Reason, conditions, keys};
use berth_client::{ConnectError, Endpoint, HttpServer, certificate_fingerprint, connect, trust};
use berth_core::moves;
use berth_core::plan::{Reach, ServerView};
use berth_core::records::Records;
use berth_core::status::is_leftover;
use berth_engine::registry::ServerConfig;
use berth_engine::{Engine, Happening, Key};
use jiff::Timestamp;
use kube::{Resource, ResourceExt};
use tokio::time::Instant;

use crate::credentials::{Credentials, Problem, join_problem};
use crate::events;
use crate::records::{KubeRecords, record_of};
use crate::server_status::{differs_in_count_only, status};
use crate::store::{Store, StoreError};

/// How often each Secret is read again.
const REREAD: Duration = Duration::from_secs(60);
/// How soon after a read it is read again because the server refuses the certificate.
const REREAD_REFUSED: Duration = Duration::from_secs(5);
/// When a problem that may pass by itself is looked at again.
const RETRY: Duration = Duration::from_secs(5);
/// When an object that somebody else has changed is looked at again, should the watch not tell of it before.
const AGAIN: Duration = Duration::from_secs(1);

/// All InstanceServers.
pub(crate) struct Servers {
    pub store: Arc<Store>,
    pub engine: Arc<Engine>,
    pub records: Arc<KubeRecords>,
    pub identity: String,
    connections: Mutex<HashMap<Key, Connection>>,
}

/// What was made of one InstanceServer so far.
#[derive(Default)]
struct Connection {
    generation: Option<i64>,
    http: Option<(Arc<HttpServer>, Credentials, Vec<String>)>,
    read_at: Option<Instant>,
    joined: bool,
    /// What the engine was told last.
    told: Option<Told>,
    written_at: Option<Instant>,
}

#[derive(PartialEq)]
struct Told {
    config: ServerConfig,
    connection: usize,
    problem: Option<(Reason, String)>,
}

impl Servers {
    pub fn new(store: Arc<Store>, engine: Arc<Engine>, records: Arc<KubeRecords>, identity: String) -> Arc<Self> {
        Arc::new(Self {
            store,
            engine,
            records,
            identity,
            connections: Mutex::default(),
        })
    }

    /// Every InstanceServer and whether it can be used, for the metrics.
    pub fn up(&self) -> Vec<(String, String, bool)> {
        let all = self.store.servers.list(|_| true);
        all.iter()
            .map(|object| {
                let key = crate::cache::key_of(object.as_ref());
                let up = self.engine.server(&key).is_some_and(|v| v.is_listed());
                (key.namespace, key.name, up)
            })
            .collect()
    }

    /// Looks at one; says when to look again.
    pub async fn pass(self: Arc<Self>, key: Key) -> Option<Duration> {
        let taken = self.lock().remove(&key).unwrap_or_default();
        let Some(object) = self.store.servers.get(&key) else {
            self.engine.registry().remove(&key);
            return None;
        };
        let mut connection = taken;
        let problem = self.connection(&object, &mut connection).await;
        self.tell(&key, &object, &mut connection, problem);
        let again = self.report(&key, &object, &mut connection).await;
        self.lock().insert(key, connection);
        again
    }

    /// Brings the connection up to date; says why it cannot be used.
    async fn connection(&self, object: &InstanceServer, c: &mut Connection) -> Option<(Reason, String)> {
        let key = crate::cache::key_of(object);
        let changed = c.generation != object.metadata.generation;
        let refused = self.engine.server(&key).is_some_and(|v| is_refused(&v));
        let age = c.read_at.map(|t| t.elapsed());
        let has_problem = c.told.as_ref().is_some_and(|t| t.problem.is_some());
        let due = match age {
            None => true,
            Some(age) if refused || has_problem => age >= REREAD_REFUSED,
            Some(age) => age >= REREAD,
        };
        if !changed && !due {
            return c.told.as_ref().and_then(|t| t.problem.clone());
        }
        let credentials = match self.store.credentials(object).await {
            Ok(credentials) => credentials,
            Err(Problem::Refused(reason, message)) => {
                (c.read_at, c.generation) = (Some(Instant::now()), object.metadata.generation);
                return Some((reason, message));
            }
            Err(Problem::Unavailable(message)) => {
                tracing::warn!(server = %key, error = %message, "the credentials cannot be read now");
                let before = c.told.as_ref().and_then(|t| t.problem.clone());
                return before.or_else(|| c.http.is_none().then_some((Reason::Connecting, message)));
            }
            Err(Problem::NotLeading) => {
                return Some((Reason::Connecting, "the leader makes a certificate".to_owned()));
            }
        };
        (c.read_at, c.generation) = (Some(Instant::now()), object.metadata.generation);
        match self.make(object, credentials, c).await {
            Ok(()) => None,
            Err(Problem::Refused(reason, message)) => Some((reason, message)),
            Err(Problem::Unavailable(message)) => Some((Reason::Unreachable, message)),
            Err(Problem::NotLeading) => Some((Reason::Connecting, "the leader joins the server".to_owned())),
        }
    }

    /// Makes the connection anew if something that it was made of has changed.
    async fn make(&self, object: &InstanceServer, new: Credentials, c: &mut Connection) -> Result<(), Problem> {
        let addresses = object.spec.addresses.clone();
        let same = |(_, old, at): &(Arc<HttpServer>, Credentials, Vec<String>)| old.is_same(&new) && *at == addresses;
        if c.http.as_ref().is_some_and(same) && (c.joined || new.token.is_none()) {
            return Ok(());
        }
        if let Some(token) = &new.token {
            if !self.store.gate.may_act() {
                return Err(Problem::NotLeading);
            }
            let name = format!("berth {}", crate::cache::key_of(object));
            let joined = trust::join(&addresses, token, &name, &new.identity).await;
            joined.map_err(|e| join_problem(&e))?;
            c.joined = true;
        }
        if c.http.as_ref().is_some_and(same) {
            return Ok(());
        }
        let endpoint = Endpoint {
            addresses: addresses.clone(),
            peer_address: object.spec.peer_address.clone().filter(|a| !a.is_empty()),
            identity: new.identity.clone(),
            trust: new.trust.clone(),
        };
        let http = connect(&endpoint).map_err(|e| connect_problem(object, &e))?;
        let http = http.with_observer(self.store.metrics.observer());
        c.http = Some((Arc::new(http), new, addresses));
        Ok(())
    }

    /// Tells the engine what has changed, and nothing else: it lets everybody concerned look again.
    fn tell(&self, key: &Key, object: &InstanceServer, c: &mut Connection, problem: Option<(Reason, String)>) {
        let http = c.http.as_ref();
        let told = Told {
            config: config_of(object, http.map(|(server, ..)| server.address_in_use())),
            connection: http.map_or(0, |(server, ..)| Arc::as_ptr(server).addr()),
            problem,
        };
        if c.told.as_ref() == Some(&told) {
            return;
        }
        let registry = self.engine.registry();
        if c.told.is_none() {
            let known = object.status.as_ref().map(|s| s.transfers.as_slice());
            registry.seed_ways(key, known.unwrap_or_default());
        }
        let new_connection = c.told.as_ref().is_none_or(|t| t.connection != told.connection);
        if let Some((server, credentials, _)) = http
            && (told.problem.is_none() || new_connection)
        {
            let own = certificate_fingerprint(&credentials.identity.certificate).ok();
            registry.upsert(key, told.config.clone(), server.clone(), own);
        }
        if let Some((reason, message)) = &told.problem {
            registry.set_down(key, told.config.clone(), *reason, message.clone());
        }
        c.told = Some(told);
    }

    /// Writes the status, if it has changed; lets go of what nobody needs.
    async fn report(&self, key: &Key, object: &InstanceServer, c: &mut Connection) -> Option<Duration> {
        let problem = c.told.as_ref().is_some_and(|t| t.problem.is_some());
        let again = Some(jittered(if problem { RETRY } else { REREAD }));
        if !self.store.gate.may_act() {
            return again;
        }
        // finalizers may have come or gone meanwhile; another spec is looked at by the next pass
        let same = |o: &InstanceServer| o.uid() == object.uid() && o.metadata.generation == object.metadata.generation;
        let Some(current) = self.store.servers.get(key).filter(|o| same(o)) else {
            return again;
        };
        let object = current.as_ref();
        let view = self.engine.server(key);
        let address = c.http.as_ref().map(|(server, ..)| server.address_in_use());
        let worked = self.engine.registry().ways_to(key);
        let new = status(object, view.as_ref(), address, &worked, Timestamp::now());
        let old = object.status.clone().unwrap_or_default();
        let counted = c
            .written_at
            .is_some_and(|t| t.elapsed() < object.spec.interval.as_std());
        if new != old && !(counted && differs_in_count_only(&old, &new)) {
            match self.store.apply_status(object, &new).await {
                Ok(written) => {
                    c.written_at = Some(Instant::now());
                    self.store.servers.wrote(written);
                    self.say(object, conditions::reason(&old.conditions), &new.conditions)
                        .await;
                }
                Err(StoreError::Conflict(_)) => return Some(AGAIN),
                Err(error) => {
                    tracing::warn!(server = %key, %error, "tried again");
                    return Some(RETRY);
                }
            }
        }
        if let Err(error) = self.let_go(key, object).await {
            tracing::warn!(server = %key, error, "tried again");
            return Some(RETRY);
        }
        again
    }

    /// One event for each new reason.
    async fn say(&self, object: &InstanceServer, before: Option<&str>, now: &[berth_api::Condition]) {
        let Some(ready) = conditions::find(now, conditions::READY) else {
            return;
        };
        if before == Some(ready.reason.as_str()) || ready.reason == Reason::Connecting.as_str() {
            return;
        }
        let happening = Happening {
            record: None,
            warning: ready.status != "True",
            reason: ready.reason.clone(),
            message: ready.message.clone(),
        };
        events::publish(&self.store, &self.identity, &[object.object_ref(&())], happening).await;
    }

    /// Takes the finalizer off when no move needs the server. Moves that only wait for it to delete a former source are
    /// closed once it is being deleted.
    async fn let_go(&self, key: &Key, object: &InstanceServer) -> Result<(), String> {
        if !object.finalizers().iter().any(|f| f == keys::FINALIZER) {
            return Ok(());
        }
        if object.metadata.deletion_timestamp.is_some() {
            for waiting in self.store.moves_of_server(key) {
                let mut record = record_of(&waiting);
                if !is_leftover(&record, Timestamp::now()) || record.spec.from.server != key.name {
                    continue;
                }
                moves::close(&mut record, Outcome::Succeeded, Timestamp::now());
                let closed = self.records.swap(&record).await.map_err(|e| e.to_string())?;
                self.engine.record_seen(&closed);
                self.records.release(&closed).await.map_err(|e| e.to_string())?;
                tracing::info!(record = %record.name, server = %key, "the former source stays on a server that was given up");
            }
        }
        self.store.release_server(key).await.map_err(|e| e.to_string())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Connection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the server refuses our certificate, or we refuse its own.
fn is_refused(view: &ServerView) -> bool {
    matches!(
        &view.reach,
        Reach::Down {
            reason: Reason::NotTrusted | Reason::CertificateMismatch,
            ..
        }
    )
}

fn connect_problem(object: &InstanceServer, error: &ConnectError) -> Problem {
    let own = matches!(error, ConnectError::ClientCertificate(_) | ConnectError::ClientKey(_));
    let secret = object.spec.credentials.secret_ref.as_ref().map(|s| s.name.as_str());
    match (own, secret) {
        (true, Some(secret)) => Problem::Refused(
            Reason::CredentialsInvalid,
            format!(
                "Secret {secret} cannot be used: {error}; it must hold a client certificate (tls.crt) and its key (tls.key) as PEM"
            ),
        ),
        (true, None) => Problem::Refused(Reason::CredentialsInvalid, error.to_string()),
        (false, _) => Problem::Refused(Reason::InvalidSpec, error.to_string()),
    }
}

fn config_of(object: &InstanceServer, in_use: Option<String>) -> ServerConfig {
    let spec = &object.spec;
    let created = object.metadata.creation_timestamp.as_ref();
    ServerConfig {
        created_at: created.map_or(Timestamp::UNIX_EPOCH, |t| t.0),
        // what is being deleted takes nothing in any more
        cordoned: spec.cordoned || object.metadata.deletion_timestamp.is_some(),
        limits: spec.limits,
        interval: spec.interval.as_std(),
        address: in_use.or_else(|| spec.addresses.first().cloned()).unwrap_or_default(),
        peer_address: spec.peer_address.clone(),
        allow_unsafe_overrides: spec.allow_unsafe_overrides,
        live_between_servers: spec.live.between_servers,
    }
}

/// Give or take a tenth.
fn jittered(d: Duration) -> Duration {
    d.mul_f64(0.9 + 0.2 * rand::random::<f64>())
}
