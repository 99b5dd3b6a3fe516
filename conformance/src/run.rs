//! How a case is run: what each step is, and what has to come of it, over a trait for what is asked.
//!
//! The runner knows who asked for what and what became of it as far as it was told; a target knows how a thing is done.
//! So a target names no outcome that it was not given, and no rule of the cases is known twice.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use crate::case::{Case, Expect, Feature, Mode, Op, Reentrant, Step};
use crate::need::{Aspect, Need, Profile};

/// The number of an ask in its case, from 0.
pub type AskId = usize;

/// A lock that somebody asks for.
#[derive(Debug)]
pub struct Ask<'a> {
    /// Its number.
    pub id: AskId,
    /// Who asks.
    pub owner: &'a str,
    /// For which lock.
    pub lock: &'a str,
    /// In which mode.
    pub mode: Mode,
    /// How long it may wait, where the case says so.
    pub wait_ms: Option<u64>,
    /// How long it holds without a renewal, where the case says so.
    pub ttl_ms: Option<u64>,
    /// Whether a second lock of its owner is one more.
    pub reentrant: bool,
    /// The ask whose lease this one asks for again, where that is not one more and the target knows the difference.
    pub again: Option<AskId>,
    /// What is right, that of strict FIFO first. A target that cannot look into the table waits for one of these.
    pub allowed: &'a [Expect],
    /// Whether a later step says that its wait runs out: for a target whose clock cannot jump.
    pub times_out: bool,
    /// Whether a later step says that its lease ends by its time: likewise.
    pub lapses: bool,
}

/// What came of an ask.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It has the lock.
    Granted,
    /// It stands in the queue.
    Waits,
    /// It would have closed this cycle: owners from the one who asked round to itself.
    Deadlock(Vec<String>),
    /// It is out of order.
    Order,
    /// It did not get the lock in time, which took so many milliseconds.
    Timeout(u64),
}

impl Outcome {
    fn word(&self) -> Expect {
        match self {
            Outcome::Granted => Expect::Granted,
            Outcome::Waits => Expect::Waits,
            Outcome::Deadlock(_) => Expect::RejectedDeadlock,
            Outcome::Order => Expect::RejectedOrder,
            Outcome::Timeout(_) => Expect::Timeout,
        }
    }
}

/// What ends because time passes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// Leases, in order.
    pub expired: Vec<AskId>,
    /// Waits, in order.
    pub timed_out: Vec<AskId>,
}

/// What somebody shows at the gate of what a lock guards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Nothing but its name.
    Nothing,
    /// The lease that it got for this ask, in force or not.
    Lease(AskId),
    /// That lease, falsified.
    Forged(AskId),
}

/// Why a step came out otherwise than it must.
pub type Wrong = String;

fn cannot<T>(what: &str) -> Result<T, Wrong> {
    Err(format!("this target cannot {what}, and its profile has to say so"))
}

/// What a case is run against: one lock manager with nothing in it, for one case.
///
/// Futures are awaited one at a time. A target that never waits can be run by [`now`].
#[allow(async_fn_in_trait, reason = "nobody needs them to be Send")]
pub trait Target {
    /// Asks for a lock.
    async fn acquire(&mut self, ask: &Ask<'_>) -> Result<Outcome, Wrong>;

    /// Gives back what this ask got; false where it had ended before.
    async fn release(&mut self, id: AskId) -> Result<bool, Wrong>;

    /// Lets an owner give back a lock that it has no lease of (`once`: the last one that it had); true where something was
    /// freed by it.
    async fn release_nothing(&mut self, owner: &str, lock: &str, once: Option<AskId>) -> Result<bool, Wrong>;

    /// Closes a waiting ask.
    async fn cancel(&mut self, id: AskId) -> Result<(), Wrong>;

    /// The owner is gone, with these waiting asks.
    async fn crash(&mut self, owner: &str, waiting: &[AskId]) -> Result<(), Wrong>;

    /// Lets so much time pass, and says what ended by it. `due` is what should have: a target whose clock cannot jump waits
    /// for that.
    async fn advance(&mut self, ms: u64, due: &Due) -> Result<Due, Wrong>;

    /// Lets the TTL of a lease lapse that nobody renews.
    async fn expire(&mut self, id: AskId) -> Result<(), Wrong> {
        cannot(&format!("let the lease of ask {id} lapse"))
    }

    /// Renews a lease; false where it is lost.
    async fn renew(&mut self, id: AskId, ttl_ms: Option<u64>) -> Result<bool, Wrong> {
        cannot(&format!("renew ask {id} for {ttl_ms:?}"))
    }

    /// Frees a lock, whoever holds it.
    async fn break_glass(&mut self, lock: &str) -> Result<(), Wrong> {
        cannot(&format!("break {lock}"))
    }

    /// Whether the owner may pass where the lock has to be held in this mode.
    async fn access(&mut self, owner: &str, lock: &str, mode: Mode, claim: Claim) -> Result<bool, Wrong> {
        cannot(&format!("let {owner} through to {lock} in {mode:?} with {claim:?}"))
    }

    /// Brings in another configuration of the same locks.
    async fn reload(&mut self) -> Result<(), Wrong> {
        cannot("be configured anew")
    }

    /// Makes sure that an ask without a name is an error, and no lock.
    async fn refuses_no_name(&mut self) -> Result<(), Wrong>;

    /// The waiting asks that have been granted since this was last asked, in order. A target that has to wait to see a
    /// grant waits for so many.
    async fn granted(&mut self, count: usize) -> Result<Vec<AskId>, Wrong>;

    /// Ends what the case left over, and makes sure that nothing stays.
    async fn finish(&mut self) -> Result<(), Wrong>;
}

/// Runs a future that never waits.
///
/// # Panics
/// When it does.
pub fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("a target that waits cannot be run at once"),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waits,
    Holds,
    /// Its lease has ended, which its owner may not know.
    Ended,
    /// It was given back.
    Over,
    /// It was refused, or went away before it got anything.
    Never,
}

/// An ask as far as the runner knows.
struct Known<'a> {
    owner: &'a str,
    lock: &'a str,
    state: State,
}

struct Run<'a, T> {
    case: &'a Case,
    profile: &'a Profile,
    target: &'a mut T,
    asks: Vec<Known<'a>>,
}

/// Runs a case on a target that is empty.
///
/// # Errors
/// The first step that came out otherwise than it must, and how.
pub async fn run<T: Target>(case: &Case, profile: &Profile, target: &mut T) -> Result<(), Wrong> {
    let mut run = Run { case, profile, target, asks: Vec::new() };
    for (at, step) in case.steps.iter().enumerate() {
        let beside = async {
            if at != 1 {
                return Ok(());
            }
            if case.is_about(Feature::ConfigReload) && (profile.shows)(Aspect::Reload) {
                run.target.reload().await?;
            }
            if case.is_about(Feature::BadInput) { run.target.refuses_no_name().await } else { Ok(()) }
        };
        beside.await?;
        run.step(at, step).await.map_err(|what| format!("step {at} {step:?}: {what}"))?;
    }
    run.target.finish().await.map_err(|what| format!("in the end: {what}"))
}

impl<'a, T: Target> Run<'a, T> {
    async fn step(&mut self, at: usize, step: &'a Step) -> Result<(), Wrong> {
        let mut wakes: Vec<&str> = step.wakes.iter().map(String::as_str).collect();
        let outcome = match step.op {
            Op::Acquire => self.acquire(at, step, &step.allowed()).await?.word(),
            Op::Release => self.release(step).await?,
            Op::Renew => self.renew(step).await?,
            Op::Access => self.access(step).await?,
            Op::Downgrade => {
                let strong = self.latest(step, State::Holds).ok_or("nothing to downgrade")?;
                self.expect_granted(at, step).await?;
                self.asks[strong].state = State::Over;
                if !self.target.release(strong).await? {
                    return Err("the stronger lease had ended".into());
                }
                Expect::Ok
            }
            Op::Cancel => {
                let id = self.latest(step, State::Waits).ok_or("nothing to cancel")?;
                self.asks[id].state = State::Never;
                self.target.cancel(id).await?;
                Expect::Ok
            }
            Op::Crash => {
                wakes.extend(self.crash(at, step).await?);
                Expect::Ok
            }
            Op::Expire => {
                let id = self.latest(step, State::Holds);
                match id.or_else(|| self.latest(step, State::Ended)).ok_or("nothing to expire")? {
                    // It ended with its client, and so did the wait of those whom this step wakes.
                    _ if id.is_none() && self.profile.crash_frees => wakes.clear(),
                    id => {
                        self.target.expire(id).await?;
                        self.asks[id].state = State::Ended;
                    }
                }
                Expect::Ok
            }
            Op::AdminRelease => {
                self.target.break_glass(&step.lock).await?;
                let on_it = |ask: &&mut Known<'_>| ask.lock == step.lock && ask.state == State::Holds;
                self.asks.iter_mut().filter(on_it).for_each(|ask| ask.state = State::Ended);
                Expect::Ok
            }
            Op::Advance => {
                self.advance(step).await?;
                Expect::Ok
            }
        };
        let allowed = step.allowed();
        if !allowed.is_empty() && !allowed.contains(&outcome) {
            return Err(format!("{outcome:?}"));
        }
        self.woken(&wakes).await
    }

    /// The latest ask of the step's owner for its lock (any lock where it names none) in this state.
    fn latest(&self, step: &Step, state: State) -> Option<AskId> {
        let is_it = |ask: &Known<'_>| {
            ask.owner == step.owner && (step.lock.is_empty() || ask.lock == step.lock) && ask.state == state
        };
        self.asks.iter().rposition(is_it)
    }

    async fn acquire(&mut self, at: usize, step: &'a Step, allowed: &[Expect]) -> Result<Outcome, Wrong> {
        let later = &self.case.steps[at + 1..];
        let idempotent = self.case.options.reentrant == Reentrant::Idempotent
            && (self.profile.lacks)(Need::IdempotentReentry).is_none();
        let ask = Ask {
            id: self.asks.len(),
            owner: &step.owner,
            lock: &step.lock,
            mode: step.mode.ok_or("an acquire without a mode")?,
            wait_ms: step.wait_ms,
            ttl_ms: step.ttl_ms,
            reentrant: self.case.options.reentrant != Reentrant::Reject,
            again: if idempotent { self.latest(step, State::Holds) } else { None },
            allowed,
            times_out: allowed.first() == Some(&Expect::Waits)
                && later.iter().any(|later| later.timed_out.contains(&step.owner)),
            lapses: later.iter().any(|it| {
                let expires = it.op == Op::Expire && it.owner == step.owner && it.lock == step.lock;
                it.expired.contains(&(step.owner.clone(), step.lock.clone())) || (expires && !self.profile.crash_frees)
            }),
        };
        let outcome = self.target.acquire(&ask).await?;
        if let (Some(same), Outcome::Granted) = (ask.again, &outcome) {
            // It is the same lease, which one release gives back.
            self.asks[same].state = State::Over;
        }
        let state = match &outcome {
            Outcome::Granted => State::Holds,
            Outcome::Waits => State::Waits,
            Outcome::Deadlock(cycle) => {
                if cycle.first() != Some(&step.owner) || cycle.last() != Some(&step.owner) || cycle.len() < 2 {
                    return Err(format!("{cycle:?} is no cycle of {}", step.owner));
                }
                if step.cycle.as_ref().is_some_and(|told| told != cycle) {
                    return Err(format!("names the cycle {cycle:?}"));
                }
                State::Never
            }
            Outcome::Order => State::Never,
            Outcome::Timeout(ms) => {
                let [low, high] = step.elapsed_ms.unwrap_or([step.wait_ms.unwrap_or(0), u64::MAX]);
                // How much later it may be depends on the machine, where the clock is the machine's.
                if *ms < low || (*ms > high && self.profile.virtual_clock) {
                    return Err(format!("gave up after {ms} ms"));
                }
                State::Never
            }
        };
        self.asks.push(Known { owner: &step.owner, lock: &step.lock, state });
        Ok(outcome)
    }

    async fn expect_granted(&mut self, at: usize, step: &'a Step) -> Result<(), Wrong> {
        match self.acquire(at, step, &[Expect::Granted]).await? {
            Outcome::Granted => Ok(()),
            other => Err(format!("the weaker mode: {other:?}")),
        }
    }

    async fn release(&mut self, step: &Step) -> Result<Expect, Wrong> {
        let mut outcome = Expect::ErrorNotHolder;
        loop {
            let held = self.latest(step, State::Holds).filter(|_| !step.stale);
            // One that has ended is given back too, by a client that does not know or pretends not to.
            let Some(id) = held.or_else(|| self.latest(step, State::Ended)) else { break };
            self.asks[id].state = State::Over;
            let released = self.target.release(id).await?;
            if released {
                outcome = Expect::Ok;
            }
            if released != held.is_some() {
                return Err(format!("released: {released}, and the lease was held: {}", held.is_some()));
            }
            if !step.all {
                return Ok(outcome);
            }
        }
        if outcome == Expect::ErrorNotHolder {
            let once = self.latest(step, State::Over);
            if self.target.release_nothing(&step.owner, &step.lock, once).await? {
                return Ok(Expect::Ok);
            }
        }
        Ok(outcome)
    }

    async fn renew(&mut self, step: &Step) -> Result<Expect, Wrong> {
        let held = self.latest(step, State::Holds).filter(|_| !step.stale);
        let known = held.or_else(|| self.latest(step, State::Ended)).or_else(|| self.latest(step, State::Over));
        // Who never had a lease has nothing to renew.
        let Some(id) = known else { return Ok(Expect::ErrorNotHolder) };
        Ok(if self.target.renew(id, step.ttl_ms).await? { Expect::Ok } else { Expect::ErrorNotHolder })
    }

    async fn access(&mut self, step: &Step) -> Result<Expect, Wrong> {
        let mode = step.mode.ok_or("an access without a mode")?;
        let held = self.latest(step, State::Holds);
        let ended = self.latest(step, State::Ended).or_else(|| self.latest(step, State::Over));
        let claim = match (held, ended) {
            (Some(id), _) if step.stale => Claim::Forged(id),
            (Some(id), _) | (None, Some(id)) => Claim::Lease(id),
            (None, None) => Claim::Nothing,
        };
        let passes = self.target.access(&step.owner, &step.lock, mode, claim).await?;
        Ok(if passes { Expect::Allowed } else { Expect::Denied })
    }

    /// Who is granted because what the owner held is free at once: those whom the case wakes when it expires.
    async fn crash(&mut self, at: usize, step: &'a Step) -> Result<Vec<&'a str>, Wrong> {
        let of = |state: State| {
            let all = self.asks.iter().enumerate();
            all.filter(|(_, ask)| ask.owner == step.owner && ask.state == state).map(|(id, _)| id).collect::<Vec<_>>()
        };
        let (waiting, holding) = (of(State::Waits), of(State::Holds));
        self.target.crash(&step.owner, &waiting).await?;
        waiting.iter().for_each(|id| self.asks[*id].state = State::Never);
        if !self.profile.crash_frees {
            return Ok(Vec::new());
        }
        holding.iter().for_each(|id| self.asks[*id].state = State::Ended);
        let later = &self.case.steps[at + 1..];
        let expires = later.iter().filter(|later| later.op == Op::Expire && later.owner == step.owner);
        Ok(expires.flat_map(|later| later.wakes.iter().map(String::as_str)).collect())
    }

    async fn advance(&mut self, step: &Step) -> Result<(), Wrong> {
        let find = |owner: &str, lock: Option<&str>, state: State| {
            let is_it =
                |ask: &Known<'_>| ask.owner == owner && ask.state == state && lock.is_none_or(|lock| lock == ask.lock);
            self.asks.iter().rposition(is_it).ok_or_else(|| format!("{owner} has nothing that could end"))
        };
        let due = Due {
            expired: step
                .expired
                .iter()
                .map(|(owner, lock)| find(owner, Some(lock), State::Holds))
                .collect::<Result<_, _>>()?,
            timed_out: step.timed_out.iter().map(|owner| find(owner, None, State::Waits)).collect::<Result<_, _>>()?,
        };
        let ended = self.target.advance(step.ms.ok_or("no time to pass")?, &due).await?;
        if ended != due {
            return Err(format!("{ended:?} instead of {due:?}"));
        }
        due.expired.iter().for_each(|id| self.asks[*id].state = State::Ended);
        due.timed_out.iter().for_each(|id| self.asks[*id].state = State::Never);
        Ok(())
    }

    /// Those whom the step wakes are granted, in this order, and nobody else.
    async fn woken(&mut self, wakes: &[&str]) -> Result<(), Wrong> {
        let granted = self.target.granted(wakes.len()).await?;
        let owners: Vec<&str> = granted.iter().map(|id| self.asks[*id].owner).collect();
        if owners != wakes {
            return Err(format!("woke {owners:?}"));
        }
        for id in granted {
            let ask = &mut self.asks[id];
            if ask.state != State::Waits {
                return Err(format!("{} is granted what it no longer waits for", ask.owner));
            }
            ask.state = State::Holds;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cases, need};

    /// Gives everything to everyone at once, and takes everything back.
    struct Generous;

    impl Target for Generous {
        async fn acquire(&mut self, _: &Ask<'_>) -> Result<Outcome, Wrong> {
            Ok(Outcome::Granted)
        }

        async fn release(&mut self, _: AskId) -> Result<bool, Wrong> {
            Ok(true)
        }

        async fn release_nothing(&mut self, _: &str, _: &str, _: Option<AskId>) -> Result<bool, Wrong> {
            Ok(true)
        }

        async fn cancel(&mut self, _: AskId) -> Result<(), Wrong> {
            Ok(())
        }

        async fn crash(&mut self, _: &str, _: &[AskId]) -> Result<(), Wrong> {
            Ok(())
        }

        async fn advance(&mut self, _: u64, _: &Due) -> Result<Due, Wrong> {
            Ok(Due::default())
        }

        async fn refuses_no_name(&mut self) -> Result<(), Wrong> {
            Ok(())
        }

        async fn granted(&mut self, _: usize) -> Result<Vec<AskId>, Wrong> {
            Ok(Vec::new())
        }

        async fn finish(&mut self) -> Result<(), Wrong> {
            Ok(())
        }
    }

    #[test]
    fn who_gives_everything_to_everyone_passes_only_where_nobody_is_in_the_way() {
        let lacks = |need: Need| need::beyond_the_contract(need);
        let profile = Profile { name: "generous", lacks, shows: |_| false, crash_frees: false, virtual_clock: true };
        for case in cases().iter().filter(|case| need::skip(case, &profile).is_none()) {
            let plain = |step: &Step| match step.op {
                Op::Acquire => step.allowed().contains(&Expect::Granted),
                Op::Release => step.expect == Some(Expect::Ok),
                Op::Advance => step.expired.is_empty() && step.timed_out.is_empty(),
                Op::Crash | Op::Downgrade => true,
                Op::Renew | Op::Expire | Op::Cancel | Op::AdminRelease | Op::Access => false,
            };
            let passes = now(run(case, &profile, &mut Generous)).is_ok();
            assert_eq!(passes, case.steps.iter().all(|step| plain(step) && step.wakes.is_empty()), "{}", case.name);
        }
    }
}
