//! `cargo xtask measure`: how soon an authority tells of a deadlock, hands a lock over, and ends leases; asked over the lease API
//! and, but for the last, through a sidecar. Prints; asserts nothing but that no lease ends early: a machine has other
//! things to do.
//!
//! The Envoys are those of envoy/mesh, on ports that the kernel picks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use hyper::Method;
use interlock_testkit::client::{Ask, traceparent};
use interlock_testkit::{Answer, Client, Envoy, EnvoyConfig, Upstream, tools};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::run::{self, Times};
use crate::wasm;

/// Leases that end together.
const LEASES: usize = 1000;
/// Long enough for all that wait for them to be there before the first ends.
const TTL: Duration = Duration::from_secs(8);
/// Nothing that is measured takes longer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Leases that are asked for at a time: few, so that when each was granted is known well.
const FEW: usize = 4;
/// Parked requests to an authority share connections, so many each.
const STREAMS: usize = 50;

#[derive(Debug, Args)]
pub struct MeasureArgs {
    /// How often each thing is measured
    #[arg(long, default_value_t = 300)]
    rounds: u32,
    /// Use the plugin that is there instead of building it
    #[arg(long)]
    no_build: bool,
}

pub fn run(args: &MeasureArgs) -> Result<()> {
    if !args.no_build && std::env::var_os("INTERLOCK_WASM").is_none() {
        wasm::shipped()?;
    }
    println!("Envoy: {}", tools::envoy()?.display());
    run::block_on(async {
        let bench = Bench::set().await?;
        println!("{:<60} {:>9} {:>9} {:>9}", "milliseconds", "p50", "p99", "max");
        let mut lease_api = (Times::default(), Times::default());
        let mut sidecar = (Times::default(), Times::default());
        for round in 0..args.rounds {
            lease_api.0.take(bench.deadlock_of_leases(round).await?);
            lease_api.1.take(bench.hand_over_of_leases(round).await?);
            sidecar.0.take(bench.deadlock_of_requests(round).await?);
            sidecar.1.take(bench.hand_over_of_requests(round).await?);
        }
        print(&lease_api.0, "a PUT that would close a cycle, until it is refused");
        print(&sidecar.0, "a request that would close a cycle, through a sidecar");
        print(&lease_api.1, "a DELETE, until the PUT behind it is granted");
        print(&sidecar.1, "an answer, until the request behind it is at the upstream");
        let (least, most) = bench.ends().await?;
        print(&most, &format!("end of {LEASES} leases: late at most by"));
        print(&least, &format!("end of {LEASES} leases: late at least by"));
        Ok(())
    })
}

fn print(times: &Times, what: &str) {
    let [half, most, all] = times.millis();
    println!("{what:<60} {half:>9.2} {most:>9.2} {all:>9.2}");
}

/// An authority, and a sidecar before an upstream.
struct Bench {
    authority: Envoy,
    sidecar: Envoy,
    upstream: Upstream,
}

/// Two clients, so that what is parked does not share a connection with what wakes it.
fn clients() -> [Client; 2] {
    [Client::http2(), Client::http2()]
}

impl Bench {
    async fn set() -> Result<Self> {
        let upstream = Upstream::start().await?;
        let key = format!("{:064x}", fastrand::u128(..));
        let file = |name: &str| {
            let config = EnvoyConfig::from_file(&tools::root().join(format!("envoy/mesh/{name}.yaml")))?;
            anyhow::Ok(config.env("INTERLOCK_KEY", &key).env("INTERLOCK_TOKEN", &key).log_levels("wasm:error"))
        };
        let authority = Envoy::start(file("authority")?).await?;
        let config = file("orders")?.cluster("app", upstream.address());
        let sidecar = Envoy::start(config.cluster("interlock-authority", authority.address())).await?;
        let bench = Bench { authority, sidecar, upstream };
        let start = Instant::now();
        while bench.lease(&Client::http1(), Method::GET, "health").send().await?.status != 200 {
            if start.elapsed() > PATIENCE {
                bail!("the authority grants nothing");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(bench)
    }

    fn lease(&self, client: &Client, method: Method, path: &str) -> Ask {
        client.ask(method, format!("{}/interlock/v1/{path}", self.authority.base_url())).timeout(PATIENCE)
    }

    fn put(&self, client: &Client, id: &str, owner: &str, lock: &str) -> Ask {
        let body = json!({ "owner": owner, "locks": [{ "name": lock }], "wait": "20s", "ttl": "10s" });
        self.lease(client, Method::PUT, &format!("leases/{id}")).body(body.to_string())
    }

    async fn delete(&self, client: &Client, id: &str) -> Result<()> {
        self.lease(client, Method::DELETE, &format!("leases/{id}")).send().await.map(drop)
    }

    fn request(&self, client: &Client, owner: u128, path: &str, lock: &str) -> Ask {
        let ask = client.get(format!("{}{path}", self.sidecar.base_url())).timeout(PATIENCE);
        ask.header("traceparent", traceparent(owner)).header("lock", lock)
    }

    /// Waits until so many wait for this lock.
    async fn parked(&self, client: &Client, lock: &str, count: usize) -> Result<()> {
        let start = Instant::now();
        loop {
            let told: Value = self.lease(client, Method::GET, &format!("locks/{lock}")).send().await?.json();
            if told["waiters"].as_array().map_or(0, Vec::len) >= count {
                return Ok(());
            }
            ensure!(start.elapsed() < PATIENCE, "nobody waits for {lock}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn deadlock_of_leases(&self, round: u32) -> Result<Duration> {
        let [one, two] = clients();
        let (a, b) = (format!("cycle/{round}a"), format!("cycle/{round}b"));
        let id = |n: u32| format!("deadlock-{round:08}-{n}");
        granted(self.put(&one, &id(1), "one", &a).send().await?)?;
        granted(self.put(&two, &id(2), "two", &b).send().await?)?;
        let parked = self.put(&one, &id(3), "one", &b).spawn();
        self.parked(&two, &b, 1).await?;
        let start = Instant::now();
        let refused = self.put(&two, &id(4), "two", &a).send().await?;
        let took = start.elapsed();
        ensure!(refused.status == 409, "no deadlock: {}", refused.text());
        self.delete(&two, &id(2)).await?;
        granted(parked.answer().await?)?;
        self.delete(&one, &id(1)).await?;
        self.delete(&one, &id(3)).await?;
        Ok(took)
    }

    async fn hand_over_of_leases(&self, round: u32) -> Result<Duration> {
        let [one, two] = clients();
        let (lock, id) = (format!("turn/{round}"), |n: u32| format!("hand-over-{round:08}-{n}"));
        granted(self.put(&one, &id(1), "one", &lock).send().await?)?;
        let parked = self.put(&two, &id(2), "two", &lock).spawn();
        self.parked(&one, &lock, 1).await?;
        let start = Instant::now();
        let waiting = tokio::spawn(async move { (parked.answer().await, Instant::now()) });
        self.delete(&one, &id(1)).await?;
        let (answer, at) = waiting.await?;
        granted(answer?)?;
        self.delete(&two, &id(2)).await?;
        Ok(at - start)
    }

    async fn deadlock_of_requests(&self, round: u32) -> Result<Duration> {
        let clients = clients();
        let (a, b) = (format!("cycle/{round}c"), format!("cycle/{round}d"));
        let paths = [format!("/one{round}"), format!("/two{round}")];
        let owners = [2 * u128::from(round) + 1, 2 * u128::from(round) + 2];
        let mut held = Vec::new();
        for (n, lock) in [&a, &b].into_iter().enumerate() {
            held.push(self.request(&clients[n], owners[n], &format!("{}?hold", paths[n]), lock).spawn());
            self.upstream.wait_for_requests(&paths[n], 1).await;
        }
        let parked = self.request(&clients[0], owners[0], "/then", &b).spawn();
        self.parked(&Client::http1(), &b, 1).await?;
        let start = Instant::now();
        let refused = self.request(&clients[1], owners[1], "/never", &a).send().await?;
        let took = start.elapsed();
        ensure!(refused.status == 409, "no deadlock: {}", refused.text());
        paths.iter().for_each(|path| self.upstream.open(path));
        for request in held.into_iter().chain([parked]) {
            granted(request.answer().await?)?;
        }
        Ok(took)
    }

    async fn hand_over_of_requests(&self, round: u32) -> Result<Duration> {
        let [one, two] = clients();
        let (lock, first, next) = (format!("turn/{round}r"), format!("/first{round}"), format!("/next{round}"));
        let owner = 1_000_000 + 2 * u128::from(round);
        let held = self.request(&one, owner, &format!("{first}?hold"), &lock).spawn();
        self.upstream.wait_for_requests(&first, 1).await;
        let parked = self.request(&two, owner + 1, &next, &lock).spawn();
        self.parked(&Client::http1(), &lock, 1).await?;
        self.upstream.open(&first);
        granted(held.answer().await?)?;
        granted(parked.answer().await?)?;
        let ended = self.upstream.requests_to(&first)[0].ended.context("it has been answered")?.1;
        Ok(self.upstream.requests_to(&next)[0].arrived.saturating_duration_since(ended))
    }

    /// Leases that nobody renews, each with one that waits for it: how late that one is told, at least and at most. When a lease
    /// was granted is known only to lie between the request for it and its answer.
    async fn ends(&self) -> Result<(Times, Times)> {
        let address = self.authority.address();
        let clients = (0..LEASES.div_ceil(STREAMS)).map(|_| Client::http2()).collect::<Vec<_>>();
        let (mut waiting, few) = (JoinSet::new(), Arc::new(Semaphore::new(FEW)));
        for number in 0..LEASES {
            let client = clients[number / STREAMS].clone();
            waiting.spawn(end_of(client, address, number, Arc::clone(&few)));
        }
        let (mut least, mut most, mut early) = (Times::default(), Times::default(), 0);
        while let Some(done) = waiting.join_next().await {
            let End { asked, answered, next } = done??;
            early += u32::from(next < asked + TTL);
            most.take(next.saturating_duration_since(asked + TTL));
            least.take(next.saturating_duration_since(answered + TTL));
        }
        ensure!(early == 0, "{early} leases ended early");
        Ok((least, most))
    }
}

/// When a lease was asked for and granted, and when the next one was told that it has the lock.
struct End {
    asked: Instant,
    answered: Instant,
    next: Instant,
}

async fn end_of(client: Client, authority: SocketAddr, number: usize, few: Arc<Semaphore>) -> Result<End> {
    let put = |id: String, ttl: &str| {
        let body = json!({ "owner": id, "locks": [{ "name": format!("end/{number}") }], "wait": "25s", "ttl": ttl });
        let url = format!("http://{authority}/interlock/v1/leases/{id}");
        client.ask(Method::PUT, url).body(body.to_string()).timeout(PATIENCE)
    };
    let turn = few.acquire().await?;
    let asked = Instant::now();
    granted(put(format!("lease-that-ends-{number}"), &format!("{}s", TTL.as_secs())).send().await?)?;
    let answered = Instant::now();
    drop(turn);
    let next = format!("lease-behind-it-{number}");
    granted(put(next.clone(), "2s").send().await?)?;
    let told = Instant::now();
    let url = format!("http://{authority}/interlock/v1/leases/{next}");
    client.ask(Method::DELETE, url).timeout(PATIENCE).send().await?;
    Ok(End { asked, answered, next: told })
}

fn granted(answer: Answer) -> Result<()> {
    ensure!(matches!(answer.status, 200 | 201), "it was not granted: {} {}", answer.status, answer.text());
    Ok(())
}
