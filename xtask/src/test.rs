//! `cargo xtask test`: every test there is, in stages, cheap ones first.
//!
//! A test target whose name begins with `envoy` needs a real Envoy, and one that begins with `wasm` the built plugin: both
//! run after the plugin has been built. All others need nothing but Cargo.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use interlock_testkit::tools;

use crate::conformance::Reports;
use crate::fuzz;
use crate::instructions::{self, InstructionsArgs};
use crate::mutants::{self, MutantsArgs};
use crate::sim;
use crate::wasm::{self, WasmArgs};

const CORE_TARGET: &str = "wasm32-unknown-unknown";
const RUNNER_VARIABLE: &str = "CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUNNER";

#[derive(Debug, Args)]
pub struct TestArgs {
    /// Run only this stage, with what it needs brought first; may be given several times
    #[arg(long, value_name = "STAGE")]
    only: Vec<Stage>,
    /// How long the soak takes, in seconds
    #[arg(long, default_value_t = 30)]
    soak_seconds: u32,
    /// How long each fuzz target runs, in seconds
    #[arg(long, default_value_t = 30)]
    fuzz_seconds: u32,
}

/// A part of the tests. In the order they run in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Stage {
    /// Bring the tools
    Tools,
    /// Everything that needs no Envoy, natively, doc tests too
    Native,
    /// How many instructions the hot path takes: a twentieth more than was stored fails
    Instructions,
    /// The seeded bugs, each of which a test must notice
    Mutants,
    /// The simulator: two million schedules of the lock table, from the same seeds each time
    Sim,
    /// The core's tests as wasm under Node
    Core,
    /// Each fuzz target for a short while
    Fuzz,
    /// Build the plugin
    Wasm,
    /// The plugin's file, and the plugin in a real Envoy
    Envoy,
    /// Mixed contended load for a short while
    Soak,
    /// A hundred faults in an authority and around it
    Chaos,
    /// One question of the bench, too briefly to tell anything but that it still measures what it says
    Bench,
    /// The demo, which fails when an act does not end as it must
    Demo,
    /// The demo of a mesh, likewise
    Mesh,
    /// The demo of locks in etcd, likewise
    Etcd,
}

pub fn run(args: &TestArgs) -> Result<()> {
    let wanted = |stage: &&Stage| args.only.is_empty() || args.only.contains(stage);
    let mut report = Vec::new();
    let mut failure = None;
    let cases = Reports::new()?;
    for stage in Stage::value_variants().iter().filter(wanted) {
        if failure.is_some() {
            report.push((*stage, "not run", Duration::ZERO));
            continue;
        }
        println!("\n== {}", stage.name());
        let start = Instant::now();
        let done = stage.run(args, &cases);
        report.push((*stage, if done.is_ok() { "ok" } else { "FAILED" }, start.elapsed()));
        failure = done.err().map(|e| e.context(format!("stage {}", stage.name())));
    }
    cases.print()?;
    println!("\n{:<12} {:<8} {:>8}", "stage", "result", "seconds");
    for (stage, result, took) in report {
        println!("{:<12} {result:<8} {:>8.1}", stage.name(), took.as_secs_f64());
    }
    failure.map_or(Ok(()), Err)
}

impl Stage {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn run(self, args: &TestArgs, cases: &Reports) -> Result<()> {
        match self {
            Stage::Tools => bring_tools(),
            Stage::Native => native(cases),
            Stage::Instructions => instructions::run(&InstructionsArgs::default()),
            Stage::Mutants => mutants::run(&MutantsArgs::default()),
            Stage::Sim => sim::sweep(2_000_000),
            Stage::Core => core(),
            Stage::Fuzz => fuzz::briefly(args.fuzz_seconds),
            Stage::Wasm => wasm::run(&WasmArgs::default()),
            Stage::Envoy => envoy(cases),
            Stage::Soak => itself(&["soak", "--no-build", "--seconds", &args.soak_seconds.to_string()]),
            // Faster than by hand, and so with fewer grants: something is wrong most of the time.
            Stage::Chaos => {
                itself(&["chaos", "--no-build", "--faults", "100", "--grants", "0", "--pace", "275", "--callers", "10"])
            }
            Stage::Bench => {
                wasm::make_bench_filters()?;
                itself(&["bench", "--no-build", "--quick", "--only", "cost", "--rounds", "1", "--millis", "200"])
            }
            Stage::Demo => itself(&["demo", "--no-build"]),
            Stage::Mesh => itself(&["demo", "mesh", "--no-build"]),
            Stage::Etcd => itself(&["demo", "etcd", "--no-build"]),
        }
    }
}

fn bring_tools() -> Result<()> {
    tools::rust_targets(&[wasm::TARGET, CORE_TARGET])?;
    println!("node: {}", tools::node()?.display());
    println!("envoy: {}", tools::envoy()?.display());
    println!("wasm-bindgen-test-runner: {}", tools::wasm_bindgen_test_runner()?.display());
    match tools::wasm_opt() {
        Some(path) => println!("wasm-opt: {}", path.display()),
        None => println!("wasm-opt: none, going on without it"),
    }
    Ok(())
}

fn native(cases: &Reports) -> Result<()> {
    let plain = test_targets()?.into_iter().filter(|name| !needs_plugin(name));
    let mut cargo = cases.cargo();
    // The search of the lease protocol goes through all of it here, and through a part where tests are run by hand.
    cargo.env("INTERLOCK_SEARCH", "whole").args(["test", "--workspace", "--lib", "--bins"]);
    tools::run(cargo.args(plain.flat_map(|name| ["--test".to_owned(), name])))?;
    tools::run(tools::cargo().args(["test", "--workspace", "--doc"]))
}

fn core() -> Result<()> {
    tools::rust_targets(&[CORE_TARGET])?;
    // The runner looks for node on PATH.
    tools::node()?;
    let mut cargo = tools::cargo();
    cargo.args(["test", "--package", "interlock-core", "--lib", "--tests", "--target", CORE_TARGET]);
    tools::run(cargo.env(RUNNER_VARIABLE, tools::wasm_bindgen_test_runner()?))
}

fn envoy(cases: &Reports) -> Result<()> {
    let mut cargo = cases.cargo();
    cargo.args(["test", "--package", "interlock", "--package", "interlock-testkit"]);
    let names = test_targets()?.into_iter().filter(|name| needs_plugin(name));
    cargo.args(names.flat_map(|name| ["--test".to_owned(), name])).env("ENVOY", tools::envoy()?);
    // They mostly wait for an Envoy: more of them at once than there are cores.
    cargo.args(["--", "--test-threads", "8"]);
    match tools::etcd().and_then(|etcd| Ok((etcd, tools::etcdctl()?))) {
        Ok((etcd, etcdctl)) => cargo.env("ETCD", etcd).env("ETCDCTL", etcdctl),
        Err(why) if why.is::<tools::Missing>() => {
            println!("skipped: what is tested with etcd: {why:#}");
            cargo.args(["--skip", "etcd"])
        }
        // What is named and not there is a mistake.
        Err(why) => return Err(why),
    };
    tools::run(&mut cargo)
}

/// Another command of this program, in a process of its own as a person's would be.
fn itself(args: &[&str]) -> Result<()> {
    tools::run(Command::new(std::env::current_exe()?).args(args).env("ENVOY", tools::envoy()?))
}

fn needs_plugin(test: &str) -> bool {
    test.starts_with("envoy") || test.starts_with("wasm")
}

/// The names of the test targets of every package of the workspace, as Cargo finds them by itself.
fn test_targets() -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for package in packages()? {
        let Ok(entries) = fs::read_dir(package.join("tests")) else { continue };
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "rs") || path.join("main.rs").is_file() {
                names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
            }
        }
    }
    Ok(names)
}

/// The folders of the workspace's packages.
fn packages() -> Result<Vec<PathBuf>> {
    let root = tools::root();
    let manifest = fs::read_to_string(root.join("Cargo.toml")).context("cannot read Cargo.toml")?;
    let members = manifest.split_once("members = [").and_then(|(_, rest)| rest.split_once(']'));
    let (members, _) = members.context("Cargo.toml has no list of members")?;
    let quoted = members.split('"').skip(1).step_by(2);
    Ok(quoted.map(|member| root.join(Path::new(member))).chain([root.clone()]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_targets_are_found_in_every_package() {
        let names = test_targets().unwrap();
        assert!(names.contains("envoy_plain") && names.contains("wasm_imports"), "{names:?}");
        assert!(packages().unwrap().iter().all(|package| package.join("Cargo.toml").is_file()));
    }
}
