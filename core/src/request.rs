//! One request for one or more locks, from its arrival to its end.
//!
//! A request is a [`Request`] until it is asked for, a [`Pending`] while it waits, a [`Lease`] while it holds. Each
//! is consumed by what ends it, so that nothing ends twice. What moves them on is [`crate::table`].

use serde::{Deserialize, Serialize};

use crate::class::Classes;
use crate::fence::Fence;
use crate::id::{LeaseId, OwnerId, SessionId};
use crate::mode::Mode;
use crate::name::LockName;
use crate::queue::Entry;
use crate::session::Sessions;
use crate::time::{Duration, Time};

/// One lock that a request asks for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Want {
    /// Which lock.
    pub name: LockName,
    /// In which mode.
    pub mode: Mode,
    /// The longest time to wait for it, from the arrival of the request; zero: not at all.
    pub wait: Duration,
    /// How long a grant outlives its last renewal.
    pub ttl: Duration,
    /// How long a grant may be renewed.
    pub hold: Duration,
}

/// A request as it comes in.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Request {
    pub(crate) lease: LeaseId,
    pub(crate) owner: OwnerId,
    pub(crate) reentrant: bool,
    pub(crate) detached: bool,
    pub(crate) asked_by: String,
    pub(crate) arrived: Time,
    pub(crate) wants: Vec<Want>,
    pub(crate) asked: Vec<LockName>,
}

impl Request {
    /// A request of `owner` for `wants`, which comes in at `arrived` and will be known as `lease`.
    ///
    /// The locks are put into the global order, in which they are then taken, whatever order they are written in.
    /// In hierarchical classes the intents on the ancestors are added. A lock that is wanted more than once is taken
    /// once, in the mode that gives all of it, with the shortest wait and the longest TTL and hold.
    pub fn new(lease: LeaseId, owner: OwnerId, arrived: Time, wants: Vec<Want>, classes: &Classes) -> Self {
        let asked = wants.iter().map(|want| want.name.clone()).collect();
        let mut all = Vec::with_capacity(wants.len());
        for want in wants {
            let class = classes.of(&want.name);
            if class.hierarchy && !bug!(IntentForgotten) {
                let intent = want.mode.intent();
                all.extend(want.name.ancestors().map(|name| Want { name, mode: intent, ..want.clone() }));
            }
            // Where permits are counted there are no modes: one spelling keeps all entries of a lock alike.
            let mode = if class.permits > 1 { Mode::Exclusive } else { want.mode };
            all.push(Want { mode, ..want });
        }
        if !bug!(WrittenOrder) {
            all.sort_by(|a, b| classes.order(&a.name, &b.name));
        }
        all.dedup_by(|again, first| {
            let same = again.name == first.name;
            if same {
                first.mode = first.mode.join(again.mode);
                first.wait = first.wait.min(again.wait);
                first.ttl = first.ttl.max(again.ttl);
                first.hold = first.hold.max(again.hold);
            }
            same
        });
        Request { lease, owner, reentrant: true, detached: false, asked_by: String::new(), arrived, wants: all, asked }
    }

    /// Whether the owner's other leases let this one pass (the default), or it waits for them as for anyone's.
    #[must_use]
    pub fn reentrant(mut self, reentrant: bool) -> Self {
        self.reentrant = reentrant;
        self
    }

    /// Makes its grants live by renewals of their own instead of the worker's heartbeat, so that the lease is nobody's in
    /// particular: any worker may renew it or give it back. While it waits it hangs on the worker that it waits at.
    #[must_use]
    pub fn detached(mut self) -> Self {
        self.detached = true;
        self
    }

    /// Says who asks, for people to read: a route, a workload.
    #[must_use]
    pub fn asked_by(mut self, asked_by: impl Into<String>) -> Self {
        self.asked_by = asked_by.into();
        self
    }

    /// The shortest TTL among its locks.
    pub(crate) fn shortest_ttl(&self) -> Duration {
        self.wants.iter().map(|want| want.ttl).min().unwrap_or(Duration::MAX)
    }

    /// The identity of its lease.
    pub fn lease(&self) -> LeaseId {
        self.lease
    }

    /// Goes on under another identity.
    #[must_use]
    pub fn renamed(self, lease: LeaseId) -> Self {
        Request { lease, ..self }
    }

    /// For whom.
    pub fn owner(&self) -> &OwnerId {
        &self.owner
    }

    /// When it came in.
    pub fn arrived(&self) -> Time {
        self.arrived
    }

    /// Whether the owner's other leases let it pass.
    pub fn is_reentrant(&self) -> bool {
        self.reentrant
    }

    /// Who asks.
    pub fn asker(&self) -> &str {
        &self.asked_by
    }

    /// Whether the lock was asked for by name, and not only implied by one below it.
    pub fn asks_for(&self, name: &LockName) -> bool {
        self.asked.contains(name)
    }

    /// The locks that it takes, in the order in which it takes them.
    pub fn wants(&self) -> &[Want] {
        &self.wants
    }
}

/// One lock that a lease holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Grant {
    /// The lock.
    pub name: LockName,
    /// The mode that this lease holds it in.
    pub mode: Mode,
    /// The fence of the grant.
    pub fence: Fence,
    /// When the grant ends, renewed or not.
    pub until: Time,
    /// The TTL of the grant.
    pub ttl: Duration,
    /// Whether it was asked for by name, or is the intent that another lock of the request implies.
    pub asked: bool,
}

/// A request under way: what it wants and what it has.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Claim {
    pub(crate) request: Request,
    pub(crate) grants: Vec<Grant>,
    /// Whether the index by owner lists it.
    pub(crate) indexed: bool,
    /// The want for which the index by owner says that it waits.
    pub(crate) published: Option<usize>,
    /// When cycles through it were last searched.
    pub(crate) searched: Time,
}

impl Claim {
    pub(crate) fn new(request: Request) -> Self {
        let grants = Vec::with_capacity(request.wants.len());
        Claim { request, grants, indexed: false, published: None, searched: Time::ZERO }
    }

    /// The lock to take next: grants are made in the order of the wants.
    pub(crate) fn next(&self) -> Option<&Want> {
        self.request.wants.get(self.grants.len())
    }

    /// When the first of its grants ends, renewed or not.
    pub(crate) fn until(&self) -> Time {
        self.grants.iter().map(|grant| grant.until).min().unwrap_or(Time::NEVER)
    }

    /// The shortest TTL among its grants.
    pub(crate) fn ttl(&self) -> Duration {
        self.grants.iter().map(|grant| grant.ttl).min().unwrap_or(Duration::MAX)
    }

    /// Whether a wait for the next lock can be seen by those who search for cycles.
    pub(crate) fn is_published(&self) -> bool {
        self.published == Some(self.grants.len())
    }

    pub(crate) fn push(&mut self, fence: Fence, until: Time) {
        if let Some(Want { name, mode, ttl, .. }) = self.next().cloned() {
            let asked = self.request.asks_for(&name);
            self.grants.push(Grant { name, mode, fence, until, ttl, asked });
        }
    }
}

/// A request that stands in the queue of one lock, and holds those before it.
#[derive(Debug)]
#[must_use = "a request that waits must be polled or cancelled, or it stands in its queue until its deadline"]
pub struct Pending {
    pub(crate) claim: Claim,
    pub(crate) watch: Watch,
    pub(crate) looked: Time,
    pub(crate) deadline: Time,
}

/// What a waiter watches: the ends of those in its queue, its own and its deadline.
#[derive(Debug)]
pub(crate) struct Watch {
    /// The first of these ends, if nothing is heard of anybody any more.
    first: Time,
    /// The first that no heartbeat puts off.
    fixed: Time,
    /// The sessions that others hang on, and how long after its last heartbeat the first of each ends.
    beats: Vec<(SessionId, Duration)>,
}

impl Default for Watch {
    fn default() -> Self {
        Self::until(Time::NEVER)
    }
}

impl Watch {
    /// Watches nothing but the clock.
    pub(crate) fn until(end: Time) -> Self {
        Watch { first: end, fixed: end, beats: Vec::new() }
    }

    /// Watches until that moment and no longer.
    pub(crate) fn no_later_than(&mut self, end: Time) {
        self.first = self.first.min(end);
        self.fixed = self.fixed.min(end);
    }

    /// Watches an entry of the queue.
    pub(crate) fn add(&mut self, entry: &Entry, sessions: &Sessions) {
        let end = entry.ends(sessions);
        let Some((session, patience)) = entry.hangs_on() else { return self.no_later_than(end) };
        self.first = self.first.min(end);
        self.fixed = self.fixed.min(entry.limit());
        match self.beats.iter_mut().find(|(known, _)| *known == session) {
            Some((_, least)) => *least = patience.min(*least),
            None => self.beats.push((session, patience)),
        }
    }

    /// The first end by these heartbeats: that of a session which is not among them has come.
    pub(crate) fn ends(&self, sessions: &Sessions) -> Time {
        let end = |(id, patience): &(SessionId, Duration)| {
            sessions.member(*id).map_or(Time::ZERO, |member| member.beat + *patience)
        };
        self.beats.iter().map(end).fold(self.fixed, Time::min)
    }
}

impl Pending {
    /// Its lease-to-be.
    pub fn lease(&self) -> LeaseId {
        self.claim.request.lease
    }

    /// Who waits.
    pub fn owner(&self) -> &OwnerId {
        &self.claim.request.owner
    }

    /// The lock that it waits for, and the mode.
    pub fn waits_for(&self) -> Option<(&LockName, Mode)> {
        self.claim.next().map(|want| (&want.name, want.mode))
    }

    /// When to poll it at the latest, even if nothing wakes it: its deadline, or the moment at which the first lease
    /// in its way would end unrenewed.
    pub fn poll_at(&self) -> Time {
        self.watch.first
    }

    /// When it was polled last, or came to stand in the queue.
    pub fn looked_at(&self) -> Time {
        self.looked
    }

    /// When its wait ends.
    pub fn deadline(&self) -> Time {
        self.deadline
    }

    /// When the request came in.
    pub fn arrived(&self) -> Time {
        self.claim.request.arrived
    }
}

/// A request that holds all its locks.
#[derive(Debug)]
#[must_use = "a lease must be released, or it blocks others for as long as its session lives"]
pub struct Lease {
    pub(crate) claim: Claim,
}

impl Lease {
    /// Its identity.
    pub fn id(&self) -> LeaseId {
        self.claim.request.lease
    }

    /// Who holds.
    pub fn owner(&self) -> &OwnerId {
        &self.claim.request.owner
    }

    /// What it holds, in the order in which it was taken.
    pub fn grants(&self) -> &[Grant] {
        &self.claim.grants
    }

    /// When the first of its locks ends, renewed or not.
    pub fn until(&self) -> Time {
        self.claim.until()
    }

    /// The shortest TTL among its locks.
    pub fn ttl(&self) -> Duration {
        self.claim.ttl()
    }
}
