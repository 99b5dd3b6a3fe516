//! Load on something that speaks HTTP/1.1, by h2load, and what came of it as h2load logs it request by request.
//!
//! Knows nothing of proxies or locks.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use interlock_testkit::tools;

use super::machine;

/// A load: so many connections that each send the next request when they have the answer, or at a rate.
#[derive(Debug, Clone)]
pub struct Load {
    /// What is asked for, in turn; every connection goes through it from the first.
    pub urls: Vec<String>,
    /// Header fields: `name: value`.
    pub headers: Vec<String>,
    pub connections: u32,
    /// Requests a second of each connection; as many as it can without.
    pub rate: Option<u32>,
    /// Not counted, at the beginning.
    pub warm_up: Duration,
    /// What is counted, after that.
    pub time: Duration,
}

/// What came of it, but for the warm-up.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Answers a second.
    pub rate: f64,
    /// How long they took, in microseconds.
    pub micros: Histogram<u64>,
    /// Answers in all, those of the warm-up too: each was a 2xx.
    pub answers: u64,
}

impl Outcome {
    /// How long the median took, and the 99th of a hundred, in milliseconds.
    pub fn millis(&self) -> [f64; 2] {
        [0.5, 0.99].map(|quantile| self.micros.value_at_quantile(quantile) as f64 / 1000.0)
    }
}

impl Load {
    /// Puts the load on, from these cores.
    ///
    /// # Errors
    /// When h2load does not do it, or an answer is not a 2xx.
    pub async fn put(&self, cores: &[usize]) -> Result<Outcome> {
        let (load, cores) = (self.clone(), cores.to_vec());
        // What a thread starts runs where the thread does: so one of its own.
        let (tell, told) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || tell.send(load.run(&cores)));
        told.await.context("the thread that runs h2load is gone")?
    }

    fn run(&self, cores: &[usize]) -> Result<Outcome> {
        let h2load = tools::h2load()?;
        machine::pin_thread(cores)?;
        let dir = tempfile::Builder::new().prefix("interlock-load-").tempdir()?;
        let (uris, log) = (dir.path().join("uris"), dir.path().join("log"));
        std::fs::write(&uris, self.urls.join("\n"))?;
        let mut command = Command::new(h2load);
        command.args(["--h1", "--threads", "1", "--clients", &self.connections.to_string()]);
        command.arg("--duration").arg(format!("{}ms", (self.warm_up + self.time).as_millis()));
        command.arg("--input-file").arg(&uris).arg("--log-file").arg(&log);
        for header in &self.headers {
            command.arg("--header").arg(header);
        }
        if let Some(rate) = self.rate {
            command.args(["--rps", &rate.to_string()]);
        }
        let out = command.stdin(Stdio::null()).output().context("cannot run h2load")?;
        ensure!(out.status.success(), "h2load failed: {}", String::from_utf8_lossy(&out.stderr));
        self.read(&log)
    }

    fn read(&self, log: &Path) -> Result<Outcome> {
        let text = std::fs::read_to_string(log).context("h2load wrote no log")?;
        let mut answers = Vec::new();
        for line in text.lines() {
            let mut fields = line.split('\t');
            let mut next = || fields.next().and_then(|field| field.parse::<i64>().ok());
            let (Some(start), Some(status), Some(took)) = (next(), next(), next()) else {
                bail!("h2load's log is not as it should be: {line}");
            };
            // Those that were under way when the time was over.
            if status == -1 {
                continue;
            }
            ensure!((200..300).contains(&status), "{} was answered with {status}", self.urls.join(", "));
            answers.push((start, u64::try_from(took)?));
        }
        let first = answers.iter().map(|(start, _)| *start).min().context("h2load got no answer")?;
        let from = first + i64::try_from(self.warm_up.as_micros())?;
        let to = from + i64::try_from(self.time.as_micros())?;
        let mut micros = Histogram::new_with_max(60_000_000, 3)?;
        for (start, took) in &answers {
            if (from..to).contains(&(start + i64::try_from(*took)?)) {
                micros.saturating_record(*took);
            }
        }
        ensure!(!micros.is_empty(), "h2load got no answer after its warm-up");
        let rate = micros.len() as f64 / self.time.as_secs_f64();
        Ok(Outcome { rate, micros, answers: answers.len() as u64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(log: &str) -> Result<Outcome> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("log");
        std::fs::write(&file, log).unwrap();
        let second = Duration::from_secs(1);
        let load =
            Load { urls: vec!["/".into()], headers: vec![], connections: 1, rate: None, warm_up: second, time: second };
        load.read(&file)
    }

    #[test]
    fn a_log_is_read_without_its_warm_up_and_its_end() {
        let outcome =
            read("5000000\t200\t1000\n5999500\t200\t1000\n6500000\t204\t3000\n6600000\t-1\t5\n7000000\t200\t9\n")
                .unwrap();
        assert_eq!((outcome.rate, outcome.answers), (2.0, 4));
        assert_eq!(outcome.micros.len(), 2);
        let [half, most] = outcome.millis();
        assert!((half - 1.0).abs() < 0.01 && (most - 3.0).abs() < 0.01, "{half} {most}");
    }

    #[test]
    fn an_answer_that_is_an_error_is_an_error() {
        assert!(read("5000000\t200\t1000\n6000000\t423\t1000\n").is_err());
        assert!(read("").is_err());
        assert!(read("5000000\t200\t1000\n").is_err());
        assert!(read("now\t200\t1000\n").is_err());
    }
}
