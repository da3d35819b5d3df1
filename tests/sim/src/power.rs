//! Starting and stopping, as the daemons do it: what changes in the configuration, which locks stay, what a guest that
//! does not obey leads to, and what happens when a daemon or its whole host goes down and comes back.

use std::time::Duration;

use berth_core::marks;
use berth_core::model::{InstanceKind, InstanceRef, Power, Product};
use berth_core::server::{OperationId, OperationState, PowerAction};

use crate::config;
use crate::operations::{Due, Work};
use crate::options::Guest;
use crate::state::{Answered, Busy, Content, State};

const LAST_POWER: &str = "volatile.last_state.power";

impl State {
    pub fn power(
        &mut self,
        server: &str,
        at: &InstanceRef,
        action: PowerAction,
        by: Option<&str>,
        what: &str,
    ) -> Answered<OperationId> {
        self.inst(server, at, what)?;
        Ok(match action {
            PowerAction::Start { stateful } => {
                let i = self.inst(server, at, what)?;
                // without its state it boots afresh, which is not what was saved
                i.stateful = i.stateful && stateful;
                self.start(server, at, by, what)?
            }
            PowerAction::Stop { timeout } if timeout.is_zero() => self.force_stop(server, at, by, what)?,
            PowerAction::Stop { timeout } => self.stop(server, at, timeout, by, what)?,
            PowerAction::ForceStop => self.force_stop(server, at, by, what)?,
            PowerAction::Unfreeze => self.unfreeze(server, at, by, what)?,
        })
    }

    fn start(&mut self, server: &str, at: &InstanceRef, by: Option<&str>, what: &str) -> Answered<OperationId> {
        let i = self.inst(server, at, what)?.clone();
        let host = self.host(server, what)?;
        let (start, born) = (host.timing.start, i.born);
        if let Some(why) = config::unstartable(host, &at.project, &at.name, &i) {
            let btrfs = host.driver(&i.pool) == "btrfs";
            if let Some(i) = host.instances.get_mut(at).filter(|i| i.busy.is_none()) {
                crate::writes::touch(i, btrfs);
            }
            return Ok(self.begin_ended(server, "Starting instance", at, Err(why), by));
        }
        Ok(self.begin_busy(server, ("Starting instance", "start"), at, Work::Start(born), start, by))
    }

    pub fn started(&mut self, server: &str, id: &OperationId, born: u64, by: Option<&str>) {
        self.run(server, born, by);
        self.end(server, id, Ok(()));
    }

    /// The guest runs from now on, and writes at once.
    pub fn run(&mut self, server: &str, born: u64, by: Option<&str>) {
        let moment = self.moment();
        let Some(host) = self.servers.get_mut(server) else {
            return;
        };
        let Some(at) = host.born(born) else { return };
        let nics = host
            .instances
            .get(&at)
            .map(|i| config::nics(host, &at.project, i))
            .unwrap_or_default();
        let Some(i) = host.by_born(born) else { return };
        i.power = Power::Running;
        i.stateful = false;
        i.last_used_at = moment;
        i.config.insert(LAST_POWER.to_owned(), "RUNNING".to_owned());
        i.config.remove("volatile.apply_template");
        for nic in nics {
            i.config
                .insert(format!("volatile.{nic}.host_name"), format!("veth{born:08x}"));
        }
        host.lifecycle(&at, "instance-started", by);
        self.write_data(server, born);
    }

    /// The guest writes: a new version of its data. A copy that is older than the newest one must never get that far.
    pub fn write_data(&mut self, server: &str, born: u64) {
        let Some(i) = self.inst_by_born(server, born) else {
            return;
        };
        if i.ending || i.nobodys {
            return;
        }
        let (uuid, data, stale_is_known) = (i.uuid().to_owned(), i.data, i.twin);
        let whole = matches!(i.content, Content::Complete | Content::OfAnInstant);
        if self.both_run(&uuid) {
            // at the end of a live move both guests write for a moment, and only one of them counts
            return;
        }
        let newest = self.newest.get(&uuid).copied().unwrap_or(data);
        if (data != newest || !whole) && !stale_is_known {
            self.fork(server, born, data, newest);
        }
        self.newest.insert(uuid, newest + 1);
        if let Some(i) = self.inst_by_born(server, born) {
            i.data = newest + 1;
            i.content = Content::Complete;
        }
    }

    /// Whether a live move has just resumed the guest on its target, beside the one on its source.
    fn both_run(&self, uuid: &str) -> bool {
        let all = self.servers.values().flat_map(|h| h.instances.values());
        let running: Vec<_> = all.filter(|i| i.uuid() == uuid && i.runs() && !i.ending).collect();
        running.len() > 1 && (running.iter().any(|i| i.twin) || self.live_move_of(uuid))
    }

    fn stop(
        &mut self,
        server: &str,
        at: &InstanceRef,
        timeout: Duration,
        by: Option<&str>,
        what: &str,
    ) -> Answered<OperationId> {
        let daemon = self.host(server, what)?.timing.stop;
        let i = self.inst(server, at, what)?.clone();
        let wrong = match (&i.busy, i.runs()) {
            (_, false) => Some("The instance is already stopped".to_owned()),
            (Some(busy), true) => Some(format!("Instance is busy running a \"{}\" operation", busy.action)),
            (None, true) => None,
        };
        if let Some(why) = wrong {
            return Ok(self.begin_ended(server, "Stopping instance", at, Err(why), by));
        }
        let goes_down = match i.guest {
            Guest::Obeys => Some(daemon),
            Guest::StopsAfter(after) => Some(after + daemon),
            Guest::Ignores => None,
        };
        let text = ("Stopping instance", "stop");
        Ok(match goes_down {
            Some(after) if after <= timeout => self.begin_busy(server, text, at, Work::Stop(i.born), after, by),
            Some(after) => {
                self.later(after, Due::GuestStops(server.to_owned(), i.born, i.last_used_at));
                self.begin_busy(server, text, at, Work::StopTimeout(i.born), timeout, by)
            }
            None => self.begin_busy(server, text, at, Work::StopTimeout(i.born), timeout, by),
        })
    }

    fn force_stop(&mut self, server: &str, at: &InstanceRef, by: Option<&str>, what: &str) -> Answered<OperationId> {
        let daemon = self.host(server, what)?.timing.stop;
        let i = self.inst(server, at, what)?.clone();
        let wrong = match &i.busy {
            _ if !i.runs() => Some("The instance is already stopped".to_owned()),
            // a forced stop inherits the lock of a graceful one
            Some(busy) if busy.action != "stop" => {
                Some(format!("Instance is busy running a \"{}\" operation", busy.action))
            }
            Some(_) | None => None,
        };
        if let Some(why) = wrong {
            return Ok(self.begin_ended(server, "Stopping instance", at, Err(why), by));
        }
        Ok(self.begin_busy(
            server,
            ("Stopping instance", "stop"),
            at,
            Work::Stop(i.born),
            daemon,
            by,
        ))
    }

    fn unfreeze(&mut self, server: &str, at: &InstanceRef, by: Option<&str>, what: &str) -> Answered<OperationId> {
        let i = self.inst(server, at, what)?;
        let done = if i.power == Power::Frozen {
            i.power = Power::Running;
            Ok(())
        } else {
            Err("The container is already running".to_owned())
        };
        Ok(self.begin_ended(server, "Unfreezing instance", at, done, by))
    }

    pub fn stopped(&mut self, server: &str, id: &OperationId, born: u64, by: Option<&str>) {
        self.go_down(server, born, by);
        self.end(server, id, Ok(()));
    }

    pub fn stop_timed_out(&mut self, server: &str, id: &OperationId, born: u64) {
        let lxd = self.servers.get(server).is_some_and(|h| h.product == Product::Lxd);
        let why = if lxd {
            "Failed shutting down instance, status is \"Running\": shutting down the container failed"
        } else {
            "Failed shutting down instance, status is \"Running\": context deadline exceeded"
        };
        self.end(server, id, Err(why.to_owned()));
        if let Some(i) = self.inst_by_born(server, born).filter(|i| !lxd && i.runs()) {
            i.busy = Some(Busy {
                action: "stop",
                operation: None,
            });
        }
    }

    /// A guest that had been asked goes down, whatever became of the request.
    pub fn guest_stops(&mut self, server: &str, born: u64) {
        let pending = self
            .inst_by_born(server, born)
            .filter(|i| i.runs())
            .and_then(|i| i.busy.clone());
        if let Some(id) = pending.and_then(|b| b.operation) {
            self.end(server, &id, Ok(()));
        }
        self.go_down(server, born, None);
    }

    /// The guest does not run any more; an ephemeral instance is gone with it.
    pub fn go_down(&mut self, server: &str, born: u64, by: Option<&str>) {
        let Some(host) = self.servers.get_mut(server) else {
            return;
        };
        let Some(at) = host.born(born) else { return };
        let Some(i) = host.by_born(born).filter(|i| i.runs()) else {
            return;
        };
        i.power = Power::Stopped;
        i.busy = None;
        (i.twin, i.ending, i.nobodys) = (false, false, false);
        i.config.insert(LAST_POWER.to_owned(), "STOPPED".to_owned());
        i.config
            .retain(|k, _| !(k.starts_with("volatile.") && k.ends_with(".host_name")));
        let (ephemeral, uuid) = (i.ephemeral, i.uuid().to_owned());
        host.lifecycle(&at, "instance-stopped", by);
        let all = self.servers.values_mut().flat_map(|h| h.instances.values_mut());
        all.filter(|i| i.uuid() == uuid).for_each(|i| i.twin = false);
        if ephemeral {
            self.vanish(server, born, by);
        }
    }

    /// The daemon ends: operations are lost, transfers break, locks are gone. What runs goes on.
    pub fn daemon_down(&mut self, server: &str) {
        let Some(host) = self.servers.get_mut(server) else {
            return;
        };
        host.up = false;
        let mut frozen = Vec::new();
        // a container that stands still while it is read goes on only when the daemon says so
        for op in host
            .operations
            .values()
            .filter(|op| op.state == OperationState::Running)
        {
            let Some((at, i)) = op.instances.first().and_then(|at| Some((at, host.instances.get(at)?))) else {
                continue;
            };
            let dir = host.driver(&i.pool) == "dir";
            let freezes = match op.work {
                Work::Transfer(id) => self
                    .transfers
                    .get(&id)
                    .is_some_and(|t| t.live || (dir && t.snapshot.is_none())),
                _ => dir && op.description == "Snapshotting instance",
            };
            if freezes && i.power == Power::Running && i.kind == InstanceKind::Container {
                frozen.push(at.clone());
            }
        }
        for at in frozen {
            if let Some(i) = host.instances.get_mut(&at) {
                i.power = Power::Frozen;
            }
        }
        host.operations.clear();
        host.listeners.clear();
        for i in host.instances.values_mut() {
            i.busy = None;
        }
        self.break_transfers_of(server);
    }

    /// The daemon is back, as another process.
    pub fn daemon_up(&mut self, server: &str) {
        let Some(host) = self.servers.get_mut(server) else {
            return;
        };
        host.up = true;
        host.pid += 1;
    }

    /// Power loss: nothing runs any more, and nobody had the time to write that down.
    pub fn power_off(&mut self, server: &str) {
        self.daemon_down(server);
        let Some(host) = self.servers.get_mut(server) else {
            return;
        };
        for i in host.instances.values_mut() {
            i.power = Power::Stopped;
            (i.twin, i.ending, i.nobodys) = (false, false, false);
        }
    }

    /// The host boots and starts what is to run, as far as that can be started.
    pub fn power_on(&mut self, server: &str) {
        self.daemon_up(server);
        let Some(host) = self.servers.get(server) else { return };
        let wanted = host.instances.iter().filter(|(at, i)| {
            let (expanded, _) = config::expand(host, &at.project, i);
            let wanted = match expanded.get(marks::AUTOSTART).map(String::as_str) {
                Some("true") => true,
                Some("false") => false,
                _ => i.config.get(LAST_POWER).is_some_and(|p| p == "RUNNING"),
            };
            wanted && config::unstartable(host, &at.project, &at.name, i).is_none()
        });
        for born in wanted.map(|(_, i)| i.born).collect::<Vec<_>>() {
            self.run(server, born, None);
        }
    }
}
