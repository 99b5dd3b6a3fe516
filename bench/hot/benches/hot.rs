//! How long each part of the hot path takes.

use std::time::Duration;

use bench_hot::CASES;
use criterion::{Criterion, criterion_group, criterion_main};

fn hot(c: &mut Criterion) {
    for (name, make) in CASES {
        let mut case = make();
        c.bench_function(name, |b| match case.prepare {
            None => b.iter(&mut case.work),
            Some(_) => b.iter_custom(|rounds| (0..rounds).map(|_| case.once()).sum()),
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(2)).without_plots();
    targets = hot
}
criterion_main!(benches);
