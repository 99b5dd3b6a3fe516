//! What must be so in every world, and of every step; and what there is to be seen.
//!
//! It looks at the records and at what callers were told, and asks the shipped code for nothing but what a lock or a lease
//! is like now.

use interlock_core::lease::Renewed;
use interlock_core::{Entry, Fence, LeaseId};

use super::Space;
use super::authority;
use super::world::{LOCKS, Laws, Progress, Shelf, World, proxy_of};

macro_rules! sights {
    ($($name:ident $about:literal,)+) => {
        /// What there is to be seen on the way.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Sight {
            $($name,)+
        }

        impl Sight {
            /// All there are, with what they are and whether a search has seen them.
            pub const ALL: &[(Sight, &str, fn(&Space, &World) -> bool)] =
                &[$((Sight::$name, $about, |space, _| space.saw(Sight::$name)),)+];
        }
    };
}

sights! {
    HandOver "a lock is handed over",
    GrantedLater "a waiter is granted its lock",
    Deadlock "a deadlock is refused",
    WaitTimeout "a wait runs out",
    Unavailable "a request is given up without an answer",
    Overtaken "a release overtakes its request and wins",
    Left "a caller that goes leaves the queue",
    Watched "a request that came twice watches the first",
    FoundAgain "who asks again finds its lease",
    AskedAnew "what is over is asked for by another name",
    ReleasedAgain "a release is repeated",
    Saved "a renewal saves a lease over the restart",
    StaleBack "a receipt brings back what nobody relies on",
    StaleLoses "a stale receipt loses to a later grant",
    StaleEvicted "a later grant evicts what a stale receipt brought back",
    Expired "a lease expires and another gets the lock",
    Lost "a lease is lost",
    LostByOwnClock "a proxy loses a lease by its own clock",
    LostBeforeTold "a lease is lost before its caller was told of it",
    HoldLimit "a lease comes to its hold limit",
    FenceAheadOfClock "a fence rises though the clock stepped back",
}

impl Sight {
    pub fn of_refusal(slug: &str) -> Option<Sight> {
        match slug {
            "deadlock" => Some(Sight::Deadlock),
            "wait-timeout" => Some(Sight::WaitTimeout),
            "backend-unavailable" => Some(Sight::Unavailable),
            _ => None,
        }
    }
}

/// What the authority does, and for which lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// It may grant this lease.
    Grants(LeaseId),
    /// It may bring this one back.
    Renews(LeaseId),
    /// It ends this one.
    Ends(LeaseId),
    KeepsHouse,
}

fn fence(entry: &Entry) -> Fence {
    entry.fence().unwrap_or_default()
}

fn conflict(one: &Entry, other: &Entry) -> bool {
    one.owner != other.owner && !one.mode.compatible(other.mode)
}

impl World {
    fn entries<'a>(&self, shelf: &'a Shelf, lock: usize) -> &'a [Entry] {
        shelf.locks[lock].queues().first().map_or(&[], |queue| queue.entries())
    }

    /// Those who hold a lock now.
    fn holders(&self, lock: usize) -> impl Iterator<Item = &Entry> {
        let shelf = &self.authority.shelf;
        self.entries(shelf, lock).iter().filter(|it| it.is_held() && it.ends(&shelf.sessions) > self.now)
    }

    fn in_grace(&self, laws: &Laws) -> bool {
        !self.authority.shelf.sessions.grace_left(laws.rules.grace, self.now).is_zero()
    }

    /// The leases that their holders rely on, with what they are for.
    fn believed<'a>(&'a self, laws: &'a Laws) -> impl Iterator<Item = (usize, LeaseId, super::world::Script)> {
        self.proxies.iter().enumerate().flat_map(move |(at, proxy)| {
            proxy.requests.iter().zip(&laws.scripts[at]).filter_map(move |(progress, script)| match progress {
                Progress::Held { lease } if proxy.client.holds(*lease, self.now) => Some((at, *lease, *script)),
                _ => None,
            })
        })
    }

    /// No two proxies rely on leases that conflict.
    pub fn beliefs_agree(&self, laws: &Laws) -> bool {
        let mut ours = self.believed(laws);
        ours.all(|(at, _, script)| {
            let mut others = self.believed(laws).filter(|(other, _, _)| *other != at);
            others.all(|(_, _, other)| {
                script.iter().all(|(lock, mode)| other.iter().all(|(o, m)| o != lock || mode.compatible(*m)))
            })
        })
    }

    /// What a proxy relies on, the authority knows to be held; or it has just started and grants nothing.
    pub fn beliefs_are_true(&self, laws: &Laws) -> bool {
        self.in_grace(laws)
            || self.believed(laws).all(|(_, lease, script)| {
                script.iter().all(|(lock, _)| self.holders(*lock).any(|held| held.lease == lease))
            })
    }

    /// No two hold a lock who may not.
    pub fn is_exclusive(&self) -> bool {
        (0..LOCKS).all(|lock| self.holders(lock).all(|one| !self.holders(lock).any(|other| conflict(one, other))))
    }

    /// Every caller is told what became of its request, in time.
    pub fn tells_in_time(&self) -> bool {
        let mut all = self.proxies.iter().flat_map(|proxy| &proxy.requests);
        all.all(|progress| !matches!(progress, Progress::Asked { told_by, .. } if *told_by < self.now))
    }

    /// A proxy whose requests are over comes to rest.
    pub fn comes_to_rest(&self) -> bool {
        self.proxies.iter().all(|proxy| {
            let under_way = |it: &Progress| matches!(it, Progress::Asked { .. } | Progress::Held { .. });
            proxy.client.is_idle() || proxy.requests.iter().any(under_way) || self.now <= proxy.idle_by
        })
    }

    /// Whoever stands in a queue has a stream that sees to it.
    pub fn waiters_are_driven(&self) -> bool {
        let shelf = &self.authority.shelf;
        let driven = |lease| self.authority.streams.iter().any(|it| it.parked.lease() == lease && it.parked.drives());
        let records: usize = shelf.leases.iter().map(|bucket| bucket.count().0).sum();
        let drivers = self.authority.streams.iter().filter(|it| it.parked.drives()).count();
        records <= drivers
            && (0..LOCKS).all(|lock| {
                let mut waiters = self.entries(shelf, lock).iter().filter(|it| !it.is_held());
                waiters.all(|it| driven(it.lease) || it.ends(&shelf.sessions) <= self.now)
            })
    }

    /// What holds a lock can be renewed and given back: the records know of it.
    pub fn holders_are_known(&self, laws: &Laws) -> bool {
        (0..LOCKS).all(|lock| {
            self.holders(lock).all(|held| {
                self.authority.streams.iter().any(|it| it.parked.lease() == held.lease && it.parked.drives())
                    || authority::get(self, laws, held.lease).is_some()
            })
        })
    }

    /// Where nobody has anything to do any more, time and housekeeping leave nothing.
    pub fn ends_empty(&self, laws: &Laws) -> bool {
        if !self.is_done() {
            return true;
        }
        let shelf = authority::outlive(self, laws).shelf;
        let locks = shelf.locks.iter().all(|bucket| bucket.queues().is_empty());
        let owners = shelf.owners.iter().all(|bucket| bucket.holdings().is_empty());
        locks && owners && shelf.leases.iter().all(|bucket| bucket.count() == (0, 0, 0))
    }
}

/// Looks at what an operation of the authority has made of the records.
pub fn worked(world: &mut World, laws: &Laws, before: &Shelf, work: Work, sights: &mut Vec<Sight>) {
    let mut fault = None;
    let mut highest = world.memory.highest;
    for (lock, highest) in highest.iter_mut().enumerate() {
        let (old, new) = (world.entries(before, lock), world.entries(&world.authority.shelf, lock));
        let held_in = |all: &[Entry], lease| all.iter().any(|it| it.lease == lease && it.is_held());
        for entry in new.iter().filter(|it| it.is_held() && !held_in(old, it.lease)) {
            let ended = world.memory.ended.iter().any(|(lease, _)| *lease == entry.lease);
            let again =
                new.iter().any(|it| it.lease != entry.lease && it.owner == entry.owner && fence(it) == fence(entry));
            let rises = fence(entry) > *highest;
            let back = work == Work::Renews(entry.lease);
            let wrong = match (world.in_grace(laws), back) {
                _ if ended => Some("what is over is granted"),
                (true, false) => Some("something is granted in the grace"),
                (false, true) => Some("a receipt is taken after the grace"),
                (true, true) if rises => Some("a receipt brings back what there was not"),
                (false, false) if !rises && !again => Some("a fence does not rise"),
                _ => None,
            };
            fault = fault.or(wrong);
            if !back {
                let ahead = world.memory.stepped_back && !rises_by_clock(world, *highest);
                sights.extend(ahead.then_some(Sight::FenceAheadOfClock));
                let expired = |it: &&Entry| it.is_held() && it.owner != entry.owner && !held_in(new, it.lease);
                for gone in old.iter().filter(expired) {
                    let over = gone.ends(&before.sessions) <= world.now;
                    sights.push(if over { Sight::Expired } else { Sight::HandOver });
                }
            }
            *highest = (*highest).max(fence(entry));
        }
        let sessions = &world.authority.shelf.sessions;
        let has_ended = |it: &Entry| it.ends(sessions) <= world.now;
        let dead = |lease| old.iter().any(|it| it.lease == lease && it.is_held() && has_ended(it));
        if new.iter().any(|it| it.is_held() && !has_ended(it) && dead(it.lease)) {
            fault = fault.or(Some("a lease that has ended is renewed"));
        }
        for entry in old.iter().filter(|it| it.is_held() && it.ends(&before.sessions) > world.now) {
            if held_in(new, entry.lease) || work == Work::Ends(entry.lease) {
                continue;
            }
            let evicts = |it: &Entry| work == Work::Renews(it.lease) && conflict(it, entry) && fence(it) > fence(entry);
            if new.iter().any(evicts) {
                sights.push(Sight::StaleEvicted);
            } else {
                fault = fault.or(Some("a lease is ended before its time"));
            }
        }
    }
    world.memory.highest = highest;
    if let Some(fault) = fault {
        world.memory.fault.get_or_insert(fault);
    }
}

/// Looks at the answer to a renewal.
pub fn renewed(world: &World, laws: &Laws, lease: LeaseId, answer: Renewed, sights: &mut Vec<Sight>) {
    if !world.in_grace(laws) {
        return;
    }
    let is_believed = world.believed(laws).any(|(_, believed, _)| believed == lease);
    let is_ended = world.memory.ended.iter().any(|(ended, _)| *ended == lease);
    let rival = |held: &Entry| proxy_of(held.lease) != proxy_of(lease);
    sights.extend(match answer {
        Renewed::Renewed { .. } if is_believed => Some(Sight::Saved),
        Renewed::Renewed { .. } => Some(Sight::StaleBack),
        Renewed::Lost => {
            let has_rival = (0..LOCKS).any(|lock| world.holders(lock).any(rival));
            (has_rival && !is_ended).then_some(Sight::StaleLoses)
        }
    });
}

/// Whether the clock alone would make the next fence of a lock rise.
fn rises_by_clock(world: &World, highest: Fence) -> bool {
    Fence::floor(world.wall) > highest
}
