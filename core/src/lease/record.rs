//! What an authority remembers of leases: one record a bucket, in the store of the table, so that all workers share it.
//!
//! It says which locks a lease is about and that a lease is over. Whether it still holds them, the locks say.

use serde::{Deserialize, Serialize};

use crate::id::{LeaseId, SessionId};
use crate::request::Claim;
use crate::store::{Kind, Record, Store};
use crate::time::{Duration, Time};

/// How long an authority remembers that a lease is over. A message that comes later than this after the end of its lease
/// is taken for a new one: a grant that nobody asked for any more, which nobody renews, and which ends by its TTL.
pub const LINGER: Duration = Duration::from_secs(5);

/// How many leases that are over one bucket remembers, so that a flood of them cannot grow it: the oldest go first.
const MOST_OVER: usize = 256;

/// How a lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum End {
    /// It was not granted.
    Refused,
    /// It was given up before it was granted, or before it was even asked for.
    Cancelled,
    /// Its holder gave it back.
    Released,
    /// It ended by its TTL or its hold limit, or was taken away.
    Expired,
}

/// How a lease stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum Standing {
    /// It has been asked for.
    Waiting {
        /// The worker that moves it on: it alone acts on the claim.
        driver: SessionId,
        /// What it wants, and what it had when it came to wait.
        claim: Box<Claim>,
        /// When its wait ends.
        deadline: Time,
    },
    /// It was granted.
    Held {
        /// What it holds.
        claim: Box<Claim>,
        /// When somebody last found that it does.
        seen: Time,
    },
    /// It is over.
    Over {
        /// How it ended.
        end: End,
        /// When.
        since: Time,
    },
    /// It is over, but what it had may still stand in queues and in the index: who ends a lease can die before that has been
    /// taken away.
    Ending {
        /// How it ended.
        end: End,
        /// When.
        since: Time,
        /// What it wanted and had.
        claim: Box<Claim>,
    },
}

impl Standing {
    /// How the lease ended, if it has.
    pub(super) fn ended(&self) -> Option<End> {
        match self {
            Standing::Over { end, .. } | Standing::Ending { end, .. } => Some(*end),
            Standing::Waiting { .. } | Standing::Held { .. } => None,
        }
    }
}

/// Some of the leases.
#[derive(Clone, Debug, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
pub struct LeaseBucket {
    leases: Vec<(LeaseId, Standing)>,
}

impl Record for LeaseBucket {
    const KIND: Kind = Kind::Leases;
}

impl LeaseBucket {
    /// The bucket that a lease belongs to. Clients pick identities: the store's own spreading keeps them from picking a
    /// bucket.
    pub fn index<S: Store>(store: &S, lease: LeaseId) -> u32 {
        store.bucket(&format!("{:032x}", lease.0))
    }

    /// How many of its leases wait, are held, and are over.
    pub fn count(&self) -> (usize, usize, usize) {
        self.leases.iter().fold((0, 0, 0), |(waiting, held, over), (_, standing)| match standing {
            Standing::Waiting { .. } => (waiting + 1, held, over),
            Standing::Held { .. } => (waiting, held + 1, over),
            Standing::Over { .. } | Standing::Ending { .. } => (waiting, held, over + 1),
        })
    }

    /// All that is known.
    pub(super) fn leases(&self) -> &[(LeaseId, Standing)] {
        &self.leases
    }

    /// What is known of a lease.
    pub(super) fn get(&self, lease: LeaseId) -> Option<&Standing> {
        self.leases.iter().find(|(id, _)| *id == lease).map(|(_, standing)| standing)
    }

    /// Notes how a lease stands, and forgets what has been over for long enough.
    pub(super) fn set(&mut self, lease: LeaseId, standing: Standing, now: Time) {
        self.prune(now);
        match self.leases.iter_mut().find(|(id, _)| *id == lease) {
            Some((_, known)) => *known = standing,
            None => self.leases.push((lease, standing)),
        }
    }

    /// Forgets what has been over for long enough, if nothing is left of it. True if there was any.
    pub(super) fn prune(&mut self, now: Time) -> bool {
        let before = self.leases.len();
        let over = |standing: &Standing| matches!(standing, Standing::Over { .. });
        let mut spare = self.leases.iter().filter(|(_, standing)| over(standing)).count().saturating_sub(MOST_OVER);
        self.leases.retain(|(_, standing)| match standing {
            Standing::Over { since, .. } => {
                let spared = spare > 0;
                spare = spare.saturating_sub(1);
                !spared && (now < *since + LINGER || bug!(TombstoneKept))
            }
            Standing::Waiting { .. } | Standing::Held { .. } | Standing::Ending { .. } => true,
        });
        self.leases.len() < before
    }
}
