//! The filter: parks requests, forwards them with their fences, answers those that are refused, gives locks back.
//!
//! One [`Runtime`] an instance and VM, shared by all roots of that instance: a changed configuration makes a new root
//! in the same VM, and requests of the old one go on. HTTP contexts hold nothing but their id. Host calls go through
//! [`Host`]; who gets a lock is decided below, in the backend and the core.

mod fences;
pub mod intake;
mod report;
mod respond;
pub mod stream;

use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;

use interlock_core::session::BEAT;
use interlock_core::{
    Cause, Duration, LeaseId, LockName, Loss, Mode, Outcome, OwnerId, Refusal, Request, Rules, StoreError, Time, Want,
};

use crate::answer::Reject;
use crate::backend::local::{Local, Purpose};
use crate::host::{ContextId, Headers, Host, HostError, QueueId};
use crate::policy::{Enforcement, HeaderAnnotations, OnLeaseLost, OnUnavailable, Policy, Reentrancy};
use crate::telemetry::Telemetry;
use fences::Carried;
use intake::{Asked, Intake, Terms};
use respond::Answer;
use stream::{Case, Ended, Held, State, Stream};

/// How long a waiter goes without looking for itself: wake-ups are hints, and one may be lost.
const BACKSTOP: Duration = Duration::from_secs(1);

/// A configuration in force, with what is made of it once.
#[derive(Debug)]
pub struct Active {
    /// The policy.
    pub policy: Policy,
    /// The rules of the core that it means.
    pub rules: Rules,
    /// Its metrics.
    pub telemetry: Telemetry,
    off: bool,
    audits: bool,
}

impl Active {
    /// Puts a policy in force.
    pub fn new(policy: Policy) -> Self {
        let limits = interlock_core::Limits {
            locks_per_owner: policy.limits.locks_per_owner,
            waiters_per_lock: policy.limits.waiters_per_lock,
            locks: policy.limits.locks,
            waiters: policy.limits.waiters,
            longest_ttl: policy.limits.max_ttl,
        };
        let rules = Rules { classes: policy.classes.clone(), limits };
        let telemetry = Telemetry::new(policy.classes.names().map(str::to_owned), &policy.instance);
        let audits = policy.enforcement == Enforcement::Audit
            || policy.rules.iter().any(|rule| rule.enforcement == Enforcement::Audit);
        Active { off: intake::is_off(&policy), audits, policy, rules, telemetry }
    }
}

/// What the host does with a stream after a callback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It goes on.
    Continue,
    /// It stays where it is: parked, or answered.
    Stop,
}

/// What becomes of a request after something was decided about it.
enum Fate {
    Forward,
    Park,
    Answer(Answer),
}

/// An instance in one VM.
pub struct Runtime {
    enforce: Local,
    audit: Option<Local>,
    streams: HashMap<ContextId, Stream>,
    leases: HashMap<(Purpose, LeaseId), ContextId>,
    timers: BTreeSet<(Time, ContextId)>,
    /// The latest configuration: what is done without a request is done under it.
    active: Rc<Active>,
    /// Whether this VM has ever served a request.
    served: bool,
}

impl Runtime {
    /// The runtime of an instance, under its first configuration. Leaves no trace in the shared table.
    ///
    /// # Errors
    /// Those of the host.
    pub fn open(host: &dyn Host, active: Rc<Active>) -> Result<Self, HostError> {
        let enforce = Local::open(host, &active.policy.instance, Purpose::Enforce)?;
        let mut runtime = Runtime {
            enforce,
            audit: None,
            streams: HashMap::new(),
            leases: HashMap::new(),
            timers: BTreeSet::new(),
            active,
            served: false,
        };
        runtime.open_audit(host)?;
        Ok(runtime)
    }

    /// Goes on under another configuration, for a root whose callback runs. Streams keep the one that they came under.
    ///
    /// # Errors
    /// Those of the host.
    pub fn reconfigure(&mut self, host: &dyn Host, active: Rc<Active>) -> Result<(), HostError> {
        if self.active.rules.classes != active.rules.classes {
            // Gauges of classes that are gone would stand still for ever.
            self.active.telemetry.retire(host);
        }
        self.active = active;
        self.open_audit(host)?;
        // Wake-ups go to the root that registered last. The old root may be gone soon; this one stays.
        for local in [Some(&mut self.enforce), self.audit.as_mut()].into_iter().flatten() {
            if local.mailbox().is_some() {
                local.listen(host)?;
            }
        }
        Ok(())
    }

    fn open_audit(&mut self, host: &dyn Host) -> Result<(), HostError> {
        if self.audit.is_none() && self.active.audits {
            self.audit = Some(Local::open(host, &self.active.policy.instance, Purpose::Audit)?);
        }
        Ok(())
    }

    /// The request headers of the effective stream.
    pub fn request_headers(&mut self, host: &dyn Host, id: ContextId, active: &Rc<Active>) -> Flow {
        if active.off {
            return Flow::Continue;
        }
        self.served = true;
        let policy = &active.policy;
        let intake = intake::read(host, policy);
        let carried = fences::verified(host, policy);
        clean(host, policy);
        let (case, outcome) = match intake {
            Intake::Nothing => {
                fences::forward(host, &carried, &[]);
                return Flow::Continue;
            }
            Intake::Reject(terms, reject) => (case(host, active, terms, None, carried), Err(reject)),
            Intake::Locks(Asked { terms, owner, wants }) => {
                let case = case(host, active, terms, Some(owner.clone()), carried);
                let outcome = self.ask(host, &case, owner, wants);
                (case, outcome)
            }
        };
        match self.absorb(host, id, case, outcome) {
            Fate::Forward => {
                self.forward(host, id);
                Flow::Continue
            }
            Fate::Park => {
                self.arm(host);
                Flow::Stop
            }
            Fate::Answer(answer) => {
                if let Err(error) = answer.send(host) {
                    report::trouble(host, active, &error);
                }
                Flow::Stop
            }
        }
    }

    /// A part of the request's body, or its trailers. None can come while the request is parked, unless the filter chain
    /// is configured to let headers go ahead of it; then the request is refused rather than forwarded without its lock.
    pub fn request_body(&mut self, host: &dyn Host, id: ContextId) -> Flow {
        let Some(stream) = self.streams.get(&id) else { return Flow::Continue };
        match stream.state {
            State::Waiting(_) if stream.case.is_enforced() => {
                let detail =
                    "the body came while the request was parked: allow_on_headers_stop_iteration is not supported";
                self.abandon(host, id, Cause::Backend { detail: detail.into() });
                Flow::Stop
            }
            State::Over(Ended::Answered) => Flow::Stop,
            State::Waiting(_) | State::Holding(_) | State::Over(_) => Flow::Continue,
        }
    }

    /// The response headers of the effective stream; the filter's own answers come by here too.
    pub fn response_headers(&mut self, host: &dyn Host, id: ContextId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.case.responding = true;
        respond::annotate(host, stream);
    }

    /// The stream has ended, in whatever way: gives back what it has.
    pub fn end(&mut self, host: &dyn Host, id: ContextId) {
        let Some(Stream { case, state, .. }) = self.take(id) else { return };
        let purpose = case.purpose();
        let Some(local) = self.local(purpose) else { return };
        match state {
            State::Waiting(pending) => {
                report::cancelled(host, &case, &pending);
                local.cancel(host, &case.active.rules, pending);
            }
            State::Holding(held) => {
                for lock in local.release(host, &case.active.rules, held.lease) {
                    report::lost(host, &case, &lock, Loss::Expired);
                }
            }
            State::Over(_) => return,
        }
        self.deliver(host, purpose);
    }

    /// Messages have come by a queue: waiters of this VM were granted their locks.
    pub fn queue_ready(&mut self, host: &dyn Host, queue: QueueId) {
        for purpose in [Purpose::Enforce, Purpose::Audit] {
            let Some(local) = self.local(purpose).filter(|local| local.mailbox() == Some(queue)) else { continue };
            for lease in local.woken(host) {
                if let Some(id) = self.leases.get(&(purpose, lease)).copied() {
                    self.look_after(host, id);
                }
            }
        }
        self.arm(host);
    }

    /// A tick of a root: beats, looks after whoever is due, keeps house.
    pub fn tick(&mut self, host: &dyn Host) {
        let active = Rc::clone(&self.active);
        for purpose in [Purpose::Enforce, Purpose::Audit] {
            self.beat(host, purpose);
        }
        let now = host.now();
        while let Some((_, id)) = self.timers.first().copied().filter(|(due, _)| *due <= now) {
            self.look_after(host, id);
        }
        let idle = !self.served;
        for purpose in [Purpose::Enforce, Purpose::Audit] {
            let Some(local) = self.local(purpose) else { continue };
            match local.keep_house(host, &active.rules, idle) {
                Ok(Some(census)) if purpose == Purpose::Enforce => active.telemetry.swept(host, &census),
                Ok(_) => {}
                Err(error) => report::backend(host, &active, &error),
            }
            self.deliver(host, purpose);
        }
        self.arm(host);
    }

    /// Whether anything hangs on this VM.
    pub fn is_idle(&self) -> bool {
        self.streams.is_empty()
    }

    /// Asks for the locks of a stream.
    fn ask(&mut self, host: &dyn Host, case: &Case, owner: OwnerId, wants: Vec<Want>) -> Result<Outcome, Reject> {
        let (purpose, rules) = (case.purpose(), &case.active.rules);
        let policy = &case.active.policy;
        let first = wants.first().map(|want| (want.name.clone(), want.mode));
        self.beat(host, purpose);
        let asked = host.now();
        let outcome = match self.local(purpose) {
            Some(local) => local.new_lease().and_then(|lease| {
                let owner = match policy.reentrancy {
                    Reentrancy::Lease => fences::branch(host, local, rules, &owner, lease, &case.carried)?,
                    Reentrancy::Owner | Reentrancy::None => owner.clone(),
                };
                let request = Request::new(lease, owner, case.arrived, wants, &rules.classes)
                    .reentrant(policy.reentrancy != Reentrancy::None)
                    .asked_by(case.terms.asked_by.clone());
                Ok(local.acquire(host, rules, request))
            }),
            None => Err(StoreError::Failed(String::from("the table is not open"))),
        };
        case.active.telemetry.backend(host, host.now().since(asked));
        self.deliver(host, purpose);
        outcome.map_err(|error| match first {
            Some((lock, mode)) => Reject::Core(Refusal { lock, mode, owner, cause: error.into() }),
            None => Reject::Malformed { detail: String::from("it names no lock") },
        })
    }

    /// Takes in what was decided about a stream, and says what has to become of its request.
    fn absorb(&mut self, host: &dyn Host, id: ContextId, case: Case, outcome: Result<Outcome, Reject>) -> Fate {
        let enforced = case.is_enforced();
        let (state, fate) = match outcome {
            Ok(Outcome::Granted(lease)) => {
                let waited = host.now().since(case.arrived);
                report::acquired(host, &case, &lease, waited);
                let fences = fences::of(host, &case, &lease);
                (State::Holding(Held { lease, waited, fences }), Fate::Forward)
            }
            Ok(Outcome::Waiting(pending)) => {
                let fate = if enforced { Fate::Park } else { Fate::Forward };
                (State::Waiting(pending), fate)
            }
            Ok(Outcome::Refused(refusal)) => self.reject(host, &case, Reject::Core(refusal)),
            Err(reject) => self.reject(host, &case, reject),
        };
        self.put(host, id, Stream { case, state, timer: None });
        fate
    }

    /// A request that does not get its locks: whether it is answered, or goes on all the same.
    fn reject(&self, host: &dyn Host, case: &Case, reject: Reject) -> (State, Fate) {
        let waited = host.now().since(case.arrived);
        report::refused(host, case, &reject, waited);
        let failed = matches!(&reject, Reject::Core(Refusal { cause: Cause::Backend { .. }, .. }));
        if failed && case.terms.on_backend_unavailable == OnUnavailable::Allow {
            (State::Over(Ended::Unlocked), Fate::Forward)
        } else if case.is_enforced() {
            let answer = Answer::refusal(case, &reject, waited);
            (State::Over(Ended::Answered), Fate::Answer(answer))
        } else {
            (State::Over(Ended::WouldRefuse(Box::new(reject))), Fate::Forward)
        }
    }

    /// Looks after one stream: a waiter that may have been granted, or whose time is up; a lease at its hold limit. Only
    /// from callbacks of a root, since it may have to answer the stream.
    fn look_after(&mut self, host: &dyn Host, id: ContextId) {
        let Some(Stream { case, state, .. }) = self.take(id) else { return };
        let purpose = case.purpose();
        match state {
            State::Waiting(pending) => {
                let rules = Rc::clone(&case.active);
                let Some(local) = self.local(purpose) else { return };
                let outcome = local.poll(host, &rules.rules, pending);
                self.deliver(host, purpose);
                let enforced = case.is_enforced();
                let fate = self.absorb(host, id, case, Ok(outcome));
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

    /// Does to a parked stream what was decided, from a callback of a root.
    fn carry_out(&mut self, host: &dyn Host, id: ContextId, fate: Fate) {
        let done = match fate {
            Fate::Park => return,
            Fate::Forward => host.within(id, |host| {
                self.forward(host, id);
                host.resume()
            }),
            Fate::Answer(answer) => host.within(id, |host| answer.send(host)),
        };
        // The host has no such stream any more, and will say nothing of its end.
        if !matches!(done, Ok(Ok(()))) {
            self.end(host, id);
        }
    }

    /// A lease has ended while its request was upstream.
    fn lose(&mut self, host: &dyn Host, id: ContextId, case: Case, held: Held, lock: &LockName, loss: Loss) {
        let purpose = case.purpose();
        let mode =
            held.lease.grants().iter().find(|grant| grant.name == *lock).map_or(Mode::Exclusive, |grant| grant.mode);
        let owner = held.lease.owner().clone();
        if let Some(local) = self.local(purpose) {
            // What it still holds goes with it.
            local.release(host, &case.active.rules, held.lease);
        }
        self.deliver(host, purpose);
        report::lost(host, &case, lock, loss);
        let abort = case.is_enforced() && case.terms.on_lease_lost == OnLeaseLost::Abort;
        if abort {
            let refusal = Refusal { lock: lock.clone(), mode, owner, cause: Cause::LeaseLost { loss } };
            let answer = Answer::refusal(&case, &Reject::Core(refusal), Duration::ZERO);
            self.put(host, id, Stream { case, state: State::Over(Ended::Answered), timer: None });
            self.carry_out(host, id, Fate::Answer(answer));
        } else {
            let state = State::Over(Ended::Lost(lock.clone()));
            self.put(host, id, Stream { case, state, timer: None });
        }
    }

    /// Refuses a parked request from a callback of its own stream.
    fn abandon(&mut self, host: &dyn Host, id: ContextId, cause: Cause) {
        let Some(Stream { case, state: State::Waiting(pending), .. }) = self.take(id) else { return };
        let purpose = case.purpose();
        let waits_for = pending.waits_for().map(|(lock, mode)| (lock.clone(), mode));
        let owner = pending.owner().clone();
        if let Some(local) = self.local(purpose) {
            local.cancel(host, &case.active.rules, pending);
        }
        self.deliver(host, purpose);
        let Some((lock, mode)) = waits_for else { return };
        let reject = Reject::Core(Refusal { lock, mode, owner, cause });
        let waited = host.now().since(case.arrived);
        report::refused(host, &case, &reject, waited);
        let sent = Answer::refusal(&case, &reject, waited).send(host);
        self.put(host, id, Stream { case, state: State::Over(Ended::Answered), timer: None });
        if sent.is_err() {
            self.end(host, id);
        }
    }

    /// Beats for one table, and looks at every lease if the VM was silent for too long.
    fn beat(&mut self, host: &dyn Host, purpose: Purpose) {
        let active = Rc::clone(&self.active);
        let Some(local) = self.local(purpose) else { return };
        match local.beat(host, &active.rules) {
            Ok(false) => {}
            Ok(true) => self.check_leases(host, purpose),
            Err(error) => report::backend(host, &active, &error),
        }
    }

    /// Finds the leases that ended while the VM was silent.
    fn check_leases(&mut self, host: &dyn Host, purpose: Purpose) {
        let mut lost = Vec::new();
        for (id, Stream { case, state, .. }) in &self.streams {
            let State::Holding(held) = state else { continue };
            if case.purpose() != purpose {
                continue;
            }
            let local = match purpose {
                Purpose::Enforce => Some(&mut self.enforce),
                Purpose::Audit => self.audit.as_mut(),
            };
            // What cannot be read now is found at the end of the stream.
            if let Some(Ok(Some((lock, loss)))) = local.map(|local| local.check(host, &case.active.rules, &held.lease))
            {
                lost.push((*id, lock, loss));
            }
        }
        for (id, lock, loss) in lost {
            if let Some(Stream { case, state: State::Holding(held), .. }) = self.take(id) {
                self.lose(host, id, case, held, &lock, loss);
            }
        }
    }

    /// Forwards the effective stream's request: with its fences, if decisions count for it.
    fn forward(&self, host: &dyn Host, id: ContextId) {
        let Some(stream) = self.streams.get(&id) else { return };
        let own = match &stream.state {
            State::Holding(held) if stream.case.is_enforced() => held.fences.as_slice(),
            State::Holding(_) | State::Waiting(_) | State::Over(_) => &[],
        };
        fences::forward(host, &stream.case.carried, own);
    }

    fn local(&mut self, purpose: Purpose) -> Option<&mut Local> {
        match purpose {
            Purpose::Enforce => Some(&mut self.enforce),
            Purpose::Audit => self.audit.as_mut(),
        }
    }

    /// Wakes waiters and counts what happened.
    fn deliver(&mut self, host: &dyn Host, purpose: Purpose) {
        let Some(local) = self.local(purpose) else { return };
        let effects = local.deliver(host);
        if purpose == Purpose::Enforce {
            report::observe(host, &self.active, &effects.events);
        }
    }

    /// Takes a stream out, with its timer and its lease.
    fn take(&mut self, id: ContextId) -> Option<Stream> {
        let stream = self.streams.remove(&id)?;
        if let Some(timer) = stream.timer {
            self.timers.remove(&(timer, id));
        }
        if let State::Waiting(pending) = &stream.state {
            self.leases.remove(&(stream.case.purpose(), pending.lease()));
        }
        Some(stream)
    }

    /// Puts a stream in, with the timer that its state asks for.
    fn put(&mut self, host: &dyn Host, id: ContextId, mut stream: Stream) {
        stream.timer = match &stream.state {
            State::Waiting(pending) => {
                self.leases.insert((stream.case.purpose(), pending.lease()), id);
                // Never at once: a look that changes nothing must not be followed by the next without end.
                let now = host.now();
                Some(pending.poll_at().min(now + BACKSTOP).max(now + Duration::from_millis(1)))
            }
            State::Holding(held) => Some(held.lease.until()),
            State::Over(_) => None,
        };
        self.timers.extend(stream.timer.map(|timer| (timer, id)));
        self.streams.insert(id, stream);
    }

    /// Sees to it that the next tick comes when it is needed.
    fn arm(&mut self, host: &dyn Host) {
        let now = host.now();
        let due = self.timers.first().map_or(Time::NEVER, |(due, _)| *due);
        let beats = [Some(&self.enforce), self.audit.as_ref()].into_iter().flatten().map(Local::next_beat);
        let next = beats.chain([due, now + BEAT]).min().unwrap_or(now);
        if let Err(error) = host.set_tick(next.since(now)) {
            report::trouble(host, &self.active, &error);
        }
    }
}

/// A request that asked for something, as it came in.
fn case(host: &dyn Host, active: &Rc<Active>, terms: Terms, owner: Option<OwnerId>, carried: Vec<Carried>) -> Case {
    Case { active: Rc::clone(active), terms, owner, arrived: host.now(), carried, responding: false }
}

/// Removes what is the filter's to set, and what it consumes.
fn clean(host: &dyn Host, policy: &Policy) {
    let consumed = policy.annotations.header != HeaderAnnotations::Pass;
    for name in ["lock-status", "lock-fence"].into_iter().chain(consumed.then_some("lock")) {
        // Fails only outside the request phase, where there is nothing to forward.
        let _ = host.remove_header(Headers::Request, name);
    }
}
