//! What the client wants done becomes calls of the host.

use std::rc::Rc;

use interlock_core::lease::{Ask, CallId, Do};
use interlock_core::{Duration, LeaseId, Time};

use super::{Authority, Renewal, SLACK, Sent, What, wire};
use crate::answer::Reject;
use crate::api::told::Granted;
use crate::host::{CallToken, ContextId, Host, HostError};

impl Authority {
    /// Sends one thing. `from`: the stream whose callback runs, and which the answer goes to; none for a root.
    pub(super) fn send(&mut self, host: &dyn Host, next: Do<Rc<Granted>, Box<Reject>>, from: Option<ContextId>) {
        let now = host.now();
        match next {
            Do::Put { call, lease, ask, wait, timeout } => {
                self.send_put(host, now, from, (call, lease, &ask, wait, timeout))
            }
            Do::Renew { call, leases, timeout } => {
                let bodies = wire::renew(leases.iter().map(|(lease, granted)| (*lease, &**granted)));
                self.renewals.insert(call, Renewal { open: bodies.len(), answers: Vec::new() });
                for (leases, body) in bodies {
                    let what = What::Renew { call, leases };
                    if self.call(host, now, ("POST", "leases/renew"), &body, timeout, what).is_err() {
                        self.notes.failures.push("dispatch");
                        self.part_renewed(now, call, None);
                    }
                }
            }
            Do::Delete { call, lease, timeout } => {
                let path = format!("leases/{}", wire::spell(lease));
                if self.call(host, now, ("DELETE", &path), &[], timeout, What::Delete { call }).is_err() {
                    self.notes.failures.push("dispatch");
                    self.fail(now, call, None, "");
                }
            }
            Do::Granted { .. } | Do::Refused { .. } | Do::Lost { .. } => {}
        }
    }

    /// Calls the authority, and keeps in mind what the call was and when it is given up.
    pub(super) fn call(
        &mut self,
        host: &dyn Host,
        now: Time,
        target: (&str, &str),
        body: &[u8],
        timeout: Duration,
        what: What,
    ) -> Result<CallToken, HostError> {
        let token = wire::send(host, &self.target, target, body, timeout)?;
        let due = now + timeout + SLACK;
        self.due.insert((due, token));
        self.sent.insert(token, Sent { at: now, due, what });
        Ok(token)
    }

    fn send_put(
        &mut self,
        host: &dyn Host,
        now: Time,
        from: Option<ContextId>,
        (call, lease, ask, wait, timeout): (CallId, LeaseId, &Ask, Duration, Duration),
    ) {
        let found = match from {
            Some(stream) => self.entries.get_key_value(&stream),
            None => self.entries.iter().find(|(_, entry)| entry.lease == lease),
        };
        let Some((stream, entry)) = found.map(|(stream, entry)| (*stream, entry)) else {
            // It was given up before it was sent.
            return self.fail(now, call, None, "");
        };
        let path = format!("leases/{}", wire::spell(lease));
        let body = wire::put(&entry.wish, ask.ttl, now, wait);
        match self.call(host, now, ("PUT", &path), &body, timeout, What::Put { call, stream, lease }) {
            Ok(token) => {
                if let Some(entry) = self.entries.get_mut(&stream).filter(|_| from.is_some()) {
                    entry.own = Some(token);
                }
            }
            Err(error) => {
                self.notes.failures.push("dispatch");
                let detail = format!("the lock authority cannot be called ({})", error.status);
                self.put_failed(now, stream, call, true, None, false, &detail);
            }
        }
    }
}
