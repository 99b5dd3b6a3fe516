//! One state of the table as the search keeps it: who stands where, without times, fences and lease identities.
//!
//! The rules that it is held against are here too, in the words of the contract and not with the core's functions.
//! What must not be here: anything that calls the core.

/// Most requests that are under way at once, over all owners.
pub const MOST: usize = 8;
/// Most locks.
pub const LOCKS: usize = 3;

/// What a request is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stand {
    /// It waits behind everybody who came before.
    Waits,
    /// It waits before plain waiters.
    WaitsToUpgrade,
    /// The lock is its own, and it has not been told.
    Granted,
    /// It holds the lock.
    Holds,
    /// It waits as far as it knows, but stands in no queue any more.
    LostWait,
    /// It holds as far as it knows, but the lock is no longer its own.
    LostLease,
}

/// One request at one lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot {
    pub owner: usize,
    pub exclusive: bool,
    pub stand: Stand,
    /// Whether the index by owner names it.
    pub listed: bool,
    /// Its time is up, and nobody has looked yet. Of a wait without a place: its deadline has passed.
    pub ended: bool,
    /// Of a wait with a place: whether it says that its owner waits elsewhere too.
    pub marked: bool,
}

impl Slot {
    pub fn waits(&self) -> bool {
        matches!(self.stand, Stand::Waits | Stand::WaitsToUpgrade)
    }

    pub fn has_lock(&self) -> bool {
        matches!(self.stand, Stand::Granted | Stand::Holds)
    }

    /// Whether the lock knows of it.
    pub fn stands(&self) -> bool {
        self.waits() || self.has_lock()
    }

    /// Whether it counts in the rules: it stands at the lock and its time is not up.
    fn counts(&self) -> bool {
        self.stands() && !self.ended
    }

    fn conflicts(&self, other: &Slot) -> bool {
        self.owner != other.owner && (self.exclusive || other.exclusive)
    }

    /// All of it in one number that is never 0, with its owner renamed.
    fn code(&self, renaming: &[usize]) -> u16 {
        let flags = [self.exclusive, self.listed, self.ended, self.marked];
        let flags = flags.iter().fold(1, |bits, flag| bits << 1 | u16::from(*flag));
        flags << 8 | (self.stand as u16) << 4 | renaming[self.owner] as u16
    }
}

/// The requests of one lock: those that stand at it, in their order, and after them those that lost it.
pub type Slots = Vec<Slot>;

/// How many holders stand before everybody else.
fn holding(slots: &[Slot]) -> usize {
    slots.iter().position(|slot| !slot.has_lock()).unwrap_or(slots.len())
}

/// How many of them stand at the lock.
fn standing(slots: &[Slot]) -> usize {
    slots.iter().position(|slot| !slot.stands()).unwrap_or(slots.len())
}

/// All locks; and what was seen to go wrong on the way here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    pub locks: Vec<Slots>,
    pub fault: Option<&'static str>,
}

/// What the contract says of one more request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Granted,
    Waits,
    Deadlock,
}

impl State {
    pub fn new(locks: usize) -> Self {
        State { locks: vec![Vec::new(); locks], fault: None }
    }

    pub fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.locks.iter().flatten()
    }

    pub fn requests(&self, owner: usize) -> usize {
        self.slots().filter(|slot| slot.owner == owner).count()
    }

    /// The state with those who have a lock before those who wait for it.
    pub fn holders_first(mut self) -> Self {
        self.locks.iter_mut().for_each(|slots| slots.sort_by_key(|slot| (!slot.has_lock(), !slot.stands())));
        self
    }

    /// The state with its owners and its locks renamed, so that all states that differ by names only become one: the
    /// least of all renamings. Holders that stand before everybody else have no order, nor have those that lost their
    /// place.
    pub fn canonical(mut self, renamings: &[Vec<usize>]) -> Self {
        let pack = |renaming: &[usize]| {
            let mut words = [0_u128; LOCKS];
            let mut order: [usize; LOCKS] = std::array::from_fn(|lock| lock);
            for (word, slots) in words.iter_mut().zip(&self.locks) {
                let mut codes = [0_u16; MOST];
                let codes = &mut codes[..slots.len()];
                for (code, slot) in codes.iter_mut().zip(slots) {
                    *code = slot.code(renaming);
                }
                codes[standing(slots)..].sort_unstable();
                codes[..holding(slots)].sort_unstable();
                *word = codes.iter().fold(0, |word, code| word << 16 | u128::from(*code));
            }
            order.sort_unstable_by_key(|lock| words[*lock]);
            words.sort_unstable();
            (words, order)
        };
        let packed = renamings.iter().map(|renaming| (pack(renaming), renaming));
        let Some(((_, order), renaming)) = packed.min_by_key(|((words, _), _)| *words) else { return self };
        let mut locks = Vec::with_capacity(self.locks.len());
        for lock in order {
            let Some(slots) = self.locks.get_mut(lock) else { continue };
            let mut slots = std::mem::take(slots);
            let (holding, standing) = (holding(&slots), standing(&slots));
            slots[standing..].sort_unstable_by_key(|slot| slot.code(renaming));
            slots[..holding].sort_unstable_by_key(|slot| slot.code(renaming));
            slots.iter_mut().for_each(|slot| slot.owner = renaming[slot.owner]);
            locks.push(slots);
        }
        State { locks, fault: self.fault }
    }

    /// No two conflicting holders.
    pub fn is_exclusive(&self) -> bool {
        let holders =
            |slots: &'_ Slots| slots.iter().filter(|it| it.has_lock() && !it.ended).copied().collect::<Vec<_>>();
        self.locks.iter().map(holders).all(|held| !held.iter().any(|a| held.iter().any(|b| a.conflicts(b))))
    }

    /// Who waits for whom, as a set of owners for each owner.
    fn edges(&self) -> [u8; 8] {
        let mut edges = [0; 8];
        for slots in &self.locks {
            for (at, waiter) in slots.iter().enumerate().filter(|(_, slot)| slot.waits() && !slot.ended) {
                let before = |place: usize, other: &Slot| other.counts() && (other.has_lock() || place < at);
                for (_, other) in slots.iter().enumerate().filter(|(place, other)| before(*place, other)) {
                    if waiter.conflicts(other) {
                        edges[waiter.owner] |= 1 << other.owner;
                    }
                }
            }
        }
        edges
    }

    /// Nobody waits for itself, by whatever way.
    pub fn is_acyclic(&self) -> bool {
        let mut reach = self.edges();
        for via in 0..reach.len() {
            for from in 0..reach.len() {
                if reach[from] & 1 << via != 0 {
                    reach[from] |= reach[via];
                }
            }
        }
        (0..reach.len()).all(|owner| reach[owner] & 1 << owner == 0)
    }

    /// Every waiter has somebody in its way, and the first of each queue a holder. At a lock where somebody's time is
    /// up, nobody has looked since.
    pub fn forgets_nobody(&self) -> bool {
        self.locks.iter().filter(|slots| !slots.iter().any(|slot| slot.stands() && slot.ended)).all(|slots| {
            let mut waiters = slots.iter().enumerate().filter(|(_, slot)| slot.waits());
            let held = |waiter: &Slot| slots.iter().any(|held| held.has_lock() && held.conflicts(waiter));
            waiters.next().is_none_or(|(_, first)| held(first))
                && waiters.all(|(at, it)| held(it) || slots[..at].iter().any(|o| o.waits() && o.conflicts(it)))
        })
    }

    /// The index by owner names every wait.
    pub fn lists_every_wait(&self) -> bool {
        self.slots().all(|slot| slot.listed || !slot.waits())
    }

    /// The locks without the marks: a wait stays marked after the other one is over, since that costs a search a look and
    /// no more.
    pub fn unmarked(&self) -> Vec<Slots> {
        let unmarked = |slots: &Slots| slots.iter().map(|slot| Slot { marked: false, ..*slot }).collect();
        self.locks.iter().map(unmarked).collect()
    }

    /// The state without the marks of those that wait at one place only, by now.
    pub fn forget_old_marks(mut self) -> Self {
        let waiting: Vec<usize> = self.slots().filter(|slot| slot.waits()).map(|slot| slot.owner).collect();
        let once = |owner: usize| waiting.iter().filter(|other| **other == owner).count() == 1;
        self.locks.iter_mut().flatten().for_each(|slot| slot.marked &= !once(slot.owner));
        self
    }

    /// Who waits at several places says so at each of them.
    pub fn marks_every_second_wait(&self) -> bool {
        let waits = || self.slots().filter(|slot| slot.waits());
        waits().all(|slot| slot.marked || waits().filter(|other| other.owner == slot.owner).count() == 1)
    }

    /// What has to become of one more request. No time may be up at its lock.
    pub fn verdict(&self, lock: usize, owner: usize, exclusive: bool) -> Verdict {
        let slots = &self.locks[lock];
        let own = || slots.iter().filter(|slot| slot.owner == owner && slot.has_lock());
        if own().any(|held| held.exclusive || !exclusive) {
            return Verdict::Granted;
        }
        let upgrades = own().next().is_some();
        let stand = if upgrades { Stand::WaitsToUpgrade } else { Stand::Waits };
        let mut asks = Slot { owner, exclusive, stand, listed: true, ended: false, marked: false };
        let place = slots.iter().position(|slot| upgrades && slot.stand == Stand::Waits || !slot.stands());
        let place = place.unwrap_or(slots.len());
        let in_way =
            |(at, other): (usize, &Slot)| asks.conflicts(other) && (other.has_lock() || other.waits() && at < place);
        let blocked = slots.iter().enumerate().any(in_way);
        if !blocked {
            asks.stand = Stand::Holds;
        }
        let mut then = self.clone();
        then.locks[lock].insert(place, asks);
        match (then.is_acyclic(), blocked) {
            (false, _) => Verdict::Deadlock,
            (true, true) => Verdict::Waits,
            (true, false) => Verdict::Granted,
        }
    }
}
