//! Where the table lives: numbered records that are read and then written back only if nobody else wrote meanwhile.
//!
//! The records and the optimistic loop are here; how a record is kept (Envoy's shared data, memory) is the store's
//! business. Locks and owners are spread over a fixed number of buckets, since a store may be unable to forget a key.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::fence::Fence;
use crate::id::{LeaseId, OwnerId, SessionId};
use crate::name::LockName;
use crate::queue::Queue;
use crate::session::Sessions;
use crate::time::Time;

/// How often a record is read and written anew before giving up. Two workers that fight over one record collide in
/// about one of eight tries; so many in a row mean that something is broken.
pub const MAX_TRIES: u32 = 100;

/// Why the store did not do its part.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Others wrote the record between every read and write.
    #[error("the record was changed by others {MAX_TRIES} times in a row")]
    Contended,
    /// What is stored is not a record of this version.
    #[error("the stored record cannot be read: {0}")]
    Unreadable(String),
    /// The store answered with an error.
    #[error("the store failed: {0}")]
    Failed(String),
}

/// Names one state of one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version(pub u32);

impl Version {
    /// The record has never been written.
    pub const ABSENT: Version = Version(0);
}

/// The kinds of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// [`LockBucket`]
    Locks,
    /// [`OwnerBucket`]
    Owners,
    /// [`crate::lease::LeaseBucket`]
    Leases,
    /// [`Sessions`], of which there is one.
    Sessions,
    /// [`crate::seen::SeenBucket`]
    Seen,
}

/// What a store keeps. A record that was never written is the default one.
pub trait Record: Clone + Default + Serialize + DeserializeOwned + 'static {
    /// Which kind it is.
    const KIND: Kind;
}

/// A table's storage.
pub trait Store {
    /// How many buckets there are of locks, and of owners. The same for all who share the table, for ever.
    fn buckets(&self) -> u32;

    /// The bucket that a lock or an owner of this name belongs to: less than [`Store::buckets`], and the same for all
    /// who share the table.
    fn bucket(&self, name: &str) -> u32;

    /// Reads a record with its version.
    ///
    /// # Errors
    /// [`StoreError::Unreadable`] and [`StoreError::Failed`].
    fn read<R: Record>(&self, index: u32) -> Result<(R, Version), StoreError>;

    /// Writes a record if it still has that version. False, and nothing written, if it has not.
    ///
    /// # Errors
    /// [`StoreError::Failed`], and nothing written.
    fn write<R: Record>(&self, index: u32, record: &R, version: Version) -> Result<bool, StoreError>;
}

/// Whether a change is worth writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Save {
    /// Write the record back.
    Yes,
    /// The record is as it was.
    No,
}

impl From<bool> for Save {
    fn from(changed: bool) -> Self {
        if changed { Save::Yes } else { Save::No }
    }
}

/// Reads a record, changes it and writes it back; starts over as long as others get in between.
///
/// # Errors
/// Those of the store and of `change`, and [`StoreError::Contended`] after [`MAX_TRIES`].
pub fn update<R: Record, S: Store, T>(
    store: &S,
    index: u32,
    mut change: impl FnMut(&mut R) -> Result<(T, Save), StoreError>,
) -> Result<T, StoreError> {
    for _ in 0..MAX_TRIES {
        let (mut record, version) = store.read::<R>(index)?;
        let (answer, save) = change(&mut record)?;
        if save == Save::No || store.write(index, &record, version)? || bug!(LostWriteIgnored) {
            return Ok(answer);
        }
    }
    Err(StoreError::Contended)
}

/// Some of the locks: those of one bucket that are held or waited for.
#[derive(Clone, Debug, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
pub struct LockBucket {
    /// The highest fence that was ever given in this bucket. It outlives the queues, so that a lock that was
    /// forgotten comes back with a higher one.
    pub highest: Fence,
    queues: Vec<Queue>,
}

impl Record for LockBucket {
    const KIND: Kind = Kind::Locks;
}

impl LockBucket {
    /// All its locks.
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// The lock of that name, if anybody holds it or waits for it.
    pub fn queue(&self, name: &LockName) -> Option<&Queue> {
        self.queues.iter().find(|queue| queue.name == *name)
    }

    /// The lock of that name as it stands, which may be a new one.
    pub fn into_queue(mut self, name: &LockName) -> Queue {
        let at = self.queues.iter().position(|queue| queue.name == *name);
        at.map_or_else(|| Queue::new(name.clone()), |at| self.queues.swap_remove(at))
    }

    /// Changes the lock of that name, which may be a new one; forgets it if nobody holds it or waits for it after.
    pub fn with_queue<T>(&mut self, name: &LockName, change: impl FnOnce(&mut Queue, &mut Fence) -> T) -> T {
        let at = self.queues.iter().position(|queue| queue.name == *name);
        let mut queue = match at {
            Some(at) => self.queues.swap_remove(at),
            None => Queue::new(name.clone()),
        };
        let answer = change(&mut queue, &mut self.highest);
        if !queue.is_empty() {
            self.queues.push(queue);
        } else if bug!(FenceForgottenWithLock) {
            self.highest = Fence::default();
        }
        answer
    }

    /// Changes every lock; forgets those that nobody holds or waits for after.
    pub fn with_queues(&mut self, mut change: impl FnMut(&mut Queue, &mut Fence)) {
        let highest = &mut self.highest;
        self.queues.retain_mut(|queue| {
            change(queue, highest);
            !queue.is_empty()
        });
    }
}

/// Some of the owners: what those of one bucket hold and wait for.
///
/// An index, and a hint only: it may name what is gone already, never miss what counts. The locks are the truth.
#[derive(Clone, Debug, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
pub struct OwnerBucket {
    holdings: Vec<Holdings>,
}

impl Record for OwnerBucket {
    const KIND: Kind = Kind::Owners;
}

/// What one owner holds and waits for, as far as the index knows.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Holdings {
    /// The owner.
    pub owner: OwnerId,
    /// One item a lease and lock.
    pub items: Vec<Item>,
}

/// One lock of one lease in the index by owner.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Item {
    /// The lock.
    pub lock: LockName,
    /// The lease.
    pub lease: LeaseId,
    /// Who keeps it alive.
    pub session: SessionId,
    /// Whether it may be waiting there.
    pub waiting: bool,
    /// When this was written.
    pub since: Time,
}

impl OwnerBucket {
    /// All its owners.
    pub fn holdings(&self) -> &[Holdings] {
        &self.holdings
    }

    /// What is known of an owner.
    pub fn items(&self, owner: &OwnerId) -> &[Item] {
        self.holdings.iter().find(|holdings| holdings.owner == *owner).map_or(&[], |holdings| &holdings.items)
    }

    /// Changes what is known of an owner; forgets it if that is nothing after.
    pub fn with_items<T>(&mut self, owner: &OwnerId, change: impl FnOnce(&mut Vec<Item>) -> T) -> T {
        let at = self.holdings.iter().position(|holdings| holdings.owner == *owner);
        let mut holdings = match at {
            Some(at) => self.holdings.swap_remove(at),
            None => Holdings { owner: owner.clone(), items: Vec::new() },
        };
        let answer = change(&mut holdings.items);
        if !holdings.items.is_empty() {
            self.holdings.push(holdings);
        }
        answer
    }

    /// Changes what is known of every owner; forgets those of whom that is nothing after.
    pub fn with_each(&mut self, mut change: impl FnMut(&mut Vec<Item>)) {
        self.holdings.retain_mut(|Holdings { items, .. }| {
            change(items);
            !items.is_empty()
        });
    }
}

impl Record for Sessions {
    const KIND: Kind = Kind::Sessions;
}
