//! Who asks the services of a demo for something, and what they say of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bank::client::trace_id;
use interlock_testkit::client::Ask;
use interlock_testkit::{Answer, Client};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::screen::{GREEN, RED, Screen, YELLOW};
use super::services::{News, PATIENCE, Services, What};

/// Who is turned away tries again after so long.
const PAUSE: Duration = Duration::from_millis(100);

/// One transaction: a name for people, and the trace that makes all its requests one owner.
pub struct Transaction {
    pub name: String,
    pub trace: String,
}

impl Transaction {
    /// One that goes by that name.
    pub fn new(name: impl Into<String>) -> Self {
        Transaction { name: name.into(), trace: trace_id() }
    }

    /// A request of it.
    pub fn post(&self, services: &Services, url: String) -> Ask {
        let ask = Client::http1_fresh().post(url).timeout(PATIENCE);
        ask.header("traceparent", format!("00-{}-00000000000000aa-01", self.trace)).header("x-sent", services.now())
    }
}

/// Waits until something is told that `wanted` recognizes; shows all that is told meanwhile.
pub async fn until(
    told: &mut mpsc::UnboundedReceiver<News>,
    show: impl Fn(&News),
    wanted: impl Fn(&News) -> bool,
) -> Result<News> {
    loop {
        let news = tokio::time::timeout(PATIENCE, told.recv()).await.context("nothing happens any more")?;
        let news = news.context("nobody is left")?;
        show(&news);
        if wanted(&news) {
            return Ok(news);
        }
    }
}

/// What kind of problem an answer tells of.
pub fn slug(answer: &Answer) -> String {
    let problem = serde_json::from_slice::<serde_json::Value>(&answer.body).unwrap_or_default();
    problem["type"].as_str().unwrap_or_default().replace("urn:interlock:problem:", "")
}

/// An answer in a few words.
pub fn told(answer: &Answer) -> String {
    format!("{} {}", answer.status, slug(answer)).trim_end().to_owned()
}

/// Shows what a service tells.
pub fn tell(screen: &Screen, start: Instant, news: &News, who: &impl Fn(&str) -> String) {
    let (at, name) = (news.at - start, who(&news.trace));
    match &news.what {
        What::Came(call, grants) => {
            let grants = grants.iter().map(|g| format!("{} under fence {}", g.lock, g.fence)).collect::<Vec<_>>();
            let text = format!("{} serves {call}, with {}", news.service, grants.join(" and "));
            screen.event(at, &name, GREEN, "holds", &text);
        }
        What::Calls(call) => screen.event(at, &name, YELLOW, "asks", &format!("{} calls {call}", news.service)),
        What::Answered { call, answer: Some(answer) } => {
            let colour = if answer.status == 200 { GREEN } else { RED };
            screen.event(at, &name, colour, "answered", &format!("{call}: {}", told(answer)));
        }
        What::Answered { call, answer: None } => screen.event(at, &name, RED, "answered", &format!("{call}: nothing")),
    }
}

/// What clients saw.
#[derive(Default)]
pub struct Seen {
    pub served: usize,
    pub lost: usize,
    /// Waited in vain for as long as they would.
    pub in_vain: usize,
    /// Turned away since the backend could not be asked, or did not grant yet.
    pub turned_away: usize,
    pub failed: Vec<String>,
    /// When each served request was granted its lock.
    pub granted: Vec<Instant>,
}

/// Clients that work until they are stopped.
pub struct Clients {
    running: JoinSet<Seen>,
    /// How many requests have been served so far.
    served: Arc<AtomicUsize>,
    stop: watch::Sender<bool>,
}

impl Clients {
    /// So many, who go through these addresses, each from another one on.
    pub fn start(count: usize, urls: &[String], services: &Arc<Services>) -> Self {
        let (stop, mut running) = (watch::Sender::new(false), JoinSet::new());
        let served = Arc::new(AtomicUsize::new(0));
        for number in 0..count {
            let (urls, services, stop, served) =
                (urls.to_vec(), Arc::clone(services), stop.subscribe(), Arc::clone(&served));
            running.spawn(async move { work(number, &urls, &services, &stop, &served).await });
        }
        Clients { running, served, stop }
    }

    /// Waits until somebody has been granted a lock after now: until more have been served than are under way.
    ///
    /// # Errors
    /// Nobody is.
    pub async fn until_granted(&self) -> Result<()> {
        let (start, enough) = (Instant::now(), self.served.load(Ordering::Relaxed) + self.running.len());
        while self.served.load(Ordering::Relaxed) <= enough {
            if start.elapsed() > PATIENCE {
                bail!("nothing is granted any more");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Stops them, and says what they saw.
    ///
    /// # Errors
    /// One of them panicked.
    pub async fn stop(mut self) -> Result<Seen> {
        self.stop.send_replace(true);
        let mut seen = Seen::default();
        while let Some(done) = self.running.join_next().await {
            let one = done?;
            seen.served += one.served;
            seen.lost += one.lost;
            seen.in_vain += one.in_vain;
            seen.turned_away += one.turned_away;
            seen.failed.extend(one.failed);
            seen.granted.extend(one.granted);
        }
        Ok(seen)
    }
}

/// A client: one transaction after the other, each at some service.
async fn work(
    number: usize,
    urls: &[String],
    services: &Services,
    stop: &watch::Receiver<bool>,
    served: &AtomicUsize,
) -> Seen {
    let mut seen = Seen::default();
    let mut turn = number;
    while !*stop.borrow() {
        turn += 1;
        let asked = Instant::now();
        let ask = Client::http1_fresh().post(&urls[turn % urls.len()]).timeout(PATIENCE);
        let ask = ask.header("traceparent", format!("00-{}-00000000000000aa-01", trace_id()));
        let answer = ask.header("x-sent", services.now()).header("x-work", "20").send().await;
        match answer {
            Ok(answer) if answer.status == 200 => {
                seen.served += 1;
                served.fetch_add(1, Ordering::Relaxed);
                let timing = answer.header("server-timing");
                let waited = timing.and_then(|timing| timing.split("dur=").nth(1)?.parse::<f64>().ok());
                seen.granted.push(asked + Duration::from_secs_f64(waited.unwrap_or(0.0) / 1000.0));
            }
            Ok(answer) if slug(&answer) == "lease-lost" => seen.lost += 1,
            Ok(answer) if slug(&answer) == "wait-timeout" => seen.in_vain += 1,
            Ok(answer) if slug(&answer) == "backend-unavailable" => {
                seen.turned_away += 1;
                tokio::time::sleep(PAUSE).await;
            }
            Ok(answer) => seen.failed.push(format!("{} {}", answer.status, answer.text())),
            Err(error) => seen.failed.push(format!("{error:#}")),
        }
    }
    seen
}
