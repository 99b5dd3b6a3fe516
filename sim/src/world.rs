//! Runs one schedule: which VM runs when, what goes wrong, and how it all ends once the faults are over.
//!
//! What must not live here: how VMs alternate (`crew`), what VMs do (`driver`), and what must hold (`oracle`).

use std::cell::{RefCell, RefMut};
use std::marker::PhantomData;
use std::rc::Rc;

use corosensei::stack::DefaultStack;
use interlock_core::{Duration, Time};

use crate::backend::Backend;
use crate::crew::Crew;
use crate::dice::Dice;
use crate::driver::Driver;
use crate::report::Counts;
use crate::schedule::{Schedule, Step, VMS};
use crate::state::{Plant, State, Task, Violation};
use crate::trace::Trace;
use crate::words::Words;

/// How many rounds the end of a schedule may take until nothing is left.
const ROUNDS: usize = 400;

/// What many schedules share: stacks and names.
pub struct Yard {
    pub(crate) stacks: Vec<DefaultStack>,
    pub(crate) words: Rc<Words>,
}

impl Yard {
    /// A new one.
    pub fn new() -> Self {
        Yard { stacks: Vec::new(), words: Words::new() }
    }
}

impl Default for Yard {
    fn default() -> Self {
        Self::new()
    }
}

/// What came of a schedule.
#[derive(Clone, Debug)]
pub struct Played {
    /// What must not have happened, if something did.
    pub violation: Option<Violation>,
    /// What happened.
    pub counts: Counts,
    /// The trace.
    pub trace: Trace,
}

/// Plays a schedule over a backend.
///
/// # Panics
/// Where the code under test does: the caller has to catch that and call it a violation.
pub fn play<B: Backend + 'static>(schedule: &Schedule, yard: &mut Yard, with_lines: bool, plant: Plant) -> Played {
    let rules = yard.words.rules(schedule.rules);
    let state = State::new(rules, B::BUCKETS, Trace::new(with_lines), plant);
    let state = Rc::new(RefCell::new(state));
    let mut world: World<'_, B> = World {
        crew: Crew::new(Rc::clone(&state), yard),
        state,
        renews: (B::RENEWS && schedule.renews && schedule.vms > 1).then(|| usize::from(schedule.vms) - 1),
        backend: PhantomData,
    };
    (0..usize::from(schedule.vms)).for_each(|vm| world.start(vm));
    for step in &schedule.steps {
        world.step(step);
        if world.is_over() {
            break;
        }
    }
    world.calm(schedule.clings);
    world.end()
}

struct World<'y, B> {
    state: Rc<RefCell<State>>,
    crew: Crew<'y>,
    renews: Option<usize>,
    backend: PhantomData<B>,
}

impl<B: Backend + 'static> World<'_, B> {
    fn state(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    fn is_over(&self) -> bool {
        self.state().violation.is_some()
    }

    fn start(&mut self, vm: usize) {
        let rules = Rc::clone(&self.state().rules);
        let words = self.crew.words();
        self.state().vms[vm].renews = self.renews == Some(vm);
        self.crew.start(vm, move |port| Driver::<B>::new(rules, words).live(port));
    }

    fn give(&mut self, vm: u8, task: Task) {
        let facts = &mut self.state().vms[usize::from(vm)];
        if facts.alive {
            facts.tasks.push_back(task);
        }
    }

    fn step(&mut self, step: &Step) {
        {
            let mut state = self.state();
            state.counts.steps += 1;
            state.trace.line(|| format!("{step}"));
        }
        match step {
            Step::Ask(vm, ask) => self.give(*vm, Task::Ask(ask.clone())),
            Step::Upgrade(vm, nth) => self.give(*vm, Task::Upgrade(*nth)),
            Step::Release(vm, nth) => self.give(*vm, Task::Release(*nth)),
            Step::Cancel(vm, nth) => self.give(*vm, Task::Cancel(*nth)),
            Step::Check(vm, nth) => self.give(*vm, Task::Check(*nth)),
            Step::Glass(vm, lock) => {
                let lock = self.crew.words().lock(*lock);
                self.give(*vm, Task::Glass(lock));
            }
            Step::Tick(vm) => self.give(*vm, Task::Tick),
            Step::Mail(vm) => self.give(*vm, Task::Mail),
            Step::Run(vm, calls) => self.crew.run(usize::from(*vm), u32::from(*calls)),
            Step::Race(calls, dice) => self.crew.race(*calls, &mut Dice::new(u64::from(*dice))),
            Step::Drain => self.crew.drain(),
            Step::Pass(micros) => self.crew.pass(Duration::from_micros(u64::from(*micros))),
            Step::Kill(vm) => self.crew.kill(usize::from(*vm)),
            Step::Start(vm) => self.start(usize::from(*vm)),
            Step::Conflict(..) | Step::Fail(..) | Step::Wake(_) | Step::Stall(_) | Step::Resume(_) | Step::Wall(_) => {
                self.fault(step);
            }
        }
        let mut state = self.state();
        if state.is_quiet() {
            state.check_rest();
        }
    }

    fn fault(&mut self, step: &Step) {
        let mut state = self.state();
        let state = &mut *state;
        match step {
            Step::Conflict(vm, writes) => state.vms[usize::from(*vm)].conflicts = u32::from(*writes),
            Step::Fail(vm, sound, failing) => {
                let facts = &mut state.vms[usize::from(*vm)];
                (facts.sound, facts.failing) = (u32::from(*sound), u32::from(*failing));
            }
            Step::Wake(fate) => state.fates.push_back(*fate),
            Step::Stall(vm) => {
                let facts = &mut state.vms[usize::from(*vm)];
                state.counts.stalls += u64::from(facts.alive && !facts.stalled);
                facts.stalled |= facts.alive;
            }
            Step::Resume(vm) => resume(state, usize::from(*vm)),
            Step::Wall(micros) => {
                state.counts.clock_steps += 1;
                state.unix = state.unix.saturating_add_signed(*micros);
            }
            _ => {}
        }
    }

    /// The faults are over: everybody goes on, and after a while nothing is left.
    fn calm(&mut self, clings: bool) {
        if self.is_over() {
            return;
        }
        {
            let mut state = self.state();
            state.trace.line(|| String::from("the faults are over"));
            state.fates.clear();
            for vm in 0..VMS {
                resume(&mut state, vm);
                let facts = &mut state.vms[vm];
                (facts.sound, facts.failing, facts.conflicts) = (0, 0, 0);
            }
        }
        if self.state().vms.iter().all(|vm| !vm.alive || vm.renews) {
            self.start(0);
        }
        let began = self.state().now;
        self.tick_all();
        for round in 0..ROUNDS {
            self.crew.drain();
            if self.is_over() {
                return;
            }
            {
                let mut state = self.state();
                state.check_rest();
                state.check_progress(began);
                if state.is_empty() {
                    break;
                }
            }
            if (!clings || round > 20) && self.release_all() {
                continue;
            }
            self.pass_on();
        }
        self.state().check_nothing_left();
    }

    fn tick_all(&mut self) {
        for facts in self.state().vms.iter_mut().filter(|facts| facts.alive) {
            facts.tasks.push_back(Task::Tick);
        }
    }

    /// Gives all leases back. False if there were none.
    fn release_all(&mut self) -> bool {
        let mut any = false;
        for facts in self.state().vms.iter_mut().filter(|facts| facts.alive && !facts.leases.is_empty()) {
            facts.tasks.push_back(Task::ReleaseAll);
            any = true;
        }
        any
    }

    /// Lets time pass up to the next moment at which something is due; in long steps where only the dead are waited for.
    fn pass_on(&mut self) {
        let span = {
            let state = self.state();
            let alive = || state.vms.iter().filter(|facts| facts.alive);
            let active = alive().any(|facts| !facts.waiters.is_empty() || !facts.leases.is_empty());
            let due = alive().map(|facts| facts.due).min().unwrap_or(Time::NEVER);
            let end = Some(state.next_end()).filter(|end| *end > state.now);
            let next = if active { due } else { end.unwrap_or(state.now + Duration::from_millis(500)) };
            next.since(state.now).clamp(Duration::from_millis(1), Duration::from_secs(1))
        };
        self.crew.pass(span);
    }

    fn end(mut self) -> Played {
        self.crew.dismiss();
        let mut state = self.state();
        state.counts.schedules = 1;
        Played {
            violation: state.violation.take(),
            counts: std::mem::take(&mut state.counts),
            trace: std::mem::take(&mut state.trace),
        }
    }
}

fn resume(state: &mut State, vm: usize) {
    if state.vms[vm].alive && state.vms[vm].stalled {
        state.vms[vm].stalled = false;
        state.doubtful_at = state.now;
        let due = state.vms[vm].due <= state.now;
        if due && !state.vms[vm].tasks.iter().any(|task| matches!(task, Task::Tick)) {
            state.vms[vm].tasks.push_back(Task::Tick);
        }
    }
}
