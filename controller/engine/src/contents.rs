//! What belongs to an instance and no list shows: its snapshots, its backups, and the target's custom volumes. Read only
//! while the move of it is planned, so that a steady state asks for nothing.

use std::collections::BTreeSet;

use berth_api::{Location, Reason, present};
use berth_core::model::Contents;
use berth_core::plan::{self, Decision, Desired, Located, Verdict};
use berth_core::server::{FailureKind, Result};
use futures::future::{join, join3, try_join};

use crate::Key;
use crate::engine::Engine;

impl Engine {
    /// The plan once more with what only the servers themselves tell, if it is about a move.
    pub(crate) async fn plan_with_contents(&self, key: &Key, desired: &Desired) -> Verdict {
        let now = self.env().now();
        // without slots: others may take them while the contents are read
        let (world, _) = self.world(desired, &self.book().usage(now), None);
        let verdict = plan::plan(desired, &world, now);
        let about_a_move = verdict.plan.as_ref().is_some_and(|p| p.transfer.is_some());
        let Some(located) = verdict.located.clone().filter(|_| about_a_move) else {
            return self.plan(key, desired, None);
        };
        let size = async {
            if let Some(located) = self.sizes().missing(&verdict) {
                let follower = self.registry().follower(&Key::new(&desired.namespace, &located.server));
                self.sizes().ask(&located, follower.map(|f| f.server())).await;
            }
        };
        let inside = async {
            match self.insides.missing(desired, &verdict) {
                Some(located) => self.look_inside(desired, &located).await,
                None => Ok(()),
            }
        };
        let to = verdict.plan.as_ref().and_then(|p| p.to.as_ref());
        let ((), looked, contents) = join3(size, inside, self.contents(desired, &located, to)).await;
        match looked.and(contents) {
            Ok(contents) => self.plan(key, desired, Some(contents)),
            Err(error) => {
                let reason = match error.kind {
                    FailureKind::NotFound => Reason::Progressing,
                    _ => Reason::ServerUnreachable,
                };
                let decision = Decision::Wait {
                    reason,
                    message: error.to_string(),
                    until: None,
                };
                Verdict { decision, ..verdict }
            }
        }
    }

    async fn look_inside(&self, desired: &Desired, located: &Located) -> Result<()> {
        match self.registry().follower(&Key::new(&desired.namespace, &located.server)) {
            Some(follower) => self.insides.look(located, follower.server().as_ref()).await,
            None => Ok(()),
        }
    }

    async fn contents(&self, desired: &Desired, located: &Located, to: Option<&Location>) -> Result<Contents> {
        let server = |name: &str| self.registry().follower(&Key::new(&desired.namespace, name));
        let (Some(here), Some(there)) = (server(&located.server), server(&desired.spec.target.server)) else {
            return Ok(Contents::default());
        };
        let (here, there) = (here.server(), there.server());
        let project = present(&desired.spec.target.project).unwrap_or(&located.at().project);
        let pools: BTreeSet<&str> = located.instance.attached_volumes().map(|(_, pool, _)| pool).collect();
        let mut volumes = BTreeSet::new();
        for pool in pools {
            // a pool that is not there has no volumes either
            match there.volumes(pool, project).await {
                Ok(names) => volumes.extend(names.into_iter().map(|name| (pool.to_owned(), name))),
                Err(error) if error.kind == FailureKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let clustered = self.server(&Key::new(&desired.namespace, &desired.spec.target.server));
        let clustered = clustered.and_then(|v| v.facts).is_some_and(|f| f.clustered);
        // every member of a cluster has its own room
        let place = to.and_then(|to| Some((to.pool.as_deref()?, to.member.as_deref())));
        let free = async {
            let (pool, member) = place.filter(|(_, member)| !clustered || member.is_some())?;
            // what is not known refuses nothing
            there.free_space(pool, member).await.unwrap_or_else(|error| {
                tracing::debug!(%error, "its room is not known");
                None
            })
        };
        let listed = try_join(here.snapshots(located.at()), here.backups(located.at()));
        let (listed, free) = join(listed, free).await;
        let (snapshots, backups) = listed?;
        Ok(Contents {
            snapshots,
            backups,
            volumes,
            free,
        })
    }
}
