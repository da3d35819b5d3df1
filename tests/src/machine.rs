//! What the machine was like while a test ran: a failure on one that stood still is told from others.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the machine is felt.
const EVERY: Duration = Duration::from_millis(500);
/// What takes that much longer than it should is remembered.
const LONG: Duration = Duration::from_secs(1);

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
