//! The guard by owner where an authority knows who holds: the request is parked until it says so.

use serde_json::{Value, json};

use super::link::{Link, asking};
use super::proxy::Call;
use super::{millis, secs};
use crate::filter::Flow;
use crate::host::Status;
use crate::host::fake::CallAnswer;

fn guarded() -> Value {
    let mut policy = asking();
    policy["keys"] = json!([{ "id": "k", "secret": { "env": "INTERLOCK_KEY" } }]);
    policy["guard"] = json!([{ "match": { "path": "/store/{id}" }, "lock": "a/{id}", "check": "owner" }]);
    policy
}

fn write(link: &Link, owner: &str, fields: &[(&str, &str)]) -> Call {
    let mut all = vec![(":method", "PUT"), (":path", "/store/1"), ("x-request-id", owner)];
    all.extend_from_slice(fields);
    link.proxy.request(2, &all)
}

/// What a parked request is answered, or 0 where it goes upstream.
fn outcome(link: &Link, call: Call) -> u32 {
    if link.proxy.is_upstream(call) {
        link.proxy.complete(call);
        return 0;
    }
    assert!(!link.proxy.ended(call).forwarded);
    link.proxy.ended(call).refused().unwrap()
}

#[test]
fn a_request_is_parked_until_the_authority_says_who_holds_the_lock() {
    let link = Link::new(2, &guarded());
    let holder = link.proxy.lock(1, "one", "a/1");
    link.deliver();
    let own = write(&link, "one", &[]);
    assert!(link.proxy.is_parked(own));
    let (_, get) = link.call();
    assert_eq!(get.target(), ("GET", "/interlock/v1/locks/a/1"));
    assert_eq!((get.stream, get.timeout, get.body.len()), (Some(own.id), millis(250), 0));
    link.deliver();
    assert_eq!(outcome(&link, own), 0);
    let other = write(&link, "two", &[]);
    link.deliver();
    assert_eq!(outcome(&link, other), 412);
    assert_eq!(link.proxy.status(other), "t;outcome=refused;reason=not-holder;lock=\"a/1\"");
    link.proxy.complete(holder);
    link.deliver();
    let late = write(&link, "one", &[]);
    link.deliver();
    assert_eq!(outcome(&link, late), 412);
    let counted = |what| link.proxy.fake.metric(&format!("interlock_guard_total.class.a.outcome.{what}"));
    assert_eq!((counted("passed"), counted("refused.reason.not-holder")), (1, 2));
    link.assert_rest();
}

#[test]
fn who_passes_goes_on_to_the_locks_that_it_asks_for_itself() {
    let link = Link::new(2, &guarded());
    let holder = link.proxy.lock(1, "one", "a/1");
    link.deliver();
    let call = write(&link, "one", &[("lock", "b/1")]);
    let (vm, get) = link.call();
    assert_eq!(get.target().0, "GET", "the guard comes first");
    link.pass(vm, &get);
    assert_eq!(link.holders("b/1"), Vec::<String>::new());
    link.deliver();
    assert!(link.proxy.is_upstream(call) && link.proxy.fence(call, "b/1").is_some());
    assert_eq!(link.holders("b/1"), ["one"]);
    let refused = write(&link, "two", &[("lock", "b/1;wait=9")]);
    link.deliver();
    assert_eq!(outcome(&link, refused), 412);
    assert_eq!(link.holders("b/1"), ["one"], "it stands in no queue");
    link.proxy.complete(call);
    link.proxy.complete(holder);
    link.assert_rest();
}

#[test]
fn a_fence_of_an_earlier_section_is_stale() {
    let link = Link::new(2, &guarded());
    let fence = |call: Call| {
        let stream = link.proxy.vm(1).host.stream(call.id);
        String::from_utf8(stream.request_values("lock-fence")[0].to_vec()).unwrap()
    };
    let before = link.proxy.lock(1, "one", "a/1");
    link.deliver();
    let old = fence(before);
    link.proxy.complete(before);
    link.deliver();
    let holder = link.proxy.lock(1, "one", "a/1");
    link.deliver();
    for (shown, status) in [(old, 412), (fence(holder), 0)] {
        let call = write(&link, "one", &[("lock-fence", &shown)]);
        link.deliver();
        assert_eq!(outcome(&link, call), status, "{shown}");
    }
    link.proxy.complete(holder);
    link.assert_rest();
}

#[test]
fn an_authority_that_cannot_tell_turns_away_or_lets_pass_as_the_guard_says() {
    let lies = [
        ("status", CallAnswer::new(500, b"")),
        ("malformed", CallAnswer::new(200, b"{\"name\":\"a/1\",\"holders\":[{\"owner\":\"one\"}]}")),
        ("malformed", CallAnswer::new(200, b"[[[[[[[[")),
        ("malformed", CallAnswer::new(200, &vec![b' '; 70_000])),
        ("mismatch", CallAnswer::new(200, b"{\"name\":\"a/2\",\"holders\":[{\"owner\":\"one\",\"fence\":1}]}")),
        ("timeout", CallAnswer::new(504, b"")),
        ("unreachable", CallAnswer::new(503, b"")),
        ("unreachable", CallAnswer { headers: None, body: Vec::new() }),
    ];
    for (said, status) in [("reject", 503), ("allow", 0)] {
        let mut policy = guarded();
        policy["guard"][0]["on_backend_unavailable"] = json!(said);
        for (reason, answer) in &lies {
            let link = Link::new(2, &policy);
            let call = write(&link, "one", &[]);
            let (vm, get) = link.call();
            link.proxy.vm(vm).call_answer(get.token, answer.clone());
            assert_eq!(outcome(&link, call), status, "{reason}");
            let counted = format!("interlock_backend_error_total.reason.{reason}");
            assert_eq!(link.proxy.fake.metric(&counted), 1, "{reason}");
            link.assert_rest();
        }
        let link = Link::new(2, &policy);
        link.proxy.vm(2).host.fail_next("call", 1, Status::BadArgument);
        let call = write(&link, "one", &[]);
        assert_eq!(outcome(&link, call), status, "there is no such cluster");
        assert_eq!(link.proxy.fake.metric("interlock_backend_error_total.reason.dispatch"), 1);
        link.assert_rest();
    }
}

#[test]
fn an_answer_that_nobody_tells_of_is_given_up() {
    let link = Link::new(2, &guarded());
    let call = write(&link, "one", &[]);
    let (_, get) = link.call();
    // The host answers, and the answer gets lost on its way to the plugin.
    assert!(link.proxy.vm(2).host.answer_call(get.token, CallAnswer::default()).is_some());
    link.proxy.vm(2).host.answered_call();
    link.proxy.run(millis(700));
    assert!(link.proxy.is_parked(call));
    link.proxy.run(millis(100));
    assert_eq!(outcome(&link, call), 503);
    assert_eq!(link.proxy.fake.metric("interlock_backend_error_total.reason.no-answer"), 1);
    link.assert_rest();
}

#[test]
fn who_leaves_before_the_answer_leaves_nothing_behind() {
    let link = Link::new(2, &guarded());
    let call = write(&link, "one", &[("lock", "b/1")]);
    let (_, get) = link.call();
    link.proxy.end(call);
    assert!(!link.proxy.vm(2).call_answer(get.token, CallAnswer::new(200, b"{}")), "nobody is told");
    link.assert_rest();
}

#[test]
fn a_table_that_has_just_lost_its_memory_cannot_tell() {
    let link = Link::new(2, &guarded());
    let call = write(&link, "one", &[]);
    let (vm, get) = link.call();
    let body = b"{\"name\":\"a/1\",\"holders\":[{\"owner\":\"two\",\"fence\":7}],\"grace\":\"1500ms\"}";
    link.proxy.vm(vm).call_answer(get.token, CallAnswer::new(200, body));
    assert_eq!(outcome(&link, call), 503);
    assert_eq!(link.proxy.ended(call).header("retry-after").as_deref(), Some("2"));
    let known = write(&link, "two", &[]);
    let (vm, get) = link.call();
    link.proxy.vm(vm).call_answer(get.token, CallAnswer::new(200, body));
    assert_eq!(outcome(&link, known), 0, "whom it knows passes");
    link.assert_rest();
}

#[test]
fn a_guard_that_watches_delays_nothing() {
    let mut policy = guarded();
    policy["guard"][0]["enforcement"] = json!("audit");
    let link = Link::new(2, &policy);
    let call = write(&link, "one", &[]);
    assert!(link.proxy.is_upstream(call));
    link.deliver();
    assert_eq!(
        link.proxy.complete(call).header("lock-status").as_deref(),
        Some("t;outcome=audit;reason=not-holder;lock=\"a/1\"")
    );
    // An answer that comes after the response is counted all the same; one that comes after the end is not.
    let slow = write(&link, "one", &[("lock", "b/1")]);
    let calls = link.calls();
    assert_eq!(calls.len(), 2, "{calls:?}");
    link.deliver();
    link.proxy.respond(slow);
    let stream = link.proxy.vm(2).host.stream(slow.id);
    assert_eq!(stream.response_values("lock-status").len(), 2);
    link.proxy.end(slow);
    let gone = write(&link, "one", &[]);
    link.proxy.complete(gone);
    link.deliver();
    assert_eq!(link.proxy.fake.metric("interlock_audit_total.class.a.outcome.refused.reason.not-holder"), 2);
    link.assert_rest();
}

#[test]
fn a_body_that_goes_ahead_of_the_answer_does_not_go_unguarded() {
    let link = Link::new(2, &guarded());
    let call = write(&link, "one", &[]);
    assert_eq!(link.proxy.vm(2).body(call.id), Flow::Stop);
    assert_eq!(outcome(&link, call), 503);
    link.deliver();
    link.run(secs(1));
    link.assert_rest();
}
