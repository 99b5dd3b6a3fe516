//! What operators see: every metric with its labels through the tags that the shipped bootstrap cuts, and one line of
//! JSON an incident.

use std::collections::BTreeSet;
use std::time::Duration;

use interlock_testkit::stats::{self, Sample};
use interlock_testkit::{Client, DEADLINE, Envoy, wait_for};
use serde_json::{Value, json};

use crate::world::{World, log_lines, policy};

/// Those of SPEC section 6 that the local backend gives, and those of the table and its housekeeping.
const METRICS: [&str; 15] = [
    "interlock_acquire_total",
    "interlock_audit_total",
    "interlock_backend_error_total",
    "interlock_backend_ms",
    "interlock_deadlock_total",
    "interlock_held",
    "interlock_hold_ms",
    "interlock_lease_expired_total",
    "interlock_lease_lost_total",
    "interlock_order_violation_total",
    "interlock_sweep_total",
    "interlock_table_locks",
    "interlock_table_owners",
    "interlock_wait_ms",
    "interlock_waiting",
];

fn shop() -> Value {
    let mut policy = policy();
    policy["instance"] = json!("shop.eu");
    policy["classes"] = json!([
        { "name": "order", "within": "unordered" },
        { "name": "account", "rank": 10 },
        { "name": "ledger", "rank": 20 },
    ]);
    policy["rules"] = json!([{
        "name": "watch",
        "match": { "path": "/watched" },
        "locks": [{ "name": "order/watched", "wait": "0s" }],
        "enforcement": "audit",
    }]);
    policy
}

/// An Envoy to which everything has happened that is counted, once or twice, and that is at rest again.
async fn eventful() -> World {
    let world = World::with(|config| {
        config.policy(shop()).patch_plugin(|plugin| plugin["allow_on_headers_stop_iteration"] = json!(true))
    })
    .await;
    let status = async |owner, path: &str, lock: &str| {
        let answer = world.ask(owner, path, lock).send().await.unwrap();
        (answer.status, answer.json()["type"].as_str().unwrap_or_default().replace("urn:interlock:problem:", ""))
    };
    let one = world.ask(1, "/one?hold", "order/1").spawn();
    let two = world.ask(2, "/two?hold", "order/2;mode=shared").spawn();
    let three = world.ask(3, "/three?hold", "ledger/1").spawn();
    for path in ["/one", "/two", "/three"] {
        world.upstream.wait_for_requests(path, 1).await;
    }
    let waits = world.ask(1, "/waits", "order/2").spawn();
    let leaves = world.ask(4, "/leaves", "order/1").spawn();
    world.until_waiting(2).await;
    world.until_held(3).await;
    let of = |class| vec![("class", class), ("instance", "shop_eu")];
    for (gauge, labels, value) in [
        ("interlock_held", of("order"), 2.0),
        ("interlock_held", of("ledger"), 1.0),
        ("interlock_held", of("account"), 0.0),
        ("interlock_waiting", of("order"), 2.0),
        ("interlock_table_locks", vec![("instance", "shop_eu")], 3.0),
        ("interlock_table_owners", vec![("instance", "shop_eu")], 4.0),
    ] {
        world.envoy.wait_metric(gauge, &labels, |seen| seen == value, DEADLINE).await;
    }

    assert_eq!(status(5, "/r", "order/1;wait=0").await, (423, "lock-held".to_owned()));
    assert_eq!(status(6, "/r", "order/1;wait=0.3").await, (423, "wait-timeout".to_owned()));
    assert_eq!(status(2, "/r", "order/1").await, (409, "deadlock".to_owned()));
    assert_eq!(status(3, "/r", "account/1").await, (409, "order-violation".to_owned()));
    assert_eq!(status(7, "/r", "order/1;mode=odd").await, (400, "malformed-annotation".to_owned()));
    assert_eq!(status(8, "/r?hold", "unknown/1;ttl=0.5;hold=0.5").await, (409, "lease-lost".to_owned()));
    // With the option that Interlock does not support, the body of a parked request comes nevertheless.
    let answer = world.ask(9, "/r", "order/1").body("body").send().await.unwrap();
    assert_eq!(answer.status, 503, "{}", answer.text());
    leaves.leave().await;

    let watched = Client::http1_fresh().get(world.url("/watched?hold")).trace(10).spawn();
    world.upstream.wait_for_requests("/watched", 1).await;
    let second = Client::http1_fresh().get(world.url("/watched")).trace(11).send().await.unwrap();
    assert_eq!(second.status, 200);

    for path in ["/one", "/two", "/three", "/watched"] {
        world.upstream.open(path);
    }
    for request in [one, two, three, waits, watched] {
        assert_eq!(request.answer().await.unwrap().status, 200);
    }
    world.upstream.wait_idle().await;
    world.assert_empty().await;
    world
}

async fn metrics(envoy: &Envoy) -> Vec<Sample> {
    let samples = envoy.metrics().await.unwrap();
    samples.into_iter().filter(|sample| sample.name.starts_with("interlock_")).collect()
}

#[tokio::test]
async fn every_metric_appears_with_its_labels() {
    let world = eventful().await;
    // Histograms follow at the next flush of Envoy's statistics.
    let everything = [("class", "order")];
    world.envoy.wait_metric("interlock_hold_ms_count", &everything, |n| n == 3.0, DEADLINE).await;
    let samples = metrics(&world.envoy).await;
    let names = samples.iter().map(|sample| {
        let name = sample.name.as_str();
        let of_histogram = |suffix| name.strip_suffix(suffix).filter(|base| base.ends_with("_ms"));
        ["_bucket", "_count", "_sum"].into_iter().find_map(of_histogram).unwrap_or(name)
    });
    assert_eq!(names.collect::<BTreeSet<_>>(), BTreeSet::from(METRICS), "all there, and all labels cut off");
    let labels = samples.iter().flat_map(|sample| sample.labels.keys().map(String::as_str)).collect::<BTreeSet<_>>();
    assert_eq!(labels, BTreeSet::from(["class", "instance", "le", "outcome", "reason"]));

    let count = |name: &str, labels: &[(&str, &str)]| stats::sum(&samples, name, labels);
    let acquired = |class| count("interlock_acquire_total", &[("class", class), ("outcome", "acquired")]);
    assert_eq!((acquired("order"), acquired("ledger"), acquired("other")), (3.0, 1.0, 1.0));
    for (class, reason) in [
        ("order", "lock-held"),
        ("order", "wait-timeout"),
        ("order", "deadlock"),
        ("account", "order-violation"),
        ("other", "malformed-annotation"),
        ("order", "backend-unavailable"),
    ] {
        let labels = [("class", class), ("outcome", "refused"), ("reason", reason)];
        assert_eq!(count("interlock_acquire_total", &labels), 1.0, "{labels:?}");
    }
    assert_eq!(count("interlock_acquire_total", &[("outcome", "refused")]), 6.0);
    assert_eq!(count("interlock_acquire_total", &[("outcome", "cancelled"), ("class", "order")]), 1.0);
    assert_eq!(count("interlock_acquire_total", &[]), 12.0);
    for (name, labels) in [
        ("interlock_deadlock_total", vec![("class", "order")]),
        ("interlock_order_violation_total", vec![("class", "account")]),
        ("interlock_lease_lost_total", vec![("class", "other"), ("reason", "hold-limit")]),
        ("interlock_lease_expired_total", vec![("class", "other")]),
        ("interlock_backend_error_total", vec![("reason", "store")]),
    ] {
        assert_eq!((count(name, &labels), count(name, &[])), (1.0, 1.0), "{name}{labels:?}");
    }
    let audit = |labels: &[(&str, &str)]| count("interlock_audit_total", labels);
    assert_eq!(audit(&[("class", "order"), ("outcome", "acquired")]), 1.0);
    assert_eq!(audit(&[("class", "order"), ("outcome", "refused"), ("reason", "lock-held")]), 1.0);
    assert_eq!(audit(&[]), 2.0);
}

#[tokio::test]
async fn histograms_count_waits_and_holds_in_milliseconds() {
    let world = World::start().await;
    let holder = world.ask(1, "/held?hold", "order/1").spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    let waiter = world.ask(2, "/next", "order/1").spawn();
    world.until_waiting(1).await;
    world.upstream.open("/held");
    assert_eq!(holder.answer().await.unwrap().status, 200);
    assert_eq!(waiter.answer().await.unwrap().status, 200);
    let refused = world.ask(3, "/refused", "order/1;wait=0").send().await.unwrap();
    assert_eq!(refused.status, 200);
    world.assert_clean().await;
    let labels = [("class", "order")];
    for (name, expected) in [("interlock_wait_ms", 3.0), ("interlock_hold_ms", 3.0)] {
        world.envoy.wait_metric(&format!("{name}_count"), &labels, |n| n == expected, DEADLINE).await;
    }
    world.envoy.wait_metric("interlock_backend_ms_count", &[], |n| n == 3.0, DEADLINE).await;
    let samples = metrics(&world.envoy).await;
    let held = world.upstream.requests_to("/held")[0].clone();
    let (_, ended) = held.ended.unwrap();
    let held = ended.duration_since(held.arrived);
    // Envoy's histograms are exact to a few percent.
    for (name, least) in [("interlock_hold_ms", held), ("interlock_wait_ms", Duration::from_millis(1))] {
        let sum = stats::sum(&samples, &format!("{name}_sum"), &labels);
        assert!(sum * 1.1 >= least.as_secs_f64() * 1000.0, "{name} sums up to {sum} ms, with one of {least:?}");
        assert!(sum < 60_000.0, "{name} sums up to {sum} ms");
        let bucket = |le| stats::sum(&samples, &format!("{name}_bucket"), &[("class", "order"), ("le", le)]);
        assert_eq!(bucket("+Inf"), 3.0, "{name}");
        assert_eq!(bucket("30000"), 3.0, "{name}: the buckets are the shipped ones");
        assert!(bucket("1") <= bucket("50") && bucket("50") <= bucket("30000"), "{name}");
    }
}

#[tokio::test]
async fn every_incident_is_one_line_of_json() {
    let world = eventful().await;
    let owner = |n: u32| json!(format!("{n:032x}"));
    wait_for("the log", DEADLINE, || log_lines(&world.envoy, "would-refuse").len() == 1).await;
    let lines = log_lines(&world.envoy, "refused");
    let find = |reason: &str| {
        let mut of_reason = lines.iter().filter(|line| line["reason"] == reason);
        let line = of_reason.next().unwrap_or_else(|| panic!("no line about {reason}: {lines:?}"));
        assert!(of_reason.next().is_none(), "more than one line about {reason}");
        line
    };
    for line in &lines {
        assert_eq!(line["instance"], "shop.eu", "{line}");
        assert_eq!(line["route"], "all", "{line}");
        let time = line["time"].as_str().unwrap();
        let shape = time.bytes().map(|b| if b.is_ascii_digit() { '0' } else { char::from(b) }).collect::<String>();
        assert_eq!(shape, "0000-00-00T00:00:00.000000Z", "{line}");
        assert!(line["waited_ms"].is_u64(), "{line}");
    }
    assert_eq!(lines.len(), 6, "{lines:?}");

    let held = find("lock-held");
    assert_eq!((&held["owner"], &held["lock"], &held["mode"]), (&owner(5), &json!("order/1"), &json!("exclusive")));
    let holder = &held["holders"][0];
    assert_eq!((&holder["owner"], &holder["mode"]), (&owner(1), &json!("exclusive")), "{held}");
    assert!(holder["fence"].as_u64().unwrap() > 0 && holder["held_ms"].is_u64(), "{held}");

    let timeout = find("wait-timeout");
    assert_eq!((&timeout["owner"], &timeout["holders"][0]["owner"]), (&owner(6), &owner(1)));
    assert!(timeout["waited_ms"].as_u64().unwrap() >= 300, "{timeout}");

    let deadlock = find("deadlock");
    let cycle = deadlock["cycle"].as_array().unwrap();
    assert_eq!(cycle.len(), 2, "{deadlock}");
    assert_eq!((&cycle[0]["owner"], &cycle[0]["waits_for"]), (&owner(2), &json!("order/1")), "{deadlock}");
    for (edge, next) in cycle.iter().zip(cycle.iter().cycle().skip(1)) {
        assert_eq!(edge["held_by"], next["owner"], "{deadlock}");
    }

    let disorder = find("order-violation");
    assert_eq!((&disorder["owner"], &disorder["lock"]), (&owner(3), &json!("account/1")));
    find("malformed-annotation");
    find("backend-unavailable");

    let watched = &log_lines(&world.envoy, "would-refuse")[0];
    assert_eq!((&watched["owner"], &watched["reason"]), (&owner(11), &json!("lock-held")), "{watched}");

    let lost = log_lines(&world.envoy, "lease-lost");
    assert_eq!(lost.len(), 1, "{lost:?}");
    assert_eq!((&lost[0]["owner"], &lost[0]["lock"]), (&owner(8), &json!("unknown/1")), "{}", lost[0]);
    assert_eq!((&lost[0]["mode"], &lost[0]["reason"]), (&json!("exclusive"), &json!("hold-limit")), "{}", lost[0]);
    assert_eq!(lost[0]["route"], "all", "{}", lost[0]);
}
