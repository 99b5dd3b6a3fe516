//! The lease protocol: an authority of one or two VMs over one store, three proxies, and a network between them that loses,
//! doubles, delays and reorders.
//!
//! The authority's VMs are coroutines as those of the lock table are; the proxies' machines have no store and run at once.
//! Here is a schedule of it; `authority` and `proxy` are the two sides, `net` plays a schedule, `faults` is what goes wrong in it, `check` says what must hold.

mod authority;
mod check;
mod faults;
mod net;
mod proxy;

use std::fmt;
use std::rc::Rc;

use interlock_core::lease::{Granted, PutAnswer};
use interlock_core::{Duration, LeaseId, LockName, Mode, OwnerId};

use crate::dice::Dice;
use crate::schedule::{LOCKS, OWNERS};

pub use authority::serve;
pub use check::ProtocolFacts;
pub use net::{PROXIES, play};

/// What a grant carries: the lease as the authority told it, its receipt too.
pub type Grant = Rc<Granted>;

/// Why a request was refused.
pub type Why = &'static str;

/// What a proxy sends.
#[derive(Clone, Debug)]
pub enum Body {
    /// `PUT`
    Put {
        /// Under which identity.
        lease: LeaseId,
        /// For whom.
        owner: OwnerId,
        /// Which locks.
        locks: Vec<(LockName, Mode)>,
        /// The longest wait.
        wait: Duration,
        /// The TTL.
        ttl: Duration,
        /// The hold limit.
        hold: Duration,
    },
    /// `POST renew`
    Renew(Vec<(LeaseId, Grant)>),
    /// `DELETE`
    Delete(LeaseId),
    /// The stream of a call has ended before it was answered.
    Gone,
}

/// What the authority answers.
#[derive(Clone, Debug)]
pub enum Reply {
    /// To a `PUT`; the fresh identity of [`PutAnswer::Over`] is the proxy's to choose.
    Put(PutAnswer<Grant, Why>),
    /// To a renewal.
    Renewed(Vec<(LeaseId, Option<Duration>)>),
    /// To a release.
    Deleted,
    /// Something went wrong; perhaps with a time after which to try again.
    Failed(Option<Duration>),
}

/// Which call: of which proxy, in which life of it, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Caller {
    /// The proxy.
    pub proxy: usize,
    /// Which life of it.
    pub life: u32,
    /// The call.
    pub call: u64,
}

/// A request, as one VM of the authority has to answer it.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// Whom to answer.
    pub caller: Caller,
    /// What is asked.
    pub body: Body,
}

/// One step. Everything is meant by number, modulo how many there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Move {
    /// A request comes in at a proxy: owner, locks, then milliseconds of wait, TTL and hold.
    Ask(u8, u8, Vec<(u8, Mode)>, u32, u32, u32),
    /// A request ends, whether it waits or holds.
    End(u8, u8),
    /// The holder of a lease uses a resource that checks fences.
    Use(u8, u8),
    /// A message arrives.
    Deliver(u8),
    /// A message is lost.
    Drop(u8),
    /// A message is doubled.
    Double(u8),
    /// The connection of a request breaks: the proxy hears of it at once, the request may arrive all the same.
    Break(u8),
    /// So many messages arrive, in order; the authority answers each.
    Flow(u8),
    /// A VM of the authority runs for so many store calls.
    Run(u8, u8),
    /// So many store calls, each by whichever VM the dice say.
    Race(u8, u32),
    /// The VMs of the authority finish what they have begun.
    Drain,
    /// Time passes, in microseconds; running proxies do what is due.
    Pass(u32),
    /// So many writes of a VM find a conflict that is none.
    Conflict(u8, u8),
    /// After so many store calls of a VM, so many fail.
    Fail(u8, u8, u8),
    /// A VM of the authority dies.
    Kill(u8),
    /// A VM of the authority is started anew.
    Start(u8),
    /// The authority loses its memory; milliseconds until it is there again.
    Restart(u32),
    /// A proxy crashes, and with it all that it knew and the requests that relied on it; another takes its place.
    Crash(u8),
    /// A proxy stops for a while: nothing reaches it, none of its timers fires.
    Pause(u8),
    /// It goes on: what has come meanwhile may be seen before its timers are.
    Resume(u8),
    /// The wall clock of the authority steps, in milliseconds.
    Wall(i32),
}

/// A whole schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How many VMs the authority has.
    pub vms: u8,
    /// Whether nothing goes wrong but restarts: then no lease may be lost by one.
    pub gentle: bool,
    /// What happens.
    pub moves: Vec<Move>,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} VMs, gentle {}, {} steps", self.vms, self.gentle, self.moves.len())?;
        self.moves.iter().enumerate().try_for_each(|(at, step)| writeln!(f, "{at:4} {step}"))
    }
}

impl fmt::Display for Move {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Move::Ask(proxy, owner, locks, wait, ttl, hold) => {
                let locks: Vec<String> =
                    locks.iter().map(|(lock, mode)| format!("{} {mode}", LOCKS[usize::from(*lock)])).collect();
                let (owner, locks) = (OWNERS[usize::from(*owner)], locks.join(" + "));
                write!(f, "proxy{proxy}: {owner} asks for {locks}; wait {wait} ms, ttl {ttl} ms, hold {hold} ms")
            }
            Move::End(proxy, nth) => write!(f, "proxy{proxy}: request {nth} ends"),
            Move::Use(proxy, nth) => write!(f, "proxy{proxy}: request {nth} uses its resource"),
            Move::Deliver(nth) => write!(f, "message {nth} arrives"),
            Move::Drop(nth) => write!(f, "message {nth} is lost"),
            Move::Double(nth) => write!(f, "message {nth} is doubled"),
            Move::Break(nth) => write!(f, "the connection of message {nth} breaks"),
            Move::Flow(count) => write!(f, "{count} messages arrive and are answered"),
            Move::Run(vm, calls) => write!(f, "authority vm{vm}: runs for {calls} calls"),
            Move::Race(calls, dice) => write!(f, "the authority runs for {calls} calls in the order of dice {dice}"),
            Move::Drain => write!(f, "the authority finishes what it does"),
            Move::Pass(micros) => write!(f, "{micros} us pass"),
            Move::Conflict(vm, writes) => write!(f, "authority vm{vm}: the next {writes} writes conflict"),
            Move::Fail(vm, sound, failing) => {
                write!(f, "authority vm{vm}: after {sound} store calls {failing} fail")
            }
            Move::Kill(vm) => write!(f, "authority vm{vm}: dies"),
            Move::Start(vm) => write!(f, "authority vm{vm}: starts anew"),
            Move::Restart(millis) => write!(f, "the authority loses its memory, and is back after {millis} ms"),
            Move::Crash(proxy) => write!(f, "proxy{proxy}: crashes"),
            Move::Pause(proxy) => write!(f, "proxy{proxy}: stops"),
            Move::Resume(proxy) => write!(f, "proxy{proxy}: goes on"),
            Move::Wall(millis) => write!(f, "the wall clock of the authority steps by {millis} ms"),
        }
    }
}

/// The longest TTL, and so the grace period.
pub const LONGEST_TTL: Duration = Duration::from_millis(1000);

/// Makes up the schedule of a seed.
pub fn make(seed: u64) -> Plan {
    const SETS: [&[u8]; 5] = [&[0], &[0, 1], &[0, 1, 2], &[4, 5, 6], &[7, 8, 0]];
    let mut dice = Dice::new(seed);
    let vms = dice.pick(&[1, 1, 2]);
    let gentle = dice.percent(20);
    let locks = dice.pick(&SETS);
    let owners = dice.pick(&[2, 3, 4]);
    let mut moves = Vec::with_capacity(64);
    for _ in 0..6 + dice.roll(20) {
        request(&mut dice, locks, owners, &mut moves);
        if gentle {
            if let Some(Move::Ask(.., hold)) = moves.last_mut() {
                // What ends by its hold limit while it waits for more is lost for a reason of its own.
                *hold = 60_000;
            }
            moves.push(Move::Flow(20));
            for _ in 0..dice.roll(4) {
                moves.extend([Move::Pass(20_000 + u32::from(dice.small(100)) * 500), Move::Flow(40)]);
            }
            if dice.percent(10) {
                moves.push(Move::Restart(u32::from(dice.small(60))));
            }
        } else {
            network(&mut dice, vms, &mut moves);
            if dice.percent(40) {
                let micros = dice.pick(&[500, 20_000, 90_000, 200_000, 350_000, 700_000, 1_200_000]);
                moves.push(Move::Pass(micros + u32::from(dice.small(200)) * micros / 1000));
            }
            if dice.percent(22) {
                fault(&mut dice, vms, &mut moves);
            }
        }
    }
    Plan { vms, gentle, moves }
}

fn request(dice: &mut Dice, locks: &[u8], owners: u8, moves: &mut Vec<Move>) {
    use Mode::{Exclusive, IntentExclusive, Shared};
    let (proxy, nth) = (dice.small(3), dice.small(4));
    moves.push(match dice.roll(12) {
        0..=5 => {
            let count = 1 + usize::from(dice.percent(20));
            let modes = [Exclusive, Exclusive, Exclusive, Shared, Shared, IntentExclusive];
            let wanted = (0..count).map(|_| (dice.pick(locks), dice.pick(&modes))).collect();
            let (wait, ttl) = (dice.pick(&[0, 150, 600, 3000]), dice.pick(&[300, 300, 1000]));
            Move::Ask(proxy, dice.small(owners), wanted, wait, ttl, dice.pick(&[60_000, 60_000, 60_000, 700]))
        }
        6..=8 => Move::End(proxy, nth),
        _ => Move::Use(proxy, nth),
    });
}

fn network(dice: &mut Dice, vms: u8, moves: &mut Vec<Move>) {
    for _ in 0..1 + dice.roll(3) {
        let nth = dice.small(6);
        moves.push(match dice.roll(20) {
            0..=6 => Move::Flow(1 + dice.small(12)),
            7..=11 => Move::Deliver(nth),
            12 => Move::Drop(nth),
            13 => Move::Double(nth),
            14 => Move::Break(nth),
            15..=16 => Move::Run(dice.small(vms), 1 + dice.small(8)),
            17 => Move::Race(1 + dice.small(30), u32::try_from(dice.draw() >> 48).unwrap_or(0)),
            _ => Move::Drain,
        });
    }
}

fn fault(dice: &mut Dice, vms: u8, moves: &mut Vec<Move>) {
    let (vm, proxy) = (dice.small(vms), dice.small(3));
    moves.push(match dice.roll(16) {
        0 => Move::Conflict(vm, 1 + dice.small(3)),
        1..=2 => Move::Fail(vm, dice.small(14), 1 + dice.small(2)),
        3 => Move::Kill(vm),
        4..=5 => Move::Start(vm),
        6..=8 => Move::Restart(u32::from(dice.small(200)) * 4),
        9 => Move::Crash(proxy),
        10..=11 => Move::Pause(proxy),
        12..=13 => Move::Resume(proxy),
        _ => Move::Wall(i32::from(dice.small(200)) * 4 - 300),
    });
}
