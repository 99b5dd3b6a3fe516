//! The Envoy under load, seen from outside: its memory while it works, its counters, gauges and log when it is done.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use interlock_testkit::Envoy;

/// How much memory may grow between the first third and the end: what an allocator does with free pages.
const GROWTH: f64 = 0.10;
/// However small Envoy is, this much is noise: a V8 heap before and after a collection.
const NOISE: u64 = 16 << 20;

/// How long the table may take to be empty, and to be swept twice after.
const QUIET: Duration = Duration::from_secs(30);

const POLL: Duration = Duration::from_millis(100);

/// One look at the memory of Envoy.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub at: Duration,
    /// Resident, in bytes.
    pub resident: u64,
    /// What Envoy's own heap has allocated; VMs are not in it.
    pub heap: u64,
}

/// Samples for `length`, shows each to `seen`, and returns them all.
pub async fn memory(envoy: &Envoy, length: Duration, seen: impl Fn(&Sample)) -> Result<Vec<Sample>> {
    let start = Instant::now();
    let every = (length / 60).clamp(Duration::from_millis(500), Duration::from_secs(10));
    let mut samples = Vec::new();
    while start.elapsed() < length {
        tokio::time::sleep(every.min(length.saturating_sub(start.elapsed()))).await;
        let heap = envoy.stat("server.memory_allocated").await.context("Envoy's admin endpoint is gone")?;
        let sample = Sample { at: start.elapsed(), resident: envoy.memory()?, heap };
        seen(&sample);
        samples.push(sample);
    }
    Ok(samples)
}

/// Whether memory is flat: what is wrong with it, or nothing. Compares the middle of the samples around the first third with
/// that of the last of them, so that one sample decides nothing.
pub fn growth(samples: &[Sample]) -> Option<String> {
    let window = (samples.len() / 6).max(1);
    let third = samples.len() / 3;
    let early = middle(samples.get(third..third + window)?)?;
    let late = middle(samples.get(samples.len() - window..)?)?;
    let bound = early + ((early as f64 * GROWTH) as u64).max(NOISE);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    (late > bound).then(|| format!("memory grew from {:.1} to {:.1} MiB", mib(early), mib(late)))
}

fn middle(samples: &[Sample]) -> Option<u64> {
    let mut all: Vec<_> = samples.iter().map(|sample| sample.resident).collect();
    all.sort_unstable();
    all.get(all.len() / 2).copied()
}

/// Prints up to twenty of the samples.
pub fn print(samples: &[Sample]) {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!("Memory (MiB)      resident  Envoy's heap");
    let step = samples.len().div_ceil(20).max(1);
    let last = samples.last().filter(|_| samples.len() % step != 1 && step > 1);
    for sample in samples.iter().step_by(step).chain(last) {
        println!("  {:>8.1} s {:>13.1} {:>13.1}", sample.at.as_secs_f64(), mib(sample.resident), mib(sample.heap));
    }
}

/// What is wrong with Envoy once all load has ended.
pub async fn aftermath(envoy: &Envoy) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    // A sweep under way may have begun before the end of the load; the second has not.
    let before = sum(&envoy.stats().await?, "interlock_sweep_total");
    let start = Instant::now();
    let mut stats = loop {
        let stats = envoy.stats().await?;
        if sum(&stats, "interlock_sweep_total") >= before + 2 {
            break stats;
        }
        if start.elapsed() > QUIET {
            wrong.push(format!("the table was not swept twice in {QUIET:?}"));
            break stats;
        }
        tokio::time::sleep(POLL).await;
    };
    let full = |stats: &BTreeMap<String, u64>| {
        let gauges = ["interlock_held", "interlock_waiting", "interlock_table_locks", "interlock_table_owners"];
        let ours = stats.iter().filter(|(name, value)| **value != 0 && gauges.iter().any(|g| is(name, g)));
        ours.map(|(name, value)| format!("{name} is {value}, and nothing is under way")).collect::<Vec<_>>()
    };
    wrong.extend(full(&stats));
    if !stats.keys().any(|name| is(name, "interlock_table_locks")) {
        wrong.push("there is no gauge interlock_table_locks".to_owned());
    }
    if !full(&stats).is_empty() {
        // Whether it heals tells a leak from a release that comes late.
        tokio::time::sleep(Duration::from_secs(10)).await;
        stats = envoy.stats().await?;
        wrong.extend(full(&stats).into_iter().map(|what| format!("10 s later still: {what}")));
    }
    for (name, value) in stats.iter().filter(|(_, value)| **value > 0) {
        let died = name.contains("vm_reload") || name.contains("crash");
        if died || is(name, "interlock_backend_error_total") {
            wrong.push(format!("{name} is {value}"));
        }
    }
    let log = envoy.logs();
    let bad = |line: &&str| {
        line.contains("[critical]")
            || line.contains("[error]")
            || line.contains("called back")
            || line.contains("panic")
    };
    wrong.extend(log.lines().filter(bad).take(5).map(|line| format!("in Envoy's log: {line}")));
    Ok(wrong)
}

/// Whether this is the plugin's metric, with whatever labels in its name.
fn is(name: &str, metric: &str) -> bool {
    let rest = name.strip_prefix("wasmcustom.").and_then(|name| name.strip_prefix(metric));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// The sum of a metric over its labels.
pub fn sum(stats: &BTreeMap<String, u64>, metric: &str) -> u64 {
    stats.iter().filter(|(name, _)| is(name, metric)).map(|(_, value)| value).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(resident: impl Fn(u64) -> u64) -> Vec<Sample> {
        (0..60).map(|n| Sample { at: Duration::from_secs(n), resident: resident(n) << 20, heap: 0 }).collect()
    }

    #[test]
    fn warming_up_is_no_growth_and_a_leak_is() {
        assert_eq!(growth(&samples(|n| 100 + 50 * n.min(15) / 15)), None);
        assert_eq!(growth(&samples(|n| if n == 59 { 900 } else { 200 })), None);
        assert!(growth(&samples(|n| 100 + n)).is_some());
    }
}
