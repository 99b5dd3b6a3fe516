//! Who lives and who is dead: crashed VMs, stuck ones, lost messages, changed configurations, clocks that jump.

use serde_json::json;

use super::proxy::{Proxy, active};
use super::{TABLE, millis, plain, secs, two};
use crate::host::fake::Phase;

#[test]
fn a_lost_wake_up_is_made_up_for_within_a_second() {
    let proxy = two();
    let holder = proxy.lock(0, "one", "a/1");
    let waiter = proxy.lock(1, "two", "a/1;wait=10");
    proxy.vm(0).host.lose_next(1);
    proxy.run(millis(333));
    proxy.end(holder);
    let took = proxy.until("the waiter looks for itself", millis(1001), || proxy.is_upstream(waiter));
    assert!(took > millis(0), "the message was lost");
    proxy.complete(waiter);
    proxy.assert_rest(TABLE);
}

#[test]
fn a_dead_vm_keeps_its_locks_until_their_ttl_and_no_longer() {
    for ttl in [1, 5] {
        let proxy = two();
        let held = proxy.lock(0, "one", &format!("a/1;ttl={ttl};hold=60"));
        proxy.run(millis(1234));
        assert!(proxy.is_upstream(held));
        proxy.kill(0);
        let waiter = proxy.lock(1, "two", "a/1;wait=20");
        let took = proxy.until("the TTL ends", secs(20), || proxy.is_upstream(waiter));
        let beat = millis(250).min(secs(ttl) / 3);
        assert!(took > secs(ttl) - beat && took <= secs(ttl) + millis(2), "{ttl} s: {took:?}");
        assert_eq!(proxy.fake.metric("interlock_lease_expired_total.class.a"), 1);
        proxy.complete(waiter);
        proxy.assert_rest(TABLE);
    }
}

#[test]
fn nobody_has_to_ask_for_what_a_dead_vm_held() {
    let proxy = two();
    proxy.lock(0, "one", "a/1;ttl=2, b/1;ttl=2");
    let holder = proxy.lock(1, "two", "a/2");
    proxy.lock(0, "one", "a/2;wait=30");
    proxy.run(secs(1));
    assert_eq!(proxy.size(TABLE), (3, 2));
    // The VM that keeps house dies: the other takes over.
    proxy.kill(0);
    proxy.run(secs(1));
    assert_eq!(proxy.entries(TABLE, "a/1").len(), 1, "not before its time");
    proxy.run(secs(3));
    assert_eq!(proxy.size(TABLE), (1, 1));
    assert_eq!(proxy.fake.metrics()["interlock_held.class.a.instance.t"], 1);
    proxy.end(holder);
    proxy.assert_rest(TABLE);
}

#[test]
fn the_waiters_of_a_dead_vm_keep_nobody_from_a_lock() {
    let proxy = Proxy::new(3, &plain());
    proxy.run(secs(1));
    let holder = proxy.lock(1, "one", "a/1");
    proxy.lock(0, "dead", "a/1;wait=30");
    let behind = proxy.lock(2, "two", "a/1;wait=30");
    proxy.kill(0);
    proxy.run(secs(2));
    assert!(proxy.is_upstream(holder) && proxy.is_parked(behind));
    proxy.end(holder);
    proxy.deliver();
    assert!(proxy.is_upstream(behind), "the dead waiter was passed over");
    proxy.end(behind);

    // Before anybody can know that it is dead, a grant to it costs others its TTL.
    let proxy = Proxy::new(3, &plain());
    proxy.run(secs(1));
    let holder = proxy.lock(1, "one", "a/1");
    proxy.lock(0, "dead", "a/1;wait=30;ttl=2");
    let behind = proxy.lock(2, "two", "a/1;wait=30");
    proxy.kill(0);
    proxy.end(holder);
    let took = proxy.until("the TTL ends", secs(10), || proxy.is_upstream(behind));
    assert!(took <= millis(2002), "{took:?}");
    proxy.end(behind);
}

#[test]
fn a_vm_that_was_silent_for_longer_than_a_ttl_aborts_what_it_lost() {
    for stage in [Phase::Upstream, Phase::Response] {
        let proxy = two();
        let lost = proxy.lock(0, "one", "a/1;ttl=1;hold=60");
        let kept = proxy.lock(0, "one", "b/1;ttl=1;hold=60");
        if stage == Phase::Response {
            proxy.respond(lost);
        }
        let waiter = proxy.lock(1, "two", "a/1;wait=9");
        proxy.silence(0, true);
        proxy.run(millis(700));
        assert!(proxy.is_parked(waiter));
        proxy.run(millis(500));
        assert!(proxy.is_upstream(waiter), "the lease has ended");
        assert_eq!(proxy.phase(lost), Some(stage), "which its VM cannot know yet");
        proxy.silence(0, false);
        proxy.run(millis(1));
        let ended = proxy.ended(lost);
        assert_eq!((ended.reset, ended.refused()), (stage == Phase::Response, Some(409)));
        assert!(proxy.is_upstream(kept), "nobody wanted it: it was renewed in time");
        assert!(proxy.is_upstream(waiter));
        assert_eq!(proxy.fake.metric("interlock_lease_lost_total.class.a.reason.expired"), 1);
        proxy.complete(kept);
        proxy.complete(waiter);
        assert_eq!(proxy.status(kept), "t;outcome=acquired;wait=0.0");
        proxy.assert_rest(TABLE);
    }
}

/// Other streams may be answered in a root's callback only: the request that finds the VM late leaves that to a tick.
#[test]
fn a_request_may_come_before_the_tick_that_finds_what_was_lost() {
    let proxy = two();
    let lost = proxy.lock(0, "one", "a/1;ttl=1;hold=60");
    let waiter = proxy.lock(1, "two", "a/1;wait=9");
    proxy.silence(0, true);
    proxy.run(secs(2));
    proxy.silence(0, false);
    let early = proxy.lock(0, "three", "b/1");
    assert!(proxy.is_upstream(early) && proxy.is_upstream(waiter) && proxy.is_upstream(lost));
    proxy.run(millis(1));
    assert_eq!(proxy.ended(lost).refused(), Some(409));
    assert!(proxy.is_upstream(early));
    proxy.end(early);
    proxy.end(waiter);
    proxy.assert_rest(TABLE);
}

#[test]
fn a_lost_lease_takes_the_other_locks_of_its_request_with_it() {
    let proxy = two();
    let lost = proxy.lock(0, "one", "a/1;ttl=1, b/1;ttl=9");
    let waiter = proxy.lock(1, "two", "a/1;wait=9");
    let other = proxy.lock(1, "three", "b/1;wait=9");
    proxy.silence(0, true);
    proxy.run(secs(2));
    assert!(proxy.is_upstream(waiter) && proxy.is_parked(other));
    proxy.silence(0, false);
    proxy.run(millis(1));
    assert!(proxy.has_ended(lost) && proxy.is_upstream(other));
    proxy.end(waiter);
    proxy.end(other);
    proxy.assert_rest(TABLE);
}

/// A VM that was idle ticks four times a second, and a lease of a tenth of a second cannot wait for that.
#[test]
fn the_shortest_ttl_is_renewed_from_its_first_moment() {
    let proxy = two();
    proxy.until("a tick", secs(1), || proxy.vm(0).host.next_tick().unwrap().0.since(proxy.now()) > millis(240));
    let holder = proxy.lock(0, "one", "a/1;ttl=0.1;hold=60");
    let waiter = proxy.lock(1, "two", "a/1;wait=0.9");
    proxy.run(millis(800));
    assert!(proxy.is_upstream(holder) && proxy.is_parked(waiter), "the lease ended while its VM lived");
    proxy.complete(holder);
    proxy.deliver();
    proxy.complete(waiter);
    proxy.assert_rest(TABLE);
}

#[test]
fn the_shortest_hold_limit_is_kept() {
    let proxy = two();
    proxy.until("a tick", secs(1), || proxy.vm(0).host.next_tick().unwrap().0.since(proxy.now()) > millis(240));
    let holder = proxy.lock(0, "one", "a/1;ttl=0.1;hold=0.1");
    let waiter = proxy.lock(1, "two", "a/1;wait=0.9");
    proxy.run(millis(102));
    assert!(proxy.is_upstream(waiter));
    assert!(proxy.has_ended(holder), "both are upstream");
    proxy.complete(waiter);
    proxy.assert_rest(TABLE);
}

#[test]
fn a_new_configuration_hears_wake_ups_and_streams_keep_the_old_one() {
    let mut policy = plain();
    policy["rules"] = json!([{
        "name": "old", "match": { "path": "/x" }, "locks": [{ "name": "a/1" }], "wait": "5s",
        "on_lease_lost": "continue", "ttl": "1s", "hold": "3s"
    }]);
    let proxy = Proxy::new(2, &policy);
    let vm = proxy.vm(0);
    let old = vm.roots()[0];
    proxy.run(secs(1));
    let holder = proxy.lock(1, "one", "a/1");
    let parked = proxy.request(0, &[(":method", "GET"), (":path", "/x"), ("x-request-id", "two")]);
    policy["rules"][0]["on_lease_lost"] = json!("abort");
    policy["rules"][0]["wait"] = json!("0s");
    policy["instance"] = json!("t");
    let new = vm.configure(&active(&policy));
    let refused = proxy.request(0, &[(":method", "GET"), (":path", "/x"), ("x-request-id", "three")]);
    assert_eq!(proxy.ended(refused).refused(), Some(423), "the new rule does not wait");
    proxy.run(secs(2));
    assert!(proxy.is_parked(parked), "the old one does");
    proxy.end(holder);
    proxy.deliver();
    assert!(proxy.is_upstream(parked));
    proxy.run(secs(4));
    assert!(proxy.is_upstream(parked), "the old rule lets it go on without its lease");
    proxy.complete(parked);
    assert_eq!(proxy.status(parked), "t;outcome=lost;reason=lease-lost;lock=\"a/1\"");
    vm.drop_root(old);
    assert_eq!(vm.roots(), [new]);
    // Wake-ups go to the root that stayed, as soon as it has ticked.
    proxy.run(millis(251));
    let holder = proxy.lock(1, "one", "a/1");
    let parked = proxy.lock(0, "two", "a/1");
    proxy.end(holder);
    proxy.deliver();
    assert!(proxy.is_upstream(parked));
    proxy.end(parked);
    proxy.assert_rest(TABLE);
}

/// As where a bad configuration is followed by the old one again, or a listener keeps draining for long.
#[test]
fn locks_held_over_many_configurations_are_given_back_once() {
    let mut policy = plain();
    let proxy = Proxy::new(2, &policy);
    proxy.run(secs(1));
    let held = proxy.lock(0, "one", "a/1, b/1");
    for classes in [json!([]), json!([{ "name": "a" }]), json!([{ "name": "b" }])] {
        policy["classes"] = classes;
        for vm in [0, 1] {
            proxy.vm(vm).configure(&active(&policy));
        }
        proxy.run(millis(1300));
        let shown: i64 = proxy.fake.gauges().iter().filter(|(k, _)| k.starts_with("interlock_held")).map(|g| g.1).sum();
        assert_eq!(shown, 2, "{:?}", proxy.fake.gauges());
    }
    assert!(proxy.is_upstream(held));
    let waiter = proxy.lock(1, "two", "b/1");
    proxy.complete(held);
    proxy.deliver();
    proxy.complete(waiter);
    proxy.assert_rest(TABLE);
}

#[test]
fn audit_may_begin_and_end_with_a_configuration() {
    let proxy = two();
    let enforced = proxy.lock(0, "one", "a/1");
    let mut policy = plain();
    policy["enforcement"] = json!("audit");
    proxy.vm(0).configure(&active(&policy));
    let audited = proxy.lock(0, "two", "a/1;wait=0");
    assert!(proxy.is_upstream(audited), "the shadow table is another one");
    proxy.vm(0).configure(&active(&plain()));
    let refused = proxy.lock(0, "three", "a/1;wait=0");
    assert_eq!(proxy.ended(refused).refused(), Some(423));
    proxy.complete(audited);
    proxy.complete(enforced);
    assert_eq!(proxy.status(audited), "t;outcome=audit;wait=0.0");
    proxy.assert_rest(TABLE);
    proxy.assert_rest(super::SHADOW);
}

#[test]
fn instances_are_apart_and_roots_of_one_instance_are_not() {
    let proxy = two();
    let vm = proxy.vm(0);
    let first = vm.roots()[0];
    let mut other = plain();
    other["instance"] = json!("u");
    let second = vm.configure(&active(&other));
    let same = vm.configure(&active(&plain()));
    let request = |root, owner| {
        let id = vm.request(Some(root), &[("x-request-id", owner), ("lock", "a/1;wait=0")]);
        super::proxy::Call { vm: 0, id }
    };
    let (one, two) = (request(first, "one"), request(second, "two"));
    assert!(proxy.is_upstream(one) && proxy.is_upstream(two));
    assert_eq!(proxy.ended(request(same, "three")).refused(), Some(423));
    assert_eq!(proxy.ended(request(second, "three")).refused(), Some(423));
    // An instance that no configuration names any more still ends its streams.
    vm.drop_root(second);
    proxy.run(secs(1));
    proxy.complete(two);
    proxy.complete(one);
    proxy.assert_rest(TABLE);
    proxy.assert_rest("u/enforce");
}

#[test]
fn steps_of_the_wall_clock_change_no_lease_and_no_wait() {
    let hour = 3_600_000_000;
    let proxy = two();
    let holder = proxy.lock(0, "one", "a/1;ttl=1;hold=10");
    let waiter = proxy.lock(1, "two", "a/1;wait=9");
    let mut last = proxy.fence(holder, "a/1").unwrap();
    for step in [hour, -hour, -hour, hour] {
        proxy.fake.step_wall_clock(step);
        proxy.run(secs(2));
        assert!(proxy.is_upstream(holder) && proxy.is_parked(waiter), "after a step of {step}");
    }
    proxy.fake.step_wall_clock(-hour);
    proxy.end(holder);
    proxy.deliver();
    proxy.end(waiter);
    for step in [-hour, hour, -hour] {
        proxy.fake.step_wall_clock(step);
        let next = proxy.lock(0, "three", "a/1");
        let fence = proxy.fence(next, "a/1").unwrap();
        assert!(fence > last, "fences rise");
        last = fence;
        proxy.end(next);
    }
    proxy.assert_rest(TABLE);
}

/// As where the machine slept, if its monotonic clock counts sleep: everything that had a time is over at once.
#[test]
fn a_jump_of_the_monotonic_clock_ends_what_had_its_time() {
    let proxy = two();
    let holders = [proxy.lock(0, "one", "a/1;ttl=5"), proxy.lock(1, "two", "b/1;ttl=5")];
    let waiters = [proxy.lock(1, "three", "a/1;wait=30"), proxy.lock(0, "four", "b/1;wait=30")];
    proxy.fake.advance(secs(3600));
    proxy.run(secs(1));
    for call in holders {
        assert_eq!(proxy.ended(call).refused(), Some(409), "the hold limit has passed");
    }
    for call in waiters {
        assert_eq!(proxy.ended(call).refused(), Some(423), "the wait has passed");
    }
    proxy.assert_rest(TABLE);
    let again = proxy.lock(0, "five", "a/1");
    proxy.complete(again);
    proxy.assert_rest(TABLE);
}

#[test]
fn versions_may_wrap() {
    let proxy = two();
    proxy.fake.set_next_cas(u32::MAX - 40);
    for round in 0..40 {
        let holder = proxy.lock(0, &format!("one{round}"), "a/1");
        let waiter = proxy.lock(1, &format!("two{round}"), "a/1");
        proxy.complete(holder);
        proxy.deliver();
        assert!(proxy.is_upstream(waiter));
        proxy.complete(waiter);
    }
    proxy.assert_rest(TABLE);
}

/// Two listeners may share an instance, and one of them may be removed.
#[test]
fn a_root_that_goes_leaves_wake_ups_to_those_that_stay() {
    let proxy = two();
    let vm = proxy.vm(0);
    let second = vm.configure(&active(&plain()));
    proxy.run(secs(1));
    vm.drop_root(second);
    proxy.run(secs(1));
    let holder = proxy.lock(1, "one", "a/1");
    let waiter = proxy.lock(0, "two", "a/1;wait=9");
    proxy.end(holder);
    proxy.deliver();
    assert!(proxy.is_upstream(waiter), "the wake-up went to a root that is gone");
    proxy.end(waiter);
    proxy.assert_rest(TABLE);
}

#[test]
fn a_lost_lease_is_found_also_if_the_first_look_fails() {
    let proxy = two();
    let lost = proxy.lock(0, "one", "a/1;ttl=1;hold=60");
    let waiter = proxy.lock(1, "two", "a/1;wait=9");
    proxy.silence(0, true);
    proxy.run(secs(2));
    assert!(proxy.is_upstream(waiter));
    proxy.silence(0, false);
    // The heartbeat goes through; what comes after it does not.
    proxy.vm(0).host.fail_shared(2, 1);
    proxy.run(secs(1));
    assert!(proxy.has_ended(lost), "both are upstream");
    proxy.end(waiter);
    proxy.assert_rest(TABLE);
}

/// A sweep goes on where it failed, and counts nothing twice.
#[test]
fn gauges_are_right_also_after_a_sweep_that_failed() {
    for failed in (0..2100).step_by(131) {
        let proxy = two();
        let calls = ["a/1", "a/2", "a/3", "a/4"].map(|lock| proxy.lock(1, lock, lock));
        proxy.vm(0).host.fail_shared(failed, 1);
        for _ in 0..30 {
            proxy.run(millis(100));
            let held = proxy.fake.metric("interlock_held.class.a.instance.t");
            assert!((0..=4).contains(&held), "{held} of 4 are held, after call {failed} failed");
        }
        assert_eq!(proxy.fake.metric("interlock_held.class.a.instance.t"), 4);
        calls.into_iter().for_each(|call| proxy.end(call));
        proxy.assert_rest(TABLE);
    }
}

/// One record that nobody can read costs its own locks, and no others.
#[test]
fn an_unreadable_record_stops_no_housekeeping() {
    let proxy = two();
    proxy.lock(0, "one", "a/1");
    let key = proxy.fake.shared().into_keys().find(|key| key.contains("/l/")).unwrap();
    proxy.lock(0, "two", "b/1;ttl=1, b/2;ttl=1, b/3;ttl=1, b/4;ttl=1");
    proxy.kill(0);
    proxy.fake.overwrite(&key, b"\x01garbage\xff");
    proxy.run(secs(5));
    for lock in ["b/1", "b/2", "b/3", "b/4"] {
        assert_eq!(proxy.entries(TABLE, lock), [], "what a dead VM held is still held");
    }
    let refused = proxy.lock(1, "three", "a/1");
    assert_eq!(proxy.ended(refused).refused(), Some(503));
}
