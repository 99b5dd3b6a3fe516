//! Requests and policies that no honest party sends: a clear answer each, no trap, no hang, no lock header that gets
//! through. Whoever comes after them is served.
//!
//! * [`annotations`]: bad `lock` headers, one by one, and what exactly is said of them.
//! * [`storm`]: thousands of generated requests. How they are bad is in [`classes`] ([`values`], [`forged`], [`framing`]), how
//!   they are put on the wire in [`shot`] and [`h2`], what must hold of each in [`judge`].
//! * [`handmade`]: what no generator hits upon.
//! * [`leavers`]: clients that break off, stall, or send a byte at a time.
//! * [`leases`]: hundreds of generated requests to the lease API.
//! * [`policies`]: hundreds of policies that are none.
//!
//! Everything is made from one seed ([`dice`]), which a failure prints: `INTERLOCK_HOSTILE_SEED` sets another,
//! `INTERLOCK_HOSTILE_REQUESTS` how many requests.

mod annotations;
mod classes;
mod dice;
mod forged;
mod framing;
mod h2;
mod handmade;
mod judge;
mod leases;
mod leavers;
mod policies;
mod shot;
mod storm;
mod values;

use interlock_testkit::{EnvoyConfig, Route};
use serde_json::{Value, json};

use crate::common::{Plan, Stage};

/// A key, so that fences are signed.
fn keys() -> Value {
    json!([{ "id": "k", "secret": { "base64": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=" } }])
}

/// A policy with something of everything, and waits so short that nobody hangs.
fn policy(header: &str, enforcement: &str) -> Value {
    json!({
        "enforcement": enforcement,
        "owner": { "from": ["traceparent", "x-request-id", "lock-owner", "baggage"] },
        "defaults": { "wait": "100ms", "ttl": "2s", "hold": "4s" },
        "limits": { "max_wait": "300ms", "max_ttl": "10s" },
        "annotations": { "header": header },
        "keys": keys(),
        "classes": [
            { "name": "account", "rank": 10 },
            { "name": "order", "within": "unordered" },
            { "name": "pool", "permits": 2 },
            { "name": "rapid" },
            { "name": "stock", "hierarchy": true },
        ],
        "rules": [
            {
                "name": "filled",
                "match": { "path": "/filled/{id}" },
                "locks": [{ "name": "order/{id}" }, { "name": "tier/{header:x-tier}", "mode": "shared" }],
            },
            { "name": "queried", "match": { "path": "/queried" }, "locks": [{ "name": "stock/{query:q}", "mode": "shared" }] },
            { "name": "answered", "match": { "path": "/answered/{id}" }, "locks": [{ "name": "order/{id}" }] },
            { "name": "done", "match": { "path": "/orders/{id}/do" }, "locks": [{ "name": "order/{id}" }] },
            { "name": "files", "match": { "path": "/files/{*rest}" }, "locks": [{ "name": "stock/{rest}" }] },
        ],
    })
}

static STAGE: Stage = Stage::new(|| {
    vec![
        ("accept", Plan::new(policy("accept", "enforce")).patch(trailers)),
        ("roomy", Plan::new(policy("accept", "enforce")).patch(lenient)),
        ("pass", Plan::new(policy("pass", "enforce")).patch(trailers)),
        ("strip", Plan::new(policy("strip", "enforce")).patch(trailers)),
        ("audit", Plan::new(policy("accept", "audit")).patch(trailers)),
        ("off", Plan::new(policy("accept", "off")).patch(trailers).bare()),
        ("parked", Plan::new(patient(policy("accept", "enforce"))).patch(trailers)),
        ("rapid", Plan::new(patient(policy("accept", "enforce"))).patch(trailers)),
        ("pipeline", Plan::new(patient(policy("accept", "enforce"))).patch(trailers)),
        ("leavers", Plan::new(policy("accept", "enforce")).patch(trailers)),
        ("leases", Plan::new(authority()).patch(bodies)),
    ]
});

/// An authority for leases, which soon grants.
fn authority() -> Value {
    let mut policy = policy("accept", "enforce");
    policy["limits"]["max_ttl"] = json!("2s");
    policy["defaults"]["ttl"] = json!("2s");
    policy["api"] = json!({ "admin": { "token": { "base64": "MDEyMzQ1Njc4OWFiY2RlZg==" } } });
    policy
}

fn bodies(config: EnvoyConfig) -> EnvoyConfig {
    trailers(config).patch_plugin(|plugin| plugin["allow_on_headers_stop_iteration"] = json!(true))
}

/// The same, for requests that are known to wait.
fn patient(mut policy: Value) -> Value {
    policy["limits"]["max_wait"] = json!("30s");
    policy["defaults"]["hold"] = json!("60s");
    policy
}

/// Envoy passes trailers over HTTP/1.1 only if it is told to, on both sides.
fn trailers(config: EnvoyConfig) -> EnvoyConfig {
    let config = config.route(Route::prefix("/answered/").patch(|route| {
        route.as_object_mut().unwrap().remove("route");
        route["direct_response"] = json!({ "status": 200 });
    }));
    let config = config.patch_hcm(|hcm| {
        hcm["http_protocol_options"]["enable_trailers"] = json!(true);
        // What Envoy gives a client to read its last words, 1 s by default, is not to be taken for a hang.
        hcm["delayed_close_timeout"] = json!("0.1s");
    });
    config.patch(|bootstrap| {
        for cluster in bootstrap["static_resources"]["clusters"].as_array_mut().unwrap() {
            let options = &mut cluster["typed_extension_protocol_options"];
            let options = &mut options["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"];
            if !options.is_null() {
                let both = &mut options["use_downstream_protocol_config"];
                both["http_protocol_options"] = json!({ "enable_trailers": true });
            }
        }
    })
}

/// As much as Envoy can be made to let through.
fn lenient(config: EnvoyConfig) -> EnvoyConfig {
    trailers(config).patch_hcm(|hcm| {
        hcm["max_request_headers_kb"] = json!(512);
        hcm["common_http_protocol_options"]["max_headers_count"] = json!(6000);
        hcm["stream_error_on_invalid_http_message"] = json!(true);
        hcm["path_with_escaped_slashes_action"] = json!("KEEP_UNCHANGED");
        hcm["normalize_path"] = json!(false);
        hcm["merge_slashes"] = json!(false);
        let http1 = &mut hcm["http_protocol_options"];
        http1["allow_chunked_length"] = json!(true);
        http1["accept_http_10"] = json!(true);
        http1["allow_absolute_url"] = json!(true);
        http1["allow_custom_methods"] = json!(true);
        hcm["http2_protocol_options"] = json!({ "allow_connect": true, "allow_metadata": true });
        hcm["upgrade_configs"] = json!([{ "upgrade_type": "websocket" }]);
    })
}
