//! Calls of other services: what the plugin sent, and the answers that a test gives, loses, doubles or delays.

use std::collections::BTreeMap;

use interlock_core::{Duration, Time};

use super::FakeHost;
use crate::host::{Call, CallToken, ContextId};

/// A call that was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SentCall {
    pub(crate) token: CallToken,
    /// The root to which the answer goes, or whose stream it goes to.
    pub(crate) root: u32,
    /// The stream to which the answer goes, if one sent it.
    pub(crate) stream: Option<ContextId>,
    pub(crate) cluster: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
    pub(crate) timeout: Duration,
    /// When the host gives it up.
    pub(crate) due: Time,
}

impl SentCall {
    /// `:method` and `:path`.
    pub(crate) fn target(&self) -> (&str, &str) {
        (&self.headers[":method"], &self.headers[":path"])
    }
}

/// An answer to a call. Without headers it is one that was cut.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct CallAnswer {
    pub(crate) headers: Option<Vec<(String, Vec<u8>)>>,
    pub(crate) body: Vec<u8>,
}

impl CallAnswer {
    /// An answer with that status.
    pub(crate) fn new(status: u32, body: &[u8]) -> Self {
        let headers = Some(vec![(String::from(":status"), status.to_string().into_bytes())]);
        CallAnswer { headers, body: body.to_vec() }
    }

    /// With a header more.
    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.get_or_insert_default().push((name.to_owned(), value.as_bytes().to_vec()));
        self
    }

    /// How many headers it has, as the host tells the plugin.
    pub(crate) fn count(&self) -> usize {
        self.headers.as_ref().map_or(0, Vec::len)
    }
}

/// The calls of one VM.
#[derive(Default)]
pub(super) struct Callouts {
    tokens: u32,
    /// Those that the host has not answered.
    open: Vec<SentCall>,
    /// The answer whose callback runs.
    answer: Option<CallAnswer>,
}

impl FakeHost {
    /// The calls that are not answered, oldest first.
    pub(crate) fn open_calls(&self) -> Vec<SentCall> {
        self.callouts.borrow().open.clone()
    }

    /// The host has an answer to a call: gives the call back if anybody is to be told of it, and lets the answer be read
    /// until [`FakeHost::answered_call`]. A call that was answered before is answered no more.
    pub(crate) fn answer_call(&self, token: CallToken, answer: CallAnswer) -> Option<SentCall> {
        let call = {
            let mut callouts = self.callouts.borrow_mut();
            let at = callouts.open.iter().position(|call| call.token == token)?;
            callouts.open.remove(at)
        };
        let alive = call.stream.is_none_or(|stream| self.streams.borrow().contains_key(&stream));
        if !alive {
            return None;
        }
        self.set_root(call.root);
        // To the host it is a callback of the root, to which the SDK makes the stream the effective one.
        self.run(None);
        self.callouts.borrow_mut().answer = Some(answer);
        Some(call)
    }

    /// The callback for an answer has ended.
    pub(crate) fn answered_call(&self) {
        self.callouts.borrow_mut().answer = None;
    }

    /// A root has gone: its calls are cancelled.
    pub(super) fn cancel_calls(&self, root: u32) {
        self.callouts.borrow_mut().open.retain(|call| call.root != root);
    }

    pub(super) fn send_call(&self, call: &Call<'_>) -> CallToken {
        let headers: BTreeMap<_, _> =
            call.headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        for name in [":method", ":path", ":authority"] {
            assert!(headers.contains_key(name), "a call without {name}");
        }
        assert!(!call.timeout.is_zero(), "a call without a timeout");
        let mut callouts = self.callouts.borrow_mut();
        callouts.tokens += 1;
        let token = CallToken(callouts.tokens);
        callouts.open.push(SentCall {
            token,
            root: self.root.get(),
            stream: self.running.get(),
            cluster: call.cluster.to_owned(),
            headers,
            body: call.body.to_vec(),
            timeout: call.timeout,
            due: self.proxy.now() + call.timeout,
        });
        token
    }

    /// Something of the answer whose callback runs, if there is one.
    pub(super) fn of_answer<T>(&self, part: impl FnOnce(&CallAnswer) -> T) -> Option<T> {
        self.callouts.borrow().answer.as_ref().map(part)
    }
}
