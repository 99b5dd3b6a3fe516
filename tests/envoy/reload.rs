//! Policies that change while Envoy runs, policies that are no policies, and filters that share locks or do not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use interlock_testkit::client::Pending;
use interlock_testkit::config::FILTER;
use interlock_testkit::envoy::Update;
use interlock_testkit::{Client, DEADLINE, Envoy, EnvoyConfig, tools, wait_for_async};
use serde_json::{Value, json};

use crate::world::{World, add_listener, policy};

/// A policy that differs from all others of its kind: in its classes and in a rule that tells which one is in force.
fn version(n: usize) -> Value {
    let mut policy = policy();
    policy["limits"] = json!({ "max_wait": "300s" });
    policy["defaults"]["hold"] = json!("600s");
    policy["classes"].as_array_mut().unwrap().push(json!({ "name": format!("v{n}"), "rank": n }));
    policy["rules"] = json!([{
        "name": format!("probe{n}"),
        "match": { "path": "/probe" },
        "locks": [{ "name": format!("order/probe{n}") }],
    }]);
    policy
}

/// Waits until new requests meet this policy, whichever worker they come to.
async fn until_in_force(world: &World, n: usize) {
    let name = format!("order/probe{n};");
    let mut in_a_row = 0;
    wait_for_async(&format!("policy {n} to be in force"), DEADLINE, async || {
        let answer = Client::http1_fresh().get(world.url("/probe")).trace(7).send().await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
        in_a_row = if answer.joined("lock-fence").starts_with(&name) { in_a_row + 1 } else { 0 };
        in_a_row == 8
    })
    .await;
}

/// One request after the other, of which each must be served, until it is told to stop; gives back how many.
async fn load(client: Client, url: String, n: usize, stop: Arc<AtomicBool>) -> usize {
    let mut served = 0;
    while !stop.load(Ordering::Relaxed) {
        let owner = u128::try_from(n * 1_000_000 + served + 1000).unwrap();
        let lock = format!("order/{}", (n + served) % 3);
        let answer = client.get(&url).trace(owner).header("lock", &lock).send().await;
        let answer = answer.unwrap_or_else(|error| panic!("a request failed because of a reload: {error:#}"));
        assert_eq!(answer.status, 200, "{}", answer.text());
        served += 1;
    }
    served
}

async fn assert_served(requests: impl IntoIterator<Item = Pending>) {
    for request in requests {
        let answer = request.answer().await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

#[tokio::test]
async fn policies_change_under_load_while_locks_are_held() {
    // Some requests are there from the first policy to the last.
    let patience = Duration::from_secs(250);
    let patient = |hcm: &mut Value| hcm["stream_idle_timeout"] = json!("300s");
    let config = |config: EnvoyConfig| config.policy(version(0)).patch_hcm(patient).listener_from_file();
    let mut world = World::with(config).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = tokio::task::JoinSet::new();
    for n in 0..8 {
        let client = if n % 2 == 0 { Client::http1() } else { Client::http1_fresh() };
        clients.spawn(load(client, world.url("/work?delay=2"), n, Arc::clone(&stop)));
    }
    // Short TTLs: each must be renewed from one policy to the next.
    let mut requests = vec![world.ask(1, "/held?hold", "order/held;ttl=2").timeout(patience).spawn()];
    world.upstream.wait_for_requests("/held", 1).await;
    requests.push(world.ask(2, "/next", "order/held;wait=200;ttl=60").timeout(patience).spawn());
    for n in 0..10 {
        // Held in a class that the next policy does not know.
        requests.push(world.ask(10, "/gone?hold", &format!("v{n}/1;ttl=2")).timeout(patience).spawn());
        let class = format!("v{n}");
        world.envoy.wait_metric("interlock_held", &[("class", &class)], |held| held == 1.0, DEADLINE).await;
        assert_eq!(world.envoy.update_policy(&version(n + 1)).await.unwrap(), Update::Taken);
        until_in_force(&world, n + 1).await;
        for lock in ["order/held", &format!("v{n}/1")] {
            let refused = world.ask(3, "/refused", &format!("{lock};wait=0")).send().await.unwrap();
            assert_eq!(refused.status, 423, "{lock} is no longer held under policy {}", n + 1);
        }
        assert!(world.upstream.requests_to("/next").is_empty());
        world.envoy.wait_metric("interlock_held", &[("class", &class)], |held| held == 0.0, DEADLINE).await;
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(served) = clients.join_next().await {
        assert!(served.unwrap() > 0);
    }
    world.upstream.open("/held");
    world.upstream.open("/gone");
    assert_served(requests).await;
    assert_eq!(world.upstream.requests_to("/next").len(), 1);
    world.assert_clean().await;
    for name in ["interlock_lease_expired_total", "interlock_lease_lost_total"] {
        assert_eq!(world.count(name, &[]).await, 0.0, "{name}");
    }
}

/// Another build of the plugin takes over: its VMs find the table of those before them, and share it with them while they
/// last.
#[tokio::test]
async fn the_plugin_is_replaced_while_locks_are_held() {
    let mut world = World::with(EnvoyConfig::listener_from_file).await;
    let mut requests = vec![world.ask(1, "/held?hold", "order/1;ttl=2").spawn()];
    world.upstream.wait_for_requests("/held", 1).await;
    requests.push(world.ask(2, "/first", "order/1;ttl=60").spawn());
    world.until_waiting(1).await;
    let other = tools::faults_wasm().unwrap();
    let replaced = world.envoy.update_listeners(|listener| {
        let filters = &mut listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"];
        let ours = filters.as_array_mut().unwrap().iter_mut().find(|filter| filter["name"] == FILTER).unwrap();
        ours["typed_config"]["config"]["vm_config"]["code"] = json!({ "local": { "filename": other } });
    });
    assert_eq!(replaced.await.unwrap(), Update::Taken);
    // Only the other build traps on demand: by this it is known to serve new requests.
    wait_for_async("the other build to serve", DEADLINE, async || {
        let request = Client::http1_fresh().get(world.url("/which")).header("x-interlock-fault", "panic");
        request.send().await.unwrap().status == 503
    })
    .await;
    let mut in_a_row = 0;
    wait_for_async("VMs of the other build on both workers", DEADLINE, async || {
        let refused = world.ask(3, "/refused", "order/1;wait=0").send().await.unwrap();
        assert!([423, 503].contains(&refused.status), "{}", refused.text());
        in_a_row = if refused.status == 423 { in_a_row + 1 } else { 0 };
        in_a_row == 12
    })
    .await;
    requests.extend((4..8).map(|owner| world.ask(owner, "/second", "order/1;ttl=60").spawn()));
    world.until_waiting(5).await;
    world.upstream.open("/held");
    assert_served(requests).await;
    let first = &world.upstream.requests_to("/first")[0];
    assert!(world.upstream.requests_to("/second").iter().all(|second| second.arrived > first.arrived), "strict order");
    world.upstream.wait_idle().await;
    world.upstream.checker().assert_clean();
    world.assert_empty().await;
}

#[tokio::test]
async fn requests_keep_the_policy_that_they_came_under() {
    let mut strict = policy();
    strict["rules"] = json!([{
        "name": "limited",
        "match": { "path": "/limited" },
        "locks": [{ "name": "order/1", "ttl": "3s", "hold": "6s" }],
        "on_lease_lost": "continue",
    }]);
    let mut world = World::with(|config| config.policy(strict).listener_from_file()).await;
    let limited = Client::http1_fresh().get(world.url("/limited?hold")).trace(1).spawn();
    world.upstream.wait_for_requests("/limited", 1).await;
    assert_eq!(world.envoy.update_policy(&version(1)).await.unwrap(), Update::Taken);
    until_in_force(&world, 1).await;
    // Granted when the hold limit of the old policy has passed; and the old policy lets its request go on.
    assert_eq!(world.ask(2, "/next", "order/1").send().await.unwrap().status, 200);
    world.upstream.open("/limited");
    let answer = limited.answer().await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(answer.joined("lock-status").contains("outcome=lost"), "{}", answer.joined("lock-status"));
    world.assert_empty().await;
}

#[tokio::test]
async fn an_instance_may_end_while_it_holds_locks() {
    for (field, value) in [("instance", json!("second")), ("enforcement", json!("off"))] {
        let mut world = World::with(|config| config.policy(version(0)).listener_from_file()).await;
        let held = world.ask(1, "/held?hold", "order/1").spawn();
        world.upstream.wait_for_requests("/held", 1).await;
        let parked = world.ask(2, "/parked", "order/1").spawn();
        world.until_held(1).await;
        world.until_waiting(1).await;
        let mut next = version(1);
        next[field] = value;
        assert_eq!(world.envoy.update_policy(&next).await.unwrap(), Update::Taken);
        // Another instance, or none: its lock is another lock, or none.
        wait_for_async("the new policy to be in force", DEADLINE, async || {
            let answer = world.ask(3, "/free", "order/1;wait=0").send().await.unwrap();
            assert!([200, 423].contains(&answer.status), "{}", answer.text());
            answer.status == 200
        })
        .await;
        assert!(!parked.is_answered(), "it waits on, under the policy that it came under");
        world.upstream.open("/held");
        assert_served([held, parked]).await;
        world.upstream.wait_idle().await;
        for gauge in ["interlock_held", "interlock_waiting", "interlock_table_locks", "interlock_table_owners"] {
            world.envoy.wait_metric(gauge, &[], |value| value == 0.0, DEADLINE).await;
        }
    }
}

/// A policy with a mistake in it, and the one line that says so.
fn mistakes() -> [(Value, &'static str); 3] {
    let with = |field: &str, value: Value| {
        let mut policy = policy();
        policy[field] = value;
        policy
    };
    let rule =
        json!([{ "name": "x", "match": { "path": "/x" }, "locks": [{ "name": "order/1", "mode": "exlusive" }] }]);
    [
        (with("rules", rule), r#"rules[0].locks[0].mode: "exlusive" is not a mode; did you mean "exclusive"?"#),
        (with("enforcment", json!("audit")), r#"enforcment: there is no such field; did you mean "enforcement"?"#),
        (
            with("defaults", json!({ "ttl": "90s" })),
            "defaults.ttl: 90s is over limits.max_ttl, 60s; lower it, or raise the limit",
        ),
    ]
}

const REFUSED: &str = "interlock: the policy is refused: ";

fn refusals(logs: &str) -> Vec<String> {
    logs.lines().filter_map(|line| Some(line.split_once(REFUSED)?.1.to_owned())).collect()
}

#[tokio::test]
async fn a_bad_policy_is_refused_and_the_good_one_stays() {
    let mut world = World::with(|config| config.policy(version(0)).listener_from_file()).await;
    let held = world.ask(1, "/held?hold", "order/1;ttl=2").spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    let parked = world.ask(2, "/parked", "order/1").spawn();
    world.until_waiting(1).await;
    for (count, (bad, line)) in (1..).zip(mistakes()) {
        assert_eq!(world.envoy.update_policy(&bad).await.unwrap(), Update::Refused);
        assert_eq!(world.envoy.stat("listener_manager.lds.update_rejected").await.unwrap(), count);
        world.envoy.wait_log(line).await;
        let lines = refusals(&world.envoy.logs());
        assert_eq!(u64::try_from(lines.len()).unwrap(), count, "one line each: {lines:?}");
        assert_eq!(lines.last().map(String::as_str), Some(line));
        until_in_force(&world, 0).await;
        assert_eq!(world.ask(3, "/refused", "order/1;wait=0").send().await.unwrap().status, 423);
    }
    assert_eq!(world.envoy.update_policy(&version(1)).await.unwrap(), Update::Taken);
    until_in_force(&world, 1).await;
    world.upstream.open("/held");
    assert_served([held, parked]).await;
    world.assert_clean().await;
}

#[tokio::test]
async fn envoy_does_not_start_with_a_bad_policy() {
    for (bad, line) in mistakes() {
        for arguments in [&[][..], &["--mode", "validate"]] {
            let config = arguments.iter().fold(EnvoyConfig::local().policy(bad.clone()), |c, a| c.arg(a));
            let error = format!("{:#}", Envoy::start(config).await.unwrap_err());
            assert!(error.contains("Envoy ended at its start (exit status: 1)"), "{error}");
            let lines = refusals(&error);
            assert!(!lines.is_empty() && lines.iter().all(|said| said == line), "{arguments:?}: {error}");
        }
    }
    let good = EnvoyConfig::local().arg("--mode").arg("validate");
    let ended = format!("{:#}", Envoy::start(good).await.unwrap_err());
    assert!(ended.contains("(exit status: 0)") && refusals(&ended).is_empty(), "{ended}");
}

#[tokio::test]
async fn instances_keep_apart_and_listeners_of_one_instance_share() {
    let mut friend = policy();
    friend["classes"].as_array_mut().unwrap().push(json!({ "name": "another" }));
    let mut stranger = policy();
    stranger["instance"] = json!("stranger");
    let world = World::with(|config| {
        add_listener(add_listener(add_listener(config, "twin", &policy()), "friend", &friend), "stranger", &stranger)
    })
    .await;
    let ask = |listener: &str, owner, path: &str, lock: &str| {
        let url = format!("http://{}{path}", world.envoy.listener(listener).unwrap());
        Client::http1_fresh().get(url).trace(owner).header("lock", lock)
    };
    let held = world.ask(1, "/held?hold", "order/1").spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    for listener in ["twin", "friend"] {
        let refused = ask(listener, 2, "/refused", "order/1;wait=0").send().await.unwrap();
        assert_eq!(refused.status, 423, "{listener}");
        assert_eq!(refused.json()["lock"], "order/1");
    }
    let apart = ask("stranger", 3, "/apart", "order/1;wait=0").send().await.unwrap();
    assert_eq!(apart.status, 200, "{}", apart.text());
    assert!(apart.joined("lock-status").starts_with("stranger;outcome=acquired"), "{}", apart.joined("lock-status"));
    let waiting = ["twin", "friend"].map(|listener| ask(listener, 4, "/next", "order/1").spawn());
    world.envoy.wait_metric("interlock_waiting", &[("instance", "test")], |n| n == 2.0, DEADLINE).await;
    assert_eq!(world.count("interlock_waiting", &[("instance", "stranger")]).await, 0.0);
    world.envoy.wait_metric("interlock_held", &[("instance", "stranger")], |n| n == 0.0, DEADLINE).await;
    world.upstream.open("/held");
    assert_served([held].into_iter().chain(waiting)).await;
    // Two instances are swept, and count together.
    world.sweeps(4).await;
    world.assert_empty().await;
}
