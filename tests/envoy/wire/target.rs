//! A lock manager that is asked by requests: a lock is taken by one that stays at the upstream, given back by its
//! answer, and lost with its client.
//!
//! Nothing here waits for time to pass. Where a case lets a TTL lapse, the hold limit of the request ends the lease, at
//! another time than the case says: its times are for a clock that can jump.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Result as Outcome;
use interlock_conformance::run::Wrong;
use interlock_conformance::{Ask, AskId, Case, Due, Expect, Outcome as Got, Target};
use interlock_testkit::{Answer, Recorded, wait_for, wait_for_async};
use serde_json::Value;
use tokio::task::JoinHandle;

use super::caller::Caller;
use super::names::{annotation, class_of, lane, name};
use crate::common::{DEADLINE, Lane, fences, owner, waited_ms};

/// The hold limit of a lease that a case lets lapse: long enough to see others wait for it.
pub const LAPSE: Duration = Duration::from_secs(3);

/// The wait of a request that a case lets time out behind a lease that lapses.
pub const SHORT_WAIT: &str = ";wait=1";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waits,
    Holds,
    Over,
}

/// A request for a lock.
struct Sent {
    owner: String,
    lock: String,
    path: String,
    state: State,
    /// Whether its wait is to run out.
    times_out: bool,
    answer: JoinHandle<Outcome<Answer>>,
}

impl Sent {
    async fn answer(&mut self) -> Answer {
        self.state = State::Over;
        (&mut self.answer).await.expect("a task").expect("an answer")
    }
}

/// The clients of a case.
pub struct Wire {
    number: usize,
    case: &'static Case,
    lane: Rc<Lane>,
    callers: BTreeMap<String, Caller>,
    sent: BTreeMap<AskId, Sent>,
    /// How often something was sent that asks for nothing of the case's.
    extras: usize,
}

impl Wire {
    /// The case of this number.
    pub fn new(number: usize, case: &'static Case, lane: Rc<Lane>) -> Self {
        Wire { number, case, lane, callers: BTreeMap::new(), sent: BTreeMap::new(), extras: 0 }
    }

    /// The number of an owner; those who are not in the case come behind those who are.
    fn number_of(&self, who: &str) -> u128 {
        let owners = self.case.owners();
        let at = owners.iter().position(|owner| *owner == who).unwrap_or(owners.len());
        u128::try_from(self.number * 1000 + at + 1).unwrap()
    }

    fn name(&self, lock: &str) -> String {
        name(self.number, self.case, lock)
    }

    fn seen(&self, path: &str) -> Option<Recorded> {
        self.lane.upstream().requests_to(path).pop()
    }

    async fn caller(&mut self, who: &str) -> &Caller {
        if !self.callers.contains_key(who) {
            let caller = Caller::connect(self.lane.address(), self.number_of(who), self.lane.is_far()).await;
            self.callers.insert(who.to_owned(), caller);
        }
        &self.callers[who]
    }

    /// Waits until a request stands in its line in etcd, or is past it. etcd does calls over one connection in any order, so
    /// that one behind it says nothing.
    async fn stand(&self, ask: &Ask<'_>) {
        let Some(etcd) = self.lane.etcd() else { return };
        let sent = &self.sent[&ask.id];
        let prefix = format!("/{}/q/{}!", lane(self.case), self.name(ask.lock));
        let there = self.sent.values().filter(|other| other.lock == ask.lock && other.state != State::Over).count();
        wait_for_async(&format!("{} in {prefix}", sent.path), DEADLINE, async || {
            sent.answer.is_finished() || self.seen(&sent.path).is_some() || etcd.count(&prefix).await >= there
        })
        .await;
    }

    /// Waits until the request is at the upstream or answered; the fence that it has there, if it is.
    async fn arrives(&mut self, id: AskId) -> Result<Option<u64>, Wrong> {
        let sent = &self.sent[&id];
        let what = format!("{} of {} at the upstream, or its answer", sent.path, sent.owner);
        wait_for(&what, DEADLINE, || sent.answer.is_finished() || self.seen(&sent.path).is_some()).await;
        if self.seen(&sent.path).is_none() {
            return Ok(None);
        }
        self.fence(id).map(Some)
    }

    /// The fence of a request that is at the upstream; it has this one and no other.
    fn fence(&self, id: AskId) -> Result<u64, Wrong> {
        let sent = &self.sent[&id];
        let seen = self.seen(&sent.path).ok_or("not at the upstream")?;
        let fences = fences(seen.header("lock-fence"));
        match fences.as_slice() {
            [(name, fence, _)] if *name == self.name(&sent.lock) => Ok(*fence),
            _ => Err(format!("fences {fences:?}")),
        }
    }

    fn still_waits(&self, sent: &Sent) -> Result<(), Wrong> {
        if sent.answer.is_finished() && !sent.times_out {
            return Err(format!("{} is answered instead of waiting for {}", sent.owner, sent.lock));
        }
        Ok(())
    }

    async fn refused(&mut self, ask: &Ask<'_>) -> Result<Got, Wrong> {
        let path = self.sent[&ask.id].path.clone();
        let answer = self.sent.get_mut(&ask.id).expect("it was sent").answer().await;
        let name = self.name(ask.lock);
        let slug = answer.json()["type"].as_str().unwrap_or_default().replace("urn:interlock:problem:", "");
        let status = if matches!(slug.as_str(), "deadlock" | "order-violation") { 409 } else { 423 };
        let problem = problem(&answer, status, &slug, &name)?;
        if problem["owner"] != owner(self.number_of(ask.owner)) {
            return Err(format!("refused as another: {problem}"));
        }
        if self.seen(&path).is_some() {
            return Err("refused, and at the upstream all the same".into());
        }
        let at_once = ask.wait_ms == Some(0);
        match slug.as_str() {
            "deadlock" => Ok(Got::Deadlock(self.cycle(&problem)?)),
            "order-violation" => Ok(Got::Order),
            "lock-held" if at_once => Ok(Got::Timeout(0)),
            "wait-timeout" if !at_once => Ok(Got::Timeout(waited_ms(&answer).floor() as u64)),
            other => Err(format!("{other}: {problem}")),
        }
    }

    /// The owners of a cycle that closes on itself, from the first round to itself; all of this case, as their locks are.
    fn cycle(&self, problem: &Value) -> Result<Vec<String>, Wrong> {
        let cycle = problem["cycle"].as_array().ok_or("no cycle")?;
        let mut owners = Vec::new();
        let mut last = &cycle.last().ok_or("an empty cycle")?["held_by"];
        let of = |number: &Value| self.case.owners().into_iter().find(|who| *number == owner(self.number_of(who)));
        for edge in cycle {
            let ours = self.case.locks.keys().any(|lock| edge["waits_for"] == self.name(lock));
            if edge["owner"] != *last || !ours {
                return Err(format!("no cycle of this case: {problem}"));
            }
            owners.push(of(&edge["owner"]).ok_or_else(|| format!("a stranger in the cycle: {problem}"))?.to_owned());
            last = &edge["held_by"];
        }
        owners.extend(of(last).map(str::to_owned));
        Ok(owners)
    }

    /// Lets the upstream answer a request that is there.
    async fn end(&mut self, id: AskId) -> Result<(), Wrong> {
        let sent = self.sent.get_mut(&id).expect("it was sent");
        self.lane.upstream().open(&sent.path);
        let answer = sent.answer().await;
        let who = sent.owner.clone();
        self.caller(&who).await.settle().await;
        if answer.status == 200 { Ok(()) } else { Err(format!("answered {}: {}", answer.status, answer.text())) }
    }

    /// Sends a request that asks for no more than `lock` says and comes back at once, with these fences. Tells how it was
    /// answered, and what the upstream saw of it.
    async fn extra(&mut self, who: &str, lock: Option<&str>, fence: Option<&str>) -> (Answer, Option<Recorded>) {
        self.extras += 1;
        let path = format!("/{}-extra-{}", self.number, self.extras);
        let caller = self.caller(who).await;
        let answer = caller.send(&path, lock, fence).await.expect("a task").expect("an answer");
        caller.settle().await;
        (answer, self.seen(&path))
    }

    fn holders(&self, lock: &str) -> usize {
        self.sent.values().filter(|sent| sent.state == State::Holds && sent.lock == lock).count()
    }

    /// Waits until a sweep sees this of the class of a lock, which is this case's alone.
    async fn until(&self, gauge: &str, lock: &str, count: usize) {
        let class = class_of(self.number, self.case, lock);
        let count = f64::from(u32::try_from(count).unwrap());
        let labels = [("instance", lane(self.case)), ("class", class.as_str())];
        self.lane.envoy().wait_metric(gauge, &labels, |now| now == count, DEADLINE).await;
    }

    fn waiting(&self) -> usize {
        self.sent.values().filter(|sent| sent.state == State::Waits).count()
    }
}

fn problem(answer: &Answer, status: u16, slug: &str, lock: &str) -> Result<Value, Wrong> {
    if answer.status != status {
        return Err(format!("{}: {}", answer.status, answer.text()));
    }
    let problem = answer.json();
    if problem["type"] != format!("urn:interlock:problem:{slug}") || problem["lock"] != lock {
        return Err(format!("not {slug} for {lock}: {problem}"));
    }
    Ok(problem)
}

impl Target for Wire {
    async fn acquire(&mut self, ask: &Ask<'_>) -> Result<Got, Wrong> {
        let path = format!("/{}-{}", self.number, ask.id);
        let annotation = annotation(&self.name(ask.lock), ask);
        let caller = self.caller(ask.owner).await;
        let answer = caller.send(&format!("{path}?hold"), Some(&annotation), None);
        caller.settle().await;
        let (owner, lock) = (ask.owner.to_owned(), ask.lock.to_owned());
        let sent = Sent { owner, lock, path, state: State::Waits, times_out: ask.times_out, answer };
        self.sent.insert(ask.id, sent);
        self.stand(ask).await;
        if ask.allowed.first() == Some(&Expect::Waits) {
            // One that is granted out of turn shows up at the upstream later: as one that nobody woke.
            return self.still_waits(&self.sent[&ask.id]).map(|()| Got::Waits);
        }
        if self.arrives(ask.id).await?.is_none() {
            return self.refused(ask).await;
        }
        self.sent.get_mut(&ask.id).expect("it was sent").state = State::Holds;
        Ok(Got::Granted)
    }

    async fn release(&mut self, id: AskId) -> Result<bool, Wrong> {
        if self.sent[&id].state == State::Holds {
            return self.end(id).await.map(|()| true);
        }
        let (owner, lock) = (self.sent[&id].owner.clone(), self.sent[&id].lock.clone());
        self.release_nothing(&owner, &lock, Some(id)).await
    }

    /// A request with the fence of the lock, an old one or an invented one, and nothing to give back: it ends, and whoever
    /// held the lock still does.
    async fn release_nothing(&mut self, owner: &str, lock: &str, once: Option<AskId>) -> Result<bool, Wrong> {
        let fence = once.map(|id| self.fence(id)).transpose()?.unwrap_or(176_000_000_012_345);
        let name = self.name(lock);
        let (answer, seen) = self.extra(owner, None, Some(&format!("{name};fence={fence};mode=exclusive"))).await;
        let seen = seen.ok_or_else(|| format!("a request without locks is answered {}", answer.status))?;
        if answer.status != 200 || seen.header("lock-fence").is_some() {
            return Err(format!("passed with {:?}, answered {}", seen.header("lock-fence"), answer.status));
        }
        let permits = self.case.locks[lock].permits.map_or(1, |permits| usize::try_from(permits).unwrap());
        let held = self.holders(lock) >= permits;
        let (probe, _) = self.extra("a stranger", Some(&format!("{name};wait=0")), None).await;
        match (probe.status, held) {
            (423, true) | (200, false) => Ok(false),
            (200, true) => Ok(true),
            _ => Err(format!("the lock is held: {held}, and a stranger gets {}: {}", probe.status, probe.text())),
        }
    }

    async fn cancel(&mut self, id: AskId) -> Result<(), Wrong> {
        let sent = self.sent.get_mut(&id).expect("it was sent");
        sent.answer.abort();
        sent.state = State::Over;
        // The stream is reset when the task is gone.
        let _ = (&mut sent.answer).await;
        let who = sent.owner.clone();
        self.caller(&who).await.settle_resets().await;
        Ok(())
    }

    /// Closes the owner's connection: what waits on it goes, and what it holds is given back.
    async fn crash(&mut self, owner: &str, _: &[AskId]) -> Result<(), Wrong> {
        let locks: Vec<String> = self.sent.values().filter(|it| it.owner == owner).map(|it| it.lock.clone()).collect();
        for lock in &locks {
            self.until("interlock_waiting", lock, self.waiting()).await;
        }
        let held = self.sent.values().any(|sent| sent.owner == owner && sent.state == State::Holds);
        for sent in self.sent.values_mut().filter(|sent| sent.owner == owner) {
            sent.state = State::Over;
        }
        self.callers.remove(owner);
        for lock in &locks {
            if !held {
                self.until("interlock_waiting", lock, self.waiting()).await;
            } else if self.waiting() == 0 {
                self.until("interlock_held", lock, self.holders(lock)).await;
            }
        }
        Ok(())
    }

    /// Waits for what comes of the time that passes: waits that run out, leases that end.
    async fn advance(&mut self, _: u64, due: &Due) -> Result<Due, Wrong> {
        for id in &due.timed_out {
            let sent = self.sent.get_mut(id).expect("it was sent");
            let (lock, answer) = (sent.lock.clone(), sent.answer().await);
            problem(&answer, 423, "wait-timeout", &self.name(&lock))?;
        }
        for id in &due.expired {
            let sent = self.sent.get_mut(id).expect("it was sent");
            let (lock, answer) = (sent.lock.clone(), sent.answer().await);
            problem(&answer, 409, "lease-lost", &self.name(&lock))?;
            if answer.took < LAPSE {
                return Err(format!("ended early, after {:?}", answer.took));
            }
        }
        Ok(Due { expired: due.expired.clone(), timed_out: due.timed_out.clone() })
    }

    async fn refuses_no_name(&mut self) -> Result<(), Wrong> {
        for nothing in ["", "\"\"", ";wait=0"] {
            let (answer, seen) = self.extra("a stranger", Some(nothing), None).await;
            if answer.status != 400 || answer.json()["type"] != "urn:interlock:problem:malformed-annotation" {
                return Err(format!("{nothing:?} is answered {}: {}", answer.status, answer.text()));
            }
            if seen.is_some() {
                return Err(format!("{nothing:?} is at the upstream"));
            }
        }
        Ok(())
    }

    /// Waits until so many have come to the upstream, in the order of their fences; the others still wait.
    async fn granted(&mut self, count: usize) -> Result<Vec<AskId>, Wrong> {
        let arrived = |sent: &&Sent| sent.state == State::Waits && self.seen(&sent.path).is_some();
        let what = format!("{count} hand-overs in {}", self.case.name);
        wait_for(&what, DEADLINE, || self.sent.values().filter(arrived).count() >= count).await;
        let ids = self.sent.iter().filter(|(_, sent)| arrived(sent)).map(|(id, _)| *id);
        let mut granted = ids.map(|id| Ok((self.fence(id)?, id))).collect::<Result<Vec<_>, Wrong>>()?;
        granted.sort_unstable();
        if self.lane.etcd().is_some() {
            // Those whose turn it is at the same time say so each by itself: only then does their order say nothing.
            granted.sort_unstable_by_key(|(_, id)| *id);
        }
        if granted.iter().map(|(fence, _)| fence).collect::<BTreeSet<_>>().len() < granted.len() {
            return Err(format!("two grants under one fence: {granted:?}"));
        }
        let granted: Vec<AskId> = granted.into_iter().map(|(_, id)| id).collect();
        for id in &granted {
            self.sent.get_mut(id).expect("it was sent").state = State::Holds;
        }
        self.sent.values().filter(|sent| sent.state == State::Waits).try_for_each(|sent| self.still_waits(sent))?;
        Ok(granted)
    }

    async fn finish(&mut self) -> Result<(), Wrong> {
        for sent in self.sent.values().filter(|sent| sent.state != State::Over) {
            self.lane.upstream().open(&sent.path);
        }
        for sent in self.sent.values_mut().filter(|sent| sent.state != State::Over) {
            let answer = sent.answer().await;
            if answer.status != 200 {
                return Err(format!("left over: {}", answer.text()));
            }
        }
        Ok(())
    }
}
