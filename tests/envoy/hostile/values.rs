//! Bad values of headers, and paths and queries that locks are named after.

use super::dice::Dice;
use super::forged::FORGED_NAME;
use super::shot::{Expect, Shot};

/// Headers that the filter reads or removes.
const READ: [&str; 11] = [
    "lock",
    "lock-fence",
    "lock-status",
    "traceparent",
    "x-request-id",
    "baggage",
    "lock-owner",
    "x-tier",
    "grpc-timeout",
    "x-envoy-expected-rq-timeout-ms",
    "content-type",
];

/// Each byte comes in turn.
pub fn bytes(shot: &mut Shot, round: usize, dice: &mut Dice) {
    let byte = u8::try_from(round % 256).unwrap();
    let name = if dice.chance(50) { "lock" } else { dice.pick(&READ) };
    let value = match dice.below(6) {
        0 => vec![byte],
        1 => [b"order/", &[byte][..]].concat(),
        2 => [b"\"order/", &[byte][..], b"\""].concat(),
        3 => [b"order/1;mode=", &[byte][..]].concat(),
        4 => [b"order/1;", &[byte][..], b"=1"].concat(),
        _ => [b"order/1, ", &[byte][..]].concat(),
    };
    if name == "lock" && byte >= 0x80 {
        shot.expect = Expect::Refused("malformed-annotation");
    }
    if name == "x-tier" {
        shot.path = b"/filled/1".to_vec();
    }
    if matches!(name, "traceparent" | "x-request-id" | "baggage" | "lock-owner") {
        shot.owner = None;
    }
    shot.with(name, value);
}

pub fn unicode(shot: &mut Shot, dice: &mut Dice) {
    const BROKEN: [&[u8]; 9] = [
        b"\xC0\xAF",
        b"\xE0\x80\xAF",
        b"\xF0\x80\x80\xAF",
        b"\xED\xA0\x80\xED\xB0\x80",
        b"\xF4\x90\x80\x80",
        b"\xF8\x88\x80\x80\x80",
        b"\xE2\x82",
        b"\x80\x80",
        b"\xEF\xBB\xBF",
    ];
    let bad = dice.pick(&BROKEN);
    let name = dice.pick(&READ);
    if matches!(name, "traceparent" | "x-request-id" | "baggage" | "lock-owner") {
        shot.owner = None;
    }
    let around = dice.pick(&["", "order/", "\"order/", "lock-owner=", "a=b,lock-owner=%", "00-"]);
    shot.with(name, [around.as_bytes(), bad, dice.pick(&["", "\"", "-01", ";p=1"]).as_bytes()].concat());
    if dice.chance(30) {
        shot.path = [b"/filled/", bad].concat();
    }
}

pub fn sizes(shot: &mut Shot, dice: &mut Dice) {
    let limit = if shot.lane == "roomy" { 512 * 1024 } else { 60 * 1024 };
    let size = match dice.below(4) {
        0 => dice.within(limit - 400, limit + 400),
        1 => dice.within(250, 260),
        2 => dice.within(1, limit),
        _ => dice.within(limit, limit + limit / 4),
    };
    let name = dice.pick(&READ);
    let piece = dice.pick(&["a", "a,", "(", "\"", ";x=1", "%", "order/1, ", "\\\\", " ", "=", "a=b,", "9", "-"]);
    let filler = piece.repeat(size / piece.len() + 1).into_bytes();
    shot.with(name, &filler[..size]);
    if dice.chance(20) {
        shot.fields.push((
            filler[..size.min(20_000)].iter().filter(|it| it.is_ascii_alphanumeric()).copied().collect(),
            b"1".to_vec(),
        ));
        shot.fields.retain(|(name, _)| !name.is_empty());
    }
}

pub fn counts(shot: &mut Shot, dice: &mut Dice) {
    let count = *dice.pick(&[&1_usize, &2, &15, &16, &17, &64, &1000, &4095, &4096, &4097, &5000]);
    match dice.below(6) {
        0 => shot.with("lock", (0..count).map(|n| format!("order/{n}")).collect::<Vec<_>>().join(", ")),
        1 => shot.with("lock", vec!["order/1"; count].join(",")),
        2 => (0..count).for_each(|n| shot.with("lock", format!("order/{}", n % 20))),
        3 => shot.with("lock", format!("order/1{}", ";x=1".repeat(count))),
        4 => (0..count).for_each(|n| {
            shot.with(dice.pick(&["lock_fence", "lock-fence", "x-many"]), format!("{FORGED_NAME};fence={n}"))
        }),
        _ => (0..count.min(1000)).for_each(|n| shot.with("baggage", format!("k{n}=v"))),
    }
}

/// What is nearly a List: the words of the grammar in any order.
pub fn structure(dice: &mut Dice) -> Vec<u8> {
    const WORDS: [&str; 30] = [
        "order/1",
        "account/2",
        "\"stock/3\"",
        "pool/4",
        ",",
        ", ",
        ";",
        "; ",
        "=",
        "(",
        ")",
        "\"",
        "\\",
        "\\\"",
        ":AAAA:",
        ":",
        "?1",
        "?0",
        "@1700000000",
        "%\"%c3%bc\"",
        "wait=1",
        "mode=shared",
        "mode=exclusive",
        "ttl=1",
        "hold=1",
        "*",
        "1.5",
        "-1",
        "\t",
        " ",
    ];
    if dice.chance(20) {
        let deep = dice.within(1, 8000);
        return ["(".repeat(deep), "order/1".to_owned(), ")".repeat(dice.below(deep + 1))].concat().into_bytes();
    }
    (0..dice.within(1, 40)).flat_map(|_| dice.pick(&WORDS).bytes()).collect()
}

pub fn numbers(shot: &mut Shot, dice: &mut Dice) {
    const BAD: [&str; 24] = [
        "9999999999999999",
        "-9999999999999999",
        "1e3",
        "1E400",
        "0x10",
        "1.0001",
        "1.",
        ".5",
        "1234567890123.5",
        "--1",
        "-0.001",
        "-1",
        "NaN",
        "inf",
        "1s",
        "1,5",
        "@1700000000",
        "?1",
        "\"1\"",
        ":MQ==:",
        "(1)",
        "+1",
        "1_000",
        "",
    ];
    const EXTREME: [&str; 6] = ["999999999999999", "999999999999.999", "0.001", "0.0", "-0", "000000000000001"];
    let parameter = dice.pick(&["wait", "ttl", "hold"]);
    if dice.chance(75) {
        let number = dice.pick(&BAD);
        shot.with("lock", format!("order/{};{parameter}={number}", dice.below(100)));
        // "1,5" is a second member that is no lock; whatever it is, it is malformed.
        shot.expect = Expect::Refused("malformed-annotation");
    } else {
        shot.with("lock", format!("order/{};wait=0.01;{parameter}={}", dice.below(100), dice.pick(&EXTREME)));
    }
}

pub fn doubles(shot: &mut Shot, dice: &mut Dice) {
    let lock = dice.below(100);
    let malformed = match dice.below(7) {
        0 => format!("order/{lock},,order/2"),
        1 => format!("order/{lock},"),
        2 => format!(",order/{lock}"),
        3 => " , ".to_owned(),
        4 => format!("order/{lock};wait=0.01;wait=bad;wait=0.02;mode=no;mode=shared"),
        5 => format!("order/{lock};wait=0.01;mode=shared, order/{lock};mode=exclusive;wait=0"),
        _ => format!("order/{lock};wait=0;wait"),
    };
    shot.with("lock", &malformed);
    if malformed.contains(",,") || malformed.starts_with([',', ' ']) || malformed.ends_with([',', 't']) {
        shot.expect = Expect::Refused("malformed-annotation");
    }
    if dice.chance(30) {
        shot.with("Lock", "order/1;wait=0");
        shot.expect = Expect::Order;
    }
}

pub fn owners(shot: &mut Shot, dice: &mut Dice) {
    const TRACES: [&str; 12] = [
        "00-00000000000000000000000000000000-00000000000000aa-01",
        "00-0000000000000000000000000000000g-00000000000000aa-01",
        "ff-0000000000000000000000000000000a-00000000000000aa-01",
        "00-0000000000000000000000000000000A-00000000000000AA-01",
        "00-0000000000000000000000000000000a-0000000000000000-01",
        "00-0000000000000000000000000000000a-00000000000000aa-01-extra",
        "cc-0000000000000000000000000000000a-00000000000000aa-01-extra",
        "00-0000000000000000000000000000000a",
        "00--00000000000000aa-01",
        "----",
        "",
        " 00-0000000000000000000000000000000a-00000000000000aa-01 ",
    ];
    const BAGGAGE: [&str; 10] = [
        "lock-owner",
        "lock-owner=",
        "lock-owner=a=b=c",
        "lock-owner=%",
        "lock-owner=%zz",
        "lock-owner=%00",
        ",,,",
        "=,=",
        "a;b;c",
        "lock-owner=a;p=1,lock-owner=b",
    ];
    shot.owner = None;
    shot.with("lock", format!("order/{};wait=0.01", dice.below(100)));
    for _ in 0..dice.within(1, 4) {
        match dice.below(5) {
            0 => shot.with("traceparent", dice.pick(&TRACES)),
            1 => shot.with("baggage", dice.pick(&BAGGAGE)),
            2 => {
                let size = dice.within(0, 600);
                shot.with(dice.pick(&["lock-owner", "x-request-id", "baggage", "traceparent"]), dice.text(size));
            }
            3 => shot.with("baggage", format!("lock-owner={}", "%41".repeat(dice.below(200)))),
            _ => shot.with("tracestate", dice.text(50)),
        }
    }
}

pub fn timeouts(shot: &mut Shot, dice: &mut Dice) {
    const TIMES: [&str; 18] = [
        "0S",
        "1",
        "S",
        "99999999H",
        "999999999H",
        "-1S",
        "1.5S",
        "1s",
        "0n",
        "1u",
        "00000001m",
        "1 S",
        "",
        "0",
        "1e9",
        "99999999999999999999",
        "-1",
        "\u{0663}S",
    ];
    shot.with("grpc-timeout", dice.pick(&TIMES));
    shot.with("x-envoy-expected-rq-timeout-ms", dice.pick(&TIMES));
    if dice.chance(30) {
        shot.with("x-envoy-upstream-rq-timeout-ms", dice.pick(&TIMES));
    }
    let lock = format!("order/{};wait={}", dice.below(5), dice.pick(&["0", "0.05", "0.2", "1000"]));
    let asks = shot.fields.iter().any(|(name, _)| name == b"lock");
    if !asks {
        shot.with("lock", lock);
    }
}

pub fn paths(shot: &mut Shot, dice: &mut Dice) {
    const PIECES: [&str; 32] = [
        "/", "//", "/.", "/..", "/%2e%2e", "/%2E", "%2f", "%2F", "%5c", "\\", "%00", "%zz", "%", "%2", "%252f", ";",
        ";a=b", "#", "?", "??", "filled", "orders", "do", "{id}", "*", "a", "%41", "\u{e9}", "%ff", "+", "~", ":",
    ];
    shot.path = match dice.below(8) {
        0 => b"*".to_vec(),
        1 => b"http://other/filled/1".to_vec(),
        2 => [b"/filled/", "a".repeat(dice.within(200, 20_000)).as_bytes()].concat(),
        3 => [b"/filled/", &dice.text(20)[..]].concat().into_iter().filter(|it| *it != b' ').collect(),
        4 => format!("/orders/{}/do", dice.pick(&PIECES)).into_bytes(),
        5 => format!("/filled{}{}", dice.pick(&PIECES), dice.pick(&PIECES)).into_bytes(),
        _ => ["/", &(0..dice.within(1, 12)).map(|_| dice.pick(&PIECES)).collect::<String>()].concat().into_bytes(),
    };
    shot.with("x-tier", "gold");
    shot.method = dice.pick(&["GET", "POST", "OPTIONS", "TRACE", "LOCK", "UNLOCK", "PATCH", "BREW", "get"]).into();
}

pub fn queries(shot: &mut Shot, dice: &mut Dice) {
    const PIECES: [&str; 20] = [
        "q", "=", "&", "q=1", "q=", "&&", "=1", "q=%2F", "q=%", "q=%zz", "q=%00", "q=a+b", "Q=1", "q[]=1", "?", "#",
        "%71=1", ";", "q=\u{e9}", "x=1",
    ];
    let mut query: String = (0..dice.within(0, 8)).map(|_| dice.pick(&PIECES)).collect();
    if dice.chance(10) {
        query += &"&x=1".repeat(dice.within(100, 3000));
    }
    shot.path = format!("/queried?{query}").into_bytes();
}
