//! The rules of the contract, one readable schedule each. Every step is held against all invariants by the harness.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::cell::RefCell;
use std::rc::Rc;

use common::{IS, IX, S, SIX, World, X, ask, lock, ms, owner, rules};
use interlock_core::session::{BEAT, DEAD_AFTER};
use interlock_core::store::{Kind, OwnerBucket, Store};
use interlock_core::{Cause, Class, Duration, Fence, Limit, Loss, Mode, Rank, Request, Rules, Within};
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const MICRO: Duration = Duration::from_micros(1);

fn classes(list: &[(&str, Class)]) -> Rules {
    let mut rules = rules();
    for (name, class) in list {
        rules.classes.insert((*name).into(), *class);
    }
    rules
}

fn ranked(rank: u32) -> Class {
    Class { rank: Some(Rank(rank)), ..Class::default() }
}

fn tree() -> Class {
    Class { hierarchy: true, ..Class::default() }
}

// The queue rule.

#[test]
fn waiters_are_served_in_the_order_in_which_they_came() {
    let mut w = World::new(2);
    let mut holder = w.ask(0, &ask("h").lock("l/1", X)).granted();
    let waiters: Vec<_> = (0..6).map(|n| w.ask(n % 2, &ask(&format!("w{n}")).lock("l/1", X)).waits()).collect();
    for waiter in waiters {
        w.release(holder);
        assert_eq!(w.woken, [waiter]);
        holder = waiter;
    }
    w.finish();
}

#[test]
fn neighbouring_readers_are_granted_together_and_overtake_nobody() {
    let mut w = World::new(2);
    let first = w.ask(0, &ask("r0").lock("l/1", S)).granted();
    let also = w.ask(1, &ask("r1").lock("l/1", S)).granted();
    let writer = w.ask(0, &ask("w").lock("l/1", X)).waits();
    let r2 = w.ask(1, &ask("r2").lock("l/1", S)).waits();
    let r3 = w.ask(0, &ask("r3").lock("l/1", S)).waits();
    let last = w.ask(0, &ask("x").lock("l/1", X)).waits();
    let r4 = w.ask(0, &ask("r4").lock("l/1", S)).waits();
    w.release(first);
    assert!(w.woken.is_empty());
    w.release(also);
    assert_eq!(w.woken, [writer]);
    w.release(writer);
    assert_eq!(w.woken, [r2, r3], "r4 stands behind a writer");
    w.release(r3);
    w.release(r2);
    assert_eq!(w.woken, [last]);
    w.release(last);
    assert_eq!(w.woken, [r4]);
    w.finish();
}

#[test]
fn whoever_leaves_the_queue_lets_those_behind_it_close_up() {
    let mut w = World::new(2);
    let reader = w.ask(0, &ask("r").lock("l/1", S)).granted();
    let writer = w.ask(0, &ask("w").lock("l/1", X)).waits();
    let behind = w.ask(1, &ask("b").lock("l/1", S)).waits();
    w.cancel(writer);
    assert_eq!(w.woken, [behind], "only the writer kept the two readers apart");
    w.release(reader);
    w.finish();
}

#[test]
fn an_upgrade_of_the_sole_holder_is_immediate_and_its_release_a_downgrade() {
    let mut w = World::new(2);
    let reads = w.ask(0, &ask("a").lock("l/1", S)).granted();
    let writes = w.ask(1, &ask("a").lock("l/1", X)).granted();
    assert!(w.fence(writes, "l/1") > w.fence(reads, "l/1"));
    let other = w.ask(1, &ask("b").lock("l/1", S)).waits();
    let writer = w.ask(1, &ask("c").lock("l/1", X)).waits();
    w.release(writes);
    assert_eq!(w.woken, [other], "down to shared, which others may share");
    w.release(other);
    assert!(w.woken.is_empty());
    w.release(reads);
    assert_eq!(w.woken, [writer]);
    w.finish();
}

#[test]
fn an_upgrade_goes_ahead_of_plain_waiters_but_behind_other_holders() {
    let mut w = World::new(2);
    let a = w.ask(0, &ask("a").lock("l/1", S)).granted();
    let b = w.ask(0, &ask("b").lock("l/1", S)).granted();
    let plain = w.ask(1, &ask("p").lock("l/1", X)).waits();
    let upgrade = w.ask(1, &ask("a").lock("l/1", X)).waits();
    w.release(b);
    assert_eq!(w.woken, [upgrade]);
    w.release(upgrade);
    assert!(w.woken.is_empty());
    w.release(a);
    assert_eq!(w.woken, [plain]);
    w.finish();
}

#[test]
fn re_entry_is_counted_immediate_and_part_of_the_same_section() {
    let mut w = World::new(3);
    let outer = w.ask(0, &ask("a").lock("l/1", X)).granted();
    let waiter = w.ask(1, &ask("b").lock("l/1", X)).waits();
    let inner = w.ask(2, &ask("a").lock("l/1", S).wait(ms(0))).granted();
    let again = w.ask(1, &ask("a").lock("l/1", X)).granted();
    assert_eq!(w.fence(inner, "l/1"), w.fence(outer, "l/1"));
    w.release(outer);
    w.release(again);
    assert!(w.woken.is_empty(), "one of three is still there");
    w.release(inner);
    assert_eq!(w.woken, [waiter]);
    w.finish();
}

#[test]
fn two_modes_of_one_owner_add_up() {
    let mut w = World::new(1);
    let shared = w.ask(0, &ask("a").lock("l/1", S)).granted();
    let intent = w.ask(0, &ask("a").lock("l/1", IX)).granted();
    let both = w.ask(0, &ask("a").lock("l/1", SIX).wait(ms(0))).granted();
    assert_eq!(w.fence(both, "l/1"), w.fence(intent, "l/1"), "it has shared-intent-exclusive already");
    assert_eq!(w.ask(0, &ask("b").lock("l/1", IX).wait(ms(0))).slug(), "lock-held");
    w.release(both);
    w.release(shared);
    w.ask(0, &ask("b").lock("l/1", IX).wait(ms(0))).granted();
    w.finish();
}

#[test]
fn without_re_entry_an_owner_is_refused_as_a_deadlock_with_itself() {
    for (first, mode) in [(X, X), (X, S), (S, X), (S, S)] {
        let mut w = World::new(2);
        let held = w.ask(0, &ask("a").lock("l/1", first).not_reentrant()).granted();
        assert_eq!(w.ask(1, &ask("a").lock("l/1", mode).not_reentrant()).cycle(), ["a", "a"]);
        let none = ask("a").lock("l/1", mode).not_reentrant().wait(ms(0));
        assert_eq!(w.ask(1, &none).slug(), "lock-held", "who does not wait cannot deadlock");
        assert_eq!(w.queue("l/1"), ["a!"]);
        w.release(held);
        w.finish();
    }
}

// Permits.

#[test]
fn permits_are_taken_in_order_by_every_lease() {
    let mut w = World::with(classes(&[("pool", Class { permits: 2, ..Class::default() })]), 2, 0);
    let a = w.ask(0, &ask("a").lock("pool/1", X)).granted();
    let b = w.ask(1, &ask("b").lock("pool/1", S)).granted();
    let c = w.ask(0, &ask("c").lock("pool/1", X)).waits();
    let again = w.ask(1, &ask("a").lock("pool/1", X)).waits();
    w.release(b);
    assert_eq!(w.woken, [c], "who holds a permit already does not overtake");
    w.release(a);
    assert_eq!(w.woken, [again]);
    w.release(c);
    w.release(again);
    w.finish();
}

#[test]
fn a_wait_for_permits_draws_no_edge_and_ends_by_its_deadline() {
    let mut w = World::with(classes(&[("pool", Class { permits: 2, ..Class::default() })]), 2, 0);
    w.ask(0, &ask("a").lock("pool/1", X)).granted();
    w.ask(0, &ask("b").lock("pool/1", X)).granted();
    w.ask(0, &ask("c").lock("l/1", X)).granted();
    let c = w.ask(1, &ask("c").lock("pool/1", X).wait(ms(700))).waits();
    let a = w.ask(1, &ask("a").lock("l/1", X)).waits();
    w.advance(ms(700));
    assert_eq!(w.refused[0].0, c);
    assert_eq!(w.refused[0].1.cause.slug(), "wait-timeout");
    assert!(!w.holds(a));
    w.finish();
}

// The declared order.

#[test]
fn locks_are_taken_in_rising_rank_and_name() {
    let mut w = World::with(classes(&[("a", ranked(20)), ("b", ranked(10)), ("c", ranked(20))]), 2, 0);
    let a5 = w.ask(0, &ask("o").lock("a/5", S)).granted();
    let refusal = w.ask(1, &ask("o").lock("b/1", X)).refused();
    assert_eq!(refusal.cause, Cause::OrderViolation { held: lock("a/5") });
    assert_eq!(refusal.lock, lock("b/1"));
    assert_eq!(w.ask(1, &ask("o").lock("a/4", X).wait(ms(0))).slug(), "order-violation");
    w.ask(1, &ask("o").lock("a/6", X)).granted();
    w.ask(1, &ask("o").lock("c/1", X)).granted();
    w.ask(1, &ask("o").lock("free/1", X)).granted();
    w.ask(0, &ask("o").lock("a/5", X)).granted();
    w.ask(1, &ask("other").lock("b/1", X)).granted();
    assert_eq!(w.queue("a/4"), [""; 0]);
    w.release(a5);
    w.finish();
}

#[test]
fn an_order_ends_with_the_lease() {
    let mut w = World::with(classes(&[("a", ranked(1))]), 2, 0);
    let high = w.ask(0, &ask("o").lock("a/9", X)).granted();
    assert_eq!(w.ask(1, &ask("o").lock("a/1", X)).slug(), "order-violation");
    w.release(high);
    w.ask(1, &ask("o").lock("a/1", X)).granted();
    w.finish();
}

#[test]
fn a_lease_that_has_expired_is_no_matter_of_order() {
    let mut w = World::with(classes(&[("a", ranked(1))]), 2, 0);
    w.ask(0, &ask("o").lock("a/9", X).ttl(ms(2000))).granted();
    w.crash(0);
    w.advance(ms(1900));
    assert_eq!(w.ask(1, &ask("o").lock("a/1", X)).slug(), "order-violation");
    w.advance(ms(200));
    w.ask(1, &ask("o").lock("a/1", X)).granted();
    w.finish();
}

#[test]
fn one_request_may_name_its_locks_in_any_order() {
    let mut w = World::with(classes(&[("a", ranked(20)), ("b", ranked(10))]), 1, 0);
    let all = w.ask(0, &ask("o").lock("a/2", X).lock("free/1", X).lock("b/9", X).lock("a/1", X)).granted();
    let taken: Vec<String> = w.workers[0].leases[&all].grants().iter().map(|grant| grant.name.to_string()).collect();
    assert_eq!(taken, ["b/9", "a/1", "a/2", "free/1"]);
    w.finish();
}

#[test]
fn locks_within_an_unordered_class_are_left_to_the_deadlock_rule() {
    let unordered = Class { within: Within::Unordered, ..ranked(10) };
    let mut w = World::with(classes(&[("u", unordered), ("b", ranked(5))]), 2, 0);
    w.ask(0, &ask("o").lock("u/2", X)).granted();
    w.ask(0, &ask("o").lock("u/1", X)).granted();
    assert_eq!(w.ask(0, &ask("o").lock("b/1", X)).slug(), "order-violation");
    w.ask(1, &ask("p").lock("u/3", X)).granted();
    let waiter = w.ask(0, &ask("o").lock("u/3", X)).waits();
    assert_eq!(w.ask(1, &ask("p").lock("u/2", X)).slug(), "deadlock");
    w.cancel(waiter);
    w.finish();
}

#[test]
fn intents_that_a_hierarchy_implies_break_no_order() {
    let mut w = World::with(classes(&[("t", Class { hierarchy: true, ..ranked(1) })]), 1, 0);
    // "t/a" sorts below "t/a-b", which sorts below "t/a/c".
    w.ask(0, &ask("o").lock("t/a-b", X)).granted();
    w.ask(0, &ask("o").lock("t/a/c", X)).granted();
    assert_eq!(w.ask(0, &ask("o").lock("t/a-a", X)).slug(), "order-violation");
    w.finish();
}

// Deadlocks.

#[test]
fn rings_of_any_length_are_refused_where_they_close() {
    for length in [2, 3, 4, 9, 40] {
        let mut w = World::new(3);
        let name = |n: usize| format!("l/{}", n % length);
        for n in 0..length {
            w.ask(n % 3, &ask(&format!("o{n}")).lock(&name(n), X)).granted();
        }
        for n in 0..length - 1 {
            w.ask((n + 1) % 3, &ask(&format!("o{n}")).lock(&name(n + 1), X)).waits();
        }
        let last = format!("o{}", length - 1);
        let try_only = ask(&last).lock("l/0", X).wait(ms(0));
        assert_eq!(w.ask(0, &try_only).slug(), "lock-held", "who does not wait closes nothing");
        let cycle = w.ask(0, &ask(&last).lock("l/0", X)).cycle();
        assert_eq!(cycle.len(), length + 1);
        assert_eq!(w.queue("l/0"), ["o0!"], "no trace");
        w.finish();
    }
}

#[test]
fn a_cycle_may_run_through_the_place_in_a_queue() {
    let mut w = World::new(2);
    w.ask(0, &ask("r").lock("l/1", S)).granted();
    w.ask(0, &ask("t").lock("l/2", X)).granted();
    let writer = w.ask(0, &ask("w").lock("l/1", X)).waits();
    // t may not read l/1 past the waiting writer, and r waits for t.
    w.ask(1, &ask("t").lock("l/1", S)).waits();
    assert_eq!(w.ask(1, &ask("r").lock("l/2", X)).cycle(), ["r", "t", "w", "r"]);
    w.cancel(writer);
    w.finish();
}

#[test]
fn two_readers_who_both_want_to_write_deadlock() {
    let mut w = World::new(2);
    let a = w.ask(0, &ask("a").lock("l/1", S)).granted();
    let b = w.ask(1, &ask("b").lock("l/1", S)).granted();
    let upgrade = w.ask(0, &ask("a").lock("l/1", X)).waits();
    assert_eq!(w.ask(1, &ask("b").lock("l/1", X)).cycle(), ["b", "a", "b"]);
    w.release(b);
    assert_eq!(w.woken, [upgrade]);
    w.release(a);
    w.finish();
}

#[test]
fn an_upgrade_granted_over_waiters_may_close_a_cycle_through_a_parallel_request() {
    let mut w = World::new(2);
    w.ask(0, &ask("p").lock("l/2", X)).granted();
    let weak = w.ask(0, &ask("u").lock("l/1", IS)).granted();
    let other = w.ask(0, &ask("v").lock("l/1", IX)).granted();
    // p waits for v only; u stands in nobody's way.
    let reader = w.ask(1, &ask("p").lock("l/1", S)).waits();
    let elsewhere = w.ask(1, &ask("u").lock("l/2", X)).waits();
    // Intent-exclusive goes well with v's and is granted, but would keep p out, for whom u waits.
    assert_eq!(w.ask(0, &ask("u").lock("l/1", IX)).cycle(), ["u", "p", "u"]);
    w.release(other);
    assert_eq!(w.woken, [reader]);
    w.release(weak);
    w.cancel(elsewhere);
    w.finish();
}

#[test]
fn an_upgrade_that_an_older_wait_of_its_owner_could_re_enter_is_searched_for_cycles_first() {
    let mut w = World::new(2);
    w.ask(0, &ask("c").lock("l/1", S)).granted();
    let e = w.ask(0, &ask("e").lock("l/1", IX)).waits();
    let reads = w.ask(0, &ask("a").lock("l/1", S)).waits();
    let writes = w.ask(1, &ask("a").lock("l/1", X)).waits();
    w.ask(0, &ask("a").lock("l/1", IS)).granted();
    // It would cover the older read, and e would have to wait for both; and the older write waits for e.
    assert_eq!(w.ask(1, &ask("a").lock("l/1", S).wait(ms(0))).cycle(), ["a", "e", "a"]);
    w.cancel(writes);
    let again = w.ask(1, &ask("a").lock("l/1", S).wait(ms(0))).granted();
    assert_eq!(w.woken, [reads], "nothing is in the way of either now");
    w.release(again);
    w.cancel(e);
    w.finish();
}

#[test]
fn an_upgrade_queued_before_waiters_may_close_a_cycle_through_a_parallel_request() {
    let mut w = World::new(2);
    w.ask(0, &ask("p").lock("l/2", X)).granted();
    w.ask(0, &ask("u").lock("l/1", IS)).granted();
    let other = w.ask(0, &ask("v").lock("l/1", SIX)).granted();
    let reader = w.ask(1, &ask("p").lock("l/1", S)).waits();
    let elsewhere = w.ask(1, &ask("u").lock("l/2", X)).waits();
    // It has to wait for v, and stands before p from then on.
    assert_eq!(w.ask(0, &ask("u").lock("l/1", IX)).cycle(), ["u", "p", "u"]);
    w.release(other);
    assert_eq!(w.woken, [reader]);
    w.cancel(elsewhere);
    w.finish();
}

#[test]
fn parallel_requests_of_one_owner_count_as_one() {
    let mut w = World::new(2);
    w.ask(0, &ask("a").lock("l/1", X)).granted();
    w.ask(1, &ask("b").lock("l/2", X)).granted();
    let a = w.ask(0, &ask("a").lock("l/2", X)).waits();
    // Another branch of b, that holds nothing itself, closes the ring all the same.
    assert_eq!(w.ask(0, &ask("b").lock("l/1", X)).cycle(), ["b", "a", "b"]);
    w.cancel(a);
    w.finish();
}

#[test]
fn a_wait_that_has_ended_closes_nothing() {
    let mut w = World::new(2);
    w.ask(0, &ask("a").lock("l/1", X)).granted();
    w.ask(0, &ask("b").lock("l/2", X)).granted();
    w.ask(1, &ask("a").lock("l/2", X)).waits();
    w.crash(1);
    let third = w.add_worker(true);
    assert_eq!(w.ask(third, &ask("b").lock("l/1", X)).slug(), "deadlock", "it may still be alive");
    w.advance(DEAD_AFTER);
    w.ask(third, &ask("b").lock("l/1", X)).waits();
    w.finish();
}

// Hierarchy.

#[test]
fn a_lock_in_a_hierarchy_announces_itself_above() {
    let mut w = World::with(classes(&[("stock", tree())]), 2, 0);
    let item = w.ask(0, &ask("a").lock("stock/a/b", X)).granted();
    let taken =
        w.workers[0].leases[&item].grants().iter().map(|grant| (grant.name.to_string(), grant.mode, grant.asked));
    assert_eq!(
        taken.collect::<Vec<_>>(),
        [("stock".into(), IX, false), ("stock/a".into(), IX, false), ("stock/a/b".into(), X, true)]
    );
    w.ask(1, &ask("b").lock("stock/a/c", X).wait(ms(0))).granted();
    assert_eq!(w.ask(1, &ask("c").lock("stock/a", S).wait(ms(0))).slug(), "lock-held");
    w.ask(1, &ask("d").lock("stock/z", S).wait(ms(0))).granted();
    assert_eq!(w.ask(1, &ask("e").lock("stock", S).wait(ms(0))).slug(), "lock-held");
    w.ask(1, &ask("f").lock("stock", IS).wait(ms(0))).granted();
    w.finish();
}

#[test]
fn without_re_entry_an_owner_may_still_take_siblings() {
    let mut w = World::with(classes(&[("stock", tree())]), 1, 0);
    w.ask(0, &ask("a").lock("stock/a", X).not_reentrant()).granted();
    w.ask(0, &ask("a").lock("stock/b", X).not_reentrant()).granted();
    w.ask(0, &ask("a").lock("stock/c", S).not_reentrant()).granted();
    assert_eq!(w.ask(0, &ask("a").lock("stock/c", S).not_reentrant()).cycle(), ["a", "a"]);
    w.finish();
}

#[test]
fn siblings_in_a_hierarchy_can_deadlock_and_are_refused() {
    let mut w = World::with(classes(&[("stock", tree())]), 2, 0);
    w.ask(0, &ask("a").lock("stock/a", X)).granted();
    w.ask(1, &ask("b").lock("stock/b", X)).granted();
    let all = w.ask(0, &ask("a").lock("stock", S)).waits();
    assert_eq!(w.ask(1, &ask("b").lock("stock/a", S)).cycle(), ["b", "a", "b"]);
    w.cancel(all);
    w.finish();
}

// Waits, TTLs, hold limits.

#[test]
fn a_wait_ends_at_its_moment_and_not_before() {
    let mut w = World::new(2);
    w.ask(0, &ask("h").lock("l/1", X)).granted();
    w.ask(1, &ask("w").lock("l/1", X).wait(ms(800))).waits();
    w.advance(ms(800) - MICRO);
    assert_eq!(w.queue("l/1"), ["h!", "w?"]);
    w.advance(MICRO);
    let Cause::WaitTimeout { waited, holders, .. } = &w.refused[0].1.cause else { panic!("{:?}", w.refused) };
    assert_eq!((*waited, holders[0].owner.as_str()), (ms(800), "h"));
    assert_eq!(w.queue("l/1"), ["h!"]);
    w.finish();
}

#[test]
fn wait_zero_is_granted_or_refused_as_held() {
    let mut w = World::new(2);
    let held = w.ask(0, &ask("h").lock("l/1", X).wait(ms(0))).granted();
    let Cause::Held { holders, retry_after } = w.ask(1, &ask("w").lock("l/1", S).wait(ms(0))).refused().cause else {
        panic!("not held")
    };
    assert_eq!((holders[0].mode, holders[0].asked_by.as_str()), (X, "test"));
    assert!(retry_after > Duration::ZERO && retry_after <= ms(5000));
    w.release(held);
    w.finish();
}

#[test]
fn the_ttl_of_a_crashed_holder_runs_out_at_its_moment_and_its_waiter_is_served_then() {
    let mut w = World::new(2);
    let held = w.ask(0, &ask("a").lock("l/1", X).ttl(ms(3000))).granted();
    w.advance(ms(10_000));
    assert!(w.holds(held), "a heartbeat renews it");
    let waiter = w.ask(1, &ask("b").lock("l/1", X)).waits();
    let last_beat = w.now;
    w.crash(0);
    w.advance(ms(3000) - MICRO);
    assert_eq!(w.queue("l/1"), ["a!", "b?"], "not before");
    w.advance(MICRO);
    assert_eq!((w.woken.clone(), w.now.since(last_beat)), (vec![waiter], ms(3000)));
    assert_eq!(w.expired(), [("a".into(), "l/1".into())]);
    w.finish();
}

#[test]
fn waiters_of_a_crashed_worker_leave_the_queue_long_before_its_holds() {
    let mut w = World::new(3);
    let held = w.ask(0, &ask("h").lock("l/1", X)).granted();
    w.ask(1, &ask("x").lock("l/2", X)).granted();
    w.ask(1, &ask("gone").lock("l/1", X)).waits();
    let next = w.ask(2, &ask("n").lock("l/1", X)).waits();
    w.crash(1);
    w.advance(DEAD_AFTER);
    assert_eq!(w.queue("l/1"), ["h!", "n?"]);
    assert_eq!(w.queue("l/2"), ["x!"]);
    w.release(held);
    assert_eq!(w.woken, [next]);
    w.finish();
}

#[test]
fn expiry_frees_without_anybody_asking() {
    let mut w = World::new(2);
    w.ask(0, &ask("a").lock("l/1", X).ttl(ms(2000))).granted();
    w.crash(0);
    w.advance(ms(2000));
    w.sweep(1);
    assert_eq!(w.queue("l/1"), [""; 0]);
    assert_eq!(w.expired().len(), 1);
    w.finish();
}

#[test]
fn nothing_is_renewed_past_its_hold_limit() {
    let mut w = World::new(2);
    let held = w.ask(0, &ask("a").lock("l/1", X).hold(ms(4000))).granted();
    let waiter = w.ask(1, &ask("b").lock("l/1", X)).waits();
    w.advance(ms(4000) - MICRO);
    assert!(w.holds(held));
    w.advance(MICRO);
    assert_eq!(w.lost, [(held, lock("l/1"), Loss::HoldLimit)]);
    assert_eq!(w.woken, [waiter]);
    w.finish();
}

#[test]
fn a_lease_without_a_session_lives_by_its_own_renewals() {
    let mut w = World::with(rules(), 0, 1);
    let held = w.ask(0, &ask("a").lock("l/1", X).ttl(ms(1000))).granted();
    let waiter = w.ask(0, &ask("b").lock("l/1", X)).waits();
    w.advance(ms(900));
    assert!(w.renew(held));
    w.advance(ms(900));
    assert!(w.renew(held));
    w.advance(ms(1000) - MICRO);
    assert!(w.woken.is_empty());
    w.advance(MICRO);
    assert_eq!(w.woken, [waiter]);
    assert!(!w.renew(held), "it ended");
    assert_eq!(w.lost, [(held, lock("l/1"), Loss::Expired)]);
    w.finish();
}

#[test]
fn a_late_release_says_what_had_ended_and_frees_nobody_else() {
    let mut w = World::with(rules(), 0, 1);
    let old = w.ask(0, &ask("a").lock("l/1", X).ttl(ms(1000))).granted();
    w.advance(ms(1000));
    let new = w.ask(0, &ask("b").lock("l/1", X)).granted();
    assert_eq!(w.release(old), [lock("l/1")]);
    assert_eq!(w.queue("l/1"), ["b!"]);
    assert!(w.release(new).is_empty());
    w.finish();
}

#[test]
fn a_worker_that_was_away_stands_in_line_anew_and_is_seen_by_cycle_searches() {
    let mut w = World::new(3);
    let l1 = w.ask(2, &ask("h").lock("l/1", X).ttl(ms(60_000))).granted();
    w.ask(0, &ask("a").lock("l/2", X).ttl(ms(60_000))).granted();
    let away = w.ask(0, &ask("a").lock("l/1", X)).waits();
    w.stall(0);
    w.advance(DEAD_AFTER + BEAT);
    w.sweep(1);
    assert_eq!(w.queue("l/1"), ["h!"], "taken for dead");
    w.resume(0);
    assert_eq!(w.queue("l/1"), ["h!", "a?"]);
    assert_eq!(w.ask(2, &ask("h").lock("l/2", X)).cycle(), ["h", "a", "h"]);
    w.release(l1);
    assert_eq!(w.woken, [away]);
    w.finish();
}

// Requests for many locks.

#[test]
fn many_locks_are_all_or_nothing() {
    let mut w = World::new(2);
    let held = w.ask(0, &ask("h").lock("l/3", X)).granted();
    let all = ask("o").lock("l/2", X).lock("l/1", X).lock("l/3", X);
    assert_eq!(w.ask(1, &all.clone().wait(ms(0))).slug(), "lock-held");
    assert_eq!(w.queue("l/1"), [""; 0]);
    let waits = w.ask(1, &all.clone().wait(ms(500))).waits();
    assert_eq!(
        (w.queue("l/1"), w.queue("l/2"), w.queue("l/3")),
        (vec!["o!".into()], vec!["o!".into()], vec!["h!".into(), "o?".into()])
    );
    let behind = w.ask(0, &ask("b").lock("l/1", X)).waits();
    w.advance(ms(500));
    assert_eq!(w.refused[0].0, waits);
    assert_eq!(w.woken, [behind], "the refused gives back what it had");
    let waits = w.ask(1, &ask("p").lock("l/2", X).lock("l/3", X)).waits();
    w.release(held);
    assert_eq!(w.woken, [waits]);
    w.release(waits);
    w.finish();
}

#[test]
fn each_lock_of_a_request_has_its_own_deadline() {
    let mut w = World::new(2);
    let first = w.ask(0, &ask("h").lock("l/1", X)).granted();
    w.ask(0, &ask("h").lock("l/2", X)).granted();
    // Waits up to 3 s for l/1, but all in all 1 s for l/2.
    let waits = w.ask(1, &ask("o").lock("l/2", X).wait(ms(1000)).lock("l/1", X)).waits();
    w.advance(ms(1500));
    w.release(first);
    assert!(!w.holds(waits));
    let refusal = &w.refused[0].1;
    assert_eq!((refusal.lock.as_str(), refusal.cause.slug()), ("l/2", "wait-timeout"));
    assert_eq!(w.queue("l/1"), [""; 0]);
    w.finish();
}

#[test]
fn a_lock_that_was_lost_while_waiting_for_the_next_is_not_handed_out() {
    let mut w = World::new(2);
    let second = w.ask(0, &ask("h").lock("l/2", X)).granted();
    let waits = w.ask(1, &ask("o").lock("l/1", X).lock("l/2", X).hold(ms(1000))).waits();
    w.advance(ms(1500));
    let other = w.ask(0, &ask("other").lock("l/1", X)).granted();
    w.release(second);
    assert!(!w.holds(waits), "its first lock has passed its hold limit and is another's");
    w.release(other);
    w.finish();
}

#[test]
fn a_request_without_a_session_keeps_what_it_has_while_it_waits_for_more() {
    let mut w = World::with(rules(), 0, 1);
    let second = w.ask(0, &ask("h").lock("l/2", X).ttl(ms(60_000))).granted();
    let waits = w.ask(0, &ask("o").lock("l/1", X).lock("l/2", X).ttl(ms(1000))).waits();
    w.advance(ms(9000));
    assert_eq!(w.queue("l/1"), ["o!"]);
    w.release(second);
    assert_eq!(w.woken, [waits]);
    w.finish();
}

#[test]
fn one_lock_named_twice_is_taken_once_in_the_mode_that_gives_both() {
    let mut w = World::new(1);
    let both = w.ask(0, &ask("a").lock("l/1", S).lock("l/1", IX)).granted();
    let grants = w.workers[0].leases[&both].grants();
    assert_eq!((grants.len(), grants[0].mode), (1, SIX));
    w.finish();
}

// Limits.

#[test]
fn every_limit_refuses_and_leaves_no_trace() {
    let limited = |change: fn(&mut interlock_core::Limits)| {
        let mut rules = rules();
        change(&mut rules.limits);
        World::with(rules, 2, 0)
    };
    let limit = |got: common::Got| match got.refused().cause {
        Cause::Limit { limit, value } => (limit, value),
        other => panic!("{other:?}"),
    };

    let mut w = limited(|limits| limits.locks = 2);
    w.ask(0, &ask("a").lock("l/1", X)).granted();
    assert_eq!(limit(w.ask(0, &ask("b").lock("l/2", X).lock("l/3", X))), (Limit::Locks, 2));
    let second = w.ask(0, &ask("b").lock("l/2", X)).granted();
    w.advance(BEAT);
    assert_eq!(limit(w.ask(1, &ask("c").lock("l/3", X))), (Limit::Locks, 2), "known from the other's heartbeat");
    w.release(second);
    w.ask(0, &ask("b").lock("l/4", X)).granted();
    w.finish();

    let mut w = limited(|limits| limits.locks_per_owner = Some(2));
    let first = w.ask(0, &ask("a").lock("l/1", X).lock("l/2", X)).granted();
    w.ask(1, &ask("a").lock("l/1", X)).granted();
    assert_eq!(limit(w.ask(1, &ask("a").lock("l/3", X))), (Limit::LocksPerOwner, 2));
    w.release(first);
    w.ask(1, &ask("a").lock("l/3", X)).granted();
    w.finish();

    let mut w = limited(|limits| limits.waiters_per_lock = 1);
    w.ask(0, &ask("a").lock("l/1", X)).granted();
    let only = w.ask(1, &ask("b").lock("l/1", X)).waits();
    assert_eq!(limit(w.ask(0, &ask("c").lock("l/1", X))), (Limit::WaitersPerLock, 1));
    assert_eq!(w.queue("l/1"), ["a!", "b?"]);
    w.cancel(only);
    w.ask(0, &ask("c").lock("l/1", X)).waits();
    w.finish();

    let mut w = limited(|limits| limits.waiters = 1);
    w.ask(0, &ask("a").lock("l/1", X).lock("l/2", X)).granted();
    w.ask(0, &ask("b").lock("l/1", X)).waits();
    assert_eq!(limit(w.ask(0, &ask("c").lock("l/2", X))), (Limit::Waiters, 1));
    w.advance(BEAT);
    assert_eq!(limit(w.ask(1, &ask("c").lock("l/2", X))), (Limit::Waiters, 1));
    w.finish();
}

#[test]
fn items_of_the_dead_do_not_count_against_an_owner() {
    let mut rules = rules();
    rules.limits.locks_per_owner = Some(1);
    let mut w = World::with(rules, 2, 0);
    w.ask(0, &ask("a").lock("l/1", X).ttl(ms(2000))).granted();
    w.crash(0);
    assert_eq!(w.ask(1, &ask("a").lock("l/2", X)).slug(), "too-many-locks");
    w.advance(ms(2000));
    w.sweep(1);
    w.ask(1, &ask("a").lock("l/2", X)).granted();
    w.finish();
}

// Fences.

#[test]
fn fences_rise_over_forgotten_locks_and_a_clock_that_steps_back() {
    let mut w = World::new(1);
    let mut last = 0;
    for step in [0_i64, 50, -7_000_000, 3, -1, 0] {
        w.unix_micros = w.unix_micros.saturating_add_signed(step);
        let lease = w.ask(0, &ask("a").lock("l/1", X)).granted();
        let fence = w.fence(lease, "l/1");
        assert!(fence > last, "{fence} after {last}");
        last = fence;
        w.release(lease);
        assert_eq!(w.queue("l/1"), [""; 0], "the lock itself is forgotten");
    }
    assert!((1_764_000_000_000_000 / 10..=Fence::MAX.0).contains(&last));
    w.finish();
}

// Renewals for another time, and the glass that is broken in an emergency.

#[test]
fn a_renewal_may_change_the_ttl() {
    let mut w = World::with(rules(), 0, 1);
    let held = w.ask(0, &ask("a").lock("l/1", X).ttl(ms(1000))).granted();
    w.advance(ms(500));
    let mut lease = w.workers[0].leases.remove(&held).unwrap();
    assert_eq!(w.on(0, |table, scene| table.renew_for(scene, &mut lease, ms(3000))), Ok(None));
    assert_eq!(lease.ttl(), ms(3000));
    w.workers[0].leases.insert(held, lease);
    w.advance(ms(2999));
    assert!(w.renew(held));
    w.advance(ms(3000));
    assert!(!w.renew(held));
    w.finish();
}

#[test]
fn breaking_the_glass_frees_a_lock_and_fences_its_holder_off() {
    let mut w = World::new(2);
    let held = w.ask(0, &ask("a").lock("l/1", X)).granted();
    let old = w.fence(held, "l/1");
    let waiter = w.ask(1, &ask("b").lock("l/1", X)).waits();
    let freed = w.on(1, |table, scene| table.break_glass(scene, &lock("l/1"))).unwrap();
    assert_eq!(freed.iter().map(|entry| entry.owner.as_str()).collect::<Vec<_>>(), ["a"]);
    w.workers[0].steady.clear();
    w.poll(waiter);
    assert!(w.holds(waiter) && w.fence(waiter, "l/1") > old);
    assert!(!w.renew(held));
    w.finish();
}

// Conflicts, failures, and what others do in between.

#[test]
fn conflicts_at_every_write_change_nothing() {
    for conflicts in 0..12 {
        let mut w = World::with(classes(&[("r", ranked(1))]), 2, 0);
        let step = |w: &mut World| w.store.mem.conflict_next(conflicts);
        step(&mut w);
        let held = w.ask(0, &ask("a").lock("r/1", X).lock("r/2", X)).granted();
        step(&mut w);
        let waiter = w.ask(1, &ask("b").lock("r/1", S).lock("r/2", S)).waits();
        step(&mut w);
        let other = w.ask(1, &ask("c").lock("r/2", X)).waits();
        step(&mut w);
        w.release(held);
        assert_eq!(w.woken, [other], "c stood at r/2 first; b gets r/1 and stands behind it");
        w.release(other);
        assert_eq!(w.woken, [waiter]);
        w.store.mem.conflict_next(0);
        w.finish();
    }
}

#[test]
fn a_record_that_others_keep_changing_is_given_up_on() {
    let mut w = World::new(1);
    w.store.mem.conflict_next(u32::MAX);
    assert_eq!(w.ask(0, &ask("a").lock("l/1", X)).slug(), "backend-unavailable");
    w.finish();
}

#[test]
fn a_store_that_fails_at_any_access_loses_nothing() {
    for at in 0..60 {
        for failures in [1, 2, 3, 50] {
            let mut w = World::with(classes(&[("r", ranked(1))]), 2, 0);
            let other = w.ask(1, &ask("x").lock("r/2", X)).granted();
            let behind = w.ask(1, &ask("y").lock("r/1", S)).granted();
            w.store.fail_after(at, failures);
            let got = w.ask(0, &ask("a").lock("r/1", S).lock("r/2", X));
            let waits = matches!(got, common::Got::Waits(_));
            w.release(other);
            w.release(behind);
            assert!(waits || matches!(got, common::Got::Refused(_)));
            w.store.fail_after(0, 0);
            // Debts are settled with the next heartbeat, and what was not granted then is granted on the next poll.
            w.advance(DEAD_AFTER);
            w.finish();
        }
    }
}

/// Lets `act` happen in a second world, once, before access number `at` of what the first one does next.
fn in_between(w: &World, at: usize, act: impl FnOnce(&mut World) + 'static) -> Rc<RefCell<World>> {
    let twin = Rc::new(RefCell::new(w.twin(1)));
    let (inner, mut act, mut left) = (Rc::clone(&twin), Some(act), at);
    w.store.hook(move |_| {
        if left == 0
            && let Some(act) = act.take()
        {
            act(&mut inner.borrow_mut());
        }
        left = left.saturating_sub(1);
    });
    twin
}

#[test]
fn of_two_that_close_one_cycle_at_the_same_time_one_is_refused() {
    for at in 0..30 {
        let mut w = World::new(1);
        w.ask(0, &ask("a").lock("l/1", X)).granted();
        w.ask(0, &ask("b").lock("l/2", X)).granted();
        let answer = Rc::new(RefCell::new(None));
        let told = Rc::clone(&answer);
        let twin = in_between(&w, at, move |twin| {
            *told.borrow_mut() = Some(twin.ask(0, &ask("b").lock("l/1", X)));
        });
        w.checks = false;
        let a = w.ask(0, &ask("a").lock("l/2", X));
        w.store.unhook();
        let Some(b) = answer.borrow_mut().take() else {
            a.waits();
            assert!(at > 8, "the other was to act at access {at}");
            continue;
        };
        let refused = [&a, &b].iter().filter(|got| matches!(got, common::Got::Refused(_))).count();
        assert!(refused >= 1, "both wait for each other (access {at})");
        for got in [a, b] {
            match got {
                common::Got::Waits(lease) if w.worker_of(lease).is_some() => w.cancel(lease),
                common::Got::Waits(lease) => twin.borrow_mut().cancel(lease),
                got => assert_eq!(got.slug(), "deadlock"),
            }
        }
        w.finish();
    }
}

#[test]
fn a_cycle_that_comes_apart_while_it_is_read_is_refused_to_nobody_but_another_is_still_found() {
    for at in 0..40 {
        let mut w = World::new(1);
        let twin = Rc::new(RefCell::new(w.twin(1)));
        // b and c share l/1 and both wait for a, who asks for l/1: two cycles. The one through b comes apart.
        w.ask(0, &ask("a").lock("l/2", X)).granted();
        w.ask(0, &ask("b").lock("l/1", S)).granted();
        w.ask(0, &ask("c").lock("l/1", S)).granted();
        let b = twin.borrow_mut().ask(0, &ask("b").lock("l/2", X)).waits();
        let c = w.ask(0, &ask("c").lock("l/2", X)).waits();
        let (inner, mut left) = (Rc::clone(&twin), at);
        w.store.hook(move |_| {
            if left == 0 {
                inner.borrow_mut().cancel(b);
            }
            left = usize::wrapping_sub(left, 1);
        });
        w.checks = false;
        let cycle = w.ask(0, &ask("a").lock("l/1", X)).cycle();
        assert!(cycle == ["a", "c", "a"] || cycle == ["a", "b", "a"], "{cycle:?}");
        w.store.unhook();
        w.cancel(c);
        if w.queue("l/2").contains(&"b?".into()) {
            twin.borrow_mut().cancel(b);
        }
        w.finish();
    }
}

#[test]
fn a_lone_cycle_that_comes_apart_while_it_is_read_is_refused_to_nobody() {
    let mut let_go = 0;
    for at in 0_u32..40 {
        let mut w = World::new(1);
        let twin = Rc::new(RefCell::new(w.twin(1)));
        w.ask(0, &ask("a").lock("l/2", X)).granted();
        w.ask(0, &ask("b").lock("l/1", X)).granted();
        let b = twin.borrow_mut().ask(0, &ask("b").lock("l/2", X)).waits();
        let (inner, mut left, done) = (Rc::clone(&twin), at, Rc::new(RefCell::new(false)));
        let gone = Rc::clone(&done);
        w.store.hook(move |access| {
            // Up to the last look at it; after that the refusal is decided.
            if left == 0 && !*gone.borrow() && access.kind != Kind::Sessions {
                inner.borrow_mut().cancel(b);
                *gone.borrow_mut() = true;
            }
            left = left.saturating_sub(1);
        });
        let got = w.ask(0, &ask("a").lock("l/1", X));
        w.store.unhook();
        match got {
            common::Got::Waits(_) => let_go += 1,
            got => assert_eq!(got.cycle(), ["a", "b", "a"]),
        }
        if !*done.borrow() {
            twin.borrow_mut().cancel(b);
        }
        w.finish();
    }
    assert!(let_go >= 6, "before each access up to the search's last one: {let_go}");
}

#[test]
fn the_index_misses_nothing_though_others_tidy_it_at_any_moment() {
    for at in 0..30 {
        for with_session in [true, false] {
            let mut rules = classes(&[("r", ranked(1))]);
            rules.limits.locks_per_owner = Some(2);
            let mut w = World::with(rules, 0, 0);
            let worker = w.add_worker(with_session);
            let _twin = in_between(&w, at, |twin| {
                twin.sweep(0);
                // Over the limit, which looks for items that can be dropped.
                drop(twin.ask(0, &ask("a").lock("r/7", X).lock("r/8", X).lock("r/9", X)));
            });
            w.ask(worker, &ask("a").lock("r/5", X)).granted();
            w.store.unhook();
            let (owners, _) = w.store.mem.read::<OwnerBucket>(w.store.bucket("a")).unwrap();
            assert_eq!(owners.items(&owner("a")).len(), 1, "access {at}");
            assert_eq!(w.ask(worker, &ask("a").lock("r/1", X)).slug(), "order-violation");
            w.finish();
        }
    }
}

#[test]
fn re_entry_is_immediate_even_while_another_is_about_to_be_refused() {
    for at in 0..20 {
        let mut w = World::new(1);
        w.ask(0, &ask("a").lock("l/1", X)).granted();
        w.ask(0, &ask("b").lock("l/2", X)).granted();
        w.ask(0, &ask("a").lock("l/2", X)).waits();
        let answer = Rc::new(RefCell::new(None));
        let told = Rc::clone(&answer);
        // b closes the cycle and will be refused; before that it stands at l/1 for a moment.
        let _twin = in_between(&w, at, move |twin| {
            *told.borrow_mut() = Some(twin.ask(0, &ask("a").lock("l/1", X)));
        });
        w.checks = false;
        w.ask(0, &ask("b").lock("l/1", X)).cycle();
        w.store.unhook();
        if let Some(got) = answer.borrow_mut().take() {
            got.granted();
        }
    }
}

#[test]
fn two_workers_never_both_get_a_lock_whatever_lies_between_read_and_write() {
    for mode in [Mode::Exclusive, Mode::SharedIntentExclusive] {
        for at in 0..8 {
            let mut w = World::new(1);
            let answer = Rc::new(RefCell::new(None));
            let told = Rc::clone(&answer);
            let twin = in_between(&w, at, move |twin| {
                *told.borrow_mut() = Some(twin.ask(0, &ask("b").lock("l/1", mode).wait(ms(0))));
            });
            let a = w.ask(0, &ask("a").lock("l/1", mode).wait(ms(0)));
            w.store.unhook();
            let b = answer.borrow_mut().take();
            match (a, b) {
                (common::Got::Granted(_), None) => {}
                (common::Got::Granted(_), Some(b)) => assert_eq!(b.slug(), "lock-held"),
                (common::Got::Refused(refusal), Some(b)) => {
                    assert_eq!(refusal.cause.slug(), "lock-held");
                    let b = b.granted();
                    twin.borrow_mut().release(b);
                }
                other => panic!("{other:?}"),
            }
            w.finish();
        }
    }
}

#[test]
fn a_request_for_nothing_is_granted_nothing() {
    let mut w = World::new(1);
    let lease = w.ask(0, &ask("a")).granted();
    assert!(w.release(lease).is_empty());
    let request = Request::new(interlock_core::LeaseId(7), owner("a"), w.now, Vec::new(), &w.rules.classes);
    assert!(request.wants().is_empty());
    w.finish();
}
