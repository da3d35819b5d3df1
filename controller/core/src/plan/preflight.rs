//! Where exactly an instance would go, and what makes that impossible: found out from facts in hand, before anything is
//! touched, everything at once.

use std::collections::BTreeSet;

use berth_api::{Location, Overrides, Reason, present};

use super::Blocker;
use super::build::from_location;
use super::world::{Desired, Located, ServerView};
use crate::marks::{self, Role};
use crate::model::{Device, Instance, InstanceKind, InstanceRef, Member, MemberStatus, Project, ServerFacts};

/// Resolves the target of a placement, and collects what stands against it.
pub(super) fn destination(
    desired: &Desired,
    located: &Located,
    view: &ServerView,
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
        internal,
        blockers,
    };
    let project = present(&target.project).unwrap_or(&here.project).to_owned();
    let name = desired.target_name().to_owned();
    check.server();
    check.honoured();
    check.overrides();
    check.project(&project);
    let member = check.member(&here);
    check.instance();
    check.name(&project, &name);
    let pool = check.pool(&project);
    if !internal {
        check.profiles(&project);
        check.networks(&project);
    }
    Location {
        server: target.server.clone(),
        member,
        project,
        pool,
        name,
    }
}

struct Check<'a> {
    desired: &'a Desired,
    located: &'a Located,
    facts: &'a ServerFacts,
    view: &'a ServerView,
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
        if self.view.cordoned && !self.internal {
            let (server, namespace) = (self.server_name().to_owned(), &self.desired.namespace);
            let fix = format!(
                "kubectl patch isrv -n {namespace} {server} --type merge -p '{{\"spec\":{{\"cordoned\":false}}}}'"
            );
            self.refuse(
                Reason::TargetCordoned,
                format!("{server} is cordoned: no instance may be moved there"),
                fix,
            );
        }
    }

    /// What this version cannot honour is refused rather than ignored.
    fn honoured(&mut self) {
        if !self.desired.spec.keep_source.is_zero() && !self.internal {
            let message = "spec.keepSource is not part of this version of Berth".to_owned();
            self.refuse(Reason::MethodImpossible, message, "remove spec.keepSource".to_owned());
        }
    }

    /// Overrides that would make a namespace's user root on the host.
    fn overrides(&mut self) {
        if self.view.allow_unsafe_overrides {
            return;
        }
        let reaching = reaching_into_host(&self.desired.spec.overrides);
        if reaching.is_empty() {
            return;
        }
        let (server, namespace) = (self.server_name().to_owned(), &self.desired.namespace);
        let message = format!(
            "spec.overrides reaches into the host of {server}: {}",
            reaching.join(", ")
        );
        let fix = format!(
            "kubectl patch isrv -n {namespace} {server} --type merge -p '{{\"spec\":{{\"allowUnsafeOverrides\":true}}}}'"
        );
        self.refuse(Reason::InvalidSpec, message, fix);
    }

    fn project(&mut self, project: &str) {
        if self.facts.project(project).is_none() {
            let message = format!(
                "{} has no project {project} (or this certificate may not see it)",
                self.server_name()
            );
            let fix = self.cli(&format!("project create {project}"));
            self.refuse(Reason::ProjectNotFound, message, fix);
            return;
        }
        if !self.internal && self.facts.project(project).is_some_and(Project::restricted) {
            let server = self.server_name();
            let message = format!(
                "project {project} of {server} is restricted: it strips the instance's uuid and addresses, so the copy would not be the same instance"
            );
            let fix = self.cli(&format!(
                "project set {project} restricted=false, or choose another spec.target.project"
            ));
            self.refuse(Reason::ProjectRestricted, message, fix);
        }
    }

    /// The member to go to. A group is resolved to one of its members: the one that holds the fewest instances.
    fn member(&mut self, here: &Location) -> Option<String> {
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

    fn named_member(&mut self, name: &str) -> Option<String> {
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

    fn member_of(&mut self, group: &str, here: &Location) -> Option<String> {
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

    fn instance(&mut self) {
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
        if !can {
            let message = format!(
                "{} cannot hold a {}",
                self.server_name(),
                self.located.instance.kind.as_str()
            );
            self.refuse(Reason::MethodImpossible, message, None);
        }
    }

    fn architecture(&mut self, there: &str) {
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

    fn name(&mut self, project: &str, name: &str) {
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
        if itself || marks::role(other) == Some(Role::Retired) {
            return;
        }
        let message = format!("{} has another instance {at}", self.server_name());
        let fix = format!(
            "set spec.target.name, or {}",
            self.cli(&format!("rename {name} NEW-NAME --project {project}"))
        );
        self.refuse(Reason::NameTaken, message, fix);
    }

    /// The pool of the root disk: the declared one, else one of the same name, else what the target's profiles say.
    fn pool(&mut self, project: &str) -> Option<String> {
        let declared = present(&self.desired.spec.target.pool);
        if let Some(pool) = declared {
            if self.facts.pool(pool).is_none() {
                self.no_pool(pool);
            }
            return Some(pool.to_owned());
        }
        let current = self.located.instance.root_pool().map(str::to_owned);
        if self.internal || current.as_deref().is_some_and(|p| self.facts.pool(p).is_some()) {
            return current;
        }
        let profiles = self.profiles_there();
        let from_profile = profiles
            .iter()
            .rev()
            .filter_map(|p| self.facts.profile(project, p))
            .find_map(|p| {
                let root = p.devices.values().find(|d| d.get("path").is_some_and(|p| p == "/"));
                root.and_then(|d| d.get("pool")).cloned()
            });
        if from_profile.is_none() {
            self.no_pool(current.as_deref().unwrap_or("default"));
        }
        from_profile
    }

    fn no_pool(&mut self, pool: &str) {
        let names: Vec<String> = self
            .facts
            .pools
            .iter()
            .map(|p| format!("{} ({})", p.name, p.driver))
            .collect();
        let message = format!("{} has no storage pool {pool}", self.server_name());
        self.refuse(
            Reason::PoolNotFound,
            message,
            format!("set spec.target.pool to one of {}", names.join(", ")),
        );
    }

    fn profiles_there(&self) -> Vec<String> {
        let o = &self.desired.spec.overrides;
        match (o.no_profiles, o.profiles.is_empty()) {
            (true, _) => Vec::new(),
            (false, false) => o.profiles.clone(),
            (false, true) => self.located.instance.profiles.clone(),
        }
    }

    fn profiles(&mut self, project: &str) {
        if self.facts.project(project).is_none() {
            return;
        }
        for profile in self.profiles_there() {
            if self.facts.profile(project, &profile).is_none() {
                let message = format!("{} has no profile {profile} in project {project}", self.server_name());
                let fix = format!(
                    "{}, or set spec.overrides.profiles",
                    self.cli(&format!("profile create {profile} --project {project}"))
                );
                self.refuse(Reason::ProfileNotFound, message, fix);
            }
        }
    }

    /// The networks that the instance's own devices name; those of its profiles are the target's own affair.
    fn networks(&mut self, project: &str) {
        for network in networks(&self.located.instance, self.desired) {
            if !self.facts.networks.iter().any(|n| n.name == network) {
                let message = format!("{} has no network {network}", self.server_name());
                let fix = format!(
                    "{}, or set spec.overrides.devices",
                    self.cli(&format!("network create {network} --project {project}"))
                );
                self.refuse(Reason::NetworkNotFound, message, fix);
            }
        }
    }
}

/// Which overrides reach into the host (design "rules", Overrides).
fn reaching_into_host(overrides: &Overrides) -> Vec<String> {
    let key = |k: &&String| k.starts_with("raw.") || ["security.privileged", "security.nesting"].contains(&k.as_str());
    let device = |d: &Device| {
        let value = |k: &str| d.get(k).map_or("", String::as_str);
        match value("type") {
            "disk" => value("source").starts_with('/'),
            "nic" => matches!(value("nictype"), "physical" | "sriov"),
            "gpu" | "usb" | "pci" | "infiniband" | "proxy" => true,
            other => other.starts_with("unix-"),
        }
    };
    let keys = overrides.config.keys().filter(key).cloned();
    let devices = overrides
        .devices
        .iter()
        .filter(|(_, d)| device(d))
        .map(|(name, _)| format!("device {name}"));
    keys.chain(devices).collect()
}

fn networks(i: &Instance, desired: &Desired) -> BTreeSet<String> {
    let o = &desired.spec.overrides;
    let stays = i
        .devices
        .iter()
        .filter(|(name, _)| !o.devices.contains_key(*name) && !o.remove_devices.contains(name));
    stays
        .chain(&o.devices)
        .filter_map(|(_, d)| d.get("network").cloned())
        .collect()
}
