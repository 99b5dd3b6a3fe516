//! What commands that start an Envoy and ask it things have in common: a runtime, a seed, times that were taken.

use std::future::Future;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;

/// Runs a command to its end.
pub fn block_on<T>(command: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start Tokio")?;
    runtime.block_on(command)
}

/// The seed that was asked for, or another one each time.
pub fn seed(asked: Option<u64>) -> u64 {
    asked.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::from(now.subsec_nanos()) ^ now.as_secs()
    })
}

/// How long something took, time and again.
pub struct Times(Histogram<u64>);

impl Default for Times {
    fn default() -> Self {
        // A minute at three digits is well within what a histogram takes.
        Times(Histogram::new_with_max(60_000_000, 3).unwrap_or_else(|e| unreachable!("{e}")))
    }
}

impl Times {
    /// Once more.
    pub fn take(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// How often.
    pub fn count(&self) -> u64 {
        self.0.len()
    }

    /// The median, the 99th percentile and the longest, in milliseconds.
    pub fn millis(&self) -> [f64; 3] {
        let micros = [self.0.value_at_quantile(0.5), self.0.value_at_quantile(0.99), self.0.max()];
        micros.map(|micros| micros as f64 / 1000.0)
    }
}
