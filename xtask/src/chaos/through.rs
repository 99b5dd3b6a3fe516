//! Requests through sidecars: callers ask with a `lock` header, the sidecar takes the locks at the authority, and the service
//! behind it writes to the guarded resource for as long as it is busy, calling on through other sidecars in the same owner's
//! name. The service knows nothing of leases: only the fences that it was given protect what it writes to.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use interlock_testkit::client::traceparent;
use interlock_testkit::upstream::{Recorded, Reply};
use interlock_testkit::{Answer, Client};

use super::book::{Book, SLACK, mode_name};
use super::gate::Section;
use super::plan::Plan;
use super::world::{CALL, TTL, World};
use crate::soak::answer::{self, Status};

/// Between two writes.
const WRITE: Duration = Duration::from_millis(3);

/// Callers and the service behind the sidecars.
pub struct Through {
    /// The service is there before the sidecars are.
    pub world: OnceLock<Arc<World>>,
    pub book: Arc<Book>,
    flights: Mutex<HashMap<u64, Flight>>,
    clients: Vec<Client>,
}

#[derive(Clone)]
struct Flight {
    plan: Arc<Plan>,
    owner: u128,
    sent: Instant,
    claim: u64,
    /// When the service called on through another sidecar, and when that was over. The other one may be in trouble, so what it
    /// took is not this sidecar's to answer for; it answers for that call itself.
    called_on: Option<(Instant, Option<Instant>)>,
}

impl Flight {
    /// How long others have kept it until now.
    fn kept_by_others(&self, now: Instant) -> Duration {
        self.called_on.map_or(Duration::ZERO, |(begin, end)| end.unwrap_or(now) - begin)
    }
}

/// A section at the resource. Dropped with the request, however that ends.
struct Staying<'a> {
    book: &'a Book,
    section: u64,
}

impl Drop for Staying<'_> {
    fn drop(&mut self) {
        self.book.lock().gate.leave(self.section);
    }
}

impl Through {
    /// Nothing is under way.
    pub fn new(book: Arc<Book>) -> Arc<Self> {
        let clients = (0..6).map(|_| Client::http2()).collect();
        Arc::new(Through { world: OnceLock::new(), book, flights: Mutex::default(), clients })
    }

    fn flights(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Flight>> {
        self.flights.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Sends a request through some sidecar, and judges what comes back.
    pub fn transaction(self: Arc<Self>, plan: Arc<Plan>, owner: u128) -> Pin<Box<dyn Future<Output = bool> + Send>> {
        Box::pin(async move {
            let Some(world) = self.world.get() else { return false };
            let name = format!("{owner:032x}");
            let claim = self.book.lock().asked(&name, &plan.locks);
            let number = usize::try_from(claim).unwrap_or(0);
            let sidecar = &world.sidecars[number % world.sidecars.len()];
            let sent = Instant::now();
            self.flights().insert(claim, Flight { plan: Arc::clone(&plan), owner, sent, claim, called_on: None });
            let member = |(name, mode): &(String, _)| format!("{name};mode={}", mode_name(*mode));
            let locks = plan.locks.iter().map(member).collect::<Vec<_>>().join(", ");
            let wait = plan.wait.as_secs_f64();
            let longest = plan.alone() + CALL * 4;
            // As many as there are calls in it may be as late as that.
            let patience = plan.longest() + (CALL * 4 + SLACK * 2) * plan.depth();
            let ask = self.clients[number % self.clients.len()]
                .get(format!("http://{}/work", sidecar.address()))
                .header("traceparent", traceparent(owner))
                .header("x-chaos", claim.to_string())
                .header("lock", locks.replace(", ", &format!(";wait={wait:.3}, ")) + &format!(";wait={wait:.3}"));
            let answer = ask.timeout(patience).send().await;
            let now = Instant::now();
            let elsewhere = self.flights().remove(&claim).map_or(Duration::ZERO, |flight| flight.kept_by_others(now));
            let took = (now - sent).saturating_sub(elsewhere);
            let troubled = sidecar.troubles.between(sent - TTL, now);
            let mut book = self.book.lock();
            // The sidecar gives its lease back without being waited for, over a network that may be slow.
            book.waits.over(claim, now + TTL + CALL);
            if took > longest + SLACK && !troubled {
                book.wrong.push(format!("{} may take {longest:?} and took {took:?}", sidecar.name));
            }
            drop(book);
            self.judge(answer, &plan, &name, claim, troubled)
        })
    }

    /// Whether it was served; what is wrong with its answer is written down.
    fn judge(&self, answer: anyhow::Result<Answer>, plan: &Plan, owner: &str, claim: u64, troubled: bool) -> bool {
        let wrong = |what: String| self.book.lock().wrong.push(what);
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                self.book.lock().numbers.unanswered += 1;
                if !troubled {
                    wrong(format!("no answer, and the sidecar was not in trouble: {error:#}"));
                }
                return false;
            }
        };
        match answer::lock_status(&answer, "chaos") {
            Ok(Some(Status::Acquired(seconds))) => {
                self.book.lock().numbers.granted(Duration::from_secs_f64(seconds.max(0.0)));
                true
            }
            Ok(Some(Status::Refused(_))) => {
                let slug = self.book.refused(&answer, owner, claim, Instant::now());
                let mut book = self.book.lock();
                book.numbers.unavailable += u64::from(slug == "backend-unavailable");
                book.numbers.lost += u64::from(slug == "lease-lost");
                false
            }
            Ok(None) if troubled && answer.status == 503 => {
                self.book.lock().numbers.unanswered += 1;
                false
            }
            Ok(None) => {
                wrong(format!(
                    "{:?} was answered {} without lock-status: {}",
                    plan.locks,
                    answer.status,
                    answer.text()
                ));
                false
            }
            Err(what) => {
                wrong(what);
                false
            }
        }
    }

    /// The service.
    pub async fn serve(self: Arc<Self>, request: Recorded) -> Reply {
        let id = request.header("x-chaos").and_then(|id| id.parse().ok()).unwrap_or(0);
        let Some(flight) = self.flights().get(&id).cloned() else {
            return Reply::new(200, "nobody waits for this");
        };
        let fences = request.headers.get_all("lock-fence").iter();
        let fences = fences.map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned()).collect::<Vec<_>>().join(", ");
        let grants = match answer::lock_fence(&fences) {
            Ok(grants) => grants,
            Err(what) => {
                self.book.lock().wrong.push(what);
                return Reply::new(500, "");
            }
        };
        let has = |(name, mode): &(String, _)| grants.iter().any(|g| g.lock == *name && g.mode == *mode);
        if !flight.plan.locks.iter().all(has) {
            self.book.lock().wrong.push(format!("it asked for {:?} and has {grants:?}", flight.plan.locks));
        }
        let section = Section {
            owner: format!("{:032x}", flight.owner),
            grants,
            sent: flight.sent,
            // Not renewed for certain.
            valid_until: flight.sent + TTL,
            about: format!("request {id}, through a sidecar"),
        };
        let section = {
            let mut book = self.book.lock();
            book.waits.granted(flight.claim, Instant::now());
            book.gate.enter(section)
        };
        let staying = Staying { book: &self.book, section };
        if self.work(section, flight.plan.work).await
            && let Some(then) = &flight.plan.then
        {
            self.called_on(id, |called| *called = Some((Instant::now(), None)));
            Arc::clone(&self).transaction(Arc::new((**then).clone()), flight.owner).await;
            self.called_on(id, |called| called.iter_mut().for_each(|(_, end)| *end = Some(Instant::now())));
            self.work(section, flight.plan.work).await;
        }
        drop(staying);
        Reply::new(200, "done\n")
    }

    /// Writes into a flight, if it is still waited for, when it called on.
    fn called_on(&self, id: u64, write: impl FnOnce(&mut Option<(Instant, Option<Instant>)>)) {
        if let Some(flight) = self.flights().get_mut(&id) {
            write(&mut flight.called_on);
        }
    }

    async fn work(&self, section: u64, span: Duration) -> bool {
        let until = Instant::now() + span;
        loop {
            if !self.book.lock().gate.write(section, Instant::now()) {
                return false;
            }
            if Instant::now() >= until {
                return true;
            }
            tokio::time::sleep(WRITE).await;
        }
    }
}
