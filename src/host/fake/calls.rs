//! [`Host`] as the fake proxy answers it.

use std::collections::VecDeque;

use interlock_core::{Duration, Time};

use super::{FakeHost, FakeQueue, GrpcAnswer, Metric, Phase, SentReply, values};
use crate::host::{
    Call, CallToken, Cas, ContextId, Expected, Fields, Headers, Host, HostError, Level, Method, MetricId, MetricKind,
    QueueId, Reply, Status, Stored, StreamToken,
};

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

    fn request_headers(&self) -> Result<Fields, HostError> {
        self.count(|calls| calls.header_reads += 1);
        self.with_fields("request_headers", Headers::Request, |fields| {
            fields.iter().map(|(n, value)| (n, value)).collect()
        })
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

    fn remove_trailer(&self, name: &str) -> Result<(), HostError> {
        self.count(|calls| calls.header_writes += 1);
        self.fault("remove_trailer")?;
        let refused = HostError { call: "remove_trailer", status: Status::BadArgument };
        let id = self.effective().ok_or(refused)?;
        let mut streams = self.streams.borrow_mut();
        let trailers = streams.get_mut(&id).and_then(|stream| stream.trailers.as_mut()).ok_or(refused)?;
        trailers.retain(|(n, _)| !n.eq_ignore_ascii_case(name));
        Ok(())
    }

    fn request_body(&self, most: usize) -> Result<Vec<u8>, HostError> {
        self.fault("request_body")?;
        let refused = HostError { call: "request_body", status: Status::BadArgument };
        let streams = self.streams.borrow();
        let stream = self.effective().and_then(|id| streams.get(&id)).ok_or(refused)?;
        Ok(stream.body.get(..most).unwrap_or(&stream.body).to_vec())
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
        if !self.streams.borrow().contains_key(&context) && !self.roots.borrow().contains(&context.0) {
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
        self.shared_fault("shared_get")?;
        Ok(self.proxy.state.borrow().shared.get(key).map(|(value, cas)| (value.clone(), Cas(*cas))))
    }

    fn shared_set(&self, key: &str, value: &[u8], expected: Expected) -> Result<Stored, HostError> {
        self.count(|calls| calls.shared_writes += 1);
        self.shared_fault("shared_set")?;
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
            Some(queue) => (queue.vm, queue.root) = (self.vm, self.root.get()),
            None => state.queues.push(FakeQueue {
                name: name.to_owned(),
                vm: self.vm,
                root: self.root.get(),
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

    fn call(&self, call: &Call<'_>) -> Result<CallToken, HostError> {
        self.count(|calls| calls.callouts += 1);
        self.fault("call")?;
        Ok(self.send_call(call))
    }

    fn answer_header(&self, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        self.count(|calls| calls.answer_reads += 1);
        self.fault("answer_header")?;
        let first = |fields: &Vec<_>| values(fields, name).first().map(|value| value.to_vec());
        let found = self.of_answer(|answer| answer.headers.as_ref().map(first)).flatten();
        found.ok_or(HostError { call: "answer_header", status: Status::BadArgument })
    }

    fn answer_body(&self, most: usize) -> Result<Vec<u8>, HostError> {
        self.count(|calls| calls.answer_reads += 1);
        self.fault("answer_body")?;
        let body = self.of_answer(|answer| answer.body.get(..most).unwrap_or(&answer.body).to_vec());
        Ok(body.unwrap_or_default())
    }

    fn grpc_call(&self, method: &Method<'_>, message: &[u8], timeout: Duration) -> Result<CallToken, HostError> {
        self.count(|calls| calls.callouts += 1);
        self.begun_a_call();
        self.fault("grpc_call")?;
        Ok(self.send_method(method, message, timeout))
    }

    fn grpc_open(&self, method: &Method<'_>) -> Result<StreamToken, HostError> {
        self.assert_fresh();
        self.begun_a_call();
        self.fault("grpc_open")?;
        Ok(self.open_stream(method))
    }

    fn grpc_send(&self, stream: StreamToken, message: &[u8]) -> Result<(), HostError> {
        self.fault("grpc_send")?;
        let gone = HostError { call: "grpc_send", status: Status::NotFound };
        if self.send_on(stream, message) { Ok(()) } else { Err(gone) }
    }

    fn grpc_cancel(&self, token: u32) -> Result<(), HostError> {
        self.fault("grpc_cancel")?;
        let gone = HostError { call: "grpc_cancel", status: Status::NotFound };
        if self.cancel(token) { Ok(()) } else { Err(gone) }
    }

    fn message(&self, most: usize) -> Result<Vec<u8>, HostError> {
        self.count(|calls| calls.answer_reads += 1);
        self.fault("message")?;
        Ok(match self.grpc_answer() {
            Some(GrpcAnswer::Message(bytes)) => bytes.get(..most).unwrap_or(&bytes).to_vec(),
            _ => Vec::new(),
        })
    }

    fn grpc_message(&self) -> String {
        match self.grpc_answer() {
            Some(GrpcAnswer::Status(_, message)) => message,
            _ => String::new(),
        }
    }

    fn set_tick(&self, period: Duration) -> Result<(), HostError> {
        self.count(|calls| calls.ticks_set += 1);
        self.fault("set_tick")?;
        // Whole milliseconds, at least one, as the ABI has it.
        let micros = u64::try_from(period.as_micros()).unwrap().div_ceil(1000).max(1) * 1000;
        let period = Duration::from_micros(micros);
        self.ticks.borrow_mut().insert(self.root.get(), (period, self.proxy.now() + period));
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
