//! The search for wait-for cycles.
//!
//! Edge-chasing over an abstract reader: from an owner to the locks it waits for, from there to who stands in its
//! way, and on, breadth first, so that the cost is the length of the chains and not the size of the table (after
//! Chandy, Misra and Haas, "Distributed Deadlock Detection", 1983; here one party follows the edges itself).
//!
//! Who searches has published its own edge before. So of two that close one cycle from two sides at the same time,
//! the later publisher sees the other's edge: at least one of them finds the cycle.
//!
//! Who stands in a queue waits for those in front of it, and that queue says so. It waits for others only if its owner
//! waits elsewhere too, which its entry says; only then, and of holders, the owner's waits are read.

use std::collections::hash_map::Entry as MapEntry;
use std::collections::{HashMap, HashSet, VecDeque};

use crate::id::{LeaseId, OwnerId};
use crate::name::LockName;
use crate::queue::Queue;
use crate::refusal::Edge;

/// How many owners one search may visit. A search that meets more ends with [`Search::TooLong`], since nobody can
/// then say that the wait is safe.
pub const MAX_OWNERS: usize = 16_384;

/// What a search reads. What it gives must have no ended entries in it.
pub trait Reader {
    /// Why reading can fail.
    type Error;

    /// Locks for which the owner may be waiting: all of them, and perhaps some more.
    ///
    /// # Errors
    /// Whatever reading can fail with.
    fn waits(&mut self, owner: &OwnerId) -> Result<Vec<LockName>, Self::Error>;

    /// The lock's queue, and how many permits it has.
    ///
    /// # Errors
    /// Whatever reading can fail with.
    fn queue(&mut self, lock: &LockName) -> Result<(Queue, u32), Self::Error>;
}

/// One wait-for edge as it was read: the leases are what makes it recognisable when it is read again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    owner: OwnerId,
    lease: LeaseId,
    lock: LockName,
    blocker: OwnerId,
    blocker_lease: LeaseId,
}

impl Step {
    /// The lock whose line the edge is in.
    pub(crate) fn lock(&self) -> &LockName {
        &self.lock
    }

    /// The request that waits there.
    pub(crate) fn waiter(&self) -> LeaseId {
        self.lease
    }
}

/// What a search found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Search {
    /// No edge leads back.
    Clear,
    /// These edges lead from the owner back to it.
    Cycle(Vec<Step>),
    /// More than [`MAX_OWNERS`] owners are involved.
    TooLong,
}

/// A lock that a search has come to.
struct Line {
    queue: Queue,
    permits: u32,
    /// Where each owner waits in the queue, once that was asked twice.
    places: Option<HashMap<OwnerId, Vec<usize>>>,
    asked: bool,
    /// Whoever waits before this place can lead to nobody new.
    covered: usize,
    /// The places that the search goes on from, one by one.
    next: HashSet<usize>,
}

impl Line {
    /// Where the owner waits.
    fn places(&mut self, owner: &OwnerId) -> Vec<usize> {
        let waiters = self.queue.entries().iter().enumerate().filter(|(_, entry)| !entry.is_held());
        if !core::mem::replace(&mut self.asked, true) {
            return waiters.filter(|(_, entry)| entry.owner == *owner).map(|(place, _)| place).collect();
        }
        let places = self.places.get_or_insert_with(|| {
            let mut places: HashMap<OwnerId, Vec<usize>> = HashMap::new();
            waiters.for_each(|(place, entry)| places.entry(entry.owner.clone()).or_default().push(place));
            places
        });
        places.get(owner).cloned().unwrap_or_default()
    }
}

/// One edge, by where it is in a line.
#[derive(Clone, Copy)]
struct Hop {
    line: usize,
    waiter: usize,
    blocker: usize,
}

/// An owner that a search has come to.
struct Reached {
    /// By which edge first; the start by none.
    by: Option<Hop>,
    /// Whether all its waits are followed, and not only one that it stands in. There may be others as long as a second one has
    /// not been marked. Who comes to mark it searches then, and breaks by its refusal what runs through that one; but not
    /// what runs through others.
    whole: bool,
}

/// Where a search goes on.
enum Next {
    /// Wherever this owner waits.
    Owner(OwnerId),
    /// At this place in this line, the only one where its owner waits.
    Place { line: usize, place: usize },
}

/// A search under way.
struct Chase<'a> {
    owner: &'a OwnerId,
    lines: Vec<Line>,
    by_name: HashMap<LockName, usize>,
    reached: HashMap<OwnerId, Reached>,
    next: VecDeque<Next>,
}

impl Chase<'_> {
    fn line<R: Reader>(&mut self, reader: &mut R, lock: LockName) -> Result<usize, R::Error> {
        if let Some(line) = self.by_name.get(&lock) {
            return Ok(*line);
        }
        let (queue, permits) = reader.queue(&lock)?;
        self.lines.push(Line { queue, permits, places: None, asked: false, covered: 0, next: HashSet::new() });
        self.by_name.insert(lock, self.lines.len() - 1);
        Ok(self.lines.len() - 1)
    }

    /// Takes in an owner that an edge leads to. False if there is no room for one more.
    fn reach(&mut self, owner: OwnerId, hop: Hop, next: Next) -> bool {
        let (room, whole) = (self.reached.len() < MAX_OWNERS, matches!(next, Next::Owner(_)));
        let reached = match self.reached.entry(owner) {
            MapEntry::Occupied(reached) => reached.into_mut(),
            MapEntry::Vacant(_) if !room => return false,
            MapEntry::Vacant(new) => new.insert(Reached { by: Some(hop), whole: false }),
        };
        let known = match next {
            Next::Owner(_) => reached.whole,
            Next::Place { line, place } => {
                reached.whole || !self.lines.get_mut(line).is_some_and(|line| line.next.insert(place))
            }
        };
        reached.whole |= whole;
        if !known {
            self.next.push_back(next);
        }
        true
    }

    /// Follows the edges of the waiter at a place, and says if that ended the search.
    ///
    /// If everybody in front of it was reached, those who wait there have no edges of their own at this lock that lead to
    /// anybody new; and whoever waits nowhere else has no others. So they are passed over together, and a line costs one
    /// look at each that stands in it: not one record each, nor the square of its length. An entry of the owner in question
    /// is another matter, since an edge to that one closes a cycle.
    fn follow(&mut self, line: usize, place: usize) -> Option<Search> {
        let Line { queue, permits, covered, .. } = self.lines.get(line)?;
        if place < *covered {
            return None;
        }
        let (mut elsewhere, mut only_here, mut all) = (Vec::new(), Vec::new(), true);
        let mut edges = if bug!(OneEdgeOfMany) { 1 } else { usize::MAX };
        for (at, other, in_the_way) in queue.ahead(place, *permits) {
            let is_edge = in_the_way && edges > 0;
            edges -= usize::from(is_edge);
            let hop = Hop { line, waiter: place, blocker: at };
            if other.owner == *self.owner {
                if is_edge {
                    return Some(Search::Cycle(self.path(hop)));
                }
                all = false;
            } else if other.is_only_wait() {
                only_here.extend(is_edge.then(|| (other.owner.clone(), hop)));
            } else if is_edge {
                elsewhere.push((other.owner.clone(), hop));
            } else {
                all = all && self.reached.get(&other.owner).is_some_and(|reached| reached.whole);
            }
        }
        if all {
            only_here.clear();
            if let Some(line) = self.lines.get_mut(line) {
                line.covered = place;
            }
        }
        for (owner, hop) in elsewhere {
            if !self.reach(owner.clone(), hop, Next::Owner(owner)) {
                return Some(Search::TooLong);
            }
        }
        // From behind: whoever stands there covers the most.
        for (owner, hop) in only_here.into_iter().rev() {
            if !self.reach(owner, hop, Next::Place { line, place: hop.blocker }) {
                return Some(Search::TooLong);
            }
        }
        None
    }

    /// The steps from the start of the search to and with `last`.
    fn path(&self, last: Hop) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut hop = Some(last);
        while let Some(step) = hop.and_then(|hop| self.step(hop)) {
            hop = self.reached.get(&step.owner).and_then(|reached| reached.by);
            steps.push(step);
        }
        steps.reverse();
        steps
    }

    fn step(&self, Hop { line, waiter, blocker }: Hop) -> Option<Step> {
        let queue = &self.lines.get(line)?.queue;
        let (waiter, blocker) = (queue.entries().get(waiter)?, queue.entries().get(blocker)?);
        Some(Step {
            owner: waiter.owner.clone(),
            lease: waiter.lease,
            lock: queue.name.clone(),
            blocker: blocker.owner.clone(),
            blocker_lease: blocker.lease,
        })
    }
}

/// Looks for a cycle through `owner`: through the edges of its lease `by` where that is given, else through any.
///
/// # Errors
/// Those of the reader.
pub fn search<R: Reader>(reader: &mut R, owner: &OwnerId, by: Option<LeaseId>) -> Result<Search, R::Error> {
    let mut chase = Chase {
        owner,
        lines: Vec::new(),
        by_name: HashMap::new(),
        reached: HashMap::from([(owner.clone(), Reached { by: None, whole: true })]),
        next: VecDeque::from([Next::Owner(owner.clone())]),
    };
    while let Some(next) = chase.next.pop_front() {
        if bug!(SearchDepthTwo) && chase.reached.len() > 2 {
            break;
        }
        let waiter = match next {
            Next::Owner(waiter) => waiter,
            Next::Place { line, place } => {
                if let Some(end) = chase.follow(line, place) {
                    return Ok(end);
                }
                continue;
            }
        };
        for lock in reader.waits(&waiter)? {
            let at = chase.line(reader, lock)?;
            let Some(line) = chase.lines.get_mut(at) else { continue };
            for place in line.places(&waiter) {
                let lease =
                    chase.lines.get(at).and_then(|line| line.queue.entries().get(place)).map(|entry| entry.lease);
                let asked = waiter != *owner || by.is_none() || by == lease;
                if asked && let Some(end) = chase.follow(at, place) {
                    return Ok(end);
                }
            }
        }
    }
    Ok(Search::Clear)
}

/// Reads every edge of a found cycle a second time. Leases are never used twice and a lease does not come back to a
/// lock that it has left, so an edge that is there both times was there all the time in between; and the moment
/// between the two readings is in between for all of them: the cycle was whole then.
///
/// # Errors
/// Those of the reader, which must not give again what it gave to the search.
pub fn confirm<R: Reader>(reader: &mut R, steps: &[Step]) -> Result<bool, R::Error> {
    for step in steps {
        let (queue, permits) = reader.queue(&step.lock)?;
        let stands = queue.blockers(step.lease, permits).any(|blocker| blocker.lease == step.blocker_lease);
        if !stands {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The cycle as it is told to people.
pub fn edges(steps: Vec<Step>) -> Vec<Edge> {
    let edge = |step: Step| Edge { owner: step.owner, waits_for: step.lock, held_by: step.blocker };
    steps.into_iter().map(edge).collect()
}

#[cfg(test)]
mod tests {
    use core::convert::Infallible;

    use super::*;
    use crate::fence::Fence;
    use crate::id::SessionId;
    use crate::mode::Mode;
    use crate::queue::{Entry, State};
    use crate::time::{Duration, Time};
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// Owner `n` holds lock `n` and waits for lock `n + 1`; the last one for the first if the ring is closed.
    struct Chain {
        length: usize,
        closed: bool,
        reads: usize,
    }

    impl Chain {
        fn new(length: usize, closed: bool) -> Self {
            Chain { length, closed, reads: 0 }
        }

        fn owner(n: usize) -> OwnerId {
            OwnerId::new(&n.to_string()).unwrap()
        }

        fn entry(lease: usize, owner: usize) -> Entry {
            let (since, deadline, hold) = (Time::ZERO, Time::NEVER, Duration::MAX);
            let state = State::Waiting { since, deadline, hold, upgrade: false, elsewhere: false };
            Entry {
                lease: LeaseId(u128::try_from(lease).unwrap()),
                owner: Self::owner(owner),
                mode: Mode::Exclusive,
                reentrant: true,
                session: SessionId::NONE,
                detached: false,
                ttl: Duration::MAX,
                asked_by: String::new(),
                state,
            }
        }
    }

    impl Reader for Chain {
        type Error = Infallible;

        fn waits(&mut self, owner: &OwnerId) -> Result<Vec<LockName>, Infallible> {
            let n: usize = owner.as_str().parse().unwrap();
            let next = if n + 1 < self.length { Some(n + 1) } else { self.closed.then_some(0) };
            Ok(next.map(|next| LockName::parse(&next.to_string()).unwrap()).into_iter().collect())
        }

        fn queue(&mut self, lock: &LockName) -> Result<(Queue, u32), Infallible> {
            self.reads += 1;
            let n: usize = lock.as_str().parse().unwrap();
            let mut queue = Queue::new(lock.clone());
            queue.enqueue(Self::entry(2 * n, n));
            queue.settle(1, Time::ZERO, Fence(0), &mut Fence(0));
            let waiter = if n > 0 { n - 1 } else { self.length - 1 };
            queue.enqueue(Self::entry(2 * n + 1, waiter));
            Ok((queue, 1))
        }
    }

    #[test]
    fn a_ring_is_found_and_confirmed_at_the_cost_of_its_length() {
        for length in [2, 3, 100, MAX_OWNERS - 1] {
            let mut chain = Chain::new(length, true);
            let Ok(Search::Cycle(steps)) = search(&mut chain, &Chain::owner(0), None) else { panic!("not found") };
            assert_eq!((steps.len(), chain.reads), (length, length));
            assert_eq!(confirm(&mut chain, &steps), Ok(true));
            let edges = edges(steps);
            assert!(edges.windows(2).all(|pair| pair[0].held_by == pair[1].owner));
            assert_eq!(edges.last().unwrap().held_by, edges[0].owner);
        }
    }

    #[test]
    fn a_chain_that_ends_is_no_cycle_and_one_past_the_bound_is_no_answer() {
        assert_eq!(search(&mut Chain::new(100, false), &Chain::owner(0), None), Ok(Search::Clear));
        assert_eq!(search(&mut Chain::new(MAX_OWNERS + 2, false), &Chain::owner(0), None), Ok(Search::TooLong));
    }

    #[test]
    fn only_the_edges_of_the_asking_lease_count_where_it_is_named() {
        let by = |lease| search(&mut Chain::new(3, true), &Chain::owner(0), Some(LeaseId(lease)));
        assert!(matches!(by(3), Ok(Search::Cycle(_))), "the lease that waits for lock 1");
        assert_eq!(by(99), Ok(Search::Clear));
    }
    /// One lock that everybody waits for.
    struct OneLine(Queue);

    impl Reader for OneLine {
        type Error = Infallible;

        fn waits(&mut self, _: &OwnerId) -> Result<Vec<LockName>, Infallible> {
            Ok(vec![self.0.name.clone()])
        }

        fn queue(&mut self, _: &LockName) -> Result<(Queue, u32), Infallible> {
            Ok((self.0.clone(), 1))
        }
    }

    #[test]
    fn the_own_entry_in_front_of_another_waiter_closes_a_cycle_though_that_one_is_passed_over_else() {
        let mut line = Queue::new(LockName::parse("l").unwrap());
        line.enqueue(Chain::entry(1, 1));
        line.settle(1, Time::ZERO, Fence(0), &mut Fence(0));
        // Owner 2 reads, owner 3 waits for it, and owner 2 waits behind that one for more.
        line.enqueue(Entry { mode: Mode::Shared, ..Chain::entry(2, 2) });
        line.enqueue(Chain::entry(3, 3));
        line.enqueue(Chain::entry(4, 2));
        let found = search(&mut OneLine(line.clone()), &Chain::owner(2), Some(LeaseId(4)));
        let Ok(Search::Cycle(steps)) = found else { panic!("not found") };
        assert_eq!(steps.iter().map(|step| step.blocker_lease.0).collect::<Vec<_>>(), [3, 2]);
        // Without that entry there is none, however many stand in the line.
        line.remove(LeaseId(2));
        (5..1000).for_each(|n| line.enqueue(Chain::entry(n, n)));
        assert_eq!(search(&mut OneLine(line), &Chain::owner(999), None), Ok(Search::Clear));
    }
}
