//! What a table is given, and what it gives back: rules and the scene; outcomes, effects, a census.

use std::collections::BTreeMap;

use crate::class::Classes;
use crate::id::{LeaseId, SessionId};
use crate::name::LockName;
use crate::queue::Entry;
use crate::refusal::Refusal;
use crate::request::{Lease, Pending};
use crate::time::{Duration, Time};

/// Bounds on what one table takes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Locks that one owner may hold and wait for, over all its requests. None: not counted.
    pub locks_per_owner: Option<u32>,
    /// Requests that may wait for one lock.
    pub waiters_per_lock: u32,
    /// Locks that may be held in all. What other sessions hold is known as of their last heartbeat, so this may be
    /// overshot by what they took since.
    pub locks: u32,
    /// Requests that may wait in all, known as well as `locks`.
    pub waiters: u32,
    /// The longest TTL that a lease may have: a session that has been silent for longer is forgotten.
    pub longest_ttl: Duration,
}

/// The rules of a policy that the table enforces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// What is known of each class of locks.
    pub classes: Classes,
    /// Bounds.
    pub limits: Limits,
    /// For how long a new table grants nothing. Zero where no lease outlives the table; else the longest TTL that a lease of
    /// an earlier table may have, so that whoever holds one comes to renew it first.
    pub grace: Duration,
}

/// Where and when something happens.
pub struct Scene<'a, S> {
    /// Where the table is.
    pub store: &'a S,
    /// The rules that the request in question comes under.
    pub rules: &'a Rules,
    /// The moment, on the clock that all who share the table share.
    pub now: Time,
    /// The wall clock, in microseconds since 1970: the floor of new fences.
    pub unix_micros: u64,
}

/// Something that happened to the table, to be counted or told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request stands in a queue.
    Queued {
        /// Of this lock.
        lock: LockName,
    },
    /// A waiter left a queue without a grant.
    Left {
        /// Of this lock.
        lock: LockName,
    },
    /// A lock was granted.
    Granted {
        /// Which.
        lock: LockName,
        /// Whether to one that had stood in the queue.
        queued: bool,
    },
    /// A lock was given back.
    Released {
        /// Which.
        lock: LockName,
        /// How long it was held.
        held_for: Duration,
    },
    /// A grant ended by its TTL or hold limit before it was given back.
    Expired {
        /// Of this lock.
        lock: LockName,
        /// The entry that it was.
        entry: Entry,
        /// How long it was held.
        held_for: Duration,
    },
}

/// A waiter that was granted its lock and must be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wake {
    /// Where it lives.
    pub session: SessionId,
    /// Who it is.
    pub lease: LeaseId,
}

/// What the caller has to do and to count after an operation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Whom to wake.
    pub wakes: Vec<Wake>,
    /// What happened, in order.
    pub events: Vec<Event>,
}

/// What became of a request.
#[derive(Debug)]
pub enum Outcome {
    /// It holds all its locks.
    Granted(Lease),
    /// It stands in a queue.
    Waiting(Pending),
    /// It holds nothing and stands nowhere.
    Refused(Refusal),
}

/// What sweeps found in the buckets they went through, after removing what had ended.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Census {
    /// Locks that are held or waited for.
    pub locks: u64,
    /// Grants that live by their own renewals.
    pub detached: u64,
    /// Owners in the index.
    pub owners: u64,
    /// How often locks of a class are held and waited for.
    pub classes: BTreeMap<String, Tally>,
}

/// How often the locks of one class are held and waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Tally {
    /// Grants.
    pub held: u64,
    /// Waiters.
    pub waiting: u64,
}
