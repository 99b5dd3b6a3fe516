//! Deadlocks that nobody was told of: the wait-for graph as callers and upstream see it, looked at again and again.
//!
//! An edge leads from an owner whose request has not come to the upstream, though sent some time ago, to one that has been
//! inside with a conflicting lock for as long. Such a request cannot have been granted meanwhile; so where edges close a
//! cycle, one of it must have been refused long since. Only certain edges count: queue edges are not seen from here, and of
//! a request for several locks nobody knows which one it waits for.
//!
//! Pure.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;

use super::ledger::Mode;

/// A request for one lock that waits, or a lock that is held.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    pub owner: u128,
    pub lock: &'a str,
    pub mode: Mode,
}

/// Who stands in whose way, both ways of conflict counted by mode.
pub fn edges(waiters: &[Place<'_>], holders: &[Place<'_>]) -> HashMap<u128, Vec<u128>> {
    let mut edges: HashMap<u128, Vec<u128>> = HashMap::new();
    for waiter in waiters {
        let in_the_way = |holder: &&Place<'_>| {
            holder.lock == waiter.lock && holder.owner != waiter.owner && !holder.mode.compatible(waiter.mode)
        };
        edges.entry(waiter.owner).or_default().extend(holders.iter().filter(in_the_way).map(|holder| holder.owner));
    }
    edges
}

/// Some cycle, if there is one: each waits for the next, the last for the first.
pub fn cycle<N: Copy + Eq + Hash>(edges: &HashMap<N, Vec<N>>) -> Option<Vec<N>> {
    let mut clear = HashSet::new();
    edges.keys().find_map(|start| from(*start, edges, &mut Vec::new(), &mut clear))
}

/// Depth first: `path` leads here, and nothing in `clear` leads into a cycle.
fn from<N: Copy + Eq + Hash>(
    node: N,
    edges: &HashMap<N, Vec<N>>,
    path: &mut Vec<N>,
    clear: &mut HashSet<N>,
) -> Option<Vec<N>> {
    if let Some(at) = path.iter().position(|earlier| *earlier == node) {
        return Some(path.split_off(at));
    }
    if clear.contains(&node) {
        return None;
    }
    path.push(node);
    for next in edges.get(&node).into_iter().flatten() {
        if let Some(cycle) = from(*next, edges, path, clear) {
            return Some(cycle);
        }
    }
    path.pop();
    clear.insert(node);
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_cycle_and_only_a_cycle() {
        let graph = |edges: &[(u8, &[u8])]| edges.iter().map(|(from, to)| (*from, to.to_vec())).collect();
        assert_eq!(cycle(&graph(&[(1, &[2, 3]), (2, &[3]), (3, &[4])])), None);
        let found = cycle(&graph(&[(1, &[2]), (2, &[5, 3]), (3, &[2])])).unwrap();
        assert_eq!(found.iter().collect::<HashSet<_>>(), HashSet::from([&2, &3]));
    }

    #[test]
    fn two_that_would_write_what_both_read_are_stuck() {
        let place = |owner, mode| Place { owner, lock: "a", mode };
        let readers = [place(1, Mode::Shared), place(2, Mode::Shared)];
        assert!(cycle(&edges(&[place(1, Mode::Exclusive), place(2, Mode::Exclusive)], &readers)).is_some());
        assert!(cycle(&edges(&[place(1, Mode::Exclusive), place(2, Mode::Shared)], &readers)).is_none());
    }
}
