//! `cargo xtask soak`: mixed contended load through a real Envoy with two workers, and a judgement of everything that
//! caller and upstream saw.
//!
//! [`load`] draws what is asked, [`drive`] asks and serves it, [`judge`] takes the answers, [`ledger`] judges mutual exclusion and fences, [`answer`]
//! the refusals, [`lag`] knows how late the machine is, [`watch`] looks at Envoy from outside, [`stuck`] finds deadlocks that nobody was told of, [`report`] counts. No rule of Interlock is taken from its own code.

pub mod answer;
mod drive;
mod judge;
mod lag;
pub mod ledger;
mod load;
mod policy;
mod report;
mod stuck;
pub mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use interlock_testkit::{Envoy, Upstream, tools};
use tokio::task::JoinSet;

use crate::{run, wasm};
use drive::Driver;
use lag::SLACK;

/// Violations that are printed.
const SHOWN: usize = 10;

#[derive(Debug, Args)]
pub struct SoakArgs {
    /// How long, in minutes
    #[arg(long, conflicts_with = "seconds", default_value_t = 10)]
    minutes: u32,
    /// How long, in seconds
    #[arg(long)]
    seconds: Option<u32>,
    /// Draws the same load again; by default each soak draws its own
    #[arg(long)]
    seed: Option<u64>,
    /// How many clients ask at a time
    #[arg(long, default_value_t = 80, value_parser = clap::value_parser!(u32).range(1..=1000))]
    clients: u32,
    /// Use the plugin that is there instead of building it
    #[arg(long)]
    no_build: bool,
}

pub fn run(args: SoakArgs) -> Result<()> {
    if !args.no_build && std::env::var_os("INTERLOCK_WASM").is_none() {
        wasm::shipped()?;
    }
    // Before the clock runs: the first time this may download an Envoy.
    println!("Envoy: {}", tools::envoy()?.display());
    run::block_on(soak(&args))
}

async fn soak(args: &SoakArgs) -> Result<()> {
    let length = Duration::from_secs(args.seconds.unwrap_or(args.minutes.saturating_mul(60)).into());
    let seed = run::seed(args.seed);
    println!("soak for {length:?} with {} clients, seed {seed}", args.clients);
    // The upstream calls back through an Envoy that has to know the upstream first.
    let (driver_sender, driver) = tokio::sync::watch::channel(None::<Arc<Driver>>);
    let upstream = Upstream::forgetful(move |request| {
        let mut driver = driver.clone();
        async move {
            let known = driver.wait_for(Option::is_some).await.ok().and_then(|driver| (*driver).clone());
            match known {
                Some(driver) => driver.serve(request).await,
                None => interlock_testkit::Reply::new(500, "the soak is over"),
            }
        }
    })
    .await?;
    let envoy = Envoy::start(policy::envoy(upstream.address())).await?;
    let driver = Driver::new(envoy.base_url());
    driver_sender.send_replace(Some(Arc::clone(&driver)));

    let mut watchers = JoinSet::new();
    watchers.spawn(Arc::clone(&driver).probe());
    watchers.spawn(Arc::clone(&driver).look_for_cycles());
    let start = Instant::now();
    let mut clients = JoinSet::new();
    for client in 0..args.clients {
        clients.spawn(client_loop(Arc::clone(&driver), seed, client, start + length));
    }
    let samples = watch::memory(&envoy, length, |sample| tell(&driver, sample)).await?;
    while let Some(ended) = clients.join_next().await {
        ended.context("a client panicked")?;
    }
    let took = start.elapsed();
    watchers.shutdown().await;
    settle(&driver).await;
    let mut wrong = watch::aftermath(&envoy).await?;
    let stats = envoy.stats().await?;
    wrong.extend(both_workers(&stats));
    wrong.extend(driver.lock().numbers.against(|counter| watch::sum(&stats, counter)));
    wrong.extend(watch::growth(&samples));
    conclude(&driver, &samples, took, wrong, seed)
}

/// One client: one transaction after the other, each in the name of an owner of its own.
async fn client_loop(driver: Arc<Driver>, seed: u64, client: u32, end: Instant) {
    let mut rng = fastrand::Rng::with_seed(seed.wrapping_add(u64::from(client).wrapping_mul(0x9E37_79B9_7F4A_7C15)));
    let mut owner = (u128::from(client) + 1) << 64;
    while Instant::now() < end {
        owner += 1;
        driver.transaction(load::transaction(&mut rng), owner).await;
        tokio::time::sleep(Duration::from_micros(rng.u64(..10_000))).await;
    }
}

/// Until the upstream has seen the last of what was cut off.
async fn settle(driver: &Driver) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(20) {
        let undecided = driver.lock().ledger.undecided();
        if undecided == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut shared = driver.lock();
    let what = format!("{} requests are still at the upstream, 20 s after the load", shared.ledger.undecided());
    shared.ledger.violation(what);
}

/// Says how it goes, about once a minute.
fn tell(driver: &Driver, sample: &watch::Sample) {
    // Samples of a long soak are ten seconds apart.
    let seconds = sample.at.as_secs();
    if seconds >= 60 && seconds % 60 < 10 {
        let shared = driver.lock();
        let (requests, violations) = (shared.numbers.requests(), shared.ledger.violations().count);
        println!("{seconds:>6} s: {requests} requests, {violations} violations, {} MiB", sample.resident >> 20);
    }
}

/// Whether both workers had a part in it.
fn both_workers(stats: &BTreeMap<String, u64>) -> Option<String> {
    let connections = |worker: &str| -> u64 {
        let of = |(name, _): &(&String, &u64)| name.contains(worker) && name.ends_with(".downstream_cx_total");
        stats.iter().filter(of).map(|(_, value)| value).sum()
    };
    let (zero, one) = (connections(".worker_0."), connections(".worker_1."));
    println!("connections: {zero} to one worker, {one} to the other");
    (zero == 0 || one == 0).then(|| "one worker had nothing to do".to_owned())
}

fn conclude(driver: &Driver, samples: &[watch::Sample], took: Duration, wrong: Vec<String>, seed: u64) -> Result<()> {
    let shared = driver.lock();
    let tally = shared.ledger.tally();
    shared.numbers.print(&tally, took);
    let millis = |quantile: f64| shared.lag.quantile(quantile) as f64 / 1000.0;
    let (half, most, all) = (millis(0.5), millis(0.99), millis(1.0));
    println!("The machine: a request without locks takes {half:.1} ms (p50), {most:.1} ms (p99), {all:.1} ms (max)");
    println!("  deadlines passed by more than {SLACK:?}, while the machine was as late: {}", shared.lag.excused);
    watch::print(samples);
    let mut missing = shared.numbers.missing(&tally, took);
    if most > SLACK.as_secs_f64() * 1000.0 {
        missing.push(format!("deadlines: one request without locks in a hundred took {most:.0} ms and more"));
    }
    let violations = shared.ledger.violations();
    println!("violations: {}, of Envoy: {}, not shown: {}", violations.count, wrong.len(), missing.len());
    let failures = violations.first.iter().take(SHOWN).chain(&wrong).chain(&missing);
    for (number, failure) in failures.enumerate() {
        println!("\n{}. {failure}", number + 1);
    }
    let count = violations.count + (wrong.len() + missing.len()) as u64;
    if count > 0 {
        bail!("the soak failed in {count} ways; --seed {seed} draws the same load again");
    }
    Ok(())
}
