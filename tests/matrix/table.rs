//! The table of docs/compatibility.md: printed, compared, and with `UPDATE=1` and all cells written. One part of the page per
//! pair, between two comments; rows that are alike for all pools are one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::{MODES, POOLS, SNAPSHOTS};

/// The result of one cell.
pub struct Row {
    /// `dir → btrfs`.
    pub pools: &'static str,
    /// `none`, …
    pub snapshots: &'static str,
    /// `Pull`, …
    pub mode: &'static str,
    /// `ok`, or the reason.
    pub result: String,
}

const ALL_POOLS: &str = "all";

/// Whether all cells run.
pub fn full() -> bool {
    std::env::var("BERTH_MATRIX").is_ok_and(|part| part == "full")
}

fn page() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/compatibility.md")
}

fn marks(title: &str) -> (String, String) {
    (
        format!("<!-- matrix: {title} -->\n"),
        format!("<!-- end: {title} -->\n"),
    )
}

/// Tests of one process write one after the other.
static WRITING: Mutex<()> = Mutex::new(());

/// Prints the rows of a pair and compares them with the page.
pub fn compare(title: &str, rows: &[Row]) {
    let _writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
    let path = page();
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (begin, end) = marks(title);
    let (head, rest) = text
        .split_once(&begin)
        .unwrap_or_else(|| panic!("docs/compatibility.md has no part for {title}"));
    let (part, tail) = rest
        .split_once(&end)
        .unwrap_or_else(|| panic!("the part for {title} has no end"));
    let made = render(rows);
    eprintln!("{title}\n{made}");
    if full() && std::env::var_os("UPDATE").is_some_and(|update| update == "1") {
        let written = std::fs::write(&path, format!("{head}{begin}{made}{end}{tail}"));
        written.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        return;
    }
    let known = parse(part);
    for row in rows {
        let find = |pools: &str| known.get(&(pools.to_owned(), row.snapshots.to_owned(), row.mode.to_owned()));
        let stored = find(ALL_POOLS).or_else(|| find(row.pools)).map(String::as_str);
        assert_eq!(
            stored,
            Some(shown(&row.result).as_str()),
            "{title}, {}, snapshots {}, {}: docs/compatibility.md says otherwise; BERTH_MATRIX=full UPDATE=1 writes it",
            row.pools,
            row.snapshots,
            row.mode
        );
    }
}

fn shown(result: &str) -> String {
    if result == "ok" {
        "yes".to_owned()
    } else {
        format!("`{result}`")
    }
}

/// The cells of one row in the order of the modes; a dash for what did not run.
fn line(rows: &[Row], pools: &str, snapshots: &str) -> Vec<String> {
    let of = |mode: &&str| {
        let row = rows
            .iter()
            .find(|r| (r.pools, r.snapshots, r.mode) == (pools, snapshots, *mode));
        row.map_or_else(|| "–".to_owned(), |row| shown(&row.result))
    };
    MODES.iter().map(of).collect()
}

fn render(rows: &[Row]) -> String {
    let mut text = format!(
        "| pools | snapshots | {} |\n|---|---{}|\n",
        MODES.join(" | "),
        "|---".repeat(MODES.len())
    );
    for snapshots in SNAPSHOTS {
        let lines: Vec<(&str, Vec<String>)> = POOLS.iter().map(|p| (p.2, line(rows, p.2, snapshots))).collect();
        let alike = lines.iter().all(|(_, cells)| *cells == lines[0].1);
        let lines = if alike {
            vec![(ALL_POOLS, lines[0].1.clone())]
        } else {
            lines
        };
        for (pools, cells) in lines {
            text.push_str(&format!("| {pools} | {snapshots} | {} |\n", cells.join(" | ")));
        }
    }
    text
}

/// Pools, snapshots and mode to what the page says.
fn parse(part: &str) -> BTreeMap<(String, String, String), String> {
    let mut known = BTreeMap::new();
    for line in part.lines().skip(2) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [pools, snapshots, results @ ..] = cells.as_slice() else {
            continue;
        };
        for (mode, result) in MODES.iter().zip(results) {
            let key = ((*pools).to_owned(), (*snapshots).to_owned(), (*mode).to_owned());
            known.insert(key, (*result).to_owned());
        }
    }
    known
}
