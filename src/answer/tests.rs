//! Every refusal: its statuses, its words, its body.

use interlock_core::Fence;
use serde_json::{Value, json};

use super::*;

fn name(text: &str) -> LockName {
    LockName::parse(text).unwrap()
}

fn owner(text: &str) -> OwnerId {
    OwnerId::new(text).unwrap()
}

fn core(cause: Cause) -> Reject {
    Reject::Core(Refusal { lock: name("stock/7"), mode: Mode::Exclusive, owner: owner("A"), cause })
}

fn edge(from: &str, lock: &str, to: &str) -> Edge {
    Edge { owner: owner(from), waits_for: name(lock), held_by: owner(to) }
}

fn holder(who: &str) -> Holder {
    Holder {
        owner: owner(who),
        mode: Mode::Shared,
        fence: Fence(7),
        held_for: Duration::from_millis(1200),
        asked_by: "capture".into(),
    }
}

fn held(millis: u64) -> Reject {
    core(Cause::Held { holders: vec![holder("B")], retry_after: Duration::from_millis(millis) })
}

fn limit(limit: Limit) -> Reject {
    core(Cause::Limit { limit, value: 16 })
}

fn body(reject: &Reject) -> Value {
    serde_json::from_slice(&reject.problem_json()).unwrap()
}

#[test]
fn every_slug_has_the_statuses_of_the_contract() {
    let timeout = Cause::WaitTimeout {
        holders: vec![],
        waited: Duration::from_secs(2),
        retry_after: Duration::from_millis(4001),
    };
    let table = [
        (Reject::Malformed { detail: "x".into() }, "malformed-annotation", 400, 3, None),
        (Reject::OwnerMissing { sources: vec![OwnerSource::Traceparent] }, "malformed-annotation", 400, 3, None),
        (Reject::Forbidden { detail: "x".into(), lock: None, owner: None }, "forbidden", 403, 7, None),
        (core(Cause::Deadlock { cycle: vec![] }), "deadlock", 409, 10, None),
        (core(Cause::OrderViolation { held: name("a") }), "order-violation", 409, 10, None),
        (core(Cause::LeaseLost { loss: Loss::Expired }), "lease-lost", 409, 10, None),
        (held(0), "lock-held", 423, 10, Some(1)),
        (held(1000), "lock-held", 423, 10, Some(1)),
        (core(timeout), "wait-timeout", 423, 10, Some(5)),
        (limit(Limit::WaitersPerLock), "too-many-waiters", 429, 8, Some(1)),
        (limit(Limit::Waiters), "too-many-waiters", 429, 8, Some(1)),
        (limit(Limit::WaitChain), "too-many-waiters", 429, 8, Some(1)),
        (limit(Limit::LocksPerRequest), "too-many-locks", 429, 8, Some(1)),
        (limit(Limit::LocksPerOwner), "too-many-locks", 429, 8, Some(1)),
        (limit(Limit::Locks), "too-many-locks", 429, 8, Some(1)),
        (core(Cause::Backend { detail: "x".into() }), "backend-unavailable", 503, 14, Some(1)),
    ];
    for (reject, slug, http, grpc, retry) in table {
        assert_eq!(reject.slug(), slug);
        assert_eq!(reject.http_status(), http, "{slug}");
        assert_eq!(reject.grpc_status(), grpc, "{slug}");
        assert_eq!(reject.retry_after_seconds(), retry, "{slug}");
        let body = body(&reject);
        assert_eq!(body["type"], format!("urn:interlock:problem:{slug}"));
        assert_eq!(body["status"], http);
        assert_eq!(body["title"], reject.title());
        assert_eq!(body["detail"], reject.detail());
        assert_eq!(body.get("retry_after_ms").is_some(), reject.retry_after().is_some());
    }
}

#[test]
fn a_deadlock_spells_its_cycle() {
    let cycle = vec![edge("A", "stock/7", "B"), edge("B", "order/42", "A")];
    let reject = core(Cause::Deadlock { cycle });
    assert_eq!(
        body(&reject),
        json!({
            "type": "urn:interlock:problem:deadlock",
            "title": "Waiting would deadlock",
            "status": 409,
            "detail": "waiting for stock/7 would close a cycle: A waits for stock/7 held by B, B waits for order/42 held by A",
            "lock": "stock/7",
            "mode": "exclusive",
            "owner": "A",
            "cycle": [
                { "owner": "A", "waits_for": "stock/7", "held_by": "B" },
                { "owner": "B", "waits_for": "order/42", "held_by": "A" }
            ]
        })
    );
}

#[test]
fn a_long_cycle_is_cut_in_words_and_whole_in_the_body() {
    let cycle: Vec<_> = (0..40).map(|n| edge(&format!("t{n}"), "a/1", &format!("t{}", (n + 1) % 40))).collect();
    let reject = core(Cause::Deadlock { cycle });
    assert!(reject.detail().ends_with("t7 waits for a/1 held by t8, and 32 more up to t0"), "{}", reject.detail());
    assert_eq!(body(&reject)["cycle"].as_array().unwrap().len(), 40);
}

#[test]
fn a_held_lock_names_its_holders() {
    let body = body(&held(1500));
    assert_eq!(body["detail"], "stock/7 is taken by B in shared mode and the request does not wait");
    assert_eq!(body["retry_after_ms"], 1500);
    let holder = json!({ "owner": "B", "mode": "shared", "held_for_ms": 1200, "asked_by": "capture" });
    assert_eq!(body["holders"], json!([holder]));
}

#[test]
fn every_cause_has_its_words() {
    let holders = vec![holder("B"), holder("C"), holder("D")];
    let retry_after = Duration::ZERO;
    for (reject, detail) in [
        (
            core(Cause::WaitTimeout { holders, waited: Duration::from_millis(2500), retry_after }),
            "waited 2.5 s for stock/7, which is taken by B in shared mode and 2 others",
        ),
        (
            core(Cause::Held { holders: vec![], retry_after }),
            "stock/7 is taken (no holder conflicts with exclusive mode: earlier requests wait) and the request does not wait",
        ),
        (
            core(Cause::OrderViolation { held: name("stock/9") }),
            "A asks for stock/7 and already holds stock/9, which does not come before it in the lock order; take locks in rising order",
        ),
        (limit(Limit::LocksPerRequest), "stock/7: a request may ask for at most 16 locks (locks_per_request)"),
        (limit(Limit::WaitersPerLock), "stock/7: one lock may have at most 16 waiters (waiters_per_lock)"),
        (
            core(Cause::Limit { limit: Limit::LocksPerOwner, value: 1 }),
            "stock/7: an owner may hold or wait for at most 1 lock (locks_per_owner)",
        ),
        (
            core(Cause::LeaseLost { loss: Loss::HoldLimit }),
            "A held stock/7 for as long as a lease may be renewed (hold)",
        ),
        (core(Cause::LeaseLost { loss: Loss::Expired }), "the lease of A on stock/7 was not renewed within its ttl"),
        (core(Cause::Backend { detail: "no room".into() }), "stock/7: no room"),
        (
            Reject::OwnerMissing { sources: vec![OwnerSource::Traceparent, OwnerSource::RequestId] },
            "a lock needs an owner, and the request has no usable traceparent or x-request-id",
        ),
    ] {
        assert_eq!(reject.detail(), detail);
    }
}

#[test]
fn details_are_fit_for_a_header() {
    let refusal = Refusal {
        lock: name("a/%2F"),
        mode: Mode::Shared,
        owner: owner("\u{fc}\r\nx"),
        cause: Cause::LeaseLost { loss: Loss::Expired },
    };
    let reject = Reject::from(refusal);
    assert_eq!(reject.detail(), "the lease of %C3%BC%0D%0Ax on a/%2F was not renewed within its ttl");
    assert_eq!(reject.grpc_message(), "the lease of %25C3%25BC%250D%250Ax on a/%252F was not renewed within its ttl");
    assert_eq!(body(&reject)["owner"], "\u{fc}\r\nx");
}

#[test]
fn errors_of_reading_become_malformed() {
    let error = crate::annotation::parse_lock_header([&b"a b"[..]]).unwrap_err();
    let reject = Reject::from(error);
    assert_eq!(reject.http_status(), 400);
    assert_eq!(reject.detail(), "lock annotation: member 1: trailing characters after member at index 2");
    assert_eq!(body(&reject).get("lock"), None);
}
