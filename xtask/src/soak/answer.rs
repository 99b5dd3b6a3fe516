//! What a caller may be told: reads an answer that came through Interlock and says what is wrong with it by the contract.
//!
//! Pure, and on the contract's side: it shares no code with the plugin, and knows nothing of the load.

use interlock_testkit::Answer;
use serde_json::Value;

use super::ledger::{Grant, Mode};

/// Slug, HTTP status and gRPC status of every refusal that a local backend can give.
const REFUSALS: [(&str, u16, i32); 10] = [
    ("malformed-annotation", 400, 3),
    ("forbidden", 403, 7),
    ("deadlock", 409, 10),
    ("order-violation", 409, 10),
    ("lease-lost", 409, 10),
    ("lock-held", 423, 10),
    ("wait-timeout", 423, 10),
    ("too-many-waiters", 429, 8),
    ("too-many-locks", 429, 8),
    ("backend-unavailable", 503, 14),
];

/// What the filter says it did.
#[derive(Debug, Clone, PartialEq)]
pub enum Status {
    /// It acquired, after so many seconds.
    Acquired(f64),
    /// It refused, with this slug.
    Refused(String),
}

/// What `lock-status` says; none where the header is not there.
pub fn lock_status(answer: &Answer, instance: &str) -> Result<Option<Status>, String> {
    let text = answer.joined("lock-status");
    if text.is_empty() {
        return Ok(None);
    }
    let list = members(&text)?;
    let [(name, parameters)] = list.as_slice() else { return Err(format!("one lock-status was expected: {text}")) };
    if name != instance {
        return Err(format!("lock-status of another instance: {text}"));
    }
    let get = |key: &str| parameters.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
    match get("outcome") {
        Some("acquired") => {
            let wait = get("wait").and_then(|wait| wait.parse().ok());
            wait.map(|wait| Some(Status::Acquired(wait))).ok_or_else(|| format!("acquired without a wait: {text}"))
        }
        Some("refused") => {
            let reason = get("reason").ok_or_else(|| format!("refused without a reason: {text}"))?;
            Ok(Some(Status::Refused(reason.to_owned())))
        }
        _ => Err(format!("an outcome was expected: {text}")),
    }
}

/// The members of a `lock-fence` value.
pub fn lock_fence(text: &str) -> Result<Vec<Grant>, String> {
    let grant = |(lock, parameters): (String, Vec<(String, String)>)| {
        let get = |key: &str| parameters.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str());
        let fence = get("fence")?.parse().ok().filter(|fence| *fence > 0)?;
        Some(Grant { lock, fence, mode: Mode::parse(get("mode")?)? })
    };
    let odd = || format!("not a lock-fence: {text}");
    members(text)?.into_iter().map(|member| grant(member).ok_or_else(odd)).collect()
}

/// Everything that a refusal has to be. `owner` is the one who asked; `grpc` whether in gRPC. Gives what is wrong.
pub fn refusal(answer: &Answer, slug: &str, owner: &str, grpc: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    let Some((_, http, code)) = REFUSALS.into_iter().find(|(known, ..)| *known == slug) else {
        return vec![format!("{slug} is no refusal of the contract")];
    };
    if grpc {
        if answer.status != 200 || answer.grpc_status() != Some(code) {
            wrong.push(format!("{slug}: HTTP {}, grpc-status {:?}", answer.status, answer.grpc_status()));
        }
        if answer.grpc_message().is_none_or(|message| message.is_empty()) {
            wrong.push(format!("{slug}: no grpc-message"));
        }
        return wrong;
    }
    if answer.status != http {
        wrong.push(format!("{slug}: status {}", answer.status));
    }
    let retry = answer.header("retry-after").map(|value| value.parse::<u32>());
    match (matches!(http, 423 | 429 | 503), retry) {
        (true, Some(Ok(1..))) | (false, None) => {}
        (_, retry) => wrong.push(format!("{slug}: retry-after {retry:?}")),
    }
    if answer.header("content-type").as_deref() != Some("application/problem+json") {
        wrong.push(format!("{slug}: content-type {:?}", answer.header("content-type")));
    }
    match serde_json::from_slice::<Value>(&answer.body) {
        Ok(problem) => body(&problem, slug, http, owner, &mut wrong),
        Err(error) => wrong.push(format!("{slug}: the body is no JSON ({error}): {}", answer.text())),
    }
    wrong
}

fn body(problem: &Value, slug: &str, http: u16, owner: &str, wrong: &mut Vec<String>) {
    if problem["type"] != format!("urn:interlock:problem:{slug}") || problem["status"] != http {
        wrong.push(format!("{slug}: type {} status {}", problem["type"], problem["status"]));
    }
    for field in ["title", "detail"] {
        if problem[field].as_str().is_none_or(str::is_empty) {
            wrong.push(format!("{slug}: no {field}"));
        }
    }
    if !matches!(slug, "malformed-annotation" | "forbidden") {
        if problem["owner"] != owner {
            wrong.push(format!("{slug}: the owner is {}", problem["owner"]));
        }
        if problem["lock"].as_str().is_none_or(str::is_empty) || problem["mode"].as_str().is_none_or(str::is_empty) {
            wrong.push(format!("{slug}: lock {} mode {}", problem["lock"], problem["mode"]));
        }
    }
    if slug == "deadlock" {
        if let Err(what) = cycle(problem, owner) {
            wrong.push(format!("deadlock: {what}: {}", problem["cycle"]));
        }
    } else if !problem["cycle"].is_null() {
        wrong.push(format!("{slug}: has a cycle"));
    }
}

/// A step of a cycle: who waits, for what, held by whom.
pub type Edge = (String, String, String);

/// The cycle of a problem.
pub fn edges(problem: &Value) -> Option<Vec<Edge>> {
    let text = |edge: &Value, field: &str| edge[field].as_str().map(str::to_owned);
    let edge = |edge: &Value| Some((text(edge, "owner")?, text(edge, "waits_for")?, text(edge, "held_by")?));
    problem["cycle"].as_array()?.iter().map(edge).collect()
}

fn cycle(problem: &Value, owner: &str) -> Result<(), &'static str> {
    let edges = edges(problem).ok_or("no list of {owner, waits_for, held_by}")?;
    let first = edges.first().ok_or("the cycle is empty")?;
    if first.0 != owner {
        return Err("the cycle does not begin with the one refused");
    }
    if problem["lock"] != first.1.as_str() {
        return Err("the cycle does not begin with the lock asked for");
    }
    let next = edges.iter().cycle().skip(1);
    if edges.iter().zip(next).any(|(edge, next)| edge.2 != next.0) {
        return Err("the cycle does not close on itself");
    }
    let mut owners: Vec<_> = edges.iter().map(|edge| &edge.0).collect();
    owners.sort();
    owners.dedup();
    if owners.len() < edges.len() {
        return Err("the cycle goes through one owner twice");
    }
    Ok(())
}

type Member = (String, Vec<(String, String)>);

/// The members of an RFC 9651 List of Tokens and Strings, values of parameters as text.
fn members(text: &str) -> Result<Vec<Member>, String> {
    let list = sfv::Parser::new(text).parse::<sfv::List>().map_err(|error| format!("{error}: {text}"))?;
    let plain = |item: &sfv::BareItem| match item {
        sfv::BareItem::Token(token) => token.as_str().to_owned(),
        sfv::BareItem::String(string) => string.as_str().to_owned(),
        sfv::BareItem::Integer(number) => i64::from(*number).to_string(),
        sfv::BareItem::Decimal(number) => number.to_string(),
        other => format!("{other:?}"),
    };
    let member = |entry: &sfv::ListEntry| match entry {
        sfv::ListEntry::Item(item) => {
            let parameters = item.params.iter().map(|(key, value)| (key.as_str().to_owned(), plain(value)));
            Ok((plain(&item.bare_item), parameters.collect()))
        }
        sfv::ListEntry::InnerList(_) => Err(format!("an inner list: {text}")),
    };
    list.iter().map(member).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fences_are_read() {
        let fences = lock_fence("order/42;fence=176;mode=exclusive, \"7/x\";fence=9;mode=shared").unwrap();
        assert_eq!(fences[0], Grant { lock: "order/42".into(), fence: 176, mode: Mode::Exclusive });
        assert_eq!(fences[1], Grant { lock: "7/x".into(), fence: 9, mode: Mode::Shared });
        assert!(lock_fence("order/42;mode=exclusive").is_err() && lock_fence("order/42;fence=1").is_err());
    }

    #[test]
    fn cycles_must_close() {
        let edge = |a: &str, l: &str, b: &str| json!({"owner": a, "waits_for": l, "held_by": b});
        let problem = |edges: Value| json!({"lock": "l/1", "cycle": edges});
        let good = [edge("a", "l/1", "b"), edge("b", "l/2", "a")];
        assert_eq!(cycle(&problem(json!(good)), "a"), Ok(()));
        assert!(cycle(&problem(json!(good)), "b").is_err());
        assert!(cycle(&problem(json!([edge("a", "l/1", "b")])), "a").is_err());
        assert!(cycle(&problem(json!([edge("a", "l/1", "b"), edge("b", "l/2", "c")])), "a").is_err());
        assert!(cycle(&problem(json!([edge("a", "l/2", "a")])), "a").is_err());
        assert!(cycle(&problem(json!([])), "a").is_err());
    }
}
