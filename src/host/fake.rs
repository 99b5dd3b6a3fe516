//! A proxy for native tests: one process with its shared data, queues, metrics and clocks, and the VMs in it.
//!
//! Keeps to what Envoy really does where that matters (versions ignored for absent keys, a counter of versions that
//! wraps past 0, nothing removable, messages to the last registrant, headers only in their phase), counts every call,
//! and fails on demand. Panics where Envoy would hang a stream without a word. What must not live here: expectations
//! of a particular test.
#![allow(dead_code, reason = "not every test needs every part of a proxy")]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use interlock_core::{Duration, Time};

use super::{
    Cas, ContextId, Expected, Headers, Host, HostError, Level, MetricId, MetricKind, QueueId, Reply, Status, Stored,
};

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
            tick: Cell::new(None),
            node: RefCell::default(),
        }
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
    pub(crate) response: Vec<(String, Vec<u8>)>,
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
    pub(crate) logs: u32,
}

impl Calls {
    /// All shared-data calls.
    pub(crate) fn shared(&self) -> u32 {
        self.shared_reads + self.shared_writes
    }
}

#[derive(Default)]
struct Faults {
    conflicts: u32,
    lost_messages: u32,
    failures: BTreeMap<&'static str, (u32, Status)>,
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
    tick: Cell<Option<Duration>>,
    node: RefCell<BTreeMap<String, Vec<u8>>>,
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
            response: Vec::new(),
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

    /// From here on a callback of that stream runs, or of the root.
    pub(crate) fn run(&self, stream: Option<ContextId>) {
        assert_eq!(self.entered.get(), None, "a callback ended with another context entered");
        self.running.set(stream);
    }

    /// The stream goes on to that phase, and a callback of it runs from here on.
    pub(crate) fn enter_phase(&self, stream: ContextId, phase: Phase) {
        self.edit(stream, |stream| stream.phase = phase);
        self.run(Some(stream));
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
        let mut state = self.proxy.state.borrow_mut();
        let mut notices = Vec::new();
        for (at, queue) in state.queues.iter_mut().enumerate().filter(|(_, queue)| queue.vm == self.vm) {
            let id = QueueId(u32::try_from(at).unwrap() + 1);
            notices.extend(core::iter::repeat_n(id, core::mem::take(&mut queue.notices)));
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

    /// The period of the ticks that were asked for.
    pub(crate) fn tick(&self) -> Option<Duration> {
        self.tick.get()
    }

    /// The next writes of shared data find that somebody else was faster.
    pub(crate) fn conflict_next(&self, writes: u32) {
        self.faults.borrow_mut().conflicts = writes;
    }

    /// The next messages that this VM sends are lost.
    pub(crate) fn lose_next(&self, messages: u32) {
        self.faults.borrow_mut().lost_messages = messages;
    }

    /// The next calls of that method fail.
    pub(crate) fn fail_next(&self, call: &'static str, times: u32, status: Status) {
        self.faults.borrow_mut().failures.insert(call, (times, status));
    }

    fn edit<T>(&self, stream: ContextId, edit: impl FnOnce(&mut FakeStream) -> T) -> T {
        edit(self.streams.borrow_mut().get_mut(&stream).expect("an open stream"))
    }

    fn count(&self, count: impl FnOnce(&mut Calls)) {
        count(&mut self.calls.borrow_mut());
    }

    fn fault(&self, call: &'static str) -> Result<(), HostError> {
        match self.faults.borrow_mut().failures.get_mut(call) {
            Some((times, status)) if *times > 0 => {
                *times -= 1;
                Err(HostError { call, status: *status })
            }
            _ => Ok(()),
        }
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

impl Host for FakeHost {
    fn now(&self) -> Time {
        self.count(|calls| calls.clock += 1);
        Time::from_micros(self.proxy.state.borrow().now)
    }

    fn unix_micros(&self) -> u64 {
        self.count(|calls| calls.clock += 1);
        self.proxy.state.borrow().unix_micros
    }

    /// Not random: an even walk through all numbers, so that tests repeat.
    fn random(&self) -> Result<u128, HostError> {
        self.fault("random")?;
        let mut state = self.proxy.state.borrow_mut();
        state.random = state.random.wrapping_add(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        Ok(state.random)
    }

    fn configuration(&self) -> Result<Vec<u8>, HostError> {
        self.fault("configuration")?;
        Ok(self.configuration.borrow().clone())
    }

    fn header(&self, headers: Headers, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        Ok(self.read_fields("header", headers, name)?.into_iter().next())
    }

    fn header_list(&self, headers: Headers, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        let fields = self.read_fields("header_list", headers, name)?;
        if fields.is_empty() {
            return Ok(None);
        }
        self.count(|calls| calls.property_reads += 1);
        Ok(Some(fields.join(&b',')))
    }

    fn set_header(&self, headers: Headers, name: &str, value: &[u8]) -> Result<(), HostError> {
        self.count(|calls| calls.header_writes += 1);
        self.with_fields("set_header", headers, |fields| {
            fields.retain(|(n, _)| !n.eq_ignore_ascii_case(name));
            fields.push((name.to_owned(), value.to_vec()));
        })
    }

    fn add_header(&self, headers: Headers, name: &str, value: &[u8]) -> Result<(), HostError> {
        self.count(|calls| calls.header_writes += 1);
        self.with_fields("add_header", headers, |fields| fields.push((name.to_owned(), value.to_vec())))
    }

    fn remove_header(&self, headers: Headers, name: &str) -> Result<(), HostError> {
        self.count(|calls| calls.header_writes += 1);
        self.with_fields("remove_header", headers, |fields| fields.retain(|(n, _)| !n.eq_ignore_ascii_case(name)))
    }

    fn property(&self, path: &[&str]) -> Option<Vec<u8>> {
        self.count(|calls| calls.property_reads += 1);
        self.fault("property").ok()?;
        let path = path.join(".");
        let of_stream = self.effective().and_then(|id| self.streams.borrow().get(&id)?.properties.get(&path).cloned());
        of_stream.or_else(|| self.node.borrow().get(&path).cloned())
    }

    fn enter(&self, context: ContextId) -> Result<(), HostError> {
        self.count(|calls| calls.enters += 1);
        self.fault("enter")?;
        assert_eq!(self.entered.get(), None, "contexts do not nest");
        if !self.streams.borrow().contains_key(&context) {
            return Err(HostError { call: "enter", status: Status::BadArgument });
        }
        self.entered.set(Some(context));
        Ok(())
    }

    fn leave(&self) {
        self.entered.set(None);
    }

    fn resume(&self) -> Result<(), HostError> {
        self.fault("resume")?;
        let id = self.effective().expect("Envoy takes a resume of a root for done, and the stream hangs");
        self.edit(id, |stream| {
            assert!(stream.replies.is_empty(), "a stream that was answered is resumed: it would go upstream");
            stream.resumed += 1;
            stream.phase = Phase::Upstream;
        });
        Ok(())
    }

    fn reply(&self, reply: &Reply<'_>) -> Result<(), HostError> {
        self.fault("reply")?;
        let id = self.effective().expect("Envoy takes a reply of a root for done, and the stream hangs");
        assert!(
            self.running.get().is_none_or(|running| running == id),
            "a reply to another stream from a stream's callback hangs the latter"
        );
        let sent = SentReply {
            status: if reply.grpc_status.is_some() { 200 } else { reply.status },
            details: reply.details.to_owned(),
            headers: reply.headers.iter().map(|(name, value)| ((*name).to_owned(), value.to_vec())).collect(),
            body: reply.body.to_vec(),
            grpc_status: reply.grpc_status,
        };
        self.edit(id, |stream| stream.replies.push(sent));
        Ok(())
    }

    fn shared_get(&self, key: &str) -> Result<Option<(Vec<u8>, Cas)>, HostError> {
        self.count(|calls| calls.shared_reads += 1);
        self.fault("shared_get")?;
        Ok(self.proxy.state.borrow().shared.get(key).map(|(value, cas)| (value.clone(), Cas(*cas))))
    }

    fn shared_set(&self, key: &str, value: &[u8], expected: Expected) -> Result<Stored, HostError> {
        self.count(|calls| calls.shared_writes += 1);
        self.fault("shared_set")?;
        let conflicts = &mut self.faults.borrow_mut().conflicts;
        if *conflicts > 0 {
            *conflicts -= 1;
            return Ok(Stored::Conflict);
        }
        let expected = match expected {
            Expected::Absent => u32::MAX,
            Expected::Version(Cas(version)) => version,
        };
        let mut state = self.proxy.state.borrow_mut();
        if state.shared.get(key).is_some_and(|(_, version)| expected != 0 && expected != *version) {
            return Ok(Stored::Conflict);
        }
        let version = state.next_cas;
        state.next_cas = version.checked_add(1).unwrap_or(1);
        state.shared.insert(key.to_owned(), (value.to_vec(), version));
        Ok(Stored::Yes)
    }

    fn register_queue(&self, name: &str) -> Result<QueueId, HostError> {
        self.fault("register_queue")?;
        let mut state = self.proxy.state.borrow_mut();
        let at = state.queues.iter().position(|queue| queue.name == name).unwrap_or(state.queues.len());
        match state.queues.get_mut(at) {
            Some(queue) => queue.vm = self.vm,
            None => state.queues.push(FakeQueue {
                name: name.to_owned(),
                vm: self.vm,
                messages: VecDeque::new(),
                notices: 0,
            }),
        }
        Ok(QueueId(u32::try_from(at).unwrap() + 1))
    }

    fn enqueue(&self, queue: QueueId, message: &[u8]) -> Result<(), HostError> {
        self.count(|calls| calls.enqueues += 1);
        let lost = {
            let lost_messages = &mut self.faults.borrow_mut().lost_messages;
            let lost = *lost_messages > 0;
            *lost_messages = lost_messages.saturating_sub(1);
            lost
        };
        self.with_queue("enqueue", queue, |queue| {
            if !lost {
                queue.messages.push_back(message.to_vec());
                queue.notices += 1;
            }
        })
    }

    fn dequeue(&self, queue: QueueId) -> Result<Option<Vec<u8>>, HostError> {
        self.count(|calls| calls.dequeues += 1);
        self.with_queue("dequeue", queue, |queue| queue.messages.pop_front())
    }

    fn define_metric(&self, kind: MetricKind, name: &str) -> Result<MetricId, HostError> {
        self.count(|calls| calls.metric_definitions += 1);
        self.fault("define_metric")?;
        let metrics = &mut self.proxy.state.borrow_mut().metrics;
        let at = metrics.iter().position(|metric| metric.kind == kind && metric.name == name);
        let at = at.unwrap_or_else(|| {
            metrics.push(Metric { kind, name: name.to_owned(), value: 0, samples: Vec::new() });
            metrics.len() - 1
        });
        Ok(MetricId(u32::try_from(at).unwrap()))
    }

    fn add_metric(&self, metric: MetricId, by: i64) -> Result<(), HostError> {
        if by == 0 {
            return Ok(());
        }
        self.with_metric("add_metric", metric, |metric| {
            let can = metric.kind == MetricKind::Gauge || metric.kind == MetricKind::Counter && by > 0;
            can.then(|| metric.value += by)
        })
    }

    fn record_metric(&self, metric: MetricId, value: u64) -> Result<(), HostError> {
        self.with_metric("record_metric", metric, |metric| {
            (metric.kind == MetricKind::Histogram).then(|| metric.samples.push(value))
        })
    }

    fn read_metric(&self, metric: MetricId) -> Result<u64, HostError> {
        self.with_metric("read_metric", metric, |metric| {
            (metric.kind != MetricKind::Histogram).then_some(metric.value.cast_unsigned())
        })
    }

    fn set_tick(&self, period: Duration) -> Result<(), HostError> {
        self.count(|calls| calls.ticks_set += 1);
        self.fault("set_tick")?;
        self.tick.set(Some(period));
        Ok(())
    }

    fn log_level(&self) -> Level {
        self.log_level.get()
    }

    fn log(&self, level: Level, message: &str) {
        self.count(|calls| calls.logs += 1);
        if level >= self.log_level.get() {
            self.lines.borrow_mut().push((level, message.to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_checked_as_envoy_does() {
        let proxy = FakeProxy::new();
        let (a, b) = (proxy.host(), proxy.host());
        proxy.set_next_cas(u32::MAX - 1);
        assert_eq!(a.shared_get("k"), Ok(None));
        assert_eq!(a.shared_set("k", b"1", Expected::Absent), Ok(Stored::Yes));
        assert_eq!(b.shared_set("k", b"2", Expected::Absent), Ok(Stored::Conflict));
        assert_eq!(b.shared_get("k"), Ok(Some((b"1".to_vec(), Cas(u32::MAX - 1)))));
        assert_eq!(b.shared_set("k", b"2", Expected::Version(Cas(u32::MAX - 1))), Ok(Stored::Yes));
        assert_eq!(a.shared_set("k", b"3", Expected::Version(Cas(u32::MAX - 1))), Ok(Stored::Conflict));
        assert_eq!(a.shared_set("k", b"3", Expected::Version(Cas(u32::MAX))), Ok(Stored::Yes));
        assert_eq!(a.shared_get("k"), Ok(Some((b"3".to_vec(), Cas(1)))), "0 is skipped");
        assert_eq!(a.shared_set("new", b"", Expected::Version(Cas(77))), Ok(Stored::Yes), "ignored when absent");
        assert_eq!(a.take_calls(), Calls { shared_reads: 2, shared_writes: 4, ..Calls::default() });
    }

    #[test]
    fn messages_go_to_the_last_registrant() {
        let proxy = FakeProxy::new();
        let (a, b) = (proxy.host(), proxy.host());
        let queue = a.register_queue("q").unwrap();
        assert_eq!(b.register_queue("q"), Ok(queue));
        a.lose_next(1);
        for message in [b"lost", b"came"] {
            a.enqueue(queue, message).unwrap();
        }
        assert_eq!(a.notices(), []);
        assert_eq!(b.notices(), [queue]);
        assert_eq!(b.dequeue(queue), Ok(Some(b"came".to_vec())));
        assert_eq!(b.dequeue(queue), Ok(None));
        assert_eq!(a.enqueue(QueueId(9), b"").map_err(|e| e.status), Err(Status::NotFound));
    }

    #[test]
    fn headers_are_there_in_their_phase_and_of_the_effective_stream() {
        let host = FakeProxy::new().host();
        let one = host.open(3, &[("lock", "a/1"), ("Lock", "a/2"), ("x", "")]);
        assert_eq!(host.header(Headers::Request, "lock"), Ok(Some(b"a/1".to_vec())));
        assert_eq!(host.header_list(Headers::Request, "lock"), Ok(Some(b"a/1,a/2".to_vec())));
        assert_eq!(host.header(Headers::Request, "x"), Ok(Some(Vec::new())));
        assert_eq!(host.header(Headers::Request, "y"), Ok(None));
        host.run(None);
        assert!(host.header(Headers::Request, "x").is_err());
        let dynamic: &dyn Host = &host;
        let resumed = dynamic.within(one, |host| {
            host.set_header(Headers::Request, "lock-fence", b"a/1;fence=1")?;
            host.remove_header(Headers::Request, "lock")?;
            host.resume()
        });
        assert_eq!(resumed, Ok(Ok(())));
        assert_eq!(host.stream(one).request_values("lock"), Vec::<&[u8]>::new());
        assert_eq!(host.stream(one).request_values("lock-fence"), [b"a/1;fence=1"]);
        assert!(host.header(Headers::Request, "x").is_err(), "left again");
        host.close(one);
        assert_eq!(dynamic.within(one, |_| ()).map_err(|e| e.status), Err(Status::BadArgument));
    }

    #[test]
    fn clocks_are_independent_and_calls_fail_on_demand() {
        let proxy = FakeProxy::new();
        let host = proxy.host();
        let (now, unix) = (host.now(), host.unix_micros());
        proxy.advance(Duration::from_secs(1));
        proxy.step_wall_clock(-5_000_000);
        assert_eq!(host.now().since(now), Duration::from_secs(1));
        assert_eq!(host.unix_micros(), unix - 4_000_000);
        host.fail_next("shared_get", 1, Status::InternalFailure);
        assert!(host.shared_get("k").is_err() && host.shared_get("k").is_ok());
        host.conflict_next(1);
        assert_eq!(host.shared_set("k", b"", Expected::Absent), Ok(Stored::Conflict));
        assert_eq!(host.shared_set("k", b"", Expected::Absent), Ok(Stored::Yes));
    }
}
