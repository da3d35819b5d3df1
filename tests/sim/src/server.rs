//! One simulated server as one controller sees it: the port of berth-core over the world.

use std::time::Duration;

use async_trait::async_trait;
use berth_core::model::{Change, Definition, Fresh, Inside, Instance, InstanceRef, ServerFacts, Snapshot};
use berth_core::server::{
    AcceptRequest, Channel, Data, Export, FailureKind, ImportRequest, OfferRequest, Operation, OperationId,
    OperationState, PowerAction, Relocation, Result, Server, ServerError, ServerEvent, Socket,
};
use futures::StreamExt;
use futures::stream::BoxStream;
use jiff::Timestamp;

use crate::operations::shown;
use crate::sockets::socket;
use crate::state::{Host, State};
use crate::world::World;
use crate::writes::{Answer, Failure, Write};
use crate::{config, view};

/// Bytes that every instance takes.
const SIZE: i64 = 200 << 20;

/// A server as one controller sees it.
#[derive(Clone)]
pub struct SimServer {
    world: World,
    controller: String,
    server: String,
}

impl SimServer {
    pub(crate) fn new(world: World, controller: &str, server: &str) -> Self {
        Self {
            world,
            controller: controller.to_owned(),
            server: server.to_owned(),
        }
    }

    async fn read<T>(&self, what: &'static str, f: impl FnOnce(&Host) -> T) -> Result<T> {
        self.world.on_the_way(&self.controller, &self.server).await;
        self.world.count(&self.controller, &self.server, what);
        self.reached(what, f)
    }

    fn reached<T>(&self, what: &'static str, f: impl FnOnce(&Host) -> T) -> Result<T> {
        let attempted = format!("{what} on {}", self.server);
        self.world.look(
            |s: &State| match s.servers.get(&self.server).filter(|h| h.reachable()) {
                Some(host) => Ok(f(host)),
                None => Err(ServerError::new(
                    FailureKind::Unreachable,
                    attempted,
                    "connect: connection refused",
                )),
            },
        )
    }

    async fn write(&self, write: Write) -> Result<Answer> {
        let attempted = format!("{} on {}", write.describe(), self.server);
        self.world
            .submit(&self.controller, &self.server, write)
            .await
            .map_err(|e| match e {
                Failure::Server(e) => e,
                Failure::Record(e) => ServerError::new(FailureKind::Protocol, attempted, e.to_string()),
            })
    }

    async fn operation(&self, write: Write) -> Result<OperationId> {
        let attempted = format!("{} on {}", write.describe(), self.server);
        match self.write(write).await? {
            Answer::Operation(id) => Ok(id),
            Answer::Done | Answer::Channel(_) | Answer::Record(_) | Answer::Copy(_) => Err(ServerError::new(
                FailureKind::Protocol,
                attempted,
                "no operation in the answer",
            )),
        }
    }

    async fn channel(&self, write: Write) -> Result<Channel> {
        let attempted = format!("{} on {}", write.describe(), self.server);
        match self.write(write).await? {
            Answer::Channel(c) => Ok(c),
            Answer::Done | Answer::Operation(_) | Answer::Record(_) | Answer::Copy(_) => Err(ServerError::new(
                FailureKind::Protocol,
                attempted,
                "no operation in the answer",
            )),
        }
    }
}

#[async_trait]
impl Server for SimServer {
    async fn facts(&self) -> Result<ServerFacts> {
        self.read("facts", view::facts).await
    }

    async fn inventory(&self) -> Result<Vec<Instance>> {
        self.read("inventory", |h| {
            h.instances.iter().map(|(at, i)| view::instance(h, at, i)).collect()
        })
        .await
    }

    async fn instance(&self, at: &InstanceRef) -> Result<Option<Fresh>> {
        let fresh = |h: &Host| {
            let i = h.instances.get(at)?;
            Some(Fresh {
                instance: view::instance(h, at, i),
                etag: config::etag(i),
            })
        };
        self.read("instance", fresh).await
    }

    async fn snapshots(&self, at: &InstanceRef) -> Result<Vec<Snapshot>> {
        let found = self
            .read("snapshots", |h| h.instances.get(at).map(view::snapshots))
            .await?;
        let attempted = || format!("list the snapshots of {at} on {}", self.server);
        found.ok_or_else(|| ServerError::new(FailureKind::NotFound, attempted(), "Instance not found"))
    }

    async fn backups(&self, _: &InstanceRef) -> Result<Vec<String>> {
        self.read("backups", |_| Vec::new()).await
    }

    async fn volumes(&self, _: &str, _: &str) -> Result<Vec<String>> {
        self.read("volumes", |_| Vec::new()).await
    }

    async fn size(&self, at: &InstanceRef) -> Result<Option<i64>> {
        // pools without volumes of their own do not say
        let of = |h: &Host| {
            let i = h.instances.get(at)?;
            Some((h.driver(&i.pool) != "dir").then_some(SIZE))
        };
        let found = self.read("size", of).await?;
        let attempted = || format!("ask for the size of {at} on {}", self.server);
        found.ok_or_else(|| ServerError::new(FailureKind::NotFound, attempted(), "Instance not found"))
    }

    async fn inside(&self, at: &InstanceRef) -> Result<Inside> {
        let seen = |h: &Host| {
            let i = h.instances.get(at)?;
            Some(i.runs().then_some(Inside {
                answers: !i.ending,
                owns_root: Some(!i.nobodys),
                systemd: false,
            }))
        };
        let attempted = || format!("look inside {at} on {}", self.server);
        match self.read("inside", seen).await? {
            Some(Some(inside)) => Ok(inside),
            Some(None) => Err(ServerError::new(
                FailureKind::Refused,
                attempted(),
                "Instance is not running",
            )),
            None => Err(ServerError::new(
                FailureKind::NotFound,
                attempted(),
                "Instance not found",
            )),
        }
    }

    async fn free_space(&self, pool: &str, _: Option<&str>) -> Result<Option<i64>> {
        // as much as anybody needs
        let of = |h: &Host| h.pools.iter().any(|p| p.name == pool).then_some(1 << 40);
        self.read("free-space", of).await
    }

    async fn operations(&self) -> Result<Vec<Operation>> {
        let running = |h: &Host| {
            let running = h
                .operations
                .iter()
                .filter(|(_, op)| op.state == OperationState::Running);
            running.map(|(id, op)| shown(id, op)).collect()
        };
        self.read("operations", running).await
    }

    async fn patch(&self, at: &InstanceRef, change: &Change, etag: &str) -> Result<()> {
        self.write(Write::Patch(at.clone(), change.clone(), etag.to_owned()))
            .await
            .map(|_| ())
    }

    async fn put(&self, at: &InstanceRef, definition: &Definition, etag: &str) -> Result<()> {
        self.write(Write::Put(at.clone(), definition.clone(), etag.to_owned()))
            .await
            .map(|_| ())
    }

    async fn set_power(&self, at: &InstanceRef, action: PowerAction) -> Result<OperationId> {
        self.operation(Write::Power(at.clone(), action)).await
    }

    async fn snapshot(&self, at: &InstanceRef, name: &str, _: Option<Timestamp>) -> Result<OperationId> {
        self.operation(Write::Snapshot(at.clone(), name.to_owned())).await
    }

    async fn remove_snapshot(&self, at: &InstanceRef, name: &str) -> Result<OperationId> {
        self.operation(Write::RemoveSnapshot(at.clone(), name.to_owned())).await
    }

    async fn offer(&self, at: &InstanceRef, request: &OfferRequest) -> Result<Channel> {
        self.channel(Write::Offer(at.clone(), request.clone())).await
    }

    async fn accept(&self, request: &AcceptRequest) -> Result<Channel> {
        self.channel(Write::Accept(Box::new(request.clone()))).await
    }

    async fn connect(&self, waiting: &Channel, name: &str) -> Result<Socket> {
        self.write(Write::Connect(waiting.clone(), name.to_owned())).await?;
        Ok(socket(&self.world, &self.server, &waiting.operation, name))
    }

    async fn back_up(&self, at: &InstanceRef, name: &str, instance_only: bool, _: Duration) -> Result<OperationId> {
        self.operation(Write::BackUp(at.clone(), name.to_owned(), instance_only))
            .await
    }

    async fn export(&self, at: &InstanceRef, what: &Export) -> Result<Data> {
        self.read("export", |_| ()).await?;
        let attempted = format!("export {at} on {}", self.server);
        let number = self.world.change(|s| s.exported(&self.server, at, what, &attempted))?;
        Ok(crate::backups::data(number))
    }

    async fn drop_backup(&self, at: &InstanceRef, name: &str) -> Result<OperationId> {
        self.operation(Write::DropBackup(at.clone(), name.to_owned())).await
    }

    async fn import(&self, request: &ImportRequest, data: Data) -> Result<OperationId> {
        let number = crate::backups::number(data).await?;
        self.operation(Write::Import(request.clone(), number)).await
    }

    async fn relocate(&self, at: &InstanceRef, to: &Relocation) -> Result<OperationId> {
        self.operation(Write::Relocate(at.clone(), to.clone())).await
    }

    async fn rename(&self, at: &InstanceRef, name: &str) -> Result<OperationId> {
        self.operation(Write::Rename(at.clone(), name.to_owned())).await
    }

    async fn remove(&self, at: &InstanceRef) -> Result<OperationId> {
        self.operation(Write::Remove(at.clone())).await
    }

    async fn wait(&self, operation: &OperationId, timeout: Duration) -> Result<OperationState> {
        let until = tokio::time::Instant::now() + timeout;
        let mut changes = self.world.changes();
        self.world.on_the_way(&self.controller, &self.server).await;
        self.world.count(&self.controller, &self.server, "wait");
        loop {
            self.world.alive(&self.controller).await;
            changes.mark_unchanged();
            let state = self.reached("wait for an operation", |h| {
                h.operations.get(operation).map(|op| op.state.clone())
            })?;
            match state {
                None => return Ok(OperationState::Gone),
                Some(OperationState::Running) => {}
                Some(ended) => return Ok(ended),
            }
            if tokio::time::timeout_at(until, changes.changed()).await.is_err() {
                self.world.alive(&self.controller).await;
                return Ok(OperationState::Running);
            }
        }
    }

    async fn cancel(&self, operation: &OperationId) -> Result<()> {
        self.write(Write::Cancel(operation.clone())).await.map(|_| ())
    }

    async fn events(&self) -> Result<BoxStream<'static, ServerEvent>> {
        self.read("events", |_| ()).await?;
        let (sender, receiver) = futures::channel::mpsc::unbounded();
        self.world.change(|s| {
            if let Some(host) = s.servers.get_mut(&self.server) {
                host.listeners.push(sender);
            }
        });
        Ok(receiver.boxed())
    }
}
