//! The lease API of a real Envoy: parked, over all workers, restarted, and asked for nonsense.

use std::time::Duration;

use hyper::Method;
use interlock_testkit::client::Ask;
use interlock_testkit::{Answer, Client, DEADLINE, Envoy, EnvoyConfig, RawClient, tools, wait_for_async};
use serde_json::{Value, json};

use crate::world::World;

/// The longest TTL, and so the time for which a new table grants nothing.
const GRACE: &str = "2s";

fn policy() -> Value {
    json!({
        "instance": "authority",
        "defaults": { "wait": "20s", "ttl": "2s", "hold": "120s" },
        "limits": { "max_ttl": GRACE },
        "classes": [{ "name": "order", "within": "unordered" }],
        "keys": [{ "id": "k", "secret": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" } }],
        "api": { "admin": { "token": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" } } },
    })
}

struct Authority {
    world: World,
    client: Client,
}

impl Authority {
    /// One that has just started.
    async fn start() -> Self {
        let world = World::with(|config| {
            config.policy(policy()).patch_plugin(|plugin| plugin["allow_on_headers_stop_iteration"] = json!(true))
        })
        .await;
        Authority { world, client: Client::http2() }
    }

    /// One that grants.
    async fn ready() -> Self {
        let authority = Self::start().await;
        authority.until_ready().await;
        authority
    }

    async fn until_ready(&self) {
        wait_for_async("the end of the grace", DEADLINE, async || {
            self.call(Method::GET, "health").send().await.unwrap().status == 200
        })
        .await;
    }

    fn call(&self, method: Method, path: &str) -> Ask {
        self.call_by(&self.client, method, path)
    }

    fn call_by(&self, client: &Client, method: Method, path: &str) -> Ask {
        client.ask(method, self.world.url(&format!("/interlock/v1/{path}")))
    }

    fn put(&self, client: &Client, id: &str, body: &Value) -> Ask {
        self.call_by(client, Method::PUT, &format!("leases/{id}")).body(body.to_string())
    }

    async fn delete(&self, id: &str) -> Value {
        let answer = self.call(Method::DELETE, &format!("leases/{id}")).send().await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["status"].clone()
    }

    async fn renew(&self, id: &str, receipt: &Value) -> Value {
        let body = json!({ "leases": [{ "id": id, "receipt": receipt }] });
        let answer = self.call(Method::POST, "leases/renew").body(body.to_string()).send().await.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()["results"][0]["status"].clone()
    }

    /// Waits until one request stands in a queue, and renews these leases meanwhile, as their holder would.
    async fn until_one_waits_behind(&self, leases: &[&str]) {
        wait_for_async("one that waits, renewing all the while", DEADLINE, async || {
            for id in leases {
                assert_eq!(self.renew(id, &Value::Null).await, "renewed");
            }
            self.world.count("interlock_waiting", &[]).await == 1.0
        })
        .await;
    }
}

fn body(owner: &str, lock: &str) -> Value {
    json!({ "owner": owner, "locks": [{ "name": lock }] })
}

fn slug(answer: &Answer) -> String {
    assert_eq!(answer.header("content-type").as_deref(), Some("application/problem+json"), "{}", answer.text());
    answer.json()["type"].as_str().unwrap().replace("urn:interlock:problem:", "")
}

#[tokio::test]
async fn leases_are_asked_for_waited_for_seen_and_given_back() {
    let authority = Authority::ready().await;
    // Each over a connection of its own, so that both workers come to serve some.
    for (round, client) in [Client::http1_fresh(), Client::http2(), Client::http1(), Client::http2()].iter().enumerate()
    {
        let (first, second) = (format!("first-lease-of-{round}"), format!("second-lease-of-{round}"));
        let lease = authority.put(client, &first, &body("one", "order/1")).send().await.unwrap();
        assert_eq!(lease.status, 201, "{}", lease.text());
        assert_eq!(lease.json()["locks"][0]["name"], "order/1");
        let waiter = authority.put(&Client::http1_fresh(), &second, &body("two", "order/1")).spawn();
        authority.until_one_waits_behind(&[&first]).await;
        let graph = authority.call(Method::GET, "graph").header("accept", "text/vnd.graphviz").send().await.unwrap();
        assert!(graph.text().contains("\"two\" -> \"one\" [label=\"order/1\"];"), "{}", graph.text());
        let lock = authority.call(Method::GET, "locks/order/1").send().await.unwrap().json();
        assert_eq!((&lock["holders"][0]["owner"], &lock["waiters"][0]["owner"]), (&json!("one"), &json!("two")));
        assert_eq!(authority.delete(&first).await, "released");
        let lease = waiter.answer().await.unwrap();
        assert_eq!(lease.status, 201, "{}", lease.text());
        // A parked request of the proxy's own waits for a lease as for anything.
        let upstream = authority.world.ask(3, "/served", "order/1").spawn();
        authority.until_one_waits_behind(&[&second]).await;
        assert_eq!(authority.delete(&second).await, "released");
        assert_eq!(upstream.answer().await.unwrap().status, 200);
    }
    authority.world.assert_clean().await;
}

#[tokio::test]
async fn who_leaves_while_parked_waits_no_more_and_a_cycle_is_refused() {
    let authority = Authority::ready().await;
    let long =
        |owner: &str, lock: &str| json!({ "owner": owner, "locks": [{ "name": lock }], "wait": "20s", "ttl": "2s" });
    let client = Client::http1_fresh();
    assert_eq!(authority.put(&client, "lease-one-of-test", &long("one", "order/1")).send().await.unwrap().status, 201);
    assert_eq!(authority.put(&client, "lease-two-of-test", &long("two", "order/2")).send().await.unwrap().status, 201);
    let waiter = authority.put(&Client::http1_fresh(), "lease-three-of-test", &long("one", "order/2")).spawn();
    authority.until_one_waits_behind(&["lease-one-of-test", "lease-two-of-test"]).await;
    let refused = authority.put(&client, "lease-four-of-test", &long("two", "order/1")).send().await.unwrap();
    assert_eq!((refused.status, slug(&refused).as_str()), (409, "deadlock"), "{}", refused.text());
    let told = authority.call(Method::GET, "deadlocks").send().await.unwrap().json();
    assert_eq!(told["deadlocks"][0]["cycle"], refused.json()["cycle"]);
    waiter.leave().await;
    authority.world.until_waiting(0).await;
    assert_eq!(authority.delete("lease-one-of-test").await, "released");
    assert_eq!(authority.delete("lease-two-of-test").await, "released");
    assert_eq!(authority.delete("lease-three-of-test").await, "cancelled");
    authority.world.assert_clean().await;
}

#[tokio::test]
async fn a_killed_authority_loses_no_lease_that_is_renewed() {
    let authority = Authority::ready().await;
    let id = "lease-that-survives";
    let lease = authority.put(&authority.client, id, &body("one", "order/1")).send().await.unwrap();
    assert_eq!(lease.status, 201, "{}", lease.text());
    let receipt = &lease.json()["receipt"];
    let fence = |answer: &Answer| answer.json()["locks"][0]["fence"].as_u64().unwrap();
    // Nothing is left of it: not its process, not its port, not its shared data.
    authority.world.envoy.kill().unwrap();

    let authority = Authority::start().await;
    let refused = authority.put(&authority.client, "lease-of-another", &body("two", "order/1")).send().await.unwrap();
    assert_eq!((refused.status, slug(&refused).as_str()), (503, "backend-unavailable"));
    assert!(refused.header("retry-after").is_some());
    let status = authority.renew(id, receipt).await;
    assert_eq!(status, "renewed");
    let again = authority.call(Method::GET, &format!("leases/{id}")).send().await.unwrap();
    assert_eq!(fence(&again), fence(&lease));
    wait_for_async("the end of the grace, renewing all the while", DEADLINE, async || {
        assert_eq!(authority.renew(id, receipt).await, "renewed");
        authority.call(Method::GET, "health").send().await.unwrap().status == 200
    })
    .await;
    let waiter = authority.put(&Client::http1_fresh(), "lease-of-the-next", &body("two", "order/1")).spawn();
    authority.world.until_waiting(1).await;
    assert_eq!(authority.renew(id, receipt).await, "renewed");
    assert_eq!(authority.delete(id).await, "released");
    let next = waiter.answer().await.unwrap();
    assert!(next.status == 201 && fence(&next) > fence(&lease), "{}", next.text());
    assert_eq!(authority.delete("lease-of-the-next").await, "released");
    authority.world.assert_clean().await;
}

#[tokio::test]
async fn breaking_the_glass_frees_a_lock_at_once() {
    let authority = Authority::ready().await;
    let lease = authority.put(&authority.client, "lease-of-the-lost", &body("one", "order/1")).send().await.unwrap();
    assert_eq!(lease.status, 201);
    let forbidden = authority.call(Method::DELETE, "locks/order/1").send().await.unwrap();
    assert_eq!((forbidden.status, slug(&forbidden).as_str()), (403, "forbidden"));
    let admin = authority.call(Method::DELETE, "locks/order/1").header("authorization", "Bearer 0123456789abcdef");
    let broken = admin.send().await.unwrap();
    assert_eq!((broken.status, &broken.json()["ended"][0]["owner"]), (200, &json!("one")));
    let next = authority.put(&authority.client, "lease-of-the-next", &body("two", "order/1")).send().await.unwrap();
    assert_eq!(next.status, 201);
    assert_eq!(authority.renew("lease-of-the-lost", &Value::Null).await, "lost");
    assert_eq!(authority.delete("lease-of-the-next").await, "released");
    authority.world.assert_clean().await;
}

#[tokio::test]
async fn the_authority_that_ships_serves_the_api_and_nothing_else() {
    let file = tools::root().join("envoy/authority.yaml");
    let envoy = Envoy::start(EnvoyConfig::from_file(&file).unwrap().policy(policy())).await.unwrap();
    let client = Client::http1();
    let url = |path: &str| format!("{}{path}", envoy.base_url());
    wait_for_async("the end of the grace", DEADLINE, async || {
        client.get(url("/interlock/v1/health")).send().await.unwrap().status == 200
    })
    .await;
    let path = url("/interlock/v1/leases/lease-of-the-shipped");
    let lease = client.ask(Method::PUT, &path).body(body("one", "order/1").to_string()).send().await.unwrap();
    assert_eq!(lease.status, 201, "{}", lease.text());
    assert_eq!(client.ask(Method::DELETE, &path).send().await.unwrap().json()["status"], "released");
    assert_eq!(client.get(url("/interlock")).send().await.unwrap().status, 404);
    assert!(!envoy.access_log().is_empty());
    assert!(!envoy.logs().contains("lease-of-the-shipped"), "lease ids are capabilities");
}

#[tokio::test]
async fn nonsense_is_refused_and_harms_nothing() {
    let authority = Authority::ready().await;
    let id = "lease-of-nonsense";
    for (body, status) in [
        (String::new(), 400),
        (String::from("{"), 400),
        ("[".repeat(60_000), 400),
        (String::from("\u{0}\u{1}"), 400),
        (r#"{"owner":"a","locks":[{"name":"order/1","mode":"none"}]}"#.to_owned(), 400),
        (r#"{"owner":"a","locks":[{"name":"order/1"}],"ttl":"1000000h"}"#.to_owned(), 400),
        (r#"{"owner":"a","locks":[{"name":"order/1"}],"more":1}"#.to_owned(), 400),
        ("x".repeat(64 * 1024 + 1), 413),
        ("x".repeat(900 * 1024), 413),
    ] {
        for client in [Client::http1_fresh(), Client::http2()] {
            let ask = authority.call_by(&client, Method::PUT, &format!("leases/{id}"));
            let answer = ask.body(body.clone()).timeout(Duration::from_secs(5)).send().await.unwrap();
            assert_eq!(answer.status, status, "{} bytes: {}", body.len(), answer.text());
            assert!(!slug(&answer).is_empty());
        }
    }
    for (method, path, status) in [
        (Method::GET, "", 404),
        (Method::PATCH, "locks", 405),
        (Method::GET, "leases/x", 400),
        (Method::GET, "locks?limit=x", 400),
    ] {
        assert_eq!(authority.call(method, path).send().await.unwrap().status, status, "{path}");
    }
    // A body in chunks, with a trailer behind it.
    let mut raw = RawClient::connect(authority.world.envoy.address()).await.unwrap();
    let body = body("chunks", "order/1").to_string();
    let (one, two) = body.split_at(10);
    let request = format!(
        "PUT /interlock/v1/leases/lease-in-chunks-1 HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n\
         {:x}\r\n{one}\r\n{:x}\r\n{two}\r\n0\r\nlock: order/9\r\n\r\n",
        one.len(),
        two.len()
    );
    raw.send(request.as_bytes()).await.unwrap();
    let response = raw.response().await.unwrap();
    assert_eq!(response.status, 201, "{}", response.text());
    assert_eq!(authority.delete("lease-in-chunks-1").await, "released");
    authority.world.assert_clean().await;
}
