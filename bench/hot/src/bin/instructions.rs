//! Does one part of the hot path, named by its place in the list, once in [`counted_by_callgrind`]; without one, prints how all are called. For
//! `cargo xtask instructions`.
//!
//! A process for each, so that none is counted in a heap that another has left behind; and with an allocator that behaves the same everywhere,
//! since what the system's does differs from one system to another.

use std::hint::black_box;

use bench_hot::CASES;
use dlmalloc::GlobalDlmalloc;

#[global_allocator]
static ALLOCATOR: GlobalDlmalloc = GlobalDlmalloc;

/// How often it is done before, so that records and tables have the size that they keep.
const BEFORE: usize = 3;

fn main() {
    let Some(place) = std::env::args().nth(1) else {
        return CASES.iter().for_each(|(name, _)| println!("{name}"));
    };
    let place: usize = place.parse().expect("a number");
    let (_, make) = CASES[place];
    let mut case = make();
    for round in 0..=BEFORE {
        if let Some(prepare) = &mut case.prepare {
            prepare();
        }
        if round < BEFORE { (case.work)() } else { counted_by_callgrind(&mut case.work) }
    }
}

/// What is counted: callgrind knows it by this name.
#[inline(never)]
fn counted_by_callgrind(work: &mut dyn FnMut()) {
    black_box(work)();
}
