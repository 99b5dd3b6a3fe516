//! What an authority writes is what a proxy reads; and nothing else.

use interlock_core::{Cause, Duration, Edge, Fence, Holder, Limit, LockName, Loss, Mode, OwnerId, Refusal};
use serde_json::{Value, json};

use super::told::*;
use crate::answer::Reject;

const ID: &str = "0123456789abcdef";

fn lock(name: &str) -> LockName {
    LockName::parse(name).unwrap()
}

fn owner(name: &str) -> OwnerId {
    OwnerId::new(name).unwrap()
}

fn asks<T>(read: impl FnOnce(&Question<'_>) -> T) -> T {
    let asked = |name, mode, floor| Asked { name: lock(name), mode, floor };
    let locks = [asked("order/1", Mode::Exclusive, Fence(5)), asked("stock/1/a", Mode::Shared, Fence(0))];
    read(&Question { id: ID, owner: &owner("one"), locks: &locks, ttl: Duration::from_secs(5) })
}

fn lease() -> Value {
    json!({
        "id": ID, "owner": "one", "ttl": "2s", "waited": "130ms", "receipt": "r", "more": [{}],
        // In the order in which they were taken, which is the authority's.
        "locks": [{ "name": "stock/1/a", "mode": "exclusive", "fence": 3 }, { "name": "order/1", "mode": "exclusive", "fence": 5 }],
    })
}

#[test]
fn a_grant_is_read_as_it_was_asked_for() {
    let read = asks(|question| granted(lease().to_string().as_bytes(), question)).unwrap();
    let locks = [(lock("order/1"), Mode::Exclusive, Fence(5)), (lock("stock/1/a"), Mode::Exclusive, Fence(3))];
    assert_eq!(read.locks, locks);
    assert_eq!((read.ttl, read.waited), (Duration::from_secs(2), Duration::from_millis(130)));
    assert_eq!(read.receipt.as_deref(), Some("r"));
    let mut bare = lease();
    bare["receipt"] = Value::Null;
    assert_eq!(asks(|question| granted(bare.to_string().as_bytes(), question)).unwrap().receipt, None);
    let mut fallen = lease();
    fallen["locks"][1]["fence"] = json!(4);
    let told = asks(|question| granted(fallen.to_string().as_bytes(), question));
    assert_eq!(told, Err(Unusable::Fence(lock("order/1"))));
    let padded = format!("{}{}", lease(), " ".repeat(MAX_ANSWER));
    assert_eq!(asks(|question| granted(padded.as_bytes(), question)), Err(Unusable::Malformed));
}

/// Every refusal of the core, written by an authority and read by a proxy, is itself again.
#[test]
fn a_refusal_is_passed_on_as_it_is() {
    let waited = Duration::from_millis(1500);
    let retry_after = Duration::from_millis(700);
    let holder = |mode| Holder {
        owner: owner("two"),
        mode,
        fence: Fence(0),
        held_for: Duration::from_millis(90),
        asked_by: String::from("spiffe://mesh/ns/pay/sa/api for \"capture\""),
    };
    let edge = |from, waits_for, to| Edge { owner: owner(from), waits_for: lock(waits_for), held_by: owner(to) };
    let mut causes = vec![
        Cause::Deadlock { cycle: vec![edge("one", "order/1", "two"), edge("two", "x", "one")] },
        Cause::Deadlock { cycle: vec![edge("one", "order/1", "one")] },
        Cause::OrderViolation { held: lock("zoo/9") },
        Cause::Held { holders: vec![holder(Mode::Shared), holder(Mode::Exclusive)], retry_after },
        Cause::Held { holders: Vec::new(), retry_after },
        Cause::WaitTimeout { holders: vec![holder(Mode::SharedIntentExclusive)], waited, retry_after },
    ];
    causes.extend(Limit::ALL.into_iter().map(|limit| Cause::Limit { limit, value: 64 }));
    for cause in causes {
        // The lock may be one that a hierarchy implies.
        for on in ["order/1", "stock/1"] {
            let refusal = Refusal { lock: lock(on), mode: Mode::Exclusive, owner: owner("one"), cause: cause.clone() };
            let reject = Reject::Core(refusal);
            let (status, body) = (u32::from(reject.http_status()), reject.problem_json());
            let read = asks(|question| problem(status, &body, question, waited));
            assert_eq!(read, Ok(Told::Refused(Box::new(reject))));
        }
    }
}

#[test]
fn problems_without_a_lease_are_told_apart() {
    let read = |reject: &Reject| {
        let (status, body) = (u32::from(reject.http_status()), reject.problem_json());
        asks(|question| problem(status, &body, question, Duration::ZERO)).unwrap()
    };
    let core = |cause| Reject::Core(Refusal { lock: lock("order/1"), mode: Mode::Shared, owner: owner("one"), cause });
    let left = Duration::from_secs(7);
    assert_eq!(read(&core(Cause::Grace { left })), Told::Away { retry_after: Some(left), grace: true });
    let away = Told::Away { retry_after: Some(Duration::from_secs(1)), grace: false };
    assert_eq!(read(&core(Cause::Backend { detail: String::from("x") })), away);
    assert_eq!(read(&core(Cause::LeaseLost { loss: Loss::Expired })), Told::Over);
    let forbidden = Reject::Forbidden {
        detail: String::from("spiffe://mesh/ns/shop/sa/web may not lock class order"),
        lock: Some(lock("order/1")),
        owner: Some(owner("one")),
    };
    assert_eq!(read(&forbidden), Told::Refused(Box::new(forbidden.clone())));
    let malformed = Reject::Malformed { detail: String::from("lock annotation: intent-shared needs a hierarchy") };
    assert_eq!(read(&malformed), Told::Refused(Box::new(malformed.clone())));
    // What people are told has an end.
    let long = Reject::Malformed { detail: "x".repeat(30_000) };
    assert_eq!(read(&long), Told::Refused(Box::new(Reject::Malformed { detail: "x".repeat(1000) })));
    // A problem of the API itself is no refusal.
    let body = br#"{"type":"urn:interlock:problem:malformed-request","title":"","status":400,"detail":"for: unknown"}"#;
    assert!(asks(|question| problem(400, body, question, Duration::ZERO)).is_err());
}

#[test]
fn renewals_and_releases() {
    let ttl = |id: &str| (id == ID).then_some(Duration::from_secs(5));
    let result = |status: &str, left: &str| {
        let body = json!({ "results": [{ "id": ID, "status": status, "expires_in": left }] });
        renewed(body.to_string().as_bytes(), ttl)
    };
    assert_eq!(result("renewed", "5s"), Ok(vec![(ID.to_owned(), Some(Duration::from_secs(5)))]));
    assert_eq!(result("lost", "0s"), Ok(vec![(ID.to_owned(), None)]));
    assert_eq!(result("renewed", "5001ms"), Err(Unusable::Mismatch("another ttl")));
    assert_eq!(result("renewed", "soon"), Err(Unusable::Malformed));
    assert_eq!(renewed(br#"{"results":[{"id":"x","status":"lost"}]}"#, ttl), Err(Unusable::Mismatch("another lease")));
    for status in ["released", "cancelled", "expired", "unknown"] {
        assert_eq!(deleted(json!({ "status": status }).to_string().as_bytes()), Ok(()));
    }
    for body in ["", "{}", "[]", r#"{"status":"gone"}"#, r#"{"status":7}"#] {
        assert_eq!(deleted(body.as_bytes()), Err(Unusable::Malformed), "{body}");
    }
}

#[test]
fn who_holds_a_lock_is_read_and_nothing_else_is_believed() {
    let lock = LockName::parse("a/1").unwrap();
    let whole = br#"{"name":"a/1","holders":[{"owner":"one","mode":"shared","fence":7,"more":1}],"waiters":[],"grace":"1500ms"}"#;
    let one = (OwnerId::new("one").unwrap(), Fence(7));
    assert_eq!(held(whole, &lock), Ok(Held { holders: vec![one], grace: Some(Duration::from_millis(1500)) }));
    assert_eq!(held(br#"{"name":"a/1","holders":[]}"#, &lock), Ok(Held { holders: Vec::new(), grace: None }));
    assert_eq!(held(br#"{"name":"a/2","holders":[]}"#, &lock), Err(Unusable::Mismatch("another lock")));
    for wrong in [
        r#"{"holders":[]}"#,
        r#"{"name":"a/1"}"#,
        r#"{"name":"a/1","holders":{}}"#,
        r#"{"name":"a/1","holders":["one"]}"#,
        r#"{"name":"a/1","holders":[{"owner":"one"}]}"#,
        r#"{"name":"a/1","holders":[{"owner":"one","fence":-1}]}"#,
        r#"{"name":"a/1","holders":[{"owner":"","fence":1}]}"#,
        r#"{"name":"a/1","holders":[],"grace":7}"#,
        r#"{"name":"a/1","holders":[]"#,
    ] {
        assert_eq!(held(wrong.as_bytes(), &lock), Err(Unusable::Malformed), "{wrong}");
    }
}
