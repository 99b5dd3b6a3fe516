//! What may happen next, and what comes of it.
//!
//! A step of the network, of time or of a fault is one action. What a proxy has to do is done at once; at the authority a
//! waiter that was woken looks for itself later, since others may come in between. Within a tick every timer fires at its
//! own moment. What must not be here: what is right (see [`super::watch`]).

use std::sync::Arc;

use interlock_core::lease::{Ask, CallId, Client, Do, PutAnswer, Ticket};
use interlock_core::{LeaseId, Loss, Time};

use super::authority;
use super::canon::{EPOCH, TICKETS, WALL_EPOCH};
use super::watch::Sight;
use super::world::{
    Body, Faults, Laws, Memory, Message, PROXIES, Progress, Proxy, STEP_AHEAD, Stream, TICK, Told, Why, World, name,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A caller of a proxy asks for its locks.
    Ask {
        proxy: usize,
        request: usize,
    },
    /// It has what it wanted, or has gone.
    Release {
        proxy: usize,
        request: usize,
    },
    /// A message arrives, whichever was sent first.
    Deliver(usize),
    /// A message arrives, and will once more.
    Double(usize),
    /// A message gets lost.
    Lose(usize),
    /// A connection breaks, with the message on it: the caller hears at once, the authority does not.
    Break(usize),
    /// A connection breaks that a waiter waits on.
    Cut(usize),
    /// A waiter that was woken looks for itself.
    Poll(usize),
    /// The authority hears that a caller has given up a call.
    Leave(usize),
    /// The authority keeps house.
    Sweep,
    Tick,
    /// The authority starts anew, without its memory. Callers that wait hear of it at once, or not.
    Crash {
        heard: bool,
    },
    /// Its wall clock steps.
    StepBack,
    StepAhead,
    /// A proxy starts anew.
    Die(usize),
}

impl World {
    /// Everything that may happen next; time goes on, and requests begin and end, only while fewer than `most` messages are
    /// under way.
    pub fn actions(&self, laws: &Laws, most: usize, actions: &mut Vec<Action>) {
        let room = self.net.len() < most;
        for (proxy, it) in self.proxies.iter().enumerate().filter(|_| room) {
            let asked = it.requests.iter().position(|progress| *progress == Progress::Unasked);
            let told = |before: usize| !matches!(it.requests[before], Progress::Asked { .. });
            if let Some(request) = asked.filter(|at| *at == 0 || told(at - 1)) {
                actions.push(Action::Ask { proxy, request });
            }
            let asks = it.requests.iter().any(|progress| matches!(progress, Progress::Asked { .. }));
            for (request, progress) in it.requests.iter().enumerate().filter(|_| laws.impatient || !asks) {
                if matches!(progress, Progress::Asked { .. } | Progress::Held { .. }) {
                    actions.push(Action::Release { proxy, request });
                }
            }
            if self.left.deaths > 0 && !it.requests.iter().all(|progress| *progress == Progress::Unasked) {
                actions.push(Action::Die(proxy));
            }
        }
        for at in 0..self.net.len() {
            if self.net[..at].contains(&self.net[at]) {
                continue;
            }
            actions.push(Action::Deliver(at));
            if self.left.doubled > 0 && room {
                actions.push(Action::Double(at));
            }
            if self.left.lost > 0 {
                actions.extend([Action::Lose(at), Action::Break(at)]);
            }
        }
        for (at, stream) in self.authority.streams.iter().enumerate() {
            if stream.woken {
                actions.push(Action::Poll(at));
            }
            if !self.is_open(stream) {
                actions.push(Action::Leave(at));
            } else if self.left.lost > 0 {
                actions.push(Action::Cut(at));
            }
        }
        if self.could_sweep() {
            actions.push(Action::Sweep);
        }
        if room && (self.net.is_empty() || self.left.late > 0) && !self.is_done() {
            actions.push(Action::Tick);
        }
        if self.left.crashes > 0 {
            actions.push(Action::Crash { heard: false });
            if self.authority.streams.iter().any(|stream| self.is_open(stream)) {
                actions.push(Action::Crash { heard: true });
            }
        }
        if self.left.steps > 0 {
            actions.extend([Action::StepBack, Action::StepAhead]);
        }
    }

    /// Whether the proxy still waits for the answer to a call.
    fn is_open(&self, stream: &Stream) -> bool {
        let proxy = &self.proxies[stream.proxy];
        proxy.life == stream.life && proxy.timers.iter().any(|(call, _)| *call == stream.call)
    }

    /// Whether housekeeping has something to do.
    fn could_sweep(&self) -> bool {
        let shelf = &self.authority.shelf;
        let entries = || shelf.locks.iter().flat_map(|bucket| bucket.queues()).flat_map(|queue| queue.entries());
        let records: usize = shelf.leases.iter().map(|bucket| bucket.count().1).sum();
        entries().any(|entry| entry.ends(&shelf.sessions) <= self.now) || records > entries().count()
    }

    /// Nothing is asked for, held, queued or under way any more.
    pub fn is_done(&self) -> bool {
        let over = |proxy: &Proxy| {
            let finished = |progress: &Progress| matches!(progress, Progress::Over);
            proxy.client.is_idle() && proxy.timers.is_empty() && proxy.requests.iter().all(finished)
        };
        self.net.is_empty() && self.authority.streams.is_empty() && self.proxies.iter().all(over)
    }

    pub fn step(&self, laws: &Laws, action: Action, sights: &mut Vec<Sight>) -> World {
        let mut world = self.clone();
        let it = &mut world;
        match action {
            Action::Ask { proxy, request } => it.ask(laws, proxy, request),
            Action::Release { proxy, request } => it.release(proxy, request),
            Action::Deliver(at) => {
                let message = it.net.remove(at);
                it.deliver(laws, message, sights);
            }
            Action::Double(at) => {
                it.left.doubled -= 1;
                let message = it.net[at].clone();
                it.deliver(laws, message, sights);
            }
            Action::Lose(at) => {
                it.left.lost -= 1;
                drop(it.net.remove(at));
            }
            Action::Break(at) => {
                it.left.lost -= 1;
                let Message { proxy, life, call, .. } = it.net.remove(at);
                it.breaks(proxy, life, call);
            }
            Action::Cut(at) => {
                it.left.lost -= 1;
                let Stream { proxy, life, call, .. } = it.authority.streams[at];
                it.breaks(proxy, life, call);
            }
            Action::Poll(at) => authority::poll(it, laws, at, sights),
            Action::Leave(at) => authority::leave(it, laws, at, sights),
            Action::Sweep => authority::sweep(it, laws, sights),
            Action::Tick => {
                it.left.late -= u8::from(!it.net.is_empty());
                it.tick(laws, sights);
            }
            Action::Crash { heard } => {
                it.left.crashes -= 1;
                for Stream { proxy, life, call, .. } in std::mem::take(&mut it.authority.streams) {
                    if heard {
                        it.breaks(proxy, life, call);
                    }
                }
                it.authority = authority::start(&laws.rules, it.now, it.wall);
                it.memory.ended.clear();
            }
            Action::StepBack => {
                it.left.steps -= 1;
                it.memory.stepped_back = true;
                it.wall -= laws.step_back().as_micros() as u64;
            }
            Action::StepAhead => {
                it.left.steps -= 1;
                it.wall += STEP_AHEAD.as_micros() as u64;
            }
            Action::Die(at) => {
                it.left.deaths -= 1;
                it.net.retain(|message| message.proxy != at || message.is_of_proxy());
                let proxy = &mut it.proxies[at];
                (proxy.client, proxy.life) = (Arc::new(Client::new(laws.timeout)), proxy.life + 1);
                proxy.timers.clear();
                let begun = proxy.requests.iter_mut().filter(|progress| **progress != Progress::Unasked);
                begun.for_each(|progress| *progress = Progress::Over);
            }
        }
        for at in 0..PROXIES {
            world.run_proxy(at, world.now, sights);
        }
        let now = world.now;
        world.memory.ended.retain(|(_, since)| now < *since + interlock_core::lease::record::LINGER);
        for proxy in world.proxies.iter_mut().filter(|proxy| proxy.client.is_idle()) {
            proxy.idle_by = Time::ZERO;
        }
        world
    }

    /// A proxy hears that a call got no answer.
    fn breaks(&mut self, at: usize, life: u8, call: CallId) {
        let (now, proxy) = (self.now, &mut self.proxies[at]);
        let open = proxy.timers.iter().position(|(open, _)| *open == call && life == proxy.life);
        if let Some(place) = open {
            proxy.timers.remove(place);
            Arc::make_mut(&mut proxy.client).failed(now, call, "backend-unavailable", None);
        }
    }

    fn ask(&mut self, laws: &Laws, at: usize, request: usize) {
        let (now, proxy) = (self.now, &mut self.proxies[at]);
        let lease = proxy.fresh_name(at);
        let locks = laws.scripts[at][request].iter().map(|(lock, mode)| (laws.names[*lock].clone(), *mode)).collect();
        let ask =
            Ask { owner: laws.owners[at].clone(), locks, deadline: now + laws.wait, ttl: laws.ttl, hold: laws.hold };
        proxy.requests[request] = Progress::Asked { lease, told_by: now + laws.wait + laws.timeout };
        Arc::make_mut(&mut proxy.client).ask(now, Ticket(TICKETS + request as u64), lease, ask);
    }

    fn release(&mut self, at: usize, request: usize) {
        let (now, proxy) = (self.now, &mut self.proxies[at]);
        let (Progress::Asked { lease, .. } | Progress::Held { lease }) = proxy.requests[request] else { return };
        proxy.requests[request] = Progress::Over;
        proxy.is_over(now);
        Arc::make_mut(&mut proxy.client).release(now, lease);
    }

    fn deliver(&mut self, laws: &Laws, message: Message, sights: &mut Vec<Sight>) {
        if message.is_of_proxy() {
            authority::take(self, laws, &message, sights);
            return;
        }
        let (now, at, call) = (self.now, message.proxy, message.call);
        let proxy = &mut self.proxies[at];
        proxy.timers.retain(|(open, _)| *open != call);
        let client = Arc::make_mut(&mut proxy.client);
        match &*message.body {
            Body::Answer(answer) => {
                let mut answer = (**answer).clone();
                if let PutAnswer::Over { fresh, .. } = &mut answer {
                    *fresh = name(at, proxy.names + 1);
                }
                client.answered(now, call, answer);
            }
            Body::Unable(left) => client.failed(now, call, "backend-unavailable", Some(*left)),
            Body::Renewed(answers) => client.renewed(now, call, answers),
            Body::Deleted => client.deleted(call),
            Body::Put { .. } | Body::Renew { .. } | Body::Delete { .. } => {}
        }
        self.carry_out(at, now, sights);
    }

    /// Does what a proxy wants done at a moment.
    fn carry_out(&mut self, at: usize, now: Time, sights: &mut Vec<Sight>) {
        let proxy = &mut self.proxies[at];
        let todo = Arc::make_mut(&mut proxy.client).take();
        for effect in todo {
            let proxy = &mut self.proxies[at];
            let (call, timeout, body) = match effect {
                Do::Put { call, lease, wait, timeout, .. } => {
                    let request = proxy.rename(at, lease, sights);
                    (call, timeout, Body::Put { lease, request, wait })
                }
                Do::Renew { call, leases, timeout } => {
                    let receipt = |(lease, told): (_, Told)| (lease, told.receipt);
                    (call, timeout, Body::Renew { leases: leases.into_iter().map(receipt).collect() })
                }
                Do::Delete { call, lease, timeout } => (call, timeout, Body::Delete { lease }),
                told => {
                    if !proxy.tell(now, &told, sights) {
                        self.memory.fault.get_or_insert("a caller is told twice, or what is not so");
                    }
                    continue;
                }
            };
            proxy.timers.push((call, now + timeout));
            let (life, body) = (proxy.life, Arc::new(body));
            self.net.push(Message { proxy: at, life, call, body });
        }
    }

    /// Fires a proxy's timers that are due by then, each at its moment.
    fn run_proxy(&mut self, at: usize, until: Time, sights: &mut Vec<Sight>) {
        self.carry_out(at, self.now, sights);
        while let Some(moment) = self.proxies[at].next(self.now).filter(|moment| *moment <= until) {
            self.fire(at, moment, sights);
        }
    }

    fn fire(&mut self, at: usize, moment: Time, sights: &mut Vec<Sight>) {
        let before = sights.len();
        let proxy = &mut self.proxies[at];
        let client = Arc::make_mut(&mut proxy.client);
        if let Some(place) = proxy.timers.iter().position(|(_, end)| *end <= moment) {
            let (call, _) = proxy.timers.remove(place);
            client.failed(moment, call, "backend-unavailable", None);
        } else {
            client.tick(moment);
        }
        self.carry_out(at, moment, sights);
        let lost = sights[before..].contains(&Sight::Lost);
        sights.extend(lost.then_some(Sight::LostByOwnClock));
    }

    /// Time passes.
    fn tick(&mut self, laws: &Laws, sights: &mut Vec<Sight>) {
        let (start, end) = (self.now, self.now + TICK);
        loop {
            let proxies = (0..PROXIES).filter_map(|at| Some((self.proxies[at].next(self.now)?, at)));
            let streams = self.authority.streams.iter().enumerate();
            let looks = streams.map(|(at, stream)| (self.look_at(stream), PROXIES + at));
            let Some((moment, who)) = proxies.chain(looks).min().filter(|(moment, _)| *moment <= end) else { break };
            self.wall += moment.since(self.now).as_micros() as u64;
            self.now = moment;
            match who.checked_sub(PROXIES) {
                None => self.fire(who, moment, sights),
                Some(stream) => authority::poll(self, laws, stream, sights),
            }
        }
        self.wall += end.since(self.now).as_micros() as u64;
        self.now = end;
        debug_assert_eq!(self.now.since(start), TICK);
        self.authority.beat(&laws.rules, self.now, self.wall);
    }

    fn look_at(&self, stream: &Stream) -> Time {
        if stream.woken { self.now } else { stream.parked.poll_at().max(self.now) }
    }
}

impl Message {
    /// Whether a proxy has sent it.
    pub fn is_of_proxy(&self) -> bool {
        matches!(&*self.body, Body::Put { .. } | Body::Renew { .. } | Body::Delete { .. })
    }
}

impl Proxy {
    pub fn new(laws: &Laws, requests: usize) -> Self {
        Proxy {
            client: Arc::new(Client::new(laws.timeout)),
            rest: laws.rest(),
            life: 0,
            names: 0,
            timers: Vec::new(),
            requests: vec![Progress::Unasked; requests],
            idle_by: Time::ZERO,
        }
    }

    fn fresh_name(&mut self, at: usize) -> LeaseId {
        self.names += 1;
        name(at, self.names)
    }

    /// A request has come to its end: what is left of it is given back by then.
    fn is_over(&mut self, now: Time) {
        self.idle_by = now + self.rest;
    }

    /// When the first of its timers fires.
    fn next(&self, now: Time) -> Option<Time> {
        let timers = self.timers.iter().map(|(_, end)| *end).min();
        let next = timers.into_iter().chain([self.client.due()]).min().filter(|next| *next != Time::NEVER);
        next.map(|next| next.max(now))
    }

    /// The request that a lease is for, which may have got another name.
    fn rename(&mut self, at: usize, lease: LeaseId, sights: &mut Vec<Sight>) -> usize {
        let of = |progress: &Progress| matches!(progress, Progress::Asked { lease: known, .. } if *known == lease);
        if let Some(request) = self.requests.iter().position(of) {
            return request;
        }
        // A proxy asks for one thing at a time.
        sights.push(Sight::AskedAnew);
        let asked = |progress: &Progress| matches!(progress, Progress::Asked { .. });
        let request = self.requests.iter().position(asked).unwrap();
        assert_eq!(self.fresh_name(at), lease);
        if let Progress::Asked { lease: known, .. } = &mut self.requests[request] {
            *known = lease;
        }
        request
    }

    /// A caller is told what became of its request. False if that is not in order.
    fn tell(&mut self, now: Time, told: &Do<Told, Why>, sights: &mut Vec<Sight>) -> bool {
        let (Do::Granted { ticket, .. } | Do::Refused { ticket, .. } | Do::Lost { ticket, .. }) = told else {
            return false;
        };
        let request = (ticket.0 - TICKETS) as usize;
        let progress = self.requests[request];
        let next = match (progress, told) {
            (Progress::Asked { lease: asked, .. }, Do::Granted { lease, .. }) if asked == *lease => {
                Progress::Held { lease: asked }
            }
            (Progress::Asked { .. }, Do::Refused { why, .. }) => {
                sights.extend(Sight::of_refusal(why));
                Progress::Over
            }
            (Progress::Asked { .. }, Do::Lost { .. }) => {
                sights.push(Sight::LostBeforeTold);
                Progress::Over
            }
            (Progress::Held { .. }, Do::Lost { loss, .. }) => {
                sights.push(if *loss == Loss::HoldLimit { Sight::HoldLimit } else { Sight::Lost });
                Progress::Over
            }
            _ => return false,
        };
        self.requests[request] = next;
        if next == Progress::Over {
            self.is_over(now);
        }
        true
    }
}

/// The beginning: an authority that has been up for its grace, and proxies that have done nothing.
pub fn start(laws: &Laws, left: Faults) -> World {
    let now = Time::from_micros(2 * EPOCH);
    let mut authority = authority::start(&laws.rules, now - laws.ttl, WALL_EPOCH);
    for ticks in [2, 1, 0] {
        authority.beat(&laws.rules, now - TICK * ticks, WALL_EPOCH);
    }
    let proxies = std::array::from_fn(|at| Proxy::new(laws, laws.scripts[at].len()));
    let memory = Memory { highest: Default::default(), ended: Vec::new(), stepped_back: false, fault: None };
    World { now, wall: WALL_EPOCH, authority, proxies, net: Vec::new(), left, memory }
}
