//! A client below HTTP: any bytes out, and what comes back read with a deadline.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::wait::DEADLINE;

/// A TCP connection. Dropping it closes it.
#[derive(Debug)]
pub struct RawClient {
    stream: TcpStream,
    unread: Vec<u8>,
}

/// An HTTP/1.1 response, read from the bytes.
#[derive(Debug, Clone)]
pub struct RawResponse {
    /// The status.
    pub status: u16,
    /// The field lines, names in lower case.
    pub headers: Vec<(String, Vec<u8>)>,
    /// The body, without its framing.
    pub body: Vec<u8>,
}

impl RawResponse {
    /// The first field line of this name, with bytes that are no UTF-8 replaced.
    pub fn header(&self, name: &str) -> Option<String> {
        let found = self.headers.iter().find(|(n, _)| n == name)?;
        Some(String::from_utf8_lossy(&found.1).into_owned())
    }

    /// The body as text, with bytes that are no UTF-8 replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl RawClient {
    /// Connects.
    pub async fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, unread: Vec::new() })
    }

    /// Sends bytes as they are.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await.context("cannot send")
    }

    /// Sends a request's head with these field lines and no body, exactly as given.
    pub async fn request(&mut self, method: &str, path: &str, headers: &[(&str, &[u8])]) -> Result<()> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\n").into_bytes();
        for (name, value) in headers {
            head.extend_from_slice(name.as_bytes());
            head.extend_from_slice(b": ");
            head.extend_from_slice(value);
            head.extend_from_slice(b"\r\n");
        }
        head.extend_from_slice(b"\r\n");
        self.send(&head).await
    }

    /// Reads one response, for at most [`DEADLINE`].
    pub async fn response(&mut self) -> Result<RawResponse> {
        self.response_within(DEADLINE).await
    }

    /// Reads one response, for at most `deadline`. Interim (1xx) responses are passed over.
    ///
    /// # Errors
    /// When it is no HTTP/1.1 response, or not whole in time.
    pub async fn response_within(&mut self, deadline: Duration) -> Result<RawResponse> {
        tokio::time::timeout(deadline, self.read_response()).await.context("no whole response in time")?
    }

    /// Reads the response to a HEAD, which has no body whatever its length says, for at most [`DEADLINE`].
    pub async fn response_to_head(&mut self) -> Result<RawResponse> {
        tokio::time::timeout(DEADLINE, self.read_head()).await.context("no whole response in time")?
    }

    /// Reads until the other side closes, for at most [`DEADLINE`], and returns every byte.
    pub async fn read_to_end(&mut self) -> Result<Vec<u8>> {
        let mut all = std::mem::take(&mut self.unread);
        let end = tokio::time::timeout(DEADLINE, self.stream.read_to_end(&mut all)).await;
        end.context("the other side does not close")?.context("cannot read")?;
        Ok(all)
    }

    /// Closes this side's half: no more bytes come from here.
    pub async fn half_close(&mut self) -> Result<()> {
        self.stream.shutdown().await.context("cannot close one half")
    }

    /// Leaves with a reset (RST) instead of an orderly close.
    pub fn reset(self) -> Result<()> {
        self.stream.set_zero_linger().context("cannot set SO_LINGER")
    }

    async fn read_response(&mut self) -> Result<RawResponse> {
        loop {
            let response = self.read_head().await?;
            if (100..200).contains(&response.status) {
                continue;
            }
            return self.read_body(response).await;
        }
    }

    async fn read_head(&mut self) -> Result<RawResponse> {
        loop {
            let mut fields = vec![httparse::EMPTY_HEADER; 1024];
            let mut parsed = httparse::Response::new(&mut fields);
            if let httparse::Status::Complete(length) = parsed.parse(&self.unread).context("not an HTTP response")? {
                let field = |f: &httparse::Header<'_>| (f.name.to_ascii_lowercase(), f.value.to_vec());
                let status = parsed.code.unwrap_or_default();
                let headers = parsed.headers.iter().map(field).collect();
                self.unread.drain(..length);
                return Ok(RawResponse { status, headers, body: Vec::new() });
            }
            if !self.read_more().await? {
                bail!("closed before a whole head: {:?}", String::from_utf8_lossy(&self.unread));
            }
        }
    }

    async fn read_body(&mut self, mut response: RawResponse) -> Result<RawResponse> {
        if response.header("transfer-encoding").is_some_and(|v| v.contains("chunked")) {
            while let Some(chunk) = self.read_chunk().await? {
                response.body.extend(chunk);
            }
        } else if let Some(length) = response.header("content-length") {
            response.body = self.take(length.parse().context("content-length")?).await?;
        } else if response.status != 204 && response.status != 304 {
            while self.read_more().await? {}
            response.body = std::mem::take(&mut self.unread);
        }
        Ok(response)
    }

    /// One chunk; none after the last, whose trailers are read with it.
    async fn read_chunk(&mut self) -> Result<Option<Vec<u8>>> {
        let line = self.line().await?;
        let size = line.split(';').next().unwrap_or_default().trim();
        let size = usize::from_str_radix(size, 16).with_context(|| format!("a chunk's size: {line:?}"))?;
        if size == 0 {
            while !self.line().await?.is_empty() {}
            return Ok(None);
        }
        let chunk = self.take(size).await?;
        self.line().await?;
        Ok(Some(chunk))
    }

    async fn line(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.unread.windows(2).position(|w| w == b"\r\n") {
                let line = self.unread.drain(..end + 2).take(end).collect::<Vec<_>>();
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            if !self.read_more().await? {
                bail!("closed in the middle of a line");
            }
        }
    }

    /// Reads so many bytes.
    pub async fn take(&mut self, length: usize) -> Result<Vec<u8>> {
        while self.unread.len() < length {
            if !self.read_more().await? {
                bail!("closed after {} of {length} bytes", self.unread.len());
            }
        }
        Ok(self.unread.drain(..length).collect())
    }

    async fn read_more(&mut self) -> Result<bool> {
        Ok(self.stream.read_buf(&mut self.unread).await.context("cannot read")? > 0)
    }
}
