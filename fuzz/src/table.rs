//! A schedule of requests, releases, crashes, failures and time over `interlock_core::Table`, in the world in which the core's own
//! tests run: after every step all invariants are computed anew from the records, and at the end nothing is left.
//!
//! Input: [`Step`]s, a few bytes each.

use arbitrary::{Arbitrary, Result, Unstructured};
use interlock_core::{Class, Mode, Rank, Rules, Within};

use common::{Ask, Health, World, ask, ms, rules};

#[path = "../../core/tests/common/mod.rs"]
#[allow(unreachable_pub)]
mod common;

/// Everything that matters about locks in few of them: plain, permits, a tree, an order, an order without order within.
pub const LOCKS: [&str; 10] = ["l/1", "l/2", "l/3", "pool/1", "t", "t/a", "t/a/b", "r/1", "r/2", "q/1"];

/// Who asks.
pub const OWNERS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// How long a wait, a TTL, a hold limit or a pause can be, in milliseconds.
const WAITS: [u64; 4] = [0, 300, 2_000, 10_000];
const TTLS: [u64; 2] = [1_000, 4_000];
const HOLDS: [u64; 3] = [2_000, 10_000, 60_000];
const PAUSES: [u64; 8] = [1, 100, 251, 700, 1_000, 1_600, 4_100, 10_100];

/// The most steps of a schedule: what is wrong shows in few, and each is checked.
const MAX_STEPS: usize = 80;

/// Workers with a heartbeat; one more has none.
const BEATING: usize = 3;

/// One step. Numbers beyond what there is wrap around.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Step {
    Ask { worker: u8, owner: u8, locks: Vec<(u8, u8)>, wait: u8, ttl: u8, hold: u8, reentrant: bool },
    Release(u8),
    Cancel(u8),
    Poll(u8),
    Renew(u8),
    Advance(u8),
    Sweep(u8),
    Crash(u8),
    Stall(u8),
    Resume(u8),
    Conflicts(u8),
    Failures(u8),
    ClockBack(u8),
}

impl<'a> Arbitrary<'a> for Step {
    /// The first byte says which step; each number is one byte.
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u8::arbitrary(u)? % 20 {
            0..=7 => {
                let (who, locks, times) = (u8::arbitrary(u)?, u8::arbitrary(u)?, u8::arbitrary(u)?);
                let count = 1 + (locks & 3);
                Step::Ask {
                    worker: who & 3,
                    owner: who >> 2 & 7,
                    reentrant: who & 0x80 == 0,
                    locks: (0..count).map(|_| Ok((u8::arbitrary(u)?, u8::arbitrary(u)?))).collect::<Result<_>>()?,
                    wait: times & 3,
                    ttl: times >> 2 & 3,
                    hold: times >> 4 & 3,
                }
            }
            8 | 9 => Step::Release(u.arbitrary()?),
            10 => Step::Cancel(u.arbitrary()?),
            11 => Step::Poll(u.arbitrary()?),
            12 => Step::Renew(u.arbitrary()?),
            13 => Step::Advance(u.arbitrary()?),
            14 => Step::Sweep(u.arbitrary()?),
            15 => Step::Crash(u.arbitrary()?),
            16 => Step::Stall(u.arbitrary()?),
            17 => Step::Resume(u.arbitrary()?),
            18 => Step::Conflicts(u.arbitrary()?),
            _ => {
                let how = u8::arbitrary(u)?;
                if how & 1 == 0 { Step::Failures(how >> 1) } else { Step::ClockBack(how >> 1) }
            }
        })
    }
}

impl Step {
    /// The bytes that stand for this step.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Step::Ask { worker, owner, locks, wait, ttl, hold, reentrant } => {
                let who = worker & 3 | (owner & 7) << 2 | if *reentrant { 0 } else { 0x80 };
                let count = u8::try_from(locks.len().clamp(1, 4) - 1).unwrap_or(0);
                let mut bytes = vec![0, who, count, wait & 3 | (ttl & 3) << 2 | (hold & 3) << 4];
                bytes.extend(locks.iter().take(4).flat_map(|(lock, mode)| [*lock, *mode]));
                bytes
            }
            Step::Release(n) => vec![8, *n],
            Step::Cancel(n) => vec![10, *n],
            Step::Poll(n) => vec![11, *n],
            Step::Renew(n) => vec![12, *n],
            Step::Advance(n) => vec![13, *n],
            Step::Sweep(n) => vec![14, *n],
            Step::Crash(n) => vec![15, *n],
            Step::Stall(n) => vec![16, *n],
            Step::Resume(n) => vec![17, *n],
            Step::Conflicts(n) => vec![18, *n],
            Step::Failures(n) => vec![19, n << 1],
            Step::ClockBack(n) => vec![19, n << 1 | 1],
        }
    }
}

/// See the module.
pub fn run(data: &[u8]) {
    let mut unstructured = Unstructured::new(data);
    let mut world = World::with(policy(), BEATING, 1);
    for _ in 0..MAX_STEPS {
        if unstructured.is_empty() {
            break;
        }
        let Ok(step) = Step::arbitrary(&mut unstructured) else { break };
        play(&mut world, &step);
    }
    world.finish();
    let grants = world.ledger.borrow().grants;
    assert!(world.ledger.borrow().hand_overs <= grants);
}

fn policy() -> Rules {
    let mut rules = rules();
    let class = Class::default();
    rules.classes.insert("pool".into(), Class { permits: 2, ..class });
    rules.classes.insert("t".into(), Class { hierarchy: true, ..class });
    rules.classes.insert("r".into(), Class { rank: Some(Rank(2)), ..class });
    rules.classes.insert("q".into(), Class { rank: Some(Rank(1)), within: Within::Unordered, ..class });
    rules.limits.locks_per_owner = Some(6);
    rules.limits.waiters_per_lock = 4;
    rules.limits.longest_ttl = ms(4_000);
    rules
}

fn pick<T: Copy>(from: &[T], n: u8) -> T {
    from[usize::from(n) % from.len()]
}

fn play(world: &mut World, step: &Step) {
    let nth = |world: &World, n: u8, waiting: bool| {
        let running = world.workers.iter().filter(|worker| worker.health == Health::Runs);
        let ids: Vec<_> = if waiting {
            running.flat_map(|worker| worker.pending.keys().copied()).collect()
        } else {
            running.flat_map(|worker| worker.leases.keys().copied()).collect()
        };
        (!ids.is_empty()).then(|| pick(&ids, n))
    };
    let beating = |n: u8| usize::from(n) % BEATING;
    match step {
        Step::Ask { worker, owner, locks, wait, ttl, hold, reentrant } => {
            let worker = usize::from(*worker);
            if world.workers[worker].health == Health::Runs {
                let mut request: Ask = ask(pick(&OWNERS, *owner));
                for (lock, mode) in locks {
                    request = request.lock(pick(&LOCKS, *lock), pick(&Mode::ALL, *mode));
                }
                let (wait, ttl, hold) = (pick(&WAITS, *wait), pick(&TTLS, *ttl), pick(&HOLDS, *hold));
                let request = request.wait(ms(wait)).ttl(ms(ttl)).hold(ms(hold.max(ttl)));
                drop(world.ask(worker, &if *reentrant { request } else { request.not_reentrant() }));
            }
        }
        Step::Release(n) => drop(nth(world, *n, false).map(|lease| world.release(lease))),
        Step::Cancel(n) => nth(world, *n, true).into_iter().for_each(|lease| world.cancel(lease)),
        Step::Poll(n) => nth(world, *n, true).into_iter().for_each(|lease| world.poll(lease)),
        Step::Renew(n) => drop(nth(world, *n, false).map(|lease| world.renew(lease))),
        Step::Advance(n) => world.advance(ms(pick(&PAUSES, *n))),
        Step::Sweep(n) => {
            let at = usize::from(*n) % world.workers.len();
            if world.workers[at].health == Health::Runs {
                world.sweep(at);
            }
        }
        Step::Crash(n) => {
            world.crash(beating(*n));
            // Another takes its place.
            let heir = world.add_worker(true);
            world.workers.swap(beating(*n), heir);
            world.check();
        }
        Step::Stall(n) => world.stall(beating(*n)),
        Step::Resume(n) => world.resume(beating(*n)),
        Step::Conflicts(n) => world.store.mem.conflict_next(u32::from(n % 4)),
        Step::Failures(n) => world.store.fail_after(u32::from(n % 6), u32::from(n / 6 % 4)),
        Step::ClockBack(n) => world.unix_micros -= u64::from(*n) * 1_000_003,
    }
}
