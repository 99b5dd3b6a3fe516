//! The authority backend: the lock table is another Envoy's, and this VM asks for leases by its lease API.
//!
//! What lives here: messages as calls of the host, and their answers; which stream a lease is for. When to ask again, to
//! renew and to give back is decided by [`Client`], in the core.
//!
//! # Who is told of an answer
//! The host tells the context that sent a call, and nobody where that is a stream that has gone. So only the first message
//! of a request is sent from its stream: that saves a way over the VM's own mailbox, and while the stream is parked it is
//! there to be told. Whatever else there is to send waits in an outbox for a callback of a root, which a stream that leaves
//! something in it asks for, once, by a message to the VM's own queue. What never gets an answer is given up by its time.

mod answers;
mod floors;
pub mod look;
mod send;
pub mod shares;
mod wire;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use interlock_core::lease::{Ask, CallId, Client, Do, Ticket};
use interlock_core::{Cause, Duration, Grant, LeaseId, LockName, Loss, OwnerId, Time, Want, bug};

use super::remote::{Lease, Notes, Remote, RootCall, Waiting};
use super::{Outcome, Purpose};
use crate::answer::Reject;
use crate::api::told::{Asked as AskedLock, Granted};
use crate::host::{CallToken, ContextId, Host, HostError};
use crate::policy::Authority as At;
use floors::Floors;

/// How long after its timeout a call that nobody told us of is given up.
const SLACK: Duration = Duration::from_millis(500);

/// How long the connection to the authority is left alone before something is sent to keep it.
const WARM: Duration = Duration::from_secs(15);

/// What a request asks for.
#[derive(Clone, Debug)]
pub struct Wish {
    /// For whom.
    pub owner: OwnerId,
    /// Which locks; each once, and one at least.
    pub wants: Vec<Want>,
    /// Who asks, for people to read.
    pub asked_by: String,
    /// When the request came in.
    pub arrived: Time,
}

impl Wish {
    fn wait(&self) -> Duration {
        self.wants.iter().map(|want| want.wait).max().unwrap_or_default()
    }

    fn ttl(&self) -> Duration {
        self.wants.iter().map(|want| want.ttl).min().unwrap_or_default()
    }

    fn hold(&self) -> Duration {
        self.wants.iter().map(|want| want.hold).min().unwrap_or_default()
    }

    /// The request as one that waits.
    fn waiting(&self, client: u32, stream: ContextId) -> Waiting {
        let first = self.wants.first().map(|want| (want.name.clone(), want.mode));
        Waiting { client, stream, owner: self.owner.clone(), first }
    }
}

/// What has become of a request, as far as its stream was not told.
#[derive(Debug)]
enum News {
    Granted(Rc<Granted>),
    Refused(Box<Reject>),
    Lost(Loss),
}

/// A request that waits or holds.
#[derive(Debug)]
struct Entry {
    wish: Wish,
    locks: Vec<AskedLock>,
    lease: LeaseId,
    /// The call that the stream itself waits for.
    own: Option<CallToken>,
    /// Since when its calls have failed.
    failing: Option<Time>,
    news: Option<News>,
}

/// A call that is not answered.
#[derive(Debug)]
struct Sent {
    at: Time,
    due: Time,
    what: What,
}

#[derive(Debug)]
enum What {
    Put {
        call: CallId,
        stream: ContextId,
        lease: LeaseId,
    },
    Renew {
        call: CallId,
        leases: Vec<LeaseId>,
    },
    Delete {
        call: CallId,
    },
    /// Only to have the connection open.
    Warm,
}

/// A renewal that went out in several messages.
#[derive(Debug, Default)]
struct Renewal {
    open: usize,
    answers: Vec<(LeaseId, Option<Duration>)>,
}

/// The leases of one VM at one authority.
pub struct Authority {
    /// Tells the clients of this VM apart.
    number: u32,
    at: Arc<At>,
    purpose: Purpose,
    /// `at`, with the prefix of this purpose.
    target: At,
    client: Client<Rc<Granted>, Box<Reject>>,
    entries: HashMap<ContextId, Entry>,
    sent: HashMap<CallToken, Sent>,
    due: BTreeSet<(Time, CallToken)>,
    renewals: HashMap<CallId, Renewal>,
    outbox: VecDeque<Do<Rc<Granted>, Box<Reject>>>,
    /// Not later than the client has something to do.
    client_due: Time,
    woken: Vec<ContextId>,
    notes: Notes,
    floors: Floors,
    /// How a root is asked to send what is in the outbox.
    root: RootCall,
    /// When something is sent to keep the connection.
    warm_at: Time,
}

impl Authority {
    /// A client of an authority. Nothing is sent yet.
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
        let mut target = (*at).clone();
        if purpose == Purpose::Audit && !bug!(AuditAsksInEarnest) {
            target.prefix.push_str("/audit");
        }
        Ok(Authority {
            number,
            client: Client::new(at.timeout),
            at,
            purpose,
            target,
            entries: HashMap::new(),
            sent: HashMap::new(),
            due: BTreeSet::new(),
            renewals: HashMap::new(),
            outbox: VecDeque::new(),
            client_due: Time::NEVER,
            woken: Vec::new(),
            notes: Notes::default(),
            floors: Floors::default(),
            root: RootCall::new(format!("interlock/out/{instance}/{:032x}", host.random()?)),
            warm_at: Time::ZERO,
        })
    }

    /// What tells this client from others of this VM.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Whether it is the client of this authority, for this purpose.
    pub fn is(&self, at: &At, purpose: Purpose) -> bool {
        self.purpose == purpose && *self.at == *at
    }

    /// Whether nothing is asked for, held or to be given back, and no answer awaited that matters.
    pub fn is_idle(&self) -> bool {
        self.client.is_idle() && self.entries.is_empty()
    }

    /// Asks for a lease, from the callback of the stream that it is for. Then see [`Authority::poll`].
    ///
    /// # Errors
    /// Where the host has no randomness for an id.
    pub fn ask(&mut self, host: &dyn Host, stream: ContextId, wish: Wish) -> Result<Waiting, HostError> {
        let now = host.now();
        let lease = LeaseId(host.random()?);
        let ask = Ask {
            owner: wish.owner.clone(),
            locks: wish.wants.iter().map(|want| (want.name.clone(), want.mode)).collect(),
            deadline: wish.arrived + wish.wait(),
            ttl: wish.ttl(),
            hold: wish.hold(),
        };
        let lock = |want: &Want| AskedLock {
            name: want.name.clone(),
            mode: want.mode,
            floor: self.floors.of(&want.name, want.mode),
        };
        let waiting = wish.waiting(self.number, stream);
        let locks = wish.wants.iter().map(lock).collect();
        self.entries.insert(stream, Entry { wish, locks, lease, own: None, failing: None, news: None });
        self.client.ask(now, Ticket(u64::from(stream.0)), lease, ask);
        // The client leaves one thing to do: to ask.
        for put in self.client.take() {
            self.send(host, put, Some(stream));
        }
        self.note();
        Ok(waiting)
    }

    /// What has become of a request that waits.
    pub fn poll(&mut self, host: &dyn Host, waiting: Waiting) -> Outcome {
        let stream = waiting.stream;
        let Some(entry) = self.entries.get_mut(&stream) else {
            return Outcome::Refused(Box::new(waiting.unavailable("nothing is known of the request any more")));
        };
        match entry.news.take() {
            None => Outcome::Waiting(super::Waiting::Authority(waiting)),
            Some(News::Granted(granted)) => {
                let until = host.now() + entry.wish.hold();
                let ttl = granted.ttl;
                let grant = |(name, mode, fence): &(LockName, _, _)| Grant {
                    name: name.clone(),
                    mode: *mode,
                    fence: *fence,
                    until,
                    ttl,
                    asked: true,
                };
                let grants = granted.locks.iter().map(grant).collect();
                let lease = Lease { client: self.number, stream, owner: waiting.owner, grants };
                Outcome::Granted(super::Lease::Authority(lease))
            }
            Some(News::Refused(reject)) => {
                self.entries.remove(&stream);
                Outcome::Refused(reject)
            }
            Some(News::Lost(loss)) => {
                self.entries.remove(&stream);
                Outcome::Refused(Box::new(waiting.refusal(Cause::LeaseLost { loss })))
            }
        }
    }

    /// A request that waits is given up.
    pub fn cancel(&mut self, host: &dyn Host, waiting: Waiting) {
        self.leave(host, waiting.stream);
    }

    /// A lease has come to its end. Tells of its grants if they had ended before.
    pub fn release(&mut self, host: &dyn Host, lease: Lease) -> Vec<Grant> {
        let lost = self.loss(host, &lease).is_some();
        self.leave(host, lease.stream);
        if lost { lease.grants } else { Vec::new() }
    }

    /// How a lease has ended, if it has.
    pub fn loss(&mut self, host: &dyn Host, lease: &Lease) -> Option<Loss> {
        let Some(entry) = self.entries.get(&lease.stream) else { return Some(Loss::Expired) };
        match &entry.news {
            Some(News::Lost(loss)) => Some(*loss),
            _ => (!self.client.holds(entry.lease, host.now())).then_some(Loss::Expired),
        }
    }

    fn leave(&mut self, host: &dyn Host, stream: ContextId) {
        let Some(entry) = self.entries.remove(&stream) else { return };
        let now = host.now();
        if !bug!(LeaverKeepsLease) {
            self.client.release(now, entry.lease);
        }
        // Nobody will be told of the answer that the stream waited for.
        if let Some(token) = entry.own {
            self.give_up(now, token);
        }
        self.note();
    }

    /// Whether the answer to a call is for this client.
    pub fn awaits(&self, token: CallToken) -> bool {
        self.sent.contains_key(&token)
    }

    /// Takes over what the client wants done.
    fn note(&mut self) {
        for next in self.client.take() {
            let (ticket, news) = match next {
                Do::Put { .. } | Do::Renew { .. } | Do::Delete { .. } => {
                    self.outbox.push_back(next);
                    continue;
                }
                Do::Granted { ticket, grant, .. } => (ticket, News::Granted(grant)),
                Do::Refused { ticket, why } => (ticket, News::Refused(why)),
                Do::Lost { ticket, loss } => (ticket, News::Lost(loss)),
            };
            let Ok(stream) = u32::try_from(ticket.0).map(ContextId) else { continue };
            if let Some(entry) = self.entries.get_mut(&stream) {
                entry.news = Some(news);
                self.woken.push(stream);
            }
        }
    }

    fn drop_sent(&mut self, token: CallToken) -> Option<Sent> {
        let sent = self.sent.remove(&token)?;
        self.due.remove(&(sent.due, token));
        Some(sent)
    }
}

impl Remote for Authority {
    fn root_call(&mut self) -> &mut RootCall {
        &mut self.root
    }

    fn has_to_send(&self) -> bool {
        !self.outbox.is_empty() && !bug!(RootNotCalled)
    }

    fn tick(&mut self, host: &dyn Host) {
        let now = host.now();
        while let Some((_, token)) = self.due.first().copied().filter(|(due, _)| *due <= now) {
            self.notes.failures.push("no-answer");
            self.give_up(now, token);
        }
        if self.client_due <= now {
            self.client.tick(now);
            self.client_due = self.client.due();
        }
        self.note();
        if self.warm_at <= now {
            self.warm_at = now + WARM;
            let timeout = self.at.timeout;
            // Nobody waits for it, so nobody needs to know if it fails.
            let _ = self.call(host, now, ("GET", "health"), &[], timeout, What::Warm);
        }
    }

    fn next_due(&self) -> Time {
        let answer = self.due.first().map_or(Time::NEVER, |(due, _)| *due);
        answer.min(self.client_due).min(self.warm_at)
    }

    fn flush(&mut self, host: &dyn Host) {
        self.root.came();
        while let Some(next) = self.outbox.pop_front() {
            self.send(host, next, None);
            self.note();
        }
    }

    fn woken(&mut self) -> Vec<ContextId> {
        core::mem::take(&mut self.woken)
    }

    fn take_notes(&mut self) -> Notes {
        core::mem::take(&mut self.notes)
    }
}
