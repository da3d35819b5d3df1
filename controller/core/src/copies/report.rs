//! What of a copy is worth an Event.

use berth_api::conditions::{self, READY};
use berth_api::{InstanceCopyStatus, Reason, ReasonKind};

/// One thing worth telling: whether somebody should look, in one word, in a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Whether somebody should look.
    pub warning: bool,
    /// The reason.
    pub reason: Reason,
    /// The sentence.
    pub message: String,
}

/// What the change of a status is worth telling: a new reason. That work begins is told by its end.
pub fn told(old: &InstanceCopyStatus, new: &InstanceCopyStatus) -> Option<Told> {
    let before = conditions::reason(&old.conditions);
    let now = conditions::find(&new.conditions, READY)?;
    let reason = Reason::parse(&now.reason)?;
    if before == Some(now.reason.as_str()) || matches!(reason, Reason::Copying | Reason::Progressing) {
        return None;
    }
    Some(Told {
        warning: matches!(reason, Reason::RefreshFailed) || reason.kind() == ReasonKind::Stalled,
        reason,
        message: now.message.clone(),
    })
}
