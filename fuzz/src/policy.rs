//! The plugin's configuration: JSON, or the bytes of a `google.protobuf.Struct`.
//!
//! Input: the configuration as it is.

use interlock::filter::intake::{self, Asked, Facts, Intake};
use interlock::policy::{Check, LONGEST, MIN_TTL, Policy};
use prost::Message;
use prost_types::value::Kind;
use prost_types::{ListValue, Struct};
use serde_json::Value;

use crate::check;
use crate::fields::Fields;
use crate::host::Bench;

/// The one environment variable there is, and a secret that must not be seen.
const ENV: (&str, &str) = ("INTERLOCK_KEY", "a secret that nobody may see");

/// The longest complaint: a place and a quotation, both of which are cut.
const LONGEST_LINE: usize = 4096;

/// A request that rules of all kinds may match.
const REQUEST: &[u8] = b":method: POST\n:path: /orders/42/capture?q=%34&a=b\nx-account: a/1\nx-tier: gold\n%route: r\n\
%principal: spiffe://mesh/ns/pay/sa/a\ntraceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\n\
x-request-id: 1\nlock-owner: a\nbaggage: lock-owner=b\nlock: order/7;mode=shared, stock/a/b;ttl=0.001\n";

/// See the module.
pub fn run(data: &[u8]) {
    let env = |name: &str| (name == ENV.0).then(|| ENV.1.to_owned());
    let parsed = Policy::parse(data, &env);
    let value = serde_json::from_slice::<Value>(data).ok();
    if let Some(value) = &value {
        let other = Policy::parse(&to_struct(value), &env);
        let same = match (&parsed, &other) {
            (Ok(json), Ok(other)) => format!("{json:?}") == format!("{other:?}"),
            (Err(_), Err(_)) => true,
            _ => false,
        };
        // An empty Struct has no bytes, and those are the default policy.
        assert!(same || !value.is_object(), "as JSON: {parsed:?}\nas a Struct: {other:?}");
    }
    // As it came, which may be a Struct, and without the escapes of JSON.
    let texts = [String::from_utf8_lossy(data).into_owned(), value.as_ref().map(Value::to_string).unwrap_or_default()];
    match parsed {
        Ok(policy) => in_force(&policy, &texts),
        Err(error) => refused(&error.to_string(), value.as_ref(), &texts),
    }
}

/// Whether what is said shows a secret that it cannot have from anywhere but the place of secrets. The fuzzer learns what it
/// is compared with, and writes that elsewhere too.
fn shows(said: &str, secret: &str, texts: &[String], places: usize) -> bool {
    said.contains(secret) && texts.iter().all(|text| text.matches(secret).count() <= places)
}

/// A policy that was taken is within its limits, and so is what it makes of a request.
fn in_force(policy: &Policy, texts: &[String]) {
    assert!(!shows(&format!("{policy:?}"), ENV.1, texts, 0), "a secret is shown");
    assert!(!policy.owner_from.is_empty());
    assert!(policy.limits.max_wait <= LONGEST && (MIN_TTL..=LONGEST).contains(&policy.limits.max_ttl));
    let defaults = policy.defaults;
    assert!(defaults.wait <= policy.limits.max_wait && (MIN_TTL..=policy.limits.max_ttl).contains(&defaults.ttl));
    assert!(defaults.hold >= defaults.ttl && !defaults.mode.is_intent());
    for class in policy.classes.names() {
        let class = policy.classes.get(class);
        assert!(class.permits >= 1 && !(class.hierarchy && class.permits > 1));
    }
    for rule in policy.rules.iter() {
        assert!((1..=policy.limits.locks_per_request as usize).contains(&rule.locks.len()), "{rule:?}");
    }
    let guards = policy.guards.iter();
    assert!(
        guards.into_iter().all(|guard| guard.check == Check::Owner || !policy.keys.is_empty()),
        "nothing could pass"
    );
    let host = Bench::with_request(Fields::parse(REQUEST));
    let facts = Facts::of(&host, policy);
    let guarded = facts.looked_up(|lookup| policy.guards.find(lookup).map(|matched| matched.lock(lookup)));
    if let Some(Err(error)) = guarded {
        check::one_line(&error.to_string(), 4096);
    }
    match intake::read(&facts) {
        Intake::Nothing => {}
        Intake::Reject(_, reject) => check::refusal(&reject, 4096),
        Intake::Locks(Asked { wants, .. }) => {
            assert!((1..=policy.limits.locks_per_request as usize).contains(&wants.len()));
            for want in wants {
                assert!(want.wait <= policy.limits.max_wait && (MIN_TTL..=policy.limits.max_ttl).contains(&want.ttl));
                assert!(!want.mode.is_intent() || policy.classes.of(&want.name).hierarchy);
            }
        }
    }
}

/// A complaint is one line that names a place in the configuration, and no secret.
fn refused(line: &str, value: Option<&Value>, texts: &[String]) {
    assert!(!line.is_empty() && line.len() <= LONGEST_LINE, "{} bytes of complaint", line.len());
    assert!(!line.contains(char::is_control), "more than one line: {line:?}");
    assert!(!shows(line, ENV.1, texts, 0), "a secret is shown: {line}");
    let Some(value) = value else { return };
    for key in value["keys"].as_array().into_iter().flatten() {
        if let Some(secret) = key["secret"]["base64"].as_str().filter(|secret| secret.len() >= 16) {
            assert!(!shows(line, secret, texts, 1), "a secret is shown: {line}");
        }
    }
    if !line.starts_with("the policy is ") {
        assert!(place(line, value).is_some(), "no place of this policy: {line}");
    }
}

/// Follows the path that a complaint begins with. Its last step may be a field that is missing; where the place could not be
/// found it is nothing.
fn place(line: &str, root: &Value) -> Option<()> {
    let (mut at, mut rest) = (Some(root), line);
    let mut steps = 0;
    loop {
        if steps > 0 && rest.starts_with(": ") {
            return Some(());
        }
        let value = at?;
        if let Some(behind) = rest.strip_prefix('[') {
            let (index, behind) = behind.split_once(']')?;
            (at, rest) = (value.get(index.parse::<usize>().ok()?), behind);
        } else {
            rest = if steps > 0 { rest.strip_prefix('.')? } else { rest };
            let fields = value.as_object()?;
            if rest.starts_with('"') {
                // Quoted as Rust quotes it, perhaps cut.
                let field = fields.keys().find(|name| rest.starts_with(&format!("{name:?}")));
                let Some(name) = field else { return rest.contains("\" (and ").then_some(()) };
                (at, rest) = (fields.get(name), &rest[format!("{name:?}").len()..]);
            } else {
                let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-'))?;
                (at, rest) = (fields.get(&rest[..end]), &rest[end..]);
            }
        }
        steps += 1;
    }
}

/// JSON as Envoy hands a Struct over. Of anything but an object the bytes of a Value, which are none of a Struct.
pub fn to_struct(value: &Value) -> Vec<u8> {
    match of_json(value).kind {
        Some(Kind::StructValue(fields)) => fields.encode_to_vec(),
        kind => prost_types::Value { kind }.encode_to_vec(),
    }
}

fn of_json(value: &Value) -> prost_types::Value {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(flag) => Kind::BoolValue(*flag),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(items) => Kind::ListValue(ListValue { values: items.iter().map(of_json).collect() }),
        Value::Object(fields) => Kind::StructValue(Struct {
            fields: fields.iter().map(|(name, value)| (name.clone(), of_json(value))).collect(),
        }),
    };
    prost_types::Value { kind: Some(kind) }
}
