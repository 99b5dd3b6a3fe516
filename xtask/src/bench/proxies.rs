//! What stands between load and upstream: the proxies that are compared, started side by side, each with what it needs
//! beside it.
//!
//! Which of them a question compares is in `overhead`; how they are measured is in `pairs`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use interlock_testkit::{Client, Envoy, EnvoyConfig, tools};
use serde_json::{Value, json};

use super::machine::{self, Cores};
use super::servers::Server;
use crate::wasm;

/// A process that runs.
pub enum Process {
    Envoy(Box<Envoy>),
    Server(Server),
}

impl Process {
    pub fn pid(&self) -> u32 {
        match self {
            Process::Envoy(envoy) => envoy.pid(),
            Process::Server(server) => server.pid(),
        }
    }

    pub fn address(&self) -> SocketAddr {
        match self {
            Process::Envoy(envoy) => envoy.address(),
            Process::Server(server) => server.address,
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address())
    }

    pub fn envoy(&self) -> Result<&Envoy> {
        match self {
            Process::Envoy(envoy) => Ok(envoy),
            Process::Server(_) => anyhow::bail!("it is not an Envoy"),
        }
    }
}

/// A proxy, and what works for it alone: an authority, a database.
pub struct Proxy {
    pub process: Process,
    pub beside: Vec<Process>,
}

impl Proxy {
    pub fn new(process: Process, beside: Vec<Process>) -> Self {
        Proxy { process, beside }
    }

    fn all(&self) -> impl Iterator<Item = &Process> {
        std::iter::once(&self.process).chain(&self.beside)
    }

    pub fn pin(&self, cores: &Cores) -> Result<()> {
        machine::pin(self.process.pid(), &cores.proxy)?;
        self.beside.iter().try_for_each(|process| machine::pin(process.pid(), &cores.rest))
    }

    pub fn freeze(&self) -> Result<()> {
        self.all().try_for_each(|process| machine::freeze(process.pid()))
    }

    pub fn thaw(&self) -> Result<()> {
        self.all().try_for_each(|process| machine::thaw(process.pid()))
    }
}

/// A plain Envoy before an upstream, without an access log, with these HTTP filters.
pub fn config(upstream: &Server, filters: &[Value]) -> EnvoyConfig {
    let config = EnvoyConfig::plain().upstream(upstream.address).log_levels("wasm:error").concurrency(1);
    let config = filters.iter().fold(config, |config, filter| config.filter_before(filter.clone()));
    let config = config.patch_hcm(|hcm| hcm["access_log"] = json!([]));
    config.patch(|bootstrap| bootstrap["stats_flush_interval"] = json!("5s"))
}

/// Starts it.
pub async fn envoy(config: EnvoyConfig) -> Result<Process> {
    Ok(Process::Envoy(Box::new(Envoy::start(config).await?)))
}

fn wasm_filter(name: &str, file: &std::path::Path, configuration: &str) -> Value {
    json!({
        "name": name,
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.wasm.v3.Wasm",
            "config": {
                "name": name,
                "failure_policy": "FAIL_RELOAD",
                "vm_config": {
                    "vm_id": name,
                    "runtime": "envoy.wasm.runtime.v8",
                    "code": { "local": { "filename": file } },
                    "environment_variables": { "key_values": { "INTERLOCK_KEY": KEY } },
                },
                "configuration": { "@type": "type.googleapis.com/google.protobuf.StringValue", "value": configuration },
            },
        },
    })
}

/// What authority and sidecars share. Of no worth: all of it is on loopback, for minutes.
const KEY: &str = "5c1f0e6ab3d94f7788215e9a40c6d3b2";

/// Interlock, with this policy.
pub fn interlock(policy: &Value) -> Result<Value> {
    Ok(wasm_filter("interlock", &tools::plugin_wasm()?, &policy.to_string()))
}

/// A filter that does nothing but call the cluster `answerer`: `none`, `one` or `two` times.
pub fn calling(calls: &str) -> Result<Value> {
    let file = wasm::bench_filters();
    ensure!(file.is_file(), "{} is not there: run without --no-build", file.display());
    Ok(wasm_filter("calling", &file, calls))
}

/// Sets a request header, of what Envoy knows of the request.
pub fn set_header(name: &str, value: &str) -> Value {
    json!({
        "name": "set",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
            "mutations": { "request_mutations": [
                { "append": { "header": { "key": name, "value": value }, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD" } },
            ] },
        },
    })
}

/// A policy as people write them, with rules for the paths that the questions ask for. Locks of `/free` are wanted by nobody else: they have
/// the request's id in their name.
pub fn policy(backend: Value) -> Value {
    let free = |n: usize| -> Vec<_> {
        (0..n).map(|n| json!({ "name": format!("order/{{header:x-request-id}}/{n}") })).collect()
    };
    let rule =
        |name: &str, path: &str, locks: Value| json!({ "name": name, "match": { "path": path }, "locks": locks });
    json!({
        "instance": "bench",
        "owner": { "from": ["traceparent", "x-request-id"] },
        "backend": backend,
        "defaults": { "mode": "exclusive", "wait": "20s", "ttl": "10s", "hold": "60s" },
        "limits": { "max_wait": "30s", "max_ttl": "10s" },
        "annotations": { "header": "accept" },
        "classes": [{ "name": "order", "rank": 10 }, { "name": "stock", "rank": 20 }],
        "rules": [
            rule("one", "/free/one", json!(free(1))),
            rule("three", "/free/three", json!(free(3))),
            rule("eight", "/free/eight", json!(free(8))),
            rule("key", "/key/{id}", json!([{ "name": "stock/{id}" }])),
        ],
    })
}

/// How many locks an Interlock has granted so far.
pub async fn acquired(envoy: &Envoy) -> Result<u64> {
    counted(envoy, "acquire_total", ".outcome.acquired").await
}

/// What one of an Interlock's counters or gauges says, of all whose labels have this in them.
pub async fn counted(envoy: &Envoy, name: &str, labels: &str) -> Result<u64> {
    let (all, name) = (envoy.stats().await?, format!("wasmcustom.interlock_{name}"));
    let ours = |full: &str| full.starts_with(&name) && full.contains(labels);
    Ok(all.iter().filter(|(full, _)| ours(full)).map(|(_, count)| count).sum())
}

/// How many requests an Envoy has answered so far with a 2xx.
pub async fn answered(envoy: &Envoy) -> Result<u64> {
    envoy.stats().await?.get("http.plain.downstream_rq_2xx").copied().context("Envoy does not count its answers")
}

/// Makes a cluster at this address that is asked over HTTP/2.
pub fn http2(config: EnvoyConfig, name: &str, address: SocketAddr) -> EnvoyConfig {
    config.cluster(name, address).patch(|bootstrap| {
        let clusters = bootstrap["static_resources"]["clusters"].as_array_mut();
        for cluster in clusters.into_iter().flatten().filter(|cluster| cluster["name"] == name) {
            let options = &mut cluster["typed_extension_protocol_options"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"];
            *options = json!({
                "@type": options["@type"],
                "explicit_http_config": { "http2_protocol_options": {} },
            });
            let most = json!({ "max_connections": 1024, "max_pending_requests": 20000, "max_requests": 20000 });
            cluster["circuit_breakers"] = json!({ "thresholds": [most] });
        }
    })
}

/// An authority that grants.
pub async fn authority(workers: u32) -> Result<Process> {
    authority_within(workers, json!({ "max_wait": "30s", "max_ttl": "2s" })).await
}

/// One with these limits. It grants nothing until the longest lease of a predecessor would have ended.
pub async fn authority_within(workers: u32, limits: Value) -> Result<Process> {
    let policy = json!({
        "instance": "authority",
        "api": { "prefix": "/interlock/v1" },
        "keys": [{ "id": "bench", "secret": { "env": "INTERLOCK_KEY" } }],
        "defaults": { "wait": "20s", "ttl": "2s", "hold": "1h" },
        "limits": limits,
    });
    let mut filter = interlock(&policy)?;
    filter["typed_config"]["config"]["allow_on_headers_stop_iteration"] = json!(true);
    let config = EnvoyConfig::plain().log_levels("wasm:error").concurrency(workers).filter_before(filter);
    let config = config.patch_hcm(|hcm| hcm["access_log"] = json!([]));
    let config = config.patch(|bootstrap| bootstrap["stats_flush_interval"] = json!("5s"));
    let nothing = json!({ "match": { "prefix": "/" }, "direct_response": { "status": 404 } });
    let envoy = Envoy::start(config.patch_routes(|routes| *routes = vec![nothing.clone()])).await?;
    let health = format!("{}/interlock/v1/health", envoy.base_url());
    let start = Instant::now();
    while Client::http1().get(&health).send().await?.status != 200 {
        ensure!(start.elapsed() < Duration::from_secs(20), "the authority grants nothing");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(Process::Envoy(Box::new(envoy)))
}

/// A sidecar whose locks are an authority's, with that authority.
pub async fn sidecar(upstream: &Server, changed: impl FnOnce(EnvoyConfig) -> EnvoyConfig) -> Result<Proxy> {
    let authority = authority(1).await?;
    let mut policy = policy(json!({
        "authority": { "cluster": AUTHORITY, "prefix": "/interlock/v1", "timeout": "2s" },
    }));
    policy["defaults"]["ttl"] = json!("2s");
    policy["limits"]["max_ttl"] = json!("2s");
    let config = changed(config(upstream, &[interlock(&policy)?]));
    let config = http2(config, AUTHORITY, authority.address());
    Ok(Proxy::new(envoy(config).await?, vec![authority]))
}

/// The cluster of the authority.
const AUTHORITY: &str = "interlock-authority";

/// Envoy's own way to ask somebody whether a request may go on.
pub fn ext_authz() -> Value {
    json!({
        "name": "ext_authz",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
            "http_service": { "server_uri": { "uri": "http://answerer", "cluster": "answerer", "timeout": "5s" } },
        },
    })
}

/// What people write by hand: a lock in Redis, set before the request and deleted after it, by way of Webdis.
pub fn lua_with_webdis() -> Value {
    json!({
        "name": "lua",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua",
            "default_source_code": { "inline_string": include_str!("webdis.lua") },
        },
    })
}
