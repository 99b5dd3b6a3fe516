//! What a VM does unasked: ticks, wake-ups, heartbeats, housekeeping; and what these find out about its streams.
//!
//! All of it runs in callbacks of a root, the only place from which other streams may be answered.

use std::collections::BTreeMap;
use std::rc::Rc;

use interlock_core::session::BEAT;
use interlock_core::{Cause, Duration, LockName, Loss, Mode, Refusal, Tally, Time, bug};

use super::respond::Answer;
use super::stream::{Case, Ended, Held, State, Stream};
use super::{Active, Fate, Runtime, report};
use crate::answer::Reject;
use crate::backend::etcd::Etcd;
use crate::backend::remote::Remote;
use crate::backend::{Lease, Purpose, Waiting};
use crate::host::{CallToken, ContextId, Host, QueueId, StreamToken};
use crate::policy::{Backend, OnLeaseLost};

/// How long one tick looks after waiters before it lets the worker's requests, and its heartbeat, have their turn. Whoever
/// is left is looked after by the next, which follows at once.
const SLICE: Duration = Duration::from_millis(20);

impl Runtime {
    /// Messages have come by a queue. If it is one of this instance's, waiters of this VM were granted their locks.
    pub fn queue_ready(&mut self, host: &dyn Host, queue: QueueId) {
        for purpose in Purpose::ALL {
            if self.backends.local(purpose).is_some_and(|local| local.mailbox() == Some(queue)) {
                self.empty_mailbox(host, purpose);
                self.arm(host);
            }
        }
        let mut heard = false;
        for remote in self.backends.remotes() {
            heard |= remote.heard(host, queue);
        }
        if heard {
            self.attend(host);
            self.arm(host);
        }
    }

    /// The answer to a call has come. `of_stream`: it came to a stream, since that had called.
    pub fn call_answered(&mut self, host: &dyn Host, token: CallToken, headers: usize, of_stream: bool) {
        if self.question_answered(host, token, headers) {
            // A request that passed may have asked the authority for its locks.
            self.call_root(host);
            return;
        }
        let Some(authority) = self.backends.authorities().iter_mut().find(|authority| authority.awaits(token)) else {
            return;
        };
        authority.answered(host, token, headers);
        self.go_on(host, of_stream);
    }

    /// The root whose callback runs from here on, as far as that matters.
    pub fn in_root(&mut self, root: ContextId) {
        self.root = root;
    }

    /// Opens one stream of a backend's, if one is needed, from the callback of a root that has just begun; true if it has tried to.
    /// The host bears no second one in the same callback, whichever instance it is for.
    pub fn open_stream(&mut self, host: &dyn Host) -> bool {
        let root = self.root;
        self.backends.etcds().iter_mut().any(|etcd| etcd.open_stream(host, root))
    }

    /// The answer to a call over gRPC has come. `of_stream`: as above.
    pub fn method_answered(&mut self, host: &dyn Host, token: CallToken, status: u32, of_stream: bool) {
        let Some(etcd) = self.backends.etcds().iter_mut().find(|etcd| etcd.awaits(token)) else { return };
        etcd.answered(host, token, status);
        self.go_on(host, of_stream);
    }

    /// A message has come on a stream of a backend's.
    pub fn stream_message(&mut self, host: &dyn Host, stream: StreamToken) {
        self.of_stream(host, stream, |etcd| etcd.message(host, stream));
    }

    /// A stream of a backend's has ended.
    pub fn stream_closed(&mut self, host: &dyn Host, stream: StreamToken, status: u32) {
        self.of_stream(host, stream, |etcd| etcd.closed(host, stream, status));
    }

    fn of_stream(&mut self, host: &dyn Host, stream: StreamToken, act: impl FnOnce(&mut Etcd)) {
        let Some(etcd) = self.backends.etcds().iter_mut().find(|etcd| etcd.has(stream)) else { return };
        act(etcd);
        self.attend(host);
        self.hurry(host);
    }

    /// A call was answered: does what follows from it. `of_stream`: in a callback of a stream.
    fn go_on(&mut self, host: &dyn Host, of_stream: bool) {
        self.wake(host);
        // What a stream sends, only that stream is told the answer of.
        if of_stream {
            self.call_root(host);
        } else {
            self.attend(host);
        }
        self.hurry(host);
    }

    /// Has the tick come sooner, if something is due before it.
    pub(super) fn hurry(&mut self, host: &dyn Host) {
        if self.next_due() < self.armed {
            self.arm(host);
        }
    }

    /// Looks after the streams of which authorities have decided something. From a callback of a root, as the host sees it.
    fn wake(&mut self, host: &dyn Host) {
        loop {
            let woken: Vec<ContextId> = self.backends.remotes().flat_map(Remote::woken).collect();
            if woken.is_empty() {
                break;
            }
            for id in woken {
                self.look_after(host, id);
            }
        }
        self.take_notes(host);
    }

    /// Sends what authorities are to be sent. Only from a callback of a root.
    pub fn attend(&mut self, host: &dyn Host) {
        self.backends.remotes().for_each(|remote| remote.flush(host));
        self.wake(host);
    }

    /// Has a root send what authorities are to be sent, from a callback of a stream.
    pub(super) fn call_root(&mut self, host: &dyn Host) {
        for remote in self.backends.remotes() {
            // The next tick sends it.
            let _ = remote.call_root(host);
        }
        self.take_notes(host);
    }

    fn take_notes(&mut self, host: &dyn Host) {
        for remote in self.backends.remotes() {
            report::called(host, &self.active, &remote.take_notes());
        }
    }

    /// Says what this VM has at authorities, and shows in the gauges what all have.
    fn count_leases(&mut self, host: &dyn Host) {
        if self.active.policy.backend == Backend::Local {
            return;
        }
        let telemetry = &self.active.telemetry;
        let mut mine = BTreeMap::<String, Tally>::new();
        let mut count = |class, held, waiting| {
            // Clients choose classes that no policy knows.
            let tally = mine.entry(telemetry.known(class).to_owned()).or_default();
            (tally.held, tally.waiting) = (tally.held + held, tally.waiting + waiting);
        };
        for Stream { state, .. } in self.streams.values().filter(|stream| stream.case.is_enforced()) {
            match state {
                State::Waiting(Waiting::Local(_)) | State::Holding(Held { lease: Lease::Local(_), .. }) => {}
                State::Waiting(waiting) => {
                    if let Some((lock, _)) = waiting.waits_for() {
                        count(lock.class(), 0, 1);
                    }
                }
                State::Holding(Held { lease, .. }) => {
                    for grant in lease.grants() {
                        count(grant.name.class(), 1, 0);
                    }
                }
                State::Over(_) => {}
            }
        }
        match self.shares.exchange(host, &mine) {
            Ok(all) => telemetry.counted(host, &all),
            Err(error) => report::backend(host, &self.active, &error),
        }
    }

    fn empty_mailbox(&mut self, host: &dyn Host, purpose: Purpose) {
        let woken = self.backends.local(purpose).map(|local| local.woken(host)).unwrap_or_default();
        for lease in woken {
            if let Some(id) = self.leases.get(&(purpose, lease)).copied() {
                self.look_after(host, id);
            }
        }
    }

    /// A tick of a root: beats, looks after whoever is due, keeps house. Says how soon the next one is needed.
    pub fn tick(&mut self, host: &dyn Host) -> Duration {
        for purpose in Purpose::ALL {
            self.beat(host, purpose);
        }
        self.backends.remotes().for_each(|remote| remote.tick(host));
        self.attend(host);
        let now = host.now();
        for purpose in Purpose::ALL {
            if self.doubtful.get(&purpose).is_some_and(|due| *due <= now) {
                self.check_leases(host, purpose);
            }
        }
        while let Some((_, id)) = self.timers.first().copied().filter(|(due, _)| *due <= now) {
            match self.respite(id, now) {
                Some(due) => self.retime(id, due),
                None => self.look_after(host, id),
            }
            if host.now() >= now + SLICE {
                break;
            }
        }
        if now >= self.housekept + BEAT {
            self.housekept = now;
            self.keep_house(host);
            self.count_leases(host);
        }
        self.attend(host);
        self.armed = self.next_due().min(now + BEAT);
        self.armed.since(host.now())
    }

    /// Listens for wake-ups, and keeps house if that falls to this VM.
    fn keep_house(&mut self, host: &dyn Host) {
        for purpose in Purpose::ALL {
            self.listen(host, purpose);
        }
        let active = Rc::clone(&self.active);
        for remote in self.backends.remotes() {
            // One that is called needs a root that is there.
            if let Err(error) = remote.listen(host) {
                report::trouble(host, &active, &error);
            }
        }
        self.retire(&active);
        let shows = active.policy.backend == Backend::Local;
        let idle = !self.served;
        for purpose in Purpose::ALL {
            let Some(local) = self.backends.local(purpose) else { continue };
            match local.keep_house(host, &active.rules, idle) {
                Ok(Some(census)) if purpose == Purpose::Enforce && shows => active.telemetry.swept(host, &census),
                Ok(_) => {}
                Err(error) => report::backend(host, &active, &error),
            }
            self.deliver(host, purpose);
        }
    }

    /// Leaves the tables that the configuration names no more, once no request is in them.
    fn retire(&mut self, active: &Active) {
        self.backends.retire(&active.policy.backend);
        if active.policy.backend == Backend::Local || active.policy.api.is_some() {
            return;
        }
        let local = |stream: &Stream| {
            matches!(
                stream.state,
                State::Waiting(Waiting::Local(_)) | State::Holding(Held { lease: Lease::Local(_), .. })
            )
        };
        if self.calls.is_empty() && !self.streams.values().any(local) {
            self.backends.close_locals();
            self.doubtful.clear();
        }
    }

    /// Has wake-ups delivered to the root whose callback runs. The host tells nobody when the root that it delivers to is
    /// gone; a root that ticks is there. What was lost meanwhile is in the queue still.
    fn listen(&mut self, host: &dyn Host, purpose: Purpose) {
        let Some(local) = self.backends.local(purpose).filter(|local| local.mailbox().is_some()) else { return };
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
        if self.is_question_due(id, host.now()) {
            return self.give_up_question(host, id);
        }
        let Some(Stream { case, state, .. }) = self.take(id) else { return };
        let purpose = case.purpose();
        match state {
            State::Waiting(waiting) => {
                let outcome = self.backends.poll(host, purpose, &case.active.rules, waiting);
                self.deliver(host, purpose);
                let enforced = case.is_enforced();
                let waited = host.now().since(case.arrived);
                let fate = self.absorb(host, id, case, outcome, waited);
                if enforced {
                    self.carry_out(host, id, fate);
                }
            }
            State::Holding(held) => {
                let at_limit = held.lease.grants().iter().find(|grant| grant.until <= host.now());
                let at_limit = at_limit.map(|grant| (grant.name.clone(), Loss::HoldLimit));
                match at_limit.or_else(|| self.backends.lost(host, &held.lease)) {
                    Some((lock, loss)) => self.lose(host, id, case, held, &lock, loss),
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
        if let Lease::Authority(_) | Lease::Etcd(_) = held.lease {
            return self.backends.lost(host, &held.lease);
        }
        let in_doubt = self.doubtful.contains_key(&purpose);
        let sure = !in_doubt && !self.backends.local(purpose)?.may_have_lapsed(host.now(), ttl);
        if sure || bug!(LostLeasePasses) {
            return None;
        }
        // What nobody took is kept by the heartbeat that is late.
        self.beat(host, purpose);
        let Stream { case, state: State::Holding(held), .. } = self.streams.get(&id)? else { return None };
        let Lease::Local(lease) = &held.lease else { return None };
        // What cannot be read now is looked at again by the next tick, and at the end of the stream.
        self.backends.local(purpose)?.check(host, &case.active.rules, lease).ok().flatten()
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
        report::released(host, &case, &held);
        // What it still holds goes with it.
        self.backends.release(host, purpose, &case.active.rules, held.lease);
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
        let Some(local) = self.backends.local(purpose) else { return };
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
            let State::Holding(Held { lease: Lease::Local(lease), .. }) = state else { continue };
            if case.purpose() != purpose {
                continue;
            }
            match self.backends.local(purpose).map(|local| local.check(host, &case.active.rules, lease)) {
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
        timer.into_iter().chain(doubts).fold(self.backends.next_due(), Time::min)
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
