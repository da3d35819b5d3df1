//! What a server cannot get rid of by itself, and the command of its host that helps.

use crate::model::{InstanceRef, Product};
use crate::moves::EndView;

/// Whether a server says that a snapshot has a volume but no instance snapshot. A refresh that breaks off at its very end
/// leaves one on the target, and then both products neither refresh, start nor delete the instance (*seen* on Incus 6.0.4
/// and LXD 5.0.2).
pub(crate) fn is_half_a_snapshot(error: &str) -> bool {
    const WORDS: [&str; 3] = [
        "UNIQUE constraint failed: storage_volumes_snapshots",
        "snapshot record count doesn't match",
        "volume that has snapshots",
    ];
    WORDS.iter().any(|words| error.contains(words))
}

/// The command that deletes the instance, after what its server said of that.
pub(crate) fn removal(server: &str, end: &EndView, at: &InstanceRef, error: &str) -> String {
    let delete = format!("{} delete --project {} {}", end.product().cli(), at.project, at.name);
    match is_half_a_snapshot(error) {
        true => format!("{} && {delete}", completion(server, end, at)),
        false => format!("on the host of {server}: {delete}"),
    }
}

/// The command that gives every snapshot volume of the instance its instance snapshot again. Its date is a new one, so that
/// the next refresh sends the snapshot anew.
pub(crate) fn completion(server: &str, end: &EndView, at: &InstanceRef) -> String {
    let sql = match end.product() {
        Product::Incus => "incus admin sql",
        Product::Lxd => "lxd sql",
    };
    format!(
        "on the host of {server}: {sql} global \"INSERT INTO instances_snapshots (instance_id, name, creation_date, stateful, \
         description, expiry_date) SELECT i.id, s.name, CURRENT_TIMESTAMP, 0, '', 0 FROM instances i JOIN storage_volumes v \
         ON v.name = i.name AND v.project_id = i.project_id AND v.type <> 2 JOIN storage_volumes_snapshots s ON \
         s.storage_volume_id = v.id WHERE i.name = '{}' AND s.name NOT IN (SELECT name FROM instances_snapshots WHERE \
         instance_id = i.id)\"",
        at.name
    )
}
