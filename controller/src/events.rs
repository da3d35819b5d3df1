//! Kubernetes Events: one for each thing worth telling, about a placement (or server) and the move that it is part of.
//! They are not gathered into series, since each sentence is another one; none is written twice.

use berth_engine::Happening;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};

use crate::store::{Store, StoreError};

/// Who says it.
const REPORTER: &str = "berth.dev/controller";
/// Longest note that the API server takes.
const NOTE_MAX: usize = 1024;

/// Tells people one thing. What cannot be told (a namespace that ends takes no events) is only logged.
pub(crate) async fn publish(
    store: &Store,
    identity: &str,
    about: &ObjectReference,
    related: Option<ObjectReference>,
    happening: &Happening,
) {
    let Happening {
        record,
        warning,
        reason,
        message,
    } = happening;
    let (kind, name) = (about.kind.as_deref(), about.name.as_deref());
    tracing::info!(kind, name, namespace = about.namespace.as_deref(), record = record.as_deref(), %reason, "{message}");
    let event = event(identity, about, related, (*warning, reason, message), Timestamp::now());
    let namespace = about.namespace.as_deref().unwrap_or("default");
    let api = kube::Api::<Event>::namespaced(store.client.clone(), namespace);
    let created = store
        .write("create an Event", api.create(&PostParams::default(), &event))
        .await;
    match created {
        Ok(_) | Err(StoreError::NotLeading(_)) => {}
        Err(error) => tracing::debug!(%error, "an event was not written"),
    }
}

fn event(
    identity: &str,
    about: &ObjectReference,
    related: Option<ObjectReference>,
    (warning, reason, message): (bool, &str, &str),
    now: Timestamp,
) -> Event {
    let name = about.name.as_deref().unwrap_or_default();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{:016x}", rand::random::<u64>())),
            namespace: about.namespace.clone(),
            ..ObjectMeta::default()
        },
        action: Some(reason.to_owned()),
        reason: Some(reason.to_owned()),
        note: Some(cut(message, NOTE_MAX).to_owned()),
        type_: Some(if warning { "Warning" } else { "Normal" }.to_owned()),
        event_time: Some(MicroTime(now)),
        regarding: Some(about.clone()),
        related,
        reporting_controller: Some(REPORTER.to_owned()),
        reporting_instance: Some(identity.to_owned()),
        ..Event::default()
    }
}

/// At most `max` bytes, never half a character.
fn cut(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_note_is_cut_between_characters() {
        assert_eq!(cut("äää", 3), "ä");
        assert_eq!(cut("abc", 3), "abc");
    }
}
