//! Which instance a placement is about.

use berth_api::Reason;
use berth_core::plan::{Decision, Desired, Reach, ServerView, plan};

use super::common::{desired, instance, now, server, world};
use super::reason;

#[test]
fn a_placement_that_is_bound_by_uuid_is_never_bound_anew_by_name() {
    let mut other = instance("web");
    other.config.insert("volatile.uuid".into(), "another".into());
    let w = world([("rack-a", server("a", [other]))]);
    let mut d = desired("web", "rack-a");
    d.status.instance = Some(berth_api::placement::BoundInstance {
        uuid: Some("uuid-web".into()),
        ..Default::default()
    });
    assert_eq!(reason(&plan(&d, &w, now()).decision), Some(Reason::InstanceNotFound));
}

#[test]
fn two_instances_of_one_name_are_never_acted_on() {
    let mut twin = instance("web");
    twin.config.insert("volatile.uuid".into(), "another".into());
    let w = world([
        ("rack-a", server("a", [instance("web")])),
        ("rack-b", server("b", [twin])),
    ]);
    let verdict = plan(&desired("web", "rack-b"), &w, now());
    let Decision::Blocked(blockers) = &verdict.decision else {
        panic!("{verdict:?}")
    };
    assert_eq!(blockers[0].reason, Reason::AmbiguousInstance);
    assert!(
        blockers[0].fix.as_deref().is_some_and(|f| f.contains("uuid")),
        "{blockers:?}"
    );
}

#[test]
fn a_name_is_looked_up_only_when_every_server_was_listed() {
    let mut down = server("b", []);
    down.reach = Reach::Down {
        reason: Reason::Unreachable,
        message: "connection refused".into(),
        since: now(),
    };
    down.instances = None;
    let why = |here: ServerView, change: fn(&mut Desired)| {
        let w = world([("rack-a", here), ("rack-b", down.clone())]);
        let mut d = desired("web", "rack-a");
        change(&mut d);
        reason(&plan(&d, &w, now()).decision)
    };
    let web = || server("a", [instance("web")]);
    assert_eq!(why(server("a", []), |_| ()), Some(Reason::ServerUnreachable));
    // the other one may have another of that name
    assert_eq!(why(web(), |_| ()), Some(Reason::ServerUnreachable));
    let named = |d: &mut Desired| d.spec.instance.server = Some("rack-a".to_owned());
    assert_eq!(why(web(), named), None);
    let bound = |d: &mut Desired| d.spec.instance.uuid = instance("web").uuid().map(str::to_owned);
    assert_eq!(why(web(), bound), None);
}

#[test]
fn a_copy_on_its_way_in_or_out_is_no_candidate() {
    let mut retired = instance("web");
    retired.config.insert("user.berth.role".into(), "retired".into());
    let mut incoming = instance("berth-x7k2p9q3-web");
    incoming.config.insert("user.berth.role".into(), "incoming".into());
    let w = world([
        ("rack-a", server("a", [retired, incoming])),
        ("rack-b", server("b", [instance("web")])),
    ]);
    assert!(matches!(
        plan(&desired("web", "rack-b"), &w, now()).decision,
        Decision::InSync
    ));
}

#[test]
fn the_former_source_of_a_committed_move_is_no_candidate_while_its_server_is_away() {
    let marked = |role: &str| {
        let mut i = instance("web");
        i.config.insert("user.berth.move".into(), "web-x7k2p".into());
        i.config.insert("user.berth.role".into(), role.into());
        i
    };
    let mut w = world([
        ("rack-a", server("a", [marked("source")])),
        ("rack-b", server("b", [marked("owner")])),
    ]);
    let spec = serde_json::json!({
        "placement": "web", "placementUID": "uid", "attempt": 1, "planDigest": "", "method": "Cold",
        "transfer": "Pull", "instanceType": "Container", "powerAfter": "Running",
        "from": {"server": "rack-a", "fingerprint": "a", "project": "default", "name": "web"},
        "to": {"server": "rack-b", "fingerprint": "b", "project": "default", "name": "web"},
    });
    w.records = vec![berth_core::records::Record {
        namespace: "shop".into(),
        name: "web-x7k2p".into(),
        version: String::new(),
        deleting: false,
        spec: serde_json::from_value(spec).unwrap(),
        status: Default::default(),
    }];
    w.open_moves = vec!["web-x7k2p".into()];
    let verdict = plan(&desired("web", "rack-b"), &w, now());
    assert!(matches!(verdict.decision, Decision::InSync), "{verdict:?}");
    // its deletion was asked for, and the owner's marks came off, when its server was lost
    w.servers.insert("rack-b".into(), server("b", [instance("web")]));
    let verdict = plan(&desired("web", "rack-b"), &w, now());
    assert_eq!(
        reason(&verdict.decision),
        Some(Reason::AmbiguousInstance),
        "{verdict:?}"
    );
    w.records[0].status.committed_at = Some(berth_api::MicroTime(now()));
    let verdict = plan(&desired("web", "rack-b"), &w, now());
    assert!(matches!(verdict.decision, Decision::InSync), "{verdict:?}");
}
