//! The locks, owners and rules that schedules are about, made once a thread.

use std::rc::Rc;

use interlock_core::{Class, Classes, Duration, Limits, LockName, OwnerId, Rank, Rules, Within};

use crate::schedule::{LOCKS, OWNERS};

/// How many sets of rules there are.
const RULES: u8 = 4;

/// Names and rules, ready made.
pub struct Words {
    locks: Vec<LockName>,
    owners: Vec<OwnerId>,
    rules: Vec<Rc<Rules>>,
}

impl Words {
    /// All of them.
    ///
    /// # Panics
    /// Never: the names are constants.
    pub fn new() -> Rc<Self> {
        Rc::new(Words {
            locks: LOCKS.iter().map(|name| LockName::parse(name).expect("a constant")).collect(),
            owners: OWNERS.iter().map(|name| OwnerId::new(name).expect("a constant")).collect(),
            rules: (0..RULES).map(|which| Rc::new(rules(which))).collect(),
        })
    }

    /// A lock.
    pub fn lock(&self, at: u8) -> LockName {
        self.locks[usize::from(at)].clone()
    }

    /// An owner.
    pub fn owner(&self, at: u8) -> OwnerId {
        self.owners[usize::from(at)].clone()
    }

    /// A set of rules.
    pub fn rules(&self, which: u8) -> Rc<Rules> {
        Rc::clone(&self.rules[usize::from(which % RULES)])
    }
}

/// Plain, a pool of two, a tree, two ranks, and a rank without an order within; the limits differ.
fn rules(which: u8) -> Rules {
    let mut classes = Classes::default();
    let plain = Class::default();
    let ranked = |rank| Class { rank: Some(Rank(rank)), ..plain };
    for (name, class) in [
        ("p", Class { permits: 2, ..plain }),
        ("t", Class { hierarchy: true, ..plain }),
        ("q", ranked(1)),
        ("r", ranked(2)),
        ("u", Class { within: Within::Unordered, ..ranked(3) }),
    ] {
        classes.insert(name.into(), class);
    }
    let tight = which == 3;
    let limits = Limits {
        locks_per_owner: if which == 0 { None } else { Some(if tight { 3 } else { 64 }) },
        waiters_per_lock: if tight { 2 } else { 100 },
        locks: if tight { 6 } else { 1000 },
        waiters: if tight { 4 } else { 1000 },
        longest_ttl: Duration::from_secs(3),
    };
    Rules { classes, limits, grace: Duration::ZERO }
}
