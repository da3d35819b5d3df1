//! What a step can ask for: one request (or, for a transfer, one pair of requests) to the servers. Data only; the
//! engine carries it out.

use std::time::Duration;

use jiff::Timestamp;

use crate::model::{Change, Definition, InstanceRef};
use crate::server::{AcceptRequest, Export, ImportRequest, OfferRequest, OperationId, Relocation};

/// Which end of a move a request goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum End {
    /// Where the instance is.
    Source,
    /// Where it goes.
    Target,
}

/// What an effect is for: the key under which its outcome is reported to the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EffectKind {
    /// Marks on the source.
    Mark,
    /// Graceful or forced stop of the source.
    Stop,
    /// Guard on the source.
    Guard,
    /// The source under a unique name (name guard).
    Hide,
    /// A snapshot of the source is taken.
    Snapshot,
    /// A snapshot that Berth took is deleted.
    RemoveSnapshot,
    /// The transfer of all data.
    Transfer,
    /// A container that was restored is looked at from inside.
    Inspect,
    /// The kept source of an earlier move becomes the copy, or goes back to that move.
    Adopt,
    /// The copy gets the configuration that the source had at the stop.
    Align,
    /// The backup on the source is deleted.
    DropBackup,
    /// The copy takes its real name.
    Name,
    /// The copy becomes the owner and loses its guard.
    Own,
    /// The cloud-init id is written back.
    CloudInit,
    /// The instance is started.
    Start,
    /// A guest that its daemon left frozen goes on.
    Unfreeze,
    /// The source is marked as retired.
    Retire,
    /// A copy on its way out takes a unique name.
    Rename,
    /// A copy is deleted.
    Remove,
    /// A running transfer is cancelled.
    Cancel,
    /// The source becomes what it was.
    Restore,
    /// Marks of a finished move are taken off.
    Unmark,
    /// The server moves the instance itself.
    Relocate,
    /// The configuration becomes what the placement declares.
    Adapt,
}

impl EffectKind {
    /// What is attempted, for people.
    pub fn as_str(self) -> &'static str {
        match self {
            EffectKind::Mark => "mark the source",
            EffectKind::Stop => "stop the source",
            EffectKind::Guard => "guard the source",
            EffectKind::Hide => "rename the source out of the way",
            EffectKind::Snapshot => "take a snapshot of the source",
            EffectKind::RemoveSnapshot => "delete a snapshot",
            EffectKind::Transfer => "transfer the instance",
            EffectKind::Inspect => "look inside the copy",
            EffectKind::Adopt => "take over the kept source",
            EffectKind::Align => "bring the copy's configuration up to date",
            EffectKind::DropBackup => "delete the backup on the source",
            EffectKind::Name => "give the copy its name",
            EffectKind::Own => "lift the guard of the target",
            EffectKind::CloudInit => "write the cloud-init id back",
            EffectKind::Start => "start the instance",
            EffectKind::Unfreeze => "unfreeze the source",
            EffectKind::Retire => "retire the source",
            EffectKind::Rename => "rename the copy that goes",
            EffectKind::Remove => "delete the copy that goes",
            EffectKind::Cancel => "cancel the transfer",
            EffectKind::Restore => "put the source back as it was",
            EffectKind::Unmark => "take the marks off",
            EffectKind::Relocate => "move the instance inside the server",
            EffectKind::Adapt => "change the configuration",
        }
    }
}

/// One request to the servers.
#[derive(Clone, Debug)]
pub struct Effect {
    /// What it is for.
    pub kind: EffectKind,
    /// Which end it goes to (for a transfer: the end that is asked last).
    pub end: End,
    /// The instance it is about.
    pub at: InstanceRef,
    /// The request itself.
    pub request: Request,
}

/// The request of an effect.
#[derive(Clone, Debug)]
pub enum Request {
    /// A conditional merge.
    Patch {
        /// What to merge.
        change: Change,
        /// The entity tag that must still hold.
        etag: String,
    },
    /// A conditional replacement.
    Put {
        /// The whole definition.
        definition: Definition,
        /// The entity tag that must still hold.
        etag: String,
    },
    /// Graceful stop; has no precondition, so it is sent only while the lease is safe.
    Stop {
        /// How long the guest has.
        timeout: Duration,
    },
    /// Forced stop; likewise.
    ForceStop,
    /// Let a frozen guest go on.
    Unfreeze,
    /// Start.
    Start {
        /// Resume the saved running state.
        stateful: bool,
    },
    /// A snapshot of the disk under a name that only this intent used.
    Snapshot {
        /// Its name.
        name: String,
        /// When the server is to delete it by itself.
        expires_at: Option<Timestamp>,
    },
    /// Delete a snapshot under a name that only this intent used.
    RemoveSnapshot {
        /// Its name.
        name: String,
    },
    /// Both ends of a transfer, back to back.
    Transfer(Box<Transfer>),
    /// A backup of the one end, brought to the other.
    Backup(Box<Backup>),
    /// Delete a backup, under a name that only this intent used.
    DropBackup {
        /// Its name.
        name: String,
    },
    /// Rename; has no precondition, so it is sent only while the lease is safe.
    Rename {
        /// The new name.
        name: String,
    },
    /// Delete, under a name that only this intent used.
    Remove,
    /// The same, and at the same time a conditional merge at the target: whether that was made the next look shows.
    RemoveAnd {
        /// The instance at the target.
        target: InstanceRef,
        /// What to merge.
        change: Change,
        /// The entity tag that must still hold.
        etag: String,
    },
    /// Look inside a running container; what is wrong in there is the failure.
    Inspect,
    /// Cancel the transfer that this controller runs for the move.
    Cancel,
    /// Cancel an operation that nobody waits for any more: its outcome is lost.
    CancelOperation(OperationId),
    /// Move inside the server or cluster.
    Relocate(Relocation),
}

/// A transfer between two servers.
#[derive(Clone, Debug)]
pub struct Transfer {
    /// Who connects to whom.
    pub mode: Wiring,
    /// The instance on the source.
    pub from: InstanceRef,
    /// Whether it runs meanwhile.
    pub running: bool,
    /// What the source's end is asked (the engine fills in `push_to`).
    pub offer: OfferRequest,
    /// What the target's end is asked (the engine fills in `pull_from`).
    pub accept: AcceptRequest,
}

/// A backup that is made on one server and becomes an instance on another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    /// The instance on the source.
    pub from: InstanceRef,
    /// Which backup: one that is made under that name and kept, or one that is streamed.
    pub export: Export,
    /// Leave the snapshots behind.
    pub instance_only: bool,
    /// What is made from it.
    pub import: ImportRequest,
}

/// Who connects to whom in a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// The target fetches from the source.
    Pull,
    /// The source sends to the target.
    Push,
    /// Both wait, and the controller passes on what each says.
    Relay,
}
