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
    package: Package,
    /// None: the unit tests of the package's library.
    target: Option<&'static str>,
    args: &'static [&'static str],
}

/// A package of the workspace: its name and its folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Package {
    name: &'static str,
    folder: &'static str,
}

const CORE: Package = Package { name: "interlock-core", folder: "core" };
const PLUGIN: Package = Package { name: "interlock", folder: "" };

/// The unit tests of the plugin that take seconds, because they go through hundreds of schedules.
const LONG: [&str; 2] = ["filter::tests::storm::", "nothing_is_lost_whichever_shared_data_calls_fail"];

/// All rounds, by what they cost. The last ones are for what nothing else finds.
const ROUNDS: [Round; 8] = [
    Round { name: "scenarios", package: CORE, target: Some("scenarios"), args: &[] },
    Round { name: "lease", package: CORE, target: Some("lease"), args: &[] },
    Round { name: "core-units", package: CORE, target: None, args: &[] },
    Round { name: "conformance", package: CORE, target: Some("conformance"), args: &[] },
    Round { name: "plugin-units", package: PLUGIN, target: None, args: &["--skip", LONG[0], "--skip", LONG[1]] },
    Round { name: "properties", package: CORE, target: Some("properties"), args: &[] },
    Round { name: "plugin-storms", package: PLUGIN, target: None, args: &LONG },
    // The smallest search, with leases and waits that end.
    Round { name: "model", package: CORE, target: Some("model"), args: &["all_states_with_time_and_all_places"] },
];

/// The rounds of these names; all where none is named.
pub fn rounds(names: &[String]) -> Result<Vec<Round>> {
    let is_round = |name: &&String| ROUNDS.iter().any(|round| round.name == **name);
    if let Some(name) = names.iter().find(|name| !is_round(name)) {
        bail!("there is no round {name}; there are {}", ROUNDS.map(|round| round.name).join(", "));
    }
    let wanted = |round: &&Round| names.is_empty() || names.iter().any(|name| name == round.name);
    Ok(ROUNDS.iter().filter(wanted).copied().collect())
}

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

/// The test programs of rounds: by the manifest of their package and, of an integration test, by its name.
pub struct Programs(BTreeMap<(PathBuf, Option<String>), PathBuf>);

impl Programs {
    /// Builds them with all bugs in.
    pub fn build(rounds: &[Round]) -> Result<Self> {
        let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
        let mut cargo = tools::cargo();
        cargo.args(["test", "--no-run", "--message-format", "json-render-diagnostics"]);
        cargo.args(rounds.iter().flat_map(|round| ["--package", round.package.name]));
        cargo.args(rounds.iter().filter_map(|round| round.target).flat_map(|target| ["--test", target]));
        cargo.args(rounds.iter().any(|round| round.target.is_none()).then_some("--lib"));
        cargo.env("RUSTFLAGS", format!("{flags} --cfg interlock_bugs")).env_remove("CARGO_ENCODED_RUSTFLAGS");
        let out = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("cannot run cargo test")?;
        if !out.status.success() {
            bail!("the tests cannot be built with the seeded bugs in them ({})", out.status);
        }
        let lines = String::from_utf8_lossy(&out.stdout);
        let built = lines.lines().filter_map(|line| artifact(&serde_json::from_str(line).ok()?));
        let programs = Programs(built.collect());
        rounds.iter().try_for_each(|round| programs.path(round).map(drop))?;
        Ok(programs)
    }

    fn path(&self, round: &Round) -> Result<&PathBuf> {
        let manifest = tools::root().join(round.package.folder).join("Cargo.toml");
        let program = self.0.get(&(manifest, round.target.map(str::to_owned)));
        program.with_context(|| format!("cargo built no program for {}", round.name))
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

/// The test program that a message of Cargo's is about, and what it is found by.
fn artifact(message: &Value) -> Option<((PathBuf, Option<String>), PathBuf)> {
    let path = message["executable"].as_str().filter(|_| message["profile"]["test"] == true)?;
    let manifest = PathBuf::from(message["manifest_path"].as_str()?);
    let target = &message["target"];
    let is_test = target["kind"].as_array()?.iter().any(|kind| kind == "test");
    let name = target["name"].as_str().filter(|_| is_test).map(str::to_owned);
    Some(((manifest, name), PathBuf::from(path)))
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

    use serde_json::json;

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
        let key = |kind: &str| {
            let target = json!({ "name": "scenarios", "kind": [kind] });
            let profile = json!({ "test": true });
            artifact(
                &json!({ "executable": "/p", "profile": profile, "target": target, "manifest_path": "/w/Cargo.toml" }),
            )
        };
        let manifest = PathBuf::from("/w/Cargo.toml");
        assert_eq!(key("test"), Some(((manifest.clone(), Some("scenarios".into())), "/p".into())));
        assert_eq!(key("lib"), Some(((manifest, None), "/p".into())));
        assert_eq!(artifact(&json!({ "reason": "build-finished" })), None);
    }

    #[test]
    fn rounds_are_chosen_by_name() {
        assert_eq!(rounds(&[]).unwrap().len(), ROUNDS.len());
        assert_eq!(rounds(&["model".into()]).unwrap().iter().map(|round| round.name).collect::<Vec<_>>(), ["model"]);
        assert!(rounds(&["modal".into()]).is_err());
        let there = |round: &Round| tools::root().join(round.package.folder).join("Cargo.toml").is_file();
        assert!(ROUNDS.iter().all(there));
    }
}
