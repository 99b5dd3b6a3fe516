//! Several requests for one lease: one of them drives it, the others watch what becomes of it, and for how long.

use interlock_core::lease::{Answer, End};
use interlock_core::session::BEAT;

use super::*;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

/// An authority where lease 2 waits at the first worker for 20 s, and the request that drives it.
fn waiting() -> (Authority, Parked, Asked) {
    let mut authority = Authority::new(2);
    drop(granted(authority.put(0, &Asked { ttl: ms(10_000), ..asked(1, "a", "l") })));
    let asked = Asked { wait: ms(20_000), ..asked(2, "b", "l") };
    let drives = parked(authority.put(0, &asked));
    (authority, drives, asked)
}

#[test]
fn one_request_drives_a_lease_and_all_others_watch() {
    let (mut authority, drives, asked) = waiting();
    assert!(drives.drives());
    assert_eq!(drives.deadline(), authority.now + ms(20_000));
    authority.advance(ms(100));
    let watches = parked(authority.put(1, &asked));
    assert!(!watches.drives());
    assert_eq!(watches.deadline(), drives.deadline(), "its driver's, which came earlier");
    let watches = parked(authority.poll(1, watches));
    assert!(!watches.drives(), "it does not become the driver by looking");
    let drives = parked(authority.poll(0, drives));
    assert!(drives.drives());
    assert_eq!(authority.workers[1].load().waiters, 0);
}

#[test]
fn a_watcher_looks_once_a_beat_and_at_the_deadline_and_often_after_it() {
    let (mut authority, _drives, asked) = waiting();
    let watches = parked(authority.put(1, &asked));
    assert_eq!(watches.poll_at(), authority.now + BEAT);
    authority.advance(ms(19_900));
    let watches = parked(authority.poll(1, watches));
    assert_eq!(watches.poll_at(), watches.deadline());
    authority.advance(ms(100));
    let watches = parked(authority.poll(1, watches));
    assert_eq!(watches.poll_at(), authority.now + BEAT / 8, "its driver will say so any moment now");
}

#[test]
fn a_watcher_ends_what_its_driver_has_forgotten_but_not_before() {
    let (mut authority, _forgotten, asked) = waiting();
    let watches = parked(authority.put(1, &asked));
    authority.advance(ms(20_000) + BEAT - ms(1));
    let watches = parked(authority.poll(1, watches));
    assert_eq!(authority.standing().0, 1, "a driver that is a little late");
    authority.advance(ms(1));
    assert!(matches!(authority.poll(1, watches), Answer::Over(End::Cancelled)));
}

#[test]
fn a_watcher_ends_what_a_dead_driver_left() {
    let (mut authority, _lost, asked) = waiting();
    let watches = parked(authority.put(1, &asked));
    // The first worker is heard of no more.
    authority.pass(ms(1400));
    authority.beat(1);
    let watches = parked(authority.poll(1, watches));
    authority.pass(ms(200));
    authority.beat(1);
    assert!(matches!(authority.poll(1, watches), Answer::Over(End::Cancelled)));
}

#[test]
fn who_cancels_takes_the_waiter_out_before_its_driver_hears_of_it() {
    let (mut authority, _drives, _) = waiting();
    let behind = parked(authority.put(1, &asked(3, "c", "l")));
    let _ = authority.delete(1, 2);
    let _ = authority.delete(1, 1);
    drop(granted(authority.poll(1, behind)));
}
