//! When two worlds count as one: what a world hashes to is the same for all that differ by when they are and by how their
//! calls are numbered only.
//!
//! The core's types say by their `Hash` what they are made of. Here each number of that is recognized by its size (see the
//! constants) and replaced: moments by their distance from now, those that are long past by one and the same, numbers of
//! calls by their order, and fences that nothing can fall below any more likewise. All of it keeps their order. The worlds
//! themselves go on with their real numbers. What must not be here: what a world is.

use std::hash::Hasher;

use interlock_core::{Duration, Time};

/// Where the monotonic clock starts, in microseconds.
pub const EPOCH: u64 = 1_000_000_000_000;
/// Where the wall clock starts, in microseconds since 1970; fences are a tenth of it.
pub const WALL_EPOCH: u64 = 1_764_000_000_000_000;
/// Tickets are numbered from here.
pub const TICKETS: u64 = 1_000_000_000;

/// Further back than this no moment makes a difference: neither a TTL, nor the grace, nor what is remembered of what is over
/// is longer.
const LONG_PAST: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Moment,
    Wall,
    Fence,
    /// The number of a call of one proxy.
    Call(u8),
}

/// Everything that a world is made of, as a list of numbers.
pub struct Tokens {
    list: Vec<(Kind, u64)>,
    scope: u8,
}

/// From where moments are counted.
pub struct Origin {
    pub now: Time,
    pub wall: u64,
    /// How far the wall clock may yet step back.
    pub step: Duration,
}

impl Tokens {
    pub fn new() -> Self {
        Tokens { list: Vec::with_capacity(512), scope: 0 }
    }

    /// Numbers of calls from now on are those of this proxy.
    pub fn scope(&mut self, scope: u8) {
        self.scope = scope;
        self.plain(u64::from(scope));
    }

    /// Drops the number that was taken in at this place: it says nothing.
    pub fn drop_at(&mut self, at: usize) {
        self.list[at] = (Kind::Plain, 0);
    }

    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Gives the canonical numbers to another hasher.
    pub fn pour<H: Hasher>(&self, origin: &Origin, into: &mut H) {
        let of = |kind| self.list.iter().filter(move |token| token.0 == kind).map(|token| token.1);
        let ranks = |mut all: Vec<u64>| {
            all.sort_unstable();
            all.dedup();
            all
        };
        let calls: [Vec<u64>; 3] = std::array::from_fn(|scope| ranks(of(Kind::Call(scope as u8)).collect()));
        let fences = ranks(of(Kind::Fence).collect());
        let rank = |all: &[u64], number: u64| all.iter().position(|it| *it == number).unwrap_or(all.len()) as u64;
        let micros = |span: Duration| span.as_micros() as u64;
        let floor = (origin.wall - micros(origin.step)) / 10;
        let long_past = origin.now.as_micros() - micros(LONG_PAST);
        let wall_past = origin.wall - micros(origin.step) - micros(LONG_PAST);
        for (kind, number) in &self.list {
            into.write_u64(match kind {
                Kind::Plain => *number,
                Kind::Moment => 1 + number.max(&long_past) - long_past,
                Kind::Wall => number.max(&wall_past) - wall_past,
                Kind::Fence if *number >= floor => 1000 + number - floor,
                Kind::Fence => rank(&fences, *number),
                Kind::Call(scope) => rank(&calls[usize::from(*scope)], *number),
            });
        }
    }

    fn plain(&mut self, number: u64) {
        self.list.push((Kind::Plain, number));
    }
}

impl Hasher for Tokens {
    fn finish(&self) -> u64 {
        self.list.len() as u64
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            self.plain(chunk.iter().fold(1, |word, byte| word << 8 | u64::from(*byte)));
        }
    }

    fn write_u8(&mut self, number: u8) {
        self.plain(u64::from(number));
    }

    fn write_u32(&mut self, number: u32) {
        // Behind the seconds of a span stand its nanoseconds.
        if let Some((kind @ Kind::Call(_), _)) = self.list.last_mut() {
            *kind = Kind::Plain;
        }
        self.plain(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        let kind = match number {
            0 => Kind::Plain,
            1..1_000_000 => Kind::Call(self.scope),
            EPOCH..10_000_000_000_000 => Kind::Moment,
            100_000_000_000_000..1_000_000_000_000_000 => Kind::Fence,
            1_000_000_000_000_000..10_000_000_000_000_000 => Kind::Wall,
            _ => Kind::Plain,
        };
        self.list.push((kind, number));
    }

    fn write_u128(&mut self, number: u128) {
        self.plain(number as u64);
    }

    fn write_usize(&mut self, number: usize) {
        self.plain(number as u64);
    }

    fn write_isize(&mut self, number: isize) {
        self.plain(number as u64);
    }
}
