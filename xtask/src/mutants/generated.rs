//! cargo-mutants over the core: every function's body replaced, every operator turned, and the quick tests run on each.
//!
//! By hand, since it takes hours. What it may change is in `.cargo/mutants.toml`; what survived, and why that is no
//! missing test, in `docs/testing-mutants.md`.

use std::process::Command;

use anyhow::Result;
use interlock_testkit::tools;

/// The tests that take no minutes. The property tests play few schedules, with other seeds each time: what they alone
/// would find, they must not be relied on to find.
const TESTS: [&str; 7] = ["--lib", "--test", "scenarios", "--test", "conformance", "--test", "lease"];

pub fn run(files: &[String]) -> Result<()> {
    let mut mutants = Command::new(tools::cargo_mutants()?);
    mutants.current_dir(tools::root()).args(["mutants", "--package", "interlock-core", "--jobs", "2"]);
    mutants.args(files.iter().flat_map(|file| ["--file", file]));
    tools::run(mutants.arg("--").args(TESTS))
}
