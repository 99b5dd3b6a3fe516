//! The guard of a resource: a request passes only if its owner holds the lock, as far as can be seen here.
//!
//! It comes before the locks that the request asks for itself: whoever is turned away has taken none. What is remembered of
//! fences is the core's business ([`interlock_core::seen`]), where it is kept that of the backend.

use std::rc::Rc;

use interlock_core::seen::Verdict;
use interlock_core::{Cause, Duration, Fence, LockName, Mode, OwnerId, Refusal, StoreError, bug};

use super::fences::Inbound;
use super::holder::{self, Question};
use super::intake::{Facts, Terms};
use super::respond::Answer;
use super::stream::{Case, Ended};
use super::{Active, Runtime, case, fences, report};
use crate::answer::{Reject, Shown};
use crate::backend::Purpose;
use crate::backend::authority::look::Unknown;
use crate::host::Host;
use crate::policy::{Backend, Check, OnLeaseLost, OnUnavailable, Reentrancy};

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
    /// Its holder is asked for, and it has to wait for the answer.
    Asked(Question),
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
        let case = case(host, active, terms, facts.owner().cloned(), Vec::new());
        let judged = match (&lock, check) {
            (Err(reject), _) => Err(reject.clone()),
            (Ok(lock), Check::Fence) => self.check_fence(host, facts, lock, inbound),
            (Ok(lock), Check::Owner) => match (&active.policy.backend, facts.owner()) {
                (_, None) => Err(Reject::OwnerMissing { sources: active.policy.owner_from.clone() }),
                (backend, Some(owner)) => {
                    let claim = Claim { lock: lock.clone(), owner: owner.clone(), shown: inbound.highest(lock) };
                    match backend {
                        Backend::Local => self.check_owner(host, active, case.purpose(), &claim),
                        Backend::Authority(at) => match holder::ask(host, at, &claim) {
                            Ok(sent) => return Passage::Asked(Question::new(case, claim, sent)),
                            Err(reject) => {
                                report::call_failed(host, active, Unknown::UNSENT.reason);
                                Err(reject)
                            }
                        },
                        // Policies that would ask for it are refused.
                        Backend::Etcd(_) => {
                            let detail = String::from("who holds a lock in etcd cannot be asked at a guard");
                            Err(claim.refused(Cause::Backend { detail }))
                        }
                    }
                }
            },
        };
        conclude(host, case, lock.as_ref().map_or("", LockName::class), judged)
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
    fn check_owner(&mut self, host: &dyn Host, active: &Active, purpose: Purpose, claim: &Claim) -> Result<(), Reject> {
        let branches = fences::branches(&claim.owner);
        let by_branch = active.policy.reentrancy == Reentrancy::Lease;
        let is = |holder: &OwnerId| {
            *holder == claim.owner || (by_branch && holder.as_str().starts_with(&branches)) || bug!(AnyHolderPasses)
        };
        let failed = |error: StoreError| claim.refused(error.into());
        let tables: &[Purpose] = match purpose {
            Purpose::Enforce => &[Purpose::Enforce],
            Purpose::Audit => &Purpose::ALL,
        };
        let (mut held, mut grace) = (None, Duration::ZERO);
        for purpose in tables {
            if let Some(table) = self.backends.local(*purpose) {
                held = table.held_by(host, &active.rules, &claim.lock, is).map_err(failed)?;
                if held.is_some() {
                    break;
                }
                grace = grace.max(table.grace_left(host, &active.rules).map_err(failed)?);
            }
        }
        claim.judge(held, grace)
    }
}

/// Who wants to pass as the holder of a lock.
#[derive(Debug)]
pub struct Claim {
    /// The lock.
    pub lock: LockName,
    /// Who.
    pub owner: OwnerId,
    /// The highest fence for it that counts and that the request shows.
    pub shown: Option<Fence>,
}

impl Claim {
    /// The refusal of it for a cause that is not its own.
    pub fn refused(&self, cause: Cause) -> Reject {
        let (lock, owner) = (self.lock.clone(), self.owner.clone());
        // Nobody says in which mode it should be held.
        Reject::Core(Refusal { lock, mode: Mode::Exclusive, owner, cause })
    }

    /// Judges it. `held`: the lowest fence under which the owner holds the lock, if it does, as far as is known; `grace`: for how
    /// long yet not all holders may be known.
    ///
    /// # Errors
    /// Why it does not pass.
    pub fn judge(&self, held: Option<Fence>, grace: Duration) -> Result<(), Reject> {
        let (lock, owner) = (self.lock.clone(), self.owner.clone());
        match (held, self.shown) {
            // It is of an earlier section of the same owner.
            (Some(held), Some(fence)) if fence < held => Err(Reject::StaleFence { lock, owner, fence }),
            (Some(_), _) => Ok(()),
            (None, _) if grace.is_zero() => Err(Reject::NotHolder { lock, owner }),
            // It may hold it, and not have come yet to say so.
            (None, _) => Err(self.refused(Cause::Grace { left: grace })),
        }
    }
}

/// What becomes of a request that was judged so. Its stream must be the effective one.
pub fn conclude(host: &dyn Host, mut case: Case, class: &str, judged: Result<(), Reject>) -> Passage {
    let Err(reject) = judged else {
        report::guarded(host, &case, class);
        return Passage::Free;
    };
    case.name_route(host);
    if reject.is_unavailable() && case.terms.on_backend_unavailable == OnUnavailable::Allow {
        report::passed_unguarded(host, &case, &reject);
        return Passage::Noted(case, Ended::Unlocked);
    }
    report::turned_away(host, &case, &reject);
    if case.is_enforced() {
        let answer = Answer::refusal(&case, &reject, host.now().since(case.arrived));
        Passage::Stopped(case, answer)
    } else {
        Passage::Noted(case, Ended::WouldRefuse(Box::new(reject)))
    }
}
