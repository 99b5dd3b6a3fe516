//! Who gets a lock when, as callers see it over several VMs: order, sharing, permits, limits, deadlines.

use serde_json::json;

use super::proxy::{Call, Proxy};
use super::{TABLE, millis, plain, secs, two};

#[test]
fn waiters_are_served_in_the_order_in_which_they_came_whatever_their_vm() {
    let proxy = Proxy::new(3, &plain());
    proxy.run(secs(1));
    let mut before = proxy.lock(0, "first", "a/1;wait=30");
    let waiters: Vec<_> = (0..12).map(|n| proxy.lock(n * 7 % 3, &format!("w{n}"), "a/1;wait=30")).collect();
    let mut last = proxy.fence(before, "a/1").unwrap();
    for (at, waiter) in waiters.iter().enumerate() {
        proxy.run(millis(20));
        proxy.complete(before);
        proxy.deliver();
        assert!(proxy.is_upstream(*waiter) && waiters[at + 1..].iter().all(|behind| proxy.is_parked(*behind)));
        let fence = proxy.fence(*waiter, "a/1").unwrap();
        assert!(fence > last);
        (before, last) = (*waiter, fence);
    }
    proxy.complete(before);
    proxy.assert_rest(TABLE);
}

#[test]
fn neighbouring_readers_go_together_and_none_overtakes_a_writer() {
    let proxy = two();
    let writer = proxy.lock(0, "w1", "a/1");
    let readers: Vec<_> = (0..4).map(|n| proxy.lock(n % 2, &format!("r{n}"), "a/1;mode=shared")).collect();
    let second = proxy.lock(1, "w2", "a/1");
    let late = proxy.lock(0, "r9", "a/1;mode=shared");
    proxy.complete(writer);
    proxy.deliver();
    assert!(readers.iter().all(|reader| proxy.is_upstream(*reader)));
    assert!(proxy.is_parked(second) && proxy.is_parked(late));
    for reader in readers {
        assert!(proxy.is_parked(second));
        proxy.complete(reader);
    }
    proxy.deliver();
    assert!(proxy.is_upstream(second) && proxy.is_parked(late));
    proxy.complete(second);
    proxy.deliver();
    proxy.complete(late);
    proxy.assert_rest(TABLE);
}

#[test]
fn permits_let_so_many_in_and_count_re_entries() {
    let policy = json!({ "instance": "t", "classes": [{ "name": "pool", "permits": 2 }] });
    let proxy = Proxy::new(2, &policy);
    proxy.run(secs(1));
    let first = proxy.lock(0, "one", "pool/1");
    let again = proxy.lock(1, "one", "pool/1;mode=shared");
    let third = proxy.lock(0, "two", "pool/1;wait=9");
    assert!(proxy.is_upstream(again) && proxy.is_parked(third));
    assert_ne!(proxy.fence(first, "pool/1"), proxy.fence(again, "pool/1"));
    proxy.complete(first);
    proxy.deliver();
    assert!(proxy.is_upstream(third));
    proxy.complete(again);
    proxy.complete(third);
    proxy.assert_rest(TABLE);
}

#[test]
fn a_lock_of_a_hierarchy_holds_off_who_wants_the_whole() {
    let policy = json!({ "instance": "t", "classes": [{ "name": "h", "hierarchy": true }] });
    let proxy = Proxy::new(2, &policy);
    proxy.run(secs(1));
    let part = proxy.lock(0, "one", "h/x/1");
    let other = proxy.lock(1, "two", "h/x/2");
    assert!(proxy.is_upstream(other));
    let whole = proxy.lock(1, "three", "h/x;mode=shared;wait=9");
    assert!(proxy.is_parked(whole));
    let answer = proxy.complete(part).header("lock-fence").unwrap();
    assert!(answer.starts_with("h/x/1;fence=") && !answer.contains(','), "intents are nobody's business: {answer}");
    proxy.deliver();
    assert!(proxy.is_parked(whole));
    proxy.complete(other);
    proxy.deliver();
    proxy.complete(whole);
    proxy.assert_rest(TABLE);
}

#[test]
fn limits_refuse_and_leave_nothing() {
    let mut policy = plain();
    policy["limits"] = json!({ "waiters_per_lock": 2, "locks_per_owner": 3, "locks_per_request": 4, "max_wait": "1s" });
    let proxy = Proxy::new(2, &policy);
    proxy.run(secs(1));
    let holder = proxy.lock(0, "one", "a/1, a/2");
    let waiters = [proxy.lock(1, "two", "a/1;wait=30"), proxy.lock(0, "three", "a/1;wait=30")];
    let refused = |call: Call, reason: &str| {
        let ended = proxy.ended(call);
        assert_eq!(ended.refused(), Some(429));
        assert!(ended.header("lock-status").unwrap().contains(reason), "{reason}: {ended:?}");
        assert!(ended.header("retry-after").is_some());
    };
    refused(proxy.lock(1, "four", "b/1, a/1;wait=30"), "too-many-waiters");
    refused(proxy.lock(1, "one", "b/1, b/2"), "too-many-locks");
    refused(proxy.lock(1, "five", "b/1, b/2, b/3, b/4, b/5"), "too-many-locks");
    let again = proxy.lock(1, "one", "a/1, a/2, b/1;wait=0");
    assert!(proxy.is_upstream(again), "what it has already does not count twice");
    proxy.end(again);
    assert_eq!((proxy.entries(TABLE, "b/1"), proxy.entries(TABLE, "b/2")), (vec![], vec![]));
    // The wait that the header asks for is longer than the policy allows.
    proxy.run(millis(1002));
    assert!(waiters.iter().all(|call| proxy.ended(*call).refused() == Some(423)));
    proxy.end(holder);
    proxy.assert_rest(TABLE);
}

#[test]
fn nobody_waits_for_longer_than_the_caller_does() {
    let proxy = two();
    let holder = proxy.lock(0, "one", "a/1");
    let fields = [("x-request-id", "two"), ("lock", "a/1;wait=9"), ("x-envoy-expected-rq-timeout-ms", "300")];
    let waiter = proxy.request(1, &fields);
    let took = proxy.until("the caller's time is up", millis(310), || proxy.has_ended(waiter));
    assert!(took >= millis(300), "{took:?}");
    assert_eq!(proxy.ended(waiter).refused(), Some(423));
    proxy.end(holder);
    proxy.assert_rest(TABLE);
}

/// The wait counts from the arrival of the request, over all its locks.
#[test]
fn the_wait_for_a_second_lock_is_what_the_first_one_left_of_it() {
    let proxy = two();
    let first = proxy.lock(0, "one", "a/1");
    let second = proxy.lock(0, "two", "b/1;wait=9");
    let both = proxy.lock(1, "three", "a/1;wait=1, b/1;wait=1");
    let start = proxy.now();
    proxy.run(millis(600));
    proxy.end(first);
    proxy.deliver();
    assert_eq!(proxy.entries(TABLE, "a/1").len(), 1, "it goes on to the second");
    proxy.until("its wait is over", secs(2), || proxy.has_ended(both));
    assert!(proxy.now().since(start) <= millis(1002));
    assert_eq!(proxy.status(both), "t;outcome=refused;reason=wait-timeout;lock=\"b/1\"");
    assert_eq!(proxy.entries(TABLE, "a/1"), [], "nothing is kept");
    proxy.end(second);
    proxy.assert_rest(TABLE);
}

#[test]
fn route_metadata_rules_and_headers_add_up() {
    let mut policy = plain();
    policy["rules"] = json!([{ "name": "r", "match": { "path": "/x/{id}" }, "locks": [{ "name": "a/{id}" }] }]);
    let proxy = Proxy::new(1, &policy);
    proxy.run(secs(1));
    let fields = [(":method", "GET"), (":path", "/x/1"), ("x-request-id", "one"), ("lock", "b/1;mode=shared, a/1")];
    let metadata = [("xds.route_metadata.filter_metadata.interlock.locks", "a/2, b/1")];
    let call = Call { vm: 0, id: proxy.vm(0).request_with(None, &fields, &metadata) };
    for lock in ["a/1", "a/2", "b/1"] {
        assert!(proxy.fence(call, lock).is_some(), "{lock}");
        assert_eq!(proxy.entries(TABLE, lock).len(), 1);
    }
    assert_eq!(proxy.entries(TABLE, "b/1")[0].mode, interlock_core::Mode::Exclusive, "the stronger mode");
    assert_eq!(proxy.entries(TABLE, "b/1")[0].asked_by, "r");
    proxy.end(call);
    proxy.assert_rest(TABLE);
}
