//! What the caller and the upstream see of Interlock, as values: refusals here; the headers in [`headers`].
//!
//! Pure: it makes bytes and sends none. Must not live here: anything that calls the host, and any decision.

pub mod headers;

use std::fmt::Write;
use std::time::Duration;

use interlock_core::{Cause, Edge, Fence, Holder, Limit, LockName, Loss, Mode, OwnerId, Refusal};
use serde::Serialize;

use crate::annotation::AnnotationError;
use crate::annotation::owner::OwnerSource;
use crate::policy::FillError;

/// After how long a caller may ask again where nothing better is known.
const RETRY: Duration = Duration::from_secs(1);

/// The longest cycle that a detail spells out. It travels in a header to gRPC callers; the body has it whole.
const SPELLED_EDGES: usize = 8;

/// A request that is not let through. It has not reached the upstream, or the upstream has lost it, and it holds nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reject {
    /// An annotation, or what a rule needs of the request, is wrong.
    Malformed {
        /// What, and where.
        detail: String,
    },
    /// The request is annotated and names no owner.
    OwnerMissing {
        /// Where an owner was looked for.
        sources: Vec<OwnerSource>,
    },
    /// The caller may not lock a class, or may not annotate at all.
    Forbidden {
        /// What it may not do.
        detail: String,
        /// The lock that it wanted.
        lock: Option<LockName>,
        /// Who it is.
        owner: Option<OwnerId>,
    },
    /// It is guarded, and shows no fence that counts.
    FenceRequired {
        /// The lock that it must hold.
        lock: LockName,
        /// Whose it is, if it says.
        owner: Option<OwnerId>,
        /// What it shows instead.
        shown: Shown,
    },
    /// It is guarded, and shows a fence of a grant that has ended: one of a later grant was seen.
    StaleFence {
        /// The lock.
        lock: LockName,
        /// Whose the fence is.
        owner: OwnerId,
        /// The fence.
        fence: Fence,
    },
    /// It is guarded, and its owner does not hold the lock now.
    NotHolder {
        /// The lock.
        lock: LockName,
        /// Whose it is.
        owner: OwnerId,
    },
    /// The lock manager refused it.
    Core(Refusal),
}

/// What a request shows in the place of a fence that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// No fence for the lock.
    Nothing,
    /// One that does not count. Which of the reasons it is helps nobody but forgers.
    Unverified,
}

impl From<AnnotationError> for Reject {
    fn from(error: AnnotationError) -> Self {
        Reject::Malformed { detail: format!("lock annotation: {error}") }
    }
}

impl From<FillError> for Reject {
    fn from(error: FillError) -> Self {
        Reject::Malformed { detail: error.to_string() }
    }
}

impl From<Refusal> for Reject {
    fn from(refusal: Refusal) -> Self {
        Reject::Core(refusal)
    }
}

/// What a slug means in HTTP, in gRPC and in words.
struct Kind {
    http: u16,
    grpc: u8,
    title: &'static str,
}

/// The statuses of gRPC that refusals have (gRPC, "Status codes and their use").
mod grpc {
    pub const INVALID_ARGUMENT: u8 = 3;
    pub const PERMISSION_DENIED: u8 = 7;
    pub const RESOURCE_EXHAUSTED: u8 = 8;
    pub const FAILED_PRECONDITION: u8 = 9;
    pub const ABORTED: u8 = 10;
    pub const UNAVAILABLE: u8 = 14;
}

impl Reject {
    /// Whether nobody could say, rather than somebody said no: what `on_backend_unavailable` is about.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Reject::Core(Refusal { cause: Cause::Backend { .. } | Cause::Grace { .. }, .. }))
    }

    /// The name of the cause in the problem type, in `lock-status` and in metrics.
    pub fn slug(&self) -> &'static str {
        match self {
            Reject::Malformed { .. } | Reject::OwnerMissing { .. } => "malformed-annotation",
            Reject::Forbidden { .. } => "forbidden",
            Reject::FenceRequired { .. } => "fence-required",
            Reject::StaleFence { .. } => "stale-fence",
            Reject::NotHolder { .. } => "not-holder",
            Reject::Core(refusal) => refusal.cause.slug(),
        }
    }

    fn kind(&self) -> Kind {
        let (http, grpc, title) = match self {
            Reject::Malformed { .. } => (400, grpc::INVALID_ARGUMENT, "The lock annotation is wrong"),
            Reject::OwnerMissing { .. } => (400, grpc::INVALID_ARGUMENT, "The request names no lock owner"),
            Reject::Forbidden { .. } => (403, grpc::PERMISSION_DENIED, "The caller may not take this lock"),
            Reject::FenceRequired { .. } => (428, grpc::FAILED_PRECONDITION, "A fence is required"),
            Reject::StaleFence { .. } => (412, grpc::FAILED_PRECONDITION, "The fence is stale"),
            Reject::NotHolder { .. } => (412, grpc::FAILED_PRECONDITION, "The owner does not hold the lock"),
            Reject::Core(refusal) => match &refusal.cause {
                Cause::Deadlock { .. } => (409, grpc::ABORTED, "Waiting would deadlock"),
                Cause::OrderViolation { .. } => (409, grpc::ABORTED, "The lock is out of order"),
                Cause::LeaseLost { .. } => (409, grpc::ABORTED, "The lease was lost"),
                Cause::Held { .. } => (423, grpc::ABORTED, "The lock is held"),
                Cause::WaitTimeout { .. } => (423, grpc::ABORTED, "The wait for the lock ran out"),
                Cause::Limit { limit: Limit::WaitersPerLock | Limit::Waiters | Limit::WaitChain, .. } => {
                    (429, grpc::RESOURCE_EXHAUSTED, "Too many wait")
                }
                Cause::Limit { .. } => (429, grpc::RESOURCE_EXHAUSTED, "Too many locks"),
                Cause::Grace { .. } => (503, grpc::UNAVAILABLE, "The lock table has just started"),
                Cause::Backend { .. } => (503, grpc::UNAVAILABLE, "The lock table did not answer"),
            },
        };
        Kind { http, grpc, title }
    }

    /// The HTTP status.
    pub fn http_status(&self) -> u16 {
        self.kind().http
    }

    /// The gRPC status.
    pub fn grpc_status(&self) -> u8 {
        self.kind().grpc
    }

    /// A few words that are the same for every refusal of this kind.
    pub fn title(&self) -> &'static str {
        self.kind().title
    }

    /// The lock that it failed on.
    pub fn lock(&self) -> Option<&LockName> {
        match self {
            Reject::Malformed { .. } | Reject::OwnerMissing { .. } => None,
            Reject::Forbidden { lock, .. } => lock.as_ref(),
            Reject::FenceRequired { lock, .. } | Reject::StaleFence { lock, .. } | Reject::NotHolder { lock, .. } => {
                Some(lock)
            }
            Reject::Core(refusal) => Some(&refusal.lock),
        }
    }

    /// Who wanted it.
    pub fn owner(&self) -> Option<&OwnerId> {
        match self {
            Reject::Malformed { .. } | Reject::OwnerMissing { .. } => None,
            Reject::Forbidden { owner, .. } | Reject::FenceRequired { owner, .. } => owner.as_ref(),
            Reject::StaleFence { owner, .. } | Reject::NotHolder { owner, .. } => Some(owner),
            Reject::Core(refusal) => Some(&refusal.owner),
        }
    }

    /// What happened, for people to read. Printable ASCII, so that it can be a header's value: bytes of owners and
    /// workloads that are not are percent-encoded.
    pub fn detail(&self) -> String {
        let detail = match self {
            Reject::Malformed { detail } | Reject::Forbidden { detail, .. } => detail.clone(),
            Reject::OwnerMissing { sources } => {
                let names: Vec<_> = sources.iter().map(|source| source.header()).collect();
                format!("a lock needs an owner, and the request has no usable {}", names.join(" or "))
            }
            Reject::FenceRequired { lock, shown: Shown::Nothing, .. } => {
                format!("{lock} is guarded, and the request carries no lock-fence for it")
            }
            Reject::FenceRequired { lock, shown: Shown::Unverified, .. } => format!(
                "{lock} is guarded, and the lock-fence that the request carries for it does not count: it must be signed with a \
                 key that is known here, for the owner that the request names, and not have expired"
            ),
            Reject::StaleFence { lock, fence, .. } => {
                format!("fence {fence} of {lock} is stale: one of a later grant has been seen here")
            }
            Reject::NotHolder { lock, owner } => format!("{owner} does not hold {lock} now"),
            Reject::Core(refusal) => refusal_detail(refusal),
        };
        encode(&detail, false)
    }

    /// The detail as a `grpc-message` holds it, percent-encoded (gRPC over HTTP/2, "Status-Message"). For who sets that header;
    /// Envoy encodes the text of a local reply by itself.
    pub fn grpc_message(&self) -> String {
        encode(&self.detail(), true)
    }

    /// When asking again can succeed without the caller changing anything.
    pub fn retry_after(&self) -> Option<Duration> {
        let Reject::Core(refusal) = self else { return None };
        match &refusal.cause {
            Cause::Held { retry_after, .. } | Cause::WaitTimeout { retry_after, .. } => {
                Some((*retry_after).max(Duration::from_millis(1)))
            }
            Cause::Grace { left } => Some((*left).max(Duration::from_millis(1))),
            // The same request is over this limit for ever.
            Cause::Limit { limit: Limit::LocksPerRequest, .. } => None,
            Cause::Limit { .. } | Cause::Backend { .. } => Some(RETRY),
            // Only by giving back what the caller's transaction holds.
            Cause::Deadlock { .. } | Cause::OrderViolation { .. } | Cause::LeaseLost { .. } => None,
        }
    }

    /// The value of `retry-after`, in whole seconds, rounded up: with every 423, 429 and 503, and with no other.
    pub fn retry_after_seconds(&self) -> Option<u64> {
        let after = self.retry_after().unwrap_or(RETRY);
        let seconds = after.as_secs().saturating_add(u64::from(after.subsec_nanos() > 0));
        matches!(self.http_status(), 423 | 429 | 503).then_some(seconds.max(1))
    }

    /// The body: `application/problem+json` (RFC 9457).
    pub fn problem_json(&self) -> Vec<u8> {
        let cause = match self {
            Reject::Core(refusal) => Some(&refusal.cause),
            _ => None,
        };
        let cycle: &[Edge] = match cause {
            Some(Cause::Deadlock { cycle }) => cycle,
            _ => &[],
        };
        let holders: &[Holder] = match cause {
            Some(Cause::Held { holders, .. } | Cause::WaitTimeout { holders, .. }) => holders,
            _ => &[],
        };
        let problem = Problem {
            kind: format!("urn:interlock:problem:{}", self.slug()),
            title: self.title(),
            status: self.http_status(),
            detail: self.detail(),
            lock: self.lock().map(LockName::as_str),
            mode: match self {
                Reject::Core(refusal) => Some(refusal.mode.as_str()),
                _ => None,
            },
            owner: self.owner().map(OwnerId::as_str),
            retry_after_ms: self.retry_after().map(millis),
            cycle,
            limit: match cause {
                Some(Cause::Limit { limit, value }) => Some(ProblemLimit { name: limit.as_str(), value: *value }),
                _ => None,
            },
            held: match cause {
                Some(Cause::OrderViolation { held }) => Some(held.as_str()),
                _ => None,
            },
            grace: matches!(cause, Some(Cause::Grace { .. })),
            holders: holders.iter().map(ProblemHolder::from).collect(),
        };
        // Strings and numbers always serialize.
        serde_json::to_vec(&problem).unwrap_or_default()
    }
}

#[derive(Serialize)]
struct Problem<'a> {
    #[serde(rename = "type")]
    kind: String,
    title: &'static str,
    status: u16,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    lock: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
    #[serde(skip_serializing_if = "<[Edge]>::is_empty")]
    cycle: &'a [Edge],
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<ProblemLimit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    held: Option<&'a str>,
    #[serde(skip_serializing_if = "core::ops::Not::not")]
    grace: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    holders: Vec<ProblemHolder<'a>>,
}

/// The limit that was met.
#[derive(Serialize)]
struct ProblemLimit {
    name: &'static str,
    value: u64,
}

/// A holder for the caller's eyes. Without its fence: nobody but the holder has a use for that.
#[derive(Serialize)]
struct ProblemHolder<'a> {
    owner: &'a str,
    mode: &'static str,
    held_for_ms: u64,
    asked_by: &'a str,
}

impl<'a> From<&'a Holder> for ProblemHolder<'a> {
    fn from(holder: &'a Holder) -> Self {
        ProblemHolder {
            owner: holder.owner.as_str(),
            mode: holder.mode.as_str(),
            held_for_ms: millis(holder.held_for),
            asked_by: &holder.asked_by,
        }
    }
}

fn refusal_detail(refusal: &Refusal) -> String {
    let Refusal { lock, mode, owner, cause } = refusal;
    match cause {
        Cause::Deadlock { cycle } => {
            format!("waiting for {lock} would close a cycle: {}", spell_cycle(cycle))
        }
        Cause::OrderViolation { held } => format!(
            "{owner} asks for {lock} and already holds {held}, which does not come before it in the lock order; take locks in \
             rising order"
        ),
        Cause::Held { holders, .. } => {
            format!("{lock} is taken{} and the request does not wait", by(holders, *mode))
        }
        Cause::WaitTimeout { holders, waited, .. } => {
            format!("waited {} s for {lock}, which is taken{}", headers::decimal_seconds(*waited), by(holders, *mode))
        }
        Cause::Limit { limit, value } => {
            let what = match limit {
                Limit::LocksPerRequest => "a request may ask for",
                Limit::LocksPerOwner => "an owner may hold or wait for",
                Limit::Locks => "the table may hold",
                Limit::WaitersPerLock => "one lock may have",
                Limit::Waiters => "the table may have",
                Limit::WaitChain => "a search for cycles may visit",
            };
            let (one, many) = match limit {
                Limit::LocksPerRequest | Limit::LocksPerOwner | Limit::Locks => ("lock", "locks"),
                Limit::WaitersPerLock | Limit::Waiters => ("waiter", "waiters"),
                Limit::WaitChain => ("owner", "owners"),
            };
            let unit = if *value == 1 { one } else { many };
            format!("{lock}: {what} at most {value} {unit} ({})", limit.as_str())
        }
        Cause::LeaseLost { loss } => match loss {
            Loss::HoldLimit => format!("{owner} held {lock} for as long as a lease may be renewed (hold)"),
            Loss::Expired => format!("the lease of {owner} on {lock} was not renewed within its ttl"),
        },
        Cause::Grace { left } => format!(
            "{lock}: the lock table has lost its memory in a restart and grants nothing for another {} s, so that leases from before \
             can be renewed",
            headers::decimal_seconds(*left)
        ),
        Cause::Backend { detail } => format!("{lock}: {detail}"),
    }
}

/// ` by A in exclusive mode and 2 others`, as far as holders are known. Without any, the queue stands in the way.
fn by(holders: &[Holder], wanted: Mode) -> String {
    match holders {
        [] => format!(" (no holder conflicts with {wanted} mode: earlier requests wait)"),
        [holder] => format!(" by {} in {} mode", holder.owner, holder.mode),
        [holder, others @ ..] => {
            let plural = if others.len() == 1 { "other" } else { "others" };
            format!(" by {} in {} mode and {} {plural}", holder.owner, holder.mode, others.len())
        }
    }
}

/// The cycle in words: `A waits for stock/7 held by B, B waits for order/42 held by A`.
pub fn spell_cycle(cycle: &[Edge]) -> String {
    let mut words = String::new();
    for (index, Edge { owner, waits_for, held_by }) in cycle.iter().take(SPELLED_EDGES).enumerate() {
        let comma = if index == 0 { "" } else { ", " };
        let _ = write!(words, "{comma}{owner} waits for {waits_for} held by {held_by}");
    }
    if let Some(more) = cycle.len().checked_sub(SPELLED_EDGES).filter(|more| *more > 0) {
        let _ = write!(words, ", and {more} more up to {}", cycle.last().map_or("", |edge| edge.held_by.as_str()));
    }
    words
}

/// Text with everything but printable ASCII percent-encoded; the percent sign too where `percent` says so.
fn encode(text: &str, percent: bool) -> String {
    let mut safe = String::with_capacity(text.len());
    for byte in text.bytes() {
        if (0x20..0x7F).contains(&byte) && !(percent && byte == b'%') {
            safe.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(safe, "%{byte:02X}");
        }
    }
    safe
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
