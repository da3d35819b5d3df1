//! Live moves by Berth beside those that a person makes, each in its own part of the page.

use std::fmt::Write as _;
use std::io::Write as _;

use berth_tests::seconds;
use serde_json::Value;

use super::{Times, write_part};

/// What Berth may take more of silence than the client, and add to the whole, in seconds.
const SILENCE: f64 = 1.1;
const ADDED: f64 = 0.5;

/// What was measured for one pair of servers.
#[derive(Default)]
pub struct Measured {
    what: String,
    /// By hand and by Berth.
    silent: [Times; 2],
    total: [Times; 2],
    /// What the record of the move says of the silence.
    said: Times,
}

impl Measured {
    /// Nothing yet.
    pub fn of(what: String) -> Measured {
        Measured {
            what,
            ..Measured::default()
        }
    }

    /// One more move; `record` is that of a move by Berth.
    pub fn add(&mut self, silent: f64, total: f64, record: Option<&Value>) {
        let column = usize::from(record.is_some());
        self.silent[column].add(silent);
        self.total[column].add(total);
        let said = record.map(|r| &r["status"]["downtime"]).filter(|said| said.is_string());
        said.into_iter().for_each(|said| self.said.add(seconds(said)));
    }

    /// Prints what was measured.
    pub fn show(&self) {
        let _ = writeln!(std::io::stdout(), "{}", self.row());
    }

    /// Berth's silence as a part of that by hand: the medians, the smallest, and the largest.
    fn silence(&self) -> [f64; 3] {
        let [hand, berth] = &self.silent;
        [Times::median, Times::smallest, Times::largest].map(|of| of(berth) / of(hand))
    }

    fn added(&self) -> f64 {
        self.total[1].median() - self.total[0].median()
    }

    fn row(&self) -> String {
        let [median, smallest, largest] = self.silence();
        format!(
            "| {} | {} | {} | {:.2} [{:.2}, {:.2}] | {} | {} | {} | {:+.3} |",
            self.what,
            self.silent[0].shown(),
            self.silent[1].shown(),
            median,
            smallest,
            largest,
            self.said.shown(),
            self.total[0].shown(),
            self.total[1].shown(),
            self.added()
        )
    }

    fn missed(&self) -> bool {
        let [median, ..] = self.silence();
        median > SILENCE || self.added() > ADDED
    }
}

/// Writes the part, and says which targets were missed: the servers themselves need now a second more, now one less.
pub fn report(part: &str, intro: &str, all: &[Measured]) {
    let mut text = format!(
        "{intro}Median [smallest-largest], in seconds.\n\n\
         - *Ratio* is that of the medians [of the smallest, of the largest].\n\
         - *Said* is `status.downtime` of Berth's moves.\n\
         - *Total* is by hand the time of the one command; for Berth it is from the edit until the placement is Ready, which\n  includes the end of the former source.\n\n\
         | servers, pool | silent by hand | silent by Berth | ratio | said | total by hand | total by Berth | added |\n\
         |---|---|---|---|---|---|---|---|\n"
    );
    for measured in all {
        let _ = writeln!(text, "{}", measured.row());
    }
    let _ = writeln!(
        text,
        "\nTargets: silence at most {SILENCE:.1} of that by hand, added total at most {ADDED:.1} s."
    );
    write_part(part, &text);
    let _ = writeln!(std::io::stdout(), "\n{text}");
    for measured in all.iter().filter(|m| m.missed()) {
        let _ = writeln!(std::io::stdout(), "missed: {}", measured.row());
    }
}
