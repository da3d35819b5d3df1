//! Giving a move up (annotation `berth.dev/abandon`): the record ends as it is, nothing is asked of any server, and a
//! person is told the commands that clean up.

use std::sync::Arc;

use berth_api::moves::MoveError;
use berth_api::{GuardKind, MicroTime, Outcome, Reason, Step};
use berth_core::marks::{GENERATION, GUARD, MOVE, PROTECTION_START, ROLE};
use berth_core::model::ServerFacts;
use berth_core::moves;
use berth_core::records::Record;
use berth_engine::Happening;
use jiff::Timestamp;

/// The record as it ends, and what to tell people.
pub(crate) fn given_up(
    mut record: Record,
    facts: impl Fn(&str) -> Option<Arc<ServerFacts>>,
    now: Timestamp,
) -> (Record, Happening) {
    let name = &record.name;
    let message = format!("move {name} was given up as it was; no server was asked for anything");
    let fix = commands(&record, facts).join("; ");
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
        message: format!("{message}. To clean up: {fix}"),
    };
    moves::close(&mut record, Outcome::NeedsAttention, now);
    (record, happening)
}

/// What takes the move's traces off both servers, as far as the record tells.
fn commands(record: &Record, facts: impl Fn(&str) -> Option<Arc<ServerFacts>>) -> Vec<String> {
    let (from, to, status) = (&record.spec.from, &record.spec.to, &record.status);
    let cli = |server: &str| facts(server).map_or("incus", |f| f.product.cli());
    let committed = status.step().is_some_and(Step::is_committed);
    let source = at(&from.server, &from.project, &from.name);
    let mut commands = Vec::new();
    let mut unguard = |cli: &str, at: &str, guard: GuardKind| match guard {
        GuardKind::Device => commands.push(format!("{cli} config device remove {at} {GUARD}")),
        GuardKind::ProtectionKey => commands.push(format!("{cli} config unset {at} {PROTECTION_START}")),
        GuardKind::Name | GuardKind::None => {}
    };
    let (kept, kept_cli, guard) = if committed {
        let target = at(&to.server, &to.project, &to.name);
        (target, cli(&to.server), record.spec.guard.target)
    } else {
        (source.clone(), cli(&from.server), record.spec.guard.source)
    };
    unguard(kept_cli, &kept, guard);
    for key in [MOVE, ROLE, GENERATION] {
        commands.push(format!("{kept_cli} config unset {kept} {key}"));
    }
    for put_back in status.put_back.iter().filter(|p| p.key != "ephemeral") {
        let key = &put_back.key;
        commands.push(match &put_back.value {
            Some(value) => format!("{kept_cli} config set {kept} {key}={value}"),
            None => format!("{kept_cli} config unset {kept} {key}"),
        });
    }
    let names = status.names.as_ref();
    if committed {
        let retired = names.and_then(|n| n.retired.as_deref()).unwrap_or(&from.name);
        let gone = at(&from.server, &from.project, retired);
        commands.push(format!("{} delete {gone}", cli(&from.server)));
    } else if let Some(incoming) = names.and_then(|n| n.incoming.as_deref()) {
        let gone = at(&to.server, &to.project, incoming);
        commands.push(format!("{} delete {gone}", cli(&to.server)));
    }
    commands
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
    fn before_the_commit_the_source_is_freed_and_the_copy_goes() {
        let (closed, happening) = given_up(record(Step::Stopped), |_| None, Timestamp::UNIX_EPOCH);
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
            said.contains("incus delete --project prod rack-b:berth-a-web-1"),
            "{said}"
        );
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
