//! Every request that changes something, as data: it can be logged, numbered, failed, kept and delivered late. Carried
//! out here if it is about an instance's definition, name or snapshots; power, migration and records have their own modules.

use berth_core::copies::CopyRecord;
use berth_core::marks;
use berth_core::model::{Change, Definition, InstanceRef, Product};
use berth_core::records::{Record, RecordError};
use berth_core::server::{
    AcceptRequest, Channel, FailureKind, ImportRequest, OfferRequest, OperationId, PowerAction, Relocation, ServerError,
};

use crate::config;
use crate::operations::Work;
use crate::state::{Answered, CERTIFICATE, Content, Inst, Snap, State};

/// A request that changes something.
#[derive(Clone, Debug)]
pub enum Write {
    /// A conditional merge.
    Patch(InstanceRef, Change, String),
    /// A conditional replacement.
    Put(InstanceRef, Definition, String),
    /// A change of power state.
    Power(InstanceRef, PowerAction),
    /// A new snapshot.
    Snapshot(InstanceRef, String),
    /// The end of a snapshot.
    RemoveSnapshot(InstanceRef, String),
    /// The source's end of a migration.
    Offer(InstanceRef, OfferRequest),
    /// The target's end of a migration.
    Accept(Box<AcceptRequest>),
    /// A channel of an end that waits.
    Connect(Channel, String),
    /// A backup that is kept on the server: its name, and whether it is without snapshots.
    BackUp(InstanceRef, String, bool),
    /// The deletion of such a backup.
    DropBackup(InstanceRef, String),
    /// An instance from the backup of that number.
    Import(ImportRequest, u64),
    /// A move inside the server.
    Relocate(InstanceRef, Relocation),
    /// A rename.
    Rename(InstanceRef, String),
    /// A deletion.
    Remove(InstanceRef),
    /// The end of an operation.
    Cancel(OperationId),
    /// A new record.
    Create(Box<Record>),
    /// A record's new status, by compare-and-swap.
    Swap(Box<Record>),
    /// Finalizers set.
    Hold(Box<Record>),
    /// A copy's new status, by compare-and-swap.
    SwapCopy(Box<CopyRecord>),
    /// A copy's finalizer set.
    HoldCopy(Box<CopyRecord>),
    /// A copy's finalizer taken off.
    ReleaseCopy(Box<CopyRecord>),
}

impl Write {
    /// What kind of request it is, in one word.
    pub fn verb(&self) -> &'static str {
        match self {
            Write::Patch(..) => "patch",
            Write::Put(..) => "put",
            Write::Power(_, PowerAction::Start { .. }) => "start",
            Write::Power(_, PowerAction::Stop { .. }) => "stop",
            Write::Power(_, PowerAction::ForceStop) => "force-stop",
            Write::Power(_, PowerAction::Unfreeze) => "unfreeze",
            Write::Snapshot(..) => "snapshot",
            Write::RemoveSnapshot(..) => "remove-snapshot",
            Write::Offer(..) => "offer",
            Write::Accept(_) => "accept",
            Write::Connect(..) => "connect",
            Write::BackUp(..) => "back-up",
            Write::DropBackup(..) => "drop-backup",
            Write::Import(..) => "import",
            Write::Relocate(..) => "relocate",
            Write::Rename(..) => "rename",
            Write::Remove(_) => "remove",
            Write::Cancel(_) => "cancel",
            Write::Create(_) => "create-record",
            Write::Swap(_) => "swap-record",
            Write::Hold(_) => "hold",
            Write::SwapCopy(_) => "swap-copy",
            Write::HoldCopy(_) => "hold-copy",
            Write::ReleaseCopy(_) => "release-copy",
        }
    }

    /// Whether it goes to the store of records rather than to a server.
    pub fn is_record(&self) -> bool {
        matches!(
            self,
            Write::Create(_)
                | Write::Swap(_)
                | Write::Hold(_)
                | Write::SwapCopy(_)
                | Write::HoldCopy(_)
                | Write::ReleaseCopy(_)
        )
    }

    /// What it is about, for people.
    pub fn describe(&self) -> String {
        let verb = self.verb();
        match self {
            Write::Patch(at, change, _) => format!("{verb} {at} {}", brief(change)),
            Write::Put(at, ..) | Write::Power(at, _) | Write::Remove(at) => format!("{verb} {at}"),
            Write::Snapshot(at, name) => format!("{verb} {at} as {name}"),
            Write::RemoveSnapshot(at, name) => format!("{verb} {name} of {at}"),
            Write::Offer(at, r) => {
                let what = r.snapshot.as_deref().map(|s| format!(" as it was in {s}"));
                format!(
                    "{verb} {at}{}{}",
                    if r.live { " live" } else { "" },
                    what.unwrap_or_default()
                )
            }
            Write::Accept(r) => format!("{verb} {}{}", r.at, if r.refresh { " refresh" } else { "" }),
            Write::Connect(waiting, name) => format!("{verb} {name} of {}", waiting.operation),
            Write::BackUp(at, ..) | Write::DropBackup(at, _) => format!("{verb} {at}"),
            Write::Import(request, _) => format!("{verb} {}", request.at),
            Write::Relocate(at, to) => format!("{verb} {at} {to:?}"),
            Write::Rename(at, name) => format!("{verb} {at} to {name}"),
            Write::Cancel(id) => format!("{verb} {id}"),
            Write::Create(r) | Write::Swap(r) | Write::Hold(r) => {
                let (step, outcome) = (r.status.step.as_deref(), r.status.outcome.as_deref());
                format!("{verb} {} {} {}", r.name, step.unwrap_or("-"), outcome.unwrap_or(""))
            }
            Write::SwapCopy(r) | Write::HoldCopy(r) | Write::ReleaseCopy(r) => {
                let step = r.status.current.as_ref().map_or("-", |w| &w.step);
                format!("{verb} {} {step}", r.name)
            }
        }
    }
}

fn brief(change: &Change) -> String {
    let config = change.config.iter().map(|(k, v)| format!("{k}={v}"));
    let devices = change.devices.keys().map(|d| format!("+{d}"));
    let ephemeral = change.ephemeral.iter().map(|e| format!("ephemeral={e}"));
    config.chain(devices).chain(ephemeral).collect::<Vec<_>>().join(" ")
}

/// What a write is answered with.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    Done,
    Operation(OperationId),
    Channel(Channel),
    Record(Box<Record>),
    Copy(Box<CopyRecord>),
}

/// Why a write failed.
#[derive(Clone, Debug)]
pub(crate) enum Failure {
    Server(ServerError),
    Record(RecordError),
}

impl From<ServerError> for Failure {
    fn from(e: ServerError) -> Self {
        Failure::Server(e)
    }
}

impl From<RecordError> for Failure {
    fn from(e: RecordError) -> Self {
        Failure::Record(e)
    }
}

impl State {
    /// Carries out a controller's write.
    pub fn carry_out(&mut self, server: &str, write: &Write) -> Result<Answer, Failure> {
        let what = format!("{} on {server}", write.describe());
        if !write.is_record() {
            self.connect(server, &what)?;
        }
        let by = Some(CERTIFICATE);
        Ok(match write {
            Write::Patch(at, change, etag) => self
                .patch(server, at, change, Some(etag), &what)
                .map(|()| Answer::Done)?,
            Write::Put(at, d, etag) => self.put(server, at, d, Some(etag), &what).map(|()| Answer::Done)?,
            Write::Power(at, action) => Answer::Operation(self.power(server, at, *action, by, &what)?),
            Write::Snapshot(at, name) => Answer::Operation(self.snapshot(server, at, name, by, &what)?),
            Write::RemoveSnapshot(at, name) => Answer::Operation(self.remove_snapshot(server, at, name, by, &what)?),
            Write::Offer(at, request) => Answer::Channel(self.offer(server, at, request, &what)?),
            Write::Accept(request) => Answer::Channel(self.accept(server, request, &what)?),
            Write::Connect(waiting, name) => self.plug_in(server, waiting, name, &what).map(|()| Answer::Done)?,
            Write::BackUp(at, name, instance_only) => {
                Answer::Operation(self.back_up(server, at, (name, *instance_only), by, &what)?)
            }
            Write::DropBackup(at, name) => Answer::Operation(self.drop_backup(server, at, name, by, &what)?),
            Write::Import(request, number) => Answer::Operation(self.import(server, request, *number, by, &what)?),
            Write::Relocate(at, to) => Answer::Operation(self.relocate(server, at, to, by, &what)?),
            Write::Rename(at, name) => Answer::Operation(self.rename(server, at, name, by, &what)?),
            Write::Remove(at) => Answer::Operation(self.remove(server, at, by, &what)?),
            Write::Cancel(id) => self.cancel(server, id).map(|()| Answer::Done)?,
            Write::Create(r) => Answer::Record(Box::new(self.create_record(r)?)),
            Write::Swap(r) => Answer::Record(Box::new(self.swap_record(r)?)),
            Write::Hold(r) => Answer::Record(Box::new(self.hold_record(r)?)),
            Write::SwapCopy(r) => Answer::Copy(Box::new(self.swap_copy(r)?)),
            Write::HoldCopy(r) => Answer::Copy(Box::new(self.hold_copy(r, true)?)),
            Write::ReleaseCopy(r) => Answer::Copy(Box::new(self.hold_copy(r, false)?)),
        })
    }

    /// Whether a request reaches the server at all.
    pub fn connect(&mut self, server: &str, attempted: &str) -> Answered<()> {
        if self.host(server, attempted)?.reachable() {
            return Ok(());
        }
        Err(ServerError::new(
            FailureKind::Unreachable,
            attempted,
            "connect: connection refused",
        ))
    }

    fn check_free(&mut self, server: &str, at: &InstanceRef, what: &str) -> Answered<()> {
        let i = self.inst(server, at, what)?;
        let Some(busy) = &i.busy else { return Ok(()) };
        let why = format!("Instance is busy running a \"{}\" operation", busy.action);
        Err(ServerError::new(FailureKind::Busy, what, why))
    }

    fn check_etag(&mut self, server: &str, at: &InstanceRef, etag: Option<&String>, what: &str) -> Answered<()> {
        let now = config::etag(self.inst(server, at, what)?);
        match etag {
            Some(expected) if *expected != now => {
                let why = format!("ETag doesn't match: {now} vs {expected}");
                Err(ServerError::new(FailureKind::Changed, what, why))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Merges: keys with an empty value are unset, devices cannot be deleted.
    pub fn patch(
        &mut self,
        server: &str,
        at: &InstanceRef,
        change: &Change,
        etag: Option<&String>,
        what: &str,
    ) -> Answered<()> {
        self.check_etag(server, at, etag, what)?;
        self.check_free(server, at, what)?;
        let before = self.inst(server, at, what)?.clone();
        let mut after = before.clone();
        after.config.extend(change.config.clone());
        after.config.retain(|_, v| !v.is_empty());
        after.devices.extend(change.devices.clone());
        after.ephemeral = change.ephemeral.unwrap_or(after.ephemeral);
        self.store(server, at, &before, after, what)
    }

    /// Replaces everything.
    pub fn put(
        &mut self,
        server: &str,
        at: &InstanceRef,
        definition: &Definition,
        etag: Option<&String>,
        what: &str,
    ) -> Answered<()> {
        self.check_etag(server, at, etag, what)?;
        self.check_free(server, at, what)?;
        let before = self.inst(server, at, what)?.clone();
        let mut after = before.clone();
        let Definition {
            architecture,
            config,
            devices,
            profiles,
            ephemeral,
            description,
        } = definition.clone();
        (after.architecture, after.config, after.devices) = (architecture, config, devices);
        (after.profiles, after.ephemeral, after.description) = (profiles, ephemeral, description);
        after.config.retain(|_, v| !v.is_empty());
        self.store(server, at, &before, after, what)
    }

    fn store(&mut self, server: &str, at: &InstanceRef, before: &Inst, mut after: Inst, what: &str) -> Answered<()> {
        let refused = |why: String| ServerError::new(FailureKind::Refused, what, why);
        let (id, n) = (self.fresh_uuid(), self.next());
        let host = self.host(server, what)?;
        if let Some(why) = config::refusal(host, &at.project, Some(before), &after) {
            return Err(refused(why));
        }
        if let Some(why) = config::needs_stop(before, &after) {
            return Err(ServerError::new(FailureKind::Running, what, why));
        }
        let added = after.devices.iter().filter(|(n, d)| before.devices.get(*n) != Some(*d));
        let hot_plug = added
            .filter(|_| before.runs())
            .find_map(|(n, d)| config::unstartable_device(host, n, d).map(|w| (n, w)));
        if let Some((name, why)) = hot_plug {
            // rolled back, but a network interface has left its address
            if after.devices[name].get("type").is_some_and(|t| t == "nic") {
                let key = format!("volatile.{name}.hwaddr");
                if let Some(i) = host.instances.get_mut(at) {
                    i.config
                        .insert(key, format!("10:66:6a:00:{:02x}:{:02x}", n >> 8 & 255, n & 255));
                }
            }
            return Err(refused(why));
        }
        if config::renews_cloud_init(host, &at.project, before, &after) {
            after.config.insert(marks::CLOUD_INIT_ID.to_owned(), id);
        }
        let mut counter = n;
        config::add_hwaddrs(host, &at.project, &mut after, || {
            counter += 0x1_0000;
            counter
        });
        touch(&mut after, host.driver(&before.pool) == "btrfs");
        let unheard = config::nobody_listens(host, before, &after);
        host.instances.insert(at.clone(), after);
        host.lifecycle(at, "instance-updated", None);
        unheard.map_or(Ok(()), |why| Err(refused(why)))
    }

    pub fn snapshot(
        &mut self,
        server: &str,
        at: &InstanceRef,
        name: &str,
        by: Option<&str>,
        what: &str,
    ) -> Answered<OperationId> {
        let created_at = self.moment();
        let host = self.host(server, what)?;
        let small = host.timing.small;
        let project = host.project(&at.project).filter(|p| p.restricted());
        if project.is_some_and(|p| p.config.get("restricted.snapshots").is_none_or(|v| v != "allow")) {
            let why = format!("Snapshots are not allowed in project \"{}\"", at.project);
            return Err(ServerError::new(FailureKind::Refused, what, why));
        }
        let i = self.inst(server, at, what)?;
        if i.snapshots.iter().any(|s| s.name == name) {
            return Err(ServerError::new(
                FailureKind::AlreadyExists,
                what,
                format!("Snapshot \"{name}\" already exists"),
            ));
        }
        let (config, devices, data) = (i.config.clone(), i.devices.clone(), i.data);
        i.snapshots.push(Snap {
            name: name.to_owned(),
            created_at,
            config,
            devices,
            data,
        });
        let id = self.begin(server, "Snapshotting instance", at, Work::End(Ok(())), by);
        self.later(small, crate::operations::Due::Work(server.to_owned(), id.clone()));
        Ok(id)
    }

    pub fn remove_snapshot(
        &mut self,
        server: &str,
        at: &InstanceRef,
        name: &str,
        by: Option<&str>,
        what: &str,
    ) -> Answered<OperationId> {
        let small = self.host(server, what)?.timing.small;
        let i = self.inst(server, at, what)?;
        let there = i.snapshots.len();
        i.snapshots.retain(|s| s.name != name);
        if i.snapshots.len() == there {
            return Err(ServerError::new(FailureKind::NotFound, what, "Snapshot not found"));
        }
        if by.is_some() && !name.starts_with("berth-") {
            self.foreign_snapshot(server, at, name);
        }
        let id = self.begin(server, "Deleting snapshot", at, Work::End(Ok(())), by);
        self.later(small, crate::operations::Due::Work(server.to_owned(), id.clone()));
        Ok(id)
    }

    pub fn rename(
        &mut self,
        server: &str,
        at: &InstanceRef,
        name: &str,
        by: Option<&str>,
        what: &str,
    ) -> Answered<OperationId> {
        let small = self.host(server, what)?.timing.small;
        let i = self.inst(server, at, what)?.clone();
        if !marks::valid_name(name) {
            return Err(ServerError::new(
                FailureKind::Refused,
                what,
                format!("Invalid instance name \"{name}\""),
            ));
        }
        if self
            .host(server, what)?
            .instances
            .contains_key(&InstanceRef::new(&at.project, name))
        {
            return Err(ServerError::new(
                FailureKind::AlreadyExists,
                what,
                format!("Name \"{name}\" already in use"),
            ));
        }
        let wrong = match (&i.busy, i.runs()) {
            (Some(busy), _) => Some(format!("Instance is busy running a \"{}\" operation", busy.action)),
            (None, true) => Some("Renaming of running instance not allowed".to_owned()),
            (None, false) => None,
        };
        if let Some(why) = wrong {
            return Ok(self.begin_ended(server, "Renaming instance", at, Err(why), by));
        }
        let work = Work::Rename(i.born, name.to_owned());
        Ok(self.begin_busy(server, ("Renaming instance", "rename"), at, work, small, by))
    }

    pub fn renamed(&mut self, server: &str, id: &OperationId, born: u64, name: &str, by: Option<&str>) {
        let cloud_init = self.fresh_uuid();
        let Some(host) = self.servers.get_mut(server) else {
            return;
        };
        let Some(at) = host.born(born) else { return };
        let to = InstanceRef::new(&at.project, name);
        if host.instances.contains_key(&to) {
            return self.end(server, id, Err(format!("Name \"{name}\" already in use")));
        }
        let Some(mut i) = host.instances.remove(&at) else {
            return;
        };
        i.config.insert(marks::CLOUD_INIT_ID.to_owned(), cloud_init);
        let btrfs = host.driver(&i.pool) == "btrfs";
        touch(&mut i, btrfs);
        host.instances.insert(to.clone(), i);
        host.lifecycle(&to, "instance-renamed", by);
        self.end(server, id, Ok(()));
    }

    pub fn remove(&mut self, server: &str, at: &InstanceRef, by: Option<&str>, what: &str) -> Answered<OperationId> {
        let small = self.host(server, what)?.timing.small;
        let host = self.host(server, what)?;
        let product = host.product;
        let i = self.inst(server, at, what)?.clone();
        if i.runs() {
            return Err(ServerError::new(FailureKind::Refused, what, "Instance is running"));
        }
        let protected = i.config.get(marks::PROTECTION_DELETE).is_some_and(|v| v == "true");
        let wrong = match &i.busy {
            Some(busy) => Some(format!("Instance is busy running a \"{}\" operation", busy.action)),
            None if protected => Some("Instance is protected".to_owned()),
            None if i.undeletable && product == Product::Lxd => Some("Could not get subvol".to_owned()),
            None if i.undeletable => Some("Failed setting subvolume writable: Not a Btrfs subvolume".to_owned()),
            None => None,
        };
        if by.is_some() {
            self.judge_removal(server, at, &i);
        }
        if let Some(why) = wrong {
            return Ok(self.begin_ended(server, "Deleting instance", at, Err(why), by));
        }
        Ok(self.begin_busy(
            server,
            ("Deleting instance", "delete"),
            at,
            Work::Delete(i.born),
            small,
            by,
        ))
    }

    pub fn deleted(&mut self, server: &str, id: &OperationId, born: u64, by: Option<&str>) {
        self.vanish(server, born, by);
        self.end(server, id, Ok(()));
    }

    /// The instance is gone.
    pub fn vanish(&mut self, server: &str, born: u64, by: Option<&str>) {
        let Some(host) = self.servers.get_mut(server) else {
            return;
        };
        let Some(at) = host.born(born) else { return };
        host.instances.remove(&at);
        host.lifecycle(&at, "instance-deleted", by);
        self.note("daemon", server, format!("{at} is gone"));
    }
}

/// Whatever writes to a half-made copy on btrfs makes it undeletable: the daemon writes into a directory that is no
/// subvolume yet.
pub(crate) fn touch(i: &mut Inst, btrfs: bool) {
    if btrfs && i.content == Content::HalfMade {
        i.undeletable = true;
    }
}
