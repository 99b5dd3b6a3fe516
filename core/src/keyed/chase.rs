//! The cycle search where reading takes time: it says what it needs to know, and goes on once it is told.
//!
//! The search itself is that of [`crate::cycle`], over what is known so far; what it misses on its way is asked for all at
//! once. So it takes as many rounds as the chain is long, and not as many as there are owners.
//!
//! # Who is refused
//! Reading takes so long that a cycle may close while it is looked for by one who has waited for a while, and everybody in it
//! may find it. Only the last one to wait has closed it, and is refused: it saw all the others' edges, since they were there
//! before it looked.

use core::convert::Infallible;
use std::collections::{BTreeMap, BTreeSet};

use super::Key;
use crate::cycle::{self, Reader, Search, Step};
use crate::id::{LeaseId, OwnerId};
use crate::name::LockName;
use crate::queue::Queue;
use crate::refusal::Edge;

/// How often a cycle may turn out to be none any more before the search is given up.
const TRIES: u32 = 8;

/// What a search needs, or what it has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// It has to be told for which locks these owners wait, and of the lines of these locks.
    Read {
        /// For which locks do they wait?
        owners: Vec<OwnerId>,
        /// Who stands there?
        locks: Vec<LockName>,
    },
    /// Nobody waits for the request that it is about.
    Clear,
    /// It closes this cycle, of which all edges were there at the same time.
    Cycle(Vec<Edge>),
    /// More owners are involved than a search may visit.
    TooLong,
    /// Cycles came and went for so long that nobody can tell.
    Restless,
}

/// A search for a cycle through one owner.
#[derive(Clone, Debug)]
pub struct Chase {
    owner: OwnerId,
    /// The request whose edges it is about; none: any of its owner's.
    by: Option<LeaseId>,
    waits: BTreeMap<OwnerId, Vec<LockName>>,
    lines: BTreeMap<LockName, (Queue, u32)>,
    /// When those who wait have said so.
    told: BTreeMap<LeaseId, u64>,
    /// A cycle that is looked at a second time.
    found: Option<Vec<Step>>,
    tries: u32,
}

impl Chase {
    /// A search through the edges of one request of an owner, or through all that it has. What was read before these edges
    /// were published must not be told to it.
    pub fn new(owner: OwnerId, by: Option<LeaseId>) -> Self {
        Chase {
            owner,
            by,
            waits: BTreeMap::new(),
            lines: BTreeMap::new(),
            told: BTreeMap::new(),
            found: None,
            tries: 0,
        }
    }

    /// For which locks an owner waits.
    pub fn waits(&mut self, owner: OwnerId, locks: Vec<LockName>) {
        self.waits.insert(owner, locks);
    }

    /// The line of a lock, the keys that it was made of, and how many permits it has.
    pub fn line<'a>(&mut self, queue: Queue, keys: impl IntoIterator<Item = &'a Key>, permits: u32) {
        let waiting = keys.into_iter().filter(|key| key.fence().is_none());
        self.told.extend(waiting.map(|key| (key.lease, key.written)));
        self.lines.insert(queue.name.clone(), (queue, permits));
    }

    /// Goes on.
    pub fn step(&mut self) -> Need {
        loop {
            let mut known =
                Known { waits: &self.waits, lines: &self.lines, owners: BTreeSet::new(), locks: BTreeSet::new() };
            if let Some(steps) = &self.found {
                // All of them at once: then the second look is at one moment.
                let unread = steps.iter().map(Step::lock).filter(|lock| !self.lines.contains_key(lock));
                known.locks.extend(unread.cloned());
                if let Some(need) = known.need() {
                    return need;
                }
                let mut known =
                    Known { waits: &self.waits, lines: &self.lines, owners: BTreeSet::new(), locks: BTreeSet::new() };
                let Ok(confirmed) = cycle::confirm(&mut known, steps);
                if confirmed && self.is_closed_by_another(steps) {
                    return Need::Clear;
                }
                if confirmed {
                    return Need::Cycle(cycle::edges(steps.clone()));
                }
                // It was gone at the second look. There may be another that the search did not come to.
                self.tries += 1;
                if self.tries >= TRIES {
                    return Need::Restless;
                }
                (self.found, self.waits, self.lines) = (None, BTreeMap::new(), BTreeMap::new());
                continue;
            }
            let Ok(search) = cycle::search(&mut known, &self.owner, self.by);
            match (search, known.need()) {
                (Search::Cycle(steps), _) => {
                    for step in &steps {
                        self.lines.remove(step.lock());
                    }
                    self.found = Some(steps);
                }
                (Search::TooLong, _) => return Need::TooLong,
                (Search::Clear, Some(need)) => return need,
                (Search::Clear, None) => return Need::Clear,
            }
        }
    }
}

impl Chase {
    /// Whether another request has begun to wait after the one that the search is about.
    fn is_closed_by_another(&self, steps: &[Step]) -> bool {
        let when = |lease: LeaseId| (self.told.get(&lease).copied().unwrap_or_default(), lease);
        self.by.is_some_and(|by| steps.iter().any(|step| when(step.waiter()) > when(by)))
    }
}

/// What is known, and what was missing.
struct Known<'a> {
    waits: &'a BTreeMap<OwnerId, Vec<LockName>>,
    lines: &'a BTreeMap<LockName, (Queue, u32)>,
    owners: BTreeSet<OwnerId>,
    locks: BTreeSet<LockName>,
}

impl Known<'_> {
    fn need(self) -> Option<Need> {
        let nothing = self.owners.is_empty() && self.locks.is_empty();
        let need = Need::Read { owners: self.owners.into_iter().collect(), locks: self.locks.into_iter().collect() };
        (!nothing).then_some(need)
    }
}

impl Reader for Known<'_> {
    type Error = Infallible;

    fn waits(&mut self, owner: &OwnerId) -> Result<Vec<LockName>, Infallible> {
        let known = self.waits.get(owner);
        if known.is_none() {
            self.owners.insert(owner.clone());
        }
        Ok(known.cloned().unwrap_or_default())
    }

    fn queue(&mut self, lock: &LockName) -> Result<(Queue, u32), Infallible> {
        let known = self.lines.get(lock);
        if known.is_none() {
            self.locks.insert(lock.clone());
        }
        Ok(known.cloned().unwrap_or_else(|| (Queue::new(lock.clone()), 1)))
    }
}
