//! Who asked for what, and when, as the callers themselves know it; and whether a cycle that somebody was told of can have
//! been there.
//!
//! A claim lasts from before anybody else can know of it until after everybody must have forgotten it. So a cycle whose
//! claims do not all overlap at one moment did not exist.
//!
//! Pure: moments come in from outside.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::soak::answer::Edge;
use crate::soak::ledger::Mode;

/// For how long a claim is remembered after its end.
const MEMORY: Duration = Duration::from_secs(30);

/// One request for locks, and the lease that it became.
#[derive(Debug, Clone)]
struct Claim {
    owner: String,
    locks: Vec<(String, Mode)>,
    sent: Instant,
    /// From when on it certainly did not wait any more.
    granted: Option<Instant>,
    /// From when on it certainly neither waited nor held.
    over: Option<Instant>,
}

/// All claims of late.
#[derive(Debug, Default)]
pub struct Waits {
    claims: HashMap<u64, Claim>,
    next: u64,
}

impl Waits {
    /// A request is about to be sent. Gives back its number.
    pub fn asked(&mut self, owner: &str, locks: &[(String, Mode)], now: Instant) -> u64 {
        self.next += 1;
        if self.next.is_multiple_of(512) {
            self.claims.retain(|_, claim| claim.over.is_none_or(|over| now < over + MEMORY));
        }
        let claim = Claim { owner: owner.to_owned(), locks: locks.to_vec(), sent: now, granted: None, over: None };
        self.claims.insert(self.next, claim);
        self.next
    }

    /// It has its locks.
    pub fn granted(&mut self, id: u64, now: Instant) {
        if let Some(claim) = self.claims.get_mut(&id) {
            claim.granted.get_or_insert(now);
        }
    }

    /// It will be over by then, at the latest.
    pub fn over(&mut self, id: u64, by: Instant) {
        if let Some(claim) = self.claims.get_mut(&id) {
            claim.over.get_or_insert(by);
        }
    }

    /// Whether the cycle that claim `id` was told of can have been there between its sending and `now`; what is wrong with it,
    /// if it cannot.
    pub fn check(&self, edges: &[Edge], id: u64, now: Instant) -> Result<(), String> {
        let Some(own) = self.claims.get(&id) else { return Err("nobody asked".to_owned()) };
        let (mut from, mut to) = (own.sent, now);
        for (owner, lock, holder) in edges {
            let waits = |claim: &&Claim| {
                claim.owner == *owner
                    && claim.mode(lock).is_some()
                    && claim.granted.is_none_or(|granted| granted >= own.sent)
                    && claim.over.is_none_or(|over| over >= own.sent)
            };
            let waiter = self.claims.values().filter(waits).max_by_key(|claim| claim.sent);
            let Some(waiter) = waiter else { return Err(format!("{owner} does not wait for {lock}")) };
            let blocks = |claim: &&Claim| {
                let conflict = claim.mode(lock).zip(waiter.mode(lock)).is_some_and(|(a, b)| !a.compatible(b));
                claim.owner == *holder && conflict && claim.over.is_none_or(|over| over >= own.sent)
            };
            let holder = self.claims.values().filter(blocks).max_by_key(|claim| claim.over.unwrap_or(now));
            let Some(holder) = holder else { return Err(format!("nobody is in the way of {owner} at {lock}")) };
            from = from.max(waiter.sent).max(holder.sent);
            let ends = [waiter.granted, waiter.over, holder.over];
            to = ends.into_iter().flatten().fold(to, Instant::min);
        }
        if from > to {
            return Err(format!("its edges were never there together, by {:?}", from - to));
        }
        Ok(())
    }
}

impl Claim {
    fn mode(&self, lock: &str) -> Option<Mode> {
        self.locks.iter().find(|(name, _)| name == lock).map(|(_, mode)| *mode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cycle_must_have_been_there_as_a_whole() {
        let zero = Instant::now();
        let at = |ms: u64| zero + Duration::from_millis(ms);
        let want = |lock: &str| vec![(lock.to_owned(), Mode::Exclusive)];
        let edge = |a: &str, lock: &str, b: &str| (a.to_owned(), lock.to_owned(), b.to_owned());
        let mut waits = Waits::default();
        let a = waits.asked("a", &want("x"), at(0));
        let b = waits.asked("b", &want("y"), at(0));
        waits.granted(a, at(5));
        waits.granted(b, at(5));
        waits.asked("a", &want("y"), at(10));
        let closing = waits.asked("b", &want("x"), at(20));
        let cycle = [edge("b", "x", "a"), edge("a", "y", "b")];
        assert_eq!(waits.check(&cycle, closing, at(30)), Ok(()));
        assert!(waits.check(&[edge("b", "x", "a"), edge("a", "z", "b")], closing, at(30)).is_err(), "nobody wants z");
        assert!(waits.check(&[edge("b", "x", "c"), edge("c", "y", "b")], closing, at(30)).is_err(), "there is no c");
        waits.over(a, at(15));
        assert!(waits.check(&cycle, closing, at(30)).is_err(), "what a held was over before b asked");
    }
}
