//! Why a request did not get its locks. One variant a cause, each with the slug it becomes.

use serde::{Deserialize, Serialize};

use crate::fence::Fence;
use crate::id::OwnerId;
use crate::mode::Mode;
use crate::name::LockName;
use crate::time::Duration;

/// One step of a wait-for cycle: `owner` waits for `waits_for`, which `held_by` holds or stands before it for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edge {
    /// Who waits.
    pub owner: OwnerId,
    /// For which lock.
    pub waits_for: LockName,
    /// Who has to go first.
    pub held_by: OwnerId,
}

/// A holder that stood in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Who holds.
    pub owner: OwnerId,
    /// In which mode.
    pub mode: Mode,
    /// Under which fence.
    pub fence: Fence,
    /// For how long already.
    pub held_for: Duration,
    /// Who asked for it: a route or a workload, for people to read.
    pub asked_by: String,
}

/// Which limit of the policy was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Locks asked for by one request.
    LocksPerRequest,
    /// Locks held and waited for by one owner.
    LocksPerOwner,
    /// Locks held in the whole table.
    Locks,
    /// Requests that wait for one lock.
    WaitersPerLock,
    /// Requests that wait in the whole table.
    Waiters,
    /// Owners that one cycle search may visit: past it nobody can say that waiting is safe.
    WaitChain,
}

impl Limit {
    /// All of them.
    pub const ALL: [Limit; 6] = [
        Limit::LocksPerRequest,
        Limit::LocksPerOwner,
        Limit::Locks,
        Limit::WaitersPerLock,
        Limit::Waiters,
        Limit::WaitChain,
    ];

    /// The limit as policies spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Limit::LocksPerRequest => "locks_per_request",
            Limit::LocksPerOwner => "locks_per_owner",
            Limit::Locks => "locks",
            Limit::WaitersPerLock => "waiters_per_lock",
            Limit::Waiters => "waiters",
            Limit::WaitChain => "wait_chain",
        }
    }
}

/// Why a lease ended before its holder gave it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Loss {
    /// It had been renewed for as long as it may be.
    HoldLimit,
    /// It was not renewed within its TTL.
    Expired,
}

impl Loss {
    /// The loss in metrics and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Loss::HoldLimit => "hold-limit",
            Loss::Expired => "expired",
        }
    }
}

/// Why one lock of a request was not granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Waiting would close this cycle: the first edge is the refused one, the last leads back to its owner.
    Deadlock {
        /// The cycle, in order.
        cycle: Vec<Edge>,
    },
    /// The owner already holds a lock that sorts above.
    OrderViolation {
        /// That lock.
        held: LockName,
    },
    /// It is taken and the request does not wait.
    Held {
        /// By whom.
        holders: Vec<Holder>,
        /// When the first of them could be gone at the earliest without giving it back.
        retry_after: Duration,
    },
    /// The wait ran out.
    WaitTimeout {
        /// Who held it at the end.
        holders: Vec<Holder>,
        /// How long it waited.
        waited: Duration,
        /// When the first of them could be gone at the earliest without giving it back.
        retry_after: Duration,
    },
    /// A limit of the policy.
    Limit {
        /// Which.
        limit: Limit,
        /// Its value.
        value: u64,
    },
    /// The lease ended while it was in use.
    LeaseLost {
        /// How.
        loss: Loss,
    },
    /// The table is new and may yet learn of leases that are older than it is: for now it grants nothing.
    Grace {
        /// For how long yet.
        left: Duration,
    },
    /// The store of the table did not do its part.
    Backend {
        /// What went wrong, for people to read.
        detail: String,
    },
}

/// A request that was not granted. It holds nothing and stands in no queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The lock that it failed on.
    pub lock: LockName,
    /// The mode that it wanted there.
    pub mode: Mode,
    /// Who wanted it.
    pub owner: OwnerId,
    /// Why.
    pub cause: Cause,
}

impl Cause {
    /// The name of the cause in problem types, `lock-status` and metrics.
    pub const fn slug(&self) -> &'static str {
        match self {
            Cause::Deadlock { .. } => "deadlock",
            Cause::OrderViolation { .. } => "order-violation",
            Cause::Held { .. } => "lock-held",
            Cause::WaitTimeout { .. } => "wait-timeout",
            Cause::Limit { limit: Limit::WaitersPerLock | Limit::Waiters | Limit::WaitChain, .. } => "too-many-waiters",
            Cause::Limit { .. } => "too-many-locks",
            Cause::LeaseLost { .. } => "lease-lost",
            Cause::Grace { .. } | Cause::Backend { .. } => "backend-unavailable",
        }
    }
}
