//! What the benches share: a store that keeps records as bytes, as the plugin does in shared data, and workers on it.

#![allow(dead_code, reason = "not every bench needs all of it")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::slice::from_ref;

use interlock_core::session::DEAD_AFTER;
use interlock_core::store::{Kind, Record, StoreError, Version};
use interlock_core::{
    Classes, Duration, Lease, LeaseId, Limits, LockName, Mode, Outcome, OwnerId, Pending, Request, Rules, Scene, Store,
    Table, Time, Want,
};

/// As many as the local backend has.
const BUCKETS: u32 = 1024;

/// Each record with its version.
type Records = HashMap<(Kind, u32), (Vec<u8>, u32)>;

/// Records as bytes, in a map.
#[derive(Default)]
pub struct Bytes(RefCell<Records>);

impl Bytes {
    /// How many bytes all records have together.
    pub fn size(&self) -> usize {
        self.0.borrow().values().map(|(bytes, _)| bytes.len()).sum()
    }
}

impl Store for Bytes {
    fn buckets(&self) -> u32 {
        BUCKETS
    }

    fn bucket(&self, name: &str) -> u32 {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        u32::try_from(hasher.finish() % u64::from(BUCKETS)).unwrap()
    }

    fn read<R: Record>(&self, index: u32) -> Result<(R, Version), StoreError> {
        // The host gives a copy.
        let Some((bytes, version)) = self.0.borrow().get(&(R::KIND, index)).cloned() else {
            return Ok((R::default(), Version::ABSENT));
        };
        Ok((postcard::from_bytes(&bytes).unwrap(), Version(version)))
    }

    fn write<R: Record>(&self, index: u32, record: &R, version: Version) -> Result<bool, StoreError> {
        let bytes = postcard::to_allocvec(record).unwrap();
        let mut records = self.0.borrow_mut();
        let (stored, current) = records.entry((R::KIND, index)).or_default();
        if *current != version.0 {
            return Ok(false);
        }
        (*stored, *current) = (bytes, *current + 1);
        Ok(true)
    }
}

/// One worker and its table.
pub struct World {
    pub store: Bytes,
    pub rules: Rules,
    pub table: Table,
    pub now: Time,
    leases: u128,
}

impl World {
    /// With an index of all owners (`limited`), or of those who wait only.
    pub fn new(limited: bool) -> Self {
        let limits = Limits {
            locks_per_owner: limited.then_some(1_000_000),
            waiters_per_lock: 1_000_000,
            locks: u32::MAX,
            waiters: u32::MAX,
            longest_ttl: Duration::from_secs(3600),
        };
        let rules = Rules { classes: Classes::default(), limits, grace: Duration::ZERO };
        let now = Time::from_micros(1_000_000_000);
        let mut world = World { store: Bytes::default(), rules, table: Table::new(), now, leases: 0 };
        world.on(|table, scene| table.beat(scene, 1)).unwrap();
        world
    }

    pub fn on<T>(&mut self, act: impl FnOnce(&mut Table, &Scene<'_, Bytes>) -> T) -> T {
        let scene = Scene { store: &self.store, rules: &self.rules, now: self.now, unix_micros: 1_790_000_000_000_000 };
        act(&mut self.table, &scene)
    }

    pub fn request(&mut self, owner: &str, locks: &[LockName], mode: Mode) -> Request {
        self.leases += 1;
        let ttl = Duration::from_secs(3600);
        let want = |name: &LockName| Want { name: name.clone(), mode, wait: ttl, ttl, hold: ttl };
        let owner = OwnerId::new(owner).unwrap();
        let wants = locks.iter().map(want).collect();
        Request::new(LeaseId(1 << 64 | self.leases), owner, self.now, wants, &self.rules.classes).asked_by("orders/put")
    }

    pub fn acquire(&mut self, request: Request) -> Outcome {
        let outcome = self.on(|table, scene| table.acquire(scene, request));
        self.table.take_effects();
        outcome
    }

    pub fn take(&mut self, owner: &str, locks: &[LockName]) -> Lease {
        let request = self.request(owner, locks, Mode::Exclusive);
        match self.acquire(request) {
            Outcome::Granted(lease) => lease,
            other => panic!("{other:?}"),
        }
    }

    pub fn wait(&mut self, owner: &str, locks: &[LockName]) -> Pending {
        let request = self.request(owner, locks, Mode::Exclusive);
        match self.acquire(request) {
            Outcome::Waiting(pending) => pending,
            other => panic!("{other:?}"),
        }
    }

    pub fn cancel(&mut self, pending: Pending) {
        self.on(|table, scene| table.cancel(scene, pending));
        self.table.take_effects();
    }

    pub fn release(&mut self, lease: Lease) {
        self.on(|table, scene| table.release(scene, lease));
        self.table.take_effects();
    }

    pub fn poll(&mut self, pending: Pending) -> Outcome {
        let outcome = self.on(|table, scene| table.poll(scene, pending));
        self.table.take_effects();
        outcome
    }

    /// Holders of so many other locks, each by an owner of its own.
    pub fn fill(&mut self, locks: usize) -> Vec<Lease> {
        (0..locks).map(|n| self.take(&owner(1_000_000 + n), &[lock(&format!("other/{n}"))])).collect()
    }

    /// A line: one holder, and so many who wait behind it, each for this one lock.
    pub fn line(&mut self, name: &LockName, waiters: usize) -> (Lease, Vec<Pending>) {
        let holder = self.take("holder", from_ref(name));
        (holder, (0..waiters).map(|n| self.wait(&owner(n), from_ref(name))).collect())
    }

    /// A chain: owner `n` holds lock `n` and waits for lock `n + 1`; the last one holds only.
    pub fn chain(&mut self, length: usize) -> (Vec<Lease>, Vec<Pending>) {
        let name = |n: usize| lock(&format!("chain/{n}"));
        let held: Vec<_> = (0..length).map(|n| self.take(&owner(n), &[name(n)])).collect();
        // From the front, so that each search to get there is short.
        let waits = (0..length - 1).map(|n| self.wait(&owner(n), &[name(n + 1)])).collect();
        (held, waits)
    }

    /// Long enough for whoever beats no more to be dead, but for this worker.
    pub fn age(&mut self) {
        self.now = self.now + DEAD_AFTER;
        self.on(|table, scene| table.beat(scene, 1)).unwrap();
    }
}

pub fn lock(name: &str) -> LockName {
    LockName::parse(name).unwrap()
}

/// An owner as requests have them: the identity of a trace.
pub fn owner(n: usize) -> String {
    format!("{:032x}", (n as u128 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
}
