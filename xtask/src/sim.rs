//! `cargo xtask sim`: builds the simulator with its own optimised profile and runs it. What it does is its own business.

use std::ffi::OsString;

use anyhow::Result;
use clap::Args;
use interlock_testkit::tools;

#[derive(Debug, Args)]
pub struct SimArgs {
    /// What the simulator takes: --help lists it
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<OsString>,
}

pub fn run(args: &SimArgs) -> Result<()> {
    let mut cargo = tools::cargo();
    cargo.args(["run", "--quiet", "--profile", "sim", "--package", "interlock-sim", "--"]);
    tools::run(cargo.args(&args.args))
}

/// Plays so many schedules of each kind, as the tests do.
pub fn sweep(schedules: u64) -> Result<()> {
    run(&SimArgs { args: vec!["--schedules".into(), schedules.to_string().into()] })
}
