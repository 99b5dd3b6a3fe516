//! Calls of etcd and streams to it: what was sent and what becomes of the answers.

use interlock_core::{Duration, LeaseId, LockName, OwnerId, Time};
use prost::Message;

use super::proto::{
    LeaseKeepAliveResponse, LeaseRequest, WatchCancelRequest, WatchCreateRequest, WatchRequest, WatchResponse,
};
use super::trouble::Trouble;
use super::txn::{Step, Told};
use super::{Etcd, Phase};
use crate::host::{CallToken, ContextId, Host, HostError, Method, Status, StreamToken};
use crate::policy::Access;

/// How long after its timeout a call that nobody told us of is given up.
const SLACK: Duration = Duration::from_millis(500);

/// The longest message that is read: etcd itself sends none that is longer than a few MiB.
const LONGEST: usize = 64 << 20;

const KV: &str = "etcdserverpb.KV";
const LEASE: &str = "etcdserverpb.Lease";
const WATCH: &str = "etcdserverpb.Watch";
const AUTH: &str = "etcdserverpb.Auth";

/// A call that is not answered.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) at: Time,
    due: Time,
    what: What,
}

/// What a call is about.
#[derive(Debug)]
pub(super) enum What {
    /// The next locks of a request.
    Attempt { stream: ContextId, lease: LeaseId },
    /// A step up in a line.
    Move { stream: ContextId, lease: LeaseId, step: Step },
    /// What a search for cycles needs.
    Look { stream: ContextId, lease: LeaseId, owners: Vec<OwnerId>, locks: Vec<LockName> },
    /// The line of a lock.
    Line { lock: LockName },
    /// Keys that are given back.
    Delete { lease: LeaseId },
    /// A token.
    Login,
    /// A lease of etcd.
    Open { id: i64 },
    /// The end of one.
    Close,
}

impl What {
    fn method(&self) -> (&'static str, &'static str) {
        match self {
            What::Attempt { .. } | What::Move { .. } | What::Look { .. } | What::Line { .. } | What::Delete { .. } => {
                (KV, "Txn")
            }
            What::Login => (AUTH, "Authenticate"),
            What::Open { .. } => (LEASE, "LeaseGrant"),
            What::Close => (LEASE, "LeaseRevoke"),
        }
    }
}

/// A stream of messages, and the root that opened it. It is used within that root, and hears nothing outside of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    pub(super) token: StreamToken,
    root: ContextId,
}

impl Opened {
    /// Sends a message.
    fn send(self, host: &dyn Host, message: &[u8]) -> Result<(), HostError> {
        host.within(self.root, |host| host.grpc_send(self.token, message))?
    }

    /// Resets it. It may be closed already.
    fn cancel(self, host: &dyn Host) {
        let _ = host.within(self.root, |host| host.grpc_cancel(self.token.0));
    }
}

/// What is to be sent by a root.
#[derive(Debug)]
pub(super) enum Out {
    Call(Vec<u8>, What),
    /// The line of a lock is to be watched.
    Watch(LockName),
    /// A watch is needed no more.
    Unwatch(i64),
}

impl Etcd {
    /// Sends a call: at once from the callback of the stream `from`, else by a root.
    pub(super) fn send(
        &mut self,
        host: &dyn Host,
        now: Time,
        message: &impl Message,
        what: What,
        from: Option<ContextId>,
    ) {
        let message = message.encode_to_vec();
        match from {
            Some(stream) => {
                if let Some(token) = self.call(host, now, &message, what)
                    && let Some(entry) = self.entries.get_mut(&stream)
                {
                    entry.own = Some(token);
                }
            }
            None => self.outbox.push_back(Out::Call(message, what)),
        }
    }

    fn call(&mut self, host: &dyn Host, now: Time, message: &[u8], what: What) -> Option<CallToken> {
        let timeout = self.at.timeout;
        match self.with_method(what.method(), |method| host.grpc_call(method, message, timeout)) {
            Ok(token) => {
                let due = now + timeout + SLACK;
                self.due.insert((due, token));
                self.sent.insert(token, Sent { at: now, due, what });
                Some(token)
            }
            Err(error) => {
                // What Envoy refuses at once and gives no reason for is a cluster without a healthy host, or none at all.
                let trouble =
                    if error.status == Status::InternalFailure { Trouble::Unreachable } else { Trouble::Dispatch };
                self.failed(host, now, what, trouble);
                None
            }
        }
    }

    fn with_method<T>(&self, (service, name): (&str, &str), act: impl FnOnce(&Method<'_>) -> T) -> T {
        let mut metadata: Vec<(&str, &[u8])> = Vec::new();
        // A member that has no leader is to say so, and not to keep us waiting.
        if service == WATCH || service == LEASE {
            metadata.push(("hasleader", b"true"));
        }
        let token = match &self.at.access {
            Access::Open => None,
            Access::Token(token) => Some(&**token),
            Access::User { .. } => self.session.token(),
        };
        if let Some(token) = token.filter(|_| service != AUTH) {
            metadata.push(("token", token.as_bytes()));
        }
        let at = &self.at;
        act(&Method { cluster: &at.cluster, authority: &at.authority, service, name, metadata: &metadata })
    }

    /// Sends what is to be sent, from a callback of a root: `root`.
    pub(super) fn send_all(&mut self, host: &dyn Host) {
        self.root.came();
        self.keep_alive(host);
        while let Some(next) = self.outbox.pop_front() {
            let now = host.now();
            match next {
                Out::Call(message, what) => {
                    self.call(host, now, &message, what);
                }
                Out::Watch(lock) => self.send_watch(host, now, &lock),
                Out::Unwatch(watch_id) => {
                    let cancel = Some(WatchCancelRequest { watch_id });
                    let message = WatchRequest { create: None, cancel }.encode_to_vec();
                    if let Some(stream) = self.watch.stream {
                        // A stream that is closed watches nothing.
                        let _ = stream.send(host, &message);
                    }
                }
            }
        }
    }

    /// Opens a stream in the root whose callback has just begun, if one is needed; true if it has tried to.
    ///
    /// One a callback, and before anything else is done there: where no host is healthy Envoy ends the stream at once, calls
    /// back for that while the callback still runs, and does then and there what it had put off until the callback's end. If the
    /// end of another call is among it that is put off again, and the worker does so for ever.
    ///
    /// Not within another root: the SDK takes the one whose callback runs for the stream's own, and would have each message read
    /// there, where there is none.
    pub fn open_stream(&mut self, host: &dyn Host, root: ContextId) -> bool {
        let now = host.now();
        // A root that has gone has taken its streams with it, and nobody was told.
        let gone = |stream: Option<Opened>| stream.is_some_and(|stream| host.within(stream.root, |_| ()).is_err());
        if gone(self.session.stream) {
            self.session.stream_gone(now);
        }
        if gone(self.watch.stream) {
            self.watch_lost(now);
        }
        if self.session.stream.is_none() && self.session.keeps(now, &self.at).is_some() {
            match self.with_method((LEASE, "LeaseKeepAlive"), |method| host.grpc_open(method)) {
                Ok(token) => self.session.stream = Some(Opened { token, root }),
                Err(_) => {
                    self.note(Trouble::Unreachable);
                    self.session.stream_lost(now);
                }
            }
            return true;
        }
        if self.watch.stream.is_none() && !self.lines.is_empty() && self.watch.again_at <= now {
            match self.with_method((WATCH, "Watch"), |method| host.grpc_open(method)) {
                Ok(token) => {
                    self.watch.stream = Some(Opened { token, root });
                    self.outbox.extend(self.lines.keys().cloned().map(Out::Watch));
                }
                Err(_) => {
                    self.note(Trouble::Unreachable);
                    self.watch_lost(now);
                }
            }
            return true;
        }
        false
    }

    /// When [`Etcd::open_stream`] has something to do, besides what the session is due for.
    pub(super) fn watch_due(&self) -> Time {
        if self.watch.stream.is_none() && !self.lines.is_empty() { self.watch.again_at } else { Time::NEVER }
    }

    pub(super) fn close_streams(&mut self, host: &dyn Host) {
        for stream in [self.watch.stream.take(), self.session.stream.take()].into_iter().flatten() {
            stream.cancel(host);
        }
    }

    /// Sends a sign of life, if it is time for one.
    fn keep_alive(&mut self, host: &dyn Host) {
        let now = host.now();
        let (Some(id), Some(stream)) = (self.session.keeps(now, &self.at), self.session.stream) else { return };
        if stream.send(host, &LeaseRequest { id }.encode_to_vec()).is_ok() {
            self.session.kept(now);
        } else {
            self.note(Trouble::Unreachable);
            self.session.stream_lost(now);
        }
    }

    /// Cancels the stream of signs of life that nobody answers: another may reach another member.
    pub(super) fn drop_silent(&mut self, host: &dyn Host) {
        if let Some(stream) = self.session.stream.take() {
            stream.cancel(host);
        }
    }

    fn send_watch(&mut self, host: &dyn Host, now: Time, lock: &LockName) {
        // Without a stream: once there is one.
        let Some(stream) = self.watch.stream else { return };
        let Some(line) = self.lines.get_mut(lock).filter(|line| !line.watched) else { return };
        let (watch_id, from) = (line.id, line.revision);
        line.watched = true;
        let (key, range_end) = self.names.line(lock);
        let start_revision = i64::try_from(from).unwrap_or(i64::MAX).saturating_add(1);
        let create = Some(WatchCreateRequest { key, range_end, start_revision, watch_id });
        let message = WatchRequest { create, cancel: None }.encode_to_vec();
        if stream.send(host, &message).is_err() {
            self.note(Trouble::Unreachable);
            self.watch_lost(now);
        }
    }

    /// The answer to a call has come, to this client: see [`Etcd::awaits`].
    pub fn answered(&mut self, host: &dyn Host, token: CallToken, status: u32) {
        let now = host.now();
        let Some(Sent { at, what, .. }) = self.drop_sent(token) else { return };
        if status != 0 {
            let words = host.grpc_message();
            return self.failed(host, now, what, Trouble::read(status, &words));
        }
        self.notes.took.push(now.since(at));
        let Ok(bytes) = host.message(LONGEST) else { return self.failed(host, now, what, Trouble::Malformed) };
        match what {
            What::Login => self.logged_in(host, now, &bytes),
            What::Open { id } => self.opened(host, (at, now), id, &bytes),
            What::Close => {}
            What::Delete { lease } => self.deleted(now, lease),
            other => match Told::read(&bytes) {
                Some(told) => self.told(host, now, other, told),
                None => self.failed(host, now, other, Trouble::Malformed),
            },
        }
    }

    /// A transaction was answered.
    fn told(&mut self, host: &dyn Host, now: Time, what: What, told: Told) {
        let done = match &what {
            What::Attempt { stream, lease } => self.attempted(host, now, (*stream, *lease), told),
            What::Move { stream, lease, step } => self.moved_up(host, now, (*stream, *lease), step, told),
            What::Look { stream, lease, owners, locks } => {
                self.looked(host, now, (*stream, *lease), owners, locks, told)
            }
            What::Line { lock } => self.line_read(host, now, lock, told),
            What::Login | What::Open { .. } | What::Close | What::Delete { .. } => Ok(()),
        };
        if done.is_err() {
            self.failed(host, now, what, Trouble::Foreign);
        }
    }

    /// A call came to nothing.
    fn failed(&mut self, host: &dyn Host, now: Time, what: What, trouble: Trouble) {
        self.note(trouble);
        match trouble {
            Trouble::Token => self.session.forget_token(),
            Trouble::NoLease if !matches!(what, What::Close) => self.session_lost(host, now),
            _ => {}
        }
        match what {
            What::Attempt { stream, lease } => self.attempt_failed(host, now, (stream, lease), trouble),
            What::Move { stream, lease, .. } => self.move_failed(host, now, (stream, lease), trouble),
            What::Look { stream, lease, .. } => self.look_failed(now, (stream, lease), trouble),
            What::Line { lock } => self.line_failed(now, &lock),
            What::Delete { lease } => self.delete_failed(now, lease),
            What::Login | What::Open { .. } => self.not_opened(now, trouble),
            What::Close => {}
        }
    }

    /// Nobody will be told of the answer to a call.
    pub(super) fn give_up(&mut self, host: &dyn Host, now: Time, token: CallToken) {
        if let Some(Sent { what, .. }) = self.drop_sent(token) {
            self.failed(host, now, what, Trouble::NoAnswer);
        }
    }

    pub(super) fn drop_sent(&mut self, token: CallToken) -> Option<Sent> {
        let sent = self.sent.remove(&token)?;
        self.due.remove(&(sent.due, token));
        Some(sent)
    }

    /// Whether a stream is one of this client's.
    pub fn has(&self, stream: StreamToken) -> bool {
        self.is_watch(stream) || self.is_keep_alive(stream)
    }

    fn is_watch(&self, stream: StreamToken) -> bool {
        self.watch.stream.is_some_and(|watch| watch.token == stream)
    }

    fn is_keep_alive(&self, stream: StreamToken) -> bool {
        self.session.stream.is_some_and(|signs| signs.token == stream)
    }

    /// A message has come on a stream of this client's.
    pub fn message(&mut self, host: &dyn Host, stream: StreamToken) {
        let now = host.now();
        // All of etcd's messages have something in them.
        let bytes = host.message(LONGEST).unwrap_or_default();
        if self.is_keep_alive(stream) {
            match LeaseKeepAliveResponse::decode(bytes.as_slice()) {
                Ok(response) if !bytes.is_empty() => {
                    if self.session.answered(response.id, response.ttl) {
                        self.note(Trouble::NoLease);
                        self.session_lost(host, now);
                    }
                }
                _ => self.note(Trouble::Malformed),
            }
        } else if self.is_watch(stream) {
            match WatchResponse::decode(bytes.as_slice()) {
                Ok(response) if !bytes.is_empty() => self.seen(host, now, &response),
                _ => {
                    self.note(Trouble::Malformed);
                    if let Some(watch) = self.watch.stream {
                        watch.cancel(host);
                    }
                    self.watch_lost(now);
                }
            }
        }
    }

    /// A stream of this client's was closed by the other side.
    pub fn closed(&mut self, host: &dyn Host, stream: StreamToken, status: u32) {
        let now = host.now();
        let trouble = Trouble::read(status, &host.grpc_message());
        self.note(trouble);
        if trouble == Trouble::Token {
            self.session.forget_token();
        }
        if self.is_watch(stream) {
            self.watch_lost(now);
        }
        if self.is_keep_alive(stream) {
            self.session.stream_lost(now);
        }
    }

    /// Whether a request is at that point still.
    pub(super) fn is_at(&self, (stream, lease): (ContextId, LeaseId), at: impl FnOnce(&Phase) -> bool) -> bool {
        self.entries.get(&stream).is_some_and(|entry| entry.lease() == lease && at(&entry.phase))
    }
}
