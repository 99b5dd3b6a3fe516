//! Thousands of generated requests at a real Envoy, several at once; between them good ones.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use interlock_testkit::RawClient;
use tokio::task::JoinSet;

use super::STAGE;
use super::classes::{self, Class, Known};
use super::dice::{number, seed};
use super::h2::RawH2;
use super::judge::{self, Came, Kind};
use super::shot::Shot;
use crate::common::{Lane, run};

/// How many requests there are, where the environment does not say otherwise.
const REQUESTS: u64 = 3000;

/// So many clients at once.
const CLIENTS: usize = 12;

/// What takes longer has hung. (The longest wait that the policy allows is less than a third of it.)
const HANG: Duration = Duration::from_secs(1);

/// How often something that was late may be late again before it counts as hanging.
const TRIES: usize = 8;

/// How long a client goes on that has sent something that may be only half a request, before it closes its half.
const HALF: Duration = Duration::from_millis(150);

/// The listeners that shots go to.
const LANES: [&str; 6] = ["accept", "roomy", "pass", "strip", "audit", "off"];

/// Sends a shot; says what came back and how long it took, not counting the time in which it was rightly waited for more.
async fn fire(shot: &Shot, lane: &Lane) -> (Came, Duration) {
    let start = Instant::now();
    let patience = if shot.open_ended { HALF } else { HANG * 4 };
    let came = if shot.h2 { over_h2(shot, lane, patience).await } else { over_h1(shot, lane, patience).await };
    let took = start.elapsed();
    (came, if shot.open_ended { took.saturating_sub(HALF) } else { took })
}

async fn over_h1(shot: &Shot, lane: &Lane, patience: Duration) -> Came {
    let mut client = lane.raw().await;
    // Envoy may answer and close before everything is sent.
    let sent = client.send(&shot.h1()).await.is_ok();
    let mut first = client.response_within(patience).await;
    if shot.open_ended {
        let _ = client.half_close().await;
        if first.is_err() {
            first = client.response_within(HANG * 4).await;
        }
        // What came behind it has been a request of its own. Reading to the end sees that the connection does end.
        if first.is_ok() {
            let _ = tokio::time::timeout(HANG * 4, client.read_to_end()).await;
        }
    }
    match first {
        Ok(response) => Came::H1(response),
        Err(_) if sent => Came::Closed,
        Err(_) => read_anyway(client).await,
    }
}

/// What came back on a connection that was closed while it was written to.
async fn read_anyway(mut client: RawClient) -> Came {
    client.response_within(HANG).await.map_or(Came::Closed, Came::H1)
}

async fn over_h2(shot: &Shot, lane: &Lane, patience: Duration) -> Came {
    let mut client = RawH2::connect(lane.address()).await.unwrap();
    let more = !shot.body.is_empty() || !shot.trailers.is_empty();
    // A stream may be reset before everything is sent.
    let _ = client.headers(&shot.h2(), !more).await;
    if !shot.body.is_empty() {
        let _ = client.data(&shot.body, shot.trailers.is_empty()).await;
    }
    if !shot.trailers.is_empty() {
        let _ = client.headers(&shot.trailers, true).await;
    }
    let mut answer = client.answer(patience).await;
    if shot.open_ended && !answer.ended {
        let _ = client.half_close().await;
        answer = client.answer(HANG * 4).await;
    }
    if answer.status.is_some_and(|status| status >= 200) { Came::H2(answer) } else { Came::Closed }
}

/// A good request, which is served.
async fn good(lane: &Lane, number: usize) -> Result<(), String> {
    let owner = 1_000_000 + u128::try_from(number).unwrap();
    let answer = lane.ask(owner, "/good").header("lock", format!("good/{number}")).send().await;
    let answer = answer.map_err(|error| format!("a good request fails: {error:#}"))?;
    let fence = answer.header("lock-fence").unwrap_or_default();
    if answer.status == 200 && fence.starts_with(&format!("good/{number};fence=")) {
        Ok(())
    } else {
        Err(format!("a good request is answered {}: {fence} {}", answer.status, answer.text()))
    }
}

/// A signed fence of somebody, to be replayed by others.
async fn known(lane: &Lane) -> Known {
    let owner = 77;
    let answer = lane.ask(owner, "/good").header("lock", "order/mine").send().await.unwrap();
    let signed = answer.header("lock-fence").unwrap().into_bytes();
    assert!(String::from_utf8_lossy(&signed).contains(";sig=:"));
    Known { signed, owner }
}

/// What is told of all shots.
#[derive(Default)]
struct Tally {
    by_class: BTreeMap<Class, BTreeMap<Kind, usize>>,
    failures: Vec<String>,
    slow: Vec<usize>,
    slowest: Duration,
    good: usize,
}

impl Tally {
    fn add(&mut self, shot: &Shot, came: &Came, took: Duration) {
        self.slowest = self.slowest.max(took);
        match judge::answer(shot, came) {
            Ok(kind) => *self.by_class.entry(shot.class).or_default().entry(kind).or_default() += 1,
            Err(what) => self.failures.push(format!("{what}\n  {}", shot.shown())),
        }
        if took > HANG {
            self.slow.push(shot.number);
        }
    }

    fn merge(&mut self, other: Tally) {
        for (class, kinds) in other.by_class {
            for (kind, count) in kinds {
                *self.by_class.entry(class).or_default().entry(kind).or_default() += count;
            }
        }
        self.failures.extend(other.failures);
        self.slow.extend(other.slow);
        self.slowest = self.slowest.max(other.slowest);
        self.good += other.good;
    }

    fn of(&self, kind: Kind) -> usize {
        self.by_class.values().filter_map(|kinds| kinds.get(&kind)).sum()
    }
}

#[test]
fn thousands_of_bad_requests() {
    run(async {
        let (seed, requests) =
            (seed(), usize::try_from(number("INTERLOCK_HOSTILE_REQUESTS").unwrap_or(REQUESTS)).unwrap());
        let mut lanes = BTreeMap::new();
        for name in LANES {
            lanes.insert(name, STAGE.lane(name).await);
        }
        let lanes = Arc::new(lanes);
        let known = Arc::new(known(&lanes["accept"]).await);
        let envoy = lanes["accept"].envoy();
        let (memory, start) = (envoy.memory().unwrap(), Instant::now());
        let next = Arc::new(AtomicUsize::new(0));
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            let (lanes, known, next) = (Arc::clone(&lanes), Arc::clone(&known), Arc::clone(&next));
            clients.spawn(async move {
                let mut tally = Tally::default();
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= requests {
                        return tally;
                    }
                    let shot = classes::shot(seed, number, &known);
                    let (came, took) = fire(&shot, &lanes[shot.lane]).await;
                    tally.add(&shot, &came, took);
                    if number % 10 == 0 {
                        match good(&lanes["accept"], number).await {
                            Ok(()) => tally.good += 1,
                            Err(what) => tally.failures.push(format!("{what}, after\n  {}", shot.shown())),
                        }
                    }
                }
            });
        }
        let mut tally = Tally::default();
        while let Some(done) = clients.join_next().await {
            tally.merge(done.unwrap());
        }
        let took = start.elapsed();
        // On a busy machine a request may be late without anything having hung; what hangs does so every time.
        for number in std::mem::take(&mut tally.slow) {
            let shot = classes::shot(seed, number, &known);
            let mut quickest = Duration::MAX;
            for _ in 0..TRIES {
                if quickest > HANG {
                    quickest = quickest.min(fire(&shot, &lanes[shot.lane]).await.1);
                }
            }
            if quickest > HANG {
                tally.failures.push(format!("hangs for {quickest:?}\n  {}", shot.shown()));
            }
        }
        let mut reached = 0;
        for (name, lane) in lanes.iter() {
            lane.upstream().wait_idle().await;
            for seen in lane.upstream().requests() {
                reached += 1;
                tally.failures.extend(judge::seen(&seen, name, &known).err());
            }
        }
        println!(
            "seed {seed}: {requests} requests in {took:.1?}, the slowest in {:.0?}; {reached} at an upstream",
            tally.slowest
        );
        println!("{:<12} {:>7} {:>8} {:>9} {:>7}", "class", "served", "refused", "declined", "closed");
        for (class, kinds) in &tally.by_class {
            let of = |kind| kinds.get(&kind).copied().unwrap_or(0);
            let class = format!("{class:?}");
            println!(
                "{class:<12} {:>7} {:>8} {:>9} {:>7}",
                of(Kind::Served),
                of(Kind::Refused),
                of(Kind::Declined),
                of(Kind::Closed)
            );
        }
        let failures = &tally.failures;
        assert!(
            failures.is_empty(),
            "seed {seed}: {} wrong, such as\n{}",
            failures.len(),
            failures[..failures.len().min(12)].join("\n")
        );
        // Zero wrong of zero would show nothing.
        if requests >= Class::ALL.len() * 20 {
            assert!(Class::ALL.iter().all(|class| tally.by_class.contains_key(class)));
            for kind in [Kind::Served, Kind::Refused, Kind::Declined, Kind::Closed] {
                assert!(tally.of(kind) * 100 > requests, "hardly any {kind:?}");
            }
        }
        assert!(tally.good * 10 >= requests, "{} good ones", tally.good);
        for name in LANES.iter().filter(|name| **name != "off") {
            lanes[name].empty().await;
        }
        let grown = envoy.memory().unwrap().saturating_sub(memory);
        println!("Envoy's memory has grown by {} MiB", grown >> 20);
        assert!(grown < 128 << 20, "Envoy has grown by {} MiB", grown >> 20);
    });
}
