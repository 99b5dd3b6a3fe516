//! One worker acts in the middle of another's step, before each of its accesses to the store.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use interlock_core::LeaseId;
use interlock_core::lease::{Answer, Deleted, End};

use super::*;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

/// Lets the second worker delete lease 1 before access number `at` of what the first one does next. What came of it.
fn deletes(authority: &mut Authority, at: usize) -> Rc<Cell<Option<Deleted>>> {
    let (store, rules) = (authority.store.clone(), authority.rules.clone());
    let (now, unix_micros) = (authority.now, authority.unix_micros);
    let mut worker = Some(authority.workers.pop().unwrap());
    let answer = Rc::new(Cell::new(None));
    let (told, mut left) = (Rc::clone(&answer), at);
    authority.store.hook(move |_| {
        if left == 0
            && let Some(mut table) = worker.take()
        {
            let scene = Scene { store: &store, rules: &rules, now, unix_micros };
            told.set(Some(lease::authority::delete(&mut table, &scene, LeaseId(1)).unwrap()));
        }
        left = left.saturating_sub(1);
    });
    answer
}

#[test]
fn a_release_in_the_middle_of_its_request_leaves_nothing() {
    let mut interrupted = 0;
    for at in 0..40 {
        let mut authority = Authority::new(2);
        let answer = deletes(&mut authority, at);
        let put = authority.put(0, &asked(1, "a", "l").and("m"));
        authority.store.unhook();
        match answer.get() {
            None => drop(granted(put)),
            Some(Deleted::Unknown | Deleted::Cancelled) => {
                interrupted += 1;
                assert!(matches!(put, Answer::Over(End::Cancelled)), "access {at}: {put:?}");
                assert_eq!(authority.sweep().3, 0, "locks that nobody knows of, access {at}");
                assert_eq!(authority.workers[0].load().waiters, 0);
            }
            Some(other) => panic!("access {at}: {other:?}"),
        }
    }
    assert!(interrupted > 6, "{interrupted}");
}

#[test]
fn a_release_in_the_middle_of_a_hand_over_leaves_nothing() {
    let mut interrupted = 0;
    for at in 0..40 {
        let mut authority = Authority::new(2);
        drop(granted(authority.put(0, &asked(2, "b", "l"))));
        let waits = parked(authority.put(0, &asked(1, "a", "l")));
        assert_eq!(authority.delete(0, 2), Deleted::Released);
        let answer = deletes(&mut authority, at);
        let polled = authority.poll(0, waits);
        authority.store.unhook();
        match answer.get() {
            None => drop(granted(polled)),
            Some(Deleted::Cancelled) => {
                interrupted += 1;
                assert!(matches!(polled, Answer::Over(End::Cancelled)), "access {at}: {polled:?}");
                assert_eq!(authority.sweep().3, 0, "locks that nobody knows of, access {at}");
                assert_eq!(authority.workers[0].load().waiters, 0);
            }
            Some(Deleted::Released) => {}
            Some(other) => panic!("access {at}: {other:?}"),
        }
    }
    assert!(interrupted > 3, "{interrupted}");
}

#[test]
fn a_driver_that_is_only_late_keeps_what_it_is_granted_while_others_sweep() {
    let mut late = 0;
    for at in 0..40 {
        let mut authority = Authority::new(2);
        drop(granted(authority.put(0, &asked(2, "b", "l"))));
        let waits = parked(authority.put(1, &asked(1, "a", "l")));
        assert_eq!(authority.delete(0, 2), Deleted::Released);
        // Its driver has not been heard of for so long that it looks dead.
        authority.pass(ms(1600));
        authority.beat(0);
        let (store, rules) = (authority.store.clone(), authority.rules.clone());
        let (now, unix_micros) = (authority.now, authority.unix_micros);
        let mut driver = Some((authority.workers.pop().unwrap(), waits));
        let answer = Rc::new(RefCell::new(None));
        let (told, mut left) = (Rc::clone(&answer), at);
        authority.store.hook(move |_| {
            if left == 0
                && let Some((mut table, waits)) = driver.take()
            {
                let scene = Scene { store: &store, rules: &rules, now, unix_micros };
                table.beat(&scene, 0).unwrap();
                *told.borrow_mut() = Some(lease::authority::poll(&mut table, &scene, waits).unwrap());
            }
            left = usize::wrapping_sub(left, 1);
        });
        authority.sweep();
        authority.store.unhook();
        if let Some(Answer::Granted { .. }) = answer.borrow_mut().take() {
            late += 1;
            assert!(authority.get(1).is_some(), "access {at}");
        }
    }
    assert!(late > 3, "{late}");
}

/// Whether the index by owner names anybody.
#[test]
fn a_lease_that_could_not_come_back_whole_is_not_listed_for_ever() {
    for at in 0..12 {
        let mut authority = Authority::new(1);
        let lease = granted(authority.put(0, &asked(1, "a", "l").and("m")));
        authority.restart(ms(10));
        authority.store.fail_after(at, 1);
        let renewed = authority
            .on(0, |table, scene| lease::authority::renew(table, scene, LeaseId(1), None, Some(&lease.receipt)));
        authority.store.fail_after(0, 0);
        assert!(authority.on(0, |table, scene| table.settle_debts(scene)));
        authority.delete(0, 1);
        assert!(authority.listed().is_empty(), "access {at}: {renewed:?}");
    }
}

#[test]
fn whoever_dies_while_it_ends_a_lease_leaves_nothing_that_stays() {
    for at in 0..150 {
        let mut authority = Authority::new(2);
        let ask = Asked { ttl: ms(300), ..asked(1, "a", "l") };
        drop(granted(authority.put(1, &ask)));
        authority.advance(GRACE + ms(1));
        // Nothing of what it does from some access on comes to anything, and what it remembers of it goes with it.
        authority.store.fail_after(at, 10_000);
        for bucket in 0..authority.store.buckets() {
            let _ = authority.on(0, |table, scene| {
                table.sweep(scene, bucket, &mut Census::default())?;
                lease::authority::sweep(table, scene, bucket)
            });
        }
        authority.store.fail_after(0, 0);
        authority.workers[0] = Table::new();
        authority.advance(ms(1));
        authority.sweep();
        authority.advance(lease::record::LINGER);
        authority.sweep();
        assert!(authority.listed().is_empty(), "access {at}");
    }
}

#[test]
fn a_worker_that_dies_owing_something_of_a_lease_that_it_gave_back_leaves_nothing() {
    let mut owed = 0;
    for at in 0..12 {
        let mut authority = Authority::new(2);
        drop(granted(authority.put(0, &asked(1, "a", "k").and("l"))));
        authority.store.fail_after(at, 1);
        let deleted = authority.on(1, |table, scene| lease::authority::delete(table, scene, LeaseId(1)));
        authority.store.fail_after(0, 0);
        owed += usize::from(deleted.is_ok() && !authority.listed().is_empty());
        authority.workers.pop();
        for _ in 0..3 {
            authority.advance(ms(400));
            authority.sweep();
        }
        if deleted.is_ok() {
            assert_eq!((authority.sweep().3, authority.listed().len()), (0, 0), "access {at}: {deleted:?}");
        }
    }
    assert!(owed > 0);
}

#[test]
fn a_driver_that_could_not_note_what_became_of_its_lease_says_so_as_soon_as_it_can() {
    let mut unsaid = 0;
    for failing in 1..4 {
        for at in 0..20 {
            let mut authority = Authority::new(2);
            drop(granted(authority.put(0, &asked(1, "a", "l"))));
            let waits = Asked { wait: ms(20_000), ..asked(2, "b", "k").and("l") };
            let request = authority.request(&waits);
            authority.store.fail_after(at, failing);
            let put = authority.on(0, |table, scene| lease::authority::put(table, scene, request, None));
            authority.store.fail_after(0, 0);
            if put.is_ok() {
                continue;
            }
            unsaid += usize::from(authority.standing().0 == 1);
            while !authority.on(0, Table::settle_debts) {}
            assert_eq!(authority.standing().0, 0, "access {at}, {failing} fail: nobody drives it any more");
            assert_eq!(authority.listed(), ["a"], "access {at}, {failing} fail");
        }
    }
    assert!(unsaid > 4, "{unsaid}");
}

#[test]
fn a_worker_that_dies_while_it_cancels_leaves_nothing() {
    let mut halfway = 0;
    for driver_looks in [true, false] {
        for at in 0..40 {
            let mut authority = Authority::new(2);
            drop(granted(authority.put(0, &asked(1, "a", "l"))));
            let waits = parked(authority.put(0, &Asked { wait: ms(20_000), ..asked(2, "b", "k").and("l") }));
            // The second worker cancels, and is gone after so many accesses.
            authority.store.fail_after(at, u32::MAX);
            let _ = authority.on(1, |table, scene| lease::authority::delete(table, scene, LeaseId(2)));
            authority.store.fail_after(0, 0);
            authority.workers.pop();
            let over = matches!(authority.put(0, &asked(2, "b", "k").and("l")), Answer::Over(End::Cancelled));
            halfway += usize::from(over && authority.listed().len() == 2);
            if driver_looks {
                let over_now = matches!(authority.poll(0, waits), Answer::Over(End::Cancelled));
                assert_eq!(over_now, over, "access {at}");
            }
            for _ in 0..3 {
                authority.advance(ms(1000));
                authority.sweep();
            }
            if over {
                let left = authority.listed();
                assert_eq!(left, ["a"], "access {at}, the driver looks: {driver_looks}");
                assert_eq!(authority.delete(0, 1), Deleted::Released);
                assert_eq!((authority.sweep().3, authority.listed().len()), (0, 0), "access {at}");
            }
        }
    }
    assert!(halfway > 4, "{halfway}");
}
