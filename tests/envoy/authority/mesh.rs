//! An authority and sidecars that ask it, each a real Envoy with the configuration that ships; and between them a
//! connection that stays where it is while the authority is killed and started again.

use hyper::Method;
use interlock_testkit::{Answer, Client, DEADLINE, Envoy, EnvoyConfig, Link, Upstream, tools, wait_for_async};
use serde_json::{Value, json};

use crate::common::reloads;
use crate::sidecar::Sidecar;

/// The longest TTL at the authority, and so the time for which one that was started grants nothing.
const GRACE: &str = "2s";

/// All of it.
pub struct Mesh {
    pub authority: Option<Envoy>,
    pub sidecars: Vec<Sidecar>,
    grace: &'static str,
    /// The way from the sidecars to the authority.
    pub link: Link,
    client: Client,
}

fn authority_policy(grace: &str) -> Value {
    json!({
        "instance": "authority",
        "defaults": { "wait": "20s", "ttl": grace, "hold": "120s" },
        "limits": { "max_ttl": grace },
        "classes": [{ "name": "order", "within": "unordered" }, { "name": "ranked", "rank": 1 }],
        "keys": [{ "id": "k", "secret": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" } }],
        "api": { "admin": { "token": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" } } },
    })
}

/// The policy of a sidecar: nothing ends by itself.
pub fn policy() -> Value {
    json!({
        "instance": "orders",
        "backend": { "authority": { "cluster": "interlock-authority", "timeout": "1s" } },
        "defaults": { "wait": "20s", "ttl": "2s", "hold": "120s" },
        "classes": [{ "name": "order" }, { "name": "ranked" }],
    })
}

async fn new_authority(grace: &str) -> Envoy {
    let file = tools::root().join("envoy/authority.yaml");
    Envoy::start(EnvoyConfig::from_file(&file).unwrap().policy(authority_policy(grace))).await.unwrap()
}

impl Mesh {
    /// An authority that grants, and a sidecar for each of these policies.
    pub async fn start(policies: &[Value]) -> Self {
        Self::with_grace(GRACE, policies).await
    }

    /// The same, with an authority that was just started granting nothing for this long.
    pub async fn with_grace(grace: &'static str, policies: &[Value]) -> Self {
        let authority = new_authority(grace).await;
        let link = Link::to(authority.address()).await.unwrap();
        let (authority, sidecars) = (Some(authority), Vec::new());
        let mut mesh = Mesh { authority, sidecars, grace, link, client: Client::http1_fresh() };
        for policy in policies {
            let upstream = Upstream::start().await.unwrap();
            let file = tools::root().join("envoy/sidecar.yaml");
            let config = EnvoyConfig::from_file(&file).unwrap().policy(policy.clone()).upstream(upstream.address());
            let config = config.cluster("interlock-authority", mesh.link.address());
            // Requests are held at the upstream for as long as a test needs it.
            let config = config.patch_routes(|routes| routes[0]["route"]["timeout"] = json!("0s"));
            mesh.sidecars.push(Sidecar { envoy: Envoy::start(config).await.unwrap(), upstream });
        }
        mesh.until_ready().await;
        mesh
    }

    /// Two sidecars.
    pub async fn pair() -> Self {
        Self::start(&[policy(), policy()]).await
    }

    /// An authority without memory, which nobody reaches yet.
    pub async fn new_authority(&self) -> Envoy {
        new_authority(self.grace).await
    }

    /// From now on this is the authority.
    pub fn set_authority(&mut self, authority: Envoy) {
        self.link.lead_to(authority.address());
        self.authority = Some(authority);
    }

    /// Nothing is left of the authority: not its process, not its memory.
    pub fn kill_authority(&mut self) {
        self.authority.take().unwrap().kill().unwrap();
        self.link.cut();
    }

    pub async fn until_ready(&self) {
        wait_for_async("the end of the grace", DEADLINE, async || self.get("health").await.status == 200).await;
    }

    pub fn envoy(&self) -> &Envoy {
        self.authority.as_ref().unwrap()
    }

    /// What the authority's API says.
    pub async fn get(&self, path: &str) -> Answer {
        let url = format!("{}/interlock/v1/{path}", self.envoy().base_url());
        self.client.ask(Method::GET, url).send().await.unwrap()
    }

    /// Waits until so many requests wait in the authority's table for that lock.
    pub async fn until_waiting(&self, lock: &str, count: usize) {
        wait_for_async(&format!("{count} waiters for {lock}"), DEADLINE, async || {
            let seen = self.get(&format!("locks/{lock}")).await.json();
            seen["waiters"].as_array().is_some_and(|waiters| waiters.len() == count)
        })
        .await;
    }

    /// Waits until nobody holds that lock or waits for it, in the authority's table.
    pub async fn until_free(&self, lock: &str) {
        wait_for_async(&format!("{lock} to be free"), DEADLINE, async || {
            let seen = self.get(&format!("locks/{lock}")).await.json();
            seen["holders"] == json!([]) && seen["waiters"] == json!([])
        })
        .await;
    }

    /// What every test ends with: nothing is left at the authority or in a gauge, nothing overlapped, and no VM has died.
    pub async fn assert_clean(&self) {
        for sidecar in &self.sidecars {
            sidecar.assert_served().await;
        }
        wait_for_async("an empty table", DEADLINE, async || {
            let seen = self.get("locks").await.json();
            seen["locks"].as_array().is_some_and(|locks| {
                locks.iter().all(|lock| lock["holders"] == json!([]) && lock["waiters"] == json!([]))
            })
        })
        .await;
        for sidecar in &self.sidecars {
            sidecar.assert_rest().await;
        }
        assert!(reloads(self.envoy()).await.is_empty(), "a VM of the authority died");
    }
}
