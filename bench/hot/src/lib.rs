//! The parts that every request runs through, each alone: the same work for `cargo bench --package bench-hot`, which takes its time, and for
//! `cargo xtask instructions`, which counts what the processor does.
//!
//! Each part can be done any number of times and is the same each time: the same records, names and spread over buckets, and no
//! clock but around the whole of it.

mod cases;
mod world;

use std::time::{Duration, Instant};

pub use cases::{CASES, Named, arrival, chain, hand_over, ring};

/// One part of the hot path.
pub struct Case {
    /// What puts everything back as it has to be before.
    pub prepare: Option<Box<dyn FnMut()>>,
    /// What is measured.
    pub work: Box<dyn FnMut()>,
}

impl Case {
    /// Does it once, and says how long that took without what has to be put back before.
    pub fn once(&mut self) -> Duration {
        if let Some(prepare) = &mut self.prepare {
            prepare();
        }
        let start = Instant::now();
        (self.work)();
        start.elapsed()
    }

    fn new(work: impl FnMut() + 'static) -> Self {
        Case { prepare: None, work: Box::new(work) }
    }
}
