//! One attempt at one lock: read its bucket, ask the queue, write the bucket back.

use super::{Event, Scene, Table, Wake};
use crate::fence::Fence;
use crate::id::LeaseId;
use crate::queue::{Entry, Queue, State};
use crate::refusal::{Holder, Limit};
use crate::request::{Claim, Want, Watch};
use crate::store::{self, LockBucket, Save, Store, StoreError};
use crate::time::{Duration, Time};

/// What became of one attempt at one lock.
pub(super) enum Taken {
    Granted { fence: Fence, until: Time, anew: bool, over_waiters: bool },
    Queued { watch: Watch, anew: bool },
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

/// An attempt, and what it is made with.
struct Attempt<'a, 's, S> {
    scene: &'a Scene<'s, S>,
    claim: &'a Claim,
    want: &'a Want,
    stance: Stance,
    floor: Fence,
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
        let bucket = scene.store.bucket(want.name.as_str());
        let mut events = Vec::new();
        let taken = store::update(scene.store, bucket, |locks: &mut LockBucket| {
            events.clear();
            locks.with_queue(&want.name, |queue, highest| {
                let attempt = Attempt { scene, claim, want, stance, floor: Fence::floor(scene.unix_micros) };
                self.attempt(&attempt, queue, highest, &mut events)
            })
        });
        let (taken, wakes) = taken?;
        self.effects.events.append(&mut events);
        self.effects.wakes.extend(wakes);
        Ok(taken)
    }

    /// What an attempt makes of a queue, and whether it changed anything.
    fn attempt<S: Store>(
        &mut self,
        attempt: &Attempt<'_, '_, S>,
        queue: &mut Queue,
        highest: &mut Fence,
        events: &mut Vec<Event>,
    ) -> Result<((Taken, Vec<Wake>), Save), StoreError> {
        let Attempt { scene, claim, want, stance, floor } = *attempt;
        let (lease, now) = (claim.request.lease, scene.now);
        let permits = scene.rules.classes.of(&want.name).permits;
        let reaped = self.reap(scene, queue, events)?;
        let stood = queue.entry(lease).is_some();
        let confirmed = queue.entry_mut(lease).is_some_and(|entry| entry.confirm(self.me, now));
        if !stood && stance != Stance::Last {
            queue.enqueue(self.entry(scene, claim, want));
        }
        let upgrades = !stood && queue.entry(lease).is_some_and(Entry::is_upgrade);
        let upgraded = upgrades && queue.settle_one(lease, permits, now, floor, highest);
        let mut granted = if upgraded { vec![lease] } else { Vec::new() };
        // Those who wait may have to wait for it from now on. Until it is known whether that closes a cycle, nobody else is
        // granted anything on the strength of it.
        let over_waiters = upgraded && queue.waiters().next().is_some();
        if !over_waiters {
            granted.extend(queue.settle(permits, now, floor, highest));
        }
        let taken = match queue.entry(lease).map(|entry| &entry.state) {
            Some(State::Held { fence, until, .. }) => {
                Taken::Granted { fence: *fence, until: *until, anew: !stood, over_waiters }
            }
            Some(State::Waiting { .. }) if stance == Stance::Wait => self.stand(scene, queue, stood),
            Some(State::Waiting { .. }) | None => self.busy(scene, queue, lease),
        };
        let stays = matches!(taken, Taken::Granted { .. } | Taken::Queued { .. });
        if !stays && queue.remove(lease).is_some() {
            // It may have stood before others that it alone kept from the lock.
            granted.extend(queue.settle(permits, now, floor, highest));
            if stood {
                events.push(Event::Left { lock: want.name.clone() });
            }
        }
        let changed = reaped || confirmed || !granted.is_empty() || stays != stood;
        if granted.contains(&lease) {
            events.push(Event::Granted { lock: want.name.clone(), queued: stood });
        } else if stays && !stood {
            events.push(Event::Queued { lock: want.name.clone() });
        }
        granted.retain(|woken| *woken != lease);
        events.extend(granted.iter().map(|_| Event::Granted { lock: want.name.clone(), queued: true }));
        Ok(((taken, self.addressed(queue, granted)), Save::from(changed)))
    }

    /// A waiter that it is not the turn of: it stands in the queue, if that is not full.
    fn stand<S: Store>(&self, scene: &Scene<'_, S>, queue: &Queue, stood: bool) -> Taken {
        let limits = &scene.rules.limits;
        let full = |limit, value: u32| Taken::Full(limit, u64::from(value));
        if !stood {
            let of_others = self.sessions.load_of_others(self.me, scene.now).waiters;
            let most = limits.waiters_per_lock + u32::from(bug!(WaitersOffByOne));
            if queue.waiters().count() > usize::try_from(most).unwrap_or(usize::MAX) {
                return full(Limit::WaitersPerLock, limits.waiters_per_lock);
            }
            if self.load.waiters.saturating_add(of_others) >= limits.waiters {
                return full(Limit::Waiters, limits.waiters);
            }
        }
        // Its own end too: a worker that was away for too long has to look whether it still stands there.
        let mut watch = Watch::default();
        for entry in queue.entries().iter().filter(|_| !bug!(NoTimerForLeaseEnd)) {
            watch.add(entry, &self.sessions);
        }
        Taken::Queued { watch, anew: !stood }
    }

    pub(crate) fn entry<S: Store>(&self, scene: &Scene<'_, S>, claim: &Claim, want: &Want) -> Entry {
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
            detached: request.detached,
            ttl: want.ttl,
            asked_by: request.asked_by.clone(),
            state: State::Waiting { since: scene.now, deadline, hold: want.hold, upgrade: false, elsewhere: false },
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
