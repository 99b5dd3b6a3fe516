//! What happens while shared data fails, messages get lost, and other VMs act between any two calls of an operation.

use std::collections::BTreeMap;
use std::rc::Rc;

use serde_json::{Value, json};

use super::proxy::{Call, Proxy};
use super::{TABLE, millis, plain, secs, two};
use crate::host::Status;
use crate::host::fake::Phase;

/// Asserts that of all streams upstream with a fence no two are in the same exclusive section.
fn assert_exclusive(proxy: &Proxy, locks: &[&str]) {
    for lock in locks {
        let mut inside = BTreeMap::new();
        for call in proxy.open() {
            if proxy.phase(call) != Some(Phase::Request)
                && let Some(fence) = proxy.fence(call, lock)
            {
                assert_eq!(inside.insert(fence, call), None, "one fence twice");
            }
        }
        assert!(inside.len() <= 1, "{lock}: {inside:?}");
    }
}

fn end_all(proxy: &Proxy) {
    loop {
        proxy.deliver();
        let Some(call) = proxy.open().first().copied() else { return };
        proxy.end(call);
    }
}

/// A little of everything that touches the table, with the VM `here` in the middle of it.
fn traffic(proxy: &Proxy, here: usize) {
    let locks = ["a/1", "b/1"];
    let call = |vm, owner, locks| proxy.lock(vm, owner, locks);
    let first = call(here, "one", "a/1, b/1");
    let waits_there = call(1 - here, "two", "b/1;wait=1");
    let waits_here = call(here, "three", "a/1;wait=1");
    let leaves = call(here, "four", "b/1;wait=1");
    assert_exclusive(proxy, &locks);
    proxy.run(millis(300));
    assert_exclusive(proxy, &locks);
    for call in [leaves, first] {
        if !proxy.has_ended(call) {
            proxy.end(call);
        }
        proxy.deliver();
        assert_exclusive(proxy, &locks);
    }
    proxy.run(millis(300));
    assert_exclusive(proxy, &locks);
    let impatient = call(here, "five", "a/1, b/1;wait=0.1");
    proxy.run(millis(200));
    assert_exclusive(proxy, &locks);
    for call in [waits_there, waits_here, impatient] {
        if !proxy.has_ended(call) {
            proxy.end(call);
        }
        proxy.deliver();
        assert_exclusive(proxy, &locks);
    }
}

/// Lets shared data fail in one VM in the middle of the traffic. Nothing of it is left when that is over. Gives back how
/// many shared-data calls that VM made.
fn assert_survives(policy: &Value, vm: usize, sound: u32, failing: u32) -> u32 {
    let proxy = Proxy::new(2, policy);
    proxy.run(millis(300));
    proxy.vm(vm).host.fail_shared(sound, failing);
    let (_, calls) = proxy.calls(vm, || traffic(&proxy, vm));
    proxy.vm(vm).host.fail_shared(0, 0);
    end_all(&proxy);
    proxy.run(secs(2));
    let left = (proxy.open(), proxy.size(TABLE), proxy.fake.gauges());
    assert_eq!(left, (vec![], (0, 0), BTreeMap::new()), "VM {vm}: {failing} fail after {sound}: {policy}");
    calls.shared()
}

#[test]
fn nothing_is_lost_whichever_shared_data_calls_fail() {
    for on_unavailable in ["reject", "allow"] {
        let mut policy = plain();
        policy["on_backend_unavailable"] = json!(on_unavailable);
        // VM 0 keeps house, VM 1 does not.
        let calls = assert_survives(&policy, 1, 0, 0);
        assert!((50..500).contains(&calls), "{calls}");
        for failing in [1, 5, 1_000_000] {
            // A few fail anywhere; all fail from anywhere on.
            for sound in 0..calls {
                assert_survives(&policy, 1, sound, failing);
            }
            for sound in (0..2000).step_by(101) {
                assert_survives(&policy, 0, sound, failing);
            }
        }
    }
}

#[test]
fn a_backend_that_fails_refuses_or_lets_go_on_as_the_rule_says() {
    let mut policy = plain();
    policy["rules"] = json!([
        { "name": "open", "match": { "path": "/open" }, "locks": [{ "name": "a/1" }], "on_backend_unavailable": "allow" }
    ]);
    let proxy = Proxy::new(2, &policy);
    proxy.run(secs(1));
    proxy.vm(0).host.fail_shared(0, 1_000_000);
    let rejected = proxy.lock(0, "one", "a/1");
    let ended = proxy.ended(rejected);
    assert_eq!((ended.refused(), ended.forwarded), (Some(503), false));
    assert_eq!(proxy.status(rejected), "t;outcome=refused;reason=backend-unavailable;lock=\"a/1\"");
    assert!(ended.header("retry-after").is_some());
    let allowed = proxy.request(0, &[(":method", "GET"), (":path", "/open"), ("x-request-id", "one")]);
    assert!(proxy.is_upstream(allowed));
    assert_eq!(proxy.fence(allowed, "a/1"), None);
    let ended = proxy.complete(allowed);
    assert_eq!(ended.header("lock-status").as_deref(), Some("t;outcome=unlocked;reason=backend-unavailable"));
    assert!(proxy.fake.metric("interlock_backend_error_total.reason.store") >= 2);
    proxy.vm(0).host.fail_shared(0, 0);
    proxy.assert_rest(TABLE);
}

#[test]
fn a_parked_request_whose_backend_fails_is_answered() {
    for (on_unavailable, forwarded) in [("reject", false), ("allow", true)] {
        let mut policy = plain();
        policy["on_backend_unavailable"] = json!(on_unavailable);
        let proxy = Proxy::new(2, &policy);
        proxy.run(secs(1));
        let holder = proxy.lock(1, "one", "a/1");
        let parked = proxy.lock(0, "two", "a/1;wait=9");
        proxy.vm(0).host.fail_shared(0, 1_000_000);
        proxy.run(secs(2));
        assert!(!proxy.is_parked(parked));
        assert_eq!(proxy.is_upstream(parked), forwarded);
        proxy.vm(0).host.fail_shared(0, 0);
        proxy.run(secs(1));
        assert_eq!(proxy.entries(TABLE, "a/1").len(), 1, "the waiter is gone");
        proxy.end(holder);
        end_all(&proxy);
        proxy.assert_rest(TABLE);
    }
}

/// The host may have forgotten a stream without having said so.
#[test]
fn a_stream_that_the_host_does_not_know_gives_its_lock_back() {
    for call in ["enter", "resume"] {
        let proxy = two();
        let holder = proxy.lock(0, "one", "a/1");
        let gone = proxy.lock(1, "two", "a/1;wait=9");
        let next = proxy.lock(0, "three", "a/1;wait=9");
        proxy.vm(1).host.fail_next(call, 1, Status::BadArgument);
        proxy.end(holder);
        proxy.deliver();
        assert!(proxy.is_upstream(next), "{call}");
        proxy.end(gone);
        assert_eq!(proxy.entries(TABLE, "a/1").len(), 1, "nothing is given back twice");
        proxy.end(next);
        proxy.assert_rest(TABLE);
    }
}

#[test]
fn conflicts_are_tried_again_and_a_record_without_end_of_them_is_a_failure() {
    let proxy = two();
    proxy.vm(0).host.conflict_next(99);
    let call = proxy.lock(0, "one", "a/1");
    assert!(proxy.is_upstream(call));
    proxy.vm(0).host.conflict_next(99);
    proxy.complete(call);
    assert_eq!(proxy.size(TABLE), (0, 0));
    proxy.vm(0).host.conflict_next(100);
    let call = proxy.lock(0, "one", "a/1");
    assert_eq!(proxy.ended(call).refused(), Some(503));
    proxy.assert_rest(TABLE);
}

/// What one VM does while another is in the middle of something.
type Act = fn(&Proxy, &[Call]);

/// Runs `act` on VM 0 with `other` on VM 1 before its first, second, … shared-data call, and checks what came of it.
fn interleaved(setup: fn(&Proxy) -> Vec<Call>, act: Act, other: Act, check: fn(&Proxy, &[Call])) {
    let mut at = 0;
    loop {
        let proxy = Rc::new(two());
        let calls = setup(&proxy);
        let (there, before) = (Rc::clone(&proxy), calls.clone());
        proxy.vm(0).host.meanwhile(at, move || other(&there, &before));
        act(&proxy, &calls);
        let done = proxy.vm(0).host.forget_meanwhile();
        if done {
            assert!(at > 1, "nothing was interrupted");
            return;
        }
        proxy.deliver();
        assert_exclusive(&proxy, &["a/1", "a/2"]);
        check(&proxy, &proxy.open());
        end_all(&proxy);
        proxy.assert_rest(TABLE);
        at += 1;
    }
}

/// A request whose fate is looked at later.
fn start(_: Call) {}

fn parked(proxy: &Proxy, calls: &[Call]) -> usize {
    calls.iter().filter(|call| proxy.is_parked(**call)).count()
}

#[test]
fn of_two_who_want_a_lock_at_once_one_gets_it_and_one_waits() {
    interleaved(
        |_| Vec::new(),
        |proxy, _| start(proxy.lock(0, "one", "a/1;wait=9")),
        |proxy, _| start(proxy.lock(1, "two", "a/1;wait=9")),
        |proxy, calls| assert_eq!((calls.len(), parked(proxy, calls)), (2, 1)),
    );
}

#[test]
fn a_release_in_the_middle_of_an_acquisition_forgets_nobody() {
    interleaved(
        |proxy| vec![proxy.lock(1, "one", "a/1")],
        |proxy, _| start(proxy.lock(0, "two", "a/1;wait=9")),
        |proxy, calls| proxy.end(calls[0]),
        |proxy, calls| assert_eq!((calls.len(), parked(proxy, calls)), (1, 0)),
    );
    interleaved(
        |proxy| vec![proxy.lock(0, "one", "a/1")],
        |proxy, calls| proxy.end(calls[0]),
        |proxy, _| start(proxy.lock(1, "two", "a/1;wait=9")),
        |proxy, calls| assert_eq!((calls.len(), parked(proxy, calls)), (1, 0)),
    );
}

#[test]
fn a_waiter_that_leaves_while_the_lock_is_given_back_forgets_nobody() {
    let setup = |proxy: &Proxy| {
        vec![proxy.lock(1, "one", "a/1"), proxy.lock(0, "two", "a/1;wait=9"), proxy.lock(1, "three", "a/1;wait=9")]
    };
    let check = |proxy: &Proxy, calls: &[Call]| assert_eq!((calls.len(), parked(proxy, calls)), (1, 0));
    interleaved(setup, |proxy, calls| proxy.end(calls[1]), |proxy, calls| proxy.end(calls[0]), check);
}

#[test]
fn of_two_who_close_a_cycle_at_once_at_least_one_is_refused() {
    interleaved(
        |proxy| vec![proxy.lock(1, "one", "a/1;hold=60"), proxy.lock(0, "two", "a/2")],
        |proxy, _| start(proxy.lock(0, "one", "a/2;wait=9")),
        |proxy, _| start(proxy.lock(1, "two", "a/1;wait=9")),
        |proxy, calls| assert!(parked(proxy, calls) <= 1, "a cycle waits"),
    );
    // Two readers who both want to write.
    interleaved(
        |proxy| vec![proxy.lock(1, "one", "b/1;mode=shared"), proxy.lock(0, "two", "b/1;mode=shared")],
        |proxy, _| start(proxy.lock(0, "one", "b/1;wait=9")),
        |proxy, _| start(proxy.lock(1, "two", "b/1;wait=9")),
        |proxy, calls| assert!(parked(proxy, calls) <= 1, "a cycle waits"),
    );
}

#[test]
fn no_cycle_is_seen_where_there_never_was_one() {
    interleaved(
        |proxy| vec![proxy.lock(1, "one", "a/1"), proxy.lock(0, "two", "a/2"), proxy.lock(1, "one", "a/2;wait=9")],
        |proxy, _| {
            let call = proxy.lock(0, "three", "a/1;wait=9");
            assert!(!proxy.has_ended(call));
        },
        |proxy, calls| {
            proxy.end(calls[2]);
            proxy.end(calls[0]);
        },
        |proxy, calls| assert_eq!((calls.len(), parked(proxy, calls)), (2, 0)),
    );
}

#[test]
fn a_tick_of_the_housekeeper_disturbs_nothing() {
    // VM 0 keeps house: a quarter of the buckets a tick; the whole round is interrupted at every 37th call.
    for at in (0..2100).step_by(37) {
        let proxy = Rc::new(two());
        let holder = proxy.lock(0, "one", "a/1");
        let waiter = proxy.lock(1, "two", "a/1;wait=9");
        let there = Rc::clone(&proxy);
        proxy.vm(0).host.meanwhile(at, move || {
            there.end(waiter);
            there.lock(1, "three", "a/2;wait=9");
            there.lock(1, "two", "a/1;wait=9");
        });
        proxy.run(secs(2));
        proxy.vm(0).host.forget_meanwhile();
        proxy.end(holder);
        proxy.deliver();
        let calls = proxy.open();
        assert_eq!((calls.len(), parked(&proxy, &calls)), (2, 0), "interrupted at {at}");
        assert_exclusive(&proxy, &["a/1", "a/2"]);
        end_all(&proxy);
        assert_eq!(proxy.size(TABLE), (0, 0));
    }
}

/// An upstream's answer may come before the tick that finds its lease lost: it does not pass as if the lock had been held.
#[test]
fn an_answer_made_without_the_lock_does_not_pass() {
    let proxy = two();
    let lost = proxy.lock(0, "one", "a/1;ttl=1;hold=60");
    let waiter = proxy.lock(1, "two", "a/1;wait=9");
    proxy.silence(0, true);
    proxy.run(millis(1200));
    proxy.silence(0, false);
    assert!(proxy.is_upstream(waiter));
    proxy.respond(lost);
    let ended = proxy.ended(lost);
    assert_eq!((ended.refused(), ended.forwarded, ended.reset), (Some(409), true, false));
    assert_eq!(proxy.status(lost), "t;outcome=refused;reason=lease-lost;lock=\"a/1\"");
    proxy.end(waiter);
    proxy.assert_rest(TABLE);
}
