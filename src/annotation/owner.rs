//! Who a request belongs to: reading an owner from the headers that can name one.
//!
//! An owner is compared as text, so every source gives printable ASCII without spaces: other bytes, and the percent
//! sign, are percent-encoded, which keeps different owners different. One that is longer than
//! [`OwnerId::MAX`] after that counts as absent, because a shortened one could be somebody else's.

use interlock_core::OwnerId;

/// A header that can name the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnerSource {
    /// The trace id of W3C Trace Context.
    Traceparent,
    /// The request id.
    RequestId,
    /// A header of its own.
    LockOwner,
    /// The `lock-owner` member of W3C Baggage.
    Baggage,
}

impl OwnerSource {
    /// Every source, under its name: in policies, and on the wire.
    pub const ALL: [(&'static str, OwnerSource); 4] = [
        ("traceparent", OwnerSource::Traceparent),
        ("x-request-id", OwnerSource::RequestId),
        ("lock-owner", OwnerSource::LockOwner),
        ("baggage", OwnerSource::Baggage),
    ];

    /// The header to read.
    pub const fn header(self) -> &'static str {
        match self {
            OwnerSource::Traceparent => "traceparent",
            OwnerSource::RequestId => "x-request-id",
            OwnerSource::LockOwner => "lock-owner",
            OwnerSource::Baggage => "baggage",
        }
    }

    /// The owner that this header's value names; none where it is malformed or names nobody.
    pub fn read(self, value: &[u8]) -> Option<OwnerId> {
        match self {
            OwnerSource::Traceparent => trace_id(value),
            OwnerSource::RequestId | OwnerSource::LockOwner => owner(value.trim_ascii()),
            OwnerSource::Baggage => baggage_member(value, b"lock-owner").and_then(|value| owner(&decode(value))),
        }
    }
}

/// The owner by the first of the sources that is present and well-formed. Later headers are not read.
pub fn find(sources: &[OwnerSource], mut header: impl FnMut(&str) -> Option<Vec<u8>>) -> Option<OwnerId> {
    sources.iter().find_map(|source| header(source.header()).and_then(|value| source.read(&value)))
}

/// The trace id of a `traceparent` (W3C Trace Context, section 3.2). A malformed one is to be ignored.
fn trace_id(value: &[u8]) -> Option<OwnerId> {
    let value = value.trim_ascii();
    let mut fields = value.splitn(5, |byte| *byte == b'-');
    let (version, trace, parent, flags) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let hex = |field: &[u8], length| {
        field.len() == length && field.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let zero = |field: &[u8]| field.iter().all(|byte| *byte == b'0');
    // Later versions may add fields behind these four; version ff is forbidden.
    let more_is_fine = fields.next().is_none() || version != b"00";
    let valid = hex(version, 2)
        && version != b"ff"
        && hex(trace, 32)
        && !zero(trace)
        && hex(parent, 16)
        && !zero(parent)
        && hex(flags, 2)
        && more_is_fine;
    valid.then(|| owner(trace)).flatten()
}

/// The value of a member of a `baggage` list, without its properties; the first where several have that name.
fn baggage_member<'a>(list: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    list.split(|byte| *byte == b',').find_map(|member| {
        let pair = member.split(|byte| *byte == b';').next()?;
        let equals = pair.iter().position(|byte| *byte == b'=')?;
        let (key, value) = pair.split_at_checked(equals)?;
        (key.trim_ascii() == name).then(|| value.strip_prefix(b"=").unwrap_or_default().trim_ascii())
    })
}

fn owner(value: &[u8]) -> Option<OwnerId> {
    // Encoding only makes it longer.
    if value.len() > OwnerId::MAX {
        return None;
    }
    let mut text = String::with_capacity(value.len());
    for byte in value {
        match byte {
            b'%' | 0..=0x20 | 0x7F.. => text.push_str(&format!("%{byte:02X}")),
            _ => text.push(char::from(*byte)),
        }
    }
    OwnerId::new(&text)
}

/// Undoes percent-encoding, once. A percent sign without two hexadecimal digits behind it stands for itself.
pub(crate) fn decode(value: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(value.len());
    let mut rest = value;
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        match (byte, tail) {
            (b'%', [high, low, behind @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                decoded.push(digit(*high) << 4 | digit(*low));
                rest = behind;
            }
            _ => decoded.push(*byte),
        }
    }
    decoded
}

/// The value of a hexadecimal digit.
fn digit(byte: u8) -> u8 {
    char::from(byte).to_digit(16).and_then(|value| u8::try_from(value).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn read(source: OwnerSource, value: &str) -> Option<String> {
        source.read(value.as_bytes()).map(|owner| owner.to_string())
    }

    #[test]
    fn a_trace_is_its_id() {
        let id = Some("4bf92f3577b34da6a3ce929d0e0e4736".to_owned());
        assert_eq!(read(OwnerSource::Traceparent, TRACE), id);
        assert_eq!(read(OwnerSource::Traceparent, &format!(" {TRACE} ")), id);
        assert_eq!(read(OwnerSource::Traceparent, &TRACE.replacen("00", "cc", 1)), id);
        assert_eq!(read(OwnerSource::Traceparent, &format!("{}-more-of-it", TRACE.replacen("00", "01", 1))), id);
    }

    #[test]
    fn a_malformed_trace_is_absent() {
        for wrong in [
            String::new(),
            TRACE.replacen("00", "ff", 1),
            TRACE.replacen("00", "0", 1),
            TRACE.to_uppercase(),
            format!("{TRACE}-more"),
            format!("{TRACE}0"),
            TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            TRACE.replace("00f067aa0ba902b7", &"0".repeat(16)),
            TRACE.replace("-01", ""),
            TRACE.replace("4bf9", "4bg9"),
        ] {
            assert_eq!(read(OwnerSource::Traceparent, &wrong), None, "{wrong}");
        }
    }

    #[test]
    fn other_bytes_are_encoded() {
        assert_eq!(read(OwnerSource::RequestId, " a b%ü\t").as_deref(), Some("a%20b%25%C3%BC"));
        assert_eq!(read(OwnerSource::LockOwner, "batch-7").as_deref(), Some("batch-7"));
        assert_eq!(read(OwnerSource::LockOwner, ""), None);
        assert_eq!(read(OwnerSource::LockOwner, &"x".repeat(256)).unwrap().len(), 256);
        assert_eq!(read(OwnerSource::LockOwner, &"x".repeat(257)), None);
        assert_eq!(read(OwnerSource::LockOwner, &"%".repeat(100)), None);
        let every: Vec<u8> = (0x40..=0xFF).step_by(3).collect();
        assert!(OwnerSource::RequestId.read(&every).unwrap().as_str().is_ascii());
    }

    #[test]
    fn baggage_names_an_owner_among_others() {
        let source = OwnerSource::Baggage;
        assert_eq!(read(source, "a=1, lock-owner = batch%207 ;ttl=1, b=2").as_deref(), Some("batch%207"));
        assert_eq!(read(source, "lock-owner=a=b").as_deref(), Some("a=b"));
        assert_eq!(read(source, "lock-owner=a,lock-owner=b").as_deref(), Some("a"));
        for absent in ["", "lock-owner", "lock-owner=", "x;lock-owner=a", "Lock-Owner=a", ",,=,;="] {
            assert_eq!(read(source, absent), None, "{absent}");
        }
    }

    #[test]
    fn the_first_source_that_names_an_owner_counts() {
        let sources = [OwnerSource::Traceparent, OwnerSource::RequestId, OwnerSource::Baggage];
        let mut asked = Vec::new();
        let owner = find(&sources, |header| {
            asked.push(header.to_owned());
            match header {
                "traceparent" => Some(b"broken".to_vec()),
                "x-request-id" => Some(b"r-1".to_vec()),
                _ => None,
            }
        });
        assert_eq!(owner.unwrap().as_str(), "r-1");
        assert_eq!(asked, ["traceparent", "x-request-id"]);
        assert!(find(&sources, |_| None).is_none());
    }

    #[test]
    fn decoding_happens_once() {
        assert_eq!(decode(b"a%2Fb%2f%zz%4%"), b"a/b/%zz%4%");
        assert_eq!(decode(b"%2534%32"), b"%342");
        assert_eq!(decode(b"%%34"), b"%4");
    }
}
