//! Backups: kept on the server under a name, or streamed; what travels is the number of one, and an instance that is made
//! from it is what it was made of, marks, guard and identity included.

use berth_core::model::{InstanceRef, Product};
use berth_core::server::{Data, Export, FailureKind, ImportRequest, OperationId, Result, ServerError};
use futures::{StreamExt, TryStreamExt, stream};

use crate::config;
use crate::operations::{Due, Work};
use crate::state::{Answered, Content, Inst, State};

/// The end of a tar archive.
const END: usize = 1024;

/// A backup as it travels.
pub(crate) fn data(number: u64) -> Data {
    let mut bytes = format!("backup {number}\n").into_bytes();
    bytes.extend([0; END]);
    let half = bytes.split_off(9);
    Data {
        size: u64::try_from(bytes.len() + half.len()).ok(),
        bytes: stream::iter([Ok(bytes), Ok(half)]).boxed(),
    }
}

/// What arrives: fails where the sender does not come to the end.
pub(crate) async fn number(data: Data) -> Result<u64> {
    let pieces: Vec<Vec<u8>> = data.bytes.try_collect().await?;
    let text = String::from_utf8(pieces.concat()).unwrap_or_default();
    let number = text
        .strip_prefix("backup ")
        .and_then(|t| t.split('\n').next()?.parse().ok());
    let whole = data.size.is_none_or(|n| n == text.len() as u64) && text.ends_with(&"\0".repeat(END));
    number
        .filter(|_| whole)
        .ok_or_else(|| ServerError::new(FailureKind::Refused, "import", "unexpected EOF"))
}

impl State {
    fn backups_allowed(&mut self, server: &str, at: &InstanceRef, what: &str) -> Answered<()> {
        let project = self.host(server, what)?.project(&at.project).filter(|p| p.restricted());
        if project.is_some_and(|p| p.config.get("restricted.backups").is_none_or(|v| v != "allow")) {
            let why = format!("Backups are not allowed in project \"{}\"", at.project);
            return Err(ServerError::new(FailureKind::Refused, what, why));
        }
        Ok(())
    }

    fn packed(&mut self, server: &str, at: &InstanceRef, instance_only: bool, what: &str) -> Answered<u64> {
        let number = self.next();
        let product = self.host(server, what)?.product;
        let mut inside = self.inst(server, at, what)?.clone();
        if inside.runs() {
            inside.content = Content::Mixed;
        }
        if instance_only {
            inside.snapshots.clear();
        }
        (inside.busy, inside.undeletable) = (None, false);
        inside.backups.clear();
        self.backups.insert(number, (product, inside));
        Ok(number)
    }

    pub fn back_up(
        &mut self,
        server: &str,
        at: &InstanceRef,
        (name, instance_only): (&str, bool),
        by: Option<&str>,
        what: &str,
    ) -> Answered<OperationId> {
        self.backups_allowed(server, at, what)?;
        if self.inst(server, at, what)?.backups.contains_key(name) {
            let why = format!("Backup \"{name}\" already exists");
            return Err(ServerError::new(FailureKind::AlreadyExists, what, why));
        }
        let number = self.packed(server, at, instance_only, what)?;
        self.inst(server, at, what)?.backups.insert(name.to_owned(), number);
        let after = self.host(server, what)?.timing.transfer;
        let id = self.begin(server, "Backing up instance", at, Work::End(Ok(())), by);
        self.later(after, Due::Work(server.to_owned(), id.clone()));
        Ok(id)
    }

    pub fn exported(&mut self, server: &str, at: &InstanceRef, what: &Export, attempted: &str) -> Answered<u64> {
        match what {
            Export::Kept(name) => {
                let gone = || ServerError::new(FailureKind::NotFound, attempted, "Backup not found");
                self.inst(server, at, attempted)?
                    .backups
                    .get(name)
                    .copied()
                    .ok_or_else(gone)
            }
            Export::Direct { instance_only } => {
                self.backups_allowed(server, at, attempted)?;
                self.packed(server, at, *instance_only, attempted)
            }
        }
    }

    pub fn drop_backup(
        &mut self,
        server: &str,
        at: &InstanceRef,
        name: &str,
        by: Option<&str>,
        what: &str,
    ) -> Answered<OperationId> {
        let gone = || ServerError::new(FailureKind::NotFound, what, "Backup not found");
        self.inst(server, at, what)?.backups.remove(name).ok_or_else(gone)?;
        Ok(self.begin_ended(server, "Removing backup", at, Ok(()), by))
    }

    /// The record appears with the operation; the data come by its end.
    pub fn import(
        &mut self,
        server: &str,
        request: &ImportRequest,
        number: u64,
        by: Option<&str>,
        what: &str,
    ) -> Answered<OperationId> {
        let (born, created_at) = (self.next(), self.moment());
        let refused = |why: String| ServerError::new(FailureKind::Refused, what, why);
        let inside = self.backups.get(&number).cloned();
        let (made_by, inside) = inside.ok_or_else(|| refused("Backup is missing index.yaml".to_owned()))?;
        let host = self.host(server, what)?;
        let at = &request.at;
        if host.project(&at.project).is_none() {
            let why = format!("Project \"{}\" not found", at.project);
            return Err(ServerError::new(FailureKind::NotFound, what, why));
        }
        if host.instances.contains_key(at) {
            let why = format!("Instance \"{}\" already exists", at.name);
            return Err(ServerError::new(FailureKind::AlreadyExists, what, why));
        }
        let pool = request.pool.clone().unwrap_or_else(|| inside.pool.clone());
        if !host.pools.iter().any(|p| p.name == pool) {
            return Err(refused(format!("Storage pool \"{pool}\" not found")));
        }
        if (made_by, host.product) == (Product::Incus, Product::Lxd) {
            return Err(refused(
                "Unknown configuration key: volatile.uuid.generation".to_owned(),
            ));
        }
        let member = crate::relocate::choose_member(host, request.member.as_deref(), None).map_err(refused)?;
        let mut i = Inst {
            born,
            created_at,
            member,
            pool: pool.clone(),
            power: berth_core::model::Power::Stopped,
            content: Content::HalfMade,
            ..inside
        };
        if let Some(root) = i.devices.values_mut().find(|d| config::is_root(d)) {
            root.insert("pool".to_owned(), pool);
        } else {
            let root = [("type", "disk"), ("path", "/"), ("pool", pool.as_str())];
            i.devices.insert("root".to_owned(), crate::options::pairs(&root));
        }
        if let Some(why) = config::refusal(host, &at.project, None, &i) {
            return Err(refused(format!("Failed importing backup: {why}")));
        }
        let after = host.timing.transfer;
        host.instances.insert(at.clone(), i);
        host.lifecycle(at, "instance-created", by);
        self.imports.insert(born, number);
        Ok(self.begin_busy(
            server,
            ("Restoring backup", "create"),
            at,
            Work::Import(born),
            after,
            by,
        ))
    }

    pub fn imported(&mut self, server: &str, id: &OperationId, born: u64) {
        let number = self.imports.remove(&born);
        let content = number.and_then(|n| self.backups.get(&n)).map(|(_, b)| b.content);
        if let (Some(i), Some(content)) = (self.inst_by_born(server, born), content) {
            i.content = content;
        }
        self.end(server, id, Ok(()));
    }
}
