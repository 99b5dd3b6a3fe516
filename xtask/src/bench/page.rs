//! What was measured as part of a page for people, docs/performance.md above all.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use interlock_testkit::tools;

use super::pairs::Pace;
use super::report::{self, Findings, Verdict};

/// The lines between which a page has what was measured.
const BEGIN: &str = "<!-- measured: written by cargo xtask bench --markdown -->";
const END: &str = "<!-- end of what was measured -->";

/// What ran.
pub struct Run<'a> {
    pub machine: &'a str,
    pub pace: Pace,
    pub took: Duration,
    /// The command's.
    pub options: String,
}

/// All of it: what ran where, what was aimed at, and a table a question.
pub fn measured(run: &Run<'_>, findings: &Findings, verdicts: &[Verdict]) -> String {
    let Run { machine, pace, took, options } = run;
    let (rounds, millis, minutes) = (pace.rounds, pace.time.as_millis(), took.as_secs_f64() / 60.0);
    let mut text = format!(
        "    cargo xtask bench{options}\n\n{machine}; Envoy {}; {rounds} rounds of {millis} ms; {minutes:.0} minutes.\n\n",
        tools::ENVOY_VERSION
    );
    text += &report::judged(verdicts);
    for finding in findings.0.values() {
        text += &format!("\n{}", finding.markdown());
    }
    text
}

/// Puts it into the page, in the place of what was measured before; a page that is not there is made of it.
pub fn write(file: &Path, measured: &str) -> Result<()> {
    let measured = format!("{BEGIN}\n\n{}\n\n{END}", measured.trim_matches('\n'));
    let page = if file.exists() {
        let page = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let (before, rest) = page.split_once(BEGIN).unwrap_or(("", ""));
        let after = rest.split_once(END).map(|(_, after)| after);
        ensure!(after.is_some(), "{} has no place for what was measured: {BEGIN} {END}", file.display());
        format!("{before}{measured}{}", after.unwrap_or_default())
    } else {
        format!("{measured}\n")
    };
    fs::write(file, page).with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_takes_the_place_of_the_last_time() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("page.md");
        write(&file, "| a |\n").unwrap();
        let page = fs::read_to_string(&file).unwrap();
        fs::write(&file, format!("# Before\n\n{page}\nAfter.\n")).unwrap();
        write(&file, "| b |\n").unwrap();
        let page = fs::read_to_string(&file).unwrap();
        assert!(page.starts_with("# Before\n\n<!-- ") && page.ends_with("-->\n\nAfter.\n"), "{page}");
        assert!(page.contains("| b |") && !page.contains("| a |"), "{page}");
        fs::write(&file, "# Another page\n").unwrap();
        assert!(write(&file, "| c |").is_err());
    }
}
