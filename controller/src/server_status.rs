//! The status of an InstanceServer from what is known of the server, as data: what it is, whether it can be used, and if
//! not, what a person can do about it.

use berth_api::server::{Member, Pool, TransferMemory};
use berth_api::{InstanceServer, InstanceServerStatus, Reason, conditions};
use berth_core::model::{Capability, ServerFacts};
use berth_core::plan::{Reach, ServerView};
use jiff::Timestamp;

/// Ways of transfer that are remembered.
const TRANSFERS: usize = 64;

/// The status as it should be. `address` is the one in use, `worked` the ways on which data came.
pub(crate) fn status(
    object: &InstanceServer,
    view: Option<&ServerView>,
    address: Option<String>,
    worked: &[(String, Option<TransferMemory>)],
    now: Timestamp,
) -> InstanceServerStatus {
    let mut status = object.status.clone().unwrap_or_default();
    let generation = object.metadata.generation;
    status.observed_generation = generation;
    if let Some(facts) = view.and_then(|v| v.facts.as_deref()) {
        describe(&mut status, facts);
    }
    if let Some(instances) = view.and_then(|v| v.instances.as_ref()) {
        status.instances = i64::try_from(instances.len()).ok();
    }
    status.address = address.or(status.address);
    remember(&mut status.transfers, worked);
    let (reason, message) = story(view);
    let said = (reason.as_str(), message.as_str());
    conditions::say(&mut status.conditions, reason.kind(), said, generation, now);
    status
}

fn describe(status: &mut InstanceServerStatus, facts: &ServerFacts) {
    status.product = Some(facts.product.as_str().to_owned());
    status.version = Some(facts.version.clone());
    status.fingerprint = Some(facts.fingerprint.clone());
    status.clustered = Some(facts.clustered);
    status.members = facts
        .members
        .iter()
        .map(|m| Member {
            name: m.name.clone(),
            status: m.status.as_str().to_owned(),
            architecture: Some(m.architecture.clone()).filter(|a| !a.is_empty()),
            groups: m.groups.clone(),
        })
        .collect();
    status.member_count = i64::try_from(facts.members.len().max(1)).ok();
    let pool = |p: &berth_core::model::Pool| Pool {
        name: p.name.clone(),
        driver: p.driver.clone(),
    };
    status.pools = facts.pools.iter().map(pool).collect();
    let able = Capability::ALL.into_iter().filter(|c| facts.can(*c));
    // the names in status are those of the variants
    status.capabilities = able.map(|c| format!("{c:?}")).collect();
}

fn story(view: Option<&ServerView>) -> (Reason, String) {
    let connecting = || (Reason::Connecting, "the server is being contacted".to_owned());
    let Some(view) = view else { return connecting() };
    match &view.reach {
        Reach::Connecting => connecting(),
        Reach::Down { reason, message, .. } => (*reason, explain(*reason, message)),
        Reach::Ready => match (&view.duplicate_of, &view.facts) {
            (Some(first), facts) => {
                let fingerprint = facts.as_ref().map_or("", |f| f.fingerprint.as_str());
                let message = format!(
                    "{first} is the same server (fingerprint {fingerprint}): delete one of the two and let placements name the other"
                );
                (Reason::DuplicateServer, message)
            }
            (None, Some(facts)) if view.instances.is_some() => (
                Reason::Connected,
                format!("{} {}", facts.product.as_str(), facts.version),
            ),
            (None, _) => connecting(),
        },
    }
}

/// The server's or the connection's own words, and what a person can do.
fn explain(reason: Reason, message: &str) -> String {
    let fix = match reason {
        Reason::CertificateMismatch => {
            "if the server's certificate was replaced on purpose, set spec.serverCertificate.fingerprint to the new one (incus info | grep fingerprint)"
        }
        Reason::NotTrusted => {
            "have the server trust the client certificate: incus config trust add-certificate client.crt (LXD: lxc config trust add client.crt)"
        }
        Reason::Unreachable => {
            "it is tried again; see that the server runs and that spec.addresses can be reached from here"
        }
        Reason::UnsupportedServer => "spec.addresses must lead to the API of Incus 6.0, LXD 5.0 or later",
        // the sentences of the others name what to do
        _ => return message.to_owned(),
    };
    format!("{message}; {fix}")
}

/// Which way of transfer worked last, per source.
fn remember(transfers: &mut Vec<TransferMemory>, worked: &[(String, Option<TransferMemory>)]) {
    for (from, memory) in worked {
        let known = transfers.iter().position(|t| t.from == *from);
        match (known, memory) {
            (Some(at), Some(memory)) => transfers[at].clone_from(memory),
            (Some(at), None) => drop(transfers.remove(at)),
            (None, Some(memory)) => transfers.push(memory.clone()),
            (None, None) => {}
        }
    }
    let excess = transfers.len().saturating_sub(TRANSFERS);
    transfers.drain(..excess);
}

/// Whether two statuses differ in nothing but the number of instances, which is worth a write only now and then.
pub(crate) fn differs_in_count_only(old: &InstanceServerStatus, new: &InstanceServerStatus) -> bool {
    let mut same = new.clone();
    same.instances = old.instances;
    old != new && *old == same
}

#[cfg(test)]
mod tests {
    use berth_api::Transfer;

    use super::*;

    fn view(reach: Reach) -> ServerView {
        ServerView {
            facts: None,
            reach,
            instances: None,
            cordoned: false,
            cordoned_by: vec![],
            duplicate_of: None,
            free_incoming: 2,
            free_outgoing: 2,
            allow_unsafe_overrides: false,
            ways: Default::default(),
            live_between_servers: true,
        }
    }

    #[test]
    fn a_server_that_was_not_asked_yet_is_unknown_and_one_that_refuses_says_what_to_do() {
        let object = InstanceServer::new("a", Default::default());
        let say = |view: Option<&ServerView>| status(&object, view, None, &[], Timestamp::UNIX_EPOCH).conditions;
        assert_eq!(say(None)[0].status, "Unknown");
        let down = view(Reach::Down {
            reason: Reason::NotTrusted,
            message: "read the server on a:8443: not trusted".into(),
            since: Timestamp::UNIX_EPOCH,
        });
        let conditions = say(Some(&down));
        assert_eq!(conditions[0].reason, "NotTrusted");
        assert!(conditions[0].message.contains("incus config trust add-certificate"));
        assert_eq!(conditions[1].type_, "Stalled");
    }

    #[test]
    fn the_way_that_worked_last_is_remembered_per_source_and_not_of_too_many() {
        let memory = |from: &str, mode| TransferMemory {
            from: from.to_owned(),
            mode,
            under: String::new(),
        };
        let known = |from: &str, mode| (from.to_owned(), Some(memory(from, mode)));
        let mut transfers = vec![memory("a", Transfer::Pull), memory("b", Transfer::Pull)];
        remember(&mut transfers, &[known("a", Transfer::Push), ("b".to_owned(), None)]);
        assert_eq!(
            transfers,
            [memory("a", Transfer::Push)],
            "what does not work any more is forgotten"
        );
        let many: Vec<_> = (0..TRANSFERS).map(|n| known(&n.to_string(), Transfer::Relay)).collect();
        remember(&mut transfers, &many);
        assert_eq!(transfers.len(), TRANSFERS);
    }

    #[test]
    fn another_number_of_instances_alone_is_not_worth_a_write() {
        let old = InstanceServerStatus {
            instances: Some(1),
            ..Default::default()
        };
        let mut new = old.clone();
        assert!(!differs_in_count_only(&old, &new), "nothing differs");
        new.instances = Some(2);
        assert!(differs_in_count_only(&old, &new));
        new.version = Some("6".into());
        assert!(!differs_in_count_only(&old, &new));
    }
}
