//! Random schedules over several workers, held against all invariants after every step; and records that survive
//! being written and read.
#![cfg(not(target_arch = "wasm32"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::cell::RefCell;

use common::{Ask, Got, Health, World, ask, ms, rules};
use interlock_core::store::{LockBucket, OwnerBucket, Record, Store};
use interlock_core::{Class, LeaseId, Mode, Rank, Rules, Sessions};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRunner};

/// Everything that matters about locks in few of them: plain, permits, a tree, an order.
const LOCKS: [&str; 8] = ["l/1", "l/2", "pool/1", "t", "t/a", "t/a/b", "r/1", "q/1"];
const OWNERS: [&str; 5] = ["a", "b", "c", "d", "e"];

fn policy() -> Rules {
    let mut rules = rules();
    let class = Class::default();
    rules.classes.insert("pool".into(), Class { permits: 2, ..class });
    rules.classes.insert("t".into(), Class { hierarchy: true, ..class });
    rules.classes.insert("r".into(), Class { rank: Some(Rank(2)), ..class });
    rules.classes.insert("q".into(), Class { rank: Some(Rank(1)), ..class });
    rules.limits.locks_per_owner = Some(6);
    rules.limits.longest_ttl = ms(4000);
    rules
}

#[derive(Clone, Debug)]
enum Step {
    Ask { worker: usize, owner: usize, locks: Vec<(usize, Mode)>, wait: u64, ttl: u64, hold: u64, reentrant: bool },
    Release(usize),
    Cancel(usize),
    Poll(usize),
    Renew(usize),
    Advance(u64),
    Sweep(usize),
    Crash(usize),
    Stall(usize),
    Resume(usize),
    Conflicts(u32),
    Failures(u32, u32),
    ClockBack(u32),
}

fn modes() -> impl Strategy<Value = Mode> {
    prop_oneof![5 => Just(Mode::Exclusive), 5 => Just(Mode::Shared), 2 => Just(Mode::IntentExclusive),
        1 => Just(Mode::IntentShared), 1 => Just(Mode::SharedIntentExclusive)]
}

fn asking() -> impl Strategy<Value = Step> {
    let locks = prop_oneof![4 => prop::collection::vec((0..LOCKS.len(), modes()), 1),
        1 => prop::collection::vec((0..LOCKS.len(), modes()), 2..4)];
    let wait = prop_oneof![1 => Just(0), 2 => Just(300), 6 => Just(10_000)];
    let ttl = prop_oneof![Just(1000), Just(4000)];
    let hold = prop_oneof![1 => Just(2000), 4 => Just(60_000)];
    (0..4_usize, 0..OWNERS.len(), locks, wait, ttl, hold, prop::bool::weighted(0.9)).prop_map(
        |(worker, owner, locks, wait, ttl, hold, reentrant)| Step::Ask {
            worker,
            owner,
            locks,
            wait,
            ttl,
            hold,
            reentrant,
        },
    )
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        24 => asking(),
        9 => (0..8_usize).prop_map(Step::Release),
        3 => (0..8_usize).prop_map(Step::Cancel),
        2 => (0..8_usize).prop_map(Step::Poll),
        2 => (0..8_usize).prop_map(Step::Renew),
        4 => prop_oneof![Just(1), Just(100), Just(700), Just(1600), Just(4100)].prop_map(Step::Advance),
        2 => (0..4_usize).prop_map(Step::Sweep),
        1 => (0..3_usize).prop_map(Step::Crash),
        1 => (0..3_usize).prop_map(Step::Stall),
        2 => (0..3_usize).prop_map(Step::Resume),
        2 => (1..4_u32).prop_map(Step::Conflicts),
        1 => (0..6_u32, 1..4_u32).prop_map(|(passing, failing)| Step::Failures(passing, failing)),
        1 => any::<u32>().prop_map(Step::ClockBack),
    ]
}

/// What happened over all schedules: a run in which nothing happens proves nothing.
#[derive(Debug, Default)]
struct Seen {
    schedules: u64,
    steps: u64,
    grants: u64,
    hand_overs: u64,
    deadlocks: u64,
    order_violations: u64,
    timeouts: u64,
    lost: u64,
    expired: u64,
    failures: u64,
}

impl Seen {
    fn refused(&mut self, slug: &str) {
        match slug {
            "order-violation" => self.order_violations += 1,
            "wait-timeout" => self.timeouts += 1,
            "backend-unavailable" => self.failures += 1,
            "lease-lost" => self.lost += 1,
            _ => {}
        }
    }

    fn look(&mut self, world: &World) {
        self.lost += u64::try_from(world.lost.len()).unwrap();
        world.refused.iter().for_each(|(_, refusal)| self.refused(refusal.cause.slug()));
    }
}

/// The one of the workers' leases, or waiting requests, that a number means.
fn nth(world: &World, n: usize, waiting: bool) -> Option<LeaseId> {
    let running = || world.workers.iter().filter(|worker| worker.health == Health::Runs);
    let all: Vec<LeaseId> = if waiting {
        running().flat_map(|worker| worker.pending.keys().copied()).collect()
    } else {
        running().flat_map(|worker| worker.leases.keys().copied()).collect()
    };
    (!all.is_empty()).then(|| all[n % all.len()])
}

fn play(schedule: &[Step], seen: &mut Seen) {
    // Three workers with heartbeats; one whose leases live by their own renewals.
    let mut world = World::with(policy(), 3, 1);
    for step in schedule {
        match step {
            Step::Ask { worker, owner, locks, wait, ttl, hold, reentrant } => {
                if world.workers[*worker].health == Health::Runs {
                    let mut request: Ask = ask(OWNERS[*owner]);
                    for (at, mode) in locks {
                        request = request.lock(LOCKS[*at], *mode);
                    }
                    request = request.wait(ms(*wait)).ttl(ms(*ttl)).hold(ms(*hold));
                    let request = if *reentrant { request } else { request.not_reentrant() };
                    if let Got::Refused(refusal) = world.ask(*worker, &request) {
                        seen.refused(refusal.cause.slug());
                    }
                }
            }
            Step::Release(n) => drop(nth(&world, *n, false).map(|lease| world.release(lease))),
            Step::Cancel(n) => nth(&world, *n, true).into_iter().for_each(|lease| world.cancel(lease)),
            Step::Poll(n) => nth(&world, *n, true).into_iter().for_each(|lease| world.poll(lease)),
            Step::Renew(n) => drop(nth(&world, *n, false).map(|lease| world.renew(lease))),
            Step::Advance(millis) => world.advance(ms(*millis)),
            Step::Sweep(at) if world.workers[*at].health == Health::Runs => world.sweep(*at),
            Step::Sweep(_) => {}
            Step::Crash(at) => {
                world.crash(*at);
                // Another takes its place.
                let heir = world.add_worker(true);
                world.workers.swap(*at, heir);
                world.check();
            }
            Step::Stall(at) => world.stall(*at),
            Step::Resume(at) => world.resume(*at),
            Step::Conflicts(writes) => world.store.mem.conflict_next(*writes),
            Step::Failures(passing, failing) => world.store.fail_after(*passing, *failing),
            Step::ClockBack(micros) => world.unix_micros -= u64::from(*micros),
        }
        seen.look(&world);
        seen.steps += 1;
    }
    world.finish();
    let ledger = world.ledger.borrow();
    seen.schedules += 1;
    seen.grants += ledger.grants;
    seen.hand_overs += ledger.hand_overs;
    seen.deadlocks += ledger.deadlocks;
    seen.expired += u64::try_from(ledger.expired.len()).unwrap();
}

/// Fails with the shortest schedule that was found, a step a line.
fn tell(result: Result<(), TestError<Vec<Step>>>) {
    match result {
        Ok(()) => {}
        Err(TestError::Abort(why)) => panic!("{why}"),
        Err(TestError::Fail(why, schedule)) => {
            let steps: Vec<String> = schedule.iter().map(|step| format!("{step:?}")).collect();
            panic!("{why}\nafter\n{}", steps.join("\n"));
        }
    }
}

#[test]
fn every_schedule_keeps_the_invariants() {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(2000);
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 4000, ..Config::default() };
    let seen = RefCell::new(Seen::default());
    let began = std::time::Instant::now();
    let result = TestRunner::new(config).run(&prop::collection::vec(steps(), 1..60), |schedule| {
        play(&schedule, &mut seen.borrow_mut());
        Ok(())
    });
    tell(result);
    let seen = seen.into_inner();
    let per_second = f64::from(cases) / began.elapsed().as_secs_f64();
    println!("{per_second:.0} schedules a second; {seen:?}");
    let least = u64::from(cases) / 20;
    for (what, count) in [
        ("grants", seen.grants),
        ("hand-overs", seen.hand_overs),
        ("deadlocks", seen.deadlocks),
        ("order violations", seen.order_violations),
        ("timeouts", seen.timeouts),
        ("lost leases", seen.lost),
        ("expiries", seen.expired),
        ("failures", seen.failures),
    ] {
        assert!(count > least, "{what}: only {count} in {cases} schedules");
    }
}

fn survives<R: Record + PartialEq + std::fmt::Debug>(world: &World, bucket: u32) {
    let (record, _) = world.store.mem.read::<R>(bucket).unwrap();
    let bytes = postcard::to_allocvec(&record).unwrap();
    assert_eq!(postcard::from_bytes::<R>(&bytes).unwrap(), record);
    // What is cut short is an error, and no panic.
    for end in 0..bytes.len() {
        let _ = postcard::from_bytes::<R>(&bytes[..end]);
    }
}

#[test]
fn records_survive_being_written_and_read() {
    let config = Config { cases: 100, failure_persistence: None, ..Config::default() };
    let schedules = prop::collection::vec(asking(), 1..30);
    let result = TestRunner::new(config).run(&schedules, |schedule| {
        let mut world = World::with(policy(), 3, 1);
        for step in schedule {
            if let Step::Ask { worker, owner, locks, wait, .. } = step {
                let request =
                    locks.iter().fold(ask(OWNERS[owner]), |request, (at, mode)| request.lock(LOCKS[*at], *mode));
                drop(world.ask(worker, &request.wait(ms(wait))));
            }
        }
        for bucket in 0..world.store.buckets() {
            survives::<LockBucket>(&world, bucket);
            survives::<OwnerBucket>(&world, bucket);
        }
        survives::<Sessions>(&world, 0);
        Ok(())
    });
    tell(result);
}
