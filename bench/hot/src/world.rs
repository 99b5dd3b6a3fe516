//! A worker and its table, over records that are kept as bytes as the local backend keeps them.

use std::cell::RefCell;
use std::hash::Hasher;

use interlock::backend::local::{decode, encode};
use interlock_core::store::{Kind, Record, Version};
use interlock_core::{
    Class, Classes, Duration, Lease, LeaseId, Limits, LockName, Mode, Outcome, OwnerId, Pending, Rank, Request, Rules,
    Scene, Store, StoreError, Table, Time, Want,
};
use siphasher::sip::SipHasher13;

/// As many as the local backend has.
pub const BUCKETS: u32 = 1024;
/// How long a grant lives, and how long it may be waited for.
const TTL: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_secs(3600);

/// All records of one kind, with how often each was written.
type Records = Vec<(Vec<u8>, u32)>;

/// The records of all kinds.
#[derive(Clone, Default)]
pub struct Bytes([RefCell<Records>; 5]);

impl Bytes {
    fn of(&self, kind: Kind) -> &RefCell<Records> {
        let [locks, owners, leases, sessions, seen] = &self.0;
        match kind {
            Kind::Locks => locks,
            Kind::Owners => owners,
            Kind::Leases => leases,
            Kind::Sessions => sessions,
            Kind::Seen => seen,
        }
    }

    /// The bytes of one record; none where it was never written.
    pub fn bytes(&self, kind: Kind, index: u32) -> Vec<u8> {
        self.of(kind).borrow().get(index as usize).map(|(bytes, _)| bytes.clone()).unwrap_or_default()
    }
}

impl Store for Bytes {
    fn buckets(&self) -> u32 {
        BUCKETS
    }

    fn bucket(&self, name: &str) -> u32 {
        // A fixed key: each run spreads names alike.
        let mut hash = SipHasher13::new_with_key(&[7; 16]);
        hash.write(name.as_bytes());
        (hash.finish() % u64::from(BUCKETS)) as u32
    }

    fn read<R: Record>(&self, index: u32) -> Result<(R, Version), StoreError> {
        // The host gives a copy.
        let stored = self.of(R::KIND).borrow().get(index as usize).cloned();
        match stored {
            Some((bytes, version)) if version > 0 => Ok((decode(&bytes)?, Version(version))),
            _ => Ok((R::default(), Version::ABSENT)),
        }
    }

    fn write<R: Record>(&self, index: u32, record: &R, version: Version) -> Result<bool, StoreError> {
        let bytes = encode(record)?;
        let (mut records, index) = (self.of(R::KIND).borrow_mut(), index as usize);
        if records.len() <= index {
            records.resize_with(index + 1, Default::default);
        }
        let (stored, current) = &mut records[index];
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
    pub now: Time,
    rules: Rules,
    table: Table,
    leases: u128,
}

impl World {
    /// With an index of all owners (`limited`), as policies have it by default, or without.
    pub fn new(limited: bool) -> Self {
        let limits = Limits {
            locks_per_owner: limited.then_some(1_000_000),
            waiters_per_lock: 1_000_000,
            locks: u32::MAX,
            waiters: u32::MAX,
            longest_ttl: LONG,
        };
        let mut classes = Classes::default();
        for (name, rank) in [("first", 10), ("second", 20)] {
            classes.insert(name.to_owned(), Class { rank: Some(Rank(rank)), ..Class::default() });
        }
        let rules = Rules { classes, limits, grace: Duration::ZERO };
        let now = Time::from_micros(1_000_000_000);
        let mut world = World { store: Bytes::default(), now, rules, table: Table::new(), leases: 0 };
        world.beat();
        world
    }

    pub fn on<T>(&mut self, act: impl FnOnce(&mut Table, &Scene<'_, Bytes>) -> T) -> T {
        let scene = Scene { store: &self.store, rules: &self.rules, now: self.now, unix_micros: 1_790_000_000_000_000 };
        let told = act(&mut self.table, &scene);
        self.table.take_effects();
        told
    }

    pub fn beat(&mut self) {
        self.on(|table, scene| table.beat(scene, 1)).expect("a heartbeat");
    }

    pub fn request(&mut self, owner: &str, locks: &[LockName]) -> Request {
        self.leases += 1;
        let want =
            |name: &LockName| Want { name: name.clone(), mode: Mode::Exclusive, wait: LONG, ttl: TTL, hold: LONG };
        let owner = OwnerId::new(owner).expect("an owner");
        let (lease, wants) = (LeaseId(1 << 64 | self.leases), locks.iter().map(want).collect());
        Request::new(lease, owner, self.now, wants, &self.rules.classes).asked_by("orders/put")
    }

    pub fn acquire(&mut self, request: Request) -> Outcome {
        self.on(|table, scene| table.acquire(scene, request))
    }

    pub fn take(&mut self, owner: &str, locks: &[LockName]) -> Lease {
        let request = self.request(owner, locks);
        match self.acquire(request) {
            Outcome::Granted(lease) => lease,
            other => panic!("{other:?}"),
        }
    }

    pub fn wait(&mut self, owner: &str, locks: &[LockName]) -> Pending {
        let request = self.request(owner, locks);
        match self.acquire(request) {
            Outcome::Waiting(pending) => pending,
            other => panic!("{other:?}"),
        }
    }

    pub fn poll(&mut self, pending: Pending) -> Outcome {
        self.on(|table, scene| table.poll(scene, pending))
    }

    pub fn cancel(&mut self, pending: Pending) {
        self.on(|table, scene| table.cancel(scene, pending));
    }

    pub fn release(&mut self, lease: Lease) {
        let ended = self.on(|table, scene| table.release(scene, lease));
        assert!(ended.is_empty(), "{ended:?}");
    }
}

pub fn lock(name: &str) -> LockName {
    LockName::parse(name).expect("a lock's name")
}

/// An owner as requests have them: the identity of a trace.
pub fn owner(n: usize) -> String {
    format!("{:032x}", (n as u128 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))
}
