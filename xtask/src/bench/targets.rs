//! What is aimed at: for each a gate that must hold, and a goal near the best known floor.

use super::crowds::{self, PER_CORE};
use super::handover;
use super::nginx::LOCKED;
use super::overhead::{
    AUTHORITY, AUTHORITY_TO_WEBDIS, EIGHT_LOCKS, LOCAL, LOCAL_TO_NO_OP, ONE_LOCK, UNANNOTATED_TO_NO_OP,
};
use super::pairs::{BY_CPU, MORE_CPU, OF_BASELINE};
use super::report::{Findings, Target, Unit};
use super::searches::{self, LONGEST, SEARCH};
use super::services::Kind;

pub const TARGETS: &[Target] = &[
    Target {
        what: "request without an annotation, of the no-op filter's throughput",
        gate: 0.97,
        goal: 1.0,
        more_is_better: true,
        unit: Unit::Ratio,
        found: |all| all.median("cost", UNANNOTATED_TO_NO_OP, OF_BASELINE),
    },
    Target {
        what: "local lock, of plain Envoy's throughput",
        gate: 0.80,
        goal: 0.85,
        more_is_better: true,
        unit: Unit::Ratio,
        found: |all| all.median("cost", LOCAL, OF_BASELINE),
    },
    Target {
        what: "local lock, CPU µs over the no-op filter",
        gate: 12.0,
        goal: 8.0,
        more_is_better: false,
        unit: Unit::Micros,
        found: |all| all.median("cost", LOCAL_TO_NO_OP, MORE_CPU),
    },
    Target {
        what: "8 locks in a request: their CPU over the no-op filter, to that of one",
        gate: 3.0,
        goal: 2.0,
        more_is_better: false,
        unit: Unit::Ratio,
        found: |all| {
            let cost = |row| all.median("locks", row, MORE_CPU);
            Some(cost(EIGHT_LOCKS)? / cost(ONE_LOCK)?)
        },
    },
    Target {
        what: "authority's lock, of plain Envoy's throughput",
        gate: 0.38,
        goal: 0.50,
        more_is_better: true,
        unit: Unit::Ratio,
        found: |all| all.median("remote", AUTHORITY, OF_BASELINE),
    },
    Target {
        what: "authority's lock, to Lua and Webdis",
        gate: 1.35,
        goal: 1.8,
        more_is_better: true,
        unit: Unit::Ratio,
        found: |all| all.median("remote", AUTHORITY_TO_WEBDIS, OF_BASELINE),
    },
    Target {
        what: "a local lock's share of plain Envoy, to nginx' lock's share of plain nginx (by CPU)",
        gate: 1.0,
        goal: 1.1,
        more_is_better: true,
        unit: Unit::Ratio,
        found: |all| {
            // Where load and upstream have but one core, they and not nginx limit its throughput.
            let share = |row| all.median("nginx", row, BY_CPU);
            Some(share(LOCAL)? / share(LOCKED)?)
        },
    },
    Target {
        what: "lock operations an authority's core serves, a second",
        gate: 15_000.0,
        goal: 25_000.0,
        more_is_better: true,
        unit: Unit::PerSecond,
        found: |all| all.median("services", &crowds::row(Kind::Leases, 64), PER_CORE),
    },
    Target {
        what: "hand-over, local, to another worker, p50 in ms",
        gate: 0.1,
        goal: 0.045,
        more_is_better: false,
        unit: Unit::Millis,
        found: |all| all.median("handover", &handover::row(handover::LOCAL, 1), handover::P50),
    },
    Target {
        what: "hand-over through an authority, p50, to one bare call",
        gate: 1.5,
        goal: 1.2,
        more_is_better: false,
        unit: Unit::Ratio,
        found: |all| {
            let p50 = |row: &str| all.median("handover", row, handover::P50);
            Some(p50(&handover::row(handover::AUTHORITY, 1))? / p50(handover::CALL)?)
        },
    },
    Target {
        what: "fairness: p99 / p50 of the waits, 16 waiters on one lock",
        gate: 1.5,
        goal: 1.1,
        more_is_better: false,
        unit: Unit::Ratio,
        found: |all| all.median("handover", &handover::row(handover::LOCAL, 16), handover::WAITS),
    },
    Target {
        what: "hand-over, local, p50: 256 waiters to 2",
        gate: 2.0,
        goal: 1.2,
        more_is_better: false,
        unit: Unit::Ratio,
        found: |all| {
            let p50 = |waiters| all.median("handover", &handover::row(handover::LOCAL, waiters), handover::P50);
            Some(p50(256)? / p50(2)?)
        },
    },
    Target {
        what: "search for cycles, chain of 4, in µs",
        gate: 20.0,
        goal: 10.0,
        more_is_better: false,
        unit: Unit::Micros,
        found: |all| search(all, 4, 100),
    },
    Target {
        what: "search for cycles, chain of 256, in µs",
        gate: 2_000.0,
        goal: 1_000.0,
        more_is_better: false,
        unit: Unit::Micros,
        found: |all| search(all, 256, 100),
    },
    Target {
        what: "search for cycles, chain of 10,000, in µs",
        gate: 100_000.0,
        goal: 50_000.0,
        more_is_better: false,
        unit: Unit::Micros,
        found: |all| search(all, LONGEST, 100),
    },
    Target {
        what: "search for cycles, chain of 4: 100,000 locks held to 100",
        gate: 1.5,
        goal: 1.25,
        more_is_better: false,
        unit: Unit::Ratio,
        found: |all| Some(search(all, 4, 100_000)? / search(all, 4, 100)?),
    },
];

fn search(all: &Findings, length: usize, others: usize) -> Option<f64> {
    all.median("searches", &searches::row(length, others), SEARCH)
}
