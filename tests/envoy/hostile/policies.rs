//! Hundreds of policies that are none, at an Envoy that runs: each is refused with one line, which is the one that the
//! policy's own reader gives, and what ran before goes on.

use std::collections::BTreeSet;

use interlock::policy::Policy;
use interlock_testkit::config::FILTER;
use interlock_testkit::envoy::Update;
use interlock_testkit::{DEADLINE, EnvoyConfig};
use serde_json::{Value, json};

use super::dice::{Dice, seed};
use super::policy;
use crate::world::World;

/// So many policies are made, of which most are bad.
const POLICIES: usize = 250;

/// So many come at once: each as a listener of its own.
const AT_ONCE: usize = 40;

/// How an Envoy's log begins the line.
const REFUSED: &str = "interlock: the policy is refused: ";

/// A value that fits nowhere, or nearly somewhere.
fn odd(dice: &mut Dice) -> Value {
    match dice.below(18) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(-1),
        3 => json!(0),
        4 => json!(1.5),
        5 => json!(1e19),
        6 => json!(1e308),
        7 => json!(""),
        8 => json!("exlusive"),
        9 => json!("\u{0}"),
        10 => json!("\u{fc}ber/\u{1f512}"),
        11 => json!("x".repeat(dice.within(65, 70_000))),
        12 => json!([]),
        13 => json!({}),
        14 => json!([[[[]]]]),
        15 => json!(vec!["x"; 300]),
        16 => json!("99999999999999999999s"),
        _ => json!({ "name": "order", "x": "\r\nlog: line" }),
    }
}

/// Every place in a value.
fn places(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.to_owned());
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| places(value, &format!("{at}/{name}"), all)),
        Value::Array(items) => items.iter().enumerate().for_each(|(n, value)| places(value, &format!("{at}/{n}"), all)),
        _ => {}
    }
}

/// Changes a policy in one place.
fn mutate(policy: &mut Value, dice: &mut Dice) {
    let mut all = Vec::new();
    places(policy, "", &mut all);
    let place = all[dice.below(all.len())].clone();
    let value = policy.pointer_mut(&place).expect("a place of this policy");
    match (value, dice.below(4)) {
        (Value::Object(fields), 0) => {
            let name = ["lokcs", "", "match ", "wait", "name", "\u{0}", "__proto__"][dice.below(7)];
            fields.insert(name.to_owned(), odd(dice));
        }
        (Value::Object(fields), 1) => {
            let names: Vec<String> = fields.keys().cloned().collect();
            if let Some(name) = names.get(dice.below(names.len().max(1))) {
                fields.remove(name);
            }
        }
        (Value::Array(items), 0) => items.push(odd(dice)),
        (Value::Array(items), 1) => {
            if let Some(first) = items.first().cloned() {
                items.push(first);
            }
        }
        (Value::String(text), 0) => {
            let bad = ["{", "}", "{id", "{{id}}", "/../", "%zz", "{header:}", "{nothing:x}", " ", "//", "\n", "*"]
                [dice.below(12)];
            text.push_str(bad);
        }
        (Value::String(text), 1) => drop(text.pop()),
        (value, _) => *value = odd(dice),
    }
}

/// The text of a policy: a good one that was changed, or no JSON at all.
fn text(number: usize) -> String {
    let mut dice = Dice::new(seed(), number);
    let mut good = policy("accept", "enforce");
    good["instance"] = json!(format!("policy-{number}"));
    if !number.is_multiple_of(6) {
        for _ in 0..dice.within(1, 3) {
            mutate(&mut good, &mut dice);
        }
        return good.to_string();
    }
    let mut text = good.to_string();
    let at = dice.below(text.len());
    match dice.below(8) {
        0 => text.truncate(at),
        1 => text.insert_str(at, ["\u{0}", "\"", "}", "]", ",", "\\", "\u{1f512}", "1e999"][dice.below(8)]),
        2 => text = "[".repeat(dice.within(100, 50_000)),
        3 => text = format!("{{\"rules\":{}", "[{\"match\":".repeat(dice.within(10, 5_000))),
        4 => text = ["", " ", "null", "[]", "\"policy\"", "0", "{}{}", "\u{feff}{}"][dice.below(8)].to_owned(),
        5 => text = text.replacen('{', "{\"instance\":\"a\",", 1),
        6 => text = text.replace("100ms", "100000000000000000000h"),
        _ => drop(text.remove(at)),
    }
    text
}

/// What the policy's own reader says of it; none where it is a policy after all.
fn verdict(text: &str) -> Option<String> {
    Policy::parse(text.as_bytes(), &|_| None).err().map(|error| error.to_string())
}

fn refusals(logs: &str) -> Vec<String> {
    logs.lines().filter_map(|line| Some(line.split_once(REFUSED)?.1.to_owned())).collect()
}

/// Gives a listener a policy that is this text; as a Struct where it can be one, half of the time.
fn set_text(listener: &mut Value, text: &str) {
    let object = serde_json::from_str::<Value>(text).ok().filter(Value::is_object);
    let configuration = match object.filter(|_| text.len().is_multiple_of(2)) {
        Some(object) => json!({ "@type": "type.googleapis.com/google.protobuf.Struct", "value": object }),
        None => json!({ "@type": "type.googleapis.com/google.protobuf.StringValue", "value": text }),
    };
    let filters = &mut listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"];
    let ours = filters.as_array_mut().unwrap().iter_mut().find(|filter| filter["name"] == FILTER).unwrap();
    ours["typed_config"]["config"]["configuration"] = configuration;
}

#[tokio::test]
async fn hundreds_of_bad_policies() {
    let mut world = World::with(EnvoyConfig::listener_from_file).await;
    let held = world.ask(1, "/held?hold", "order/1;hold=600").timeout(DEADLINE * 20).spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    // Of a policy that it has refused before Envoy remembers that, and the plugin is not asked again.
    let different: BTreeSet<String> = (0..POLICIES).map(text).collect();
    let bad: Vec<(String, String)> =
        different.into_iter().filter_map(|text| verdict(&text).map(|line| (text, line))).collect();
    assert!(bad.len() >= 200, "only {} of {POLICIES} are bad", bad.len());
    let mut kinds: Vec<String> = bad.iter().map(|(_, line)| kind(line)).collect();
    kinds.sort_unstable();
    kinds.dedup();
    assert!(kinds.len() >= 25, "too much alike: {kinds:?}");
    let memory = world.envoy.memory().unwrap();
    let mut said = 0;
    for (batch, some) in bad.chunks(AT_ONCE).enumerate() {
        let update = world.envoy.replace_listeners(|listeners| {
            let good = listeners[0].clone();
            for (number, (text, _)) in some.iter().enumerate() {
                let mut listener = good.clone();
                listener["name"] = json!(format!("bad-{batch}-{number}"));
                set_text(&mut listener, text);
                listeners.push(listener);
            }
        });
        assert_eq!(update.await.unwrap(), Update::Refused, "batch {batch}");
        let mut expected: Vec<&str> = some.iter().map(|(_, line)| line.as_str()).collect();
        // Envoy says of the last one that it is refused after the plugin has said why.
        let last = format!("listener 'bad-{batch}-{}' config rejected", some.len() - 1);
        world.envoy.wait_log(&last).await;
        let logs = world.envoy.logs();
        let lines = refusals(&logs).split_off(said);
        said += lines.len();
        let mut got: Vec<&str> = lines.iter().map(String::as_str).collect();
        expected.sort_unstable();
        got.sort_unstable();
        let missing: Vec<&&str> = expected.iter().filter(|line| !got.contains(line)).collect();
        let traps: Vec<&str> = logs.lines().filter(|line| line.contains("Function: ")).collect();
        assert!(traps.is_empty(), "a VM has trapped: {traps:?}; nothing is said of {missing:?}");
        let instead: Vec<&&str> = got.iter().filter(|line| !expected.contains(line)).collect();
        assert!(got == expected, "batch {batch}: {missing:?} is not said, but {instead:?}");
        // What ran goes on, with the lock that is held.
        let refused = world.ask(2, "/refused", "order/1;wait=0").send().await.unwrap();
        assert_eq!(refused.status, 423, "{}", refused.text());
        assert_eq!(world.ask(3, "/served", "order/2;wait=0").send().await.unwrap().status, 200);
    }
    // A few one by one in place of the one that runs.
    for (text, line) in bad.iter().step_by(bad.len() / 12) {
        assert_eq!(
            world.envoy.update_listeners(|listener| set_text(listener, text)).await.unwrap(),
            Update::Refused,
            "{line}"
        );
        assert_eq!(world.ask(3, "/served", "order/2;wait=0").send().await.unwrap().status, 200);
    }
    println!("{} bad policies of {} kinds", bad.len(), kinds.len());
    let grown = world.envoy.memory().unwrap().saturating_sub(memory);
    assert!(grown < 256 << 20, "Envoy has grown by {} MiB", grown >> 20);
    world.upstream.open("/held");
    assert_eq!(held.answer().await.unwrap().status, 200);
    world.assert_clean().await;
}

/// A line without what differs from case to case.
fn kind(line: &str) -> String {
    let text = line.split_once(": ").map_or(line, |(_, text)| text);
    let plain = |word: &&str| word.chars().all(|c| c.is_ascii_lowercase() || c == ';');
    text.split_whitespace().filter(plain).collect::<Vec<_>>().join(" ")
}
