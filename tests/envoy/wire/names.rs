//! What the locks of the conformance cases are called in the one policy for all, and what a request says of them.

use std::collections::BTreeMap;

use interlock_conformance::case::{Op, Reentrant};
use interlock_conformance::{Ask, Case, Expect, Mode, Profile, cases, need};
use serde_json::{Value, json};

use super::target::{LAPSE, SHORT_WAIT};

/// The listener that the case needs.
pub fn lane(case: &Case) -> &'static str {
    if case.options.reentrant == Reentrant::Reject {
        "rejecting"
    } else if case.locks.values().any(|lock| lock.permits.is_some()) {
        "permits"
    } else {
        "counting"
    }
}

/// The class of a lock of this case, and its declaration.
fn class(number: usize, case: &Case, lock: &str) -> (String, Value) {
    let of = &case.locks[lock];
    let intents = case.steps.iter().any(|step| matches!(step.mode, Some(Mode::IS | Mode::IX | Mode::SIX)));
    let (name, mut declared) = if let Some(rank) = of.rank {
        (format!("rank-{rank}"), json!({ "rank": rank }))
    } else if let Some(permits) = of.permits {
        (format!("permits-{permits}"), json!({ "permits": permits }))
    } else if intents {
        ("tree".to_owned(), json!({ "hierarchy": true }))
    } else if case.does(Op::Crash) {
        // Its gauges are looked at.
        (format!("crash-{number}"), json!({}))
    } else {
        ("plain".to_owned(), json!({}))
    };
    declared["name"] = json!(name);
    (name, declared)
}

/// The class of a lock.
pub fn class_of(number: usize, case: &Case, lock: &str) -> String {
    class(number, case, lock).0
}

/// A lock of this case, which no other case has.
pub fn name(number: usize, case: &Case, lock: &str) -> String {
    format!("{}/{number}-{lock}", class_of(number, case, lock))
}

/// The classes of all cases that are run.
pub fn classes(profile: &Profile) -> Value {
    let mut all = BTreeMap::new();
    for (number, case) in cases().iter().enumerate().filter(|(_, case)| need::skip(case, profile).is_none()) {
        all.extend(case.locks.keys().map(|lock| class(number, case, lock)));
    }
    all.into_values().collect()
}

/// The name of a mode in Interlock's words. A permit is what a lease in a class with permits takes, whatever its mode.
pub fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::X | Mode::P => "exclusive",
        Mode::S => "shared",
        Mode::IS => "intent-shared",
        Mode::IX => "intent-exclusive",
        Mode::SIX => "shared-intent-exclusive",
    }
}

/// The `lock` header of an ask.
pub fn annotation(name: &str, ask: &Ask<'_>) -> String {
    let mut text = format!("{name};mode={}", mode(ask.mode));
    match ask.wait_ms {
        _ if ask.times_out => text += SHORT_WAIT,
        Some(wait) if wait == 0 || ask.allowed.contains(&Expect::Timeout) => {
            text += &format!(";wait={}.{:03}", wait / 1000, wait % 1000);
        }
        // The policy's: longer than any case takes.
        _ => {}
    }
    if ask.lapses {
        text += &format!(";ttl={0};hold={0}", LAPSE.as_secs());
    }
    text
}
