//! What an act counts.

use std::collections::BTreeMap;
use std::time::Duration;

use bank::client::{Attempt, Edge, Outcome};
use bank::event::Event;
use hdrhistogram::Histogram;

use super::bank::What;

/// In microseconds: no wait is longer.
const HOUR: u64 = 3_600_000_000;

/// The count of one act.
pub struct Tally {
    /// Transfers asked for.
    pub requests: usize,
    /// Requests sent for them.
    pub tries: usize,
    /// Transfers completed.
    pub completed: usize,
    /// Tries refused, by reason.
    pub refused: BTreeMap<String, usize>,
    /// Tries that nobody answered in time.
    pub timed_out: usize,
    /// How often a transfer was blocked by a lock inside a service.
    pub blocked: usize,
    /// From the first request to the last answer.
    pub time: Duration,
    /// How the last transfer ended.
    pub last: Option<Outcome>,
    /// What should never be, in words.
    pub surprises: Vec<String>,
    /// Time in the proxies' queues, a try, in microseconds.
    waits: Histogram<u64>,
}

impl Tally {
    /// For so many transfers.
    pub fn new(requests: usize) -> Self {
        Tally {
            requests,
            tries: 0,
            completed: 0,
            refused: BTreeMap::new(),
            timed_out: 0,
            blocked: 0,
            time: Duration::ZERO,
            last: None,
            surprises: Vec::new(),
            waits: Histogram::new_with_bounds(1, HOUR, 3).expect("these are bounds and a precision that there are"),
        }
    }

    /// One more thing that happened.
    pub fn count(&mut self, what: What) {
        match what {
            What::Service(Event::Blocked { .. }) => self.blocked += 1,
            What::Service(_) => {}
            What::Tried(_, _, attempt) => self.tried(&attempt),
            What::Over(attempt) => {
                self.completed += usize::from(attempt.outcome == Outcome::Completed);
                self.last = Some(attempt.outcome);
            }
        }
    }

    fn tried(&mut self, attempt: &Attempt) {
        self.tries += 1;
        if !attempt.lock_status.is_empty() {
            self.waits.saturating_record(u64::try_from(attempt.waited.as_micros()).unwrap_or(u64::MAX));
        }
        match &attempt.outcome {
            Outcome::Completed => {}
            Outcome::TimedOut => self.timed_out += 1,
            Outcome::Failed { what } => self.surprises.push(what.clone()),
            Outcome::Refused { problem, body, .. } => {
                *self.refused.entry(problem.slug().to_owned()).or_default() += 1;
                if problem.slug() == "deadlock" && !closes(&problem.cycle) {
                    self.surprises.push(format!("a deadlock whose cycle does not close on itself: {body}"));
                }
            }
        }
    }

    /// How many tries were refused for this reason.
    pub fn refusals(&self, slug: &str) -> usize {
        self.refused.get(slug).copied().unwrap_or_default()
    }

    /// The wait that so many of a hundred tries did not exceed; none where no try went through a queue's filter.
    pub fn wait(&self, percentile: f64) -> Option<Duration> {
        (!self.waits.is_empty()).then(|| Duration::from_micros(self.waits.value_at_quantile(percentile / 100.0)))
    }

    /// Adds what another run counted.
    pub fn add(&mut self, other: Tally) {
        self.requests += other.requests;
        self.tries += other.tries;
        self.completed += other.completed;
        for (slug, count) in other.refused {
            *self.refused.entry(slug).or_default() += count;
        }
        self.timed_out += other.timed_out;
        self.blocked += other.blocked;
        self.time += other.time;
        self.last = other.last;
        self.surprises.extend(other.surprises);
        self.waits += other.waits;
    }
}

/// Whether each edge leads to the next, and the last to the first.
fn closes(cycle: &[Edge]) -> bool {
    !cycle.is_empty() && cycle.iter().zip(cycle.iter().cycle().skip(1)).all(|(edge, next)| edge.held_by == next.owner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_counted_where_a_filter_said_something() {
        let attempt = |waited, lock_status: &[&str]| Attempt {
            outcome: Outcome::Completed,
            took: waited,
            waited,
            lock_status: lock_status.iter().map(|status| (*status).to_owned()).collect(),
        };
        let mut tally = Tally::new(4);
        assert_eq!(tally.wait(50.0), None);
        tally.count(What::Tried(0, 1, attempt(Duration::from_secs(9), &[])));
        assert_eq!(tally.wait(50.0), None);
        for ms in [0, 100, 300] {
            tally.count(What::Tried(0, 1, attempt(Duration::from_millis(ms), &["bank;outcome=acquired"])));
        }
        let near = |wait: Option<Duration>, ms: f64| (wait.unwrap().as_secs_f64() * 1000.0 - ms).abs() < 1.0;
        assert!(near(tally.wait(50.0), 100.0) && near(tally.wait(99.0), 300.0));
    }

    #[test]
    fn a_cycle_closes_on_itself_or_is_none() {
        let edge = |owner: &str, held_by: &str| Edge {
            owner: owner.to_owned(),
            waits_for: "a/1".to_owned(),
            held_by: held_by.to_owned(),
        };
        assert!(closes(&[edge("1", "1")]));
        assert!(closes(&[edge("1", "2"), edge("2", "3"), edge("3", "1")]));
        assert!(!closes(&[edge("1", "2"), edge("2", "3")]));
        assert!(!closes(&[edge("1", "2"), edge("3", "1")]));
        assert!(!closes(&[]));
    }
}
