//! One go of one target: libFuzzer's arguments, and what its log says.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use interlock_testkit::tools;

use super::{corpus, place, scratch};

/// How long one input may take, in seconds. The slowest takes milliseconds.
const LONGEST: u32 = 5;

/// How much memory a target may have, in MiB: what it keeps of coverage and corpus is most of it.
const MEMORY: u32 = 2048;

/// What became of one target.
#[derive(Clone, Debug)]
pub struct Report {
    pub target: String,
    executions: u64,
    per_second: u64,
    coverage: u64,
    new: u64,
    pub failure: Option<Failure>,
}

/// What a target found.
#[derive(Clone, Debug)]
pub struct Failure {
    what: String,
    artifact: Option<PathBuf>,
    log: PathBuf,
}

/// A target with what every run of it has.
pub fn command(programs: &Path, target: &str) -> Command {
    let mut command = Command::new(programs.join(target));
    command.args([format!("-timeout={LONGEST}"), format!("-rss_limit_mb={MEMORY}")]);
    command.env("ASAN_OPTIONS", "detect_odr_violation=0").env("RUST_BACKTRACE", "0");
    command
}

/// Lets a target run for a while, on from what earlier runs and the repository have.
pub fn go(programs: &Path, target: &str, length: Duration, seed: Option<u32>) -> Result<Report> {
    let artifacts = place(&scratch().join("artifacts"), target)?;
    let path = place(&scratch().join("logs"), target)?.join("last.log");
    let log = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut command = command(programs, target);
    command.arg(format!("-max_total_time={}", length.as_secs().max(1)));
    command.arg(format!("-artifact_prefix={}/", artifacts.display())).arg("-print_final_stats=1");
    command.args(seed.map(|seed| format!("-seed={seed}")));
    let dictionary = tools::root().join(format!("fuzz/dictionaries/{target}.dict"));
    if dictionary.is_file() {
        command.arg(format!("-dict={}", dictionary.display()));
    }
    command.arg(corpus::found(target)?).arg(corpus::kept(target)?);
    let status = command.stdin(std::process::Stdio::null()).stdout(log.try_clone()?).stderr(log).status();
    let status = status.with_context(|| format!("cannot run {target}"))?;
    let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
    let mut report = read(target, &text);
    if !status.success() {
        report.failure = Some(Failure { what: what(&text), artifact: artifact(&text), log: path });
    }
    Ok(report)
}

/// Runs a target on one file, with its output to be seen.
pub fn replay(programs: &Path, target: &str, file: &Path) -> Result<()> {
    let file = file.canonicalize().with_context(|| format!("cannot read {}", file.display()))?;
    tools::run(command(programs, target).arg(file).env("RUST_BACKTRACE", "1"))
}

fn read(target: &str, log: &str) -> Report {
    let stat = |name: &str| {
        let line = log.lines().find_map(|line| line.strip_prefix(&format!("stat::{name}:")));
        line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
    };
    let coverage = log.rsplit_once(" cov: ").and_then(|(_, rest)| rest.split(' ').next());
    Report {
        target: target.to_owned(),
        executions: stat("number_of_executed_units"),
        per_second: stat("average_exec_per_sec"),
        coverage: coverage.and_then(|value| value.parse().ok()).unwrap_or(0),
        new: stat("new_units_added"),
        failure: None,
    }
}

/// The words of a panic, else libFuzzer's own.
fn what(log: &str) -> String {
    let mut lines = log.lines().skip_while(|line| !line.contains("panicked at "));
    let place = lines.next().and_then(|line| line.split_once("panicked at ")).map(|(_, place)| place.to_owned());
    match (place, lines.next()) {
        (Some(place), words) => format!("{place} {}", words.unwrap_or_default()),
        (None, _) => {
            let error = log.lines().find(|line| line.contains("ERROR: "));
            error.or(log.lines().last()).unwrap_or("it ended without a word").to_owned()
        }
    }
}

/// The input that libFuzzer kept.
fn artifact(log: &str) -> Option<PathBuf> {
    log.lines().find_map(|line| line.split_once("Test unit written to ")).map(|(_, path)| PathBuf::from(path.trim()))
}

/// Tells what became of all.
pub fn print(reports: &[Report]) {
    println!("\n{:<12} {:>11} {:>8} {:>9} {:>11}  result", "target", "executions", "exec/s", "coverage", "new inputs");
    for report in reports {
        let Report { target, executions, per_second, coverage, new, failure } = report;
        let result = if failure.is_some() { "FAILED" } else { "ok" };
        println!("{target:<12} {executions:>11} {per_second:>8} {coverage:>9} {new:>11}  {result}");
    }
    for Report { target, failure, .. } in reports {
        let Some(Failure { what, artifact, log }) = failure else { continue };
        println!("\n{target}: {what}\n  log:    {}", log.display());
        if let Some(artifact) = artifact {
            println!("  input:  {}", artifact.display());
            println!("  replay: cargo xtask fuzz --target {target} --replay {}", artifact.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
INFO: Running with entropic power schedule (0xFF, 100).
#2	INITED cov: 12 ft: 13 corp: 1/1b exec/s: 0 rss: 50Mb
#222748	DONE   cov: 325 ft: 487 corp: 72/6335b lim: 1750 exec/s: 17134 rss: 108Mb
stat::number_of_executed_units: 222748
stat::average_exec_per_sec:     17134
stat::new_units_added:          168
";

    #[test]
    fn a_log_is_read() {
        let report = read("lock_header", LOG);
        let Report { executions, per_second, coverage, new, .. } = report;
        assert_eq!((executions, per_second, coverage, new), (222_748, 17_134, 325, 168));
    }

    #[test]
    fn a_crash_is_told_with_its_input() {
        let log = "x\nthread '<unnamed>' (7) panicked at fuzz/src/a.rs:1:5:\nnot so\nnote: run\n\
                   ==7== ERROR: libFuzzer: deadly signal\nartifact_prefix='/t/'; Test unit written to /t/crash-1\n";
        assert_eq!(what(log), "fuzz/src/a.rs:1:5: not so");
        assert_eq!(artifact(log), Some(PathBuf::from("/t/crash-1")));
        assert_eq!(
            what("==7== ERROR: libFuzzer: timeout after 6 seconds\n"),
            "==7== ERROR: libFuzzer: timeout after 6 seconds"
        );
    }
}
