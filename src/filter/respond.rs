//! What callers are told: the headers of a response that passes by, and the filter's own answers.

use interlock_core::Duration;

use super::stream::{Case, Ended, State, Stream};
use crate::answer::Reject;
use crate::answer::headers::{self, Outcome};
use crate::host::{Headers, Host, HostError, Reply};

/// An answer of the filter's own, ready to be sent.
#[derive(Debug)]
pub struct Answer {
    status: u32,
    details: String,
    headers: Vec<(&'static str, Vec<u8>)>,
    body: Vec<u8>,
    grpc_status: Option<u32>,
}

impl Answer {
    /// The answer to a request that is refused after it waited so long.
    pub fn refusal(case: &Case, reject: &Reject, waited: Duration) -> Self {
        let reason = reject.slug();
        let outcome = Outcome::Refused { reason, lock: reject.lock() };
        let status = headers::lock_status(&case.active.policy.instance, &outcome);
        let timing = headers::server_timing(waited);
        let mut headers = vec![("lock-status", status.into_bytes()), ("server-timing", timing.into_bytes())];
        if let Some(seconds) = reject.retry_after_seconds() {
            headers.push(("retry-after", seconds.to_string().into_bytes()));
        }
        let details = format!("interlock_{}", reason.replace('-', "_"));
        if case.terms.grpc {
            let grpc_status = Some(u32::from(reject.grpc_status()));
            let body = reject.detail().into_bytes();
            return Answer { status: 200, details, headers, body, grpc_status };
        }
        headers.push(("content-type", b"application/problem+json".to_vec()));
        Answer {
            status: u32::from(reject.http_status()),
            details,
            headers,
            body: reject.problem_json(),
            grpc_status: None,
        }
    }

    /// An answer of the lease API. Nobody keeps it: what it says holds now.
    pub fn api(status: u16, content_type: &'static str, body: Vec<u8>, retry_after: Option<u64>) -> Self {
        let mut headers =
            vec![("content-type", content_type.as_bytes().to_vec()), ("cache-control", b"no-store".to_vec())];
        headers.extend(retry_after.map(|seconds| ("retry-after", seconds.to_string().into_bytes())));
        Answer { status: u32::from(status), details: String::from("interlock_api"), headers, body, grpc_status: None }
    }

    /// With a header more.
    #[must_use]
    pub fn and(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.as_bytes().to_vec()));
        self
    }

    /// Sends it to the effective stream.
    ///
    /// # Errors
    /// Those of the host.
    pub fn send(&self, host: &dyn Host) -> Result<(), HostError> {
        let headers: Vec<_> = self.headers.iter().map(|(name, value)| (*name, value.as_slice())).collect();
        host.reply(&Reply {
            status: self.status,
            details: &self.details,
            headers: &headers,
            body: &self.body,
            grpc_status: self.grpc_status,
        })
    }
}

/// Adds to the response of the effective stream what became of its locks, and before it what a guard had against it. Not to
/// the filter's own answers, which pass by here as well and say it already.
pub fn annotate(host: &dyn Host, Stream { case, state, .. }: &Stream) {
    if matches!(state, State::Over(Ended::Answered)) {
        return;
    }
    let add = |outcome: Option<Outcome<'_>>| {
        let status = outcome.map(|outcome| headers::lock_status(&case.active.policy.instance, &outcome));
        // Fails only when the response is gone.
        let _ = status.map(|status| host.add_header(Headers::Response, "lock-status", status.as_bytes()));
    };
    add(case.guarded.as_ref().and_then(|ended| over(ended, case.is_enforced())));
    let so_far = || host.now().since(case.arrived);
    let mut fences = None;
    let mut timing = None;
    let outcome = match state {
        State::Holding(held) if case.is_enforced() => {
            fences = headers::lock_fence(&held.fences);
            timing = Some(headers::server_timing(held.waited));
            Some(Outcome::Acquired { wait: held.waited })
        }
        State::Holding(held) => Some(Outcome::Audit { reason: None, lock: None, wait: Some(held.waited) }),
        // A parked request has no response but one that the host made, because its own patience was at an end.
        State::Waiting(_) if case.is_enforced() => None,
        State::Waiting(_) => Some(Outcome::Audit { reason: None, lock: None, wait: Some(so_far()) }),
        State::Over(ended) => over(ended, case.is_enforced()),
    };
    add(outcome);
    for (name, value) in [("lock-fence", fences), ("server-timing", timing)] {
        // As above.
        let _ = value.map(|value| host.add_header(Headers::Response, name, value.as_bytes()));
    }
}

fn over(ended: &Ended, enforced: bool) -> Option<Outcome<'_>> {
    match ended {
        Ended::Answered => None,
        Ended::Lost(lock) if enforced => Some(Outcome::Lost { lock }),
        Ended::Lost(lock) => Some(Outcome::Audit { reason: Some("lease-lost"), lock: Some(lock), wait: None }),
        Ended::Unlocked => Some(Outcome::Unlocked),
        Ended::WouldRefuse(reject) => {
            Some(Outcome::Audit { reason: Some(reject.slug()), lock: reject.lock(), wait: None })
        }
    }
}
