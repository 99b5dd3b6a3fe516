//! A lock manager that is asked by calls of the lease API: PUT, DELETE and renewals by lease id, and a look at the lock where
//! it has to be known who waits.
//!
//! Nothing here waits for time to pass. A lease that a case lets lapse has a short TTL of its own and is not renewed; all
//! others have one that outlives their case.

use std::collections::BTreeMap;
use std::rc::Rc;

use hyper::Method;
use interlock_conformance::case::Feature;
use interlock_conformance::run::Wrong;
use interlock_conformance::{Ask, AskId, Case, Claim, Due, Expect, Mode, Outcome, Target};
use interlock_testkit::client::Pending;
use interlock_testkit::{Answer, Client, wait_for_async};
use serde_json::{Value, json};

use crate::common::{DEADLINE, Lane};
use crate::wire::names::{mode, name};

/// The TTL of a lease that a case lets lapse: long enough to see others wait for it.
const LAPSE: &str = "3s";

/// The wait of a request that a case lets time out behind a lease that lapses.
const SHORT_WAIT: &str = "1s";

/// What became of an ask.
enum State {
    Waits(Pending),
    /// Under this fence.
    Holds(u64),
    Over,
}

struct Asked {
    /// The lease's name, which is the capability.
    lease: String,
    owner: String,
    lock: String,
    lapses: bool,
    state: State,
    /// The fence that it was granted under, though it may have ended.
    fence: Option<u64>,
}

/// The clients of a case.
pub struct Leased {
    number: usize,
    case: &'static Case,
    lane: Rc<Lane>,
    /// One for each owner, so that both workers come to serve some.
    clients: BTreeMap<String, Client>,
    asked: BTreeMap<AskId, Asked>,
    /// How many lease ids were invented.
    invented: usize,
}

impl Leased {
    /// The case of this number.
    pub fn new(number: usize, case: &'static Case, lane: Rc<Lane>) -> Self {
        Leased { number, case, lane, clients: BTreeMap::new(), asked: BTreeMap::new(), invented: 0 }
    }

    fn name(&self, lock: &str) -> String {
        name(self.number, self.case, lock)
    }

    fn owner(&self, who: &str) -> String {
        format!("{}:{who}", self.number)
    }

    fn client(&mut self, who: &str) -> Client {
        self.clients.entry(who.to_owned()).or_insert_with(Client::http2).clone()
    }

    fn ask(&mut self, who: &str, method: Method, path: &str) -> interlock_testkit::client::Ask {
        let url = self.lane.url(&format!("/interlock/v1/{path}"));
        self.client(who).ask(method, url)
    }

    /// The owners of a lock's holders, with their fences, and of its waiters.
    async fn view(&mut self, lock: &str) -> Result<(Vec<(String, u64)>, Vec<String>), Wrong> {
        self.view_by("a watcher", lock).await
    }

    /// The same, over the connection of this client: seen by the worker that its own calls are served by.
    async fn view_by(&mut self, who: &str, lock: &str) -> Result<(Vec<(String, u64)>, Vec<String>), Wrong> {
        let path = format!("locks/{}", self.name(lock));
        let answer = self.ask(who, Method::GET, &path).send().await.map_err(|error| format!("{error:#}"))?;
        if answer.status == 404 {
            return Ok((Vec::new(), Vec::new()));
        }
        let seen = answer.json();
        let owner = |entry: &Value| entry["owner"].as_str().unwrap_or_default().to_owned();
        let holders = seen["holders"].as_array().ok_or_else(|| format!("no holders: {seen}"))?;
        let waiters = seen["waiters"].as_array().ok_or_else(|| format!("no waiters: {seen}"))?;
        let holders = holders.iter().map(|entry| (owner(entry), entry["fence"].as_u64().unwrap_or_default()));
        Ok((holders.collect(), waiters.iter().map(owner).collect()))
    }

    /// How many asks of ours wait for a lock.
    fn waiting(&self, lock: &str) -> usize {
        self.asked.values().filter(|it| it.lock == lock && matches!(it.state, State::Waits(_))).count()
    }

    /// Waits until as many wait for the lock as should.
    async fn until_settled(&mut self, lock: &str) {
        let count = self.waiting(lock);
        let what = format!("{count} to wait for {lock} in {}", self.case.name);
        wait_for_async(&what, DEADLINE, async || {
            self.view(lock).await.is_ok_and(|(_, waiters)| waiters.len() == count)
        })
        .await;
    }

    /// What the answer to a PUT says.
    fn told(&self, ask: &Ask<'_>, answer: &Answer) -> Result<(State, Outcome), Wrong> {
        let said = answer.json();
        if answer.status == if ask.again.is_some() { 200 } else { 201 } {
            return Ok((State::Holds(self.fence(ask.lock, &said)?), Outcome::Granted));
        }
        let slug = said["type"].as_str().unwrap_or_default().replace("urn:interlock:problem:", "");
        if said["lock"] != self.name(ask.lock) || said["owner"] != self.owner(ask.owner) {
            return Err(format!("refused as another: {said}"));
        }
        let at_once = ask.wait_ms == Some(0);
        let outcome = match (answer.status, slug.as_str()) {
            (409, "deadlock") => Outcome::Deadlock(self.cycle(&said)?),
            (409, "order-violation") => Outcome::Order,
            (423, "lock-held") if at_once => Outcome::Timeout(0),
            (423, "wait-timeout") if !at_once => Outcome::Timeout(u64::try_from(answer.took.as_millis()).unwrap()),
            _ => return Err(format!("{}: {said}", answer.status)),
        };
        Ok((State::Over, outcome))
    }

    fn fence(&self, lock: &str, lease: &Value) -> Result<u64, Wrong> {
        let locks = lease["locks"].as_array().ok_or_else(|| format!("no locks: {lease}"))?;
        match locks.as_slice() {
            [one] if one["name"] == self.name(lock) => {
                one["fence"].as_u64().ok_or_else(|| format!("no fence: {lease}"))
            }
            _ => Err(format!("other locks: {lease}")),
        }
    }

    fn cycle(&self, problem: &Value) -> Result<Vec<String>, Wrong> {
        let cycle = problem["cycle"].as_array().ok_or("no cycle")?;
        let name = |owner: &Value| {
            let owner = owner.as_str().and_then(|owner| owner.strip_prefix(&self.owner("")));
            owner.map(str::to_owned).ok_or_else(|| format!("a stranger in the cycle: {problem}"))
        };
        let mut owners = cycle.iter().map(|edge| name(&edge["owner"])).collect::<Result<Vec<_>, _>>()?;
        let closes = cycle.iter().zip(cycle.iter().skip(1)).all(|(one, next)| one["held_by"] == next["owner"]);
        let ours = |edge: &Value| self.case.locks.keys().any(|lock| edge["waits_for"] == self.name(lock));
        if !closes || !cycle.iter().all(ours) {
            return Err(format!("no cycle of this case: {problem}"));
        }
        owners.push(name(&cycle.last().ok_or("an empty cycle")?["held_by"])?);
        Ok(owners)
    }

    async fn delete(&mut self, owner: &str, lease: &str) -> Result<String, Wrong> {
        let answer = self.ask(owner, Method::DELETE, &format!("leases/{lease}")).send().await;
        let answer = answer.map_err(|error| format!("{error:#}"))?;
        match answer.json()["status"].as_str() {
            Some(status) if answer.status == 200 => Ok(status.to_owned()),
            _ => Err(format!("{}: {}", answer.status, answer.text())),
        }
    }

    /// Waits until the lease is over, of whatever that comes.
    async fn until_over(&mut self, id: AskId) {
        let (owner, path) = (self.asked[&id].owner.clone(), format!("leases/{}", self.asked[&id].lease));
        wait_for_async(&format!("the end of ask {id} in {}", self.case.name), DEADLINE, async || {
            let answer = self.ask(&owner, Method::GET, &path).send().await;
            answer.is_ok_and(|answer| answer.status == 404)
        })
        .await;
    }

    fn take(&mut self, id: AskId) -> State {
        std::mem::replace(&mut self.asked.get_mut(&id).expect("it was asked").state, State::Over)
    }
}

impl Target for Leased {
    async fn acquire(&mut self, ask: &Ask<'_>) -> Result<Outcome, Wrong> {
        let lease = match ask.again {
            Some(same) => self.asked[&same].lease.clone(),
            None => format!("lease-{:04}-{:04}-of-the-cases", self.number, ask.id),
        };
        let mut body = json!({
            "owner": self.owner(ask.owner),
            "locks": [{ "name": self.name(ask.lock), "mode": mode(ask.mode) }],
        });
        match ask.wait_ms {
            _ if ask.times_out => body["wait"] = json!(SHORT_WAIT),
            Some(wait) if wait == 0 || ask.allowed.contains(&Expect::Timeout) => {
                body["wait"] = json!(format!("{wait}ms"))
            }
            // The policy's: longer than any case takes.
            _ => {}
        }
        if ask.lapses {
            body["ttl"] = json!(LAPSE);
        }
        let pending = self.ask(ask.owner, Method::PUT, &format!("leases/{lease}")).body(body.to_string()).spawn();
        let (owner, lock) = (ask.owner.to_owned(), ask.lock.to_owned());
        let before = self.waiting(ask.lock);
        let mut waits = false;
        if !ask.allowed.contains(&Expect::Timeout) {
            let what = format!("ask {} of {} to wait or to be answered", ask.id, self.case.name);
            wait_for_async(&what, DEADLINE, async || {
                // Another worker sees it stand in the queue while it is still looked at whether that closes a cycle.
                waits = self.view_by(ask.owner, ask.lock).await.is_ok_and(|(_, waiters)| waiters.len() > before);
                waits || pending.is_answered()
            })
            .await;
        }
        let (state, outcome) = if waits && !pending.is_answered() {
            (State::Waits(pending), Outcome::Waits)
        } else {
            self.told(ask, &pending.answer().await.map_err(|error| format!("{error:#}"))?)?
        };
        if let (true, State::Holds(fence)) = (self.case.is_about(Feature::Status), &state) {
            let path = format!("locks/{}", self.name(ask.lock));
            let seen = self.ask("a watcher", Method::GET, &path).send().await.expect("an answer").text();
            if !seen.contains(&self.owner(ask.owner)) || !seen.contains(&fence.to_string()) || seen.contains(&lease) {
                return Err(format!("the status query says {seen}"));
            }
        }
        let fence = if let State::Holds(fence) = state { Some(fence) } else { None };
        self.asked.insert(ask.id, Asked { lease, owner, lock, lapses: ask.lapses, state, fence });
        Ok(outcome)
    }

    async fn release(&mut self, id: AskId) -> Result<bool, Wrong> {
        let (owner, lease) = (self.asked[&id].owner.clone(), self.asked[&id].lease.clone());
        self.take(id);
        match self.delete(&owner, &lease).await?.as_str() {
            "released" => Ok(true),
            "expired" | "unknown" => Ok(false),
            other => Err(other.to_owned()),
        }
    }

    /// With an old lease, or one that never was: whatever the answer, whoever holds the lock still does, under its fence.
    async fn release_nothing(&mut self, owner: &str, lock: &str, once: Option<AskId>) -> Result<bool, Wrong> {
        // A new one each time: to give back what is not there yet takes it back for when it comes.
        self.invented += 1;
        let invented = format!("lease-{:04}-that-never-was-{}", self.number, self.invented);
        let lease = once.map_or(invented, |id| self.asked[&id].lease.clone());
        let before = self.view(lock).await?.0;
        let status = self.delete(owner, &lease).await?;
        if once.is_none() && status != "unknown" {
            return Err(format!("what never was is {status}"));
        }
        Ok(self.view(lock).await?.0 != before)
    }

    async fn cancel(&mut self, id: AskId) -> Result<(), Wrong> {
        let lock = self.asked[&id].lock.clone();
        if let State::Waits(pending) = self.take(id) {
            pending.leave().await;
        }
        self.until_settled(&lock).await;
        Ok(())
    }

    /// The owner's waiting calls are closed, and nobody renews its leases any more.
    async fn crash(&mut self, _: &str, waiting: &[AskId]) -> Result<(), Wrong> {
        for id in waiting {
            self.cancel(*id).await?;
        }
        Ok(())
    }

    /// Waits for what comes of the time that passes: waits that run out, leases that end.
    async fn advance(&mut self, _: u64, due: &Due) -> Result<Due, Wrong> {
        for id in &due.timed_out {
            let State::Waits(pending) = self.take(*id) else { return Err(format!("ask {id} does not wait")) };
            let answer = pending.answer().await.map_err(|error| format!("{error:#}"))?;
            if answer.status != 423 || answer.json()["type"] != "urn:interlock:problem:wait-timeout" {
                return Err(format!("{}: {}", answer.status, answer.text()));
            }
        }
        for id in &due.expired {
            self.expire(*id).await?;
        }
        Ok(Due { expired: due.expired.clone(), timed_out: due.timed_out.clone() })
    }

    async fn expire(&mut self, id: AskId) -> Result<(), Wrong> {
        if !self.asked[&id].lapses {
            return Err("it was not asked for to lapse".into());
        }
        self.until_over(id).await;
        Ok(())
    }

    async fn renew(&mut self, id: AskId, _: Option<u64>) -> Result<bool, Wrong> {
        let (owner, lease) = (self.asked[&id].owner.clone(), self.asked[&id].lease.clone());
        let body = json!({ "leases": [{ "id": lease }] });
        let answer = self.ask(&owner, Method::POST, "leases/renew").body(body.to_string()).send().await;
        let answer = answer.map_err(|error| format!("{error:#}"))?;
        match answer.json()["results"][0]["status"].as_str() {
            Some("renewed") => Ok(true),
            Some("lost") => Ok(false),
            _ => Err(format!("{}: {}", answer.status, answer.text())),
        }
    }

    /// By the administrator, and by nobody else.
    async fn break_glass(&mut self, lock: &str) -> Result<(), Wrong> {
        let path = format!("locks/{}", self.name(lock));
        let stranger = self.ask("a stranger", Method::DELETE, &path).send().await;
        let admin = self.ask("admin", Method::DELETE, &path).header("authorization", "Bearer 0123456789abcdef");
        let (stranger, admin) = (stranger.expect("an answer"), admin.send().await.expect("an answer"));
        match (stranger.status, admin.status) {
            (403, 200) => Ok(()),
            other => Err(format!("{other:?}: {} {}", stranger.text(), admin.text())),
        }
    }

    /// What a lock guards asks who holds it, and lets nobody through but its owner, under the fence that it shows.
    async fn access(&mut self, owner: &str, lock: &str, wanted: Mode, claim: Claim) -> Result<bool, Wrong> {
        let (id, off) = match claim {
            // A gate that asks for a fence lets nobody through who has none.
            Claim::Nothing => return Ok(false),
            Claim::Lease(id) => (id, 0),
            Claim::Forged(id) => (id, 1),
        };
        let fence = self.asked[&id].fence.ok_or("it was never granted")? + off;
        let path = format!("locks/{}", self.name(lock));
        let seen = self.ask("a gate", Method::GET, &path).send().await.expect("an answer").json();
        let holders = seen["holders"].as_array().ok_or_else(|| format!("no holders: {seen}"))?;
        let covers = |held: &Value| *held == mode(wanted) || *held == "exclusive";
        let is_it = |it: &Value| it["owner"] == self.owner(owner) && it["fence"] == fence && covers(&it["mode"]);
        Ok(holders.iter().any(is_it))
    }

    async fn refuses_no_name(&mut self) -> Result<(), Wrong> {
        for locks in [json!([]), json!([{}]), json!([{ "name": "" }]), json!([{ "name": null }])] {
            let path = format!("leases/lease-{:04}-without-a-name", self.number);
            let body = json!({ "owner": "a-stranger", "locks": locks }).to_string();
            let answer = self.ask("a stranger", Method::PUT, &path).body(body).send().await.expect("an answer");
            if answer.status != 400 {
                return Err(format!("{locks} is answered {}: {}", answer.status, answer.text()));
            }
        }
        Ok(())
    }

    /// Waits until so many calls are answered, in the order of their fences; the others still wait.
    async fn granted(&mut self, count: usize) -> Result<Vec<AskId>, Wrong> {
        let answered = |asked: &Asked| matches!(&asked.state, State::Waits(pending) if pending.is_answered());
        let what = format!("{count} hand-overs in {}", self.case.name);
        wait_for_async(&what, DEADLINE, async || self.asked.values().filter(|it| answered(it)).count() >= count).await;
        let ids: Vec<AskId> = self.asked.iter().filter(|(_, it)| answered(it)).map(|(id, _)| *id).collect();
        let mut granted = Vec::new();
        for id in ids {
            let State::Waits(pending) = self.take(id) else { continue };
            let answer = pending.answer().await.map_err(|error| format!("{error:#}"))?;
            if answer.status != 201 {
                return Err(format!("ask {id} is answered {}: {}", answer.status, answer.text()));
            }
            let fence = self.fence(&self.asked[&id].lock, &answer.json())?;
            let asked = self.asked.get_mut(&id).expect("it was asked");
            (asked.state, asked.fence) = (State::Holds(fence), Some(fence));
            granted.push((fence, id));
        }
        granted.sort_unstable();
        if granted.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            return Err(format!("two grants under one fence: {granted:?}"));
        }
        Ok(granted.into_iter().map(|(_, id)| id).collect())
    }

    async fn finish(&mut self) -> Result<(), Wrong> {
        let ids: Vec<AskId> = self.asked.keys().copied().collect();
        for id in ids {
            match self.take(id) {
                State::Waits(pending) => pending.leave().await,
                State::Holds(_) | State::Over => {}
            }
            let (owner, lease) = (self.asked[&id].owner.clone(), self.asked[&id].lease.clone());
            self.delete(&owner, &lease).await?;
        }
        for lock in self.case.locks.keys() {
            let left = self.view(lock).await?;
            if left != (Vec::new(), Vec::new()) {
                return Err(format!("left of {lock}: {left:?}"));
            }
        }
        Ok(())
    }
}
