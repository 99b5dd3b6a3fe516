//! What the soak's Envoy runs with: the bootstrap that ships, with a policy made to be contended.
//!
//! Waits, TTLs and hold limits are short, locks few, limits low enough to be met.

use std::net::SocketAddr;
use std::time::Duration;

use interlock_testkit::{EnvoyConfig, Route};
use serde_json::json;

use super::ledger::Ledger;

/// The instance, as `lock-status` names it.
pub const INSTANCE: &str = "soak";
/// Permits of a lock of class `pool`.
const PERMITS: usize = 3;
/// How long the route `/hasty` lets the upstream work.
pub const HASTY: Duration = Duration::from_millis(300);
/// How long all other routes do: Envoy's default.
pub const PATIENT: Duration = Duration::from_secs(15);
/// The most locks that a request may ask for.
pub const LOCKS_PER_REQUEST: usize = 12;
/// For how long a grant may be renewed where nothing else is said.
pub const HOLD: Duration = Duration::from_secs(8);
/// The TTL where nothing else is said.
pub const TTL: Duration = Duration::from_secs(3);
/// The wait where nothing else is said.
pub const WAIT: Duration = Duration::from_millis(600);

/// A job's wait, TTL and hold limit, as its rule says them.
pub const JOB_WAIT: Duration = Duration::from_millis(400);
pub const JOB_TTL: Duration = Duration::from_millis(300);
pub const JOB_HOLD: Duration = Duration::from_millis(1500);

/// The bootstrap, with this upstream behind it.
pub fn envoy(upstream: SocketAddr) -> EnvoyConfig {
    let millis = |span: Duration| format!("{}ms", span.as_millis());
    let policy = json!({
        "instance": INSTANCE,
        "enforcement": "enforce",
        "owner": { "from": ["traceparent", "x-request-id"] },
        "backend": { "local": {} },
        "defaults": { "mode": "exclusive", "wait": millis(WAIT), "ttl": millis(TTL), "hold": millis(HOLD) },
        "limits": { "locks_per_request": LOCKS_PER_REQUEST, "waiters_per_lock": 8, "max_wait": "2s", "max_ttl": "5s" },
        "classes": [
            { "name": "account", "rank": 10 },
            { "name": "stock", "rank": 30, "hierarchy": true },
            { "name": "ledger", "rank": 40, "within": "unordered" },
            { "name": "item" },
            { "name": "job" },
            { "name": "pool", "permits": PERMITS },
        ],
        "annotations": { "header": "accept" },
        "rules": [
            { "name": "account-write", "match": { "methods": ["POST"], "path": "/account/{id}" },
              "locks": [{ "name": "account/{id}" }] },
            { "name": "account-read", "match": { "methods": ["GET"], "path": "/account/{id}" },
              "locks": [{ "name": "account/{id}", "mode": "shared" }] },
            { "name": "stock-write", "match": { "methods": ["POST"], "path": "/stock/{site}/{bin}" },
              "locks": [{ "name": "stock/{site}/{bin}" }] },
            { "name": "stock-read", "match": { "methods": ["GET"], "path": "/stock/{site}" },
              "locks": [{ "name": "stock/{site}", "mode": "shared" }] },
            { "name": "pool", "match": { "path": "/pool/{id}" }, "locks": [{ "name": "pool/{id}" }] },
            { "name": "job", "match": { "path": "/job/{id}" }, "locks": [{ "name": "job/{id}" }],
              "wait": millis(JOB_WAIT), "ttl": millis(JOB_TTL), "hold": millis(JOB_HOLD), "on_lease_lost": "abort" },
        ],
    });
    EnvoyConfig::local()
        .policy(policy)
        .upstream(upstream)
        .route(Route::prefix("/hasty").named("hasty").timeout(&format!("{}s", HASTY.as_secs_f64())))
        // A line a request would be gigabytes.
        .patch_hcm(|hcm| hcm["access_log"] = json!([]))
        .log_levels("wasm:warn")
}

/// A ledger that knows the classes of this policy.
pub fn ledger() -> Ledger {
    Ledger::default().permits("pool", PERMITS).hierarchy("stock")
}
