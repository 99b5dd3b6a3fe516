//! Every change of the index by owner and of the sessions, every wake-up, every event.

use std::rc::Rc;

use interlock_core::session::Sessions;
use interlock_core::store::OwnerBucket;
use interlock_core::{Census, Event, LeaseId, StoreError, Time};

use super::{Kind, Phase, end};
use crate::state::{Past, State};

impl State {
    /// A VM has written a bucket of the index by owner: it may name too much, never too little.
    pub(crate) fn commit_owners(&mut self, vm: usize, index: u32, new: Rc<OwnerBucket>) {
        let at = usize::try_from(index).unwrap_or(0);
        let slot = &mut self.owners[at];
        slot.version = slot.version.wrapping_add(1).max(1);
        let old = std::mem::replace(&mut slot.record, Rc::clone(&new));
        self.trace.mark(3, at);
        for holdings in old.holdings() {
            let now = new.items(&holdings.owner);
            for item in holdings.items.iter().filter(|item| item.waiting) {
                let known = |other: &interlock_core::store::Item| {
                    other.waiting && other.lease == item.lease && other.lock == item.lock
                };
                let own = self.vms[vm].op.as_ref().is_some_and(|op| op.lease == item.lease);
                if !own && !now.iter().any(known) && self.waits_for(item.lease, &item.lock) {
                    let owner = &holdings.owner;
                    self.violated(|| format!("the index forgets that {owner} waits for {}", item.lock));
                }
            }
        }
    }

    /// Whether a lease stands in the queue of a lock, for a request that somebody looks after.
    pub(crate) fn waits_for(&self, lease: LeaseId, lock: &interlock_core::LockName) -> bool {
        let Some(known) = self.leases.get(&lease) else { return false };
        let vm = &self.vms[known.vm];
        // One that comes back to a queue publishes its wait anew, and searches after that.
        let polled = vm.op.as_ref().is_some_and(|op| op.lease == lease);
        let looked_after = known.phase == Phase::Waiting && vm.alive && vm.life == known.life && !polled;
        looked_after && self.entries(lock).iter().any(|entry| entry.lease == lease && !entry.is_held())
    }

    /// A VM has written the sessions.
    pub(crate) fn commit_sessions(&mut self, vm: usize, new: Rc<Sessions>) {
        self.sessions.version = self.sessions.version.wrapping_add(1).max(1);
        let old = std::mem::replace(&mut self.sessions.record, Rc::clone(&new));
        self.trace.mark(4, vm);
        let (now, life) = (self.now, self.vms[vm].life);
        for member in new.members().iter().filter(|member| old.member(member.id).is_none()) {
            if self.members.iter().any(|(session, ..)| *session == member.id) {
                self.violated(|| format!("session {:?} is given twice", member.id));
            }
            self.members.push((member.id, vm, life, now));
            self.counts.joins += 1;
        }
        if new.doubted() > old.doubted() {
            self.doubtful_at = now;
            self.counts.revivals += 1;
        }
        // What was past its end was free for the taking, whatever is heard of its worker later.
        for at in 0..self.lock_facts.len() {
            let facts = &self.lock_facts[at];
            let past = self.entries(&facts.name).iter().filter(|entry| end(entry, &old) <= now);
            let past: Vec<LeaseId> =
                past.map(|entry| entry.lease).filter(|lease| !facts.lapsed.contains(lease)).collect();
            self.lock_facts[at].lapsed.extend(past);
        }
        self.log.push(Past::Sessions(old));
    }

    /// A VM wakes a waiter: one that it has granted a lock.
    pub(crate) fn sent(&mut self, vm: usize, mailbox: usize, lease: LeaseId) {
        self.counts.wakes += 1;
        if self.protocol.is_some() {
            return;
        }
        let owed = self.vms[vm].owes.iter().position(|(other, _)| *other == lease);
        let mailbox = &self.mailboxes[mailbox];
        let right = self.leases.get(&lease).is_some_and(|known| (known.vm, known.life) == (mailbox.vm, mailbox.life));
        match owed {
            Some(at) if right => drop(self.vms[vm].owes.swap_remove(at)),
            _ => self.violated(|| format!("vm{vm} wakes {lease:?}, which it has granted nothing")),
        }
    }

    /// A wake-up could not be sent.
    pub(crate) fn unsent(&mut self, vm: usize, lease: LeaseId) {
        self.vms[vm].owes.retain(|(other, _)| *other != lease);
    }

    /// A VM has sent what it had to send, and counted what happened.
    pub(crate) fn delivered(&mut self, vm: usize, events: &[Event]) {
        for (lease, session) in std::mem::take(&mut self.vms[vm].owes) {
            // A worker that joined since is not known yet; one that is gone needs no waking.
            let Some(known) = self.leases.get(&lease) else { continue };
            let owner = &self.vms[known.vm];
            let joined = self.members.iter().find(|(member, ..)| *member == session).map(|(.., at)| *at);
            let beaten = self.vms[vm].beaten;
            let could = owner.alive && owner.life == known.life && joined.is_some_and(|joined| joined < beaten);
            let member = self.sessions.record.member(session).is_some();
            if could && member {
                self.violated(|| format!("vm{vm} granted {lease:?} a lock and woke nobody"));
            }
        }
        for event in events {
            let (waiting, held) = match event {
                Event::Queued { .. } => (1, 0),
                Event::Left { .. } => (-1, 0),
                Event::Granted { queued, .. } => (-i64::from(*queued), 1),
                Event::Released { .. } | Event::Expired { .. } => (0, -1),
            };
            self.gauges = (self.gauges.0 + waiting, self.gauges.1 + held);
        }
    }

    /// A VM has beaten, or has tried to.
    pub(crate) fn beaten(&mut self, vm: usize, began: Time, result: &Result<bool, StoreError>) {
        self.failed_for_a_reason(vm, result.as_ref().err());
        self.vms[vm].op = None;
        match result {
            Ok(doubts) => {
                self.vms[vm].beaten = began;
                self.vms[vm].doubts |= doubts;
                self.counts.beats += 1;
                self.counts.doubts += u64::from(*doubts);
                self.believed_are_kept(vm);
            }
            Err(_) => self.counts.beats_failed += 1,
        }
    }

    /// What a VM takes for valid is valid.
    pub(crate) fn believed_are_kept(&mut self, vm: usize) {
        let life = self.vms[vm].life;
        let mine = self.leases.iter().filter(|(_, known)| known.vm == vm && known.life == life);
        let holding = mine.filter(|(_, known)| known.phase == Phase::Holding);
        let lost = holding.filter(|(lease, _)| self.believes(**lease)).find_map(|(lease, known)| {
            let gone = known.grants.iter().find(|(lock, ..)| !self.holds(lock, *lease));
            gone.map(|(lock, ..)| (known.owner.clone(), lock.clone()))
        });
        if let Some((owner, lock)) = lost {
            let now = self.now;
            self.violated(|| format!("vm{vm} takes the lease of {owner} on {lock} for valid at {now:?}: it is not"));
        }
    }

    /// A VM has kept house, or has asked to.
    pub(crate) fn kept_house(&mut self, vm: usize, census: Option<&Census>) {
        let facts = &mut self.vms[vm];
        if facts.op.as_ref().is_some_and(|op| op.kind == Kind::House && op.failures == facts.failures) {
            facts.indebted = false;
        }
        let began = facts.op.take();
        let Some(census) = census else { return };
        self.counts.sweeps += 1;
        let queues = || self.locks.iter().flat_map(|slot| slot.record.queues());
        let alone = began.is_some_and(|op| op.foreign == self.counts.writes - self.vms[vm].writes);
        if alone && self.locks.len() <= 16 {
            let held: usize = queues().map(|queue| queue.holders().count()).sum();
            let waiting: usize = queues().map(|queue| queue.waiters().count()).sum();
            let tally = census.classes.values().fold((0, 0), |sum, it| (sum.0 + it.held, sum.1 + it.waiting));
            let count = |things: usize| u64::try_from(things).unwrap_or(u64::MAX);
            let owners = self.owners.iter().map(|slot| slot.record.holdings().len()).sum();
            let truth = (count(queues().count()), count(held), count(waiting), count(owners));
            let told = (census.locks, tally.0, tally.1, census.owners);
            if truth != told {
                self.violated(|| format!("the census says {told:?}, there are {truth:?}"));
            }
        }
    }
}
