//! Records in memory: compare-and-swap by version, with the same faults and the same log as the servers. Part of the
//! world, so that it outlives every controller.

use async_trait::async_trait;
use berth_core::copies::{CopyRecord, CopyRecords};
use berth_core::records::{Record, RecordError, Records};

use crate::state::State;
use crate::world::World;
use crate::writes::{Answer, Failure, Write};

/// The name under which the store of records appears in the log and in hooks.
pub(crate) const STORE: &str = "records";

/// The records as one controller sees them.
#[derive(Clone)]
pub struct MemoryRecords {
    world: World,
    controller: String,
}

impl MemoryRecords {
    pub(crate) fn new(world: World, controller: &str) -> Self {
        Self {
            world,
            controller: controller.to_owned(),
        }
    }

    async fn write(&self, write: Write) -> Result<Answer, RecordError> {
        self.world
            .submit(&self.controller, STORE, write)
            .await
            .map_err(|e| match e {
                Failure::Record(e) => e,
                Failure::Server(e) => RecordError::Unavailable(e.to_string()),
            })
    }

    async fn written(&self, write: Write) -> Result<Record, RecordError> {
        match self.write(write).await? {
            Answer::Record(r) => Ok(*r),
            Answer::Done | Answer::Operation(_) | Answer::Channel(_) | Answer::Copy(_) => {
                Err(RecordError::Unavailable("no record in the answer".to_owned()))
            }
        }
    }
}

#[async_trait]
impl Records for MemoryRecords {
    async fn list(&self, namespace: &str) -> Result<Vec<Record>, RecordError> {
        self.world.on_the_way(&self.controller, STORE).await;
        self.world.count(&self.controller, STORE, "list");
        Ok(self.world.look(|s| {
            s.records
                .values()
                .filter(|r| r.namespace == namespace)
                .cloned()
                .collect()
        }))
    }

    async fn load(&self, namespace: &str, name: &str) -> Result<Record, RecordError> {
        self.world.on_the_way(&self.controller, STORE).await;
        self.world.count(&self.controller, STORE, "load");
        let found = self.world.record(namespace, name);
        found.ok_or_else(|| RecordError::NotFound(format!("{namespace}/{name}")))
    }

    async fn create(&self, record: &Record) -> Result<Record, RecordError> {
        self.written(Write::Create(Box::new(record.clone()))).await
    }

    async fn swap(&self, record: &Record) -> Result<Record, RecordError> {
        self.written(Write::Swap(Box::new(record.clone()))).await
    }

    async fn hold(&self, record: &Record) -> Result<Record, RecordError> {
        self.written(Write::Hold(Box::new(record.clone()))).await
    }
}

#[async_trait]
impl CopyRecords for MemoryRecords {
    async fn load(&self, namespace: &str, name: &str) -> Result<CopyRecord, RecordError> {
        self.world.on_the_way(&self.controller, STORE).await;
        let found = self.world.copy(namespace, name);
        found.ok_or_else(|| RecordError::NotFound(format!("{namespace}/{name}")))
    }

    async fn swap(&self, record: &CopyRecord) -> Result<CopyRecord, RecordError> {
        self.copied(Write::SwapCopy(Box::new(record.clone()))).await
    }

    async fn hold(&self, record: &CopyRecord) -> Result<CopyRecord, RecordError> {
        self.copied(Write::HoldCopy(Box::new(record.clone()))).await
    }

    async fn release(&self, record: &CopyRecord) -> Result<CopyRecord, RecordError> {
        self.copied(Write::ReleaseCopy(Box::new(record.clone()))).await
    }
}

impl MemoryRecords {
    async fn copied(&self, write: Write) -> Result<CopyRecord, RecordError> {
        match self.write(write).await? {
            Answer::Copy(r) => Ok(*r),
            Answer::Done | Answer::Operation(_) | Answer::Channel(_) | Answer::Record(_) => {
                Err(RecordError::Unavailable("no copy in the answer".to_owned()))
            }
        }
    }
}

impl World {
    /// A person creates an InstanceCopy, or changes what is wanted of it.
    pub fn apply_copy(&self, record: CopyRecord) {
        self.change(|s| {
            let version = s.next().to_string();
            s.note("person", STORE, format!("applies copy {}", record.name));
            let key = (record.namespace.clone(), record.name.clone());
            s.copies.insert(key, CopyRecord { version, ..record });
        });
    }

    /// A person deletes an InstanceCopy: it is gone as soon as nothing holds it.
    pub fn delete_copy(&self, namespace: &str, name: &str) {
        self.change(|s| {
            let version = s.next().to_string();
            s.note("person", STORE, format!("deletes copy {name}"));
            let key = (namespace.to_owned(), name.to_owned());
            if let Some(record) = s.copies.get_mut(&key) {
                (record.deleting, record.version) = (true, version);
                if !record.held {
                    s.copies.remove(&key);
                }
            }
        });
    }

    /// An InstanceCopy as it is stored.
    pub fn copy(&self, namespace: &str, name: &str) -> Option<CopyRecord> {
        self.look(|s| s.copies.get(&(namespace.to_owned(), name.to_owned())).cloned())
    }
}

impl State {
    fn stored_copy(&mut self, record: &CopyRecord) -> Result<&mut CopyRecord, RecordError> {
        let key = (record.namespace.clone(), record.name.clone());
        let gone = || RecordError::NotFound(record.name.clone());
        let version = self.next().to_string();
        let stored = self.copies.get_mut(&key).ok_or_else(gone)?;
        if stored.version != record.version {
            return Err(RecordError::Conflict(record.name.clone()));
        }
        stored.version = version;
        Ok(stored)
    }

    pub fn swap_copy(&mut self, record: &CopyRecord) -> Result<CopyRecord, RecordError> {
        let stored = self.stored_copy(record)?;
        stored.status = record.status.clone();
        Ok(stored.clone())
    }

    pub fn hold_copy(&mut self, record: &CopyRecord, held: bool) -> Result<CopyRecord, RecordError> {
        let stored = self.stored_copy(record)?;
        stored.held = held;
        let copy = stored.clone();
        if copy.deleting && !copy.held {
            self.copies.remove(&(copy.namespace.clone(), copy.name.clone()));
        }
        Ok(copy)
    }
}

fn key(record: &Record) -> (String, String) {
    (record.namespace.clone(), record.name.clone())
}

impl State {
    pub fn create_record(&mut self, record: &Record) -> Result<Record, RecordError> {
        if self.records.contains_key(&key(record)) {
            return Err(RecordError::Conflict(record.name.clone()));
        }
        let stored = Record {
            version: self.next().to_string(),
            ..record.clone()
        };
        self.records.insert(key(record), stored.clone());
        Ok(stored)
    }

    pub fn swap_record(&mut self, record: &Record) -> Result<Record, RecordError> {
        let version = self.next().to_string();
        let stored = self
            .records
            .get_mut(&key(record))
            .ok_or_else(|| RecordError::NotFound(record.name.clone()))?;
        if stored.version != record.version {
            return Err(RecordError::Conflict(record.name.clone()));
        }
        stored.status = record.status.clone();
        stored.version = version;
        Ok(stored.clone())
    }

    pub fn hold_record(&self, record: &Record) -> Result<Record, RecordError> {
        let stored = self.records.get(&key(record)).cloned();
        stored.ok_or_else(|| RecordError::NotFound(record.name.clone()))
    }
}
