//! The place that an instance would take: project, member or group, architecture, name.

use berth_api::{Location, Reason, present};

use super::Check;
use crate::marks::{self, Role};
use crate::model::{Instance, InstanceKind, InstanceRef, Member, MemberStatus};
use crate::moves::is_kept;

impl Check<'_> {
    pub(super) fn project(&mut self, project: &str) {
        if self.facts.project(project).is_none() {
            let message = format!(
                "{} has no project {project} (or this certificate may not see it)",
                self.server_name()
            );
            let fix = self.cli(&format!("project create {project}"));
            self.refuse(Reason::ProjectNotFound, message, fix);
            return;
        }
        if !self.internal || self.located.at().project != project {
            self.keeps_identity(project);
        }
    }

    /// Servers strip `volatile.*` from what comes into a project with restrictions or limits, also from another project of
    /// their own.
    fn keeps_identity(&mut self, project: &str) {
        let Some(there) = self.facts.project(project) else {
            return;
        };
        let cli = self.facts.product.cli();
        let mut fixes: Vec<String> = there
            .limits()
            .map(|key| format!("{cli} project unset {project} {key}"))
            .collect();
        let what = match (there.restricted(), fixes.is_empty()) {
            (false, true) => return,
            (true, true) => "is restricted",
            (false, false) => "has limits",
            (true, false) => "is restricted and has limits",
        };
        if there.restricted() {
            fixes.push(format!("{cli} project set {project} restricted=false"));
        }
        let server = self.server_name();
        let message = format!(
            "project {project} of {server} {what}: it strips the instance's uuid and addresses, so the copy would not be the same instance"
        );
        let fix = format!(
            "on {server}: {}, or choose another spec.target.project",
            fixes.join("; ")
        );
        self.refuse(Reason::ProjectRestricted, message, fix);
    }

    /// The member to go to. A group is resolved to one of its members: the one that holds the fewest instances.
    pub(super) fn member(&mut self, here: &Location) -> Option<String> {
        let target = &self.desired.spec.target;
        let wanted = (present(&target.member), present(&target.group));
        if wanted == (None, None) {
            return if self.internal { here.member.clone() } else { None };
        }
        if !self.facts.clustered {
            let what = wanted.0.or(wanted.1).unwrap_or_default();
            let message = format!(
                "{} is no cluster, so it has no member or group {what}",
                self.server_name()
            );
            self.refuse(
                Reason::MemberNotFound,
                message,
                "remove spec.target.member and spec.target.group".to_owned(),
            );
            return None;
        }
        match wanted {
            (Some(name), _) => self.named_member(name),
            (None, Some(group)) => self.member_of(group, here),
            (None, None) => None,
        }
    }

    pub(super) fn named_member(&mut self, name: &str) -> Option<String> {
        let names: Vec<&str> = self.facts.members.iter().map(|m| m.name.as_str()).collect();
        let Some(member) = self.facts.member(name) else {
            let message = format!("{} has no member {name}", self.server_name());
            self.refuse(
                Reason::MemberNotFound,
                message,
                format!("its members are {}", names.join(", ")),
            );
            return None;
        };
        if member.status != MemberStatus::Online {
            let message = format!("member {name} of {} is {}", self.server_name(), member.status.as_str());
            let fix = self.cli(&format!("cluster restore {name}"));
            self.refuse(Reason::MemberOffline, message, fix);
        }
        self.architecture(&member.architecture.clone());
        Some(name.to_owned())
    }

    pub(super) fn member_of(&mut self, group: &str, here: &Location) -> Option<String> {
        if !self.facts.groups.iter().any(|g| g == group) {
            let message = format!("{} has no group {group}", self.server_name());
            self.refuse(
                Reason::GroupNotFound,
                message,
                format!("its groups are {}", self.facts.groups.join(", ")),
            );
            return None;
        }
        let fits = |m: &&Member| {
            m.status == MemberStatus::Online
                && m.groups.iter().any(|g| g == group)
                && m.architecture == self.located.instance.architecture
        };
        let count = |m: &&Member| {
            let instances = self.view.instances.as_ref();
            let held = instances.map_or(0, |all| {
                all.iter().filter(|i| i.member.as_deref() == Some(&m.name)).count()
            });
            // where it is already, it stays
            (
                !(self.internal && here.member.as_deref() == Some(&m.name)),
                held,
                m.name.clone(),
            )
        };
        let best = self
            .facts
            .members
            .iter()
            .filter(fits)
            .min_by_key(count)
            .map(|m| m.name.clone());
        if best.is_none() {
            let message = format!(
                "no member of group {group} of {} is online with this architecture",
                self.server_name()
            );
            self.refuse(Reason::MemberOffline, message, None);
        }
        best
    }

    pub(super) fn instance(&mut self) {
        if !self.internal && !self.facts.clustered {
            let architectures = self.facts.architectures.clone();
            if !architectures.contains(&self.located.instance.architecture) {
                self.architecture(&architectures.first().cloned().unwrap_or_default());
            }
        }
        let can = match self.located.instance.kind {
            InstanceKind::Container => self.facts.containers,
            InstanceKind::VirtualMachine => self.facts.virtual_machines,
        };
        self.saved_state();
        if !can {
            let message = format!(
                "{} cannot hold a {}",
                self.server_name(),
                self.located.instance.kind.as_str()
            );
            self.refuse(Reason::MethodImpossible, message, None);
        }
    }

    /// Memory that was saved with a stateful stop stays on its server: only a cluster moves it with the disk.
    fn saved_state(&mut self) {
        let (i, server) = (&self.located.instance, &self.located.server);
        if !i.stateful || i.may_run() || self.internal {
            return;
        }
        let (at, cli) = (&i.at, self.facts.product.cli());
        let name = format!("{server}:{} --project {}", at.name, at.project);
        let message = format!("{at} holds a saved running state, which would stay behind on {server}");
        let fix = format!(
            "go on from it first: {cli} start {name}; or give it up: {cli} start --stateless {name} && {cli} stop {name}"
        );
        self.refuse(Reason::MethodImpossible, message, fix);
    }

    pub(super) fn architecture(&mut self, there: &str) {
        let have = &self.located.instance.architecture;
        if have != there {
            let message = format!(
                "{} is for {have}, {} runs {there}",
                self.located.at(),
                self.server_name()
            );
            self.refuse(Reason::ArchitectureMismatch, message, None);
        }
    }

    /// A kept source makes room, or becomes the copy; not one that somebody used, or whose record is gone.
    fn retired(&mut self, other: &Instance) {
        let goes = marks::move_id(other).is_some_and(|id| self.open_moves.iter().any(|o| o == id));
        if !self.internal && (goes || self.kept.iter().any(|r| is_kept(r, other))) {
            return;
        }
        let (server, at) = (self.server_name(), &other.at);
        let message = format!(
            "{server} has {at}, the source of an earlier move, which is not Berth's to delete: somebody used it, or the record of that move is gone"
        );
        let rest = format!("delete --force {} --project {}", at.name, at.project);
        let fix = format!("if nothing of it is needed, {}", self.cli(&rest));
        self.refuse(Reason::NameTaken, message, fix);
    }

    pub(super) fn name(&mut self, project: &str, name: &str) {
        if !marks::valid_name(name) {
            let message = format!(
                "{name} is no valid instance name: letters, digits and dashes, at most 63, beginning with a letter"
            );
            self.refuse(Reason::InvalidSpec, message, "set spec.target.name".to_owned());
            return;
        }
        let at = InstanceRef::new(project, name);
        let Some(other) = self.view.instances.as_ref().and_then(|all| all.get(&at)) else {
            return;
        };
        let itself = self.internal && other.uuid() == self.located.instance.uuid();
        if itself {
            return;
        }
        if marks::role(other) == Some(Role::Retired) {
            self.retired(other);
            return;
        }
        let message = format!("{} has another instance {at}", self.server_name());
        let fix = format!(
            "set spec.target.name, or {}",
            self.cli(&format!("rename {name} NEW-NAME --project {project}"))
        );
        self.refuse(Reason::NameTaken, message, fix);
    }
}
