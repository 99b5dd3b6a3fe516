//! What the SDK calls: contexts of Envoy become calls of [`Runtime`]. Nothing is decided here.
//!
//! State is the VM's, not a context's: it is found by instance, so that a new root of a changed configuration takes it
//! over. It is never borrowed twice: replies and resumes take effect after the callback that asked for them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use interlock_core::session::BEAT;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};

use crate::filter::{Active, Flow, Runtime};
use crate::host::envoy::Envoy;
use crate::host::{CallToken, ContextId, Host, Level, QueueId, StreamToken};
use crate::policy::Policy;

type Shared = Rc<RefCell<Runtime>>;

thread_local! {
    /// The instances that live in this VM.
    static INSTANCES: RefCell<BTreeMap<String, Shared>> = const { RefCell::new(BTreeMap::new()) };
}

static HOST: Envoy = Envoy;

/// A request makes many small allocations; this allocator is made for a single thread and for this target.
#[global_allocator]
static HEAP: talc::wasm::WasmDynamicTalc = talc::wasm::new_wasm_dynamic_allocator();

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Trace);
    proxy_wasm::set_root_context(|id| Box::new(Root { id: ContextId(id), running: None }));
}}

/// One configuration of the filter.
struct Root {
    id: ContextId,
    running: Option<(Rc<Active>, Shared)>,
}

impl Root {
    fn configure(&mut self) -> Result<(), String> {
        let json = HOST.configuration().map_err(|error| error.to_string())?;
        let policy = Policy::parse(&json, &|name| std::env::var(name).ok()).map_err(|error| error.to_string())?;
        let instance = policy.instance.clone();
        let active = Rc::new(Active::new(policy));
        let known = INSTANCES.with(|instances| instances.try_borrow().ok().and_then(|all| all.get(&instance).cloned()));
        let runtime = match known {
            Some(runtime) => {
                let mut borrowed = runtime.try_borrow_mut().map_err(|error| error.to_string())?;
                borrowed.in_root(self.id);
                borrowed.reconfigure(&HOST, Rc::clone(&active)).map_err(|error| error.to_string())?;
                drop(borrowed);
                runtime
            }
            None => {
                let runtime = Runtime::open(&HOST, Rc::clone(&active)).map_err(|error| error.to_string())?;
                let runtime = Rc::new(RefCell::new(runtime));
                INSTANCES.with(|instances| match instances.try_borrow_mut() {
                    Ok(mut all) => drop(all.insert(instance, Rc::clone(&runtime))),
                    Err(_) => HOST.log(Level::Critical, "interlock: the instances of this VM are in use"),
                });
                runtime
            }
        };
        HOST.set_tick(BEAT).map_err(|error| error.to_string())?;
        self.running = Some((active, runtime));
        Ok(())
    }
}

impl Root {
    /// The instances, for a callback of this root.
    fn all(&self) -> Vec<Shared> {
        let all = all();
        for runtime in &all {
            with(runtime, |runtime| runtime.in_root(self.id));
        }
        all
    }

    /// The same, for a callback that nothing was done in yet: there a stream may be opened.
    fn all_afresh(&self) -> Vec<Shared> {
        let all = self.all();
        let _ = all.iter().any(|runtime| with(runtime, |runtime| runtime.open_stream(&HOST)).unwrap_or(false));
        all
    }
}

impl Context for Root {
    fn on_http_call_response(&mut self, token: u32, headers: usize, _: usize, _: usize) {
        self.all();
        answered(token, headers, false);
    }

    fn on_grpc_call_response(&mut self, token: u32, status: u32, _: usize) {
        self.all();
        called(token, status, false);
    }

    fn on_grpc_stream_message(&mut self, token: u32, _: usize) {
        for runtime in self.all() {
            with(&runtime, |runtime| runtime.stream_message(&HOST, StreamToken(token)));
        }
    }

    fn on_grpc_stream_close(&mut self, token: u32, status: u32) {
        for runtime in self.all() {
            with(&runtime, |runtime| runtime.stream_closed(&HOST, StreamToken(token), status));
        }
    }

    /// The last chance to send something: the process may end.
    fn on_done(&mut self) -> bool {
        for runtime in self.all() {
            with(&runtime, |runtime| runtime.attend(&HOST));
        }
        true
    }
}

impl RootContext for Root {
    fn on_configure(&mut self, _: usize) -> bool {
        let configured = self.configure();
        if let Err(problem) = &configured {
            HOST.log(Level::Critical, &format!("interlock: the policy is refused: {problem}"));
        }
        configured.is_ok()
    }

    fn on_tick(&mut self) {
        let due = self.all_afresh().into_iter().filter_map(|runtime| with(&runtime, |runtime| runtime.tick(&HOST)));
        if let Err(error) = HOST.set_tick(due.min().unwrap_or(BEAT)) {
            HOST.log(Level::Error, &format!("interlock: {error}"));
        }
    }

    fn on_queue_ready(&mut self, queue: u32) {
        // It may be another instance's: whichever root ticks listens for all.
        for runtime in self.all_afresh() {
            with(&runtime, |runtime| runtime.queue_ready(&HOST, QueueId(queue)));
        }
    }

    fn create_http_context(&self, id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Stream { id: ContextId(id), running: self.running.clone() }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

/// One request.
struct Stream {
    id: ContextId,
    running: Option<(Rc<Active>, Shared)>,
}

impl Stream {
    fn with<T>(&self, act: impl FnOnce(&mut Runtime, &Rc<Active>) -> T) -> Option<T> {
        let (active, runtime) = self.running.as_ref()?;
        with(runtime, |runtime| act(runtime, active))
    }
}

impl Context for Stream {
    /// To the host it is a callback of the root; the SDK has made the stream the effective one.
    fn on_http_call_response(&mut self, token: u32, headers: usize, _: usize, _: usize) {
        HOST.leave();
        answered(token, headers, true);
    }

    /// As above.
    fn on_grpc_call_response(&mut self, token: u32, status: u32, _: usize) {
        HOST.leave();
        called(token, status, true);
    }
}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _: usize, end: bool) -> Action {
        #[cfg(feature = "fault-injection")]
        crate::fault::inject(&HOST);
        action(self.with(|runtime, active| runtime.request_headers(&HOST, self.id, active, end)))
    }

    fn on_http_request_body(&mut self, size: usize, end: bool) -> Action {
        action(self.with(|runtime, _| runtime.request_body(&HOST, self.id, size, end)))
    }

    fn on_http_request_trailers(&mut self, _: usize) -> Action {
        action(self.with(|runtime, active| runtime.request_trailers(&HOST, self.id, &active.policy)))
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        action(self.with(|runtime, _| runtime.response_headers(&HOST, self.id)))
    }

    fn on_log(&mut self) {
        self.with(|runtime, _| runtime.end(&HOST, self.id));
    }
}

/// The answer to a call goes to the instance that called.
fn answered(token: u32, headers: usize, of_stream: bool) {
    for runtime in all() {
        with(&runtime, |runtime| runtime.call_answered(&HOST, CallToken(token), headers, of_stream));
    }
}

/// The same, over gRPC.
fn called(token: u32, status: u32, of_stream: bool) {
    for runtime in all() {
        with(&runtime, |runtime| runtime.method_answered(&HOST, CallToken(token), status, of_stream));
    }
}

fn with<T>(runtime: &Shared, act: impl FnOnce(&mut Runtime) -> T) -> Option<T> {
    let Ok(mut runtime) = runtime.try_borrow_mut() else {
        HOST.log(Level::Critical, "interlock: called back while it was at work");
        return None;
    };
    Some(act(&mut runtime))
}

/// All instances of the VM, those that no configuration names any more only while they have streams.
fn all() -> Vec<Shared> {
    let all = INSTANCES.with(|instances| {
        instances.try_borrow_mut().map(|mut all| {
            all.retain(|_, runtime| Rc::strong_count(runtime) > 1 || !with(runtime, close).unwrap_or(false));
            all.values().cloned().collect()
        })
    });
    all.unwrap_or_default()
}

/// Ends a runtime that nothing refers to, if nothing hangs on it.
fn close(runtime: &mut Runtime) -> bool {
    runtime.close(&HOST)
}

/// What the host is told. Where there is no answer the request is not let through without its locks.
fn action(flow: Option<Flow>) -> Action {
    match flow {
        Some(Flow::Continue) => Action::Continue,
        Some(Flow::Stop) | None => Action::Pause,
    }
}
