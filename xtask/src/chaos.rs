//! `cargo xtask chaos`: an authority, sidecars and applications, with faults everywhere between and in them, judged at a
//! resource that checks fences.
//!
//! [`plan`] draws what is asked, [`app`] asks over the lease API and [`through`] through sidecars, [`world`] is what is
//! tormented and [`faults`] what goes wrong; [`gate`] judges what the resource sees, [`waits`] the cycles that were told,
//! [`book`] the answers. No rule of Interlock is taken from its own code.

mod app;
mod book;
mod faults;
pub mod gate;
mod plan;
mod through;
mod waits;
mod world;

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use fastrand::Rng;
use interlock_testkit::{Client, Upstream, tools};
use tokio::task::JoinSet;

use crate::soak::watch;
use crate::{run, wasm};
use app::Apps;
use book::Book;
use faults::Fault;
use through::Through;
use world::{TTL, World};

/// Violations that are printed.
const SHOWN: usize = 10;
/// How long everything runs undisturbed at the end.
const CALM: Duration = Duration::from_secs(5);
/// How long the table may take to be empty when nobody asks any more.
const REST: Duration = Duration::from_secs(20);

#[derive(Debug, Args)]
pub struct ChaosArgs {
    /// How many faults, at least
    #[arg(long, default_value_t = 500)]
    faults: u32,
    /// Go on with faults until so many leases have been granted
    #[arg(long, default_value_t = 10_000)]
    grants: u64,
    /// From one fault to the next, in milliseconds, on average
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(20..))]
    pace: u64,
    /// Stop with the faults after so many minutes, whatever has been granted by then
    #[arg(long, default_value_t = 60)]
    minutes: u32,
    /// Draws the same faults and the same load again; by default each run draws its own
    #[arg(long)]
    seed: Option<u64>,
    /// How many sidecars
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=4))]
    sidecars: u8,
    /// How many callers, of each kind, ask at a time
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=200))]
    callers: u32,
    /// Use the plugin that is there instead of building it
    #[arg(long)]
    no_build: bool,
}

pub fn run(args: ChaosArgs) -> Result<()> {
    if !args.no_build && std::env::var_os("INTERLOCK_FAULTS_WASM").is_none() {
        wasm::run(&wasm::WasmArgs::default())?;
    }
    println!("Envoy: {}", tools::envoy()?.display());
    run::block_on(chaos(&args))
}

async fn chaos(args: &ChaosArgs) -> Result<()> {
    let seed = run::seed(args.seed);
    println!("chaos: {} faults, seed {seed}, {} sidecars", args.faults, args.sidecars);
    let book = Arc::new(Book::default());
    let through = Through::new(Arc::clone(&book));
    let serving = Arc::clone(&through);
    let upstream = Upstream::forgetful(move |request| Arc::clone(&serving).serve(request)).await?;
    let world = Arc::new(World::start(usize::from(args.sidecars), upstream.address()).await?);
    // Nobody else sets it.
    let _ = through.world.set(Arc::clone(&world));
    let apps = Arc::new(Apps { world: Arc::clone(&world), book: Arc::clone(&book) });

    let start = Instant::now();
    let stop = Arc::new(AtomicBool::new(false));
    let mut callers = load(args, seed, &apps, &through, &stop, false);
    let inflicted = torment(args, seed, &world, &book).await?;
    stop.store(true, Ordering::Relaxed);
    ended(&mut callers).await?;
    let tormented = start.elapsed();
    world.until_granting(REST).await?;
    let mut wrong = rest(&world).await?;
    let before = Before::of(&book);

    let stop = Arc::new(AtomicBool::new(false));
    let mut callers = load(args, seed ^ 1, &apps, &through, &stop, true);
    tokio::time::sleep(CALM).await;
    stop.store(true, Ordering::Relaxed);
    ended(&mut callers).await?;
    wrong.extend(before.calm(&book));
    wrong.extend(rest(&world).await?);
    for node in world.sidecars.iter().chain([&world.authority]) {
        node.inspect().await?;
        wrong.append(&mut node.deaths.lock().unwrap_or_else(|e| e.into_inner()));
    }
    conclude(&book, &world, &inflicted, tormented, wrong, seed)
}

/// Callers of both kinds, until they are told to stop.
fn load(
    args: &ChaosArgs,
    seed: u64,
    apps: &Arc<Apps>,
    through: &Arc<Through>,
    stop: &Arc<AtomicBool>,
    calm: bool,
) -> JoinSet<()> {
    let mut callers = JoinSet::new();
    for number in 0..u64::from(args.callers) {
        let rng = |kind: u64| Rng::with_seed(seed ^ (number * 2 + kind).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let owner =
            move |count: u128, kind: u128| (u128::from(number) * 4 + kind + u128::from(calm) * 2 + 1) << 64 | count;
        let (apps, stopped, mut dice) = (Arc::clone(apps), Arc::clone(stop), rng(0));
        callers.spawn(async move {
            let client = Client::http2();
            for count in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let plan = plan::transaction(&mut dice, TTL, calm);
                apps.transaction(&client, &plan, &format!("{:032x}", owner(count, 0))).await;
            }
        });
        if args.sidecars > 0 {
            let (through, stopped, mut dice) = (Arc::clone(through), Arc::clone(stop), rng(1));
            callers.spawn(async move {
                for count in 0.. {
                    if stopped.load(Ordering::Relaxed) {
                        break;
                    }
                    let plan = plan::transaction(&mut dice, TTL, true);
                    let served = Arc::clone(&through).transaction(Arc::new(plan), owner(count, 1)).await;
                    if !served {
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            });
        }
    }
    callers
}

async fn ended(callers: &mut JoinSet<()>) -> Result<()> {
    while let Some(done) = callers.join_next().await {
        done.context("a caller panicked")?;
    }
    Ok(())
}

/// Inflicts faults, several at a time but one at a place; gives back how many of each kind.
async fn torment(args: &ChaosArgs, seed: u64, world: &Arc<World>, book: &Book) -> Result<BTreeMap<&'static str, u64>> {
    let mut rng = Rng::with_seed(seed);
    let (start, limit) = (Instant::now(), Duration::from_secs(u64::from(args.minutes) * 60));
    let busy = Arc::new(Mutex::new(HashSet::new()));
    let mut inflicted = BTreeMap::new();
    let mut under_way: JoinSet<Result<()>> = JoinSet::new();
    let mut count = 0;
    while (count < args.faults || book.lock().numbers.grants < args.grants) && start.elapsed() < limit {
        tokio::time::sleep(Duration::from_millis(rng.u64(args.pace / 3..args.pace * 5 / 3))).await;
        let fault = Fault::draw(&mut rng, usize::from(args.sidecars));
        let free = busy.lock().unwrap_or_else(|e| e.into_inner()).insert(fault.place());
        while let Some(done) = under_way.try_join_next() {
            done.context("a fault panicked")??;
        }
        if !free {
            continue;
        }
        count += 1;
        if count % 100 == 0 {
            let book = book.lock();
            let violations = book.gate.violations.count + book.wrong.count;
            let seconds = start.elapsed().as_secs();
            println!("{seconds:>6} s: {count} faults, {} grants, {violations} violations", book.numbers.grants);
        }
        *inflicted.entry(fault.kind()).or_default() += 1;
        let (world, busy) = (Arc::clone(world), Arc::clone(&busy));
        under_way.spawn(async move {
            let done = fault.inflict(&world).await.with_context(|| fault.to_string());
            busy.lock().unwrap_or_else(|e| e.into_inner()).remove(&fault.place());
            done
        });
    }
    while let Some(done) = under_way.join_next().await {
        done.context("a fault panicked")??;
    }
    Ok(inflicted)
}

/// What is left when nobody asks for anything: nothing may be. Leases of the lost end by themselves.
async fn rest(world: &World) -> Result<Vec<String>> {
    let start = Instant::now();
    let client = Client::http1_fresh();
    loop {
        let left = left(world, &client).await?;
        if left.is_empty() || start.elapsed() > REST {
            return Ok(left);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn left(world: &World, client: &Client) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let url = format!("http://{}{}/locks", world.authority.address(), world::PREFIX);
    let locks = client.get(url).send().await?.json();
    left.extend(locks["locks"].as_array().into_iter().flatten().map(|lock| format!("a lock is left: {lock}")));
    for node in world.sidecars.iter().chain([&world.authority]) {
        let stats = node.stats().await?;
        for gauge in ["interlock_held", "interlock_waiting", "interlock_table_locks", "interlock_table_owners"] {
            let value = watch::sum(&stats, gauge);
            if value != 0 {
                left.push(format!("{gauge} of {} is {value}, and nothing is under way", node.name));
            }
        }
    }
    Ok(left)
}

/// What had been counted before the calm.
struct Before {
    grants: u64,
    failed: u64,
    cut: u64,
    stopped: u64,
}

impl Before {
    fn of(book: &Book) -> Self {
        let book = book.lock();
        let numbers = &book.numbers;
        Before {
            grants: numbers.grants,
            failed: numbers.unavailable + numbers.unanswered + numbers.given_up + numbers.lost,
            cut: book.gate.tally.cut,
            stopped: book.gate.tally.stopped,
        }
    }

    /// What was wrong in the calm: everything must be as if nothing had ever happened.
    fn calm(&self, book: &Book) -> Vec<String> {
        let now = Before::of(book);
        println!("in {CALM:?} of calm at the end: {} grants", now.grants - self.grants);
        let mut wrong = Vec::new();
        if now.grants == self.grants {
            wrong.push("nothing was granted after the last fault".to_owned());
        }
        let counts = [
            ("calls failed", self.failed, now.failed),
            ("sections were cut", self.cut, now.cut),
            ("writes were stopped", self.stopped, now.stopped),
        ];
        wrong.extend(
            counts
                .iter()
                .filter(|(_, before, now)| before != now)
                .map(|(what, before, now)| format!("{} {what} after the last fault", now - before)),
        );
        wrong
    }
}

fn conclude(
    book: &Book,
    world: &World,
    inflicted: &BTreeMap<&'static str, u64>,
    tormented: Duration,
    wrong: Vec<String>,
    seed: u64,
) -> Result<()> {
    let book = book.lock();
    let (numbers, tally) = (&book.numbers, book.gate.tally);
    let row = |name: &str, value: String| println!("  {name:<52} {value:>10}");
    let count = |name: &str, value: u64| row(name, value.to_string());
    println!("\nFaults in {:.0} s", tormented.as_secs_f64());
    for (kind, times) in inflicted {
        count(kind, *times);
    }
    count("all", inflicted.values().sum());
    count("requests sent twice", world.relay.doubled());
    println!("Callers");
    count("granted", numbers.grants);
    count("granted after a wait (handed over)", numbers.hand_overs);
    for (slug, times) in &numbers.refusals {
        count(&format!("refused: {slug}"), *times);
    }
    count("cycles told, and found to have been there", numbers.cycles);
    count("tries that the authority could not serve", numbers.unavailable);
    count("tries that nobody answered", numbers.unanswered);
    count("given up", numbers.given_up);
    count("leases that ended under their holder", numbers.lost);
    count("holders that slept over the end and wrote again", numbers.slept);
    let millis = |quantile: f64| format!("{:.1} ms", numbers.waits.value_at_quantile(quantile) as f64 / 1000.0);
    row("wait p50", millis(0.5));
    row("wait p99", millis(0.99));
    println!("At the resource");
    count("sections", tally.sections);
    count("after one of another owner", tally.followed);
    count("writes", tally.writes);
    count("sections cut by a higher fence", tally.cut);
    count("writes stopped for a lower fence", tally.stopped);
    let failures = [&book.gate.violations, &book.wrong];
    let violations: u64 = failures.iter().map(|v| v.count).sum();
    println!("violations: {violations}, at the end: {}", wrong.len());
    let all = failures.iter().flat_map(|v| v.first.iter().take(SHOWN)).chain(&wrong);
    for (number, failure) in all.enumerate() {
        println!("\n{}. {failure}", number + 1);
    }
    if violations > 0 || !wrong.is_empty() {
        bail!("the chaos broke something; --seed {seed} draws the same faults and load again");
    }
    Ok(())
}
