//! Decisions about placements: no server, no clock. One test is one sentence of the design.

mod common;
#[path = "plan/copies.rs"]
mod copies;
#[path = "plan/criu.rs"]
mod criu;
#[path = "plan/identity.rs"]
mod identity;
#[path = "plan/live.rs"]
mod live;

use berth_api::placement::{Drift, Mode, PowerState};
use berth_api::{InstancePlacementStatus, Method, Reason, Transfer};
use berth_core::model::{MemberStatus, Power};
use berth_core::plan::{Decision, Desired, Reach, plan};
use berth_core::server::PowerAction;
use berth_core::status;
use common::{claim, cluster, desired, instance, now, server, world};

fn reason(decision: &Decision) -> Option<Reason> {
    match decision {
        Decision::InSync
        | Decision::Move(_)
        | Decision::Power { .. }
        | Decision::Adapt { .. }
        | Decision::Repair { .. } => None,
        Decision::Wait { reason, .. } => Some(*reason),
        Decision::Blocked(blockers) => blockers.first().map(|b| b.reason),
    }
}

#[test]
fn an_instance_that_is_where_it_should_be_needs_nothing() {
    let w = world([("rack-a", server("a", [instance("web")]))]);
    let verdict = plan(&desired("web", "rack-a"), &w, now());
    assert!(matches!(verdict.decision, Decision::InSync), "{verdict:?}");
    assert!(verdict.drift.is_empty());
}

#[test]
fn what_was_said_of_this_spec_stays_until_a_new_process_has_asked_the_servers() {
    let said = |d: &Desired, w| status::resting(d, &plan(d, w, now()), None, now());
    let ready = |s: &InstancePlacementStatus| s.conditions.first().map(|c| c.reason.clone());
    let mut new = server("a", []);
    (new.reach, new.instances, new.facts) = (Reach::Connecting, None, None);
    let (known, unknown) = (
        world([("rack-a", server("a", [instance("web")]))]),
        world([("rack-a", new)]),
    );
    let mut d = desired("web", "rack-a");
    assert_eq!(ready(&said(&d, &unknown)).as_deref(), Some("Progressing"));
    d.status = said(&d, &known);
    assert_eq!(ready(&d.status).as_deref(), Some("InPlace"));
    assert_eq!(said(&d, &unknown), d.status);
    d.generation += 1;
    assert_eq!(ready(&said(&d, &unknown)).as_deref(), Some("Progressing"));
    // one of two servers answers sooner
    let both = |b| world([("rack-a", server("a", [instance("web")])), ("rack-b", b)]);
    let mut late = server("b", []);
    (late.reach, late.instances, late.facts) = (Reach::Connecting, None, None);
    let (known, half) = (both(server("b", [])), both(late));
    let mut d = desired("web", "rack-b");
    d.spec.target.pool = Some("nowhere".to_owned());
    assert_eq!(ready(&said(&d, &half)).as_deref(), Some("Progressing"));
    d.status = said(&d, &known);
    assert_eq!(ready(&d.status).as_deref(), Some("PoolNotFound"));
    assert_eq!(said(&d, &half), d.status);
}

#[test]
fn an_instance_on_another_server_is_moved_cold_by_pull_with_a_guard_on_both_sides() {
    let w = world([("rack-a", server("a", [instance("web")])), ("rack-b", server("b", []))]);
    let verdict = plan(&desired("web", "rack-b"), &w, now());
    let Decision::Move(spec) = verdict.decision else {
        panic!("{verdict:?}")
    };
    assert_eq!(verdict.drift, [Drift::WrongServer]);
    assert_eq!((spec.method, spec.transfer), (Method::Cold, Transfer::Pull));
    assert_eq!(
        spec.guard,
        berth_api::GuardPair {
            source: berth_api::GuardKind::Device,
            target: berth_api::GuardKind::Device
        }
    );
    assert_eq!(
        (spec.from.fingerprint.as_str(), spec.to.fingerprint.as_str()),
        ("a", "b")
    );
    assert_eq!(spec.to.pool.as_deref(), Some("default"));
    assert_eq!(spec.power_after, berth_api::Power::Running);
}

#[test]
fn a_placement_that_is_being_deleted_starts_nothing() {
    let w = world([("rack-a", server("a", [instance("web")])), ("rack-b", server("b", []))]);
    let mut d = desired("web", "rack-b");
    d.deleting = true;
    assert_eq!(reason(&plan(&d, &w, now()).decision), Some(Reason::Pending));
}

#[test]
fn a_cancelled_move_is_not_made_again_although_its_record_was_deleted() {
    let w = world([("rack-a", server("a", [instance("web")])), ("rack-b", server("b", []))]);
    let mut d = desired("web", "rack-b");
    d.status.moves = vec![berth_api::placement::MoveSummary {
        name: "web-x7k2p".into(),
        transfer: None,
        method: Method::Cold,
        from: "rack-a".into(),
        to: "rack-b".into(),
        outcome: "Cancelled".into(),
        reason: None,
        message: None,
        finished_at: None,
        downtime: None,
        generation: Some(1),
    }];
    assert_eq!(reason(&plan(&d, &w, now()).decision), Some(Reason::MoveCancelled));
    d.generation = 2;
    assert!(matches!(plan(&d, &w, now()).decision, Decision::Move(_)));
}

#[test]
fn every_refusal_has_its_reason_and_a_way_to_mend_it() {
    type Change = fn(&mut berth_core::plan::Desired, &mut berth_core::plan::World);
    let rows: [(Reason, Change); 12] = [
        (Reason::ServerNotFound, |d, _| d.spec.target.server = "nowhere".into()),
        (Reason::InstanceNotFound, |d, _| {
            d.spec.instance.name = Some("nobody".into());
        }),
        (Reason::TargetCordoned, |_, w| view(w).cordoned = true),
        (Reason::PoolNotFound, |d, _| d.spec.target.pool = Some("nvme".into())),
        (Reason::ProjectNotFound, |d, _| {
            d.spec.target.project = Some("prod".into());
        }),
        (Reason::MemberNotFound, |d, _| {
            d.spec.target.member = Some("node-3".into());
        }),
        (Reason::ProfileNotFound, |d, _| {
            d.spec.overrides.profiles = vec!["fast".into()];
        }),
        (Reason::NetworkNotFound, |d, _| {
            let nic = [("type", "nic"), ("network", "br9")].map(|(k, v)| (k.to_owned(), v.to_owned()));
            d.spec.overrides.devices.insert("eth0".into(), nic.into());
        }),
        (Reason::NameTaken, |_, w| {
            let mut other = instance("web");
            other.config.insert("volatile.uuid".into(), "another".into());
            view(w).instances = Some([other].into_iter().collect());
        }),
        (Reason::MethodImpossible, |d, _| d.spec.methods = vec![Method::Live]),
        (Reason::InvalidSpec, |d, _| d.spec.target.name = Some("9-lives.".into())),
        (Reason::ClaimedByAnother, |_, w| {
            w.claims = vec![claim("older", "a", "uuid-web", "2020-01-01T00:00:00Z")];
        }),
    ];
    for (expected, change) in rows {
        let mut w = world([("rack-a", server("a", [instance("web")])), ("rack-b", server("b", []))]);
        let mut d = desired("web", "rack-b");
        d.spec.instance.uuid = (expected == Reason::NameTaken).then(|| "uuid-web".to_owned());
        change(&mut d, &mut w);
        let verdict = plan(&d, &w, now());
        let Decision::Blocked(blockers) = &verdict.decision else {
            panic!("{expected}: {verdict:?}")
        };
        assert_eq!(blockers[0].reason, expected, "{blockers:?}");
        assert!(
            !blockers[0].message.is_empty() && blockers[0].fix.is_some(),
            "{blockers:?}"
        );
    }
}

fn view(w: &mut berth_core::plan::World) -> &mut berth_core::plan::ServerView {
    w.servers.get_mut("rack-b").unwrap_or_else(|| panic!("rack-b"))
}

#[test]
fn all_blockers_are_found_at_once() {
    let w = world([("rack-a", server("a", [instance("web")])), ("rack-b", server("b", []))]);
    let mut d = desired("web", "rack-b");
    d.spec.target.pool = Some("nvme".into());
    d.spec.overrides.profiles = vec!["fast".into()];
    let Decision::Blocked(blockers) = plan(&d, &w, now()).decision else {
        panic!()
    };
    let reasons: Vec<_> = blockers.iter().map(|b| b.reason).collect();
    assert_eq!(reasons, [Reason::PoolNotFound, Reason::ProfileNotFound]);
}

#[test]
fn suspended_or_observing_placements_only_say_what_they_would_do() {
    let w = world([("rack-a", server("a", [instance("web")])), ("rack-b", server("b", []))]);
    let mut d = desired("web", "rack-b");
    d.spec.suspend = true;
    let verdict = plan(&d, &w, now());
    assert_eq!(reason(&verdict.decision), Some(Reason::Suspended));
    assert!(verdict.plan.is_some_and(|p| p.digest.is_some()));
    d.spec.suspend = false;
    d.spec.mode = Mode::Observe;
    assert_eq!(reason(&plan(&d, &w, now()).decision), Some(Reason::DriftObserved));
}

#[test]
fn the_declared_power_state_alone_needs_no_move() {
    let mut stopped = instance("web");
    stopped.power = Power::Stopped;
    let w = world([("rack-a", server("a", [stopped]))]);
    let mut d = desired("web", "rack-a");
    assert!(
        matches!(plan(&d, &w, now()).decision, Decision::InSync),
        "Preserve is never drift"
    );
    d.spec.power_state = PowerState::Running;
    let Decision::Power { action, .. } = plan(&d, &w, now()).decision else {
        panic!()
    };
    assert_eq!(action, PowerAction::Start { stateful: false });
}

#[test]
fn a_stopped_instance_moves_even_where_only_live_moves_are_allowed_and_stays_stopped() {
    let mut stopped = instance("web");
    stopped.power = Power::Stopped;
    let w = world([("rack-a", server("a", [stopped])), ("rack-b", server("b", []))]);
    let mut d = desired("web", "rack-b");
    d.spec.methods = vec![Method::Live];
    let Decision::Move(spec) = plan(&d, &w, now()).decision else {
        panic!()
    };
    assert_eq!(spec.power_after, berth_api::Power::Stopped);
}

#[test]
fn without_a_free_slot_a_move_waits() {
    let mut w = world([("rack-a", server("a", [instance("web")])), ("rack-b", server("b", []))]);
    view(&mut w).free_incoming = 0;
    assert_eq!(
        reason(&plan(&desired("web", "rack-b"), &w, now()).decision),
        Some(Reason::Pending)
    );
}

#[test]
fn a_move_waits_for_the_refresh_of_a_copy_of_its_instance_and_for_no_other() {
    let mut w = world([("rack-a", server("a", [instance("web")])), ("rack-b", server("b", []))]);
    for (uuid, waits) in [(instance("web").uuid().unwrap_or_default(), true), ("another", false)] {
        w.refreshed = vec![uuid.to_owned()];
        let decision = plan(&desired("web", "rack-b"), &w, now()).decision;
        assert_eq!(reason(&decision) == Some(Reason::Pending), waits, "{decision:?}");
    }
}

#[test]
fn a_member_change_inside_a_cluster_is_done_by_the_cluster() {
    let mut web = instance("web");
    web.member = Some("m1".into());
    let w = world([("rack", cluster("c", [web]))]);
    let mut d = desired("web", "rack");
    d.spec.target.member = Some("m2".into());
    let Decision::Move(spec) = plan(&d, &w, now()).decision else {
        panic!()
    };
    assert_eq!(
        (spec.transfer, spec.to.member.as_deref()),
        (Transfer::Internal, Some("m2"))
    );
    assert_eq!(spec.guard.source, berth_api::GuardKind::None);
}

#[test]
fn a_group_is_resolved_to_an_online_member_of_it() {
    let mut web = instance("web");
    web.member = Some("m1".into());
    let w = world([("rack", cluster("c", [web]))]);
    let mut d = desired("web", "rack");
    d.spec.target.group = Some("ssd".into());
    let Decision::Move(spec) = plan(&d, &w, now()).decision else {
        panic!()
    };
    assert_eq!(
        (spec.to.member.as_deref(), spec.to.group.as_deref()),
        (Some("m3"), Some("ssd"))
    );
}

#[test]
fn an_evacuated_instance_is_left_alone() {
    let mut web = instance("web");
    web.member = Some("m2".into());
    web.config.insert("volatile.evacuate.origin".into(), "m1".into());
    let mut rack = cluster("c", [web]);
    if let Some(facts) = rack.facts.as_mut() {
        std::sync::Arc::make_mut(facts).members[0].status = MemberStatus::Evacuated;
    }
    let mut d = desired("web", "rack");
    d.spec.target.member = Some("m1".into());
    assert_eq!(
        reason(&plan(&d, &world([("rack", rack)]), now()).decision),
        Some(Reason::ForeignOperation)
    );
}

#[test]
fn a_restricted_target_project_is_refused_because_the_copy_would_lose_its_identity() {
    let mut b = server("b", []);
    if let Some(facts) = b.facts.as_mut() {
        std::sync::Arc::make_mut(facts).projects[0]
            .config
            .insert("restricted".into(), "true".into());
    }
    let w = world([("rack-a", server("a", [instance("web")])), ("rack-b", b)]);
    let verdict = plan(&desired("web", "rack-b"), &w, now());
    assert_eq!(reason(&verdict.decision), Some(Reason::ProjectRestricted));
    let spec = verdict.plan.unwrap_or_default();
    assert_eq!(spec.transfer, Some(Transfer::Push), "newer Incus refuses to pull there");
    assert_eq!(spec.guard.map(|g| g.target), Some(berth_api::GuardKind::Name));
}

#[test]
fn marks_of_a_move_that_is_over_are_taken_off_and_those_of_an_unknown_move_are_respected() {
    let mut web = instance("web");
    web.config.insert("user.berth.move".into(), "web-x7k2p".into());
    let w = world([("rack-a", server("a", [web]))]);
    let mut d = desired("web", "rack-a");
    assert_eq!(reason(&plan(&d, &w, now()).decision), Some(Reason::ForeignOperation));
    d.status.moves = vec![berth_api::placement::MoveSummary {
        name: "web-x7k2p".into(),
        method: Method::Cold,
        transfer: None,
        from: "rack-b".into(),
        to: "rack-a".into(),
        outcome: "Succeeded".into(),
        reason: None,
        message: None,
        finished_at: None,
        downtime: None,
        generation: Some(1),
    }];
    assert!(matches!(plan(&d, &w, now()).decision, Decision::Repair { .. }));
}

#[test]
fn an_approval_is_for_one_plan_only() {
    let w = world([("rack-a", server("a", [instance("web")])), ("rack-b", server("b", []))]);
    let mut d = desired("web", "rack-b");
    d.spec.approval = berth_api::placement::Approval::Manual;
    let verdict = plan(&d, &w, now());
    assert_eq!(reason(&verdict.decision), Some(Reason::WaitingForApproval));
    d.approve = verdict.plan.and_then(|p| p.digest);
    assert!(matches!(plan(&d, &w, now()).decision, Decision::Move(_)));
    d.status.committed_moves = Some(1);
    assert_eq!(
        reason(&plan(&d, &w, now()).decision),
        Some(Reason::WaitingForApproval),
        "it is spent"
    );
}

#[test]
fn the_way_of_the_data_is_the_first_that_both_servers_allow_and_that_is_not_known_to_fail() {
    let way = |worked: Option<Transfer>, failed: &[Transfer]| berth_core::plan::Way {
        worked,
        failed: failed.iter().copied().collect(),
    };
    let chosen = |way: berth_core::plan::Way, scratch: bool| {
        let mut b = server("b", []);
        b.ways.insert("rack-a".into(), way);
        let mut w = world([("rack-a", server("a", [instance("web")])), ("rack-b", b)]);
        w.scratch = scratch;
        let plan = plan(&desired("web", "rack-b"), &w, now()).plan.unwrap_or_default();
        plan.transfer.unwrap()
    };
    use Transfer::{Backup, Pull, Push, Relay};
    assert_eq!(chosen(way(None, &[]), true), Pull);
    assert_eq!(chosen(way(None, &[Pull]), true), Push);
    assert_eq!(chosen(way(None, &[Pull, Push]), true), Relay);
    assert_eq!(chosen(way(None, &[Pull, Push, Relay]), true), Backup);
    assert_eq!(chosen(way(None, &[Pull, Push, Relay]), false), Pull, "it begins anew");
    assert_eq!(chosen(way(Some(Relay), &[Pull]), true), Relay, "what worked is used");
    assert_eq!(chosen(way(Some(Relay), &[Relay]), true), Pull);
}

#[test]
fn what_a_backup_cannot_leave_out_or_an_import_misses_is_refused_and_auto_does_not_choose_it() {
    let chosen = |config: &str, overrides: berth_api::Overrides, auto: bool| {
        let mut web = instance("web");
        if !config.is_empty() {
            web.config.insert(config.into(), "true".into());
        }
        web.profiles = vec!["default".into(), "rack-a-only".into()];
        let mut b = server("b", []);
        b.ways.insert(
            "rack-a".into(),
            berth_core::plan::Way {
                worked: None,
                failed: [Transfer::Pull, Transfer::Push, Transfer::Relay].into(),
            },
        );
        let mut w = world([("rack-a", server("a", [web])), ("rack-b", b)]);
        w.scratch = true;
        let mut d = desired("web", "rack-b");
        d.spec.overrides = overrides;
        if !auto {
            d.spec.transfer = berth_api::TransferMode::Backup;
        }
        let verdict = plan(&d, &w, now());
        if let Decision::Blocked(blockers) = &verdict.decision {
            assert!(blockers.iter().all(|b| b.fix.is_some()), "{blockers:?}");
        }
        (reason(&verdict.decision), verdict.plan.and_then(|p| p.transfer))
    };
    let replaced = || berth_api::Overrides {
        profiles: vec!["default".into()],
        ..Default::default()
    };
    // an import looks for the profiles that are replaced
    let profile = chosen("", replaced(), false);
    assert_eq!(profile, (Some(Reason::ProfileNotFound), Some(Transfer::Backup)));
    let none = || berth_api::Overrides {
        no_profiles: true,
        ..Default::default()
    };
    assert_eq!(chosen("", none(), false).0, Some(Reason::ProfileNotFound));
    assert_eq!(
        chosen("", replaced(), true),
        (None, Some(Transfer::Pull)),
        "it begins anew"
    );
    // nothing can be left out of a backup, not even what is taken off afterwards
    let removed = || berth_api::Overrides {
        remove_config: vec!["security.devlxd".into()],
        ..replaced()
    };
    let refused = chosen("security.devlxd", removed(), false);
    assert_eq!(refused.0, Some(Reason::BackupNotReadable));
    assert_eq!(chosen("security.devlxd", removed(), true), (None, Some(Transfer::Pull)));
}

#[test]
fn a_backup_is_refused_where_it_cannot_be_made_read_or_kept() {
    let refused = |change: &dyn Fn(&mut berth_core::plan::World)| {
        let mut w = world([("rack-a", server("a", [instance("web")])), ("rack-b", server("b", []))]);
        w.scratch = true;
        change(&mut w);
        let mut d = desired("web", "rack-b");
        d.spec.transfer = berth_api::TransferMode::Backup;
        let verdict = plan(&d, &w, now());
        if let Decision::Blocked(blockers) = &verdict.decision {
            assert!(blockers.iter().all(|b| b.fix.is_some()), "{blockers:?}");
        }
        reason(&verdict.decision)
    };
    fn facts<'a>(w: &'a mut berth_core::plan::World, server: &str) -> &'a mut berth_core::model::ServerFacts {
        let view = w.servers.get_mut(server).unwrap();
        std::sync::Arc::make_mut(view.facts.as_mut().unwrap())
    }
    assert_eq!(refused(&|_| {}), None);
    let lxd = |w: &mut berth_core::plan::World| facts(w, "rack-b").product = berth_core::model::Product::Lxd;
    assert_eq!(refused(&lxd), Some(Reason::BackupNotReadable));
    assert_eq!(refused(&|w| w.scratch = false), Some(Reason::MethodImpossible));
    let streams = |w: &mut berth_core::plan::World| {
        w.scratch = false;
        facts(w, "rack-a").extensions.insert("direct_backup".into());
    };
    assert_eq!(refused(&streams), None);
    let restricted = |w: &mut berth_core::plan::World| {
        let config = &mut facts(w, "rack-a").projects[0].config;
        config.insert("restricted".into(), "true".into());
    };
    assert_eq!(refused(&restricted), Some(Reason::RestrictedBackups));
    let allowed = |w: &mut berth_core::plan::World| {
        restricted(w);
        let config = &mut facts(w, "rack-a").projects[0].config;
        config.insert("restricted.backups".into(), "allow".into());
    };
    assert_eq!(refused(&allowed), None);
}

#[test]
fn a_backup_of_lxd_without_its_snapshots_is_refused_where_incus_would_miss_them() {
    let refused = |snapshots: Vec<berth_core::model::Snapshot>| {
        let mut w = world([("rack-a", server("a", [instance("web")])), ("rack-b", server("b", []))]);
        w.scratch = true;
        let source = w.servers.get_mut("rack-a").unwrap().facts.as_mut().unwrap();
        std::sync::Arc::make_mut(source).product = berth_core::model::Product::Lxd;
        w.contents = Some(berth_core::model::Contents {
            snapshots,
            ..Default::default()
        });
        let mut d = desired("web", "rack-b");
        d.spec.transfer = berth_api::TransferMode::Backup;
        d.spec.snapshots = berth_api::Snapshots::Exclude;
        reason(&plan(&d, &w, now()).decision)
    };
    let snapshot = berth_core::model::Snapshot {
        name: "s0".into(),
        created_at: "2026-01-01T00:00:00Z".into(),
        expires_at: None,
        config: Default::default(),
    };
    assert_eq!(refused(vec![snapshot]), Some(Reason::BackupNotReadable));
    assert_eq!(refused(Vec::new()), None, "there are none to miss");
}
