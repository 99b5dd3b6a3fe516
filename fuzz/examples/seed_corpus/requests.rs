//! Requests to the lease API.

use interlock_fuzz::lease_api::{LEASE, TOKEN, sealed};
use serde_json::{Value, json};

use crate::{Seeds, pages};

const TARGETS: [&str; 48] = [
    "PUT leases/0123456789abcdef",
    "POST leases/renew",
    "DELETE leases/0123456789abcdef",
    "GET leases/0123456789abcdef",
    "GET locks",
    "GET locks?page=512&limit=7",
    "GET locks?limit=0",
    "GET locks?limit=1001",
    "GET locks?page=-1",
    "GET locks?page=4294967296",
    "GET locks?&&limit=1&limit=2",
    "GET locks?order=age",
    "GET locks?limit=1#x",
    "GET locks/stock/7/a%2fb",
    "DELETE locks/stock/7/a%2Fb",
    "GET locks/%2e%2E/%00",
    "GET locks/a//b",
    "GET locks/",
    "GET locks/a%2",
    "GET locks/a%zz",
    "GET locks/%25%32%66?x",
    "GET locks/\u{fc}",
    "GET graph",
    "GET graph/x",
    "GET deadlocks?",
    "GET health",
    "DELETE health",
    "get health",
    "PATCH locks",
    "OPTIONS leases/0123456789abcdef",
    "GET leases",
    "GET leases/",
    "GET leases/short",
    "GET leases/renew",
    "GET leases/0123456789abcde%66",
    "GET leases/0123456789abcdef/",
    "GET leases/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "GET leases/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdefg",
    "GET /health",
    "GET ",
    "GET",
    "",
    "GET Bearer a token of the inputs",
    "GET bearer a token of the inputs ",
    "GET Basic a token of the inputs",
    "GET \"quoted\\\" -> x;\r\u{1b}[31m",
    "GET \u{7f}\u{85}\u{2028}\u{202e}\u{0}",
    "GET \\n\\u{d}\\\\",
];

const BODIES: [&str; 54] = [
    r#"{"owner":"t1","locks":[{"name":"order/1"},{"name":"stock/1","mode":"shared"}],"wait":"1.5s","ttl":"250ms"}"#,
    r#"{"owner":"a","locks":[{"name":"order/1"}]}"#,
    r#"{"owner":"a","locks":[{"name":"t/a/b/c","mode":"shared"},{"name":"t/a","mode":"intent-exclusive"}]}"#,
    r#"{"owner":"a","locks":[{"name":"t/a"},{"name":"t/a","mode":"shared-intent-exclusive"}],"wait":"0s"}"#,
    r#"{"owner":"a","locks":[{"name":"pool/1"}],"wait":"0s","ttl":"24h"}"#,
    r#"{"owner":"a","locks":[{"name":"pool/1","mode":"shared"}]}"#,
    r#"{"owner":"a","locks":[{"name":"r/1"},{"name":"q/1"}]}"#,
    r#"{"owner":"a","locks":[{"name":"a/1","mode":"intent-shared"}]}"#,
    r#"{"owner":"a","locks":[{"name":"a/%2f%41"},{"name":"a/%2FA"}]}"#,
    r#"{"owner":"a\n\r\t\u0000\u001b\u007f\u0085\u2028","locks":[{"name":"a/1"}]}"#,
    r#"{"owner":"\"] -> \\\"x\\ [label=\"","locks":[{"name":"a/1"}]}"#,
    r#"{"owner":"\ud83d\udd12","locks":[{"name":"a/1"}]}"#,
    r#"{"owner":"\ud83d","locks":[{"name":"a/1"}]}"#,
    r#"{"owner":"","locks":[{"name":"a"}]}"#,
    r#"{"owner":"a","locks":[]}"#,
    r#"{"owner":"a","locks":[{"name":"a"},{"name":"a//b"}]}"#,
    r#"{"owner":"a","locks":[{"name":""}]}"#,
    r#"{"owner":"a","locks":[{"name":"a","mode":"x"}]}"#,
    r#"{"owner":"a","locks":[{"name":"a","mode":null}],"wait":null,"ttl":null,"receipt":null}"#,
    r#"{"owner":"a","locks":[{"name":"a"}],"ttl":"0s"}"#,
    r#"{"owner":"a","locks":[{"name":"a"}],"ttl":"1us"}"#,
    r#"{"owner":"a","locks":[{"name":"a"}],"wait":"2"}"#,
    r#"{"owner":"a","locks":[{"name":"a"}],"wait":2}"#,
    r#"{"owner":"a","locks":[{"name":"a"}],"wait":"1000000h"}"#,
    r#"{"owner":"a","locks":[{"name":"a"}],"wait":"18446744073709551616s"}"#,
    r#"{"owner":"a","locks":[{"name":"a"}],"wait":"0.0000001s"}"#,
    r#"{"owner":"a","locks":[{"name":"a"}],"id":"x"}"#,
    r#"{"owner":"a","locks":[{"name":"a","\u001b\n\udbff\udfff":1}]}"#,
    r#"{"owner":"a","owner":"b","locks":[{"name":"a"}]}"#,
    r#"{"owner":"a","locks":[{"name":"a","name":"b"}]}"#,
    r#"{"owner":"a","locks":[["a","shared"]]}"#,
    r#"["a",[["a","shared"]],"1s","1s",null]"#,
    r#"{"owner":1e400,"locks":[]}"#,
    r#"{"owner":["a"],"locks":{"name":"a"}}"#,
    r#"{"owner":"a","locks":[{"name":"a"}]} x"#,
    r#" { "owner" : "a" , "locks" : [ { "name" : "a" } ] } "#,
    r#"{"owner":"a","locks":[{"name":"a"},]}"#,
    r#"{"owner":"a","locks":[{"name":"a"}"#,
    r#"{'owner':'a'}"#,
    "\u{feff}{}",
    "{}",
    "[]",
    "null",
    "1",
    "",
    r#"{"leases":[]}"#,
    r#"{"leases":[{"id":"0123456789abcdef"},{"id":"0123456789abcdeg","receipt":"r"}],"ttl":"3s"}"#,
    r#"{"leases":[{"id":"0123456789abcdef"},{"id":"0123456789abcdef"}]}"#,
    r#"{"leases":[{"id":"x"}]}"#,
    r#"{"leases":[{"id":"0123456789abcdef","ttl":"1s"}]}"#,
    r#"{"leases":[{"id":"0123456789abcdef","receipt":7}]}"#,
    r#"{"leases":[{"id":"0123456789abcdef"}],"ttl":"0s"}"#,
    r#"{"leases":{"id":"0123456789abcdef"}}"#,
    r#"{"ttl":"3s"}"#,
];

/// The seeds of the target.
pub fn seeds(cases: &[Value]) -> Seeds {
    let mut seeds = Seeds::default();
    TARGETS.iter().for_each(|target| seeds.add("target", *target));
    let put = |body: &str| format!("PUT leases/{LEASE}\n{body}");
    BODIES.iter().for_each(|body| seeds.add("body", put(body)));
    seeds.add("target", b"GET \xff".as_slice());
    seeds.add("body", [put("").as_bytes(), b"{\"owner\":\"\xff\"}"].concat());
    for body in pages::bodies() {
        seeds.add("page", format!("PUT leases/7f3c9a1e5b2d4860\n{body}"));
    }
    owners(&mut seeds);
    receipts(&mut seeds);
    // Too deep, too many, as long as can be and longer than that would be: the length of a body is tried elsewhere.
    seeds.add("deep", put(&"[".repeat(200)));
    seeds.add("strange", put(&format!("{{\"{}\":1}}", "\u{10ffff}".repeat(60))));
    seeds.add("deep", put(&format!("{}\"owner\":", "{\"locks\":[".repeat(130))));
    let many: Vec<Value> = (0..17).map(|n| json!({ "name": format!("a/{n}") })).collect();
    seeds.add("many", put(&json!({ "owner": "a", "locks": many[..16] }).to_string()));
    seeds.add("many", put(&json!({ "owner": "a", "locks": many }).to_string()));
    let leases: Vec<Value> = (0..40).map(|n| json!({ "id": format!("{LEASE}-{n}") })).collect();
    seeds.add("many", format!("POST leases/renew\n{}", json!({ "leases": leases })));
    let steps = cases.iter().filter_map(|case| Some((case, case["steps"].as_array()?)));
    for (case, steps) in steps {
        for step in steps.iter().filter(|step| step["op"] == "acquire").take(1) {
            let mut body = json!({ "owner": step["owner"], "locks": [{ "name": step["lock"] }] });
            for (field, name) in [("wait_ms", "wait"), ("ttl_ms", "ttl")] {
                if let Some(ms) = step[field].as_u64() {
                    body[name] = json!(format!("{ms}ms"));
                }
            }
            if body.get("wait").is_some() || body.get("ttl").is_some() {
                seeds.add("case", format!("PUT {}\n{body}", case["name"].as_str().unwrap_or_default()));
            }
        }
    }
    seeds
}

/// Two owners who meet at a lock, each of whom may be called anything.
fn owners(seeds: &mut Seeds) {
    let body = |owner: &str| json!({ "owner": owner, "locks": [{ "name": "a/1" }, { "name": "t/a/b" }] }).to_string();
    for owner in ["x", "a b", "\"", "\\", "\\\"", "\u{1b}", "\\u{1b}", "\\n", "\r", "\u{9b}", "\u{1f512}", "};\t{"] {
        seeds.add("owners", format!("GET {owner}\n{}", body("other\n")));
        seeds.add("owners", format!("GET {owner}\n{}", body(owner)));
    }
    for length in [59, 60, 255, 256, 257] {
        seeds.add("length", format!("GET {}\n{}", "y".repeat(length), body(&"x".repeat(length))));
        seeds.add("length", format!("GET \u{fc}\n{}", body(&"\u{fc}".repeat(length / 2))));
    }
}

/// What was sealed, what was falsified, and what never was.
fn receipts(seeds: &mut Seeds) {
    let body = json!({ "owner": "a", "locks": [{ "name": "order/1" }], "ttl": "5s" });
    let good = sealed(body.to_string().as_bytes()).expect("a grant");
    let mut texts: Vec<String> = good.to_vec();
    for text in &good {
        texts.push(text[..text.len() - 1].to_owned());
        texts.push(format!("{text}="));
        texts.push(text.replace('-', "+").replace('_', "/"));
        texts.push(text.replacen('A', "B", 1));
    }
    texts.extend([String::new(), "AA".into(), "A".into(), TOKEN.into(), "A2".into(), "A".repeat(400)]);
    for text in texts {
        let mut body = body.clone();
        body["receipt"] = json!(text);
        seeds.add("receipt", format!("PUT leases/{LEASE}\n{body}"));
        let renewal = json!({ "leases": [{ "id": LEASE, "receipt": text }] });
        seeds.add("receipt", format!("POST leases/renew\n{renewal}"));
        seeds.add("receipt", format!("POST leases/renew\n{text}"));
    }
}
