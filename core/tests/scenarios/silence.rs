//! Workers that were silent for too long, and what others do at that very moment. All of these were found by the
//! simulator.

use std::cell::RefCell;
use std::rc::Rc;

use crate::common::{Got, S, World, X, ask, ms};
use crate::interference::in_between;
use crate::{classes, ranked};
use interlock_core::session::DEAD_AFTER;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

/// A world, and a second one over the same table whose worker does `late` before access `at` of what the first one does
/// next, or after it.
fn meets(w: &mut World, twin: &Rc<RefCell<World>>, at: usize, late: impl Fn(&mut World) + Clone + 'static) {
    twin.borrow_mut().now = w.now;
    let (inner, act, mut left) = (Rc::clone(twin), late.clone(), at);
    let done = Rc::new(RefCell::new(false));
    let did = Rc::clone(&done);
    w.store.hook(move |_| {
        if left == 0 {
            act(&mut inner.borrow_mut());
            *did.borrow_mut() = true;
        }
        left = usize::wrapping_sub(left, 1);
    });
    let other = w.ask(0, &ask("b").lock("l/1", X).wait(ms(0)));
    w.store.unhook();
    if !*done.borrow() {
        late(&mut twin.borrow_mut());
    }
    drop(other);
}

#[test]
fn a_late_heartbeat_saves_a_lease_or_does_not_but_two_never_have_it() {
    for at in 0..10 {
        let mut w = World::new(1);
        let twin = Rc::new(RefCell::new(w.twin(1)));
        let held = twin.borrow_mut().ask(0, &ask("a").lock("l/1", X).ttl(ms(1000))).granted();
        w.checks = false;
        w.advance(ms(999));
        w.now = w.now + ms(1);
        meets(&mut w, &twin, at, |twin| twin.beat(0));
        let taken = w.queue("l/1") == ["b!"];
        assert_ne!(taken, twin.borrow().holds(held), "access {at}");
    }
}

#[test]
fn a_grant_that_its_worker_learns_of_late_is_its_own_or_anothers_but_never_both() {
    for at in 0..10 {
        let mut w = World::new(1);
        let twin = Rc::new(RefCell::new(w.twin(1)));
        let other = w.ask(0, &ask("x").lock("l/1", X)).granted();
        let waits = twin.borrow_mut().ask(0, &ask("a").lock("l/1", X).ttl(ms(1000))).waits();
        w.checks = false;
        w.release(other);
        w.advance(ms(999));
        w.now = w.now + ms(1);
        meets(&mut w, &twin, at, move |twin| {
            twin.beat(0);
            twin.poll(waits);
        });
        let taken = w.queue("l/1").contains(&"b!".into());
        assert_ne!(taken, twin.borrow().holds(waits), "access {at}");
    }
}

#[test]
fn what_was_taken_under_a_forgotten_session_is_kept_by_the_next_one() {
    let mut w = World::new(2);
    w.now = w.now + w.rules.limits.longest_ttl + ms(1);
    w.checks = false;
    w.beat(1);
    assert!(w.on(1, |table, scene| table.keep_house(scene, true)).unwrap());
    // The store failed when it was to beat; it is forgotten, and does not know it yet.
    let held = w.ask(0, &ask("a").lock("l/1", X).ttl(ms(1000))).granted();
    w.beat(0);
    w.advance(ms(5000));
    assert_eq!((w.queue("l/1"), w.holds(held)), (vec!["a!".into()], true));
    w.checks = true;
    w.finish();
}

#[test]
fn a_second_try_at_giving_back_ends_nobody_elses_lease() {
    let mut w = World::new(2);
    let held = w.ask(1, &ask("a").lock("l/1", X).ttl(ms(1000))).granted();
    let waits = w.ask(0, &ask("b").lock("l/1", X)).waits();
    w.store.fail_after(0, 50);
    w.cancel(waits);
    w.store.fail_after(0, 0);
    // Reads the heartbeats, for the search.
    w.ask(0, &ask("c").lock("l/1", X)).waits();
    w.checks = false;
    w.now = w.now + ms(700);
    w.beat(1);
    w.now = w.now + ms(400);
    assert!(w.on(0, |table, scene| table.settle_debts(scene)));
    assert_eq!(w.queue("l/1"), ["a!", "c?"]);
    w.release(held);
    w.checks = true;
    w.finish();
}

#[test]
fn one_that_was_taken_for_dead_and_is_granted_on_its_return_keeps_the_order() {
    let mut w = World::with(classes(&[("r", ranked(1))]), 2, 0);
    let other = w.ask(1, &ask("x").lock("r/5", X)).granted();
    let waits = w.ask(0, &ask("a").lock("r/5", X).wait(ms(60_000))).waits();
    w.stall(0);
    w.advance(DEAD_AFTER + ms(1000));
    assert_eq!(w.queue("r/5"), ["x!"], "its worker looks dead");
    w.release(other);
    w.resume(0);
    assert!(w.holds(waits));
    assert_eq!(w.ask(1, &ask("a").lock("r/1", X)).slug(), "order-violation");
    w.finish();
}

#[test]
fn a_wait_is_found_though_the_index_was_tidied_while_its_worker_stood_still() {
    for at in 0..30 {
        let mut w = World::new(1);
        w.ask(0, &ask("a").lock("l/1", X).ttl(ms(60_000))).granted();
        let twin = in_between(&w, at, |twin| {
            twin.now = twin.now + DEAD_AFTER + ms(100);
            twin.beat(0);
            twin.sweep(0);
        });
        twin.borrow_mut().ask(0, &ask("b").lock("l/2", X)).granted();
        twin.borrow_mut().ask(0, &ask("b").lock("l/1", X)).waits();
        w.checks = false;
        match w.ask(0, &ask("a").lock("l/2", X)) {
            // It stood there already, and was taken for dead: it comes back when it is polled, and searches then.
            Got::Waits(_) => assert_eq!(w.queue("l/2"), ["b!"], "access {at}"),
            got => assert_eq!(got.cycle(), ["a", "b", "a"], "access {at}"),
        }
    }
}

#[test]
fn who_does_not_wait_is_never_told_of_a_deadlock() {
    let mut tries = 0;
    for at in 0..20 {
        let mut w = World::new(1);
        w.ask(0, &ask("b").lock("l/1", X)).granted();
        w.ask(0, &ask("a").lock("l/1", X)).waits();
        w.ask(0, &ask("a").lock("l/2", S)).granted();
        let answer = Rc::new(RefCell::new(None));
        let told = Rc::clone(&answer);
        // b closes the cycle and will be refused; a upgrades ahead of it while it stands there.
        let _twin = in_between(&w, at, move |twin| {
            *told.borrow_mut() = Some(twin.ask(0, &ask("a").lock("l/2", X).wait(ms(0))));
        });
        w.checks = false;
        w.ask(0, &ask("b").lock("l/2", X)).cycle();
        w.store.unhook();
        if let Some(Got::Refused(refusal)) = answer.borrow_mut().take() {
            assert_eq!(refusal.cause.slug(), "lock-held", "access {at}");
            tries += 1;
        }
    }
    assert!(tries > 0, "the moment was never met");
}

/// A worker of two with a waiter behind the other's lease, and what both would do next without the other's heartbeats.
fn waits_for_another() -> (World, interlock_core::LeaseId) {
    let mut w = World::new(2);
    w.ask(1, &ask("a").lock("l/1", X).ttl(ms(2000))).granted();
    let waits = w.ask(0, &ask("b").lock("l/1", X).wait(ms(9000))).waits();
    w.checks = false;
    (w, waits)
}

#[test]
fn heartbeats_that_come_spare_a_waiter_its_look() {
    let (mut w, waits) = waits_for_another();
    let began = w.now;
    let at = |w: &World| {
        let pending = &w.workers[0].pending[&waits];
        (pending.poll_at(), w.workers[0].table.poll_at(pending))
    };
    let (first, sooner) = at(&w);
    assert!(first <= began + DEAD_AFTER && sooner >= first);
    // Each beats: for its own end it need not look, nor for that of the lease in its way.
    w.now = w.now + ms(1000);
    w.beat(1);
    w.beat(0);
    assert_eq!(at(&w), (first, w.now + DEAD_AFTER));
    // The other falls silent: its lease ends by its TTL, which no beat of this one's puts off.
    let silent = w.now;
    for _ in 0..3 {
        w.now = w.now + ms(600);
        w.beat(0);
    }
    assert_eq!(at(&w), (first, silent + ms(2000)));
}

#[test]
fn a_deadline_and_a_doubt_are_not_put_off_by_heartbeats() {
    let (mut w, waits) = waits_for_another();
    let deadline = w.workers[0].pending[&waits].deadline();
    for _ in 0..8 {
        w.now = w.now + ms(1000);
        w.beat(0);
        w.beat(1);
    }
    assert_eq!(w.workers[0].table.poll_at(&w.workers[0].pending[&waits]), deadline);
    // The other was silent for so long that searches may have left it out: everybody has to search again.
    w.now = w.now + DEAD_AFTER;
    w.beat(1);
    w.beat(0);
    let pending = &w.workers[0].pending[&waits];
    assert_eq!(w.workers[0].table.poll_at(pending), pending.poll_at());
}
