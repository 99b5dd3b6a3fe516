//! One request on its way to its locks: what each answer makes of it, and what it does next.
//!
//! It takes its locks in the global order, one after the other, except where nobody is in the way: those it takes at once.
//! Where it waits it has told so in the line and in the index before it looks for cycles.

use interlock_core::keyed::{self, Chase, Key, Moment, Stand, Turn};
use interlock_core::{Cause, Duration, Fence, Grant, LeaseId, Limit, LockName, Loss, Refusal, Rules, Time, Want};

use super::keys::Unreadable;
use super::trouble::Trouble;
use super::txn::{MOST, Step, Told, Writer};
use super::wire::What;
use super::{Entry, Etcd, News, PAUSE};
use crate::answer::Reject;
use crate::host::{ContextId, Host};

/// How often a request begins anew because of others, or because a session ended, before it is told so.
pub(super) const TRIES: u32 = 8;

/// Where a request is.
#[derive(Debug)]
pub(super) enum Phase {
    /// It begins a little later, or once there is a session.
    Pausing,
    /// Its next locks are asked for.
    Trying,
    /// It stands in the line of the next lock.
    Standing {
        /// Whether it has just come: then it may upgrade.
        fresh: bool,
        /// Whether a step up is under way.
        moving: bool,
        /// The search for cycles, until it has ended.
        chase: Option<Box<Chase>>,
    },
    /// It has overtaken others, and looks for cycles before it goes on.
    Proving { chase: Box<Chase> },
    /// It has all its locks.
    Held,
    /// It has nothing (any more).
    Over,
}

impl Phase {
    pub(super) fn chase(&mut self) -> Option<&mut Chase> {
        match self {
            Phase::Standing { chase, .. } => chase.as_deref_mut(),
            Phase::Proving { chase } => Some(chase),
            _ => None,
        }
    }
}

/// A request: its stream, and the identity that it had when it called.
pub(super) type Who = (ContextId, LeaseId);

/// Whose turn it is, with the fences that they re-enter under.
type Turns = Vec<(LeaseId, Option<Fence>)>;

impl Etcd {
    /// Asks for the next locks of a request: at once from the callback of its stream, else by a root.
    pub(super) fn begin(&mut self, host: &dyn Host, now: Time, stream: ContextId, from: Option<ContextId>) {
        let ready = self.is_ready(host, now);
        let session = self.session.id(now);
        let Some(entry) = self.entries.get_mut(&stream) else { return };
        let Some(session) = session.filter(|_| ready) else {
            entry.phase = Phase::Pausing;
            entry.failing.get_or_insert(now);
            return self.set_timer(stream, Some(now + PAUSE));
        };
        entry.phase = Phase::Trying;
        entry.wrote = true;
        let lease = entry.lease();
        let message = writer(&self.names, session, entry, host).attempt();
        self.send(host, now, &message, What::Attempt { stream, lease }, from);
    }

    /// Has all begin that waited for a session.
    pub(super) fn begin_all(&mut self, host: &dyn Host, now: Time) {
        for stream in self.in_phase(|phase| matches!(phase, Phase::Pausing)) {
            self.set_timer(stream, None);
            self.begin(host, now, stream, None);
        }
    }

    pub(super) fn in_phase(&self, is: impl Fn(&Phase) -> bool) -> Vec<ContextId> {
        let mut streams: Vec<_> =
            self.entries.iter().filter(|(_, entry)| is(&entry.phase)).map(|(stream, _)| *stream).collect();
        // In the order in which they came.
        streams.sort_unstable();
        streams
    }

    /// It is time to look after a request.
    pub(super) fn look_after(&mut self, host: &dyn Host, now: Time, stream: ContextId) {
        let Some(entry) = self.entries.get(&stream) else { return };
        match &entry.phase {
            Phase::Pausing if self.patience(entry, now) <= now => {
                let unopened = self.session.trouble.filter(|_| self.session.id(now).is_none());
                let trouble = unopened.or(entry.trouble).unwrap_or(Trouble::NoAnswer);
                self.refuse(stream, backend(trouble));
            }
            Phase::Pausing => self.begin(host, now, stream, None),
            // What is under way may be a grant: its answer, or the lack of one, comes soon.
            Phase::Standing { moving: true, .. } if entry.deadline() <= now => {
                self.set_timer(stream, Some(now + PAUSE))
            }
            Phase::Standing { .. } if entry.deadline() <= now => self.time_is_up(host, now, stream),
            Phase::Standing { .. } | Phase::Proving { .. } => {
                self.await_turn(stream);
                self.chase(host, now, stream);
            }
            Phase::Trying | Phase::Held | Phase::Over => {}
        }
    }

    /// The next locks of a request were asked for.
    pub(super) fn attempted(&mut self, host: &dyn Host, now: Time, who: Who, mut told: Told) -> Result<(), Unreadable> {
        if !self.is_at(who, |phase| matches!(phase, Phase::Trying)) {
            return Ok(());
        }
        let stream = who.0;
        let keys = if told.succeeded { Vec::new() } else { told.line()? };
        let Some(entry) = self.entries.get_mut(&stream) else { return Ok(()) };
        (entry.own, entry.failing) = (None, None);
        if entry.listed && entry.grants.is_empty() {
            let others = told.items()?;
            let Rules { classes, limits, .. } = &*entry.rules;
            let objection = keyed::objection(&entry.request, &others, classes, limits.locks_per_owner);
            if let Some((at, cause)) = objection {
                self.refuse_at(stream, at, cause);
                return Ok(());
            }
        }
        if told.succeeded {
            for _ in 0..MOST {
                self.take(now, stream, Fence(told.revision));
            }
            self.go_on(host, now, stream);
            return Ok(());
        }
        let Some(want) = entry.next().cloned() else { return Ok(()) };
        if want.wait.is_zero() {
            self.try_at_once(host, now, stream, &want, &keys, told.revision);
            return Ok(());
        }
        entry.listed = true;
        let most = entry.rules.limits.waiters_per_lock;
        // Itself among them.
        let waiters = keys.iter().filter(|key| key.fence().is_none()).count();
        let full = waiters > usize::try_from(most).unwrap_or(usize::MAX);
        entry.phase = Phase::Standing { fresh: true, moving: false, chase: None };
        self.enter_line(now, &want.name, stream, keys, told.revision);
        if full {
            let cause = Cause::Limit { limit: Limit::WaitersPerLock, value: u64::from(most) };
            self.refuse(stream, cause);
            return Ok(());
        }
        self.await_turn(stream);
        self.judge(host, now, &want.name);
        Ok(())
    }

    /// A request that does not wait gets a lock that others have, if it is its turn at once.
    fn try_at_once(&mut self, host: &dyn Host, now: Time, stream: ContextId, want: &Want, keys: &[Key], revision: u64) {
        let (session, moment) = (self.session.id(now), Moment { now, unix_micros: host.unix_micros() });
        let Some(entry) = self.entries.get_mut(&stream) else { return };
        let permits = entry.rules.classes.of(&want.name).permits;
        let lease = entry.lease();
        let writer = writer(&self.names, session.unwrap_or_default(), entry, host);
        let me = writer.key(entry.grants.len(), Stand::Waits);
        let queue = keyed::line(&want.name, keys, moment);
        let turn = me.map_or(Turn::Wait, |me| keyed::arrive(&queue, &me, permits, moment));
        let Turn::Grant { fence, overtakes, leans_on } = &turn else {
            let holders = keyed::holders(&queue, lease, now);
            return self.refuse(stream, Cause::Held { holders, retry_after: self.at.session_ttl });
        };
        let leans_on = since(leans_on, |lease| keys.iter().find(|key| key.lease == *lease));
        let step = Step { stand: Stand::Holds(*fence), read: revision, created: None, leans_on, overtakes: *overtakes };
        let message = writer.move_up(&want.name, &step);
        self.send(host, now, &message, What::Move { stream, lease, step }, None);
    }

    /// Finds out whose turn it is in a line, of those of this VM who stand there.
    pub(super) fn judge(&mut self, host: &dyn Host, now: Time, lock: &LockName) {
        let moment = Moment { now, unix_micros: host.unix_micros() };
        let Some(line) = self.lines.get(lock) else { return };
        let queue = line.queue(lock, moment);
        let mut turns: Option<(u32, Turns)> = None;
        for stream in line.standing.iter().copied().collect::<Vec<_>>() {
            let Some(line) = self.lines.get(lock) else { return };
            let Some(entry) = self.entries.get(&stream) else { continue };
            let Phase::Standing { fresh, moving, .. } = entry.phase else { continue };
            let permits = entry.rules.classes.of(lock).permits;
            let Some(me) = line.keys.get(&entry.lease()) else {
                // Its key is gone: with the session, or by somebody's hand.
                if !moving {
                    self.lost_place(host, now, stream);
                }
                continue;
            };
            if let Some(fence) = me.fence() {
                // A step up whose answer was lost.
                if !moving {
                    self.stepped_up(host, now, stream, lock, fence, true);
                }
                continue;
            }
            if moving {
                continue;
            }
            let turn = if fresh {
                keyed::arrive(&queue, me, permits, moment)
            } else {
                if turns.as_ref().is_none_or(|(known, _)| *known != permits) {
                    turns = Some((permits, keyed::turns(&queue, permits, moment)));
                }
                let mine = turns.iter().flat_map(|(_, turns)| turns).any(|(lease, _)| *lease == me.lease);
                if mine { keyed::stand(&queue, me, permits, moment) } else { Turn::Wait }
            };
            let (stand, overtakes) = match &turn {
                Turn::Grant { fence, overtakes, .. } => (Stand::Holds(*fence), *overtakes),
                Turn::Upgrade { .. } => (Stand::Upgrades, false),
                Turn::Wait => {
                    if fresh {
                        self.begin_chase(host, now, stream, lock, &queue, false);
                    }
                    continue;
                }
            };
            let leans_on = since(turn.leans_on(), |lease| line.keys.get(lease));
            let step = Step { stand, read: line.revision, created: Some(me.created), leans_on, overtakes };
            self.step_up(host, now, stream, lock, step);
        }
    }

    fn step_up(&mut self, host: &dyn Host, now: Time, stream: ContextId, lock: &LockName, step: Step) {
        let Some(session) = self.session.id(now) else { return };
        let Some(entry) = self.entries.get_mut(&stream) else { return };
        if let Phase::Standing { moving, .. } = &mut entry.phase {
            *moving = true;
        }
        let lease = entry.lease();
        let message = writer(&self.names, session, entry, host).move_up(lock, &step);
        self.send(host, now, &message, What::Move { stream, lease, step }, None);
    }

    /// A step up was asked for.
    pub(super) fn moved_up(
        &mut self,
        host: &dyn Host,
        now: Time,
        who: Who,
        step: &Step,
        mut told: Told,
    ) -> Result<(), Unreadable> {
        let at = |phase: &Phase| matches!(phase, Phase::Standing { moving: true, .. } | Phase::Trying);
        if !self.is_at(who, at) {
            return Ok(());
        }
        let stream = who.0;
        let keys = if told.succeeded { Vec::new() } else { told.line()? };
        let Some(entry) = self.entries.get_mut(&stream) else { return Ok(()) };
        let Some(want) = entry.next().cloned() else { return Ok(()) };
        entry.failing = None;
        if let Phase::Standing { moving, .. } = &mut entry.phase {
            *moving = false;
        }
        match (told.succeeded, step.stand) {
            (true, Stand::Holds(fence)) => {
                let fence = fence.unwrap_or(Fence(told.revision));
                self.stepped_up(host, now, stream, &want.name, fence, step.overtakes);
            }
            (true, _) => {
                let moment = Moment { now, unix_micros: host.unix_micros() };
                let queue = self.lines.get(&want.name).map(|line| line.queue(&want.name, moment));
                if let Some(queue) = queue {
                    self.begin_chase(host, now, stream, &want.name, &queue, true);
                }
                // What the line looks like now it is about to be told.
            }
            (false, _) if step.created.is_none() => {
                entry.tries += 1;
                if entry.tries < TRIES {
                    self.begin(host, now, stream, None);
                } else {
                    let moment = Moment { now, unix_micros: host.unix_micros() };
                    let queue = keyed::line(&want.name, &keys, moment);
                    let holders = keyed::holders(&queue, who.1, now);
                    self.refuse(stream, Cause::Held { holders, retry_after: Duration::from_millis(1) });
                }
            }
            (false, _) => {
                self.renew_line(&want.name, keys, told.revision);
                self.judge(host, now, &want.name);
            }
        }
        Ok(())
    }

    /// A request holds the lock that it came to.
    fn stepped_up(
        &mut self,
        host: &dyn Host,
        now: Time,
        stream: ContextId,
        lock: &LockName,
        fence: Fence,
        overtook: bool,
    ) {
        self.leave_line(lock, stream);
        self.take(now, stream, fence);
        let Some(entry) = self.entries.get_mut(&stream) else { return };
        if overtook {
            let chase = Box::new(Chase::new(entry.request.owner().clone(), None));
            entry.phase = Phase::Proving { chase };
            self.set_timer(stream, None);
            return self.chase(host, now, stream);
        }
        self.go_on(host, now, stream);
    }

    /// Notes a grant of the next lock.
    fn take(&mut self, now: Time, stream: ContextId, fence: Fence) {
        let ttl = self.at.session_ttl;
        let Some(entry) = self.entries.get_mut(&stream) else { return };
        let Some(Want { name, mode, hold, .. }) = entry.next().cloned() else { return };
        let asked = entry.request.asks_for(&name);
        entry.grants.push(Grant { name, mode, fence, until: now + hold, ttl, asked });
    }

    /// Lets a request go on that has all its locks; asks for the others otherwise.
    pub(super) fn go_on(&mut self, host: &dyn Host, now: Time, stream: ContextId) {
        let lives = self.session.id(now).is_some();
        let Some(entry) = self.entries.get_mut(&stream) else { return };
        if !lives || entry.grants.iter().any(|grant| grant.until <= now) {
            let loss = if lives { Loss::HoldLimit } else { Loss::Expired };
            return self.refuse(stream, Cause::LeaseLost { loss });
        }
        if entry.next().is_some() {
            return self.begin(host, now, stream, None);
        }
        entry.phase = Phase::Held;
        self.set_timer(stream, None);
        self.tell(stream, News::Granted);
    }

    fn await_turn(&mut self, stream: ContextId) {
        let deadline = self.entries.get(&stream).map(Entry::deadline);
        self.set_timer(stream, deadline);
    }

    /// A wait has run out.
    fn time_is_up(&mut self, host: &dyn Host, now: Time, stream: ContextId) {
        let moment = Moment { now, unix_micros: host.unix_micros() };
        let Some(entry) = self.entries.get(&stream) else { return };
        let Some(want) = entry.next() else { return };
        let queue = self.lines.get(&want.name).map(|line| line.queue(&want.name, moment));
        let holders = queue.map(|queue| keyed::holders(&queue, entry.lease(), now)).unwrap_or_default();
        let (waited, retry_after) = (now.since(entry.request.arrived()), self.at.session_ttl);
        self.refuse(stream, Cause::WaitTimeout { holders, waited, retry_after });
    }

    /// A request gets nothing, because of the lock that it came to.
    pub(super) fn refuse(&mut self, stream: ContextId, cause: Cause) {
        self.refuse_at(stream, None, cause);
    }

    fn refuse_at(&mut self, stream: ContextId, at: Option<Want>, cause: Cause) {
        let Some(entry) = self.entries.get(&stream) else { return };
        let at = at.or_else(|| entry.next().cloned()).or_else(|| entry.request.wants().last().cloned());
        let owner = entry.request.owner().clone();
        self.give_back(Time::ZERO, stream);
        let reject = match at {
            Some(want) => Reject::Core(Refusal { lock: want.name, mode: want.mode, owner, cause }),
            None => Reject::Malformed { detail: String::from("it names no lock") },
        };
        if let Some(entry) = self.entries.get_mut(&stream) {
            entry.phase = Phase::Over;
        }
        self.set_timer(stream, None);
        self.tell(stream, News::Refused(Box::new(reject)));
    }

    /// What the limits of the whole table have against another request, as far as this VM alone can tell.
    pub(super) fn is_full(&self, rules: &Rules) -> Option<Cause> {
        let most = |most: u32| usize::try_from(most).unwrap_or(usize::MAX);
        let held: usize = self.entries.values().map(|entry| entry.grants.len()).sum();
        if held >= most(rules.limits.locks) {
            return Some(Cause::Limit { limit: Limit::Locks, value: u64::from(rules.limits.locks) });
        }
        let waiters: usize = self.lines.values().map(|line| line.standing.len()).sum();
        let full = waiters >= most(rules.limits.waiters);
        full.then(|| Cause::Limit { limit: Limit::Waiters, value: u64::from(rules.limits.waiters) })
    }
}

fn writer<'a>(names: &'a super::keys::Names, session: i64, entry: &'a Entry, host: &dyn Host) -> Writer<'a> {
    let Entry { request, grants, listed, .. } = entry;
    Writer { names, session, request, held: grants.len(), listed: *listed, unix_micros: host.unix_micros() }
}

/// Since when the keys are there that a step leans on.
fn since<'a>(leases: &[LeaseId], key: impl Fn(&LeaseId) -> Option<&'a Key>) -> Vec<(LeaseId, u64)> {
    leases.iter().filter_map(|lease| Some((*lease, key(lease)?.created))).collect()
}

pub(super) fn backend(trouble: Trouble) -> Cause {
    Cause::Backend { detail: trouble.to_string() }
}
