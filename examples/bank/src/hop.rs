//! Calls to other services through the proxy, and how their answers are passed on. The trace context goes with every
//! call: it is what makes the calls of one transfer one owner to Interlock. Nothing here knows of locks.

use std::time::Duration;

use axum::body::Bytes;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

use crate::ledger::LedgerError;

/// What a service passes on to the services that it calls, as any tracing library does.
const CONTEXT: [&str; 4] = ["traceparent", "tracestate", "baggage", "x-request-id"];
/// What it passes back to its own caller, so that the caller sees what the whole chain of calls went through.
const REPORT: [&str; 2] = ["lock-status", "server-timing"];

/// The proxy as a service reaches it.
#[derive(Clone, Debug)]
pub struct Proxy {
    http: reqwest::Client,
    base: String,
}

impl Proxy {
    /// A proxy at `http://host:port`.
    pub fn new(base: &str) -> reqwest::Result<Self> {
        // The routes' timeouts are shorter: this one is for a proxy that is gone.
        let http = reqwest::Client::builder().timeout(Duration::from_secs(30)).build()?;
        Ok(Proxy { http, base: base.trim_end_matches('/').to_owned() })
    }

    /// Calls on behalf of the request whose headers are given.
    pub async fn post<B: Serialize>(&self, path: &str, inbound: &HeaderMap, body: &B) -> Answer {
        let mut request = self.http.post(format!("{}{path}", self.base)).json(body);
        for name in CONTEXT {
            for value in inbound.get_all(name) {
                request = request.header(name, value);
            }
        }
        let response = match request.send().await {
            Ok(response) => response,
            Err(error) => return Answer::none(&error),
        };
        let (status, mut headers) = (response.status(), response.headers().clone());
        match response.bytes().await {
            Ok(body) => {
                let content_type = headers.remove(CONTENT_TYPE);
                headers = report(&headers);
                Answer { status, content_type, report: headers, body }
            }
            Err(error) => Answer::none(&error),
        }
    }
}

fn report(headers: &HeaderMap) -> HeaderMap {
    let names = REPORT.map(HeaderName::from_static);
    headers.iter().filter(|(name, _)| names.contains(name)).map(|(n, v)| (n.clone(), v.clone())).collect()
}

/// What another service, or the proxy in its place, answered.
#[derive(Debug)]
pub struct Answer {
    status: StatusCode,
    content_type: Option<HeaderValue>,
    report: HeaderMap,
    body: Bytes,
}

/// What an answer says about whether the call had its effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It had.
    Done,
    /// It had not, and will not.
    Refused,
    /// It may have had, or have it still.
    Unknown,
}

impl Answer {
    fn none(error: &reqwest::Error) -> Self {
        let status = if error.is_timeout() { StatusCode::GATEWAY_TIMEOUT } else { StatusCode::BAD_GATEWAY };
        let body = Bytes::from(format!("no answer through the proxy: {error}"));
        Answer { status, content_type: Some(HeaderValue::from_static("text/plain")), report: HeaderMap::new(), body }
    }

    /// Whether the call had its effect.
    pub fn effect(&self) -> Effect {
        if self.status.is_success() {
            return Effect::Done;
        }
        // A lock that was lost says that the call was under way.
        let lost = || {
            let problem: Option<Value> = serde_json::from_slice(&self.body).ok();
            problem.and_then(|p| p.get("type")?.as_str().map(|t| t.ends_with(":lease-lost"))).unwrap_or(false)
        };
        if self.status.is_client_error() && self.status != StatusCode::REQUEST_TIMEOUT && !lost() {
            Effect::Refused
        } else {
            Effect::Unknown
        }
    }

    /// What the calls below went through, for the answer of one's own.
    pub fn into_report(self) -> HeaderMap {
        self.report
    }
}

/// Passes the answer on as it is.
impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.report, self.body).into_response();
        if let Some(content_type) = self.content_type {
            response.headers_mut().insert(CONTENT_TYPE, content_type);
        } else {
            response.headers_mut().remove(CONTENT_TYPE);
        }
        response
    }
}

/// A refusal of the bank's own, as problem+json.
#[derive(Debug)]
pub struct Problem {
    status: StatusCode,
    slug: &'static str,
    detail: String,
}

impl Problem {
    /// What was asked for makes no sense.
    pub fn invalid(detail: impl Into<String>) -> Self {
        Problem { status: StatusCode::UNPROCESSABLE_ENTITY, slug: "invalid", detail: detail.into() }
    }
}

impl From<LedgerError> for Problem {
    fn from(error: LedgerError) -> Self {
        let (status, slug) = match &error {
            LedgerError::UnknownAccount(_) => (StatusCode::NOT_FOUND, "unknown-account"),
            LedgerError::InsufficientFunds { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "insufficient-funds"),
            LedgerError::IdReused(_) => (StatusCode::UNPROCESSABLE_ENTITY, "id-reused"),
            LedgerError::Overflow(_) => (StatusCode::UNPROCESSABLE_ENTITY, "overflow"),
        };
        Problem { status, slug, detail: error.to_string() }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = json!({
            "type": format!("urn:bank:problem:{}", self.slug),
            "status": self.status.as_u16(),
            "detail": self.detail,
        });
        (self.status, [(CONTENT_TYPE, "application/problem+json")], body.to_string()).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, body: &'static str) -> Answer {
        Answer {
            status: StatusCode::from_u16(status).unwrap(),
            content_type: None,
            report: HeaderMap::new(),
            body: Bytes::from_static(body.as_bytes()),
        }
    }

    #[test]
    fn only_a_refusal_says_that_nothing_happened() {
        assert_eq!(answer(200, "{}").effect(), Effect::Done);
        for status in [400, 404, 409, 422, 423, 429] {
            assert_eq!(answer(status, r#"{"type":"urn:interlock:problem:deadlock"}"#).effect(), Effect::Refused);
        }
        for status in [408, 500, 502, 503, 504] {
            assert_eq!(answer(status, "upstream request timeout").effect(), Effect::Unknown);
        }
        assert_eq!(answer(409, r#"{"type":"urn:interlock:problem:lease-lost"}"#).effect(), Effect::Unknown);
    }
}
