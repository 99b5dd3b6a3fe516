//! What a VM does with its backend: for its requests and its timers, the same as the plugin's filter.
//!
//! Requests ask, wait and hold; waiters are looked after when woken, when their time comes, and once a second anyhow; the
//! tick beats, looks at leases in doubt and keeps house. What must not live here: any check (the `oracle` is told what
//! was done), and any choice (the schedule has made it).

use std::collections::BTreeMap;
use std::rc::Rc;

use interlock::host::Host;
use interlock_core::session::BEAT;
use interlock_core::{Duration, Lease, LeaseId, LockName, Mode, Outcome, OwnerId, Pending, Request, Rules, Time, Want};

use crate::backend::Backend;
use crate::oracle::Kind;
use crate::port::Port;
use crate::schedule::Ask;
use crate::state::Task;
use crate::words::Words;

/// As in the filter: how long a waiter goes without looking for itself.
const BACKSTOP: Duration = Duration::from_secs(1);

/// A VM's requests and timers.
pub struct Driver<B> {
    backend: Option<B>,
    rules: Rc<Rules>,
    words: Rc<Words>,
    waiters: BTreeMap<LeaseId, (Pending, Time)>,
    leases: BTreeMap<LeaseId, (Lease, Time)>,
    doubts: bool,
    housekept: Time,
}

impl<B: Backend> Driver<B> {
    /// A VM that has done nothing yet.
    pub fn new(rules: Rc<Rules>, words: Rc<Words>) -> Self {
        Driver {
            backend: None,
            rules,
            words,
            waiters: BTreeMap::new(),
            leases: BTreeMap::new(),
            doubts: false,
            housekept: Time::ZERO,
        }
    }

    /// Does what there is to do, until the VM has to end.
    pub fn live(&mut self, port: &Port<'_>) {
        loop {
            let task = port.state().next_task(port.vm);
            let Some(task) = task else {
                if !port.idle() {
                    return;
                }
                continue;
            };
            if self.backend.is_none() {
                self.backend = B::open(port);
            }
            if self.backend.is_some() {
                self.work(port, task);
            }
            self.tell(port);
        }
    }

    fn work(&mut self, port: &Port<'_>, task: Task) {
        match task {
            Task::Ask(ask) => self.ask(port, &ask),
            Task::Upgrade(nth) => self.upgrade(port, nth),
            Task::Release(nth) => {
                if let Some(lease) = nth_of(&self.leases, nth) {
                    self.release(port, lease);
                }
            }
            Task::ReleaseAll => {
                for lease in self.leases.keys().copied().collect::<Vec<_>>() {
                    self.release(port, lease);
                }
            }
            Task::Cancel(nth) => {
                if let Some(lease) = nth_of(&self.waiters, nth) {
                    self.cancel(port, lease);
                }
            }
            Task::Check(nth) => {
                if let Some(lease) = nth_of(&self.leases, nth) {
                    self.check(port, lease);
                }
            }
            Task::Glass(lock) => self.break_glass(port, &lock),
            Task::Tick => self.tick(port),
            Task::Mail => self.empty_mailbox(port),
            Task::Call(_) => {}
        }
    }

    /// Lets the simulator see what the VM has, now that it is done with something.
    fn tell(&self, port: &Port<'_>) {
        let timers = self.waiters.values().map(|(_, due)| *due).chain(self.leases.values().map(|(_, due)| *due));
        let next_beat = self.backend.as_ref().map_or(Time::ZERO, B::next_beat);
        let doubts = if self.doubts { Time::ZERO } else { Time::NEVER };
        let due = timers.fold(next_beat.min(doubts).min(self.housekept + BEAT), Time::min);
        let mut state = port.state();
        let facts = &mut state.vms[port.vm];
        facts.due = due;
        facts.doubts = self.doubts;
        facts.waiters.clear();
        facts.waiters.extend(self.waiters.values().map(|(it, due)| (it.lease(), *due, it.deadline())));
        facts.leases.clear();
        facts.leases.extend(self.leases.keys());
        let load = self.backend.as_ref().and_then(B::load);
        state.rested(port.vm, load);
    }

    fn ask(&mut self, port: &Port<'_>, ask: &Ask) {
        let millis = |millis: u32| Duration::from_millis(u64::from(millis));
        let want = |(lock, mode): &(u8, Mode)| Want {
            name: self.words.lock(*lock),
            mode: *mode,
            wait: millis(ask.wait),
            ttl: millis(ask.ttl),
            hold: millis(ask.hold),
        };
        let wants = ask.locks.iter().map(want).collect();
        self.request(port, self.words.owner(ask.owner), wants, ask.reentrant);
    }

    fn upgrade(&mut self, port: &Port<'_>, nth: u8) {
        let lease = nth_of(&self.leases, nth).and_then(|lease| self.leases.get(&lease));
        let Some((lease, _)) = lease else { return };
        let Some(first) = lease.grants().first() else { return };
        let (owner, wait) = (lease.owner().clone(), Duration::from_secs(2));
        let hold = Duration::from_secs(60);
        let want = Want { name: first.name.clone(), mode: Mode::Exclusive, wait, ttl: first.ttl, hold };
        self.request(port, owner, vec![want], true);
    }

    fn request(&mut self, port: &Port<'_>, owner: OwnerId, wants: Vec<Want>, reentrant: bool) {
        let arrived = Host::now(port);
        self.beat(port);
        let Some(backend) = &mut self.backend else { return };
        let Ok(lease) = backend.new_lease(port) else {
            port.state().turned_away(port.vm);
            return;
        };
        let of = owner.clone();
        let request = Request::new(lease, owner, arrived, wants, &self.rules.classes).reentrant(reentrant);
        port.state().asked(port.vm, lease, of, arrived, &request);
        port.state().begin(port.vm, Kind::Acquire, lease);
        let outcome = backend.acquire(port, &self.rules, request);
        self.absorb(port, lease, outcome);
    }

    fn absorb(&mut self, port: &Port<'_>, lease: LeaseId, outcome: Outcome) {
        let now = Host::now(port);
        match outcome {
            Outcome::Granted(lease) => {
                port.state().granted(port.vm, &lease);
                let due = self.lease_due(port, &lease);
                self.leases.insert(lease.id(), (lease, due));
            }
            Outcome::Waiting(pending) => {
                port.state().waits(port.vm, &pending);
                let due = pending.poll_at().min(now + BACKSTOP).max(now + Duration::from_millis(1));
                self.waiters.insert(pending.lease(), (pending, due));
            }
            Outcome::Refused(refusal) => port.state().refused(port.vm, lease, &refusal),
        }
        self.deliver(port);
    }

    /// When a lease has to be looked at: at its hold limit; sooner where it lives by its own renewals.
    fn lease_due(&self, port: &Port<'_>, lease: &Lease) -> Time {
        let own = Host::now(port) + lease.ttl() / 3;
        if port.state().vms[port.vm].renews { own.min(lease.until()) } else { lease.until() }
    }

    fn deliver(&mut self, port: &Port<'_>) {
        let Some(backend) = &mut self.backend else { return };
        let effects = backend.deliver(port);
        port.state().delivered(port.vm, &effects.events);
    }

    fn look_after(&mut self, port: &Port<'_>, lease: LeaseId) {
        let Some((pending, _)) = self.waiters.remove(&lease) else { return };
        let Some(backend) = &mut self.backend else { return };
        port.state().begin(port.vm, Kind::Poll, lease);
        let outcome = backend.poll(port, &self.rules, pending);
        self.absorb(port, lease, outcome);
    }

    fn release(&mut self, port: &Port<'_>, lease: LeaseId) {
        // An answer that was made while the lock was no longer held does not pass as if it had been.
        let lapsed =
            self.leases.get(&lease).zip(self.backend.as_ref()).is_some_and(|((held, _), backend)| {
                self.doubts || backend.may_have_lapsed(Host::now(port), held.ttl())
            });
        if lapsed {
            self.beat(port);
            self.check(port, lease);
        }
        if let Some((held, _)) = self.leases.remove(&lease) {
            self.give_back(port, held, !lapsed);
        }
    }

    fn give_back(&mut self, port: &Port<'_>, lease: Lease, sure: bool) {
        let Some(backend) = &mut self.backend else { return };
        let id = lease.id();
        port.state().passes(port.vm, sure);
        port.state().begin(port.vm, Kind::Release, id);
        let ended = backend.release(port, &self.rules, lease);
        port.state().released(port.vm, id, &ended);
        self.deliver(port);
    }

    fn cancel(&mut self, port: &Port<'_>, lease: LeaseId) {
        let Some((pending, _)) = self.waiters.remove(&lease) else { return };
        let Some(backend) = &mut self.backend else { return };
        port.state().begin(port.vm, Kind::Cancel, lease);
        backend.cancel(port, &self.rules, pending);
        port.state().cancelled(port.vm, lease);
        self.deliver(port);
    }

    /// Looks whether a lease still holds; renews one that lives by that. A lost one is given back.
    fn check(&mut self, port: &Port<'_>, lease: LeaseId) {
        let Some((held, _)) = self.leases.get(&lease) else { return };
        let Some(backend) = &mut self.backend else { return };
        port.state().begin(port.vm, Kind::Check, lease);
        let found = backend.check(port, &self.rules, held);
        let lost = matches!(found, Ok(Some(_)));
        port.state().checked(port.vm, lease, found);
        if lost && let Some((held, _)) = self.leases.remove(&lease) {
            self.give_back(port, held, false);
        } else if let Some((held, _)) = self.leases.get(&lease) {
            let due = self.lease_due(port, held);
            self.leases.entry(lease).and_modify(|(_, it)| *it = due);
        }
    }

    fn break_glass(&mut self, port: &Port<'_>, lock: &LockName) {
        let Some(backend) = &mut self.backend else { return };
        port.state().begin(port.vm, Kind::Glass(lock.clone()), LeaseId(0));
        let ended = backend.break_glass(port, &self.rules, lock);
        port.state().broken(port.vm, ended.is_ok());
        self.deliver(port);
    }

    fn beat(&mut self, port: &Port<'_>) {
        let Some(backend) = &mut self.backend else { return };
        let now = Host::now(port);
        if now < backend.next_beat() {
            return;
        }
        port.state().begin(port.vm, Kind::Beat, LeaseId(0));
        let beaten = backend.beat(port, &self.rules);
        self.doubts |= matches!(beaten, Ok(true));
        port.state().beaten(port.vm, now, &beaten);
    }

    fn empty_mailbox(&mut self, port: &Port<'_>) {
        let woken = self.backend.as_ref().map(|backend| backend.woken(port)).unwrap_or_default();
        for lease in woken {
            self.look_after(port, lease);
        }
    }

    fn tick(&mut self, port: &Port<'_>) {
        self.beat(port);
        let now = Host::now(port);
        if self.doubts {
            self.check_leases(port);
        }
        let due = |(lease, due): (&LeaseId, Time)| (due <= now).then_some(*lease);
        let waiters = self.waiters.iter().filter_map(|(lease, (_, at))| due((lease, *at)));
        for lease in waiters.collect::<Vec<_>>() {
            if !self.has_respite(lease, now) {
                self.look_after(port, lease);
            }
        }
        let leases = self.leases.iter().filter_map(|(lease, (_, at))| due((lease, *at)));
        for lease in leases.collect::<Vec<_>>() {
            self.limit(port, lease, now);
        }
        if now >= self.housekept + BEAT {
            self.housekept = now;
            self.keep_house(port);
        }
    }

    /// Whether a waiter need not be looked after yet, because the heartbeats that it awaited have come.
    fn has_respite(&mut self, lease: LeaseId, now: Time) -> bool {
        let Some(((pending, due), backend)) = self.waiters.get_mut(&lease).zip(self.backend.as_ref()) else {
            return false;
        };
        *due = backend.poll_at(pending).min(pending.looked_at() + BACKSTOP);
        *due > now
    }

    /// A lease at its hold limit ends; one that lives by renewals is renewed.
    fn limit(&mut self, port: &Port<'_>, lease: LeaseId, now: Time) {
        let Some((held, _)) = self.leases.get(&lease) else { return };
        if held.until() > now {
            self.check(port, lease);
        } else if let Some((held, _)) = self.leases.remove(&lease) {
            port.state().outlived(port.vm);
            self.give_back(port, held, false);
        }
    }

    fn check_leases(&mut self, port: &Port<'_>) {
        self.doubts = false;
        for lease in self.leases.keys().copied().collect::<Vec<_>>() {
            let failures = port.state().vms[port.vm].failures;
            self.check(port, lease);
            self.doubts |= port.state().vms[port.vm].failures > failures;
        }
    }

    fn keep_house(&mut self, port: &Port<'_>) {
        let Some(backend) = &mut self.backend else { return };
        backend.listen(port);
        self.empty_mailbox(port);
        let Some(backend) = &mut self.backend else { return };
        port.state().begin(port.vm, Kind::House, LeaseId(0));
        let census = backend.keep_house(port, &self.rules);
        port.state().kept_house(port.vm, census.ok().flatten().as_ref());
        self.deliver(port);
    }
}

fn nth_of<T>(of: &BTreeMap<LeaseId, T>, nth: u8) -> Option<LeaseId> {
    let most = of.len().max(1);
    of.keys().nth(usize::from(nth) % most).copied()
}
