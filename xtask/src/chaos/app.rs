//! Applications that hold locks over several requests: they ask the authority for leases over the API, renew them, write to
//! the guarded resource under their fences, and give them back. Everything goes over a network that fails.
//!
//! A careful application: it asks again by the same id when it does not know what became of a request, counts its lease from
//! before the authority did, and stops when it must assume that it has ended. But for those whose plan says that they sleep.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyper::Method;
use interlock_testkit::client::Ask;
use interlock_testkit::{Answer, Client};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::book::{Book, SLACK, mode_name};
use super::gate::Section;
use super::plan::Plan;
use super::world::{CALL, PREFIX, TTL, World};
use crate::soak::ledger::{Grant, Mode};

/// Between two tries of a call that came to nothing.
const PAUSE: Duration = Duration::from_millis(40);
/// Between two writes.
const WRITE: Duration = Duration::from_millis(3);

/// The applications, which share a way to the authority.
pub struct Apps {
    pub world: Arc<World>,
    pub book: Arc<Book>,
}

/// A lease as its holder knows it.
struct Lease {
    id: String,
    section: u64,
    claim: u64,
    life: Arc<Life>,
    keeper: JoinHandle<()>,
}

/// Until when it may be relied on.
struct Life {
    valid_until: Mutex<Instant>,
    lost: AtomicBool,
}

impl Life {
    fn valid_until(&self) -> Instant {
        *self.valid_until.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn lives(&self) -> bool {
        !self.lost.load(Ordering::Relaxed) && Instant::now() < self.valid_until()
    }
}

impl Apps {
    /// Runs one transaction in the name of a new owner.
    pub fn transaction<'a>(
        self: &'a Arc<Self>,
        client: &'a Client,
        plan: &'a Plan,
        owner: &'a str,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async move {
            let Some(lease) = self.acquire(client, plan, owner).await else { return };
            if plan.sleeps {
                self.sleep_over(&lease).await;
            } else if self.work(&lease, plan.work).await
                && let Some(then) = &plan.then
            {
                self.transaction(client, then, owner).await;
                self.work(&lease, plan.work).await;
            }
            self.release(client, lease).await;
        })
    }

    fn call(&self, client: &Client, method: Method, path: &str) -> Ask {
        client.ask(method, format!("http://{}{PREFIX}/{path}", self.world.own_way().link.address()))
    }

    /// Whether something was wrong between the applications and the authority.
    fn troubled(&self, from: Instant, to: Instant) -> bool {
        self.world.own_way().troubles.between(from, to) || self.world.authority.troubles.between(from, to)
    }

    /// Asks for a lease until it is granted, refused, or its time is over.
    async fn acquire(self: &Arc<Self>, client: &Client, plan: &Plan, owner: &str) -> Option<Lease> {
        let id = format!("{:032x}", fastrand::u128(..));
        let path = format!("leases/{id}");
        let sent = Instant::now();
        let claim = self.book.lock().asked(owner, &plan.locks);
        let locks = plan.locks.iter().map(|(name, mode)| json!({ "name": name, "mode": mode_name(*mode) }));
        let locks = locks.collect::<Vec<_>>();
        while sent.elapsed() < plan.wait + CALL {
            let tried = Instant::now();
            let left = plan.wait.saturating_sub(sent.elapsed()).max(Duration::from_millis(50));
            let body = json!({ "owner": owner, "locks": locks, "wait": format!("{}ms", left.as_millis()) });
            let ask = self.call(client, Method::PUT, &path).body(body.to_string()).timeout(left + SLACK);
            let answer = ask.send().await;
            let late = tried.elapsed().saturating_sub(left);
            if (late >= SLACK || answer.is_err()) && !self.troubled(tried - TTL, Instant::now()) {
                let said = answer.as_ref().map_or_else(|error| format!("{error:#}"), |a| a.status.to_string());
                let what =
                    format!("a PUT that may wait {left:?} took {:?}, and nothing was wrong: {said}", tried.elapsed());
                self.book.lock().wrong.push(what);
            }
            match answer {
                Ok(answer) if matches!(answer.status, 200 | 201) => {
                    return self.granted(client, plan, owner, &id, claim, sent, tried, &answer);
                }
                // It has just started, or cannot be reached.
                Ok(answer) if answer.status == 503 => self.book.lock().numbers.unavailable += 1,
                Ok(answer) => {
                    let slug = self.book.refused(&answer, owner, claim, Instant::now());
                    if slug == "lease-lost" {
                        // An earlier try had come to something, and that is over.
                        self.book.lock().waits.over(claim, Instant::now() + TTL);
                    }
                    return None;
                }
                Err(_) => self.book.lock().numbers.unanswered += 1,
            }
            tokio::time::sleep(PAUSE).await;
        }
        // What became of the last try nobody knows.
        self.delete(client, &path, Instant::now() + TTL).await;
        let mut book = self.book.lock();
        book.numbers.given_up += 1;
        book.waits.over(claim, Instant::now() + TTL);
        None
    }

    #[allow(clippy::too_many_arguments)]
    fn granted(
        self: &Arc<Self>,
        client: &Client,
        plan: &Plan,
        owner: &str,
        id: &str,
        claim: u64,
        sent: Instant,
        tried: Instant,
        answer: &Answer,
    ) -> Option<Lease> {
        let told = answer.json();
        let waited = millis(&told["waited"]);
        let grants = told["locks"].as_array().into_iter().flatten().filter_map(grant).collect::<Vec<_>>();
        let mut book = self.book.lock();
        let all = plan.locks.iter().all(|(name, mode)| grants.iter().any(|g| g.lock == *name && g.mode == *mode));
        if !all || grants.len() != plan.locks.len() {
            book.wrong.push(format!("{owner} asked for {:?} and got {told}", plan.locks));
            return None;
        }
        // An answer to a repeated request says how long the first one waited.
        let counted_from = if answer.status == 201 { tried + waited } else { tried };
        let valid_until = counted_from + TTL;
        book.numbers.granted(waited);
        book.waits.granted(claim, Instant::now());
        let about = format!("lease {id}, asked for by an application");
        let section = Section { owner: owner.to_owned(), grants, sent, valid_until, about };
        let section = book.gate.enter(section);
        drop(book);
        let life = Arc::new(Life { valid_until: Mutex::new(valid_until), lost: AtomicBool::new(false) });
        let keeper = tokio::spawn(Arc::clone(self).keep(
            client.clone(),
            (!plan.sleeps).then(|| json!({ "leases": [{ "id": id, "receipt": told["receipt"] }] }).to_string()),
            section,
            Arc::clone(&life),
        ));
        Some(Lease { id: id.to_owned(), section, claim, life, keeper })
    }

    /// Renews a lease for as long as that is answered.
    async fn keep(self: Arc<Self>, client: Client, body: Option<String>, section: u64, life: Arc<Life>) {
        let Some(body) = body else { return };
        let mut pause = TTL / 3;
        loop {
            tokio::time::sleep(pause).await;
            if !life.lives() {
                return;
            }
            let sent = Instant::now();
            let ask = self.call(&client, Method::POST, "leases/renew").body(body.clone()).timeout(CALL);
            pause = TTL / 10;
            let Ok(answer) = ask.send().await else { continue };
            if answer.status != 200 {
                continue;
            }
            let told = &answer.json()["results"][0];
            if told["status"] == "lost" {
                life.lost.store(true, Ordering::Relaxed);
                return;
            }
            let valid_until = sent + millis(&told["expires_in"]);
            let mut lock = life.valid_until.lock().unwrap_or_else(|e| e.into_inner());
            *lock = valid_until.max(*lock);
            drop(lock);
            self.book.lock().gate.extend(section, valid_until);
            pause = TTL / 3;
        }
    }

    /// Writes for a while; false when it has lost its lease, or was stopped.
    async fn work(&self, lease: &Lease, span: Duration) -> bool {
        let until = Instant::now() + span;
        loop {
            if !lease.life.lives() {
                self.book.lock().numbers.lost += 1;
                return false;
            }
            if !self.book.lock().gate.write(lease.section, Instant::now()) {
                return false;
            }
            if Instant::now() >= until {
                return true;
            }
            tokio::time::sleep(WRITE).await;
        }
    }

    /// Writes, sleeps until the lease has ended, and writes again as if nothing had happened.
    async fn sleep_over(&self, lease: &Lease) {
        self.book.lock().gate.write(lease.section, Instant::now());
        tokio::time::sleep_until((lease.life.valid_until() + Duration::from_millis(300)).into()).await;
        let mut book = self.book.lock();
        book.numbers.slept += 1;
        let stopped = !book.gate.write(lease.section, Instant::now());
        book.numbers.stale_stopped += u64::from(stopped);
    }

    async fn release(&self, client: &Client, lease: Lease) {
        lease.keeper.abort();
        let valid_until = lease.life.valid_until();
        self.book.lock().gate.leave(lease.section);
        let by = self.delete(client, &format!("leases/{}", lease.id), valid_until + CALL).await;
        self.book.lock().waits.over(lease.claim, by);
    }

    /// Deletes a lease, again and again until it is answered or has ended by itself; gives back by when it is over.
    async fn delete(&self, client: &Client, path: &str, ended: Instant) -> Instant {
        while Instant::now() < ended {
            let answer = self.call(client, Method::DELETE, path).timeout(CALL).send().await;
            if answer.is_ok_and(|answer| answer.status == 200) {
                return Instant::now();
            }
            tokio::time::sleep(PAUSE).await;
        }
        // Renewals that were under way may have come late.
        Instant::now() + TTL
    }
}

fn grant(lock: &Value) -> Option<Grant> {
    let mode = Mode::parse(lock["mode"].as_str()?)?;
    Some(Grant { lock: lock["name"].as_str()?.to_owned(), fence: lock["fence"].as_u64()?, mode })
}

/// A duration as the API spells it.
fn millis(span: &Value) -> Duration {
    let text = span.as_str().unwrap_or_default();
    let parsed = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(ms), _) => ms.parse::<f64>().map(|ms| ms / 1000.0),
        (None, Some(s)) => s.parse(),
        _ => return Duration::ZERO,
    };
    Duration::from_secs_f64(parsed.unwrap_or(0.0))
}
