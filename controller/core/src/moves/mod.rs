//! The move protocol as a pure function: a record and what is seen of both ends go in, the next record and at most one
//! effect come out (design "the move protocol"). Steps are named after what is true when they are entered.

mod backup;
mod body;
mod cold;
mod criu;
mod effect;
mod finish;
mod internal;
mod kept;
mod live;
mod pass;
pub mod rounds;
mod said;
mod undo;
mod verify;
mod view;
mod warm;

use berth_api::moves::MoveEnd;
use berth_api::{Method, Step, Transfer as TransferMode};
use jiff::Timestamp;

pub use body::{incoming_definition, plain_config};
pub use criu::{how_to_install, without_criu};
pub use effect::{Backup, Effect, EffectKind, End, Request, Transfer, Wiring};
pub use kept::{has_kept, is_kept, kept_place};
pub use live::between_servers;
pub use pass::{Look, Transition, measured};
pub use said::{close, trouble};
pub(crate) use said::{noted, one_line};
pub use view::{Copy, EndView, Outcome, Read, Spent, StopRules, Task, View, Wish, reads};

use crate::records::Record;
use pass::Pass;

/// Whether the server or cluster moves the instance itself.
pub fn is_internal(record: &Record) -> bool {
    record.spec.transfer == TransferMode::Internal
}

/// Whether the instance is copied while it runs, and stopped for the last difference only.
pub fn is_warm(record: &Record) -> bool {
    record.spec.method == Method::Warm && !is_internal(record)
}

/// Whether the instance stays where it is: it is stopped, changed and started again.
pub fn is_restart(record: &Record) -> bool {
    let place = |end: &MoveEnd| (end.fingerprint.clone(), end.location());
    is_internal(record) && place(&record.spec.from) == place(&record.spec.to)
}

/// The next step of a move: the record to write first, then at most one effect, and when to look again.
///
/// A record with an unknown step is left alone: a newer controller wrote it.
pub fn step(record: &Record, view: &View, now: Timestamp) -> Transition {
    let mut next = next(record, view, now);
    if next.record != *record {
        said::say(&mut next.record, now);
    }
    next
}

fn next(record: &Record, view: &View, now: Timestamp) -> Transition {
    let mut pass = Pass::new(record, view, now);
    if record.finished() {
        return if has_kept(record) {
            kept::end(&mut pass)
        } else {
            pass.rest()
        };
    }
    let Some(step) = pass.step() else { return pass.rest() };
    if let Some(waiting) = pass.wait_for_task(step) {
        return waiting;
    }
    if step == Step::Undoing {
        return undo::undoing(&mut pass);
    }
    if is_internal(record) {
        return internal::step(&mut pass, step);
    }
    match step {
        Step::Accepted => cold::accepted(&mut pass),
        Step::Marked | Step::Precopied if is_warm(record) => warm::running(&mut pass),
        Step::Marked => cold::marked(&mut pass),
        Step::Stopped => stopped(&mut pass),
        Step::Transferred => verify::transferred(&mut pass),
        Step::Verified => verify::verified(&mut pass),
        Step::Committed => finish::committed(&mut pass),
        Step::Started => finish::started(&mut pass),
        Step::Retired => finish::retired(&mut pass),
        Step::Restoring => live::restoring(&mut pass),
        Step::Precopied | Step::Cleaned | Step::Undoing => pass.rest(),
    }
}

/// The source is stopped and guarded: its data are sent, all of them or the last difference.
fn stopped(p: &mut Pass<'_>) -> Transition {
    if is_warm(&p.record) || kept::refreshes(&p.record) {
        warm::stopped(p)
    } else {
        cold::stopped(p)
    }
}
