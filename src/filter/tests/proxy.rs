//! Several VMs over one fake proxy, on a clock that jumps to the next tick or message.
//!
//! Does what Envoy and `entry` do around a [`Runtime`]: roots with their timers, streams with the configuration that
//! they came under, own answers that pass by the response callback. Must not live here: what a test expects.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use interlock_core::session::BEAT;
use interlock_core::store::{LockBucket, OwnerBucket};
use interlock_core::{Duration, Entry, Time};
use serde_json::Value;

use crate::filter::{Active, Flow, Runtime};
use crate::host::fake::{CallAnswer, Calls, FakeHost, FakeProxy, FakeStream, Phase, SentCall};
use crate::host::{CallToken, ContextId, Host};
use crate::policy::Policy;

type Shared = Rc<RefCell<Runtime>>;

/// One configuration in one VM.
struct Root {
    id: u32,
    active: Rc<Active>,
    runtime: Shared,
}

/// A request, or a stream that it became.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Call {
    pub(super) vm: usize,
    pub(super) id: ContextId,
}

/// A stream that has ended.
#[derive(Clone, Debug)]
pub(super) struct Ended {
    pub(super) stream: FakeStream,
    /// Whether the upstream ever saw it.
    pub(super) forwarded: bool,
    /// Whether it was reset in the middle of its response.
    pub(super) reset: bool,
}

impl Ended {
    /// The status of the plugin's own answer.
    pub(super) fn refused(&self) -> Option<u32> {
        self.stream.replies.first().map(|reply| reply.status)
    }

    /// The one value of a response header.
    pub(super) fn header(&self, name: &str) -> Option<String> {
        let values = self.stream.response_values(name);
        assert!(values.len() <= 1, "{name} is there {} times", values.len());
        values.first().map(|value| String::from_utf8(value.to_vec()).unwrap())
    }
}

struct Open {
    root: u32,
    runtime: Shared,
    forwarded: bool,
}

/// One VM, as long as it lives.
pub(super) struct Vm {
    pub(super) host: FakeHost,
    instances: RefCell<BTreeMap<String, Shared>>,
    roots: RefCell<Vec<Root>>,
    open: RefCell<BTreeMap<ContextId, Open>>,
    ended: RefCell<BTreeMap<ContextId, Ended>>,
    contexts: Cell<u32>,
    /// Whether its thread is busy elsewhere: no callback runs.
    silent: Cell<bool>,
    dead: Cell<bool>,
}

/// Configures a policy, for tests that say what it is.
pub(super) fn active(policy: &Value) -> Rc<Active> {
    let env = |name: &str| (name == "INTERLOCK_KEY").then(|| "0123456789abcdef0123456789abcdef".to_owned());
    Rc::new(Active::new(Policy::parse(policy.to_string().as_bytes(), &env).unwrap()))
}

impl Vm {
    fn new(host: FakeHost) -> Self {
        Vm {
            host,
            instances: RefCell::default(),
            roots: RefCell::default(),
            open: RefCell::default(),
            ended: RefCell::default(),
            contexts: Cell::new(0),
            silent: Cell::new(false),
            dead: Cell::new(false),
        }
    }

    fn context(&self) -> u32 {
        self.contexts.set(self.contexts.get() + 1);
        self.contexts.get()
    }

    /// A new root with that configuration; gives back its id.
    pub(super) fn configure(&self, active: &Rc<Active>) -> u32 {
        let id = self.context();
        self.host.set_root(id);
        self.host.run(None);
        let instance = active.policy.instance.clone();
        let known = self.instances.borrow().get(&instance).cloned();
        let runtime = known.map_or_else(
            || Rc::new(RefCell::new(Runtime::open(&self.host, Rc::clone(active)).unwrap())),
            |runtime| {
                runtime.borrow_mut().reconfigure(&self.host, Rc::clone(active)).unwrap();
                runtime
            },
        );
        self.instances.borrow_mut().insert(instance, Rc::clone(&runtime));
        self.host.set_tick(BEAT).unwrap();
        self.roots.borrow_mut().push(Root { id, active: Rc::clone(active), runtime });
        id
    }

    /// The roots that have not gone, oldest first.
    pub(super) fn roots(&self) -> Vec<u32> {
        self.roots.borrow().iter().map(|root| root.id).collect()
    }

    /// A root has gone: its timer and its messages with it.
    pub(super) fn drop_root(&self, root: u32) {
        self.roots.borrow_mut().retain(|other| other.id != root);
        self.host.drop_root(root);
    }

    fn tick(&self, root: u32) {
        self.host.set_root(root);
        self.host.run(None);
        let all: Vec<Shared> = {
            let mut instances = self.instances.borrow_mut();
            instances.retain(|_, runtime| Rc::strong_count(runtime) > 1 || !runtime.borrow_mut().close(&self.host));
            instances.values().cloned().collect()
        };
        let due = all.iter().map(|runtime| runtime.borrow_mut().tick(&self.host)).min();
        self.host.set_tick(due.unwrap_or(BEAT)).unwrap();
        self.host.rearm(root);
        self.settle();
    }

    fn queue_ready(&self, root: u32, queue: crate::host::QueueId) {
        let runtime = self.roots.borrow().iter().find(|other| other.id == root).map(|root| Rc::clone(&root.runtime));
        // Envoy says nothing to a root that has gone.
        let Some(runtime) = runtime else { return };
        self.host.set_root(root);
        self.host.run(None);
        runtime.borrow_mut().queue_ready(&self.host, queue);
        self.settle();
    }

    /// The host has an answer to a call. False where nobody is told of it.
    pub(super) fn call_answer(&self, token: CallToken, answer: CallAnswer) -> bool {
        let headers = answer.count();
        let Some(call) = self.host.answer_call(token, answer) else { return false };
        let all: Vec<Shared> = self.instances.borrow().values().cloned().collect();
        for runtime in all {
            runtime.borrow_mut().call_answered(&self.host, token, headers, call.stream.is_some());
        }
        self.host.answered_call();
        self.settle();
        true
    }

    /// Whether nothing is asked for, held or to be given back at an authority.
    pub(super) fn is_idle(&self) -> bool {
        self.instances.borrow().values().all(|runtime| runtime.borrow().backends.is_idle())
    }

    /// The instances that live in it.
    pub(super) fn instances(&self) -> Vec<String> {
        self.instances.borrow().keys().cloned().collect()
    }

    /// The last callback of a root, before the process ends.
    pub(super) fn root_done(&self, root: u32) {
        self.host.set_root(root);
        self.host.run(None);
        for runtime in self.instances.borrow().values() {
            runtime.borrow_mut().attend(&self.host);
        }
    }

    /// The request headers of a new stream, of that root or else of the latest one.
    pub(super) fn request(&self, root: Option<u32>, headers: &[(&str, &str)]) -> ContextId {
        self.request_with(root, headers, &[])
    }

    pub(super) fn request_with(
        &self,
        root: Option<u32>,
        headers: &[(&str, &str)],
        properties: &[(&str, &str)],
    ) -> ContextId {
        let (root, active, runtime) = {
            let roots = self.roots.borrow();
            let root = roots.iter().rev().find(|other| root.is_none_or(|root| other.id == root)).unwrap();
            (root.id, Rc::clone(&root.active), Rc::clone(&root.runtime))
        };
        self.host.set_root(root);
        let id = self.host.open(self.context(), headers);
        for (path, value) in properties {
            self.host.set_property(id, path, value.as_bytes());
        }
        let open = Open { root, runtime: Rc::clone(&runtime), forwarded: false };
        self.open.borrow_mut().insert(id, open);
        // As the host says it of requests without a body.
        let end = !headers.iter().any(|(name, _)| *name == "content-length");
        let flow = runtime.borrow_mut().request_headers(&self.host, id, &active, end);
        if flow == Flow::Continue {
            assert!(self.host.stream(id).replies.is_empty(), "answered and forwarded");
            self.host.enter_phase(id, Phase::Upstream);
        }
        self.settle();
        id
    }

    /// A callback of a stream.
    fn within<T>(&self, id: ContextId, phase: Phase, act: impl FnOnce(&mut Runtime) -> T) -> T {
        let (root, runtime) = {
            let open = self.open.borrow();
            let open = open.get(&id).expect("an open stream");
            (open.root, Rc::clone(&open.runtime))
        };
        self.host.set_root(root);
        self.host.enter_phase(id, phase);
        act(&mut runtime.borrow_mut())
    }

    /// The upstream's response headers.
    pub(super) fn respond(&self, id: ContextId, headers: &[(&str, &str)]) {
        assert_eq!(self.host.stream(id).phase, Phase::Upstream, "only the upstream responds");
        let fields: Vec<_> =
            headers.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec())).collect();
        self.host.respond(id, &fields);
        let _ = self.within(id, Phase::Response, |runtime| runtime.response_headers(&self.host, id));
        if let [reply] = &self.host.stream(id).replies[..] {
            // An answer in the place of the upstream's, which nobody has seen yet, goes out as it is.
            self.open.borrow_mut().get_mut(&id).unwrap().forwarded = true;
            self.host.respond(id, &reply.headers);
            self.finish(id, false);
        }
        self.settle();
    }

    /// An answer that the host makes itself, whatever the stream is doing.
    pub(super) fn host_answers(&self, id: ContextId, headers: &[(&str, &str)]) {
        let fields: Vec<_> =
            headers.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().to_vec())).collect();
        self.host.respond(id, &fields);
        self.within(id, Phase::Response, |runtime| runtime.response_headers(&self.host, id));
        self.settle();
    }

    pub(super) fn body(&self, id: ContextId) -> Flow {
        let phase = self.host.stream(id).phase;
        let flow = self.within(id, phase, |runtime| runtime.request_body(&self.host, id, 4, true));
        self.settle();
        flow
    }

    /// The request's trailers come; gives back those that go on.
    pub(super) fn trailers(&self, id: ContextId, active: &Active, fields: &[&str]) -> Vec<String> {
        let phase = self.host.stream(id).phase;
        let given = fields.iter().map(|name| ((*name).to_owned(), b"a/1;fence=9".to_vec())).collect();
        self.host.edit(id, |stream| stream.trailers = Some(given));
        let flow = self.within(id, phase, |runtime| runtime.request_trailers(&self.host, id, &active.policy));
        assert_eq!(flow, Flow::Continue);
        self.settle();
        self.host.stream(id).trailers.unwrap().into_iter().map(|(name, _)| name).collect()
    }

    /// The whole body of a request whose headers wait for it.
    pub(super) fn whole_body(&self, id: ContextId, body: &[u8]) {
        self.host.buffer(id, body);
        let flow = self.within(id, Phase::Request, |runtime| runtime.request_body(&self.host, id, body.len(), true));
        assert_eq!(flow, Flow::Stop, "no request to the API goes upstream");
        self.settle();
    }

    /// The stream ends, wherever it is.
    pub(super) fn end(&self, id: ContextId) {
        self.finish(id, false);
        self.settle();
    }

    fn finish(&self, id: ContextId, reset: bool) {
        let seen = matches!(self.host.stream(id).phase, Phase::Upstream | Phase::Response);
        self.within(id, Phase::Log, |runtime| runtime.end(&self.host, id));
        let stream = self.host.close(id);
        let open = self.open.borrow_mut().remove(&id).unwrap();
        assert!(stream.resumed <= 1 && stream.replies.len() <= 1, "{stream:?}");
        let forwarded = open.forwarded || stream.resumed > 0 || (seen && stream.replies.is_empty());
        let ended = Ended { stream, forwarded, reset };
        assert!(self.ended.borrow_mut().insert(id, ended).is_none());
    }

    /// What the host does after a callback: sends the answers that the plugin gave in it.
    fn settle(&self) {
        self.host.run(None);
        for id in self.host.answered() {
            let stream = self.host.stream(id);
            let begun = stream.phase == Phase::Response;
            if stream.phase != Phase::Request {
                self.open.borrow_mut().get_mut(&id).unwrap().forwarded = true;
            }
            if !begun {
                self.host.respond(id, &stream.replies[0].headers);
                let _ = self.within(id, Phase::Response, |runtime| runtime.response_headers(&self.host, id));
            }
            self.finish(id, begun);
        }
    }
}

/// The whole proxy.
pub(super) struct Proxy {
    pub(super) fake: Rc<FakeProxy>,
    pub(super) vms: RefCell<Vec<Rc<Vm>>>,
}

impl Proxy {
    /// That many VMs under one policy, in which no request has come yet.
    pub(super) fn new(vms: usize, policy: &Value) -> Self {
        let proxy = Proxy { fake: FakeProxy::new(), vms: RefCell::default() };
        for _ in 0..vms {
            proxy.start(policy);
        }
        proxy
    }

    /// One more VM.
    pub(super) fn start(&self, policy: &Value) -> usize {
        let vm = Rc::new(Vm::new(self.fake.host()));
        vm.configure(&active(policy));
        self.vms.borrow_mut().push(vm);
        self.vms.borrow().len() - 1
    }

    pub(super) fn vm(&self, vm: usize) -> Rc<Vm> {
        Rc::clone(&self.vms.borrow()[vm])
    }

    pub(super) fn now(&self) -> Time {
        self.fake.now()
    }

    /// A VM crashes: it gets no callback any more, and its streams none either.
    pub(super) fn kill(&self, vm: usize) {
        let vm = self.vm(vm);
        vm.dead.set(true);
        vm.instances.borrow_mut().clear();
        vm.roots.borrow_mut().clear();
        vm.open.borrow_mut().clear();
    }

    /// A VM's thread is stuck, or not any more.
    pub(super) fn silence(&self, vm: usize, silent: bool) {
        self.vm(vm).silent.set(silent);
    }

    /// Delivers what is in the queues, without time passing.
    pub(super) fn deliver(&self) {
        loop {
            let mut idle = true;
            for vm in self.vms.borrow().iter().filter(|vm| !vm.silent.get() && !vm.dead.get()) {
                for (root, queue) in vm.host.deliveries() {
                    idle = false;
                    vm.queue_ready(root, queue);
                }
            }
            if idle {
                return;
            }
        }
    }

    /// The calls of a VM that are not answered.
    pub(super) fn open_calls(&self, vm: usize) -> Vec<SentCall> {
        self.vm(vm).host.open_calls()
    }

    /// Delivers what is in the queues, then jumps to the next tick or the end of a call's time, and runs that. False where none
    /// comes until `end`; the clock shows `end` then.
    pub(super) fn step(&self, end: Time) -> bool {
        self.deliver();
        let late = {
            let vms = self.vms.borrow();
            let awake = vms.iter().filter(|vm| !vm.silent.get() && !vm.dead.get());
            let calls =
                awake.flat_map(|vm| vm.host.open_calls().into_iter().map(|call| (call.due, call.token, Rc::clone(vm))));
            calls.min_by_key(|(due, token, _)| (*due, *token))
        };
        let next = {
            let vms = self.vms.borrow();
            let awake = vms.iter().filter(|vm| !vm.silent.get() && !vm.dead.get());
            let ticks = awake.filter_map(|vm| vm.host.next_tick().map(|(due, root)| (due, root, Rc::clone(vm))));
            ticks.min_by_key(|(due, root, _)| (*due, *root))
        };
        let now = self.now();
        if let Some((due, token, vm)) = late.filter(|(late, ..)| *late <= end)
            && next.as_ref().is_none_or(|(tick, ..)| due <= *tick)
        {
            self.fake.advance(due.since(now));
            vm.call_answer(token, CallAnswer::new(504, b"upstream request timeout"));
            return true;
        }
        match next.filter(|(due, ..)| *due <= end) {
            Some((due, root, vm)) => {
                self.fake.advance(due.since(now));
                vm.tick(root);
                true
            }
            None => {
                self.fake.advance(end.since(now));
                false
            }
        }
    }

    /// Lets that much time pass.
    pub(super) fn run(&self, span: Duration) {
        let end = self.now() + span;
        while self.step(end) {}
    }

    /// Lets time pass until something is so, and gives back how long that took.
    ///
    /// # Panics
    /// When it is not so within `limit`.
    pub(super) fn until(&self, what: &str, limit: Duration, done: impl Fn() -> bool) -> Duration {
        let start = self.now();
        self.deliver();
        while !done() {
            assert!(self.step(start + limit), "not within {limit:?}: {what}");
        }
        self.now().since(start)
    }

    /// A request for locks by header.
    pub(super) fn lock(&self, vm: usize, owner: &str, locks: &str) -> Call {
        self.request(vm, &[(":method", "POST"), (":path", "/"), ("x-request-id", owner), ("lock", locks)])
    }

    pub(super) fn request(&self, vm: usize, headers: &[(&str, &str)]) -> Call {
        Call { vm, id: self.vm(vm).request(None, headers) }
    }

    /// A request to the lease API.
    pub(super) fn api(&self, vm: usize, method: &str, path: &str, body: Option<&Value>) -> Call {
        self.api_as(vm, method, path, body, &[], &[])
    }

    /// As [`Proxy::api`], with further headers and properties.
    pub(super) fn api_as(
        &self,
        vm: usize,
        method: &str,
        path: &str,
        body: Option<&Value>,
        headers: &[(&str, &str)],
        properties: &[(&str, &str)],
    ) -> Call {
        let path = format!("/interlock/v1/{path}");
        let mut all = vec![(":method", method), (":path", path.as_str())];
        all.extend_from_slice(headers);
        let text = body.map(Value::to_string);
        if text.is_some() {
            all.push(("content-length", "1"));
        }
        let id = self.vm(vm).request_with(None, &all, properties);
        if let Some(text) = text {
            self.vm(vm).whole_body(id, text.as_bytes());
        }
        Call { vm, id }
    }

    /// The status and the JSON of an answer of the plugin's own.
    pub(super) fn answer(&self, call: Call) -> (u32, Value) {
        let ended = self.ended(call);
        let reply = ended.stream.replies.first().expect("an answer");
        (reply.status, serde_json::from_slice(&reply.body).unwrap())
    }

    /// Where a stream is that has not ended.
    pub(super) fn phase(&self, call: Call) -> Option<Phase> {
        let vm = self.vm(call.vm);
        let open = vm.open.borrow().contains_key(&call.id);
        open.then(|| vm.host.stream(call.id).phase)
    }

    pub(super) fn is_parked(&self, call: Call) -> bool {
        self.phase(call) == Some(Phase::Request)
    }

    pub(super) fn is_upstream(&self, call: Call) -> bool {
        self.phase(call) == Some(Phase::Upstream)
    }

    pub(super) fn respond(&self, call: Call) {
        self.vm(call.vm).respond(call.id, &[(":status", "200")]);
    }

    pub(super) fn end(&self, call: Call) {
        self.vm(call.vm).end(call.id);
    }

    /// The upstream responds, and the stream ends.
    pub(super) fn complete(&self, call: Call) -> Ended {
        self.respond(call);
        self.end(call);
        self.ended(call)
    }

    pub(super) fn has_ended(&self, call: Call) -> bool {
        self.vm(call.vm).ended.borrow().contains_key(&call.id)
    }

    pub(super) fn ended(&self, call: Call) -> Ended {
        self.vm(call.vm).ended.borrow().get(&call.id).cloned().expect("a stream that has ended")
    }

    /// What the plugin told the caller in `lock-status`.
    pub(super) fn status(&self, call: Call) -> String {
        self.ended(call).header("lock-status").unwrap_or_default()
    }

    /// The fence of a lock as the upstream sees it.
    pub(super) fn fence(&self, call: Call, lock: &str) -> Option<u64> {
        let stream = self.vm(call.vm).host.stream(call.id);
        let values = stream.request_values("lock-fence");
        assert!(values.len() <= 1, "{values:?}");
        let text = String::from_utf8(values.first()?.to_vec()).unwrap();
        let member = text.split(", ").find_map(|member| member.strip_prefix(&format!("{lock};fence=")))?.to_owned();
        Some(member.split(';').next()?.parse().unwrap())
    }

    /// All streams that have not ended.
    pub(super) fn open(&self) -> Vec<Call> {
        let vms = self.vms.borrow();
        let of = |(vm, streams): (usize, &Rc<Vm>)| {
            streams.open.borrow().keys().map(move |id| Call { vm, id: *id }).collect::<Vec<_>>()
        };
        vms.iter().enumerate().flat_map(of).collect()
    }

    /// The entries of a lock in one table.
    pub(super) fn entries(&self, table: &str, lock: &str) -> Vec<Entry> {
        let buckets = self.records::<LockBucket>(table, "l");
        let queues = buckets.iter().flatten().flat_map(LockBucket::queues);
        queues.filter(|queue| queue.name.as_str() == lock).flat_map(|queue| queue.entries().to_vec()).collect()
    }

    /// The records of one kind in a table; none for one that cannot be read.
    fn records<R: interlock_core::store::Record>(&self, table: &str, kind: &str) -> Vec<Option<R>> {
        let prefix = format!("interlock/3/{table}/{kind}/");
        let shared = self.fake.shared();
        let records = shared.iter().filter(|(key, _)| key.starts_with(&prefix));
        records.map(|(_, value)| postcard::from_bytes(&value[1..]).ok()).collect()
    }

    /// How many locks and owners a table knows.
    pub(super) fn size(&self, table: &str) -> (usize, usize) {
        let (locks, owners) = (self.records::<LockBucket>(table, "l"), self.records::<OwnerBucket>(table, "o"));
        let locks = locks.iter().map(|bucket| bucket.as_ref().unwrap().queues().len()).sum();
        let owners = owners.iter().map(|bucket| bucket.as_ref().unwrap().holdings().len()).sum();
        (locks, owners)
    }

    /// Asserts that nothing is left of any request: no stream, no entry, no gauge.
    pub(super) fn assert_rest(&self, table: &str) {
        assert_eq!(self.open(), [], "streams");
        self.assert_empty(table);
    }

    /// Asserts that the table empties and that gauges show it, within a little more than two sweeps.
    pub(super) fn assert_empty(&self, table: &str) {
        self.run(Duration::from_secs(3));
        assert_eq!(self.size(table), (0, 0), "locks and owners");
        assert_eq!(self.fake.gauges(), BTreeMap::new());
    }

    /// The calls that a VM makes while something happens.
    pub(super) fn calls<T>(&self, vm: usize, act: impl FnOnce() -> T) -> (T, Calls) {
        let vm = self.vm(vm);
        vm.host.take_calls();
        let answer = act();
        (answer, vm.host.take_calls())
    }
}
