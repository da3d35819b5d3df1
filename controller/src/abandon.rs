//! Giving a move up (annotation `berth.dev/abandon`): the record ends as it is, nothing is asked of any server, and a
//! person is told the commands that clean up.

use berth_api::moves::MoveError;
use berth_api::{GuardKind, MicroTime, Outcome, Power, Reason, Step};
use berth_core::marks::{GENERATION, GUARD, MOVE, PROTECTION_START, ROLE};
use berth_core::model::Product;
use berth_core::moves;
use berth_core::records::Record;
use berth_engine::Happening;
use jiff::Timestamp;

/// The record as it ends, and what to tell people. `product` is what is known of an InstanceServer, if anything is.
pub(crate) fn given_up(
    mut record: Record,
    product: impl Fn(&str) -> Option<Product>,
    now: Timestamp,
) -> (Record, Happening) {
    let name = &record.name;
    let message = "given up as it was; no server was asked for anything".to_owned();
    let fix = commands(&record, product).join("; ");
    let status = &mut record.status;
    status.last_error = Some(MoveError {
        reason: Reason::NeedsAttention.as_str().to_owned(),
        message: message.clone(),
        fix: Some(fix.clone()),
        at: Some(MicroTime(now)),
        attempts: 1,
    });
    let happening = Happening {
        record: Some(name.clone()),
        warning: true,
        reason: Outcome::NeedsAttention.as_str().to_owned(),
        message: format!("move {name} was {message}. To clean up: {fix}"),
    };
    moves::close(&mut record, Outcome::NeedsAttention, now);
    (record, happening)
}

/// What takes the move's traces off both servers, as far as the record tells: first what makes the instance whole again
/// where it is to stay, then the end of the other copy.
fn commands(record: &Record, product: impl Fn(&str) -> Option<Product>) -> Vec<String> {
    let (spec, status) = (&record.spec, &record.status);
    let cli = |server: &str| product(server).map_or("incus", Product::cli);
    let names = status.names.clone().unwrap_or_default();
    let committed = status.step().is_some_and(Step::is_committed);
    let (stays, hidden, guard) = if committed {
        (&spec.to, names.incoming.clone(), spec.guard.target)
    } else {
        (&spec.from, names.retired.clone(), spec.guard.source)
    };
    let (tool, kept) = (cli(&stays.server), at(&stays.server, &stays.project, &stays.name));
    let mut commands = Vec::new();
    match (guard, hidden) {
        (GuardKind::Device, _) => commands.push(format!("{tool} config device remove {kept} {GUARD}")),
        (GuardKind::ProtectionKey, _) => commands.push(format!("{tool} config unset {kept} {PROTECTION_START}")),
        (GuardKind::Name, Some(hidden)) => {
            let hidden = at(&stays.server, &stays.project, &hidden);
            commands.push(format!("{tool} rename {hidden} {}", stays.name));
        }
        (GuardKind::Name | GuardKind::None, _) => {}
    }
    for key in [MOVE, ROLE, GENERATION] {
        commands.push(format!("{tool} config unset {kept} {key}"));
    }
    for put_back in status.put_back.iter().filter(|p| p.key != "ephemeral") {
        let key = &put_back.key;
        commands.push(match &put_back.value {
            Some(value) => format!("{tool} config set {kept} {key}={value}"),
            None => format!("{tool} config unset {kept} {key}"),
        });
    }
    if is_to_run(record, committed) {
        commands.push(format!("{tool} start {kept}"));
    }
    let other = if committed {
        let retired = names.retired.unwrap_or_else(|| spec.from.name.clone());
        Some((&spec.from, retired))
    } else {
        names.incoming.map(|incoming| (&spec.to, incoming))
    };
    if let Some((end, name)) = other {
        let gone = at(&end.server, &end.project, &name);
        commands.push(format!("{} delete {gone}", cli(&end.server)));
    }
    commands
}

/// Whether the move stopped the instance and has not started it again.
fn is_to_run(record: &Record, committed: bool) -> bool {
    let status = &record.status;
    if committed {
        return record.spec.power_after == Power::Running && status.running_at.is_none();
    }
    let stopped = status.stopped_at.is_some() || status.stop_requested_at.is_some();
    stopped && status.ran_before == Some(true)
}

/// An instance as the command line names it, with the InstanceServer as the remote.
fn at(server: &str, project: &str, name: &str) -> String {
    let project = if project == "default" {
        String::new()
    } else {
        format!("--project {project} ")
    };
    format!("{project}{server}:{name}")
}

#[cfg(test)]
mod tests {
    use berth_api::moves::{MoveNames, PutBack};

    use super::*;

    fn record(step: Step) -> Record {
        let spec = serde_json::json!({
            "placement": "web-1", "placementUID": "u", "attempt": 1, "planDigest": "", "method": "Cold",
            "transfer": "Pull", "instanceType": "Container", "powerAfter": "Running",
            "guard": {"source": "Device", "target": "Device"},
            "from": {"server": "rack-a", "fingerprint": "", "project": "default", "name": "web-1"},
            "to": {"server": "rack-b", "fingerprint": "", "project": "prod", "name": "web-1"},
        });
        let mut record = Record {
            namespace: "shop".into(),
            name: "web-1-x7k2p".into(),
            version: "1".into(),
            deleting: false,
            spec: serde_json::from_value(spec).unwrap(),
            status: Default::default(),
        };
        record.status.step = Some(step.as_str().to_owned());
        record.status.names = Some(MoveNames {
            incoming: Some("berth-a-web-1".into()),
            ..MoveNames::default()
        });
        record.status.put_back = vec![PutBack {
            key: "boot.autostart".into(),
            value: None,
        }];
        record
    }

    #[test]
    fn before_the_commit_the_source_is_freed_and_started_and_the_copy_goes() {
        let mut stopped = record(Step::Stopped);
        stopped.status.ran_before = Some(true);
        stopped.status.stopped_at = Some(MicroTime(Timestamp::UNIX_EPOCH));
        let (closed, happening) = given_up(stopped, |_| None, Timestamp::UNIX_EPOCH);
        assert!(closed.finished());
        let said = happening.message;
        assert!(
            said.contains("incus config device remove rack-a:web-1 berth-guard"),
            "{said}"
        );
        assert!(
            said.contains("incus config unset rack-a:web-1 boot.autostart"),
            "{said}"
        );
        assert!(
            said.ends_with("incus start rack-a:web-1; incus delete --project prod rack-b:berth-a-web-1"),
            "{said}"
        );
    }

    #[test]
    fn a_source_that_was_only_renamed_gets_its_name_back() {
        let mut hidden = record(Step::Stopped);
        hidden.spec.guard.source = GuardKind::Name;
        hidden.status.names.get_or_insert_default().retired = Some("berth-b-web-1".into());
        let (_, happening) = given_up(hidden, |_| None, Timestamp::UNIX_EPOCH);
        let said = happening.message;
        assert!(said.contains("incus rename rack-a:berth-b-web-1 web-1"), "{said}");
        assert!(!said.contains(" start "), "it did not run: {said}");
    }

    #[test]
    fn after_the_commit_the_target_is_freed_and_the_former_source_goes() {
        let (_, happening) = given_up(record(Step::Committed), |_| None, Timestamp::UNIX_EPOCH);
        let said = happening.message;
        assert!(
            said.contains("config device remove --project prod rack-b:web-1"),
            "{said}"
        );
        assert!(said.contains("incus delete rack-a:web-1"), "{said}");
    }
}
