//! The simulator as a program: `cargo xtask sim` builds it optimised and runs it.

use std::process::ExitCode;

use clap::Parser;
use interlock_sim::cli::SimArgs;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask sim", bin_name = "cargo xtask sim")]
struct Cli {
    #[command(flatten)]
    args: SimArgs,
}

fn main() -> ExitCode {
    match interlock_sim::cli::main(&Cli::parse().args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
