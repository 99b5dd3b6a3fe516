//! The network, and the run of one schedule over it.

use std::cell::{RefCell, RefMut};
use std::collections::VecDeque;
use std::rc::Rc;

use interlock_core::lease::Ask;
use interlock_core::lease::record::LINGER;
use interlock_core::{Duration, Loss, Rules, Time};

use super::proxy::{Proxy, TIMEOUT, Told};
use super::{Body, Caller, Incoming, LONGEST_TTL, Move, Plan, Reply, check, serve};
use crate::crew::Crew;
use crate::dice::Dice;
use crate::state::{BARE_BUCKETS, Plant, State, Task};
use crate::trace::Trace;
use crate::world::{Played, Yard};

/// How many proxies there are.
pub const PROXIES: usize = 3;

/// How many messages may be under way: more are lost, as in a queue that is full.
const MOST: usize = 64;

/// How often proxies may have something to do while time passes once.
const HOPS: usize = 200;

/// How long the end may take until nothing is left.
const ROUNDS: usize = 600;

/// A message under way.
#[derive(Clone, Debug)]
pub(super) enum Packet {
    Call(Incoming),
    Answer(Caller, Reply),
}

/// Plays a schedule.
///
/// # Panics
/// Where the code under test does: the caller has to catch that and call it a violation.
pub fn play(plan: &Plan, yard: &mut Yard, with_lines: bool, plant: Plant) -> Played {
    let mut rules = Rules::clone(&yard.words.rules(1));
    rules.limits.longest_ttl = LONGEST_TTL;
    rules.grace = LONGEST_TTL;
    let mut state = State::new(Rc::new(rules), BARE_BUCKETS, Trace::new(with_lines), plant);
    state.protocol = Some(Box::default());
    let state = Rc::new(RefCell::new(state));
    let mut world = Net {
        crew: Crew::new(Rc::clone(&state), yard),
        state,
        proxies: (0..PROXIES).map(|at| Proxy::new(at, 1, ahead(at, 1))).collect(),
        packets: VecDeque::new(),
        vms: usize::from(plan.vms),
        gentle: plan.gentle,
        stepped_back: 0,
        next_vm: 0,
        restarted: Time::ZERO,
    };
    world.start();
    // The very first grace passes before anything is asked for.
    world.flow(0);
    world.pass(LONGEST_TTL + Duration::from_millis(1));
    world.flow(0);
    for step in &plan.moves {
        world.step(step);
        if world.is_over() {
            break;
        }
    }
    world.calm();
    world.end()
}

/// Clocks differ by more than any TTL, and nobody may mind.
pub(super) fn ahead(proxy: usize, life: u32) -> Duration {
    Duration::from_micros(1_234_567) * u32::try_from(proxy).unwrap_or(0) * life
}

pub(super) struct Net<'y> {
    pub(super) state: Rc<RefCell<State>>,
    pub(super) crew: Crew<'y>,
    pub(super) proxies: Vec<Proxy>,
    pub(super) packets: VecDeque<Packet>,
    pub(super) vms: usize,
    pub(super) gentle: bool,
    /// How far the wall clock has stepped back in this life of the authority, in microseconds.
    pub(super) stepped_back: u64,
    pub(super) next_vm: usize,
    /// When the authority last lost its memory.
    pub(super) restarted: Time,
}

impl Net<'_> {
    pub(super) fn state(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    fn is_over(&self) -> bool {
        self.state().violation.is_some()
    }

    pub(super) fn now(&self, proxy: usize) -> Time {
        self.state().now + self.proxies[proxy].ahead
    }

    pub(super) fn start(&mut self) {
        (0..self.vms).for_each(|vm| self.start_vm(vm));
    }

    pub(super) fn start_vm(&mut self, vm: usize) {
        let rules = Rc::clone(&self.state().rules);
        self.crew.start(vm, move |port| serve(port, rules));
    }

    /// Sends what a proxy has to send, and takes in what it told.
    pub(super) fn pump(&mut self, at: usize) {
        let now = self.now(at);
        let (sent, told) = self.proxies[at].take(now);
        for (caller, body) in sent {
            self.post(Packet::Call(Incoming { caller, body }));
        }
        for told in told {
            self.tell(at, &told);
        }
        check::beliefs(&mut self.state.borrow_mut(), &self.proxies);
    }

    fn tell(&mut self, at: usize, told: &Told) {
        let mut state = self.state.borrow_mut();
        state.trace.mark(20, at);
        state.trace.line(|| format!("    proxy{at}: {told:?}"));
        let counts = &mut state.counts;
        match told {
            Told::Granted => counts.leases_believed += 1,
            Told::Refused("deadlock") => counts.deadlocks += 1,
            Told::Refused("order-violation") => counts.order_violations += 1,
            Told::Refused("wait-timeout") => counts.timeouts += 1,
            Told::Refused("backend-unavailable") => counts.unanswered += 1,
            Told::Refused(_) => {}
            Told::Lost(_, Loss::HoldLimit) => counts.hold_limits += 1,
            Told::Lost(ticket, Loss::Expired) => {
                counts.leases_lost += 1;
                let granted = self.proxies[at].requests.get(ticket).is_some_and(|served| served.grant.is_some());
                if self.gentle && granted {
                    state.violated(|| format!("proxy{at} lost a lease, and nothing went wrong but restarts"));
                }
            }
        }
    }

    pub(super) fn post(&mut self, packet: Packet) {
        let mut state = self.state();
        state.counts.messages += 1;
        state.trace.line(|| format!("    under way: {}", line(&packet)));
        drop(state);
        if self.packets.len() < MOST {
            self.packets.push_back(packet);
        }
    }

    /// The answers that the authority has given meanwhile set out.
    fn collect(&mut self) {
        let outbox = self.state().protocol.as_mut().map(|facts| std::mem::take(&mut facts.outbox)).unwrap_or_default();
        outbox.into_iter().for_each(|(caller, reply)| self.post(Packet::Answer(caller, reply)));
    }

    fn arrive(&mut self, packet: Packet) {
        match packet {
            Packet::Call(incoming) => {
                let living: Vec<usize> = (0..self.vms).filter(|vm| self.state().vms[*vm].alive).collect();
                if matches!(incoming.body, Body::Gone) {
                    // Every VM is told: only the one at which it is parked knows the call.
                    for vm in living {
                        self.state().vms[vm].tasks.push_back(Task::Call(Box::new(incoming.clone())));
                    }
                } else if living.is_empty() {
                    // Nobody listens: the connection is refused.
                    self.post(Packet::Answer(incoming.caller, Reply::Failed(None)));
                } else {
                    let vm = living[self.next_vm % living.len()];
                    self.next_vm += 1;
                    self.state().vms[vm].tasks.push_back(Task::Call(Box::new(incoming)));
                }
            }
            Packet::Answer(caller, reply) => {
                if self.proxies[caller.proxy].paused {
                    self.packets.push_back(Packet::Answer(caller, reply));
                    return;
                }
                let now = self.now(caller.proxy);
                self.proxies[caller.proxy].hear(now, caller, reply);
                self.pump(caller.proxy);
            }
        }
    }

    /// So many messages arrive, and what they ask for is done; 0: until there are none.
    fn flow(&mut self, count: usize) {
        let most = if count == 0 { 2000 } else { count };
        for _ in 0..most {
            self.crew.drain();
            self.collect();
            if self.is_over() {
                return;
            }
            let paused = |packet: &Packet| match packet {
                Packet::Answer(caller, _) => self.proxies[caller.proxy].paused,
                Packet::Call(_) => false,
            };
            let Some(at) = self.packets.iter().position(|packet| !paused(packet)) else { return };
            if let Some(packet) = self.packets.remove(at) {
                self.arrive(packet);
            }
        }
        self.crew.drain();
        self.collect();
    }

    /// Time passes; a proxy that runs does what is due when it is due.
    pub(super) fn pass(&mut self, span: Duration) {
        let end = self.state().now + span;
        for _ in 0..HOPS {
            let due = |at: usize| {
                if self.proxies[at].paused { Duration::MAX } else { self.proxies[at].due().since(self.now(at)) }
            };
            let next = (0..PROXIES).map(due).min().unwrap_or_default().max(Duration::from_millis(1));
            let next = if self.gentle { next.min(self.crew.due().max(Duration::from_millis(1))) } else { next };
            let left = end.since(self.state().now);
            self.crew.pass(left.min(next));
            (0..PROXIES).for_each(|at| self.tick(at));
            if self.gentle {
                self.flow(0);
            }
            if left <= next || self.is_over() {
                return;
            }
        }
        let left = end.since(self.state().now);
        self.crew.pass(left);
    }

    fn tick(&mut self, at: usize) {
        if self.proxies[at].paused {
            return;
        }
        let now = self.now(at);
        for _ in 0..4 {
            if self.proxies[at].due() > now {
                break;
            }
            for caller in self.proxies[at].tick(now) {
                self.state().counts.calls_unanswered += 1;
                self.post(Packet::Call(Incoming { caller, body: Body::Gone }));
            }
            self.pump(at);
        }
        let runs_since = self.proxies[at].runs_since;
        let late = self.proxies[at].requests.values().find(|served| {
            let end = served.deadline.max(runs_since) + TIMEOUT + Duration::from_millis(2);
            !served.over && served.grant.is_none() && end < now
        });
        if let Some(served) = late {
            let owner = served.owner.clone();
            self.state().violated(|| format!("proxy{at}: the request of {owner} is past its deadline by a timeout"));
        }
    }

    pub(super) fn take_packet(&mut self, nth: u8) -> Option<Packet> {
        let most = self.packets.len();
        if most == 0 { None } else { self.packets.remove(usize::from(nth) % most) }
    }

    fn step(&mut self, step: &Move) {
        {
            let mut state = self.state();
            state.counts.steps += 1;
            state.trace.line(|| format!("{step}"));
        }
        match step {
            Move::Ask(proxy, owner, locks, wait, ttl, hold) => {
                self.ask(usize::from(*proxy), *owner, locks, (*wait, *ttl, *hold))
            }
            Move::End(proxy, nth) => self.end_request(usize::from(*proxy), *nth),
            Move::Use(proxy, nth) => {
                let proxy = &self.proxies[usize::from(*proxy)];
                if let Some(served) = proxy.nth(*nth).and_then(|ticket| proxy.requests.get(&ticket)) {
                    check::uses(&mut self.state.borrow_mut(), proxy, served);
                }
            }
            Move::Deliver(nth) => {
                if let Some(packet) = self.take_packet(*nth) {
                    self.state().counts.reordered += u64::from(*nth > 0);
                    self.arrive(packet);
                }
            }
            Move::Flow(count) => self.flow(usize::from(*count).max(1)),
            Move::Run(vm, calls) => self.crew.run(usize::from(*vm), u32::from(*calls)),
            Move::Race(calls, dice) => self.crew.race(*calls, &mut Dice::new(u64::from(*dice))),
            Move::Drain => self.crew.drain(),
            Move::Pass(micros) => self.pass(Duration::from_micros(u64::from(*micros))),
            fault => self.fault(fault),
        }
        self.collect();
        if self.gentle {
            // Nothing goes wrong on the way, however short the schedule.
            self.flow(0);
        }
        check::beliefs(&mut self.state.borrow_mut(), &self.proxies);
    }

    fn ask(&mut self, at: usize, owner: u8, locks: &[(u8, interlock_core::Mode)], (wait, ttl, hold): (u32, u32, u32)) {
        if self.proxies[at].paused {
            return;
        }
        let now = self.now(at);
        let millis = |millis: u32| Duration::from_millis(u64::from(millis));
        let words = self.crew.words();
        let ask = Ask {
            owner: words.owner(owner),
            locks: locks.iter().map(|(lock, mode)| (words.lock(*lock), *mode)).collect(),
            deadline: now + millis(wait),
            ttl: millis(ttl),
            hold: millis(hold),
        };
        self.state().counts.requests += 1;
        self.proxies[at].ask(now, ask);
        self.pump(at);
    }

    fn end_request(&mut self, at: usize, nth: u8) {
        if self.proxies[at].paused {
            return;
        }
        let now = self.now(at);
        let Some(ticket) = self.proxies[at].nth(nth) else { return };
        let held = self.proxies[at].requests.get(&ticket).is_some_and(|served| served.grant.is_some());
        let mut state = self.state();
        state.counts.releases += u64::from(held);
        state.counts.cancels += u64::from(!held);
        drop(state);
        self.proxies[at].end(now, ticket);
        self.pump(at);
    }

    /// The faults are over: within a TTL and the time that ends are remembered nothing is left.
    fn calm(&mut self) {
        if self.is_over() {
            return;
        }
        self.state().trace.line(|| String::from("the faults are over"));
        self.gentle = false;
        for facts in &mut self.state.borrow_mut().vms {
            (facts.sound, facts.failing, facts.conflicts) = (0, 0, 0);
        }
        self.start();
        for at in 0..PROXIES {
            self.resume(at);
        }
        let began = self.state().now;
        // The longest wait; the time in which a lease that nobody drives is found; that in which its end is remembered.
        let longest = Duration::from_secs(3) + LINGER * 2 + LONGEST_TTL * 2 + Duration::from_secs(2);
        for _ in 0..ROUNDS {
            self.flow(0);
            for at in 0..PROXIES {
                while let Some(ticket) = self.proxies[at]
                    .requests
                    .iter()
                    .find(|(_, it)| !it.over && it.grant.is_some())
                    .map(|(ticket, _)| *ticket)
                {
                    let now = self.now(at);
                    self.proxies[at].end(now, ticket);
                    self.pump(at);
                }
            }
            self.flow(0);
            if self.is_over() || self.is_empty() {
                break;
            }
            let idle = self.proxies.iter().all(|proxy| proxy.client.is_idle());
            let due = (0..PROXIES).map(|at| self.proxies[at].due().since(self.now(at))).min().unwrap_or_default();
            let hop = if idle { Duration::from_millis(1000) } else { due.min(self.crew.due()) };
            self.pass(hop.clamp(Duration::from_millis(1), Duration::from_millis(1000)));
        }
        let now = self.state().now;
        if !self.is_empty() || began + longest < now {
            let left = self.state().left_over();
            let clients: Vec<bool> = self.proxies.iter().map(|proxy| proxy.client.is_idle()).collect();
            self.state()
                .violated(|| format!("{:?} after the faults: {left}; clients idle: {clients:?}", now.since(began)));
        }
    }

    fn is_empty(&self) -> bool {
        self.proxies.iter().all(|proxy| proxy.client.is_idle()) && self.packets.is_empty() && self.state().is_drained()
    }

    fn end(mut self) -> Played {
        self.crew.dismiss();
        let mut state = self.state.borrow_mut();
        state.counts.schedules = 1;
        Played {
            violation: state.violation.take(),
            counts: std::mem::take(&mut state.counts),
            trace: std::mem::take(&mut state.trace),
        }
    }
}

fn line(packet: &Packet) -> String {
    match packet {
        Packet::Call(Incoming { caller, body }) => {
            let what = match body {
                Body::Put { lease, owner, .. } => format!("PUT {:x} for {owner}", lease.0),
                Body::Renew(leases) => format!("renew {} leases", leases.len()),
                Body::Delete(lease) => format!("DELETE {:x}", lease.0),
                Body::Gone => String::from("gone"),
            };
            format!("call {} of proxy{}: {what}", caller.call, caller.proxy)
        }
        Packet::Answer(caller, reply) => {
            let what = match reply {
                Reply::Put(answer) => match answer {
                    interlock_core::lease::PutAnswer::Granted { waited, .. } => format!("granted after {waited:?}"),
                    interlock_core::lease::PutAnswer::Refused(why) => format!("refused: {why}"),
                    interlock_core::lease::PutAnswer::Over { why, .. } => format!("over: {why}"),
                },
                Reply::Renewed(answers) => format!("renewed {answers:?}"),
                Reply::Deleted => String::from("deleted"),
                Reply::Failed(retry) => format!("failed, retry {retry:?}"),
            };
            format!("answer to call {} of proxy{}: {what}", caller.call, caller.proxy)
        }
    }
}
