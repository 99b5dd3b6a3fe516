//! What the simulator is asked for on the command line, and what it prints.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::run::{Ran, Scenario, Script, Until, run};
use crate::shrink::shrink;
use crate::state::Plant;
use crate::world::Yard;

/// How `cargo xtask sim` is called.
#[derive(Debug, Args)]
pub struct SimArgs {
    /// The first seed; with nothing else, this one alone is played and its trace is printed
    #[arg(long)]
    pub seed: Option<u64>,
    /// For how long, in minutes
    #[arg(long, value_name = "M", conflicts_with = "schedules")]
    pub minutes: Option<f64>,
    /// How many schedules; of the dearer scenarios one twentieth, unless one is named
    #[arg(long, value_name = "N")]
    pub schedules: Option<u64>,
    /// What to simulate; everything if not given
    #[arg(long)]
    pub scenario: Option<Scenario>,
    /// On how many threads; one a core if not given
    #[arg(long)]
    pub threads: Option<usize>,
}

/// One in so many schedules is of each of the dearer scenarios.
const SHARE: u64 = 20;

/// Does what was asked for.
///
/// # Errors
/// A schedule that violates an invariant, or a run in which something never happened.
pub fn main(args: &SimArgs) -> Result<()> {
    // What the code under test says when it panics is told with the violation.
    std::panic::set_hook(Box::new(|_| {}));
    let first = args.seed.unwrap_or(1);
    if args.seed.is_some() && args.minutes.is_none() && args.schedules.is_none() {
        return replay(args.scenario.unwrap_or(Scenario::Core), first);
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or(cores);
    let scenarios = args.scenario.map_or_else(|| Scenario::value_variants().to_vec(), |scenario| vec![scenario]);
    let parts = u32::try_from(scenarios.len()).unwrap_or(1);
    for scenario in scenarios {
        let until = match (args.minutes, args.schedules.unwrap_or(1_000_000)) {
            (Some(minutes), _) => Until::Elapsed(Duration::from_secs_f64(minutes * 60.0) / parts),
            (None, all) if parts == 1 || scenario == Scenario::Core => Until::Schedules(all),
            (None, all) => Until::Schedules(all / SHARE),
        };
        let began = Instant::now();
        let ran = run(scenario, first, until, threads);
        tell(scenario, &ran, began.elapsed())?;
    }
    Ok(())
}

/// Prints what happened.
fn tell(scenario: Scenario, ran: &Ran, took: Duration) -> Result<()> {
    println!("\n== {scenario:?}");
    for (what, count) in ran.counts.of(scenario.parts()) {
        println!("{count:>14}  {what}");
    }
    let seconds = took.as_secs_f64();
    let schedules = u32::try_from(ran.counts.schedules).map_or(f64::MAX, f64::from);
    println!("{:>14}  digest", format!("{:016x}", ran.digest));
    println!("{:>14.0}  schedules a second, for {seconds:.1} s", schedules / seconds.max(0.001));
    if let Some((seed, violation)) = &ran.failed {
        println!("\nseed {seed} violates: {violation}");
        explain(scenario, *seed);
        bail!("seed {seed} violates an invariant");
    }
    let missing = ran.counts.missing(scenario.parts());
    if !missing.is_empty() {
        bail!("in this run there were no {}", missing.join(", no "));
    }
    Ok(())
}

/// Prints the short schedule that a failing seed comes down to.
fn explain(scenario: Scenario, seed: u64) {
    let Some((short, violation)) = shrink(&Script::make(scenario, seed), Plant::Nothing) else {
        println!("it does not fail again by itself");
        return;
    };
    println!("\nshrunk: {short}violates: {violation}\n\ntrace:");
    let played = short.play(&mut Yard::new(), true, Plant::Nothing);
    played.trace.lines().iter().for_each(|line| println!("{line}"));
    let name = format!("{scenario:?}").to_lowercase();
    println!("\nreplay: cargo xtask sim --scenario {name} --seed {seed}");
}

/// Plays one seed and prints everything that happens.
fn replay(scenario: Scenario, seed: u64) -> Result<()> {
    let script = Script::make(scenario, seed);
    println!("{script}");
    let played = script.play(&mut Yard::new(), true, Plant::Nothing);
    played.trace.lines().iter().for_each(|line| println!("{line}"));
    println!("digest {:016x}", played.trace.digest());
    if let Some(violation) = played.violation {
        println!("\nviolates: {violation}");
        explain(scenario, seed);
        bail!("seed {seed} violates an invariant");
    }
    println!("no violation");
    Ok(())
}
