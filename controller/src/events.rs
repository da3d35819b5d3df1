//! Kubernetes Events: one for each thing worth telling, about each object whose story it belongs to. They are not gathered
//! into series, since each sentence is another one; none is written twice.

use std::time::Duration;

use berth_engine::Happening;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use tokio::sync::mpsc;

use crate::store::{Store, StoreError};

/// Who says it.
const REPORTER: &str = "berth.dev/controller";
/// How long a move has the API server for itself before people are told of it, and before its placement says how far it is.
pub(crate) const BREATH: Duration = Duration::from_millis(40);
/// Longest note that the API server takes.
const NOTE_MAX: usize = 1024;

/// What happened, and when.
pub(crate) struct Told {
    at: Timestamp,
    happening: Happening,
}

impl From<Happening> for Told {
    fn from(happening: Happening) -> Self {
        let at = Timestamp::now();
        Self { at, happening }
    }
}

impl Told {
    /// How long ago it was.
    pub fn age(&self) -> Duration {
        Timestamp::now().duration_since(self.at).try_into().unwrap_or_default()
    }

    /// The record that it is about.
    pub fn record(&self) -> Option<&str> {
        self.happening.record.as_deref()
    }
}

/// Takes what is to be told from those who are at work, and never holds them up.
#[derive(Clone)]
pub(crate) struct Tell(mpsc::UnboundedSender<Told>);

impl Tell {
    /// Where to tell, and where to hear it; that ends when nobody can tell any more.
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<Told>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// Has it told.
    pub fn tell(&self, happening: Happening) {
        // nobody hears it when the pass is broken off
        let _ = self.0.send(happening.into());
    }
}

/// Tells people one thing, in the story of each of these objects. What cannot be told (a namespace that ends takes no
/// events) is only logged.
pub(crate) async fn publish(store: &Store, identity: &str, about: &[ObjectReference], told: impl Into<Told>) {
    let told = told.into();
    let Happening {
        record,
        reason,
        message,
        ..
    } = &told.happening;
    let Some(first) = about.first() else { return };
    let (kind, name) = (first.kind.as_deref(), first.name.as_deref());
    tracing::info!(kind, name, namespace = first.namespace.as_deref(), record = record.as_deref(), %reason, "{message}");
    for regarding in about {
        let related = about.iter().find(|o| *o != regarding);
        let event = event(identity, regarding, related, &told);
        let namespace = regarding.namespace.as_deref().unwrap_or("default");
        let api = kube::Api::<Event>::namespaced(store.client.clone(), namespace);
        let created = store
            .write("create an Event", api.create(&PostParams::default(), &event))
            .await;
        match created {
            Ok(_) | Err(StoreError::NotLeading(_)) => {}
            Err(error) => tracing::debug!(%error, "an event was not written"),
        }
    }
}

fn event(identity: &str, about: &ObjectReference, related: Option<&ObjectReference>, told: &Told) -> Event {
    let Happening {
        warning,
        reason,
        message,
        ..
    } = &told.happening;
    let name = about.name.as_deref().unwrap_or_default();
    Event {
        metadata: ObjectMeta {
            // lists are ordered by name: it has to grow with time, for kubectl describe to tell things in their order
            name: Some(format!("{name}.{:016x}", told.at.as_nanosecond())),
            namespace: about.namespace.clone(),
            ..ObjectMeta::default()
        },
        action: Some(reason.clone()),
        reason: Some(reason.clone()),
        note: Some(cut(message, NOTE_MAX).to_owned()),
        type_: Some(if *warning { "Warning" } else { "Normal" }.to_owned()),
        event_time: Some(MicroTime(told.at)),
        regarding: Some(about.clone()),
        related: related.cloned(),
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
