//! What all callers write down: the gate, who waits for whom, what was counted, and what was wrong.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use interlock_testkit::Answer;

use super::gate::Gate;
use super::waits::Waits;
use crate::soak::answer;
use crate::soak::ledger::{Mode, Violations};

/// How much later than its deadline an answer may be where nothing is wrong, on a machine that does other things too.
pub const SLACK: Duration = Duration::from_secs(2);

/// The book.
#[derive(Default)]
pub struct Book(Mutex<Pages>);

/// What is in it.
#[derive(Default)]
pub struct Pages {
    pub gate: Gate,
    pub waits: Waits,
    pub numbers: Numbers,
    pub wrong: Violations,
}

/// What callers counted.
pub struct Numbers {
    /// Granted, and among them those that had waited.
    pub grants: u64,
    pub hand_overs: u64,
    /// Refusals by slug.
    pub refusals: BTreeMap<String, u64>,
    /// Cycles that were found to have been there.
    pub cycles: u64,
    /// Tries that the authority could not serve, that nobody answered, and requests that were given up in the end.
    pub unavailable: u64,
    pub unanswered: u64,
    pub given_up: u64,
    /// Leases that ended under their holders.
    pub lost: u64,
    /// Holders that slept over the end of their lease and wrote, and those of them that were stopped.
    pub slept: u64,
    pub stale_stopped: u64,
    /// How long grants had waited, in microseconds.
    pub waits: Histogram<u64>,
}

impl Default for Numbers {
    fn default() -> Self {
        // A minute at three digits is well within what a histogram takes.
        let waits = Histogram::new_with_max(60_000_000, 3).unwrap_or_else(|e| unreachable!("{e}"));
        Numbers {
            grants: 0,
            hand_overs: 0,
            refusals: BTreeMap::new(),
            cycles: 0,
            unavailable: 0,
            unanswered: 0,
            given_up: 0,
            lost: 0,
            slept: 0,
            stale_stopped: 0,
            waits,
        }
    }
}

impl Numbers {
    /// A grant that had waited for so long.
    pub fn granted(&mut self, waited: Duration) {
        self.grants += 1;
        self.hand_overs += u64::from(waited >= Duration::from_millis(1));
        self.waits.saturating_record(u64::try_from(waited.as_micros()).unwrap_or(u64::MAX));
    }
}

impl Pages {
    /// A request is about to be sent.
    pub fn asked(&mut self, owner: &str, locks: &[(String, Mode)]) -> u64 {
        self.waits.asked(owner, locks, Instant::now())
    }
}

impl Book {
    /// Opens it.
    pub fn lock(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Judges a refusal of claim `claim`, counts it, and gives back its slug. A claim that is refused is over, but for a lease
    /// that was lost.
    pub fn refused(&self, answer: &Answer, owner: &str, claim: u64, now: Instant) -> String {
        let problem = serde_json::from_slice::<serde_json::Value>(&answer.body).unwrap_or_default();
        let slug = problem["type"].as_str().unwrap_or_default().replace("urn:interlock:problem:", "");
        let mut book = self.lock();
        *book.numbers.refusals.entry(slug.clone()).or_default() += 1;
        match slug.as_str() {
            "deadlock" => {
                let mut wrong = answer::refusal(answer, &slug, owner, false);
                match answer::edges(&problem) {
                    Some(edges) => match book.waits.check(&edges, claim, now) {
                        Ok(()) => book.numbers.cycles += 1,
                        Err(what) => wrong.push(format!("a phantom of a cycle: {what}: {}", problem["cycle"])),
                    },
                    None => wrong.push(format!("a deadlock without a cycle: {}", answer.text())),
                }
                wrong.into_iter().for_each(|what| book.wrong.push(what));
            }
            "wait-timeout" | "backend-unavailable" => {
                let wrong = answer::refusal(answer, &slug, owner, false);
                wrong.into_iter().for_each(|what| book.wrong.push(what));
            }
            "lease-lost" => return slug,
            _ => book.wrong.push(format!("{owner} can't have met this: {} {}", answer.status, answer.text())),
        }
        book.waits.over(claim, now);
        slug
    }
}

/// As the contract spells it.
pub fn mode_name(mode: Mode) -> &'static str {
    if mode == Mode::Shared { "shared" } else { "exclusive" }
}
