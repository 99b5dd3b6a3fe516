//! Where the tests run: an Envoy for each module, in it a listener with a policy and an instance of its own for each
//! test. Tests that share an Envoy can therefore run at once, and each can tell that it left nothing behind.
//!
//! Besides its own upstream every listener has the path [`RELAY`]: there an upstream passes requests on, through the same
//! listener, as a service does that calls another one.
//!
//! No assertion about a single feature lives here.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use interlock_testkit::client::{Ask, Pending};
use interlock_testkit::{
    Answer, Client, Envoy, EnvoyConfig, Etcd, RawClient, Recorded, Reply, Route, Upstream, tools, wait_for_async,
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::Mutex;

/// No condition takes longer to come true, on a machine that has other things to do too.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// One runtime for all tests: an upstream, or a pooled connection, must outlive the test that made it.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().expect("a runtime"));

/// Runs one test.
pub fn run(test: impl Future<Output = ()>) {
    RUNTIME.block_on(test);
}

/// The gauges of the table that must all be 0 in the end.
const GAUGES: [&str; 4] = ["interlock_held", "interlock_waiting", "interlock_table_locks", "interlock_table_owners"];

async fn at_rest(envoy: &Envoy, labels: &[(&str, &str)]) {
    let mut seen = Vec::new();
    let what = format!("{GAUGES:?} with {labels:?} to be 0");
    wait_for_async(&what, DEADLINE, async || {
        let Ok(samples) = envoy.metrics().await else { return false };
        seen = GAUGES.map(|gauge| interlock_testkit::stats::sum(&samples, gauge, labels)).to_vec();
        seen.iter().all(|value| *value == 0.0)
    })
    .await;
}

/// Envoy's counters of VMs that died or could not be replaced, as far as they are not 0.
pub async fn reloads(envoy: &Envoy) -> BTreeMap<String, u64> {
    let stats = envoy.stats().await.expect("the admin endpoint");
    stats.into_iter().filter(|(name, count)| name.contains("vm_reload") && *count > 0).collect()
}

/// The listener of one test: its policy, and what has to be different about it.
pub struct Plan {
    policy: Value,
    patch: fn(EnvoyConfig) -> EnvoyConfig,
    sentinel: bool,
    authority: Option<Value>,
    etcd: bool,
}

impl Plan {
    /// With this policy, less its `instance`, which is the test's.
    pub fn new(policy: Value) -> Self {
        Plan { policy, patch: |config| config, sentinel: true, authority: None, etcd: false }
    }

    /// Changes the listener, before its routes and its policy are made the test's own.
    pub fn patch(self, patch: fn(EnvoyConfig) -> EnvoyConfig) -> Self {
        Plan { patch, ..self }
    }

    /// Leaves the policy without a rule of the stage's. Such a lane has no [`Lane::quiet`].
    pub fn bare(self) -> Self {
        Plan { sentinel: false, ..self }
    }

    /// Puts its locks into another Envoy, with that policy less its `instance` and its `api`.
    pub fn authority(self, policy: Value) -> Self {
        Plan { authority: Some(policy), ..self }
    }

    /// Puts its locks into etcd.
    pub fn etcd(self) -> Self {
        Plan { etcd: true, ..self }
    }

    async fn build(mut self, name: &str) -> (EnvoyConfig, Upstream) {
        let upstream = Upstream::start().await.expect("an upstream");
        self.policy["instance"] = json!(name);
        let sentinel = json!({
            "name": "sentinel",
            "match": { "path": SENTINEL },
            "locks": [{ "name": "sentinel/1" }],
            "enforcement": "enforce",
        });
        if self.sentinel {
            match self.policy["rules"].as_array_mut() {
                Some(rules) => rules.push(sentinel),
                None => self.policy["rules"] = json!([sentinel]),
            }
        }
        let config = EnvoyConfig::local().policy(self.policy).upstream(upstream.address());
        // Requests are held at the upstream for as long as a test needs it.
        let config = config.patch_routes(|routes| routes[0]["route"]["timeout"] = json!("0s"));
        ((self.patch)(config), upstream)
    }
}

/// The path where an upstream makes a call of its own, through the listener that it was called through: to the path in
/// `x-call`, with the `lock` in `x-call-lock`. It passes on what services pass on. Its answer is that of its call, as JSON.
pub const RELAY: &str = "/relay";

/// What services pass on from a request to the calls that they make for it.
const PASSED_ON: [&str; 5] = ["traceparent", "x-request-id", "baggage", "lock-owner", "lock-fence"];

async fn relay(request: Recorded) -> Reply {
    let host = request.header("host").expect("a host");
    let mut call = Client::http1_fresh().get(format!("http://{host}{}", request.header("x-call").expect("x-call")));
    for name in PASSED_ON {
        for value in request.headers.get_all(name) {
            call = call.header(name, value.as_bytes());
        }
    }
    if let Some(lock) = request.header("x-call-lock") {
        call = call.header("lock", lock);
    }
    let answer = call.send().await.expect("an answer to the nested call");
    let all = json!({
        "status": answer.status,
        "fence": answer.header("lock-fence"),
        "body": answer.text(),
    });
    Reply::new(200, all.to_string()).header("lock-status", &answer.joined("lock-status"))
}

/// The path that takes a lock whatever the policy, by which a test proves that it looked at the table after its end.
const SENTINEL: &str = "/sentinel";

/// The Envoy of a module: started by the first test that needs it, ended by the last.
pub struct Stage {
    plans: fn() -> Vec<(&'static str, Plan)>,
    running: Mutex<Weak<Running>>,
}

struct Running {
    envoy: Envoy,
    /// Where the locks of those listeners are whose locks are elsewhere.
    authority: Option<Envoy>,
    /// The same, for those whose locks are in etcd, each under a prefix of its own.
    etcd: Option<(Etcd, BTreeSet<&'static str>)>,
    /// Serves [`RELAY`] for as long as it is here.
    _relay: Upstream,
    upstreams: BTreeMap<&'static str, Upstream>,
}

impl Stage {
    /// The stage with these listeners.
    pub const fn new(plans: fn() -> Vec<(&'static str, Plan)>) -> Self {
        Stage { plans, running: Mutex::const_new(Weak::new()) }
    }

    /// The listener of this name.
    pub async fn lane(&self, name: &'static str) -> Lane {
        let mut running = self.running.lock().await;
        let stage = match running.upgrade() {
            Some(stage) => stage,
            None => Arc::new(Self::run((self.plans)()).await),
        };
        *running = Arc::downgrade(&stage);
        assert!(stage.upstreams.contains_key(name), "no plan for {name}");
        Lane { stage, name }
    }

    async fn run(plans: Vec<(&'static str, Plan)>) -> Running {
        let relay = Upstream::with(relay).await.expect("a relay");
        let (mut listeners, mut clusters, mut upstreams) = (Vec::new(), Vec::new(), BTreeMap::new());
        let authority = authority(&plans).await;
        let in_etcd: BTreeSet<_> = plans.iter().filter(|(_, plan)| plan.etcd).map(|(name, _)| *name).collect();
        let etcd = if in_etcd.is_empty() { None } else { Some((Etcd::start().await.expect("an etcd"), in_etcd)) };
        if let Some((etcd, _)) = &etcd {
            clusters.push(etcd_cluster(&[etcd.address()]));
        }
        for (name, mut plan) in plans {
            if let Some(authority) = authority.as_ref().filter(|_| plan.authority.is_some()) {
                plan.policy["backend"] =
                    json!({ "authority": { "cluster": format!("authority-{name}"), "timeout": "5s" } });
                clusters.push(cluster_of(name, authority.listener(name).expect("its listener")));
            }
            if plan.etcd {
                let at =
                    json!({ "cluster": "etcd", "prefix": format!("/{name}"), "timeout": "5s", "session_ttl": "60s" });
                plan.policy["backend"] = json!({ "etcd": at });
            }
            let (config, upstream) = plan.build(name).await;
            let config = config.route(Route::path(RELAY).cluster("relay").timeout("0s"));
            let config = config.cluster("relay", relay.address());
            let config = config.patch_routes(|routes| {
                for route in routes.iter_mut().filter(|route| route["route"]["cluster"] == "upstream") {
                    route["route"]["cluster"] = json!(name);
                }
            });
            let resources = &config.bootstrap()["static_resources"];
            let mut listener = resources["listeners"][0].clone();
            listener["name"] = json!(name);
            listener["stat_prefix"] = json!(name);
            listeners.push(listener);
            let all = resources["clusters"].as_array().expect("clusters");
            if clusters.iter().all(|cluster| cluster["name"] != "relay") {
                clusters.extend(all.iter().filter(|cluster| cluster["name"] == "relay").cloned());
            }
            let mut cluster = all.iter().find(|cluster| cluster["name"] == "upstream").expect("the upstream").clone();
            cluster["name"] = json!(name);
            cluster["load_assignment"]["cluster_name"] = json!(name);
            clusters.push(cluster);
            upstreams.insert(name, upstream);
        }
        let config = EnvoyConfig::local().patch(|bootstrap| {
            bootstrap["static_resources"] = json!({ "listeners": listeners, "clusters": clusters });
        });
        let envoy = Envoy::start(config).await.expect("an Envoy");
        Running { envoy, authority, etcd, _relay: relay, upstreams }
    }
}

/// The Envoy that has the locks of those whose plan says so, each with a listener and a table of its own.
async fn authority(plans: &[(&str, Plan)]) -> Option<Envoy> {
    let file = tools::root().join("envoy/authority.yaml");
    let mut listeners = Vec::new();
    for (name, policy) in plans.iter().filter_map(|(name, plan)| Some((name, plan.authority.clone()?))) {
        let mut policy = policy;
        policy["instance"] = json!(name);
        policy["api"] = json!({});
        let config = EnvoyConfig::from_file(&file).expect("the authority's configuration").policy(policy);
        let mut listener = config.bootstrap()["static_resources"]["listeners"][0].clone();
        listener["name"] = json!(name);
        listeners.push(listener);
    }
    if listeners.is_empty() {
        return None;
    }
    let config = EnvoyConfig::from_file(&file).expect("the authority's configuration");
    let config = config.patch(|bootstrap| bootstrap["static_resources"] = json!({ "listeners": listeners }));
    let envoy = Envoy::start(config).await.expect("an authority");
    for (name, _) in plans.iter().filter(|(_, plan)| plan.authority.is_some()) {
        let health = format!("http://{}/interlock/v1/health", envoy.listener(name).expect("a listener"));
        wait_for_async("the end of the grace", DEADLINE, async || {
            Client::http1_fresh().get(&health).send().await.expect("an answer").status == 200
        })
        .await;
    }
    Some(envoy)
}

/// The cluster by which a sidecar reaches its authority, as it ships.
fn cluster_of(name: &str, address: SocketAddr) -> Value {
    let file = tools::root().join("envoy/sidecar.yaml");
    let config = EnvoyConfig::from_file(&file).expect("the sidecar's configuration");
    let config = config.cluster("interlock-authority", address);
    let clusters = config.bootstrap()["static_resources"]["clusters"].as_array().expect("clusters");
    let mut cluster =
        clusters.iter().find(|cluster| cluster["name"] == "interlock-authority").expect("its cluster").clone();
    cluster["name"] = json!(format!("authority-{name}"));
    cluster["load_assignment"]["cluster_name"] = cluster["name"].clone();
    cluster
}

/// The cluster by which a sidecar reaches etcd, as it ships, with these members.
pub fn etcd_cluster(members: &[SocketAddr]) -> Value {
    let file = tools::root().join("envoy/etcd/sidecar.yaml");
    let config = EnvoyConfig::from_file(&file).expect("the sidecar's configuration").endpoints("etcd", members);
    let clusters = config.bootstrap()["static_resources"]["clusters"].as_array().expect("clusters");
    clusters.iter().find(|cluster| cluster["name"] == "etcd").expect("its cluster").clone()
}

/// A test's own listener, instance and upstream.
pub struct Lane {
    stage: Arc<Running>,
    name: &'static str,
}

impl Lane {
    /// The Envoy.
    pub fn envoy(&self) -> &Envoy {
        &self.stage.envoy
    }

    /// Whether its locks are elsewhere: in another Envoy, or in etcd.
    pub fn is_far(&self) -> bool {
        self.etcd().is_some()
            || self.stage.authority.as_ref().is_some_and(|authority| authority.listener(self.name).is_some())
    }

    /// The etcd that its locks are in, if they are.
    pub fn etcd(&self) -> Option<&Etcd> {
        self.stage.etcd.as_ref().filter(|(_, lanes)| lanes.contains(self.name)).map(|(etcd, _)| etcd)
    }

    /// The upstream behind it.
    pub fn upstream(&self) -> &Upstream {
        &self.stage.upstreams[self.name]
    }

    /// Where the listener is.
    pub fn address(&self) -> SocketAddr {
        self.envoy().listener(self.name).expect("the listener")
    }

    /// The URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address())
    }

    /// A connection below HTTP.
    pub async fn raw(&self) -> RawClient {
        RawClient::connect(self.address()).await.expect("a connection")
    }

    /// A GET by this owner, over a connection of its own.
    pub fn ask(&self, owner: u128, path: &str) -> Ask {
        Client::http1_fresh().get(self.url(path)).trace(owner)
    }

    /// A unary gRPC call by this owner, over a connection of its own.
    pub fn grpc(&self, owner: u128, path: &str) -> Ask {
        Client::http2().grpc(self.url(path)).trace(owner)
    }

    /// A client with one open HTTP/2 connection, which this worker serves.
    pub async fn client_on(&self, worker: usize) -> Client {
        let name = format!("listener.{}.worker_{worker}.downstream_cx_total", self.name);
        let mut client = Client::http2();
        wait_for_async(&format!("a connection to worker {worker}"), DEADLINE, async || {
            let before = self.envoy().stat(&name).await.expect("the admin endpoint");
            client = Client::http2();
            let warm = client.get(self.url("/warm")).send().await.expect("an answer");
            assert_eq!(warm.status, 200);
            self.envoy().stat(&name).await.expect("the admin endpoint") > before
        })
        .await;
        client
    }

    /// Sends a request to [`RELAY`] with these locks, whose nested call asks for `inner` at `path`.
    pub fn nested(&self, outer: &str, path: &str, inner: &str) -> Ask {
        let ask = Client::http1_fresh().get(self.url(RELAY)).header("lock", outer);
        ask.header("x-call", path).header("x-call-lock", inner)
    }

    /// Takes `locks` for this owner, and keeps them until it is told otherwise. `path` must be the holder's alone.
    pub async fn hold(&self, owner: u128, path: &str, locks: &str) -> Holder<'_> {
        let ask = self.ask(owner, &format!("{path}?hold")).header("lock", locks);
        self.keep(path, ask).await
    }

    /// Sends a request that holds at the upstream's `path`, and waits until it is there.
    pub async fn keep(&self, path: &str, ask: Ask) -> Holder<'_> {
        let pending = ask.spawn();
        let seen = self.upstream().wait_for_requests(path, 1).await.remove(0);
        Holder { lane: self, path: path.to_owned(), pending, seen }
    }

    /// Waits until so many locks of this instance are held, in the eyes of a sweep.
    pub async fn wait_held(&self, count: u32) {
        self.wait_gauge("interlock_held", count).await;
    }

    /// Waits until so many requests stand in queues of this instance, in the eyes of a sweep.
    pub async fn wait_waiting(&self, count: u32) {
        self.wait_gauge("interlock_waiting", count).await;
    }

    async fn wait_gauge(&self, gauge: &str, count: u32) {
        let labels = [("instance", self.name)];
        self.envoy().wait_metric(gauge, &labels, |now| now == f64::from(count), DEADLINE).await;
    }

    /// Ends a test: nothing is left behind, and the upstream saw no two requests that exclude each other.
    pub async fn quiet(&self) {
        self.empty().await;
        self.upstream().checker().assert_clean();
    }

    /// Shows that nothing is left behind: nothing holds, nothing waits, the table is empty, and no VM has died.
    ///
    /// A lock is taken after the end of the test, and seen by a sweep. A later sweep that no longer sees it has begun
    /// after the end of the test too; so has what it says of all other locks.
    pub async fn empty(&self) {
        self.upstream().wait_idle().await;
        self.upstream().close(SENTINEL);
        // Whatever the policy takes for an owner.
        let sentinel = self.ask(u128::MAX, &format!("{SENTINEL}?hold")).header("lock-owner", "sentinel").spawn();
        let labels = [("instance", self.name), ("class", "other")];
        self.envoy().wait_metric("interlock_held", &labels, |held| held >= 1.0, DEADLINE).await;
        self.upstream().open(SENTINEL);
        let answer: Answer = sentinel.answer().await.expect("an answer");
        assert_eq!(answer.status, 200, "{}", answer.text());
        at_rest(self.envoy(), &labels[..1]).await;
        if let Some(authority) = &self.stage.authority {
            at_rest(authority, &labels[..1]).await;
            assert_eq!(reloads(authority).await, BTreeMap::new(), "VMs of the authority died");
        }
        if let Some(etcd) = self.etcd() {
            etcd.wait_empty(&format!("/{}/q/", self.name)).await;
            etcd.wait_empty(&format!("/{}/o/", self.name)).await;
        }
        assert_eq!(reloads(self.envoy()).await, BTreeMap::new(), "VMs died");
    }
}

/// A request that is at the upstream, with its locks.
pub struct Holder<'a> {
    lane: &'a Lane,
    path: String,
    pending: Pending,
    /// What the upstream sees of it.
    pub seen: Recorded,
}

impl Holder<'_> {
    /// Lets the upstream answer.
    pub async fn release(self) -> Answer {
        self.lane.upstream().open(&self.path);
        self.pending.answer().await.expect("an answer")
    }

    /// Waits for an answer that does not depend on the upstream.
    pub async fn answer(self) -> Answer {
        self.pending.answer().await.expect("an answer")
    }
}

/// How an owner that is a trace is spelled.
pub fn owner(number: u128) -> String {
    format!("{number:032x}")
}

/// A `server-timing: lock;dur=…` in milliseconds.
pub fn waited_ms(answer: &Answer) -> f64 {
    let timing = answer.header("server-timing").expect("server-timing");
    let dur = timing.strip_prefix("lock;dur=").unwrap_or_else(|| panic!("{timing}"));
    dur.parse().unwrap_or_else(|e| panic!("{timing}: {e}"))
}

/// The members of a `lock-fence`: name, fence and mode of each.
pub fn fences(header: Option<String>) -> Vec<(String, u64, String)> {
    let header = header.expect("lock-fence");
    let member = |member: &str| {
        let mut parts = member.split(';');
        let name = parts.next()?.trim_matches('"').to_owned();
        let fence = parts.next()?.strip_prefix("fence=")?.parse().ok()?;
        Some((name, fence, parts.next()?.strip_prefix("mode=")?.to_owned()))
    };
    header.split(", ").map(|text| member(text).unwrap_or_else(|| panic!("{header}"))).collect()
}

/// The locks of a `lock-fence`, without their fences: `order/1 exclusive`.
pub fn locks(header: Option<String>) -> Vec<String> {
    fences(header).into_iter().map(|(name, _, mode)| format!("{name} {mode}")).collect()
}

/// Checks that `lock-status` is what it should be, but for how long the request waited: `wait=…`. Returns that in seconds.
pub fn waited(status: &str, expected: &str) -> f64 {
    let wait = status.strip_prefix(expected).and_then(|rest| rest.strip_prefix(";wait="));
    wait.and_then(|wait| wait.parse().ok()).unwrap_or_else(|| panic!("{status}, and not {expected};wait=…"))
}
