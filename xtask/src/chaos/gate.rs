//! A guarded resource, and the judgement of what it sees: it remembers the highest fence for each lock and stops every write
//! that comes with a lower one. Behind it, mutual exclusion shows as this:
//!
//! - a lease that had to live is never in the way of another: while one writes whose lease cannot have ended, nobody with a
//!   higher fence is accepted, and it is not stopped itself;
//! - fences never fall: who asked for a lock after a fence had been seen gets a higher one;
//! - a fence is one owner's.
//!
//! A section that another overtakes after its lease may have ended is *cut*: the holder was paused or partitioned, and what
//! it still writes is stopped. That is what fences are for, and is counted.
//!
//! Pure: moments come in from outside.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::soak::ledger::{Grant, Mode, Violations};

/// How much sooner than its time something may seem to end: clocks are read at different places.
const EARLY: Duration = Duration::from_millis(20);

/// For how long fences are remembered with their moments: longer than any request is under way.
const MEMORY: Duration = Duration::from_secs(60);

/// One grant, as its holder uses it.
#[derive(Debug, Clone)]
pub struct Section {
    /// Who holds.
    pub owner: String,
    /// What.
    pub grants: Vec<Grant>,
    /// When it was first asked for.
    pub sent: Instant,
    /// Until when its lease lives for certain.
    pub valid_until: Instant,
    /// Names it in a violation.
    pub about: String,
}

/// What there was to judge.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tally {
    /// Sections of which a write was accepted.
    pub sections: u64,
    /// Writes accepted.
    pub writes: u64,
    /// Writes stopped, since a higher fence had been seen.
    pub stopped: u64,
    /// Sections that a higher fence ended.
    pub cut: u64,
    /// Sections that came after another one's on the same lock, of another owner.
    pub followed: u64,
}

/// The resource.
#[derive(Debug, Default)]
pub struct Gate {
    locks: HashMap<String, Guarded>,
    sections: HashMap<u64, Inside>,
    next: u64,
    pub tally: Tally,
    pub violations: Violations,
}

#[derive(Debug)]
struct Inside {
    section: Section,
    accepted: bool,
    cut: bool,
    judged: bool,
}

/// What is remembered of one lock.
#[derive(Debug, Default)]
struct Guarded {
    /// The highest fence of any grant, and of an exclusive one.
    highest: Option<Seen>,
    highest_exclusive: Option<Seen>,
    /// Fences that were the highest when they were first accepted, and when that was.
    past: VecDeque<(Instant, Seen)>,
    /// Sections that have written and have not left.
    open: Vec<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    fence: u64,
    owner: String,
}

impl Gate {
    /// A holder begins. Gives back its number.
    pub fn enter(&mut self, section: Section) -> u64 {
        self.next += 1;
        self.sections.insert(self.next, Inside { section, accepted: false, cut: false, judged: false });
        self.next
    }

    /// Its lease is known to live for longer.
    pub fn extend(&mut self, id: u64, valid_until: Instant) {
        if let Some(inside) = self.sections.get_mut(&id) {
            inside.section.valid_until = inside.section.valid_until.max(valid_until);
        }
    }

    /// It writes, under all its fences. False: it is stopped.
    pub fn write(&mut self, id: u64, now: Instant) -> bool {
        let Some(mut inside) = self.sections.remove(&id) else { return false };
        let passes = self.judge(id, &mut inside, now);
        self.sections.insert(id, inside);
        passes
    }

    /// It is done.
    pub fn leave(&mut self, id: u64) {
        let Some(inside) = self.sections.remove(&id) else { return };
        for grant in &inside.section.grants {
            if let Some(lock) = self.locks.get_mut(&grant.lock) {
                lock.open.retain(|open| *open != id);
            }
        }
    }

    fn judge(&mut self, id: u64, inside: &mut Inside, now: Instant) -> bool {
        let section = &inside.section;
        let mut over = None;
        for grant in &section.grants {
            let lock = self.locks.entry(grant.lock.clone()).or_default();
            if !inside.judged
                && let Some(before) = lock.seen_before(section)
                && grant.fence <= before.fence
            {
                self.violations.push(format!(
                    "{}: the fence fell: {before:?} had been seen before this was asked for\n    {grant:?}, {}",
                    grant.lock, section.about
                ));
            }
            if let Some(seen) = lock.above(grant, &section.owner) {
                over = Some((grant.clone(), seen.clone()));
            }
        }
        inside.judged = true;
        if let Some((grant, seen)) = over {
            self.tally.stopped += 1;
            if seen.fence == grant.fence {
                self.violations.push(format!("{}: {} and {} have one fence", grant.lock, seen.owner, section.owner));
            }
            if now + EARLY < section.valid_until {
                self.violations.push(format!(
                    "{}: {seen:?} was let in while another lease had to live for {:?} more\n    {grant:?} of {}, {}",
                    grant.lock,
                    section.valid_until - now,
                    section.owner,
                    section.about
                ));
            }
            return false;
        }
        self.tally.writes += 1;
        if inside.accepted {
            return true;
        }
        inside.accepted = true;
        self.tally.sections += 1;
        for grant in &inside.section.grants {
            self.admit(id, grant, &inside.section, now);
        }
        true
    }

    /// The first write of a section under one of its fences: it cuts those that are in the way.
    fn admit(&mut self, id: u64, grant: &Grant, section: &Section, now: Instant) {
        let Some(lock) = self.locks.get_mut(&grant.lock) else { return };
        let other_before = lock.highest.as_ref().is_some_and(|seen| seen.owner != section.owner);
        self.tally.followed += u64::from(other_before);
        for open in &lock.open {
            let Some(other) = self.sections.get_mut(open) else { continue };
            let theirs = other.section.grants.iter().find(|theirs| theirs.lock == grant.lock);
            let conflict = theirs.is_some_and(|theirs| !theirs.mode.compatible(grant.mode));
            if !conflict || other.section.owner == section.owner {
                continue;
            }
            self.tally.cut += u64::from(!other.cut);
            other.cut = true;
            if now + EARLY < other.section.valid_until {
                self.violations.push(format!(
                    "{}: two at once: {grant:?} of {} was let in while a lease had to live for {:?} more\n    of {}, {}\n    {}",
                    grant.lock,
                    section.owner,
                    other.section.valid_until - now,
                    other.section.owner,
                    other.section.about,
                    section.about
                ));
            }
        }
        lock.open.push(id);
        lock.raise(grant, &section.owner, now);
    }
}

impl Guarded {
    /// The highest fence of somebody else that had been accepted when this section was asked for.
    fn seen_before(&self, section: &Section) -> Option<&Seen> {
        let before = self.past.iter().filter(|(at, seen)| *at < section.sent && seen.owner != section.owner);
        before.map(|(_, seen)| seen).max_by_key(|seen| seen.fence)
    }

    /// Whose fence stops this grant, if one does.
    fn above(&self, grant: &Grant, owner: &str) -> Option<&Seen> {
        let bar = if grant.mode == Mode::Exclusive { &self.highest } else { &self.highest_exclusive };
        bar.as_ref().filter(|seen| seen.owner != owner && seen.fence >= grant.fence)
    }

    fn raise(&mut self, grant: &Grant, owner: &str, now: Instant) {
        let seen = Seen { fence: grant.fence, owner: owner.to_owned() };
        let higher = |old: &Option<Seen>| old.as_ref().is_none_or(|old| old.fence < seen.fence);
        if higher(&self.highest) {
            self.past.push_back((now, seen.clone()));
            self.highest = Some(seen.clone());
        }
        if grant.mode == Mode::Exclusive && higher(&self.highest_exclusive) {
            self.highest_exclusive = Some(seen);
        }
        while self.past.len() > 1 && self.past.front().is_some_and(|(at, _)| *at + MEMORY < now) {
            self.past.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(1);

    struct Scene {
        gate: Gate,
        zero: Instant,
    }

    impl Scene {
        fn new() -> Self {
            Scene { gate: Gate::default(), zero: Instant::now() }
        }

        fn at(&self, ms: u64) -> Instant {
            self.zero + Duration::from_millis(ms)
        }

        fn enter(&mut self, owner: &str, fence: u64, mode: Mode, sent: u64) -> u64 {
            let grants = vec![Grant { lock: "item/a".into(), fence, mode }];
            let (sent, valid_until) = (self.at(sent), self.at(sent) + TTL);
            self.gate.enter(Section { owner: owner.into(), grants, sent, valid_until, about: String::new() })
        }

        fn write(&mut self, id: u64, ms: u64) -> bool {
            let now = self.at(ms);
            self.gate.write(id, now)
        }
    }

    use Mode::{Exclusive, Shared};

    #[test]
    fn a_paused_holder_is_cut_once_its_lease_may_have_ended() {
        let mut scene = Scene::new();
        let one = scene.enter("one", 1, Exclusive, 0);
        assert!(scene.write(one, 10));
        let two = scene.enter("two", 2, Exclusive, 500);
        assert!(scene.write(two, 1100) && !scene.write(one, 1200) && scene.write(two, 1300));
        scene.gate.leave(two);
        assert!(!scene.write(one, 1400), "the fence is remembered");
        let tally = scene.gate.tally;
        assert_eq!((tally.sections, tally.cut, tally.stopped, scene.gate.violations.count), (2, 1, 2, 0));
    }

    #[test]
    fn two_leases_that_must_live_are_two_too_many() {
        let mut scene = Scene::new();
        let one = scene.enter("one", 1, Exclusive, 0);
        assert!(scene.write(one, 10));
        let two = scene.enter("two", 2, Exclusive, 500);
        scene.write(two, 900);
        assert_eq!(scene.gate.violations.count, 1, "let in too early");
        scene.write(one, 910);
        assert_eq!(scene.gate.violations.count, 2, "and the first one was stopped too early");
        let mut scene = Scene::new();
        let one = scene.enter("one", 1, Shared, 0);
        let two = scene.enter("two", 2, Shared, 0);
        assert!(scene.write(two, 10) && scene.write(one, 20));
        assert_eq!((scene.gate.violations.count, scene.gate.tally.cut), (0, 0), "readers share");
        scene.gate.extend(one, scene.at(3000));
        let writer = scene.enter("writer", 3, Exclusive, 100);
        scene.write(writer, 1500);
        assert_eq!((scene.gate.violations.count, scene.gate.tally.cut), (1, 2), "one reader had been renewed");
    }

    #[test]
    fn fences_that_fall_or_are_two_peoples() {
        let mut scene = Scene::new();
        let one = scene.enter("one", 5, Exclusive, 0);
        assert!(scene.write(one, 10));
        scene.gate.leave(one);
        let late = scene.enter("late", 4, Exclusive, 5);
        assert!(!scene.write(late, 2000), "asked before, granted before, and late");
        assert_eq!(scene.gate.violations.count, 0);
        let fallen = scene.enter("fallen", 4, Exclusive, 20);
        assert!(!scene.write(fallen, 2000));
        assert_eq!(scene.gate.violations.count, 1);
        let twin = scene.enter("twin", 5, Exclusive, 5);
        assert!(!scene.write(twin, 2000));
        assert_eq!(scene.gate.violations.count, 2);
        let again = scene.enter("one", 5, Exclusive, 20);
        assert!(scene.write(again, 30), "one owner's sections share a fence");
    }
}
