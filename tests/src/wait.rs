//! Waiting for a condition with a deadline, never for a time.

use std::future::Future;
use std::time::{Duration, Instant};

/// Between two looks: a moment at first, then a twentieth of the time waited so far, since each look costs the servers work.
const PAUSE: Duration = Duration::from_millis(40);
const LONGEST: Duration = Duration::from_millis(400);

/// Long enough for a move, a copy, or a look at Git on a machine that does many things at once. What hangs is found by it;
/// how fast something is, benches say.
pub const SOON: Duration = Duration::from_secs(240);

/// Asks `probe` until it answers `Ok`; after `within` the test fails and says what was waited for and what was seen last.
pub async fn wait_for<T, F>(what: &str, within: Duration, mut probe: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let start = Instant::now();
    loop {
        match probe().await {
            Ok(value) => return value,
            Err(seen) if start.elapsed() >= within => {
                panic!("waited {within:?} for {what}; last seen: {seen}");
            }
            Err(_) => tokio::time::sleep((start.elapsed() / 20).clamp(PAUSE, LONGEST)).await,
        }
    }
}

/// As [`wait_for`], with a yes-or-no question.
pub async fn wait_until<F>(what: &str, within: Duration, mut probe: impl FnMut() -> F)
where
    F: Future<Output = bool>,
{
    wait_for(what, within, || {
        let answer = probe();
        async move { if answer.await { Ok(()) } else { Err("not so".to_owned()) } }
    })
    .await;
}
