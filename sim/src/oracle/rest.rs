//! The whole, whenever nobody is in the middle of anything; and after the end of everything.

use interlock_core::{Duration, Entry, LeaseId, LockName, OwnerId, State as Stand, Time};

use super::{Phase, conflict, end, owned, suffices};
use crate::state::State;

/// How late a waiter may look: timers have whole milliseconds.
const TIMER: Duration = Duration::from_millis(1);

/// A waiter that nobody wakes looks for itself this often, and the house is kept this often besides.
const BACKSTOP: Duration = Duration::from_millis(1250);

impl State {
    /// A VM has done what it had to do for now.
    pub(crate) fn rested(&mut self, vm: usize, load: Option<(u32, u32)>) {
        let facts = &mut self.vms[vm];
        facts.busy = false;
        facts.op = None;
        if let Some((locks, waiters)) = load {
            facts.load = (locks, waiters);
            let count = |of: usize| u32::try_from(of).unwrap_or(u32::MAX);
            let parked = count(facts.waiters.len());
            let grants = |lease: &LeaseId| self.leases.get(lease).map_or(0, |known| known.wants.len());
            let held = count(self.vms[vm].leases.iter().map(grants).sum());
            let right = waiters == parked && (locks == held || parked > 0 && locks >= held);
            if !right {
                self.violated(|| {
                    format!("vm{vm} counts {locks} locks and {waiters} waiters, and has {held} and {parked}")
                });
            }
        }
        self.believed_are_kept(vm);
    }

    /// Nobody is in the middle of anything: what must be so then.
    pub(crate) fn check_rest(&mut self) {
        self.log.clear();
        self.counts.rests += 1;
        let now = self.now;
        for vm in 0..self.vms.len() {
            let facts = &self.vms[vm];
            if !facts.alive || facts.stalled || facts.due <= now {
                continue;
            }
            if facts.waiters.iter().any(|(_, due, deadline)| *deadline.max(due) + TIMER < now) {
                self.violated(|| format!("vm{vm} keeps a waiter past its deadline at {now:?}"));
            }
        }
        let mut waiting = 0;
        let mut held = 0;
        for queue in self.locks.iter().flat_map(|slot| slot.record.queues()) {
            held += queue.holders().count();
            waiting += queue.waiters().count();
        }
        let truth = (i64::try_from(waiting).unwrap_or(0), i64::try_from(held).unwrap_or(0));
        if !self.events_lost && self.gauges != truth {
            let gauges = self.gauges;
            self.violated(|| format!("the events add up to {gauges:?} waiting and held, there are {truth:?}"));
        }
        if waiting > 0 {
            self.no_cycle();
            self.second_waits_are_marked();
        }
    }

    /// Whether somebody looks after this entry's request: a VM that lives and runs.
    fn is_looked_after(&self, entry: &Entry) -> bool {
        self.leases.get(&entry.lease).is_some_and(|known| {
            let vm = &self.vms[known.vm];
            vm.alive && vm.life == known.life && !vm.stalled && known.phase == Phase::Waiting
        })
    }

    /// Whether this entry is in nobody's way for long, and its owner's other waits may not have been found through it:
    ///
    /// - Its request is over, and it could not be taken out because the store failed; it may even have been granted the lock since.
    ///   Its worker takes it out with its next housekeeping that nothing fails in; if that one died, its time takes it out.
    /// - Its worker died after it stood there and before it was published, marked and searched for; it may have been granted the
    ///   lock since. It goes when the session counts as dead, or its time takes it out.
    ///
    /// Any other entry is in the way, even if its request is over or its worker dead.
    fn is_owed(&self, entry: &Entry) -> bool {
        self.leases.get(&entry.lease).is_some_and(|known| {
            let vm = &self.vms[known.vm];
            let died = !vm.alive || vm.life != known.life;
            let (Stand::Waiting { since, .. } | Stand::Held { since, .. }) = entry.state;
            let cut = known.cut.is_some_and(|began| since >= began);
            cut || known.phase == Phase::Gone && (vm.indebted || died)
        })
    }

    /// Who waits in several places says so in each: a search that comes to one must not miss the others.
    fn second_waits_are_marked(&mut self) {
        let queues = self.locks.iter().flat_map(|slot| slot.record.queues());
        let waits = queues.flat_map(|queue| queue.waiters()).filter(|waiter| self.is_looked_after(waiter));
        let waits: Vec<&Entry> = waits.collect();
        let has_another =
            |waiter: &Entry| waits.iter().any(|other| other.owner == waiter.owner && other.lease != waiter.lease);
        let alone = |waiter: &Entry| matches!(waiter.state, Stand::Waiting { elsewhere: false, .. });
        let unmarked = waits.iter().find(|waiter| alone(waiter) && has_another(waiter));
        if let Some(owner) = unmarked.map(|waiter| waiter.owner.clone()) {
            self.violated(|| format!("{owner} waits in several places, and one of them does not say so"));
        }
    }

    /// Nobody waits for itself, by whatever way: unless somebody looked dead while the others searched, and they have
    /// not looked again since.
    fn no_cycle(&mut self) {
        let mut owners: Vec<&OwnerId> = Vec::new();
        let mut edges: Vec<(usize, usize)> = Vec::new();
        let sessions = &self.sessions.record;
        let permits =
            |name: &LockName| self.lock_facts.iter().find(|facts| facts.name == *name).map_or(1, |facts| facts.permits);
        for queue in self.locks.iter().flat_map(|slot| slot.record.queues()) {
            let entries = queue.entries();
            if permits(&queue.name) > 1 || entries.iter().all(Entry::is_held) {
                continue;
            }
            for (at, waiter) in entries.iter().enumerate().filter(|(_, entry)| !entry.is_held()) {
                let asleep = self.leases.get(&waiter.lease).is_none_or(|known| known.polled <= self.doubtful_at);
                if asleep || !self.is_looked_after(waiter) || end(waiter, sessions) <= self.now {
                    continue;
                }
                if owned(waiter, entries).is_some_and(|(gives, _)| suffices(gives, waiter.mode)) {
                    continue;
                }
                let blockers = entries.iter().enumerate().filter(|(other_at, other)| {
                    let first = other.is_held() || *other_at < at;
                    first && conflict(waiter, other) && end(other, sessions) > self.now && !self.is_owed(other)
                });
                for (_, blocker) in blockers {
                    let mut index = |owner| {
                        owners.iter().position(|other| *other == owner).unwrap_or_else(|| {
                            owners.push(owner);
                            owners.len() - 1
                        })
                    };
                    edges.push((index(&waiter.owner), index(&blocker.owner)));
                }
            }
        }
        // Owners are few: which of them each reaches, as bits.
        let mut reach = vec![0_u64; owners.len()];
        edges.iter().for_each(|(from, to)| reach[*from] |= 1 << to);
        for _ in 0..owners.len() {
            for (from, to) in &edges {
                reach[*from] |= reach[*to];
            }
        }
        if let Some(at) = (0..owners.len()).find(|at| reach[*at] & 1 << at != 0) {
            let owner = owners[at].clone();
            self.violated(|| format!("{owner} waits for itself, and nobody was refused"));
        }
    }

    /// The faults are over since `calm`, and everybody has had the time to look: whoever can be granted has been.
    pub(crate) fn check_progress(&mut self, calm: Time) {
        let sessions = &self.sessions.record;
        let mut stuck = None;
        for queue in self.locks.iter().flat_map(|slot| slot.record.queues()) {
            let entries = queue.entries();
            let long_over = |entry: &Entry| end(entry, sessions).max(calm) + BACKSTOP < self.now;
            let permits = self.lock_facts.iter().find(|facts| facts.name == queue.name).map_or(1, |it| it.permits);
            for (at, waiter) in entries.iter().enumerate().filter(|(_, entry)| self.is_looked_after(entry)) {
                let in_way = |(other_at, other): (usize, &Entry)| {
                    let first = other.is_held() || other_at < at;
                    first && (permits > 1 || conflict(waiter, other)) && !long_over(other)
                };
                if !waiter.is_held() && !entries.iter().enumerate().any(in_way) {
                    stuck = Some((queue.name.clone(), super::locks::told(entries)));
                }
            }
        }
        if let Some((name, entries)) = stuck {
            let now = self.now;
            self.violated(|| format!("{name}: nobody is in the way of a waiter for long at {now:?}: {entries}"));
        }
    }

    /// Whether there is still something in the table, or in a VM.
    pub(crate) fn is_empty(&self) -> bool {
        let tables = self.locks.iter().all(|slot| slot.record.queues().is_empty())
            && self.owners.iter().all(|slot| slot.record.holdings().is_empty());
        tables && self.vms.iter().all(|vm| !vm.alive || vm.waiters.is_empty() && vm.leases.is_empty())
    }

    /// When the next thing in the table ends by itself.
    pub(crate) fn next_end(&self) -> Time {
        let queues = self.locks.iter().flat_map(|slot| slot.record.queues());
        let ends = queues.flat_map(|queue| queue.entries()).map(|entry| end(entry, &self.sessions.record));
        ends.min().unwrap_or(Time::NEVER)
    }

    /// After the end of everything.
    pub(crate) fn check_nothing_left(&mut self) {
        if !self.is_empty() {
            let queues = self.locks.iter().flat_map(|slot| slot.record.queues());
            let left: Vec<String> =
                queues.map(|queue| format!("{}: {}", queue.name, super::locks::told(queue.entries()))).collect();
            let owners = self.owners.iter().flat_map(|slot| slot.record.holdings());
            let listed: Vec<String> = owners.map(|of| format!("{}: {:?}", of.owner, of.items)).collect();
            self.violated(|| format!("left in the table: {left:?}; in the index: {listed:?}"));
        }
        for vm in 0..self.vms.len() {
            let facts = &self.vms[vm];
            if facts.alive && facts.load != (0, 0) {
                self.violated(|| format!("vm{vm} still counts a load"));
            }
        }
        if !self.events_lost && self.gauges != (0, 0) {
            let gauges = self.gauges;
            self.violated(|| format!("gauges do not return to 0: {gauges:?}"));
        }
    }
}
