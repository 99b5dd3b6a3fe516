//! Deadlocks.

use crate::common::{IS, IX, S, SIX, World, X, ask, lock, ms, owner, rules};
use interlock_core::cycle::MAX_OWNERS;
use interlock_core::session::{BEAT, DEAD_AFTER};
use interlock_core::store::{LockBucket, Store};
use interlock_core::{Cause, Entry, Fence, LeaseId, Limit, SessionId, State};
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

#[test]
fn rings_of_any_length_are_refused_where_they_close() {
    for length in [2, 3, 4, 9, 40] {
        let mut w = World::new(3);
        let name = |n: usize| format!("l/{}", n % length);
        for n in 0..length {
            w.ask(n % 3, &ask(&format!("o{n}")).lock(&name(n), X)).granted();
        }
        for n in 0..length - 1 {
            w.ask((n + 1) % 3, &ask(&format!("o{n}")).lock(&name(n + 1), X)).waits();
        }
        let last = format!("o{}", length - 1);
        let try_only = ask(&last).lock("l/0", X).wait(ms(0));
        assert_eq!(w.ask(0, &try_only).slug(), "lock-held", "who does not wait closes nothing");
        let cycle = w.ask(0, &ask(&last).lock("l/0", X)).cycle();
        assert_eq!(cycle.len(), length + 1);
        assert_eq!(w.queue("l/0"), ["o0!"], "no trace");
        w.finish();
    }
}

#[test]
fn a_cycle_may_run_through_the_place_in_a_queue() {
    let mut w = World::new(2);
    w.ask(0, &ask("r").lock("l/1", S)).granted();
    w.ask(0, &ask("t").lock("l/2", X)).granted();
    let writer = w.ask(0, &ask("w").lock("l/1", X)).waits();
    // t may not read l/1 past the waiting writer, and r waits for t.
    w.ask(1, &ask("t").lock("l/1", S)).waits();
    assert_eq!(w.ask(1, &ask("r").lock("l/2", X)).cycle(), ["r", "t", "w", "r"]);
    w.cancel(writer);
    w.finish();
}

#[test]
fn two_readers_who_both_want_to_write_deadlock() {
    let mut w = World::new(2);
    let a = w.ask(0, &ask("a").lock("l/1", S)).granted();
    let b = w.ask(1, &ask("b").lock("l/1", S)).granted();
    let upgrade = w.ask(0, &ask("a").lock("l/1", X)).waits();
    assert_eq!(w.ask(1, &ask("b").lock("l/1", X)).cycle(), ["b", "a", "b"]);
    w.release(b);
    assert_eq!(w.woken, [upgrade]);
    w.release(a);
    w.finish();
}

#[test]
fn an_upgrade_granted_over_waiters_may_close_a_cycle_through_a_parallel_request() {
    let mut w = World::new(2);
    w.ask(0, &ask("p").lock("l/2", X)).granted();
    let weak = w.ask(0, &ask("u").lock("l/1", IS)).granted();
    let other = w.ask(0, &ask("v").lock("l/1", IX)).granted();
    // p waits for v only; u stands in nobody's way.
    let reader = w.ask(1, &ask("p").lock("l/1", S)).waits();
    let elsewhere = w.ask(1, &ask("u").lock("l/2", X)).waits();
    // Intent-exclusive goes well with v's and is granted, but would keep p out, for whom u waits.
    assert_eq!(w.ask(0, &ask("u").lock("l/1", IX)).cycle(), ["u", "p", "u"]);
    w.release(other);
    assert_eq!(w.woken, [reader]);
    w.release(weak);
    w.cancel(elsewhere);
    w.finish();
}

#[test]
fn an_upgrade_that_an_older_wait_of_its_owner_could_re_enter_is_searched_for_cycles_first() {
    let mut w = World::new(2);
    w.ask(0, &ask("c").lock("l/1", S)).granted();
    let e = w.ask(0, &ask("e").lock("l/1", IX)).waits();
    let reads = w.ask(0, &ask("a").lock("l/1", S)).waits();
    let writes = w.ask(1, &ask("a").lock("l/1", X)).waits();
    w.ask(0, &ask("a").lock("l/1", IS)).granted();
    // It would cover the older read, and e would have to wait for both; and the older write waits for e.
    assert_eq!(
        w.ask(1, &ask("a").lock("l/1", S).wait(ms(0))).slug(),
        "lock-held",
        "who does not wait is in no deadlock"
    );
    w.cancel(writes);
    let again = w.ask(1, &ask("a").lock("l/1", S).wait(ms(0))).granted();
    assert_eq!(w.woken, [reads], "nothing is in the way of either now");
    w.release(again);
    w.cancel(e);
    w.finish();
}

#[test]
fn an_upgrade_queued_before_waiters_may_close_a_cycle_through_a_parallel_request() {
    let mut w = World::new(2);
    w.ask(0, &ask("p").lock("l/2", X)).granted();
    w.ask(0, &ask("u").lock("l/1", IS)).granted();
    let other = w.ask(0, &ask("v").lock("l/1", SIX)).granted();
    let reader = w.ask(1, &ask("p").lock("l/1", S)).waits();
    let elsewhere = w.ask(1, &ask("u").lock("l/2", X)).waits();
    // It has to wait for v, and stands before p from then on.
    assert_eq!(w.ask(0, &ask("u").lock("l/1", IX)).cycle(), ["u", "p", "u"]);
    w.release(other);
    assert_eq!(w.woken, [reader]);
    w.cancel(elsewhere);
    w.finish();
}

#[test]
fn parallel_requests_of_one_owner_count_as_one() {
    let mut w = World::new(2);
    w.ask(0, &ask("a").lock("l/1", X)).granted();
    w.ask(1, &ask("b").lock("l/2", X)).granted();
    let a = w.ask(0, &ask("a").lock("l/2", X)).waits();
    // Another branch of b, that holds nothing itself, closes the ring all the same.
    assert_eq!(w.ask(0, &ask("b").lock("l/1", X)).cycle(), ["b", "a", "b"]);
    w.cancel(a);
    w.finish();
}

#[test]
fn a_cycle_may_run_through_another_wait_of_who_stands_in_the_way() {
    // a waits at l/1 and then at l/2, behind others. Whoever stands behind one of its waits waits for the other one too.
    for (behind, of) in [("l/1", "l/2"), ("l/2", "l/1")] {
        let mut w = World::new(2);
        w.ask(0, &ask("x").lock(of, X)).granted();
        w.ask(0, &ask("h").lock(behind, X)).granted();
        let first = w.ask(0, &ask("a").lock("l/1", X)).waits();
        let second = w.ask(1, &ask("a").lock("l/2", X)).waits();
        assert_eq!(w.ask(1, &ask("x").lock(behind, X)).cycle(), ["x", "a", "x"]);
        // Where the other one is over there is none.
        w.cancel(if of == "l/1" { first } else { second });
        w.ask(1, &ask("x").lock(behind, X)).waits();
        w.finish();
    }
}

#[test]
fn a_crowd_in_one_line_is_searched_without_a_look_at_its_owners() {
    let mut w = World::new(1);
    w.checks = false;
    w.ask(0, &ask("h").lock("l/1", X)).granted();
    let mut arrival = |n: usize| {
        let before = w.store.mem.accesses();
        w.ask(0, &ask(&format!("o{n}")).lock("l/1", X)).waits();
        w.store.mem.accesses() - before
    };
    let first = arrival(0);
    let last = (1..200).map(&mut arrival).max().unwrap();
    assert_eq!(last, first, "accesses of the store, behind 200 as behind one");
    // Who waits elsewhere too is looked up, and nobody else.
    w.ask(0, &ask("k").lock("l/2", X)).granted();
    w.ask(0, &ask("o7").lock("l/2", X)).waits();
    let before = w.store.mem.accesses();
    w.ask(0, &ask("late").lock("l/1", X)).waits();
    // Its waits, the other line, and who holds that.
    assert_eq!(w.store.mem.accesses() - before, first + 3);
}

#[test]
fn a_wait_that_has_ended_closes_nothing() {
    let mut w = World::new(2);
    w.ask(0, &ask("a").lock("l/1", X)).granted();
    w.ask(0, &ask("b").lock("l/2", X)).granted();
    w.ask(1, &ask("a").lock("l/2", X)).waits();
    w.crash(1);
    let third = w.add_worker(true);
    assert_eq!(w.ask(third, &ask("b").lock("l/1", X)).slug(), "deadlock", "it may still be alive");
    w.advance(DEAD_AFTER);
    w.ask(third, &ask("b").lock("l/1", X)).waits();
    w.finish();
}

#[test]
fn who_was_taken_for_dead_and_comes_back_finds_the_cycle_that_nobody_saw() {
    // The one worker that sweeps is the one that stalls: what it waits for stays in its queue.
    let mut w = World::with(rules(), 1, 1);
    w.ask(0, &ask("a").lock("l/1", X).ttl(ms(60_000))).granted();
    w.ask(1, &ask("b").lock("l/2", X).ttl(ms(60_000))).granted();
    let away = w.ask(0, &ask("a").lock("l/2", X)).waits();
    w.stall(0);
    w.advance(DEAD_AFTER + BEAT);
    w.ask(1, &ask("b").lock("l/1", X)).waits();
    w.resume(0);
    let (lease, refusal) = w.refused.first().expect("both wait for each other");
    assert_eq!((*lease, refusal.cause.slug()), (away, "deadlock"));
    w.finish();
}

#[test]
fn past_the_bound_of_a_search_nobody_may_wait() {
    let mut w = World::with(rules(), 0, 1);
    // More readers than a search looks at; they are written past the table, which would take its time.
    w.checks = false;
    let bucket = w.store.bucket("l/1");
    let (mut locks, version) = w.store.mem.read::<LockBucket>(bucket).unwrap();
    locks.with_queue(&lock("l/1"), |queue, highest| {
        for reader in 0..MAX_OWNERS {
            queue.enqueue(Entry {
                lease: LeaseId(1_000_000 + u128::try_from(reader).unwrap()),
                owner: owner(&format!("r{reader}")),
                mode: S,
                reentrant: true,
                session: SessionId::NONE,
                detached: false,
                ttl: ms(60_000),
                asked_by: String::new(),
                state: State::Waiting {
                    since: w.now,
                    deadline: w.now + ms(1),
                    hold: ms(60_000),
                    upgrade: false,
                    elsewhere: false,
                },
            });
        }
        assert_eq!(queue.settle(1, w.now, Fence(0), highest).len(), MAX_OWNERS);
    });
    assert!(w.store.mem.write(bucket, &locks, version).unwrap());
    let Cause::Limit { limit, value } = w.ask(0, &ask("w").lock("l/1", X)).refused().cause else { panic!("no limit") };
    assert_eq!((limit, value), (Limit::WaitChain, u64::try_from(MAX_OWNERS).unwrap()));
    assert!(!w.queue("l/1").contains(&"w?".into()));
}
