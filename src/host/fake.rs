//! A proxy for native tests: one process with its shared data, queues, metrics and clocks, and the VMs in it.
//!
//! Keeps to what Envoy really does where that matters (versions ignored for absent keys, a counter of versions that
//! wraps past 0, nothing removable, messages to the last registrant, headers only in their phase), counts every call,
//! and fails on demand. Panics where Envoy would hang a stream without a word. What must not live here: expectations
//! of a particular test.
#![allow(dead_code, reason = "not every test needs every part of a proxy")]

mod callouts;
mod calls;
mod faults;
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use interlock_core::{Duration, Time};

pub(crate) use callouts::{CallAnswer, GrpcAnswer, SentCall};

use callouts::Callouts;
use faults::Faults;

use super::{ContextId, Headers, HostError, Level, MetricId, MetricKind, QueueId, Status};

/// One process. Clone the `Rc` to give it to several VMs.
pub(crate) struct FakeProxy {
    state: RefCell<Process>,
}

struct Process {
    now: u64,
    unix_micros: u64,
    vms: u32,
    shared: BTreeMap<String, (Vec<u8>, u32)>,
    next_cas: u32,
    queues: Vec<FakeQueue>,
    metrics: Vec<Metric>,
    random: u128,
}

struct FakeQueue {
    name: String,
    vm: u32,
    /// The root that registered it: notices go there.
    root: u32,
    messages: VecDeque<Vec<u8>>,
    /// Notices that the registrant has not been given yet.
    notices: usize,
}

struct Metric {
    kind: MetricKind,
    name: String,
    value: i64,
    samples: Vec<u64>,
}

impl FakeProxy {
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(FakeProxy {
            state: RefCell::new(Process {
                now: 1_000_000_000,
                unix_micros: 1_790_000_000_000_000,
                vms: 0,
                shared: BTreeMap::new(),
                next_cas: 1,
                queues: Vec::new(),
                metrics: Vec::new(),
                random: 0,
            }),
        })
    }

    /// A new VM of this process, in a root callback.
    pub(crate) fn host(self: &Rc<Self>) -> FakeHost {
        let mut state = self.state.borrow_mut();
        state.vms += 1;
        FakeHost {
            proxy: Rc::clone(self),
            vm: state.vms,
            configuration: RefCell::default(),
            streams: RefCell::default(),
            running: Cell::new(None),
            entered: Cell::new(None),
            calls: RefCell::default(),
            faults: RefCell::default(),
            lines: RefCell::default(),
            log_level: Cell::new(Level::Info),
            root: Cell::new(0),
            roots: RefCell::new(BTreeSet::from([0])),
            ticks: RefCell::default(),
            node: RefCell::default(),
            callouts: RefCell::default(),
        }
    }

    /// The monotonic clock, for a test to look at: not counted.
    pub(crate) fn now(&self) -> Time {
        Time::from_micros(self.state.borrow().now)
    }

    /// Time passes, on both clocks.
    pub(crate) fn advance(&self, span: Duration) {
        let micros = u64::try_from(span.as_micros()).unwrap();
        let mut state = self.state.borrow_mut();
        state.now += micros;
        state.unix_micros += micros;
    }

    /// Somebody sets the wall clock.
    pub(crate) fn step_wall_clock(&self, micros: i64) {
        let mut state = self.state.borrow_mut();
        state.unix_micros = state.unix_micros.checked_add_signed(micros).unwrap();
    }

    /// The version that the next write gets.
    pub(crate) fn set_next_cas(&self, cas: u32) {
        self.state.borrow_mut().next_cas = cas;
    }

    /// Every key ever written and what it holds.
    pub(crate) fn shared(&self) -> BTreeMap<String, Vec<u8>> {
        self.state.borrow().shared.iter().map(|(key, (value, _))| (key.clone(), value.clone())).collect()
    }

    /// Something else writes under a key.
    pub(crate) fn overwrite(&self, key: &str, value: &[u8]) {
        self.state.borrow_mut().shared.get_mut(key).expect("a key that was written").0 = value.to_vec();
    }

    /// A counter's or a gauge's value; 0 for one that was never defined.
    pub(crate) fn metric(&self, name: &str) -> i64 {
        self.state.borrow().metrics.iter().find(|metric| metric.name == name).map_or(0, |metric| metric.value)
    }

    /// What was recorded in a histogram.
    pub(crate) fn histogram(&self, name: &str) -> Vec<u64> {
        let state = self.state.borrow();
        state.metrics.iter().find(|metric| metric.name == name).map_or_else(Vec::new, |metric| metric.samples.clone())
    }

    /// Every counter and gauge that is not 0.
    pub(crate) fn metrics(&self) -> BTreeMap<String, i64> {
        let state = self.state.borrow();
        state.metrics.iter().filter(|m| m.value != 0).map(|m| (m.name.clone(), m.value)).collect()
    }

    /// Every gauge that is not 0: none in a process at rest.
    pub(crate) fn gauges(&self) -> BTreeMap<String, i64> {
        let state = self.state.borrow();
        let gauges = state.metrics.iter().filter(|m| m.kind == MetricKind::Gauge && m.value != 0);
        gauges.map(|m| (m.name.clone(), m.value)).collect()
    }
}

/// Where a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The request has not been forwarded: request headers are there.
    Request,
    /// The upstream has it: no headers are there.
    Upstream,
    /// The response goes by: response headers are there.
    Response,
    /// The stream ends: both are there.
    Log,
}

/// One stream.
#[derive(Clone, Debug)]
pub(crate) struct FakeStream {
    pub(crate) phase: Phase,
    pub(crate) request: Vec<(String, Vec<u8>)>,
    /// What is buffered of the request's body.
    pub(crate) body: Vec<u8>,
    pub(crate) response: Vec<(String, Vec<u8>)>,
    /// The request's, once they have come.
    pub(crate) trailers: Option<Vec<(String, Vec<u8>)>>,
    /// Property paths joined by dots.
    pub(crate) properties: BTreeMap<String, Vec<u8>>,
    pub(crate) resumed: u32,
    pub(crate) replies: Vec<SentReply>,
}

impl FakeStream {
    /// The values of all request headers of that name.
    pub(crate) fn request_values(&self, name: &str) -> Vec<&[u8]> {
        values(&self.request, name)
    }

    /// The values of all response headers of that name.
    pub(crate) fn response_values(&self, name: &str) -> Vec<&[u8]> {
        values(&self.response, name)
    }
}

/// A reply that was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SentReply {
    pub(crate) status: u32,
    pub(crate) details: String,
    pub(crate) headers: Vec<(String, Vec<u8>)>,
    pub(crate) body: Vec<u8>,
    pub(crate) grpc_status: Option<u32>,
}

/// How often the host was called, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Calls {
    pub(crate) clock: u32,
    /// Of headers, each field name once.
    pub(crate) header_reads: u32,
    pub(crate) header_writes: u32,
    pub(crate) property_reads: u32,
    pub(crate) shared_reads: u32,
    pub(crate) shared_writes: u32,
    pub(crate) enqueues: u32,
    pub(crate) dequeues: u32,
    pub(crate) metric_definitions: u32,
    pub(crate) metric_updates: u32,
    pub(crate) ticks_set: u32,
    pub(crate) enters: u32,
    /// Calls of other services.
    pub(crate) callouts: u32,
    pub(crate) answer_reads: u32,
    pub(crate) logs: u32,
}

impl Calls {
    /// All shared-data calls.
    pub(crate) fn shared(&self) -> u32 {
        self.shared_reads + self.shared_writes
    }
}

/// One VM.
pub(crate) struct FakeHost {
    proxy: Rc<FakeProxy>,
    vm: u32,
    configuration: RefCell<Vec<u8>>,
    streams: RefCell<BTreeMap<ContextId, FakeStream>>,
    running: Cell<Option<ContextId>>,
    entered: Cell<Option<ContextId>>,
    calls: RefCell<Calls>,
    faults: RefCell<Faults>,
    lines: RefCell<Vec<(Level, String)>>,
    log_level: Cell<Level>,
    /// The root of the context whose callback runs.
    root: Cell<u32>,
    /// Those that have not gone.
    roots: RefCell<BTreeSet<u32>>,
    /// Each root's timer: its period, and when it is due next.
    ticks: RefCell<BTreeMap<u32, (Duration, Time)>>,
    node: RefCell<BTreeMap<String, Vec<u8>>>,
    callouts: RefCell<Callouts>,
}

fn values<'a>(fields: &'a [(String, Vec<u8>)], name: &str) -> Vec<&'a [u8]> {
    fields.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_slice()).collect()
}

impl FakeHost {
    pub(crate) fn proxy(&self) -> &Rc<FakeProxy> {
        &self.proxy
    }

    pub(crate) fn set_configuration(&self, bytes: &[u8]) {
        *self.configuration.borrow_mut() = bytes.to_vec();
    }

    pub(crate) fn set_log_level(&self, level: Level) {
        self.log_level.set(level);
    }

    /// A property that is there without a stream, such as `xds.node.id`.
    pub(crate) fn set_node_property(&self, path: &str, value: &[u8]) {
        self.node.borrow_mut().insert(path.to_owned(), value.to_vec());
    }

    /// A request arrives; its header callback runs from here on.
    pub(crate) fn open(&self, context: u32, headers: &[(&str, &str)]) -> ContextId {
        let fields: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_bytes())).collect();
        self.open_bytes(context, &fields)
    }

    /// As [`FakeHost::open`], for values that are no text.
    pub(crate) fn open_bytes(&self, context: u32, headers: &[(&str, &[u8])]) -> ContextId {
        let id = ContextId(context);
        let stream = FakeStream {
            phase: Phase::Request,
            request: headers.iter().map(|(name, value)| ((*name).to_owned(), value.to_vec())).collect(),
            body: Vec::new(),
            response: Vec::new(),
            trailers: None,
            properties: BTreeMap::new(),
            resumed: 0,
            replies: Vec::new(),
        };
        assert!(self.streams.borrow_mut().insert(id, stream).is_none(), "stream {context} is open already");
        self.run(Some(id));
        id
    }

    /// A property of one stream, its path joined by dots.
    pub(crate) fn set_property(&self, stream: ContextId, path: &str, value: &[u8]) {
        self.edit(stream, |stream| stream.properties.insert(path.to_owned(), value.to_vec()));
    }

    /// Bytes of the request's body that the host has buffered.
    pub(crate) fn buffer(&self, stream: ContextId, body: &[u8]) {
        self.edit(stream, |stream| stream.body = body.to_vec());
    }

    /// From here on a callback of that stream runs, or of the root.
    pub(crate) fn run(&self, stream: Option<ContextId>) {
        assert_eq!(self.entered.get(), None, "a callback ended with another context entered");
        self.running.set(stream);
        self.callouts.borrow_mut().begin();
    }

    /// The stream goes on to that phase, and a callback of it runs from here on.
    pub(crate) fn enter_phase(&self, stream: ContextId, phase: Phase) {
        self.edit(stream, |stream| stream.phase = phase);
        self.run(Some(stream));
    }

    /// The streams that were answered by the plugin, which the host is about to send.
    pub(crate) fn answered(&self) -> Vec<ContextId> {
        let streams = self.streams.borrow();
        streams.iter().filter(|(_, stream)| !stream.replies.is_empty()).map(|(id, _)| *id).collect()
    }

    /// A response begins, with these headers, and a callback of the stream runs from here on.
    pub(crate) fn respond(&self, stream: ContextId, headers: &[(String, Vec<u8>)]) {
        self.edit(stream, |stream| stream.response = headers.to_vec());
        self.enter_phase(stream, Phase::Response);
    }

    /// The stream is gone; a root callback runs from here on.
    pub(crate) fn close(&self, stream: ContextId) -> FakeStream {
        self.run(None);
        self.streams.borrow_mut().remove(&stream).expect("an open stream")
    }

    pub(crate) fn stream(&self, stream: ContextId) -> FakeStream {
        self.streams.borrow().get(&stream).cloned().expect("an open stream")
    }

    /// The queues of this VM that have messages it was not yet told of, once for each message: one `on_queue_ready` each.
    pub(crate) fn notices(&self) -> Vec<QueueId> {
        self.deliveries().into_iter().map(|(_, queue)| queue).collect()
    }

    /// As [`FakeHost::notices`], with the root that each goes to.
    pub(crate) fn deliveries(&self) -> Vec<(u32, QueueId)> {
        let mut state = self.proxy.state.borrow_mut();
        let mut notices = Vec::new();
        for (at, queue) in state.queues.iter_mut().enumerate().filter(|(_, queue)| queue.vm == self.vm) {
            let id = QueueId(u32::try_from(at).unwrap() + 1);
            notices.extend(core::iter::repeat_n((queue.root, id), core::mem::take(&mut queue.notices)));
        }
        notices
    }

    /// The calls since the last time that this was asked.
    pub(crate) fn take_calls(&self) -> Calls {
        self.calls.take()
    }

    /// The log lines since the last time that this was asked.
    pub(crate) fn take_lines(&self) -> Vec<(Level, String)> {
        self.lines.take()
    }

    /// Callbacks from here on are of that root or of its streams: ticks and queues that are asked for are its own.
    pub(crate) fn set_root(&self, root: u32) {
        self.root.set(root);
        self.roots.borrow_mut().insert(root);
    }

    /// The root is gone, its timer and its calls with it.
    pub(crate) fn drop_root(&self, root: u32) {
        self.ticks.borrow_mut().remove(&root);
        self.roots.borrow_mut().remove(&root);
        self.cancel_calls(root);
    }

    /// The period of the ticks that this root asked for.
    pub(crate) fn tick(&self) -> Option<Duration> {
        self.ticks.borrow().get(&self.root.get()).map(|(period, _)| *period)
    }

    /// The next tick of this VM, and the root that it is for.
    pub(crate) fn next_tick(&self) -> Option<(Time, u32)> {
        self.ticks.borrow().iter().map(|(root, (_, due))| (*due, *root)).min()
    }

    /// The tick of that root has run: its timer starts again.
    pub(crate) fn rearm(&self, root: u32) {
        let now = self.proxy.now();
        if let Some((period, due)) = self.ticks.borrow_mut().get_mut(&root) {
            *due = now + *period;
        }
    }

    pub(crate) fn edit<T>(&self, stream: ContextId, edit: impl FnOnce(&mut FakeStream) -> T) -> T {
        edit(self.streams.borrow_mut().get_mut(&stream).expect("an open stream"))
    }

    fn count(&self, count: impl FnOnce(&mut Calls)) {
        count(&mut self.calls.borrow_mut());
    }

    fn effective(&self) -> Option<ContextId> {
        self.entered.get().or(self.running.get())
    }

    fn with_fields<T>(
        &self,
        call: &'static str,
        headers: Headers,
        act: impl FnOnce(&mut Vec<(String, Vec<u8>)>) -> T,
    ) -> Result<T, HostError> {
        self.fault(call)?;
        let gone = HostError { call, status: Status::BadArgument };
        let id = self.effective().ok_or(gone)?;
        let mut streams = self.streams.borrow_mut();
        let stream = streams.get_mut(&id).ok_or(gone)?;
        match (headers, stream.phase) {
            (Headers::Request, Phase::Request | Phase::Log) => Ok(act(&mut stream.request)),
            (Headers::Response, Phase::Response | Phase::Log) => Ok(act(&mut stream.response)),
            _ => Err(gone),
        }
    }

    fn read_fields(&self, call: &'static str, headers: Headers, name: &str) -> Result<Vec<Vec<u8>>, HostError> {
        self.count(|calls| calls.header_reads += 1);
        self.with_fields(call, headers, |fields| values(fields, name).into_iter().map(<[u8]>::to_vec).collect())
    }

    fn with_metric<T>(
        &self,
        call: &'static str,
        metric: MetricId,
        act: impl FnOnce(&mut Metric) -> Option<T>,
    ) -> Result<T, HostError> {
        self.count(|calls| calls.metric_updates += 1);
        self.fault(call)?;
        let mut state = self.proxy.state.borrow_mut();
        let metric = state.metrics.get_mut(metric.0 as usize).ok_or(HostError { call, status: Status::NotFound })?;
        act(metric).ok_or(HostError { call, status: Status::BadArgument })
    }

    fn with_queue<T>(
        &self,
        call: &'static str,
        queue: QueueId,
        act: impl FnOnce(&mut FakeQueue) -> T,
    ) -> Result<T, HostError> {
        self.fault(call)?;
        let at = (queue.0 as usize).wrapping_sub(1);
        let mut state = self.proxy.state.borrow_mut();
        state.queues.get_mut(at).map(act).ok_or(HostError { call, status: Status::NotFound })
    }
}
