//! Requests that get their locks: at once, after a wait and in which order, together; and what they and their upstreams
//! are told.

use std::time::Duration;

use interlock_testkit::client::traceparent;
use interlock_testkit::{Client, EnvoyConfig, RawClient};
use serde_json::json;

use crate::common::{DEADLINE, Lane, Plan, Stage, fences, locks, owner, run, waited, waited_ms};

static STAGE: Stage = Stage::new(|| {
    // So long that nothing ends by itself while a test looks.
    let patient = json!({ "wait": "20s", "ttl": "30s" });
    let lane = |classes| Plan::new(json!({ "defaults": patient, "classes": classes }));
    let plain = || lane(json!([{ "name": "order" }]));
    vec![
        ("headers", plain()),
        ("wait", plain()),
        ("fifo", plain()),
        ("together", plain()),
        ("upgrade", plain()),
        ("many", plain()),
        ("stock", lane(json!([{ "name": "stock", "hierarchy": true }]))),
        ("pool", lane(json!([{ "name": "pool", "permits": 2 }]))),
        ("deadline", Plan::new(json!({})).patch(internal)),
        ("max-wait", Plan::new(json!({ "limits": { "max_wait": "300ms" } }))),
        ("body", plain()),
    ]
});

/// Envoy removes `x-envoy-expected-rq-timeout-ms` from callers that are not declared to be its own.
fn internal(config: EnvoyConfig) -> EnvoyConfig {
    config.patch_hcm(|hcm| {
        let loopback = json!({ "address_prefix": "127.0.0.0", "prefix_len": 8 });
        hcm["use_remote_address"] = json!(true);
        hcm["internal_address_config"] = json!({ "cidr_ranges": [loopback] });
    })
}

#[test]
fn a_free_lock_is_granted_at_once() {
    run(async {
        let lane = STAGE.lane("headers").await;
        let ask = lane.ask(1, "/first").header("lock", "order/2;mode=shared;x=1, order/1");
        let forged = ask.header("lock-status", "other;outcome=acquired").header("lock-fence", "a;fence=9;mode=shared");
        let answer = forged.send().await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert_eq!(answer.text(), "done\n");
        let wait = waited(&answer.joined("lock-status"), "headers;outcome=acquired");
        // Both are of one moment; one in seconds, cut to the millisecond.
        assert_eq!(wait, (waited_ms(&answer)).floor() / 1000.0);

        // What the upstream sees is what the filter says, and nothing that anyone else says.
        let seen = &lane.upstream().requests_to("/first")[0];
        assert_eq!(seen.header("lock"), None);
        assert_eq!(seen.header("lock-status"), None);
        assert_eq!(seen.headers.get_all("lock-fence").iter().count(), 1);
        assert_eq!(locks(seen.header("lock-fence")), ["order/1 exclusive", "order/2 shared"]);
        assert_eq!(seen.header("lock-fence"), answer.header("lock-fence"));

        // A lock that comes back has a higher fence.
        let first = fences(answer.header("lock-fence"));
        let again = lane.ask(2, "/again").header("lock", "order/1, order/2").send().await.unwrap();
        let second = fences(again.header("lock-fence"));
        assert!(first.iter().zip(&second).all(|(old, new)| old.0 == new.0 && old.1 < new.1), "{first:?} {second:?}");

        // Nothing is said of who asks for nothing, and what only the filter may say is removed all the same.
        let plain = lane.ask(3, "/plain").header("lock-fence", "order/1;fence=1;mode=shared").send().await.unwrap();
        assert_eq!(plain.status, 200);
        for name in ["lock-status", "lock-fence", "server-timing"] {
            assert_eq!(plain.header(name), None, "{name}");
        }
        assert_eq!(lane.upstream().requests_to("/plain")[0].header("lock-fence"), None);

        // Members of earlier hops stay, and stand first.
        let nested = lane.nested("order/1", "/inner", "order/3").trace(4).send().await.unwrap();
        let status = nested.joined("lock-status");
        let (inner, outer) = status.split_once(", ").unwrap();
        waited(inner, "headers;outcome=acquired");
        waited(outer, "headers;outcome=acquired");
        assert_eq!(locks(nested.header("lock-fence")), ["order/1 exclusive"]);
        lane.quiet().await;
    });
}

#[test]
fn a_taken_lock_is_waited_for() {
    run(async {
        let lane = STAGE.lane("wait").await;
        let holder = lane.hold(1, "/holder", "order/1").await;
        let waiter = lane.ask(2, "/waiter").header("lock", "order/1").spawn();
        lane.wait_waiting(1).await;
        lane.wait_held(1).await;
        assert!(lane.upstream().requests_to("/waiter").is_empty());
        let first = fences(holder.seen.header("lock-fence"));
        assert_eq!(holder.release().await.status, 200);
        let answer = waiter.answer().await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
        let wait = waited(&answer.joined("lock-status"), "wait;outcome=acquired");
        assert!(wait > 0.0 && wait <= answer.took.as_secs_f64(), "{wait} of {:?}", answer.took);
        assert_eq!(wait, waited_ms(&answer).floor() / 1000.0);
        assert!(first[0].1 < fences(answer.header("lock-fence"))[0].1);
        lane.quiet().await;
    });
}

#[test]
fn waiters_are_served_in_their_order_across_workers() {
    run(async {
        let lane = STAGE.lane("fifo").await;
        let workers = [lane.client_on(0).await, lane.client_on(1).await];
        let ask = |worker: usize, number: u32| {
            let path = format!("/fifo-{number}?hold");
            workers[worker].get(lane.url(&path)).trace(number.into()).header("lock", "order/1").spawn()
        };
        // Every neighbourhood there is: the same worker twice, and each before the other.
        let order = [0, 1, 1, 0, 0, 1];
        let mut all = vec![ask(order[0], 1)];
        lane.upstream().wait_for_requests("/fifo-1", 1).await;
        for (number, worker) in (2_u32..).zip(&order[1..]) {
            all.push(ask(*worker, number));
            lane.wait_waiting(number - 1).await;
        }
        let mut last = 0;
        for (number, pending) in (1_u32..).zip(all) {
            let path = format!("/fifo-{number}");
            let seen = lane.upstream().wait_for_requests(&path, 1).await;
            assert_eq!(lane.upstream().live(), 1, "one at a time");
            let fence = fences(seen[0].header("lock-fence"))[0].1;
            assert!(fence > last, "{fence} after {last}");
            last = fence;
            lane.upstream().open(&path);
            assert_eq!(pending.answer().await.unwrap().status, 200);
        }
        lane.quiet().await;
    });
}

#[test]
fn neighbours_that_share_are_let_in_together() {
    run(async {
        let lane = STAGE.lane("together").await;
        let holder = lane.hold(1, "/holder", "order/1").await;
        let mut waiters = Vec::new();
        for (count, (path, mode)) in
            (1..).zip([("/a", "shared"), ("/b", "shared"), ("/x", "exclusive"), ("/c", "shared")])
        {
            let ask = lane.ask(u128::from(count) + 1, &format!("{path}?hold"));
            waiters.push(ask.header("lock", format!("order/1;mode={mode}")).spawn());
            lane.wait_waiting(count).await;
        }
        assert_eq!(holder.release().await.status, 200);
        for path in ["/a", "/b"] {
            lane.upstream().wait_for_requests(path, 1).await;
        }
        // Nobody goes past an earlier waiter, though the last one would get along with those inside.
        lane.wait_waiting(2).await;
        assert_eq!(lane.upstream().live(), 2);
        lane.upstream().open("/a");
        lane.upstream().open("/b");
        lane.upstream().wait_for_requests("/x", 1).await;
        lane.wait_waiting(1).await;
        assert_eq!(lane.upstream().live(), 1);
        lane.upstream().open("/x");
        lane.upstream().wait_for_requests("/c", 1).await;
        lane.upstream().open("/c");
        for waiter in waiters {
            assert_eq!(waiter.answer().await.unwrap().status, 200);
        }
        lane.quiet().await;
    });
}

#[test]
fn a_stronger_lease_is_an_upgrade() {
    run(async {
        let lane = STAGE.lane("upgrade").await;
        let reader = lane.hold(1, "/reader", "order/1;mode=shared").await;
        // The sole holder upgrades at once; then it falls back to what it had, and others read beside it again.
        let upgrade = lane.hold(1, "/upgrade", "order/1;wait=0").await;
        let shut_out = lane.ask(2, "/out").header("lock", "order/1;mode=shared;wait=0").send().await.unwrap();
        assert_eq!(shut_out.status, 423);
        assert_eq!(upgrade.release().await.status, 200);
        let beside = lane.hold(2, "/beside", "order/1;mode=shared;wait=0").await;
        // With another reader about it waits, but goes ahead of who came before it.
        let plain = lane.ask(3, "/plain?hold").header("lock", "order/1").spawn();
        lane.wait_waiting(1).await;
        let second = lane.ask(1, "/second?hold").header("lock", "order/1").spawn();
        lane.wait_waiting(2).await;
        assert_eq!(beside.release().await.status, 200);
        lane.upstream().wait_for_requests("/second", 1).await;
        assert!(lane.upstream().requests_to("/plain").is_empty());
        lane.upstream().open("/second");
        assert_eq!(second.answer().await.unwrap().status, 200);
        assert!(lane.upstream().requests_to("/plain").is_empty());
        assert_eq!(reader.release().await.status, 200);
        lane.upstream().wait_for_requests("/plain", 1).await;
        lane.upstream().open("/plain");
        assert_eq!(plain.answer().await.unwrap().status, 200);
        lane.quiet().await;
    });
}

#[test]
fn locks_of_one_request_may_be_written_in_any_order() {
    run(async {
        let lane = STAGE.lane("many").await;
        // Taken as written, these would block each other sooner or later.
        let orders = ["order/1, order/2, a/1", "order/2, order/1, a/1", "a/1, order/2, order/1"];
        let clients = [Client::http1(), Client::http2(), Client::http1()];
        let mut all = Vec::new();
        for round in 0..20 {
            for (index, locks) in orders.iter().enumerate() {
                let number = round * 3 + u128::try_from(index).unwrap() + 1;
                all.push(clients[index].get(lane.url("/many")).trace(number).header("lock", *locks).spawn());
            }
        }
        for pending in all {
            let answer = pending.answer().await.unwrap();
            assert_eq!(answer.status, 200, "{}", answer.text());
            let names: Vec<_> = fences(answer.header("lock-fence")).into_iter().map(|(name, ..)| name).collect();
            assert_eq!(names, ["a/1", "order/1", "order/2"]);
        }
        assert_eq!(lane.upstream().checker().sections(), 60);
        lane.quiet().await;
    });
}

/// Asks without waiting; the lock in the way, if one is.
async fn in_the_way(lane: &Lane, number: u128, lock: &str) -> Option<String> {
    let answer = lane.ask(number, "/probe").header("lock", format!("{lock};wait=0")).send().await.unwrap();
    match answer.status {
        200 => None,
        423 => Some(answer.json()["lock"].as_str().unwrap().to_owned()),
        status => panic!("{status}: {}", answer.text()),
    }
}

#[test]
fn a_hierarchy_is_locked_from_above() {
    run(async {
        let lane = STAGE.lane("stock").await;
        let holder = lane.hold(1, "/holder", "stock/a/b").await;
        // The intents above are the filter's own business.
        assert_eq!(locks(holder.seen.header("lock-fence")), ["stock/a/b exclusive"]);
        for (lock, by) in [
            ("stock/a/c", None),
            ("stock/b", None),
            ("stock;mode=intent-shared", None),
            ("stock/a;mode=intent-exclusive", None),
            ("stock/a/b", Some("stock/a/b")),
            ("stock/a/b/c;mode=shared", Some("stock/a/b")),
            ("stock/a;mode=shared", Some("stock/a")),
            ("stock/a", Some("stock/a")),
            ("stock;mode=shared-intent-exclusive", Some("stock")),
        ] {
            assert_eq!(in_the_way(&lane, 2, lock).await.as_deref(), by, "{lock}");
        }
        assert_eq!(holder.release().await.status, 200);
        let whole = lane.hold(1, "/whole", "stock;mode=shared").await;
        assert_eq!(in_the_way(&lane, 2, "stock/a/b;mode=shared").await, None);
        assert_eq!(in_the_way(&lane, 2, "stock/a/b").await.as_deref(), Some("stock"));
        // Its own owner is not in its own way.
        assert_eq!(in_the_way(&lane, 1, "stock/a/b").await, None);
        assert_eq!(whole.release().await.status, 200);
        lane.quiet().await;
    });
}

#[test]
fn a_class_with_permits_lets_so_many_in() {
    run(async {
        let lane = STAGE.lane("pool").await;
        let first = lane.hold(1, "/first", "pool/1").await;
        // Re-entry takes a permit of its own.
        let again = lane.hold(1, "/again", "pool/1").await;
        for number in [1, 2] {
            assert_eq!(in_the_way(&lane, number, "pool/1").await.as_deref(), Some("pool/1"));
        }
        assert_eq!(in_the_way(&lane, 2, "pool/2").await, None);
        let waiter = lane.ask(3, "/waiter?hold").header("lock", "pool/1").spawn();
        lane.wait_waiting(1).await;
        assert_eq!(again.release().await.status, 200);
        lane.upstream().wait_for_requests("/waiter", 1).await;
        assert_eq!(lane.upstream().live(), 2);
        assert_eq!(first.release().await.status, 200);
        lane.upstream().open("/waiter");
        assert_eq!(waiter.answer().await.unwrap().status, 200);
        lane.empty().await;
    });
}

#[test]
fn nobody_waits_longer_than_its_caller_does() {
    run(async {
        let lane = STAGE.lane("deadline").await;
        let holder = lane.hold(1, "/holder", "order/1").await;
        let http = lane.ask(2, "/refused").header("x-envoy-expected-rq-timeout-ms", "300");
        let answer = http.header("lock", "order/1;wait=20").send().await.unwrap();
        assert_eq!(answer.status, 423, "{}", answer.text());
        assert_eq!(answer.json()["type"], "urn:interlock:problem:wait-timeout");
        assert!(waited_ms(&answer) >= 300.0 && answer.took < Duration::from_secs(10), "{:?}", answer.took);
        for (name, value) in [("grpc-timeout", "300m"), ("x-envoy-expected-rq-timeout-ms", "300")] {
            let grpc = lane.grpc(2, "/refused").header(name, value).header("lock", "order/1;wait=20");
            let answer = grpc.send().await.unwrap();
            assert_eq!(answer.grpc_status(), Some(10));
            assert!(waited_ms(&answer) >= 300.0 && answer.took < Duration::from_secs(10), "{:?}", answer.took);
        }
        // The shorter of the two, and of its own wait.
        let both =
            lane.grpc(2, "/refused").header("grpc-timeout", "20S").header("x-envoy-expected-rq-timeout-ms", "200");
        let answer = both.header("lock", "order/1;wait=20").send().await.unwrap();
        assert!(waited_ms(&answer) >= 200.0 && answer.took < Duration::from_secs(10), "{:?}", answer.took);
        let own = lane.grpc(2, "/refused").header("grpc-timeout", "20S").header("lock", "order/1;wait=0.2");
        let answer = own.send().await.unwrap();
        assert!(waited_ms(&answer) >= 200.0 && answer.took < Duration::from_secs(10), "{:?}", answer.took);
        assert!(lane.upstream().requests_to("/refused").is_empty());
        assert_eq!(holder.release().await.status, 200);
        lane.quiet().await;
    });
}

#[test]
fn nobody_waits_longer_than_the_policy_allows() {
    run(async {
        let lane = STAGE.lane("max-wait").await;
        let holder = lane.hold(1, "/holder", "order/1").await;
        let answer = lane.ask(2, "/refused").header("lock", "order/1;wait=20").send().await.unwrap();
        assert_eq!(answer.status, 423, "{}", answer.text());
        assert!(waited_ms(&answer) >= 300.0 && answer.took < Duration::from_secs(10), "{:?}", answer.took);
        assert_eq!(holder.release().await.status, 200);
        lane.quiet().await;
    });
}

#[test]
fn a_parked_request_arrives_whole() {
    run(async {
        let lane = STAGE.lane("body").await;
        let holder = lane.hold(1, "/holder", "order/1").await;
        // Larger than any buffer on the way.
        let body: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[n as usize % 3]).collect();
        let post = |client: Client, number: u128, path: &str| {
            client.post(lane.url(path)).trace(number).header("lock", "order/1").body(body.clone()).spawn()
        };
        let h1 = post(Client::http1_fresh(), 2, "/h1");
        let h2 = post(Client::http2(), 3, "/h2");
        let grpc = lane.grpc(4, "/grpc?grpc=0").header("lock", "order/1").spawn();
        let mut expecting = lane.raw().await;
        expect_continue(&mut expecting, 5, "/expecting", "order/1").await;
        lane.wait_waiting(4).await;
        assert_eq!(lane.upstream().live(), 1);
        assert_eq!(holder.release().await.status, 200);
        for pending in [h1, h2] {
            assert_eq!(pending.answer().await.unwrap().status, 200);
        }
        let called = grpc.answer().await.unwrap();
        assert_eq!(called.grpc_status(), Some(0));
        assert_eq!(locks(called.header("lock-fence")), ["order/1 exclusive"]);
        assert_eq!(expecting.response_within(DEADLINE).await.unwrap().status, 200);
        for (path, expected) in [("/h1", &body[..]), ("/h2", &body), ("/grpc", &[0; 5]), ("/expecting", b"whole")] {
            let seen = lane.upstream().requests_to(path);
            assert_eq!(seen.len(), 1, "{path}");
            assert!(seen[0].body == expected, "{path}: {} bytes", seen[0].body.len());
            assert_eq!(locks(seen[0].header("lock-fence")), ["order/1 exclusive"]);
        }
        lane.quiet().await;
    });
}

/// Sends a request that asks to be told before it sends its body, and the body once it has been told.
async fn expect_continue(raw: &mut RawClient, number: u128, path: &str, lock: &str) {
    let trace = traceparent(number);
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: test\r\ntraceparent: {trace}\r\nlock: {lock}\r\nexpect: 100-continue\r\n\
         content-length: 5\r\n\r\n"
    );
    raw.send(head.as_bytes()).await.unwrap();
    raw.send(b"whole").await.unwrap();
    assert_eq!(owner(number), trace.split('-').nth(1).unwrap());
}
