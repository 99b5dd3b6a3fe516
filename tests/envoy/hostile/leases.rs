//! Requests to the lease API that no honest party sends, generated: each has its answer, at once, and leaves nothing.

use std::time::{Duration, Instant};

use hyper::Method;
use interlock_testkit::{Client, wait_for_async};
use serde_json::{Value, json};

use super::STAGE;
use super::dice::{Dice, seed};
use super::h2::RawH2;
use super::shot::{Field, field};
use crate::common::{DEADLINE, Lane, run};

/// How many requests there are.
const REQUESTS: usize = 400;

/// What takes longer has hung.
const HANG: Duration = Duration::from_secs(1);

/// How often something that was late may be late again before it counts as hanging.
const TRIES: usize = 8;

/// The longest body that is read.
const MOST: usize = 64 * 1024;

const PREFIX: &str = "/interlock/v1/";
const LEASE: &str = "leases/lease-of-a-stranger";

/// A request, and how it has to be answered.
#[derive(Debug)]
struct Call {
    h2: bool,
    method: &'static str,
    path: String,
    fields: Vec<Field>,
    body: Vec<u8>,
    trailers: Vec<Field>,
    status: u16,
    slug: &'static str,
}

impl Call {
    fn bad(method: &'static str, path: impl Into<String>, body: impl Into<Vec<u8>>) -> Self {
        let (fields, trailers) = (Vec::new(), Vec::new());
        let (path, body) = (format!("{PREFIX}{}", path.into()), body.into());
        Call { h2: false, method, path, fields, body, trailers, status: 400, slug: "malformed-request" }
    }

    fn answered(self, status: u16, slug: &'static str) -> Self {
        Call { status, slug, ..self }
    }

    fn h1(&self) -> Vec<u8> {
        let mut bytes = format!("{} {} HTTP/1.1\r\nhost: test\r\n", self.method, self.path).into_bytes();
        let line = |bytes: &mut Vec<u8>, (name, value): &Field| {
            bytes.extend([&name[..], b": ", value, b"\r\n"].concat());
        };
        self.fields.iter().for_each(|field| line(&mut bytes, field));
        if self.trailers.is_empty() {
            bytes.extend(format!("content-length: {}\r\n\r\n", self.body.len()).into_bytes());
            bytes.extend_from_slice(&self.body);
        } else {
            bytes.extend_from_slice(b"transfer-encoding: chunked\r\n\r\n");
            for piece in self.body.chunks(1000) {
                bytes.extend([format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat());
            }
            bytes.extend_from_slice(b"0\r\n");
            self.trailers.iter().for_each(|field| line(&mut bytes, field));
            bytes.extend_from_slice(b"\r\n");
        }
        bytes
    }

    /// The status and the body of the answer, and how long it took.
    async fn send(&self, lane: &Lane) -> Result<(u16, Vec<u8>, Duration), String> {
        let start = Instant::now();
        if !self.h2 {
            let mut client = lane.raw().await;
            // Envoy may answer and close before everything is sent.
            let _ = client.send(&self.h1()).await;
            let response = client.response_within(HANG * 4).await.map_err(|error| format!("{error:#}"))?;
            return Ok((response.status, response.body, start.elapsed()));
        }
        let mut client = RawH2::connect(lane.address()).await.map_err(|error| format!("{error:#}"))?;
        let pseudo = [(":method", self.method), (":scheme", "http"), (":authority", "test"), (":path", &self.path)];
        let fields: Vec<Field> = pseudo.iter().map(|(name, value)| field(name, value)).collect();
        let _ = client.headers(&[fields, self.fields.clone()].concat(), false).await;
        for piece in self.body.chunks(16_000) {
            let _ = client.data(piece, false).await;
        }
        let _ = match self.trailers.is_empty() {
            true => client.data(b"", true).await,
            false => client.headers(&self.trailers, true).await,
        };
        let answer = client.answer(HANG * 4).await;
        let status = answer.status.ok_or("no answer")?;
        Ok((status, answer.body, start.elapsed()))
    }
}

fn good(owner: &str) -> Value {
    json!({ "owner": owner, "locks": [{ "name": "order/1" }, { "name": "order/2", "mode": "shared" }], "wait": "0s" })
}

/// The request of this number.
fn call(seed: u64, number: usize, receipt: &str) -> Call {
    let mut dice = Dice::new(seed, number);
    let whole = good("a-stranger").to_string();
    let put = |body: Vec<u8>| Call::bad("PUT", LEASE, body);
    let text = |value: Value| value.to_string().into_bytes();
    let with = |name: &str, value: Value| {
        let mut body = good("a-stranger");
        body[name] = value;
        text(body)
    };
    let mut call = match number % 16 {
        0 => {
            let ids = ["x", "", "0123456789abcde%24", "0123456789abcdef/", "lease of a stranger", "..%2f..%2flocks"];
            let id = dice.pick(&ids).replace(' ', "+");
            Call::bad(dice.pick(&["PUT", "GET", "DELETE"]), format!("leases/{id}"), "")
        }
        1 => put(whole.as_bytes()[..dice.below(whole.len())].to_vec()),
        2 => {
            let mut body = whole.into_bytes();
            let control = u8::try_from(dice.below(9)).unwrap();
            body.insert(dice.below(body.len()), control);
            put(body)
        }
        3 => put(dice.pick(&["[", "{\"owner\":", "{\"locks\":[", "\"\\"]).repeat(dice.within(1, 6000)).into_bytes()),
        4 => {
            let spans =
                ["1e400", "-1", "\"-1s\"", "\"99999999999999999999h\"", "\"0.0000001s\"", "18446744073709551616"];
            let body = String::from_utf8(with("ttl", json!("5s"))).unwrap();
            put(body.replace("\"5s\"", dice.pick(&spans)).into_bytes())
        }
        5 => {
            put(whole.replacen('{', dice.pick(&["{\"owner\":\"b\",", "{\"wait\":null,\"locks\":[],"]), 1).into_bytes())
        }
        6 => {
            let length = dice.within(MOST - 2, MOST + 2);
            let call = put(vec![b'x'; length]);
            if length > MOST { call.answered(413, "body-too-large") } else { call }
        }
        7 => {
            let mut call = put(with("more", json!(1)));
            call.trailers = vec![field("lock", "order/9"), field("lock-fence", dice.text(20))];
            call
        }
        8 => {
            let methods = ["PATCH", "POST", "PUT", "OPTIONS"];
            let paths = ["locks", "locks/order/1", "graph", "deadlocks", "health"];
            Call::bad(dice.pick(&methods), dice.pick(&paths), whole).answered(405, "method-not-allowed")
        }
        9 => {
            let queries = ["limit=0", "limit=1001", "limit=x", "page=-1", "page=4294967296", "order=age", "%6cimit=1"];
            Call::bad("GET", format!("locks?{}", dice.pick(&queries)), "")
        }
        10 => {
            let long = format!("order/{}", "x".repeat(300));
            let names = ["order/%2", "order/%zz", "order/1/", "", "order/%u0031", "order/a+b&c", "*", &long];
            Call::bad(dice.pick(&["GET", "DELETE"]), format!("locks/{}", dice.pick(&names)), "")
        }
        11 => {
            let mut forged = receipt.as_bytes().to_vec();
            let at = dice.below(forged.len());
            match dice.below(3) {
                0 => forged.truncate(at),
                1 => forged[at] = if forged[at] == b'A' { b'B' } else { b'A' },
                _ => forged = vec![b'A'; at + 1],
            }
            put(with("receipt", json!(String::from_utf8(forged).unwrap())))
        }
        12 => {
            let lease = |at| json!({ "id": format!("lease-{number}-of-nobody-{at}"), "receipt": null });
            let leases: Vec<Value> = (0..if number < 64 { 1000 } else { 10 }).map(lease).collect();
            Call::bad("POST", "leases/renew", text(json!({ "leases": leases }))).answered(200, "")
        }
        13 => {
            let tokens =
                ["", "Bearer", "Bearer ", "Bearer 0123456789abcdeg", "Basic 0123456789abcdef", "0123456789abcdef"];
            let mut call = Call::bad("DELETE", "locks/order/1", "").answered(403, "forbidden");
            call.fields.push(field("authorization", dice.pick(&tokens)));
            call
        }
        14 => {
            let paths = ["", "lease", "leases", "graph/x", "health/", "lockss", "%24locks", "locks%2forder"];
            Call::bad("GET", dice.pick(&paths), "").answered(404, "not-found")
        }
        _ => {
            let wrong = [
                ("owner", json!("")),
                ("owner", json!("a stranger")),
                ("owner", json!("x".repeat(257))),
                ("owner", json!(["a"])),
                ("locks", json!([])),
                ("locks", json!([{ "name": "order/1", "mode": "none" }])),
                ("locks", json!([{ "name": "order/1", "ttl": "1s" }])),
                ("locks", json!({ "name": "order/1" })),
                ("wait", json!("soon")),
                ("ttl", json!("0s")),
                ("\u{1b}[31m\n", json!(1)),
            ];
            let (name, value) = wrong[dice.below(wrong.len())].clone();
            put(with(name, value))
        }
    };
    // A body that is too long for one window of HTTP/2 has to be sent as the other side takes it.
    call.h2 = call.body.len() < MOST - 2 && dice.chance(50);
    call
}

/// What is wrong with an answer.
fn judge(call: &Call, status: u16, body: &[u8]) -> Result<(), String> {
    let said: Value = serde_json::from_slice(body).map_err(|error| format!("{status}: {error}"))?;
    if status != call.status {
        return Err(format!("{status}: {said}"));
    }
    if status == 200 {
        let results = said["results"].as_array().ok_or("no results")?;
        return if results.iter().all(|it| it["status"] == "lost") { Ok(()) } else { Err(said.to_string()) };
    }
    let detail = said["detail"].as_str().unwrap_or_default();
    let one_line = !detail.is_empty() && detail.chars().count() <= 400 && !detail.chars().any(char::is_control);
    let kind = format!("urn:interlock:problem:{}", call.slug);
    if said["type"] != kind || said["status"] != status || !said["title"].is_string() || !one_line {
        return Err(format!("no problem {}: {said}", call.slug));
    }
    Ok(())
}

#[test]
fn bad_lease_requests_are_answered_and_leave_nothing() {
    run(async {
        let lane = STAGE.lane("leases").await;
        let (seed, client) = (seed(), Client::http1());
        let ask = |method: Method, path: &str| client.ask(method, lane.url(&format!("{PREFIX}{path}")));
        wait_for_async("the end of the grace", DEADLINE, async || {
            ask(Method::GET, "health").send().await.expect("an answer").status == 200
        })
        .await;
        let lease = ask(Method::PUT, "leases/lease-of-the-first").body(good("first").to_string()).send().await.unwrap();
        assert_eq!(lease.status, 201, "{}", lease.text());
        let receipt = lease.json()["receipt"].as_str().unwrap().to_owned();
        assert_eq!(ask(Method::DELETE, "leases/lease-of-the-first").send().await.unwrap().status, 200);

        // A body that never comes, and some that stop in the middle.
        let mut late = lane.raw().await;
        let head = format!("PUT {PREFIX}{LEASE} HTTP/1.1\r\nhost: test\r\ncontent-length: 400\r\n\r\n{{\"owner\":");
        late.send(head.as_bytes()).await.unwrap();
        let mut wrong = Vec::new();
        let mut slowest = Duration::ZERO;
        for number in 0..REQUESTS {
            if number % 10 == 0 {
                let mut leaver = lane.raw().await;
                leaver.send(head.as_bytes()).await.unwrap();
            }
            let call = call(seed, number, &receipt);
            let mut quickest = Duration::MAX;
            for _ in 0..TRIES {
                if quickest > HANG {
                    let sent = call.send(&lane).await;
                    let judged = sent.and_then(|(status, body, took)| judge(&call, status, &body).map(|()| took));
                    match judged {
                        Ok(took) => quickest = quickest.min(took),
                        Err(what) => {
                            let shown: String = call.h1().escape_ascii().to_string().chars().take(600).collect();
                            wrong.push(format!("request {number} (HTTP/2: {}): {what}\n  {shown}", call.h2));
                            break;
                        }
                    }
                }
            }
            if quickest < Duration::MAX {
                slowest = slowest.max(quickest);
            }
        }
        println!("seed {seed}: {REQUESTS} bad lease requests, the slowest in {slowest:.0?}");
        assert!(
            wrong.is_empty(),
            "seed {seed}: {} wrong, such as\n{}",
            wrong.len(),
            wrong[..wrong.len().min(8)].join("\n")
        );
        assert!(slowest < HANG, "hangs for {slowest:?}");
        let response = late.response_within(DEADLINE).await.unwrap();
        assert_eq!(response.status, 408, "{}", response.text());
        assert!(response.text().contains("urn:interlock:problem:body-missing"), "{}", response.text());

        let locks = ask(Method::GET, "locks").send().await.unwrap().json();
        assert_eq!(locks, json!({ "locks": [] }));
        let lease = ask(Method::PUT, "leases/lease-of-the-last").body(good("last").to_string()).send().await.unwrap();
        assert_eq!(lease.status, 201, "{}", lease.text());
        let gone = ask(Method::DELETE, "leases/lease-of-the-last").send().await.unwrap();
        assert_eq!(gone.json()["status"], "released");
        lane.empty().await;
    });
}
