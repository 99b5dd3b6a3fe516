//! An upstream that does as it is told and remembers what it saw: HTTP/1.1 and HTTP/2 without TLS on one port.
//!
//! A request says in its query what is to happen to it (`/work?delay=50&status=201`):
//!
//! | parameter | meaning |
//! | --- | --- |
//! | `delay=MS` | answer after so many milliseconds |
//! | `hold` | answer once the test opens the path: [`Upstream::open`] |
//! | `status=N` | answer with this status; default 200 |
//! | `body=N` | answer with so many bytes; default a short text |
//! | `grpc=N` | answer as gRPC, with this `grpc-status` in the trailers |
//! | `reset=before`, `reset=after` | break off before the head, or after head and half of the body |
//! | `stall=MS` | send the head at once and the rest of the answer only so many milliseconds later |
//!
//! Where that is not enough, a test gives a handler: [`Upstream::with`].

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::checker::{Checker, Section};
use crate::wait::{DEADLINE, wait_for};

/// What an upstream saw of one request.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// The number of the request at this upstream, from 0.
    pub number: usize,
    /// The method.
    pub method: String,
    /// The path, with its query.
    pub path: String,
    /// Every header as it came.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// The trailers, once they have come.
    pub trailers: HeaderMap,
    /// When its head had come.
    pub arrived: Instant,
    /// How and when it ended; none while it is here.
    pub ended: Option<(Ended, Instant)>,
}

/// How a request ended at the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The whole answer went out (or was broken off because the script said so).
    Answered,
    /// The other side went away first.
    Abandoned,
}

impl Recorded {
    /// A header's value (the first field line), with bytes that are no UTF-8 replaced.
    pub fn header(&self, name: &str) -> Option<String> {
        self.headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
    }

    /// The path without its query.
    pub fn bare_path(&self) -> &str {
        self.path.split('?').next().unwrap_or_default()
    }

    /// A parameter of the query; empty for one without a value.
    pub fn query(&self, name: &str) -> Option<&str> {
        let pairs = self.path.split_once('?')?.1.split('&');
        pairs
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
    }

    fn number_of(&self, name: &str) -> Option<u64> {
        self.query(name)?.parse().ok()
    }
}

/// What an upstream answers.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// The headers.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Bytes,
    /// The trailers; none: the answer has no trailers.
    pub trailers: Option<Vec<(String, String)>>,
    /// How long the head goes out before the rest.
    pub stall: Duration,
    /// Whether and where the answer breaks off.
    pub reset: Option<Reset>,
}

/// Where an answer breaks off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reset {
    /// Before its head.
    BeforeHead,
    /// After its head and half of its body.
    AfterHead,
}

impl Reply {
    /// An answer with this status and text.
    pub fn new(status: u16, body: impl Into<Bytes>) -> Self {
        let body = body.into();
        Self { status, headers: Vec::new(), body, trailers: None, stall: Duration::ZERO, reset: None }
    }

    /// A gRPC answer: an empty message and this status.
    pub fn grpc(status: u64) -> Self {
        let trailers = vec![("grpc-status".to_owned(), status.to_string())];
        Self { trailers: Some(trailers), ..Self::new(200, vec![0_u8; 5]) }.header("content-type", "application/grpc")
    }

    /// Adds a header.
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }
}

type Handler = Arc<dyn Fn(Recorded) -> Pin<Box<dyn Future<Output = Reply> + Send>> + Send + Sync>;

/// A running upstream. Dropping it closes its port and its connections.
pub struct Upstream {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

struct Shared {
    recorded: Mutex<Vec<Recorded>>,
    open: watch::Sender<HashSet<String>>,
    checker: Checker,
    handler: Option<Handler>,
    /// Whether it remembers and checks what it sees.
    watches: bool,
}

impl Upstream {
    /// Starts one that follows the script in each request's query.
    pub async fn start() -> Result<Self> {
        Self::run(None, Checker::default(), true).await
    }

    /// Starts one that follows the script, with a checker that knows of permits or watches other upstreams too.
    pub async fn checked_by(checker: Checker) -> Result<Self> {
        Self::run(None, checker, true).await
    }

    /// Starts one that asks `handler`. Requests are recorded all the same.
    pub async fn with<F, R>(handler: F) -> Result<Self>
    where
        F: Fn(Recorded) -> R + Send + Sync + 'static,
        R: Future<Output = Reply> + Send + 'static,
    {
        Self::run(Some(Arc::new(move |request| Box::pin(handler(request)))), Checker::default(), true).await
    }

    /// Starts one that asks `handler`, and neither remembers nor checks what it sees: for load that goes on for long.
    pub async fn forgetful<F, R>(handler: F) -> Result<Self>
    where
        F: Fn(Recorded) -> R + Send + Sync + 'static,
        R: Future<Output = Reply> + Send + 'static,
    {
        Self::run(Some(Arc::new(move |request| Box::pin(handler(request)))), Checker::default(), false).await
    }

    async fn run(handler: Option<Handler>, checker: Checker, watches: bool) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("cannot listen")?;
        let address = listener.local_addr()?;
        let (recorded, open) = (Mutex::default(), watch::Sender::default());
        let shared = Arc::new(Shared { recorded, open, checker, handler, watches });
        let server = tokio::spawn(serve(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The checker that saw every request here.
    pub fn checker(&self) -> &Checker {
        &self.shared.checker
    }

    /// Every request so far, by arrival.
    pub fn requests(&self) -> Vec<Recorded> {
        self.shared.lock().clone()
    }

    /// The requests so far with this path (without its query).
    pub fn requests_to(&self, path: &str) -> Vec<Recorded> {
        self.shared.lock().iter().filter(|r| r.bare_path() == path).cloned().collect()
    }

    /// How many requests have come.
    pub fn count(&self) -> usize {
        self.shared.lock().len()
    }

    /// How many are here now.
    pub fn live(&self) -> usize {
        self.shared.lock().iter().filter(|r| r.ended.is_none()).count()
    }

    /// Lets everything go on that holds at this path (without its query), now and later.
    pub fn open(&self, path: &str) {
        self.shared.open.send_modify(|open| {
            open.insert(path.to_owned());
        });
    }

    /// Makes `hold` hold again at this path.
    pub fn close(&self, path: &str) {
        self.shared.open.send_modify(|open| {
            open.remove(path);
        });
    }

    /// Waits until `count` requests have come to this path (without its query), and returns them.
    ///
    /// # Panics
    /// When they have not after [`DEADLINE`].
    pub async fn wait_for_requests(&self, path: &str, count: usize) -> Vec<Recorded> {
        wait_for(&format!("{count} requests to {path}"), DEADLINE, || self.requests_to(path).len() >= count).await;
        self.requests_to(path)
    }

    /// Waits until no request is here.
    ///
    /// # Panics
    /// When one still is after [`DEADLINE`].
    pub async fn wait_idle(&self) {
        wait_for("the upstream to be idle", DEADLINE, || self.live() == 0).await;
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Recorded>> {
        // A test that panicked elsewhere is not to hide behind a poisoned lock here.
        self.recorded.lock().unwrap_or_else(|e| e.into_inner())
    }

    async fn until_open(&self, path: &str) {
        // The sender lives in self, so waiting ends only by opening.
        let _ = self.open.subscribe().wait_for(|open| open.contains(path)).await;
    }

    async fn script(&self, request: &Recorded) -> Reply {
        if request.query("hold").is_some() {
            self.until_open(request.bare_path()).await;
        }
        if let Some(delay) = request.number_of("delay") {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        let mut reply = match request.number_of("grpc") {
            Some(status) => Reply::grpc(status),
            None => {
                let status = request.number_of("status").and_then(|status| u16::try_from(status).ok());
                let size = request.number_of("body").and_then(|size| usize::try_from(size).ok());
                Reply::new(status.unwrap_or(200), size.map_or_else(|| b"done\n".to_vec(), |size| vec![b'x'; size]))
            }
        };
        reply.stall = Duration::from_millis(request.number_of("stall").unwrap_or(0));
        reply.reset = match request.query("reset") {
            Some("before") => Some(Reset::BeforeHead),
            Some(_) => Some(Reset::AfterHead),
            None => None,
        };
        reply
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    // Owned by this task, so that connections end with it.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                // Head and body go out in two writes: held back, the second would wait 40 ms for the first's receipt.
                let _ = stream.set_nodelay(true);
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    let service = service_fn(move |request| answer(request, Arc::clone(&shared)));
                    // A broken connection is the other side's business, or was asked for by the script.
                    let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn answer(request: Request<Incoming>, shared: Arc<Shared>) -> Result<Response<ReplyBody>> {
    let arrived = Instant::now();
    let (head, body) = request.into_parts();
    let path = head.uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string);
    let method = head.method.to_string();
    let mut request = Recorded {
        number: 0,
        method,
        path,
        headers: head.headers,
        body: Bytes::new(),
        trailers: HeaderMap::new(),
        arrived,
        ended: None,
    };
    let (mut section, mut number) = (None, None);
    if shared.watches {
        section = Some(shared.checker.enter(&request.headers, &request.path));
        let mut recorded = shared.lock();
        request.number = recorded.len();
        number = Some(request.number);
        recorded.push(request.clone());
    }
    let mut visit = Visit { shared: Arc::clone(&shared), number, section };
    let body = body.collect().await?;
    request.trailers = body.trailers().cloned().unwrap_or_default();
    request.body = body.to_bytes();
    if let Some(number) = number {
        let mut recorded = shared.lock();
        (recorded[number].body, recorded[number].trailers) = (request.body.clone(), request.trailers.clone());
    }
    let reply = match &shared.handler {
        Some(handler) => handler(request).await,
        None => shared.script(&request).await,
    };
    if reply.reset == Some(Reset::BeforeHead) {
        visit.leave().await;
        return Err(anyhow!("the script breaks off here"));
    }
    respond(reply, visit).await
}

/// Builds the response; what is left of it goes out by a task that takes the visit along.
async fn respond(reply: Reply, mut visit: Visit) -> Result<Response<ReplyBody>> {
    let mut response = Response::builder().status(StatusCode::from_u16(reply.status)?);
    for (name, value) in &reply.headers {
        response = response.header(name, value);
    }
    let (frames, body) = mpsc::channel(1);
    let plain = reply.stall.is_zero() && reply.reset.is_none();
    let length = (plain && reply.trailers.is_none()).then_some(reply.body.len());
    if plain {
        // The section ends before the last byte goes out: once that is out, the next holder may already be here.
        visit.leave().await;
    }
    tokio::spawn(async move {
        let write = async {
            tokio::time::sleep(reply.stall).await;
            if reply.reset == Some(Reset::AfterHead) {
                let half = reply.body.slice(..reply.body.len().div_ceil(2));
                let _ = frames.send(Ok(Frame::data(half))).await;
                visit.leave().await;
                let _ = frames.send(Err(anyhow!("the script breaks off here"))).await;
                return;
            }
            visit.leave().await;
            let _ = frames.send(Ok(Frame::data(reply.body))).await;
            if let Some(trailers) = reply.trailers.map(trailer_map) {
                let _ = frames.send(trailers.map(Frame::trailers)).await;
            }
        };
        // The receiver goes with the stream: then the visit is dropped as it is.
        tokio::select! {
            () = write => {}
            () = frames.closed() => {}
        }
    });
    Ok(response.body(ReplyBody { frames: body, length: length.and_then(|l| u64::try_from(l).ok()) })?)
}

fn trailer_map(trailers: Vec<(String, String)>) -> Result<HeaderMap> {
    let typed = |(name, value): (String, String)| Ok((name.parse::<HeaderName>()?, value.parse::<HeaderValue>()?));
    Ok(trailers.into_iter().map(typed).collect::<Result<HashMap<_, _>>>()?.into_iter().collect())
}

/// One request's stay; dropped before it has left, the other side went away.
struct Visit {
    shared: Arc<Shared>,
    /// Its place among what is remembered, until its end is told there.
    number: Option<usize>,
    section: Option<Section>,
}

impl Visit {
    async fn leave(&mut self) {
        if let Some(section) = self.section.take() {
            section.leave().await;
        }
        self.end(Ended::Answered);
    }

    fn end(&mut self, how: Ended) {
        if let Some(number) = self.number.take() {
            self.shared.lock()[number].ended = Some((how, Instant::now()));
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.end(Ended::Abandoned);
    }
}

struct ReplyBody {
    frames: mpsc::Receiver<Result<Frame<Bytes>>>,
    length: Option<u64>,
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = anyhow::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>>>> {
        self.frames.poll_recv(context)
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
