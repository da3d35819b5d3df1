//! One transfer between two servers: both ends are opened back to back (the daemons wait for each other only 10 to 30
//! seconds), then both operations are followed to their ends. It counts only if both are seen to succeed.

use std::future::pending;
use std::time::Duration;

use berth_core::moves::{Transfer, Wiring};
use berth_core::server::{
    Channel, FailureKind, OperationId, OperationState, Peer, Progress, Result, Server, ServerError,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::sync::Arc;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use crate::inventory::OperationEvent;
use crate::relay::Relay;

/// Longest single wait: an operation vanishes five seconds after its end.
const WAIT: Duration = Duration::from_secs(3);
/// Pause after a wait that failed.
const PAUSE: Duration = Duration::from_millis(500);
/// How long waits may fail before the outcome counts as unknown.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the other end's error is waited for after one end failed.
const COLLECT: Duration = Duration::from_secs(10);

/// One end of a transfer, with everything resolved beforehand.
pub(crate) struct Side {
    /// The InstanceServer's name, for messages.
    pub name: String,
    pub server: Arc<dyn Server>,
    /// `https://host:port` under which the other server reaches it.
    pub address: String,
    /// Its certificate.
    pub certificate: String,
    /// Its operations' events, subscribed before the first request.
    pub events: Receiver<OperationEvent>,
}

/// What is told of a transfer while it runs.
pub(crate) enum News {
    /// How far it is.
    Progress(Progress),
    /// One of its two operations ended well.
    Ended,
}

/// Whoever is told.
pub(crate) type Told<'a> = &'a (dyn Fn(News) + Send + Sync);

/// How an operation ended.
#[derive(Clone, Debug, PartialEq)]
enum Ended {
    Succeeded,
    Failed(String),
    Unknown(String),
}

/// Waits for the end of an operation; for at most `limit`, if there is one.
pub(crate) async fn finished(
    server: &dyn Server,
    attempted: &str,
    operation: &OperationId,
    limit: Option<Duration>,
) -> Result<()> {
    match ended(server, operation, limit.map(|l| Instant::now() + l)).await {
        Ended::Succeeded => Ok(()),
        Ended::Failed(message) => Err(ServerError::new(kind_of(&message), attempted, message)),
        Ended::Unknown(message) => Err(ServerError::new(FailureKind::Unknown, attempted, message)),
    }
}

/// Whether an end says that it does not reach the other one: nobody there, no road, or somebody else.
fn no_way_there(message: &str) -> bool {
    const WORDS: [&str; 5] = [
        "Unable to connect to:",
        "dial tcp",
        "websocket: bad handshake",
        "failed to verify certificate",
        "x509:",
    ];
    WORDS.iter().any(|words| message.contains(words))
}

/// An operation that fails has only a text, alike on both products.
fn kind_of(message: &str) -> FailureKind {
    if message.contains("Instance is busy running") {
        FailureKind::Busy
    } else if message.contains("already exists") {
        FailureKind::AlreadyExists
    } else {
        FailureKind::Refused
    }
}

async fn ended(server: &dyn Server, operation: &OperationId, deadline: Option<Instant>) -> Ended {
    let mut failing_since: Option<Instant> = None;
    loop {
        let left = deadline.map_or(WAIT, |d| d.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return Ended::Unknown("it takes longer than it was given".to_owned());
        }
        match server.wait(operation, left.min(WAIT)).await {
            Ok(OperationState::Succeeded) => return Ended::Succeeded,
            Ok(OperationState::Failed(message)) => return Ended::Failed(message),
            Ok(OperationState::Gone) => {
                return Ended::Unknown(
                    "the server does not know the operation any more, so its end was not seen".into(),
                );
            }
            Ok(OperationState::Running) => failing_since = None,
            Err(error) => {
                let since = *failing_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= PATIENCE {
                    return Ended::Unknown(error.to_string());
                }
                sleep(PAUSE).await;
            }
        }
    }
}

/// Servers count every volume and snapshot of a transfer from zero.
#[derive(Default)]
struct Meter {
    before: i64,
    last: i64,
}

impl Meter {
    /// All bytes so far.
    fn all(&mut self, told: Progress) -> Progress {
        if told.bytes < self.last {
            self.before += self.last;
        }
        self.last = told.bytes;
        Progress {
            bytes: self.before + self.last,
            ..told
        }
    }
}

/// The end of an operation, from whichever tells it first: the wait or the event stream.
async fn followed(side: &mut Side, operation: &OperationId, told: Told<'_>) -> Ended {
    let server = side.server.clone();
    let waiting = ended(server.as_ref(), operation, None);
    tokio::pin!(waiting);
    let mut meter = Meter::default();
    loop {
        tokio::select! {
            ended = &mut waiting => return ended,
            event = side.events.recv() => match event {
                Ok((seen, state)) if seen.id == *operation => {
                    if let Some(p) = seen.progress {
                        told(News::Progress(meter.all(p)));
                    }
                    match state {
                        OperationState::Succeeded => return Ended::Succeeded,
                        OperationState::Failed(message) => return Ended::Failed(message),
                        OperationState::Running | OperationState::Gone => {}
                    }
                }
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return waiting.await,
            },
        }
    }
}

/// Opens both ends and sees both to their ends. `cancel` changes whenever somebody wants the transfer cancelled.
pub(crate) async fn run(
    transfer: Transfer,
    mut source: Side,
    mut target: Side,
    mut cancel: watch::Receiver<u32>,
    told: Told<'_>,
) -> Result<()> {
    let attempted = format!(
        "transfer {} from {} to {} on {}",
        transfer.from, source.name, transfer.accept.at, target.name
    );
    let refresh = transfer.accept.refresh;
    let (from, to, relay) = open(transfer, &source, &target).await?;
    let (source_server, target_server) = (source.server.clone(), target.server.clone());
    let names = (source.name.clone(), target.name.clone());
    let cancel_both = || cancel_transfer(source_server.as_ref(), &from, target_server.as_ref(), &to);

    if *cancel.borrow_and_update() > 0 {
        cancel_both().await;
    }
    let (mut source_end, mut target_end) = (None, None);
    let mut give_up: Option<Instant> = None;
    {
        // what goes through this process is counted here
        let theirs: Told<'_> = if relay.is_some() { &|_| {} } else { told };
        let counted = |p| told(News::Progress(p));
        let mut relay = relay.map(|relay| relay.run(&counted).boxed());
        let source_ends = followed(&mut source, &from, theirs);
        let target_ends = followed(&mut target, &to, theirs);
        tokio::pin!(source_ends, target_ends);
        while source_end.is_none() || target_end.is_none() {
            tokio::select! {
                end = &mut source_ends, if source_end.is_none() => source_end = Some(end),
                end = &mut target_ends, if target_end.is_none() => target_end = Some(end),
                Ok(()) = cancel.changed() => {
                    relay = None;
                    cancel_both().await;
                }
                end = passed(&mut relay) => {
                    relay = None;
                    if let Err(error) = end {
                        tracing::debug!(%error, "a relay broke; both ends notice");
                    }
                }
                () = sleep_until(give_up.unwrap_or_else(Instant::now)), if give_up.is_some() => break,
            }
            if source_end == Some(Ended::Succeeded) || target_end == Some(Ended::Succeeded) {
                told(News::Ended);
            }
            let broken = |end: &Option<Ended>| end.as_ref().is_some_and(|e| *e != Ended::Succeeded);
            let failed = |end: &Option<Ended>| matches!(end, Some(Ended::Failed(_)));
            if give_up.is_none() && (broken(&source_end) || broken(&target_end)) {
                give_up = Some(Instant::now() + COLLECT);
                // a refresh whose server does not answer may be about to end well
                let over = !refresh || failed(&source_end) || failed(&target_end);
                if over && (source_end.is_none() || target_end.is_none()) {
                    cancel_both().await;
                }
            }
        }
    }
    judge(&attempted, names, source_end, target_end)
}

/// What became of a transfer by its two ends. One that did not end hangs, or takes its time: the other end said why.
fn judge(attempted: &str, (source, target): (String, String), from: Option<Ended>, to: Option<Ended>) -> Result<()> {
    use Ended::{Failed, Succeeded, Unknown};
    let kind = match (&from, &to) {
        (Some(Succeeded), Some(Succeeded)) => return Ok(()),
        // the other end, to which nobody comes, may say that it reaches nobody
        (Some(Failed(m)), _) | (_, Some(Failed(m))) if kind_of(m) == FailureKind::Busy => FailureKind::Busy,
        (Some(Failed(m)), _) | (_, Some(Failed(m))) if no_way_there(m) => FailureKind::PeerUnreachable,
        // where one end says nothing the daemon or the link died, whatever the other says about that
        (Some(Unknown(_)), _) | (_, Some(Unknown(_))) => FailureKind::Unknown,
        _ => FailureKind::Refused,
    };
    let said: Vec<String> = [(target, to), (source, from)]
        .into_iter()
        .filter_map(|(name, end)| match end? {
            Succeeded => None,
            Failed(message) | Unknown(message) => Some(format!("{name}: {message}")),
        })
        .collect();
    Err(ServerError::new(kind, attempted, said.join("; ")))
}

/// Ends a transfer. Usually only the end that waited can be cancelled; the other one fails by the lost connection.
async fn cancel_transfer(source: &dyn Server, from: &OperationId, target: &dyn Server, to: &OperationId) {
    let (a, b) = futures::future::join(source.cancel(from), target.cancel(to)).await;
    if let (Err(a), Err(b)) = (a, b) {
        tracing::debug!(source = %a, target = %b, "neither end of the transfer can be cancelled");
    }
}

/// The end of a relay; none never ends.
async fn passed(relay: &mut Option<BoxFuture<'_, Result<()>>>) -> Result<()> {
    match relay {
        Some(relay) => relay.await,
        None => pending().await,
    }
}

type Opened = (OperationId, OperationId, Option<Relay>);

/// Opens the end that waits, then at once the one that connects (or, for a relay, waits too). If the second fails, the
/// first is cancelled, unless both may be at work on a refresh: one that is cancelled as it ends can leave a copy that does
/// not start.
async fn open(transfer: Transfer, source: &Side, target: &Side) -> Result<Opened> {
    let peer = |side: &Side, channel: Channel| Peer {
        address: side.address.clone(),
        certificate: side.certificate.clone(),
        channel,
    };
    let Transfer {
        mode,
        from,
        running: _,
        mut offer,
        mut accept,
    } = transfer;
    let (first, waiting, second) = match mode {
        Wiring::Pull => {
            let channel = source.server.offer(&from, &offer).await?;
            let waiting = channel.clone();
            accept.pull_from = Some(peer(source, channel));
            (source, waiting, target.server.accept(&accept).await)
        }
        Wiring::Push => {
            let channel = target.server.accept(&accept).await?;
            let waiting = channel.clone();
            offer.push_to = Some(peer(target, channel));
            (target, waiting, source.server.offer(&from, &offer).await)
        }
        Wiring::Relay => {
            let waiting = source.server.offer(&from, &offer).await?;
            (source, waiting, target.server.accept(&accept).await)
        }
    };
    let connected = match second {
        Ok(channel) if mode == Wiring::Relay => {
            let (a, b) = (source.server.as_ref(), target.server.as_ref());
            match Relay::open((a, &waiting), (b, &channel)).await {
                Ok(relay) => Ok((channel.operation, Some(relay))),
                Err(error) => {
                    cancel_transfer(a, &waiting.operation, b, &channel.operation).await;
                    return Err(error);
                }
            }
        }
        Ok(channel) => Ok((channel.operation, None)),
        Err(error) => Err(error),
    };
    match connected {
        Ok((operation, relay)) if mode == Wiring::Push => Ok((operation, waiting.operation, relay)),
        Ok((operation, relay)) => Ok((waiting.operation, operation, relay)),
        Err(error) if accept.refresh && error.kind == FailureKind::Unknown => Err(error),
        Err(error) => {
            if let Err(e) = first.server.cancel(&waiting.operation).await {
                tracing::debug!(error = %e, "the end that waits cannot be cancelled; it ends by itself");
            }
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_has_not_ended_says_nothing_about_why() {
        let names = || ("l1".to_owned(), "t1".to_owned());
        let late = || Some(Ended::Failed("Timed out waiting for migration connections".to_owned()));
        let error = judge("transfer", names(), late(), None).expect_err("one end failed");
        assert_eq!(error.kind, FailureKind::Refused);
        assert_eq!(error.message, "l1: Timed out waiting for migration connections");
        let busy = Some(Ended::Failed(
            "Failed migration on source: Instance is busy running a \"stop\" operation".to_owned(),
        ));
        let alone = "Failed getting migration target filesystem connection: websocket: bad handshake";
        let error = judge("transfer", names(), busy, Some(Ended::Failed(alone.to_owned()))).expect_err("both failed");
        assert_eq!(error.kind, FailureKind::Busy);
        let lost = Some(Ended::Unknown("no answer".to_owned()));
        let error = judge("transfer", names(), late(), lost).expect_err("both failed");
        assert_eq!(error.kind, FailureKind::Unknown);
    }

    #[test]
    fn the_bytes_of_several_volumes_add_up() {
        let mut meter = Meter::default();
        let told = |bytes| Progress {
            bytes,
            ..Progress::default()
        };
        let all: Vec<i64> = [10, 30, 5, 20].into_iter().map(|b| meter.all(told(b)).bytes).collect();
        assert_eq!(all, [10, 30, 35, 50]);
    }
}
