//! Background operations: begun by a request, ended by a timer, forgotten five seconds later, lost with the daemon.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use berth_core::model::InstanceRef;
use berth_core::server::{FailureKind, Operation, OperationId, OperationState, Progress, ServerError, ServerEvent};
use jiff::Timestamp;

use crate::migrate::Waiting;
use crate::relocate::Phase;
use crate::state::{Answered, Busy, State};

/// How long the end of an operation can be read.
const KEPT: Duration = Duration::from_secs(5);

/// Something that happens later.
#[derive(Clone, Debug)]
pub(crate) enum Due {
    /// An operation's work is done.
    Work(String, OperationId),
    /// An operation is forgotten.
    Forget(String, OperationId),
    /// One end of a migration waited long enough.
    PeerTimeout(String, OperationId),
    /// The data of a transfer have arrived.
    Data(u64),
    /// The target is done with a transfer.
    Tail(u64),
    /// The link of a transfer was cut too long.
    LinkTimeout(u64),
    /// A guest that was asked in this boot (it began then) goes down by itself.
    GuestStops(String, u64, Timestamp),
    /// A daemon has cleared away what a guest that is down left.
    ClearedAway(String, u64),
}

/// What an operation does.
#[derive(Clone, Debug)]
pub(crate) enum Work {
    /// Nothing that is left to do: it only has to end.
    End(Result<(), String>),
    /// Starts the instance.
    Start(u64),
    /// The guest goes down.
    Stop(u64),
    /// The guest had its time.
    StopTimeout(u64),
    /// Deletes the instance.
    Delete(u64),
    /// Unpacks a backup.
    Import(u64),
    /// Renames the instance.
    Rename(u64, String),
    /// A move inside the server.
    Relocate(Box<Phase>),
    /// Waits for the other end of a migration.
    Wait(Waiting),
    /// Takes part in a transfer.
    Transfer(u64),
}

/// One operation.
#[derive(Clone, Debug)]
pub(crate) struct Op {
    pub description: &'static str,
    pub instances: Vec<InstanceRef>,
    pub state: OperationState,
    pub secrets: BTreeMap<String, String>,
    /// Channels that somebody has connected to.
    pub plugged: BTreeMap<String, Timestamp>,
    /// Channels on which the other end was heard.
    pub heard: BTreeSet<String>,
    pub work: Work,
    pub progress: Option<Progress>,
    /// Fingerprint of who asked.
    pub by: Option<String>,
    /// Line of the log that asked for it.
    pub line: Option<usize>,
}

impl State {
    pub fn begin(
        &mut self,
        server: &str,
        description: &'static str,
        at: &InstanceRef,
        work: Work,
        by: Option<&str>,
    ) -> OperationId {
        self.begin_for(server, description, vec![at.clone()], work, by)
    }

    pub fn begin_for(
        &mut self,
        server: &str,
        description: &'static str,
        instances: Vec<InstanceRef>,
        work: Work,
        by: Option<&str>,
    ) -> OperationId {
        let id = OperationId(self.fresh_uuid());
        let op = Op {
            description,
            instances,
            state: OperationState::Running,
            secrets: BTreeMap::new(),
            plugged: BTreeMap::new(),
            heard: BTreeSet::new(),
            work,
            progress: None,
            by: by.map(str::to_owned),
            line: None,
        };
        if let Some(host) = self.servers.get_mut(server) {
            host.operations.insert(id.clone(), op);
        }
        self.operation_event(server, &id);
        id
    }

    /// An operation whose work is done after `after`, and which holds the instance until then.
    pub fn begin_busy(
        &mut self,
        server: &str,
        (description, action): (&'static str, &'static str),
        at: &InstanceRef,
        work: Work,
        after: Duration,
        by: Option<&str>,
    ) -> OperationId {
        let id = self.begin(server, description, at, work, by);
        let busy = Some(Busy {
            action,
            operation: Some(id.clone()),
        });
        if let Some(i) = self.servers.get_mut(server).and_then(|h| h.instances.get_mut(at)) {
            i.busy = busy;
        }
        self.later(after, Due::Work(server.to_owned(), id.clone()));
        id
    }

    /// An operation that is already known to end like that.
    pub fn begin_ended(
        &mut self,
        server: &str,
        description: &'static str,
        at: &InstanceRef,
        end: Result<(), String>,
        by: Option<&str>,
    ) -> OperationId {
        let id = self.begin(server, description, at, Work::End(end), by);
        self.later(Duration::from_millis(1), Due::Work(server.to_owned(), id.clone()));
        id
    }

    pub fn operation(&self, server: &str, id: &OperationId) -> Option<&Op> {
        self.servers.get(server)?.operations.get(id)
    }

    pub fn operation_mut(&mut self, server: &str, id: &OperationId) -> Option<&mut Op> {
        self.servers.get_mut(server)?.operations.get_mut(id)
    }

    pub fn end(&mut self, server: &str, id: &OperationId, result: Result<(), String>) {
        let Some(host) = self.servers.get_mut(server) else {
            return;
        };
        for i in host.instances.values_mut() {
            if i.busy.as_ref().is_some_and(|b| b.operation.as_ref() == Some(id)) {
                i.busy = None;
            }
        }
        let Some(op) = host.operations.get_mut(id) else { return };
        if op.state != OperationState::Running {
            return;
        }
        let failed = result.is_err();
        op.state = match result {
            Ok(()) => OperationState::Succeeded,
            Err(why) => OperationState::Failed(why),
        };
        // a request whose operation failed had no effect after all
        let line = op.line.filter(|_| failed);
        let asked = line
            .and_then(|line| self.log.get_mut(line))
            .and_then(|entry| entry.write.as_mut());
        if let Some((_, done)) = asked {
            *done = false;
        }
        let what = format!(
            "operation {} of {}: {:?}",
            op.description,
            names(&op.instances),
            op.state
        );
        self.operation_event(server, id);
        self.note("daemon", server, what);
        self.later(KEPT, Due::Forget(server.to_owned(), id.clone()));
    }

    pub fn operation_event(&mut self, server: &str, id: &OperationId) {
        let Some(host) = self.servers.get_mut(server) else {
            return;
        };
        let Some(op) = host.operations.get(id) else { return };
        let event = ServerEvent::Operation(shown(id, op), op.state.clone());
        host.emit(&event);
    }

    /// A timer went off.
    pub fn fire(&mut self, due: Due) {
        match due {
            Due::Work(server, id) => self.work_done(&server, &id),
            Due::Forget(server, id) => {
                if let Some(host) = self.servers.get_mut(&server) {
                    host.operations.remove(&id);
                }
            }
            Due::PeerTimeout(server, id) => self.peer_timeout(&server, &id),
            Due::Data(id) => self.data_arrived(id),
            Due::Tail(id) => self.transfer_done(id),
            Due::LinkTimeout(id) => self.link_timeout(id),
            Due::GuestStops(server, born, boot) => {
                if self.inst_by_born(&server, born).is_some_and(|i| i.last_used_at == boot) {
                    self.guest_stops(&server, born);
                }
            }
            Due::ClearedAway(server, born) => {
                if let Some(i) = self.inst_by_born(&server, born).filter(|i| !i.runs()) {
                    i.busy = None;
                }
            }
        }
    }

    fn work_done(&mut self, server: &str, id: &OperationId) {
        let Some(op) = self.operation(server, id) else { return };
        if op.state != OperationState::Running {
            return;
        }
        let by = op.by.clone();
        match op.work.clone() {
            Work::End(end) => self.end(server, id, end),
            Work::Start(born) => self.started(server, id, born, by.as_deref()),
            Work::Stop(born) => self.stopped(server, id, born, by.as_deref()),
            Work::StopTimeout(born) => self.stop_timed_out(server, id, born),
            Work::Delete(born) => self.deleted(server, id, born, by.as_deref()),
            Work::Import(born) => self.imported(server, id, born),
            Work::Rename(born, name) => self.renamed(server, id, born, &name, by.as_deref()),
            Work::Relocate(phase) => self.relocated(server, id, *phase, by.as_deref()),
            Work::Wait(_) | Work::Transfer(_) => {}
        }
    }

    pub fn cancel(&mut self, server: &str, id: &OperationId) -> Answered<()> {
        let attempted = format!("cancel operation {id} on {server}");
        let gone = || ServerError::new(FailureKind::NotFound, &attempted, "Operation not found");
        let refused = |why: &str| ServerError::new(FailureKind::Refused, &attempted, why);
        let op = self.operation(server, id).cloned().ok_or_else(gone)?;
        if op.state != OperationState::Running {
            return Err(refused("Only running operations can be cancelled"));
        }
        match op.work {
            Work::Wait(waiting) if waiting.cancellable() => {
                self.give_up_waiting(server, id, "Cancelled");
                Ok(())
            }
            Work::Transfer(transfer) if self.is_cancellable(transfer, server, id) => {
                self.judge_cancel(transfer);
                self.break_transfer(transfer, "Cancelled", false);
                Ok(())
            }
            Work::End(_)
            | Work::Start(_)
            | Work::Stop(_)
            | Work::StopTimeout(_)
            | Work::Delete(_)
            | Work::Import(_)
            | Work::Rename(..)
            | Work::Relocate(_)
            | Work::Wait(_)
            | Work::Transfer(_) => Err(refused("This operation can't be cancelled")),
        }
    }
}

/// An operation as a client sees it.
pub(crate) fn shown(id: &OperationId, op: &Op) -> Operation {
    Operation {
        id: id.clone(),
        description: op.description.to_owned(),
        instances: op.instances.clone(),
        progress: op.progress,
    }
}

fn names(list: &[InstanceRef]) -> String {
    list.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
