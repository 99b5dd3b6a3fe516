//! What those cost who wait, by how many there are: an arrival in a line, a hand-over, a search for cycles.

use bench_hot::{Case, arrival, chain, hand_over, ring};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

fn group<P: std::fmt::Display + Copy>(c: &mut Criterion, name: &str, of: &[P], make: impl Fn(P) -> Case) {
    let mut group = c.benchmark_group(name);
    for parameter in of {
        let mut case = make(*parameter);
        group.bench_function(BenchmarkId::from_parameter(parameter), |b| b.iter(&mut case.work));
    }
    group.finish();
}

fn contention(c: &mut Criterion) {
    group(c, "arrival in a line of", &[1, 10, 100, 1000], arrival);
    group(c, "hand-over with waiters", &[2, 16, 256, 1000], hand_over);
    for others in [0, 100, 10_000, 100_000] {
        let lengths: &[usize] = if others == 0 { &[2, 4, 16, 64, 256, 10_000] } else { &[4] };
        let name = format!("wait at the end of a chain, {others} other locks held, of");
        group(c, &name, lengths, |length| chain(length, others));
    }
    group(c, "refusal of a cycle of", &[2, 4, 16, 64, 256, 10_000], ring);
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).without_plots();
    targets = contention
}
criterion_main!(benches);
