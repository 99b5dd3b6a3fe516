//! What goes wrong by a schedule of the lease protocol: with messages, with the authority and its VMs, with proxies and clocks.

use interlock_core::Duration;

use super::net::{Net, Packet, ahead};
use super::proxy::Proxy;
use super::{Body, Caller, Incoming, LONGEST_TTL, Move, Reply};

impl Net<'_> {
    pub(super) fn fault(&mut self, step: &Move) {
        match step {
            Move::Drop(nth) => {
                let dropped = self.take_packet(*nth).is_some();
                self.state().counts.dropped += u64::from(dropped);
            }
            Move::Double(nth) => {
                let at = usize::from(*nth) % self.packets.len().max(1);
                if let Some(packet) = self.packets.get(at).cloned() {
                    self.state().counts.doubled += 1;
                    self.packets.push_back(packet);
                }
            }
            Move::Break(nth) => self.break_off(*nth),
            Move::Kill(vm) => self.crew.kill(usize::from(*vm)),
            Move::Start(vm) => self.start_vm(usize::from(*vm)),
            Move::Restart(millis) => self.restart(*millis),
            Move::Crash(proxy) => {
                let at = usize::from(*proxy);
                let life = self.proxies[at].life + 1;
                // Its connections break with it.
                for caller in self.proxies[at].open_calls() {
                    self.post(Packet::Call(Incoming { caller, body: Body::Gone }));
                }
                self.state().counts.crashes += 1;
                self.proxies[at] = Proxy::new(at, life, ahead(at, life));
            }
            Move::Pause(proxy) => {
                self.state().counts.pauses += 1;
                self.proxies[usize::from(*proxy)].paused = true;
            }
            Move::Resume(proxy) => self.resume(usize::from(*proxy)),
            Move::Wall(millis) => self.wall(i64::from(*millis) * 1000),
            Move::Conflict(vm, writes) => self.state().vms[usize::from(*vm)].conflicts = u32::from(*writes),
            Move::Fail(vm, sound, failing) => {
                let facts = &mut self.state.borrow_mut().vms[usize::from(*vm)];
                (facts.sound, facts.failing) = (u32::from(*sound), u32::from(*failing));
            }
            _ => {}
        }
    }

    pub(super) fn resume(&mut self, at: usize) {
        let now = self.now(at);
        let proxy = &mut self.proxies[at];
        if proxy.paused {
            proxy.paused = false;
            proxy.runs_since = now;
        }
    }

    fn break_off(&mut self, nth: u8) {
        let at = usize::from(nth) % self.packets.len().max(1);
        let Some(Packet::Call(Incoming { caller, body })) = self.packets.get(at) else { return };
        let (caller, at) = (*caller, caller.proxy);
        if matches!(body, Body::Gone) || self.proxies[at].paused {
            return;
        }
        self.state().counts.broken += 1;
        self.post(Packet::Call(Incoming { caller, body: Body::Gone }));
        let now = self.now(at);
        self.proxies[at].hear(now, caller, Reply::Failed(None));
        self.pump(at);
    }

    /// The authority dies with all that it knew, and is there again after a while. Whoever was parked there is cut off.
    fn restart(&mut self, millis: u32) {
        let now = self.state().now;
        // A lease outlives one short absence of its authority, and not one after the other.
        if self.gentle && now < self.restarted + LONGEST_TTL * 2 {
            return;
        }
        self.restarted = now;
        (0..self.vms).for_each(|vm| self.crew.kill(vm));
        self.state().forget_everything();
        let under_way: Vec<Caller> = self
            .packets
            .iter()
            .map(|packet| match packet {
                Packet::Call(Incoming { caller, .. }) | Packet::Answer(caller, _) => *caller,
            })
            .collect();
        let open: Vec<Caller> = self.proxies.iter().flat_map(Proxy::open_calls).collect();
        for caller in open.into_iter().filter(|caller| !under_way.contains(caller)) {
            self.post(Packet::Answer(caller, Reply::Failed(None)));
        }
        self.stepped_back = 0;
        self.pass(Duration::from_millis(u64::from(millis)));
        self.start();
        self.crew.drain();
    }

    /// The wall clock steps; back by no more than the grace period makes up for.
    fn wall(&mut self, micros: i64) {
        let most = u64::try_from(LONGEST_TTL.as_micros()).unwrap_or(0) / 2;
        let back = u64::try_from(-micros).unwrap_or(0);
        if self.stepped_back + back > most {
            return;
        }
        self.stepped_back += back;
        let mut state = self.state();
        state.counts.clock_steps += 1;
        state.unix = state.unix.saturating_add_signed(micros);
    }
}
