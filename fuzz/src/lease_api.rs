//! A request to the lease API, from its bytes to its answer: what it asks for, what a receipt is worth, and what is told of the
//! lease and of the table.
//!
//! Input: a line `METHOD PATH`, the path as it stands behind the API's prefix; behind its line feed the body. The path is also what
//! is written into `authorization`, and the name of a second owner, who asks for the same locks: owners may be any text.

use std::sync::LazyLock;

use interlock::annotation::Wanted;
use interlock::answer::Reject;
use interlock::api::body::{self, Broken, BrokenGrant, Conflict, Conflicts, Graph, LockView, Locks};
use interlock::api::call::{ApiError, LeaseName, Put, Renew};
use interlock::api::{MAX_BODY, Target, receipt};
use interlock::backend::Purpose;
use interlock::backend::local::Local;
use interlock::filter::intake;
use interlock::host::Host;
use interlock::policy::{Keys, Policy, spell_duration};
use interlock_core::lease::{Answer, Granted, Receipt, Renewed};
use interlock_core::{Duration, Edge, LockName, OwnerId, Request, Rules, Want};
use serde_json::{Value, json};

use crate::check::refusal;
use crate::fields::Fields;
use crate::host::{Bench, UNIX_MS};
use crate::lock_fence::KEYS;

/// What an administrator writes behind `Bearer `.
pub const TOKEN: &str = "a token of the inputs";

/// The lease of every input.
pub const LEASE: &str = "lease-of-an-input";

/// The longest complaint.
const MOST: usize = 300;

const PREFIX: &[u8] = b"/interlock/v1/";

fn policy(keys: &[(&str, &str)]) -> Policy {
    let all = [keys, &[("token", TOKEN)]].concat();
    let env = |name: &str| all.iter().find(|(id, _)| *id == name).map(|(_, secret)| (*secret).to_owned());
    let keys: Vec<Value> = keys.iter().map(|(id, _)| json!({ "id": id, "secret": { "env": id } })).collect();
    let policy = json!({
        "keys": keys,
        "api": { "admin": { "token": { "env": "token" } } },
        "classes": [
            { "name": "pool", "permits": 2 },
            { "name": "t", "hierarchy": true },
            { "name": "r", "rank": 2 },
            { "name": "q", "rank": 1 },
        ],
    });
    Policy::parse(policy.to_string().as_bytes(), &env).expect("a policy")
}

static POLICY: LazyLock<Policy> = LazyLock::new(|| policy(&KEYS));
static OLD: LazyLock<Policy> = LazyLock::new(|| policy(&KEYS[1..]));
static OTHER: LazyLock<Policy> = LazyLock::new(|| policy(&[(KEYS[0].0, "another secret of this id")]));

/// See the module.
pub fn run(data: &[u8]) {
    let (line, body) = cut(data, b'\n');
    let (method, rest) = cut(line, b' ');
    let api = POLICY.api.as_ref().expect("the policy has it");
    assert_eq!(api.rest(&[PREFIX, rest].concat()), Some(rest));
    let bearer = rest
        .split_at_checked(7)
        .is_some_and(|(scheme, token)| scheme.eq_ignore_ascii_case(b"bearer ") && token == TOKEN.as_bytes());
    assert_eq!(api.is_admin(None, Some(rest)), bearer);

    target(method, rest);
    if let Ok(text) = std::str::from_utf8(body) {
        opened(text);
    }
    renewal(body);
    let Some(put) = asked(body) else { return };
    let beside: String = String::from_utf8_lossy(rest).chars().take(60).collect();
    serve(put, &OwnerId::new(&beside).unwrap_or_else(|| OwnerId::new("-").expect("an owner")), data.len());
}

/// What stands before the first such byte, and what behind it.
fn cut(data: &[u8], at: u8) -> (&[u8], &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == at);
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}

/// A complaint is one bounded line without control characters, and the client's fault.
fn complaint(error: &ApiError) {
    let text = error.to_string();
    assert!(!text.is_empty() && text.chars().count() <= MOST, "{} characters: {text:?}", text.chars().count());
    assert!(!text.chars().any(char::is_control), "control characters in {text:?}");
    let expected = match error.slug() {
        "malformed-request" => 400,
        "not-found" => 404,
        "method-not-allowed" => 405,
        "body-too-large" => 413,
        other => panic!("a request is refused as {other} before anybody looked"),
    };
    assert_eq!(error.status(), expected);
}

/// What a request is about: what is read, printed, is read as the same.
fn target(method: &[u8], rest: &[u8]) {
    match Target::read(method, rest) {
        Ok(target) => {
            let (method, path) = printed(&target);
            assert_eq!(Target::read(method.as_bytes(), path.as_bytes()), Ok(target), "{method} {path}");
        }
        Err(error) => {
            complaint(&error);
            if let ApiError::Method { allow } = error {
                for other in allow.split(", ") {
                    assert_ne!(other.as_bytes(), method, "it is said to be callable so");
                    let read = Target::read(other.as_bytes(), rest);
                    assert!(!matches!(read, Err(ApiError::Method { .. } | ApiError::NotFound(_))), "{other}: {read:?}");
                }
            }
        }
    }
}

fn printed(target: &Target) -> (&'static str, String) {
    match target {
        Target::Acquire(name) => ("PUT", format!("leases/{}", name.as_str())),
        Target::Renew => ("POST", "leases/renew".into()),
        Target::Release(name) => ("DELETE", format!("leases/{}", name.as_str())),
        Target::Lease(name) => ("GET", format!("leases/{}", name.as_str())),
        Target::Locks { from, limit } => ("GET", format!("locks?page={from}&limit={limit}")),
        Target::Lock(name) => ("GET", format!("locks/{name}")),
        Target::Break(name) => ("DELETE", format!("locks/{name}")),
        Target::Graph => ("GET", "graph".into()),
        Target::Deadlocks => ("GET", "deadlocks".into()),
        Target::Health => ("GET", "health".into()),
    }
}

/// Whether a body that was refused was refused for its length, if it has one that is too much.
fn refused(error: &ApiError, body: &[u8]) {
    complaint(error);
    assert_eq!(*error == ApiError::TooLarge, body.len() > MAX_BODY);
}

fn asked(body: &[u8]) -> Option<Put> {
    let put = Put::read(body).map_err(|error| refused(&error, body)).ok()?;
    assert!(body.len() <= MAX_BODY && !put.wanted.is_empty());
    put.receipt.iter().for_each(|text| opened(text));
    let lock = |wanted: &Wanted| match wanted.mode {
        Some(mode) => json!({ "name": wanted.name, "mode": mode.as_str() }),
        None => json!({ "name": wanted.name }),
    };
    let mut text = json!({ "owner": put.owner, "locks": put.wanted.iter().map(lock).collect::<Vec<_>>() });
    let spans = [("wait", put.wanted[0].wait), ("ttl", put.wanted[0].ttl)];
    for (field, span) in spans.into_iter().filter_map(|(field, span)| Some((field, span?))) {
        text[field] = json!(spell_duration(span));
    }
    if let Some(receipt) = &put.receipt {
        text["receipt"] = json!(receipt);
    }
    let text = text.to_string();
    if text.len() <= MAX_BODY {
        assert_eq!(Put::read(text.as_bytes()).as_ref(), Ok(&put), "{text}");
    }
    Some(put)
}

fn renewal(body: &[u8]) {
    let renew = match Renew::read(body) {
        Ok(renew) => renew,
        Err(error) => return refused(&error, body),
    };
    assert!(body.len() <= MAX_BODY);
    renew.leases.iter().filter_map(|(_, receipt)| receipt.as_deref()).for_each(opened);
    let lease = |(name, receipt): &(LeaseName, Option<String>)| json!({ "id": name.as_str(), "receipt": receipt });
    let mut text = json!({ "leases": renew.leases.iter().map(lease).collect::<Vec<_>>() });
    if let Some(ttl) = renew.ttl {
        text["ttl"] = json!(spell_duration(ttl));
    }
    let text = text.to_string();
    if text.len() <= MAX_BODY {
        assert_eq!(Renew::read(text.as_bytes()), Ok(renew), "{text}");
    }
}

/// What opens was sealed with one of the keys, and has one spelling.
fn opened(text: &str) {
    if let Some(opened) = receipt::open(&POLICY.keys, text) {
        let sealed = [&POLICY.keys, &OLD.keys].map(|keys: &Keys| receipt::seal(keys, &opened));
        assert!(sealed.iter().flatten().any(|sealed| sealed == text), "{text:?} was never sealed");
    }
}

/// The receipt of a grant of what the body asks for, sealed with each of the keys.
pub fn sealed(body: &[u8]) -> Option<[String; 2]> {
    let Put { owner, wanted, .. } = Put::read(body).ok()?;
    let wants = intake::wants(&POLICY, wanted, Duration::MAX, &owner, || None).ok()?;
    let host = Bench::with_request(Fields::parse(&[]));
    let name = LeaseName::parse(LEASE).expect("a lease id");
    match Authority::open(&host, Duration::ZERO).put(&name, &owner, &wants, None) {
        Answer::Granted { granted, .. } => {
            let seal = |policy: &Policy| receipt::seal(&policy.keys, &granted.receipt).expect("there are keys");
            Some([seal(&POLICY), seal(&OLD)])
        }
        _ => None,
    }
}

/// Asks for what the body says, for its owner and for another, and looks at all that is told of it.
fn serve(put: Put, beside: &OwnerId, number: usize) {
    let Put { owner, wanted, .. } = put;
    let wants = match intake::wants(&POLICY, wanted, Duration::MAX, &owner, || None) {
        Ok(wants) => wants,
        Err(reject) => return refusal(&reject, MOST),
    };
    let host = Bench::with_request(Fields::parse(&[]));
    let mut authority = Authority::open(&host, Duration::ZERO);
    let name = LeaseName::parse(LEASE).expect("a lease id");
    let granted = match authority.put(&name, &owner, &wants, None) {
        Answer::Granted { granted, new: true } => granted,
        Answer::Refused(refusal) => return drop(object(&Reject::Core(*refusal).problem_json())),
        other => panic!("an empty table answers {other:?}"),
    };
    let told = lease(&name, &granted);
    assert_eq!((&told["owner"], &told["id"]), (&json!(owner), &json!(LEASE)));
    receipts(&granted.receipt, number);
    brought_back(&name, &owner, &wants, &granted);

    let other = LeaseName::parse("lease-of-another-owner").expect("a lease id");
    match authority.put(&other, beside, &wants, None) {
        Answer::Granted { granted, .. } => drop(lease(&other, &granted)),
        Answer::Refused(refusal) => drop(object(&Reject::Core(*refusal).problem_json())),
        Answer::Parked(parked) => {
            authority.look(&owner, beside);
            authority.local.leave(&host, &authority.rules, parked);
        }
        Answer::Over(_) | Answer::Taken => panic!("nobody knows this lease"),
    }
    authority.look(&owner, beside);
    authority.remember(&owner, beside, &wants[0].name);
    authority.end(&name, &wants[0].name);
}

/// A lease as it is told.
fn lease(name: &LeaseName, granted: &Granted) -> Value {
    let told = object(&body::json(&body::Lease::new(name, granted, receipt::seal(&POLICY.keys, &granted.receipt))));
    let locks = told["locks"].as_array().expect("locks");
    assert_eq!(locks.len(), granted.grants.iter().filter(|grant| grant.asked).count());
    told
}

/// A receipt opens as what was sealed, under the keys that know it, and to the last byte.
fn receipts(receipt: &Receipt, number: usize) {
    for keys in [&POLICY.keys, &OLD.keys] {
        let sealed = receipt::seal(keys, receipt).expect("there are keys");
        assert_eq!(receipt::open(&POLICY.keys, &sealed).as_ref(), Some(receipt));
        assert_eq!(receipt::open(&OTHER.keys, &sealed), None, "another secret");
        for at in (number % 8..sealed.len()).step_by(8) {
            let mut flipped = sealed.clone().into_bytes();
            flipped[at] ^= 1;
            let flipped = String::from_utf8(flipped).expect("still ASCII");
            assert_eq!(receipt::open(&POLICY.keys, &flipped), None, "byte {at} was changed");
            assert_eq!(receipt::open(&POLICY.keys, &sealed[..at]), None, "cut to {at} bytes");
        }
        assert_eq!(receipt::open(&POLICY.keys, &format!("{sealed}A")), None, "there is more behind it");
    }
    assert_eq!(receipt::seal(&Keys::default(), receipt), None);
}

/// An authority without memory, which grants nothing yet, brings the lease back under its fences.
fn brought_back(name: &LeaseName, owner: &OwnerId, wants: &[Want], granted: &Granted) {
    let host = Bench::with_request(Fields::parse(&[]));
    let mut authority = Authority::open(&host, Duration::from_secs(10));
    assert!(matches!(authority.put(name, owner, wants, None), Answer::Refused(_)), "it grants nothing yet");
    match authority.put(name, owner, wants, Some(&granted.receipt)) {
        Answer::Granted { granted: back, .. } => {
            let fences = |granted: &Granted| granted.grants.iter().map(|grant| grant.fence).collect::<Vec<_>>();
            assert_eq!(fences(&back), fences(granted));
        }
        other => panic!("its own receipt is answered {other:?}"),
    }
}

/// The table behind the API, and who looks at it.
struct Authority<'h, 'a> {
    host: &'h Bench<'a>,
    local: Local,
    rules: Rules,
}

impl<'h, 'a> Authority<'h, 'a> {
    fn open(host: &'h Bench<'a>, grace: Duration) -> Self {
        let mut local = Local::open(host, "fuzz", Purpose::Enforce).expect("the host never fails");
        let rules = Rules { classes: POLICY.classes.clone(), grace, ..crate::records::rules() };
        local.beat(host, &rules).expect("the store never fails");
        Authority { host, local, rules }
    }

    fn put(&mut self, name: &LeaseName, owner: &OwnerId, wants: &[Want], receipt: Option<&Receipt>) -> Answer {
        let request = Request::new(name.id(), owner.clone(), self.host.now(), wants.to_vec(), &self.rules.classes);
        let request = request.asked_by(owner.to_string());
        self.local.put(self.host, &self.rules, request, receipt).expect("the store never fails")
    }

    /// Everything that can be asked of the table.
    fn look(&mut self, owner: &OwnerId, beside: &OwnerId) {
        let (queues, next) = self.local.locks(self.host, &self.rules, 0, 1000).expect("the store never fails");
        assert!(next.is_none() && queues.len() < 1000);
        let now = self.host.now();
        let view = |queue| LockView::new(queue, self.local.sessions(), now);
        let told = object(&body::json(&Locks { locks: queues.iter().map(view).collect(), next }));
        for lock in told["locks"].as_array().expect("locks") {
            LockName::parse(lock["name"].as_str().expect("a name")).expect("a lock name");
            let of = |role: &str| lock[role].as_array().expect("entries").clone();
            for entry in [of("holders"), of("waiters")].concat() {
                assert!(entry["owner"] == json!(owner) || entry["owner"] == json!(beside), "{entry}");
            }
        }
        let (edges, truncated) = self.local.edges(self.host, &self.rules, 10_000).expect("the store never fails");
        let graph = Graph { edges, truncated };
        let told = object(&body::json(&graph));
        assert_eq!(told["edges"].as_array().map(Vec::len), Some(graph.edges.len()));
        dot(&graph);
    }

    fn remember(&self, owner: &OwnerId, beside: &OwnerId, lock: &LockName) {
        let edge = Edge { owner: owner.clone(), waits_for: lock.clone(), held_by: beside.clone() };
        let conflict = Conflict {
            at_unix_ms: UNIX_MS,
            reason: "deadlock".into(),
            owner: owner.to_string(),
            lock: lock.to_string(),
            asked_by: beside.to_string(),
            cycle: vec![edge],
            held: None,
        };
        self.local.remember(self.host, &conflict);
        let deadlocks = self.local.remembered(self.host).expect("the store never fails");
        assert_eq!(deadlocks, std::slice::from_ref(&conflict));
        let told = object(&body::json(&Conflicts { deadlocks }));
        assert_eq!(told["deadlocks"][0]["cycle"][0]["held_by"], json!(beside));
    }

    /// Renews the lease, takes a lock of it away, and gives it back.
    fn end(&mut self, name: &LeaseName, lock: &LockName) {
        let (host, rules) = (self.host, &self.rules);
        let renewed = self.local.renew(host, rules, name.id(), None, None).expect("the store never fails");
        assert!(matches!(renewed, Renewed::Renewed { .. }));
        let ended = self.local.break_glass(host, rules, lock).expect("the store never fails");
        object(&body::json(&Broken { ended: ended.iter().map(BrokenGrant::from).collect() }));
        let renewed = self.local.renew(host, rules, name.id(), None, None).expect("the store never fails");
        let told = object(&body::json(&body::RenewResult::new(name, renewed)));
        assert_eq!(told["status"], "lost", "a lock of it was taken away");
        let deleted = self.local.delete(host, rules, name.id()).expect("the store never fails");
        object(&body::json(&body::Status::from(deleted)));
        assert!(self.local.get(host, rules, name.id()).expect("the store never fails").is_none());
    }
}

/// An answer: JSON, and no control character as it is.
fn object(bytes: &[u8]) -> Value {
    let text = std::str::from_utf8(bytes).expect("JSON is UTF-8");
    assert!(!text.bytes().any(|byte| byte < 0x20), "{text:?}");
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert!(value.is_object());
    value
}

/// The graph in DOT says the same, a line an edge, whatever owners are called.
fn dot(graph: &Graph) {
    let text = graph.dot();
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");
    let lines: Vec<&str> = text.lines().collect();
    let [first, edges @ .., last] = lines.as_slice() else { panic!("{text:?}") };
    assert_eq!((*first, *last, edges.len()), ("digraph waits_for {", "}", graph.edges.len()));
    for (line, Edge { owner, waits_for, held_by }) in edges.iter().zip(&graph.edges) {
        let rest = line.strip_prefix("  ").expect("an edge");
        let (from, rest) = string(rest);
        let (to, rest) = string(rest.strip_prefix(" -> ").expect("an arrow"));
        let (label, rest) = string(rest.strip_prefix(" [label=").expect("a label"));
        assert_eq!(
            (from.as_str(), to.as_str(), label.as_str()),
            (owner.as_str(), held_by.as_str(), waits_for.as_str())
        );
        assert_eq!(rest, "];");
    }
}

/// A string in quotes, and what stands behind it.
fn string(text: &str) -> (String, &str) {
    let (mut value, mut rest) = (String::new(), text.strip_prefix('"').expect("a quote"));
    loop {
        let next = rest.chars().next().expect("the string ends");
        rest = &rest[next.len_utf8()..];
        match next {
            '"' => return (value, rest),
            '\\' => {
                let escaped = rest.chars().next().expect("something is escaped");
                rest = &rest[escaped.len_utf8()..];
                value.push(match escaped {
                    'n' => '\n',
                    'u' => {
                        let (code, behind) = rest.strip_prefix('{').and_then(|it| it.split_once('}')).expect("a code");
                        rest = behind;
                        u32::from_str_radix(code, 16).ok().and_then(char::from_u32).expect("a character")
                    }
                    '"' | '\\' => escaped,
                    other => panic!("\\{other} is nothing that was escaped"),
                });
            }
            other => value.push(other),
        }
    }
}
