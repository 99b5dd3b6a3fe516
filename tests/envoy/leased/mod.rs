//! The conformance cases (tests/conformance/README.md) through the lease API of a real Envoy.
//!
//! What a case is and when it has passed is in the crate `interlock-conformance`; how calls of the API do it is in
//! [`target`]. Many cases run at once, each with locks, owners and leases of its own.

mod target;

use std::collections::BTreeMap;
use std::rc::Rc;

use interlock_conformance::need::{self, Aspect};
use interlock_conformance::{Need, Profile};
use interlock_testkit::{Client, EnvoyConfig, wait_for_async};
use serde_json::json;
use tokio::task::LocalSet;

use crate::common::{DEADLINE, Plan, Stage, run};
use crate::wire::{every_case, names};
use target::Leased;

/// All that a lock manager can be asked for can be asked for in calls.
const PROFILE: Profile = Profile {
    name: "lease API",
    lacks: |need| match need {
        Need::Renew | Need::Lapse | Need::BreakGlass | Need::IdempotentReentry | Need::Access => None,
        Need::LearnedOrder | Need::LockDelay | Need::NoUpgrade => need::beyond_the_contract(need),
    },
    // api.rs has the restart, and a clock that cannot jump does not let time pass for nothing.
    shows: |aspect| match aspect {
        Aspect::Status => true,
        Aspect::Revoke | Aspect::AuthorityRestart | Aspect::Reload | Aspect::IdleTime => false,
    },
    crash_frees: false,
    virtual_clock: false,
};

static STAGE: Stage = Stage::new(|| {
    let plan = |reentrancy| {
        // No wait ends by itself but where a case says so, and no lease but one that is to lapse.
        let policy = json!({
            "reentrancy": reentrancy,
            "classes": names::classes(&PROFILE),
            "defaults": { "wait": "50s", "ttl": "20s", "hold": "300s" },
            "limits": { "max_wait": "50s", "max_ttl": "20s" },
            "keys": [{ "id": "k", "secret": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" } }],
            "api": { "admin": { "token": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" } } },
        });
        Plan::new(policy).patch(bodies_first)
    };
    vec![("counting", plan("owner")), ("rejecting", plan("none")), ("permits", plan("owner"))]
});

/// The API reads bodies before it decides.
fn bodies_first(config: EnvoyConfig) -> EnvoyConfig {
    config.patch_plugin(|plugin| plugin["allow_on_headers_stop_iteration"] = json!(true))
}

#[test]
fn every_case_that_the_lease_api_can_tell_passes() {
    run(LocalSet::new().run_until(async {
        let mut lanes = BTreeMap::new();
        for name in ["counting", "rejecting", "permits"] {
            let lane = STAGE.lane(name).await;
            // A table that is new grants nothing for the longest TTL: leases of one before it may be out there.
            wait_for_async("the end of the grace", DEADLINE * 2, async || {
                let health = Client::http1_fresh().get(lane.url("/interlock/v1/health")).send().await;
                health.expect("an answer").status == 200
            })
            .await;
            lanes.insert(name, Rc::new(lane));
        }
        let report = every_case(&PROFILE, &lanes, Leased::new).await;
        report.settle(&[]);
        for lane in lanes.values() {
            lane.empty().await;
        }
    }));
}
