//! `cargo xtask conformance`: the conformance cases on every target, and the table of what came of them.
//!
//! The tests run the cases and leave a report each; here the reports become one table. `cargo xtask test` prints the
//! same table from its own run, so that no case is run twice. No case is interpreted here.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;
use interlock_conformance::Report;
use interlock_conformance::report::{FOLDER, table};
use interlock_testkit::tools;
use tempfile::TempDir;

use crate::wasm::{self, WasmArgs};

#[derive(Debug, Args)]
pub struct ConformanceArgs {
    /// Take the plugin in dist/ as it is, instead of building it first
    #[arg(long)]
    no_build: bool,
}

/// The test that runs the cases against the core.
const CORE: [&str; 5] = ["test", "--package", "interlock-core", "--test", "conformance"];
/// The tests that run them as requests, and through the lease API.
const WIRE: [&str; 8] = ["test", "--package", "interlock", "--test", "envoy", "--", "wire::", "leased::"];
/// How many targets leave a report: the core on two layouts, the wire to a proxy with the locks and to one that asks for them,
/// the lease API.
const TARGETS: usize = 5;

pub fn run(args: &ConformanceArgs) -> Result<()> {
    let reports = Reports::new()?;
    let core = tools::run(reports.cargo().args(CORE));
    let built = if args.no_build { Ok(()) } else { wasm::run(&WasmArgs::default()) };
    let wire = built.and_then(|()| tools::run(reports.cargo().args(WIRE).env("ENVOY", tools::envoy()?)));
    let found = reports.print()?;
    core.and(wire)?;
    if found != TARGETS {
        bail!("{found} reports instead of {TARGETS}");
    }
    Ok(())
}

/// Where tests leave their reports.
pub struct Reports(TempDir);

impl Reports {
    /// None yet.
    pub fn new() -> Result<Self> {
        Ok(Reports(tempfile::Builder::new().prefix("interlock-conformance-").tempdir()?))
    }

    /// A Cargo whose tests leave theirs here.
    pub fn cargo(&self) -> Command {
        let mut cargo = tools::cargo();
        cargo.env(FOLDER, self.0.path());
        cargo
    }

    /// Prints the table of those that are here, and says how many.
    pub fn print(&self) -> Result<usize> {
        let mut reports = BTreeMap::new();
        for entry in std::fs::read_dir(self.0.path())? {
            let path = entry?.path();
            let text = std::fs::read_to_string(&path)?;
            let report: Report = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
            reports.insert(report.target.clone(), report);
        }
        let reports: Vec<Report> = reports.into_values().collect();
        if !reports.is_empty() {
            println!("\n== conformance\n{}", table(&reports));
        }
        Ok(reports.len())
    }
}
