//! What kstatus makes of an object, as Flux and others compute it: `status.Compute` of kubernetes-sigs/cli-utils
//! (pkg/kstatus/status: generic.go, status.go) for kinds that it has no rules of their own for.

use serde_json::Value;

/// What a tool that waits for an object thinks of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kstatus {
    /// It is waited for.
    InProgress,
    /// Waiting is given up at once.
    Failed,
    /// Waiting is over.
    Current,
    /// It is being deleted.
    Terminating,
}

/// The status of an object.
pub fn kstatus(object: &Value) -> Kstatus {
    let metadata = &object["metadata"];
    if metadata["deletionTimestamp"].as_str().is_some_and(|t| !t.is_empty()) {
        return Kstatus::Terminating;
    }
    let observed = &object["status"]["observedGeneration"];
    if observed.is_number() && *observed != metadata["generation"] {
        return Kstatus::InProgress;
    }
    let conditions = || object["status"]["conditions"].as_array().into_iter().flatten();
    for condition in conditions().filter(|c| c["status"] == "True") {
        match condition["type"].as_str() {
            Some("Reconciling") => return Kstatus::InProgress,
            Some("Stalled") => return Kstatus::Failed,
            _ => {}
        }
    }
    match conditions().find(|c| c["type"] == "Ready").map(|c| &c["status"]) {
        Some(ready) if ready == "True" => Kstatus::Current,
        Some(_) => Kstatus::InProgress,
        None => Kstatus::Current,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(observed: i64, conditions: &[(&str, &str)]) -> Kstatus {
        let conditions = conditions.iter().map(|(t, s)| json!({"type": t, "status": s}));
        let status = json!({"observedGeneration": observed, "conditions": conditions.collect::<Vec<_>>()});
        kstatus(&json!({"metadata": {"generation": 2}, "status": status}))
    }

    #[test]
    fn an_object_is_current_only_if_the_newest_generation_is_ready() {
        assert_eq!(of(2, &[("Ready", "True")]), Kstatus::Current);
        assert_eq!(of(1, &[("Ready", "True")]), Kstatus::InProgress);
        assert_eq!(of(2, &[("Ready", "False")]), Kstatus::InProgress);
        assert_eq!(
            of(2, &[("Ready", "Unknown"), ("Reconciling", "True")]),
            Kstatus::InProgress
        );
        assert_eq!(of(2, &[("Ready", "False"), ("Stalled", "True")]), Kstatus::Failed);
        assert_eq!(of(1, &[("Ready", "False"), ("Stalled", "True")]), Kstatus::InProgress);
        assert_eq!(
            of(2, &[]),
            Kstatus::Current,
            "which is why a definition needs a default"
        );
        let going = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z", "generation": 2}});
        assert_eq!(kstatus(&going), Kstatus::Terminating);
    }
}
