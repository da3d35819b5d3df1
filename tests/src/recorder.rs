//! Keeps every version of every object of the project in one namespace, from the moment it starts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{StreamExt, pin_mut};
use kube::Api;
use kube::api::{DynamicObject, ListParams, WatchEvent, WatchParams};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::history::{Entry, violations};

const KINDS: [&str; 4] = ["InstanceServer", "InstancePlacement", "InstanceMove", "InstanceCopy"];
/// When a watch that broke off is begun anew.
const RETRY: Duration = Duration::from_millis(200);

/// The histories by uid.
type Histories = BTreeMap<String, Vec<Entry>>;

/// The recorder of one namespace; it ends when it is dropped.
pub struct Recorder {
    histories: Arc<Mutex<Histories>>,
    excused: AtomicBool,
    _watches: JoinSet<()>,
}

fn lock(histories: &Mutex<Histories>) -> MutexGuard<'_, Histories> {
    histories.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Recorder {
    /// Begins; `api` gives the objects of one kind. Whatever comes after this is seen.
    pub(crate) async fn start(api: impl Fn(&str) -> Api<DynamicObject>) -> Recorder {
        let histories = Arc::<Mutex<Histories>>::default();
        let mut watches = JoinSet::new();
        for kind in KINDS {
            let api = api(kind);
            let from = list(&api, kind, &histories).await;
            watches.spawn(watch(api, kind, from, Arc::clone(&histories)));
        }
        Recorder {
            histories,
            excused: AtomicBool::new(false),
            _watches: watches,
        }
    }

    /// The test is about to do something that may well change what is said of the objects.
    pub fn cause(&self) {
        for history in lock(&self.histories).values_mut() {
            history.push(Entry::Cause);
        }
    }

    /// All versions of an object that were seen so far; of all objects that ever had that name.
    pub fn versions(&self, kind: &str, name: &str) -> Vec<Value> {
        let all = lock(&self.histories);
        let versions = all.values().flatten().filter_map(|entry| match entry {
            Entry::Version(v) if v["kind"] == kind && v["metadata"]["name"] == name => Some(v.clone()),
            Entry::Version(_) | Entry::Cause | Entry::Gap => None,
        });
        versions.collect()
    }

    /// More than one controller writes from now on, each what it sees: the rules are for one.
    pub fn excuse(&self) {
        self.excused.store(true, Ordering::Relaxed);
    }

    /// What is wrong in what was seen so far.
    pub fn violations(&self) -> Vec<String> {
        if self.excused.load(Ordering::Relaxed) {
            return Vec::new();
        }
        lock(&self.histories).values().flat_map(|h| violations(h)).collect()
    }

    /// Everything that was seen, a line for each version.
    pub fn dump(&self) -> String {
        let all = lock(&self.histories);
        let entries = all.values().flatten().map(|entry| match entry {
            Entry::Version(object) => object.to_string(),
            Entry::Cause => "cause".to_owned(),
            Entry::Gap => "gap".to_owned(),
        });
        entries.collect::<Vec<_>>().join("\n")
    }
}

/// Reads what there is, until the API server answers; says from where on to watch. Of a kind that is not defined yet there is
/// nothing: whatever comes is seen.
async fn list(api: &Api<DynamicObject>, kind: &str, histories: &Mutex<Histories>) -> String {
    loop {
        match api.list(&ListParams::default()).await {
            Ok(list) => {
                list.items.iter().for_each(|object| keep(histories, kind, object));
                return list.metadata.resource_version.unwrap_or_default();
            }
            Err(kube::Error::Api(status)) if status.code == 404 => return String::new(),
            Err(_) => tokio::time::sleep(RETRY).await,
        }
    }
}

async fn watch(api: Api<DynamicObject>, kind: &'static str, mut from: String, histories: Arc<Mutex<Histories>>) {
    loop {
        let lost = follow(&api, kind, &mut from, &histories).await;
        if lost {
            lock(&histories).values_mut().for_each(|h| h.push(Entry::Gap));
            from = list(&api, kind, &histories).await;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Follows one watch to its end; whether versions were lost.
async fn follow(api: &Api<DynamicObject>, kind: &str, from: &mut String, histories: &Mutex<Histories>) -> bool {
    let Ok(stream) = api.watch(&WatchParams::default(), from).await else {
        return false;
    };
    pin_mut!(stream);
    while let Some(event) = stream.next().await {
        match event {
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                from.clone_from(&object.metadata.resource_version.clone().unwrap_or_default());
                keep(histories, kind, &object);
            }
            Ok(WatchEvent::Deleted(object)) => {
                from.clone_from(&object.metadata.resource_version.unwrap_or_default());
            }
            Ok(WatchEvent::Bookmark(mark)) => from.clone_from(&mark.metadata.resource_version),
            // "too old": it cannot be gone on with
            Ok(WatchEvent::Error(_)) => return true,
            Err(_) => return false,
        }
    }
    false
}

fn keep(histories: &Mutex<Histories>, kind: &str, object: &DynamicObject) {
    let mut value = json!(object);
    value["kind"] = kind.into();
    let uid = object.metadata.uid.clone().unwrap_or_default();
    lock(histories).entry(uid).or_default().push(Entry::Version(value));
}
