//! One stream that asked for locks, from its request headers to its end.

use std::rc::Rc;

use interlock_core::{Duration, LockName, OwnerId, Time};

use super::Active;
use super::intake::Terms;
use crate::answer::Reject;
use crate::answer::headers::FenceMember;
use crate::backend::{Lease, Purpose, Waiting};
use crate::host::Host;

/// What a stream is doing. There is one state at a time, and the ways out take what it carries with them: nothing is
/// released twice.
#[derive(Debug)]
pub enum State {
    /// It stands in a queue, or waits for an answer: parked, or under audit forwarded already.
    Waiting(Waiting),
    /// It holds its locks, and is upstream.
    Holding(Held),
    /// It holds nothing (any more). What is left is to tell the caller, where the response is not the filter's own.
    Over(Ended),
}

/// What a stream upstream holds.
#[derive(Debug)]
pub struct Held {
    /// Its lease.
    pub lease: Lease,
    /// How long it waited for it.
    pub waited: Duration,
    /// When it was granted, as far as the filter knows.
    pub since: Time,
    /// The fences of its grants.
    pub fences: Vec<FenceMember>,
}

/// How a stream came to hold nothing.
#[derive(Debug)]
pub enum Ended {
    /// The filter answered it itself; that answer says everything.
    Answered,
    /// Its lease was lost, and it went on.
    Lost(LockName),
    /// The backend failed, and the rule let it go on without locks, or the guard let it pass.
    Unlocked,
    /// Under audit it would have been refused.
    WouldRefuse(Box<Reject>),
}

/// What stays the same of a stream, whatever it is doing.
#[derive(Debug)]
pub struct Case {
    /// The configuration that it came in under; it keeps it, whatever is configured meanwhile.
    pub active: Rc<Active>,
    /// What is to be done for it.
    pub terms: Terms,
    /// Its owner as the request named it, if it named one; that of its locks may be a branch of it.
    pub owner: Option<OwnerId>,
    /// When it came in.
    pub arrived: Time,
    /// Inbound fences that are passed on to the upstream with its own.
    pub carried: Vec<FenceMember>,
    /// What a guard has against it that let it pass all the same.
    pub guarded: Option<Ended>,
    /// The route that it took, as far as anybody needed to know.
    pub route: String,
}

impl Case {
    /// Which table it is in.
    pub fn purpose(&self) -> Purpose {
        self.terms.purpose
    }

    /// Finds out the name of its route, for people to read. Its stream must be the effective one.
    pub fn name_route(&mut self, host: &dyn Host) {
        if self.route.is_empty() {
            let name = host.property(&["xds", "route_name"]).unwrap_or_default();
            self.route = String::from_utf8_lossy(&name).into_owned();
        }
    }

    /// Whether its decisions count.
    pub fn is_enforced(&self) -> bool {
        self.purpose() == Purpose::Enforce
    }
}

/// A stream that asked for locks.
#[derive(Debug)]
pub struct Stream {
    /// What it came with.
    pub case: Case,
    /// What it is doing.
    pub state: State,
    /// When it has to be looked at, if nothing happens before.
    pub timer: Option<Time>,
}
