//! The way of the data: the one that is asked for, or with `Auto` the first of pull, push, relay and backup that the two
//! servers allow, unless another one is known to work between them. A way on which one did not reach the other is passed over.

use berth_api::{Location, Reason, Snapshots, Transfer, TransferMode};

use super::world::{Desired, Located, ServerView, World};
use super::{Blocker, Reach, dropped};
use crate::model::{Capability, Product, Project, ServerFacts};

/// In the order in which they are tried.
const ORDER: [Transfer; 4] = [Transfer::Pull, Transfer::Push, Transfer::Relay, Transfer::Backup];

/// Two servers and what goes from one to the other.
pub(super) struct Road<'a> {
    pub desired: &'a Desired,
    pub located: &'a Located,
    pub source: &'a ServerView,
    pub target: &'a ServerView,
    pub facts: &'a ServerFacts,
    pub to: &'a Location,
    pub world: &'a World,
}

/// The way of the data, and what stands against it.
pub(super) fn choose(road: &Road<'_>, blockers: &mut Vec<Blocker>) -> Transfer {
    let wanted = match road.desired.spec.transfer {
        TransferMode::Auto => return road.best(),
        TransferMode::Pull => Transfer::Pull,
        TransferMode::Push => Transfer::Push,
        TransferMode::Relay => Transfer::Relay,
        TransferMode::Backup => Transfer::Backup,
    };
    if wanted == Transfer::Backup {
        blockers.extend(road.against_backup());
    }
    wanted
}

impl Road<'_> {
    fn best(&self) -> Transfer {
        let order: Vec<Transfer> = ORDER.into_iter().filter(|w| self.allows(*w)).collect();
        let known = self.target.ways.get(&self.located.server);
        let last = self.last_failure();
        let failed = |way: &Transfer| {
            known.is_some_and(|k| k.failed.contains(way))
                // after a restart only the last attempt is known: those before it were tried, too
                || known.is_none() && last.is_some_and(|l| rank(*way) <= rank(l))
        };
        let worked = known.and_then(|k| k.worked).filter(|w| order.contains(w) && !failed(w));
        let next = || order.iter().copied().find(|w| !failed(w));
        // where nothing is left, it begins anew after the last one
        let anew = || {
            let after = order.iter().copied().find(|w| last.is_some_and(|l| rank(*w) > rank(l)));
            after.or(order.first().copied())
        };
        worked.or_else(next).or_else(anew).unwrap_or(Transfer::Pull)
    }

    /// Whether the two servers allow it. Restricted projects of newer Incus refuse to pull (fact sheet 1.3).
    fn allows(&self, way: Transfer) -> bool {
        let restricted = self.facts.project(&self.to.project).is_some_and(Project::restricted);
        let source = self.source.facts.as_deref();
        match way {
            Transfer::Pull => !(restricted && self.facts.can(Capability::Push)),
            Transfer::Push => source.is_some_and(|s| s.can(Capability::Push)) && self.facts.can(Capability::Push),
            Transfer::Relay => self.facts.can(Capability::Push),
            // the running state is in no backup
            Transfer::Backup => self.against_backup().is_empty() && !self.live(),
            Transfer::Internal => false,
        }
    }

    fn live(&self) -> bool {
        let first = self.desired.spec.methods.first();
        first == Some(&berth_api::Method::Live) && self.desired.spec.methods.len() == 1
    }

    /// The way of the last attempt, if it was undone because one server did not reach the other.
    fn last_failure(&self) -> Option<Transfer> {
        let last = self.world.last_attempt()?;
        let same = last.spec.from.server == self.located.server && last.spec.to.server == self.to.server;
        let undone = last.status.undo.as_ref().filter(|_| last.finished() && same)?;
        (undone.reason == Reason::PeerUnreachable.as_str()).then_some(last.spec.transfer)
    }

    fn against_backup(&self) -> Vec<Blocker> {
        let mut against = Vec::new();
        let (from, to) = (&self.located.server, &self.to.server);
        let Some(source) = self.source.facts.as_deref() else {
            return against;
        };
        if source.product == Product::Incus && self.facts.product == Product::Lxd {
            let message = format!("{to} is LXD and cannot read a backup that Incus made on {from}");
            let fix = "set spec.transfer: Auto".to_owned();
            against.push(Blocker::new(Reason::BackupNotReadable, message, Some(fix)));
        }
        against.extend(self.unreadable());
        against.extend(self.half_told(source));
        against.extend(self.profiles_looked_for());
        let project = source.project(&self.located.at().project);
        let refuses = |p: &&Project| p.restricted() && p.config.get("restricted.backups").is_none_or(|v| v != "allow");
        if let Some(project) = project.filter(refuses) {
            let message = format!("project {} of {from} is restricted and refuses backups", project.name);
            let cli = source.product.cli();
            let fix = format!("on {from}: {cli} project set {} restricted.backups=allow", project.name);
            against.push(Blocker::new(Reason::RestrictedBackups, message, Some(fix)));
        }
        if !self.world.scratch && !source.can(Capability::DirectBackup) && self.source.reach == Reach::Ready {
            let message =
                format!("{from} cannot stream a backup and the controller has no scratch folder to keep one in");
            let fix = "start the controller with --scratch-dir (in the chart: scratch.enabled=true)".to_owned();
            against.push(Blocker::new(Reason::MethodImpossible, message, Some(fix)));
        }
        against
    }

    /// An import takes the whole of a backup or nothing: no key can be left out of it, not even one that is taken off later.
    fn unreadable(&self) -> Option<Blocker> {
        let unknown = dropped::unknown_there(self.located, self.facts, self.world);
        let key = unknown.first()?;
        let (from, to, at) = (&self.located.server, &self.to.server, self.located.at());
        let message = format!(
            "{to} runs {} {}, which does not know {} of {at}, and from a backup nothing can be left out",
            self.facts.product.as_str(),
            self.facts.version,
            unknown.join(", ")
        );
        let cli = self.source.facts.as_ref().map_or("incus", |f| f.product.cli());
        let unset = format!("{cli} config unset --project {} {} {key}", at.project, at.name);
        let fix = format!("set spec.transfer: Auto; or on {from}, if it is not needed: {unset}");
        Some(Blocker::new(Reason::BackupNotReadable, message, Some(fix)))
    }

    /// LXD lists an instance's snapshots even in a backup without them, and the import of Incus counts them (*seen*: `Snapshot
    /// count in backup config (2) and storage device (0) are different`).
    fn half_told(&self, source: &ServerFacts) -> Option<Blocker> {
        let snapshots = &self.world.contents.as_ref()?.snapshots;
        let across = source.product == Product::Lxd && self.facts.product == Product::Incus;
        if !across || self.desired.spec.snapshots != Snapshots::Exclude || snapshots.is_empty() {
            return None;
        }
        let (from, to, at) = (&self.located.server, &self.to.server, self.located.at());
        let message =
            format!("{from} is LXD, which lists the snapshots of {at} in a backup without them, and {to} refuses that");
        let fix = "set spec.snapshots: Include, or spec.transfer: Auto".to_owned();
        Some(Blocker::new(Reason::BackupNotReadable, message, Some(fix)))
    }

    /// An import looks for the profiles that the instance has, whatever it is to have afterwards. Those that it is to have
    /// are looked for in any case.
    fn profiles_looked_for(&self) -> Vec<Blocker> {
        let overrides = &self.desired.spec.overrides;
        let (to, project) = (&self.to.server, &self.to.project);
        let replaced = overrides.no_profiles || !overrides.profiles.is_empty();
        if !replaced || self.facts.project(project).is_none() {
            return Vec::new();
        }
        let profiles = self.located.instance.profiles.iter();
        let missing = profiles.filter(|p| {
            let reported = !overrides.no_profiles && overrides.profiles.contains(p);
            !reported && self.facts.profile(project, p).is_none()
        });
        let refused = missing.map(|profile| {
            let message = format!(
                "{to} has no profile {profile} in project {project}, which an import of {} looks for although spec.overrides replaces it",
                self.located.at()
            );
            let cli = self.facts.product.cli();
            let fix = format!("on {to}: {cli} profile create {profile} --project {project}, or set spec.transfer: Auto");
            Blocker::new(Reason::ProfileNotFound, message, Some(fix))
        });
        refused.collect()
    }
}

fn rank(way: Transfer) -> usize {
    ORDER.iter().position(|w| *w == way).unwrap_or(ORDER.len())
}
