//! The filter: parks requests, forwards them with their fences, answers those that are refused, gives locks back.
//!
//! One [`Runtime`] an instance and VM, shared by all roots of that instance: a changed configuration makes a new root
//! in the same VM, and requests of the old one go on. HTTP contexts hold nothing but their id. Host calls go through
//! [`Host`]; who gets a lock is decided below, in the backend and the core.

mod ask;
mod calls;
pub mod fences;
mod guard;
mod holder;
pub mod intake;
mod report;
mod respond;
pub mod stream;
#[cfg(test)]
mod tests;
mod upkeep;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use interlock_core::{Cause, Duration, LeaseId, Loss, OwnerId, Refusal, Rules, Time, bug};

use crate::answer::Reject;
use crate::answer::headers::FenceMember;
use crate::backend::authority::shares::Shares;
use crate::backend::seen::Seen;
use crate::backend::{Backends, Outcome, Purpose, Waiting};
use crate::host::{CallToken, ContextId, Headers, Host, HostError};
use crate::policy::{Backend, HeaderAnnotations, OnUnavailable, Policy};
use crate::telemetry::Telemetry;
use calls::Call;
use guard::Passage;
use holder::Question;
use intake::{Asked, Facts, Intake, Terms};
use respond::Answer;
use stream::{Case, Ended, Held, State, Stream};

/// How long a waiter goes without looking for itself: wake-ups are hints, and one may be lost.
const BACKSTOP: Duration = Duration::from_secs(1);

/// A look costs more the more there are who wait. So in a crowd each looks less often: one of them in this span on average.
const EACH_LOOK: Duration = Duration::from_millis(2);

/// However large the crowd is.
const LONGEST_BACKSTOP: Duration = Duration::from_secs(10);

/// What is said where a request's body went ahead of it.
const BODY_FIRST: &str = "the body came while the request was parked: allow_on_headers_stop_iteration is not supported";

/// A configuration in force, with what is made of it once.
#[derive(Debug)]
pub struct Active {
    /// The policy.
    pub policy: Policy,
    /// The rules of the core that it means.
    pub rules: Rc<Rules>,
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
        // Only a lease that is renewed by message can outlive the process that the table lives in.
        let grace = if policy.api.is_some() { policy.limits.max_ttl } else { Duration::ZERO };
        let rules = Rc::new(Rules { classes: policy.classes.clone(), limits, grace });
        let telemetry = Telemetry::new(policy.classes.names().map(str::to_owned), &policy.instance);
        let audits = policy.enforcement.audits() || policy.rules.iter().any(|rule| rule.enforcement.audits());
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
    backends: Backends,
    /// What guards have seen, once there were any.
    seen: Option<Seen>,
    streams: HashMap<ContextId, Stream>,
    /// Who waits at a local table for which lease.
    leases: HashMap<(Purpose, LeaseId), ContextId>,
    /// Requests to the lease API under way.
    calls: HashMap<ContextId, Call>,
    /// Guarded requests whose authority is asked who holds the lock, and the calls that ask it.
    questions: HashMap<ContextId, Question>,
    asked: HashMap<CallToken, ContextId>,
    timers: BTreeSet<(Time, ContextId)>,
    /// The latest configuration: what is done without a request is done under it.
    active: Rc<Active>,
    /// Whether this VM has ever served a request.
    served: bool,
    /// Tables in which leases may have ended unnoticed, because this VM was silent for too long; and when to look.
    doubtful: BTreeMap<Purpose, Time>,
    /// When the next tick comes, as it was last asked for.
    armed: Time,
    /// When this VM last kept house, or asked to.
    housekept: Time,
    /// What this VM has at authorities, among the others.
    shares: Shares,
    /// The root whose callback runs, or ran last.
    root: ContextId,
}

impl Runtime {
    /// The runtime of an instance, under its first configuration. Leaves no trace in the shared table.
    ///
    /// # Errors
    /// Those of the host.
    pub fn open(host: &dyn Host, active: Rc<Active>) -> Result<Self, HostError> {
        let shares = Shares::new(&active.policy.instance, host.random()?);
        let mut runtime = Runtime {
            backends: Backends::default(),
            seen: None,
            streams: HashMap::new(),
            leases: HashMap::new(),
            calls: HashMap::new(),
            questions: HashMap::new(),
            asked: HashMap::new(),
            timers: BTreeSet::new(),
            active,
            served: false,
            doubtful: BTreeMap::new(),
            armed: Time::NEVER,
            housekept: Time::ZERO,
            shares,
            root: ContextId(0),
        };
        runtime.open_backends(host)?;
        Ok(runtime)
    }

    /// Goes on under another configuration, for a root whose callback runs. Streams keep the one that they came under.
    ///
    /// # Errors
    /// Those of the host.
    pub fn reconfigure(&mut self, host: &dyn Host, active: Rc<Active>) -> Result<(), HostError> {
        if self.active.rules.classes != active.rules.classes || self.active.policy.backend != active.policy.backend {
            // Gauges of classes that are gone would stand still for ever, and so would those of a table that is left behind.
            self.active.telemetry.retire(host);
        }
        self.active = active;
        self.open_backends(host)?;
        // Wake-ups go to the root that registered last. The old root may be gone soon; this one stays.
        for purpose in Purpose::ALL {
            if let Some(local) = self.backends.local(purpose).filter(|local| local.mailbox().is_some()) {
                local.listen(host)?;
            }
        }
        self.backends.remotes().try_for_each(|remote| remote.listen(host))
    }

    fn open_backends(&mut self, host: &dyn Host) -> Result<(), HostError> {
        let Active { policy: Policy { instance, backend, api, .. }, audits, .. } = &*self.active;
        match backend {
            Backend::Local => {
                self.backends.open_local(host, instance, Purpose::Enforce)?;
                if *audits {
                    self.backends.open_local(host, instance, Purpose::Audit)?;
                }
            }
            Backend::Authority(at) => {
                self.backends.authority(host, instance, at, Purpose::Enforce)?;
                if *audits {
                    self.backends.authority(host, instance, at, Purpose::Audit)?;
                }
            }
            Backend::Etcd(at) => {
                self.backends.etcd(host, instance, at, Purpose::Enforce)?;
                if *audits {
                    self.backends.etcd(host, instance, at, Purpose::Audit)?;
                }
            }
        }
        if api.is_some() {
            self.backends.open_local(host, instance, Purpose::Enforce)?;
        }
        if self.seen.is_none() && !self.active.policy.guards.is_empty() {
            self.seen = Some(Seen::open(host, &self.active.policy.instance)?);
        }
        Ok(())
    }

    /// The request headers of the effective stream.
    /// `end`: there is no body behind them.
    pub fn request_headers(&mut self, host: &dyn Host, id: ContextId, active: &Rc<Active>, end: bool) -> Flow {
        self.served = true;
        let policy = &active.policy;
        let facts = Facts::of(host, policy);
        if let Some(api) = &policy.api
            && let Some(flow) = self.call(host, id, active, api, facts.fields(), end)
        {
            return flow;
        }
        if active.off {
            // The kill switch decides nothing. That nobody can forge what is the filter's to set holds all the same.
            not_the_callers(policy).for_each(|name| remove(host, name));
            return Flow::Continue;
        }
        let intake = intake::read(&facts);
        let mut inbound = fences::inbound(host, policy, &facts);
        let guarded = guard::of(&facts, active);
        // What is not there need not be removed: that would be a call of the host for each.
        not_the_callers(policy).filter(|name| facts.fields().has(name)).for_each(|name| remove(host, name));
        let passage = guarded.map(|guarded| self.guard(host, active, &facts, guarded, &mut inbound));
        self.pass(host, id, active, passage.unwrap_or(Passage::Free), intake, inbound.verified)
    }

    /// Has the effective stream's request go on from its guard as that says.
    fn pass(
        &mut self,
        host: &dyn Host,
        id: ContextId,
        active: &Rc<Active>,
        passage: Passage,
        intake: Intake,
        carried: Vec<FenceMember>,
    ) -> Flow {
        let noted = match passage {
            Passage::Free => None,
            Passage::Noted(case, ended) => Some((case, ended)),
            Passage::Stopped(case, answer) => {
                self.put(host, id, Stream { case, state: State::Over(Ended::Answered), timer: None });
                send(host, active, &answer);
                return Flow::Stop;
            }
            Passage::Asked(question) => {
                if question.case.is_enforced() {
                    self.keep_question(host, id, question, Some((intake, carried)));
                    return Flow::Stop;
                }
                self.keep_question(host, id, question, None);
                None
            }
        };
        self.lock(host, id, active, intake, carried, noted)
    }

    /// Gets the effective stream's request the locks that it asks for.
    fn lock(
        &mut self,
        host: &dyn Host,
        id: ContextId,
        active: &Rc<Active>,
        intake: Intake,
        carried: Vec<FenceMember>,
        noted: Option<(Case, Ended)>,
    ) -> Flow {
        let (mut case, outcome) = match intake {
            Intake::Nothing => {
                fences::forward(host, &carried, &[]);
                if let Some((case, ended)) = noted {
                    self.put(host, id, Stream { case, state: State::Over(ended), timer: None });
                }
                return Flow::Continue;
            }
            Intake::Reject(terms, reject) => {
                (case(host, active, terms, None, carried), Outcome::Refused(Box::new(reject)))
            }
            Intake::Locks(Asked { terms, owner, wants }) => {
                let case = case(host, active, terms, Some(owner.clone()), carried);
                let outcome = self.ask(host, id, &case, owner, wants);
                (case, outcome)
            }
        };
        case.guarded = noted.map(|(_, ended)| ended);
        if !matches!(outcome, Outcome::Granted(_)) {
            case.name_route(host);
        }
        let fate = self.absorb(host, id, case, outcome, Duration::ZERO);
        self.call_root(host);
        // Its wait, its hold limit, the heartbeat that its TTL asks for: one may be due before the tick that is on its way.
        self.hurry(host);
        match fate {
            Fate::Forward => {
                self.forward(host, id);
                Flow::Continue
            }
            Fate::Park => Flow::Stop,
            Fate::Answer(answer) => {
                send(host, active, &answer);
                Flow::Stop
            }
        }
    }

    /// The trailers of the request. What a header cannot forge a trailer cannot either: some servers make one of both.
    pub fn request_trailers(&mut self, host: &dyn Host, id: ContextId, policy: &Policy) -> Flow {
        for name in not_the_callers(policy) {
            // Fails only outside of this callback.
            let _ = host.remove_trailer(name);
        }
        self.request_body(host, id, 0, true)
    }

    /// A part of the request's body, or its trailers. None can come while the request is parked, unless the filter chain
    /// is configured to let headers go ahead of it; then the request is refused rather than forwarded without its lock.
    ///
    /// `size`: how many bytes are buffered; `end`: it is all there.
    pub fn request_body(&mut self, host: &dyn Host, id: ContextId, size: usize, end: bool) -> Flow {
        if self.calls.contains_key(&id) {
            return self.call_body(host, id, size, end);
        }
        if self.is_questioned(id) {
            self.abandon_question(host, id, BODY_FIRST);
            return Flow::Stop;
        }
        let Some(stream) = self.streams.get(&id) else { return Flow::Continue };
        match stream.state {
            State::Waiting(_) if stream.case.is_enforced() => {
                self.abandon(host, id, Cause::Backend { detail: BODY_FIRST.into() });
                Flow::Stop
            }
            State::Over(Ended::Answered) => Flow::Stop,
            State::Waiting(_) | State::Holding(_) | State::Over(_) => Flow::Continue,
        }
    }

    /// The response headers of the effective stream; the filter's own answers come by here too. An answer that was made
    /// while the lock was no longer held does not pass as if it had been.
    pub fn response_headers(&mut self, host: &dyn Host, id: ContextId) -> Flow {
        if let Some((lock, loss)) = self.lapsed(host, id)
            && let Some(Stream { case, state: State::Holding(held), .. }) = self.take(id)
        {
            self.lose(host, id, case, held, &lock, loss);
            if self.streams.get(&id).is_none_or(|stream| matches!(stream.state, State::Over(Ended::Answered))) {
                return Flow::Stop;
            }
        }
        if let Some(stream) = self.streams.get(&id) {
            respond::annotate(host, stream);
        }
        if bug!(ReleasedAtResponse) {
            self.end(host, id);
        }
        Flow::Continue
    }

    /// The stream has ended, in whatever way: gives back what it has.
    pub fn end(&mut self, host: &dyn Host, id: ContextId) {
        self.call_ended(host, id);
        drop(self.take_question(id));
        let Some(Stream { mut case, state, .. }) = self.take(id) else { return };
        let purpose = case.purpose();
        let rules = &case.active.rules;
        match state {
            State::Waiting(_) if bug!(DisconnectForgotten) => return,
            State::Waiting(waiting) => {
                report::cancelled(host, &case, &waiting);
                self.backends.cancel(host, purpose, rules, waiting);
            }
            State::Holding(held) => {
                report::released(host, &case, &held);
                for grant in self.backends.release(host, purpose, rules, held.lease) {
                    case.name_route(host);
                    report::lost(host, &case, &grant.name, Some(grant.mode), Loss::Expired);
                }
            }
            State::Over(_) => return,
        }
        self.deliver(host, purpose);
        self.call_root(host);
    }

    /// Ends the instance in this VM, if no stream hangs on it. What it shares with other VMs stays.
    pub fn close(&mut self, host: &dyn Host) -> bool {
        let idle =
            self.streams.is_empty() && self.calls.is_empty() && self.questions.is_empty() && self.backends.is_idle();
        if idle {
            // Nobody looks any more; who does later on finds it dead.
            let _ = self.shares.exchange(host, &BTreeMap::new());
            self.active.telemetry.retire(host);
        }
        idle
    }

    /// Takes in what was decided about a stream that waited so long, and says what has to become of its request.
    fn absorb(&mut self, host: &dyn Host, id: ContextId, case: Case, outcome: Outcome, waited: Duration) -> Fate {
        let enforced = case.is_enforced();
        if let (true, Outcome::Refused(reject)) = (enforced, &outcome)
            && let Reject::Core(refusal) = &**reject
        {
            self.remember(host, refusal, &case.terms.asked_by);
        }
        let (state, fate) = match outcome {
            Outcome::Granted(lease) => {
                report::acquired(host, &case, &lease, waited);
                let fences = fences::of(host, &case, &lease);
                (State::Holding(Held { lease, waited, since: case.arrived + waited, fences }), Fate::Forward)
            }
            Outcome::Waiting(waiting) => {
                let fate = if enforced && !bug!(ForwardsBeforeGrant) { Fate::Park } else { Fate::Forward };
                (State::Waiting(waiting), fate)
            }
            Outcome::Refused(reject) => reject_or_pass(host, &case, *reject, waited),
        };
        self.put(host, id, Stream { case, state, timer: None });
        fate
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

    /// Refuses a parked request from a callback of its own stream.
    fn abandon(&mut self, host: &dyn Host, id: ContextId, cause: Cause) {
        let Some(Stream { case, state: State::Waiting(waiting), .. }) = self.take(id) else { return };
        let purpose = case.purpose();
        let waits_for = waiting.waits_for().map(|(lock, mode)| (lock.clone(), mode));
        let owner = waiting.owner().clone();
        self.backends.cancel(host, purpose, &case.active.rules, waiting);
        self.deliver(host, purpose);
        self.call_root(host);
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

    /// Forwards the effective stream's request: with its fences, if decisions count for it.
    fn forward(&self, host: &dyn Host, id: ContextId) {
        let Some(stream) = self.streams.get(&id) else { return };
        let own = match &stream.state {
            State::Holding(held) if stream.case.is_enforced() => held.fences.as_slice(),
            State::Holding(_) | State::Waiting(_) | State::Over(_) => &[],
        };
        fences::forward(host, &stream.case.carried, own);
    }

    /// Wakes waiters and counts what happened.
    fn deliver(&mut self, host: &dyn Host, purpose: Purpose) {
        let Some(local) = self.backends.local(purpose) else { return };
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
        if let State::Waiting(Waiting::Local(pending)) = &stream.state {
            self.leases.remove(&(stream.case.purpose(), pending.lease()));
        }
        Some(stream)
    }

    /// When a waiter is looked after that need not be before `poll_at`. Never at once: a look that changes nothing must not be
    /// followed by the next without end.
    fn next_look(&self, poll_at: Time, now: Time) -> Time {
        poll_at.min(now + self.backstop()).max(now + Duration::from_millis(1))
    }

    /// How long a waiter goes without a look.
    fn backstop(&self) -> Duration {
        let crowd = u32::try_from(self.leases.len() + self.calls.len()).unwrap_or(u32::MAX);
        EACH_LOOK.saturating_mul(crowd).clamp(BACKSTOP, LONGEST_BACKSTOP)
    }

    /// Until when a waiter whose timer is due need not be looked after, because the heartbeats that it awaited have come.
    fn respite(&mut self, id: ContextId, now: Time) -> Option<Time> {
        let backstop = self.backstop();
        let stream = self.streams.get(&id)?;
        let State::Waiting(Waiting::Local(pending)) = &stream.state else { return None };
        let local = self.backends.local(stream.case.purpose())?;
        let due = local.poll_at(pending).min(pending.looked_at() + backstop);
        (due > now).then_some(due)
    }

    /// Sets a stream's timer anew.
    fn retime(&mut self, id: ContextId, due: Time) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if let Some(timer) = stream.timer.replace(due) {
            self.timers.remove(&(timer, id));
        }
        self.timers.insert((due, id));
    }

    /// Puts a stream in, with the timer that its state asks for.
    fn put(&mut self, host: &dyn Host, id: ContextId, mut stream: Stream) {
        stream.timer = match &stream.state {
            State::Waiting(waiting) => {
                if let Waiting::Local(pending) = waiting {
                    self.leases.insert((stream.case.purpose(), pending.lease()), id);
                }
                Some(self.next_look(waiting.poll_at(), host.now()))
            }
            State::Holding(held) => Some(held.lease.until()),
            State::Over(_) => None,
        };
        self.timers.extend(stream.timer.map(|timer| (timer, id)));
        self.streams.insert(id, stream);
    }
}

/// A request that asked for something, as it came in.
fn case(host: &dyn Host, active: &Rc<Active>, terms: Terms, owner: Option<OwnerId>, carried: Vec<FenceMember>) -> Case {
    Case { active: Rc::clone(active), terms, owner, arrived: host.now(), carried, guarded: None, route: String::new() }
}

/// Answers the effective stream's request.
fn send(host: &dyn Host, active: &Active, answer: &Answer) {
    if let Err(error) = answer.send(host) {
        report::trouble(host, active, &error);
    }
}

/// A request that does not get its locks: whether it is answered, or goes on all the same.
fn reject_or_pass(host: &dyn Host, case: &Case, reject: Reject, waited: Duration) -> (State, Fate) {
    if reject.is_unavailable() && (case.terms.on_backend_unavailable == OnUnavailable::Allow || bug!(FailsOpen)) {
        report::unlocked(host, case, &reject, waited);
        return (State::Over(Ended::Unlocked), Fate::Forward);
    }
    report::refused(host, case, &reject, waited);
    if case.is_enforced() {
        let answer = Answer::refusal(case, &reject, waited);
        (State::Over(Ended::Answered), Fate::Answer(answer))
    } else {
        (State::Over(Ended::WouldRefuse(Box::new(reject))), Fate::Forward)
    }
}

/// What no caller may say to an upstream: what is the filter's to set, and what it consumes.
///
/// With `_` too: servers that hand headers to programs as variables (CGI, WSGI, Rack, PHP) make one name, and the last to
/// come, of `lock-fence` and `lock_fence`. Case makes no difference to the host.
fn not_the_callers(policy: &Policy) -> impl Iterator<Item = &'static str> {
    let consumed = policy.annotations.header != HeaderAnnotations::Pass;
    let own: &'static [_] = if bug!(FencesNotStripped) {
        &["lock-status", "lock_status"]
    } else {
        &["lock-status", "lock_status", "lock-fence", "lock_fence"]
    };
    own.iter().copied().chain(consumed.then_some("lock"))
}

/// Removes a header from the effective stream's request.
fn remove(host: &dyn Host, name: &str) {
    // Fails only outside the request phase, where there is nothing to forward.
    let _ = host.remove_header(Headers::Request, name);
}
