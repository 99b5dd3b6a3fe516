//! A real etcd, as one member or as several that elect a leader among themselves.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use tempfile::TempDir;

use crate::{Client, process, tools, wait_for_async};

/// How long members may take until they have a leader.
const START: std::time::Duration = std::time::Duration::from_secs(30);

/// One member: a process of its own.
#[derive(Debug)]
pub struct Member {
    name: String,
    client: SocketAddr,
    peer: SocketAddr,
    process: Option<Child>,
}

impl Member {
    /// Where it takes calls.
    pub fn address(&self) -> SocketAddr {
        self.client
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.stop();
    }
}

/// etcd, until it is dropped.
#[derive(Debug)]
pub struct Etcd {
    program: PathBuf,
    dir: TempDir,
    flags: Vec<String>,
    members: Vec<Member>,
}

impl Etcd {
    /// One member.
    ///
    /// # Errors
    /// There is no etcd, or it does not start.
    pub async fn start() -> Result<Self> {
        Self::with(1, &[]).await
    }

    /// So many members, with further flags of etcd's, all of which serve.
    ///
    /// # Errors
    /// There is no etcd, or it does not start.
    pub async fn with(members: usize, flags: &[&str]) -> Result<Self> {
        let program = tools::etcd()?;
        let dir = tempfile::tempdir().context("a directory for etcd")?;
        // All held at once, so that they differ.
        let ports = (0..members * 2).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<std::io::Result<Vec<_>>>()?;
        let mut addresses = ports.iter().map(TcpListener::local_addr).collect::<std::io::Result<Vec<_>>>()?.into_iter();
        drop(ports);
        let members = (0..members)
            .map(|n| {
                let (client, peer) = addresses.next().zip(addresses.next()).context("two ports a member")?;
                Ok(Member { name: format!("m{n}"), client, peer, process: None })
            })
            .collect::<Result<Vec<_>>>()?;
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let mut etcd = Etcd { program, dir, flags, members };
        for at in 0..etcd.members.len() {
            etcd.run(at)?;
        }
        etcd.ready().await?;
        Ok(etcd)
    }

    /// Its members.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Where its first member takes calls.
    pub fn address(&self) -> SocketAddr {
        self.members[0].client
    }

    /// Kills a member at once. Its data stays.
    pub fn kill(&mut self, at: usize) {
        self.members[at].stop();
    }

    /// Starts a member that was killed.
    ///
    /// # Errors
    /// It does not start.
    pub fn run(&mut self, at: usize) -> Result<()> {
        let cluster: Vec<_> =
            self.members.iter().map(|member| format!("{}=http://{}", member.name, member.peer)).collect();
        let member = &mut self.members[at];
        let (client, peer) = (format!("http://{}", member.client), format!("http://{}", member.peer));
        let log = std::fs::File::create(self.dir.path().join(format!("{}.log", member.name)))?;
        let mut command = Command::new(&self.program);
        command
            .args(["--name", &member.name, "--data-dir"])
            .arg(self.dir.path().join(&member.name))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &cluster.join(","), "--initial-cluster-state", "new"])
            // A test's data need not outlive its machine.
            .args(["--unsafe-no-fsync", "--logger", "zap", "--log-outputs", "stderr"])
            .args(&self.flags)
            .env_remove("ETCD_UNSUPPORTED_ARCH")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        member.process = Some(process::spawn(command).with_context(|| format!("running {}", self.program.display()))?);
        Ok(())
    }

    /// Waits until there is a leader.
    ///
    /// # Errors
    /// There is none in time; with the end of the first member's log.
    pub async fn ready(&self) -> Result<()> {
        let up = async || self.ctl(&["get", "--keys-only", "--limit", "1", "/"]).is_ok();
        let deadline = tokio::time::Instant::now() + START;
        while !up().await {
            if tokio::time::Instant::now() > deadline {
                let log = std::fs::read_to_string(self.dir.path().join("m0.log")).unwrap_or_default();
                let tail: Vec<_> = log.lines().rev().take(5).collect();
                bail!("etcd does not serve: {}", tail.join("\n"));
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Which member leads, as one that runs says.
    ///
    /// # Errors
    /// None says so.
    pub async fn leader(&self) -> Result<usize> {
        for (at, member) in self.members.iter().enumerate().filter(|(_, member)| member.process.is_some()) {
            let url = format!("http://{}/v3/maintenance/status", member.client);
            let said = Client::http1_fresh().post(url).body("{}").send().await?.json();
            if said["leader"].is_string() && said["leader"] == said["header"]["member_id"] {
                return Ok(at);
            }
        }
        bail!("no member leads");
    }

    /// Runs `etcdctl` on the members that run, and gives back what it prints.
    ///
    /// # Errors
    /// It fails; with what it says.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        let endpoints: Vec<_> = self
            .members
            .iter()
            .filter(|member| member.process.is_some())
            .map(|m| format!("http://{}", m.client))
            .collect();
        let ctl = tools::etcdctl()?;
        let mut command = Command::new(&ctl);
        command.env("ETCDCTL_API", "3").args(["--endpoints", &endpoints.join(","), "--dial-timeout", "1s"]);
        let output = command.args(["--command-timeout", "2s"]).args(args).output().context("running etcdctl")?;
        if !output.status.success() {
            bail!("etcdctl {args:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The names of all keys under a prefix.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn keys(&self, prefix: &str) -> Result<Vec<String>> {
        let told = self.ctl(&["get", "--prefix", "--keys-only", prefix])?;
        Ok(told.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect())
    }

    /// How many keys are under a prefix, by etcd's JSON gateway: sooner said than by [`Etcd::keys`].
    pub async fn count(&self, prefix: &str) -> usize {
        let mut end = prefix.as_bytes().to_vec();
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        let (key, range_end) = (STANDARD.encode(prefix), STANDARD.encode(end));
        let body = json!({ "key": key, "range_end": range_end, "count_only": true }).to_string();
        let asked = Client::http1().post(format!("http://{}/v3/kv/range", self.address())).body(body).send().await;
        // None is not said.
        asked.ok().and_then(|answer| answer.json()["count"].as_str().and_then(|count| count.parse().ok())).unwrap_or(0)
    }

    /// The leases that there are.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn leases(&self) -> Result<Vec<String>> {
        let told = self.ctl(&["lease", "list"])?;
        Ok(told.lines().skip(1).filter(|line| !line.is_empty()).map(str::to_owned).collect())
    }

    /// Waits until no key is under a prefix.
    pub async fn wait_empty(&self, prefix: &str) {
        wait_for_async(&format!("no key under {prefix}"), crate::DEADLINE, async || {
            self.keys(prefix).is_ok_and(|keys| keys.is_empty())
        })
        .await;
    }
}
