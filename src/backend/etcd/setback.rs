//! What becomes of requests when a call comes to nothing, a key or the whole session is gone, or somebody else's key is in their
//! line: they begin anew, are refused, or are told that they have lost what they held.

use interlock_core::{Cause, LeaseId, LockName, Loss, Time};

use super::claim::{Phase, TRIES, Who, backend};
use super::trouble::Trouble;
use super::{Entry, Etcd, News, PAUSE};
use crate::host::{ContextId, Host};

impl Etcd {
    /// The next locks of a request could not be asked for.
    pub(super) fn attempt_failed(&mut self, host: &dyn Host, now: Time, who: Who, trouble: Trouble) {
        if self.is_at(who, |phase| matches!(phase, Phase::Trying)) {
            self.retry(host, now, who.0, trouble);
        }
    }

    /// Begins anew a little later, unless it has been tried for long enough or there is no hope.
    pub(super) fn retry(&mut self, host: &dyn Host, now: Time, stream: ContextId, trouble: Trouble) {
        let Some(entry) = self.entries.get_mut(&stream) else { return };
        entry.own = None;
        entry.doubtful |= trouble.is_doubtful();
        entry.failing.get_or_insert(now);
        entry.trouble = Some(trouble);
        let enough = self
            .entries
            .get(&stream)
            .is_some_and(|entry| self.patience(entry, now) <= now || trouble.lasts() || !entry.grants.is_empty());
        if enough {
            return self.refuse(stream, backend(trouble));
        }
        self.rename(host, now, stream);
        self.set_timer(stream, Some(now + PAUSE));
    }

    /// How long a request whose calls fail is tried: for one timeout, or for as long as it waits, if that is longer, and a
    /// session can be saved. Members need a second or two to find another leader.
    pub(super) fn patience(&self, entry: &Entry, now: Time) -> Time {
        let since = entry.failing.unwrap_or(now);
        (since + self.at.timeout).max(entry.deadline().min(since + self.at.session_ttl))
    }

    /// Goes on under another identity; what may be there of this one is given back.
    pub(super) fn rename(&mut self, host: &dyn Host, now: Time, stream: ContextId) {
        self.give_back(now, stream);
        let Some(entry) = self.entries.get_mut(&stream) else { return };
        let Ok(fresh) = host.random() else { return self.refuse(stream, backend(Trouble::Dispatch)) };
        entry.request = entry.request.clone().renamed(LeaseId(fresh));
        (entry.phase, entry.wrote, entry.doubtful) = (Phase::Pausing, false, false);
    }

    /// A step up could not be made, or nobody can tell.
    pub(super) fn move_failed(&mut self, host: &dyn Host, now: Time, who: Who, trouble: Trouble) {
        if self.is_at(who, |phase| matches!(phase, Phase::Trying)) {
            return self.retry(host, now, who.0, trouble);
        }
        let Some(entry) = self.entries.get_mut(&who.0).filter(|entry| entry.lease() == who.1) else { return };
        let Phase::Standing { moving, .. } = &mut entry.phase else { return };
        *moving = false;
        entry.doubtful |= trouble.is_doubtful();
        if trouble.lasts() {
            return self.refuse(who.0, backend(trouble));
        }
        // The line tells whether it was made.
        if let Some(lock) = entry.next().map(|want| want.name.clone()) {
            self.reread(&lock, now + PAUSE);
        }
    }

    /// The key of a request that stands in a line has gone.
    pub(super) fn lost_place(&mut self, host: &dyn Host, now: Time, stream: ContextId) {
        let Some(entry) = self.entries.get_mut(&stream) else { return };
        let lock = entry.next().map(|want| want.name.clone());
        entry.tries += 1;
        if !entry.grants.is_empty() || entry.tries >= TRIES {
            return self.refuse(stream, Cause::LeaseLost { loss: Loss::Expired });
        }
        if let Some(lock) = lock {
            self.leave_line(&lock, stream);
        }
        self.rename(host, now, stream);
        self.begin(host, now, stream, None);
    }

    /// The session has ended, and everything that hung on it.
    pub(super) fn all_lost(&mut self, host: &dyn Host, now: Time) {
        for stream in self.in_phase(|phase| !matches!(phase, Phase::Over)) {
            let Some(entry) = self.entries.get_mut(&stream) else { continue };
            if matches!(entry.phase, Phase::Pausing) && entry.grants.is_empty() {
                continue;
            }
            if matches!(entry.phase, Phase::Held) {
                entry.phase = Phase::Over;
                entry.wrote = false;
                self.tell(stream, News::Lost);
            } else {
                // What is under way still has an answer to come, to nobody.
                if let Some(token) = entry.own.take() {
                    self.drop_sent(token);
                }
                self.lost_place(host, now, stream);
            }
        }
    }

    /// Somebody else's key is in the line of a lock: nobody can tell who holds it.
    pub(super) fn foreign_key(&mut self, lock: &LockName) {
        let standing = self.lines.get(lock).map(|line| line.standing.clone()).unwrap_or_default();
        for stream in standing {
            self.refuse(stream, backend(Trouble::Foreign));
        }
    }

    /// There is no session for those who wait for one.
    pub(super) fn hold_all(&mut self, now: Time, trouble: Trouble) {
        for stream in self.in_phase(|phase| matches!(phase, Phase::Pausing)) {
            if trouble.lasts() {
                self.refuse(stream, backend(trouble));
            } else {
                self.set_timer(stream, Some(now + PAUSE));
            }
        }
    }
}
