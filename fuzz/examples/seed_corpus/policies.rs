//! Configurations.

use interlock_fuzz::policy::to_struct;
use serde_json::{Value, json};

use crate::{Seeds, pages};

/// Fields with what can stand in them, right and wrong.
const FIELDS: [&str; 91] = [
    r#"{}"#,
    r#"{"instance":"orders"}"#,
    r#"{"instance":""}"#,
    r#"{"instance":"9"}"#,
    r#"{"instance":"a\nb"}"#,
    r#"{"instance":1}"#,
    r#"{"instnace":"a"}"#,
    r#"{"a\u0000b\u2028":1}"#,
    r#"{"enforcement":"audit"}"#,
    r#"{"enforcement":"of"}"#,
    r#"{"enforcement":null}"#,
    r#"{"enforcement":{"enforce":"10%"}}"#,
    r#"{"enforcement":{"enforce":"0.05%"}}"#,
    r#"{"enforcement":{"enforce":10}}"#,
    r#"{"owner":{"from":["traceparent","x-request-id","lock-owner","baggage"]}}"#,
    r#"{"owner":{"from":[]}}"#,
    r#"{"owner":{"from":["traceparent","traceparent"]}}"#,
    r#"{"owner":{"from":["trace-parent"]}}"#,
    r#"{"owner":{}}"#,
    r#"{"reentrancy":"none"}"#,
    r#"{"reentrancy":"lease"}"#,
    r#"{"reentrancy":"lease","keys":[{"id":"a","secret":{"env":"INTERLOCK_KEY"}}]}"#,
    r#"{"backend":{"local":{}}}"#,
    r#"{"backend":{"local":{"x":1}}}"#,
    r#"{"backend":{"redis":{}}}"#,
    r#"{"backend":{"local":{},"etcd":{}}}"#,
    r#"{"backend":{}}"#,
    r#"{"backend":{"locale":{}}}"#,
    r#"{"on_backend_unavailable":"allow"}"#,
    r#"{"defaults":{"mode":"shared","wait":"0s","ttl":"100ms","hold":"24h"}}"#,
    r#"{"defaults":{"mode":"intent-shared"}}"#,
    r#"{"defaults":{"mode":"exlusive"}}"#,
    r#"{"defaults":{"wait":"31s"}}"#,
    r#"{"defaults":{"ttl":"61s"}}"#,
    r#"{"defaults":{"ttl":"10s","hold":"1s"}}"#,
    r#"{"defaults":{"ttl":"99ms"}}"#,
    r#"{"defaults":{"wait":"1.5m"}}"#,
    r#"{"defaults":{"wait":"1"}}"#,
    r#"{"defaults":{"wait":1}}"#,
    r#"{"defaults":{"wait":"99999999999999999999h"}}"#,
    r#"{"defaults":{"wait":"0.0000001s"}}"#,
    r#"{"defaults":{"wait":"1\u00fcs"}}"#,
    r#"{"limits":{"locks_per_request":1,"locks_per_owner":null,"waiters_per_lock":1,"max_wait":"1ms","max_ttl":"100ms","locks":1,"waiters":1}}"#,
    r#"{"limits":{"locks_per_request":0}}"#,
    r#"{"limits":{"locks_per_request":1001}}"#,
    r#"{"limits":{"locks":1.5}}"#,
    r#"{"limits":{"locks":1e3}}"#,
    r#"{"limits":{"locks":-1}}"#,
    r#"{"limits":{"locks":1e400}}"#,
    r#"{"limits":{"locks":18446744073709551615}}"#,
    r#"{"limits":{"max_ttl":"25h"}}"#,
    r#"{"classes":[{"name":"account","rank":10,"principals":["spiffe://mesh/ns/pay/*"]},{"name":"order","rank":20,"permits":3,"within":"unordered"},{"name":"stock","rank":30,"hierarchy":true}]}"#,
    r#"{"classes":[{"name":"a"},{"name":"a"}]}"#,
    r#"{"classes":[{"name":"a"},{"name":"%61"}]}"#,
    r#"{"classes":[{"name":"a/b"}]}"#,
    r#"{"classes":[{"name":""}]}"#,
    r#"{"classes":[{"name":"a","hierarchy":true,"permits":2}]}"#,
    r#"{"classes":[{"name":"a","principals":[]}]}"#,
    r#"{"classes":[{"name":"a","principals":["*","a**b"]}]}"#,
    r#"{"classes":[{"name":"a","rank":4294967295}]}"#,
    r#"{"classes":[{"name":"a","rank":4294967296}]}"#,
    r#"{"classes":{}}"#,
    r#"{"classes":[1]}"#,
    r#"{"annotations":{"header":"pass","route":"ignore"}}"#,
    r#"{"annotations":{"header":"strip"}}"#,
    r#"{"annotations":{"header":"reject"}}"#,
    r#"{"annotations":{"header":"acept"}}"#,
    r#"{"api":{"prefix":"/interlock/v1"}}"#,
    r#"{"guard":[]}"#,
    r#"{"keys":[]}"#,
    r#"{"keys":[{"id":"2026-11","secret":{"env":"INTERLOCK_KEY"}},{"id":"old","secret":{"base64":"MDEyMzQ1Njc4OWFiY2RlZg=="}}]}"#,
    r#"{"keys":[{"id":"a","secret":{"env":"NO"}}]}"#,
    r#"{"keys":[{"id":"a","secret":{"base64":"c2hvcnQ="}}]}"#,
    r#"{"keys":[{"id":"a","secret":{"base64":"MDEyMzQ1Njc4OWFiY2RlZg"}}]}"#,
    r#"{"keys":[{"id":"a","secret":{}}]}"#,
    r#"{"keys":[{"id":"a b","secret":{"env":"INTERLOCK_KEY"}}]}"#,
    r#"{"keys":[{"id":"a","secret":{"env":"INTERLOCK_KEY"}},{"id":"a","secret":{"env":"INTERLOCK_KEY"}}]}"#,
    "",
    "  ",
    "null",
    "[]",
    "\"a\"",
    "1",
    "{",
    "{\"a\":}",
    "\n{\"instance\":\"a\"}",
    "{\"instance\":\"a\"} x",
    r#"{"guard":[{"match":{"methods":["PUT"],"path":"/o/{id}"},"lock":"o/{id}","check":"owner"}]}"#,
    r#"{"guard":[{"match":{"path":"/o/{id}"},"lock":"o/{header:x}","check":"fence","enforcement":"audit","on_backend_unavailable":"allow"}],"keys":[{"id":"k","secret":{"base64":"MDEyMzQ1Njc4OWFiY2RlZg=="}}]}"#,
    r#"{"guard":[{"match":{"path":"/o/{id}"},"lock":"o/{id}","check":"fence"}]}"#,
    r#"{"classes":[{"name":"o","permits":2}],"guard":[{"match":{"path":"/o"},"lock":"o","check":"fence"},{"match":{"path":"/o"},"lock":"p","check":"owner"}]}"#,
];

/// Rules, to stand in `rules`.
const RULES: [&str; 44] = [
    r#"{"name":"r","match":{"path":"/orders/{id}/capture"},"locks":[{"name":"order/{id}"}]}"#,
    r#"{"name":"r","match":{"methods":["POST"],"path":"/orders/{id}/capture","headers":{"x-tier":"gold"},"route":"r"},"locks":[{"name":"order/{id}","mode":"shared","wait":"1s","ttl":"2s","hold":"3s"}],"wait":"1s","on_lease_lost":"continue","enforcement":"audit","on_backend_unavailable":"allow"}"#,
    r#"{"name":"r","match":{"path":"/{*rest}"},"locks":[{"name":"a/{rest}"},{"name":"b/{header:x-account}"},{"name":"c/{query:q}"},{"name":"d/{method}"},{"name":"e/{principal}"}]}"#,
    r#"{"name":"r","match":{"headers":{"x-tier":"*"}},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"route":"r"},"locks":[{"name":"a"}],"enforcement":"off"}"#,
    r#"{"name":"r","match":{},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"orders"},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"/a?b"},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"/{a}{b}"},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"/{*a}/b"},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"/{a"},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"/a}"},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"/{a}/{a}"},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"/{method}"},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"/%zz"},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"/\u00fc\u0000"},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"/{{a}}"},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"/{a}.pdf"},"locks":[{"name":"a"}]},{"name":"s","match":{"path":"/{a}.txt"},"locks":[{"name":"b"}]}"#,
    r#"{"name":"r","match":{"path":"/o/{x}"},"locks":[{"name":"a"}]},{"name":"s","match":{"path":"/o/{*y}"},"locks":[{"name":"b"}]}"#,
    r#"{"name":"r","match":{"path":"/o/{x}"},"locks":[{"name":"a"}]},{"name":"s","match":{"path":"/o/{y}"},"locks":[{"name":"b"}]}"#,
    r#"{"name":"r","match":{"path":"/o/{x}","methods":["GET"]},"locks":[{"name":"a"}]},{"name":"s","match":{"path":"/o/{y}"},"locks":[{"name":"b"}]}"#,
    r#"{"name":"r","match":{"path":"/o/x"},"locks":[{"name":"a"}]},{"name":"s","match":{"path":"/o/{y}"},"locks":[{"name":"b"}]},{"name":"t","match":{"methods":["PUT"]},"locks":[{"name":"c"}]}"#,
    r#"{"name":"r","match":{"methods":["post"]},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"methods":["POST","POST"]},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"methods":[]},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"methods":["M-SEARCH"]},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"headers":{}},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"headers":{"X-A":"1","x-a":"2"}},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"headers":{"a b":"1"}},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"headers":{":path":"/"}},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"route":""},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"/"},"locks":[]}"#,
    r#"{"name":"r","match":{"path":"/"},"locks":[{"name":"a"},{"name":"a"}]}"#,
    r#"{"name":"r","match":{"path":"/"},"locks":[{"name":"a","mode":"intent-shared"}]}"#,
    r#"{"name":"r","match":{"path":"/"},"locks":[{"name":"{id}"}]}"#,
    r#"{"name":"r","match":{"path":"/"},"locks":[{"name":"a/{id}"}]}"#,
    r#"{"name":"r","match":{"path":"/"},"locks":[{"name":"a/{x:y}"}]}"#,
    r#"{"name":"r","match":{"path":"/"},"locks":[{"name":"a/{"}]}"#,
    r#"{"name":"r","match":{"path":"/"},"locks":[{"name":"a","ttl":"30s","hold":"1s"}]}"#,
    r#"{"name":"r","match":{"path":"/"},"locks":[{"name":"a"}],"hold":"1s"}"#,
    r#"{"name":"r","match":{"path":"/"},"locks":[{"name":"a","wait":"1h"}]}"#,
    r#"{"name":"r","match":{"path":"/"},"locks":[{"name":"a"}]},{"name":"r","match":{"path":"/b"},"locks":[{"name":"a"}]}"#,
    r#"{"name":"r b","match":{"path":"/"},"locks":[{"name":"a"}]}"#,
    r#"{"match":{"path":"/"},"locks":[{"name":"a"}]}"#,
];

/// The seeds of the target.
pub fn seeds(cases: &[Value]) -> Seeds {
    let mut seeds = Seeds::default();
    for (page, policy) in pages::policies() {
        both(&mut seeds, &format!("page-{page}"), &policy.to_string());
    }
    for cell in pages::cells("| in the policy | line |") {
        if let Some(policy) = pages::yaml(&cell) {
            both(&mut seeds, "page-error", &policy.to_string());
        }
    }
    // Every second one as a Struct too: the two forms differ before the policy is looked at.
    for (index, text) in FIELDS.iter().enumerate() {
        if index % 2 == 0 { both(&mut seeds, "field", text) } else { seeds.add("field", *text) }
    }
    for (index, rules) in RULES.iter().enumerate() {
        let text = format!(r#"{{"rules":[{rules}]}}"#);
        if index % 2 == 0 { both(&mut seeds, "rules", &text) } else { seeds.add("rules", text) }
    }
    for case in cases {
        let classes = case["locks"].as_object().into_iter().flatten().filter(|(_, says)| says != &&json!({}));
        let classes: Vec<Value> = classes
            .map(|(name, says)| {
                let mut class = says.clone();
                class["name"] = json!(name);
                class
            })
            .collect();
        if !classes.is_empty() {
            seeds.add("case", json!({ "classes": classes }).to_string());
        }
    }
    seeds.add("hostile", "[".repeat(200));
    seeds.add("hostile", format!("{}1{}", "{\"a\":".repeat(130), "}".repeat(130)));
    seeds.add("hostile", format!(r#"{{"{}":1}}"#, "x".repeat(300)));
    seeds.add("hostile", format!(r#"{{"instance":"{}"}}"#, "x".repeat(300)));
    seeds.add(
        "hostile",
        format!(r#"{{"rules":[{{"name":"r","match":{{"path":"/{}"}},"locks":[{{"name":"a"}}]}}]}}"#, "{a}/".repeat(60)),
    );
    seeds.add("hostile", &b"\xef\xbb\xbf{}"[..]);
    seeds.add("hostile", &b"{\"instance\":\"\xff\"}"[..]);
    seeds.add("hostile-struct", &b"\x0a"[..]);
    seeds.add("hostile-struct", &b"\x0a\xff\xff\xff\xff\x0f"[..]);
    seeds.add("hostile-struct", &b"\x0a\x02\x0a\x00"[..]);
    seeds.add("hostile-struct", &b"\x0a\x05\x12\x03\x2a\x01\x0a"[..]);
    // A number that is none, where a number is wanted.
    seeds.add("hostile-struct", nan());
    let mut nested = json!(1);
    (0..60).for_each(|_| nested = json!({ "a": nested }));
    seeds.add("hostile-struct", to_struct(&nested));
    seeds
}

/// A policy as JSON and as a Struct.
fn both(seeds: &mut Seeds, stem: &str, text: &str) {
    seeds.add(stem, text);
    if let Ok(value) = serde_json::from_str::<Value>(text)
        && value.is_object()
    {
        seeds.add(&format!("{stem}-struct"), to_struct(&value));
    }
}

fn nan() -> Vec<u8> {
    let mut bytes = to_struct(&json!({ "limits": { "locks": 1.0 } }));
    let at = bytes.len() - 8;
    bytes[at..].copy_from_slice(&f64::NAN.to_le_bytes());
    bytes
}
