//! The conformance cases (tests/conformance/README.md) as requests through a real Envoy.
//!
//! Many cases run at once, each with locks and owners of its own. What a case is and when it has passed is in the crate
//! `interlock-conformance`; how requests do it is in [`target`], and what its locks are called in [`names`].

mod caller;
pub mod names;
mod target;

use std::collections::BTreeMap;
use std::rc::Rc;

use interlock_conformance::need::{self, Aspect};
use interlock_conformance::{Case, Need, Profile, Report, Target, Verdict, cases};
use interlock_testkit::{EnvoyConfig, Route};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, LocalSet, spawn_local};

use crate::common::{Lane, Plan, Stage, run};
use target::Wire;

/// So many cases run at once.
const AT_ONCE: usize = 12;

const COUNTED: &str = "re-entry is counted: one release does not undo two grants";
const RENEWS: &str = "the proxy renews the lease of a request, its client cannot";
const NO_API: &str = "a lock is broken by a call of the lease API, not by a request";
const NO_GUARD: &str = "who holds a lock is asked over the lease API, not by a request";

/// The cases that are skipped here and not everywhere.
const SKIPPED: [(&str, &[&str]); 4] = [
    (COUNTED, &["ww_mutex/EALREADY", "consul/ReclaimLock"]),
    (
        RENEWS,
        &[
            "consul/ForceInvalidate",
            "consul/ttl-is-lower-bound",
            "resty/expire-extend",
            "litmus/refresh",
            "jepsen/paused-holder-fenced",
        ],
    ),
    (NO_API, &["consul/DeleteKey"]),
    (
        NO_GUARD,
        &[
            "litmus/lock_excl-notowner",
            "litmus/cond_put_corrupt_token",
            "litmus/fail_cond_put_unlocked",
            "litmus/lock_shared-double",
            "jepsen/etcd-set-txn-guard",
        ],
    ),
];

/// What requests cannot tell.
const PROFILE: Profile = Profile {
    name: "wire",
    lacks: |need| match need {
        Need::IdempotentReentry => Some(COUNTED),
        Need::Renew => Some(RENEWS),
        Need::BreakGlass => Some(NO_API),
        Need::Access => Some(NO_GUARD),
        // By the hold limit.
        Need::Lapse => None,
        Need::LearnedOrder | Need::LockDelay | Need::NoUpgrade => need::beyond_the_contract(need),
    },
    // reload.rs has the reload, and a clock that cannot jump does not let time pass for nothing.
    shows: |aspect| match aspect {
        Aspect::Revoke | Aspect::AuthorityRestart | Aspect::Status | Aspect::Reload | Aspect::IdleTime => false,
    },
    // The locks of a request are given back when it ends, however it ends.
    crash_frees: true,
    virtual_clock: false,
};

/// The same, where the sidecar asks an authority.
const FAR_PROFILE: Profile = Profile { name: "wire, locks at an authority", ..PROFILE };

/// The same, where the locks are in etcd.
const ETCD_PROFILE: Profile = Profile { name: "wire, locks in etcd", ..PROFILE };

/// One Envoy.
static STAGE: Stage = Stage::new(|| {
    let plan = |reentrancy| Plan::new(policy(reentrancy)).patch(settled);
    vec![("counting", plan("owner")), ("rejecting", plan("none")), ("permits", plan("owner"))]
});

/// A sidecar and its authority.
static FAR_STAGE: Stage = Stage::new(|| {
    let plan = |reentrancy| {
        let mut sidecar = policy("owner");
        sidecar.as_object_mut().expect("a policy").remove("reentrancy");
        let mut authority = policy(reentrancy);
        // The longest TTL is also the time for which a new authority grants nothing.
        authority["limits"]["max_ttl"] = json!("2s");
        authority["defaults"] = json!({ "wait": "50s", "ttl": "2s", "hold": "300s" });
        Plan::new(sidecar).patch(settled).authority(authority)
    };
    vec![("counting", plan("owner")), ("rejecting", plan("none")), ("permits", plan("owner"))]
});

/// A sidecar, and etcd.
static ETCD_STAGE: Stage = Stage::new(|| {
    let plan = |reentrancy| Plan::new(policy(reentrancy)).patch(settled).etcd();
    vec![("counting", plan("owner")), ("rejecting", plan("none")), ("permits", plan("owner"))]
});

fn policy(reentrancy: &str) -> Value {
    // No wait ends by itself but where a case says so.
    json!({
        "reentrancy": reentrancy,
        "classes": names::classes(&PROFILE),
        "defaults": { "wait": "50s", "ttl": "30s" },
        "limits": { "max_wait": "50s" },
    })
}

fn settled(config: EnvoyConfig) -> EnvoyConfig {
    config.route(Route::path(caller::SETTLED).patch(|route| {
        route.as_object_mut().expect("a route").remove("route");
        route["direct_response"] = json!({ "status": 204 });
    }))
}

#[test]
fn every_case_that_requests_can_tell_passes() {
    on_stage(&STAGE, &PROFILE);
}

#[test]
fn every_case_that_requests_can_tell_passes_with_the_locks_at_an_authority() {
    on_stage(&FAR_STAGE, &FAR_PROFILE);
}

#[test]
fn every_case_that_requests_can_tell_passes_with_the_locks_in_etcd() {
    on_stage(&ETCD_STAGE, &ETCD_PROFILE);
}

fn on_stage(stage: &'static Stage, profile: &'static Profile) {
    run(LocalSet::new().run_until(async {
        let mut lanes = BTreeMap::new();
        for name in ["counting", "rejecting", "permits"] {
            lanes.insert(name, Rc::new(stage.lane(name).await));
        }
        let report = every_case(profile, &lanes, Wire::new).await;
        report.settle(&SKIPPED);
        // An owner's connection meets one of the workers; that those of all lanes meet the same is out of the question.
        for worker in 0..2 {
            let mut served = 0;
            for (name, lane) in &lanes {
                let connections = format!("listener.{name}.worker_{worker}.downstream_cx_total");
                served += lane.envoy().stat(&connections).await.expect("the admin endpoint");
            }
            assert!(served > 0, "worker {worker} has served nobody");
        }
        for (name, lane) in &lanes {
            match *name {
                // What looks for overlaps at the upstream knows of no permits.
                "permits" => lane.empty().await,
                _ => lane.quiet().await,
            }
            // Three roots share each VM here, and a message that is read in another than its own is empty.
            let unread = lane.envoy().metric("interlock_backend_error_total", &[("reason", "malformed")]).await;
            assert_eq!(unread.expect("the admin endpoint"), 0.0, "an answer could not be read");
        }
    }));
}

/// Runs every case of a profile, many at once, each with a target of its own on one of the lanes.
pub async fn every_case<T: Target + 'static>(
    profile: &'static Profile,
    lanes: &BTreeMap<&'static str, Rc<Lane>>,
    target: impl Fn(usize, &'static Case, Rc<Lane>) -> T,
) -> Report {
    let room = Rc::new(Semaphore::new(AT_ONCE));
    let mut verdicts = BTreeMap::new();
    let mut running = JoinSet::new();
    for (number, case) in cases().iter().enumerate() {
        if let Some(why) = need::skip(case, profile) {
            verdicts.insert(number, Verdict::Skipped(why.to_owned()));
            continue;
        }
        let (mut target, room) = (target(number, case, Rc::clone(&lanes[names::lane(case)])), Rc::clone(&room));
        running.spawn_local(async move {
            let _place = room.acquire().await.expect("a place");
            // A task of its own, so that a panic is known by its case.
            let done = spawn_local(async move { interlock_conformance::run(case, profile, &mut target).await });
            (number, done.await.unwrap_or_else(|panic| Err(panic.to_string())))
        });
    }
    while let Some(done) = running.join_next().await {
        let (number, done) = done.expect("a case");
        verdicts.insert(number, done.map_or_else(Verdict::Failed, |()| Verdict::Passed));
    }
    let mut report = Report::new(profile);
    for (number, verdict) in verdicts {
        report.add(&cases()[number], profile, verdict);
    }
    report
}
