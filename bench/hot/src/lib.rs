//! The parts that every request runs through, each alone: the same work for `cargo bench --package bench-hot`, which takes its time, and for
//! `cargo xtask instructions`, which counts what the processor does.
//!
//! Each part can be done any number of times and is the same each time: the same records, names and spread over buckets, and no
//! clock. Measures nothing itself.

mod cases;
mod world;

pub use cases::{CASES, Named, chain};

/// One part of the hot path.
pub struct Case {
    /// What puts everything back as it has to be before.
    pub prepare: Option<Box<dyn FnMut()>>,
    /// What is measured.
    pub work: Box<dyn FnMut()>,
}

impl Case {
    fn new(work: impl FnMut() + 'static) -> Self {
        Case { prepare: None, work: Box::new(work) }
    }
}
