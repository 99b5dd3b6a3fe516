//! What is sent to an authority: paths, headers, bodies; and what came back, as far as its status says it.

use interlock_core::{Duration, LeaseId, Time};
use serde::Serialize;

use super::{Granted, Wish};
use crate::api::MAX_BODY;
use crate::api::body::json;
use crate::api::call::MOST_FOR;
use crate::api::told::MAX_ANSWER;
use crate::host::{Call, CallToken, Host, HostError};
use crate::policy::{Authority as At, spell_duration};

/// The most leases that one message renews: the answer must not get too long either.
const MOST_RENEWED: usize = 400;

/// How a lease is called on the wire.
pub fn spell(lease: LeaseId) -> String {
    format!("{:032x}", lease.0)
}

/// The lease that is called so.
pub fn lease_of(text: &str) -> Option<LeaseId> {
    u128::from_str_radix(text, 16).ok().map(LeaseId).filter(|lease| spell(*lease) == text)
}

#[derive(Serialize)]
struct PutBody<'a> {
    owner: &'a str,
    locks: Vec<PutLock<'a>>,
    wait: String,
    ttl: String,
    #[serde(rename = "for")]
    asked_by: String,
}

#[derive(Serialize)]
struct PutLock<'a> {
    name: &'a str,
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    wait: Option<String>,
}

/// The body that asks for a lease at this moment, with that much of its wait left.
pub fn put(wish: &Wish, ttl: Duration, now: Time, wait: Duration) -> Vec<u8> {
    let waited = now.since(wish.arrived);
    let mut locks = Vec::with_capacity(wish.wants.len());
    for want in &wish.wants {
        let left = want.wait.saturating_sub(waited).min(wait);
        let own = (left != wait).then(|| spell_duration(left));
        locks.push(PutLock { name: want.name.as_str(), mode: want.mode.as_str(), wait: own });
    }
    json(&PutBody {
        owner: wish.owner.as_str(),
        locks,
        wait: spell_duration(wait),
        ttl: spell_duration(ttl),
        asked_by: wish.asked_by.chars().take(MOST_FOR).collect(),
    })
}

#[derive(Serialize)]
struct RenewItem<'a> {
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    receipt: Option<&'a str>,
}

/// The bodies that renew leases, with the leases that each of them renews: one, unless they get too long for one.
pub fn renew<'a>(leases: impl IntoIterator<Item = (LeaseId, &'a Granted)>) -> Vec<(Vec<LeaseId>, Vec<u8>)> {
    #[derive(Serialize)]
    struct RenewBody<'a> {
        leases: Vec<RenewItem<'a>>,
    }
    let mut bodies: Vec<(Vec<LeaseId>, RenewBody<'a>)> = Vec::new();
    let mut room = 0;
    for (lease, granted) in leases {
        let size = granted.receipt.as_ref().map_or(0, String::len) + 64;
        // One that fits nowhere goes without its receipt: that is needed only after a restart.
        let receipt = granted.receipt.as_deref().filter(|_| size < MAX_BODY - 64);
        let fits = bodies.last().is_some_and(|(leases, _)| size <= room && leases.len() < MOST_RENEWED);
        if !fits {
            room = MAX_BODY - 64;
            bodies.push((Vec::new(), RenewBody { leases: Vec::new() }));
        }
        room = room.saturating_sub(size);
        if let Some((leases, body)) = bodies.last_mut() {
            leases.push(lease);
            body.leases.push(RenewItem { id: spell(lease), receipt });
        }
    }
    bodies.into_iter().map(|(leases, body)| (leases, json(&body))).collect()
}

/// Sends one call. `path` stands behind the prefix.
///
/// # Errors
/// Those of the host.
pub fn send(
    host: &dyn Host,
    at: &At,
    (method, path): (&str, &str),
    body: &[u8],
    timeout: Duration,
) -> Result<CallToken, HostError> {
    let path = format!("{}/{path}", at.prefix);
    // Istio's clusters are called outbound|PORT|SUBSET|HOST.
    let authority = at.cluster.rsplit('|').next().unwrap_or(&at.cluster);
    let mut headers = vec![(":method", method), (":path", path.as_str()), (":authority", authority)];
    headers.extend((!body.is_empty()).then_some(("content-type", "application/json")));
    host.call(&Call { cluster: &at.cluster, headers: &headers, body, timeout })
}

/// An answer, as the host has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It is there, whole, and no longer than it may be.
    Whole {
        /// Its status.
        status: u32,
        /// Whether it says that it is a problem (RFC 9457).
        problem: bool,
        /// Its body.
        body: Vec<u8>,
    },
    /// It came too late.
    Timeout,
    /// There is none, or nobody can tell what it would have been.
    None,
}

/// Reads the answer whose callback runs. `headers`: how many it has.
pub fn reply(host: &dyn Host, headers: usize) -> Reply {
    if headers == 0 {
        return Reply::None;
    }
    let text = |name| host.answer_header(name).ok().flatten().and_then(|value| String::from_utf8(value).ok());
    let Some(status) = text(":status").and_then(|status| status.parse().ok()) else { return Reply::None };
    let problem = text("content-type").is_some_and(|kind| kind == "application/problem+json");
    match status {
        504 if !problem => Reply::Timeout,
        502 | 503 if !problem => Reply::None,
        // One byte more than is read tells what is too long.
        _ => match host.answer_body(MAX_ANSWER + 1) {
            Ok(body) => Reply::Whole { status, problem, body },
            Err(_) => Reply::None,
        },
    }
}
