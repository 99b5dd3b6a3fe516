//! A worker's VM traps, and a new one takes its place: nothing is granted twice, what the dead VM held is free after its
//! TTL and not before, and nobody waits behind its waiters. Needs the build with fault injection.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use interlock_testkit::client::Pending;
use interlock_testkit::{Client, DEADLINE, wait_for, wait_for_async};
use serde_json::json;

use crate::common::reloads;
use crate::world::{PROMPT, World, log_lines};

/// Long enough to tell an early end from one in time, on a machine that is busy.
const TTL: Duration = Duration::from_secs(6);
const LEASED: &str = "order/1;ttl=6";

/// How long before its death a VM may have renewed its leases last: it does so four times a second, if it gets its turn.
const LAST_BEAT: Duration = Duration::from_secs(2);

async fn start() -> World {
    World::with(|config| config.with_faults()).await
}

/// Makes the VM trap that serves this client's connection; gives back when that was at the earliest and at the latest.
async fn crash(world: &World, client: &Client) -> (Instant, Instant) {
    let before = Instant::now();
    let answer = client.get(world.url("/fault")).header("x-interlock-fault", "panic").send().await.unwrap();
    assert_eq!(answer.status, 503, "{}", answer.text());
    (before, Instant::now())
}

/// Waits until requests of this client get locks again.
async fn until_reloaded(world: &World, client: &Client) {
    wait_for_async("a new VM", DEADLINE, async || {
        let answer = world.ask_by(client, 99, "/again", "order/again;wait=10").send().await.unwrap();
        assert!([200, 503].contains(&answer.status), "{}", answer.text());
        answer.status == 200
    })
    .await;
}

async fn granted(waiter: Pending) {
    let answer = waiter.answer().await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[tokio::test]
async fn locks_of_a_dead_vm_are_free_after_their_ttl_and_not_before() {
    let world = start().await;
    let (doomed, other) = (world.client_on(0).await, world.client_on(1).await);
    let third = world.client_on(0).await;
    let held = world.ask_by(&doomed, 1, "/held?hold", LEASED).spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    let waiter = world.ask_by(&other, 2, "/next", LEASED).spawn();
    world.until_waiting(1).await;
    let (earliest, latest) = crash(&world, &doomed).await;
    // One that comes to the new VM stands behind the one that waited already.
    until_reloaded(&world, &third).await;
    let late = world.ask_by(&third, 3, "/late", LEASED).spawn();
    granted(waiter).await;
    granted(late).await;
    let next = &world.upstream.requests_to("/next")[0];
    let late = &world.upstream.requests_to("/late")[0];
    let lived = next.arrived.saturating_duration_since(earliest);
    assert!(lived + LAST_BEAT >= TTL, "the lease of a dead VM ended early, after {lived:?}");
    let over = next.arrived.saturating_duration_since(latest + TTL);
    assert!(over < PROMPT, "the lease of a dead VM ended {over:?} after its TTL");
    assert!(next.arrived <= late.arrived, "strict order, over the death of a VM");
    // Its own client is told that something broke, or it leaves: the lock manager can't do either for it.
    world.upstream.open("/held");
    held.leave().await;
    world.upstream.wait_idle().await;
    world.assert_empty().await;
    assert_eq!(world.count("interlock_lease_expired_total", &[("class", "order")]).await, 1.0);
    let lines = log_lines(&world.envoy, "lease-expired");
    assert_eq!(lines.len(), 1, "{lines:?}");
    let line = &lines[0];
    assert_eq!(line["lock"], "order/1", "{line}");
    assert_eq!(line["owner"], json!(format!("{:032x}", 1)), "{line}");
    assert_eq!((&line["mode"], &line["reason"]), (&json!("exclusive"), &json!("expired")), "{line}");
}

#[tokio::test]
async fn nobody_waits_behind_waiters_of_a_dead_vm() {
    let world = start().await;
    let (doomed, other) = (world.client_on(0).await, world.client_on(1).await);
    let holder = world.ask_by(&other, 1, "/held?hold", "order/1;ttl=60").spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    let dead = [2, 3].map(|owner| world.ask_by(&doomed, owner, "/dead", "order/1;ttl=60").spawn());
    world.until_waiting(2).await;
    let waiters = [4, 5].map(|owner| world.ask_by(&other, owner, "/next", "order/1;ttl=60").spawn());
    world.until_waiting(4).await;
    crash(&world, &doomed).await;
    // The places of the dead are given up, long before their waits are over.
    world.until_waiting(2).await;
    let freed = Instant::now();
    world.upstream.open("/held");
    granted(holder).await;
    for waiter in waiters {
        granted(waiter).await;
    }
    let took = world.upstream.requests_to("/next")[0].arrived.saturating_duration_since(freed);
    assert!(took < PROMPT, "the next one got the lock after {took:?}");
    until_reloaded(&world, &doomed).await;
    for dead in dead {
        dead.leave().await;
    }
    assert!(world.upstream.requests_to("/dead").is_empty());
    world.upstream.wait_idle().await;
    world.upstream.checker().assert_clean();
    world.assert_empty().await;
}

/// A grant to a waiter whose VM has just died is like any grant to a VM that dies: it ends after its TTL.
#[tokio::test]
async fn a_grant_to_a_dead_waiter_ends_too() {
    let world = start().await;
    let (doomed, other) = (world.client_on(0).await, world.client_on(1).await);
    let holder = world.ask_by(&other, 1, "/held?hold", "order/1;ttl=60").spawn();
    world.upstream.wait_for_requests("/held", 1).await;
    let dead = world.ask_by(&doomed, 2, "/dead", "order/1;ttl=1").spawn();
    world.until_waiting(1).await;
    let waiter = world.ask_by(&other, 3, "/next", "order/1;ttl=60").spawn();
    world.until_waiting(2).await;
    crash(&world, &doomed).await;
    world.upstream.open("/held");
    granted(holder).await;
    let freed = Instant::now();
    granted(waiter).await;
    let took = world.upstream.requests_to("/next")[0].arrived.saturating_duration_since(freed);
    assert!(took < Duration::from_secs(1) + PROMPT, "the next one got the lock after {took:?}");
    dead.leave().await;
    assert!(world.upstream.requests_to("/dead").is_empty());
    world.upstream.wait_idle().await;
    world.upstream.checker().assert_clean();
    world.assert_empty().await;
}

#[tokio::test]
async fn a_vm_that_held_and_awaited_much_leaves_nothing_behind() {
    let world = start().await;
    let (doomed, other) = (world.client_on(0).await, world.client_on(1).await);
    let mut dead = Vec::new();
    for n in 0..30_u128 {
        let two = format!("order/{n};ttl=2, order/shared;mode=shared;ttl=2");
        dead.push(world.ask_by(&doomed, 100 + n, "/held?hold", &two).spawn());
    }
    world.upstream.wait_for_requests("/held", 30).await;
    for n in 0..30_u128 {
        // Holds one and waits for another.
        let two = format!("order/0{n};ttl=3, order/{n};ttl=3");
        dead.push(world.ask_by(&doomed, 200 + n, "/dead", &two).spawn());
    }
    world.until_waiting(30).await;
    let mut waiters = vec![world.ask_by(&other, 1, "/next", "order/shared").spawn()];
    waiters.extend((0..30_u128).map(|n| world.ask_by(&other, 300 + n, "/next", &format!("order/{n}")).spawn()));
    world.until_waiting(61).await;
    crash(&world, &doomed).await;
    for waiter in waiters {
        granted(waiter).await;
    }
    until_reloaded(&world, &doomed).await;
    world.upstream.open("/held");
    for request in dead {
        request.leave().await;
    }
    assert!(world.upstream.requests_to("/dead").is_empty());
    world.upstream.wait_idle().await;
    world.assert_empty().await;
}

#[tokio::test]
async fn a_surviving_vm_keeps_house_when_all_workers_have_died() {
    let world = start().await;
    let clients = [world.client_on(0).await, world.client_on(1).await];
    let mut held = Vec::new();
    for (client, n) in clients.iter().zip(1..) {
        held.push(world.ask_by(client, n, "/held?hold", &format!("order/{n};ttl=2")).spawn());
    }
    world.upstream.wait_for_requests("/held", 2).await;
    world.until_held(2).await;
    for client in &clients {
        crash(&world, client).await;
    }
    // No worker has a VM now, so only one that serves nobody can find and count that the leases have ended.
    world.until_held(0).await;
    assert_eq!(world.count("interlock_lease_expired_total", &[]).await, 2.0);
    world.upstream.open("/held");
    for held in held {
        held.leave().await;
    }
    for client in &clients {
        until_reloaded(&world, client).await;
    }
    world.upstream.wait_idle().await;
    world.assert_empty().await;
    assert!(!reloads(&world.envoy).await.is_empty(), "Envoy counts what it reloads");
}

#[tokio::test]
async fn vms_that_die_under_load_never_cause_a_second_grant() {
    let world = start().await;
    let clients = [world.client_on(0).await, world.client_on(1).await, Client::http1_fresh()];
    let stop = Arc::new(AtomicBool::new(false));
    let mut load = tokio::task::JoinSet::new();
    for n in 0..12 {
        load.spawn(contend(clients[n % 3].clone(), world.url("/work?delay=3"), n, Arc::clone(&stop)));
    }
    for round in 0..8 {
        let before = world.upstream.count();
        wait_for("traffic", DEADLINE, || world.upstream.count() >= before + 20).await;
        // In the midst of others' death throes it may be answered by no VM at all: that is a 503 as well.
        crash(&world, &clients[round % 2]).await;
    }
    let before = world.upstream.count();
    wait_for("traffic after the last death", DEADLINE, || world.upstream.count() >= before + 20).await;
    stop.store(true, Ordering::Relaxed);
    let mut served = 0;
    while let Some(done) = load.join_next().await {
        served += done.unwrap();
    }
    assert!(served > 100, "only {served} requests were served");
    world.upstream.wait_idle().await;
    world.upstream.checker().assert_clean();
    world.assert_empty().await;
    assert!(!reloads(&world.envoy).await.is_empty(), "no VM died");
}

/// One request after the other for one of three locks, until it is told to stop; gives back how many were served. What a
/// dead VM had parked is never answered: its client leaves in the end.
async fn contend(client: Client, url: String, n: usize, stop: Arc<AtomicBool>) -> usize {
    let mut served = 0;
    let mut turn = 0;
    while !stop.load(Ordering::Relaxed) {
        turn += 1;
        let lock = format!("order/{};wait=3;ttl=1", (n + turn) % 3);
        let owner = u128::try_from(n * 1_000_000 + turn + 1000).unwrap();
        let request = client.get(&url).trace(owner).header("lock", &lock).timeout(Duration::from_secs(5));
        if let Ok(answer) = request.send().await {
            assert!([200, 409, 423, 503].contains(&answer.status), "{}: {}", answer.status, answer.text());
            served += usize::from(answer.status == 200);
        }
    }
    served
}
