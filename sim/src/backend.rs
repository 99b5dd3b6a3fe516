//! What a VM drives: the shipped backend with its encoding, or the core's table over plain records, which does in few
//! words what the backend does around it. What must not live here: when which of it is done (that is `driver`).

use interlock::backend::Purpose;
use interlock::backend::local::Local;
use interlock::host::{Host, QueueId};
use interlock_core::session::BEAT;
use interlock_core::{
    Census, Duration, Effects, Entry, Grant, Lease, LeaseId, LockName, Loss, Outcome, Pending, Request, Rules, Scene,
    SessionId, Store, StoreError, Table, Time,
};

use crate::port::Port;

/// See [`Local`], whose methods these are.
#[expect(missing_docs, reason = "they are documented there")]
pub trait Backend: Sized {
    /// How many buckets of locks there are.
    const BUCKETS: u32;
    /// Whether a VM may have no session, so that its leases live by their own renewals.
    const RENEWS: bool;

    fn open(port: &Port<'_>) -> Option<Self>;
    fn next_beat(&self) -> Time;
    fn may_have_lapsed(&self, now: Time, ttl: Duration) -> bool;
    fn beat(&mut self, port: &Port<'_>, rules: &Rules) -> Result<bool, StoreError>;
    fn new_lease(&mut self, port: &Port<'_>) -> Result<LeaseId, StoreError>;
    fn acquire(&mut self, port: &Port<'_>, rules: &Rules, request: Request) -> Outcome;
    fn poll(&mut self, port: &Port<'_>, rules: &Rules, pending: Pending) -> Outcome;
    fn poll_at(&self, pending: &Pending) -> Time;
    fn cancel(&mut self, port: &Port<'_>, rules: &Rules, pending: Pending);
    fn release(&mut self, port: &Port<'_>, rules: &Rules, lease: Lease) -> Vec<Grant>;
    fn check(&mut self, port: &Port<'_>, rules: &Rules, lease: &Lease) -> Result<Option<(LockName, Loss)>, StoreError>;
    fn keep_house(&mut self, port: &Port<'_>, rules: &Rules) -> Result<Option<Census>, StoreError>;
    fn deliver(&mut self, port: &Port<'_>) -> Effects;
    fn woken(&self, port: &Port<'_>) -> Vec<LeaseId>;
    fn listen(&mut self, port: &Port<'_>);
    /// Locks and waiters as the table counts them, where that can be seen.
    fn load(&self) -> Option<(u32, u32)>;
    /// Ends all grants of a lock, where the backend can.
    fn break_glass(&mut self, port: &Port<'_>, rules: &Rules, lock: &LockName) -> Result<Vec<Entry>, StoreError>;
}

impl Backend for Local {
    const BUCKETS: u32 = 1024;
    const RENEWS: bool = false;

    fn open(port: &Port<'_>) -> Option<Self> {
        Local::open(port, "sim", Purpose::Enforce).ok()
    }

    fn next_beat(&self) -> Time {
        Local::next_beat(self)
    }

    fn may_have_lapsed(&self, now: Time, ttl: Duration) -> bool {
        Local::may_have_lapsed(self, now, ttl)
    }

    fn beat(&mut self, port: &Port<'_>, rules: &Rules) -> Result<bool, StoreError> {
        Local::beat(self, port, rules)
    }

    fn new_lease(&mut self, _port: &Port<'_>) -> Result<LeaseId, StoreError> {
        Local::new_lease(self)
    }

    fn acquire(&mut self, port: &Port<'_>, rules: &Rules, request: Request) -> Outcome {
        Local::acquire(self, port, rules, request)
    }

    fn poll(&mut self, port: &Port<'_>, rules: &Rules, pending: Pending) -> Outcome {
        Local::poll(self, port, rules, pending)
    }

    fn poll_at(&self, pending: &Pending) -> Time {
        Local::poll_at(self, pending)
    }

    fn cancel(&mut self, port: &Port<'_>, rules: &Rules, pending: Pending) {
        Local::cancel(self, port, rules, pending);
    }

    fn release(&mut self, port: &Port<'_>, rules: &Rules, lease: Lease) -> Vec<Grant> {
        Local::release(self, port, rules, lease)
    }

    fn check(&mut self, port: &Port<'_>, rules: &Rules, lease: &Lease) -> Result<Option<(LockName, Loss)>, StoreError> {
        Local::check(self, port, rules, lease)
    }

    fn keep_house(&mut self, port: &Port<'_>, rules: &Rules) -> Result<Option<Census>, StoreError> {
        Local::keep_house(self, port, rules, false)
    }

    fn deliver(&mut self, port: &Port<'_>) -> Effects {
        Local::deliver(self, port)
    }

    fn woken(&self, port: &Port<'_>) -> Vec<LeaseId> {
        Local::woken(self, port)
    }

    fn listen(&mut self, port: &Port<'_>) {
        if self.mailbox().is_some() {
            // What cannot be registered now is registered by the next tick.
            let _ = Local::listen(self, port);
        }
    }

    fn load(&self) -> Option<(u32, u32)> {
        None
    }

    fn break_glass(&mut self, _: &Port<'_>, _: &Rules, _: &LockName) -> Result<Vec<Entry>, StoreError> {
        Ok(Vec::new())
    }
}

/// The core's table without encoding and with few buckets: for many schedules.
pub struct Bare {
    table: Table,
    mailbox: u32,
    beaten: Time,
    tried: Time,
    leases: u128,
    /// Whether it has no session, so that its leases live by their own renewals.
    renews: bool,
    life: u32,
}

fn scene<T>(port: &Port<'_>, rules: &Rules, act: impl FnOnce(&Scene<'_, Port<'_>>) -> T) -> T {
    let (now, unix_micros) = (Host::now(port), port.unix_micros());
    act(&Scene { store: port, rules, now, unix_micros })
}

impl Bare {
    fn beat_every(&self) -> Duration {
        BEAT.min(self.table.shortest_ttl() / 3)
    }
}

impl Backend for Bare {
    const BUCKETS: u32 = crate::state::BARE_BUCKETS;
    const RENEWS: bool = true;

    fn open(port: &Port<'_>) -> Option<Self> {
        let mut state = port.state();
        let mailbox = state.new_mailbox(port.vm);
        let facts = &state.vms[port.vm];
        Some(Bare {
            table: Table::new(),
            mailbox,
            beaten: Time::ZERO,
            tried: Time::ZERO,
            leases: 0,
            renews: facts.renews,
            life: facts.life,
        })
    }

    fn next_beat(&self) -> Time {
        if self.renews {
            return Time::NEVER;
        }
        if self.tried == Time::ZERO { Time::ZERO } else { self.tried + self.beat_every() }
    }

    fn may_have_lapsed(&self, now: Time, ttl: Duration) -> bool {
        !self.renews && now.since(self.beaten) >= ttl
    }

    fn beat(&mut self, port: &Port<'_>, rules: &Rules) -> Result<bool, StoreError> {
        let now = Host::now(port);
        if now < self.next_beat() {
            return Ok(false);
        }
        self.tried = now;
        let had_session = self.table.session() != SessionId::NONE;
        let joined = scene(port, rules, |scene| self.table.beat(scene, self.mailbox))?;
        let lapsed = self.may_have_lapsed(Host::now(port), self.table.shortest_ttl());
        self.beaten = now;
        Ok(had_session && (joined.is_some() || lapsed))
    }

    fn new_lease(&mut self, port: &Port<'_>) -> Result<LeaseId, StoreError> {
        let session = self.table.session();
        if session == SessionId::NONE && !self.renews {
            return Err(StoreError::Failed(String::from("not joined")));
        }
        self.leases += 1;
        let of = if self.renews { u128::from(self.life) << 96 | 1 << 120 } else { 0 };
        let vm = u128::try_from(port.vm).unwrap_or(0) << 112;
        let of = if self.renews { of | vm } else { u128::from(session.0) << 64 };
        Ok(LeaseId(of | self.leases))
    }

    fn acquire(&mut self, port: &Port<'_>, rules: &Rules, request: Request) -> Outcome {
        scene(port, rules, |scene| self.table.acquire(scene, request))
    }

    fn poll(&mut self, port: &Port<'_>, rules: &Rules, pending: Pending) -> Outcome {
        scene(port, rules, |scene| self.table.poll(scene, pending))
    }

    fn poll_at(&self, pending: &Pending) -> Time {
        self.table.poll_at(pending)
    }

    fn cancel(&mut self, port: &Port<'_>, rules: &Rules, pending: Pending) {
        scene(port, rules, |scene| self.table.cancel(scene, pending));
    }

    fn release(&mut self, port: &Port<'_>, rules: &Rules, lease: Lease) -> Vec<Grant> {
        scene(port, rules, |scene| self.table.release(scene, lease))
    }

    fn check(&mut self, port: &Port<'_>, rules: &Rules, lease: &Lease) -> Result<Option<(LockName, Loss)>, StoreError> {
        scene(port, rules, |scene| self.table.renew(scene, lease))
    }

    fn keep_house(&mut self, port: &Port<'_>, rules: &Rules) -> Result<Option<Census>, StoreError> {
        scene(port, rules, |scene| {
            self.table.settle_debts(scene);
            if !self.table.keep_house(scene, false)? {
                return Ok(None);
            }
            let mut census = Census::default();
            (0..port.buckets()).try_for_each(|bucket| self.table.sweep(scene, bucket, &mut census))?;
            Ok(Some(census))
        })
    }

    fn deliver(&mut self, port: &Port<'_>) -> Effects {
        let effects = self.table.take_effects();
        for wake in &effects.wakes {
            if let Some(member) = self.table.sessions().member(wake.session) {
                // A hint: one that is lost is made up for by the waiter's next look.
                let _ = port.enqueue(QueueId(member.mailbox), &wake.lease.0.to_le_bytes());
            }
        }
        effects
    }

    fn woken(&self, port: &Port<'_>) -> Vec<LeaseId> {
        let mut woken = Vec::new();
        while let Ok(Some(message)) = port.dequeue(QueueId(self.mailbox)) {
            woken.extend(<[u8; 16]>::try_from(message).map(|lease| LeaseId(u128::from_le_bytes(lease))));
        }
        woken
    }

    fn listen(&mut self, _: &Port<'_>) {}

    fn load(&self) -> Option<(u32, u32)> {
        let load = self.table.load();
        Some((load.locks, load.waiters))
    }

    fn break_glass(&mut self, port: &Port<'_>, rules: &Rules, lock: &LockName) -> Result<Vec<Entry>, StoreError> {
        scene(port, rules, |scene| self.table.break_glass(scene, lock))
    }
}
