//! Where exactly an instance would go, and what makes that impossible: found out from facts in hand, before anything is
//! touched, everything at once.

mod contents;
mod devices;
mod notes;
mod place;
mod space;

use berth_api::{Location, Reason};
pub(super) use notes::notes;
pub(super) use space::{filled, space};

use super::Blocker;
use super::build::from_location;
use super::world::{Desired, Located, ServerView, World};
use crate::model::ServerFacts;
use crate::overrides::Adaptation;
use crate::records::Record;

/// Resolves the target of a placement, and collects what stands against it.
pub(super) fn destination(
    desired: &Desired,
    located: &Located,
    (view, world): (&ServerView, &World),
    internal: bool,
    blockers: &mut Vec<Blocker>,
) -> Location {
    let here = from_location(located);
    let Some(facts) = view.facts.as_deref() else {
        return here;
    };
    let target = &desired.spec.target;
    let mut check = Check {
        desired,
        located,
        facts,
        view,
        kept: &world.kept,
        open_moves: &world.open_moves,
        internal,
        blockers,
    };
    let project = desired.target_project(&located.instance).to_owned();
    let name = desired.target_name().to_owned();
    check.server();
    check.overrides();
    check.device_types();
    check.project(&project);
    let member = check.member(&here);
    check.instance();
    check.name(&project, &name);
    let pool = check.pool(&project);
    if !internal {
        check.profiles(&project);
        check.networks(&project);
        check.parents();
    }
    if !internal || member != here.member {
        check.host_devices();
    }
    Location {
        server: target.server.clone(),
        member,
        project,
        pool,
        name,
    }
}

/// What stands against a change where the instance is.
pub(super) fn in_place(desired: &Desired, located: &Located, view: &ServerView, change: &Adaptation) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    let Some(facts) = view.facts.as_deref().filter(|_| !change.is_empty()) else {
        return blockers;
    };
    let mut check = Check {
        desired,
        located,
        facts,
        view,
        kept: &[],
        open_moves: &[],
        internal: true,
        blockers: &mut blockers,
    };
    let project = &located.at().project;
    check.overrides();
    check.device_types();
    if change.profiles.is_some() {
        check.profiles(project);
    }
    if !change.devices.is_empty() {
        check.networks(project);
    }
    blockers
}

struct Check<'a> {
    desired: &'a Desired,
    located: &'a Located,
    facts: &'a ServerFacts,
    view: &'a ServerView,
    kept: &'a [Record],
    open_moves: &'a [String],
    internal: bool,
    blockers: &'a mut Vec<Blocker>,
}

impl Check<'_> {
    fn refuse(&mut self, reason: Reason, message: String, fix: impl Into<Option<String>>) {
        self.blockers.push(Blocker::new(reason, message, fix.into()));
    }

    fn server_name(&self) -> &str {
        &self.desired.spec.target.server
    }

    fn cli(&self, rest: &str) -> String {
        format!("on {}: {} {rest}", self.server_name(), self.facts.product.cli())
    }

    fn server(&mut self) {
        if !self.view.cordoned || self.internal {
            return;
        }
        let server = self.server_name().to_owned();
        let own = [(self.desired.namespace.clone(), server.clone())];
        let by = match self.view.cordoned_by.as_slice() {
            [] => &own[..],
            by => by,
        };
        let fix: Vec<String> = by
            .iter()
            .map(|(namespace, name)| {
                format!(
                    "kubectl patch isrv -n {namespace} {name} --type merge -p '{{\"spec\":{{\"cordoned\":false}}}}'"
                )
            })
            .collect();
        let message = format!("{server} is cordoned: no instance may be moved there");
        self.refuse(Reason::TargetCordoned, message, fix.join("; "));
    }
}
