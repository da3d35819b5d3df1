//! A person empties a cluster member or brings it back; members that do not answer.

use berth_core::model::MemberStatus;

use crate::state::State;

const ORIGIN: &str = "volatile.evacuate.origin";

impl State {
    /// Everything leaves the member; what ran is stopped, moved and started again.
    pub fn evacuate(&mut self, server: &str, member: &str) {
        self.set_member(server, member, MemberStatus::Evacuated);
        let Some(host) = self.servers.get(server) else { return };
        let leaving: Vec<u64> = host
            .instances
            .values()
            .filter(|i| i.member.as_deref() == Some(member))
            .map(|i| i.born)
            .collect();
        for born in leaving {
            let Some(host) = self.servers.get(server) else { return };
            let to = crate::relocate::choose_member(host, None, Some(member));
            let ran = self.inst_by_born(server, born).is_some_and(|i| i.runs());
            self.go_down(server, born, None);
            let Some(i) = self.inst_by_born(server, born) else {
                continue;
            };
            if let Ok(to) = to {
                i.member = to;
                i.config.entry(ORIGIN.to_owned()).or_insert_with(|| member.to_owned());
                self.run_if(server, born, ran);
            }
        }
    }

    /// What had left the member comes back.
    pub fn restore_member(&mut self, server: &str, member: &str) {
        self.set_member(server, member, MemberStatus::Online);
        let Some(host) = self.servers.get(server) else { return };
        let back = host
            .instances
            .values()
            .filter(|i| i.config.get(ORIGIN).is_some_and(|o| o == member));
        for born in back.map(|i| i.born).collect::<Vec<_>>() {
            let ran = self.inst_by_born(server, born).is_some_and(|i| i.runs());
            self.go_down(server, born, None);
            if let Some(i) = self.inst_by_born(server, born) {
                i.member = Some(member.to_owned());
                i.config.remove(ORIGIN);
                self.run_if(server, born, ran);
            }
        }
    }

    fn run_if(&mut self, server: &str, born: u64, ran: bool) {
        let Some(host) = self.servers.get(server) else { return };
        let Some(at) = host.born(born) else { return };
        let startable = host
            .instances
            .get(&at)
            .is_some_and(|i| crate::config::unstartable(host, &at.project, &at.name, i).is_none());
        if ran && startable {
            self.run(server, born, None);
        }
    }

    pub fn set_member(&mut self, server: &str, member: &str, status: MemberStatus) {
        let Some(host) = self.servers.get_mut(server) else {
            return;
        };
        if let Some(m) = host.members.iter_mut().find(|m| m.name == member) {
            m.status = status;
        }
        host.emit(&berth_core::server::ServerEvent::Facts);
    }
}
