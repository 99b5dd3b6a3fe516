//! A host for one VM and one request: the fields of an input as headers and properties, shared data in a map, and a clock that
//! stands still until it is told. It counts what it is asked, so that work without bound is seen.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};

use interlock::host::{
    self, Call, CallToken, Cas, ContextId, Expected, Headers, Host, HostError, Level, MetricId, MetricKind, QueueId,
    Reply, Status, Stored,
};
use interlock_core::{Duration, Time};

use crate::fields::Fields;

/// The wall clock of every input, in milliseconds since 1970.
pub const UNIX_MS: u64 = 1_790_000_000_000;

/// What stands under a key of shared data that was never written.
type Initial<'a> = Box<dyn Fn(&str) -> Option<Vec<u8>> + 'a>;

type Shared = BTreeMap<String, (Vec<u8>, Cas)>;

/// See the module.
pub struct Bench<'a> {
    fields: Fields<'a>,
    initial: Initial<'a>,
    now: Cell<u64>,
    written: RefCell<Shared>,
    set: RefCell<BTreeMap<String, Vec<u8>>>,
    mail: RefCell<VecDeque<Vec<u8>>>,
    calls: Cell<u64>,
}

impl<'a> Bench<'a> {
    /// A host with this request.
    pub fn with_request(fields: Fields<'a>) -> Self {
        Bench {
            fields,
            initial: Box::new(|_| None),
            now: Cell::new(1_000_000_000),
            written: RefCell::default(),
            set: RefCell::default(),
            mail: RefCell::default(),
            calls: Cell::default(),
        }
    }

    /// A host with this in its shared data.
    pub fn with_shared(initial: impl Fn(&str) -> Option<Vec<u8>> + 'a) -> Self {
        Bench { initial: Box::new(initial), ..Self::with_request(Fields::parse(&[])) }
    }

    /// Lets time pass.
    pub fn advance(&self, micros: u64) {
        self.now.set(self.now.get() + micros);
    }

    /// The calls since this was last asked.
    pub fn take_calls(&self) -> u64 {
        self.calls.take()
    }

    /// What was written to shared data, under its keys.
    pub fn written(&self) -> BTreeMap<String, Vec<u8>> {
        self.written.borrow().iter().map(|(key, (value, _))| (key.clone(), value.clone())).collect()
    }

    /// A header that was set.
    pub fn set(&self, name: &str) -> Option<Vec<u8>> {
        self.set.borrow().get(name).cloned()
    }

    fn call(&self) {
        self.calls.set(self.calls.get() + 1);
    }

    fn current(&self, key: &str) -> Option<(Vec<u8>, Cas)> {
        let written = self.written.borrow().get(key).cloned();
        written.or_else(|| (self.initial)(key).map(|value| (value, Cas(1))))
    }
}

impl Host for Bench<'_> {
    fn now(&self) -> Time {
        Time::from_micros(self.now.get())
    }

    fn unix_micros(&self) -> u64 {
        UNIX_MS * 1000 + self.now.get() - 1_000_000_000
    }

    fn random(&self) -> Result<u128, HostError> {
        Ok(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
    }

    fn configuration(&self) -> Result<Vec<u8>, HostError> {
        Ok(Vec::new())
    }

    fn request_headers(&self) -> Result<host::Fields, HostError> {
        self.call();
        Ok(self.fields.pairs().collect())
    }

    fn header(&self, _: Headers, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        self.call();
        Ok(self.fields.first(name).map(<[u8]>::to_vec))
    }

    fn header_list(&self, _: Headers, name: &str) -> Result<Option<Vec<u8>>, HostError> {
        self.call();
        let fields = self.fields.all(name);
        Ok((!fields.is_empty()).then(|| fields.join(&b',')))
    }

    fn set_header(&self, _: Headers, name: &str, value: &[u8]) -> Result<(), HostError> {
        self.set.borrow_mut().insert(name.to_owned(), value.to_vec());
        Ok(())
    }

    fn add_header(&self, headers: Headers, name: &str, value: &[u8]) -> Result<(), HostError> {
        self.set_header(headers, name, value)
    }

    fn remove_header(&self, _: Headers, name: &str) -> Result<(), HostError> {
        self.set.borrow_mut().remove(name);
        Ok(())
    }

    /// No request here has trailers.
    fn remove_trailer(&self, _: &str) -> Result<(), HostError> {
        Ok(())
    }

    /// The targets hand bodies over themselves.
    fn request_body(&self, _: usize) -> Result<Vec<u8>, HostError> {
        Ok(Vec::new())
    }

    /// `%route-locks`, `%route` and `%principal` are properties.
    fn property(&self, path: &[&str]) -> Option<Vec<u8>> {
        let name = match path {
            ["xds", "route_metadata", ..] => "%route-locks",
            ["xds", "route_name"] => "%route",
            ["connection", "uri_san_peer_certificate"] => "%principal",
            _ => return None,
        };
        self.fields.first(name).map(<[u8]>::to_vec)
    }

    fn enter(&self, _: ContextId) -> Result<(), HostError> {
        Ok(())
    }

    fn leave(&self) {}

    fn resume(&self) -> Result<(), HostError> {
        Ok(())
    }

    fn reply(&self, _: &Reply<'_>) -> Result<(), HostError> {
        Ok(())
    }

    fn shared_get(&self, key: &str) -> Result<Option<(Vec<u8>, Cas)>, HostError> {
        self.call();
        Ok(self.current(key))
    }

    fn shared_set(&self, key: &str, value: &[u8], expected: Expected) -> Result<Stored, HostError> {
        self.call();
        let current = self.current(key).map(|(_, cas)| cas);
        let fits = match expected {
            Expected::Absent => current.is_none(),
            Expected::Version(cas) => current == Some(cas),
        };
        if !fits {
            return Ok(Stored::Conflict);
        }
        let next = Cas(current.map_or(1, |cas| cas.0 + 1));
        self.written.borrow_mut().insert(key.to_owned(), (value.to_vec(), next));
        Ok(Stored::Yes)
    }

    fn register_queue(&self, _: &str) -> Result<QueueId, HostError> {
        Ok(QueueId(1))
    }

    /// The one queue there is; of other VMs there are none.
    fn enqueue(&self, queue: QueueId, message: &[u8]) -> Result<(), HostError> {
        self.call();
        if queue != QueueId(1) {
            return Err(HostError { call: "enqueue", status: Status::NotFound });
        }
        self.mail.borrow_mut().push_back(message.to_vec());
        Ok(())
    }

    fn dequeue(&self, _: QueueId) -> Result<Option<Vec<u8>>, HostError> {
        Ok(self.mail.borrow_mut().pop_front())
    }

    fn define_metric(&self, _: MetricKind, _: &str) -> Result<MetricId, HostError> {
        Ok(MetricId(1))
    }

    fn add_metric(&self, _: MetricId, _: i64) -> Result<(), HostError> {
        Ok(())
    }

    fn record_metric(&self, _: MetricId, _: u64) -> Result<(), HostError> {
        Ok(())
    }

    fn read_metric(&self, _: MetricId) -> Result<u64, HostError> {
        Ok(0)
    }

    /// There are no other services.
    fn call(&self, _: &Call<'_>) -> Result<CallToken, HostError> {
        Err(HostError { call: "call", status: Status::BadArgument })
    }

    fn answer_header(&self, _: &str) -> Result<Option<Vec<u8>>, HostError> {
        Err(HostError { call: "answer_header", status: Status::BadArgument })
    }

    fn answer_body(&self, _: usize) -> Result<Vec<u8>, HostError> {
        Err(HostError { call: "answer_body", status: Status::BadArgument })
    }

    fn set_tick(&self, _: Duration) -> Result<(), HostError> {
        Ok(())
    }

    fn log_level(&self) -> Level {
        Level::Info
    }

    fn log(&self, _: Level, _: &str) {}
}
