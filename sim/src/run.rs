//! Many schedules on several threads, and what came of them.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use interlock::backend::local::Local;

use crate::backend::Bare;
use crate::protocol::{self, Plan};
use crate::report::{Counts, Part};
use crate::schedule::{Schedule, make};
use crate::state::{Plant, Violation};
use crate::trace::Trace;
use crate::world::{Played, Yard, play};

/// What is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Scenario {
    /// The lock table over plain records in few buckets
    Core,
    /// The local backend over shared data, with its encoding
    Backend,
    /// The lease protocol: an authority, three proxies and a network
    Protocol,
}

impl Scenario {
    /// What has to happen in it.
    pub fn parts(self) -> &'static [Part] {
        match self {
            Scenario::Core => &[Part::All, Part::Table, Part::Bare],
            Scenario::Backend => &[Part::All, Part::Table],
            Scenario::Protocol => &[Part::All, Part::Protocol],
        }
    }
}

/// How many requests a schedule has at the most.
const LONGEST: usize = 24;

/// A schedule of any scenario.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Script {
    /// Of the lock table; over plain records, or with the encoding of the backend.
    Table(Schedule, bool),
    /// Of the lease protocol.
    Protocol(Plan),
}

impl Script {
    /// Makes up the schedule of a seed.
    pub fn make(scenario: Scenario, seed: u64) -> Self {
        match scenario {
            Scenario::Core => Script::Table(make(seed, LONGEST), false),
            Scenario::Backend => Script::Table(make(seed, LONGEST), true),
            Scenario::Protocol => Script::Protocol(protocol::make(seed)),
        }
    }

    /// How many steps it has.
    pub fn len(&self) -> usize {
        match self {
            Script::Table(schedule, _) => schedule.steps.len(),
            Script::Protocol(plan) => plan.moves.len(),
        }
    }

    /// Whether nothing happens in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Plays it, and takes a panic of the code under test for a violation.
    pub fn play(&self, yard: &mut Yard, with_lines: bool, plant: Plant) -> Played {
        let played = catch_unwind(AssertUnwindSafe(|| match self {
            Script::Table(schedule, false) => play::<Bare>(schedule, yard, with_lines, plant),
            Script::Table(schedule, true) => play::<Local>(schedule, yard, with_lines, plant),
            Script::Protocol(plan) => protocol::play(plan, yard, with_lines, plant),
        }));
        played.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            let what = format!("panic: {}", text.unwrap_or_default());
            let violation = Some(Violation { what, rule: None });
            Played { violation, counts: Counts::default(), trace: Trace::default() }
        })
    }
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Script::Table(schedule, _) => schedule.fmt(f),
            Script::Protocol(plan) => plan.fmt(f),
        }
    }
}

/// When a run ends.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After so many schedules.
    Schedules(u64),
    /// After so long.
    Elapsed(Duration),
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Ran {
    /// What happened in all of it.
    pub counts: Counts,
    /// The lowest seed that failed, with what it violated.
    pub failed: Option<(u64, Violation)>,
    /// All digests together: the same for the same seeds, on however many threads.
    pub digest: u64,
}

/// Plays the schedules of the seeds from `first` on.
pub fn run(scenario: Scenario, first: u64, until: Until, threads: usize) -> Ran {
    let next = AtomicU64::new(0);
    let ran = Mutex::new(Ran::default());
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| worker(scenario, first, until, began, &next, &ran));
        }
    });
    ran.into_inner().unwrap_or_default()
}

/// How many seeds a thread takes at a time.
const BATCH: u64 = 256;

fn worker(scenario: Scenario, first: u64, until: Until, began: Instant, next: &AtomicU64, ran: &Mutex<Ran>) {
    let mut yard = Yard::new();
    loop {
        let from = next.fetch_add(BATCH, Ordering::Relaxed);
        let to = match until {
            Until::Schedules(count) if from >= count => return,
            Until::Schedules(count) => count.min(from + BATCH),
            Until::Elapsed(span) if began.elapsed() >= span => return,
            Until::Elapsed(_) => from + BATCH,
        };
        let mut mine = Ran::default();
        for seed in (from..to).map(|at| first.wrapping_add(at)) {
            let played = Script::make(scenario, seed).play(&mut yard, false, Plant::Nothing);
            mine.counts.add(&played.counts);
            mine.digest = mine.digest.wrapping_add(played.trace.digest().wrapping_mul(seed | 1));
            if let Some(violation) = played.violation {
                mine.failed = Some((seed, violation));
                // The others need not go on either.
                next.store(u64::MAX / 2, Ordering::Relaxed);
                break;
            }
        }
        let Ok(mut ran) = ran.lock() else { return };
        ran.counts.add(&mine.counts);
        ran.digest = ran.digest.wrapping_add(mine.digest);
        let lower = |(seed, _): &(u64, Violation)| ran.failed.as_ref().is_none_or(|(known, _)| seed < known);
        if mine.failed.as_ref().is_some_and(lower) {
            ran.failed = mine.failed;
        }
    }
}
