//! One attempt at one lock: read its bucket, ask the queue, write the bucket back.

use super::{Event, Scene, Table};
use crate::fence::Fence;
use crate::id::LeaseId;
use crate::queue::{Entry, Queue, State};
use crate::refusal::{Holder, Limit};
use crate::request::{Claim, Want};
use crate::store::{self, LockBucket, Save, Store, StoreError};
use crate::time::{Duration, Time};

/// What became of one attempt at one lock.
pub(super) enum Taken {
    Granted { fence: Fence, until: Time, over_waiters: bool },
    Queued { poll_at: Time, anew: bool, before_waiters: bool },
    Busy { holders: Vec<Holder>, retry_after: Duration },
    Full(Limit, u64),
}

/// How one attempt at one lock is made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stance {
    /// Granted at once or not at all.
    Try,
    /// Stands in the queue if need be.
    Wait,
    /// Stood in the queue, and the time is up: a grant that came is taken, a new attempt is not made.
    Last,
}

impl Table {
    /// One attempt at one lock.
    pub(super) fn take<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        claim: &Claim,
        want: &Want,
        stance: Stance,
    ) -> Result<Taken, StoreError> {
        let lease = claim.request.lease;
        let bucket = scene.store.bucket(want.name.as_str());
        let limits = &scene.rules.limits;
        let others = self.sessions.load_of_others(self.me, scene.now);
        let all_waiters = u64::from(self.load.waiters) + u64::from(others.waiters);
        let permits = scene.rules.classes.of(&want.name).permits;
        let mut events = Vec::new();
        let mut wakes = Vec::new();
        let taken = store::update(scene.store, bucket, |locks: &mut LockBucket| {
            events.clear();
            locks.with_queue(&want.name, |queue, highest| {
                let mut changed = self.reap(scene, queue, &mut events)?;
                let stood = queue.entry(lease).is_some();
                if !stood && stance != Stance::Last {
                    queue.enqueue(self.entry(scene, claim, want));
                }
                let floor = Fence::floor(scene.unix_micros);
                let upgrades = !stood && queue.entry(lease).is_some_and(Entry::is_upgrade);
                let upgraded = upgrades && queue.settle_one(lease, permits, scene.now, floor, highest);
                wakes = if upgraded { vec![lease] } else { Vec::new() };
                // Those who wait may have to wait for it from now on. Until it is known whether that closes a cycle,
                // nobody else is granted anything on the strength of it.
                let over_waiters = upgraded && queue.waiters().next().is_some();
                if !over_waiters {
                    wakes.extend(queue.settle(permits, scene.now, floor, highest));
                }
                let entry = queue.entry(lease);
                let taken = match entry.map(|entry| &entry.state) {
                    Some(State::Held { fence, until, .. }) => {
                        Taken::Granted { fence: *fence, until: *until, over_waiters }
                    }
                    Some(State::Waiting { .. }) if stance == Stance::Wait => {
                        let waiters = u64::try_from(queue.waiters().count()).unwrap_or(u64::MAX);
                        if !stood && waiters > u64::from(limits.waiters_per_lock) {
                            Taken::Full(Limit::WaitersPerLock, u64::from(limits.waiters_per_lock))
                        } else if !stood && all_waiters >= u64::from(limits.waiters) {
                            Taken::Full(Limit::Waiters, u64::from(limits.waiters))
                        } else {
                            // Its own end too: a worker that was away for too long has to look whether it still
                            // stands there, and whether others took it for dead when they searched for cycles.
                            let first = queue.entries().iter().map(|entry| entry.ends(&self.sessions)).min();
                            let before_waiters = !stood && entry.is_some_and(Entry::is_upgrade);
                            Taken::Queued { poll_at: first.unwrap_or(Time::NEVER), anew: !stood, before_waiters }
                        }
                    }
                    Some(State::Waiting { .. }) | None => self.busy(scene, queue, lease),
                };
                let stays = matches!(taken, Taken::Granted { .. } | Taken::Queued { .. });
                if !stays && queue.remove(lease).is_some() {
                    // It may have stood before others that it alone kept from the lock.
                    wakes.extend(queue.settle(permits, scene.now, floor, highest));
                    if stood {
                        events.push(Event::Left { lock: want.name.clone() });
                    }
                }
                changed |= !wakes.is_empty() || (stays && !stood) || (!stays && stood);
                let granted_now = wakes.contains(&lease);
                wakes.retain(|woken| *woken != lease);
                if granted_now {
                    events.push(Event::Granted { lock: want.name.clone(), queued: stood });
                } else if stays && !stood {
                    events.push(Event::Queued { lock: want.name.clone() });
                }
                let told = wakes.iter().map(|_| Event::Granted { lock: want.name.clone(), queued: true });
                events.extend(told);
                let wakes = self.addressed(queue, core::mem::take(&mut wakes));
                Ok(((taken, wakes), Save::from(changed)))
            })
        });
        let (taken, wakes) = taken?;
        self.effects.events.append(&mut events);
        self.effects.wakes.extend(wakes);
        Ok(taken)
    }

    pub(super) fn entry<S: Store>(&self, scene: &Scene<'_, S>, claim: &Claim, want: &Want) -> Entry {
        let request = &claim.request;
        let deadline = request.arrived + want.wait;
        // An attempt that does not wait still has to outlive the moment in which it is made.
        let deadline = deadline.max(scene.now + Duration::from_micros(1));
        Entry {
            lease: request.lease,
            owner: request.owner.clone(),
            mode: want.mode,
            reentrant: request.reentrant,
            session: self.me,
            ttl: want.ttl,
            asked_by: request.asked_by.clone(),
            state: State::Waiting { since: scene.now, deadline, hold: want.hold, upgrade: false },
        }
    }

    /// Who holds the lock, as a refusal tells it.
    pub(super) fn busy<S: Store>(&self, scene: &Scene<'_, S>, queue: &Queue, lease: LeaseId) -> Taken {
        let others = || queue.holders().filter(|held| held.lease != lease);
        let holder = |held: &Entry| match held.state {
            State::Held { fence, since, .. } => Some(Holder {
                owner: held.owner.clone(),
                mode: held.mode,
                fence,
                held_for: scene.now.since(since),
                asked_by: held.asked_by.clone(),
            }),
            State::Waiting { .. } => None,
        };
        let first_end = others().map(|held| held.ends(&self.sessions)).min().unwrap_or(scene.now);
        let retry_after = first_end.since(scene.now).max(Duration::from_millis(1));
        // A refusal is read by people and travels in a header-sized answer: a few holders say enough.
        Taken::Busy { holders: others().filter_map(holder).take(8).collect(), retry_after }
    }
}
