//! All that VMs share in a simulated proxy, and what the simulator knows of them: records, mailboxes, clocks, faults.
//!
//! What must not live here: whether a change is right (that is `oracle`), and who runs next (that is `world`).

use std::any::Any;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::panic::Location;
use std::rc::Rc;

use interlock_core::lease::LeaseBucket;
use interlock_core::session::Sessions;
use interlock_core::store::{Kind, LockBucket, OwnerBucket, Record};
use interlock_core::{LeaseId, LockName, Rules, SessionId, Time};

use crate::oracle::{Known, LockFacts, Op, told};
use crate::protocol::{Incoming, ProtocolFacts};
use crate::report::Counts;
use crate::schedule::{Ask, Fate, VMS};
use crate::trace::Trace;

/// Something a VM has to do, as soon as it runs and is done with what came before.
#[derive(Clone, Debug)]
pub enum Task {
    /// A request has come in.
    Ask(Ask),
    /// The holder of a lease asks for its first lock again, exclusively.
    Upgrade(u8),
    /// A request has ended that held.
    Release(u8),
    /// All requests have ended that hold.
    ReleaseAll,
    /// A request has ended that waited.
    Cancel(u8),
    /// A lease is to be checked.
    Check(u8),
    /// Somebody breaks the glass.
    Glass(LockName),
    /// The timer has fired.
    Tick,
    /// There may be something in the mailbox.
    Mail,
    /// A message has come, for a VM of an authority.
    Call(Box<Incoming>),
}

/// A record with its version; 0 where it was never written.
pub struct Slot<R> {
    /// The record.
    pub record: Rc<R>,
    /// Its version.
    pub version: u32,
}

impl<R: Default> Default for Slot<R> {
    fn default() -> Self {
        Slot { record: Rc::default(), version: 0 }
    }
}

/// What was so before a change; the newest is last.
pub enum Past {
    /// A bucket of locks.
    Locks(u32, Rc<LockBucket>),
    /// The sessions.
    Sessions(Rc<Sessions>),
}

/// A queue of messages.
pub struct Mailbox {
    /// Whose it is.
    pub vm: usize,
    /// Which life of that VM.
    pub life: u32,
    /// The leases that are woken.
    pub messages: VecDeque<u128>,
}

/// What is known of a VM from outside.
#[derive(Default)]
pub struct VmFacts {
    /// Whether it runs at all.
    pub alive: bool,
    /// Whether it stands still for now.
    pub stalled: bool,
    /// Whether its leases live by their own renewals.
    pub renews: bool,
    /// Which life this is: a VM that died and was started anew is another one.
    pub life: u32,
    /// What it has still to do.
    pub tasks: VecDeque<Task>,
    /// Whether it is in the middle of something.
    pub busy: bool,
    /// When it needs its next tick.
    pub due: Time,
    /// Store calls to succeed before `failing` fail.
    pub sound: u32,
    /// Store calls to fail.
    pub failing: u32,
    /// Writes to find a conflict that is none.
    pub conflicts: u32,
    /// How many records it has written.
    pub writes: u64,
    /// How many of its store calls have failed.
    pub failures: u64,
    /// Whether something may be left over that a failing store did not let it give back.
    pub indebted: bool,
    /// When its last heartbeat that went through was begun.
    pub beaten: Time,
    /// Whether it knows that some of its leases may have ended.
    pub doubts: bool,
    /// What it is doing.
    pub op: Option<Op>,
    /// Wake-ups that it owes.
    pub owes: Vec<(LeaseId, SessionId)>,
    /// Its waiters: when each is polled at the latest, and its deadline.
    pub waiters: Vec<(LeaseId, Time, Time)>,
    /// Its leases.
    pub leases: Vec<LeaseId>,
    /// Locks and waiters that its table counts.
    pub load: (u32, u32),
}

/// A wrong that is built in on purpose, to see that it is found and how short it shrinks. Never the product's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Plant {
    /// None.
    #[default]
    Nothing,
    /// The store takes a write though the version is another by now.
    StaleWrite,
    /// A wake-up tells another lease.
    WrongWake,
    /// The wall clock is the fence: records forget the highest.
    FenceForgotten,
}

/// Something that must not have happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What.
    pub what: String,
    /// The check that found it; none for a panic.
    pub rule: Option<&'static Location<'static>>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// The shared side of the simulated proxy.
pub struct State {
    /// The monotonic clock.
    pub now: Time,
    /// The wall clock.
    pub unix: u64,
    /// Locks, by bucket.
    pub locks: Vec<Slot<LockBucket>>,
    /// Owners, by bucket.
    pub owners: Vec<Slot<OwnerBucket>>,
    /// The sessions.
    pub sessions: Slot<Sessions>,
    /// The leases of the protocol, by bucket.
    pub named: Vec<Slot<LeaseBucket>>,
    /// Shared data as the host keeps it, where the real backend runs.
    pub shared: HashMap<String, (Vec<u8>, u32)>,
    /// The version of the next write of shared data.
    pub next_cas: u32,
    /// Random numbers that the host has given.
    pub randoms: u64,
    /// All queues.
    pub mailboxes: Vec<Mailbox>,
    /// What becomes of the next wake-ups.
    pub fates: VecDeque<Fate>,
    /// The VMs.
    pub vms: [VmFacts; VMS],
    /// Which VM is which session, in which life, and since when.
    pub members: Vec<(SessionId, usize, u32, Time)>,
    /// What was so before, since somebody began something.
    pub log: Vec<Past>,
    /// The rules.
    pub rules: Rc<Rules>,
    /// What is known of each lease.
    pub leases: BTreeMap<LeaseId, Known>,
    /// What is known of each lock.
    pub lock_facts: Vec<LockFacts>,
    /// Waiting and held, as the events say.
    pub gauges: (i64, i64),
    /// Whether events got lost, with a VM that died.
    pub events_lost: bool,
    /// When somebody last looked dead and was not.
    pub doubtful_at: Time,
    /// Which VM ran last.
    pub running: usize,
    /// Calls that may still be made before the VM that runs is preempted.
    pub budget: u32,
    /// What happened.
    pub counts: Counts,
    /// The trace.
    pub trace: Trace,
    /// What must not have happened.
    pub violation: Option<Violation>,
    /// The planted wrong.
    pub plant: Plant,
    /// What is known besides, where this is an authority of the lease protocol.
    pub protocol: Option<Box<ProtocolFacts>>,
}

/// How many buckets the bare store has. Few, so that locks share them.
pub const BARE_BUCKETS: u32 = 4;

impl State {
    /// A proxy in which nothing has happened yet.
    pub fn new(rules: Rc<Rules>, buckets: u32, trace: Trace, plant: Plant) -> Self {
        let slots = usize::try_from(buckets).unwrap_or(0);
        State {
            now: Time::from_micros(1_000_000_000),
            unix: 1_700_000_000_000_000,
            locks: (0..slots).map(|_| Slot::default()).collect(),
            owners: (0..slots).map(|_| Slot::default()).collect(),
            sessions: Slot::default(),
            named: (0..slots).map(|_| Slot::default()).collect(),
            shared: HashMap::new(),
            next_cas: 1,
            randoms: 0,
            mailboxes: Vec::new(),
            fates: VecDeque::new(),
            vms: Default::default(),
            members: Vec::new(),
            log: Vec::new(),
            rules,
            leases: BTreeMap::new(),
            lock_facts: Vec::new(),
            gauges: (0, 0),
            events_lost: false,
            doubtful_at: Time::ZERO,
            running: VMS,
            budget: 0,
            counts: Counts::default(),
            trace,
            violation: None,
            plant,
            protocol: None,
        }
    }

    /// Notes the first thing that must not have happened.
    #[track_caller]
    pub fn violated(&mut self, what: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(Violation { what: what(), rule: Some(Location::caller()) });
        }
    }

    /// Whether a store call of this VM fails.
    pub fn fails(&mut self, vm: usize) -> bool {
        let facts = &mut self.vms[vm];
        if facts.failing == 0 {
            return false;
        }
        if facts.sound > 0 {
            facts.sound -= 1;
            return false;
        }
        facts.failing -= 1;
        facts.failures += 1;
        facts.indebted = true;
        self.counts.store_failures += 1;
        self.trace.mark(11, vm);
        true
    }

    /// Whether a write of this VM finds a conflict that is none.
    pub fn collides(&mut self, vm: usize) -> bool {
        let facts = &mut self.vms[vm];
        let collides = facts.conflicts > 0;
        facts.conflicts -= u32::from(collides);
        self.counts.spurious_conflicts += u64::from(collides);
        collides
    }

    /// A record, and its version.
    pub fn record<R: Record>(&self, index: u32) -> (R, u32) {
        let at = usize::try_from(index).unwrap_or(0);
        let (any, version): (&dyn Any, u32) = match R::KIND {
            Kind::Locks => (&*self.locks[at].record, self.locks[at].version),
            Kind::Owners => (&*self.owners[at].record, self.owners[at].version),
            Kind::Sessions => (&*self.sessions.record, self.sessions.version),
            Kind::Leases => (&*self.named[at].record, self.named[at].version),
            // Nobody here guards anything.
            Kind::Seen => return (R::default(), 0),
        };
        (any.downcast_ref::<R>().cloned().unwrap_or_default(), version)
    }

    /// The version of a record.
    pub fn version(&self, kind: Kind, index: u32) -> u32 {
        let at = usize::try_from(index).unwrap_or(0);
        match kind {
            Kind::Locks => self.locks[at].version,
            Kind::Owners => self.owners[at].version,
            Kind::Sessions => self.sessions.version,
            Kind::Leases => self.named[at].version,
            Kind::Seen => 0,
        }
    }

    /// A VM has written a record: whoever watches looks at the difference.
    pub fn commit<R: Record>(&mut self, vm: usize, index: u32, record: &R) {
        self.counts.writes += 1;
        self.vms[vm].writes += 1;
        let any: &dyn Any = record;
        if let Some(locks) = any.downcast_ref::<LockBucket>() {
            self.commit_locks(vm, index, Rc::new(locks.clone()));
        } else if let Some(owners) = any.downcast_ref::<OwnerBucket>() {
            self.commit_owners(vm, index, Rc::new(owners.clone()));
        } else if let Some(sessions) = any.downcast_ref::<Sessions>() {
            self.commit_sessions(vm, Rc::new(sessions.clone()));
        } else if let Some(leases) = any.downcast_ref::<LeaseBucket>() {
            let slot = &mut self.named[usize::try_from(index).unwrap_or(0)];
            slot.version = slot.version.wrapping_add(1).max(1);
            slot.record = Rc::new(leases.clone());
            self.trace.mark(10, vm);
        }
    }

    /// A VM puts a message into a queue.
    pub fn enqueue(&mut self, vm: usize, queue: u32, lease: u128) -> bool {
        let at = usize::try_from(queue).unwrap_or(0);
        if at == 0 || at > self.mailboxes.len() {
            return false;
        }
        let lease = if self.plant == Plant::WrongWake { lease + 1 } else { lease };
        self.sent(vm, at - 1, LeaseId(lease));
        let fate = self.fates.pop_front().unwrap_or(Fate::Comes);
        self.trace.mark(12 + u64::from(fate as u8), at);
        let mailbox = &mut self.mailboxes[at - 1];
        let counts = &mut self.counts;
        let mut notices = 1;
        match fate {
            Fate::Comes => mailbox.messages.push_back(lease),
            Fate::Lost => (notices, counts.lost_wakes) = (0, counts.lost_wakes + 1),
            Fate::Late => {
                mailbox.messages.push_back(lease);
                (notices, counts.late_wakes) = (0, counts.late_wakes + 1);
            }
            Fate::Doubled => {
                mailbox.messages.extend([lease, lease]);
                (notices, counts.doubled_wakes) = (2, counts.doubled_wakes + 1);
            }
            Fate::First => {
                counts.reordered_wakes += u64::from(!mailbox.messages.is_empty());
                mailbox.messages.push_front(lease);
            }
        }
        let to = &mut self.vms[mailbox.vm];
        if to.alive && to.life == mailbox.life {
            to.tasks.extend((0..notices).map(|_| Task::Mail));
        }
        true
    }

    /// Makes a mailbox for the VM in its present life. Queue ids begin at 1.
    pub fn new_mailbox(&mut self, vm: usize) -> u32 {
        let life = self.vms[vm].life;
        let known = self.mailboxes.iter().position(|mailbox| mailbox.vm == vm && mailbox.life == life);
        let at = known.unwrap_or_else(|| {
            self.mailboxes.push(Mailbox { vm, life, messages: VecDeque::new() });
            self.mailboxes.len() - 1
        });
        u32::try_from(at).unwrap_or(0) + 1
    }

    /// Takes the oldest message out of a mailbox.
    pub fn dequeue(&mut self, queue: u32) -> Option<u128> {
        let at = usize::try_from(queue).ok()?.checked_sub(1)?;
        self.mailboxes.get_mut(at)?.messages.pop_front()
    }

    /// The process is another one: nothing is left of what the last one shared.
    pub fn forget_everything(&mut self) {
        self.locks.iter_mut().for_each(|slot| *slot = Slot::default());
        self.owners.iter_mut().for_each(|slot| *slot = Slot::default());
        self.named.iter_mut().for_each(|slot| *slot = Slot::default());
        self.sessions = Slot::default();
        self.mailboxes.clear();
        self.members.clear();
        self.lock_facts.clear();
        self.log.clear();
        self.counts.restarts += 1;
        self.forgot();
    }

    /// Whether nothing is held, waited for, listed or remembered.
    pub fn is_drained(&self) -> bool {
        self.locks.iter().all(|slot| slot.record.queues().is_empty())
            && self.owners.iter().all(|slot| slot.record.holdings().is_empty())
            && self.named.iter().all(|slot| slot.record.count() == (0, 0, 0))
    }

    /// What keeps [`State::is_drained`] from being so.
    pub fn left_over(&self) -> String {
        let queues = self.locks.iter().flat_map(|slot| slot.record.queues());
        let queues: Vec<String> = queues.map(|queue| format!("{}: {}", queue.name, told(queue.entries()))).collect();
        let owners: Vec<_> = self.owners.iter().flat_map(|slot| slot.record.holdings()).collect();
        let names: Vec<_> = self.named.iter().map(|slot| slot.record.count()).collect();
        format!("queues {queues:?}, index {owners:?}, waiting, held and over {names:?}")
    }

    /// Whether nobody is in the middle of anything, and nobody has anything to do.
    pub fn is_quiet(&self) -> bool {
        self.vms.iter().all(|vm| !vm.alive || !vm.busy && (vm.stalled || vm.tasks.is_empty()))
    }
}
