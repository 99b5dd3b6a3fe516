//! The highest fence that each lock was seen granted under, so that an authority whose fences fall is found out.
//!
//! Bounded: the locks whose grants are longest ago are forgotten first.

use std::collections::HashMap;

use interlock_core::{Fence, LockName, Mode};

/// The most locks that are remembered.
const MOST: usize = 8192;

/// See the module.
#[derive(Debug, Default)]
pub struct Floors {
    highest: HashMap<LockName, Fence>,
}

impl Floors {
    /// The least fence of a grant that is asked for from now on.
    ///
    /// Only an exclusive one has any. Who holds a lock already enters it again under the fence of its first grant, and
    /// others that share the lock may have been granted it since under higher ones.
    pub fn of(&self, lock: &LockName, mode: Mode) -> Fence {
        if mode == Mode::Exclusive { self.highest.get(lock).copied().unwrap_or_default() } else { Fence(0) }
    }

    /// A lock was granted.
    pub fn saw(&mut self, lock: &LockName, fence: Fence) {
        match self.highest.get_mut(lock) {
            Some(highest) => *highest = fence.max(*highest),
            None => {
                if self.highest.len() >= MOST {
                    self.forget_half();
                }
                self.highest.insert(lock.clone(), fence);
            }
        }
    }

    /// Fences rise with the clock, so the lowest are the oldest.
    fn forget_half(&mut self) {
        let mut fences: Vec<Fence> = self.highest.values().copied().collect();
        let (_, median, _) = fences.select_nth_unstable(MOST / 2);
        let median = *median;
        self.highest.retain(|_, fence| *fence > median);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exclusive_grants_have_a_floor_and_memory_is_bounded() {
        let mut floors = Floors::default();
        let lock = |n: usize| LockName::parse(&format!("a/{n}")).unwrap();
        floors.saw(&lock(1), Fence(7));
        floors.saw(&lock(1), Fence(3));
        assert_eq!(floors.of(&lock(1), Mode::Exclusive), Fence(7));
        assert_eq!(floors.of(&lock(1), Mode::Shared), Fence(0));
        assert_eq!(floors.of(&lock(2), Mode::Exclusive), Fence(0));
        for n in 0..3 * MOST {
            floors.saw(&lock(n), Fence(100 + n as u64));
            assert!(floors.highest.len() <= MOST);
        }
        assert_eq!(floors.of(&lock(3 * MOST - 1), Mode::Exclusive), Fence(99 + 3 * MOST as u64));
        // An authority that grants everything under one fence fills it no further.
        let mut flat = Floors::default();
        (0..3 * MOST).for_each(|n| flat.saw(&lock(n), Fence(1)));
        assert!(flat.highest.len() <= MOST);
    }
}
