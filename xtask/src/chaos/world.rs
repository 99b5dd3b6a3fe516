//! What is tormented: an authority, sidecars, and the network between them; each can be killed, stopped, cut off and started
//! again. When each was in trouble is remembered, so that what is late then is not held against it.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use interlock_testkit::{Client, Envoy, EnvoyConfig, Link, Relay, tools};
use serde_json::{Value, json};
use tokio::sync::watch;

/// The TTL of all leases, and so the grace of an authority that starts.
pub const TTL: Duration = Duration::from_millis(1500);
/// The longest that a sidecar waits for an answer to a call that does not park.
pub const CALL: Duration = Duration::from_millis(500);

/// Where the lease API is.
pub const PREFIX: &str = "/interlock/v1";
/// The sidecars' cluster.
const CLUSTER: &str = "interlock-authority";
const KEY: &str = "MDEyMzQ1Njc4OWFiY2RlZg==";

/// Times when something was in trouble, the last perhaps without an end yet.
#[derive(Debug, Default)]
pub struct Troubles(Mutex<Vec<(Instant, Option<Instant>)>>);

impl Troubles {
    fn lock(&self) -> MutexGuard<'_, Vec<(Instant, Option<Instant>)>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Trouble begins; it lasts until what is given back is dropped.
    pub fn begin(&self) -> Trouble<'_> {
        let mut all = self.lock();
        all.push((Instant::now(), None));
        Trouble { all: self, index: all.len() - 1 }
    }

    /// Whether there was any between these moments.
    pub fn between(&self, from: Instant, to: Instant) -> bool {
        self.lock().iter().any(|(begin, end)| *begin <= to && end.is_none_or(|end| end >= from))
    }
}

/// Trouble that lasts.
#[derive(Debug)]
pub struct Trouble<'a> {
    all: &'a Troubles,
    index: usize,
}

impl Drop for Trouble<'_> {
    fn drop(&mut self) {
        if let Some(trouble) = self.all.lock().get_mut(self.index) {
            trouble.1 = Some(Instant::now());
        }
    }
}

/// An Envoy that comes back when it is killed.
pub struct Node {
    pub name: String,
    config: EnvoyConfig,
    policy: Value,
    envoy: tokio::sync::Mutex<Option<Envoy>>,
    address: watch::Sender<SocketAddr>,
    pub troubles: Troubles,
    /// Traps that were asked for since it was started, and VMs that died though none was.
    traps: AtomicU64,
    pub deaths: Mutex<Vec<String>>,
    reloads: AtomicU64,
    starts: AtomicU64,
    /// Whether it was given a new policy since it was started.
    reconfigured: AtomicBool,
}

impl Node {
    async fn start(name: &str, config: EnvoyConfig, policy: Value) -> Result<Arc<Self>> {
        let config = config
            .policy(policy.clone())
            .with_faults()
            .log_levels("wasm:warn")
            .listener_from_file()
            // Connections from before a new policy keep the old one until they are drained.
            .arg("--drain-time-s")
            .arg("1")
            .patch_hcm(|hcm| hcm["access_log"] = json!([]));
        let node = Node {
            name: name.to_owned(),
            config,
            policy,
            envoy: tokio::sync::Mutex::new(None),
            address: watch::Sender::new(SocketAddr::from(([127, 0, 0, 1], 0))),
            troubles: Troubles::default(),
            traps: AtomicU64::new(0),
            deaths: Mutex::default(),
            reloads: AtomicU64::new(0),
            starts: AtomicU64::new(0),
            reconfigured: AtomicBool::new(false),
        };
        node.revive().await?;
        Ok(Arc::new(node))
    }

    async fn revive(&self) -> Result<()> {
        let envoy = Envoy::start(self.config.clone()).await.with_context(|| format!("cannot start {}", self.name))?;
        self.address.send_replace(envoy.address());
        self.traps.store(0, Ordering::Relaxed);
        self.reconfigured.store(false, Ordering::Relaxed);
        self.starts.fetch_add(1, Ordering::Relaxed);
        *self.envoy.lock().await = Some(envoy);
        Ok(())
    }

    /// Where it is now.
    pub fn address(&self) -> SocketAddr {
        *self.address.borrow()
    }

    /// Kills it where it stands, leaves it dead for a while, and starts another one in its place.
    pub async fn kill(&self, dead: Duration) -> Result<()> {
        let _trouble = self.troubles.begin();
        self.inspect().await?;
        if let Some(envoy) = self.envoy.lock().await.take() {
            tokio::task::spawn_blocking(move || envoy.kill()).await??;
        }
        tokio::time::sleep(dead).await;
        self.revive().await
    }

    /// Stops the process for a while.
    pub async fn freeze(&self, span: Duration) -> Result<()> {
        let _trouble = self.troubles.begin();
        let mut envoy = self.envoy.lock().await;
        let envoy = envoy.as_mut().context("it is not running")?;
        envoy.freeze()?;
        tokio::time::sleep(span).await;
        envoy.thaw()
    }

    /// Makes the VM trap that serves the next connection.
    pub async fn trap(&self) -> Result<()> {
        let _trouble = self.troubles.begin();
        self.traps.fetch_add(1, Ordering::Relaxed);
        self.provoke("panic").await;
        // What the dead VM had parked hangs until its clients leave; a new one comes with the next request.
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok(())
    }

    /// Sets the wall clocks of some of its VMs off by so much. A table that has been restarted has the wall clock alone to go by
    /// for its first fences: then less than the grace, which is what is promised.
    pub async fn step_clock(&self, micros: i64) {
        let restarted = self.starts.load(Ordering::Relaxed) > 1;
        let micros = if restarted { micros.max(-400_000) } else { micros };
        for _ in 0..4 {
            self.provoke(&format!("clock={micros}")).await;
        }
    }

    async fn provoke(&self, fault: &str) {
        let url = format!("http://{}{PREFIX}/health", self.address());
        let ask = Client::http1_fresh().get(url).header("x-interlock-fault", fault).timeout(Duration::from_secs(2));
        // It may be in other trouble just now.
        let _ = ask.send().await;
    }

    /// Gives it a new policy while it runs, so that all its VMs are configured anew.
    pub async fn reconfigure(&self) -> Result<()> {
        let _trouble = self.troubles.begin();
        let mut envoy = self.envoy.lock().await;
        let envoy = envoy.as_mut().context("it is not running")?;
        let mut policy = self.policy.clone();
        self.reconfigured.store(true, Ordering::Relaxed);
        let times = self.reloads.fetch_add(1, Ordering::Relaxed);
        policy["limits"]["locks_per_owner"] = json!(100 + times % 2);
        envoy.update_policy(&policy).await?;
        Ok(())
    }

    /// Looks for what must not have happened in it: more dead VMs than were asked for, or a word of alarm in its log.
    pub async fn inspect(&self) -> Result<()> {
        let envoy = self.envoy.lock().await;
        let Some(envoy) = envoy.as_ref() else { return Ok(()) };
        let stats = envoy.stats().await?;
        let reloads = stats.iter().filter(|(name, _)| name.contains("vm_reload_success")).map(|(_, n)| n).sum::<u64>();
        let traps = self.traps.load(Ordering::Relaxed);
        // A wake-up for a VM that trapped goes to the root that it had. Where the policy was replaced as well, the VM in its place
        // has none of that number, and the SDK traps: docs/testing.md.
        if traps > 0 && self.reconfigured.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut deaths = self.deaths.lock().unwrap_or_else(|e| e.into_inner());
        if reloads > traps {
            deaths.push(format!("{}: {reloads} VMs were replaced, and {traps} were killed", self.name));
        }
        let log = envoy.logs();
        let alarm = |line: &&str| line.contains("[critical]") && !(traps > 0 && line.contains("unreachable"));
        deaths.extend(log.lines().filter(alarm).take(3).map(|line| format!("in the log of {}: {line}", self.name)));
        Ok(())
    }

    /// What its admin endpoint counts.
    pub async fn stats(&self) -> Result<std::collections::BTreeMap<String, u64>> {
        self.envoy.lock().await.as_ref().context("it is not running")?.stats().await
    }
}

/// A way from a sidecar, or from the applications, to the authority.
pub struct Way {
    pub link: Link,
    pub troubles: Troubles,
}

/// Everything.
pub struct World {
    pub authority: Arc<Node>,
    pub sidecars: Vec<Arc<Node>>,
    /// The sidecars' ways, in their order, and at last that of the applications.
    pub ways: Vec<Arc<Way>>,
    pub relay: Relay,
}

impl World {
    /// Starts an authority and `sidecars` sidecars before an upstream, and waits until everything can grant.
    pub async fn start(sidecars: usize, upstream: SocketAddr) -> Result<Self> {
        let file = tools::root().join("envoy/authority.yaml");
        let authority = Node::start("the authority", EnvoyConfig::from_file(&file)?, authority_policy()).await?;
        let relay = Relay::to(authority.address()).await?;
        let mut world = World { authority, sidecars: Vec::new(), ways: Vec::new(), relay };
        for number in 0..sidecars {
            let way = world.way().await?;
            let config = EnvoyConfig::from_file(&tools::root().join("envoy/sidecar.yaml"))?;
            let config = config.cluster("app", upstream).cluster(CLUSTER, way.link.address());
            let config = config.patch_routes(|routes| routes[0]["route"]["timeout"] = json!("0s"));
            world.sidecars.push(Node::start(&format!("sidecar {number}"), config, sidecar_policy()).await?);
        }
        world.way().await?;
        world.until_granting(Duration::from_secs(30)).await?;
        Ok(world)
    }

    async fn way(&mut self) -> Result<Arc<Way>> {
        let link = Link::to(self.relay.address()).await?;
        let way = Arc::new(Way { link, troubles: Troubles::default() });
        self.ways.push(Arc::clone(&way));
        Ok(way)
    }

    /// The way of the applications.
    pub fn own_way(&self) -> &Arc<Way> {
        &self.ways[self.ways.len() - 1]
    }

    /// Kills the authority and starts another one, with an empty memory.
    pub async fn restart_authority(&self, dead: Duration) -> Result<()> {
        self.authority.kill(dead).await?;
        self.relay.lead_to(self.authority.address());
        Ok(())
    }

    /// Waits until the authority can grant.
    pub async fn until_granting(&self, patience: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            let url = format!("http://{}{PREFIX}/health", self.authority.address());
            let health = Client::http1_fresh().get(url).timeout(Duration::from_secs(1)).send().await;
            if health.is_ok_and(|answer| answer.status == 200) {
                return Ok(());
            }
            if start.elapsed() > patience {
                bail!("the authority grants nothing for {patience:?}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn span(duration: Duration) -> String {
    format!("{}ms", duration.as_millis())
}

fn authority_policy() -> Value {
    json!({
        "instance": "authority",
        "defaults": { "wait": "2s", "ttl": span(TTL), "hold": "60s" },
        "limits": { "max_wait": "10s", "max_ttl": span(TTL) },
        "keys": [{ "id": "k", "secret": { "base64": KEY } }],
        "api": { "prefix": PREFIX },
    })
}

fn sidecar_policy() -> Value {
    json!({
        "instance": "chaos",
        "owner": { "from": ["traceparent"] },
        "backend": { "authority": { "cluster": CLUSTER, "prefix": PREFIX, "timeout": span(CALL) } },
        "on_backend_unavailable": "reject",
        "defaults": { "wait": "2s", "ttl": span(TTL), "hold": "60s" },
        "limits": { "max_wait": "10s", "max_ttl": span(TTL) },
    })
}
