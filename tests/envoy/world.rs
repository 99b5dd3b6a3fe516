//! One Envoy with the plugin before one upstream, as the tests of lifecycles need it: requests that hold, requests that
//! are known to be parked, clients on a worker of their choice, and the check that nothing is left behind.
//!
//! What is tested about a behaviour belongs into that behaviour's module.

use std::time::{Duration, Instant};

use interlock_testkit::client::Ask;
use interlock_testkit::config::FILTER;
use interlock_testkit::{Client, DEADLINE, Envoy, EnvoyConfig, Upstream, wait_for_async};
use serde_json::{Value, json};

use crate::common::reloads;

/// Longer than any test waits: a lock that is free sooner was given back, and did not expire.
pub const LONG: &str = "order/1;wait=25;ttl=60";

/// A hand-over takes some milliseconds. On a machine that does other things as well it may take longer, but it never
/// takes as long as the TTL of [`LONG`].
pub const PROMPT: Duration = Duration::from_secs(5);

/// An Envoy, and the upstream behind it.
pub struct World {
    pub upstream: Upstream,
    pub envoy: Envoy,
}

impl World {
    /// An Envoy whose policy knows the class `order` and accepts the `lock` header.
    pub async fn start() -> Self {
        Self::with(|config| config).await
    }

    /// The same, with what a test needs changed.
    pub async fn with(change: impl FnOnce(EnvoyConfig) -> EnvoyConfig) -> Self {
        let upstream = Upstream::start().await.unwrap();
        let config = EnvoyConfig::local().policy(policy()).upstream(upstream.address());
        // Routes of the test decide how long an upstream may take; most tests hold requests there.
        let config = config.patch_routes(|routes| routes[0]["route"]["timeout"] = json!("0s"));
        let envoy = Envoy::start(change(config)).await.unwrap();
        Self { upstream, envoy }
    }

    /// The URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.envoy.base_url())
    }

    /// A request for `lock` by the owner of that number, over a connection of its own.
    pub fn ask(&self, owner: u128, path: &str, lock: &str) -> Ask {
        self.ask_by(&Client::http1_fresh(), owner, path, lock)
    }

    /// A request for `lock` by the owner of that number.
    pub fn ask_by(&self, client: &Client, owner: u128, path: &str, lock: &str) -> Ask {
        client.get(self.url(path)).trace(owner).header("lock", lock)
    }

    /// Waits until so many requests stand in queues, as the table itself tells.
    pub async fn until_waiting(&self, count: u32) {
        self.envoy.wait_metric("interlock_waiting", &[], |n| n == f64::from(count), DEADLINE).await;
    }

    /// Waits until so many leases are held, as the table itself tells.
    pub async fn until_held(&self, count: u32) {
        self.envoy.wait_metric("interlock_held", &[], |n| n == f64::from(count), DEADLINE).await;
    }

    /// Waits until housekeeping has gone through the whole table that often, from now on.
    pub async fn sweeps(&self, count: u32) {
        let before = self.count("interlock_sweep_total", &[]).await;
        let enough = |n| n >= before + f64::from(count);
        self.envoy.wait_metric("interlock_sweep_total", &[], enough, DEADLINE).await;
    }

    /// The sum of a metric's samples.
    pub async fn count(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.envoy.metric(name, labels).await.unwrap()
    }

    /// A client with one open HTTP/2 connection, which worker number `worker` serves.
    pub async fn client_on(&self, worker: usize) -> Client {
        let name = format!(".worker_{worker}.downstream_cx_total");
        let mut client = Client::http2();
        wait_for_async(&format!("a connection to worker {worker}"), DEADLINE, async || {
            let before = self.connections(&name).await;
            client = Client::http2();
            assert_eq!(client.get(self.url("/warm")).send().await.unwrap().status, 200);
            self.connections(&name).await > before
        })
        .await;
        client
    }

    async fn connections(&self, suffix: &str) -> u64 {
        let stats = self.envoy.stats().await.unwrap();
        let of_worker = |name: &str| name.starts_with("listener.") && name.ends_with(suffix);
        stats.iter().filter(|(name, _)| of_worker(name)).map(|(_, n)| n).sum()
    }

    /// What every test ends with: nobody is upstream, the upstream saw no two that exclude each other, every gauge is
    /// back at 0 and the table is empty.
    pub async fn assert_clean(&self) {
        self.upstream.wait_idle().await;
        self.upstream.checker().assert_clean();
        self.assert_empty().await;
        assert!(reloads(&self.envoy).await.is_empty(), "a VM died");
    }

    /// Every gauge is back at 0 and the table is empty.
    pub async fn assert_empty(&self) {
        // The first sweep to end may have passed some buckets before the last release.
        self.sweeps(2).await;
        let gauges = ["interlock_held", "interlock_waiting", "interlock_table_locks", "interlock_table_owners"];
        let mut left = Vec::new();
        let start = Instant::now();
        wait_for_async("the gauges' return to 0", DEADLINE, async || {
            let metrics = self.envoy.metrics().await.unwrap();
            for gauge in gauges {
                assert!(metrics.iter().any(|sample| sample.name == gauge), "there is no {gauge}");
            }
            let is_left = |name: &str, value: f64| gauges.contains(&name) && value != 0.0;
            left = metrics.into_iter().filter(|sample| is_left(&sample.name, sample.value)).collect();
            assert!(start.elapsed() < DEADLINE / 2, "left behind: {left:?}");
            left.is_empty()
        })
        .await;
    }
}

/// The policy of these tests: times so long that nothing ends by itself.
pub fn policy() -> Value {
    json!({
        "instance": "test",
        "defaults": { "wait": "25s", "ttl": "60s", "hold": "120s" },
        "classes": [{ "name": "order", "within": "unordered" }],
    })
}

/// The structured lines about one kind of event in Envoy's log.
pub fn log_lines(envoy: &Envoy, event: &str) -> Vec<Value> {
    let logs = envoy.logs();
    // Envoy puts its own words before each.
    let lines = logs.lines().filter_map(|line| serde_json::from_str(&line[line.find('{')?..]).ok());
    lines.filter(|line: &Value| line["event"] == event).collect()
}

/// Adds a listener like the first one, with a name and a policy of its own.
pub fn add_listener(config: EnvoyConfig, name: &str, policy: &Value) -> EnvoyConfig {
    config.patch(|bootstrap| {
        let listeners = bootstrap["static_resources"]["listeners"].as_array_mut().unwrap();
        let mut listener = listeners[0].clone();
        listener["name"] = json!(name);
        set_policy(&mut listener, policy);
        listeners.push(listener);
    })
}

/// Gives one listener another policy.
pub fn set_policy(listener: &mut Value, policy: &Value) {
    let filters = &mut listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"];
    let ours = filters.as_array_mut().unwrap().iter_mut().find(|filter| filter["name"] == FILTER).unwrap();
    ours["typed_config"]["config"]["configuration"] =
        json!({ "@type": "type.googleapis.com/google.protobuf.StringValue", "value": policy.to_string() });
}
