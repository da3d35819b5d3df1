//! A transfer through this process: every channel that the target waits on is connected with the source's channel of the
//! same name, and what either end says goes to the other, piece by piece. Memory does not grow: a piece is taken only
//! when the one before has gone out, so the slower end holds the faster one back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use berth_core::server::{Channel, FailureKind, Progress, Result, Server, ServerError, Socket};
use futures::future::{join, join_all, try_join};
use futures::{SinkExt, StreamExt};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

/// How often progress is told.
const TICK: Duration = Duration::from_secs(1);

/// Between two channels of one end. The daemon of LXD 5.0 looks after each whether all are there, without a lock; if two arrive in
/// the same moment, both find that so, and it dies (*seen* under load: `panic: close of closed channel`, migrate.go, `Connect`).
const APART: Duration = Duration::from_millis(50);

/// The connected channels of a transfer. Dropping it breaks all of them, and both ends fail.
pub(crate) struct Relay {
    pairs: Vec<(Socket, Socket)>,
}

impl Relay {
    /// Connects to both ends, which wait for all their channels for ten seconds only.
    pub async fn open(source: (&dyn Server, &Channel), target: (&dyn Server, &Channel)) -> Result<Self> {
        if target.1.secrets.is_empty() {
            let attempted = format!("relay operation {} to {}", source.1.operation, target.1.operation);
            return Err(ServerError::new(
                FailureKind::Protocol,
                attempted,
                "the target waits on no channel",
            ));
        }
        let names: Vec<&str> = target.1.secrets.keys().map(String::as_str).collect();
        let (source, target) = try_join(plug(source, &names), plug(target, &names)).await?;
        let pairs = source.into_iter().zip(target).collect();
        Ok(Self { pairs })
    }

    /// Passes on until both ends have closed everything. Says what broke; whether the transfer succeeded say the ends.
    pub async fn run(self, progress: &(dyn Fn(Progress) + Send + Sync)) -> Result<()> {
        let sent = AtomicU64::new(0);
        let channels = join_all(
            self.pairs
                .into_iter()
                .map(|(source, target)| channel(source, target, &sent)),
        );
        tokio::select! {
            ends = channels => ends.into_iter().collect(),
            () = tell(&sent, progress) => Ok(()),
        }
    }
}

/// Connects to all channels of one end, one after the other.
async fn plug((server, waiting): (&dyn Server, &Channel), names: &[&str]) -> Result<Vec<Socket>> {
    let mut sockets = Vec::with_capacity(names.len());
    for name in names {
        if !sockets.is_empty() {
            sleep(APART).await;
        }
        sockets.push(server.connect(waiting, name).await?);
    }
    Ok(sockets)
}

/// Tells how much went from the source to the target; never ends.
async fn tell(sent: &AtomicU64, progress: &(dyn Fn(Progress) + Send + Sync)) {
    let (mut ticks, begun) = (interval(TICK), Instant::now());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = (begun, 0);
    loop {
        let now = ticks.tick().await;
        let bytes = sent.load(Ordering::Relaxed);
        let seconds = now.saturating_duration_since(before.0).as_secs_f64();
        if bytes == before.1 || seconds == 0.0 {
            continue;
        }
        // the conversions saturate
        let rate = (bytes - before.1) as f64 / seconds;
        progress(Progress {
            bytes: i64::try_from(bytes).unwrap_or(i64::MAX),
            bytes_per_second: rate as i64,
            percent: None,
        });
        before = (now, bytes);
    }
}

/// Both directions of one channel.
async fn channel(source: Socket, target: Socket, sent: &AtomicU64) -> Result<()> {
    let back = AtomicU64::new(0);
    let (there, back) = join(
        forward(source.incoming, target.outgoing, sent),
        forward(target.incoming, source.outgoing, &back),
    )
    .await;
    there.and(back)
}

/// One direction: until the one end has nothing more to say, which the other is told by the end of its connection. An end
/// that does not listen any more is still heard out: a connection that is closed with something unread in it may take
/// what is on its way with it.
async fn forward(
    mut from: futures::stream::BoxStream<'static, Result<Vec<u8>>>,
    mut to: std::pin::Pin<Box<dyn futures::Sink<Vec<u8>, Error = ServerError> + Send>>,
    count: &AtomicU64,
) -> Result<()> {
    let mut deaf = None;
    let mut end = Ok(());
    while let Some(piece) = from.next().await {
        let piece = match piece {
            Ok(piece) => piece,
            Err(e) => {
                end = Err(e);
                break;
            }
        };
        if deaf.is_some() {
            continue;
        }
        let bytes = piece.len() as u64;
        match to.send(piece).await {
            Ok(()) => {
                count.fetch_add(bytes, Ordering::Relaxed);
            }
            Err(e) => deaf = Some(e),
        }
    }
    // the other end may be gone already
    let _ = to.close().await;
    deaf.map_or(end, Err)
}
