//! What must hold of the protocol: at the authority's table, and among those who believe that they hold.

use std::collections::{BTreeMap, BTreeSet};

use interlock_core::store::LockBucket;
use interlock_core::{Entry, Fence, LeaseId, LockName, State as Stand, Time};

use super::proxy::{Proxy, Served};
use super::{Caller, Reply};
use crate::oracle::{conflict, modes_conflict, owned, suffices};
use crate::state::State;

/// What is known of an authority and its past, over restarts too.
#[derive(Default)]
pub struct ProtocolFacts {
    /// Answers that wait to be sent.
    pub outbox: Vec<(Caller, Reply)>,
    /// The highest fence that was ever given for a lock.
    highest: BTreeMap<LockName, Fence>,
    /// Every grant that was ever made, with its fence.
    grants: BTreeMap<(LockName, LeaseId), BTreeSet<Fence>>,
    /// Leases that a release was acknowledged for, in this life of the authority, and when.
    deleted: BTreeMap<LeaseId, Time>,
    /// The highest fence that a resource has seen.
    seen: BTreeMap<LockName, Fence>,
}

impl State {
    fn protocol(&mut self) -> &mut ProtocolFacts {
        self.protocol.get_or_insert_default()
    }

    /// The authority sends an answer.
    pub(crate) fn send(&mut self, caller: Caller, reply: Reply) {
        self.protocol().outbox.push((caller, reply));
    }

    /// The authority has acknowledged a release.
    pub(crate) fn deleted(&mut self, lease: LeaseId) {
        let now = self.now;
        self.protocol().deleted.entry(lease).or_insert(now);
    }

    /// The authority tells of a grant.
    pub(crate) fn told(&mut self, lease: LeaseId, new: bool) {
        self.counts.leases_granted += u64::from(new);
        self.counts.leases_repeated += u64::from(!new);
        let now = self.now;
        let over =
            self.protocol().deleted.get(&lease).is_some_and(|at| now < *at + interlock_core::lease::record::LINGER);
        if over {
            self.violated(|| format!("{lease:?} was given back before, and is granted at {now:?}"));
        }
    }

    /// The authority has lost its memory: what it knew of the end of leases, too.
    pub(crate) fn forgot(&mut self) {
        self.protocol().deleted.clear();
    }

    /// A VM of the authority has written a bucket of locks.
    pub(crate) fn check_authority(&mut self, vm: usize, old: &LockBucket, new: &LockBucket) {
        self.trace_left(vm, old, new);
        for queue in new.queues() {
            let before = old.queue(&queue.name).map_or(&[][..], interlock_core::Queue::entries);
            let entries = queue.entries();
            if before == entries {
                continue;
            }
            self.trace.line(|| format!("    authority vm{vm} writes {}: {}", queue.name, crate::oracle::told(entries)));
            self.no_conflict(&queue.name, entries);
            for (at, entry) in entries.iter().enumerate() {
                let stood = before.iter().find(|other| other.lease == entry.lease);
                // By its fence: a grant that nobody had been told of may end and be made anew in one write.
                if entry.is_held() && stood.is_none_or(|stood| stood.fence() != entry.fence()) {
                    self.granted_by_authority(&queue.name, entries, at, stood.is_some());
                }
            }
        }
    }

    /// Notes in the trace who has left a lock altogether.
    pub(crate) fn trace_left(&mut self, vm: usize, old: &LockBucket, new: &LockBucket) {
        for queue in old.queues().iter().filter(|queue| new.queue(&queue.name).is_none()) {
            self.trace.line(|| format!("    authority vm{vm} writes {}: nobody", queue.name));
        }
    }

    fn no_conflict(&mut self, name: &LockName, entries: &[Entry]) {
        for (at, a) in entries.iter().enumerate().filter(|(_, entry)| entry.is_held()) {
            for b in entries[at + 1..].iter().filter(|entry| entry.is_held()) {
                if conflict(a, b) {
                    self.violated(|| format!("{name}: conflicting: {}", crate::oracle::told(entries)));
                }
            }
        }
    }

    fn granted_by_authority(&mut self, name: &LockName, entries: &[Entry], at: usize, stood: bool) {
        let (entry, now) = (&entries[at], self.now);
        let Stand::Held { fence, .. } = entry.state else { return };
        let key = (name.clone(), entry.lease);
        // Several, where a lease was asked for again after a restart that forgot it: a receipt of any of them may come back.
        let known = !self.protocol().grants.entry(key).or_default().insert(fence);
        let grace = !self.sessions.record.grace_left(self.rules.grace, now).is_zero();
        if known {
            // It comes back by its receipt.
            self.counts.restored += u64::from(grace);
            return;
        }
        let earlier = |other: &&Entry| matches!(other.state, Stand::Held { fence: of, .. } if of <= fence);
        let own = owned(entry, entries.iter().filter(earlier));
        let re_entry = own.is_some_and(|(gives, of)| suffices(gives, entry.mode) && of == fence);
        let highest = self.protocol().highest.entry(name.clone()).or_default();
        let before = *highest;
        *highest = before.max(fence);
        self.counts.grants += 1;
        self.counts.hand_overs += u64::from(stood);
        if grace {
            self.violated(|| format!("{name}: {} is granted in the grace period at {now:?}", entry.owner));
        }
        if !re_entry && fence <= before {
            self.violated(|| format!("{name}: fence {fence} after {before} at {now:?}"));
        }
    }
}

/// No two proxies believe in leases that conflict.
pub(super) fn beliefs(state: &mut State, proxies: &[Proxy]) {
    let mut believed: Vec<(usize, &Served)> = Vec::new();
    for proxy in proxies {
        let now = state.now + proxy.ahead;
        for served in proxy.requests.values().filter(|served| proxy.relies(served, now)) {
            for (other_proxy, other) in &believed {
                let clash = other.owner != served.owner && clash(served, other);
                if let Some(lock) = clash.then(|| served.locks[0].0.clone()) {
                    let now = state.now;
                    state.violated(|| {
                        let (a, b) = (proxy.number, other_proxy);
                        let (x, y) = (&served.owner, &other.owner);
                        format!("proxy{a} for {x} and proxy{b} for {y} both believe in {lock} or near it at {now:?}")
                    });
                }
            }
            believed.push((proxy.number, served));
        }
    }
    state.counts.beliefs += u64::try_from(believed.len()).unwrap_or(0);
}

/// Whether two leases may not be held together, by the grants themselves: intents on ancestors too.
fn clash(a: &Served, b: &Served) -> bool {
    let grants = |served: &Served| served.grant.as_ref().map(|grant| grant.grants.clone()).unwrap_or_default();
    let other = grants(b);
    grants(a)
        .iter()
        .any(|mine| other.iter().any(|theirs| mine.name == theirs.name && modes_conflict(mine.mode, theirs.mode)))
}

/// A request uses the resources behind its locks, which take no fence below the highest that they have seen. One that may
/// rely on its lease is always let in.
pub(super) fn uses(state: &mut State, proxy: &Proxy, served: &Served) {
    let now = state.now + proxy.ahead;
    if !proxy.relies(served, now) {
        return;
    }
    let Some(grant) = served.grant.clone() else { return };
    for grant in grant.grants.iter().filter(|grant| grant.mode == interlock_core::Mode::Exclusive) {
        let seen = state.protocol().seen.entry(grant.name.clone()).or_default();
        let before = *seen;
        *seen = before.max(grant.fence);
        state.counts.uses += 1;
        if grant.fence < before {
            let (number, fence, name) = (proxy.number, grant.fence, &grant.name);
            state.violated(|| format!("proxy{number} is valid and is shut out of {name}: {fence} after {before}"));
        }
    }
}
