//! Lock services that are asked directly, without a proxy in between: how each is told to give a lock and to take it back, as its users do it.
//!
//! A client has a connection of its own, as one that lives in another process would.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hyper::Method;
use interlock_testkit::{Client, tools};
use prost::Message;
use redis::aio::MultiplexedConnection;
use serde_json::json;

use super::machine;
use super::proxies::{self, Process};
use super::servers::{self, Server};

/// How long a lock lives that nobody gives back.
const TTL: Duration = Duration::from_secs(10);
/// How long an answer may take, waiting for the lock included.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long redis-py's lock sleeps between two tries, by default.
pub const POLL: Duration = Duration::from_millis(100);

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// An authority's lease API.
    Leases,
    /// SET NX PX until it succeeds, and a script that deletes what is still the client's own: redis-py's Lock, and Redis' own pattern.
    Redis,
    /// etcd's lock service, in a session.
    EtcdLock,
    /// A lease, a transaction that puts a key where there is none, and the lease revoked. It does not wait.
    EtcdTxn,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Leases => "Interlock, lease API: PUT, DELETE",
            Kind::Redis => "Redis: SET NX PX, compare and delete",
            Kind::EtcdLock => "etcd v3lock: Lock, Unlock",
            Kind::EtcdTxn => "etcd: LeaseGrant, Txn, LeaseRevoke",
        }
    }

    /// Whether it goes on as before when it was stopped for a while. An etcd takes itself for a leader that lost its followers.
    pub fn stands_still(self) -> bool {
        !matches!(self, Kind::EtcdLock | Kind::EtcdTxn)
    }

    /// Starts one.
    pub async fn start(self) -> Result<Service> {
        let process = match self {
            Kind::Leases => proxies::authority(1).await?,
            Kind::Redis => Process::Server(servers::redis().await?),
            Kind::EtcdLock | Kind::EtcdTxn => Process::Server(etcd().await?),
        };
        Ok(Service { kind: self, address: process.address(), process })
    }
}

/// A lock service that runs.
pub struct Service {
    pub kind: Kind,
    pub address: SocketAddr,
    pub process: Process,
}

impl Service {
    /// Lets it run, or stand still where it can.
    pub fn awake(&self, awake: bool) -> Result<()> {
        match (self.kind.stands_still(), awake) {
            (false, _) => Ok(()),
            (true, true) => machine::thaw(self.process.pid()),
            (true, false) => machine::freeze(self.process.pid()),
        }
    }
}

/// An etcd of its own, with its data in memory where the machine has a place for that: it is not the disk that is measured.
async fn etcd() -> Result<Server> {
    let etcd = tools::of_debian("ETCD", "etcd", "etcd-server")?;
    let peers = servers::free_address()?;
    let memory = std::path::Path::new("/dev/shm");
    Server::start_in("etcd", memory.is_dir().then_some(memory), |dir, address| {
        let (clients, peers) = (format!("http://{address}"), format!("http://{peers}"));
        let mut command = std::process::Command::new(etcd);
        command.arg("--data-dir").arg(dir.join("data")).args(["--name", "bench", "--logger", "zap"]);
        command.args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
        command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
        command.args(["--initial-cluster", &format!("bench={peers}"), "--log-level", "error"]);
        Ok(command)
    })
    .await
}

/// A client of a lock service.
pub struct Asker {
    kind: Kind,
    base: String,
    http: Client,
    redis: Option<MultiplexedConnection>,
    release: redis::Script,
    /// Its session, in etcd.
    lease: i64,
    owner: String,
}

/// What a lock is given back by.
pub enum Token {
    Id(String),
    Key(Vec<u8>),
    Lease(i64),
}

impl Asker {
    /// A client with this number.
    pub async fn connect(kind: Kind, address: SocketAddr, number: usize) -> Result<Self> {
        let redis = match kind {
            Kind::Redis => {
                let client = redis::Client::open(format!("redis://{address}"))?;
                Some(client.get_multiplexed_async_connection().await?)
            }
            _ => None,
        };
        let mut asker = Asker {
            kind,
            base: format!("http://{address}"),
            http: Client::http2(),
            redis,
            release: redis::Script::new(
                "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0",
            ),
            lease: 0,
            owner: format!("client-{number}-{:016x}", fastrand::u64(..)),
        };
        if kind == Kind::EtcdLock {
            asker.lease = asker.grant_lease().await?;
        }
        Ok(asker)
    }

    /// Takes a lock, however long that takes (but for etcd's transaction, which fails where it is taken).
    pub async fn acquire(&mut self, lock: &str) -> Result<Token> {
        match self.kind {
            Kind::Leases => self.put_lease(lock).await,
            Kind::Redis => self.set(lock).await,
            Kind::EtcdLock => {
                let ask = LockRequest { name: lock.as_bytes().to_vec(), lease: self.lease };
                let told: LockResponse = self.grpc("v3lockpb.Lock/Lock", &ask).await?;
                Ok(Token::Key(told.key))
            }
            Kind::EtcdTxn => self.put_if_absent(lock).await,
        }
    }

    /// Gives it back; an error if it was not held any more.
    pub async fn release(&mut self, lock: &str, token: Token) -> Result<()> {
        match token {
            Token::Id(id) if self.kind == Kind::Leases => {
                let url = format!("{}/interlock/v1/leases/{id}", self.base);
                let answer = self.http.ask(Method::DELETE, url).timeout(PATIENCE).send().await?;
                ensure!(answer.text().contains("\"released\""), "not released: {}", answer.text());
            }
            Token::Id(id) => {
                let connection = self.redis.as_mut().context("no connection to Redis")?;
                let deleted: u32 = self.release.key(lock).arg(id).invoke_async(connection).await?;
                ensure!(deleted == 1, "the lock was not held any more");
            }
            Token::Key(key) => {
                let _: UnlockResponse = self.grpc("v3lockpb.Lock/Unlock", &UnlockRequest { key }).await?;
            }
            Token::Lease(id) => {
                let _: LeaseRevokeResponse =
                    self.grpc("etcdserverpb.Lease/LeaseRevoke", &LeaseRevokeRequest { id }).await?;
            }
        }
        Ok(())
    }

    async fn put_lease(&self, lock: &str) -> Result<Token> {
        let id = format!("{:032x}", fastrand::u128(..));
        let body = json!({ "owner": self.owner, "locks": [{ "name": lock }], "wait": "20s", "ttl": "2s" });
        let url = format!("{}/interlock/v1/leases/{id}", self.base);
        let answer = self.http.ask(Method::PUT, url).body(body.to_string()).timeout(PATIENCE).send().await?;
        ensure!(answer.status == 201, "not granted: {} {}", answer.status, answer.text());
        Ok(Token::Id(id))
    }

    async fn set(&mut self, lock: &str) -> Result<Token> {
        let connection = self.redis.as_mut().context("no connection to Redis")?;
        let id = format!("{:032x}", fastrand::u128(..));
        loop {
            let mut set = redis::cmd("SET");
            set.arg(lock).arg(&id).arg("NX").arg("PX").arg(TTL.as_millis() as u64);
            let done: Option<String> = set.query_async(connection).await?;
            if done.is_some() {
                return Ok(Token::Id(id));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn put_if_absent(&self, lock: &str) -> Result<Token> {
        let lease = self.grant_lease().await?;
        let key = lock.as_bytes().to_vec();
        let put = PutRequest { key: key.clone(), value: self.owner.as_bytes().to_vec(), lease };
        // Compare{ result: EQUAL, target: CREATE, create_revision: 0 }
        let compare = vec![Compare { result: 0, target: 1, key, create_revision: Some(0) }];
        let ask = TxnRequest { compare, success: vec![RequestOp { put: Some(put) }] };
        let told: TxnResponse = self.grpc("etcdserverpb.KV/Txn", &ask).await?;
        ensure!(told.succeeded, "the lock is taken");
        Ok(Token::Lease(lease))
    }

    async fn grant_lease(&self) -> Result<i64> {
        let ask = LeaseGrantRequest { ttl: 60, id: 0 };
        let told: LeaseGrantResponse = self.grpc("etcdserverpb.Lease/LeaseGrant", &ask).await?;
        Ok(told.id)
    }

    async fn grpc<T: Message + Default>(&self, method: &str, ask: &impl Message) -> Result<T> {
        let message = ask.encode_to_vec();
        let mut body = vec![0];
        body.extend(u32::try_from(message.len())?.to_be_bytes());
        body.extend(message);
        let answer = self.http.grpc(format!("{}/{method}", self.base)).body(body).timeout(PATIENCE).send().await?;
        if answer.grpc_status() != Some(0) {
            bail!("{method}: {:?} {:?}", answer.grpc_status(), answer.grpc_message());
        }
        let bytes = answer.body.get(5..).context("an answer without a message")?;
        T::decode(bytes).with_context(|| format!("the answer of {method}"))
    }
}

// What of etcd's messages is needed (api/etcdserverpb/rpc.proto, server/etcdserver/api/v3lock/v3lockpb/v3lock.proto).

#[derive(Clone, PartialEq, Message)]
struct LockRequest {
    #[prost(bytes = "vec", tag = "1")]
    name: Vec<u8>,
    #[prost(int64, tag = "2")]
    lease: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LockResponse {
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct UnlockRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct UnlockResponse {}

#[derive(Clone, PartialEq, Message)]
struct LeaseGrantRequest {
    #[prost(int64, tag = "1")]
    ttl: i64,
    #[prost(int64, tag = "2")]
    id: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LeaseGrantResponse {
    #[prost(int64, tag = "2")]
    id: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LeaseRevokeRequest {
    #[prost(int64, tag = "1")]
    id: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LeaseRevokeResponse {}

#[derive(Clone, PartialEq, Message)]
struct Compare {
    #[prost(int32, tag = "1")]
    result: i32,
    #[prost(int32, tag = "2")]
    target: i32,
    #[prost(bytes = "vec", tag = "3")]
    key: Vec<u8>,
    /// In a oneof: sent even where it is 0.
    #[prost(int64, optional, tag = "5")]
    create_revision: Option<i64>,
}

#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
    #[prost(int64, tag = "3")]
    lease: i64,
}

#[derive(Clone, PartialEq, Message)]
struct RequestOp {
    #[prost(message, optional, tag = "2")]
    put: Option<PutRequest>,
}

#[derive(Clone, PartialEq, Message)]
struct TxnRequest {
    #[prost(message, repeated, tag = "1")]
    compare: Vec<Compare>,
    #[prost(message, repeated, tag = "2")]
    success: Vec<RequestOp>,
}

#[derive(Clone, PartialEq, Message)]
struct TxnResponse {
    #[prost(bool, tag = "2")]
    succeeded: bool,
}
