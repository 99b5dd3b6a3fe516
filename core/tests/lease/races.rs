//! One worker acts in the middle of another's step, before each of its accesses to the store.

use std::cell::Cell;
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
