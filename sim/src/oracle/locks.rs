//! Every change of a lock: exclusion, fences, order, nobody forgotten, nothing ended early.

use std::rc::Rc;

use interlock_core::session::Sessions;
use interlock_core::store::LockBucket;
use interlock_core::{Entry, Fence, LeaseId, LockName, State as Stand, Time};

use super::{Kind, Phase, conflict, end, owned, suffices};
use crate::state::{Past, Plant, State};

fn at_index<T>(of: &[T], index: u32) -> usize {
    usize::try_from(index).unwrap_or(0).min(of.len().saturating_sub(1))
}

fn is_plain(entry: &Entry) -> bool {
    matches!(entry.state, Stand::Waiting { upgrade: false, .. })
}

/// Whether an entry is the same one still. A waiter whose worker was away comes back behind all others, as a new one.
fn stays(old: &Entry, new: &[Entry]) -> bool {
    let same = |new: &Entry| match (&old.state, &new.state) {
        (Stand::Waiting { since, .. }, Stand::Waiting { since: other, .. }) => since == other,
        (Stand::Held { fence, .. }, Stand::Held { fence: other, .. }) => fence == other,
        (Stand::Held { .. }, Stand::Waiting { .. }) => false,
        (Stand::Waiting { .. }, Stand::Held { .. }) => true,
    };
    new.iter().find(|new| new.lease == old.lease).is_some_and(same)
}

/// Whether it holds, and since when it does what it does.
fn came(entry: &Entry) -> (bool, Time) {
    match entry.state {
        Stand::Held { since, .. } => (true, since),
        Stand::Waiting { since, .. } => (false, since),
    }
}

/// Whether a waiter was marked as one of several waits of its owner, and is otherwise what it was. A mark is never taken back.
fn is_marked(old: &Entry, new: &Entry) -> bool {
    let Stand::Waiting { since, deadline, hold, upgrade, elsewhere: false } = old.state else { return false };
    *new == Entry { state: Stand::Waiting { since, deadline, hold, upgrade, elsewhere: true }, ..old.clone() }
}

fn fence(entry: &Entry) -> Option<Fence> {
    match entry.state {
        Stand::Held { fence, .. } => Some(fence),
        Stand::Waiting { .. } => None,
    }
}

impl State {
    /// A VM has written a bucket of locks.
    pub(crate) fn commit_locks(&mut self, vm: usize, index: u32, mut new: Rc<LockBucket>) {
        if self.plant == Plant::FenceForgotten && new.queues().is_empty() {
            new = Rc::default();
        }
        let at = at_index(&self.locks, index);
        let slot = &mut self.locks[at];
        slot.version = slot.version.wrapping_add(1).max(1);
        let old = std::mem::replace(&mut slot.record, Rc::clone(&new));
        self.log.push(Past::Locks(index, Rc::clone(&old)));
        self.trace.mark(2, at);
        if self.protocol.is_some() {
            self.check_authority(vm, &old, &new);
            return;
        }
        for queue in new.queues() {
            let before = old.queue(&queue.name).map_or(&[][..], |queue| queue.entries());
            if queue.is_empty() {
                self.violated(|| format!("{} is kept though nobody is there", queue.name));
            }
            if before != queue.entries() {
                self.lock_changed(vm, index, &queue.name, before, queue.entries());
            }
        }
        for queue in old.queues() {
            if new.queue(&queue.name).is_none() {
                self.lock_changed(vm, index, &queue.name, queue.entries(), &[]);
            }
        }
        if new.highest < old.highest && self.plant != Plant::FenceForgotten {
            self.violated(|| format!("bucket {index}: the highest fence falls"));
        }
    }

    fn lock_changed(&mut self, vm: usize, bucket: u32, name: &LockName, old: &[Entry], new: &[Entry]) {
        self.trace.line(|| format!("    vm{vm} writes {name}: {}", told(new)));
        let permits = self.lock_facts(name, bucket).permits;
        // One that looks dead to itself leaves, comes back like one that is new and may be granted at once, in one write.
        let op = self.vms[vm].op.as_ref().filter(|op| op.kind == Kind::Poll);
        let may_be_back = |entry: &Entry| {
            let anew = new.iter().any(|again| again.lease == entry.lease && came(again) != came(entry));
            anew && op.is_some_and(|op| op.lease == entry.lease) && end(entry, &self.sessions.record) <= self.now
        };
        let back = |entry: &Entry| {
            let place = |entries: &[Entry], lease| entries.iter().position(|entry| entry.lease == lease);
            let before = |entries, other| Some(place(entries, other)? < place(entries, entry.lease)?);
            let passed = |other: &Entry| {
                before(old, other.lease).zip(before(new, other.lease)).is_some_and(|(then, now)| then != now)
            };
            let moved = new.last().is_some_and(|last| last.lease == entry.lease) || new.iter().any(passed);
            moved && may_be_back(entry)
        };
        // An upgrade that comes back stands where it stood if only plain waiters were before it: then it cannot be told from one
        // that is granted where it stands.
        let perhaps_back: Vec<LeaseId> =
            old.iter().filter(|entry| may_be_back(entry)).map(|entry| entry.lease).collect();
        let still = |entry: &&Entry| stays(entry, new) && !back(entry);
        let (old, gone): (Vec<&Entry>, Vec<&Entry>) = old.iter().partition(still);
        let all_stay = gone.is_empty();
        gone.into_iter().for_each(|entry| self.left(vm, name, entry));
        let old = old.as_slice();
        self.order(vm, name, old, new);
        self.marks(vm, name, old, new);
        let mut over_waiters = false;
        for (at, entry) in new.iter().enumerate() {
            let before = old.iter().copied().find(|other| other.lease == entry.lease);
            match before {
                Some(before) => self.stayed(name, before, entry),
                None => match self.leases.get_mut(&entry.lease) {
                    Some(known) => known.entries += 1,
                    None => self.violated(|| format!("{name}: {entry:?} was never asked for")),
                },
            }
            if entry.is_held() && before.is_none_or(|before| !before.is_held()) {
                self.new_grant(vm, name, permits, new, at);
                let op = self.vms[vm].op.as_ref();
                let own = op.is_some_and(|op| op.lease == entry.lease);
                let anew = before.is_none() || perhaps_back.contains(&entry.lease);
                over_waiters |= own && anew && owned(entry, old.iter().copied()).is_some();
                if !own && entry.session != interlock_core::SessionId::NONE {
                    self.vms[vm].owes.push((entry.lease, entry.session));
                }
                self.counts.grants += 1;
                self.counts.hand_overs += u64::from(!own);
            }
        }
        self.exclusion(name, permits, new);
        // A worker that only renews its entry meanwhile is not the one to settle it.
        let moved = !all_stay
            || new
                .iter()
                .any(|entry| old.iter().all(|other| other.lease != entry.lease || other.is_held() != entry.is_held()));
        over_waiters |= !moved && self.lock_facts(name, bucket).unsettled;
        over_waiters &= new.iter().any(|entry| !entry.is_held());
        self.lock_facts(name, bucket).unsettled = over_waiters;
        if !over_waiters {
            self.nobody_forgotten(name, permits, new);
        }
    }

    /// No two conflicting holders, no more than the permits allow.
    fn exclusion(&mut self, name: &LockName, permits: u32, entries: &[Entry]) {
        let holders = || entries.iter().filter(|entry| entry.is_held());
        if permits > 1 {
            if holders().count() > usize::try_from(permits).unwrap_or(usize::MAX) {
                self.violated(|| format!("{name}: too many holders: {}", told(entries)));
            }
            return;
        }
        for (at, a) in entries.iter().enumerate().filter(|(_, entry)| entry.is_held()) {
            for b in entries[at + 1..].iter().filter(|entry| entry.is_held()) {
                if conflict(a, b) {
                    self.violated(|| format!("{name}: conflicting holders: {}", told(entries)));
                }
            }
        }
    }

    /// A grant that was just made: whose turn it was, and its fence.
    fn new_grant(&mut self, vm: usize, name: &LockName, permits: u32, entries: &[Entry], at: usize) {
        let entry = &entries[at];
        let (given, now) = (fence(entry).unwrap_or_default(), self.now);
        if let Some(known) = self.leases.get_mut(&entry.lease) {
            // Whatever became of an earlier grant: this is another one.
            known.broken.retain(|lock| lock != name);
            known.ended.retain(|lock| lock != name);
        }
        let earlier = |other: &&Entry| fence(other).is_some_and(|fence| fence <= given);
        let own = owned(entry, entries.iter().filter(earlier));
        let re_entry = permits == 1 && own.is_some_and(|(gives, _)| suffices(gives, entry.mode));
        let barges = |other: &Entry| !other.is_held() && (permits > 1 || conflict(entry, other));
        if !re_entry && entries[..at].iter().any(barges) {
            self.violated(|| format!("{name}: {} barges: {}", entry.owner, told(entries)));
        }
        let facts = self.lock_facts(name, 0);
        let highest = facts.highest;
        if re_entry {
            let of_owner = own.map(|(_, fence)| fence);
            if of_owner != Some(given) {
                self.violated(|| format!("{name}: {} re-enters under {given}, holds {of_owner:?}", entry.owner));
            }
            self.counts.re_entries += 1;
        } else {
            facts.highest = facts.highest.max(given);
            if given <= highest {
                self.violated(|| format!("{name}: fence {given} after {highest}, by vm{vm} at {now:?}"));
            }
            self.counts.upgrades += u64::from(own.is_some());
        }
    }

    /// Whoever stood keeps its place; whoever is new stands behind all, or as an upgrade before the plain waiters.
    fn order(&mut self, vm: usize, name: &LockName, old: &[&Entry], new: &[Entry]) {
        let place = |entry: &Entry| old.iter().position(|other| other.lease == entry.lease);
        let mut last = None;
        for (at, entry) in new.iter().enumerate() {
            if let Some(was) = place(entry) {
                if last.is_some_and(|last| was < last) {
                    self.violated(|| format!("{name}: the queue is reordered: {}", told(new)));
                }
                last = Some(was);
                continue;
            }
            let behind: Vec<&Entry> =
                new[at + 1..].iter().filter_map(|other| old.get(place(other)?).copied()).collect();
            let ahead = new[..at].iter().filter_map(|other| old.get(place(other)?).copied()).any(is_plain);
            let gives = owned(entry, old.iter().copied()).map(|(gives, _)| gives);
            let permits = self.lock_facts(name, 0).permits;
            let upgrades = permits == 1 && gives.is_some_and(|gives| !suffices(gives, entry.mode));
            let right = if upgrades {
                !ahead && behind.iter().all(|other| other.is_held() || is_plain(other))
            } else {
                behind.is_empty()
            };
            let of_vm = self.vms[vm].op.as_ref().is_some_and(|op| op.lease == entry.lease);
            if !right || !of_vm {
                self.violated(|| format!("{name}: {} stands in a wrong place: {}", entry.owner, told(new)));
            }
        }
    }

    /// Who marks a wait does nothing else in that write, and is a request of the same owner that asks or waits: none other
    /// can know, and a mark that comes along with something else could come without its search.
    fn marks(&mut self, vm: usize, name: &LockName, old: &[&Entry], new: &[Entry]) {
        let before = |entry: &Entry| old.iter().copied().find(|before| before.lease == entry.lease);
        let is_new_mark = |entry: &&Entry| before(entry).is_some_and(|before| is_marked(before, entry));
        let Some(marked) = new.iter().find(is_new_mark) else { return };
        let others = |entry: &&Entry| entry.lease != marked.lease;
        let alone = old.len() == new.len() && new.iter().filter(others).all(|entry| before(entry) == Some(entry));
        let asks = self.vms[vm].op.as_ref().filter(|op| matches!(op.kind, Kind::Acquire | Kind::Poll));
        let asks = asks.and_then(|op| self.leases.get(&op.lease)).is_some_and(|known| known.owner == marked.owner);
        if !alone || !asks {
            self.violated(|| format!("{name}: vm{vm} marks a wait of {}, out of turn: {}", marked.owner, told(new)));
        }
        self.counts.marks += 1;
    }

    /// An entry that was there before: it goes from waiting to holding, and else only its renewal changes.
    fn stayed(&mut self, name: &LockName, old: &Entry, new: &Entry) {
        let same = old.owner == new.owner && old.mode == new.mode;
        let moved = old.session != new.session;
        let stands = match (&old.state, &new.state) {
            (Stand::Waiting { .. }, Stand::Held { .. }) => true,
            // But for the mark that its owner waits elsewhere too: see `marks`.
            (Stand::Waiting { .. }, Stand::Waiting { .. }) => old.state == new.state || is_marked(old, new),
            (Stand::Held { .. }, Stand::Waiting { .. }) => false,
            (Stand::Held { fence, since, until, .. }, Stand::Held { fence: f, since: s, until: u, .. }) => {
                (fence, since, until) == (f, s, u)
            }
        };
        let of_its_vm = self.leases.get(&new.lease).is_some_and(|known| {
            let now = self.members.iter().find(|(session, ..)| *session == new.session);
            now.is_some_and(|(_, vm, life, _)| (*vm, *life) == (known.vm, known.life))
        });
        self.counts.adoptions += u64::from(moved);
        if !same || !stands || moved && !of_its_vm {
            self.violated(|| format!("{name}: {old:?} became {new:?}"));
        }
        // Its own worker renewed it, by a clock that it had read before the end.
        if end(old, &self.sessions.record) <= self.now && end(new, &self.sessions.record) > self.now {
            let lease = old.lease;
            self.lock_facts(name, 0).lapsed.push(lease);
        }
    }

    /// Somebody stands there no more: given back, cancelled, refused, broken, or ended, and nothing else.
    fn left(&mut self, vm: usize, name: &LockName, entry: &Entry) {
        let facts = self.lock_facts(name, 0);
        let lapsed = facts.lapsed.contains(&entry.lease);
        facts.lapsed.retain(|lease| *lease != entry.lease);
        // A grant by a worker that stood still may be past its TTL when it is written. Who reads it with heartbeats from
        // before takes it for ended, and as long as its holder was not told of it, may.
        let untold = self.leases.get(&entry.lease).is_some_and(|known| known.phase != Phase::Holding);
        let stale = untold && end(entry, &Sessions::default()) <= self.now;
        let ended = lapsed || stale || end(entry, &self.sessions.record) <= self.now;
        let op = self.vms[vm].op.clone();
        let broken = entry.is_held() && op.as_ref().is_some_and(|op| op.kind == Kind::Glass(name.clone()));
        let believed = entry.is_held() && self.believes(entry.lease);
        let life = self.vms[vm].life;
        let own = self.leases.get(&entry.lease).is_some_and(|known| {
            let ends = |op: &super::Op| {
                op.lease == entry.lease && matches!(op.kind, Kind::Acquire | Kind::Poll | Kind::Release | Kind::Cancel)
            };
            known.vm == vm && known.life == life && (known.phase == Phase::Gone || op.as_ref().is_some_and(ends))
        });
        if let Some(known) = self.leases.get_mut(&entry.lease) {
            known.entries = known.entries.saturating_sub(1);
            if entry.is_held() && !own {
                known.ended.push(name.clone());
            }
            known.reaped |= !entry.is_held() && !own;
        }
        if own {
            return;
        }
        let (now, owner) = (self.now, &entry.owner);
        if broken {
            self.counts.glass_broken += 1;
            self.forgets(entry.lease, name);
        } else if !ended {
            self.violated(|| format!("{name}: the entry of {owner} ended early, by vm{vm} at {now:?}: {entry:?}"));
        } else if believed {
            self.violated(|| format!("{name}: {owner} lost a lease that its VM takes for valid, by vm{vm} at {now:?}"));
        } else if entry.is_held() {
            self.counts.expiries += 1;
        } else {
            self.counts.waiters_reaped += 1;
        }
    }

    /// The grant was broken: its holder is fenced off, and believes what it likes.
    fn forgets(&mut self, lease: LeaseId, name: &LockName) {
        if let Some(known) = self.leases.get_mut(&lease) {
            known.grants.retain(|(lock, _, _)| lock != name);
            known.broken.push(name.clone());
        }
    }

    /// Nobody waits whose turn it is.
    fn nobody_forgotten(&mut self, name: &LockName, permits: u32, entries: &[Entry]) {
        let held = entries.iter().filter(|entry| entry.is_held()).count();
        for (at, waiter) in entries.iter().enumerate().filter(|(_, entry)| !entry.is_held()) {
            let turn = if permits > 1 {
                held < usize::try_from(permits).unwrap_or(0) && entries[..at].iter().all(Entry::is_held)
            } else {
                let re_entry = owned(waiter, entries).is_some_and(|(gives, _)| suffices(gives, waiter.mode));
                let holder = |other: &Entry| other.is_held() && conflict(waiter, other);
                let before = |other: &Entry| !other.is_held() && conflict(waiter, other);
                re_entry || !(entries.iter().any(holder) || entries[..at].iter().any(before))
            };
            if turn {
                self.violated(|| format!("{name}: {} is forgotten: {}", waiter.owner, told(entries)));
            }
        }
    }
}

/// A queue in a line.
pub(crate) fn told(entries: &[Entry]) -> String {
    let one = |entry: &Entry| {
        let Entry { owner, mode, lease, session, .. } = entry;
        let (s, lease) = (session.0, lease.0 & 0xffff);
        match &entry.state {
            Stand::Held { fence, .. } => format!("{owner} holds {mode} ({fence}, s{s} lease {lease})"),
            Stand::Waiting { .. } => format!("{owner} waits for {mode} (s{s} lease {lease})"),
        }
    };
    entries.iter().map(one).collect::<Vec<_>>().join(", ")
}
