//! Random numbers from a seed. What must not live here: anything that draws from elsewhere.

/// Splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The same seed gives the same numbers, on every machine.
    pub fn new(seed: u64) -> Self {
        Dice(seed)
    }

    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `sides`.
    pub fn roll(&mut self, sides: usize) -> usize {
        let sides = u64::try_from(sides.max(1)).unwrap_or(u64::MAX);
        // The high half of a product, so that no division is needed.
        usize::try_from((u128::from(self.draw()) * u128::from(sides)) >> 64).unwrap_or(0)
    }

    /// A number below `sides`, as a byte.
    pub fn small(&mut self, sides: u8) -> u8 {
        u8::try_from(self.roll(usize::from(sides))).unwrap_or(0)
    }

    /// True so often in a hundred.
    pub fn percent(&mut self, of_hundred: usize) -> bool {
        self.roll(100) < of_hundred
    }

    /// One of them.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len())]
    }
}
