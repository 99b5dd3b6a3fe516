//! The authority alone: what each message does, in whatever order messages come, and over restarts.

use interlock_core::lease::record::LINGER;
use interlock_core::lease::{Answer, Deleted, End, Renewed};
use interlock_core::{Class, Fence, LeaseId, Mode, SessionId, Wake};

use super::*;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

#[test]
fn a_lease_is_granted_renewed_and_given_back_by_any_worker() {
    let mut authority = Authority::new(2);
    let first = granted(authority.put(0, &asked(1, "a", "l")));
    assert_eq!((first.ttl, first.waited), (ms(5000), ms(0)));
    authority.advance(ms(4000));
    assert_eq!(authority.renew(1, 1, None), Renewed::Renewed { expires_in: ms(5000) });
    authority.advance(ms(4999));
    assert!(authority.get(1).is_some(), "renewed, it lives past its first TTL");
    assert_eq!(authority.delete(1, 1), Deleted::Released);
    assert!(authority.get(1).is_none());
    let next = granted(authority.put(1, &asked(2, "b", "l")));
    assert!(fence(&next) > fence(&first));
}

#[test]
fn an_unrenewed_lease_ends_at_its_ttl_whatever_its_worker_does() {
    let mut authority = Authority::new(1);
    drop(granted(authority.put(0, &asked(1, "a", "l"))));
    authority.advance(ms(4999));
    assert_eq!(refused(authority.put(0, &Asked { wait: ms(0), ..asked(2, "b", "l") })), "lock-held");
    authority.advance(ms(1));
    assert_eq!(authority.renew(0, 1, None), Renewed::Lost, "and is not renewed any more");
    drop(granted(authority.put(0, &asked(3, "b", "l"))));
    assert_eq!(authority.delete(0, 1), Deleted::Expired);
}

#[test]
fn hold_bounds_what_renewing_gives() {
    let mut authority = Authority::new(1);
    drop(granted(authority.put(0, &Asked { hold: ms(6000), ..asked(1, "a", "l") })));
    authority.advance(ms(3000));
    assert_eq!(authority.renew(0, 1, None), Renewed::Renewed { expires_in: ms(3000) });
    authority.advance(ms(3000));
    assert_eq!(authority.renew(0, 1, None), Renewed::Lost);
}

#[test]
fn a_repeated_request_finds_its_lease() {
    let mut authority = Authority::new(2);
    let first = granted(authority.put(0, &asked(1, "a", "l")));
    authority.advance(ms(3000));
    let Answer::Granted { granted: again, new } = authority.put(1, &asked(1, "a", "l")) else { panic!() };
    assert!(!new);
    assert_eq!((fence(&again), again.ttl, again.waited), (fence(&first), ms(5000), ms(0)));
    authority.advance(ms(4000));
    assert!(authority.get(1).is_some(), "asking again is a sign of life");
    assert!(matches!(authority.put(0, &asked(1, "b", "l")), Answer::Taken), "of another owner");
    assert!(matches!(authority.put(0, &asked(1, "a", "m")), Answer::Taken), "of other locks");
}

#[test]
fn a_waiter_is_woken_where_it_is_parked_and_counts_its_ttl_from_its_answer() {
    let mut authority = Authority::new(2);
    drop(granted(authority.put(0, &asked(1, "a", "l"))));
    let waiter = parked(authority.put(1, &asked(2, "b", "l")));
    assert_eq!(waiter.deadline(), authority.now + ms(2000));
    authority.advance(ms(700));
    assert_eq!(authority.delete(0, 1), Deleted::Released);
    let session = authority.workers[1].session();
    assert_eq!(authority.effects.wakes, [Wake { session, lease: LeaseId(2) }]);
    authority.advance(ms(100));
    let second = granted(authority.poll(1, waiter));
    assert_eq!((second.ttl, second.waited), (ms(5000), ms(800)));
    authority.advance(ms(4999));
    assert!(authority.get(2).is_some());
    assert_eq!(authority.workers[1].load().waiters, 0);
}

#[test]
fn locks_that_were_granted_first_live_as_long_as_the_last() {
    let mut authority = Authority::new(1);
    drop(granted(authority.put(0, &Asked { ttl: ms(10_000), ..asked(1, "a", "m") })));
    let both = Asked { ttl: ms(3000), wait: ms(20_000), ..asked(2, "b", "l").and("m") };
    let mut waiter = parked(authority.put(0, &both));
    // It has l, and keeps it while it waits for m.
    for _ in 0..8 {
        authority.advance(ms(1000));
        waiter = parked(authority.poll(0, waiter));
    }
    authority.advance(ms(500));
    let _ = authority.delete(0, 1);
    let lease = granted(authority.poll(0, waiter));
    assert_eq!(lease.ttl, ms(3000));
    authority.advance(ms(2999));
    assert!(authority.get(2).is_some(), "l was renewed when m was granted");
}

#[test]
fn a_deadlock_across_leases_is_refused_and_leaves_nothing() {
    let mut authority = Authority::new(2);
    drop(granted(authority.put(0, &asked(1, "a", "l"))));
    drop(granted(authority.put(1, &asked(2, "b", "m"))));
    let waiter = parked(authority.put(0, &asked(3, "a", "m")));
    assert_eq!(refused(authority.put(1, &asked(4, "b", "l"))), "deadlock");
    assert!(matches!(authority.put(1, &asked(4, "b", "l")), Answer::Over(End::Refused)), "said once");
    let _ = authority.delete(1, 2);
    drop(granted(authority.poll(0, waiter)));
}

#[test]
fn a_release_that_overtakes_its_request_wins() {
    let mut authority = Authority::new(2);
    assert_eq!(authority.delete(0, 1), Deleted::Unknown);
    assert!(matches!(authority.put(1, &asked(1, "a", "l")), Answer::Over(End::Cancelled)));
    drop(granted(authority.put(1, &asked(2, "b", "l"))));
    authority.advance(LINGER);
    assert_eq!(authority.sweep().2, 0, "and it is not remembered for ever");
}

#[test]
fn a_lease_that_is_given_back_again_stays_over_for_as_long_again() {
    let mut authority = Authority::new(1);
    drop(granted(authority.put(0, &asked(1, "a", "l"))));
    assert_eq!(authority.delete(0, 1), Deleted::Released);
    authority.advance(LINGER - ms(100));
    assert_eq!(authority.delete(0, 1), Deleted::Released);
    authority.advance(LINGER - ms(100));
    authority.sweep();
    assert!(
        matches!(authority.put(0, &asked(1, "a", "l")), Answer::Over(End::Released)),
        "it was on its way all the time"
    );
    authority.advance(LINGER);
    authority.sweep();
    drop(granted(authority.put(0, &asked(1, "a", "l"))));
}

#[test]
fn of_many_leases_that_are_over_the_latest_are_remembered() {
    let mut authority = Authority::new(1);
    let buckets = usize::try_from(authority.store.buckets()).unwrap();
    let many = 800 * u128::try_from(buckets).unwrap();
    for lease in 1..=many {
        assert_eq!(authority.delete(0, lease), Deleted::Unknown);
    }
    assert_eq!(authority.sweep().2, 256 * buckets);
    assert!(matches!(authority.put(0, &asked(many, "a", "l")), Answer::Over(End::Cancelled)));
    drop(granted(authority.put(0, &asked(1, "a", "l"))));
}

#[test]
fn a_waiter_can_be_cancelled_from_another_worker() {
    let mut authority = Authority::new(2);
    drop(granted(authority.put(0, &asked(1, "a", "l"))));
    let second = parked(authority.put(0, &asked(2, "b", "l")));
    let third = parked(authority.put(1, &asked(3, "c", "l")));
    assert_eq!(authority.delete(1, 2), Deleted::Cancelled);
    let session = authority.workers[0].session();
    assert!(authority.effects.wakes.contains(&Wake { session, lease: LeaseId(2) }), "it is told");
    assert!(matches!(authority.poll(0, second), Answer::Over(End::Cancelled)));
    assert_eq!(authority.workers[0].load().waiters, 0);
    assert_eq!(authority.delete(1, 2), Deleted::Cancelled, "again is the same");
    let _ = authority.delete(0, 1);
    drop(granted(authority.poll(1, third)));
}

#[test]
fn a_stream_that_goes_cancels_what_it_drives_and_nothing_that_it_watches() {
    let mut authority = Authority::new(2);
    drop(granted(authority.put(0, &asked(1, "a", "l"))));
    let drives = parked(authority.put(0, &asked(2, "b", "l")));
    let watches = parked(authority.put(1, &asked(2, "b", "l")));
    authority.leave(1, watches);
    assert_eq!(authority.sweep().0, 1, "the request still waits");
    let watches = parked(authority.put(1, &asked(2, "b", "l")));
    authority.leave(0, drives);
    assert_eq!(authority.workers[0].load().waiters, 0);
    assert!(matches!(authority.poll(1, watches), Answer::Over(End::Cancelled)));
    let _ = authority.delete(0, 1);
    assert_eq!(authority.sweep().3, 0);
}

#[test]
fn who_watches_is_told_of_the_grant() {
    let mut authority = Authority::new(2);
    drop(granted(authority.put(0, &asked(1, "a", "l"))));
    let drives = parked(authority.put(0, &asked(2, "b", "l")));
    authority.advance(ms(300));
    let watches = parked(authority.put(1, &asked(2, "b", "l")));
    let watches = parked(authority.poll(1, watches));
    let _ = authority.delete(0, 1);
    let first = granted(authority.poll(0, drives));
    authority.advance(ms(200));
    let second = granted(authority.poll(1, watches));
    assert_eq!(fence(&first), fence(&second));
    assert_eq!(second.waited, ms(200), "from when this request came");
    assert_eq!(authority.workers[1].load().waiters, 0);
}

#[test]
fn a_dead_worker_takes_its_waiters_with_it_and_no_grants() {
    let mut authority = Authority::new(2);
    drop(granted(authority.put(0, &asked(1, "a", "l"))));
    drop(granted(authority.put(0, &asked(5, "e", "k"))));
    drop(parked(authority.put(0, &Asked { wait: ms(20_000), ..asked(2, "b", "l") })));
    let behind = parked(authority.put(1, &Asked { wait: ms(20_000), ..asked(3, "c", "l") }));
    // Worker 0 is heard of no more.
    authority.pass(ms(1600));
    authority.beat(1);
    authority.workers.swap(0, 1);
    authority.sweep();
    assert!(authority.get(1).is_some() && authority.get(5).is_some(), "grants live by their own renewals");
    assert!(matches!(authority.put(0, &asked(2, "b", "l")), Answer::Over(End::Cancelled)));
    assert_eq!(authority.delete(0, 1), Deleted::Released);
    drop(granted(authority.poll(0, behind)));
}

#[test]
fn records_of_leases_that_ended_by_themselves_go() {
    let mut authority = Authority::new(1);
    for (lease, name) in [(1, "k"), (2, "l"), (3, "m")] {
        drop(granted(authority.put(0, &asked(lease, "a", name))));
    }
    assert_eq!(authority.sweep(), (0, 3, 0, 3));
    assert_eq!(authority.workers[0].sessions().detached(), 3);
    authority.advance(GRACE + ms(1));
    authority.sweep();
    authority.advance(LINGER);
    assert_eq!(authority.sweep(), (0, 0, 0, 0));
    assert_eq!(authority.workers[0].sessions().detached(), 0);
}

#[test]
fn detached_grants_count_against_the_limit_of_the_table() {
    let mut authority = Authority::new(1);
    authority.rules.limits.locks = 2;
    drop(granted(authority.put(0, &asked(1, "a", "k"))));
    drop(granted(authority.put(0, &asked(2, "b", "l"))));
    authority.sweep();
    assert_eq!(refused(authority.put(0, &asked(3, "c", "m"))), "too-many-locks");
    let _ = authority.delete(0, 1);
    authority.sweep();
    drop(granted(authority.put(0, &asked(4, "c", "m"))));
}

#[test]
fn a_table_that_has_just_come_into_being_grants_nothing() {
    let mut authority = Authority::just_started(1);
    assert_eq!(refused(authority.put(0, &asked(1, "a", "l"))), "backend-unavailable");
    authority.advance(GRACE - ms(1));
    let Answer::Refused(refusal) = authority.put(0, &asked(1, "a", "l")) else { panic!() };
    assert_eq!(refusal.cause, interlock_core::Cause::Grace { left: ms(1) });
    authority.advance(ms(1));
    drop(granted(authority.put(0, &asked(1, "a", "l"))));
}

#[test]
fn a_restart_loses_no_lease_that_is_renewed_and_grants_nothing_twice() {
    let mut authority = Authority::new(2);
    let first = granted(authority.put(0, &asked(1, "a", "k").and("l")));
    authority.restart(ms(500));
    assert_eq!(authority.renew(0, 1, None), Renewed::Lost, "without its receipt it is nobody's");
    authority.restart(ms(500));
    let renewed = authority.renew(1, 1, Some(&first.receipt));
    assert_eq!(renewed, Renewed::Renewed { expires_in: ms(5000) });
    assert_eq!(authority.listed(), ["a"], "the order rule and the limits know of it");
    let again = authority.get(1).unwrap();
    let fences = |granted: &Granted| granted.grants.iter().map(|grant| grant.fence).collect::<Vec<_>>();
    assert_eq!(fences(&again), fences(&first));
    authority.advance(GRACE - ms(5001));
    assert_eq!(authority.renew(0, 1, Some(&first.receipt)), Renewed::Renewed { expires_in: ms(5000) });
    authority.advance(ms(4999));
    authority.advance(ms(0));
    assert_eq!(authority.renew(0, 1, None), Renewed::Renewed { expires_in: ms(5000) });
    authority.advance(ms(10));
    assert_eq!(refused(authority.put(1, &Asked { wait: ms(0), ..asked(2, "b", "l") })), "lock-held");
    assert_eq!(authority.delete(1, 1), Deleted::Released);
    let next = granted(authority.put(1, &asked(3, "b", "l")));
    assert!(fence(&next) > fence(&first));
}

#[test]
fn a_receipt_is_worth_nothing_once_the_grace_is_over() {
    let mut authority = Authority::new(1);
    let first = granted(authority.put(0, &Asked { ttl: ms(10_000), ..asked(1, "a", "l") }));
    authority.restart(ms(0));
    authority.advance(GRACE);
    drop(granted(authority.put(0, &asked(2, "b", "l"))));
    assert_eq!(authority.renew(0, 1, Some(&first.receipt)), Renewed::Lost);
    assert!(matches!(authority.reassert(0, &asked(1, "a", "l"), &first.receipt), Answer::Over(End::Expired)));
}

#[test]
fn a_receipt_is_good_for_its_own_lease_and_locks_alone() {
    let mut authority = Authority::new(1);
    let first = granted(authority.put(0, &asked(1, "a", "l")));
    let other = granted(authority.put(0, &asked(2, "a", "m")));
    authority.restart(ms(0));
    assert_eq!(authority.renew(0, 1, Some(&other.receipt)), Renewed::Lost);
    assert!(matches!(authority.reassert(0, &asked(1, "a", "m"), &other.receipt), Answer::Taken), "another lease's");
    assert!(matches!(authority.reassert(0, &asked(1, "a", "k"), &first.receipt), Answer::Taken), "for another lock");
    assert!(matches!(authority.reassert(0, &asked(1, "b", "l"), &first.receipt), Answer::Taken), "another owner's");
    assert_eq!(authority.sweep().1, 0);
    let back = authority.reassert(0, &asked(1, "a", "l"), &first.receipt);
    assert!(matches!(back, Answer::Granted { new: false, .. }));
}

#[test]
fn of_two_receipts_for_one_lock_the_later_grant_is_the_true_one() {
    for late_first in [false, true] {
        let mut authority = Authority::new(1);
        let old = granted(authority.put(0, &asked(1, "a", "l")));
        let _ = authority.delete(0, 1);
        let new = granted(authority.put(0, &asked(2, "b", "l")));
        authority.restart(ms(100));
        // A renewal of the old lease that was under way all the time.
        if late_first {
            assert!(matches!(authority.renew(0, 1, Some(&old.receipt)), Renewed::Renewed { .. }));
        }
        assert!(matches!(authority.renew(0, 2, Some(&new.receipt)), Renewed::Renewed { .. }));
        assert_eq!(authority.renew(0, 1, Some(&old.receipt)), Renewed::Lost);
        assert!(authority.get(2).is_some() && authority.get(1).is_none());
    }
}

#[test]
fn readers_come_back_together() {
    let mut authority = Authority::new(1);
    let shared = |lease, owner| Asked { locks: vec![("l", Mode::Shared)], ..asked(lease, owner, "l") };
    let a = granted(authority.put(0, &shared(1, "a")));
    let b = granted(authority.put(0, &shared(2, "b")));
    authority.restart(ms(100));
    for (lease, receipt) in [(2, &b.receipt), (1, &a.receipt)] {
        assert!(matches!(authority.renew(0, lease, Some(receipt)), Renewed::Renewed { .. }));
    }
    assert!(authority.get(1).is_some() && authority.get(2).is_some());
}

#[test]
fn a_lease_that_was_released_in_the_grace_does_not_come_back() {
    let mut authority = Authority::new(1);
    let lease = granted(authority.put(0, &asked(1, "a", "l")));
    authority.restart(ms(100));
    assert_eq!(authority.delete(0, 1), Deleted::Unknown);
    assert_eq!(authority.renew(0, 1, Some(&lease.receipt)), Renewed::Lost);
    assert!(matches!(authority.reassert(0, &asked(1, "a", "l"), &lease.receipt), Answer::Over(End::Cancelled)));
    assert_eq!(authority.sweep().3, 0);
}

#[test]
fn a_receipt_does_not_outlive_the_hold_limit() {
    let mut authority = Authority::new(1);
    let lease = granted(authority.put(0, &Asked { hold: ms(6000), ..asked(1, "a", "l") }));
    authority.advance(ms(2000));
    authority.restart(ms(1000));
    assert_eq!(authority.renew(0, 1, Some(&lease.receipt)), Renewed::Renewed { expires_in: ms(3000) });
    authority.restart(ms(3000));
    assert_eq!(authority.renew(0, 1, Some(&lease.receipt)), Renewed::Lost);
    // However far the clock steps back, nobody gets more than a whole hold.
    authority.unix_micros -= 3_600_000_000;
    authority.restart(ms(0));
    assert_eq!(authority.renew(0, 1, Some(&lease.receipt)), Renewed::Renewed { expires_in: ms(5000) });
    authority.advance(ms(3000));
    assert_eq!(authority.renew(0, 1, Some(&lease.receipt)), Renewed::Renewed { expires_in: ms(3000) });
}

#[test]
fn fences_rise_over_a_restart_even_if_the_clock_steps_back_by_the_grace() {
    let mut authority = Authority::new(1);
    let first = granted(authority.put(0, &asked(1, "a", "l")));
    authority.restart(ms(100));
    authority.unix_micros -= u64::try_from(GRACE.as_micros()).unwrap();
    authority.advance(GRACE);
    let next = granted(authority.put(0, &asked(2, "b", "l")));
    assert!(fence(&next) > fence(&first), "{:?} {:?}", fence(&next), fence(&first));
    let fence_of_clock = Fence::floor(authority.unix_micros);
    assert!(fence(&next) >= fence_of_clock);
}

#[test]
fn workers_without_a_session_serve_as_well() {
    let mut authority = Authority::new(1);
    authority.workers.push(Table::new());
    assert_eq!(authority.workers[1].session(), SessionId::NONE);
    drop(granted(authority.put(1, &asked(1, "a", "l"))));
    let waiter = parked(authority.put(1, &asked(2, "b", "l")));
    let _ = authority.delete(0, 1);
    drop(granted(authority.poll(1, waiter)));
}

#[test]
fn a_receipt_that_comes_after_the_grace_does_not_bring_back_an_older_fence() {
    let mut authority = Authority::new(1);
    let first = granted(authority.put(0, &asked(1, "a", "l")));
    authority.restart(ms(0));
    authority.advance(GRACE);
    drop(granted(authority.put(0, &asked(2, "b", "l"))));
    let _ = authority.delete(0, 2);
    // The lock is free, but a resource has seen the fence of lease 2.
    assert_eq!(authority.renew(0, 1, Some(&first.receipt)), Renewed::Lost);
    assert!(authority.get(1).is_none());
}

#[test]
fn fences_rise_over_those_that_came_back_by_receipts() {
    let mut authority = Authority::new(1);
    let first = granted(authority.put(0, &asked(1, "a", "l")));
    authority.unix_micros -= 3_600_000_000;
    authority.restart(ms(100));
    assert!(matches!(authority.renew(0, 1, Some(&first.receipt)), Renewed::Renewed { .. }));
    authority.advance(GRACE);
    let _ = authority.delete(0, 1);
    let next = granted(authority.put(0, &asked(2, "b", "l")));
    assert!(fence(&next) > fence(&first), "{:?} after {:?}", fence(&next), fence(&first));
}

#[test]
fn as_many_receipts_as_there_are_permits_come_back_the_latest_grants_first() {
    for (order, owners) in [
        ([1, 2, 3], ["a", "b", "c"]),
        ([2, 3, 1], ["a", "b", "c"]),
        ([3, 1, 2], ["a", "b", "c"]),
        ([2, 3, 1], ["a"; 3]),
    ] {
        let mut authority = Authority::new(1);
        authority.rules.classes.insert("pool".into(), Class { permits: 2, ..Class::default() });
        let old = granted(authority.put(0, &asked(1, owners[0], "pool/1")));
        let second = granted(authority.put(0, &asked(2, owners[1], "pool/1")));
        let _ = authority.delete(0, 1);
        let third = granted(authority.put(0, &asked(3, owners[2], "pool/1")));
        authority.restart(ms(100));
        let receipts = [&old.receipt, &second.receipt, &third.receipt];
        for lease in order {
            let _ = authority.renew(0, lease, Some(receipts[usize::try_from(lease).unwrap() - 1]));
        }
        assert_eq!([1, 2, 3].map(|lease| authority.get(lease).is_some()), [false, true, true], "{order:?} {owners:?}");
    }
}

#[test]
fn a_receipt_evicts_nobody_that_it_goes_well_with() {
    let mut authority = Authority::new(1);
    let mode = |lease, owner, mode| Asked { locks: vec![("l", mode)], ..asked(lease, owner, "l") };
    let reads = granted(authority.put(0, &mode(1, "a", Mode::Shared)));
    let announces = granted(authority.put(0, &mode(2, "b", Mode::IntentShared)));
    let upgrade = granted(authority.put(0, &mode(3, "b", Mode::Shared)));
    authority.restart(ms(100));
    for granted in [&upgrade, &reads, &announces] {
        let renewed = authority.renew(0, granted.lease.0, Some(&granted.receipt));
        assert!(matches!(renewed, Renewed::Renewed { .. }), "{granted:?}");
    }
    assert!((1..=3).all(|lease| authority.get(lease).is_some()));
    // Twice is the same.
    assert!(matches!(authority.reassert(0, &mode(1, "a", Mode::Shared), &reads.receipt), Answer::Granted { .. }));
    assert_eq!(authority.sweep().1, 3);
}
