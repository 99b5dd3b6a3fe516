//! Makes a schedule that fails short: drops steps, VMs and faults, and lowers numbers, as long as it goes on failing.

use interlock_core::Mode;

use crate::protocol::{Move, Plan};
use crate::run::Script;
use crate::schedule::{Ask, Schedule, Step};
use crate::state::{Plant, Violation};
use crate::world::Yard;

/// How many schedules are tried at the most.
const TRIES: usize = 20_000;

/// A shorter schedule that fails by the same rule, with what it violates. None if `script` does not fail.
pub fn shrink(script: &Script, plant: Plant) -> Option<(Script, Violation)> {
    let mut yard = Yard::new();
    let violation = script.play(&mut yard, false, plant).violation?;
    let mut shrinking = Shrinking { plant, yard, tries: 0, best: script.clone(), violation };
    loop {
        let before = shrinking.best.clone();
        shrinking.drop_steps();
        shrinking.simplify();
        if shrinking.best == before || shrinking.tries >= TRIES {
            return Some((shrinking.best, shrinking.violation));
        }
    }
}

struct Shrinking {
    plant: Plant,
    yard: Yard,
    tries: usize,
    best: Script,
    violation: Violation,
}

impl Shrinking {
    /// Takes a schedule for the best one if it fails too.
    fn accept(&mut self, tried: Script) -> bool {
        if self.tries >= TRIES || tried == self.best {
            return false;
        }
        self.tries += 1;
        let failed = tried.play(&mut self.yard, false, self.plant).violation;
        let Some(failed) = failed.filter(|failed| failed.rule == self.violation.rule) else { return false };
        (self.best, self.violation) = (tried, failed);
        true
    }

    /// Drops runs of steps, long ones first (after Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing
    /// Input", 2002).
    fn drop_steps(&mut self) {
        let mut span = self.best.len().div_ceil(2);
        while span > 0 {
            let mut from = 0;
            while from < self.best.len() {
                let tried = without(&self.best, from, span);
                if !self.accept(tried) {
                    from += span;
                }
            }
            span /= 2;
        }
    }

    fn simplify(&mut self) {
        for tried in plainer(&self.best) {
            self.accept(tried);
        }
        for at in 0..self.best.len() {
            while simpler(&self.best, at).into_iter().any(|tried| self.accept(tried)) {}
        }
    }
}

fn without(script: &Script, from: usize, span: usize) -> Script {
    let mut tried = script.clone();
    let to = tried.len().min(from + span);
    match &mut tried {
        Script::Table(schedule, _) => drop(schedule.steps.drain(from..to)),
        Script::Protocol(plan) => drop(plan.moves.drain(from..to)),
    }
    tried
}

/// The same with fewer VMs, and with plainer settings.
fn plainer(script: &Script) -> Vec<Script> {
    match script {
        Script::Table(schedule, encoded) => {
            let fewer = (1..schedule.vms).map(|vms| Schedule { vms, ..schedule.clone() });
            let plain = [
                Schedule { renews: false, ..schedule.clone() },
                Schedule { clings: false, ..schedule.clone() },
                Schedule { rules: 0, ..schedule.clone() },
            ];
            fewer.chain(plain).map(|schedule| Script::Table(schedule, *encoded)).collect()
        }
        Script::Protocol(plan) => vec![Script::Protocol(Plan { vms: 1, ..plan.clone() })],
    }
}

/// The same with something simpler in place of one step.
fn simpler(script: &Script, at: usize) -> Vec<Script> {
    match script {
        Script::Table(schedule, encoded) => {
            let steps = schedule.steps.get(at).map(simpler_steps).unwrap_or_default();
            let with = |step: Step| {
                let mut schedule = schedule.clone();
                schedule.steps[at] = step;
                Script::Table(schedule, *encoded)
            };
            steps.into_iter().map(with).collect()
        }
        Script::Protocol(plan) => {
            let moves = plan.moves.get(at).map(simpler_moves).unwrap_or_default();
            let with = |step: Move| {
                let mut plan = plan.clone();
                plan.moves[at] = step;
                Script::Protocol(plan)
            };
            moves.into_iter().map(with).collect()
        }
    }
}

fn simpler_steps(step: &Step) -> Vec<Step> {
    match step {
        Step::Ask(vm, ask) => simpler_asks(ask).into_iter().map(|ask| Step::Ask(*vm, ask)).collect(),
        Step::Run(vm, calls) if *calls > 1 => vec![Step::Run(*vm, calls / 2), Step::Run(*vm, calls - 1)],
        Step::Race(calls, dice) => {
            let runs = (0..4).flat_map(|vm| [1, 2, 4, 8].map(|calls| Step::Run(vm, calls)));
            let mut simpler: Vec<Step> = [Step::Drain].into_iter().chain(runs).collect();
            if *calls > 1 {
                simpler.extend([Step::Race(calls / 2, *dice), Step::Race(calls - 1, *dice)]);
            }
            simpler
        }
        Step::Conflict(vm, writes) if *writes > 1 => vec![Step::Conflict(*vm, writes - 1)],
        Step::Fail(vm, sound, failing) => {
            let fewer = (*failing > 1).then(|| Step::Fail(*vm, *sound, failing - 1));
            let sooner = (*sound > 0).then(|| Step::Fail(*vm, sound - 1, *failing));
            fewer.into_iter().chain(sooner).collect()
        }
        Step::Pass(micros) => rounder(*micros).into_iter().map(Step::Pass).collect(),
        Step::Release(vm, nth) if *nth > 0 => vec![Step::Release(*vm, 0)],
        Step::Cancel(vm, nth) if *nth > 0 => vec![Step::Cancel(*vm, 0)],
        _ => Vec::new(),
    }
}

fn simpler_asks(ask: &Ask) -> Vec<Ask> {
    let mut asks = Vec::new();
    for at in 0..ask.locks.len() {
        if ask.locks.len() > 1 {
            let mut fewer = ask.clone();
            fewer.locks.remove(at);
            asks.push(fewer);
        }
        let mut plain = ask.clone();
        plain.locks[at].1 = Mode::Exclusive;
        asks.push(plain);
    }
    asks.push(Ask { hold: 60_000, ..ask.clone() });
    asks.push(Ask { wait: 5000, ..ask.clone() });
    asks.push(Ask { reentrant: true, ..ask.clone() });
    asks.retain(|other| other != ask);
    asks
}

fn simpler_moves(step: &Move) -> Vec<Move> {
    match step {
        Move::Ask(proxy, owner, locks, wait, ttl, hold) => {
            let plain = locks.first().map(|(lock, _)| vec![(*lock, Mode::Exclusive)]).unwrap_or_default();
            let fewer = Move::Ask(*proxy, *owner, plain, *wait, *ttl, *hold);
            let longer = Move::Ask(*proxy, *owner, locks.clone(), *wait, *ttl, 60_000);
            [fewer, longer].into_iter().filter(|other| other != step).collect()
        }
        Move::Flow(count) if *count > 1 => vec![Move::Flow(1), Move::Flow(count / 2), Move::Flow(count - 1)],
        Move::Run(vm, calls) if *calls > 1 => vec![Move::Run(*vm, calls / 2), Move::Run(*vm, calls - 1)],
        Move::Race(calls, dice) => {
            let mut simpler = vec![Move::Drain];
            if *calls > 1 {
                simpler.extend([Move::Race(calls / 2, *dice), Move::Race(calls - 1, *dice)]);
            }
            simpler
        }
        Move::Pass(micros) => rounder(*micros).into_iter().map(Move::Pass).collect(),
        Move::Restart(millis) if *millis > 0 => vec![Move::Restart(0)],
        Move::Deliver(nth) if *nth > 0 => vec![Move::Deliver(0)],
        _ => Vec::new(),
    }
}

/// Shorter or rounder spans, in microseconds.
fn rounder(micros: u32) -> Vec<u32> {
    if micros <= 1000 {
        return Vec::new();
    }
    let round = micros / 100_000 * 100_000;
    let mut spans = vec![micros / 2];
    if round != micros && round > 0 {
        spans.push(round);
    }
    spans
}
