//! The conformance cases (tests/conformance/README.md) on the virtual clock, each on two layouts:
//!
//! * *calls*: every owner is a caller whose leases live by its own renewals, as over the lease API;
//! * *workers*: every owner is served by a worker of its own whose heartbeat keeps its leases, as requests in a proxy
//!   are. Cases that renew by hand, or let a TTL lapse under a living client, have no meaning there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeMap;

use common::{Ask, Got, IS, IX, S, SIX, World, X, ask, lock, ms, rules};
use interlock_core::session::DEAD_AFTER;
use interlock_core::{Cause, Class, LeaseId, Mode, Rank};
use serde_json::Value;
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const CASES: &str = include_str!("../../tests/conformance/cases.json");

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Calls,
    Workers,
}

/// Why a case cannot be run: what it needs is not in the contract.
fn skip(case: &Value) -> Option<&'static str> {
    let option = |name: &str| case["options"][name].as_str();
    let releases = || steps(case).any(|step| step["op"] == "release");
    if option("order") == Some("learned") {
        return Some("the order is declared by rank, never learned");
    }
    if case["options"]["lock_delay_ms"].is_u64() {
        return Some("an expired lock is free at once: no lock-delay");
    }
    if option("reentrant") == Some("idempotent") && releases() {
        return Some("re-entry is counted, one release does not undo two grants");
    }
    if option("upgrade") == Some("reject") && option("reentrant") != Some("reject") {
        return Some("the sole holder upgrades at once");
    }
    None
}

/// What a case is about and only a layer above the core can show; its steps run all the same.
fn beyond(case: &Value) -> Option<&'static str> {
    let needs = |feature: &str| case["requires"].as_array().unwrap().iter().any(|it| it == feature);
    match () {
        () if needs("revoke") => Some("the message that asks the holder to let go"),
        () if needs("authority-restart") => Some("the restart of the authority"),
        () if needs("bad-input") => Some("missing names (LockName::parse refuses them)"),
        () if needs("status") => Some("the status query"),
        () => None,
    }
}

/// Whether the case can be told on that layout.
fn fits(case: &Value, layout: Layout) -> bool {
    let lapses = |step: &Value| step["op"] == "renew" || !step["expired"].is_null();
    let dies_alive = |step: &Value| {
        step["op"] == "expire" && !steps(case).any(|other| other["op"] == "crash" && other["owner"] == step["owner"])
    };
    layout == Layout::Calls || !steps(case).any(|step| lapses(step) || dies_alive(step))
}

fn steps(case: &Value) -> impl Iterator<Item = &Value> {
    case["steps"].as_array().unwrap().iter()
}

fn mode(step: &Value) -> Mode {
    match step["mode"].as_str().unwrap() {
        "X" | "P" => X,
        "S" => S,
        "IS" => IS,
        "IX" => IX,
        "SIX" => SIX,
        other => panic!("unknown mode {other}"),
    }
}

/// Bare names get a class of their own, which carries the rank and the permits.
fn name_of(step: &Value) -> String {
    format!("{}/lock", step["lock"].as_str().unwrap())
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().map(|list| list.iter().map(|it| it.as_str().unwrap().to_owned()).collect()).unwrap_or_default()
}

/// One case on its way.
struct Run<'a> {
    layout: Layout,
    case: &'a Value,
    world: World,
    /// The worker of each owner.
    at: BTreeMap<String, usize>,
    /// Leases asked for: owner, lock, mode; in order.
    asked: Vec<(LeaseId, String, String, Mode)>,
}

/// Says which case it was when an invariant fails in it.
struct Name<'a>(&'a str, Layout);

impl Drop for Name<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("in {} ({:?})", self.0, self.1);
        }
    }
}

impl<'a> Run<'a> {
    fn new(case: &'a Value, layout: Layout) -> Self {
        let mut rules = rules();
        for (name, lock) in case["locks"].as_object().unwrap() {
            let number = |field: &str| lock[field].as_u64().map(|number| u32::try_from(number).unwrap());
            let class =
                Class { rank: number("rank").map(Rank), permits: number("permits").unwrap_or(1), ..Class::default() };
            rules.classes.insert(name.clone(), class);
        }
        if layout == Layout::Calls {
            rules.limits.longest_ttl = ms(3_600_000);
        }
        Run { layout, case, world: World::with(rules, 0, 0), at: BTreeMap::new(), asked: Vec::new() }
    }

    fn worker(&mut self, owner: &str) -> usize {
        if let Some(at) = self.at.get(owner) {
            return *at;
        }
        let at = self.world.add_worker(self.layout == Layout::Workers);
        self.at.insert(owner.to_owned(), at);
        at
    }

    /// The latest lease that the owner holds on the lock, as far as it knows.
    fn lease(&self, owner: &str, lock: &str, of: Option<Mode>) -> Option<LeaseId> {
        let mine = self
            .asked
            .iter()
            .rev()
            .filter(|(_, who, what, mode)| who == owner && what == lock && of.is_none_or(|of| of == *mode));
        mine.map(|(lease, ..)| *lease).find(|lease| self.world.holds(*lease))
    }

    fn owners(&self, leases: &[LeaseId]) -> Vec<String> {
        let owner = |lease: &LeaseId| self.asked.iter().find(|(id, ..)| id == lease).unwrap().1.clone();
        leases.iter().map(owner).collect()
    }

    /// Does one step; says how it came out, and who was woken.
    fn step(&mut self, step: &Value) -> Result<(String, Vec<String>), String> {
        let who = step["owner"].as_str().unwrap().to_owned();
        let mut woken = Vec::new();
        let outcome = match step["op"].as_str().unwrap() {
            "acquire" => return self.acquire(step, &who).map(|outcome| (outcome, Vec::new())),
            "release" => return Ok(self.release(step, &who)),
            "renew" => self.renew(step, &who),
            "access" => self.access(step, &who),
            "cancel" => {
                let worker = self.worker(&who);
                let lease = *self.world.workers[worker].pending.keys().next().ok_or("nothing to cancel")?;
                self.world.cancel(lease);
                "ok"
            }
            "crash" => {
                woken = self.crash(&who);
                "ok"
            }
            "expire" => {
                woken = self.expire(step, &who)?;
                "ok"
            }
            "downgrade" => {
                let name = name_of(step);
                let held = self.lease(&who, &name, None).ok_or("nothing to downgrade")?;
                let outcome = self.acquire(step, &who)?;
                if outcome != "granted" {
                    return Err(format!("the weaker mode: {outcome}"));
                }
                self.world.release(held);
                "ok"
            }
            "admin-release" => {
                let name = lock(&name_of(step));
                let worker = self.worker(&who);
                self.world.workers.iter_mut().for_each(|worker| worker.steady.clear());
                self.world.on(worker, |table, scene| table.break_glass(scene, &name)).map_err(|it| it.to_string())?;
                "ok"
            }
            "advance" => {
                woken = self.advance(step)?;
                "ok"
            }
            other => return Err(format!("unknown step {other}")),
        };
        if woken.is_empty() {
            woken = self.owners(&self.world.woken);
        }
        Ok((outcome.to_owned(), woken))
    }

    fn request(&self, step: &Value, who: &str) -> Ask {
        let millis = |field: &str, other: u64| ms(step[field].as_u64().unwrap_or(other));
        let (ttl, wait) = match self.layout {
            Layout::Calls => (3_600_000, 36_000_000),
            Layout::Workers => (5_000, 100_000),
        };
        let request = ask(who).lock(&name_of(step), mode(step));
        let request = request.wait(millis("wait_ms", wait)).ttl(millis("ttl_ms", ttl)).hold(ms(360_000_000));
        if self.case["options"]["reentrant"] == "reject" { request.not_reentrant() } else { request }
    }

    fn acquire(&mut self, step: &Value, who: &str) -> Result<String, String> {
        let (request, worker, began) = (self.request(step, who), self.worker(who), self.world.now);
        let waits_out = step["expect"] == "timeout" && step["wait_ms"].as_u64() != Some(0);
        let refusal = match self.world.ask(worker, &request) {
            Got::Granted(lease) => {
                self.asked.push((lease, who.to_owned(), name_of(step), mode(step)));
                return Ok("granted".into());
            }
            Got::Waits(lease) => {
                self.asked.push((lease, who.to_owned(), name_of(step), mode(step)));
                if !waits_out {
                    return Ok("waits".into());
                }
                self.world.advance(ms(step["wait_ms"].as_u64().unwrap()));
                let Some((_, refusal)) = self.world.refused.pop() else { return Ok("waits".into()) };
                refusal
            }
            Got::Refused(refusal) => refusal,
        };
        if let Some([low, high]) = step["elapsed_ms"].as_array().map(Vec::as_slice) {
            let elapsed = self.world.now.since(began);
            if elapsed < ms(low.as_u64().unwrap()) || elapsed > ms(high.as_u64().unwrap()) {
                return Err(format!("took {elapsed:?}"));
            }
        }
        Ok(match &refusal.cause {
            Cause::Deadlock { cycle } => {
                let mut owners: Vec<String> = cycle.iter().map(|edge| edge.owner.to_string()).collect();
                owners.push(cycle.last().unwrap().held_by.to_string());
                if !step["cycle"].is_null() && texts(&step["cycle"]) != owners {
                    return Err(format!("names the cycle {owners:?}"));
                }
                "rejected-deadlock".into()
            }
            Cause::OrderViolation { .. } => "rejected-order".into(),
            Cause::Held { .. } | Cause::WaitTimeout { .. } => "timeout".into(),
            other => return Err(format!("refused for {other:?}")),
        })
    }

    fn release(&mut self, step: &Value, who: &str) -> (String, Vec<String>) {
        let (mut outcome, mut woken) = ("error-not-holder", Vec::new());
        if step["stale"] != true {
            while let Some(lease) = self.lease(who, &name_of(step), None) {
                if self.world.release(lease).is_empty() {
                    outcome = "ok";
                }
                woken.extend(self.owners(&self.world.woken));
                if step["all"] != true {
                    break;
                }
            }
        }
        (outcome.into(), woken)
    }

    fn renew(&mut self, step: &Value, who: &str) -> &'static str {
        let Some(id) = self.lease(who, &name_of(step), None).filter(|_| step["stale"] != true) else {
            return "error-not-holder";
        };
        let at = self.worker(who);
        if let Some(ttl) = step["ttl_ms"].as_u64() {
            let mut lease = self.world.workers[at].leases.remove(&id).unwrap();
            let lost = self.world.on(at, |table, scene| table.renew_for(scene, &mut lease, ms(ttl))).unwrap();
            self.world.workers[at].leases.insert(id, lease);
            return if lost.is_some() { "error-not-holder" } else { "ok" };
        }
        if self.world.renew(id) { "ok" } else { "error-not-holder" }
    }

    /// Whether the owner holds the lock now, in a mode that allows what is asked.
    fn access(&mut self, step: &Value, who: &str) -> &'static str {
        let (name, wanted, at) = (lock(&name_of(step)), mode(step), self.worker(who));
        let leases: Vec<LeaseId> = self.world.workers[at].leases.keys().copied().collect();
        let holds = leases.into_iter().any(|id| {
            let grant = self.world.workers[at].leases[&id].grants().iter().find(|grant| grant.name == name).cloned();
            grant.filter(|grant| grant.mode.covers(wanted)).is_some_and(|grant| {
                let holder = self.world.on(at, |table, scene| table.holder_of(scene, &name, grant.fence)).unwrap();
                holder.is_some_and(|owner| owner.as_str() == who)
            })
        });
        if holds && step["stale"] != true { "allowed" } else { "denied" }
    }

    fn crash(&mut self, who: &str) -> Vec<String> {
        let at = self.worker(who);
        let mut woken = Vec::new();
        if self.layout == Layout::Calls {
            // The proxy sees the connections of its waiting requests close.
            while let Some(lease) = self.world.workers[at].pending.keys().next().copied() {
                self.world.cancel(lease);
                woken.extend(self.owners(&self.world.woken));
            }
            self.world.crash(at);
        } else {
            self.world.crash(at);
            self.world.advance(DEAD_AFTER);
            woken = self.owners(&self.world.woken);
        }
        self.at.remove(who);
        woken
    }

    fn expire(&mut self, step: &Value, who: &str) -> Result<Vec<String>, String> {
        let name = name_of(step);
        let asked =
            steps(self.case).find(|it| it["op"] == "acquire" && it["owner"] == who && it["lock"] == step["lock"]);
        self.world.advance(self.request(asked.ok_or("never held")?, who).longest_ttl());
        let woken = self.owners(&self.world.woken);
        let keeper = self.worker("keeper");
        self.world.sweep(keeper);
        if !self.world.expired().contains(&(who.to_owned(), name)) {
            return Err("has not expired".into());
        }
        Ok(woken)
    }

    fn advance(&mut self, step: &Value) -> Result<Vec<String>, String> {
        let known = self.world.expired().len();
        self.world.advance(ms(step["ms"].as_u64().unwrap()));
        let mut woken = self.owners(&self.world.woken);
        let timed_out: Vec<LeaseId> = self.world.refused.iter().map(|(lease, _)| *lease).collect();
        let keeper = self.worker("keeper");
        self.world.sweep(keeper);
        woken.extend(self.owners(&self.world.woken));
        let expired = self.world.expired().split_off(known);
        let told = step["expired"].as_array().into_iter().flatten();
        let told = told.map(|it| (it[0].as_str().unwrap().to_owned(), format!("{}/lock", it[1].as_str().unwrap())));
        if expired != told.collect::<Vec<_>>() {
            return Err(format!("expired: {expired:?}"));
        }
        if self.owners(&timed_out) != texts(&step["timed_out"]) {
            return Err(format!("timed out: {timed_out:?}"));
        }
        Ok(woken)
    }

    fn run(mut self) -> Result<(), String> {
        let reload = self.case["requires"].as_array().unwrap().iter().any(|it| it == "config-reload");
        for (at, step) in steps(self.case).enumerate() {
            let _name = Name(self.case["name"].as_str().unwrap(), self.layout);
            let failed = |what: String| format!("step {at} {step}: {what}");
            if reload && at == 1 {
                // Another configuration of the same locks comes in while one is held.
                self.world.rules.limits.waiters_per_lock += 1;
                self.world.rules.classes.insert("another".into(), Class::default());
            }
            let (outcome, woken) = self.step(step).map_err(failed)?;
            let expected = step["expect"]
                .as_str()
                .into_iter()
                .chain(step["alt_expect"].as_array().into_iter().flatten().filter_map(Value::as_str));
            let expected: Vec<&str> = expected.collect();
            if !expected.is_empty() && !expected.contains(&outcome.as_str()) {
                return Err(failed(outcome));
            }
            if woken != texts(&step["wakes"]) {
                return Err(failed(format!("woke {woken:?}")));
            }
        }
        self.world.finish();
        Ok(())
    }
}

#[test]
fn every_case_of_the_contract_passes() {
    let cases: Vec<Value> = serde_json::from_str(CASES).unwrap();
    assert_eq!(cases.len(), 181);
    // By source: passed over calls, passed over workers, skipped.
    let mut table: BTreeMap<&str, [usize; 3]> = BTreeMap::new();
    let mut skipped: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut failures = Vec::new();
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let row = table.entry(name.split('/').next().unwrap()).or_default();
        if let Some(why) = skip(case) {
            row[2] += 1;
            skipped.entry(why).or_default().push(name);
            continue;
        }
        for (column, layout) in [Layout::Calls, Layout::Workers].into_iter().enumerate() {
            if fits(case, layout) {
                match Run::new(case, layout).run() {
                    Ok(()) => row[column] += 1,
                    Err(why) => failures.push(format!("{name} ({layout:?}): {why}")),
                }
            }
        }
    }
    println!("{:<12} {:>6} {:>8} {:>8}", "source", "calls", "workers", "skipped");
    for (source, [calls, workers, skipped]) in &table {
        println!("{source:<12} {calls:>6} {workers:>8} {skipped:>8}");
    }
    for (why, names) in &skipped {
        println!("skipped {}: {why}: {}", names.len(), names.join(", "));
    }
    for case in &cases {
        if let Some(what) = beyond(case) {
            println!("passed without {what}, which is not the core's: {}", case["name"].as_str().unwrap());
        }
    }
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
    let counts = table.values().fold([0; 3], |sum, row| [sum[0] + row[0], sum[1] + row[1], sum[2] + row[2]]);
    println!("passed {} over calls, {} over workers; skipped {}", counts[0], counts[1], counts[2]);
    assert_eq!((counts[0], counts[2]), (159, 22), "a case may be skipped only for a feature that the contract lacks");
}
