//! Both ends of every request: the caller, who judges what it gets, and the upstream's handler, which works, calls on in
//! the same owner's name, and says what it saw. They meet in the ledger.
//!
//! What is asked is [`super::load`]'s, what callers make of their answers [`super::judge`]'s.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use interlock_testkit::client::traceparent;
use interlock_testkit::upstream::{Recorded, Reply, Reset};
use interlock_testkit::{Answer, Client};

use super::answer;
use super::judge::{self, Judge};
use super::lag::Lag;
use super::ledger::{Ledger, Verdict};
use super::load::{Call, Ending, Expect, Locks, Step, Wire};
use super::policy;
use super::report::Numbers;
use super::stuck::{self, Place};

/// How often a late machine may make one request late: on its way in, out and home.
pub const LATE: u32 = 3;

/// Probes of the machine's lag, and how long each pauses.
const PROBES: usize = 12;
const PROBE_PAUSE: Duration = Duration::from_millis(100);

/// How long a deadlock may stand on a machine that is not late: it is to be found before anyone waits.
const UNTOLD: Duration = Duration::from_millis(200);

/// A request that has no answer after so long hangs.
const HANG: Duration = Duration::from_secs(30);

/// For how long an owner that is gone may still be seen in a cycle, and for how long it is remembered.
const GONE: Duration = Duration::from_secs(30);

/// HTTP/2 clients: each has one connection, and so one worker.
const HTTP2_CLIENTS: usize = 6;

/// The soak's state, shared by all clients and the upstream.
pub struct Driver {
    base: String,
    http1: Client,
    fresh: Client,
    http2: Vec<Client>,
    shared: Mutex<Shared>,
}

/// Everything that both ends write to.
pub struct Shared {
    pub ledger: Ledger,
    pub numbers: Numbers,
    pub lag: Lag,
    /// Requests under way.
    flights: HashMap<u64, Flight>,
    pub owners: HashMap<String, Owner>,
    next: u64,
}

struct Flight {
    call: Arc<Call>,
    owner: u128,
    sent: Instant,
    stage: Stage,
}

/// Where a request is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// On its way to the upstream; perhaps parked.
    Out,
    /// In the upstream, since then.
    Inside(Instant),
    /// On its way back.
    Home,
}

/// One transaction.
pub struct Owner {
    /// What it asks for, somewhere.
    pub locks: HashSet<String>,
    pub ended: Option<Instant>,
}

/// A request as its caller sees it. Dropped before it is over, the caller has left.
struct Asking {
    driver: Arc<Driver>,
    id: u64,
    over: bool,
    // Dropped after `Drop` has run, so that the ledger knows the moment before the connection does.
    exchange: Pin<Box<dyn Future<Output = anyhow::Result<Answer>> + Send>>,
}

impl Drop for Asking {
    fn drop(&mut self) {
        if !self.over {
            let now = Instant::now();
            let mut shared = self.driver.lock();
            let Some(flight) = shared.flights.remove(&self.id) else { return };
            let arrived = flight.stage != Stage::Out;
            shared.ended(self.id, Verdict::Cut(now), &flight.call, flight.sent, now);
            let numbers = &mut shared.numbers;
            *(if arrived { &mut numbers.left_upstream } else { &mut numbers.left_parked }) += 1;
        }
    }
}

/// A request as the upstream sees it. Dropped before it is over, the other side went away.
struct Staying<'a> {
    driver: &'a Driver,
    id: u64,
    by_upstream: bool,
}

impl Drop for Staying<'_> {
    fn drop(&mut self) {
        let mut shared = self.driver.lock();
        // Taken under the lock, so that the ledger's moments are in the order in which it hears of them.
        let now = Instant::now();
        shared.ledger.left(self.id, self.by_upstream, now);
        if let Some(flight) = shared.flights.get_mut(&self.id) {
            flight.stage = Stage::Home;
        }
    }
}

impl Driver {
    /// A driver of load on the Envoy at `base`.
    pub fn new(base: String) -> Arc<Self> {
        Arc::new(Self {
            base,
            http1: Client::http1(),
            fresh: Client::http1_fresh(),
            http2: (0..HTTP2_CLIENTS).map(|_| Client::http2()).collect(),
            shared: Mutex::new(Shared {
                ledger: policy::ledger(),
                numbers: Numbers::default(),
                lag: Lag::default(),
                flights: HashMap::new(),
                owners: HashMap::new(),
                next: 1,
            }),
        })
    }

    /// What both ends write to.
    pub fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Measures how late the machine is, for ever.
    pub async fn probe(self: Arc<Self>) {
        // A connection each, so that every worker has some.
        let probe = |number: usize| {
            let (driver, client) = (Arc::clone(&self), Client::http2());
            async move {
                loop {
                    driver.lock().lag.sent(number, Instant::now());
                    // Where Envoy is at fault, other requests find out.
                    let _ = client.get(format!("{}/probe", driver.base)).send().await;
                    driver.lock().lag.back(number, Instant::now());
                    tokio::time::sleep(PROBE_PAUSE).await;
                }
            }
        };
        let mut probes: tokio::task::JoinSet<()> = (0..PROBES).map(probe).collect();
        probes.join_next().await;
    }

    /// Looks for deadlocks that nobody was told of, for ever.
    pub async fn look_for_cycles(self: Arc<Self>) {
        loop {
            tokio::time::sleep(PROBE_PAUSE).await;
            let mut shared = self.lock();
            let now = Instant::now();
            let late = shared.lag.slowest(now.checked_sub(UNTOLD).unwrap_or(now), now);
            let age = UNTOLD + late * LATE;
            if let Some(what) = shared.cycle(now, age) {
                shared.ledger.violation(format!("a deadlock stands for {age:?}, and nobody was refused:{what}"));
            }
        }
    }

    /// Runs one transaction in the name of a new owner.
    pub async fn transaction(self: &Arc<Self>, call: Call, owner: u128) {
        let name = format!("{owner:032x}");
        {
            let mut shared = self.lock();
            let now = Instant::now();
            shared.owners.insert(name.clone(), Owner { locks: call.every_lock().into_iter().collect(), ended: None });
            if shared.next.is_multiple_of(1024) {
                shared.owners.retain(|_, owner| owner.ended.is_none_or(|ended| now < ended + GONE));
            }
        }
        self.send(Arc::new(call), owner).await;
        if let Some(owner) = self.lock().owners.get_mut(&name) {
            owner.ended = Some(Instant::now());
        }
    }

    /// Sends one call, waits for its end, and judges it.
    async fn send(self: &Arc<Self>, call: Arc<Call>, owner: u128) {
        let name = format!("{owner:032x}");
        let sent = Instant::now();
        let id = {
            let mut shared = self.lock();
            let id = shared.next;
            shared.next += 1;
            shared.numbers.request(call.kind);
            let lock = call.lock.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
            shared.ledger.sent(id, &name, &format!("{} {} {} lock: {lock}", call.kind, call.method, call.path));
            shared.flights.insert(id, Flight { call: Arc::clone(&call), owner, sent, stage: Stage::Out });
            id
        };
        let mut asking =
            Asking { driver: Arc::clone(self), id, over: false, exchange: Box::pin(self.ask(&call, owner, id).send()) };
        let patience = call.leaves.unwrap_or(HANG);
        let Ok(result) = tokio::time::timeout(patience, asking.exchange.as_mut()).await else {
            if call.leaves.is_none() {
                let what = format!("request {id}, {} {}: no answer after {HANG:?}", call.kind, call.path);
                self.lock().ledger.violation(what);
            }
            return;
        };
        let took = sent.elapsed();
        asking.over = true;
        let mut judge = Judge { call: &call, owner: &name, sent, took, shared: self.lock(), wrong: Vec::new() };
        judge.shared.flights.remove(&id);
        let verdict = judge.verdict(&result);
        let Judge { mut shared, wrong, .. } = judge;
        for what in wrong {
            let seen = match &result {
                Ok(answer) => format!("{} {:?} {}", answer.status, answer.headers, answer.text()),
                Err(error) => format!("{error:#}"),
            };
            shared.ledger.violation(format!(
                "request {id} of {name}, {:?} {} {}: {what}\n    asked: {:?} {:?}\n    took {took:?}; got: {seen}",
                call.wire,
                call.kind,
                call.path,
                call.lock.as_deref().map(String::from_utf8_lossy),
                call.expect,
            ));
        }
        shared.ended(id, verdict, &call, sent, Instant::now());
    }

    fn ask(&self, call: &Call, owner: u128, id: u64) -> interlock_testkit::client::Ask {
        let url = format!("{}{}", self.base, call.path);
        // Owners stay with a connection no longer than a call does: each may meet another worker.
        let http2 = &self.http2[usize::try_from(id).unwrap_or(0) % self.http2.len()];
        let ask = match (call.wire, call.method) {
            (Wire::Grpc, _) => http2.grpc(url),
            (Wire::Http1, "GET") => self.http1.get(url),
            (Wire::Http1, _) => self.http1.post(url),
            (Wire::Fresh, "GET") => self.fresh.get(url),
            (Wire::Fresh, _) => self.fresh.post(url),
            (Wire::Http2, "GET") => http2.get(url),
            (Wire::Http2, _) => http2.post(url),
        };
        let mut ask = ask.header("traceparent", traceparent(owner)).header("x-soak", id.to_string());
        if let Some(lock) = &call.lock {
            ask = ask.header("lock", lock);
        }
        if call.forged_fence {
            ask = ask.header("lock-fence", "item/forged;fence=7;mode=exclusive").header("lock-status", "forged");
        }
        if call.body > 0 && call.wire != Wire::Grpc {
            ask = ask.body(vec![b'x'; call.body]);
        }
        ask
    }

    /// The upstream's side of a request.
    pub async fn serve(self: Arc<Self>, request: Recorded) -> Reply {
        if request.path == "/probe" {
            return Reply::new(200, "back");
        }
        let id = request.header("x-soak").and_then(|id| id.parse().ok()).unwrap_or(0);
        let fences = request.headers.get_all("lock-fence").iter();
        let fences = fences.map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned()).collect::<Vec<_>>().join(", ");
        let (call, owner) = {
            let mut shared = self.lock();
            let grants = answer::lock_fence(&fences).unwrap_or_else(|what| {
                shared.ledger.violation(format!("request {id}: {what}"));
                Vec::new()
            });
            // Under the lock: see `Staying`.
            let now = Instant::now();
            let Shared { ledger, flights, numbers, lag, .. } = &mut *shared;
            ledger.entered(id, grants.clone(), now);
            let Some(flight) = flights.get_mut(&id) else {
                numbers.ghosts += 1;
                ledger.left(id, true, now);
                return Reply::new(200, "nobody waits for this");
            };
            flight.stage = Stage::Inside(now);
            let mut wrong = upon_arrival(&flight.call, &request, &grants);
            if let Expect::Locks(Locks { wait, .. }) = &flight.call.expect
                && !lag.allows((now - flight.sent).saturating_sub(*wait), LATE, flight.sent, now)
            {
                wrong = format!("it may wait {wait:?} and arrived after {:?}", now - flight.sent);
            }
            if !wrong.is_empty() {
                ledger.violation(format!("request {id}, {} {}: {wrong}", flight.call.kind, flight.call.path));
            }
            (Arc::clone(&flight.call), flight.owner)
        };
        let mut staying = Staying { driver: &self, id, by_upstream: false };
        for step in &call.work {
            match step {
                Step::Work(span) => tokio::time::sleep(*span).await,
                Step::Call(inner) => self.send(Arc::new((**inner).clone()), owner).await,
            }
        }
        staying.by_upstream = true;
        drop(staying);
        let mut reply = match call.wire {
            Wire::Grpc => Reply::grpc(0),
            _ => Reply::new(200, "done\n"),
        };
        reply = reply.header("x-soak-fence", &fences);
        match call.ending {
            Ending::Answer => {}
            Ending::Stall(span) => reply.stall = span,
            Ending::BreakBefore => reply.reset = Some(Reset::BeforeHead),
            Ending::BreakAfter => reply.reset = Some(Reset::AfterHead),
        }
        reply
    }
}

impl Shared {
    /// Tells the ledger how a request ended, as far as that is certain.
    fn ended(&mut self, id: u64, verdict: Verdict, call: &Call, sent: Instant, now: Instant) {
        let (verdict, unsure) = judge::certain(verdict, call, sent, now, &self.lag);
        self.numbers.unsure += u64::from(unsure);
        self.ledger.ended(id, verdict, now);
    }

    /// A cycle of which every edge is older than `age`.
    fn cycle(&self, now: Instant, age: Duration) -> Option<String> {
        let (mut waiters, mut holders) = (Vec::new(), Vec::new());
        for flight in self.flights.values() {
            let Expect::Locks(locks) = &flight.call.expect else { continue };
            // A lease that may have been lost is not held for certain; and in these classes not every conflict is one.
            let certain = now - flight.sent < locks.hold / 2;
            let plain = locks.wants.iter().all(|(lock, _)| !lock.starts_with("pool/") && !lock.starts_with("stock/"));
            if !certain || !plain {
                continue;
            }
            let places = locks.wants.iter().map(|(lock, mode)| Place { owner: flight.owner, lock, mode: *mode });
            match flight.stage {
                Stage::Out if locks.wants.len() == 1 && now - flight.sent > age => waiters.extend(places),
                Stage::Inside(since) if now - since > age => holders.extend(places),
                _ => {}
            }
        }
        let cycle = stuck::cycle(&stuck::edges(&waiters, &holders))?;
        let told = |owner: &u128| {
            let of = |places: &[Place<'_>]| {
                let own = places.iter().filter(|place| place.owner == *owner);
                own.map(|place| format!("{} ({:?})", place.lock, place.mode)).collect::<Vec<_>>().join(", ")
            };
            format!("\n    {owner:032x} waits for {}, holds {}", of(&waiters), of(&holders))
        };
        Some(cycle.iter().map(told).collect())
    }
}

/// What is wrong with a request as it reaches the upstream; empty: nothing.
fn upon_arrival(call: &Call, request: &Recorded, grants: &[super::ledger::Grant]) -> String {
    if request.headers.contains_key("lock") || request.headers.contains_key("lock-status") {
        return "lock or lock-status reached the upstream".to_owned();
    }
    match &call.expect {
        Expect::Nothing if grants.is_empty() => String::new(),
        Expect::Nothing => format!("it asked for nothing and has {grants:?}"),
        Expect::Refused(slug) => format!("{slug} was expected, and it reached the upstream"),
        Expect::Locks(Locks { wants, .. }) => {
            let has = |(lock, _): &&(String, _)| grants.iter().any(|grant| grant.lock == *lock);
            if let Some((lock, _)) = wants.iter().find(|want| !has(want)) {
                return format!("it asked for {lock} and has {grants:?}");
            }
            let weaker = |(lock, mode): &&(String, _)| {
                let exclusive = *mode == super::ledger::Mode::Exclusive;
                exclusive && grants.iter().any(|grant| grant.lock == *lock && grant.mode != *mode)
            };
            if let Some((lock, _)) = wants.iter().find(weaker) {
                return format!("it asked for {lock} exclusively and has {grants:?}");
            }
            String::new()
        }
    }
}
