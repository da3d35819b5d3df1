//! A transfer by backup: made on the source, kept in the controller's scratch folder (or streamed, where the source can),
//! and imported on the target. It counts only if both servers were seen to succeed.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use berth_core::moves::Backup;
use berth_core::server::{Data, Export, FailureKind, Progress, Result, ServerError};
use futures::StreamExt;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::transfer::{Side, finished};

/// After that the source deletes a backup by itself, should nobody be left to do it.
const KEEP: Duration = Duration::from_secs(24 * 3600);
/// How often progress is told.
const TICK: Duration = Duration::from_secs(1);
/// Every backup that is streamed ends in that many zeros: the end of a tar archive. One that was cut off does not.
const TAR_END: usize = 1024;

/// Where backups are kept on their way. One per process.
#[async_trait]
pub trait Scratch: Send + Sync {
    /// Keeps all of `data`, and gives it back when it is complete. What is given back takes no more room once it is
    /// read or dropped. Fails with [`FailureKind::ScratchFull`] where there is too little room.
    async fn keep(&self, data: Data) -> Result<Data>;
}

/// Brings a backup of the one end to the other. `cancel` changes when somebody wants it cancelled.
pub(crate) async fn run(
    backup: Backup,
    source: &Side,
    target: &Side,
    scratch: Option<Arc<dyn Scratch>>,
    mut cancel: watch::Receiver<u32>,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<()> {
    let attempted = format!(
        "bring a backup of {} on {} to {} as {}",
        backup.from, source.name, target.name, backup.import.at
    );
    let passed = Arc::new(AtomicI64::new(0));
    let wanted = cancel.wait_for(|n| *n > 0);
    tokio::select! {
        done = carry(backup, source, target, scratch, &passed) => done,
        _ = wanted => Err(ServerError::new(FailureKind::Unknown, attempted, "cancelled")),
        () = tell(&passed, progress) => Ok(()),
    }
}

async fn carry(
    backup: Backup,
    source: &Side,
    target: &Side,
    scratch: Option<Arc<dyn Scratch>>,
    passed: &Arc<AtomicI64>,
) -> Result<()> {
    let Backup {
        from,
        export,
        instance_only,
        import,
    } = backup;
    let data = match &export {
        Export::Direct { .. } => whole(source.server.export(&from, &export).await?),
        Export::Kept(name) => {
            let scratch = scratch.ok_or_else(|| {
                let why = "the controller has no scratch folder (--scratch-dir)";
                ServerError::new(FailureKind::ScratchFull, format!("keep the backup of {from}"), why)
            })?;
            let made = source.server.back_up(&from, name, instance_only, KEEP).await?;
            let attempted = format!("back up {from} on {}", source.name);
            finished(source.server.as_ref(), &attempted, &made, None).await?;
            let data = source.server.export(&from, &export).await?;
            scratch.keep(counted(data, passed)).await?
        }
    };
    passed.store(0, Ordering::Relaxed);
    let attempted = format!("import {} on {}", import.at, target.name);
    let importing = target.server.import(&import, counted(data, passed)).await?;
    finished(target.server.as_ref(), &attempted, &importing, None).await
}

/// The same data, counted as they are taken.
fn counted(data: Data, passed: &Arc<AtomicI64>) -> Data {
    let passed = passed.clone();
    let bytes = data.bytes.inspect(move |piece| {
        let n = piece.as_ref().map_or(0, Vec::len);
        passed.fetch_add(i64::try_from(n).unwrap_or(i64::MAX), Ordering::Relaxed);
    });
    Data {
        size: data.size,
        bytes: bytes.boxed(),
    }
}

/// The same data, but for their end, which is held back until it is known to be one: a server that fails in the middle
/// simply stops.
fn whole(data: Data) -> Data {
    let state = (data.bytes, Vec::new(), false);
    let bytes = futures::stream::unfold(state, |(mut bytes, mut held, over)| async move {
        if over {
            return None;
        }
        loop {
            match bytes.next().await {
                Some(Ok(piece)) => {
                    held.extend_from_slice(&piece);
                    if held.len() > TAR_END {
                        let rest = held.split_off(held.len() - TAR_END);
                        return Some((Ok(held), (bytes, rest, false)));
                    }
                }
                Some(Err(e)) => return Some((Err(e), (bytes, Vec::new(), true))),
                None if held.len() == TAR_END && held.iter().all(|b| *b == 0) => {
                    return Some((Ok(held), (bytes, Vec::new(), true)));
                }
                None => {
                    let why = "it ended before its end: the server failed while it was made";
                    let cut = ServerError::new(FailureKind::Unknown, "stream a backup", why);
                    return Some((Err(cut), (bytes, Vec::new(), true)));
                }
            }
        }
    });
    Data {
        size: data.size,
        bytes: bytes.boxed(),
    }
}

/// Tells how much has gone; never ends.
async fn tell(passed: &AtomicI64, progress: &(dyn Fn(Progress) + Send + Sync)) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = (Instant::now(), 0);
    loop {
        let now = ticks.tick().await;
        let bytes = passed.load(Ordering::Relaxed);
        let seconds = now.saturating_duration_since(before.0).as_secs_f64();
        if bytes != before.1 && seconds > 0.0 {
            // the conversions saturate; the count begins anew with the import
            let rate = (bytes - before.1).max(0) as f64 / seconds;
            progress(Progress {
                bytes,
                bytes_per_second: rate as i64,
                percent: None,
            });
            before = (now, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(pieces: &[&[u8]]) -> Data {
        let pieces: Vec<_> = pieces.iter().map(|p| Ok(p.to_vec())).collect();
        Data {
            size: None,
            bytes: futures::stream::iter(pieces).boxed(),
        }
    }

    async fn read(data: Data) -> Result<Vec<u8>> {
        let pieces: Vec<Result<Vec<u8>>> = data.bytes.collect().await;
        pieces.into_iter().collect::<Result<Vec<_>>>().map(|p| p.concat())
    }

    #[tokio::test]
    async fn a_stream_that_was_cut_off_is_never_sent_to_its_end() {
        let (end, begin) = ([0; TAR_END], [7; 3000]);
        let complete = read(whole(data(&[&begin, &end[..100], &end[100..]]))).await;
        assert_eq!(complete.map(|c| c.len()), Ok(3000 + TAR_END));
        for cut in [&[&begin[..]][..], &[&begin, &end[1..]], &[], &[&end[1..]]] {
            assert!(read(whole(data(cut))).await.is_err());
        }
    }
}
