//! What came of all cases on one target, as data that outlives the process, and the table of several targets.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::case::Case;
use crate::need::{BEYOND_THE_CONTRACT, Profile, unseen};

/// The environment variable that names the folder where tests leave their reports, one `TARGET.json` each.
pub const FOLDER: &str = "INTERLOCK_CONFORMANCE";

/// What came of one case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Everything came out as it must.
    Passed,
    /// Something did not.
    Failed(String),
    /// It was not run, and why.
    Skipped(String),
}

/// One case on one target.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The case.
    pub case: String,
    /// Where it comes from.
    pub group: String,
    /// What came of it.
    pub verdict: Verdict,
    /// What it is about, and the target cannot show.
    pub unseen: Vec<String>,
}

/// All cases on one target.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The target.
    pub target: String,
    /// The cases.
    pub rows: Vec<Row>,
}

/// The groups of cases in words.
const GROUPS: [(&str, &str); 10] = [
    ("pg", "PostgreSQL isolation specs"),
    ("lockdep", "Linux lockdep selftests"),
    ("ww_mutex", "Linux ww_mutex selftests"),
    ("mgl", "Gray's granularity matrix"),
    ("curator", "Apache Curator"),
    ("consul", "Consul"),
    ("etcd", "etcd"),
    ("resty", "lua-resty-lock"),
    ("litmus", "WebDAV litmus"),
    ("jepsen", "Jepsen and Kleppmann"),
];

/// Why a case is skipped, and the cases that are.
pub type Skips = BTreeMap<String, Vec<String>>;

impl Report {
    /// An empty one.
    pub fn new(profile: &Profile) -> Self {
        Report { target: profile.name.to_owned(), rows: Vec::new() }
    }

    /// Adds a case.
    pub fn add(&mut self, case: &Case, profile: &Profile, verdict: Verdict) {
        let passed = verdict == Verdict::Passed;
        let unseen = unseen(case, profile).into_iter().filter(|_| passed).map(str::to_owned).collect();
        self.rows.push(Row { case: case.name.clone(), group: case.group().to_owned(), verdict, unseen });
    }

    /// How many passed, failed and were skipped; of this group, or of all.
    pub fn counts(&self, group: Option<&str>) -> [usize; 3] {
        let mut counts = [0; 3];
        for row in self.rows.iter().filter(|row| group.is_none_or(|group| group == row.group)) {
            let column = match row.verdict {
                Verdict::Passed => 0,
                Verdict::Failed(_) => 1,
                Verdict::Skipped(_) => 2,
            };
            counts[column] += 1;
        }
        counts
    }

    /// What was skipped, by reason, in the order of the cases.
    pub fn skips(&self) -> Skips {
        let mut skips = Skips::new();
        for row in &self.rows {
            if let Verdict::Skipped(why) = &row.verdict {
                skips.entry(why.clone()).or_default().push(row.case.clone());
            }
        }
        skips
    }

    /// What failed, and how.
    pub fn failures(&self) -> Vec<String> {
        let failed = |row: &Row| match &row.verdict {
            Verdict::Failed(how) => Some(format!("{} ({}): {how}", row.case, self.target)),
            Verdict::Passed | Verdict::Skipped(_) => None,
        };
        self.rows.iter().filter_map(failed).collect()
    }

    /// Leaves the report where [`FOLDER`] says, if it says so.
    ///
    /// # Panics
    /// When it cannot be written there.
    pub fn leave(&self) {
        if let Some(folder) = std::env::var_os(FOLDER) {
            let path = std::path::Path::new(&folder).join(format!("{}.json", self.target));
            let text = serde_json::to_string(self).unwrap_or_else(|error| panic!("a report: {error}"));
            std::fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
    }

    /// Shows the report, leaves it, and holds it against what must be so: nothing fails, every case has a verdict, and
    /// what is skipped is what no target can pass and `skips`, reason by reason and name by name.
    ///
    /// # Panics
    /// When that is not so.
    pub fn settle(&self, skips: &[(&str, &[&str])]) {
        println!("{}", table(std::slice::from_ref(self)));
        self.leave();
        let failures = self.failures();
        assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
        assert_eq!(self.rows.len(), crate::cases().len(), "a case has no verdict");
        let pinned = |(why, names): &(&str, &[&str])| {
            let mut names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            names.sort();
            ((*why).to_owned(), names)
        };
        let mut found = self.skips();
        found.values_mut().for_each(|names| names.sort());
        assert_eq!(
            found,
            BEYOND_THE_CONTRACT.iter().chain(skips).map(pinned).collect(),
            "{}: other cases are skipped",
            self.target
        );
    }
}

/// The table: per source and per target what passed, failed and was skipped; then why.
pub fn table(reports: &[Report]) -> String {
    let mut out = String::new();
    // Writing to a String does not fail.
    let _ = write!(out, "{:<28}", "source");
    for report in reports {
        let _ = write!(out, " | {:<22}", report.target);
    }
    let _ = write!(out, "\n{:<28}", "");
    for _ in reports {
        let _ = write!(out, " | passed failed skipped ");
    }
    for (group, words) in GROUPS.iter().map(|(group, words)| (Some(*group), *words)).chain([(None, "all")]) {
        let _ = write!(out, "\n{words:<28}");
        for report in reports {
            let [passed, failed, skipped] = report.counts(group);
            let _ = write!(out, " | {passed:>6} {failed:>6} {skipped:>7} ");
        }
    }
    out.push('\n');
    for report in reports {
        for (why, names) in report.skips() {
            let _ = write!(out, "\n{}: skipped {}: {why}\n  {}", report.target, names.len(), names.join(", "));
        }
        for row in report.rows.iter().filter(|row| !row.unseen.is_empty()) {
            let _ = write!(out, "\n{}: {} passed without {}", report.target, row.case, row.unseen.join(", "));
        }
        for failure in report.failures() {
            let _ = write!(out, "\nFAILED: {failure}");
        }
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_group_has_a_row() {
        for case in crate::cases() {
            assert!(GROUPS.iter().any(|(group, _)| *group == case.group()), "{}", case.name);
        }
    }
}
