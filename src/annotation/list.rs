//! Structured-field Lists (RFC 9651) whose members are Tokens or Strings with parameters: the one shape that all of
//! Interlock's headers have. What the members mean must not live here.

use std::borrow::Cow;
use std::convert::Infallible;

use sfv::visitor::{EntryVisitor, Ignored, InnerListVisitor, ItemVisitor, ListVisitor, ParameterVisitor};
use sfv::{BareItemFromInput, KeyRef, Parser};

/// The most members that a List may have. Far above what any policy lets a request lock; it bounds the memory that a
/// header can claim.
pub const MAX_MEMBERS: usize = 4096;

/// One member: its value, and those of its parameters that the caller asked for.
#[derive(Debug)]
pub struct Member<'a> {
    /// The Token or the String: printable ASCII.
    pub value: Cow<'a, str>,
    parameters: Vec<(&'a str, BareItemFromInput<'a>)>,
}

impl Member<'_> {
    /// The value of a parameter. Where one stands twice the last counts (RFC 9651, section 4.2.3.2).
    pub fn parameter(&self, name: &str) -> Option<&BareItemFromInput<'_>> {
        self.parameters.iter().rev().find(|(key, _)| *key == name).map(|(_, value)| value)
    }
}

/// Why a text is no such List. Members count from 1, bytes from 0.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListError {
    /// Nothing in it.
    #[error("it names no lock")]
    Empty,
    /// It breaks the syntax.
    #[error("member {member}: {error}")]
    Syntax {
        /// Near which member.
        member: usize,
        /// The parser's words, with the byte.
        error: String,
    },
    /// A member is something else.
    #[error("member {member}: is {found}; it must be a Token or a String")]
    Kind {
        /// Which member.
        member: usize,
        /// What it is.
        found: &'static str,
    },
    /// Over [`MAX_MEMBERS`].
    #[error("it has more than {MAX_MEMBERS} members")]
    TooLong,
}

/// Several fields of one name as the one List that they are (RFC 9110, section 5.3).
pub fn join<'a>(fields: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut text = Vec::new();
    for (index, field) in fields.into_iter().enumerate() {
        if index > 0 {
            text.extend_from_slice(b", ");
        }
        text.extend_from_slice(field);
    }
    text
}

/// The members of a List, with those of their parameters that are `known`. The others are checked and forgotten.
///
/// # Errors
/// The first thing that is wrong; a List without members is, too.
pub fn parse<'a>(text: &'a [u8], known: &[&str]) -> Result<Vec<Member<'a>>, ListError> {
    let mut collector = Collector { known, begun: 0, members: Vec::new(), fault: None };
    let parsed = Parser::new(text).parse_list_with_visitor(&mut collector);
    if let Some(fault) = collector.fault {
        return Err(fault);
    }
    match parsed {
        Err(error) => {
            // A byte that no List may hold is found before the first member is begun.
            Err(ListError::Syntax { member: collector.begun.max(1), error: error.to_string() })
        }
        Ok(()) if collector.members.is_empty() => Err(ListError::Empty),
        Ok(()) => Ok(collector.members),
    }
}

/// A Token or a String as text; nothing for other items.
pub fn text<'a>(item: &'a BareItemFromInput<'_>) -> Option<Cow<'a, str>> {
    match item {
        BareItemFromInput::Token(token) => Some(Cow::Borrowed(token.as_str())),
        BareItemFromInput::String(text) => Some(Cow::Borrowed(text.as_str())),
        _ => None,
    }
}

fn kind(item: &BareItemFromInput<'_>) -> &'static str {
    match item {
        BareItemFromInput::Decimal(_) => "a Decimal",
        BareItemFromInput::Integer(_) => "an Integer",
        BareItemFromInput::String(_) => "a String",
        BareItemFromInput::ByteSequence(_) => "a Byte Sequence",
        BareItemFromInput::Boolean(_) => "a Boolean",
        BareItemFromInput::Token(_) => "a Token",
        BareItemFromInput::Date(_) => "a Date",
        BareItemFromInput::DisplayString(_) => "a Display String",
    }
}

/// Gathers members. A fault of our own is kept aside, because the parser would only keep its text.
struct Collector<'a, 'k> {
    known: &'k [&'k str],
    begun: usize,
    members: Vec<Member<'a>>,
    fault: Option<ListError>,
}

/// Stops the parser; the fault itself is in the collector.
#[derive(Debug, thiserror::Error)]
#[error("refused")]
struct Stop;

impl Collector<'_, '_> {
    fn stop(&mut self, fault: ListError) -> Stop {
        self.fault = Some(fault);
        Stop
    }
}

impl<'a> ListVisitor<'a> for &mut Collector<'a, '_> {
    type Out = ();
    type Error = Stop;

    fn entry(&mut self) -> Result<impl EntryVisitor<'a>, Stop> {
        if self.members.len() >= MAX_MEMBERS {
            return Err(self.stop(ListError::TooLong));
        }
        self.begun += 1;
        Ok(Entry(self))
    }

    fn finish(self) -> Result<(), Stop> {
        Ok(())
    }
}

struct Entry<'a, 'k, 'c>(&'c mut Collector<'a, 'k>);

impl<'a> EntryVisitor<'a> for Entry<'a, '_, '_> {
    type Error = Stop;

    fn item(self) -> Result<impl ItemVisitor<'a>, Stop> {
        Ok(self)
    }

    fn inner_list(self) -> Result<impl InnerListVisitor<'a>, Stop> {
        let member = self.0.begun;
        Err::<Ignored, _>(self.0.stop(ListError::Kind { member, found: "an Inner List" }))
    }
}

impl<'a> ItemVisitor<'a> for Entry<'a, '_, '_> {
    type Out = ();
    type Error = Stop;

    fn bare_item(self, item: BareItemFromInput<'a>) -> Result<impl ParameterVisitor<'a, Out = ()>, Stop> {
        let value = match item {
            BareItemFromInput::Token(token) => Cow::Borrowed(token.as_str()),
            BareItemFromInput::String(Cow::Borrowed(text)) => Cow::Borrowed(text.as_str()),
            BareItemFromInput::String(Cow::Owned(text)) => Cow::Owned(text.into()),
            other => {
                let member = self.0.begun;
                return Err(self.0.stop(ListError::Kind { member, found: kind(&other) }));
            }
        };
        self.0.members.push(Member { value, parameters: Vec::new() });
        Ok(self)
    }
}

impl<'a> ParameterVisitor<'a> for Entry<'a, '_, '_> {
    type Out = ();
    type Error = Infallible;

    fn parameter(&mut self, key: &'a KeyRef, value: BareItemFromInput<'a>) -> Result<(), Infallible> {
        if self.0.known.contains(&key.as_str())
            && let Some(member) = self.0.members.last_mut()
        {
            // A later one of the same name takes the earlier one's place, so that repeating it costs no memory.
            member.parameters.retain(|(earlier, _)| *earlier != key.as_str());
            member.parameters.push((key.as_str(), value));
        }
        Ok(())
    }

    fn finish(self) -> Result<(), Infallible> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_bounded() {
        let fits = vec!["a"; MAX_MEMBERS].join(",");
        assert_eq!(parse(fits.as_bytes(), &[]).unwrap().len(), MAX_MEMBERS);
        let over = vec!["a"; MAX_MEMBERS + 1].join(",");
        assert_eq!(parse(over.as_bytes(), &[]).unwrap_err(), ListError::TooLong);
    }

    #[test]
    fn escapes_are_undone() {
        let members = parse(br#""a\"b\\c""#, &[]).unwrap();
        assert_eq!(members[0].value, "a\"b\\c");
    }

    #[test]
    fn an_empty_field_among_others_breaks_the_list() {
        assert!(parse(&join([&b"a"[..], b""]), &[]).is_err());
        assert!(parse(&join([&b""[..], b"a"]), &[]).is_err());
    }
}
