//! The `lock` header: how it is read, and what a request with it asks for, under several policies.
//!
//! Input: [`Fields`] of a request. Of interest are `lock`, `%route-locks` (what the route's metadata says), `grpc-timeout`,
//! `x-envoy-expected-rq-timeout-ms`, `content-type`, the headers that can name an owner, `%principal`, `:path`, `:method`.

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Duration;

use interlock::annotation::list::{self, ListError, MAX_MEMBERS};
use interlock::annotation::{AnnotationError, Wanted, merge, parse_lock_header};
use interlock::filter::intake::{self, Asked, Facts, Intake};
use interlock::policy::{HeaderAnnotations, LONGEST, MIN_TTL, Policy};
use interlock_core::{LockName, Mode};
use sfv::{List, ListEntry, Parser};

use crate::check;
use crate::fields::Fields;
use crate::host::Bench;

/// Policies that treat the header differently.
static POLICIES: LazyLock<Vec<Policy>> = LazyLock::new(|| {
    let policies = [
        r#"{}"#,
        r#"{"limits":{"locks_per_request":2,"max_wait":"1.5s","max_ttl":"250ms"},
            "owner":{"from":["baggage","lock-owner","x-request-id","traceparent"]},
            "classes":[{"name":"stock","rank":1,"hierarchy":true},{"name":"order","permits":3,"principals":["spiffe://mesh/*/pay"]}]}"#,
        r#"{"enforcement":"audit","defaults":{"mode":"shared","wait":"0s"},"annotations":{"header":"reject","route":"ignore"},
            "owner":{"from":["lock-owner"]}}"#,
        r#"{"annotations":{"header":"strip"},"rules":[{"name":"r","match":{"path":"/o/{id}"},"locks":[{"name":"order/{id}"}]}]}"#,
    ];
    policies.map(|text| Policy::parse(text.as_bytes(), &|_| None).expect("a policy")).into()
});

/// See the module.
pub fn run(data: &[u8]) {
    let fields = Fields::parse(data);
    for name in ["lock", "%route-locks"] {
        header(&fields.all(name));
    }
    for policy in POLICIES.iter() {
        request(policy, data);
    }
}

/// The header by itself.
fn header(fields: &[&[u8]]) {
    let parsed = parse_lock_header(fields.iter().copied());
    let joined = list::join(fields.iter().copied());
    assert_eq!(parsed, parse_lock_header([joined.as_slice()]), "several fields are one List");
    let general = Parser::new(&joined).parse::<List>();
    match parsed {
        Ok(asks) => {
            assert!((1..=MAX_MEMBERS).contains(&asks.len()));
            let general = general.expect("what is read is a List");
            assert_eq!(general.len(), asks.len());
            for (member, ask) in general.iter().zip(&asks) {
                assert!(matches!(member, ListEntry::Item(_)), "{ask:?}");
                canonical(&ask.name);
            }
            let printed = asks.iter().map(print).collect::<Vec<_>>().join(", ");
            assert_eq!(parse_lock_header([printed.as_bytes()]).as_ref(), Ok(&asks), "{printed}");
            merged(&asks, Mode::Exclusive);
            merged(&asks, Mode::Shared);
        }
        Err(error) => {
            check::one_line(&error.to_string(), 512);
            match error {
                AnnotationError::List(ListError::Syntax { .. }) => assert!(general.is_err(), "{joined:?}"),
                AnnotationError::List(ListError::Empty) => assert_eq!(general.ok().map(|list| list.len()), Some(0)),
                _ => {}
            }
        }
    }
}

/// A name is in its one spelling.
fn canonical(name: &LockName) {
    assert_eq!(LockName::parse(name.as_str()).as_ref(), Ok(name));
}

/// A lock as the contract spells it in a header.
fn print(ask: &Wanted) -> String {
    let mut text = format!("\"{}\"", ask.name);
    if let Some(mode) = ask.mode {
        text.push_str(&format!(";mode={mode}"));
    }
    for (name, value) in [("wait", ask.wait), ("ttl", ask.ttl), ("hold", ask.hold)] {
        match value.map(|value| (value.as_secs(), value.subsec_millis())) {
            None => {}
            Some((seconds, 0)) => text.push_str(&format!(";{name}={seconds}")),
            Some((seconds, millis)) => text.push_str(&format!(";{name}={seconds}.{millis:03}")),
        }
    }
    text
}

/// Several asks for one lock become one that is safe for each of them.
fn merged(asks: &[Wanted], default: Mode) {
    let merged = merge(asks.to_vec(), default);
    assert!(merged.windows(2).all(|pair| pair[0].name < pair[1].name), "sorted, no name twice");
    assert_eq!(merge(merged.clone(), default), merged);
    let mut by_name: BTreeMap<&LockName, Vec<&Wanted>> = BTreeMap::new();
    asks.iter().for_each(|ask| by_name.entry(&ask.name).or_default().push(ask));
    assert_eq!(merged.len(), by_name.len());
    for one in &merged {
        let all = &by_name[&one.name];
        assert_eq!(one.wait, all.iter().filter_map(|ask| ask.wait).min());
        assert_eq!(one.ttl, all.iter().filter_map(|ask| ask.ttl).max());
        assert_eq!(one.hold, all.iter().filter_map(|ask| ask.hold).min());
        let mode = one.mode.unwrap_or(default);
        assert!(all.iter().all(|ask| mode.covers(ask.mode.unwrap_or(default))), "{one:?} for {all:?}");
    }
}

/// A whole request.
fn request(policy: &Policy, data: &[u8]) {
    let fields = Fields::parse(data);
    let reads = matches!(policy.annotations.header, HeaderAnnotations::Accept | HeaderAnnotations::Reject);
    let annotated = reads && fields.first("lock").is_some();
    let caller = fields.first("%principal").map_or(0, <[u8]>::len);
    let (patience, principal) = (patience(&fields), fields.first("%principal").filter(|id| !id.is_empty()));
    let host = Bench::with_request(Fields::parse(data));
    match intake::read(&Facts::of(&host, policy)) {
        Intake::Nothing => assert!(!annotated, "an annotation is overlooked"),
        Intake::Reject(_, reject) => {
            check::refusal(&reject, 1024 + 8 * caller);
        }
        Intake::Locks(Asked { terms: _, owner, wants }) => {
            assert!(!annotated || policy.annotations.header == HeaderAnnotations::Accept);
            check::one_line(owner.as_str(), 256);
            assert!((1..=policy.limits.locks_per_request as usize).contains(&wants.len()));
            assert!(wants.windows(2).all(|pair| pair[0].name < pair[1].name), "sorted, no name twice");
            for want in &wants {
                canonical(&want.name);
                assert!(want.wait <= policy.limits.max_wait.min(patience), "{want:?}: the caller waits {patience:?}");
                assert!((MIN_TTL..=policy.limits.max_ttl).contains(&want.ttl), "{want:?}");
                assert!((MIN_TTL..=LONGEST).contains(&want.hold), "{want:?}");
                assert!(!want.mode.is_intent() || policy.classes.of(&want.name).hierarchy, "{want:?}");
                assert!(policy.may_lock(want.name.class(), || principal.map(<[u8]>::to_vec)), "{want:?}");
            }
            if annotated {
                let asked = parse_lock_header(fields.all("lock")).expect("an annotation that was obeyed");
                assert!(asked.iter().all(|ask| wants.iter().any(|want| want.name == ask.name)));
            }
        }
    }
}

/// How long the caller waits, from the words of the specifications: at most 8 digits and a unit, of gRPC requests; whole
/// milliseconds above 0.
fn patience(fields: &Fields<'_>) -> Duration {
    let number =
        |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    let content = fields.first("content-type").unwrap_or_default();
    let is_grpc = content == b"application/grpc"
        || content.starts_with(b"application/grpc+")
        || content.starts_with(b"application/grpc;");
    let text = |name: &str| fields.first(name).and_then(|value| std::str::from_utf8(value).ok());
    let of_grpc = text("grpc-timeout").filter(|value| is_grpc && (2..=9).contains(&value.len())).and_then(|value| {
        let (amount, unit) = value.split_at_checked(value.len() - 1)?;
        let nanos: u64 = match unit {
            "H" => 3_600_000_000_000,
            "M" => 60_000_000_000,
            "S" => 1_000_000_000,
            "m" => 1_000_000,
            "u" => 1_000,
            "n" => 1,
            _ => return None,
        };
        let nanos = u128::from(number(amount)?) * u128::from(nanos);
        Some(Duration::new(u64::try_from(nanos / 1_000_000_000).ok()?, u32::try_from(nanos % 1_000_000_000).ok()?))
    });
    let of_envoy = text("x-envoy-expected-rq-timeout-ms").and_then(number).filter(|millis| *millis > 0);
    of_grpc.into_iter().chain(of_envoy.map(Duration::from_millis)).min().unwrap_or(Duration::MAX)
}
