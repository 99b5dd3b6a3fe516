//! Clients of lock services, many at a time: how fast they get locks that nobody else wants, and how one that all want goes round.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinSet;

use super::machine::{self, Cores};
use super::pairs::Pace;
use super::report::{Finding, Unit};
use super::services::{Asker, Kind, POLL, Service};
use crate::run::Times;

const CLIENTS: [usize; 3] = [1, 16, 64];

/// Acquire and release of locks that nobody else wants.
pub async fn services(pace: Pace) -> Result<Finding> {
    let columns = [
        (PAIRS, Unit::PerSecond),
        (TO_ETCD, Unit::Ratio),
        ("p50, ms", Unit::Millis),
        ("p99, ms", Unit::Millis),
        (CPU, Unit::Micros),
        (PER_CORE, Unit::PerSecond),
    ];
    let mut finding = Finding::new("services", "Lock services: acquire and release, without a proxy", &columns);
    finding.charted = 0;
    let cores = Cores::of(1)?;
    let mut running = Vec::new();
    for kind in [Kind::EtcdLock, Kind::EtcdTxn, Kind::Redis, Kind::Leases] {
        match kind.start().await {
            Ok(service) => running.push(service),
            Err(why) => finding.skip(kind.name(), why)?,
        }
    }
    for service in &running {
        machine::pin(service.process.pid(), &cores.proxy)?;
        service.awake(false)?;
    }
    let mut samples: HashMap<(Kind, usize), Vec<Sample>> = HashMap::new();
    for round in 0..pace.rounds {
        for clients in CLIENTS {
            for turn in 0..running.len() {
                let service = &running[(round + turn) % running.len()];
                service.awake(true)?;
                let sample = sample(service, clients, pace, &cores).await.context(service.kind.name())?;
                service.awake(false)?;
                samples.entry((service.kind, clients)).or_default().push(sample);
            }
        }
        eprint!("\rservices: round {} of {}", round + 1, pace.rounds);
    }
    eprintln!();
    for clients in CLIENTS {
        let etcd = samples.get(&(Kind::EtcdLock, clients));
        for service in &running {
            let Some(mine) = samples.get(&(service.kind, clients)) else { continue };
            let each = |tell: fn(&Sample) -> f64| mine.iter().map(tell).collect::<Vec<_>>();
            let ratio =
                etcd.map_or_else(Vec::new, |etcd| mine.iter().zip(etcd).map(|(m, e)| m.rate / e.rate).collect());
            finding.row(
                &row(service.kind, clients),
                &[
                    each(|s| s.rate),
                    ratio,
                    each(|s| s.millis[0]),
                    each(|s| s.millis[1]),
                    each(|s| s.cpu),
                    // An acquire and a release are two operations.
                    each(|s| 2e6 / s.cpu),
                ],
            );
        }
    }
    finding.note("Each client has a connection of its own; all clients share the core that the service has not. etcd is one node with its data in memory.");
    Ok(finding)
}

pub const PAIRS: &str = "acquire + release a second";
pub const TO_ETCD: &str = "to etcd v3lock";
pub const CPU: &str = "service's CPU µs a pair";
pub const PER_CORE: &str = "operations a core-second";

pub fn row(kind: Kind, clients: usize) -> String {
    format!("{}, {clients} client{}", kind.name(), if clients == 1 { "" } else { "s" })
}

struct Sample {
    rate: f64,
    millis: [f64; 2],
    cpu: f64,
}

async fn sample(service: &Service, clients: usize, pace: Pace, cores: &Cores) -> Result<Sample> {
    let (kind, address, pid) = (service.kind, service.address, service.process.pid());
    let done = on(&cores.rest, async move {
        let (mut askers, mut tasks) = (Vec::new(), JoinSet::new());
        for number in 0..clients {
            askers.push(Asker::connect(kind, address, number).await?);
        }
        let warm = Instant::now() + pace.warm_up;
        for (number, mut asker) in askers.into_iter().enumerate() {
            tasks.spawn(async move {
                let lock = format!("bench/{number}");
                let mut took = Vec::new();
                while Instant::now() < warm {
                    once(&mut asker, &lock).await?;
                }
                let end = Instant::now() + pace.time;
                while Instant::now() < end {
                    took.push(once(&mut asker, &lock).await?);
                }
                anyhow::Ok(took)
            });
        }
        tokio::time::sleep_until(warm.into()).await;
        let (start, before) = (Instant::now(), machine::cpu_micros(pid)?);
        let (mut times, mut pairs) = (Times::default(), 0_u32);
        while let Some(took) = tasks.join_next().await {
            for took in took?? {
                times.take(took);
                pairs += 1;
            }
        }
        let cpu = machine::cpu_micros(pid)? - before;
        Ok((times, f64::from(pairs), start.elapsed().as_secs_f64(), cpu))
    });
    let (times, pairs, seconds, cpu) = done.await?;
    let [half, most, _] = times.millis();
    Ok(Sample { rate: pairs / seconds, millis: [half, most], cpu: cpu / pairs })
}

async fn once(asker: &mut Asker, lock: &str) -> Result<Duration> {
    let start = Instant::now();
    let token = asker.acquire(lock).await?;
    asker.release(lock, token).await?;
    Ok(start.elapsed())
}

/// Runs this on a thread that is on these cores.
async fn on<T: Send + 'static>(cores: &[usize], work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    let cores = cores.to_vec();
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let run = || {
            machine::pin_thread(&cores)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(work)
        };
        tell.send(run())
    });
    told.await.context("the thread of the clients is gone")?
}

/// How a lock goes round.
pub struct Round {
    /// From a release to the next grant.
    pub hand_over: Times,
    /// From asking to the grant.
    pub waits: Times,
}

/// One lock, one client that holds it and so many that wait for it. Who has given it back asks again once another one has it, and so
/// nobody hands it over to itself.
pub async fn go_round(kind: Kind, address: SocketAddr, waiters: usize, time: Duration) -> Result<Round> {
    let ring = Arc::new((Mutex::new(Ring::default()), Notify::new()));
    // One that nobody has left behind from the last time.
    let lock = format!("bench/{:016x}", fastrand::u64(..));
    let mut tasks = JoinSet::new();
    let mut askers = Vec::new();
    for number in 0..=waiters {
        askers.push(Asker::connect(kind, address, number).await?);
    }
    // All are connected, and what stood still runs, before time is taken.
    for asker in &mut askers {
        once(asker, &lock).await?;
    }
    for mut asker in askers {
        let (ring, lock) = (Arc::clone(&ring), lock.clone());
        tasks.spawn(async move {
            loop {
                let asked = Instant::now();
                let token = asker.acquire(&lock).await?;
                let granted = Instant::now();
                let turn = ring.0.lock().await.granted(asked, granted);
                ring.1.notify_waiters();
                tokio::time::sleep(hold(kind, waiters)).await;
                ring.0.lock().await.released = Some(Instant::now());
                asker.release(&lock, token).await?;
                while ring.0.lock().await.turns == turn {
                    let _ = tokio::time::timeout(HOLD, ring.1.notified()).await;
                }
            }
        });
    }
    // Nobody ends by itself but for an error.
    let ended: Result<Option<Result<Result<()>, _>>, _> = tokio::time::timeout(time, tasks.join_next()).await;
    if let Ok(Some(ended)) = ended {
        ended??;
    }
    tasks.shutdown().await;
    let ring = std::mem::take(&mut *ring.0.lock().await);
    Ok(Round { hand_over: ring.hand_over, waits: ring.waits })
}

/// Long enough that all that wait are there.
const HOLD: Duration = Duration::from_millis(2);

/// How long a watch at an etcd has been there when what it watches for happens. An etcd looks after watches that begin in the past, as those of its
/// lock service do, only every 0.1 s: before that a release is told of late, and it is this that would be measured.
const WATCHED: Duration = Duration::from_millis(150);

/// How long a lock is held. Where it is polled for, the release comes at any moment between two tries.
fn hold(kind: Kind, waiters: usize) -> Duration {
    match kind {
        Kind::Redis => HOLD + POLL.mul_f64(fastrand::f64()),
        // Who comes waits for as many turns as others wait.
        Kind::EtcdLock => HOLD.max(WATCHED.div_f64(waiters as f64)),
        _ => HOLD,
    }
}

#[derive(Default)]
struct Ring {
    turns: u64,
    released: Option<Instant>,
    hand_over: Times,
    waits: Times,
}

impl Ring {
    fn granted(&mut self, asked: Instant, granted: Instant) -> u64 {
        self.turns += 1;
        // Only where it was waited for.
        if let Some(released) = self.released.take().filter(|released| asked < *released) {
            self.hand_over.take(granted.saturating_duration_since(released));
            self.waits.take(granted - asked);
        }
        self.turns
    }
}
