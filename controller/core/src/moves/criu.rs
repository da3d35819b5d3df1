//! What is different where the running state of a container moves (CRIU): the memory is copied in rounds if the placement
//! says so, the source's processes end with the success of the restore, and what was restored is looked at from inside
//! before it counts, since servers report success for a container whose files belong to nobody.

use std::time::Duration;

use berth_api::{InstanceType, MicroTime, Reason, Step};

use super::effect::{EffectKind, End, Request};
use super::live::between_servers;
use super::pass::{Pass, Transition};
use super::view::{Copy, EndView};
use crate::model::{Change, Config, MIGRATION_INCREMENTAL, Product};
use crate::records::Record;
use crate::server::ServerError;

/// After a restore the source reads Running until its daemon has noticed that the processes ended: 0.7 s on an idle machine.
const ENDING: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_millis(200);
/// How often somebody who does not answer is asked what is inside.
const LOOKS: i32 = 5;

/// Whether the running state of a container moves.
pub(super) fn is_container(record: &Record) -> bool {
    record.spec.instance_type == InstanceType::Container && between_servers(record)
}

/// The keys that make CRIU copy memory in rounds, as the placement wants them; none where it does not.
fn rounds(record: &Record) -> Vec<(&'static str, String)> {
    let live = record.spec.live.unwrap_or_default();
    if !is_container(record) || !live.incremental_memory {
        return Vec::new();
    }
    let [memory, goal, iterations] = MIGRATION_INCREMENTAL;
    vec![
        (memory, "true".to_owned()),
        (goal, live.goal.to_string()),
        (iterations, live.iterations.to_string()),
    ]
}

/// Whether memory is copied in rounds before the freeze. Servers do not tell when the last of them begins.
pub(super) fn in_rounds(record: &Record) -> bool {
    !rounds(record).is_empty()
}

/// Remembers what the keys were, and sets them with the marks.
pub(super) fn set_rounds(p: &mut Pass<'_>, config: &Config, change: &mut Change) {
    for (key, value) in rounds(&p.record) {
        p.keep(key, config.get(key));
        change.config.insert(key.to_owned(), value);
    }
}

/// Puts the keys back in a whole configuration.
pub(super) fn put_back(record: &Record, config: &mut Config) {
    for (key, value) in kept(record) {
        match value {
            Some(value) => config.insert(key.to_owned(), value.to_owned()),
            None => config.remove(key),
        };
    }
}

/// The same in a merge, where nothing unsets a key.
pub(super) fn merge_back(record: &Record, change: &mut Change) {
    let kept = kept(record).map(|(key, value)| (key.to_owned(), value.unwrap_or_default().to_owned()));
    change.config.extend(kept);
}

fn kept(record: &Record) -> impl Iterator<Item = (&str, Option<&str>)> {
    let ours = |key: &str| MIGRATION_INCREMENTAL.contains(&key);
    let all = record.status.put_back.iter();
    all.filter(move |p| ours(&p.key))
        .map(|p| (p.key.as_str(), p.value.as_deref()))
}

/// From the restore on there is no way back that does not end the running state, and nobody has asked for that.
pub(super) fn is_restored(record: &Record) -> bool {
    is_container(record) && record.status.transferred.is_some()
}

/// The only one that may run is where nobody answers: that is said, once.
pub(super) fn target_silent(p: &mut Pass<'_>, message: &str) {
    if is_restored(&p.record) && p.record.status.last_error.is_none() {
        p.note(Reason::ServerUnreachable, message, None);
    }
}

/// The source's processes have ended with the restore, and its daemon has yet to notice.
pub(super) fn is_ending(p: &Pass<'_>, source: &Copy) -> Option<Transition> {
    let since = p.record.status.running_at.as_ref()?;
    let waited = p.now.duration_since(since.0).unsigned_abs();
    let ending = is_container(&p.record) && source.fresh.instance.may_run() && waited < ENDING;
    ending.then(|| p.wait(SOON))
}

/// The undo of a container whose copy runs already. The transfer was not cancelled in time: the processes have gone over,
/// and what they have written since is there alone, so the move goes on. Nothing of the undo has been done yet: the source
/// carries its mark. Only what was found broken is undone.
pub(super) fn too_late(p: &mut Pass<'_>) -> Option<Transition> {
    let broken = p
        .record
        .status
        .undo
        .as_ref()
        .is_some_and(|u| u.reason == Reason::MethodImpossible.as_str());
    if !is_container(&p.record) || broken {
        return None;
    }
    let source = p.source().filter(|s| p.carries_mark(&s.fresh.instance))?;
    let target = p.target().filter(|t| t.fresh.instance.may_run())?;
    if p.record.status.running_at.is_none() {
        p.record.status.running_at = Some(MicroTime(p.now));
        return Some(p.go_on());
    }
    if let Some(t) = is_ending(p, source) {
        return Some(t);
    }
    if source.fresh.instance.may_run() {
        return None;
    }
    p.record.status.transferred = Some(target.fresh.instance.at.name.clone());
    p.record.status.undo = None;
    p.advance(Step::Restoring);
    Some(p.go_on())
}

/// Looks inside what was restored. `None`: it is as it should be.
pub(super) fn look_inside(p: &mut Pass<'_>, target: &Copy) -> Option<Transition> {
    // one that somebody has stopped since boots there, with owners as they should be
    let to_be_seen = is_container(&p.record) && target.fresh.instance.may_run();
    if !to_be_seen || p.succeeded(EffectKind::Inspect) {
        return None;
    }
    let at = &target.fresh.instance.at;
    let Some(e) = p.failed(EffectKind::Inspect) else {
        return Some(p.ask(EffectKind::Inspect, End::Target, at, Request::Inspect));
    };
    if e.is_transient() && p.attempts() < LOOKS {
        return p.retry_after_failure(EffectKind::Inspect);
    }
    let (from, to) = (&p.record.spec.from, &p.record.spec.to);
    let message = format!(
        "{} arrived on {}, but {} {}; it ends there, and boots again on {}: what was in its memory is lost",
        from.name, to.server, at.name, e.message, from.server
    );
    let fix = "add Warm or Cold to spec.methods, or make the container privileged".to_owned();
    Some(p.undo(Reason::MethodImpossible, message, Some(fix)))
}

/// What a server says of a failed dump or restore: of CRIU's log, which hangs on it, the last errors alone.
pub(super) fn essence(message: &str) -> String {
    let begins = |word: &str| {
        let inner = word.strip_prefix('(').and_then(|w| w.strip_suffix(')'));
        inner.is_some_and(|w| w.contains('.') && w.parse::<f64>().is_ok())
    };
    let mut lines: Vec<Vec<&str>> = vec![Vec::new()];
    for word in message.split_whitespace() {
        if begins(word) {
            lines.push(Vec::new());
        } else if let Some(line) = lines.last_mut() {
            line.push(word);
        }
    }
    let mut said = lines.into_iter().map(|line| line.join(" "));
    let first = said.next().unwrap_or_default();
    // one that every server in a container prints, and goes on
    let errors = said.filter(|l| l.contains("Error (criu/") && !l.contains("RLIMIT_NOFILE"));
    let errors: Vec<String> = errors.collect();
    let last = errors.get(errors.len().saturating_sub(3)..).unwrap_or_default();
    [&[first], last].concat().join("; ")
}

/// Which end says that it has no CRIU, in either product's words.
pub fn without_criu(message: &str) -> Option<End> {
    let missing = message.contains("CRIU isn't installed") || message.contains("CRIU is not installed");
    let at_source = message.contains("on the source server");
    missing.then_some(if at_source { End::Source } else { End::Target })
}

/// One of the servers has no CRIU.
pub(super) fn missing(p: &mut Pass<'_>, end: End, e: &ServerError) -> Transition {
    let (server, view) = match end {
        End::Source => (&p.record.spec.from.server, &p.view.source),
        End::Target => (&p.record.spec.to.server, &p.view.target),
    };
    let product = match view {
        EndView::Reachable { facts, .. } => facts.product,
        EndView::Unreachable { .. } => Product::Incus,
    };
    let message = format!("{server} has no CRIU ({})", e.message);
    let fix = how_to_install(server, product);
    p.undo(Reason::CriuMissing, message, Some(fix))
}

/// The command that gives a server CRIU.
pub fn how_to_install(server: &str, product: Product) -> String {
    match product {
        Product::Incus => format!("on the host of {server}: apt install criu"),
        Product::Lxd => format!(
            "on the host of {server}: snap set lxd criu.enable=true && systemctl reload snap.lxd.daemon (without the snap: apt install criu)"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_log_the_last_errors_are_kept() {
        let log = "web-1: migration dump failed\n(00.000842) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self\n\
                   (00.10) Warn  (criu/x.c:1): nothing\n(00.149) Error (criu/sockets.c:628): sockets: Can't get 1:16 opt\n\
                   (00.15) Error (criu/cr-dump.c:2098): Dumping FAILED.";
        assert_eq!(
            essence(log),
            "web-1: migration dump failed; Error (criu/sockets.c:628): sockets: Can't get 1:16 opt; \
             Error (criu/cr-dump.c:2098): Dumping FAILED."
        );
        assert_eq!(essence("plain words (1) here"), "plain words (1) here");
    }
}
