//! What every refusal has to say, whatever it is about: over HTTP as a problem, over gRPC as a status.

use interlock_testkit::Answer;
use interlock_testkit::client::Ask;
use serde_json::Value;

use crate::common::{Lane, owner};

/// What a refusal has to say.
#[derive(Clone, Copy)]
pub struct Refusal<'a> {
    pub http: u16,
    pub grpc: i32,
    pub slug: &'a str,
    pub lock: Option<&'a str>,
    pub mode: Option<&'a str>,
    pub owner: Option<u128>,
    /// Whether asking again can help.
    pub retry: bool,
}

/// The refusal of one request, over HTTP and over gRPC, checked in all that does not depend on the situation.
pub struct Refused {
    pub http: Answer,
    pub problem: Value,
    /// The decoded `grpc-message`.
    pub message: String,
}

impl Refused {
    /// What the refusal says to people.
    pub fn detail(&self) -> &str {
        self.problem["detail"].as_str().unwrap()
    }
}

impl Refusal<'_> {
    /// Sends a request both ways, with what `ask` adds to it, and checks what comes back. Neither may reach the upstream.
    pub async fn meets(&self, lane: &Lane, name: &str, by: u128, path: &str, ask: impl Fn(Ask) -> Ask) -> Refused {
        let http = ask(lane.ask(by, path)).send().await.unwrap();
        let grpc = ask(lane.grpc(by, path)).send().await.unwrap();
        let bare = path.split('?').next().unwrap();
        assert!(lane.upstream().requests_to(bare).is_empty(), "a refused request reached the upstream");
        let refused = Refused { problem: self.check_http(name, &http), message: self.check_grpc(name, &grpc), http };
        assert_eq!(untimed(&refused.message), untimed(refused.problem["detail"].as_str().unwrap()));
        refused
    }

    /// Checks the refusal of an HTTP request, and returns its problem.
    pub fn check_http(&self, name: &str, answer: &Answer) -> Value {
        assert_eq!(answer.status, self.http, "{}", answer.text());
        assert_eq!(answer.header("content-type").as_deref(), Some("application/problem+json"));
        let problem = answer.json();
        let of = |text: Option<&str>| text.map_or(Value::Null, Value::from);
        assert_eq!(problem["type"], format!("urn:interlock:problem:{}", self.slug));
        assert_eq!(problem["status"], self.http);
        assert_eq!(problem["lock"], of(self.lock), "{problem}");
        assert_eq!(problem["mode"], of(self.mode), "{problem}");
        assert_eq!(problem["owner"], of(self.owner.map(owner).as_deref()), "{problem}");
        assert!(problem["title"].as_str().is_some_and(|title| !title.is_empty()), "{problem}");
        assert_eq!(problem.get("cycle").is_some(), self.slug == "deadlock", "{problem}");
        let retry_ms = problem.get("retry_after_ms").map(|ms| ms.as_u64().unwrap());
        assert_eq!(retry_ms.is_some(), self.retry, "{problem}");
        assert!(retry_ms != Some(0), "{problem}");
        self.check_headers(name, answer, retry_ms);
        problem
    }

    /// Checks the refusal of a gRPC call, and returns its decoded message.
    pub fn check_grpc(&self, name: &str, answer: &Answer) -> String {
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("content-type").as_deref(), Some("application/grpc"));
        assert_eq!(answer.grpc_status(), Some(self.grpc));
        assert!(answer.body.is_empty(), "{}", answer.text());
        self.check_headers(name, answer, None);
        decode(&answer.grpc_message().unwrap())
    }

    fn check_headers(&self, name: &str, answer: &Answer, retry_ms: Option<u64>) {
        let lock = self.lock.map(|lock| format!(";lock=\"{lock}\"")).unwrap_or_default();
        let status = format!("{name};outcome=refused;reason={}{lock}", self.slug);
        assert_eq!(answer.joined("lock-status"), status);
        assert_eq!(answer.header("lock-fence"), None);
        let seconds = answer.header("retry-after").map(|seconds| seconds.parse::<u64>().unwrap());
        assert_eq!(seconds.is_some(), matches!(self.http, 423 | 429 | 503), "retry-after: {seconds:?}");
        assert!(seconds != Some(0));
        if let Some(ms) = retry_ms {
            assert_eq!(seconds, Some(ms.div_ceil(1000)));
        }
    }
}

/// A detail without the time that it names.
fn untimed(detail: &str) -> String {
    match detail.strip_prefix("waited ").and_then(|rest| rest.split_once(" s for ")) {
        Some((time, rest)) => {
            time.parse::<f64>().unwrap_or_else(|e| panic!("{detail}: {e}"));
            format!("waited for {rest}")
        }
        None => detail.to_owned(),
    }
}

/// Undoes percent-encoding.
fn decode(text: &str) -> String {
    let mut pieces = text.split('%');
    let mut decoded = pieces.next().unwrap().as_bytes().to_vec();
    for piece in pieces {
        let (digits, rest) = piece.split_at(2);
        decoded.push(u8::from_str_radix(digits, 16).unwrap_or_else(|e| panic!("{text}: {e}")));
        decoded.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(decoded).unwrap()
}
