//! A proxy whose locks are an authority's: VM 0 serves the lease API, the others ask it, all over one fake process and clock.
//! Calls go where a test says: through, or nowhere, twice, late. Must not live here: what a test expects.

use interlock_core::Duration;
use serde_json::{Value, json};

use super::proxy::{Call, Proxy};
use super::{plain, secs};
use crate::host::CallToken;
use crate::host::fake::{CallAnswer, SentCall};

/// The table of the authority.
pub(super) const TABLE: &str = "authority/enforce";

/// The longest TTL at the authority, and so how long it grants nothing at first.
const GRACE: Duration = secs(3);

/// The VM that is the authority.
const AUTHORITY: usize = 0;

/// A call that was passed on to the authority.
#[derive(Clone, Copy, Debug)]
struct Passed {
    vm: usize,
    token: CallToken,
    request: Call,
}

/// See the module.
pub(super) struct Link {
    pub(super) proxy: Proxy,
    passed: std::cell::RefCell<Vec<Passed>>,
    /// Whether nothing gets through.
    pub(super) cut: std::cell::Cell<bool>,
}

/// The policy of a proxy that asks.
pub(super) fn asking() -> Value {
    let mut policy = plain();
    policy["backend"] = json!({ "authority": { "cluster": "leases" } });
    policy
}

impl Link {
    /// An authority that grants, and so many VMs that ask it, each as warm as it gets.
    pub(super) fn new(vms: usize, policy: &Value) -> Self {
        let authority = json!({
            "instance": "authority",
            "classes": [{ "name": "a" }, { "name": "b", "within": "unordered" }],
            "limits": { "max_ttl": "3s", "max_wait": "30s" },
            "defaults": { "hold": "1h" },
            "keys": [{ "id": "k", "secret": { "env": "INTERLOCK_KEY" } }],
            "api": {},
        });
        let proxy = Proxy::new(1, &authority);
        for _ in 0..vms {
            proxy.start(policy);
        }
        let link = Link { proxy, passed: std::cell::RefCell::default(), cut: std::cell::Cell::new(false) };
        link.run(GRACE + secs(1));
        link
    }

    /// The calls of all VMs that are not answered and not passed on.
    pub(super) fn calls(&self) -> Vec<(usize, SentCall)> {
        let vms = 1..self.proxy.vms.borrow().len();
        let passed = self.passed.borrow();
        let fresh =
            |vm: usize, call: &SentCall| !passed.iter().any(|known| (known.vm, known.token) == (vm, call.token));
        vms.flat_map(|vm| self.proxy.open_calls(vm).into_iter().map(move |call| (vm, call)))
            .filter(|(vm, call)| fresh(*vm, call))
            .collect()
    }

    /// The one call that is not answered and not passed on.
    pub(super) fn call(&self) -> (usize, SentCall) {
        let mut calls = self.calls();
        assert_eq!(calls.len(), 1, "{calls:?}");
        calls.remove(0)
    }

    /// A call reaches the authority.
    pub(super) fn pass(&self, vm: usize, call: &SentCall) {
        let request = self.ask(call);
        self.passed.borrow_mut().push(Passed { vm, token: call.token, request });
    }

    /// What a call asks, asked of the authority without anybody being told the answer.
    pub(super) fn ask(&self, call: &SentCall) -> Call {
        assert_eq!(call.cluster, "leases");
        let (method, path) = call.target();
        let path = path.strip_prefix("/interlock/v1/").expect("a path of the API");
        let body: Option<Value> = (!call.body.is_empty()).then(|| serde_json::from_slice(&call.body).unwrap());
        self.proxy.api(AUTHORITY, method, path, body.as_ref())
    }

    /// What the authority has answered to a request.
    pub(super) fn answer_to(&self, request: Call) -> CallAnswer {
        let ended = self.proxy.ended(request);
        let reply = ended.stream.replies.first().expect("an answer");
        let headers = reply.headers.iter().map(|(name, value)| (name.clone(), value.clone()));
        let status = (String::from(":status"), reply.status.to_string().into_bytes());
        CallAnswer { headers: Some(core::iter::once(status).chain(headers).collect()), body: reply.body.clone() }
    }

    /// Everything that is under way arrives, without time passing.
    pub(super) fn deliver(&self) {
        loop {
            self.proxy.deliver();
            let mut idle = true;
            for (vm, call) in self.calls() {
                idle = false;
                if self.cut.get() {
                    let gone = CallAnswer::new(503, b"upstream connect error or disconnect/reset before headers");
                    self.proxy.vm(vm).call_answer(call.token, gone);
                } else {
                    self.pass(vm, &call);
                }
            }
            self.proxy.deliver();
            let (done, waiting): (Vec<_>, Vec<_>) =
                self.passed.take().into_iter().partition(|passed| self.proxy.has_ended(passed.request));
            *self.passed.borrow_mut() = waiting;
            for Passed { vm, token, request } in done {
                idle = false;
                self.proxy.vm(vm).call_answer(token, self.answer_to(request));
            }
            if idle {
                return;
            }
        }
    }

    /// Lets that much time pass, with everything getting through as soon as it is sent.
    pub(super) fn run(&self, span: Duration) {
        let end = self.proxy.now() + span;
        self.deliver();
        while self.proxy.step(end) {
            self.deliver();
        }
    }

    /// The entries of a lock at the authority.
    pub(super) fn holders(&self, lock: &str) -> Vec<String> {
        self.proxy.entries(TABLE, lock).iter().map(|entry| entry.owner.to_string()).collect()
    }

    /// Asserts that nothing is left of any request.
    pub(super) fn assert_rest(&self) {
        self.run(secs(4));
        assert_eq!(self.proxy.open(), [], "streams");
        assert_eq!(self.proxy.size(TABLE), (0, 0), "locks and owners");
        assert_eq!(self.proxy.fake.gauges(), std::collections::BTreeMap::new());
        for vm in 1..self.proxy.vms.borrow().len() {
            assert!(self.proxy.vm(vm).is_idle(), "VM {vm} has something to do yet");
        }
    }
}
