//! etcd and sidecars whose locks are in it, each a real process with the configuration that ships.

use std::net::SocketAddr;

use interlock_testkit::{DEADLINE, Envoy, EnvoyConfig, Etcd, Upstream, tools, wait_for_async};
use serde_json::{Value, json};

use crate::sidecar::Sidecar;

/// All of it.
pub struct Stand {
    pub etcd: Etcd,
    pub sidecars: Vec<Sidecar>,
}

/// The policy of a sidecar: nothing ends by itself.
pub fn policy() -> Value {
    json!({
        "instance": "orders",
        "backend": { "etcd": { "cluster": "etcd", "session_ttl": "4s" } },
        "defaults": { "wait": "20s", "hold": "120s" },
        "classes": [
            { "name": "order", "within": "unordered" },
            { "name": "ranked", "rank": 1 },
            { "name": "seats", "permits": 2 },
            { "name": "stock", "hierarchy": true },
        ],
    })
}

/// A sidecar's configuration as it ships, with these members of etcd.
pub fn config(policy: Value, members: &[SocketAddr]) -> EnvoyConfig {
    let file = tools::root().join("envoy/etcd/sidecar.yaml");
    let config = EnvoyConfig::from_file(&file).unwrap().policy(policy);
    // Requests are held at the upstream for as long as a test needs it.
    config.patch_routes(|routes| routes[0]["route"]["timeout"] = json!("0s")).endpoints("etcd", members)
}

impl Stand {
    /// One member, and a sidecar for each of these policies.
    pub async fn start(policies: &[Value]) -> Self {
        Self::on(Etcd::start().await.unwrap(), policies).await
    }

    /// Sidecars at that etcd.
    pub async fn on(etcd: Etcd, policies: &[Value]) -> Self {
        let members: Vec<_> = etcd.members().iter().map(|member| member.address()).collect();
        let mut stand = Stand { etcd, sidecars: Vec::new() };
        for policy in policies {
            stand.sidecars.push(Self::sidecar(policy.clone(), &members).await);
        }
        stand
    }

    pub async fn sidecar(policy: Value, members: &[SocketAddr]) -> Sidecar {
        let upstream = Upstream::start().await.unwrap();
        let config = config(policy, members).cluster("app", upstream.address());
        let envoy = Envoy::start(config).await.unwrap();
        envoy.wait_stat("cluster.etcd.membership_healthy", |healthy| healthy > 0, DEADLINE).await;
        Sidecar { envoy, upstream }
    }

    /// Two sidecars.
    pub async fn pair() -> Self {
        Self::start(&[policy(), policy()]).await
    }

    /// Waits until so many stand in the line of that lock.
    pub async fn until_standing(&self, lock: &str, count: usize) {
        let prefix = format!("/interlock/q/{lock}!");
        wait_for_async(&format!("{count} in the line of {lock}"), DEADLINE, async || {
            self.etcd.keys(&prefix).is_ok_and(|keys| keys.len() == count)
        })
        .await;
    }

    /// What every test ends with: no key is left in etcd and nothing in a gauge, nothing overlapped, and no VM has died.
    pub async fn assert_clean(&self) {
        for sidecar in &self.sidecars {
            sidecar.assert_served().await;
        }
        wait_for_async("no place and no item in etcd", DEADLINE, async || {
            let none = |prefix: &str| self.etcd.keys(prefix).is_ok_and(|keys| keys.is_empty());
            none("/interlock/q/") && none("/interlock/o/") && none("/interlock/audit/q/")
        })
        .await;
        for sidecar in &self.sidecars {
            sidecar.assert_rest().await;
        }
    }
}
