//! Requests for many locks; limits; fences; renewals and the glass that is broken in an emergency.

use crate::MICRO;
use crate::common::{Got, IX, S, SIX, World, X, ask, lock, ms, owner, rules};
use interlock_core::session::BEAT;
use interlock_core::store::{LockBucket, Store};
use interlock_core::{Cause, Fence, Limit};
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

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
    let refusal = &w.refused[0].1;
    assert_eq!((refusal.lock.as_str(), refusal.cause.slug()), ("l/1", "lease-lost"), "not the lock that it waited for");
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
    let limit = |got: Got| match got.refused().cause {
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

#[test]
fn an_owner_may_have_as_many_locks_as_the_limit_says_whatever_the_dead_left_in_the_index() {
    let mut rules = rules();
    rules.limits.locks_per_owner = Some(2);
    // Nobody keeps house: what the first worker leaves in the index stays there.
    let mut w = World::with(rules, 1, 1);
    w.ask(0, &ask("a").lock("l/1", X).ttl(ms(2000))).granted();
    w.crash(0);
    w.advance(ms(2000));
    let other = w.ask(1, &ask("b").lock("l/1", X)).granted();
    w.ask(1, &ask("a").lock("l/2", X).lock("l/3", X)).granted();
    assert_eq!(w.ask(1, &ask("a").lock("l/4", X)).slug(), "too-many-locks");
    w.release(other);
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
    let last = w.fence(waiter, "l/1");
    w.workers[1].steady.clear();
    w.on(1, |table, scene| table.break_glass(scene, &lock("l/1"))).unwrap();
    let (locks, _) = w.store.mem.read::<LockBucket>(w.store.bucket("l/1")).unwrap();
    assert!(locks.highest.0 > last, "nobody is there to be granted the lock, and its fence has risen");
    w.finish();
}

#[test]
fn a_fence_names_its_holder_until_the_lease_ends() {
    let mut w = World::with(rules(), 0, 1);
    let held = w.ask(0, &ask("a").lock("l/1", X).ttl(ms(1000))).granted();
    let fence = Fence(w.fence(held, "l/1"));
    let holder = |w: &mut World| w.on(0, |table, scene| table.holder_of(scene, &lock("l/1"), fence)).unwrap();
    w.advance(ms(1000) - MICRO);
    assert_eq!(holder(&mut w), Some(owner("a")));
    w.advance(MICRO);
    assert_eq!(w.queue("l/1"), ["a!"], "nobody has come by to remove it");
    assert_eq!(holder(&mut w), None);
    w.finish();
}
