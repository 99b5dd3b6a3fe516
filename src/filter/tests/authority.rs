//! Locks at an authority: what callers and upstreams see, whatever becomes of the calls.

use serde_json::{Value, json};

use super::link::{Link, asking};
use super::{millis, secs};
use crate::host::Status;
use crate::host::fake::CallAnswer;

fn pair() -> Link {
    Link::new(2, &asking())
}

#[test]
fn a_lock_is_asked_for_before_the_upstream_and_given_back_after_it() {
    let link = pair();
    let call = link.proxy.lock(1, "one", "a/1, b/1;mode=shared;wait=1;ttl=2");
    assert!(link.proxy.is_parked(call));
    let (_, put) = link.call();
    assert_eq!(put.stream, Some(call.id), "sent from the stream itself");
    let (method, path) = put.target();
    let id = path.strip_prefix("/interlock/v1/leases/").unwrap();
    assert!(method == "PUT" && id.len() == 32, "{method} {path}");
    assert_eq!(put.timeout, secs(2) + millis(250), "its wait, and what an answer may take");
    let body: Value = serde_json::from_slice(&put.body).unwrap();
    assert_eq!(
        body,
        json!({
            "owner": "one", "wait": "2s", "ttl": "2s", "for": "lock header",
            "locks": [{ "name": "a/1", "mode": "exclusive" }, { "name": "b/1", "mode": "shared", "wait": "1s" }],
        })
    );
    link.deliver();
    assert!(link.proxy.is_upstream(call));
    assert_eq!(link.holders("a/1"), ["one"]);
    let held = link.proxy.entries(super::link::TABLE, "b/1");
    assert_eq!(held[0].fence().map(|fence| fence.0), link.proxy.fence(call, "b/1"));
    link.run(millis(600));
    assert_eq!(link.proxy.fake.gauges().get("interlock_held.class.a.instance.t"), Some(&1));
    link.proxy.respond(call);
    link.proxy.end(call);
    assert_eq!(link.calls(), [], "nobody waits for the release");
    link.proxy.deliver();
    let (_, delete) = link.call();
    assert_eq!((delete.target(), delete.stream), (("DELETE", path), None), "sent from a root");
    link.deliver();
    assert_eq!(link.holders("a/1"), Vec::<String>::new());
    assert_eq!(link.proxy.status(call), "t;outcome=acquired;wait=0.0");
    assert_eq!(link.proxy.fake.histogram("interlock_hold_ms.class.a"), [600, 600], "here and at the authority");
    assert_eq!(
        link.proxy.fake.metric("interlock_acquire_total.class.b.outcome.acquired"),
        2,
        "the authority counts too"
    );
    link.assert_rest();
}

#[test]
fn a_waiter_goes_on_when_its_turn_comes() {
    let link = pair();
    let holder = link.proxy.lock(1, "one", "a/1");
    link.deliver();
    let waiter = link.proxy.lock(2, "two", "a/1");
    link.run(millis(700));
    assert!(link.proxy.is_upstream(holder) && link.proxy.is_parked(waiter));
    let first = link.proxy.fence(holder, "a/1");
    link.proxy.complete(holder);
    link.deliver();
    assert!(link.proxy.is_upstream(waiter));
    let second = link.proxy.fence(waiter, "a/1");
    assert!(first < second, "{first:?} {second:?}");
    assert_eq!(link.proxy.complete(waiter).header("lock-status").unwrap(), "t;outcome=acquired;wait=0.7");
    link.assert_rest();
}

#[test]
fn refusals_are_the_authoritys_own() {
    let link = pair();
    let one = link.proxy.lock(1, "one", "b/1");
    let two = link.proxy.lock(2, "two", "b/2");
    link.deliver();
    let waits = link.proxy.lock(1, "one", "b/2;wait=20");
    link.deliver();
    let closes = link.proxy.lock(2, "two", "b/1;wait=20");
    link.deliver();
    let (status, problem) = link.proxy.answer(closes);
    assert_eq!(status, 409);
    let edge = |owner: &str, lock: &str, by: &str| json!({ "owner": owner, "waits_for": lock, "held_by": by });
    assert_eq!(
        problem,
        json!({
            "type": "urn:interlock:problem:deadlock", "title": "Waiting would deadlock", "status": 409,
            "detail": "waiting for b/1 would close a cycle: two waits for b/1 held by one, one waits for b/2 held by two",
            "lock": "b/1", "mode": "exclusive", "owner": "two",
            "cycle": [edge("two", "b/1", "one"), edge("one", "b/2", "two")],
        })
    );
    assert_eq!(link.proxy.status(closes), "t;outcome=refused;reason=deadlock;lock=\"b/1\"");
    let held = link.proxy.lock(2, "three", "b/1;wait=0");
    link.deliver();
    let (status, problem) = link.proxy.answer(held);
    assert_eq!((status, &problem["holders"][0]["owner"]), (423, &json!("one")));
    assert_eq!(problem["detail"], "b/1 is taken by one in exclusive mode and the request does not wait");
    let slow = link.proxy.lock(2, "three", "b/1;wait=1");
    link.run(secs(2));
    let (status, problem) = link.proxy.answer(slow);
    assert_eq!((status, &problem["type"]), (423, &json!("urn:interlock:problem:wait-timeout")));
    assert_eq!(problem["detail"], "waited 1 s for b/1, which is taken by one in exclusive mode");
    assert_eq!(link.proxy.fake.metric("interlock_backend_error_total.reason.status"), 0);
    for call in [one, two] {
        link.proxy.complete(call);
        link.deliver();
    }
    link.proxy.complete(waits);
    link.assert_rest();
}

#[test]
fn who_leaves_while_parked_is_withdrawn_whatever_overtakes_what() {
    for put_first in [true, false] {
        let link = pair();
        let holder = link.proxy.lock(1, "one", "a/1");
        link.deliver();
        let leaver = link.proxy.lock(2, "two", "a/1;wait=20");
        let (vm, put) = link.call();
        if put_first {
            link.pass(vm, &put);
            assert_eq!(link.holders("a/1"), ["one", "two"]);
        }
        link.proxy.end(leaver);
        link.proxy.deliver();
        let (_, delete) = link.calls().pop().unwrap();
        assert_eq!(delete.target().0, "DELETE");
        link.pass(vm, &delete);
        assert_eq!(link.holders("a/1"), ["one"], "put first: {put_first}");
        if !put_first {
            let late = link.ask(&put);
            assert_eq!(link.proxy.answer(late).1["type"], "urn:interlock:problem:lease-lost");
        }
        link.deliver();
        link.proxy.complete(holder);
        link.assert_rest();
    }
}

#[test]
fn an_answer_that_did_not_come_is_asked_for_again_and_granted_once() {
    // Cut in the body, cut altogether, reset; and a proxy on the way that was too slow.
    let answers = [
        CallAnswer::default(),
        CallAnswer::new(201, b"{\"id\":"),
        CallAnswer::new(503, b"reset"),
        CallAnswer::new(504, b""),
    ];
    for answer in answers {
        let link = pair();
        let call = link.proxy.lock(1, "one", "a/1");
        let (vm, put) = link.call();
        let lost = link.ask(&put);
        let told = link.proxy.answer(lost).1;
        assert!(link.proxy.vm(vm).call_answer(put.token, answer));
        assert!(link.proxy.is_parked(call) && link.calls().is_empty());
        link.proxy.run(millis(60));
        let (_, again) = link.call();
        assert_eq!((again.target(), again.stream), (put.target(), None), "under the same id, from a root");
        link.deliver();
        assert!(link.proxy.is_upstream(call));
        assert_eq!(link.proxy.fence(call, "a/1"), told["locks"][0]["fence"].as_u64());
        assert_eq!(link.holders("a/1"), ["one"]);
        assert!(!link.proxy.vm(vm).call_answer(put.token, CallAnswer::new(201, b"")), "once is enough");
        link.proxy.complete(call);
        link.assert_rest();
    }
}

/// A try that has no time left asks for the lock at once or not at all; its caller had time, and has waited in vain.
#[test]
fn a_last_try_without_time_to_wait_ends_as_a_wait_that_ran_out() {
    let link = pair();
    let held = link.proxy.lock(1, "one", "a/1");
    link.deliver();
    let call = link.proxy.lock(1, "two", "a/1;wait=1");
    let (vm, put) = link.call();
    link.proxy.run(millis(949));
    assert!(link.proxy.vm(vm).call_answer(put.token, CallAnswer::new(503, b"reset")));
    // The worker comes to it late, when the wait is over.
    link.proxy.fake.advance(millis(60));
    link.run(millis(300));
    let (status, problem) = link.proxy.answer(call);
    assert_eq!((status, &problem["type"]), (423, &json!("urn:interlock:problem:wait-timeout")), "{problem}");
    assert_eq!(problem["holders"][0]["owner"], "one");
    link.proxy.complete(held);
    link.deliver();
    link.assert_rest();
}

#[test]
fn a_request_whose_answer_is_lost_for_good_is_withdrawn() {
    let link = pair();
    let call = link.proxy.lock(1, "one", "a/1;wait=1");
    let (_, put) = link.call();
    link.ask(&put);
    assert_eq!(link.holders("a/1"), ["one"]);
    // The host gives the call up at the end of the wait and of what an answer may take.
    link.proxy.until("an answer", secs(2), || link.proxy.has_ended(call));
    let (status, problem) = link.proxy.answer(call);
    assert_eq!((status, &problem["type"]), (503, &json!("urn:interlock:problem:backend-unavailable")));
    assert_eq!(problem["detail"], "a/1: the lock authority did not answer in time");
    link.deliver();
    assert_eq!(link.holders("a/1"), Vec::<String>::new());
    link.assert_rest();
}

#[test]
fn an_authority_that_is_away_costs_little_time_and_what_the_rule_says() {
    let mut policy = asking();
    policy["rules"] = json!([{
        "name": "lenient", "match": { "path": "/lenient" }, "locks": [{ "name": "a/9" }], "on_backend_unavailable": "allow"
    }]);
    let link = Link::new(1, &policy);
    link.cut.set(true);
    let strict = link.proxy.lock(1, "one", "a/1;wait=20");
    let path = [(":method", "GET"), (":path", "/lenient"), ("x-request-id", "two")];
    let lenient = link.proxy.request(1, &path);
    link.run(millis(400));
    let (status, problem) = link.proxy.answer(strict);
    assert_eq!((status, &problem["detail"]), (503, &json!("a/1: the lock authority cannot be reached")));
    assert_eq!(link.proxy.ended(strict).header("retry-after").as_deref(), Some("1"));
    assert!(link.proxy.is_upstream(lenient));
    assert_eq!(
        link.proxy.complete(lenient).header("lock-status").unwrap(),
        "t;outcome=unlocked;reason=backend-unavailable"
    );
    assert!(link.proxy.fake.metric("interlock_backend_error_total.reason.unreachable") >= 4);
    link.cut.set(false);
    link.assert_rest();
    // The host itself may refuse to call: the cluster is unknown, or overloaded.
    link.proxy.vm(1).host.fail_next("call", 1, Status::InternalFailure);
    let refused = link.proxy.lock(1, "three", "a/1");
    assert_eq!(link.proxy.answer(refused).1["detail"], "a/1: the lock authority cannot be called (internal failure)");
    assert_eq!(link.proxy.fake.metric("interlock_backend_error_total.reason.dispatch"), 1);
    link.assert_rest();
}

#[test]
fn an_authority_that_has_just_started_says_for_how_long() {
    let link = pair();
    let call = link.proxy.lock(1, "one", "a/1");
    let (vm, put) = link.call();
    let problem = json!({
        "type": "urn:interlock:problem:backend-unavailable", "title": "The lock table has just started", "status": 503,
        "detail": "…", "lock": "a/1", "mode": "exclusive", "owner": "one", "retry_after_ms": 7000, "grace": true,
    });
    let answer = CallAnswer::new(503, problem.to_string().as_bytes()).with("content-type", "application/problem+json");
    link.proxy.vm(vm).call_answer(put.token, answer);
    let (status, problem) = link.proxy.answer(call);
    assert_eq!((status, &problem["retry_after_ms"]), (503, &json!(7000)));
    assert_eq!(link.proxy.ended(call).header("retry-after").as_deref(), Some("7"));
    link.assert_rest();
}

#[test]
fn all_leases_of_a_vm_are_renewed_by_one_call_and_kept() {
    let link = pair();
    let calls: Vec<_> =
        (0..40).map(|n| link.proxy.lock(1, &format!("o{n}"), &format!("a/{n};ttl=2;hold=60"))).collect();
    link.deliver();
    let mut renewals = 0;
    let end = link.proxy.now() + secs(10);
    while link.proxy.step(end) {
        for (_, call) in link.calls() {
            if call.target().0 == "POST" {
                renewals += 1;
                let body: Value = serde_json::from_slice(&call.body).unwrap();
                assert_eq!(body["leases"].as_array().unwrap().len(), 40);
                assert!(body["leases"][0]["receipt"].is_string());
            }
        }
        link.deliver();
    }
    assert!((10..=20).contains(&renewals), "{renewals} renewals in 10 s");
    for call in &calls {
        assert!(link.proxy.is_upstream(*call));
        link.proxy.complete(*call);
    }
    link.assert_rest();
}

#[test]
fn a_lease_that_cannot_be_renewed_is_lost_and_ends_its_request() {
    let mut policy = asking();
    policy["rules"] = json!([{
        "name": "goes-on", "match": { "path": "/on" }, "locks": [{ "name": "a/9", "ttl": "2s" }], "on_lease_lost": "continue"
    }]);
    let link = Link::new(1, &policy);
    let aborted = link.proxy.lock(1, "one", "a/1;ttl=2");
    let goes_on = link.proxy.request(1, &[(":method", "GET"), (":path", "/on"), ("x-request-id", "two")]);
    link.deliver();
    link.cut.set(true);
    link.run(secs(1));
    assert!(link.proxy.is_upstream(aborted), "it may be renewed yet");
    link.run(secs(2));
    assert_eq!(link.proxy.answer(aborted).1["type"], "urn:interlock:problem:lease-lost");
    assert_eq!(
        link.proxy.complete(goes_on).header("lock-status").unwrap(),
        "t;outcome=lost;reason=lease-lost;lock=\"a/9\""
    );
    assert_eq!(link.proxy.fake.metric("interlock_lease_lost_total.class.a.reason.expired"), 2);
    link.cut.set(false);
    link.assert_rest();
}

#[test]
fn a_lease_that_the_authority_has_ended_is_lost_too() {
    let link = pair();
    let call = link.proxy.lock(1, "one", "a/1;ttl=2");
    let (_, put) = link.call();
    link.deliver();
    let path = put.target().1.strip_prefix("/interlock/v1/").unwrap().to_owned();
    let ended = link.proxy.api(0, "DELETE", &path, None);
    assert_eq!(link.proxy.answer(ended).1["status"], "released");
    link.run(secs(1));
    assert_eq!(link.proxy.answer(call).1["type"], "urn:interlock:problem:lease-lost");
    link.assert_rest();
}

#[test]
fn a_response_made_without_the_lock_does_not_pass() {
    let link = pair();
    let call = link.proxy.lock(1, "one", "a/1;ttl=1;hold=60");
    link.deliver();
    link.proxy.silence(1, true);
    link.run(secs(2));
    link.proxy.respond(call);
    assert_eq!(link.proxy.answer(call).0, 409);
    link.proxy.silence(1, false);
    link.assert_rest();
}

#[test]
fn the_hold_limit_is_the_requests_own() {
    let link = pair();
    let call = link.proxy.lock(1, "one", "a/1;ttl=1;hold=2");
    link.run(secs(3));
    let (status, problem) = link.proxy.answer(call);
    assert_eq!(
        (status, &problem["detail"]),
        (409, &json!("one held a/1 for as long as a lease may be renewed (hold)"))
    );
    link.assert_rest();
}

#[test]
fn many_releases_at_once_call_one_root_once() {
    let link = pair();
    let calls: Vec<_> = (0..20).map(|n| link.proxy.lock(1, &format!("o{n}"), &format!("a/{n}"))).collect();
    link.deliver();
    let (_, cost) = link.proxy.calls(1, || calls.iter().for_each(|call| drop(link.proxy.complete(*call))));
    assert_eq!((cost.enqueues, cost.callouts), (1, 0));
    link.proxy.deliver();
    assert_eq!(link.calls().len(), 20);
    link.assert_rest();
}

/// What a lock at an authority costs the proxy in calls of its host.
#[test]
fn an_uncontended_lock_costs_one_call_before_the_upstream_and_one_after_it() {
    let link = pair();
    let warm = link.proxy.lock(1, "warm", "a/1");
    link.deliver();
    link.proxy.complete(warm);
    link.run(secs(1));
    let (call, ask) = link.proxy.calls(1, || link.proxy.lock(1, "one", "a/1"));
    assert_eq!((ask.callouts, ask.shared(), ask.enqueues), (1, 0, 0), "{ask:?}");
    let (vm, put) = link.call();
    let answer = link.answer_to(link.ask(&put));
    let (_, granted) = link.proxy.calls(1, || link.proxy.vm(vm).call_answer(put.token, answer));
    assert!(link.proxy.is_upstream(call));
    assert_eq!((granted.callouts, granted.shared(), granted.enqueues), (0, 0, 0), "{granted:?}");
    assert!(granted.answer_reads <= 3 && granted.enters == 1, "{granted:?}");
    let (_, done) = link.proxy.calls(1, || drop(link.proxy.complete(call)));
    assert_eq!((done.callouts, done.shared(), done.enqueues), (0, 0, 1), "{done:?}");
    let (_, released) = link.proxy.calls(1, || link.proxy.deliver());
    assert_eq!((released.callouts, released.shared(), released.dequeues), (1, 0, 2), "{released:?}");
    link.assert_rest();
}

#[test]
fn an_idle_proxy_asks_nothing_but_to_stay_connected() {
    let link = pair();
    let (_, calls) = link.proxy.calls(1, || link.run(secs(60)));
    // Four times a second it looks what other VMs have at authorities, for the gauges.
    assert_eq!((calls.callouts, calls.shared_reads, calls.shared_writes), (4, 240, 0), "{calls:?}");
}

#[test]
fn gauges_are_of_all_vms_and_of_none_that_died() {
    let link = pair();
    let here = link.proxy.lock(1, "one", "a/1, free/1");
    let there = link.proxy.lock(2, "two", "a/2");
    link.deliver();
    let waits = link.proxy.lock(2, "three", "a/1;wait=30");
    link.run(millis(600));
    let gauge = |name: &str| link.proxy.fake.metric(&format!("{name}.instance.t"));
    assert_eq!(gauge("interlock_held.class.a"), 2);
    assert_eq!((gauge("interlock_held.class.other"), gauge("interlock_waiting.class.a")), (1, 1));
    link.proxy.kill(2);
    link.run(secs(5));
    assert_eq!((gauge("interlock_held.class.a"), gauge("interlock_waiting.class.a")), (1, 0));
    // What it held ends by its ttl, and what it waited for is not awaited any more once its call has gone.
    let parked = link.holders("a/1");
    assert_eq!(link.holders("a/2"), Vec::<String>::new(), "{there:?} {waits:?} {parked:?}");
    link.proxy.complete(here);
    link.run(secs(1));
    assert_eq!((gauge("interlock_held.class.a"), gauge("interlock_held.class.other")), (0, 0));
}

#[test]
fn what_is_to_be_given_back_goes_out_with_the_last_callback_of_a_root() {
    let link = pair();
    let call = link.proxy.lock(1, "one", "a/1");
    link.deliver();
    // The process ends: streams end, and no queue is delivered and no tick comes any more.
    link.proxy.end(call);
    assert_eq!(link.calls(), []);
    let root = link.proxy.vm(1).roots()[0];
    link.proxy.vm(1).root_done(root);
    let (_, delete) = link.call();
    assert_eq!(delete.target().0, "DELETE");
    link.assert_rest();
}

#[test]
fn requests_go_on_where_they_began_when_the_backend_changes() {
    let link = Link::new(1, &asking());
    let vm = link.proxy.vm(1);
    let remote = link.proxy.lock(1, "one", "a/1");
    let parked = link.proxy.lock(1, "two", "a/1;wait=20");
    link.deliver();
    vm.configure(&super::proxy::active(&super::plain()));
    let local = link.proxy.lock(1, "three", "a/1");
    assert!(link.proxy.is_upstream(local), "another table");
    assert!(link.calls().is_empty());
    vm.configure(&super::proxy::active(&asking()));
    let again = link.proxy.lock(1, "four", "a/1;wait=20");
    link.run(secs(1));
    assert_eq!(link.holders("a/1"), ["one", "two", "four"]);
    assert_eq!(link.proxy.entries(super::TABLE, "a/1").len(), 1);
    link.proxy.complete(remote);
    link.proxy.complete(local);
    link.deliver();
    assert!(link.proxy.is_upstream(parked) && link.proxy.is_parked(again));
    link.proxy.complete(parked);
    link.deliver();
    link.proxy.complete(again);
    link.run(secs(4));
    assert_eq!(link.proxy.size(super::TABLE), (0, 0));
    link.assert_rest();
}

#[test]
fn an_instance_that_nothing_names_any_more_ends_when_all_is_given_back() {
    let link = Link::new(1, &asking());
    let vm = link.proxy.vm(1);
    let call = link.proxy.lock(1, "one", "a/1");
    link.deliver();
    let old = vm.roots()[0];
    let mut other = super::plain();
    other["instance"] = json!("other");
    vm.configure(&super::proxy::active(&other));
    link.proxy.end(call);
    vm.drop_root(old);
    // Its message to a root is lost with that root; whichever root ticks sends it.
    link.run(secs(2));
    assert_eq!(link.holders("a/1"), Vec::<String>::new());
    assert_eq!(vm.instances(), ["other"]);
    link.assert_rest();
}

#[test]
fn audit_decides_on_the_authoritys_shadow_table() {
    let mut policy = asking();
    policy["enforcement"] = json!("audit");
    let link = Link::new(2, &policy);
    let first = link.proxy.lock(1, "one", "a/1");
    assert!(link.proxy.is_upstream(first), "nothing is delayed");
    let (_, put) = link.call();
    assert!(put.target().1.starts_with("/interlock/v1/audit/leases/"));
    link.deliver();
    let second = link.proxy.lock(2, "two", "a/1;wait=0");
    let third = link.proxy.lock(2, "three", "a/1;wait=20");
    assert!([first, second, third].iter().all(|call| link.proxy.is_upstream(*call)));
    link.deliver();
    assert_eq!(link.proxy.entries("authority/audit", "a/1").len(), 2);
    assert_eq!(link.holders("a/1"), Vec::<String>::new());
    assert_eq!(
        link.proxy.complete(second).header("lock-status").unwrap(),
        "t;outcome=audit;reason=lock-held;lock=\"a/1\""
    );
    assert_eq!(link.proxy.complete(first).header("lock-status").unwrap(), "t;outcome=audit;wait=0.0");
    link.deliver();
    link.proxy.complete(third);
    assert_eq!(link.proxy.fake.metric("interlock_audit_total.class.a.outcome.refused.reason.lock-held"), 2);
    link.run(secs(2));
    assert_eq!(link.proxy.size("authority/audit"), (0, 0));
    link.assert_rest();
}
