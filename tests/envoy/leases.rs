//! How long a lease lives: renewed for as long as the upstream works, never past its hold limit, and what becomes of a
//! request that loses it.

use std::time::{Duration, Instant};

use interlock_testkit::client::{Ask, traceparent};
use interlock_testkit::{Client, DEADLINE, Ended, RawClient, wait_for};
use serde_json::{Value, json};

use crate::world::{PROMPT, World, log_lines, policy};

/// A lock that must be renewed again and again, for a request that takes longer.
const SHORT: &str = "order/1;ttl=2";

/// A lock that ends although it is renewed.
const LIMITED: &str = "order/1;ttl=2;hold=3";
const HOLD: Duration = Duration::from_secs(3);

fn lost() -> [(&'static str, &'static str); 2] {
    [("class", "order"), ("reason", "hold-limit")]
}

#[tokio::test]
async fn an_upstream_slower_than_the_ttl_keeps_the_lock() {
    let world = World::start().await;
    let holders = [SHORT, "order/2;ttl=2.5, order/3;ttl=2;mode=shared"]
        .into_iter()
        .zip(1..)
        .map(|(lock, owner)| world.ask(owner, "/slow?hold", lock).spawn())
        .collect::<Vec<_>>();
    world.upstream.wait_for_requests("/slow", 2).await;
    let waiters = ["order/1", "order/2", "order/3"].map(|lock| world.ask(9, "/next", lock).spawn());
    world.until_waiting(3).await;
    // Housekeeping looks at every lease about once a second: each lives several TTLs.
    world.sweeps(5).await;
    assert!(world.upstream.requests_to("/next").is_empty(), "a lease ended early");
    let refused = world.ask(8, "/refused", "order/1;wait=0").send().await.unwrap();
    assert_eq!(refused.status, 423);
    world.upstream.open("/slow");
    for request in holders.into_iter().chain(waiters) {
        let answer = request.answer().await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    world.assert_clean().await;
    for name in ["interlock_lease_expired_total", "interlock_lease_lost_total"] {
        assert_eq!(world.count(name, &[]).await, 0.0, "{name}");
    }
}

/// A response that takes long to stream is a request that still holds its lock.
#[tokio::test]
async fn an_answer_that_streams_for_longer_than_the_ttl_keeps_the_lock() {
    let world = World::start().await;
    let holder = world.ask(1, "/streams?stall=6000&body=1000", SHORT).spawn();
    world.upstream.wait_for_requests("/streams", 1).await;
    let waiter = world.ask(2, "/next", SHORT).spawn();
    for request in [holder, waiter] {
        assert_eq!(request.answer().await.unwrap().status, 200);
    }
    let (_, ended) = world.upstream.requests_to("/streams")[0].ended.unwrap();
    assert!(world.upstream.requests_to("/next")[0].arrived >= ended, "the lock was free before the response had ended");
    world.assert_clean().await;
    assert_eq!(world.count("interlock_lease_lost_total", &[]).await, 0.0);
}

/// Two waiters, one a connection, behind a holder that reaches its hold limit: checks when they get the lock.
async fn next_at_the_hold_limit(world: &World, holder: Ask, path: &str, check: impl AsyncFnOnce(Ask)) {
    let asked = Instant::now();
    let arrival = async {
        let waiters = [11, 12].map(|owner| world.ask(owner, "/next", SHORT).spawn());
        for waiter in waiters {
            assert_eq!(waiter.answer().await.unwrap().status, 200);
        }
    };
    let follow = async {
        world.upstream.wait_for_requests(path, 1).await;
        arrival.await;
    };
    tokio::join!(check(holder), follow);
    let held = &world.upstream.requests_to(path)[0];
    let next = &world.upstream.requests_to("/next")[0];
    let waited = next.arrived.duration_since(asked);
    assert!(waited >= HOLD, "the lease ended early, after {waited:?}");
    let late = next.arrived.duration_since(held.arrived).saturating_sub(HOLD);
    assert!(late < PROMPT, "the next one got the lock {late:?} after the hold limit");
    assert!(fence(next) > fence(held), "fences rise");
}

fn fence(request: &interlock_testkit::Recorded) -> u64 {
    let header = request.header("lock-fence").unwrap();
    let digits = header.split("fence=").nth(1).and_then(|rest| rest.split(';').next());
    digits.unwrap().parse().unwrap()
}

async fn assert_one_lost(world: &World) {
    assert_eq!(world.count("interlock_lease_lost_total", &lost()).await, 1.0);
    assert_eq!(world.count("interlock_lease_lost_total", &[]).await, 1.0);
    let lines = log_lines(&world.envoy, "lease-lost");
    assert_eq!(lines.len(), 1, "{lines:?}");
    let line = &lines[0];
    let expected = json!({
        "event": "lease-lost", "instance": "test", "owner": format!("{:032x}", 1), "lock": "order/1",
        "reason": "hold-limit",
    });
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&line[field], value, "{field} in {line}");
    }
}

#[tokio::test]
async fn a_request_past_its_hold_limit_is_answered_lease_lost() {
    let world = World::start().await;
    let holder = world.ask(1, "/stuck?hold", LIMITED);
    next_at_the_hold_limit(&world, holder, "/stuck", async |holder| {
        let answer = holder.send().await.unwrap();
        assert_eq!(answer.status, 409);
        assert_eq!(answer.header("content-type").as_deref(), Some("application/problem+json"));
        let problem = answer.json();
        let expected = json!({
            "type": "urn:interlock:problem:lease-lost", "status": 409, "lock": "order/1", "mode": "exclusive",
            "owner": format!("{:032x}", 1),
        });
        for (field, value) in expected.as_object().unwrap() {
            assert_eq!(&problem[field], value, "{field} in {problem}");
        }
        assert!(problem["title"].is_string() && problem["detail"].is_string(), "{problem}");
        assert_eq!(answer.joined("lock-status"), "test;outcome=refused;reason=lease-lost;lock=\"order/1\"");
        assert_eq!(answer.header("lock-fence"), None);
        assert_eq!(answer.header("retry-after"), None);
    })
    .await;
    let stuck = || world.upstream.requests_to("/stuck")[0].ended.map(|(how, _)| how);
    wait_for("the upstream to be told", DEADLINE, || stuck() == Some(Ended::Abandoned)).await;
    world.assert_clean().await;
    assert_one_lost(&world).await;
}

#[tokio::test]
async fn a_grpc_request_past_its_hold_limit_is_aborted() {
    let world = World::start().await;
    let call = Client::http2().grpc(world.url("/pkg.Service/Stuck?hold")).trace(1).header("lock", LIMITED);
    next_at_the_hold_limit(&world, call, "/pkg.Service/Stuck", async |call| {
        let answer = call.send().await.unwrap();
        assert_eq!((answer.status, answer.grpc_status()), (200, Some(10)));
        assert_eq!(answer.joined("lock-status"), "test;outcome=refused;reason=lease-lost;lock=\"order/1\"");
    })
    .await;
    world.assert_clean().await;
    assert_one_lost(&world).await;
}

#[tokio::test]
async fn a_response_that_has_started_is_reset_at_the_hold_limit() {
    for http2 in [false, true] {
        let world = World::start().await;
        let client = if http2 { Client::http2() } else { Client::http1_fresh() };
        let holder = world.ask_by(&client, 1, "/stuck?stall=60000&body=1000", LIMITED);
        next_at_the_hold_limit(&world, holder, "/stuck", async |holder| {
            let error = holder.send().await.unwrap_err();
            // Not the patience of the client.
            assert!(!format!("{error:#}").contains("no answer in"), "{error:#}");
        })
        .await;
        let stuck = || world.upstream.requests_to("/stuck")[0].ended.map(|(how, _)| how);
        wait_for("the upstream to be told", DEADLINE, || stuck() == Some(Ended::Abandoned)).await;
        world.assert_clean().await;
        assert_one_lost(&world).await;
    }
}

#[tokio::test]
async fn what_was_said_of_a_started_response_stands() {
    let world = World::start().await;
    let mut raw = RawClient::connect(world.envoy.address()).await.unwrap();
    let trace = traceparent(1);
    raw.request("GET", "/stuck?stall=60000", &[("traceparent", trace.as_bytes()), ("lock", LIMITED.as_bytes())])
        .await
        .unwrap();
    let all = String::from_utf8(raw.read_to_end().await.unwrap()).unwrap();
    let (head, body) = all.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{all}");
    assert!(head.contains("\r\nlock-status: test;outcome=acquired;wait="), "{all}");
    assert!(!all.contains("problem"), "{all}");
    assert!(!body.ends_with("0\r\n\r\n"), "it must not look complete: {all}");
    world.assert_clean().await;
    assert_one_lost(&world).await;
}

/// A policy whose rule lets a request go on that loses its lease.
fn lax() -> Value {
    let mut policy = policy();
    policy["rules"] = json!([{
        "name": "lax",
        "match": { "path": "/lax" },
        "locks": [{ "name": "order/1", "ttl": "2s", "hold": "3s" }],
        "on_lease_lost": "continue",
    }]);
    policy
}

#[tokio::test]
async fn a_rule_may_let_a_request_go_on_past_its_hold_limit() {
    let world = World::with(|config| config.policy(lax())).await;
    let holder = Client::http1_fresh().get(world.url("/lax?hold")).trace(1);
    next_at_the_hold_limit(&world, holder, "/lax", async |holder| {
        let holder = holder.spawn();
        world.upstream.wait_for_requests("/next", 2).await;
        assert!(!holder.is_answered());
        world.upstream.open("/lax");
        let answer = holder.answer().await.unwrap();
        assert_eq!((answer.status, answer.text().as_str()), (200, "done\n"));
        assert_eq!(answer.joined("lock-status"), "test;outcome=lost;reason=lease-lost;lock=\"order/1\"");
        assert_eq!(answer.header("lock-fence"), None, "it holds nothing any more");
    })
    .await;
    // The upstream was shared with others, as the rule accepts.
    world.assert_empty().await;
    assert_one_lost(&world).await;
    assert_eq!(log_lines(&world.envoy, "lease-lost")[0]["route"], "all");
}

#[tokio::test]
async fn a_rule_may_let_a_started_response_go_on_past_its_hold_limit() {
    let world = World::with(|config| config.policy(lax())).await;
    let holder = Client::http1_fresh().get(world.url("/lax?stall=5000&body=1000")).trace(1);
    next_at_the_hold_limit(&world, holder, "/lax", async |holder| {
        let answer = holder.send().await.unwrap();
        assert_eq!((answer.status, answer.body.len()), (200, 1000));
        let status = answer.joined("lock-status");
        assert!(status.starts_with("test;outcome=acquired;wait="), "its head was sent before: {status}");
    })
    .await;
    world.assert_empty().await;
    assert_one_lost(&world).await;
}

#[tokio::test]
async fn the_first_of_several_locks_to_reach_its_limit_takes_the_others_along() {
    let world = World::start().await;
    let holder = world.ask(1, "/stuck?hold", "order/0, order/1;hold=3;ttl=2, order/2;mode=shared");
    let others = ["order/0", "order/2"].map(|lock| async {
        world.upstream.wait_for_requests("/stuck", 1).await;
        let answer = world.ask(5, "/other", lock).send().await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
    });
    let [zero, two] = others;
    next_at_the_hold_limit(&world, holder, "/stuck", async |holder| {
        let (answer, (), ()) = tokio::join!(holder.send(), zero, two);
        let answer = answer.unwrap();
        assert_eq!((answer.status, answer.json()["lock"].as_str()), (409, Some("order/1")));
    })
    .await;
    world.assert_clean().await;
    assert_one_lost(&world).await;
}

/// Leases of 100 ms on workers that have much to do. A machine may be so busy that a worker gets no turn for 100 ms: then
/// the lease is lost, and must be found to be. But that cannot be so every time.
#[tokio::test]
async fn the_shortest_lease_is_renewed_on_busy_workers() {
    let world = World::start().await;
    let (mut kept, mut rounds) = (0, 0);
    while kept == 0 && rounds < 5 {
        rounds += 1;
        let path = format!("/slow{rounds}");
        let holders = (0..4).map(|n| world.ask(n + 1, &format!("{path}?hold"), &format!("order/{n};ttl=0.1")).spawn());
        let holders = holders.collect::<Vec<_>>();
        wait_for("holders", DEADLINE, || world.upstream.requests_to(&path).len() == 4).await;
        let waiters = (0..4).map(|n| world.ask(n + 11, "/next", &format!("order/{n};ttl=5")).spawn());
        let waiters = waiters.collect::<Vec<_>>();
        tokio::join!(busy(&world, 100), busy(&world, 101), busy(&world, 102), busy(&world, 103));
        world.upstream.open(&path);
        for holder in holders {
            let answer = holder.answer().await.unwrap();
            match answer.status {
                200 => kept += 1,
                _ => assert_eq!(answer.json()["type"], "urn:interlock:problem:lease-lost", "{}", answer.text()),
            }
        }
        for waiter in waiters {
            assert_eq!(waiter.answer().await.unwrap().status, 200);
        }
    }
    assert!(kept > 0, "no lease of 100 ms lived for two seconds, {rounds} times in a row");
    world.assert_clean().await;
}

/// Requests one after the other for two seconds.
async fn busy(world: &World, owner: u128) {
    let client = Client::http1();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        let lock = format!("order/busy{};ttl=0.1", owner % 2);
        let answer = world.ask_by(&client, owner, "/busy", &lock).send().await.unwrap();
        assert!([200, 409].contains(&answer.status), "{}", answer.text());
    }
}

/// A process that was stopped for longer than the TTL: no worker could renew, and each finds out only after others may have
/// found its leases ended. Whatever became of the leases: nobody hangs, and no two hold a lock.
#[tokio::test]
async fn a_process_that_was_stopped_finds_out_what_it_lost() {
    let world = World::start().await;
    let clients = [world.client_on(0).await, world.client_on(1).await];
    for round in 0..5 {
        let (path, ttl) = (format!("/slow{round}"), Duration::from_millis(200));
        let holders = [0, 1].map(|n| {
            let lock = format!("order/{n};ttl=0.2");
            world.ask_by(&clients[n], 1 + n as u128, &format!("{path}?hold"), &lock).spawn()
        });
        world.upstream.wait_for_requests(&path, 2).await;
        signal(&world, "STOP");
        let stopped = Instant::now();
        // Each worker finds, all at once: a request for the other's lock, and one that has nothing to do with it.
        let wanting =
            [0, 1].map(|n| world.ask_by(&clients[1 - n], 11 + n as u128, "/next", &format!("order/{n}")).spawn());
        let apart = [0, 1].map(|n| world.ask_by(&clients[n], 21 + n as u128, "/apart", &format!("order/9{n}")).spawn());
        wait_for("several TTLs to pass", DEADLINE, || stopped.elapsed() > 5 * ttl).await;
        signal(&world, "CONT");
        for apart in apart {
            assert_eq!(apart.answer().await.unwrap().status, 200, "a request that waits for nobody");
        }
        world.upstream.open(&path);
        for holder in holders {
            let answer = holder.answer().await.unwrap();
            let lost = || answer.json()["type"] == "urn:interlock:problem:lease-lost";
            assert!(answer.status == 200 || lost(), "{}", answer.text());
        }
        for wanting in wanting {
            assert_eq!(wanting.answer().await.unwrap().status, 200);
        }
    }
    world.assert_clean().await;
}

fn signal(world: &World, name: &str) {
    let pid = world.envoy.pid().to_string();
    let sent = std::process::Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap();
    assert!(sent.success());
}
