//! The bank as a whole: a real Envoy, the two services behind it, and clients before it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bank::client::{Attempt, Client, Retry};
use bank::event::{Event, Observer};
use bank::hop::Proxy;
use bank::{Router, accounts, transfers};
use interlock_testkit::{Envoy, EnvoyConfig, stats};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::cast::{ACCOUNTS, Job};
use super::screen::Screen;
use super::tally::Tally;

/// How long a write to the books takes.
const WRITE: Duration = Duration::from_millis(20);
/// An act that takes longer has hung.
const PATIENCE: Duration = Duration::from_secs(45);

/// Gauges that have not come to rest by then never will.
const REST: Duration = Duration::from_secs(10);

/// Something that happened, and when.
pub struct News {
    pub at: Instant,
    pub what: What,
}

/// What happened.
pub enum What {
    /// In a service.
    Service(Event),
    /// A client's try of the job of this index has ended.
    Tried(usize, u32, Attempt),
    /// A client has no more to do: this was its last try.
    Over(Attempt),
}

/// A bank that is open. Dropping it ends Envoy and the services.
pub struct Bank {
    pub client: Client,
    envoy: Envoy,
    news: mpsc::UnboundedReceiver<News>,
    sender: mpsc::UnboundedSender<News>,
    _services: JoinSet<()>,
}

impl Bank {
    /// Starts everything.
    pub async fn open(config: EnvoyConfig, opening: u64) -> Result<Self> {
        let (accounts, transfers) = (listen().await?, listen().await?);
        let config = config.cluster("accounts", accounts.local_addr()?).cluster("transfers", transfers.local_addr()?);
        let envoy = Envoy::start(config).await?;
        let (sender, news) = mpsc::unbounded_channel();
        let proxy = Proxy::new(&envoy.base_url())?;
        let config = accounts::Config {
            opening: ACCOUNTS.map(|name| (name.to_owned(), opening)).into(),
            write_time: WRITE,
            proxy: proxy.clone(),
            observer: observer(sender.clone()),
        };
        let mut services = JoinSet::new();
        services.spawn(serve(accounts, accounts::router(config)));
        services.spawn(serve(transfers, transfers::router(proxy)));
        let client = Client::new(&envoy.base_url(), PATIENCE)?;
        Ok(Bank { client, envoy, news, sender, _services: services })
    }

    /// Asks for all these transfers at once, and shows and counts what happens until the last is over.
    pub async fn run(&mut self, screen: &Screen, jobs: &[Job], retry: Retry) -> Result<Tally> {
        let started = Instant::now();
        let mut clients = JoinSet::new();
        for (index, job) in jobs.iter().cloned().enumerate() {
            let (client, news) = (self.client.clone(), self.sender.clone());
            clients.spawn(async move {
                let tell = |what| {
                    // The receiver goes only with the whole bank.
                    let _ = news.send(News { at: Instant::now(), what });
                };
                let watch = |n, attempt: &Attempt| tell(What::Tried(index, n, attempt.clone()));
                let last = client.transfer(&job.id, &job.trace, &job.transfer, retry, watch).await;
                tell(What::Over(last));
            });
        }
        let mut tally = Tally::new(jobs.len());
        let mut over = 0;
        while over < jobs.len() {
            let left = PATIENCE.saturating_sub(started.elapsed());
            let news = tokio::time::timeout(left, self.news.recv()).await;
            let news = news.with_context(|| format!("not over after {PATIENCE:?}"))?.context("nobody is left")?;
            screen.news(news.at - started, &news.what, jobs, &tally);
            over += usize::from(matches!(news.what, What::Over(..)));
            tally.count(news.what);
        }
        tally.time = started.elapsed();
        Ok(tally)
    }

    /// Whether these gauges are 0 in every class, soon after now. The plugin takes them from a census of its table, so only
    /// what a census says that began after this call counts: the second one from here.
    pub async fn gauges_come_to_rest(&self, names: &[&str]) -> Result<bool> {
        let deadline = Instant::now() + REST;
        let mut first = None;
        loop {
            let samples = self.envoy.metrics().await?;
            let censuses = stats::sum(&samples, "interlock_sweep_total", &[]);
            let counted = censuses >= *first.get_or_insert(censuses) + 2.0;
            let at_rest = |name: &&str| {
                let mut values = samples.iter().filter(|s| s.name == **name).map(|s| s.value).peekable();
                values.peek().is_some() && values.all(|value| value == 0.0)
            };
            if counted && names.iter().all(at_rest) {
                return Ok(true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn observer(sender: mpsc::UnboundedSender<News>) -> Observer {
    Arc::new(move |event| {
        // The services end with the bank; what they have to say after that is for nobody.
        let _ = sender.send(News { at: Instant::now(), what: What::Service(event) });
    })
}

async fn listen() -> Result<TcpListener> {
    TcpListener::bind(("127.0.0.1", 0)).await.context("no free port")
}

async fn serve(listener: TcpListener, router: Router) {
    // Ends only with its task.
    let _ = bank::serve(listener, router, std::future::pending()).await;
}
