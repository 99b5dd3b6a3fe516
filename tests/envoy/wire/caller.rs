//! A client with one HTTP/2 connection that can tell when the worker behind it has dealt with what was sent.
//!
//! A worker reads a connection in order, and a new stream cannot overtake an older one. So once a request behind another
//! has been answered, the other one has been through the filter: it stands in a queue, is on its way to the upstream, or
//! has been refused. That needs no look at a gauge, which is as old as the last sweep.
//!
//! Where the locks are an authority's, the request behind asks for a lock of its own: its call goes to the authority behind those
//! of the requests before it, over the same connection.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Result;
use bytes::{Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest, handshake};
use hyper::Request;
use interlock_testkit::Answer;
use interlock_testkit::client::traceparent;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// The path that Envoy answers by itself.
pub const SETTLED: &str = "/settled";

/// One owner's client. Dropping it closes its connection.
pub struct Caller {
    requests: SendRequest<Bytes>,
    connection: JoinHandle<()>,
    address: SocketAddr,
    owner: u128,
    /// Whether the locks are an authority's.
    far: bool,
}

/// Tells the locks of requests apart that only go behind others.
static BEHIND: AtomicU64 = AtomicU64::new(0);

impl Caller {
    /// Connects. `far`: the locks are an authority's.
    pub async fn connect(address: SocketAddr, owner: u128, far: bool) -> Self {
        let stream = TcpStream::connect(address).await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        let (requests, connection) = handshake(stream).await.expect("HTTP/2");
        let connection = tokio::spawn(async move {
            // How it ends, the requests on it tell.
            let _ = connection.await;
        });
        Caller { requests, connection, address, owner, far }
    }

    /// Sends a GET of the owner behind all that was sent before, with this `lock` and this `lock-fence`. Aborting the task
    /// resets the stream.
    pub fn send(&self, path: &str, lock: Option<&str>, fence: Option<&str>) -> JoinHandle<Result<Answer>> {
        self.send_by(self.owner, path, lock, fence)
    }

    fn send_by(&self, owner: u128, path: &str, lock: Option<&str>, fence: Option<&str>) -> JoinHandle<Result<Answer>> {
        let mut request = Request::get(format!("http://{}{path}", self.address));
        request = request.header("traceparent", traceparent(owner));
        for (name, value) in [("lock", lock), ("lock-fence", fence)] {
            if let Some(value) = value {
                request = request.header(name, value);
            }
        }
        let request = request.body(()).expect("a request");
        // A clone waits for no other stream. The place in the order is taken by this call, not by the task.
        let sent = self.requests.clone().send_request(request, true);
        let began = Instant::now();
        tokio::spawn(async move { answer(sent?.0, began).await })
    }

    /// Waits until the worker has dealt with all requests so far.
    pub async fn settle(&self) {
        // What is given back goes out a moment after the response: surely before this has been to the authority and back.
        for _ in 0..if self.far { 2 } else { 1 } {
            let number = BEHIND.fetch_add(1, Ordering::Relaxed);
            let lock = self.far.then(|| format!("behind/{number};wait=0"));
            let owner = u128::MAX - u128::from(number);
            let answer = self.send_by(owner, SETTLED, lock.as_deref(), None).await.expect("a task").expect("an answer");
            assert_eq!(answer.status, 204, "{}", answer.text());
        }
    }

    /// Waits until the worker has dealt with all resets so far too.
    pub async fn settle_resets(&self) {
        // A reset may be overtaken by the first request behind it, but is written before a second one is made.
        self.settle().await;
        self.settle().await;
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

async fn answer(response: ResponseFuture, began: Instant) -> Result<Answer> {
    let (head, mut stream) = response.await?.into_parts();
    let mut body = BytesMut::new();
    while let Some(chunk) = stream.data().await.transpose()? {
        stream.flow_control().release_capacity(chunk.len())?;
        body.extend_from_slice(&chunk);
    }
    let trailers = stream.trailers().await?.unwrap_or_default();
    let status = head.status.as_u16();
    Ok(Answer { status, headers: head.headers, body: body.freeze(), trailers, took: began.elapsed() })
}
