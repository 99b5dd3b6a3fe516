//! A hop that passes HTTP requests on and now and then sends one a second time, some time later, as a network does that
//! doubles its messages. The second answer goes nowhere.
//!
//! Bytes of HTTP/2 cannot be doubled: its connection would break. So it is the request that comes twice, as a call of its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use hyper::Method;
use tokio::sync::watch;

use crate::client::{Ask, Client};
use crate::upstream::{Recorded, Reply, Reset, Upstream};

/// Longer than any request of a test is parked.
const PATIENCE: Duration = Duration::from_secs(120);

/// What belongs to a connection and not to a message, or is made anew.
const OWN: [&str; 5] = ["host", "connection", "content-length", "transfer-encoding", "te"];

/// A hop to one target. Dropping it breaks everything off.
pub struct Relay {
    server: Upstream,
    shared: Arc<Shared>,
}

struct Shared {
    target: watch::Sender<SocketAddr>,
    client: Client,
    /// How many requests are to be doubled yet, and how many have been.
    wanted: AtomicU64,
    doubled: AtomicU64,
    /// By how much the second comes later.
    later: watch::Sender<Duration>,
}

impl Relay {
    /// Starts one that passes everything on once.
    pub async fn to(target: SocketAddr) -> Result<Self> {
        let shared = Arc::new(Shared {
            target: watch::Sender::new(target),
            client: Client::http2(),
            wanted: AtomicU64::new(0),
            doubled: AtomicU64::new(0),
            later: watch::Sender::new(Duration::ZERO),
        });
        let passing = Arc::clone(&shared);
        let server = Upstream::forgetful(move |request| pass(Arc::clone(&passing), request)).await?;
        Ok(Relay { server, shared })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Where requests go from now on.
    pub fn lead_to(&self, target: SocketAddr) {
        self.shared.target.send_replace(target);
    }

    /// Sends each of the next `count` requests a second time, so much later.
    pub fn double(&self, count: u64, later: Duration) {
        self.shared.later.send_replace(later);
        self.shared.wanted.store(count, Ordering::Relaxed);
    }

    /// How many requests were sent twice so far.
    pub fn doubled(&self) -> u64 {
        self.shared.doubled.load(Ordering::Relaxed)
    }
}

async fn pass(shared: Arc<Shared>, request: Recorded) -> Reply {
    let one_less = |left: u64| left.checked_sub(1);
    if shared.wanted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok() {
        shared.doubled.fetch_add(1, Ordering::Relaxed);
        let (shared, request, later) = (Arc::clone(&shared), request.clone(), *shared.later.borrow());
        tokio::spawn(async move {
            tokio::time::sleep(later).await;
            // Whether it is answered, and what, is nobody's business.
            let _ = shared.ask(&request).send().await;
        });
    }
    match shared.ask(&request).send().await {
        Ok(answer) => {
            let mut reply = Reply::new(answer.status, answer.body);
            let told = answer.headers.iter().filter(|(name, _)| !OWN.contains(&name.as_str()));
            reply.headers = told
                .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into()))
                .collect();
            reply
        }
        // The other side is gone: so is this one.
        Err(_) => Reply { reset: Some(Reset::BeforeHead), ..Reply::new(502, "") },
    }
}

impl Shared {
    fn ask(&self, request: &Recorded) -> Ask {
        let target = *self.target.borrow();
        let method = Method::from_bytes(request.method.as_bytes()).unwrap_or_default();
        let mut ask = self.client.ask(method, format!("http://{target}{}", request.path)).timeout(PATIENCE);
        for (name, value) in request.headers.iter().filter(|(name, _)| !OWN.contains(&name.as_str())) {
            ask = ask.header(name.as_str(), value.as_bytes());
        }
        ask.body(request.body.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn passes_on_and_doubles() {
        let upstream = Upstream::start().await.unwrap();
        let relay = Relay::to(upstream.address()).await.unwrap();
        let url = |path: &str| format!("http://{}{path}", relay.address());
        let client = Client::http2();
        let ask = || client.post(url("/one?status=201")).header("x-a", "b").body("text");
        assert_eq!(ask().send().await.unwrap().status, 201);
        let seen = &upstream.requests()[0];
        assert_eq!((seen.method.as_str(), seen.header("x-a").as_deref()), ("POST", Some("b")));
        assert_eq!(&seen.body[..], b"text");
        relay.double(1, Duration::from_millis(10));
        assert_eq!(ask().send().await.unwrap().status, 201);
        assert_eq!(ask().send().await.unwrap().status, 201);
        let seen = upstream.wait_for_requests("/one", 4).await;
        assert_eq!((relay.doubled(), seen.len()), (1, 4));
        // Who leaves here leaves there too.
        let leaver = client.get(url("/held?hold")).spawn();
        upstream.wait_for_requests("/held", 1).await;
        leaver.leave().await;
        upstream.wait_idle().await;
        drop(upstream);
        assert!(client.get(url("/gone")).send().await.is_err());
    }
}
