//! The services behind the sidecars: they do what a request's headers say, work and call on, and pass on what services pass
//! on: the trace and the fences. None of them knows anything of locks.
//!
//! | header | what it makes the service do |
//! | --- | --- |
//! | `x-meet` | wait until as many requests have come as are to meet |
//! | `x-hold` | wait until it is told to go on |
//! | `x-work` | work for so many milliseconds, writing to what is locked all the while |
//! | `x-next` | call on: `POST stock /stock/7` |

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use hyper::Method;
use interlock_testkit::upstream::{Recorded, Reply};
use interlock_testkit::{Answer, Client};
use tokio::sync::{Barrier, mpsc, watch};

use crate::chaos::gate::{Gate, Section};
use crate::soak::answer;
use crate::soak::ledger::Grant;

/// Nothing of a demo takes longer.
pub const PATIENCE: Duration = Duration::from_secs(45);
/// Between two writes.
const WRITE: Duration = Duration::from_millis(5);

/// Something that happened in a service.
pub struct News {
    pub at: Instant,
    pub service: &'static str,
    /// Whose request it is about: its trace.
    pub trace: String,
    pub what: What,
}

/// What happened.
pub enum What {
    /// A request came, with these locks.
    Came(String, Vec<Grant>),
    /// It calls on.
    Calls(String),
    /// What came of that.
    Answered { call: String, answer: Option<Box<Answer>> },
}

/// All services, each known by its name.
pub struct Services {
    /// Everything that they write to.
    gate: Mutex<Gate>,
    outbound: Mutex<HashMap<&'static str, SocketAddr>>,
    news: mpsc::UnboundedSender<News>,
    meeting: Barrier,
    go: watch::Sender<bool>,
    client: Client,
    epoch: Instant,
}

impl Services {
    /// Services that tell their news, and in which so many requests meet.
    pub fn new(news: mpsc::UnboundedSender<News>, meet: usize) -> Arc<Self> {
        Arc::new(Services {
            gate: Mutex::default(),
            outbound: Mutex::default(),
            news,
            meeting: Barrier::new(meet),
            go: watch::Sender::new(false),
            client: Client::http1_fresh(),
            epoch: Instant::now(),
        })
    }

    /// This service calls others through this listener of its sidecar.
    pub fn calls_through(&self, service: &'static str, outbound: SocketAddr) {
        self.outbound.lock().unwrap_or_else(|e| e.into_inner()).insert(service, outbound);
    }

    /// Lets those go on that hold.
    pub fn go(&self) {
        self.go.send_replace(true);
    }

    /// What was written to, and what was seen of it.
    pub fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// This moment, for `x-sent`.
    pub fn now(&self) -> String {
        self.epoch.elapsed().as_micros().to_string()
    }

    fn tell(&self, service: &'static str, trace: &str, what: What) {
        // Who listens ends with the demo; what comes after that is for nobody.
        let _ = self.news.send(News { at: Instant::now(), service, trace: trace.to_owned(), what });
    }

    /// Serves one request.
    pub async fn serve(self: Arc<Self>, service: &'static str, request: Recorded) -> Reply {
        let trace = request.header("traceparent").unwrap_or_default().split('-').nth(1).unwrap_or_default().to_owned();
        let fences = request.headers.get_all("lock-fence").iter();
        let fences = fences.map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned()).collect::<Vec<_>>().join(", ");
        let grants = answer::lock_fence(&fences).unwrap_or_default();
        self.tell(service, &trace, What::Came(format!("{} {}", request.method, request.bare_path()), grants.clone()));
        let number = |name: &str| request.header(name).and_then(|value| value.parse::<u64>().ok());
        let sent = self.epoch + Duration::from_micros(number("x-sent").unwrap_or(0));
        let about = format!("{} {}", request.method, request.path);
        // When its lease ends is its sidecar's business; the demo asks that nobody is ever let in before.
        let section = Section { owner: trace.clone(), grants, sent, valid_until: sent, about };
        let section = Staying { services: &self, section: self.gate().enter(section) };
        if request.headers.contains_key("x-meet") {
            self.meeting.wait().await;
        }
        if request.headers.contains_key("x-hold") {
            // The sender is here: it ends by going on only.
            let _ = self.go.subscribe().wait_for(|go| *go).await;
        }
        section.work(Duration::from_millis(number("x-work").unwrap_or(0))).await;
        let reply = match request.header("x-next") {
            None => Reply::new(200, "done\n"),
            Some(next) => {
                // A service that writes does not take its write back because its caller has gone.
                let call = tokio::spawn(Arc::clone(&self).call_on(service, trace, request, next));
                match call.await.ok().flatten() {
                    Some(answer) => passed_on(&answer),
                    None => Reply::new(502, "the call was not answered\n"),
                }
            }
        };
        drop(section);
        reply
    }

    /// Calls another service, through the sidecar.
    async fn call_on(
        self: Arc<Self>,
        service: &'static str,
        trace: String,
        request: Recorded,
        next: String,
    ) -> Option<Answer> {
        let mut words = next.split_whitespace();
        let (method, host, path) = (words.next()?, words.next()?, words.next()?);
        let outbound = *self.outbound.lock().unwrap_or_else(|e| e.into_inner()).get(service)?;
        let call = format!("{method} {path} of {host}");
        let method = Method::from_bytes(method.as_bytes()).ok()?;
        let mut ask = self.client.ask(method, format!("http://{outbound}{path}")).timeout(PATIENCE);
        ask = ask.header("host", host).header("x-sent", self.now());
        for name in ["traceparent", "lock-fence"] {
            for value in request.headers.get_all(name) {
                ask = ask.header(name, value.as_bytes());
            }
        }
        self.tell(service, &trace, What::Calls(call.clone()));
        let answer = ask.send().await.ok();
        self.tell(service, &trace, What::Answered { call, answer: answer.clone().map(Box::new) });
        answer
    }
}

/// What a service answers when its own call was answered so.
fn passed_on(answer: &Answer) -> Reply {
    let mut reply = Reply::new(answer.status, answer.body.clone());
    for name in ["content-type", "lock-status", "retry-after"] {
        if let Some(value) = answer.header(name) {
            reply = reply.header(name, &value);
        }
    }
    reply
}

/// A request that writes to what it has locked.
struct Staying<'a> {
    services: &'a Services,
    section: u64,
}

impl Staying<'_> {
    async fn work(&self, span: Duration) {
        let until = Instant::now() + span;
        while self.services.gate().write(self.section, Instant::now()) && Instant::now() < until {
            tokio::time::sleep(WRITE).await;
        }
    }
}

impl Drop for Staying<'_> {
    fn drop(&mut self) {
        self.services.gate().leave(self.section);
    }
}
