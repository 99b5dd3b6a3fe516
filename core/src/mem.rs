//! A store in memory, for tests and for whatever else runs the table in one process.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use crate::store::{Kind, Record, Store, StoreError, Version};

/// Each record with its version.
type Records = HashMap<(Kind, u32), (Rc<dyn Any>, u32)>;

/// Records in a map. Clones share it, as workers share a table.
#[derive(Clone, Default)]
pub struct MemStore {
    records: Rc<RefCell<Records>>,
    conflicts: Rc<Cell<u32>>,
    accesses: Rc<Cell<u64>>,
}

impl MemStore {
    /// The next `writes` writes find that somebody else was faster.
    pub fn conflict_next(&self, writes: u32) {
        self.conflicts.set(writes);
    }

    /// How often records have been read or written.
    pub fn accesses(&self) -> u64 {
        self.accesses.get()
    }
}

impl Store for MemStore {
    fn buckets(&self) -> u32 {
        16
    }

    fn bucket(&self, name: &str) -> u32 {
        name.bytes().map(u32::from).sum::<u32>() % self.buckets()
    }

    fn read<R: Record>(&self, index: u32) -> Result<(R, Version), StoreError> {
        self.accesses.set(self.accesses.get() + 1);
        let records = self.records.borrow();
        let Some((record, version)) = records.get(&(R::KIND, index)) else {
            return Ok((R::default(), Version::ABSENT));
        };
        let record = record.downcast_ref::<R>().ok_or_else(|| StoreError::Unreadable("another kind".into()))?;
        Ok((record.clone(), Version(*version)))
    }

    fn write<R: Record>(&self, index: u32, record: &R, version: Version) -> Result<bool, StoreError> {
        self.accesses.set(self.accesses.get() + 1);
        let mut records = self.records.borrow_mut();
        let current = records.get(&(R::KIND, index)).map_or(Version::ABSENT, |(_, version)| Version(*version));
        let conflicts = self.conflicts.get();
        if conflicts > 0 || current != version {
            self.conflicts.set(conflicts.saturating_sub(1));
            return Ok(false);
        }
        records.insert((R::KIND, index), (Rc::new(record.clone()), version.0.wrapping_add(1).max(1)));
        Ok(true)
    }
}
