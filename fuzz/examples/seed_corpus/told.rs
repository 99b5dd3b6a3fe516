//! Answers of an authority: as it gives them, and with one thing wrong.

use interlock_fuzz::told::{ID, KINDS, LOCKS, OWNER, input};
use serde_json::{Value, json};

use crate::Seeds;

/// A change of an answer.
type Lie<'a> = (&'a str, &'a dyn Fn(&mut Value));

fn lock(at: usize) -> Value {
    let (name, mode, floor) = LOCKS[at];
    json!({ "name": name, "mode": mode.to_string(), "fence": floor + 1 })
}

fn grant() -> Value {
    let locks: Vec<Value> = (0..LOCKS.len()).map(lock).collect();
    json!({ "id": ID, "owner": OWNER, "locks": locks, "ttl": "5s", "waited": "250ms", "receipt": "BzIwMjYtMTFBn36X" })
}

fn refusal(slug: &str, status: u16) -> Value {
    json!({
        "type": format!("urn:interlock:problem:{slug}"), "status": status, "title": slug, "detail": "somebody holds it",
        "lock": "a/1", "mode": "exclusive", "owner": OWNER, "retry_after_ms": 20,
    })
}

/// The seeds of the target.
pub fn seeds() -> Seeds {
    let mut seeds = Seeds::default();
    let whole = |value: &Value| value.to_string().into_bytes();
    let lies: &[Lie<'_>] = &[
        ("as-asked", &|_| {}),
        ("another-lease", &|lease| lease["id"] = json!("fedcba9876543210fedcba9876543210")),
        ("another-owner", &|lease| lease["owner"] = json!("two")),
        ("one-lock-fewer", &|lease| drop(lease["locks"].as_array_mut().expect("locks").pop())),
        ("a-lock-twice", &|lease| lease["locks"][1] = lock(0)),
        ("weaker", &|lease| lease["locks"][0]["mode"] = json!("shared")),
        ("stronger", &|lease| lease["locks"][1]["mode"] = json!("exclusive")),
        ("fallen-fence", &|lease| lease["locks"][0]["fence"] = json!(999)),
        ("no-fence", &|lease| lease["locks"][1]["fence"] = json!(0)),
        ("too-high-a-fence", &|lease| lease["locks"][2]["fence"] = json!(u64::MAX)),
        ("fence-in-words", &|lease| lease["locks"][2]["fence"] = json!("7")),
        ("longer", &|lease| lease["ttl"] = json!("5000001us")),
        ("no-time", &|lease| lease["ttl"] = json!("0s")),
        ("waited-for-ever", &|lease| lease["waited"] = json!("24h")),
        ("waited-less-than-nothing", &|lease| lease["waited"] = json!("-1s")),
        ("huge-receipt", &|lease| lease["receipt"] = json!("r".repeat(9000))),
        ("no-receipt", &|lease| lease["receipt"] = json!(null)),
        ("newer", &|lease| lease["more"] = json!({ "deep": [[[[1]]]] })),
        ("list", &|lease| *lease = json!([lease.clone()])),
    ];
    for (what, lie) in lies {
        let mut lease = grant();
        lie(&mut lease);
        seeds.add(&format!("granted-{what}"), input("granted", 201, &whole(&lease)));
    }
    problems(&mut seeds);
    for (what, results) in [
        ("kept", json!([{ "id": ID, "status": "renewed", "expires_in": "4s" }])),
        ("lost", json!([{ "id": ID, "status": "lost" }])),
        ("both", json!([{ "id": ID, "status": "lost" }, { "id": ID, "status": "renewed", "expires_in": "1us" }])),
        ("longer", json!([{ "id": ID, "status": "renewed", "expires_in": "6s" }])),
        ("another", json!([{ "id": "nobody-asked-for-this", "status": "lost" }])),
        ("none", json!([])),
        ("strange", json!([{ "id": ID, "status": "fine" }])),
        ("number", json!([7])),
    ] {
        seeds.add(&format!("renewed-{what}"), input("renewed", 200, &whole(&json!({ "results": results }))));
    }
    for status in ["released", "cancelled", "expired", "unknown", "gone"] {
        seeds.add(&format!("deleted-{status}"), input("deleted", 200, &whole(&json!({ "status": status }))));
    }
    let holder = json!({ "owner": "two", "mode": "shared", "fence": 9, "age": "1s" });
    for (what, held) in [
        ("one", json!({ "name": "a/1", "holders": [holder], "waiters": [] })),
        ("nobody", json!({ "name": "a/1", "holders": [] })),
        ("grace", json!({ "name": "a/1", "holders": [], "grace": "3s" })),
        ("another-lock", json!({ "name": "a/2", "holders": [holder] })),
        ("no-owner", json!({ "name": "a/1", "holders": [{ "owner": "", "fence": 9 }] })),
        ("a-crowd", json!({ "name": "a/1", "holders": vec![holder.clone(); 200] })),
    ] {
        seeds.add(&format!("held-{what}"), input("held", 200, &whole(&held)));
    }
    for kind in KINDS {
        seeds.add("empty", input(kind, 200, b""));
        seeds.add("cut", input(kind, 200, &whole(&grant())[..40]));
        seeds.add("deep", input(kind, 200, format!("{{\"id\":{}", "[".repeat(500)).as_bytes()));
        seeds.add("no-text", input(kind, 200, b"{\"id\":\"\xff\xfe\"}"));
    }
    seeds.add("nothing", Vec::new());
    seeds
}

fn problems(seeds: &mut Seeds) {
    let edge = |owner: &str, lock: &str, by: &str| json!({ "owner": owner, "waits_for": lock, "held_by": by });
    let holders = json!([{ "owner": "two", "mode": "exclusive", "held_for_ms": 12, "asked_by": "route" }]);
    let with = |slug: &str, status: u16, field: &str, value: Value| {
        let mut problem = refusal(slug, status);
        problem[field] = value;
        problem
    };
    let cycle = json!([edge(OWNER, "a/1", "two"), edge("two", "a/2", OWNER)]);
    let open = json!([edge(OWNER, "a/1", "two"), edge("two", "a/2", "three")]);
    for (what, status, problem) in [
        ("deadlock", 409, with("deadlock", 409, "cycle", cycle.clone())),
        ("no-deadlock", 409, with("deadlock", 409, "cycle", open)),
        ("empty-cycle", 409, with("deadlock", 409, "cycle", json!([]))),
        ("another-status", 200, with("deadlock", 409, "cycle", cycle)),
        ("order", 409, with("order-violation", 409, "held", json!("a/2"))),
        ("held", 423, with("lock-held", 423, "holders", holders.clone())),
        ("timeout", 423, with("wait-timeout", 423, "holders", holders)),
        ("holders-in-words", 423, with("lock-held", 423, "holders", json!("two"))),
        ("above", 423, with("lock-held", 423, "lock", json!("t/x"))),
        ("another-lock", 423, with("lock-held", 423, "lock", json!("b/1"))),
        ("another-owner", 423, with("lock-held", 423, "owner", json!("two"))),
        ("another-mode", 423, with("lock-held", 423, "mode", json!("sideways"))),
        ("waiters", 429, with("too-many-waiters", 429, "limit", json!({ "name": "waiters", "value": 100 }))),
        ("locks", 429, with("too-many-locks", 429, "limit", json!({ "name": "locks", "value": 1 }))),
        ("another-limit", 429, with("too-many-locks", 429, "limit", json!({ "name": "waiters", "value": 1 }))),
        ("over", 409, refusal("lease-lost", 409)),
        ("taken", 409, refusal("lease-id-taken", 409)),
        ("away", 503, with("backend-unavailable", 503, "grace", json!(true))),
        ("malformed", 400, with("malformed-annotation", 400, "detail", json!("d".repeat(5000)))),
        ("forbidden", 403, refusal("forbidden", 403)),
        ("unheard-of", 418, refusal("teapot", 418)),
        ("for-ever", 423, with("lock-held", 423, "retry_after_ms", json!(u64::MAX))),
        ("another-type", 409, json!({ "type": "about:blank" })),
    ] {
        seeds.add(&format!("problem-{what}"), input("problem", status, problem.to_string().as_bytes()));
    }
}
