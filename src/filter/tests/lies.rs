//! An authority that is broken, or lies: no sidecar comes to harm, nothing is granted, and it is counted.

use serde_json::{Value, json};

use super::link::{Link, asking};
use super::{millis, secs};
use crate::host::fake::{CallAnswer, SentCall};

/// What is wrong with an answer, and how it comes to be.
type Lie<'a> = (&'a str, &'a dyn Fn(&mut Value));

/// An answer that is none.
type Odd<'a> = (&'a str, &'a dyn Fn(&SentCall) -> CallAnswer);

/// The true answer to a request for `a/1` by `one`.
fn truth(put: &SentCall) -> Value {
    let id = put.target().1.rsplit('/').next().unwrap();
    json!({
        "id": id, "owner": "one", "locks": [{ "name": "a/1", "mode": "exclusive", "fence": 179_000_000_000_000_u64 }],
        "ttl": "5s", "waited": "0s", "receipt": "r",
    })
}

fn problem(answer: &Value) -> CallAnswer {
    let status = u32::try_from(answer["status"].as_u64().unwrap()).unwrap();
    CallAnswer::new(status, answer.to_string().as_bytes()).with("content-type", "application/problem+json")
}

fn errors(link: &Link) -> i64 {
    let metrics = link.proxy.fake.metrics();
    metrics.iter().filter(|(name, _)| name.starts_with("interlock_backend_error_total")).map(|(_, count)| count).sum()
}

/// Answers the request for `a/1` by `one` so, as often as it is asked, and asserts that it is refused for that.
fn believes_nothing(what: &str, answer: &dyn Fn(&SentCall) -> CallAnswer) {
    let link = Link::new(1, &asking());
    let vm = link.proxy.vm(1);
    let before = errors(&link);
    let call = link.proxy.lock(1, "one", "a/1;wait=1");
    let end = link.proxy.now() + secs(2);
    while !link.proxy.has_ended(call) {
        for (_, sent) in link.calls().into_iter().filter(|(_, sent)| sent.target().0 == "PUT") {
            vm.call_answer(sent.token, answer(&sent));
        }
        assert!(link.proxy.has_ended(call) || link.proxy.step(end), "{what}: it hangs");
        assert!(!link.proxy.has_ended(call) || !link.proxy.ended(call).forwarded, "{what}: granted");
    }
    let (status, told) = link.proxy.answer(call);
    assert_eq!((status, &told["type"]), (503, &json!("urn:interlock:problem:backend-unavailable")), "{what}");
    assert!(errors(&link) > before, "{what}: counted");
    // What may have been granted is given back.
    link.proxy.deliver();
    assert!(link.calls().iter().any(|(_, sent)| sent.target().0 == "DELETE"), "{what}");
    // The next request is served as if nothing had been.
    let next = link.proxy.lock(1, "two", "a/1");
    link.deliver();
    assert!(link.proxy.is_upstream(next), "{what}");
    link.proxy.complete(next);
    link.assert_rest();
}

#[test]
fn a_grant_of_something_else_is_none() {
    let lies: &[Lie<'_>] = &[
        ("another lease", &|lease| lease["id"] = json!("0123456789abcdef0123456789abcdef")),
        ("another owner", &|lease| lease["owner"] = json!("two")),
        ("another lock", &|lease| lease["locks"][0]["name"] = json!("a/2")),
        ("no lock", &|lease| lease["locks"] = json!([])),
        ("a lock more", &|lease| {
            let lock = lease["locks"][0].clone();
            lease["locks"].as_array_mut().unwrap().push(lock);
        }),
        ("another mode", &|lease| lease["locks"][0]["mode"] = json!("shared")),
        ("no mode", &|lease| lease["locks"][0]["mode"] = json!("exlusive")),
        ("fence 0", &|lease| lease["locks"][0]["fence"] = json!(0)),
        ("a fence of 16 digits", &|lease| lease["locks"][0]["fence"] = json!(1_000_000_000_000_000_u64)),
        ("a negative fence", &|lease| lease["locks"][0]["fence"] = json!(-1)),
        ("half a fence", &|lease| lease["locks"][0]["fence"] = json!(1.5)),
        ("a fence in words", &|lease| lease["locks"][0]["fence"] = json!("179000000000000")),
        ("no fence", &|lease| drop(lease["locks"][0].as_object_mut().unwrap().remove("fence"))),
        ("a long ttl", &|lease| lease["ttl"] = json!("24h")),
        ("a ttl without end", &|lease| lease["ttl"] = json!("99999999999999999999h")),
        ("a negative ttl", &|lease| lease["ttl"] = json!("-1s")),
        ("no ttl", &|lease| lease["ttl"] = json!("0s")),
        ("a negative wait", &|lease| lease["waited"] = json!("-5s")),
        ("a wait in numbers", &|lease| lease["waited"] = json!(5)),
        ("a huge receipt", &|lease| lease["receipt"] = json!("r".repeat(40_000))),
        ("a receipt that is none", &|lease| lease["receipt"] = json!({})),
        ("a list", &|lease| *lease = json!([lease.clone()])),
    ];
    for (what, lie) in lies {
        believes_nothing(what, &|put| {
            let mut lease = truth(put);
            lie(&mut lease);
            CallAnswer::new(201, lease.to_string().as_bytes())
        });
    }
}

#[test]
fn an_answer_that_is_none_is_none() {
    let whole = |put: &SentCall| truth(put).to_string().into_bytes();
    let odd: &[Odd<'_>] = &[
        ("cut", &|put| CallAnswer::new(201, &whole(put)[..40])),
        ("no body", &|_| CallAnswer::new(201, b"")),
        ("no text", &|_| CallAnswer::new(200, b"\xff\xfe\x00")),
        ("huge", &|put| {
            let mut lease = truth(put);
            lease["more"] = json!("x".repeat(2_000_000));
            CallAnswer::new(201, lease.to_string().as_bytes())
        }),
        ("deep", &|_| CallAnswer::new(201, format!("{{\"id\":{}", "[".repeat(60_000)).as_bytes())),
        ("early", &|put| CallAnswer::new(103, &whole(put))),
        ("moved", &|put| CallAnswer::new(307, &whole(put)).with("location", "http://evil/")),
        ("not found", &|put| CallAnswer::new(404, &whole(put))),
        ("no content", &|_| CallAnswer::new(204, b"")),
        ("no status", &|put| CallAnswer { headers: Some(vec![(String::from("x"), b"y".to_vec())]), body: whole(put) }),
        ("a status in words", &|put| CallAnswer {
            headers: Some(vec![(String::from(":status"), b"fine".to_vec())]),
            body: whole(put),
        }),
        ("a status without end", &|put| CallAnswer {
            headers: Some(vec![(String::from(":status"), vec![b'9'; 400])]),
            body: whole(put),
        }),
        ("overloaded", &|_| CallAnswer::new(429, b"slow down").with("retry-after", "-1")),
    ];
    for (what, answer) in odd {
        believes_nothing(what, answer);
    }
}

#[test]
fn a_refusal_of_something_else_is_none() {
    let deadlock = || {
        json!({
            "type": "urn:interlock:problem:deadlock", "status": 409, "lock": "a/1", "mode": "exclusive", "owner": "one",
            "cycle": [
                { "owner": "one", "waits_for": "a/1", "held_by": "two" },
                { "owner": "two", "waits_for": "b/1", "held_by": "one" },
            ],
        })
    };
    let lies: &[Lie<'_>] = &[
        ("another lock", &|told| told["lock"] = json!("a/2")),
        ("another owner", &|told| told["owner"] = json!("two")),
        ("another status", &|told| told["status"] = json!(423)),
        ("no cycle", &|told| told["cycle"] = json!([])),
        ("a cycle that does not close", &|told| told["cycle"][1]["held_by"] = json!("three")),
        ("a cycle that breaks", &|told| told["cycle"][0]["held_by"] = json!("three")),
        ("a cycle of another", &|told| {
            told["cycle"].as_array_mut().unwrap().remove(0);
        }),
        ("a cycle of no owners", &|told| told["cycle"][0]["owner"] = json!("")),
        ("a cycle of no locks", &|told| told["cycle"][0]["waits_for"] = json!("a//")),
        ("another slug", &|told| told["type"] = json!("urn:interlock:problem:not-holder")),
        ("somebody else's problem", &|told| told["type"] = json!("about:blank")),
        ("a limit that is none", &|told| {
            told["type"] = json!("urn:interlock:problem:too-many-locks");
            told["status"] = json!(429);
            told["limit"] = json!({ "name": "patience", "value": 1 });
        }),
        ("another limit", &|told| {
            told["type"] = json!("urn:interlock:problem:too-many-locks");
            told["status"] = json!(429);
            told["limit"] = json!({ "name": "waiters", "value": 1 });
        }),
        ("no holders", &|told| {
            told["type"] = json!("urn:interlock:problem:lock-held");
            told["status"] = json!(423);
            told["holders"] = json!([{ "owner": 7 }]);
        }),
    ];
    for (what, lie) in lies {
        let mut told = deadlock();
        lie(&mut told);
        believes_nothing(what, &|_| problem(&told));
    }
    // A refusal in a success, and a grant in a refusal.
    believes_nothing("a problem with 201", &|_| CallAnswer::new(201, deadlock().to_string().as_bytes()));
    believes_nothing("a grant with 409", &|put| {
        CallAnswer::new(409, truth(put).to_string().as_bytes()).with("content-type", "application/problem+json")
    });
}

#[test]
fn a_fence_that_has_fallen_is_believed_of_no_exclusive_lock() {
    let link = Link::new(1, &asking());
    let vm = link.proxy.vm(1);
    let grant = |owner: &str, locks: &str, fence: u64| {
        let call = link.proxy.lock(1, owner, locks);
        let (_, put) = link.call();
        let mut lease = truth(&put);
        lease["owner"] = json!(owner);
        lease["locks"][0]["fence"] = json!(fence);
        let body: Value = serde_json::from_slice(&put.body).unwrap();
        lease["locks"][0]["mode"] = body["locks"][0]["mode"].clone();
        vm.call_answer(put.token, CallAnswer::new(201, lease.to_string().as_bytes()));
        call
    };
    let high = grant("one", "a/1;ttl=60;hold=600", 179_000_000_000_500);
    assert!(link.proxy.is_upstream(high));
    let low = grant("two", "a/1", 179_000_000_000_499);
    let (status, told) = link.proxy.answer(low);
    assert_eq!(status, 503);
    assert_eq!(told["detail"], "a/1: the lock authority granted a/1 under a fence that has fallen");
    assert_eq!(link.proxy.fake.metric("interlock_backend_error_total.reason.fence"), 1);
    // The owner enters its lock again under the fence that it has, and those that share a lock may be told in any order.
    let again = grant("one", "a/1", 179_000_000_000_500);
    let shares = grant("three", "a/1;mode=shared", 179_000_000_000_400);
    for call in [again, shares, high] {
        assert!(link.proxy.is_upstream(call));
        link.proxy.complete(call);
    }
    link.assert_rest();
}

#[test]
fn a_renewal_that_is_answered_with_nonsense_is_none() {
    let answers: [fn(&str) -> Value; 6] = [
        |_| json!({ "results": [] }),
        |id| json!({ "results": [{ "id": id, "status": "renewed", "expires_in": "24h" }] }),
        |id| json!({ "results": [{ "id": id, "status": "fine" }] }),
        |_| json!({ "results": [{ "id": "0123456789abcdef0123456789abcdef", "status": "renewed", "expires_in": "1s" }] }),
        |_| json!({ "results": "all" }),
        |_| json!([]),
    ];
    for answer in answers {
        let link = Link::new(1, &asking());
        let call = link.proxy.lock(1, "one", "a/1;ttl=1;hold=60");
        let (_, put) = link.call();
        let id = put.target().1.rsplit('/').next().unwrap().to_owned();
        link.deliver();
        let end = link.proxy.now() + secs(2);
        while !link.proxy.has_ended(call) {
            for (vm, sent) in link.calls() {
                let body = answer(&id).to_string();
                link.proxy.vm(vm).call_answer(sent.token, CallAnswer::new(200, body.as_bytes()));
            }
            assert!(link.proxy.step(end), "believed");
        }
        assert_eq!(link.proxy.answer(call).0, 409, "it ends by its ttl");
        link.run(millis(100));
        link.assert_rest();
    }
}
