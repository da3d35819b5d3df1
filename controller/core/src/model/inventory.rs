//! All instances that one server lists.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Instance, InstanceRef};

/// All instances that one server lists, found by place or by uuid. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    places: Arc<BTreeMap<InstanceRef, Arc<Instance>>>,
    uuids: Arc<BTreeMap<String, BTreeSet<InstanceRef>>>,
}

impl Inventory {
    /// The instance at that place.
    pub fn get(&self, at: &InstanceRef) -> Option<&Arc<Instance>> {
        self.places.get(at)
    }

    /// All instances with that uuid; more than one is a half-finished move or a copy made by hand.
    pub fn by_uuid<'a>(&'a self, uuid: &str) -> impl Iterator<Item = &'a Arc<Instance>> {
        self.uuids
            .get(uuid)
            .into_iter()
            .flatten()
            .filter_map(|at| self.places.get(at))
    }

    /// All instances.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Instance>> {
        self.places.values()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Adds or replaces one.
    pub fn insert(&mut self, instance: Instance) {
        self.remove(&instance.at.clone());
        if let Some(uuid) = instance.uuid() {
            Arc::make_mut(&mut self.uuids)
                .entry(uuid.to_owned())
                .or_default()
                .insert(instance.at.clone());
        }
        Arc::make_mut(&mut self.places).insert(instance.at.clone(), Arc::new(instance));
    }

    /// Forgets one.
    pub fn remove(&mut self, at: &InstanceRef) {
        let Some(old) = Arc::make_mut(&mut self.places).remove(at) else {
            return;
        };
        let Some(uuid) = old.uuid() else { return };
        let uuids = Arc::make_mut(&mut self.uuids);
        if let Some(set) = uuids.get_mut(uuid) {
            set.remove(at);
            if set.is_empty() {
                uuids.remove(uuid);
            }
        }
    }
}

impl FromIterator<Instance> for Inventory {
    fn from_iter<I: IntoIterator<Item = Instance>>(instances: I) -> Self {
        let mut inventory = Self::default();
        for instance in instances {
            inventory.insert(instance);
        }
        inventory
    }
}
