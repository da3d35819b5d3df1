//! What decides whether a running state fits another machine: processors, versions, sizes of memory.

use std::collections::BTreeSet;

/// The key without which no running state of a virtual machine is moved or saved.
pub const MIGRATION_STATEFUL: &str = "migration.stateful";

/// The keys by which the memory of a container is copied in rounds before it is frozen: whether, until how much of it is in
/// step (percent), and how often at most.
pub const MIGRATION_INCREMENTAL: [&str; 3] = [
    "migration.incremental.memory",
    "migration.incremental.memory.goal",
    "migration.incremental.memory.iterations",
];

/// The processors of a server, all of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Processor {
    /// What its maker calls it.
    pub name: String,
    /// What it can do, in the kernel's words; empty where the server does not tell.
    pub flags: BTreeSet<String>,
}

/// First two numbers of a version, which is what compatibility goes by.
pub fn version_of(text: &str) -> (u32, u32) {
    let number = |part: Option<&str>| {
        let digits: String = part
            .unwrap_or_default()
            .chars()
            .take_while(char::is_ascii_digit)
            .collect();
        digits.parse().unwrap_or(0)
    };
    let mut parts = text.split('.');
    (number(parts.next()), number(parts.next()))
}

/// A size as both products write it: `512MiB`, `1GB`, `1073741824`. A share of something (`50%`) is none.
pub fn bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..split].parse().ok()?;
    let factor: u64 = match text[split..].trim() {
        "" | "B" | "bytes" => 1,
        "kB" => 1000,
        "MB" => 1000_u64.pow(2),
        "GB" => 1000_u64.pow(3),
        "TB" => 1000_u64.pow(4),
        "PB" => 1000_u64.pow(5),
        "KiB" => 1024,
        "MiB" => 1024_u64.pow(2),
        "GiB" => 1024_u64.pow(3),
        "TiB" => 1024_u64.pow(4),
        "PiB" => 1024_u64.pow(5),
        _ => return None,
    };
    number.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_versions_are_read_as_the_servers_write_them() {
        assert_eq!(bytes("192MiB"), Some(192 << 20));
        assert_eq!(bytes("1GB"), Some(1_000_000_000));
        assert_eq!(bytes("50%"), None);
        assert_eq!(version_of("10.0.2"), (10, 0));
        assert_eq!(version_of("7.2.22(Debian)"), (7, 2));
        assert_eq!(version_of("6.23"), (6, 23));
    }
}
