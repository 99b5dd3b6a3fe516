//! Filters to compare Interlock with, built for Envoy only: one that does nothing, one that calls a service before the
//! request goes on, and one that calls it again when the answer has gone. A lock that is kept anywhere but in the proxy costs at least these calls.
//!
//! The plugin's configuration says which: `none`, `one` or `two`. No lock and nothing clever lives here.

#![cfg(target_arch = "wasm32")]

use std::time::Duration;

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};

/// The cluster that is called.
const CLUSTER: &str = "answerer";
const TIMEOUT: Duration = Duration::from_secs(5);

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Warn);
    proxy_wasm::set_root_context(|_| Box::new(Root { calls: Calls::None }));
}}

#[derive(Clone, Copy)]
enum Calls {
    None,
    /// Before the request goes on.
    One,
    /// And one that nobody waits for, when it has ended.
    Two,
}

struct Root {
    calls: Calls,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _size: usize) -> bool {
        self.calls = match self.get_plugin_configuration().as_deref() {
            Some(b"none") => Calls::None,
            Some(b"one") => Calls::One,
            Some(b"two") => Calls::Two,
            _ => return false,
        };
        true
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }

    fn create_http_context(&self, _id: u32) -> Option<Box<dyn HttpContext>> {
        Some(match self.calls {
            Calls::None => Box::new(Nothing),
            Calls::One => Box::new(Calling { again: false }),
            Calls::Two => Box::new(Calling { again: true }),
        })
    }
}

struct Nothing;

impl Context for Nothing {}

impl HttpContext for Nothing {}

struct Calling {
    again: bool,
}

impl Calling {
    fn call(&self) -> bool {
        let head = vec![(":method", "POST"), (":path", "/"), (":authority", CLUSTER)];
        self.dispatch_http_call(CLUSTER, head, None, vec![], TIMEOUT).is_ok()
    }

    fn fail(&self) {
        self.send_http_response(503, vec![], None);
    }
}

impl Context for Calling {
    fn on_http_call_response(&mut self, _token: u32, headers: usize, _body: usize, _trailers: usize) {
        let status = if headers == 0 { None } else { self.get_http_call_response_header_bytes(":status") };
        if status.as_deref() == Some(b"200") {
            self.resume_http_request();
        } else {
            self.fail();
        }
    }
}

impl HttpContext for Calling {
    fn on_http_request_headers(&mut self, _count: usize, _end: bool) -> Action {
        if !self.call() {
            self.fail();
        }
        Action::Pause
    }

    fn on_log(&mut self) {
        if self.again {
            self.call();
        }
    }
}
