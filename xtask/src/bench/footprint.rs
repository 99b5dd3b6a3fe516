//! What Interlock takes before and beside requests: time at start-up, the size of its file, memory a VM, a lock and a waiter.
//!
//! Memory is the resident memory of the process, before and after; that of locks, which is too little to be seen there, what Envoy has
//! allocated: the lock table is in its shared data.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hyper::Method;
use interlock_testkit::{Client, Envoy, tools};
use serde_json::{Value, json};

use super::nginx;
use super::pairs::Pace;
use super::proxies;
use super::report::{Finding, Unit};
use super::servers::Server;
use crate::wasm;

/// Locks that are held, by leases of so many each.
const LOCKS: u32 = 40_000;
const EACH: u32 = 100;
/// Leases that wait, so many for one lock.
const WAITERS: u32 = 2_000;
const LINE: u32 = 20;
/// Streams of one connection.
const STREAMS: u32 = 50;
const PATIENCE: Duration = Duration::from_secs(60);
/// Starting takes long enough to be told by few.
const STARTS: usize = 6;

/// Start-up, sizes and memory.
pub async fn footprint(pace: Pace) -> Result<Finding> {
    let columns = [
        ("start-up, ms", Unit::Millis),
        ("added, ms", Unit::Millis),
        ("memory, KiB", Unit::Kib),
        ("added, KiB", Unit::Kib),
        ("file, KiB", Unit::Kib),
    ];
    let mut finding = Finding::new("footprint", "Start-up, size and memory", &columns);
    let upstream = nginx::upstream().await?;
    let local = || proxies::interlock(&proxies::policy(json!({ "local": {} })));
    let kinds: [(&str, Vec<Value>, u32); 5] = [
        ("plain Envoy", vec![], 1),
        ("wasm filter that does nothing", vec![proxies::calling("none")?], 1),
        ("Interlock", vec![local()?], 1),
        ("plain Envoy, two workers", vec![], 2),
        ("Interlock, two workers", vec![local()?], 2),
    ];
    let mut told = vec![(Vec::new(), Vec::new()); kinds.len()];
    for round in 0..pace.rounds.min(STARTS) {
        for turn in 0..kinds.len() {
            let at = (round + turn) % kinds.len();
            let (_, filters, workers) = &kinds[at];
            let (millis, kib) = start(&upstream, filters, *workers).await?;
            told[at].0.push(millis);
            told[at].1.push(kib);
        }
    }
    let file = |path: std::path::PathBuf| anyhow::Ok(vec![std::fs::metadata(path)?.len() as f64 / 1024.0]);
    let sizes = [vec![], file(wasm::bench_filters())?, file(tools::plugin_wasm()?)?, vec![], vec![]];
    for (at, (name, _, workers)) in kinds.iter().enumerate() {
        let plain = if *workers == 1 { &told[0] } else { &told[3] };
        let added =
            |mine: &[f64], theirs: &[f64]| mine.iter().zip(theirs).map(|(mine, theirs)| mine - theirs).collect();
        let (millis, kib) = &told[at];
        let cells = [millis.clone(), added(millis, &plain.0), kib.clone(), added(kib, &plain.1), sizes[at].clone()];
        finding.row(name, &cells);
    }
    let (lock, waiter) = crowd().await?;
    finding.row("a lock that is held", &[vec![], vec![], vec![], vec![lock], vec![]]);
    finding.row("a lease that waits", &[vec![], vec![], vec![], vec![waiter], vec![]]);
    finding.note(format!(
        "A VM for each worker and one for the main thread. Locks: {LOCKS} at an authority, {EACH} a lease, of what Envoy has allocated. Waiters: {WAITERS}, \
         {LINE} for a lock; what Envoy needs for each one's request is in it."
    ));
    Ok(finding)
}

/// How long it takes until it serves, in milliseconds, and its memory then, in KiB.
async fn start(upstream: &Server, filters: &[Value], workers: u32) -> Result<(f64, f64)> {
    let config = proxies::config(upstream, filters).concurrency(workers);
    let start = Instant::now();
    let envoy = Envoy::start(config).await?;
    let took = start.elapsed();
    Ok((took.as_secs_f64() * 1000.0, kib(&envoy)?))
}

fn kib(envoy: &Envoy) -> Result<f64> {
    Ok(envoy.memory()? as f64 / 1024.0)
}

/// What a lock that is held and a lease that waits add to an authority's memory, in KiB.
async fn crowd() -> Result<(f64, f64)> {
    let roomy = json!({ "max_wait": "30s", "max_ttl": "20s", "locks_per_request": EACH, "locks_per_owner": EACH });
    let authority = proxies::authority_within(1, roomy).await?;
    let authority = authority.envoy()?;
    let client = Client::http2();
    // So that what the first use of everything takes is not counted.
    granted(put(authority, &client, 0, vec!["warm/up".to_owned()]).send().await?.status)?;
    let empty = allocated(authority).await?;
    for lease in 1..=LOCKS / EACH {
        let names = (0..EACH).map(|n| format!("held/{lease}/{n}")).collect();
        granted(put(authority, &client, lease, names).send().await?.status)?;
    }
    until(authority, "held", LOCKS).await?;
    let (held, calm) = (allocated(authority).await?, kib(authority)?);
    let clients: Vec<_> = (0..WAITERS.div_ceil(STREAMS)).map(|_| Client::http2()).collect();
    let waiting: Vec<_> = (0..WAITERS)
        .map(|waiter| {
            let name = format!("held/{}/0", waiter / LINE + 1);
            let client = &clients[(waiter / STREAMS) as usize];
            put(authority, client, 1_000_000 + waiter, vec![name]).spawn()
        })
        .collect();
    until(authority, "waiting", WAITERS).await?;
    let crowded = kib(authority)?;
    drop(waiting);
    Ok(((held - empty) / f64::from(LOCKS), (crowded - calm) / f64::from(WAITERS)))
}

/// Waits until one of our gauges says, of all classes, that so many are there.
async fn until(envoy: &Envoy, gauge: &str, all: u32) -> Result<()> {
    let start = Instant::now();
    loop {
        let now = proxies::counted(envoy, gauge, "").await?;
        if now >= u64::from(all) {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "{gauge}: only {now} of {all}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What Envoy has allocated, in KiB; without the memory of its VMs.
async fn allocated(envoy: &Envoy) -> Result<f64> {
    let told: Value = serde_json::from_str(&envoy.admin_get("/memory").await?)?;
    let bytes: u64 = told["allocated"].as_str().context("Envoy does not say what it has allocated")?.parse()?;
    Ok(bytes as f64 / 1024.0)
}

fn put(authority: &Envoy, client: &Client, lease: u32, names: Vec<String>) -> interlock_testkit::client::Ask {
    let locks: Vec<_> = names.into_iter().map(|name| json!({ "name": name })).collect();
    let body = json!({ "owner": format!("owner-{lease}"), "locks": locks, "wait": "20s", "ttl": "20s" });
    let url = format!("{}/interlock/v1/leases/footprint-{lease:016}", authority.base_url());
    client.ask(Method::PUT, url).body(body.to_string()).timeout(PATIENCE)
}

fn granted(status: u16) -> Result<()> {
    ensure!(status == 201, "a lease was not granted: {status}");
    Ok(())
}
