//! `cargo xtask demo`: the bank of examples/bank behind a real Envoy, in three acts, each with checks of its own. What is
//! shown is what happened: every line comes from a client, a service or Envoy; nothing here knows how an act will end.

mod bank;
mod cast;
mod clients;
mod etcd;
mod mesh;
mod screen;
mod services;
mod tally;

use std::time::Duration;

use ::bank::client::{Outcome, Retry};
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use interlock_testkit::{EnvoyConfig, tools};
use serde_json::json;

use self::bank::Bank;
use self::cast::Job;
use self::screen::Screen;
use self::tally::Tally;
use crate::{run, wasm};

/// What each account opens with, in cents.
const OPENING: u64 = 100_000;
/// Nobody tries again: what happens to a transfer is what happens to its only try.
const ONCE: Retry = Retry { attempts: 1, pause: Duration::ZERO, max_pause: Duration::ZERO };
/// As a careful client does it.
const PATIENTLY: Retry =
    Retry { attempts: 100, pause: Duration::from_millis(20), max_pause: Duration::from_millis(320) };

/// One act: what it counted, and what went against expectation.
struct Act {
    title: &'static str,
    tally: Tally,
    failures: Vec<String>,
}

impl Act {
    fn new(title: &'static str, tally: Tally) -> Self {
        let failures = tally.surprises.clone();
        Act { title, tally, failures }
    }

    fn check(&mut self, holds: bool, otherwise: impl Into<String>) {
        if !holds {
            self.failures.push(otherwise.into());
        }
    }
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct DemoArgs {
    #[command(subcommand)]
    scene: Option<Scene>,
    /// How often every account pays every other one; all transfers start at once
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8))]
    rounds: u8,
    /// Use the plugin that is there instead of building it
    #[arg(long)]
    no_build: bool,
}

#[derive(Debug, Subcommand)]
enum Scene {
    /// Four services with a sidecar each and an authority: a deadlock across all four, an authority that is killed, and a
    /// writer that comes too late
    Mesh {
        /// Use the plugin that is there instead of building it
        #[arg(long)]
        no_build: bool,
    },
    /// Two services with a sidecar each, and their locks in an etcd of three members: a deadlock, and members that are killed
    Etcd {
        /// Use the plugin that is there instead of building it
        #[arg(long)]
        no_build: bool,
    },
}

/// Builds the plugin and plays the three acts.
///
/// # Errors
/// When something could not be built or started, or an act did not go as it must.
pub fn run(args: DemoArgs) -> Result<()> {
    let no_build = match args.scene {
        Some(Scene::Mesh { no_build } | Scene::Etcd { no_build }) => no_build,
        None => args.no_build,
    };
    if !no_build && std::env::var_os("INTERLOCK_WASM").is_none() {
        wasm::shipped()?;
    }
    // Before the curtain: the first time this may download an Envoy.
    println!("Envoy: {}", tools::envoy()?.display());
    match args.scene {
        Some(Scene::Mesh { .. }) => mesh::play(),
        Some(Scene::Etcd { .. }) => etcd::play(),
        None => play(usize::from(args.rounds)),
    }
}

fn play(rounds: usize) -> Result<()> {
    run::block_on(async {
        let screen = Screen::new();
        let jobs = cast::load(rounds);
        let mut acts = Vec::new();
        for act in 1..=3 {
            let played = match act {
                1 => off(&screen, &jobs).await,
                2 => on(&screen, &jobs).await,
                _ => ordered(&screen).await,
            };
            let played = played.with_context(|| format!("act {act} could not be played"))?;
            screen.verdict(&played.failures);
            acts.push(played);
        }
        screen.table(acts.iter().map(|act| (act.title, &act.tally, act.failures.is_empty())));
        let failed = acts.iter().filter(|act| !act.failures.is_empty()).count();
        if failed > 0 {
            bail!("{failed} of {} acts did not go as they must", acts.len());
        }
        Ok(())
    })
}

/// Act 1: the services have locks of their own, and nobody sees across them.
async fn off(screen: &Screen, jobs: &[Job]) -> Result<Act> {
    screen.act(
        "Act 1: Interlock off",
        &[
            "The accounts service locks the account that pays, debits it, and keeps it locked until the other",
            "one is credited. Transfers that run against each other all start at once:",
        ],
    );
    let config = EnvoyConfig::local().patch_policy(|policy| policy["enforcement"] = json!("off"));
    let mut bank = Bank::open(config, OPENING).await?;
    let tally = bank.run(screen, jobs, ONCE).await?;
    let balances = bank.client.balances().await?;
    screen.balances(&balances, "set aside for transfers that nobody can answer for");
    let mut act = Act::new("1 Interlock off", tally);
    act.check(act.tally.blocked >= 2, "no two transfers blocked each other");
    act.check(act.tally.timed_out >= 2, "no two transfers timed out");
    act.check(act.tally.refused.is_empty(), "requests were refused although Interlock is off");
    Ok(act)
}

/// Act 2: the same services, the same load, the policy as it ships.
async fn on(screen: &Screen, jobs: &[Job]) -> Result<Act> {
    screen.act(
        "Act 2: Interlock on, as envoy/local.yaml ships it",
        &[
            "The same services and the same transfers. Each hop is locked in the proxy, by rule; who is refused",
            "undoes its debit and tries again after a short, jittered pause. t1 ─lock→ t2 says that t1 would wait for the",
            "lock, which t2 has or stands in line for before it:",
        ],
    );
    let mut bank = Bank::open(EnvoyConfig::local(), OPENING).await?;
    let tally = bank.run(screen, jobs, PATIENTLY).await?;
    let balances = bank.client.balances().await?;
    screen.balances(&balances, "set aside");
    let mut act = Act::new("2 Interlock on", tally);
    act.check(act.tally.completed == jobs.len(), "not every transfer was completed");
    act.check(act.tally.refusals("deadlock") > 0, "nothing was refused for a deadlock: the load did not collide");
    act.check(act.tally.blocked == 0, "a service's own locks were contended although the proxy holds them first");
    for (account, expected) in cast::expected(jobs, OPENING) {
        let found = balances.iter().find(|b| b.id == account).map(|b| (b.balance, b.pending));
        act.check(found == Some((expected, 0)), format!("{account} has {found:?}, should have {expected}"));
    }
    at_rest(&bank, &mut act).await?;
    Ok(act)
}

/// Act 3: a declared order needs no collision to be kept.
async fn ordered(screen: &Screen) -> Result<Act> {
    screen.act(
        "Act 3: locks taken in the wrong order",
        &[
            "One word of the policy is changed: the class account is now `within: ordered`. One transfer at a time,",
            "nobody else is there, nothing can deadlock today:",
        ],
    );
    let config = EnvoyConfig::local().patch_policy(|policy| {
        for class in policy["classes"].as_array_mut().into_iter().flatten().filter(|c| c["name"] == "account") {
            class["within"] = json!("ordered");
        }
    });
    let mut bank = Bank::open(config, OPENING).await?;
    let [up, down] = cast::both_ways();
    let mut tally = bank.run(screen, &[up], ONCE).await?;
    let rising_completed = tally.completed == 1;
    let second = bank.run(screen, &[down], ONCE).await?;
    let falling_refused = matches!(second.last, Some(Outcome::Refused { status: 409, .. }));
    tally.add(second);
    let mut act = Act::new("3 wrong order", tally);
    act.check(rising_completed, "the transfer in rising order was not completed");
    act.check(falling_refused, "the transfer against the order was not refused with 409");
    act.check(act.tally.refusals("order-violation") == 1, "it was not refused for the order");
    act.check(act.tally.blocked == 0, "somebody was in the way");
    at_rest(&bank, &mut act).await?;
    Ok(act)
}

/// All locks have been given back and nobody waits, says Envoy.
async fn at_rest(bank: &Bank, act: &mut Act) -> Result<()> {
    let said = bank.gauges_come_to_rest(&["interlock_held", "interlock_waiting"]).await?;
    act.check(said, "interlock_held or interlock_waiting did not return to 0");
    Ok(())
}
