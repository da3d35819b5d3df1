//! The rules that every version of every object of the project keeps, as a pure function over the whole history of one
//! object: what kstatus, `kubectl wait` and the rules of this project promise to whoever reads a status.

mod kstatus;
mod rules;
#[cfg(test)]
mod tests;

pub use kstatus::{Kstatus, kstatus};

use serde_json::Value;

/// One entry of an object's history, oldest first.
#[derive(Clone, Debug)]
pub enum Entry {
    /// The object as it was stored.
    Version(Value),
    /// Something from outside that may well change what is said of the object.
    Cause,
    /// Versions may be missing here.
    Gap,
}

/// A version that says something about its object.
pub(crate) struct Version<'a> {
    object: &'a Value,
    /// The version before, unless one may be missing.
    before: Option<&'a Value>,
    /// Whether something happened outside since the version before.
    caused: bool,
}

/// What is wrong in the history of one object, a sentence each.
pub fn violations(history: &[Entry]) -> Vec<String> {
    let versions = versions(history);
    let rules = [
        rules::conditions_of,
        rules::generations,
        rules::transition_times,
        rules::reasons,
        rules::readiness,
        rules::writes,
    ];
    rules.iter().flat_map(|rule| rule(&versions)).collect()
}

fn versions(history: &[Entry]) -> Vec<Version<'_>> {
    let (mut versions, mut before, mut caused) = (Vec::new(), None, false);
    for entry in history {
        match entry {
            Entry::Cause => caused = true,
            Entry::Gap => (before, caused) = (None, true),
            Entry::Version(object) => {
                versions.push(Version { object, before, caused });
                (before, caused) = (Some(object), false);
            }
        }
    }
    versions
}

impl<'a> Version<'a> {
    fn conditions(&self) -> impl Iterator<Item = &'a Value> + use<'a> {
        conditions(self.object)
    }

    /// Whether the controller has said anything yet.
    fn is_said(&self) -> bool {
        self.conditions().next().is_some()
    }

    /// Whether this version is a write of the status.
    fn says_something_new(&self) -> bool {
        self.is_said() && self.before.is_none_or(|b| b["status"] != self.object["status"])
    }

    fn reason(&self) -> &'a str {
        condition(self.object, "Ready").map_or("", |c| text(c, "reason"))
    }

    /// The beginning of a sentence about it.
    fn name(&self) -> String {
        let metadata = &self.object["metadata"];
        let (kind, name) = (text(self.object, "kind"), text(metadata, "name"));
        format!("{kind} {name} at version {}", text(metadata, "resourceVersion"))
    }
}

fn conditions(object: &Value) -> impl Iterator<Item = &Value> {
    object["status"]["conditions"].as_array().into_iter().flatten()
}

fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    conditions(object).find(|c| c["type"] == kind)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}
