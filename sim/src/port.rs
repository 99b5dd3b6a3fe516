//! The host as a VM sees it: every call of it is a moment at which another VM may run instead.
//!
//! Two sides of one thing: a [`Store`] of plain records for the core's table, and a [`Host`] with bytes under keys for the
//! shipped backend. What must not live here: any rule about locks.

use std::cell::{RefCell, RefMut};
use std::rc::Rc;

use corosensei::Yielder;
use interlock::host::{
    Call, CallToken, Cas, ContextId, Expected, Fields, Headers, Host, HostError, Level, MetricId, MetricKind, QueueId,
    Reply, Status, Stored,
};
use interlock_core::session::Sessions;
use interlock_core::store::{LockBucket, OwnerBucket, Record, Version};
use interlock_core::{Duration, Store, StoreError, Time};

use crate::state::{BARE_BUCKETS, Plant, State};

/// Why a VM stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// It is about to call its host.
    Call,
    /// It has nothing to do.
    Idle,
}

/// What a VM is told when it runs again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Go {
    /// Go on.
    On,
    /// End, being idle.
    End,
}

/// One VM's way to everything outside it.
pub struct Port<'y> {
    yielder: &'y Yielder<Go, Pause>,
    state: Rc<RefCell<State>>,
    /// Which VM it is.
    pub vm: usize,
}

impl<'y> Port<'y> {
    /// The port of a VM that runs as the coroutine of `yielder`.
    pub fn new(yielder: &'y Yielder<Go, Pause>, state: Rc<RefCell<State>>, vm: usize) -> Self {
        Port { yielder, state, vm }
    }

    /// Everything outside. Never kept over a call.
    pub fn state(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    /// Waits for something to do. False where the VM has to end.
    pub fn idle(&self) -> bool {
        self.yielder.suspend(Pause::Idle) == Go::On
    }

    /// The moment before a call: the VM goes on at once, or others run first.
    fn pause(&self) {
        if self.state().budget == 0 {
            self.yielder.suspend(Pause::Call);
        }
        let mut state = self.state();
        state.budget = state.budget.saturating_sub(1);
        state.counts.calls += 1;
        if state.running != self.vm {
            let preempted = state.vms.get(state.running).is_some_and(|other| other.alive && other.busy);
            state.counts.preemptions += u64::from(preempted);
            state.running = self.vm;
            let vm = self.vm;
            state.trace.mark(1, vm);
        }
    }

    fn store_call(&self) -> Result<RefMut<'_, State>, StoreError> {
        self.pause();
        let mut state = self.state();
        if state.fails(self.vm) { Err(StoreError::Failed(String::from("a fault"))) } else { Ok(state) }
    }

    fn host_call(&self, call: &'static str) -> Result<RefMut<'_, State>, HostError> {
        self.pause();
        let mut state = self.state();
        if state.fails(self.vm) { Err(HostError { call, status: Status::InternalFailure }) } else { Ok(state) }
    }
}

impl Store for Port<'_> {
    fn buckets(&self) -> u32 {
        BARE_BUCKETS
    }

    fn bucket(&self, name: &str) -> u32 {
        name.bytes().map(u32::from).sum::<u32>() % BARE_BUCKETS
    }

    fn read<R: Record>(&self, index: u32) -> Result<(R, Version), StoreError> {
        let mut state = self.store_call()?;
        let vm = self.vm;
        state.trace.line(|| format!("    vm{vm} reads {:?} {index}", R::KIND));
        let (record, version) = state.record::<R>(index);
        Ok((record, Version(version)))
    }

    fn write<R: Record>(&self, index: u32, record: &R, version: Version) -> Result<bool, StoreError> {
        let mut state = self.store_call()?;
        if state.collides(self.vm) {
            return Ok(false);
        }
        if state.version(R::KIND, index) != version.0 {
            state.counts.conflicts += 1;
            if state.plant != Plant::StaleWrite {
                return Ok(false);
            }
        }
        state.commit(self.vm, index, record);
        Ok(true)
    }
}

/// A record as the shipped backend writes it: a byte for the format, then postcard.
fn decoded<R: Record>(bytes: &[u8]) -> Option<R> {
    bytes.split_first().and_then(|(_, record)| postcard::from_bytes(record).ok())
}

/// Which record a key is of, by its last segments.
fn mirror(state: &mut State, vm: usize, key: &str, value: &[u8]) -> bool {
    let mut segments = key.rsplit('/');
    let (last, kind) = (segments.next().unwrap_or_default(), segments.next().unwrap_or_default());
    match (kind, last.parse::<u32>()) {
        ("l", Ok(index)) => decoded::<LockBucket>(value).map(|record| state.commit(vm, index, &record)),
        ("o", Ok(index)) => decoded::<OwnerBucket>(value).map(|record| state.commit(vm, index, &record)),
        _ if last == "s" => decoded::<Sessions>(value).map(|record| state.commit(vm, 0, &record)),
        _ => Some(()),
    }
    .is_some()
}

fn unimplemented<T>(call: &'static str) -> Result<T, HostError> {
    Err(HostError { call, status: Status::Unimplemented })
}

impl Host for Port<'_> {
    fn now(&self) -> Time {
        self.state().now
    }

    fn unix_micros(&self) -> u64 {
        self.state().unix
    }

    fn random(&self) -> Result<u128, HostError> {
        let mut state = self.state();
        state.randoms += 1;
        Ok(u128::from(state.randoms) << 64 | 0x5eed)
    }

    fn shared_get(&self, key: &str) -> Result<Option<(Vec<u8>, Cas)>, HostError> {
        let state = self.host_call("shared_get")?;
        Ok(state.shared.get(key).map(|(value, version)| (value.clone(), Cas(*version))))
    }

    fn shared_set(&self, key: &str, value: &[u8], expected: Expected) -> Result<Stored, HostError> {
        let mut state = self.host_call("shared_set")?;
        if state.collides(self.vm) {
            return Ok(Stored::Conflict);
        }
        let current = state.shared.get(key).map(|(_, version)| *version);
        // As Envoy does it: a version given for a key that is not there is not looked at.
        let fits = match (expected, current) {
            (_, None) => true,
            (Expected::Absent, Some(_)) => false,
            (Expected::Version(Cas(version)), Some(current)) => version == current,
        };
        if !fits {
            state.counts.conflicts += 1;
            if state.plant != Plant::StaleWrite {
                return Ok(Stored::Conflict);
            }
        }
        let version = state.next_cas;
        state.next_cas = version.checked_add(1).unwrap_or(1);
        state.shared.insert(key.to_owned(), (value.to_vec(), version));
        if !mirror(&mut state, self.vm, key, value) {
            state.violated(|| format!("what was stored under {key} cannot be read"));
        }
        Ok(Stored::Yes)
    }

    fn register_queue(&self, _name: &str) -> Result<QueueId, HostError> {
        let mut state = self.host_call("register_queue")?;
        Ok(QueueId(state.new_mailbox(self.vm)))
    }

    fn enqueue(&self, queue: QueueId, message: &[u8]) -> Result<(), HostError> {
        let lease = <[u8; 16]>::try_from(message).map(u128::from_le_bytes).unwrap_or_default();
        let done = self.host_call("enqueue").map(|mut state| state.enqueue(self.vm, queue.0, lease));
        match done {
            Ok(true) => Ok(()),
            Ok(false) => Err(HostError { call: "enqueue", status: Status::NotFound }),
            Err(error) => {
                self.state().unsent(self.vm, interlock_core::LeaseId(lease));
                Err(error)
            }
        }
    }

    fn dequeue(&self, queue: QueueId) -> Result<Option<Vec<u8>>, HostError> {
        let mut state = self.host_call("dequeue")?;
        Ok(state.dequeue(queue.0).map(|lease| lease.to_le_bytes().to_vec()))
    }

    fn log_level(&self) -> Level {
        Level::Critical
    }

    fn log(&self, _level: Level, _message: &str) {}

    // The backend asks for nothing below.

    fn configuration(&self) -> Result<Vec<u8>, HostError> {
        unimplemented("configuration")
    }

    fn request_headers(&self) -> Result<Fields, HostError> {
        unimplemented("request_headers")
    }

    fn header(&self, _: Headers, _: &str) -> Result<Option<Vec<u8>>, HostError> {
        unimplemented("header")
    }

    fn header_list(&self, _: Headers, _: &str) -> Result<Option<Vec<u8>>, HostError> {
        unimplemented("header_list")
    }

    fn set_header(&self, _: Headers, _: &str, _: &[u8]) -> Result<(), HostError> {
        unimplemented("set_header")
    }

    fn add_header(&self, _: Headers, _: &str, _: &[u8]) -> Result<(), HostError> {
        unimplemented("add_header")
    }

    fn remove_header(&self, _: Headers, _: &str) -> Result<(), HostError> {
        unimplemented("remove_header")
    }

    fn remove_trailer(&self, _: &str) -> Result<(), HostError> {
        unimplemented("remove_trailer")
    }

    fn request_body(&self, _: usize) -> Result<Vec<u8>, HostError> {
        unimplemented("request_body")
    }

    fn property(&self, _: &[&str]) -> Option<Vec<u8>> {
        None
    }

    fn enter(&self, _: ContextId) -> Result<(), HostError> {
        unimplemented("enter")
    }

    fn leave(&self) {}

    fn resume(&self) -> Result<(), HostError> {
        unimplemented("resume")
    }

    fn reply(&self, _: &Reply<'_>) -> Result<(), HostError> {
        unimplemented("reply")
    }

    fn define_metric(&self, _: MetricKind, _: &str) -> Result<MetricId, HostError> {
        unimplemented("define_metric")
    }

    fn add_metric(&self, _: MetricId, _: i64) -> Result<(), HostError> {
        unimplemented("add_metric")
    }

    fn record_metric(&self, _: MetricId, _: u64) -> Result<(), HostError> {
        unimplemented("record_metric")
    }

    fn read_metric(&self, _: MetricId) -> Result<u64, HostError> {
        unimplemented("read_metric")
    }

    fn call(&self, _: &Call<'_>) -> Result<CallToken, HostError> {
        unimplemented("call")
    }

    fn answer_header(&self, _: &str) -> Result<Option<Vec<u8>>, HostError> {
        unimplemented("answer_header")
    }

    fn answer_body(&self, _: usize) -> Result<Vec<u8>, HostError> {
        unimplemented("answer_body")
    }

    fn set_tick(&self, _: Duration) -> Result<(), HostError> {
        unimplemented("set_tick")
    }
}
