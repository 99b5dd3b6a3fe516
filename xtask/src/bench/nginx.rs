//! nginx: what answers behind all proxies, what calls are made to, and a proxy with a lock of its own to compare with.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use interlock_testkit::{Client, tools};
use serde_json::json;

use super::machine::{self, Cores};
use super::overhead::{self, LOCAL, PLAIN};
use super::pairs::{COLUMNS, Field, Must, Pace, Variant};
use super::proxies::{self, Process, Proxy};
use super::report::Finding;
use super::servers::Server;

/// An nginx of one process, with this inside of `http { }`; `LISTEN` stands for its address.
async fn nginx(http: &str, modules: &[&str]) -> Result<Server> {
    let nginx = tools::nginx()?;
    let modules = modules.iter().copied().map(module).collect::<Result<String>>()?;
    Server::start("nginx", |dir, address| {
        let temporary =
            ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(|kind| format!("{kind}_temp_path {kind};\n"));
        let config = format!(
            "{modules}daemon off; master_process off; pid pid; error_log stderr warn;\n\
             events {{ worker_connections 8192; }}\n\
             http {{\naccess_log off; keepalive_requests 1000000000; keepalive_timeout 1h;\n{}{}\n}}\n",
            temporary.concat(),
            http.replace("LISTEN", &address.to_string()),
        );
        let file = dir.join("nginx.conf");
        std::fs::write(&file, config)?;
        let mut command = Command::new(nginx);
        command.arg("-p").arg(dir).arg("-c").arg(file).args(["-e", "stderr"]);
        Ok(command)
    })
    .await
}

fn module(name: &str) -> Result<String> {
    let file = Path::new("/usr/lib/nginx/modules").join(name);
    let package = "libnginx-mod-http-lua";
    if !(file.is_file() || tools::apt_install(package) && file.is_file()) {
        let why = format!("there is no {}: apt-get install {package}", file.display());
        return Err(tools::Missing(why).into());
    }
    Ok(format!("load_module {};\n", file.display()))
}

/// What answers: the least that a request can be for an upstream, over HTTP/1.1.
pub async fn upstream() -> Result<Server> {
    nginx("server { listen LISTEN; location / { return 200 ok; } }", &[]).await
}

/// What answers calls, over HTTP/2.
pub async fn answerer() -> Result<Server> {
    nginx("server { listen LISTEN http2; location / { return 200 ok; } }", &[]).await
}

/// A proxy without a lock.
async fn proxy(upstream: SocketAddr) -> Result<Server> {
    nginx(&PROXY.replace("UPSTREAM", &upstream.to_string()).replace("LOCKED", ""), &[]).await
}

/// A proxy with a lock around each request, which a Lua expression names.
pub async fn locking(upstream: SocketAddr, key: &str) -> Result<Server> {
    let take = include_str!("resty.lua").replace("KEY", key);
    let give = "local key = ngx.ctx.key if key then ngx.shared.locks:delete(key) end";
    let locked = format!("access_by_lua_block {{ {take} }} log_by_lua_block {{ {give} }}");
    let http = PROXY.replace("UPSTREAM", &upstream.to_string()).replace("LOCKED", &locked);
    nginx(&format!("lua_shared_dict locks 10m;\n{http}"), LUA).await
}

/// One that all requests want, which tells of each in [`MOMENTS`] when it came, got the lock and gave it back.
pub async fn telling(upstream: SocketAddr) -> Result<Server> {
    let take = format!("{}\nngx.var.granted = micros()", include_str!("resty.lua").replace("KEY", "'one'"));
    let give = "local key = ngx.ctx.key if key then ngx.shared.locks:delete(key) ngx.var.released = micros() end";
    let arrived = "set $arrived ''; set $granted ''; set $released '';";
    let locked = format!(
        "{arrived} access_by_lua_block {{ ngx.var.arrived = micros() {take} }} log_by_lua_block {{ {give} }}
        access_log {MOMENTS} moments;"
    );
    let http = PROXY.replace("UPSTREAM", &upstream.to_string()).replace("LOCKED", &locked);
    let clock = include_str!("clock.lua");
    let format = "log_format moments '$arrived $granted $released $status';";
    nginx(&format!("lua_shared_dict locks 10m;\ninit_by_lua_block {{ {clock} }}\n{format}\n{http}"), LUA).await
}

/// The file in its folder.
pub const MOMENTS: &str = "moments.log";

/// What Lua needs.
const LUA: &[&str] = &["ndk_http_module.so", "ngx_http_lua_module.so"];
const PROXY: &str = include_str!("nginx.conf");

/// A lock in nginx beside a lock in Envoy, each to its own proxy without.
pub async fn beside(pace: Pace) -> Result<Finding> {
    let title = "Locks in nginx (resty-lock's algorithm) and in Envoy, each to its own plain proxy";
    let mut finding = Finding::new("nginx", title, &COLUMNS);
    let upstream = upstream().await?;
    let local = proxies::interlock(&proxies::policy(json!({ "local": {} })))?;
    let alone = |server| Proxy::new(Process::Server(server), Vec::new());
    let locked = locking(upstream.address, "ngx.var.connection").await?;
    prove().await?;
    let field = Field {
        proxies: vec![
            overhead::plain(&upstream, &[]).await?,
            overhead::plain(&upstream, &[local]).await?,
            alone(proxy(upstream.address).await?),
            alone(locked),
        ],
        variants: vec![
            Variant::new(PLAIN, 0, "/free/one", Must::Answer),
            Variant::new(LOCAL, 1, "/free/one", Must::Lock(1)),
            Variant::new("plain nginx", 2, "/", Must::Answer).against(2),
            Variant::new(LOCKED, 3, "/", Must::Answer).against(2),
            Variant::new(&few(PLAIN), 0, "/free/one", Must::Answer).against(4).connections(FEW),
            Variant::new(&few(LOCAL), 1, "/free/one", Must::Lock(1)).against(4).connections(FEW),
            Variant::new(&few("plain nginx"), 2, "/", Must::Answer).against(6).connections(FEW),
            Variant::new(&few(LOCKED), 3, "/", Must::Answer).against(6).connections(FEW),
        ],
        also: Vec::new(),
        cores: Cores::of(1)?,
    };
    machine::pin(upstream.pid(), &field.cores.rest)?;
    field.measure(pace, &mut finding).await?;
    finding.note("nginx locks the connection's number, Interlock the request's id: nobody waits for either.");
    Ok(finding)
}

pub const LOCKED: &str = "nginx, a lock in its shared dictionary";

/// A load that leaves the proxies some time.
const FEW: u32 = 16;

fn few(name: &str) -> String {
    format!("{name}, {FEW} connections")
}

/// That nginx's lock is one: two requests that want the same one and take a moment each take twice as long.
async fn prove() -> Result<()> {
    let slow =
        nginx("server { listen LISTEN; location / { content_by_lua_block { ngx.sleep(0.1) ngx.say('ok') } } }", LUA)
            .await?;
    let locked = locking(slow.address, "'one'").await?;
    let start = Instant::now();
    let ask = || Client::http1().get(format!("http://{}/", locked.address)).spawn();
    for asked in [ask(), ask()] {
        let status = asked.answer().await?.status;
        ensure!(status == 200, "nginx with a lock answers {status}");
    }
    ensure!(start.elapsed() >= Duration::from_millis(200), "nginx's lock excludes nobody");
    Ok(())
}
