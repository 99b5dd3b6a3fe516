//! The conformance cases (tests/conformance/README.md), once for all that they are run against.
//!
//! * [`case`]: what a case says, read strictly.
//! * [`need`]: what a case needs of a target, and so why it is skipped on one that lacks it.
//! * [`mod@run`]: what each step means and what has to come of it, over the trait [`Target`].
//! * [`report`]: what came of them all, and the table.
//!
//! A target (the core on a virtual clock, requests through a real Envoy) lives with its tests: it says what it lacks in a
//! [`Profile`] and does what [`Target`] asks. No lock manager, no HTTP, no file but the cases and no clock belong here:
//! the core's tests run this as wasm under Node too.

pub mod case;
pub mod need;
pub mod report;
pub mod run;

pub use case::{Case, Expect, Mode, cases};
pub use need::{Need, Profile};
pub use report::{Report, Verdict};
pub use run::{Ask, AskId, Claim, Due, Outcome, Target, run};
