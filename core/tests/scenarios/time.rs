//! Waits, TTLs, hold limits, sessions.

use crate::MICRO;
use crate::common::{S, World, X, ask, lock, ms, rules};
use interlock_core::session::{BEAT, DEAD_AFTER};
use interlock_core::{Cause, Census, Duration, Loss, Store, Tally};
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

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

#[test]
fn a_sweep_hands_over_what_it_frees() {
    let mut w = World::new(3);
    w.ask(0, &ask("a").lock("l/1", X).ttl(ms(2000))).granted();
    let waiter = w.ask(1, &ask("b").lock("l/1", X).ttl(ms(10_000))).waits();
    w.crash(0);
    w.stall(1);
    // Before the waiter's own worker counts as dead nobody but the sweep looks at the lock.
    w.advance(DEAD_AFTER - BEAT);
    w.resume(1);
    w.stall(1);
    w.advance(ms(2000) - (DEAD_AFTER - BEAT) + BEAT);
    assert_eq!(w.queue("l/1"), ["b!"]);
    w.resume(1);
    assert!(w.holds(waiter));
    w.finish();
}

#[test]
fn a_worker_that_was_silent_for_less_than_its_ttl_keeps_what_it_holds() {
    let mut w = World::new(2);
    let held = w.ask(0, &ask("a").lock("l/1", X).ttl(ms(60_000)).hold(ms(600_000))).granted();
    // So long that what it holds hangs on the heartbeat, and no longer on the grant.
    w.advance(ms(50_000));
    w.stall(0);
    w.advance(ms(59_000));
    assert!(w.on(1, |table, scene| table.keep_house(scene, true)).unwrap());
    assert_eq!(w.ask(1, &ask("b").lock("l/1", X).wait(ms(0))).slug(), "lock-held");
    w.resume(0);
    assert!(w.holds(held));
    w.finish();
}

#[test]
fn a_heartbeat_has_to_keep_the_shortest_ttl_that_is_left() {
    let mut w = World::new(1);
    let shortest = |w: &World| w.workers[0].table.shortest_ttl();
    let one = w.ask(0, &ask("a").lock("l/1", X).ttl(ms(900))).granted();
    let two = w.ask(0, &ask("b").lock("l/2", X).ttl(ms(900))).granted();
    let long = w.ask(0, &ask("c").lock("l/3", X).ttl(ms(4000))).granted();
    w.release(one);
    assert_eq!(shortest(&w), ms(900), "another has the same");
    w.release(two);
    assert_eq!(shortest(&w), ms(4000));
    w.release(long);
    assert_eq!(shortest(&w), Duration::MAX);
    w.finish();
}

#[test]
fn a_sweep_counts_what_is_held_and_waited_for_in_all_buckets() {
    let mut w = World::new(2);
    for (owner, lock) in [("a", "l/1"), ("b", "l/2"), ("c", "l/3"), ("d", "k/1")] {
        w.ask(0, &ask(owner).lock(lock, S)).granted();
    }
    w.ask(1, &ask("e").lock("l/1", S)).granted();
    w.ask(1, &ask("f").lock("l/1", X)).waits();
    w.ask(1, &ask("g").lock("l/2", X)).waits();
    let census = w.on(0, |table, scene| {
        let mut census = Census::default();
        (0..scene.store.buckets()).for_each(|bucket| table.sweep(scene, bucket, &mut census).unwrap());
        census
    });
    let tally = |held, waiting| Tally { held, waiting };
    // Without ranks and limits only those who wait are listed.
    assert_eq!((census.locks, census.owners, census.detached), (4, 2, 0));
    assert_eq!(census.classes, [("k".to_owned(), tally(1, 0)), ("l".to_owned(), tally(4, 2))].into());
}
