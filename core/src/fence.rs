//! Fences: numbers that rise with every grant of a lock and never fall, so that a resource can refuse the late.

use core::fmt;

use serde::{Deserialize, Serialize};

/// A fencing token. Larger is later. Fits the 15 digits of a structured-field Integer until the year 2286.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Fence(pub u64);

impl Fence {
    /// The largest number that a structured-field Integer holds (RFC 9651, section 3.3.1).
    pub const MAX: Fence = Fence(999_999_999_999_999);

    /// The floor for fences granted at this wall-clock moment: the clock in units of 10 µs, so that fences go on
    /// rising over a restart that forgot them, as long as no lock is granted more than 100,000 times a second.
    pub const fn floor(unix_micros: u64) -> Fence {
        Fence(unix_micros / 10)
    }

    /// The fence of the next grant where `self` is the highest ever given and `floor` comes from the wall clock.
    /// The clock may step back: the result still rises.
    #[must_use]
    pub const fn next(self, floor: Fence) -> Fence {
        let next = self.0.saturating_add(1);
        Fence(if next > floor.0 { next } else { floor.0 })
    }
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
