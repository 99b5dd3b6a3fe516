//! One case on its way: what each of its steps is as a request, and what has to come of it.
//!
//! Nothing here waits for time to pass. Where a case lets a TTL lapse, the hold limit of the request ends the lease, at
//! another time than the case says: its times are for a clock that can jump.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Result as Outcome;
use interlock_testkit::{Answer, Recorded, wait_for};
use serde_json::Value;
use tokio::task::JoinHandle;

use super::caller::Caller;
use super::cases::{class_of, lane, mode, name, steps, texts};
use crate::common::{DEADLINE, Lane, fences, owner, waited_ms};

/// The hold limit of a lease that a case lets lapse: long enough to see others wait for it.
const LAPSE: Duration = Duration::from_secs(3);

/// The wait of a request that a case lets time out behind a lease that lapses.
const SHORT_WAIT: &str = ";wait=1";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waits,
    Holds,
    Over,
}

/// A request for a lock.
struct Sent {
    owner: &'static str,
    lock: &'static str,
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

/// A case with its clients.
pub struct Run {
    number: usize,
    case: &'static Value,
    lane: Rc<Lane>,
    owners: Vec<&'static str>,
    callers: BTreeMap<&'static str, Caller>,
    sent: Vec<Sent>,
}

type Step = Result<(), String>;

impl Run {
    /// The case of this number.
    pub fn new(number: usize, case: &'static Value, lane: Rc<Lane>) -> Self {
        let mut owners = Vec::new();
        for step in steps(case) {
            let who = step["owner"].as_str().unwrap();
            if !owners.contains(&who) {
                owners.push(who);
            }
        }
        Run { number, case, lane, owners, callers: BTreeMap::new(), sent: Vec::new() }
    }

    /// Runs it; says which step came out otherwise, and how.
    pub async fn run(mut self) -> Step {
        for (at, step) in steps(self.case).enumerate() {
            self.step(at, step).await.map_err(|what| format!("step {at} {step}: {what}"))?;
        }
        // What the case leaves held or waiting gets done.
        for sent in self.sent.iter_mut().filter(|sent| sent.state != State::Over) {
            self.lane.upstream().open(&sent.path);
        }
        for sent in self.sent.iter_mut().filter(|sent| sent.state != State::Over) {
            let answer = sent.answer().await;
            if answer.status != 200 {
                return Err(format!("left over: {}", answer.text()));
            }
        }
        Ok(())
    }

    async fn step(&mut self, at: usize, step: &'static Value) -> Step {
        let who = step["owner"].as_str().unwrap();
        match step["op"].as_str().unwrap() {
            "acquire" => return self.acquire(at, step, step["expect"].as_str().unwrap()).await,
            "release" => self.release(step, who).await?,
            "downgrade" => {
                let strong = self.held(who, step).ok_or("nothing to downgrade")?;
                self.acquire(at, step, "granted").await?;
                self.end(strong).await?;
            }
            "cancel" => {
                let sent = self.waiting(who)?;
                sent.answer.abort();
                sent.state = State::Over;
                // The stream is reset when the task is gone.
                let _ = (&mut sent.answer).await;
                self.callers[who].settle_resets().await;
            }
            "crash" => self.crash(who).await?,
            "advance" => self.lapse(step).await?,
            other => return Err(format!("unknown step {other}")),
        }
        self.woken(step).await
    }

    fn number_of(&self, who: &str) -> u128 {
        let at = self.owners.iter().position(|owner| *owner == who).unwrap();
        u128::try_from(self.number * 1000 + at + 1).unwrap()
    }

    fn lock(&self, step: &Value) -> String {
        name(self.number, self.case, step["lock"].as_str().unwrap())
    }

    /// The latest request that holds the step's lock for this owner.
    fn held(&self, who: &str, step: &Value) -> Option<usize> {
        let holds = |sent: &Sent| sent.state == State::Holds && sent.owner == who && sent.lock == step["lock"];
        self.sent.iter().rposition(holds)
    }

    fn waiting(&mut self, who: &str) -> Result<&mut Sent, String> {
        let mut all = self.sent.iter_mut();
        all.find(|sent| sent.state == State::Waits && sent.owner == who).ok_or(format!("{who} does not wait"))
    }

    /// Whether a later step says so of this owner and the step's lock.
    fn later(&self, at: usize, told: impl Fn(&Value) -> bool) -> bool {
        steps(self.case).skip(at).any(told)
    }

    /// The `lock` header of a step.
    fn annotation(&self, at: usize, step: &Value, times_out: bool) -> String {
        let (who, lock) = (step["owner"].as_str().unwrap(), step["lock"].as_str().unwrap());
        let mut text = format!("{};mode={}", self.lock(step), mode(step));
        match step["wait_ms"].as_f64() {
            _ if times_out => text += SHORT_WAIT,
            Some(wait) if wait == 0.0 || step["expect"] == "timeout" => text += &format!(";wait={}", wait / 1000.0),
            // The policy's: longer than any case takes.
            _ => {}
        }
        let lapses =
            |step: &Value| step["expired"].as_array().into_iter().flatten().any(|it| it[0] == who && it[1] == lock);
        if self.later(at, lapses) {
            text += &format!(";ttl={0};hold={0}", LAPSE.as_secs());
        }
        text
    }

    fn seen(&self, path: &str) -> Option<Recorded> {
        self.lane.upstream().requests_to(path).pop()
    }

    async fn acquire(&mut self, at: usize, step: &'static Value, expect: &str) -> Step {
        let (who, lock) = (step["owner"].as_str().unwrap(), step["lock"].as_str().unwrap());
        let times_out = expect == "waits" && self.later(at, |step| texts(&step["timed_out"]).contains(&who));
        let annotation = self.annotation(at, step, times_out);
        if !self.callers.contains_key(who) {
            let caller = Caller::connect(self.lane.address(), self.number_of(who)).await;
            self.callers.insert(who, caller);
        }
        let caller = &self.callers[who];
        let path = format!("/{}-{at}", self.number);
        let answer = caller.send(&format!("{path}?hold"), Some(&annotation));
        caller.settle().await;
        self.sent.push(Sent { owner: who, lock, path, state: State::Waits, times_out, answer });
        let last = self.sent.len() - 1;
        match expect {
            "granted" => self.arrives(last).await.map(|_| ()),
            "waits" => self.still_waits(&self.sent[last]),
            // Among the outcomes that a case allows, the first is the one of strict FIFO.
            refusal => self.refused(last, step, refusal).await,
        }
    }

    /// Waits until the request is at the upstream; the fence it has there.
    async fn arrives(&mut self, at: usize) -> Result<u64, String> {
        let sent = &self.sent[at];
        let what = format!("{} of {} at the upstream", sent.path, sent.owner);
        wait_for(&what, DEADLINE, || sent.answer.is_finished() || self.seen(&sent.path).is_some()).await;
        let Some(seen) = self.seen(&sent.path) else {
            return Err(format!("refused: {}", self.sent[at].answer().await.text()));
        };
        let fences = fences(seen.header("lock-fence"));
        let [(name, fence, _)] = fences.as_slice() else { return Err(format!("fences {fences:?}")) };
        if *name != super::cases::name(self.number, self.case, sent.lock) {
            return Err(format!("the fence is one of {name}"));
        }
        self.sent[at].state = State::Holds;
        Ok(*fence)
    }

    fn still_waits(&self, sent: &Sent) -> Step {
        if self.seen(&sent.path).is_some() {
            return Err(format!("{} got {} out of turn", sent.owner, sent.lock));
        }
        if sent.answer.is_finished() && !sent.times_out {
            return Err(format!("{} is answered instead of waiting for {}", sent.owner, sent.lock));
        }
        Ok(())
    }

    async fn refused(&mut self, at: usize, step: &Value, expect: &str) -> Step {
        let sent = &self.sent[at];
        let what = format!("the refusal of {} for {}", sent.path, sent.owner);
        wait_for(&what, DEADLINE, || sent.answer.is_finished() || self.seen(&sent.path).is_some()).await;
        if self.seen(&sent.path).is_some() {
            return Err("granted".into());
        }
        let (path, answer) = (sent.path.clone(), self.sent[at].answer().await);
        let (status, slug) = match expect {
            "rejected-deadlock" => (409, "deadlock"),
            "rejected-order" => (409, "order-violation"),
            "timeout" if step["wait_ms"] == 0 => (423, "lock-held"),
            "timeout" => (423, "wait-timeout"),
            other => return Err(format!("unknown outcome {other}")),
        };
        let problem = self.problem(&answer, status, slug, &self.lock(step))?;
        if problem["owner"] != owner(self.number_of(step["owner"].as_str().unwrap())) {
            return Err(format!("refused as another: {problem}"));
        }
        match expect {
            "rejected-deadlock" => self.closes(step, &problem)?,
            // How much later it may be depends on the machine.
            "timeout" if waited_ms(&answer) < step["wait_ms"].as_f64().unwrap() => {
                return Err(format!("gave up after {} ms", waited_ms(&answer)));
            }
            _ => {}
        }
        if self.seen(&path).is_some() {
            return Err("refused, and at the upstream all the same".into());
        }
        Ok(())
    }

    fn problem(&self, answer: &Answer, status: u16, slug: &str, lock: &str) -> Result<Value, String> {
        if answer.status != status {
            return Err(format!("{}: {}", answer.status, answer.text()));
        }
        let problem = answer.json();
        if problem["type"] != format!("urn:interlock:problem:{slug}") || problem["lock"] != lock {
            return Err(format!("not {slug} for {lock}: {problem}"));
        }
        Ok(problem)
    }

    /// Checks that the cycle is one, and of this case.
    fn closes(&self, step: &Value, problem: &Value) -> Step {
        let cycle = problem["cycle"].as_array().ok_or("no cycle")?;
        let mut owners = Vec::new();
        let mut last = cycle.last().ok_or("an empty cycle")?["held_by"].clone();
        for edge in cycle {
            let who = self.owners.iter().find(|who| edge["owner"] == owner(self.number_of(who)));
            let lock = |lock: &String| edge["waits_for"] == name(self.number, self.case, lock);
            if edge["owner"] != last || !self.case["locks"].as_object().unwrap().keys().any(lock) {
                return Err(format!("no cycle of this case: {problem}"));
            }
            owners.push(*who.ok_or_else(|| format!("a stranger in the cycle: {problem}"))?);
            last = edge["held_by"].clone();
        }
        owners.push(owners[0]);
        if !step["cycle"].is_null() && texts(&step["cycle"]) != owners {
            return Err(format!("names the cycle {owners:?}"));
        }
        Ok(())
    }

    async fn release(&mut self, step: &Value, who: &str) -> Step {
        let mut outcome = "error-not-holder";
        while let Some(at) = self.held(who, step) {
            self.end(at).await?;
            outcome = "ok";
            if step["all"] != true {
                break;
            }
        }
        if step["expect"] == outcome { Ok(()) } else { Err(outcome.into()) }
    }

    /// Lets the upstream answer a request that is there.
    async fn end(&mut self, at: usize) -> Step {
        let sent = &mut self.sent[at];
        self.lane.upstream().open(&sent.path);
        let answer = sent.answer().await;
        self.callers[sent.owner].settle().await;
        if answer.status == 200 { Ok(()) } else { Err(format!("answered {}: {}", answer.status, answer.text())) }
    }

    /// Closes the connection of an owner that waits.
    async fn crash(&mut self, who: &str) -> Step {
        let lock = self.waiting(who)?.lock;
        let class = class_of(self.number, self.case, lock);
        self.until_waiting(&class).await;
        self.waiting(who)?.state = State::Over;
        self.callers.remove(who);
        self.until_waiting(&class).await;
        Ok(())
    }

    /// Waits until a sweep sees as many waiters as there should be. The class is this case's alone.
    async fn until_waiting(&self, class: &str) {
        let count = self.sent.iter().filter(|sent| sent.state == State::Waits).count();
        let count = f64::from(u32::try_from(count).unwrap());
        let labels = [("instance", lane(self.case)), ("class", class)];
        let envoy = self.lane.envoy();
        envoy.wait_metric("interlock_waiting", &labels, |now| now == count, DEADLINE).await;
    }

    /// Waits for what comes of the time that passes: waits that run out, leases that end.
    async fn lapse(&mut self, step: &Value) -> Step {
        for who in texts(&step["timed_out"]) {
            let sent = self.waiting(who)?;
            let (lock, answer) = (sent.lock, sent.answer().await);
            self.problem(&answer, 423, "wait-timeout", &name(self.number, self.case, lock))?;
        }
        for expired in step["expired"].as_array().into_iter().flatten() {
            let who = expired[0].as_str().unwrap();
            let holds = |sent: &Sent| sent.state == State::Holds && sent.owner == who && sent.lock == expired[1];
            let at = self.sent.iter().rposition(holds).ok_or(format!("{who} does not hold it"))?;
            let (lock, answer) = (self.sent[at].lock, self.sent[at].answer().await);
            self.problem(&answer, 409, "lease-lost", &name(self.number, self.case, lock))?;
            if answer.took < LAPSE {
                return Err(format!("ended early, after {:?}", answer.took));
            }
        }
        Ok(())
    }

    /// Waits until those that the step wakes are at the upstream, granted in this order; all others still wait.
    async fn woken(&mut self, step: &Value) -> Step {
        let mut last = None;
        for who in texts(&step["wakes"]) {
            let waits = |sent: &Sent| sent.state == State::Waits && sent.owner == who;
            let at = self.sent.iter().position(waits).ok_or(format!("{who} does not wait"))?;
            let fence = self.arrives(at).await?;
            if last.is_some_and(|last| fence <= last) {
                return Err(format!("{who} was granted its lock too early"));
            }
            last = Some(fence);
        }
        self.sent.iter().filter(|sent| sent.state == State::Waits).try_for_each(|sent| self.still_waits(sent))
    }
}
