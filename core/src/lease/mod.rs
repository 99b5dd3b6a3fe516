//! The lease protocol: leases that are asked for, renewed and given back by messages, as state machines.
//!
//! Two parties. The [`authority`] has the table: any of its workers serves any message, since what it must remember of a
//! lease stands in the store. The [`client`] is a proxy that holds leases for its requests. Between them messages get lost,
//! are doubled, overtake each other and come late; either side may stop for a while or die, and the authority may lose its
//! memory. What must not live here: how a message looks, who may send it, how a receipt is signed.
//!
//! What the protocol rests on:
//! - The client picks a lease's identity before it asks, so that every answer that did not come can be asked for again.
//! - What has ended stays ended: for a while the authority remembers that an identity is over ([`record::LINGER`]), so that
//!   a request that was overtaken by its own release gets nothing.
//! - The client counts validity from *before* the authority can have counted it, on one clock each: it never believes in a
//!   lease longer than the authority does. That takes clocks that run equally fast; nothing takes them to be equal.
//! - A grant comes with a [`Receipt`]. An authority that has lost its memory grants nothing until every lease from before
//!   has either come to be renewed, and is restored from its receipt, or has ended.

mod asking;
pub mod authority;
pub mod client;
pub mod record;
mod restore;

use serde::{Deserialize, Serialize};

pub use authority::{Answer, Deleted, Parked, Renewed};
pub use client::{Ask, CallId, Client, Do, PutAnswer, Ticket};
pub use record::{End, LeaseBucket};

use crate::fence::Fence;
use crate::id::{LeaseId, OwnerId};
use crate::request::{Claim, Grant, Request};
use crate::time::{Duration, Time};

/// A lease as its holder is told of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Granted {
    /// Which lease.
    pub lease: LeaseId,
    /// Who holds it.
    pub owner: OwnerId,
    /// What it holds, in the order in which it was taken.
    pub grants: Vec<Grant>,
    /// How long it lives from the moment of this answer if it is not renewed.
    pub ttl: Duration,
    /// How long after the request came in that moment was.
    pub waited: Duration,
    /// What brings it back if the authority loses its memory.
    pub receipt: Receipt,
}

/// All that an authority needs to know again of a lease. Worth something only in the authority's own hand: whoever takes
/// one from a message must have proved that this authority wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Receipt {
    request: Request,
    fences: Vec<Fence>,
    /// When renewing ends, on the wall clock, in microseconds since 1970: moments on the table's own clock mean nothing
    /// after a restart.
    until_unix_micros: u64,
}

impl Receipt {
    /// The lease that it is of.
    pub fn lease(&self) -> LeaseId {
        self.request.lease
    }

    /// The receipt of a claim that is granted in full.
    pub(crate) fn of(claim: &Claim, now: Time, unix_micros: u64) -> Self {
        let left = claim.until().since(now);
        Receipt {
            request: claim.request.clone(),
            fences: claim.grants.iter().map(|grant| grant.fence).collect(),
            until_unix_micros: unix_micros.saturating_add(u64::try_from(left.as_micros()).unwrap_or(u64::MAX)),
        }
    }
}
