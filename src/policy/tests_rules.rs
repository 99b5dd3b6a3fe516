//! Rules: what is refused of them, and which of them a request meets.

use std::cell::RefCell;

use serde_json::{Value, json};

use super::tests::parse;
use super::*;

fn refused(rules: &Value, line: &str) {
    let policy = json!({ "rules": rules, "classes": [{ "name": "stock", "hierarchy": true }] });
    assert_eq!(parse(&policy).map(|_| ()), Err(line.to_owned()), "{rules}");
}

/// A rule with one lock named like itself.
fn rule(name: &str, matched: &Value) -> Value {
    json!({ "name": name, "match": matched, "locks": [{ "name": name }] })
}

fn rules(rules: &[(&str, Value)]) -> Rules {
    let rules: Vec<_> = rules.iter().map(|(name, matched)| rule(name, matched)).collect();
    parse(&json!({ "rules": rules })).unwrap().rules
}

/// A request that notes which of its headers are read.
#[derive(Default)]
struct Request {
    headers: Vec<(&'static str, &'static str)>,
    route: Option<&'static str>,
    read: RefCell<Vec<String>>,
}

impl Request {
    /// The rule for this request, and its locks.
    fn meets(&self, rules: &Rules, method: &str, path: &str) -> Option<(String, Vec<String>)> {
        let header = |name: &str| {
            self.read.borrow_mut().push(name.to_owned());
            self.headers.iter().find(|(header, _)| *header == name).map(|(_, value)| value.as_bytes().to_vec())
        };
        let route = || {
            self.read.borrow_mut().push("(route)".to_owned());
            self.route.map(|route| route.as_bytes().to_vec())
        };
        let lookup = Lookup {
            method: method.as_bytes(),
            path: path.as_bytes(),
            header: &header,
            route: &route,
            principal: &|| None,
        };
        let found = rules.find(&lookup)?;
        let locks = found.locks(&lookup).unwrap().iter().map(|lock| lock.name.to_string()).collect();
        Some((found.rule.name.clone(), locks))
    }
}

fn meets(rules: &Rules, method: &str, path: &str) -> Option<String> {
    Request::default().meets(rules, method, path).map(|(name, _)| name)
}

#[test]
fn no_rules_match_nothing() {
    let none = Rules::default();
    assert!(none.is_empty());
    assert_eq!(meets(&none, "GET", "/"), None);
}

#[test]
fn the_most_exact_path_wins_whatever_the_order() {
    let rules = rules(&[
        ("rest", json!({ "path": "/orders/{id}/{*rest}" })),
        ("one", json!({ "path": "/orders/{id}" })),
        ("special", json!({ "path": "/orders/special" })),
        ("pdf", json!({ "path": "/orders/{id}.pdf" })),
        ("any", json!({ "methods": ["GET", "POST"] })),
    ]);
    for (path, name) in [
        ("/orders/42", Some("one")),
        ("/orders/42?x=/special", Some("one")),
        ("/orders/special", Some("special")),
        ("/orders/spe%63ial", Some("special")),
        ("/orders/42.pdf", Some("pdf")),
        ("/orders/42/a/b", Some("rest")),
        ("/orders/", Some("any")),
        ("/orders//a", Some("any")),
        ("/other", Some("any")),
        ("*", Some("any")),
        ("", Some("any")),
    ] {
        assert_eq!(meets(&rules, "GET", path).as_deref(), name, "{path}");
    }
    assert_eq!(meets(&rules, "PUT", "/other"), None);
}

#[test]
fn a_rule_for_one_method_hides_no_other_method() {
    let rules = rules(&[
        ("get", json!({ "methods": ["GET"], "path": "/a/{x}" })),
        ("post", json!({ "methods": ["POST"], "path": "/a/{y}" })),
        ("any", json!({ "path": "/a/{z}" })),
        ("exact", json!({ "path": "/a/b" })),
    ]);
    assert_eq!(meets(&rules, "GET", "/a/1").as_deref(), Some("get"));
    assert_eq!(meets(&rules, "POST", "/a/1").as_deref(), Some("post"));
    assert_eq!(meets(&rules, "PUT", "/a/1").as_deref(), Some("any"));
    assert_eq!(meets(&rules, "GET", "/a/b").as_deref(), Some("exact"));
    assert_eq!(meets(&rules, "get", "/a/1").as_deref(), Some("any"), "methods are told apart by case");
    assert_eq!(meets(&rules, "\u{fffd}", "/a/1").as_deref(), Some("any"));
}

#[test]
fn captures_go_into_names_under_their_own_rules_names() {
    let parsed = parse(&json!({ "rules": [
        { "name": "gold", "match": { "path": "/a/{x}/{y}", "headers": { "x-tier": "gold" } }, "locks": [{ "name": "g/{y}/{x}" }] },
        { "name": "rest", "match": { "path": "/a/{p}/{q}" }, "locks": [{ "name": "r/{p}" }, { "name": "r/{q}" }] },
        { "name": "tail", "match": { "path": "/t/{*tail}" }, "locks": [{ "name": "t/{tail}" }] },
    ] }));
    let rules = parsed.unwrap().rules;
    let names =
        |name: &str, locks: &[&str]| Some((name.to_owned(), locks.iter().map(|lock| (*lock).to_owned()).collect()));
    let gold = Request { headers: vec![("x-tier", "gold")], ..Request::default() };
    assert_eq!(gold.meets(&rules, "GET", "/a/1/%32"), names("gold", &["g/2/1"]));
    assert_eq!(Request::default().meets(&rules, "GET", "/a/1/a%2Fb"), names("rest", &["r/1", "r/a%2Fb"]));
    assert_eq!(Request::default().meets(&rules, "GET", "/t/a/b%25"), names("tail", &["t/a%2Fb%25"]));
    assert_eq!(Request::default().meets(&rules, "GET", "/t/\u{fc}\u{0}"), names("tail", &["t/%C3%BC%00"]));
}

#[test]
fn when_an_exact_rule_says_no_the_next_has_its_turn() {
    let rules = rules(&[
        ("route", json!({ "path": "/a/b", "route": "r" })),
        ("gold", json!({ "path": "/a/b", "headers": { "x-tier": "gold" } })),
        ("tiered", json!({ "path": "/a/{x}", "headers": { "X-Tier": "*" } })),
        ("tail", json!({ "path": "/{*x}" })),
        ("last", json!({ "methods": ["GET"] })),
    ]);
    let with = |headers: &[(&'static str, &'static str)], route| {
        let request = Request { headers: headers.to_vec(), route, ..Request::default() };
        let name = request.meets(&rules, "GET", "/a/b").map(|(name, _)| name);
        (name.unwrap(), request.read.take().join(" "))
    };
    let met = |name: &str, read: &str| (name.to_owned(), read.to_owned());
    assert_eq!(with(&[("x-tier", "gold")], Some("r")), met("route", "(route)"));
    assert_eq!(with(&[("x-tier", "gold")], None), met("gold", "(route) x-tier"));
    assert_eq!(with(&[("x-tier", "tin")], Some("s")), met("tiered", "(route) x-tier"));
    assert_eq!(with(&[], None), met("tail", "(route) x-tier"));
    assert_eq!(meets(&rules, "GET", "/").as_deref(), Some("last"));
}

#[test]
fn a_suffix_that_leads_nowhere_hides_no_other_path() {
    let rules = rules(&[
        ("json", json!({ "path": "/{x}.json/meta" })),
        ("tail", json!({ "path": "/{x}/{*rest}" })),
        ("one", json!({ "path": "/{x}" })),
    ]);
    assert_eq!(meets(&rules, "GET", "/a.json/meta").as_deref(), Some("json"));
    assert_eq!(meets(&rules, "GET", "/a.json/other").as_deref(), Some("tail"));
    assert_eq!(meets(&rules, "GET", "/a.json").as_deref(), Some("one"));
}

#[test]
fn a_rule_that_no_request_reaches_is_refused() {
    let by = |earlier: usize, name: &str, rule: usize| {
        format!(
            "rules[{rule}].match: no request reaches this rule, because rules[{earlier}] ({name}) takes all that it matches; \
             put it before that rule, or take it out"
        )
    };
    let two = |first: Value, second: Value| json!([rule("a", &first), rule("b", &second)]);
    refused(&two(json!({ "path": "/a/{x}" }), json!({ "path": "/a/{y}" })), &by(0, "a", 1));
    refused(&two(json!({ "path": "/a" }), json!({ "path": "/%61", "methods": ["GET"], "route": "r" })), &by(0, "a", 1));
    refused(
        &two(json!({ "methods": ["GET", "PUT"] }), json!({ "methods": ["PUT"], "headers": { "x": "1" } })),
        &by(0, "a", 1),
    );
    refused(&two(json!({ "headers": { "x": "*" } }), json!({ "headers": { "X": "1", "y": "2" } })), &by(0, "a", 1));
    refused(
        &json!([
            rule("a", &json!({ "path": "/a", "methods": ["GET"] })),
            rule("b", &json!({ "path": "/a", "methods": ["PUT"] })),
            rule("c", &json!({ "path": "/a", "methods": ["GET", "PUT"] }))
        ]),
        &by(0, "a", 2),
    );
    for (first, second) in [
        (json!({ "path": "/a", "methods": ["GET"] }), json!({ "path": "/a" })),
        (json!({ "path": "/a", "route": "r" }), json!({ "path": "/a" })),
        (json!({ "path": "/a", "headers": { "x": "1" } }), json!({ "path": "/a", "headers": { "x": "2" } })),
        (json!({ "headers": { "x": "1" } }), json!({ "headers": { "x": "*" } })),
        (json!({ "route": "r" }), json!({ "path": "/a", "route": "r" })),
        (json!({ "path": "/a" }), json!({ "path": "/a/" })),
    ] {
        assert!(parse(&json!({ "rules": two(first, second) })).is_ok());
    }
}

#[test]
fn ambiguous_paths_name_both_rules() {
    refused(
        &json!([
            rule("a", &json!({ "path": "/x" })),
            rule("b", &json!({ "path": "/a/{x}" })),
            rule("c", &json!({ "path": "/a/{*rest}" }))
        ]),
        "rules[2].match.path: is ambiguous beside that of rules[1] (b); make one of them more exact, or give both one shape",
    );
}

#[test]
fn bad_rules_are_refused_with_their_place() {
    let one = |rule: Value, line: &str| refused(&json!([rule]), line);
    let locks = json!([{ "name": "order/{id}" }]);
    let path = json!({ "path": "/orders/{id}" });
    one(json!({ "match": path, "locks": locks }), "rules[0].name: is missing; it has no default");
    one(json!({ "name": "a", "locks": locks }), "rules[0].match: is missing; it has no default");
    one(json!({ "name": "a", "match": path }), "rules[0].locks: is missing; it has no default");
    one(json!({ "name": "a", "match": path, "locks": [] }), "rules[0].locks: is empty; name one lock at least");
    one(
        json!({ "name": "a", "match": {}, "locks": locks }),
        "rules[0].match: is empty; name methods, a path, headers or a route",
    );
    let matched =
        |matched: Value, line: &str| one(json!({ "name": "a", "match": matched, "locks": [{ "name": "x" }] }), line);
    matched(
        json!({ "methods": [] }),
        "rules[0].match.methods: is empty; name a method, or leave the field out for any",
    );
    matched(
        json!({ "methods": ["post"] }),
        "rules[0].match.methods[0]: \"post\" is not a method; did you mean \"POST\"?",
    );
    matched(json!({ "methods": ["GE T"] }), "rules[0].match.methods[0]: \"GE T\" is not a method");
    matched(
        json!({ "methods": ["GET", "GET"] }),
        "rules[0].match.methods[1]: \"GET\" is there twice; leave one of them out",
    );
    matched(json!({ "headers": {} }), "rules[0].match.headers: is empty; name a header, or leave the field out");
    matched(json!({ "headers": { "x": 3 } }), "rules[0].match.headers.x: is a number; write a string");
    matched(json!({ "headers": { "a b": "1" } }), "rules[0].match.headers.\"a b\": \"a b\" is no header's name");
    matched(
        json!({ "headers": { "x": "1", "X": "1" } }),
        "rules[0].match.headers.x: is there twice, in another case; leave one of them out",
    );
    matched(json!({ "route": "" }), "rules[0].match.route: is empty; write the name of a route of Envoy's");
    matched(
        json!({ "path": "orders" }),
        "rules[0].match.path: \"orders\" does not begin with \"/\"; write the whole path",
    );
    matched(json!({ "pth": "/" }), "rules[0].match.pth: there is no such field; did you mean \"path\"?");
    refused(
        &json!([rule("a", &json!({ "path": "/a" })), rule("a", &json!({ "path": "/b" }))]),
        "rules[1].name: \"a\" is the name of rules[0] already; give each rule its own",
    );
}

#[test]
fn bad_locks_are_refused_with_their_place() {
    let lock = |lock: Value, line: &str| {
        refused(&json!([{ "name": "a", "match": { "path": "/orders/{id}" }, "locks": [{ "name": "x" }, lock] }]), line);
    };
    lock(json!({}), "rules[0].locks[1].name: is missing; it has no default");
    lock(json!({ "name": "x" }), "rules[0].locks[1]: locks \"x\" twice; leave one of them out");
    lock(
        json!({ "name": "{id}" }),
        "rules[0].locks[1].name: \"{id}\" has no fixed class; write the first segment out, such as \"order/{id}\"",
    );
    lock(
        json!({ "name": "o/{di}" }),
        "rules[0].locks[1].name: \"o/{di}\" names \"di\", which the rule's path does not capture; did you mean \"id\"?",
    );
    lock(
        json!({ "name": "o", "mode": "exlusive" }),
        "rules[0].locks[1].mode: \"exlusive\" is not a mode; did you mean \"exclusive\"?",
    );
    lock(
        json!({ "name": "o", "mod": "shared" }),
        "rules[0].locks[1].mod: there is no such field; did you mean \"mode\"?",
    );
    lock(
        json!({ "name": "o", "mode": "intent-shared" }),
        "rules[0].locks[1].mode: \"intent-shared\" needs a hierarchy, and the class \"o\" has none; give it one, or use exclusive or shared",
    );
    lock(
        json!({ "name": "o", "ttl": "2m" }),
        "rules[0].locks[1].ttl: 120s is over limits.max_ttl, 60s; lower it, or raise the limit",
    );
    lock(json!({ "name": "o", "ttl": "1ms" }), "rules[0].locks[1].ttl: 1ms is below the least, 100ms; raise it");
    lock(
        json!({ "name": "o", "wait": "1m" }),
        "rules[0].locks[1].wait: 60s is over limits.max_wait, 30s; lower it, or raise the limit",
    );
    lock(
        json!({ "name": "o", "hold": "1s" }),
        "rules[0].locks[1].hold: 1s is below the ttl, 5s; raise it, or lower the ttl",
    );
    lock(
        json!({ "name": "o", "hold": "9s", "ttl": "10s" }),
        "rules[0].locks[1].hold: 9s is below the ttl, 10s; raise it, or lower the ttl",
    );
    let whole =
        json!({ "name": "a", "match": { "path": "/a" }, "hold": "9s", "locks": [{ "name": "x", "ttl": "10s" }] });
    refused(&json!([whole]), "rules[0].locks[0].ttl: 10s is over the hold limit, 9s; lower it, or raise hold");
    let many: Vec<_> = (0..17).map(|n| json!({ "name": format!("x/{n}") })).collect();
    refused(
        &json!([{ "name": "a", "match": { "path": "/a" }, "locks": many }]),
        "rules[0].locks: has 17 locks, over limits.locks_per_request, 16; lock fewer, or raise the limit",
    );
    let intent =
        json!([{ "name": "a", "match": { "path": "/a" }, "locks": [{ "name": "stock/1", "mode": "intent-shared" }] }]);
    assert!(parse(&json!({ "classes": [{ "name": "stock", "hierarchy": true }], "rules": intent })).is_ok());
}

#[test]
fn a_locks_own_times_come_before_its_rules() {
    let policy = parse(&json!({ "rules": [{
        "name": "a", "match": { "route": "r" }, "wait": "1s", "ttl": "2s", "hold": "3s",
        "locks": [{ "name": "x" }, { "name": "y", "wait": "4s", "mode": "shared", "ttl": "3s" }]
    }] }));
    let policy = policy.unwrap();
    let terms: Vec<_> = policy.rules.iter().next().unwrap().locks.iter().map(|lock| lock.terms).collect();
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    assert_eq!((terms[0].mode, terms[0].wait, terms[0].ttl, terms[0].hold), (None, seconds(1), seconds(2), seconds(3)));
    assert_eq!((terms[1].mode, terms[1].wait, terms[1].ttl), (Some(Mode::Shared), seconds(4), seconds(3)));
}
