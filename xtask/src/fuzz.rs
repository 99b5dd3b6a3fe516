//! `cargo xtask fuzz`: the fuzz targets under libFuzzer. What a target does is in `fuzz/src`; here they are built, given time, and
//! what became of them is told.
//!
//! [`mod@run`] is one go of one target, [`corpus`] what is kept of it in the repository.

mod corpus;
mod run;

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use interlock_testkit::tools;

use run::Report;

#[derive(Debug, Args)]
pub struct FuzzArgs {
    /// How long in all, in minutes; the targets share it
    #[arg(long, conflicts_with = "seconds", default_value_t = 10)]
    minutes: u32,
    /// How long each target, in seconds
    #[arg(long)]
    seconds: Option<u32>,
    /// Only this target; may be given several times
    #[arg(long = "target", value_name = "NAME")]
    targets: Vec<String>,
    /// How many targets run at a time
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    jobs: u16,
    /// The seed of libFuzzer's own choices; another one each time if not given
    #[arg(long)]
    seed: Option<u32>,
    /// Run one target on this file, and do no more
    #[arg(long, value_name = "FILE", requires = "targets")]
    replay: Option<PathBuf>,
    /// Put the new inputs that cover more into the corpus of the repository
    #[arg(long)]
    keep: bool,
    /// Write the seeds of the corpus anew, and drop what covers nothing of its own
    #[arg(long, conflicts_with_all = ["replay", "keep"])]
    seed_corpus: bool,
}

/// What the stage of `cargo xtask test` does.
pub fn briefly(seconds: u32) -> Result<()> {
    let args = FuzzArgs {
        minutes: 0,
        seconds: Some(seconds),
        targets: Vec::new(),
        jobs: 2,
        // The same way each time, as far as the time goes: a test that fails now and then tells nobody anything. New ways are
        // for longer runs.
        seed: Some(1),
        replay: None,
        keep: false,
        seed_corpus: false,
    };
    run(&args)
}

pub fn run(args: &FuzzArgs) -> Result<()> {
    let targets = chosen(&args.targets)?;
    if args.seed_corpus {
        tools::run(tools::cargo().args(["run", "--quiet", "--package", "interlock-fuzz", "--example", "seed_corpus"]))?;
    }
    let programs = build()?;
    if args.seed_corpus {
        return targets.iter().try_for_each(|target| corpus::minimise(&programs, target));
    }
    if let Some(file) = &args.replay {
        return targets.iter().try_for_each(|target| run::replay(&programs, target, file));
    }
    let jobs = usize::from(args.jobs).min(targets.len());
    let length = args.seconds.map_or_else(
        || {
            Duration::from_secs(u64::from(args.minutes) * 60) * u32::from(args.jobs)
                / u32::try_from(targets.len()).unwrap_or(1)
        },
        |seconds| Duration::from_secs(seconds.into()),
    );
    println!("{} targets for {length:.0?} each, {jobs} at a time", targets.len());
    let reports = all(&programs, &targets, length, jobs, args.seed)?;
    run::print(&reports);
    if args.keep {
        targets.iter().try_for_each(|target| corpus::keep(&programs, target))?;
    }
    let failed: Vec<&str> =
        reports.iter().filter(|report| report.failure.is_some()).map(|report| report.target.as_str()).collect();
    if failed.is_empty() { Ok(()) } else { bail!("fuzzing found something: {}", failed.join(", ")) }
}

/// Runs the targets, so many at a time.
fn all(programs: &Path, targets: &[String], length: Duration, jobs: usize, seed: Option<u32>) -> Result<Vec<Report>> {
    let waiting = Mutex::new(targets.iter().collect::<VecDeque<_>>());
    let next = || waiting.lock().ok().and_then(|mut waiting| waiting.pop_front());
    let worker = || {
        let mut reports = Vec::new();
        while let Some(target) = next() {
            reports.push(run::go(programs, target, length, seed)?);
        }
        Ok::<_, anyhow::Error>(reports)
    };
    let mut reports = thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(worker)).collect();
        let done = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|_| bail!("a worker ended early")));
        done.collect::<Result<Vec<_>>>()
    })?
    .concat();
    reports.sort_by(|a, b| a.target.cmp(&b.target));
    Ok(reports)
}

/// The folder of libFuzzer's targets.
fn folder() -> PathBuf {
    tools::root().join("fuzz/libfuzzer")
}

/// Where everything goes that is not kept in the repository.
fn scratch() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    tools::root().join(target).join("fuzz")
}

/// A folder of a target, made if it is not there.
fn place(parent: &Path, target: &str) -> Result<PathBuf> {
    let place = parent.join(target);
    fs::create_dir_all(&place).with_context(|| format!("cannot make {}", place.display()))?;
    Ok(place)
}

/// The names of all targets, or those that were asked for.
fn chosen(names: &[String]) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder().join("fuzz_targets")).context("cannot list the fuzz targets")? {
        all.extend(entry?.path().file_stem().map(|name| name.to_string_lossy().into_owned()));
    }
    all.sort();
    match names.iter().find(|name| !all.contains(name)) {
        Some(unknown) => bail!("there is no target {unknown}; there are {}", all.join(", ")),
        None if names.is_empty() => Ok(all),
        None => Ok(names.to_vec()),
    }
}

/// Builds all targets with the nightly compiler, and says where they are.
fn build() -> Result<PathBuf> {
    let cargo_fuzz = tools::cargo_fuzz()?;
    let mut nightly: Command = tools::nightly(&cargo_fuzz)?;
    // What is fuzzed has the dependencies of what ships. Cargo adds libFuzzer to them.
    let (ours, lock) = (tools::root().join("Cargo.lock"), folder().join("Cargo.lock"));
    let written = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified()).ok();
    if written(&lock) < written(&ours) {
        fs::copy(&ours, &lock).with_context(|| format!("cannot write {}", lock.display()))?;
    }
    let target = scratch().join("build");
    let host = tools::host_target()?;
    nightly.args(["build", "--fuzz-dir"]).arg(folder()).arg("--target-dir").arg(&target).args(["--target", &host]);
    tools::run(&mut nightly)?;
    Ok(target.join(host).join("release"))
}
