//! After a step: the records are read back into a [`State`], and the step is held against what the contract says of it.
//!
//! What can be seen in one state alone is a property of the model; here is what takes the state before and the
//! answers that were given.

use interlock_core::{Cause, Effects, Entry, Event, Fence, LeaseId, Outcome, Queue, Refusal, State as At};

use super::machine::{Action, HIGHEST, Machine, NOW, Shelf, lease_at};
use super::state::{Slot, Stand, State, Verdict};

/// What a step showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight {
    Deadlock,
    UpgradeOverWaiters,
    UpgradeRefused,
    ReadersTogether,
    ReEntry,
    Downgrade,
    CancelledGrant,
    WaitTimeout,
    QueuedAgain,
    SweptOn,
}

/// A step that has been made, and everything to be known of it.
pub struct After<'a> {
    pub machine: &'a Machine,
    pub shelf: &'a Shelf,
    pub state: &'a State,
    pub action: Action,
    /// Whose request it was, and for which lock.
    pub actor: Option<(usize, LeaseId)>,
    pub outcome: Option<&'a Outcome>,
}

/// What a worker takes its request for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Waits,
    Holds,
    Gone,
}

impl After<'_> {
    /// The next state, and what there was to see.
    pub fn look(&self, effects: &Effects) -> (State, Vec<Sight>) {
        let mut next = State::new(0);
        let mut granted = Vec::new();
        let mut faults = Vec::new();
        for lock in 0..self.state.locks.len() {
            next.locks.push(self.read(lock, &mut granted, &mut faults));
        }
        let indexed: usize = self.shelf.owners.borrow().holdings().iter().map(|holdings| holdings.items.len()).sum();
        let is_new = matches!(self.action, Action::Ask { .. });
        let is_over = !matches!(self.outcome, Some(Outcome::Granted(_) | Outcome::Waiting(_)));
        let under_way = self.state.slots().count() + usize::from(is_new);
        if next.slots().count() + usize::from(is_over && self.actor.is_some()) != under_way {
            faults.push("a request vanishes");
        }
        if indexed != next.slots().filter(|slot| slot.listed).count() {
            faults.push("the index keeps what is over");
        }
        let actor = self.actor.map(|(_, lease)| lease);
        let others: Vec<Slot> = granted.iter().filter(|(it, _)| Some(*it) != actor).map(|(_, slot)| *slot).collect();
        let mut told: Vec<LeaseId> = effects.wakes.iter().map(|wake| wake.lease).collect();
        let mut to_tell: Vec<LeaseId> = granted.iter().map(|(it, _)| *it).filter(|it| Some(*it) != actor).collect();
        told.sort_unstable();
        to_tell.sort_unstable();
        if told != to_tell {
            faults.push("another is woken than was granted");
        }
        if !counted(self.state, &next, &effects.events) {
            faults.push("the events do not add up");
        }
        if !self.answer_is_right(&next) {
            faults.push("the answer is not the contract's");
        }
        next.fault = faults.first().copied();
        let sights = self.sights(&next, &others);
        (next, sights)
    }

    /// What the worker takes the request of `lease` for, that was `slot` before.
    fn side(&self, lease: LeaseId, slot: Option<&Slot>) -> Side {
        match (self.actor, self.outcome, slot.map(|slot| slot.stand)) {
            (Some((_, actor)), Some(Outcome::Granted(_)), _) if actor == lease => Side::Holds,
            (Some((_, actor)), Some(Outcome::Waiting(_)), _) if actor == lease => Side::Waits,
            (Some((_, actor)), _, _) if actor == lease => Side::Gone,
            (_, _, Some(Stand::Holds | Stand::LostLease)) => Side::Holds,
            (_, _, Some(_)) => Side::Waits,
            (_, _, None) => Side::Gone,
        }
    }

    /// One lock as the records have it.
    fn read(&self, lock: usize, granted: &mut Vec<(LeaseId, Slot)>, faults: &mut Vec<&'static str>) -> Vec<Slot> {
        let old = &self.state.locks[lock];
        let buckets = self.shelf.locks.borrow();
        let name = &self.machine.names[lock];
        let none = Queue::new(name.clone());
        let queue = buckets[lock].queue(name).unwrap_or(&none);
        let mut slots = Vec::with_capacity(old.len() + 1);
        let mut last = None;
        let before = if old.iter().any(Slot::stands) { HIGHEST } else { Fence(0) };
        for entry in queue.entries() {
            let was = old.iter().enumerate().find(|(at, _)| lease_at(lock, *at) == entry.lease);
            let slot = self.slot(lock, entry, self.side(entry.lease, was.map(|(_, slot)| slot)));
            let Some(slot) = slot else {
                faults.push("a request that is over is left behind");
                continue;
            };
            if slot.has_lock() && !was.is_some_and(|(_, was)| was.has_lock()) {
                granted.push((entry.lease, slot));
                if !fence_is_right(queue, entry, before, buckets[lock].highest) {
                    faults.push("a fence does not rise");
                }
            }
            if let Some((at, _)) = was.filter(|(_, was)| was.stands() && !was.ended) {
                if last > Some(at) {
                    faults.push("somebody changes places");
                }
                last = Some(at);
            }
            slots.push(slot);
        }
        for (at, slot) in old.iter().enumerate() {
            let lease = lease_at(lock, at);
            let side = self.side(lease, Some(slot));
            if side != Side::Gone && queue.entry(lease).is_none() {
                if slot.stands() && !slot.ended || self.actor == Some((lock, lease)) {
                    faults.push("somebody loses a place before its time");
                }
                let stand = if side == Side::Holds { Stand::LostLease } else { Stand::LostWait };
                // A wait that was over was reaped for it; a grant that nobody had heard of, for the grant's own end.
                let ended = side == Side::Waits && slot.ended && !slot.has_lock();
                slots.push(Slot {
                    stand,
                    ended,
                    listed: self.is_listed(lock, lease, slot.owner),
                    marked: false,
                    ..*slot
                });
            }
        }
        slots
    }

    /// An entry as a slot. None where it fits nothing that its worker knows of.
    fn slot(&self, lock: usize, entry: &Entry, side: Side) -> Option<Slot> {
        let owner = self.machine.owners.iter().position(|owner| *owner == entry.owner)?;
        let (stand, end) = match (&entry.state, side) {
            (At::Waiting { upgrade: false, deadline, .. }, Side::Waits) => (Stand::Waits, *deadline),
            (At::Waiting { upgrade: true, deadline, .. }, Side::Waits) => (Stand::WaitsToUpgrade, *deadline),
            (At::Held { renewed, until, .. }, Side::Waits) => (Stand::Granted, (*renewed + entry.ttl).min(*until)),
            (At::Held { renewed, until, .. }, Side::Holds) => (Stand::Holds, (*renewed + entry.ttl).min(*until)),
            _ => return None,
        };
        let exclusive = entry.mode == interlock_core::Mode::Exclusive;
        let listed = self.is_listed(lock, entry.lease, owner);
        let marked = !entry.is_held() && !entry.is_only_wait();
        Some(Slot { owner, exclusive, stand, listed, ended: end <= NOW, marked })
    }

    fn is_listed(&self, lock: usize, lease: LeaseId, owner: usize) -> bool {
        let owners = self.shelf.owners.borrow();
        let mut items = owners.items(&self.machine.owners[owner]).iter();
        items.any(|item| item.waiting && item.lease == lease && item.lock == self.machine.names[lock])
    }

    fn refusal(&self) -> Option<&Refusal> {
        match self.outcome {
            Some(Outcome::Refused(refusal)) => Some(refusal),
            _ => None,
        }
    }

    /// Whether the request got the answer that the contract has for it, and left no trace where it was refused.
    fn answer_is_right(&self, next: &State) -> bool {
        let (lock, slot) = match self.action {
            Action::Ask { owner, lock, exclusive } => {
                (lock, Slot { owner, exclusive, stand: Stand::LostWait, listed: false, ended: false, marked: false })
            }
            Action::Poll { lock, at } => (lock, self.state.locks[lock][at]),
            _ => return self.outcome.is_none(),
        };
        // Where somebody's time was up, others may have been granted the lock on the way.
        if self.state.locks[lock].iter().any(|slot| slot.stands() && slot.ended) {
            return true;
        }
        let cause = self.refusal().map(|refusal| &refusal.cause);
        let verdict = match (slot.stand, slot.ended) {
            (Stand::Waits | Stand::WaitsToUpgrade, _) => Verdict::Waits,
            (Stand::Granted, _) => Verdict::Granted,
            (_, true) => return matches!(cause, Some(Cause::WaitTimeout { .. })),
            (_, false) => self.state.verdict(lock, slot.owner, slot.exclusive),
        };
        match (verdict, self.outcome, cause) {
            (Verdict::Granted, Some(Outcome::Granted(_)), _) => true,
            (Verdict::Waits, Some(Outcome::Waiting(_)), _) => {
                slot.stand == Stand::LostWait || next.locks == self.state.locks
            }
            (Verdict::Deadlock, _, Some(Cause::Deadlock { cycle })) => {
                let (owner, first, last) = (&self.machine.owners[slot.owner], cycle.first(), cycle.last());
                let closes =
                    first.is_some_and(|edge| edge.owner == *owner) && last.is_some_and(|e| e.held_by == *owner);
                let traceless = !matches!(self.action, Action::Ask { .. }) || next.unmarked() == self.state.unmarked();
                closes && cycle.windows(2).all(|pair| pair[0].held_by == pair[1].owner) && traceless
            }
            _ => false,
        }
    }

    /// What there was to see; `granted` are those who had waited for others and need not any more.
    fn sights(&self, next: &State, granted: &[Slot]) -> Vec<Sight> {
        let mut sights = Vec::new();
        let is_granted = matches!(self.outcome, Some(Outcome::Granted(_)));
        let cause = self.refusal().map(|refusal| &refusal.cause);
        let deadlock = matches!(cause, Some(Cause::Deadlock { .. }));
        let mut see = |sight, seen: bool| sights.extend(seen.then_some(sight));
        see(Sight::Deadlock, deadlock);
        see(Sight::WaitTimeout, matches!(cause, Some(Cause::WaitTimeout { .. })));
        see(Sight::ReadersTogether, granted.iter().any(|a| granted.iter().any(|b| a.owner != b.owner)));
        match self.action {
            Action::Ask { owner, lock, exclusive } => {
                let slots = &self.state.locks[lock];
                let own = |slot: &&Slot| slot.owner == owner && slot.has_lock();
                let upgrades = exclusive && slots.iter().filter(own).any(|slot| !slot.exclusive);
                let over_waiters = slots.iter().any(|slot| slot.stand == Stand::Waits);
                let alone = slots.iter().filter(|slot| slot.has_lock()).all(|slot| slot.owner == owner);
                let covered = slots.iter().filter(own).any(|slot| slot.exclusive || !exclusive);
                see(Sight::UpgradeOverWaiters, is_granted && upgrades && !covered && over_waiters);
                see(Sight::UpgradeRefused, deadlock && upgrades && alone);
                see(Sight::ReEntry, is_granted && covered && over_waiters);
            }
            Action::Release { lock, at } => {
                let was = self.state.locks[lock][at];
                let still = next.locks[lock].iter().any(|slot| slot.owner == was.owner && slot.has_lock());
                see(Sight::Downgrade, was.exclusive && still && granted.iter().any(|slot| slot.owner != was.owner));
            }
            Action::Cancel { lock, at } => {
                see(Sight::CancelledGrant, self.state.locks[lock][at].stand == Stand::Granted)
            }
            Action::Poll { lock, at } => {
                let waits = matches!(self.outcome, Some(Outcome::Waiting(_)));
                see(Sight::QueuedAgain, waits && self.state.locks[lock][at].stand == Stand::LostWait);
            }
            Action::Sweep { .. } => see(Sight::SweptOn, !granted.is_empty()),
            Action::End { .. } => {}
        }
        sights
    }
}

/// A new grant has a fence above all before it, or the one of the grant that it re-enters under.
fn fence_is_right(queue: &Queue, entry: &Entry, before: Fence, highest: Fence) -> bool {
    let fence = |entry: &Entry| match entry.state {
        At::Held { fence, .. } => fence,
        At::Waiting { .. } => Fence(0),
    };
    let same = || queue.holders().filter(|held| held.lease != entry.lease && fence(held) == fence(entry));
    let is_new = fence(entry) > before;
    let covers = |held: &Entry| held.owner == entry.owner && held.mode.covers(entry.mode);
    let re_enters = same().any(covers);
    // What its owner had before this step has a fence of before.
    let must = queue.holders().any(|held| held.lease != entry.lease && covers(held) && fence(held) <= before);
    (if must { re_enters } else { is_new || re_enters })
        && highest >= fence(entry)
        && same().all(|held| held.owner == entry.owner)
}

/// Whether the events say how many more wait and hold than before.
fn counted(before: &State, after: &State, events: &[Event]) -> bool {
    let of = |state: &State| {
        let count = |is: fn(&Slot) -> bool| state.slots().filter(|slot| is(slot)).count() as i64;
        (count(Slot::waits), count(Slot::has_lock))
    };
    let (mut waiting, mut held) = of(before);
    for event in events {
        match event {
            Event::Queued { .. } => waiting += 1,
            Event::Left { .. } => waiting -= 1,
            Event::Granted { queued, .. } => {
                waiting -= i64::from(*queued);
                held += 1;
            }
            Event::Released { .. } | Event::Expired { .. } => held -= 1,
        }
    }
    (waiting, held) == of(after)
}
