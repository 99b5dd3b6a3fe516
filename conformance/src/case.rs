//! What a case says: `cases.json` as values. A field or a word that is not known here is an error, so that none is
//! passed over in silence.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use serde::Deserialize;

/// One schedule with its expected outcome.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// Its name; what stands before the first `/` is the group it comes from.
    pub name: String,
    /// Where it comes from: file, revision and test.
    pub source: String,
    /// Its locks.
    pub locks: BTreeMap<String, Lock>,
    /// How the lock manager is to be set up.
    #[serde(default)]
    pub options: Options,
    /// What happens, in order.
    pub steps: Vec<Step>,
    /// The features that it is about.
    pub requires: BTreeSet<Feature>,
    /// For people.
    #[serde(default)]
    pub note: String,
    /// Whether it was restated or generalised from its source.
    #[serde(default)]
    pub derived: bool,
}

/// A lock's class.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    /// Its place in the declared order.
    pub rank: Option<u32>,
    /// How many may hold it at once.
    pub permits: Option<u32>,
}

/// How the lock manager is to be set up.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    /// What a second lock of the same owner is.
    pub reentrant: Reentrant,
    /// Whether a reader may become the writer.
    pub upgrade: Upgrade,
    /// Where the order of locks comes from, where there is one.
    pub order: Option<Order>,
    /// For how long a lock that expired stays closed.
    pub lock_delay_ms: Option<u64>,
}

/// What a second lock of the same owner is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reentrant {
    /// One more: as many releases free it.
    #[default]
    Count,
    /// The same: one release frees it.
    Idempotent,
    /// Refused.
    Reject,
}

/// Whether a reader may become the writer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Upgrade {
    /// The sole one at once.
    #[default]
    InPlace,
    /// Never.
    Reject,
}

/// Where the order of locks comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// From their ranks.
    Ranked,
    /// From what was done before.
    Learned,
}

/// What a case is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the words of tests/conformance")]
pub enum Feature {
    Shared,
    Matrix,
    IntentModes,
    Time,
    OrderLearned,
    OrderRanked,
    GatedAccess,
    FifoStrict,
    Semaphore,
    Fence,
    MultiProxy,
    Token,
    Overshoot,
    ConfigReload,
    AdminRelease,
    LockDelay,
    AuthorityRestart,
    Metrics,
    UpgradePolicy,
    Downgrade,
    MultiLock,
    Revoke,
    BadInput,
    Status,
}

/// What is done in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the words of tests/conformance")]
pub enum Op {
    Acquire,
    Release,
    Renew,
    Expire,
    Crash,
    Cancel,
    Downgrade,
    AdminRelease,
    Access,
    Advance,
}

/// A mode of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[allow(missing_docs, reason = "the words of tests/conformance")]
pub enum Mode {
    X,
    S,
    IS,
    IX,
    SIX,
    /// A permit: what a lease in a class with permits takes, whatever its mode.
    P,
}

/// How a step has to come out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the words of tests/conformance")]
pub enum Expect {
    Granted,
    Waits,
    RejectedDeadlock,
    RejectedOrder,
    Timeout,
    ErrorNotHolder,
    Ok,
    Allowed,
    Denied,
}

/// One step.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Who does it; `-` where time does.
    pub owner: String,
    /// What is done.
    pub op: Op,
    /// To which lock.
    #[serde(default)]
    pub lock: String,
    /// In which mode.
    pub mode: Option<Mode>,
    /// How it has to come out.
    pub expect: Option<Expect>,
    /// What is right too.
    #[serde(default)]
    pub alt_expect: Vec<Expect>,
    /// What the source did, where it differs.
    pub source_expect: Option<String>,
    /// How long it may wait.
    pub wait_ms: Option<u64>,
    /// How long it holds without a renewal.
    pub ttl_ms: Option<u64>,
    /// Between which two spans it has to be answered.
    pub elapsed_ms: Option<[u64; 2]>,
    /// Who is granted because of it, in order.
    #[serde(default)]
    pub wakes: Vec<String>,
    /// The cycle that it is refused for, from its owner round to its owner.
    pub cycle: Option<Vec<String>>,
    /// Whether it is done with a lease or a fence that is out of date.
    #[serde(default)]
    pub stale: bool,
    /// Whether it releases every count.
    #[serde(default)]
    pub all: bool,
    /// How much time passes.
    pub ms: Option<u64>,
    /// Whose leases on what end by it, in order.
    #[serde(default)]
    pub expired: Vec<(String, String)>,
    /// Whose waits end by it, in order.
    #[serde(default)]
    pub timed_out: Vec<String>,
}

impl Step {
    /// Every outcome that is right; that of strict FIFO first.
    pub fn allowed(&self) -> Vec<Expect> {
        self.expect.iter().chain(&self.alt_expect).copied().collect()
    }
}

impl Case {
    /// The group it comes from.
    pub fn group(&self) -> &str {
        self.name.split('/').next().unwrap_or_default()
    }

    /// Whether it is about this.
    pub fn is_about(&self, feature: Feature) -> bool {
        self.requires.contains(&feature)
    }

    /// Whether a step does this.
    pub fn does(&self, op: Op) -> bool {
        self.steps.iter().any(|step| step.op == op)
    }

    /// Everybody who does something in it, in order of appearance.
    pub fn owners(&self) -> Vec<&str> {
        let mut owners = Vec::new();
        for step in &self.steps {
            if step.op != Op::Advance && !owners.contains(&step.owner.as_str()) {
                owners.push(step.owner.as_str());
            }
        }
        owners
    }
}

/// All cases.
///
/// # Panics
/// When `cases.json` is not what this module says it is.
pub fn cases() -> &'static [Case] {
    static CASES: LazyLock<Vec<Case>> = LazyLock::new(|| {
        let text = include_str!("../../tests/conformance/cases.json");
        serde_json::from_str(text).unwrap_or_else(|error| panic!("tests/conformance/cases.json: {error}"))
    });
    &CASES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_read_and_has_a_name_of_its_own() {
        let names: BTreeSet<&str> = cases().iter().map(|case| case.name.as_str()).collect();
        assert_eq!((cases().len(), names.len()), (181, 181));
        for case in cases() {
            assert!(!case.source.is_empty() && !case.steps.is_empty(), "{}", case.name);
            for step in &case.steps {
                let locks = step.lock.is_empty() || case.locks.contains_key(&step.lock);
                assert!(locks, "{} names the unknown lock {}", case.name, step.lock);
            }
        }
    }
}
