//! The lease API, as its callers see it: over several VMs, restarts and every way in which a request can be wrong.

use serde_json::{Value, json};

use super::proxy::{Call, Proxy};
use super::{TABLE, millis, secs};

/// Any lease id.
fn id(n: u32) -> String {
    format!("lease-of-a-test-{n}")
}

fn policy() -> Value {
    json!({
        "instance": "t",
        "classes": [
            { "name": "a" }, { "name": "b" },
            { "name": "vault", "principals": ["spiffe://mesh/ns/pay/*"] },
        ],
        "limits": { "max_ttl": "10s", "locks_per_request": 2 },
        "keys": [{ "id": "k", "secret": { "env": "INTERLOCK_KEY" } }],
        "api": { "admin": {
            "principals": ["spiffe://mesh/ns/ops/*"],
            "token": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" },
        } },
    })
}

/// VMs of an authority whose grace is over.
fn serving(vms: usize) -> Proxy {
    let proxy = Proxy::new(vms, &policy());
    proxy.run(secs(11));
    proxy
}

fn body(owner: &str, lock: &str) -> Value {
    json!({ "owner": owner, "locks": [{ "name": lock }], "wait": "2s", "ttl": "5s" })
}

fn put(proxy: &Proxy, vm: usize, n: u32, body: &Value) -> Call {
    proxy.api(vm, "PUT", &format!("leases/{}", id(n)), Some(body))
}

fn renew(proxy: &Proxy, vm: usize, n: u32, receipt: Option<&Value>) -> Value {
    let mut lease = json!({ "id": id(n) });
    if let Some(receipt) = receipt {
        lease["receipt"] = receipt.clone();
    }
    let call = proxy.api(vm, "POST", "leases/renew", Some(&json!({ "leases": [lease] })));
    let (status, answer) = proxy.answer(call);
    assert_eq!(status, 200);
    answer["results"][0].clone()
}

fn delete(proxy: &Proxy, vm: usize, n: u32) -> Value {
    let (status, answer) = proxy.answer(proxy.api(vm, "DELETE", &format!("leases/{}", id(n)), None));
    assert_eq!(status, 200);
    answer["status"].clone()
}

fn get(proxy: &Proxy, path: &str) -> (u32, Value) {
    proxy.answer(proxy.api(0, "GET", path, None))
}

#[test]
fn a_lease_lives_over_several_requests_and_workers() {
    let proxy = serving(2);
    let asked =
        json!({ "owner": "tx", "locks": [{ "name": "b/1", "mode": "shared" }, { "name": "a/1" }], "ttl": "5s" });
    let (status, lease) = proxy.answer(put(&proxy, 0, 1, &asked));
    assert_eq!(status, 201);
    assert_eq!(
        (&lease["id"], &lease["owner"], &lease["ttl"], &lease["waited"]),
        (&json!(id(1)), &json!("tx"), &json!("5s"), &json!("0s"))
    );
    let names: Vec<_> = lease["locks"].as_array().unwrap().iter().map(|lock| (&lock["name"], &lock["mode"])).collect();
    assert_eq!(names, [(&json!("a/1"), &json!("exclusive")), (&json!("b/1"), &json!("shared"))]);
    assert!(lease["locks"][0]["fence"].as_u64().unwrap() > 0 && lease["receipt"].is_string());

    let (status, again) = proxy.answer(put(&proxy, 1, 1, &asked));
    assert_eq!((status, &again["locks"]), (200, &lease["locks"]));
    assert_eq!(get(&proxy, &format!("leases/{}", id(1))).1["locks"], lease["locks"]);
    for _ in 0..5 {
        proxy.run(secs(3));
        assert_eq!(renew(&proxy, 1, 1, None), json!({ "id": id(1), "status": "renewed", "expires_in": "5s" }));
    }
    // A request of the same transaction re-enters, one of another waits.
    let inner = proxy.lock(1, "tx", "a/1;wait=0");
    assert!(proxy.is_upstream(inner));
    proxy.complete(inner);
    let other = proxy.lock(0, "other", "a/1;wait=0");
    assert_eq!(proxy.status(other), "t;outcome=refused;reason=lock-held;lock=\"a/1\"");
    assert_eq!(delete(&proxy, 1, 1), "released");
    assert_eq!(delete(&proxy, 0, 1), "released", "and again");
    assert_eq!(get(&proxy, &format!("leases/{}", id(1))).0, 404);
    assert_eq!(renew(&proxy, 0, 1, None)["status"], "lost");
    proxy.assert_rest(TABLE);
}

#[test]
fn a_request_for_a_lease_parks_until_its_turn() {
    let proxy = serving(2);
    assert_eq!(proxy.answer(put(&proxy, 0, 1, &body("one", "a/1"))).0, 201);
    let waiter = put(&proxy, 1, 2, &body("two", "a/1"));
    assert!(proxy.is_parked(waiter));
    proxy.run(millis(300));
    assert_eq!(delete(&proxy, 0, 1), "released");
    proxy.deliver();
    let (status, lease) = proxy.answer(waiter);
    assert_eq!((status, &lease["waited"]), (201, &json!("300ms")));
    // And a parked request of the proxy's own is woken by a release over the API, and the other way round.
    let upstream = proxy.lock(0, "three", "a/1;wait=5");
    assert!(proxy.is_parked(upstream));
    assert_eq!(delete(&proxy, 0, 2), "released");
    proxy.deliver();
    assert!(proxy.is_upstream(upstream));
    let last = put(&proxy, 1, 4, &body("four", "a/1"));
    proxy.complete(upstream);
    proxy.deliver();
    assert_eq!(proxy.answer(last).0, 201);
    assert_eq!(delete(&proxy, 0, 4), "released");
    proxy.assert_rest(TABLE);
}

#[test]
fn a_wait_that_runs_out_and_a_deadlock_are_problems() {
    let proxy = serving(2);
    assert_eq!(proxy.answer(put(&proxy, 0, 1, &body("one", "a/1"))).0, 201);
    assert_eq!(proxy.answer(put(&proxy, 1, 2, &body("two", "b/1"))).0, 201);
    let parked = put(&proxy, 0, 3, &body("one", "b/1"));
    let (status, problem) = proxy.answer(put(&proxy, 1, 4, &body("two", "a/1")));
    assert_eq!((status, &problem["type"]), (409, &json!("urn:interlock:problem:deadlock")));
    assert_eq!(problem["cycle"].as_array().unwrap().len(), 2);
    let (_, told) = get(&proxy, "deadlocks");
    let told = &told["deadlocks"];
    assert_eq!(
        (told.as_array().unwrap().len(), &told[0]["reason"], &told[0]["owner"]),
        (1, &json!("deadlock"), &json!("two"))
    );
    assert_eq!(told[0]["cycle"], problem["cycle"]);
    proxy.until("the wait ends", secs(3), || proxy.has_ended(parked));
    let (status, problem) = proxy.answer(parked);
    assert_eq!((status, &problem["type"]), (423, &json!("urn:interlock:problem:wait-timeout")));
    assert_eq!(proxy.fake.histogram("interlock_wait_ms.class.b").last(), Some(&2000), "its wait is counted");
    assert!(proxy.ended(parked).header("retry-after").is_some());
    for n in [1, 2] {
        assert_eq!(delete(&proxy, 0, n), "released");
    }
    proxy.assert_rest(TABLE);
}

#[test]
fn a_release_that_overtakes_its_request_and_a_caller_that_leaves() {
    let proxy = serving(2);
    assert_eq!(delete(&proxy, 0, 1), "unknown");
    let (status, problem) = proxy.answer(put(&proxy, 1, 1, &body("one", "a/1")));
    assert_eq!((status, &problem["type"]), (409, &json!("urn:interlock:problem:lease-lost")));

    assert_eq!(proxy.answer(put(&proxy, 0, 2, &body("two", "a/1"))).0, 201);
    let parked = put(&proxy, 0, 3, &body("three", "a/1"));
    assert_eq!(delete(&proxy, 1, 3), "cancelled");
    proxy.deliver();
    assert_eq!(proxy.answer(parked).0, 409);
    let parked = put(&proxy, 1, 4, &body("four", "a/1"));
    proxy.end(parked);
    assert_eq!(proxy.entries(TABLE, "a/1").len(), 1, "who has gone waits no more");
    assert_eq!(delete(&proxy, 0, 2), "released");
    proxy.assert_rest(TABLE);
}

#[test]
fn a_restart_grants_nothing_until_leases_have_come_back() {
    let proxy = serving(1);
    let (_, lease) = proxy.answer(put(&proxy, 0, 1, &body("one", "a/1")));
    // Another process: nothing is left but the wall clock.
    let next = Proxy::new(2, &policy());
    next.run(millis(300));
    let (status, health) = get(&next, "health");
    assert_eq!((status, &health["type"]), (503, &json!("urn:interlock:problem:backend-unavailable")));
    let call = put(&next, 0, 2, &body("two", "b/1"));
    assert_eq!(next.answer(call).0, 503);
    assert_eq!(next.ended(call).header("retry-after").as_deref(), Some("10"));
    let refused = next.lock(1, "three", "b/1");
    assert_eq!(next.status(refused), "t;outcome=refused;reason=backend-unavailable;lock=\"b/1\"");

    let forged = json!("AAAA");
    assert_eq!(renew(&next, 1, 1, Some(&forged))["status"], "lost");
    assert_eq!(renew(&next, 1, 1, Some(&lease["receipt"]))["status"], "renewed");
    assert_eq!(get(&next, &format!("leases/{}", id(1))).1["locks"], lease["locks"]);
    // A receipt is worth nothing for another lease.
    assert_eq!(renew(&next, 1, 5, Some(&lease["receipt"]))["status"], "lost");
    for _ in 0..4 {
        next.run(secs(3));
        assert_eq!(renew(&next, 0, 1, Some(&lease["receipt"]))["status"], "renewed");
    }
    assert_eq!(get(&next, "health"), (200, json!({ "status": "ok", "instance": "t" })));
    let waits = put(&next, 0, 6, &body("two", "a/1"));
    assert_eq!(delete(&next, 0, 1), "released");
    next.deliver();
    let (status, after) = next.answer(waits);
    assert_eq!(status, 201);
    assert!(after["locks"][0]["fence"].as_u64() > lease["locks"][0]["fence"].as_u64());
    assert_eq!(delete(&next, 0, 6), "released");
    next.assert_rest(TABLE);
}

#[test]
fn a_lease_can_be_asserted_again_by_its_receipt() {
    let proxy = serving(1);
    let (_, lease) = proxy.answer(put(&proxy, 0, 1, &body("one", "a/1")));
    let next = Proxy::new(1, &policy());
    next.run(millis(300));
    let mut again = body("one", "a/1");
    again["receipt"] = lease["receipt"].clone();
    let (status, answer) = next.answer(put(&next, 0, 1, &again));
    assert_eq!((status, &answer["locks"]), (200, &lease["locks"]));
    again["receipt"] = json!("nonsense");
    assert_eq!(next.answer(put(&next, 0, 2, &again)).0, 400);
    assert_eq!(delete(&next, 0, 1), "released");
    next.assert_rest(TABLE);
}

#[test]
fn an_unrenewed_lease_ends_and_the_next_gets_it_without_asking() {
    let proxy = serving(2);
    let short = json!({ "owner": "one", "locks": [{ "name": "a/1" }], "ttl": "1s" });
    assert_eq!(proxy.answer(put(&proxy, 0, 1, &short)).0, 201);
    let start = proxy.now();
    let waiter = put(&proxy, 1, 2, &json!({ "owner": "two", "locks": [{ "name": "a/1" }], "wait": "5s", "ttl": "5s" }));
    proxy.until("it is granted", secs(2), || proxy.has_ended(waiter));
    let took = proxy.now().since(start);
    assert!(took >= secs(1) && took <= millis(1002), "{took:?}");
    assert_eq!(proxy.answer(waiter).0, 201);
    assert_eq!(delete(&proxy, 0, 1), "expired");
    assert_eq!(delete(&proxy, 0, 2), "released");
    proxy.assert_rest(TABLE);
}

#[test]
fn a_dead_worker_takes_its_parked_requests_with_it_and_no_leases() {
    let proxy = serving(2);
    assert_eq!(proxy.answer(put(&proxy, 0, 1, &body("one", "a/1"))).0, 201);
    put(&proxy, 0, 2, &json!({ "owner": "two", "locks": [{ "name": "a/1" }], "wait": "20s", "ttl": "5s" }));
    proxy.kill(0);
    proxy.run(secs(4));
    assert_eq!(renew(&proxy, 1, 1, None)["status"], "renewed");
    assert_eq!(proxy.entries(TABLE, "a/1").len(), 1);
    assert_eq!(delete(&proxy, 1, 1), "released");
    proxy.run(secs(20));
    proxy.assert_rest(TABLE);
}

#[test]
fn people_see_who_holds_and_who_waits_and_no_lease() {
    let proxy = serving(2);
    assert_eq!(proxy.answer(put(&proxy, 0, 1, &body("one", "a/1"))).0, 201);
    let upstream = proxy.lock(0, "two", "b/1");
    let waits = proxy.lock(1, "two", "a/1;wait=20");
    let behind = put(&proxy, 1, 3, &json!({ "owner": "three", "locks": [{ "name": "a/1" }], "wait": "20s" }));
    proxy.run(millis(500));
    let (_, lock) = get(&proxy, "locks/a/1");
    assert_eq!(lock["holders"][0]["owner"], "one");
    assert_eq!((&lock["holders"][0]["age"], &lock["holders"][0]["asked_by"]), (&json!("500ms"), &json!("lease api")));
    let waiters = lock["waiters"].as_array().unwrap();
    let told: Vec<_> = waiters.iter().map(|waiter| (&waiter["owner"], &waiter["position"])).collect();
    assert_eq!(told, [(&json!("two"), &json!(1)), (&json!("three"), &json!(2))]);
    let (_, locks) = get(&proxy, "locks");
    let names: Vec<_> = locks["locks"].as_array().unwrap().iter().map(|lock| lock["name"].as_str().unwrap()).collect();
    assert_eq!(names.len(), 2);
    assert!(!locks.to_string().contains(&id(1)), "ids are capabilities");
    // Page by page it is the same.
    let (mut seen, mut page) = (Vec::new(), json!(0));
    while !page.is_null() {
        let (_, part) = get(&proxy, &format!("locks?limit=1&page={page}"));
        seen.extend(part["locks"].as_array().unwrap().iter().map(|lock| lock["name"].as_str().unwrap().to_owned()));
        page = part["next"].clone();
    }
    assert_eq!(seen, names);
    let (_, graph) = get(&proxy, "graph");
    let edge = |owner: &str, held_by: &str| json!({ "owner": owner, "waits_for": "a/1", "held_by": held_by });
    assert_eq!(graph["edges"], json!([edge("two", "one"), edge("three", "one"), edge("three", "two")]));
    let dot = proxy.api_as(0, "GET", "graph", None, &[("accept", "text/vnd.graphviz")], &[]);
    let text = String::from_utf8(proxy.ended(dot).stream.replies[0].body.clone()).unwrap();
    assert!(text.starts_with("digraph") && text.contains("\"two\" -> \"one\" [label=\"a/1\"];"), "{text}");
    assert_eq!(get(&proxy, "locks/a/free").1, json!({ "name": "a/free", "holders": [], "waiters": [] }));

    assert_eq!(delete(&proxy, 0, 1), "released");
    proxy.deliver();
    proxy.complete(waits);
    proxy.deliver();
    assert_eq!(proxy.answer(behind).0, 201);
    assert_eq!(delete(&proxy, 0, 3), "released");
    proxy.complete(upstream);
    proxy.assert_rest(TABLE);
}

#[test]
fn breaking_the_glass_takes_an_administrator() {
    let proxy = serving(2);
    let (_, lease) = proxy.answer(put(&proxy, 0, 1, &body("one", "a/1")));
    let waiter = put(&proxy, 1, 2, &body("two", "a/1"));
    let token = [("authorization", "Bearer 0123456789abcdef")];
    let wrong = [("authorization", "Bearer 0123456789abcdeg")];
    let ops = [("connection.uri_san_peer_certificate", "spiffe://mesh/ns/ops/sa/oncall")];
    let pay = [("connection.uri_san_peer_certificate", "spiffe://mesh/ns/pay/sa/api")];
    for (headers, properties) in [(&[][..], &[][..]), (&wrong, &[]), (&[], &pay)] {
        let (status, problem) = proxy.answer(proxy.api_as(0, "DELETE", "locks/a/1", None, headers, properties));
        assert_eq!((status, &problem["type"]), (403, &json!("urn:interlock:problem:forbidden")));
    }
    let (status, broken) = proxy.answer(proxy.api_as(0, "DELETE", "locks/a/1", None, &token, &[]));
    assert_eq!((status, &broken["ended"][0]["owner"]), (200, &json!("one")));
    proxy.deliver();
    let (status, next) = proxy.answer(waiter);
    assert_eq!(status, 201);
    let fence = |lease: &Value| lease["locks"][0]["fence"].as_u64().unwrap();
    assert!(fence(&next) > fence(&lease) + 1, "the fence was raised in between");
    assert_eq!(renew(&proxy, 0, 1, None)["status"], "lost");
    assert_eq!(proxy.answer(proxy.api_as(0, "DELETE", "locks/a/1", None, &[], &ops)).0, 200);
    assert_eq!(delete(&proxy, 1, 2), "expired");
    proxy.assert_rest(TABLE);
}

#[test]
fn classes_have_their_callers_and_requests_their_limits() {
    let proxy = serving(1);
    let ask = |lock: &str, properties: &[(&str, &str)]| {
        let path = format!("leases/{}", id(1));
        proxy.answer(proxy.api_as(0, "PUT", &path, Some(&body("one", lock)), &[], properties))
    };
    let (status, problem) = ask("vault/1", &[]);
    assert_eq!((status, &problem["type"]), (403, &json!("urn:interlock:problem:forbidden")));
    let (status, _) = ask("vault/1", &[("connection.uri_san_peer_certificate", "spiffe://mesh/ns/pay/sa/api")]);
    assert_eq!(status, 201);
    let (_, lock) = get(&proxy, "locks/vault/1");
    assert_eq!(lock["holders"][0]["asked_by"], "spiffe://mesh/ns/pay/sa/api");
    let (status, problem) = ask("a/1", &[]);
    assert_eq!((status, &problem["type"]), (409, &json!("urn:interlock:problem:lease-id-taken")));
    let three = json!({ "owner": "one", "locks": [{ "name": "a/1" }, { "name": "a/2" }, { "name": "a/3" }] });
    let (status, problem) = proxy.answer(put(&proxy, 0, 2, &three));
    assert_eq!((status, &problem["type"]), (429, &json!("urn:interlock:problem:too-many-locks")));
    // A TTL above the highest is brought down to it, and the answer says so.
    let long = json!({ "owner": "one", "locks": [{ "name": "a/1" }], "ttl": "1h" });
    assert_eq!(proxy.answer(put(&proxy, 0, 3, &long)).1["ttl"], "10s");
    for n in [1, 3] {
        assert_eq!(delete(&proxy, 0, n), "released");
    }
    proxy.assert_rest(TABLE);
}

#[test]
fn wrong_requests_are_problems_that_say_what_is_wrong() {
    let proxy = serving(1);
    let (status, problem) = proxy.answer(put(&proxy, 0, 1, &json!({ "owner": "one", "lock": "a/1" })));
    assert_eq!((status, &problem["type"]), (400, &json!("urn:interlock:problem:malformed-request")));
    assert!(problem["detail"].as_str().unwrap().contains("unknown field `lock`"), "{problem}");
    assert_eq!(get(&proxy, "nothing").0, 404);
    let call = proxy.api(0, "PATCH", "health", None);
    assert_eq!((proxy.answer(call).0, proxy.ended(call).header("allow").as_deref()), (405, Some("GET")));
    assert_eq!(proxy.answer(proxy.api(0, "PUT", &format!("leases/{}", id(1)), None)).0, 400, "no body");
    let big = json!({ "owner": "x".repeat(70_000), "locks": [] });
    assert_eq!(proxy.answer(put(&proxy, 0, 1, &big)).0, 413);
    // Next door nothing is the API's.
    let other = proxy.request(0, &[(":method", "GET"), (":path", "/interlock/v2/health")]);
    assert!(proxy.is_upstream(other));
    proxy.complete(other);
    proxy.assert_rest(TABLE);
}

#[test]
fn a_body_that_never_comes_is_not_waited_for_for_ever() {
    let proxy = serving(1);
    let path = format!("/interlock/v1/leases/{}", id(1));
    let call = proxy.request(0, &[(":method", "PUT"), (":path", &path), ("content-length", "10")]);
    assert!(proxy.is_parked(call));
    proxy.until("it is answered", secs(11), || proxy.has_ended(call));
    let (status, problem) = proxy.answer(call);
    assert_eq!(status, 408);
    assert!(problem["detail"].as_str().unwrap().contains("allow_on_headers_stop_iteration"), "{problem}");
    proxy.assert_rest(TABLE);
}
