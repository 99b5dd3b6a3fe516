//! The life of one stream, from its headers to its end, in every order.

use serde_json::json;

use super::proxy::Proxy;
use super::{SHADOW, TABLE, millis, plain, secs, two};
use crate::filter::Flow;
use crate::host::fake::Phase;

#[test]
fn a_lock_is_granted_waited_for_and_handed_over_across_vms() {
    let proxy = two();
    let first = proxy.lock(0, "one", "a/1");
    let second = proxy.lock(1, "two", "a/1;wait=1");
    let third = proxy.lock(0, "three", "a/1;wait=1");
    assert!(proxy.is_upstream(first) && proxy.is_parked(second) && proxy.is_parked(third));
    let fences = [first, second, third].map(|call| {
        proxy.deliver();
        assert!(proxy.is_upstream(call));
        let fence = proxy.fence(call, "a/1").unwrap();
        proxy.run(millis(50));
        let ended = proxy.complete(call);
        assert!(ended.header("lock-fence").unwrap().contains(&fence.to_string()));
        fence
    });
    assert!(fences.is_sorted_by(|a, b| a < b), "{fences:?}");
    assert_eq!(proxy.status(first), "t;outcome=acquired;wait=0.0");
    assert_eq!(proxy.status(second), "t;outcome=acquired;wait=0.05");
    assert_eq!(proxy.ended(third).header("server-timing").as_deref(), Some("lock;dur=100"));
    assert_eq!(proxy.fake.histogram("interlock_wait_ms.class.a"), [0, 50, 100]);
    proxy.assert_rest(TABLE);
}

#[test]
fn a_wait_ends_at_its_deadline_and_not_before() {
    let proxy = two();
    let holder = proxy.lock(0, "one", "a/1");
    let start = proxy.now();
    let waiter = proxy.lock(1, "two", "a/1;wait=0.7");
    proxy.until("the wait ends", secs(1), || proxy.has_ended(waiter));
    let waited = proxy.now().since(start);
    assert!(waited >= millis(700) && waited <= millis(702), "{waited:?}");
    let ended = proxy.ended(waiter);
    assert_eq!((ended.refused(), ended.forwarded), (Some(423), false));
    assert_eq!(proxy.status(waiter), "t;outcome=refused;reason=wait-timeout;lock=\"a/1\"");
    assert!(ended.header("retry-after").is_some());
    proxy.complete(holder);
    proxy.assert_rest(TABLE);
}

#[test]
fn who_does_not_wait_is_refused_at_once() {
    let proxy = two();
    let holder = proxy.lock(0, "one", "a/1, b/1");
    let other = proxy.lock(1, "two", "a/2, b/1;wait=0");
    assert_eq!(proxy.status(other), "t;outcome=refused;reason=lock-held;lock=\"b/1\"");
    assert_eq!(proxy.entries(TABLE, "a/2"), [], "it holds nothing");
    proxy.end(holder);
    proxy.assert_rest(TABLE);
}

#[test]
fn a_cycle_over_two_vms_refuses_one_and_completes_the_other() {
    let proxy = two();
    let one = proxy.lock(0, "one", "a/1");
    let two = proxy.lock(1, "two", "a/2");
    let inner_one = proxy.lock(1, "one", "a/2");
    assert!(proxy.is_parked(inner_one));
    let inner_two = proxy.lock(0, "two", "a/1");
    assert_eq!(proxy.ended(inner_two).refused(), Some(409));
    assert_eq!(proxy.status(inner_two), "t;outcome=refused;reason=deadlock;lock=\"a/1\"");
    let body = proxy.ended(inner_two).stream.replies[0].body.clone();
    let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(problem["cycle"].as_array().unwrap().len(), 2);
    assert!(proxy.ended(inner_two).header("retry-after").is_none());
    proxy.complete(two);
    proxy.deliver();
    proxy.complete(inner_one);
    proxy.complete(one);
    proxy.assert_rest(TABLE);
    assert_eq!(proxy.fake.metric("interlock_deadlock_total.class.a"), 1);
}

#[test]
fn the_declared_order_is_kept_over_requests_of_one_owner() {
    let policy = json!({ "instance": "t", "classes": [{ "name": "a", "rank": 1 }, { "name": "b", "rank": 2 }] });
    let proxy = Proxy::new(2, &policy);
    proxy.run(secs(1));
    let outer = proxy.lock(0, "one", "b/1");
    let inner = proxy.lock(1, "one", "a/1");
    assert_eq!(proxy.status(inner), "t;outcome=refused;reason=order-violation;lock=\"a/1\"");
    let again = proxy.lock(1, "one", "b/1");
    assert_eq!(proxy.fence(again, "b/1"), proxy.fence(outer, "b/1"), "a re-entry is the same section");
    proxy.complete(outer);
    assert_eq!(proxy.entries(TABLE, "b/1").len(), 1, "the inner request still holds");
    proxy.complete(again);
    proxy.assert_rest(TABLE);
}

/// Every way in which a stream can end while it is at each stage leaves nothing behind, and lets the next one go on.
#[test]
fn a_stream_may_end_anywhere() {
    for stage in [Phase::Request, Phase::Upstream, Phase::Response] {
        let proxy = two();
        let holder = (stage == Phase::Request).then(|| proxy.lock(1, "holder", "b/1"));
        let call = proxy.lock(0, "one", "a/1, b/1");
        let next = proxy.lock(1, "next", "a/1");
        if stage == Phase::Response {
            proxy.respond(call);
        }
        assert_eq!(proxy.phase(call), Some(stage));
        assert!(proxy.is_parked(next));
        proxy.end(call);
        proxy.deliver();
        assert!(proxy.is_upstream(next), "{stage:?}");
        let cancelled = proxy.fake.metric("interlock_acquire_total.class.b.outcome.cancelled");
        assert_eq!(cancelled, i64::from(stage == Phase::Request));
        proxy.end(next);
        holder.into_iter().for_each(|call| proxy.end(call));
        proxy.assert_rest(TABLE);
    }
}

#[test]
fn a_waiter_that_leaves_lets_those_behind_it_pass() {
    let proxy = two();
    let reader = proxy.lock(0, "r1", "a/1;mode=shared");
    let writer = proxy.lock(1, "w", "a/1");
    let behind = proxy.lock(0, "r2", "a/1;mode=shared");
    assert!(proxy.is_parked(writer) && proxy.is_parked(behind));
    proxy.end(writer);
    proxy.deliver();
    assert!(proxy.is_upstream(behind));
    proxy.end(behind);
    proxy.end(reader);
    proxy.assert_rest(TABLE);
}

#[test]
fn a_body_that_overtakes_its_parked_request_is_refused() {
    let proxy = two();
    let holder = proxy.lock(0, "one", "a/1");
    let parked = proxy.lock(1, "two", "a/1");
    assert_eq!(proxy.vm(1).body(parked.id), Flow::Stop);
    let ended = proxy.ended(parked);
    assert_eq!((ended.refused(), ended.forwarded), (Some(503), false));
    assert_eq!(proxy.vm(0).body(holder.id), Flow::Continue);
    proxy.end(holder);
    proxy.assert_rest(TABLE);
}

#[test]
fn an_upstream_slower_than_the_ttl_is_renewed_and_slower_than_the_hold_limit_is_aborted() {
    let proxy = two();
    let slow = proxy.lock(0, "one", "a/1;ttl=1;hold=5");
    let next = proxy.lock(1, "two", "a/1;wait=20");
    proxy.run(millis(4900));
    assert!(proxy.is_upstream(slow) && proxy.is_parked(next), "renewed");
    proxy.run(millis(102));
    let ended = proxy.ended(slow);
    assert_eq!((ended.refused(), ended.forwarded), (Some(409), true));
    assert_eq!(proxy.status(slow), "t;outcome=refused;reason=lease-lost;lock=\"a/1\"");
    assert!(proxy.is_upstream(next));
    assert_eq!(proxy.fake.metric("interlock_lease_lost_total.class.a.reason.hold-limit"), 1);
    proxy.end(next);
    proxy.assert_rest(TABLE);
}

#[test]
fn a_hold_limit_after_the_response_began_resets_the_stream() {
    let proxy = two();
    let slow = proxy.lock(0, "one", "a/1;ttl=1;hold=1");
    proxy.respond(slow);
    proxy.run(millis(1002));
    let ended = proxy.ended(slow);
    assert!(ended.reset);
    assert_eq!(ended.header("lock-status").as_deref(), Some("t;outcome=acquired;wait=0.0"));
    proxy.assert_rest(TABLE);
}

#[test]
fn a_rule_may_let_a_request_go_on_that_lost_its_lease() {
    let mut policy = plain();
    policy["rules"] = json!([{
        "name": "slow", "match": { "path": "/slow" }, "locks": [{ "name": "a/1" }], "on_lease_lost": "continue",
        "ttl": "1s", "hold": "1s"
    }]);
    let proxy = Proxy::new(2, &policy);
    proxy.run(secs(1));
    let slow = proxy.request(0, &[(":method", "GET"), (":path", "/slow"), ("x-request-id", "one")]);
    proxy.run(secs(2));
    assert!(proxy.is_upstream(slow));
    assert_eq!(proxy.entries(TABLE, "a/1"), []);
    let ended = proxy.complete(slow);
    assert_eq!(ended.header("lock-status").as_deref(), Some("t;outcome=lost;reason=lease-lost;lock=\"a/1\""));
    assert_eq!(ended.header("lock-fence"), None);
    proxy.assert_rest(TABLE);
}

#[test]
fn audit_delays_and_refuses_nothing() {
    let mut policy = plain();
    policy["enforcement"] = json!("audit");
    let proxy = Proxy::new(2, &policy);
    proxy.run(secs(1));
    let first = proxy.lock(0, "one", "a/1");
    let waits = proxy.lock(1, "two", "a/1;wait=1");
    let refused = proxy.lock(1, "three", "a/1;wait=0");
    let malformed = proxy.lock(1, "four", "a/1;mode=nonsense");
    for call in [first, waits, refused, malformed] {
        assert!(proxy.is_upstream(call));
        assert_eq!(proxy.fence(call, "a/1"), None, "no fence without a lock that counts");
    }
    assert_eq!(proxy.size(TABLE), (0, 0));
    assert_eq!(proxy.entries(SHADOW, "a/1").len(), 2);
    proxy.run(millis(500));
    proxy.complete(first);
    proxy.run(millis(100));
    for call in [waits, refused, malformed] {
        proxy.complete(call);
    }
    assert_eq!(proxy.status(first), "t;outcome=audit;wait=0.0");
    assert_eq!(proxy.status(waits), "t;outcome=audit;wait=0.5");
    assert_eq!(proxy.status(refused), "t;outcome=audit;reason=lock-held;lock=\"a/1\"");
    assert_eq!(proxy.status(malformed), "t;outcome=audit;reason=malformed-annotation");
    proxy.assert_rest(SHADOW);
    proxy.assert_rest(TABLE);
    assert_eq!(proxy.fake.metric("interlock_audit_total.class.a.outcome.refused.reason.lock-held"), 1);
}

#[test]
fn a_stream_under_audit_may_end_while_it_would_wait() {
    let mut policy = plain();
    policy["enforcement"] = json!("audit");
    let proxy = Proxy::new(2, &policy);
    proxy.run(secs(1));
    let first = proxy.lock(0, "one", "a/1;ttl=1;hold=3");
    let waits = proxy.lock(1, "two", "a/1;wait=9");
    proxy.complete(waits);
    assert_eq!(proxy.status(waits), "t;outcome=audit;wait=0.0", "it was still waiting");
    proxy.run(secs(4));
    assert!(proxy.is_upstream(first), "the hold limit aborts nothing");
    proxy.complete(first);
    assert_eq!(proxy.status(first), "t;outcome=audit;reason=lease-lost;lock=\"a/1\"");
    proxy.assert_rest(SHADOW);
}

#[test]
fn off_decides_nothing_and_asks_nothing() {
    let mut policy = plain();
    policy["enforcement"] = json!("off");
    let proxy = Proxy::new(1, &policy);
    let (call, calls) = proxy.calls(0, || proxy.lock(0, "one", "a/1;mode=nonsense"));
    assert!(proxy.is_upstream(call));
    assert_eq!((calls.header_reads, calls.property_reads, calls.shared(), calls.clock), (0, 0, 0, 0), "{calls:?}");
    assert_eq!(proxy.complete(call).header("lock-status"), None);
    proxy.assert_rest(TABLE);
}

/// An upgrade that goes ahead of plain waiters draws edges that they did not ask for. Who draws an edge answers for it.
#[test]
fn a_waiting_upgrade_that_closes_a_cycle_behind_it_is_refused_at_once() {
    let policy = json!({ "instance": "t", "classes": [{ "name": "h", "hierarchy": true }, { "name": "b" }] });
    let proxy = Proxy::new(2, &policy);
    proxy.run(secs(1));
    let reads = proxy.lock(0, "U", "h/1;mode=intent-shared");
    let writes = proxy.lock(1, "R", "h/1;mode=intent-exclusive");
    let outer = proxy.lock(1, "P", "b/1");
    let waits = proxy.lock(1, "P", "h/1;mode=shared;wait=20");
    let elsewhere = proxy.lock(0, "U", "b/1;wait=20");
    assert!(proxy.is_parked(waits) && proxy.is_parked(elsewhere));
    let upgrade = proxy.lock(0, "U", "h/1;mode=shared-intent-exclusive;wait=20");
    assert!(proxy.has_ended(upgrade), "U waits for P at b/1, and P now for U at h/1");
    assert_eq!(proxy.status(upgrade), "t;outcome=refused;reason=deadlock;lock=\"h/1\"");
    proxy.end(writes);
    proxy.deliver();
    proxy.complete(waits);
    proxy.complete(outer);
    proxy.deliver();
    proxy.complete(elsewhere);
    proxy.complete(reads);
    proxy.assert_rest(TABLE);
}
