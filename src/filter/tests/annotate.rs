//! What callers and upstreams are told in headers, and what is kept from them.

use std::collections::BTreeSet;

use serde_json::json;

use super::proxy::{Proxy, active};
use super::{TABLE, millis, plain, secs, two};

fn values(fields: &[(String, Vec<u8>)], name: &str) -> Vec<String> {
    let named = fields.iter().filter(|(field, _)| field == name);
    named.map(|(_, value)| String::from_utf8(value.clone()).unwrap()).collect()
}

#[test]
fn an_answer_says_once_what_became_of_the_locks_and_keeps_what_others_said() {
    let proxy = two();
    let call = proxy.lock(0, "one", "b/1;mode=shared, a/1");
    let vm = proxy.vm(0);
    let theirs = [(":status", "200"), ("lock-status", "inner;outcome=acquired"), ("server-timing", "db;dur=5")];
    vm.respond(call.id, &theirs);
    let fields = vm.host.stream(call.id).response;
    assert_eq!(values(&fields, "lock-status"), ["inner;outcome=acquired", "t;outcome=acquired;wait=0.0"]);
    assert_eq!(values(&fields, "server-timing"), ["db;dur=5", "lock;dur=0"]);
    let fence = values(&fields, "lock-fence");
    assert_eq!(fence, values(&vm.host.stream(call.id).request, "lock-fence"), "caller and upstream see the same");
    assert_eq!(fence.len(), 1);
    let [a, b] = fence[0].split(", ").collect::<Vec<_>>()[..] else { panic!("{fence:?}") };
    assert!(a.starts_with("a/1;fence=") && a.ends_with(";mode=exclusive"), "{a}");
    assert!(b.starts_with("b/1;fence=") && b.ends_with(";mode=shared"), "{b}");
    proxy.end(call);
    proxy.assert_rest(TABLE);
}

#[test]
fn own_answers_are_annotated_once() {
    let proxy = two();
    let holder = proxy.lock(0, "one", "a/1");
    let parked = proxy.lock(1, "two", "a/1;wait=0.5");
    let calls = [
        ("lock-held", proxy.lock(1, "three", "a/1;wait=0")),
        ("malformed-annotation", proxy.lock(1, "four", "a/1;mode=no")),
        ("malformed-annotation", proxy.lock(1, "five", "")),
        ("wait-timeout", parked),
    ];
    proxy.run(millis(600));
    for (reason, call) in calls {
        let ended = proxy.ended(call);
        assert!(!ended.forwarded);
        let status = ended.header("lock-status").unwrap();
        assert!(status.starts_with(&format!("t;outcome=refused;reason={reason}")), "{status}");
        assert_eq!(ended.header("lock-fence"), None);
        assert_eq!(ended.header("content-type").as_deref(), Some("application/problem+json"));
        let waited = if reason == "wait-timeout" { "lock;dur=500" } else { "lock;dur=0" };
        assert_eq!(ended.header("server-timing").as_deref(), Some(waited));
        assert_eq!(ended.stream.replies[0].details, format!("interlock_{}", reason.replace('-', "_")));
    }
    proxy.end(holder);
    proxy.assert_rest(TABLE);
}

#[test]
fn an_answer_that_the_host_gives_to_a_parked_request_is_not_annotated() {
    let proxy = two();
    let holder = proxy.lock(0, "one", "a/1");
    let parked = proxy.lock(1, "two", "a/1;wait=9");
    // A route's timeout, say: response headers come by while the request is still parked.
    let vm = proxy.vm(1);
    vm.host_answers(parked.id, &[(":status", "504")]);
    let fields = vm.host.stream(parked.id).response;
    assert_eq!(fields, [(":status".to_owned(), b"504".to_vec())]);
    proxy.end(parked);
    proxy.end(holder);
    proxy.assert_rest(TABLE);
}

#[test]
fn a_grpc_caller_gets_a_grpc_status() {
    let proxy = two();
    let holder = proxy.lock(0, "one", "a/1");
    let grpc = |timeout, lock| {
        let fields = [
            (":method", "POST"),
            (":path", "/pkg.Service/Method"),
            ("content-type", "application/grpc"),
            ("grpc-timeout", timeout),
            ("x-request-id", "two"),
            ("lock", lock),
        ];
        proxy.request(1, &fields)
    };
    let held = grpc("5S", "a/1;wait=0");
    let timeout = grpc("300m", "a/1;wait=2");
    proxy.run(millis(302));
    for (call, reason) in [(held, "lock-held"), (timeout, "wait-timeout")] {
        let ended = proxy.ended(call);
        let reply = &ended.stream.replies[0];
        assert_eq!((reply.status, reply.grpc_status), (200, Some(10)), "ABORTED");
        assert!(!reply.body.is_empty() && !reply.body.starts_with(b"{"), "the detail is the grpc-message");
        assert!(ended.header("lock-status").unwrap().contains(reason));
        assert_eq!(ended.header("content-type"), None, "the host sets it");
    }
    proxy.end(holder);
    proxy.assert_rest(TABLE);
}

#[test]
fn what_is_the_filters_to_set_is_removed_from_every_request() {
    let inbound = [
        ("lock-status", "forged;outcome=acquired"),
        ("lock-fence", "a/1;fence=9;mode=exclusive"),
        ("Lock-Fence", "a/2;fence=9;mode=exclusive"),
        ("lock_fence", "a/3;fence=9;mode=exclusive"),
        ("Lock_Status", "forged;outcome=acquired"),
    ];
    let proxy = two();
    let with = |vm, others: &[(&'static str, &'static str)]| proxy.request(vm, &[&inbound[..], others].concat());
    let bare = with(0, &[]);
    let annotated = with(0, &[("lock", "b/1"), ("x-request-id", "one")]);
    let parked = with(1, &[("lock", "b/1;wait=1"), ("x-request-id", "two")]);
    for call in [bare, annotated, parked] {
        let stream = proxy.vm(call.vm).host.stream(call.id);
        let names: BTreeSet<_> = stream.request.iter().map(|(name, _)| name.to_ascii_lowercase()).collect();
        assert!(!names.contains("lock-status") && !names.contains("lock"), "{names:?}");
        assert!(!names.contains("lock_status") && !names.contains("lock_fence"), "{names:?}");
        assert_eq!(names.contains("lock-fence"), call == annotated);
        assert_eq!(proxy.fence(call, "a/1"), None);
    }
    for call in [bare, annotated, parked] {
        proxy.end(call);
        proxy.deliver();
    }
    proxy.assert_rest(TABLE);
}

#[test]
fn what_is_the_filters_to_set_is_removed_from_trailers_too() {
    let sent = ["lock", "Lock-Fence", "lock_fence", "lock-status", "LOCK_STATUS", "checksum"];
    for (header, enforcement, left) in [
        ("accept", "enforce", &["checksum"][..]),
        ("pass", "enforce", &["lock", "checksum"]),
        ("accept", "off", &["checksum"]),
    ] {
        let mut policy = plain();
        policy["annotations"] = json!({ "header": header });
        policy["enforcement"] = json!(enforcement);
        let proxy = Proxy::new(2, &policy);
        proxy.run(secs(1));
        for call in [proxy.lock(0, "one", "b/1"), proxy.request(1, &[("x-request-id", "two")])] {
            assert_eq!(proxy.vm(call.vm).trailers(call.id, &active(&policy), &sent), left, "{header}, {enforcement}");
            proxy.end(call);
        }
    }
}

#[test]
fn signed_fences_of_this_owner_are_passed_on_and_others_are_not() {
    let mut policy = plain();
    policy["keys"] = json!([{ "id": "k", "secret": { "env": "INTERLOCK_KEY" } }]);
    let proxy = Proxy::new(2, &policy);
    proxy.run(secs(1));
    let outer = proxy.lock(0, "one", "a/1");
    let fence = values(&proxy.vm(0).host.stream(outer.id).request, "lock-fence").remove(0);
    assert!(fence.contains(";sig=:"), "{fence}");
    let hop = |vm, owner, lock_fence: &str, lock| {
        let mut fields = vec![("x-request-id", owner), ("lock-fence", lock_fence)];
        fields.extend(Option::map(lock, |lock| ("lock", lock)));
        let call = proxy.request(vm, &fields);
        let seen = values(&proxy.vm(vm).host.stream(call.id).request, "lock-fence");
        proxy.end(call);
        seen
    };
    assert_eq!(hop(1, "one", &fence, None), [fence.as_str()]);
    let both = hop(1, "one", &fence, Some("b/1"));
    assert!(both.len() == 1 && both[0].starts_with("b/1;fence=") && both[0].ends_with(&fence), "{both:?}");
    assert_eq!(hop(1, "two", &fence, None), [""; 0], "another owner's");
    let forged = fence.replace("a/1", "a/2");
    assert_eq!(hop(1, "one", &forged, None), [""; 0]);
    assert_eq!(hop(1, "one", "a/1;fence=1", None), [""; 0]);
    assert_eq!(hop(1, "one", "\u{fffd}", None), [""; 0]);
    // Its own grant of the same lock takes the place of the inbound one.
    let again = hop(1, "one", &fence, Some("a/1"));
    assert_eq!(again.iter().map(|list| list.matches("a/1;").count()).sum::<usize>(), 1, "{again:?}");
    proxy.end(outer);
    proxy.assert_rest(TABLE);
}

#[test]
fn reentrancy_by_lease_lets_only_those_in_who_carry_its_fence() {
    let mut policy = plain();
    policy["keys"] = json!([{ "id": "k", "secret": { "env": "INTERLOCK_KEY" } }]);
    policy["reentrancy"] = json!("lease");
    let proxy = Proxy::new(2, &policy);
    proxy.run(secs(1));
    let outer = proxy.lock(0, "one", "a/1");
    let fence = values(&proxy.vm(0).host.stream(outer.id).request, "lock-fence").remove(0);
    let nested = proxy.request(1, &[("x-request-id", "one"), ("lock-fence", &fence), ("lock", "a/1;wait=0")]);
    assert!(proxy.is_upstream(nested));
    assert_eq!(proxy.fence(nested, "a/1"), proxy.fence(outer, "a/1"));
    let branch = proxy.lock(1, "one", "a/1;wait=0");
    assert_eq!(proxy.ended(branch).refused(), Some(423), "a parallel branch of one trace");
    let thief = proxy.request(1, &[("x-request-id", "two"), ("lock-fence", &fence), ("lock", "a/1;wait=0")]);
    assert_eq!(proxy.ended(thief).refused(), Some(423));
    proxy.end(nested);
    proxy.end(outer);
    // The lease is over: its fence opens nothing, but harms nobody.
    let late = proxy.request(1, &[("x-request-id", "one"), ("lock-fence", &fence), ("lock", "a/1;wait=0")]);
    assert!(proxy.is_upstream(late));
    proxy.end(late);
    proxy.assert_rest(TABLE);
}

#[test]
fn without_reentrancy_an_owner_deadlocks_with_itself() {
    let mut policy = plain();
    policy["reentrancy"] = json!("none");
    let proxy = Proxy::new(2, &policy);
    proxy.run(secs(1));
    let outer = proxy.lock(0, "one", "a/1");
    let inner = proxy.lock(1, "one", "a/1");
    assert_eq!(proxy.status(inner), "t;outcome=refused;reason=deadlock;lock=\"a/1\"");
    proxy.end(outer);
    proxy.assert_rest(TABLE);
}

/// With one gateway that rejects, one that strips, and one that passes annotations on.
#[test]
fn a_policy_says_what_becomes_of_the_header() {
    for (header, status, passed) in [("reject", Some(403), false), ("strip", None, false), ("pass", None, true)] {
        let mut policy = plain();
        policy["annotations"] = json!({ "header": header });
        let proxy = Proxy::new(1, &policy);
        proxy.run(secs(1));
        let call = proxy.lock(0, "one", "a/1");
        if status.is_none() {
            assert!(proxy.is_upstream(call));
            assert_eq!(proxy.vm(0).host.stream(call.id).request_values("lock").len(), usize::from(passed));
            proxy.complete(call);
        }
        assert_eq!(proxy.ended(call).refused(), status);
        assert_eq!(proxy.ended(call).header("lock-status").is_some(), status.is_some());
        proxy.assert_rest(TABLE);
    }
}
