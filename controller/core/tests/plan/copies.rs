//! Where the source of a copy is.

use berth_api::Reason;
use berth_core::copies::{CopyRecord, Sought, SourcePlacement, sought};

use super::common::{instance, server, world};

#[test]
fn a_placement_whose_instance_moves_is_waited_for_though_both_servers_have_it() {
    let w = world([
        ("rack-a", server("a", [instance("web")])),
        ("rack-b", server("b", [instance("web")])),
    ]);
    let mut record = CopyRecord::default();
    record.spec.source.placement = Some("web".to_owned());
    let uuid = instance("web").uuid().map(str::to_owned);
    let placement = SourcePlacement {
        exists: true,
        uuid: uuid.clone(),
    };
    let why = |moving: &[String]| match sought(&record, &w, Some(&placement), moving) {
        Sought::Found(_) => None,
        Sought::Missing(blocker) => Some(blocker.reason),
        Sought::Later { reason, .. } => Some(reason),
    };
    assert_eq!(why(&[]), Some(Reason::AmbiguousInstance));
    assert_eq!(why(&[uuid.unwrap()]), Some(Reason::Pending));
}
