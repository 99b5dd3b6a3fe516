//! The table as an authority serves it: leases by message, and the whole of it to look at.

use interlock_core::lease::authority;
use interlock_core::lease::{Answer, Deleted, Granted, Parked, Receipt, Renewed};
use interlock_core::{Duration, Edge, Entry, LeaseId, LockName, Queue, Request, Rules, Sessions, Store, StoreError};

use super::{BUCKETS, Local, failed, with_scene};
use crate::api::body::Conflict;
use crate::host::{Expected, Host, Stored};

/// How many refusals are remembered for people to look at.
const REMEMBERED: usize = 64;

/// How often the memory of refusals is written anew before one is not remembered: it is in the log all the same.
const TRIES: usize = 8;

impl Local {
    /// See [`authority::put`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn put(
        &mut self,
        host: &dyn Host,
        rules: &Rules,
        request: Request,
        receipt: Option<&Receipt>,
    ) -> Result<Answer, StoreError> {
        with_scene(host, &self.space, rules, |scene| authority::put(&mut self.table, scene, request, receipt))
    }

    /// See [`authority::poll`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn poll_parked(&mut self, host: &dyn Host, rules: &Rules, parked: Parked) -> Result<Answer, StoreError> {
        with_scene(host, &self.space, rules, |scene| authority::poll(&mut self.table, scene, parked))
    }

    /// See [`authority::leave`].
    pub fn leave(&mut self, host: &dyn Host, rules: &Rules, parked: Parked) {
        with_scene(host, &self.space, rules, |scene| authority::leave(&mut self.table, scene, parked));
    }

    /// See [`authority::renew`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn renew(
        &mut self,
        host: &dyn Host,
        rules: &Rules,
        lease: LeaseId,
        ttl: Option<Duration>,
        receipt: Option<&Receipt>,
    ) -> Result<Renewed, StoreError> {
        with_scene(host, &self.space, rules, |scene| authority::renew(&mut self.table, scene, lease, ttl, receipt))
    }

    /// See [`authority::delete`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn delete(&mut self, host: &dyn Host, rules: &Rules, lease: LeaseId) -> Result<Deleted, StoreError> {
        with_scene(host, &self.space, rules, |scene| authority::delete(&mut self.table, scene, lease))
    }

    /// See [`authority::get`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn get(&mut self, host: &dyn Host, rules: &Rules, lease: LeaseId) -> Result<Option<Granted>, StoreError> {
        with_scene(host, &self.space, rules, |scene| authority::get(&mut self.table, scene, lease))
    }

    /// See [`interlock_core::Table::break_glass`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn break_glass(&mut self, host: &dyn Host, rules: &Rules, lock: &LockName) -> Result<Vec<Entry>, StoreError> {
        with_scene(host, &self.space, rules, |scene| self.table.break_glass(scene, lock))
    }

    /// See [`interlock_core::Table::grace_left`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn grace_left(&mut self, host: &dyn Host, rules: &Rules) -> Result<Duration, StoreError> {
        with_scene(host, &self.space, rules, |scene| self.table.grace_left(scene))
    }

    /// The locks from a bucket on, at least `limit` if there are as many, and where to go on.
    ///
    /// # Errors
    /// Those of the store.
    pub fn locks(
        &mut self,
        host: &dyn Host,
        rules: &Rules,
        from: u32,
        limit: usize,
    ) -> Result<(Vec<Queue>, Option<u32>), StoreError> {
        with_scene(host, &self.space, rules, |scene| {
            let mut queues = Vec::new();
            for bucket in from..BUCKETS {
                if queues.len() >= limit {
                    return Ok((queues, Some(bucket)));
                }
                queues.append(&mut self.table.look(scene, bucket)?);
            }
            Ok((queues, None))
        })
    }

    /// One lock as it stands; empty where nobody holds it or waits for it.
    ///
    /// # Errors
    /// Those of the store.
    pub fn lock(&mut self, host: &dyn Host, rules: &Rules, name: &LockName) -> Result<Queue, StoreError> {
        with_scene(host, &self.space, rules, |scene| {
            let queues = self.table.look(scene, scene.store.bucket(name.as_str()))?;
            Ok(queues.into_iter().find(|queue| queue.name == *name).unwrap_or_else(|| Queue::new(name.clone())))
        })
    }

    /// The wait-for edges of the whole table, up to about `most`; and whether there are more.
    ///
    /// # Errors
    /// Those of the store.
    pub fn edges(&mut self, host: &dyn Host, rules: &Rules, most: usize) -> Result<(Vec<Edge>, bool), StoreError> {
        with_scene(host, &self.space, rules, |scene| {
            let mut edges = Vec::new();
            for bucket in 0..BUCKETS {
                for queue in self.table.look(scene, bucket)? {
                    if edges.len() >= most {
                        return Ok((edges, true));
                    }
                    edges.append(&mut self.table.edges(scene, &queue));
                }
            }
            Ok((edges, false))
        })
    }

    /// The sessions as last read.
    pub fn sessions(&self) -> &Sessions {
        self.table.sessions()
    }

    /// Remembers a refusal for people to look at, if nothing is in the way.
    pub fn remember(&self, host: &dyn Host, conflict: &Conflict) {
        let key = self.conflicts_key();
        for _ in 0..TRIES {
            let Ok(stored) = host.shared_get(&key) else { return };
            let expected = stored.as_ref().map_or(Expected::Absent, |(_, cas)| Expected::Version(*cas));
            let known = stored.map(|(bytes, _)| bytes).unwrap_or_default();
            let mut conflicts: Vec<Conflict> = postcard::from_bytes(&known).unwrap_or_default();
            conflicts.insert(0, conflict.clone());
            conflicts.truncate(REMEMBERED);
            let Ok(bytes) = postcard::to_allocvec(&conflicts) else { return };
            if !matches!(host.shared_set(&key, &bytes, expected), Ok(Stored::Conflict)) {
                return;
            }
        }
    }

    /// What is remembered of refusals, the newest first.
    ///
    /// # Errors
    /// Those of the store.
    pub fn remembered(&self, host: &dyn Host) -> Result<Vec<Conflict>, StoreError> {
        let stored = host.shared_get(&self.conflicts_key()).map_err(failed)?;
        Ok(stored.and_then(|(bytes, _)| postcard::from_bytes(&bytes).ok()).unwrap_or_default())
    }

    fn conflicts_key(&self) -> String {
        format!("{}/d", self.space.prefix)
    }
}
