//! What is given back: keys that are deleted, and not waited for, but again and again until etcd has said that they are gone.

use interlock_core::{Duration, LeaseId, Time};
use prost::Message;

use super::claim::Phase;
use super::txn;
use super::wire::{Out, What};
use super::{Etcd, PAUSE};
use crate::host::ContextId;

/// How long after its first deletion what may yet come to be is deleted again.
const AFTERMATH: Duration = Duration::from_secs(5);

/// Keys that are to be deleted.
#[derive(Debug)]
pub(super) struct Debt {
    /// The session that they hang on: they end with it.
    session: i64,
    steps: Vec<Vec<u8>>,
    /// Steps of this round that are not answered.
    pub(super) open: usize,
    /// Whether one of this round has failed.
    failed: bool,
    /// How many rounds have to succeed yet.
    rounds: u32,
    pub(super) again_at: Time,
    failures: u32,
}

impl Etcd {
    /// Has the keys of a request deleted, and its place in a line left.
    pub(super) fn give_back(&mut self, now: Time, stream: ContextId) {
        let Some(entry) = self.entries.get_mut(&stream) else { return };
        let line = matches!(entry.phase, Phase::Standing { .. }).then(|| entry.next().map(|want| want.name.clone()));
        if let Phase::Trying | Phase::Standing { moving: true, .. } = entry.phase {
            entry.doubtful = true;
        }
        let wrote = core::mem::take(&mut entry.wrote);
        if let Some(session) = self.session.any().filter(|_| wrote) {
            let steps = txn::give_back(&self.names, &entry.request);
            let steps = steps.iter().map(Message::encode_to_vec).collect();
            let rounds = if entry.doubtful { 2 } else { 1 };
            let debt = Debt { session, steps, open: 0, failed: false, rounds, again_at: now, failures: 0 };
            let lease = entry.lease();
            self.debts.insert(lease, debt);
            self.pay(lease);
        }
        if let Some(lock) = line.flatten() {
            self.leave_line(&lock, stream);
        }
    }

    /// Asks for the keys of a request to be deleted.
    fn pay(&mut self, lease: LeaseId) {
        let Some(debt) = self.debts.get_mut(&lease) else { return };
        (debt.open, debt.failed) = (debt.steps.len(), false);
        let calls = debt.steps.iter().map(|step| Out::Call(step.clone(), What::Delete { lease }));
        self.outbox.extend(calls);
    }

    /// Goes on with what is to be deleted.
    pub(super) fn pay_debts(&mut self, now: Time) {
        let session = self.session.any();
        self.debts.retain(|_, debt| Some(debt.session) == session);
        let due = |(lease, debt): (&LeaseId, &Debt)| (debt.open == 0 && debt.again_at <= now).then_some(*lease);
        for lease in self.debts.iter().filter_map(due).collect::<Vec<_>>() {
            self.pay(lease);
        }
    }

    /// Keys were deleted.
    pub(super) fn deleted(&mut self, now: Time, lease: LeaseId) {
        self.step_ended(now, lease, false);
    }

    /// Keys could not be deleted: it is tried until they are, or end with their session.
    pub(super) fn delete_failed(&mut self, now: Time, lease: LeaseId) {
        self.step_ended(now, lease, true);
    }

    fn step_ended(&mut self, now: Time, lease: LeaseId, failed: bool) {
        let Some(debt) = self.debts.get_mut(&lease) else { return };
        debt.open = debt.open.saturating_sub(1);
        debt.failed |= failed;
        if debt.open > 0 {
            return;
        }
        if debt.failed {
            debt.failures = (debt.failures + 1).min(5);
            debt.again_at = now + PAUSE * 2_u32.pow(debt.failures);
            return;
        }
        debt.rounds = debt.rounds.saturating_sub(1);
        if debt.rounds == 0 {
            self.debts.remove(&lease);
        } else {
            debt.again_at = now + AFTERMATH;
        }
    }
}
