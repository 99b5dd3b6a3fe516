//! A sidecar whose locks are kept elsewhere, as a real Envoy with the configuration that ships, and what its answers say.

use interlock_testkit::client::Ask;
use interlock_testkit::{Answer, Client, DEADLINE, Envoy, Upstream};

use crate::common::{fences, reloads};

/// A sidecar and the service behind it.
pub struct Sidecar {
    pub envoy: Envoy,
    pub upstream: Upstream,
}

impl Sidecar {
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.envoy.base_url())
    }

    /// A request for `lock` by the owner of that number, over a connection of its own.
    pub fn ask(&self, owner: u128, path: &str, lock: &str) -> Ask {
        Client::http1_fresh().get(self.url(path)).trace(owner).header("lock", lock)
    }

    pub async fn count(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.envoy.metric(name, labels).await.unwrap()
    }

    /// Waits until so many requests of it wait, or hold locks.
    pub async fn until(&self, gauge: &str, count: u32) {
        self.envoy.wait_metric(gauge, &[], |n| n == f64::from(count), DEADLINE).await;
    }

    /// Its service is done, and nothing overlapped there.
    pub async fn assert_served(&self) {
        self.upstream.wait_idle().await;
        self.upstream.checker().assert_clean();
    }

    /// Nothing is left in a gauge, and no VM has died.
    pub async fn assert_rest(&self) {
        for gauge in ["interlock_held", "interlock_waiting"] {
            self.until(gauge, 0).await;
        }
        assert!(reloads(&self.envoy).await.is_empty(), "a VM died");
    }
}

/// The first fence that an answer tells.
pub fn fence(answer: &Answer) -> u64 {
    fences(answer.header("lock-fence"))[0].1
}

/// What an answer says became of the locks.
pub fn status(answer: &Answer) -> String {
    answer.joined("lock-status")
}
