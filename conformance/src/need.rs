//! What a case needs of a target, derived from what it says; and what a target lacks, with the reason that is printed.
//! The one place where it is decided that a case is skipped.

use crate::case::{Case, Expect, Feature, Op, Order, Reentrant, Upgrade};

/// What a case cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// An order that is learned from what was done before.
    LearnedOrder,
    /// A lock that stays closed for a while after it expired.
    LockDelay,
    /// A second lock of the same owner that is not one more.
    IdempotentReentry,
    /// Readers that may not become writers.
    NoUpgrade,
    /// A client that renews its lease itself.
    Renew,
    /// A lease that ends by its time although its client lives.
    Lapse,
    /// Somebody who frees a lock over the holder's head.
    BreakGlass,
    /// A gate that asks who holds a lock.
    Access,
}

/// What a case is about beside its steps, and a target may be unable to show; its steps run all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aspect {
    /// A message that asks the holder to let go.
    Revoke,
    /// An authority that is stopped and started in the middle.
    AuthorityRestart,
    /// A question who holds the lock, in the middle.
    Status,
    /// A configuration that comes in the middle.
    Reload,
    /// Time that passes and changes nothing.
    IdleTime,
}

/// What a target is called, and what it cannot do.
#[derive(Clone, Copy, Debug)]
pub struct Profile {
    /// The column of the table.
    pub name: &'static str,
    /// Why it cannot give a case this need; none where it can.
    pub lacks: fn(Need) -> Option<&'static str>,
    /// Whether it can show this.
    pub shows: fn(Aspect) -> bool,
    /// Whether what a client holds is given back as soon as the client is gone, and not at the end of its TTL.
    pub crash_frees: bool,
    /// Whether time passes only as the case says.
    pub virtual_clock: bool,
}

/// Why no target can give it: it is not in the contract, or another way is.
pub fn beyond_the_contract(need: Need) -> Option<&'static str> {
    match need {
        Need::LearnedOrder => Some("the order is declared by rank, never learned"),
        Need::LockDelay => Some("an expired lock is free at once: no lock-delay"),
        Need::NoUpgrade => Some("the sole holder upgrades at once"),
        Need::IdempotentReentry | Need::Renew | Need::Lapse | Need::BreakGlass | Need::Access => None,
    }
}

/// The cases that no target can pass, by reason: pinned, so that none slips in.
pub const BEYOND_THE_CONTRACT: [(&str, &[&str]); 2] = [
    (
        "the order is declared by rank, never learned",
        &[
            "lockdep/ABBA/learned-X",
            "lockdep/ABBA/learned-S",
            "lockdep/ABBCCA/learned-X",
            "lockdep/ABBCCA/learned-S",
            "lockdep/ABCABC/learned-X",
            "lockdep/ABCABC/learned-S",
            "lockdep/ABBCCDDA/learned-X",
            "lockdep/ABBCCDDA/learned-S",
            "lockdep/ABCDBDDA/learned-X",
            "lockdep/ABCDBDDA/learned-S",
            "lockdep/ABCDBCDA/learned-X",
            "lockdep/ABCDBCDA/learned-S",
            "lockdep/ABBA1/learned",
            "lockdep/ABBA2-fair/learned",
            "lockdep/ABBA3/learned",
            "lockdep/chaincache_ABBA1/learned",
        ],
    ),
    ("the sole holder upgrades at once", &["curator/rw-upgradingDisallowed"]),
];

/// What the case needs.
pub fn needs(case: &Case) -> Vec<Need> {
    let options = &case.options;
    let only = |expect: Expect| case.steps.iter().any(|step| step.allowed() == [expect]);
    let crashed = |owner: &str| case.steps.iter().any(|step| step.op == Op::Crash && step.owner == owner);
    let lapses = case.steps.iter().any(|step| {
        let in_time = step.expired.iter().any(|(owner, _)| !crashed(owner));
        in_time || (step.op == Op::Expire && !crashed(&step.owner))
    });
    let all = [
        // What follows from no order is the same whether or not one would have been learned.
        (options.order == Some(Order::Learned) && only(Expect::RejectedOrder), Need::LearnedOrder),
        // A case that allows the lock to be free at once needs no delay.
        (options.lock_delay_ms.is_some() && case.steps.iter().all(|it| it.alt_expect.is_empty()), Need::LockDelay),
        (options.reentrant == Reentrant::Idempotent && case.does(Op::Release), Need::IdempotentReentry),
        // Where a second lock is refused, so is an upgrade.
        (options.upgrade == Upgrade::Reject && options.reentrant != Reentrant::Reject, Need::NoUpgrade),
        (case.does(Op::Renew), Need::Renew),
        (lapses, Need::Lapse),
        (case.does(Op::AdminRelease), Need::BreakGlass),
        (case.does(Op::Access), Need::Access),
    ];
    all.into_iter().filter_map(|(needed, need)| needed.then_some(need)).collect()
}

/// Why the case is skipped on this target.
pub fn skip(case: &Case, profile: &Profile) -> Option<&'static str> {
    let needs = needs(case);
    let beyond = needs.iter().find_map(|need| beyond_the_contract(*need));
    beyond.or_else(|| needs.iter().find_map(|need| (profile.lacks)(*need)))
}

/// What this target does not show of a case that it runs.
pub fn unseen(case: &Case, profile: &Profile) -> Vec<&'static str> {
    let idles = case.steps.iter().any(|it| it.op == Op::Advance && it.expired.is_empty() && it.timed_out.is_empty());
    let aspects = [
        (case.is_about(Feature::Revoke), Aspect::Revoke, "the message that asks the holder to let go"),
        (case.is_about(Feature::AuthorityRestart), Aspect::AuthorityRestart, "the restart of the authority"),
        (case.is_about(Feature::Status), Aspect::Status, "the status query"),
        (case.is_about(Feature::ConfigReload), Aspect::Reload, "the reload"),
        (idles, Aspect::IdleTime, "time that passes and changes nothing"),
    ];
    let unseen = |(about, aspect, what)| (about && !(profile.shows)(aspect)).then_some(what);
    aspects.into_iter().filter_map(unseen).collect()
}
