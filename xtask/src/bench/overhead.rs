//! What a request through a proxy costs, with locks and without: which proxies are compared for each question.

use anyhow::Result;
use serde_json::json;

use super::machine::Cores;
use super::nginx;
use super::pairs::{COLUMNS, Field, Must, Pace, Variant};
use super::proxies::{self, Process, Proxy};
use super::report::Finding;
use super::servers::{self, Server};

/// What a lock costs in an Envoy with one worker.
pub async fn cost(pace: Pace) -> Result<Finding> {
    let finding = Finding::new("cost", "One Envoy worker: what a lock in the proxy costs", &COLUMNS);
    beside_nothing(pace, finding, 1).await
}

/// The same with two workers, which share the lock table.
pub async fn workers(pace: Pace) -> Result<Finding> {
    beside_nothing(pace, Finding::new("workers", "Two Envoy workers", &COLUMNS), 2).await
}

/// Plain Envoy, a filter that does nothing, Interlock where nothing is annotated, and a lock.
async fn beside_nothing(pace: Pace, mut finding: Finding, workers: u32) -> Result<Finding> {
    let upstream = nginx::upstream().await?;
    let local = proxies::interlock(&proxies::policy(json!({ "local": {} })))?;
    let proxy = async |filters: &[serde_json::Value]| {
        let config = proxies::config(&upstream, filters).concurrency(workers);
        anyhow::Ok(Proxy::new(proxies::envoy(config).await?, Vec::new()))
    };
    let field = Field {
        proxies: vec![proxy(&[]).await?, proxy(&[proxies::calling("none")?]).await?, proxy(&[local]).await?],
        variants: vec![
            Variant::new(PLAIN, 0, "/free/one", Must::Answer),
            Variant::new(NO_OP, 1, "/free/one", Must::Answer),
            Variant::new(UNANNOTATED, 2, "/", Must::Answer),
            Variant::new(LOCAL, 2, "/free/one", Must::Lock(1)),
        ],
        also: vec![(UNANNOTATED_TO_NO_OP, 2, 1), (LOCAL_TO_NO_OP, 3, 1)],
        cores: rig(&upstream, workers as usize)?,
    };
    field.measure(pace, &mut finding).await?;
    if field.cores.proxy == field.cores.rest {
        finding.note("Too few cores for load and upstream to have their own: read the CPU, not the throughput.");
    }
    Ok(finding)
}

pub const PLAIN: &str = "plain Envoy";
pub const NO_OP: &str = "wasm filter that does nothing";
pub const UNANNOTATED: &str = "Interlock, nothing annotated";
pub const LOCAL: &str = "Interlock, a local lock";
pub const UNANNOTATED_TO_NO_OP: &str = "nothing annotated, to the filter that does nothing";
pub const LOCAL_TO_NO_OP: &str = "a local lock, to the filter that does nothing";

/// More than one lock, locks that others want as well, and locks that a header asks for.
pub async fn locks(pace: Pace) -> Result<Finding> {
    let mut finding = Finding::new("locks", "One Envoy worker: kinds and numbers of local locks", &COLUMNS);
    let upstream = nginx::upstream().await?;
    let local = proxies::interlock(&proxies::policy(json!({ "local": {} })))?;
    let header = proxies::set_header("lock", "order/%REQ(X-REQUEST-ID)%");
    let keys = |name: &str, count: usize| {
        let paths = (0..count).map(|key| format!("/key/{key}")).collect();
        Variant { paths, ..Variant::new(name, 2, "", Must::Lock(1)) }
    };
    let field = Field {
        proxies: vec![
            plain(&upstream, &[]).await?,
            plain(&upstream, &[proxies::calling("none")?]).await?,
            plain(&upstream, std::slice::from_ref(&local)).await?,
            plain(&upstream, std::slice::from_ref(&header)).await?,
            plain(&upstream, &[header, local]).await?,
        ],
        variants: vec![
            Variant::new(PLAIN, 0, "/free/one", Must::Answer),
            Variant::new(NO_OP, 1, "/free/one", Must::Answer),
            Variant::new("1 lock by a rule", 2, "/free/one", Must::Lock(1)),
            Variant::new("3 locks by a rule", 2, "/free/three", Must::Lock(3)),
            Variant::new("8 locks by a rule", 2, "/free/eight", Must::Lock(8)),
            Variant::new("plain Envoy that sets a header", 3, "/", Must::Answer),
            Variant::new("1 lock by a header, to that one", 4, "/", Must::Lock(1)).against(5),
            keys("64 connections want 16 locks", 16),
            keys("64 connections want 4 locks", 4),
            keys("64 connections want 1 lock", 1),
        ],
        also: vec![(ONE_LOCK, 2, 1), (EIGHT_LOCKS, 4, 1)],
        cores: rig(&upstream, 1)?,
    };
    field.measure(pace, &mut finding).await?;
    finding.note("Where many want few locks, most wait: throughput is then how often a lock changes hands.");
    Ok(finding)
}

pub const ONE_LOCK: &str = "1 lock, to the filter that does nothing";
pub const EIGHT_LOCKS: &str = "8 locks, to the filter that does nothing";

/// Locks that are kept elsewhere, and what asking elsewhere costs at least.
pub async fn remote(pace: Pace) -> Result<Finding> {
    let mut finding = Finding::new("remote", "One Envoy worker: locks that another process keeps", &COLUMNS);
    let upstream = nginx::upstream().await?;
    let answerer = nginx::answerer().await?;
    let calling = async |filter: serde_json::Value| {
        let config = proxies::http2(proxies::config(&upstream, &[filter]), "answerer", answerer.address);
        anyhow::Ok(Proxy::new(proxies::envoy(config).await?, Vec::new()))
    };
    let mut field = Field {
        proxies: vec![
            plain(&upstream, &[]).await?,
            calling(proxies::calling("one")?).await?,
            calling(proxies::calling("two")?).await?,
            calling(proxies::ext_authz()).await?,
            proxies::sidecar(&upstream, |config| config).await?,
        ],
        variants: vec![
            Variant::new(PLAIN, 0, "/free/one", Must::Answer),
            Variant::new("wasm filter, one call before", 1, "/free/one", Must::Call("answerer", 1)),
            Variant::new(TWO_CALLS, 2, "/free/one", Must::Call("answerer", 2)),
            Variant::new("ext_authz, one call before", 3, "/free/one", Must::Call("answerer", 1)),
            Variant::new(AUTHORITY, 4, "/free/one", Must::Lock(1)),
        ],
        also: vec![("an authority's lock, to two calls", 4, 2)],
        cores: rig(&upstream, 1)?,
    };
    super::machine::pin(answerer.pid(), &field.cores.rest)?;
    match lua_and_webdis(&upstream).await {
        Ok(proxy) => {
            field.proxies.push(proxy);
            field.variants.push(Variant::new(WEBDIS, 5, "/free/one", Must::Call("webdis", 2)));
            field.also.push((AUTHORITY_TO_WEBDIS, 4, 5));
        }
        Err(why) => finding.skip(WEBDIS, why)?,
    }
    field.measure(pace, &mut finding).await?;
    Ok(finding)
}

pub const TWO_CALLS: &str = "wasm filter, one call before and one after";
pub const AUTHORITY: &str = "Interlock, an authority's lock";
pub const WEBDIS: &str = "Lua filter, SET NX and DEL by Webdis";
pub const AUTHORITY_TO_WEBDIS: &str = "an authority's lock, to Lua and Webdis";

async fn lua_and_webdis(upstream: &Server) -> Result<Proxy> {
    let redis = servers::redis().await?;
    let webdis = servers::webdis(redis.address).await?;
    let config = proxies::config(upstream, &[proxies::lua_with_webdis()]).cluster("webdis", webdis.address);
    let beside = vec![Process::Server(webdis), Process::Server(redis)];
    Ok(Proxy::new(proxies::envoy(config).await?, beside))
}

/// A plain Envoy with these filters.
pub async fn plain(upstream: &Server, filters: &[serde_json::Value]) -> Result<Proxy> {
    Ok(Proxy::new(proxies::envoy(proxies::config(upstream, filters)).await?, Vec::new()))
}

/// The cores for proxies of so many workers; the upstream gets the others.
fn rig(upstream: &Server, workers: usize) -> Result<Cores> {
    let cores = Cores::of(workers)?;
    super::machine::pin(upstream.pid(), &cores.rest)?;
    Ok(cores)
}
