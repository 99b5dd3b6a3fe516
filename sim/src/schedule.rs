//! A schedule: what is asked for, what goes wrong, and in which alternation the VMs run. Made up from a seed; printed a
//! step a line. What must not live here: how a step is carried out.

use std::fmt;

use interlock_core::Mode;

use crate::dice::Dice;

/// The locks that schedules are about: plain, a pool, a tree, ranks, and one class without an order within.
pub const LOCKS: [&str; 10] = ["l/1", "l/2", "l/3", "p/1", "t", "t/a", "t/a/b", "r/1", "q/1", "u/1"];

/// Those who ask.
pub const OWNERS: [&str; 6] = ["o0", "o1", "o2", "o3", "o4", "o5"];

/// How many VMs there are at the most.
pub const VMS: usize = 4;

/// A request: the owner, the locks with their modes, and milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Index into [`OWNERS`].
    pub owner: u8,
    /// Indices into [`LOCKS`].
    pub locks: Vec<(u8, Mode)>,
    /// Longest wait.
    pub wait: u32,
    /// TTL of the grants.
    pub ttl: u32,
    /// Hold limit of the grants.
    pub hold: u32,
    /// Whether the owner's other leases let it pass.
    pub reentrant: bool,
}

/// What becomes of a wake-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It comes.
    Comes,
    /// It never comes.
    Lost,
    /// It lies in the queue, and nobody is told of it.
    Late,
    /// It comes twice.
    Doubled,
    /// It comes before those that were sent earlier.
    First,
}

/// One step. VMs, and what they hold, are meant by number, modulo how many there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A request comes in at a VM.
    Ask(u8, Ask),
    /// The holder of a lease asks for its first lock again, exclusively.
    Upgrade(u8, u8),
    /// A request ends that holds.
    Release(u8, u8),
    /// A request ends that waits.
    Cancel(u8, u8),
    /// A lease is checked, or renewed where it lives by that.
    Check(u8, u8),
    /// The glass is broken over a lock.
    Glass(u8, u8),
    /// A tick that is not due.
    Tick(u8),
    /// The mailbox is emptied.
    Mail(u8),
    /// A VM runs for so many calls of its host, and is preempted before the next.
    Run(u8, u8),
    /// So many calls, each by whichever VM the dice say.
    Race(u8, u32),
    /// Everybody finishes what is begun, one after the other.
    Drain,
    /// Time passes, in microseconds. VMs in the middle of something stay there.
    Pass(u32),
    /// So many writes of a VM find that somebody else was faster, though nobody was.
    Conflict(u8, u8),
    /// After so many store calls of a VM, so many fail.
    Fail(u8, u8, u8),
    /// What becomes of the next wake-up.
    Wake(Fate),
    /// A VM dies, in the middle of whatever it does.
    Kill(u8),
    /// A dead VM is started anew.
    Start(u8),
    /// A VM stops running.
    Stall(u8),
    /// It goes on.
    Resume(u8),
    /// The wall clock steps, in microseconds.
    Wall(i64),
}

/// A whole schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// How many VMs share the table from the start.
    pub vms: u8,
    /// Whether the last of them has no session, so that its leases live by their own renewals.
    pub renews: bool,
    /// Which set of rules they have.
    pub rules: u8,
    /// Whether leases are held until they end once the faults are over, instead of given back.
    pub clings: bool,
    /// What happens.
    pub steps: Vec<Step>,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Schedule { vms, renews, rules, clings, steps } = self;
        writeln!(f, "{vms} VMs, rules {rules}, renews {renews}, clings {clings}, {} steps", steps.len())?;
        steps.iter().enumerate().try_for_each(|(at, step)| writeln!(f, "{at:4} {step}"))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Ask(vm, Ask { owner, locks, wait, ttl, hold, reentrant }) => {
                let locks: Vec<String> =
                    locks.iter().map(|(lock, mode)| format!("{} {mode}", LOCKS[usize::from(*lock)])).collect();
                let re = if *reentrant { "" } else { ", not re-entrant" };
                let owner = OWNERS[usize::from(*owner)];
                let locks = locks.join(" + ");
                write!(f, "vm{vm}: {owner} asks for {locks}; wait {wait} ms, ttl {ttl} ms, hold {hold} ms{re}")
            }
            Step::Upgrade(vm, nth) => write!(f, "vm{vm}: upgrades lease {nth}"),
            Step::Release(vm, nth) => write!(f, "vm{vm}: releases lease {nth}"),
            Step::Cancel(vm, nth) => write!(f, "vm{vm}: cancels waiter {nth}"),
            Step::Check(vm, nth) => write!(f, "vm{vm}: checks lease {nth}"),
            Step::Glass(vm, lock) => write!(f, "vm{vm}: breaks the glass over {}", LOCKS[usize::from(*lock)]),
            Step::Tick(vm) => write!(f, "vm{vm}: ticks"),
            Step::Mail(vm) => write!(f, "vm{vm}: empties its mailbox"),
            Step::Run(vm, calls) => write!(f, "vm{vm}: runs for {calls} calls"),
            Step::Race(calls, dice) => write!(f, "all run for {calls} calls in the order of dice {dice}"),
            Step::Drain => write!(f, "all finish what they do"),
            Step::Pass(micros) => write!(f, "{micros} us pass"),
            Step::Conflict(vm, writes) => write!(f, "vm{vm}: the next {writes} writes conflict"),
            Step::Fail(vm, sound, failing) => write!(f, "vm{vm}: after {sound} store calls {failing} fail"),
            Step::Wake(fate) => write!(f, "the next wake-up: {fate:?}"),
            Step::Kill(vm) => write!(f, "vm{vm}: dies"),
            Step::Start(vm) => write!(f, "vm{vm}: starts anew"),
            Step::Stall(vm) => write!(f, "vm{vm}: stops running"),
            Step::Resume(vm) => write!(f, "vm{vm}: runs again"),
            Step::Wall(micros) => write!(f, "the wall clock steps by {micros} us"),
        }
    }
}

/// What one schedule is about: few locks and owners, so that they meet.
struct Theme {
    locks: Vec<u8>,
    owners: u8,
    reentrant: usize,
    multi: usize,
    ttls: &'static [u32],
    waits: &'static [u32],
}

impl Theme {
    fn new(dice: &mut Dice) -> Self {
        const SETS: [&[u8]; 9] = [
            &[0, 1],
            &[0, 1, 2],
            &[0],
            &[7, 8],
            &[4, 5, 6],
            &[6, 4, 0],
            &[3, 0],
            &[7, 8, 9, 0],
            &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        ];
        const TTLS: [&[u32]; 3] = [&[300], &[1000], &[200, 1000, 3000]];
        const WAITS: [&[u32]; 3] = [&[5000], &[0, 300, 5000], &[100, 700]];
        Theme {
            locks: dice.pick(&SETS).to_vec(),
            owners: dice.pick(&[2, 3, 3, 4, 6]),
            reentrant: dice.pick(&[100, 100, 80, 0]),
            multi: dice.pick(&[0, 20, 50]),
            ttls: dice.pick(&TTLS),
            waits: dice.pick(&WAITS),
        }
    }

    fn ask(&self, dice: &mut Dice) -> Ask {
        use Mode::{Exclusive, IntentExclusive, IntentShared, Shared, SharedIntentExclusive};
        const MODES: [Mode; 10] = [
            Exclusive,
            Exclusive,
            Exclusive,
            Exclusive,
            Shared,
            Shared,
            Shared,
            IntentExclusive,
            IntentShared,
            SharedIntentExclusive,
        ];
        let mut count = 1;
        while count < 3 && dice.percent(self.multi) {
            count += 1;
        }
        let locks = (0..count).map(|_| (dice.pick(&self.locks), dice.pick(&MODES))).collect();
        Ask {
            owner: dice.small(self.owners),
            locks,
            wait: dice.pick(self.waits),
            ttl: dice.pick(self.ttls),
            hold: dice.pick(&[60_000, 60_000, 60_000, 400]),
            reentrant: dice.percent(self.reentrant),
        }
    }
}

/// Makes up the schedule of a seed. `longest`: how many requests at the most.
pub fn make(seed: u64, longest: usize) -> Schedule {
    let mut dice = Dice::new(seed);
    let vms = dice.pick(&[1, 2, 2, 2, 3, 3, 4]);
    let theme = Theme::new(&mut dice);
    let faulty = dice.percent(60);
    let races = dice.percent(80);
    let mut steps = Vec::with_capacity(64);
    let operations = 4 + dice.roll(longest.saturating_sub(4));
    for _ in 0..operations {
        let vm = dice.small(vms);
        operation(&mut dice, &theme, vm, &mut steps);
        if races && dice.percent(70) {
            alternate(&mut dice, vm, vms, &mut steps);
        } else if dice.percent(60) {
            steps.push(Step::Drain);
        }
        if dice.percent(25) {
            pass(&mut dice, &mut steps);
        }
        if faulty && dice.percent(25) {
            fault(&mut dice, vm, vms, &mut steps);
        }
    }
    Schedule { vms, renews: dice.percent(15), rules: dice.small(4), clings: dice.percent(15), steps }
}

fn operation(dice: &mut Dice, theme: &Theme, vm: u8, steps: &mut Vec<Step>) {
    let nth = dice.small(4);
    steps.push(match dice.roll(40) {
        0..=20 => Step::Ask(vm, theme.ask(dice)),
        21..=22 => Step::Upgrade(vm, nth),
        23..=31 => Step::Release(vm, nth),
        32..=34 => Step::Cancel(vm, nth),
        35 => Step::Check(vm, nth),
        36 => Step::Glass(vm, dice.pick(&theme.locks)),
        37 => Step::Mail(vm),
        _ => Step::Tick(vm),
    });
}

fn alternate(dice: &mut Dice, vm: u8, vms: u8, steps: &mut Vec<Step>) {
    match dice.roll(3) {
        0 => steps.push(Step::Run(vm, 1 + dice.small(6))),
        1 => {
            for _ in 0..1 + dice.roll(3) {
                steps.push(Step::Run(dice.small(vms), 1 + dice.small(3)));
            }
        }
        _ => steps.push(Step::Race(4 + dice.small(30), u32::try_from(dice.draw() >> 48).unwrap_or(0))),
    }
}

fn pass(dice: &mut Dice, steps: &mut Vec<Step>) {
    if dice.percent(60) {
        steps.push(Step::Drain);
    }
    let micros = dice.pick(&[10, 1000, 20_000, 100_000, 240_000, 240_000, 400_000, 700_000, 1_600_000, 3_100_000]);
    let jitter = u32::try_from(dice.roll(micros / 4 + 1)).unwrap_or(0);
    steps.push(Step::Pass(u32::try_from(micros).unwrap_or(0) + jitter));
}

fn fault(dice: &mut Dice, vm: u8, vms: u8, steps: &mut Vec<Step>) {
    const FATES: [Fate; 4] = [Fate::Lost, Fate::Late, Fate::Doubled, Fate::First];
    steps.push(match dice.roll(16) {
        0..=2 => Step::Conflict(vm, 1 + dice.small(3)),
        3..=4 => Step::Fail(vm, dice.small(12), 1 + dice.small(2)),
        5..=8 => Step::Wake(dice.pick(&FATES)),
        9 => Step::Kill(vm),
        10..=11 => Step::Start(dice.small(vms)),
        12 => Step::Stall(vm),
        13..=14 => Step::Resume(dice.small(vms)),
        _ => Step::Wall(i64::try_from(dice.roll(20_000_000)).unwrap_or(0) - 10_000_000),
    });
}
