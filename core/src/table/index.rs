//! The index by owner: what the order rule, the limits and the cycle search know an owner by.
//!
//! It is written before a lock is taken and cleaned after it is given back, so it may name too much and never too
//! little; whoever relies on an item looks at the lock. So nobody drops an item of a lease that may be on its way to
//! its lock, however empty-handed it is found there.

use super::{Debt, Scene, Table};
use crate::id::{LeaseId, OwnerId, SessionId};
use crate::name::LockName;
use crate::queue::State;
use crate::refusal::{Cause, Limit};
use crate::request::{Claim, Request, Want};
use crate::session::{DEAD_AFTER, Sessions};
use crate::store::{self, Item, LockBucket, OwnerBucket, Save, Store, StoreError};
use crate::time::Time;

impl Table {
    /// Enters a request into the index by owner, if neither the order nor a limit is against it.
    pub(super) fn enlist<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        claim: &mut Claim,
    ) -> Result<Option<(Option<Want>, Cause)>, StoreError> {
        let request = &claim.request;
        let me = self.me;
        let bucket = scene.store.bucket(request.owner.as_str());
        let refused = store::update(scene.store, bucket, |owners: &mut OwnerBucket| {
            owners.with_items(&request.owner, |items| {
                if let Some((want, held)) = self.out_of_order(scene, items, request)? {
                    return Ok((Some((Some(want), Cause::OrderViolation { held })), Save::No));
                }
                if let Some(most) = scene.rules.limits.locks_per_owner {
                    let most_items = usize::try_from(most).unwrap_or(usize::MAX);
                    if distinct(items, request) > most_items {
                        drop_stale(scene, &self.sessions, items)?;
                        if distinct(items, request) > most_items {
                            let cause = Cause::Limit { limit: Limit::LocksPerOwner, value: u64::from(most) };
                            return Ok((Some((None, cause)), Save::No));
                        }
                    }
                }
                items.extend(items_of(request, me, None, scene.now));
                Ok((None, Save::Yes))
            })
        })?;
        claim.indexed = refused.is_none();
        Ok(refused)
    }

    /// Lets the index by owner say for which lock the request waits. Gives back where other requests of its owner may be
    /// waiting.
    pub(super) fn publish<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        claim: &mut Claim,
    ) -> Result<Vec<(LockName, LeaseId)>, StoreError> {
        let waiting = Some(claim.grants.len());
        let shown = if bug!(SearchBeforePublish) && claim.published.is_none() { None } else { waiting };
        // Even if the store fails: then there may be something to undo.
        claim.indexed = true;
        claim.published = waiting;
        let (request, me) = (&claim.request, self.me);
        let bucket = scene.store.bucket(request.owner.as_str());
        store::update(scene.store, bucket, |owners: &mut OwnerBucket| {
            owners.with_items(&request.owner, |items| {
                items.retain(|item| item.lease != request.lease);
                let others =
                    items.iter().filter(|item| item.waiting).map(|item| (item.lock.clone(), item.lease)).collect();
                items.extend(items_of(request, me, shown, scene.now));
                Ok((others, Save::Yes))
            })
        })
    }

    /// Marks all waits of an owner that waits in more than one place, so that a search that comes to one of them looks up
    /// the others in the index: the wait of this request, and those of its `others`. True if there are any.
    ///
    /// Of two waits the one that was published later finds the other in the index, and marks both before it searches. Who
    /// came by before that saw one wait where there were two; so who marks searches from all of them.
    pub(super) fn mark<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        claim: &Claim,
        others: &[(LockName, LeaseId)],
    ) -> Result<bool, StoreError> {
        let mut several = false;
        for (lock, lease) in others {
            several |= mark_wait(scene, lock, *lease, !bug!(FirstWaitUnmarked))?;
        }
        if let Some(want) = claim.next().filter(|_| several) {
            mark_wait(scene, &want.name, claim.request.lease, !bug!(SecondWaitUnmarked))?;
        }
        Ok(several)
    }

    /// The first lock of the request that sorts at or below one that the owner holds, with that one. Locks that the
    /// owner holds already are no matter of order: they are re-entered or upgraded. Nor are the intents that a
    /// hierarchy implies: nobody chooses when to ask for those.
    fn out_of_order<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        items: &[Item],
        request: &Request,
    ) -> Result<Option<(Want, LockName)>, StoreError> {
        let classes = &scene.rules.classes;
        for want in request.wants.iter().filter(|want| request.asks_for(&want.name)) {
            for item in items.iter().filter(|item| classes.violates(&item.lock, &want.name)) {
                if !self.has(scene, item)? && !bug!(OrderTrustsIndex) {
                    continue;
                }
                let mut again = items.iter().filter(|other| other.lock == want.name && !bug!(OrderIgnoresReentry));
                if !again.try_fold(false, |found, other| Ok(found || self.has(scene, other)?))? {
                    return Ok(Some((want.clone(), item.lock.clone())));
                }
            }
        }
        Ok(None)
    }

    /// Whether the lease holds the lock now.
    fn has<S: Store>(&mut self, scene: &Scene<'_, S>, item: &Item) -> Result<bool, StoreError> {
        let mut lives = self.lives(scene, item)?;
        if lives == Some(false) {
            // By old heartbeats. With new ones the lock is read anew: what they revive may be gone from it by now.
            self.refresh(scene)?;
            lives = self.lives(scene, item)?;
        }
        Ok(lives == Some(true))
    }

    /// Whether the lease's grant lives, by the heartbeats as last read; none where it has no grant.
    fn lives<S: Store>(&self, scene: &Scene<'_, S>, item: &Item) -> Result<Option<bool>, StoreError> {
        let (locks, _) = scene.store.read::<LockBucket>(scene.store.bucket(item.lock.as_str()))?;
        let entry = locks.queue(&item.lock).and_then(|queue| queue.entry(item.lease)).filter(|entry| entry.is_held());
        Ok(entry.map(|entry| entry.ends(&self.sessions) > scene.now))
    }

    /// Takes a lease out of the index by owner.
    pub(super) fn delist<S: Store>(&mut self, scene: &Scene<'_, S>, owner: &OwnerId, lease: LeaseId) {
        let bucket = scene.store.bucket(owner.as_str());
        let delisted = store::update(scene.store, bucket, |owners: &mut OwnerBucket| {
            owners.with_items(owner, |items| {
                let before = items.len();
                items.retain(|item| item.lease != lease);
                Ok(((), Save::from(items.len() < before)))
            })
        });
        if delisted.is_err() {
            self.debts.push(Debt::Owner { owner: owner.clone(), lease });
        }
    }
}

/// Lets a wait say, if that is to be marked, that its owner waits elsewhere too. False if the lease does not wait there.
fn mark_wait<S: Store>(scene: &Scene<'_, S>, lock: &LockName, lease: LeaseId, mark: bool) -> Result<bool, StoreError> {
    store::update(scene.store, scene.store.bucket(lock.as_str()), |locks: &mut LockBucket| {
        Ok(locks.with_queue(lock, |queue, _| match queue.entry_mut(lease).map(|entry| &mut entry.state) {
            Some(State::Waiting { elsewhere, .. }) => {
                let changed = mark && !*elsewhere;
                *elsewhere |= mark;
                (true, Save::from(changed))
            }
            Some(State::Held { .. }) | None => (false, Save::No),
        }))
    })
}

/// The index items of a request; `waiting` is the want that it waits for.
pub(crate) fn items_of(
    request: &Request,
    session: SessionId,
    waiting: Option<usize>,
    since: Time,
) -> impl Iterator<Item = Item> + '_ {
    request.wants.iter().enumerate().map(move |(at, want)| Item {
        lock: want.name.clone(),
        lease: request.lease,
        session,
        waiting: waiting == Some(at),
        since,
    })
}

/// How many locks the owner would have with this request.
fn distinct(items: &[Item], request: &Request) -> usize {
    let mut names: Vec<&LockName> = items.iter().map(|item| &item.lock).collect();
    names.extend(request.wants.iter().map(|want| &want.name));
    names.sort_unstable();
    names.dedup();
    names.len()
}

/// Whether the lease has an entry at the lock, held or waiting.
fn stands<S: Store>(scene: &Scene<'_, S>, item: &Item) -> Result<bool, StoreError> {
    let (locks, _) = scene.store.read::<LockBucket>(scene.store.bucket(item.lock.as_str()))?;
    Ok(locks.queue(&item.lock).is_some_and(|queue| queue.entry(item.lease).is_some()))
}

/// Drops the items of leases that no lock knows of. True if there were any. Those of workers that beat stay, and those
/// written just now: they are written before the lock is taken. A lease that stands at one lock keeps all its items,
/// since it may go on to the others.
pub(super) fn drop_stale<S: Store>(
    scene: &Scene<'_, S>,
    sessions: &Sessions,
    items: &mut Vec<Item>,
) -> Result<bool, StoreError> {
    let is_suspect = |item: &&Item| {
        let beats = sessions.member(item.session).is_some_and(|member| member.is_alive(scene.now));
        !beats && item.since + DEAD_AFTER <= scene.now
    };
    let mut suspects: Vec<LeaseId> = items.iter().filter(is_suspect).map(|item| item.lease).collect();
    suspects.dedup();
    let before = items.len();
    for lease in suspects {
        let mut own = items.iter().filter(|item| item.lease == lease);
        if !own.try_fold(false, |found, item| Ok(found || stands(scene, item)?))? {
            items.retain(|item| item.lease != lease);
        }
    }
    Ok(items.len() < before)
}
