//! What is asked of Interlock: transactions as trees of calls, drawn at random from a mix of everything that the contract
//! knows. Pure, given its source of random numbers.
//!
//! A call says also what may become of it. What must not, [`super::drive`] finds out.

use std::time::Duration;

use fastrand::Rng;

use super::ledger::Mode;
use super::policy::{HOLD, JOB_HOLD, JOB_TTL, JOB_WAIT, LOCKS_PER_REQUEST, TTL, WAIT};

/// One request, and what its handler does while it holds its locks.
#[derive(Debug, Clone)]
pub struct Call {
    /// What it is for, for people to read.
    pub kind: &'static str,
    pub wire: Wire,
    pub method: &'static str,
    pub path: String,
    /// The `lock` header's bytes.
    pub lock: Option<Vec<u8>>,
    /// A `lock-fence` that the caller has made up.
    pub forged_fence: bool,
    /// Bytes of the body.
    pub body: usize,
    pub expect: Expect,
    /// When its caller leaves, at the latest.
    pub leaves: Option<Duration>,
    /// What the upstream does.
    pub work: Vec<Step>,
    pub ending: Ending,
}

/// How it travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    Http1,
    /// HTTP/1.1 over a connection of its own.
    Fresh,
    Http2,
    Grpc,
}

/// What has to become of it.
#[derive(Debug, Clone)]
pub enum Expect {
    /// Interlock does not touch it.
    Nothing,
    /// It gets its locks, or one of the refusals that it may meet.
    Locks(Locks),
    /// It is refused with this slug.
    Refused(&'static str),
}

/// What it asks for.
#[derive(Debug, Clone)]
pub struct Locks {
    pub wants: Vec<(String, Mode)>,
    pub wait: Duration,
    /// The shortest of its TTLs.
    pub ttl: Duration,
    pub hold: Duration,
    /// A grant comes sooner than so: the queue moves on all the time, and a wake-up that gets lost would show.
    pub sooner_than: Duration,
    /// Whether waiting could close a cycle.
    pub may_deadlock: bool,
    /// Whether it could break the declared order.
    pub may_violate: bool,
}

impl Locks {
    fn new(wants: Vec<(String, Mode)>, wait: Duration) -> Self {
        Locks { wants, wait, ttl: TTL, hold: HOLD, sooner_than: Duration::MAX, may_deadlock: false, may_violate: false }
    }
}

/// What the upstream does before it answers.
#[derive(Debug, Clone)]
pub enum Step {
    /// Work.
    Work(Duration),
    /// A call through Envoy, for the same owner.
    Call(Box<Call>),
}

/// How the upstream ends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It answers.
    Answer,
    /// It answers, and takes so long between the head and the rest.
    Stall(Duration),
    /// It breaks off before the head.
    BreakBefore,
    /// It breaks off after the head.
    BreakAfter,
}

/// TTLs in seconds: some shorter than what is done under them. But few: on a loaded machine a short lease may lapse, and then
/// little of it is certain.
const TTLS: [&str; 6] = ["0.3", "1.5", "3", "4", "5", "5"];

/// Malformed `lock` headers of every kind that HTTP lets through.
const MALFORMED: [&[u8]; 16] = [
    b"item/a;mode=exlusive",
    b"item//a",
    b"/item",
    b"item/",
    b"item/%G1",
    b"item/a;wait=soon",
    b"item/a;wait=-1",
    b"item/a;ttl=\"1\"",
    b"item/a,,item/b",
    b"item/a,",
    b"(item/a item/b)",
    b"42",
    b"item/\xff\x80",
    b"\"item a\"",
    b"item/a;mode=intent-shared",
    b"item/a;=",
];

impl Call {
    fn new(rng: &mut Rng, kind: &'static str, method: &'static str, path: impl Into<String>) -> Self {
        let wire = match rng.u32(..10) {
            0 => Wire::Fresh,
            1..=5 => Wire::Http2,
            _ => Wire::Http1,
        };
        Call {
            kind,
            wire,
            method,
            path: path.into(),
            lock: None,
            forged_fence: rng.u32(..8) == 0,
            body: if method == "POST" && rng.u32(..4) == 0 { rng.usize(..4096) } else { 0 },
            expect: Expect::Nothing,
            leaves: None,
            work: Vec::new(),
            ending: Ending::Answer,
        }
    }

    /// The locks that a rule of the policy takes for it.
    fn by_rule(mut self, wants: Vec<(String, Mode)>) -> Self {
        self.expect = Expect::Locks(Locks::new(wants, WAIT));
        self
    }

    /// Asks for locks by header, with this wait.
    fn by_header(self, rng: &mut Rng, wants: Vec<(String, Mode)>, wait: Duration) -> Self {
        let ttl = TTLS[rng.usize(..TTLS.len())];
        self.by_header_for(wants, wait, ttl)
    }

    /// Asks for locks by header, with this wait and this TTL in seconds.
    fn by_header_for(mut self, wants: Vec<(String, Mode)>, wait: Duration, ttl: &str) -> Self {
        let member = |(name, mode): &(String, Mode)| {
            let mode = if *mode == Mode::Shared { ";mode=shared" } else { "" };
            // A Decimal has three digits behind its point, where a float may print more.
            format!("{name}{mode};wait={}.{:03};ttl={ttl}", wait.as_secs(), wait.subsec_millis())
        };
        self.lock = Some(wants.iter().map(member).collect::<Vec<_>>().join(", ").into_bytes());
        self.expect = Expect::Locks(Locks::new(wants, wait));
        let ttl = Duration::from_secs_f64(ttl.parse().unwrap_or(0.0));
        self.locks(|locks| locks.ttl = TTL.min(ttl))
    }

    fn locks(mut self, change: impl FnOnce(&mut Locks)) -> Self {
        if let Expect::Locks(locks) = &mut self.expect {
            change(locks);
        }
        self
    }

    fn may_deadlock(self) -> Self {
        self.locks(|locks| locks.may_deadlock = true)
    }

    fn may_violate(self) -> Self {
        self.locks(|locks| locks.may_violate = true)
    }

    fn works(mut self, rng: &mut Rng, millis: std::ops::Range<u64>) -> Self {
        self.work.push(Step::Work(Duration::from_millis(rng.u64(millis))));
        self
    }

    fn calls(mut self, call: Call) -> Self {
        self.work.push(Step::Call(Box::new(call)));
        self
    }

    fn ends(mut self, ending: Ending) -> Self {
        self.ending = ending;
        self
    }

    /// Every lock that it or a call below it asks for, ancestors too: what its owner can be seen to wait for or hold.
    pub fn every_lock(&self) -> Vec<String> {
        let mut all = Vec::new();
        if let Expect::Locks(locks) = &self.expect {
            for (name, _) in &locks.wants {
                all.extend(name.match_indices('/').map(|(end, _)| name[..end].to_owned()));
                all.push(name.clone());
            }
        }
        for step in &self.work {
            if let Step::Call(call) = step {
                all.extend(call.every_lock());
            }
        }
        all
    }
}

/// What a client does next.
pub fn transaction(rng: &mut Rng) -> Call {
    match rng.u32(..100) {
        0..10 => account(rng, 10, 0..12),
        10..18 => several(rng),
        18..26 => stock(rng),
        26..33 => pool(rng),
        33..43 => rising(rng),
        43..48 => falling(rng),
        48..60 => opposite(rng),
        60..64 => upgrade(rng),
        64..69 => at_once(rng),
        69..78 => leaving(rng),
        78..82 => breaking(rng),
        82..86 => slow(rng),
        86..88 => hasty(rng),
        88..92 => Call::new(rng, "unannotated", "POST", "/plain").works(rng, 0..3),
        92..94 => unique(rng),
        94..98 => malformed(rng),
        98 => too_many(rng),
        _ => grpc(rng),
    }
}

fn name(class: &str, number: usize) -> String {
    format!("{class}/{}", char::from(b'a' + u8::try_from(number % 26).unwrap_or(0)))
}

/// Different numbers below `below`, in random order.
fn different(rng: &mut Rng, count: usize, below: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..below).collect();
    rng.shuffle(&mut all);
    all.truncate(count);
    all
}

fn mode(rng: &mut Rng) -> Mode {
    if rng.u32(..3) == 0 { Mode::Shared } else { Mode::Exclusive }
}

/// One of the first `of` accounts, by rule, written or read.
fn account(rng: &mut Rng, of: usize, work: std::ops::Range<u64>) -> Call {
    let number = rng.usize(..of);
    let read = rng.bool();
    account_of(rng, number, read).works(rng, work)
}

fn account_of(rng: &mut Rng, number: usize, read: bool) -> Call {
    let lock = name("account", number);
    let (method, mode) = if read { ("GET", Mode::Shared) } else { ("POST", Mode::Exclusive) };
    Call::new(rng, "account", method, format!("/{lock}")).by_rule(vec![(lock, mode)])
}

/// Several locks in one request, written in any order; now and then by a rule and a header together.
fn several(rng: &mut Rng) -> Call {
    if rng.u32(..5) == 0 {
        let (account, item) = (name("account", rng.usize(..10)), name("item", rng.usize(..8)));
        let call = Call::new(rng, "several", "POST", format!("/{account}"));
        let wants = vec![(item, mode(rng))];
        let mut call = call.by_header(rng, wants, WAIT).works(rng, 0..10);
        if let Expect::Locks(locks) = &mut call.expect {
            locks.wants.push((account, Mode::Exclusive));
        }
        return call.may_deadlock();
    }
    let count = rng.usize(2..=4);
    let wait = Duration::from_millis(rng.u64(50..900));
    let wants = different(rng, count, 8).into_iter().map(|n| (name("item", n), mode(rng))).collect::<Vec<_>>();
    let call = Call::new(rng, "several", "POST", "/several").by_header(rng, wants, wait);
    call.may_deadlock().works(rng, 0..15)
}

/// A site, or a bin of it, and sometimes both from within one another.
fn stock(rng: &mut Rng) -> Call {
    let (site, bin) = (name("stock", rng.usize(..2)), rng.usize(..4));
    let bin = format!("{site}/{bin}");
    let call = match rng.u32(..6) {
        0 => {
            let call = Call::new(rng, "stock", "GET", format!("/{site}"));
            call.by_rule(vec![(site, Mode::Shared)]).works(rng, 0..10)
        }
        1 => {
            let wait = Duration::from_millis(rng.u64(100..2000));
            let call = Call::new(rng, "stock", "POST", "/site").by_header(rng, vec![(site, Mode::Exclusive)], wait);
            call.works(rng, 0..10)
        }
        2 => {
            let inner = Call::new(rng, "stock", "POST", format!("/{bin}"));
            let inner = inner.by_rule(vec![(bin, Mode::Exclusive)]).may_deadlock().works(rng, 0..5);
            let call = Call::new(rng, "stock", "GET", format!("/{site}"));
            call.by_rule(vec![(site, Mode::Shared)]).works(rng, 0..5).calls(inner)
        }
        3 => {
            let wait = Duration::from_millis(300);
            let call = Call::new(rng, "stock", "POST", "/bin").by_header(rng, vec![(bin, Mode::Shared)], wait);
            call.works(rng, 0..10)
        }
        _ => {
            let call = Call::new(rng, "stock", "POST", format!("/{bin}"));
            call.by_rule(vec![(bin, Mode::Exclusive)]).works(rng, 0..10)
        }
    };
    // Who upgrades a site stands before those that came down to it.
    call.may_deadlock().may_violate()
}

fn pool(rng: &mut Rng) -> Call {
    let lock = name("pool", rng.usize(..2));
    Call::new(rng, "pool", "POST", format!("/{lock}")).by_rule(vec![(lock, Mode::Exclusive)]).works(rng, 5..40)
}

/// Accounts in rising order, one from within the other, with re-entry at the end.
fn rising(rng: &mut Rng) -> Call {
    let mut numbers = different(rng, 3, 10);
    numbers.sort_unstable();
    let again = account_of(rng, numbers[0], true).works(rng, 0..3);
    let third = account_of(rng, numbers[2], false).works(rng, 0..5);
    let read = rng.u32(..4) == 0;
    let second = account_of(rng, numbers[1], read).works(rng, 0..5).calls(third);
    let mut first = account_of(rng, numbers[0], false).works(rng, 0..5).calls(second).calls(again);
    first.kind = "rising";
    first
}

/// Two accounts in falling order: refused, whoever is in the way.
fn falling(rng: &mut Rng) -> Call {
    let mut numbers = different(rng, 2, 10);
    numbers.sort_unstable();
    let read = rng.bool();
    let mut inner = account_of(rng, numbers[0], read);
    inner.expect = Expect::Refused("order-violation");
    inner.kind = "falling inside";
    let mut outer = account_of(rng, numbers[1], false).works(rng, 0..3).calls(inner);
    outer.kind = "falling";
    outer
}

/// Two or three locks without an order, one from within the other: what deadlocks.
fn opposite(rng: &mut Rng) -> Call {
    // Classes without a rank, and one with a rank whose locks are unordered.
    let class = if rng.bool() { "item" } else { "ledger" };
    let count = rng.usize(2..=3);
    let mut call: Option<Call> = None;
    for number in different(rng, count, 5) {
        let wants = vec![(name(class, number), mode(rng))];
        let wait = Duration::from_millis(rng.u64(200..1500));
        let outer = Call::new(rng, "opposite", "POST", "/opposite").by_header(rng, wants, wait).may_deadlock();
        let outer = outer.works(rng, 5..25);
        call = Some(match call {
            Some(inner) => outer.calls(inner),
            None => outer,
        });
    }
    call.unwrap_or_else(|| account(rng, 10, 0..1))
}

/// Read, then write what was read: two of these on one lock can only deadlock.
fn upgrade(rng: &mut Rng) -> Call {
    let lock = name("item", 8 + rng.usize(..2));
    let wait = Duration::from_millis(rng.u64(200..800));
    let inner =
        Call::new(rng, "upgrade", "POST", "/upgrade").by_header(rng, vec![(lock.clone(), Mode::Exclusive)], wait);
    let inner = inner.may_deadlock().works(rng, 0..5);
    let outer = Call::new(rng, "upgrade", "POST", "/upgrade").by_header(rng, vec![(lock, Mode::Shared)], wait);
    outer.works(rng, 2..12).calls(inner).works(rng, 0..3)
}

/// `wait=0`.
fn at_once(rng: &mut Rng) -> Call {
    let wants = vec![(name("item", rng.usize(..5)), mode(rng))];
    Call::new(rng, "at once", "POST", "/at-once").by_header(rng, wants, Duration::ZERO).works(rng, 0..10)
}

/// A caller that leaves, parked or upstream, perhaps with a call below it in the same state.
fn leaving(rng: &mut Rng) -> Call {
    let lock = |rng: &mut Rng| vec![(name("item", 10 + rng.usize(..3)), Mode::Exclusive)];
    let wait = Duration::from_millis(rng.u64(50..1500));
    let wants = lock(rng);
    let mut call = Call::new(rng, "leaving", "POST", "/leaving").by_header(rng, wants, wait).may_deadlock();
    if rng.u32(..3) == 0 {
        let wants = lock(rng);
        let inner = Call::new(rng, "leaving", "POST", "/leaving").by_header(rng, wants, wait).may_deadlock();
        call = call.works(rng, 0..10).calls(inner.works(rng, 0..20));
    }
    call.leaves = Some(Duration::from_micros(rng.u64(500..80_000)));
    call.works(rng, 10..60)
}

/// An upstream that breaks off. Nobody stays at these locks for more than a few milliseconds, so that whoever waits gets its
/// turn soon; a wake-up that got lost would only be made up for when the lease in the way could have expired.
fn breaking(rng: &mut Rng) -> Call {
    let wants = vec![(name("item", 13 + rng.usize(..2)), mode(rng))];
    let ending = if rng.bool() { Ending::BreakBefore } else { Ending::BreakAfter };
    let call = Call::new(rng, "breaking", "POST", "/breaking").by_header_for(wants, Duration::from_secs(2), "1.5");
    call.locks(|locks| locks.sooner_than = Duration::from_secs(1)).works(rng, 0..15).ends(ending)
}

/// An upstream that works for longer than the TTL: renewed; or for longer than the hold limit: lost, before or after the
/// head of its answer.
fn slow(rng: &mut Rng) -> Call {
    let lock = name("job", rng.usize(..12));
    let call = Call::new(rng, "slow", "POST", format!("/{lock}")).by_rule(vec![(lock, Mode::Exclusive)]);
    let call = call.locks(|locks| (locks.wait, locks.ttl, locks.hold) = (JOB_WAIT, JOB_TTL, JOB_HOLD));
    let beyond = JOB_HOLD + Duration::from_millis(rng.u64(500..1200));
    match rng.u32(..8) {
        0 => call.works(rng, 2000..2500),
        1 => call.works(rng, 0..200).ends(Ending::Stall(beyond)),
        2 => call.works(rng, 0..200).ends(Ending::Stall(Duration::from_millis(rng.u64(400..900)))),
        _ => call.works(rng, 400..1000),
    }
}

/// A route that gives up on the upstream.
fn hasty(rng: &mut Rng) -> Call {
    let wants = vec![(name("item", 16 + rng.usize(..4)), Mode::Exclusive)];
    let work = if rng.bool() { 0..100 } else { 500..700 };
    Call::new(rng, "hasty", "POST", "/hasty").by_header(rng, wants, WAIT).works(rng, work)
}

/// A lock that nobody ever asked for before, of a class that the policy may not know: nothing may remain of it.
fn unique(rng: &mut Rng) -> Call {
    let class = if rng.bool() { "item".to_owned() } else { format!("c{}", rng.u64(..)) };
    let wants = vec![(format!("{class}/{}/{}", rng.u64(..), "x".repeat(rng.usize(1..150))), mode(rng))];
    Call::new(rng, "unique", "POST", "/unique").by_header(rng, wants, WAIT).works(rng, 0..3)
}

fn malformed(rng: &mut Rng) -> Call {
    let mut call = Call::new(rng, "malformed", "POST", "/malformed");
    call.lock = Some(MALFORMED[rng.usize(..MALFORMED.len())].to_vec());
    call.expect = Expect::Refused("malformed-annotation");
    call
}

fn too_many(rng: &mut Rng) -> Call {
    let wants = (0..=LOCKS_PER_REQUEST).map(|number| (name("item", number), Mode::Shared)).collect();
    let mut call = Call::new(rng, "too many", "POST", "/too-many").by_header(rng, wants, WAIT);
    call.expect = Expect::Refused("too-many-locks");
    call
}

fn grpc(rng: &mut Rng) -> Call {
    let wants = vec![(name("item", rng.usize(..5)), Mode::Exclusive)];
    let wait = if rng.bool() { Duration::ZERO } else { Duration::from_millis(60) };
    let mut call = Call::new(rng, "grpc", "POST", "/soak.Soak/Call").by_header(rng, wants, wait).works(rng, 0..10);
    (call.wire, call.body) = (Wire::Grpc, 5);
    call
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_gives_one_mix_and_the_mix_has_everything() {
        let kinds = |seed| {
            let mut rng = Rng::with_seed(seed);
            (0..2000).map(|_| transaction(&mut rng).kind).collect::<Vec<_>>()
        };
        assert_eq!(kinds(7), kinds(7));
        assert_ne!(kinds(7), kinds(8));
        assert_eq!(kinds(7).into_iter().collect::<BTreeSet<_>>().len(), 18);
    }
}
