//! The conformance cases (tests/conformance/README.md) as requests through a real Envoy: a lock is taken by a request
//! that stays at the upstream, and given back by its answer.
//!
//! Many cases run at once, each with locks and owners of its own. How a case runs is in [`run`], what it is called and
//! whether it can be told by requests in [`cases`].

mod caller;
mod cases;
mod run;

use std::collections::BTreeMap;
use std::rc::Rc;

use interlock_testkit::{EnvoyConfig, Route};
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, LocalSet, spawn_local};

use crate::common::{Plan, Stage, run};
use cases::CASES;
use run::Run;

/// So many cases run at once.
const AT_ONCE: usize = 12;

static STAGE: Stage = Stage::new(|| {
    let plan = |reentrancy| {
        // No wait ends by itself but where a case says so.
        let policy = json!({
            "reentrancy": reentrancy,
            "classes": cases::classes(),
            "defaults": { "wait": "50s", "ttl": "30s" },
            "limits": { "max_wait": "50s" },
        });
        Plan::new(policy).patch(settled)
    };
    vec![("counting", plan("owner")), ("rejecting", plan("none")), ("permits", plan("owner"))]
});

fn settled(config: EnvoyConfig) -> EnvoyConfig {
    config.route(Route::path(caller::SETTLED).patch(|route| {
        route.as_object_mut().expect("a route").remove("route");
        route["direct_response"] = json!({ "status": 204 });
    }))
}

#[test]
fn every_case_that_requests_can_tell_passes() {
    run(LocalSet::new().run_until(async {
        let mut lanes = BTreeMap::new();
        for name in ["counting", "rejecting", "permits"] {
            lanes.insert(name, Rc::new(STAGE.lane(name).await));
        }
        let room = Rc::new(Semaphore::new(AT_ONCE));
        // By source: passed, skipped.
        let mut table: BTreeMap<&str, [usize; 2]> = BTreeMap::new();
        let mut skipped: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let mut running = JoinSet::new();
        for (number, case) in CASES.iter().enumerate() {
            let name = case["name"].as_str().unwrap();
            if let Some(why) = cases::skip(case) {
                table.entry(source(name)).or_default()[1] += 1;
                skipped.entry(why).or_default().push(name);
                continue;
            }
            let (lane, room) = (Rc::clone(&lanes[cases::lane(case)]), Rc::clone(&room));
            running.spawn_local(async move {
                let _place = room.acquire().await.expect("a place");
                // A task of its own, so that a panic is known by its case.
                let done = spawn_local(Run::new(number, case, lane).run()).await;
                (name, done.unwrap_or_else(|panic| Err(panic.to_string())))
            });
        }
        let mut failures = Vec::new();
        while let Some(done) = running.join_next().await {
            match done.expect("a case") {
                (name, Ok(())) => table.entry(source(name)).or_default()[0] += 1,
                (name, Err(why)) => failures.push(format!("{name}: {why}")),
            }
        }
        println!("{:<12} {:>6} {:>8}", "source", "passed", "skipped");
        for (source, [passed, skipped]) in &table {
            println!("{source:<12} {passed:>6} {skipped:>8}");
        }
        for (why, names) in &skipped {
            println!("skipped {}: {why}: {}", names.len(), names.join(", "));
        }
        for case in CASES.iter().filter(|case| cases::skip(case).is_none()) {
            if let Some(what) = cases::beyond(case) {
                println!("passed without {what}: {}", case["name"].as_str().unwrap());
            }
        }
        assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
        for (name, lane) in &lanes {
            // An owner's connection meets one of them; that they all meet the same is out of the question.
            for worker in 0..2 {
                let served = format!("listener.{name}.worker_{worker}.downstream_cx_total");
                assert!(lane.envoy().stat(&served).await.expect("the admin endpoint") > 0, "{served}");
            }
            match *name {
                // What looks for overlaps at the upstream knows of no permits.
                "permits" => lane.empty().await,
                _ => lane.quiet().await,
            }
        }
        let counts = table.values().fold([0; 2], |sum, row| [sum[0] + row[0], sum[1] + row[1]]);
        let reasons: Vec<usize> = skipped.values().map(Vec::len).collect();
        assert_eq!(counts, [144, 37], "a case may be skipped only for what requests cannot tell: {reasons:?}");
    }));
}

fn source(name: &str) -> &str {
    name.split('/').next().unwrap()
}
