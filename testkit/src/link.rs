//! A TCP connection that fails as networks do: a proxy that holds either direction back without closing anything, makes it
//! slow, or breaks all connections off. Bytes are never lost or changed: as after a partition that TCP outlives, what was
//! held back arrives when the link heals.
//!
//! One difference to packets that are dropped: to connect succeeds, since the proxy itself accepts; then nothing is heard.
//! What the bytes mean is not known here; see [`crate::relay`] for messages that come twice.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// A direction of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From who connects to the target: requests.
    Up,
    /// From the target back: answers.
    Down,
}

/// How a direction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Way {
    open: bool,
    delay: Duration,
}

/// A proxy to one target. Dropping it breaks everything off.
#[derive(Debug)]
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    target: watch::Sender<SocketAddr>,
    up: watch::Sender<Way>,
    down: watch::Sender<Way>,
    /// How often everything was broken off.
    cuts: watch::Sender<u64>,
}

impl Link {
    /// Starts one that passes everything on.
    pub async fn to(target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("cannot listen")?;
        let address = listener.local_addr()?;
        let way = || watch::Sender::new(Way { open: true, delay: Duration::ZERO });
        let shared = Arc::new(Shared {
            target: watch::Sender::new(target),
            up: way(),
            down: way(),
            cuts: watch::Sender::new(0),
        });
        let server = tokio::spawn(serve(listener, Arc::clone(&shared)));
        Ok(Link { address, shared, server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where connections lead that are made from now on.
    pub fn lead_to(&self, target: SocketAddr) {
        self.shared.target.send_replace(target);
    }

    /// Holds a direction back: nothing gets through any more, and no end of a connection either.
    pub fn hold(&self, direction: Direction) {
        self.way(direction).send_modify(|way| way.open = false);
    }

    /// Makes everything that goes in a direction late by so much at least.
    pub fn delay(&self, direction: Direction, by: Duration) {
        self.way(direction).send_modify(|way| way.delay = by);
    }

    /// Lets everything through at once, with what was held back.
    pub fn heal(&self) {
        for direction in [Direction::Up, Direction::Down] {
            self.way(direction).send_replace(Way { open: true, delay: Duration::ZERO });
        }
    }

    /// Breaks all connections off, with all that is under way.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    fn way(&self, direction: Direction) -> &watch::Sender<Way> {
        match direction {
            Direction::Up => &self.shared.up,
            Direction::Down => &self.shared.down,
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    // Owned by this task, so that connections end with it.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((near, _)) = accepted else { continue };
                connections.spawn(carry(near, Arc::clone(&shared)));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection, to its end.
async fn carry(near: TcpStream, shared: Arc<Shared>) {
    let mut cuts = shared.cuts.subscribe();
    let both = async {
        let target = *shared.target.borrow();
        let Ok(far) = TcpStream::connect(target).await else { return };
        // What was written at once arrives at once.
        let _ = (near.set_nodelay(true), far.set_nodelay(true));
        let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
        tokio::join!(pump(near_in, far_out, shared.up.subscribe()), pump(far_in, near_out, shared.down.subscribe()));
    };
    tokio::select! {
        () = both => {}
        // The sender lives as long as the link does; without it there is nothing to carry either.
        _ = cuts.changed() => {}
    }
}

/// Passes on what comes, and at last the end.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut way: watch::Receiver<Way>) {
    let mut bytes = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut bytes).await.unwrap_or(0);
        let delay = way.borrow().delay;
        tokio::time::sleep(delay).await;
        if way.wait_for(|way| way.open).await.is_err() {
            return;
        }
        // An end, or an error that is passed on as one.
        if count == 0 || to.write_all(&bytes[..count]).await.is_err() {
            let _ = to.shutdown().await;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::{Client, Upstream};

    #[tokio::test]
    async fn holds_back_slows_down_and_breaks_off() {
        let upstream = Upstream::start().await.unwrap();
        let link = Link::to(upstream.address()).await.unwrap();
        let (client, url) = (Client::http2(), format!("http://{}/work", link.address()));
        assert_eq!(client.get(&url).send().await.unwrap().status, 200);
        for (direction, seen) in [(Direction::Up, 1), (Direction::Down, 3)] {
            link.hold(direction);
            let pending = client.get(&url).spawn();
            // Only the answer is held back in the other direction.
            tokio::time::sleep(Duration::from_millis(100)).await;
            assert_eq!((upstream.count(), pending.is_answered()), (seen, false), "{direction:?}");
            link.heal();
            assert_eq!(pending.answer().await.unwrap().status, 200);
        }
        link.delay(Direction::Down, Duration::from_millis(150));
        let start = Instant::now();
        assert_eq!(client.get(&url).send().await.unwrap().status, 200);
        assert!(start.elapsed() >= Duration::from_millis(150));
        link.heal();
        let pending = client.get(format!("{url}?hold")).spawn();
        upstream.wait_for_requests("/work", 5).await;
        link.cut();
        assert!(pending.answer().await.is_err());
        let other = Upstream::start().await.unwrap();
        link.lead_to(other.address());
        assert_eq!(client.get(&url).send().await.unwrap().status, 200);
        assert_eq!((upstream.count(), other.count()), (5, 1));
    }
}
