//! Calls of other services: what the plugin sent, and the answers that a test gives, loses, doubles or delays.

use std::collections::BTreeMap;

use interlock_core::{Duration, Time};

use super::FakeHost;
use crate::host::{Call, CallToken, ContextId, Method, StreamToken};

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

/// A call of a gRPC method that was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SentMethod {
    pub(crate) token: CallToken,
    pub(crate) root: u32,
    /// The stream to which the answer goes, if one sent it.
    pub(crate) stream: Option<ContextId>,
    pub(crate) cluster: String,
    /// The service and the method.
    pub(crate) method: (String, String),
    pub(crate) metadata: BTreeMap<String, Vec<u8>>,
    pub(crate) message: Vec<u8>,
    pub(crate) timeout: Duration,
}

/// A gRPC stream that is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OpenStream {
    pub(crate) token: StreamToken,
    pub(crate) root: u32,
    pub(crate) method: (String, String),
    pub(crate) metadata: BTreeMap<String, Vec<u8>>,
    /// What was sent on it and not yet taken.
    pub(crate) sent: Vec<Vec<u8>>,
}

/// What a gRPC call or stream gives: a message, or its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GrpcAnswer {
    Message(Vec<u8>),
    Status(u32, String),
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
    methods: Vec<SentMethod>,
    streams: Vec<OpenStream>,
    /// The message, or the end of a gRPC call or stream, whose callback runs.
    grpc: Option<GrpcAnswer>,
    /// Whether a gRPC call or stream was begun in this callback.
    begun: bool,
}

impl Callouts {
    /// A callback begins.
    pub(super) fn begin(&mut self) {
        self.begun = false;
    }
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
        self.enter(call.root, call.stream)?;
        self.callouts.borrow_mut().answer = Some(answer);
        Some(call)
    }

    /// Begins the callback for an answer; none where the stream that it is for has gone. To the host it is a callback of the root,
    /// to which the SDK makes the stream the effective one.
    fn enter(&self, root: u32, stream: Option<ContextId>) -> Option<()> {
        if !stream.is_none_or(|stream| self.streams.borrow().contains_key(&stream)) {
            return None;
        }
        self.set_root(root);
        self.run(None);
        Some(())
    }

    /// The callback for an answer has ended.
    pub(crate) fn answered_call(&self) {
        self.callouts.borrow_mut().answer = None;
    }

    /// A root has gone: its calls are cancelled.
    pub(super) fn cancel_calls(&self, root: u32) {
        let mut callouts = self.callouts.borrow_mut();
        callouts.open.retain(|call| call.root != root);
        callouts.methods.retain(|call| call.root != root);
        callouts.streams.retain(|stream| stream.root != root);
    }

    /// The gRPC calls that are not answered, oldest first.
    pub(crate) fn open_methods(&self) -> Vec<SentMethod> {
        self.callouts.borrow().methods.clone()
    }

    /// The gRPC streams that are open.
    pub(crate) fn open_streams(&self) -> Vec<OpenStream> {
        self.callouts.borrow().streams.clone()
    }

    /// What was sent on a stream since this was last asked.
    pub(crate) fn take_sent(&self, token: StreamToken) -> Vec<Vec<u8>> {
        let mut callouts = self.callouts.borrow_mut();
        let stream = callouts.streams.iter_mut().find(|stream| stream.token == token);
        stream.map(|stream| core::mem::take(&mut stream.sent)).unwrap_or_default()
    }

    /// As [`FakeHost::answer_call`], for a gRPC call.
    pub(crate) fn answer_method(&self, token: CallToken, answer: GrpcAnswer) -> Option<SentMethod> {
        let call = {
            let mut callouts = self.callouts.borrow_mut();
            let at = callouts.methods.iter().position(|call| call.token == token)?;
            callouts.methods.remove(at)
        };
        self.enter(call.root, call.stream)?;
        self.callouts.borrow_mut().grpc = Some(answer);
        Some(call)
    }

    /// Something comes on a stream; its end closes it. False where it is closed.
    pub(crate) fn deliver(&self, token: StreamToken, answer: GrpcAnswer) -> bool {
        let root = {
            let mut callouts = self.callouts.borrow_mut();
            let Some(at) = callouts.streams.iter().position(|stream| stream.token == token) else { return false };
            let root = callouts.streams.get(at).map_or(0, |stream| stream.root);
            if matches!(answer, GrpcAnswer::Status(..)) {
                callouts.streams.remove(at);
            }
            callouts.grpc = Some(answer);
            root
        };
        self.set_root(root);
        self.run(None);
        true
    }

    /// The callback for a gRPC message or status has ended.
    pub(crate) fn delivered(&self) {
        self.callouts.borrow_mut().grpc = None;
    }

    pub(super) fn send_method(&self, method: &Method<'_>, message: &[u8], timeout: Duration) -> CallToken {
        assert!(!timeout.is_zero(), "a call without a timeout");
        let mut callouts = self.callouts.borrow_mut();
        callouts.tokens += 1;
        let token = CallToken(callouts.tokens);
        callouts.methods.push(SentMethod {
            token,
            root: self.root.get(),
            stream: self.running.get(),
            cluster: method.cluster.to_owned(),
            method: (method.service.to_owned(), method.name.to_owned()),
            metadata: metadata_of(method),
            message: message.to_vec(),
            timeout,
        });
        token
    }

    pub(super) fn begun_a_call(&self) {
        self.callouts.borrow_mut().begun = true;
    }

    /// Where no host is healthy, Envoy turns for ever over the end of one call while it opens a stream in the same callback.
    pub(super) fn assert_fresh(&self) {
        assert!(!self.callouts.borrow().begun, "a stream is opened after another call in the same callback");
    }

    pub(super) fn open_stream(&self, method: &Method<'_>) -> StreamToken {
        assert_eq!(self.running.get(), None, "a stream that is opened from the callback of a request dies with it");
        assert_eq!(self.entered.get(), None, "a stream that is opened within another context is deaf");
        let mut callouts = self.callouts.borrow_mut();
        callouts.tokens += 1;
        let token = StreamToken(callouts.tokens);
        let method_name = (method.service.to_owned(), method.name.to_owned());
        let metadata = metadata_of(method);
        let root = self.root.get();
        callouts.streams.push(OpenStream { token, root, method: method_name, metadata, sent: Vec::new() });
        token
    }

    pub(super) fn send_on(&self, token: StreamToken, message: &[u8]) -> bool {
        let mut callouts = self.callouts.borrow_mut();
        let stream = callouts.streams.iter_mut().find(|stream| stream.token == token);
        stream.map(|stream| stream.sent.push(message.to_vec())).is_some()
    }

    pub(super) fn cancel(&self, token: u32) -> bool {
        let mut callouts = self.callouts.borrow_mut();
        let before = callouts.streams.len() + callouts.methods.len();
        callouts.streams.retain(|stream| stream.token.0 != token);
        callouts.methods.retain(|call| call.token.0 != token);
        callouts.streams.len() + callouts.methods.len() < before
    }

    pub(super) fn grpc_answer(&self) -> Option<GrpcAnswer> {
        self.callouts.borrow().grpc.clone()
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

fn metadata_of(method: &Method<'_>) -> BTreeMap<String, Vec<u8>> {
    method.metadata.iter().map(|(name, value)| ((*name).to_owned(), value.to_vec())).collect()
}
