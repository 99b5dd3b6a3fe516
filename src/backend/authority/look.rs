//! Asking an authority who holds a lock. It changes nothing there, so an answer that nobody hears is no loss.

use interlock_core::{Duration, LockName};

use super::wire::{self, Reply};
use crate::api::told::{self, Held};
use crate::host::{CallToken, Host, HostError};
use crate::policy::Authority as At;

/// Why nothing is known of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unknown {
    /// The failure in metrics.
    pub reason: &'static str,
    /// For people.
    pub detail: &'static str,
}

impl Unknown {
    /// Nobody has told of an answer.
    pub const UNANSWERED: Unknown = Unknown { reason: "no-answer", detail: "the lock authority did not answer" };
    /// The host has not sent it.
    pub const UNSENT: Unknown = Unknown { reason: "dispatch", detail: "the lock authority could not be asked" };
}

/// When a question of which nothing is heard is given up.
pub fn patience(at: &At) -> Duration {
    at.timeout + super::SLACK
}

/// Asks who holds a lock. The answer comes to the context whose callback runs.
///
/// # Errors
/// Those of the host.
pub fn ask(host: &dyn Host, at: &At, lock: &LockName) -> Result<CallToken, HostError> {
    wire::send(host, at, ("GET", &format!("locks/{lock}")), b"", at.timeout)
}

/// Reads the answer whose callback runs. `headers`: how many it has.
///
/// # Errors
/// It says nothing, or is not to be believed.
pub fn answer(host: &dyn Host, headers: usize, lock: &LockName) -> Result<Held, Unknown> {
    let unknown = |reason, detail| Unknown { reason, detail };
    match wire::reply(host, headers) {
        Reply::Whole { status: 200, body, .. } => told::held(&body, lock)
            .map_err(|error| unknown(error.reason(), "the lock authority's answer cannot be used")),
        Reply::Whole { .. } => Err(unknown("status", "the lock authority cannot tell")),
        Reply::Timeout => Err(unknown("timeout", "the lock authority did not answer in time")),
        Reply::None => Err(unknown("unreachable", "the lock authority could not be reached")),
    }
}
