//! HTTP/2 below any library: any bytes as header names and values, frames in any order. Reads of an answer what can be
//! told without its headers: the status, the body, how it ended.

use std::net::SocketAddr;
use std::time::Duration;

use interlock_testkit::RawClient;

pub type Fields = [(Vec<u8>, Vec<u8>)];

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// The largest frame that the other side takes unasked.
const FRAME: usize = 16_384;

/// What came back on the first stream.
#[derive(Debug, Default)]
pub struct Answer {
    /// The status, where there was an answer.
    pub status: Option<u16>,
    /// The body.
    pub body: Vec<u8>,
    /// Whether the stream ended: whole, or by a reset, or with its connection.
    pub ended: bool,
}

/// One connection, with one request on it.
pub struct RawH2 {
    socket: RawClient,
}

impl RawH2 {
    /// Connects, and keeps the other side from indexing headers: each answer can be read for itself.
    pub async fn connect(address: SocketAddr) -> anyhow::Result<Self> {
        let mut socket = RawClient::connect(address).await?;
        let mut hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        hello.extend(frame(SETTINGS, 0, 0, &[0, 1, 0, 0, 0, 0]));
        socket.send(&hello).await?;
        Ok(RawH2 { socket })
    }

    /// Sends a block of headers or trailers on stream 1.
    pub async fn headers(&mut self, fields: &Fields, end: bool) -> anyhow::Result<()> {
        self.socket.send(&header_frames(fields, end)).await
    }

    /// Sends a part of the body on stream 1.
    pub async fn data(&mut self, bytes: &[u8], end: bool) -> anyhow::Result<()> {
        self.socket.send(&frame(DATA, if end { END_STREAM } else { 0 }, 1, bytes)).await
    }

    /// Takes stream 1 back.
    pub async fn reset(&mut self) -> anyhow::Result<()> {
        self.socket.send(&frame(RESET, 0, 1, &8_u32.to_be_bytes())).await
    }

    /// Any bytes.
    pub async fn send(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.socket.send(bytes).await
    }

    /// Any frame.
    pub async fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> anyhow::Result<()> {
        self.socket.send(&frame(kind, flags, stream, payload)).await
    }

    /// Closes this side's half.
    pub async fn half_close(&mut self) -> anyhow::Result<()> {
        self.socket.half_close().await
    }

    /// What comes back on stream 1 until it ends, or for so long.
    pub async fn answer(&mut self, patience: Duration) -> Answer {
        let mut answer = Answer::default();
        let read = async {
            while !answer.ended {
                match self.next().await {
                    // A connection that breaks ends its streams.
                    None => answer.ended = true,
                    Some((kind, flags, stream, payload)) => take(&mut answer, kind, flags, stream, &payload),
                }
            }
        };
        // What has not ended then says so.
        let _ = tokio::time::timeout(patience, read).await;
        answer
    }

    async fn next(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        let head = self.socket.take(9).await.ok()?;
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let stream = u32::from_be_bytes([head[5] & 0x7F, head[6], head[7], head[8]]);
        let payload = self.socket.take(length).await.ok()?;
        Some((head[3], head[4], stream, payload))
    }
}

fn take(answer: &mut Answer, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    match (kind, stream) {
        // Whatever is wrong with the connection is this stream's business: there is no other.
        (GOAWAY, _) | (RESET, 1) => answer.ended = true,
        (HEADERS, 1) => {
            // Trailers have none; what has 1xx is not the answer yet.
            answer.status = answer.status.filter(|status| *status >= 200).or_else(|| status(payload));
            answer.ended = flags & END_STREAM != 0;
        }
        (DATA, 1) => {
            answer.body.extend_from_slice(payload);
            answer.ended = flags & END_STREAM != 0;
        }
        _ => {}
    }
}

/// The status, which is the first field of a block (RFC 7541, with an empty dynamic table).
fn status(block: &[u8]) -> Option<u16> {
    // An update of the table's size may come first.
    let block = &block[block.iter().take_while(|byte| *byte & 0xE0 == 0x20).count()..];
    match block {
        [indexed @ 0x88..=0x8E, ..] => Some([200, 204, 206, 304, 400, 404, 500][usize::from(indexed - 0x88)]),
        [0x08 | 0x18 | 0x48, length, value @ ..] => {
            let value = value.get(..usize::from(length & 0x7F))?;
            let text = if length & 0x80 == 0 { String::from_utf8(value.to_vec()).ok()? } else { digits(value) };
            text.parse().ok()
        }
        _ => None,
    }
}

/// Huffman's code of digits: 0 to 2 have five bits, 3 to 9 six, in order.
fn digits(bytes: &[u8]) -> String {
    let bits: Vec<u8> = bytes.iter().flat_map(|byte| (0..8).rev().map(move |at| byte >> at & 1)).collect();
    let number = |bits: &[u8]| bits.iter().fold(0, |sum, bit| sum << 1 | bit);
    let (mut at, mut text) = (0, String::new());
    while let Some(five) = bits.get(at..at + 5).map(number) {
        let digit = match (five, bits.get(at..at + 6).map(number)) {
            (0..=2, _) => five,
            (_, Some(six @ 25..=31)) => six - 25 + 3,
            _ => break,
        };
        at += if digit < 3 { 5 } else { 6 };
        text.push(char::from(b'0' + digit));
    }
    text
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A block of headers, each spelled out.
pub fn block(fields: &Fields) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        string(&mut block, name);
        string(&mut block, value);
    }
    block
}

/// A block of headers as frames of stream 1.
fn header_frames(fields: &Fields, end: bool) -> Vec<u8> {
    let block = block(fields);
    let pieces: Vec<&[u8]> = block.chunks(FRAME).collect();
    let mut bytes = Vec::new();
    for (at, piece) in pieces.iter().enumerate() {
        let last = if at + 1 == pieces.len() { END_HEADERS } else { 0 };
        match at {
            0 => bytes.extend(frame(HEADERS, last | u8::from(end), 1, piece)),
            _ => bytes.extend(frame(CONTINUATION, last, 1, piece)),
        }
    }
    bytes
}

fn string(block: &mut Vec<u8>, text: &[u8]) {
    let mut length = text.len();
    if length < 127 {
        block.push(u8::try_from(length).unwrap());
    } else {
        block.push(127);
        length -= 127;
        while length >= 128 {
            block.push(u8::try_from(length % 128 + 128).unwrap());
            length /= 128;
        }
        block.push(u8::try_from(length).unwrap());
    }
    block.extend_from_slice(text);
}

#[test]
fn a_status_is_read_however_it_is_written() {
    assert_eq!(status(&[0x8C]), Some(400));
    assert_eq!(status(b"\x20\x48\x03409"), Some(409));
    // 5, 0, 2: 011011 00000 00010.
    assert_eq!(status(&[0x08, 0x82, 0b0110_1100, 0b0000_0010]), Some(502));
}
