//! Every refusal that a local backend can give, over HTTP and gRPC: what the caller is told, and that the upstream never
//! hears of it.

use std::time::Duration;

use interlock_testkit::client::Ask;
use interlock_testkit::{Client, Ended, EnvoyConfig, Route};
use serde_json::json;

use crate::common::{Plan, Stage, owner, run, waited_ms};
use crate::problem::Refusal;

static STAGE: Stage = Stage::new(|| {
    let ranked = json!([{ "name": "account", "rank": 10 }, { "name": "order", "rank": 20 }]);
    let by_header = json!([{
        "name": "by-header",
        "match": { "path": "/filled/{id}" },
        "locks": [{ "name": "order/{header:x-order}" }],
    }]);
    let vault = json!([{ "name": "vault", "principals": ["spiffe://mesh/ns/pay/*"] }]);
    let go_on = json!([{
        "name": "go-on",
        "match": { "path": "/continue" },
        "locks": [{ "name": "order/continue", "ttl": "300ms", "hold": "300ms" }],
        "on_lease_lost": "continue",
    }]);
    vec![
        ("malformed", Plan::new(json!({ "rules": by_header })).patch(malformed_route)),
        ("no-owner", Plan::new(json!({ "owner": { "from": ["lock-owner", "traceparent"] } }))),
        ("forbidden-header", Plan::new(json!({ "annotations": { "header": "reject" } }))),
        ("forbidden-class", Plan::new(json!({ "classes": vault }))),
        ("deadlock", Plan::new(json!({ "classes": [{ "name": "order" }] }))),
        ("order", Plan::new(json!({ "classes": ranked }))),
        ("lost", Plan::new(json!({ "classes": [{ "name": "lost" }] }))),
        ("continue", Plan::new(json!({ "rules": go_on }))),
        ("held", Plan::new(json!({}))),
        ("timeout", Plan::new(json!({ "defaults": { "wait": "200ms" } }))),
        ("waiters", Plan::new(json!({ "limits": { "waiters_per_lock": 1 } }))),
        ("table", Plan::new(json!({ "limits": { "locks": 2, "waiters": 1 } }))),
        ("locks", Plan::new(json!({ "limits": { "locks_per_request": 2, "locks_per_owner": 3 } }))),
        (
            "no-park",
            Plan::new(json!({}))
                .patch(|config| config.patch_plugin(|plugin| plugin["allow_on_headers_stop_iteration"] = json!(true))),
        ),
    ]
});

fn malformed_route(config: EnvoyConfig) -> EnvoyConfig {
    config.route(Route::path("/bad-route").metadata(json!({ "locks": "order/1;mode=both" })))
}

#[test]
fn malformed_annotations() {
    run(async {
        let lane = STAGE.lane("malformed").await;
        let malformed = Refusal {
            http: 400,
            grpc: 3,
            slug: "malformed-annotation",
            lock: None,
            mode: None,
            owner: None,
            retry: false,
        };
        for (header, says) in [
            ("order//1", "member 1: a lock name cannot have an empty segment (byte 6)"),
            ("order/1, order/2;mode=both", "member 2: mode \"both\" is not a mode"),
            ("order/1;wait=soon", "member 1: wait is not a number of seconds"),
            ("order/1;ttl=-1", "member 1: ttl cannot be negative"),
            ("order/1;mode=intent-shared", "mode intent-shared needs a class with a hierarchy"),
            ("order/1,", "member 1"),
            ("\"order/100%\"", "% at byte 9 needs two hexadecimal digits behind it"),
        ] {
            let refused = malformed.meets(&lane, "malformed", 1, "/refused", |ask| ask.header("lock", header)).await;
            assert!(refused.detail().contains(says), "{header}: {}", refused.detail());
        }
        let refused = malformed.meets(&lane, "malformed", 1, "/bad-route", |ask| ask).await;
        assert!(refused.detail().contains("route metadata: member 1: mode \"both\""), "{}", refused.detail());
        let refused = malformed.meets(&lane, "malformed", 1, "/filled/1", |ask| ask).await;
        assert!(refused.detail().contains("rule by-header: lock order/{header:x-order}"), "{}", refused.detail());
        lane.quiet().await;
    });
}

#[test]
fn an_annotation_without_an_owner_is_malformed() {
    run(async {
        let lane = STAGE.lane("no-owner").await;
        let ask = |client: Client| client.get(lane.url("/refused")).header("lock", "order/1");
        for ask in [ask(Client::http1_fresh()), ask(Client::http1_fresh()).header("traceparent", "00-not-a-trace")] {
            let answer = ask.send().await.unwrap();
            assert_eq!(answer.status, 400);
            assert_eq!(answer.json()["type"], "urn:interlock:problem:malformed-annotation");
            assert_eq!(answer.json()["title"], "The request names no lock owner");
            let says = "the request has no usable lock-owner or traceparent";
            assert!(answer.json()["detail"].as_str().unwrap().ends_with(says), "{}", answer.text());
        }
        assert!(lane.upstream().requests_to("/refused").is_empty());
        // What asks for nothing needs no owner.
        let answer = Client::http1_fresh().get(lane.url("/plain")).send().await.unwrap();
        assert_eq!(answer.status, 200);
        lane.quiet().await;
    });
}

#[test]
fn a_gateway_that_takes_no_annotation_forbids_it() {
    run(async {
        let lane = STAGE.lane("forbidden-header").await;
        let forbidden =
            Refusal { http: 403, grpc: 7, slug: "forbidden", lock: None, mode: None, owner: None, retry: false };
        for header in ["order/1", "not a lock;;", ""] {
            forbidden.meets(&lane, "forbidden-header", 1, "/refused", |ask| ask.header("lock", header)).await;
        }
        assert_eq!(lane.ask(1, "/plain").send().await.unwrap().status, 200);
        lane.quiet().await;
    });
}

#[test]
fn a_class_with_principals_is_closed_to_callers_without_a_spiffe_id() {
    run(async {
        let lane = STAGE.lane("forbidden-class").await;
        let forbidden = Refusal {
            http: 403,
            grpc: 7,
            slug: "forbidden",
            lock: Some("vault/1"),
            mode: None,
            owner: Some(1),
            retry: false,
        };
        let ask = |ask: Ask| ask.header("lock", "order/1, vault/1;wait=0");
        let refused = forbidden.meets(&lane, "forbidden-class", 1, "/refused", ask).await;
        assert_eq!(refused.detail(), "a caller without a SPIFFE ID may not lock class vault");
        assert_eq!(lane.ask(1, "/open").header("lock", "order/1").send().await.unwrap().status, 200);
        lane.quiet().await;
    });
}

#[test]
fn a_wait_that_would_close_a_cycle_is_refused_at_once() {
    run(async {
        let lane = STAGE.lane("deadlock").await;
        let one = lane.hold(1, "/one", "order/1").await;
        let two = lane.hold(2, "/two", "order/2").await;
        let waiter = lane.ask(1, "/one-then-two").header("lock", "order/2;wait=20").spawn();
        lane.wait_waiting(1).await;
        let deadlock = Refusal {
            http: 409,
            grpc: 10,
            slug: "deadlock",
            lock: Some("order/1"),
            mode: Some("exclusive"),
            owner: Some(2),
            retry: false,
        };
        let ask = |ask: Ask| ask.header("lock", "order/1;wait=20");
        let refused = deadlock.meets(&lane, "deadlock", 2, "/refused", ask).await;
        assert!(refused.http.took < Duration::from_secs(10), "it was refused only after {:?}", refused.http.took);
        let cycle = json!([
            { "owner": owner(2), "waits_for": "order/1", "held_by": owner(1) },
            { "owner": owner(1), "waits_for": "order/2", "held_by": owner(2) },
        ]);
        assert_eq!(refused.problem["cycle"], cycle);
        for who in [owner(1), owner(2)] {
            assert!(refused.detail().contains(&who), "{}", refused.detail());
        }
        // Who does not wait closes no cycle.
        let held = Refusal { http: 423, slug: "lock-held", retry: true, ..deadlock };
        held.meets(&lane, "deadlock", 2, "/refused", |ask| ask.header("lock", "order/1;wait=0")).await;

        // The refused one stands in nobody's way.
        assert!(!waiter.is_answered());
        assert_eq!(two.release().await.status, 200);
        assert_eq!(waiter.answer().await.unwrap().status, 200);
        assert_eq!(one.release().await.status, 200);
        let counted = lane.envoy().metric("interlock_deadlock_total", &[("class", "order")]).await.unwrap();
        assert_eq!(counted, 2.0);
        lane.quiet().await;
    });
}

#[test]
fn locks_out_of_their_order_are_refused_even_when_free() {
    run(async {
        let lane = STAGE.lane("order").await;
        let violation = |lock| Refusal {
            http: 409,
            grpc: 10,
            slug: "order-violation",
            lock: Some(lock),
            mode: Some("exclusive"),
            owner: Some(1),
            retry: false,
        };
        // A higher rank before a lower one.
        let held = lane.hold(1, "/order", "order/5").await;
        let ask = |ask: Ask| ask.header("lock", "account/9");
        let refused = violation("account/9").meets(&lane, "order", 1, "/refused", ask).await;
        let says = format!("{} asks for account/9 and already holds order/5", owner(1));
        assert!(refused.detail().starts_with(&says), "{}", refused.detail());
        // A higher name of one class before a lower one; and the first lock of a request that breaks the order is named.
        let ask = |ask: Ask| ask.header("lock", "order/6, order/4");
        violation("order/4").meets(&lane, "order", 1, "/refused", ask).await;
        // Higher ones, the same again, and locks without a rank are in order.
        let fine = lane.ask(1, "/fine").header("lock", "order/6, order/5, anything/1").send().await.unwrap();
        assert_eq!(fine.status, 200, "{}", fine.text());
        // Nobody else is bound by it.
        let other = lane.ask(2, "/other").header("lock", "account/9").send().await.unwrap();
        assert_eq!(other.status, 200, "{}", other.text());
        assert_eq!(held.release().await.status, 200);
        for class in ["account", "order"] {
            let counted = lane.envoy().metric("interlock_order_violation_total", &[("class", class)]).await.unwrap();
            assert_eq!(counted, 2.0, "{class}");
        }
        lane.quiet().await;
    });
}

#[test]
fn a_lease_that_ends_upstream_ends_the_request() {
    run(async {
        let lane = STAGE.lane("lost").await;
        let lost = Refusal {
            http: 409,
            grpc: 10,
            slug: "lease-lost",
            lock: Some("lost/1"),
            mode: Some("exclusive"),
            owner: Some(1),
            retry: false,
        };
        // The hold limit is over before a heartbeat that comes late could cost the lease.
        let annotation = "lost/1;ttl=0.3;hold=0.3";
        let http = lane.hold(1, "/lost", annotation).await;
        // Whoever waits gets the lock when the lease ends, and not before it.
        let next = lane.ask(2, "/next").header("lock", "lost/1;wait=15").spawn();
        let problem = lost.check_http("lost", &http.answer().await);
        let says = problem["detail"].as_str().unwrap();
        assert!(says.contains("(hold)") && says.contains("lost/1"), "{says}");
        let next = next.answer().await.unwrap();
        assert_eq!(next.status, 200);
        lane.upstream().wait_idle().await;
        assert_eq!(lane.upstream().requests_to("/lost")[0].ended.unwrap().0, Ended::Abandoned);

        let grpc = lane.grpc(1, "/lost-grpc?hold").header("lock", annotation);
        let grpc = lane.keep("/lost-grpc", grpc).await.answer().await;
        assert_eq!(lost.check_grpc("lost", &grpc), says);
        let labels = [("class", "lost"), ("reason", "hold-limit")];
        assert_eq!(lane.envoy().metric("interlock_lease_lost_total", &labels).await.unwrap(), 2.0);
        lane.quiet().await;
    });
}

#[test]
fn a_rule_may_let_a_request_go_on_without_its_lease() {
    run(async {
        let lane = STAGE.lane("continue").await;
        let holder = lane.keep("/continue", lane.ask(3, "/continue?hold")).await;
        // Granted only once the lease has ended.
        let next = lane.ask(4, "/follower").header("lock", "order/continue;wait=15").send().await.unwrap();
        assert_eq!(next.status, 200);
        let answer = holder.release().await;
        assert_eq!(answer.status, 200);
        let status = "continue;outcome=lost;reason=lease-lost;lock=\"order/continue\"";
        assert_eq!(answer.joined("lock-status"), status);
        assert_eq!(answer.header("lock-fence"), None);
        // Both were upstream at once, which is what the rule says. Its fence tells the resource who came first.
        assert_eq!(lane.upstream().checker().violations().len(), 1);
        lane.empty().await;
    });
}

#[test]
fn a_taken_lock_refuses_who_does_not_wait() {
    run(async {
        let lane = STAGE.lane("held").await;
        let holder = lane.hold(1, "/holder", "order/1;mode=shared;ttl=30").await;
        let held = Refusal {
            http: 423,
            grpc: 10,
            slug: "lock-held",
            lock: Some("order/1"),
            mode: Some("exclusive"),
            owner: Some(2),
            retry: true,
        };
        let ask = |ask: Ask| ask.header("lock", "free/1, order/1;wait=0");
        let refused = held.meets(&lane, "held", 2, "/refused", ask).await;
        let holders = refused.problem["holders"].as_array().unwrap();
        assert_eq!(holders.len(), 1, "{holders:?}");
        assert_eq!(holders[0]["owner"], owner(1));
        assert_eq!(holders[0]["mode"], "shared");
        assert_eq!(holders[0]["asked_by"], "lock header");
        assert!(holders[0]["held_for_ms"].is_u64());
        assert!(refused.detail().contains(&owner(1)), "{}", refused.detail());
        // What the refused request would have got is free.
        let other = lane.ask(3, "/other").header("lock", "free/1;wait=0").send().await.unwrap();
        assert_eq!(other.status, 200, "{}", other.text());
        assert_eq!(holder.release().await.status, 200);
        lane.quiet().await;
    });
}

#[test]
fn a_wait_that_runs_out_is_refused() {
    run(async {
        let lane = STAGE.lane("timeout").await;
        let holder = lane.hold(1, "/holder", "order/1").await;
        let timeout = Refusal {
            http: 423,
            grpc: 10,
            slug: "wait-timeout",
            lock: Some("order/1"),
            mode: Some("shared"),
            owner: Some(2),
            retry: true,
        };
        let ask = |ask: Ask| ask.header("lock", "order/1;mode=shared");
        let refused = timeout.meets(&lane, "timeout", 2, "/refused", ask).await;
        let waited = waited_ms(&refused.http);
        assert!(waited >= 200.0, "{waited}");
        assert!(refused.http.took.as_secs_f64() * 1000.0 >= waited, "{:?} for {waited}", refused.http.took);
        assert_eq!(refused.problem["holders"][0]["owner"], owner(1));
        assert_eq!(holder.release().await.status, 200);
        lane.quiet().await;
    });
}

#[test]
fn a_full_queue_takes_no_more() {
    run(async {
        let lane = STAGE.lane("waiters").await;
        let holder = lane.hold(1, "/holder", "order/1").await;
        let waiter = lane.ask(2, "/waiter").header("lock", "order/1;wait=20").spawn();
        lane.wait_waiting(1).await;
        let full = Refusal {
            http: 429,
            grpc: 8,
            slug: "too-many-waiters",
            lock: Some("order/1"),
            mode: Some("exclusive"),
            owner: Some(3),
            retry: true,
        };
        let ask = |ask: Ask| ask.header("lock", "order/1;wait=20");
        let refused = full.meets(&lane, "waiters", 3, "/refused", ask).await;
        assert!(refused.detail().contains("at most 1 waiter (waiters_per_lock)"), "{}", refused.detail());
        assert_eq!(holder.release().await.status, 200);
        assert_eq!(waiter.answer().await.unwrap().status, 200);
        lane.quiet().await;
    });
}

#[test]
fn a_request_and_an_owner_have_only_so_many_locks() {
    run(async {
        let lane = STAGE.lane("locks").await;
        let too_many = |lock, retry| Refusal {
            http: 429,
            grpc: 8,
            slug: "too-many-locks",
            lock: Some(lock),
            mode: Some("exclusive"),
            owner: Some(1),
            retry,
        };
        // Asking again helps nobody here.
        let ask = |ask: Ask| ask.header("lock", "a/3, a/1, a/2");
        let refused = too_many("a/1", false).meets(&lane, "locks", 1, "/refused", ask).await;
        assert!(refused.detail().contains("at most 2 locks (locks_per_request)"), "{}", refused.detail());
        // Here it does: once the owner has given some back.
        let two = lane.hold(1, "/two", "a/1, a/2").await;
        let one = lane.hold(1, "/one", "a/3").await;
        let refused = too_many("a/4", true).meets(&lane, "locks", 1, "/refused", |ask| ask.header("lock", "a/4")).await;
        assert!(refused.detail().contains("at most 3 locks (locks_per_owner)"), "{}", refused.detail());
        assert_eq!(one.release().await.status, 200);
        assert_eq!(lane.ask(1, "/four").header("lock", "a/4").send().await.unwrap().status, 200);
        assert_eq!(two.release().await.status, 200);
        lane.quiet().await;
    });
}

#[test]
fn the_table_has_only_so_much_room() {
    run(async {
        let lane = STAGE.lane("table").await;
        // Each worker knows of its own to the last one; of the others it knows as of their last heartbeat.
        let client = lane.client_on(0).await;
        let ask = |by: u128, path: &str, locks: &str| client.get(lane.url(path)).trace(by).header("lock", locks);
        let one = lane.keep("/one", ask(1, "/one?hold", "a/1")).await;
        let two = lane.keep("/two", ask(2, "/two?hold", "a/2")).await;
        let full = Refusal {
            http: 429,
            grpc: 8,
            slug: "too-many-locks",
            lock: Some("a/3"),
            mode: Some("exclusive"),
            owner: Some(3),
            retry: true,
        };
        let refused = ask(3, "/refused", "a/3").send().await.unwrap();
        let problem = full.check_http("table", &refused);
        assert!(problem["detail"].as_str().unwrap().contains("at most 2 locks (locks)"), "{problem}");
        assert_eq!(two.release().await.status, 200);

        let waiter = ask(2, "/waiter", "a/1;wait=20").spawn();
        lane.wait_waiting(1).await;
        let full = Refusal { slug: "too-many-waiters", lock: Some("a/1"), ..full };
        let refused = ask(3, "/refused", "a/1;wait=20").send().await.unwrap();
        let problem = full.check_http("table", &refused);
        assert!(problem["detail"].as_str().unwrap().contains("at most 1 waiter (waiters)"), "{problem}");
        assert!(lane.upstream().requests_to("/refused").is_empty());
        assert_eq!(one.release().await.status, 200);
        assert_eq!(waiter.answer().await.unwrap().status, 200);
        lane.quiet().await;
    });
}

#[test]
fn a_body_that_comes_while_parked_is_not_let_through_without_the_lock() {
    run(async {
        let lane = STAGE.lane("no-park").await;
        let holder = lane.hold(1, "/holder", "order/1").await;
        let unavailable = Refusal {
            http: 503,
            grpc: 14,
            slug: "backend-unavailable",
            lock: Some("order/1"),
            mode: Some("exclusive"),
            owner: Some(2),
            retry: true,
        };
        let ask = |ask: Ask| ask.header("lock", "order/1;wait=20");
        let post = Client::http1_fresh().post(lane.url("/refused")).trace(2).body("body");
        let problem = unavailable.check_http("no-park", &ask(post).send().await.unwrap());
        let grpc = ask(lane.grpc(2, "/refused")).send().await.unwrap();
        assert_eq!(unavailable.check_grpc("no-park", &grpc), problem["detail"].as_str().unwrap());
        assert!(problem["detail"].as_str().unwrap().contains("allow_on_headers_stop_iteration"), "{problem}");
        assert!(lane.upstream().requests_to("/refused").is_empty());
        assert_eq!(holder.release().await.status, 200);
        lane.quiet().await;
    });
}
