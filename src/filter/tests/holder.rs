//! The guard by owner: it asks the table who holds the lock now.

use serde_json::{Value, json};

use super::proxy::{Call, Ended, Proxy};
use super::{TABLE, millis, plain, secs};

/// Who takes locks and what is guarded, in one Envoy.
fn policy() -> Value {
    let mut policy = plain();
    policy["keys"] = json!([{ "id": "k", "secret": { "env": "INTERLOCK_KEY" } }]);
    policy["guard"] = json!([{ "match": { "path": "/store/{id}" }, "lock": "a/{id}", "check": "owner" }]);
    policy
}

fn world(policy: &Value) -> Proxy {
    let proxy = Proxy::new(2, policy);
    proxy.run(secs(1));
    proxy
}

fn write(proxy: &Proxy, vm: usize, owner: &str, fields: &[(&str, &str)]) -> (u32, Ended) {
    let mut all = vec![(":method", "PUT"), (":path", "/store/1")];
    all.extend((!owner.is_empty()).then_some(("x-request-id", owner)));
    all.extend_from_slice(fields);
    let call = proxy.request(vm, &all);
    if proxy.is_upstream(call) {
        return (0, proxy.complete(call));
    }
    let ended = proxy.ended(call);
    assert!(!ended.forwarded);
    (ended.refused().unwrap(), ended)
}

fn fence(proxy: &Proxy, call: Call) -> String {
    let stream = proxy.vm(call.vm).host.stream(call.id);
    String::from_utf8(stream.request_values("lock-fence")[0].to_vec()).unwrap()
}

#[test]
fn who_holds_the_lock_passes_and_nobody_else_does() {
    let proxy = world(&policy());
    assert_eq!(write(&proxy, 1, "one", &[]).0, 412, "nobody holds it");
    let holder = proxy.lock(0, "one", "a/1");
    let waiter = proxy.lock(1, "three", "a/1;wait=20");
    for vm in [0, 1] {
        let (status, ended) = write(&proxy, vm, "one", &[]);
        assert_eq!((status, ended.header("lock-status")), (0, None), "no fence is needed");
        assert_eq!(write(&proxy, vm, "two", &[]).0, 412);
        assert_eq!(write(&proxy, vm, "three", &[]).0, 412, "it only waits");
    }
    let (status, ended) = write(&proxy, 1, "two", &[]);
    assert_eq!(ended.header("lock-status").as_deref(), Some("t;outcome=refused;reason=not-holder;lock=\"a/1\""));
    let problem: Value = serde_json::from_slice(&ended.stream.replies[0].body).unwrap();
    let expected = json!({
        "type": "urn:interlock:problem:not-holder", "title": "The owner does not hold the lock", "status": 412,
        "detail": "two does not hold a/1 now", "lock": "a/1", "owner": "two",
    });
    assert_eq!((status, problem), (412, expected));
    proxy.end(holder);
    proxy.deliver();
    assert_eq!(write(&proxy, 0, "one", &[]).0, 412);
    assert_eq!(write(&proxy, 0, "three", &[]).0, 0);
    proxy.end(waiter);
    proxy.assert_rest(TABLE);
    assert_eq!(proxy.fake.metric("interlock_guard_total.class.a.outcome.refused.reason.not-holder"), 7);
    assert_eq!(proxy.fake.metric("interlock_guard_total.class.a.outcome.passed"), 3);
}

#[test]
fn a_lease_that_ended_lets_nobody_pass_although_nobody_took_its_lock() {
    let proxy = world(&policy());
    let holder = proxy.lock(0, "one", "a/1;ttl=1");
    proxy.kill(0);
    proxy.run(millis(700));
    assert_eq!(write(&proxy, 1, "one", &[]).0, 0, "its lease lives for its time");
    // Whether or not anybody swept it away meanwhile.
    proxy.silence(1, true);
    proxy.run(millis(600));
    assert_eq!(write(&proxy, 1, "one", &[]).0, 412);
    assert_eq!(holder.vm, 0);
}

#[test]
fn a_fence_of_an_earlier_section_of_the_same_owner_is_stale() {
    let proxy = world(&policy());
    let before = proxy.lock(0, "one", "a/1");
    let old = fence(&proxy, before);
    proxy.complete(before);
    let holder = proxy.lock(0, "one", "a/1");
    let new = fence(&proxy, holder);
    assert_eq!(write(&proxy, 1, "one", &[("lock-fence", &old)]).0, 412);
    assert!(proxy.vm(1).host.take_lines().iter().any(|(_, line)| line.contains("\"reason\":\"stale-fence\"")));
    assert_eq!(write(&proxy, 1, "one", &[("lock-fence", &new)]).0, 0);
    assert_eq!(write(&proxy, 1, "one", &[("lock-fence", "a/1;fence=1;mode=exclusive")]).0, 0, "as if not there");
    proxy.complete(holder);
    assert_eq!(write(&proxy, 1, "one", &[("lock-fence", &new)]).0, 412, "it is over");
}

#[test]
fn a_branch_that_holds_the_lock_holds_it_for_its_transaction() {
    let mut policy = policy();
    policy["reentrancy"] = json!("lease");
    let proxy = world(&policy);
    let holder = proxy.lock(0, "one", "a/1");
    assert_eq!(write(&proxy, 1, "one", &[]).0, 0);
    assert_eq!(write(&proxy, 1, "on", &[]).0, 412);
    assert_eq!(write(&proxy, 1, "one#1", &[]).0, 412);
    proxy.complete(holder);
}

#[test]
fn a_guarded_request_may_take_further_locks() {
    let proxy = world(&policy());
    let holder = proxy.lock(0, "one", "a/1");
    let held = [("lock", "b/1")];
    let call = proxy.request(1, &[&[(":path", "/store/1"), ("x-request-id", "one")][..], &held].concat());
    assert!(proxy.is_upstream(call) && proxy.fence(call, "b/1").is_some());
    let other = proxy.request(1, &[&[(":path", "/store/1"), ("x-request-id", "two")][..], &held].concat());
    assert_eq!(proxy.ended(other).refused(), Some(412));
    assert_eq!(proxy.entries(TABLE, "b/1").len(), 1, "it stands in no queue");
    // Taking the very lock is too late: the guard looks first.
    let late = proxy.request(0, &[(":path", "/store/2"), ("x-request-id", "two"), ("lock", "a/2")]);
    assert_eq!(proxy.ended(late).refused(), Some(412));
    proxy.end(call);
    proxy.end(holder);
    proxy.assert_rest(TABLE);
}

#[test]
fn who_is_nobody_holds_nothing() {
    let proxy = world(&policy());
    let (status, ended) = write(&proxy, 0, "", &[]);
    assert_eq!(status, 400);
    let problem: Value = serde_json::from_slice(&ended.stream.replies[0].body).unwrap();
    assert_eq!(problem["detail"], "a lock needs an owner, and the request has no usable traceparent or x-request-id");
}

#[test]
fn a_guard_that_watches_finds_holders_of_the_shadow_table_too() {
    let mut policy = policy();
    policy["enforcement"] = json!("audit");
    let proxy = world(&policy);
    let holder = proxy.lock(0, "one", "a/1");
    let said = |owner| {
        let (status, ended) = write(&proxy, 1, owner, &[]);
        assert_eq!(status, 0);
        ended.header("lock-status")
    };
    assert_eq!(said("one"), None);
    assert_eq!(said("two").as_deref(), Some("t;outcome=audit;reason=not-holder;lock=\"a/1\""));
    proxy.end(holder);
    proxy.run(millis(100));
    assert_eq!(said("one").as_deref(), Some("t;outcome=audit;reason=not-holder;lock=\"a/1\""));
}

#[test]
fn a_table_that_cannot_tell_turns_away_or_lets_pass_as_the_guard_says() {
    for (said, status) in [("reject", 503), ("allow", 0)] {
        let mut policy = policy();
        policy["on_backend_unavailable"] = json!(said);
        let proxy = world(&policy);
        let holder = proxy.lock(0, "one", "a/1");
        proxy.vm(1).host.fail_shared(0, 1);
        assert_eq!(write(&proxy, 1, "one", &[]).0, status);
        assert_eq!(write(&proxy, 1, "two", &[]).0, 412, "now it can tell");
        proxy.complete(holder);
    }
}

#[test]
fn a_table_that_may_not_know_yet_says_so() {
    let mut policy = policy();
    policy["api"] = json!({});
    policy["limits"] = json!({ "max_ttl": "10s" });
    let proxy = world(&policy);
    let (status, ended) = write(&proxy, 0, "one", &[]);
    assert_eq!((status, ended.header("retry-after").as_deref()), (503, Some("10")));
    proxy.run(secs(10));
    assert_eq!(write(&proxy, 0, "one", &[]).0, 412);
}

#[test]
fn asking_the_table_costs_two_reads() {
    let proxy = world(&policy());
    let holder = proxy.lock(0, "one", "a/1");
    write(&proxy, 1, "one", &[]);
    let ((status, _), calls) = proxy.calls(1, || write(&proxy, 1, "one", &[]));
    assert_eq!((status, calls.shared_reads, calls.shared_writes), (0, 2, 0), "{calls:?}");
    proxy.complete(holder);
}
