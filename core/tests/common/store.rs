//! A store that lets a test act, or fail, at each access.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use interlock_core::mem::MemStore;
use interlock_core::store::{Kind, Record, Store, StoreError, Version};

/// One access to a record, before it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub kind: Kind,
    pub write: bool,
}

type Hook = Box<dyn FnMut(Access)>;

/// A [`MemStore`] with a hook before each access and with failures to order. Clones share all of it.
#[derive(Clone, Default)]
pub struct TestStore {
    pub mem: MemStore,
    hook: Rc<RefCell<Option<Hook>>>,
    passing: Rc<Cell<u32>>,
    failing: Rc<Cell<u32>>,
}

impl TestStore {
    /// Calls `hook` before each access, but not before those that the hook itself makes.
    pub fn hook(&self, hook: impl FnMut(Access) + 'static) {
        *self.hook.borrow_mut() = Some(Box::new(hook));
    }

    pub fn unhook(&self) {
        *self.hook.borrow_mut() = None;
    }

    /// Lets `passing` accesses through and fails the `failing` after them.
    pub fn fail_after(&self, passing: u32, failing: u32) {
        self.passing.set(passing);
        self.failing.set(failing);
    }

    fn before(&self, access: Access) -> Result<(), StoreError> {
        let hook = self.hook.borrow_mut().take();
        if let Some(mut hook) = hook {
            hook(access);
            self.hook.borrow_mut().get_or_insert(hook);
        }
        if self.passing.get() > 0 {
            self.passing.set(self.passing.get() - 1);
        } else if self.failing.get() > 0 {
            self.failing.set(self.failing.get() - 1);
            return Err(StoreError::Failed("as the test ordered".into()));
        }
        Ok(())
    }
}

impl Store for TestStore {
    fn buckets(&self) -> u32 {
        self.mem.buckets()
    }

    fn bucket(&self, name: &str) -> u32 {
        self.mem.bucket(name)
    }

    fn read<R: Record>(&self, index: u32) -> Result<(R, Version), StoreError> {
        self.before(Access { kind: R::KIND, write: false })?;
        self.mem.read(index)
    }

    fn write<R: Record>(&self, index: u32, record: &R, version: Version) -> Result<bool, StoreError> {
        self.before(Access { kind: R::KIND, write: true })?;
        self.mem.write(index, record, version)
    }
}
