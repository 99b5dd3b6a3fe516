//! The holder's side: a proxy that asks an authority for leases, keeps them alive and gives them back.
//!
//! It sends nothing and reads no clock: what is to be sent and told is left in [`Client::take`], what came of it is put in
//! by the calls below. A call that got no answer is answered by [`Client::failed`]: who sends it keeps its timeout.
//!
//! A lease is believed in only as long as the authority must believe in it too. The authority counts a TTL from some moment
//! after the message was sent, so here it counts from the sending. Answers to calls that were given up mean nothing, since
//! nobody could say from when to count.

use std::collections::BTreeMap;

use crate::id::{LeaseId, OwnerId};
use crate::mode::Mode;
use crate::name::LockName;
use crate::refusal::Loss;
use crate::session::BEAT;
use crate::time::{Duration, Time};

/// The first pause after a call that failed; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(50);

/// The longest pause between calls that fail.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// How often one request is asked for under a new identity, after the authority said that the one before is over.
const MOST_NAMES: u32 = 4;

/// Which request of the proxy a lease is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// One call to the authority. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallId(pub u64);

/// What a request wants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Ask {
    /// For whom.
    pub owner: OwnerId,
    /// Which locks, in which modes.
    pub locks: Vec<(LockName, Mode)>,
    /// When it gives up waiting.
    pub deadline: Time,
    /// How long a grant outlives its last renewal.
    pub ttl: Duration,
    /// For how long it is renewed.
    pub hold: Duration,
}

/// What the proxy has to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Do<G, W> {
    /// Ask for a lease: `PUT`.
    Put {
        /// The call.
        call: CallId,
        /// Under which identity.
        lease: LeaseId,
        /// What is asked for.
        ask: Ask,
        /// The longest wait.
        wait: Duration,
        /// When to give the call up.
        timeout: Duration,
    },
    /// Renew leases, each with the grant that its receipt is in.
    Renew {
        /// The call.
        call: CallId,
        /// Which.
        leases: Vec<(LeaseId, G)>,
        /// When to give the call up.
        timeout: Duration,
    },
    /// Give a lease back, or cancel the request for it: `DELETE`.
    Delete {
        /// The call.
        call: CallId,
        /// Which.
        lease: LeaseId,
        /// When to give the call up.
        timeout: Duration,
    },
    /// Let a request go on.
    Granted {
        /// Which.
        ticket: Ticket,
        /// Under which lease.
        lease: LeaseId,
        /// What it was granted.
        grant: G,
    },
    /// Refuse a request. It holds nothing.
    Refused {
        /// Which.
        ticket: Ticket,
        /// Why.
        why: W,
    },
    /// A request has lost its lease, perhaps before it was told of it. It holds nothing.
    Lost {
        /// Which.
        ticket: Ticket,
        /// How.
        loss: Loss,
    },
}

/// The authority's answer to a request for a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PutAnswer<G, W> {
    /// It is granted.
    Granted {
        /// How long it lives from the moment of the grant, unrenewed.
        ttl: Duration,
        /// How long after the call came in that moment was.
        waited: Duration,
        /// What was granted, and the receipt.
        grant: G,
    },
    /// It gets nothing, for good.
    Refused(W),
    /// What was asked for under this identity is over.
    Over {
        /// An identity to go on under.
        fresh: LeaseId,
        /// How to tell of it, should it not be asked for again.
        why: W,
    },
}

/// A call whose answer is awaited.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Call {
    Put(LeaseId),
    Renew { sent: Time, leases: Vec<LeaseId> },
    Delete(LeaseId),
}

/// How a lease stands, as far as the proxy knows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase<G> {
    /// Asked for, and not answered.
    Asking { call: CallId, sent: Time },
    /// To be asked for again, under the same identity: the authority may have heard.
    Pausing { until: Time },
    /// Granted.
    Held { until: Time, ends: Time, renew_at: Time, renewing: Option<CallId>, grant: G },
    /// Of no more use to anybody: to be given back, until the authority has heard or it must have ended.
    Fading { until: Time, again_at: Time, call: Option<CallId> },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Entry<G> {
    ticket: Ticket,
    ask: Ask,
    /// Calls that failed in a row.
    failures: u32,
    /// Identities that were used before this one.
    names: u32,
    phase: Phase<G>,
}

/// The leases of one worker of a proxy. `G` is what a grant says and carries, its receipt too; `W` is why a request is
/// refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Client<G, W> {
    /// How long the authority has to answer, its own waiting aside.
    timeout: Duration,
    calls: u64,
    open: BTreeMap<CallId, Call>,
    leases: BTreeMap<LeaseId, Entry<G>>,
    effects: Vec<Do<G, W>>,
}

impl<G: Clone, W> Client<G, W> {
    /// A client without leases, whose authority has `timeout` to answer, its own waiting aside.
    pub fn new(timeout: Duration) -> Self {
        Client { timeout, calls: 0, open: BTreeMap::new(), leases: BTreeMap::new(), effects: Vec::new() }
    }

    /// What is to be done since this was last called, in order.
    pub fn take(&mut self) -> Vec<Do<G, W>> {
        core::mem::take(&mut self.effects)
    }

    /// Whether nothing is asked for, held, or to be given back.
    pub fn is_idle(&self) -> bool {
        self.leases.is_empty()
    }

    /// Whether the lease can be relied on now.
    pub fn holds(&self, lease: LeaseId, now: Time) -> bool {
        matches!(self.leases.get(&lease), Some(Entry { phase: Phase::Held { until, .. }, .. }) if now < *until)
    }

    /// Asks for a lease, under an identity that was never used.
    pub fn ask(&mut self, now: Time, ticket: Ticket, lease: LeaseId, ask: Ask) {
        self.put(now, lease, Entry { ticket, ask, failures: 0, names: 0, phase: Phase::Pausing { until: now } });
    }

    /// The request has come to its end, or its caller has gone.
    pub fn release(&mut self, now: Time, lease: LeaseId) {
        let Some(entry) = self.leases.remove(&lease) else { return };
        match entry.phase {
            Phase::Held { until, .. } => self.fade(now, lease, until, entry),
            Phase::Asking { .. } | Phase::Pausing { .. } => self.withdraw(now, lease, entry),
            Phase::Fading { .. } => drop(self.leases.insert(lease, entry)),
        }
    }

    /// The authority has answered a request for a lease.
    pub fn answered(&mut self, now: Time, call: CallId, answer: PutAnswer<G, W>) {
        let Some(Call::Put(lease)) = self.open.remove(&call) else { return };
        let Some(mut entry) = self.leases.remove(&lease) else {
            if matches!(answer, PutAnswer::Granted { .. }) && !bug!(LateGrantLeaked) {
                // Nothing is known of it here any more; it only has to be given back.
                self.delete(lease);
            }
            return;
        };
        let sent = match entry.phase {
            Phase::Asking { call: current, sent } if current == call || bug!(LateAnswerBelieved) => sent,
            // It was given up, and is being cancelled: that reaches the authority, or the lease ends by its TTL.
            _ => {
                self.leases.insert(lease, entry);
                return;
            }
        };
        match answer {
            PutAnswer::Granted { ttl, waited, grant } => {
                let granted = if bug!(ValidFromAnswer) { now } else { sent + waited };
                let ends = granted + entry.ask.hold;
                let until = if bug!(ClientIgnoresHold) { granted + ttl } else { (granted + ttl).min(ends) };
                if until <= now {
                    // The answer took so long that the lease may have ended since.
                    if now < entry.ask.deadline {
                        self.put(now, lease, entry);
                    } else {
                        self.effects.push(Do::Lost { ticket: entry.ticket, loss: Loss::Expired });
                        self.withdraw(now, lease, entry);
                    }
                    return;
                }
                self.effects.push(Do::Granted { ticket: entry.ticket, lease, grant: grant.clone() });
                entry.failures = 0;
                entry.phase = Phase::Held { until, ends, renew_at: granted + ttl / 3, renewing: None, grant };
                self.leases.insert(lease, entry);
            }
            PutAnswer::Refused(why) => self.effects.push(Do::Refused { ticket: entry.ticket, why }),
            PutAnswer::Over { fresh, why } => {
                if now < entry.ask.deadline && entry.names < MOST_NAMES {
                    entry.names += 1;
                    self.put(now, fresh, entry);
                } else {
                    self.effects.push(Do::Refused { ticket: entry.ticket, why });
                }
            }
        }
    }

    /// The authority has answered a renewal: for each lease how long it lives on, or that it has ended.
    pub fn renewed(&mut self, now: Time, call: CallId, answers: &[(LeaseId, Option<Duration>)]) {
        let Some(Call::Renew { sent, leases }) = self.open.remove(&call) else { return };
        for lease in leases {
            let answer = answers.iter().find(|(id, _)| *id == lease).map(|(_, expires_in)| *expires_in);
            let Some(entry) = self.leases.get_mut(&lease) else { continue };
            let Phase::Held { until, ends, renew_at, renewing, .. } = &mut entry.phase else { continue };
            if *renewing != Some(call) {
                continue;
            }
            *renewing = None;
            match answer {
                // What was over before the answer came stays over: between its end and a renewal that was long on its way others
                // may have had the lock, if the authority forgot them all in a restart.
                Some(Some(_)) if *until <= now => {}
                Some(Some(expires_in)) => {
                    entry.failures = 0;
                    let sent = if bug!(RenewedFromAnswer) { now } else { sent };
                    *until = (sent + expires_in).max(*until).min(*ends);
                    *renew_at = sent + expires_in / 3;
                }
                Some(None) => {
                    let loss = if *ends <= now { Loss::HoldLimit } else { Loss::Expired };
                    self.effects.push(Do::Lost { ticket: entry.ticket, loss });
                    self.leases.remove(&lease);
                }
                None => {
                    *renew_at = now + next_pause(&mut entry.failures);
                }
            }
        }
    }

    /// The authority knows that a lease is over.
    pub fn deleted(&mut self, call: CallId) {
        let Some(Call::Delete(lease)) = self.open.remove(&call) else { return };
        if matches!(self.leases.get(&lease), Some(Entry { phase: Phase::Fading { .. }, .. })) {
            self.leases.remove(&lease);
        }
    }

    /// A call was not answered, or by something that says nothing of the lease: it may have reached the authority. `why`
    /// tells of it if that is the end of a request; `retry_after` is how long the authority wants to be left alone.
    pub fn failed(&mut self, now: Time, call: CallId, why: W, retry_after: Option<Duration>) {
        let open = if bug!(LateAnswerBelieved) { self.open.get(&call).cloned() } else { self.open.remove(&call) };
        match open {
            Some(Call::Put(lease)) => {
                let Some(mut entry) = self.leases.remove(&lease) else { return };
                match entry.phase {
                    Phase::Asking { call: current, .. } if current == call => {
                        let until = now + retry_after.unwrap_or_default().max(pause(entry.failures));
                        if until < entry.ask.deadline {
                            entry.failures += 1;
                            entry.phase = Phase::Pausing { until };
                            self.leases.insert(lease, entry);
                        } else {
                            self.effects.push(Do::Refused { ticket: entry.ticket, why });
                            self.withdraw(now, lease, entry);
                        }
                    }
                    _ => drop(self.leases.insert(lease, entry)),
                }
            }
            Some(Call::Renew { leases, .. }) => {
                for lease in leases {
                    let Some(entry) = self.leases.get_mut(&lease) else { continue };
                    let Phase::Held { renew_at, renewing, .. } = &mut entry.phase else { continue };
                    if *renewing == Some(call) && !bug!(FailedRenewalStops) {
                        *renewing = None;
                        *renew_at = now + next_pause(&mut entry.failures);
                    }
                }
            }
            Some(Call::Delete(lease)) => {
                let Some(entry) = self.leases.get_mut(&lease) else { return };
                let Phase::Fading { again_at, call, .. } = &mut entry.phase else { return };
                if bug!(ReleaseSentOnce) {
                    return;
                }
                *call = None;
                *again_at = now + next_pause(&mut entry.failures);
            }
            None => {}
        }
    }

    /// When [`Client::tick`] has something to do.
    pub fn due(&self) -> Time {
        let due = |entry: &Entry<G>| match &entry.phase {
            Phase::Asking { .. } => Time::NEVER,
            Phase::Pausing { until } => *until,
            Phase::Held { until, ends, renew_at, renewing, .. } => {
                if renewing.is_some() || until == ends {
                    *until
                } else {
                    (*renew_at).min(*until)
                }
            }
            Phase::Fading { until, again_at, call } => {
                if call.is_some() {
                    *until
                } else {
                    (*again_at).min(*until)
                }
            }
        };
        self.leases.values().map(due).min().unwrap_or(Time::NEVER)
    }

    /// Does what it is time for: asks again, renews, finds what has ended, gives back.
    pub fn tick(&mut self, now: Time) {
        let ids: Vec<LeaseId> = self.leases.keys().copied().collect();
        let mut renew = Vec::new();
        let mut due = false;
        for lease in ids {
            let Some(entry) = self.leases.get(&lease) else { continue };
            match &entry.phase {
                Phase::Held { until, ends, .. } if *until <= now => {
                    let loss = if *ends <= now { Loss::HoldLimit } else { Loss::Expired };
                    self.effects.push(Do::Lost { ticket: entry.ticket, loss });
                    // It may live on at the authority for a moment.
                    let until = now + entry.ask.ttl;
                    if let Some(entry) = self.leases.remove(&lease) {
                        self.fade(now, lease, until, entry);
                    }
                }
                Phase::Held { until, ends, renew_at, renewing: None, .. } if until < ends => {
                    // Those that are due soon go along.
                    if *renew_at <= now + BEAT {
                        renew.push(lease);
                    }
                    due |= *renew_at <= now;
                }
                Phase::Pausing { until } if *until <= now => {
                    if let Some(entry) = self.leases.remove(&lease) {
                        self.put(now, lease, entry);
                    }
                }
                Phase::Fading { until, .. } if *until <= now => drop(self.leases.remove(&lease)),
                Phase::Fading { again_at, call: None, .. } if *again_at <= now => self.delete(lease),
                Phase::Asking { .. } | Phase::Held { .. } | Phase::Pausing { .. } | Phase::Fading { .. } => {}
            }
        }
        if due {
            self.renew(now, renew);
        }
    }

    fn call(&mut self, call: Call) -> CallId {
        self.calls += 1;
        let id = CallId(self.calls);
        self.open.insert(id, call);
        id
    }

    fn put(&mut self, now: Time, lease: LeaseId, mut entry: Entry<G>) {
        let call = self.call(Call::Put(lease));
        let wait = entry.ask.deadline.since(now);
        let timeout = wait.saturating_add(self.timeout);
        self.effects.push(Do::Put { call, lease, ask: entry.ask.clone(), wait, timeout });
        entry.phase = Phase::Asking { call, sent: now };
        self.leases.insert(lease, entry);
    }

    fn renew(&mut self, now: Time, leases: Vec<LeaseId>) {
        let call = self.call(Call::Renew { sent: now, leases: leases.clone() });
        let mut renewed = Vec::with_capacity(leases.len());
        for lease in leases {
            if let Some(Entry { phase: Phase::Held { renewing, grant, .. }, .. }) = self.leases.get_mut(&lease) {
                *renewing = Some(call);
                renewed.push((lease, grant.clone()));
            }
        }
        self.effects.push(Do::Renew { call, leases: renewed, timeout: self.timeout });
    }

    fn delete(&mut self, lease: LeaseId) {
        let id = self.call(Call::Delete(lease));
        if let Some(Entry { phase: Phase::Fading { call, .. }, .. }) = self.leases.get_mut(&lease) {
            *call = Some(id);
        }
        self.effects.push(Do::Delete { call: id, lease, timeout: self.timeout });
    }

    /// Gives up what may be granted yet: the last call that asks for it may reach the authority until its timeout.
    fn withdraw(&mut self, now: Time, lease: LeaseId, entry: Entry<G>) {
        let until = entry.ask.deadline.max(now) + self.timeout + entry.ask.ttl;
        self.fade(now, lease, until, entry);
    }

    fn fade(&mut self, now: Time, lease: LeaseId, until: Time, mut entry: Entry<G>) {
        entry.failures = 0;
        entry.phase = Phase::Fading { until, again_at: now, call: None };
        self.leases.insert(lease, entry);
        self.delete(lease);
    }
}

/// The pause after a call that failed, which is counted.
fn next_pause(failures: &mut u32) -> Duration {
    let pause = pause(*failures);
    *failures += 1;
    pause
}

fn pause(failures: u32) -> Duration {
    PAUSE.saturating_mul(1_u32.checked_shl(failures).unwrap_or(u32::MAX)).min(LONGEST_PAUSE)
}
