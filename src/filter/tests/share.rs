//! Enforcement for a share of the owners: whose requests are enforced, and what becomes of all others.

use interlock_core::OwnerId;
use serde_json::{Value, json};

use super::proxy::{Proxy, active};
use super::{SHADOW, TABLE, plain, secs};
use crate::policy::Enforcement;

fn partly(percentage: &str) -> Value {
    let mut policy = plain();
    policy["enforcement"] = json!({ "enforce": percentage });
    policy
}

/// Names of owners that are in the policy's share, and of some that are not.
fn owners(policy: &Value) -> (Vec<String>, Vec<String>) {
    let Enforcement::Partly(share) = active(policy).policy.enforcement else { panic!("{policy} is about all owners") };
    (0..60).map(|n| format!("owner-{n}")).partition(|name| share.has(&OwnerId::new(name).unwrap()))
}

fn started(policy: &Value) -> Proxy {
    let proxy = Proxy::new(2, policy);
    proxy.run(secs(1));
    proxy
}

#[test]
fn owners_in_the_share_exclude_each_other_and_all_others_are_watched() {
    let policy = partly("40%");
    let (inside, outside) = owners(&policy);
    let proxy = started(&policy);
    let holder = proxy.lock(0, &inside[0], "a/1");
    let watched = proxy.lock(0, &outside[0], "a/1");
    for vm in [0, 1] {
        let refused = proxy.lock(vm, &inside[1], "a/1;wait=0");
        assert_eq!(proxy.ended(refused).refused(), Some(423), "another worker decides alike");
        let passed = proxy.lock(vm, &outside[1], "a/1;wait=0");
        assert!(proxy.is_upstream(passed));
        proxy.complete(passed);
        assert_eq!(proxy.status(passed), "t;outcome=audit;reason=lock-held;lock=\"a/1\"");
    }
    // Each sees the holder of its own table only: between the two nothing is excluded.
    assert!(proxy.is_upstream(holder) && proxy.is_upstream(watched));
    assert!(proxy.fence(holder, "a/1").is_some());
    assert_eq!(proxy.fence(watched, "a/1"), None);
    assert_eq!((proxy.entries(TABLE, "a/1").len(), proxy.entries(SHADOW, "a/1").len()), (1, 1));
    proxy.complete(holder);
    proxy.complete(watched);
    assert_eq!(proxy.status(holder), "t;outcome=acquired;wait=0.0");
    assert_eq!(proxy.status(watched), "t;outcome=audit;wait=0.0");
    proxy.assert_rest(TABLE);
    proxy.assert_rest(SHADOW);
    let count = |name: &str| proxy.fake.metric(name);
    assert_eq!(count("interlock_acquire_total.class.a.outcome.refused.reason.lock-held"), 2);
    assert_eq!(count("interlock_audit_total.class.a.outcome.refused.reason.lock-held"), 2);
}

#[test]
fn whatever_is_wrong_with_a_request_is_refused_for_owners_in_the_share_only() {
    let policy = partly("40%");
    let (inside, outside) = owners(&policy);
    let proxy = started(&policy);
    let refused = proxy.lock(0, &inside[0], "a/1;mode=nonsense");
    assert_eq!(proxy.ended(refused).refused(), Some(400));
    let passed = proxy.lock(0, &outside[0], "a/1;mode=nonsense");
    assert!(proxy.is_upstream(passed));
    proxy.complete(passed);
    assert_eq!(proxy.status(passed), "t;outcome=audit;reason=malformed-annotation");
    proxy.assert_rest(TABLE);
}

#[test]
fn who_names_no_owner_is_watched_until_all_are_enforced() {
    for (percentage, refused) in [("0%", None), ("99.99%", None), ("100%", Some(400))] {
        let proxy = started(&partly(percentage));
        let call = proxy.request(0, &[("lock", "a/1")]);
        if refused.is_none() {
            assert!(proxy.is_upstream(call), "{percentage}");
            proxy.complete(call);
            assert_eq!(proxy.status(call), "t;outcome=audit;reason=malformed-annotation", "{percentage}");
        }
        assert_eq!(proxy.ended(call).refused(), refused, "{percentage}");
        proxy.assert_rest(TABLE);
    }
}

#[test]
fn a_rule_has_a_share_of_its_own() {
    let mut policy = plain();
    policy["enforcement"] = json!("audit");
    policy["rules"] = json!([{
        "name": "r", "match": { "path": "/r" }, "locks": [{ "name": "a/1", "wait": "0s" }],
        "enforcement": { "enforce": "40%" }
    }]);
    let (inside, outside) = owners(&partly("40%"));
    let proxy = started(&policy);
    let ask = |owner: &str, path: &str| {
        let fields = [(":method", "GET"), (":path", path), ("x-request-id", owner), ("lock", "b/1;wait=0")];
        proxy.request(0, &fields)
    };
    let holder = ask(&inside[0], "/r");
    let refused = ask(&inside[1], "/r");
    assert_eq!(proxy.ended(refused).refused(), Some(423));
    let others = [ask(&outside[0], "/r"), ask(&outside[1], "/r"), ask(&inside[1], "/elsewhere")];
    assert!(others.iter().all(|call| proxy.is_upstream(*call)));
    assert!(proxy.fence(holder, "a/1").is_some() && others.iter().all(|call| proxy.fence(*call, "b/1").is_none()));
    for call in [&[holder], &others[..]].concat() {
        proxy.end(call);
        proxy.deliver();
    }
    proxy.assert_rest(TABLE);
    proxy.assert_rest(SHADOW);
}

/// A rollout goes up and down while requests are under way: each ends as it began.
#[test]
fn a_larger_share_changes_no_request_that_is_under_way() {
    let (small, large) = (partly("10%"), partly("90%"));
    let early = owners(&small).0;
    let (late, _): (Vec<_>, Vec<_>) = owners(&large).0.into_iter().partition(|name| !early.contains(name));
    let proxy = started(&small);
    let watched = proxy.lock(0, &late[0], "a/1");
    let held = proxy.lock(0, &early[0], "a/1");
    proxy.vm(0).configure(&active(&large));
    let refused = proxy.lock(0, &late[1], "a/1;wait=0");
    assert_eq!(proxy.ended(refused).refused(), Some(423));
    proxy.complete(watched);
    assert_eq!(proxy.status(watched), "t;outcome=audit;wait=0.0");
    proxy.complete(held);
    assert_eq!(proxy.status(held), "t;outcome=acquired;wait=0.0");
    proxy.assert_rest(TABLE);
    proxy.assert_rest(SHADOW);
}
