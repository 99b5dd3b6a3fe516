//! The cases of tests/conformance, seen from the wire: which of them requests can tell, and what their locks are called
//! in the one policy for all. No request is made here.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde_json::{Value, json};

/// All cases.
pub static CASES: LazyLock<Vec<Value>> =
    LazyLock::new(|| serde_json::from_str(include_str!("../../conformance/cases.json")).expect("the cases"));

/// Why a case cannot be told by requests.
pub fn skip(case: &Value) -> Option<&'static str> {
    let option = |name: &str| case["options"][name].as_str();
    let does = |op: &str| steps(case).any(|step| step["op"] == op);
    let reasons = [
        (option("order") == Some("learned"), "the order is declared by rank, never learned"),
        (case["options"]["lock_delay_ms"].is_u64(), "an expired lock is free at once: no lock-delay"),
        (
            option("reentrant") == Some("idempotent") && does("release"),
            "re-entry is counted, one release does not undo two grants",
        ),
        (
            option("upgrade") == Some("reject") && option("reentrant") != Some("reject"),
            "the sole holder upgrades at once",
        ),
        (does("renew"), "the proxy renews the lease of a request, its client cannot"),
        (does("expire"), "a request whose client is gone gives its locks back at once, and not at the TTL"),
        (does("admin-release"), "breaking a lock is for the lease API, which this build has not"),
        (does("access"), "asking who holds a lock is for the guard, which this build has not"),
        (steps(case).any(|step| step["stale"] == true), "a request has no lease id that could be out of date"),
    ];
    reasons.into_iter().find_map(|(applies, why)| applies.then_some(why))
}

/// What a case is about and requests cannot show; its other steps run all the same.
pub fn beyond(case: &Value) -> Option<&'static str> {
    let needs = |feature: &str| case["requires"].as_array().unwrap().iter().any(|it| it == feature);
    let notes = [
        (needs("revoke"), "the message that asks the holder to let go"),
        (needs("authority-restart"), "the restart of the authority"),
        (needs("bad-input"), "missing names (refusals.rs has them)"),
        (needs("status"), "the status query"),
        (needs("config-reload"), "the reload (reload.rs has it)"),
        (steps(case).any(passes_time), "time that passes and changes nothing"),
        (
            steps(case).any(|step| step["expect"] == "error-not-holder"),
            "the release of what is not held: there is no request to end",
        ),
    ];
    notes.into_iter().find_map(|(applies, what)| applies.then_some(what))
}

fn passes_time(step: &Value) -> bool {
    step["op"] == "advance" && step["expired"].is_null() && step["timed_out"].is_null()
}

pub fn steps(case: &Value) -> impl Iterator<Item = &Value> {
    case["steps"].as_array().unwrap().iter()
}

pub fn texts(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().map(|it| it.as_str().unwrap()).collect()
}

/// The listener that the case needs.
pub fn lane(case: &Value) -> &'static str {
    if case["options"]["reentrant"] == "reject" {
        "rejecting"
    } else if case["locks"].as_object().unwrap().values().any(|lock| lock["permits"].is_u64()) {
        "permits"
    } else {
        "counting"
    }
}

/// The class of a lock of this case, and its declaration.
fn class(number: usize, case: &Value, lock: &str) -> (String, Value) {
    let of = &case["locks"][lock];
    let intents = steps(case).any(|step| matches!(step["mode"].as_str(), Some("IS" | "IX" | "SIX")));
    let (name, mut declared) = if let Some(rank) = of["rank"].as_u64() {
        (format!("rank-{rank}"), json!({ "rank": rank }))
    } else if let Some(permits) = of["permits"].as_u64() {
        (format!("permits-{permits}"), json!({ "permits": permits }))
    } else if intents {
        ("tree".to_owned(), json!({ "hierarchy": true }))
    } else if steps(case).any(|step| step["op"] == "crash") {
        // Its gauge is looked at.
        (format!("crash-{number}"), json!({}))
    } else {
        ("plain".to_owned(), json!({}))
    };
    declared["name"] = json!(name);
    (name, declared)
}

/// The class of a lock.
pub fn class_of(number: usize, case: &Value, lock: &str) -> String {
    class(number, case, lock).0
}

/// A lock of this case, which no other case has.
pub fn name(number: usize, case: &Value, lock: &str) -> String {
    format!("{}/{number}-{lock}", class_of(number, case, lock))
}

/// The classes of all cases that are run.
pub fn classes() -> Value {
    let mut all = BTreeMap::new();
    for (number, case) in CASES.iter().enumerate().filter(|(_, case)| skip(case).is_none()) {
        all.extend(case["locks"].as_object().unwrap().keys().map(|lock| class(number, case, lock)));
    }
    all.into_values().collect()
}

/// The name of a mode on the wire. A permit is what a lease in a class with permits takes, whatever its mode.
pub fn mode(step: &Value) -> &'static str {
    match step["mode"].as_str().unwrap() {
        "X" | "P" => "exclusive",
        "S" => "shared",
        "IS" => "intent-shared",
        "IX" => "intent-exclusive",
        "SIX" => "shared-intent-exclusive",
        other => panic!("unknown mode {other}"),
    }
}
