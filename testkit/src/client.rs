//! An HTTP client for tests: HTTP/1.1 or HTTP/2 without TLS, sees every header and trailer as bytes, and leaves when it
//! is dropped.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Body;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Uri};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde_json::Value;
use tokio::task::JoinHandle;

/// No exchange of a test takes longer; one that does has hung.
const TIMEOUT: Duration = Duration::from_secs(60);

type OutBody = BoxBody<Bytes, Infallible>;

/// A client with a pool of connections of its own. A clone shares the pool.
#[derive(Debug, Clone)]
pub struct Client {
    inner: legacy::Client<HttpConnector, OutBody>,
}

/// What came back, whole.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// The trailers, where there were any.
    pub trailers: HeaderMap,
    /// From the first byte out to the last byte in.
    pub took: Duration,
}

/// A request in the making.
#[derive(Debug)]
pub struct Ask {
    client: Client,
    method: Method,
    url: String,
    headers: HeaderMap,
    body: OutBody,
    timeout: Duration,
}

/// A request on its way in the background.
#[derive(Debug)]
pub struct Pending(JoinHandle<Result<Answer>>);

/// Sends what is written when it is written.
fn prompt() -> HttpConnector {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector
}

impl Client {
    /// Speaks HTTP/1.1 and keeps connections open for the next request.
    pub fn http1() -> Self {
        Self { inner: legacy::Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(prompt()) }
    }

    /// Speaks HTTP/1.1, a connection a request: each may meet another worker, and sees the newest configuration.
    pub fn http1_fresh() -> Self {
        Self { inner: legacy::Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(prompt()) }
    }

    /// Speaks HTTP/2 from the first byte; all requests share a connection, and so a worker.
    pub fn http2() -> Self {
        Self { inner: legacy::Client::builder(TokioExecutor::new()).http2_only(true).build(prompt()) }
    }

    /// A GET.
    pub fn get(&self, url: impl Into<String>) -> Ask {
        self.ask(Method::GET, url)
    }

    /// A POST.
    pub fn post(&self, url: impl Into<String>) -> Ask {
        self.ask(Method::POST, url)
    }

    /// A unary gRPC call's request: over HTTP/2, `application/grpc`, one empty message.
    pub fn grpc(&self, url: impl Into<String>) -> Ask {
        self.post(url).header("content-type", "application/grpc").header("te", "trailers").body(vec![0_u8; 5])
    }

    /// Any method.
    pub fn ask(&self, method: Method, url: impl Into<String>) -> Ask {
        Ask {
            client: self.clone(),
            method,
            url: url.into(),
            headers: HeaderMap::new(),
            body: Full::default().boxed(),
            timeout: TIMEOUT,
        }
    }
}

impl Ask {
    /// Adds a header; a second one of the same name is a second field line. Any byte that HTTP allows in a value is.
    ///
    /// # Panics
    /// When the name or the value is not one HTTP allows: use [`crate::RawClient`] for those.
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let value = HeaderValue::from_bytes(value.as_ref()).unwrap_or_else(|e| panic!("value of {name}: {e}"));
        self.headers.append(name, value);
        self
    }

    /// Makes the trace of this number the owner: a `traceparent` of its own.
    pub fn trace(self, number: u128) -> Self {
        self.header("traceparent", traceparent(number))
    }

    /// The body.
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = Full::new(body.into()).boxed();
        self
    }

    /// A body that streams: it ends when the sender is dropped.
    pub fn stream<B>(mut self, body: B) -> Self
    where
        B: Body<Data = Bytes, Error = Infallible> + Send + Sync + 'static,
    {
        self.body = body.boxed();
        self
    }

    /// The longest the whole exchange may take. Default: 60 s.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sends it and waits for all of the answer. Dropping the future makes the client leave: HTTP/1.1 closes the
    /// connection, HTTP/2 resets the stream.
    ///
    /// # Errors
    /// When no whole answer came back in time.
    pub async fn send(self) -> Result<Answer> {
        let what = format!("{} {}", self.method, self.url);
        let timeout = self.timeout;
        match tokio::time::timeout(timeout, self.exchange()).await {
            Ok(done) => done.context(what),
            Err(_) => Err(anyhow!("no answer in {timeout:?}").context(what)),
        }
    }

    /// Sends it in the background.
    pub fn spawn(self) -> Pending {
        Pending(tokio::spawn(self.send()))
    }

    async fn exchange(self) -> Result<Answer> {
        let start = Instant::now();
        let uri: Uri = self.url.parse()?;
        let mut request = Request::new(self.body);
        *request.method_mut() = self.method;
        *request.uri_mut() = uri;
        *request.headers_mut() = self.headers;
        let response = self.client.inner.request(request).await?;
        let (head, body) = response.into_parts();
        let body = body.collect().await?;
        let trailers = body.trailers().cloned().unwrap_or_default();
        Ok(Answer {
            status: head.status.as_u16(),
            headers: head.headers,
            body: body.to_bytes(),
            trailers,
            took: start.elapsed(),
        })
    }
}

impl Pending {
    /// Waits for the answer.
    ///
    /// # Errors
    /// When no whole answer came back in time.
    pub async fn answer(self) -> Result<Answer> {
        self.0.await?
    }

    /// Whether it has been answered (or has failed).
    pub fn is_answered(&self) -> bool {
        self.0.is_finished()
    }

    /// Leaves without waiting: the connection is closed (HTTP/1.1) or the stream reset (HTTP/2) when this returns or
    /// soon after.
    pub async fn leave(self) {
        self.0.abort();
        // Cancelled is what it is meant to be; answered just before is as good.
        let _ = self.0.await;
    }
}

impl Answer {
    /// A header's value (the first field line), with bytes that are no UTF-8 replaced.
    pub fn header(&self, name: &str) -> Option<String> {
        self.headers.get(name).map(text)
    }

    /// All field lines of a header, joined by `, `.
    pub fn joined(&self, name: &str) -> String {
        self.headers.get_all(name).iter().map(text).collect::<Vec<_>>().join(", ")
    }

    /// The body as text, with bytes that are no UTF-8 replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// When it is not JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e} in the body of {}: {}", self.status, self.text()))
    }

    /// The gRPC status, from the trailers or from an answer that is only trailers.
    pub fn grpc_status(&self) -> Option<i32> {
        self.trailer("grpc-status")?.parse().ok()
    }

    /// The gRPC message, as sent: percent-encoded.
    pub fn grpc_message(&self) -> Option<String> {
        self.trailer("grpc-message")
    }

    fn trailer(&self, name: &str) -> Option<String> {
        self.trailers.get(name).or_else(|| self.headers.get(name)).map(text)
    }
}

/// A `traceparent` whose trace id is this number (which must not be 0).
pub fn traceparent(number: u128) -> String {
    format!("00-{number:032x}-00000000000000aa-01")
}

fn text(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).into_owned()
}
