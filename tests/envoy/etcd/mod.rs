//! Sidecars whose locks are in a real etcd: granted, waited for and given back over all of them; what happens when callers
//! leave, and when etcd, its members or a session do.

pub mod stand;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use interlock_testkit::{Answer, Client, DEADLINE, Etcd, wait_for_async};
use serde_json::json;
use tokio::task::JoinSet;

use crate::common::{fences, owner};
use crate::sidecar::{fence, status};
use stand::{Stand, policy};

#[tokio::test]
async fn a_lock_holds_over_all_sidecars() {
    let stand = Stand::pair().await;
    let [one, two] = &stand.sidecars[..] else { panic!() };
    let holder = one.ask(1, "/one?hold", "order/1, order/2;mode=shared").spawn();
    let seen = one.upstream.wait_for_requests("/one", 1).await.remove(0);
    let upstream = fences(seen.header("lock-fence"));
    assert_eq!(upstream.iter().map(|(name, ..)| name.as_str()).collect::<Vec<_>>(), ["order/1", "order/2"]);
    let waiter = two.ask(2, "/two", "order/1").spawn();
    let shares = two.ask(3, "/three", "order/2;mode=shared").send().await.unwrap();
    assert_eq!(shares.status, 200, "{}", shares.text());
    stand.until_standing("order/1", 2).await;
    one.until("interlock_held", 2).await;
    two.until("interlock_waiting", 1).await;
    one.upstream.open("/one");
    let (first, second) = (holder.answer().await.unwrap(), waiter.answer().await.unwrap());
    assert_eq!((first.status, second.status), (200, 200), "{}", second.text());
    assert!(fence(&first) < fence(&second));
    assert!(status(&first).starts_with("orders;outcome=acquired;wait="), "{}", status(&first));
    assert!(status(&second).starts_with("orders;outcome=acquired;wait="), "{}", status(&second));
    for sidecar in [one, two] {
        assert_eq!(sidecar.count("interlock_backend_error_total", &[]).await, 0.0);
        assert_eq!(sidecar.count("interlock_acquire_total", &[("outcome", "acquired")]).await, 2.0);
    }
    stand.assert_clean().await;
}

#[tokio::test]
async fn a_cycle_over_two_sidecars_is_refused_and_told() {
    let stand = Stand::pair().await;
    let [one, two] = &stand.sidecars[..] else { panic!() };
    let first = one.ask(1, "/one?hold", "order/1").spawn();
    let second = two.ask(2, "/two?hold", "order/2").spawn();
    one.upstream.wait_for_requests("/one", 1).await;
    two.upstream.wait_for_requests("/two", 1).await;
    // Each transaction goes on at the other's service.
    let waits = two.ask(1, "/waits", "order/2").spawn();
    stand.until_standing("order/2", 2).await;
    let refused = one.ask(2, "/closes", "order/1").send().await.unwrap();
    assert_eq!(refused.status, 409, "{}", refused.text());
    let edge =
        |waiter: u128, lock: &str, by: u128| json!({ "owner": owner(waiter), "waits_for": lock, "held_by": owner(by) });
    assert_eq!(refused.json()["cycle"], json!([edge(2, "order/1", 1), edge(1, "order/2", 2)]));
    assert_eq!(status(&refused), "orders;outcome=refused;reason=deadlock;lock=\"order/1\"");
    two.upstream.open("/two");
    assert_eq!(waits.answer().await.unwrap().status, 200);
    one.upstream.open("/one");
    assert_eq!((first.answer().await.unwrap().status, second.answer().await.unwrap().status), (200, 200));
    assert!(one.upstream.requests_to("/closes").is_empty());
    stand.assert_clean().await;
}

#[tokio::test]
async fn who_leaves_while_parked_waits_no_more_and_who_waits_too_long_is_told_by_whom() {
    let stand = Stand::pair().await;
    let [one, two] = &stand.sidecars[..] else { panic!() };
    let holder = one.ask(1, "/one?hold", "order/1").spawn();
    one.upstream.wait_for_requests("/one", 1).await;
    let leaver = two.ask(2, "/two", "order/1").spawn();
    stand.until_standing("order/1", 2).await;
    leaver.leave().await;
    stand.until_standing("order/1", 1).await;
    let slow = two.ask(3, "/two", "order/1;wait=0.2").send().await.unwrap();
    assert_eq!(slow.status, 423, "{}", slow.text());
    assert_eq!(slow.json()["type"], "urn:interlock:problem:wait-timeout");
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
    stand.assert_clean().await;
}

/// Those who stand in line get the locks of a sidecar that died, once its session has ended.
#[tokio::test]
async fn the_locks_of_a_sidecar_that_died_are_free_once_its_session_has_ended() {
    let mut stand = Stand::pair().await;
    let dying = stand.sidecars.remove(0);
    let held = dying.ask(1, "/one?hold", "order/1").spawn();
    let fence = fences(dying.upstream.wait_for_requests("/one", 1).await.remove(0).header("lock-fence"))[0].1;
    let waiter = stand.sidecars[0].ask(2, "/two", "order/1").spawn();
    stand.until_standing("order/1", 2).await;
    dying.envoy.kill().unwrap();
    assert!(held.answer().await.is_err());
    let next = waiter.answer().await.unwrap();
    assert_eq!(next.status, 200, "{}", next.text());
    assert!(self::fence(&next) > fence);
    stand.assert_clean().await;
}

/// What a sidecar that is told to end gives back does not reach etcd, since Envoy resets its calls; so its session has to end.
#[tokio::test]
async fn a_sidecar_that_ends_leaves_its_locks_for_as_long_as_its_session() {
    let mut stand = Stand::pair().await;
    let ending = stand.sidecars.remove(0);
    let held: Vec<_> = (1..=8).map(|n| ending.ask(n, "/one?hold", &format!("order/{n}")).spawn()).collect();
    ending.upstream.wait_for_requests("/one", 8).await;
    let log = ending.envoy.stop().await.unwrap();
    assert!(!log.contains("panic"), "{log}");
    drop(held);
    stand.assert_clean().await;
}

#[tokio::test]
async fn without_etcd_nothing_is_granted_and_what_was_held_is_lost() {
    let mut allowing = policy();
    allowing["on_backend_unavailable"] = json!("allow");
    let mut stand = Stand::start(&[policy(), allowing]).await;
    let (held, parked) = {
        let [one, two] = &stand.sidecars[..] else { panic!() };
        let held = one.ask(1, "/one?hold", "order/1").spawn();
        one.upstream.wait_for_requests("/one", 1).await;
        let parked = one.ask(2, "/two", "order/1;wait=15").spawn();
        stand.until_standing("order/1", 2).await;
        assert_eq!(two.ask(3, "/three", "order/3").send().await.unwrap().status, 200);
        (held, parked)
    };
    stand.etcd.kill(0);
    {
        let [one, two] = &stand.sidecars[..] else { panic!() };
        let refused = one.ask(4, "/four", "order/2").send().await.unwrap();
        assert_eq!(refused.status, 503, "{}", refused.text());
        assert_eq!(refused.json()["type"], "urn:interlock:problem:backend-unavailable");
        assert!(refused.json()["detail"].as_str().unwrap().contains("etcd"), "{}", refused.text());
        assert!(refused.header("retry-after").is_some());
        let allowed = two.ask(5, "/five", "order/2").send().await.unwrap();
        assert_eq!(
            (allowed.status, status(&allowed).as_str()),
            (200, "orders;outcome=unlocked;reason=backend-unavailable")
        );
        assert!(one.count("interlock_backend_error_total", &[]).await > 0.0);
        // Nobody can say any more that it is held.
        let lost = held.answer().await.unwrap();
        assert_eq!((lost.status, &lost.json()["type"]), (409, &json!("urn:interlock:problem:lease-lost")));
        let refused = parked.answer().await.unwrap();
        assert_eq!(
            (refused.status, &refused.json()["type"]),
            (503, &json!("urn:interlock:problem:backend-unavailable"))
        );
        one.upstream.open("/one");
    }
    stand.etcd.run(0).unwrap();
    stand.etcd.ready().await.unwrap();
    for (n, sidecar) in stand.sidecars.iter().enumerate() {
        wait_for_async("a grant", DEADLINE, async || {
            let answer = sidecar.ask(10 + u128::try_from(n).unwrap(), "/again", "order/1;wait=5").send().await.unwrap();
            answer.status == 200 && status(&answer).contains("acquired")
        })
        .await;
        assert!(sidecar.upstream.requests_to("/four").is_empty());
    }
    stand.assert_clean().await;
}

#[tokio::test]
async fn what_etcd_refuses_is_told_with_its_reason() {
    let etcd = Etcd::start().await.unwrap();
    for command in [
        "user add root:root",
        "user add locks:secret",
        "user add nobody:secret",
        "role add root",
        "role add locks",
        "user grant-role root root",
        "role grant-permission --prefix=true locks readwrite /interlock/",
        "user grant-role locks locks",
        "auth enable",
    ] {
        etcd.ctl(&command.split(' ').collect::<Vec<_>>()).unwrap();
    }
    let secret = |text: &str| json!({ "base64": base64(text) });
    let with = |name: &str, password: &str| {
        let mut policy = policy();
        policy["backend"]["etcd"]["username"] = json!(name);
        policy["backend"]["etcd"]["password"] = secret(password);
        policy
    };
    let mut lost = policy();
    lost["backend"]["etcd"]["cluster"] = json!("no-such-cluster");
    let mut badge = policy();
    badge["backend"]["etcd"]["token"] = secret("no.token");
    let members = [etcd.address()];
    for (policy, reason, words) in [
        (policy(), "auth", "etcd refuses the user name and password, or asks for them"),
        (with("locks", "wrong"), "auth", "etcd refuses the user name and password, or asks for them"),
        (with("nobody", "secret"), "permission", "the etcd user may not read and write under the prefix"),
        (badge, "token", "etcd refuses the token"),
        (lost, "unreachable", "etcd cannot be reached"),
    ] {
        let sidecar = Stand::sidecar(policy.clone(), &members).await;
        let refused = sidecar.ask(1, "/one", "order/1").send().await.unwrap();
        assert_eq!(refused.status, 503, "{policy}: {}", refused.text());
        let detail = refused.json()["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(words), "{policy}: {detail}");
        assert!(
            sidecar.count("interlock_backend_error_total", &[("reason", reason)]).await > 0.0,
            "{policy}: {reason}"
        );
        assert!(sidecar.upstream.requests_to("/one").is_empty());
    }
    let right = Stand::sidecar(with("locks", "secret"), &members).await;
    for n in 1..=3 {
        let granted = right.ask(n, "/one", "order/1").send().await.unwrap();
        assert_eq!(granted.status, 200, "{}", granted.text());
    }
}

#[tokio::test]
async fn a_full_database_is_told() {
    let etcd = Etcd::with(1, &["--quota-backend-bytes", "400000"]).await.unwrap();
    let stand = Stand::on(etcd, &[policy()]).await;
    let sidecar = &stand.sidecars[0];
    assert_eq!(sidecar.ask(1, "/one", "order/1").send().await.unwrap().status, 200);
    let filler = "x".repeat(60_000);
    while stand.etcd.ctl(&["put", "/filler", &filler]).is_ok() {}
    let refused = sidecar.ask(2, "/two", "order/2").send().await.unwrap();
    assert_eq!(refused.status, 503, "{}", refused.text());
    assert!(refused.json()["detail"].as_str().unwrap().contains("NOSPACE"), "{}", refused.text());
    assert!(sidecar.count("interlock_backend_error_total", &[("reason", "no-space")]).await > 0.0);
}

#[tokio::test]
async fn audit_decides_in_etcd_and_delays_nothing() {
    let mut audited = policy();
    audited["enforcement"] = json!("audit");
    let stand = Stand::start(&[audited.clone(), audited]).await;
    let [one, two] = &stand.sidecars[..] else { panic!() };
    let holder = one.ask(1, "/one?hold", "order/1").spawn();
    one.upstream.wait_for_requests("/one", 1).await;
    wait_for_async("the holder in the shadow table", DEADLINE, async || {
        stand.etcd.keys("/interlock/audit/q/order/1!").is_ok_and(|keys| keys.len() == 1)
    })
    .await;
    assert_eq!(stand.etcd.keys("/interlock/q/").unwrap(), Vec::<String>::new());
    // The decision may come after the response of a service that is as fast as this one.
    wait_for_async("an audit that would refuse", DEADLINE, async || {
        let answer = two.ask(2, "/two", "order/1;wait=0").send().await.unwrap();
        assert_eq!(answer.status, 200);
        status(&answer) == "orders;outcome=audit;reason=lock-held;lock=\"order/1\""
    })
    .await;
    one.upstream.open("/one");
    assert_eq!(holder.answer().await.unwrap().status, 200);
    stand.assert_clean().await;
}

/// Under load over two sidecars, with three members of which one after the other is killed and comes back. Who is refused
/// because of that asks again, as callers do.
#[tokio::test]
async fn members_that_die_under_load_cost_no_overlap_and_no_fence_falls() {
    const ASKED: usize = 40;
    let etcd = Etcd::with(3, &[]).await.unwrap();
    let mut stand = Stand::on(etcd, &[policy(), policy()]).await;
    let mut fences = BTreeMap::<String, Vec<u64>>::new();
    for round in 0..3 {
        // A sidecar that takes the one killed last for dead still, and now loses another, has one member left or none.
        for sidecar in &stand.sidecars {
            sidecar.envoy.wait_stat("cluster.etcd.membership_healthy", |healthy| healthy == 3, DEADLINE).await;
        }
        let mut running = JoinSet::new();
        for n in 0..ASKED {
            let owner = u128::try_from(round * 100 + n + 1).unwrap();
            let (url, lock) = (stand.sidecars[n % 2].url("/work"), format!("order/{};wait=15", n % 3));
            running.spawn(granted(url, owner, lock));
        }
        stand.etcd.kill(round);
        for answer in running.join_all().await {
            for (lock, fence, _) in crate::common::fences(answer.header("lock-fence")) {
                fences.entry(lock).or_default().push(fence);
            }
        }
        stand.etcd.run(round).unwrap();
        stand.etcd.ready().await.unwrap();
    }
    assert_eq!(fences.values().map(Vec::len).sum::<usize>(), 3 * ASKED);
    for fences in fences.values() {
        let all: std::collections::BTreeSet<_> = fences.iter().collect();
        assert_eq!(all.len(), fences.len(), "a fence was given twice: {fences:?}");
    }
    stand.assert_clean().await;
}

/// The answer of who asks until it is granted.
async fn granted(url: String, owner: u128, lock: String) -> Answer {
    let start = Instant::now();
    loop {
        let answer = Client::http1_fresh().get(&url).trace(owner).header("lock", &lock).send().await.unwrap();
        match answer.status {
            200 => return answer,
            // A call on its way to a member that dies is lost, without a leader none is answered, and a session may end.
            409 | 423 | 503 => assert!(start.elapsed() < 3 * DEADLINE, "nothing is granted: {}", answer.text()),
            other => panic!("{other}: {}", answer.text()),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}
