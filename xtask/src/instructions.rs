//! `cargo xtask instructions`: how many instructions each part of the hot path takes, by callgrind, beside what it took when that was
//! last stored.
//!
//! What the parts are is in `bench/hot`. Counts don't depend on what else the machine does; they do depend on the compiler, which the baseline
//! names: with another one they are told, and not judged.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use interlock_testkit::tools;
use serde::{Deserialize, Serialize};

#[derive(Debug, Default, Args)]
pub struct InstructionsArgs {
    /// Store what is counted as the baseline
    #[arg(long)]
    store: bool,
}

/// How much more than the baseline is too much, and how much less is worth storing.
const PERCENT: u64 = 5;

/// What was counted, and on what.
#[derive(Debug, Serialize, Deserialize)]
struct Baseline {
    /// The compiler and the target, as rustc says.
    compiler: String,
    instructions: BTreeMap<String, u64>,
}

pub fn run(args: &InstructionsArgs) -> Result<()> {
    let valgrind = match tools::of_debian("VALGRIND", "valgrind", "valgrind") {
        Ok(valgrind) => valgrind,
        Err(why) => {
            println!("skipped: instruction counts: {}", why.downcast::<tools::Missing>()?);
            return Ok(());
        }
    };
    let counted = counts(&valgrind)?;
    let file = tools::root().join("bench/hot/instructions.json");
    let compiler = compiler()?;
    if args.store {
        let instructions = counted.into_iter().collect();
        let mut text = serde_json::to_string_pretty(&Baseline { compiler, instructions })?;
        text.push('\n');
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
        println!("stored in bench/hot/instructions.json");
        return Ok(());
    }
    let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let baseline: Baseline = serde_json::from_slice(&text).with_context(|| format!("{}", file.display()))?;
    let verdict = compare(&counted, &baseline.instructions);
    println!("{}", verdict.table);
    if compiler != baseline.compiler {
        println!("not judged: the baseline is of {}, and this is {compiler}; {STORE}", baseline.compiler);
        return Ok(());
    }
    if !verdict.better.is_empty() {
        println!("more than {PERCENT} % fewer instructions: {}; {STORE}", verdict.better.join(", "));
    }
    if !verdict.worse.is_empty() {
        bail!("more than {PERCENT} % more instructions: {}; if that is meant, {STORE}", verdict.worse.join(", "));
    }
    ensure!(verdict.unknown.is_empty(), "only here or only in the baseline: {}; {STORE}", verdict.unknown.join(", "));
    Ok(())
}

const STORE: &str = "store it: cargo xtask instructions --store";

/// The instructions of each part, in order.
fn counts(valgrind: &Path) -> Result<Vec<(String, u64)>> {
    let program = build()?;
    let names = said(&mut Command::new(&program))?;
    let names: Vec<&str> = names.lines().collect();
    let dir = tempfile::Builder::new().prefix("interlock-callgrind-").tempdir()?;
    let (next, counts) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || -> Result<()> {
        loop {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(name) = names.get(place) else { return Ok(()) };
            let count = count(valgrind, &program, place, dir.path()).with_context(|| (*name).to_owned())?;
            counts.lock().map_err(|_| anyhow::anyhow!("a thread panicked"))?.push((place, (*name).to_owned(), count));
        }
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|_| bail!("a thread panicked")))
    })?;
    let mut counts = counts.into_inner().unwrap_or_default();
    counts.sort_unstable();
    Ok(counts.into_iter().map(|(_, name, count)| (name, count)).collect())
}

/// Builds the program that does the parts.
fn build() -> Result<PathBuf> {
    const PROFILE: &str = "instructions";
    let mut cargo = tools::cargo();
    cargo.args(["build", "--quiet", "--package", "bench-hot", "--bin", "instructions", "--profile", PROFILE]);
    // What somebody sets for their own machine would be counted too.
    tools::run(cargo.env_remove("RUSTFLAGS"))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| "target".into(), PathBuf::from);
    Ok(tools::root().join(target).join(PROFILE).join("instructions"))
}

/// The compiler and its target.
fn compiler() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = said(Command::new(rustc).arg("--version").current_dir(tools::root()))?;
    Ok(format!("{} for {}", version.trim(), tools::host_target()?))
}

fn said(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = command.output().with_context(|| format!("cannot run {name}"))?;
    ensure!(out.status.success(), "{name} failed: {}", String::from_utf8_lossy(&out.stderr));
    Ok(String::from_utf8(out.stdout)?)
}

fn count(valgrind: &Path, program: &Path, place: usize, dir: &Path) -> Result<u64> {
    let out = dir.join(place.to_string());
    let mut command = Command::new(valgrind);
    command.args(["--tool=callgrind", "--quiet", "--toggle-collect=*counted_by_callgrind*"]);
    command.arg(format!("--callgrind-out-file={}", out.display())).arg(program).arg(place.to_string());
    // The C library's moving of bytes is chosen by what the processor can do: everywhere the same one.
    command.env("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX2_Usable,-AVX2,-AVX512F,-AVX512VL,-ERMS,-FSRM");
    let done = command.output().context("cannot run valgrind")?;
    ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    summary(&fs::read_to_string(&out).context("callgrind wrote nothing")?)
}

fn summary(profile: &str) -> Result<u64> {
    let line = profile.lines().find_map(|line| line.strip_prefix("summary: "));
    let count = line.context("callgrind's file has no summary")?.trim().parse()?;
    ensure!(count > 0, "nothing was counted");
    Ok(count)
}

struct Verdict {
    table: String,
    worse: Vec<String>,
    better: Vec<String>,
    /// In one of the two only.
    unknown: Vec<String>,
}

fn compare(counted: &[(String, u64)], baseline: &BTreeMap<String, u64>) -> Verdict {
    let mut table = format!("{:<48} {:>12} {:>12} {:>8}", "instructions", "stored", "now", "change");
    let (mut worse, mut better, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
    for (name, now) in counted {
        let Some(before) = baseline.get(name) else {
            table += &format!("\n{name:<48} {:>12} {now:>12}", "none");
            unknown.push(name.clone());
            continue;
        };
        let change = *now as f64 / *before as f64 - 1.0;
        table += &format!("\n{name:<48} {before:>12} {now:>12} {:>6.1} %", change * 100.0);
        if now * 100 > before * (100 + PERCENT) {
            worse.push(name.clone());
        } else if now * 100 < before * (100 - PERCENT) {
            better.push(name.clone());
        }
    }
    unknown.extend(baseline.keys().filter(|name| !counted.iter().any(|(known, _)| known == *name)).cloned());
    Verdict { table, worse, better, unknown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_a_twentieth_more_is_too_much() {
        let stored = [("a", 1000), ("b", 1000), ("c", 1000), ("d", 1000), ("gone", 1)];
        let stored = stored.map(|(name, count)| (name.to_owned(), count)).into();
        let now = [("a", 1050), ("b", 1051), ("c", 950), ("d", 949), ("new", 1)];
        let verdict = compare(&now.map(|(name, count)| (name.to_owned(), count)), &stored);
        assert_eq!((verdict.worse, verdict.better), (vec!["b".to_owned()], vec!["d".to_owned()]));
        assert_eq!(verdict.unknown, ["new", "gone"]);
        assert_eq!(verdict.table.lines().count(), 6);
    }

    #[test]
    fn callgrind_tells_a_sum() {
        assert_eq!(summary("version: 1\nevents: Ir\nsummary: 47549\n\ntotals: 47549\n").unwrap(), 47549);
        assert!(summary("events: Ir\nsummary: 0\n").is_err() && summary("").is_err());
    }
}
