//! The mesh: an authority and four sidecars as envoy/mesh has them, on ports that the kernel picks, with a service behind each.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use interlock_testkit::{Client, Envoy, EnvoyConfig, Link, Upstream, tools};
use tokio::sync::mpsc;

use crate::demo::services::{News, PATIENCE, Services};

/// The services, and what each locks for its callers.
pub const SERVICES: [&str; 4] = ["orders", "stock", "payments", "shipping"];

/// The longest TTL in envoy/mesh: how long a lease outlives its holder, and how long a restarted authority grants nothing.
pub const MAX_TTL: Duration = Duration::from_secs(10);

/// Everything that runs. Dropping it ends all of it.
pub struct Stage {
    pub services: Arc<Services>,
    pub news: mpsc::UnboundedReceiver<News>,
    pub sidecars: BTreeMap<&'static str, Envoy>,
    authority: Option<Envoy>,
    /// To the authority, wherever it is: it gets a new port when it is started again.
    to_authority: Link,
    config: EnvoyConfig,
    _ways: Vec<Link>,
    _apps: Vec<Upstream>,
}

impl Stage {
    /// Starts everything, and waits until locks are granted.
    pub async fn set() -> Result<Self> {
        let secret = || format!("{:032x}{:032x}", fastrand::u128(..), fastrand::u128(..));
        let (key, token) = (secret(), secret());
        let file = |name: &str| {
            let config = EnvoyConfig::from_file(&tools::root().join(format!("envoy/mesh/{name}.yaml")))?;
            anyhow::Ok(config.env("INTERLOCK_KEY", &key).env("INTERLOCK_TOKEN", &token).log_levels("wasm:warn"))
        };
        // Each Envoy has to know where the others are before they are there.
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 1));
        let to_authority = Link::to(nowhere).await?;
        let (sender, news) = mpsc::unbounded_channel();
        let services = Services::new(sender, SERVICES.len());
        let (mut ways, mut apps, mut configs) = (BTreeMap::new(), Vec::new(), Vec::new());
        for name in SERVICES {
            ways.insert(name, Link::to(nowhere).await?);
        }
        for name in SERVICES {
            let serving = Arc::clone(&services);
            let app = Upstream::forgetful(move |request| Arc::clone(&serving).serve(name, request)).await?;
            let mut config = file(name)?.concurrency(1).cluster("app", app.address());
            config = config.cluster("interlock-authority", to_authority.address());
            for (peer, way) in ways.iter().filter(|(peer, _)| **peer != name) {
                config = config.cluster(peer, way.address());
            }
            apps.push(app);
            configs.push((name, config));
        }
        let config = file("authority")?;
        let mut starting = tokio::task::JoinSet::new();
        for (name, config) in configs {
            starting.spawn(async move { (name, Envoy::start(config).await) });
        }
        let authority = Envoy::start(config.clone()).await?;
        to_authority.lead_to(authority.address());
        let mut sidecars = BTreeMap::new();
        while let Some(started) = starting.join_next().await {
            let (name, envoy) = started?;
            let envoy = envoy.with_context(|| format!("the sidecar of {name}"))?;
            ways[name].lead_to(envoy.address());
            services.calls_through(name, envoy.listener("outbound").context("no outbound listener")?);
            sidecars.insert(name, envoy);
        }
        let ways = ways.into_values().collect();
        let stage = Stage {
            services,
            news,
            sidecars,
            authority: Some(authority),
            to_authority,
            config,
            _ways: ways,
            _apps: apps,
        };
        stage.until_granting().await?;
        Ok(stage)
    }

    /// Waits until the authority can grant.
    pub async fn until_granting(&self) -> Result<()> {
        let start = Instant::now();
        let url = format!("http://{}/interlock/v1/health", self.to_authority.address());
        loop {
            let health = Client::http1_fresh().get(&url).timeout(Duration::from_secs(1)).send().await;
            if health.is_ok_and(|answer| answer.status == 200) {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                bail!("the authority grants nothing");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Where a service is for the world: at its sidecar.
    pub fn url(&self, service: &str, path: &str) -> String {
        format!("{}{path}", self.sidecars[service].base_url())
    }

    /// What `GET locks` of the authority says once nobody holds any; what it still says when that takes too long. Leases are given
    /// back without being waited for.
    pub async fn locks_left(&self) -> Result<Option<serde_json::Value>> {
        let (start, client) = (Instant::now(), Client::http1_fresh());
        let url = format!("http://{}/interlock/v1/locks", self.to_authority.address());
        loop {
            let left = client.get(&url).send().await?.json();
            if left["locks"].as_array().is_some_and(Vec::is_empty) {
                return Ok(None);
            }
            if start.elapsed() > MAX_TTL {
                return Ok(Some(left));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Kills the authority where it stands.
    pub async fn kill_authority(&mut self) -> Result<()> {
        let authority = self.authority.take().context("it is not running")?;
        tokio::task::spawn_blocking(move || authority.kill()).await?
    }

    /// Starts another one, which knows nothing.
    pub async fn revive_authority(&mut self) -> Result<()> {
        let authority = Envoy::start(self.config.clone()).await?;
        self.to_authority.lead_to(authority.address());
        self.authority = Some(authority);
        Ok(())
    }
}
