//! Sidecars whose locks are an authority's, in real Envoys: granted, waited for and given back over all of them; what happens
//! when callers leave, and when the authority does.

mod lies;
pub mod mesh;

use std::time::Duration;

use interlock_testkit::{Client, DEADLINE, Direction, wait_for_async};
use serde_json::json;

use crate::common::{fences, owner};
use crate::sidecar::{fence, status};
use mesh::{Mesh, policy};

/// The counter of connections of a sidecar to the authority.
const CONNECTIONS: &str = "cluster.interlock-authority.upstream_cx_total";

#[tokio::test]
async fn a_lock_holds_over_all_sidecars() {
    let mesh = Mesh::pair().await;
    let [one, two] = &mesh.sidecars[..] else { panic!() };
    let holder = one.ask(1, "/one?hold", "order/1, order/2;mode=shared").spawn();
    let seen = one.upstream.wait_for_requests("/one", 1).await.remove(0);
    let upstream = fences(seen.header("lock-fence"));
    assert_eq!(upstream.iter().map(|(name, ..)| name.as_str()).collect::<Vec<_>>(), ["order/1", "order/2"]);
    let waiter = two.ask(2, "/two", "order/1").spawn();
    let shares = two.ask(3, "/three", "order/2;mode=shared").send().await.unwrap();
    assert_eq!(shares.status, 200, "{}", shares.text());
    mesh.until_waiting("order/1", 1).await;
    let lock = mesh.get("locks/order/1").await.json();
    assert_eq!(lock["holders"][0]["owner"], json!(owner(1)));
    assert_eq!(
        (&lock["holders"][0]["asked_by"], &lock["waiters"][0]["asked_by"]),
        (&json!("lock header"), &json!("lock header"))
    );
    one.until("interlock_held", 2).await;
    two.until("interlock_waiting", 1).await;
    one.upstream.open("/one");
    let (first, second) = (holder.answer().await.unwrap(), waiter.answer().await.unwrap());
    assert_eq!((first.status, second.status), (200, 200), "{}", second.text());
    assert!(fence(&first) < fence(&second));
    assert!(status(&first).starts_with("orders;outcome=acquired;wait="), "{}", status(&first));
    assert!(status(&second).starts_with("orders;outcome=acquired;wait="), "{}", status(&second));
    for (sidecar, granted) in [(one, 2.0), (two, 2.0)] {
        assert_eq!(sidecar.count("interlock_acquire_total", &[("outcome", "acquired")]).await, granted);
        assert_eq!(sidecar.count("interlock_backend_error_total", &[]).await, 0.0);
    }
    mesh.assert_clean().await;
}

#[tokio::test]
async fn a_cycle_over_two_sidecars_is_refused_and_told() {
    let mesh = Mesh::pair().await;
    let [one, two] = &mesh.sidecars[..] else { panic!() };
    let first = one.ask(1, "/one?hold", "order/1").spawn();
    let second = two.ask(2, "/two?hold", "order/2").spawn();
    one.upstream.wait_for_requests("/one", 1).await;
    two.upstream.wait_for_requests("/two", 1).await;
    // Each transaction goes on at the other's service.
    let waits = two.ask(1, "/waits", "order/2").spawn();
    mesh.until_waiting("order/2", 1).await;
    let refused = one.ask(2, "/closes", "order/1").send().await.unwrap();
    assert_eq!(refused.status, 409, "{}", refused.text());
    let edge =
        |waiter: u128, lock: &str, by: u128| json!({ "owner": owner(waiter), "waits_for": lock, "held_by": owner(by) });
    assert_eq!(refused.json()["cycle"], json!([edge(2, "order/1", 1), edge(1, "order/2", 2)]));
    assert_eq!(status(&refused), "orders;outcome=refused;reason=deadlock;lock=\"order/1\"");
    let told = mesh.get("deadlocks").await.json();
    assert_eq!(told["deadlocks"][0]["cycle"], refused.json()["cycle"]);
    let grpc = Client::http2().grpc(one.url("/closes")).trace(2).header("lock", "order/1").send().await.unwrap();
    assert_eq!(grpc.grpc_status(), Some(10), "{:?}", grpc.grpc_message());
    assert!(grpc.grpc_message().unwrap().starts_with("waiting for order/1 would close a cycle: "));
    assert_eq!(one.count("interlock_deadlock_total", &[]).await, 2.0);
    two.upstream.open("/two");
    assert_eq!(waits.answer().await.unwrap().status, 200);
    one.upstream.open("/one");
    assert_eq!((first.answer().await.unwrap().status, second.answer().await.unwrap().status), (200, 200));
    assert!(one.upstream.requests_to("/closes").is_empty());
    mesh.assert_clean().await;
}

#[tokio::test]
async fn who_leaves_while_parked_waits_no_more_and_who_waits_too_long_is_told_by_whom() {
    let mesh = Mesh::pair().await;
    let [one, two] = &mesh.sidecars[..] else { panic!() };
    let holder = one.ask(1, "/one?hold", "order/1").spawn();
    one.upstream.wait_for_requests("/one", 1).await;
    let leaver = two.ask(2, "/two", "order/1").spawn();
    mesh.until_waiting("order/1", 1).await;
    leaver.leave().await;
    mesh.until_waiting("order/1", 0).await;
    let slow = two.ask(3, "/two", "order/1;wait=0.2").send().await.unwrap();
    assert_eq!(slow.status, 423, "{}", slow.text());
    assert_eq!(slow.json()["holders"][0]["owner"], json!(owner(1)));
    assert!(slow.header("retry-after").is_some());
    let held = two.ask(3, "/two", "order/1;wait=0").send().await.unwrap();
    assert_eq!((held.status, &held.json()["type"]), (423, &json!("urn:interlock:problem:lock-held")));
    // Leaving while upstream gives the lock back.
    holder.leave().await;
    let next = two.ask(4, "/four", "order/1").send().await.unwrap();
    assert_eq!(next.status, 200, "{}", next.text());
    assert!(two.upstream.requests_to("/two").is_empty());
    one.upstream.open("/one");
    mesh.assert_clean().await;
}

#[tokio::test]
async fn the_first_request_does_not_pay_for_the_connection() {
    let mesh = Mesh::start(&[policy()]).await;
    let sidecar = &mesh.sidecars[0];
    // One for each worker, and one for the main thread, whose VM serves no requests.
    sidecar.envoy.wait_stat(CONNECTIONS, |count| count == 3, DEADLINE).await;
    for n in 1..=20 {
        let answer = sidecar.ask(n, "/", "order/1").send().await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!(sidecar.envoy.stat(CONNECTIONS).await.unwrap(), 3);
    mesh.assert_clean().await;
}

#[tokio::test]
async fn a_killed_authority_loses_no_lease_and_grants_again() {
    let mut allowing = policy();
    allowing["on_backend_unavailable"] = json!("allow");
    let mut mesh = Mesh::with_grace("10s", &[policy(), allowing]).await;
    let held = {
        let one = &mesh.sidecars[0];
        let held = one.ask(1, "/one?hold", "order/1;ttl=10").spawn();
        one.upstream.wait_for_requests("/one", 1).await;
        held
    };
    // It starts for longer than it is away: on a busy machine that takes longer than a lease lives.
    let next = mesh.new_authority().await;
    mesh.kill_authority();
    {
        let [one, two] = &mesh.sidecars[..] else { panic!() };
        let refused = one.ask(2, "/two", "order/2").send().await.unwrap();
        assert_eq!(refused.status, 503, "{}", refused.text());
        assert_eq!(refused.json()["type"], "urn:interlock:problem:backend-unavailable");
        assert!(refused.header("retry-after").is_some());
        let allowed = two.ask(3, "/three", "order/2").send().await.unwrap();
        assert_eq!(
            (allowed.status, status(&allowed).as_str()),
            (200, "orders;outcome=unlocked;reason=backend-unavailable")
        );
        assert!(one.count("interlock_backend_error_total", &[]).await > 0.0);
    }
    mesh.set_authority(next);
    mesh.until_ready().await;
    let [one, two] = &mesh.sidecars[..] else { panic!() };
    // It is held yet, by the receipt that its renewals carried.
    let lock = mesh.get("locks/order/1").await.json();
    assert_eq!(lock["holders"][0]["owner"], json!(owner(1)), "{lock}");
    let waiter = two.ask(4, "/four", "order/1").spawn();
    mesh.until_waiting("order/1", 1).await;
    one.upstream.open("/one");
    let (first, second) = (held.answer().await.unwrap(), waiter.answer().await.unwrap());
    assert_eq!((first.status, second.status), (200, 200), "{} {}", first.text(), second.text());
    assert!(status(&first).starts_with("orders;outcome=acquired"), "{}", status(&first));
    assert!(fence(&first) < fence(&second));
    assert_eq!(one.count("interlock_lease_lost_total", &[]).await, 0.0);
    assert!(one.upstream.requests_to("/two").is_empty());
    mesh.assert_clean().await;
}

/// A partition says nothing: no connection is refused or reset. The cluster's keep-alive finds out.
#[tokio::test]
async fn an_authority_that_vanished_without_a_word_is_found_out() {
    let mesh = Mesh::pair().await;
    let [one, two] = &mesh.sidecars[..] else { panic!() };
    let holder = one.ask(1, "/one?hold", "order/1;ttl=2").spawn();
    one.upstream.wait_for_requests("/one", 1).await;
    let parked = two.ask(2, "/two", "order/1;wait=30").spawn();
    mesh.until_waiting("order/1", 1).await;
    for direction in [Direction::Up, Direction::Down] {
        mesh.link.hold(direction);
    }
    let answer = parked.answer().await.unwrap();
    assert_eq!((answer.status, &answer.json()["type"]), (503, &json!("urn:interlock:problem:backend-unavailable")));
    assert!(answer.took < Duration::from_secs(25), "its wait is over after 30 s");
    // And who holds a lease that is not renewed loses it, on both sides.
    let lost = holder.answer().await.unwrap();
    assert_eq!((lost.status, &lost.json()["type"]), (409, &json!("urn:interlock:problem:lease-lost")));
    mesh.link.heal();
    let next = two.ask(3, "/three", "order/1").send().await.unwrap();
    assert_eq!(next.status, 200, "{}", next.text());
    one.upstream.open("/one");
    mesh.assert_clean().await;
}

#[tokio::test]
async fn a_lease_that_cannot_be_renewed_ends_its_request() {
    let mut mesh = Mesh::start(&[policy()]).await;
    let held = {
        let sidecar = &mesh.sidecars[0];
        let held = sidecar.ask(1, "/one?hold", "order/1;ttl=1").spawn();
        sidecar.upstream.wait_for_requests("/one", 1).await;
        held
    };
    mesh.kill_authority();
    let answer = held.answer().await.unwrap();
    assert_eq!((answer.status, &answer.json()["type"]), (409, &json!("urn:interlock:problem:lease-lost")));
    mesh.set_authority(mesh.new_authority().await);
    mesh.until_ready().await;
    let again = mesh.sidecars[0].ask(2, "/two", "order/1").send().await.unwrap();
    assert_eq!(again.status, 200, "{}", again.text());
    mesh.sidecars[0].upstream.open("/one");
    mesh.assert_clean().await;
}

#[tokio::test]
async fn audit_decides_at_the_authority_and_delays_nothing() {
    let mut audited = policy();
    audited["enforcement"] = json!("audit");
    let mesh = Mesh::start(&[audited.clone(), audited]).await;
    let [one, two] = &mesh.sidecars[..] else { panic!() };
    // The shadow table has a grace of its own, from the first call for it.
    wait_for_async("an audit that would grant", DEADLINE, async || {
        let answer = one.ask(1, "/warm", "order/9").send().await.unwrap();
        assert!(status(&answer).starts_with("orders;outcome=audit;"), "{}", status(&answer));
        one.count("interlock_audit_total", &[("outcome", "acquired")]).await >= 1.0
    })
    .await;
    let holder = one.ask(1, "/one?hold", "order/1").spawn();
    one.upstream.wait_for_requests("/one", 1).await;
    wait_for_async("the holder in the shadow table", DEADLINE, async || {
        mesh.get("audit/locks/order/1").await.json()["holders"][0]["owner"] == json!(owner(1))
    })
    .await;
    assert_eq!(mesh.get("locks/order/1").await.json()["holders"], json!([]));
    // The service does not wait for the decision; only its answer does here, so that it can tell what was decided.
    let refused = two.ask(2, "/two?hold", "order/1;wait=0").spawn();
    two.upstream.wait_for_requests("/two", 1).await;
    two.envoy.wait_metric("interlock_audit_total", &[("reason", "lock-held")], |n| n >= 1.0, DEADLINE).await;
    two.upstream.open("/two");
    let refused = refused.answer().await.unwrap();
    assert_eq!(
        (refused.status, status(&refused).as_str()),
        (200, "orders;outcome=audit;reason=lock-held;lock=\"order/1\"")
    );
    one.upstream.open("/one");
    assert_eq!(holder.answer().await.unwrap().status, 200);
    wait_for_async("an empty shadow table", DEADLINE, async || {
        mesh.get("audit/locks/order/1").await.json()["holders"] == json!([])
    })
    .await;
    assert_eq!(one.count("interlock_acquire_total", &[]).await, 0.0);
    mesh.assert_clean().await;
}

/// A sidecar that is told to end gives back what it has: over the connection that is open, before any TTL.
#[tokio::test]
async fn a_sidecar_that_ends_gives_its_leases_back() {
    let mut mesh = Mesh::pair().await;
    let ending = mesh.sidecars.remove(0);
    let held: Vec<_> = (1..=8).map(|n| ending.ask(n, "/one?hold", &format!("order/{n}")).spawn()).collect();
    ending.upstream.wait_for_requests("/one", 8).await;
    let log = ending.envoy.stop().await.unwrap();
    assert!(!log.contains("panic"), "{log}");
    drop(held);
    for n in 1..=8 {
        mesh.until_free(&format!("order/{n}")).await;
    }
    // Not one of them ended by itself.
    assert_eq!(mesh.envoy().metric("interlock_lease_expired_total", &[]).await.unwrap(), 0.0);
    mesh.assert_clean().await;
}
