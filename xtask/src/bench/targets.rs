//! What is aimed at: for each a gate that must hold, and a goal near the best known floor.

use super::overhead::{
    AUTHORITY, AUTHORITY_TO_WEBDIS, EIGHT_LOCKS, LOCAL, LOCAL_TO_NO_OP, ONE_LOCK, UNANNOTATED_TO_NO_OP,
};
use super::pairs::{MORE_CPU, OF_BASELINE};
use super::report::{Target, Unit};

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
];
