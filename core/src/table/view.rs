//! The table as people look at it. Nothing is changed by looking.

use super::{Scene, Table};
use crate::fence::Fence;
use crate::id::OwnerId;
use crate::name::LockName;
use crate::queue::{Queue, State};
use crate::refusal::Edge;
use crate::store::{LockBucket, Store, StoreError};

impl Table {
    /// The locks of a bucket as they stand: without what has ended, whether or not anybody has removed it yet.
    ///
    /// # Errors
    /// Those of the store.
    pub fn look<S: Store>(&mut self, scene: &Scene<'_, S>, bucket: u32) -> Result<Vec<Queue>, StoreError> {
        self.fresh = false;
        self.refresh(scene)?;
        let (locks, _) = scene.store.read::<LockBucket>(bucket)?;
        let mut queues = locks.queues().to_vec();
        queues.retain_mut(|queue| {
            queue.reap(&self.sessions, scene.now);
            !queue.is_empty()
        });
        queues.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(queues)
    }

    /// The lowest fence under which an owner holds a lock now; none if it does not. `is`: whether that is the owner, who may be
    /// known by several names.
    ///
    /// # Errors
    /// Those of the store.
    pub fn held_by<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        lock: &LockName,
        is: impl Fn(&OwnerId) -> bool,
    ) -> Result<Option<Fence>, StoreError> {
        self.fresh = false;
        self.refresh(scene)?;
        let (locks, _) = scene.store.read::<LockBucket>(scene.store.bucket(lock.as_str()))?;
        let Some(queue) = locks.queue(lock) else { return Ok(None) };
        let live = queue.holders().filter(|entry| entry.ends(&self.sessions) > scene.now || bug!(EndedHolderPasses));
        let own = live.filter(|entry| is(&entry.owner)).filter_map(|entry| match entry.state {
            State::Held { fence, .. } => Some(fence),
            State::Waiting { .. } => None,
        });
        Ok(own.min())
    }

    /// The wait-for edges of one lock.
    pub fn edges<S: Store>(&self, scene: &Scene<'_, S>, queue: &Queue) -> Vec<Edge> {
        let permits = scene.rules.classes.of(&queue.name).permits;
        let of = |waiter: &crate::queue::Entry| {
            let blockers: Vec<Edge> = queue
                .blockers(waiter.lease, permits)
                .map(|blocker| Edge {
                    owner: waiter.owner.clone(),
                    waits_for: queue.name.clone(),
                    held_by: blocker.owner.clone(),
                })
                .collect();
            blockers
        };
        queue.waiters().flat_map(of).collect()
    }
}
