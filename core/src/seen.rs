//! The fences that somebody has seen: what a resource's guard refuses late writers by, and what tells fences that fall.
//!
//! # The rule
//! Of two grants of one lock whose modes exclude each other the one with the higher fence came after the other had ended.
//! So a fence is *stale* once a higher one of a conflicting mode was seen. A higher fence of a mode that goes together with
//! its own says nothing: readers that were granted the lock one after the other hold it side by side. What was seen by one
//! watcher therefore comes in the order of the grants wherever that order matters.
//!
//! # Forgetting
//! A fence is shown together with something that expires: the signature of a guard's `lock-fence`, the hold limit of a grant.
//! What is `keep` old, from when it was last raised, can be forgotten if no lower fence can be shown any more by then. Where more
//! is seen than a bucket can hold, the lock with the lowest fence is forgotten by force, and that fence becomes the bucket's
//! *floor*: what is not remembered must not be below it. So memory is bounded, nothing stale ever passes, and who pays is
//! a holder that shows its fence for the first time when many others with later fences have been seen already.
//!
//! Must not live here: signatures, owners, and what becomes of whoever is stale.

use serde::{Deserialize, Serialize};

use crate::fence::Fence;
use crate::mode::Mode;
use crate::name::LockName;
use crate::store::{self, Kind, Record, Save, Store, StoreError};
use crate::time::{Duration, Time};

/// The most locks that one bucket remembers.
pub const REMEMBERED: usize = 64;

/// What the memory says of a fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is not stale, and is remembered from now on.
    Fresh,
    /// A later grant, which it conflicts with, was seen before it; or it may have been, and is forgotten.
    Stale,
}

/// What was seen of some of the locks.
#[derive(Clone, Debug, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
pub struct SeenBucket {
    locks: Vec<Seen>,
    /// The highest fence that was forgotten by force.
    floor: Fence,
    /// When that was, the last time.
    floored: Time,
}

/// What was seen of one lock.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Seen {
    lock: LockName,
    /// The highest fence of each mode, but for modes that exclude nothing which a higher one here does not.
    highest: Vec<(Mode, Fence)>,
    /// The floor of its bucket when it came in: what was known of it before that may be forgotten.
    floor: Fence,
    /// When it was last raised.
    raised: Time,
}

impl Seen {
    fn top(&self) -> Fence {
        self.highest.iter().map(|(_, fence)| *fence).max().unwrap_or_default()
    }

    fn is_stale(&self, fence: Fence, mode: Mode) -> bool {
        let later = |(other, highest): &(Mode, Fence)| {
            let conflicts = !mode.compatible(*other) || bug!(ReadersStale);
            conflicts && (*highest > fence || (bug!(EqualFenceStale) && *highest == fence))
        };
        !bug!(StaleFencePasses) && (fence < self.floor || self.highest.iter().any(later))
    }

    /// Takes in a fence that is not stale. False if that is nothing new.
    fn raise(&mut self, fence: Fence, mode: Mode, now: Time) -> bool {
        let known = |(other, highest): &(Mode, Fence)| other.covers(mode) && *highest >= fence;
        if self.highest.iter().any(known) {
            return false;
        }
        self.highest.retain(|(other, highest)| !(mode.covers(*other) && *highest <= fence));
        self.highest.push((mode, fence));
        self.raised = now;
        true
    }
}

impl Record for SeenBucket {
    const KIND: Kind = Kind::Seen;
}

impl SeenBucket {
    /// Judges a fence that is shown, and remembers it if it is not stale. `keep` is the longest time for which a fence can be
    /// shown after it was granted.
    pub fn see(&mut self, lock: &LockName, fence: Fence, mode: Mode, now: Time, keep: Duration) -> (Verdict, Save) {
        let keep = if bug!(SeenForgottenEarly) { keep / 2 } else { keep };
        self.locks.retain(|seen| now.since(seen.raised) < keep);
        if now.since(self.floored) >= keep {
            self.floor = Fence::default();
        }
        if let Some(seen) = self.locks.iter_mut().find(|seen| seen.lock == *lock) {
            if seen.is_stale(fence, mode) {
                return (Verdict::Stale, Save::No);
            }
            let changed = seen.raise(fence, mode, now) && !bug!(SeenFenceNotRaised);
            return (Verdict::Fresh, Save::from(changed));
        }
        if fence < self.floor && !bug!(StaleFencePasses) {
            return (Verdict::Stale, Save::No);
        }
        let highest = vec![(mode, fence)];
        self.locks.push(Seen { lock: lock.clone(), highest, floor: self.floor, raised: now });
        self.shrink(now);
        (Verdict::Fresh, Save::Yes)
    }

    /// Forgets the lowest where there are too many.
    fn shrink(&mut self, now: Time) {
        while self.locks.len() > REMEMBERED {
            let lowest = self.locks.iter().enumerate().min_by_key(|(_, seen)| seen.top()).map(|(at, _)| at);
            let Some(lowest) = lowest else { return };
            let forgotten = self.locks.swap_remove(lowest);
            if !bug!(ForgottenWithoutFloor) {
                self.floor = self.floor.max(forgotten.top()).max(forgotten.floor);
                self.floored = now;
            }
        }
    }
}

/// As [`SeenBucket::see`], in a store.
///
/// # Errors
/// Those of the store; then nothing is known of the fence.
pub fn see<S: Store>(
    store: &S,
    lock: &LockName,
    fence: Fence,
    mode: Mode,
    now: Time,
    keep: Duration,
) -> Result<Verdict, StoreError> {
    store::update(store, store.bucket(lock.as_str()), |bucket: &mut SeenBucket| {
        Ok(bucket.see(lock, fence, mode, now, keep))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::mem::MemStore;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    use Mode::{Exclusive, IntentShared, Shared};
    use Verdict::{Fresh, Stale};

    const KEEP: Duration = Duration::from_secs(100);

    fn at(secs: u64) -> Time {
        Time::from_micros(secs * 1_000_000)
    }

    fn lock(number: usize) -> LockName {
        LockName::parse(&format!("l/{number}")).unwrap()
    }

    /// Shows fences of one lock, a second apart.
    fn shown(fences: &[(u64, Mode)]) -> Vec<Verdict> {
        let mut bucket = SeenBucket::default();
        let see = |(index, (fence, mode)): (usize, &(u64, Mode))| {
            bucket.see(&lock(1), Fence(*fence), *mode, at(index as u64), KEEP).0
        };
        fences.iter().enumerate().map(see).collect()
    }

    #[test]
    fn what_is_below_a_later_grant_is_stale_and_a_re_entry_is_not() {
        let fences =
            [(10, Exclusive), (10, Exclusive), (12, Exclusive), (10, Exclusive), (11, Exclusive), (12, Exclusive)];
        assert_eq!(shown(&fences), [Fresh, Fresh, Fresh, Stale, Stale, Fresh]);
    }

    #[test]
    fn readers_that_hold_side_by_side_are_not_stale_and_those_before_a_writer_are() {
        assert_eq!(shown(&[(12, Shared), (10, Shared), (12, Shared)]), [Fresh; 3]);
        assert_eq!(shown(&[(10, Shared), (11, Exclusive), (12, Shared), (10, Shared)]), [Fresh, Fresh, Fresh, Stale]);
        assert_eq!(shown(&[(12, Shared), (11, Exclusive)]), [Fresh, Stale], "a writer before readers");
        assert_eq!(
            shown(&[(12, Shared), (11, IntentShared), (13, Exclusive), (12, Shared)]),
            [Fresh, Fresh, Fresh, Stale]
        );
    }

    #[test]
    fn an_owner_that_enters_again_in_a_weaker_mode_has_the_same_fence() {
        assert_eq!(shown(&[(10, Exclusive), (10, Shared), (10, Exclusive)]), [Fresh; 3]);
    }

    #[test]
    fn locks_have_nothing_to_do_with_each_other() {
        let mut bucket = SeenBucket::default();
        assert_eq!(bucket.see(&lock(1), Fence(9), Exclusive, at(0), KEEP), (Fresh, Save::Yes));
        assert_eq!(bucket.see(&lock(2), Fence(1), Exclusive, at(0), KEEP), (Fresh, Save::Yes));
        assert_eq!(bucket.see(&lock(1), Fence(9), Exclusive, at(9), KEEP), (Fresh, Save::No), "nothing to write");
        assert_eq!(bucket.see(&lock(1), Fence(8), Exclusive, at(9), KEEP), (Stale, Save::No));
    }

    #[test]
    fn a_fence_is_remembered_for_as_long_as_a_lower_one_can_be_shown() {
        let mut bucket = SeenBucket::default();
        bucket.see(&lock(1), Fence(10), Exclusive, at(0), KEEP);
        bucket.see(&lock(1), Fence(12), Exclusive, at(50), KEEP);
        assert_eq!(bucket.see(&lock(1), Fence(10), Exclusive, at(149), KEEP).0, Stale);
        assert_eq!(bucket.see(&lock(1), Fence(10), Exclusive, at(150), KEEP).0, Fresh);
    }

    #[test]
    fn what_is_forgotten_by_force_leaves_a_floor_until_nothing_below_it_can_be_shown() {
        let mut bucket = SeenBucket::default();
        for number in 0..=REMEMBERED {
            bucket.see(&lock(number), Fence(100 + number as u64), Exclusive, at(1), KEEP);
        }
        assert_eq!(bucket.locks.len(), REMEMBERED);
        assert_eq!(
            bucket.see(&lock(0), Fence(99), Exclusive, at(2), KEEP).0,
            Stale,
            "it is forgotten, and its fence is not"
        );
        assert_eq!(bucket.see(&lock(1000), Fence(99), Exclusive, at(2), KEEP).0, Stale, "may be late as well");
        assert_eq!(
            bucket.see(&lock(1), Fence(101), Exclusive, at(2), KEEP).0,
            Fresh,
            "what is remembered is not below"
        );
        assert_eq!(bucket.see(&lock(1000), Fence(99), Exclusive, at(101), KEEP).0, Fresh);
    }

    #[test]
    fn what_comes_back_after_it_was_forgotten_is_still_judged_by_what_it_was() {
        let mut bucket = SeenBucket::default();
        for number in 0..=REMEMBERED {
            bucket.see(&lock(number), Fence(100 + number as u64), Exclusive, at(1), KEEP);
        }
        assert_eq!(bucket.see(&lock(0), Fence(1000), Shared, at(2), KEEP).0, Fresh);
        assert_eq!(bucket.see(&lock(0), Fence(99), Shared, at(2), KEEP).0, Stale, "a writer with 100 was seen");
        assert_eq!(bucket.see(&lock(0), Fence(500), Shared, at(2), KEEP).0, Fresh);
    }

    #[test]
    fn a_store_that_others_write_to_loses_no_fence() {
        let store = MemStore::default();
        let see = |fence| see(&store, &lock(1), Fence(fence), Exclusive, at(1), KEEP);
        assert_eq!(see(5), Ok(Fresh));
        store.conflict_next(1);
        assert_eq!(see(7), Ok(Fresh));
        assert_eq!(see(6), Ok(Stale));
        store.conflict_next(store::MAX_TRIES);
        assert_eq!(see(8), Err(StoreError::Contended));
        assert_eq!(see(7), Ok(Fresh), "what nobody was let in for is not remembered");
    }

    #[cfg(not(target_arch = "wasm32"))]
    mod properties {
        use proptest::prelude::*;

        use super::*;

        /// What was let through: lock, fence, mode, when.
        type Passed = (usize, u64, Mode, u64);

        /// Fences mostly rise, as grants do, and are shown late by up to half a history; few locks or many.
        fn history() -> impl Strategy<Value = Vec<(usize, u64, Mode, u64)>> {
            let modes = prop_oneof![3 => Just(Exclusive), 3 => Just(Shared), 1 => Just(IntentShared),
                1 => Just(Mode::IntentExclusive), 1 => Just(Mode::SharedIntentExclusive)];
            let step = |locks| (0..locks, 0..40_u64, modes.clone(), prop_oneof![9 => 0..3_u64, 1 => 0..120_u64]);
            prop_oneof![
                prop::collection::vec(step(3_usize), 1..120),
                prop::collection::vec(step(3 * REMEMBERED), 200..600)
            ]
        }

        proptest! {
            #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(100) })]
            #[test]
            fn nothing_stale_passes_and_the_rest_does_as_long_as_nothing_was_forgotten_by_force(history in history()) {
                let mut bucket = SeenBucket::default();
                let mut passed: Vec<Passed> = Vec::new();
                let (mut now, mut forced) = (200, false);
                for (step, (number, late, mode, after)) in history.into_iter().enumerate() {
                    now += after;
                    let fence = (step as u64 + 40).saturating_sub(late);
                    let higher = || passed.iter().filter(|(other, higher, ..)| *other == number && *higher > fence);
                    // Whatever is lower was granted before any of these was seen.
                    let shown_until = higher().map(|(.., when)| when + KEEP.as_secs()).min().unwrap_or(u64::MAX);
                    let ever = higher().any(|(_, _, theirs, _)| !theirs.compatible(mode));
                    let beaten = ever && now < shown_until;
                    let (verdict, save) = bucket.see(&lock(number), Fence(fence), mode, at(now), KEEP);
                    forced |= bucket.floor > Fence(0);
                    prop_assert!(bucket.locks.len() <= REMEMBERED);
                    prop_assert!(bucket.locks.iter().all(|seen| seen.highest.len() <= Mode::ALL.len()));
                    match verdict {
                        Fresh => {
                            prop_assert!(!beaten, "step {step}: {fence} of l/{number} in {mode} is stale");
                            passed.push((number, fence, mode, now));
                        }
                        // What is older than it need be remembered may be remembered together with what is not.
                        Stale => {
                            prop_assert_eq!(save, Save::No);
                            prop_assert!(ever || forced, "step {step}: {fence} of l/{number} in {mode} is not stale");
                        }
                    }
                }
            }
        }
    }
}
