//! Everything at once, from a seed: requests, ends, crashes, stuck VMs, lost messages, failing calls, new configurations.
//! Checks after every step what must always hold, and at the end that nothing is left.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use interlock_core::{Duration, Entry, Time};
use serde_json::{Value, json};

use super::proxy::{Call, Proxy, active};
use super::{TABLE, millis, secs};
use crate::host::fake::Phase;

const LOCKS: [&str; 5] = ["a/1", "a/2", "a/3", "b/1", "b/2"];

/// Splitmix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> Option<T> {
        let sides = u64::try_from(of.len()).unwrap();
        (sides > 0).then(|| of[usize::try_from(self.roll(sides)).unwrap()])
    }
}

/// What the test knows of a request.
struct Asked {
    owner: String,
    deadline: Time,
}

struct Storm {
    proxy: Rc<Proxy>,
    policy: Value,
    dice: Dice,
    asked: BTreeMap<Call, Asked>,
    alive: Vec<usize>,
    /// What was asked for in the middle of something else.
    between: Rc<RefCell<Vec<(Call, Asked)>>>,
    /// Stuck VMs, and those that have not ticked since.
    doubtful: Vec<usize>,
    /// The highest fence of each lock that an upstream has seen a writer with, and whose it was.
    fences: BTreeMap<&'static str, (u64, String)>,
    forwarded: BTreeSet<(Call, &'static str)>,
}

impl Storm {
    fn new(seed: u64) -> Self {
        let mut policy = json!({
            "instance": "t", "classes": [{ "name": "a", "rank": 1, "within": "unordered" }, { "name": "b" }],
            "defaults": { "ttl": "1s" }
        });
        if seed % 2 == 1 {
            policy["limits"] = json!({ "locks_per_owner": null });
        }
        policy["reentrancy"] = json!(if seed % 5 == 4 { "none" } else { "owner" });
        policy["on_backend_unavailable"] = json!(if seed % 3 == 2 { "allow" } else { "reject" });
        let proxy = Proxy::new(3, &policy);
        proxy.run(millis(300));
        Storm {
            proxy: Rc::new(proxy),
            policy,
            dice: Dice(seed),
            asked: BTreeMap::new(),
            alive: vec![0, 1, 2],
            between: Rc::default(),
            doubtful: Vec::new(),
            fences: BTreeMap::new(),
            forwarded: BTreeSet::new(),
        }
    }

    fn awake(&self) -> Vec<usize> {
        self.alive.iter().copied().filter(|vm| !self.doubtful.contains(vm)).collect()
    }

    fn ask(&mut self) {
        let Some(vm) = self.dice.pick(&self.awake()) else { return };
        let owner = format!("o{}", self.dice.roll(6));
        let wait = self.dice.pick(&[0, 100, 700, 3000]).unwrap();
        let mut list = Vec::new();
        for _ in 0..=self.dice.roll(2) {
            let lock = self.dice.pick(&LOCKS).unwrap();
            let mode = self.dice.pick(&["exclusive", "exclusive", "shared"]).unwrap();
            let ttl = self.dice.pick(&["0.8", "1", "2"]).unwrap();
            let hold = self.dice.pick(&["0.8", "60"]).unwrap();
            let wait = f64::from(wait) / 1000.0;
            list.push(format!("{lock};mode={mode};ttl={ttl};hold={hold};wait={wait}"));
        }
        let deadline = self.proxy.now() + Duration::from_millis(u64::try_from(wait).unwrap());
        let call = self.proxy.lock(vm, &owner, &list.join(", "));
        self.asked.insert(call, Asked { owner, deadline });
    }

    /// In the middle of what one VM does next, another asks for a lock.
    fn interrupt(&mut self) {
        let awake = self.awake();
        let (Some(vm), Some(other)) = (self.dice.pick(&awake), self.dice.pick(&awake)) else { return };
        if vm == other {
            return;
        }
        let (owner, lock) = (format!("i{}", self.dice.roll(3)), self.dice.pick(&LOCKS).unwrap());
        let (proxy, between) = (Rc::clone(&self.proxy), Rc::clone(&self.between));
        let calls = u32::try_from(self.dice.roll(14)).unwrap();
        self.proxy.vm(vm).host.meanwhile(calls, move || {
            let deadline = proxy.now() + millis(1000);
            let call = proxy.lock(other, &owner, &format!("{lock};wait=1;ttl=1"));
            between.borrow_mut().push((call, Asked { owner, deadline }));
        });
        self.ask();
        self.proxy.vm(vm).host.forget_meanwhile();
    }

    fn streams(&self, phase: Phase) -> Vec<Call> {
        let awake = self.awake();
        let open = self.proxy.open().into_iter().filter(|call| awake.contains(&call.vm));
        open.filter(|call| self.proxy.phase(*call) == Some(phase)).collect()
    }

    fn run(&mut self, most: u64) {
        let span = millis(self.dice.roll(most) + 1);
        self.proxy.run(span);
    }

    fn step(&mut self) {
        match self.dice.roll(45) {
            0..=13 => self.ask(),
            14..=20 => {
                if let Some(call) = self.dice.pick(&self.streams(Phase::Upstream)) {
                    self.proxy.respond(call);
                    self.proxy.end(call);
                }
            }
            21..=22 => {
                let open = [self.streams(Phase::Request), self.streams(Phase::Upstream)].concat();
                self.dice.pick(&open).into_iter().for_each(|call| self.proxy.end(call));
            }
            23..=30 => self.run(300),
            31..=32 => {
                let Some(vm) = self.dice.pick(&self.awake()) else { return };
                self.proxy.vm(vm).host.lose_next(2);
            }
            33..=34 => {
                let Some(vm) = self.dice.pick(&self.awake()) else { return };
                self.proxy.vm(vm).host.conflict_next(3);
            }
            35..=36 => {
                let Some(vm) = self.dice.pick(&self.awake()) else { return };
                let sound = u32::try_from(self.dice.roll(12)).unwrap();
                self.proxy.vm(vm).host.fail_shared(sound, 2);
            }
            37 => self.stall(),
            38 => self.crash_or_configure(),
            39..=43 => self.interrupt(),
            _ => {
                let micros = i64::try_from(self.dice.roll(20_000_000)).unwrap() - 10_000_000;
                self.proxy.fake.step_wall_clock(micros);
            }
        }
    }

    fn stall(&mut self) {
        let Some(vm) = self.dice.pick(&self.alive) else { return };
        if self.doubtful.contains(&vm) {
            self.proxy.vm(vm).host.fail_shared(0, 0);
            self.proxy.silence(vm, false);
            // Its overdue tick comes at once.
            self.proxy.run(millis(2));
            self.doubtful.retain(|other| *other != vm);
        } else if self.awake().len() > 1 {
            self.proxy.silence(vm, true);
            self.doubtful.push(vm);
        }
    }

    fn crash_or_configure(&mut self) {
        let Some(vm) = self.dice.pick(&self.awake()) else { return };
        if self.dice.roll(2) == 0 {
            self.proxy.kill(vm);
            self.alive.retain(|other| *other != vm);
            let vm = self.proxy.start(&self.policy);
            self.alive.push(vm);
        } else {
            let waits = self.dice.pick(&["1s", "2s"]).unwrap();
            self.policy["defaults"]["wait"] = json!(waits);
            self.proxy.vm(vm).configure(&active(&self.policy));
        }
    }

    /// What must always hold.
    fn check(&mut self) {
        self.asked.extend(self.between.borrow_mut().drain(..));
        self.proxy.deliver();
        let now = self.proxy.now();
        for call in self.streams(Phase::Request) {
            let deadline = self.asked[&call].deadline;
            assert!(now < deadline + millis(3), "{call:?} is parked past its deadline");
        }
        let upstream = self.streams(Phase::Upstream);
        for lock in LOCKS {
            let entries = self.proxy.entries(TABLE, lock);
            assert!(
                entries.is_empty() || entries.iter().any(Entry::is_held),
                "{lock} is free, and waited for: {entries:?}"
            );
            let inside: Vec<_> = upstream.iter().filter_map(|call| Some((*call, self.held(*call, lock)?))).collect();
            for (call, (fence, exclusive)) in &inside {
                for (other, (other_fence, _)) in &inside {
                    let apart = self.asked[call].owner == self.asked[other].owner;
                    assert!(apart || !exclusive, "{lock}: {call:?} and {other:?} are both inside");
                    assert!(apart || fence != other_fence, "{lock}: {call:?} and {other:?} have one fence");
                }
                if self.forwarded.insert((*call, lock)) && *exclusive && inside.len() == 1 {
                    let owner = self.asked[call].owner.clone();
                    let (highest, last) = self.fences.entry(lock).or_default();
                    assert!(fence > highest || (fence == highest && owner == *last), "{lock}: {fence} after {highest}");
                    (*highest, *last) = (*fence, owner);
                }
            }
        }
    }

    /// The fence under which a stream has a lock, and whether for itself alone.
    fn held(&self, call: Call, lock: &str) -> Option<(u64, bool)> {
        let fence = self.proxy.fence(call, lock)?;
        let stream = self.proxy.vm(call.vm).host.stream(call.id);
        let text = String::from_utf8(stream.request_values("lock-fence")[0].to_vec()).unwrap();
        let member = text.split(", ").find(|member| member.starts_with(lock)).unwrap();
        Some((fence, member.contains("mode=exclusive")))
    }

    /// The storm is over: everybody wakes up, and what is upstream is answered.
    fn calm(&mut self) {
        for vm in self.alive.clone() {
            self.proxy.vm(vm).host.fail_shared(0, 0);
            self.proxy.vm(vm).host.conflict_next(0);
            self.proxy.vm(vm).host.lose_next(0);
            self.proxy.silence(vm, false);
        }
        self.doubtful.clear();
        self.proxy.run(millis(2));
        for _ in 0..100 {
            self.check();
            for call in self.streams(Phase::Upstream) {
                if self.proxy.is_upstream(call) {
                    self.proxy.respond(call);
                    self.proxy.end(call);
                }
            }
            self.proxy.run(millis(50));
        }
        assert_eq!(self.proxy.open(), [], "streams that nobody ends");
        self.proxy.assert_rest(TABLE);
    }
}

#[test]
fn nothing_is_lost_in_a_storm() {
    for seed in 0..60 {
        println!("seed {seed}");
        let mut storm = Storm::new(seed);
        for _ in 0..150 {
            storm.step();
            storm.check();
        }
        storm.calm();
    }
}

/// The storm has to do something: most of what can come of a request comes of some.
#[test]
fn a_storm_meets_every_outcome() {
    let mut seen = BTreeMap::new();
    for seed in 1000..1020 {
        let mut storm = Storm::new(seed);
        for _ in 0..150 {
            storm.step();
        }
        storm.proxy.run(secs(1));
        for (name, value) in storm.proxy.fake.metrics() {
            *seen.entry(name.replace(".class.a", "").replace(".class.b", "")).or_insert(0) += value;
        }
    }
    for outcome in [
        "interlock_acquire_total.outcome.acquired",
        "interlock_acquire_total.outcome.cancelled",
        "interlock_acquire_total.outcome.refused.reason.lock-held",
        "interlock_acquire_total.outcome.refused.reason.wait-timeout",
        "interlock_acquire_total.outcome.refused.reason.deadlock",
        "interlock_acquire_total.outcome.refused.reason.backend-unavailable",
        "interlock_lease_lost_total.reason.hold-limit",
        "interlock_lease_lost_total.reason.expired",
        "interlock_lease_expired_total",
    ] {
        assert!(seen.get(outcome).is_some_and(|count| *count > 0), "{outcome}: {seen:?}");
    }
}
