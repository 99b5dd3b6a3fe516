//! Both ends of every request: the caller, who judges what it gets, and the upstream's handler, which works, calls on in
//! the same owner's name, and says what it saw. They meet in the ledger.
//!
//! What is asked is [`super::load`]'s, what a refusal must look like [`super::answer`]'s.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use interlock_testkit::client::traceparent;
use interlock_testkit::upstream::{Recorded, Reply, Reset};
use interlock_testkit::{Answer, Client};
use serde_json::Value;

use super::answer::{self, Status};
use super::ledger::{Ledger, Verdict};
use super::load::{Call, Ending, Expect, Locks, Step, Wire};
use super::policy::{self, HASTY, INSTANCE, PATIENT};
use super::report::Numbers;

/// How much later than its deadline a request may be answered: what a loaded machine with two cores takes to come round
/// to it. Nothing is parked longer than that.
pub const SLACK: Duration = Duration::from_secs(1);

/// How much sooner than its time something may seem to end: clocks are read at different places.
const EARLY: Duration = Duration::from_millis(20);

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
    /// Requests under way.
    flights: HashMap<u64, Flight>,
    owners: HashMap<String, Owner>,
    next: u64,
}

struct Flight {
    call: Arc<Call>,
    owner: u128,
    sent: Instant,
    arrived: bool,
}

struct Owner {
    locks: HashSet<String>,
    ended: Option<Instant>,
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
            let arrived = shared.flights.remove(&self.id).is_some_and(|flight| flight.arrived);
            shared.ledger.ended(self.id, Verdict::Cut(now), now);
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
            shared.ledger.sent(id, &name, &format!("{} {} {}", call.kind, call.method, call.path));
            shared.flights.insert(id, Flight { call: Arc::clone(&call), owner, sent, arrived: false });
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
        shared.ledger.ended(id, verdict, Instant::now());
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
            let Shared { ledger, flights, numbers, .. } = &mut *shared;
            ledger.entered(id, grants.clone(), now);
            let Some(flight) = flights.get_mut(&id) else {
                numbers.ghosts += 1;
                ledger.left(id, true, now);
                return Reply::new(200, "nobody waits for this");
            };
            flight.arrived = true;
            let wrong = upon_arrival(&flight.call, &request, &grants, now - flight.sent);
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

/// What is wrong with a request as it reaches the upstream, so long after it was sent; empty: nothing.
fn upon_arrival(call: &Call, request: &Recorded, grants: &[super::ledger::Grant], after: Duration) -> String {
    if request.headers.contains_key("lock") || request.headers.contains_key("lock-status") {
        return "lock or lock-status reached the upstream".to_owned();
    }
    match &call.expect {
        Expect::Nothing if grants.is_empty() => String::new(),
        Expect::Nothing => format!("it asked for nothing and has {grants:?}"),
        Expect::Refused(slug) => format!("{slug} was expected, and it reached the upstream"),
        Expect::Locks(Locks { wants, wait, .. }) => {
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
            if after > *wait + SLACK {
                return format!("it may wait {wait:?} and arrived after {after:?}");
            }
            String::new()
        }
    }
}

/// One answer, and all that is needed to judge it.
struct Judge<'a> {
    call: &'a Call,
    owner: &'a str,
    sent: Instant,
    took: Duration,
    shared: MutexGuard<'a, Shared>,
    wrong: Vec<String>,
}

impl Judge<'_> {
    fn verdict(&mut self, result: &anyhow::Result<Answer>) -> Verdict {
        let Ok(answer) = result else { return self.broken() };
        let status = answer::lock_status(answer, INSTANCE).unwrap_or_else(|what| {
            self.wrong.push(what);
            None
        });
        match status {
            Some(Status::Refused(slug)) => self.refused(answer, &slug),
            Some(Status::Acquired(seconds)) => {
                match &self.call.expect {
                    Expect::Locks(locks) => {
                        let wait = locks.wait;
                        let waited = Duration::from_secs_f64(seconds.max(0.0));
                        if waited > wait + SLACK || waited > self.took + EARLY {
                            self.wrong.push(format!("it says it waited {waited:?}, of {wait:?}"));
                        }
                        if waited > locks.sooner_than {
                            self.wrong.push(format!("it waited {waited:?} in a queue that moves on all the time"));
                        }
                        self.shared.numbers.granted(waited);
                    }
                    other => self.wrong.push(format!("acquired, where {other:?} was expected")),
                }
                if !answer.header("server-timing").is_some_and(|timing| timing.contains("lock;dur=")) {
                    self.wrong.push(format!("server-timing is {:?}", answer.header("server-timing")));
                }
                self.passed(answer)
            }
            None => {
                match &self.call.expect {
                    Expect::Nothing => self.shared.numbers.unannotated += 1,
                    other => self.wrong.push(format!("no lock-status, where {other:?} was expected")),
                }
                self.passed(answer)
            }
        }
    }

    /// An answer to a request that was let through: the upstream's, or Envoy's in its stead.
    fn passed(&mut self, answer: &Answer) -> Verdict {
        let limit = if self.call.path.starts_with("/hasty") { HASTY } else { PATIENT };
        match (answer.status, answer.header("x-soak-fence")) {
            (200, Some(fences)) => {
                let same = |told: &str| {
                    let (told, seen) = (answer::lock_fence(told), answer::lock_fence(&fences));
                    told.is_ok() && told == seen
                };
                if !fences.is_empty() && !same(&answer.joined("lock-fence")) {
                    self.wrong.push("caller and upstream were told different fences".to_owned());
                }
                Verdict::Upstream
            }
            // A reset of HTTP/2 may overtake the head that was on its way before it.
            (503, None) if matches!(self.call.ending, Ending::BreakBefore | Ending::BreakAfter) => {
                self.shared.numbers.broken_before += 1;
                Verdict::Upstream
            }
            (504, None) if self.took + EARLY >= limit => {
                self.shared.numbers.route_timeouts += 1;
                Verdict::Cut(self.sent + limit.saturating_sub(EARLY))
            }
            (status, _) => {
                self.wrong.push(format!("status {status} that nothing provoked"));
                Verdict::Cut(self.sent)
            }
        }
    }

    fn refused(&mut self, answer: &Answer, slug: &str) -> Verdict {
        self.wrong.extend(answer::refusal(answer, slug, self.owner, self.call.wire == Wire::Grpc));
        self.shared.numbers.refused(slug, self.took);
        let locks = match &self.call.expect {
            Expect::Locks(locks) => locks,
            Expect::Refused(expected) => {
                if *expected != slug {
                    self.wrong.push(format!("refused as {slug}, where {expected} was expected"));
                }
                return Verdict::Refused;
            }
            Expect::Nothing => {
                self.wrong.push(format!("refused as {slug}, and it had asked for nothing"));
                return Verdict::Refused;
            }
        };
        if slug == "lease-lost" {
            return self.lost(locks.hold, false);
        }
        if self.took > locks.wait + SLACK {
            self.wrong.push(format!("it may wait {:?} and was answered after {:?}", locks.wait, self.took));
        }
        let possible = match slug {
            "wait-timeout" => {
                let in_time = self.took + EARLY >= locks.wait && locks.wait < locks.sooner_than;
                !locks.wait.is_zero() && in_time
            }
            "lock-held" => locks.wait.is_zero(),
            "deadlock" => locks.may_deadlock && !locks.wait.is_zero(),
            "order-violation" => locks.may_violate,
            "too-many-waiters" => !locks.wait.is_zero(),
            _ => false,
        };
        if !possible {
            self.wrong.push(format!("it can't have met {slug}"));
        }
        if slug == "deadlock" {
            self.cycle(answer);
        }
        Verdict::Refused
    }

    /// Whether the cycle can have been there: everyone in it was about, and asks for these locks.
    fn cycle(&mut self, answer: &Answer) {
        let problem = serde_json::from_slice::<Value>(&answer.body).unwrap_or_default();
        for (owner, lock, holder) in answer::edges(&problem).unwrap_or_default() {
            for who in [owner, holder] {
                let known = self.shared.owners.get(&who);
                // One that has left may be seen for as long as Envoy does not know.
                let about = known.is_some_and(|o| o.ended.is_none_or(|ended| ended + SLACK > self.sent));
                if !about || !known.is_some_and(|o| o.locks.contains(&lock)) {
                    self.wrong.push(format!("a phantom in the cycle: {who} has no business with {lock}"));
                }
            }
        }
    }

    /// No whole answer came.
    fn broken(&mut self) -> Verdict {
        match (&self.call.expect, self.call.ending) {
            (_, Ending::BreakAfter) => {
                self.shared.numbers.broken_after += 1;
                Verdict::Upstream
            }
            (Expect::Locks(locks), Ending::Stall(_)) if self.took + EARLY >= locks.hold => self.lost(locks.hold, true),
            _ => {
                self.wrong.push("cut off, and nothing provoked it".to_owned());
                Verdict::Cut(self.sent)
            }
        }
    }

    /// Its lease was lost while it was upstream: before the response had begun, or after.
    fn lost(&mut self, hold: Duration, begun: bool) -> Verdict {
        let numbers = &mut self.shared.numbers;
        if self.took + EARLY >= hold {
            *(if begun { &mut numbers.lost_after } else { &mut numbers.lost_before }) += 1;
            Verdict::Cut(self.sent + hold.saturating_sub(EARLY))
        } else {
            // Not by the hold limit: nobody renewed it.
            numbers.expired += 1;
            Verdict::Cut(self.sent)
        }
    }
}
