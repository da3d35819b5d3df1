//! InstanceCopies: when a copy is due, and how it is made, refreshed and removed, as a pure function like that of the
//! moves. The durable record is the object's own status; whatever is asked of a server is written there before.
//!
//! A copy rests under its real name, unguarded, marked with the uuid of what it is a copy of. While data arrive it is
//! guarded and has a name that nobody else ever uses, so that neither a person nor a late request can mistake it.

mod body;
mod due;
mod pass;
mod record;
mod remove;
mod report;
mod rest;
mod send;
mod settle;
mod source;

use jiff::Timestamp;

use crate::moves::Effect;
pub use pass::CopyView;
pub use record::{CopyRecord, CopyRecords};
pub use report::{Told, told};
pub use source::{Sought, SourcePlacement, reads, sought};

pub use crate::moves::Look;
use pass::Pass;

/// How far the work on a copy is. Each is true when it is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It was decided; nothing has been asked of a server.
    Accepted,
    /// The existing copy is guarded and under its unique name.
    Held,
    /// The snapshot that the transfer counts on exists, where one is needed.
    Snapshotted,
    /// Both servers were seen to have succeeded: the copy is complete.
    Transferred,
    /// The copy has its real name again.
    Named,
    /// A first copy is given up: what is there of it is deleted.
    Undoing,
    /// The object was deleted, and the copy goes with it.
    Removing,
}

impl Step {
    const ALL: [Self; 7] = [
        Self::Accepted,
        Self::Held,
        Self::Snapshotted,
        Self::Transferred,
        Self::Named,
        Self::Undoing,
        Self::Removing,
    ];

    /// The name as written in objects.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::Held => "Held",
            Self::Snapshotted => "Snapshotted",
            Self::Transferred => "Transferred",
            Self::Named => "Named",
            Self::Undoing => "Undoing",
            Self::Removing => "Removing",
        }
    }

    /// The step of that name.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.as_str() == text)
    }
}

/// What to do with the record, and then.
#[derive(Clone, Debug)]
pub struct Transition {
    /// The record as it is to be; write it before anything else if it differs.
    pub record: CopyRecord,
    /// What to ask the servers for afterwards.
    pub effect: Option<Effect>,
    /// When to look again.
    pub look: Look,
    /// Whether the object must not vanish before the next step.
    pub hold: bool,
}

/// The next step of a copy: the record to write first, then at most one effect, and when to look again.
///
/// Work at an unknown step is left alone: a newer controller wrote it.
pub fn step(record: &CopyRecord, view: &CopyView, now: Timestamp) -> Transition {
    let mut next = next(record, view, now);
    if next.record != *record {
        next.record.observe();
    }
    next
}

fn next(record: &CopyRecord, view: &CopyView, now: Timestamp) -> Transition {
    let mut pass = Pass::new(record, view, now);
    let Some(work) = record.status.current.as_ref() else {
        return rest::rest(&mut pass);
    };
    let Some(step) = Step::parse(&work.step) else {
        return pass.leave();
    };
    if let Some(waiting) = pass.wait_for_task() {
        return waiting;
    }
    match step {
        Step::Accepted if work.refresh => send::hold(&mut pass),
        Step::Accepted | Step::Held => send::snapshot(&mut pass),
        Step::Snapshotted => send::transfer(&mut pass),
        Step::Transferred => settle::transferred(&mut pass),
        Step::Named => settle::named(&mut pass),
        Step::Undoing => remove::undoing(&mut pass),
        Step::Removing => remove::removing(&mut pass),
    }
}
