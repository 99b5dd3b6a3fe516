//! What became of each request: granted what it holds, waiting where it stands, refused for a reason that there was.

use std::collections::BTreeMap;
use std::rc::Rc;

use interlock_core::session::{DEAD_AFTER, Sessions};
use interlock_core::store::LockBucket;
use interlock_core::{
    Cause, Edge, Entry, Fence, Grant, Lease, LeaseId, LockName, Loss, OwnerId, Pending, Refusal, Request,
    State as EntryState, StoreError, Time,
};

use super::{Kind, Known, Op, Phase, conflict, end, owned, suffices};
use crate::state::{Past, State, Task};

/// The table as it was at one moment.
struct View<'a> {
    state: &'a State,
    locks: BTreeMap<u32, Rc<LockBucket>>,
    sessions: Rc<Sessions>,
}

impl View<'_> {
    fn entries(&self, name: &LockName) -> &[Entry] {
        let facts = self.state.lock_facts.iter().find(|facts| facts.name == *name);
        let Some(facts) = facts else { return &[] };
        match self.locks.get(&facts.bucket) {
            Some(bucket) => bucket.queue(name).map_or(&[], interlock_core::Queue::entries),
            None => self.state.entries(name),
        }
    }

    fn has_edge(&self, edge: &Edge, at: Time) -> bool {
        let entries = self.entries(&edge.waits_for);
        let valid = |entry: &Entry| end(entry, &self.sessions) > at;
        entries.iter().enumerate().any(|(place, waiter)| {
            let waits = !waiter.is_held() && waiter.owner == edge.owner && valid(waiter);
            let re_enters = || owned(waiter, entries).is_some_and(|(gives, _)| suffices(gives, waiter.mode));
            waits
                && !re_enters()
                && entries.iter().enumerate().any(|(other_place, other)| {
                    let first = other.is_held() || other_place < place;
                    first && other.owner == edge.held_by && valid(other) && conflict(waiter, other)
                })
        })
    }

    fn owner_holds(&self, owner: &OwnerId, lock: &LockName, but: LeaseId, at: Time) -> bool {
        let own = |entry: &&Entry| entry.owner == *owner && entry.is_held() && entry.lease != but;
        self.entries(lock).iter().filter(own).any(|entry| end(entry, &self.sessions) > at)
    }
}

impl State {
    /// The next thing that a VM has to do.
    pub(crate) fn next_task(&mut self, vm: usize) -> Option<Task> {
        let task = self.vms[vm].tasks.pop_front();
        self.vms[vm].busy = task.is_some();
        if let Some(task) = &task {
            self.counts.operations += 1;
            self.trace.line(|| format!("  vm{vm} begins {task:?}"));
        }
        task
    }

    /// A request that a VM could not take in, since it could not join the table.
    pub(crate) fn turned_away(&mut self, vm: usize) {
        if self.vms[vm].failures == 0 && self.vms[vm].beaten == Time::ZERO {
            self.violated(|| format!("vm{vm} could not join though nothing failed"));
        }
        self.counts.backend_refusals += 1;
    }

    /// A request has come in.
    pub(crate) fn asked(&mut self, vm: usize, lease: LeaseId, owner: OwnerId, arrived: Time, request: &Request) {
        let known = Known {
            vm,
            life: self.vms[vm].life,
            owner,
            arrived,
            wants: request.wants().to_vec(),
            phase: Phase::Asking,
            polled: self.now,
            renewed: Time::ZERO,
            grants: Vec::new(),
            ended: Vec::new(),
            broken: Vec::new(),
            told: u64::MAX,
            slow: false,
            cut: None,
            reaped: false,
            entries: 0,
        };
        self.counts.requests += 1;
        if self.leases.insert(lease, known).is_some() {
            self.violated(|| format!("{lease:?} is given twice"));
        }
    }

    /// A VM begins an operation.
    pub(crate) fn begin(&mut self, vm: usize, kind: Kind, lease: LeaseId) {
        if let Some(known) = self.leases.get_mut(&lease) {
            if kind == Kind::Poll {
                known.polled = self.now;
            }
            if matches!(kind, Kind::Release | Kind::Cancel) {
                known.phase = Phase::Leaving;
            }
        }
        let (failures, foreign) = (self.vms[vm].failures, self.counts.writes - self.vms[vm].writes);
        let (began, log, calls) = (self.now, self.log.len(), self.counts.calls);
        self.vms[vm].op = Some(Op { kind, lease, began, log, failures, foreign, calls });
    }

    fn finish(&mut self, vm: usize) -> Op {
        let nothing =
            || Op { kind: Kind::House, lease: LeaseId(0), began: self.now, log: 0, failures: 0, foreign: 0, calls: 0 };
        let op = self.vms[vm].op.take();
        op.unwrap_or_else(nothing)
    }

    /// Whether something was so at any moment since an operation began.
    fn ever(&self, since: usize, mut so: impl FnMut(&View<'_>) -> bool) -> bool {
        let mut view = View { state: self, locks: BTreeMap::new(), sessions: Rc::clone(&self.sessions.record) };
        if so(&view) {
            return true;
        }
        for past in self.log[since.min(self.log.len())..].iter().rev() {
            match past {
                Past::Locks(index, record) => drop(view.locks.insert(*index, Rc::clone(record))),
                Past::Sessions(sessions) => view.sessions = Rc::clone(sessions),
            }
            if so(&view) {
                return true;
            }
        }
        false
    }

    /// A request was granted all its locks.
    pub(crate) fn granted(&mut self, vm: usize, lease: &Lease) {
        let op = self.finish(vm);
        let id = lease.id();
        self.trace.line(|| format!("    vm{vm}: {} is granted {id:?}", lease.owner()));
        self.trace.mark(5, vm);
        let Some(known) = self.leases.get_mut(&id) else { return };
        known.phase = Phase::Holding;
        known.slow |= self.now.since(op.began) >= DEAD_AFTER;
        known.told = self.counts.calls;
        let whole = lease.grants().iter().filter(|grant| !known.broken.contains(&grant.name));
        known.grants = whole.map(|grant| (grant.name.clone(), grant.fence, grant.until)).collect();
        let wants = known.wants.iter().map(|want| (&want.name, want.mode));
        let right = wants.eq(lease.grants().iter().map(|grant| (&grant.name, grant.mode)));
        if !right {
            self.violated(|| format!("{id:?} was granted something else than it asked for: {:?}", lease.grants()));
        }
        for grant in lease.grants() {
            self.has_what_it_was_granted(id, grant);
        }
        self.keeps_the_order(&op, id);
        self.believed_are_kept(vm);
    }

    fn has_what_it_was_granted(&mut self, id: LeaseId, grant: &Grant) {
        let ended = self.leases.get(&id).is_some_and(|known| known.ended.contains(&grant.name));
        let entry = self.entries(&grant.name).iter().find(|entry| entry.lease == id);
        if entry.and_then(fence) != Some(grant.fence) && !ended {
            self.violated(|| format!("{id:?} was granted {grant:?}, of which the table knows nothing"));
        }
    }

    /// Who holds a lock for as long as a request takes may not be granted one that sorts below, or wait for it.
    fn keeps_the_order(&mut self, op: &Op, id: LeaseId) {
        if op.kind != Kind::Acquire {
            return;
        }
        let Some(known) = self.leases.get(&id) else { return };
        let classes = &self.rules.classes;
        let mut wrong = None;
        for want in &known.wants {
            // Ranks are of classes without a tree, so that every such lock was asked for by name.
            for facts in self.lock_facts.iter().filter(|facts| classes.violates(&facts.name, &want.name)) {
                let held = &facts.name;
                let stays = |entry: &Entry| {
                    let steady = entry.is_held() && !facts.lapsed.contains(&entry.lease);
                    // One that was taken for dead is back in the index by the time that it is told.
                    let listed = |known: &Known| {
                        known.phase != Phase::Gone && !known.slow && (!known.reaped || known.told < op.calls)
                    };
                    let steady = steady && self.leases.get(&entry.lease).is_some_and(listed);
                    let other = entry.owner == known.owner && entry.lease != id && steady;
                    // Under the same fence: a grant that ended while nobody looked is granted anew, to the same lease.
                    let absent = |view: &View<'_>| {
                        !view
                            .entries(held)
                            .iter()
                            .any(|earlier| earlier.lease == entry.lease && fence(earlier) == fence(entry))
                    };
                    other && end(entry, &self.sessions.record) > self.now && !self.ever(op.log, absent)
                };
                let at_once = |view: &View<'_>| view.owner_holds(&known.owner, &want.name, id, op.began);
                if self.entries(held).iter().any(stays) && !self.ever(op.log, at_once) {
                    wrong = Some((held.clone(), want.name.clone(), known.owner.clone()));
                }
            }
        }
        if let Some((held, wanted, owner)) = wrong {
            self.violated(|| format!("{owner} holds {held} and was let through to {wanted}"));
        }
    }

    /// A request waits.
    pub(crate) fn waits(&mut self, vm: usize, pending: &Pending) {
        let op = self.finish(vm);
        let id = pending.lease();
        self.trace.line(|| format!("    vm{vm}: {} waits for {:?}", pending.owner(), pending.waits_for()));
        self.trace.mark(6, vm);
        self.counts.waits += u64::from(op.kind == Kind::Acquire);
        let Some(known) = self.leases.get_mut(&id) else { return };
        known.phase = Phase::Waiting;
        known.slow |= self.now.since(op.began) >= DEAD_AFTER;
        // One that was taken for dead stands there again when it is polled; so does one whose grant has ended unseen.
        let (ended, reaped) = (known.ended.clone(), known.reaped);
        let stands = pending.waits_for().is_some_and(|(lock, mode)| {
            self.entries(lock).iter().any(|entry| entry.lease == id && entry.mode == mode) || ended.contains(lock)
        });
        if !stands && !reaped {
            self.violated(|| format!("{id:?} waits where it does not stand: {pending:?}"));
        }
        if pending.poll_at() > pending.deadline() || pending.deadline() <= op.began {
            self.violated(|| format!("{id:?} waits past its time: {pending:?}"));
        }
        self.keeps_the_order(&op, id);
    }

    /// A request was refused: it holds nothing, stands nowhere, and there was a reason.
    pub(crate) fn refused(&mut self, vm: usize, id: LeaseId, refusal: &Refusal) {
        let op = self.finish(vm);
        self.trace.line(|| format!("    vm{vm}: {} is refused: {:?}", refusal.owner, refusal.cause));
        self.trace.mark(7, vm);
        self.over(vm, id, &op);
        let Some(known) = self.leases.get(&id) else { return };
        let want = known.wants.iter().find(|want| want.name == refusal.lock);
        let wait = want.map(|want| want.wait).unwrap_or_default();
        let classes = &self.rules.classes;
        let wrong = match &refusal.cause {
            Cause::Deadlock { cycle } => {
                self.counts.deadlocks += 1;
                let closes = cycle.first().is_some_and(|edge| edge.owner == refusal.owner)
                    && cycle.last().is_some_and(|edge| edge.held_by == refusal.owner)
                    && cycle.windows(2).all(|pair| pair[0].held_by == pair[1].owner);
                let whole = |view: &View<'_>| cycle.iter().all(|edge| view.has_edge(edge, op.began));
                if !closes {
                    Some("a cycle that does not close")
                } else if wait.is_zero() {
                    Some("a deadlock for one that does not wait")
                } else if !self.ever(op.log, whole) {
                    Some("a cycle that never was")
                } else {
                    None
                }
            }
            Cause::OrderViolation { held } => {
                self.counts.order_violations += 1;
                let holds = |view: &View<'_>| view.owner_holds(&refusal.owner, held, id, op.began);
                let declared = classes.violates(held, &refusal.lock);
                (!declared || !self.ever(op.log, holds)).then_some("an order that was kept")
            }
            Cause::Held { .. } => {
                self.counts.held_refusals += 1;
                (!wait.is_zero()).then_some("held, though it would have waited")
            }
            Cause::WaitTimeout { .. } => {
                self.counts.timeouts += 1;
                (op.began < known.arrived + wait).then_some("a wait that was not over")
            }
            Cause::Limit { .. } => {
                self.counts.limits += 1;
                None
            }
            Cause::LeaseLost { .. } => {
                self.counts.lost_while_waiting += 1;
                let past = known.wants.iter().any(|want| want.hold <= self.now.since(Time::ZERO));
                (known.ended.is_empty() && !past).then_some("a loss of nothing")
            }
            Cause::Grace { .. } => Some("a grace that there is none of"),
            Cause::Backend { .. } => {
                self.counts.backend_refusals += 1;
                (self.vms[vm].failures == op.failures).then_some("a store that did not fail")
            }
        };
        if let Some(wrong) = wrong {
            self.violated(|| format!("{} was refused for {wrong}: {refusal:?}", refusal.owner));
        }
    }

    /// A request is over: nothing is left of it, if the store let it go.
    fn over(&mut self, vm: usize, id: LeaseId, op: &Op) {
        let failed = self.vms[vm].failures > op.failures;
        let Some(known) = self.leases.get_mut(&id) else { return };
        known.phase = Phase::Gone;
        if known.entries > 0 && !failed {
            let (owner, entries) = (known.owner.clone(), known.entries);
            self.violated(|| format!("{id:?} of {owner} is over, and still has {entries} entries"));
            return;
        }
        let listed = self.owners.iter().flat_map(|slot| slot.record.holdings()).flat_map(|of| &of.items);
        if !failed && listed.into_iter().any(|item| item.lease == id) {
            self.violated(|| format!("{id:?} is over, and still listed in the index"));
        }
    }

    /// A VM lets the answer of a request pass; `sure` where it took the lease for valid without looking.
    pub(crate) fn passes(&mut self, vm: usize, sure: bool) {
        if sure {
            self.believed_are_kept(vm);
        }
        self.trace.mark(8, vm);
    }

    /// A lease was given back; `ended` says what had ended before.
    pub(crate) fn released(&mut self, vm: usize, id: LeaseId, ended: &[Grant]) {
        let op = self.finish(vm);
        self.counts.releases += 1;
        self.trace.line(|| format!("    vm{vm}: {id:?} is given back, {} had ended", ended.len()));
        self.over(vm, id, &op);
        let failed = self.vms[vm].failures > op.failures;
        let Some(known) = self.leases.get(&id) else { return };
        let wrong = ended.iter().find(|grant| !known.ended.contains(&grant.name));
        if let Some(grant) = wrong
            && !failed
        {
            // What was past its end is reaped by the release itself.
            let past = grant.until <= self.now || !known.ended.is_empty() || self.now >= op.began;
            if !past {
                self.violated(|| format!("{id:?} was told that {grant:?} had ended"));
            }
        }
    }

    /// A waiter was ended.
    pub(crate) fn cancelled(&mut self, vm: usize, id: LeaseId) {
        let op = self.finish(vm);
        self.counts.cancels += 1;
        self.over(vm, id, &op);
    }

    /// A lease was looked at.
    pub(crate) fn checked(&mut self, vm: usize, id: LeaseId, found: Result<Option<(LockName, Loss)>, StoreError>) {
        let op = self.finish(vm);
        self.failed_for_a_reason_since(vm, found.as_ref().err(), op.failures);
        let Some(known) = self.leases.get_mut(&id) else { return };
        match found {
            Ok(None) => known.renewed = op.began,
            Ok(Some((lock, _))) => {
                self.counts.leases_lost += 1;
                if self.believes(id) && self.holds(&lock, id) {
                    self.violated(|| format!("{id:?} was told that it lost {lock}, which it holds"));
                }
            }
            Err(_) => {}
        }
        if self.vms[vm].renews {
            self.believed_are_kept(vm);
        }
    }

    /// A lease has come to its hold limit.
    pub(crate) fn outlived(&mut self, vm: usize) {
        self.counts.hold_limits += 1;
        self.trace.mark(9, vm);
    }

    /// The glass was broken, or could not be.
    pub(crate) fn broken(&mut self, vm: usize, done: bool) {
        let op = self.finish(vm);
        if let Kind::Glass(lock) = op.kind
            && done
        {
            // A resource that hears of it refuses the former holders: the fence has risen.
            let bucket = self.lock_facts.iter().find(|facts| facts.name == lock).map(|facts| facts.bucket);
            let highest = bucket.map(|bucket| self.record::<LockBucket>(bucket).0.highest);
            let known = self.lock_facts.iter().find(|facts| facts.name == lock).map(|facts| facts.highest);
            if highest < known {
                self.violated(|| format!("breaking the glass over {lock} raised no fence"));
            }
        }
    }

    /// Nothing fails unless the store did.
    pub(crate) fn failed_for_a_reason(&mut self, vm: usize, error: Option<&StoreError>) {
        let since = self.vms[vm].op.as_ref().map_or(0, |op| op.failures);
        self.failed_for_a_reason_since(vm, error, since);
    }

    fn failed_for_a_reason_since(&mut self, vm: usize, error: Option<&StoreError>, since: u64) {
        if let Some(error) = error
            && self.vms[vm].failures == since
        {
            self.violated(|| format!("vm{vm} failed, and the store did not: {error}"));
        }
    }
}

/// Under which fence an entry holds its lock, if it does.
fn fence(entry: &Entry) -> Option<Fence> {
    match entry.state {
        EntryState::Held { fence, .. } => Some(fence),
        EntryState::Waiting { .. } => None,
    }
}
