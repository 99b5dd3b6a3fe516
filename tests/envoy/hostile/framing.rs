//! Bad requests below the headers: lines, lengths, connections, HTTP/2's own headers, broken bytes.

use super::dice::Dice;
use super::forged::{forgery, spelling};
use super::shot::{Expect, Field, Shot, field};

/// NUL, bare CR, bare LF and folded lines, inside of values and between them.
pub fn lines(shot: &mut Shot, dice: &mut Dice) {
    let breaks: &[u8] = dice.pick(&[
        &b"\0"[..],
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n ",
        b"\r\n\t",
        b"\n ",
        b"\r\r\n",
        b"\x0b",
        b"\x0c",
        b"\x7f",
        b"\x1b",
    ]);
    let hidden = [b"lock-fence: ", &forgery(dice)[..]].concat();
    let value = match dice.below(4) {
        0 => [b"order/1", breaks, b";wait=0"].concat(),
        1 => [b"order/1;wait=0", breaks].concat(),
        2 => [b"x", breaks, &hidden].concat(),
        _ => [breaks, b"order/1"].concat(),
    };
    let name = dice.pick(&["lock", "x-tier", "lock-owner", "baggage", "lock-fence"]);
    shot.with(name, value);
    if dice.chance(20) {
        shot.fields.push(([b"x-a", breaks, b"lock-fence"].concat(), forgery(dice)));
    }
    shot.open_ended = true;
}

/// A request that hides in another's body.
fn hidden(dice: &mut Dice) -> Vec<u8> {
    let name = spelling(dice);
    [b"GET /hidden HTTP/1.1\r\nhost: test\r\n", &name[..], b": ", &forgery(dice), b"\r\n\r\n"].concat()
}

/// Lengths that contradict each other.
pub fn lengths(shot: &mut Shot, dice: &mut Dice) {
    let hidden = hidden(dice);
    let size = hidden.len();
    let framing = match dice.below(20) {
        0 => format!("content-length: {size}\r\ntransfer-encoding: chunked\r\n"),
        1 => format!("transfer-encoding: chunked\r\ncontent-length: {size}\r\n"),
        2 => format!("content-length: 0\r\ncontent-length: {size}\r\n"),
        3 => format!("content-length: {size}, {size}\r\n"),
        4 => format!("content-length: +{size}\r\n"),
        5 => "content-length: -1\r\n".to_owned(),
        6 => "content-length: 99999999999999999999\r\n".to_owned(),
        7 => "content-length: 0x10\r\n".to_owned(),
        8 => "transfer-encoding: xchunked\r\n".to_owned(),
        9 => "transfer-encoding: chunked, identity\r\n".to_owned(),
        10 => "transfer-encoding: identity, chunked\r\n".to_owned(),
        11 => "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n".to_owned(),
        12 => "transfer-encoding:\x0bchunked\r\n".to_owned(),
        13 => "transfer_encoding: chunked\r\n".to_owned(),
        14 => "Transfer-Encoding : chunked\r\n".to_owned(),
        15 => " transfer-encoding: chunked\r\n".to_owned(),
        16 => format!("content_length: {size}\r\n"),
        17 => "transfer-encoding: gzip, chunked\r\n".to_owned(),
        _ => "transfer-encoding: chunked\r\n".to_owned(),
    };
    let chunks: &[u8] = dice.pick(&[
        &b"0\r\n\r\n"[..],
        b"5\r\nhello\r\n0\r\n\r\n",
        b"ffffffffffffffff1\r\n",
        b"-1\r\n\r\n",
        b"5;ext=\"\r\n\"\r\nhello\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"5\nhello\n0\n\n",
        b"g\r\n",
        b"5\r\nhello\r\n0\r\nlock-fence: forged/1;fence=1\r\nlock_fence: forged/1\r\nlock: forged/1\r\n\r\n",
        b"",
    ]);
    let version = dice.pick(&["1.1", "1.1", "1.1", "1.0", "0.9", "2.0", "1.11"]);
    let lock = format!("order/{};wait=0.02", dice.below(100));
    let head = format!(
        "POST /plain HTTP/{version}\r\nhost: test\r\nx-shot: {}\r\nx-request-id: by-{}\r\nlock: {lock}\r\n{framing}\r\n",
        shot.number,
        dice.below(40),
    );
    shot.raw = Some([head.as_bytes(), chunks, &hidden].concat());
    shot.open_ended = true;
}

/// Headers that name other headers, for somebody on the way to take them out or to keep them.
pub fn hop_by_hop(shot: &mut Shot, dice: &mut Dice) {
    for _ in 0..dice.within(1, 3) {
        match dice.below(8) {
            0 => shot.with(
                "connection",
                dice.pick(&["lock-fence", "lock", "lock-status, close", "lock_fence", "traceparent", "x-request-id"]),
            ),
            1 => shot.with("connection", "keep-alive, Lock-Fence, te"),
            2 => shot.with("te", dice.pick(&["trailers", "trailers, deflate", "gzip"])),
            3 => shot.with("proxy-connection", "lock-fence"),
            4 => shot.with("keep-alive", "lock"),
            5 => {
                shot.with("connection", "upgrade, http2-settings");
                shot.with("upgrade", dice.pick(&["h2c", "websocket", "lock-fence"]));
                shot.with("http2-settings", "AAMAAABkAAQAAP__");
            }
            6 => shot.with("expect", dice.pick(&["100-continue", "lock-fence", ""])),
            _ => shot.with("via", "lock-fence"),
        }
    }
    shot.with("lock-fence", forgery(dice));
    shot.with("lock", format!("order/{};wait=0.02", dice.below(100)));
    // An upgrade that is waited for is no hang.
    shot.open_ended = true;
}

/// Pseudo headers that are missing, doubled, unknown or out of place.
pub fn pseudo(shot: &mut Shot, dice: &mut Dice) {
    let mut all: Vec<Field> =
        vec![field(":method", "GET"), field(":scheme", "http"), field(":authority", "test"), field(":path", "/plain")];
    for _ in 0..dice.within(1, 3) {
        let at = dice.below(all.len());
        match dice.below(9) {
            0 => drop(all.remove(at)),
            1 => all.push(all[at].clone()),
            2 => all.push(field(":lock", "forged/1")),
            3 => all.push(field(":lock-fence", forgery(dice))),
            4 => all[at].1 = dice.text(30),
            5 => all[at].1 = Vec::new(),
            6 => all.insert(at, field("lock-fence", forgery(dice))),
            7 => all.push(field(":protocol", dice.pick(&["websocket", "lock"]))),
            _ => all.push(field("host", "other")),
        }
        if all.is_empty() {
            break;
        }
    }
    shot.pseudo = Some(all);
    if dice.chance(30) {
        shot.fields.push((spelling(dice), forgery(dice)));
    }
}

/// A good request with some of its bytes broken, taken out, doubled or moved.
pub fn soup(shot: &mut Shot, dice: &mut Dice) {
    let mut good = Shot::new(shot.number, shot.class, shot.lane, 1000);
    good.path = b"/filled/1?q=1".to_vec();
    good.with("x-tier", "gold");
    good.with("lock", "order/1;wait=0.02, stock/2;mode=shared;ttl=1.5");
    good.with("lock-fence", forgery(dice));
    let mut bytes = good.h1();
    for _ in 0..dice.within(1, 8) {
        let at = dice.below(bytes.len());
        match dice.below(5) {
            0 => bytes[at] = dice.byte(),
            1 => drop(bytes.remove(at)),
            2 => bytes.insert(at, dice.byte()),
            3 => {
                let to = (at + 1).min(bytes.len() - 1);
                bytes.swap(at, to);
            }
            _ => {
                let piece = bytes[at..(at + dice.within(1, 30)).min(bytes.len())].to_vec();
                let to = dice.below(bytes.len());
                bytes.splice(to..to, piece);
            }
        }
        if bytes.is_empty() {
            bytes.push(b'\r');
        }
    }
    shot.raw = Some(bytes);
    shot.open_ended = true;
    shot.expect = Expect::Order;
}
