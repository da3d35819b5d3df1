//! The objects of one kind as the API server's watch tells them, and as our own writes were answered: whoever writes sees
//! what it wrote at once, although the watch is a moment behind. An object that cannot be read stays as it was last read.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};

use berth_engine::Key;
use futures::{StreamExt, pin_mut};
use kube::core::{DeserializeGuard, NamespaceResourceScope};
use kube::runtime::watcher::{self, Event};
use kube::runtime::{WatchStreamExt, watcher as watch};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::watch as state;

/// A kind that can be cached.
pub(crate) trait Kind:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + DeserializeOwned + Clone + Debug + Send + Sync + 'static
{
}

impl<K> Kind for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + DeserializeOwned
        + Clone
        + Debug
        + Send
        + Sync
        + 'static
{
}

/// Namespace and name of an object.
pub(crate) fn key_of(object: &impl ResourceExt) -> Key {
    Key::new(object.namespace().unwrap_or_default(), object.name_any())
}

fn version_of(object: &impl ResourceExt) -> u64 {
    object.resource_version().and_then(|v| v.parse().ok()).unwrap_or(0)
}

/// Whether two versions of an object differ at most in what only this program writes: status and finalizers.
fn is_ours_alone(old: &impl ResourceExt, new: &impl ResourceExt) -> bool {
    let (old, new) = (old.meta(), new.meta());
    old.uid == new.uid
        && old.generation == new.generation
        && old.deletion_timestamp == new.deletion_timestamp
        && old.annotations == new.annotations
}

/// What is known of the objects of one kind.
pub(crate) struct Cache<K> {
    inner: RwLock<Inner<K>>,
    /// How many namespaces (or all of them, as one) have not been listed yet.
    missing: state::Sender<usize>,
}

struct Inner<K> {
    objects: BTreeMap<Key, Arc<K>>,
    /// The newest version that the watch has told, so that an older answer to a write does not bring back the dead.
    watched: u64,
}

/// What became of an object: as it was, as it is.
pub(crate) struct Changed<K> {
    pub key: Key,
    pub old: Option<Arc<K>>,
    pub new: Option<Arc<K>>,
}

impl<K: Kind> Cache<K> {
    /// Nothing known yet; `scopes` namespaces will be listed.
    pub fn new(scopes: usize) -> Arc<Self> {
        Arc::new(Self {
            inner: RwLock::new(Inner {
                objects: BTreeMap::new(),
                watched: 0,
            }),
            missing: state::Sender::new(scopes),
        })
    }

    /// Waits until everything was listed once.
    pub async fn synced(&self) {
        // the sender lives in `self`
        let _ = self.missing.subscribe().wait_for(|missing| *missing == 0).await;
    }

    /// The object of that name.
    pub fn get(&self, key: &Key) -> Option<Arc<K>> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.objects.get(key).cloned()
    }

    /// All objects that fit.
    pub fn list(&self, fits: impl Fn(&K) -> bool) -> Vec<Arc<K>> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.objects.values().filter(|o| fits(o)).cloned().collect()
    }

    /// Takes over the answer to a write of our own. If it also shows what somebody else changed, the watch is to tell it.
    pub fn wrote(&self, object: K) {
        let (key, version) = (key_of(&object), version_of(&object));
        let mut inner = self.lock();
        let known = inner.objects.get(&key);
        let is_new = version > known.map_or(inner.watched, |o| version_of(o.as_ref()));
        if is_new && known.is_none_or(|o| is_ours_alone(o.as_ref(), &object)) {
            inner.objects.insert(key, Arc::new(object));
        }
    }

    /// Follows the objects of one namespace, or of all, until dropped; tells every change.
    pub async fn follow(self: Arc<Self>, client: Client, namespace: Option<String>, tell: impl Fn(Changed<K>)) {
        let api: Api<DeserializeGuard<K>> = match &namespace {
            Some(namespace) => Api::namespaced(client, namespace),
            None => Api::all(client),
        };
        let stream = watch(api, watcher::Config::default()).default_backoff();
        pin_mut!(stream);
        let mut list: BTreeMap<Key, Option<Arc<K>>> = BTreeMap::new();
        let mut listed = false;
        let mut said = String::new();
        while let Some(event) = stream.next().await {
            match event {
                Err(error) => complain::<K>(&mut said, &error.to_string()),
                Ok(Event::Init) => list.clear(),
                Ok(Event::InitApply(object)) => {
                    let (key, object) = read(object);
                    list.insert(key, object);
                }
                Ok(Event::InitDone) => {
                    said.clear();
                    let changes = self.replace(namespace.as_deref(), std::mem::take(&mut list));
                    if !std::mem::replace(&mut listed, true) {
                        self.missing.send_modify(|missing| *missing = missing.saturating_sub(1));
                    }
                    changes.into_iter().for_each(&tell);
                }
                Ok(Event::Apply(object)) => {
                    said.clear();
                    if let (_, Some(object)) = read(object) {
                        self.apply(object).into_iter().for_each(&tell);
                    }
                }
                Ok(Event::Delete(object)) => self.delete(&object).into_iter().for_each(&tell),
            }
        }
    }

    /// Takes over what the watch tells, unless an answer to a write was newer. It is told in any case: whoever wrote may
    /// have been somebody else in this process.
    fn apply(&self, object: Arc<K>) -> Option<Changed<K>> {
        let (key, version) = (key_of(object.as_ref()), version_of(object.as_ref()));
        let mut inner = self.lock();
        inner.watched = inner.watched.max(version);
        let old = inner.objects.get(&key).cloned();
        if old.as_ref().is_some_and(|o| version_of(o.as_ref()) >= version) {
            return None;
        }
        inner.objects.insert(key.clone(), object.clone());
        Some(Changed {
            key,
            old,
            new: Some(object),
        })
    }

    fn delete(&self, object: &DeserializeGuard<K>) -> Option<Changed<K>> {
        let key = key_of(object);
        let mut inner = self.lock();
        inner.watched = inner.watched.max(version_of(object));
        let old = inner.objects.remove(&key)?;
        Some(Changed {
            key,
            old: Some(old),
            new: None,
        })
    }

    /// Takes over a whole list. What is in none of both lists is gone; what could not be read stays as it was.
    fn replace(&self, namespace: Option<&str>, list: BTreeMap<Key, Option<Arc<K>>>) -> Vec<Changed<K>> {
        let mut inner = self.lock();
        let gone: Vec<Key> = inner
            .objects
            .keys()
            .filter(|k| namespace.is_none_or(|n| n == k.namespace) && !list.contains_key(*k))
            .cloned()
            .collect();
        let mut changes: Vec<Changed<K>> = Vec::new();
        for key in gone {
            let old = inner.objects.remove(&key);
            changes.push(Changed { key, old, new: None });
        }
        for (key, object) in list {
            let Some(object) = object else { continue };
            let version = version_of(object.as_ref());
            inner.watched = inner.watched.max(version);
            let old = inner.objects.get(&key).cloned();
            if old.as_ref().is_some_and(|o| version_of(o.as_ref()) >= version) {
                continue;
            }
            inner.objects.insert(key.clone(), object.clone());
            let new = Some(object);
            changes.push(Changed { key, old, new });
        }
        changes
    }

    fn lock(&self) -> RwLockWriteGuard<'_, Inner<K>> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read<K: Kind>(object: DeserializeGuard<K>) -> (Key, Option<Arc<K>>) {
    let key = key_of(&object);
    match object.0 {
        Ok(mut object) => {
            // nobody here reads them, and they are most of an object
            object.meta_mut().managed_fields = None;
            (key, Some(Arc::new(object)))
        }
        Err(invalid) => {
            tracing::warn!(kind = %K::kind(&()), object = %key, error = %invalid, "the object cannot be read and is left alone");
            (key, None)
        }
    }
}

/// Says each problem once.
fn complain<K: Kind>(said: &mut String, problem: &str) {
    if said != problem {
        tracing::warn!(kind = %K::kind(&()), error = problem, "the API server's watch broke off; tried again");
        problem.clone_into(said);
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use kube::api::ObjectMeta;

    use super::*;

    fn object(name: &str, version: u64) -> ConfigMap {
        ConfigMap {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                namespace: Some("ns".to_owned()),
                resource_version: Some(version.to_string()),
                ..ObjectMeta::default()
            },
            ..ConfigMap::default()
        }
    }

    fn version(cache: &Cache<ConfigMap>, name: &str) -> Option<u64> {
        cache.get(&Key::new("ns", name)).map(|o| version_of(o.as_ref()))
    }

    #[test]
    fn what_was_written_is_seen_before_the_watch_tells_it_and_not_undone_by_what_it_told_before() {
        let cache = Cache::new(1);
        cache.apply(Arc::new(object("a", 5)));
        cache.wrote(object("a", 9));
        assert_eq!(version(&cache, "a"), Some(9));
        assert!(cache.apply(Arc::new(object("a", 7))).is_none());
        assert_eq!(version(&cache, "a"), Some(9));
        assert!(
            cache.apply(Arc::new(object("a", 9))).is_none(),
            "our own write is no news"
        );
        assert!(cache.apply(Arc::new(object("a", 11))).is_some());
    }

    #[test]
    fn what_somebody_else_changed_is_told_although_the_answer_to_a_write_showed_it_before() {
        let cache = Cache::new(1);
        cache.apply(Arc::new(object("a", 5)));
        let mut edited = object("a", 8);
        edited.metadata.generation = Some(2);
        let mut answer = edited.clone();
        answer.metadata.resource_version = Some("9".to_owned());
        cache.wrote(answer);
        let told = cache.apply(Arc::new(edited));
        assert_eq!(told.and_then(|c| c.new).and_then(|o| o.metadata.generation), Some(2));
    }

    #[test]
    fn a_late_answer_to_a_write_does_not_bring_back_what_was_deleted() {
        let cache = Cache::new(1);
        cache.apply(Arc::new(object("a", 5)));
        cache.delete(&DeserializeGuard(Ok(object("a", 12))));
        cache.wrote(object("a", 9));
        assert_eq!(version(&cache, "a"), None);
        cache.wrote(object("b", 13));
        assert_eq!(version(&cache, "b"), Some(13), "a new one is known at once");
    }

    #[test]
    fn a_new_list_removes_what_is_gone_and_keeps_what_cannot_be_read() {
        let cache = Cache::new(1);
        for name in ["a", "b", "c"] {
            cache.apply(Arc::new(object(name, 5)));
        }
        let list = BTreeMap::from([
            (Key::new("ns", "a"), Some(Arc::new(object("a", 5)))),
            (Key::new("ns", "b"), None),
        ]);
        let changes = cache.replace(None, list);
        let keys: Vec<&str> = changes.iter().map(|c| c.key.name.as_str()).collect();
        assert_eq!(keys, ["c"], "only the one that is gone has changed");
        assert!(version(&cache, "b").is_some());
    }
}
