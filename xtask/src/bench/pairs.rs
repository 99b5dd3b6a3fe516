//! Proxies side by side: each in turn, round after round, the first of a round another one each time, while all others stand still.
//! What is told of a variant is told against the one that it is compared to in the same round.
//!
//! That every answer was a 2xx and that every request did what it should (took its locks, made its calls) is checked each
//! time: what is broken is fast.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::load::{Load, Outcome};
use super::machine::{self, Cores};
use super::proxies::{self, Proxy};
use super::report::{Finding, Unit};

/// Connections of the load that fills a proxy.
pub const CONNECTIONS: u32 = 64;
/// The load that a proxy hardly notices, to see what it adds to one request: connections, and requests a second of each.
const CALM: (u32, u32) = (8, 100);

/// How long and how often.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    pub rounds: usize,
    pub warm_up: Duration,
    pub time: Duration,
}

/// What a request must have done, as the proxy counts it.
#[derive(Debug, Clone, Copy)]
pub enum Must {
    /// Nothing but be answered.
    Answer,
    /// Take so many locks.
    Lock(u64),
    /// Call a cluster so often.
    Call(&'static str, u64),
}

/// One thing that is measured: a proxy, and what is asked of it.
pub struct Variant {
    pub name: String,
    /// Which of the proxies.
    pub proxy: usize,
    /// In turn.
    pub paths: Vec<String>,
    pub must: Must,
    /// Which variant it is compared with; itself is the baseline.
    pub against: usize,
    /// Of the load that fills the proxy.
    pub connections: u32,
}

impl Variant {
    pub fn new(name: &str, proxy: usize, path: &str, must: Must) -> Self {
        let paths = vec![path.to_owned()];
        Variant { name: name.to_owned(), proxy, paths, must, against: 0, connections: CONNECTIONS }
    }

    pub fn against(mut self, variant: usize) -> Self {
        self.against = variant;
        self
    }

    /// The same proxy under a load of other connections: what it adds to a calm request is known, and not measured again.
    pub fn connections(mut self, connections: u32) -> Self {
        self.connections = connections;
        self
    }
}

/// What is compared with each other.
pub struct Field {
    pub proxies: Vec<Proxy>,
    pub variants: Vec<Variant>,
    /// What is told besides, of the same measurements: a row's name, a variant, and another one to compare it with.
    pub also: Vec<(&'static str, usize, usize)>,
    pub cores: Cores,
}

/// One measurement of one variant.
#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    rate: f64,
    /// Microseconds a request, of the proxy and of what is beside it.
    cpu: f64,
    beside: f64,
    /// Under full load, and calm: the median, and the 99th of a hundred.
    full: [f64; 2],
    calm: Option<[f64; 2]>,
    /// Of what the cores beside the proxy's can do.
    around: f64,
}

/// The columns of what is told.
pub const COLUMNS: [(&str, Unit); 11] = [
    (OF_BASELINE, Unit::Ratio),
    (BY_CPU, Unit::Ratio),
    ("requests/s", Unit::PerSecond),
    ("CPU µs", Unit::Micros),
    (MORE_CPU, Unit::Micros),
    ("p50 added, ms", Unit::Millis),
    ("p99 added, ms", Unit::Millis),
    ("p50 added at full load, ms", Unit::Millis),
    ("p99 added at full load, ms", Unit::Millis),
    ("CPU µs beside", Unit::Micros),
    ("other cores busy", Unit::Ratio),
];
/// So many of them are in the table; the others are in the JSON.
const SHOWN: usize = 7;
pub const OF_BASELINE: &str = "throughput";
/// The baseline's CPU time a request to its own: what the throughput is where nothing but the proxy's CPU limits it.
pub const BY_CPU: &str = "by CPU";
pub const MORE_CPU: &str = "CPU µs added";

impl Field {
    /// Measures all of it, and adds a row for each variant.
    pub async fn measure(&self, pace: Pace, finding: &mut Finding) -> Result<()> {
        for proxy in &self.proxies {
            proxy.pin(&self.cores)?;
            proxy.freeze()?;
        }
        let mut samples = vec![Vec::with_capacity(pace.rounds); self.variants.len()];
        for round in 0..pace.rounds {
            for turn in 0..self.variants.len() {
                let at = (round + turn) % self.variants.len();
                let variant = &self.variants[at];
                let sample = self.sample(variant, pace).await.with_context(|| variant.name.clone())?;
                samples[at].push(sample);
            }
            eprint!("\r{}: round {} of {}", finding.question, round + 1, pace.rounds);
        }
        eprintln!();
        let rows = self.variants.iter().enumerate().map(|(at, variant)| (variant.name.as_str(), at, variant.against));
        for (name, at, against) in rows.chain(self.also.iter().copied()) {
            let (mine, theirs) = (&samples[at], &samples[against]);
            let each = |tell: fn(&Sample, &Sample) -> f64| mine.iter().zip(theirs).map(|(m, t)| tell(m, t)).collect();
            let calm = |which: usize| {
                let added = |(mine, theirs): (&Sample, &Sample)| Some(mine.calm?[which] - theirs.calm?[which]);
                mine.iter().zip(theirs).filter_map(added).collect()
            };
            finding.row(
                name,
                &[
                    each(|mine, theirs| mine.rate / theirs.rate),
                    each(|mine, theirs| theirs.cpu / mine.cpu),
                    each(|mine, _| mine.rate),
                    each(|mine, _| mine.cpu),
                    each(|mine, theirs| mine.cpu - theirs.cpu),
                    calm(0),
                    calm(1),
                    each(|mine, theirs| mine.full[0] - theirs.full[0]),
                    each(|mine, theirs| mine.full[1] - theirs.full[1]),
                    each(|mine, _| mine.beside),
                    each(|mine, _| mine.around),
                ],
            );
        }
        finding.shown = SHOWN;
        Ok(())
    }

    async fn sample(&self, variant: &Variant, pace: Pace) -> Result<Sample> {
        let proxy = &self.proxies[variant.proxy];
        proxy.thaw()?;
        let calm = if variant.connections == CONNECTIONS {
            Some(self.put(variant, pace, CALM.0, Some(CALM.1)).await?.outcome.millis())
        } else {
            None
        };
        let full = self.put(variant, pace, variant.connections, None).await?;
        proxy.freeze()?;
        Ok(Sample { calm, ..full.sample() })
    }

    async fn put(&self, variant: &Variant, pace: Pace, connections: u32, rate: Option<u32>) -> Result<Put> {
        let proxy = &self.proxies[variant.proxy];
        let base = proxy.process.url();
        let load = Load {
            urls: variant.paths.iter().map(|path| format!("{base}{path}")).collect(),
            headers: Vec::new(),
            connections,
            rate,
            warm_up: pace.warm_up,
            time: pace.time,
        };
        // Asking an Envoy for its stats costs it as much as a hundred requests: that is not among what is counted.
        let done_before = self.done(proxy, variant.must).await?;
        let before = self.spent(proxy)?;
        let outcome = load.put(&self.cores.rest).await?;
        let after = self.spent(proxy)?;
        let done_after = self.done(proxy, variant.must).await?;
        // What was cut off at the end may have been done or not; of the load before this one, only now.
        let (least, most) = (outcome.answers, outcome.answers + 2 * u64::from(CONNECTIONS));
        let each = match variant.must {
            Must::Answer => 1,
            Must::Lock(each) | Must::Call(_, each) => each,
        };
        if let (Some(before), Some(after)) = (done_before, done_after) {
            let done = after - before;
            let must = variant.must;
            ensure!(
                (least * each..=most * each).contains(&done),
                "{least} answers, and {must:?} was done {done} times"
            );
        }
        let busy = (after.around.0 - before.around.0) as f64 / (after.around.1 - before.around.1).max(1) as f64;
        Ok(Put { outcome, cpu: after.cpu - before.cpu, beside: after.beside - before.beside, busy })
    }

    async fn done(&self, proxy: &Proxy, must: Must) -> Result<Option<u64>> {
        Ok(match (must, &proxy.process) {
            (Must::Answer, proxies::Process::Server(_)) => None,
            (Must::Answer, proxies::Process::Envoy(envoy)) => Some(proxies::answered(envoy).await?),
            (Must::Lock(_), process) => Some(proxies::acquired(process.envoy()?).await?),
            (Must::Call(cluster, _), process) => {
                Some(process.envoy()?.stat(&format!("cluster.{cluster}.upstream_rq_total")).await?)
            }
        })
    }

    fn spent(&self, proxy: &Proxy) -> Result<Spent> {
        let beside = proxy.beside.iter().map(|process| machine::cpu_micros(process.pid())).sum::<Result<f64>>()?;
        let cpu = machine::cpu_micros(proxy.process.pid())?;
        Ok(Spent { cpu, beside, around: machine::ticks(&self.cores.rest)? })
    }
}

/// What has been used so far.
struct Spent {
    cpu: f64,
    beside: f64,
    around: (u64, u64),
}

struct Put {
    outcome: Outcome,
    cpu: f64,
    beside: f64,
    busy: f64,
}

impl Put {
    fn sample(&self) -> Sample {
        let answers = self.outcome.answers as f64;
        Sample {
            rate: self.outcome.rate,
            cpu: self.cpu / answers,
            beside: self.beside / answers,
            full: self.outcome.millis(),
            calm: None,
            around: self.busy,
        }
    }
}
