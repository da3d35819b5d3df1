//! Migration between two servers: each end waits for the other, the target's record exists at once, the data come later,
//! and either daemon can die in between. What is left behind then is what the real daemons were seen to leave.

use std::collections::BTreeMap;

use berth_core::model::{InstanceKind, InstanceRef, Power, Product};
use berth_core::server::{
    AcceptRequest, Channel, FailureKind, OfferRequest, OperationId, OperationState, Peer, Progress, ServerError,
};
use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};

use crate::config;
use crate::operations::{Due, Work};
use crate::state::{Answered, Busy, CERTIFICATE, Content, Inst, Snap, State};

/// One end that waits.
#[derive(Clone, Debug)]
pub(crate) struct Waiting {
    side: Side,
    born: u64,
    live: bool,
    instance_only: bool,
    /// The disk as it was in that snapshot.
    snapshot: Option<String>,
    /// Onto an existing instance.
    refresh: bool,
    /// Without snapshots that are older than the newest common one.
    exclude_older: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    /// With the answer whether this server cancels such an operation.
    Target {
        cancellable: bool,
    },
}

impl Waiting {
    pub fn is_target(&self) -> bool {
        matches!(self.side, Side::Target { .. })
    }

    pub fn cancellable(&self) -> bool {
        match self.side {
            Side::Source => true,
            Side::Target { cancellable } => cancellable,
        }
    }
}

/// One end of a transfer.
#[derive(Clone, Debug)]
pub(crate) struct EndOf {
    pub server: String,
    pub born: u64,
    pub operation: OperationId,
}

/// A transfer that runs.
#[derive(Clone, Debug)]
pub(crate) struct Transfer {
    pub source: EndOf,
    pub target: EndOf,
    pub live: bool,
    pub refresh: bool,
    exclude_older: bool,
    instance_only: bool,
    pub snapshot: Option<String>,
    /// What the source was when the transfer began.
    data: u64,
    used: Timestamp,
    pub ran: bool,
    stalled: bool,
    /// Once the data have arrived: what they are.
    arrived: Option<Content>,
    /// Whether the source waited for the target (then its operation can be cancelled).
    pull: bool,
    /// CRIU at work on the source's server.
    pub dump: Option<OperationId>,
}

impl State {
    pub fn offer(&mut self, server: &str, at: &InstanceRef, request: &OfferRequest, what: &str) -> Answered<Channel> {
        let i = self.inst(server, at, what)?.clone();
        let host = self.host(server, what)?;
        let refused = |why: &str| ServerError::new(FailureKind::Refused, what, why);
        let live = request.live && i.runs() && request.snapshot.is_none();
        let found = |name: &String| i.snapshots.iter().any(|s| s.name == *name);
        if request.snapshot.as_ref().is_some_and(|name| !found(name)) {
            return Err(ServerError::new(FailureKind::NotFound, what, "Snapshot not found"));
        }
        if live && i.kind == InstanceKind::Container && !host.criu {
            return Err(refused(
                "Unable to perform live container migration. CRIU isn't installed on the source server",
            ));
        }
        let held = |b: &&Busy| b.action == "migrate" || (b.action == "stop" && !i.runs());
        if let Some(busy) = i.busy.as_ref().filter(held) {
            let why = format!("Instance is busy running a \"{}\" operation", busy.action);
            return Err(ServerError::new(FailureKind::Busy, what, why));
        }
        let waiting = Waiting {
            side: Side::Source,
            born: i.born,
            live,
            instance_only: request.instance_only,
            snapshot: request.snapshot.clone(),
            refresh: false,
            exclude_older: false,
        };
        match &request.push_to {
            None => Ok(self.open(server, at, waiting)),
            Some(peer) => {
                let operation = self.begin(server, "Migrating instance", at, Work::End(Ok(())), Some(CERTIFICATE));
                match self.find_peer(server, peer) {
                    Ok((other, sink)) => self.join(
                        (server, &operation, &waiting),
                        (&other, &peer.channel.operation, &sink),
                        false,
                    ),
                    Err(why) => self.end(server, &operation, Err(why)),
                }
                Ok(Channel {
                    operation,
                    secrets: BTreeMap::new(),
                })
            }
        }
    }

    pub fn accept(&mut self, server: &str, request: &AcceptRequest, what: &str) -> Answered<Channel> {
        let existing = self.host(server, what)?.instances.contains_key(&request.at);
        let refresh = request.refresh && existing;
        let born = if refresh {
            self.refreshed(server, request, what)?
        } else {
            self.create(server, request, what)?
        };
        if let Some(why) = self.misses_state(server, request) {
            self.vanish(server, born, None);
            return Err(ServerError::new(FailureKind::Refused, what, why));
        }
        let host = self.host(server, what)?;
        let cancellable = host.product == Product::Incus && host.version.starts_with('7');
        let waiting = Waiting {
            side: Side::Target { cancellable },
            born,
            live: request.live,
            instance_only: request.instance_only,
            snapshot: None,
            refresh,
            exclude_older: request.exclude_older && host.has("custom_volume_refresh_exclude_older_snapshots"),
        };
        let Some(peer) = &request.pull_from else {
            let channel = self.open(server, &request.at, waiting);
            self.occupy(server, born, "create", &channel.operation);
            return Ok(channel);
        };
        let operation = self.begin(
            server,
            "Creating instance",
            &request.at,
            Work::Wait(waiting.clone()),
            Some(CERTIFICATE),
        );
        self.occupy(server, born, "create", &operation);
        match self.find_peer(server, peer) {
            Ok((other, source)) => self.join(
                (&other, &peer.channel.operation, &source),
                (server, &operation, &waiting),
                true,
            ),
            Err(why) => self.give_up_waiting(server, &operation, &why),
        }
        Ok(Channel {
            operation,
            secrets: BTreeMap::new(),
        })
    }

    fn occupy(&mut self, server: &str, born: u64, action: &'static str, operation: &OperationId) {
        if let Some(i) = self.inst_by_born(server, born) {
            i.busy = Some(Busy {
                action,
                operation: Some(operation.clone()),
            });
        }
    }

    /// An existing instance that is brought up to date: the definition in the body is ignored.
    fn refreshed(&mut self, server: &str, request: &AcceptRequest, what: &str) -> Answered<u64> {
        let host = self.host(server, what)?;
        let at = &request.at;
        if let Some(p) = request
            .definition
            .profiles
            .iter()
            .find(|p| host.profile(&at.project, p).is_none())
        {
            let why = format!("Requested profile \"{p}\" doesn't exist");
            return Err(ServerError::new(FailureKind::Refused, what, why));
        }
        let i = self.inst(server, at, what)?;
        if i.runs() {
            let why = "Failed getting exclusive access to instance: Instance is running";
            return Err(ServerError::new(FailureKind::Refused, what, why));
        }
        if let Some(busy) = &i.busy {
            let why = format!("Instance is busy running a \"{}\" operation", busy.action);
            return Err(ServerError::new(FailureKind::Busy, what, why));
        }
        Ok(i.born)
    }

    /// The record of the copy: made in the request itself, before any data.
    fn create(&mut self, server: &str, request: &AcceptRequest, what: &str) -> Answered<u64> {
        let (moment, born, uuid, cloud_init) = (self.moment(), self.next(), self.fresh_uuid(), self.fresh_uuid());
        let refused = |why: String| ServerError::new(FailureKind::Refused, what, why);
        let at = &request.at;
        let host = self.host(server, what)?;
        if !berth_core::marks::valid_name(&at.name) {
            return Err(refused(format!("Invalid instance name \"{}\"", at.name)));
        }
        let Some(project) = host.project(&at.project).cloned() else {
            return Err(ServerError::new(
                FailureKind::NotFound,
                what,
                format!("Project \"{}\" not found", at.project),
            ));
        };
        if project.restricted() && host.version.starts_with('7') && request.pull_from.is_some() {
            return Err(refused(
                "Restricted projects aren't allowed to use pull mode migration".to_owned(),
            ));
        }
        let member = crate::relocate::choose_member(host, request.member.as_deref(), None).map_err(refused)?;
        let d = &request.definition;
        let mut i = Inst::new(born, request.kind, &d.architecture, moment);
        (i.config, i.devices, i.profiles) = (d.config.clone(), d.devices.clone(), d.profiles.clone());
        (i.ephemeral, i.description, i.member) = (d.ephemeral, d.description.clone(), member);
        i.config.retain(|_, v| !v.is_empty());
        i.config.entry("volatile.uuid".to_owned()).or_insert(uuid);
        i.config
            .entry(berth_core::marks::CLOUD_INIT_ID.to_owned())
            .or_insert(cloud_init);
        let generation = i.uuid().to_owned();
        i.config.insert("volatile.uuid.generation".to_owned(), generation);
        if let Some(why) = config::refusal(host, &at.project, None, &i) {
            return Err(refused(format!("Failed creating instance record: {why}")));
        }
        if host.instances.contains_key(at) {
            return Err(ServerError::new(
                FailureKind::AlreadyExists,
                what,
                "This \"Instance\" entry already exists",
            ));
        }
        i.pool = config::pool_for(host, &at.project, &mut i).map_err(refused)?;
        let mut n = born;
        config::add_hwaddrs(host, &at.project, &mut i, || {
            n += 0x1_0000;
            n
        });
        host.instances.insert(at.clone(), i);
        host.lifecycle(at, "instance-created", Some(CERTIFICATE));
        Ok(born)
    }

    /// An end that waits, with its secrets.
    fn open(&mut self, server: &str, at: &InstanceRef, waiting: Waiting) -> Channel {
        let mut secrets = BTreeMap::new();
        for name in ["control", "fs"].into_iter().chain(waiting.live.then_some("criu")) {
            secrets.insert(name.to_owned(), format!("secret-{}", self.next()));
        }
        let description = if waiting.side == Side::Source {
            "Migrating instance"
        } else {
            "Creating instance"
        };
        let operation = self.begin(server, description, at, Work::Wait(waiting), Some(CERTIFICATE));
        if let Some(op) = self.operation_mut(server, &operation) {
            op.secrets.clone_from(&secrets);
        }
        if let Some(peer) = self.servers.get(server).map(|h| h.timing.peer) {
            self.later(peer, Due::PeerTimeout(server.to_owned(), operation.clone()));
        }
        let secrets = secrets.into_iter().map(|(k, v)| (k, SecretString::from(v))).collect();
        Channel { operation, secrets }
    }

    /// The waiting end that a peer names, as seen from `from`.
    fn find_peer(&self, from: &str, peer: &Peer) -> Result<(String, Waiting), String> {
        let address = peer.address.trim_start_matches("https://").trim_end_matches('/');
        let found = self
            .servers
            .values()
            .find(|h| h.address == address || h.name == address);
        let reachable = found
            .filter(|h| h.reachable() && self.servers.get(from).is_some_and(|f| !f.cut) && !self.apart(from, &h.name));
        let Some(host) = reachable else {
            return Err(format!(
                "Unable to connect to: {address} ([dial tcp {address}: connect: connection refused])"
            ));
        };
        if host.certificate != peer.certificate {
            return Err(format!(
                "tls: failed to verify certificate: x509: certificate is valid for {}",
                host.name
            ));
        }
        let bad = || "websocket: bad handshake".to_owned();
        let op = host.operations.get(&peer.channel.operation).ok_or_else(bad)?;
        let given = peer
            .channel
            .secrets
            .iter()
            .all(|(k, v)| op.secrets.get(k).is_some_and(|s| s == v.expose_secret()));
        match &op.work {
            Work::Wait(waiting) if given && op.state == OperationState::Running && !op.secrets.is_empty() => {
                Ok((host.name.clone(), waiting.clone()))
            }
            _ => Err(bad()),
        }
    }

    pub fn peer_timeout(&mut self, server: &str, id: &OperationId) {
        let waits = self
            .operation(server, id)
            .is_some_and(|op| matches!(op.work, Work::Wait(_)));
        if waits {
            self.give_up_waiting(server, id, "Timed out waiting for migration connections");
        }
    }

    /// An end whose peer never came: a record that was made for it goes again.
    pub fn give_up_waiting(&mut self, server: &str, id: &OperationId, why: &str) {
        let Some(op) = self.operation(server, id) else { return };
        let Work::Wait(waiting) = op.work.clone() else { return };
        if op.state != OperationState::Running {
            return;
        }
        self.end(server, id, Err(why.to_owned()));
        if matches!(waiting.side, Side::Target { .. }) && !waiting.refresh {
            self.vanish(server, waiting.born, None);
        }
    }

    /// Both ends found each other.
    pub fn join(&mut self, source: (&str, &OperationId, &Waiting), target: (&str, &OperationId, &Waiting), pull: bool) {
        let start = self
            .inst_by_born(source.0, source.2.born)
            .map(|i| (i.data, i.last_used_at, i.runs(), i.busy.clone()));
        let live = source.2.live && target.2.live;
        let ends = [(source.0, source.2.born), (target.0, target.2.born)];
        let asked = [source.2.live, target.2.live];
        let of_guest = self.guest_stays(ends, asked, source.2.snapshot.is_some());
        let problem = match &start {
            _ if source.2.is_target() || !target.2.is_target() => Some("websocket: bad handshake".to_owned()),
            None => Some("Instance not found".to_owned()),
            Some((.., Some(busy))) => Some(format!("Instance is busy running a \"{}\" operation", busy.action)),
            Some((.., None)) => of_guest,
        };
        let (mut data, used, ran) = start.map_or((0, Timestamp::UNIX_EPOCH, false), |(d, u, r, _)| (d, u, r));
        let snapshots = self.inst_by_born(source.0, source.2.born).map(|i| i.snapshots.clone());
        let of_snapshot = |name: &String| snapshots.iter().flatten().find(|s| s.name == *name).map(|s| s.data);
        data = source.2.snapshot.as_ref().and_then(of_snapshot).unwrap_or(data);
        if let Some(why) = problem {
            self.end(source.0, source.1, Err(why.clone()));
            return self.give_up_waiting(target.0, target.1, &why);
        }
        let end_of = |(server, operation, w): (&str, &OperationId, &Waiting)| EndOf {
            server: server.to_owned(),
            born: w.born,
            operation: operation.clone(),
        };
        let transfer = Transfer {
            source: end_of(source),
            target: end_of(target),
            live,
            refresh: target.2.refresh,
            exclude_older: target.2.exclude_older,
            instance_only: source.2.instance_only || target.2.instance_only || source.2.snapshot.is_some(),
            snapshot: source.2.snapshot.clone(),
            data,
            used,
            ran,
            stalled: false,
            arrived: None,
            pull,
            dump: None,
        };
        if self.saves_state(&transfer) {
            // memory goes to the disk, the guest stops, and all of it is copied
            self.go_down(source.0, source.2.born, Some(CERTIFICATE));
            if let Some(i) = self.inst_by_born(source.0, source.2.born) {
                i.stateful = true;
            }
        }
        let id = self.next();
        self.occupy(source.0, source.2.born, "migrate", source.1);
        for (server, operation, _) in [source, target] {
            if let Some(op) = self.operation_mut(server, operation) {
                op.work = Work::Transfer(id);
                op.progress = Some(Progress {
                    bytes: 1 << 20,
                    bytes_per_second: 1 << 22,
                    percent: None,
                });
            }
            self.operation_event(server, operation);
        }
        if transfer.refresh {
            self.judge_refresh(target.0, target.2.born);
        }
        self.copy_snapshots(&transfer);
        if let Some(i) = self.inst_by_born(target.0, target.2.born).filter(|_| transfer.refresh) {
            i.content = Content::Mixed;
        }
        let duration = self
            .servers
            .get(target.0)
            .map(|h| h.timing.transfer)
            .unwrap_or_default();
        self.transfers.insert(id, transfer);
        self.later(duration, Due::Data(id));
    }

    /// The target lists all snapshots from the start; a migration carries whole seconds only. A refresh keeps those that
    /// both have by name and date, and deletes all others of the target before it sends anything.
    fn copy_snapshots(&mut self, t: &Transfer) {
        let Some(source) = self.inst_by_born(&t.source.server, t.source.born) else {
            return;
        };
        let mut snapshots = if t.instance_only {
            Vec::new()
        } else {
            source.snapshots.clone()
        };
        for s in &mut snapshots {
            s.created_at = Timestamp::from_second(s.created_at.as_second()).unwrap_or(s.created_at);
        }
        let Some(target) = self.inst_by_born(&t.target.server, t.target.born) else {
            return;
        };
        let common = |s: &&Snap| {
            target
                .snapshots
                .iter()
                .any(|o| o.name == s.name && o.created_at == s.created_at)
        };
        let newest_common = snapshots.iter().filter(common).map(|s| s.created_at).max();
        if let Some(newest) = newest_common.filter(|_| t.exclude_older) {
            let kept: Vec<String> = snapshots.iter().filter(common).map(|s| s.name.clone()).collect();
            snapshots.retain(|s| s.created_at >= newest || kept.contains(&s.name));
        }
        target.snapshots = snapshots;
    }

    /// The source's part is over; the target still has something to do.
    pub fn data_arrived(&mut self, id: u64) {
        let Some(t) = self.transfers.get(&id).cloned() else {
            return;
        };
        let cut = [&t.source, &t.target]
            .iter()
            .any(|e| self.servers.get(&e.server).is_none_or(|h| h.cut));
        if cut {
            let link = self
                .servers
                .get(&t.source.server)
                .map(|h| h.timing.link)
                .unwrap_or_default();
            if let Some(t) = self.transfers.get_mut(&id) {
                t.stalled = true;
            }
            return self.later(link, Due::LinkTimeout(id));
        }
        let target = self.servers.get(&t.target.server);
        let lxd = target.is_some_and(|h| h.product == Product::Lxd);
        let unknown = |i: &Inst| {
            i.snapshots
                .iter()
                .any(|s| s.config.contains_key("volatile.last_state.ready"))
        };
        if lxd
            && !t.instance_only
            && self
                .inst_by_born(&t.source.server, t.source.born)
                .is_some_and(|i| unknown(i))
        {
            let why = "Failed creating instance snapshot record: Unknown configuration key: volatile.last_state.ready";
            return self.break_transfer(id, why, false);
        }
        if let Some(why) = self.cannot_go_on(&t) {
            return self.break_transfer(id, &why, false);
        }
        let tail = self
            .servers
            .get(&t.target.server)
            .map(|h| h.timing.tail)
            .unwrap_or_default();
        // CRIU's source hears of the restore before it ends
        if !self.by_criu(&t) {
            self.end(&t.source.server, &t.source.operation, Ok(()));
        }
        let Some(source) = self.inst_by_born(&t.source.server, t.source.born).cloned() else {
            return;
        };
        let steady = !source.runs() && !t.ran && source.data == t.data && source.last_used_at == t.used;
        // a guest that runs is frozen meanwhile, or its disk is sent from a snapshot that the server takes
        let of_an_instant = t.snapshot.is_some() || (t.ran && !t.live);
        if let Some(target) = self.inst_by_born(&t.target.server, t.target.born) {
            target.data = if of_an_instant { t.data } else { source.data };
            target.guest = source.guest;
            target.twin = t.live && t.ran && source.runs() && source.kind != InstanceKind::Container;
        }
        self.dump_begins(id);
        if let Some(t) = self.transfers.get_mut(&id) {
            t.arrived = Some(match () {
                () if of_an_instant => Content::OfAnInstant,
                () if steady || t.live => Content::Complete,
                () => Content::Mixed,
            });
        }
        self.later(tail, Due::Tail(id));
    }

    pub fn transfer_done(&mut self, id: u64) {
        let Some(t) = self.transfers.remove(&id) else { return };
        self.restored(&t);
        if let Some(target) = self.inst_by_born(&t.target.server, t.target.born) {
            target.content = t.arrived.unwrap_or(Content::Mixed);
            if !t.refresh {
                target
                    .config
                    .insert("volatile.apply_template".to_owned(), "copy".to_owned());
            }
            if t.live && t.ran {
                target.power = Power::Running;
                target
                    .config
                    .insert("volatile.last_state.power".to_owned(), "RUNNING".to_owned());
            }
        }
        self.end(&t.target.server, &t.target.operation, Ok(()));
    }

    pub fn link_timeout(&mut self, id: u64) {
        if self.transfers.get(&id).is_some_and(|t| t.stalled) {
            self.break_transfer(id, "read: connection timed out", false);
        }
    }

    pub fn is_cancellable(&self, id: u64, server: &str, operation: &OperationId) -> bool {
        let source = |t: &Transfer| t.source.server == server && t.source.operation == *operation;
        self.transfers.get(&id).is_some_and(|t| t.pull && source(t))
    }

    /// Both ends fail. The target removes what it made, unless its daemon died.
    pub fn break_transfer(&mut self, id: u64, why: &str, target_died: bool) {
        let Some(t) = self.transfers.remove(&id) else { return };
        for operation in t.dump.iter().chain([&t.source.operation]) {
            let why = format!("Failed migration on source: {why}");
            self.end(&t.source.server, operation, Err(why));
        }
        self.end(
            &t.target.server,
            &t.target.operation,
            Err(format!("Error transferring instance data: {why}")),
        );
        if !t.refresh && !target_died {
            self.vanish(&t.target.server, t.target.born, None);
        }
    }

    /// A daemon died: its transfers break, and records that waited for a peer stay behind.
    pub fn break_transfers_of(&mut self, server: &str) {
        let hit: Vec<(u64, bool)> = self
            .transfers
            .iter()
            .filter(|(_, t)| {
                let source_works = t.arrived.is_none() || self.by_criu(t);
                t.target.server == server || (t.source.server == server && source_works)
            })
            .map(|(id, t)| (*id, t.target.server == server))
            .collect();
        for (id, target_died) in hit {
            self.break_transfer(
                id,
                "websocket: close 1006 (abnormal closure): unexpected EOF",
                target_died,
            );
        }
    }
}
