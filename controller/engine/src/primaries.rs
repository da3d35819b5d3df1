//! Which follower does the work for a server that several InstanceServers name: one per fingerprint and identity, since
//! another identity may see other projects. The others leave the work to it until it ends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use tokio::sync::watch;

use crate::inventory::Inner;
use crate::lock;

/// The followers that do the work.
pub(crate) struct Primaries {
    by_server: Mutex<HashMap<ServerIdentity, Weak<Inner>>>,
    changed: watch::Sender<u64>,
}

type ServerIdentity = (String, Option<String>);

impl Primaries {
    pub fn new() -> Arc<Self> {
        let (changed, _) = watch::channel(0);
        Arc::new(Self {
            by_server: Mutex::default(),
            changed,
        })
    }

    /// Changes whenever a follower ends.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The follower that already does the work, or `None` if `inner` now does.
    pub fn claim(&self, server: ServerIdentity, inner: &Arc<Inner>) -> Option<Arc<Inner>> {
        let mut by_server = lock(&self.by_server);
        // the server behind an address may have become another one
        by_server.retain(|s, other| *s == server || !std::ptr::eq(other.as_ptr(), Arc::as_ptr(inner)));
        let present = by_server.get(&server).and_then(Weak::upgrade);
        match present {
            Some(other) if !Arc::ptr_eq(&other, inner) => Some(other),
            Some(_) => None,
            None => {
                by_server.insert(server, Arc::downgrade(inner));
                None
            }
        }
    }

    /// Another follower may take over.
    pub fn release(&self, inner: &Arc<Inner>) {
        lock(&self.by_server).retain(|_, other| other.upgrade().is_some_and(|o| !Arc::ptr_eq(&o, inner)));
        self.changed.send_modify(|n| *n += 1);
    }
}
