//! Moves inside one server or cluster: member, pool, project and name, in the phases in which the daemons make them, so
//! that one that dies in between leaves what it was seen to leave (`move-of-…`).

use berth_core::marks;
use berth_core::model::{InstanceRef, MemberStatus, Product};
use berth_core::server::{FailureKind, OperationId, Relocation, ServerError};
use jiff::Timestamp;

use crate::config;
use crate::operations::{Due, Work};
use crate::state::{Answered, Busy, Content, Host, State};

/// How far a move inside the server is.
#[derive(Clone, Debug)]
pub(crate) struct Phase {
    born: u64,
    to: Relocation,
    /// Started again afterwards (LXD stops and starts by itself).
    restart: bool,
    /// The copy on the other pool or in the other project, once it exists.
    copy: Option<u64>,
    next: Next,
}

#[derive(Clone, Copy, Debug)]
enum Next {
    Rename,
    Copy,
    DropSource,
    NameCopy,
    Member,
    Done,
}

impl State {
    pub fn relocate(
        &mut self,
        server: &str,
        at: &InstanceRef,
        to: &Relocation,
        by: Option<&str>,
        what: &str,
    ) -> Answered<OperationId> {
        let i = self.inst(server, at, what)?.clone();
        let host = self.host(server, what)?;
        let mut to = without_what_is_ignored(host, to);
        if let Some(why) = refused(host, at, &to, i.runs()) {
            return Err(ServerError::new(FailureKind::Refused, what, why));
        }
        if let Some(busy) = &i.busy {
            let why = format!("Instance is busy running a \"{}\" operation", busy.action);
            return Err(ServerError::new(FailureKind::Busy, what, why));
        }
        if to.member.is_some() {
            let refused = |why: String| ServerError::new(FailureKind::Refused, what, why);
            to.member = choose_member(host, to.member.as_deref(), i.member.as_deref()).map_err(refused)?;
        }
        let after = host.timing.relocate;
        if let Some(why) = self.stays(server, i.born, false).filter(|_| to.live && i.runs()) {
            return Ok(self.begin_ended(server, "Migrating instance", at, Err(why), by));
        }
        let host = self.host(server, what)?;
        let restart = i.runs() && host.product == Product::Lxd && !to.live;
        if restart {
            self.go_down(server, i.born, by);
        }
        let phase = Phase {
            born: i.born,
            to,
            restart,
            copy: None,
            next: Next::Rename,
        };
        Ok(self.begin_busy(
            server,
            ("Migrating instance", "migrate"),
            at,
            Work::Relocate(Box::new(phase)),
            after,
            by,
        ))
    }

    pub fn relocated(&mut self, server: &str, id: &OperationId, mut phase: Phase, by: Option<&str>) {
        let result = match phase.next {
            Next::Rename => self.phase_rename(server, &mut phase),
            Next::Copy => self.phase_copy(server, id, &mut phase),
            Next::DropSource => {
                self.vanish(server, phase.born, by);
                phase.next = Next::NameCopy;
                Ok(())
            }
            Next::NameCopy => self.phase_name_copy(server, &mut phase),
            Next::Member => {
                let member = phase.to.member.clone();
                let born = phase.copy.unwrap_or(phase.born);
                if let Some(i) = self.inst_by_born(server, born).filter(|_| member.is_some()) {
                    i.member = member;
                }
                phase.next = Next::Done;
                Ok(())
            }
            Next::Done => {
                let born = phase.copy.unwrap_or(phase.born);
                self.end(server, id, Ok(()));
                if phase.restart {
                    self.run(server, born, by);
                }
                return;
            }
        };
        if let Err(why) = result {
            return self.end(server, id, Err(why));
        }
        let after = self.servers.get(server).map(|h| h.timing.relocate).unwrap_or_default();
        if let Some(op) = self.operation_mut(server, id) {
            op.work = Work::Relocate(Box::new(phase));
        }
        self.later(after, Due::Work(server.to_owned(), id.clone()));
    }

    fn phase_rename(&mut self, server: &str, phase: &mut Phase) -> Result<(), String> {
        phase.next = if phase.to.pool.is_some() || phase.to.project.is_some() {
            Next::Copy
        } else {
            Next::Member
        };
        let Some(name) = phase.to.name.clone() else {
            return Ok(());
        };
        let cloud_init = self.fresh_uuid();
        let host = self.servers.get_mut(server).ok_or("no such server")?;
        let at = host.born(phase.born).ok_or("Instance not found")?;
        let to = InstanceRef::new(&at.project, &name);
        if host.instances.contains_key(&to) {
            return Err(format!("Name \"{name}\" already in use"));
        }
        if let Some(mut i) = host.instances.remove(&at) {
            i.config.insert(marks::CLOUD_INIT_ID.to_owned(), cloud_init);
            host.instances.insert(to.clone(), i);
            host.lifecycle(&to, "instance-renamed", None);
        }
        Ok(())
    }

    /// The copy on the other pool, or in the other project.
    fn phase_copy(&mut self, server: &str, id: &OperationId, phase: &mut Phase) -> Result<(), String> {
        let born = self.next();
        let host = self.servers.get_mut(server).ok_or("no such server")?;
        let at = host.born(phase.born).ok_or("Instance not found")?;
        let mut i = host.instances.get(&at).cloned().ok_or("Instance not found")?;
        let project = phase.to.project.clone().unwrap_or_else(|| at.project.clone());
        let name = if project == at.project {
            temporary(host.product, i.uuid())
        } else {
            at.name.clone()
        };
        i.born = born;
        i.last_used_at = Timestamp::UNIX_EPOCH;
        i.busy = Some(Busy {
            action: "create",
            operation: Some(id.clone()),
        });
        if let Some(pool) = &phase.to.pool {
            i.pool.clone_from(pool);
            let (_, devices) = config::expand(host, &at.project, &i);
            if let Some((name, mut root)) = devices.into_iter().find(|(_, d)| config::is_root(d)) {
                root.insert("pool".to_owned(), pool.clone());
                i.devices.insert(name, root);
            }
        }
        let to = InstanceRef::new(project, name);
        if host.instances.contains_key(&to) {
            return Err("This \"Instance\" entry already exists".to_owned());
        }
        if let Some(why) = config::refusal(host, &to.project, None, &i) {
            return Err(format!("Failed creating instance record: {why}"));
        }
        debug_assert_ne!(i.content, Content::HalfMade);
        host.instances.insert(to.clone(), i);
        host.lifecycle(&to, "instance-created", None);
        phase.copy = Some(born);
        phase.next = Next::DropSource;
        Ok(())
    }

    fn phase_name_copy(&mut self, server: &str, phase: &mut Phase) -> Result<(), String> {
        let name = self.operation_name(server, phase);
        let cloud_init = self.fresh_uuid();
        phase.next = Next::Member;
        let host = self.servers.get_mut(server).ok_or("no such server")?;
        let Some(at) = phase.copy.and_then(|born| host.born(born)) else {
            return Err("Instance not found".to_owned());
        };
        let to = InstanceRef::new(&at.project, name);
        if to != at
            && let Some(mut i) = host.instances.remove(&at)
        {
            i.config.insert(marks::CLOUD_INIT_ID.to_owned(), cloud_init);
            host.instances.insert(to.clone(), i);
            host.lifecycle(&to, "instance-renamed", None);
        }
        Ok(())
    }

    /// The name under which the request found the instance, or the one that it asked for.
    fn operation_name(&self, server: &str, phase: &Phase) -> String {
        let of_request = self.servers.get(server).and_then(|h| {
            let works = |w: &Work| matches!(w, Work::Relocate(p) if p.born == phase.born);
            h.operations
                .values()
                .find(|op| works(&op.work))
                .and_then(|op| op.instances.first())
        });
        phase
            .to
            .name
            .clone()
            .or_else(|| of_request.map(|at| at.name.clone()))
            .unwrap_or_default()
    }
}

/// LXD 5.0 looks at one kind of change only: pool, then project, then member.
fn without_what_is_ignored(host: &Host, to: &Relocation) -> Relocation {
    let mut to = to.clone();
    if !host.has("instance_move_config") {
        if to.pool.is_some() {
            (to.project, to.member) = (None, None);
        } else if to.project.is_some() {
            to.member = None;
        }
    }
    to
}

fn refused(host: &Host, at: &InstanceRef, to: &Relocation, runs: bool) -> Option<String> {
    if to.member.is_some() && !host.clustered() {
        return Some("Target only allowed when clustered".to_owned());
    }
    if let Some(p) = to.pool.as_ref().filter(|p| !host.pools.iter().any(|x| x.name == **p)) {
        return Some(format!("Storage pool \"{p}\" not found"));
    }
    if let Some(p) = to.project.as_ref().filter(|p| host.project(p).is_none()) {
        return Some(format!("Project \"{p}\" not found"));
    }
    if let Some(n) = to.name.as_ref().filter(|n| !marks::valid_name(n)) {
        return Some(format!("Invalid instance name \"{n}\""));
    }
    let name = to.name.as_ref().filter(|n| **n != at.name);
    let place = InstanceRef::new(to.project.as_ref().unwrap_or(&at.project), name.unwrap_or(&at.name));
    if place != *at && host.instances.contains_key(&place) {
        return Some(format!("Name \"{}\" already in use", place.name));
    }
    if !runs {
        return None;
    }
    if name.is_some() {
        return Some("Instance must be stopped to change their names".to_owned());
    }
    if to.project.is_some() {
        return Some("Instance must be stopped to be moved across projects".to_owned());
    }
    let stateless = !to.live && (host.product == Product::Incus || to.pool.is_some());
    stateless.then(|| "Instance must be stopped to be moved statelessly".to_owned())
}

/// The member that a request names, or the least used one of a group, or of all.
pub(crate) fn choose_member(host: &Host, wanted: Option<&str>, now: Option<&str>) -> Result<Option<String>, String> {
    if !host.clustered() {
        return wanted.map_or(Ok(None), |_| Err("Target only allowed when clustered".to_owned()));
    }
    let load = |m: &str| {
        host.instances
            .values()
            .filter(|i| i.member.as_deref() == Some(m))
            .count()
    };
    let online = |m: &&berth_core::model::Member| m.status == MemberStatus::Online;
    if let Some(name) = wanted.filter(|w| !w.starts_with('@')) {
        let member = host.members.iter().find(|m| m.name == name);
        return match member {
            None => Err(format!("Cluster member \"{name}\" not found")),
            Some(_) if now == Some(name) => Err("Requested target server is the same as current server".to_owned()),
            Some(m) if online(&m) => Ok(Some(name.to_owned())),
            Some(m) if m.status == MemberStatus::Offline => Err("Target cluster member is offline".to_owned()),
            Some(_) => Err("Cluster member is evacuated".to_owned()),
        };
    }
    let group = wanted.and_then(|w| w.strip_prefix('@'));
    if group.is_some() && now.is_some() && !host.has("instance_move_config") {
        return Err(format!("Cluster member \"@{}\" not found", group.unwrap_or_default()));
    }
    let candidates = host
        .members
        .iter()
        .filter(online)
        .filter(|m| Some(m.name.as_str()) != now);
    let candidates = candidates.filter(|m| group.is_none_or(|g| m.groups.iter().any(|have| have == g)));
    let best = candidates.min_by_key(|m| load(&m.name)).map(|m| m.name.clone());
    best.map(Some)
        .ok_or_else(|| "Couldn't find a cluster member for the instance".to_owned())
}

/// The name that a copy has between the deletion of the source and the last rename.
fn temporary(product: Product, uuid: &str) -> String {
    match product {
        Product::Lxd => format!("lxd-move-of-{uuid}"),
        Product::Incus => {
            let n = uuid
                .bytes()
                .fold(7_u64, |n, b| n.wrapping_mul(31).wrapping_add(u64::from(b)));
            format!("move-of-{n}")
        }
    }
}
