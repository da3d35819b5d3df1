//! The port, verb by verb: which request each one is. No decisions, no retries.

use std::time::Duration;

use async_trait::async_trait;
use berth_core::model::{Change, Definition, Fresh, Inside, Instance, InstanceRef, ServerFacts, Snapshot};
use berth_core::server::{
    AcceptRequest, Channel, Data, Export, FailureKind, ImportRequest, OfferRequest, Operation, OperationId,
    OperationState, PowerAction, Relocation, Result, Server, ServerEvent, Socket,
};
use futures::stream::BoxStream;
use jiff::Timestamp;
use reqwest::Method;
use serde::de::IgnoredAny;

use crate::answer::Answer;
use crate::http::{Call, HttpServer, INVENTORY, UNCONDITIONAL};
use crate::observe::RequestClass;
use crate::wire::{InstanceWire, RoomWire, SnapshotWire, StateWire};
use crate::{bodies, path};

/// How long the end of a `PUT` that became an operation is waited for; it takes some 50 ms.
const PUT: Duration = Duration::from_secs(30);

#[async_trait]
impl Server for HttpServer {
    async fn facts(&self) -> Result<ServerFacts> {
        self.read_facts().await
    }

    async fn inventory(&self) -> Result<Vec<Instance>> {
        match self.list_instances("all-projects", "true", "default").await {
            // LXD 5 lists all projects only for those who may see them all
            Err(e) if e.kind == FailureKind::Refused => {
                let mut all = Vec::new();
                for project in self.project_names().await? {
                    all.extend(self.list_instances("project", &project, &project).await?);
                }
                Ok(all)
            }
            other => other,
        }
    }

    async fn instance(&self, at: &InstanceRef) -> Result<Option<Fresh>> {
        let call = Call::get(RequestClass::Instance, path::instance(at, ""), format!("read {at}"));
        match self.read::<InstanceWire>(&call).await {
            Ok((wire, Some(etag))) => Ok(Some(Fresh {
                instance: wire.into_model(&at.project),
                etag,
            })),
            Ok((_, None)) => Err(self.error(&call, FailureKind::Protocol, "no ETag in the answer")),
            Err(e) if e.kind == FailureKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    async fn snapshots(&self, at: &InstanceRef) -> Result<Vec<Snapshot>> {
        let path = path::with_query(path::instance(at, "/snapshots"), "recursion", "1");
        let call = Call::get(RequestClass::Snapshots, path, format!("list the snapshots of {at}"));
        Ok(SnapshotWire::into_models(self.list(&call).await?))
    }

    async fn backups(&self, at: &InstanceRef) -> Result<Vec<String>> {
        let call = Call::get(
            RequestClass::Instance,
            path::instance(at, "/backups"),
            format!("list the backups of {at}"),
        );
        Ok(names(self.list(&call).await?))
    }

    async fn volumes(&self, pool: &str, project: &str) -> Result<Vec<String>> {
        let path = format!("/1.0/storage-pools/{}/volumes/custom", path::encode(pool));
        let call = Call::get(
            RequestClass::Facts,
            path::with_query(path, "project", project),
            format!("list the volumes of pool {pool}"),
        );
        Ok(names(self.list(&call).await?))
    }

    async fn size(&self, at: &InstanceRef) -> Result<Option<i64>> {
        let call = Call::get(
            RequestClass::State,
            path::instance(at, "/state"),
            format!("ask for the size of {at}"),
        );
        let (state, _) = self.read::<StateWire>(&call).await?;
        Ok(state.size())
    }

    async fn inside(&self, at: &InstanceRef) -> Result<Inside> {
        self.look_inside(at).await
    }

    async fn free_space(&self, pool: &str, member: Option<&str>) -> Result<Option<i64>> {
        let mut path = format!("/1.0/storage-pools/{}/resources", path::encode(pool));
        if let Some(member) = member {
            path = path::with_query(path, "target", member);
        }
        let call = Call::get(RequestClass::Facts, path, format!("ask for the space of pool {pool}"));
        let (resources, _) = self.read::<RoomWire>(&call).await?;
        Ok(resources.free())
    }

    async fn operations(&self) -> Result<Vec<Operation>> {
        self.running_operations().await
    }

    async fn patch(&self, at: &InstanceRef, change: &Change, etag: &str) -> Result<()> {
        let call = Call::new(
            Method::PATCH,
            RequestClass::Patch,
            path::instance(at, ""),
            format!("change {at}"),
        )
        .etag(etag)
        .body(bodies::change(change));
        self.finish(&call).await
    }

    async fn put(&self, at: &InstanceRef, definition: &Definition, etag: &str) -> Result<()> {
        let call = Call::new(
            Method::PUT,
            RequestClass::Put,
            path::instance(at, ""),
            format!("replace {at}"),
        )
        .etag(etag)
        .body(bodies::definition(definition));
        self.finish(&call).await
    }

    async fn set_power(&self, at: &InstanceRef, action: PowerAction) -> Result<OperationId> {
        if action == PowerAction::Unfreeze {
            self.end_freezing(at).await?;
        }
        let what = match action {
            PowerAction::Start { .. } => "start",
            PowerAction::Stop { .. } => "stop",
            PowerAction::ForceStop => "force the stop of",
            PowerAction::Unfreeze => "unfreeze",
        };
        let call = state(at, what).body(bodies::power(action));
        Ok(self.begin(&call).await?.0)
    }

    async fn snapshot(&self, at: &InstanceRef, name: &str, expires_at: Option<Timestamp>) -> Result<OperationId> {
        let what = format!("take snapshot {name} of {at}");
        let call = Call::new(
            Method::POST,
            RequestClass::Snapshot,
            path::instance(at, "/snapshots"),
            what,
        )
        .body(bodies::snapshot(name, expires_at));
        Ok(self.begin(&call).await?.0)
    }

    async fn remove_snapshot(&self, at: &InstanceRef, name: &str) -> Result<OperationId> {
        let what = format!("delete snapshot {name} of {at}");
        let call = Call::new(
            Method::DELETE,
            RequestClass::RemoveSnapshot,
            path::snapshot(at, name),
            what,
        )
        .within(UNCONDITIONAL);
        Ok(self.begin(&call).await?.0)
    }

    async fn offer(&self, at: &InstanceRef, request: &OfferRequest) -> Result<Channel> {
        let (path, what) = match &request.snapshot {
            Some(name) => (
                path::snapshot(at, name),
                format!("offer snapshot {name} of {at} for a transfer"),
            ),
            None => (path::instance(at, ""), format!("offer {at} for a transfer")),
        };
        let call = Call::new(Method::POST, RequestClass::Offer, path, what).body(bodies::offer(request));
        self.channel(&call, request.push_to.is_none()).await
    }

    async fn accept(&self, request: &AcceptRequest) -> Result<Channel> {
        let mut path = path::with_query("/1.0/instances".to_owned(), "project", &request.at.project);
        if let Some(member) = &request.member {
            path = path::with_query(path, "target", member);
        }
        let what = format!("receive {}", request.at);
        let call = Call::new(Method::POST, RequestClass::Accept, path, what).body(bodies::accept(request));
        self.channel(&call, request.pull_from.is_none()).await
    }

    async fn connect(&self, waiting: &Channel, name: &str) -> Result<Socket> {
        self.open_channel(waiting, name).await
    }

    async fn back_up(&self, at: &InstanceRef, name: &str, instance_only: bool, keep: Duration) -> Result<OperationId> {
        self.make_backup(at, name, instance_only, keep).await
    }

    async fn export(&self, at: &InstanceRef, what: &Export) -> Result<Data> {
        self.fetch_backup(at, what).await
    }

    async fn drop_backup(&self, at: &InstanceRef, name: &str) -> Result<OperationId> {
        self.delete_backup(at, name).await
    }

    async fn import(&self, request: &ImportRequest, data: Data) -> Result<OperationId> {
        self.import_backup(request, data).await
    }

    async fn relocate(&self, at: &InstanceRef, to: &Relocation) -> Result<OperationId> {
        let mut path = path::instance(at, "");
        if let Some(member) = &to.member {
            path = path::with_query(path, "target", member);
        }
        let call = Call::new(
            Method::POST,
            RequestClass::Relocate,
            path,
            format!("move {at} inside the server"),
        )
        .within(UNCONDITIONAL)
        .body(bodies::relocation(&at.name, to));
        Ok(self.begin(&call).await?.0)
    }

    async fn rename(&self, at: &InstanceRef, name: &str) -> Result<OperationId> {
        let what = format!("rename {at} to {name}");
        let call = Call::new(Method::POST, RequestClass::Rename, path::instance(at, ""), what)
            .within(UNCONDITIONAL)
            .body(bodies::rename(name));
        Ok(self.begin(&call).await?.0)
    }

    async fn remove(&self, at: &InstanceRef) -> Result<OperationId> {
        let call = Call::new(
            Method::DELETE,
            RequestClass::Remove,
            path::instance(at, ""),
            format!("delete {at}"),
        )
        .within(UNCONDITIONAL);
        Ok(self.begin(&call).await?.0)
    }

    async fn wait(&self, operation: &OperationId, timeout: Duration) -> Result<OperationState> {
        self.wait_for(operation, timeout).await
    }

    async fn cancel(&self, operation: &OperationId) -> Result<()> {
        let path = format!("/1.0/operations/{}", path::encode(&operation.0));
        let call = Call::new(
            Method::DELETE,
            RequestClass::Cancel,
            path,
            format!("cancel operation {operation}"),
        );
        self.finish(&call).await
    }

    async fn events(&self) -> Result<BoxStream<'static, ServerEvent>> {
        self.subscribe().await
    }
}

/// The last part of each address in a list of them.
fn names(addresses: Vec<String>) -> Vec<String> {
    addresses.iter().filter_map(|a| path::last_segment(a)).collect()
}

/// A change of power state, yet without its body.
fn state(at: &InstanceRef, what: &str) -> Call {
    let path = path::instance(at, "/state");
    Call::new(Method::PUT, RequestClass::Power, path, format!("{what} {at}")).within(UNCONDITIONAL)
}

impl HttpServer {
    /// A daemon that dies in the midst of freezing a container leaves it frozen and its state at Freezing: then both products
    /// say that it runs, and unfreeze nothing (*seen* on Incus 6.0.4). Frozen anew it can be unfrozen.
    async fn end_freezing(&self, at: &InstanceRef) -> Result<()> {
        let look = Call::get(RequestClass::Instance, path::instance(at, ""), format!("read {at}"));
        if !self.read::<InstanceWire>(&look).await?.0.is_freezing() {
            return Ok(());
        }
        self.finish(&state(at, "freeze").body(bodies::freeze())).await
    }

    async fn list_instances(&self, key: &str, value: &str, project: &str) -> Result<Vec<Instance>> {
        let path = path::with_query("/1.0/instances?recursion=1".to_owned(), key, value);
        let call = Call::get(RequestClass::Inventory, path, "list all instances").within(INVENTORY);
        let list: Vec<InstanceWire> = self.list(&call).await?;
        Ok(list.into_iter().map(|wire| wire.into_model(project)).collect())
    }

    /// Sends a write that some servers carry out at once and others in the background, and waits for its end.
    async fn finish(&self, call: &Call) -> Result<()> {
        let operation = match self.ask::<IgnoredAny>(call).await? {
            Answer::Sync { .. } => return Ok(()),
            Answer::Async { operation, .. } => operation,
            Answer::Error { code, text, .. } => return Err(self.refusal(call, code, text).await),
        };
        match self.wait_for(&operation, PUT).await? {
            OperationState::Succeeded => Ok(()),
            OperationState::Failed(text) => Err(self.refusal(call, 500, text).await),
            OperationState::Running => Err(self.error(call, FailureKind::Unknown, "the server has not finished yet")),
            OperationState::Gone => Err(self.error(call, FailureKind::Unknown, "its operation is gone")),
        }
    }

    /// Opens one end of a migration. The end that waits for the other (`waits`) has secrets, the other end has none.
    async fn channel(&self, call: &Call, waits: bool) -> Result<Channel> {
        let (operation, wire) = self.begin(call).await?;
        let secrets = if waits {
            wire.map(|w| w.secrets()).unwrap_or_default()
        } else {
            Default::default()
        };
        if waits && !secrets.contains_key("control") {
            return Err(self.error(call, FailureKind::Protocol, "no secrets in the answer"));
        }
        Ok(Channel { operation, secrets })
    }
}
