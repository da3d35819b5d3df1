//! What keeps an instance from being moved live: every unmet condition at once, each with the way to meet it.

use berth_api::placement::Rejected;
use berth_api::{Method, Reason};

use super::methods::Case;
use crate::model::InstanceKind;

/// The unmet conditions of a live move; none: it is possible.
pub(super) fn unmet(case: &Case<'_>) -> Vec<Rejected> {
    let container = case.located.instance.kind == InstanceKind::Container;
    let why = if container && !case.desired.spec.criu {
        "containers are moved live only with spec.criu: true"
    } else {
        "live moves are not part of this version of Berth"
    };
    vec![Rejected {
        method: Method::Live,
        reason: Reason::MethodImpossible.as_str().to_owned(),
        message: why.to_owned(),
        fix: Some("add Cold to spec.methods to allow a stop".to_owned()),
    }]
}
