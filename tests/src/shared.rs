//! What all tests of a process share: the runtime, folders, and servers that end when the process does.
//!
//! `tests/run.sh` starts one control plane and one lab for all suites and names them in `BERTH_KUBE_DIR` and
//! `BERTH_LAB_DIR`; a suite that is run by itself starts its own on first use.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{LazyLock, Mutex, PoisonError};

/// One runtime for all tests of a process: connections of the shared clients belong to it.
pub(crate) static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a tokio runtime can be made")
});

static KEEPERS: Mutex<Vec<Keeper>> = Mutex::new(Vec::new());

/// The checkout.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ has a parent")
        .to_owned()
}

/// Cargo's folder, usually `target`.
pub(crate) fn target_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("the test program knows its path");
    // TARGET/PROFILE/deps/PROGRAM
    exe.ancestors()
        .nth(3)
        .map_or_else(|| root().join("target"), Path::to_owned)
}

/// Where logs go.
pub(crate) fn work_dir() -> PathBuf {
    target_dir().join("berth-tests")
}

/// A few random letters: names of different runs never meet, even on shared servers.
pub(crate) fn random_letters(count: usize) -> String {
    use std::hash::{BuildHasher, Hasher};
    let mut number = std::collections::hash_map::RandomState::new().build_hasher().finish();
    (0..count)
        .map(|_| {
            let letter = b"abcdefghijklmnopqrstuvwxyz"[usize::try_from(number % 26).unwrap_or(0)];
            number /= 26;
            char::from(letter)
        })
        .collect()
}

/// A number that no other living process of this machine has taken under `what`. The lock lives as long as the file is open.
pub(crate) fn take_number(what: &str, from: u16, to: u16) -> io::Result<(u16, File)> {
    for number in from..=to {
        let path = std::env::temp_dir().join(format!("{what}-{number}.lock"));
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        if file.try_lock().is_ok() {
            return Ok((number, file));
        }
    }
    Err(io::Error::other(format!("all numbers {from}-{to} of {what} are taken")))
}

/// A child that runs `script down` once this process has gone, in whatever way: it waits for the end of its input.
struct Keeper {
    child: Child,
    input: Option<ChildStdin>,
}

/// Makes `script down` happen after this process; `lock`, if any, is held until that is done.
pub(crate) fn end_with_this_process(script: &Path, env: &[(&str, String)], lock: Option<&File>) -> io::Result<()> {
    let mut command = Command::new("bash");
    command
        .arg("-c")
        .arg("trap '' INT HUP TERM; cat >/dev/null; \"$0\" down 2>/dev/null")
        .arg(script)
        .envs(env.iter().map(|(key, value)| (*key, value)))
        .stdin(Stdio::piped())
        // an inherited open file keeps its lock
        .stdout(lock.map_or_else(|| Ok(Stdio::null()), |file| file.try_clone().map(Stdio::from))?)
        .stderr(Stdio::null())
        .process_group(0);
    let mut child = command.spawn()?;
    let input = child.stdin.take();
    KEEPERS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(Keeper { child, input });
    Ok(())
}

/// Ends what [`end_with_this_process`] announced, now, and waits for it.
pub(crate) fn end_servers() {
    let mut keepers = std::mem::take(&mut *KEEPERS.lock().unwrap_or_else(PoisonError::into_inner));
    for keeper in &mut keepers {
        drop(keeper.input.take());
    }
    for keeper in &mut keepers {
        let _ = keeper.child.wait();
    }
}

/// Runs a program to its end; its output, or what went wrong with the last lines of its errors.
pub(crate) async fn run(mut command: tokio::process::Command) -> Result<String, String> {
    let shown = format!("{:?}", command.as_std());
    let output = command
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| format!("cannot start {shown}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = errors.trim().lines().collect();
    Err(format!(
        "{shown}: {}: {}",
        output.status,
        lines[lines.len().saturating_sub(8)..].join("\n")
    ))
}
