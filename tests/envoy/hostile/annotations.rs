//! Annotations that no honest client sends, one by one, and what is said of them.

use interlock_testkit::{EnvoyConfig, RawClient, RawResponse};
use serde_json::{Value, json};

use crate::common::{Lane, Plan, Stage, run};

static STAGE: Stage = Stage::new(|| {
    let rules = json!([{
        "name": "filled",
        "match": { "path": "/filled/{id}" },
        "locks": [{ "name": "order/{id}", "wait": "0s" }, { "name": "tier/{header:x-tier}", "wait": "0s" }],
    }]);
    let keys = json!([{ "id": "k", "secret": { "base64": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=" } }]);
    let thousand = json!({ "locks_per_request": 1000, "locks_per_owner": null });
    vec![
        ("bytes", Plan::new(json!({ "rules": rules, "keys": keys }))),
        ("large", Plan::new(json!({ "keys": keys, "owner": { "from": ["lock-owner", "traceparent", "baggage"] } }))),
        ("larger", Plan::new(json!({ "keys": keys })).patch(roomy)),
        ("thousand", Plan::new(json!({ "limits": thousand })).patch(roomy)),
        ("path", Plan::new(json!({ "rules": rules }))),
        ("names", Plan::new(json!({}))),
        ("sixteen", Plan::new(json!({}))),
        (
            "nested",
            Plan::new(json!({ "rules": [{
            "name": "filled",
            "match": { "path": "/filled/{id}" },
            "locks": [{ "name": "order/{id}" }],
        }] })),
        ),
        ("fields", Plan::new(json!({}))),
        ("numbers", Plan::new(json!({}))),
    ]
});

fn roomy(config: EnvoyConfig) -> EnvoyConfig {
    config.patch_hcm(|hcm| hcm["max_request_headers_kb"] = json!(512))
}

/// A `traceparent` of this owner.
fn trace(number: u128) -> Vec<u8> {
    interlock_testkit::client::traceparent(number).into_bytes()
}

/// A connection that stays, as long as the proxy lets it.
struct Caller<'a> {
    lane: &'a Lane,
    connection: RawClient,
}

impl<'a> Caller<'a> {
    async fn new(lane: &'a Lane) -> Self {
        Caller { lane, connection: lane.raw().await }
    }

    /// A GET by owner 1.
    async fn get(&mut self, path: &str, headers: &[(&str, &[u8])]) -> RawResponse {
        let trace = trace(1);
        let mut all: Vec<(&str, &[u8])> = vec![("traceparent", &trace)];
        all.extend_from_slice(headers);
        self.get_by_nobody(path, &all).await
    }

    /// A GET that says no more of who sends it than these headers do.
    async fn get_by_nobody(&mut self, path: &str, headers: &[(&str, &[u8])]) -> RawResponse {
        self.connection.request("GET", path, headers).await.unwrap();
        let response = self.connection.response().await.unwrap();
        if response.header("connection").is_some_and(|value| value == "close") {
            self.connection = self.lane.raw().await;
        }
        response
    }

    /// Sends a `lock` header that must be refused as malformed, and returns why it is.
    async fn malformed(&mut self, lock: &[u8]) -> String {
        let response = self.get("/refused", &[("lock", lock)]).await;
        refused(&response, 400, "malformed-annotation", &String::from_utf8_lossy(lock))
    }

    /// The filter still does its work.
    async fn works(&mut self) {
        let response = self.get("/works", &[("lock", b"order/works")]).await;
        assert_eq!(response.status, 200, "{}", response.text());
        assert!(response.header("lock-fence").unwrap().starts_with("order/works;fence="));
    }
}

/// Checks a refusal, and returns its detail.
fn refused(response: &RawResponse, status: u16, slug: &str, what: &str) -> String {
    let shown: String = what.chars().take(200).collect();
    assert_eq!(response.status, status, "{shown}: {}", response.text());
    assert_eq!(response.header("content-type").as_deref(), Some("application/problem+json"), "{shown}");
    let problem: Value = serde_json::from_slice(&response.body).unwrap();
    assert_eq!(problem["type"], format!("urn:interlock:problem:{slug}"), "{shown}");
    assert_eq!(problem["status"], status, "{shown}");
    problem["detail"].as_str().unwrap().to_owned()
}

#[test]
fn every_byte_beyond_ascii() {
    run(async {
        let lane = STAGE.lane("bytes").await;
        let mut caller = Caller::new(&lane).await;
        for byte in 0x80..=0xFF_u8 {
            for lock in [
                vec![byte],
                [b"order/1", &[byte][..]].concat(),
                [b"\"order/", &[byte][..], b"\""].concat(),
                [b"order/1;mode=", &[byte][..]].concat(),
                [b"order/1;mode=\"", &[byte][..], b"\""].concat(),
                [b"order/1;", &[byte][..], b"=1"].concat(),
                [&[byte][..], b", order/1"].concat(),
            ] {
                assert!(caller.malformed(&lock).await.is_ascii());
            }
            // Where the header is not an annotation its bytes are names like any others.
            let filled = caller.get("/filled/1", &[("x-tier", &[byte])]).await;
            assert_eq!(filled.status, 200, "{}", filled.text());
            assert!(filled.header("lock-fence").unwrap().contains(&format!("tier/%{byte:02X};fence=")));
            // In an owner they are text too; in a fence from outside they are nothing.
            let odd = [b"by-", &[byte][..]].concat();
            let held = [("lock", &b"order/1"[..]), ("x-request-id", &odd), ("lock-fence", &odd), ("lock-status", &odd)];
            let served = caller.get_by_nobody("/odd", &held).await;
            assert_eq!(served.status, 200, "{byte:02X}: {}", served.text());
            let broken = caller.get_by_nobody("/odd", &[("lock", b"order/1"), ("traceparent", &odd)]).await;
            assert_eq!(broken.status, 200, "{byte:02X}: {}", broken.text());
        }
        assert!(lane.upstream().requests_to("/refused").is_empty());
        for seen in lane.upstream().requests_to("/odd") {
            assert_eq!(seen.header("lock-status"), None);
            assert!(seen.header("lock-fence").unwrap().starts_with("order/1;fence="));
        }
        caller.works().await;
        lane.quiet().await;
    });
}

#[test]
fn bytes_beyond_ascii_in_a_path() {
    run(async {
        let lane = STAGE.lane("path").await;
        for byte in 0x80..=0xFF_u8 {
            let mut raw = lane.raw().await;
            let head = [b"GET /filled/", &[byte][..], b" HTTP/1.1\r\nhost: test\r\nx-tier: a\r\n\r\n"].concat();
            raw.send(&head).await.unwrap();
            // Envoy or the filter: somebody answers, and nothing breaks.
            let status = raw.response().await.unwrap().status;
            assert!(matches!(status, 200 | 400 | 423), "{byte:02X}: {status}");
        }
        Caller::new(&lane).await.works().await;
        lane.quiet().await;
    });
}

#[test]
fn headers_as_large_as_they_may_be() {
    run(async {
        let lane = STAGE.lane("large").await;
        let mut caller = Caller::new(&lane).await;
        // Envoy takes 60 KiB of headers by default.
        let room = 59_000;
        let long = vec![b'a'; room];
        assert!(caller.malformed(&long).await.contains("a lock name has at most 256 bytes, this one has 59000"));
        let text = [b"\"", &vec![b'%'; room - 2][..], b"\""].concat();
        caller.malformed(&text).await;
        caller.malformed(&[b"\"", &b"\\\\".repeat(room / 2 - 1)[..], b"\""].concat()).await;
        caller.malformed(&b"(".repeat(room)).await;
        caller.malformed(&b",".repeat(room)).await;
        caller.malformed(&b" ; ".repeat(room / 3)).await;
        caller.malformed(&[b"a;", &b"\"".repeat(room)[..]].concat()).await;
        assert!(caller.malformed(&b"a,".repeat(room / 2)).await.contains("more than 4096 members"));
        // Unknown parameters are ignored, however many there are.
        let parameters = [b"order/1", &b";x=1".repeat(room / 4)[..]].concat();
        assert_eq!(caller.get("/ok", &[("lock", &parameters)]).await.status, 200);
        // Beyond the room it is Envoy that answers.
        assert_eq!(caller.get("/refused", &[("lock", &vec![b'a'; 70_000])]).await.status, 431);
        assert!(lane.upstream().requests_to("/refused").is_empty());

        // Other headers that the filter reads.
        for (name, value) in [
            ("lock-owner", long.clone()),
            ("baggage", [b"lock-owner=", &vec![b'a'; room - 11][..]].concat()),
            ("baggage", b"a=b,".repeat(room / 4)),
            ("lock-fence", b"a;fence=1;mode=shared,".repeat(room / 22)),
            ("lock-fence", b"(".repeat(room)),
            ("lock-status", long.clone()),
            ("grpc-timeout", b"9".repeat(room)),
            ("x-envoy-expected-rq-timeout-ms", b"9".repeat(room)),
        ] {
            let response = caller.get("/ok", &[("lock", b"order/1"), (name, &value)]).await;
            assert_eq!(response.status, 200, "{name}: {}", response.text());
        }
        let no_one = caller.get_by_nobody("/refused", &[("lock", b"order/1"), ("traceparent", &long)]).await;
        refused(&no_one, 400, "malformed-annotation", "no owner");
        caller.works().await;
        lane.quiet().await;
    });
}

#[test]
fn headers_larger_than_that() {
    run(async {
        let lane = STAGE.lane("larger").await;
        let mut caller = Caller::new(&lane).await;
        for size in [61_440, 262_144, 500_000] {
            caller.malformed(&vec![b'a'; size]).await;
            caller.malformed(&b"a,".repeat(size / 2)).await;
            caller.malformed(&[b"a;wait=", &b"1".repeat(size - 7)[..]].concat()).await;
            let parameters = [b"order/1", &b";x=1".repeat((size - 7) / 4)[..]].concat();
            assert_eq!(caller.get("/ok", &[("lock", &parameters)]).await.status, 200);
            let fences = b"a;fence=1;mode=shared;sig=:AAAA:,".repeat(size / 33);
            assert_eq!(caller.get("/ok", &[("lock", b"order/1"), ("lock-fence", &fences)]).await.status, 200);
        }
        caller.works().await;
        lane.quiet().await;
    });
}

#[test]
fn a_thousand_locks() {
    run(async {
        let many = |count: usize| (0..count).map(|n| format!("order/{n}")).collect::<Vec<_>>().join(", ");
        // Over the default limit.
        let lane = STAGE.lane("sixteen").await;
        let mut caller = Caller::new(&lane).await;
        let response = caller.get("/refused", &[("lock", many(1000).as_bytes())]).await;
        let detail = refused(&response, 429, "too-many-locks", "1000 locks");
        assert!(detail.contains("at most 16 locks (locks_per_request)"), "{detail}");
        // One lock a thousand times is one lock.
        let same = vec!["order/1"; 1000].join(", ");
        assert_eq!(caller.get("/ok", &[("lock", same.as_bytes())]).await.status, 200);
        assert!(lane.upstream().requests_to("/refused").is_empty());
        lane.quiet().await;

        // Where the policy allows them, they are granted and given back.
        let lane = STAGE.lane("thousand").await;
        let mut caller = Caller::new(&lane).await;
        let response = caller.get("/ok", &[("lock", many(1000).as_bytes())]).await;
        assert_eq!(response.status, 200, "{}", response.text());
        assert_eq!(response.header("lock-fence").unwrap().split(", ").count(), 1000);
        let seen = lane.upstream().requests_to("/ok")[0].header("lock-fence").unwrap();
        assert_eq!(Some(seen), response.header("lock-fence"));
        let response = caller.get("/refused", &[("lock", many(1001).as_bytes())]).await;
        refused(&response, 429, "too-many-locks", "1001 locks");
        caller.works().await;
        lane.quiet().await;
    });
}

#[test]
fn names_of_every_illegal_kind() {
    run(async {
        let lane = STAGE.lane("names").await;
        let mut caller = Caller::new(&lane).await;
        let long = format!("order/{}", "a".repeat(251));
        for name in [
            "\"\"",
            "\"/\"",
            "\"/order\"",
            "order/",
            "order//1",
            "\"order/1//\"",
            "\"order 1\"",
            "\" order/1\"",
            "\"order/1 \"",
            "\"order\\\\1\"",
            "\"order\\\"1\"",
            "\"order/%\"",
            "\"order/%4\"",
            "\"order/%4g\"",
            "order/%",
            "order/%zz",
            "order!1",
            "order#1",
            "order$1",
            "order&1",
            "order'1",
            "order*1",
            "order+1",
            "order^1",
            "order`1",
            "order|1",
            "\"order?1\"",
            "\"order=1\"",
            "\"order;1\"",
            "\"order,1\"",
            "\"order[1]\"",
            "\"{id}\"",
            "\"<1>\"",
            "\"order(1)\"",
            long.as_str(),
            "order/1 order/2",
            "order/1;;wait=1",
            "order/1,,order/2",
            "1",
            "-1",
            "1.5",
            "?1",
            "?0",
            ":b3JkZXI=:",
            "@1700000000",
            "%\"order\"",
            "()",
            "(order/1)",
            "order/1;mode",
            "order/1;mode=?1",
            "order/1;mode=Shared",
            "order/1;mode=\"\"",
            "order/1;mode=1",
            "\"order",
            "order/1\"",
            "order/1;wait=\"1\"",
            "order/1;wait=one",
            "order/1;wait",
            "order/1;WAIT=1",
            "=1",
            ";wait=1",
            ",",
            "",
        ] {
            caller.malformed(name.as_bytes()).await;
        }
        // The longest that is legal is.
        let longest = format!("order/{}", "a".repeat(250));
        let response = caller.get("/ok", &[("lock", longest.as_bytes())]).await;
        assert_eq!(response.status, 200, "{}", response.text());
        assert!(lane.upstream().requests_to("/refused").is_empty());
        // Control characters never come as far as the filter.
        for byte in (0..0x20_u8).chain([0x7F]).filter(|byte| !b"\t\r\n".contains(byte)) {
            let mut raw = lane.raw().await;
            raw.request("GET", "/refused", &[("lock", &[b'a', byte])]).await.unwrap();
            assert_eq!(raw.response().await.unwrap().status, 400, "{byte:02X}");
        }
        assert!(caller.malformed(b"order/1\torder/2").await.is_ascii());
        caller.works().await;
        lane.quiet().await;
    });
}

#[test]
fn one_name_has_one_spelling() {
    run(async {
        let lane = STAGE.lane("nested").await;
        let mut caller = Caller::new(&lane).await;
        // In a header it is the name that is encoded; in a path it is the URL, and what it names is encoded again.
        for (lock, name) in [
            ("order/A", "order/A"),
            ("order/%41", "order/A"),
            ("order/%2541", "order/%2541"),
            ("order/%252541", "order/%252541"),
            ("order/%2f", "order/%2F"),
            ("order/%C3%bc", "order/%C3%BC"),
        ] {
            let response = caller.get("/header", &[("lock", lock.as_bytes())]).await;
            let fence = response.header("lock-fence").unwrap();
            assert!(fence.starts_with(&format!("{name};fence=")), "{lock}: {fence}");
        }
        for (path, name) in [
            ("/filled/A", "order/A"),
            ("/filled/%41", "order/A"),
            ("/filled/%2541", "order/%2541"),
            ("/filled/%252541", "order/%252541"),
            ("/filled/a%2Fb", "order/a%2Fb"),
            ("/filled/%C3%BC", "order/%C3%BC"),
            ("/filled/%zz", "order/%25zz"),
        ] {
            let response = caller.get(path, &[]).await;
            assert_eq!(response.status, 200, "{path}: {}", response.text());
            let fence = response.header("lock-fence").unwrap();
            assert!(fence.starts_with(&format!("{name};fence=")), "{path}: {fence}");
        }
        // Two spellings of one lock exclude each other; its neighbours are free.
        let holder = lane.hold(2, "/holder", "order/A").await;
        for (lock, status) in [("order/%41;wait=0", 423), ("order/%2541;wait=0", 200), ("order/a;wait=0", 200)] {
            let response = caller.get("/second", &[("lock", lock.as_bytes())]).await;
            assert_eq!(response.status, status, "{lock}: {}", response.text());
        }
        assert_eq!(holder.release().await.status, 200);
        lane.quiet().await;
    });
}

#[test]
fn fields_that_come_in_pieces() {
    run(async {
        let lane = STAGE.lane("fields").await;
        let mut caller = Caller::new(&lane).await;
        let two = [("LOCK", &b"order/2;mode=shared"[..]), ("x-other", b"1"), ("Lock", b"order/1")];
        let response = caller.get("/pieces", &two).await;
        assert_eq!(response.status, 200, "{}", response.text());
        let fence = response.header("lock-fence").unwrap();
        let members: Vec<_> = fence.split(", ").map(|member| member.split(';').next().unwrap()).collect();
        assert_eq!(members, ["order/1", "order/2"]);
        assert_eq!(lane.upstream().requests_to("/pieces")[0].header("lock"), None);
        // One bad field makes them all bad: nothing is taken by halves.
        let response = caller.get("/refused", &[("lock", b"order/1"), ("lock", b"order//2")]).await;
        refused(&response, 400, "malformed-annotation", "a bad second field");
        let response = caller.get("/refused", &[("lock", b"order/1"), ("lock", b"")]).await;
        refused(&response, 400, "malformed-annotation", "an empty second field");
        // A List, or a String, that one field begins and another ends is none.
        let response = caller.get("/refused", &[("lock", b"\"order/1"), ("lock", b"2\"")]).await;
        refused(&response, 400, "malformed-annotation", "half a String");
        assert!(lane.upstream().requests_to("/refused").is_empty());
        caller.works().await;
        lane.quiet().await;
    });
}

#[test]
fn numbers_beyond_all_bounds() {
    run(async {
        let lane = STAGE.lane("numbers").await;
        let mut caller = Caller::new(&lane).await;
        for number in [
            "9999999999999999",
            "-9999999999999999",
            "1e3",
            "0x10",
            "1.0001",
            "1.",
            ".5",
            "1234567890123.5",
            "--1",
            "-0.001",
            "NaN",
            "1s",
            "-1",
        ] {
            for parameter in ["wait", "ttl", "hold"] {
                caller.malformed(format!("order/1;{parameter}={number}").as_bytes()).await;
            }
        }
        for zero in ["ttl=0", "hold=0", "ttl=0.0", "hold=0.000"] {
            caller.malformed(format!("order/1;{zero}").as_bytes()).await;
        }
        // As large as a number can be, within what the policy allows.
        let most =
            b"order/1;wait=999999999999999;ttl=999999999999.999;hold=999999999999999, order/2;wait=0.001;ttl=0.001";
        let response = caller.get("/ok", &[("lock", most)]).await;
        assert_eq!(response.status, 200, "{}", response.text());
        // A caller's own deadline that says nothing sensible says nothing.
        for (name, value) in [
            ("x-envoy-expected-rq-timeout-ms", "99999999999999999999999"),
            ("x-envoy-expected-rq-timeout-ms", "-1"),
            ("x-envoy-expected-rq-timeout-ms", "soon"),
            ("grpc-timeout", "99999999H"),
            ("grpc-timeout", "999999999H"),
            ("grpc-timeout", "-1S"),
            ("grpc-timeout", "1"),
        ] {
            let grpc = ("content-type", &b"application/grpc"[..]);
            let response = caller.get("/ok", &[("lock", b"order/1"), grpc, (name, value.as_bytes())]).await;
            assert_eq!(response.status, 200, "{name}: {value}: {}", response.text());
            assert!(response.header("lock-fence").is_some(), "{name}: {value}");
        }
        assert!(lane.upstream().requests_to("/refused").is_empty());
        caller.works().await;
        lane.quiet().await;
    });
}
