//! A client of the bank: asks for transfers, and asks again, after a short and jittered pause, for those that were
//! refused or not answered: their key sees to it that they happen once. It reads what the proxy says: the problem of a refusal, the status of the locks.

use std::time::{Duration, Instant};

use reqwest::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use serde::Deserialize;

use crate::ledger::Balance;
use crate::transfers::{IDEMPOTENCY_KEY, Transfer};

/// A refusal: as much of its problem+json as this client uses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Problem {
    /// What kind of problem, as a URN.
    #[serde(rename = "type")]
    pub kind: String,
    /// What happened, in a sentence.
    pub detail: String,
    /// The lock that was refused.
    pub lock: Option<String>,
    /// The cycle that waiting would have closed.
    pub cycle: Vec<Edge>,
    /// When another try makes sense.
    pub retry_after_ms: Option<u64>,
}

/// One step of a wait-for cycle.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Edge {
    /// Who waits.
    pub owner: String,
    /// For which lock.
    pub waits_for: String,
    /// Who has it, or stands before.
    pub held_by: String,
}

impl Problem {
    /// The last part of its type: `deadlock`, say.
    pub fn slug(&self) -> &str {
        self.kind.rsplit(':').next().unwrap_or_default()
    }
}

/// How one try ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The money has moved.
    Completed,
    /// Refused, by the proxy or by the bank.
    Refused {
        /// The HTTP status.
        status: u16,
        /// What was wrong.
        problem: Problem,
        /// The body as it came.
        body: String,
    },
    /// Nobody answered in time.
    TimedOut,
    /// Anything else.
    Failed {
        /// In words.
        what: String,
    },
}

/// One try.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took.
    pub took: Duration,
    /// How long it stood in queues for locks, on all hops together.
    pub waited: Duration,
    /// What each hop says of its locks.
    pub lock_status: Vec<String>,
}

/// When to try again.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// How often at most, the first time included.
    pub attempts: u32,
    /// The longest first pause; it doubles from try to try.
    pub pause: Duration,
    /// The longest pause of all.
    pub max_pause: Duration,
}

impl Retry {
    /// Whether such an end is worth another try.
    fn helps(outcome: &Outcome) -> bool {
        match outcome {
            Outcome::Refused { status: 423 | 429 | 503, .. } => true,
            Outcome::Refused { problem, .. } => matches!(problem.slug(), "deadlock" | "lease-lost"),
            Outcome::TimedOut => true,
            Outcome::Completed | Outcome::Failed { .. } => false,
        }
    }

    /// The pause before the next try: anything from nothing to the bound, so that two that collided do not do so again.
    fn pause(&self, tries: u32, outcome: &Outcome) -> Duration {
        let bound = self.pause.saturating_mul(1 << tries.min(16)).min(self.max_pause);
        let jittered = bound.mul_f64(f64::from(random_u32()) / f64::from(u32::MAX));
        let asked = match outcome {
            Outcome::Refused { problem, .. } => problem.retry_after_ms.unwrap_or(0),
            _ => 0,
        };
        jittered.max(Duration::from_millis(asked).min(self.max_pause))
    }
}

/// A client.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base: String,
}

impl Client {
    /// A client of the proxy at `http://host:port`, that waits so long for an answer.
    pub fn new(base: &str, timeout: Duration) -> reqwest::Result<Self> {
        let http = reqwest::Client::builder().timeout(timeout).build()?;
        Ok(Client { http, base: base.trim_end_matches('/').to_owned() })
    }

    /// One try of a transfer, as a part of the trace that `trace` (32 hexadecimal digits) names.
    pub async fn attempt(&self, id: &str, trace: &str, transfer: &Transfer) -> Attempt {
        let started = Instant::now();
        let traceparent = format!("00-{trace}-{:08x}{:08x}-01", random_u32(), random_u32() | 1);
        let request = self.http.post(format!("{}/transfers", self.base));
        let request = request.header(IDEMPOTENCY_KEY, id).header("traceparent", traceparent).json(transfer);
        let (outcome, headers) = match request.send().await {
            Ok(response) => {
                let headers = response.headers().clone();
                (read(response).await, headers)
            }
            Err(error) => (failed(&error), HeaderMap::new()),
        };
        Attempt {
            outcome,
            took: started.elapsed(),
            waited: waited(&headers),
            lock_status: values(&headers, "lock-status"),
        }
    }

    /// A transfer, tried until it is completed, cannot be, or has been tried often enough. `watch` sees every try.
    pub async fn transfer(
        &self,
        id: &str,
        trace: &str,
        transfer: &Transfer,
        retry: Retry,
        mut watch: impl FnMut(u32, &Attempt),
    ) -> Attempt {
        let mut tries = 0;
        loop {
            let attempt = self.attempt(id, trace, transfer).await;
            tries += 1;
            watch(tries, &attempt);
            if tries >= retry.attempts || !Retry::helps(&attempt.outcome) {
                return attempt;
            }
            tokio::time::sleep(retry.pause(tries - 1, &attempt.outcome)).await;
        }
    }

    /// All accounts.
    pub async fn balances(&self) -> reqwest::Result<Vec<Balance>> {
        self.http.get(format!("{}/accounts", self.base)).send().await?.error_for_status()?.json().await
    }
}

async fn read(response: reqwest::Response) -> Outcome {
    let status = response.status().as_u16();
    let headers = response.headers().clone();
    let body = match response.text().await {
        Ok(body) => body,
        Err(error) => return failed(&error),
    };
    let is_problem = headers.get(CONTENT_TYPE).is_some_and(|t| t.as_bytes().starts_with(b"application/problem+json"));
    match status {
        200..=299 => Outcome::Completed,
        504 => Outcome::TimedOut,
        _ if is_problem => match serde_json::from_str::<Problem>(&body) {
            Ok(mut problem) => {
                let seconds = headers.get(RETRY_AFTER).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
                problem.retry_after_ms = problem.retry_after_ms.or(seconds.map(|s| s.saturating_mul(1000)));
                Outcome::Refused { status, problem, body }
            }
            Err(error) => Outcome::Failed { what: format!("{status} with a problem that is none ({error}): {body}") },
        },
        _ => Outcome::Failed { what: format!("{status}: {body}") },
    }
}

fn failed(error: &reqwest::Error) -> Outcome {
    if error.is_timeout() { Outcome::TimedOut } else { Outcome::Failed { what: error.to_string() } }
}

fn values(headers: &HeaderMap, name: &str) -> Vec<String> {
    headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect()
}

/// The sum of the `lock;dur=…` members of `server-timing`, one a hop.
fn waited(headers: &HeaderMap) -> Duration {
    let milliseconds: f64 = values(headers, "server-timing")
        .iter()
        .flat_map(|value| value.split(','))
        .filter_map(|member| member.trim().strip_prefix("lock;dur=")?.parse::<f64>().ok())
        .filter(|ms| ms.is_finite() && *ms >= 0.0)
        .sum();
    Duration::try_from_secs_f64(milliseconds / 1000.0).unwrap_or_default()
}

/// A trace id: 32 hexadecimal digits, not all of them 0.
pub fn trace_id() -> String {
    format!("{:08x}{:08x}{:08x}{:08x}", random_u32(), random_u32(), random_u32(), random_u32() | 1)
}

fn random_u32() -> u32 {
    // Without a source of randomness the clock is jitter enough.
    getrandom::u32().unwrap_or_else(|_| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |now| now.subsec_nanos())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_waits_of_all_hops_add_up() {
        let mut headers = HeaderMap::new();
        headers.append("server-timing", "lock;dur=132, db;dur=7".parse().unwrap());
        headers.append("server-timing", "lock;dur=0.5".parse().unwrap());
        headers.append("server-timing", "lock;dur=x".parse().unwrap());
        assert_eq!(waited(&headers), Duration::from_micros(132_500));
    }

    #[test]
    fn a_pause_stays_below_its_bound_and_not_below_what_the_server_asks_for() {
        let (pause, max_pause) = (Duration::from_millis(10), Duration::from_millis(80));
        let retry = Retry { attempts: 5, pause, max_pause };
        for tries in 0..40 {
            assert!(retry.pause(tries, &Outcome::TimedOut) <= max_pause);
            let problem = Problem { retry_after_ms: Some(50), ..Problem::default() };
            let asked = Outcome::Refused { status: 423, problem, body: String::new() };
            assert!((50..=80).contains(&retry.pause(tries, &asked).as_millis()));
        }
    }

    #[test]
    fn only_what_can_go_better_is_tried_again() {
        let refused = |status, slug: &str| Outcome::Refused {
            status,
            problem: Problem { kind: format!("urn:interlock:problem:{slug}"), ..Problem::default() },
            body: String::new(),
        };
        assert!(Retry::helps(&refused(409, "deadlock")));
        assert!(Retry::helps(&refused(423, "wait-timeout")));
        assert!(!Retry::helps(&refused(409, "order-violation")));
        assert!(!Retry::helps(&refused(400, "malformed-annotation")));
        assert!(Retry::helps(&Outcome::TimedOut));
        assert!(!Retry::helps(&Outcome::Completed));
    }

    #[test]
    fn trace_ids_are_what_traceparent_asks_for() {
        let id = trace_id();
        assert_eq!(id.len(), 32);
        assert!(id.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
        assert_ne!(id, trace_id());
    }
}
