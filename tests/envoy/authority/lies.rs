//! An authority that is broken, or lies, before a real Envoy: what the host does with such answers is its own. What all can be
//! wrong with an answer is in the plugin's own tests.

use interlock_testkit::upstream::Reset;
use interlock_testkit::{Client, DEADLINE, Envoy, EnvoyConfig, Recorded, Reply, Upstream, tools};
use serde_json::{Value, json};

use super::mesh::policy;
use crate::common::reloads;

/// What the authority does with a request for `order/WHAT`, and what the sidecar counts.
const LIES: [(&str, &str); 10] = [
    ("huge", "malformed"),
    ("long", "malformed"),
    ("deep", "malformed"),
    ("cut", "unreachable"),
    ("silent", "unreachable"),
    ("another", "mismatch"),
    ("fence", "mismatch"),
    ("moved", "status"),
    ("bytes", "malformed"),
    ("headers", "mismatch"),
];

async fn liar(request: Recorded) -> Reply {
    if request.method == "DELETE" {
        return Reply::new(200, r#"{"status":"released"}"#);
    }
    if request.method != "PUT" {
        return Reply::new(200, "{}");
    }
    let asked: Value = serde_json::from_slice(&request.body).unwrap();
    let name = asked["locks"][0]["name"].as_str().unwrap();
    let mut lease = json!({
        "id": request.bare_path().rsplit('/').next(), "owner": asked["owner"], "ttl": "2s", "waited": "0s",
        "locks": [{ "name": name, "mode": "exclusive", "fence": 179_000_000_000_000_u64 }],
    });
    match name.trim_start_matches("order/") {
        // The host keeps all of it, and the plugin takes no more of it than it has to.
        "huge" => Reply::new(201, vec![b' '; 9 << 20]),
        "long" => {
            lease["more"] = json!("x".repeat(100_000));
            Reply::new(201, lease.to_string())
        }
        "deep" => Reply::new(201, format!("{{\"id\":{}", "[".repeat(50_000))),
        "cut" => Reply { reset: Some(Reset::AfterHead), ..Reply::new(201, lease.to_string()) },
        "silent" => Reply { reset: Some(Reset::BeforeHead), ..Reply::new(201, "") },
        "another" => {
            lease["locks"][0]["name"] = json!("order/1");
            Reply::new(201, lease.to_string())
        }
        "fence" => {
            lease["locks"][0]["fence"] = json!(0);
            Reply::new(201, lease.to_string())
        }
        "moved" => Reply::new(307, lease.to_string()).header("location", "http://127.0.0.1:1/"),
        "bytes" => Reply::new(200, vec![0xff; 300]),
        "headers" => {
            lease["owner"] = json!("two");
            let reply = Reply::new(201, lease.to_string()).header("retry-after", "-1");
            (0..50).fold(reply, |reply, n| reply.header(&format!("x-{n}"), &"y".repeat(500)))
        }
        _ => Reply::new(201, lease.to_string()),
    }
}

#[tokio::test]
async fn a_lying_authority_harms_no_sidecar() {
    let authority = Upstream::with(liar).await.unwrap();
    let upstream = Upstream::start().await.unwrap();
    let mut policy = policy();
    policy["backend"]["authority"]["timeout"] = json!("250ms");
    let file = tools::root().join("envoy/sidecar.yaml");
    let config = EnvoyConfig::from_file(&file).unwrap().policy(policy).upstream(upstream.address());
    let envoy = Envoy::start(config.cluster("interlock-authority", authority.address())).await.unwrap();
    let ask = |what: &str| {
        let url = format!("{}/{what}", envoy.base_url());
        Client::http1_fresh().get(url).trace(1).header("lock", format!("order/{what}"))
    };
    for (what, reason) in LIES {
        let answer = ask(what).send().await.unwrap();
        assert_eq!(answer.status, 503, "{what}: {}", answer.text());
        assert_eq!(answer.json()["type"], "urn:interlock:problem:backend-unavailable", "{what}");
        let counted = envoy.metric("interlock_backend_error_total", &[("reason", reason)]).await.unwrap();
        let all = envoy.metrics().await.unwrap();
        let failures: Vec<_> = all.iter().filter(|sample| sample.name == "interlock_backend_error_total").collect();
        assert!(counted > 0.0, "{what}: {reason} is not counted: {failures:?}, {}", answer.text());
        assert!(upstream.requests_to(&format!("/{what}")).is_empty(), "{what} went on");
    }
    // It goes on as if nothing had been, under a fence that the authority has not made up.
    let fine = ask("fine").send().await.unwrap();
    assert_eq!(fine.status, 200, "{}", fine.text());
    for gauge in ["interlock_held", "interlock_waiting"] {
        envoy.wait_metric(gauge, &[], |n| n == 0.0, DEADLINE).await;
    }
    assert!(reloads(&envoy).await.is_empty(), "a VM died");
}
