//! The servers of others that the bench compares with or puts behind a proxy: nginx, Redis, Webdis. On loopback, on ports
//! that were free a moment ago, each in a folder of its own and gone with the value that stands for it.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use interlock_testkit::{process, tools};
use tempfile::TempDir;

/// How long one may take to serve.
const START: Duration = Duration::from_secs(20);
/// How long one may take to end.
const STOP: Duration = Duration::from_secs(5);

/// A running server.
pub struct Server {
    child: Child,
    pub address: SocketAddr,
    dir: TempDir,
}

impl Server {
    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The folder that it runs in.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Starts what `command` makes for a folder and an address, and waits until somebody listens there.
    pub async fn start(name: &str, command: impl FnOnce(&Path, SocketAddr) -> Result<Command>) -> Result<Self> {
        Self::start_in(name, None, command).await
    }

    /// The same with its folder below this one.
    pub async fn start_in(
        name: &str,
        base: Option<&Path>,
        command: impl FnOnce(&Path, SocketAddr) -> Result<Command>,
    ) -> Result<Self> {
        let base = base.map_or_else(std::env::temp_dir, Path::to_owned);
        let dir = tempfile::Builder::new().prefix(&format!("interlock-{name}-")).tempdir_in(base)?;
        let address = free_address()?;
        let log = File::create(dir.path().join("log"))?;
        let mut command = command(dir.path(), address)?;
        command.current_dir(dir.path()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = process::spawn(command).with_context(|| format!("cannot start {name}"))?;
        let mut server = Server { child, address, dir };
        let start = Instant::now();
        while TcpStream::connect(address).is_err() {
            if server.child.try_wait()?.is_some() || start.elapsed() > START {
                let log = std::fs::read(server.dir().join("log")).unwrap_or_default();
                bail!("{name} does not serve: {}", String::from_utf8_lossy(&log));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing can be done about a process that can't be ended.
        let _ = process::terminate(&mut self.child, STOP);
    }
}

/// An address that was free a moment ago.
pub fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// A Redis that keeps nothing on disk.
pub async fn redis() -> Result<Server> {
    let redis = tools::of_debian("REDIS_SERVER", "redis-server", "redis-server")?;
    Server::start("redis", |_, address| {
        let mut command = Command::new(redis);
        command.args([
            "--bind",
            "127.0.0.1",
            "--port",
            &address.port().to_string(),
            "--save",
            "",
            "--appendonly",
            "no",
        ]);
        Ok(command)
    })
    .await
}

/// Webdis, which speaks HTTP for a Redis.
pub async fn webdis(redis: SocketAddr) -> Result<Server> {
    let webdis = tools::of_debian("WEBDIS", "webdis", "webdis")?;
    Server::start("webdis", |dir, address| {
        let config = serde_json::json!({
            "redis_host": redis.ip(), "redis_port": redis.port(), "http_host": address.ip(), "http_port": address.port(),
            "threads": 1, "pool_size": 16, "daemonize": false, "websockets": false, "database": 0, "verbosity": 1,
            "logfile": dir.join("webdis.log"), "acl": [],
        });
        let file = dir.join("webdis.json");
        std::fs::write(&file, config.to_string())?;
        let mut command = Command::new(webdis);
        command.arg(file);
        Ok(command)
    })
    .await
}
