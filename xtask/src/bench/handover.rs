//! How soon a lock that many want goes from one to the next, and how evenly they wait.
//!
//! In an Envoy its access log tells: from when the last byte of the holder's answer was sent to when the first byte of the
//! next one's request went to the upstream, by one clock. Of services that are asked directly their clients tell.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use interlock_testkit::{Envoy, EnvoyConfig};
use serde_json::{Value, json};

use super::crowds;
use super::load::Load;
use super::machine::{self, Cores};
use super::nginx;
use super::pairs::Pace;
use super::proxies::{self, Process, Proxy};
use super::report::{Finding, Unit};
use super::servers::Server;
use super::services::Kind;
use crate::run::Times;

const WAITERS: [u32; 4] = [1, 2, 16, 256];
const ROUNDS: usize = 8;

pub const P50: &str = "hand-over p50, ms";
pub const WAITS: &str = "waits, p99 / p50";
pub const LOCAL: &str = "Interlock, local, two workers";
pub const AUTHORITY: &str = "Interlock, authority, by a sidecar";
pub const CALL: &str = "one bare call, for comparison";
const RESTY: &str = "nginx, resty-lock's algorithm";

pub fn row(of: &str, waiters: u32) -> String {
    format!("{of}, {waiters} waiter{}", if waiters == 1 { "" } else { "s" })
}

/// Something with a lock that many want.
struct Subject {
    name: &'static str,
    /// The first is asked.
    processes: Vec<Process>,
    how: How,
}

enum How {
    /// An Envoy's access log tells.
    Log,
    /// An nginx tells of each request.
    Moments,
    /// Clients of a service tell.
    Clients(Kind),
}

/// What one measurement tells: in milliseconds, and as a ratio.
struct Turn {
    /// None where it never went to one that waited.
    hand_over: Option<[f64; 2]>,
    waits: f64,
}

pub async fn hand_over(pace: Pace) -> Result<Finding> {
    let columns = [(P50, Unit::Millis), ("hand-over p99, ms", Unit::Millis), (WAITS, Unit::Ratio)];
    let mut finding = Finding::new("handover", "One lock that many want: from a release to the next grant", &columns);
    let upstream = nginx::upstream().await?;
    let cores = Cores::of(2)?;
    let mut subjects = vec![local(&upstream).await?, sidecar(&upstream).await?];
    let others = [
        (Kind::Leases, "Interlock, authority, by the lease API"),
        (Kind::EtcdLock, "etcd v3lock"),
        (Kind::Redis, "Redis, polled every 0.1 s (redis-py)"),
    ];
    for (kind, name) in others {
        match kind.start().await {
            Ok(service) => subjects.push(Subject { name, processes: vec![service.process], how: How::Clients(kind) }),
            Err(why) => finding.skip(name, why)?,
        }
    }
    match nginx::telling(upstream.address).await {
        Ok(server) => {
            subjects.push(Subject { name: RESTY, processes: vec![Process::Server(server)], how: How::Moments });
        }
        Err(why) => finding.skip(RESTY, why)?,
    }
    let (plain, calling, answerer) = calls(&upstream).await?;
    [&plain, &calling].into_iter().map(Process::pid).try_for_each(machine::freeze)?;
    subjects.iter().try_for_each(|subject| subject.awake(false))?;

    let turns: Vec<_> = (0..subjects.len()).flat_map(|at| WAITERS.map(|waiters| (at, waiters))).collect();
    let mut told: Vec<Vec<Turn>> = turns.iter().map(|_| Vec::new()).collect();
    let mut call = Vec::new();
    // One turn tells of hundreds of hand-overs.
    let rounds = pace.rounds.min(ROUNDS);
    for round in 0..rounds {
        for turn in 0..turns.len() {
            let at = (round + turn) % turns.len();
            let (subject, waiters) = (&subjects[turns[at].0], turns[at].1);
            subject.awake(true)?;
            let turn = subject.measure(waiters, pace, &cores).await.with_context(|| row(subject.name, waiters))?;
            subject.awake(false)?;
            told[at].push(turn);
        }
        call.push(one_call(&plain, &calling, pace, &cores).await?);
        eprint!("\rhandover: round {} of {rounds}", round + 1);
    }
    eprintln!();
    drop(answerer);
    for ((at, waiters), told) in turns.iter().zip(&told) {
        let hand_over = |which: usize| told.iter().filter_map(|turn| Some(turn.hand_over?[which])).collect();
        let waits = told.iter().map(|turn| turn.waits).collect();
        finding.row(&row(subjects[*at].name, *waiters), &[hand_over(0), hand_over(1), waits]);
    }
    finding.row(CALL, &[call.iter().map(|c| c[0]).collect(), call.iter().map(|c| c[1]).collect(), Vec::new()]);
    finding.note(
        "In Envoy and nginx each holder asks again at once; the upstream answers at once. nginx' lock then mostly goes to the one who has just had it: what is \
         told is how soon one that waited got it where one did, and the waits of all. Clients of services hold the lock for 2 ms and ask again when \
         another one has it. Where it is polled for they hold it for up to 0.1 s longer. At etcd they hold it for so long that all have waited \
         for 0.15 s, since an etcd tells a new watch only after up to 0.1 s.",
    );
    Ok(finding)
}

/// With an access log that has the moments of each request, in microseconds.
fn logged(config: EnvoyConfig) -> EnvoyConfig {
    let log = json!([{
        "name": "envoy.access_loggers.stdout",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
            "log_format": { "json_format": {
                "start": "%START_TIME(%s%6f)%",
                "forwarded": "%COMMON_DURATION(DS_RX_BEG:US_TX_BEG:us)%",
                "ended": "%COMMON_DURATION(DS_RX_BEG:DS_TX_END:us)%",
                "status": "%RESPONSE_CODE%",
            } },
        },
    }]);
    config.patch_hcm(|hcm| hcm["access_log"] = log.clone())
}

async fn local(upstream: &Server) -> Result<Subject> {
    let filter = proxies::interlock(&proxies::policy(json!({ "local": {} })))?;
    let config = logged(proxies::config(upstream, &[filter])).concurrency(2).patch(|bootstrap| {
        // Connections in turn to one worker and the other.
        bootstrap["static_resources"]["listeners"][0]["connection_balance_config"] = json!({ "exact_balance": {} });
    });
    Ok(Subject { name: LOCAL, processes: vec![proxies::envoy(config).await?], how: How::Log })
}

async fn sidecar(upstream: &Server) -> Result<Subject> {
    let Proxy { process, beside } = proxies::sidecar(upstream, logged).await?;
    let processes = std::iter::once(process).chain(beside).collect();
    Ok(Subject { name: AUTHORITY, processes, how: How::Log })
}

/// A plain Envoy, one that makes a call before each request, and what it calls.
async fn calls(upstream: &Server) -> Result<(Process, Process, Server)> {
    let answerer = nginx::answerer().await?;
    let plain = proxies::envoy(logged(proxies::config(upstream, &[]))).await?;
    let config = logged(proxies::config(upstream, &[proxies::calling("one")?]));
    let calling = proxies::envoy(proxies::http2(config, "answerer", answerer.address)).await?;
    Ok((plain, calling, answerer))
}

/// What a call adds to the time until a request goes on: the median, and the 99th of a hundred.
async fn one_call(plain: &Process, calling: &Process, pace: Pace, cores: &Cores) -> Result<[f64; 2]> {
    let mut millis = [[0.0; 3]; 2];
    for (process, millis) in [plain, calling].into_iter().zip(&mut millis) {
        machine::thaw(process.pid())?;
        let requests = requests(process.envoy()?, 1, pace, cores).await?.0;
        machine::freeze(process.pid())?;
        let mut times = Times::default();
        requests.iter().for_each(|request| times.take(micros(request.forwarded - request.arrived)));
        *millis = times.millis();
    }
    Ok([0, 1].map(|which| millis[1][which] - millis[0][which]))
}

impl Subject {
    /// Lets it run, or stand still where it can.
    fn awake(&self, awake: bool) -> Result<()> {
        if matches!(self.how, How::Clients(kind) if !kind.stands_still()) {
            return Ok(());
        }
        let set = if awake { machine::thaw } else { machine::freeze };
        self.processes.iter().map(Process::pid).try_for_each(set)
    }

    async fn measure(&self, waiters: u32, pace: Pace, cores: &Cores) -> Result<Turn> {
        let process = self.processes.first().context("nothing is asked")?;
        match self.how {
            How::Log => {
                let envoy = process.envoy()?;
                let before = proxies::acquired(envoy).await?;
                let (requests, waits) = requests(envoy, waiters + 1, pace, cores).await?;
                let granted = proxies::acquired(envoy).await? - before;
                // Some of the last load may have been answered only now.
                let answers = requests.len() as u64;
                ensure!(granted + u64::from(waiters) + 1 >= answers, "{answers} answers, {granted} grants");
                Ok(Turn { hand_over: told(&hand_overs(requests)), waits })
            }
            How::Moments => {
                let Process::Server(server) = process else { bail!("it is not an nginx") };
                let log = || std::fs::read_to_string(server.dir().join(nginx::MOMENTS));
                let before = log().map_or(0, |log| log.len());
                let outcome = load(process.url(), waiters + 1, pace).put(&cores.rest).await?;
                let lines = log().context("nginx tells of no request")?;
                let requests: Vec<_> = lines[before..].lines().filter_map(moments_of_nginx).collect();
                let (granted, answers) = (requests.len() as u64, outcome.answers);
                // Some may have been cut off before their answer.
                let most = answers + u64::from(waiters + 1);
                ensure!((answers..=most).contains(&granted), "{answers} answers, {granted} grants");
                let [wait, longest] = outcome.millis();
                // Whoever slept when the load was over sleeps on: half a second at the most, and has the lock then.
                let (mut length, start) = (0, std::time::Instant::now());
                while length < log()?.len() && start.elapsed() < Duration::from_secs(10) {
                    length = log()?.len();
                    tokio::time::sleep(Duration::from_millis(700)).await;
                }
                Ok(Turn { hand_over: told(&hand_overs(requests)), waits: longest / wait })
            }
            How::Clients(kind) => {
                let round =
                    crowds::go_round(kind, process.address(), waiters as usize, pace.time + pace.warm_up).await?;
                ensure!(round.hand_over.count() > 0, "nobody handed it over in {:?}: take more --millis", pace.time);
                let ([half, most, _], waits) = (round.hand_over.millis(), round.waits.millis());
                Ok(Turn { hand_over: Some([half, most]), waits: waits[1] / waits[0] })
            }
        }
    }
}

fn load(url: String, connections: u32, pace: Pace) -> Load {
    let urls = vec![url];
    Load { urls, headers: Vec::new(), connections, rate: None, warm_up: pace.warm_up, time: pace.time }
}

/// When a request came, went on to the upstream, and had been answered: in microseconds since 1970.
struct Moments {
    arrived: i64,
    forwarded: i64,
    ended: i64,
}

/// Those of all requests that so many connections make, and p99 / p50 of what they took.
async fn requests(envoy: &Envoy, connections: u32, pace: Pace, cores: &Cores) -> Result<(Vec<Moments>, f64)> {
    let before = envoy.access_log().len();
    let load = load(format!("{}/key/one", envoy.base_url()), connections, pace);
    let outcome = load.put(&cores.rest).await?;
    let start = std::time::Instant::now();
    // The log lags behind.
    while envoy.access_log().len() < before + usize::try_from(outcome.answers)? {
        ensure!(start.elapsed() < Duration::from_secs(10), "the access log lacks requests");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let requests = envoy.access_log().iter().skip(before).filter_map(moments).collect();
    let [half, most] = outcome.millis();
    Ok((requests, most / half))
}

fn moments(line: &Value) -> Option<Moments> {
    let number = |name: &str| {
        let value = line.get(name)?;
        value.as_i64().or_else(|| value.as_str()?.parse::<i64>().ok())
    };
    (number("status")? == 200).then_some(())?;
    let arrived = number("start")?;
    Some(Moments { arrived, forwarded: arrived + number("forwarded")?, ended: arrived + number("ended")? })
}

/// The median and the 99th of a hundred, if there are any.
fn told(times: &Times) -> Option<[f64; 2]> {
    let [half, most, _] = times.millis();
    (times.count() > 0).then_some([half, most])
}

/// As an nginx writes them; of a request that got the lock.
fn moments_of_nginx(line: &str) -> Option<Moments> {
    let mut fields = line.split(' ').map(str::parse);
    let mut next = || fields.next()?.ok();
    let (arrived, forwarded, ended): (i64, i64, i64) = (next()?, next()?, next()?);
    Some(Moments { arrived, forwarded, ended })
}

/// From the end of each to the next one's start, where the next one was there already.
fn hand_overs(mut requests: Vec<Moments>) -> Times {
    requests.sort_by_key(|request| request.forwarded);
    let mut times = Times::default();
    for pair in requests.windows(2) {
        if let [one, next] = pair
            && next.arrived < one.ended
        {
            times.take(micros(next.forwarded - one.ended));
        }
    }
    times
}

fn micros(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hand_overs_are_between_those_that_waited() {
        let line = |start: &str, forwarded: u32, ended: u32, status: u32| {
            moments(&json!({ "start": start, "forwarded": forwarded.to_string(), "ended": ended, "status": status }))
        };
        assert!(line("1000", 5, 10, 0).is_none() && moments(&json!({})).is_none());
        // The second waits for the first to end at 1100; the third comes when nobody holds the lock.
        let lines = [line("1050", 90, 200, 200), line("1000", 10, 100, 200), line("2000", 10, 100, 200)];
        let times = hand_overs(lines.into_iter().flatten().collect());
        let [half, _, most] = times.millis();
        assert!((half - 0.04).abs() < 0.001 && (most - 0.04).abs() < 0.001, "{half} {most}");
    }
}
