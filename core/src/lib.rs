//! The lock manager of Interlock.
//!
//! Values in, values out: no host, no I/O, no clock, no randomness live here. What does: lock names and modes, the
//! queue of one lock and the pure function that says who holds it, the table over a store, the global order, and
//! the search for wait-for cycles. What must not: anything that knows of HTTP, Envoy, a wire format or a policy file.

/// Whether a seeded bug is switched on: `bugs`, a module that exists under `--cfg interlock_bugs` only, lists them. In
/// everything that ships this is the constant `false`.
#[cfg(not(interlock_bugs))]
#[doc(hidden)]
#[macro_export]
macro_rules! bug {
    ($name:ident) => {
        false
    };
}

/// Whether a seeded bug is switched on.
#[cfg(interlock_bugs)]
#[macro_export]
macro_rules! bug {
    ($name:ident) => {
        $crate::bugs::is_on($crate::bugs::Bug::$name)
    };
}

#[cfg(interlock_bugs)]
pub mod bugs;
pub mod class;
pub mod cycle;
pub mod fence;
pub mod id;
pub mod keyed;
pub mod lease;
pub mod mem;
pub mod mode;
pub mod name;
pub mod queue;
pub mod refusal;
pub mod request;
pub mod seen;
pub mod session;
pub mod store;
pub mod table;
pub mod time;

pub use class::{Class, Classes, Within};
pub use fence::Fence;
pub use id::{LeaseId, OwnerId, Rank, SessionId};
pub use mode::Mode;
pub use name::{LockName, NameError};
pub use queue::{Entry, Queue, State};
pub use refusal::{Cause, Edge, Holder, Limit, Loss, Refusal};
pub use request::{Grant, Lease, Pending, Request, Want};
pub use session::{Load, Member, Sessions};
pub use store::{Store, StoreError};
pub use table::{Census, Effects, Event, Limits, Outcome, Rules, Scene, Table, Tally, Wake};
pub use time::{Duration, Time};
