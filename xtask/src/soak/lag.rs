//! How late the machine itself is: requests that ask for no locks go the same way as all others, all the time, and say
//! what a loaded machine adds to everything. Without them a check of deadlines finds the machine's faults.
//!
//! Knows nothing of Interlock.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// How much later than its deadline something may be, on a machine that is not late itself.
pub const SLACK: Duration = Duration::from_secs(1);

/// For how long probes are remembered: longer than any request takes.
const MEMORY: Duration = Duration::from_secs(60);

/// What the probes found.
#[derive(Debug)]
pub struct Lag {
    done: VecDeque<(Instant, Duration)>,
    open: HashMap<usize, Instant>,
    all: Histogram<u64>,
    /// Checks that passed only because the machine was late.
    pub excused: u64,
}

impl Default for Lag {
    fn default() -> Self {
        let all = Histogram::new_with_max(60_000_000, 3).unwrap_or_else(|e| unreachable!("{e}"));
        Lag { done: VecDeque::new(), open: HashMap::new(), all, excused: 0 }
    }
}

impl Lag {
    /// Probe number `probe` sets out.
    pub fn sent(&mut self, probe: usize, now: Instant) {
        self.open.insert(probe, now);
    }

    /// It is back.
    pub fn back(&mut self, probe: usize, now: Instant) {
        let Some(sent) = self.open.remove(&probe) else { return };
        self.all.saturating_record(u64::try_from((now - sent).as_micros()).unwrap_or(u64::MAX));
        self.done.push_back((now, now - sent));
        while self.done.front().is_some_and(|(back, _)| *back + MEMORY < now) {
            self.done.pop_front();
        }
    }

    /// Whether something is `late` by no more than the machine may make it: [`SLACK`], and `times` as much as the slowest
    /// probe took that was on its way since `since`.
    pub fn allows(&mut self, late: Duration, times: u32, since: Instant, now: Instant) -> bool {
        if late <= SLACK {
            return true;
        }
        let allowed = late <= SLACK + self.slowest(since, now) * times;
        self.excused += u64::from(allowed);
        allowed
    }

    /// How long the slowest probe took that was on its way since `since`.
    pub fn slowest(&self, since: Instant, now: Instant) -> Duration {
        let done = self.done.iter().rev().filter(|(back, _)| *back >= since).map(|(_, took)| *took);
        let open = self.open.values().map(|sent| now.saturating_duration_since(*sent));
        done.chain(open).max().unwrap_or_default()
    }

    /// How long the probes took, in microseconds: the share `quantile` of them no longer than this.
    pub fn quantile(&self, quantile: f64) -> u64 {
        self.all.value_at_quantile(quantile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_late_machine_excuses() {
        let zero = Instant::now();
        let at = |ms: u64| zero + Duration::from_millis(ms);
        let mut lag = Lag::default();
        let late = Duration::from_millis(1500);
        assert!(lag.allows(SLACK, 3, at(0), at(10)) && !lag.allows(late, 3, at(0), at(10)));
        lag.sent(0, at(0));
        lag.back(0, at(300));
        assert!(lag.allows(late, 3, at(200), at(2000)), "a probe took 300 ms meanwhile");
        assert!(!lag.allows(late, 3, at(400), at(2000)), "that was before");
        lag.sent(0, at(1000));
        assert!(lag.allows(late, 3, at(1100), at(1200)), "one has been on its way for 200 ms");
        assert_eq!(lag.excused, 2);
    }
}
