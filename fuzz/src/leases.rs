//! The authority's half of the lease protocol over stored records that may hold anything; part of the target `records`.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};

use interlock::backend::local::{decode, encode};
use interlock_core::lease::LeaseBucket;
use interlock_core::lease::authority::{self, Answer, Parked};
use interlock_core::store::{Kind, Record, Version};
use interlock_core::{
    Duration, LeaseId, LockName, Mode, OwnerId, Request, Scene, Store, StoreError, Table, Time, Want,
};

use crate::records::{Input, LOCKS, OWNERS, rules};

/// The identities that clients pick.
const LEASES: u8 = 4;

/// The most accesses of one step, beside those that what is stored names.
const MOST_ACCESSES: u64 = 2_000;

/// Bytes and their version, by kind and bucket.
type Written = HashMap<(Kind, u32), (Vec<u8>, u32)>;

/// Records as bytes in a few buckets, each of which holds the input's record until it is written.
pub struct ByteStore<'a> {
    input: Input<'a>,
    written: RefCell<Written>,
    accesses: Cell<u64>,
}

impl<'a> ByteStore<'a> {
    /// A store in which these records are.
    pub fn new(input: Input<'a>) -> Self {
        ByteStore { input, written: RefCell::default(), accesses: Cell::default() }
    }

    fn initial(&self, kind: Kind) -> &'a [u8] {
        match kind {
            Kind::Locks => self.input.locks,
            Kind::Owners => self.input.owners,
            Kind::Leases => self.input.leases,
            Kind::Sessions => self.input.sessions,
            // No lease has to do with what a guard has seen.
            Kind::Seen => &[],
        }
    }

    /// The largest record of leases that was written.
    pub fn leases(&self) -> Vec<u8> {
        let written = self.written.borrow();
        let leases = written.iter().filter(|((kind, _), _)| *kind == Kind::Leases).map(|(_, (bytes, _))| bytes);
        leases.max_by_key(|bytes| bytes.len()).cloned().unwrap_or_default()
    }
}

impl Store for ByteStore<'_> {
    fn buckets(&self) -> u32 {
        4
    }

    fn bucket(&self, name: &str) -> u32 {
        name.bytes().map(u32::from).sum::<u32>() % self.buckets()
    }

    fn read<R: Record>(&self, index: u32) -> Result<(R, Version), StoreError> {
        self.accesses.set(self.accesses.get() + 1);
        match (self.written.borrow().get(&(R::KIND, index)), self.initial(R::KIND)) {
            (Some((bytes, version)), _) => Ok((decode(bytes)?, Version(*version))),
            (None, []) => Ok((R::default(), Version::ABSENT)),
            (None, bytes) => Ok((decode(bytes)?, Version(1))),
        }
    }

    fn write<R: Record>(&self, index: u32, record: &R, version: Version) -> Result<bool, StoreError> {
        self.accesses.set(self.accesses.get() + 1);
        let initial = self.initial(R::KIND);
        let mut written = self.written.borrow_mut();
        let current = written.get(&(R::KIND, index)).map_or(u32::from(!initial.is_empty()), |(_, version)| *version);
        if version != Version(current) {
            return Ok(false);
        }
        assert!(initial.is_empty() || decode::<R>(initial).is_ok(), "what could not be read was written over");
        written.insert((R::KIND, index), (encode(record)?, current + 1));
        Ok(true)
    }
}

/// Plays the steps of an input on an authority whose records are the input's. Errors of the store are fine.
pub fn play(store: &ByteStore<'_>) {
    let rules = rules();
    let mut table = Table::new();
    let mut now = Time::from_micros(1_000_000_000);
    let mut parked: BTreeMap<u8, Parked> = BTreeMap::new();
    let bytes = u64::try_from(store.input.len()).expect("small");
    for step in store.input.steps.chunks_exact(2).take(40) {
        let (what, how) = (step[0], step[1]);
        let scene = Scene { store, rules: &rules, now, unix_micros: 1_790_000_000_000_000 };
        let lease = LeaseId(u128::from(how % LEASES) + 1);
        store.accesses.set(0);
        match what % 12 {
            0..=3 => {
                let answer = authority::put(&mut table, &scene, request(lease, what, how, now, &rules), None);
                keep(&mut table, &scene, &mut parked, how % LEASES, answer);
            }
            4 | 5 => {
                if let Some(waiting) = parked.remove(&(how % LEASES)) {
                    let answer = authority::poll(&mut table, &scene, waiting);
                    keep(&mut table, &scene, &mut parked, how % LEASES, answer);
                }
            }
            6 => {
                let ttl = (how & 0x80 != 0).then_some(Duration::from_secs(2));
                let _ = authority::renew(&mut table, &scene, lease, ttl, None);
            }
            7 | 8 => {
                if authority::delete(&mut table, &scene, lease).is_ok() {
                    ended(&mut table, &scene, lease, request(lease, what, how, now, &rules));
                }
            }
            9 => drop(authority::sweep(&mut table, &scene, u32::from(how) % store.buckets())),
            10 => drop(table.beat(&scene, 1)),
            _ => now = now + Duration::from_micros([1, 100_000, 251_000, 1_600_000, 61_000_000][usize::from(how) % 5]),
        }
        let _ = table.take_effects();
        let most = MOST_ACCESSES + bytes * bytes / 16;
        assert!(store.accesses.get() <= most, "{} accesses of the store in one step", store.accesses.get());
    }
    let scene = Scene { store, rules: &rules, now, unix_micros: 1_790_000_000_000_000 };
    parked.into_values().for_each(|waiting| authority::leave(&mut table, &scene, waiting));
    for ((kind, _), (bytes, _)) in store.written.borrow().iter() {
        if *kind == Kind::Leases {
            let bucket: LeaseBucket = decode(bytes).expect("what was written can be read");
            assert_eq!(decode::<LeaseBucket>(&encode(&bucket).expect("written")).expect("read"), bucket);
        }
    }
}

/// What has ended stays ended, and nothing is granted under its identity.
fn ended(table: &mut Table, scene: &Scene<'_, ByteStore<'_>>, lease: LeaseId, request: Request) {
    assert!(!matches!(authority::get(table, scene, lease), Ok(Some(_))), "{lease:?} was given back and is still held");
    let again = authority::put(table, scene, request, None);
    assert!(
        !matches!(again, Ok(Answer::Granted { .. } | Answer::Parked(_))),
        "{lease:?} is over and asked for: {again:?}"
    );
}

fn keep(
    table: &mut Table,
    scene: &Scene<'_, ByteStore<'_>>,
    parked: &mut BTreeMap<u8, Parked>,
    at: u8,
    answer: Result<Answer, StoreError>,
) {
    if let Ok(Answer::Parked(waiting)) = answer {
        // The stream of an earlier request for it goes.
        if let Some(earlier) = parked.insert(at, waiting) {
            authority::leave(table, scene, earlier);
        }
    }
}

fn request(lease: LeaseId, what: u8, how: u8, now: Time, rules: &interlock_core::Rules) -> Request {
    let name = LockName::parse(LOCKS[usize::from(how >> 2) % LOCKS.len()]).expect("a name");
    let mode = Mode::ALL[usize::from(what / 12) % Mode::ALL.len()];
    let wait = Duration::from_millis(if what % 12 < 2 { 0 } else { 2_000 });
    let (ttl, hold) = (Duration::from_secs(1), Duration::from_secs(60));
    let owner = OwnerId::new(OWNERS[usize::from(how >> 5) % OWNERS.len()]).expect("an owner");
    Request::new(lease, owner, now, vec![Want { name, mode, wait, ttl, hold }], &rules.classes)
}
