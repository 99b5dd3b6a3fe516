//! Requests with a `lock` header.

use serde_json::Value;

use crate::{Seeds, pages};

const TRACE: &str = "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\n";

/// Examples of RFC 9651, sections 3.1 to 3.3 and 4.2: most are no annotation, and all are structured fields.
const RFC_9651: [&str; 34] = [
    "sugar, tea, rum",
    "sugar, tea,     rum",
    "(\"foo\" \"bar\"), (\"baz\"), (\"bat\" \"one\"), ()",
    "(\"foo\"; a=1;b=2);lvl=5, (\"bar\" \"baz\");lvl=1",
    "abc;a=1;b=2; cde_456, (ghi;jk=4 l);q=\"9\";r=w",
    "1; a; b=?0",
    "en=\"Applepie\", da=:w4ZibGV0w6ZydGU=:",
    "a=?0, b, c; foo=bar",
    "rating=1.5, feelings=(joy sadness)",
    "a=(1 2), b=3, c=4;aa=bb, d=(5 6);valid",
    "5; foo=bar",
    "2; foourl=\"https://foo.example.com/\"",
    "42",
    "-42",
    "-0",
    "999999999999999",
    "4.5",
    "123456789012.123",
    "0.0",
    "\"hello world\"",
    "\"hello \\\"world\\\" \\\\\"",
    "foo123/456",
    "*token!#$%&'*+-.^_`|~:/",
    ":cHJldGVuZCB0aGlzIGlzIGJpbmFyeSBjb250ZW50Lg==:",
    ":cHJldGVuZCB0aGlzIGlzIGJpbmFyeSBjb250ZW50Lg:",
    "?1",
    "?0",
    "@1659578233",
    "@-1659578233",
    "%\"This is intended for display to %c3%bc users.\"",
    "a;b;c=1;b=2",
    "a;B=1",
    "text/html;charset=utf-8, text/plain;q=0.5",
    "a, b,",
];

/// Annotations, right and wrong.
const WRITTEN: [&str; 70] = [
    "order/42",
    "order/42;wait=1.5;ttl=5, stock/7;mode=shared",
    "\"order/42\"",
    "order/%34%32",
    "order/a%2fb",
    "\"order/@a:b~c\"",
    "order/42;wait=0",
    "order/42;wait=0.0",
    "order/42;wait=0.001",
    "order/42;wait=-1",
    "order/42;wait",
    "order/42;wait=?1",
    "order/42;wait=\"1\"",
    "order/42;wait=1e3",
    "order/42;wait=1.0005",
    "order/42;wait=999999999999999",
    "order/42;wait=1234567890123456",
    "order/42;ttl=0",
    "order/42;ttl=0.001",
    "order/42;ttl=999999999999.999",
    "order/42;hold=0.0",
    "order/42;hold=60;ttl=120",
    "order/42;mode=exclusive",
    "order/42;mode=\"shared\"",
    "order/42;mode=exlusive",
    "order/42;mode=SHARED",
    "order/42;mode=1",
    "order/42;mode",
    "order/42;mode=shared;mode=exclusive",
    "order/42;mode=bad;mode=shared",
    "stock/a/b;mode=intent-shared",
    "stock/a/b;mode=intent-exclusive",
    "stock;mode=shared-intent-exclusive",
    "order/42;mode=intent-shared",
    "order/42;unknown=1;other;x=:AA==:;y=@1",
    "order/42;Wait=1",
    "order/42;wait=1;wait=2;wait=3",
    "order/1, order/1",
    "order/1;mode=shared, order/1;wait=1, order/1;ttl=3;hold=9",
    "order/2, order/1, stock/3, a",
    "a, b, c",
    "a,b,c,d,e,f,g,h,i,j,k,l,m,n,o,p",
    "a,b,c,d,e,f,g,h,i,j,k,l,m,n,o,p,q",
    "a;mode=shared, a;mode=intent-exclusive",
    "b;mode=shared;wait=3;ttl=1;hold=9, a, b;mode=intent-exclusive;wait=2;ttl=4;hold=8, b;wait=5",
    "",
    " ",
    ",",
    ";",
    "a,",
    ",a",
    "a,,b",
    "a b",
    "a;",
    "a;=1",
    "a;wait=",
    "a//b",
    "/a",
    "a/",
    "a/%",
    "a/%4",
    "a/%zz",
    "\"\"",
    "\"a b\"",
    "\"a\\\"b\"",
    "\"a",
    "a\u{fc}",
    "a\tb",
    "(a)",
    "(a b);wait=1",
];

/// What else a request may say, beside a lock.
const AROUND: [&str; 44] = [
    "content-type: application/grpc\ngrpc-timeout: 250m\n",
    "content-type: application/grpc+proto\ngrpc-timeout: 1S\n",
    "content-type: application/grpc;charset=utf-8\ngrpc-timeout: 99999999u\n",
    "content-type: application/grpc\ngrpc-timeout: 2H\n",
    "content-type: application/grpc\ngrpc-timeout: 99999999H\n",
    "content-type: application/grpc\ngrpc-timeout: 3M\n",
    "content-type: application/grpc\ngrpc-timeout: 0n\n",
    "content-type: application/grpc\ngrpc-timeout: 123456789m\n",
    "content-type: application/grpc\ngrpc-timeout: m\n",
    "content-type: application/grpc\ngrpc-timeout: -1S\n",
    "content-type: application/grpc\ngrpc-timeout: 1s\n",
    "content-type: application/grpc\ngrpc-timeout: 1 S\n",
    "content-type: application/grpc-web\ngrpc-timeout: 1m\n",
    "content-type: application/json\ngrpc-timeout: 1m\n",
    "content-type: application/grpc\ngrpc-timeout: 5S\nx-envoy-expected-rq-timeout-ms: 40\n",
    "x-envoy-expected-rq-timeout-ms: 15000\n",
    "x-envoy-expected-rq-timeout-ms: 0\n",
    "x-envoy-expected-rq-timeout-ms: 18446744073709551616\n",
    "x-envoy-expected-rq-timeout-ms: 18446744073709551615\n",
    "x-envoy-expected-rq-timeout-ms: 1.5\n",
    "x-envoy-expected-rq-timeout-ms: \n",
    "traceparent: cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more\n",
    "traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more\n",
    "traceparent: ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\nx-request-id: r 1\n",
    "traceparent: 00-00000000000000000000000000000000-00f067aa0ba902b7-01\nx-request-id: \u{fc}\n",
    "traceparent: 00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01\n",
    "x-request-id: 6d1f6b5c-0a5e-4b0a-8c7e-0d5d2f8f7a10\n",
    "x-request-id: %41%00\n",
    "x-request-id: \n",
    "lock-owner: batch-7\n",
    "lock-owner:  a b \n",
    "baggage: a=1, lock-owner = batch%207 ;ttl=1, b=2\n",
    "baggage: lock-owner=a,lock-owner=b\n",
    "baggage: lock-owner\n",
    "baggage: x;lock-owner=a\nbaggage: lock-owner=c%zz\n",
    "%principal: spiffe://mesh/ns/x/pay\nlock-owner: a\n",
    "%principal: spiffe://mesh/pay\nlock-owner: a\n",
    "%principal: \nlock-owner: a\n",
    "%principal: \u{fc}\"\\\nlock-owner: a\n",
    "%route-locks: order/7;mode=shared\nlock-owner: a\n",
    "%route-locks: order//7\nlock-owner: a\n",
    ":method: POST\n:path: /o/7?x=1\nlock-owner: a\n",
    ":method: GET\n:path: /o/%37\nlock-owner: a\n",
    "lock: stock/9;wait=0\nlock-owner: a\n",
];

/// The seeds of the target.
pub fn seeds(cases: &[Value]) -> Seeds {
    let mut seeds = Seeds::default();
    let request = |lock: &str| format!("lock: {lock}\n{TRACE}");
    RFC_9651.iter().for_each(|lock| seeds.add("rfc9651", request(lock)));
    WRITTEN.iter().for_each(|lock| seeds.add("written", request(lock)));
    for around in AROUND {
        seeds.add("request", format!("lock: order/42;wait=20, stock/7;mode=shared;ttl=1\n{around}"));
        seeds.add("request-bare", around);
    }
    pages::cells("| `lock` | detail |").iter().for_each(|lock| seeds.add("page", request(lock)));
    for case in cases {
        conformance(&mut seeds, case);
    }
    let long = "x".repeat(256);
    seeds.add("hostile", request(&format!("a/{}", &long[..254])));
    seeds.add("hostile", request(&format!("a/{}", &long[..255])));
    seeds.add("hostile", request(&"(".repeat(300)));
    seeds.add("hostile", request(&"a,".repeat(300)));
    seeds.add("hostile", request(&format!("a{}", ";x".repeat(300))));
    seeds.add("hostile", request(&format!("a{}", ";wait=1".repeat(100))));
    seeds.add("hostile", request(&format!("a;mode={long}")));
    seeds.add("hostile", request(&format!("a;mode=\"{}\"", "\\\"".repeat(60))));
    seeds.add("hostile", format!("lock: a\nlock-owner: {long}\n"));
    seeds.add("hostile", format!("lock: a\nlock-owner: {long}x\n"));
    seeds.add("hostile", format!("lock: a\nbaggage: {}lock-owner=b\n", "a=1,".repeat(200)));
    seeds
        .add("hostile", [b"lock: ".as_slice(), &(1..=255).filter(|byte| *byte != b'\n').collect::<Vec<u8>>()].concat());
    for byte in [0u8, 1, 9, 13, 0x1f, 0x20, 0x22, 0x25, 0x5c, 0x7f, 0x80, 0xc3, 0xff] {
        seeds.add("byte", [b"lock: a/".as_slice(), &[byte], b"b;wait=1\nlock-owner: a", &[byte], b"\n"].concat());
        seeds.add("byte", [b"lock: \"a/".as_slice(), &[byte], b"b\"\nx-request-id: ", &[byte], b"\n"].concat());
    }
    seeds.add("fields", format!("lock: a\nlock: b;wait=1\nlock: c, d\n{TRACE}"));
    seeds.add("fields", format!("lock: a\nlock: \nlock: c\n{TRACE}"));
    seeds.add("fields", format!("lock: \"a\nlock: b\"\n{TRACE}"));
    seeds.add("fields", format!("Lock: a\nLOCK: b\n{TRACE}"));
    seeds
}

/// What an owner of a case asks for, as one header.
fn conformance(seeds: &mut Seeds, case: &Value) {
    let steps = case["steps"].as_array().into_iter().flatten();
    let members: Vec<String> = steps
        .filter(|step| step["op"] == "acquire")
        .map(|step| {
            let mode = match step["mode"].as_str() {
                Some("S") => ";mode=shared",
                Some("IS") => ";mode=intent-shared",
                Some("IX") => ";mode=intent-exclusive",
                Some("SIX") => ";mode=shared-intent-exclusive",
                _ => "",
            };
            let seconds =
                |field: &str| step[field].as_u64().map(|millis| format!("{}.{:03}", millis / 1000, millis % 1000));
            let time = |name: &str, field| seconds(field).map_or_else(String::new, |value| format!(";{name}={value}"));
            format!(
                "{}{mode}{}{}",
                step["lock"].as_str().unwrap_or_default(),
                time("wait", "wait_ms"),
                time("ttl", "ttl_ms")
            )
        })
        .collect();
    let owner = case["steps"][0]["owner"].as_str().unwrap_or("a");
    // A case of plain asks for the same locks says no more than the one before it.
    if members.iter().any(|member| member.contains(';')) && members.len() <= 6 {
        let name = case["name"].as_str().unwrap_or("case");
        seeds.add(&format!("case-{name}"), format!("lock: {}\nlock-owner: {owner}\n", members.join(", ")));
    }
}
