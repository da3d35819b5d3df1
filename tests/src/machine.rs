//! What the machine is like while tests run: no more begin than it has room for, and a failure on one that stood still is
//! told from others.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Seek, Write};
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the machine is felt.
const EVERY: Duration = Duration::from_millis(500);
/// What takes that much longer than it should is remembered.
const LONG: Duration = Duration::from_secs(1);

/// Processes that run or wait for a processor, for each processor: with so many the machine has enough to do.
const FULL: usize = 8;
/// That many of the last looks at it count.
const LOOKS: usize = 8;

/// How many of them there were, in the last few seconds.
static RUNNABLE: Mutex<VecDeque<usize>> = Mutex::new(VecDeque::new());

/// When something took too long, what, and by how much.
static STALLS: Mutex<Vec<(Instant, &str, Duration)>> = Mutex::new(Vec::new());

/// Begins to feel the machine, in a thread of its own that ends with the process: it sleeps, and writes a few bytes to a disk.
pub(crate) fn watch(folder: PathBuf) {
    std::thread::spawn(move || {
        // made by whoever comes first
        let _ = std::fs::create_dir_all(&folder);
        let path = folder.join(format!("machine-{}", std::process::id()));
        let mut disk = File::create(&path).ok();
        // without a name it vanishes with the process
        let _ = std::fs::remove_file(&path);
        loop {
            let begun = Instant::now();
            std::thread::sleep(EVERY);
            note("nothing ran", begun, EVERY);
            count();
            let begun = Instant::now();
            if let Some(disk) = &mut disk {
                let _ = disk
                    .rewind()
                    .and_then(|()| disk.write_all(b"felt"))
                    .and_then(|()| disk.sync_data());
            }
            note("the disk took no byte", begun, Duration::ZERO);
        }
    });
}

/// Counts who wants a processor. In /proc/loadavg, see proc(5), that is the first half of the fourth word.
fn count() {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let all = load.split([' ', '/']).nth(3).and_then(|n| n.parse().ok());
    let mut runnable = RUNNABLE.lock().unwrap_or_else(PoisonError::into_inner);
    runnable.push_front(all.unwrap_or_default());
    runnable.truncate(LOOKS);
}

/// Whether one test more would only make all of them slower.
fn is_full() -> bool {
    let runnable = RUNNABLE.lock().unwrap_or_else(PoisonError::into_inner);
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    runnable.len() == LOOKS && runnable.iter().sum::<usize>() >= FULL * cores * LOOKS
}

/// Lets one test after the other begin: at once where no other one of this process runs, else when the machine has room for it.
pub(crate) struct Gate {
    running: AtomicUsize,
    turn: tokio::sync::Mutex<()>,
}

/// A test that runs; dropped when it has ended.
pub(crate) struct Entered<'a>(&'a AtomicUsize);

impl Gate {
    pub(crate) const fn new() -> Gate {
        Gate {
            running: AtomicUsize::new(0),
            turn: tokio::sync::Mutex::const_new(()),
        }
    }

    pub(crate) async fn enter(&self) -> Entered<'_> {
        let _turn = self.turn.lock().await;
        while self.running.load(Ordering::SeqCst) > 0 && is_full() {
            tokio::time::sleep(EVERY).await;
        }
        self.running.fetch_add(1, Ordering::SeqCst);
        Entered(&self.running)
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn note(what: &'static str, begun: Instant, due: Duration) {
    let late = begun.elapsed().saturating_sub(due);
    if late >= LONG {
        stalls().push((begun, what, late));
    }
}

fn stalls() -> std::sync::MutexGuard<'static, Vec<(Instant, &'static str, Duration)>> {
    STALLS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How busy the machine is, and what took too long since then.
pub(crate) fn since(then: Instant) -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let pressure = |what: &str| {
        let text = std::fs::read_to_string(format!("/proc/pressure/{what}")).unwrap_or_default();
        let minute = text
            .split_whitespace()
            .find_map(|word| word.strip_prefix("avg60="))
            .unwrap_or("?");
        format!("{what} {minute} %")
    };
    let waited = ["cpu", "io", "memory"].map(pressure).join(", ");
    let stalls = stalls();
    let told = stalls
        .iter()
        .filter(|(at, _, _)| *at >= then)
        .map(|(at, what, late)| format!("; {what} for {late:.1?} until {:.0?} ago", (*at + *late).elapsed()));
    format!(
        "machine: load {}, waited for {waited}{}",
        load.trim(),
        told.collect::<String>()
    )
}
