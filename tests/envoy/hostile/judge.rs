//! What must hold of every bad request: what is answered, what the upstream saw of it.

use interlock_testkit::{RawResponse, Recorded};
use serde_json::Value;

use super::classes::Known;
use super::h2;
use super::shot::{Expect, Shot};

/// Every reason for which the filter refuses in these tests, with its status.
const SLUGS: [(&str, u16); 9] = [
    ("malformed-annotation", 400),
    ("forbidden", 403),
    ("deadlock", 409),
    ("order-violation", 409),
    ("lease-lost", 409),
    ("lock-held", 423),
    ("wait-timeout", 423),
    ("too-many-waiters", 429),
    ("too-many-locks", 429),
];

/// Statuses that Envoy or the upstream give by themselves, without a problem.
const OTHERS: [u16; 13] = [200, 204, 400, 403, 404, 405, 408, 411, 413, 414, 417, 426, 431];

/// What came back.
#[derive(Debug)]
pub enum Came {
    /// A response over HTTP/1.1.
    H1(RawResponse),
    /// A response over HTTP/2.
    H2(h2::Answer),
    /// The connection was closed, or the stream reset, without one.
    Closed,
}

/// How a request came out, for the counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Served,
    /// By the filter.
    Refused,
    /// By Envoy, with a status.
    Declined,
    Closed,
}

/// Judges what came back.
///
/// # Errors
/// What is wrong with it.
pub fn answer(shot: &Shot, came: &Came) -> Result<Kind, String> {
    let (status, body) = match came {
        Came::Closed => {
            return if shot.expect == Expect::Order { Ok(Kind::Closed) } else { Err("closed".into()) };
        }
        Came::H1(response) => (response.status, response.body.as_slice()),
        Came::H2(answer) => match answer.status {
            Some(status) => (status, answer.body.as_slice()),
            None => return Err(format!("an answer without a status: {answer:?}")),
        },
    };
    let problem = body.starts_with(b"{").then(|| serde_json::from_slice::<Value>(body));
    match problem {
        Some(Err(error)) => Err(format!("{status}: not JSON, {error}: {}", body.escape_ascii())),
        Some(Ok(problem)) => {
            let slug = refusal(status, &problem)?;
            if let Came::H1(response) = came {
                headers(response, slug)?;
            }
            match shot.expect {
                Expect::Served => Err(format!("{status}: {problem}")),
                Expect::Refused(expected) if expected != slug => Err(format!("{slug} and not {expected}: {problem}")),
                Expect::Refused(_) | Expect::Order => Ok(Kind::Refused),
            }
        }
        None if matches!(shot.expect, Expect::Refused(_)) => Err(format!("{status}, and no problem")),
        None if status == 200 => Ok(Kind::Served),
        // What Envoy has not built: a transfer coding, an upgrade.
        None if OTHERS.contains(&status) || status == 501 => Ok(Kind::Declined),
        None => Err(format!("{status}: {}", body.escape_ascii())),
    }
}

/// Holds a problem against the contract, and gives its slug.
fn refusal(status: u16, problem: &Value) -> Result<&'static str, String> {
    let kind = problem["type"].as_str().unwrap_or_default();
    let known = SLUGS.iter().find(|(slug, _)| kind.strip_prefix("urn:interlock:problem:") == Some(slug));
    let &(slug, expected) = known.ok_or_else(|| format!("an unknown type: {problem}"))?;
    let texts = ["title", "detail"].map(|field| problem[field].as_str().unwrap_or_default());
    let said = texts.iter().all(|text| !text.is_empty() && text.is_ascii() && !text.contains(char::is_control));
    if status != expected || problem["status"] != status || !said {
        return Err(format!("{status}: {problem}"));
    }
    Ok(slug)
}

fn headers(response: &RawResponse, slug: &str) -> Result<(), String> {
    let all = |name: &str| response.headers.iter().filter(|(n, _)| n == name).count();
    let status = response.header("lock-status").unwrap_or_default();
    let right = response.header("content-type").as_deref() == Some("application/problem+json")
        && status.contains(&format!(";outcome=refused;reason={slug}"))
        && all("lock-status") == 1
        && all("lock-fence") == 0
        && response.header("retry-after").is_some() == matches!(response.status, 423 | 429 | 503);
    if right { Ok(()) } else { Err(format!("the headers of a refusal: {:?}", response.headers)) }
}

/// Whether this is the name of a header that no upstream may get from a caller, under any spelling that a server could
/// take for it.
fn is_ours(name: &str, passes_lock: bool) -> bool {
    match name.to_ascii_lowercase().replace('_', "-").as_str() {
        "lock-fence" | "lock-status" => true,
        "lock" => !passes_lock,
        _ => false,
    }
}

/// Judges what the upstream saw of a request: no lock header under any spelling, in headers or trailers, that the filter
/// did not set.
///
/// # Errors
/// What it should not have seen.
pub fn seen(seen: &Recorded, lane: &str, known: &Known) -> Result<(), String> {
    let passes_lock = lane == "pass";
    let wrong = |what: &str| Err(format!("{what}: {seen:?}"));
    if seen.trailers.keys().any(|name| is_ours(name.as_str(), passes_lock)) {
        return wrong("the upstream got a lock header in a trailer");
    }
    for name in seen.headers.keys().filter(|name| is_ours(name.as_str(), passes_lock)) {
        let mut values = seen.headers.get_all(name).iter();
        let (Some(value), None) = (values.next(), values.next()) else { return wrong("two fields") };
        let value = String::from_utf8_lossy(value.as_bytes());
        if name != "lock-fence" {
            return wrong("the upstream got a lock header that is none of the filter's");
        }
        let replayed = !is_by(seen, known.owner) && value.contains(&*String::from_utf8_lossy(&known.signed));
        if replayed || !value.split(", ").all(is_a_fence) {
            return wrong("the upstream got a fence that the filter did not give");
        }
    }
    // Of the rules there only the sentinel's counts.
    let counts = !matches!(lane, "off" | "audit") || seen.path.starts_with("/sentinel");
    if !counts && seen.headers.contains_key("lock-fence") {
        return wrong("a fence where no lock is taken");
    }
    Ok(())
}

fn is_by(seen: &Recorded, owner: u128) -> bool {
    seen.header("traceparent").is_some_and(|trace| trace == interlock_testkit::client::traceparent(owner))
}

/// Whether a member of a `lock-fence` is one that a filter could have made just now: its fence is the wall clock's, in
/// tens of microseconds.
fn is_a_fence(member: &str) -> bool {
    let fence = member.split_once(";fence=").and_then(|(_, rest)| rest.split(';').next()?.parse::<u64>().ok());
    fence.is_some_and(|fence| (170_000_000_000_000..250_000_000_000_000).contains(&fence))
}
