//! `cargo xtask crowd`: fills an Envoy up to the limits of its policy (100,000 locks held, 20,000 requests parked) and shows what
//! comes of it: clear refusals above them, memory, and what a lock of another class costs meanwhile.
//!
//! It fails if a refusal is not what it should be, or if anything stays behind. Times and memory it prints: a machine has
//! other things to do.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;
use interlock_testkit::client::{Ask, Pending};
use interlock_testkit::{Answer, Client, Envoy, EnvoyConfig, Upstream, tools};
use serde_json::json;

use crate::run::{self, Times};
use crate::wasm;

/// Locks that one request holds.
const EACH: u32 = 100;
/// Locks that are left for the class whose time is taken, which holds one at a time. (What is waited for counts as well.)
const SPARE: u32 = 1;
/// Waiters of one lock.
const LINE: u32 = 1000;
/// Streams of one connection.
const STREAMS: u32 = 500;
/// Requests that are sent off at a time.
const AT_ONCE: usize = 64;
/// Nothing takes longer, the waiting of those that are to be parked aside.
const PATIENCE: Duration = Duration::from_secs(240);

#[derive(Debug, Args)]
pub struct CrowdArgs {
    /// How many locks are held
    #[arg(long, default_value_t = 100_000)]
    locks: u32,
    /// How many requests wait
    #[arg(long, default_value_t = 20_000)]
    waiters: u32,
    /// How often another class's lock is taken to measure what it costs
    #[arg(long, default_value_t = 2000)]
    rounds: u32,
    /// Use the plugin that is there instead of building it
    #[arg(long)]
    no_build: bool,
}

pub fn run(args: &CrowdArgs) -> Result<()> {
    if !args.no_build && std::env::var_os("INTERLOCK_WASM").is_none() {
        wasm::shipped()?;
    }
    println!("Envoy: {}", tools::envoy()?.display());
    run::block_on(async { Crowd::gather(args).await?.show().await })
}

struct Crowd<'a> {
    args: &'a CrowdArgs,
    envoy: Envoy,
    upstream: Upstream,
    /// Of those that hold and wait, so many streams each.
    clients: Vec<Client>,
    /// Of those whose time is taken.
    calm: Client,
}

impl<'a> Crowd<'a> {
    async fn gather(args: &'a CrowdArgs) -> Result<Self> {
        let upstream = Upstream::start().await?;
        let limits = json!({
            "locks": args.locks + args.waiters + SPARE, "waiters": args.waiters, "waiters_per_lock": LINE, "locks_per_request": EACH,
            "locks_per_owner": null, "max_wait": "600s",
        });
        let config = EnvoyConfig::local().upstream(upstream.address()).log_levels("wasm:error");
        let config = config.patch_policy(|policy| policy["limits"] = limits.clone()).patch_hcm(|hcm| {
            hcm["stream_idle_timeout"] = json!("900s");
            hcm["http2_protocol_options"] = json!({ "max_concurrent_streams": STREAMS });
        });
        let envoy = Envoy::start(config.patch(lift_breakers).patch_routes(|routes| {
            routes.iter_mut().for_each(|route| route["route"]["timeout"] = json!("0s"));
        }))
        .await?;
        let streams = args.waiters + args.locks / EACH;
        let clients = (0..=streams / STREAMS).map(|_| Client::http2()).collect();
        Ok(Crowd { args, envoy, upstream, clients, calm: Client::http1() })
    }

    async fn show(self) -> Result<()> {
        println!("{:<44} {:>9} {:>9} {:>9} {:>9} {:>11}", "", "took s", "p50 ms", "p99 ms", "max ms", "memory MiB");
        let start = Instant::now();
        self.row("an Envoy that is empty", start, self.latencies().await?)?;

        let start = Instant::now();
        let holders = self.fill().await?;
        let what = format!("{} locks are held", self.args.locks);
        self.row(&what, start, self.latencies().await?)?;

        let start = Instant::now();
        let coming = async { anyhow::Ok((self.park().await?, start.elapsed())) };
        let (parked, meanwhile) = tokio::join!(coming, self.latencies());
        let (parked, took) = parked?;
        println!("{:<44} {:>9.1}", format!("{} requests come to wait", self.args.waiters), took.as_secs_f32());
        self.row("    meanwhile", start, meanwhile?)?;
        let start = Instant::now();
        self.row("    parked", start, self.latencies().await?)?;
        // One more at a line that is full; one at a lock where nobody waits; one that would hold too much.
        for line in [lock(0), lock(self.args.locks - 1)] {
            self.refused("too-many-waiters", &line).await?;
        }
        let too_many: Vec<_> = (self.args.locks..=self.args.locks + SPARE).map(lock).collect();
        self.refused("too-many-locks", &too_many.join(" ")).await?;

        let start = Instant::now();
        self.upstream.open("/hold");
        for holder in holders {
            done(holder.answer().await?)?;
        }
        for waiter in parked {
            done(waiter.answer().await?)?;
        }
        println!("{:<44} {:>9.1}", "all of them are served", start.elapsed().as_secs_f32());
        for gauge in ["interlock_held", "interlock_waiting"] {
            let left = self.envoy.wait_metric(gauge, &[], |left| left == 0.0, PATIENCE).await;
            ensure!(left == 0.0, "{gauge} stays at {left}");
        }
        let start = Instant::now();
        self.row("an Envoy that is empty again", start, self.latencies().await?)
    }

    fn ask(&self, owner: u32, locks: &str, wait: f64) -> Ask {
        let client = self.clients.get(owner as usize / STREAMS as usize).unwrap_or(&self.calm);
        let ask = client.get(format!("{}/hold?hold", self.envoy.base_url())).timeout(PATIENCE * 3);
        let locks: Vec<_> = locks.split(' ').map(|name| format!("{name};wait={wait:.1};ttl=30;hold=600")).collect();
        ask.trace(u128::from(owner) + 1).header("lock", locks.join(", "))
    }

    /// Requests that hold all the locks, at an upstream that answers none of them.
    async fn fill(&self) -> Result<Vec<Pending>> {
        let mut holders = Vec::new();
        for first in (0..self.args.locks).step_by(EACH as usize) {
            let names: Vec<_> = (first..(first + EACH).min(self.args.locks)).map(lock).collect();
            holders.push(self.ask(first / EACH, &names.join(" "), 60.0).spawn());
            if holders.len() % AT_ONCE == 0 {
                self.upstream.wait_for_requests("/hold", holders.len()).await;
            }
        }
        self.upstream.wait_for_requests("/hold", holders.len()).await;
        let all = f64::from(self.args.locks);
        let held = self.envoy.wait_metric("interlock_held", &[], |held| held >= all, PATIENCE).await;
        ensure!(held >= all, "{held} locks are held");
        Ok(holders)
    }

    /// Requests that wait for some of these locks, so many for each.
    async fn park(&self) -> Result<Vec<Pending>> {
        let first = self.args.locks / EACH;
        let mut parked = Vec::new();
        for waiter in 0..self.args.waiters {
            parked.push(self.ask(first + waiter, &lock(waiter / LINE * EACH), 500.0).spawn());
            if parked.len() % AT_ONCE == 0 {
                // They are parked: it shows in the gauge a second later, which is too late to go by.
                tokio::task::yield_now().await;
            }
        }
        let all = f64::from(self.args.waiters);
        let waiting = self.envoy.wait_metric("interlock_waiting", &[], |waiting| waiting >= all, PATIENCE).await;
        ensure!(waiting >= all, "{waiting} requests wait");
        Ok(parked)
    }

    /// One more is refused. Limits count other workers as of their last beat, so one may pass; not for long.
    async fn refused(&self, slug: &str, lock: &str) -> Result<()> {
        let start = Instant::now();
        let answer = loop {
            let answer = self.ask(u32::MAX, lock, 1.0).send().await?;
            if answer.status == 429 || start.elapsed() > Duration::from_secs(10) {
                break answer;
            }
        };
        let told = answer.json();
        let kind = format!("urn:interlock:problem:{slug}");
        ensure!(answer.status == 429 && told["type"] == kind, "no {slug}: {} {}", answer.status, answer.text());
        println!("    one more: 429 {slug}: {}", told["detail"].as_str().unwrap_or_default());
        Ok(())
    }

    /// What a request that takes a free lock of another class costs, one after another.
    async fn latencies(&self) -> Result<Times> {
        let mut times = Times::default();
        for round in 0..self.args.rounds {
            let ask = self.calm.get(format!("{}/calm", self.envoy.base_url()));
            let ask = ask
                .trace(u128::from(round) + 9_000_000)
                .header("lock", format!("calm/{}", round % 16))
                .timeout(PATIENCE);
            let start = Instant::now();
            done(ask.send().await?)?;
            times.take(start.elapsed());
        }
        Ok(times)
    }

    fn row(&self, what: &str, start: Instant, times: Times) -> Result<()> {
        let [half, most, all] = times.millis();
        let memory = self.envoy.memory()? as f64 / f64::from(1 << 20);
        let took = start.elapsed().as_secs_f32();
        println!("{what:<44} {took:>9.1} {half:>9.2} {most:>9.2} {all:>9.2} {memory:>11.0}");
        Ok(())
    }
}

fn lock(number: u32) -> String {
    format!("crowd/{number}")
}

/// All that hold a lock are at the upstream at a time.
fn lift_breakers(bootstrap: &mut serde_json::Value) {
    for cluster in bootstrap["static_resources"]["clusters"].as_array_mut().into_iter().flatten() {
        let most = json!({ "max_connections": 15_000, "max_requests": 100_000, "max_pending_requests": 100_000 });
        cluster["circuit_breakers"] = json!({ "thresholds": [most] });
    }
}

fn done(answer: Answer) -> Result<()> {
    ensure!(answer.status == 200, "{} {}", answer.status, answer.text());
    Ok(())
}
