//! Stored records: whatever bytes stand in shared data, the local backend reads them or says that it cannot.
//!
//! Input: four records, each with its length before it (two bytes, the lower first): a bucket of locks, one of owners, the
//! sessions, a bucket of an authority's leases. The rest is what is then done, two bytes a step: by the local backend over a host,
//! then by an authority ([`crate::leases`]). [`Input`] takes it apart and puts it together.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::LazyLock;

use interlock::backend::Purpose;
use interlock::backend::local::{Local, decode, encode};
use interlock_core::lease::LeaseBucket;
use interlock_core::store::{LockBucket, OwnerBucket, Record};
use interlock_core::{
    Class, Classes, Duration, Lease, LeaseId, Limits, LockName, Mode, Outcome, OwnerId, Pending, Rank, Request, Rules,
    Sessions, Want,
};

use crate::host::Bench;

/// The locks that are asked for.
pub const LOCKS: [&str; 6] = ["a/1", "a/2", "pool/1", "t/a/b", "r/1", "q/1"];

/// Who asks.
pub const OWNERS: [&str; 4] = ["one", "two", "three", "four"];

/// The most steps of an input.
const MAX_STEPS: usize = 40;

/// What one step may ask of the host at the most: a sweep reads a quarter of all buckets, of locks and of owners; a search
/// follows what the records say. Four bytes of record cannot name more than one thing to follow.
fn most_calls(input: &Input<'_>) -> u64 {
    let bytes = u64::try_from(input.len()).expect("small");
    2_000 + bytes * bytes / 16
}

/// How much one step may add to what is stored.
const MOST_GROWTH: usize = 4_096;

/// The parts of an input.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    /// Every bucket of locks.
    pub locks: &'a [u8],
    /// Every bucket of owners.
    pub owners: &'a [u8],
    /// The sessions.
    pub sessions: &'a [u8],
    /// Every bucket of leases.
    pub leases: &'a [u8],
    /// The steps.
    pub steps: &'a [u8],
}

impl<'a> Input<'a> {
    /// Takes an input apart.
    pub fn parse(data: &'a [u8]) -> Self {
        fn section<'d>(rest: &mut &'d [u8]) -> &'d [u8] {
            let Some((length, behind)) = rest.split_first_chunk::<2>() else { return std::mem::take(rest) };
            let (section, behind) = behind.split_at(usize::from(u16::from_le_bytes(*length)).min(behind.len()));
            *rest = behind;
            section
        }
        let mut rest = data;
        let [locks, owners, sessions, leases] = std::array::from_fn(|_| section(&mut rest));
        Input { locks, owners, sessions, leases, steps: rest }
    }

    /// Puts an input together.
    pub fn bytes(&self) -> Vec<u8> {
        let section = |bytes: &[u8]| {
            let length = u16::try_from(bytes.len()).expect("a short record");
            [&length.to_le_bytes()[..], bytes].concat()
        };
        let records = [self.locks, self.owners, self.sessions, self.leases].map(section);
        [records.concat(), self.steps.to_vec()].concat()
    }

    /// How many bytes of records there are.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.locks.len() + self.owners.len() + self.sessions.len() + self.leases.len()
    }

    /// The record of a key; none where it is not one of those that the names here fall under.
    fn of(&self, key: &str) -> Option<&'a [u8]> {
        let record = match kind(key) {
            'l' => self.locks,
            'o' => self.owners,
            's' => self.sessions,
            _ => return None,
        };
        (!record.is_empty() && TOUCHED.contains(key)).then_some(record)
    }
}

/// The letter that says what a key holds: locks, owners, the sessions, or something else.
pub fn kind(key: &str) -> char {
    let mut parts = key.split('/').skip(4);
    match (parts.next(), parts.next()) {
        (Some("l"), Some(_)) => 'l',
        (Some("o"), Some(_)) => 'o',
        (Some("s"), None) => 's',
        _ => ' ',
    }
}

/// The keys that the names of this module fall under: the others stay empty, so that a sweep costs little.
static TOUCHED: LazyLock<BTreeSet<String>> = LazyLock::new(|| {
    let host = Bench::with_shared(|_| None);
    let mut worker = Worker::open(&host);
    for n in 0..OWNERS.len().max(LOCKS.len()) {
        let n = u8::try_from(n).expect("few");
        worker.step(0, n | n << 3);
    }
    host.written().into_keys().collect()
});

/// See the module.
pub fn run(data: &[u8]) {
    let input = Input::parse(data);
    let locks = round_trip::<LockBucket>(input.locks);
    let owners = round_trip::<OwnerBucket>(input.owners);
    let sessions = round_trip::<Sessions>(input.sessions);
    round_trip::<LeaseBucket>(input.leases);
    crate::leases::play(&crate::leases::ByteStore::new(input));

    let host = Bench::with_shared(|key| input.of(key).map(<[u8]>::to_vec));
    let mut worker = Worker::open(&host);
    // What stands there, and what joining the table and keeping house add.
    let mut most = input.len() * TOUCHED.len() + 2 * MOST_GROWTH;
    for step in input.steps.chunks_exact(2).take(MAX_STEPS) {
        worker.step(step[0], step[1]);
        let calls = host.take_calls();
        assert!(calls <= most_calls(&input), "{calls} calls of the host in one step");
        most += MOST_GROWTH;
    }
    worker.finish();
    let leases = worker.leases_given.clone();
    let written = host.written();
    let stored: usize = written.values().map(Vec::len).sum();
    assert!(stored <= most, "{stored} bytes are stored, at the most {most} can be accounted for");

    let empty = |record: &[u8]| record.is_empty();
    for key in written.keys() {
        let readable = match kind(key) {
            'l' => locks.is_some() || empty(input.locks),
            'o' => owners.is_some() || empty(input.owners),
            's' => sessions.is_some() || empty(input.sessions),
            _ => true,
        };
        assert!(readable || input.of(key).is_none(), "{key} could not be read and was written over");
    }
    // The records may name leases that were given only now.
    let at_locks = locks.iter().flat_map(LockBucket::queues).flat_map(|queue| queue.entries()).map(|entry| entry.lease);
    let in_index =
        owners.iter().flat_map(OwnerBucket::holdings).flat_map(|holdings| &holdings.items).map(|item| item.lease);
    let forged = at_locks.chain(in_index).any(|lease| leases.contains(&lease));
    // Where heartbeats cannot be read nobody can be said to have ended, and giving back is tried again later.
    if (sessions.is_some() || empty(input.sessions)) && !forged {
        written.iter().for_each(|(key, value)| nothing_left(key, value, &leases));
    }
}

/// What can be read is written and read again as it was.
fn round_trip<R: Record + PartialEq + Debug>(bytes: &[u8]) -> Option<R> {
    let record: R = decode(bytes).ok()?;
    let written = encode(&record).expect("what was read can be written");
    assert!(written.len() <= bytes.len(), "it was read from less than it takes");
    assert_eq!(decode::<R>(&written).expect("what was written can be read"), record);
    let extended = [written.as_slice(), &[0]].concat();
    assert!(decode::<R>(&extended).is_err(), "there is more behind it");
    Some(record)
}

/// Nothing of these leases, which have all ended, stands in a record.
fn nothing_left(key: &str, value: &[u8], leases: &BTreeSet<LeaseId>) {
    match kind(key) {
        'l' => {
            let bucket: LockBucket = decode(value).expect("what was written can be read");
            for entry in bucket.queues().iter().flat_map(|queue| queue.entries()) {
                assert!(!leases.contains(&entry.lease), "left at a lock: {entry:?}");
            }
        }
        'o' => {
            let bucket: OwnerBucket = decode(value).expect("what was written can be read");
            for item in bucket.holdings().iter().flat_map(|holdings| &holdings.items) {
                assert!(!leases.contains(&item.lease), "left in the index: {item:?}");
            }
        }
        _ => {}
    }
}

/// One VM over the host, with what it has to look after.
pub struct Worker<'h, 'a> {
    host: &'h Bench<'a>,
    local: Local,
    rules: Rules,
    pending: Vec<Pending>,
    leases: Vec<Lease>,
    leases_given: BTreeSet<LeaseId>,
}

impl<'h, 'a> Worker<'h, 'a> {
    /// Opens the table and tries to join it.
    pub fn open(host: &'h Bench<'a>) -> Self {
        let local = Local::open(host, "fuzz", Purpose::Enforce).expect("the host never fails");
        let mut worker = Worker {
            host,
            local,
            rules: rules(),
            pending: Vec::new(),
            leases: Vec::new(),
            leases_given: BTreeSet::new(),
        };
        let _ = worker.local.beat(host, &worker.rules);
        worker
    }

    /// One step: the first byte says what, the second how. Errors of the store are fine, for they are what this is about.
    pub fn step(&mut self, what: u8, how: u8) {
        let (host, n) = (self.host, usize::from(how));
        match what % 12 {
            0..=4 => self.ask(what, how),
            5 if !self.leases.is_empty() => {
                let lease = self.leases.swap_remove(n % self.leases.len());
                self.local.release(host, &self.rules, lease);
            }
            6 if !self.pending.is_empty() => {
                let pending = self.pending.swap_remove(n % self.pending.len());
                self.local.cancel(host, &self.rules, pending);
            }
            7 if !self.pending.is_empty() => {
                let pending = self.pending.swap_remove(n % self.pending.len());
                let outcome = self.local.poll(host, &self.rules, pending);
                self.keep(outcome);
            }
            8 if !self.leases.is_empty() => {
                let lease = &self.leases[n % self.leases.len()];
                let _ = self.local.check(host, &self.rules, lease);
                let grant = &lease.grants()[0];
                let _ = self.local.holder_of(host, &self.rules, &grant.name, grant.fence);
            }
            9 => drop(self.local.beat(host, &self.rules)),
            10 => drop(self.local.keep_house(host, &self.rules, how & 1 == 0)),
            11 => host.advance([1, 100_000, 251_000, 1_600_000, 61_000_000][n % 5]),
            _ => {}
        }
        self.local.deliver(host);
        let _ = self.local.woken(host);
    }

    fn ask(&mut self, what: u8, how: u8) {
        let Ok(lease) = self.local.new_lease() else { return };
        assert!(self.leases_given.insert(lease), "{lease:?} is given twice");
        let name = |n: usize| LockName::parse(LOCKS[n % LOCKS.len()]).expect("a name");
        let mode = Mode::ALL[usize::from(what / 12) % Mode::ALL.len()];
        let wait = Duration::from_millis(if what % 12 < 2 { 0 } else { 2_000 });
        let (ttl, hold) = (Duration::from_secs(1), Duration::from_secs(60));
        let count = if what % 12 == 4 { 2 } else { 1 };
        let wants = (0..count).map(|n| Want { name: name(usize::from(how & 7) + n), mode, wait, ttl, hold });
        let owner = OwnerId::new(OWNERS[usize::from(how >> 3) % OWNERS.len()]).expect("an owner");
        let wants: Vec<Want> = wants.collect();
        let request = Request::new(lease, owner, interlock::host::Host::now(self.host), wants, &self.rules.classes);
        let asked = request.wants().len();
        let outcome = self.local.acquire(self.host, &self.rules, request.asked_by("fuzz"));
        if let Outcome::Granted(lease) = &outcome {
            assert_eq!(lease.grants().len(), asked);
        }
        self.keep(outcome);
    }

    fn keep(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Granted(lease) => self.leases.push(lease),
            Outcome::Waiting(pending) => self.pending.push(pending),
            Outcome::Refused(_) => {}
        }
    }

    /// Ends everything.
    pub fn finish(&mut self) {
        for pending in self.pending.drain(..) {
            self.local.cancel(self.host, &self.rules, pending);
        }
        for lease in self.leases.drain(..) {
            self.local.release(self.host, &self.rules, lease);
        }
    }
}

/// The rules of every input.
pub fn rules() -> Rules {
    let class = Class::default();
    let mut classes = Classes::default();
    classes.insert("pool".into(), Class { permits: 2, ..class });
    classes.insert("t".into(), Class { hierarchy: true, ..class });
    classes.insert("r".into(), Class { rank: Some(Rank(2)), ..class });
    classes.insert("q".into(), Class { rank: Some(Rank(1)), ..class });
    let limits = Limits {
        locks_per_owner: Some(6),
        waiters_per_lock: 8,
        locks: 1_000,
        waiters: 1_000,
        longest_ttl: Duration::from_secs(60),
    };
    Rules { classes, limits, grace: Duration::ZERO }
}
