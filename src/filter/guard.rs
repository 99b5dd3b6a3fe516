//! The guard of a resource: a request passes only if its owner holds the lock, as far as can be seen here.
//!
//! It comes before the locks that the request asks for itself: whoever is turned away has taken none. What is remembered of
//! fences is the core's business ([`interlock_core::seen`]), where it is kept that of the backend.

use std::rc::Rc;

use interlock_core::seen::Verdict;
use interlock_core::{Cause, Duration, LockName, OwnerId, Refusal, StoreError, bug};

use super::fences::Inbound;
use super::intake::{Facts, Terms};
use super::respond::Answer;
use super::stream::{Case, Ended};
use super::{Active, Runtime, case, report};
use crate::answer::{Reject, Shown};
use crate::backend::Purpose;
use crate::host::Host;
use crate::policy::{Check, OnLeaseLost, OnUnavailable, Reentrancy};

/// What a guard wants of a request.
#[derive(Debug)]
pub struct Guarded {
    terms: Terms,
    check: Check,
    /// The lock that it must hold, or why it gives no name for it.
    lock: Result<LockName, Reject>,
}

/// How a request comes by its guard.
pub enum Passage {
    /// There is none, or it has nothing against it.
    Free,
    /// It passes all the same: under audit, or because nobody can say and the guard allows that.
    Noted(Case, Ended),
    /// It is answered.
    Stopped(Case, Answer),
}

/// The guard of the effective stream's request, if there is one that is not off.
pub fn of(facts: &Facts<'_>, active: &Active) -> Option<Guarded> {
    let policy = &active.policy;
    if policy.guards.is_empty() {
        return None;
    }
    facts.looked_up(|lookup| {
        let matched = policy.guards.find(lookup)?;
        let guard = matched.rule;
        let terms = Terms {
            purpose: facts.purpose(guard.enforcement)?,
            on_lease_lost: OnLeaseLost::Abort,
            on_backend_unavailable: guard.on_backend_unavailable,
            asked_by: guard.name.clone(),
            grpc: facts.is_grpc(),
        };
        let malformed = |error| Reject::Malformed { detail: format!("{}: {error}", guard.name) };
        Some(Guarded { terms, check: guard.check, lock: matched.lock(lookup).map_err(malformed) })
    })
}

impl Runtime {
    /// Brings the effective stream's request past its guard. Of several fences for the guarded lock, the one that it was judged
    /// by is passed on.
    pub(super) fn guard(
        &mut self,
        host: &dyn Host,
        active: &Rc<Active>,
        facts: &Facts<'_>,
        guarded: Guarded,
        inbound: &mut Inbound,
    ) -> Passage {
        let Guarded { terms, check, lock } = guarded;
        let judged = match (&lock, check) {
            (Err(reject), _) => Err(reject.clone()),
            (Ok(lock), Check::Fence) => self.check_fence(host, facts, lock, inbound),
            (Ok(lock), Check::Owner) => self.check_owner(host, active, facts, terms.purpose, lock, inbound),
        };
        let class = lock.as_ref().map_or("", LockName::class);
        let purpose = terms.purpose;
        let reject = match judged {
            Ok(()) => {
                report::guarded(host, active, purpose, class);
                return Passage::Free;
            }
            Err(reject) => reject,
        };
        let mut case = case(host, active, terms, facts.owner().cloned(), Vec::new());
        case.name_route(host);
        let failed =
            matches!(&reject, Reject::Core(Refusal { cause: Cause::Backend { .. } | Cause::Grace { .. }, .. }));
        if failed && case.terms.on_backend_unavailable == OnUnavailable::Allow {
            report::passed_unguarded(host, &case, &reject);
            return Passage::Noted(case, Ended::Unlocked);
        }
        report::turned_away(host, &case, &reject);
        match purpose {
            Purpose::Enforce => {
                let answer = Answer::refusal(&case, &reject, Duration::ZERO);
                Passage::Stopped(case, answer)
            }
            Purpose::Audit => Passage::Noted(case, Ended::WouldRefuse(Box::new(reject))),
        }
    }

    /// Judges the fence that the request shows by those that were seen here before. There is one memory, under audit too: what it
    /// holds is what has passed.
    fn check_fence(
        &mut self,
        host: &dyn Host,
        facts: &Facts<'_>,
        lock: &LockName,
        inbound: &mut Inbound,
    ) -> Result<(), Reject> {
        let shown = inbound.verified.iter().filter(|member| member.name == *lock || bug!(FenceOfAnotherLock));
        let Some((shown, owner)) = shown.max_by_key(|member| member.fence).cloned().zip(facts.owner()) else {
            let unverified = inbound.malformed || inbound.unverified.contains(lock);
            let shown = if unverified { Shown::Unverified } else { Shown::Nothing };
            return Err(Reject::FenceRequired { lock: lock.clone(), owner: facts.owner().cloned(), shown });
        };
        inbound.verified.retain(|member| member.name != *lock || *member == shown);
        let seen = match &self.seen {
            Some(seen) => seen.see(host, lock, shown.fence, shown.mode),
            None => Err(StoreError::Failed(String::from("the memory of fences is not open"))),
        };
        match seen {
            Ok(Verdict::Fresh) => Ok(()),
            Ok(Verdict::Stale) => {
                Err(Reject::StaleFence { lock: lock.clone(), owner: owner.clone(), fence: shown.fence })
            }
            Err(error) => Err(Reject::Core(Refusal {
                lock: lock.clone(),
                mode: shown.mode,
                owner: owner.clone(),
                cause: error.into(),
            })),
        }
    }

    /// Asks the table who holds the lock. A guard that only watches finds the holder among those of the shadow table, too.
    fn check_owner(
        &mut self,
        host: &dyn Host,
        active: &Active,
        facts: &Facts<'_>,
        purpose: Purpose,
        lock: &LockName,
        inbound: &Inbound,
    ) -> Result<(), Reject> {
        let Some(owner) = facts.owner() else {
            return Err(Reject::OwnerMissing { sources: active.policy.owner_from.clone() });
        };
        let branches = format!("{owner}#");
        let by_branch = active.policy.reentrancy == Reentrancy::Lease;
        let is = |holder: &OwnerId| {
            holder == owner || (by_branch && holder.as_str().starts_with(&branches)) || bug!(AnyHolderPasses)
        };
        let refused = |cause| {
            let mode = active.policy.defaults.mode;
            Reject::Core(Refusal { lock: lock.clone(), mode, owner: owner.clone(), cause })
        };
        let failed = |error: StoreError| refused(error.into());
        let tables: &[Purpose] = match purpose {
            Purpose::Enforce => &[Purpose::Enforce],
            Purpose::Audit => &Purpose::ALL,
        };
        let (mut held, mut grace) = (None, Duration::ZERO);
        for purpose in tables {
            if let Some(table) = self.backends.local(*purpose) {
                held = table.held_by(host, &active.rules, lock, is).map_err(failed)?;
                if held.is_some() {
                    break;
                }
                grace = grace.max(table.grace_left(host, &active.rules).map_err(failed)?);
            }
        }
        let shown = inbound.verified.iter().filter(|member| member.name == *lock).map(|member| member.fence).max();
        match (held, shown) {
            // It is of an earlier section of the same owner.
            (Some(held), Some(fence)) if fence < held => {
                Err(Reject::StaleFence { lock: lock.clone(), owner: owner.clone(), fence })
            }
            (Some(_), _) => Ok(()),
            (None, _) if grace.is_zero() => Err(Reject::NotHolder { lock: lock.clone(), owner: owner.clone() }),
            // It may hold it, and not have come yet to say so.
            (None, _) => Err(refused(Cause::Grace { left: grace })),
        }
    }
}
