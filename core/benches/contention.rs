//! What those cost who wait: an arrival in a line, a hand-over, a search for cycles.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::hint::black_box;
use std::slice::from_ref;

use common::{World, lock, owner};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use interlock_core::{Mode, Outcome};

/// Somebody comes to stand behind so many, and goes again.
fn arrival(c: &mut Criterion) {
    let mut group = c.benchmark_group("arrival in a line of");
    for waiters in [1, 10, 100, 1000] {
        let mut world = World::new(true);
        let name = lock("crowd/1");
        let _line = world.line(&name, waiters);
        group.bench_function(BenchmarkId::from_parameter(waiters), |b| {
            b.iter(|| {
                let pending = world.wait(&owner(99_999), from_ref(&name));
                world.cancel(black_box(pending));
            });
        });
    }
    group.finish();
}

/// A release, and the next one's look at what it was granted.
fn hand_over(c: &mut Criterion) {
    let mut group = c.benchmark_group("hand-over with waiters");
    for waiters in [2, 16, 256, 1000] {
        let mut world = World::new(true);
        let name = lock("crowd/1");
        let (holder, line) = world.line(&name, waiters);
        let (mut holder, mut line) = (Some(holder), std::collections::VecDeque::from(line));
        let mut next = waiters;
        group.bench_function(BenchmarkId::from_parameter(waiters), |b| {
            b.iter_custom(|rounds| {
                let mut took = std::time::Duration::ZERO;
                for _ in 0..rounds {
                    let start = std::time::Instant::now();
                    world.release(holder.take().unwrap());
                    let Outcome::Granted(lease) = world.poll(line.pop_front().unwrap()) else { panic!("not granted") };
                    took += start.elapsed();
                    holder = Some(lease);
                    next += 1;
                    line.push_back(world.wait(&owner(next), from_ref(&name)));
                }
                took
            });
        });
    }
    group.finish();
}

/// Who holds the first lock of a chain is waited for by nobody; one more comes and waits for it, and goes again.
fn chain(c: &mut Criterion) {
    let mut group = c.benchmark_group("wait at the end of a chain of");
    for (length, table) in
        [(2, 0), (4, 0), (16, 0), (64, 0), (256, 0), (10_000, 0), (4, 100), (4, 10_000), (4, 100_000)]
    {
        let mut world = World::new(true);
        let _others = world.fill(table);
        let _chain = world.chain(length);
        let id = if table == 0 { length.to_string() } else { format!("{length}, {table} other locks held") };
        group.bench_function(id, |b| {
            b.iter(|| {
                let pending = world.wait(&owner(99_999), &[lock("chain/0")]);
                world.cancel(black_box(pending));
            });
        });
    }
    group.finish();
}

/// The owner at the end of a chain asks for its first lock, and is refused with the cycle.
fn ring(c: &mut Criterion) {
    let mut group = c.benchmark_group("refusal of a cycle of");
    for length in [2, 4, 16, 64, 256, 10_000] {
        let mut world = World::new(true);
        let _chain = world.chain(length);
        group.bench_function(BenchmarkId::from_parameter(length), |b| {
            b.iter(|| {
                let request = world.request(&owner(length - 1), &[lock("chain/0")], Mode::Exclusive);
                let Outcome::Refused(refusal) = world.acquire(request) else { panic!("not refused") };
                black_box(refusal)
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).without_plots();
    targets = arrival, hand_over, chain, ring
}
criterion_main!(benches);
