//! The invariants of the move protocol, looked at after every change of the world: the newest data exist completely (I1),
//! at most one copy runs and between Stopped and COMMIT nobody could start any (I2), nothing is deleted that is not ours (I8).

use berth_api::{GuardKind, Method, Step, Transfer};
use berth_core::marks;
use berth_core::model::InstanceRef;
use berth_core::records::Record;

use crate::config;
use crate::state::{Content, Inst, State};

/// How many lines of the log a breach shows.
const TAIL: usize = 40;

/// An invariant that did not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Breach {
    /// `I1`, `I2` or `I8`.
    pub invariant: &'static str,
    /// What was wrong.
    pub message: String,
    /// The end of the log up to then.
    pub log: Vec<String>,
}

impl std::fmt::Display for Breach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} does not hold: {}", self.invariant, self.message)?;
        self.log.iter().try_for_each(|line| write!(f, "\n    {line}"))
    }
}

impl std::error::Error for Breach {}

impl State {
    pub fn invariants(&mut self) {
        let first = self.newest_data_exist().or_else(|| self.one_runs()).or_else(|| {
            let records: Vec<&Record> = self.records.values().collect();
            records
                .into_iter()
                .find_map(|r| self.startable_between_stop_and_commit(r))
        });
        let first = first.or_else(|| self.unfinished_copies_do_not_start());
        if let Some((invariant, message)) = first {
            self.breach(invariant, message);
        }
    }

    fn breach(&mut self, invariant: &'static str, message: String) {
        if self.breach.is_none() {
            let skip = self.log.len().saturating_sub(TAIL);
            let log = self.log.iter().skip(skip).map(ToString::to_string).collect();
            self.breach = Some(Breach {
                invariant,
                message,
                log,
            });
        }
    }

    fn all(&self) -> impl Iterator<Item = (&str, &InstanceRef, &Inst)> {
        self.servers
            .values()
            .flat_map(|h| h.instances.iter().map(|(at, i)| (h.name.as_str(), at, i)))
    }

    fn newest_data_exist(&self) -> Option<(&'static str, String)> {
        let lost = self.newest.iter().find(|(uuid, newest)| {
            !self
                .all()
                .any(|(_, _, i)| i.uuid() == uuid.as_str() && i.content == Content::Complete && i.data == **newest)
        })?;
        Some((
            "I1",
            format!(
                "no complete copy of {} has its newest data (version {})",
                lost.0, lost.1
            ),
        ))
    }

    fn one_runs(&self) -> Option<(&'static str, String)> {
        let running: Vec<_> = self.all().filter(|(_, _, i)| i.runs() && !i.ending).collect();
        for (n, (server, at, i)) in running.iter().enumerate() {
            let other = running
                .iter()
                .skip(n + 1)
                .find(|(_, _, o)| o.uuid() == i.uuid() && !o.twin && !i.twin);
            // until the source is guarded somebody can start it once more: the bounded exception of promise 2
            let other = other.filter(|_| !self.live_move_of(i.uuid()));
            if let Some((other_server, other_at, _)) = other {
                let message = format!(
                    "{} runs as {at} on {server} and as {other_at} on {other_server}",
                    i.uuid()
                );
                return Some(("I2", message));
            }
        }
        None
    }

    /// A copy that does not hold the data of one instant cannot be started by anyone who looks for it.
    fn unfinished_copies_do_not_start(&self) -> Option<(&'static str, String)> {
        for host in self.servers.values() {
            for (at, i) in &host.instances {
                let kept = i.config.get(marks::COPY_OF).is_some_and(|v| !v.is_empty());
                let whole = matches!(i.content, Content::Complete | Content::OfAnInstant);
                if !kept || whole || self.foreign.contains(&(host.name.clone(), at.clone())) {
                    continue;
                }
                let mut free = i.clone();
                free.busy = None;
                let hidden = marks::is_unique_name(&at.name);
                let project = host
                    .project(&at.project)
                    .is_some_and(berth_core::model::Project::restricted);
                if !hidden || (!project && config::unstartable(host, &at.project, &at.name, &free).is_none()) {
                    let message = format!(
                        "{at} on {} is a copy that is not complete, and could be started",
                        host.name
                    );
                    return Some(("C1", message));
                }
            }
        }
        None
    }

    /// A refresh begins to change a copy: never one that has run.
    pub fn judge_refresh(&mut self, server: &str, born: u64) {
        let used = self
            .inst_by_born(server, born)
            .is_some_and(|i| i.config.contains_key(marks::COPY_OF) && i.last_used_at > jiff::Timestamp::UNIX_EPOCH);
        if used {
            self.breach("C2", format!("a copy on {server} that has run is refreshed"));
        }
    }

    /// A controller cancels a transfer: that of a refresh only for a move of its source, since one that ends just then leaves
    /// a copy that neither starts nor is refreshed (*seen* on Incus 6.0.4).
    pub fn judge_cancel(&mut self, id: u64) {
        let Some(t) = self.transfers.get(&id).filter(|t| t.refresh).cloned() else {
            return;
        };
        let Some(uuid) = self
            .inst_by_born(&t.source.server, t.source.born)
            .map(|i| i.uuid().to_owned())
        else {
            return;
        };
        let of_copy = self.inst_by_born(&t.target.server, t.target.born);
        let of_copy = of_copy.is_some_and(|i| i.config.contains_key(marks::COPY_OF));
        if of_copy && self.open_moves_of(&uuid).next().is_none() {
            self.breach("C3", format!("a refresh from {} is cancelled", t.source.server));
        }
    }

    fn open_moves_of(&self, uuid: &str) -> impl Iterator<Item = &Record> {
        let of = move |r: &&Record| r.spec.from.uuid.as_deref() == Some(uuid) && !r.finished();
        self.records.values().filter(of)
    }

    /// Whether a live move of that instance between two servers has not yet guarded its source.
    pub fn live_move_of(&self, uuid: &str) -> bool {
        let live = |r: &&Record| r.spec.method == Method::Live && r.spec.transfer != Transfer::Internal;
        self.open_moves_of(uuid).filter(live).any(|r| {
            let at = InstanceRef::new(&r.spec.from.project, &r.spec.from.name);
            let host = self.servers.get(&r.spec.from.server);
            let source = host.and_then(|h| h.instances.get(&at));
            source.is_some_and(|i| !i.devices.contains_key(marks::GUARD))
        })
    }

    /// From Stopped to COMMIT every copy must be one that nobody can start.
    pub fn startable_between_stop_and_commit(&self, record: &Record) -> Option<(&'static str, String)> {
        let spec = &record.spec;
        let between = matches!(
            record.status.step(),
            Some(Step::Stopped | Step::Transferred | Step::Verified)
        );
        if !between || record.finished() || spec.method == Method::Live || spec.transfer == Transfer::Internal {
            return None;
        }
        let by_name = spec.guard.source == GuardKind::Name || spec.guard.target == GuardKind::Name;
        for host in self.servers.values() {
            for (at, i) in &host.instances {
                if spec.from.uuid.as_deref() != Some(i.uuid()) || (by_name && marks::is_unique_name(&at.name)) {
                    continue;
                }
                let mut free = i.clone();
                free.busy = None;
                if config::unstartable(host, &at.project, &at.name, &free).is_none() {
                    let step = record.status.step.as_deref().unwrap_or("-");
                    return Some((
                        "I2",
                        format!(
                            "{at} on {} could be started while {} is at {step}",
                            host.name, record.name
                        ),
                    ));
                }
            }
        }
        None
    }

    /// A controller asked for the deletion of that instance.
    pub fn judge_removal(&mut self, server: &str, at: &InstanceRef, i: &Inst) {
        if !i.marked() {
            self.breach(
                "I8",
                format!("a controller deletes {at} on {server}, which carries no mark of ours"),
            );
        }
        // a live copy has its real name from the start; on the way back a kept source had that before, and made room
        let back = |r: &Record| r.spec.method == Method::Live && r.spec.onto.is_some();
        let ours = |r: &Record| i.config.get(marks::MOVE) == Some(&r.name);
        if !self.records.values().any(|r| back(r) && ours(r)) && self.foreign.contains(&(server.to_owned(), at.clone()))
        {
            self.breach(
                "I8",
                format!("a controller deletes {at} on {server}, a name that somebody else has used"),
            );
        }
        if self.late_since.is_some_and(|sent| i.born > sent) {
            self.breach(
                "I8",
                format!("a late deletion hits {at} on {server}, which was made after it had been sent"),
            );
        }
    }

    /// A controller deleted a snapshot that is not one of ours.
    pub fn foreign_snapshot(&mut self, server: &str, at: &InstanceRef, name: &str) {
        self.breach(
            "I8",
            format!("a controller deletes snapshot {name} of {at} on {server}, which it did not take"),
        );
    }

    /// A copy that does not have the newest data begins to run.
    pub fn fork(&mut self, server: &str, born: u64, has: u64, newest: u64) {
        let name = self
            .servers
            .get(server)
            .and_then(|h| h.born(born))
            .map(|at| at.to_string())
            .unwrap_or_default();
        let message = format!("{name} on {server} runs with data {has}, or a mixture, while the newest are {newest}");
        self.breach("I1", message);
    }
}
