//! Every state that the lease protocol can come to between an authority and two proxies, searched without exception.
//!
//! Both sides are the shipped state machines. Between them is a network that delivers in any order, loses, doubles and
//! delays; the authority may restart without its memory, and its wall clock may step. How much of that may happen is part
//! of each search (see [`world::Faults`]); within it everything does.
//!
//! Time passes in ticks, of which a lease lives three; in between, every timer fires at its own moment. States that differ by
//! when they are only count as one (see [`canon`]), so that the searches end by themselves.
#![cfg(not(target_arch = "wasm32"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod authority;
mod canon;
mod step;
mod watch;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use interlock_core::Mode::{Exclusive, Shared};
use stateright::{Checker, HasDiscoveries, Model, Property};

use step::Action;
use watch::Sight;
use world::{Faults, Laws, PROXIES, Script, Terms, World};

/// What is searched.
#[derive(Clone)]
struct Search {
    name: &'static str,
    scripts: [&'static [Script]; PROXIES],
    faults: Faults,
    /// How many messages may be under way when time passes.
    most: usize,
    terms: Terms,
    /// What must be seen.
    shows: &'static [Sight],
}

/// A search, and what was seen in it.
struct Space {
    search: Search,
    laws: Laws,
    seen: [AtomicU64; Sight::ALL.len()],
}

impl Space {
    fn new(search: Search) -> Self {
        let laws = Laws::new(search.scripts, search.terms);
        Space { search, laws, seen: std::array::from_fn(|_| AtomicU64::new(0)) }
    }

    fn saw(&self, sight: Sight) -> bool {
        self.seen[sight as usize].load(Ordering::Relaxed) > 0
    }
}

impl Model for Space {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![step::start(&self.laws, self.search.faults)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        // Where something went wrong the search does not go on.
        if world.memory.fault.is_none() {
            world.actions(&self.laws, self.search.most, actions);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut sights = Vec::new();
        let next = world.step(&self.laws, action, &mut sights);
        for sight in sights {
            self.seen[sight as usize].fetch_add(1, Ordering::Relaxed);
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("every step is the contract's", |_: &Self, world: &World| world.memory.fault.is_none()),
            Property::always("no two rely on leases that conflict", |it: &Self, world: &World| {
                world.beliefs_agree(&it.laws)
            }),
            Property::always("what is relied on is held", |it: &Self, world: &World| world.beliefs_are_true(&it.laws)),
            Property::always("no two hold what conflicts", |_: &Self, world: &World| world.is_exclusive()),
            Property::always("every caller is told in time", |_: &Self, world: &World| world.tells_in_time()),
            Property::always("a proxy comes to rest", |_: &Self, world: &World| world.comes_to_rest()),
            Property::always("whoever waits is seen to", |_: &Self, world: &World| world.waiters_are_driven()),
            Property::always("whoever holds is known", |it: &Self, world: &World| world.holders_are_known(&it.laws)),
            Property::always("in the end nothing is left", |it: &Self, world: &World| world.ends_empty(&it.laws)),
        ];
        let shown = Sight::ALL.iter().filter(|(sight, _, _)| self.search.shows.contains(sight));
        properties.extend(shown.map(|(_, about, saw)| Property::sometimes(about, *saw)));
        properties
    }
}

/// Searches everything; the number of states has to be as it was.
fn exhaust(search: Search, states: usize) {
    let (name, start) = (search.name, Instant::now());
    let again = search.clone();
    // In depth: what has yet to be looked at then takes little memory.
    let checker = Space::new(search).checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_dfs().join();
    let (unique, steps) = (checker.unique_state_count(), checker.state_count());
    println!("{name}: {unique} states, {steps} steps, in {:.1} s", start.elapsed().as_secs_f32());
    for (sight, about, _) in Sight::ALL {
        println!("    {about}: {}", checker.model().seen[*sight as usize].load(Ordering::Relaxed));
    }
    if checker.discoveries().keys().any(|name| !is_sight(name)) {
        explain(again);
    }
    checker.assert_properties();
    assert_eq!(unique, states, "the rules have changed, or the model has");
}

fn is_sight(property: &str) -> bool {
    Sight::ALL.iter().any(|(_, about, _)| *about == property)
}

/// Searches anew, the short ways first, and shows how to come to what may not be.
fn explain(search: Search) {
    let name = search.name;
    let checker = Space::new(search).checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    println!("{name}: found after {} states", checker.unique_state_count());
    let found = checker.discoveries().into_iter().find(|(name, _)| !is_sight(name));
    let (property, path) = found.expect("what was found before");
    let world = path.last_state().clone();
    for (at, action) in path.into_actions().iter().enumerate() {
        println!("{:3} {action:?}", at + 1);
    }
    panic!("{name}: not so: {property}: {:?}\n{world:#?}", world.memory.fault);
}

const WRITES: Script = &[(0, Exclusive)];
const READS: Script = &[(0, Shared)];
const WRITES_OTHER: Script = &[(1, Exclusive)];

/// One lock that two want; leases that are renewed once or twice; callers that wait for an answer before they go.
const TERMS: Terms = Terms { ttl: 3, hold: 4, wait: 2, timeout: 0, impatient: false };
const NONE: Faults = Faults { lost: 0, doubled: 0, late: 0, crashes: 0, steps: 0, deaths: 0 };

#[test]
fn a_loss_and_a_restart() {
    let search = Search {
        name: "a loss and a restart, and callers that go",
        scripts: [&[WRITES], &[WRITES]],
        faults: Faults { lost: 1, crashes: 1, ..NONE },
        most: 3,
        terms: Terms { impatient: true, ..TERMS },
        shows: &[
            Sight::HandOver,
            Sight::GrantedLater,
            Sight::WaitTimeout,
            Sight::Unavailable,
            Sight::Overtaken,
            Sight::Left,
            Sight::Watched,
            Sight::FoundAgain,
            Sight::AskedAnew,
            Sight::ReleasedAgain,
            Sight::Saved,
            Sight::StaleBack,
            Sight::StaleEvicted,
            Sight::Expired,
            Sight::LostByOwnClock,
            Sight::HoldLimit,
        ],
    };
    exhaust(search, 842_478);
}

#[test]
fn readers_a_loss_and_a_restart() {
    let search = Search {
        name: "a reader and a writer, a loss and a restart",
        scripts: [&[READS], &[WRITES]],
        faults: Faults { lost: 1, crashes: 1, ..NONE },
        most: 3,
        terms: TERMS,
        shows: &[Sight::HandOver, Sight::Saved, Sight::StaleEvicted, Sight::LostByOwnClock],
    };
    exhaust(search, 272_723);
}

#[test]
fn a_double_and_delay() {
    let search = Search {
        name: "a message that comes twice, and late ones",
        scripts: [&[WRITES], &[WRITES]],
        faults: Faults { doubled: 1, late: 1, ..NONE },
        most: 3,
        terms: TERMS,
        shows: &[Sight::HandOver, Sight::Overtaken, Sight::Watched, Sight::FoundAgain, Sight::Expired, Sight::Left],
    };
    exhaust(search, 249_673);
}

#[test]
fn delay_and_a_restart() {
    let search = Search {
        name: "late messages and a restart",
        scripts: [&[WRITES], &[WRITES]],
        faults: Faults { late: 1, crashes: 1, ..NONE },
        most: 3,
        terms: TERMS,
        shows: &[Sight::StaleLoses, Sight::StaleEvicted, Sight::StaleBack, Sight::Saved],
    };
    exhaust(search, 318_424);
}

#[test]
fn answers_that_come_late() {
    let search = Search {
        name: "late messages that are waited for",
        scripts: [&[WRITES], &[WRITES]],
        faults: Faults { late: 2, ..NONE },
        most: 2,
        terms: Terms { hold: 5, timeout: 1, ..TERMS },
        shows: &[Sight::HandOver, Sight::Expired, Sight::LostByOwnClock, Sight::LostBeforeTold],
    };
    exhaust(search, 42_387);
}

#[test]
fn a_step_of_the_clock_and_a_restart() {
    let search = Search {
        name: "a step of the clock and a restart, and callers that go",
        scripts: [&[WRITES], &[WRITES]],
        faults: Faults { crashes: 1, steps: 1, ..NONE },
        most: 3,
        terms: Terms { hold: 5, impatient: true, ..TERMS },
        shows: &[Sight::FenceAheadOfClock, Sight::Saved, Sight::Lost, Sight::Expired],
    };
    exhaust(search, 370_969);
}

#[test]
fn deaths_of_both_sides() {
    let search = Search {
        name: "a restart of either side, and callers that go",
        scripts: [&[WRITES], &[WRITES]],
        faults: Faults { crashes: 1, deaths: 1, ..NONE },
        most: 3,
        terms: Terms { hold: 5, impatient: true, ..TERMS },
        shows: &[Sight::Expired, Sight::Left, Sight::Saved, Sight::StaleEvicted],
    };
    exhaust(search, 176_022);
}

#[test]
fn two_locks() {
    let search = Search {
        name: "two locks in two orders",
        scripts: [&[WRITES, WRITES_OTHER], &[WRITES_OTHER, WRITES]],
        faults: NONE,
        most: 2,
        terms: Terms { hold: 3, ..TERMS },
        shows: &[Sight::Deadlock, Sight::HandOver, Sight::Expired, Sight::WaitTimeout],
    };
    exhaust(search, 509_366);
}

/// All faults in one run: ten million states and more, which `INTERLOCK_SEARCH=whole` asks for. Without that nothing is late,
/// and the clock does not step.
#[test]
fn everything_at_once() {
    let whole = std::env::var("INTERLOCK_SEARCH").is_ok_and(|search| search == "whole");
    let faults = Faults { lost: 1, doubled: 1, crashes: 1, ..NONE };
    let most: Faults = Faults { late: 1, steps: 1, ..faults };
    let seen: &[Sight] = &[
        Sight::HandOver,
        Sight::Unavailable,
        Sight::Overtaken,
        Sight::Left,
        Sight::Watched,
        Sight::FoundAgain,
        Sight::ReleasedAgain,
        Sight::Saved,
        Sight::StaleBack,
        Sight::StaleEvicted,
        Sight::Expired,
        Sight::LostByOwnClock,
        Sight::HoldLimit,
    ];
    let search = Search {
        name: if whole { "everything at once" } else { "a loss, a double and a restart" },
        scripts: [&[WRITES], &[WRITES]],
        faults: if whole { most } else { faults },
        most: 2,
        terms: Terms { wait: 1, ..TERMS },
        shows: seen,
    };
    exhaust(search, if whole { 14_064_656 } else { 417_587 });
}
