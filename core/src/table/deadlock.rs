//! The deadlock rule over a store: what [`crate::cycle`] searches is read from the records here.

use super::{Scene, Table};
use crate::cycle::{self, Reader, Search};
use crate::id::{LeaseId, OwnerId};
use crate::name::LockName;
use crate::queue::Queue;
use crate::refusal::{Cause, Limit};
use crate::session::Sessions;
use crate::store::{self, Item, LockBucket, OwnerBucket, Store, StoreError};

impl Table {
    /// Looks for a cycle through the owner, and reads a found one a second time.
    pub(super) fn check_cycle<S: Store>(
        &mut self,
        scene: &Scene<'_, S>,
        owner: &OwnerId,
        by: Option<LeaseId>,
    ) -> Result<(), Cause> {
        // With old heartbeats a living lease could look ended, and its edge would be missed.
        self.refresh(scene)?;
        for _ in 0..store::MAX_TRIES {
            let mut reader = StoreReader { scene, sessions: &self.sessions, by };
            match cycle::search(&mut reader, owner, by)? {
                Search::Clear => return Ok(()),
                Search::Cycle(steps) => {
                    // Of a worker that stood still in the middle, others may have forgotten whose leases are over.
                    self.fresh = false;
                    self.refresh(scene)?;
                    let mut reader = StoreReader { scene, sessions: &self.sessions, by };
                    if bug!(PhantomRefused) || cycle::confirm(&mut reader, &steps)? {
                        return Err(Cause::Deadlock { cycle: cycle::edges(steps) });
                    }
                    // It was gone at the second look. There may be another one that the search did not come to.
                }
                Search::TooLong if bug!(LongChainPasses) => return Ok(()),
                Search::TooLong => {
                    let value = u64::try_from(cycle::MAX_OWNERS).unwrap_or(u64::MAX);
                    return Err(Cause::Limit { limit: Limit::WaitChain, value });
                }
            }
        }
        Err(StoreError::Contended.into())
    }
}

/// Reads the wait-for graph from a store, without what has ended.
struct StoreReader<'a, 's, S> {
    scene: &'a Scene<'s, S>,
    sessions: &'a Sessions,
    /// Whose wait the search is about, if it is about one.
    by: Option<LeaseId>,
}

impl<S: Store> Reader for StoreReader<'_, '_, S> {
    type Error = StoreError;

    fn waits(&mut self, owner: &OwnerId) -> Result<Vec<LockName>, StoreError> {
        let (owners, _) = self.scene.store.read::<OwnerBucket>(self.scene.store.bucket(owner.as_str()))?;
        let own = |item: &Item| bug!(SearchBeforePublish) && self.by == Some(item.lease);
        let waiting = owners.items(owner).iter().filter(|item| item.waiting || own(item));
        Ok(waiting.map(|item| item.lock.clone()).collect())
    }

    fn queue(&mut self, lock: &LockName) -> Result<(Queue, u32), StoreError> {
        let permits = self.scene.rules.classes.of(lock).permits;
        let (locks, _) = self.scene.store.read::<LockBucket>(self.scene.store.bucket(lock.as_str()))?;
        let mut queue = locks.into_queue(lock);
        queue.reap(self.sessions, self.scene.now);
        Ok((queue, permits))
    }
}
