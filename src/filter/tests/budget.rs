//! What the filter costs in calls of the host, pinned: a change that makes it dearer shows here.
//!
//! Heartbeats are left out of the counts of requests: a VM that has just ticked owes none for a while, and no time passes
//! while a request is measured. What they cost is counted on its own, with the idle VM.

use serde_json::{Value, json};

use super::proxy::Proxy;
use super::{plain, secs};
use crate::host::fake::Calls;

/// All calls of the host but those for the time, which cost a tenth of the others.
fn total(calls: &Calls) -> u32 {
    let Calls {
        clock: _,
        header_reads,
        header_writes,
        property_reads,
        shared_reads,
        shared_writes,
        enqueues,
        dequeues,
        metric_definitions,
        metric_updates,
        ticks_set,
        enters,
        callouts,
        answer_reads,
        logs,
    } = *calls;
    let headers = header_reads + header_writes + property_reads;
    let shared = shared_reads + shared_writes + enqueues + dequeues;
    headers + shared + callouts + answer_reads + metric_definitions + metric_updates + ticks_set + enters + logs
}

/// The page that says what requests cost.
const PAGE: &str = include_str!("../../../docs/performance.md");

/// Prints a line of the page's table, which must be there as it is.
fn row(what: &str, calls: &Calls) {
    let line = format!(
        "| {what} | {} | {} | {} | {} | {} | {} | {} | {} |",
        total(calls),
        calls.header_reads,
        calls.header_writes,
        calls.property_reads,
        calls.shared(),
        calls.enqueues + calls.dequeues,
        calls.metric_updates,
        calls.clock,
    );
    println!("{line}");
    assert!(PAGE.lines().any(|known| known == line), "docs/performance.md does not say so: {line}");
}

fn head() {
    let line = "| | all | headers read | headers set | properties | shared | queues | metrics | clock |";
    println!("{line}\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
}

/// Two VMs that have joined, have defined their metrics, and owe no heartbeat.
fn warm(policy: &Value) -> Proxy {
    let proxy = Proxy::new(2, policy);
    proxy.run(secs(1));
    for vm in [0, 1] {
        for path in ["/", "/locked/1"] {
            let call = proxy.request(vm, &headers("warm", path, "a/1, b/1"));
            proxy.complete(call);
        }
    }
    proxy.run(secs(1));
    proxy
}

fn headers<'a>(owner: &'a str, path: &'a str, lock: &'a str) -> Vec<(&'a str, &'a str)> {
    let mut fields = vec![(":method", "POST"), (":path", path), ("x-request-id", owner)];
    fields.extend((!lock.is_empty()).then_some(("lock", lock)));
    fields
}

fn with_rule() -> Value {
    let mut policy = plain();
    policy["rules"] = json!([{
        "name": "r", "match": { "methods": ["POST"], "path": "/locked/{id}" }, "locks": [{ "name": "a/{id}" }]
    }]);
    policy
}

/// One request from its headers to its end.
fn cost(policy: &Value, path: &str, lock: &str) -> Calls {
    let proxy = warm(policy);
    let (_, calls) = proxy.calls(0, || {
        let call = proxy.request(0, &headers("one", path, lock));
        assert!(proxy.is_upstream(call));
        proxy.complete(call)
    });
    calls
}

#[test]
fn an_unannotated_request_costs_one_read_of_its_headers_and_no_shared_data() {
    let mut stripped = plain();
    stripped["annotations"] = json!({ "header": "strip" });
    // Signed fences of earlier hops are passed on whether locks are asked for or not, so they have to be looked for.
    let mut keyed = with_rule();
    keyed["keys"] = json!([{ "id": "k", "secret": { "env": "INTERLOCK_KEY" } }]);
    let rows = [
        ("unannotated, no rules", cost(&plain(), "/other", ""), 0),
        ("unannotated, rules", cost(&with_rule(), "/other", ""), 0),
        ("unannotated, rules and keys", cost(&keyed, "/other", ""), 0),
        ("a lock header, which is stripped", cost(&stripped, "/other", "a/1"), 1),
    ];
    head();
    for (what, calls, writes) in rows {
        row(what, &calls);
        assert_eq!(
            (calls.header_reads, calls.header_writes, calls.property_reads),
            (1, writes, 1),
            "{what}: {calls:?}"
        );
        assert_eq!((total(&calls), calls.clock), (2 + writes, 0), "{what}: {calls:?}");
    }
}

#[test]
fn an_uncontended_lock_costs_eight_shared_data_calls_or_four() {
    let mut unlimited = plain();
    unlimited["limits"] = json!({ "locks_per_owner": null });
    let mut ranked = unlimited.clone();
    ranked["classes"] = json!([{ "name": "a", "rank": 1 }, { "name": "b" }]);
    let limited = cost(&plain(), "/", "a/1");
    let single = cost(&unlimited, "/", "a/1");
    let by_order = cost(&ranked, "/", "a/1");
    let by_rule = cost(&with_rule(), "/locked/7", "");
    let locks: Vec<_> = (0..8).map(|n| format!("a/{n}")).collect();
    let eight = cost(&unlimited, "/", &locks.join(", "));
    let eight_limited = cost(&plain(), "/", &locks.join(", "));
    head();
    let rows = [
        ("one lock by header", &limited, 8, 19),
        ("one lock by header, locks_per_owner: null", &single, 4, 15),
        ("one lock by header, ranked class", &by_order, 8, 19),
        ("one lock by rule", &by_rule, 8, 18),
        ("8 locks", &eight_limited, 36, 68),
        ("8 locks, locks_per_owner: null", &eight, 32, 64),
    ];
    for (what, calls, ..) in rows {
        row(what, calls);
    }
    for (what, calls, shared, most) in rows {
        assert_eq!(calls.shared(), shared, "{what}: {calls:?}");
        assert!(total(calls) <= most, "{what}: {} calls: {calls:?}", total(calls));
        assert_eq!((calls.metric_definitions, calls.logs, calls.ticks_set), (0, 0, 0), "{what}: {calls:?}");
    }
}

#[test]
fn a_contended_wait_and_its_hand_over_are_bounded() {
    let proxy = warm(&plain());
    let holder = proxy.request(0, &headers("one", "/", "a/1"));
    let (waiter, wait) = proxy.calls(1, || proxy.request(1, &headers("two", "/", "a/1")));
    assert!(proxy.is_parked(waiter));
    let (_, hand_over) = proxy.calls(0, || proxy.complete(holder));
    let (_, resumed) = proxy.calls(1, || proxy.deliver());
    assert!(proxy.is_upstream(waiter));
    let (_, release) = proxy.calls(1, || proxy.complete(waiter));
    head();
    let rows = [
        ("contended: until parked", &wait, 10, 15),
        ("contended: release that hands over", &hand_over, 4, 9),
        ("contended: wake-up and resume", &resumed, 1, 8),
        ("contended: the waiter's release", &release, 4, 8),
    ];
    for (what, calls, ..) in rows {
        row(what, calls);
    }
    for (what, calls, shared, most) in rows {
        assert_eq!(calls.shared(), shared, "{what}: {calls:?}");
        assert!(total(calls) <= most, "{what}: {} calls: {calls:?}", total(calls));
    }
    proxy.assert_rest(super::TABLE);
}

/// A second of a VM that does nothing, one of the VM that keeps house, and one of each while a request waits.
#[test]
fn an_idle_vm_costs_little() {
    let proxy = Proxy::new(2, &plain());
    proxy.run(secs(3));
    let second = |vm: usize| proxy.calls(vm, || proxy.run(secs(1))).1;
    let (keeper, idle) = (second(0), second(1));
    head();
    row("an idle VM that keeps house, a second", &keeper);
    row("an idle VM, a second", &idle);
    // A tick sets the next one.
    assert_eq!((keeper.ticks_set, idle.ticks_set), (4, 4));
    // A heartbeat is a read and a write; each asks who keeps house.
    assert_eq!(idle.shared(), 4 * 3, "{idle:?}");
    // All buckets of locks and of owners are read once a second.
    assert_eq!(keeper.shared(), 4 * 3 + 2 * 1024, "{keeper:?}");

    // Waiters make a VM look more often, and sweep no more.
    let holder = proxy.lock(1, "one", "a/1;hold=100");
    let waiter = proxy.lock(0, "two", "a/1;wait=30");
    let waiting = second(0);
    row("a VM that keeps house, with a waiter", &waiting);
    assert!(waiting.ticks_set <= 8, "{waiting:?}");
    assert!(waiting.shared() <= 4 * 3 + 2 * 1024 + 16, "{waiting:?}");
    // So does a short TTL: a third of it is the period of the heartbeat.
    proxy.end(waiter);
    let short = proxy.lock(0, "three", "a/2;ttl=0.1");
    proxy.run(secs(1));
    let hasty = second(0);
    row("a VM that keeps house, with a TTL of 100 ms", &hasty);
    assert!(hasty.ticks_set <= 31, "{hasty:?}");
    assert!(hasty.shared() <= 31 * 2 + 4 + 2 * 1024, "{hasty:?}");
    proxy.end(short);
    proxy.end(holder);
    proxy.assert_rest(super::TABLE);
}

/// In a crowd before a few locks everybody looks once a second, and no look makes more calls because of the others. In a large
/// crowd, whose record is long, each looks less often.
#[test]
fn waiters_that_nothing_happens_to_cost_little() {
    let proxy = Proxy::new(2, &plain());
    proxy.run(secs(1));
    let holder = proxy.lock(1, "holder", "a/0, a/1, a/2, a/3");
    let house = 2 * (4 * 3 + 2 * 1024);
    head();
    // Where there are many, those who came together look together, each every two seconds.
    for (crowd, looks) in [(10, 20), (40, 80), (1000, 1000)] {
        while proxy.open().len() <= crowd {
            let number = proxy.open().len();
            proxy.lock(0, &format!("w{number}"), &format!("a/{};wait=30", number % 4));
        }
        proxy.run(secs(1));
        let (_, calls) = proxy.calls(0, || proxy.run(secs(2)));
        row(&format!("a VM that keeps house, with {crowd} waiters, two seconds"), &calls);
        let each = (calls.shared() - house) / looks;
        assert!(each <= 1, "{each} calls a look: {calls:?}");
    }
    proxy.end(holder);
}

/// The heartbeat slows down again once no lease needs it any faster.
#[test]
fn one_short_ttl_does_not_hurry_a_vm_for_ever() {
    let proxy = Proxy::new(2, &plain());
    proxy.run(secs(1));
    let long = proxy.lock(1, "one", "a/1;ttl=5;hold=600");
    let short = proxy.lock(1, "two", "b/1;ttl=0.1");
    proxy.run(secs(1));
    proxy.complete(short);
    proxy.run(secs(1));
    let (_, calls) = proxy.calls(1, || proxy.run(secs(1)));
    assert!(calls.ticks_set <= 5, "{calls:?}");
    proxy.complete(long);
    proxy.assert_rest(super::TABLE);
}

/// A backend that fails for long is asked at the pace of the heartbeat, not in a loop.
#[test]
fn a_failing_backend_makes_nobody_hurry() {
    let proxy = Proxy::new(2, &plain());
    proxy.run(secs(1));
    let held = proxy.lock(0, "one", "a/1;ttl=1;hold=60");
    let parked = proxy.lock(1, "two", "a/1;wait=30");
    proxy.silence(0, true);
    proxy.run(secs(2));
    proxy.silence(0, false);
    // The heartbeat that finds the silence goes through, and nothing after it.
    proxy.vm(0).host.fail_shared(2, 1_000_000);
    let (_, calls) = proxy.calls(0, || proxy.run(secs(1)));
    assert!(calls.ticks_set <= 8 && calls.shared() <= 40, "{calls:?}");
    assert!(calls.logs <= 12, "{calls:?}");
    proxy.vm(0).host.fail_shared(0, 0);
    proxy.run(secs(1));
    assert!(proxy.has_ended(held) && proxy.is_upstream(parked));
    proxy.end(parked);
    proxy.assert_rest(super::TABLE);
}

#[test]
fn a_share_of_the_owners_costs_no_call_of_its_own() {
    let mut partly = plain();
    partly["enforcement"] = json!({ "enforce": "99.99%" });
    for (path, lock) in [("/other", ""), ("/other", "a/1")] {
        assert_eq!(total(&cost(&partly, path, lock)), total(&cost(&plain(), path, lock)), "{lock:?}");
    }
}
