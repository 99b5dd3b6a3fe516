//! [`Host`] over the proxy-wasm ABI 0.2.1, as Envoy serves it. The only module that declares or calls a host function.
//!
//! The SDK's own wrappers are not used, because they panic on every status that they do not list and on text that is
//! not UTF-8. The one exception are those for calls of other services, and for streams to them: the SDK panics as well when an
//! answer comes to a call that it did not send itself, or drops it. It lists the statuses that Envoy (1.40) has for them. Signatures are those of proxy-wasm 0.2.5, `src/hostcalls.rs`, with the status as a plain number, since a
//! host may answer numbers that no enum knows. What must not live here: anything that decides.
#![allow(unsafe_code)]

use core::ptr::{null, null_mut};

use interlock_core::{Duration, Time};

use super::{
    Call, CallToken, Cas, ContextId, Expected, Fields, Headers, Host, HostError, Level, Method, MetricId, MetricKind,
    QueueId, Reply, Status, Stored, StreamToken,
};

/// The ABI. Pointers must be valid for the length that follows them; results go where the `return_` pointers say.
mod abi {
    #[link(wasm_import_module = "env")]
    unsafe extern "C" {
        pub fn proxy_log(level: u32, message: *const u8, message_size: usize) -> u32;
        pub fn proxy_get_log_level(return_level: *mut u32) -> u32;
        pub fn proxy_get_current_time_nanoseconds(return_time: *mut u64) -> u32;
        pub fn proxy_set_tick_period_milliseconds(period: u32) -> u32;
        pub fn proxy_get_buffer_bytes(
            buffer: u32,
            start: usize,
            max_size: usize,
            return_data: *mut *mut u8,
            return_size: *mut usize,
        ) -> u32;
        pub fn proxy_get_header_map_value(
            map: u32,
            key: *const u8,
            key_size: usize,
            return_value: *mut *mut u8,
            return_size: *mut usize,
        ) -> u32;
        pub fn proxy_get_header_map_pairs(map: u32, return_data: *mut *mut u8, return_size: *mut usize) -> u32;
        pub fn proxy_remove_header_map_value(map: u32, key: *const u8, key_size: usize) -> u32;
        pub fn proxy_replace_header_map_value(
            map: u32,
            key: *const u8,
            key_size: usize,
            value: *const u8,
            value_size: usize,
        ) -> u32;
        pub fn proxy_add_header_map_value(
            map: u32,
            key: *const u8,
            key_size: usize,
            value: *const u8,
            value_size: usize,
        ) -> u32;
        pub fn proxy_get_property(
            path: *const u8,
            path_size: usize,
            return_value: *mut *mut u8,
            return_size: *mut usize,
        ) -> u32;
        pub fn proxy_get_shared_data(
            key: *const u8,
            key_size: usize,
            return_value: *mut *mut u8,
            return_size: *mut usize,
            return_cas: *mut u32,
        ) -> u32;
        pub fn proxy_set_shared_data(
            key: *const u8,
            key_size: usize,
            value: *const u8,
            value_size: usize,
            cas: u32,
        ) -> u32;
        pub fn proxy_register_shared_queue(name: *const u8, name_size: usize, return_id: *mut u32) -> u32;
        pub fn proxy_dequeue_shared_queue(queue: u32, return_value: *mut *mut u8, return_size: *mut usize) -> u32;
        pub fn proxy_enqueue_shared_queue(queue: u32, value: *const u8, value_size: usize) -> u32;
        pub fn proxy_continue_stream(stream: u32) -> u32;
        pub fn proxy_send_local_response(
            status: u32,
            details: *const u8,
            details_size: usize,
            body: *const u8,
            body_size: usize,
            headers: *const u8,
            headers_size: usize,
            grpc_status: i32,
        ) -> u32;
        pub fn proxy_set_effective_context(context: u32) -> u32;
        pub fn proxy_grpc_send(stream: u32, message: *const u8, message_size: usize, end_stream: u32) -> u32;
        pub fn proxy_grpc_cancel(token: u32) -> u32;
        pub fn proxy_get_status(
            return_code: *mut u32,
            return_message: *mut *mut u8,
            return_message_size: *mut usize,
        ) -> u32;
        pub fn proxy_define_metric(kind: u32, name: *const u8, name_size: usize, return_id: *mut u32) -> u32;
        pub fn proxy_get_metric(metric: u32, return_value: *mut u64) -> u32;
        pub fn proxy_record_metric(metric: u32, value: u64) -> u32;
        pub fn proxy_increment_metric(metric: u32, by: i64) -> u32;
    }

    #[link(wasm_import_module = "wasi_snapshot_preview1")]
    unsafe extern "C" {
        pub fn clock_time_get(clock: u32, precision: u64, return_time: *mut u64) -> u32;
        pub fn random_get(buffer: *mut u8, size: usize) -> u32;
    }
}

/// `WasmHeaderMapType`.
const fn map_of(headers: Headers) -> u32 {
    match headers {
        Headers::Request => 0,
        Headers::Response => 2,
    }
}

/// `WasmHeaderMapType::HttpRequestTrailers`.
const REQUEST_TRAILERS: u32 = 1;
/// `WasmHeaderMapType::HttpCallResponseHeaders`.
const ANSWER_HEADERS: u32 = 6;
/// `WasmBufferType::HttpCallResponseBody`.
const ANSWER_BODY: u32 = 4;
/// `WasmBufferType::GrpcReceiveBuffer`.
const MESSAGE: u32 = 5;
/// `WasmBufferType::PluginConfiguration`.
const PLUGIN_CONFIGURATION: u32 = 7;
const REQUEST_BODY: u32 = 0;
/// `WasmStreamType::Request`.
const REQUEST: u32 = 0;
/// `__WASI_CLOCKID_MONOTONIC`, which Envoy serves from the process's steady clock.
const MONOTONIC: u32 = 1;
/// No context: the host falls back to the one whose callback runs.
const NO_CONTEXT: u32 = 0;
/// No gRPC status: an HTTP reply.
const NO_GRPC_STATUS: i32 = -1;
/// A version that no value has, but for one write in 2^32: creates a value and never replaces one. 0 would replace.
const CREATE_ONLY: u32 = u32::MAX;

/// `WasmResult`; none when the call was carried out.
const fn failure(status: u32) -> Option<Status> {
    Some(match status {
        0 => return None,
        1 => Status::NotFound,
        2 => Status::BadArgument,
        3 => Status::SerializationFailure,
        4 => Status::ParseFailure,
        7 => Status::Empty,
        8 => Status::CasMismatch,
        10 => Status::InternalFailure,
        12 => Status::Unimplemented,
        other => Status::Other(other),
    })
}

fn check(call: &'static str, status: u32) -> Result<(), HostError> {
    match failure(status) {
        None => Ok(()),
        Some(status) => Err(HostError { call, status }),
    }
}

/// Bytes that the host wrote into memory which it had this VM allocate.
struct Returned {
    data: *mut u8,
    size: usize,
}

impl Returned {
    const fn none() -> Self {
        Returned { data: null_mut(), size: 0 }
    }

    /// The bytes, now owned here. The host allocates nothing for no bytes.
    fn into_vec(self) -> Vec<u8> {
        if self.data.is_null() || self.size == 0 {
            return Vec::new();
        }
        // SAFETY: the host got `data` from `proxy_on_memory_allocate(size)`, which gives away a boxed slice of exactly
        // that size from this module's allocator, filled all of it, and keeps no pointer to it.
        unsafe { Vec::from_raw_parts(self.data, self.size, self.size) }
    }
}

/// Header pairs as the ABI wants them: the count, the sizes, then names and values with a 0 behind each.
///
/// Sizes are 32 bits, as is the memory of this machine: nothing that exists here is larger.
#[allow(clippy::cast_possible_truncation)]
fn serialize(pairs: &[(&str, &[u8])]) -> Vec<u8> {
    let size = pairs.iter().map(|(name, value)| name.len() + value.len() + 10).sum::<usize>() + 4;
    let mut bytes = Vec::with_capacity(size);
    bytes.extend_from_slice(&(pairs.len() as u32).to_le_bytes());
    for (name, value) in pairs {
        bytes.extend_from_slice(&(name.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(value.len() as u32).to_le_bytes());
    }
    for (name, value) in pairs {
        bytes.extend_from_slice(name.as_bytes());
        bytes.push(0);
        bytes.extend_from_slice(value);
        bytes.push(0);
    }
    bytes
}

/// The first field of that name.
fn field(call: &'static str, map: u32, name: &str) -> Result<Option<Vec<u8>>, HostError> {
    let mut got = Returned::none();
    // SAFETY: `name` and `got` live over the call.
    let status = unsafe {
        abi::proxy_get_header_map_value(map, name.as_ptr(), name.len(), &raw mut got.data, &raw mut got.size)
    };
    match failure(status) {
        None => Ok(Some(got.into_vec())),
        Some(Status::NotFound) => Ok(None),
        Some(status) => Err(HostError { call, status }),
    }
}

/// The beginning of a body, up to `most` bytes.
fn body(call: &'static str, buffer: u32, most: usize) -> Result<Vec<u8>, HostError> {
    let mut got = Returned::none();
    // SAFETY: `got` lives over the call.
    let status = unsafe { abi::proxy_get_buffer_bytes(buffer, 0, most, &raw mut got.data, &raw mut got.size) };
    match failure(status) {
        None => Ok(got.into_vec()),
        Some(Status::NotFound) => Ok(Vec::new()),
        Some(status) => Err(HostError { call, status }),
    }
}

fn remove(call: &'static str, map: u32, name: &str) -> Result<(), HostError> {
    // SAFETY: `name` lives over the call.
    let status = unsafe { abi::proxy_remove_header_map_value(map, name.as_ptr(), name.len()) };
    match failure(status) {
        None | Some(Status::NotFound) => Ok(()),
        Some(status) => Err(HostError { call, status }),
    }
}

/// Where a gRPC call goes, as Envoy's message for it: `GrpcService { envoy_grpc { cluster_name: 1, authority: 2 } }`.
///
/// Envoy takes the bare name of a cluster as well, but only where the name is no such message by chance; and
/// `interlock-etcd` is one. Lengths below 128 are one byte each, which keeps the message the text that the SDK asks for.
fn target(call: &'static str, method: &Method<'_>) -> Result<String, HostError> {
    let mut inner = Vec::new();
    for (tag, text) in [(0x0a, method.cluster), (0x12, method.authority)] {
        if !text.is_empty() {
            inner.extend([tag, u8::try_from(text.len()).unwrap_or(u8::MAX)]);
            inner.extend_from_slice(text.as_bytes());
        }
    }
    let mut target = vec![0x0a, u8::try_from(inner.len()).unwrap_or(u8::MAX)];
    target.append(&mut inner);
    String::from_utf8(target).map_err(|_| HostError { call, status: Status::BadArgument })
}

fn refused(call: &'static str, status: proxy_wasm::types::Status) -> HostError {
    HostError { call, status: failure(status as u32).unwrap_or(Status::InternalFailure) }
}

/// The host of this VM.
#[derive(Clone, Copy, Debug, Default)]
pub struct Envoy;

impl Host for Envoy {
    fn now(&self) -> Time {
        let mut nanos = 0;
        // SAFETY: `nanos` lives over the call.
        let status = unsafe { abi::clock_time_get(MONOTONIC, 1, &raw mut nanos) };
        // A host without this clock has the other one; it may step, but still all VMs see the same.
        if status == 0 { Time::from_micros(nanos / 1000) } else { Time::from_micros(self.unix_micros()) }
    }

    fn unix_micros(&self) -> u64 {
        let mut nanos: u64 = 0;
        // SAFETY: `nanos` lives over the call.
        let _always_ok = unsafe { abi::proxy_get_current_time_nanoseconds(&raw mut nanos) };
        #[cfg(feature = "fault-injection")]
        return crate::fault::clock(nanos / 1000);
        #[cfg(not(feature = "fault-injection"))]
        return nanos / 1000;
    }

    fn random(&self) -> Result<u128, HostError> {
        let mut bytes = [0; 16];
        // SAFETY: `bytes` lives over the call and has the size given.
        check("random", unsafe { abi::random_get(bytes.as_mut_ptr(), bytes.len()) })?;
        Ok(u128::from_le_bytes(bytes))
    }

    fn configuration(&self) -> Result<Vec<u8>, HostError> {
        let mut got = Returned::none();
        // SAFETY: `got` lives over the call.
        check("configuration", unsafe {
            abi::proxy_get_buffer_bytes(PLUGIN_CONFIGURATION, 0, usize::MAX, &raw mut got.data, &raw mut got.size)
        })?;
        Ok(got.into_vec())
    }

    fn request_headers(&self) -> Result<Fields, HostError> {
        let mut got = Returned::none();
        // SAFETY: `got` lives over the call.
        let status =
            unsafe { abi::proxy_get_header_map_pairs(map_of(Headers::Request), &raw mut got.data, &raw mut got.size) };
        check("request_headers", status)?;
        let unreadable = HostError { call: "request_headers", status: Status::ParseFailure };
        Fields::decode(got.into_vec()).ok_or(unreadable)
    }

    fn header(&self, headers: Headers, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        field("header", map_of(headers), name)
    }

    fn header_list(&self, headers: Headers, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        // The ABI's own getter gives the first field only. Envoy's property of the same headers joins all of them; it is
        // asked second because it costs half as much again, and most requests have no such header.
        if self.header(headers, name)?.is_none() {
            return Ok(None);
        }
        let message = match headers {
            Headers::Request => "request",
            Headers::Response => "response",
        };
        match self.property(&[message, "headers", name]) {
            Some(joined) => Ok(Some(joined)),
            None => Err(HostError { call: "header_list", status: Status::NotFound }),
        }
    }

    fn set_header(&self, headers: Headers, name: &str, value: &[u8]) -> Result<(), HostError> {
        // SAFETY: `name` and `value` live over the call.
        check("set_header", unsafe {
            abi::proxy_replace_header_map_value(map_of(headers), name.as_ptr(), name.len(), value.as_ptr(), value.len())
        })
    }

    fn add_header(&self, headers: Headers, name: &str, value: &[u8]) -> Result<(), HostError> {
        // SAFETY: `name` and `value` live over the call.
        check("add_header", unsafe {
            abi::proxy_add_header_map_value(map_of(headers), name.as_ptr(), name.len(), value.as_ptr(), value.len())
        })
    }

    fn remove_header(&self, headers: Headers, name: &str) -> Result<(), HostError> {
        remove("remove_header", map_of(headers), name)
    }

    fn remove_trailer(&self, name: &str) -> Result<(), HostError> {
        remove("remove_trailer", REQUEST_TRAILERS, name)
    }

    fn request_body(&self, most: usize) -> Result<Vec<u8>, HostError> {
        body("request_body", REQUEST_BODY, most)
    }

    fn property(&self, path: &[&str]) -> Option<Vec<u8>> {
        let path = path.join("\0");
        let mut got = Returned::none();
        // SAFETY: `path` and `got` live over the call.
        let status =
            unsafe { abi::proxy_get_property(path.as_ptr(), path.len(), &raw mut got.data, &raw mut got.size) };
        (status == 0).then(|| got.into_vec())
    }

    fn enter(&self, context: ContextId) -> Result<(), HostError> {
        // SAFETY: no pointers.
        check("enter", unsafe { abi::proxy_set_effective_context(context.0) })
    }

    fn leave(&self) {
        // SAFETY: no pointers.
        let _always_ok = unsafe { abi::proxy_set_effective_context(NO_CONTEXT) };
    }

    fn resume(&self) -> Result<(), HostError> {
        // SAFETY: no pointers.
        check("resume", unsafe { abi::proxy_continue_stream(REQUEST) })
    }

    fn reply(&self, reply: &Reply<'_>) -> Result<(), HostError> {
        let headers = serialize(reply.headers);
        let (status, grpc_status) = match reply.grpc_status {
            Some(code) => (200, i32::try_from(code).unwrap_or(i32::MAX)),
            None => (reply.status, NO_GRPC_STATUS),
        };
        let details = if reply.details.is_empty() { null() } else { reply.details.as_ptr() };
        // SAFETY: `details`, the body and `headers` live over the call.
        check("reply", unsafe {
            abi::proxy_send_local_response(
                status,
                details,
                reply.details.len(),
                reply.body.as_ptr(),
                reply.body.len(),
                headers.as_ptr(),
                headers.len(),
                grpc_status,
            )
        })
    }

    fn shared_get(&self, key: &str) -> Result<Option<(Vec<u8>, Cas)>, HostError> {
        let mut got = Returned::none();
        let mut cas = 0;
        // SAFETY: `key`, `got` and `cas` live over the call.
        let status = unsafe {
            abi::proxy_get_shared_data(key.as_ptr(), key.len(), &raw mut got.data, &raw mut got.size, &raw mut cas)
        };
        match failure(status) {
            None => Ok(Some((got.into_vec(), Cas(cas)))),
            Some(Status::NotFound) => Ok(None),
            Some(status) => Err(HostError { call: "shared_get", status }),
        }
    }

    fn shared_set(&self, key: &str, value: &[u8], expected: Expected) -> Result<Stored, HostError> {
        let cas = match expected {
            Expected::Absent => CREATE_ONLY,
            Expected::Version(Cas(version)) => version,
        };
        // SAFETY: `key` and `value` live over the call.
        let status = unsafe { abi::proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), cas) };
        match failure(status) {
            None => Ok(Stored::Yes),
            Some(Status::CasMismatch) => Ok(Stored::Conflict),
            Some(status) => Err(HostError { call: "shared_set", status }),
        }
    }

    fn register_queue(&self, name: &str) -> Result<QueueId, HostError> {
        let mut id = 0;
        // SAFETY: `name` and `id` live over the call.
        check("register_queue", unsafe { abi::proxy_register_shared_queue(name.as_ptr(), name.len(), &raw mut id) })?;
        Ok(QueueId(id))
    }

    fn enqueue(&self, queue: QueueId, message: &[u8]) -> Result<(), HostError> {
        // SAFETY: `message` lives over the call.
        check("enqueue", unsafe { abi::proxy_enqueue_shared_queue(queue.0, message.as_ptr(), message.len()) })
    }

    fn dequeue(&self, queue: QueueId) -> Result<Option<Vec<u8>>, HostError> {
        let mut got = Returned::none();
        // SAFETY: `got` lives over the call.
        let status = unsafe { abi::proxy_dequeue_shared_queue(queue.0, &raw mut got.data, &raw mut got.size) };
        match failure(status) {
            None => Ok(Some(got.into_vec())),
            Some(Status::Empty) => Ok(None),
            Some(status) => Err(HostError { call: "dequeue", status }),
        }
    }

    fn define_metric(&self, kind: MetricKind, name: &str) -> Result<MetricId, HostError> {
        let kind = match kind {
            MetricKind::Counter => 0,
            MetricKind::Gauge => 1,
            MetricKind::Histogram => 2,
        };
        let mut id = 0;
        // SAFETY: `name` and `id` live over the call.
        check("define_metric", unsafe { abi::proxy_define_metric(kind, name.as_ptr(), name.len(), &raw mut id) })?;
        Ok(MetricId(id))
    }

    fn add_metric(&self, metric: MetricId, by: i64) -> Result<(), HostError> {
        if by == 0 {
            return Ok(());
        }
        // SAFETY: no pointers.
        check("add_metric", unsafe { abi::proxy_increment_metric(metric.0, by) })
    }

    fn record_metric(&self, metric: MetricId, value: u64) -> Result<(), HostError> {
        // SAFETY: no pointers.
        check("record_metric", unsafe { abi::proxy_record_metric(metric.0, value) })
    }

    fn read_metric(&self, metric: MetricId) -> Result<u64, HostError> {
        let mut value = 0;
        // SAFETY: `value` lives over the call.
        check("read_metric", unsafe { abi::proxy_get_metric(metric.0, &raw mut value) })?;
        Ok(value)
    }

    fn call(&self, call: &Call<'_>) -> Result<CallToken, HostError> {
        let most = Duration::from_millis(u64::from(u32::MAX));
        let timeout = call.timeout.clamp(Duration::from_millis(1), most);
        let body = (!call.body.is_empty()).then_some(call.body);
        let sent =
            proxy_wasm::hostcalls::dispatch_http_call(call.cluster, call.headers.to_vec(), body, Vec::new(), timeout);
        sent.map(CallToken).map_err(|status| refused("call", status))
    }

    fn answer_header(&self, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        field("answer_header", ANSWER_HEADERS, name)
    }

    fn answer_body(&self, most: usize) -> Result<Vec<u8>, HostError> {
        body("answer_body", ANSWER_BODY, most)
    }

    fn grpc_call(&self, method: &Method<'_>, message: &[u8], timeout: Duration) -> Result<CallToken, HostError> {
        let most = Duration::from_millis(u64::from(u32::MAX));
        let timeout = timeout.clamp(Duration::from_millis(1), most);
        let target = target("grpc_call", method)?;
        let metadata = method.metadata.to_vec();
        let sent = proxy_wasm::hostcalls::dispatch_grpc_call(
            &target,
            method.service,
            method.name,
            metadata,
            Some(message),
            timeout,
        );
        sent.map(CallToken).map_err(|status| refused("grpc_call", status))
    }

    fn grpc_open(&self, method: &Method<'_>) -> Result<StreamToken, HostError> {
        let target = target("grpc_open", method)?;
        let metadata = method.metadata.to_vec();
        let opened = proxy_wasm::hostcalls::open_grpc_stream(&target, method.service, method.name, metadata);
        opened.map(StreamToken).map_err(|status| refused("grpc_open", status))
    }

    fn grpc_send(&self, stream: StreamToken, message: &[u8]) -> Result<(), HostError> {
        // SAFETY: `message` lives over the call.
        check("grpc_send", unsafe { abi::proxy_grpc_send(stream.0, message.as_ptr(), message.len(), 0) })
    }

    fn grpc_cancel(&self, token: u32) -> Result<(), HostError> {
        // SAFETY: no pointers.
        check("grpc_cancel", unsafe { abi::proxy_grpc_cancel(token) })
    }

    fn message(&self, most: usize) -> Result<Vec<u8>, HostError> {
        body("message", MESSAGE, most)
    }

    fn grpc_message(&self) -> String {
        let mut got = Returned::none();
        let mut code = 0;
        // SAFETY: `code` and `got` live over the call.
        let status = unsafe { abi::proxy_get_status(&raw mut code, &raw mut got.data, &raw mut got.size) };
        if status == 0 { String::from_utf8_lossy(&got.into_vec()).into_owned() } else { String::new() }
    }

    fn set_tick(&self, period: Duration) -> Result<(), HostError> {
        let millis = u32::try_from(period.as_micros().div_ceil(1000).max(1)).unwrap_or(u32::MAX);
        // SAFETY: no pointers.
        check("set_tick", unsafe { abi::proxy_set_tick_period_milliseconds(millis) })
    }

    fn log_level(&self) -> Level {
        let mut level = 0;
        // SAFETY: `level` lives over the call.
        let status = unsafe { abi::proxy_get_log_level(&raw mut level) };
        match level {
            // A host that does not say gets every line, and filters them itself.
            _ if status != 0 => Level::Trace,
            0 => Level::Trace,
            1 => Level::Debug,
            2 => Level::Info,
            3 => Level::Warn,
            4 => Level::Error,
            _ => Level::Critical,
        }
    }

    fn log(&self, level: Level, message: &str) {
        let level = match level {
            Level::Trace => 0,
            Level::Debug => 1,
            Level::Info => 2,
            Level::Warn => 3,
            Level::Error => 4,
            Level::Critical => 5,
        };
        // SAFETY: `message` lives over the call.
        let _nowhere_else_to_say_so = unsafe { abi::proxy_log(level, message.as_ptr(), message.len()) };
    }
}
