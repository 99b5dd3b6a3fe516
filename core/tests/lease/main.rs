//! The lease protocol: both state machines, message by message, on a virtual clock.
//!
//! `authority` drives the authority's workers over one store; `client` a proxy without any authority. The two together,
//! over a network that does its worst, are the simulator's. `races` lets one worker act in the middle of another's step;
//! `watchers` are several requests for one lease.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod authority;
mod client;
mod races;
#[path = "../common/store.rs"]
mod store;
mod watchers;

use interlock_core::lease::{self, Answer, Deleted, Granted, Parked, Receipt, Renewed};
use interlock_core::store::{OwnerBucket, Store};
use interlock_core::{
    Census, Classes, Duration, Effects, Fence, LeaseId, Limits, LockName, Mode, OwnerId, Request, Rules, Scene, Table,
    Time, Want,
};
use store::TestStore;

const GRACE: Duration = Duration::from_secs(10);

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn lock(name: &str) -> LockName {
    LockName::parse(name).unwrap()
}

/// What is asked for.
#[derive(Clone, Debug)]
struct Asked {
    lease: u128,
    owner: &'static str,
    locks: Vec<(&'static str, Mode)>,
    wait: Duration,
    ttl: Duration,
    hold: Duration,
}

fn asked(lease: u128, owner: &'static str, name: &'static str) -> Asked {
    let locks = vec![(name, Mode::Exclusive)];
    Asked { lease, owner, locks, wait: ms(2000), ttl: ms(5000), hold: ms(60_000) }
}

impl Asked {
    fn and(mut self, name: &'static str) -> Self {
        self.locks.push((name, Mode::Exclusive));
        self
    }
}

/// An authority: workers over one store. With a session each, as in a proxy.
struct Authority {
    store: TestStore,
    rules: Rules,
    now: Time,
    unix_micros: u64,
    workers: Vec<Table>,
    effects: Effects,
}

impl Authority {
    /// One that has been up for longer than its grace.
    fn new(workers: usize) -> Self {
        let mut authority = Self::just_started(workers);
        authority.advance(GRACE);
        authority
    }

    fn just_started(workers: usize) -> Self {
        let limits =
            Limits { locks_per_owner: Some(64), waiters_per_lock: 100, locks: 1000, waiters: 100, longest_ttl: GRACE };
        let mut authority = Authority {
            store: TestStore::default(),
            rules: Rules { classes: Classes::default(), limits, grace: GRACE },
            now: Time::from_micros(7_000_000),
            unix_micros: 1_764_000_000_000_000,
            workers: Vec::new(),
            effects: Effects::default(),
        };
        for _ in 0..workers {
            authority.add_worker();
        }
        authority
    }

    fn add_worker(&mut self) -> usize {
        self.workers.push(Table::new());
        let at = self.workers.len() - 1;
        self.beat(at);
        at
    }

    fn beat(&mut self, at: usize) {
        self.on(at, |table, scene| table.beat(scene, 0)).unwrap();
    }

    /// The process dies and starts again: another store, other workers, and the time that it took.
    fn restart(&mut self, down: Duration) {
        let workers = self.workers.len();
        (self.store, self.workers) = (TestStore::default(), Vec::new());
        self.pass(down);
        for _ in 0..workers {
            self.add_worker();
        }
    }

    fn pass(&mut self, span: Duration) {
        self.now = self.now + span;
        self.unix_micros += u64::try_from(span.as_micros()).unwrap();
    }

    /// Time passes, and all workers beat.
    fn advance(&mut self, span: Duration) {
        self.pass(span);
        (0..self.workers.len()).for_each(|at| self.beat(at));
    }

    fn on<T>(&mut self, at: usize, act: impl FnOnce(&mut Table, &Scene<'_, TestStore>) -> T) -> T {
        let scene = Scene { store: &self.store, rules: &self.rules, now: self.now, unix_micros: self.unix_micros };
        let answer = act(&mut self.workers[at], &scene);
        self.effects = self.workers[at].take_effects();
        answer
    }

    fn request(&self, asked: &Asked) -> Request {
        let want = |(name, mode): &(&str, Mode)| Want {
            name: lock(name),
            mode: *mode,
            wait: asked.wait,
            ttl: asked.ttl,
            hold: asked.hold,
        };
        let wants = asked.locks.iter().map(want).collect();
        let owner = OwnerId::new(asked.owner).unwrap();
        Request::new(LeaseId(asked.lease), owner, self.now, wants, &self.rules.classes)
    }

    fn put(&mut self, at: usize, asked: &Asked) -> Answer {
        let request = self.request(asked);
        self.on(at, |table, scene| lease::authority::put(table, scene, request, None)).unwrap()
    }

    fn reassert(&mut self, at: usize, asked: &Asked, receipt: &Receipt) -> Answer {
        let request = self.request(asked);
        self.on(at, |table, scene| lease::authority::put(table, scene, request, Some(receipt))).unwrap()
    }

    fn poll(&mut self, at: usize, parked: Parked) -> Answer {
        self.on(at, |table, scene| lease::authority::poll(table, scene, parked)).unwrap()
    }

    fn leave(&mut self, at: usize, parked: Parked) {
        self.on(at, |table, scene| lease::authority::leave(table, scene, parked));
    }

    fn renew(&mut self, at: usize, lease: u128, receipt: Option<&Receipt>) -> Renewed {
        self.on(at, |table, scene| lease::authority::renew(table, scene, LeaseId(lease), None, receipt)).unwrap()
    }

    fn delete(&mut self, at: usize, lease: u128) -> Deleted {
        self.on(at, |table, scene| lease::authority::delete(table, scene, LeaseId(lease))).unwrap()
    }

    fn get(&mut self, lease: u128) -> Option<Granted> {
        self.on(0, |table, scene| lease::authority::get(table, scene, LeaseId(lease))).unwrap()
    }

    /// Sweeps everything, and says how many leases wait, are held, are over; and how many locks there are.
    fn sweep(&mut self) -> (usize, usize, usize, u64) {
        let census = self.on(0, |table, scene| {
            let mut census = Census::default();
            for bucket in 0..scene.store.buckets() {
                lease::authority::sweep(table, scene, bucket).unwrap();
                table.sweep(scene, bucket, &mut census).unwrap();
            }
            table.publish_census(scene, &census).unwrap();
            census
        });
        let (waiting, held, over) = self.standing();
        (waiting, held, over, census.locks)
    }

    /// How many leases wait, are held, are over.
    fn standing(&self) -> (usize, usize, usize) {
        let mut sum = (0, 0, 0);
        for bucket in 0..self.store.buckets() {
            let (leases, _) = self.store.read::<lease::LeaseBucket>(bucket).unwrap();
            let (waiting, held, over) = leases.count();
            sum = (sum.0 + waiting, sum.1 + held, sum.2 + over);
        }
        sum
    }

    /// The owners that the index knows.
    fn listed(&self) -> Vec<String> {
        let buckets = (0..self.store.buckets()).map(|bucket| self.store.read::<OwnerBucket>(bucket).unwrap().0);
        buckets.flat_map(|owners| owners.holdings().iter().map(|of| of.owner.to_string()).collect::<Vec<_>>()).collect()
    }
}

#[track_caller]
fn granted(answer: Answer) -> Granted {
    match answer {
        Answer::Granted { granted, .. } => *granted,
        other => panic!("not granted: {other:?}"),
    }
}

#[track_caller]
fn parked(answer: Answer) -> Parked {
    match answer {
        Answer::Parked(parked) => parked,
        other => panic!("not parked: {other:?}"),
    }
}

#[track_caller]
fn refused(answer: Answer) -> &'static str {
    match answer {
        Answer::Refused(refusal) => refusal.cause.slug(),
        other => panic!("not refused: {other:?}"),
    }
}

fn fence(granted: &Granted) -> Fence {
    granted.grants.iter().map(|grant| grant.fence).max().unwrap()
}
