//! The shipped table as a state machine: a [`State`] is turned into records, one operation of a fresh [`Table`] runs
//! on them, and what they then say is the next state.
//!
//! A request under way cannot be copied, so each step makes the one that it needs anew, on records of its own, with
//! what the step before left it: nothing in it depends on its past but what the state keeps. Moments are of four kinds
//! only: long past, now, and the ends of what is over and of what is not.

use std::any::Any;
use std::cell::RefCell;

use interlock_core::store::{Item, LockBucket, OwnerBucket, Record, Version};
use interlock_core::{
    Census, Classes, Duration, Entry, Fence, Lease, LeaseId, Limits, LockName, Mode, Outcome, OwnerId, Pending,
    Request, Rules, Scene, SessionId, Sessions, State as At, Store, StoreError, Table, Time, Want,
};

use super::after::{After, Sight};
use super::state::{MOST, Slot, Stand, State};

const THEN: Time = Time::from_micros(1_000_000);
pub const NOW: Time = Time::from_micros(100_000_000);
const SHORT: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_secs(1000);

/// The request that comes in.
pub const NEW: LeaseId = LeaseId(u128::MAX);
/// Higher than any fence that a state is given.
pub const HIGHEST: Fence = Fence(1000);

/// One step of somebody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// One more request.
    Ask { owner: usize, lock: usize, exclusive: bool },
    /// A lease is given back.
    Release { lock: usize, at: usize },
    /// Whoever waited has gone.
    Cancel { lock: usize, at: usize },
    /// A request that waits is woken, or looks for itself.
    Poll { lock: usize, at: usize },
    /// The time of a grant or a wait is up.
    End { lock: usize, at: usize },
    /// Housekeeping comes by a bucket.
    Sweep { bucket: usize },
}

/// What one request has at hand for its next step.
enum Client {
    Waits(Pending),
    Holds(Lease),
}

/// Plain records: a bucket for each lock, and the last one for all owners.
pub struct Shelf {
    pub locks: RefCell<Vec<LockBucket>>,
    pub owners: RefCell<OwnerBucket>,
    sessions: Sessions,
}

impl Store for Shelf {
    fn buckets(&self) -> u32 {
        u32::try_from(self.locks.borrow().len()).unwrap()
    }

    fn bucket(&self, name: &str) -> u32 {
        // Locks have numbers for names, owners have not.
        name.parse().unwrap_or(self.buckets() - 1)
    }

    fn read<R: Record>(&self, index: u32) -> Result<(R, Version), StoreError> {
        let (locks, owners) = (self.locks.borrow(), self.owners.borrow());
        let lock: &dyn Any = &locks[index as usize];
        let owner: &dyn Any = &*owners;
        let session: &dyn Any = &self.sessions;
        let record = lock.downcast_ref::<R>().or_else(|| owner.downcast_ref()).or_else(|| session.downcast_ref());
        Ok((record.cloned().unwrap_or_default(), Version(1)))
    }

    fn write<R: Record>(&self, index: u32, record: &R, _: Version) -> Result<bool, StoreError> {
        let record: &dyn Any = record;
        if let Some(lock) = record.downcast_ref::<LockBucket>() {
            self.locks.borrow_mut()[index as usize] = lock.clone();
        } else if let Some(owners) = record.downcast_ref::<OwnerBucket>() {
            *self.owners.borrow_mut() = owners.clone();
        }
        Ok(true)
    }
}

/// Names and rules, made once.
pub struct Machine {
    rules: Rules,
    pub owners: Vec<OwnerId>,
    pub names: Vec<LockName>,
    /// With time: leases and waits can end.
    time: bool,
}

pub fn lease_at(lock: usize, at: usize) -> LeaseId {
    LeaseId((lock * MOST + at) as u128)
}

const fn mode(exclusive: bool) -> Mode {
    if exclusive { Mode::Exclusive } else { Mode::Shared }
}

impl Machine {
    pub fn new(owners: usize, locks: usize, time: bool) -> Self {
        let limits =
            Limits { locks_per_owner: None, waiters_per_lock: 100, locks: 100, waiters: 100, longest_ttl: LONG };
        // One owner more, who holds what is to be waited for on records of its own.
        Machine {
            rules: Rules { classes: Classes::default(), limits, grace: Duration::ZERO },
            owners: (0..=owners).map(|owner| OwnerId::new(&format!("o{owner}")).unwrap()).collect(),
            names: (0..locks).map(|lock| LockName::parse(&lock.to_string()).unwrap()).collect(),
            time,
        }
    }

    fn scene<'a>(&'a self, store: &'a Shelf, now: Time) -> Scene<'a, Shelf> {
        Scene { store, rules: &self.rules, now, unix_micros: 0 }
    }

    fn empty(&self) -> Shelf {
        let locks = RefCell::new(vec![LockBucket::default(); self.names.len() + 1]);
        Shelf { locks, owners: RefCell::default(), sessions: Sessions::default() }
    }

    /// Puts a request into the records, where the state says that it stands.
    fn put(&self, shelf: &Shelf, lock: usize, at: usize, slot: &Slot) {
        let lease = lease_at(lock, at);
        if slot.stands() {
            let state = match slot.stand {
                Stand::Granted | Stand::Holds => {
                    let renewed = if slot.ended { THEN } else { NOW };
                    At::Held { fence: Fence(slot.owner as u64 + 1), since: THEN, renewed, until: NOW + LONG }
                }
                stand => {
                    let deadline = if slot.ended { THEN + SHORT } else { NOW + LONG };
                    let upgrade = stand == Stand::WaitsToUpgrade;
                    At::Waiting { since: THEN, deadline, hold: LONG, upgrade, elsewhere: slot.marked }
                }
            };
            // A stranger is put behind all others, and then made the one that is meant.
            let stranger = Entry { reentrant: false, ..self.entry(lease, slot, waiting()) };
            let bucket = &mut shelf.locks.borrow_mut()[lock];
            bucket.highest = HIGHEST;
            bucket.with_queue(&self.names[lock], |queue, _| {
                queue.enqueue(stranger);
                let entry = queue.entry_mut(lease).unwrap();
                (entry.reentrant, entry.state) = (true, state);
            });
        }
        if slot.listed {
            let item =
                Item { lock: self.names[lock].clone(), lease, session: SessionId::NONE, waiting: true, since: THEN };
            shelf.owners.borrow_mut().with_items(&self.owners[slot.owner], |items| items.push(item));
        }
    }

    fn entry(&self, lease: LeaseId, slot: &Slot, state: At) -> Entry {
        Entry {
            lease,
            owner: self.owners[slot.owner].clone(),
            mode: mode(slot.exclusive),
            reentrant: true,
            session: SessionId::NONE,
            detached: false,
            ttl: SHORT,
            asked_by: String::new(),
            state,
        }
    }

    fn shelf(&self, state: &State) -> Shelf {
        let shelf = self.empty();
        for (lock, slots) in state.locks.iter().enumerate() {
            slots.iter().enumerate().for_each(|(at, slot)| self.put(&shelf, lock, at, slot));
        }
        shelf
    }

    fn request(
        &self,
        lease: LeaseId,
        owner: usize,
        lock: usize,
        exclusive: bool,
        arrived: Time,
        wait: Duration,
    ) -> Request {
        let want = Want { name: self.names[lock].clone(), mode: mode(exclusive), wait, ttl: SHORT, hold: LONG };
        Request::new(lease, self.owners[owner].clone(), arrived, vec![want], &self.rules.classes)
    }

    /// The worker's side of a request, with a table that knows of nothing else.
    fn client(&self, lock: usize, at: usize, slot: &Slot) -> (Table, Client) {
        let shelf = self.empty();
        let mut table = Table::new();
        let scene = self.scene(&shelf, THEN);
        let queued = slot.stand != Stand::Holds && slot.stand != Stand::LostLease || slot.listed;
        if queued {
            let stranger = Slot {
                owner: self.owners.len() - 1,
                exclusive: true,
                stand: Stand::Holds,
                listed: false,
                ended: false,
                marked: false,
            };
            self.put(&shelf, lock, at + 1, &stranger);
        }
        let over = slot.ended && !slot.has_lock();
        let wait = if over { SHORT } else { LONG };
        let request = self.request(lease_at(lock, at), slot.owner, lock, slot.exclusive, THEN, wait);
        let outcome = table.acquire(&scene, request);
        let outcome = match outcome {
            Outcome::Waiting(pending) if matches!(slot.stand, Stand::Holds | Stand::LostLease) => {
                shelf.locks.borrow_mut()[lock] = LockBucket::default();
                table.poll(&scene, pending)
            }
            outcome => outcome,
        };
        table.take_effects();
        let client = match outcome {
            Outcome::Granted(lease) => Client::Holds(lease),
            Outcome::Waiting(pending) => Client::Waits(pending),
            Outcome::Refused(refusal) => panic!("{refusal:?}"),
        };
        (table, client)
    }

    /// Everything that somebody may do, with `each` requests an owner and `most` in all.
    pub fn actions(&self, state: &State, each: usize, most: usize, actions: &mut Vec<Action>) {
        let owners = self.owners.len() - 1;
        // Of those that have no name yet, one is as good as another.
        let nobody = (0..owners).find(|owner| state.requests(*owner) == 0);
        let unused = state.locks.iter().position(Vec::is_empty);
        if state.slots().count() < most {
            for owner in (0..owners).filter(|owner| state.requests(*owner) < each) {
                let other_lock = |lock: &usize| !state.locks[*lock].is_empty() || Some(*lock) == unused;
                if state.requests(owner) > 0 || Some(owner) == nobody {
                    for lock in (0..self.names.len()).filter(other_lock) {
                        actions.extend([false, true].map(|exclusive| Action::Ask { owner, lock, exclusive }));
                    }
                }
            }
        }
        for (lock, slots) in state.locks.iter().enumerate() {
            for (at, slot) in slots.iter().enumerate() {
                match slot.stand {
                    Stand::Holds | Stand::LostLease => actions.push(Action::Release { lock, at }),
                    _ => actions.extend([Action::Cancel { lock, at }, Action::Poll { lock, at }]),
                }
                if self.time && !slot.ended && slot.stand != Stand::LostLease {
                    actions.push(Action::End { lock, at });
                }
            }
        }
        if self.time {
            actions.extend((0..=self.names.len()).map(|bucket| Action::Sweep { bucket }));
        }
    }

    /// One step on the records, and what it showed.
    pub fn step(&self, state: &State, action: Action) -> (State, Vec<Sight>) {
        if let Action::End { lock, at } = action {
            let mut next = state.clone();
            next.locks[lock][at].ended = true;
            return (next, Vec::new());
        }
        let shelf = self.shelf(state);
        let scene = self.scene(&shelf, NOW);
        let (mut table, actor, outcome) = match action {
            Action::Ask { owner, lock, exclusive } => {
                let mut table = Table::new();
                let outcome = table.acquire(&scene, self.request(NEW, owner, lock, exclusive, NOW, LONG));
                (table, Some((lock, NEW)), Some(outcome))
            }
            Action::Release { lock, at } | Action::Cancel { lock, at } | Action::Poll { lock, at } => {
                let (mut table, client) = self.client(lock, at, &state.locks[lock][at]);
                let outcome = match (client, action) {
                    (Client::Waits(pending), Action::Poll { .. }) => Some(table.poll(&scene, pending)),
                    (Client::Waits(pending), _) => {
                        table.cancel(&scene, pending);
                        None
                    }
                    (Client::Holds(lease), _) => {
                        table.release(&scene, lease);
                        None
                    }
                };
                (table, Some((lock, lease_at(lock, at))), outcome)
            }
            Action::Sweep { bucket } => {
                let mut table = Table::new();
                table.sweep(&scene, bucket as u32, &mut Census::default()).unwrap();
                (table, None, None)
            }
            Action::End { .. } => (Table::new(), None, None),
        };
        let effects = table.take_effects();
        After { machine: self, shelf: &shelf, state, action, actor, outcome: outcome.as_ref() }.look(&effects)
    }
}

fn waiting() -> At {
    At::Waiting { since: THEN, deadline: NOW + LONG, hold: LONG, upgrade: false, elsewhere: false }
}
