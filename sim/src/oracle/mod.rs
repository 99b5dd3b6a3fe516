//! What must hold: computed anew from the records and the words of the contract, never with the core's own functions.
//!
//! `locks` looks at every change of a lock, `records` at the other records and at wake-ups, `requests` at what became of
//! a request, `rest` at the whole once nobody is in the middle of anything. What must not live here: any choice.

mod locks;
mod records;
mod requests;
mod rest;

use interlock_core::session::{DEAD_AFTER, Sessions};
use interlock_core::{Entry, Fence, LeaseId, LockName, Mode, OwnerId, SessionId, State as Stand, Time, Want};

use crate::state::State;

pub(crate) use locks::told;

/// What a VM is doing to its table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Taking a request in.
    Acquire,
    /// Looking after a waiter.
    Poll,
    /// Giving a lease back.
    Release,
    /// Ending a waiter.
    Cancel,
    /// Looking at a lease.
    Check,
    /// Breaking the glass over this lock.
    Glass(LockName),
    /// Beating.
    Beat,
    /// Keeping house.
    House,
}

/// One operation under way.
#[derive(Clone, Debug)]
pub struct Op {
    /// What it is.
    pub kind: Kind,
    /// About which lease, where it is about one.
    pub lease: LeaseId,
    /// When it began.
    pub began: Time,
    /// How far the log of the past had come.
    pub log: usize,
    /// How many store calls of the VM had failed.
    pub failures: u64,
    /// How many records others had written.
    pub foreign: u64,
    /// How many host calls there had been.
    pub calls: u64,
}

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing was decided yet.
    Asking,
    /// It waits.
    Waiting,
    /// It holds.
    Holding,
    /// It is being ended.
    Leaving,
    /// It is over.
    Gone,
}

/// What is known of a request and its lease.
#[derive(Clone, Debug)]
pub struct Known {
    /// Whose it is.
    pub vm: usize,
    /// Which life of that VM.
    pub life: u32,
    /// Who asked.
    pub owner: OwnerId,
    /// When it came in.
    pub arrived: Time,
    /// For what.
    pub wants: Vec<Want>,
    /// How far it has come.
    pub phase: Phase,
    /// When it was last looked after, or asked for.
    pub polled: Time,
    /// When it was last renewed by itself.
    pub renewed: Time,
    /// What it was granted: the lock, its fence, its hold limit.
    pub grants: Vec<(LockName, Fence, Time)>,
    /// Locks that it had and that ended without its doing.
    pub ended: Vec<LockName>,
    /// Locks that were taken from it by breaking the glass.
    pub broken: Vec<LockName>,
    /// How many host calls there had been when it was told that it holds.
    pub told: u64,
    /// Whether it was taken by an operation that stood still for so long that its worker looked dead: then the index may
    /// miss it, and the order rule with it.
    pub slow: bool,
    /// When the operation began that was to decide on it and in the middle of which its worker died: what it stands in since
    /// then may be neither published nor marked.
    pub cut: Option<Time>,
    /// Whether it was taken out of a queue for dead, or for past its deadline.
    pub reaped: bool,
    /// How many entries it has, over all locks.
    pub entries: u32,
}

/// What is known of a lock.
#[derive(Clone, Debug)]
pub struct LockFacts {
    /// Which.
    pub name: LockName,
    /// Its bucket.
    pub bucket: u32,
    /// How many may hold it.
    pub permits: u32,
    /// The highest fence that was given for it.
    pub highest: Fence,
    /// Entries that were past their end at some moment, whatever came later.
    pub lapsed: Vec<LeaseId>,
    /// Whether somebody upgraded over waiters, and has still to look for a cycle before others are granted.
    pub unsettled: bool,
}

/// When an entry ends, from the words of the contract: a grant its TTL after its last renewal or its worker's last
/// beat, at the latest at its hold limit; a waiter at its deadline, or when its worker counts as dead.
pub fn end(entry: &Entry, sessions: &Sessions) -> Time {
    let beat = sessions.members().iter().find(|member| member.id == entry.session).map(|member| member.beat);
    match entry.state {
        Stand::Held { renewed, until, .. } if entry.detached => until.min(renewed + entry.ttl),
        Stand::Held { renewed, until, .. } => until.min(renewed.max(beat.unwrap_or(renewed)) + entry.ttl),
        Stand::Waiting { deadline, since, .. } if entry.session == SessionId::NONE => deadline.max(since),
        Stand::Waiting { deadline, since, .. } => deadline.min(since.max(beat.unwrap_or(since)) + DEAD_AFTER),
    }
}

/// Gray's matrix once more, as a table: a row and a column a mode, from intent-shared to exclusive.
const TOGETHER: [[bool; 5]; 5] = [
    [true, true, true, true, false],
    [true, true, false, false, false],
    [true, false, true, false, false],
    [true, false, false, false, false],
    [false, false, false, false, false],
];

/// What each mode allows, as bits: read here, read below, write below, write here.
const GIVES: [u8; 5] = [0b0010, 0b0110, 0b0011, 0b0111, 0b1111];

fn row(mode: Mode) -> usize {
    match mode {
        Mode::IntentShared => 0,
        Mode::IntentExclusive => 1,
        Mode::Shared => 2,
        Mode::SharedIntentExclusive => 3,
        Mode::Exclusive => 4,
    }
}

/// Whether two owners may not hold a lock in these modes together.
pub fn modes_conflict(a: Mode, b: Mode) -> bool {
    !TOGETHER[row(a)][row(b)]
}

/// Whether both are of one owner, and both may re-enter.
pub fn re_enters(a: &Entry, b: &Entry) -> bool {
    a.owner == b.owner && a.reentrant && b.reentrant
}

/// Whether the two may not hold one lock together.
pub fn conflict(a: &Entry, b: &Entry) -> bool {
    let reads_again = a.owner == b.owner && a.mode == Mode::Shared && b.mode == Mode::Shared;
    !re_enters(a, b) && (modes_conflict(a.mode, b.mode) || reads_again)
}

/// What the holders among `entries` that let `entry` pass give together; none where there are none. With their highest
/// fence.
pub fn owned<'a>(entry: &Entry, entries: impl IntoIterator<Item = &'a Entry>) -> Option<(u8, Fence)> {
    let own = entries.into_iter().filter(|other| other.lease != entry.lease && re_enters(entry, other));
    own.fold(None, |sum: Option<(u8, Fence)>, other| match other.state {
        Stand::Held { fence, .. } => {
            let (gives, highest) = sum.unwrap_or((0, fence));
            Some((gives | GIVES[row(other.mode)], highest.max(fence)))
        }
        Stand::Waiting { .. } => sum,
    })
}

/// Whether an owner that has `gives` needs nothing more for `mode`.
pub fn suffices(gives: u8, mode: Mode) -> bool {
    let needs = GIVES[row(mode)];
    gives & needs == needs
}

impl State {
    /// What is known of a lock; it becomes known with its first change.
    pub(crate) fn lock_facts(&mut self, name: &LockName, bucket: u32) -> &mut LockFacts {
        let at = self.lock_facts.iter().position(|facts| facts.name == *name).unwrap_or_else(|| {
            let permits = self.rules.classes.of(name).permits;
            let facts = LockFacts {
                name: name.clone(),
                bucket,
                permits,
                highest: Fence(0),
                lapsed: Vec::new(),
                unsettled: false,
            };
            self.lock_facts.push(facts);
            self.lock_facts.len() - 1
        });
        &mut self.lock_facts[at]
    }

    /// The entries of a lock now.
    pub(crate) fn entries(&self, name: &LockName) -> &[Entry] {
        let facts = self.lock_facts.iter().find(|facts| facts.name == *name);
        let slot = facts.and_then(|facts| self.locks.get(usize::try_from(facts.bucket).unwrap_or(usize::MAX)));
        slot.and_then(|slot| slot.record.queue(name)).map_or(&[], interlock_core::Queue::entries)
    }

    /// Whether a lease holds a lock now, as far as the records say.
    pub(crate) fn holds(&self, name: &LockName, lease: LeaseId) -> bool {
        self.entries(name).iter().any(|entry| entry.lease == lease && entry.is_held())
    }

    /// Whether the VM that has a lease takes it for valid, by all that it knows: then it must be.
    pub(crate) fn believes(&self, lease: LeaseId) -> bool {
        let Some(known) = self.leases.get(&lease) else { return false };
        let vm = &self.vms[known.vm];
        if known.phase != Phase::Holding || !vm.alive || vm.life != known.life || vm.doubts {
            return false;
        }
        let heard = if vm.renews { known.renewed } else { vm.beaten };
        let ttl = known.wants.iter().map(|want| want.ttl).min().unwrap_or_default();
        let until = known.grants.iter().map(|(_, _, until)| *until).min().unwrap_or(Time::NEVER);
        self.now < heard + ttl && self.now < until
    }
}
