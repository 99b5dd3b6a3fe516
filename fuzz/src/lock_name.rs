//! Lock names, and the names that rules make of requests.
//!
//! Input: [`Fields`]. `name` is a lock name as written, `value` bytes to go into one. `path` and `template` (any number) are
//! a rule's; all else is the request that the rule is asked about: `:path`, `:method`, `%principal`, headers.

use std::collections::BTreeSet;

use interlock::policy::{FillError, Lookup, Policy};
use interlock_core::LockName;
use interlock_core::name::MAX_NAME;
use serde_json::json;

use crate::check::{one_line, percent_decode, percent_encode};
use crate::fields::Fields;

/// See the module.
pub fn run(data: &[u8]) {
    let fields = Fields::parse(data);
    fields.all("name").into_iter().for_each(name);
    fields.all("value").into_iter().for_each(value);
    rule(&fields);
}

/// A name has one spelling, which means what was written.
fn name(written: &[u8]) {
    let name = match LockName::from_bytes(written) {
        Ok(name) => name,
        Err(error) => return one_line(&error.to_string(), 120),
    };
    let text = name.as_str();
    assert!(text.len() <= written.len() && written.len() <= MAX_NAME, "{text}");
    assert_eq!(LockName::parse(text).as_ref(), Ok(&name));
    let segments: Vec<Vec<u8>> = text.split('/').map(percent_decode).collect();
    let meant = std::str::from_utf8(written).expect("ASCII").split('/').map(percent_decode);
    assert_eq!(segments, meant.collect::<Vec<_>>(), "{text}");
    let spelled: Vec<String> = segments.iter().map(|segment| percent_encode(segment)).collect();
    assert_eq!(spelled.join("/"), text, "the one spelling is the shortest");

    assert_eq!(name.class(), spelled[0]);
    let ancestors: Vec<LockName> = name.ancestors().collect();
    assert_eq!(ancestors.len(), spelled.len() - 1);
    for (depth, ancestor) in ancestors.iter().enumerate() {
        assert_eq!(ancestor.as_str(), spelled[..=depth].join("/"));
        assert!(*ancestor < name);
    }
}

/// Any bytes become one segment, and come out of it again.
fn value(bytes: &[u8]) {
    let mut text = String::from("c/");
    LockName::encode_into(&mut text, bytes);
    assert_eq!(text, format!("c/{}", percent_encode(bytes)));
    match LockName::parse(&text) {
        Ok(name) => assert_eq!(name.as_str(), text),
        Err(_) => assert!(bytes.is_empty() || text.len() > MAX_NAME, "{text}"),
    }
}

/// The names that a rule makes: each value stays in its segment, and no spelling of the path evades the rule.
fn rule(fields: &Fields<'_>) {
    let templates: Vec<String> =
        fields.all("template").iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect();
    let locks: Vec<_> = templates.iter().map(|name| json!({ "name": name })).collect();
    let conditions = match fields.text("path") {
        Some(path) => json!({ "path": path }),
        None => json!({ "headers": { ":path": "*" } }),
    };
    let policy = json!({ "rules": [{ "name": "r", "match": conditions, "locks": locks }] });
    let policy = match Policy::parse(policy.to_string().as_bytes(), &|_| None) {
        Ok(policy) => policy,
        Err(error) => {
            let line = error.to_string();
            assert!(line.starts_with("rules[0].") && !line.contains(char::is_control), "{line:?}");
            return;
        }
    };
    let path = fields.first(":path").unwrap_or(b"/");
    let found = find(&policy, fields, path);
    // A template may ask for the path as it is written.
    let respelled = if templates.iter().any(|text| text.to_ascii_lowercase().contains("header::path")) {
        path.to_vec()
    } else {
        respell(path)
    };
    assert_eq!(found, find(&policy, fields, &respelled), "another spelling of the path is another lock");
    match found {
        None => {}
        Some(Err(error)) => one_line(&error.to_string(), 1024 + templates.iter().map(String::len).sum::<usize>()),
        Some(Ok(names)) => {
            assert_eq!(names.len(), templates.len());
            names.iter().zip(&templates).for_each(|(name, template)| fits(name, template, fields));
        }
    }
}

fn find(policy: &Policy, fields: &Fields<'_>, path: &[u8]) -> Option<Result<Vec<LockName>, FillError>> {
    let header =
        |name: &str| if name == ":path" { Some(path.to_vec()) } else { fields.first(name).map(<[u8]>::to_vec) };
    let lookup = Lookup {
        method: fields.first(":method").unwrap_or(b"GET"),
        path,
        header: &header,
        route: &|| None,
        principal: &|| fields.first("%principal").map(<[u8]>::to_vec),
    };
    let found = policy.rules.find(&lookup)?;
    Some(found.locks(&lookup).map(|locks| locks.into_iter().map(|lock| lock.name).collect()))
}

/// The path with every letter and digit percent-encoded that is not so already.
fn respell(path: &[u8]) -> Vec<u8> {
    let mut spelled = Vec::new();
    let mut rest = path;
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        if let (b'%', [high, low, behind @ ..]) = (byte, tail)
            && high.is_ascii_hexdigit()
            && low.is_ascii_hexdigit()
        {
            spelled.extend_from_slice(&[b'%', high.to_ascii_lowercase(), low.to_ascii_lowercase()]);
            rest = behind;
        } else if byte.is_ascii_alphanumeric() {
            spelled.extend_from_slice(format!("%{byte:02x}").as_bytes());
        } else {
            spelled.push(*byte);
        }
    }
    spelled
}

/// Part of a name as its template has it.
enum Piece {
    /// This text.
    Known(String),
    /// One byte or more of one segment.
    Value,
}

/// Holds a name against what its template and the request say.
fn fits(name: &LockName, template: &str, fields: &Fields<'_>) {
    let text = name.as_str();
    // Where what has been matched so far may end.
    let mut ends = BTreeSet::from([0]);
    for piece in pieces(template, fields) {
        let mut next = BTreeSet::new();
        for at in ends {
            match &piece {
                Piece::Known(known) if text[at..].starts_with(known) => drop(next.insert(at + known.len())),
                Piece::Known(_) => {}
                Piece::Value => {
                    let segment = text[at..].split('/').next().unwrap_or_default().len();
                    next.extend(at + 1..=at + segment);
                }
            }
        }
        ends = next;
    }
    assert!(ends.contains(&text.len()), "{name} is not what {template} says");
}

fn pieces(template: &str, fields: &Fields<'_>) -> Vec<Piece> {
    let spelled = |text: &str| text.split('/').map(|part| percent_encode(&percent_decode(part))).collect::<Vec<_>>();
    let path = fields.text("path").unwrap_or_default();
    let mut pieces = Vec::new();
    let mut rest = template;
    while let Some((literal, behind)) = rest.split_once('{') {
        let (place, behind) = behind.split_once('}').expect("a template that was read");
        pieces.push(Piece::Known(spelled(literal).join("/")));
        let known = match place {
            // A capture may have any name, but not these two.
            "method" => Some(fields.first(":method").unwrap_or(b"GET")),
            "principal" => fields.first("%principal"),
            _ if path.contains(&format!("{{{place}}}")) || place == "header::path" => None,
            _ => place.strip_prefix("header:").and_then(|name| fields.first(&name.to_ascii_lowercase())),
        };
        pieces.push(known.map_or(Piece::Value, |value| Piece::Known(percent_encode(value))));
        rest = behind;
    }
    pieces.push(Piece::Known(spelled(rest).join("/")));
    pieces
}
