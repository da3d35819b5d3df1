//! Which of several controllers acts: a Lease that one of them holds and renews, and that another takes once it was not
//! renewed for its whole duration. A lease is no fence: whoever acts asks [`Leadership`] right before each write.
//!
//! Expiry is counted from before the renewal was sent, on two clocks at once: the monotonic one does not see a machine
//! that slept, the wall clock can be set back. The earlier one counts.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::core::Status;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::store::sentence;

/// How long a lease holds without being renewed.
const DURATION: Duration = Duration::from_secs(15);
/// How often it is renewed: often enough that it always holds for longer than unconditional requests need.
const RENEW: Duration = Duration::from_secs(3);
/// How often a renewal that failed is tried again, and how often a follower looks.
const RETRY: Duration = Duration::from_secs(1);
/// Longest single request.
const CALL: Duration = Duration::from_secs(10);
/// Requests without a precondition need that much: their own time-out is below it.
const SAFE: Duration = Duration::from_secs(10);

/// Whether this process leads, for how long at least.
#[derive(Clone, Debug)]
pub(crate) struct Leadership {
    held: Arc<Mutex<Held>>,
    leads: Arc<watch::Sender<bool>>,
}

#[derive(Clone, Copy, Debug)]
enum Held {
    No,
    Until { monotonic: Instant, wall: SystemTime },
    Always,
}

impl Leadership {
    /// Not leading yet.
    pub fn none() -> Self {
        Self {
            held: Arc::new(Mutex::new(Held::No)),
            leads: Arc::new(watch::Sender::new(false)),
        }
    }

    /// Leads without an election.
    pub fn take_for_good(&self) {
        self.set(Held::Always);
    }

    /// How much longer this process leads; zero if it does not.
    pub fn remaining(&self) -> Duration {
        match *self.lock() {
            Held::No => Duration::ZERO,
            Held::Always => Duration::MAX,
            Held::Until { monotonic, wall } => {
                let by_wall = wall.duration_since(SystemTime::now()).unwrap_or_default();
                monotonic.saturating_duration_since(Instant::now()).min(by_wall)
            }
        }
    }

    /// Whether this process may write and ask servers for changes.
    pub fn may_act(&self) -> bool {
        !self.remaining().is_zero()
    }

    /// Whether it holds long enough for requests without a precondition.
    pub fn is_safe(&self) -> bool {
        self.remaining() > SAFE
    }

    /// Waits until this process leads.
    pub async fn won(&self) {
        // the sender lives in `self`
        let _ = self.leads.subscribe().wait_for(|leads| *leads).await;
    }

    fn extend(&self, since: (Instant, SystemTime)) {
        self.set(Held::Until {
            monotonic: since.0 + DURATION,
            wall: since.1 + DURATION,
        });
    }

    fn drop_it(&self) {
        self.set(Held::No);
    }

    fn set(&self, held: Held) {
        *self.lock() = held;
        let leads = !matches!(held, Held::No);
        self.leads.send_if_modified(|l| std::mem::replace(l, leads) != leads);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the Lease is and who we are in it.
#[derive(Clone, Debug)]
pub(crate) struct Election {
    pub namespace: String,
    pub name: String,
    pub identity: String,
}

/// What a look at the Lease said.
enum Look {
    Ours(Lease),
    Free(Option<Lease>),
    Theirs,
}

/// The Lease as it was seen last, and since when it has not changed.
struct Unchanged {
    seen: Option<LeaseSpec>,
    since: Instant,
}

impl Unchanged {
    fn note(&mut self, spec: Option<&LeaseSpec>) -> Duration {
        if self.seen.as_ref() != spec {
            self.seen = spec.cloned();
            self.since = Instant::now();
        }
        self.since.elapsed()
    }
}

/// Takes part in the election: claims the Lease, renews it, says so in `leadership`. Ends when the lease is lost.
pub(crate) async fn run(client: Client, election: &Election, leadership: &Leadership) {
    let api: Api<Lease> = Api::namespaced(client, &election.namespace);
    let lease = claim(&api, election, leadership).await;
    tracing::info!(lease = %election.name, namespace = %election.namespace, identity = %election.identity, "leads");
    renew(&api, election, leadership, lease).await;
    leadership.drop_it();
    tracing::warn!(lease = %election.name, namespace = %election.namespace, "does not lead any more");
}

/// Gives the Lease up at once, so that another controller need not wait for its end.
pub(crate) async fn release(client: Client, election: &Election, leadership: &Leadership) {
    leadership.drop_it();
    let api: Api<Lease> = Api::namespaced(client, &election.namespace);
    let released = async {
        let mut lease = api.get(&election.name).await?;
        let Some(spec) = lease.spec.as_mut().filter(|s| holder(s) == election.identity) else {
            return Ok(());
        };
        spec.holder_identity = Some(String::new());
        spec.lease_duration_seconds = Some(1);
        api.replace(&election.name, &PostParams::default(), &lease)
            .await
            .map(|_| ())
    };
    match timeout(Duration::from_secs(3), released).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the lease cannot be given up; it ends by itself"),
        Err(_) => tracing::warn!("the API server does not answer; the lease ends by itself"),
    }
}

async fn claim(api: &Api<Lease>, election: &Election, leadership: &Leadership) -> Lease {
    let mut unchanged = Unchanged {
        seen: None,
        since: Instant::now(),
    };
    let mut said = String::new();
    loop {
        let began = (Instant::now(), SystemTime::now());
        let attempt = async {
            match look(api, election, &mut unchanged).await? {
                Look::Theirs => Ok(None),
                Look::Ours(lease) => write(api, election, Some(lease)).await.map(Some),
                Look::Free(lease) => write(api, election, lease).await.map(Some),
            }
        };
        let problem = match timeout(CALL, attempt).await {
            Ok(Ok(Some(lease))) => {
                leadership.extend(began);
                return lease;
            }
            Ok(Ok(None)) => String::new(),
            // somebody else was quicker
            Ok(Err(kube::Error::Api(status))) if status.is_conflict() || status.is_already_exists() => String::new(),
            Ok(Err(error)) => sentence(&error),
            Err(_) => "the API server does not answer".to_owned(),
        };
        if !problem.is_empty() && problem != said {
            tracing::warn!(namespace = %election.namespace, lease = %election.name, error = %problem, "the lease cannot be claimed");
        }
        said = problem;
        sleep(jittered(RETRY)).await;
    }
}

async fn look(api: &Api<Lease>, election: &Election, unchanged: &mut Unchanged) -> kube::Result<Look> {
    let Some(lease) = api.get_opt(&election.name).await? else {
        return Ok(Look::Free(None));
    };
    let still = unchanged.note(lease.spec.as_ref());
    Ok(match lease.spec.as_ref() {
        Some(_) if is_ours(&lease, election) => Look::Ours(lease),
        Some(spec) if is_free(spec, still) => Look::Free(Some(lease)),
        None => Look::Free(Some(lease)),
        Some(_) => Look::Theirs,
    })
}

fn holder(spec: &LeaseSpec) -> &str {
    spec.holder_identity.as_deref().unwrap_or_default()
}

/// Whether a lease that has not changed for `still` can be taken. Other clocks are not asked.
fn is_free(spec: &LeaseSpec, still: Duration) -> bool {
    let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
    let duration = seconds.map_or(DURATION, Duration::from_secs);
    holder(spec).is_empty() || still >= duration
}

/// Writes our name and the time, if nobody wrote since `found` was read.
async fn write(api: &Api<Lease>, election: &Election, found: Option<Lease>) -> kube::Result<Lease> {
    let lease = claimed(election, found, Timestamp::now());
    let params = PostParams::default();
    match lease.metadata.resource_version {
        Some(_) => api.replace(&election.name, &params, &lease).await,
        None => api.create(&params, &lease).await,
    }
}

fn claimed(election: &Election, found: Option<Lease>, now: Timestamp) -> Lease {
    let mut lease = found.unwrap_or_else(|| Lease {
        metadata: ObjectMeta {
            name: Some(election.name.clone()),
            namespace: Some(election.namespace.clone()),
            ..ObjectMeta::default()
        },
        spec: None,
    });
    let spec = lease.spec.get_or_insert_default();
    if holder(spec) != election.identity {
        spec.holder_identity = Some(election.identity.clone());
        spec.acquire_time = Some(MicroTime(now));
        spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
    }
    spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
    spec.renew_time = Some(MicroTime(now));
    lease
}

/// Renews until the lease is lost.
async fn renew(api: &Api<Lease>, election: &Election, leadership: &Leadership, lease: Lease) {
    let mut lease = Some(lease);
    let mut pause = jittered(RENEW);
    loop {
        sleep(pause.min(leadership.remaining())).await;
        if !leadership.may_act() {
            return;
        }
        let began = (Instant::now(), SystemTime::now());
        let call = CALL.min(leadership.remaining());
        let error = match timeout(call, write(api, election, lease.clone())).await {
            Ok(Ok(renewed)) => {
                lease = Some(renewed);
                leadership.extend(began);
                pause = jittered(RENEW);
                continue;
            }
            Ok(Err(kube::Error::Api(status))) if is_changed(&status) => {
                // our own write whose answer was lost, somebody else's, or somebody deleted it
                match timeout(call, api.get_opt(&election.name)).await {
                    Ok(Ok(found)) if found.as_ref().is_none_or(|l| is_ours(l, election)) => lease = found,
                    Ok(Ok(_)) => return,
                    Ok(Err(_)) | Err(_) => {}
                }
                status.message.clone()
            }
            Ok(Err(error)) => sentence(&error),
            Err(_) => "the API server does not answer".to_owned(),
        };
        tracing::warn!(%error, "the lease cannot be renewed; tried again");
        pause = jittered(RETRY);
    }
}

fn is_changed(status: &Status) -> bool {
    status.is_conflict() || status.is_already_exists() || status.is_not_found()
}

fn is_ours(lease: &Lease, election: &Election) -> bool {
    lease.spec.as_ref().is_some_and(|s| holder(s) == election.identity)
}

/// Give or take a tenth, so that several controllers do not ask at the same instant.
fn jittered(d: Duration) -> Duration {
    d.mul_f64(0.9 + 0.2 * rand::random::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn election() -> Election {
        Election {
            namespace: "ns".into(),
            name: "berth".into(),
            identity: "me".into(),
        }
    }

    #[test]
    fn a_lease_is_taken_only_after_it_was_not_renewed_for_its_whole_duration() {
        let mut theirs = claimed(&election(), None, Timestamp::now()).spec.unwrap();
        theirs.holder_identity = Some("they".into());
        assert!(!is_free(&theirs, DURATION - Duration::from_millis(1)));
        assert!(is_free(&theirs, DURATION));
        theirs.holder_identity = Some(String::new());
        assert!(is_free(&theirs, Duration::ZERO), "given up");
    }

    #[test]
    fn the_clock_of_a_lease_starts_anew_whenever_it_changes() {
        let mut unchanged = Unchanged {
            seen: None,
            since: Instant::now() - Duration::from_secs(60),
        };
        let spec = claimed(&election(), None, Timestamp::now()).spec.unwrap();
        assert!(unchanged.note(Some(&spec)) < Duration::from_secs(1));
        unchanged.since -= Duration::from_secs(60);
        assert!(unchanged.note(Some(&spec)) > Duration::from_secs(59));
    }

    #[test]
    fn a_renewal_keeps_the_time_of_acquisition_and_a_takeover_counts() {
        let first = claimed(&election(), None, Timestamp::UNIX_EPOCH);
        let again = claimed(&election(), Some(first.clone()), Timestamp::now());
        let (first, again) = (first.spec.unwrap(), again.spec.unwrap());
        assert_eq!(
            (first.acquire_time, first.lease_transitions),
            (again.acquire_time, again.lease_transitions)
        );
        assert_ne!(first.renew_time, again.renew_time);
        let mut other = election();
        other.identity = "other".into();
        let taken = claimed(
            &other,
            Some(claimed(&election(), None, Timestamp::now())),
            Timestamp::now(),
        );
        assert_eq!(taken.spec.unwrap().lease_transitions, Some(2));
    }

    #[test]
    fn a_process_that_slept_finds_its_lease_expired_before_it_acts() {
        let leadership = Leadership::none();
        assert!(!leadership.may_act());
        leadership.extend((Instant::now(), SystemTime::now()));
        assert!(leadership.may_act() && leadership.is_safe());
        // the monotonic clock stood still while the machine slept
        leadership.extend((Instant::now(), SystemTime::now() - Duration::from_secs(20)));
        assert!(!leadership.may_act());
        leadership.extend((Instant::now() - Duration::from_secs(6), SystemTime::now()));
        assert!(leadership.may_act() && !leadership.is_safe());
        leadership.take_for_good();
        assert!(leadership.is_safe());
    }
}
