//! One lock: an ordered queue of entries, and the pure rules that say which of them hold it.
//!
//! Every backend shares these rules. The order of the entries is the order in which waiters stand; a grant, once
//! given, stays until its entry is removed, so that a lease never ends early whatever comes before or after it.

use serde::{Deserialize, Serialize};

use crate::fence::Fence;
use crate::id::{LeaseId, OwnerId, SessionId};
use crate::mode::Mode;
use crate::name::LockName;
use crate::session::{DEAD_AFTER, Sessions};
use crate::time::{Duration, Time};

/// One lease's place at one lock.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Entry {
    /// The lease that it belongs to; at most one entry a lease and lock.
    pub lease: LeaseId,
    /// Who holds or waits.
    pub owner: OwnerId,
    /// In which mode.
    pub mode: Mode,
    /// Whether the owner's other entries on this lock let it pass (re-entry, upgrade).
    pub reentrant: bool,
    /// Who keeps it alive, and where a waiter is woken.
    pub session: SessionId,
    /// Whether a grant lives by its own renewals, and its session's heartbeat is no matter to it.
    pub detached: bool,
    /// How long a grant outlives its last renewal.
    pub ttl: Duration,
    /// Who asked: a route or a workload, for people to read.
    pub asked_by: String,
    /// Waiting or holding.
    pub state: State,
}

/// What an entry is doing.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum State {
    /// It stands in the queue.
    Waiting {
        /// Since when.
        since: Time,
        /// Until when at the latest.
        deadline: Time,
        /// For how long a grant may be renewed.
        hold: Duration,
        /// Whether its owner held the lock in a weaker mode when it came: it stands before plain waiters.
        upgrade: bool,
        /// Whether its owner has waited in another place too since it came. Where it has not, a search for cycles knows all
        /// of the owner's waits from here.
        elsewhere: bool,
    },
    /// It holds the lock.
    Held {
        /// Under which fence.
        fence: Fence,
        /// Since when.
        since: Time,
        /// Last renewed; the heartbeat of its session counts as well.
        renewed: Time,
        /// When renewing ends.
        until: Time,
    },
}

impl Entry {
    /// Whether it waits as an upgrade, before plain waiters.
    pub fn is_upgrade(&self) -> bool {
        matches!(self.state, State::Waiting { upgrade: true, .. })
    }

    /// Whether it waits, and its owner waits nowhere else.
    pub fn is_only_wait(&self) -> bool {
        matches!(self.state, State::Waiting { elsewhere: false, .. })
    }

    /// Whether it holds the lock.
    pub fn is_held(&self) -> bool {
        matches!(self.state, State::Held { .. })
    }

    /// The fence that it holds the lock under; none for a waiter.
    pub fn fence(&self) -> Option<Fence> {
        match self.state {
            State::Held { fence, .. } => Some(fence),
            State::Waiting { .. } => None,
        }
    }

    /// When it ends if nothing is heard of it any more: a grant's TTL and hold limit, a waiter's deadline, or sooner
    /// if the waiter's session is dead. Never later than it may live, and never sooner than it must.
    pub fn ends(&self, sessions: &Sessions) -> Time {
        let beat = sessions.member(self.session).map(|member| member.beat);
        let ttl = if bug!(ExpiryTickEarly) { self.ttl.saturating_sub(Duration::from_micros(1)) } else { self.ttl };
        let ttl = if bug!(ExpiryTickLate) { ttl + Duration::from_micros(1) } else { ttl };
        match self.state {
            State::Held { renewed, until, .. } if self.detached && !bug!(DetachedHangsOnSession) => {
                (renewed + ttl).min(until)
            }
            State::Held { renewed, until, .. } if bug!(HeartbeatRenewsNothing) => (renewed + ttl).min(until),
            State::Held { renewed, .. } if bug!(HoldLimitIgnored) => beat.unwrap_or(renewed).max(renewed) + ttl,
            State::Held { renewed, until, .. } => (beat.unwrap_or(renewed).max(renewed) + ttl).min(until),
            State::Waiting { deadline, .. } if bug!(DeadWaiterKept) => deadline,
            State::Waiting { since, deadline, .. } if self.session == SessionId::NONE => deadline.max(since),
            State::Waiting { since, deadline, .. } => (beat.unwrap_or(since).max(since) + DEAD_AFTER).min(deadline),
        }
    }

    /// When it ends at the latest, whoever beats: a grant at its hold limit, a waiter at its deadline.
    pub(crate) fn limit(&self) -> Time {
        match self.state {
            State::Held { until, .. } => until,
            State::Waiting { since, deadline, .. } => deadline.max(since),
        }
    }

    /// The session whose heartbeats keep it, and how long after the last one it ends; none if it ends when it does, whoever
    /// beats.
    pub(crate) fn hangs_on(&self) -> Option<(SessionId, Duration)> {
        let alone = self.session == SessionId::NONE || (self.is_held() && self.detached);
        let patience = if self.is_held() { self.ttl } else { DEAD_AFTER };
        (!alone).then_some((self.session, patience))
    }

    /// Makes sure, for the worker `me` whose entry it is, that it stands as that worker sees it. True if that changed it.
    ///
    /// A grant that nothing but the heartbeat keeps alive any more is renewed: somebody else may have read the heartbeats
    /// before the last one, which came late, and be about to end the grant. Writing the lock makes that one look again,
    /// and what it then finds does not depend on heartbeats. What the worker took under a session that was forgotten
    /// since hangs on its present one from now on, or no heartbeat would keep it.
    pub(crate) fn confirm(&mut self, me: SessionId, now: Time) -> bool {
        let hangs_on_it = self.session != SessionId::NONE && !(self.detached && self.is_held());
        let moves = hangs_on_it && self.session != me && me != SessionId::NONE;
        if moves {
            self.session = me;
        }
        match &mut self.state {
            State::Held { renewed, .. } if moves || *renewed + self.ttl <= now => {
                *renewed = now;
                true
            }
            State::Held { .. } | State::Waiting { .. } => moves,
        }
    }

    /// Whether the two may not hold the lock together.
    fn conflicts(&self, other: &Entry) -> bool {
        let lax = bug!(IntentsIgnored) && self.mode != Mode::Exclusive && other.mode != Mode::Exclusive;
        let compatible = self.mode.compatible(other.mode) || lax;
        !self.passes(other) && (!compatible || self.reads_again(other))
    }

    /// Whether both are shared locks of one owner. Without re-entry it may not even read twice: a writer that queues
    /// between the two would make it wait for itself, so better always than now and then. Intents are not meant: they
    /// announce different locks below.
    fn reads_again(&self, other: &Entry) -> bool {
        self.owner == other.owner && self.mode == Mode::Shared && other.mode == Mode::Shared
    }

    /// Whether both are of one owner who may re-enter.
    fn passes(&self, other: &Entry) -> bool {
        ((self.reentrant && other.reentrant) || bug!(ReentryWhereForbidden)) && self.owner == other.owner
    }
}

/// A lock: its holders and those who wait for it, in the order in which they stand.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Queue {
    /// The lock.
    pub name: LockName,
    entries: Vec<Entry>,
}

impl Queue {
    /// A lock that nobody holds or waits for.
    pub fn new(name: LockName) -> Self {
        Queue { name, entries: Vec::new() }
    }

    /// A lock as it stands elsewhere: its holders, then upgrades, then plain waiters, each in their order.
    pub(crate) fn of(name: LockName, entries: Vec<Entry>) -> Self {
        Queue { name, entries }
    }

    /// Everybody, holders and waiters, in the order in which they stand.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Whether nobody holds or waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entry of a lease.
    pub fn entry(&self, lease: LeaseId) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.lease == lease)
    }

    /// The entry of a lease, to change.
    pub fn entry_mut(&mut self, lease: LeaseId) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.lease == lease)
    }

    /// Those who hold the lock.
    pub fn holders(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| entry.is_held())
    }

    /// Those who wait, in the order in which they stand.
    pub fn waiters(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| !entry.is_held())
    }

    /// What the owner's grants add up to, and the highest fence among them. None if it holds nothing it may re-enter.
    fn held_by(&self, wanted: &Entry) -> Option<(Mode, Fence)> {
        sum_of(self.holders().filter(|held| held.passes(wanted)))
    }

    /// Puts a waiter in its place: behind everybody, or behind the other upgrades if its owner holds the lock in a
    /// weaker mode. Where it stands does not change afterwards, so that no wait-for edge turns round without anyone
    /// asking. Another permit for who has one already is no upgrade: it waits its turn.
    pub fn enqueue(&mut self, mut entry: Entry) {
        let upgrades = self.held_by(&entry).is_some_and(|(mode, _)| !mode.covers(entry.mode));
        if let State::Waiting { upgrade, .. } = &mut entry.state {
            *upgrade = upgrades;
        }
        let plain = |entry: &Entry| matches!(entry.state, State::Waiting { upgrade: false, .. });
        let ahead = upgrades && !bug!(UpgradeBehindWaiters);
        let place = if ahead || bug!(Lifo) { self.entries.iter().position(plain) } else { None };
        self.entries.insert(place.unwrap_or(self.entries.len()), entry);
    }

    /// Puts back a grant of an earlier table, under the fence that it had. Holders that it conflicts with and whose fence is
    /// lower go: it was granted after they had ended. False, and nothing changed, if one has a higher fence, since then the
    /// same is true the other way round; true also where the grant is there already.
    pub fn restore(&mut self, entry: Entry, permits: u32) -> bool {
        if let Some(known) = self.entry(entry.lease) {
            return known.is_held();
        }
        let mine = entry.fence();
        let mut rivals: Vec<(Option<Fence>, LeaseId)> = if permits > 1 {
            self.holders().map(|held| (held.fence(), held.lease)).collect()
        } else {
            let rivals = self.holders().filter(|held| held.conflicts(&entry));
            rivals.map(|held| (held.fence(), held.lease)).collect()
        };
        // Where permits are counted only those too many are rivals: the oldest grants.
        rivals.sort_unstable();
        let room = if permits > 1 { usize::try_from(permits).unwrap_or(usize::MAX).saturating_sub(1) } else { 0 };
        rivals.truncate(rivals.len().saturating_sub(room));
        if bug!(RestoredBesideRival) {
            rivals.clear();
        }
        if rivals.iter().any(|(fence, _)| *fence >= mine) && !bug!(LowerFenceWins) {
            return false;
        }
        self.entries.retain(|held| !rivals.iter().any(|(_, lease)| *lease == held.lease));
        let place = self.entries.iter().position(|other| !other.is_held()).unwrap_or(self.entries.len());
        self.entries.insert(place, entry);
        true
    }

    /// Removes the entry of a lease, whether it holds or waits.
    pub fn remove(&mut self, lease: LeaseId) -> Option<Entry> {
        let leaves = |entry: &Entry| entry.lease == lease || (bug!(ForeignRelease) && entry.is_held());
        let at = self.entries.iter().position(leaves)?;
        Some(self.entries.remove(at))
    }

    /// Removes and gives back everybody who holds the lock.
    pub fn evict(&mut self) -> Vec<Entry> {
        self.entries.extract_if(.., |entry| entry.is_held()).collect()
    }

    /// Whether [`Queue::reap`] would remove anything.
    pub fn has_ended(&self, sessions: &Sessions, now: Time) -> bool {
        self.entries.iter().any(|entry| entry.ends(sessions) <= now)
    }

    /// Removes and gives back what has ended: expired grants, waiters past their deadline, waiters of dead sessions.
    pub fn reap(&mut self, sessions: &Sessions, now: Time) -> Vec<Entry> {
        self.entries.extract_if(.., |entry| entry.ends(sessions) <= now).collect()
    }

    /// Who stands in the way of a waiter: every conflicting holder and every conflicting waiter before it. These are
    /// its wait-for edges. Empty for a holder, and where there is more than one permit, since such a wait is for any
    /// of several holders and not for one.
    pub fn blockers(&self, lease: LeaseId, permits: u32) -> impl Iterator<Item = &Entry> {
        let place = self.entries.iter().position(|entry| entry.lease == lease);
        let ahead = place.into_iter().flat_map(move |place| self.ahead(place, permits));
        ahead.filter_map(|(_, other, in_the_way)| in_the_way.then_some(other))
    }

    /// Everybody who holds the lock or stands before the waiter at `place`: where, who, and whether it is in the way of
    /// that waiter (see [`Queue::blockers`]).
    pub fn ahead(&self, place: usize, permits: u32) -> impl Iterator<Item = (usize, &Entry, bool)> {
        let waiter = self.entries.get(place);
        let waiter = waiter.filter(|waiter| permits <= 1 && !waiter.is_held() && !self.re_enters(waiter));
        let before = if bug!(NoQueueEdges) { 0 } else { place };
        let ahead = self.entries.iter().enumerate().filter(move |(at, other)| *at < before || other.is_held());
        ahead.map(move |(at, other)| (at, other, waiter.is_some_and(|waiter| waiter.conflicts(other))))
    }

    /// Whether the owner already has all that the entry asks for.
    fn re_enters(&self, entry: &Entry) -> bool {
        self.held_by(entry).is_some_and(|(mode, _)| mode.covers(entry.mode))
    }

    /// Where those stand who hold the lock.
    fn held_places(&self) -> Vec<usize> {
        self.entries.iter().enumerate().filter(|(_, entry)| entry.is_held()).map(|(at, _)| at).collect()
    }

    /// Grants the lock to every waiter whose turn it is, and gives back their leases in the order of the grants.
    ///
    /// Strict FIFO: a waiter is granted if it conflicts with no holder and with no waiter before it; so neighbouring
    /// shared waiters are granted together and nobody overtakes. A re-entry is always granted. It gets the fence
    /// that its owner has already: it is the same critical section, and were its fence higher, a resource that had
    /// seen it would refuse the rest of that section. Every other grant raises `highest`, the highest fence that was
    /// ever given here, never below `floor` (see [`Fence::next`]).
    pub fn settle(&mut self, permits: u32, now: Time, floor: Fence, highest: &mut Fence) -> Vec<LeaseId> {
        let most = if bug!(OneGrantedOfTwo) { 1 } else { usize::MAX };
        let mut held = self.held_places();
        let mut granted = Vec::new();
        for at in 0..self.entries.len() {
            if granted.len() < most
                && let Some(lease) = self.settle_at(at, &held, permits, now, floor, highest)
            {
                held.push(at);
                granted.push(lease);
            }
        }
        granted
    }

    /// As [`Queue::settle`], for one waiter alone. True if it was granted the lock.
    pub fn settle_one(&mut self, lease: LeaseId, permits: u32, now: Time, floor: Fence, highest: &mut Fence) -> bool {
        let (place, held) = (self.entries.iter().position(|entry| entry.lease == lease), self.held_places());
        place.and_then(|at| self.settle_at(at, &held, permits, now, floor, highest)).is_some()
    }

    /// `held`: where those stand who hold the lock, so that not everybody is asked for each waiter.
    fn settle_at(
        &mut self,
        at: usize,
        held: &[usize],
        permits: u32,
        now: Time,
        floor: Fence,
        highest: &mut Fence,
    ) -> Option<LeaseId> {
        let re_entry = self.turn(at, self.entries.get(at)?, held, permits)?;
        let entry = self.entries.get_mut(at)?;
        let State::Waiting { hold, .. } = entry.state else { return None };
        let floor = if bug!(FenceResetOnRestart) { Fence(0) } else { floor };
        let fence = re_entry.filter(|_| !bug!(ReentryNewFence)).unwrap_or_else(|| {
            *highest = highest.next(floor);
            *highest
        });
        entry.state = State::Held { fence, since: now, renewed: now, until: now + hold };
        Some(entry.lease)
    }

    /// Whether it is the turn of the waiter at `at`; with the fence that it re-enters under, if it re-enters.
    fn turn(&self, at: usize, waiter: &Entry, held: &[usize], permits: u32) -> Option<Option<Fence>> {
        if waiter.is_held() {
            return None;
        }
        let mut before = self.entries.iter().take(at);
        if permits > 1 {
            let permits = permits + u32::from(bug!(PermitsOffByOne));
            let free = held.len() < usize::try_from(permits).unwrap_or(usize::MAX) && before.all(Entry::is_held);
            return free.then_some(None);
        }
        let holders = || held.iter().filter_map(|at| self.entries.get(*at));
        if let Some((mode, fence)) = sum_of(holders().filter(|held| held.passes(waiter)))
            && mode.covers(waiter.mode)
        {
            return Some(Some(fence));
        }
        let barges = bug!(ReaderBarging) && waiter.mode == Mode::Shared;
        let free = !holders().any(|held| held.conflicts(waiter)) && (barges || !before.any(|it| it.conflicts(waiter)));
        free.then_some(None)
    }
}

/// What grants add up to, and the highest fence among them. None if there are none.
fn sum_of<'a>(grants: impl Iterator<Item = &'a Entry>) -> Option<(Mode, Fence)> {
    grants.fold(None, |sum, held| match (sum, &held.state) {
        (None, State::Held { fence, .. }) => Some((held.mode, *fence)),
        (Some((mode, highest)), State::Held { fence, .. }) => Some((mode.join(held.mode), highest.max(*fence))),
        (sum, State::Waiting { .. }) => sum,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use Mode::{Exclusive, IntentExclusive, IntentShared, Shared};
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    const NOW: Time = Time::from_micros(1_000_000);

    struct Lock {
        queue: Queue,
        permits: u32,
        highest: Fence,
        leases: u128,
    }

    impl Lock {
        fn new(permits: u32) -> Self {
            let queue = Queue::new(LockName::parse("l").unwrap());
            Lock { queue, permits, highest: Fence(0), leases: 0 }
        }

        fn ask_as(&mut self, owner: &str, mode: Mode, reentrant: bool) -> LeaseId {
            self.leases += 1;
            let lease = LeaseId(self.leases);
            let second = Duration::from_secs(1);
            let state = State::Waiting {
                since: NOW,
                deadline: NOW + second,
                hold: second * 60,
                upgrade: false,
                elsewhere: false,
            };
            self.queue.enqueue(Entry {
                lease,
                owner: OwnerId::new(owner).unwrap(),
                mode,
                reentrant,
                session: SessionId::NONE,
                detached: false,
                ttl: second,
                asked_by: String::new(),
                state,
            });
            self.settle();
            lease
        }

        fn ask(&mut self, owner: &str, mode: Mode) -> LeaseId {
            self.ask_as(owner, mode, true)
        }

        fn settle(&mut self) -> Vec<LeaseId> {
            self.queue.settle(self.permits, NOW, Fence(0), &mut self.highest)
        }

        fn free(&mut self, lease: LeaseId) -> Vec<LeaseId> {
            self.queue.remove(lease).unwrap();
            self.settle()
        }

        fn holds(&self, lease: LeaseId) -> bool {
            self.queue.entry(lease).unwrap().is_held()
        }

        fn fence(&self, lease: LeaseId) -> Fence {
            match self.queue.entry(lease).unwrap().state {
                State::Held { fence, .. } => fence,
                State::Waiting { .. } => panic!("waits"),
            }
        }

        fn blockers(&self, lease: LeaseId) -> Vec<LeaseId> {
            self.queue.blockers(lease, self.permits).map(|entry| entry.lease).collect()
        }
    }

    #[test]
    fn readers_do_not_overtake_a_writer() {
        let mut lock = Lock::new(1);
        let r1 = lock.ask("r1", Shared);
        let w = lock.ask("w", Exclusive);
        let r2 = lock.ask("r2", Shared);
        let r3 = lock.ask("r3", Shared);
        assert!(lock.holds(r1) && !lock.holds(w) && !lock.holds(r2));
        assert_eq!(lock.blockers(w), [r1]);
        assert_eq!(lock.blockers(r2), [w]);
        assert_eq!(lock.free(r1), [w]);
        assert_eq!(lock.free(w), [r2, r3], "neighbouring readers are granted together");
    }

    #[test]
    fn reentry_is_immediate_counted_and_keeps_its_fence() {
        let mut lock = Lock::new(1);
        let outer = lock.ask("a", Exclusive);
        let other = lock.ask("b", Exclusive);
        let inner = lock.ask("a", Shared);
        assert!(lock.holds(inner) && !lock.holds(other));
        assert_eq!(lock.fence(inner), lock.fence(outer));
        assert_eq!(lock.free(outer), [], "the inner lease still holds, in its weaker mode");
        assert_eq!(lock.free(inner), [other]);
        assert!(lock.fence(other) > Fence(1));
    }

    #[test]
    fn without_reentry_of_both_an_owner_waits_for_itself() {
        for (one, other) in [(false, false), (false, true), (true, false)] {
            let mut lock = Lock::new(1);
            let first = lock.ask_as("a", Exclusive, one);
            let second = lock.ask_as("a", Exclusive, other);
            assert!(!lock.holds(second));
            assert_eq!(lock.blockers(second), [first]);
        }
    }

    #[test]
    fn a_sole_holder_upgrades_at_once_and_a_shared_one_goes_first() {
        let mut lock = Lock::new(1);
        let a = lock.ask("a", Shared);
        let plain = lock.ask("p", Exclusive);
        let upgrade = lock.ask("a", Exclusive);
        assert!(lock.holds(upgrade), "sole holder");
        assert!(lock.fence(upgrade) > lock.fence(a), "an upgrade is a new grant");
        lock.free(upgrade);
        assert!(!lock.holds(plain), "a still reads");

        let mut lock = Lock::new(1);
        let a = lock.ask("a", Shared);
        let b = lock.ask("b", Shared);
        let plain = lock.ask("p", Exclusive);
        let upgrade = lock.ask("a", Exclusive);
        assert_eq!(lock.blockers(upgrade), [b]);
        assert_eq!(lock.blockers(plain), [a, b, upgrade]);
        assert_eq!(lock.free(b), [upgrade]);
    }

    #[test]
    fn a_downgrade_wakes_who_fits() {
        let mut lock = Lock::new(1);
        let _reads = lock.ask("a", Shared);
        let writes = lock.ask("a", Exclusive);
        let reader = lock.ask("b", Shared);
        assert!(!lock.holds(reader));
        assert_eq!(lock.free(writes), [reader]);
    }

    #[test]
    fn intents_meet_on_the_parent_only_where_they_must() {
        let mut lock = Lock::new(1);
        let ix = lock.ask("a", IntentExclusive);
        let is = lock.ask("b", IntentShared);
        let other_ix = lock.ask("c", IntentExclusive);
        assert!(lock.holds(ix) && lock.holds(is) && lock.holds(other_ix));
        let shared = lock.ask("d", Shared);
        assert_eq!(lock.blockers(shared), [ix, other_ix]);
    }

    #[test]
    fn permits_are_counted_and_draw_no_edge() {
        let mut lock = Lock::new(2);
        let a = lock.ask("a", Exclusive);
        let again = lock.ask("a", Exclusive);
        let b = lock.ask("b", Exclusive);
        let c = lock.ask("c", Exclusive);
        assert!(lock.holds(a) && lock.holds(again), "re-entry takes a permit of its own");
        assert_ne!(lock.fence(a), lock.fence(again));
        assert!(lock.blockers(b).is_empty());
        assert_eq!(lock.free(a), [b]);
        assert_eq!(lock.free(again), [c]);
    }

    #[test]
    fn what_has_ended_is_reaped_at_its_moment_and_not_before() {
        let mut lock = Lock::new(1);
        let a = lock.ask("a", Exclusive);
        let b = lock.ask("b", Exclusive);
        let none = Sessions::default();
        let end = NOW + Duration::from_secs(1);
        assert!(!lock.queue.has_ended(&none, end - Duration::from_micros(1)));
        let gone: Vec<_> = lock.queue.reap(&none, end).into_iter().map(|entry| entry.lease).collect();
        assert_eq!(gone, [a, b], "the grant by its TTL, the waiter by its deadline");
    }

    #[test]
    fn a_heartbeat_renews_but_not_past_the_hold_limit() {
        let mut sessions = Sessions::default();
        let session = sessions.join(0, NOW);
        let mut lock = Lock::new(1);
        let a = lock.ask("a", Exclusive);
        lock.queue.entry_mut(a).unwrap().session = session;
        let later = NOW + Duration::from_secs(30);
        assert!(sessions.beat(session, 0, Default::default(), later));
        assert_eq!(lock.queue.entry(a).unwrap().ends(&sessions), later + Duration::from_secs(1));
        let last = NOW + Duration::from_millis(59_900);
        assert!(sessions.beat(session, 0, Default::default(), last));
        assert_eq!(lock.queue.entry(a).unwrap().ends(&sessions), NOW + Duration::from_secs(60));
    }
}
