//! Moves that this process did not begin: two controllers may act at once for a moment.

use berth_core::marks;
use berth_core::plan::{Desired, Verdict};
use berth_core::records::RecordError;

use crate::Key;
use crate::engine::Engine;

impl Engine {
    /// The instance may carry the mark of a move whose record another controller has made meanwhile. Says whether it was
    /// found.
    pub(crate) async fn learn_record(&self, desired: &Desired, verdict: &Verdict) -> Result<bool, RecordError> {
        let located = verdict.located.as_ref();
        let Some(name) = located.and_then(|l| marks::move_id(&l.instance)) else {
            return Ok(false);
        };
        let known = self.book().get(&Key::new(&desired.namespace, name)).is_some();
        if known || desired.status.moves.iter().any(|m| m.name == name) {
            return Ok(false);
        }
        match self.records().load(&desired.namespace, name).await {
            Ok(record) => {
                let open = !record.finished();
                self.book().put(record);
                Ok(open)
            }
            Err(RecordError::NotFound(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
