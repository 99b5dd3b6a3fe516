//! The search for cycles of a request that waits, or that has overtaken others: what is read for it, and what comes of it. The
//! search itself is the core's ([`Chase`]).

use interlock_core::keyed::{self, Chase, Moment, Need};
use interlock_core::{Cause, Duration, Limit, LockName, OwnerId, Queue, Time};

use super::claim::{Phase, Who, backend};
use super::keys::Unreadable;
use super::trouble::Trouble;
use super::txn::{self, MOST, Told};
use super::wire::What;
use super::{Entry, Etcd, PAUSE};
use crate::host::{ContextId, Host};

impl Etcd {
    /// Looks for cycles through a request that has to wait. `upgrades`: before others, who may be waited for by another of
    /// its owner's requests.
    pub(super) fn begin_chase(
        &mut self,
        host: &dyn Host,
        now: Time,
        stream: ContextId,
        lock: &LockName,
        queue: &Queue,
        upgrades: bool,
    ) {
        let Some(entry) = self.entries.get_mut(&stream) else { return };
        let owner = entry.request.owner().clone();
        let chase = if upgrades {
            Chase::new(owner, None)
        } else {
            let mut chase = Chase::new(owner.clone(), Some(entry.lease()));
            chase.waits(owner, vec![lock.clone()]);
            // It was read when its key was there already.
            let keys = self.lines.get(lock).into_iter().flat_map(|line| line.keys.values());
            chase.line(queue.clone(), keys, entry.rules.classes.of(lock).permits);
            chase
        };
        entry.phase = Phase::Standing { fresh: false, moving: false, chase: Some(Box::new(chase)) };
        self.chase(host, now, stream);
    }

    /// Goes on with a search.
    pub(super) fn chase(&mut self, host: &dyn Host, now: Time, stream: ContextId) {
        let Some(entry) = self.entries.get_mut(&stream) else { return };
        let lease = entry.lease();
        let proves = matches!(entry.phase, Phase::Proving { .. });
        let Some(need) = entry.phase.chase().map(Chase::step) else { return };
        match need {
            Need::Read { mut owners, mut locks } => {
                owners.truncate(MOST);
                locks.truncate(MOST);
                let message = txn::look(&self.names, &owners, &locks);
                self.send(host, now, &message, What::Look { stream, lease, owners, locks }, None);
            }
            Need::Clear if proves => self.go_on(host, now, stream),
            Need::Clear => {
                if let Phase::Standing { chase, .. } = &mut entry.phase {
                    *chase = None;
                }
            }
            Need::Cycle(_) if proves && entry.grants.last().is_some_and(|grant| waits_not(entry, &grant.name)) => {
                // Who does not wait is no part of a deadlock: those in the line stand in its way.
                self.refuse(stream, Cause::Held { holders: Vec::new(), retry_after: Duration::from_millis(1) });
            }
            Need::Cycle(cycle) => self.refuse(stream, Cause::Deadlock { cycle }),
            Need::TooLong => {
                let value = u64::try_from(interlock_core::cycle::MAX_OWNERS).unwrap_or(u64::MAX);
                self.refuse(stream, Cause::Limit { limit: Limit::WaitChain, value });
            }
            Need::Restless => {
                let detail =
                    String::from("the waits around this one change too fast to tell whether they close a cycle");
                self.refuse(stream, Cause::Backend { detail });
            }
        }
    }

    /// What a search needs has been read.
    pub(super) fn looked(
        &mut self,
        host: &dyn Host,
        now: Time,
        who: Who,
        owners: &[OwnerId],
        locks: &[LockName],
        mut told: Told,
    ) -> Result<(), Unreadable> {
        if !self.is_at(who, |_| true) {
            return Ok(());
        }
        let moment = Moment { now, unix_micros: host.unix_micros() };
        let Some(entry) = self.entries.get_mut(&who.0) else { return Ok(()) };
        let rules = entry.rules.clone();
        let Some(chase) = entry.phase.chase() else { return Ok(()) };
        for owner in owners {
            let items = told.items()?;
            chase.waits(owner.clone(), items.iter().filter_map(keyed::Listed::waits_for).cloned().collect());
        }
        for lock in locks {
            let keys = told.line()?;
            chase.line(keyed::line(lock, &keys, moment), &keys, rules.classes.of(lock).permits);
        }
        self.chase(host, now, who.0);
        Ok(())
    }

    /// What a search needs could not be read.
    pub(super) fn look_failed(&mut self, now: Time, who: Who, trouble: Trouble) {
        if !self.is_at(who, |phase| matches!(phase, Phase::Standing { chase: Some(_), .. } | Phase::Proving { .. })) {
            return;
        }
        let proves = self.is_at(who, |phase| matches!(phase, Phase::Proving { .. }));
        if trouble.lasts() || proves {
            return self.refuse(who.0, backend(trouble));
        }
        self.set_timer(who.0, Some(now + PAUSE));
    }
}

/// Whether a lock was asked for by a request that does not wait.
fn waits_not(entry: &Entry, lock: &LockName) -> bool {
    entry.request.wants().iter().any(|want| want.name == *lock && want.wait.is_zero())
}
