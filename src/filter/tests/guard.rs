//! The guard by fence: what passes at the resource, what is turned away, and what is remembered of it.

use std::rc::Rc;

use serde_json::{Value, json};

use super::proxy::{Call, Ended, Proxy};
use super::{plain, secs};
use crate::host::fake::FakeStream;

/// The proxies of the callers, who take locks; VM 0.
fn callers() -> Value {
    let mut policy = plain();
    policy["keys"] = json!([{ "id": "k", "secret": { "env": "INTERLOCK_KEY" } }]);
    policy
}

/// The proxy of the resource, with two workers: VM 1 and VM 2.
fn resource() -> Value {
    json!({
        "instance": "r", "keys": [{ "id": "k", "secret": { "env": "INTERLOCK_KEY" } }],
        "classes": [{ "name": "a" }, { "name": "b" }],
        "guard": [{ "match": { "methods": ["PUT"], "path": "/store/{id}" }, "lock": "a/{id}", "check": "fence" }],
    })
}

fn world(resource: &Value) -> Proxy {
    let proxy = Proxy::new(1, &callers());
    proxy.start(resource);
    proxy.start(resource);
    proxy.run(secs(1));
    proxy
}

fn text(stream: &FakeStream, name: &str) -> String {
    let values = stream.request_values(name);
    values.first().map(|value| String::from_utf8(value.to_vec()).unwrap()).unwrap_or_default()
}

/// The `lock-fence` that the upstream of a caller gets for a lock.
fn fence(proxy: &Proxy, owner: &str, lock: &str) -> (Call, String) {
    let call = proxy.lock(0, owner, lock);
    assert!(proxy.is_upstream(call), "{owner}: {lock}");
    let fence = text(&proxy.vm(0).host.stream(call.id), "lock-fence");
    assert!(fence.contains(";sig=:"), "{fence}");
    (call, fence)
}

/// The `lock-fence` of a grant that is over again.
fn past(proxy: &Proxy, owner: &str, lock: &str) -> String {
    let (call, fence) = fence(proxy, owner, lock);
    proxy.complete(call);
    fence
}

fn put(proxy: &Proxy, vm: usize, owner: &str, fields: &[(&str, &str)]) -> Call {
    let mut all = vec![(":method", "PUT"), (":path", "/store/1"), ("x-request-id", owner)];
    all.extend_from_slice(fields);
    proxy.request(vm, &all)
}

/// A write of what `a/1` guards: the status that it is turned away with, or 0 where it passes; and the answer.
fn write(proxy: &Proxy, vm: usize, owner: &str, fields: &[(&str, &str)]) -> (u32, Ended) {
    let call = put(proxy, vm, owner, fields);
    if proxy.is_upstream(call) {
        return (0, proxy.complete(call));
    }
    let ended = proxy.ended(call);
    assert!(!ended.forwarded);
    (ended.refused().unwrap(), ended)
}

fn status(proxy: &Proxy, vm: usize, owner: &str, fence: &str) -> u32 {
    write(proxy, vm, owner, &[("lock-fence", fence)]).0
}

#[test]
fn nothing_passes_without_a_fence_and_the_rest_is_not_touched() {
    let proxy = world(&resource());
    let (status, ended) = write(&proxy, 1, "one", &[]);
    assert_eq!(status, 428);
    assert_eq!(ended.header("lock-status").as_deref(), Some("r;outcome=refused;reason=fence-required;lock=\"a/1\""));
    assert_eq!(ended.header("content-type").as_deref(), Some("application/problem+json"));
    assert_eq!(ended.header("retry-after"), None, "asking again does not help");
    let reply = &ended.stream.replies[0];
    assert_eq!(reply.details, "interlock_fence_required");
    let problem: Value = serde_json::from_slice(&reply.body).unwrap();
    let expected = json!({
        "type": "urn:interlock:problem:fence-required", "title": "A fence is required", "status": 428,
        "detail": "a/1 is guarded, and the request carries no lock-fence for it", "lock": "a/1", "owner": "one",
    });
    assert_eq!(problem, expected);
    for (method, path) in [("GET", "/store/1"), ("PUT", "/other"), ("PUT", "/store/1/x")] {
        let call = proxy.request(1, &[(":method", method), (":path", path), ("x-request-id", "one")]);
        assert!(proxy.is_upstream(call), "{method} {path}");
        assert_eq!(proxy.complete(call).header("lock-status"), None);
    }
    let lines = proxy.vm(1).host.take_lines();
    let refused: Vec<_> = lines.iter().filter(|(_, line)| line.contains("\"event\":\"refused\"")).collect();
    assert_eq!(refused.len(), 1, "{lines:?}");
    for part in ["\"reason\":\"fence-required\"", "\"asked_by\":\"guard[0]\"", "\"owner\":\"one\"", "\"lock\":\"a/1\""]
    {
        assert!(refused[0].1.contains(part), "{part}: {}", refused[0].1);
    }
    assert_eq!(proxy.fake.metric("interlock_guard_total.class.a.outcome.refused.reason.fence-required"), 1);
}

#[test]
fn a_writer_that_comes_after_the_next_holder_is_turned_away_by_every_worker() {
    let proxy = world(&resource());
    let first = past(&proxy, "one", "a/1");
    let second = past(&proxy, "two", "a/1");
    assert_eq!(status(&proxy, 1, "one", &first), 0, "nobody came after it yet");
    assert_eq!(status(&proxy, 2, "two", &second), 0);
    let (refused, ended) = write(&proxy, 1, "one", &[("lock-fence", &first)]);
    assert_eq!(refused, 412);
    assert_eq!(ended.header("lock-status").as_deref(), Some("r;outcome=refused;reason=stale-fence;lock=\"a/1\""));
    let problem: Value = serde_json::from_slice(&ended.stream.replies[0].body).unwrap();
    let number = first.split(['=', ';']).nth(2).unwrap();
    assert_eq!(problem["detail"], format!("fence {number} of a/1 is stale: one of a later grant has been seen here"));
    assert_eq!((&problem["owner"], &problem["lock"]), (&json!("one"), &json!("a/1")));
    // The holder itself comes as often as it likes, with the same fence.
    for vm in [1, 2, 1] {
        assert_eq!(status(&proxy, vm, "two", &second), 0);
    }
    // A worker that starts anew finds what the others have seen.
    proxy.kill(1);
    proxy.kill(2);
    let new = proxy.start(&resource());
    assert_eq!(status(&proxy, new, "one", &first), 412);
    assert_eq!(status(&proxy, new, "two", &second), 0);
    let counted = |outcome| proxy.fake.metric(&format!("interlock_guard_total.class.a.outcome.{outcome}"));
    assert_eq!((counted("passed"), counted("refused.reason.stale-fence")), (6, 2));
}

#[test]
fn a_configuration_that_changes_forgets_nothing() {
    let proxy = world(&resource());
    let (first, second) = (past(&proxy, "one", "a/1"), past(&proxy, "two", "a/1"));
    assert_eq!(status(&proxy, 1, "two", &second), 0);
    let mut changed = resource();
    changed["guard"][0]["match"] = json!({ "path": "/store/{id}" });
    proxy.vm(1).configure(&super::proxy::active(&changed));
    assert_eq!(status(&proxy, 1, "one", &first), 412);
}

#[test]
fn only_a_fence_that_is_signed_for_this_owner_and_lock_counts() {
    let proxy = world(&resource());
    let (held, good) = fence(&proxy, "one", "a/1;hold=60");
    let other_lock = past(&proxy, "one", "a/2");
    let unsigned = good.split(";sig").next().unwrap();
    let raised = good.replacen("fence=", "fence=9", 1);
    let weaker = good.replace("mode=exclusive", "mode=shared");
    let (half, _) = good.rsplit_once(':').unwrap();
    let forged = good.replacen(";sig=:Ag", ";sig=:AgA", 1);
    let counted = "the lock-fence that the request carries for it does not count";
    let missing = "the request carries no lock-fence for it";
    for (what, owner, name, value, detail) in [
        ("unsigned", "one", "lock-fence", unsigned, counted),
        ("another number", "one", "lock-fence", &raised, counted),
        ("another mode", "one", "lock-fence", &weaker, counted),
        ("another signature", "one", "lock-fence", &forged, counted),
        ("another owner's", "two", "lock-fence", &good, counted),
        ("another lock's", "one", "lock-fence", &other_lock, missing),
        ("of a spelling that is not ours", "one", "lock_fence", &good, missing),
        ("half a header", "one", "lock-fence", half, counted),
        ("no header at all", "one", "lock-fence", "\u{fffd}", counted),
    ] {
        let (status, ended) = write(&proxy, 1, owner, &[(name, value)]);
        assert_eq!(status, 428, "{what}");
        let problem: Value = serde_json::from_slice(&ended.stream.replies[0].body).unwrap();
        assert!(problem["detail"].as_str().unwrap().contains(detail), "{what}: {}", problem["detail"]);
    }
    let nobody = proxy.request(1, &[(":method", "PUT"), (":path", "/store/1"), ("lock-fence", &good)]);
    assert_eq!(proxy.ended(nobody).refused(), Some(428), "it is nobody's");
    assert_eq!(status(&proxy, 1, "one", &good), 0, "nothing of all that was remembered");
    proxy.end(held);
    proxy.run(secs(61));
    assert_eq!(status(&proxy, 1, "one", &good), 428, "it has expired");
}

#[test]
fn a_lease_of_the_api_passes_with_the_fence_that_the_authority_tells_its_holder() {
    let mut authority = callers();
    authority["api"] = json!({});
    authority["limits"] = json!({ "max_ttl": "5s" });
    let mut resource = resource();
    resource["owner"] = json!({ "from": ["lock-owner"] });
    let proxy = Proxy::new(1, &authority);
    proxy.start(&resource);
    proxy.run(secs(6));
    let path = "leases/0123456789abcdef";
    let body = json!({ "owner": "nightly-report", "locks": [{ "name": "a/1" }, { "name": "b/1", "mode": "shared" }] });
    let (status, granted) = proxy.answer(proxy.api(0, "PUT", path, Some(&body)));
    assert_eq!((status, granted.get("lock_fence")), (201, None), "proxies make their own");
    let (_, lease) = proxy.answer(proxy.api(0, "GET", path, None));
    let fence = lease["lock_fence"].as_str().unwrap();
    assert!(fence.starts_with(&format!("a/1;fence={};mode=exclusive;sig=:", granted["locks"][0]["fence"])), "{fence}");
    let write = |owner: &str| {
        let fields = [(":method", "PUT"), (":path", "/store/1"), ("lock-owner", owner), ("lock-fence", fence)];
        proxy.request(1, &fields)
    };
    assert!(proxy.is_upstream(write("nightly-report")));
    assert_eq!(proxy.ended(write("another")).refused(), Some(428));
}

#[test]
fn of_several_fences_for_a_lock_the_latest_is_judged_and_passed_on() {
    let proxy = world(&resource());
    let (first, second) = (past(&proxy, "one", "a/1"), past(&proxy, "one", "a/1"));
    let elsewhere = past(&proxy, "one", "b/1");
    let both = format!("{first}, {elsewhere}, {second}");
    let call = put(&proxy, 1, "one", &[("lock-fence", &both)]);
    assert!(proxy.is_upstream(call));
    assert_eq!(text(&proxy.vm(1).host.stream(call.id), "lock-fence"), format!("{elsewhere}, {second}"));
    proxy.complete(call);
    assert_eq!(status(&proxy, 1, "one", &first), 412);
}

#[test]
fn readers_side_by_side_pass_in_any_order_and_one_from_before_a_writer_does_not() {
    let proxy = world(&resource());
    let (one, early) = fence(&proxy, "one", "a/1;mode=shared");
    let (two, late) = fence(&proxy, "two", "a/1;mode=shared");
    assert_eq!(status(&proxy, 1, "two", &late), 0);
    assert_eq!(status(&proxy, 1, "one", &early), 0, "it holds the lock as well");
    proxy.end(one);
    proxy.end(two);
    let writer = past(&proxy, "three", "a/1");
    assert_eq!(status(&proxy, 2, "three", &writer), 0);
    assert_eq!(status(&proxy, 1, "two", &late), 412);
}

/// A worker in which another judges a fence between any two of its calls: what was let in never goes back.
#[test]
fn two_workers_that_judge_at_once_agree_on_an_order() {
    for calls in 0..6 {
        let proxy = Rc::new(world(&resource()));
        let (first, second) = (past(&proxy, "one", "a/1"), past(&proxy, "two", "a/1"));
        let (other, theirs) = (Rc::clone(&proxy), second.clone());
        proxy.vm(1).host.meanwhile(calls, move || assert_eq!(status(&other, 2, "two", &theirs), 0));
        let late = status(&proxy, 1, "one", &first);
        let came = !proxy.vm(1).host.forget_meanwhile();
        // Whoever read before the other wrote has to read again, and then sees it.
        assert_eq!(late, if came { 412 } else { 0 }, "after {calls} calls");
        assert_eq!(status(&proxy, 1, "one", &first), if came { 412 } else { 0 });
        assert_eq!(status(&proxy, 2, "two", &second), 0);
    }
}

#[test]
fn who_is_turned_away_takes_no_lock_and_who_passes_takes_its_own() {
    let mut policy = resource();
    policy["rules"] = json!([{ "name": "w", "match": { "path": "/store/{id}" }, "locks": [{ "name": "b/{id}" }] }]);
    let proxy = world(&policy);
    let fence = past(&proxy, "one", "a/1");
    assert_eq!(write(&proxy, 1, "one", &[]).0, 428);
    assert_eq!(proxy.size("r/enforce"), (0, 0), "the guard comes first");
    // What is wrong with its locks is not even looked at.
    assert_eq!(write(&proxy, 1, "one", &[("lock", "no//name")]).0, 428);
    let call = put(&proxy, 1, "one", &[("lock-fence", &fence)]);
    assert!(proxy.is_upstream(call));
    assert_eq!(proxy.entries("r/enforce", "b/1").len(), 1);
    let header = text(&proxy.vm(1).host.stream(call.id), "lock-fence");
    assert!(header.starts_with("b/1;fence=") && header.ends_with(&fence), "{header}");
    assert!(proxy.complete(call).header("lock-status").unwrap().starts_with("r;outcome=acquired"));
    proxy.assert_rest("r/enforce");
}

#[test]
fn under_audit_everything_passes_and_says_what_would_not_have() {
    let mut policy = resource();
    policy["enforcement"] = json!("audit");
    let proxy = world(&policy);
    let (first, second) = (past(&proxy, "one", "a/1"), past(&proxy, "two", "a/1"));
    let said = |owner, fence: &str| {
        let (status, ended) = write(&proxy, 1, owner, &[("lock-fence", fence)]);
        assert_eq!(status, 0);
        ended.header("lock-status")
    };
    assert_eq!(said("two", &second), None);
    assert_eq!(said("one", &first).as_deref(), Some("r;outcome=audit;reason=stale-fence;lock=\"a/1\""));
    assert_eq!(said("one", "a").as_deref(), Some("r;outcome=audit;reason=fence-required;lock=\"a/1\""));
    let counted = |what| proxy.fake.metric(&format!("interlock_audit_total.class.a.outcome.{what}"));
    assert_eq!((counted("passed"), counted("refused.reason.stale-fence")), (1, 1));
    assert_eq!(counted("refused.reason.fence-required"), 1);
    assert!(proxy.vm(1).host.take_lines().iter().any(|(_, line)| line.contains("\"event\":\"would-refuse\"")));
    // What has passed has been seen, whoever only watched.
    let mut enforced = policy.clone();
    enforced["guard"][0]["enforcement"] = json!("enforce");
    let enforcing = proxy.start(&enforced);
    assert_eq!(status(&proxy, enforcing, "one", &first), 412);
}

#[test]
fn a_guard_that_watches_says_so_beside_what_became_of_the_locks() {
    let mut policy = resource();
    policy["guard"][0]["enforcement"] = json!("audit");
    policy["rules"] = json!([{ "name": "w", "match": { "path": "/store/{id}" }, "locks": [{ "name": "b/{id}" }] }]);
    let proxy = world(&policy);
    let call = put(&proxy, 1, "one", &[]);
    proxy.respond(call);
    let stream = proxy.vm(1).host.stream(call.id);
    let said: Vec<_> = stream.response_values("lock-status").iter().map(|value| value.to_vec()).collect();
    let expected = ["r;outcome=audit;reason=fence-required;lock=\"a/1\"", "r;outcome=acquired;wait=0.0"];
    assert_eq!(said, expected.map(|member| member.as_bytes().to_vec()));
    proxy.end(call);
    proxy.assert_rest("r/enforce");
}

#[test]
fn off_is_off() {
    let mut policy = resource();
    policy["guard"][0]["enforcement"] = json!("off");
    let proxy = world(&policy);
    let (status, ended) = write(&proxy, 1, "one", &[]);
    assert_eq!((status, ended.header("lock-status")), (0, None));
    policy["guard"][0].as_object_mut().unwrap().remove("enforcement");
    policy["enforcement"] = json!("off");
    let proxy = world(&policy);
    assert_eq!(write(&proxy, 1, "one", &[]).0, 0);
}

#[test]
fn a_grpc_caller_gets_the_status_of_a_failed_precondition() {
    let proxy = world(&resource());
    let (first, second) = (past(&proxy, "one", "a/1"), past(&proxy, "two", "a/1"));
    assert_eq!(status(&proxy, 1, "two", &second), 0);
    for (fence, reason) in [(first.as_str(), "stale-fence"), ("a", "fence-required")] {
        let (status, ended) = write(&proxy, 1, "one", &[("content-type", "application/grpc"), ("lock-fence", fence)]);
        let reply = &ended.stream.replies[0];
        assert_eq!((status, reply.grpc_status), (200, Some(9)), "FAILED_PRECONDITION");
        assert!(reply.body.starts_with(b"fence ") || reply.body.starts_with(b"a/1 is guarded"), "the grpc-message");
        assert!(ended.header("lock-status").unwrap().contains(reason));
    }
}

#[test]
fn a_name_that_the_request_does_not_fill_is_a_mistake_of_the_request() {
    let mut policy = resource();
    policy["guard"][0]["lock"] = json!("a/{header:x-account}");
    let proxy = world(&policy);
    let (status, ended) = write(&proxy, 1, "one", &[]);
    assert_eq!(status, 400);
    let problem: Value = serde_json::from_slice(&ended.stream.replies[0].body).unwrap();
    assert_eq!(problem["detail"], "guard[0]: lock a/{header:x-account}: the request has no header x-account");
}

#[test]
fn a_memory_that_fails_turns_away_or_lets_pass_as_the_guard_says() {
    for (said, status, outcome, lock_status) in [
        ("reject", 503, "refused", "r;outcome=refused;reason=backend-unavailable;lock=\"a/1\""),
        ("allow", 0, "unlocked", "r;outcome=unlocked;reason=backend-unavailable"),
    ] {
        let mut policy = resource();
        policy["guard"][0]["on_backend_unavailable"] = json!(said);
        let proxy = world(&policy);
        let fence = past(&proxy, "one", "a/1");
        proxy.vm(1).host.fail_shared(0, 1);
        let (answered, ended) = write(&proxy, 1, "one", &[("lock-fence", &fence)]);
        assert_eq!((answered, ended.header("lock-status").as_deref()), (status, Some(lock_status)));
        let counted = format!("interlock_guard_total.class.a.outcome.{outcome}.reason.backend-unavailable");
        assert_eq!(proxy.fake.metric(&counted), 1);
        // Without a fence there is nothing to ask the memory for.
        proxy.vm(1).host.fail_shared(0, 1);
        assert_eq!(write(&proxy, 1, "one", &[]).0, 428);
    }
}

#[test]
fn the_body_of_a_request_that_is_turned_away_goes_nowhere() {
    let proxy = world(&resource());
    let id = proxy.vm(1).request_with(None, &[(":method", "PUT"), (":path", "/store/1"), ("content-length", "4")], &[]);
    let ended = proxy.ended(Call { vm: 1, id });
    assert_eq!((ended.refused(), ended.forwarded), (Some(428), false));
}

#[test]
fn a_guarded_request_costs_one_read_of_shared_data_and_a_write_where_its_fence_is_new() {
    let proxy = world(&resource());
    let cost = |fence: &str| {
        let (passed, calls) = proxy.calls(1, || status(&proxy, 1, "one", fence));
        assert_eq!(passed, 0);
        calls
    };
    let warm = past(&proxy, "one", "a/1");
    cost(&warm);
    let new = cost(&past(&proxy, "one", "a/1"));
    assert_eq!((new.shared_reads, new.shared_writes), (1, 1), "{new:?}");
    assert_eq!((new.header_reads, new.metric_updates, new.logs), (1, 1, 0), "{new:?}");
    let again = past(&proxy, "one", "a/1");
    cost(&again);
    let again = cost(&again);
    assert_eq!((again.shared_reads, again.shared_writes), (1, 0), "{again:?}");
    let (_, other) = proxy.calls(1, || {
        let call = proxy.request(1, &[(":method", "PUT"), (":path", "/other"), ("x-request-id", "one")]);
        proxy.complete(call)
    });
    assert_eq!((other.header_reads, other.shared(), other.clock), (1, 0, 0), "{other:?}");
}
