//! `cargo xtask`: the one entry for people and CI. A module a command; what they share of tools is the testkit's.

mod bench;
mod chaos;
mod conformance;
mod crowd;
mod demo;
mod fuzz;
mod instructions;
mod lint;
mod manifests;
mod measure;
mod mutants;
mod oci;
mod run;
mod sim;
mod soak;
mod test;
mod wasm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, tests and shows Interlock.
///
/// Each command brings the tools it needs (Envoy, wasm-bindgen's test runner, cargo-fuzz, Rust targets; Debian packages where it runs
/// as root) and keeps them by version in the user's cache directory. What it can't bring it names, with the command that
/// would.
///
/// ENVOY names an Envoy to use instead; INTERLOCK_WASM and INTERLOCK_FAULTS_WASM name plugins to test instead of those
/// in dist/.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Show two services that deadlock through a real Envoy, and that do not with Interlock
    Demo(demo::DemoArgs),
    /// Run the conformance cases against the core and a real Envoy, and print what came of them
    Conformance(conformance::ConformanceArgs),
    /// Test everything: natively, as wasm under Node, and in a real Envoy
    Test(test::TestArgs),
    /// Play schedules that seeds make up, with every fault, and check all invariants after every step
    #[command(disable_help_flag = true)]
    Sim(sim::SimArgs),
    /// Put mixed contended load on a real Envoy and check what the upstream sees
    Soak(soak::SoakArgs),
    /// Kill, stop, cut off and confuse an authority and its sidecars, and check what a resource sees
    Chaos(chaos::ChaosArgs),
    /// Measure how soon an authority tells of deadlocks, hands locks over and ends leases
    Measure(measure::MeasureArgs),
    /// Measure what a lock costs, beside what others do instead
    Bench(bench::BenchArgs),
    /// Count the instructions of the hot path, and compare them with those that were stored
    Instructions(instructions::InstructionsArgs),
    /// Fill an Envoy up to the limits of its policy, and show what comes of it
    Crowd(crowd::CrowdArgs),
    /// Show that the tests notice bugs, each seeded one at a time
    Mutants(mutants::MutantsArgs),
    /// Fuzz what reads bytes from outside, with libFuzzer
    Fuzz(fuzz::FuzzArgs),
    /// Pack the plugin as the image that Istio loads: an OCI image layout in dist/oci
    Oci(oci::OciArgs),
    /// Check manifests for a mesh, with the policies in them, before a cluster gets them
    Manifests(manifests::ManifestsArgs),
    /// Check format, lints and docs, for every target
    Lint,
    /// Build the plugin: dist/interlock.wasm, and dist/interlock-faults.wasm for tests
    Wasm(wasm::WasmArgs),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Task::Demo(args) => demo::run(args),
        Task::Conformance(args) => conformance::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Sim(args) => sim::run(&args),
        Task::Soak(args) => soak::run(args),
        Task::Chaos(args) => chaos::run(args),
        Task::Measure(args) => measure::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Instructions(args) => instructions::run(&args),
        Task::Crowd(args) => crowd::run(&args),
        Task::Mutants(args) => mutants::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Oci(args) => oci::run(&args),
        Task::Manifests(args) => manifests::run(&args),
        Task::Lint => lint::run(),
        Task::Wasm(args) => wasm::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
