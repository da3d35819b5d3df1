//! Records in memory: compare-and-swap by version, with the same faults and the same log as the servers. Part of the
//! world, so that it outlives every controller.

use async_trait::async_trait;
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
            Answer::Done | Answer::Operation(_) | Answer::Channel(_) => {
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

    async fn hold(&self, record: &Record) -> Result<(), RecordError> {
        self.write(Write::Hold(Box::new(record.clone()))).await.map(|_| ())
    }

    async fn release(&self, record: &Record) -> Result<(), RecordError> {
        self.write(Write::Release(Box::new(record.clone()))).await.map(|_| ())
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

    pub fn hold_record(&mut self, record: &Record) -> Result<(), RecordError> {
        if !self.records.contains_key(&key(record)) {
            return Err(RecordError::NotFound(record.name.clone()));
        }
        self.held.insert(key(record));
        Ok(())
    }

    pub fn release_record(&mut self, record: &Record) -> Result<(), RecordError> {
        self.held.remove(&key(record));
        Ok(())
    }
}
