//! Numbers that look random and repeat: one seed, one sequence. Nothing about requests or policies.

/// The environment variable that sets another seed.
const SEED: &str = "INTERLOCK_HOSTILE_SEED";

/// The seed of this run.
pub fn seed() -> u64 {
    number(SEED).unwrap_or(20_261_124)
}

/// A number from the environment.
pub fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{variable}={text}: {error}")))
}

/// Sebastiano Vigna's SplitMix64.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The dice of one thing in a run, whatever else is in it.
    pub fn new(seed: u64, number: usize) -> Self {
        let mut dice = Dice(seed ^ (number as u64).wrapping_mul(0xA24B_AED4_963E_E407));
        dice.next();
        dice
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `end`, which is above 0.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }

    /// From `low` to `high`, both included.
    pub fn within(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    /// True so many times in a hundred.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of them.
    pub fn pick<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }

    /// Any byte.
    pub fn byte(&mut self) -> u8 {
        u8::try_from(self.below(256)).unwrap()
    }

    /// Any bytes that a header value may have on any codec: no control characters.
    pub fn text(&mut self, length: usize) -> Vec<u8> {
        let legal = |byte: &u8| *byte >= 0x20 && *byte != 0x7F;
        std::iter::repeat_with(|| self.byte()).filter(legal).take(length).collect()
    }
}
