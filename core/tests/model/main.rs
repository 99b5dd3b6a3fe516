//! Every state of the lock table that a few owners and locks can bring about, searched without exception.
//!
//! The state machine is the shipped table (see [`machine`]); what it must keep is said anew (see [`state`] and
//! [`after`]). Searched are four owners and three locks without time, and fewer with leases and waits that end.
//!
//! States that differ by the names of owners and locks only are one: nothing in the table depends on a name here. So
//! are, in the large searches, those that differ by where a holder stands among those who wait, and by marks that are
//! needed no more; the small ones keep them apart, and show of every state that what can follow is the same.
//!
//! Each step is atomic; what happens in the middle of one is the business of the scenarios with a hook in the store.
#![cfg(not(target_arch = "wasm32"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod after;
mod machine;
mod state;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use stateright::{Checker, Model, Property};

use after::Sight;
use machine::{Action, Machine};
use state::{LOCKS, MOST, State};

/// What is searched.
struct Search {
    name: &'static str,
    owners: usize,
    locks: usize,
    /// How many requests one owner, and all together, may have under way. It takes three to wait elsewhere while
    /// upgrading.
    each: usize,
    most: usize,
    /// Whether leases and waits can end.
    time: bool,
    /// Whether it matters where a holder stands among those who wait, and whether a wait is still marked when its owner
    /// waits nowhere else any more.
    places: bool,
}

/// A search, with what it needs for every state.
struct Space {
    search: Search,
    machine: Machine,
    renamings: Vec<Vec<usize>>,
    /// Sights that a state has been found for, so that the search for it can end.
    seen: AtomicU32,
}

impl Space {
    fn canonical(&self, state: State, places: bool) -> State {
        let state = if places { state } else { state.holders_first().forget_old_marks() };
        state.canonical(&self.renamings)
    }

    /// Everything that can follow, without regard to where holders stand.
    fn successors(&self, state: &State) -> HashSet<State> {
        let mut actions = Vec::new();
        self.actions(state, &mut actions);
        let next = |action| self.canonical(self.machine.step(state, action).0, false);
        actions.into_iter().map(next).collect()
    }

    /// Whether all the same can follow where the holders stand before everybody else and old marks are forgotten.
    fn is_blind_to_places(&self, state: &State) -> bool {
        let least = state.clone().holders_first().forget_old_marks();
        least == *state || self.successors(&least) == self.successors(state)
    }

    /// Whether some step from here shows it, and none did before.
    fn shows(&self, state: &State, sight: Sight) -> bool {
        let bit = 1 << sight as u32;
        if self.seen.load(Ordering::Relaxed) & bit != 0 {
            return false;
        }
        let mut actions = Vec::new();
        self.actions(state, &mut actions);
        let found = actions.into_iter().any(|action| self.machine.step(state, action).1.contains(&sight));
        if found {
            self.seen.fetch_or(bit, Ordering::Relaxed);
        }
        found
    }
}

fn permutations(of: usize) -> Vec<Vec<usize>> {
    if of == 0 {
        return vec![Vec::new()];
    }
    let insert = |shorter: &Vec<usize>, at: usize| {
        let mut longer = shorter.clone();
        longer.insert(at, of - 1);
        longer
    };
    permutations(of - 1).iter().flat_map(|shorter| (0..of).map(move |at| insert(shorter, at))).collect()
}

impl Model for Space {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::new(self.search.locks)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        // Where something went wrong the search does not go on.
        if state.fault.is_none() {
            self.machine.actions(state, self.search.each, self.search.most, actions);
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let (next, _) = self.machine.step(state, action);
        // Most looks of those who wait change nothing.
        Some(if next == *state { next } else { self.canonical(next, self.search.places) })
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("every step is the contract's", |_, state: &State| state.fault.is_none()),
            Property::always("no two conflicting holders", |_, state: &State| state.is_exclusive()),
            Property::always("nobody waits for itself", |_, state: &State| state.is_acyclic()),
            Property::always("nobody is forgotten", |_, state: &State| state.forgets_nobody()),
            Property::always("the index names every wait", |_, state: &State| state.lists_every_wait()),
            Property::always("every second wait is marked", |_, state: &State| state.marks_every_second_wait()),
            Property::sometimes("a deadlock is refused", |it: &Self, state| it.shows(state, Sight::Deadlock)),
            Property::sometimes("an upgrade goes ahead of waiters", |it: &Self, state| {
                it.shows(state, Sight::UpgradeOverWaiters)
            }),
            Property::sometimes("an upgrade of a sole holder closes a cycle", |it: &Self, state| {
                it.shows(state, Sight::UpgradeRefused)
            }),
            Property::sometimes("two readers follow a writer", |it: &Self, state| {
                it.shows(state, Sight::ReadersTogether)
            }),
            Property::sometimes("a re-entry while others wait", |it: &Self, state| it.shows(state, Sight::ReEntry)),
            Property::sometimes("a downgrade lets others in", |it: &Self, state| it.shows(state, Sight::Downgrade)),
            Property::sometimes("a waiter goes with its grant", |it: &Self, state| {
                it.shows(state, Sight::CancelledGrant)
            }),
        ];
        if self.search.places {
            let property = |it: &Self, state: &State| it.is_blind_to_places(state);
            properties.push(Property::always("a holder's place and an old mark mean nothing", property));
        }
        if self.search.time {
            properties.extend([
                Property::sometimes("a wait runs out", |it: &Self, state| it.shows(state, Sight::WaitTimeout)),
                Property::sometimes("a place is taken anew", |it: &Self, state| it.shows(state, Sight::QueuedAgain)),
                Property::sometimes("a sweep hands over", |it: &Self, state| it.shows(state, Sight::SweptOn)),
            ]);
        }
        properties
    }
}

/// Searches everything; the number of states, and what was found of each property, has to be as it was.
fn exhaust(search: Search, states: usize) {
    assert!(search.most <= MOST && search.locks <= LOCKS);
    let (name, start) = (search.name, Instant::now());
    let machine = Machine::new(search.owners, search.locks, search.time);
    let renamings = permutations(search.owners);
    let space = Space { search, machine, renamings, seen: AtomicU32::new(0) };
    let checker = space.checker().threads(2).spawn_bfs().join();
    let (unique, steps) = (checker.unique_state_count(), checker.state_count());
    println!("{name}: {unique} states, {steps} steps, in {:.1} s", start.elapsed().as_secs_f32());
    checker.assert_properties();
    assert_eq!(unique, states, "the rules have changed, or the model has");
}

#[test]
fn all_states_without_time() {
    let name = "4 owners, 3 locks, 6 requests";
    exhaust(Search { name, owners: 4, locks: 3, each: 2, most: 6, time: false, places: false }, 490_726);
}

#[test]
fn all_states_without_time_and_all_places() {
    let name = "4 owners, 3 locks, 5 requests, places";
    exhaust(Search { name, owners: 4, locks: 3, each: 3, most: 5, time: false, places: true }, 384_577);
}

#[test]
fn all_states_with_time() {
    let name = "3 owners, 2 locks, 4 requests, time";
    exhaust(Search { name, owners: 3, locks: 2, each: 2, most: 4, time: true, places: false }, 760_506);
}

#[test]
fn all_states_with_time_and_all_places() {
    let name = "3 owners, 2 locks, 3 requests, time, places";
    exhaust(Search { name, owners: 3, locks: 2, each: 2, most: 3, time: true, places: true }, 28_982);
}
