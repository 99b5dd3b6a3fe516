//! VMs as coroutines: one thread runs them all, each up to the call of its host that the schedule says.
//!
//! What must not live here: what a VM does, and what goes wrong besides its death.

use std::cell::{RefCell, RefMut};
use std::collections::VecDeque;
use std::rc::Rc;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult};
use interlock_core::{Duration, Time};

use crate::dice::Dice;
use crate::oracle::Kind;
use crate::port::{Go, Pause, Port};
use crate::schedule::VMS;
use crate::state::{State, Task, VmFacts};
use crate::words::Words;
use crate::world::Yard;

type Vm = Coroutine<Go, Pause, (), DefaultStack>;

/// How many host calls one drain may take: many more than any operation needs.
const ENDLESS: u32 = 2_000_000;

/// The VMs of one proxy.
pub struct Crew<'y> {
    state: Rc<RefCell<State>>,
    vms: [Option<Vm>; VMS],
    yard: &'y mut Yard,
}

impl<'y> Crew<'y> {
    /// Nobody yet.
    pub fn new(state: Rc<RefCell<State>>, yard: &'y mut Yard) -> Self {
        Crew { state, vms: [None, None, None, None], yard }
    }

    fn state(&self) -> RefMut<'_, State> {
        self.state.borrow_mut()
    }

    /// The names that schedules are about.
    pub fn words(&self) -> Rc<Words> {
        Rc::clone(&self.yard.words)
    }

    /// Starts a VM, if it does not live: it does `live` until it ends.
    pub fn start(&mut self, vm: usize, live: impl FnOnce(&Port<'_>) + 'static) {
        let mut state = self.state();
        let facts = &mut state.vms[vm];
        if facts.alive {
            return;
        }
        let life = facts.life + 1;
        facts.alive = true;
        facts.stalled = false;
        facts.life = life;
        // The first thing that a VM does is to tick.
        facts.tasks = VecDeque::from([Task::Tick]);
        state.counts.reloads += u64::from(life > 1);
        drop(state);
        let state = Rc::clone(&self.state);
        let stack = self.yard.stacks.pop().unwrap_or_default();
        self.vms[vm] = Some(Coroutine::with_stack(stack, move |yielder, _| live(&Port::new(yielder, state, vm))));
    }

    /// Ends a VM wherever it is; its stack is used again.
    fn stop(&mut self, vm: usize) {
        let Some(mut coroutine) = self.vms[vm].take() else { return };
        if !coroutine.done() {
            coroutine.force_unwind();
        }
        self.yard.stacks.push(coroutine.into_stack());
    }

    /// Ends a VM in the middle of whatever it does, with all that it has not told anybody.
    pub fn kill(&mut self, vm: usize) {
        let mut state = self.state();
        let facts = &mut state.vms[vm];
        if !facts.alive {
            return;
        }
        let (busy, life, op) = (facts.busy, facts.life, facts.op.take());
        *facts = VmFacts { life, ..Default::default() };
        let decides = op.filter(|op| matches!(op.kind, Kind::Acquire | Kind::Poll));
        if let Some(op) = decides
            && let Some(known) = state.leases.get_mut(&op.lease)
        {
            known.cut = Some(op.began);
        }
        // Events that it has not counted yet are gone with it; its waiters and grants stay until their time.
        state.events_lost |= busy;
        state.counts.deaths += 1;
        state.counts.mid_deaths += u64::from(busy);
        drop(state);
        self.stop(vm);
    }

    /// Lets a VM run for so many host calls, or until it has nothing to do.
    pub fn run(&mut self, vm: usize, calls: u32) {
        {
            let mut state = self.state();
            let facts = &state.vms[vm];
            if !facts.alive || facts.stalled || calls == 0 || (!facts.busy && facts.tasks.is_empty()) {
                return;
            }
            state.budget = calls;
        }
        let Some(coroutine) = &mut self.vms[vm] else { return };
        match coroutine.resume(Go::On) {
            CoroutineResult::Yield(Pause::Idle) | CoroutineResult::Return(()) => self.state().vms[vm].busy = false,
            CoroutineResult::Yield(Pause::Call) => {}
        }
        self.state().budget = 0;
    }

    fn busy(&self) -> Vec<usize> {
        let state = self.state();
        let runs = |vm: &usize| {
            let facts = &state.vms[*vm];
            facts.alive && !facts.stalled && (facts.busy || !facts.tasks.is_empty())
        };
        (0..VMS).filter(runs).collect()
    }

    /// Lets everybody finish what is begun, one after the other.
    pub fn drain(&mut self) {
        for _ in 0..1000 {
            let busy = self.busy();
            if busy.is_empty() || self.state().violation.is_some() {
                return;
            }
            for vm in busy {
                self.run(vm, ENDLESS);
            }
        }
        self.state().violated(|| String::from("the VMs keep each other busy without end"));
    }

    /// So many calls, each by whichever VM the dice say.
    pub fn race(&mut self, calls: u8, dice: &mut Dice) {
        for _ in 0..calls {
            let busy = self.busy();
            if busy.is_empty() || self.state().violation.is_some() {
                return;
            }
            self.run(dice.pick(&busy), 1);
        }
    }

    /// Time passes; whoever is due gets its tick.
    pub fn pass(&mut self, span: Duration) {
        let mut state = self.state();
        state.now = state.now + span;
        state.unix += u64::try_from(span.as_micros()).unwrap_or(0);
        let now = state.now;
        for facts in state.vms.iter_mut().filter(|facts| facts.alive) {
            if facts.due <= now && !facts.tasks.iter().any(|task| matches!(task, Task::Tick)) {
                facts.tasks.push_back(Task::Tick);
            }
        }
    }

    /// How long until the next VM is due.
    pub fn due(&self) -> Duration {
        let state = self.state();
        let due = state.vms.iter().filter(|facts| facts.alive).map(|facts| facts.due).min();
        due.unwrap_or(Time::NEVER).since(state.now)
    }

    /// Ends everybody.
    pub fn dismiss(&mut self) {
        for vm in 0..VMS {
            // An idle VM ends by itself, which is cheaper than being unwound.
            if !self.state().vms[vm].busy
                && let Some(coroutine) = &mut self.vms[vm]
                && coroutine.started()
                && !coroutine.done()
            {
                let _ = coroutine.resume(Go::End);
            }
            self.stop(vm);
        }
    }
}

impl Drop for Crew<'_> {
    fn drop(&mut self) {
        // Where the code under test panicked, the other VMs must not be unwound while this one is.
        self.vms.iter_mut().filter_map(Option::take).for_each(std::mem::forget);
    }
}
