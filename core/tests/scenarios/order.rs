//! The declared order, and hierarchies.

use crate::common::{IS, IX, S, World, X, ask, lock, ms};
use crate::{classes, ranked, tree};
use interlock_core::{Cause, Class, Within};
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

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
fn a_lock_that_is_only_waited_for_is_no_matter_of_order() {
    let mut w = World::with(classes(&[("a", ranked(1))]), 2, 0);
    w.ask(0, &ask("h").lock("a/9", X)).granted();
    let waits = w.ask(0, &ask("o").lock("a/9", X)).waits();
    let low = w.ask(1, &ask("o").lock("a/1", X)).granted();
    w.cancel(waits);
    w.release(low);
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
