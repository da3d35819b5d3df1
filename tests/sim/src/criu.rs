//! The running state of a container goes over: as it was seen to, the source hears of the restore before its processes
//! end, and its daemon notices that only a moment later.

use berth_core::model::InstanceKind;

use crate::migrate::Transfer;
use crate::operations::{Due, Work};
use crate::state::State;

impl State {
    /// Whether the running state of a container goes over.
    pub fn by_criu(&self, t: &Transfer) -> bool {
        let source = self.servers.get(&t.source.server).and_then(|h| {
            let at = h.born(t.source.born)?;
            h.instances.get(&at)
        });
        t.live && t.ran && source.is_some_and(|i| i.kind == InstanceKind::Container)
    }

    /// The processes stand still until they are restored. Nothing tells for which container that is.
    pub fn dump_begins(&mut self, id: u64) {
        let transfer = self.transfers.get(&id).cloned();
        let Some(t) = transfer.filter(|t| self.by_criu(t)) else {
            return;
        };
        let work = Work::End(Ok(()));
        let dump = self.begin_for(&t.source.server, "Live-migrating instance", Vec::new(), work, None);
        if let Some(t) = self.transfers.get_mut(&id) {
            t.dump = Some(dump);
        }
    }

    /// CRIU has restored the container: all that its source had until it was frozen, and the source ends with it.
    pub fn restored(&mut self, t: &Transfer) {
        if !self.by_criu(t) {
            return;
        }
        let Some(source) = self.inst_by_born(&t.source.server, t.source.born) else {
            return;
        };
        source.ending = source.runs();
        let (data, breaks, boot) = (source.data, source.breaks, source.last_used_at);
        if let Some(target) = self.inst_by_born(&t.target.server, t.target.born) {
            (target.data, target.nobodys) = (data, breaks);
        }
        for operation in t.dump.iter().chain([&t.source.operation]) {
            self.end(&t.source.server, operation, Ok(()));
        }
        let stop = self.servers.get(&t.source.server).map(|h| h.timing.stop);
        self.later(
            stop.unwrap_or_default(),
            Due::GuestStops(t.source.server.clone(), t.source.born, boot),
        );
    }
}
