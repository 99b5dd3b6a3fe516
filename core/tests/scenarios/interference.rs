//! Conflicts, failures, and what others do between any two accesses of the store.

use std::cell::RefCell;
use std::rc::Rc;

use crate::common::{Got, IS, IX, S, SIX, World, X, ask, ms, owner};
use crate::{classes, ranked};
use interlock_core::session::{BEAT, DEAD_AFTER};
use interlock_core::store::{Kind, OwnerBucket, Store};
use interlock_core::{Mode, Request};
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

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
            let waits = matches!(got, Got::Waits(_));
            w.release(other);
            w.release(behind);
            assert!(waits || matches!(got, Got::Refused(_)));
            w.store.fail_after(0, 0);
            // Debts are settled with the next heartbeat, and what was not granted then is granted on the next poll.
            w.advance(DEAD_AFTER);
            w.finish();
        }
    }
}

/// Lets `act` happen in a second world, once, before access number `at` of what the first one does next.
pub fn in_between(w: &World, at: usize, act: impl FnOnce(&mut World) + 'static) -> Rc<RefCell<World>> {
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
            assert!(at > 6, "the other was to act at access {at}");
            continue;
        };
        let refused = [&a, &b].iter().filter(|got| matches!(got, Got::Refused(_))).count();
        assert!(refused >= 1, "both wait for each other (access {at})");
        for got in [a, b] {
            match got {
                Got::Waits(lease) if w.worker_of(lease).is_some() => w.cancel(lease),
                Got::Waits(lease) => twin.borrow_mut().cancel(lease),
                got => assert_eq!(got.slug(), "deadlock"),
            }
        }
        w.finish();
    }
}

#[test]
fn of_a_second_wait_and_one_that_comes_to_stand_behind_it_one_finds_the_cycle() {
    for (second, first) in [("l/1", "l/2"), ("l/2", "l/1")] {
        for at in 0..40 {
            let mut w = World::new(1);
            w.ask(0, &ask("x").lock(first, X)).granted();
            w.ask(0, &ask("h").lock(second, X)).granted();
            let other = w.ask(0, &ask("a").lock(first, X)).waits();
            let answer = Rc::new(RefCell::new(None));
            let told = Rc::clone(&answer);
            // Behind the second wait it waits for a, and so for the first one, which is for x.
            let twin = in_between(&w, at, move |twin| {
                *told.borrow_mut() = Some(twin.ask(0, &ask("x").lock(second, X)));
            });
            w.checks = false;
            let a = w.ask(0, &ask("a").lock(second, X));
            w.store.unhook();
            let Some(x) = answer.borrow_mut().take() else {
                a.waits();
                assert!(at > 12, "x was to act at access {at}");
                w.finish();
                continue;
            };
            let mut stands = w.queue(second);
            stands.retain(|entry| entry != "h!");
            let both = matches!((&a, &x), (Got::Waits(_), Got::Waits(_)));
            assert!(!both || stands == ["x?", "a?"], "x waits for a, and a for x (access {at}): {stands:?}");
            if let Got::Waits(x) = x {
                twin.borrow_mut().cancel(x);
            }
            if let Got::Waits(a) = a {
                w.cancel(a);
            }
            w.cancel(other);
            w.finish();
        }
    }
}

#[test]
fn a_second_wait_that_is_not_marked_yet_hides_no_cycle_through_the_first() {
    for at in 0..20 {
        let mut w = World::new(1);
        let reads = w.ask(0, &ask("x").lock("l/1", IS)).granted();
        let first = w.ask(0, &ask("a").lock("l/1", X)).waits();
        let answer = Rc::new(RefCell::new(None));
        let told = Rc::clone(&answer);
        let _twin = in_between(&w, at, move |twin| {
            *told.borrow_mut() = Some(twin.ask(0, &ask("x").lock("l/1", SIX).not_reentrant()));
        });
        w.checks = false;
        // It waits for its own owner, and is refused, whoever else comes.
        let second = w.ask(0, &ask("a").lock("l/1", IX).not_reentrant());
        w.store.unhook();
        assert_eq!(second.slug(), "deadlock");
        // x waits for a's first wait, which is for x.
        if let Some(x) = answer.borrow_mut().take() {
            assert_eq!(x.slug(), "deadlock", "access {at}");
        }
        w.cancel(first);
        w.release(reads);
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
            Got::Waits(_) => let_go += 1,
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
                (Got::Granted(_), None) => {}
                (Got::Granted(_), Some(b)) => assert_eq!(b.slug(), "lock-held"),
                (Got::Refused(refusal), Some(b)) => {
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

#[test]
fn edges_that_never_were_at_the_same_time_are_no_cycle() {
    let mut interrupted = 0;
    for at in 0..30 {
        let mut w = World::new(1);
        w.ask(0, &ask("a").lock("l/2", X)).granted();
        let other = w.ask(0, &ask("h").lock("l/1", S)).granted();
        let held = Rc::new(RefCell::new(None));
        // b gives l/1 back, which a may be waiting for already, and only then waits for a's l/2.
        let first = Rc::clone(&held);
        let twin = in_between(&w, at, move |twin| {
            let b = first.borrow_mut().take().unwrap();
            twin.release(b);
            twin.ask(0, &ask("b").lock("l/2", X)).waits();
        });
        *held.borrow_mut() = Some(twin.borrow_mut().ask(0, &ask("b").lock("l/1", S)).granted());
        w.checks = false;
        let a = w.ask(0, &ask("a").lock("l/1", X)).waits();
        w.store.unhook();
        interrupted += u32::from(held.borrow().is_none());
        w.release(other);
        w.poll(a);
        assert!(w.holds(a) || held.borrow().is_some(), "access {at}");
    }
    assert!(interrupted > 6, "{interrupted}");
}

#[test]
fn a_lock_that_the_store_would_not_let_go_is_given_back_by_the_next_heartbeat() {
    let mut w = World::new(2);
    let held = w.ask(0, &ask("a").lock("l/1", X)).granted();
    let waiter = w.ask(1, &ask("b").lock("l/1", X)).waits();
    w.store.fail_after(0, 50);
    w.checks = false;
    w.release(held);
    w.store.fail_after(0, 0);
    w.checks = true;
    w.advance(BEAT);
    assert!(w.holds(waiter));
    w.finish();
}
