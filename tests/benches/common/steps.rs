//! Where the time of moves went, as their records tell.

use std::collections::BTreeMap;

use serde_json::Value;

use super::Times;

/// The times between the steps of some moves that took the same way.
#[derive(Default)]
pub struct Steps(BTreeMap<usize, (String, Times)>);

impl Steps {
    /// One more move. What has no length in a record is no step of its own.
    pub fn add(&mut self, record: &Value) {
        let status = &record["status"];
        let mut times: Vec<(jiff::Timestamp, &str)> = Vec::new();
        let mut note = |what, at: &Value| times.extend(at.as_str().and_then(|at| at.parse().ok()).map(|at| (at, what)));
        note("asked to stop", &status["stopRequestedAt"]);
        for step in status["steps"].as_array().into_iter().flatten() {
            let name = step["step"].as_str().unwrap_or_default();
            if !matches!(name, "Committed" | "Marked") {
                note(name, &step["at"]);
            }
        }
        times.sort_by_key(|(at, _)| *at);
        for (index, two) in times.windows(2).enumerate() {
            let words = format!("{} → {}", two[0].1, two[1].1);
            let entry = self.0.entry(index).or_insert_with(|| (words, Times::default()));
            entry.1.add(two[1].0.duration_since(two[0].0).as_secs_f64());
        }
    }
}

/// A row for each of `all`, the medians in milliseconds.
pub fn table(all: &[(&str, &Steps)]) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let names = all
        .first()
        .map(|(_, steps)| steps.0.values().map(|(words, _)| words.clone()));
    let names: Vec<String> = names.into_iter().flatten().collect();
    let mut text = line([vec!["servers, pool".to_owned()], names.clone()].concat());
    text.push_str(&format!("|{}\n", "---|".repeat(names.len() + 1)));
    for (what, steps) in all {
        let medians = steps
            .0
            .values()
            .map(|(_, times)| format!("{:.0}", times.median() * 1000.0));
        text.push_str(&line(std::iter::once((*what).to_owned()).chain(medians).collect()));
    }
    text
}
