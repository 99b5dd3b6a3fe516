//! The fences that a guard has seen, in this Envoy's shared data: the same for all workers, whatever backend grants the locks.
//!
//! What is stale, and what may be forgotten, is decided in the core ([`interlock_core::seen`]).

use interlock_core::seen::{self, Verdict};
use interlock_core::{Duration, Fence, LockName, Mode, StoreError};

use super::Purpose;
use super::local::{SharedStore, Space};
use crate::host::{Host, HostError};
use crate::policy::LONGEST;

/// For how long what was seen is remembered. A fence can be shown for as long as its grant may be held, [`LONGEST`] at the most;
/// and a little longer where the clock of who signed it goes before this one.
const KEEP: Duration = LONGEST.saturating_add(Duration::from_secs(3600));

/// The memory of an instance's guards.
pub struct Seen {
    space: Space,
}

impl Seen {
    /// Opens an instance's memory. Its keys stand beside those of the table whose decisions count; there is one memory, because
    /// it is about what has passed, whoever only watched.
    ///
    /// # Errors
    /// Those of the host.
    pub fn open(host: &dyn Host, instance: &str) -> Result<Self, HostError> {
        Ok(Seen { space: Space::open(host, instance, Purpose::Enforce)? })
    }

    /// See [`seen::see`].
    ///
    /// # Errors
    /// Those of the store.
    pub fn see(&self, host: &dyn Host, lock: &LockName, fence: Fence, mode: Mode) -> Result<Verdict, StoreError> {
        let store = SharedStore { host, space: &self.space };
        seen::see(&store, lock, fence, mode, host.now(), KEEP)
    }
}
