//! The table of all locks: takes requests through their queues, over any [`Store`].
//!
//! What happens to one lock is decided by [`crate::queue`]; here is the order of the steps around it: the index by
//! owner is written before a lock is taken (so that it never misses anything), a wait is published before cycles are
//! searched, and whatever a refused request has is given back. No clock is read: a [`Scene`] says what time it is.

mod attempt;
mod deadlock;
mod index;
mod terms;
mod upkeep;
mod view;

use std::collections::BTreeMap;

use attempt::{Stance, Taken};
pub(crate) use index::items_of;
pub use terms::{Census, Effects, Event, Limits, Outcome, Rules, Scene, Tally, Wake};

use crate::fence::Fence;
use crate::id::{LeaseId, OwnerId, SessionId};
use crate::name::LockName;
use crate::queue::{Queue, State};
use crate::refusal::{Cause, Limit, Refusal};
use crate::request::{Claim, Grant, Lease, Pending, Request, Want};
use crate::session::{Load, Sessions};
use crate::store::{self, LockBucket, Save, Store, StoreError};
use crate::time::{Duration, Time};

/// What could not be removed because the store failed, and is tried again.
#[derive(Clone, Debug)]
enum Debt {
    Lock {
        name: LockName,
        lease: LeaseId,
    },
    Owner {
        owner: OwnerId,
        lease: LeaseId,
    },
    /// What a lease that waits has left, the record of it too.
    End(LeaseId),
}

/// One worker's view of a table.
#[derive(Clone, Debug)]
pub struct Table {
    me: SessionId,
    sessions: Sessions,
    fresh: bool,
    load: Load,
    /// How many requests under way have which TTL.
    ttls: BTreeMap<Duration, u32>,
    effects: Effects,
    debts: Vec<Debt>,
}

impl Default for Table {
    fn default() -> Self {
        Self::new()
    }
}

impl Table {
    /// The view of a worker that has no session: its leases live by [`Table::renew`].
    pub fn new() -> Self {
        Table {
            me: SessionId::NONE,
            sessions: Sessions::default(),
            fresh: false,
            load: Load::default(),
            ttls: BTreeMap::new(),
            effects: Effects::default(),
            debts: Vec::new(),
        }
    }

    /// The session that the worker's leases hang on.
    pub fn session(&self) -> SessionId {
        self.me
    }

    /// All sessions, as last read.
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// What the worker itself holds and waits for.
    pub fn load(&self) -> Load {
        self.load
    }

    /// The shortest TTL that the worker's heartbeat has to keep alive; [`Duration::MAX`] where it has nothing to.
    pub fn shortest_ttl(&self) -> Duration {
        self.ttls.keys().next().copied().unwrap_or(Duration::MAX)
    }

    /// What is to be done and counted since this was last called.
    pub fn take_effects(&mut self) -> Effects {
        core::mem::take(&mut self.effects)
    }

    /// Takes a request in: it is granted, refused, or waits.
    pub fn acquire<S: Store>(&mut self, scene: &Scene<'_, S>, request: Request) -> Outcome {
        self.fresh = false;
        let mut claim = Claim::new(request);
        if !claim.request.detached {
            *self.ttls.entry(claim.request.shortest_ttl()).or_default() += 1;
        }
        match self.grace_left(scene) {
            Ok(Duration::ZERO) => {}
            Ok(_) if bug!(GraceSkipped) => {}
            Ok(left) => return self.refuse(scene, claim, Cause::Grace { left }),
            Err(error) => return self.refuse(scene, claim, error.into()),
        }
        let others = self.sessions.load_of_others(self.me, scene.now);
        let locks = u64::from(self.load.locks) + u64::from(others.locks) + u64::from(self.sessions.detached());
        let wanted = u64::try_from(claim.request.wants.len()).unwrap_or(u64::MAX);
        if locks.saturating_add(wanted) > u64::from(scene.rules.limits.locks) {
            let cause = Cause::Limit { limit: Limit::Locks, value: u64::from(scene.rules.limits.locks) };
            return self.refuse(scene, claim, cause);
        }
        let classes = &scene.rules.classes;
        let ranked = claim.request.wants.iter().any(|want| classes.of(&want.name).rank.is_some());
        if ranked || scene.rules.limits.locks_per_owner.is_some() {
            match self.enlist(scene, &mut claim) {
                Ok(None) => {}
                Ok(Some((at, cause))) => return self.refuse_at(scene, claim, at, cause),
                Err(error) => return self.refuse(scene, claim, error.into()),
            }
        }
        self.advance(scene, claim, None)
    }

    /// For how long yet the table grants nothing, because leases that are older than it may come to be renewed.
    ///
    /// # Errors
    /// Those of the store.
    pub fn grace_left<S: Store>(&mut self, scene: &Scene<'_, S>) -> Result<Duration, StoreError> {
        let left = self.sessions.grace_left(scene.rules.grace, scene.now);
        if left.is_zero() {
            return Ok(left);
        }
        self.refresh(scene)?;
        Ok(self.sessions.grace_left(scene.rules.grace, scene.now))
    }

    /// Looks after a request that waits: it goes on waiting, or it is granted, or its time is up.
    pub fn poll<S: Store>(&mut self, scene: &Scene<'_, S>, pending: Pending) -> Outcome {
        self.fresh = false;
        self.load.waiters = self.load.waiters.saturating_sub(1);
        let Pending { claim, deadline, .. } = pending;
        // What it took before it had to wait may have ended meanwhile: by its hold limit, or while the worker was away.
        if !claim.grants.is_empty() && !bug!(EarlierLossIgnored) {
            match self.renew_claim(scene, &claim, None) {
                Ok(None) => {}
                Ok(Some((lock, loss))) => {
                    let at = claim.request.wants.iter().find(|want| want.name == lock).cloned();
                    return self.refuse_at(scene, claim, at, Cause::LeaseLost { loss });
                }
                Err(error) => return self.refuse(scene, claim, error.into()),
            }
        }
        let stance = if scene.now < deadline || bug!(DeadlineIgnored) { Stance::Wait } else { Stance::Last };
        self.advance(scene, claim, Some(stance))
    }

    /// When a request that waits must renew what it holds already: never, if its session's heartbeat does.
    fn renew_at<S: Store>(&self, scene: &Scene<'_, S>, claim: &Claim) -> Time {
        let renewable = self.me == SessionId::NONE || claim.request.detached;
        let ttl = claim.grants.iter().map(|grant| grant.ttl).min().filter(|_| renewable);
        ttl.map_or(Time::NEVER, |ttl| scene.now + ttl / 3)
    }

    /// When to poll a request that waits, by what is known of the sessions now: [`Pending::poll_at`], or later where only
    /// heartbeats were awaited and they have come since. Asks the store nothing, so that a crowd of waiters costs little
    /// while nothing happens to it. Who enters a queue ahead of others later on is not heeded: see to it that a waiter
    /// is polled now and then all the same.
    pub fn poll_at(&self, pending: &Pending) -> Time {
        let doubted = pending.claim.searched <= self.sessions.doubted() && !bug!(DoubtPutOff);
        if doubted { pending.poll_at() } else { pending.watch.ends(&self.sessions).max(pending.poll_at()) }
    }

    /// Ends a request that waits: whoever asked has gone.
    pub fn cancel<S: Store>(&mut self, scene: &Scene<'_, S>, pending: Pending) {
        self.fresh = false;
        self.load.waiters = self.load.waiters.saturating_sub(1);
        if !bug!(GrantToCancelled) {
            self.undo(scene, &pending.claim);
        }
    }

    /// Gives a lease back. Says which of its grants had ended before.
    pub fn release<S: Store>(&mut self, scene: &Scene<'_, S>, lease: Lease) -> Vec<Grant> {
        self.fresh = false;
        self.undo(scene, &lease.claim)
    }

    /// Takes lock after lock in order, until all are held or one has to be waited for or is refused.
    fn advance<S: Store>(&mut self, scene: &Scene<'_, S>, mut claim: Claim, resumed: Option<Stance>) -> Outcome {
        let mut resuming = resumed;
        while let Some(want) = claim.next().cloned() {
            let deadline = claim.request.arrived + want.wait;
            let waits = !want.wait.is_zero() && scene.now < deadline;
            let stance = resuming.take().unwrap_or(if waits { Stance::Wait } else { Stance::Try });
            let owner = claim.request.owner.clone();
            let taken = match self.take(scene, &claim, &want, stance) {
                Ok(taken) => taken,
                Err(error) => return self.refuse(scene, claim, error.into()),
            };
            match taken {
                Taken::Granted { fence, until, anew, over_waiters } => {
                    // It had been taken for dead and out of the queue: then out of the index as well, perhaps.
                    let dropped = resumed.is_some() && anew && claim.is_published();
                    let relisted = if dropped { self.publish(scene, &mut claim).map(drop) } else { Ok(()) };
                    claim.push(fence, until);
                    // What is detached is counted by the sweep: another worker may be the one to give it back.
                    self.load.locks += u32::from(!claim.request.detached);
                    if let Err(error) = relisted {
                        return self.refuse(scene, claim, error.into());
                    }
                    // An upgrade that goes ahead of waiters draws edges from them to its owner. If that owner waits
                    // elsewhere, in another request, they may close a cycle.
                    if over_waiters && !bug!(UpgradeEdgesNotSearched) {
                        if let Err(mut cause) = self.check_cycle(scene, &owner, None) {
                            if want.wait.is_zero() && matches!(cause, Cause::Deadlock { .. }) {
                                // Who does not wait is no part of a deadlock: those in the queue stand in its way.
                                let retry_after = Duration::from_millis(1);
                                cause = Cause::Held { holders: Vec::new(), retry_after };
                            }
                            let refused = self.refuse_at(scene, claim, None, cause);
                            self.doubt_searches(scene, &want.name, &owner);
                            return refused;
                        }
                        // Where the store fails, those who wait find out when they are polled.
                        let _ = self.tidy_lock(scene, &want.name, None);
                    }
                }
                Taken::Queued { mut watch, anew } => {
                    // Not before it stands there: what stands nowhere may be tidied out of the index, if its worker looks dead.
                    let mut others = Vec::new();
                    if anew {
                        others = match self.publish(scene, &mut claim) {
                            Ok(others) => others,
                            Err(error) => return self.refuse(scene, claim, error.into()),
                        };
                    }
                    let late = if bug!(MarkedAfterSearch) { core::mem::take(&mut others) } else { Vec::new() };
                    let several = match self.mark(scene, &claim, &others) {
                        Ok(several) => several,
                        Err(error) => return self.refuse(scene, claim, error.into()),
                    };
                    // Whoever draws an edge searches. What stood here has searched when it came; again only where that
                    // search may have taken somebody for dead who was not.
                    if anew || claim.searched <= self.sessions.doubted() {
                        claim.searched = scene.now;
                        // An upgrade stands before plain waiters, who may be waited for by another request of its owner; and who
                        // passed by another wait of its owner may have to be found from there.
                        let from_all = several && !bug!(MarkerSearchesItself);
                        let by = if from_all { None } else { Some(claim.request.lease) };
                        if let Err(cause) = self.check_cycle(scene, &owner, by) {
                            return self.refuse(scene, claim, cause);
                        }
                        if bug!(SearchBeforePublish) {
                            let _ = self.publish(scene, &mut claim);
                        }
                        let _ = self.mark(scene, &claim, &late);
                    }
                    self.load.waiters += 1;
                    watch.no_later_than(deadline.min(self.renew_at(scene, &claim)));
                    return Outcome::Waiting(Pending { claim, watch, looked: scene.now, deadline });
                }
                Taken::Busy { holders, retry_after } if want.wait.is_zero() => {
                    return self.refuse(scene, claim, Cause::Held { holders, retry_after });
                }
                Taken::Busy { holders, retry_after } => {
                    let waited = scene.now.since(claim.request.arrived);
                    return self.refuse(scene, claim, Cause::WaitTimeout { holders, waited, retry_after });
                }
                Taken::Full(limit, value) => return self.refuse(scene, claim, Cause::Limit { limit, value }),
            }
        }
        Outcome::Granted(Lease { claim })
    }

    /// Removes what has ended from a queue. Before anybody's lease is ended for lack of heartbeats, the heartbeats
    /// are read afresh. True if anything was removed.
    fn reap<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        queue: &mut Queue,
        events: &mut Vec<Event>,
    ) -> Result<bool, StoreError> {
        if !queue.has_ended(&self.sessions, scene.now) {
            return Ok(false);
        }
        self.refresh(scene)?;
        let ended = queue.reap(&self.sessions, scene.now);
        let changed = !ended.is_empty();
        for entry in ended {
            let lock = queue.name.clone();
            events.push(match entry.state {
                State::Held { since, .. } => Event::Expired { lock, held_for: scene.now.since(since), entry },
                State::Waiting { .. } => Event::Left { lock },
            });
        }
        Ok(changed)
    }

    /// Notes a waiter to be told something.
    pub(crate) fn wake(&mut self, wake: Wake) {
        self.effects.wakes.push(wake);
    }

    /// A request that waited here was ended elsewhere.
    pub(crate) fn forget_waiter(&mut self) {
        self.load.waiters = self.load.waiters.saturating_sub(1);
    }

    /// Whether a session has not been heard of for so long that nobody will move on what waits there.
    pub(crate) fn is_dead<S: Store>(&mut self, scene: &Scene<'_, S>, session: SessionId) -> Result<bool, StoreError> {
        let dead = |sessions: &Sessions| {
            session != SessionId::NONE && !sessions.member(session).is_some_and(|member| member.is_alive(scene.now))
        };
        if !dead(&self.sessions) {
            return Ok(false);
        }
        self.fresh = false;
        self.refresh(scene)?;
        Ok(dead(&self.sessions))
    }

    /// Reads the sessions, unless this operation has done so already.
    fn refresh<S: Store>(&mut self, scene: &Scene<'_, S>) -> Result<(), StoreError> {
        if !self.fresh && !bug!(StaleHeartbeatsTrusted) {
            (self.sessions, _) = scene.store.read::<Sessions>(0)?;
            self.fresh = true;
        }
        Ok(())
    }

    /// Removes what has ended and the entry of `leaving`, and grants what can be granted.
    fn tidy<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        queue: &mut Queue,
        highest: &mut Fence,
        leaving: Option<LeaseId>,
        events: &mut Vec<Event>,
    ) -> Result<Vec<Wake>, StoreError> {
        self.reap(scene, queue, events)?;
        if let Some(entry) = leaving.and_then(|lease| queue.remove(lease)) {
            let lock = queue.name.clone();
            events.push(match entry.state {
                State::Held { since, .. } => Event::Released { lock, held_for: scene.now.since(since) },
                State::Waiting { .. } => Event::Left { lock },
            });
            let shared = entry.is_held() && queue.holders().next().is_some();
            let stays_shut = bug!(NoGrantOnCancel) && !entry.is_held();
            if stays_shut || (bug!(NoGrantOnDowngrade) && shared) {
                return Ok(Vec::new());
            }
        }
        let permits = scene.rules.classes.of(&queue.name).permits;
        let granted = queue.settle(permits, scene.now, Fence::floor(scene.unix_micros), highest);
        events.extend(granted.iter().map(|_| Event::Granted { lock: queue.name.clone(), queued: true }));
        Ok(self.addressed(queue, granted))
    }

    /// As [`Table::tidy`], for one lock in the store. True if the entry of `leaving` held it.
    fn tidy_lock<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        name: &LockName,
        leaving: Option<LeaseId>,
    ) -> Result<bool, StoreError> {
        let mut events = Vec::new();
        let wakes = store::update(scene.store, scene.store.bucket(name.as_str()), |locks: &mut LockBucket| {
            events.clear();
            locks.with_queue(name, |queue, highest| {
                let wakes = self.tidy(scene, queue, highest, leaving, &mut events)?;
                Ok((wakes, Save::from(!events.is_empty())))
            })
        })?;
        if bug!(ReleaseTwice) {
            events.extend(events.iter().find(|event| matches!(event, Event::Released { .. })).cloned());
        }
        let held = events.iter().any(|event| matches!(event, Event::Released { .. }));
        self.effects.events.append(&mut events);
        self.effects.wakes.extend(wakes);
        Ok(held)
    }

    fn addressed(&self, queue: &Queue, leases: Vec<LeaseId>) -> Vec<Wake> {
        let most = if bug!(OneWokenOfTwo) { 1 } else { usize::MAX };
        let entries = leases.into_iter().filter_map(|lease| queue.entry(lease)).take(most);
        entries.map(|entry| Wake { session: entry.session, lease: entry.lease }).collect()
    }

    /// Has everybody who waits search anew, if the owner of an upgrade that was given up holds the lock under another request:
    /// that one may have re-entered it while the upgrade stood, and drawn the same edges without a search of its own.
    fn doubt_searches<S: Store>(&self, scene: &Scene<'_, S>, name: &LockName, owner: &OwnerId) {
        let holds = scene.store.read::<LockBucket>(scene.store.bucket(name.as_str())).is_ok_and(|(locks, _)| {
            locks.queue(name).is_some_and(|queue| queue.holders().any(|held| held.owner == *owner))
        });
        if holds {
            // Where the store fails the waits end by their deadlines.
            let _ = store::update(scene.store, 0, |sessions: &mut Sessions| {
                sessions.doubt_searches(scene.now);
                Ok(((), Save::Yes))
            });
        }
    }

    /// Removes one lease from one lock. False if it held nothing there any more.
    fn give_back<S: Store>(&mut self, scene: &Scene<'_, S>, name: &LockName, lease: LeaseId) -> bool {
        self.tidy_lock(scene, name, Some(lease)).unwrap_or_else(|_| {
            if !bug!(FailedReleaseForgotten) {
                self.debts.push(Debt::Lock { name: name.clone(), lease });
            }
            true
        })
    }

    /// Gives back whatever a request has: its grants, its place in a queue, its items in the index. Says which of its
    /// grants had ended before.
    fn undo<S: Store>(&mut self, scene: &Scene<'_, S>, claim: &Claim) -> Vec<Grant> {
        let lease = claim.request.lease;
        if !claim.request.detached {
            let ttl = claim.request.shortest_ttl();
            self.ttls.entry(ttl).and_modify(|requests| *requests = requests.saturating_sub(1));
            self.ttls.retain(|_, requests| *requests > 0);
        }
        if claim.is_published()
            && let Some(want) = claim.next()
        {
            self.give_back(scene, &want.name, lease);
        }
        let mut ended = Vec::new();
        let kept = usize::from(bug!(PartialGrantKept) && claim.grants.len() > 1);
        for grant in claim.grants.iter().skip(kept).rev() {
            self.load.locks = self.load.locks.saturating_sub(u32::from(!claim.request.detached));
            if !self.give_back(scene, &grant.name, lease) {
                ended.push(grant.clone());
            }
        }
        if claim.indexed && !bug!(IndexItemLeft) {
            self.delist(scene, &claim.request.owner, lease);
        }
        ended
    }

    fn refuse<S: Store>(&mut self, scene: &Scene<'_, S>, claim: Claim, cause: Cause) -> Outcome {
        let at = claim.next().cloned();
        self.refuse_at(scene, claim, at, cause)
    }

    /// Refuses a request because of one lock, which is the last one it took where none is given.
    fn refuse_at<S: Store>(&mut self, scene: &Scene<'_, S>, claim: Claim, at: Option<Want>, cause: Cause) -> Outcome {
        if !(bug!(GhostAfterRefusal) && matches!(cause, Cause::Deadlock { .. })) {
            self.undo(scene, &claim);
        }
        let last = claim.grants.len().saturating_sub(1);
        let Some(want) = at.or_else(|| claim.request.wants.get(last).cloned()) else {
            // A request for nothing has nothing that could be refused.
            return Outcome::Granted(Lease { claim });
        };
        Outcome::Refused(Refusal { lock: want.name, mode: want.mode, owner: claim.request.owner, cause })
    }
}

impl From<StoreError> for Cause {
    fn from(error: StoreError) -> Self {
        Cause::Backend { detail: error.to_string() }
    }
}
