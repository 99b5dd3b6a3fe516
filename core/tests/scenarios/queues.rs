//! The queue rule, and permits.

use crate::classes;
use crate::common::{IX, S, SIX, World, X, ask, ms, rules};
use interlock_core::Class;
use interlock_core::session::DEAD_AFTER;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

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

#[test]
fn who_waits_without_a_session_keeps_its_place_until_its_deadline() {
    let mut w = World::with(rules(), 0, 1);
    let held = w.ask(0, &ask("h").lock("l/1", X).ttl(ms(60_000))).granted();
    let first = w.ask(0, &ask("a").lock("l/1", X)).waits();
    w.advance(ms(1000));
    w.ask(0, &ask("b").lock("l/1", X)).waits();
    for _ in 0..10 {
        w.advance(DEAD_AFTER / 3);
        assert_eq!(w.queue("l/1"), ["h!", "a?", "b?"]);
    }
    w.release(held);
    assert_eq!(w.woken, [first]);
    w.finish();
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
