//! Lock names with places to fill in from a request: `order/{id}`, `account/{header:x-account}`.
//!
//! Values are percent-encoded into the name, so that none can reach beyond its segment. What comes from the path or
//! the query is percent-decoded before that, exactly once: `/orders/%34%32` and `/orders/42` are one lock, and
//! `%2534` is not `4`.

use interlock_core::{LockName, NameError};

use super::reader::{hint, list, quote};
use super::rules::Lookup;
use crate::annotation::owner::decode;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A capture of the rule's path.
    Capture {
        /// Its place among the captures.
        index: usize,
        /// Its name.
        name: String,
    },
    /// A request header.
    Header(String),
    /// A parameter of the query.
    Query(String),
    /// The request's method.
    Method,
    /// The caller's SPIFFE ID.
    Principal,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Capture { name, .. } => write!(f, "{{{name}}} of the path"),
            Source::Header(name) => write!(f, "header {name}"),
            Source::Query(name) => write!(f, "query parameter {name}"),
            Source::Method => f.write_str("method"),
            Source::Principal => f.write_str("SPIFFE ID of the caller"),
        }
    }
}

/// Why a request gives no name for a lock of a rule. It becomes a 400. Printable ASCII.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FillError {
    /// The source is not there.
    #[error("lock {template}: the request has no {source_name}")]
    Missing {
        /// The lock name as the rule writes it.
        template: String,
        /// The source.
        source_name: String,
    },
    /// The source is there, with nothing in it.
    #[error("lock {template}: the {source_name} is empty")]
    Empty {
        /// The lock name as the rule writes it.
        template: String,
        /// The source.
        source_name: String,
    },
    /// The query has the parameter more than once: which of them the application takes cannot be known.
    #[error("lock {template}: the {source_name} is there more than once")]
    Ambiguous {
        /// The lock name as the rule writes it.
        template: String,
        /// The source.
        source_name: String,
    },
    /// With the values in it the name breaks a rule: it is too long.
    #[error("lock {template}: {error}")]
    Name {
        /// The lock name as the rule writes it.
        template: String,
        /// The rule.
        error: NameError,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Value(Source),
}

/// A lock name of a rule. The class is always literal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    text: String,
    class: String,
    parts: Vec<Part>,
}

impl Template {
    /// Reads a template whose rule captures these names from the path.
    ///
    /// # Errors
    /// What is wrong and the fix, to stand behind the quoted text.
    pub(super) fn parse(text: &str, captures: &[String]) -> Result<Template, String> {
        let mut parts = Vec::new();
        // The template with letters in the places of the values, to be judged by the rules for names.
        let mut sample = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((literal, behind)) = rest.split_once('{') {
            let (place, behind) = behind.split_once('}').ok_or("has a \"{\" without its \"}\"")?;
            if !sample.contains('/') && !literal.contains('/') {
                return Err("has no fixed class; write the first segment out, such as \"order/{id}\"".into());
            }
            parts.push(Part::Text(literal.to_owned()));
            parts.push(Part::Value(source(place, captures)?));
            sample.push_str(literal);
            sample.push_str(&"x".repeat(place.len() + 2));
            rest = behind;
        }
        sample.push_str(rest);
        parts.push(Part::Text(rest.to_owned()));
        parts.retain(|part| !matches!(part, Part::Text(text) if text.is_empty()));
        let name = LockName::parse(&sample).map_err(|error| format!("is not a lock name: {error}"))?;
        Ok(Template { text: text.to_owned(), class: name.class().to_owned(), parts })
    }

    /// The class of every name that this template makes.
    pub fn class(&self) -> &str {
        &self.class
    }

    /// The template as the policy writes it.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The name for one request. `captures` are those of the path, in its normal spelling.
    ///
    /// # Errors
    /// A value is missing, or the name breaks a rule with it.
    pub(super) fn fill(&self, captures: &[String], lookup: &Lookup<'_>) -> Result<LockName, FillError> {
        let mut name = String::new();
        for part in &self.parts {
            match part {
                Part::Text(text) => name.push_str(text),
                Part::Value(source) => LockName::encode_into(&mut name, &self.value(source, captures, lookup)?),
            }
        }
        LockName::parse(&name).map_err(|error| FillError::Name { template: self.text.clone(), error })
    }

    fn value(&self, source: &Source, captures: &[String], lookup: &Lookup<'_>) -> Result<Vec<u8>, FillError> {
        let (template, source_name) = (self.text.clone(), source.to_string());
        let value = match source {
            Source::Capture { index, .. } => captures.get(*index).map(|value| decode(value.as_bytes())),
            Source::Header(name) => (lookup.header)(name),
            Source::Method => Some(lookup.method.to_vec()),
            Source::Principal => (lookup.principal)(),
            Source::Query(name) => {
                let mut values = query_values(lookup.path, name);
                let first = values.next();
                if values.next().is_some() {
                    return Err(FillError::Ambiguous { template, source_name });
                }
                first
            }
        };
        match value {
            None => Err(FillError::Missing { template, source_name }),
            Some(value) if value.is_empty() => Err(FillError::Empty { template, source_name }),
            Some(value) => Ok(value),
        }
    }
}

fn source(place: &str, captures: &[String]) -> Result<Source, String> {
    match place.split_once(':') {
        Some(("header", name)) => match super::header_name(name) {
            Some(name) => Ok(Source::Header(name)),
            None => Err(format!("names {}, which is no header", quote(name))),
        },
        Some(("query", name)) if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic()) => {
            Ok(Source::Query(name.to_owned()))
        }
        Some(("query", name)) => Err(format!("names {}, which is no query parameter", quote(name))),
        Some((kind, _)) => {
            let hint = hint(kind, ["header", "query"], || "; use header or query".into());
            Err(format!("has a source {}, which there is not{hint}", quote(kind)))
        }
        None => match captures.iter().position(|name| name == place) {
            Some(index) => Ok(Source::Capture { index, name: place.to_owned() }),
            None if place == "method" => Ok(Source::Method),
            None if place == "principal" => Ok(Source::Principal),
            None => {
                let mut names: Vec<&str> = captures.iter().map(String::as_str).collect();
                names.extend(["method", "principal"]);
                let hint = hint(place, names.iter().copied(), || {
                    format!("; use {}, header:NAME or query:NAME", list(&names).replace(" or ", ", "))
                });
                Err(format!("names {}, which the rule's path does not capture{hint}", quote(place)))
            }
        },
    }
}

/// The values of a query parameter, as forms write them: a plus is a space, the rest is percent-decoded.
fn query_values<'a>(path: &'a [u8], name: &'a str) -> impl Iterator<Item = Vec<u8>> + 'a {
    let query = path.splitn(2, |byte| *byte == b'?').nth(1).unwrap_or_default();
    let query = query.split(|byte| *byte == b'#').next().unwrap_or_default();
    query.split(|byte| *byte == b'&').filter_map(move |pair| {
        let mut sides = pair.splitn(2, |byte| *byte == b'=');
        let key = form_decode(sides.next()?);
        (key == name.as_bytes()).then(|| form_decode(sides.next().unwrap_or_default()))
    })
}

fn form_decode(text: &[u8]) -> Vec<u8> {
    let spaced: Vec<u8> = text.iter().map(|byte| if *byte == b'+' { b' ' } else { *byte }).collect();
    decode(&spaced)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(path: &str) -> Lookup<'_> {
        Lookup {
            method: b"POST",
            path: path.as_bytes(),
            header: &|name| match name {
                "x-account" => Some(b"a/1 \xff".to_vec()),
                "x-empty" => Some(Vec::new()),
                "x-long" => Some(vec![b' '; 90]),
                _ => None,
            },
            route: &|| None,
            principal: &|| Some(b"spiffe://mesh/ns/a/sa/b".to_vec()),
        }
    }

    fn fill(template: &str, capture: &str, path: &str) -> Result<String, String> {
        let template = Template::parse(template, &["id".into()]).unwrap();
        let filled = template.fill(&[capture.to_owned()], &lookup(path));
        filled.map(|name| name.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn every_source() {
        for (template, name) in [
            ("order/{id}", "order/42"),
            ("order/{id}/x-{method}", "order/42/x-POST"),
            ("account/{header:X-Account}", "account/a%2F1%20%FF"),
            ("q/{query:a b}", "q/1%202"),
            ("q/{query:c}-{query:d}", "q/3-%2F"),
            ("who/{principal}", "who/spiffe:%2F%2Fmesh%2Fns%2Fa%2Fsa%2Fb"),
            ("all", "all"),
            ("a/%34", "a/4"),
        ] {
            let template = template.replace("a b", "ab");
            assert_eq!(fill(&template, "42", "/x?ab=1+2&c=%33&d=%2f#&c=9").as_deref(), Ok(name), "{template}");
        }
    }

    #[test]
    fn captures_are_decoded_once() {
        assert_eq!(fill("o/{id}", "a%2Fb", "/").unwrap(), "o/a%2Fb");
        assert_eq!(fill("o/{id}", "%2534", "/").unwrap(), "o/%2534");
        assert_eq!(fill("o/{id}", "4%", "/").unwrap(), "o/4%25");
    }

    #[test]
    fn a_value_that_is_not_there_is_named() {
        assert_eq!(
            fill("a/{header:x-no}", "", "/").unwrap_err(),
            "lock a/{header:x-no}: the request has no header x-no"
        );
        assert_eq!(
            fill("a/{header:x-empty}", "", "/").unwrap_err(),
            "lock a/{header:x-empty}: the header x-empty is empty"
        );
        assert_eq!(
            fill("a/{query:q}", "", "/x").unwrap_err(),
            "lock a/{query:q}: the request has no query parameter q"
        );
        assert_eq!(fill("a/{query:q}", "", "/x?q").unwrap_err(), "lock a/{query:q}: the query parameter q is empty");
        assert_eq!(
            fill("a/{query:q}", "", "/x?q=1&%71=2").unwrap_err(),
            "lock a/{query:q}: the query parameter q is there more than once"
        );
        assert_eq!(
            fill("a/{header:x-long}", "", "/").unwrap_err(),
            "lock a/{header:x-long}: a lock name has at most 256 bytes, this one has 272"
        );
    }

    #[test]
    fn bad_templates_say_the_fix() {
        for (text, problem) in [
            ("{id}", "has no fixed class; write the first segment out, such as \"order/{id}\""),
            ("order-{id}/x", "has no fixed class; write the first segment out, such as \"order/{id}\""),
            ("order/{id", "has a \"{\" without its \"}\""),
            ("order/{idd}", "names \"idd\", which the rule's path does not capture; did you mean \"id\"?"),
            (
                "order/{customer}",
                "names \"customer\", which the rule's path does not capture; use id, method, principal, header:NAME or query:NAME",
            ),
            ("order/{haeder:x}", "has a source \"haeder\", which there is not; did you mean \"header\"?"),
            ("order/{header:a b}", "names \"a b\", which is no header"),
            ("order/{query:}", "names \"\", which is no query parameter"),
            ("order//{id}", "is not a lock name: a lock name cannot have an empty segment (byte 6)"),
            ("", "is not a lock name: a lock name cannot be empty"),
            ("order/{id}}", "is not a lock name: byte 0x7D at 10 cannot stand in a lock name; write it as %7D"),
            ("order/%{id}", "is not a lock name: % at byte 6 needs two hexadecimal digits behind it"),
        ] {
            assert_eq!(Template::parse(text, &["id".into()]).unwrap_err(), problem, "{text}");
        }
    }
}
