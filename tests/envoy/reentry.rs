//! Whose request it is, and which requests of one owner may take a lock again.

use interlock_testkit::Client;
use interlock_testkit::client::Ask;
use serde_json::{Value, json};

use crate::common::{Plan, Stage, fences, locks, owner, run};

static STAGE: Stage = Stage::new(|| {
    let keys = json!([{ "id": "k1", "secret": { "base64": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=" } }]);
    let classes = json!([{ "name": "order" }]);
    let policy = |reentrancy: &str| {
        json!({
            "reentrancy": reentrancy,
            "classes": classes,
            "defaults": { "wait": "20s", "ttl": "30s" },
        })
    };
    let with_keys = |reentrancy: &str| {
        let mut policy = policy(reentrancy);
        policy["keys"] = keys.clone();
        policy
    };
    let mut sources = policy("owner");
    sources["owner"] = json!({ "from": ["lock-owner", "baggage"] });
    vec![
        ("owner", Plan::new(policy("owner"))),
        ("request-id", Plan::new(policy("owner"))),
        ("none", Plan::new(policy("none"))),
        ("lease", Plan::new(with_keys("lease"))),
        ("forged", Plan::new(with_keys("lease"))),
        ("signed", Plan::new(with_keys("owner"))),
        ("sources", Plan::new(sources)),
    ]
});

/// What the nested call behind the relay was answered.
async fn inner(nested: Ask) -> Value {
    let answer = nested.send().await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
    let mut inner = answer.json();
    inner["outer"] = json!(answer.header("lock-fence"));
    if let Some(problem) = inner["body"].as_str().and_then(|body| serde_json::from_str(body).ok()) {
        inner["body"] = problem;
    }
    inner
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

#[test]
fn a_nested_call_of_the_same_trace_enters_again() {
    run(async {
        let lane = STAGE.lane("owner").await;
        let inner = inner(lane.nested("order/1", "/inner", "order/1;wait=0").trace(1)).await;
        assert_eq!(inner["status"], 200, "{inner}");
        assert_eq!(locks(text(&inner["fence"])), ["order/1 exclusive"]);
        // It is the same grant, or a later one.
        assert!(fences(text(&inner["fence"])) >= fences(text(&inner["outer"])), "{inner}");
        // The nested call gave its own lease back, and not the outer one's: that holds to the end.
        let holder = lane.hold(2, "/holder", "order/2").await;
        let again = lane.ask(2, "/again").header("lock", "order/2;wait=0").send().await.unwrap();
        assert_eq!(again.status, 200);
        let other = lane.ask(3, "/other").header("lock", "order/2;wait=0").send().await.unwrap();
        assert_eq!(other.status, 423, "{}", other.text());
        assert_eq!(holder.release().await.status, 200);
        lane.quiet().await;
    });
}

#[test]
fn a_nested_call_of_the_same_request_id_enters_again() {
    run(async {
        let lane = STAGE.lane("request-id").await;
        let nested = lane.nested("order/1", "/inner", "order/1;wait=0");
        let inner = inner(nested.header("x-request-id", "request-7")).await;
        assert_eq!(inner["status"], 200, "{inner}");
        // Without either, Envoy makes a request id; the service passed it on.
        let inner = self::inner(lane.nested("order/1", "/inner", "order/1;wait=0")).await;
        assert_eq!(inner["status"], 200, "{inner}");
        // The trace counts first.
        let ask = |trace, path: &str| lane.ask(trace, path).header("x-request-id", "request-8");
        let holder = lane.keep("/holder", ask(1, "/holder?hold").header("lock", "order/1")).await;
        let other = ask(2, "/other").header("lock", "order/1;wait=0").send().await.unwrap();
        assert_eq!(other.status, 423);
        assert_eq!(other.json()["owner"], owner(2));
        assert_eq!(holder.release().await.status, 200);
        lane.quiet().await;
    });
}

#[test]
fn without_re_entry_a_nested_call_is_a_deadlock_with_itself() {
    run(async {
        let lane = STAGE.lane("none").await;
        for mode in ["exclusive", "shared"] {
            let lock = format!("order/1;mode={mode}");
            let inner = inner(lane.nested(&lock, "/refused", &lock).trace(1)).await;
            assert_eq!(inner["status"], 409, "{inner}");
            assert_eq!(inner["body"]["type"], "urn:interlock:problem:deadlock");
            let cycle = json!([{ "owner": owner(1), "waits_for": "order/1", "held_by": owner(1) }]);
            assert_eq!(inner["body"]["cycle"], cycle);
        }
        let inner = inner(lane.nested("order/1", "/refused", "order/1;wait=0").trace(1)).await;
        assert_eq!(inner["status"], 423, "{inner}");
        assert!(lane.upstream().requests_to("/refused").is_empty());
        lane.quiet().await;
    });
}

#[test]
fn with_leases_only_who_carries_the_fence_enters_again() {
    run(async {
        let lane = STAGE.lane("lease").await;
        // The service passes the fence on: it is the holder's call.
        let inner = inner(lane.nested("order/1", "/inner", "order/1;wait=0").trace(1)).await;
        assert_eq!(inner["status"], 200, "{inner}");
        let seen = &lane.upstream().requests_to("/inner")[0];
        assert_eq!(locks(seen.header("lock-fence")), ["order/1 exclusive"]);

        // A parallel branch of the same trace does not, and waits its turn as anybody does.
        let first = lane.hold(1, "/first", "order/1").await;
        let beside = lane.ask(1, "/beside").header("lock", "order/1;wait=0").send().await.unwrap();
        assert_eq!(beside.status, 423, "{}", beside.text());
        let parallel = lane.ask(1, "/parallel").header("lock", "order/1").spawn();
        lane.wait_waiting(1).await;
        assert!(lane.upstream().requests_to("/parallel").is_empty());
        // Who enters again is not behind those who wait.
        let fence = first.seen.header("lock-fence").unwrap();
        let again = lane.ask(1, "/again").header("lock", "order/1;wait=0").header("lock-fence", &fence);
        assert_eq!(again.send().await.unwrap().status, 200);
        assert_eq!(first.release().await.status, 200);
        assert_eq!(parallel.answer().await.unwrap().status, 200);

        // A fence that is over opens nothing.
        let second = lane.hold(1, "/second", "order/1").await;
        let late = lane.ask(1, "/late").header("lock", "order/1;wait=0").header("lock-fence", &fence);
        assert_eq!(late.send().await.unwrap().status, 423);
        assert_eq!(second.release().await.status, 200);
        lane.quiet().await;
    });
}

/// The same `lock-fence` with another signature: one byte of it is another.
fn tampered(fence: &str) -> String {
    let at = fence.find("sig=:").unwrap() + 30;
    let other = if fence.as_bytes()[at] == b'A' { "B" } else { "A" };
    format!("{}{other}{}", &fence[..at], &fence[at + 1..])
}

#[test]
fn fences_that_are_not_this_owners_are_dropped() {
    run(async {
        let lane = STAGE.lane("forged").await;
        let holder = lane.hold(1, "/holder", "order/1").await;
        let good = holder.seen.header("lock-fence").unwrap();
        let (unsigned, _) = good.split_once(";sig=").unwrap();
        let raised = good.replacen("fence=", "fence=1", 1);
        let renamed = good.replacen("order/1", "order/2", 1);
        let half = format!("{good}, order//2");
        let forged =
            [unsigned, &tampered(&good), &raised, &renamed, &half, "order/1;fence=1;mode=exclusive;sig=:AAAA:"];
        for (number, fence) in forged.iter().map(|fence| (1, *fence)).chain([(2, good.as_str())]) {
            let ask = |path, lock: &str| lane.ask(number, path).header("lock", lock).header("lock-fence", fence);
            let refused = ask("/refused", "order/1;wait=0").send().await.unwrap();
            assert_eq!(refused.status, 423, "{fence}: {}", refused.text());
            let elsewhere = ask("/elsewhere", "order/3;wait=0").send().await.unwrap();
            assert_eq!(elsewhere.status, 200, "{fence}: {}", elsewhere.text());
        }
        // Those who ask for nothing do not get it past the filter either.
        let plain = lane.ask(2, "/elsewhere").header("lock-fence", &good).send().await.unwrap();
        assert_eq!(plain.status, 200);
        let seen = lane.upstream().requests_to("/elsewhere");
        assert_eq!(seen.len(), forged.len() + 2);
        let (last, locked) = seen.split_last().unwrap();
        assert_eq!(last.header("lock-fence"), None);
        for request in locked {
            assert_eq!(locks(request.header("lock-fence")), ["order/3 exclusive"]);
        }
        assert!(lane.upstream().requests_to("/refused").is_empty());
        assert_eq!(holder.release().await.status, 200);
        lane.quiet().await;
    });
}

#[test]
fn an_app_two_hops_on_sees_every_fence_in_force() {
    run(async {
        let lane = STAGE.lane("signed").await;
        let inner = inner(lane.nested("order/1", "/inner", "order/2;mode=shared").trace(1)).await;
        assert_eq!(inner["status"], 200, "{inner}");
        let seen = lane.upstream().requests_to("/inner")[0].header("lock-fence");
        assert_eq!(locks(seen.clone()), ["order/2 shared", "order/1 exclusive"]);
        // Each with its signature, the earlier one as it was given.
        let outer = text(&inner["outer"]).unwrap();
        assert!(outer.contains(";sig=:"), "{outer}");
        assert!(seen.clone().unwrap().ends_with(&outer), "{seen:?} {outer}");
        // The caller of a hop is told of the locks of that hop.
        assert_eq!(locks(text(&inner["fence"])), ["order/2 shared"]);

        // Also where the next hop locks nothing.
        let holder = lane.hold(1, "/holder", "order/1").await;
        let fence = holder.seen.header("lock-fence").unwrap();
        assert_eq!(lane.ask(1, "/plain").header("lock-fence", &fence).send().await.unwrap().status, 200);
        let seen = lane.upstream().requests_to("/plain")[0].header("lock-fence");
        assert_eq!(seen, Some(fence));
        assert_eq!(holder.release().await.status, 200);
        lane.quiet().await;
    });
}

#[test]
fn owners_may_be_named_by_headers_of_their_own() {
    run(async {
        let lane = STAGE.lane("sources").await;
        let ask = |path: &str| Client::http1_fresh().get(lane.url(path));
        let named = ask("/holder?hold").trace(1).header("lock-owner", "order service/7");
        let holder = lane.keep("/holder", named.header("lock", "order/1")).await;
        // The same owner by another trace; the first source counts.
        let baggage = "a=b, lock-owner=someone ;ttl=1";
        let same = ask("/second").trace(2).header("lock-owner", "order service/7").header("baggage", baggage);
        assert_eq!(second(same).await, None);
        // Another owner in the same trace.
        let other = ask("/second").trace(1).header("lock-owner", "order service/8");
        assert_eq!(second(other).await.as_deref(), Some("order%20service/8"));
        // By the baggage where the first source says nothing; its values are percent-encoded.
        let other = ask("/second").header("baggage", baggage);
        assert_eq!(second(other).await.as_deref(), Some("someone"));
        let same = ask("/second").header("baggage", "lock-owner=order%20service%2F7");
        assert_eq!(second(same).await, None);
        assert_eq!(holder.release().await.status, 200);
        // The checker takes traces for owners, so it has no say here.
        lane.empty().await;
    });
}

/// Asks for `order/1` without waiting; who it was refused as, if it was.
async fn second(ask: Ask) -> Option<String> {
    let answer = ask.header("lock", "order/1;wait=0").send().await.unwrap();
    match answer.status {
        200 => None,
        423 => text(&answer.json()["owner"]),
        status => panic!("{status}: {}", answer.text()),
    }
}
