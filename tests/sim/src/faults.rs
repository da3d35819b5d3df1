//! Faults at writes: a controller that dies before or after a request, an answer that is lost, a request that is refused,
//! and one that arrives at a server minutes later (a late request of a controller that is long dead).

use std::sync::Arc;

use berth_core::records::RecordError;
use berth_core::server::{FailureKind, ServerError};
use jiff::Timestamp;

use crate::state::State;
use crate::world::World;
use crate::writes::{Answer, Failure, Write};

/// What is asked before every write of every controller.
pub type Hook = Arc<dyn Fn(&World, &WriteInfo) -> Option<Fault> + Send + Sync>;

/// A write that is about to be carried out.
#[derive(Clone, Debug)]
pub struct WriteInfo {
    /// Number among all writes of the world, from 0.
    pub number: u64,
    /// Number among those of its controller, from 0.
    pub nth: u64,
    /// Who asks.
    pub controller: String,
    /// The server, or `records`.
    pub server: String,
    /// What is asked.
    pub write: Write,
}

/// What goes wrong with a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The controller dies before it is sent. The call never returns.
    CrashBefore,
    /// It is carried out, and the controller dies before it reads the answer.
    CrashAfter,
    /// The controller is told that it failed.
    Fail {
        /// How.
        kind: FailureKind,
        /// Whether it was carried out all the same.
        carried_out: bool,
    },
    /// It is kept; the test delivers it later, or never.
    Late(Caller),
}

/// What becomes of the caller of a late request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// It dies.
    Dies,
    /// It is told that the outcome is unknown.
    IsToldUnknown,
}

/// A request that is still under way.
#[derive(Clone, Debug)]
pub struct LateRequest {
    /// Its number among all writes.
    pub id: u64,
    /// Who sent it.
    pub controller: String,
    /// The server, or `records`.
    pub server: String,
    /// What it asks.
    pub write: Write,
    /// Everything that was made after this was made after it had been sent.
    pub(crate) issued: u64,
}

/// One line of the world's log.
#[derive(Clone, Debug)]
pub struct Entry {
    /// When.
    pub at: Timestamp,
    /// A controller, `person`, `guest`, `host` or `daemon`.
    pub who: String,
    /// The server, or `records`.
    pub server: String,
    /// What happened.
    pub what: String,
    /// For writes: the verb, and whether it was carried out.
    pub write: Option<(&'static str, bool)>,
    /// How it ended, where that is known at once.
    pub result: String,
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Entry {
            at,
            who,
            server,
            what,
            result,
            ..
        } = self;
        write!(
            f,
            "{at} {who} [{server}] {what}{}{result}",
            if result.is_empty() { "" } else { " => " }
        )
    }
}

impl World {
    /// Numbers a write, asks the hook, and carries it out, or not.
    pub(crate) async fn submit(&self, controller: &str, server: &str, write: Write) -> Result<Answer, Failure> {
        self.on_the_way(controller, server).await;
        let info = self.change(|s| {
            let number = s.controllers.values().map(|c| c.writes).sum();
            let known = s.controllers.entry(controller.to_owned()).or_default();
            let nth = known.writes;
            known.writes += 1;
            WriteInfo {
                number,
                nth,
                controller: controller.to_owned(),
                server: server.to_owned(),
                write: write.clone(),
            }
        });
        let fault = self.hook().and_then(|hook| hook(self, &info));
        // the hook may have done anything, even ended this controller
        self.alive(controller).await;
        match fault {
            None => self.change(|s| s.carry_out_logged(&info, "")),
            Some(Fault::CrashBefore) => {
                self.change(|s| s.log_write(&info, false, "not sent: the controller died"));
                self.dies(controller).await
            }
            Some(Fault::CrashAfter) => {
                let _ = self.change(|s| s.carry_out_logged(&info, " (answer lost: the controller died)"));
                self.dies(controller).await
            }
            Some(Fault::Fail { kind, carried_out }) => {
                if carried_out {
                    let _ = self.change(|s| s.carry_out_logged(&info, " (answer lost)"));
                } else {
                    self.change(|s| s.log_write(&info, false, "failed on purpose"));
                }
                Err(failure(&info, kind))
            }
            Some(Fault::Late(caller)) => {
                self.change(|s| s.keep_late(&info));
                match caller {
                    Caller::Dies => self.dies(controller).await,
                    Caller::IsToldUnknown => Err(failure(&info, FailureKind::Unknown)),
                }
            }
        }
    }

    async fn dies(&self, controller: &str) -> Result<Answer, Failure> {
        self.kill(controller);
        std::future::pending().await
    }

    /// Carries out a late request now. `Err` says why the server refused it.
    pub fn deliver_late(&self, id: u64) -> Result<(), String> {
        self.change(|s| {
            let late = s.late.remove(&id).ok_or("no such late request")?;
            let info = WriteInfo {
                number: id,
                nth: id,
                controller: late.controller,
                server: late.server,
                write: late.write,
            };
            s.late_since = Some(late.issued);
            let answer = s.carry_out_logged(&info, " (late)");
            s.late_since = None;
            answer.map(|_| ()).map_err(|e| text(&e))
        })
    }

    /// The requests that are still under way.
    pub fn late(&self) -> Vec<LateRequest> {
        self.look(|s| s.late.values().cloned().collect())
    }
}

impl State {
    fn carry_out_logged(&mut self, info: &WriteInfo, remark: &str) -> Result<Answer, Failure> {
        self.log_write(info, true, "");
        let line = self.log.len() - 1;
        let answer = self.carry_out(&info.server, &info.write);
        let operation = match &answer {
            Ok(Answer::Operation(id)) => Some(id),
            Ok(Answer::Channel(channel)) => Some(&channel.operation),
            Ok(Answer::Done | Answer::Record(_) | Answer::Copy(_)) | Err(_) => None,
        };
        if let Some(op) = operation.and_then(|id| self.operation_mut(&info.server, id)) {
            op.line = Some(line);
        }
        let result = match &answer {
            Ok(_) => "ok".to_owned(),
            Err(e) => text(e),
        };
        if let Some(entry) = self.log.get_mut(line) {
            entry.result = result + remark;
            entry.write = Some((info.write.verb(), answer.is_ok()));
        }
        answer
    }

    fn log_write(&mut self, info: &WriteInfo, carried_out: bool, result: &str) {
        self.log.push(Entry {
            at: self.now(),
            who: info.controller.clone(),
            server: info.server.clone(),
            what: format!("#{} {}", info.nth, info.write.describe()),
            write: Some((info.write.verb(), carried_out)),
            result: result.to_owned(),
        });
    }

    fn keep_late(&mut self, info: &WriteInfo) {
        self.log_write(info, false, "under way for long");
        let issued = self.next();
        let WriteInfo {
            number,
            controller,
            server,
            write,
            ..
        } = info.clone();
        self.late.insert(
            number,
            LateRequest {
                id: number,
                controller,
                server,
                write,
                issued,
            },
        );
    }
}

fn failure(info: &WriteInfo, kind: FailureKind) -> Failure {
    let attempted = format!("{} on {}", info.write.describe(), info.server);
    if !info.write.is_record() {
        return Failure::Server(ServerError::new(kind, attempted, "failed on purpose"));
    }
    Failure::Record(match kind {
        FailureKind::Changed | FailureKind::AlreadyExists => RecordError::Conflict(attempted),
        FailureKind::NotFound => RecordError::NotFound(attempted),
        FailureKind::Busy
        | FailureKind::Refused
        | FailureKind::Running
        | FailureKind::NotTrusted
        | FailureKind::CertificateMismatch
        | FailureKind::Unreachable
        | FailureKind::Unknown
        | FailureKind::PeerUnreachable
        | FailureKind::ScratchFull
        | FailureKind::Protocol => RecordError::Unavailable(format!("{attempted}: failed on purpose")),
    })
}

fn text(e: &Failure) -> String {
    match e {
        Failure::Server(e) => format!("{:?}: {}", e.kind, e.message),
        Failure::Record(e) => e.to_string(),
    }
}
