//! What the search for wait-for cycles costs, by the length of the chain and by the size of the table; and the other parts of the hot path. All of
//! it natively and without a proxy: the same code that ships, not as wasm.

use std::time::Instant;

use anyhow::{Context, Result};
use bench_hot::{CASES, Case};

use super::pairs::Pace;
use super::report::{Finding, Unit};

/// How many owners each wait for the next one's lock, with how many other locks held.
const CHAINS: [(usize, usize); 11] = [
    (1, 100),
    (2, 100),
    (4, 100),
    (16, 100),
    (64, 100),
    (256, 100),
    (LONGEST, 100),
    (1, 100_000),
    (1, 10_000),
    (4, 10_000),
    (4, 100_000),
];
pub const LONGEST: usize = 10_000;
/// A part of the time that others are measured for: there are many rows, and each takes microseconds.
const PART: u32 = 6;

pub const SEARCH: &str = "the search alone, µs";
const TIME: &str = "µs";

pub fn row(length: usize, others: usize) -> String {
    format!("a wait at the end of a chain of {length}, {others} other locks held")
}

/// What a search goes through at most: longer chains end in a refusal, and are not measured.
fn is_searched(length: usize) -> bool {
    length < interlock_core::cycle::MAX_OWNERS
}

pub async fn searches(pace: Pace) -> Result<Finding> {
    let measured = tokio::task::spawn_blocking(move || measure(pace));
    measured.await.context("the measuring thread is gone")?
}

fn measure(pace: Pace) -> Result<Finding> {
    let columns = [(TIME, Unit::Micros), (SEARCH, Unit::Micros)];
    let mut finding =
        Finding::new("searches", "The lock table alone, natively: cycle searches and other parts", &columns);
    let chains: Vec<_> = CHAINS.into_iter().filter(|(length, _)| is_searched(*length)).collect();
    let made = chains.iter().map(|(length, others)| (row(*length, *others), bench_hot::chain(*length, *others)));
    let parts = CASES.iter().map(|(name, make)| ((*name).to_owned(), make()));
    let mut cases: Vec<(String, Case)> = made.chain(parts).collect();
    let mut told = vec![Vec::with_capacity(pace.rounds); cases.len()];
    for round in 0..pace.rounds {
        for turn in 0..cases.len() {
            let at = (round + turn) % cases.len();
            told[at].push(micros(&mut cases[at].1, pace));
        }
        eprint!("\rsearches: round {} of {}", round + 1, pace.rounds);
    }
    eprintln!();
    for (at, (name, _)) in cases.iter().enumerate() {
        // Without a chain there is the same to do but for the search.
        let bare = chains.get(at).and_then(|(_, others)| chains.iter().position(|chain| *chain == (1, *others)));
        let alone = bare
            .filter(|bare| *bare != at)
            .map(|bare| told[at].iter().zip(&told[bare]).map(|(with, without)| with - without).collect());
        finding.row(name, &[told[at].clone(), alone.unwrap_or_default()]);
    }
    finding.note(
        "Each wait is published, searched for cycles and given up again. A search alone is what that takes more than behind a holder who waits for \
         nobody, in a table of as many locks.",
    );
    Ok(finding)
}

/// How long it takes, on average.
fn micros(case: &mut Case, pace: Pace) -> f64 {
    let (begin, mut spent, mut times) = (Instant::now(), 0.0, 0_u32);
    while times < 3 || begin.elapsed() < pace.time / PART {
        spent += case.once().as_secs_f64();
        times += 1;
    }
    spent * 1e6 / f64::from(times)
}
