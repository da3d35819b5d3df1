//! What a step sees: both ends of the move read afresh, what this controller has in hand, and what the placement
//! wants of the move now. Also says which reads a step needs ([`reads`]), so that nothing else is asked for.

use std::sync::Arc;
use std::time::Duration;

use berth_api::{Reason, Step};
use jiff::Timestamp;

use super::effect::{EffectKind, End};
use super::kept;
use crate::model::{Fresh, InstanceRef, Product, ServerFacts, Snapshot};
use crate::records::Record;
use crate::server::{Operation, Progress, ServerError};

/// Everything a step is decided from.
#[derive(Clone, Debug)]
pub struct View {
    /// Where the instance is.
    pub source: EndView,
    /// Where it goes (for a move inside one server: the same server).
    pub target: EndView,
    /// What this controller itself is doing for the move.
    pub task: Task,
    /// How the last effect ended; shown to one step only.
    pub outcome: Option<Outcome>,
    /// What the placement wants of this move now.
    pub wish: Wish,
    /// Names of the other moves that are not finished.
    pub open_moves: Vec<String>,
    /// Eight random characters that were never used before, for unique names.
    pub random: String,
    /// Whether requests without a precondition may be sent: the lease holds for more than ten seconds.
    pub lease_is_safe: bool,
}

/// One end of a move.
#[derive(Clone, Debug)]
pub enum EndView {
    /// It does not answer, or is not the server that the record names.
    Unreachable {
        /// Since when.
        since: Timestamp,
        /// What was tried and what happened.
        message: String,
    },
    /// It answers.
    Reachable {
        /// What it is.
        facts: Arc<ServerFacts>,
        /// What was read for this pass.
        copies: Vec<Copy>,
        /// Its running operations, if they were read.
        operations: Vec<Operation>,
        /// Names of instances that carry this move's mark under unique names that the record no longer uses.
        strays: Vec<InstanceRef>,
    },
}

impl EndView {
    /// What its server is; Incus while it does not answer, for the words of a command.
    pub fn product(&self) -> Product {
        match self {
            EndView::Unreachable { .. } => Product::Incus,
            EndView::Reachable { facts, .. } => facts.product,
        }
    }

    /// The copy of that place, if it exists. `None` also where the end is unreachable.
    pub fn copy(&self, at: &InstanceRef) -> Option<&Copy> {
        match self {
            EndView::Unreachable { .. } => None,
            EndView::Reachable { copies, .. } => copies.iter().find(|c| &c.fresh.instance.at == at),
        }
    }

    /// An operation that names that place.
    pub fn operation_on(&self, at: &InstanceRef) -> Option<&Operation> {
        match self {
            EndView::Unreachable { .. } => None,
            EndView::Reachable { operations, .. } => operations.iter().find(|o| o.instances.contains(at)),
        }
    }
}

impl EndView {
    /// The migration of that place, which can be cancelled: for the running state servers have more operations than that.
    /// Both products describe it so; a person's own operations on the instance are left alone.
    pub fn migration_of(&self, at: &InstanceRef) -> Option<&Operation> {
        match self {
            EndView::Unreachable { .. } => None,
            EndView::Reachable { operations, .. } => operations
                .iter()
                .find(|o| o.instances.contains(at) && o.description.starts_with("Migrating")),
        }
    }
}

/// One instance of a move, read afresh.
#[derive(Clone, Debug)]
pub struct Copy {
    /// The instance and its entity tag.
    pub fresh: Fresh,
    /// Its snapshots, where the step needs them.
    pub snapshots: Option<Vec<Snapshot>>,
}

/// What this controller itself is doing for the move.
#[derive(Clone, Debug, PartialEq)]
pub enum Task {
    /// Nothing.
    Idle,
    /// It carries out an effect.
    Busy {
        /// Which.
        effect: EffectKind,
        /// How far it is, as far as the server tells.
        progress: Option<Progress>,
    },
}

/// How the last effect ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Which effect.
    pub effect: EffectKind,
    /// How it ended. For a transfer `Ok` means that success of both operations was seen.
    pub result: Result<(), ServerError>,
    /// What it took.
    pub spent: Spent,
    /// How long ago the first of a transfer's two operations was seen to end: from then on both guests may run.
    pub first_end_ago: Duration,
}

/// What an effect took, as this process measured it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// From the first request to the end.
    pub time: Duration,
    /// Bytes sent, as far as the servers told.
    pub bytes: Option<i64>,
    /// How long the guest was seen to stand still meanwhile.
    pub frozen: Duration,
}

impl Outcome {
    /// Whether a stop ended before the guest had its time, give or take a second: LXD 5.0 says at once that a guest does
    /// not stop which has heard its signal, and stops.
    pub fn ended_early(&self, timeout: Duration) -> bool {
        self.spent.time + Duration::from_secs(1) < timeout
    }
}

/// What the placement wants of a move that runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Wish {
    /// Go on.
    Continue(StopRules),
    /// Undo it if it is not committed yet.
    Undo {
        /// Why: the reason that the placement shows afterwards.
        reason: Reason,
        /// The same in a sentence.
        message: String,
    },
}

/// What the placement allows when the instance is to be stopped; read anew before the stop.
#[derive(Clone, Debug, PartialEq)]
pub struct StopRules {
    /// How long the guest has.
    pub timeout: Duration,
    /// Whether it may be stopped by force when that time is over.
    pub force: bool,
    /// How long it may be expected not to run.
    pub max_downtime: Option<Duration>,
    /// Whether it is to run afterwards if it runs now.
    pub preserves_power: bool,
}

/// One read that a step needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// An instance, with its snapshots or without.
    Instance {
        /// Where.
        end: End,
        /// Which.
        at: InstanceRef,
        /// Whether its snapshots are needed.
        snapshots: bool,
    },
    /// The running operations.
    Operations(End),
}

/// Where the record's instances are looked for.
pub fn source_places(record: &Record) -> Vec<InstanceRef> {
    let (from, to) = (&record.spec.from, &record.spec.to);
    let mut places = vec![InstanceRef::new(&from.project, &from.name)];
    if super::is_internal(record) {
        // a server that combines several changes makes them one after the other
        for (project, name) in [
            (&to.project, &to.name),
            (&from.project, &to.name),
            (&to.project, &from.name),
        ] {
            let at = InstanceRef::new(project, name);
            if !places.contains(&at) {
                places.push(at);
            }
        }
    }
    let names = record.status.names.as_ref();
    let others = [
        names.and_then(|n| n.retired.as_ref()),
        names.and_then(|n| n.leaving.as_ref()),
    ];
    let others = others.into_iter().flatten();
    places.extend(others.map(|n| InstanceRef::new(&from.project, n)));
    places
}

/// Where the record's copy is looked for on the target.
pub fn target_places(record: &Record) -> Vec<InstanceRef> {
    let to = &record.spec.to;
    let incoming = record.status.names.as_ref().and_then(|n| n.incoming.as_ref());
    let mut places: Vec<_> = incoming.map(|n| InstanceRef::new(&to.project, n)).into_iter().collect();
    places.push(InstanceRef::new(&to.project, &to.name));
    let kept = record.spec.onto.as_ref().filter(|o| o.name != to.name);
    places.extend(kept.map(|o| InstanceRef::new(&to.project, &o.name)));
    places
}

/// The reads that the next step of `record` needs, after `outcome`.
pub fn reads(record: &Record, outcome: Option<&Outcome>) -> Vec<Read> {
    if kept::has_kept(record) {
        return reads_of_kept(record);
    }
    let warm = super::is_warm(record);
    let step = match record.status.step().unwrap_or(Step::Accepted) {
        // it is being guarded: the same pass goes on with what follows
        Step::Marked | Step::Precopied if record.status.stopped_at.is_some() => Step::Stopped,
        step => step,
    };
    let begun = record.status.names.as_ref().is_some_and(|n| n.incoming.is_some());
    let verifying = matches!(step, Step::Transferred | Step::Verified | Step::Restoring)
        || (step == Step::Stopped && (begun || warm || kept::refreshes(record)));
    // temporary snapshots that are to be deleted are read where that is done
    let temporary = record.status.precopy.as_ref().is_some_and(|w| !w.snapshots.is_empty());
    let keeps = kept::keeps(record);
    let at_source = verifying
        || (temporary && matches!(step, Step::Precopied | Step::Undoing))
        || (warm && step == Step::Marked)
        || (temporary && keeps && step == Step::Retired);
    let at_target = verifying || (temporary && matches!(step, Step::Precopied | Step::Retired));
    let instance = |end, snapshots| move |at| Read::Instance { end, at, snapshots };
    let mut reads: Vec<Read> = source_places(record)
        .into_iter()
        .map(instance(End::Source, at_source))
        .collect();
    if super::is_internal(record) {
        reads.push(Read::Operations(End::Source));
        return reads;
    }
    if step == Step::Accepted || (step == Step::Marked && !warm && !kept::makes_room(record)) {
        // a stop that an earlier request asked for is waited for
        let asked = record.status.stop_requested_at.is_some() && outcome.is_none();
        reads.extend(asked.then_some(Read::Operations(End::Source)));
        return reads;
    }
    // a live move stops its source then, any other must not wait for its server
    if step == Step::Committed && !super::live::between_servers(record) {
        reads.clear();
    }
    reads.extend(target_places(record).into_iter().map(instance(End::Target, at_target)));
    let transfers =
        matches!(step, Step::Stopped | Step::Restoring) || (warm && matches!(step, Step::Marked | Step::Precopied));
    // a backup is not deleted while it is being made
    let has_backup = record.status.names.as_ref().is_some_and(|n| n.backup.is_some());
    if step == Step::Started && has_backup {
        reads.push(Read::Operations(End::Source));
    }
    // whoever saw both ends of a transfer end knows that nothing is under way any more
    let over = outcome.is_some_and(|o| o.effect == EffectKind::Transfer && o.result.is_ok());
    if (begun && transfers && !over) || step == Step::Undoing {
        reads.push(Read::Operations(End::Target));
        reads.push(Read::Operations(End::Source));
    }
    reads
}

/// The reads that the end of a kept source needs.
fn reads_of_kept(record: &Record) -> Vec<Read> {
    let instance = |at| Read::Instance {
        end: End::Source,
        at,
        snapshots: false,
    };
    source_places(record).into_iter().map(instance).collect()
}
