//! The lines that requests of this VM stand in, as etcd last told of them, and the one stream on which it tells.
//!
//! Each line is a range of its own and watched as such, from the revision on at which it was read: so nothing that happens in
//! it is missed, and nothing is heard of other lines. What the stream does not tell, for it may break, is read now and then.

use std::collections::{BTreeMap, BTreeSet};

use interlock_core::keyed::{self, Key, Moment};
use interlock_core::{Duration, LeaseId, LockName, Queue, Time};
use prost::Message;

use super::keys::{self, Unreadable};
use super::proto::{EventType, WatchResponse};
use super::trouble::Trouble;
use super::txn::{self, Told};
use super::wire::{Opened, Out, What};
use super::{Etcd, PAUSE};
use crate::host::{ContextId, Host};

/// How often a line is read though it is watched.
const BACKSTOP: Duration = Duration::from_secs(5);

/// The same, while it is not.
const UNWATCHED: Duration = Duration::from_millis(500);

/// The line of a lock.
#[derive(Debug)]
pub struct Line {
    /// What it is called on the stream.
    pub(super) id: i64,
    pub(super) keys: BTreeMap<LeaseId, Key>,
    /// As of which revision.
    pub(super) revision: u64,
    /// Who of this VM stands in it.
    pub(super) standing: BTreeSet<ContextId>,
    /// Whether the stream was asked to tell of it.
    pub(super) watched: bool,
    /// When it is read anew if nothing is heard.
    read_at: Time,
}

impl Line {
    /// The line by the rules of the core.
    pub(super) fn queue(&self, lock: &LockName, moment: Moment) -> Queue {
        keyed::line(lock, self.keys.values(), moment)
    }

    fn replace(&mut self, keys: Vec<Key>, revision: u64) {
        if revision >= self.revision {
            self.keys = keys.into_iter().map(|key| (key.lease, key)).collect();
            self.revision = revision;
        }
    }
}

/// The stream that tells of lines.
#[derive(Debug, Default)]
pub struct Watch {
    pub(super) stream: Option<Opened>,
    /// When it is opened again.
    pub(super) again_at: Time,
    names: i64,
    /// When a line has to be read, at the earliest.
    due: Option<Time>,
}

impl Watch {
    pub(super) fn due(&self) -> Time {
        self.due.unwrap_or(Time::NEVER)
    }
}

impl Etcd {
    /// A request stands in a line, which was read at a revision.
    pub(super) fn enter_line(&mut self, now: Time, lock: &LockName, stream: ContextId, keys: Vec<Key>, revision: u64) {
        let names = &mut self.watch.names;
        let line = self.lines.entry(lock.clone()).or_insert_with(|| {
            *names += 1;
            let (keys, standing) = (BTreeMap::new(), BTreeSet::new());
            Line { id: *names, keys, revision: 0, standing, watched: false, read_at: Time::NEVER }
        });
        line.replace(keys, revision);
        line.standing.insert(stream);
        line.read_at = line.read_at.min(now + BACKSTOP);
        let due = self.watch.due.get_or_insert(line.read_at);
        *due = (*due).min(line.read_at);
        if !line.watched {
            self.outbox.push_back(Out::Watch(lock.clone()));
        }
    }

    /// A request stands in a line no more.
    pub(super) fn leave_line(&mut self, lock: &LockName, stream: ContextId) {
        let Some(line) = self.lines.get_mut(lock) else { return };
        line.standing.remove(&stream);
        if line.standing.is_empty() {
            if line.watched {
                self.outbox.push_back(Out::Unwatch(line.id));
            }
            self.lines.remove(lock);
        }
    }

    /// A line was read anew.
    pub(super) fn renew_line(&mut self, lock: &LockName, keys: Vec<Key>, revision: u64) {
        if let Some(line) = self.lines.get_mut(lock) {
            line.replace(keys, revision);
        }
    }

    /// The answer to a question for a line.
    pub(super) fn line_read(
        &mut self,
        host: &dyn Host,
        now: Time,
        lock: &LockName,
        mut told: Told,
    ) -> Result<(), Unreadable> {
        let keys = told.line()?;
        self.renew_line(lock, keys, told.revision);
        if self.lines.get(lock).is_some_and(|line| !line.watched) {
            self.outbox.push_back(Out::Watch(lock.clone()));
        }
        self.judge(host, now, lock);
        Ok(())
    }

    /// A line could not be read.
    pub(super) fn line_failed(&mut self, now: Time, lock: &LockName) {
        self.reread(lock, now + UNWATCHED);
    }

    /// Has a line read at that time at the latest.
    pub(super) fn reread(&mut self, lock: &LockName, at: Time) {
        if let Some(line) = self.lines.get_mut(lock) {
            line.read_at = line.read_at.min(at);
            let due = self.watch.due.get_or_insert(at);
            *due = (*due).min(at);
        }
    }

    /// The stream has told something.
    pub(super) fn seen(&mut self, host: &dyn Host, now: Time, response: &WatchResponse) {
        let found = self.lines.iter_mut().find(|(_, line)| line.id == response.watch_id);
        // It may be of one that nobody stands in any more.
        let Some((lock, line)) = found else { return };
        let lock = lock.clone();
        if response.canceled {
            line.watched = false;
            let trouble = match response.compact_revision {
                0 if response.cancel_reason.contains("permission") => Trouble::Permission,
                0 => Trouble::Unreachable,
                _ => Trouble::Compacted,
            };
            self.note(trouble);
            // It is read, and then watched from there on.
            return self.reread(&lock, now);
        }
        let before = line.revision;
        let mut foreign = false;
        for event in &response.events {
            let Some(kv) = &event.kv else { continue };
            let revision = u64::try_from(kv.mod_revision).unwrap_or(0);
            // What was read already is no news.
            if revision <= before {
                continue;
            }
            line.revision = line.revision.max(revision);
            if event.kind == i32::from(EventType::Delete) {
                if let Some(lease) = keys::lease_of(&kv.key) {
                    line.keys.remove(&lease);
                }
            } else if let Ok(key) = keys::read_place(kv) {
                line.keys.insert(key.lease, key);
            } else {
                foreign = true;
            }
        }
        if foreign {
            self.note(Trouble::Foreign);
            return self.foreign_key(&lock);
        }
        self.judge(host, now, &lock);
    }

    /// The stream is gone, and may be opened again a little later.
    pub(super) fn watch_lost(&mut self, now: Time) {
        self.watch.stream = None;
        self.watch.again_at = now + PAUSE;
        for line in self.lines.values_mut() {
            line.watched = false;
            line.read_at = line.read_at.min(now + PAUSE);
        }
        self.watch.due = self.lines.values().map(|line| line.read_at).min();
    }

    /// Reads the lines that it is time to read; those that are not watched are watched from there on.
    pub(super) fn keep_lines(&mut self, now: Time) {
        if now < self.watch.due() {
            return;
        }
        let mut due = Time::NEVER;
        let mut unread = Vec::new();
        for (lock, line) in &mut self.lines {
            if line.read_at <= now {
                unread.push(lock.clone());
                line.read_at = now + if line.watched { BACKSTOP } else { UNWATCHED };
            }
            due = due.min(line.read_at);
        }
        self.watch.due = (due < Time::NEVER).then_some(due);
        for lock in unread {
            let message = txn::look(&self.names, &[], std::slice::from_ref(&lock)).encode_to_vec();
            self.outbox.push_back(Out::Call(message, What::Line { lock }));
        }
    }
}
