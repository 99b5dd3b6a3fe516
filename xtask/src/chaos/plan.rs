//! What is asked for: transactions of one owner each, as trees of sections, drawn at random. Pure, given its random numbers.

use std::time::Duration;

use fastrand::Rng;

use crate::soak::ledger::Mode;

/// Locks that everybody fights for.
const ITEMS: usize = 14;

/// One lease, what is done under it, and what is asked for meanwhile.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What it asks for at once.
    pub locks: Vec<(String, Mode)>,
    /// How long it may wait.
    pub wait: Duration,
    /// How long it writes, before and after what is nested.
    pub work: Duration,
    /// Another lease of the same owner, asked for while this one is held.
    pub then: Option<Box<Plan>>,
    /// It forgets to renew, sleeps until its lease has ended, and writes all the same.
    pub sleeps: bool,
}

impl Plan {
    fn new(rng: &mut Rng, locks: Vec<(String, Mode)>) -> Self {
        let (wait, work) = (Duration::from_millis(rng.u64(100..1500)), Duration::from_millis(rng.u64(0..12)));
        Plan { locks, wait, work, then: None, sleeps: false }
    }

    fn then(mut self, plan: Plan) -> Self {
        self.then = Some(Box::new(plan));
        self
    }

    /// The longest that it can take when nothing is late.
    pub fn longest(&self) -> Duration {
        self.alone() + self.then.as_ref().map_or(Duration::ZERO, |then| then.longest())
    }

    /// The same without what is nested.
    pub fn alone(&self) -> Duration {
        self.wait + self.work * 2
    }

    /// How many leases it takes, one within the other.
    pub fn depth(&self) -> u32 {
        1 + self.then.as_ref().map_or(0, |then| then.depth())
    }
}

/// What a client does next. `ttl` is the TTL of all leases, `calm` whether nothing is to go wrong.
pub fn transaction(rng: &mut Rng, ttl: Duration, calm: bool) -> Plan {
    match rng.u32(..100) {
        0..40 => {
            let locks = vec![item(rng)];
            Plan::new(rng, locks)
        }
        40..58 => {
            let count = rng.usize(2..=3);
            let locks = different(rng, count);
            Plan::new(rng, locks)
        }
        // One from within the other, in any order: what deadlocks.
        58..88 => {
            let count = rng.usize(2..=4);
            let mut plan: Option<Plan> = None;
            for lock in different(rng, count) {
                let mut outer = Plan::new(rng, vec![(lock.0, Mode::Exclusive)]);
                outer.work += Duration::from_millis(5);
                plan = Some(match plan {
                    Some(inner) => outer.then(inner),
                    None => outer,
                });
            }
            plan.unwrap_or_else(|| Plan::new(rng, Vec::new()))
        }
        88..94 => {
            let locks = vec![lonely(rng)];
            let mut plan = Plan::new(rng, locks);
            // Renewed several times.
            plan.work = ttl.mul_f64(rng.f64() + 0.5);
            plan
        }
        94..96 if !calm => {
            let locks = vec![item(rng)];
            Plan { sleeps: true, ..Plan::new(rng, locks) }
        }
        _ => {
            let locks = vec![lonely(rng)];
            Plan::new(rng, locks)
        }
    }
}

fn name(number: usize) -> String {
    format!("item/{}", char::from(b'a' + u8::try_from(number % 26).unwrap_or(0)))
}

fn mode(rng: &mut Rng) -> Mode {
    if rng.u32(..4) == 0 { Mode::Shared } else { Mode::Exclusive }
}

fn item(rng: &mut Rng) -> (String, Mode) {
    let number = rng.usize(..ITEMS);
    (name(number), mode(rng))
}

/// One that is held for long: few ask for it.
fn lonely(rng: &mut Rng) -> (String, Mode) {
    (format!("job/{}", rng.u32(..12)), Mode::Exclusive)
}

fn different(rng: &mut Rng, count: usize) -> Vec<(String, Mode)> {
    let mut all: Vec<_> = (0..ITEMS).collect();
    rng.shuffle(&mut all);
    all.truncate(count);
    all.into_iter().map(|number| (name(number), mode(rng))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_the_same_again_and_calm_draws_no_sleeper() {
        let draw = |seed, calm| {
            let mut rng = Rng::with_seed(seed);
            let plans = (0..1000).map(|_| transaction(&mut rng, Duration::from_secs(1), calm)).collect::<Vec<_>>();
            (format!("{plans:?}"), plans.iter().filter(|plan| plan.sleeps).count())
        };
        assert_eq!(draw(1, false), draw(1, false));
        assert!(draw(1, false).1 > 0 && draw(1, true).1 == 0);
    }
}
