//! A real Envoy: started from an [`EnvoyConfig`] on ports the kernel picks, asked through its admin endpoint, and ended
//! with the value that stands for it.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::client::Client;
use crate::config::{EnvoyConfig, LDS_FILE, discovery_response, each_plugin, string_value};
use crate::stats::{self, Sample};
use crate::wait::{DEADLINE, wait_for_async};
use crate::{process, tools};

/// How long Envoy may take to serve: it compiles the plugin once a worker.
const START: Duration = Duration::from_secs(60);
/// How long Envoy may take to end before it is killed.
const STOP: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);

/// A running Envoy. Dropping it ends the process; so does the end of this one, however it comes.
#[derive(Debug)]
pub struct Envoy {
    child: Child,
    dir: TempDir,
    admin: SocketAddr,
    listeners: BTreeMap<String, SocketAddr>,
    first: SocketAddr,
    client: Client,
    delivered: Option<Value>,
    version: u64,
}

/// What became of an update of the listeners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Update {
    /// Envoy runs the new configuration. Its workers follow within a moment; connections made before keep the old one
    /// until they close (or until Envoy's `--drain-time-s` is over).
    Taken,
    /// Envoy refused it and keeps what it had.
    Refused,
}

impl Envoy {
    /// Starts an Envoy and waits until it serves.
    ///
    /// # Errors
    /// When there is no Envoy, or it ended instead of serving: the error then carries what it wrote.
    pub async fn start(config: EnvoyConfig) -> Result<Self> {
        let binary = tokio::task::spawn_blocking(tools::envoy).await??;
        let dir = tempfile::Builder::new().prefix("interlock-envoy-").tempdir()?;
        let (bootstrap, delivered) = config.place(dir.path())?;
        let bootstrap_file = dir.path().join("bootstrap.json");
        write_json(&bootstrap_file, &bootstrap)?;
        if let Some(listeners) = &delivered {
            write_json(&dir.path().join(LDS_FILE), &discovery_response(listeners, 1))?;
        }
        let log = File::create(dir.path().join("envoy.log"))?;
        let mut command = Command::new(&binary);
        command
            .arg("--config-path")
            .arg(&bootstrap_file)
            .args(["--concurrency", &config.concurrency.to_string()])
            .args(["--use-dynamic-base-id", "--base-id-path"])
            .arg(dir.path().join("base-id"))
            .arg("--admin-address-path")
            .arg(dir.path().join("admin"))
            .args(["--file-flush-interval-msec", "20"])
            .args(["--log-level", "warning", "--component-log-level", &config.log_levels])
            .args(&config.args)
            .envs(config.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            // Never a pipe: a full one would stop Envoy.
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = process::spawn(command).with_context(|| format!("cannot start {}", binary.display()))?;
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut envoy = Self {
            child,
            dir,
            admin: nowhere,
            listeners: BTreeMap::new(),
            first: nowhere,
            client: Client::http1(),
            delivered,
            version: 1,
        };
        envoy.until_ready(&bootstrap).await?;
        Ok(envoy)
    }

    async fn until_ready(&mut self, bootstrap: &Value) -> Result<()> {
        let start = Instant::now();
        while !self.serves().await? {
            if let Some(status) = self.child.try_wait()? {
                bail!("Envoy ended at its start ({status}):\n{}", self.logs());
            }
            if start.elapsed() > START {
                bail!("Envoy does not serve after {START:?}:\n{}", self.logs());
            }
            tokio::time::sleep(POLL).await;
        }
        let wanted = self.delivered.as_ref().unwrap_or(&bootstrap["static_resources"]["listeners"]);
        let first = wanted.pointer("/0/name").and_then(Value::as_str).context("the bootstrap has no named listener")?;
        self.first = *self.listeners.get(first).with_context(|| format!("Envoy has no listener {first}"))?;
        Ok(())
    }

    /// Whether it is ready and listens; fills in where.
    async fn serves(&mut self) -> Result<bool> {
        let Ok(Ok(admin)) = std::fs::read_to_string(self.dir.path().join("admin")).map(|text| text.trim().parse())
        else {
            return Ok(false);
        };
        self.admin = admin;
        match self.client.get(format!("{}/ready", self.admin_url())).send().await {
            Ok(answer) if answer.status == 200 => {}
            _ => return Ok(false),
        }
        let listeners: Value = serde_json::from_str(&self.admin_get("/listeners?format=json").await?)?;
        for listener in listeners["listener_statuses"].as_array().into_iter().flatten() {
            let socket = &listener["local_address"]["socket_address"];
            let port = socket["port_value"].as_u64().and_then(|p| u16::try_from(p).ok());
            let (Some(name), Some(port)) = (listener["name"].as_str(), port) else { continue };
            if port == 0 {
                return Ok(false);
            }
            self.listeners.insert(name.to_owned(), SocketAddr::from(([127, 0, 0, 1], port)));
        }
        // With listeners from a file, one that Envoy refused leaves it ready and deaf.
        if self.listeners.is_empty() && self.stat("listener_manager.lds.update_rejected").await? > 0 {
            bail!("Envoy refused its listeners:\n{}", self.logs());
        }
        Ok(!self.listeners.is_empty())
    }

    /// Where the first listener of the bootstrap is: `http://127.0.0.1:PORT`, without a slash.
    pub fn base_url(&self) -> String {
        format!("http://{}", self.first)
    }

    /// The address of the first listener of the bootstrap.
    pub fn address(&self) -> SocketAddr {
        self.first
    }

    /// The address of the listener of this name.
    pub fn listener(&self, name: &str) -> Option<SocketAddr> {
        self.listeners.get(name).copied()
    }

    /// The admin endpoint's address.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// The admin endpoint: `http://127.0.0.1:PORT`, without a slash.
    pub fn admin_url(&self) -> String {
        format!("http://{}", self.admin)
    }

    /// The process's id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The resident memory of the process in bytes (Linux).
    pub fn memory(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let kib =
            status.lines().find_map(|l| l.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        Ok(kib.context("no VmRSS in /proc")? * 1024)
    }

    /// The folder of this instance: bootstrap, logs.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What a GET of this path of the admin endpoint says.
    pub async fn admin_get(&self, path: &str) -> Result<String> {
        let answer = self.client.get(format!("{}{path}", self.admin_url())).send().await?;
        if answer.status != 200 {
            bail!("admin {path} answers {}: {}", answer.status, answer.text());
        }
        Ok(answer.text())
    }

    /// Every counter and gauge by its full name.
    pub async fn stats(&self) -> Result<BTreeMap<String, u64>> {
        stats::parse_json(&self.admin_get("/stats?format=json").await?)
    }

    /// One counter or gauge by its full name; 0 where there is none (yet).
    pub async fn stat(&self, name: &str) -> Result<u64> {
        Ok(self.stats().await?.get(name).copied().unwrap_or(0))
    }

    /// Waits until a counter or gauge is as wanted, and returns it.
    ///
    /// # Panics
    /// When it is not after `deadline`.
    pub async fn wait_stat(&self, name: &str, wanted: impl Fn(u64) -> bool, deadline: Duration) -> u64 {
        let mut seen = 0;
        wait_for_async(&format!("the stat {name}"), deadline, async || {
            seen = self.stat(name).await.unwrap_or(0);
            wanted(seen)
        })
        .await;
        seen
    }

    /// Every sample of `/stats/prometheus`, with the labels that the bootstrap's `stats_tags` give.
    pub async fn metrics(&self) -> Result<Vec<Sample>> {
        stats::parse_prometheus(&self.admin_get("/stats/prometheus").await?)
    }

    /// The sum of the Prometheus samples called `name` with all of `labels`; 0 where there is none. A histogram `h` is
    /// seen as `h_count`, `h_sum` and `h_bucket`.
    pub async fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(stats::sum(&self.metrics().await?, name, labels))
    }

    /// Waits until [`Envoy::metric`] is as wanted, and returns it.
    ///
    /// # Panics
    /// When it is not after `deadline`.
    pub async fn wait_metric(
        &self,
        name: &str,
        labels: &[(&str, &str)],
        wanted: impl Fn(f64) -> bool,
        deadline: Duration,
    ) -> f64 {
        let mut seen = 0.0;
        wait_for_async(&format!("the metric {name}{labels:?}"), deadline, async || {
            seen = self.metric(name, labels).await.unwrap_or(f64::NAN);
            wanted(seen)
        })
        .await;
        seen
    }

    /// What Envoy wrote to its standard error and output so far.
    pub fn logs(&self) -> String {
        read_lossy(&self.dir.path().join("envoy.log"))
    }

    /// Waits until the log has `text`.
    ///
    /// # Panics
    /// When it has not after [`DEADLINE`].
    pub async fn wait_log(&self, text: &str) {
        crate::wait_for(&format!("{text:?} in Envoy's log"), DEADLINE, || self.logs().contains(text)).await;
    }

    /// The access log so far: one JSON object a finished request. It lags by up to 20 ms.
    pub fn access_log(&self) -> Vec<Value> {
        let text = read_lossy(&self.dir.path().join("access.log"));
        // A last line without its end is still being written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Gives all filters of ours this policy while Envoy runs, and waits until Envoy has taken or refused it. Needs
    /// [`EnvoyConfig::listener_from_file`].
    ///
    /// # Errors
    /// When Envoy says neither in time.
    pub async fn update_policy(&mut self, policy: &Value) -> Result<Update> {
        self.update_listeners(|listener| {
            let text = policy.to_string();
            each_plugin(listener, &mut |config| config["configuration"] = string_value(&text));
        })
        .await
    }

    /// Changes every listener while Envoy runs, and waits until Envoy has taken or refused the change. A change that
    /// leaves everything as it is counts as taken. Needs [`EnvoyConfig::listener_from_file`].
    ///
    /// # Errors
    /// When Envoy says neither in time.
    pub async fn update_listeners(&mut self, patch: impl FnMut(&mut Value)) -> Result<Update> {
        self.replace_listeners(|listeners| listeners.iter_mut().for_each(patch)).await
    }

    /// Changes the list of listeners while Envoy runs (some may go, others come), and waits as
    /// [`Envoy::update_listeners`] does. [`Envoy::listener`] goes on knowing those of the start only.
    ///
    /// # Errors
    /// When Envoy says neither in time.
    pub async fn replace_listeners(&mut self, patch: impl FnOnce(&mut Vec<Value>)) -> Result<Update> {
        let current = self.delivered.as_ref().context("listeners come from the bootstrap: use listener_from_file()")?;
        let mut next = current.clone();
        if let Some(listeners) = next.as_array_mut() {
            patch(listeners);
        }
        let before = self.stats().await?;
        self.version += 1;
        write_json(&self.dir.path().join(LDS_FILE), &discovery_response(&next, self.version))?;
        let start = Instant::now();
        let rose = |now: &BTreeMap<String, u64>, name: &str| now.get(name) > before.get(name);
        loop {
            let now = self.stats().await?;
            // Rejected: a listener can't be made of it. Failure: it is no listener to begin with.
            if ["update_rejected", "update_failure"].iter().any(|n| rose(&now, &format!("listener_manager.lds.{n}"))) {
                return Ok(Update::Refused);
            }
            // The listener warms up first: it counts once its workers have it.
            let warming = now.get("listener_manager.total_listeners_warming").copied().unwrap_or(0);
            if rose(&now, "listener_manager.lds.update_success") && warming == 0 {
                self.delivered = Some(next);
                return Ok(Update::Taken);
            }
            if start.elapsed() > START {
                bail!("Envoy neither took nor refused its listeners in {START:?}:\n{}", self.logs());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Ends Envoy by SIGTERM (SIGKILL when it does not end), and returns what it logged.
    pub async fn stop(mut self) -> Result<String> {
        let ended = tokio::task::spawn_blocking(move || {
            let status = process::terminate(&mut self.child, STOP);
            (self, status)
        })
        .await?;
        ended.1.context("cannot end Envoy")?;
        Ok(ended.0.logs())
    }

    /// Stops the process where it stands (SIGSTOP): nothing runs in it any more, and all its connections stay open.
    pub fn freeze(&mut self) -> Result<()> {
        process::freeze(&mut self.child).context("cannot stop Envoy")
    }

    /// Lets a frozen process go on (SIGCONT).
    pub fn thaw(&mut self) -> Result<()> {
        process::signal(&mut self.child, Signal::SIGCONT).context("cannot let Envoy go on")
    }

    /// Kills Envoy where it stands: it says goodbye to nobody.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().and_then(|()| self.child.wait()).context("cannot kill Envoy").map(drop)
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        // A panicking test shows what Envoy had to say. Nothing can be done about a process that can't be ended.
        let _ = process::terminate(&mut self.child, STOP);
        if std::thread::panicking() {
            let logs = self.logs();
            let tail = logs.lines().rev().take(60).collect::<Vec<_>>();
            eprintln!("--- Envoy's last lines");
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Writes by rename, so that a watcher sees the old or the new content and never half of one.
fn write_json(path: &Path, value: &Value) -> Result<()> {
    let next: PathBuf = path.with_extension("next");
    std::fs::write(&next, serde_json::to_vec_pretty(value)?)?;
    std::fs::rename(&next, path).with_context(|| format!("cannot write {}", path.display()))
}

fn read_lossy(path: &Path) -> String {
    std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}
