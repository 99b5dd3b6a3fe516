//! What a caller makes of its answer: whether it may be so, and how the request ended for the ledger.
//!
//! What a refusal must look like is [`super::answer`]'s.

use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use interlock_testkit::Answer;
use serde_json::Value;

use super::answer::{self, Status};
use super::drive::{LATE, Shared};
use super::lag::Lag;
use super::ledger::Verdict;
use super::load::{Call, Ending, Expect, Locks, Wire};
use super::policy::{HASTY, INSTANCE, PATIENT};

/// How much sooner than its time something may seem to end: clocks are read at different places.
const EARLY: Duration = Duration::from_millis(20);

/// How often a lease is renewed within its TTL.
const BEATS: u32 = 3;

/// How often a late machine may make a request late where a whole queue goes before it: all waiters that a lock may have,
/// each there and back.
const LATE_IN_QUEUE: u32 = 2 * LATE * 8;

/// What is certain of a request's end, where the machine may have been so late that its worker did not renew the lease in
/// time. Then the lock was held for one TTL, and may have gone to the next after that: the lease lapsed, and what protects
/// a resource is the fence alone.
pub fn certain(verdict: Verdict, call: &Call, sent: Instant, now: Instant, lag: &Lag) -> (Verdict, bool) {
    let Expect::Locks(locks) = &call.expect else { return (verdict, false) };
    if lag.slowest(sent, now) < locks.ttl / BEATS {
        return (verdict, false);
    }
    let lapsed = sent + locks.ttl;
    match verdict {
        Verdict::Upstream => (Verdict::Cut(lapsed), true),
        Verdict::Cut(at_least) => (Verdict::Cut(at_least.min(lapsed)), true),
        Verdict::Refused => (verdict, false),
    }
}

/// One answer, and all that is needed to judge it.
pub struct Judge<'a> {
    pub call: &'a Call,
    /// Who asked.
    pub owner: &'a str,
    pub sent: Instant,
    /// From then to the end.
    pub took: Duration,
    pub shared: MutexGuard<'a, Shared>,
    /// What is wrong with it.
    pub wrong: Vec<String>,
}

impl Judge<'_> {
    /// Judges it.
    pub fn verdict(&mut self, result: &anyhow::Result<Answer>) -> Verdict {
        let Ok(answer) = result else { return self.broken() };
        let status = answer::lock_status(answer, INSTANCE).unwrap_or_else(|what| {
            self.wrong.push(what);
            None
        });
        match status {
            Some(Status::Refused(slug)) => self.refused(answer, &slug),
            Some(Status::Acquired(seconds)) => {
                match &self.call.expect {
                    Expect::Locks(locks) => {
                        let (wait, sooner_than) = (locks.wait, locks.sooner_than);
                        let waited = Duration::from_secs_f64(seconds.max(0.0));
                        if !self.allows(waited.saturating_sub(wait), LATE) || waited > self.took + EARLY {
                            self.wrong.push(format!("it says it waited {waited:?}, of {wait:?}"));
                        }
                        // The slack is in what the queue is given.
                        if waited > sooner_than && !self.allows(waited, LATE_IN_QUEUE) {
                            self.wrong.push(format!("it waited {waited:?} in a queue that moves on all the time"));
                        }
                        self.shared.numbers.granted(waited);
                    }
                    other => self.wrong.push(format!("acquired, where {other:?} was expected")),
                }
                if !answer.header("server-timing").is_some_and(|timing| timing.contains("lock;dur=")) {
                    self.wrong.push(format!("server-timing is {:?}", answer.header("server-timing")));
                }
                self.passed(answer)
            }
            None => {
                match &self.call.expect {
                    Expect::Nothing => self.shared.numbers.unannotated += 1,
                    other => self.wrong.push(format!("no lock-status, where {other:?} was expected")),
                }
                self.passed(answer)
            }
        }
    }

    /// How long its route gives the upstream.
    fn limit(&self) -> Duration {
        if self.call.path.starts_with("/hasty") { HASTY } else { PATIENT }
    }

    /// An answer to a request that was let through: the upstream's, or Envoy's in its stead.
    fn passed(&mut self, answer: &Answer) -> Verdict {
        let limit = self.limit();
        match (answer.status, answer.header("x-soak-fence")) {
            (200, Some(fences)) => {
                let same = |told: &str| {
                    let (told, seen) = (answer::lock_fence(told), answer::lock_fence(&fences));
                    told.is_ok() && told == seen
                };
                if !fences.is_empty() && !same(&answer.joined("lock-fence")) {
                    self.wrong.push("caller and upstream were told different fences".to_owned());
                }
                Verdict::Upstream
            }
            // A reset of HTTP/2 may overtake the head that was on its way before it.
            (503, None) if matches!(self.call.ending, Ending::BreakBefore | Ending::BreakAfter) => {
                self.shared.numbers.broken_before += 1;
                Verdict::Upstream
            }
            (504, None) if self.took + EARLY >= limit => {
                self.shared.numbers.route_timeouts += 1;
                Verdict::Cut(self.sent + limit.saturating_sub(EARLY))
            }
            (status, _) => {
                self.wrong.push(format!("status {status} that nothing provoked"));
                Verdict::Cut(self.sent)
            }
        }
    }

    fn refused(&mut self, answer: &Answer, slug: &str) -> Verdict {
        self.wrong.extend(answer::refusal(answer, slug, self.owner, self.call.wire == Wire::Grpc));
        self.shared.numbers.refused(slug, self.took);
        let locks = match &self.call.expect {
            Expect::Locks(locks) => locks,
            Expect::Refused(expected) => {
                if *expected != slug {
                    self.wrong.push(format!("refused as {slug}, where {expected} was expected"));
                }
                return Verdict::Refused;
            }
            Expect::Nothing => {
                self.wrong.push(format!("refused as {slug}, and it had asked for nothing"));
                return Verdict::Refused;
            }
        };
        if slug == "lease-lost" {
            return self.lost(locks, false);
        }
        let (took, wait) = (self.took, locks.wait);
        if !self.allows(took.saturating_sub(wait), LATE) {
            self.wrong.push(format!("it may wait {:?} and was answered after {:?}", locks.wait, self.took));
        }
        let possible = match slug {
            "wait-timeout" => {
                let in_vain = wait < locks.sooner_than || self.allows(wait, LATE_IN_QUEUE);
                !wait.is_zero() && took + EARLY >= wait && in_vain
            }
            "lock-held" => locks.wait.is_zero(),
            "deadlock" => locks.may_deadlock && !locks.wait.is_zero(),
            "order-violation" => locks.may_violate,
            "too-many-waiters" => !locks.wait.is_zero(),
            _ => false,
        };
        if !possible {
            self.wrong.push(format!("it can't have met {slug}"));
        }
        if slug == "deadlock" {
            self.cycle(answer);
        }
        Verdict::Refused
    }

    /// Whether the machine may have made this as late.
    fn allows(&mut self, late: Duration, times: u32) -> bool {
        self.shared.lag.allows(late, times, self.sent, self.sent + self.took)
    }

    /// Whether the cycle can have been there: everyone in it was about, and asks for these locks.
    fn cycle(&mut self, answer: &Answer) {
        let problem = serde_json::from_slice::<Value>(&answer.body).unwrap_or_default();
        for (owner, lock, holder) in answer::edges(&problem).unwrap_or_default() {
            for who in [owner, holder] {
                let Shared { owners, lag, .. } = &mut *self.shared;
                let now = self.sent + self.took;
                let known = owners.get(&who).filter(|owner| owner.locks.contains(&lock));
                // One that has left may be seen for as long as Envoy does not know.
                let gone = |ended: Instant| self.sent.saturating_duration_since(ended);
                let about =
                    known.is_some_and(|o| o.ended.is_none_or(|ended| lag.allows(gone(ended), LATE, ended, now)));
                if !about {
                    self.wrong.push(format!("a phantom in the cycle: {who} has no business with {lock}"));
                }
            }
        }
    }

    /// Whether the machine may have been too late to renew its lease.
    fn may_have_lapsed(&self, locks: &Locks) -> bool {
        let late = self.shared.lag.slowest(self.sent, self.sent + self.took);
        self.took + EARLY >= locks.ttl && late >= locks.ttl / BEATS
    }

    /// No whole answer came.
    fn broken(&mut self) -> Verdict {
        match (&self.call.expect, self.call.ending) {
            (_, Ending::BreakAfter) => {
                self.shared.numbers.broken_after += 1;
                Verdict::Upstream
            }
            (Expect::Locks(locks), _) if self.took + EARLY >= locks.hold || self.may_have_lapsed(locks) => {
                self.lost(locks, true)
            }
            _ if self.took + EARLY >= self.limit() => {
                self.shared.numbers.route_timeouts += 1;
                Verdict::Cut(self.sent + self.limit().saturating_sub(EARLY))
            }
            _ => {
                self.wrong.push("cut off, and nothing provoked it".to_owned());
                Verdict::Cut(self.sent)
            }
        }
    }

    /// Its lease was lost while it was upstream: before the response had begun, or after.
    fn lost(&mut self, locks: &Locks, begun: bool) -> Verdict {
        let numbers = &mut self.shared.numbers;
        if self.took + EARLY >= locks.hold {
            *(if begun { &mut numbers.lost_after } else { &mut numbers.lost_before }) += 1;
            Verdict::Cut(self.sent + locks.hold.saturating_sub(EARLY))
        } else {
            // Not by the hold limit: nobody renewed it, which a worker does several times within a TTL.
            numbers.expired += 1;
            if !self.may_have_lapsed(locks) {
                self.wrong.push("lost before its time, on a machine that was not late".to_owned());
            }
            Verdict::Cut(self.sent)
        }
    }
}
