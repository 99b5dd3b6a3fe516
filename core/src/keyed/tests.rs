//! What lines mean, and a crowd of workers at one lock in every order that a seed gives.

use super::*;
use Mode::{Exclusive, IntentExclusive, IntentShared, Shared};
#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const MOMENT: Moment = Moment { now: Time::from_micros(1_000_000_000), unix_micros: 1_700_000_000_000_000 };

fn lock(name: &str) -> LockName {
    LockName::parse(name).unwrap()
}

fn owner(name: &str) -> OwnerId {
    OwnerId::new(name).unwrap()
}

fn key(lease: u128, of: &str, mode: Mode, stand: Stand, created: u64, written: u64) -> Key {
    let since = MOMENT.unix_micros - 5_000_000;
    let asked_by = String::from("test");
    Key { lease: LeaseId(lease), owner: owner(of), mode, reentrant: true, asked_by, since, stand, created, written }
}

fn waits(lease: u128, of: &str, mode: Mode, created: u64) -> Key {
    key(lease, of, mode, Stand::Waits, created, created)
}

fn holds(lease: u128, of: &str, mode: Mode, created: u64, written: u64) -> Key {
    key(lease, of, mode, Stand::Holds(None), created, written)
}

fn grant(fence: Option<u64>, leans_on: &[u128], overtakes: bool) -> Turn {
    let leans_on = leans_on.iter().map(|lease| LeaseId(*lease)).collect();
    Turn::Grant { fence: fence.map(Fence), leans_on, overtakes }
}

#[test]
fn a_line_stands_in_the_order_of_its_keys_with_upgrades_first() {
    let keys = [
        waits(4, "d", Exclusive, 9),
        waits(3, "c", Shared, 7),
        key(5, "a", Exclusive, Stand::Upgrades, 11, 12),
        holds(1, "a", Shared, 2, 8),
        holds(2, "b", Shared, 5, 6),
    ];
    let line = line(&lock("l"), &keys, MOMENT);
    assert_eq!(line.entries().iter().map(|entry| entry.lease.0).collect::<Vec<_>>(), [2, 1, 5, 3, 4]);
    let told = holders(&line, LeaseId(2), MOMENT.now);
    assert_eq!((told.len(), told[0].fence, told[0].held_for), (1, Fence(8), Duration::from_secs(5)));
}

#[test]
fn turns_are_those_of_the_queue() {
    let at = |keys: &[Key], me: &Key| stand(&line(&lock("l"), keys, MOMENT), me, 1, MOMENT);
    let (r1, w, r2) = (waits(1, "r1", Shared, 1), waits(2, "w", Exclusive, 2), waits(3, "r2", Shared, 3));
    let keys = [r1.clone(), w.clone(), r2.clone()];
    assert_eq!((at(&keys, &r1), at(&keys, &w), at(&keys, &r2)), (grant(None, &[], false), Turn::Wait, Turn::Wait));
    // The reader before the writer holds, and goes.
    let keys = [holds(1, "r1", Shared, 1, 4), w.clone(), r2.clone()];
    assert_eq!((at(&keys, &w), at(&keys, &r2)), (Turn::Wait, Turn::Wait));
    let keys = [w.clone(), r2.clone()];
    assert_eq!((at(&keys, &w), at(&keys, &r2)), (grant(None, &[], false), Turn::Wait));
    let keys = [r2.clone(), waits(4, "r3", Shared, 5)];
    let line = line(&lock("l"), &keys, MOMENT);
    assert_eq!(turns(&line, 1, MOMENT), [(LeaseId(3), None), (LeaseId(4), None)], "neighbours go together");
    // One that is not there has no turn.
    assert_eq!(stand(&line, &w, 1, MOMENT), Turn::Wait);
}

#[test]
fn who_comes_re_enters_upgrades_or_waits() {
    let at = |keys: &[Key], me: &Key| arrive(&line(&lock("l"), keys, MOMENT), me, 1, MOMENT);
    let held = holds(1, "a", Exclusive, 1, 3);
    let waiting = waits(2, "b", Exclusive, 2);
    let keys = [held.clone(), waiting.clone()];
    assert_eq!(at(&keys, &waits(5, "a", Shared, 6)), grant(Some(3), &[1], false), "re-entry keeps the fence");
    assert_eq!(at(&keys, &waits(5, "c", Shared, 6)), Turn::Wait);
    let forbidden = Key { reentrant: false, ..waits(5, "a", Exclusive, 6) };
    assert_eq!(at(&keys, &forbidden), Turn::Wait);
    // The sole holder upgrades at once, over who waits; among other holders it waits for them.
    let shared = holds(1, "a", Shared, 1, 3);
    let wish = waits(5, "a", Exclusive, 6);
    assert_eq!(at(std::slice::from_ref(&shared), &wish), grant(None, &[1], true));
    assert_eq!(at(&[shared.clone(), waiting.clone()], &wish), grant(None, &[1], true));
    let other = holds(3, "c", Shared, 4, 4);
    let upgrade = Turn::Upgrade { leans_on: vec![LeaseId(1)] };
    assert_eq!(at(&[shared.clone(), other.clone(), waiting.clone()], &wish), upgrade);
    // It may stand there already, and does not stand in its own way.
    assert_eq!(at(&[shared.clone(), other.clone(), waiting, wish.clone()], &wish), upgrade);
    // Once told, it is its turn before those who were there first.
    let told = key(5, "a", Exclusive, Stand::Upgrades, 6, 7);
    let keys = [shared, waits(2, "b", Exclusive, 2), told.clone()];
    assert_eq!(stand(&line(&lock("l"), &keys, MOMENT), &told, 1, MOMENT), grant(None, &[], false));
    assert_eq!(upgrade.leans_on(), [LeaseId(1)]);
    assert!(Turn::Wait.leans_on().is_empty());
}

#[test]
fn permits_are_taken_in_turn() {
    let keys = [holds(1, "a", Exclusive, 1, 1), waits(2, "a", Exclusive, 2), waits(3, "b", Exclusive, 3)];
    let line = line(&lock("l"), &keys, MOMENT);
    assert_eq!(turns(&line, 2, MOMENT), [(LeaseId(2), None)]);
    assert_eq!(arrive(&line, &waits(4, "a", Exclusive, 4), 2, MOMENT), Turn::Wait);
    assert_eq!(turns(&line, 3, MOMENT), [(LeaseId(2), None), (LeaseId(3), None)]);
}

#[test]
fn the_order_and_the_limit_are_those_of_the_table() {
    let mut classes = Classes::default();
    for (class, rank) in [("a", 1), ("b", 2)] {
        let ranked = crate::Class { rank: Some(crate::Rank(rank)), ..crate::Class::default() };
        classes.insert(class.into(), ranked);
    }
    let second = Duration::from_secs(1);
    let request = |name: &str| {
        let want = Want { name: lock(name), mode: Exclusive, wait: second, ttl: second, hold: second };
        Request::new(LeaseId(9), owner("o"), MOMENT.now, vec![want], &classes)
    };
    let other = |lease, locks: &[&str], held, waits| Listed {
        lease: LeaseId(lease),
        locks: locks.iter().map(|name| lock(name)).collect(),
        held,
        waits,
    };
    let others = [other(1, &["a/1", "b/1"], 1, true), other(9, &["b/9"], 1, false)];
    assert_eq!(others[0].waits_for(), Some(&lock("b/1")));
    assert_eq!(objection(&request("a/2"), &others, &classes, None), None, "it only waits for b, and 9 is itself");
    let others = [other(1, &["a/1", "b/1"], 2, false)];
    assert_eq!(others[0].waits_for(), None);
    let (want, cause) = objection(&request("a/2"), &others, &classes, None).unwrap();
    assert_eq!((want.unwrap().name, cause), (lock("a/2"), Cause::OrderViolation { held: lock("b/1") }));
    assert_eq!(objection(&request("a/1"), &others, &classes, None), None, "re-entry aside");
    let limited = objection(&request("b/7"), &others, &classes, Some(2)).unwrap();
    assert_eq!(limited, (None, Cause::Limit { limit: Limit::LocksPerOwner, value: 2 }));
    assert_eq!(objection(&request("b/1"), &others, &classes, Some(2)), None);
}

/// A ring of owners, each holding a lock and waiting for the next one's, told to a search as it asks.
fn ring(length: u128, closed: bool, last: u128) -> (Need, usize) {
    let name = |n: u128| lock(&format!("l/{}", n % length));
    let of = |n: u128| format!("{n}");
    let keys = |n: u128| {
        let before = (n + length - 1) % length;
        let mut keys = vec![holds(n, &of(n), Exclusive, 1, 1)];
        if n != 0 || closed {
            keys.push(waits(before, &of(before), Exclusive, if before == last { 9 } else { 2 }));
        }
        keys
    };
    let mut chase = Chase::new(owner("0"), Some(LeaseId(0)));
    let mut rounds = 0;
    loop {
        match chase.step() {
            Need::Read { owners, locks } => {
                rounds += 1;
                for owner in owners {
                    let n: u128 = owner.as_str().parse().unwrap();
                    chase.waits(owner, if n + 1 < length || closed { vec![name(n + 1)] } else { Vec::new() });
                }
                for lock in locks {
                    let number = lock.as_str().strip_prefix("l/").unwrap();
                    let keys = keys(number.parse().unwrap());
                    chase.line(line(&lock, &keys, MOMENT), &keys, 1);
                }
            }
            end => return (end, rounds),
        }
    }
}

#[test]
fn a_search_asks_for_what_it_needs_and_reads_a_cycle_twice() {
    assert_eq!(ring(3, false, 0), (Need::Clear, 5));
    let (Need::Cycle(cycle), rounds) = ring(3, true, 0) else { panic!() };
    assert_eq!(cycle.len(), 3);
    assert_eq!((cycle[0].owner.as_str(), cycle[2].held_by.as_str()), ("0", "0"));
    assert_eq!(rounds, 7, "the last of them is the second look");
    // One that was closed by another is that one's to be refused for.
    assert_eq!(ring(3, true, 1), (Need::Clear, 7));
}

#[test]
fn a_cycle_that_is_gone_at_the_second_look_is_none() {
    let mut chase = Chase::new(owner("a"), None);
    let mut looks = 0;
    let end = loop {
        match chase.step() {
            Need::Read { owners, locks } => {
                for owner in owners {
                    let waits = if owner.as_str() == "a" { "x" } else { "y" };
                    chase.waits(owner, vec![lock(waits)]);
                }
                for name in locks {
                    looks += usize::from(name == lock("y"));
                    let keys = match (name.as_str(), looks) {
                        ("x", _) => vec![holds(2, "b", Exclusive, 1, 1), waits(1, "a", Exclusive, 3)],
                        // The first look shows an edge back, the later ones do not.
                        (_, 1) => vec![holds(3, "a", Exclusive, 2, 2), waits(4, "b", Exclusive, 4)],
                        _ => vec![holds(4, "b", Exclusive, 4, 5)],
                    };
                    chase.line(line(&name, &keys, MOMENT), &keys, 1);
                }
            }
            end => break end,
        }
    };
    assert_eq!(end, Need::Clear);
    assert_eq!(looks, 3, "found, looked at again, searched again");
}

/// One lock in a store of keys, and workers that see it late: each has read the line at some revision, and acts on it later.
struct Store {
    revision: u64,
    keys: Vec<Key>,
    /// When somebody last overtook.
    overtaken: u64,
}

impl Store {
    fn holders(&self) -> Vec<&Key> {
        self.keys.iter().filter(|key| key.fence().is_some()).collect()
    }

    fn check(&self, permits: u32) {
        let holders = self.holders();
        for (n, one) in holders.iter().enumerate() {
            for other in holders.iter().skip(n + 1) {
                let fine = permits > 1 || one.owner == other.owner || one.mode.compatible(other.mode);
                assert!(fine, "{one:?} beside {other:?}");
            }
        }
        assert!(permits == 1 || holders.len() <= permits as usize);
    }
}

/// What every worker does, in an order that the numbers give: read late, conclude, write if what the conclusion leans on is
/// still so. No two holders that conflict, fences that only rise, and everybody's turn comes.
fn crowd(seed: u64, permits: u32) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut dice = |sides: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % sides
    };
    let name = lock("l");
    let mut store = Store { revision: 1, keys: Vec::new(), overtaken: 0 };
    let mut views: Vec<(LeaseId, u64, Vec<Key>, bool)> = Vec::new();
    let (mut come, mut highest) = (0, Fence(0));
    let mut left = 24;
    for turn in 0.. {
        assert!(turn < 20_000, "somebody's turn never comes: {:?}", store.keys);
        if left == 0 && store.keys.is_empty() {
            return;
        }
        match dice(4) {
            // Somebody comes: its key is written and the line read in one step.
            0 if left > 0 => {
                left -= 1;
                come += 1;
                store.revision += 1;
                let mode = [Exclusive, Shared, Shared, IntentShared, IntentExclusive][dice(5) as usize];
                let mode = if permits > 1 { Exclusive } else { mode };
                let of = ["a", "b", "c", "d", "e", "f"][dice(6) as usize];
                let key = Key { reentrant: dice(8) > 0, ..waits(come, of, mode, store.revision) };
                store.keys.push(key);
                views.push((LeaseId(come), store.revision, store.keys.clone(), true));
            }
            // Somebody who waits is told of a later line.
            1 if !views.is_empty() => {
                let at = dice(views.len() as u64) as usize;
                (views[at].1, views[at].2) = (store.revision, store.keys.clone());
            }
            // Somebody concludes from what it has read, however old that is.
            2 if !views.is_empty() => {
                let at = dice(views.len() as u64) as usize;
                let (lease, read, seen, fresh) = views[at].clone();
                let Some(me) = seen.iter().find(|key| key.lease == lease) else { continue };
                let queue = line(&name, &seen, MOMENT);
                let arrived = fresh && me.stand == Stand::Waits;
                let turn = match arrived {
                    true => arrive(&queue, me, permits, MOMENT),
                    false => stand(&queue, me, permits, MOMENT),
                };
                let there = |lease: &LeaseId| store.keys.iter().any(|key| key.lease == *lease);
                let overtakes = matches!(turn, Turn::Grant { overtakes: true, .. });
                let late = overtakes && store.keys.iter().any(|key| key.written > read);
                if late || store.overtaken > read || !there(&lease) || !turn.leans_on().iter().all(there) {
                    // The line has to be read anew; who has just come stays so.
                    (views[at].1, views[at].2) = (store.revision, store.keys.clone());
                    continue;
                }
                let (stand, overtakes) = match turn {
                    Turn::Grant { fence, overtakes, .. } => (Stand::Holds(fence), overtakes),
                    Turn::Upgrade { .. } => (Stand::Upgrades, true),
                    Turn::Wait => {
                        views[at].3 = false;
                        continue;
                    }
                };
                views[at].3 = false;
                store.revision += 1;
                let revision = store.revision;
                let key = store.keys.iter_mut().find(|key| key.lease == lease).unwrap();
                (key.stand, key.written) = (stand, revision);
                store.overtaken = if overtakes { revision } else { store.overtaken };
                if let Stand::Holds(None) = stand {
                    assert!(Fence(revision) > highest);
                    highest = Fence(revision);
                }
                if let Stand::Holds(_) = stand {
                    views.remove(at);
                }
                store.check(permits);
            }
            // A holder gives back, or now and then somebody who waits gives up.
            3 if !store.keys.is_empty() => {
                let at = dice(store.keys.len() as u64) as usize;
                if store.keys[at].fence().is_some() || dice(20) == 0 {
                    store.revision += 1;
                    let gone = store.keys.remove(at).lease;
                    views.retain(|(lease, ..)| *lease != gone);
                }
            }
            _ => {}
        }
    }
}

#[test]
fn a_crowd_that_sees_its_lock_late_never_overlaps_and_nobody_is_forgotten() {
    for seed in 1..600 {
        crowd(seed, 1);
        crowd(seed, 2);
    }
}
