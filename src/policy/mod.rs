//! The policy: what the plugin's configuration says, read once, checked as a whole, and then only looked at.
//!
//! Pure: bytes in, a [`Policy`] or one line of complaint out. Must not live here: anything that calls the host, and
//! what is done about a request.

mod api;
mod backend;
mod duration;
mod guard;
mod keys;
mod parse;
mod parse_rules;
mod path;
mod reader;
mod rules;
mod share;
mod template;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_rules;
mod wire;

use std::collections::BTreeMap;
use std::time::Duration;

use interlock_core::{Classes, Mode, Want};

pub use api::Api;
pub use backend::{Access, Authority, Backend, Etcd};
pub use duration::{LONGEST, parse as parse_duration, spell as spell_duration};
pub use guard::{Check, Guard};
pub use keys::{BadSignature, Keys, Signed};
pub use reader::PolicyError;
pub use rules::{Chosen, Conditions, Lookup, Match, Rule, RuleLock, Rules};
pub use share::Share;
pub use template::{FillError, Source, Template};

use crate::annotation::Wanted;
use crate::annotation::owner::OwnerSource;

/// The shortest TTL: below it a renewal could come too late on a busy machine.
pub const MIN_TTL: Duration = Duration::from_millis(100);

/// Whether a policy or a rule acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enforcement {
    /// Requests wait and are refused.
    Enforce,
    /// Requests of these owners wait and are refused; decisions about all others only are made, as under audit.
    Partly(Share),
    /// Decisions are made on a shadow table, counted, and change nothing.
    Audit,
    /// Nothing happens.
    Off,
}

impl Enforcement {
    /// Whether there are requests whose decisions are made on the shadow table.
    pub fn audits(self) -> bool {
        matches!(self, Enforcement::Audit | Enforcement::Partly(_))
    }
}

/// Which requests re-enter a lock that their owner holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reentrancy {
    /// Any request of the owner.
    Owner,
    /// One that carries a verified fence of the holder's lease.
    Lease,
    /// None.
    None,
}

/// What becomes of a request when the backend does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnUnavailable {
    /// It is refused.
    Reject,
    /// It goes on without a lock.
    Allow,
}

/// What becomes of a request whose lease is lost while it is upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLeaseLost {
    /// It is answered `lease-lost`, or reset where the response has begun.
    Abort,
    /// It goes on; the loss is counted and logged.
    Continue,
}

/// What becomes of a request's `lock` header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderAnnotations {
    /// It is obeyed and consumed.
    Accept,
    /// It is left to a later hop.
    Pass,
    /// It is removed unread.
    Strip,
    /// The request is refused.
    Reject,
}

/// What becomes of annotations in a route's metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteAnnotations {
    /// They are obeyed.
    Accept,
    /// They are not read.
    Ignore,
}

/// Which annotations count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Annotations {
    /// The `lock` header.
    pub header: HeaderAnnotations,
    /// Route metadata.
    pub route: RouteAnnotations,
}

/// What an annotation or a rule leaves unsaid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// The mode: exclusive or shared.
    pub mode: Mode,
    /// The longest time to stand in a queue.
    pub wait: Duration,
    /// How long a grant outlives its last renewal.
    pub ttl: Duration,
    /// The longest total time that a grant may be renewed for.
    pub hold: Duration,
}

/// The limits of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Locks asked for by one request.
    pub locks_per_request: u32,
    /// Locks held and waited for by one owner; not counted where there is none.
    pub locks_per_owner: Option<u32>,
    /// Requests that wait for one lock.
    pub waiters_per_lock: u32,
    /// The longest wait of a request.
    pub max_wait: Duration,
    /// The longest TTL.
    pub max_ttl: Duration,
    /// Locks held in the whole table.
    pub locks: u32,
    /// Requests that wait in the whole table.
    pub waiters: u32,
}

/// A configuration of the plugin, valid as a whole.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Names the filter in `lock-status` and keys its shared data: 1 to 64 of `A-Z a-z 0-9 . _ -`, a letter first, so
    /// that it is a structured-field Token too.
    pub instance: String,
    /// Whether the filter acts; rules carry their own answer.
    pub enforcement: Enforcement,
    /// Where an owner's name is looked for, in this order. Never empty.
    pub owner_from: Vec<OwnerSource>,
    /// Which requests re-enter a lock that their owner holds.
    pub reentrancy: Reentrancy,
    /// Where the lock table is.
    pub backend: Backend,
    /// What becomes of an annotated request when the backend does not answer; rules carry their own answer.
    pub on_backend_unavailable: OnUnavailable,
    /// What annotations and rules leave unsaid.
    pub defaults: Defaults,
    /// The limits.
    pub limits: Limits,
    /// The classes.
    pub classes: Classes,
    /// Which annotations count.
    pub annotations: Annotations,
    /// The rules.
    pub rules: Rules,
    /// The guards.
    pub guards: Rules<Guard>,
    /// The keys that sign fences and seal receipts.
    pub keys: Keys,
    /// The lease API, if it is served.
    pub api: Option<Api>,
    /// Who may lock a class: patterns of SPIFFE IDs, for the classes that have any.
    principals: BTreeMap<String, Vec<String>>,
}

impl Policy {
    /// Reads a policy as the host hands it over: JSON, or the bytes of a `google.protobuf.Struct`. No bytes at all are the
    /// default policy. `env` looks up environment variables, for secrets.
    ///
    /// # Errors
    /// One line with the first thing that is wrong, where it stands, and the fix.
    pub fn parse(configuration: &[u8], env: &dyn Fn(&str) -> Option<String>) -> Result<Policy, PolicyError> {
        parse::policy(configuration, env)
    }

    /// Fills in what was left unsaid, and brings what was said within the limits: a wait is at most `max_wait`, a TTL lies
    /// between [`MIN_TTL`] and `max_ttl`, a hold limit between [`MIN_TTL`] and [`LONGEST`].
    pub fn ask(&self, wanted: Wanted) -> Want {
        let ttl = wanted.ttl.unwrap_or(self.defaults.ttl).min(self.limits.max_ttl).max(MIN_TTL);
        Want {
            name: wanted.name,
            mode: wanted.mode.unwrap_or(self.defaults.mode),
            wait: wanted.wait.unwrap_or(self.defaults.wait).min(self.limits.max_wait),
            ttl,
            hold: wanted.hold.unwrap_or(self.defaults.hold).clamp(MIN_TTL, LONGEST),
        }
    }

    /// Whether a caller may lock this class. A class without `principals` is open to everyone; one with them only to
    /// callers with a SPIFFE ID that one of its patterns matches. `principal` is only called in that case.
    pub fn may_lock(&self, class: &str, principal: impl FnOnce() -> Option<Vec<u8>>) -> bool {
        match self.principals.get(class) {
            None => true,
            Some(patterns) => {
                principal().is_some_and(|caller| patterns.iter().any(|pattern| matches(pattern.as_bytes(), &caller)))
            }
        }
    }
}

/// Whether a pattern matches the whole of a text; `*` stands for any bytes, slashes included.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let mut pieces = pattern.split(|byte| *byte == b'*');
    let Some(rest) = pieces.next().and_then(|first| text.strip_prefix(first)) else {
        return false;
    };
    let Some(last) = pieces.next_back() else {
        return rest.is_empty();
    };
    let Some(mut rest) = rest.strip_suffix(last) else {
        return false;
    };
    // The leftmost place for each piece leaves the most room for the next.
    for piece in pieces.filter(|piece| !piece.is_empty()) {
        let place = rest.windows(piece.len()).position(|window| window == piece);
        let Some(behind) = place.and_then(|at| rest.get(at + piece.len()..)) else {
            return false;
        };
        rest = behind;
    }
    true
}

/// A header's name in lower case; none for what cannot name a header. Pseudo-headers are `:` and a name.
fn header_name(text: &str) -> Option<String> {
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    let name = text.strip_prefix(':').unwrap_or(text);
    (!name.is_empty() && name.bytes().all(token)).then(|| text.to_ascii_lowercase())
}
