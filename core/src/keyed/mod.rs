//! Locks in a store of keys with revisions, such as etcd: what a listing of keys means.
//!
//! Every request has one key in the line of each lock that it has come to, and the revision at which that key came to be is
//! its place. The line is nobody's in particular: each worker reads it, and finds out by the rules of [`crate::queue`] whose
//! turn it is. Whoever's turn it is then writes into its own key that it holds the lock. Here is what a worker may conclude
//! from a line, and on which other keys that conclusion leans; what must not live here: how keys are named, coded, written
//! or watched.
//!
//! # Why a grant is written down
//! A line alone does not say who holds a lock: one that re-entered stays when the grant that let it in is given back, and an
//! upgrade goes ahead of who stood there before. So a grant is an entry of its own, made under the condition that nothing has
//! changed that it [leans on](Turn::leans_on). It is also the look at one's own key without which etcd's own lock was handed
//! out to sessions that had died while they waited (etcd issue 11456). And its revision rises from grant to grant, which that
//! of the key does not where an upgrade overtakes: it is the fence.

mod chase;

pub use chase::{Chase, Need};

use crate::class::Classes;
use crate::fence::Fence;
use crate::id::{LeaseId, OwnerId, SessionId};
use crate::mode::Mode;
use crate::name::LockName;
use crate::queue::{Entry, Queue, State};
use crate::refusal::{Cause, Holder, Limit};
use crate::request::{Request, Want};
use crate::time::{Duration, Time};

/// What a key in the line of a lock says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// The request.
    pub lease: LeaseId,
    /// Whose.
    pub owner: OwnerId,
    /// In which mode.
    pub mode: Mode,
    /// Whether the owner's other requests let it pass.
    pub reentrant: bool,
    /// Who asked, for people to read.
    pub asked_by: String,
    /// Since when it stands or holds, in microseconds since 1970, by the clock of who wrote it: for people to read.
    pub since: u64,
    /// What it is doing.
    pub stand: Stand,
    /// The revision at which it came to be: its place in the line.
    pub created: u64,
    /// The revision at which it was last written.
    pub written: u64,
}

/// What a request does in the line of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stand {
    /// It waits.
    Waits,
    /// It waits before those who wait plainly, since its owner held the lock in a weaker mode when it came.
    Upgrades,
    /// It holds the lock: under this fence where it re-entered, else under the revision at which this was written.
    Holds(Option<Fence>),
}

impl Key {
    /// The fence that it holds the lock under.
    pub fn fence(&self) -> Option<Fence> {
        match self.stand {
            Stand::Waits | Stand::Upgrades => None,
            Stand::Holds(fence) => Some(fence.unwrap_or(Fence(self.written))),
        }
    }

    fn entry(&self, moment: Moment) -> Entry {
        let since = moment.now - Duration::from_micros(moment.unix_micros.saturating_sub(self.since));
        let upgrade = self.stand == Stand::Upgrades;
        let state = match self.fence() {
            Some(fence) => State::Held { fence, since, renewed: since, until: Time::NEVER },
            // A key does not say whether its owner waits elsewhere too. So a search asks.
            None => {
                let (deadline, hold) = (Time::NEVER, Duration::MAX);
                State::Waiting { since, deadline, hold, upgrade, elsewhere: true }
            }
        };
        Entry {
            lease: self.lease,
            owner: self.owner.clone(),
            mode: self.mode,
            reentrant: self.reentrant,
            session: SessionId::NONE,
            detached: true,
            ttl: Duration::MAX,
            asked_by: self.asked_by.clone(),
            state,
        }
    }
}

/// Now, on both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// On the clock of this worker.
    pub now: Time,
    /// Microseconds since 1970.
    pub unix_micros: u64,
}

/// The line of a lock as its keys have it, whatever order they are given in.
pub fn line<'a>(lock: &LockName, keys: impl IntoIterator<Item = &'a Key>, moment: Moment) -> Queue {
    let mut keys: Vec<&Key> = keys.into_iter().collect();
    // Keys that were made in one step have one revision: those then stand in the order of their numbers.
    keys.sort_by_key(|key| match key.stand {
        Stand::Holds(_) => (0, key.written, key.lease),
        Stand::Upgrades => (1, key.created, key.lease),
        Stand::Waits => (2, key.created, key.lease),
    });
    Queue::of(lock.clone(), keys.into_iter().map(|key| key.entry(moment)).collect())
}

/// What a request may do now at a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It may write down that it holds the lock.
    Grant {
        /// The fence of the grant that it re-enters, if it does.
        fence: Option<Fence>,
        /// Grants of its owner that must still be there when it does.
        leans_on: Vec<LeaseId>,
        /// Whether it is an upgrade that goes ahead of others: of who waits, and of who has come since the line was read. So
        /// nobody may have written into the line since then, and whoever read it before must be able to tell.
        overtakes: bool,
    },
    /// It has to wait, but before those who wait plainly. That, too, has to be written down.
    Upgrade {
        /// Grants of its owner that must still be there when it does.
        leans_on: Vec<LeaseId>,
    },
    /// It has to wait.
    Wait,
}

impl Turn {
    /// Grants of the owner that a conclusion leans on.
    pub fn leans_on(&self) -> &[LeaseId] {
        match self {
            Turn::Grant { leans_on, .. } | Turn::Upgrade { leans_on } => leans_on,
            Turn::Wait => &[],
        }
    }
}

/// The turn of a request that comes to a line; where it stands there already, as the last that has come.
pub fn arrive(queue: &Queue, me: &Key, permits: u32, moment: Moment) -> Turn {
    let stands = queue;
    let mut queue = stands.clone();
    let stood = queue.remove(me.lease).is_some();
    let own = own_grants(&queue, me);
    queue.enqueue(Key { stand: Stand::Waits, ..me.clone() }.entry(moment));
    let upgrades = queue.entry(me.lease).is_some_and(Entry::is_upgrade);
    if stood && !upgrades {
        // Others may have come since. It stands before them.
        return stand(stands, me, permits, moment);
    }
    let mut highest = Fence(0);
    if upgrades && queue.settle_one(me.lease, permits, moment.now, unsettled(&queue), &mut highest) {
        return Turn::Grant { fence: None, leans_on: own, overtakes: true };
    }
    match turns(&queue, permits, moment).into_iter().find(|(lease, _)| *lease == me.lease) {
        // Of plain waiters the owner's grants matter to re-entry only.
        Some((_, fence)) => {
            let leans_on = if fence.is_some() || upgrades { own } else { Vec::new() };
            Turn::Grant { fence, leans_on, overtakes: upgrades }
        }
        None if upgrades => Turn::Upgrade { leans_on: own },
        None => Turn::Wait,
    }
}

/// The turn of one that stands in the line.
pub fn stand(queue: &Queue, me: &Key, permits: u32, moment: Moment) -> Turn {
    match turns(queue, permits, moment).into_iter().find(|(lease, _)| *lease == me.lease) {
        Some((_, fence)) => {
            let leans_on = if fence.is_some() { own_grants(queue, me) } else { Vec::new() };
            Turn::Grant { fence, leans_on, overtakes: false }
        }
        None => Turn::Wait,
    }
}

/// Everybody in a line whose turn it is, with the fence that they re-enter under, if they do. Who re-enters does so by a grant
/// that is written down: not by that of one whose turn it is as well, who may yet go without taking it.
pub fn turns(queue: &Queue, permits: u32, moment: Moment) -> Vec<(LeaseId, Option<Fence>)> {
    let fresh = unsettled(queue);
    let mut settled = queue.clone();
    let granted = settled.settle(permits, moment.now, fresh, &mut Fence(0));
    let mut last = Fence(0);
    let turn = |lease| match settled.entry(lease).and_then(Entry::fence)? {
        fence if fence < fresh => Some((lease, Some(fence))),
        fence if fence <= last => None,
        fence => {
            last = fence;
            Some((lease, None))
        }
    };
    granted.into_iter().filter_map(turn).collect()
}

/// A fence that nobody in the line has: what is granted anew is told by it from re-entry.
fn unsettled(queue: &Queue) -> Fence {
    queue.holders().filter_map(Entry::fence).max().unwrap_or_default().next(Fence(1))
}

/// The grants that the owner of a request may re-enter.
fn own_grants(queue: &Queue, me: &Key) -> Vec<LeaseId> {
    let own = |held: &&Entry| held.owner == me.owner && held.reentrant && me.reentrant && held.lease != me.lease;
    queue.holders().filter(own).map(|held| held.lease).collect()
}

/// Who holds a lock, as a refusal tells it.
pub fn holders(queue: &Queue, but: LeaseId, now: Time) -> Vec<Holder> {
    let holder = |held: &Entry| match held.state {
        State::Held { fence, since, .. } if held.lease != but => Some(Holder {
            owner: held.owner.clone(),
            mode: held.mode,
            fence,
            held_for: now.since(since),
            asked_by: held.asked_by.clone(),
        }),
        State::Held { .. } | State::Waiting { .. } => None,
    };
    // As many as the table tells: they travel in an answer that people read.
    queue.holders().filter_map(holder).take(8).collect()
}

/// What the index by owner says of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The request.
    pub lease: LeaseId,
    /// The locks that it takes, in the order in which it takes them.
    pub locks: Vec<LockName>,
    /// How many of them it holds.
    pub held: usize,
    /// Whether it stands in the line of the next one.
    pub waits: bool,
}

impl Listed {
    /// The lock in whose line it stands.
    pub fn waits_for(&self) -> Option<&LockName> {
        self.locks.get(self.held).filter(|_| self.waits)
    }
}

/// What the order or a limit has against a request, by all that its owner has besides; and the lock in question, where it is
/// one. As the table does it: see `table::index`.
pub fn objection(
    request: &Request,
    others: &[Listed],
    classes: &Classes,
    locks_per_owner: Option<u32>,
) -> Option<(Option<Want>, Cause)> {
    let others = || others.iter().filter(|other| other.lease != request.lease);
    let held = || others().flat_map(|other| other.locks.iter().take(other.held));
    for want in request.wants.iter().filter(|want| request.asks_for(&want.name)) {
        let above = held().find(|held| classes.violates(held, &want.name));
        if let Some(above) = above
            && !held().any(|held| *held == want.name)
        {
            return Some((Some(want.clone()), Cause::OrderViolation { held: above.clone() }));
        }
    }
    let most = locks_per_owner?;
    let mut names: Vec<&LockName> = others().flat_map(|other| &other.locks).collect();
    names.extend(request.wants.iter().map(|want| &want.name));
    names.sort_unstable();
    names.dedup();
    let too_many = names.len() > usize::try_from(most).unwrap_or(usize::MAX);
    too_many.then(|| (None, Cause::Limit { limit: Limit::LocksPerOwner, value: u64::from(most) }))
}

#[cfg(test)]
mod tests;
