//! The manifests of envoy/istio in a real Envoy: the authority's bootstrap, and the filters that EnvoyFilters and WasmPlugins
//! become in a sidecar and a gateway, as Istio puts them there. What Kubernetes makes of them is `manifests/`'s to test.

use std::path::{Path, PathBuf};
use std::process::Command;

use hyper::Method;
use interlock::policy::{Enforcement, Policy};
use interlock_core::OwnerId;
use interlock_testkit::config::FILTER;
use interlock_testkit::{Client, DEADLINE, Envoy, EnvoyConfig, Reply, Route, Upstream, tools, wait_for_async};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::common::run;

/// The documents of a file.
fn documents(file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(tools::root().join("envoy/istio").join(file)).unwrap();
    serde_yaml_ng::Deserializer::from_str(&text).map(|document| Value::deserialize(document).unwrap()).collect()
}

fn document(file: &str, kind: &str) -> Value {
    documents(file).into_iter().find(|document| document["kind"] == kind).unwrap()
}

/// The value that an EnvoyFilter puts in place for this kind of thing.
fn patch(file: &str, apply_to: &str) -> Value {
    let filter = document(file, "EnvoyFilter");
    let patches = filter["spec"]["configPatches"].as_array().unwrap();
    patches.iter().find(|patch| patch["applyTo"] == apply_to).unwrap()["patch"]["value"].clone()
}

/// Where a test leaves a file for its Envoy.
fn scratch(name: &str, content: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("istio-{}-{name}", std::process::id()));
    std::fs::write(&path, content).unwrap();
    path
}

/// The bootstrap of the authority, with the plugin where this machine has it, and a key that stands in no environment.
fn authority() -> Value {
    let config = document("authority.yaml", "ConfigMap");
    let mut bootstrap: Value = serde_yaml_ng::from_str(config["data"]["envoy.yaml"].as_str().unwrap()).unwrap();
    let filters = &mut bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0];
    let vm = &mut filters["typed_config"]["http_filters"][0]["typed_config"]["config"]["vm_config"];
    vm["code"]["local"]["filename"] = json!(tools::plugin_wasm().unwrap());
    let secret = "0123456789abcdef0123456789abcdef";
    vm["environment_variables"] = json!({ "key_values": { "INTERLOCK_KEY": secret, "INTERLOCK_TOKEN": secret } });
    bootstrap
}

fn assert_valid(bootstrap: &Value, name: &str) {
    let file = scratch(name, &bootstrap.to_string());
    let mut envoy = Command::new(tools::envoy().unwrap());
    let checked = envoy.args(["--mode", "validate", "--use-dynamic-base-id", "-c"]).arg(&file).output().unwrap();
    std::fs::remove_file(&file).unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}

#[test]
fn envoy_takes_the_authoritys_bootstrap() {
    assert_valid(&authority(), "authority.json");
}

#[test]
fn envoy_takes_the_cluster_by_which_sidecars_reach_the_authority() {
    let mut cluster = patch("authority.yaml", "CLUSTER");
    for (field, value) in [("name", json!("outbound|10010||authority")), ("connect_timeout", json!("1s"))] {
        cluster[field] = value;
    }
    assert_valid(&json!({ "static_resources": { "clusters": [cluster] } }), "cluster.json");
}

/// The authority, once it grants. Its time of grace is ten seconds as it ships, and one here.
async fn granting() -> Envoy {
    let config = EnvoyConfig::from_value(authority()).concurrency(1).patch_policy(|policy| {
        policy["limits"]["max_ttl"] = json!("1s");
        policy["defaults"]["ttl"] = json!("1s");
    });
    let envoy = Envoy::start(config).await.unwrap();
    let (client, health) = (Client::http2(), format!("{}/interlock/v1/health", envoy.base_url()));
    wait_for_async("the end of the grace", DEADLINE, async || {
        client.get(health.as_str()).send().await.unwrap().status == 200
    })
    .await;
    envoy
}

/// What the Deployment's probes and the AuthorizationPolicy name is there.
#[test]
fn the_authority_grants_once_its_grace_is_over() {
    run(async {
        let envoy = granting().await;
        let client = Client::http2();
        let url = |path: &str| format!("{}/interlock/v1/{path}", envoy.base_url());
        for table in ["", "audit/"] {
            let lease = url(&format!("{table}leases/0123456789abcdef"));
            let asked = r#"{ "owner": "a", "locks": [{ "name": "order/1" }] }"#;
            // The shadow table is there from the first call on, and begins with a grace of its own.
            let mut granted = client.ask(Method::PUT, lease.as_str()).body(asked).send().await.unwrap();
            wait_for_async("a grant", DEADLINE, async || {
                if granted.status != 201 {
                    assert_eq!(granted.status, 503, "{table}: {}", granted.text());
                    granted = client.ask(Method::PUT, lease.as_str()).body(asked).send().await.unwrap();
                }
                granted.status == 201
            })
            .await;
            assert!(granted.json()["receipt"].is_string(), "{table}");
            assert_eq!(client.ask(Method::DELETE, lease.as_str()).send().await.unwrap().json()["status"], "released");
        }
        assert_eq!(client.get(url("locks/order/1")).send().await.unwrap().status, 200);
        let without_the_token = client.ask(Method::DELETE, url("locks/order/1")).send().await.unwrap();
        assert_eq!(without_the_token.status, 403);
        assert_eq!(client.get(format!("{}/", envoy.base_url())).send().await.unwrap().status, 404);
    });
}

/// A sidecar with the policy of enforce.yaml, before that authority.
#[test]
fn a_namespace_enforces_for_its_share_at_the_authority() {
    run(async {
        let authority = granting().await;
        let upstream = Upstream::start().await.unwrap();
        let policy = document("enforce.yaml", "WasmPlugin")["spec"]["pluginConfig"].clone();
        let Enforcement::Partly(share) = Policy::parse(policy.to_string().as_bytes(), &|_| None).unwrap().enforcement
        else {
            panic!("{policy}")
        };
        let (inside, outside): (Vec<u128>, Vec<u128>) =
            (1..100).partition(|number| share.has(&OwnerId::new(&format!("{number:032x}")).unwrap()));
        let name = policy["backend"]["authority"]["cluster"].as_str().unwrap().to_owned();
        let options = patch("authority.yaml", "CLUSTER")["typed_extension_protocol_options"].clone();
        let config = EnvoyConfig::local().policy(policy).upstream(upstream.address()).concurrency(1);
        let config = config.cluster(&name, authority.address()).patch(|bootstrap| {
            let clusters = bootstrap["static_resources"]["clusters"].as_array_mut().unwrap();
            let cluster = clusters.iter_mut().find(|cluster| cluster["name"] == name.as_str()).unwrap();
            cluster["typed_extension_protocol_options"] = options;
        });
        let config = config.patch_routes(|routes| routes[0]["route"]["timeout"] = json!("0s"));
        let sidecar = Envoy::start(config).await.unwrap();
        let post = |path: &str, owner: u128| {
            let client = Client::http1_fresh();
            client.post(format!("{}{path}", sidecar.base_url())).trace(owner).timeout(DEADLINE)
        };
        let held = post("/orders/7/capture?hold", inside[0]).spawn();
        let seen = upstream.wait_for_requests("/orders/7/capture", 1).await.remove(0);
        assert!(seen.header("lock-fence").unwrap().starts_with("order/7;fence="));
        let refused = post("/orders/7/capture", inside[1]).send().await.unwrap();
        assert_eq!(refused.status, 423, "{}", refused.text());
        assert!(refused.text().contains("wait-timeout"), "{}", refused.text());
        // The other side of the share, and the rule that stays behind.
        for (path, owner) in [("/orders/7/capture", outside[0]), ("/orders/7/refund", inside[1])] {
            let watched = post(path, owner).send().await.unwrap();
            let status = watched.joined("lock-status");
            assert!(watched.status == 200 && status.starts_with("orders;outcome=audit"), "{path}: {status}");
        }
        upstream.open("/orders/7/capture");
        let answer = held.answer().await.unwrap();
        assert!(
            answer.joined("lock-status").starts_with("orders;outcome=acquired"),
            "{}",
            answer.joined("lock-status")
        );
        authority.wait_metric("interlock_held", &[], |held| held == 0.0, DEADLINE).await;
    });
}

/// A gateway as gateway.yaml makes it.
#[test]
fn nothing_of_locks_and_owners_passes_the_gateway() {
    run(async {
        let upstream = Upstream::start().await.unwrap();
        let policy = document("gateway.yaml", "WasmPlugin")["spec"]["pluginConfig"].clone();
        let merged = patch("gateway.yaml", "NETWORK_FILTER")["typed_config"].clone();
        let config = EnvoyConfig::local().policy(policy).upstream(upstream.address()).concurrency(1);
        let config = config.patch_hcm(|hcm| {
            for (field, value) in merged.as_object().unwrap() {
                assert!(field == "@type" || hcm.get(field).is_none(), "{field} is there");
                hcm[field] = value.clone();
            }
        });
        let envoy = Envoy::start(config).await.unwrap();
        let theirs = [
            ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
            ("tracestate", "a=b"),
            ("baggage", "lock-owner=thief"),
            ("lock-owner", "thief"),
            ("lock", "order/1"),
            ("lock-fence", "order/1;fence=9;mode=exclusive"),
            ("lock_fence", "order/1;fence=9;mode=exclusive"),
            ("lock-status", "orders;outcome=acquired"),
        ];
        let ask = Client::http1_fresh().get(format!("{}/orders", envoy.base_url())).header("x-app", "kept");
        let answer = theirs.iter().fold(ask, |ask, (name, value)| ask.header(name, value)).send().await.unwrap();
        assert_eq!((answer.status, answer.header("lock-status")), (200, None));
        let [seen] = &upstream.requests()[..] else { panic!("one request") };
        for (name, _) in theirs {
            assert_eq!(seen.header(name), None, "{name}");
        }
        assert!(seen.header("x-request-id").is_some(), "the owner");
        assert_eq!(seen.header("x-app").as_deref(), Some("kept"));
    });
}

/// A sidecar's filter as Istio delivers it: its configuration comes by itself.
struct Delivered {
    filter: Value,
    file: PathBuf,
}

impl Delivered {
    /// The filter of filter.yaml, with that policy and failure policy. Istio's agent puts the file that it fetched in the place
    /// of the remote one.
    fn new(name: &str, failure_policy: Option<&str>, change: impl FnOnce(&mut Value)) -> Self {
        let mut filter = patch("filter.yaml", "HTTP_FILTER");
        let mut extension = patch("filter.yaml", "EXTENSION_CONFIG");
        assert_eq!(filter["name"], extension["name"], "by this name the configuration is asked for");
        extension["@type"] = json!("type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig");
        let config = &mut extension["typed_config"]["config"];
        let code = config["vm_config"]["code"].as_object_mut().unwrap();
        assert!(code.remove("remote").is_some());
        code.insert("local".into(), json!({ "filename": tools::plugin_wasm().unwrap() }));
        if let Some(policy) = failure_policy {
            config["failure_policy"] = json!(policy);
        }
        change(&mut config["configuration"]["value"]);
        let file = scratch(name, &json!({ "version_info": "1", "resources": [extension] }).to_string());
        let source = filter["config_discovery"]["config_source"].as_object_mut().unwrap();
        assert!(source.remove("ads").is_some());
        source.insert("path_config_source".into(), json!({ "path": file }));
        Delivered { filter, file }
    }

    /// An Envoy with it before its router.
    async fn start(&self, upstream: &Upstream, route: Option<Value>) -> Envoy {
        let config = EnvoyConfig::local().upstream(upstream.address()).concurrency(1);
        let config = config.arg("--service-node").arg("sidecar").arg("--service-cluster").arg("payments");
        let config = config.patch_filters(|filters| {
            filters.retain(|other| other["name"] != FILTER);
            let router = filters.len() - 1;
            filters.insert(router, self.filter.clone());
        });
        let config = config.patch_routes(|routes| drop(routes.splice(0..0, route.clone())));
        Envoy::start(config).await.unwrap()
    }
}

impl Drop for Delivered {
    fn drop(&mut self) {
        // A file that is left in the build's own folder harms nobody.
        let _ = std::fs::remove_file(&self.file);
    }
}

/// A sidecar as filter.yaml makes it: one route switches the filter on.
#[test]
fn the_filter_is_there_on_its_route_only() {
    run(async {
        let upstream = Upstream::start().await.unwrap();
        let delivered = Delivered::new("route.json", None, |policy| policy["backend"] = json!({ "local": {} }));
        let mut route = patch("filter.yaml", "HTTP_ROUTE");
        assert_eq!(route["route"]["cluster"], "inbound|8080||", "Istio's name for the app");
        route["route"]["cluster"] = json!("upstream");
        let envoy = delivered.start(&upstream, Some(route)).await;
        let client = Client::http1();
        let post = |path: &str| client.post(format!("{}{path}", envoy.base_url())).header("lock-fence", "a;fence=9");
        let locked = post("/accounts/7/debit").send().await.unwrap();
        let status = locked.joined("lock-status");
        assert!(status.starts_with("payments;outcome=acquired"), "{status}");
        let other = post("/other").send().await.unwrap();
        assert_eq!((other.status, other.header("lock-status")), (200, None));
        let seen = |path: &str| upstream.requests_to(path)[0].header("lock-fence").unwrap();
        assert!(seen("/accounts/7/debit").starts_with("account/7;fence="));
        assert_eq!(seen("/other"), "a;fence=9", "no filter there");
    });
}

/// What docs/rollout.md warns of: no failure policy helps against a policy that is refused as the first one.
#[test]
fn a_first_policy_that_is_refused_is_an_outage() {
    run(async {
        let upstream = Upstream::start().await.unwrap();
        for failure_policy in ["FAIL_OPEN", "FAIL_RELOAD"] {
            let mut delivered =
                Delivered::new("refused.json", Some(failure_policy), |policy| *policy = json!({ "ruels": [] }));
            delivered.filter.as_object_mut().unwrap().remove("disabled");
            let envoy = delivered.start(&upstream, None).await;
            let answer = Client::http1().get(format!("{}/", envoy.base_url())).send().await.unwrap();
            assert_eq!(answer.status, 500, "{failure_policy}");
            envoy.wait_log("ruels: there is no such field; did you mean \"rules\"?").await;
        }
        assert_eq!(upstream.count(), 0);
    });
}

/// Istio hands the override to Envoy beside its own bootstrap, which has no expressions for these metrics.
#[test]
fn the_override_of_the_bootstrap_gives_metrics_their_labels() {
    run(async {
        let upstream = Upstream::start().await.unwrap();
        let stats = document("stats.yaml", "ConfigMap")["data"]["custom_bootstrap.json"].clone();
        let config = EnvoyConfig::local().upstream(upstream.address()).concurrency(1);
        let config = config.policy(json!({ "instance": "labels", "classes": [{ "name": "order" }] }));
        let config = config.patch(|bootstrap| drop(bootstrap["stats_config"].take()));
        let config = config.arg("--config-yaml").arg(stats.as_str().unwrap());
        let envoy = Envoy::start(config).await.unwrap();
        let ask = Client::http1().get(format!("{}/", envoy.base_url())).header("lock", "order/1");
        assert_eq!(ask.send().await.unwrap().status, 200);
        let labels = [("class", "order"), ("outcome", "acquired")];
        envoy.wait_metric("interlock_acquire_total", &labels, |count| count == 1.0, DEADLINE).await;
        envoy.wait_metric("interlock_held", &[("instance", "labels")], |held| held == 0.0, DEADLINE).await;
    });
}

/// A caller's sidecar under Istio's default retry policy (pilot/pkg/networking/core/route/retry/retry.go), before the sidecar
/// that locks. A refusal must not be asked for again; that the authority is away may.
#[test]
fn istios_default_retries_repeat_no_refusal() {
    run(async {
        let upstream = Upstream::start().await.unwrap();
        let policy = json!({
            "instance": "retries", "reentrancy": "none", "classes": [{ "name": "order", "rank": 2 }, { "name": "early", "rank": 1 }],
        });
        let answer = || Reply::new(200, "").header("content-type", "application/grpc").header("grpc-status", "14");
        let gone = Upstream::with(move |_| async move { answer() }).await.unwrap();
        let config = EnvoyConfig::local().policy(policy).upstream(upstream.address()).concurrency(1);
        let config = config.cluster("gone", gone.address()).route(Route::prefix("/gone").cluster("gone"));
        let config =
            config.patch_routes(|routes| routes.iter_mut().for_each(|route| route["route"]["timeout"] = json!("0s")));
        let sidecar = Envoy::start(config).await.unwrap();
        let default = json!({
            "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
            "num_retries": 2,
            "host_selection_retry_max_attempts": "5",
        });
        let route = Route::prefix("/").cluster("sidecar").timeout("0s");
        let route = route.patch(|route| route["route"]["retry_policy"] = default.clone());
        let caller = EnvoyConfig::plain().concurrency(1).cluster("sidecar", sidecar.address()).route(route);
        let caller = Envoy::start(caller).await.unwrap();
        let (http, grpc) = (Client::http1_fresh(), Client::http2());
        let url = |path: &str| format!("{}{path}", caller.base_url());
        let held = http.get(url("/held?hold")).trace(1).header("lock", "order/1").spawn();
        upstream.wait_for_requests("/held", 1).await;
        for (status, code, lock) in
            [(400, 3, "order//1"), (409, 10, "order/1"), (409, 10, "early/1"), (423, 10, "order/1;wait=0")]
        {
            // The holder's own second request closes a cycle with itself; another owner's finds the lock held.
            let owner = if status == 423 { 2 } else { 1 };
            for client in [&http, &grpc] {
                let before = sidecar.stat("http.local.downstream_rq_completed").await.unwrap();
                let is_grpc = std::ptr::eq(client, &grpc);
                let ask = if is_grpc { client.grpc(url("/refused")) } else { client.get(url("/refused")) };
                let answer = ask.trace(owner).header("lock", lock).send().await.unwrap();
                let got = if is_grpc { answer.grpc_status() } else { Some(i32::from(answer.status)) };
                assert_eq!(got, Some(if is_grpc { code } else { status }), "{lock}: {}", answer.text());
                let completed = |count| count > before;
                let after = sidecar.wait_stat("http.local.downstream_rq_completed", completed, DEADLINE).await;
                assert_eq!(after - before, 1, "{lock} is asked for again");
            }
        }
        assert_eq!(upstream.requests_to("/refused").len(), 0);
        // The policy is in force: so does backend-unavailable look to a caller that speaks gRPC.
        let unavailable = grpc.grpc(url("/gone")).send().await.unwrap();
        assert_eq!(unavailable.grpc_status(), Some(14));
        assert_eq!(gone.requests().len(), 3);
        upstream.open("/held");
        assert_eq!(held.answer().await.unwrap().status, 200);
    });
}
