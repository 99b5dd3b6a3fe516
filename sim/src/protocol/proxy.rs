//! One proxy: the client's machine, the requests that rely on it, and the calls that it has open.

use std::collections::BTreeMap;

use interlock_core::lease::{Ask, CallId, Client, Do, PutAnswer, Ticket};
use interlock_core::{Duration, LeaseId, LockName, Loss, Mode, OwnerId, Time};

use super::{Body, Caller, Grant, Reply, Why};

/// How long the authority has to answer, its own waiting aside.
pub const TIMEOUT: Duration = Duration::from_millis(250);

/// One request of a proxy.
#[derive(Debug)]
pub struct Served {
    /// The identity of its lease, as last known.
    pub lease: LeaseId,
    /// For whom.
    pub owner: OwnerId,
    /// Which locks.
    pub locks: Vec<(LockName, Mode)>,
    /// When it gives up waiting.
    pub deadline: Time,
    /// What it was granted, once it was.
    pub grant: Option<Grant>,
    /// Whether it is over.
    pub over: bool,
}

/// What a proxy's machine told, for the counts and checks.
#[derive(Debug)]
pub enum Told {
    /// A request goes on.
    Granted,
    /// A request is refused.
    Refused(Why),
    /// A request has lost its lease.
    Lost(Ticket, Loss),
}

/// One proxy.
pub struct Proxy {
    /// Which.
    pub number: usize,
    /// Which life of it.
    pub life: u32,
    /// Whether it stands still.
    pub paused: bool,
    /// Since when it runs without a pause.
    pub runs_since: Time,
    /// How far its clock is ahead of the authority's: clocks run equally fast, nothing more.
    pub ahead: Duration,
    /// Its machine.
    pub client: Client<Grant, Why>,
    /// Its requests.
    pub requests: BTreeMap<Ticket, Served>,
    /// Until when each open call may be answered, and the lease that it is about.
    calls: BTreeMap<CallId, (Time, LeaseId)>,
    names: u64,
    tickets: u64,
}

impl Proxy {
    /// A proxy in its next life.
    pub fn new(number: usize, life: u32, ahead: Duration) -> Self {
        let client = Client::new(TIMEOUT);
        let (requests, calls) = (BTreeMap::new(), BTreeMap::new());
        Proxy {
            number,
            life,
            paused: false,
            runs_since: Time::ZERO,
            ahead,
            client,
            requests,
            calls,
            names: 0,
            tickets: 0,
        }
    }

    fn name(&mut self) -> LeaseId {
        self.names += 1;
        let of = u128::try_from(self.number + 1).unwrap_or(0) << 96 | u128::from(self.life) << 64;
        LeaseId(of | u128::from(self.names))
    }

    /// A request comes in.
    pub fn ask(&mut self, now: Time, ask: Ask) {
        self.tickets += 1;
        let (ticket, lease) = (Ticket(self.tickets), self.name());
        let served = Served {
            lease,
            owner: ask.owner.clone(),
            locks: ask.locks.clone(),
            deadline: ask.deadline,
            grant: None,
            over: false,
        };
        self.requests.insert(ticket, served);
        self.client.ask(now, ticket, lease, ask);
    }

    /// The request of that number, of those that are not over.
    pub fn nth(&self, nth: u8) -> Option<Ticket> {
        let open: Vec<Ticket> = self.requests.iter().filter(|(_, it)| !it.over).map(|(ticket, _)| *ticket).collect();
        (!open.is_empty()).then(|| open[usize::from(nth) % open.len()])
    }

    /// A request ends.
    pub fn end(&mut self, now: Time, ticket: Ticket) {
        if let Some(served) = self.requests.get_mut(&ticket) {
            served.over = true;
            self.client.release(now, served.lease);
        }
    }

    /// Whether a request may rely on its lease, by all that the proxy knows.
    pub fn relies(&self, served: &Served, now: Time) -> bool {
        !served.over && served.grant.is_some() && self.client.holds(served.lease, now)
    }

    /// An answer has come.
    pub fn hear(&mut self, now: Time, caller: Caller, reply: Reply) {
        let call = CallId(caller.call);
        if caller.life != self.life {
            return;
        }
        let Some((_, lease)) = self.calls.remove(&call) else { return };
        match reply {
            Reply::Put(PutAnswer::Over { why, .. }) => {
                let fresh = self.name();
                if let Some(served) = self.requests.values_mut().find(|served| served.lease == lease) {
                    served.lease = fresh;
                }
                self.client.answered(now, call, PutAnswer::Over { fresh, why });
            }
            Reply::Put(answer) => self.client.answered(now, call, answer),
            Reply::Renewed(answers) => self.client.renewed(now, call, &answers),
            Reply::Deleted => self.client.deleted(call),
            Reply::Failed(retry) => self.client.failed(now, call, "backend-unavailable", retry),
        }
    }

    /// Gives up what was not answered in time, and lets the machine do what is due. Gives the calls that were given up.
    pub fn tick(&mut self, now: Time) -> Vec<Caller> {
        let over: Vec<CallId> =
            self.calls.iter().filter(|(_, (until, _))| *until <= now).map(|(call, _)| *call).collect();
        for call in &over {
            self.calls.remove(call);
            self.client.failed(now, *call, "backend-unavailable", None);
        }
        if self.client.due() <= now {
            self.client.tick(now);
        }
        over.into_iter().map(|call| self.caller(call)).collect()
    }

    /// The calls that are not answered yet.
    pub fn open_calls(&self) -> Vec<Caller> {
        self.calls.keys().map(|call| self.caller(*call)).collect()
    }

    fn caller(&self, call: CallId) -> Caller {
        Caller { proxy: self.number, life: self.life, call: call.0 }
    }

    /// When [`Proxy::tick`] has something to do.
    pub fn due(&self) -> Time {
        self.calls.values().map(|(until, _)| *until).min().unwrap_or(Time::NEVER).min(self.client.due())
    }

    /// What is to be sent, and what was told.
    pub fn take(&mut self, now: Time) -> (Vec<(Caller, Body)>, Vec<Told>) {
        let (mut sent, mut told) = (Vec::new(), Vec::new());
        for effect in self.client.take() {
            let (call, timeout, body) = match effect {
                Do::Put { call, lease, ask, wait, timeout } => {
                    let Ask { owner, locks, ttl, hold, .. } = ask;
                    (call, timeout, Body::Put { lease, owner, locks, wait, ttl, hold })
                }
                Do::Renew { call, leases, timeout } => (call, timeout, Body::Renew(leases)),
                Do::Delete { call, lease, timeout } => (call, timeout, Body::Delete(lease)),
                Do::Granted { ticket, lease, grant } => {
                    if let Some(served) = self.requests.get_mut(&ticket) {
                        (served.lease, served.grant) = (lease, Some(grant));
                    }
                    told.push(Told::Granted);
                    continue;
                }
                Do::Refused { ticket, why } => {
                    self.requests.entry(ticket).and_modify(|served| served.over = true);
                    told.push(Told::Refused(why));
                    continue;
                }
                Do::Lost { ticket, loss } => {
                    self.requests.entry(ticket).and_modify(|served| served.over = true);
                    told.push(Told::Lost(ticket, loss));
                    continue;
                }
            };
            let lease = match &body {
                Body::Put { lease, .. } | Body::Delete(lease) => *lease,
                Body::Renew(_) | Body::Gone => LeaseId(0),
            };
            self.calls.insert(call, (now + timeout, lease));
            sent.push((self.caller(call), body));
        }
        (sent, told)
    }
}
