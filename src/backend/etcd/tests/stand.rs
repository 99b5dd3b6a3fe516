//! A VM with an etcd of its own ([`Store`]), on a virtual clock. Calls and messages go where a test says. What must not live
//! here: what a test expects.

use std::rc::Rc;
use std::sync::Arc;

use interlock_core::{Classes, Duration, Limits, LockName, Mode, OwnerId, Rules, Want};
use prost::Message;

use super::store::{Failure, Store};
use crate::backend::etcd::{Etcd, Lease, Waiting, Wish};
use crate::backend::remote::Remote;
use crate::backend::{self, Outcome, Purpose};
use crate::host::fake::{FakeHost, FakeProxy, GrpcAnswer};
use crate::host::{ContextId, Host, StreamToken};
use crate::policy::{Access, Etcd as At};

/// The root that callbacks are of, at first.
pub(super) const ROOT: u32 = 1;

pub(super) struct Stand {
    pub(super) host: FakeHost,
    pub(super) etcd: Etcd,
    pub(super) store: Store,
    root: u32,
    requests: u32,
    /// What all calls fail with.
    pub(super) refuses: Option<Failure>,
    /// So many calls are done, and their answers lost.
    pub(super) loses: usize,
    /// Nothing is answered at all.
    pub(super) silent: bool,
    /// The methods that were called since this was last emptied.
    pub(super) called: Vec<String>,
    /// What went wrong, by the backend's own account.
    pub(super) failures: Vec<&'static str>,
}

pub(super) fn at(access: Access) -> At {
    At {
        cluster: "etcd".into(),
        authority: String::new(),
        prefix: "/t".into(),
        access,
        session_ttl: Duration::from_secs(6),
        timeout: Duration::from_secs(1),
    }
}

impl Stand {
    pub(super) fn new() -> Self {
        Self::with(Access::Open)
    }

    pub(super) fn with(access: Access) -> Self {
        let host = FakeProxy::new().host();
        host.set_root(ROOT);
        let etcd = Etcd::open(&host, "t", 1, Arc::new(at(access)), Purpose::Enforce).unwrap();
        Stand {
            host,
            etcd,
            store: Store::default(),
            root: ROOT,
            requests: 0,
            refuses: None,
            loses: 0,
            silent: false,
            called: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// With a session, so that nothing but what a request itself needs is called for.
    pub(super) fn warm() -> Self {
        let mut stand = Self::new();
        let lease = stand.take("warm", "w/1");
        stand.release(lease);
        stand.run(Duration::from_secs(3));
        stand.called.clear();
        stand
    }

    /// The same, where one holds `a/1` and two waits for it so many seconds.
    pub(super) fn contended(wait: u64) -> (Self, Lease, Waiting) {
        let mut stand = Self::warm();
        let first = stand.take("one", "a/1");
        let second = stand.ask("two", "a/1", wait);
        stand.run(Duration::from_millis(100));
        (stand, first, second)
    }

    /// A request takes a lock that is free.
    pub(super) fn take(&mut self, owner: &str, lock: &str) -> Lease {
        let waiting = self.ask(owner, lock, 5);
        self.deliver();
        self.granted(waiting)
    }

    /// A request asks for a lock, and waits for it so many seconds.
    pub(super) fn ask(&mut self, owner: &str, lock: &str, wait: u64) -> Waiting {
        self.requests += 1;
        let stream = self.host.open(100 + self.requests, &[]);
        let want = Want {
            name: LockName::parse(lock).unwrap(),
            mode: Mode::Exclusive,
            wait: Duration::from_secs(wait),
            ttl: Duration::from_secs(1),
            hold: Duration::from_secs(600),
        };
        let limits = Limits {
            locks_per_owner: None,
            waiters_per_lock: 8,
            locks: 1000,
            waiters: 100,
            longest_ttl: Duration::from_secs(600),
        };
        let rules = Rc::new(Rules { classes: Classes::default(), limits, grace: Duration::ZERO });
        let wish = Wish {
            owner: OwnerId::new(owner).unwrap(),
            reentrant: true,
            wants: vec![want],
            asked_by: "a test".into(),
            arrived: self.host.now(),
            rules,
        };
        let waiting = self.etcd.ask(&self.host, stream, wish).unwrap();
        self.etcd.call_root(&self.host).unwrap();
        waiting
    }

    /// The lease of a request that has its locks.
    pub(super) fn granted(&mut self, waiting: Waiting) -> Lease {
        match self.etcd.poll(waiting) {
            Outcome::Granted(backend::Lease::Etcd(lease)) => lease,
            other => panic!("not granted: {other:?}"),
        }
    }

    /// A request that waits still.
    pub(super) fn waits(&mut self, waiting: Waiting) -> Waiting {
        match self.etcd.poll(waiting) {
            Outcome::Waiting(backend::Waiting::Etcd(waiting)) => waiting,
            other => panic!("it does not wait: {other:?}"),
        }
    }

    /// Why a request was refused.
    pub(super) fn refused(&mut self, waiting: Waiting) -> String {
        match self.etcd.poll(waiting) {
            Outcome::Refused(reject) => format!("{reject:?}"),
            other => panic!("not refused: {other:?}"),
        }
    }

    pub(super) fn release(&mut self, lease: Lease) {
        self.host.run(Some(lease.stream));
        assert_eq!(self.etcd.release(&self.host, lease), []);
        self.etcd.call_root(&self.host).unwrap();
    }

    /// The stream leaves while it waits.
    pub(super) fn cancel(&mut self, waiting: Waiting) {
        self.host.run(Some(waiting.stream));
        self.etcd.cancel(&self.host, waiting);
        self.etcd.call_root(&self.host).unwrap();
    }

    /// Another root takes the place of the one that has been.
    pub(super) fn change_root(&mut self) {
        self.host.drop_root(self.root);
        self.store.unwatch();
        self.root += 1;
        self.host.set_root(self.root);
        self.host.run(None);
        self.etcd.listen(&self.host).unwrap();
    }

    /// All streams of messages end.
    pub(super) fn break_streams(&mut self) {
        self.store.unwatch();
        for stream in self.host.open_streams() {
            let cut = GrpcAnswer::Status(14, "upstream connect error or disconnect/reset before headers".into());
            assert!(self.host.deliver(stream.token, cut));
            self.etcd.closed(&self.host, stream.token, 14);
            self.end_callback();
        }
    }

    fn end_callback(&mut self) {
        self.host.delivered();
        self.etcd.flush(&self.host);
        let notes = self.etcd.take_notes();
        self.failures.extend(notes.failures);
    }

    fn tick(&mut self) {
        self.host.set_root(self.root);
        self.host.run(None);
        self.etcd.open_stream(&self.host, ContextId(self.root));
        self.etcd.tick(&self.host);
        self.end_callback();
    }

    /// Everything that is under way arrives, without time passing.
    pub(super) fn deliver(&mut self) {
        loop {
            let mut idle = true;
            for queue in self.host.notices() {
                idle = false;
                self.host.set_root(self.root);
                self.host.run(None);
                self.etcd.open_stream(&self.host, ContextId(self.root));
                assert!(self.etcd.heard(&self.host, queue));
                self.end_callback();
            }
            if self.silent {
                if idle {
                    return;
                }
                continue;
            }
            for call in self.host.open_methods() {
                idle = false;
                self.called.push(call.method.1.clone());
                let mut done = match self.refuses {
                    Some(failure) => Err(failure),
                    None => self.store.call(&call.method.1, &call.message),
                };
                if self.loses > 0 && call.method.1 == "Txn" {
                    self.loses -= 1;
                    done = Err((14, "upstream connect error or disconnect/reset before headers"));
                }
                let (status, answer) = match done {
                    Ok(message) => (0, GrpcAnswer::Message(message)),
                    Err((status, words)) => (status, GrpcAnswer::Status(status, words.into())),
                };
                // Who left is told nothing.
                if self.host.answer_method(call.token, answer).is_none() {
                    continue;
                }
                self.etcd.answered(&self.host, call.token, status);
                if call.stream.is_some() {
                    self.host.delivered();
                    self.etcd.call_root(&self.host).unwrap();
                } else {
                    self.end_callback();
                }
            }
            for stream in self.host.open_streams() {
                let mut answers = Vec::new();
                for message in self.host.take_sent(stream.token) {
                    answers.push(match stream.method.1.as_str() {
                        "LeaseKeepAlive" => self.store.keep_alive(&message),
                        _ => self.store.watch(&message).encode_to_vec(),
                    });
                }
                if stream.method.1 == "Watch" {
                    answers.extend(self.store.news().iter().map(Message::encode_to_vec));
                }
                for answer in answers {
                    idle = false;
                    self.message(stream.token, answer);
                }
            }
            if idle {
                return;
            }
        }
    }

    fn message(&mut self, token: StreamToken, message: Vec<u8>) {
        // It may have been given up meanwhile.
        if self.host.deliver(token, GrpcAnswer::Message(message)) && self.etcd.has(token) {
            self.etcd.message(&self.host, token);
            self.end_callback();
        }
    }

    /// Time passes, and everything in it happens when it is due.
    pub(super) fn run(&mut self, span: Duration) {
        let end = self.host.now() + span;
        loop {
            self.deliver();
            let now = self.host.now();
            let due = self.etcd.next_due().max(now + Duration::from_millis(1));
            if due > end {
                self.host.proxy().advance(end.since(now));
                return self.deliver();
            }
            self.host.proxy().advance(due.since(now));
            self.tick();
        }
    }
}
