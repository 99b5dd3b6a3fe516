//! A world of workers that share one table, on a clock that jumps.
//!
//! [`World`] does what a proxy does around the core: heartbeats, timers, wakes, second tries, sweeps. It never sleeps.
//! After each step it holds the table against the invariants of [`check`], which are computed anew from the records
//! and not with the core's own functions.
#![allow(dead_code, unused_imports, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

pub mod check;
pub mod store;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use interlock_core::session::{BEAT, DEAD_AFTER};
use interlock_core::{
    Cause, Census, Classes, Duration, Event, Lease, LeaseId, Limits, LockName, Loss, Mode, Outcome, OwnerId, Pending,
    Refusal, Request, Rules, Scene, SessionId, State, Store, Table, Time, Wake, Want,
};

use check::Ledger;
use store::TestStore;

pub use Mode::{Exclusive as X, IntentExclusive as IX, IntentShared as IS, Shared as S, SharedIntentExclusive as SIX};

pub fn lock(name: &str) -> LockName {
    LockName::parse(name).unwrap()
}

pub fn owner(name: &str) -> OwnerId {
    OwnerId::new(name).unwrap()
}

pub const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// How often the first worker that runs sweeps the table.
pub const SWEEP: Duration = BEAT;

/// Rules without limits that a test would meet by accident.
pub fn rules() -> Rules {
    let limits = Limits {
        locks_per_owner: None,
        waiters_per_lock: 1000,
        locks: 10_000,
        waiters: 10_000,
        longest_ttl: Duration::from_secs(60),
    };
    Rules { classes: Classes::default(), limits, grace: Duration::ZERO }
}

/// What is asked for, with defaults that do not get in the way.
#[derive(Clone, Debug)]
pub struct Ask {
    owner: OwnerId,
    wants: Vec<Want>,
    reentrant: bool,
}

pub fn ask(name: &str) -> Ask {
    Ask { owner: owner(name), wants: Vec::new(), reentrant: true }
}

impl Ask {
    pub fn lock(mut self, name: &str, mode: Mode) -> Self {
        let (wait, ttl, hold) = (ms(20_000), ms(5_000), ms(60_000));
        self.wants.push(Want { name: lock(name), mode, wait, ttl, hold });
        self
    }

    /// For all locks named so far, as the others.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wants.iter_mut().for_each(|want| want.wait = wait);
        self
    }

    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.wants.iter_mut().for_each(|want| want.ttl = ttl);
        self
    }

    pub fn hold(mut self, hold: Duration) -> Self {
        self.wants.iter_mut().for_each(|want| want.hold = hold);
        self
    }

    pub fn longest_ttl(&self) -> Duration {
        self.wants.iter().map(|want| want.ttl).max().unwrap_or_default()
    }

    pub fn not_reentrant(mut self) -> Self {
        self.reentrant = false;
        self
    }
}

/// The answer to one who asked.
#[derive(Debug)]
pub enum Got {
    Granted(LeaseId),
    Waits(LeaseId),
    Refused(Refusal),
}

impl Got {
    #[track_caller]
    pub fn granted(self) -> LeaseId {
        match self {
            Got::Granted(lease) => lease,
            other => panic!("not granted: {other:?}"),
        }
    }

    #[track_caller]
    pub fn waits(self) -> LeaseId {
        match self {
            Got::Waits(lease) => lease,
            other => panic!("does not wait: {other:?}"),
        }
    }

    #[track_caller]
    pub fn refused(self) -> Refusal {
        match self {
            Got::Refused(refusal) => refusal,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[track_caller]
    pub fn slug(self) -> &'static str {
        self.refused().cause.slug()
    }

    /// The owners of the cycle that it was refused for, from the first waiter round to itself.
    #[track_caller]
    pub fn cycle(self) -> Vec<String> {
        match self.refused().cause {
            Cause::Deadlock { cycle } => {
                let mut owners: Vec<String> = cycle.iter().map(|edge| edge.owner.to_string()).collect();
                owners.extend(cycle.last().map(|edge| edge.held_by.to_string()));
                owners
            }
            other => panic!("no deadlock: {other:?}"),
        }
    }
}

/// What a worker is up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Runs,
    /// It does nothing, and may go on later.
    Stalled,
    Crashed,
}

/// One worker: a table, and what it has to look after.
pub struct Worker {
    pub table: Table,
    pub health: Health,
    /// Whether its leases hang on a heartbeat; else each is renewed for itself.
    pub beats: bool,
    next_beat: Time,
    pub pending: BTreeMap<LeaseId, Pending>,
    pub leases: BTreeMap<LeaseId, Lease>,
    /// Leases that nobody kept it from renewing in time.
    pub steady: BTreeSet<LeaseId>,
}

/// Workers, their table, and the clock.
pub struct World {
    pub store: TestStore,
    pub rules: Rules,
    pub now: Time,
    pub unix_micros: u64,
    pub workers: Vec<Worker>,
    mail: Vec<(usize, LeaseId)>,
    next_sweep: Time,
    pub ledger: Rc<RefCell<Ledger>>,
    /// Off in a world that acts in the middle of another's step, when no invariant that spans records need hold.
    pub checks: bool,
    /// Requests that waited and were granted, refused, or lost as leases, since the last step began; in order.
    pub woken: Vec<LeaseId>,
    pub refused: Vec<(LeaseId, Refusal)>,
    pub lost: Vec<(LeaseId, LockName, Loss)>,
}

impl World {
    /// `workers` workers with sessions.
    pub fn new(workers: usize) -> Self {
        Self::with(rules(), workers, 0)
    }

    /// Workers with sessions, and after them workers whose leases live by their own renewals.
    pub fn with(rules: Rules, with_session: usize, without: usize) -> Self {
        let mut world = World {
            store: TestStore::default(),
            rules,
            now: Time::from_micros(5_000_000),
            unix_micros: 1_764_000_000_000_000,
            workers: Vec::new(),
            mail: Vec::new(),
            next_sweep: Time::ZERO,
            ledger: Rc::default(),
            checks: true,
            woken: Vec::new(),
            refused: Vec::new(),
            lost: Vec::new(),
        };
        for _ in 0..with_session {
            world.add_worker(true);
        }
        for _ in 0..without {
            world.add_worker(false);
        }
        world
    }

    /// Another world over the same table, to act in the middle of this one's steps.
    pub fn twin(&self, workers: usize) -> World {
        let mut twin = World::with(self.rules.clone(), 0, 0);
        (twin.store, twin.ledger) = (TestStore::default(), Rc::clone(&self.ledger));
        twin.store.mem = self.store.mem.clone();
        (twin.now, twin.unix_micros, twin.checks) = (self.now, self.unix_micros, false);
        for _ in 0..workers {
            twin.add_worker(true);
        }
        twin
    }

    pub fn add_worker(&mut self, beats: bool) -> usize {
        self.workers.push(Worker {
            table: Table::new(),
            health: Health::Runs,
            beats,
            next_beat: self.now,
            pending: BTreeMap::new(),
            leases: BTreeMap::new(),
            steady: BTreeSet::new(),
        });
        let at = self.workers.len() - 1;
        if beats {
            self.beat(at);
        }
        at
    }

    /// Runs one operation of a worker's table, and takes the effects in.
    pub fn on<T>(&mut self, at: usize, run: impl FnOnce(&mut Table, &Scene<'_, TestStore>) -> T) -> T {
        let (store, rules, now) = (&self.store, &self.rules, self.now);
        let scene = Scene { store, rules, now, unix_micros: self.unix_micros };
        let answer = run(&mut self.workers[at].table, &scene);
        let effects = self.workers[at].table.take_effects();
        self.ledger.borrow_mut().count(&effects.events);
        for Wake { session, lease } in effects.wakes {
            let lives_there = |worker: &Worker| match session {
                SessionId::NONE => worker.pending.contains_key(&lease),
                session => worker.table.session() == session,
            };
            if let Some(at) = self.workers.iter().position(lives_there) {
                self.mail.push((at, lease));
            }
        }
        answer
    }

    /// Holds the table against the invariants.
    pub fn check(&self) {
        check::all(self);
    }

    fn begin(&mut self) {
        self.woken.clear();
        self.refused.clear();
        self.lost.clear();
    }

    fn end(&mut self) {
        self.deliver();
        if self.checks {
            check::all(self);
        }
    }

    /// A request comes in at a worker.
    pub fn ask(&mut self, at: usize, ask: &Ask) -> Got {
        self.begin();
        let lease = self.ledger.borrow_mut().new_lease();
        let request = Request::new(lease, ask.owner.clone(), self.now, ask.wants.clone(), &self.rules.classes);
        let request = request.reentrant(ask.reentrant).asked_by("test");
        let outcome = self.on(at, |table, scene| table.acquire(scene, request));
        let got = self.settle(at, lease, outcome);
        self.end();
        got
    }

    fn settle(&mut self, at: usize, lease: LeaseId, outcome: Outcome) -> Got {
        let worker = &mut self.workers[at];
        match outcome {
            Outcome::Granted(lease) => {
                let id = lease.id();
                worker.leases.insert(id, lease);
                worker.steady.insert(id);
                Got::Granted(id)
            }
            Outcome::Waiting(pending) => {
                let id = pending.lease();
                worker.pending.insert(id, pending);
                Got::Waits(id)
            }
            Outcome::Refused(refusal) => {
                self.ledger.borrow_mut().over.insert(lease);
                if let Cause::Deadlock { cycle } = &refusal.cause {
                    check::closes(cycle, &refusal);
                    self.ledger.borrow_mut().deadlocks += 1;
                }
                Got::Refused(refusal)
            }
        }
    }

    pub fn worker_of(&self, lease: LeaseId) -> Option<usize> {
        let has = |worker: &Worker| worker.leases.contains_key(&lease) || worker.pending.contains_key(&lease);
        self.workers.iter().position(has)
    }

    pub fn holds(&self, lease: LeaseId) -> bool {
        self.workers.iter().any(|worker| worker.leases.contains_key(&lease))
    }

    /// Gives a lease back; says which locks had ended before.
    #[track_caller]
    pub fn release(&mut self, lease: LeaseId) -> Vec<LockName> {
        self.begin();
        let at = self.worker_of(lease).expect("nobody knows the lease");
        let held = self.workers[at].leases.remove(&lease).expect("waits");
        let ended = self.on(at, |table, scene| table.release(scene, held));
        self.end();
        ended.into_iter().map(|grant| grant.name).collect()
    }

    #[track_caller]
    pub fn cancel(&mut self, lease: LeaseId) {
        self.begin();
        let at = self.worker_of(lease).expect("nobody knows the lease");
        let pending = self.workers[at].pending.remove(&lease).expect("does not wait");
        self.ledger.borrow_mut().over.insert(lease);
        self.on(at, |table, scene| table.cancel(scene, pending));
        self.end();
    }

    /// Looks after a request that waits, though nothing woke it.
    pub fn poll(&mut self, lease: LeaseId) {
        self.begin();
        if let Some(at) = self.worker_of(lease) {
            self.look_after(at, lease);
        }
        self.end();
    }

    fn look_after(&mut self, at: usize, lease: LeaseId) {
        let Some(pending) = self.workers[at].pending.remove(&lease) else { return };
        let outcome = self.on(at, |table, scene| table.poll(scene, pending));
        match self.settle(at, lease, outcome) {
            Got::Granted(lease) => self.woken.push(lease),
            Got::Waits(_) => {}
            Got::Refused(refusal) => self.refused.push((lease, refusal)),
        }
    }

    /// Lets every worker that runs read its mail.
    fn deliver(&mut self) {
        while let Some(next) = self.mail.iter().position(|(at, _)| self.workers[*at].health == Health::Runs) {
            let (at, lease) = self.mail.remove(next);
            self.look_after(at, lease);
        }
    }

    /// A heartbeat, after which the worker makes sure of its leases and tries again what had failed.
    pub fn beat(&mut self, at: usize) {
        self.workers[at].next_beat = self.now + BEAT;
        let mailbox = u32::try_from(at).unwrap();
        if self.on(at, |table, scene| table.beat(scene, mailbox)).is_ok() {
            for lease in self.workers[at].leases.keys().copied().collect::<Vec<_>>() {
                self.make_sure(at, lease);
            }
        }
        self.on(at, |table, scene| table.settle_debts(scene));
    }

    fn make_sure(&mut self, at: usize, id: LeaseId) {
        let Some(lease) = self.workers[at].leases.remove(&id) else { return };
        match self.on(at, |table, scene| table.renew(scene, &lease)) {
            Ok(Some((name, loss))) => {
                self.lost.push((id, name, loss));
                self.on(at, |table, scene| table.release(scene, lease));
            }
            Ok(lost) => {
                assert!(lost.is_none() && lease.until() > self.now, "renewed past its hold limit: {lease:?}");
                self.workers[at].leases.insert(id, lease);
            }
            Err(_) => drop(self.workers[at].leases.insert(id, lease)),
        }
    }

    /// Renews one lease; false where it is lost, and then it is gone.
    pub fn renew(&mut self, lease: LeaseId) -> bool {
        self.begin();
        if let Some(at) = self.worker_of(lease) {
            self.make_sure(at, lease);
        }
        self.end();
        self.holds(lease)
    }

    /// From now on the worker does nothing, and nobody is told.
    pub fn crash(&mut self, at: usize) {
        let worker = &mut self.workers[at];
        worker.health = Health::Crashed;
        worker.pending.clear();
        worker.leases.clear();
        worker.steady.clear();
    }

    pub fn stall(&mut self, at: usize) {
        if self.workers[at].health == Health::Runs {
            self.workers[at].health = Health::Stalled;
            self.workers[at].steady.clear();
        }
    }

    pub fn resume(&mut self, at: usize) {
        if self.workers[at].health == Health::Stalled {
            self.begin();
            self.workers[at].health = Health::Runs;
            self.timers();
            self.end();
        }
    }

    /// Sweeps every bucket.
    pub fn sweep(&mut self, at: usize) {
        self.begin();
        self.keep_house(at);
        self.end();
    }

    fn keep_house(&mut self, at: usize) {
        let mut census = Census::default();
        for bucket in 0..self.store.buckets() {
            drop(self.on(at, |table, scene| table.sweep(scene, bucket, &mut census)));
        }
    }

    /// Does what is due now.
    fn timers(&mut self) {
        for at in 0..self.workers.len() {
            let (now, worker) = (self.now, &self.workers[at]);
            if worker.health != Health::Runs {
                continue;
            }
            if worker.beats && worker.next_beat <= now {
                self.beat(at);
            }
            let due = self.workers[at].pending.values().filter(|pending| pending.poll_at() <= now);
            for lease in due.map(Pending::lease).collect::<Vec<_>>() {
                self.look_after(at, lease);
            }
            let over = self.workers[at].leases.values().filter(|lease| lease.until() <= now);
            for lease in over.map(Lease::id).collect::<Vec<_>>() {
                self.make_sure(at, lease);
            }
            self.deliver();
        }
        let keeper = self.workers.iter().position(|worker| worker.beats && worker.health == Health::Runs);
        if let Some(keeper) = keeper.filter(|_| self.next_sweep <= self.now) {
            self.next_sweep = self.now + SWEEP;
            self.keep_house(keeper);
            self.deliver();
        }
    }

    fn next_timer(&self) -> Time {
        let running = self.workers.iter().filter(|worker| worker.health == Health::Runs);
        let of = |worker: &Worker| {
            let polls = worker.pending.values().map(Pending::poll_at);
            let ends = worker.leases.values().map(Lease::until);
            polls.chain(ends).chain(worker.beats.then_some(worker.next_beat)).min()
        };
        running.filter_map(of).min().unwrap_or(Time::NEVER)
    }

    /// Lets time pass, from timer to timer.
    pub fn advance(&mut self, span: Duration) {
        self.begin();
        let end = self.now + span;
        loop {
            let next = self.next_timer().min(end);
            self.unix_micros += u64::try_from(next.since(self.now).as_micros()).unwrap();
            self.now = self.now.max(next);
            self.timers();
            if self.checks {
                check::all(self);
            }
            if self.now >= end && self.next_timer() > end {
                break;
            }
        }
        self.end();
    }

    /// Ends everything in every way that is left, and checks that nothing stays.
    pub fn finish(&mut self) {
        self.store.unhook();
        self.store.fail_after(0, 0);
        self.store.mem.conflict_next(0);
        (0..self.workers.len()).for_each(|at| self.resume(at));
        let ids = |worker: &Worker| worker.pending.keys().chain(worker.leases.keys()).copied().collect::<Vec<_>>();
        while let Some(lease) = self.workers.iter().flat_map(ids).next() {
            if self.holds(lease) { drop(self.release(lease)) } else { self.cancel(lease) }
        }
        for at in 0..self.workers.len() {
            if self.workers[at].health == Health::Runs {
                assert!(self.on(at, |table, scene| table.settle_debts(scene)));
            }
        }
        // Those that crashed can only be waited for: at most a wait and a TTL.
        let end = self.now + ms(100_000).max(self.rules.limits.longest_ttl + DEAD_AFTER);
        while !check::read(self).1.is_empty() && self.now < end {
            self.advance(DEAD_AFTER.max(self.rules.limits.longest_ttl / 10));
        }
        self.advance(DEAD_AFTER);
        let keeper = self.add_worker(true);
        // The index is tidied after the locks it names, which may be in buckets that come later.
        self.sweep(keeper);
        self.sweep(keeper);
        check::nothing_left(self);
    }

    /// Every `(owner, lock)` whose grant has expired so far, in order.
    pub fn expired(&self) -> Vec<(String, String)> {
        self.ledger.borrow().expired.clone()
    }

    /// Owners in a lock's queue: holders as `a!`, waiters as `b?`.
    pub fn queue(&self, name: &str) -> Vec<String> {
        let (_, queues) = check::read(self);
        let queue = queues.into_iter().find(|queue| queue.name == lock(name));
        let mark = |held| if held { '!' } else { '?' };
        let show = |entry: &interlock_core::Entry| format!("{}{}", entry.owner, mark(entry.is_held()));
        queue.map(|queue| queue.entries().iter().map(show).collect()).unwrap_or_default()
    }

    /// The fence that a lease holds a lock under, as the table has it.
    #[track_caller]
    pub fn fence(&self, lease: LeaseId, name: &str) -> u64 {
        let (_, queues) = check::read(self);
        let queue = queues.iter().find(|queue| queue.name == lock(name)).expect("no such lock");
        match queue.entry(lease).expect("not there").state {
            State::Held { fence, .. } => fence.0,
            State::Waiting { .. } => panic!("waits"),
        }
    }
}

/// Whether an event is about a lock of that name.
pub fn is_about(event: &Event, name: &str) -> bool {
    let (Event::Queued { lock }
    | Event::Left { lock }
    | Event::Granted { lock, .. }
    | Event::Released { lock, .. }
    | Event::Expired { lock, .. }) = event;
    lock.as_str() == name
}
