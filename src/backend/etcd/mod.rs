//! The etcd backend: the locks are keys in the etcd that people run already, which the plugin speaks to itself, over gRPC.
//!
//! What lives here: which calls are made when, and what their answers mean for the requests of this VM. Whose turn it is, what
//! is out of order and what closes a cycle is decided in the core ([`interlock_core::keyed`]).
//!
//! # A request's way
//! One transaction takes its locks where nobody is in their lines; else it stands in the line of the first and has read it
//! (`claim`). It watches that line ([`line`]), and when its turn has come it writes so into its key, under the condition that
//! what it concluded from is still so. All keys hang on the VM's one etcd lease (`session`). What is given back is deleted
//! and not waited for, but again and again until etcd has said that it is gone.
//!
//! # Who is told of an answer
//! As with an authority: only the first call of a request is its stream's own, all others are a root's. Streams of messages
//! are in the host's hands a root's own: that of the root whose callback opened them. They are used within that root, whichever
//! root's callback runs, for several may share the VM.

mod claim;
mod debts;
mod keys;
mod line;
mod proto;
mod search;
mod session;
mod setback;
#[cfg(test)]
mod tests;
mod trouble;
mod txn;
mod wire;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use interlock_core::{Cause, Duration, Grant, LeaseId, LockName, Loss, OwnerId, Request, Rules, Time, Want};

use super::remote::{Lease, Notes, Remote, RootCall, Waiting};
use super::{Outcome, Purpose};
use crate::answer::Reject;
use crate::host::{CallToken, ContextId, Host, HostError};
use crate::policy::Etcd as At;
use claim::Phase;
use debts::Debt;
use keys::Names;
use line::{Line, Watch};
use session::Session;
use trouble::Trouble;
use wire::{Out, Sent};

/// The first pause after a call that failed.
const PAUSE: Duration = Duration::from_millis(50);

/// A request as it comes in.
#[derive(Clone, Debug)]
pub struct Wish {
    /// For whom.
    pub owner: OwnerId,
    /// Whether its owner's other requests let it pass.
    pub reentrant: bool,
    /// Which locks; each once, and one at least.
    pub wants: Vec<Want>,
    /// Who asks, for people to read.
    pub asked_by: String,
    /// When the request came in.
    pub arrived: Time,
    /// The rules that it comes under.
    pub rules: Rc<Rules>,
}

/// What has become of a request, as far as its stream was not told.
#[derive(Debug)]
enum News {
    Granted,
    Refused(Box<Reject>),
    Lost,
}

/// A request that waits or holds.
#[derive(Debug)]
struct Entry {
    request: Request,
    rules: Rc<Rules>,
    grants: Vec<Grant>,
    phase: Phase,
    /// Whether the index by owner has to say what it holds.
    listed: bool,
    /// Whether it may have keys.
    wrote: bool,
    /// Whether a call was lost that may have made some, and may do so yet.
    doubtful: bool,
    /// The call that the stream itself waits for.
    own: Option<CallToken>,
    /// Since when its calls have failed.
    failing: Option<Time>,
    /// What the last of them failed with.
    trouble: Option<Trouble>,
    /// How often it has begun anew.
    tries: u32,
    timer: Option<Time>,
    news: Option<News>,
}

impl Entry {
    fn lease(&self) -> LeaseId {
        self.request.lease()
    }

    /// The lock to take next.
    fn next(&self) -> Option<&Want> {
        self.request.wants().get(self.grants.len())
    }

    fn deadline(&self) -> Time {
        self.next().map_or(Time::NEVER, |want| self.request.arrived() + want.wait)
    }
}

/// The locks of one VM in etcd.
pub struct Etcd {
    /// Tells the clients of this VM apart.
    number: u32,
    at: Arc<At>,
    purpose: Purpose,
    names: Names,
    session: Session,
    entries: HashMap<ContextId, Entry>,
    lines: HashMap<LockName, Line>,
    watch: Watch,
    debts: BTreeMap<LeaseId, Debt>,
    timers: BTreeSet<(Time, ContextId)>,
    sent: HashMap<CallToken, Sent>,
    due: BTreeSet<(Time, CallToken)>,
    outbox: VecDeque<Out>,
    woken: Vec<ContextId>,
    notes: Notes,
    /// How a root is asked to send what is in the outbox.
    root: RootCall,
}

impl Etcd {
    /// A client. Nothing is sent yet.
    ///
    /// # Errors
    /// Those of the host.
    pub fn open(
        host: &dyn Host,
        instance: &str,
        number: u32,
        at: Arc<At>,
        purpose: Purpose,
    ) -> Result<Self, HostError> {
        let names = match purpose {
            Purpose::Enforce => Names::new(at.prefix.clone()),
            Purpose::Audit => Names::new(format!("{}/audit", at.prefix)),
        };
        Ok(Etcd {
            number,
            at,
            purpose,
            names,
            session: Session::default(),
            entries: HashMap::new(),
            lines: HashMap::new(),
            watch: Watch::default(),
            debts: BTreeMap::new(),
            timers: BTreeSet::new(),
            sent: HashMap::new(),
            due: BTreeSet::new(),
            outbox: VecDeque::new(),
            woken: Vec::new(),
            notes: Notes::default(),
            root: RootCall::new(format!("interlock/etcd/{instance}/{:032x}", host.random()?)),
        })
    }

    /// What tells this client from others of this VM.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Whether it is the client of this etcd, for this purpose.
    pub fn is(&self, at: &At, purpose: Purpose) -> bool {
        self.purpose == purpose && *self.at == *at
    }

    /// Whether nothing is asked for, held or to be given back.
    pub fn is_idle(&self) -> bool {
        self.entries.is_empty() && self.debts.is_empty()
    }

    /// Whether it has no session any more either.
    pub fn is_closed(&self) -> bool {
        self.is_idle() && self.session.any().is_none() && self.outbox.is_empty()
    }

    /// Asks for locks, from the callback of the stream that they are for. Then see [`Etcd::poll`].
    ///
    /// # Errors
    /// Where the host has no randomness for an id.
    pub fn ask(&mut self, host: &dyn Host, stream: ContextId, wish: Wish) -> Result<Waiting, HostError> {
        let now = host.now();
        let Wish { owner, reentrant, wants, asked_by, arrived, rules } = wish;
        let lease = LeaseId(host.random()?);
        let request = Request::new(lease, owner.clone(), arrived, wants, &rules.classes);
        let request = request.reentrant(reentrant).asked_by(asked_by);
        let first = request.wants().first().map(|want| (want.name.clone(), want.mode));
        let ranked = request.wants().iter().any(|want| rules.classes.of(&want.name).rank.is_some());
        let entry = Entry {
            listed: ranked || rules.limits.locks_per_owner.is_some(),
            request,
            rules,
            grants: Vec::new(),
            phase: Phase::Over,
            wrote: false,
            doubtful: false,
            own: None,
            failing: None,
            trouble: None,
            tries: 0,
            timer: None,
            news: None,
        };
        let full = self.is_full(&entry.rules);
        self.entries.insert(stream, entry);
        match full {
            Some(cause) => self.refuse(stream, cause),
            None => self.begin(host, now, stream, Some(stream)),
        }
        Ok(Waiting { client: self.number, stream, owner, first })
    }

    /// What has become of a request that waits.
    pub fn poll(&mut self, waiting: Waiting) -> Outcome {
        let stream = waiting.stream;
        let Some(entry) = self.entries.get_mut(&stream) else {
            return Outcome::Refused(Box::new(waiting.unavailable("nothing is known of the request any more")));
        };
        match entry.news.take() {
            None => Outcome::Waiting(super::Waiting::Etcd(waiting)),
            Some(News::Granted) => {
                let grants = entry.grants.clone();
                Outcome::Granted(super::Lease::Etcd(Lease {
                    client: self.number,
                    stream,
                    owner: waiting.owner,
                    grants,
                }))
            }
            Some(News::Refused(reject)) => {
                self.forget(stream);
                Outcome::Refused(reject)
            }
            Some(News::Lost) => {
                self.forget(stream);
                Outcome::Refused(Box::new(waiting.refusal(Cause::LeaseLost { loss: Loss::Expired })))
            }
        }
    }

    /// A request that waits is given up.
    pub fn cancel(&mut self, host: &dyn Host, waiting: Waiting) {
        self.leave(host.now(), waiting.stream);
    }

    /// A lease has come to its end. Tells of its grants if they had ended before.
    pub fn release(&mut self, host: &dyn Host, lease: Lease) -> Vec<Grant> {
        let lost = self.loss(host, &lease).is_some();
        self.leave(host.now(), lease.stream);
        if lost { lease.grants } else { Vec::new() }
    }

    /// How a lease has ended, if it has.
    pub fn loss(&mut self, host: &dyn Host, lease: &Lease) -> Option<Loss> {
        let holds = self.entries.get(&lease.stream).is_some_and(|entry| matches!(entry.phase, Phase::Held));
        let lives = holds && self.session.id(host.now()).is_some();
        (!lives).then_some(Loss::Expired)
    }

    fn leave(&mut self, now: Time, stream: ContextId) {
        // Nobody will be told of the answer that the stream waited for.
        if let Some(token) = self.entries.get(&stream).and_then(|entry| entry.own) {
            self.drop_sent(token);
            if let Some(entry) = self.entries.get_mut(&stream) {
                entry.doubtful = true;
            }
        }
        self.give_back(now, stream);
        self.forget(stream);
    }

    /// Whether the answer to a call is for this client.
    pub fn awaits(&self, token: CallToken) -> bool {
        self.sent.contains_key(&token)
    }

    fn note(&mut self, trouble: Trouble) {
        self.notes.failures.push(trouble.reason());
    }

    fn tell(&mut self, stream: ContextId, news: News) {
        if let Some(entry) = self.entries.get_mut(&stream) {
            entry.news = Some(news);
            self.woken.push(stream);
        }
    }

    fn forget(&mut self, stream: ContextId) {
        self.set_timer(stream, None);
        self.entries.remove(&stream);
    }

    fn set_timer(&mut self, stream: ContextId, timer: Option<Time>) {
        let Some(entry) = self.entries.get_mut(&stream) else { return };
        if let Some(before) = core::mem::replace(&mut entry.timer, timer) {
            self.timers.remove(&(before, stream));
        }
        self.timers.extend(timer.filter(|timer| *timer < Time::NEVER).map(|timer| (timer, stream)));
    }
}

impl Remote for Etcd {
    fn root_call(&mut self) -> &mut RootCall {
        &mut self.root
    }

    fn has_to_send(&self) -> bool {
        !self.outbox.is_empty()
    }

    fn tick(&mut self, host: &dyn Host) {
        let now = host.now();
        while let Some((_, token)) = self.due.first().copied().filter(|(due, _)| *due <= now) {
            self.give_up(host, now, token);
        }
        self.keep_session(host, now);
        while let Some((_, stream)) = self.timers.first().copied().filter(|(due, _)| *due <= now) {
            self.set_timer(stream, None);
            self.look_after(host, now, stream);
        }
        self.keep_lines(now);
        self.pay_debts(now);
    }

    fn next_due(&self) -> Time {
        let answer = self.due.first().map_or(Time::NEVER, |(due, _)| *due);
        let timer = self.timers.first().map_or(Time::NEVER, |(due, _)| *due);
        let debt = self.debts.values().filter(|debt| debt.open == 0).map(|debt| debt.again_at).min();
        let streams = self.session.due(&self.at).min(self.watch_due());
        answer.min(timer).min(streams).min(self.watch.due()).min(debt.unwrap_or(Time::NEVER))
    }

    fn flush(&mut self, host: &dyn Host) {
        self.send_all(host);
    }

    fn woken(&mut self) -> Vec<ContextId> {
        core::mem::take(&mut self.woken)
    }

    fn take_notes(&mut self) -> Notes {
        core::mem::take(&mut self.notes)
    }
}
