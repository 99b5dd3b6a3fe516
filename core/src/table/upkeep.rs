//! What keeps a table in order while nobody asks for locks: heartbeats, renewals, sweeps, and second tries.

use super::index::drop_stale;
use super::{Census, Debt, Event, Scene, Table, Tally};
use crate::fence::Fence;
use crate::id::{LeaseId, OwnerId, SessionId};
use crate::lease::authority::abandon;
use crate::name::LockName;
use crate::queue::{Entry, Queue, State};
use crate::refusal::Loss;
use crate::request::{Claim, Lease, Request};
use crate::session::{DEAD_AFTER, Sessions};
use crate::store::{self, LockBucket, OwnerBucket, Save, Store, StoreError};
use crate::time::{Duration, Time};

impl Table {
    /// The worker's heartbeat, which renews all its leases: joins when it has no session yet, or has lost it. Gives
    /// back the session where it is a new one; all leases of an earlier one have ended or will.
    ///
    /// # Errors
    /// Those of the store.
    pub fn beat<S: Store>(&mut self, scene: &Scene<'_, S>, mailbox: u32) -> Result<Option<SessionId>, StoreError> {
        let (me, load, patience) = (self.me, self.load, DEAD_AFTER.min(self.shortest_ttl()));
        let (sessions, joined) = store::update(scene.store, 0, |sessions: &mut Sessions| {
            sessions.allow_ttl(scene.rules.limits.longest_ttl);
            if sessions.member(me).is_some_and(|member| member.beat + patience <= scene.now) {
                sessions.doubt_searches(if bug!(RevivalNotNoted) { Time::ZERO } else { scene.now });
            }
            let known = me != SessionId::NONE && sessions.beat(me, mailbox, load, scene.now);
            let joined = if known { None } else { Some(sessions.join(mailbox, scene.now)) };
            Ok(((sessions.clone(), joined), Save::Yes))
        })?;
        self.me = joined.unwrap_or(me);
        self.sessions = sessions;
        Ok(joined)
    }

    /// Asks to keep house (see [`Sessions::keep_house`]); a keeper also forgets sessions that are long dead.
    ///
    /// # Errors
    /// Those of the store.
    pub fn keep_house<S: Store>(&mut self, scene: &Scene<'_, S>, idle: bool) -> Result<bool, StoreError> {
        if self.me == SessionId::NONE {
            return Ok(false);
        }
        let me = self.me;
        store::update(scene.store, 0, |sessions: &mut Sessions| {
            let before = sessions.clone();
            let keeps = sessions.keep_house(me, idle, scene.now);
            if keeps {
                sessions.forget(scene.now);
            }
            Ok((keeps, Save::from(*sessions != before)))
        })
    }

    /// Renews a lease that lives by its own renewals, and finds out of any lease whether it still holds all it was
    /// granted: gives back the first lock that it lost, if it did. A lost lease must still be released.
    ///
    /// # Errors
    /// Those of the store.
    pub fn renew<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        lease: &Lease,
    ) -> Result<Option<(LockName, Loss)>, StoreError> {
        self.renew_claim(scene, &lease.claim, None)
    }

    /// As [`Table::renew`], and from now on with another TTL.
    ///
    /// # Errors
    /// Those of the store.
    pub fn renew_for<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        lease: &mut Lease,
        ttl: Duration,
    ) -> Result<Option<(LockName, Loss)>, StoreError> {
        let lost = self.renew_claim(scene, &lease.claim, Some(ttl))?;
        if lost.is_none() {
            lease.claim.grants.iter_mut().for_each(|grant| grant.ttl = ttl);
        }
        Ok(lost)
    }

    pub(crate) fn renew_claim<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        claim: &Claim,
        ttl: Option<Duration>,
    ) -> Result<Option<(LockName, Loss)>, StoreError> {
        self.fresh = false;
        self.refresh(scene)?;
        for grant in &claim.grants {
            let (bucket, id) = (scene.store.bucket(grant.name.as_str()), claim.request.lease);
            let held = store::update(scene.store, bucket, |locks: &mut LockBucket| {
                let entry = locks.queue(&grant.name).and_then(|queue| queue.entry(id));
                let lives = |entry: &Entry| self.is_valid(scene, entry) || (bug!(DeadLeaseRenewed) && entry.is_held());
                if !entry.is_some_and(lives) {
                    return Ok((false, Save::No));
                }
                let changed = locks.with_queue(&grant.name, |queue, _| {
                    queue.entry_mut(id).is_some_and(|entry| renew_entry(entry, self.me, ttl, scene.now))
                });
                Ok((true, Save::from(changed)))
            })?;
            if !held {
                let loss = if grant.until <= scene.now { Loss::HoldLimit } else { Loss::Expired };
                return Ok(Some((grant.name.clone(), loss)));
            }
        }
        Ok(None)
    }

    /// Whether a claim holds all that it was granted.
    pub(crate) fn still_holds<S: Store>(&mut self, scene: &Scene<'_, S>, claim: &Claim) -> Result<bool, StoreError> {
        self.fresh = false;
        self.refresh(scene)?;
        for grant in &claim.grants {
            let (locks, _) = scene.store.read::<LockBucket>(scene.store.bucket(grant.name.as_str()))?;
            let entry = locks.queue(&grant.name).and_then(|queue| queue.entry(claim.request.lease));
            if !entry.is_some_and(|entry| self.is_valid(scene, entry)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether an entry holds its lock now, by the sessions as last read.
    fn is_valid<S: Store>(&self, scene: &Scene<'_, S>, entry: &Entry) -> bool {
        entry.is_held() && entry.ends(&self.sessions) > scene.now
    }

    /// Breaks the glass: takes a lock away from whoever holds it, and raises its fence, so that a resource that hears
    /// of it refuses the former holders. Those who wait move up. Gives back the grants that it ended.
    ///
    /// # Errors
    /// Those of the store.
    pub fn break_glass<S: Store>(&mut self, scene: &Scene<'_, S>, lock: &LockName) -> Result<Vec<Entry>, StoreError> {
        self.fresh = false;
        let mut events = Vec::new();
        let (ended, wakes) =
            store::update(scene.store, scene.store.bucket(lock.as_str()), |locks: &mut LockBucket| {
                events.clear();
                locks.with_queue(lock, |queue, highest| {
                    self.reap(scene, queue, &mut events)?;
                    let ended = queue.evict();
                    events.extend(ended.iter().filter_map(|entry| match entry.state {
                        State::Held { since, .. } => {
                            Some(Event::Released { lock: lock.clone(), held_for: scene.now.since(since) })
                        }
                        State::Waiting { .. } => None,
                    }));
                    if !bug!(GlassKeepsFence) {
                        *highest = highest.next(Fence::floor(scene.unix_micros));
                    }
                    let wakes = self.tidy(scene, queue, highest, None, &mut events)?;
                    Ok(((ended, wakes), Save::Yes))
                })
            })?;
        self.effects.events.append(&mut events);
        self.effects.wakes.extend(wakes);
        Ok(ended)
    }

    /// Removes what has ended from one bucket, grants what can then be granted, and adds what is left to `census`. Whoever
    /// touches a lock does the same for that lock; this is for those that nobody touches.
    ///
    /// # Errors
    /// Those of the store.
    pub fn sweep<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        bucket: u32,
        census: &mut Census,
    ) -> Result<(), StoreError> {
        self.fresh = false;
        let mut events = Vec::new();
        let mut wakes = Vec::new();
        let (counted, tallies) = store::update(scene.store, bucket, |locks: &mut LockBucket| {
            (events, wakes) = (Vec::new(), Vec::new());
            let mut outcome = Ok(());
            locks.with_queues(|queue, highest| {
                let settled = if bug!(SweepGrantsNothing) {
                    self.reap(scene, queue, &mut events).map(|_| Vec::new())
                } else {
                    self.tidy(scene, queue, highest, None, &mut events)
                };
                match settled {
                    Ok(granted) => wakes.extend(granted),
                    Err(error) => outcome = Err(error),
                }
            });
            outcome?;
            Ok((tally(locks), Save::from(!events.is_empty())))
        })?;
        self.effects.events.append(&mut events);
        self.effects.wakes.append(&mut wakes);
        let owners = store::update(scene.store, bucket, |owners: &mut OwnerBucket| {
            let mut outcome = Ok(false);
            owners.with_each(|items| {
                if let Ok(changed) = outcome {
                    outcome = drop_stale(scene, &self.sessions, items).map(|dropped| dropped || changed);
                }
            });
            Ok((count(owners.holdings().len()), Save::from(outcome?)))
        })?;
        census.locks += counted.locks;
        census.detached += counted.detached;
        census.owners += owners;
        for (class, tally) in tallies {
            let sum = census.classes.entry(class).or_default();
            sum.held += tally.held;
            sum.waiting += tally.waiting;
        }
        Ok(())
    }

    /// Lets all workers know what a sweep that has been all round counted, as far as limits depend on it.
    ///
    /// # Errors
    /// Those of the store.
    pub fn publish_census<S: Store>(&mut self, scene: &Scene<'_, S>, census: &Census) -> Result<(), StoreError> {
        let detached = u32::try_from(census.detached).unwrap_or(u32::MAX);
        if detached == self.sessions.detached() {
            return Ok(());
        }
        store::update(scene.store, 0, |sessions: &mut Sessions| {
            sessions.count_detached(detached);
            Ok(((), Save::Yes))
        })?;
        self.sessions.count_detached(detached);
        Ok(())
    }

    /// Removes a lease from every lock that its request names, and from the index, whoever put it there and however far
    /// it had come. Says at how many locks it still held something.
    pub(crate) fn uproot<S: Store>(&mut self, scene: &Scene<'_, S>, request: &Request) -> usize {
        self.fresh = false;
        let lease = request.lease;
        let held = request.wants.iter().rev().filter(|want| self.give_back(scene, &want.name, lease)).count();
        self.delist(scene, &request.owner, lease);
        held
    }

    /// Whether something of a lease could not be removed when it should have been, and is still to be.
    pub(crate) fn owes(&self, lease: LeaseId) -> bool {
        self.debts.iter().any(|debt| match debt {
            Debt::Lock { lease: of, .. } | Debt::Owner { lease: of, .. } => *of == lease,
            Debt::End(_) => false,
        })
    }

    /// This worker moves a lease that waits on no more, and could not say so: it will.
    pub(crate) fn owe_end(&mut self, lease: LeaseId) {
        self.debts.push(Debt::End(lease));
    }

    /// Tries again to remove what could not be removed when it should have been. True when nothing is left to do.
    pub fn settle_debts<S: Store>(&mut self, scene: &Scene<'_, S>) -> bool {
        self.fresh = false;
        for debt in core::mem::take(&mut self.debts) {
            match debt {
                Debt::Lock { name, lease } => drop(self.give_back(scene, &name, lease)),
                Debt::Owner { owner, lease } => self.delist(scene, &owner, lease),
                Debt::End(lease) => {
                    if abandon(self, scene, lease, self.me).is_err() {
                        self.owe_end(lease);
                    }
                }
            }
        }
        self.debts.is_empty()
    }

    /// The owner that holds a lock under this fence, if one does.
    ///
    /// # Errors
    /// Those of the store.
    pub fn holder_of<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        lock: &LockName,
        fence: Fence,
    ) -> Result<Option<OwnerId>, StoreError> {
        self.fresh = false;
        self.refresh(scene)?;
        let (locks, _) = scene.store.read::<LockBucket>(scene.store.bucket(lock.as_str()))?;
        let holder = locks.queue(lock).and_then(|queue| {
            // Several, where it was re-entered: any that is still valid will do.
            let under = |entry: &&Entry| matches!(entry.state, State::Held { fence: held, .. } if held == fence);
            let lives = |entry: &&Entry| entry.ends(&self.sessions) > scene.now || bug!(StaleLeaseAccepted);
            queue.holders().filter(under).find(lives)
        });
        Ok(holder.map(|entry| entry.owner.clone()))
    }
}

/// Renews what lives by its own renewals, and sets the TTL where there is a new one. False if nothing changed.
fn renew_entry(entry: &mut Entry, me: SessionId, ttl: Option<Duration>, now: Time) -> bool {
    let mut changed = entry.confirm(me, now);
    let renewable = entry.detached || entry.session == SessionId::NONE;
    if let (true, State::Held { renewed, .. }) = (renewable, &mut entry.state) {
        *renewed = now;
        changed = true;
    }
    if let Some(ttl) = ttl.filter(|ttl| *ttl != entry.ttl) {
        entry.ttl = ttl;
        changed = true;
    }
    changed
}

/// The locks of a bucket, in all and by class.
fn tally(bucket: &LockBucket) -> (Counted, Vec<(String, Tally)>) {
    let of = |queue: &Queue| {
        let tally = Tally { held: count(queue.holders().count()), waiting: count(queue.waiters().count()) };
        (queue.name.class().to_owned(), tally)
    };
    let holders = bucket.queues().iter().flat_map(Queue::holders);
    let detached = count(holders.filter(|entry| entry.detached).count());
    let counted = Counted { locks: count(bucket.queues().len()), detached };
    (counted, bucket.queues().iter().map(of).collect())
}

/// What one bucket adds to a census, classes aside.
struct Counted {
    locks: u64,
    detached: u64,
}

fn count(things: usize) -> u64 {
    u64::try_from(things).unwrap_or(u64::MAX)
}
