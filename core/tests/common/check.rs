//! The invariants, read off the records.

use std::collections::{BTreeMap, BTreeSet};

use interlock_core::session::{DEAD_AFTER, Sessions};
use interlock_core::store::{LockBucket, OwnerBucket};
use interlock_core::{Edge, Entry, Event, LeaseId, Mode, OwnerId, Queue, Refusal, SessionId, State, Store, Time};

use super::{Health, SWEEP, Worker, World};

/// What is known from before: gauges, and the fences that were seen.
#[derive(Default)]
pub struct Ledger {
    leases: u128,
    pub waiting: i64,
    pub held: i64,
    pub grants: u64,
    /// Grants to those who had waited.
    pub hand_overs: u64,
    pub deadlocks: u64,
    /// Requests that were cancelled or refused: where the store failed, what they left is taken out later.
    pub over: BTreeSet<LeaseId>,
    pub expired: Vec<(String, String)>,
    /// Per lock: its fences, with their owner and whether the critical section is over.
    fences: BTreeMap<String, BTreeMap<u64, (OwnerId, bool)>>,
    /// Grants that were looked at. A lease whose grant has ended may be granted its lock once more.
    seen: BTreeSet<(String, LeaseId, u64)>,
}

impl Ledger {
    pub fn new_lease(&mut self) -> LeaseId {
        self.leases += 1;
        LeaseId(self.leases)
    }

    pub fn count(&mut self, events: &[Event]) {
        for event in events {
            match event {
                Event::Queued { .. } => self.waiting += 1,
                Event::Left { .. } => self.waiting -= 1,
                Event::Granted { queued, .. } => {
                    self.waiting -= i64::from(*queued);
                    self.held += 1;
                    self.grants += 1;
                    self.hand_overs += u64::from(*queued);
                }
                Event::Released { .. } => self.held -= 1,
                Event::Expired { lock, entry, .. } => {
                    self.held -= 1;
                    self.expired.push((entry.owner.to_string(), lock.to_string()));
                }
            }
            assert!(self.waiting >= 0 && self.held >= 0, "a gauge falls below 0 by {event:?}");
        }
    }
}

/// Everything in the table, past hooks and failures.
pub fn read(world: &World) -> (Sessions, Vec<Queue>) {
    let mem = &world.store.mem;
    let buckets = (0..mem.buckets()).map(|bucket| mem.read::<LockBucket>(bucket).unwrap().0);
    (mem.read(0).unwrap().0, buckets.flat_map(|bucket| bucket.queues().to_vec()).collect())
}

/// When an entry ends, from the words of the contract: a grant its TTL after its last renewal or its worker's last
/// beat, at the latest at its hold limit; a waiter at its deadline, or when its worker counts as dead.
fn end(entry: &Entry, sessions: &Sessions) -> Time {
    let beat = sessions.members().iter().find(|member| member.id == entry.session).map(|member| member.beat);
    match entry.state {
        State::Held { renewed, until, .. } => until.min(renewed.max(beat.unwrap_or(renewed)) + entry.ttl),
        State::Waiting { deadline, since, .. } if entry.session == SessionId::NONE => deadline.max(since),
        State::Waiting { deadline, since, .. } => deadline.min(since.max(beat.unwrap_or(since)) + DEAD_AFTER),
    }
}

/// Gray's matrix once more, as the set of modes that each excludes.
fn excludes(mode: Mode) -> &'static [Mode] {
    use Mode::{Exclusive, IntentExclusive, IntentShared, Shared, SharedIntentExclusive};
    match mode {
        IntentShared => &[Exclusive],
        IntentExclusive => &[Exclusive, Shared, SharedIntentExclusive],
        Shared => &[Exclusive, IntentExclusive, SharedIntentExclusive],
        SharedIntentExclusive => &[Exclusive, IntentExclusive, Shared, SharedIntentExclusive],
        Exclusive => &Mode::ALL,
    }
}

fn conflict(a: &Entry, b: &Entry) -> bool {
    let re_enters = a.owner == b.owner && a.reentrant && b.reentrant;
    let reads_again = a.owner == b.owner && a.mode == Mode::Shared && b.mode == Mode::Shared;
    !re_enters && (excludes(a.mode).contains(&b.mode) || reads_again)
}

/// Everything that must hold between any two steps.
pub fn all(world: &World) {
    let (sessions, queues) = read(world);
    let valid = |entry: &&Entry| end(entry, &sessions) > world.now;
    let mut edges: BTreeMap<OwnerId, BTreeSet<OwnerId>> = BTreeMap::new();
    let (mut waiting, mut held) = (0, 0);
    for queue in &queues {
        assert!(!queue.is_empty(), "{} is kept though nobody is there", queue.name);
        let permits = world.rules.classes.of(&queue.name).permits;
        let entries: Vec<&Entry> = queue.entries().iter().filter(valid).collect();
        let holders: Vec<&Entry> = entries.iter().copied().filter(|entry| entry.is_held()).collect();
        exclusion(queue, &holders, permits);
        fences(world, queue);
        for (at, waiter) in entries.iter().enumerate().filter(|(_, entry)| !entry.is_held()) {
            let before = entries.iter().take(at).copied().filter(|other| !other.is_held());
            let blockers = holders.iter().copied().chain(before);
            if permits == 1 {
                let blockers: Vec<&Entry> = blockers.filter(|other| conflict(waiter, other)).collect();
                // What the store would not let go is taken out with the next housekeeping: it stands in the way until then, and is
                // no part of a cycle.
                let counts = |other: &&&Entry| !is_over(world, other);
                // Nobody is behind one whose worker crashed, or that the store would not let go.
                if world.workers.iter().any(|worker| worker.pending.contains_key(&waiter.lease)) {
                    edges
                        .entry(waiter.owner.clone())
                        .or_default()
                        .extend(blockers.iter().filter(counts).map(|it| it.owner.clone()));
                }
                progress(world, &sessions, queue, waiter, !blockers.is_empty());
            } else {
                let full = holders.len() >= usize::try_from(permits).unwrap();
                progress(world, &sessions, queue, waiter, full || blockers.count() > holders.len());
            }
            listed(world, queue, waiter);
        }
        waiting += queue.waiters().count();
        held += queue.holders().count();
    }
    for (name, known) in &mut world.ledger.borrow_mut().fences {
        if !queues.iter().any(|queue| queue.name.as_str() == name) {
            known.values_mut().for_each(|(_, over)| *over = true);
        }
    }
    if !world.workers.iter().any(|worker| worker.health == Health::Stalled) {
        acyclic(&edges);
    }
    let ledger = world.ledger.borrow();
    assert_eq!(ledger.waiting, i64::try_from(waiting).unwrap(), "the gauge of waiters");
    assert_eq!(ledger.held, i64::try_from(held).unwrap(), "the gauge of held locks");
    drop(ledger);
    workers(world, &sessions, &queues);
}

/// Whether the entry is of a request that was cancelled or refused.
fn is_over(world: &World, entry: &Entry) -> bool {
    world.ledger.borrow().over.contains(&entry.lease)
}

/// No two conflicting valid holders, no more than the permits allow.
fn exclusion(queue: &Queue, holders: &[&Entry], permits: u32) {
    if permits > 1 {
        assert!(holders.len() <= usize::try_from(permits).unwrap(), "{}: too many holders {holders:?}", queue.name);
        return;
    }
    for (at, a) in holders.iter().enumerate() {
        for b in &holders[at + 1..] {
            assert!(!conflict(a, b), "{}: held by {a:?} and {b:?}", queue.name);
        }
    }
}

/// Fences rise with every critical section, and none comes back once its section is over.
fn fences(world: &World, queue: &Queue) {
    let mut ledger = world.ledger.borrow_mut();
    let name = queue.name.to_string();
    let mut now: Vec<(u64, &Entry)> = Vec::new();
    for entry in queue.entries() {
        if let State::Held { fence, .. } = entry.state {
            now.push((fence.0, entry));
        }
    }
    now.sort_by_key(|(fence, _)| *fence);
    for (fence, entry) in &now {
        if !ledger.seen.insert((name.clone(), entry.lease, *fence)) {
            continue;
        }
        let known = ledger.fences.entry(name.clone()).or_default();
        match known.get(fence) {
            Some((owner, over)) => {
                assert!(
                    *owner == entry.owner && entry.reentrant && !over,
                    "{name}: fence {fence} comes back: {entry:?}"
                );
            }
            None => {
                let highest = known.keys().next_back().copied().unwrap_or(0);
                assert!(*fence > highest, "{name}: fence {fence} after {highest}");
                known.insert(*fence, (entry.owner.clone(), false));
            }
        }
    }
    for (fence, (_, over)) in ledger.fences.entry(name).or_default().iter_mut() {
        *over = !now.iter().any(|(held, _)| held == fence);
    }
}

/// A waiter that somebody looks after has somebody in its way, or somebody's end was between two sweeps: a waiter
/// sets its timer by those whom it found at the lock, and a re-entry that came later may end sooner.
fn progress(world: &World, sessions: &Sessions, queue: &Queue, waiter: &Entry, blocked: bool) {
    let keeps_house = |worker: &Worker| worker.beats && worker.health == Health::Runs;
    let ended_just_now = queue
        .entries()
        .iter()
        .map(|entry| end(entry, sessions))
        .any(|end| end <= world.now && (end + SWEEP > world.now || !world.workers.iter().any(keeps_house)));
    let polls = |worker: &Worker| worker.health == Health::Runs && worker.pending.contains_key(&waiter.lease);
    let looked_after = !ended_just_now && world.workers.iter().any(polls);
    assert!(blocked || !looked_after, "{}: nobody is in the way of {waiter:?}: {queue:?}", queue.name);
}

/// The index knows of every wait.
fn listed(world: &World, queue: &Queue, waiter: &Entry) {
    let mem = &world.store.mem;
    let (owners, _) = mem.read::<OwnerBucket>(mem.bucket(waiter.owner.as_str())).unwrap();
    let mut items = owners.items(&waiter.owner).iter();
    let known = items.any(|item| item.waiting && item.lease == waiter.lease && item.lock == queue.name);
    let looked_after = world.workers.iter().any(|worker| worker.pending.contains_key(&waiter.lease));
    assert!(known || !looked_after, "{}: the index misses {waiter:?}", queue.name);
}

/// Nobody waits for itself, by whatever way.
fn acyclic(edges: &BTreeMap<OwnerId, BTreeSet<OwnerId>>) {
    for start in edges.keys() {
        let mut reached = BTreeSet::new();
        let mut next: Vec<&OwnerId> = edges[start].iter().collect();
        while let Some(owner) = next.pop() {
            assert!(owner != start, "{start} waits for itself: {edges:?}");
            if reached.insert(owner) {
                next.extend(edges.get(owner).into_iter().flatten());
            }
        }
    }
}

/// Every worker that runs counts rightly, keeps its deadlines, and has what it was given.
fn workers(world: &World, sessions: &Sessions, queues: &[Queue]) {
    for worker in world.workers.iter().filter(|worker| worker.health == Health::Runs) {
        let in_leases: usize = worker.leases.values().map(|lease| lease.grants().len()).sum();
        let load = worker.table.load();
        assert_eq!(usize::try_from(load.waiters).unwrap(), worker.pending.len());
        assert!(usize::try_from(load.locks).unwrap() >= in_leases);
        if worker.pending.is_empty() {
            assert_eq!(usize::try_from(load.locks).unwrap(), in_leases);
        }
        for pending in worker.pending.values() {
            assert!(pending.deadline() > world.now, "parked past its deadline: {pending:?}");
            assert!(pending.poll_at() <= pending.deadline() && pending.poll_at() > world.now, "{pending:?}");
        }
        for lease in worker.leases.values().filter(|lease| worker.steady.contains(&lease.id())) {
            for grant in lease.grants() {
                let queue = queues.iter().find(|queue| queue.name == grant.name);
                let entry = queue.and_then(|queue| queue.entry(lease.id()));
                let kept = entry.is_some_and(|entry| entry.is_held() && end(entry, sessions) > world.now);
                let beats = worker.table.session() != SessionId::NONE;
                assert!(kept || !beats || grant.until <= world.now, "{lease:?} ended early");
            }
        }
    }
}

/// A cycle as it is told: each edge begins where the last one ended, and the whole closes on who was refused.
pub fn closes(cycle: &[Edge], refusal: &Refusal) {
    let (Some(first), Some(last)) = (cycle.first(), cycle.last()) else { panic!("a cycle of nobody") };
    assert_eq!((&first.owner, &last.held_by), (&refusal.owner, &refusal.owner));
    assert!(cycle.windows(2).all(|pair| pair[0].held_by == pair[1].owner), "{cycle:?}");
}

/// After the end of everything.
pub fn nothing_left(world: &World) {
    let (_, queues) = read(world);
    assert!(queues.is_empty(), "left in the table: {queues:?}");
    for bucket in 0..world.store.mem.buckets() {
        let (owners, _) = world.store.mem.read::<OwnerBucket>(bucket).unwrap();
        assert!(owners.holdings().is_empty(), "left in the index: {owners:?}");
    }
    for worker in world.workers.iter().filter(|worker| worker.health == Health::Runs) {
        assert_eq!(worker.table.load(), interlock_core::Load::default());
    }
    let ledger = world.ledger.borrow();
    assert_eq!((ledger.waiting, ledger.held), (0, 0), "gauges return to 0");
}
