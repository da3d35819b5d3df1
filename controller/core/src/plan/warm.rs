//! What keeps an instance from being moved warm: every unmet condition at once, each with the way to meet it.

use berth_api::placement::Rejected;
use berth_api::{Method, Reason, Snapshots, Transfer};

use super::lessons::REMEMBERED;
use super::methods::{Case, rejection};
use crate::model::{Capability, InstanceKind, Pool, Product};
use crate::moves::rounds::Way;

const COLD: &str = "add Cold to spec.methods to allow a longer stop";

/// The unmet conditions of a warm move; none: it is possible.
pub(super) fn unmet(case: &Case<'_>) -> Vec<Rejected> {
    let mut unmet = Vec::new();
    let mut add = |reason: Reason, message: String, fix: String| {
        unmet.push(rejection(Method::Warm, reason, message, Some(fix)));
    };
    if case.transfer == Transfer::Internal {
        let message = "inside one server or cluster the server moves a stopped instance itself".to_owned();
        add(Reason::MethodImpossible, message, COLD.to_owned());
        return unmet;
    }
    if case.transfer == Transfer::Backup {
        let message = "a backup is of the whole instance, so nothing less can be sent after the stop".to_owned();
        add(Reason::MethodImpossible, message, "set spec.transfer: Auto".to_owned());
    }
    let Some(source) = case.source.facts.as_deref() else {
        return unmet;
    };
    for (name, facts) in [(&case.located.server, source), (&case.to.server, case.target)] {
        if !facts.can(Capability::IncrementalCopy) {
            let message = format!(
                "{name} cannot bring a copy up to date (no {})",
                Capability::IncrementalCopy.extension()
            );
            add(Reason::MethodImpossible, message, format!("upgrade {name}, or {COLD}"));
        }
    }
    let Some(way) = case.way() else {
        let message = "the pools that it is to be copied between are not known".to_owned();
        add(Reason::MethodImpossible, message, "set spec.target.pool".to_owned());
        return unmet;
    };
    let i = &case.located.instance;
    let (from, to) = (i.root_pool().unwrap_or("?"), case.to.pool.as_deref().unwrap_or("?"));
    if i.kind == InstanceKind::VirtualMachine && way != Way::Snapshots {
        let message = format!(
            "between pool {from} of {} and pool {to} of {} the guest of a virtual machine stands still while it is copied, and every round sends the whole disk",
            case.located.server, case.to.server
        );
        let cow = source.pool(from).is_some_and(Pool::copy_on_write);
        let fix = match cow {
            true => format!("set spec.target.pool to one with the driver of {from}, or {COLD}"),
            false => format!(
                "{COLD}; from a copy-on-write pool (btrfs, zfs) to one of the same driver it could be moved warm"
            ),
        };
        add(Reason::GuestFrozen, message, fix);
        return unmet;
    }
    if way != Way::Compare {
        snapshots(case, way, &mut add);
    }
    let lesson = case.lesson();
    if let Some((at, words)) = lesson
        .not_incremental
        .filter(|(at, _)| case.now.duration_since(*at) < REMEMBERED)
    {
        let at = at.round(jiff::Unit::Second).unwrap_or(at);
        add(
            Reason::NotIncremental,
            format!("a move found at {at}: {words}"),
            COLD.to_owned(),
        );
    }
    unmet
}

/// What forbids the snapshots that the rounds need.
fn snapshots(case: &Case<'_>, way: Way, add: &mut impl FnMut(Reason, String, String)) {
    let Some(source) = case.source.facts.as_deref() else {
        return;
    };
    let (server, project) = (&case.located.server, &case.located.at().project);
    let refused = source
        .project(project)
        .filter(|p| p.restricted())
        .is_some_and(|p| p.config.get("restricted.snapshots").is_none_or(|v| v != "allow"));
    if refused {
        let message =
            format!("project {project} of {server} is restricted and refuses the snapshots that a warm move needs");
        let fix = format!(
            "on {server}: {} project set {project} restricted.snapshots=allow",
            source.product.cli()
        );
        add(Reason::RestrictedSnapshots, message, fix);
    }
    if way != Way::Snapshots {
        return;
    }
    if case.desired.spec.snapshots == Snapshots::Exclude {
        let message =
            "these pools send differences between snapshots, which spec.snapshots: Exclude leaves out".to_owned();
        add(
            Reason::MethodImpossible,
            message,
            "set spec.snapshots: Include".to_owned(),
        );
    }
    if source.product == Product::Incus && case.target.product == Product::Lxd {
        let message = format!(
            "the snapshots that a warm move needs cannot travel from Incus to LXD: {} refuses the keys of a running instance in them",
            case.to.server
        );
        add(Reason::SnapshotsCannotTravel, message, COLD.to_owned());
    }
}
