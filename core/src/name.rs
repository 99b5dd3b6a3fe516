//! Lock names: `class/key/…`, validated once and then cheap to copy.
//!
//! Names are compared as bytes, so one lock must have one spelling: percent-encoded characters that need no encoding
//! are decoded and the hexadecimal digits of the rest are made upper-case (RFC 3986, section 6.2.2).

use core::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The longest name, in bytes, as written and as stored.
pub const MAX_NAME: usize = 256;

/// A valid lock name in its one canonical spelling. Ordered by bytes; an ancestor sorts before its descendants.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LockName(Arc<str>);

/// Why a text is no lock name. Positions are bytes from 0.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing at all.
    #[error("a lock name cannot be empty")]
    Empty,
    /// Over [`MAX_NAME`] bytes.
    #[error("a lock name has at most {MAX_NAME} bytes, this one has {0}")]
    TooLong(usize),
    /// Two slashes in a row, or one at either end.
    #[error("a lock name cannot have an empty segment (byte {0})")]
    EmptySegment(usize),
    /// A byte outside `A-Z a-z 0-9 . _ ~ : @ - /` and `%HH`.
    #[error("byte 0x{byte:02X} at {at} cannot stand in a lock name; write it as %{byte:02X}")]
    Byte {
        /// Where it stands.
        at: usize,
        /// The byte.
        byte: u8,
    },
    /// A percent sign without two hexadecimal digits behind it.
    #[error("% at byte {0} needs two hexadecimal digits behind it")]
    Percent(usize),
}

const fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'~' | b':' | b'@' | b'-')
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

impl LockName {
    /// Validates `text` and brings it into its canonical spelling.
    ///
    /// # Errors
    /// The first rule that the text breaks.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        if is_canonical(text.as_bytes()) { Ok(LockName(text.into())) } else { Self::from_bytes(text.as_bytes()) }
    }

    /// As [`LockName::parse`], for bytes that need not be UTF-8.
    ///
    /// # Errors
    /// The first rule that the bytes break.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, NameError> {
        if bytes.is_empty() {
            return Err(NameError::Empty);
        }
        if bytes.len() > MAX_NAME {
            return Err(NameError::TooLong(bytes.len()));
        }
        let mut name = String::with_capacity(bytes.len());
        let mut rest = bytes.iter().copied().enumerate();
        let mut segment_is_empty = true;
        while let Some((at, byte)) = rest.next() {
            match byte {
                b'/' if segment_is_empty => return Err(NameError::EmptySegment(at)),
                b'/' => {
                    segment_is_empty = true;
                    name.push('/');
                    continue;
                }
                b'%' => {
                    let mut digit = || rest.next().and_then(|(_, digit)| hex(digit)).ok_or(NameError::Percent(at));
                    push_encoded(&mut name, digit()? * 16 + digit()?);
                }
                plain if is_plain(plain) => name.push(char::from(plain)),
                byte => return Err(NameError::Byte { at, byte }),
            }
            segment_is_empty = false;
        }
        if segment_is_empty {
            return Err(NameError::EmptySegment(bytes.len()));
        }
        Ok(LockName(name.into()))
    }

    /// Appends `value` to `name`, percent-encoding every byte that a segment cannot hold, the slash included.
    pub fn encode_into(name: &mut String, value: &[u8]) {
        for byte in value {
            push_encoded(name, *byte);
        }
    }

    /// The canonical spelling.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The class: the first segment.
    pub fn class(&self) -> &str {
        self.0.split('/').next().unwrap_or_default()
    }

    /// Every proper prefix that is a name of its own, from the class down: `stock`, `stock/a` for `stock/a/b`.
    pub fn ancestors(&self) -> impl Iterator<Item = LockName> + '_ {
        self.0.match_indices('/').filter_map(|(at, _)| self.0.get(..at)).map(|prefix| LockName(prefix.into()))
    }
}

/// Whether this is a name in its canonical spelling without any percent sign: most are.
fn is_canonical(bytes: &[u8]) -> bool {
    let mut before = b'/';
    for byte in bytes {
        if !(is_plain(*byte) || (*byte == b'/' && before != b'/')) {
            return false;
        }
        before = *byte;
    }
    before != b'/' && bytes.len() <= MAX_NAME
}

/// Appends one byte as a segment spells it: itself where that is allowed, else `%HH`.
fn push_encoded(name: &mut String, byte: u8) {
    const DIGITS: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'A', 'B', 'C', 'D', 'E', 'F'];
    if is_plain(byte) {
        name.push(char::from(byte));
    } else {
        let digit = |nibble: u8| DIGITS.get(usize::from(nibble)).copied().unwrap_or('0');
        name.extend(['%', digit(byte >> 4), digit(byte & 0xF)]);
    }
}

impl fmt::Display for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for LockName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for LockName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <&str>::deserialize(deserializer)?;
        LockName::parse(text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn a_name_has_one_spelling() {
        for (written, canonical) in [
            ("order/42", "order/42"),
            ("order/%34%32", "order/42"),
            ("order/a%2fb", "order/a%2Fb"),
            ("order/%c3%bc", "order/%C3%BC"),
            ("a.b_c~d:e@f-g/%25", "a.b_c~d:e@f-g/%25"),
        ] {
            assert_eq!(LockName::parse(written).unwrap().as_str(), canonical);
        }
    }

    #[test]
    fn illegal_names_say_what_and_where() {
        assert_eq!(LockName::parse(""), Err(NameError::Empty));
        assert_eq!(LockName::parse("/a"), Err(NameError::EmptySegment(0)));
        assert_eq!(LockName::parse("a//b"), Err(NameError::EmptySegment(2)));
        assert_eq!(LockName::parse("a/"), Err(NameError::EmptySegment(2)));
        assert_eq!(LockName::parse("a b"), Err(NameError::Byte { at: 1, byte: b' ' }));
        assert_eq!(LockName::from_bytes(b"a/\xff"), Err(NameError::Byte { at: 2, byte: 0xFF }));
        assert_eq!(LockName::parse("a/%2"), Err(NameError::Percent(2)));
        assert_eq!(LockName::parse("a/%zz"), Err(NameError::Percent(2)));
        assert_eq!(LockName::parse(&"a".repeat(257)), Err(NameError::TooLong(257)));
        assert!(LockName::parse(&"a".repeat(256)).is_ok());
    }

    #[test]
    fn ancestors_go_from_the_class_down() {
        let name = LockName::parse("stock/a/b").unwrap();
        let ancestors: Vec<_> = name.ancestors().map(|name| name.to_string()).collect();
        assert_eq!(ancestors, ["stock", "stock/a"]);
        assert_eq!(name.class(), "stock");
        assert_eq!(LockName::parse("stock").unwrap().ancestors().count(), 0);
    }

    #[test]
    fn encoding_makes_any_bytes_a_segment() {
        let every: Vec<u8> = (0..=255).collect();
        let mut name = String::from("x/");
        LockName::encode_into(&mut name, every.get(..80).unwrap());
        assert_eq!(LockName::parse(&name).unwrap().as_str(), name);
        assert_eq!(name.matches('/').count(), 1);
    }
}
