//! What the lease API answers, as JSON (and the graph as DOT). Durations are strings as policies spell them.

use std::fmt::Write;

use interlock_core::lease::{Deleted, Granted, Renewed};
use interlock_core::{Duration, Edge, Entry, Fence, Queue, Sessions, State, Time};
use serde::{Deserialize, Serialize};

use super::call::LeaseName;
use crate::policy::spell_duration;

/// Bytes of an answer. Strings and numbers always serialize.
pub fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

/// A lease as its holder is told of it.
#[derive(Debug, Serialize)]
pub struct Lease<'a> {
    id: &'a str,
    owner: &'a str,
    locks: Vec<Lock<'a>>,
    ttl: String,
    waited: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    receipt: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lock_fence: Option<String>,
}

#[derive(Debug, Serialize)]
struct Lock<'a> {
    name: &'a str,
    mode: &'static str,
    fence: Fence,
}

impl<'a> Lease<'a> {
    /// The lease of that name, with its receipt where there is one. Locks that were not asked for by name are left out.
    pub fn new(name: &'a LeaseName, granted: &'a Granted, receipt: Option<String>) -> Self {
        let asked = granted.grants.iter().filter(|grant| grant.asked);
        let locks =
            asked.map(|grant| Lock { name: grant.name.as_str(), mode: grant.mode.as_str(), fence: grant.fence });
        Lease {
            id: name.as_str(),
            owner: granted.owner.as_str(),
            locks: locks.collect(),
            ttl: millis(granted.ttl),
            waited: millis(granted.waited),
            receipt,
            lock_fence: None,
        }
    }

    /// With its fences as the header that a guard believes.
    #[must_use]
    pub fn with_fences(self, lock_fence: Option<String>) -> Self {
        Lease { lock_fence, ..self }
    }
}

/// What became of one lease of a renewal.
#[derive(Debug, Serialize)]
pub struct RenewResult<'a> {
    id: &'a str,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_in: Option<String>,
}

impl<'a> RenewResult<'a> {
    /// Of the lease of that name.
    pub fn new(name: &'a LeaseName, renewed: Renewed) -> Self {
        let (status, expires_in) = match renewed {
            Renewed::Renewed { expires_in } => ("renewed", Some(millis(expires_in))),
            Renewed::Lost => ("lost", None),
        };
        RenewResult { id: name.as_str(), status, expires_in }
    }
}

/// The answer to a renewal.
#[derive(Debug, Serialize)]
pub struct Results<'a> {
    /// In the order in which they were asked.
    pub results: Vec<RenewResult<'a>>,
}

/// The answer to a release.
#[derive(Debug, Serialize)]
pub struct Status {
    status: &'static str,
}

impl From<Deleted> for Status {
    fn from(deleted: Deleted) -> Self {
        Status {
            status: match deleted {
                Deleted::Released => "released",
                Deleted::Cancelled => "cancelled",
                Deleted::Expired => "expired",
                Deleted::Unknown => "unknown",
            },
        }
    }
}

/// The answer of a proxy that can grant.
#[derive(Debug, Serialize)]
pub struct Health<'a> {
    /// `ok`
    pub status: &'static str,
    /// The instance whose table it is.
    pub instance: &'a str,
}

/// Who holds a lock and who waits for it. No lease is named in it.
#[derive(Debug, Serialize)]
pub struct LockView {
    name: String,
    holders: Vec<HolderView>,
    waiters: Vec<WaiterView>,
    /// For how long yet there may be holders that are not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    grace: Option<String>,
}

#[derive(Debug, Serialize)]
struct HolderView {
    owner: String,
    mode: &'static str,
    fence: Fence,
    age: String,
    expires_in: String,
    asked_by: String,
}

#[derive(Debug, Serialize)]
struct WaiterView {
    owner: String,
    mode: &'static str,
    position: usize,
    age: String,
    gives_up_in: String,
    asked_by: String,
}

impl LockView {
    /// A lock as it stands now.
    pub fn new(queue: &Queue, sessions: &Sessions, now: Time) -> Self {
        let live = || queue.entries().iter().filter(|entry| entry.ends(sessions) > now);
        let holder = |entry: &Entry| match entry.state {
            State::Held { fence, since, .. } => Some(HolderView {
                owner: entry.owner.to_string(),
                mode: entry.mode.as_str(),
                fence,
                age: millis(now.since(since)),
                expires_in: millis(entry.ends(sessions).since(now)),
                asked_by: entry.asked_by.clone(),
            }),
            State::Waiting { .. } => None,
        };
        let waiting = live().filter(|entry| !entry.is_held()).enumerate();
        let waiter = |(place, entry): (usize, &Entry)| match entry.state {
            State::Waiting { since, deadline, .. } => Some(WaiterView {
                owner: entry.owner.to_string(),
                mode: entry.mode.as_str(),
                position: place + 1,
                age: millis(now.since(since)),
                gives_up_in: millis(deadline.since(now)),
                asked_by: entry.asked_by.clone(),
            }),
            State::Held { .. } => None,
        };
        LockView {
            name: queue.name.as_str().to_owned(),
            holders: live().filter_map(holder).collect(),
            waiters: waiting.filter_map(waiter).collect(),
            grace: None,
        }
    }

    /// Says that there may be more holders than are known, for so long yet.
    #[must_use]
    pub fn in_grace(self, left: Duration) -> Self {
        LockView { grace: (!left.is_zero()).then(|| millis(left)), ..self }
    }
}

/// In whole milliseconds, rounded down: who counts on a lease may count on less than it has, and never on more.
pub fn millis(span: Duration) -> String {
    spell_duration(Duration::from_millis(u64::try_from(span.as_millis()).unwrap_or(u64::MAX)))
}

/// A page of locks.
#[derive(Debug, Serialize)]
pub struct Locks {
    /// Those on this page.
    pub locks: Vec<LockView>,
    /// The next page, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<u32>,
}

/// The wait-for graph.
#[derive(Debug, Serialize)]
pub struct Graph {
    /// Its edges.
    pub edges: Vec<Edge>,
    /// Whether there are more than it has room for.
    pub truncated: bool,
}

impl Graph {
    /// The graph as Graphviz reads it.
    pub fn dot(&self) -> String {
        let mut dot = String::from("digraph waits_for {\n");
        for Edge { owner, waits_for, held_by } in &self.edges {
            // Writing to a String cannot fail.
            let _ = writeln!(
                dot,
                "  {} -> {} [label={}];",
                quoted(owner.as_str()),
                quoted(held_by.as_str()),
                quoted(waits_for.as_str())
            );
        }
        dot.push_str("}\n");
        dot
    }
}

/// A string of the DOT language, on one line: owners are free text. Every text has a spelling of its own.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            c if c.is_control() => quoted.extend(c.escape_unicode()),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// One refusal for a deadlock or for the order, as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflict {
    /// When, in milliseconds since 1970.
    pub at_unix_ms: u64,
    /// `deadlock` or `order-violation`
    pub reason: String,
    /// Who was refused.
    pub owner: String,
    /// The lock that it asked for.
    pub lock: String,
    /// Who asked: a rule, a workload.
    pub asked_by: String,
    /// The cycle; empty for an order violation.
    pub cycle: Vec<Edge>,
    /// The lock that it held already, for an order violation.
    pub held: Option<String>,
}

/// The refusals that are remembered, the newest first.
#[derive(Debug, Serialize)]
pub struct Conflicts {
    /// At most as many as are kept.
    pub deadlocks: Vec<Conflict>,
}

/// What breaking the glass ended.
#[derive(Debug, Serialize)]
pub struct Broken {
    /// The grants that it took away.
    pub ended: Vec<BrokenGrant>,
}

/// A grant that was taken away.
#[derive(Debug, Serialize)]
pub struct BrokenGrant {
    owner: String,
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    fence: Option<Fence>,
}

impl From<&Entry> for BrokenGrant {
    fn from(entry: &Entry) -> Self {
        BrokenGrant { owner: entry.owner.to_string(), mode: entry.mode.as_str(), fence: entry.fence() }
    }
}

/// A problem of the API itself (RFC 9457).
#[derive(Debug, Serialize)]
pub struct Problem<'a> {
    /// `urn:interlock:problem:` and the slug
    #[serde(rename = "type")]
    pub kind: String,
    /// The same for every problem of this kind.
    pub title: &'static str,
    /// The HTTP status.
    pub status: u16,
    /// What happened.
    pub detail: &'a str,
}

#[cfg(test)]
mod tests {
    use interlock_core::{LockName, OwnerId};

    use super::*;

    #[test]
    fn a_graph_in_dot_quotes_what_owners_write() {
        let owner = |text: &str| OwnerId::new(text).unwrap();
        let lock = LockName::parse("a").unwrap();
        let edge = Edge { owner: owner("x\"\\"), waits_for: lock, held_by: owner("y\n\r") };
        let dot = Graph { edges: vec![edge], truncated: false }.dot();
        assert_eq!(dot, "digraph waits_for {\n  \"x\\\"\\\\\" -> \"y\\n\\u{d}\" [label=\"a\"];\n}\n");
    }
}
