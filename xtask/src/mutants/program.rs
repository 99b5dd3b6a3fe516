//! Test programs: built once with all seeded bugs in them, then run as often as there are bugs.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use interlock_testkit::tools;
use serde_json::Value;

use super::bugs::{Bug, VARIABLE};

/// How long one run may take. Ten times what the longest does; past it the program hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// How many schedules the property tests play.
const PROPTEST_CASES: &str = "500";

/// Some tests of a test program.
#[derive(Clone, Copy, Debug)]
pub struct Round {
    /// What it is called in the table.
    pub name: &'static str,
    package: &'static str,
    /// None: the unit tests of the package's library.
    target: Option<&'static str>,
    args: &'static [&'static str],
}

/// The unit tests of the plugin that take seconds, because they go through hundreds of schedules.
const LONG: [&str; 2] = ["filter::tests::storm::", "nothing_is_lost_whichever_shared_data_calls_fail"];

const CORE: &str = "interlock-core";
const PLUGIN: &str = "interlock";

/// All rounds, by what they cost. The last ones are for what nothing else finds.
pub const ROUNDS: [Round; 8] = [
    Round { name: "scenarios", package: CORE, target: Some("scenarios"), args: &[] },
    Round { name: "lease", package: CORE, target: Some("lease"), args: &[] },
    Round { name: "core units", package: CORE, target: None, args: &[] },
    Round { name: "conformance", package: CORE, target: Some("conformance"), args: &[] },
    Round { name: "plugin units", package: PLUGIN, target: None, args: &["--skip", LONG[0], "--skip", LONG[1]] },
    Round { name: "properties", package: CORE, target: Some("properties"), args: &[] },
    Round { name: "plugin storms", package: PLUGIN, target: None, args: &LONG },
    // The smallest search, with leases and waits that end.
    Round { name: "model", package: CORE, target: Some("model"), args: &["all_states_with_time_and_all_places"] },
];

/// What came of a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All its tests passed.
    Passed,
    /// These tests failed, in the order in which they ran.
    Failed(Vec<String>),
    /// It did not end.
    Hangs,
    /// It ended otherwise than by a test that failed.
    Broke(String),
}

/// The test programs of all rounds.
pub struct Programs(BTreeMap<(String, Option<String>), PathBuf>);

impl Programs {
    /// Builds them with all bugs in.
    pub fn build() -> Result<Self> {
        let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
        let mut cargo = tools::cargo();
        cargo.args(["test", "--no-run", "--message-format", "json-render-diagnostics"]);
        cargo.args(["--package", CORE, "--package", PLUGIN, "--lib"]);
        cargo.args(ROUNDS.iter().filter_map(|round| round.target).flat_map(|target| ["--test", target]));
        cargo.env("RUSTFLAGS", format!("{flags} --cfg interlock_bugs")).env_remove("CARGO_ENCODED_RUSTFLAGS");
        let out = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("cannot run cargo test")?;
        if !out.status.success() {
            bail!("the tests cannot be built with the seeded bugs in them ({})", out.status);
        }
        let lines = String::from_utf8_lossy(&out.stdout);
        let built = lines.lines().filter_map(|line| artifact(&serde_json::from_str(line).ok()?));
        let programs = Programs(built.collect());
        ROUNDS.iter().try_for_each(|round| programs.path(round).map(drop))?;
        Ok(programs)
    }

    fn path(&self, round: &Round) -> Result<&PathBuf> {
        let key = (round.package.to_owned(), round.target.map(str::to_owned));
        self.0.get(&key).with_context(|| format!("cargo built no program for {}", round.name))
    }

    /// Runs a round with that bug switched on, or with none.
    pub fn run(&self, round: &Round, bug: Option<Bug>) -> Result<Verdict> {
        let path = self.path(round)?;
        let mut command = Command::new(path);
        // One test after the other: the first to fail is the same every time, and other bugs run meanwhile.
        command.args(["--test-threads", "1"]).args(round.args);
        command.env_remove(VARIABLE).env("PROPTEST_CASES", PROPTEST_CASES).env("RUST_BACKTRACE", "0");
        command.envs(bug.map(|bug| (VARIABLE, format!("{bug:?}"))));
        let (ended, out) = run_for(&mut command, PATIENCE).with_context(|| format!("cannot run {}", path.display()))?;
        Ok(ended.map_or(Verdict::Hangs, |status| verdict(status, &out)))
    }
}

/// The test program that a message of Cargo's is about: its package and, of an integration test, its name.
fn artifact(message: &Value) -> Option<((String, Option<String>), PathBuf)> {
    let path = message["executable"].as_str().filter(|_| message["profile"]["test"] == true)?;
    let target = &message["target"];
    let name = target["name"].as_str()?.to_owned();
    let is_test = target["kind"].as_array()?.iter().any(|kind| kind == "test");
    // A library is named as its package is, but for the dashes.
    let library = name.replace('_', "-");
    let package = if is_test { CORE.to_owned() } else { library };
    Some(((package, is_test.then_some(name)), PathBuf::from(path)))
}

/// Runs a program, and ends it when its time is up. How it ended, if it did, and what it wrote.
fn run_for(command: &mut Command, patience: Duration) -> Result<(Option<ExitStatus>, String)> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut pipe = child.stdout.take().context("no pipe")?;
    let reader = thread::spawn(move || {
        let mut out = Vec::new();
        pipe.read_to_end(&mut out).map(|_| out)
    });
    let start = Instant::now();
    let ended = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > patience {
            child.kill()?;
            child.wait()?;
            break None;
        }
        thread::sleep(Duration::from_millis(10));
    };
    let out = reader.join().ok().context("reading its output panicked")??;
    Ok((ended, String::from_utf8_lossy(&out).into_owned()))
}

/// What the end and the output of Rust's test harness mean.
fn verdict(status: ExitStatus, out: &str) -> Verdict {
    let failed = |line: &str| Some(line.strip_prefix("test ")?.strip_suffix(" ... FAILED")?.to_owned());
    let failed: Vec<String> = out.lines().filter_map(failed).collect();
    let finished = out.lines().any(|line| line.starts_with("test result: "));
    match status.code() {
        Some(0) if finished => Verdict::Passed,
        // The code of a harness whose tests did not all pass.
        Some(101) if finished && !failed.is_empty() => Verdict::Failed(failed),
        _ => Verdict::Broke(status.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn only_a_test_that_failed_counts_as_a_failure() {
        let code = |code: i32| ExitStatus::from_raw(code << 8);
        let out =
            "\nrunning 2 tests\ntest a::b ... FAILED\ntest c ... ok\n\nfailures:\n\ntest result: FAILED. 1 passed";
        assert_eq!(verdict(code(101), out), Verdict::Failed(vec!["a::b".into()]));
        assert_eq!(verdict(code(0), "test c ... ok\n\ntest result: ok. 1 passed"), Verdict::Passed);
        assert!(matches!(verdict(code(101), "thread 'main' panicked"), Verdict::Broke(_)));
        assert!(matches!(verdict(code(0), ""), Verdict::Broke(_)), "it ran no tests");
        assert!(matches!(verdict(ExitStatus::from_raw(6), out), Verdict::Broke(_)), "it was killed");
    }

    #[test]
    fn what_does_not_end_is_ended() {
        let mut forever = Command::new("sleep");
        let (ended, _) = run_for(forever.arg("60"), Duration::from_millis(50)).unwrap();
        assert_eq!(ended, None);
    }

    #[test]
    fn programs_are_found_among_cargos_messages() {
        let message =
            |target: Value| serde_json::json!({ "executable": "/p", "profile": { "test": true }, "target": target });
        let key = |target| artifact(&message(target)).map(|(key, _)| key);
        let test = serde_json::json!({ "name": "scenarios", "kind": ["test"] });
        assert_eq!(key(test), Some((CORE.into(), Some("scenarios".into()))));
        let library = serde_json::json!({ "name": "interlock_core", "kind": ["lib"] });
        assert_eq!(key(library), Some((CORE.into(), None)));
    }
}
