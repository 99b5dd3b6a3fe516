//! What several targets hold the shipped code against: one-line errors, and refusals as the contract has them.

use interlock::answer::Reject;
use interlock::answer::headers::{Outcome, lock_status};
use serde_json::Value;
use sfv::{List, ListEntry, Parser};

/// An error is one line of printable ASCII, and no longer than `most` bytes whatever the input was.
pub fn one_line(text: &str, most: usize) {
    assert!(!text.is_empty() && text.len() <= most, "{} bytes of complaint: {text:?}", text.len());
    assert!(text.bytes().all(|byte| (0x20..0x7F).contains(&byte)), "not one line of printable ASCII: {text:?}");
}

/// A refusal in all its forms: the body, the gRPC form, `lock-status`, `retry-after`. `most` bounds its detail.
pub fn refusal(reject: &Reject, most: usize) {
    let detail = reject.detail();
    one_line(&detail, most);
    let expected = match reject.slug() {
        "malformed-annotation" => (400, 3, false),
        "forbidden" => (403, 7, false),
        "too-many-locks" => (429, 8, true),
        other => panic!("a request is refused as {other} before anything was locked"),
    };
    assert_eq!((reject.http_status(), reject.grpc_status(), reject.retry_after_seconds().is_some()), expected);
    assert_eq!(percent_decode(&reject.grpc_message()), detail.as_bytes());

    let body: Value = serde_json::from_slice(&reject.problem_json()).expect("the body is JSON");
    assert_eq!(body["type"], format!("urn:interlock:problem:{}", reject.slug()));
    assert_eq!((&body["status"], &body["detail"]), (&Value::from(reject.http_status()), &Value::from(detail)));
    assert_eq!(body["lock"].as_str(), reject.lock().map(|lock| lock.as_str()));

    let status = lock_status("fuzz", &Outcome::Refused { reason: reject.slug(), lock: reject.lock() });
    let list: List = Parser::new(&status).parse().expect("lock-status is a List");
    let [ListEntry::Item(item)] = list.as_slice() else { panic!("one member: {status}") };
    assert_eq!(
        item.params.get("reason").and_then(|reason| reason.as_token()).map(|reason| reason.as_str()),
        Some(reject.slug())
    );
    assert_eq!(
        item.params.get("lock").map(|lock| lock.as_string().expect("a String").as_str()),
        reject.lock().map(|lock| lock.as_str())
    );
}

/// Text with every `%HH` undone.
pub fn percent_decode(text: &str) -> Vec<u8> {
    let mut decoded = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        let code = text_of(tail).and_then(|code| u8::from_str_radix(code, 16).ok()).filter(|_| *byte == b'%');
        decoded.push(code.unwrap_or(*byte));
        rest = if code.is_some() { &tail[2..] } else { tail };
    }
    decoded
}

fn text_of(tail: &[u8]) -> Option<&str> {
    let code = tail.get(..2)?;
    code.iter().all(u8::is_ascii_hexdigit).then(|| std::str::from_utf8(code).ok()).flatten()
}

/// Bytes as a segment of a lock name spells them, from the words of the contract: `A-Z a-z 0-9 . _ ~ : @ -` stand for
/// themselves, all else is `%HH`.
pub fn percent_encode(value: &[u8]) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._~:@-".contains(&byte);
    let spell = |byte: &u8| if plain(*byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") };
    value.iter().map(spell).collect()
}
