//! The rules, one function each: from the versions of one object to what breaks the rule.

use jiff::Timestamp;
use serde_json::Value;

use super::{Kstatus, Version, condition, conditions, kstatus, text};

/// Reasons that tell what Berth itself does or waits for; all others tell of the world, which changes without asking.
const OWN: &[&str] = &[
    "Connecting",
    "Progressing",
    "InPlace",
    "Moving",
    "MoveFailed",
    "Updating",
    "WaitingForWindow",
    "WaitingForApproval",
    "DriftObserved",
    "Suspended",
    "MoveCancelled",
    "UpToDate",
    "Copying",
    "RefreshFailed",
];

/// What of an object explains that something else is said of it than before.
const CAUSES: &[&str] = &[
    "/metadata/generation",
    "/metadata/deletionTimestamp",
    "/metadata/annotations",
    "/status/currentMove/name",
    "/status/moves/0/name",
    "/status/location",
    "/status/instance",
    "/status/drift",
    "/status/lastHandledReconcileAt",
    "/status/lastRefresh",
    "/status/retryAt",
    "/status/uuid",
    "/status/version",
    "/status/fingerprint",
    "/status/address",
];

/// Ready is always there, with a reason; Reconciling and Stalled only while true, and what they mean together.
pub(super) fn conditions_of(versions: &[Version]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut said = false;
    for v in versions {
        said |= v.is_said();
        if !said {
            continue;
        }
        let mut say = |what: &str| wrong.push(format!("{}: {what}", v.name()));
        let count = |kind: &str| v.conditions().filter(|c| c["type"] == kind).count();
        if count("Ready") != 1 {
            say("Ready is not there once");
        }
        if v.conditions().any(|c| text(c, "reason").is_empty()) {
            say("a condition has no reason");
        }
        let ready = condition(v.object, "Ready").map_or("", |c| text(c, "status"));
        if v.conditions().any(|c| c["type"] != "Ready" && c["status"] != "True") {
            say("a condition other than Ready is there and not True");
        }
        let (reconciling, stalled) = (count("Reconciling"), count("Stalled"));
        if reconciling + stalled > 1 {
            say("it is reconciling and stalled");
        }
        if ready == "True" && reconciling + stalled > 0 {
            say("it is ready, and reconciling or stalled");
        }
        if ready == "Unknown" && reconciling == 0 {
            say("nobody knows whether it is ready, and it is not reconciling");
        }
    }
    wrong
}

/// What is written of an object is about its newest generation, from the first write after a change of the spec on.
pub(super) fn generations(versions: &[Version]) -> Vec<String> {
    let mut wrong = Vec::new();
    for v in versions {
        let (generation, status) = (&v.object["metadata"]["generation"], &v.object["status"]);
        let ahead = |observed: &Value| observed.as_i64() > generation.as_i64();
        if ahead(&status["observedGeneration"]) {
            wrong.push(format!("{}: a generation is observed that never was", v.name()));
        }
        if !v.says_something_new() {
            continue;
        }
        let observed = &status["observedGeneration"];
        if observed != generation {
            wrong.push(format!(
                "{}: written at generation {generation}, observed {observed}",
                v.name()
            ));
        }
        for c in v.conditions().filter(|c| c["observedGeneration"] != *generation) {
            let (kind, of) = (text(c, "type"), &c["observedGeneration"]);
            wrong.push(format!(
                "{}: {kind} is of generation {of}, the spec of {generation}",
                v.name()
            ));
        }
    }
    wrong
}

/// `lastTransitionTime` changes exactly with the status of its condition, and is the time of that.
pub(super) fn transition_times(versions: &[Version]) -> Vec<String> {
    let mut wrong = Vec::new();
    for v in versions {
        let Some(before) = v.before else { continue };
        for c in v.conditions() {
            let (kind, since) = (text(c, "type"), time(&c["lastTransitionTime"]));
            let old = condition(before, kind);
            let same = old.is_some_and(|o| o["status"] == c["status"]);
            if same && old.is_some_and(|o| o["lastTransitionTime"] != c["lastTransitionTime"]) {
                wrong.push(format!(
                    "{}: the time of {kind} changed and its status did not",
                    v.name()
                ));
            }
            // a second for what is cut off
            let (from, to) = (written_at(before), written_at(v.object));
            let early = from.zip(since).is_some_and(|(from, since)| since + 1 < from);
            let late = to.zip(since).is_some_and(|(to, since)| since > to + 1);
            if !same && (early || late) {
                let seen = &c["lastTransitionTime"];
                wrong.push(format!("{}: the status of {kind} changed, but not at {seen}", v.name()));
            }
        }
    }
    wrong
}

/// Nothing is said, taken back and said again without a cause.
pub(super) fn reasons(versions: &[Version]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut said: Vec<&str> = Vec::new();
    for v in versions {
        let reason = v.reason();
        let last = said.last().copied().unwrap_or_default();
        if explained(v, last, reason) {
            said.clear();
        }
        if said.contains(&reason) && last != reason {
            let story = [&said[..], &[reason]].concat().join(", ");
            wrong.push(format!("{}: it said {story} without a cause", v.name()));
            said.clear();
        }
        if said.last() != Some(&reason) {
            said.push(reason);
        }
    }
    wrong
}

fn explained(v: &Version, last: &str, reason: &str) -> bool {
    let Some(before) = v.before else { return true };
    // a move's reasons are its steps, and nothing in the world brings a step back
    if v.object["kind"] == "InstanceMove" {
        return false;
    }
    let of_the_world = |r: &str| !r.is_empty() && !OWN.contains(&r);
    let differs = |path: &&str| before.pointer(path) != v.object.pointer(path);
    v.caused || of_the_world(last) || of_the_world(reason) || CAUSES.iter().any(differs)
}

/// Whoever waits by kstatus or by `kubectl wait` goes on when all is as the spec says, and not before.
pub(super) fn readiness(versions: &[Version]) -> Vec<String> {
    let mut wrong = Vec::new();
    // that a status has a default is up to the installed definition, which may be an older one
    let with_status = versions.iter().filter(|v| v.object["status"].is_object());
    for v in with_status.filter(|v| kstatus(v.object) == Kstatus::Current) {
        let mut say = |what: &str| wrong.push(format!("{}: it is Current, and {what}", v.name()));
        let (spec, status) = (&v.object["spec"], &v.object["status"]);
        if condition(v.object, "Ready").is_none() {
            say("nothing was said of it yet");
        }
        match text(v.object, "kind") {
            "InstancePlacement" => {
                let location = &status["location"];
                for field in ["server", "member", "project", "pool", "name"] {
                    let wanted = &spec["target"][field];
                    if wanted.as_str().is_some_and(|w| !w.is_empty()) && *wanted != location[field] {
                        say(&format!(
                            "target.{field} is {wanted}, the instance is at {}",
                            location[field]
                        ));
                    }
                }
                if status["currentMove"].is_object() || status["drift"].as_array().is_some_and(|d| !d.is_empty()) {
                    say("it moves, or something differs");
                }
            }
            "InstanceMove" if status["outcome"] != "Succeeded" => say("the move has not succeeded"),
            "InstanceCopy" if !status["lastRefresh"].is_object() => say("nothing was copied yet"),
            "InstanceServer" if !status["version"].is_string() => say("nothing is known of the server"),
            _ => {}
        }
    }
    wrong
}

/// No write changes nothing; what says the same reason again is written at most once a second, and progress alone at most
/// every five seconds.
pub(super) fn writes(versions: &[Version]) -> Vec<String> {
    let mut wrong = Vec::new();
    let (mut paced, mut progress) = (Vec::new(), Vec::new());
    for v in versions {
        let Some(before) = v.before else {
            (paced, progress) = (Vec::new(), Vec::new());
            continue;
        };
        // the first change of any kind stores the default status that everybody saw before
        if v.is_said() && stripped(before) == stripped(v.object) {
            wrong.push(format!("{}: a write that changed nothing", v.name()));
        }
        if !v.says_something_new() {
            continue;
        }
        let kind = text(v.object, "kind");
        let at = written_at(v.object);
        let of = |object: &Value| {
            let reason = condition(object, "Ready").map(|c| c["reason"].clone());
            (reason, object["status"]["observedGeneration"].clone())
        };
        if of(before) != of(v.object) {
            (paced, progress) = (Vec::new(), Vec::new());
        }
        if kind == "InstancePlacement" {
            paced.extend(at);
            wrong.extend(too_many(v, &mut paced, 1));
        } else if without_progress(before) == without_progress(v.object) {
            progress.extend(at);
            wrong.extend(too_many(v, &mut progress, 5));
        }
    }
    wrong
}

/// Whether there were more writes than one every so many seconds. One more than that, since each may come at any moment of
/// its second, and the first of a reason is free.
fn too_many(v: &Version, times: &mut Vec<i64>, every: i64) -> Option<String> {
    let (first, last) = (*times.first()?, *times.last()?);
    let allowed = (last - first + 1) / every + 2;
    if i64::try_from(times.len()).is_ok_and(|n| n <= allowed) {
        return None;
    }
    let (count, span) = (times.len(), last - first);
    times.clear();
    Some(format!("{}: {count} writes in {span} s that say the same", v.name()))
}

/// The object without what every write changes.
fn stripped(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("resourceVersion");
    }
    // who owns a field may change, and that is a change
    let managers = object["metadata"]["managedFields"].as_array_mut();
    for manager in managers.into_iter().flatten().filter_map(Value::as_object_mut) {
        manager.remove("time");
    }
    object
}

/// The status without what only shows how far something is; how a condition puts it is part of that.
fn without_progress(object: &Value) -> Value {
    let mut status = object["status"].clone();
    let Some(fields) = status.as_object_mut() else {
        return status;
    };
    fields.remove("progress");
    if let Some(current) = fields.get_mut("current").and_then(Value::as_object_mut) {
        current.remove("progress");
    }
    let said = conditions(object).map(|c| (c["type"].clone(), c["status"].clone(), c["reason"].clone()));
    let said: Vec<_> = said.map(|(t, s, r)| Value::from(vec![t, s, r])).collect();
    fields.insert("conditions".into(), said.into());
    status
}

fn time(value: &Value) -> Option<i64> {
    let time: Result<Timestamp, _> = value.as_str()?.parse();
    time.ok().map(Timestamp::as_second)
}

/// When the status was written last, as the API server knows it.
fn written_at(object: &Value) -> Option<i64> {
    let managers = object["metadata"]["managedFields"].as_array()?;
    let of_status = managers.iter().filter(|m| m["subresource"] == "status");
    of_status.filter_map(|m| time(&m["time"])).max()
}
