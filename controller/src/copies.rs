//! InstanceCopies. Their kind is part of the API, but this version does not copy: it says so instead of being silent.

use std::sync::Arc;
use std::time::Duration;

use berth_api::{InstanceCopy, InstanceCopyStatus, Reason};
use berth_engine::Key;
use jiff::Timestamp;

use crate::conditions;
use crate::store::Store;

const RETRY: Duration = Duration::from_secs(10);
const SENTENCE: &str =
    "this version of Berth does not make copies yet; the object is kept and will be acted upon by one that does";

/// Says that nothing will happen.
pub(crate) async fn pass(store: Arc<Store>, key: Key) -> Option<Duration> {
    let object = store.copies.get(&key)?;
    let status = status_of(&object, Timestamp::now());
    if object.status.as_ref() == Some(&status) {
        return None;
    }
    match store.apply_status(object.as_ref(), &status).await {
        Ok(written) => {
            store.copies.wrote(written);
            None
        }
        Err(error) => {
            tracing::warn!(copy = %key, %error, "tried again");
            Some(RETRY)
        }
    }
}

fn status_of(object: &InstanceCopy, now: Timestamp) -> InstanceCopyStatus {
    let mut status = object.status.clone().unwrap_or_default();
    let generation = object.metadata.generation;
    status.observed_generation = generation;
    conditions::say(&mut status.conditions, Reason::InvalidSpec, SENTENCE, generation, now);
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_says_that_it_is_not_made_and_says_it_once() {
        let mut object = InstanceCopy::new("db-standby", Default::default());
        object.status = Some(status_of(&object, Timestamp::UNIX_EPOCH));
        let again = status_of(&object, Timestamp::now());
        assert_eq!(object.status.as_ref(), Some(&again));
        assert_eq!(conditions::reason(&again.conditions), Some("InvalidSpec"));
    }
}
