//! The `lock-fence` header: own grants for the upstream, and the fences of earlier hops that are passed on.
//!
//! A fence from outside counts only if it is signed with one of the policy's keys, for this very owner.

use interlock_core::{Fence, Grant, LeaseId, LockName, OwnerId, Rules, StoreError, bug};

use super::intake::Facts;
use super::stream::Case;
use crate::answer::headers::{self, FenceMember};
use crate::backend::Lease;
use crate::backend::local::Local;
use crate::host::{Headers, Host};
use crate::policy::{Keys, Policy, Signed};

/// The fences that a request brings along.
#[derive(Debug, Default)]
pub struct Inbound {
    /// Those that are signed with one of the keys, for this owner, and have not expired: they are believed, and passed on.
    pub verified: Vec<FenceMember>,
    /// The locks of the others, which count for nothing.
    pub unverified: Vec<LockName>,
    /// Whether the header could not be read, so that none of what is in it counts.
    pub malformed: bool,
}

impl Inbound {
    /// The highest fence for a lock that is believed.
    pub fn highest(&self, lock: &LockName) -> Option<Fence> {
        self.verified.iter().filter(|member| member.name == *lock).map(|member| member.fence).max()
    }
}

/// Reads the inbound fences of the effective stream's request. Nothing is read without keys, since nothing could verify.
pub fn inbound(host: &dyn Host, policy: &Policy, facts: &Facts<'_>) -> Inbound {
    if policy.keys.is_empty() {
        return Inbound::default();
    }
    let Some(inbound) = facts.fields().joined("lock-fence") else { return Inbound::default() };
    let now = host.unix_micros() / 1000;
    let is_good = |member: &FenceMember| {
        if bug!(UnsignedFencePassed) {
            return true;
        }
        let Some(owner) = facts.owner() else { return false };
        let says = Signed { name: &member.name, fence: member.fence, mode: member.mode, owner };
        member.sig.as_deref().is_some_and(|sig| policy.keys.verify(&says, sig, now).is_ok())
    };
    let Some(members) = headers::parse_lock_fence([inbound.as_slice()]) else {
        return Inbound { malformed: true, ..Inbound::default() };
    };
    let (verified, others) = members.into_iter().partition::<Vec<_>, _>(is_good);
    Inbound { verified, unverified: others.into_iter().map(|member| member.name).collect(), malformed: false }
}

/// The fences of a lease's grants, of those that were asked for.
pub fn of(host: &dyn Host, case: &Case, lease: &Lease) -> Vec<FenceMember> {
    signed(host, &case.active.policy.keys, case.owner.as_ref(), lease.grants())
}

/// The fences of grants, of those that were asked for; signed for their owner where there are keys.
pub fn signed(host: &dyn Host, keys: &Keys, owner: Option<&OwnerId>, grants: &[Grant]) -> Vec<FenceMember> {
    let sign = |grant: &Grant| {
        // A fence is good for as long as its grant can be renewed.
        let left = grant.until.since(host.now());
        let expiry = u64::try_from(left.as_millis()).unwrap_or(u64::MAX).saturating_add(host.unix_micros() / 1000);
        let says = Signed { name: &grant.name, fence: grant.fence, mode: grant.mode, owner: owner? };
        keys.sign(&says, expiry)
    };
    let member = |grant: &Grant| FenceMember {
        name: grant.name.clone(),
        fence: grant.fence,
        mode: grant.mode,
        sig: if keys.is_empty() { None } else { sign(grant) },
    };
    grants.iter().filter(|grant| grant.asked).map(member).collect()
}

/// Sets the header of the effective stream's request: own fences, then those of earlier hops for other locks.
pub fn forward(host: &dyn Host, carried: &[FenceMember], own: &[FenceMember]) {
    let earlier = carried.iter().filter(|member| own.iter().all(|own| own.name != member.name));
    let all: Vec<_> = own.iter().chain(earlier).cloned().collect();
    if let Some(value) = headers::lock_fence(&all) {
        // Fails only when the request is gone.
        let _ = host.set_header(Headers::Request, "lock-fence", value.as_bytes());
    }
}

/// What the names of an owner's branches begin with.
pub fn branches(owner: &OwnerId) -> String {
    format!("{owner}#")
}

/// The owner as the table knows it where only those re-enter who carry a fence of the holder's lease: the branch of the
/// transaction that holds such a lease, or a new branch. So parallel branches of one trace exclude each other.
///
/// # Errors
/// Those of the store.
pub fn branch(
    host: &dyn Host,
    local: &mut Local,
    rules: &Rules,
    owner: &OwnerId,
    lease: LeaseId,
    carried: &[FenceMember],
) -> Result<OwnerId, StoreError> {
    let prefix = branches(owner);
    for member in carried {
        let holder = local.holder_of(host, rules, &member.name, member.fence)?;
        if let Some(holder) = holder.filter(|holder| holder.as_str().starts_with(&prefix)) {
            return Ok(holder);
        }
    }
    // An owner too long to carry its branch re-enters nothing but stays apart from all others.
    Ok(OwnerId::new(&format!("{prefix}{:x}", lease.0)).unwrap_or_else(|| owner.clone()))
}
