//! The sockets of ends that wait, for a relay. What an end says is only who it is; a target that has heard the same source
//! on all its channels begins. A socket that is dropped breaks what goes through it, as a process that dies does.

use berth_core::model::Product;
use berth_core::server::{Channel, FailureKind, OperationId, OperationState, ServerError, Socket};
use futures::{StreamExt, sink, stream};
use jiff::SignedDuration;
use secrecy::ExposeSecret;

use crate::operations::Work;
use crate::state::{Answered, State};
use crate::world::World;

/// Sockets of one end that arrive within this time are taken by LXD 5.0 at the same moment.
const AT_ONCE: SignedDuration = SignedDuration::from_millis(10);

/// One socket, as long as either half of it exists.
struct Plug {
    world: World,
    server: String,
    operation: OperationId,
}

impl Drop for Plug {
    fn drop(&mut self) {
        let (server, operation) = (self.server.clone(), self.operation.clone());
        self.world.change(|s| s.unplugged(&server, &operation));
    }
}

impl Plug {
    fn ended(&self) -> bool {
        self.world.look(|s| {
            s.operation(&self.server, &self.operation)
                .is_none_or(|op| op.state != OperationState::Running)
        })
    }
}

/// The two halves of a socket.
pub(crate) fn socket(world: &World, server: &str, operation: &OperationId, name: &str) -> Socket {
    let plug = std::sync::Arc::new(Plug {
        world: world.clone(),
        server: server.to_owned(),
        operation: operation.clone(),
    });
    let greeting = format!("{name} {} {server}", operation.0).into_bytes();
    let says = plug.clone();
    let until_the_end = stream::once(async move {
        let mut changes = says.world.changes();
        while !says.ended() && changes.changed().await.is_ok() {}
    });
    let incoming = stream::iter([Ok(greeting)])
        .chain(until_the_end.filter_map(|()| async { None }))
        .boxed();
    let hears = sink::unfold(plug, |plug, piece: Vec<u8>| async move {
        if plug.ended() {
            return Err(ServerError::new(FailureKind::Unknown, "relay", "broken pipe"));
        }
        let heard = String::from_utf8_lossy(&piece).into_owned();
        plug.world.change(|s| s.hears(&plug.server, &plug.operation, &heard));
        Ok(plug)
    });
    Socket {
        incoming,
        outgoing: Box::pin(hears),
    }
}

impl State {
    /// Whether that end waits and knows the secret.
    pub fn plug_in(&mut self, server: &str, waiting: &Channel, name: &str, what: &str) -> Answered<()> {
        let refused = |kind, why: &str| ServerError::new(kind, what, why);
        let now = self.now();
        let lxd = self.servers.get(server).is_some_and(|h| h.product == Product::Lxd);
        let given = waiting.secrets.get(name).map(|s| s.expose_secret().to_owned());
        let op = self.operation_mut(server, &waiting.operation);
        let op = op.ok_or_else(|| refused(FailureKind::NotFound, "Operation not found"))?;
        if given.is_none() || op.secrets.get(name) != given.as_ref() {
            return Err(refused(FailureKind::Refused, "not authorized"));
        }
        let at_once = op.plugged.values().any(|at| now.duration_since(*at) < AT_ONCE);
        if op.plugged.insert(name.to_owned(), now).is_some() {
            return Err(refused(FailureKind::AlreadyExists, "Connection already established"));
        }
        if lxd && at_once {
            // "panic: close of closed channel": each of the two finds that all are there now
            self.daemon_down(server);
            self.daemon_up(server);
            return Err(refused(FailureKind::Unknown, "connection reset by peer"));
        }
        Ok(())
    }

    /// An end hears the other one on a channel: `NAME OPERATION SERVER`.
    fn hears(&mut self, server: &str, operation: &OperationId, heard: &str) {
        let mut words = heard.splitn(3, ' ');
        let (Some(name), Some(other), Some(from)) = (words.next(), words.next(), words.next()) else {
            return;
        };
        let Some(op) = self.operation_mut(server, operation) else {
            return;
        };
        op.heard.insert(name.to_owned());
        if !op.secrets.keys().all(|name| op.heard.contains(name)) {
            return;
        }
        let other = OperationId(other.to_owned());
        let waits = |s: &Self, server: &str, id: &OperationId| match s.operation(server, id).map(|op| op.work.clone()) {
            Some(Work::Wait(waiting)) => Some(waiting),
            _ => None,
        };
        let (Some(sink), Some(source)) = (waits(self, server, operation), waits(self, from, &other)) else {
            return;
        };
        if sink.is_target() && !source.is_target() {
            self.join((from, &other, &source), (server, operation, &sink), true);
        }
    }

    /// A socket is gone.
    fn unplugged(&mut self, server: &str, operation: &OperationId) {
        const WHY: &str = "websocket: close 1006 (abnormal closure): unexpected EOF";
        let running = self
            .operation(server, operation)
            .filter(|op| op.state == OperationState::Running);
        match running.map(|op| op.work.clone()) {
            Some(Work::Transfer(id)) => self.break_transfer(id, WHY, false),
            Some(Work::Wait(_)) => self.give_up_waiting(server, operation, WHY),
            Some(_) | None => {}
        }
    }

    /// Whether those two cannot reach each other, as a firewall between them has it.
    pub fn apart(&self, one: &str, other: &str) -> bool {
        let pair = |a: &str, b: &str| self.apart.contains(&(a.to_owned(), b.to_owned()));
        pair(one, other) || pair(other, one)
    }
}
