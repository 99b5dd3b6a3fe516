//! Policies as a whole: what they mean, and the line that a bad one is refused with.

use serde_json::{Value, json};

use super::*;
use interlock_core::{Class, LockName, Rank, Within};

fn env(name: &str) -> Option<String> {
    (name == "INTERLOCK_KEY").then(|| "0123456789abcdef0123456789abcdef".to_owned())
}

pub(super) fn parse(policy: &Value) -> Result<Policy, String> {
    Policy::parse(policy.to_string().as_bytes(), &env).map_err(|error| error.to_string())
}

/// Asserts that a policy is refused with this line.
fn refused(policy: &Value, line: &str) {
    assert_eq!(parse(policy).map(|_| ()), Err(line.to_owned()), "{policy}");
}

fn wanted(name: &str) -> Wanted {
    Wanted::new(LockName::parse(name).unwrap())
}

#[test]
fn nothing_said_is_the_default() {
    for text in ["", "  \n", "{}"] {
        let policy = Policy::parse(text.as_bytes(), &env).unwrap();
        assert_eq!(policy.instance, "interlock");
        assert_eq!(policy.enforcement, Enforcement::Enforce);
        assert_eq!(policy.owner_from, [OwnerSource::Traceparent, OwnerSource::RequestId]);
        assert_eq!(policy.reentrancy, Reentrancy::Owner);
        assert_eq!(policy.backend, Backend::Local);
        assert_eq!(policy.on_backend_unavailable, OnUnavailable::Reject);
        assert_eq!(policy.limits.locks_per_owner, Some(64));
        assert_eq!(policy.limits.max_ttl, Duration::from_secs(60));
        assert_eq!(policy.annotations.header, HeaderAnnotations::Accept);
        assert_eq!(policy.annotations.route, RouteAnnotations::Accept);
        assert!(policy.rules.is_empty() && policy.keys.is_empty());
        let ask = policy.ask(wanted("order/1"));
        assert_eq!(ask.mode, Mode::Exclusive);
        assert_eq!((ask.wait, ask.ttl, ask.hold), (seconds(2), seconds(5), seconds(60)));
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// The example of the contract, without what comes with later versions.
fn example() -> Value {
    json!({
        "instance": "orders",
        "enforcement": "audit",
        "owner": { "from": ["traceparent", "x-request-id", "lock-owner", "baggage"] },
        "reentrancy": "lease",
        "backend": { "local": {} },
        "on_backend_unavailable": "allow",
        "defaults": { "mode": "shared", "wait": "1s", "ttl": "4s", "hold": "30s" },
        "limits": {
            // As Envoy spells the numbers of a Struct, and as people do.
            "locks_per_request": 8.0, "locks_per_owner": null, "waiters_per_lock": 10, "max_wait": "10s", "max_ttl": "20s",
            "locks": 1000.0, "waiters": 500
        },
        "classes": [
            { "name": "account", "rank": 10, "principals": ["spiffe://mesh/ns/pay/*"] },
            { "name": "order", "rank": 20.0, "permits": 1, "within": "unordered" },
            { "name": "stock", "rank": 30, "hierarchy": true }
        ],
        "annotations": { "header": "strip", "route": "ignore" },
        "rules": [{
            "name": "capture",
            "match": { "methods": ["POST"], "path": "/orders/{id}/capture", "headers": { "x-tier": "gold" }, "route": "r" },
            "locks": [{ "name": "order/{id}" }, { "name": "account/{header:x-account}", "mode": "shared", "ttl": "2s" }],
            "wait": "500ms",
            "on_lease_lost": "continue",
            "enforcement": "enforce",
            "on_backend_unavailable": "reject"
        }],
        "keys": [{ "id": "2026-11", "secret": { "env": "INTERLOCK_KEY" } }]
    })
}

#[test]
fn everything_said_is_read() {
    let policy = parse(&example()).unwrap();
    assert_eq!(policy.instance, "orders");
    assert_eq!(policy.enforcement, Enforcement::Audit);
    assert_eq!(policy.owner_from.len(), 4);
    assert_eq!(policy.reentrancy, Reentrancy::Lease);
    assert_eq!(policy.on_backend_unavailable, OnUnavailable::Allow);
    assert_eq!(policy.defaults.mode, Mode::Shared);
    assert_eq!(
        (policy.defaults.wait, policy.defaults.ttl, policy.defaults.hold),
        (seconds(1), seconds(4), seconds(30))
    );
    assert_eq!(policy.limits.locks_per_request, 8);
    assert_eq!(policy.limits.locks_per_owner, None);
    assert_eq!(policy.limits.waiters_per_lock, 10);
    assert_eq!((policy.limits.max_wait, policy.limits.max_ttl), (seconds(10), seconds(20)));
    assert_eq!((policy.limits.locks, policy.limits.waiters), (1000, 500));
    assert_eq!(policy.classes.get("account").rank, Some(Rank(10)));
    let order = Class { rank: Some(Rank(20)), permits: 1, within: Within::Unordered, hierarchy: false };
    assert_eq!(policy.classes.get("order"), order);
    assert!(policy.classes.get("stock").hierarchy);
    assert_eq!(policy.annotations.header, HeaderAnnotations::Strip);
    assert_eq!(policy.annotations.route, RouteAnnotations::Ignore);
    assert!(!policy.keys.is_empty());
    let rule = policy.rules.iter().next().unwrap();
    assert_eq!((rule.name.as_str(), rule.enforcement), ("capture", Enforcement::Enforce));
    assert_eq!(rule.on_lease_lost, OnLeaseLost::Continue);
    assert_eq!(rule.on_backend_unavailable, OnUnavailable::Reject);
    assert_eq!(rule.locks[1].name.class(), "account");
    assert!(!format!("{policy:?}").contains("0123456789abcdef"), "a secret in Debug");
}

#[test]
fn asks_are_brought_within_the_limits() {
    let policy = parse(&json!({ "limits": { "max_wait": "1s", "max_ttl": "3s" } })).unwrap();
    let ask = policy.ask(wanted("a"));
    assert_eq!((ask.wait, ask.ttl), (seconds(1), seconds(3)));
    let far = Some(seconds(999_999_999_999_999));
    let ask = policy.ask(Wanted { wait: far, ttl: far, hold: far, ..wanted("a") });
    assert_eq!((ask.wait, ask.ttl, ask.hold), (seconds(1), seconds(3), LONGEST));
    let none = Some(Duration::from_millis(1));
    let ask = policy.ask(Wanted { wait: Some(Duration::ZERO), ttl: none, hold: none, ..wanted("a") });
    assert_eq!((ask.wait, ask.ttl, ask.hold), (Duration::ZERO, MIN_TTL, MIN_TTL));
}

#[test]
fn principals_guard_their_class() {
    let policy = parse(&example()).unwrap();
    let caller = |id: &str| Some(id.as_bytes().to_vec());
    assert!(policy.may_lock("account", || caller("spiffe://mesh/ns/pay/sa/app")));
    assert!(!policy.may_lock("account", || caller("spiffe://mesh/ns/payroll/sa/app")));
    assert!(!policy.may_lock("account", || None));
    assert!(policy.may_lock("order", || panic!("an open class asks nobody")));
}

#[test]
fn patterns_match_the_whole_text() {
    for (pattern, text, matched) in [
        ("abc", "abc", true),
        ("abc", "abcd", false),
        ("a*", "a", true),
        ("*c", "abc", true),
        ("a*c", "ac", true),
        ("a*c", "a", false),
        ("aba*aba", "aba", false),
        ("a*b*c", "a/b/b/c", true),
        ("a*b*c", "acb", false),
        ("*", "", true),
        ("**", "x", true),
        ("*b*", "abc", true),
        ("*b*", "ac", false),
        ("*ab*ab", "ab", false),
    ] {
        assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), matched, "{pattern} {text}");
    }
}

#[test]
fn what_is_no_policy_is_refused() {
    for (text, start) in [
        ("nonsense", "the policy is not JSON (expected"),
        ("{\"a\":\n}", "the policy is not JSON (expected value at line 2 column 1)"),
        ("[]", "the policy is a list; write an object"),
        ("null", "the policy is null; write an object"),
        ("\"{}\"", "the policy is a string; write an object"),
        ("\u{feff}{}", "the policy is not JSON"),
    ] {
        let error = Policy::parse(text.as_bytes(), &env).unwrap_err().to_string();
        assert!(error.starts_with(start), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
    assert!(Policy::parse(b"{\"instance\":\"\xff\"}", &env).is_err());
    assert!(Policy::parse("[".repeat(100_000).as_bytes(), &env).is_err());
}

#[test]
fn fields_are_refused_by_name() {
    refused(&json!({ "ruels": [] }), "ruels: there is no such field; did you mean \"rules\"?");
    refused(
        &json!({ "owner": { "from": ["traceparent"], "if": 1 } }),
        "owner.if: there is no such field; the fields here are from",
    );
    refused(&json!({ "a\nb": 1 }).clone(), &{
        let fields = "instance, enforcement, owner, reentrancy, backend, on_backend_unavailable, defaults, limits, classes, \
                      annotations, rules, api, guard, keys";
        format!("\"a\\nb\": there is no such field; the fields here are {fields}")
    });
    refused(&json!({ "instance": 1 }), "instance: is a number; write a string");
    refused(&json!({ "instance": null }), "instance: is null; write a string, or leave the field out");
    let no_name = "is no name; use 1 to 64 of A-Z a-z 0-9 . _ - with a letter first";
    for name in ["", "1a", "a b", "ü", "a\n"] {
        refused(&json!({ "instance": name }), &format!("instance: {name:?} {no_name}"));
    }
    let long = "a".repeat(100_000);
    let cut = format!("instance: \"{}\" (and 99920 bytes more) {no_name}", "a".repeat(80));
    refused(&json!({ "instance": long }), &cut);
    refused(
        &json!({ "enforcement": "enforced" }),
        "enforcement: \"enforced\" is not an enforcement; did you mean \"enforce\"?",
    );
    refused(&json!({ "enforcement": "no" }), "enforcement: \"no\" is not an enforcement; use enforce, audit or off");
    refused(
        &json!({ "enforcement": "enforce: 10%" }),
        "enforcement: \"enforce: 10%\" is not an enforcement; write the share of owners as { enforce: 10% }",
    );
    assert_eq!(parse(&json!({ "enforcement": false })).unwrap().enforcement, Enforcement::Off, "off, in YAML 1.1");
    refused(&json!({ "enforcement": true }), "enforcement: is a boolean; write a string");
    refused(&json!({ "enforcement": 7 }), "enforcement: is a number; write a string");
    refused(&json!({ "enforcement": {} }), "enforcement.enforce: is missing; it has no default");
    refused(
        &json!({ "enforcement": { "audit": "10%" } }),
        "enforcement.audit: there is no such field; the fields here are enforce",
    );
    refused(
        &json!({ "enforcement": { "enforce": 10 } }),
        "enforcement.enforce: is a number; write a percentage, such as \"10%\"",
    );
    refused(
        &json!({ "enforcement": { "enforce": "110%" } }),
        "enforcement.enforce: \"110%\" is more than all owners; a percentage is at most \"100%\"",
    );
    refused(
        &json!({ "on_backend_unavailable": "alow" }),
        "on_backend_unavailable: \"alow\" is not an answer to a backend that is away; did you mean \"allow\"?",
    );
}

#[test]
fn a_share_of_the_owners_may_be_enforced() {
    let enforcement = |said: Value| parse(&json!({ "enforcement": said })).unwrap().enforcement;
    for (percentage, is) in [("0%", Enforcement::Audit), ("0.00%", Enforcement::Audit), ("100%", Enforcement::Enforce)]
    {
        assert_eq!(enforcement(json!({ "enforce": percentage })), is, "{percentage}");
    }
    let some = enforcement(json!({ "enforce": "12.5%" }));
    assert!(matches!(some, Enforcement::Partly(_)), "{some:?}");
    assert_eq!(some, enforcement(json!({ "enforce": "12.50%" })));
    assert_ne!(some, enforcement(json!({ "enforce": "12.51%" })));
    let rule = |enforcement: Value| {
        let rule =
            json!({ "name": "r", "match": { "path": "/r" }, "locks": [{ "name": "a" }], "enforcement": enforcement });
        parse(&json!({ "enforcement": { "enforce": "12.5%" }, "rules": [rule] }))
    };
    let of_rule = |said| rule(said).unwrap().rules.iter().next().unwrap().enforcement;
    assert_eq!(of_rule(json!("off")), Enforcement::Off);
    assert!(of_rule(json!({ "enforce": "99%" })) != some);
    let none = json!({ "enforcement": { "enforce": "12.5%" }, "rules": [{ "name": "r", "match": { "path": "/r" }, "locks": [{ "name": "a" }] }] });
    assert_eq!(parse(&none).unwrap().rules.iter().next().unwrap().enforcement, some, "the policy's");
    assert_eq!(
        rule(json!({ "enforce": "ten" })).map(|_| ()).unwrap_err(),
        "rules[0].enforcement.enforce: \"ten\" is not a percentage; write a number and %, such as \"10%\" or \"0.5%\""
    );
}

#[test]
fn owners_and_backends_are_checked() {
    refused(&json!({ "owner": {} }), "owner.from: is missing; it has no default");
    refused(&json!({ "owner": { "from": [] } }), "owner.from: is empty; name one source at least, such as traceparent");
    refused(
        &json!({ "owner": { "from": ["trace-parent"] } }),
        "owner.from[0]: \"trace-parent\" is not a source of owners; did you mean \"traceparent\"?",
    );
    refused(
        &json!({ "owner": { "from": ["baggage", "baggage"] } }),
        "owner.from[1]: \"baggage\" is there twice; leave one of them out",
    );
    refused(
        &json!({ "reentrancy": "lease" }),
        "reentrancy: \"lease\" needs signed fences, and there are no keys; add keys, or use \"owner\"",
    );
    let line = "backend.redis: this build has no such backend yet; use local, authority or etcd";
    refused(&json!({ "backend": { "redis": { "cluster": "x" } } }), line);
    refused(&json!({ "backend": { "ectd": {} } }), "backend.ectd: \"ectd\" is not a backend; did you mean \"etcd\"?");
    refused(
        &json!({ "backend": { "zookeeper": {} } }),
        "backend.zookeeper: \"zookeeper\" is not a backend; use local, authority, etcd or redis",
    );
    refused(&json!({ "backend": {} }), "backend: names no backend; write { local: {} }");
    refused(&json!({ "backend": { "local": {}, "etcd": {} } }), "backend: names several backends; keep one of them");
    refused(
        &json!({ "backend": { "local": { "size": 1 } } }),
        "backend.local.size: there is no such field; leave it out",
    );
    refused(&json!({ "backend": "local" }), "backend: is a string; write an object");
}

#[test]
fn an_authority_is_a_cluster_a_prefix_and_a_timeout() {
    let at = |authority: Value| match parse(&json!({ "backend": { "authority": authority } })).unwrap().backend {
        Backend::Authority(at) => at,
        other => panic!("{other:?}"),
    };
    let short = at(json!({ "cluster": "leases" }));
    assert_eq!((short.cluster.as_str(), short.prefix.as_str()), ("leases", "/interlock/v1"));
    assert_eq!(short.timeout, Duration::from_millis(250));
    let long = at(json!({ "cluster": "outbound|80||leases.mesh", "prefix": "/l", "timeout": "1.5s" }));
    assert_eq!((long.prefix.as_str(), long.timeout), ("/l", Duration::from_millis(1500)));

    let refused_at = |authority: Value, line: &str| refused(&json!({ "backend": { "authority": authority } }), line);
    refused_at(json!({}), "backend.authority.cluster: is missing; it has no default");
    refused_at(
        json!({ "cluster": "" }),
        "backend.authority.cluster: is no name of a cluster; write that of the cluster in Envoy's configuration, such as \
         \"interlock-authority\"",
    );
    refused_at(
        json!({ "cluster": "leases", "prefix": "l/" }),
        "backend.authority.prefix: is no prefix of paths; write one such as \"/interlock/v1\", with no slash at its end",
    );
    for timeout in ["0s", "9ms", "31s"] {
        refused_at(
            json!({ "cluster": "leases", "timeout": timeout }),
            "backend.authority.timeout: is no timeout for an authority; write \"10ms\" to \"30s\"",
        );
    }
    refused_at(
        json!({ "cluster": "leases", "token": "x" }),
        "backend.authority.token: there is no such field; the fields here are cluster, prefix, timeout",
    );
    let with = |field: &str, value: Value| json!({ "backend": { "authority": { "cluster": "leases" } }, field: value });
    refused(
        &with("reentrancy", json!("none")),
        "reentrancy: is decided by the authority; leave the field out here and write it into the authority's policy \
         (\"lease\" is for the local backend only)",
    );
    refused(
        &with("api", json!({})),
        "api: serves the table in this Envoy, and the locks are at an authority; leave out api, or backend",
    );
}

#[test]
fn numbers_and_durations_are_checked() {
    refused(&json!({ "limits": { "locks": 0 } }), "limits.locks: 0 is not a whole number from 1 to 10000000");
    refused(&json!({ "limits": { "locks": 1.5 } }), "limits.locks: 1.5 is not a whole number from 1 to 10000000");
    refused(&json!({ "limits": { "locks": -1 } }), "limits.locks: -1 is not a whole number from 1 to 10000000");
    refused(&json!({ "limits": { "locks": 1e300 } }), "limits.locks: 1e+300 is not a whole number from 1 to 10000000");
    refused(&json!({ "limits": { "locks": "16" } }), "limits.locks: is a string; write a whole number");
    refused(
        &json!({ "limits": { "max_wait": 30 } }),
        "limits.max_wait: is a number; write a duration with its unit, such as \"2s\" or \"250ms\"",
    );
    refused(
        &json!({ "limits": { "max_wait": "30" } }),
        "limits.max_wait: \"30\" is not a duration; write a number and us, ms, s, m or h, such as \"1.5s\" or \"250ms\"",
    );
    refused(
        &json!({ "limits": { "max_ttl": "25h" } }),
        "limits.max_ttl: \"25h\" is too long; a duration is at most \"24h\"",
    );
    refused(&json!({ "limits": { "max_ttl": "99ms" } }), "limits.max_ttl: 99ms is below the least, 100ms; raise it");
    refused(
        &json!({ "defaults": { "ttl": "90s" } }),
        "defaults.ttl: 90s is over limits.max_ttl, 60s; lower it, or raise the limit",
    );
    refused(
        &json!({ "defaults": { "wait": "5s" }, "limits": { "max_wait": "1.5s" } }),
        "defaults.wait: 5s is over limits.max_wait, 1500ms; lower it, or raise the limit",
    );
    refused(
        &json!({ "defaults": { "hold": "1s" } }),
        "defaults.hold: 1s is below the ttl, 5s; raise it, or lower the ttl",
    );
    refused(
        &json!({ "defaults": { "mode": "intent-shared" } }),
        "defaults.mode: \"intent-shared\" fits hierarchical classes only; use exclusive or shared",
    );
    let raised = parse(&json!({ "limits": { "max_ttl": "10m" }, "defaults": { "ttl": "5m" } })).unwrap();
    assert_eq!(raised.defaults.hold, seconds(300));
}

#[test]
fn classes_are_checked() {
    let class = |class: Value, line: &str| refused(&json!({ "classes": [class] }), line);
    class(json!({}), "classes[0].name: is missing; it has no default");
    class(
        json!({ "name": "a/b" }),
        "classes[0].name: \"a/b\" cannot name a class: it has a \"/\"; a class is the first segment of a lock name",
    );
    class(
        json!({ "name": "a b" }),
        "classes[0].name: \"a b\" cannot name a class: byte 0x20 at 1 cannot stand in a lock name; write it as %20",
    );
    class(
        json!({ "name": "a", "rank": 4294967296u64 }),
        "classes[0].rank: 4294967296 is not a whole number from 0 to 4294967295",
    );
    class(json!({ "name": "a", "permits": 0 }), "classes[0].permits: 0 is not a whole number from 1 to 1000000");
    class(
        json!({ "name": "a", "within": "order" }),
        "classes[0].within: \"order\" is not an order within a class; did you mean \"ordered\"?",
    );
    class(json!({ "name": "a", "hierarchy": "yes" }), "classes[0].hierarchy: is a string; write true or false");
    class(
        json!({ "name": "a", "hierarchy": true, "permits": 2 }),
        "classes[0].permits: a hierarchical class has one permit a lock; leave permits out, or hierarchy",
    );
    class(
        json!({ "name": "a", "principals": [] }),
        "classes[0].principals: is empty; name a pattern, or leave the field out",
    );
    class(
        json!({ "name": "a", "principals": [""] }),
        "classes[0].principals[0]: is no pattern of SPIFFE IDs; write 1 to 2048 bytes, with * for any text",
    );
    refused(
        &json!({ "classes": [{ "name": "a" }, { "name": "%61" }] }),
        "classes[1].name: \"a\" is the name of classes[0] already; make one class of the two",
    );
    refused(
        &json!({ "annotations": { "header": "acept" } }),
        "annotations.header: \"acept\" is not a way to treat the header; did you mean \"accept\"?",
    );
}
