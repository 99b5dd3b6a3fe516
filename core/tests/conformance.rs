//! The conformance cases (tests/conformance/README.md) on the virtual clock, each on two layouts:
//!
//! * *calls*: every owner is a caller whose leases live by its own renewals, as over the lease API;
//! * *workers*: every owner is served by a worker of its own whose heartbeat keeps its leases, as requests in a proxy
//!   are. Cases that renew by hand, or let a TTL lapse under a living client, have no meaning there.
//!
//! What a case is and when it has passed is in the crate `interlock-conformance`; here is how the core does it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeMap;

use common::{Got, IS, IX, S, SIX, World, X, ask, lock, ms, rules};
use interlock_conformance::need::Aspect;
use interlock_conformance::run::{Wrong, now};
use interlock_conformance::{Ask, AskId, Case, Claim, Due, Expect, Need, Outcome, Profile, Report, Target, Verdict};
use interlock_conformance::{cases, need, run};
use interlock_core::session::DEAD_AFTER;
use interlock_core::{Cause, Class, Fence, LeaseId, LockName, Mode, Rank, Refusal};
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const CALLS: Profile = Profile {
    name: "core, calls",
    lacks: |need| match need {
        Need::IdempotentReentry => Some(COUNTED),
        _ => None,
    },
    shows,
    crash_frees: false,
    virtual_clock: true,
};

const WORKERS: Profile = Profile {
    name: "core, workers",
    lacks: |need| match need {
        Need::IdempotentReentry => Some(COUNTED),
        Need::Renew | Need::Lapse => Some(BEATS),
        _ => None,
    },
    ..CALLS
};

const COUNTED: &str = "re-entry is counted: one release does not undo two grants";
const BEATS: &str = "the heartbeat of a living worker keeps its leases: none is renewed by hand, none lapses";

fn shows(aspect: Aspect) -> bool {
    match aspect {
        Aspect::Reload | Aspect::IdleTime => true,
        Aspect::Revoke | Aspect::AuthorityRestart | Aspect::Status => false,
    }
}

fn mode(mode: interlock_conformance::Mode) -> Mode {
    use interlock_conformance::Mode as Said;
    match mode {
        Said::X | Said::P => X,
        Said::S => S,
        Said::IS => IS,
        Said::IX => IX,
        Said::SIX => SIX,
    }
}

/// Bare names get a class of their own, which carries the rank and the permits.
fn full(name: &str) -> LockName {
    lock(&format!("{name}/lock"))
}

/// What was asked for.
struct Asked {
    lease: LeaseId,
    owner: String,
    lock: LockName,
    ttl: core::time::Duration,
    /// The fence that it was granted under, once it was seen.
    fence: Option<Fence>,
}

/// The core, with the workers of a case.
struct Core {
    beats: bool,
    world: World,
    /// The worker of each owner.
    at: BTreeMap<String, usize>,
    asked: BTreeMap<AskId, Asked>,
    /// Granted after a wait, and not told yet.
    granted: Vec<AskId>,
}

impl Core {
    fn new(case: &Case, profile: &Profile) -> Self {
        let mut rules = rules();
        for (name, lock) in &case.locks {
            let class = Class { rank: lock.rank.map(Rank), permits: lock.permits.unwrap_or(1), ..Class::default() };
            rules.classes.insert(name.clone(), class);
        }
        let beats = profile.name == WORKERS.name;
        if !beats {
            rules.limits.longest_ttl = ms(3_600_000);
        }
        let world = World::with(rules, 0, 0);
        Core { beats, world, at: BTreeMap::new(), asked: BTreeMap::new(), granted: Vec::new() }
    }

    fn worker(&mut self, owner: &str) -> usize {
        if let Some(at) = self.at.get(owner) {
            return *at;
        }
        let at = self.world.add_worker(self.beats);
        self.at.insert(owner.to_owned(), at);
        at
    }

    fn id(&self, lease: LeaseId) -> AskId {
        *self.asked.iter().find(|(_, asked)| asked.lease == lease).expect("a lease of this case").0
    }

    /// Takes in who was granted by what the world did last.
    fn note(&mut self) {
        let woken: Vec<AskId> = self.world.woken.iter().map(|lease| self.id(*lease)).collect();
        self.granted.extend(woken);
    }

    /// The fence that the lease has by now, or had.
    fn fence(&mut self, id: AskId) -> Option<Fence> {
        let (lease, lock) = (self.asked[&id].lease, self.asked[&id].lock.clone());
        if self.world.holds(lease) {
            let at = self.world.worker_of(lease).unwrap();
            let grants = self.world.workers[at].leases[&lease].grants();
            let fence = grants.iter().find(|grant| grant.name == lock).map(|grant| grant.fence);
            self.asked.get_mut(&id).unwrap().fence = fence;
        }
        self.asked[&id].fence
    }

    fn refused(&self, refusal: &Refusal, began: interlock_core::Time) -> Result<Outcome, Wrong> {
        let waited = self.world.now.since(began).as_millis();
        Ok(match &refusal.cause {
            Cause::Deadlock { cycle } => {
                let last = cycle.last().ok_or("a cycle of nobody")?;
                Outcome::Deadlock(
                    cycle.iter().map(|edge| &edge.owner).chain([&last.held_by]).map(ToString::to_string).collect(),
                )
            }
            Cause::OrderViolation { .. } => Outcome::Order,
            Cause::Held { .. } | Cause::WaitTimeout { .. } => Outcome::Timeout(u64::try_from(waited).unwrap()),
            other => return Err(format!("refused for {other:?}")),
        })
    }

    fn sweep(&mut self) {
        let keeper = self.worker("keeper");
        self.world.sweep(keeper);
        self.note();
    }

    /// The asks of leases that the table tells the end of. (No case lets one of two leases of an owner on a lock lapse.)
    fn ended(&self, expired: &[(String, String)]) -> Vec<AskId> {
        let id = |(owner, lock): &(String, String)| {
            let is_it = |asked: &Asked| asked.owner == *owner && asked.lock.as_str() == lock;
            self.asked.iter().rev().find(|(_, asked)| is_it(asked)).map(|(id, _)| *id)
        };
        expired.iter().map(|pair| id(pair).unwrap_or_else(|| panic!("{pair:?} was never asked for"))).collect()
    }
}

impl Target for Core {
    async fn acquire(&mut self, wanted: &Ask<'_>) -> Result<Outcome, Wrong> {
        let (ttl, wait) = if self.beats { (5_000, 100_000) } else { (3_600_000, 36_000_000) };
        let (ttl, wait) = (ms(wanted.ttl_ms.unwrap_or(ttl)), ms(wanted.wait_ms.unwrap_or(wait)));
        let request = ask(wanted.owner).lock(full(wanted.lock).as_str(), mode(wanted.mode));
        let request = request.wait(wait).ttl(ttl).hold(ms(360_000_000));
        let request = if wanted.reentrant { request } else { request.not_reentrant() };
        let (worker, began) = (self.worker(wanted.owner), self.world.now);
        let got = self.world.ask(worker, &request);
        let (lease, outcome) = match got {
            Got::Refused(refusal) => {
                self.note();
                return self.refused(&refusal, began);
            }
            Got::Granted(lease) => (lease, Outcome::Granted),
            Got::Waits(lease) => (lease, Outcome::Waits),
        };
        let (owner, lock) = (wanted.owner.to_owned(), full(wanted.lock));
        self.asked.insert(wanted.id, Asked { lease, owner, lock, ttl, fence: None });
        self.note();
        self.fence(wanted.id);
        if outcome == Outcome::Waits && wanted.allowed.contains(&Expect::Timeout) {
            self.world.advance(wait);
            self.note();
            if let Some((_, refusal)) = self.world.refused.pop() {
                return self.refused(&refusal, began);
            }
        }
        Ok(outcome)
    }

    async fn release(&mut self, id: AskId) -> Result<bool, Wrong> {
        let lease = self.asked[&id].lease;
        // A worker that has seen the end of its lease, or is gone, has nothing to give back.
        if !self.world.holds(lease) {
            return Ok(false);
        }
        self.fence(id);
        let in_time = self.world.release(lease).is_empty();
        self.note();
        Ok(in_time)
    }

    /// A release takes the lease away from whoever releases it: a second one cannot be written.
    async fn release_nothing(&mut self, owner: &str, lock: &str, once: Option<AskId>) -> Result<bool, Wrong> {
        let held = self.world.queue(full(lock).as_str()).contains(&format!("{owner}!"));
        Ok(held || once.is_some_and(|id| self.world.holds(self.asked[&id].lease)))
    }

    async fn cancel(&mut self, id: AskId) -> Result<(), Wrong> {
        self.world.cancel(self.asked[&id].lease);
        self.note();
        Ok(())
    }

    async fn crash(&mut self, owner: &str, waiting: &[AskId]) -> Result<(), Wrong> {
        let at = self.worker(owner);
        if self.beats {
            self.world.crash(at);
            self.world.advance(DEAD_AFTER);
            self.note();
        } else {
            // The proxy sees the connections of its waiting requests close.
            for id in waiting {
                self.cancel(*id).await?;
            }
            self.world.crash(at);
        }
        self.at.remove(owner);
        Ok(())
    }

    async fn advance(&mut self, millis: u64, _: &Due) -> Result<Due, Wrong> {
        let known = self.world.expired().len();
        self.world.advance(ms(millis));
        self.note();
        let timed_out = self.world.refused.iter().map(|(lease, _)| self.id(*lease)).collect();
        self.sweep();
        let expired = self.ended(&self.world.expired().split_off(known));
        Ok(Due { expired, timed_out })
    }

    async fn expire(&mut self, id: AskId) -> Result<(), Wrong> {
        let (ttl, owner, lock) = (self.asked[&id].ttl, self.asked[&id].owner.clone(), self.asked[&id].lock.to_string());
        self.world.advance(ttl);
        self.note();
        self.sweep();
        if self.world.expired().contains(&(owner, lock)) { Ok(()) } else { Err("has not expired".into()) }
    }

    async fn renew(&mut self, id: AskId, ttl_ms: Option<u64>) -> Result<bool, Wrong> {
        let lease = self.asked[&id].lease;
        let Some(at) = self.world.worker_of(lease).filter(|_| self.world.holds(lease)) else { return Ok(false) };
        let Some(ttl) = ttl_ms else { return Ok(self.world.renew(lease)) };
        let mut held = self.world.workers[at].leases.remove(&lease).unwrap();
        let lost = self.world.on(at, |table, scene| table.renew_for(scene, &mut held, ms(ttl)));
        self.world.workers[at].leases.insert(lease, held);
        Ok(lost.map_err(|error| error.to_string())?.is_none())
    }

    async fn break_glass(&mut self, lock: &str) -> Result<(), Wrong> {
        let worker = self.worker("admin");
        self.world.workers.iter_mut().for_each(|worker| worker.steady.clear());
        self.world.on(worker, |table, scene| table.break_glass(scene, &full(lock))).map_err(|it| it.to_string())?;
        Ok(())
    }

    /// Whether the owner holds the lock now, under the fence that it claims, in a mode that allows what it wants to do.
    async fn access(
        &mut self,
        owner: &str,
        lock: &str,
        wanted: interlock_conformance::Mode,
        claim: Claim,
    ) -> Result<bool, Wrong> {
        let (id, off) = match claim {
            // A gate that asks for a fence lets nobody through who has none.
            Claim::Nothing => return Ok(false),
            Claim::Lease(id) => (id, 0),
            Claim::Forged(id) => (id, 1),
        };
        let Some(Fence(fence)) = self.fence(id) else { return Ok(false) };
        let (at, name) = (self.worker(owner), full(lock));
        let holder = self.world.on(at, |table, scene| table.holder_of(scene, &name, Fence(fence + off)));
        let holds = holder.map_err(|error| error.to_string())?.is_some_and(|holder| holder.as_str() == owner);
        let lease = self.asked[&id].lease;
        let held = self.world.worker_of(lease).and_then(|at| self.world.workers[at].leases.get(&lease));
        let covers = held.is_some_and(|held| {
            held.grants().iter().any(|grant| grant.name == name && grant.mode.covers(mode(wanted)))
        });
        Ok(holds && covers)
    }

    async fn reload(&mut self) -> Result<(), Wrong> {
        self.world.rules.limits.waiters_per_lock += 1;
        self.world.rules.classes.insert("another".into(), Class::default());
        Ok(())
    }

    async fn refuses_no_name(&mut self) -> Result<(), Wrong> {
        match LockName::parse("") {
            Ok(name) => Err(format!("nothing is the lock {name:?}")),
            Err(_) => Ok(()),
        }
    }

    async fn granted(&mut self, _: usize) -> Result<Vec<AskId>, Wrong> {
        Ok(std::mem::take(&mut self.granted))
    }

    async fn finish(&mut self) -> Result<(), Wrong> {
        self.world.finish();
        Ok(())
    }
}

/// Says which case it was when an invariant fails in it.
struct Name<'a>(&'a str);

impl Drop for Name<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("in {}", self.0);
        }
    }
}

const IDEMPOTENT: [&str; 2] = ["ww_mutex/EALREADY", "consul/ReclaimLock"];

fn report(profile: &Profile) -> Report {
    let mut report = Report::new(profile);
    for case in cases() {
        let _name = Name(&case.name);
        let verdict = match need::skip(case, profile) {
            Some(why) => Verdict::Skipped(why.to_owned()),
            None => match now(run(case, profile, &mut Core::new(case, profile))) {
                Ok(()) => Verdict::Passed,
                Err(how) => Verdict::Failed(how),
            },
        };
        report.add(case, profile, verdict);
    }
    report
}

#[test]
fn every_case_of_the_contract_passes_over_calls() {
    report(&CALLS).settle(&[(COUNTED, &IDEMPOTENT)]);
}

#[test]
fn every_case_of_the_contract_passes_over_workers() {
    report(&WORKERS).settle(&[
        (COUNTED, &IDEMPOTENT),
        (
            BEATS,
            &[
                "consul/ForceInvalidate",
                "consul/lock-delay",
                "consul/ttl-is-lower-bound",
                "etcd/issue-9921-11456-lease-dead-while-waiting",
                "resty/expired-by-itself",
                "resty/expire-extend",
                "litmus/refresh",
                "jepsen/paused-holder-fenced",
                "jepsen/etcd-set-txn-guard",
            ],
        ),
    ]);
}
