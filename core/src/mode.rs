//! Lock modes: which may be held together, and what several held by one owner add up to.
//!
//! The five modes and their matrix are those of Gray, Lorie, Putzolu and Traiger, "Granularity of Locks and Degrees
//! of Consistency in a Shared Data Base" (1976).

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

/// How an owner wants to hold a lock.
///
/// The three intent modes announce locks further down in a hierarchical class; they are taken on the ancestors of a
/// name without being asked for, and may be asked for by name as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Mode {
    /// Shared locks are held below this one.
    IntentShared,
    /// Exclusive locks are held below this one.
    IntentExclusive,
    /// Read together with other readers.
    Shared,
    /// Read all below, with exclusive locks on some of it.
    SharedIntentExclusive,
    /// Alone.
    Exclusive,
}

use Mode::{Exclusive, IntentExclusive, IntentShared, Shared, SharedIntentExclusive};

impl Mode {
    /// Every mode, from the weakest on.
    pub const ALL: [Mode; 5] = [IntentShared, IntentExclusive, Shared, SharedIntentExclusive, Exclusive];

    /// Whether two owners may hold a lock in these modes at the same time. Symmetric.
    pub const fn compatible(self, other: Mode) -> bool {
        match self {
            IntentShared => !matches!(other, Exclusive),
            IntentExclusive => matches!(other, IntentShared | IntentExclusive),
            Shared => matches!(other, IntentShared | Shared),
            SharedIntentExclusive => matches!(other, IntentShared),
            Exclusive => false,
        }
    }

    /// The weakest mode that gives all that either gives: what an owner's leases on one lock add up to.
    pub const fn join(self, other: Mode) -> Mode {
        match (self, other) {
            (Exclusive, _) | (_, Exclusive) => Exclusive,
            (SharedIntentExclusive, _) | (_, SharedIntentExclusive) => SharedIntentExclusive,
            (Shared, IntentExclusive) | (IntentExclusive, Shared) => SharedIntentExclusive,
            (Shared, _) | (_, Shared) => Shared,
            (IntentExclusive, _) | (_, IntentExclusive) => IntentExclusive,
            (IntentShared, IntentShared) => IntentShared,
        }
    }

    /// Whether a holder in this mode needs nothing more to have `other`.
    pub const fn covers(self, other: Mode) -> bool {
        self.join(other) as u8 == self as u8
    }

    /// The mode that must be held on every ancestor, in a hierarchical class, to take a lock in this mode.
    pub const fn intent(self) -> Mode {
        match self {
            IntentShared | Shared => IntentShared,
            IntentExclusive | SharedIntentExclusive | Exclusive => IntentExclusive,
        }
    }

    /// The name of the mode as annotations, policies and answers spell it.
    pub const fn as_str(self) -> &'static str {
        match self {
            IntentShared => "intent-shared",
            IntentExclusive => "intent-exclusive",
            Shared => "shared",
            SharedIntentExclusive => "shared-intent-exclusive",
            Exclusive => "exclusive",
        }
    }

    /// Whether the mode makes sense only on a lock that has locks below it.
    pub const fn is_intent(self) -> bool {
        matches!(self, IntentShared | IntentExclusive | SharedIntentExclusive)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a lock mode")]
pub struct UnknownMode;

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        Mode::ALL.into_iter().find(|mode| mode.as_str() == text).ok_or(UnknownMode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    /// Gray's matrix, row by row in the order of [`Mode::ALL`].
    const MATRIX: [[bool; 5]; 5] = [
        [true, true, true, true, false],
        [true, true, false, false, false],
        [true, false, true, false, false],
        [true, false, false, false, false],
        [false, false, false, false, false],
    ];

    #[test]
    fn compatibility_is_grays_matrix() {
        for (row, a) in Mode::ALL.into_iter().enumerate() {
            for (column, b) in Mode::ALL.into_iter().enumerate() {
                assert_eq!(a.compatible(b), MATRIX[row][column], "{a} with {b}");
            }
        }
    }

    #[test]
    fn a_join_excludes_exactly_what_either_part_excludes() {
        for a in Mode::ALL {
            for b in Mode::ALL {
                assert_eq!(a.join(b), b.join(a));
                assert!(a.join(b).covers(a) && a.join(b).covers(b));
                for other in Mode::ALL {
                    assert_eq!(
                        a.join(b).compatible(other),
                        a.compatible(other) && b.compatible(other),
                        "{a}+{b} with {other}"
                    );
                }
            }
        }
    }

    #[test]
    fn names_round_trip() {
        for mode in Mode::ALL {
            assert_eq!(mode.as_str().parse(), Ok(mode));
        }
        assert_eq!("Exclusive".parse::<Mode>(), Err(UnknownMode));
    }
}
