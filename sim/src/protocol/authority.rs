//! One VM of an authority: what it does with the messages that reach it, with what is parked, and with its timers.

use std::collections::BTreeMap;
use std::rc::Rc;

use interlock::host::{Host, QueueId};
use interlock_core::lease::authority::{self, Answer, Parked, Renewed};
use interlock_core::lease::{End, PutAnswer};
use interlock_core::session::BEAT;
use interlock_core::{
    Cause, Census, Duration, LeaseId, LockName, Mode, OwnerId, Request, Rules, Scene, Store, StoreError, Table, Time,
    Want,
};

use super::{Body, Caller, Grant, Incoming, Reply};
use crate::port::Port;
use crate::state::Task;

/// How long what is parked goes without being looked at.
const BACKSTOP: Duration = Duration::from_secs(1);

/// One VM.
pub struct Server {
    rules: Rc<Rules>,
    table: Table,
    mailbox: u32,
    parked: BTreeMap<Caller, (Parked, Time)>,
    tried: Time,
    housekept: Time,
}

/// Serves until the VM has to end.
pub fn serve(port: &Port<'_>, rules: Rc<Rules>) {
    let mailbox = port.state().new_mailbox(port.vm);
    let mut server = Server {
        rules,
        table: Table::new(),
        mailbox,
        parked: BTreeMap::new(),
        tried: Time::ZERO,
        housekept: Time::ZERO,
    };
    loop {
        let task = port.state().next_task(port.vm);
        match task {
            Some(Task::Call(incoming)) => server.call(port, &incoming),
            Some(Task::Mail) => server.mail(port),
            Some(_) => server.tick(port),
            None if port.idle() => {}
            None => return,
        }
        server.rest(port);
    }
}

impl Server {
    fn with<T>(&mut self, port: &Port<'_>, act: impl FnOnce(&mut Table, &Scene<'_, Port<'_>>) -> T) -> T {
        let (now, unix_micros) = (Host::now(port), port.unix_micros());
        let rules = Rc::clone(&self.rules);
        let scene = Scene { store: port, rules: &rules, now, unix_micros };
        let answer = act(&mut self.table, &scene);
        let effects = self.table.take_effects();
        for wake in &effects.wakes {
            if let Some(member) = self.table.sessions().member(wake.session) {
                let _ = port.enqueue(QueueId(member.mailbox), &wake.lease.0.to_le_bytes());
            }
        }
        answer
    }

    fn call(&mut self, port: &Port<'_>, Incoming { caller, body }: &Incoming) {
        self.beat(port);
        match body {
            Body::Put { lease, owner, locks, wait, ttl, hold } => {
                let request = self.request(port, *lease, owner, locks, (*wait, *ttl, *hold));
                let answer = self.with(port, |table, scene| authority::put(table, scene, request, None));
                self.answer(port, *caller, answer);
            }
            Body::Renew(leases) => {
                let mut answers = Vec::new();
                for (lease, grant) in leases {
                    let receipt = Some(&grant.receipt);
                    let renewed = self.with(port, |table, scene| authority::renew(table, scene, *lease, None, receipt));
                    match renewed {
                        Ok(Renewed::Renewed { expires_in }) => answers.push((*lease, Some(expires_in))),
                        Ok(Renewed::Lost) => answers.push((*lease, None)),
                        // It says nothing of this one, which is then asked for again.
                        Err(_) => {}
                    }
                }
                port.state().send(*caller, Reply::Renewed(answers));
            }
            Body::Delete(lease) => {
                let deleted = self.with(port, |table, scene| authority::delete(table, scene, *lease));
                let mut state = port.state();
                if deleted.is_ok() {
                    state.deleted(*lease);
                }
                state.send(*caller, if deleted.is_ok() { Reply::Deleted } else { Reply::Failed(None) });
            }
            Body::Gone => {
                if let Some((parked, _)) = self.parked.remove(caller) {
                    self.with(port, |table, scene| authority::leave(table, scene, parked));
                }
            }
        }
    }

    fn request(
        &self,
        port: &Port<'_>,
        lease: LeaseId,
        owner: &OwnerId,
        locks: &[(LockName, Mode)],
        (wait, ttl, hold): (Duration, Duration, Duration),
    ) -> Request {
        let want = |(name, mode): &(LockName, Mode)| Want { name: name.clone(), mode: *mode, wait, ttl, hold };
        let wants = locks.iter().map(want).collect();
        Request::new(lease, owner.clone(), Host::now(port), wants, &self.rules.classes)
    }

    fn answer(&mut self, port: &Port<'_>, caller: Caller, answer: Result<Answer, StoreError>) {
        let reply = match answer {
            Ok(Answer::Granted { granted, new }) => {
                port.state().told(granted.lease, new);
                let grant: Grant = Rc::new(*granted);
                Reply::Put(PutAnswer::Granted { ttl: grant.ttl, waited: grant.waited, grant })
            }
            Ok(Answer::Parked(parked)) => {
                let now = Host::now(port);
                let due = parked.poll_at().min(now + BACKSTOP).max(now + Duration::from_millis(1));
                self.parked.insert(caller, (parked, due));
                return;
            }
            Ok(Answer::Refused(refusal)) => match refusal.cause {
                Cause::Grace { left } => Reply::Failed(Some(left)),
                Cause::Backend { .. } => Reply::Failed(None),
                cause => {
                    let slug = cause.slug();
                    port.state().counts.refusals += 1;
                    Reply::Put(PutAnswer::Refused(slug))
                }
            },
            Ok(Answer::Over(end)) => {
                let why = if end == End::Cancelled { "cancelled" } else { "over" };
                port.state().counts.overs += 1;
                Reply::Put(PutAnswer::Over { fresh: LeaseId(0), why })
            }
            Ok(Answer::Taken) => {
                port.state().violated(|| format!("an identity is taken, of {caller:?}"));
                Reply::Failed(None)
            }
            Err(_) => Reply::Failed(None),
        };
        port.state().send(caller, reply);
    }

    fn poll(&mut self, port: &Port<'_>, caller: Caller) {
        let Some((parked, _)) = self.parked.remove(&caller) else { return };
        let answer = self.with(port, |table, scene| authority::poll(table, scene, parked));
        self.answer(port, caller, answer);
    }

    fn mail(&mut self, port: &Port<'_>) {
        while let Ok(Some(message)) = port.dequeue(QueueId(self.mailbox)) {
            let Ok(lease) = <[u8; 16]>::try_from(message).map(|bytes| LeaseId(u128::from_le_bytes(bytes))) else {
                continue;
            };
            let of = |(_, (parked, _)): &(&Caller, &(Parked, Time))| parked.lease() == lease;
            let callers: Vec<Caller> = self.parked.iter().filter(of).map(|(caller, _)| *caller).collect();
            callers.into_iter().for_each(|caller| self.poll(port, caller));
        }
    }

    fn beat(&mut self, port: &Port<'_>) {
        let now = Host::now(port);
        if self.tried != Time::ZERO && now < self.tried + BEAT {
            return;
        }
        self.tried = now;
        let mailbox = self.mailbox;
        if self.with(port, |table, scene| table.beat(scene, mailbox)).is_err() {
            port.state().counts.beats_failed += 1;
        }
    }

    fn tick(&mut self, port: &Port<'_>) {
        self.beat(port);
        let now = Host::now(port);
        let due = self.parked.iter().filter(|(_, (_, due))| *due <= now).map(|(caller, _)| *caller);
        for caller in due.collect::<Vec<_>>() {
            self.poll(port, caller);
        }
        if now >= self.housekept + BEAT {
            self.housekept = now;
            self.mail(port);
            self.keep_house(port);
        }
    }

    fn keep_house(&mut self, port: &Port<'_>) {
        self.with(port, |table, scene| table.settle_debts(scene));
        if !matches!(self.with(port, |table, scene| table.keep_house(scene, false)), Ok(true)) {
            return;
        }
        let mut census = Census::default();
        for bucket in 0..port.buckets() {
            let swept = self.with(port, |table, scene| {
                table.sweep(scene, bucket, &mut census)?;
                authority::sweep(table, scene, bucket)
            });
            if swept.is_err() {
                return;
            }
        }
        port.state().counts.sweeps += 1;
        let _ = self.with(port, |table, scene| table.publish_census(scene, &census));
    }

    fn rest(&self, port: &Port<'_>) {
        let timers = self.parked.values().map(|(_, due)| *due);
        let due = timers.fold((self.tried + BEAT).min(self.housekept + BEAT), Time::min);
        let mut state = port.state();
        let facts = &mut state.vms[port.vm];
        facts.due = due;
        facts.busy = false;
        facts.waiters.clear();
        facts.waiters.extend(self.parked.values().map(|(parked, due)| (parked.lease(), *due, parked.deadline())));
    }
}
