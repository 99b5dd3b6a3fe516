//! What a VM does unasked: ticks, wake-ups, heartbeats, housekeeping; and what these find out about its streams.
//!
//! All of it runs in callbacks of a root, the only place from which other streams may be answered.

use std::rc::Rc;

use interlock_core::session::BEAT;
use interlock_core::{Cause, Duration, LockName, Loss, Mode, Refusal, Time, bug};

use super::respond::Answer;
use super::stream::{Case, Ended, Held, State, Stream};
use super::{Fate, Runtime, report};
use crate::answer::Reject;
use crate::backend::local::Purpose;
use crate::host::{ContextId, Host, QueueId};
use crate::policy::OnLeaseLost;

impl Runtime {
    /// Messages have come by a queue. If it is one of this instance's, waiters of this VM were granted their locks.
    pub fn queue_ready(&mut self, host: &dyn Host, queue: QueueId) {
        for purpose in [Purpose::Enforce, Purpose::Audit] {
            if self.tables.get(purpose).is_some_and(|local| local.mailbox() == Some(queue)) {
                self.empty_mailbox(host, purpose);
                self.arm(host);
            }
        }
    }

    fn empty_mailbox(&mut self, host: &dyn Host, purpose: Purpose) {
        let woken = self.tables.get(purpose).map(|local| local.woken(host)).unwrap_or_default();
        for lease in woken {
            if let Some(id) = self.leases.get(&(purpose, lease)).copied() {
                self.look_after(host, id);
            }
        }
    }

    /// A tick of a root: beats, looks after whoever is due, keeps house. Says how soon the next one is needed.
    pub fn tick(&mut self, host: &dyn Host) -> Duration {
        for purpose in [Purpose::Enforce, Purpose::Audit] {
            self.beat(host, purpose);
        }
        let now = host.now();
        for purpose in [Purpose::Enforce, Purpose::Audit] {
            if self.doubtful.get(&purpose).is_some_and(|due| *due <= now) {
                self.check_leases(host, purpose);
            }
        }
        while let Some((_, id)) = self.timers.first().copied().filter(|(due, _)| *due <= now) {
            self.look_after(host, id);
        }
        if now >= self.housekept + BEAT {
            self.housekept = now;
            self.keep_house(host);
        }
        self.armed = self.next_due().min(now + BEAT);
        self.armed.since(host.now())
    }

    /// Listens for wake-ups, and keeps house if that falls to this VM.
    fn keep_house(&mut self, host: &dyn Host) {
        for purpose in [Purpose::Enforce, Purpose::Audit] {
            self.listen(host, purpose);
        }
        let active = Rc::clone(&self.active);
        let idle = !self.served;
        for purpose in [Purpose::Enforce, Purpose::Audit] {
            let Some(local) = self.tables.get(purpose) else { continue };
            match local.keep_house(host, &active.rules, idle) {
                Ok(Some(census)) if purpose == Purpose::Enforce => active.telemetry.swept(host, &census),
                Ok(_) => {}
                Err(error) => report::backend(host, &active, &error),
            }
            self.deliver(host, purpose);
        }
    }

    /// Has wake-ups delivered to the root whose callback runs. The host tells nobody when the root that it delivers to is
    /// gone; a root that ticks is there. What was lost meanwhile is in the queue still.
    fn listen(&mut self, host: &dyn Host, purpose: Purpose) {
        let Some(local) = self.tables.get(purpose).filter(|local| local.mailbox().is_some()) else { return };
        if let Err(error) = local.listen(host) {
            report::trouble(host, &self.active, &error);
        }
        self.empty_mailbox(host, purpose);
    }

    /// Looks after one stream: a waiter that may have been granted, or whose time is up; a lease at its hold limit. Only
    /// from callbacks of a root, since it may have to answer the stream.
    fn look_after(&mut self, host: &dyn Host, id: ContextId) {
        if self.calls.contains_key(&id) {
            return self.look_after_call(host, id);
        }
        let Some(Stream { case, state, .. }) = self.take(id) else { return };
        let purpose = case.purpose();
        match state {
            State::Waiting(pending) => {
                let rules = Rc::clone(&case.active);
                let Some(local) = self.tables.get(purpose) else { return };
                let outcome = local.poll(host, &rules.rules, pending);
                self.deliver(host, purpose);
                let enforced = case.is_enforced();
                let waited = host.now().since(case.arrived);
                let fate = self.absorb(host, id, case, Ok(outcome), waited);
                if enforced {
                    self.carry_out(host, id, fate);
                }
            }
            State::Holding(held) => {
                let lost = held.lease.grants().iter().find(|grant| grant.until <= host.now());
                match lost.map(|grant| grant.name.clone()) {
                    Some(lock) => self.lose(host, id, case, held, &lock, Loss::HoldLimit),
                    None => self.put(host, id, Stream { case, state: State::Holding(held), timer: None }),
                }
            }
            State::Over(_) => self.put(host, id, Stream { case, state, timer: None }),
        }
    }

    /// The lock that a stream lost without anybody having noticed. Asks the table only where this VM was silent for so
    /// long that it may have, and has not looked since.
    pub(super) fn lapsed(&mut self, host: &dyn Host, id: ContextId) -> Option<(LockName, Loss)> {
        let Stream { case, state: State::Holding(held), .. } = self.streams.get(&id)? else { return None };
        let (purpose, ttl) = (case.purpose(), held.lease.ttl());
        let in_doubt = self.doubtful.contains_key(&purpose);
        let sure = !in_doubt && !self.tables.get(purpose)?.may_have_lapsed(host.now(), ttl);
        if sure || bug!(LostLeasePasses) {
            return None;
        }
        // What nobody took is kept by the heartbeat that is late.
        self.beat(host, purpose);
        let Stream { case, state: State::Holding(held), .. } = self.streams.get(&id)? else { return None };
        // What cannot be read now is looked at again by the next tick, and at the end of the stream.
        self.tables.get(purpose)?.check(host, &case.active.rules, &held.lease).ok().flatten()
    }

    /// A lease has ended while its request was upstream. From a callback of a root, or of the stream itself.
    pub(super) fn lose(
        &mut self,
        host: &dyn Host,
        id: ContextId,
        mut case: Case,
        held: Held,
        lock: &LockName,
        loss: Loss,
    ) {
        let purpose = case.purpose();
        let mode =
            held.lease.grants().iter().find(|grant| grant.name == *lock).map_or(Mode::Exclusive, |grant| grant.mode);
        let (owner, waited) = (held.lease.owner().clone(), held.waited);
        if let Some(local) = self.tables.get(purpose) {
            // What it still holds goes with it.
            local.release(host, &case.active.rules, held.lease);
        }
        self.deliver(host, purpose);
        let _ = host.within(id, |host| case.name_route(host));
        report::lost(host, &case, lock, Some(mode), loss);
        let abort = case.is_enforced() && case.terms.on_lease_lost == OnLeaseLost::Abort;
        if abort {
            let refusal = Refusal { lock: lock.clone(), mode, owner, cause: Cause::LeaseLost { loss } };
            let answer = Answer::refusal(&case, &Reject::Core(refusal), waited);
            self.put(host, id, Stream { case, state: State::Over(Ended::Answered), timer: None });
            self.carry_out(host, id, Fate::Answer(answer));
        } else {
            let state = State::Over(Ended::Lost(lock.clone()));
            self.put(host, id, Stream { case, state, timer: None });
        }
    }

    /// Beats for one table, if it is time to. Does not look at leases: that may have to answer streams, which only a
    /// callback of a root may do.
    pub(super) fn beat(&mut self, host: &dyn Host, purpose: Purpose) {
        let active = Rc::clone(&self.active);
        let Some(local) = self.tables.get(purpose) else { return };
        match local.beat(host, &active.rules) {
            Ok(false) => {}
            Ok(true) => drop(self.doubtful.insert(purpose, Time::ZERO)),
            Err(error) => report::backend(host, &active, &error),
        }
    }

    /// Finds the leases of a table that ended while the VM was silent. Those that cannot be read now stay in doubt.
    fn check_leases(&mut self, host: &dyn Host, purpose: Purpose) {
        let mut lost = Vec::new();
        let mut unknown = false;
        for (id, Stream { case, state, .. }) in &self.streams {
            let State::Holding(held) = state else { continue };
            if case.purpose() != purpose {
                continue;
            }
            match self.tables.get(purpose).map(|local| local.check(host, &case.active.rules, &held.lease)) {
                Some(Ok(Some((lock, loss)))) => lost.push((*id, lock, loss)),
                Some(Ok(None)) | None => {}
                Some(Err(_)) => unknown = true,
            }
        }
        for (id, lock, loss) in lost {
            if let Some(Stream { case, state: State::Holding(held), .. }) = self.take(id) {
                self.lose(host, id, case, held, &lock, loss);
            }
        }
        if unknown {
            self.doubtful.insert(purpose, host.now() + BEAT);
        } else {
            self.doubtful.remove(&purpose);
        }
    }

    /// When a tick is needed. Asks the host nothing.
    pub(super) fn next_due(&self) -> Time {
        let timer = self.timers.first().map(|(due, _)| *due);
        let doubts = self.doubtful.values().copied();
        timer.into_iter().chain(doubts).fold(self.tables.next_beat(), Time::min)
    }

    /// Sees to it that the next tick comes when it is needed.
    pub(super) fn arm(&mut self, host: &dyn Host) {
        let now = host.now();
        self.armed = self.next_due().min(now + BEAT);
        if let Err(error) = host.set_tick(self.armed.since(now)) {
            report::trouble(host, &self.active, &error);
        }
    }
}
