//! What the plugin asks of its host: one trait, and the words it needs.
//!
//! Everything above this module is written against [`Host`], so that it runs natively over a fake proxy. Only
//! `envoy` knows the ABI. What must not live here: anything about locks, policies or HTTP semantics.
//!
//! # Whose stream a call acts on
//! Header, property, resume and reply calls act on the *effective* context: the stream whose callback runs, or none in
//! a root callback (tick, queue). To act on another stream use `within` (on `dyn Host`), which enters it and leaves it
//! again whatever the closure does. Replies and resumes take effect only after the running callback has returned, so
//! they never call back into the plugin while it runs.
//!
//! Three traps of Envoy (1.40, measured), none of which it answers with an error:
//! - A reply or resume while a root is effective does nothing, and the stream that was meant hangs.
//! - A reply to **another** stream from within a header or body callback pauses the stream whose callback runs, whatever
//!   that callback returns, for ever: the host keeps one "stop" flag a VM. Reply to others from root callbacks only.
//!   Resuming others is fine from anywhere.
//! - Header values are not checked: a carriage return or line feed set here is forwarded. Set only what was encoded.

#[cfg(target_arch = "wasm32")]
pub mod envoy;
#[cfg(test)]
pub(crate) mod fake;
mod fields;

use core::fmt;

use interlock_core::{Duration, Time};

pub use fields::Fields;

/// A stream or a root of this VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContextId(pub u32);

/// A shared queue. The number is valid in every VM of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueId(pub u32);

/// A metric as this process knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MetricId(pub u32);

/// A call of another service that was sent. Unique in this VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CallToken(pub u32);

/// A gRPC stream to another service that was opened. Unique in this VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamToken(pub u32);

/// A method of another service, over gRPC.
#[derive(Clone, Copy, Debug)]
pub struct Method<'a> {
    /// The cluster that serves it, as Envoy's configuration names it. It must speak HTTP/2.
    pub cluster: &'a str,
    /// The `:authority` of the call; empty: that of the cluster.
    pub authority: &'a str,
    /// The service, with its package.
    pub service: &'a str,
    /// The method.
    pub name: &'a str,
    /// Metadata to begin with.
    pub metadata: &'a [(&'a str, &'a [u8])],
}

/// A call of another service, over HTTP.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// The cluster that it goes to, as Envoy's configuration names it.
    pub cluster: &'a str,
    /// Its headers, with `:method`, `:path` and `:authority`.
    pub headers: &'a [(&'a str, &'a str)],
    /// Its body.
    pub body: &'a [u8],
    /// When the host gives it up; raised to a millisecond, since 0 would mean never.
    pub timeout: Duration,
}

/// The version of a shared value. Changes with every write; never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cas(pub u32);

/// What must be true of a shared value for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Nothing was ever stored under the key.
    Absent,
    /// The value is still the one that was read with this version.
    Version(Cas),
}

/// What came of a conditional write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Stored {
    /// The value is stored.
    Yes,
    /// Somebody else wrote first; nothing is changed.
    Conflict,
}

/// Which headers of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Headers {
    /// Of the request. Readable in the request phase only, until it is resumed.
    Request,
    /// Of the response. Readable in the response phase only.
    Response,
}

/// The kinds of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MetricKind {
    /// Only rises.
    Counter,
    /// Rises and falls. One value for the whole process: add and subtract, never set.
    Gauge,
    /// A distribution.
    Histogram,
}

/// How much a log line matters. Ordered: more important is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Every step.
    Trace,
    /// For developers.
    Debug,
    /// Normal events.
    Info,
    /// Someone should look.
    Warn,
    /// Something failed.
    Error,
    /// The plugin cannot do its work.
    Critical,
}

/// A local reply to a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reply<'a> {
    /// The HTTP status. A gRPC request gets 200 and [`Reply::grpc_status`].
    pub status: u32,
    /// For access logs (`%RESPONSE_CODE_DETAILS%`): a word without spaces.
    pub details: &'a str,
    /// Further headers. `content-length` is set by the host.
    pub headers: &'a [(&'a str, &'a [u8])],
    /// The body; of a gRPC reply, the `grpc-message`.
    pub body: &'a [u8],
    /// The gRPC status of the reply; only where the request is a gRPC request, for on others the host answers 200.
    pub grpc_status: Option<u32>,
}

/// Why the host did not do what it was asked, in the words of the ABI (`WasmResult`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// The thing named is not there.
    NotFound,
    /// The call makes no sense now: a context that is gone, headers out of their phase, an unknown metric or queue.
    BadArgument,
    /// The value cannot be brought into bytes.
    SerializationFailure,
    /// The argument could not be read.
    ParseFailure,
    /// Nothing in the queue.
    Empty,
    /// The version is another one by now.
    CasMismatch,
    /// Something in the host, or a capability that the configuration denies.
    InternalFailure,
    /// The host does not know this call.
    Unimplemented,
    /// Any other status, by its number.
    Other(u32),
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Status::NotFound => f.write_str("not found"),
            Status::BadArgument => f.write_str("bad argument"),
            Status::SerializationFailure => f.write_str("serialization failure"),
            Status::ParseFailure => f.write_str("parse failure"),
            Status::Empty => f.write_str("empty"),
            Status::CasMismatch => f.write_str("version mismatch"),
            Status::InternalFailure => f.write_str("internal failure"),
            Status::Unimplemented => f.write_str("unimplemented"),
            Status::Other(number) => write!(f, "status {number}"),
        }
    }
}

/// A call that the host did not carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host refused {call}: {status}")]
pub struct HostError {
    /// Which call: the method of [`Host`].
    pub call: &'static str,
    /// What the host said.
    pub status: Status,
}

/// The proxy that the plugin runs in, as one VM sees it. Nothing here panics, and no status of the host is swallowed
/// except where a method says so.
pub trait Host {
    /// The monotonic clock, in microseconds since an origin that changes with the machine's boot. All VMs of the process
    /// read the same one, so moments may be compared across them. Never steps back.
    fn now(&self) -> Time;

    /// The wall clock: microseconds since 1970. May step in either direction.
    fn unix_micros(&self) -> u64;

    /// 128 unguessable bits.
    ///
    /// # Errors
    /// Where the host has no randomness to give.
    fn random(&self) -> Result<u128, HostError>;

    /// The plugin's configuration. Only within `on_configure`.
    ///
    /// # Errors
    /// Outside of it.
    fn configuration(&self) -> Result<Vec<u8>, HostError>;

    /// All headers of the effective stream's request, in one call of the host.
    ///
    /// # Errors
    /// As [`Host::header`] for those of a request; `ParseFailure` for an answer of the host that is none.
    fn request_headers(&self) -> Result<Fields, HostError>;

    /// The value of the **first** field of that name of the effective stream; none where it is absent. Any bytes.
    ///
    /// # Errors
    /// `BadArgument` outside the phase of these headers, or without a stream. Request headers are there while the request
    /// is, parked or not, until it is resumed; and again once the stream ends, or is answered locally.
    fn header(&self, headers: Headers, name: &str) -> Result<Option<Vec<u8>>, HostError>;

    /// All fields of that name, joined by commas, as a List may be spread over them (RFC 9110, section 5.3); none where it
    /// is absent. One call of the host where it is absent, two where it is there.
    ///
    /// # Errors
    /// As [`Host::header`].
    fn header_list(&self, headers: Headers, name: &str) -> Result<Option<Vec<u8>>, HostError>;

    /// Sets a header of the effective stream: all fields of that name become this one.
    ///
    /// # Errors
    /// As [`Host::header`].
    fn set_header(&self, headers: Headers, name: &str, value: &[u8]) -> Result<(), HostError>;

    /// Adds a field to the headers of the effective stream, after those of the same name.
    ///
    /// # Errors
    /// As [`Host::header`].
    fn add_header(&self, headers: Headers, name: &str, value: &[u8]) -> Result<(), HostError>;

    /// Removes all fields of that name, if there are any, from the headers of the effective stream.
    ///
    /// # Errors
    /// As [`Host::header`].
    fn remove_header(&self, headers: Headers, name: &str) -> Result<(), HostError>;

    /// Removes all fields of that name, if there are any, from the trailers of the effective stream's request.
    ///
    /// # Errors
    /// `BadArgument` outside of the callback for those trailers.
    fn remove_trailer(&self, name: &str) -> Result<(), HostError>;

    /// The part of the effective stream's request body that is buffered, up to `most` bytes of it. Only in its body
    /// callback; what that stops is buffered, and there again in the next.
    ///
    /// # Errors
    /// Outside that callback.
    fn request_body(&self, most: usize) -> Result<Vec<u8>, HostError>;

    /// A property of the effective stream, or of the node; none where there is none, or it cannot be had as bytes.
    fn property(&self, path: &[&str]) -> Option<Vec<u8>>;

    /// Makes another context of this VM the effective one, until [`Host::leave`]. Prefer
    /// `within` (on `dyn Host`).
    ///
    /// # Errors
    /// `BadArgument` when that context is gone.
    fn enter(&self, context: ContextId) -> Result<(), HostError>;

    /// Makes the context whose callback runs the effective one again.
    fn leave(&self);

    /// Lets the parked request of the effective stream go on. Never together with [`Host::reply`].
    ///
    /// # Errors
    /// What the host says of it. Envoy says nothing of a root that is effective by mistake.
    fn resume(&self) -> Result<(), HostError>;

    /// Answers the effective stream's request; once its response has begun, resets the stream instead. The response
    /// callbacks of the stream run for this answer too, and what they add to its headers is added. Mind the module's
    /// traps.
    ///
    /// # Errors
    /// What the host says of it.
    fn reply(&self, reply: &Reply<'_>) -> Result<(), HostError>;

    /// Reads a shared value and its version; none where nothing was ever stored.
    ///
    /// # Errors
    /// What the host says of it.
    fn shared_get(&self, key: &str) -> Result<Option<(Vec<u8>, Cas)>, HostError>;

    /// Writes a shared value if `expected` holds.
    ///
    /// # Errors
    /// What the host says of it; a lost race is no error.
    fn shared_set(&self, key: &str, value: &[u8], expected: Expected) -> Result<Stored, HostError>;

    /// Makes the queue of that name, and delivers its messages to this root from now on.
    ///
    /// # Errors
    /// What the host says of it.
    fn register_queue(&self, name: &str) -> Result<QueueId, HostError>;

    /// Puts a message into a queue, of any VM.
    ///
    /// # Errors
    /// `NotFound` where no such queue was ever registered.
    fn enqueue(&self, queue: QueueId, message: &[u8]) -> Result<(), HostError>;

    /// Takes the oldest message of a queue; none where it is empty.
    ///
    /// # Errors
    /// `NotFound` where no such queue was ever registered.
    fn dequeue(&self, queue: QueueId) -> Result<Option<Vec<u8>>, HostError>;

    /// Finds or makes a metric. Costs more than using it: keep the id.
    ///
    /// # Errors
    /// What the host says of it.
    fn define_metric(&self, kind: MetricKind, name: &str) -> Result<MetricId, HostError>;

    /// Adds to a counter or a gauge. Adding 0 is not passed on.
    ///
    /// # Errors
    /// `NotFound` for an unknown metric, `BadArgument` for a counter that would fall. A gauge below 0 is no error: it
    /// shows as a number near 2^64.
    fn add_metric(&self, metric: MetricId, by: i64) -> Result<(), HostError>;

    /// Records a value in a histogram.
    ///
    /// # Errors
    /// `NotFound` for an unknown metric.
    fn record_metric(&self, metric: MetricId, value: u64) -> Result<(), HostError>;

    /// Reads a counter or a gauge.
    ///
    /// # Errors
    /// `NotFound` for an unknown metric, `BadArgument` for a histogram.
    fn read_metric(&self, metric: MetricId) -> Result<u64, HostError>;

    /// Sends a call to another service. Its answer comes to the context whose callback runs now, a root or a stream, and is
    /// then read with [`Host::answer_header`] and [`Host::answer_body`]. A stream that has gone meanwhile is told nothing,
    /// and the call goes on; a call of a root that goes is cancelled, and nobody is told.
    ///
    /// # Errors
    /// `BadArgument` for a cluster that is not there or a missing header; `InternalFailure` where the call ended at once: the
    /// cluster has no healthy host, or its circuit breaker is open. No answer comes then.
    fn call(&self, call: &Call<'_>) -> Result<CallToken, HostError>;

    /// The value of the first field of that name of the answer to a call; none where it is absent. Only in the callback for
    /// that answer.
    ///
    /// # Errors
    /// `BadArgument` outside of it, or where the answer has no headers at all, because it was cut or is over the host's limit.
    fn answer_header(&self, name: &str) -> Result<Option<Vec<u8>>, HostError>;

    /// Up to `most` bytes of the body of the answer to a call; none outside the callback for that answer.
    ///
    /// # Errors
    /// What the host says of it.
    fn answer_body(&self, most: usize) -> Result<Vec<u8>, HostError>;

    // A host without gRPC need not say so.

    /// Calls a method of another service over gRPC: one message, one answer. The answer comes as that of [`Host::call`] does,
    /// and is then read with [`Host::message`], or [`Host::grpc_message`] where it failed.
    ///
    /// # Errors
    /// `InternalFailure` where it ended at once: the cluster is not there, or has no healthy host. No answer comes then.
    fn grpc_call(&self, method: &Method<'_>, message: &[u8], timeout: Duration) -> Result<CallToken, HostError> {
        let _ = (method, message, timeout);
        Err(HostError { call: "grpc_call", status: Status::Unimplemented })
    }

    /// Opens a stream of messages in both directions, which belongs to the root whose callback runs: from that of a root
    /// only. It is closed with that root, and nobody is told.
    ///
    /// # Errors
    /// As [`Host::grpc_call`].
    fn grpc_open(&self, method: &Method<'_>) -> Result<StreamToken, HostError> {
        let _ = method;
        Err(HostError { call: "grpc_open", status: Status::Unimplemented })
    }

    /// Sends a message on a stream. From callbacks of a root only.
    ///
    /// # Errors
    /// `NotFound` for one that is closed.
    fn grpc_send(&self, stream: StreamToken, message: &[u8]) -> Result<(), HostError> {
        let _ = (stream, message);
        Err(HostError { call: "grpc_send", status: Status::Unimplemented })
    }

    /// Resets a stream, or has a call given up. Nobody is told of its end.
    ///
    /// # Errors
    /// `NotFound` for one that is over.
    fn grpc_cancel(&self, token: u32) -> Result<(), HostError> {
        let _ = token;
        Err(HostError { call: "grpc_cancel", status: Status::Unimplemented })
    }

    /// Up to `most` bytes of the message whose callback runs; none outside of it.
    ///
    /// # Errors
    /// What the host says of it.
    fn message(&self, most: usize) -> Result<Vec<u8>, HostError> {
        let _ = most;
        Err(HostError { call: "message", status: Status::Unimplemented })
    }

    /// The words that go with the status of the call, or of the stream, whose end is being told; empty where there are none.
    fn grpc_message(&self) -> String {
        String::new()
    }

    /// Asks for ticks of the root of the effective context, one this span after the last; rounded up to whole
    /// milliseconds, at least one. A new call replaces the running timer: the next tick is this span from now.
    ///
    /// # Errors
    /// What the host says of it.
    fn set_tick(&self, period: Duration) -> Result<(), HostError>;

    /// The least level that the host writes.
    fn log_level(&self) -> Level;

    /// Writes a log line.
    fn log(&self, level: Level, message: &str);
}

impl dyn Host + '_ {
    /// Runs `act` with `context` effective, and leaves it again afterwards. Does not nest.
    ///
    /// # Errors
    /// `BadArgument` when that context is gone; `act` has not run then.
    pub fn within<T>(&self, context: ContextId, act: impl FnOnce(&Self) -> T) -> Result<T, HostError> {
        self.enter(context)?;
        let result = act(self);
        self.leave();
        Ok(result)
    }
}
